//! Round numbers along an axis.

/// The numbers of an axis, and how many decimals they need.
#[derive(Debug, PartialEq)]
pub struct Ticks {
    pub values: Vec<f64>,
    decimals: usize,
}

impl Ticks {
    /// How a number is written.
    pub fn label(&self, value: f64) -> String {
        if value.abs() >= 1e6 {
            return format!("{value:.1e}");
        }
        format!("{value:.*}", self.decimals)
    }
}

/// Multiples of 1, 2 or 5 times a power of ten within `[low, high]`, about `count` of them.
pub fn ticks(low: f64, high: f64, count: usize) -> Ticks {
    let rough = ((high - low) / count.max(1) as f64).clamp(1e-9, f64::MAX / 1e3);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0]
        .map(|m| m * power)
        .into_iter()
        .find(|&s| s >= rough)
        .unwrap_or(10.0 * power);
    let first = (low / step).ceil();
    let values = (0..=2 * count)
        .map(|i| (first + i as f64) * step)
        .take_while(|&v| v <= high + 1e-9 * step)
        .collect();
    let decimals = (-step.log10() - 1e-9).ceil().clamp(0.0, 6.0) as usize;
    Ticks { values, decimals }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_round() {
        let t = ticks(0.0, 2.4, 6);
        let labels: Vec<String> = t.values.iter().map(|&v| t.label(v)).collect();
        assert_eq!(labels, ["0.0", "0.5", "1.0", "1.5", "2.0"]);
        assert!(ticks(1.0, 1.0, 8).values.len() <= 17);
        assert!(ticks(0.0, 1e300, 8).values.iter().all(|v| v.is_finite()));
    }
}
