//! The addressing plan of [`crate::World`], as constants.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tunroute::policy::net::Family;

use crate::device::Mac;

/// A thing for each address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dual<V4, V6> {
    /// The one for IPv4.
    pub v4: V4,
    /// The one for IPv6.
    pub v6: V6,
}

/// An address in each family.
pub type Addrs = Dual<Ipv4Addr, Ipv6Addr>;
/// A prefix in each family.
pub type Nets = Dual<Ipv4Net, Ipv6Net>;

impl Addrs {
    /// The address in one family.
    #[must_use]
    pub const fn of(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }
}

impl Nets {
    /// The prefix in one family.
    #[must_use]
    pub const fn of(&self, family: Family) -> IpNet {
        match family {
            Family::V4 => IpNet::V4(self.v4),
            Family::V6 => IpNet::V6(self.v6),
        }
    }
}

const fn addrs(v4: [u8; 4], v6: [u16; 8]) -> Addrs {
    let [a, b, c, d] = v4;
    let [s, t, u, v, w, x, y, z] = v6;
    Dual { v4: Ipv4Addr::new(a, b, c, d), v6: Ipv6Addr::new(s, t, u, v, w, x, y, z) }
}

const fn nets(addrs: Addrs, v4: u8, v6: u8) -> Nets {
    Dual { v4: Ipv4Net::new_assert(addrs.v4, v4), v6: Ipv6Net::new_assert(addrs.v6, v6) }
}

/// One tunnel of the host, with the addresses that belong to it.
#[derive(Clone, Copy, Debug)]
pub struct TunnelPlan {
    /// The device's name, in `host` and in its broker.
    pub device: &'static str,
    /// The host's own address on it.
    pub host: Addrs,
    /// The broker's address on it: the gateway, where the tunnel is an Ethernet device.
    pub gateway: Addrs,
    /// The prefix routed to the host through it.
    pub prefix: Nets,
    /// The client's address in that prefix.
    pub client: Addrs,
    /// The host's address in that prefix, on `lan0`.
    pub lan: Addrs,
    /// The device of `remote` where its packets arrive.
    pub remote_device: &'static str,
    /// The broker's address on its link to `isp`: the far end of tunnels that encapsulate.
    pub underlay: Addrs,
}

/// The two tunnels.
pub const TUNNELS: [TunnelPlan; 2] = [
    TunnelPlan {
        device: "sixxs0",
        host: addrs([198, 51, 100, 1], [0x2a02, 0, 0, 0, 0, 0, 0, 1]),
        gateway: addrs([198, 51, 100, 254], [0x2a02, 0, 0, 0, 0, 0, 0, 0xb0]),
        prefix: nets(addrs([10, 0, 0, 0], [0x2a02, 0x578, 0x85a0, 0, 0, 0, 0, 0]), 16, 48),
        client: addrs([10, 0, 0, 2], [0x2a02, 0x578, 0x85a0, 0, 0, 0, 0, 2]),
        lan: addrs([10, 0, 0, 1], [0x2a02, 0x578, 0x85a0, 0, 0, 0, 0, 1]),
        remote_device: "via-b0",
        underlay: addrs([192, 0, 2, 66], [0x2001, 0xdb8, 0xf, 3, 0, 0, 0, 2]),
    },
    TunnelPlan {
        device: "sixxs1",
        host: addrs([203, 0, 113, 1], [0x2a02, 0, 0, 0, 0, 0, 0, 2]),
        gateway: addrs([203, 0, 113, 254], [0x2a02, 0, 0, 0, 0, 0, 0, 0xb1]),
        prefix: nets(addrs([10, 1, 0, 0], [0x2a02, 0x578, 0x85a1, 0, 0, 0, 0, 0]), 16, 48),
        client: addrs([10, 1, 0, 2], [0x2a02, 0x578, 0x85a1, 0, 0, 0, 0, 2]),
        lan: addrs([10, 1, 0, 1], [0x2a02, 0x578, 0x85a1, 0, 0, 0, 0, 1]),
        remote_device: "via-b1",
        underlay: addrs([192, 0, 2, 70], [0x2001, 0xdb8, 0xf, 4, 0, 0, 0, 2]),
    },
];

/// The host's address on `net0`.
pub const HOST: Addrs = addrs([192, 0, 2, 1], [0x2001, 0, 0, 0, 0, 0, 0, 1]);
/// The ISP's address on `net0`: the host's default gateway.
pub const ISP: Addrs = addrs([192, 0, 2, 2], [0x2001, 0, 0, 0, 0, 0, 0, 0xff]);
/// The link `net0`.
pub const UPLINK: Nets = nets(addrs([192, 0, 2, 0], [0x2001, 0, 0, 0, 0, 0, 0, 0]), 30, 64);
/// The prefix of the client network that belongs to the ISP: no policy is for it.
pub const PLAIN: Nets = nets(addrs([10, 9, 0, 0], [0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 0]), 24, 64);
/// The client's address that belongs to the ISP.
pub const PLAIN_CLIENT: Addrs = addrs([10, 9, 0, 2], [0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 2]);
/// The host's address in [`PLAIN`], on `lan0`: the client's default gateway.
pub const PLAIN_LAN: Addrs = addrs([10, 9, 0, 1], [0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1]);
/// The host on the internet.
pub const REMOTE: Addrs = addrs([198, 18, 0, 1], [0x2001, 0xdb8, 0xee, 0, 0, 0, 0, 1]);
/// The device of `remote` where the ISP's packets arrive.
pub const REMOTE_ISP_DEVICE: &str = "via-isp";

/// The MAC address of one side of a link of the world.
const fn mac(link: u8, side: u8) -> Mac {
    Mac([0x02, 0, 0, 0, link, side])
}

/// `lan0` of the client.
pub const MAC_CLIENT: Mac = mac(1, 1);
/// `lan0` of the host.
pub const MAC_LAN: Mac = mac(1, 2);
/// `net0` of the host.
pub const MAC_HOST: Mac = mac(2, 1);
/// `net0` of the ISP.
pub const MAC_ISP: Mac = mac(2, 2);

/// The host's side of a tunnel, where it is an Ethernet device.
#[must_use]
pub const fn mac_tunnel(index: u8) -> Mac {
    mac(0x10 + index, 1)
}

/// The broker's side of a tunnel, where it is an Ethernet device.
#[must_use]
pub const fn mac_broker(index: u8) -> Mac {
    mac(0x10 + index, 2)
}

/// One of the links among `isp`, the brokers and `remote`.
pub(crate) const fn mac_wire(link: u8, side: u8) -> Mac {
    mac(0x20 + link, side)
}
