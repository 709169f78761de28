//! Addresses and prefixes.

use std::{
    fmt::Display,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::report::{Refusal, quote};

const fn v4(a: u8, b: u8, len: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, 0, 0), len)
}

const fn v6(first: u16, last: u16, len: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, last), len)
}

/// IPv4 addresses that no forwarded packet comes from (`ip_route_input_slow()` in `net/ipv4/route.c`).
const NO_SOURCES_V4: [(Ipv4Net, &str); 5] = [
    (v4(0, 0, 8), "unspecified"),
    (v4(127, 0, 8), "loopback"),
    (v4(169, 254, 16), "link-local"),
    (v4(224, 0, 4), "multicast"),
    (Ipv4Net::new_assert(Ipv4Addr::BROADCAST, 32), "broadcast"),
];

/// IPv6 addresses that no forwarded packet comes from (`ip6_rcv_core()` in `net/ipv6/ip6_input.c`).
const NO_SOURCES_V6: [(Ipv6Net, &str); 4] = [
    (v6(0, 0, 128), "unspecified"),
    (v6(0, 1, 128), "loopback"),
    (v6(0xfe80, 0, 10), "link-local"),
    (v6(0xff00, 0, 8), "multicast"),
];

/// The IPv4-mapped form of an IPv4 address or prefix.
pub(super) fn mapped(text: &impl Display, v4: &impl Display) -> Refusal {
    let message = format!("{} is the IPv4-mapped form of {v4}, which is never in a packet", quote(&text.to_string()));
    Refusal::new(message, format!("write \"{v4}\""))
}

/// An address, without a length.
pub(super) fn address(text: &str) -> Result<IpAddr, Refusal> {
    let addr = parse_address(text)?;
    match addr {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(Ok(addr), |v4| Err(mapped(&text, &v4))),
        IpAddr::V4(_) => Ok(addr),
    }
}

fn parse_address(text: &str) -> Result<IpAddr, Refusal> {
    text.parse().map_err(|_| not_an_address(text))
}

/// What is wrong with an address that does not parse.
fn not_an_address(text: &str) -> Refusal {
    if let Some((addr, zone)) = text.split_once('%') {
        let message = format!("{} has a zone, {}", quote(text), quote(&format!("%{zone}")));
        return Refusal::new(message, format!("write {} without it: the device is known", quote(addr)));
    }
    let bare = text.trim().trim_start_matches('[').trim_end_matches(']');
    if bare.parse::<IpAddr>().is_ok() {
        return Refusal::new(format!("{} is not an address", quote(text)), format!("write \"{bare}\""));
    }
    let zero = |part: &str| part.len() > 1 && part.starts_with('0') && part.bytes().all(|b| b.is_ascii_digit());
    if !text.contains(':') && text.split('.').any(zero) {
        let decimal: Vec<&str> = text.split('.').map(without_zeros).collect();
        let decimal = decimal.join(".");
        if decimal.parse::<Ipv4Addr>().is_ok() {
            let message = format!("{} has leading zeros, which some programs take for octal", quote(text));
            return Refusal::new(message, format!("write \"{decimal}\" if decimal is meant"));
        }
    }
    let help = "write an address such as \"192.0.2.1\" or \"2001:db8::1\"; names are not looked up";
    Refusal::new(format!("{} is not an address", quote(text)), help)
}

/// A number without its leading zeros, but never without a digit.
fn without_zeros(digits: &str) -> &str {
    let short = digits.trim_start_matches('0');
    if short.is_empty() && !digits.is_empty() { "0" } else { short }
}

/// The length of a prefix of this address.
fn length(addr: &IpAddr, text: &str) -> Result<u8, Refusal> {
    let (family, longest) = match addr {
        IpAddr::V4(_) => ("IPv4", 32),
        IpAddr::V6(_) => ("IPv6", 128),
    };
    let whole = || quote(&format!("{addr}/{text}"));
    if let (IpAddr::V4(_), Ok(mask)) = (addr, text.parse::<Ipv4Addr>())
        && let Ok(length) = ipnet::ipv4_mask_to_prefix(mask)
    {
        return Err(Refusal::new(format!("{} has a netmask", whole()), format!("write \"{addr}/{length}\"")));
    }
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        let help = format!("write a number from 0 to {longest} after the `/`, or no `/` for the one address");
        return Err(Refusal::new(format!("{} is no prefix length", quote(text)), help));
    }
    match text.parse::<u8>() {
        Ok(length) if length <= longest && without_zeros(text) != text => {
            Err(Refusal::new(format!("{} has a leading zero", whole()), format!("write \"{addr}/{length}\"")))
        }
        Ok(length) if length <= longest => Ok(length),
        _ => {
            let message =
                format!("{} is too long: a prefix of an {family} address has at most {longest} bits", whole());
            Err(Refusal::new(message, format!("write \"{addr}/{longest}\" or \"{addr}\" for the one address")))
        }
    }
}

/// A prefix, or an address for the prefix of that address alone.
pub(super) fn prefix(text: &str) -> Result<IpNet, Refusal> {
    let (addr, len) = text.split_once('/').map_or((text, None), |(addr, len)| (addr, Some(len)));
    let addr = parse_address(addr)?;
    let len = len.map(|len| length(&addr, len)).transpose()?;
    let host = IpNet::from(addr);
    let net = len.and_then(|len| IpNet::new(addr, len).ok()).unwrap_or(host);
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(bits) = v6.prefix_len().checked_sub(96)
        && let Ok(v4) = Ipv4Net::new(v4, bits)
    {
        let v4 = v4.trunc();
        return Err(if bits == 32 { mapped(&text, &v4.addr()) } else { mapped(&text, &v4) });
    }
    if net.trunc() != net {
        let message = format!("{} has bits set beyond its first {}", quote(text), net.prefix_len());
        let help = format!("write \"{}\" for the whole prefix or \"{addr}\" for the one address", net.trunc());
        return Err(Refusal::new(message, help));
    }
    Ok(net)
}

/// The kind of addresses that nothing comes from which a prefix is inside of, and the range of such addresses that it is
/// around.
fn no_sources(net: &IpNet) -> (Option<&'static str>, Option<(String, &'static str)>) {
    match net {
        IpNet::V4(net) => (
            NO_SOURCES_V4.iter().find(|(range, _)| range.contains(net)).map(|(_, kind)| *kind),
            NO_SOURCES_V4.iter().find(|(range, _)| net.contains(range)).map(|(range, kind)| (range.to_string(), *kind)),
        ),
        IpNet::V6(net) => (
            NO_SOURCES_V6.iter().find(|(range, _)| range.contains(net)).map(|(_, kind)| *kind),
            NO_SOURCES_V6.iter().find(|(range, _)| net.contains(range)).map(|(range, kind)| (range.to_string(), *kind)),
        ),
    }
}

/// Can packets come from a prefix, as one finds it on an interface? None that is written there asks for `allow-default`.
#[must_use]
pub fn can_be_source(net: &IpNet) -> bool {
    matches!(no_sources(net), (None, None))
}

/// What looks like an interface may be meant as one.
fn or_followed(text: &str, refusal: Refusal) -> Refusal {
    if text.contains(['.', ':', '/']) || super::names::device_name(text).is_err() {
        return refusal;
    }
    Refusal { help: format!("{}; or write \"@{text}\" for the prefixes of that interface", refusal.help), ..refusal }
}

/// A prefix that packets can come from.
pub(super) fn source(text: &str, allow_default: bool) -> Result<IpNet, Refusal> {
    let net = prefix(text).map_err(|refusal| or_followed(text, refusal))?;
    let (inside, around) = no_sources(&net);
    if net.prefix_len() == 0 && !allow_default {
        let message = format!("{} takes every packet of its family", quote(text));
        return Err(Refusal::new(message, "add `allow-default = true` to this policy if that is meant"));
    }
    if let Some(kind) = inside.filter(|_| net.prefix_len() > 0) {
        let help = "remove it: the kernel routes no packet from there";
        return Err(Refusal::new(format!("{} is {kind} and cannot be a source", quote(text)), help));
    }
    match around.filter(|_| !allow_default) {
        Some((range, kind)) => {
            let message = format!("{} is so short that it covers the {kind} sources {range}", quote(text));
            let help = "write longer prefixes, or add `allow-default = true` to this policy if it is meant";
            Err(Refusal::new(message, help))
        }
        None => Ok(net),
    }
}

/// A prefix of destinations that a policy does not apply to.
pub(super) fn exempt(text: &str) -> Result<IpNet, Refusal> {
    match prefix(text) {
        // Its `throw` route would have to take the place of the policy's own default route.
        Ok(net) if net.prefix_len() == 0 => {
            let message = format!("{} exempts every destination: the policy would do nothing", quote(text));
            Err(Refusal::new(message, "write longer prefixes, or remove the sources of this family from the policy"))
        }
        Err(refusal) if !text.contains(['.', ':']) => {
            let message = format!("{} is neither a prefix nor `connected` nor `routed`", quote(text));
            Err(Refusal::new(message, format!("write \"connected\" or \"routed\", or: {}", refusal.help)))
        }
        result => result,
    }
}
