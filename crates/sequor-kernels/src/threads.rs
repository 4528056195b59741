//! One place for the number of threads that libtorch computes with.
//!
//! libtorch's threads spin at the end of every parallel region until all have
//! arrived. With other busy processes on the cores each region then lasts a
//! scheduler quantum (milliseconds) whatever its size, and one thread is faster
//! than two: [`probe`] tells.

use std::ffi::{c_char, c_int};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::cpu;

/// The largest number of threads that [`set`] passes on.
pub const MOST: usize = 512;

/// A region that takes longer than this is waiting for a processor.
const BUSY_US: f64 = 1000.0;

/// 0 until [`set`] was called.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

// Part of the C interface that `tch` links. Its Rust wrapper panics where libtorch
// refuses, and a direct dependency on torch-sys would delay our build script until
// after the one whose errors it explains.
unsafe extern "C" {
    fn at_set_num_interop_threads(threads: c_int);
    fn get_and_reset_last_err() -> *mut c_char;
}

/// Sets the threads of libtorch's operations to `n` (brought into `1..=`[`MOST`]).
///
/// Call it early and from the thread that owns the model: a thread that already
/// ran a parallel operation keeps the number it started with. Threads between
/// operations, which nothing here uses, are limited to one on the first call.
pub fn set(n: usize) {
    let n = bounded(n);
    limit_interop_threads();
    // Cannot fail for a positive number.
    tch::set_num_threads(n as i32);
    CHOSEN.store(n, Ordering::Relaxed);
}

/// The number last given to [`set`], or before that what libtorch chose.
#[must_use]
pub fn get() -> usize {
    match CHOSEN.load(Ordering::Relaxed) {
        0 => usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1),
        n => n,
    }
}

/// One thread per physical core that this process may use, since hardware threads
/// of one core share its vector units; but both of two, because there the system
/// seldom tells cores from hardware threads, and waiting for memory overlaps.
#[must_use]
pub fn default_count() -> usize {
    match cpu::logical_cores() {
        few @ 0..=2 => few.max(1),
        _ => cpu::physical_cores(),
    }
}

/// What [`probe`] found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probe {
    /// Median time of a small parallel operation, in microseconds. On a quiet
    /// machine below 100.
    pub parallel_region_us: f64,
    /// Whether that is so long that fewer threads would be faster.
    pub busy: bool,
}

/// Times a small parallel operation at the current number of threads. Takes a few
/// milliseconds on a quiet machine, about a tenth of a second on a busy one. Where
/// libtorch refuses, the time is infinite.
#[must_use]
pub fn probe() -> Probe {
    let parallel_region_us = median_region_us().unwrap_or(f64::INFINITY);
    Probe {
        parallel_region_us,
        busy: parallel_region_us > BUSY_US,
    }
}

fn bounded(n: usize) -> usize {
    n.clamp(1, MOST)
}

fn median_region_us() -> Option<f64> {
    const REPEATS: usize = 15;
    /// Even the worst machine is tried this often before giving up early.
    const AT_LEAST: usize = 3;
    const PATIENCE: Duration = Duration::from_millis(100);
    /// libtorch gives each thread at least this many elements.
    const GRAIN: usize = 32_768;
    let elements = (GRAIN * get().min(64)) as i64;
    let x = Tensor::f_ones([elements], (Kind::Float, Device::Cpu)).ok()?;
    let _warm = x.f_add_scalar(1.0).ok()?;
    let begin = Instant::now();
    let mut times = Vec::with_capacity(REPEATS);
    while times.len() < REPEATS && (times.len() < AT_LEAST || begin.elapsed() < PATIENCE) {
        let start = Instant::now();
        let _sum = x.f_add_scalar(1.0).ok()?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied()
}

fn limit_interop_threads() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: both functions take and return plain values and may be called at
        // any time. libtorch refuses the first if the number was set before or the
        // threads are running; that is fine with us, and the second takes the
        // message so that the next operation does not report it. The message, if
        // any, is not freed: a few hundred bytes, once.
        unsafe {
            at_set_num_interop_threads(1);
            let _message = get_and_reset_last_err();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, because the number of threads is shared by the process.
    #[test]
    fn set_get_and_probe() {
        assert!(get() >= 1);
        assert!((1..=cpu::logical_cores()).contains(&default_count()));
        assert_eq!(bounded(usize::MAX), MOST);
        for (asked, given) in [(0, 1), (1, 1), (2, 2)] {
            set(asked);
            assert_eq!(get(), given);
            assert_eq!(tch::get_num_threads(), given as i32);
        }
        assert_eq!(tch::get_num_interop_threads(), 1);
        set(1);
        let probe = probe();
        assert!(probe.parallel_region_us > 0.0);
        assert_eq!(probe.busy, probe.parallel_region_us > BUSY_US);
        set(default_count());
    }
}
