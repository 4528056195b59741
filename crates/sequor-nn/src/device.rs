//! Choice of device and of the number format of weights.

use crate::{Error, Result};
use sequor_kernels::matmul::Format;
use std::str::FromStr;
use tch::{Device, Kind};

/// The number format in which the weights of linear layers and embeddings are
/// kept. Norms, rotary tables, attention and logits are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit floats: the reference arithmetic.
    #[default]
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit brain floats.
    Bf16,
}

impl DType {
    /// libtorch's name for it.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::F16 => Kind::Half,
            Self::Bf16 => Kind::BFloat16,
        }
    }

    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for DType {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.to_ascii_lowercase().as_str() {
            "f32" | "float32" | "float" => Ok(Self::F32),
            "f16" | "float16" | "half" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            _ => Err(Error::Input(format!(
                "unknown dtype '{s}': choose f32, f16 or bf16"
            ))),
        }
    }
}

/// How the matrices of a model are kept for inference: in a number format of libtorch, or in
/// one of our own formats, on which our own kernels compute
/// ([`sequor_kernels::matmul`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Weights {
    /// As the file has them where there are kernels for that: quantised blocks stay as they
    /// are (those without kernels of their own become `q8_0`), floats keep their format.
    #[default]
    Auto,
    /// Plain numbers. (On a CPU with vector instructions for it, bf16 is computed by our
    /// kernels: the same numbers, faster.)
    Float(DType),
    /// Converted to this format.
    Packed(Format),
}

impl Weights {
    /// Names, as [`FromStr`] takes them.
    pub const NAMES: &str = "auto, f32, f16, bf16, int8, q8_0, q4_0, q4_1 or q4_k";

    /// The plain format that stands in where ours do not serve: for what is not a matrix of
    /// a linear layer, and elsewhere than on a CPU.
    #[must_use]
    pub fn dtype(self) -> DType {
        match self {
            Self::Float(dtype) => dtype,
            Self::Auto | Self::Packed(_) => DType::Bf16,
        }
    }
}

impl From<DType> for Weights {
    fn from(dtype: DType) -> Self {
        Self::Float(dtype)
    }
}

impl std::fmt::Display for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Float(dtype) => dtype.fmt(f),
            Self::Packed(format) => format.fmt(f),
        }
    }
}

impl FromStr for Weights {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        if s.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        let float = s.parse::<DType>().map(Self::Float);
        let packed = || s.parse::<Format>().map(Self::Packed);
        float
            .or_else(|_| packed())
            .map_err(|_| Error::Input(format!("unknown weights '{s}': choose {}", Self::NAMES)))
    }
}

/// Reads `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// [`Error::Input`] for anything else; [`Error::Unsupported`] when CUDA is asked
/// for and libtorch's CUDA half cannot be opened or sees no GPU.
pub fn parse_device(s: &str) -> Result<Device> {
    let index = match s {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => 0,
        _ => match s.strip_prefix("cuda:").map(str::parse::<usize>) {
            Some(Ok(i)) => i,
            _ => {
                return Err(Error::Input(format!(
                    "unknown device '{s}': choose cpu, cuda or cuda:N"
                )));
            }
        },
    };
    if !tch::Cuda::is_available() {
        sequor_kernels::cuda::open(&sequor_kernels::cuda::default_dirs())
            .map_err(|e| Error::Unsupported(format!("--device {s}: {e}")))?;
    }
    if !tch::Cuda::is_available() {
        return Err(Error::Unsupported(format!(
            "--device {s}: libtorch's CUDA half was opened, but it sees no GPU (is the driver installed?)"
        )));
    }
    let n = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    if index >= n {
        return Err(Error::Input(format!(
            "--device {s}: this machine has {n} GPU(s), numbered from 0"
        )));
    }
    Ok(Device::Cuda(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_refused() {
        assert_eq!("bf16".parse::<DType>().unwrap(), DType::Bf16);
        assert!(
            "int3"
                .parse::<DType>()
                .unwrap_err()
                .to_string()
                .contains("choose f32")
        );
        let weights = |s: &str| s.parse::<Weights>();
        for name in [
            "auto", "f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q4_k",
        ] {
            assert_eq!(weights(name).unwrap().to_string(), name);
            assert!(Weights::NAMES.contains(name));
        }
        assert!(weights("q2_k").unwrap_err().to_string().contains("q4_k"));
        assert_eq!(parse_device("cpu").unwrap(), Device::Cpu);
        assert!(parse_device("tpu").is_err());
        assert!(parse_device("cuda:x").is_err());
    }
}
