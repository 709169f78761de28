//! Single values: what a string may be, and what to write instead.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use super::{
    DevicePattern, Follow, Listen, ProbeTarget,
    names::device_name,
    report::{Refusal, quote},
};
use crate::policy::net::{TABLE_LOCAL, TABLE_MAIN};

/// The kernel's default table (`RT_TABLE_DEFAULT` in `include/uapi/linux/rtnetlink.h`).
const TABLE_DEFAULT: u32 = 253;
/// The longest duration: adding it to a clock never overflows.
const LONGEST_DURATION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// An address and a port, or the path of a Unix socket after `unix:`.
pub(super) fn listen(text: &str) -> Result<Listen, Refusal> {
    const HELP: &str = "write \"127.0.0.1:9942\", \"[::1]:9942\" or \"unix:/run/tunroute/metrics.sock\"";
    if let Some(path) = text.strip_prefix("unix:") {
        let path = Path::new(path);
        return if path.is_absolute() {
            Ok(Listen::Unix(path.to_owned()))
        } else {
            Err(Refusal::new(format!("the path in {} does not begin with `/`", quote(text)), HELP))
        };
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(Listen::Tcp(address)),
        Ok(_) => Err(Refusal::new(format!("{} has no port", quote(text)), HELP)),
        Err(_) => Err(Refusal::new(format!("{} is no address with a port", quote(text)), HELP)),
    }
}

/// A device's name, or the beginning of names and `*`.
pub(super) fn pattern(text: &str) -> Result<DevicePattern, Refusal> {
    let beginning = text.strip_suffix('*');
    if beginning.unwrap_or(text).contains('*') {
        let stem = text.split('*').next().unwrap_or_default();
        let message = format!("{} has a `*` that is not at its end", quote(text));
        return Err(Refusal::new(message, format!("write \"{stem}*\", or list the names")));
    }
    match beginning {
        // Here a name goes on, so it may begin with anything that a name may contain.
        Some("" | "." | "..") => {}
        Some(beginning) => device_name(beginning)?,
        None => device_name(text)?,
    }
    Ok(DevicePattern(text.to_owned()))
}

/// Interfaces that are followed: `@` and a name, or the beginning of names and `*`; then perhaps ` in ` and a range.
pub(super) fn followed(text: &str) -> Result<Follow, Refusal> {
    match text.split_once(" in ") {
        Some((devices, range)) => {
            Ok(Follow { devices: followed_devices(devices)?, within: Some(super::prefix::source(range, true)?) })
        }
        None => Ok(Follow { devices: followed_devices(text)?, within: None }),
    }
}

fn followed_devices(text: &str) -> Result<DevicePattern, Refusal> {
    let name = text.strip_prefix('@').unwrap_or(text);
    let refusal = match pattern(name) {
        Err(refusal) => refusal,
        Ok(_) if name == "lo" => Refusal::new("no network is on the link at `lo`", ""),
        Ok(_) if name.starts_with('@') => Refusal::new(format!("{} has one `@` too many", quote(text)), ""),
        Ok(pattern) => return Ok(pattern),
    };
    let help = "write the name of the interface that the sources are behind, such as \"@lan0\", or a range of them, such \
                as \"@lan0 in 2001:db8:a::/48\"";
    Err(Refusal { help: help.to_owned(), ..refusal })
}

/// The number of a routing table.
pub(super) fn table(number: u32) -> Result<u32, Refusal> {
    let reserved = match number {
        0 => "stands for no table (unspec)",
        TABLE_DEFAULT => "is the kernel's table `default`",
        TABLE_MAIN => "is the kernel's table `main`",
        TABLE_LOCAL => "is the kernel's table `local`",
        _ => return Ok(number),
    };
    let help = "write a number that nobody else on this host uses, such as 200, or leave `table` out";
    Err(Refusal::new(format!("table {number} {reserved}"), help))
}

/// A duration with its unit.
pub(super) fn duration(text: &str) -> Result<Duration, Refusal> {
    use humantime::DurationError as E;
    const HELP: &str = "write a number and its unit, such as \"500ms\", \"60s\" or \"2m\"";
    // humantime 2.4 overflows on sums that are just too large, and those take more characters.
    if text.len() > 16 {
        return Err(Refusal::new(format!("{} is too long for a duration", quote(text)), HELP));
    }
    let number = text.trim();
    match humantime::parse_duration(text) {
        Ok(duration) if duration > LONGEST_DURATION => {
            Err(Refusal::new(format!("{} is too long", quote(text)), "write at most \"30d\""))
        }
        Ok(duration) => Ok(duration),
        Err(E::UnknownUnit { unit, .. }) if unit.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => {
            let help = format!("write \"{number}s\" for seconds or \"{number}ms\" for milliseconds");
            Err(Refusal::new(format!("{} has no unit", quote(text)), help))
        }
        Err(E::UnknownUnit { unit, .. }) if !unit.is_empty() => {
            Err(Refusal::new(format!("{} is no unit of time", quote(&unit)), HELP))
        }
        Err(_) => Err(Refusal::new(format!("{} is no duration", quote(text)), HELP)),
    }
}

/// A command in argv style.
pub(super) fn command(words: &[&str]) -> Result<(), Refusal> {
    const EXAMPLE: &str = r#"["aiccu", "start", "/etc/aiccu/tunnel0.conf"]"#;
    let Some(program) = words.first() else {
        return Err(Refusal::new("the command is empty", format!("write the program and its arguments: {EXAMPLE}")));
    };
    if program.is_empty() {
        return Err(Refusal::new("the command has an empty program", format!("name the program first: {EXAMPLE}")));
    }
    if program.contains('/') && !program.starts_with('/') {
        let help = "write the path from the root, such as \"/usr/sbin/aiccu\", or the program's bare name";
        return Err(Refusal::new(format!("the program {} is a relative path", quote(program)), help));
    }
    if program.contains(char::is_whitespace) {
        let parts: Vec<String> = program.split_whitespace().map(|word| format!("\"{word}\"")).collect();
        let help = format!("there is no shell: write [{}, …]", parts.join(", "));
        return Err(Refusal::new(format!("the program {} contains a space", quote(program)), help));
    }
    if words.iter().any(|word| word.contains('\0')) {
        let help = "remove it: the kernel ends an argument there";
        return Err(Refusal::new("the command contains a zero character", help));
    }
    Ok(())
}

/// What a probe asks.
pub(super) fn probe_target(text: &str) -> Result<ProbeTarget, Refusal> {
    const HELP: &str = "write an address for ICMP echo (\"192.0.2.1\", \"2001:db8::1\"), or an address and a port for \
                        TCP (\"192.0.2.1:443\", \"[2001:db8::1]:443\")";
    // A socket address may have a zone, which the probe's device decides.
    let tcp = text.parse::<SocketAddr>().ok().filter(|_| !text.contains('%'));
    match tcp {
        Some(tcp) if tcp.port() == 0 => Err(Refusal::new(format!("{} has port 0", quote(text)), HELP)),
        Some(tcp) => host(tcp.ip(), "target").map(|_| ProbeTarget::Tcp(tcp)),
        None => match super::prefix::address(text) {
            Ok(addr) => host(addr, "target").map(ProbeTarget::Echo),
            Err(refusal) if text.contains('%') => Err(refusal),
            Err(refusal) => Err(Refusal { help: HELP.to_owned(), ..refusal }),
        },
    }
}

/// The gateway of a tunnel, for packets of its own family.
pub(super) fn gateway(text: &str) -> Result<IpAddr, Refusal> {
    if let Some(address) = text.strip_prefix("inet6 ") {
        let message =
            format!("{} is an IPv6 gateway for IPv4 (RFC 8950), which tunroute does not support", quote(text));
        let help = format!("write \"{address}\" as the gateway of IPv6, and an IPv4 address for that of IPv4");
        return Err(Refusal::new(message, help));
    }
    super::prefix::address(text).and_then(|addr| host(addr, "gateway"))
}

/// The address of one other host, as a gateway or for a probe.
pub(super) fn host(addr: IpAddr, role: &str) -> Result<IpAddr, Refusal> {
    let broadcast = matches!(addr, IpAddr::V4(addr) if addr.is_broadcast());
    let kind = if let IpAddr::V6(v6) = addr
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Err(super::prefix::mapped(&addr, &v4));
    } else if addr.is_unspecified() {
        "the unspecified address"
    } else if addr.is_multicast() || broadcast {
        "the address of many hosts"
    } else if addr.is_loopback() {
        "an address of this host itself"
    } else {
        return Ok(addr);
    };
    let message = format!("{} is {kind}, which cannot be a {role}", quote(&addr.to_string()));
    Err(Refusal::new(message, "write the address of one host at the other end of the tunnel"))
}
