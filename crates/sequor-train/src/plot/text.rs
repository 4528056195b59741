//! Letters of eight by eight pixels.

use font8x8::UnicodeFonts;
use plotters::prelude::*;

use super::{Canvas, Drawn, ZOOM};

/// Which point of the text is given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Anchor {
    Left,
    Middle,
    Right,
}

/// Direction of the writing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Turn {
    None,
    /// From below to above.
    Left,
}

/// Side of a letter in pixels of its font.
const SIDE: i32 = 8;

/// Draws `text` with its vertical middle at `at`, in letters of `8 * scale` pixels of
/// the finished picture.
pub fn draw_text(
    canvas: &Canvas<'_>,
    text: &str,
    at: (i32, i32),
    scale: i32,
    colour: RGBColor,
    anchor: Anchor,
    turn: Turn,
) -> Drawn {
    let pixel = scale * ZOOM;
    let side = SIDE * pixel;
    let width = text.chars().count() as i32 * side;
    let along = match anchor {
        Anchor::Left => 0,
        Anchor::Middle => -width / 2,
        Anchor::Right => -width,
    };
    for (i, letter) in text.chars().enumerate() {
        let rows = glyph(letter);
        let on = |u: i32, v: i32| rows[(v / pixel) as usize] >> (u / pixel) & 1 == 1;
        for (u, v) in (0..side * side)
            .map(|n| (n % side, n / side))
            .filter(|&(u, v)| on(u, v))
        {
            let (u, v) = (along + i as i32 * side + u, v - side / 2);
            let place = match turn {
                Turn::None => (at.0 + u, at.1 + v),
                Turn::Left => (at.0 + v, at.1 - u),
            };
            canvas.draw_pixel(place, &colour)?;
        }
    }
    Ok(())
}

/// The rows of a letter from above; the lowest bit is the leftmost pixel. A letter that
/// the font lacks is blank.
fn glyph(letter: char) -> [u8; SIDE as usize] {
    let found = font8x8::BASIC_FONTS
        .get(letter)
        .or_else(|| font8x8::LATIN_FONTS.get(letter));
    found.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_known_and_others_are_blank() {
        // The top of a capital T is broad, its foot is narrow and in the middle.
        let t = glyph('T');
        assert!(t[0].count_ones() > t[5].count_ones() && t[5].count_ones() > 0);
        assert_ne!(glyph('\u{e4}'), [0; 8]);
        assert_eq!(glyph('\u{1F600}'), [0; 8]);
    }
}
