//! The eBPF programs of tunroute: entry points of a few lines around [`tunroute_common::decide`].
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(missing_docs, reason = "the classifier macro's functions are seen by the kernel only")]

mod lookup;
mod neighbour;
mod skb;
mod trace;
mod words;
mod xdp;

use core::{hint::black_box, ptr};

use aya_ebpf::{
    bindings::{
        __sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT},
        xdp_md,
    },
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use tunroute_common::{
    decide::{Verdict, decide_egress, decide_ingress},
    maps::{Outcome, UNMATCHED},
    mss,
    packet::Packet as _,
};

use crate::{
    lookup::Maps,
    neighbour::Neighbour,
    skb::{Loaded, Skb},
    xdp::Frame,
};

/// The length of an Ethernet header: where the network header of an Ethernet device's packets starts.
const ETHERNET: usize = 14;
/// Where the network header starts in packets of devices without link-layer header.
const BARE: usize = 0;

/// Traffic that enters by an Ethernet device.
#[classifier]
pub fn ingress_l2(context: TcContext) -> i32 {
    ingress::<ETHERNET>(context.skb.skb)
}

/// Traffic that enters by a device without link-layer header.
#[classifier]
pub fn ingress_l3(context: TcContext) -> i32 {
    ingress::<BARE>(context.skb.skb)
}

/// Traffic that an Ethernet device's driver has just received.
#[xdp(frags)]
pub fn ingress_xdp(context: XdpContext) -> u32 {
    early(context.ctx)
}

/// Traffic that is about to leave by an Ethernet uplink.
#[classifier]
pub fn egress_l2(context: TcContext) -> i32 {
    egress::<ETHERNET>(context.skb.skb)
}

/// Traffic that is about to leave by an uplink without link-layer header.
#[classifier]
pub fn egress_l3(context: TcContext) -> i32 {
    egress::<BARE>(context.skb.skb)
}

/// Traffic that enters or leaves by an Ethernet tunnel whose segment size is limited.
#[classifier]
pub fn clamp_l2(context: TcContext) -> i32 {
    clamp::<ETHERNET>(context.skb.skb)
}

/// Traffic that enters or leaves by such a tunnel without link-layer header.
#[classifier]
pub fn clamp_l3(context: TcContext) -> i32 {
    clamp::<BARE>(context.skb.skb)
}

#[inline(always)]
fn ingress<const OFFSET: usize>(skb: *mut __sk_buff) -> i32 {
    let packet = Skb::<OFFSET>::new(skb);
    let maps = Maps::new(skb.cast());
    let arrival = packet.arrival();
    let mut verdict = decide_ingress(&arrival, &packet, &maps);
    let mut neighbour = Neighbour::Untold;
    if let Verdict::Redirect(index, way, _) = verdict {
        neighbour = packet.neighbour(&arrival, index, &way);
        // Nobody would tell the sender if it stayed so.
        if let Neighbour::Unresolved = neighbour {
            verdict = Verdict::StepAside(index, Outcome::Unresolved);
        }
    }
    if let Verdict::Redirect(..) | Verdict::Forward(_) = verdict
        && !lookup::shadow()
        && packet.take_hop().is_none()
    {
        return TC_ACT_UNSPEC;
    }
    carry_out(&packet, verdict, &neighbour)
}

/// Does at once what needs no skb, and leaves the rest to the programs behind as if nothing had been looked at: what they
/// decide they count.
#[inline(always)]
fn early(context: *mut xdp_md) -> u32 {
    let frame = Frame::new(context);
    let maps = Maps::new(ptr::null_mut());
    let Some(arrival) = frame.arrival() else { return XDP_PASS };
    // Most packets need neither.
    let acts = || !lookup::shadow() && frame.is_for_this_host(&arrival);
    let (index, outcome, action) = match decide_ingress(&arrival, &frame, &maps) {
        Verdict::Redirect(index, way, outcome) if acts() && frame.redirect(&arrival, index, &way).is_some() => {
            (index, outcome, XDP_REDIRECT)
        }
        Verdict::Drop(index, outcome) if acts() => (index, outcome, XDP_DROP),
        _ => return XDP_PASS,
    };
    count(index, outcome, frame.length());
    if lookup::modes().1 {
        trace::tell(&frame, &arrival, index, outcome);
    }
    action
}

#[inline(always)]
fn egress<const OFFSET: usize>(skb: *mut __sk_buff) -> i32 {
    let packet = Skb::<OFFSET>::new(skb);
    let maps = Maps::new(skb.cast());
    // What the ingress program left to the kernel comes with the route that it took, so if the next hop does not answer, the
    // kernel can tell the sender.
    carry_out(&packet, decide_egress(&packet.arrival(), &packet, &maps), &Neighbour::Untold)
}

#[inline(always)]
fn clamp<const OFFSET: usize>(skb: *mut __sk_buff) -> i32 {
    let packet = Loaded::new(skb, OFFSET);
    if let Some(most) = lookup::clamp(packet.ifindex())
        && let Some(change) = mss::lower(packet.ethertype(), &packet, &most)
    {
        packet.change(&change);
    }
    TC_ACT_UNSPEC
}

/// Counts the verdict and does it. "Not mine" is `TC_ACT_UNSPEC`, which lets other programs and the kernel go on.
#[inline(always)]
fn carry_out<const OFFSET: usize>(packet: &Skb<OFFSET>, verdict: Verdict<'_>, neighbour: &Neighbour) -> i32 {
    let (index, outcome) = match verdict {
        Verdict::Pass => return TC_ACT_UNSPEC,
        Verdict::StepAside(index, outcome) | Verdict::Drop(index, outcome) | Verdict::Redirect(index, _, outcome) => {
            (index, outcome)
        }
        Verdict::Forward(_) => (UNMATCHED, Outcome::Forwarded),
    };
    let (shadow, tracing) = lookup::modes();
    count(index, outcome, packet.length());
    if tracing && !matches!(verdict, Verdict::Forward(_)) {
        trace::tell(packet, &packet.arrival(), index, outcome);
    }
    match verdict {
        Verdict::Drop(..) if !shadow => TC_ACT_SHOT,
        Verdict::Redirect(_, way, _) if !shadow => packet.redirect(&way, neighbour),
        Verdict::Forward(next_hop) if !shadow => packet.forward(&next_hop),
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn count(index: u32, outcome: Outcome, bytes: u32) {
    if let Some(stats) = lookup::STATS.get_ptr_mut(index) {
        // SAFETY: the map's value of this CPU; programs on one CPU do not interrupt one another here.
        let outcomes = unsafe { &mut (*stats).outcomes };
        // The compiler would leave out the check, as it knows the range: the verifier of Linux 6.1 has lost it by then.
        if let Some(counter) = outcomes.get_mut(black_box(outcome as usize)) {
            counter.packets += 1;
            counter.bytes += u64::from(bytes);
        }
    }
}

/// The licence that the kernel reads: some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing here can panic; the verifier would refuse a loop that a packet could reach.
    loop {}
}
