//! Measured memory read bandwidth: the limit of batch-1 decoding, where each token
//! reads every weight once.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::matmul::Region;

/// Larger than the last-level cache of most machines.
const MOST_PER_THREAD: usize = 128 << 20;
/// All threads together; shared out where there are many.
const MOST_IN_ALL: usize = 1 << 30;
const MOST_THREADS: usize = 512;

/// Reads memory with `threads` threads for about `budget` and returns the rate of
/// the best pass, in bytes per second. Uses 128 MiB per thread, 1 GiB in all at
/// most. At least one pass is made whatever the budget. 0 if there is no memory.
#[must_use]
pub fn measure_read(threads: usize, budget: Duration) -> f64 {
    let threads = threads.clamp(1, MOST_THREADS);
    let bytes = MOST_PER_THREAD.min(MOST_IN_ALL / threads) / 64 * 64;
    let start = Instant::now();
    // In large pages, as our packed weights: with small ones the look-ups of addresses limit.
    let buffers: Option<Vec<Region>> = (0..threads).map(|_| Region::new(bytes)).collect();
    let Some(mut buffers) = buffers else {
        return 0.0;
    };
    // Written by several threads, since the first touch of a page is slow.
    on_each(buffers.iter_mut().collect(), |buffer| buffer.fill(3));
    let mut best = 0f64;
    loop {
        let pass = Instant::now();
        // Counted, for a system may give fewer threads than asked for.
        let bytes_read = AtomicUsize::new(0);
        on_each(buffers.iter().collect(), |buffer| {
            black_box(sum(buffer));
            bytes_read.fetch_add(buffer.len(), Ordering::Relaxed);
        });
        let bytes_read = bytes_read.into_inner();
        best = best.max(bytes_read as f64 / pass.elapsed().as_secs_f64().max(1e-9));
        // Stop before a pass that would end after the budget.
        if start.elapsed() + pass.elapsed() > budget {
            return best;
        }
    }
}

/// Runs `work` on each item in a thread of its own, the last one in this.
fn on_each<T: Send>(mut items: Vec<T>, work: impl Fn(T) + Sync) {
    let mine = items.pop();
    thread::scope(|scope| {
        for item in items {
            // Without a thread the item is left out.
            let _handle = thread::Builder::new().spawn_scoped(scope, || work(item));
        }
        if let Some(item) = mine {
            work(item);
        }
    });
}

/// Wrapping sum of the whole words over independent lanes, so that only memory limits it.
fn sum(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 32];
    let (words, _) = bytes.as_chunks::<8>();
    let (chunks, rest) = words.as_chunks::<32>();
    for chunk in chunks {
        for (lane, &word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(u64::from_le_bytes(word));
        }
    }
    rest.iter()
        .map(|&word| u64::from_le_bytes(word))
        .chain(lanes)
        .fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_everything() {
        for n in [0, 1, 31, 32, 33, 100] {
            let bytes: Vec<u8> = (1..=n).flat_map(u64::to_le_bytes).collect();
            assert_eq!(sum(&bytes), n * (n + 1) / 2);
        }
        let bytes: Vec<u8> = [u64::MAX, 2].iter().flat_map(|n| n.to_le_bytes()).collect();
        assert_eq!(sum(&bytes), 1);
    }

    #[test]
    fn every_item_is_worked_on_once() {
        let mut items = [0; 5];
        on_each(items.iter_mut().collect(), |x| *x += 1);
        assert_eq!(items, [1; 5]);
    }

    #[test]
    fn measures_at_least_one_pass() {
        let rate = measure_read(0, Duration::ZERO);
        // From a very slow to an impossibly fast memory.
        assert!((1e7..1e13).contains(&rate), "{rate}");
    }
}
