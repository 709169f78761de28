//! Neighbours, over netlink (`net/core/neighbour.c`).

use std::{io, net::IpAddr};

use super::{
    address_family,
    socket::{Request, Socket, push_attribute},
};
use crate::policy::net::{Family, IfIndex};

/// `NDA_DST` in `include/uapi/linux/neighbour.h`.
const NDA_DST: u16 = 1;
/// The states in which the kernel does not know whether a neighbour is there, and does nothing about it: `NUD_NONE`,
/// `NUD_STALE` and `NUD_FAILED`.
const UNCERTAIN: [u16; 3] = [0, 0x04, 0x20];
/// `NLM_F_CREATE`
const CREATE: u16 = 0x400;
/// `NTF_USE`: as if a packet had just been sent to it.
const USE: u8 = 1;
/// Where the state stands in `struct ndmsg`.
const STATE: std::ops::Range<usize> = 8..10;

/// Has the kernel ask for a neighbour of which it does not know whether it is there, as it would if it sent packets there
/// itself. Others are left alone: one that somebody has entered for good would lose that.
pub(super) fn refresh(socket: &mut Socket, device: IfIndex, address: IpAddr) -> io::Result<()> {
    let known = socket.ask(&request(libc::RTM_GETNEIGH, device, address, 0)?)?;
    let known = known.ok().and_then(|known| Some(u16::from_ne_bytes(known.get(STATE)?.try_into().ok()?)));
    if known.is_none_or(|state| UNCERTAIN.contains(&state)) {
        // The device may have gone meanwhile.
        let request = Request { flags: CREATE, ..request(libc::RTM_NEWNEIGH, device, address, USE)? };
        let _refused = socket.transact(&[request])?;
    }
    Ok(())
}

fn request(kind: u16, device: IfIndex, address: IpAddr, flags: u8) -> io::Result<Request> {
    let family = u8::from(address_family(Family::of_addr(&address)));
    let mut payload = vec![family, 0, 0, 0];
    payload.extend(device.to_ne_bytes());
    payload.extend([0, 0, flags, 0]);
    match address {
        IpAddr::V4(address) => push_attribute(&mut payload, NDA_DST, &address.octets())?,
        IpAddr::V6(address) => push_attribute(&mut payload, NDA_DST, &address.octets())?,
    }
    Ok(Request { kind, flags: 0, payload })
}
