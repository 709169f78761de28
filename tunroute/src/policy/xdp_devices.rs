//! Which devices take part in XDP, and what keeps the others from it. Pure; [`crate::kernel::xdp_features`] asks the kernel.
//!
//! A frame that XDP redirects is never an skb here: nothing on its way may depend on what only an skb has (a checksum or a
//! VLAN tag that stands beside the frame), and nothing on the target's way out may be passed over (queues, programs).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, Xdp},
    policy::devices::matching,
    policy::net::{IfIndex, KernelState, LinkLayer},
};

/// `NETDEV_XDP_ACT_BASIC`, `_REDIRECT` and `_NDO_XMIT` in `include/uapi/linux/netdev.h`.
const BASIC: u64 = 1;
const REDIRECT: u64 = 2;
const TRANSMIT: u64 = 4;
/// The default queueing disciplines: bypassing them changes no configured behaviour.
const PLAIN_QUEUES: [&str; 6] = ["noqueue", "mq", "pfifo_fast", "fq_codel", "fq", "noop"];

/// What the kernel says of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its link-layer address: frames to it are for this host.
    pub address: [u8; 6],
    /// `NETDEV_XDP_ACT_…`: what its driver can. None where the kernel is too old for the program.
    pub features: Option<u64>,
    /// The XDP program at it.
    pub program: Option<u32>,
    /// Where its frames come from.
    pub origin: Origin,
    /// The name of its queueing discipline.
    pub queue: String,
    /// Number of programs and filters at its egress.
    pub filters: usize,
}

/// Where a device's frames come from, and what of them may stand beside them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// A card, which takes VLAN tags out of frames.
    Card {
        /// It does so now.
        tags: bool,
    },
    /// A program that holds a tap device: the kernel makes skbs of its frames first.
    Tap,
    /// The other end of a veth pair in this namespace.
    Peer {
        /// It leaves checksums to be computed.
        checksums: bool,
        /// It leaves VLAN tags to be inserted.
        tags: bool,
    },
    /// The other end of a veth pair in another namespace, where nothing can be looked up.
    #[default]
    Elsewhere,
}

/// What keeps a device from taking part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The kernel is too old: it does not say what drivers can, or lacks what the program asks for.
    Untold,
    /// Its driver has no native XDP.
    NoDriver,
    /// A foreign program is attached.
    OtherProgram(u32),
    /// The card takes VLAN tags out of frames.
    Tags,
    /// The other end of the veth pair leaves something to be done.
    Unfinished,
    /// The other end of the veth pair is out of sight.
    Elsewhere,
    /// Frames written to a tap are skbs before XDP sees them.
    Tap,
    /// The kernel refused the program.
    Refused(String),
    /// It takes no frames from XDP.
    NoTransmit,
    /// Packets wait in a configured queueing discipline.
    Queue(String),
    /// Programs or filters see what leaves.
    Filters,
    /// The segment size that TCP tells is limited by a program of tunroute's.
    Clamp,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untold => f.write_str("it takes Linux 6.5"),
            Self::NoDriver => f.write_str("its driver has no XDP"),
            Self::OtherProgram(id) => {
                write!(f, "another XDP program is attached (`bpftool prog show id {id}`), which is left alone")
            }
            Self::Tags => f.write_str("it takes VLAN tags out of frames (`ethtool -K DEVICE rxvlan off`)"),
            Self::Unfinished => f.write_str(
                "its other end leaves checksums or VLAN tags to be entered (`ethtool -K PEER tx off txvlan off \
                 tx-vlan-stag-hw-insert off`)",
            ),
            Self::Elsewhere => f.write_str(
                "its other end is in another namespace and may leave checksums to be computed; where it does not, say \
                 xdp = \"on\"",
            ),
            Self::Tap => f.write_str("what is written to a tap is an skb before XDP sees it"),
            Self::Refused(error) => write!(f, "the kernel refused the program: {error}"),
            Self::NoTransmit => f.write_str(
                "it takes no frames from XDP; a veth device does when its other end has GRO (`ethtool -K PEER gro on`)",
            ),
            Self::Queue(queue) => write!(f, "its queue, {queue}, would be passed over"),
            Self::Filters => f.write_str("programs or filters at its egress would be passed over"),
            Self::Clamp => f.write_str("its `mss` is limited on the way that XDP passes over"),
        }
    }
}

/// What keeps a device from having its frames decided. `ours`: its program is this project's.
fn at_ingress(device: &Device, ours: bool, mode: Xdp) -> Option<Obstacle> {
    let Some(features) = device.features else { return Some(Obstacle::Untold) };
    if features & (BASIC | REDIRECT) != BASIC | REDIRECT {
        return Some(Obstacle::NoDriver);
    }
    if let Some(program) = device.program
        && !ours
    {
        return Some(Obstacle::OtherProgram(program));
    }
    match device.origin {
        Origin::Card { tags: true } => Some(Obstacle::Tags),
        Origin::Tap => Some(Obstacle::Tap),
        Origin::Peer { checksums, tags } if checksums || tags => Some(Obstacle::Unfinished),
        Origin::Elsewhere if mode != Xdp::On => Some(Obstacle::Elsewhere),
        _ => None,
    }
}

/// What keeps a tunnel from taking frames.
fn at_egress(device: &Device, clamped: bool) -> Option<Obstacle> {
    let Some(features) = device.features else { return Some(Obstacle::Untold) };
    if features & TRANSMIT == 0 {
        Some(Obstacle::NoTransmit)
    } else if clamped {
        Some(Obstacle::Clamp)
    } else if device.filters > 0 {
        Some(Obstacle::Filters)
    } else if !PLAIN_QUEUES.contains(&device.queue.as_str()) {
        Some(Obstacle::Queue(device.queue.clone()))
    } else {
        None
    }
}

/// Which part a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Its frames are decided.
    Ingress,
    /// It takes frames.
    Tunnel,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Tunnel => "tunnel",
        })
    }
}

/// The chosen devices, and why the others are not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// The devices whose frames are decided, with their link-layer addresses.
    pub stations: BTreeMap<IfIndex, [u8; 6]>,
    /// The tunnels that take frames.
    pub targets: BTreeSet<IfIndex>,
    /// All devices that could, by name, with what keeps them from it.
    pub devices: Vec<(Role, String, Option<Obstacle>)>,
}

/// Chooses. Of devices that are no Ethernet devices, nothing need be known. `ours` are the devices with a program of this
/// project's, `refused` those at which the kernel has refused one. A device at which frames could be decided is left alone
/// as long as no tunnel would take any.
#[must_use]
pub fn choose(
    config: &Config,
    kernel: &KernelState,
    devices: &BTreeMap<IfIndex, Device>,
    ours: &BTreeSet<IfIndex>,
    refused: &BTreeMap<IfIndex, String>,
) -> Chosen {
    let mut chosen = Chosen::default();
    if config.xdp == Xdp::Off {
        return chosen;
    }
    for tunnel in &config.tunnels {
        let Some(link) = kernel.link(&tunnel.name) else { continue };
        let obstacle = match devices.get(&link.index) {
            Some(device) => at_egress(device, tunnel.mss.is_some()),
            None if link.layer == LinkLayer::Ethernet => continue,
            None => Some(Obstacle::NoTransmit),
        };
        if obstacle.is_none() {
            chosen.targets.insert(link.index);
        }
        chosen.devices.push((Role::Tunnel, link.name.clone(), obstacle));
    }
    for link in matching(&config.interfaces.ingress, kernel) {
        let Some(device) = devices.get(&link.index) else { continue };
        let refused = || refused.get(&link.index).cloned().map(Obstacle::Refused);
        let obstacle = at_ingress(device, ours.contains(&link.index), config.xdp).or_else(refused);
        if obstacle.is_none() && !chosen.targets.is_empty() {
            chosen.stations.insert(link.index, device.address);
        }
        chosen.devices.push((Role::Ingress, link.name.clone(), obstacle));
    }
    chosen
}

#[cfg(test)]
mod tests;
