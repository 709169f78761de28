//! Traces decisions for `tunroute trace`.

use aya_ebpf::{
    bindings::BPF_RB_NO_WAKEUP,
    helpers::generated::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, PerCpuArray, RingBuf},
};
use tunroute_common::{
    decide::Arrival,
    maps::{EVENTS_BYTES, Event, Filter, Outcome, Traced},
    packet::Packet,
    trace::read,
};

use crate::lookup::{device, heard_until};

#[map]
static EVENTS: RingBuf = RingBuf::pinned(EVENTS_BYTES, 0);
#[map]
static TRACE: Array<Filter> = Array::pinned(1, 0);
#[map]
static TRACED: PerCpuArray<Traced> = PerCpuArray::pinned(1, 0);

/// Traces a decision, if a client listens.
#[inline(always)]
pub fn tell<P: Packet>(packet: &P, arrival: &Arrival, slot: u32, outcome: Outcome) {
    let event = Event { slot, outcome: outcome as u32, ifindex: arrival.ifindex, ..Event::default() };
    if let Some(event) = read(arrival.ethertype, packet, event)
        && let Some(traced) = TRACED.get_ptr_mut(0)
    {
        // SAFETY: the map's value of this CPU; programs on one CPU do not interrupt one another here.
        unsafe { (*traced).event = event };
        tell_noted();
    }
}

/// Tells the decision that is noted in `TRACED`, if the filter takes it; what cannot be told is counted. A global function,
/// which the verifier goes through once; it must return something. The packet is none of its arguments: that would take a
/// kernel with BTF.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tell_noted() -> u64 {
    let Some(filter) = TRACE.get(0).filter(|filter| filter.limit > 0) else { return 0 };
    let Some(traced) = TRACED.get_ptr_mut(0) else { return 0 };
    // SAFETY: as above.
    let traced = unsafe { &mut *traced };
    // SAFETY: reads a clock.
    let time = unsafe { bpf_ktime_get_ns() };
    if time > heard_until() || !filter.takes(&traced.event) {
        return 0;
    }
    traced.event.time = time;
    traced.event.tunnel = device(traced.event.slot);
    // No wake-up: the reader polls.
    if !traced.admit(time, filter.limit) || EVENTS.output::<Event>(&traced.event, BPF_RB_NO_WAKEUP.into()).is_err() {
        traced.omitted += 1;
    }
    0
}
