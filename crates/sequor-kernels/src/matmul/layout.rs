//! Matrices in a format: by rows, as files have them, and packed for reading.

use super::Isa;
use super::arena::Region;
use crate::blocks::{self, BlockType};
use crate::{team, threads};
use half::bf16;
use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use thiserror::Error;

/// How the numbers of a matrix are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Brain floats.
    Bf16,
    /// Signed bytes with a bf16 scale for each 64 of a row, which may have any length.
    Int8,
    /// ggml's `Q8_0`.
    Q8_0,
    /// ggml's `Q4_0`.
    Q4_0,
    /// ggml's `Q4_1`.
    Q4_1,
    /// ggml's `Q4_K`.
    Q4K,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 6] = [
        Self::Bf16,
        Self::Int8,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q4K,
    ];

    /// The blocks of a ggml format.
    #[must_use]
    pub fn blocks(self) -> Option<BlockType> {
        match self {
            Self::Bf16 | Self::Int8 => None,
            Self::Q8_0 => Some(BlockType::Q8_0),
            Self::Q4_0 => Some(BlockType::Q4_0),
            Self::Q4_1 => Some(BlockType::Q4_1),
            Self::Q4K => Some(BlockType::Q4K),
        }
    }

    /// Bytes of one row of `inputs` numbers, by rows; `None` when they are not whole blocks.
    #[must_use]
    pub fn row_bytes(self, inputs: usize) -> Option<usize> {
        match (self, self.blocks()) {
            (_, Some(blocks)) => {
                let (elements, bytes) = blocks.size();
                inputs
                    .is_multiple_of(elements)
                    .then(|| inputs / elements * bytes)
            }
            (Self::Bf16, None) => inputs.checked_mul(2),
            _ => inputs.checked_add(inputs.div_ceil(INT8_GROUP) * 2),
        }
    }

    /// Outputs of one panel.
    pub(super) fn panel(self) -> usize {
        match self {
            Self::Bf16 => 32,
            _ => 16,
        }
    }

    /// How the blocks of a panel stand; `None` for bf16, which has none.
    pub(super) fn groups(self) -> Option<Groups> {
        let (blocks, numbers, scales) = match self {
            Self::Bf16 => return None,
            Self::Int8 => (2, 512, 32),
            Self::Q8_0 => (1, 512, 32),
            Self::Q4_0 => (1, 256, 32),
            Self::Q4_1 => (1, 256, 64),
            Self::Q4K => (8, 256, 256),
        };
        Some(Groups {
            blocks,
            numbers,
            scales,
        })
    }

    /// Bytes of one panel.
    fn panel_bytes(self, inputs: usize) -> usize {
        match self.groups() {
            None => (inputs.div_ceil(2) * 128).next_multiple_of(64),
            Some(g) => {
                let groups = inputs.div_ceil(32 * g.blocks).max(1);
                (groups * g.stride()).next_multiple_of(64)
            }
        }
    }
}

/// Blocks of a panel stand in groups: the numbers of all, then the scales of all, so that
/// one pass reads one stream.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    /// Blocks of a group.
    blocks: usize,
    /// Bytes of the numbers of one block, for all 16 outputs.
    numbers: usize,
    /// Bytes of the scales of a group.
    scales: usize,
}

impl Groups {
    fn stride(self) -> usize {
        self.blocks * self.numbers + self.scales
    }

    /// Where the numbers of block `b` begin.
    fn numbers_of(self, b: usize) -> usize {
        b / self.blocks * self.stride() + b % self.blocks * self.numbers
    }

    /// Where the scales of the group of block `b` begin.
    fn scales_of(self, b: usize) -> usize {
        b / self.blocks * self.stride() + self.blocks * self.numbers
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q4K => "q4_k",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let lower = s.to_ascii_lowercase();
        Self::ALL
            .into_iter()
            .find(|f| f.to_string() == lower)
            .ok_or_else(|| {
                let names: Vec<String> = Self::ALL.iter().map(Self::to_string).collect();
                format!("unknown format '{s}': choose {}", names.join(", "))
            })
    }
}

/// What does not fit.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum MatrixError {
    /// A slice of another length.
    #[error("{what} has {found} elements where {expected} are needed")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements found.
        found: usize,
    },
    /// Rows that are not whole blocks.
    #[error(
        "rows of {inputs} numbers cannot be kept as {format}: they are not whole blocks of {block}; choose a format with smaller blocks, int8 or bf16"
    )]
    Blocks {
        /// The format.
        format: Format,
        /// Numbers of a row.
        inputs: usize,
        /// Numbers of a block.
        block: usize,
    },
    /// Numbers that cannot be kept.
    #[error(
        "row {row} holds a number that {format} cannot keep: not finite, or too large for its scale; keep this matrix as bf16 or plain numbers"
    )]
    Values {
        /// The format.
        format: Format,
        /// The row.
        row: usize,
    },
    /// A row that does not exist.
    #[error("row {row} of a matrix of {rows} rows")]
    Row {
        /// The row asked for.
        row: usize,
        /// Rows there are.
        rows: usize,
    },
    /// Matrices that do not stand on each other.
    #[error("matrices to be joined must share their format and their inputs")]
    Join,
    /// Instructions that this processor lacks.
    #[error("this processor does not have the instructions '{isa}'")]
    Isa {
        /// The instructions.
        isa: Isa,
    },
    /// No memory.
    #[error("no memory for a matrix of {bytes} bytes")]
    Memory {
        /// Bytes wanted.
        bytes: usize,
    },
}

/// Numbers of `int8` that share a scale.
const INT8_GROUP: usize = 64;

/// A matrix `[outputs, inputs]` by rows: for ggml's formats exactly the bytes of a file.
/// A row of `int8` is its bytes, then its scales (bf16, little-endian).
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    format: Format,
    outputs: usize,
    inputs: usize,
    bytes: Vec<u8>,
}

impl Stored {
    /// Takes rows as a file has them.
    ///
    /// # Errors
    /// [`MatrixError::Blocks`] and [`MatrixError::Length`] when they do not fit.
    pub fn new(
        format: Format,
        outputs: usize,
        inputs: usize,
        bytes: Vec<u8>,
    ) -> Result<Self, MatrixError> {
        let expected = Self::bytes_of(format, outputs, inputs)?;
        if bytes.len() != expected {
            return Err(MatrixError::Length {
                what: "the stored matrix",
                expected,
                found: bytes.len(),
            });
        }
        Ok(Self {
            format,
            outputs,
            inputs,
            bytes,
        })
    }

    pub(super) fn bytes_of(
        format: Format,
        outputs: usize,
        inputs: usize,
    ) -> Result<usize, MatrixError> {
        let block = format.blocks().map_or(1, |b| b.size().0);
        let row = format.row_bytes(inputs).ok_or(MatrixError::Blocks {
            format,
            inputs,
            block,
        })?;
        row.checked_mul(outputs)
            .ok_or(MatrixError::Memory { bytes: usize::MAX })
    }

    /// Converts numbers, row by row, to the nearest that the format has.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`MatrixError::Values`] for numbers that are not finite (bf16
    /// keeps those).
    pub fn quantise(
        format: Format,
        values: &[f32],
        outputs: usize,
        inputs: usize,
    ) -> Result<Self, MatrixError> {
        let size = Self::bytes_of(format, outputs, inputs)?;
        if outputs.checked_mul(inputs) != Some(values.len()) {
            return Err(MatrixError::Length {
                what: "the matrix",
                expected: outputs.saturating_mul(inputs),
                found: values.len(),
            });
        }
        let read = |row: usize, x: &mut [f32]| {
            x.copy_from_slice(&values[row * inputs..(row + 1) * inputs]);
        };
        Self::from_rows_with(format, outputs, inputs, size, read)
    }

    /// The same matrix in another format: as [`quantise`](Self::quantise) of
    /// [`expand`](Self::expand), without the memory for all its numbers.
    ///
    /// # Errors
    /// As [`quantise`](Self::quantise).
    pub fn convert(&self, format: Format) -> Result<Self, MatrixError> {
        let (outputs, inputs) = (self.outputs, self.inputs);
        let size = Self::bytes_of(format, outputs, inputs)?;
        let read = |row: usize, x: &mut [f32]| self.expand_row(row, x);
        Self::from_rows_with(format, outputs, inputs, size, read)
    }

    /// Converts the rows that `read` gives, in several threads.
    fn from_rows_with(
        format: Format,
        outputs: usize,
        inputs: usize,
        size: usize,
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Self, MatrixError> {
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(size)
            .map_err(|_| MatrixError::Memory { bytes: size })?;
        bytes.resize(size, 0);
        let first_bad = AtomicUsize::new(usize::MAX);
        if size > 0 {
            /// Rows that one thread takes at a time.
            const ROWS: usize = 64;
            let row_bytes = size / outputs;
            // Each part is taken by one thread, once.
            let parts: Vec<_> = bytes
                .chunks_mut(ROWS * row_bytes)
                .map(|part| Mutex::new(Some(part)))
                .collect();
            team::share(parts.len(), 1, threads::get(), |range| {
                let mut x = vec![0f32; inputs];
                for i in range {
                    let part = parts[i].lock().unwrap_or_else(|e| e.into_inner()).take();
                    let rows = part.into_iter().flat_map(|p| p.chunks_exact_mut(row_bytes));
                    for (row, out) in (i * ROWS..).zip(rows) {
                        read(row, &mut x);
                        if quantise_row(format, &x, out).is_none() {
                            first_bad.fetch_min(row, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        match first_bad.into_inner() {
            usize::MAX => Self::new(format, outputs, inputs, bytes),
            row => Err(MatrixError::Values { format, row }),
        }
    }

    /// How its numbers are kept.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Rows.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Numbers of a row.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The bytes, row by row.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn row(&self, row: usize) -> &[u8] {
        let size = self.format.row_bytes(self.inputs).unwrap_or(0);
        &self.bytes[row * size..(row + 1) * size]
    }

    /// All numbers, `[outputs, inputs]`.
    #[must_use]
    pub fn expand(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.outputs * self.inputs];
        for (row, out) in out.chunks_exact_mut(self.inputs.max(1)).enumerate() {
            expand_row(self.format, self.row(row), out);
        }
        out
    }

    /// One row as numbers; `out` holds `inputs`.
    ///
    /// # Panics
    /// When the row does not exist or `out` has another length.
    pub fn expand_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.outputs && out.len() == self.inputs);
        expand_row(self.format, self.row(row), out);
    }

    /// These rows, in this order.
    ///
    /// # Errors
    /// [`MatrixError::Row`] for a row that does not exist.
    pub fn select(&self, rows: impl IntoIterator<Item = usize>) -> Result<Self, MatrixError> {
        let (mut bytes, mut outputs) = (Vec::new(), 0);
        for row in rows {
            if row >= self.outputs {
                return Err(MatrixError::Row {
                    row,
                    rows: self.outputs,
                });
            }
            bytes.extend_from_slice(self.row(row));
            outputs += 1;
        }
        Self::new(self.format, outputs, self.inputs, bytes)
    }

    /// Matrices on top of each other.
    ///
    /// # Errors
    /// [`MatrixError::Join`] when there is none or they differ in format or inputs.
    pub fn join(parts: &[&Self]) -> Result<Self, MatrixError> {
        let first = parts.first().ok_or(MatrixError::Join)?;
        let same = |p: &&Self| (p.format, p.inputs) == (first.format, first.inputs);
        if !parts.iter().all(same) {
            return Err(MatrixError::Join);
        }
        let bytes = parts.iter().flat_map(|p| p.bytes.iter().copied()).collect();
        let outputs = parts.iter().map(|p| p.outputs).sum();
        Self::new(first.format, outputs, first.inputs, bytes)
    }
}

/// One row of numbers by rows; `None` where the format cannot keep them.
fn quantise_row(format: Format, x: &[f32], out: &mut [u8]) -> Option<()> {
    match (format, format.blocks()) {
        (_, Some(blocks)) => out.copy_from_slice(&blocks::quantise(blocks, x)?),
        (Format::Bf16, None) => {
            for (out, &v) in out.as_chunks_mut::<2>().0.iter_mut().zip(x) {
                *out = bf16::from_f32(v).to_le_bytes();
            }
        }
        _ => {
            if !x.iter().all(|v| v.is_finite()) {
                return None;
            }
            let (q, scales) = out.split_at_mut(x.len());
            let groups = q.chunks_mut(INT8_GROUP).zip(x.chunks(INT8_GROUP));
            for ((q, x), to) in groups.zip(scales.as_chunks_mut::<2>().0) {
                let scale = int8_scale(x);
                let inverse = match scale.to_f32() {
                    0.0 => 0.0,
                    scale => scale.recip(),
                };
                for (q, v) in q.iter_mut().zip(x) {
                    *q = ((v * inverse).round() as i8).cast_unsigned();
                }
                *to = scale.to_le_bytes();
            }
        }
    }
    Some(())
}

/// The scale of a group of `int8`: the first bf16 with which its largest number fits; zero
/// where that would have no inverse.
fn int8_scale(x: &[f32]) -> bf16 {
    let exact = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
    if exact < f32::MIN_POSITIVE {
        return bf16::ZERO;
    }
    // Its upper half, the next one up when bits are cut off. (No overflow: below 3e36.)
    bf16::from_bits((exact.to_bits().div_ceil(1 << 16)) as u16)
}

/// One row by rows, as numbers.
fn expand_row(format: Format, bytes: &[u8], out: &mut [f32]) {
    match (format, format.blocks()) {
        (_, Some(blocks)) => {
            let fits = blocks::expand(blocks, bytes, out);
            debug_assert!(fits, "a row of whole blocks");
        }
        (Format::Bf16, None) => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        _ => {
            let (q, scales) = bytes.split_at(out.len());
            let groups = out.chunks_mut(INT8_GROUP).zip(q.chunks(INT8_GROUP));
            for ((out, q), scale) in groups.zip(scales.as_chunks::<2>().0) {
                let scale = bf16::from_le_bytes(*scale).to_f32();
                for (x, &q) in out.iter_mut().zip(q) {
                    *x = scale * f32::from(q.cast_signed());
                }
            }
        }
    }
}

/// A matrix in panels, in the order in which products read it.
///
/// A panel holds 32 outputs of bf16, 16 of the other formats; missing outputs of the
/// last one are zero.
///
/// - bf16: for each pair of inputs, the pair of each output.
/// - 8 bits: for each four inputs, those of each output, plus 128.
/// - 4 bits: for each block of 32 inputs four groups of 64 bytes, each with four bytes per
///   output: inputs `4 i ..` in the low nibbles and `16 + 4 i ..` in the high ones.
///
/// Behind the numbers of a block stand its scales, those of all outputs side by side (for
/// `q4_k`, behind eight blocks: `d`, `dmin`, then the 12 bytes of scales and minima; for `int8`,
/// behind two). But for padding nothing is added: as many bits as by rows.
pub struct Packed {
    format: Format,
    outputs: usize,
    inputs: usize,
    /// Bytes from one panel to the next, a multiple of 64.
    stride: usize,
    data: Region,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Packed({}, [{}, {}])",
            self.format, self.outputs, self.inputs
        )
    }
}

impl Packed {
    /// Packs a matrix.
    ///
    /// # Errors
    /// [`MatrixError::Memory`].
    pub fn new(matrix: &Stored) -> Result<Self, MatrixError> {
        Self::from_rows(matrix.format, matrix.outputs, matrix.inputs, &matrix.bytes)
    }

    /// Packs rows as [`Stored`] has them, without a copy of them.
    ///
    /// # Errors
    /// As [`Stored::new`], and [`MatrixError::Memory`].
    pub fn from_rows(
        format: Format,
        outputs: usize,
        inputs: usize,
        rows: &[u8],
    ) -> Result<Self, MatrixError> {
        let expected = Stored::bytes_of(format, outputs, inputs)?;
        if rows.len() != expected {
            return Err(MatrixError::Length {
                what: "the stored matrix",
                expected,
                found: rows.len(),
            });
        }
        let stride = format.panel_bytes(inputs);
        let bytes = outputs.div_ceil(format.panel()).checked_mul(stride);
        let bytes = bytes.ok_or(MatrixError::Memory { bytes: usize::MAX })?;
        let data = Region::new(bytes).ok_or(MatrixError::Memory { bytes })?;
        let mut packed = Self {
            format,
            outputs,
            inputs,
            stride,
            data,
        };
        let row_bytes = expected / outputs.max(1);
        // Each panel is taken by one thread, once.
        let panels: Vec<_> = packed
            .data
            .chunks_exact_mut(stride.max(1))
            .map(|data| Mutex::new(Some(data)))
            .collect();
        team::share(panels.len(), 8, threads::get(), |range| {
            for panel in range {
                let mine = panels[panel]
                    .lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .take();
                let Some(data) = mine else { continue };
                if let (Format::Int8 | Format::Q8_0, Some(groups)) = (format, format.groups()) {
                    for group in data.chunks_exact_mut(groups.stride()) {
                        // Zero, for inputs and outputs that are not there.
                        group[..groups.blocks * groups.numbers].fill(128);
                    }
                }
                let width = format.panel();
                for o in 0..width.min(outputs - panel * width) {
                    let row = panel * width + o;
                    let row = &rows[row * row_bytes..(row + 1) * row_bytes];
                    pack_row(format, inputs, o, row, data);
                }
            }
        });
        drop(panels);
        Ok(packed)
    }

    /// The matrix by rows again, bit for bit.
    #[must_use]
    pub fn stored(&self) -> Stored {
        let size = self.format.row_bytes(self.inputs).unwrap_or(0);
        let mut bytes = vec![0; size * self.outputs];
        if size > 0 {
            for (output, row) in bytes.chunks_exact_mut(size).enumerate() {
                self.unpack_row(output, row);
            }
        }
        Stored {
            format: self.format,
            outputs: self.outputs,
            inputs: self.inputs,
            bytes,
        }
    }

    /// One row as numbers; `out` holds `inputs`.
    ///
    /// # Panics
    /// When the row does not exist or `out` has another length.
    pub fn expand_row(&self, output: usize, out: &mut [f32]) {
        assert!(output < self.outputs && out.len() == self.inputs);
        let mut row = vec![0; self.format.row_bytes(self.inputs).unwrap_or(0)];
        self.unpack_row(output, &mut row);
        expand_row(self.format, &row, out);
    }

    fn unpack_row(&self, output: usize, row: &mut [u8]) {
        let width = self.format.panel();
        let data = self.panel(output / width);
        unpack_row(self.format, self.inputs, output % width, row, data);
    }

    /// How its numbers are kept.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Rows of the matrix: outputs of the product.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix: inputs of the product.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes that a product reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.panels() * self.stride
    }

    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(self.format.panel())
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// The bytes of one panel: numbers, then scales, then padding.
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        &self.data[panel * self.stride..(panel + 1) * self.stride]
    }
}

/// Where byte `i` (0..4) of the four inputs `four` of output `o` stands among the numbers of a
/// block.
fn at(four: usize, o: usize, i: usize) -> usize {
    four * 64 + o * 4 + i
}

/// Where entry `entry`, of `N` bytes, of output `o` stands in scales that begin at `start`.
fn scale_at<const N: usize>(start: usize, entry: usize, o: usize) -> std::ops::Range<usize> {
    let first = start + (entry * 16 + o) * N;
    first..first + N
}

/// Writes one row as output `o` of a panel.
fn pack_row(format: Format, inputs: usize, o: usize, row: &[u8], data: &mut [u8]) {
    let Some(groups) = format.groups() else {
        for (l, pair) in row.chunks(4).enumerate() {
            let to = (l * 32 + o) * 4;
            data[to..to + pair.len()].copy_from_slice(pair);
        }
        return;
    };
    let (numbers, scales) = (|b| groups.numbers_of(b), |b| groups.scales_of(b));
    match format {
        Format::Bf16 | Format::Int8 => {
            let (q, all) = row.split_at(inputs);
            for (l, &q) in q.iter().enumerate() {
                data[numbers(l / 32) + at(l % 32 / 4, o, l % 4)] = q ^ 128;
            }
            for (g, scale) in all.as_chunks::<2>().0.iter().enumerate() {
                data[scale_at::<2>(scales(2 * g), 0, o)].copy_from_slice(scale);
            }
        }
        Format::Q8_0 => {
            for (b, block) in row.chunks_exact(34).enumerate() {
                for (l, &q) in block[2..].iter().enumerate() {
                    data[numbers(b) + at(l / 4, o, l % 4)] = q ^ 128;
                }
                data[scale_at::<2>(scales(b), 0, o)].copy_from_slice(&block[..2]);
            }
        }
        Format::Q4_0 => {
            for (b, block) in row.chunks_exact(18).enumerate() {
                for (l, &q) in block[2..].iter().enumerate() {
                    data[numbers(b) + at(l / 4, o, l % 4)] = q;
                }
                data[scale_at::<2>(scales(b), 0, o)].copy_from_slice(&block[..2]);
            }
        }
        Format::Q4_1 => {
            for (b, block) in row.chunks_exact(20).enumerate() {
                for (l, &q) in block[4..].iter().enumerate() {
                    data[numbers(b) + at(l / 4, o, l % 4)] = q;
                }
                data[scale_at::<2>(scales(b), 0, o)].copy_from_slice(&block[..2]);
                data[scale_at::<2>(scales(b), 1, o)].copy_from_slice(&block[2..4]);
            }
        }
        Format::Q4K => {
            for (s, block) in row.chunks_exact(144).enumerate() {
                let start = scales(8 * s);
                data[scale_at::<2>(start, 0, o)].copy_from_slice(&block[..2]);
                data[scale_at::<2>(start, 1, o)].copy_from_slice(&block[2..4]);
                for (i, &packed) in block[4..16].iter().enumerate() {
                    data[start + 64 + i * 16 + o] = packed;
                }
                for (j, l) in (0..8).flat_map(|j| (0..16).map(move |l| (j, l))) {
                    let nibble = |l: usize| (block[16 + 32 * (j / 2) + l] >> (4 * (j % 2))) & 15;
                    data[numbers(8 * s + j) + at(l / 4, o, l % 4)] =
                        nibble(l) | (nibble(l + 16) << 4);
                }
            }
        }
    }
}

/// Reads output `o` of a panel as one row.
fn unpack_row(format: Format, inputs: usize, o: usize, row: &mut [u8], data: &[u8]) {
    let Some(groups) = format.groups() else {
        for (l, pair) in row.chunks_mut(4).enumerate() {
            let from = (l * 32 + o) * 4;
            let length = pair.len();
            pair.copy_from_slice(&data[from..from + length]);
        }
        return;
    };
    let (numbers, scales) = (|b| groups.numbers_of(b), |b| groups.scales_of(b));
    match format {
        Format::Bf16 | Format::Int8 => {
            let (q, all) = row.split_at_mut(inputs);
            for (l, q) in q.iter_mut().enumerate() {
                *q = data[numbers(l / 32) + at(l % 32 / 4, o, l % 4)] ^ 128;
            }
            for (g, scale) in all.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                scale.copy_from_slice(&data[scale_at::<2>(scales(2 * g), 0, o)]);
            }
        }
        Format::Q8_0 => {
            for (b, block) in row.chunks_exact_mut(34).enumerate() {
                for (l, q) in block[2..].iter_mut().enumerate() {
                    *q = data[numbers(b) + at(l / 4, o, l % 4)] ^ 128;
                }
                block[..2].copy_from_slice(&data[scale_at::<2>(scales(b), 0, o)]);
            }
        }
        Format::Q4_0 => {
            for (b, block) in row.chunks_exact_mut(18).enumerate() {
                for (l, q) in block[2..].iter_mut().enumerate() {
                    *q = data[numbers(b) + at(l / 4, o, l % 4)];
                }
                block[..2].copy_from_slice(&data[scale_at::<2>(scales(b), 0, o)]);
            }
        }
        Format::Q4_1 => {
            for (b, block) in row.chunks_exact_mut(20).enumerate() {
                for (l, q) in block[4..].iter_mut().enumerate() {
                    *q = data[numbers(b) + at(l / 4, o, l % 4)];
                }
                block[..2].copy_from_slice(&data[scale_at::<2>(scales(b), 0, o)]);
                block[2..4].copy_from_slice(&data[scale_at::<2>(scales(b), 1, o)]);
            }
        }
        Format::Q4K => {
            for (s, block) in row.chunks_exact_mut(144).enumerate() {
                let start = scales(8 * s);
                block.fill(0);
                block[..2].copy_from_slice(&data[scale_at::<2>(start, 0, o)]);
                block[2..4].copy_from_slice(&data[scale_at::<2>(start, 1, o)]);
                for (i, packed) in block[4..16].iter_mut().enumerate() {
                    *packed = data[start + 64 + i * 16 + o];
                }
                for (j, l) in (0..8).flat_map(|j| (0..16).map(move |l| (j, l))) {
                    let both = data[numbers(8 * s + j) + at(l / 4, o, l % 4)];
                    let (first, shift) = (16 + 32 * (j / 2), 4 * (j % 2));
                    block[first + l] |= (both & 15) << shift;
                    block[first + l + 16] |= (both >> 4) << shift;
                }
            }
        }
    }
}
