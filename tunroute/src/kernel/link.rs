//! Network devices, from netlink (`net/core/rtnetlink.c`).

use std::io;

use super::socket::{Request, attributes, push_attribute, string_of, u32_of, value};
use crate::policy::net::{Link, LinkLayer};

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
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_CONF: u16 = 2;
/// The place of the MTU among the settings in `IFLA_INET6_CONF` (`DEVCONF_MTU6` in `include/uapi/linux/ipv6.h`).
const DEVCONF_MTU6: usize = 2;
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
    let mut link = Link {
        index,
        name: String::new(),
        layer: link_layer(layer),
        kind: None,
        mtu: 0,
        mtu_v6: None,
        up: false,
        master: None,
    };
    // Whether there is a carrier says the flag. The operational state says so, too, but up to a second later, as linkwatch
    // gets round to it (`net/core/link_watch.c`), and routing does not look at it. tun and WireGuard leave it UNKNOWN.
    let up = (libc::IFF_UP | libc::IFF_LOWER_UP).cast_unsigned();
    let mut waiting = false;
    for attribute in attributes(payload, HEADER) {
        let value = value(&attribute);
        match attribute.kind() {
            IFLA_IFNAME => link.name = string_of(value),
            IFLA_MTU => link.mtu = u32_of(value)?,
            IFLA_MASTER => link.master = u32_of(value).filter(|&master| master != 0),
            IFLA_AF_SPEC => link.mtu_v6 = ipv6_mtu(value),
            IFLA_OPERSTATE => waiting = value.first().is_some_and(|state| WAITING.contains(state)),
            IFLA_LINKINFO => {
                link.kind = attributes(value, 0)
                    .find(|nested| nested.kind() == IFLA_INFO_KIND)
                    .map(|nested| string_of(super::socket::value(&nested)));
            }
            _ => {}
        }
    }
    link.up = flags & up == up && !waiting;
    Some(link)
}

/// The MTU among a device's IPv6 settings, if it has any.
fn ipv6_mtu(families: &[u8]) -> Option<u32> {
    let ipv6 = attributes(families, 0).find(|family| i32::from(family.kind()) == libc::AF_INET6)?;
    let settings = attributes(value(&ipv6), 0).find(|nested| nested.kind() == IFLA_INET6_CONF)?;
    value(&settings).chunks_exact(4).nth(DEVCONF_MTU6).and_then(u32_of)
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
