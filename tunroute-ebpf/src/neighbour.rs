//! The link-layer address of an exit's next hop, as the kernel knows it.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_DIRECT, BPF_FIB_LOOKUP_TBID, bpf_fib_lookup,
    },
    helpers::generated::{bpf_fib_lookup as look_up_neighbour, bpf_ktime_get_coarse_ns},
    macros::map,
    maps::PerCpuArray,
};
use tunroute_common::{
    decide::{Arrival, Way},
    maps::{Ipv6, MAX_EXITS, flags},
    packet::{ETHERTYPE_IPV4, Ipv4Header, Ipv6Header, Packet},
};

use crate::lookup::{self, AF_INET, AF_INET6};

/// The gateways of exits, as the kernel resolved them last, on each CPU.
#[map]
static NEXT_HOP: PerCpuArray<Entry> = PerCpuArray::with_max_entries(MAX_EXITS, 0);
/// How long an answer is used, in nanoseconds: a few ticks. Asking takes longer than everything else.
const FRESH: u64 = 10_000_000;

/// A gateway's link-layer address, and which gateway it was.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    /// `CLOCK_MONOTONIC` in nanoseconds until which it is used.
    until: u64,
    /// The exit's device and gateway at that time: its number may have been used again since.
    ifindex: u64,
    gateway: Ipv6,
    addresses: Addresses,
}

/// Link-layer addresses: the next hop's, and that of the device that leads there.
#[derive(Clone, Copy)]
pub struct Addresses {
    pub destination: [u16; 3],
    pub source: [u16; 3],
}

/// An Ethernet header.
#[repr(C)]
pub struct Ethernet {
    pub destination: [u16; 3],
    pub source: [u16; 3],
    /// In network byte order.
    pub ethertype: u16,
}

/// What the kernel says of a next hop.
pub enum Neighbour {
    /// It is there.
    Known(Addresses),
    /// Its address is not known, or it has not answered.
    Unresolved,
    /// The kernel does not say: the policy's table leads elsewhere now, or it cannot be asked (before Linux 6.5).
    Untold,
}

/// Looks up the next hop of a packet of a slot's that is to leave by an Ethernet exit. A gateway's address may be as old as
/// [`FRESH`]; without a gateway the destination is the next hop, and the kernel is asked each time.
#[inline(always)]
pub fn resolve<P: Packet>(context: *mut c_void, arrival: &Arrival, packet: &P, slot: u32, way: &Way<'_>) -> Neighbour {
    let Some(entry) = NEXT_HOP.get_ptr_mut(way.number) else { return Neighbour::Untold };
    // SAFETY: the map's value of this CPU; programs on one CPU do not interrupt one another here.
    let entry = unsafe { &mut *entry };
    // SAFETY: reads a clock.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let ifindex = way.ifindex.into();
    let has_gateway = way.exit.has(flags::GATEWAY);
    if has_gateway && now < entry.until && entry.ifindex == ifindex && entry.gateway == way.exit.gateway {
        return Neighbour::Known(entry.addresses);
    }
    let neighbour = ask(context, arrival, packet, slot, way).unwrap_or(Neighbour::Untold);
    if let Neighbour::Known(addresses) = neighbour
        && has_gateway
    {
        *entry = Entry { until: now + FRESH, ifindex, gateway: way.exit.gateway, addresses };
    }
    neighbour
}

/// Asks the kernel, by the route of the policy's table (`BPF_FIB_LOOKUP_TBID`, from Linux 6.5 on), which must lead to the
/// same device and gateway as the exit.
#[expect(clippy::cast_possible_truncation, reason = "the size of a few words")]
#[inline(always)]
fn ask<P: Packet>(context: *mut c_void, arrival: &Arrival, packet: &P, slot: u32, way: &Way<'_>) -> Option<Neighbour> {
    // SAFETY: integers and unions of them, for which zeros are valid.
    let mut parameters: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    parameters.ifindex = arrival.ifindex;
    parameters.__bindgen_anon_5.tbid = lookup::table(slot)?;
    if arrival.ethertype == ETHERTYPE_IPV4 {
        let Ipv4Header { source, destination, .. } = packet.read(0)?;
        parameters.family = AF_INET;
        parameters.__bindgen_anon_3.ipv4_src = source;
        parameters.__bindgen_anon_4.ipv4_dst = destination;
    } else {
        let Ipv6Header { source, destination, .. } = packet.read(0)?;
        parameters.family = AF_INET6;
        parameters.__bindgen_anon_3.ipv6_src = source;
        parameters.__bindgen_anon_4.ipv6_dst = destination;
    }
    // SAFETY: the context that the kernel gave, and parameters of the given size.
    let found = unsafe {
        look_up_neighbour(
            context,
            ptr::from_mut(&mut parameters),
            size_of::<bpf_fib_lookup>() as i32,
            BPF_FIB_LOOKUP_DIRECT | BPF_FIB_LOOKUP_TBID,
        )
    };
    if found == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
        return Some(Neighbour::Unresolved);
    }
    // SAFETY: all of it has been written above or by the kernel.
    let next_hop = unsafe { parameters.__bindgen_anon_4.ipv6_dst };
    let gateway = way.exit.gateway;
    let same_gateway =
        if arrival.ethertype == ETHERTYPE_IPV4 { next_hop[0] == gateway[0] } else { next_hop == gateway };
    let same = parameters.ifindex == way.ifindex && (same_gateway || !way.exit.has(flags::GATEWAY));
    (found == i64::from(BPF_FIB_LKUP_RET_SUCCESS) && same)
        .then(|| Neighbour::Known(Addresses { destination: halves(parameters.dmac), source: halves(parameters.smac) }))
}

/// A link-layer address as it stands in a frame.
#[inline(always)]
fn halves(address: [u8; 6]) -> [u16; 3] {
    let [a, b, c, d, e, f] = address;
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
}
