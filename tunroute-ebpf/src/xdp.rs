//! An Ethernet frame as its driver has received it, and what is done to it.

use core::ptr;

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_DIRECT, BPF_FIB_LOOKUP_TBID, bpf_fib_lookup, xdp_action::XDP_PASS,
        xdp_md,
    },
    helpers::generated::{bpf_fib_lookup as look_up_neighbour, bpf_ktime_get_coarse_ns, bpf_xdp_get_buff_len},
    macros::map,
    maps::{DevMapHash, PerCpuArray},
};
use bytemuck::Pod;
use tunroute_common::{
    decide::Arrival,
    maps::{Ipv6, MAX_SLOTS, MAX_XDP_DEVICES, Slot, flags},
    packet::{ETHERTYPE_IPV4, Ipv4Header, Ipv6Header, Packet},
};

use crate::lookup::{self, AF_INET, AF_INET6};

/// The tunnels that take frames, by their devices' numbers. The kernel takes a device out when it goes away.
#[map]
static TARGET: DevMapHash = DevMapHash::pinned(MAX_XDP_DEVICES, 0);

/// The slots' gateways, as the kernel has told them last, on each CPU.
#[map]
static NEXT_HOP: PerCpuArray<NextHop> = PerCpuArray::with_max_entries(MAX_SLOTS, 0);
/// For so many nanoseconds the kernel is not asked again: some ticks. To ask takes longer than all the rest.
const FRESH: u64 = 10_000_000;

/// A slot's next hop.
#[repr(C)]
#[derive(Clone, Copy)]
struct NextHop {
    /// `CLOCK_MONOTONIC` in nanoseconds until which it is taken for true.
    until: u64,
    /// The slot's device and gateway at that time.
    egress: u64,
    gateway: Ipv6,
    addresses: Addresses,
}

/// Link-layer addresses: the next hop's, and that of the device which leads there.
#[derive(Clone, Copy)]
struct Addresses {
    destination: [u16; 3],
    source: [u16; 3],
}

/// An Ethernet header.
#[repr(C)]
struct Ethernet {
    destination: [u16; 3],
    source: [u16; 3],
    /// In network byte order.
    ethertype: u16,
}

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

    /// Has the frame sent out of the slot's device, addressed to the next hop and with one hop less to go. Where that cannot
    /// be, nothing is changed: the device takes no frames, these are in several buffers, there is no gateway, or its address is
    /// not known.
    #[inline(always)]
    pub fn redirect(&self, arrival: &Arrival, index: u32, slot: &Slot) -> Option<()> {
        // SAFETY: the context that the kernel gave.
        let length = unsafe { bpf_xdp_get_buff_len(self.context) };
        if length != (self.data_end - self.data) as u64 {
            return None;
        }
        let header = self.pointer::<Ethernet>(0)?;
        let Addresses { destination, source } = self.next_hop(arrival, index, slot)?;
        TARGET.redirect(slot.egress.ifindex(), XDP_PASS.into()).ok()?;
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

    /// The addresses of the gateway, as they were a moment ago.
    #[inline(always)]
    fn next_hop(&self, arrival: &Arrival, index: u32, slot: &Slot) -> Option<Addresses> {
        // Without one, each destination is a neighbour, and nobody would have the kernel ask for them again.
        if !slot.egress.has(flags::GATEWAY) {
            return None;
        }
        let known = NEXT_HOP.get_ptr_mut(index)?;
        // SAFETY: the map's value of this CPU; programs on one CPU do not interrupt one another here.
        let known = unsafe { &mut *known };
        // SAFETY: reads a clock.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        let egress = slot.egress.ifindex().into();
        if now >= known.until || egress != known.egress || slot.gateway != known.gateway {
            let addresses = self.ask(arrival, slot)?;
            *known = NextHop { until: now + FRESH, egress, gateway: slot.gateway, addresses };
        }
        Some(known.addresses)
    }

    /// Asks the kernel for them, by the route of the policy's table (`BPF_FIB_LOOKUP_TBID`, from Linux 6.5 on), which must
    /// say the same as the slot.
    #[expect(clippy::cast_possible_truncation, reason = "the size of a few words")]
    #[inline(always)]
    fn ask(&self, arrival: &Arrival, slot: &Slot) -> Option<Addresses> {
        if slot.table == 0 {
            return None;
        }
        // SAFETY: integers and unions of them, for which zeros are valid.
        let mut parameters: bpf_fib_lookup = unsafe { core::mem::zeroed() };
        parameters.ifindex = arrival.ifindex;
        parameters.__bindgen_anon_5.tbid = slot.table;
        if arrival.ethertype == ETHERTYPE_IPV4 {
            let Ipv4Header { source, destination, .. } = self.read(0)?;
            parameters.family = AF_INET;
            parameters.__bindgen_anon_3.ipv4_src = source;
            parameters.__bindgen_anon_4.ipv4_dst = destination;
        } else {
            let Ipv6Header { source, destination, .. } = self.read(0)?;
            parameters.family = AF_INET6;
            parameters.__bindgen_anon_3.ipv6_src = source;
            parameters.__bindgen_anon_4.ipv6_dst = destination;
        }
        // SAFETY: the context that the kernel gave, and parameters of the size that is said.
        let found = unsafe {
            look_up_neighbour(
                self.context.cast(),
                ptr::from_mut(&mut parameters),
                size_of::<bpf_fib_lookup>() as i32,
                BPF_FIB_LOOKUP_DIRECT | BPF_FIB_LOOKUP_TBID,
            )
        };
        (found == i64::from(BPF_FIB_LKUP_RET_SUCCESS) && parameters.ifindex == slot.egress.ifindex())
            .then(|| Addresses { destination: halves(parameters.dmac), source: halves(parameters.smac) })
    }
}

/// A link-layer address as it stands in a frame.
#[inline(always)]
fn halves(address: [u8; 6]) -> [u16; 3] {
    let [a, b, c, d, e, f] = address;
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
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
