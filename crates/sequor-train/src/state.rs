//! What a checkpoint says about its run besides tensors: `trainer.json`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::schedule::Schedule;

/// Version of the layout of checkpoints.
pub const FORMAT: u32 = 1;

/// Everything that decides how a run goes on, besides the tensors. Random numbers need
/// no entry: every draw is a function of the seed and the step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerState {
    /// Version of this layout.
    pub format: u32,
    /// Steps that are done, skipped ones included.
    pub step: u64,
    /// Updates the optimizer made.
    pub updates: u64,
    /// Targets (tokens) that were trained on.
    pub tokens: u64,
    /// Passes over the data, for a person to read.
    pub epoch: f64,
    /// Where the task stands in its data.
    pub cursor: Value,
    /// Seed of every random draw.
    pub seed: u64,
    /// Steps whose gradient was not finite.
    pub skipped: u64,
    /// How many of them came last in a row.
    pub skipped_in_a_row: u64,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub stale: u32,
    /// Sums since the last line of the log.
    pub window: Window,
    /// Wall time of training in seconds, over all sessions.
    pub seconds: f64,
    /// Threads the arithmetic was split over. Another number gives other last digits.
    pub threads: usize,
    /// The schedule of learning rates.
    pub schedule: Schedule,
    /// The run's settings; see [`config_hash`].
    pub config: Value,
    /// Identity of `config`.
    pub config_hash: String,
}

/// The best evaluation of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps that were done then.
    pub step: u64,
    /// Value of the metric.
    #[serde(with = "exact")]
    pub value: f64,
}

/// Sums over the steps since the last line of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Sum of the losses of all targets.
    #[serde(with = "exact")]
    pub loss: f64,
    /// Number of targets.
    pub targets: u64,
}

/// Numbers whose every bit counts are written as text: JSON readers may round.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(x: &f64, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(x)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

/// Identity of a run's settings: 64 bits of FNV-1a over their JSON with sorted keys.
pub fn config_hash(config: &Value) -> String {
    let text = canonical(config).to_string();
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, Value> =
                map.iter().map(|(k, v)| (k, canonical(v))).collect();
            Value::Object(sorted.into_iter().map(|(k, v)| (k.clone(), v)).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        other => other.clone(),
    }
}

/// The first setting that differs: its path, then both values.
pub fn first_difference(saved: &Value, now: &Value) -> Option<(String, String, String)> {
    fn walk(path: &str, a: &Value, b: &Value) -> Option<(String, String, String)> {
        if let (Value::Object(a), Value::Object(b)) = (a, b) {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            return keys.into_iter().find_map(|k| {
                let path = if path.is_empty() {
                    k.clone()
                } else {
                    format!("{path}.{k}")
                };
                walk(
                    &path,
                    a.get(k).unwrap_or(&Value::Null),
                    b.get(k).unwrap_or(&Value::Null),
                )
            });
        }
        let show = |v: &Value| {
            if v.is_null() {
                "absent".to_owned()
            } else {
                v.to_string()
            }
        };
        (a != b).then(|| (path.to_owned(), show(a), show(b)))
    }
    walk("", saved, now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_hash_ignores_order_and_sees_every_value() {
        let a: Value = serde_json::from_str(r#"{"a": 1, "b": {"c": [1, 2], "d": null}}"#).unwrap();
        let b: Value = serde_json::from_str(r#"{"b": {"d": null, "c": [1, 2]}, "a": 1}"#).unwrap();
        assert_eq!(config_hash(&a), config_hash(&b));
        assert_eq!(first_difference(&a, &b), None);
        let c = json!({"a": 1, "b": {"c": [2, 1]}});
        assert_ne!(config_hash(&a), config_hash(&c));
        assert_eq!(
            first_difference(&a, &c).unwrap(),
            ("b.c".into(), "[1,2]".into(), "[2,1]".into())
        );
        assert_eq!(first_difference(&a, &json!({"a": 1})).unwrap().2, "absent");
    }

    #[test]
    fn every_bit_of_a_sum_survives() {
        for loss in [0.1 + 0.2, 1e-310, 12345.678901234567, f64::MAX] {
            let text = serde_json::to_string(&Window { loss, targets: 3 }).unwrap();
            assert_eq!(
                serde_json::from_str::<Window>(&text)
                    .unwrap()
                    .loss
                    .to_bits(),
                loss.to_bits()
            );
        }
    }
}
