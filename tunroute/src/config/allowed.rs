//! What a configuration may contain, for code that writes one: the checks of [`super::load`], value by value. Each error
//! says what is wrong with the value.

use std::net::IpAddr;

use ipnet::IpNet;

pub(crate) use super::{
    check::{MOST_LEVELS, MOST_POLICIES},
    source::printable,
};
use super::{names, prefix, report::Refusal, values};

fn reason(Refusal { message, help }: Refusal) -> String {
    if help.is_empty() { message } else { format!("{message} ({help})") }
}

/// The name of a tunnel.
pub(crate) fn tunnel(name: &str) -> Result<(), String> {
    if name == "lo" {
        return Err("`lo` is the loopback device and leads nowhere".to_owned());
    }
    names::tunnel_name(name).map_err(reason)
}

/// A tunnel's gateway.
pub(crate) fn gateway(address: IpAddr) -> Result<(), String> {
    prefix::address(&address.to_string()).and_then(|address| values::host(address, "gateway")).map(drop).map_err(reason)
}

/// A policy's source, without `allow-default`.
pub(crate) fn source(net: &IpNet) -> Result<(), String> {
    prefix::source(&net.to_string(), false).map(drop).map_err(reason)
}

/// A destination that a policy does not apply to.
pub(crate) fn exempt(net: &IpNet) -> Result<(), String> {
    prefix::exempt(&net.to_string()).map(drop).map_err(reason)
}
