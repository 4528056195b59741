use std::sync::Mutex;

use super::*;
use crate::catalog::{Client, Origin, Pinned};
use crate::fetch::verify::hash_file;

/// A resolver over one temporary folder.
fn in_dir(dir: &Path) -> Resolver {
    Resolver::empty(Some(Cache::at(dir.join("cache"))))
}

fn model_at(dir: &Path) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), "{}").unwrap();
    dir.to_owned()
}

#[test]
fn paths_come_first_then_named_folders_then_bundled_ones_then_the_cache() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let mut r = in_dir(root);
    r.extra_dirs = vec![root.join("extra")];
    r.model_dirs = vec![root.join("env1"), root.join("env2")];
    fs::create_dir_all(root.join("work/deep/inside")).unwrap();
    fs::create_dir_all(root.join("work/models")).unwrap();
    assert!(
        models_beside(&root.join("work/deep/inside"), 1).is_empty(),
        "no checkout, too high up"
    );
    fs::write(root.join("work/Cargo.lock"), "").unwrap();
    r.bundled_dirs = models_beside(&root.join("work/deep/inside"), 0);
    assert_eq!(r.bundled_dirs, [root.join("work/models")]);

    let cached = model_at(&root.join("cache/models/smollm2"));
    assert!(
        matches!(r.resolve_model("smollm2"), Err(Error::Offline { .. })),
        "sizes are checked in the cache"
    );
    let gguf = cached.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let size = catalog::find(Kind::Model, "smollm2").unwrap().size_bytes();
    fs::File::create(&gguf).unwrap().set_len(size).unwrap();
    let got = r.resolve_model("smollm2").unwrap();
    assert_eq!((got.path, got.origin), (gguf, Found::Cache));

    let bundled = model_at(&root.join("work/models/smollm2"));
    let got = r.resolve_model("smollm2").unwrap();
    assert_eq!(
        (got.path, got.origin),
        (bundled, Found::Bundled(root.join("work/models")))
    );
    let env = model_at(&root.join("env2/smollm2"));
    assert_eq!(r.resolve_model("smollm2").unwrap().path, env);
    let extra = model_at(&root.join("extra/smollm2"));
    assert_eq!(r.resolve_model("smollm2").unwrap().path, extra);
    let path = extra.to_str().unwrap();
    assert_eq!(r.resolve_model(path).unwrap().origin, Found::Path);
}

#[test]
fn a_folder_with_one_gguf_file_is_that_file() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("models/small");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("w.gguf"), "x").unwrap();
    fs::write(
        dir.join("README.md"),
        "---\nlicense: mit\n---\n# Small\n\nA small model.\n",
    )
    .unwrap();
    let mut r = in_dir(tmp.path());
    r.bundled_dirs = models_beside(tmp.path(), 0);
    assert_eq!(r.resolve_model("small").unwrap().path, dir.join("w.gguf"));
    let listed = r.list(Kind::Model);
    let names: Vec<_> = listed.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["small", "smollm2"]);
    assert_eq!(listed[0].description, "A small model.");
    assert_eq!(listed[0].licence.as_deref(), Some("mit"));
    assert_eq!(listed[1].path, None);
    // Two of them are not one model.
    fs::write(dir.join("v.gguf"), "x").unwrap();
    assert!(matches!(
        r.resolve_model("small"),
        Err(Error::UnknownName { .. })
    ));
}

#[test]
fn unknown_names_get_the_nearest_and_paths_get_plain_words() {
    let tmp = tempfile::tempdir().unwrap();
    let r = in_dir(tmp.path());
    let message = |name: &str| r.resolve_model(name).unwrap_err().to_string();
    assert!(
        message("smolm2").contains("did you mean 'smollm2'?"),
        "{}",
        message("smolm2")
    );
    assert!(message("SmolLM").contains("smollm2"));
    let far = message("zzzzzzzzzzz");
    assert!(
        far.contains("sequor models list") && !far.contains("smollm2"),
        "{far}"
    );
    assert!(message("./nowhere").contains("no file or folder './nowhere'"));
    assert!(
        message("org/model").contains("write hf:org/model"),
        "{}",
        message("org/model")
    );
    assert!(message("").contains("empty"));
    assert!(message("hf:nothing").contains("hf:owner/name"));
    assert!(message("a\0b").contains("a\0b"));
    assert!(message(&"x".repeat(100_000)).len() < 200_000);
    let message = r.resolve_data("bible").unwrap_err().to_string();
    assert!(
        message.contains("bible-web") && message.contains("sequor data list"),
        "{message}"
    );
}

#[test]
fn offline_says_how_to_fetch() {
    let tmp = tempfile::tempdir().unwrap();
    let r = in_dir(tmp.path());
    let message = r.resolve_data("fashion-mnist").unwrap_err().to_string();
    assert!(
        message.contains("sequor data fetch fashion-mnist") && message.contains("30.9 MB"),
        "{message}"
    );
    let message = r.resolve_model("hf:a/b").unwrap_err().to_string();
    assert!(message.contains("sequor models fetch hf:a/b"), "{message}");
}

#[cfg(unix)]
#[test]
fn odd_files_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let r = in_dir(tmp.path());
    let looped = tmp.path().join("loop");
    std::os::unix::fs::symlink(&looped, &looped).unwrap();
    assert!(r.resolve_model(looped.to_str().unwrap()).is_err());
    let socket = tmp.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(
        r.resolve_model(socket.to_str().unwrap())
            .unwrap_err()
            .to_string()
            .contains("neither")
    );
}

#[test]
fn edit_distances() {
    for (a, b, d) in [
        ("", "", 0),
        ("", "ab", 2),
        ("kitten", "sitting", 3),
        ("same", "same", 0),
        ("é", "e", 1),
    ] {
        assert_eq!(edit_distance(a, b), d, "{a} {b}");
        assert_eq!(edit_distance(b, a), d, "{b} {a}");
    }
}

/// Collects notices.
#[derive(Default)]
struct Notices(Mutex<Vec<String>>);

impl Progress for Notices {
    fn notice(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
}

/// A client that "downloads" by writing a wheel made beforehand.
#[cfg(unix)]
fn fake_pip(dir: &Path, member: &str, text: &str) -> OsString {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    let wheel = dir.join("made.whl");
    let mut zip = zip::ZipWriter::new(fs::File::create(&wheel).unwrap());
    zip.start_file(member, zip::write::SimpleFileOptions::default())
        .unwrap();
    zip.write_all(text.as_bytes()).unwrap();
    zip.finish().unwrap();
    let program = dir.join("fake-pip");
    fs::write(
        &program,
        format!(
            "#!/bin/sh\ncp '{}' pkg-1-py3-none-any.whl\n",
            wheel.display()
        ),
    )
    .unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program.into()
}

const HELLO_SHA256: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

const HELLO: Entry = Entry {
    name: "hello",
    kind: Kind::Model,
    description: "five letters",
    licence: "CC0-1.0",
    attribution: "",
    homepage: "",
    files: &[Pinned {
        path: "hello.gguf",
        sha256: HELLO_SHA256,
        bytes: 5,
    }],
    origins: &[
        Origin::Hub {
            repo: "nobody/nothing",
            revision: "main",
            members: &["hello.gguf"],
        },
        Origin::Package {
            client: Client::Pip,
            package: "pkg",
            version: "1",
            download_bytes: 1,
            members: &["in/hello"],
        },
    ],
};

#[cfg(unix)]
#[test]
fn a_fetch_falls_back_checks_the_hash_and_tells_the_licence_first() {
    let tmp = tempfile::tempdir().unwrap();
    let notices = Arc::new(Notices::default());
    let mut r = in_dir(tmp.path()).offline(false).progress(notices.clone());
    // Port 1 of this machine: refused at once.
    r.hub.endpoint = "http://127.0.0.1:1".into();
    r.hub.proxy = false;

    r.clients.python = fake_pip(tmp.path(), "in/hello", "jello");
    let error = r.fetch_entry(&HELLO).unwrap_err();
    let Error::AllOriginsFailed { attempts, .. } = &error else {
        panic!("{error}")
    };
    assert!(matches!(&attempts[0], Error::Network { .. }), "{error}");
    assert!(
        matches!(&attempts[1], Error::Hash { found_bytes: 5, .. }),
        "{error}"
    );
    assert!(!tmp.path().join("cache/models/hello").exists());
    assert_eq!(
        fs::read_dir(tmp.path().join("cache/models"))
            .unwrap()
            .count(),
        1,
        "only the lock file"
    );

    r.clients.python = fake_pip(tmp.path(), "in/hello", "hello");
    let got = r.fetch_entry(&HELLO).unwrap();
    assert_eq!(got.path, tmp.path().join("cache/models/hello/hello.gguf"));
    assert_eq!(got.origin, Found::Fetched("the pip package pkg 1".into()));
    assert_eq!(hash_file(&got.path).unwrap(), (HELLO_SHA256.to_owned(), 5));
    assert_eq!(r.fetch_entry(&HELLO).unwrap().origin, Found::Cache);

    let said = notices.0.lock().unwrap();
    assert!(said[0].contains("Licence: CC0-1.0"), "{said:?}");
    assert!(said[1].contains("trying the pip package pkg 1"), "{said:?}");
}
