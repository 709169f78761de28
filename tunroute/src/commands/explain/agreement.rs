//! Do the two datapaths agree on a packet? Pure.

use std::net::IpAddr;

use tunroute_common::maps::{Outcome, Slot, flags};

use crate::{
    kernel::{Answer, Refused},
    policy::fast::{Hook, address_from_words},
    policy::net::{Family, IfIndex},
};

/// What the program decides on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The kernel is to decide.
    Left,
    /// It is dropped without a word.
    Dropped,
    /// It leaves.
    Leaves {
        /// By this device.
        device: IfIndex,
        /// To this neighbour; none where the destination is the next hop itself.
        gateway: Option<IpAddr>,
    },
}

impl Decision {
    /// What was counted, as a decision. `slot` is the one that it was counted in.
    #[must_use]
    pub fn of(counted: Option<Outcome>, slot: Option<&Slot>, family: Family) -> Self {
        match (counted, slot) {
            (Some(Outcome::Forwarded | Outcome::Diverted), Some(slot)) => Self::Leaves {
                device: slot.egress.ifindex(),
                gateway: slot.egress.has(flags::GATEWAY).then(|| address_from_words(family, slot.gateway)),
            },
            (Some(Outcome::Blackholed | Outcome::LeakPrevented), _) => Self::Dropped,
            _ => Self::Left,
        }
    }
}

/// Whether they agree, and in which respect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// They do.
    pub agree: bool,
    /// Why that is said, as a sentence without its full stop.
    pub because: &'static str,
}

const fn yes(because: &'static str) -> Agreement {
    Agreement { agree: true, because }
}

/// They do not agree.
#[must_use]
pub const fn no(because: &'static str) -> Agreement {
    Agreement { agree: false, because }
}

/// Whether the program at a hook agrees with the kernel. `is_uplink` tells the devices that the egress program guards.
#[must_use]
pub fn agreement(hook: Hook, program: Decision, kernel: Answer, is_uplink: impl Fn(IfIndex) -> bool) -> Agreement {
    match hook {
        Hook::Ingress => at_ingress(program, kernel),
        Hook::Egress => at_egress(program, kernel, is_uplink),
    }
}

fn at_ingress(program: Decision, kernel: Answer) -> Agreement {
    match (program, kernel) {
        (Decision::Left, _) => yes("the program leaves the packet to the kernel"),
        (Decision::Leaves { device, gateway }, Answer::Leaves { device: other, gateway: via, .. }) => {
            same_way((device, gateway), (other, via), yes("both send it the same way"))
        }
        (Decision::Leaves { .. }, Answer::Local { .. }) => no("the program sends away what is for this host"),
        (Decision::Leaves { .. }, Answer::Refused(_)) => no("the program sends on what the kernel refuses"),
        (Decision::Dropped, Answer::Refused(Refused::Dropped)) => yes("both drop it without a word"),
        (Decision::Dropped, Answer::Refused(_)) => {
            no("the program drops without a word what the kernel answers with an ICMP error")
        }
        (Decision::Dropped, _) => no("the program drops what the kernel delivers"),
    }
}

/// The program at an uplink sees only what the kernel sends there.
fn at_egress(program: Decision, kernel: Answer, is_uplink: impl Fn(IfIndex) -> bool) -> Agreement {
    match (program, kernel) {
        (Decision::Left, _) => yes("the program at the uplink lets it pass"),
        (_, Answer::Local { .. }) => yes("it stays on this host"),
        (_, Answer::Leaves { device, .. }) if is_uplink(device) => {
            no("the kernel sends it to the uplink, where the program stops it")
        }
        (Decision::Leaves { device, gateway }, Answer::Leaves { device: other, gateway: via, .. }) => {
            same_way((device, gateway), (other, via), yes("the kernel sends it where the program would"))
        }
        (Decision::Leaves { .. }, Answer::Refused(_)) => no("the program would send on what the kernel refuses"),
        (Decision::Dropped, Answer::Refused(_)) => yes("neither lets it out"),
        (Decision::Dropped, Answer::Leaves { .. }) => no("the program would drop what the kernel sends by a tunnel"),
    }
}

fn same_way(program: (IfIndex, Option<IpAddr>), kernel: (IfIndex, Option<IpAddr>), same: Agreement) -> Agreement {
    match (program, kernel) {
        (program, kernel) if program == kernel => same,
        ((device, _), (other, _)) if device == other => no("they send it to different neighbours"),
        _ => no("they send it by different devices"),
    }
}

#[cfg(test)]
mod tests {
    use tunroute_common::maps::Egress;

    use super::*;

    const UPLINK: IfIndex = 2;

    fn leaves(device: IfIndex, gateway: Option<&str>) -> Decision {
        Decision::Leaves { device, gateway: gateway.map(|gateway| gateway.parse().expect("an address")) }
    }

    fn kernel(device: IfIndex, gateway: Option<&str>) -> Answer {
        let gateway = gateway.map(|gateway| gateway.parse().expect("an address"));
        Answer::Leaves { device, gateway, table: 200 }
    }

    #[test]
    fn every_pair_of_answers() {
        let (local, refused) = (Answer::Local { table: 255 }, Answer::Refused);
        for (hook, program, kernel, agree) in [
            (Hook::Ingress, Decision::Left, kernel(7, None), true),
            (Hook::Ingress, Decision::Left, local, true),
            (Hook::Ingress, Decision::Left, refused(Refused::Prohibit), true),
            (Hook::Ingress, leaves(7, None), kernel(7, None), true),
            (Hook::Ingress, leaves(7, None), kernel(8, None), false),
            (Hook::Ingress, leaves(7, None), kernel(UPLINK, None), false),
            (Hook::Ingress, leaves(7, Some("10.0.0.1")), kernel(7, Some("10.0.0.1")), true),
            (Hook::Ingress, leaves(7, Some("10.0.0.1")), kernel(7, Some("10.0.0.2")), false),
            (Hook::Ingress, leaves(7, None), kernel(7, Some("10.0.0.2")), false),
            (Hook::Ingress, leaves(7, None), local, false),
            (Hook::Ingress, leaves(7, None), refused(Refused::NoRoute), false),
            (Hook::Ingress, leaves(7, None), refused(Refused::Dropped), false),
            (Hook::Ingress, Decision::Dropped, refused(Refused::Dropped), true),
            (Hook::Ingress, Decision::Dropped, refused(Refused::Unreachable), false),
            (Hook::Ingress, Decision::Dropped, refused(Refused::Prohibit), false),
            (Hook::Ingress, Decision::Dropped, refused(Refused::NoRoute), false),
            (Hook::Ingress, Decision::Dropped, kernel(7, None), false),
            (Hook::Ingress, Decision::Dropped, local, false),
            (Hook::Egress, Decision::Left, kernel(UPLINK, None), true),
            (Hook::Egress, leaves(7, None), kernel(7, None), true),
            (Hook::Egress, leaves(7, None), kernel(8, None), false),
            (Hook::Egress, leaves(7, None), kernel(UPLINK, None), false),
            (Hook::Egress, leaves(7, None), local, true),
            (Hook::Egress, leaves(7, None), refused(Refused::Unreachable), false),
            (Hook::Egress, Decision::Dropped, refused(Refused::Unreachable), true),
            (Hook::Egress, Decision::Dropped, kernel(UPLINK, None), false),
            (Hook::Egress, Decision::Dropped, kernel(7, None), false),
            (Hook::Egress, Decision::Dropped, local, true),
        ] {
            let found = agreement(hook, program, kernel, |device| device == UPLINK);
            assert_eq!(found.agree, agree, "{hook} {program:?} {kernel:?}: {}", found.because);
        }
    }

    #[test]
    fn what_was_counted_is_a_decision() {
        let slot = |egress| Slot {
            id: 1,
            egress,
            mtu: 1500,
            exempt_set: 1,
            next: Slot::NO_NEXT,
            table: 0,
            gateway: [u32::from_ne_bytes([10, 0, 0, 1]), 0, 0, 0],
        };
        let (plain, via) = (slot(Egress::redirect(7, 0)), slot(Egress::redirect(7, flags::GATEWAY)));
        for (outcome, slot, expected) in [
            (Some(Outcome::Forwarded), &plain, leaves(7, None)),
            (Some(Outcome::Diverted), &via, leaves(7, Some("10.0.0.1"))),
            (Some(Outcome::Blackholed), &plain, Decision::Dropped),
            (Some(Outcome::LeakPrevented), &plain, Decision::Dropped),
            (Some(Outcome::Exempt), &plain, Decision::Left),
            (Some(Outcome::Closed), &plain, Decision::Left),
            (None, &plain, Decision::Left),
        ] {
            assert_eq!(Decision::of(outcome, Some(slot), Family::V4), expected, "{outcome:?}");
        }
    }
}
