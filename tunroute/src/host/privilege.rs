//! What the daemon must be allowed to do.

use std::fs;

// The numbers in `include/uapi/linux/capability.h`.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// The capability that nothing works without is missing.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(
    "changing routes needs the capability CAP_NET_ADMIN (and CAP_BPF for the fast path); run as root, or by the systemd unit"
)]
pub struct Missing;

/// Checks for the capability that the kernel datapath needs. For the fast path see [`missing_for_fast_path`].
///
/// # Errors
///
/// If it is missing.
pub fn check() -> Result<(), Missing> {
    if effective().is_some_and(|set| has(set, CAP_NET_ADMIN)) { Ok(()) } else { Err(Missing) }
}

/// The capabilities that are missing for the fast path, in words; none if that is not what keeps it from working.
///
/// `CAP_BPF` is for maps and programs, `CAP_PERFMON` for what the programs do with pointers (`bpf_allow_ptr_leaks()` in
/// `include/linux/bpf.h`); `CAP_SYS_ADMIN` stands for both.
#[must_use]
pub fn missing_for_fast_path() -> Option<String> {
    let set = effective().filter(|set| !has(*set, CAP_SYS_ADMIN))?;
    let needed = [(CAP_BPF, "CAP_BPF"), (CAP_PERFMON, "CAP_PERFMON")];
    let missing: Vec<&str> = needed.iter().filter(|(number, _)| !has(set, *number)).map(|(_, name)| *name).collect();
    (!missing.is_empty()).then(|| {
        let missing = missing.join(", ");
        format!("the fast path needs CAP_BPF and CAP_PERFMON; missing: {missing}. Run as root, or by the systemd unit")
    })
}

/// The calling thread's effective capabilities, one bit each.
fn effective() -> Option<u64> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(effective.trim(), 16).ok()
}

const fn has(set: u64, capability: u32) -> bool {
    set >> capability & 1 == 1
}
