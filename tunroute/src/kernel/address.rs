//! The devices' addresses, from netlink (`net/ipv4/devinet.c`, `net/ipv6/addrconf.c`).

use super::{
    address_family,
    route::address,
    socket::{Request, attributes, u32_of, value},
};
use crate::policy::net::{Address, Family};

/// The length of `struct ifaddrmsg`.
const HEADER: usize = 8;
/// Attributes in `include/uapi/linux/if_addr.h`.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// The request for all addresses of a family.
pub(super) fn dump(family: Family) -> Request {
    let mut payload = vec![0; HEADER];
    payload[0] = u8::from(address_family(family));
    Request { kind: libc::RTM_GETADDR, flags: 0, payload }
}

/// Reads an address; none if it is not one of this family.
pub(super) fn parse(family: Family, payload: &[u8]) -> Option<Address> {
    if *payload.first()? != u8::from(address_family(family)) {
        return None;
    }
    let device = payload.get(4..HEADER).and_then(u32_of)?;
    let mut local = None;
    let mut other = None;
    for attribute in attributes(payload, HEADER) {
        match attribute.kind() {
            IFA_LOCAL => local = address(family, value(&attribute)),
            IFA_ADDRESS => other = address(family, value(&attribute)),
            _ => {}
        }
    }
    // IPv6 names the address alone; with IFA_LOCAL, IFA_ADDRESS is the peer's, or the same.
    let own = local.or(other)?;
    Some(Address { device, own, peer: other.filter(|other| *other != own) })
}
