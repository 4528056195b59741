//! Opening the CUDA half of libtorch at run time.
//!
//! The binaries are linked to the CPU half only, so that they start on any
//! machine. On a machine with a GPU the other half is opened before the first use
//! of libtorch's CUDA, which then finds it. It must be of the same release (2.11).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The library that holds the CUDA kernels.
const LIBRARY: &str = if cfg!(windows) {
    "torch_cuda.dll"
} else if cfg!(target_os = "macos") {
    "libtorch_cuda.dylib"
} else {
    "libtorch_cuda.so"
};

/// Names a folder with [`find`]'s library, before all other places.
const VARIABLE: &str = "SEQUOR_TORCH_CUDA";

/// Why there is no CUDA.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The library is in none of the places.
    #[error(
        "there is no {LIBRARY} in {}: install PyTorch 2.11 with CUDA and set {VARIABLE} to its \
         torch/lib folder, or use the CPU",
        list(looked_in)
    )]
    NotFound {
        /// Where it was looked for.
        looked_in: Vec<PathBuf>,
    },
    /// The library is there but cannot be opened.
    #[error(
        "{} cannot be opened: {reason}: it must be of libtorch 2.11, with its CUDA libraries \
         beside it or on the library path",
        path.display()
    )]
    Open {
        /// The library.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
}

fn list(dirs: &[PathBuf]) -> String {
    if dirs.is_empty() {
        return "any known place".to_owned();
    }
    dirs.iter()
        .map(|dir| dir.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// The library in the first of `dirs` that has it.
#[must_use]
pub fn find(dirs: &[PathBuf]) -> Option<PathBuf> {
    candidates(dirs).next()
}

fn candidates(dirs: &[PathBuf]) -> impl Iterator<Item = PathBuf> {
    dirs.iter()
        .map(|dir| dir.join(LIBRARY))
        .filter(|file| file.is_file())
}

/// Opens the library from the first of `dirs` where that succeeds, and returns its
/// path. Call it before anything asks libtorch for CUDA. It stays open until the
/// end of the process; once it is open, further calls return the same path.
///
/// # Errors
///
/// It is in none of the folders, or the system can open none of those found; the
/// error is then about the first.
pub fn open(dirs: &[PathBuf]) -> Result<PathBuf, CudaError> {
    static OPENED: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = &*opened {
        return Ok(path.clone());
    }
    let mut first_error = None;
    for path in candidates(dirs) {
        match open_for_good(&path) {
            Ok(()) => return Ok(opened.insert(path).clone()),
            Err(e) => {
                let reason = e.to_string();
                first_error.get_or_insert(CudaError::Open { path, reason });
            }
        }
    }
    Err(first_error.unwrap_or_else(|| CudaError::NotFound {
        looked_in: dirs.to_vec(),
    }))
}

#[cfg(unix)]
fn open_for_good(path: &Path) -> Result<(), libloading::Error> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the initialisers that run are those of libtorch, which register the
    // CUDA kernels with the CPU half that is loaded already and expect to run at
    // any time before CUDA is first used. Symbols must be global, as if linked.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }?;
    // What it registered points into it: never close it.
    std::mem::forget(library);
    Ok(())
}

#[cfg(not(unix))]
fn open_for_good(path: &Path) -> Result<(), libloading::Error> {
    // SAFETY: as on Unix.
    let library = unsafe { libloading::Library::new(path) }?;
    std::mem::forget(library);
    Ok(())
}

/// Where the library may be, in order: `$SEQUOR_TORCH_CUDA`; the libtorch that
/// `make setup` made its view of (named in `$LIBTORCH/source`); `$LIBTORCH`; the
/// folder of the CPU half that this process runs with.
#[must_use]
pub fn default_dirs() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    if let Some(named) = env::var_os(VARIABLE).filter(|v| !v.is_empty()) {
        add_with_lib(&mut dirs, Path::new(&named));
    }
    if let Some(libtorch) = env::var_os("LIBTORCH").filter(|v| !v.is_empty()) {
        let libtorch = Path::new(&libtorch);
        if let Ok(source) = fs::read_to_string(libtorch.join("source")) {
            add_with_lib(&mut dirs, Path::new(source.trim()));
        }
        add_with_lib(&mut dirs, libtorch);
    }
    if let Some(library) = loaded_cpu_half() {
        let resolved = fs::canonicalize(&library);
        for file in [Some(library), resolved.ok()].into_iter().flatten() {
            if let Some(dir) = file.parent() {
                add(&mut dirs, dir.to_owned());
            }
        }
    }
    dirs
}

fn add(dirs: &mut Vec<PathBuf>, dir: PathBuf) {
    if !dir.as_os_str().is_empty() && !dirs.contains(&dir) {
        dirs.push(dir);
    }
}

/// `place` may be the library, its folder, or the folder above.
fn add_with_lib(dirs: &mut Vec<PathBuf>, place: &Path) {
    match place.parent() {
        Some(dir) if place.is_file() => add(dirs, dir.to_owned()),
        _ => {
            add(dirs, place.to_owned());
            add(dirs, place.join("lib"));
        }
    }
}

#[cfg(target_os = "linux")]
fn loaded_cpu_half() -> Option<PathBuf> {
    find_in_maps(&fs::read("/proc/self/maps").ok()?)
}

#[cfg(not(target_os = "linux"))]
fn loaded_cpu_half() -> Option<PathBuf> {
    None
}

/// The file `libtorch_cpu.so` in a list of memory maps, whose lines end in the path
/// of the mapped file (any bytes, and the first slash of the line starts it).
#[cfg(target_os = "linux")]
fn find_in_maps(maps: &[u8]) -> Option<PathBuf> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    maps.split(|&byte| byte == b'\n').find_map(|line| {
        let start = line.iter().position(|&byte| byte == b'/')?;
        let path = Path::new(OsStr::from_bytes(&line[start..]));
        (path.file_name()? == "libtorch_cpu.so").then(|| path.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = env::temp_dir().join(format!("sequor-cuda-{name}-{}", std::process::id()));
            fs::create_dir_all(dir.join("lib")).unwrap();
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_first_folder_with_the_library_wins() {
        let dir = Dir::new("find");
        let dirs = vec![dir.0.clone(), dir.0.join("lib")];
        assert_eq!(find(&dirs), None);
        let library = dir.0.join("lib").join(LIBRARY);
        fs::write(&library, "not a library").unwrap();
        assert_eq!(find(&dirs), Some(library.clone()));

        let mut places = Vec::new();
        add_with_lib(&mut places, &library);
        assert_eq!(places, [dir.0.join("lib")]);
        add_with_lib(&mut places, &dir.0);
        assert_eq!(places, [dir.0.join("lib"), dir.0.clone()]);
    }

    #[test]
    fn errors_say_where_and_what_to_do() {
        let dir = Dir::new("errors");
        let missing = open(std::slice::from_ref(&dir.0)).unwrap_err().to_string();
        assert!(missing.contains(&dir.0.display().to_string()), "{missing}");
        assert!(
            missing.contains(VARIABLE) && missing.contains("CPU"),
            "{missing}"
        );
        assert!(
            open(&[])
                .unwrap_err()
                .to_string()
                .contains("any known place")
        );

        fs::write(dir.0.join(LIBRARY), "not a library").unwrap();
        let broken = open(std::slice::from_ref(&dir.0)).unwrap_err();
        assert!(matches!(&broken, CudaError::Open { path, .. } if path.starts_with(&dir.0)));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_loaded_cpu_half_is_found() {
        let maps = b"00-ff r-xp 00 08:01 7   /usr/lib/libc.so.6\n\
                     00-ff r-xp 00 08:01 9   /opt/my torch/lib/libtorch_cpu.so\n";
        let expected = Path::new("/opt/my torch/lib/libtorch_cpu.so");
        assert_eq!(find_in_maps(maps).as_deref(), Some(expected));
        assert_eq!(find_in_maps(b"00-ff rw-p 00 00:00 0 [heap]\n"), None);

        // This test binary runs with one.
        let _ = tch::get_num_threads();
        let loaded = loaded_cpu_half().unwrap();
        assert!(default_dirs().contains(&loaded.parent().unwrap().to_owned()));
    }
}
