//! Configurations: defaults, files, and what is refused by name.

use super::*;
use serde::de::DeserializeOwned;

fn refused<T>(result: Result<T>, field: &str) {
    match result {
        Err(Error::Config {
            field: found,
            advice,
            ..
        }) => {
            assert_eq!(found, field);
            assert!(advice.len() > 8, "{advice}");
        }
        Err(e) => panic!("another error than for {field}: {e}"),
        Ok(_) => panic!("{field} was not refused"),
    }
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    type Change = fn(&mut VqConfig);
    let changes: [(&str, Change); 19] = [
        ("dim", |c| c.dim = 0),
        ("dim", |c| c.dim = i64::MAX),
        ("codebook_size", |c| c.codebook_size = -3),
        ("codebook_dim", |c| c.codebook_dim = Some(0)),
        ("decay", |c| c.decay = 1.0),
        ("decay", |c| c.decay = f64::NAN),
        ("eps", |c| c.eps = 0.0),
        ("commitment_weight", |c| c.commitment_weight = -1.0),
        ("codebook_weight", |c| c.codebook_weight = f64::INFINITY),
        ("kmeans", |c| c.kmeans = Some(0)),
        ("weight", |c| {
            c.entropy = Some(Entropy {
                weight: f64::NAN,
                temperature: 1.0,
            })
        }),
        ("temperature", |c| {
            c.entropy = Some(Entropy {
                weight: 1.0,
                temperature: 0.0,
            })
        }),
        ("every", |c| {
            c.restart = Some(Restart {
                every: 0,
                ..Restart::default()
            })
        }),
        ("threshold", |c| {
            c.restart = Some(Restart {
                threshold: Threshold::MeanFraction(1.0),
                every: 1,
            })
        }),
        ("threshold", |c| {
            c.restart = Some(Restart {
                threshold: Threshold::Count(-1.0),
                every: 1,
            })
        }),
        ("dim", |c| c.dim = -1),
        ("codebook_size", |c| c.codebook_size = 1 << 40),
        ("codebook_size", |c| {
            (c.dim, c.codebook_size) = (1 << 20, 1 << 20)
        }),
        ("dim", |c| {
            (c.dim, c.codebook_dim) = (1 << 20, Some(1 << 19))
        }),
    ];
    for (field, change) in changes {
        let mut config = VqConfig::new(4, 8);
        change(&mut config);
        refused(VectorQuantizer::new(&builder(1), &config), field);
        let residual = ResidualVqConfig::new(2, config);
        refused(ResidualVq::new(&builder(1), &residual), field);
    }
}

#[test]
fn options_of_the_other_quantisers_are_refused_by_name() {
    let b = || builder(1);
    for levels in [
        &[][..],
        &[1, 5],
        &[0],
        &[-8, 5],
        &[i64::MAX, 2],
        &[1 << 20, 1 << 20, 1 << 20, 1 << 20], // 2^80 codes
    ] {
        refused(Fsq::new(&b(), &FsqConfig::new(levels)), "levels");
        let residual = ResidualFsqConfig::new(2, levels);
        refused(ResidualFsq::new(&b(), &residual), "levels");
    }
    let error = Fsq::new(&b(), &FsqConfig::new(&[1 << 20; 4])).unwrap_err();
    assert!(error.to_string().contains("63 bits"), "{error}");
    let dim = FsqConfig {
        dim: Some(0),
        ..FsqConfig::new(&[3])
    };
    refused(Fsq::new(&b(), &dim), "dim");
    for size in [0, 1, 3, 100, -8, i64::MIN] {
        refused(Lfq::new(&b(), &LfqConfig::new(size)), "codebook_size");
    }
    refused(Lfq::new(&b(), &LfqConfig::new(1 << 40)), "diversity_gamma");
    let cold = LfqConfig {
        inv_temperature: 0.0,
        ..LfqConfig::new(8)
    };
    refused(Lfq::new(&b(), &cold), "inv_temperature");
    for n in [0, -1, 1 << 20] {
        let config = ResidualVqConfig::new(n, VqConfig::new(4, 8));
        refused(ResidualVq::new(&b(), &config), "num_quantizers");
        let config = ResidualFsqConfig::new(n, &[5, 5]);
        refused(ResidualFsq::new(&b(), &config), "num_quantizers");
        let one = ResidualVqConfig::new(1, VqConfig::new(4, 8));
        if n < 1 {
            let config = GroupedResidualVqConfig::new(n, one);
            refused(GroupedResidualVq::new(&b(), &config), "groups");
        }
    }
    refused(
        ResidualFsq::new(&b(), &ResidualFsqConfig::new(60, &[8, 8])),
        "num_quantizers",
    );
    let drop = ResidualVqConfig {
        quantizer_dropout: 1.5,
        ..ResidualVqConfig::new(2, VqConfig::new(4, 8))
    };
    refused(ResidualVq::new(&b(), &drop), "quantizer_dropout");
    for scales in [&[][..], &[0, 1], &[4, 2], &[1, 1 << 40], &[-1]] {
        let config = MultiScaleVqConfig::new(4, 8, scales);
        refused(MultiScaleVq::new(&b(), &config), "scales");
    }
    let wide = MultiScaleVqConfig::new(1 << 20, 8, &[1]);
    refused(MultiScaleVq::new(&b(), &wide), "dim");
    let ratio = MultiScaleVqConfig {
        convolution_ratio: 2.0,
        ..MultiScaleVqConfig::new(4, 8, &[1])
    };
    refused(MultiScaleVq::new(&b(), &ratio), "convolution_ratio");
}

fn round_trip<T>(config: T)
where
    T: serde::Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<T>(&text).unwrap(), config);
    let odd = text.replacen('{', "{\"codebok_size\": 1, ", 1);
    let error = serde_json::from_str::<T>(&odd).unwrap_err().to_string();
    assert!(error.contains("codebok_size"), "{error}");
}

#[test]
fn configurations_are_kept_in_files_and_typing_errors_are_found() {
    let vq = VqConfig {
        distance: Distance::Cosine,
        learning: Learning::Gradient,
        estimator: Estimator::Rotation,
        entropy: Some(Entropy::default()),
        restart: Some(Restart::default()),
        kmeans: Some(10),
        ..VqConfig::new(4, 8)
    };
    round_trip(vq.clone());
    round_trip(ResidualVqConfig::new(3, vq.clone()));
    round_trip(GroupedResidualVqConfig::new(
        2,
        ResidualVqConfig::new(3, vq),
    ));
    round_trip(FsqConfig::new(&[8, 5]));
    round_trip(LfqConfig::new(256));
    round_trip(ResidualFsqConfig::new(2, &[5, 3]));
    round_trip(MultiScaleVqConfig::new(4, 8, &[1, 2]));
    let short: VqConfig = serde_json::from_str(
        r#"{"dim": 4, "codebook_size": 8, "distance": "cosine", "average": "floor",
            "restart": {"threshold": {"count": 2.0}}}"#,
    )
    .unwrap();
    let restart = short.restart.unwrap();
    assert_eq!(restart.threshold, Threshold::Count(2.0));
    assert_eq!((restart.every, short.decay), (5, 0.99));
}
