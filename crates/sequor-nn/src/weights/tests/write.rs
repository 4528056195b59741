//! The safetensors writer, read back by this crate and by the reference crate.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::fixtures::{refused, values};
use crate::error::Error;
use crate::weights::{Safetensors, TensorSource, write_atomic, write_safetensors};

fn files(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    names
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn every_dtype_and_layout_comes_back() {
    let base = Tensor::arange(6, (Kind::Float, Device::Cpu)).reshape([2, 3]);
    let kinds = [
        Kind::Double,
        Kind::Float,
        Kind::Half,
        Kind::BFloat16,
        Kind::Int64,
        Kind::Int,
        Kind::Int16,
        Kind::Int8,
        Kind::Uint8,
        Kind::Bool,
    ];
    let mut tensors: Vec<(String, Tensor)> = kinds
        .iter()
        .map(|&k| (format!("{k:?}"), base.to_kind(k)))
        .collect();
    tensors.push(("transposed".to_owned(), base.tr()));
    tensors.push(("column".to_owned(), base.select(1, 1)));
    tensors.push((
        "expanded".to_owned(),
        base.select(1, 0).unsqueeze(1).expand([2, 4], false),
    ));
    tensors.push(("scalar".to_owned(), Tensor::from(2.5f32)));
    tensors.push((
        "empty".to_owned(),
        Tensor::zeros([0, 3], (Kind::Half, Device::Cpu)),
    ));
    tensors.push(("trained".to_owned(), base.copy().set_requires_grad(true)));
    let by_ref: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    write_safetensors(&path, &by_ref, &metadata).unwrap();
    assert_eq!(files(folder.path()), ["m.safetensors"]);

    let source = Safetensors::open(&path).unwrap();
    assert_eq!(source.metadata(), &metadata);
    let bytes = std::fs::read(&path).unwrap();
    let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(source.names().len(), tensors.len());
    assert_eq!(reference.names().len(), tensors.len());
    for (name, tensor) in &tensors {
        let back = source.load(name).unwrap();
        assert_eq!(back.kind(), tensor.kind(), "{name}");
        assert_eq!(values(&back), values(tensor), "{name}");
        let view = reference.tensor(name).unwrap();
        assert_eq!(view.shape().len(), tensor.dim(), "{name}");
        assert_eq!(
            view.data().len() as u64,
            source.info(name).unwrap().bytes,
            "{name}"
        );
        // Every tensor is aligned to its width.
        if !view.data().is_empty() {
            let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            assert_eq!(at % tensor.kind().elt_size_in_bytes(), 0, "{name}");
        }
    }
}

#[test]
fn what_safetensors_cannot_hold_is_refused_before_writing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let t = Tensor::ones([2], (Kind::Float, Device::Cpu));
    let none = BTreeMap::new();
    let write = |tensors: &[(&str, &Tensor)]| write_safetensors(&path, tensors, &none);
    refused(write(&[("a", &t), ("a", &t)]), &["'a' is given twice"]);
    refused(write(&[("__metadata__", &t)]), &["__metadata__"]);
    refused(write(&[("a\0", &t)]), &["cannot be the name"]);
    refused(
        write(&[("c", &t.to_kind(Kind::ComplexFloat))]),
        &["'c'", "ComplexFloat"],
    );
    let sparse = [
        t.to_sparse(None, None::<i64>, None),
        t.unsqueeze(0).to_sparse_csr(None),
        t.to_mkldnn(),
    ];
    for s in sparse {
        refused(write(&[("s", &s)]), &["'s'", "not dense"]);
    }
    assert!(write(&[("u", &Tensor::new())]).is_err());
    assert!(files(folder.path()).is_empty());

    write(&[]).unwrap();
    assert!(Safetensors::open(&path).unwrap().names().is_empty());
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    write_atomic(&path, |f| {
        f.write_all(b"old").map_err(|e| Error::io(&path, e))
    })
    .unwrap();
    let failed = write_atomic(&path, |f| {
        f.write_all(b"new and longer")
            .map_err(|e| Error::io(&path, e))?;
        Err(Error::Cancelled)
    });
    assert!(matches!(failed, Err(Error::Cancelled)));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(files(folder.path()), ["m"]);

    let absent = folder.path().join("absent").join("m");
    refused(write_atomic(&absent, |_| Ok(())), &["absent"]);
    refused(
        write_atomic(Path::new("/"), |_| Ok(())),
        &["not a file name"],
    );
    assert!(write_atomic(folder.path(), |_| Ok(())).is_err());
}

#[test]
fn replacing_a_file_does_not_disturb_its_readers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let none = BTreeMap::new();
    let large = Tensor::ones([100_000], (Kind::Float, Device::Cpu));
    write_safetensors(&path, &[("w", &large)], &none).unwrap();
    let reader = Safetensors::open(&path).unwrap();
    write_safetensors(&path, &[("w", &large.narrow(0, 0, 1))], &none).unwrap();
    assert!(reader.load("w").unwrap().equal(&large));
    assert_eq!(
        Safetensors::open(&path).unwrap().load("w").unwrap().size(),
        [1]
    );
}
