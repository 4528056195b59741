//! The arms as bars with the 95 % intervals of their means.

use std::path::Path;

use super::judge::ArmSummary;
use super::{Metric, Proof};
use crate::Result;
use crate::draw::{Anchor, BAR, FAINT, GRID, INK, Shape, save, text_width, ticks};

const WIDTH: i32 = 1200;
/// Height of a bar with the space around it.
const LINE: i32 = 36;
/// Right end of the bars; the values stand beyond it.
const RIGHT: i32 = 1040;
/// Most bars of a metric; what is beyond would not be legible.
const MOST: usize = 40;

/// Draws the proof's metrics one below the other; says whether there was anything to draw.
pub(super) fn plot(proof: &Proof, arms: &[ArmSummary], path: &Path) -> Result<bool> {
    let first = proof.metrics.iter().take(1);
    let named = proof
        .metrics
        .iter()
        .filter(|m| proof.plots.contains(&m.name));
    let metrics: Vec<&Metric> = if proof.plots.is_empty() {
        first.collect()
    } else {
        named.collect()
    };
    let title = format!("{:02}  {}", proof.system, proof.title);
    let scale = if text_width(&title, 3) > WIDTH - 80 {
        2
    } else {
        3
    };
    let mut shapes = vec![Shape::Text(title, (40, 36), scale, INK, Anchor::Left)];
    let mut top = 64;
    for metric in metrics {
        let of_metric = arms.iter().filter(|a| a.metric == metric.name);
        let bars: Vec<&ArmSummary> = of_metric.take(MOST).collect();
        if !bars.is_empty() {
            top = panel(metric, &bars, top, &mut shapes);
        }
    }
    if shapes.len() < 2 {
        return Ok(false);
    }
    save(&shapes, (WIDTH as u32, top as u32 + 16), path)?;
    Ok(true)
}

/// Adds a panel that begins at `top`; gives its end.
fn panel(metric: &Metric, bars: &[&ArmSummary], top: i32, shapes: &mut Vec<Shape>) -> i32 {
    let longest = bars
        .iter()
        .map(|a| text_width(&a.arm, 2))
        .max()
        .unwrap_or(0);
    let left = (longest + 60).clamp(160, 700);
    let ends = |a: &&ArmSummary| a.ci95.unwrap_or([a.mean; 2]);
    let high = bars
        .iter()
        .map(|a| ends(a)[1].max(a.mean))
        .fold(0.0, f64::max);
    let low = bars
        .iter()
        .map(|a| ends(a)[0].min(a.mean))
        .fold(0.0, f64::min);
    let span = (high - low).max(1e-12);
    let x = |value: f64| left + ((value - low) / span * f64::from(RIGHT - left)).round() as i32;
    let mut text = |text: String, at, scale, colour, anchor| {
        shapes.push(Shape::Text(text, at, scale, colour, anchor));
    };
    let better = if metric.higher_is_better {
        "higher"
    } else {
        "lower"
    };
    let unit = match metric.unit.as_str() {
        "" => String::new(),
        unit => format!(" ({unit})"),
    };
    let heading = format!("{}{unit}, {better} is better", metric.meaning);
    text(heading, (40, top + 22), 2, FAINT, Anchor::Left);
    let first = top + 46;
    let bottom = first + LINE * bars.len() as i32;
    let ticks = ticks(low, high, 6);
    for &value in &ticks.values {
        text(
            ticks.label(value),
            (x(value), bottom + 18),
            2,
            FAINT,
            Anchor::Middle,
        );
    }
    for (i, a) in bars.iter().enumerate() {
        let middle = first + LINE * i as i32 + LINE / 2;
        text(a.arm.clone(), (left - 16, middle), 2, INK, Anchor::Right);
        let value = format!("{:.*}", if high >= 100.0 { 0 } else { 3 }, a.mean);
        text(value, (RIGHT + 14, middle), 2, INK, Anchor::Left);
    }
    for &value in &ticks.values {
        shapes.push(Shape::Line([(x(value), first), (x(value), bottom)], GRID));
    }
    for (i, a) in bars.iter().enumerate() {
        let middle = first + LINE * i as i32 + LINE / 2;
        let (from, to) = (x(0.0).min(x(a.mean)), x(0.0).max(x(a.mean)));
        shapes.push(Shape::Bar([from, middle - 11, to, middle + 11], BAR));
        if let Some([from, to]) = a.ci95 {
            let (from, to) = (x(from), x(to));
            shapes.push(Shape::Line([(from, middle), (to, middle)], INK));
            for end in [from, to] {
                shapes.push(Shape::Line([(end, middle - 6), (end, middle + 6)], INK));
            }
        }
    }
    shapes.push(Shape::Line([(x(0.0), first), (x(0.0), bottom)], INK));
    bottom + 40
}
