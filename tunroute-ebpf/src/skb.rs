//! An skb as a [`Packet`], and what is done to it.
#![expect(
    clippy::cast_possible_truncation,
    reason = "lengths of headers, and helpers that return small numbers in a wide register"
)]

use core::{
    mem::{MaybeUninit, offset_of},
    ptr,
};

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_skb_change_head,
        bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use aya_log_ebpf::warn;
use bytemuck::Pod;
use tunroute_common::{
    decide::{Arrival, NextHop, Way},
    maps::flags,
    mss::Change,
    packet::{ETHERTYPE_IPV4, Ipv4Header, Ipv6Header, Packet},
};

use crate::{
    lookup::{AF_INET, AF_INET6, asks_kernel},
    neighbour::{Addresses, Ethernet, Neighbour, resolve},
};

/// `PACKET_HOST` in `include/uapi/linux/if_packet.h`.
const PACKET_HOST: u32 = 0;
/// Bytes of headers that the decision reads: an IPv6 header and TCP's data offset.
const HEADERS: usize = size_of::<Ipv6Header>() + 13;

/// An skb whose network header is at `OFFSET`.
pub struct Skb<const OFFSET: usize> {
    skb: *mut __sk_buff,
    data: usize,
    data_end: usize,
}

impl<const OFFSET: usize> Skb<OFFSET> {
    /// Looks at an skb; if its headers are in fragments, pulls them up first.
    #[inline(always)]
    pub fn new(skb: *mut __sk_buff) -> Self {
        let packet = Self::view(skb);
        let length = packet.total_length().min((OFFSET + HEADERS) as u32);
        if packet.data + length as usize <= packet.data_end {
            return packet;
        }
        // SAFETY: the context that the kernel gave. Failure leaves the view short, which reading notices.
        unsafe { bpf_skb_pull_data(skb, length) };
        Self::view(skb)
    }

    #[inline(always)]
    fn view(skb: *mut __sk_buff) -> Self {
        // SAFETY: the context that the kernel gave; the verifier knows these two for packet pointers.
        let (data, data_end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
        Self { skb, data, data_end }
    }

    #[inline(always)]
    fn total_length(&self) -> u32 {
        // SAFETY: the context that the kernel gave.
        unsafe { (*self.skb).len }
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        // SAFETY: the context that the kernel gave. The field holds a 16-bit number in network byte order.
        u16::from_be(unsafe { (*self.skb).protocol } as u16)
    }

    #[inline(always)]
    fn pointer<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.data + OFFSET + offset;
        (start + size_of::<T>() <= self.data_end).then_some(start as *mut T)
    }

    /// What the kernel knows of the packet.
    #[inline(always)]
    pub fn arrival(&self) -> Arrival {
        // SAFETY: the context that the kernel gave.
        let (ifindex, pkt_type, vlan) =
            unsafe { ((*self.skb).ifindex, (*self.skb).pkt_type, (*self.skb).vlan_present) };
        Arrival { ethertype: self.ethertype(), ifindex, to_this_host: pkt_type == PACKET_HOST, tagged: vlan != 0 }
    }

    /// Takes one from the hop limit, as a router does.
    #[inline(always)]
    pub fn take_hop(&self) -> Option<()> {
        if self.ethertype() == ETHERTYPE_IPV4 {
            let header = self.pointer::<Ipv4Header>(0)?;
            // SAFETY: within the packet, as just checked; the decision has seen a TTL above 1.
            unsafe {
                (*header).checksum = (*header).checksum_after_hop();
                (*header).ttl -= 1;
            }
        } else {
            // The hop limit is the second byte of a 16-bit word of the checksum: less 1, which is plus the complement.
            const MINUS_ONE: u32 = !1u16.to_be() as u32;
            let header = self.pointer::<Ipv6Header>(0)?;
            // SAFETY: as above. The checksum of the whole packet, where the card has computed one, is kept true; the
            // helper refuses where there is none.
            unsafe {
                (*header).hop_limit -= 1;
                bpf_csum_update(self.skb, MINUS_ONE);
            }
        }
        Some(())
    }

    /// What the kernel says of the packet's next hop by an exit of a slot's.
    #[inline(always)]
    pub fn neighbour(&self, arrival: &Arrival, slot: u32, way: &Way<'_>) -> Neighbour {
        if way.exit.has(flags::ETHERNET) && asks_kernel() {
            resolve(self.skb.cast(), arrival, self, slot, way)
        } else {
            Neighbour::Untold
        }
    }

    /// Sends the packet out by an exit: as a frame where the next hop's address is known, else the kernel looks for it. The
    /// packet is dropped if it cannot be sent.
    #[inline(always)]
    pub fn redirect(&self, way: &Way<'_>, neighbour: &Neighbour) -> i32 {
        if !way.exit.has(flags::ETHERNET) {
            // SAFETY: a number and flags.
            return unsafe { bpf_redirect(way.ifindex, 0) } as i32;
        }
        // The kernel asks again for neighbours that it sends to itself; the daemon has it ask for gateways alone.
        if let Neighbour::Known(addresses) = neighbour
            && way.exit.has(flags::GATEWAY)
        {
            return self.send(way.ifindex, addresses);
        }
        match self.next_hop(way) {
            Some(next_hop) => self.hand_over(way.ifindex, next_hop),
            None => TC_ACT_SHOT,
        }
    }

    /// Sends the packet as a frame.
    #[inline(always)]
    fn send(&self, ifindex: u32, addresses: &Addresses) -> i32 {
        if !self.make_room(ifindex) {
            return TC_ACT_SHOT;
        }
        let Self { data, data_end, .. } = if OFFSET == 0 { Self::view(self.skb) } else { Self { ..*self } };
        if data + size_of::<Ethernet>() > data_end {
            return TC_ACT_SHOT;
        }
        let header = data as *mut Ethernet;
        // SAFETY: within the packet, as just checked; the context that the kernel gave; a number and flags.
        unsafe {
            (*header).destination = addresses.destination;
            (*header).source = addresses.source;
            (*header).ethertype = (*self.skb).protocol as u16;
            bpf_redirect(ifindex, 0) as i32
        }
    }

    /// Makes room for an Ethernet header where there is none. Returns false, and says so, if that cannot be.
    #[inline(always)]
    fn make_room(&self, ifindex: u32) -> bool {
        // SAFETY: the context that the kernel gave.
        if OFFSET == 0 && unsafe { bpf_skb_change_head(self.skb, size_of::<Ethernet>() as u32, 0) } != 0 {
            let context = TcContext::new(self.skb);
            warn!(&context, "no room for an Ethernet header towards ifindex {}: dropped", ifindex);
            return false;
        }
        true
    }

    /// Sends the packet to its next hop, by a device of any kind; it is dropped if it cannot be.
    #[inline(always)]
    pub fn forward(&self, next_hop: &NextHop) -> i32 {
        let nh_family = u32::from(if next_hop.is_v6 { AF_INET6 } else { AF_INET });
        let address = bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: next_hop.address };
        self.hand_over(next_hop.ifindex, bpf_redir_neigh { nh_family, __bindgen_anon_1: address })
    }

    #[inline(always)]
    fn hand_over(&self, ifindex: u32, mut next_hop: bpf_redir_neigh) -> i32 {
        // `bpf_redirect_neigh` takes the link-layer header for granted (`__bpf_redirect_neigh()` in
        // `net/core/filter.c`).
        if !self.make_room(ifindex) {
            return TC_ACT_SHOT;
        }
        // SAFETY: a parameter block of the given size.
        unsafe {
            bpf_redirect_neigh(ifindex, ptr::from_mut(&mut next_hop), size_of::<bpf_redir_neigh>() as i32, 0) as i32
        }
    }

    /// The gateway, or the destination itself: a tunnel's default route makes every destination its neighbour.
    #[inline(always)]
    fn next_hop(&self, way: &Way<'_>) -> Option<bpf_redir_neigh> {
        let gateway = way.exit.has(flags::GATEWAY).then_some(way.exit.gateway);
        let (nh_family, hop) = if self.ethertype() == ETHERTYPE_IPV4 {
            let hop = match gateway {
                Some([first, ..]) => first,
                None => self.read(offset_of!(Ipv4Header, destination))?,
            };
            (u32::from(AF_INET), [hop, 0, 0, 0])
        } else {
            let hop = match gateway {
                Some(gateway) => gateway,
                None => self.read(offset_of!(Ipv6Header, destination))?,
            };
            (u32::from(AF_INET6), hop)
        };
        Some(bpf_redir_neigh { nh_family, __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: hop } })
    }
}

impl<const OFFSET: usize> Packet for Skb<OFFSET> {
    #[inline(always)]
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        let pointer = self.pointer::<T>(offset)?;
        // SAFETY: within the packet, as just checked. The packet need not be aligned: BPF loads of any width may be at
        // any address where the verifier does not insist, and on those machines the kernel aligns network headers.
        Some(unsafe { pointer.read() })
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.total_length().saturating_sub(OFFSET as u32)
    }

    #[inline(always)]
    fn gso_size(&self) -> u32 {
        // SAFETY: the context that the kernel gave.
        unsafe { (*self.skb).gso_size }
    }
}

/// An skb that is read by a helper: at any offset, which the verifier need not follow.
pub struct Loaded {
    skb: *mut __sk_buff,
    /// Where the network header is.
    start: usize,
}

impl Loaded {
    /// An skb whose network header starts there.
    #[inline(always)]
    pub const fn new(skb: *mut __sk_buff, start: usize) -> Self {
        Self { skb, start }
    }

    /// The device at which the packet is seen.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: the context that the kernel gave.
        unsafe { (*self.skb).ifindex }
    }

    /// The ethertype, in host byte order.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        // SAFETY: the context that the kernel gave. The field holds a 16-bit number in network byte order.
        u16::from_be(unsafe { (*self.skb).protocol } as u16)
    }

    /// Makes a change. The checksum is left alone where the card or the stack has yet to compute it.
    #[inline(always)]
    pub fn change(&self, change: &Change) {
        let mut value = change.value;
        let (lost, gained) = change.words;
        let place = |offset: usize| (self.start + offset) as u32;
        // SAFETY: the context that the kernel gave, and two bytes that live until the call returns. The helpers look at
        // the packet's length themselves; what the first could write to, the second can, too.
        unsafe {
            if bpf_skb_store_bytes(self.skb, place(change.at), ptr::from_mut(&mut value).cast(), 2, 0) == 0 {
                bpf_l4_csum_replace(self.skb, place(change.checksum), lost.into(), gained.into(), 2);
            }
        }
    }
}

impl Packet for Loaded {
    #[inline(always)]
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let (to, size) = (value.as_mut_ptr().cast(), size_of::<T>() as u32);
        // SAFETY: the context that the kernel gave, and as many bytes as are said. The helper fills all of them or fails;
        // every bit pattern is a `T`.
        unsafe {
            (bpf_skb_load_bytes(self.skb.cast(), (self.start + offset) as u32, to, size) == 0)
                .then(|| value.assume_init())
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context that the kernel gave.
        unsafe { (*self.skb).len }.saturating_sub(self.start as u32)
    }

    #[inline(always)]
    fn gso_size(&self) -> u32 {
        // SAFETY: the context that the kernel gave.
        unsafe { (*self.skb).gso_size }
    }
}
