//! Writers of small files, and checks shared by the tests.

use std::io::{Cursor, Write};

use tch::{Kind, Tensor};
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use crate::error::{Error, Result};

/// The message of an error that must be there.
pub fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(e) => e.to_string(),
    }
}

/// Asserts that a result is an error whose message contains every part.
#[track_caller]
pub fn refused<T>(result: Result<T>, parts: &[&str]) {
    let text = message(result);
    for part in parts {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

/// Asserts that a result is an [`Error::Limits`].
#[track_caller]
pub fn limited<T>(result: Result<T>) {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(Error::Limits(_)) => {}
        Err(other) => panic!("expected a limit, got {other}"),
    }
}

/// The elements as `f64`, and the shape.
pub fn values(t: &Tensor) -> (Vec<i64>, Vec<f64>) {
    let flat = t.to_kind(Kind::Double).reshape([-1]);
    (t.size(), Vec::try_from(flat).unwrap())
}

/// A safetensors file from a header and data, unchecked.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// Writes GGUF files, also wrong ones.
pub struct GgufWriter {
    pub version: u32,
    pub metadata: Vec<u8>,
    pub entries: u64,
    pub infos: Vec<u8>,
    pub tensors: u64,
    pub data: Vec<u8>,
    pub alignment: usize,
}

impl GgufWriter {
    pub fn new() -> Self {
        Self {
            version: 3,
            metadata: Vec::new(),
            entries: 0,
            infos: Vec::new(),
            tensors: 0,
            data: Vec::new(),
            alignment: 32,
        }
    }

    pub fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    /// A metadata entry of a raw type and value.
    pub fn entry(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Self {
        self.metadata.extend(Self::string(key));
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
        self.entries += 1;
        self
    }

    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.entry(key, 8, &Self::string(value))
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    pub fn texts(&mut self, key: &str, values: &[&str]) -> &mut Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|v| Self::string(v)));
        self.entry(key, 9, &bytes)
    }

    /// A table entry; `dims` innermost first, as in the file.
    pub fn info(&mut self, name: &str, dims: &[u64], dtype: u32, offset: u64) -> &mut Self {
        self.infos.extend(Self::string(name));
        self.infos.extend((dims.len() as u32).to_le_bytes());
        self.infos.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        self.infos.extend(dtype.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self.tensors += 1;
        self
    }

    /// A tensor with its data, aligned.
    pub fn tensor(&mut self, name: &str, dims: &[u64], dtype: u32, data: &[u8]) -> &mut Self {
        self.data
            .resize(self.data.len().next_multiple_of(self.alignment), 0);
        self.info(name, dims, dtype, self.data.len() as u64);
        self.data.extend(data);
        self
    }

    pub fn f32s(&mut self, name: &str, dims: &[u64], values: &[f32]) -> &mut Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, dims, 0, &bytes)
    }

    pub fn finish(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.tensors.to_le_bytes());
        file.extend(self.entries.to_le_bytes());
        file.extend(&self.metadata);
        file.extend(&self.infos);
        file.resize(file.len().next_multiple_of(self.alignment), 0);
        file.extend(&self.data);
        file
    }
}

/// A zip archive of stored members.
pub fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    archive_with(SimpleFileOptions::default(), members)
}

/// The same with further options.
pub fn archive_with(options: SimpleFileOptions, members: &[(&str, &[u8])]) -> Vec<u8> {
    let options = options.compression_method(CompressionMethod::Stored);
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in members {
        zip.start_file(*name, options).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A checkpoint archive of a pickle and storages `0`, `1`, ...
pub fn checkpoint(pickle: &[u8], storages: &[&[u8]]) -> Vec<u8> {
    let names: Vec<String> = (0..storages.len()).map(|i| format!("m/data/{i}")).collect();
    let mut members: Vec<(&str, &[u8])> = vec![("m/data.pkl", pickle), ("m/byteorder", b"little")];
    members.extend(
        names
            .iter()
            .map(String::as_str)
            .zip(storages.iter().copied()),
    );
    members.push(("m/version", b"3\n"));
    archive(&members)
}

/// Writes pickles, protocol 2.
pub mod pickle {
    /// A whole program around one value.
    pub fn program(value: &[u8]) -> Vec<u8> {
        [b"\x80\x02", value, b"."].concat()
    }

    pub fn text(value: &str) -> Vec<u8> {
        [
            b"X",
            (value.len() as u32).to_le_bytes().as_slice(),
            value.as_bytes(),
        ]
        .concat()
    }

    /// Any integer, as LONG1.
    pub fn int(value: i64) -> Vec<u8> {
        [b"\x8a\x08".as_slice(), &value.to_le_bytes()].concat()
    }

    pub fn global(module: &str, name: &str) -> Vec<u8> {
        format!("c{module}\n{name}\n").into_bytes()
    }

    pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
        [b"(".to_vec(), items.concat(), b"t".to_vec()].concat()
    }

    pub fn list(items: &[Vec<u8>]) -> Vec<u8> {
        [b"](".to_vec(), items.concat(), b"e".to_vec()].concat()
    }

    pub fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let items: Vec<u8> = items
            .iter()
            .flat_map(|(k, v)| [text(k), v.clone()].concat())
            .collect();
        [b"}(".to_vec(), items, b"u".to_vec()].concat()
    }

    pub fn call(global: Vec<u8>, args: &[Vec<u8>]) -> Vec<u8> {
        [global, tuple(args), b"R".to_vec()].concat()
    }

    pub fn ints(values: &[i64]) -> Vec<u8> {
        tuple(&values.iter().map(|&v| int(v)).collect::<Vec<_>>())
    }

    pub fn storage(class: &str, key: &str, len: i64) -> Vec<u8> {
        let parts = [
            text("storage"),
            global("torch", class),
            text(key),
            text("cpu"),
            int(len),
        ];
        [tuple(&parts), b"Q".to_vec()].concat()
    }

    /// A tensor of `storage` with `offset`, `shape` and `strides`.
    pub fn tensor(storage: Vec<u8>, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
        let hooks = call(global("collections", "OrderedDict"), &[]);
        let args = [
            storage,
            int(offset),
            ints(shape),
            ints(strides),
            b"\x89".to_vec(),
            hooks,
        ];
        call(global("torch._utils", "_rebuild_tensor_v2"), &args)
    }

    /// A contiguous float vector that fills storage `key`.
    pub fn floats(key: &str, len: i64) -> Vec<u8> {
        tensor(storage("FloatStorage", key, len), 0, &[len], &[1])
    }
}
