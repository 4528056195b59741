//! Values of the template language.

use std::cmp::Ordering;
use std::rc::Rc;

use serde_json::Value as Json;

use super::budget::Budget;
use super::{Fault, Result};

/// Deepest nesting of lists and mappings.
const MAX_NESTING: u8 = 64;

/// A value. Cloning is cheap; nothing can be changed, so nothing is cyclic:
/// what can change, a namespace, is named by its number.
#[derive(Clone, Debug)]
pub(super) enum Value {
    /// What was not there, by name.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Rc<str>),
    List(Rc<List>),
    Map(Rc<Map>),
    Namespace(usize),
    /// Number of a macro.
    Macro(usize),
    Loop(Rc<Loop>),
}

/// A list (or tuple) and how deeply it is nested.
#[derive(Debug)]
pub(super) struct List {
    pub items: Vec<Value>,
    nesting: u8,
}

/// A mapping with its order and how deeply it is nested.
#[derive(Debug)]
pub(super) struct Map {
    pub entries: Vec<(Rc<str>, Value)>,
    nesting: u8,
}

/// The `loop` of a `for`.
#[derive(Debug)]
pub(super) struct Loop {
    pub index0: usize,
    pub length: usize,
    pub previous: Value,
    pub next: Value,
}

impl Map {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(k, _)| &**k == key).map(|(_, v)| v)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(text.into())
    }
}

impl Value {
    pub fn list(items: Vec<Value>, budget: &mut Budget) -> Result<Self> {
        budget.pay_list(items.len())?;
        let nesting = deeper(items.iter())?;
        Ok(Self::List(Rc::new(List { items, nesting })))
    }

    /// A mapping; of entries with the same key the last one counts.
    pub fn map(entries: Vec<(Rc<str>, Value)>, budget: &mut Budget) -> Result<Self> {
        budget.pay_list(2 * entries.len())?;
        let nesting = deeper(entries.iter().map(|(_, v)| v))?;
        let mut position = std::collections::HashMap::with_capacity(entries.len());
        let mut unique: Vec<(Rc<str>, Value)> = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            match position.get(&key).and_then(|&at: &usize| unique.get_mut(at)) {
                Some(entry) => entry.1 = value,
                None => {
                    position.insert(Rc::clone(&key), unique.len());
                    unique.push((key, value));
                }
            }
        }
        Ok(Self::Map(Rc::new(Map { entries: unique, nesting })))
    }

    pub fn int(n: usize) -> Self {
        Self::Int(i64::try_from(n).unwrap_or(i64::MAX))
    }

    pub fn from_json(json: Json, budget: &mut Budget) -> Result<Self> {
        budget.enter()?;
        let value = match json {
            Json::Null => Self::None,
            Json::Bool(b) => Self::Bool(b),
            Json::Number(n) => n.as_i64().map_or_else(|| Self::Float(n.as_f64().unwrap_or(f64::NAN)), Self::Int),
            Json::String(s) => s.into(),
            Json::Array(items) => {
                let items = items.into_iter().map(|v| Self::from_json(v, budget)).collect::<Result<Vec<_>>>()?;
                Self::list(items, budget)?
            }
            Json::Object(map) => {
                let entry = |(k, v): (String, Json)| Ok((Rc::from(k), Self::from_json(v, budget)?));
                let entries = map.into_iter().map(entry).collect::<Result<Vec<_>>>()?;
                Self::map(entries, budget)?
            }
        };
        budget.leave();
        Ok(value)
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(s) => Some(s),
            _ => None,
        }
    }

    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(n) => Some(*n),
            Self::Bool(b) => Some(i64::from(*b)),
            _ => None,
        }
    }

    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(x) => Some(*x),
            other => other.as_int().map(|n| n as f64),
        }
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    /// What `bool(value)` gives.
    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(b) => *b,
            Self::Int(n) => *n != 0,
            Self::Float(x) => *x != 0.0,
            Self::Str(s) => !s.is_empty(),
            Self::List(l) => !l.items.is_empty(),
            Self::Map(m) => !m.entries.is_empty(),
            Self::Namespace(_) | Self::Macro(_) | Self::Loop(_) => true,
        }
    }

    /// What the value is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "an undefined value",
            Self::None => "none",
            Self::Bool(_) => "a boolean",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Str(_) => "a string",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
            Self::Namespace(_) => "a namespace",
            Self::Macro(_) => "a macro",
            Self::Loop(_) => "a loop",
        }
    }

    /// The items that a `for` goes through: of a list, the keys of a mapping,
    /// the characters of a string, nothing of an undefined value.
    pub fn items(&self, budget: &mut Budget) -> Result<Vec<Value>> {
        match self {
            Self::Undefined(_) => Ok(Vec::new()),
            Self::List(list) => {
                budget.pay_list(list.items.len())?;
                Ok(list.items.clone())
            }
            Self::Map(map) => {
                budget.pay_list(map.entries.len())?;
                Ok(map.entries.iter().map(|(k, _)| Self::Str(Rc::clone(k))).collect())
            }
            Self::Str(text) => {
                // Every character becomes a string of its own.
                budget.pay(text.len() as u64)?;
                Ok(text.chars().map(|c| c.to_string().into()).collect())
            }
            other => Err(Fault::new(format!("{} has no items to go through", other.kind()))),
        }
    }

    /// What `len(value)` gives.
    pub fn length(&self, budget: &mut Budget) -> Result<usize> {
        match self {
            Self::Undefined(_) => Ok(0),
            Self::List(list) => Ok(list.items.len()),
            Self::Map(map) => Ok(map.entries.len()),
            Self::Str(text) => {
                budget.pay_string(text.len())?;
                Ok(text.chars().count())
            }
            other => Err(Fault::new(format!("{} has no length", other.kind()))),
        }
    }

    /// What `a == b` gives.
    pub fn equals(&self, other: &Self, budget: &mut Budget) -> Result<bool> {
        budget.enter()?;
        let equal = match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(a), Self::Str(b)) => {
                budget.pay_string(a.len().min(b.len()))?;
                a == b
            }
            (Self::List(a), Self::List(b)) => {
                let mut equal = a.items.len() == b.items.len();
                for (x, y) in a.items.iter().zip(&b.items) {
                    equal = equal && x.equals(y, budget)?;
                }
                equal
            }
            (Self::Map(a), Self::Map(b)) => {
                let mut equal = a.entries.len() == b.entries.len();
                for (key, x) in &a.entries {
                    budget.pay_list(b.entries.len())?;
                    equal = equal
                        && match b.get(key) {
                            Some(y) => x.equals(y, budget)?,
                            None => false,
                        };
                }
                equal
            }
            (Self::Namespace(a), Self::Namespace(b)) | (Self::Macro(a), Self::Macro(b)) => a == b,
            (a, b) => match (a.as_int(), b.as_int()) {
                (Some(x), Some(y)) => x == y,
                _ => a.as_float().is_some() && a.as_float() == b.as_float(),
            },
        };
        budget.leave();
        Ok(equal)
    }

    /// The order of two values, where they have one.
    pub fn compare(&self, other: &Self, budget: &mut Budget) -> Result<Ordering> {
        budget.pay(1)?;
        let order = match (self, other) {
            (Self::Str(a), Self::Str(b)) => {
                budget.pay_string(a.len().min(b.len()))?;
                Some(a.cmp(b))
            }
            (Self::List(a), Self::List(b)) => {
                budget.enter()?;
                let mut order = a.items.len().cmp(&b.items.len());
                for (x, y) in a.items.iter().zip(&b.items) {
                    let first = x.compare(y, budget)?;
                    if first.is_ne() {
                        order = first;
                        break;
                    }
                }
                budget.leave();
                Some(order)
            }
            (a, b) => match (a.as_int(), b.as_int()) {
                (Some(x), Some(y)) => Some(x.cmp(&y)),
                _ => a.as_float().zip(b.as_float()).and_then(|(x, y)| x.partial_cmp(&y)),
            },
        };
        order.ok_or_else(|| Fault::new(format!("{} and {} have no order", self.kind(), other.kind())))
    }

    /// What `item in self` gives.
    pub fn contains(&self, item: &Self, budget: &mut Budget) -> Result<bool> {
        match (self, item) {
            (Self::Undefined(_), _) => Ok(false),
            (Self::Str(text), Self::Str(part)) => {
                budget.pay_string(text.len())?;
                Ok(text.contains(&**part))
            }
            (Self::Map(map), Self::Str(key)) => {
                budget.pay_list(map.entries.len())?;
                Ok(map.get(key).is_some())
            }
            (Self::Map(_), _) => Ok(false),
            (Self::List(list), _) => {
                for candidate in &list.items {
                    if candidate.equals(item, budget)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            _ => Err(Fault::new(format!("{} cannot be in {}", item.kind(), self.kind()))),
        }
    }
}

/// The nesting of something that holds `items`.
fn deeper<'a>(items: impl Iterator<Item = &'a Value>) -> Result<u8> {
    let deepest = items
        .map(|v| match v {
            Value::List(l) => l.nesting,
            Value::Map(m) => m.nesting,
            _ => 0,
        })
        .max();
    match deepest.unwrap_or(0) {
        n if n < MAX_NESTING => Ok(n + 1),
        _ => Err(Fault::limit(format!("the chat template nests values more than {MAX_NESTING} levels deep"))),
    }
}
