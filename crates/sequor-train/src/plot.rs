//! A picture of a run: training and held-out loss over the steps, as PNG.
//!
//! Letters come from a bitmap font, so that no font of the system is needed and
//! the picture is the same everywhere.

mod axis;
mod text;

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::log::{Record, step_of};
use crate::{Error, Result};
use axis::ticks;
use text::{Anchor, Turn, draw_text};

/// Size of the picture in pixels.
const SIZE: (u32, u32) = (1200, 720);
/// Everything is drawn this much larger and averaged down, for smooth edges.
const ZOOM: i32 = 2;
/// The frame of the curves in drawn pixels: left, right, top, bottom.
const FRAME: (i32, i32, i32, i32) = (110 * ZOOM, 1160 * ZOOM, 92 * ZOOM, 616 * ZOOM);

const INK: RGBColor = RGBColor(38, 42, 51);
const FAINT: RGBColor = RGBColor(112, 118, 130);
const GRID: RGBColor = RGBColor(230, 232, 236);
const TRAIN: RGBColor = RGBColor(37, 99, 175);
const HELD: RGBColor = RGBColor(217, 95, 14);

/// What is written around the curves.
#[derive(Clone, Debug)]
pub struct PlotOptions {
    /// Heading.
    pub title: String,
    /// A second, smaller line below it.
    pub subtitle: String,
    /// What the loss is measured in, as in "loss (nats per token)".
    pub y_label: String,
    /// Field of the evaluation records that is comparable with the training loss.
    pub held_out: String,
}

type Points = Vec<(f64, f64)>;
type Canvas<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Curves<'a> = DrawingArea<BitMapBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Draws the records of a log (see [`log::read`](crate::log::read)) into a PNG file.
///
/// # Errors
/// [`Error::Input`] when there is nothing to draw; [`Error::Io`].
pub fn plot(records: &[Record], options: &PlotOptions, path: &Path) -> Result<()> {
    let train = points(records, "train", "loss");
    let held = points(records, "eval", &options.held_out);
    if train.len() + held.len() < 2 {
        return Err(Error::Input(
            "a log with fewer than two values of the loss cannot be drawn".into(),
        ));
    }
    let io = |e: &dyn std::fmt::Display| Error::io(path, std::io::Error::other(e.to_string()));
    let mut pixels = vec![255; 3 * (SIZE.0 * SIZE.1) as usize * (ZOOM * ZOOM) as usize];
    draw(&train, &held, options, &mut pixels).map_err(|e| io(&e))?;
    // The backend knows the format by the ending and writes in place.
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial.png"));
    save(&pixels, &partial).map_err(|e| io(&e))?;
    std::fs::rename(&partial, path).map_err(|e| Error::io(path, e))
}

/// Averages blocks of `ZOOM` by `ZOOM` pixels and writes the picture.
fn save(pixels: &[u8], path: &Path) -> Drawn {
    let (zoom, width) = (ZOOM as usize, SIZE.0 as usize * ZOOM as usize);
    let canvas = BitMapBackend::new(path, SIZE).into_drawing_area();
    for y in 0..SIZE.1 as usize {
        for x in 0..SIZE.0 as usize {
            let block = |c: usize| {
                let at = |i: usize| 3 * ((y * zoom + i / zoom) * width + x * zoom + i % zoom) + c;
                let sum: usize = (0..zoom * zoom).map(|i| usize::from(pixels[at(i)])).sum();
                (sum / (zoom * zoom)) as u8
            };
            canvas.draw_pixel(
                (x as i32, y as i32),
                &RGBColor(block(0), block(1), block(2)),
            )?;
        }
    }
    canvas.present()?;
    Ok(())
}

fn points(records: &[Record], kind: &str, field: &str) -> Points {
    let of_kind = records
        .iter()
        .filter(|r| r.get("kind").and_then(|k| k.as_str()) == Some(kind));
    let xy = of_kind.filter_map(|r| Some((step_of(r)? as f64, r.get(field)?.as_f64()?)));
    xy.filter(|(_, y)| y.is_finite()).collect()
}

/// A running mean that follows the curve without its noise.
fn smooth(points: &[(f64, f64)]) -> Points {
    let half = points.len() / 60;
    let window = |i: usize| {
        // The same reach on both sides, so that the ends do not bend.
        let reach = half.min(i).min(points.len() - 1 - i);
        &points[i - reach..=i + reach]
    };
    let mean = |w: &[(f64, f64)]| w.iter().map(|p| p.1).sum::<f64>() / w.len() as f64;
    (0..points.len())
        .map(|i| (points[i].0, mean(window(i))))
        .collect()
}

fn draw(
    train: &[(f64, f64)],
    held: &[(f64, f64)],
    options: &PlotOptions,
    pixels: &mut [u8],
) -> Drawn {
    let (left, right, top, bottom) = FRAME;
    let size = (SIZE.0 * ZOOM as u32, SIZE.1 * ZOOM as u32);
    let canvas = BitMapBackend::with_buffer(pixels, size).into_drawing_area();
    canvas.fill(&WHITE)?;

    let all = || train.iter().chain(held);
    let last = all().map(|p| p.0).fold(1.0, f64::max);
    let (low, high) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), p| {
        (l.min(p.1), h.max(p.1))
    });
    let (y_ticks, x_ticks) = (ticks(low, high, 8), ticks(0.0, last, 8));
    let pad = 0.03 * (high - low).max(1e-6);
    let (y_low, y_high) = (low - pad, high + pad);

    let x_range = RangedCoordf64::from(0.0..last);
    let y_range = RangedCoordf64::from(y_low..y_high);
    let curves = canvas.clone().apply_coord_spec(Cartesian2d::new(
        x_range,
        y_range,
        (left..right, bottom..top),
    ));

    for y in y_ticks
        .values
        .iter()
        .filter(|y| (y_low..=y_high).contains(*y))
    {
        let (_, py) = curves.map_coordinate(&(0.0, *y));
        line(&canvas, (left, py), (right, py), GRID)?;
        draw_text(
            &canvas,
            &y_ticks.label(*y),
            (left - 14 * ZOOM, py),
            2,
            FAINT,
            Anchor::Right,
            Turn::None,
        )?;
    }
    for x in x_ticks.values.iter().filter(|x| (0.0..=last).contains(*x)) {
        let (px, _) = curves.map_coordinate(&(*x, y_low));
        line(&canvas, (px, top), (px, bottom), GRID)?;
        line(&canvas, (px, bottom), (px, bottom + 7 * ZOOM), INK)?;
        draw_text(
            &canvas,
            &x_ticks.label(*x),
            (px, bottom + 24 * ZOOM),
            2,
            FAINT,
            Anchor::Middle,
            Turn::None,
        )?;
    }

    curve(&curves, train, TRAIN.mix(0.30), 1)?;
    curve(&curves, &smooth(train), TRAIN.to_rgba(), 2)?;
    curve(&curves, held, HELD.to_rgba(), 2)?;
    for point in held {
        curves.draw(&Circle::new(*point, 4 * ZOOM, HELD.filled()))?;
    }
    if let Some(best) = held.iter().min_by(|a, b| a.1.total_cmp(&b.1)) {
        curves.draw(&Circle::new(
            *best,
            9 * ZOOM,
            HELD.stroke_width(2 * ZOOM as u32),
        ))?;
    }
    line(&canvas, (left, top), (left, bottom), INK)?;
    line(&canvas, (left, bottom), (right, bottom), INK)?;

    let x_middle = (left + right) / 2;
    draw_text(
        &canvas,
        &options.title,
        (left, 32 * ZOOM),
        3,
        INK,
        Anchor::Left,
        Turn::None,
    )?;
    draw_text(
        &canvas,
        &options.subtitle,
        (left, 64 * ZOOM),
        2,
        FAINT,
        Anchor::Left,
        Turn::None,
    )?;
    draw_text(
        &canvas,
        "step",
        (x_middle, bottom + 64 * ZOOM),
        2,
        INK,
        Anchor::Middle,
        Turn::None,
    )?;
    draw_text(
        &canvas,
        &options.y_label,
        (26 * ZOOM, (top + bottom) / 2),
        2,
        INK,
        Anchor::Middle,
        Turn::Left,
    )?;
    legend(&canvas, !held.is_empty())?;
    canvas.present()?;
    Ok(())
}

fn line(canvas: &Canvas<'_>, from: (i32, i32), to: (i32, i32), colour: RGBColor) -> Drawn {
    canvas.draw(&PathElement::new(
        vec![from, to],
        colour.stroke_width(ZOOM as u32),
    ))?;
    Ok(())
}

fn curve(curves: &Curves<'_>, points: &[(f64, f64)], colour: RGBAColor, width: u32) -> Drawn {
    curves.draw(&PathElement::new(
        points.to_vec(),
        colour.stroke_width(width * ZOOM as u32),
    ))?;
    Ok(())
}

fn legend(canvas: &Canvas<'_>, held: bool) -> Drawn {
    let (_, right, top, _) = FRAME;
    let training = [("training", TRAIN)];
    let both = [("training", TRAIN), ("held out", HELD)];
    let entries: &[(&str, RGBColor)] = if held { &both } else { &training };
    let (x, y) = (right - 226 * ZOOM, top + 10 * ZOOM);
    let corners = [
        (x, y),
        (
            right - 10 * ZOOM,
            y + (22 + 30 * entries.len() as i32) * ZOOM,
        ),
    ];
    canvas.draw(&Rectangle::new(corners, WHITE.filled()))?;
    canvas.draw(&Rectangle::new(corners, GRID.stroke_width(ZOOM as u32)))?;
    for (i, (label, colour)) in entries.iter().enumerate() {
        let middle = y + (26 + 30 * i as i32) * ZOOM;
        let stroke = vec![(x + 16 * ZOOM, middle), (x + 56 * ZOOM, middle)];
        canvas.draw(&PathElement::new(
            stroke,
            colour.stroke_width(2 * ZOOM as u32),
        ))?;
        if *colour == HELD {
            canvas.draw(&Circle::new(
                (x + 36 * ZOOM, middle),
                4 * ZOOM,
                colour.filled(),
            ))?;
        }
        draw_text(
            canvas,
            label,
            (x + 72 * ZOOM, middle),
            2,
            INK,
            Anchor::Left,
            Turn::None,
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn log(steps: u64) -> Vec<Record> {
        let noise = |s: u64| ((s * 7919) % 97) as f64 / 97.0 - 0.5;
        let mut records = Vec::new();
        for s in (10..=steps).step_by(10) {
            let loss = 2.9 + 5.4 * (-(s as f64) / 220.0).exp() + 0.12 * noise(s);
            records.push(json!({"kind": "train", "step": s, "loss": loss}));
            if s % 200 == 0 {
                records.push(
                    json!({"kind": "eval", "step": s, "held_out_loss": loss + 0.0002 * s as f64}),
                );
            }
        }
        records
            .into_iter()
            .map(|r| r.as_object().unwrap().clone())
            .collect()
    }

    fn options() -> PlotOptions {
        PlotOptions {
            title: "bible-lm".into(),
            subtitle: "4.1 M parameters, World English Bible".into(),
            y_label: "loss (nats per token)".into(),
            held_out: "held_out_loss".into(),
        }
    }

    #[test]
    fn a_log_becomes_a_picture() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.png");
        plot(&log(2400), &options(), &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(
            bytes.starts_with(b"\x89PNG") && bytes.len() > 5000 && bytes.len() < 300_000,
            "{}",
            bytes.len()
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn odd_logs_do_not_break_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.png");
        assert!(plot(&[], &options(), &path).is_err());
        let flat = |s: u64| {
            json!({"kind": "train", "step": s, "loss": 1.0})
                .as_object()
                .unwrap()
                .clone()
        };
        plot(&[flat(1), flat(2)], &options(), &path).unwrap();
        let mut huge = flat(3);
        huge.insert("loss".into(), json!(1e300));
        plot(&[flat(1), huge], &options(), &path).unwrap();
        assert!(plot(&log(100), &options(), &dir.path().join("no/loss.png")).is_err());
    }

    #[test]
    fn smoothing_keeps_straight_lines() {
        let line: Points = (0..200)
            .map(|i| (f64::from(i), 2.0 * f64::from(i)))
            .collect();
        assert!(
            smooth(&line)
                .iter()
                .zip(&line)
                .all(|(a, b)| (a.1 - b.1).abs() < 1e-9)
        );
        assert_eq!(smooth(&line[..1]), &line[..1]);
    }
}
