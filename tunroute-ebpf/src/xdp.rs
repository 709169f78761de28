//! An Ethernet frame as its driver has received it, and what is done to it.

use aya_ebpf::{
    bindings::{xdp_action::XDP_PASS, xdp_md},
    helpers::generated::bpf_xdp_get_buff_len,
};
use bytemuck::Pod;
use tunroute_common::{
    decide::{Arrival, Way},
    maps::flags,
    packet::{ETHERTYPE_IPV4, Ipv4Header, Ipv6Header, Packet},
};

use crate::{
    lookup::{self, DEVICE},
    neighbour::{Addresses, Ethernet, Neighbour, resolve},
};

/// A frame of an Ethernet device. What is in further buffers (`xdp_buff_has_frags()`) is not read and does not count, and a
/// frame that has such is not redirected.
pub struct Frame {
    context: *mut xdp_md,
    data: usize,
    data_end: usize,
}

impl Frame {
    /// Looks at a frame.
    #[inline(always)]
    pub fn new(context: *mut xdp_md) -> Self {
        // SAFETY: the context that the kernel gave; the verifier knows these two for packet pointers.
        let (data, data_end) = unsafe { ((*context).data as usize, (*context).data_end as usize) };
        Self { context, data, data_end }
    }

    #[inline(always)]
    fn pointer<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.data + offset;
        (start + size_of::<T>() <= self.data_end).then_some(start as *mut T)
    }

    /// What the kernel would know of the packet, if it is for this host: [`Frame::is_for_this_host`] says whether, and is asked
    /// of the few that something is to be done to.
    #[inline(always)]
    pub fn arrival(&self) -> Option<Arrival> {
        let header = self.pointer::<Ethernet>(0)?;
        // SAFETY: within the frame, as just checked; and the context that the kernel gave.
        let (ethertype, ifindex) = unsafe { (u16::from_be((*header).ethertype), (*self.context).ingress_ifindex) };
        // A VLAN's tag stands in the place of the ethertype.
        Some(Arrival { ethertype, ifindex, to_this_host: true, tagged: false })
    }

    /// The frame is addressed to this host, at a device where something may be decided.
    #[inline(always)]
    pub fn is_for_this_host(&self, arrival: &Arrival) -> bool {
        // SAFETY: within the frame, as is checked.
        let destination = self.pointer::<Ethernet>(0).map(|header| unsafe { (*header).destination });
        destination
            .zip(lookup::station(arrival.ifindex))
            .is_some_and(|(destination, station)| destination == station.address)
    }

    /// Has the frame sent out by an exit, addressed to the next hop and with one hop less to go. Where that cannot be,
    /// nothing is changed: the device takes no frames, these are in several buffers, there is no gateway, or its address is
    /// not known.
    #[inline(always)]
    pub fn redirect(&self, arrival: &Arrival, slot: u32, way: &Way<'_>) -> Option<()> {
        // Without a gateway, each destination is a neighbour, and nobody would have the kernel ask for them again.
        if !way.exit.has(flags::TAKES_FRAMES) || !way.exit.has(flags::GATEWAY) {
            return None;
        }
        // SAFETY: the context that the kernel gave.
        let length = unsafe { bpf_xdp_get_buff_len(self.context) };
        if length != (self.data_end - self.data) as u64 {
            return None;
        }
        let header = self.pointer::<Ethernet>(0)?;
        let neighbour = resolve(self.context.cast(), arrival, self, slot, way);
        let Neighbour::Known(Addresses { destination, source }) = neighbour else { return None };
        DEVICE.redirect(way.number, XDP_PASS.into()).ok()?;
        if arrival.ethertype == ETHERTYPE_IPV4 {
            let header = self.pointer::<Ipv4Header>(size_of::<Ethernet>())?;
            // SAFETY: within the frame, as just checked; the decision has seen a TTL above 1.
            unsafe {
                (*header).checksum = (*header).checksum_after_hop();
                (*header).ttl -= 1;
            }
        } else {
            let header = self.pointer::<Ipv6Header>(size_of::<Ethernet>())?;
            // SAFETY: as above.
            unsafe { (*header).hop_limit -= 1 };
        }
        // SAFETY: as above.
        unsafe {
            (*header).destination = destination;
            (*header).source = source;
        }
        Some(())
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        let pointer = self.pointer::<T>(size_of::<Ethernet>() + offset)?;
        // SAFETY: within the frame, as just checked; BPF loads of any width may be at any address where the verifier does
        // not insist.
        Some(unsafe { pointer.read() })
    }

    #[expect(clippy::cast_possible_truncation, reason = "the length of a frame")]
    #[inline(always)]
    fn length(&self) -> u32 {
        (self.data_end - self.data).saturating_sub(size_of::<Ethernet>()) as u32
    }

    #[inline(always)]
    fn gso_size(&self) -> u32 {
        0
    }
}
