//! Compares what becomes of a packet: the program with the kernel's rules, and both with the configuration. Pure.

use std::net::IpAddr;

use tunroute_common::maps::Outcome;

use super::expected::{Expected, Intent, MainWay};
use crate::{
    kernel::{Answer, Refused},
    policy::fast::{DeviceExit, Hook},
    policy::net::{Family, IfIndex, TABLE_DEFAULT, TABLE_MAIN},
};

/// What the program does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handling {
    /// It leaves the packet to the kernel.
    Left,
    /// It drops the packet silently.
    Dropped,
    /// It sends the packet out.
    Leaves {
        /// The device.
        device: IfIndex,
        /// The gateway; none where the destination is the next hop itself.
        gateway: Option<IpAddr>,
    },
}

impl Handling {
    /// From the outcome that the program counted, and the exit of the slot that it counted it in.
    #[must_use]
    pub fn of(counted: Option<Outcome>, exit: Option<&DeviceExit>, family: Family) -> Self {
        match (counted, exit) {
            (Some(Outcome::Forwarded | Outcome::Diverted), Some(exit)) => {
                Self::Leaves { device: exit.ifindex, gateway: exit.gateway(family) }
            }
            (Some(Outcome::Blackholed | Outcome::LeakPrevented), _) => Self::Dropped,
            _ => Self::Left,
        }
    }
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Both say the same.
    pub agree: bool,
    /// Why, as a sentence without its full stop.
    pub because: &'static str,
}

/// They agree.
#[must_use]
pub const fn yes(because: &'static str) -> Agreement {
    Agreement { agree: true, because }
}

/// They disagree.
#[must_use]
pub const fn no(because: &'static str) -> Agreement {
    Agreement { agree: false, because }
}

/// Compares the program at a hook with the kernel's rules. `is_uplink` tells the devices that the egress program guards.
#[must_use]
pub fn agreement(hook: Hook, program: Handling, kernel: Answer, is_uplink: impl Fn(IfIndex) -> bool) -> Agreement {
    match hook {
        Hook::Ingress => at_ingress(program, kernel),
        Hook::Egress => at_egress(program, kernel, is_uplink),
    }
}

fn at_ingress(program: Handling, kernel: Answer) -> Agreement {
    match (program, kernel) {
        (Handling::Left, _) => yes("the program leaves the packet to the kernel"),
        (Handling::Leaves { device, gateway }, Answer::Leaves { device: other, gateway: via, .. }) => {
            same_way((device, gateway), (other, via), yes("both send it the same way"))
        }
        (Handling::Leaves { .. }, Answer::Local { .. }) => no("the program sends out what is for this host"),
        (Handling::Leaves { .. }, Answer::Refused(_)) => no("the program forwards what the kernel refuses"),
        (Handling::Dropped, Answer::Refused(Refused::Dropped)) => yes("both drop it silently"),
        (Handling::Dropped, Answer::Refused(_)) => {
            no("the program drops silently what the kernel answers with an ICMP error")
        }
        (Handling::Dropped, _) => no("the program drops what the kernel delivers"),
    }
}

/// The program at an uplink sees only what the kernel sends there.
fn at_egress(program: Handling, kernel: Answer, is_uplink: impl Fn(IfIndex) -> bool) -> Agreement {
    match (program, kernel) {
        (Handling::Left, _) => yes("the program at the uplink lets it pass"),
        (_, Answer::Local { .. }) => yes("it stays on this host"),
        (_, Answer::Leaves { device, .. }) if is_uplink(device) => {
            no("the kernel sends it to the uplink, where the program stops it")
        }
        (Handling::Leaves { device, gateway }, Answer::Leaves { device: other, gateway: via, .. }) => {
            same_way((device, gateway), (other, via), yes("the kernel sends it where the program would"))
        }
        (Handling::Leaves { .. }, Answer::Refused(_)) => no("the program would forward what the kernel refuses"),
        (Handling::Dropped, Answer::Refused(_)) => yes("neither lets it out"),
        (Handling::Dropped, Answer::Leaves { .. }) => no("the program would drop what the kernel sends by a tunnel"),
    }
}

fn same_way(program: (IfIndex, Option<IpAddr>), kernel: (IfIndex, Option<IpAddr>), same: Agreement) -> Agreement {
    match (program, kernel) {
        (program, kernel) if program == kernel => same,
        ((device, _), (other, _)) if device == other => no("they send it to different neighbours"),
        _ => no("they send it by different devices"),
    }
}

/// What finally becomes of a packet: with rules the kernel's answer. Without them the program's decision at ingress counts,
/// and at egress only for what the kernel sends to an uplink; what ingress leaves to the kernel meets the program at the
/// uplink (`guarded`), which keeps a policy's packets from it.
#[must_use]
pub fn without_rules(
    hook: Hook,
    program: Option<Handling>,
    kernel: Answer,
    expected: &Expected,
    guarded: impl Fn(IfIndex) -> bool,
) -> Answer {
    let to_uplink = matches!(kernel, Answer::Leaves { device, .. } if guarded(device));
    match (hook, program) {
        (Hook::Egress, _) if !to_uplink => kernel,
        (_, Some(Handling::Leaves { device, gateway })) => Answer::Leaves { device, gateway, table: 0 },
        // The program at the uplink can only drop, whatever error `on-down` asks for.
        (Hook::Egress, Some(Handling::Dropped)) if let Expected::Refused(refused) = expected => {
            Answer::Refused(*refused)
        }
        (_, Some(Handling::Dropped)) => Answer::Refused(Refused::Dropped),
        (Hook::Egress, _) => kernel,
        (Hook::Ingress, _) => match expected {
            Expected::Tunnel { device, gateway } if to_uplink => {
                Answer::Leaves { device: *device, gateway: *gateway, table: 0 }
            }
            Expected::Refused(refused) if to_uplink => Answer::Refused(*refused),
            _ => kernel,
        },
    }
}

/// Compares what becomes of a packet with what the configuration asks for. `main` tells the main table's way; it is asked
/// only if another table has decided.
#[must_use]
pub fn as_configured(
    expected: &Expected,
    fate: Answer,
    (intent, family): (&Intent, Family),
    main: impl FnOnce() -> MainWay,
) -> Agreement {
    match (expected, fate) {
        (Expected::Unknown(why), _) => yes(why),
        (Expected::Own, Answer::Local { .. }) => yes("it is for this host and stays here"),
        (Expected::Own, _) => no("it is for this host, and does not stay here"),
        (Expected::Tunnel { device, gateway }, Answer::Leaves { device: other, gateway: via, .. }) => {
            match (device == &other, gateway == &via) {
                (true, true) => yes("it leaves by the policy's tunnel"),
                (true, false) => no("it leaves by the policy's tunnel, but to another neighbour than configured"),
                (false, _) => no("it leaves by another device than the policy's tunnel"),
            }
        }
        (Expected::Tunnel { .. }, Answer::Local { .. }) => no("it stays on this host, not by the policy's tunnel"),
        (Expected::Tunnel { .. }, Answer::Refused(_)) => no("it is refused, although the policy's tunnel is up"),
        (Expected::Refused(one), Answer::Refused(other)) if *one == other => yes("it is refused, as `on-down` says"),
        (Expected::Refused(_), Answer::Refused(_)) => no("it is refused in another way than `on-down` says"),
        (Expected::Refused(_), _) => no("it is delivered, although no tunnel of the policy is up"),
        (Expected::Main { exempt }, fate) => by_main(*exempt, fate, (intent, family), main),
    }
}

/// No policy applies: rules of others may decide, but not ahead of a policy that has the source, nor by its table.
fn by_main(
    exempt: bool,
    fate: Answer,
    (intent, family): (&Intent, Family),
    main: impl FnOnce() -> MainWay,
) -> Agreement {
    match fate {
        Answer::Leaves { table, .. } if intent.is_ours(table) => {
            no("it leaves by a table of tunroute, although no policy applies")
        }
        Answer::Leaves { table: TABLE_MAIN | TABLE_DEFAULT, .. } => {
            yes("no policy applies, and the main table decides")
        }
        Answer::Leaves { table, device, .. } if exempt && intent.is_asked_first(family, table) => match main() {
            MainWay::By(devices) if devices.contains(&device) => {
                yes("no policy applies; it leaves as by the main table")
            }
            MainWay::Several => yes("no policy applies; the main table has several ways"),
            _ => no("a rule of others ahead of the policies sends it another way than the main table"),
        },
        Answer::Leaves { .. } => yes("no policy applies, and a rule of others decides"),
        Answer::Local { .. } if exempt && !intent.has_foreign_rules(family) => {
            no("it stays on this host, although it is not for it")
        }
        Answer::Local { .. } => yes("no policy applies, and it stays on this host"),
        Answer::Refused(_) if !exempt && intent.has_foreign_rules(family) => {
            yes("no policy applies, and a rule of others may refuse it")
        }
        Answer::Refused(_) => match main() {
            MainWay::Refuses => yes("no policy applies, and the main table refuses it"),
            MainWay::NoRoute => yes("no policy applies, and the main table has no route"),
            MainWay::By(_) | MainWay::Several => no("it is refused, although the main table has a route"),
        },
    }
}

#[cfg(test)]
mod tests {
    use tunroute_common::maps::{Exit, flags};

    use super::*;

    const UPLINK: IfIndex = 2;

    fn leaves(device: IfIndex, gateway: Option<&str>) -> Handling {
        Handling::Leaves { device, gateway: gateway.map(|gateway| gateway.parse().expect("an address")) }
    }

    fn kernel(device: IfIndex, gateway: Option<&str>) -> Answer {
        let gateway = gateway.map(|gateway| gateway.parse().expect("an address"));
        Answer::Leaves { device, gateway, table: 200 }
    }

    #[test]
    fn every_pair_of_answers() {
        let (local, refused) = (Answer::Local { table: 255 }, Answer::Refused);
        for (hook, program, kernel, agree) in [
            (Hook::Ingress, Handling::Left, kernel(7, None), true),
            (Hook::Ingress, Handling::Left, local, true),
            (Hook::Ingress, Handling::Left, refused(Refused::Prohibit), true),
            (Hook::Ingress, leaves(7, None), kernel(7, None), true),
            (Hook::Ingress, leaves(7, None), kernel(8, None), false),
            (Hook::Ingress, leaves(7, None), kernel(UPLINK, None), false),
            (Hook::Ingress, leaves(7, Some("10.0.0.1")), kernel(7, Some("10.0.0.1")), true),
            (Hook::Ingress, leaves(7, Some("10.0.0.1")), kernel(7, Some("10.0.0.2")), false),
            (Hook::Ingress, leaves(7, None), kernel(7, Some("10.0.0.2")), false),
            (Hook::Ingress, leaves(7, None), local, false),
            (Hook::Ingress, leaves(7, None), refused(Refused::NoRoute), false),
            (Hook::Ingress, leaves(7, None), refused(Refused::Dropped), false),
            (Hook::Ingress, Handling::Dropped, refused(Refused::Dropped), true),
            (Hook::Ingress, Handling::Dropped, refused(Refused::Unreachable), false),
            (Hook::Ingress, Handling::Dropped, refused(Refused::Prohibit), false),
            (Hook::Ingress, Handling::Dropped, refused(Refused::NoRoute), false),
            (Hook::Ingress, Handling::Dropped, kernel(7, None), false),
            (Hook::Ingress, Handling::Dropped, local, false),
            (Hook::Egress, Handling::Left, kernel(UPLINK, None), true),
            (Hook::Egress, leaves(7, None), kernel(7, None), true),
            (Hook::Egress, leaves(7, None), kernel(8, None), false),
            (Hook::Egress, leaves(7, None), kernel(UPLINK, None), false),
            (Hook::Egress, leaves(7, None), local, true),
            (Hook::Egress, leaves(7, None), refused(Refused::Unreachable), false),
            (Hook::Egress, Handling::Dropped, refused(Refused::Unreachable), true),
            (Hook::Egress, Handling::Dropped, kernel(UPLINK, None), false),
            (Hook::Egress, Handling::Dropped, kernel(7, None), false),
            (Hook::Egress, Handling::Dropped, local, true),
        ] {
            let found = agreement(hook, program, kernel, |device| device == UPLINK);
            assert_eq!(found.agree, agree, "{hook} {program:?} {kernel:?}: {}", found.because);
        }
    }

    #[test]
    fn what_was_counted_tells_the_handling() {
        let gateway = [u32::from_ne_bytes([10, 0, 0, 1]), 0, 0, 0];
        let exit = |flags| DeviceExit { ifindex: 7, exit: Exit { mtu: 1500, flags, gateway } };
        let (plain, via) = (exit(0), exit(flags::GATEWAY));
        for (outcome, exit, expected) in [
            (Some(Outcome::Forwarded), &plain, leaves(7, None)),
            (Some(Outcome::Diverted), &via, leaves(7, Some("10.0.0.1"))),
            (Some(Outcome::Blackholed), &plain, Handling::Dropped),
            (Some(Outcome::LeakPrevented), &plain, Handling::Dropped),
            (Some(Outcome::Exempt), &plain, Handling::Left),
            (Some(Outcome::Closed), &plain, Handling::Left),
            (None, &plain, Handling::Left),
        ] {
            assert_eq!(Handling::of(outcome, Some(exit), Family::V4), expected, "{outcome:?}");
        }
    }
}
