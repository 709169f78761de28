//! Routes, to and from netlink (`net/ipv4/fib_frontend.c`, `net/ipv6/route.c`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::{
    packet_core::Emitable,
    packet_route::route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
    },
};

use super::{
    address_family,
    socket::{Request, attributes, u32_of, value},
};
use crate::policy::net::{Family, IfIndex, MainRoute, PROTOCOL, Route, RouteKind, TableName};

/// Who puts an address's network on the link: the kernel, a router's advertisement, and DHCP clients.
///
/// `RTPROT_KERNEL`, `RTPROT_RA` and `RTPROT_DHCP` in `include/uapi/linux/rtnetlink.h`.
const NETWORK_PROTOCOLS: [u8; 3] = [libc::RTPROT_KERNEL, 9, 16];
/// The length of `struct rtmsg`.
pub(super) const HEADER: usize = 12;
/// `RTA_VIA` and `RTA_PREF` in `include/uapi/linux/rtnetlink.h`.
pub(super) const RTA_VIA: u16 = 18;
const RTA_PREF: u16 = 20;

/// The payload of the message that makes a route.
pub(super) fn message(route: &Route) -> Vec<u8> {
    let family = Family::of(&route.dst);
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: address_family(family),
        destination_prefix_length: route.dst.prefix_len(),
        // Larger tables are named by the attribute alone.
        table: u8::try_from(route.table).unwrap_or(0),
        protocol: RouteProtocol::Other(PROTOCOL),
        scope: RouteScope::Universe,
        kind: match route.kind {
            RouteKind::Unicast { .. } => RouteType::Unicast,
            RouteKind::Throw => RouteType::Throw,
            RouteKind::Unreachable => RouteType::Unreachable,
            RouteKind::Blackhole => RouteType::BlackHole,
            RouteKind::Prohibit => RouteType::Prohibit,
        },
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Table(route.table)];
    if route.dst.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(route.dst.addr().into()));
    }
    if route.metric != family.default_metric() {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    if let RouteKind::Unicast { oif, gateway, .. } = &route.kind {
        message.attributes.push(RouteAttribute::Oif(*oif));
        match gateway {
            Some(gateway) => {
                // The gateway need not be covered by an address of the tunnel.
                message.header.flags = RouteFlags::Onlink;
                message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(*gateway)));
            }
            // `fib_check_nh_nongw()` in `net/ipv4/fib_semantics.c`; IPv6 has no scopes.
            None if family == Family::V4 => message.header.scope = RouteScope::Link,
            None => {}
        }
    }
    let mut payload = vec![0; message.buffer_len()];
    message.emit(&mut payload);
    payload
}

/// The request for all routes of a family.
pub(super) fn dump(family: Family) -> Request {
    let header = RouteHeader { address_family: address_family(family), ..RouteHeader::default() };
    let mut payload = vec![0; HEADER];
    header.emit(&mut payload);
    Request { kind: libc::RTM_GETROUTE, flags: 0, payload }
}

/// A route as far as it matters here, read without allocating: there may be a million of them.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) family: Family,
    pub(super) table: u32,
    pub(super) dst: IpNet,
    pub(super) kind: RouteType,
    pub(super) ours: bool,
    metric: u32,
    protocol: u8,
    oif: Option<IfIndex>,
    /// The devices of several next hops.
    hops: Vec<IfIndex>,
    gateway: Option<IpAddr>,
    on_link_flag: bool,
    /// An IPv6 gateway of an IPv4 route (RFC 8950).
    gateway_v6: Option<IpAddr>,
    /// There are several next hops.
    several_hops: bool,
    /// Has something that tunroute does not write.
    other: bool,
}

impl Seen {
    /// Reads a route; none if it is a cached exception, of another family, or not a route at all.
    pub(super) fn parse(payload: &[u8]) -> Option<Self> {
        let header = RouteHeader::parse(payload).ok()?;
        let family = match header.address_family {
            family if family == address_family(Family::V4) => Family::V4,
            family if family == address_family(Family::V6) => Family::V6,
            _ => return None,
        };
        if header.flags.contains(RouteFlags::Cloned) {
            return None;
        }
        let length = header.destination_prefix_length;
        let mut seen = Self {
            family,
            table: u32::from(header.table),
            dst: family.default_prefix(),
            kind: header.kind,
            ours: u8::from(header.protocol) == PROTOCOL,
            metric: 0,
            protocol: header.protocol.into(),
            oif: None,
            hops: Vec::new(),
            gateway: None,
            on_link_flag: header.flags.contains(RouteFlags::Onlink),
            gateway_v6: None,
            several_hops: false,
            other: header.tos != 0 || header.source_prefix_length != 0,
        };
        let mut destination = None;
        for attribute in attributes(payload, HEADER) {
            let value = value(&attribute);
            match attribute.kind() {
                libc::RTA_TABLE => seen.table = u32_of(value)?,
                libc::RTA_DST => destination = Some(address(family, value)?),
                libc::RTA_PRIORITY => seen.metric = u32_of(value)?,
                libc::RTA_OIF => seen.oif = u32_of(value),
                libc::RTA_GATEWAY => seen.gateway = address(family, value),
                // A family before the address (`struct rtvia`).
                RTA_VIA => seen.gateway_v6 = Some(address(Family::V6, value.get(2..)?)?),
                libc::RTA_MULTIPATH => {
                    seen.several_hops = true;
                    seen.hops = devices(value);
                }
                // Ages and the like, there for every IPv6 route; and the device that was asked about.
                libc::RTA_CACHEINFO | libc::RTA_IIF => {}
                // `ICMPV6_ROUTER_PREF_MEDIUM`: the default.
                RTA_PREF if value == [0] => {}
                _ => seen.other = true,
            }
        }
        seen.dst = match destination {
            Some(address) => IpNet::new(address, length).ok()?.trunc(),
            None if length == 0 => seen.dst,
            None => return None,
        };
        Some(seen)
    }

    /// See [`Route::key`].
    pub(super) const fn key(&self) -> (u32, IpNet, u32) {
        (self.table, self.dst, self.metric)
    }

    /// The route as tunroute writes it; none if it has anything else. `name` names devices.
    pub(super) fn route(&self, name: &dyn Fn(IfIndex) -> String) -> Option<Route> {
        if !self.ours || self.other || self.several_hops || self.gateway_v6.is_some() {
            return None;
        }
        let kind = match self.kind {
            RouteType::Unicast if self.on_link_flag == self.gateway.is_some() => {
                let oif = self.oif?;
                RouteKind::Unicast { oif, device: name(oif), gateway: self.gateway }
            }
            // IPv6 reports these with the loopback device.
            _ if self.gateway.is_some() => return None,
            RouteType::Throw => RouteKind::Throw,
            RouteType::Unreachable => RouteKind::Unreachable,
            RouteType::BlackHole => RouteKind::Blackhole,
            RouteType::Prohibit => RouteKind::Prohibit,
            _ => return None,
        };
        Some(Route { table: self.table, dst: self.dst, metric: self.metric, kind })
    }

    /// In `ip route` syntax.
    pub(super) fn text(&self, name: &dyn Fn(IfIndex) -> String) -> String {
        if let Some(route) = self.route(name) {
            return route.to_string();
        }
        let mut text = match self.kind {
            RouteType::Unicast => String::new(),
            kind => format!("{kind:?} ").to_lowercase(),
        };
        text.push_str(&if self.dst.prefix_len() == 0 { "default".to_owned() } else { self.dst.to_string() });
        if let Some(gateway) = self.gateway {
            text.push_str(&format!(" via {gateway}"));
        }
        if let Some(gateway) = self.gateway_v6 {
            text.push_str(&format!(" via inet6 {gateway}"));
        }
        if let Some(oif) = self.oif {
            text.push_str(&format!(" dev {}", name(oif)));
        }
        if self.several_hops {
            text.push_str(" [several next hops]");
        }
        text.push_str(&format!(" table {} metric {}", TableName(self.table), self.metric));
        if self.ours {
            text.push_str(&format!(" protocol {PROTOCOL}"));
        }
        if self.other {
            text.push_str(" [and more]");
        }
        text
    }

    /// The route as the main table's readers need it; only for unicast routes.
    pub(super) fn main_route(&self) -> MainRoute {
        let on_link = !self.several_hops && self.gateway.or(self.gateway_v6).is_none() && self.oif.is_some();
        MainRoute {
            dst: self.dst,
            metric: self.metric,
            oif: self.oif.filter(|_| !self.several_hops),
            hops: self.hops.clone(),
            on_link,
            network: on_link && NETWORK_PROTOCOLS.contains(&self.protocol),
        }
    }
}

/// The devices in a list of `struct rtnexthop`, each of which says how long it is, with what follows it.
fn devices(mut hops: &[u8]) -> Vec<IfIndex> {
    let mut devices = Vec::new();
    while let [a, b, _, _, ifindex @ ..] = hops
        && let Some(ifindex) = ifindex.first_chunk()
    {
        devices.push(IfIndex::from_ne_bytes(*ifindex));
        let length = usize::from(u16::from_ne_bytes([*a, *b])).max(8).next_multiple_of(4);
        hops = hops.get(length..).unwrap_or_default();
    }
    devices
}

pub(super) fn address(family: Family, value: &[u8]) -> Option<IpAddr> {
    Some(match family {
        Family::V4 => Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into(),
        Family::V6 => Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into(),
    })
}
