//! Letters of eight by eight pixels, enlarged with rounded corners.

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

/// Side of a letter in its font.
const SIDE: usize = 8;

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
    let side = SIDE as i32 * scale * ZOOM;
    let width = text.chars().count() as i32 * side;
    let along = match anchor {
        Anchor::Left => 0,
        Anchor::Middle => -width / 2,
        Anchor::Right => -width,
    };
    for (i, letter) in text.chars().enumerate() {
        let large: Bitmap<{ 4 * SIDE }> = double(&double::<SIDE, { 2 * SIDE }>(&glyph(letter)));
        // Each drawn pixel looks up the enlarged letter, whatever its own size.
        let on = |u: i32, v: i32| large[v as usize * large.len() / side as usize][u as usize * large.len() / side as usize];
        for (u, v) in (0..side * side).map(|n| (n % side, n / side)).filter(|&(u, v)| on(u, v)) {
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

type Bitmap<const N: usize> = [[bool; N]; N];

fn glyph(letter: char) -> Bitmap<SIDE> {
    let rows = font8x8::BASIC_FONTS.get(letter).or_else(|| font8x8::LATIN_FONTS.get(letter)).unwrap_or([0; SIDE]);
    rows.map(|row| std::array::from_fn(|x| row >> x & 1 == 1))
}

/// Twice the size (`M = 2 N`) by the Scale2x rule (Mazzoleni, 2001), which rounds corners.
fn double<const N: usize, const M: usize>(small: &Bitmap<N>) -> Bitmap<M> {
    let pixel = |x: i32, y: i32| {
        let inside = (0..N as i32).contains(&x) && (0..N as i32).contains(&y);
        inside && small[y as usize][x as usize]
    };
    std::array::from_fn(|y| {
        std::array::from_fn(|x| {
            let (cx, cy) = ((x / 2) as i32, (y / 2) as i32);
            let (dx, dy) = (2 * (x % 2) as i32 - 1, 2 * (y % 2) as i32 - 1);
            let (side, level) = (pixel(cx + dx, cy), pixel(cx, cy + dy));
            let (far_side, far_level) = (pixel(cx - dx, cy), pixel(cx, cy - dy));
            if side == level && side != far_level && level != far_side { side } else { pixel(cx, cy) }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_double_and_their_corners_round() {
        let mut dot = [[false; SIDE]; SIDE];
        assert_eq!(double::<8, 16>(&dot), [[false; 16]; 16]);
        dot[3][3] = true;
        dot[3][4] = true;
        dot[4][4] = true;
        let big: Bitmap<16> = double(&dot);
        // The inner corner of the L is filled, the outer one is cut.
        assert!(big[7][9] && big[6][8]);
        assert!(!big[6][9]);
        assert!(glyph('A').iter().flatten().any(|&p| p));
        assert!(glyph('\u{1F600}').iter().flatten().all(|&p| !p));
    }
}
