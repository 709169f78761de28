use proptest::prelude::*;

use super::*;
use crate::policy::net::{Handle, Route, RouteKind, Rule, RuleAction};

fn prefix() -> impl Strategy<Value = ipnet::IpNet> {
    let v4 = (any::<[u8; 4]>(), 0..=32_u8).prop_map(|(address, length)| (address.into(), length));
    let v6 = (any::<[u8; 16]>(), 0..=128_u8).prop_map(|(address, length)| (address.into(), length));
    prop_oneof![v4, v6].prop_map(|(address, length)| ipnet::IpNet::new(address, length).unwrap().trunc())
}

fn some_rule() -> impl Strategy<Value = Rule> {
    let oif = prop::option::of("[a-z0-9.@-]{1,15}");
    let action = prop_oneof![
        (1..=u32::MAX).prop_map(RuleAction::Lookup),
        any::<u32>().prop_map(RuleAction::Goto),
        Just(RuleAction::Nop)
    ];
    (any::<u32>(), prefix(), any::<bool>(), oif, action).prop_map(|(priority, from, not, oif, action)| Rule {
        priority,
        from,
        not,
        oif,
        action,
    })
}

fn some_route() -> impl Strategy<Value = Route> {
    let kind = (0..6_u8, 1..1000_u32, any::<[u8; 4]>(), any::<[u8; 16]>());
    (1..=u32::MAX, prefix(), 1..=u32::MAX, kind).prop_map(|(table, dst, metric, (kind, oif, v4, v6))| {
        let gateway = match Family::of(&dst) {
            Family::V4 => v4.into(),
            Family::V6 => v6.into(),
        };
        let unicast = |gateway| RouteKind::Unicast { oif, device: format!("if{oif}"), gateway };
        let kind = match kind {
            0 => unicast(None),
            1 => unicast(Some(gateway)),
            2 => RouteKind::Throw,
            3 => RouteKind::Unreachable,
            4 => RouteKind::Blackhole,
            _ => RouteKind::Prohibit,
        };
        // The kernel fills in a metric that is left out; here nobody does.
        let metric = if metric == Family::of(&dst).default_metric() { 7 } else { metric };
        Route { table, dst, metric, kind }
    })
}

/// Everything that reads what came from a socket.
fn read(bytes: &[u8]) {
    for message in socket::messages(bytes) {
        let _ = link::parse(message.payload);
        let _ = rule::parse_ours(message.payload);
        let _ =
            route::Seen::parse(message.payload).map(|seen| (seen.text(&|index| index.to_string()), seen.main_route()));
    }
}

proptest! {
    #[test]
    fn a_rule_is_read_as_written(rule in some_rule()) {
        let read = rule::parse(rule.family(), &rule::message(&rule), Handle(3)).unwrap();
        prop_assert!(read.ours && read.handle == Handle(3));
        prop_assert_eq!(&read.text(), &rule.to_string());
        prop_assert_eq!(read.rule, Some(rule));
    }

    #[test]
    fn a_route_is_read_as_written(route in some_route()) {
        let read = route::Seen::parse(&route::message(&route)).unwrap();
        prop_assert!(read.ours);
        prop_assert_eq!(read.route(&|index| format!("if{index}")), Some(route));
    }

    #[test]
    fn no_bytes_bring_a_reader_down(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        read(&bytes);
        let _ = link::parse(&bytes);
        let _ = rule::parse_ours(&bytes);
        let _ = route::Seen::parse(&bytes);
    }

    #[test]
    fn no_damage_brings_a_reader_down(
        rule in some_rule(),
        route in some_route(),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        length in any::<prop::sample::Index>(),
    ) {
        for payload in [rule::message(&rule), route::message(&route)] {
            let mut damaged = payload.clone();
            damaged[at.index(payload.len())] = value;
            damaged.truncate(length.index(payload.len() + 1));
            let _ = rule::parse_ours(&damaged);
            let _ = route::Seen::parse(&damaged).map(|seen| seen.text(&|index| index.to_string()));
            let _ = link::parse(&damaged);
        }
    }
}

#[test]
fn what_depends_on_a_kind_is_observed_with_it() {
    for (kinds, expected) in [
        (Kinds::NONE, Kinds::NONE),
        (Kinds::RULES, Kinds::RULES),
        (Kinds::NETCONF, Kinds::NETCONF),
        (Kinds::LINKS, Kinds::LINKS | Kinds::ROUTES),
        (Kinds::ROUTES, Kinds::LINKS | Kinds::ROUTES),
        (Kinds::ADDRESSES, Kinds::ADDRESSES | Kinds::LINKS | Kinds::ROUTES),
    ] {
        assert_eq!(kinds.with_consequences(), expected);
    }
    assert_eq!(Kinds::ALL.to_string(), "links, routes, rules, addresses, settings");
    assert_eq!(Kinds::NONE.to_string(), "nothing");
}
