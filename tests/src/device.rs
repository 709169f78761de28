//! Pairs of Ethernet devices between namespaces, with fixed MAC addresses.

use std::fmt;

use anyhow::Result;

use crate::netns::Netns;

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// One end of a pair: a device that shall exist in a namespace.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Where it lives.
    pub netns: &'a Netns,
    /// Its name there.
    pub device: &'a str,
    /// Its MAC address.
    pub mac: Mac,
}

/// Makes a veth pair; both ends are up. `mtu` in bytes of layer 3.
///
/// # Errors
/// `ip link add` fails.
pub fn veth(a: End<'_>, b: End<'_>, mtu: u32) -> Result<()> {
    // A veth cannot be created up: its peer is not connected yet (`veth_open` in drivers/net/veth.c).
    a.netns.ip(&format!(
        "link add {device} mtu {mtu} address {} type veth peer name {} mtu {mtu} address {} netns {}",
        a.mac,
        b.device,
        b.mac,
        b.netns.name(),
        device = a.device,
    ))?;
    // Before packets can come: a solicitation that is under way keeps its timer.
    [a, b].into_iter().try_for_each(ask_neighbours_often)?;
    [a, b].into_iter().try_for_each(set_up)
}

pub(crate) fn set_up(end: End<'_>) -> Result<()> {
    end.netns.ip(&format!("link set {} up", end.device))
}

/// A new address hears neighbour solicitations only after a moment (`addrconf_join_solict` runs in a work queue), and
/// the first one may come earlier: do not wait a second for the next.
pub(crate) fn ask_neighbours_often(end: End<'_>) -> Result<()> {
    for family in ["ipv4", "ipv6"] {
        let neigh = format!("{family}/neigh/{}", end.device);
        end.netns.sysctl(&[(&format!("{neigh}/retrans_time_ms"), "50"), (&format!("{neigh}/mcast_solicit"), "20")])?;
    }
    Ok(())
}
