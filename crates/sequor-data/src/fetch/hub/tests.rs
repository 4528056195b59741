use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::Mutex;

use super::*;
use crate::fetch::progress::Silent;

#[test]
fn references_are_read_strictly() {
    let r = |text: &str| HubRef::parse(text);
    let plain = r("HuggingFaceTB/SmolLM2-135M").unwrap();
    assert_eq!(
        (plain.repo.as_str(), plain.revision.as_str()),
        ("HuggingFaceTB/SmolLM2-135M", "main")
    );
    let full = r("o/n/dir/x.gguf@refs/pr/1").unwrap();
    assert_eq!(
        (full.file.as_deref(), full.revision.as_str()),
        (Some("dir/x.gguf"), "refs/pr/1")
    );
    assert_eq!(full.to_string(), "hf:o/n/dir/x.gguf@refs/pr/1");
    for bad in [
        "", "name", "o/", "/n", "o/n@", "o/../n", "o/n/..", "o/n@../x", "o n/m", "o/n?x", "o/n#",
        "ö/n", "o//n", "o/n\n",
    ] {
        assert!(matches!(r(bad), Err(Error::Input(_))), "{bad}");
    }
    assert!(r(&format!("o/{}", "n".repeat(97))).is_err());
}

#[test]
fn endpoints() {
    assert_eq!(
        host_and_port("https://huggingface.co").as_deref(),
        Some("huggingface.co:443")
    );
    assert_eq!(
        host_and_port("http://mirror:8080/hf").as_deref(),
        Some("mirror:8080")
    );
    assert_eq!(host_and_port("http://[::1]:9").as_deref(), Some("[::1]:9"));
    for bad in ["", "huggingface.co", "ftp://x", "https://", "https://a b"] {
        assert_eq!(host_and_port(bad), None, "{bad}");
    }
}

#[test]
fn the_environment_is_read_as_the_python_client_does() {
    let of = |vars: &[(&str, &str)]| {
        let vars: Vec<(String, String)> = vars
            .iter()
            .map(|(a, b)| ((*a).into(), (*b).into()))
            .collect();
        Hub::from_vars(|name| vars.iter().find(|(a, _)| a == name).map(|(_, b)| b.into()))
    };
    assert_eq!(of(&[]).cache, None);
    assert_eq!(
        of(&[("HOME", "/h")]).cache.unwrap(),
        Path::new("/h/.cache/huggingface/hub")
    );
    assert_eq!(
        of(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")])
            .cache
            .unwrap(),
        Path::new("/x/huggingface/hub")
    );
    assert_eq!(
        of(&[("HOME", "/h"), ("HF_HOME", "/f")]).cache.unwrap(),
        Path::new("/f/hub")
    );
    assert_eq!(
        of(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f")])
            .cache
            .unwrap(),
        Path::new("/c")
    );
    assert_eq!(of(&[("HF_ENDPOINT", "http://m/")]).endpoint, "http://m");
}

fn sibling(name: &str) -> Sibling {
    Sibling {
        rfilename: name.into(),
        size: Some(1),
        lfs: None,
    }
}

#[test]
fn of_a_repository_only_the_model_is_taken() {
    let model = HubRef::parse("o/n").unwrap();
    let select = |names: &[&str]| {
        let info = Info {
            siblings: names.iter().map(|n| sibling(n)).collect(),
            tags: vec![],
        };
        info.select(&model).map(|v| {
            v.into_iter()
                .map(|s| s.rfilename.clone())
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(
        select(&[
            "model.safetensors",
            ".gitattributes",
            "tokenizer.json",
            "config.json",
            "onnx/model.onnx"
        ])
        .unwrap(),
        ["config.json", "tokenizer.json", "model.safetensors"]
    );
    assert_eq!(
        select(&[
            "config.json",
            INDEX,
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model-1-of-2.safetensors"
        ])
        .unwrap(),
        [
            "config.json",
            INDEX,
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors"
        ]
    );
    assert!(
        select(&["model.safetensors"])
            .unwrap_err()
            .to_string()
            .contains("no config.json")
    );
    let message = select(&["config.json", "a.Q4.gguf"])
        .unwrap_err()
        .to_string();
    assert!(message.contains("hf:o/n/a.Q4.gguf"), "{message}");
}

/// A hub on this machine: one repository `o/n`, answering as the real one does.
struct FakeHub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

const WEIGHT_BYTES: &[u8] = b"these are the weights";

impl FakeHub {
    /// `etag` is what the hub claims the weights' hash to be.
    fn start(etag: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut path, mut from, mut line) = (String::new(), 0, String::new());
                while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                    if let Some(rest) = line.strip_prefix("GET ") {
                        path = rest.split(' ').next().unwrap().to_owned();
                    }
                    if let Some(range) = line.to_lowercase().strip_prefix("range: bytes=") {
                        from = range.split('-').next().unwrap().parse().unwrap();
                        path += &format!(" {}", range.trim());
                    }
                    line.clear();
                }
                if path.is_empty() {
                    continue;
                }
                seen.lock().unwrap().push(path.clone());
                let body: Option<&[u8]> = match path.split([' ', '?']).next().unwrap() {
                    "/api/models/o/n/revision/main" => Some(
                        br#"{"tags":["license:mit"],"siblings":[{"rfilename":"config.json","size":2},
                            {"rfilename":"model.safetensors","size":21,"lfs":{"sha256":"ab"}}]}"#,
                    ),
                    "/o/n/resolve/main/config.json" => Some(b"{}"),
                    "/o/n/resolve/main/model.safetensors" => Some(WEIGHT_BYTES),
                    _ => None,
                };
                let tag = if path.contains("safetensors") {
                    etag.as_str()
                } else {
                    "c0nf"
                };
                let answer = match body {
                    None => {
                        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                            .to_vec()
                    }
                    Some(body) => {
                        let part = &body[from..];
                        let mut a = format!(
                            "HTTP/1.1 206 OK\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\nETag: \"{tag}\"\r\nX-Repo-Commit: c1\r\nConnection: close\r\n\r\n",
                            part.len(), body.len() - 1, body.len()
                        )
                        .into_bytes();
                        a.extend(part);
                        a
                    }
                };
                let _ = stream.write_all(&answer);
            }
        });
        Self { endpoint, requests }
    }

    /// Settings that lead to it. Proxies of the environment would not.
    fn hub(&self, cache: &Path) -> Option<Hub> {
        if Hub::from_env().proxy {
            println!("skipped: a proxy is set, and this test talks to this machine");
            return None;
        }
        Some(Hub {
            endpoint: self.endpoint.clone(),
            cache: Some(cache.to_owned()),
            ..Hub::from_vars(|_| None)
        })
    }
}

fn sha256(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    verify::hash_file(file.path()).unwrap().0
}

#[test]
fn a_model_is_fetched_found_again_and_an_interrupted_file_continued() {
    let tmp = tempfile::tempdir().unwrap();
    let hash = sha256(WEIGHT_BYTES);
    let server = FakeHub::start(hash.clone());
    let Some(hub) = server.hub(tmp.path()) else {
        return;
    };
    let model = HubRef::parse("o/n").unwrap();
    assert_eq!(hub.cached(&model), None);

    // What an interrupted attempt leaves behind.
    let blobs = tmp.path().join("models--o--n/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{hash}.part")), &WEIGHT_BYTES[..10]).unwrap();

    let folder = hub.fetch(&model, &Silent).unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        WEIGHT_BYTES
    );
    assert_eq!(hub.cached(&model), Some(folder.clone()));
    let requests = server.requests.lock().unwrap().clone();
    assert!(
        requests
            .iter()
            .any(|r| r.ends_with("model.safetensors 10-")),
        "continued: {requests:?}"
    );

    let one = HubRef {
        file: Some("config.json".into()),
        ..model
    };
    assert_eq!(
        hub.fetch(&one, &Silent).unwrap(),
        folder.join("config.json")
    );
}

#[test]
fn a_damaged_file_is_not_kept() {
    let tmp = tempfile::tempdir().unwrap();
    let server = FakeHub::start("ab".repeat(32));
    let Some(hub) = server.hub(tmp.path()) else {
        return;
    };
    let model = HubRef::parse("o/n").unwrap();
    assert!(matches!(
        hub.fetch(&model, &Silent),
        Err(Error::Hash { .. })
    ));
    assert_eq!(hub.cached(&model), None);
}

#[test]
fn refusals_are_told_apart() {
    let tmp = tempfile::tempdir().unwrap();
    let server = FakeHub::start("ab".repeat(32));
    let Some(hub) = server.hub(tmp.path()) else {
        return;
    };
    let message = |text: &str| {
        hub.fetch(&HubRef::parse(text).unwrap(), &Silent)
            .unwrap_err()
            .to_string()
    };
    assert!(
        message("o/other").contains("no such repository"),
        "{}",
        message("o/other")
    );
    assert!(message("o/n/absent.gguf").contains("holds no absent.gguf"));

    // A pinned file that the hub describes as another costs no download.
    let pin = Pinned {
        path: "x",
        sha256: HASH,
        bytes: 21,
    };
    let target = tmp.path().join("x");
    let model = HubRef::parse("o/n").unwrap();
    let error = hub
        .fetch_pinned(
            &model,
            "model.safetensors",
            &pin,
            &target,
            tmp.path(),
            &Silent,
        )
        .unwrap_err();
    assert!(matches!(error, Error::Hash { .. }), "{error:?}");
    assert!(
        !server
            .requests
            .lock()
            .unwrap()
            .iter()
            .any(|r| r.contains("resolve"))
    );
}

const HASH: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

#[test]
fn silence_and_refusal_end_soon() {
    let tmp = tempfile::tempdir().unwrap();
    // Accepts connections and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut hub = Hub {
        endpoint: format!("http://{}", listener.local_addr().unwrap()),
        cache: Some(tmp.path().to_owned()),
        stall: Duration::from_millis(200),
        ..Hub::from_vars(|_| None)
    };
    let model = HubRef::parse("o/n").unwrap();
    let start = Instant::now();
    assert!(matches!(
        hub.fetch(&model, &Silent),
        Err(Error::Network { .. })
    ));
    drop(listener);
    let message = hub.fetch(&model, &Silent).unwrap_err().to_string();
    assert!(
        message.contains("cannot be reached") && message.contains("SEQUOR_MODELS"),
        "{message}"
    );
    hub.endpoint = "nonsense".into();
    assert!(matches!(hub.fetch(&model, &Silent), Err(Error::Config(_))));
    assert!(start.elapsed() < Duration::from_secs(5));
}
