//! How much memory this process uses.

/// The largest resident set so far, in bytes. `None` where the system does not
/// tell (anything but Linux).
#[must_use]
pub fn peak_rss_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// The resident set now, in bytes. `None` where the system does not tell (anything
/// but Linux).
#[must_use]
pub fn current_rss_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

fn status_bytes(field: &str) -> Option<u64> {
    find_bytes(&std::fs::read_to_string("/proc/self/status").ok()?, field)
}

/// The value of a line like `VmRSS:     1234 kB`.
fn find_bytes(status: &str, field: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(field))?;
    value
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_status() {
        let status = "Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t    12 kB\n";
        assert_eq!(find_bytes(status, "VmHWM:"), Some(2 << 20));
        assert_eq!(find_bytes(status, "VmRSS:"), Some(12 << 10));
        for bad in [
            "",
            "VmRSS: many kB",
            "VmRSS: 12 MB",
            "VmRSS: 99999999999999999999 kB",
        ] {
            assert_eq!(find_bytes(bad, "VmRSS:"), None, "{bad}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn touching_memory_shows() {
        let before = peak_rss_bytes().unwrap();
        let block = vec![1u8; 64 << 20];
        let now = current_rss_bytes().unwrap();
        assert!(block.iter().all(|&b| b == 1) && now >= 64 << 20);
        assert!(peak_rss_bytes().unwrap() >= before.max(64 << 20));
    }
}
