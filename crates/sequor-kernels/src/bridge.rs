//! The only places where memory is reinterpreted: tensor to slice and back, slice
//! to bytes, mapped file to bytes.
//!
//! Every function checks what it relies on (defined, on the CPU, plain strided
//! memory, contiguous, element type, lengths) and answers with a [`BridgeError`]
//! otherwise. Bytes are in the machine's order.

use std::ffi::c_void;
use std::fs::{self, File};
use std::path::Path;
use std::{fmt, io, ptr, slice};

use half::{bf16, f16};
use memmap2::Mmap;
use tch::{Device, Kind, TchError, Tensor};

/// Why memory could not be shared or copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BridgeError {
    /// The tensor was never given a value.
    #[error("the tensor is undefined")]
    Undefined,
    /// The tensor's memory is not the host's.
    #[error("the tensor is on {found:?}, expected the CPU: move it first")]
    Device {
        /// Where it is.
        found: Device,
    },
    /// Sparse, blocked, nested: there is no array of elements in order.
    #[error(
        "the tensor is not a plain array (it is sparse, nested or packed): make it dense first"
    )]
    Layout,
    /// The elements are of another type.
    #[error("the tensor holds {found:?}, expected {expected:?}")]
    Kind {
        /// What the caller asked for.
        expected: Kind,
        /// What is there.
        found: Kind,
    },
    /// The elements are not in row-major order in memory, or are stored negated.
    #[error("the tensor of shape {shape:?} is a strided view: make it contiguous first")]
    NotContiguous {
        /// The shape of the view.
        shape: Vec<i64>,
    },
    /// The shape does not hold as many elements as were given.
    #[error("shape {shape:?} does not hold {elements} elements of {kind:?} ({bytes} bytes)")]
    Shape {
        /// The shape asked for.
        shape: Vec<i64>,
        /// The element type asked for.
        kind: Kind,
        /// Elements given, rounded down.
        elements: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// A truth value that is neither 0 nor 1.
    #[error("a boolean is stored as a byte other than 0 and 1")]
    InvalidBool,
    /// libtorch refused.
    #[error("libtorch failed: {0}")]
    Backend(String),
}

impl From<TchError> for BridgeError {
    fn from(error: TchError) -> Self {
        // What follows the first line is a C++ backtrace.
        Self::Backend(
            error
                .to_string()
                .lines()
                .next()
                .unwrap_or("unknown error")
                .to_owned(),
        )
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A type of tensor elements.
///
/// # Safety
///
/// `KIND` has the size and the representation of `Self`, and every bit pattern
/// for which `valid` is true of all bytes is a value of `Self`. `Self` has no
/// padding.
pub unsafe trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// libtorch's name of the type.
    const KIND: Kind;

    /// Whether elements may have this byte in them.
    #[must_use]
    fn valid(_byte: u8) -> bool {
        true
    }
}

macro_rules! elements {
    ($($rust:ty => $kind:ident),* $(,)?) => {$(
        impl sealed::Sealed for $rust {}
        // SAFETY: a plain number of the same size and meaning as the kind, without
        // padding; every bit pattern is a value.
        unsafe impl Element for $rust {
            const KIND: Kind = Kind::$kind;
        }
    )*};
}

elements! {
    f64 => Double,
    f32 => Float,
    f16 => Half,
    bf16 => BFloat16,
    i64 => Int64,
    i32 => Int,
    i16 => Int16,
    i8 => Int8,
    u8 => Uint8,
}

impl sealed::Sealed for bool {}
// SAFETY: one byte in both, of which Rust allows 0 and 1 only.
unsafe impl Element for bool {
    const KIND: Kind = Kind::Bool;

    fn valid(byte: u8) -> bool {
        byte <= 1
    }
}

/// Lends the elements of a contiguous CPU tensor, in row-major order, without a
/// copy.
///
/// `f` must not change the tensor, or another tensor that shares its memory, and
/// no other thread may meanwhile: like every access through libtorch, this cannot
/// be checked.
///
/// # Errors
///
/// The tensor is undefined, elsewhere, not a plain array, not contiguous, or of
/// another type; see [`to_vec`] for a copy of any tensor.
pub fn read<T: Element, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R, BridgeError> {
    let found = tensor_kind(tensor)?;
    if found != T::KIND {
        return Err(BridgeError::Kind {
            expected: T::KIND,
            found,
        });
    }
    read_bytes(tensor, |bytes| {
        if !bytes.iter().all(|&byte| T::valid(byte)) {
            return Err(BridgeError::InvalidBool);
        }
        if bytes.is_empty() {
            return Ok(f(&[]));
        }
        let start = bytes.as_ptr().cast::<T>();
        if !start.is_aligned() {
            return Err(BridgeError::Layout);
        }
        // SAFETY: the bytes are those of whole elements of a kind with the
        // representation of `T` (checked above), aligned for `T` (checked) and
        // values of it (checked); they are borrowed for longer than the slice.
        Ok(f(unsafe {
            slice::from_raw_parts(start, bytes.len() / size_of::<T>())
        }))
    })?
}

/// Lends the memory of a contiguous CPU tensor of any type, in row-major order and
/// the machine's byte order, without a copy: what a checkpoint or a hash needs.
/// The conditions on `f` are those of [`read`].
///
/// # Errors
///
/// The tensor is undefined, elsewhere, not a plain array, or not contiguous.
pub fn read_bytes<R>(tensor: &Tensor, f: impl FnOnce(&[u8]) -> R) -> Result<R, BridgeError> {
    let kind = tensor_kind(tensor)?;
    let device = tensor.device();
    if device != Device::Cpu {
        return Err(BridgeError::Device { found: device });
    }
    check_strided(tensor)?;
    let complex = matches!(
        kind,
        Kind::ComplexHalf | Kind::ComplexFloat | Kind::ComplexDouble
    );
    if !tensor.is_contiguous() || tensor.f_is_neg()? || (complex && tensor.f_is_conj()?) {
        return Err(BridgeError::NotContiguous {
            shape: tensor.size(),
        });
    }
    let length = tensor.numel() * kind.elt_size_in_bytes();
    let start = tensor.data_ptr().cast::<u8>().cast_const();
    if length == 0 {
        return Ok(f(&[]));
    }
    if start.is_null() {
        return Err(BridgeError::Layout);
    }
    // SAFETY: a defined, strided, contiguous CPU tensor (checked above) has `numel`
    // elements of its kind behind `data_ptr`, which is not null. The borrow of
    // `tensor` keeps the memory alive, and a conforming `f` leaves it unchanged.
    Ok(f(unsafe { slice::from_raw_parts(start, length) }))
}

/// Lends the elements of a contiguous CPU tensor, in row-major order, to be changed in place:
/// in this tensor and in all that share its memory.
///
/// `f` must not use another tensor that shares this memory, and nobody else may meanwhile.
/// Truth values cannot be changed this way.
///
/// # Errors
///
/// As [`read`].
pub fn update<T: Element, R>(
    tensor: &mut Tensor,
    f: impl FnOnce(&mut [T]) -> R,
) -> Result<R, BridgeError> {
    let (start, length) = read(tensor, |x: &[T]| (x.as_ptr().cast_mut(), x.len()))?;
    if T::KIND == Kind::Bool {
        return Err(BridgeError::InvalidBool);
    }
    if length == 0 {
        return Ok(f(&mut []));
    }
    // SAFETY: `read` made sure of the memory of `length` elements of this type. The tensor is
    // borrowed mutably, and that nothing else uses its memory meanwhile is the condition above.
    Ok(f(unsafe { slice::from_raw_parts_mut(start, length) }))
}

/// Copies the elements of a tensor, in row-major order. A tensor elsewhere is
/// moved, a view made contiguous. With `T = f32` other real types are converted.
///
/// # Errors
///
/// The tensor is undefined, not a plain array, of another type, or libtorch cannot
/// move it.
pub fn to_vec<T: Element>(tensor: &Tensor) -> Result<Vec<T>, BridgeError> {
    let found = tensor_kind(tensor)?;
    check_strided(tensor)?;
    let complex = matches!(
        found,
        Kind::ComplexHalf | Kind::ComplexFloat | Kind::ComplexDouble
    );
    if found != T::KIND && (T::KIND != Kind::Float || complex) {
        return Err(BridgeError::Kind {
            expected: T::KIND,
            found,
        });
    }
    let plain = tensor
        .f_detach()?
        .f_to_device(Device::Cpu)?
        .f_to_kind(T::KIND)?
        .f_resolve_neg()?
        .f_contiguous()?;
    read(&plain, <[T]>::to_vec)
}

/// A CPU tensor of `shape` with a copy of `values` in row-major order.
///
/// # Errors
///
/// The shape is negative somewhere or does not hold exactly `values`, or libtorch
/// cannot allocate.
pub fn from_slice<T: Element>(values: &[T], shape: &[i64]) -> Result<Tensor, BridgeError> {
    from_bytes(as_bytes(values), shape, T::KIND)
}

/// A CPU tensor of `shape` whose elements `fill` writes in row-major order; what it does not
/// write is arbitrary. What it returns comes back beside the tensor.
///
/// # Errors
///
/// The shape is negative somewhere, or libtorch cannot allocate.
pub fn build<T: Element, R>(
    shape: &[i64],
    fill: impl FnOnce(&mut [T]) -> R,
) -> Result<(Tensor, R), BridgeError> {
    let tensor = if T::KIND == Kind::Bool {
        // Not every byte is a truth value.
        Tensor::f_zeros(shape, (T::KIND, Device::Cpu))?
    } else {
        Tensor::f_empty(shape, (T::KIND, Device::Cpu))?
    };
    let length = read_bytes_len(&tensor)? / size_of::<T>();
    if length == 0 {
        return Ok((tensor, fill(&mut [])));
    }
    // SAFETY: the tensor was just made, so nobody else sees its memory; it is a contiguous
    // CPU tensor of `length` elements of this type. Its memory comes from a foreign
    // allocator, which makes its bytes arbitrary but values nevertheless, and every byte
    // (every zero, for truth values) is a value of `T`.
    let filled = fill(unsafe { slice::from_raw_parts_mut(tensor.data_ptr().cast(), length) });
    Ok((tensor, filled))
}

/// A CPU tensor of `shape` and `kind` with a copy of `bytes`, which hold the
/// elements in row-major order and the machine's byte order. They need no
/// alignment.
///
/// # Errors
///
/// The shape is negative somewhere or needs another number of bytes, a boolean is
/// neither 0 nor 1, or libtorch cannot allocate.
pub fn from_bytes(bytes: &[u8], shape: &[i64], kind: Kind) -> Result<Tensor, BridgeError> {
    let wanted = shape
        .iter()
        .try_fold(kind.elt_size_in_bytes(), |product, &dim| {
            product.checked_mul(usize::try_from(dim).ok()?)
        });
    if wanted != Some(bytes.len()) {
        return Err(BridgeError::Shape {
            shape: shape.to_vec(),
            kind,
            elements: bytes.len() / kind.elt_size_in_bytes(),
            bytes: bytes.len(),
        });
    }
    if kind == Kind::Bool && !bytes.iter().all(|&byte| bool::valid(byte)) {
        return Err(BridgeError::InvalidBool);
    }
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu))?;
    // The same length again, from libtorch, before memory is written.
    let length = read_bytes_len(&tensor)?;
    if length != bytes.len() {
        return Err(BridgeError::Layout);
    }
    if length > 0 {
        // SAFETY: the tensor was just made, so nobody else sees its memory and it
        // cannot overlap `bytes`; it is a contiguous CPU tensor of `length` bytes,
        // the length of `bytes`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), tensor.data_ptr().cast(), length) };
    }
    Ok(tensor)
}

/// The memory of a slice of elements.
#[must_use]
pub fn as_bytes<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: elements have no padding, so all bytes of the slice are initialised;
    // bytes need no alignment, and the borrow is that of `values`.
    unsafe { slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The type of a tensor's elements, an error if it is undefined.
fn tensor_kind(tensor: &Tensor) -> Result<Kind, BridgeError> {
    if !tensor.defined() {
        return Err(BridgeError::Undefined);
    }
    Ok(tensor.f_kind()?)
}

// Part of the C interface that `tch` links. Its Rust wrapper panics where a tensor has no
// strides, and its other ways to ask make two new tensors, which took longer than most of what
// the kernels then do.
unsafe extern "C" {
    fn at_stride(tensor: *const c_void, strides: *mut i64);
}

/// An error unless the elements lie in memory at regular distances. Only such
/// tensors have strides; the others refuse, where asking them for their memory would
/// end the process.
fn check_strided(tensor: &Tensor) -> Result<(), BridgeError> {
    if tensor.is_sparse() || tensor.is_mkldnn() {
        return Err(BridgeError::Layout);
    }
    let mut few = [0i64; 16];
    let mut many = Vec::new();
    let strides = match few.get_mut(..tensor.dim()) {
        Some(strides) => strides,
        None => {
            many.resize(tensor.dim(), 0i64);
            &mut many[..]
        }
    };
    // SAFETY: the tensor is alive and defined (`tensor_kind` was asked first), and one number is
    // written for each dimension. Where libtorch refuses it keeps a message.
    unsafe { at_stride(tensor.as_ptr().cast(), strides.as_mut_ptr()) };
    // The next fallible call takes that message.
    match tensor.f_is_neg() {
        Ok(_) => Ok(()),
        Err(_) => Err(BridgeError::Layout),
    }
}

/// Bytes of the elements of a tensor that is known to be plain and contiguous.
fn read_bytes_len(tensor: &Tensor) -> Result<usize, BridgeError> {
    read_bytes(tensor, <[u8]>::len)
}

/// A file mapped into memory for reading.
///
/// The file must not shrink or change while it is mapped (a process that does that
/// to its own weights gets what it asked for: changed bytes, or the end of the
/// process where they are gone). Replace a file by renaming another over it.
pub struct MappedFile {
    /// `None` for an empty file, which cannot be mapped everywhere.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    ///
    /// It cannot be opened or mapped, or is not a regular file.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        // Before opening: a pipe would wait for its writer.
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the map is private to this value and read-only. That nobody
        // changes the file meanwhile is the condition stated on the type.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map: Some(map) })
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

impl std::ops::Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_ref()
    }
}

impl fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedFile({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Through the bridge and back, against libtorch's own conversions.
    fn round_trip<T: Element + PartialEq + fmt::Debug>(values: &[T], as_double: &[f64]) {
        let n = values.len() as i64;
        let tensor = from_slice(values, &[1, n]).unwrap();
        assert_eq!((tensor.size(), tensor.kind()), (vec![1, n], T::KIND));
        let doubles = Vec::<f64>::try_from(&tensor.to_kind(Kind::Double).view([n])).unwrap();
        assert_eq!(doubles, as_double);
        assert_eq!(read(&tensor, <[T]>::to_vec).unwrap(), values);
        assert_eq!(to_vec::<T>(&tensor).unwrap(), values);
        let mut copied = vec![0u8; size_of_val(values)];
        tensor.f_copy_data_u8(&mut copied, values.len()).unwrap();
        assert_eq!(read_bytes(&tensor, <[u8]>::to_vec).unwrap(), copied);
        assert_eq!(as_bytes(values), copied);
        // The same from bytes that are not aligned.
        let mut shifted = vec![0u8];
        shifted.extend(&copied);
        let again = from_bytes(&shifted[1..], &[n], T::KIND).unwrap();
        assert_eq!(to_vec::<T>(&again).unwrap(), values);
    }

    #[test]
    fn every_element_type_agrees_with_libtorch() {
        let numbers = [0.0, 1.0, -2.5, 100.0];
        round_trip(&numbers, &numbers);
        round_trip(&numbers.map(|x| x as f32), &numbers);
        round_trip(&numbers.map(f16::from_f64), &numbers);
        round_trip(&numbers.map(bf16::from_f64), &numbers);
        let integers = [0i8, 1, -2, 127];
        let expected = integers.map(f64::from);
        round_trip(&integers, &expected);
        round_trip(&integers.map(i16::from), &expected);
        round_trip(&integers.map(i32::from), &expected);
        round_trip(&integers.map(i64::from), &expected);
        round_trip(&[0u8, 255], &[0.0, 255.0]);
        round_trip(&[true, false, true], &[1.0, 0.0, 1.0]);
    }

    #[test]
    fn reading_is_without_a_copy() {
        let tensor = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let address = tensor.data_ptr() as usize;
        read(&tensor, |x: &[f32]| {
            assert_eq!(x, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
            assert_eq!(x.as_ptr() as usize, address);
        })
        .unwrap();
        // A contiguous view starts inside.
        let second = tensor.get(1);
        assert_eq!(read(&second, |x: &[f32]| x[0]).unwrap(), 3.0);
    }

    #[test]
    fn tensors_are_built_in_place() {
        let (t, sum) = build(&[2, 3], |x: &mut [f32]| {
            x.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            x.len()
        })
        .unwrap();
        assert_eq!((t.size(), sum), (vec![2, 3], 6));
        assert_eq!(to_vec::<f32>(&t).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let (empty, length) = build(&[0, 3], |x: &mut [i64]| x.len()).unwrap();
        assert_eq!((empty.size(), length), (vec![0, 3], 0));
        let (bools, ()) = build(&[2], |_: &mut [bool]| ()).unwrap();
        assert_eq!(to_vec::<bool>(&bools).unwrap(), [false, false]);
        let mut t = t;
        let alias = t.shallow_clone();
        update(&mut t, |x: &mut [f32]| x[4] = -4.0).unwrap();
        assert_eq!(
            to_vec::<f32>(&alias).unwrap(),
            [0.0, 1.0, 2.0, 3.0, -4.0, 5.0]
        );
        assert!(update(&mut t.transpose(0, 1), |_: &mut [f32]| ()).is_err());
        assert!(update(&mut t, |_: &mut [f64]| ()).is_err());
        assert!(build(&[-1], |_: &mut [f32]| ()).is_err());
        assert!(build(&[i64::MAX / 8], |_: &mut [f32]| ()).is_err());
    }

    #[test]
    fn what_is_not_plain_memory_is_refused() {
        let tensor = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let transposed = tensor.transpose(0, 1);
        assert!(matches!(
            read(&transposed, |_: &[f32]| ()),
            Err(BridgeError::NotContiguous { shape }) if shape == [3, 2]
        ));
        assert_eq!(
            to_vec::<f32>(&transposed).unwrap(),
            [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
        );
        let expanded = Tensor::ones([1], (Kind::Float, Device::Cpu)).expand([3], false);
        assert!(read(&expanded, |_: &[f32]| ()).is_err());
        assert_eq!(to_vec::<f32>(&expanded).unwrap(), [1.0; 3]);

        assert!(matches!(
            read(&tensor, |_: &[f64]| ()),
            Err(BridgeError::Kind {
                expected: Kind::Double,
                found: Kind::Float
            })
        ));
        assert!(matches!(
            read(&Tensor::new(), |_: &[f32]| ()),
            Err(BridgeError::Undefined)
        ));
        assert!(matches!(
            to_vec::<f32>(&Tensor::new()),
            Err(BridgeError::Undefined)
        ));

        let packed = [
            tensor.to_sparse(None, None::<i64>, None),
            tensor.to_sparse_csr(None),
            tensor.to_mkldnn(),
        ];
        for other in packed {
            assert!(matches!(
                read(&other, |_: &[f32]| ()),
                Err(BridgeError::Layout)
            ));
            assert!(matches!(to_vec::<f32>(&other), Err(BridgeError::Layout)));
        }
    }

    #[test]
    fn lazily_negated_memory_is_not_read_raw() {
        // The imaginary part of a conjugate is a view with a sign to be applied.
        let complex = Tensor::complex(
            &Tensor::from_slice(&[1.0f32, 2.0]),
            &Tensor::from_slice(&[3.0f32, 4.0]),
        );
        let negated = complex.conj().imag();
        assert!(read(&negated, |_: &[f32]| ()).is_err());
        assert_eq!(to_vec::<f32>(&negated).unwrap(), [-3.0, -4.0]);
        assert!(matches!(
            to_vec::<f32>(&complex),
            Err(BridgeError::Kind { .. })
        ));
        assert!(read_bytes(&complex.conj(), |_| ()).is_err());
    }

    #[test]
    fn f32_converts_and_others_do_not() {
        let whole = Tensor::from_slice(&[1i64, -2]);
        assert_eq!(to_vec::<f32>(&whole).unwrap(), [1.0, -2.0]);
        assert!(matches!(
            to_vec::<i32>(&whole),
            Err(BridgeError::Kind { .. })
        ));
        let weights = from_slice(&[bf16::ONE, bf16::PI], &[2])
            .unwrap()
            .set_requires_grad(true);
        assert_eq!(to_vec::<f32>(&weights).unwrap(), [1.0, bf16::PI.to_f32()]);
        assert_eq!(read(&weights, |x: &[bf16]| x.len()).unwrap(), 2);
    }

    #[test]
    fn empty_tensors() {
        for shape in [vec![0], vec![2, 0, 3]] {
            let empty = from_slice::<f32>(&[], &shape).unwrap();
            assert_eq!(empty.size(), shape);
            assert_eq!(read(&empty, |x: &[f32]| x.len()).unwrap(), 0);
            assert!(to_vec::<f32>(&empty).unwrap().is_empty());
        }
        // A scalar has one element and no dimension.
        let scalar = from_slice(&[7i64], &[]).unwrap();
        assert_eq!((scalar.dim(), scalar.int64_value(&[])), (0, 7));
    }

    #[test]
    fn lengths_are_checked() {
        for shape in [&[2i64][..], &[-3], &[3, -1], &[i64::MAX, i64::MAX], &[]] {
            let error = from_slice(&[1f32, 2.0, 3.0], shape).unwrap_err();
            assert!(matches!(
                error,
                BridgeError::Shape {
                    elements: 3,
                    bytes: 12,
                    ..
                }
            ));
        }
        assert!(from_bytes(&[0; 7], &[1], Kind::Double).is_err());
        assert!(from_bytes(&[0; 16], &[1], Kind::ComplexDouble).is_ok());
        assert!(from_bytes(&[56], &[1], Kind::Float8e4m3fn).is_ok());
        // Zero elements of an absurd shape: an error or a tensor, not the end.
        let _ = from_slice::<f32>(&[], &[0, i64::MAX, i64::MAX]);
    }

    #[test]
    fn booleans_are_zero_or_one() {
        assert!(matches!(
            from_bytes(&[0, 2], &[2], Kind::Bool),
            Err(BridgeError::InvalidBool)
        ));
        let odd = Tensor::from_slice(&[0u8, 3]).view_dtype(Kind::Bool);
        assert!(matches!(
            read(&odd, |_: &[bool]| ()),
            Err(BridgeError::InvalidBool)
        ));
    }

    #[test]
    fn files_are_mapped() {
        let dir = std::env::temp_dir().join(format!("sequor-bridge-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (full, empty) = (dir.join("full"), dir.join("empty"));
        fs::write(&full, [1, 2, 3]).unwrap();
        fs::write(&empty, []).unwrap();
        let file = MappedFile::open(&full).unwrap();
        assert_eq!(file.as_ref(), [1, 2, 3]);
        assert_eq!(format!("{file:?}"), "MappedFile(3 bytes)");
        assert!(MappedFile::open(&empty).unwrap().is_empty());
        assert_eq!(
            MappedFile::open(&dir).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        let missing = MappedFile::open(dir.join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        // It may be used from another thread.
        let sum = std::thread::spawn(move || file.iter().map(|&b| u32::from(b)).sum::<u32>());
        assert_eq!(sum.join().unwrap(), 6);
        fs::remove_dir_all(&dir).unwrap();
    }
}
