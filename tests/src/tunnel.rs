//! What the tunnels of the world are made of: the kernel's own tunnel devices.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use tunroute::policy::net::Family;

use crate::{
    device::{End, ask_neighbours_often, set_up},
    lab::{Lab, Share},
};

/// What the tunnels are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelKind {
    /// A layer 3 device.
    Tun,
    /// An Ethernet device that encapsulates; its outer packets go over `net0` with the host's address.
    Vxlan,
    /// An Ethernet device that is a plain wire to the broker.
    Veth,
    /// IPv6 in IPv4, what a tunnel broker gives.
    Sit,
    /// IPv4 in IPv4.
    Ipip,
    /// IPv4 or IPv6 in IPv6.
    Ip6tnl,
    /// GRE over IPv4.
    Gre,
    /// GRE over IPv6.
    Ip6gre,
    /// WireGuard over IPv4.
    Wireguard,
    /// A plain wire to the broker, an Ethernet device without neighbours.
    Netkit,
}

impl TunnelKind {
    /// Those that every kernel here has, for loops over them.
    pub const ALL: [Self; 3] = [Self::Tun, Self::Vxlan, Self::Veth];
    /// Those that a kernel may lack.
    pub const OPTIONAL: [Self; 7] =
        [Self::Sit, Self::Ipip, Self::Ip6tnl, Self::Gre, Self::Ip6gre, Self::Wireguard, Self::Netkit];

    /// The kernel's name for it, which `ip link` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tun => "tun",
            Self::Vxlan => "vxlan",
            Self::Veth => "veth",
            Self::Sit => "sit",
            Self::Ipip => "ipip",
            Self::Ip6tnl => "ip6tnl",
            Self::Gre => "gre",
            Self::Ip6gre => "ip6gre",
            Self::Wireguard => "wireguard",
            Self::Netkit => "netkit",
        }
    }

    /// Needs a gateway: it is an Ethernet device that asks for neighbours.
    #[must_use]
    pub const fn needs_gateway(self) -> bool {
        matches!(self, Self::Vxlan | Self::Veth)
    }

    /// The families of the packets that it carries.
    #[must_use]
    pub const fn families(self) -> &'static [Family] {
        match self {
            Self::Sit => &[Family::V6],
            Self::Ipip => &[Family::V4],
            _ => &Family::ALL,
        }
    }

    /// The family of the packets that it puts others into, where it does.
    pub(crate) const fn underlay(self) -> Family {
        match self {
            Self::Ip6tnl | Self::Ip6gre => Family::V6,
            _ => Family::V4,
        }
    }

    /// Whether this kernel has such devices: it is asked for one.
    ///
    /// # Errors
    /// There is no place to try: no root, no namespaces.
    pub fn is_available(self) -> Result<bool> {
        is_available(self.name())
    }
}

/// Whether this kernel has devices of a kind, by the name that `ip link` takes.
///
/// # Errors
/// There is no place to try: no root, no namespaces.
pub fn is_available(kind: &str) -> Result<bool> {
    let [netns] = Lab::new(Share::Others)?.netns(["try"])?;
    let parameters = match kind {
        "vrf" => "table 1",
        "sit" | "ipip" | "gre" => "local 192.0.2.1 remote 192.0.2.2",
        "ip6tnl" | "ip6gre" => "local 2001::1 remote 2001::2",
        _ => "",
    };
    match netns.ip(&format!("link add try type {kind} {parameters}")) {
        Ok(()) => Ok(true),
        // EOPNOTSUPP (`__rtnl_newlink()` in net/core/rtnetlink.c).
        Err(error)
            if ["Unknown device type", "Operation not supported"]
                .iter()
                .any(|text| format!("{error:#}").contains(text)) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Makes a tunnel between two namespaces that reach each other by the given addresses; both ends are up.
pub(crate) fn encapsulating(
    kind: TunnelKind,
    a: (End<'_>, IpAddr),
    b: (End<'_>, IpAddr),
    number: u8,
    mtu: u32,
) -> Result<()> {
    for ((end, local), (_, remote)) in [(a, b), (b, a)] {
        let options = match kind {
            TunnelKind::Vxlan => format!("id {} dstport 4789", 100 + u32::from(number)),
            TunnelKind::Ip6tnl => "mode any".to_owned(),
            TunnelKind::Sit | TunnelKind::Ipip | TunnelKind::Gre => "ttl 64".to_owned(),
            _ => String::new(),
        };
        let address = if kind.needs_gateway() { format!("address {}", end.mac) } else { String::new() };
        end.netns.ip(&format!(
            "link add {} mtu {mtu} {address} type {} local {local} remote {remote} {options}",
            end.device,
            kind.name(),
        ))?;
        ask_neighbours_often(end.netns, end.device)?;
        set_up(end)?;
    }
    Ok(())
}

/// Makes a WireGuard tunnel; both ends are up, and shake hands when the first packet comes.
pub(crate) fn wireguard(a: (End<'_>, Ipv4Addr), b: (End<'_>, Ipv4Addr), number: u8, mtu: u32) -> Result<()> {
    let port = 51820 + u16::from(number);
    let mut public = Vec::new();
    for (end, _) in [a, b] {
        let key = end.netns.dir().join(format!("{}.key", end.device));
        let script = format!("umask 077; wg genkey | tee {0} | wg pubkey", key.display());
        public.push(end.netns.run("sh", &["-c", &script]).context("wg makes no key: install wireguard-tools")?);
        end.netns.ip(&format!("link add {} mtu {mtu} type wireguard", end.device))?;
    }
    for ((end, _), (_, remote), public) in [(a, b, &public[1]), (b, a, &public[0])] {
        let key = end.netns.dir().join(format!("{}.key", end.device));
        let script = format!(
            "wg set {} listen-port {port} private-key {} peer {} endpoint {remote}:{port} allowed-ips 0.0.0.0/0,::/0",
            end.device,
            key.display(),
            public.trim()
        );
        end.netns.run("sh", &["-c", &script])?;
        set_up(end)?;
    }
    Ok(())
}
