//! The maps, and the decision's view of them.

use core::{arch::asm, ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    bindings::{
        BPF_F_NO_PREALLOC, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_DIRECT, BPF_FIB_LOOKUP_SKIP_NEIGH, bpf_fib_lookup,
    },
    helpers::generated::{bpf_fib_lookup as look_up_route, bpf_ktime_get_coarse_ns},
    macros::map,
    maps::{Array, DevMapHash, HashMap, PerCpuArray},
};
use tunroute_common::{
    decide::{Arrival, Lookup, NextHop, Way},
    index::{self, Root},
    maps::{
        Action, Clamp, Control, Exempt, Exit, Ipv6, MAX_CLAMPS, MAX_EXITS, MAX_SLOTS, MAX_XDP_DEVICES, OWN_SET, Slot,
        Source, Station, Stats,
    },
    packet::{Addresses, Header},
    trie::Key,
};

use crate::words::MapWords;

#[map]
static POLICY: Array<Slot> = Array::pinned(MAX_SLOTS, 0);
#[map]
static EXIT: Array<Exit> = Array::pinned(MAX_EXITS, 0);
#[map]
pub static DEVICE: DevMapHash = DevMapHash::pinned(MAX_EXITS, 0);
#[map]
pub static STATS: PerCpuArray<Stats> = PerCpuArray::pinned(MAX_SLOTS + 1, 0);
#[map]
static CONTROL: Array<Control> = Array::pinned(1, 0);
#[map]
static STATION: HashMap<u32, Station> = HashMap::pinned(MAX_XDP_DEVICES, BPF_F_NO_PREALLOC);
#[map]
static CLAMP: HashMap<u32, Clamp> = HashMap::pinned(MAX_CLAMPS, BPF_F_NO_PREALLOC);

/// An ingress device as the link knows it, if frames may be decided there.
#[inline(always)]
pub fn station(ifindex: u32) -> Option<Station> {
    // SAFETY: a copy of one aligned word; the daemon replaces an entry, and does not write to it.
    unsafe { STATION.get(ifindex) }.copied()
}

/// The MSS limit of a device.
#[inline(always)]
pub fn clamp(ifindex: u32) -> Option<Clamp> {
    // SAFETY: a copy of one aligned word; the daemon replaces an entry, and does not write to it.
    unsafe { CLAMP.get(ifindex) }.copied()
}

/// The kernel is asked for routes and neighbours.
#[inline(always)]
pub fn asks_kernel() -> bool {
    ASK_KERNEL.load() != 0
}

/// The device that a slot's packets leave by now; 0 if there is none.
#[inline(always)]
pub fn device(slot: u32) -> u32 {
    let egress = read(slot).map(|slot| slot.egress).filter(|egress| egress.action() == Action::Redirect);
    egress.and_then(|egress| DEVICE.get_ifindex(egress.exit())).unwrap_or(0)
}

/// The routing table of a slot's policy, if it has one.
#[inline(always)]
pub fn table(slot: u32) -> Option<u32> {
    read(slot).map(|slot| slot.table).filter(|table| *table != 0)
}

/// A copy of a slot, to which the daemon may be writing.
#[inline(always)]
fn read(index: u32) -> Option<Slot> {
    let slot = POLICY.get_ptr(index)?;
    // SAFETY: an entry of the map. Each field is an aligned word that is read once and valid whatever it holds.
    unsafe {
        Some(Slot {
            id: 0,
            egress: ptr::read_volatile(&raw const (*slot).egress),
            exempt_set: ptr::read_volatile(&raw const (*slot).exempt_set),
            next: ptr::read_volatile(&raw const (*slot).next),
            table: ptr::read_volatile(&raw const (*slot).table),
            reserved: 0,
        })
    }
}

/// 0 in twins for trials, which tell what the maps say: they leave unmatched traffic to the kernel, and do not step aside
/// for a next hop that happens not to answer.
#[unsafe(no_mangle)]
static ASK_KERNEL: Global<u32> = Global::new(1);

/// `AF_INET`
pub const AF_INET: u8 = 2;
/// `AF_INET6`
pub const AF_INET6: u8 = 10;

/// Shadow mode: the kernel carries out its own decision in any case.
#[inline(always)]
pub fn shadow() -> bool {
    modes().0
}

/// Returns `(shadow, tracing)`.
#[inline(always)]
pub fn modes() -> (bool, bool) {
    CONTROL.get(0).map_or((false, false), |control| (control.shadow == 1, control.tracing == 1))
}

/// The time until which decisions are traced, if they are.
#[inline(always)]
pub fn heard_until() -> u64 {
    CONTROL.get(0).map_or(0, |control| control.valid_until)
}

/// The BPF maps as a [`Lookup`], and the kernel's routes.
pub struct Maps {
    /// The context for route lookups by the kernel. Null where unmatched traffic is left to other programs.
    context: *mut c_void,
}

impl Maps {
    /// For a packet.
    #[inline(always)]
    pub const fn new(context: *mut c_void) -> Self {
        Self { context }
    }
}

impl Lookup for Maps {
    #[inline(always)]
    fn source(&self, addresses: &Addresses) -> Option<Source> {
        let (family, source) = source(addresses);
        source_of(family, source)
    }

    #[inline(always)]
    fn destination_is_source(&self, addresses: &Addresses) -> bool {
        let (family, destination) = destination(addresses);
        source_of(family, destination).is_some()
    }

    #[inline(always)]
    fn exempt(&self, set: u32, addresses: &Addresses) -> Exempt {
        let (family, destination) = destination(addresses);
        exempt_in(set, family, destination)
    }

    #[inline(always)]
    fn forwards_unmatched(&self, addresses: &Addresses) -> bool {
        let bit = match addresses {
            Addresses::V4 { .. } => 1,
            Addresses::V6 { .. } => 2,
        };
        !self.context.is_null() && asks_kernel() && CONTROL.get(0).is_some_and(|control| control.unmatched & bit != 0)
    }

    #[inline(always)]
    fn touches_host(&self, addresses: &Addresses) -> bool {
        let ((family, source), (_, destination)) = (source(addresses), destination(addresses));
        [source, destination].into_iter().any(|address| exempt_in(OWN_SET, family, address) != Exempt::No)
    }

    /// Of the main table alone: without `BPF_FIB_LOOKUP_DIRECT` it would go through all rules
    /// (`bpf_ipv4_fib_lookup()` in `net/core/filter.c`). Where the kernel does not know a flag, it finds nothing.
    #[expect(clippy::cast_possible_truncation, reason = "the size of a few words")]
    #[inline(always)]
    fn main_route(&self, arrival: &Arrival, header: &Header, length: u32) -> Option<NextHop> {
        let (family, source, destination) = match header.addresses {
            Addresses::V4 { source, destination } => (AF_INET, [source, 0, 0, 0], [destination, 0, 0, 0]),
            Addresses::V6 { source, destination } => (AF_INET6, source, destination),
        };
        // SAFETY: integers and unions of them, for which zeros are valid.
        let mut parameters: bpf_fib_lookup = unsafe { core::mem::zeroed() };
        parameters.family = family;
        parameters.l4_protocol = header.protocol;
        // 0 would have it look at the device's MTU alone.
        parameters.__bindgen_anon_1.tot_len = u16::try_from(length).ok().filter(|length| *length > 0)?;
        parameters.ifindex = arrival.ifindex;
        parameters.__bindgen_anon_2.flowinfo = header.class;
        parameters.__bindgen_anon_3.ipv6_src = source;
        parameters.__bindgen_anon_4.ipv6_dst = destination;
        // SAFETY: the context that the kernel gave, and parameters of the given size.
        let found = unsafe {
            look_up_route(
                self.context,
                ptr::from_mut(&mut parameters),
                size_of::<bpf_fib_lookup>() as i32,
                BPF_FIB_LOOKUP_DIRECT | BPF_FIB_LOOKUP_SKIP_NEIGH,
            )
        };
        // SAFETY: all of it has been written above or by the kernel.
        let address = unsafe { parameters.__bindgen_anon_4.ipv6_dst };
        (found == i64::from(BPF_FIB_LKUP_RET_SUCCESS)).then_some(NextHop {
            ifindex: parameters.ifindex,
            address,
            is_v6: parameters.family == AF_INET6,
        })
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        read(index)
    }

    #[inline(always)]
    fn way(&self, number: u32) -> Option<Way<'_>> {
        Some(Way { number, ifindex: DEVICE.get_ifindex(number)?, exit: EXIT.get(number)? })
    }

    #[inline(always)]
    fn open(&self, addresses: &Addresses) -> bool {
        let Some(control) = CONTROL.get(0) else { return false };
        let open = match addresses {
            Addresses::V4 { .. } => control.open_v4,
            Addresses::V6 { .. } => control.open_v6,
        };
        // SAFETY: reads a clock.
        open == 1 && unsafe { bpf_ktime_get_coarse_ns() } < control.valid_until
    }
}

/// An IPv6 address, to be computed with here and not ahead of the question whether it is one: what the compiler may do for
/// numbers the verifier forbids for what another branch has in the same register.
#[inline(always)]
fn here(address: Ipv6) -> Ipv6 {
    let mut words = address.map(u64::from);
    let [a, b, c, d] = &mut words;
    // SAFETY: changes nothing.
    unsafe {
        asm!(
            "{a} = {a}",
            "{b} = {b}",
            "{c} = {c}",
            "{d} = {d}",
            a = inout(reg) * a,
            b = inout(reg) * b,
            c = inout(reg) * c,
            d = inout(reg) * d,
            options(nomem, nostack, preserves_flags),
        );
    }
    #[expect(clippy::cast_possible_truncation, reason = "as they were")]
    words.map(|word| word as u32)
}

#[inline(always)]
fn source(addresses: &Addresses) -> (Root, Key) {
    match *addresses {
        Addresses::V4 { source, .. } => (Root::V4, Key::v4(source)),
        Addresses::V6 { source, .. } => (Root::V6, Key::v6(here(source))),
    }
}

#[inline(always)]
fn destination(addresses: &Addresses) -> (Root, Key) {
    match *addresses {
        Addresses::V4 { destination, .. } => (Root::V4, Key::v4(destination)),
        Addresses::V6 { destination, .. } => (Root::V6, Key::v6(here(destination))),
    }
}

#[inline(always)]
fn source_of(family: Root, Key { high, low }: Key) -> Option<Source> {
    index::unpack(look_up(index::SOURCES, family as u64, high, low))
}

#[inline(always)]
fn exempt_in(set: u32, family: Root, Key { high, low }: Key) -> Exempt {
    index::unpack_exempt(look_up(set.into(), family as u64, high, low))
}

/// Every lookup, as a function that the verifier goes through by itself, and not once more for each place it is called from:
/// a global one (`btf_check_subprog_call()` in `kernel/bpf/btf.c`).
///
/// It looks in what is published now, which may be newer than what another lookup for the same packet has looked in.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn look_up(set: u64, family: u64, high: u64, low: u64) -> u64 {
    let Some(words) = MapWords::current() else { return 0 };
    let family = if family == Root::V4 as u64 { Root::V4 } else { Root::V6 };
    index::look_up(&words, set, family, Key { high, low })
}
