//! Network devices, from netlink (`net/core/rtnetlink.c`).

use std::io;

use super::socket::{Request, attributes, push_attribute, string_of, u32_of, value};
use crate::policy::net::{Family, Inability, Link, LinkLayer};

/// The length of `struct ifinfomsg`.
pub(super) const HEADER: usize = 16;
/// Attributes in `include/uapi/linux/if_link.h`.
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
/// Which packets a tunnel carries (`include/uapi/linux/if_tunnel.h`).
const IFLA_IPTUN_PROTO: u16 = 9;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_CONF: u16 = 2;
/// The place of the MTU among the settings in `IFLA_INET6_CONF` (`DEVCONF_MTU6` in `include/uapi/linux/ipv6.h`).
const DEVCONF_MTU6: usize = 2;
/// The place of `disable_ipv6` there.
const DEVCONF_DISABLE_IPV6: usize = 26;
/// `RTEXT_FILTER_SKIP_STATS`: counters are most of a message and of no use here.
const SKIP_STATS: u32 = 1 << 3;
/// `IF_OPER_TESTING` and `IF_OPER_DORMANT` in `include/uapi/linux/if.h`.
const WAITING: [u8; 2] = [4, 5];

/// The request for all devices.
pub(super) fn dump() -> io::Result<Request> {
    let mut payload = vec![0; HEADER];
    push_attribute(&mut payload, IFLA_EXT_MASK, &SKIP_STATS.to_ne_bytes())?;
    Ok(Request { kind: libc::RTM_GETLINK, flags: 0, payload })
}

/// Reads a device; none if it is not one.
pub(super) fn parse(payload: &[u8]) -> Option<Link> {
    let layer = u16::from_ne_bytes(payload.get(2..4)?.try_into().ok()?);
    let index = payload.get(4..8).and_then(u32_of).filter(|&index| index != 0)?;
    let flags = payload.get(8..12).and_then(u32_of)?;
    let mut link = Link { mtu: 0, ..Link::new(index, "", link_layer(layer)) };
    link.asks_neighbours &= flags & libc::IFF_NOARP.cast_unsigned() == 0;
    // Whether there is a carrier says the flag. The operational state says so, too, but up to a second later, as linkwatch
    // gets round to it (`net/core/link_watch.c`), and routing does not look at it. tun and WireGuard leave it UNKNOWN.
    let up = (libc::IFF_UP | libc::IFF_LOWER_UP).cast_unsigned();
    let mut waiting = false;
    let mut families: &[u8] = &[];
    let mut protocol = None;
    for attribute in attributes(payload, HEADER) {
        let value = value(&attribute);
        match attribute.kind() {
            IFLA_IFNAME => link.name = string_of(value),
            IFLA_MTU => link.mtu = u32_of(value)?,
            IFLA_MASTER => link.master = u32_of(value).filter(|&master| master != 0),
            IFLA_AF_SPEC => families = value,
            IFLA_OPERSTATE => waiting = value.first().is_some_and(|state| WAITING.contains(state)),
            IFLA_LINKINFO => {
                for nested in attributes(value, 0) {
                    let value = super::socket::value(&nested);
                    match nested.kind() {
                        IFLA_INFO_KIND => link.kind = Some(string_of(value)),
                        IFLA_INFO_DATA => protocol = tunnelled(value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link.up = flags & up == up && !waiting;
    let ipv6 = settings(families, Family::V6);
    let ipv6 = ipv6.and_then(|ipv6| attributes(ipv6, 0).find(|nested| nested.kind() == IFLA_INET6_CONF));
    let setting = |place| ipv6.as_ref().and_then(|ipv6| value(ipv6).chunks_exact(4).nth(place)).and_then(u32_of);
    link.mtu_v6 = setting(DEVCONF_MTU6);
    for family in Family::ALL {
        let inability = match settings(families, family) {
            None if link.mtu < family.smallest_mtu() => Inability::Mtu(link.mtu),
            None => Inability::Absent,
            Some(_) if family == Family::V6 && setting(DEVCONF_DISABLE_IPV6).is_some_and(|value| value != 0) => {
                Inability::Disabled
            }
            Some(_) if !driver_carries(link.kind.as_deref(), protocol, family) => Inability::Driver,
            Some(_) => continue,
        };
        link.unable.insert(family, inability);
    }
    Some(link)
}

/// A device's settings of a family; none if the kernel has nothing of the family on the device.
fn settings(families: &[u8], family: Family) -> Option<&[u8]> {
    let number = u16::from(u8::from(super::address_family(family)));
    attributes(families, 0).find(|settings| settings.kind() == number).map(|settings| value(&settings))
}

/// The protocol of the packets that a tunnel carries; none if it says nothing.
fn tunnelled(data: &[u8]) -> Option<u8> {
    let protocol = attributes(data, 0).find(|nested| nested.kind() == IFLA_IPTUN_PROTO)?;
    value(&protocol).first().copied()
}

/// Whether the driver sends packets of a family on (`ipip_tunnel_xmit()` in `net/ipv4/ipip.c`, `ip6_tnl_start_xmit()` in
/// `net/ipv6/ip6_tunnel.c`): it drops the others.
fn driver_carries(kind: Option<&str>, protocol: Option<u8>, family: Family) -> bool {
    let carried = match family {
        Family::V4 => libc::IPPROTO_IPIP,
        Family::V6 => libc::IPPROTO_IPV6,
    };
    match (kind, protocol) {
        (Some("ipip"), _) => family == Family::V4,
        (Some("ip6tnl"), Some(protocol)) => protocol == 0 || i32::from(protocol) == carried,
        _ => true,
    }
}

/// `ARPHRD_…` in `include/uapi/linux/if_arp.h`, sorted as `dev_is_mac_header_xmit()` in `include/linux/if_arp.h` does.
const fn link_layer(hardware: u16) -> LinkLayer {
    match hardware {
        1 => LinkLayer::Ethernet,
        // PPP, RAWIP, TUNNEL, TUNNEL6, SIT, IPGRE, PIMREG, IP6GRE, NONE, VOID
        512 | 519 | 768 | 769 | 776 | 778 | 779 | 823 | 0xfffe | 0xffff => LinkLayer::Ip,
        _ => LinkLayer::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_types() {
        for (hardware, layer) in [
            (1, LinkLayer::Ethernet),
            (0xfffe, LinkLayer::Ip),
            (776, LinkLayer::Ip),
            (772, LinkLayer::Other),
            (32, LinkLayer::Other),
        ] {
            assert_eq!(link_layer(hardware), layer, "{hardware}");
        }
    }

    /// A link message with these attributes, each with what is in it.
    fn message(mtu: u32, families: &[u8], kind: &str, protocol: u8) -> Vec<u8> {
        let nested = |attributes: &[(u16, &[u8])]| {
            let mut nested = Vec::new();
            attributes.iter().for_each(|(kind, value)| push_attribute(&mut nested, *kind, value).unwrap());
            nested
        };
        let data = nested(&[(IFLA_IPTUN_PROTO, &[protocol])]);
        let info = nested(&[(IFLA_INFO_KIND, kind.as_bytes()), (IFLA_INFO_DATA, &data)]);
        let mut message = vec![0xfe, 0xff, 0xfe, 0xff, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (kind, value) in [(IFLA_MTU, &mtu.to_ne_bytes()[..]), (IFLA_LINKINFO, &info), (IFLA_AF_SPEC, families)] {
            push_attribute(&mut message, kind, value).unwrap();
        }
        message
    }

    #[test]
    fn families_that_a_device_cannot_carry() {
        let families = |v4: bool, v6: Option<u32>| {
            let mut families = Vec::new();
            if v4 {
                push_attribute(&mut families, 2, &[]).unwrap();
            }
            if let Some(disabled) = v6 {
                let mut settings = [0; 4 * 30];
                settings[4 * DEVCONF_DISABLE_IPV6..][..4].copy_from_slice(&disabled.to_ne_bytes());
                let mut nested = Vec::new();
                push_attribute(&mut nested, IFLA_INET6_CONF, &settings).unwrap();
                push_attribute(&mut families, 10, &nested).unwrap();
            }
            families
        };
        let (v4, v6) = (Family::V4, Family::V6);
        for (mtu, has_v4, has_v6, kind, protocol, expected) in [
            (1400, true, Some(0), "tun", 0, vec![]),
            (1400, true, Some(1), "tun", 0, vec![(v6, Inability::Disabled)]),
            (1200, true, None, "tun", 0, vec![(v6, Inability::Mtu(1200))]),
            (60, false, None, "tun", 0, vec![(v4, Inability::Mtu(60)), (v6, Inability::Mtu(60))]),
            (1400, true, None, "tun", 0, vec![(v6, Inability::Absent)]),
            (1400, true, Some(0), "ipip", 4, vec![(v6, Inability::Driver)]),
            (1400, true, Some(0), "ip6tnl", 41, vec![(v4, Inability::Driver)]),
            (1400, true, Some(0), "ip6tnl", 4, vec![(v6, Inability::Driver)]),
            (1400, true, Some(0), "ip6tnl", 0, vec![]),
            (1400, true, Some(0), "gre", 47, vec![]),
        ] {
            let link = parse(&message(mtu, &families(has_v4, has_v6), kind, protocol)).unwrap();
            assert_eq!(Vec::from_iter(link.unable), expected, "{kind} {protocol}, MTU {mtu}");
        }
    }

    #[test]
    fn truncated_messages_are_no_devices() {
        let whole = [0, 0, 1, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 4, 0, 220, 5, 0, 0];
        for length in 0..whole.len() {
            let link = parse(&whole[..length]);
            assert!(link.is_none_or(|link| link.mtu == 0), "{length}");
        }
        assert_eq!(parse(&whole).map(|link| link.mtu), Some(1500));
    }
}
