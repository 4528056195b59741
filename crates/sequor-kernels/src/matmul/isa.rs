//! Which instructions a product is computed with.

use super::Format;
use crate::cpu::Features;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// A set of instructions that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// Whatever the compiler makes of plain loops.
    Portable,
    /// 256-bit vectors and fused multiply-add.
    Avx2,
    /// 512-bit vectors with dot products of bytes (VNNI) and, where there are, of bf16.
    Avx512,
}

impl Isa {
    /// All of them, the slowest first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The environment variable that forces one: `portable`, `avx2` or `avx512`; or `off`, which
    /// leaves everything to libtorch.
    pub const VARIABLE: &str = "SEQUOR_KERNELS";

    /// The value of that variable that leaves everything to libtorch.
    const OFF: &str = "off";

    /// Whether our kernels serve here: where there are vector instructions that they are
    /// written for, or some are forced, and they are not switched off.
    #[must_use]
    pub fn serve() -> bool {
        static SERVE: OnceLock<bool> = OnceLock::new();
        *SERVE.get_or_init(|| {
            let off = std::env::var_os(Self::VARIABLE).is_some_and(|v| v == Self::OFF);
            !off && (Self::best() > Self::Portable || matches!(Self::forced(), Ok(Some(_))))
        })
    }

    /// Does this processor have these instructions?
    #[must_use]
    pub fn available(self) -> bool {
        static FEATURES: OnceLock<Features> = OnceLock::new();
        let f = FEATURES.get_or_init(Features::detect);
        match self {
            Self::Portable => true,
            Self::Avx2 => f.avx2 && f.fma && f.f16c,
            Self::Avx512 => {
                Self::Avx2.available() && f.avx512f && f.avx512bw && f.avx512vl && f.avx512vnni
            }
        }
    }

    /// The fastest that this processor has.
    #[must_use]
    pub fn best() -> Self {
        let there = Self::ALL.into_iter().rev().find(|i| i.available());
        there.unwrap_or(Self::Portable)
    }

    /// What [`VARIABLE`](Self::VARIABLE) asks for; `None` when it is not set.
    ///
    /// # Errors
    /// A message when it names no set of instructions, or one that this processor lacks.
    pub fn forced() -> Result<Option<Self>, String> {
        let Some(text) = std::env::var_os(Self::VARIABLE) else {
            return Ok(None);
        };
        let text = text.to_string_lossy();
        if text == Self::OFF {
            return Ok(None);
        }
        let isa: Self = text
            .parse()
            .map_err(|e| format!("{}: {e}", Self::VARIABLE))?;
        if isa.available() {
            Ok(Some(isa))
        } else {
            Err(format!(
                "{}={isa}: this processor does not have these instructions",
                Self::VARIABLE
            ))
        }
    }

    /// The one forced by the environment, else the best. Fixed when first asked for.
    #[must_use]
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        *CHOSEN.get_or_init(|| Self::forced().ok().flatten().unwrap_or_else(Self::best))
    }

    /// The instructions that a format really uses under this choice: a processor may have
    /// 512-bit vectors and yet no products of bf16.
    #[must_use]
    pub fn serving(self, format: Format) -> Self {
        static BF16: OnceLock<bool> = OnceLock::new();
        let bf16 = *BF16.get_or_init(|| Features::detect().avx512bf16);
        match (self, format) {
            (Self::Avx512, Format::Bf16) if !bf16 => Self::Avx2,
            _ => self,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        })
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|i| i.to_string() == s)
            .ok_or_else(|| format!("unknown instructions '{s}': choose portable, avx2 or avx512"))
    }
}
