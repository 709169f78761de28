//! The maps, and the decision's view of them.

use aya_ebpf::{
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::map,
    maps::{Array, LpmTrie, PerCpuArray, lpm_trie::Key},
};
use tunroute_common::{
    decide::Lookup,
    maps::{Control, ExemptV4, ExemptV6, Ipv4, Ipv6, MAX_PREFIXES, MAX_SLOTS, Slot, Source, Stats},
    packet::Addresses,
};

#[map]
static SOURCE_V4: LpmTrie<Ipv4, Source> = LpmTrie::pinned(MAX_PREFIXES, 0);
#[map]
static SOURCE_V6: LpmTrie<Ipv6, Source> = LpmTrie::pinned(MAX_PREFIXES, 0);
#[map]
static EXEMPT_V4: LpmTrie<ExemptV4, u32> = LpmTrie::pinned(MAX_PREFIXES, 0);
#[map]
static EXEMPT_V6: LpmTrie<ExemptV6, u32> = LpmTrie::pinned(MAX_PREFIXES, 0);
#[map]
static POLICY: Array<Slot> = Array::pinned(MAX_SLOTS, 0);
#[map]
pub static STATS: PerCpuArray<Stats> = PerCpuArray::pinned(MAX_SLOTS, 0);
#[map]
static CONTROL: Array<Control> = Array::pinned(1, 0);

/// The BPF maps as a [`Lookup`].
pub struct Maps;

impl Maps {
    /// Whatever is decided, the kernel carries out its own decision.
    #[inline(always)]
    pub fn shadow() -> bool {
        CONTROL.get(0).is_some_and(|control| control.shadow == 1)
    }
}

/// The bits of an exemption key before the address: the set's number.
const SET_BITS: u32 = u32::BITS;

impl Lookup for Maps {
    #[inline(always)]
    fn source(&self, addresses: &Addresses) -> Option<Source> {
        match *addresses {
            Addresses::V4 { source, .. } => SOURCE_V4.get(Key::new(Ipv4::BITS, source)).copied(),
            Addresses::V6 { source, .. } => SOURCE_V6.get(Key::new(128, source)).copied(),
        }
    }

    #[inline(always)]
    fn destination_is_source(&self, addresses: &Addresses) -> bool {
        match *addresses {
            Addresses::V4 { destination, .. } => SOURCE_V4.get(Key::new(Ipv4::BITS, destination)).is_some(),
            Addresses::V6 { destination, .. } => SOURCE_V6.get(Key::new(128, destination)).is_some(),
        }
    }

    #[inline(always)]
    fn exempt(&self, set: u32, addresses: &Addresses) -> bool {
        match *addresses {
            Addresses::V4 { destination, .. } => {
                EXEMPT_V4.get(Key::new(SET_BITS + Ipv4::BITS, ExemptV4 { set, destination })).is_some()
            }
            Addresses::V6 { destination, .. } => {
                EXEMPT_V6.get(Key::new(SET_BITS + 128, ExemptV6 { set, destination })).is_some()
            }
        }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<&Slot> {
        POLICY.get(index)
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
