//! Names of devices, tunnels and policies: which are allowed, and what to write instead.

use super::report::{Refusal, quote};

/// The longest device name in bytes (`IFNAMSIZ` in `include/uapi/linux/if.h`, less the closing zero).
const LONGEST_DEVICE_NAME: usize = 15;
/// The longest name of a policy.
const LONGEST_POLICY_NAME: usize = 64;

/// A device's name, as `dev_valid_name()` in `net/core/dev.c` takes it; `%` it would replace by a number.
pub(super) fn device_name(name: &str) -> Result<(), Refusal> {
    const HELP: &str = "write the name that `ip link` shows, such as \"sixxs0\"";
    let refuse = |message: String| Err(Refusal::new(message, HELP));
    if name.is_empty() {
        return refuse("a device name is empty".to_owned());
    }
    if matches!(name, "." | "..") {
        return refuse(format!("{} is no device name", quote(name)));
    }
    if name.len() > LONGEST_DEVICE_NAME {
        let length = name.len();
        return refuse(format!("{} has {length} bytes, a device name at most {LONGEST_DEVICE_NAME}", quote(name)));
    }
    // The kernel goes by Latin-1, in which byte A0 is a space.
    if name.chars().any(|c| c.is_whitespace() || c.is_control()) || name.bytes().any(|b| b == 0xa0) {
        return refuse(format!("{} is no device name: it contains a space or control character", quote(name)));
    }
    if let Some(c) = name.chars().find(|c| matches!(c, '/' | ':' | '%')) {
        return refuse(format!("{} is no device name: it contains `{c}`", quote(name)));
    }
    Ok(())
}

/// The name of a tunnel's device.
pub(super) fn tunnel_name(name: &str) -> Result<(), Refusal> {
    if name.contains('*') {
        let help = "write one [tunnel.NAME] for each device; only ingress and uplink may have patterns";
        return Err(Refusal::new(format!("{} is no device name: it contains `*`", quote(name)), help));
    }
    device_name(name)
}

/// The name of a policy.
pub(super) fn policy_name(name: &str) -> Result<String, Refusal> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let help = "write 1 to 64 of A–Z a–z 0–9 . _ -";
    if name.is_empty() {
        return Err(Refusal::new("a policy's name is empty", help));
    }
    if name.len() > LONGEST_POLICY_NAME {
        return Err(Refusal::new(format!("the policy's name {} has {} bytes", quote(name), name.len()), help));
    }
    match name.chars().find(|c| !allowed(*c)) {
        Some(c) => {
            let character = quote(c.encode_utf8(&mut [0; 4]));
            Err(Refusal::new(format!("the policy's name {} contains {character}", quote(name)), help))
        }
        None => Ok(name.to_owned()),
    }
}
