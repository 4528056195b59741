//! Verification in two dimensions (MuLo-SD, Peruzzo et al. 2026). **Lossy.**
//!
//! A coarse image drafts a block of codes. A code is accepted when the target gives enough
//! mass to it and its nearest codes, `sum p(v) >= tau`; no random number is drawn. Around
//! every rejected code a square of radius `l` is decided again, everything else stays:
//! what is wrong with an image is local. Squares that touch form islands; islands do not
//! depend on each other and advance together, one code per island and forward pass, in
//! raster order within an island.
//!
//! With `tau` above 1 everything is decided again in raster order by the target, which is
//! plain decoding of the block; with `tau = 0` the draft stays as it is.

use serde::{Deserialize, Serialize};

use super::lantern::Neighbours;
use crate::distribution::Categorical;
use crate::{Error, Result};

/// Largest block.
const MAX_CELLS: usize = 1 << 20;

/// Options of [`local`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LocalRule {
    /// Nearest codes that count for a code, itself not counted.
    pub k: usize,
    /// Mass that is enough.
    pub tau: f64,
    /// Radius of the square around a rejected code.
    pub radius: usize,
}

impl Default for LocalRule {
    fn default() -> Self {
        Self {
            k: 8,
            tau: 0.1,
            radius: 1,
        }
    }
}

/// Outcome of [`local`]; cells are numbered in raster order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalVerdict {
    /// Cells whose code was rejected.
    pub rejected: Vec<usize>,
    /// Cells to decide again, in connected islands, each in raster order.
    pub islands: Vec<Vec<usize>>,
}

impl LocalVerdict {
    /// Cells to decide in each forward pass, one per island.
    #[must_use]
    pub fn passes(&self) -> Vec<Vec<usize>> {
        let longest = self.islands.iter().map(Vec::len).max().unwrap_or(0);
        let pass = |i: usize| {
            self.islands
                .iter()
                .filter_map(|cells| cells.get(i).copied())
                .collect()
        };
        (0..longest).map(pass).collect()
    }
}

/// Verifies a block of `rows` rows of drafted `codes` in raster order. `law(i)` is the
/// target's law for cell `i` given the drafted cells before it.
///
/// # Errors
/// Those of `law`; `Input` when `codes` is not `rows` whole rows; `Limits` for more than
/// 2^20 cells.
pub fn local(
    codes: &[u32],
    rows: usize,
    mut law: impl FnMut(usize) -> Result<Categorical>,
    neighbours: &dyn Neighbours,
    rule: &LocalRule,
) -> Result<LocalVerdict> {
    if codes.len() > MAX_CELLS {
        return Err(Error::Limits {
            what: "the number of codes in a block",
            found: codes.len(),
            limit: MAX_CELLS,
            advice: "verify fewer rows at a time",
        });
    }
    if rows == 0 || !codes.len().is_multiple_of(rows) {
        let found = format!("{} codes", codes.len());
        return Err(Error::input(
            "codes",
            found,
            format!("{rows} whole rows (at least 1)"),
        ));
    }
    let mut rejected = Vec::new();
    for (cell, &code) in codes.iter().enumerate() {
        let p = law(cell)?;
        let near = neighbours.nearest(code, rule.k).iter();
        let mass = p.prob(code) + near.map(|&v| p.prob(v)).sum::<f64>();
        if mass < rule.tau {
            rejected.push(cell);
        }
    }
    let grid = Grid {
        rows,
        columns: codes.len() / rows,
    };
    let islands = grid.islands(&grid.dilate(&rejected, rule.radius));
    Ok(LocalVerdict { rejected, islands })
}

/// A grid of cells in raster order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
}

impl Grid {
    /// All cells within `radius` of one of `cells`, diagonals included: true in the mask.
    #[must_use]
    pub fn dilate(self, cells: &[usize], radius: usize) -> Vec<bool> {
        let (rows, columns) = (self.rows, self.columns);
        let mut mask = vec![false; rows.saturating_mul(columns)];
        for &cell in cells {
            if let Some(cell) = mask.get_mut(cell) {
                *cell = true;
            }
        }
        // A square is a stretch of columns of stretches of rows.
        (0..rows).for_each(|r| spread(&mut mask, r * columns, 1, columns, radius));
        (0..columns).for_each(|c| spread(&mut mask, c, columns, rows, radius));
        mask
    }

    /// The cell and those around it.
    fn around(self, cell: usize) -> impl Iterator<Item = usize> {
        let columns = self.columns.max(1);
        let (row, column) = (cell / columns, cell % columns);
        let across = column.saturating_sub(1)..(column + 2).min(self.columns);
        let down = row.saturating_sub(1)..(row + 2).min(self.rows);
        down.flat_map(move |r| across.clone().map(move |c| r * columns + c))
    }

    /// Connected parts (diagonals connect) of the cells that are true in `mask`, each in
    /// raster order, ordered by their first cell.
    #[must_use]
    pub fn islands(self, mask: &[bool]) -> Vec<Vec<usize>> {
        let mut open = mask.to_vec();
        let mut islands = Vec::new();
        for start in 0..open.len() {
            let mut island = Vec::new();
            let mut todo = vec![start];
            while let Some(cell) = todo.pop() {
                if let Some(unseen) = open.get_mut(cell).filter(|unseen| **unseen) {
                    *unseen = false;
                    island.push(cell);
                    todo.extend(self.around(cell));
                }
            }
            if !island.is_empty() {
                island.sort_unstable();
                islands.push(island);
            }
        }
        islands
    }
}

/// Makes true what lies within `radius` of a true cell on one line of `len` cells, `stride`
/// apart.
fn spread(mask: &mut [bool], start: usize, stride: usize, len: usize, radius: usize) {
    let line: Vec<bool> = (0..len)
        .map(|i| mask.get(start + i * stride) == Some(&true))
        .collect();
    let mut reach = |order: &mut dyn Iterator<Item = usize>| {
        let mut left = None;
        for i in order {
            left = match (line.get(i), left) {
                (Some(true), _) => Some(radius),
                (_, Some(n)) if n > 0 => Some(n - 1),
                _ => None,
            };
            if let (Some(_), Some(cell)) = (left, mask.get_mut(start + i * stride)) {
                *cell = true;
            }
        }
    };
    reach(&mut (0..len));
    reach(&mut (0..len).rev());
}
