//! Memory for packed matrices: large pages shared by many of them.
//!
//! A model reads all of its weights for each token, far more than the processor can keep
//! addresses of in pages of 4 KB: each page then costs a look-up about as long as a tenth of
//! reading it. Matrices of a megabyte are too small for large pages of their own, so they
//! stand side by side in blocks that are not.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

use memmap2::MmapRaw;

/// Bytes of a block; a multiple of the large pages of common systems.
const BLOCK: usize = 32 << 20;

/// Where regions begin: cache lines.
const ALIGN: usize = 64;

/// Bytes of zeros at first, of which this value alone may use its part of a block.
pub(crate) struct Region {
    block: Arc<MmapRaw>,
    start: usize,
    length: usize,
}

impl Region {
    /// `length` zeros; `None` when there is no memory.
    pub fn new(length: usize) -> Option<Self> {
        /// The block that is being filled, and how far.
        static OPEN: Mutex<Option<(Arc<MmapRaw>, usize)>> = Mutex::new(None);
        if length > BLOCK / 4 {
            let block = map(length)?;
            return Some(Self {
                block,
                start: 0,
                length,
            });
        }
        let mut open = OPEN.lock().unwrap_or_else(|e| e.into_inner());
        let (block, used) = match open.take() {
            Some((block, used)) if used + length <= BLOCK => (block, used),
            // What is left of a block is given up; it goes with the matrices in it.
            _ => (map(BLOCK)?, 0),
        };
        let end = (used + length).next_multiple_of(ALIGN);
        *open = Some((block.clone(), end));
        Some(Self {
            block,
            start: used,
            length,
        })
    }
}

fn map(length: usize) -> Option<Arc<MmapRaw>> {
    let map = MmapRaw::from(memmap2::MmapMut::map_anon(length.max(1)).ok()?);
    #[cfg(target_os = "linux")]
    let _may_be_refused = map.advise(memmap2::Advice::HugePage);
    Some(Arc::new(map))
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the part lies inside the block, which lives as long as this value; its bytes
        // are initialised (zeros of the system, or written since); no other region overlaps it,
        // for parts are given out once, so that only `deref_mut` of this value writes here.
        unsafe { std::slice::from_raw_parts(self.block.as_ptr().add(self.start), self.length) }
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this value is borrowed mutably. The memory is writable: it was
        // mapped as such.
        unsafe {
            std::slice::from_raw_parts_mut(self.block.as_mut_ptr().add(self.start), self.length)
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} bytes)", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zero_aligned_and_apart() {
        let sizes = [
            0,
            1,
            63,
            64,
            65,
            1 << 20,
            5 << 20,
            BLOCK / 4,
            BLOCK / 4 + 1,
            BLOCK + 7,
        ];
        let mut regions: Vec<Region> = (0..3)
            .flat_map(|_| sizes)
            .map(|n| Region::new(n).unwrap())
            .collect();
        for (i, r) in regions.iter_mut().enumerate() {
            assert_eq!(r.len(), sizes[i % sizes.len()]);
            assert_eq!(r.as_ptr().addr() % ALIGN, 0);
            assert!(r.iter().all(|&b| b == 0));
            r.fill(i as u8 + 1);
        }
        for (i, r) in regions.iter().enumerate() {
            assert!(r.iter().all(|&b| b == i as u8 + 1));
        }
        // From several threads, and what outlives its neighbours.
        let kept = regions.swap_remove(4);
        drop(regions);
        let others: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(|| {
                    (0..50)
                        .map(|_| Region::new(1000).unwrap())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        for other in others {
            for mut r in other.join().unwrap() {
                assert!(r.iter().all(|&b| b == 0));
                r.fill(9);
            }
        }
        assert!(kept.iter().all(|&b| b == kept[0] && b != 9));
        assert!(Region::new(usize::MAX / 2).is_none());
    }
}
