//! Parallel work on the threads that libtorch computes with.
//!
//! libtorch's operations run on an OpenMP team whose threads spin for a while
//! after each region. A second pool beside it would have to share the cores with
//! spinning threads, so kernels run on that very team: nothing is oversubscribed,
//! a region starts in about a microsecond, and the number of threads is the one of
//! [`threads`]. Where libtorch was built without OpenMP (or with one that does not
//! speak the interface of GCC's), work runs in the calling thread.
//!
//! A region ends when all its threads have arrived. Where another program has the core, a
//! thread arrives when the scheduler lets it, milliseconds later, and a hundred regions per
//! token would be slower than one thread. So whoever calls watches how long it waits for the
//! others, and works alone for a while after a long wait.
//!
//! How work is shared out never changes a result: an output is computed by one
//! thread, in an order of its own.

use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use crate::threads;

/// A parallel region: runs a function with a datum in so many threads and waits.
type Parallel =
    unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);
type Number = unsafe extern "C" fn() -> c_int;

struct OpenMp {
    parallel: Parallel,
    thread: Number,
    threads: Number,
}

/// The OpenMP that libtorch uses, if it can be found in this process.
fn open_mp() -> Option<&'static OpenMp> {
    static FOUND: OnceLock<Option<OpenMp>> = OnceLock::new();
    FOUND.get_or_init(find).as_ref()
}

#[cfg(target_os = "linux")]
fn find() -> Option<OpenMp> {
    use libloading::os::unix::{Library, RTLD_LAZY};
    /// Only what is already in the process (`dlopen`'s flag on Linux).
    const RTLD_NOLOAD: c_int = 4;
    // SAFETY: nothing is loaded, hence no initialiser runs: the flag asks for a
    // library that is in the process already.
    let library =
        unsafe { Library::open(Some("libtorch_cpu.so"), RTLD_LAZY | RTLD_NOLOAD) }.ok()?;
    // A look-up through libtorch's handle goes on to what it depends on, so that
    // this is its OpenMP even where a process has two.
    // SAFETY: these are the names and signatures of GCC's OpenMP interface.
    let found = unsafe {
        OpenMp {
            parallel: *library.get::<Parallel>(b"GOMP_parallel\0").ok()?,
            thread: *library.get::<Number>(b"omp_get_thread_num\0").ok()?,
            threads: *library.get::<Number>(b"omp_get_num_threads\0").ok()?,
        }
    };
    // libtorch stays, and so do the functions.
    std::mem::forget(library);
    Some(found)
}

#[cfg(not(target_os = "linux"))]
fn find() -> Option<OpenMp> {
    None
}

/// Whether kernels can use more than the calling thread.
#[must_use]
pub fn available() -> bool {
    open_mp().is_some()
}

/// When regions may have more than one thread again.
struct Patience {
    /// Nanoseconds after [`clock`] began.
    alone_until: AtomicU64,
    /// For how long after the next long wait, in nanoseconds.
    period: AtomicU64,
}

static PATIENCE: Patience = Patience {
    alone_until: AtomicU64::new(0),
    period: AtomicU64::new(Patience::SHORTEST),
};

impl Patience {
    /// A thread that has its core to itself is there within microseconds.
    const LONG_WAIT: u64 = 400_000;
    const SHORTEST: u64 = 20_000_000;
    const LONGEST: u64 = 1_000_000_000;

    fn alone(&self) -> bool {
        clock() < self.alone_until.load(Ordering::Relaxed)
    }

    /// Learns from a region: how long the caller waited for the others after `worked`
    /// nanoseconds of its own.
    fn learn(&self, waited: u64, worked: u64) {
        // Shares are uneven by a piece of work, an eighth of it with two threads.
        if waited > Self::LONG_WAIT + worked / 4 {
            let period = self.period.load(Ordering::Relaxed);
            self.alone_until.store(clock() + period, Ordering::Relaxed);
            let next = (2 * period).min(Self::LONGEST);
            self.period.store(next, Ordering::Relaxed);
        } else if waited < Self::LONG_WAIT / 8 {
            // Good regions forgive slowly: one long wait weighs as much as many of them.
            let period = self.period.load(Ordering::Relaxed);
            let next = (period - period / 64).max(Self::SHORTEST);
            self.period.store(next, Ordering::Relaxed);
        }
    }
}

/// Nanoseconds since it was first asked.
fn clock() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

struct Shared<'a, F> {
    work: &'a F,
    thread: Number,
    threads: Number,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// When the caller's own part ended.
    caller_done: AtomicU64,
}

/// What each thread of the team runs.
///
/// # Safety
/// `data` must point to a `Shared<F>` that outlives the region.
unsafe extern "C" fn enter<F: Fn(usize, usize) + Sync>(data: *mut c_void) {
    // SAFETY: as promised by the caller; it is only shared.
    let shared = unsafe { &*data.cast::<Shared<'_, F>>() };
    // SAFETY: these functions may be called from any thread of a region.
    let (index, of) = unsafe { ((shared.thread)(), (shared.threads)()) };
    let (index, of) = (index.max(0) as usize, of.max(1) as usize);
    // A panic must not unwind into C.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (shared.work)(index, of))) {
        let mut first = shared.panic.lock().unwrap_or_else(|e| e.into_inner());
        first.get_or_insert(panic);
    }
    if index == 0 {
        shared.caller_done.store(clock(), Ordering::Relaxed);
    }
}

/// Runs `work(index, of)` once for each `index` below `of`, where `of` is the number
/// of threads that took part: `threads` at most, and at least 1. A panic in one of
/// them goes on in the caller once all have ended.
pub fn run<F: Fn(usize, usize) + Sync>(threads: usize, work: F) {
    let threads = threads.min(threads::MOST);
    let Some(open_mp) = open_mp().filter(|_| threads > 1 && !PATIENCE.alone()) else {
        return work(0, 1);
    };
    let shared = Shared {
        work: &work,
        thread: open_mp.thread,
        threads: open_mp.threads,
        panic: Mutex::new(None),
        caller_done: AtomicU64::new(0),
    };
    let begin = clock();
    // SAFETY: the region ends before this call returns, so `shared` outlives it;
    // `enter::<F>` takes a pointer to exactly this type and does not unwind, and
    // what the threads share (`F: Sync`, a mutex) may be shared.
    unsafe {
        let data = (&raw const shared).cast_mut().cast::<c_void>();
        (open_mp.parallel)(enter::<F>, data, threads as c_uint, 0);
    }
    let done = shared.caller_done.load(Ordering::Relaxed);
    PATIENCE.learn(clock().saturating_sub(done), done.saturating_sub(begin));
    let panic = shared.panic.into_inner().unwrap_or_else(|e| e.into_inner());
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

/// Shares out `0..items` in pieces of at least `grain` (but for the last): each
/// item is in exactly one piece. Threads that are done early take more pieces, for
/// cores are not always equally fast.
pub fn share(items: usize, grain: usize, threads: usize, work: impl Fn(Range<usize>) + Sync) {
    /// Pieces per thread, where there are items enough.
    const PIECES: usize = 4;
    let grain = grain.max(1);
    let threads = threads.min(items / grain).max(1);
    if threads == 1 {
        return work(0..items);
    }
    let piece = items.div_ceil(threads * PIECES).max(grain);
    let next = AtomicUsize::new(0);
    run(threads, |_, _| {
        loop {
            let start = next.fetch_add(piece, Ordering::Relaxed);
            if start >= items {
                return;
            }
            work(start..items.min(start + piece));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once_whatever_the_threads() {
        // Whoever links libtorch has its OpenMP; our own machines do.
        #[cfg(target_os = "linux")]
        assert!(available());
        for threads in [0, 1, 2, 5] {
            for (items, grain) in [(0, 1), (1, 1), (7, 1), (1000, 3), (10, 100)] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                share(items, grain, threads, |range| {
                    for i in range {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn indices_are_those_of_the_team() {
        let seen: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
        let team = AtomicUsize::new(0);
        run(4, |index, of| {
            seen[index].fetch_add(1, Ordering::Relaxed);
            team.store(of, Ordering::Relaxed);
        });
        let team = team.into_inner();
        assert!((1..=4).contains(&team)); // 1 where the machine is busy
        for (index, count) in seen.into_iter().enumerate() {
            assert_eq!(count.into_inner(), usize::from(index < team));
        }
    }

    #[test]
    fn long_waits_are_not_repeated_and_are_forgiven() {
        let p = Patience {
            alone_until: AtomicU64::new(0),
            period: AtomicU64::new(Patience::SHORTEST),
        };
        p.learn(10_000, 50_000);
        assert!(!p.alone());
        // A part of the caller's own time: shares are uneven, nobody was away.
        p.learn(3_000_000, 16_000_000);
        assert!(!p.alone());
        p.learn(5_000_000, 50_000);
        assert!(p.alone());
        for _ in 0..20 {
            p.learn(5_000_000, 50_000);
        }
        assert_eq!(p.period.load(Ordering::Relaxed), Patience::LONGEST);
        for _ in 0..1000 {
            p.learn(1000, 50_000);
        }
        assert_eq!(p.period.load(Ordering::Relaxed), Patience::SHORTEST);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        for _ in 0..3 {
            let caught = catch_unwind(|| run(2, |index, _| assert_ne!(index, 0, "on purpose")));
            assert!(caught.is_err());
        }
        let ran = AtomicUsize::new(0);
        run(2, |_, _| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert!(ran.into_inner() >= 1);
    }
}
