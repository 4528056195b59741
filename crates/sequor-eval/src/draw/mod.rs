//! A small canvas: rectangles, lines and letters, saved as PNG.
//!
//! Letters come from a bitmap font, so that no font of the system is needed and the
//! picture is the same everywhere.

mod axis;

use std::path::Path;

use font8x8::UnicodeFonts;
use plotters::prelude::*;

use crate::{Error, Result};
pub use axis::ticks;

pub const INK: RGBColor = RGBColor(38, 42, 51);
pub const FAINT: RGBColor = RGBColor(112, 118, 130);
pub const GRID: RGBColor = RGBColor(230, 232, 236);
pub const BAR: RGBColor = RGBColor(92, 140, 198);

/// Everything is drawn this much larger and averaged down, for smooth edges.
const ZOOM: i32 = 2;
/// Side of a letter in pixels of its font.
const LETTER: i32 = 8;

type Drawn<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Which point of a text is given.
#[derive(Clone, Copy, Debug)]
pub enum Anchor {
    Left,
    Middle,
    Right,
}

/// Something to draw; coordinates in pixels of the finished picture.
#[derive(Clone, Debug)]
pub enum Shape {
    /// Left, top, right, bottom.
    Bar([i32; 4], RGBColor),
    /// From, to.
    Line([(i32, i32); 2], RGBColor),
    /// Text in letters of `8 * scale` pixels with the middle of its height at a point.
    Text(String, (i32, i32), i32, RGBColor, Anchor),
}

/// Width of a text in pixels.
pub fn text_width(text: &str, scale: i32) -> i32 {
    text.chars().count() as i32 * LETTER * scale
}

/// Draws `shapes` in order on white and writes the picture at once.
///
/// # Errors
/// [`Error::Io`].
pub fn save(shapes: &[Shape], (width, height): (u32, u32), path: &Path) -> Result<()> {
    let io = |e: &dyn std::fmt::Display| Error::io(path, std::io::Error::other(e.to_string()));
    let zoom = ZOOM as usize;
    let (w, h) = (width as usize, height as usize);
    let mut pixels = vec![255; 3 * w * h * zoom * zoom];
    paint(
        shapes,
        (width * ZOOM as u32, height * ZOOM as u32),
        &mut pixels,
    )
    .map_err(|e| io(&e))?;
    // The backend knows the format by the ending and writes in place.
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial.png"));
    let written = reduce(&pixels, (width, height), &partial)
        .map_err(|e| io(&e))
        .and_then(|()| std::fs::rename(&partial, path).map_err(|e| Error::io(path, e)));
    if written.is_err() {
        // Nothing may be left behind; the first error is the one to report.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn paint(shapes: &[Shape], size: (u32, u32), pixels: &mut [u8]) -> Drawn {
    let canvas = BitMapBackend::with_buffer(pixels, size).into_drawing_area();
    let big = |(x, y): (i32, i32)| (x * ZOOM, y * ZOOM);
    for shape in shapes {
        match shape {
            Shape::Bar([left, top, right, bottom], colour) => {
                let corners = [big((*left, *top)), big((*right, *bottom))];
                canvas.draw(&Rectangle::new(corners, colour.filled()))?;
            }
            Shape::Line(ends, colour) => {
                let style = colour.stroke_width(ZOOM as u32);
                canvas.draw(&PathElement::new(ends.map(big).to_vec(), style))?;
            }
            Shape::Text(text, at, scale, colour, anchor) => {
                let width = text_width(text, *scale);
                let shift = match anchor {
                    Anchor::Left => 0,
                    Anchor::Middle => width / 2,
                    Anchor::Right => width,
                };
                let (x, y) = big((at.0 - shift, at.1));
                let dot = scale * ZOOM;
                for (i, letter) in text.chars().enumerate() {
                    let left = x + i as i32 * LETTER * dot;
                    for (row, bits) in glyph(letter).into_iter().enumerate() {
                        for column in (0..LETTER).filter(|c| bits >> c & 1 == 1) {
                            let corner = (left + column * dot, y + (row as i32 - LETTER / 2) * dot);
                            let end = (corner.0 + dot - 1, corner.1 + dot - 1);
                            canvas.draw(&Rectangle::new([corner, end], colour.filled()))?;
                        }
                    }
                }
            }
        }
    }
    canvas.present()?;
    Ok(())
}

/// Averages blocks of `ZOOM` by `ZOOM` pixels and writes the picture.
fn reduce(pixels: &[u8], (width, height): (u32, u32), path: &Path) -> Drawn {
    let zoom = ZOOM as usize;
    let stride = 3 * width as usize * zoom;
    let canvas = BitMapBackend::new(path, (width, height)).into_drawing_area();
    for y in 0..height as usize {
        for x in 0..width as usize {
            let mean = |channel: usize| {
                let at = |i: usize| (y * zoom + i / zoom) * stride + 3 * (x * zoom + i % zoom);
                let value = |i: usize| pixels.get(at(i) + channel).copied().unwrap_or(255);
                let sum: usize = (0..zoom * zoom).map(|i| usize::from(value(i))).sum();
                (sum / (zoom * zoom)) as u8
            };
            let colour = RGBColor(mean(0), mean(1), mean(2));
            canvas.draw_pixel((x as i32, y as i32), &colour)?;
        }
    }
    canvas.present()?;
    Ok(())
}

/// The rows of a letter from above; the lowest bit is the leftmost pixel. A letter that
/// the font lacks is blank.
fn glyph(letter: char) -> [u8; LETTER as usize] {
    let found = font8x8::BASIC_FONTS
        .get(letter)
        .or_else(|| font8x8::LATIN_FONTS.get(letter));
    found.unwrap_or_default()
}
