use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::fetch::progress::Silent;

const PACKAGE: Package = Package {
    client: Client::Pip,
    name: "pkg",
    version: "1",
    download_bytes: 100,
};
const PINS: [Pinned; 2] = [
    Pinned {
        path: "a.bin",
        sha256: "",
        bytes: 5,
    },
    Pinned {
        path: "pics/",
        sha256: "",
        bytes: 8,
    },
];
const MEMBERS: [&str; 2] = ["inside/a.bin", "inside/pics/"];

/// A program that does what the shell script says.
fn program(dir: &Path, script: &str) -> OsString {
    let path = dir.join("program");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.into()
}

fn zip_with(path: &Path, members: &[(&str, &str)]) {
    use std::io::Write;
    let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
    for (name, text) in members {
        zip.start_file(*name, zip::write::SimpleFileOptions::default())
            .unwrap();
        zip.write_all(text.as_bytes()).unwrap();
    }
    zip.finish().unwrap();
}

fn tgz_with(path: &Path, members: &[(&str, &str)]) {
    let gz =
        flate2::write::GzEncoder::new(File::create(path).unwrap(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gz);
    for (name, text) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        // Written past the checks of the library, as a forger would.
        let field = &mut header.as_gnu_mut().unwrap().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        tar.append(&header, text.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap();
}

const GOOD: [(&str, &str); 4] = [
    ("inside/a.bin", "12345"),
    ("inside/other", "x"),
    ("inside/pics/1.png", "abcd"),
    ("inside/pics/d/2.png", "efgh"),
];

fn wanted() -> Vec<(&'static str, &'static Pinned)> {
    MEMBERS.into_iter().zip(&PINS).collect()
}

#[test]
fn members_of_wheels_and_tarballs_land_where_they_are_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let (zip, tgz) = (dir.path().join("p.whl"), dir.path().join("p.tgz"));
    zip_with(&zip, &GOOD);
    tgz_with(&tgz, &GOOD);
    for (i, unpack) in [
        unzip as fn(&Path, &[(&str, &Pinned)], &Path) -> Result<()>,
        untar,
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(format!("out{i}"));
        unpack([&zip, &tgz][i], &wanted(), &out).unwrap();
        assert_eq!(
            verify::list_files(&out).unwrap(),
            ["a.bin", "pics/1.png", "pics/d/2.png"]
        );
        assert_eq!(fs::read(out.join("pics/d/2.png")).unwrap(), b"efgh");
    }
}

#[test]
fn hostile_archives_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let tgz = dir.path().join("p.tgz");
    for name in [
        "inside/pics/../../../escape",
        "inside/pics//etc/escape",
        "inside/pics/",
    ] {
        tgz_with(&tgz, &[("inside/a.bin", "1"), (name, "x")]);
        let message = untar(&tgz, &wanted(), &out).unwrap_err().to_string();
        assert!(message.contains("unsafe path"), "{name}: {message}");
    }
    assert!(!dir.path().join("escape").exists());

    // A member far larger than its pin is not written out in full.
    let big = "x".repeat(100_000);
    zip_with(&tgz, &[("inside/a.bin", &big), ("inside/pics/1", "y")]);
    unzip(&tgz, &wanted(), &out).unwrap();
    assert_eq!(out.join("a.bin").metadata().unwrap().len(), 6);

    zip_with(&tgz, &GOOD[..1]);
    assert!(
        unzip(&tgz, &wanted(), &out)
            .unwrap_err()
            .to_string()
            .contains("holds no 'inside/pics/'")
    );
}

#[test]
fn every_truncation_of_an_archive_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (zip, tgz, cut) = (
        dir.path().join("p.whl"),
        dir.path().join("p.tgz"),
        dir.path().join("cut"),
    );
    zip_with(&zip, &GOOD);
    tgz_with(&tgz, &GOOD);
    for (path, unpack) in [
        (
            &zip,
            unzip as fn(&Path, &[(&str, &Pinned)], &Path) -> Result<()>,
        ),
        (&tgz, untar),
    ] {
        let bytes = fs::read(path).unwrap();
        let full = verify::list_files(&{
            let out = dir.path().join("full");
            unpack(path, &wanted(), &out).unwrap();
            out
        })
        .unwrap();
        for n in 0..bytes.len() {
            // A new file: overwriting makes some file systems wait for the disk.
            let _ = fs::remove_file(&cut);
            fs::write(&cut, &bytes[..n]).unwrap();
            let out = dir.path().join("out");
            let _ = fs::remove_dir_all(&out);
            // A cut in the padding after the last member loses nothing.
            if unpack(&cut, &wanted(), &out).is_ok() {
                assert_eq!(verify::list_files(&out).unwrap(), full);
            }
        }
    }
}

#[test]
fn a_package_client_is_run_and_its_archive_unpacked() {
    let dir = tempfile::tempdir().unwrap();
    let made = dir.path().join("made.whl");
    zip_with(&made, &GOOD);
    let clients = Clients {
        python: program(
            dir.path(),
            &format!("cp '{}' pkg-1-py3-none-any.whl", made.display()),
        ),
        ..Clients::default()
    };
    let (files, work) = (dir.path().join("files"), dir.path().join("work"));
    clients
        .fetch(PACKAGE, &MEMBERS, &PINS, &files, &work, &Silent)
        .unwrap();
    assert_eq!(fs::read(files.join("a.bin")).unwrap(), b"12345");
}

#[test]
fn what_clients_say_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work");
    let fetch = |client, script: &str| {
        let p = program(dir.path(), script);
        let clients = Clients {
            python: p.clone(),
            npm: p.clone(),
            apt_get: p.clone(),
            dpkg: p,
            ..Clients::default()
        };
        let package = Package { client, ..PACKAGE };
        clients
            .fetch(
                package,
                &MEMBERS,
                &PINS,
                &dir.path().join("files"),
                &work,
                &Silent,
            )
            .unwrap_err()
    };
    let error = fetch(
        Client::Pip,
        "echo '/usr/bin/python3: No module named pip' >&2; exit 1",
    );
    assert!(
        matches!(error, Error::ClientMissing { .. }) && error.to_string().contains("python3-pip"),
        "{error}"
    );
    let error = fetch(
        Client::Apt,
        "echo 'E: Unable to locate package pkg' >&2; exit 100",
    );
    assert!(error.to_string().contains("sudo apt-get update"), "{error}");
    let error = fetch(Client::Npm, "echo 'npm error code E404'; exit 1");
    assert!(error.to_string().contains("does not have it"), "{error}");
    let error = fetch(
        Client::Pip,
        "echo 'ERROR: something odd'; echo later; exit 2",
    );
    assert!(error.to_string().contains("something odd"), "{error}");
    let error = fetch(
        Client::Pip,
        "echo 'OSError: [Errno 28] No space left on device'; exit 2",
    );
    assert!(matches!(error, Error::DiskFull { .. }));
    let error = fetch(Client::Pip, "exit 0");
    assert!(error.to_string().contains("left 0 files"), "{error}");
}

#[test]
fn a_missing_client_a_stalled_one_and_a_cancelled_one_end_at_once() {
    struct Stop;
    impl Progress for Stop {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work");
    let mut clients = Clients {
        python: dir.path().join("absent").into(),
        ..Clients::default()
    };
    let error = clients.download(PACKAGE, &work, &Silent).unwrap_err();
    assert!(matches!(error, Error::ClientMissing { .. }), "{error:?}");

    clients.python = program(dir.path(), "exec sleep 60");
    clients.stall = Duration::from_millis(100);
    let start = Instant::now();
    let error = clients.download(PACKAGE, &work, &Silent).unwrap_err();
    assert!(error.to_string().contains("nothing arrived"), "{error}");
    assert!(matches!(
        clients.download(PACKAGE, &work, &Stop),
        Err(Error::Cancelled)
    ));
    assert!(start.elapsed() < Duration::from_secs(10));
}
