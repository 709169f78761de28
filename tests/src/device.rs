//! Pairs of Ethernet devices between namespaces, with fixed MAC addresses.

use std::{
    fmt,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Result;

use crate::{
    netns::Netns,
    offload::{AS_ON_A_WIRE, switch, xdp_forced},
};

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

/// Packets are received in the order sent, on any CPU.
const ONE_QUEUE: &str = "numtxqueues 1 numrxqueues 1";

/// Makes a veth pair; both ends are up. `mtu` in bytes of layer 3.
///
/// # Errors
/// `ip link add` fails.
pub fn veth(a: End<'_>, b: End<'_>, mtu: u32) -> Result<()> {
    static NEXT: AtomicU32 = AtomicU32::new(1000);
    // The ends have different numbers. Where they happen to be the same, the kernel takes note of a carrier up to a second
    // later (`linkwatch_urgent_event()` in net/core/link_watch.c), as it would not between two machines.
    let index = NEXT.fetch_add(1, Ordering::Relaxed);
    // A veth cannot be created up: its peer is not connected yet (`veth_open` in drivers/net/veth.c).
    a.netns.ip(&format!(
        "link add index {index} name {device} mtu {mtu} address {} {ONE_QUEUE} type veth peer name {} mtu {mtu} address {} \
         {ONE_QUEUE} netns {}",
        a.mac,
        b.device,
        b.mac,
        b.netns.name(),
        device = a.device,
    ))?;
    // Before packets can come: a solicitation that is under way keeps its timer.
    [a, b].into_iter().try_for_each(|end| ask_neighbours_often(end.netns, end.device))?;
    if xdp_forced() {
        [a, b].into_iter().try_for_each(|end| switch(end.netns, end.device, &AS_ON_A_WIRE))?;
    }
    [a, b].into_iter().try_for_each(set_up)
}

pub(crate) fn set_up(end: End<'_>) -> Result<()> {
    end.netns.ip(&format!("link set {} up", end.device))
}

/// A new address hears neighbour solicitations only after a moment (`addrconf_join_solict` runs in a work queue), and the
/// other end of a veth may not send yet when it hears the first one (`dev_activate` is left to linkwatch): do not wait a
/// second for the next. A device that changes its namespace loses the setting.
///
/// # Errors
/// There is no such device.
pub fn ask_neighbours_often(netns: &Netns, device: &str) -> Result<()> {
    for family in ["ipv4", "ipv6"] {
        let neigh = format!("{family}/neigh/{device}");
        netns.sysctl(&[(&format!("{neigh}/retrans_time_ms"), "50"), (&format!("{neigh}/mcast_solicit"), "20")])?;
    }
    Ok(())
}
