//! The maps, and the decision's view of them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::map,
    maps::{Array, HashMap, PerCpuArray},
};
use tunroute_common::{
    decide::Lookup,
    index::{self, Root},
    maps::{Clamp, Control, MAX_CLAMPS, MAX_SLOTS, Slot, Source, Stats},
    packet::Addresses,
    trie::Key,
};

use crate::words::MapWords;

#[map]
pub static POLICY: Array<Slot> = Array::pinned(MAX_SLOTS, 0);
#[map]
pub static STATS: PerCpuArray<Stats> = PerCpuArray::pinned(MAX_SLOTS, 0);
#[map]
static CONTROL: Array<Control> = Array::pinned(1, 0);
#[map]
static CLAMP: HashMap<u32, Clamp> = HashMap::pinned(MAX_CLAMPS, BPF_F_NO_PREALLOC);

/// The largest segment size that may be told through a device.
#[inline(always)]
pub fn clamp(ifindex: u32) -> Option<Clamp> {
    // SAFETY: a copy of one aligned word; the daemon replaces an entry, and does not write to it.
    unsafe { CLAMP.get(ifindex) }.copied()
}

/// The BPF maps as a [`Lookup`].
pub struct Maps {
    words: MapWords,
}

impl Maps {
    /// As they are for one packet. `None` before the daemon has published anything.
    #[inline(always)]
    pub fn current() -> Option<Self> {
        Some(Self { words: MapWords::current()? })
    }

    /// Whatever is decided, the kernel carries out its own decision.
    #[inline(always)]
    pub fn shadow() -> bool {
        Self::modes().0
    }

    /// Whether that is so, and whether somebody wants to be told of decisions.
    #[inline(always)]
    pub fn modes() -> (bool, bool) {
        CONTROL.get(0).map_or((false, false), |control| (control.shadow == 1, control.tracing == 1))
    }

    /// Until when somebody listens, if anybody does.
    #[inline(always)]
    pub fn heard_until() -> u64 {
        CONTROL.get(0).map_or(0, |control| control.valid_until)
    }
}

impl Lookup for Maps {
    #[inline(always)]
    fn source(&self, addresses: &Addresses) -> Option<Source> {
        let (family, source) = match *addresses {
            Addresses::V4 { source, .. } => (Root::V4, Key::v4(source)),
            Addresses::V6 { source, .. } => (Root::V6, Key::v6(source)),
        };
        index::source_near(&self.words, family, source, || deep_source(family, source))
    }

    #[inline(always)]
    fn destination_is_source(&self, addresses: &Addresses) -> bool {
        let (family, destination) = destination(addresses);
        deep_source(family, destination).is_some()
    }

    #[inline(always)]
    fn exempt(&self, set: u32, addresses: &Addresses) -> bool {
        let (family, destination) = destination(addresses);
        find_exempt(set.into(), family as u64, destination.high, destination.low) != 0
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

#[inline(always)]
fn destination(addresses: &Addresses) -> (Root, Key) {
    match *addresses {
        Addresses::V4 { destination, .. } => (Root::V4, Key::v4(destination)),
        Addresses::V6 { destination, .. } => (Root::V6, Key::v6(destination)),
    }
}

#[inline(always)]
fn deep_source(family: Root, Key { high, low }: Key) -> Option<Source> {
    index::unpack(find_source(family as u64, high, low))
}

/// A whole lookup, as a function that the verifier goes through by itself, and not once more for each place it is called
/// from: a global one (`btf_check_subprog_call()` in `kernel/bpf/btf.c`). A word of the table of sources, or 0.
///
/// It looks in what is published now, which may be newer than what its caller has looked in.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_source(family: u64, high: u64, low: u64) -> u64 {
    let Some(words) = MapWords::current() else { return 0 };
    index::source(&words, root(family), Key { high, low }).map_or(0, index::pack)
}

/// Likewise: 1 if the set holds the address.
#[allow(clippy::cast_possible_truncation, reason = "a set's number, passed in a whole register")]
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_exempt(set: u64, family: u64, high: u64, low: u64) -> u64 {
    let Some(words) = MapWords::current() else { return 0 };
    index::exempt(&words, set as u32, root(family), Key { high, low }).into()
}

#[inline(always)]
fn root(family: u64) -> Root {
    if family == Root::V4 as u64 { Root::V4 } else { Root::V6 }
}
