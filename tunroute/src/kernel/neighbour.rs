//! Neighbours, over netlink (`net/core/neighbour.c`).

use std::{io, net::IpAddr};

use super::{
    address_family,
    socket::{Request, Socket, push_attribute},
};
use crate::policy::net::{Family, IfIndex};

/// `NDA_DST` in `include/uapi/linux/neighbour.h`.
const NDA_DST: u16 = 1;
/// `NUD_STALE`: its address is known, and not whether it is still there.
const STALE: u16 = 4;
/// `NTF_USE`: as if a packet had just been sent to it.
const USE: u8 = 1;
/// Where the state stands in `struct ndmsg`.
const STATE: std::ops::Range<usize> = 8..10;

/// Has the kernel ask a neighbour, of which it does not know any more whether it is there, as it would if it sent packets
/// there itself. Others are left alone: one that somebody has entered for good would lose that.
pub(super) fn refresh(socket: &mut Socket, device: IfIndex, address: IpAddr) -> io::Result<()> {
    let Ok(known) = socket.ask(&request(libc::RTM_GETNEIGH, device, address, 0)?)? else { return Ok(()) };
    let state = known.get(STATE).and_then(|state| state.try_into().ok()).map(u16::from_ne_bytes);
    if state == Some(STALE) {
        // It may have gone meanwhile.
        let _refused = socket.transact(&[request(libc::RTM_NEWNEIGH, device, address, USE)?])?;
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
