//! Penalties on tokens that occurred before.

/// Marks which of the ids `0..vocab` were met, one bit each.
struct Met(Vec<u64>);

impl Met {
    fn new(vocab: usize) -> Self {
        Self(vec![0; vocab.div_ceil(64)])
    }

    /// Whether `id` is met for the first time.
    fn first_time(&mut self, id: u32) -> bool {
        let bit = 1 << (id % 64);
        match self.0.get_mut(id as usize / 64) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }
}

/// Multiplies negative and divides other scores of `tokens` by `penalty`, once each.
pub(super) fn repetition(tokens: &[u32], scores: &mut [f32], penalty: f32) {
    let mut met = Met::new(scores.len());
    for &token in tokens {
        if met.first_time(token)
            && let Some(score) = scores.get_mut(token as usize)
        {
            *score = if *score < 0.0 {
                *score * penalty
            } else {
                *score / penalty
            };
        }
    }
}

pub(super) fn frequency_presence(
    generated: &[u32],
    scores: &mut [f32],
    frequency: f32,
    presence: f32,
) {
    let mut met = Met::new(scores.len());
    for &token in generated {
        if let Some(score) = scores.get_mut(token as usize) {
            *score -= frequency + if met.first_time(token) { presence } else { 0.0 };
        }
    }
}
