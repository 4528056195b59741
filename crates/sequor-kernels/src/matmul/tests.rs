//! Every set of instructions against the portable code, bit for bit, and that against
//! sums in f64.

use super::*;
use crate::rng::{Key, Purpose};

/// Numbers that are normal-ish: sums of uniforms, some of them large.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut stream = Key::new(seed, 0).stream(0, Purpose::Test);
    let mut uniform = move || stream.uniform() as f32 - 0.5;
    (0..n)
        .map(|i| {
            let x = uniform() + uniform() + uniform();
            if i % 37 == 5 { 9.0 * x } else { x }
        })
        .collect()
}

fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|i| i.available()).collect()
}

/// Inputs that a format takes, odd ones included where it can.
fn widths(format: Format) -> &'static [usize] {
    match format {
        Format::Bf16 | Format::Int8 => &[1, 2, 31, 32, 33, 64, 65, 577],
        Format::Q4K => &[256, 768],
        _ => &[32, 64, 576],
    }
}

fn product(w: &Packed, x: &[f32], rows: usize, threads: usize, isa: Isa) -> Vec<f32> {
    let mut y = vec![f32::NAN; rows * w.outputs()];
    w.multiply(x, rows, &mut y, None, threads, isa).unwrap();
    y
}

#[test]
fn a_packed_matrix_gives_back_its_bytes_and_numbers() {
    for format in Format::ALL {
        for &k in widths(format) {
            for n in [0, 1, 15, 16, 17, 33, 64] {
                let values = numbers(1, n * k);
                let stored = Stored::quantise(format, &values, n, k).unwrap();
                let packed = Packed::new(&stored).unwrap();
                assert_eq!(packed.stored(), stored, "{format} [{n}, {k}]");
                let all = stored.expand();
                let mut row = vec![0f32; k];
                for o in 0..n {
                    packed.expand_row(o, &mut row);
                    assert_eq!(row, all[o * k..(o + 1) * k]);
                }
                // No more bytes than by rows, but for panels that are not full.
                let padded = n.next_multiple_of(format.panel());
                let group = if format == Format::Int8 { 64 } else { 32 };
                let most = Stored::bytes_of(format, padded, k.next_multiple_of(group)).unwrap();
                assert!(packed.bytes() <= most + packed.panels() * 64, "{format}");
            }
        }
    }
}

#[test]
fn formats_are_as_exact_as_their_bits() {
    for (format, most) in [
        (Format::Bf16, 0.0025),
        (Format::Int8, 0.018),
        (Format::Q8_0, 0.015),
        (Format::Q4_0, 0.18),
        (Format::Q4_1, 0.14),
        (Format::Q4K, 0.12),
    ] {
        let values = numbers(2, 40 * 512);
        let expanded = Stored::quantise(format, &values, 40, 512).unwrap().expand();
        let square = |f: &dyn Fn(usize) -> f32| {
            (0..values.len())
                .map(|i| f64::from(f(i)).powi(2))
                .sum::<f64>()
        };
        let error = (square(&|i| expanded[i] - values[i]) / square(&|i| values[i])).sqrt();
        assert!(error < most, "{format}: {error}");
        // Quantising again what was quantised changes next to nothing.
        let again = Stored::quantise(format, &expanded, 40, 512)
            .unwrap()
            .expand();
        let drift = (square(&|i| again[i] - expanded[i]) / square(&|i| values[i])).sqrt();
        assert!(drift < most / 2.0, "{format}: {drift}");
    }
    for bad in [f32::NAN, f32::INFINITY, 1e38] {
        let mut values = vec![1.0f32; 512];
        values[300] = bad;
        for format in [Format::Q8_0, Format::Q4_1, Format::Q4K] {
            let refused = Stored::quantise(format, &values, 2, 256).unwrap_err();
            assert_eq!(refused, MatrixError::Values { format, row: 1 });
        }
    }
}

#[test]
fn formats_are_converted_as_their_numbers_are() {
    for from in Format::ALL {
        for to in Format::ALL {
            let stored = Stored::quantise(from, &numbers(25, 70 * 256), 70, 256).unwrap();
            let numbers = stored.expand();
            let expected = Stored::quantise(to, &numbers, 70, 256).unwrap();
            assert_eq!(stored.convert(to).unwrap(), expected, "{from} to {to}");
        }
    }
    let narrow = Stored::quantise(Format::Q8_0, &numbers(26, 64), 2, 32).unwrap();
    assert!(narrow.convert(Format::Q4K).is_err());
}

/// A row as 8 bits in blocks of 32, one block in 32 with a second term.
fn as_8_bits(row: &[f32]) -> Vec<f32> {
    let nearest = |block: &[f32]| -> (f32, Vec<f32>) {
        let scale = block.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
        let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
        let q = block
            .iter()
            .map(|v| scale * (v * inverse).round_ties_even());
        (scale, q.collect())
    };
    let mut blocks: Vec<(f32, Vec<f32>)> = row.chunks(32).map(nearest).collect();
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by(|&a, &b| blocks[b].0.total_cmp(&blocks[a].0));
    for &b in &order[..blocks.len().div_ceil(32)] {
        let exact = row.chunks(32).nth(b).unwrap().iter();
        let rest: Vec<f32> = exact.zip(&blocks[b].1).map(|(x, q)| x - q).collect();
        for (first, second) in blocks[b].1.iter_mut().zip(nearest(&rest).1) {
            *first += second;
        }
    }
    blocks.into_iter().flat_map(|(_, q)| q).collect()
}

#[test]
fn large_numbers_of_a_row_do_not_drown_the_others() {
    // One block of 32 has numbers 1000 times as large, among them small ones that its one scale
    // would lose.
    let k = 512;
    let mut x = numbers(21, k);
    for (i, x) in x[96..128].iter_mut().enumerate() {
        *x *= if i % 4 == 0 { 1000.0 } else { 1.0 };
    }
    for format in Format::ALL {
        let stored = Stored::quantise(format, &numbers(22, 64 * k), 64, k).unwrap();
        let packed = Packed::new(&stored).unwrap();
        let y = product(&packed, &x, 1, 1, Isa::chosen());
        let weights = stored.expand();
        let (mut off, mut size) = (0f64, 0f64);
        for (y, w) in y.iter().zip(weights.chunks_exact(k)) {
            let terms = x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b));
            let exact: f64 = terms.sum();
            off += (f64::from(*y) - exact).powi(2);
            size += exact.powi(2);
        }
        // With one term alone: 0.004; bf16 rounds each number by itself.
        let most = if format == Format::Bf16 { 3e-3 } else { 2e-4 };
        assert!(
            (off / size).sqrt() < most,
            "{format}: {}",
            (off / size).sqrt()
        );
    }
}

#[test]
fn int8_takes_numbers_of_all_sizes() {
    let sizes = [1e-42f32, 1e-30, 1.0, 1e30, 3e38];
    let values: Vec<f32> = sizes
        .iter()
        .flat_map(|size| numbers(23, 70).into_iter().map(move |x| (x / 16.0) * size))
        .collect();
    let expanded = Stored::quantise(Format::Int8, &values, 5, 70)
        .unwrap()
        .expand();
    for ((x, y), size) in values.chunks(70).zip(expanded.chunks(70)).zip(sizes) {
        let most = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (x, y) in x.iter().zip(y) {
            // What is smaller than the smallest scale is zero.
            assert!(
                (x - y).abs() <= most * 0.005 + 2e-36,
                "{x} became {y} at {size}"
            );
        }
    }
    let mut bad = numbers(24, 70);
    bad[69] = f32::NAN;
    let refused = Stored::quantise(Format::Int8, &bad, 1, 70);
    assert!(matches!(refused, Err(MatrixError::Values { row: 0, .. })));
}

/// The product in f64 over what the arithmetic really sees: expanded weights and rows as
/// they are taken.
fn reference(w: &Stored, x: &[f32], rows: usize) -> (Vec<f64>, Vec<f64>) {
    let (n, k) = (w.outputs(), w.inputs());
    let weights = w.expand();
    let seen: Vec<f32> = if w.format() == Format::Bf16 {
        x.iter()
            .map(|&v| half::bf16::from_f32(v).to_f32())
            .collect()
    } else {
        x.chunks_exact(k).flat_map(as_8_bits).collect()
    };
    let mut sums = Vec::new();
    let mut sizes = Vec::new();
    for row in seen.chunks_exact(k).take(rows) {
        for w in weights.chunks_exact(k).take(n) {
            let terms = row
                .iter()
                .zip(w)
                .map(|(a, b)| f64::from(*a) * f64::from(*b));
            sums.push(terms.clone().sum());
            sizes.push(terms.map(f64::abs).sum());
        }
    }
    (sums, sizes)
}

#[test]
fn products_agree_with_f64_and_all_instructions_bit_for_bit() {
    for format in Format::ALL {
        for &k in widths(format) {
            for (n, rows) in [(1, 1), (17, 3), (33, 13), (64, 25), (80, 8)] {
                let stored = Stored::quantise(format, &numbers(3, n * k), n, k).unwrap();
                let packed = Packed::new(&stored).unwrap();
                let x = numbers(4, rows * k);
                let portable = product(&packed, &x, rows, 1, Isa::Portable);
                let (sums, sizes) = reference(&stored, &x, rows);
                for ((y, sum), size) in portable.iter().zip(&sums).zip(&sizes) {
                    let off = (f64::from(*y) - sum).abs();
                    assert!(
                        off <= 3e-6 * size + 1e-12,
                        "{format} [{n}, {k}]: {y}, {sum}"
                    );
                }
                for isa in isas() {
                    for threads in [1, 2] {
                        let y = product(&packed, &x, rows, threads, isa);
                        assert_eq!(
                            y, portable,
                            "{format} [{n}, {k}] x {rows}, {isa}, {threads} threads"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    for format in Format::ALL {
        let (n, k) = (96, 512);
        let stored = Stored::quantise(format, &numbers(5, n * k), n, k).unwrap();
        let packed = Packed::new(&stored).unwrap();
        let x = numbers(6, 40 * k);
        for isa in isas() {
            let alone: Vec<f32> = x
                .chunks_exact(k)
                .flat_map(|row| product(&packed, row, 1, 2, isa))
                .collect();
            for rows in [2, 5, 12, 13, 17, 33, 40] {
                let y = product(&packed, &x[..rows * k], rows, 2, isa);
                assert_eq!(y, alone[..rows * n], "{format}, {isa}, {rows} rows");
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_is_as_ieee_has_it() {
    for format in Format::ALL {
        let (n, k) = (20, 256);
        let mut values = numbers(7, n * k);
        values[..k].fill(0.0);
        let stored = Stored::quantise(format, &values, n, k).unwrap();
        let packed = Packed::new(&stored).unwrap();
        let weights = stored.expand();
        for isa in isas() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let good = numbers(8, 3 * k);
                let mut x = good.clone();
                x[k + 7] = bad;
                let y = product(&packed, &x, 3, 2, isa);
                let expected = product(&packed, &good, 3, 1, isa);
                assert_eq!(y[..n], expected[..n]);
                assert_eq!(y[2 * n..], expected[2 * n..]);
                for o in 0..n {
                    let ieee = bad * weights[o * k + 7];
                    let found = y[n + o];
                    let same = found == ieee || (found.is_nan() && ieee.is_nan());
                    assert!(same, "{format}, {isa}: {found} for {ieee}");
                }
            }
        }
    }
}

#[test]
fn empty_shapes_biases_and_wrong_lengths() {
    for format in Format::ALL {
        let k = widths(format)[0];
        let empty = Packed::new(&Stored::quantise(format, &[], 0, k).unwrap()).unwrap();
        assert!(product(&empty, &numbers(9, 2 * k), 2, 2, Isa::chosen()).is_empty());
        let stored = Stored::quantise(format, &numbers(9, 18 * k), 18, k).unwrap();
        let w = Packed::new(&stored).unwrap();
        assert!(product(&w, &[], 0, 2, Isa::chosen()).is_empty());
        let x = numbers(10, 2 * k);
        let bias: Vec<f32> = (0..18).map(|i| i as f32).collect();
        let mut y = vec![0f32; 36];
        for isa in isas() {
            w.multiply(&x, 2, &mut y, Some(&bias), 2, isa).unwrap();
            let plain = product(&w, &x, 2, 1, isa);
            let sum = plain.iter().zip(bias.iter().cycle()).map(|(a, b)| a + b);
            assert!(sum.eq(y.iter().copied()), "{format}, {isa}");
        }
        let multiply = |x: &[f32], y: &mut [f32], bias: Option<&[f32]>| {
            w.multiply(x, 2, y, bias, 1, Isa::Portable)
        };
        assert!(multiply(&x[1..], &mut y.clone(), None).is_err());
        assert!(multiply(&x, &mut y[1..], None).is_err());
        assert!(multiply(&x, &mut [0.0; 36], Some(&bias[1..])).is_err());
    }
    // No inputs: sums of nothing.
    for format in [Format::Bf16, Format::Int8] {
        let w = Packed::new(&Stored::quantise(format, &[], 40, 0).unwrap()).unwrap();
        for isa in isas() {
            assert_eq!(
                product(&w, &[], 2, 1, isa),
                vec![0.0; 80],
                "{format}, {isa}"
            );
        }
    }
    let odd = Stored::quantise(Format::Q8_0, &[0.0; 33], 1, 33);
    assert!(matches!(
        odd,
        Err(MatrixError::Blocks {
            inputs: 33,
            block: 32,
            ..
        })
    ));
}

#[test]
fn rows_are_selected_and_joined_as_bytes() {
    let a = Stored::quantise(Format::Q4_1, &numbers(11, 5 * 64), 5, 64).unwrap();
    let b = Stored::quantise(Format::Q4_1, &numbers(12, 2 * 64), 2, 64).unwrap();
    let both = Stored::join(&[&a, &b]).unwrap();
    assert_eq!(both.outputs(), 7);
    assert_eq!(both.select(0..5).unwrap(), a);
    assert_eq!(both.select([5, 6]).unwrap(), b);
    assert!(both.select([7]).is_err());
    let c = Stored::quantise(Format::Q4_0, &numbers(12, 2 * 64), 2, 64).unwrap();
    assert_eq!(Stored::join(&[&a, &c]), Err(MatrixError::Join));
    assert!(Stored::new(Format::Q4_0, 1, 32, vec![0; 17]).is_err());
}

#[test]
fn tiles_are_even_and_cover_the_rows() {
    for rows in 1..60 {
        for most in [1, 2, 8, 12] {
            let all: Vec<_> = tiles(rows, most).collect();
            let mut next = 0;
            for &(start, size) in &all {
                assert_eq!(start, next);
                assert!((1..=most).contains(&size));
                next += size;
            }
            assert_eq!(next, rows);
            let sizes = || all.iter().map(|t| t.1);
            assert!(sizes().max().unwrap() - sizes().min().unwrap() <= 1);
        }
    }
}

#[test]
fn names_are_read_back() {
    for format in Format::ALL {
        assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
    }
    for isa in Isa::ALL {
        assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
    }
    assert!("q3_k".parse::<Format>().unwrap_err().contains("q4_k"));
}
