//! What the daemon must be allowed to do.

use std::fs;

/// `CAP_NET_ADMIN` in `include/uapi/linux/capability.h`.
const CAP_NET_ADMIN: u32 = 12;

/// The capability that nothing works without is missing.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(
    "changing routes needs the capability CAP_NET_ADMIN (and CAP_BPF for the fast path); run as root, or by the systemd unit"
)]
pub struct Missing;

/// Checks for the capability that the kernel datapath needs. What the fast path needs besides is found by trying.
///
/// # Errors
///
/// If it is missing.
pub fn check() -> Result<(), Missing> {
    let status = fs::read_to_string("/proc/thread-self/status").map_err(|_| Missing)?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).ok_or(Missing)?;
    let effective = u64::from_str_radix(effective.trim(), 16).map_err(|_| Missing)?;
    if effective >> CAP_NET_ADMIN & 1 == 1 { Ok(()) } else { Err(Missing) }
}
