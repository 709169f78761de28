//! The settings under `/proc/sys/net` that decide whether this host forwards, in the calling thread's network namespace.

use std::fs;

use crate::policy::net::Family;

/// Does the kernel forward packets of this family that enter by this device?
///
/// IPv4 asks the device alone (`IN_DEV_FORWARD()` in `include/linux/inetdevice.h`). IPv6 asks the namespace or, since
/// Linux 6.17, the device's `force_forwarding` (`ip6_forward()` in `net/ipv6/ip6_output.c`), and takes nothing at all by
/// a device where it is disabled. What cannot be read does not forward.
#[must_use]
pub fn forwards(family: Family, device: &str) -> bool {
    let is_set = |conf: &str, name: &str| read(family, conf, name).is_some_and(|value| value != 0);
    match family {
        Family::V4 => is_set(device, "forwarding"),
        Family::V6 => {
            (is_set("all", "forwarding") || is_set(device, "force_forwarding")) && !is_set(device, "disable_ipv6")
        }
    }
}

/// How IPv4 packets are checked for a way back to their source (RFC 3704).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RpFilter {
    /// Not at all.
    Off,
    /// The best way back must lead out of the device that the packet came by. Assumed where it cannot be read.
    #[default]
    Strict,
    /// There must be a way back.
    Loose,
}

impl RpFilter {
    /// Is there any check?
    #[must_use]
    pub const fn is_on(self) -> bool {
        !matches!(self, Self::Off)
    }
}

/// The reverse path filter in force on a device: the larger of its own and that of `all` (`IN_DEV_RPFILTER()` in
/// `include/linux/inetdevice.h`).
#[must_use]
pub fn rp_filter(device: &str) -> RpFilter {
    let Some(own) = read(Family::V4, device, "rp_filter") else { return RpFilter::default() };
    match own.max(read(Family::V4, "all", "rp_filter").unwrap_or(0)) {
        0 => RpFilter::Off,
        2 => RpFilter::Loose,
        _ => RpFilter::Strict,
    }
}

/// A setting; none if it does not exist, cannot be read or is no number.
fn read(family: Family, conf: &str, name: &str) -> Option<i64> {
    let family = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    fs::read_to_string(format!("/proc/sys/net/{family}/conf/{conf}/{name}")).ok()?.trim().parse().ok()
}
