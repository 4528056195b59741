//! A reader for the pickles that `torch.save` writes for state dicts.
//!
//! A pickle is a program for a stack machine, and Python's own machine may call
//! anything it can import. This one knows the opcodes of protocols 2 to 5 that
//! plain containers, numbers, texts and tensors need, and a fixed list of
//! globals; it builds descriptions and never calls anything. Whatever else
//! occurs is refused by name.
//!
//! Values live in an arena and refer to each other by index, so that a value
//! used many times is kept once and a value inside itself does no harm.

use std::collections::HashMap;
use std::path::Path;

use super::source::SourceDtype;
use crate::error::{Error, Result};

/// Index of a value in a [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(u32);

/// A pickled value.
#[derive(Debug)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Box<str>),
    /// Bytes, integers beyond 64 bits, devices: kept only as "something".
    Opaque,
    /// A tuple or a list.
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Box<Storage>),
    Tensor(Box<View>),
}

/// The importable names that are understood.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    Size,
    Device,
    RebuildTensor,
    RebuildTensorV3,
    RebuildParameter,
    RebuildFromType,
    /// A tensor class; says nothing that matters here.
    TensorType,
    /// A storage class with its element type; `None` for untyped bytes.
    StorageType(Option<SourceDtype>),
    Dtype(SourceDtype),
}

/// A run of memory in the archive, `data/{key}`.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    pub key: Box<str>,
    /// `None` for untyped bytes.
    pub dtype: Option<SourceDtype>,
    /// Number of elements, bytes when untyped.
    pub len: u64,
}

/// A tensor: a strided view of a storage, in elements.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub storage: Storage,
    pub dtype: SourceDtype,
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

/// All values of a pickle and the one it is about.
#[derive(Debug)]
pub(super) struct Pickle {
    values: Vec<Value>,
    pub root: Id,
}

impl Pickle {
    pub(super) fn get(&self, id: Id) -> &Value {
        // Ids are handed out by `Machine::push` alone and values never removed.
        &self.values[id.0 as usize]
    }
}

/// Values and memo entries of one pickle; a state dict takes about twenty of
/// each per tensor.
const MAX_VALUES: usize = 4_000_000;
/// References to values in containers and on the stack, and dimensions.
const MAX_REFERENCES: usize = 32_000_000;
/// Arguments of a call; tensors have seven or eight.
const MAX_ARGUMENTS: usize = 16;
/// Dimensions of a tensor; libtorch has the same bound for strided views.
const MAX_RANK: usize = 64;
/// Bytes of a storage key; `torch.save` writes decimal numbers.
const MAX_KEY_BYTES: usize = 64;

/// Runs a pickle program.
pub(super) fn read(path: &Path, program: &[u8]) -> Result<Pickle> {
    let mut machine = Machine {
        path,
        rest: program,
        len: program.len(),
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        references: 0,
    };
    let root = machine.run()?;
    Ok(Pickle {
        values: machine.values,
        root,
    })
}

struct Machine<'a> {
    path: &'a Path,
    rest: &'a [u8],
    len: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Stack heights at each MARK.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// How often a value was put on the stack or copied into a container, and how
    /// many dimensions were copied into tensors.
    references: usize,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id> {
        if !self.rest.starts_with(&[0x80]) {
            return Err(self.refuse("a pickle of protocol 0 or 1"));
        }
        loop {
            let at = self.len - self.rest.len();
            let [opcode] = self.array()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let [protocol] = self.array()?;
                    if !(2..=5).contains(&protocol) {
                        return Err(self.refuse(&format!("pickle protocol {protocol}")));
                    }
                }
                // FRAME only announces how much follows.
                0x95 => {
                    self.array::<8>()?;
                }

                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'J' => {
                    let n = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(n.into()))?;
                }
                b'K' => {
                    let [n] = self.array()?;
                    self.push(Value::Int(n.into()))?;
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(n.into()))?;
                }
                0x8a => {
                    let [n] = self.array()?;
                    let bytes = self.take(n.into())?;
                    self.push(long(bytes))?;
                }
                b'G' => {
                    let x = f64::from_be_bytes(self.array()?);
                    self.push(Value::Float(x))?;
                }

                b'X' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.push_text(n.into())?;
                }
                0x8c => {
                    let [n] = self.array()?;
                    self.push_text(n.into())?;
                }
                0x8d => {
                    let n = u64::from_le_bytes(self.array()?);
                    self.push_text(n)?;
                }
                b'B' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.push_bytes(n.into())?;
                }
                b'C' => {
                    let [n] = self.array()?;
                    self.push_bytes(n.into())?;
                }
                0x8e => {
                    let n = u64::from_le_bytes(self.array()?);
                    self.push_bytes(n)?;
                }

                b'(' => {
                    self.check_room(self.marks.len(), MAX_VALUES)?;
                    self.marks.push(self.stack.len());
                }
                b'0' => {
                    self.pop()?;
                }
                b'1' => {
                    self.pop_mark()?;
                }
                b'2' => {
                    let top = self.top()?;
                    self.push_id(top)?;
                }

                b')' | b']' => self.push(Value::Sequence(Vec::new()))?,
                b't' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Sequence(items))?;
                }
                0x85..=0x87 => {
                    let items = self.pop_n(usize::from(opcode - 0x84))?;
                    self.push(Value::Sequence(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_mark()?;
                    self.append(items)?;
                }
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b's' => {
                    let items = self.pop_n(2)?;
                    self.set_items(&items)?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.set_items(&items)?;
                }

                b'q' => {
                    let [n] = self.array()?;
                    self.remember(n.into())?;
                }
                b'r' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.remember(n)?;
                }
                0x94 => {
                    let n = self.memo.len() as u32;
                    self.remember(n)?;
                }
                b'h' => {
                    let [n] = self.array()?;
                    self.recall(n.into())?;
                }
                b'j' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.recall(n)?;
                }

                b'c' => {
                    let module = self.line()?;
                    let name = self.line()?;
                    let global = self.global(module, name)?;
                    self.push(Value::Global(global))?;
                }
                0x93 => {
                    let names = self.pop_n(2)?;
                    let [Value::Text(module), Value::Text(name)] =
                        [self.value(names[0]), self.value(names[1])]
                    else {
                        return Err(self.bad("a global without a name"));
                    };
                    let global = self.global(module, name)?;
                    self.push(Value::Global(global))?;
                }
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                b'Q' => self.storage()?,

                other => {
                    let name = opcode_name(other);
                    return Err(self.refuse(&format!("opcode {other:#04x} ({name}) at byte {at}")));
                }
            }
        }
    }

    fn bad(&self, what: impl std::fmt::Display) -> Error {
        Error::weights(
            self.path,
            format!("{what} in data.pkl; the checkpoint is damaged, save or fetch it again"),
        )
    }

    fn refuse(&self, what: &str) -> Error {
        Error::Unsupported(format!(
            "{}: {what}; only state dicts (containers of tensors, numbers and texts) are read, and \
             nothing in a file is ever executed. Load it in Python, keep the tensors, and save \
             them with safetensors or torch.save(model.state_dict(), ..)",
            self.path.display()
        ))
    }

    fn check_room(&self, used: usize, max: usize) -> Result<()> {
        if used >= max {
            return Err(Error::Limits(format!(
                "{}: more than {max} values in data.pkl",
                self.path.display()
            )));
        }
        Ok(())
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let split = usize::try_from(n)
            .ok()
            .and_then(|n| self.rest.split_at_checked(n));
        let Some((taken, rest)) = split else {
            return Err(self.bad(format!("{n} bytes expected, {} left", self.rest.len())));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.rest.iter().position(|&b| b == b'\n');
        let line = self.take(end.ok_or_else(|| self.bad("an unfinished line"))? as u64)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| self.bad("a name that is not UTF-8"))
    }

    fn value(&self, id: Id) -> &Value {
        &self.values[id.0 as usize]
    }

    fn push(&mut self, value: Value) -> Result<()> {
        self.check_room(self.values.len(), MAX_VALUES)?;
        let id = Id(self.values.len() as u32);
        self.values.push(value);
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Result<()> {
        self.check_room(self.references, MAX_REFERENCES)?;
        self.references += 1;
        self.stack.push(id);
        Ok(())
    }

    fn push_text(&mut self, n: u64) -> Result<()> {
        let bytes = self.take(n)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.bad("a text that is not UTF-8"))?;
        self.push(Value::Text(text.into()))
    }

    fn push_bytes(&mut self, n: u64) -> Result<()> {
        self.take(n)?;
        self.push(Value::Opaque)
    }

    /// One tuple of sizes can serve many tensors, so the copies are counted.
    fn push_view(&mut self, view: View) -> Result<()> {
        self.references += view.shape.len() + view.strides.len();
        self.push(Value::Tensor(Box::new(view)))
    }

    /// The height below which the current MARK forbids to reach.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Id> {
        let above = self.stack.get(self.floor()..).and_then(<[Id]>::last);
        above.copied().ok_or_else(|| self.bad("an empty stack"))
    }

    fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_n(&mut self, n: usize) -> Result<Vec<Id>> {
        let at = self
            .stack
            .len()
            .checked_sub(n)
            .filter(|&at| at >= self.floor());
        at.map(|at| self.stack.split_off(at))
            .ok_or_else(|| self.bad("an empty stack"))
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(|| self.bad("a missing mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, items: Vec<Id>) -> Result<()> {
        let list = self.top()?;
        match &mut self.values[list.0 as usize] {
            Value::Sequence(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err(self.bad("appending to something that is not a list")),
        }
    }

    fn set_items(&mut self, items: &[Id]) -> Result<()> {
        let dict = self.top()?;
        let (pairs, rest) = items.as_chunks::<2>();
        match &mut self.values[dict.0 as usize] {
            Value::Dict(dict) if rest.is_empty() => {
                dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            _ => Err(self.bad("setting an item of something that is not a dict")),
        }
    }

    fn remember(&mut self, n: u32) -> Result<()> {
        self.check_room(self.memo.len(), MAX_VALUES)?;
        let top = self.top()?;
        self.memo.insert(n, top);
        Ok(())
    }

    fn recall(&mut self, n: u32) -> Result<()> {
        let id = *self
            .memo
            .get(&n)
            .ok_or_else(|| self.bad(format!("no memo {n}")))?;
        self.push_id(id)
    }

    /// The whole list of what a checkpoint may name.
    fn global(&self, module: &str, name: &str) -> Result<Global> {
        let known = match (module, name) {
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("torch", "Size") => Some(Global::Size),
            ("torch", "device") => Some(Global::Device),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => {
                Some(Global::RebuildTensor)
            }
            ("torch._utils", "_rebuild_tensor_v3") => Some(Global::RebuildTensorV3),
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                Some(Global::RebuildParameter)
            }
            ("torch._tensor", "_rebuild_from_type_v2") => Some(Global::RebuildFromType),
            ("torch", "Tensor") | ("torch.nn.parameter", "Parameter" | "Buffer") => {
                Some(Global::TensorType)
            }
            ("torch.storage", "UntypedStorage") => Some(Global::StorageType(None)),
            ("torch", name) => match name.strip_suffix("Storage") {
                Some(element) => {
                    storage_dtype(element).map(|dtype| Global::StorageType(Some(dtype)))
                }
                None => torch_dtype(name).map(Global::Dtype),
            },
            _ => None,
        };
        known.ok_or_else(|| self.refuse(&format!("the pickle asks for '{module}.{name}'")))
    }

    /// REDUCE: what a call of a known global with these arguments would make.
    fn reduce(&mut self) -> Result<()> {
        let two = self.pop_n(2)?;
        let Value::Global(global) = self.value(two[0]) else {
            return Err(self.refuse("a call of something that is not a known global"));
        };
        let global = global.clone();
        let args = match self.value(two[1]) {
            Value::Sequence(args) if args.len() <= MAX_ARGUMENTS => args.clone(),
            _ => return Err(self.bad("a call without a short tuple of arguments")),
        };
        match global {
            Global::OrderedDict => {
                let pairs = match args.as_slice() {
                    [] => Vec::new(),
                    [list] => self.pairs(*list)?,
                    _ => return Err(self.bad("an OrderedDict of several arguments")),
                };
                self.push(Value::Dict(pairs))
            }
            Global::Size => match args.as_slice() {
                [sizes] => self.push_id(*sizes),
                _ => Err(self.bad("a torch.Size without sizes")),
            },
            Global::Device => self.push(Value::Opaque),
            Global::RebuildTensor => {
                let view = self.view(&args, None)?;
                self.push_view(view)
            }
            Global::RebuildTensorV3 => {
                let dtype = match args.get(6).map(|&id| self.value(id)) {
                    Some(Value::Global(Global::Dtype(dtype))) => dtype.clone(),
                    _ => return Err(self.bad("a tensor without a dtype")),
                };
                let view = self.view(&args, Some(dtype))?;
                self.push_view(view)
            }
            Global::RebuildParameter => match args.first() {
                Some(&tensor) if matches!(self.value(tensor), Value::Tensor(_)) => {
                    self.push_id(tensor)
                }
                _ => Err(self.bad("a parameter without a tensor")),
            },
            Global::RebuildFromType => {
                // (function, class, its arguments, attributes): a tensor with
                // Python attributes, which are dropped.
                let [function, class, inner, _] = args.as_slice() else {
                    return Err(self.bad("a typed tensor with missing arguments"));
                };
                if !matches!(self.value(*class), Value::Global(Global::TensorType)) {
                    return Err(self.refuse("a tensor of a foreign class"));
                }
                let (function, inner) = (*function, *inner);
                if matches!(self.value(function), Value::Global(Global::RebuildFromType)) {
                    return Err(self.bad("a typed tensor inside a typed tensor"));
                }
                self.push_id(function)?;
                self.push_id(inner)?;
                self.reduce()
            }
            Global::TensorType | Global::StorageType(_) | Global::Dtype(_) => {
                Err(self.refuse("a call of a class that is not understood"))
            }
        }
    }

    /// A list of two-element sequences.
    fn pairs(&mut self, list: Id) -> Result<Vec<(Id, Id)>> {
        if let Value::Sequence(list) = self.value(list) {
            self.references += list.len();
            self.check_room(self.references, MAX_REFERENCES)?;
        }
        let bad = || self.bad("an OrderedDict that is not made of pairs");
        let Value::Sequence(list) = self.value(list) else {
            return Err(bad());
        };
        list.iter()
            .map(|&pair| match self.value(pair) {
                Value::Sequence(pair) => match pair.as_slice() {
                    &[key, value] => Ok((key, value)),
                    _ => Err(bad()),
                },
                _ => Err(bad()),
            })
            .collect()
    }

    /// `(storage, offset, sizes, strides, requires_grad, hooks, metadata)`, or
    /// with `dtype` given `(.., hooks, dtype, metadata)`.
    fn view(&self, args: &[Id], dtype: Option<SourceDtype>) -> Result<View> {
        let [storage, offset, shape, strides, rest @ ..] = args else {
            return Err(self.bad("a tensor with missing arguments"));
        };
        let Value::Storage(storage) = self.value(*storage) else {
            return Err(self.bad("a tensor without a storage"));
        };
        // Marks such as a pending conjugation change what the bytes mean.
        let marks = rest
            .get(if dtype.is_some() { 3 } else { 2 })
            .map(|&id| self.value(id));
        if let Some(Value::Dict(marks)) = marks
            && !marks.is_empty()
        {
            return Err(self.refuse("a tensor with a pending conjugation or negation"));
        }
        let dtype = dtype.or_else(|| storage.dtype.clone());
        Ok(View {
            storage: (**storage).clone(),
            dtype: dtype.ok_or_else(|| self.bad("an untyped tensor"))?,
            offset: self.natural(*offset)?,
            shape: self.naturals(*shape)?,
            strides: self.naturals(*strides)?,
        })
    }

    fn natural(&self, id: Id) -> Result<u64> {
        match self.value(id) {
            Value::Int(n) => u64::try_from(*n).map_err(|_| self.bad(format!("the size {n}"))),
            _ => Err(self.bad("a size that is not a whole number")),
        }
    }

    fn naturals(&self, id: Id) -> Result<Vec<u64>> {
        match self.value(id) {
            Value::Sequence(items) if items.len() <= MAX_RANK => {
                items.iter().map(|&id| self.natural(id)).collect()
            }
            _ => Err(self.bad(format!("sizes that are not a tuple of at most {MAX_RANK}"))),
        }
    }

    /// BUILD: Python attributes of an object. State dicts carry module versions
    /// in this way; nothing here needs them.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.value(self.top()?) {
            Value::Dict(_) | Value::Tensor(_) => Ok(()),
            _ => Err(self.refuse("an object with attributes")),
        }
    }

    /// BINPERSID: `('storage', class, key, device, length)`.
    fn storage(&mut self) -> Result<()> {
        let id = self.pop()?;
        let Value::Sequence(parts) = self.value(id) else {
            return Err(self.bad("a storage without a description"));
        };
        let &[tag, class, key, _, len] = parts.as_slice() else {
            return Err(self.bad("a storage with an unknown description"));
        };
        let (Value::Text(tag), Value::Global(Global::StorageType(dtype)), Value::Text(key)) =
            (self.value(tag), self.value(class), self.value(key))
        else {
            return Err(self.bad("a storage with an unknown description"));
        };
        if &**tag != "storage" {
            return Err(self.refuse("a persistent object that is not a storage"));
        }
        if key.len() > MAX_KEY_BYTES {
            return Err(self.bad(format!("a storage key of {} bytes", key.len())));
        }
        let storage = Storage {
            key: key.clone(),
            dtype: dtype.clone(),
            len: self.natural(len)?,
        };
        self.push(Value::Storage(Box::new(storage)))
    }
}

/// A little-endian two's complement integer of any length.
fn long(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Opaque;
    }
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut wide = [if negative { 0xFF } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(wide))
}

/// The element type of `torch.{element}Storage`.
fn storage_dtype(element: &str) -> Option<SourceDtype> {
    Some(match element {
        "Double" => SourceDtype::F64,
        "Float" => SourceDtype::F32,
        "Half" => SourceDtype::F16,
        "BFloat16" => SourceDtype::BF16,
        "Long" => SourceDtype::I64,
        "Int" => SourceDtype::I32,
        "Short" => SourceDtype::I16,
        "Char" => SourceDtype::I8,
        "Byte" => SourceDtype::U8,
        "Bool" => SourceDtype::Bool,
        "ComplexFloat" | "ComplexDouble" => SourceDtype::Other(element.into()),
        _ => return None,
    })
}

/// The element type of `torch.{name}`.
fn torch_dtype(name: &str) -> Option<SourceDtype> {
    Some(match name {
        "float64" => SourceDtype::F64,
        "float32" => SourceDtype::F32,
        "float16" => SourceDtype::F16,
        "bfloat16" => SourceDtype::BF16,
        "int64" => SourceDtype::I64,
        "int32" => SourceDtype::I32,
        "int16" => SourceDtype::I16,
        "int8" => SourceDtype::I8,
        "uint8" => SourceDtype::U8,
        "bool" => SourceDtype::Bool,
        "uint16" | "uint32" | "uint64" | "complex64" | "complex128" | "float8_e4m3fn"
        | "float8_e5m2" | "float8_e4m3fnuz" | "float8_e5m2fnuz" | "float8_e8m0fnu" => {
            SourceDtype::Other(name.into())
        }
        _ => return None,
    })
}

/// Names of the opcodes that are refused, for messages.
fn opcode_name(opcode: u8) -> &'static str {
    match opcode {
        b'F' => "FLOAT",
        b'I' => "INT",
        b'L' => "LONG",
        b'P' => "PERSID",
        b'S' => "STRING",
        b'T' => "BINSTRING",
        b'U' => "SHORT_BINSTRING",
        b'V' => "UNICODE",
        b'd' => "DICT",
        b'g' => "GET",
        b'i' => "INST",
        b'l' => "LIST",
        b'o' => "OBJ",
        b'p' => "PUT",
        0x81 => "NEWOBJ",
        0x82 => "EXT1",
        0x83 => "EXT2",
        0x84 => "EXT4",
        0x8b => "LONG4",
        0x8f => "EMPTY_SET",
        0x90 => "ADDITEMS",
        0x91 => "FROZENSET",
        0x92 => "NEWOBJ_EX",
        0x96 => "BYTEARRAY8",
        0x97 => "NEXT_BUFFER",
        0x98 => "READONLY_BUFFER",
        _ => "unknown",
    }
}
