//! What the processor can do and how many cores this process may use.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

/// Vector instruction sets that kernels choose between at run time. Sets of
/// another architecture are false.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// 256-bit integer and float vectors.
    pub avx2: bool,
    /// Fused multiply-add.
    pub fma: bool,
    /// Conversion between half and single precision.
    pub f16c: bool,
    /// 512-bit vectors.
    pub avx512f: bool,
    /// 512-bit vectors of bytes and words.
    pub avx512bw: bool,
    /// The 512-bit instructions on shorter vectors.
    pub avx512vl: bool,
    /// Dot products of bytes.
    pub avx512vnni: bool,
    /// Dot products of bfloat16.
    pub avx512bf16: bool,
    /// 128-bit vectors of 64-bit ARM.
    pub neon: bool,
    /// Dot products of bytes on ARM.
    pub dotprod: bool,
    /// Matrix products of bytes on ARM.
    pub i8mm: bool,
    /// Products of bfloat16 on ARM.
    pub bf16: bool,
}

impl Features {
    /// Asks the processor this runs on.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
        return Self {
            avx2: is_x86_feature_detected!("avx2"),
            fma: is_x86_feature_detected!("fma"),
            f16c: is_x86_feature_detected!("f16c"),
            avx512f: is_x86_feature_detected!("avx512f"),
            avx512bw: is_x86_feature_detected!("avx512bw"),
            avx512vl: is_x86_feature_detected!("avx512vl"),
            avx512vnni: is_x86_feature_detected!("avx512vnni"),
            avx512bf16: is_x86_feature_detected!("avx512bf16"),
            ..Self::default()
        };
        #[cfg(target_arch = "aarch64")]
        return Self {
            neon: std::arch::is_aarch64_feature_detected!("neon"),
            dotprod: std::arch::is_aarch64_feature_detected!("dotprod"),
            i8mm: std::arch::is_aarch64_feature_detected!("i8mm"),
            bf16: std::arch::is_aarch64_feature_detected!("bf16"),
            ..Self::default()
        };
        #[cfg(not(any(target_arch = "x86_64", target_arch = "x86", target_arch = "aarch64")))]
        Self::default()
    }

    /// The names of the sets that are there.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        [
            ("avx2", self.avx2),
            ("fma", self.fma),
            ("f16c", self.f16c),
            ("avx512f", self.avx512f),
            ("avx512bw", self.avx512bw),
            ("avx512vl", self.avx512vl),
            ("avx512vnni", self.avx512vnni),
            ("avx512bf16", self.avx512bf16),
            ("neon", self.neon),
            ("dotprod", self.dotprod),
            ("i8mm", self.i8mm),
            ("bf16", self.bf16),
        ]
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
        .collect()
    }
}

/// The names with spaces between, or "none".
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.names();
        f.pad(&if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(" ")
        })
    }
}

/// One line about the processor: model, cores, instruction sets.
#[must_use]
pub fn summary() -> String {
    let model = model_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    format!(
        "{model}, {} logical / {} physical cores, {}",
        logical_cores(),
        physical_cores(),
        Features::detect()
    )
}

/// The processor's name for itself, where the system tells (Linux on x86).
#[must_use]
pub fn model_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let (_, name) = text
        .lines()
        .find(|line| line.starts_with("model name"))?
        .split_once(':')?;
    Some(name.trim().to_owned())
}

/// Hardware threads that this process may use: affinity and, on Linux, the quota
/// of its control group are respected. At least 1.
#[must_use]
pub fn logical_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Cores behind [`logical_cores`], counting hardware threads of one core once.
/// Where the system does not tell (anything but Linux) this is the same number.
#[must_use]
pub fn physical_cores() -> usize {
    let logical = logical_cores();
    count_cores(Path::new("/sys/devices/system/cpu"))
        .unwrap_or(logical)
        .clamp(1, logical)
}

/// Distinct (package, core) pairs among the processors this process may run on.
fn count_cores(devices: &Path) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let allowed = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let read = |cpu: usize, name: &str| {
        let file = devices.join(format!("cpu{cpu}/topology/{name}"));
        Some(std::fs::read_to_string(file).ok()?.trim().to_owned())
    };
    let cores: Option<HashSet<_>> = parse_cpu_list(allowed)?
        .into_iter()
        .map(|cpu| Some((read(cpu, "physical_package_id")?, read(cpu, "core_id")?)))
        .collect();
    cores.map(|cores| cores.len()).filter(|&count| count > 0)
}

/// The numbers of a list like `0-3,8`.
fn parse_cpu_list(list: &str) -> Option<Vec<usize>> {
    /// More than any kernel supports; guards against nonsense.
    const MOST: usize = 65_536;
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MOST {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_print_by_name() {
        assert_eq!(Features::default().to_string(), "none");
        let some = Features {
            avx2: true,
            fma: true,
            ..Features::default()
        };
        assert_eq!(some.to_string(), "avx2 fma");
        assert_eq!(format!("{some:>10}|"), "  avx2 fma|");
        assert_eq!(Features::detect(), Features::detect());
        assert!(summary().contains("physical"));
    }

    #[test]
    fn cores_are_plausible() {
        assert!(physical_cores() >= 1);
        assert!(physical_cores() <= logical_cores());
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("\t0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_cpu_list("7"), Some(vec![7]));
        for bad in ["", "a-b", "0-99999999999", "1,,2"] {
            assert_eq!(parse_cpu_list(bad), None, "{bad:?}");
        }
    }
}
