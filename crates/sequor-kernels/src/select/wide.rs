//! Functions compiled twice: for any processor, and for one with wide vectors.

#[cfg(test)]
use std::sync::atomic::{AtomicBool, Ordering};

/// Lets a test compare the two.
#[cfg(test)]
pub(super) static ONLY_PORTABLE: AtomicBool = AtomicBool::new(false);

/// Whether to take the wide version.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn available() -> bool {
    #[cfg(test)]
    if ONLY_PORTABLE.load(Ordering::Relaxed) {
        return false;
    }
    is_x86_feature_detected!("avx2")
}

/// Declares a function whose body is also compiled with 256-bit vectors, taken
/// where the processor has them. The results are the same to the last bit: the
/// order of every sum is written out in lanes, and a fused multiply-add, which
/// rounds differently, is not among the instructions allowed.
macro_rules! wide {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident(
        $($argument:ident: $type:ty),* $(,)?
    ) -> $result:ty $body:block) => {
        $(#[$attribute])*
        $visibility fn $name($($argument: $type),*) -> $result {
            #[inline(always)]
            fn portable($($argument: $type),*) -> $result $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn with_avx2($($argument: $type),*) -> $result {
                    portable($($argument),*)
                }
                if $crate::select::wide::available() {
                    // SAFETY: the processor was asked and has the instructions.
                    return unsafe { with_avx2($($argument),*) };
                }
            }
            portable($($argument),*)
        }
    };
}

pub(super) use wide;
