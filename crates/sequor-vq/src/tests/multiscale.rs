//! The scale pyramid against loops over plain numbers.

use super::*;

const SCALES: [i64; 4] = [1, 2, 3, 5];

fn quantiser(seed: u64) -> (ParamBuilder, MultiScaleVq) {
    let p = builder(seed);
    let config = MultiScaleVqConfig::new(3, 12, &SCALES);
    let q = MultiScaleVq::new(&p, &config).unwrap();
    (p, q)
}

/// One channel-first picture of plain numbers.
#[derive(Clone)]
struct Plain {
    side: usize,
    /// `[channel][row][column]`.
    v: Vec<Vec<Vec<f64>>>,
}

impl Plain {
    fn zeros(channels: usize, side: usize) -> Self {
        Self {
            side,
            v: vec![vec![vec![0.0; side]; side]; channels],
        }
    }

    /// From `[side, side, channels]`.
    fn new(t: &Tensor) -> Self {
        let (side, channels) = (t.size()[0] as usize, t.size()[2] as usize);
        let flat = numbers(t);
        let mut p = Self::zeros(channels, side);
        for (i, x) in flat.into_iter().enumerate() {
            p.v[i % channels][i / channels / side][i / channels % side] = x;
        }
        p
    }

    fn add(&mut self, other: &Self, sign: f64) {
        for (a, b) in self
            .v
            .iter_mut()
            .flatten()
            .flatten()
            .zip(other.v.iter().flatten().flatten())
        {
            *a += sign * b;
        }
    }

    /// Adaptive average: cell `i` of `n` covers `floor(i s / n) .. ceil((i + 1) s / n)`.
    fn area(&self, n: usize) -> Self {
        let s = self.side;
        let mut out = Self::zeros(self.v.len(), n);
        for (c, map) in self.v.iter().enumerate() {
            for i in 0..n {
                for j in 0..n {
                    let covered = |at: usize| at * s / n..((at + 1) * s).div_ceil(n);
                    let (mut sum, mut count) = (0.0, 0.0);
                    for row in &map[covered(i)] {
                        for x in &row[covered(j)] {
                            sum += x;
                            count += 1.0;
                        }
                    }
                    out.v[c][i][j] = sum / count;
                }
            }
        }
        out
    }

    /// Keys' cubic with a = -0.75, half-pixel centres, edges repeated.
    fn bicubic(&self, n: usize) -> Self {
        let weight = |d: f64| {
            let (a, d) = (-0.75, d.abs());
            if d <= 1.0 {
                ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
            } else if d < 2.0 {
                ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a
            } else {
                0.0
            }
        };
        let taps = |i: usize| -> Vec<(usize, f64)> {
            let at = (i as f64 + 0.5) * self.side as f64 / n as f64 - 0.5;
            let base = at.floor() as i64;
            (-1..=2)
                .map(|k| {
                    let from = (base + k).clamp(0, self.side as i64 - 1) as usize;
                    (from, weight(at - (base + k) as f64))
                })
                .collect()
        };
        let mut out = Self::zeros(self.v.len(), n);
        for (c, map) in self.v.iter().enumerate() {
            for i in 0..n {
                for j in 0..n {
                    for (r, wr) in taps(i) {
                        for (col, wc) in taps(j) {
                            out.v[c][i][j] += wr * wc * map[r][col];
                        }
                    }
                }
            }
        }
        out
    }

    /// `0.5 h + 0.5 conv3x3(h)`, zeros around.
    fn phi(&self, weight: &[f64], bias: &[f64]) -> Self {
        let (n, channels) = (self.side as i64, self.v.len());
        let mut out = Self::zeros(channels, self.side);
        for o in 0..channels {
            for i in 0..n {
                for j in 0..n {
                    let mut sum = bias[o];
                    for (c, map) in self.v.iter().enumerate() {
                        for a in 0..3i64 {
                            for b in 0..3i64 {
                                let (r, col) = (i + a - 1, j + b - 1);
                                if (0..n).contains(&r) && (0..n).contains(&col) {
                                    let w = weight[((o * channels + c) * 9) + (a * 3 + b) as usize];
                                    sum += w * map[r as usize][col as usize];
                                }
                            }
                        }
                    }
                    let (i, j) = (i as usize, j as usize);
                    out.v[o][i][j] = 0.5 * self.v[o][i][j] + 0.5 * sum;
                }
            }
        }
        out
    }
}

fn parameter(p: &ParamBuilder, name: &str) -> Vec<f64> {
    let all = p.params();
    numbers(&all.iter().find(|q| q.name == name).unwrap().tensor)
}

#[test]
fn encoding_equals_the_plain_loops() {
    let (p, q) = quantiser(1);
    let table = parameter(&p, "codebook.weight");
    let z = normal(2, &[2, 5, 5, 3]);
    let e = q.encode(&z).unwrap();
    for item in 0..2 {
        let mut rest = Plain::new(&z.get(item));
        let mut f_hat = Plain::zeros(3, 5);
        let mut tokens = Vec::new();
        for (k, &side) in SCALES.iter().enumerate() {
            let n = side as usize;
            let small = rest.area(n);
            let mut chosen = Plain::zeros(3, n);
            for i in 0..n {
                for j in 0..n {
                    let far = |e: &[f64]| -> f64 {
                        (0..3).map(|c| (small.v[c][i][j] - e[c]).powi(2)).sum()
                    };
                    let codes: Vec<&[f64]> = table.chunks(3).collect();
                    let mut best = 0;
                    for (t, e) in codes.iter().enumerate() {
                        if far(e) < far(codes[best]) {
                            best = t;
                        }
                    }
                    tokens.push(best as i64);
                    (0..3).for_each(|c| chosen.v[c][i][j] = codes[best][c]);
                }
            }
            // Four scales, four convolutions: one each.
            let weight = parameter(&p, &format!("phi.{k}.weight"));
            let bias = parameter(&p, &format!("phi.{k}.bias"));
            let h = chosen.bicubic(5).phi(&weight, &bias);
            f_hat.add(&h, 1.0);
            rest.add(&h, -1.0);
        }
        assert_eq!(integers(&e.indices.get(item)), tokens);
        let got = Plain::new(&e.quantized.get(item));
        for (a, b) in got
            .v
            .iter()
            .flatten()
            .flatten()
            .zip(f_hat.v.iter().flatten().flatten())
        {
            assert!((a - b).abs() < 1e-5);
        }
    }
}

#[test]
fn features_grow_to_what_decoding_gives() {
    let (_, q) = quantiser(3);
    assert_eq!((q.side(), q.tokens()), (5, 39));
    let z = normal(4, &[2, 5, 5, 3]);
    let e = q.encode(&z).unwrap();
    let taught = q.predictor_inputs(&e.indices).unwrap();
    assert_eq!(taught.size(), [2, 38, 3]);
    let mut features = q.features(2);
    assert!(features.map().is_none() && features.next_input(&q).unwrap().is_none());
    let (mut start, mut seen) = (0, 0);
    for (scale, map) in q.split(&e.indices).unwrap().iter().enumerate() {
        // A draft that is thrown away leaves no trace.
        let mut draft = features.fork();
        draft.add(&q, &map.zeros_like()).unwrap();
        features.add(&q, map).unwrap();
        assert_eq!(features.scales(), scale + 1);
        seen += map.size()[1];
        let part = q.decode(&e.indices.narrow(1, 0, seen)).unwrap();
        assert_eq!(channels_last(features.map().unwrap()).unwrap(), part);
        // What a generator sees is what the predictor was taught with.
        match features.next_input(&q).unwrap() {
            Some(input) => {
                let n = input.size()[1];
                assert_eq!(input, taught.narrow(1, start, n));
                start += n;
            }
            None => assert_eq!(scale, 3),
        }
    }
    assert_eq!(start, 38);
    assert_eq!(q.decode(&e.indices).unwrap(), e.quantized);
    assert!(features.add(&q, &e.indices.narrow(1, 0, 1)).is_err());
    // The first scale alone predicts nothing.
    let none = q.predictor_inputs(&e.indices.narrow(1, 0, 1)).unwrap();
    assert_eq!(none.size(), [2, 0, 3]);
}

#[test]
fn mixtures_of_codes_are_added_like_codes() {
    let (_, q) = quantiser(3);
    let index = Tensor::from_slice(&[4i64, 7]).reshape([2, 1]);
    let (mut a, mut b) = (q.features(2), q.features(2));
    a.add(&q, &index).unwrap();
    b.add_vectors(&q, &q.lookup(&index).unwrap()).unwrap();
    assert_eq!(a.map().unwrap(), b.map().unwrap());
    let wrong = normal(1, &[2, 3, 3]);
    assert!(b.add_vectors(&q, &wrong).is_err());
    assert!(q.features(3).add(&q, &index).is_err());
}

#[test]
fn the_loss_is_the_mean_over_scales_of_both_terms() {
    let (p, mut q) = quantiser(5);
    let z = leaf(&normal(6, &[2, 5, 5, 3]));
    let e = q.encode(&z).unwrap();
    let mut want = 0.0;
    let mut seen = 0;
    for map in q.split(&e.indices).unwrap() {
        seen += map.size()[1];
        let part = q.decode(&e.indices.narrow(1, 0, seen)).unwrap();
        want += 1.25 * scalar(&(part - &z).square().mean(Kind::Float)) / 4.0;
    }
    let t = q.train(&z, Key::new(0, 0)).unwrap();
    assert!((scalar(&t.loss) - want).abs() < 1e-5);
    assert_eq!(t.stages.len(), 4);
    // Codes and convolutions learn from it.
    let params = p.params();
    assert_eq!(params.len(), 9);
    let tensors: Vec<&Tensor> = params.iter().map(|p| &p.tensor).collect();
    let found = Tensor::run_backward(&[&t.loss], &tensors, false, false);
    for (p, g) in params.iter().zip(found) {
        assert!(scalar(&g.abs().max()) > 0.0, "{}", p.name);
    }
}

#[test]
fn dead_codes_of_a_pyramid_begin_again() {
    let config = MultiScaleVqConfig {
        restart: Some(Restart {
            threshold: Threshold::MeanFraction(0.1),
            every: 1,
        }),
        ..MultiScaleVqConfig::new(3, 64, &[1, 2, 4])
    };
    let mut q = MultiScaleVq::new(&builder(1), &config).unwrap();
    let z = normal(1, &[8, 4, 4, 3]) * 3.0 + 10.0;
    let used = |q: &MultiScaleVq| {
        let mut usage = Usage::of(q).unwrap();
        usage.add(&q.encode(&z).unwrap().indices).unwrap();
        usage.used()[0]
    };
    let before = used(&q);
    let mut moved = 0;
    for step in 0..400 {
        moved += q.train(&z, Key::new(1, step)).unwrap().restarted;
    }
    assert!(
        moved > 0 && used(&q) > 2.0 * before,
        "{before} {}",
        used(&q)
    );
}

#[test]
fn one_scale_without_convolutions_is_plain_quantisation() {
    let config = MultiScaleVqConfig {
        num_convolutions: 0,
        ..MultiScaleVqConfig::new(3, 12, &[4])
    };
    let p = builder(1);
    let q = MultiScaleVq::new(&p, &config).unwrap();
    let plain = VqConfig {
        learning: Learning::Gradient,
        ..VqConfig::new(3, 12)
    };
    let plain = VectorQuantizer::new(&p, &plain).unwrap();
    let z = normal(2, &[2, 4, 4, 3]);
    let (a, b) = (q.encode(&z).unwrap(), plain.encode(&z).unwrap());
    assert_eq!(a.indices, b.indices.reshape([2, 16]));
    assert_eq!(a.quantized, b.quantized);
}
