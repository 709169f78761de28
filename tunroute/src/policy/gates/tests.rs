use super::*;
use crate::policy::net::{Foreign, Handle};

fn link(index: IfIndex, name: &str, kind: Option<&str>, master: Option<IfIndex>) -> (IfIndex, Link) {
    (index, Link { kind: kind.map(Into::into), master, ..Link::new(index, name, LinkLayer::Ethernet) })
}

fn rule(priority: u32) -> ObservedRule {
    ObservedRule {
        handle: Handle(0),
        family: Family::V4,
        priority,
        ours: false,
        rule: None,
        looks_up_local: false,
        looks_up_main: false,
        l3mdev: false,
        iif: None,
        oif: None,
        foreign: None,
        text: "TEXT".into(),
    }
}

fn hook(family: Option<Family>, point: HookPoint) -> Hook {
    Hook { family, point, name: "HOOK".into() }
}

/// The gates of `lan0`, in words, for one change of a host where all of them are open.
fn closed(family: Family, change: impl FnOnce(&mut KernelState, &mut Probes, &mut bool)) -> Vec<String> {
    let links = [
        link(1, "lan0", None, None),
        link(2, "br0", Some("bridge"), None),
        link(3, "vrf0", Some("vrf"), None),
        link(4, "lan1", None, None),
    ];
    let mut state = KernelState { links: links.into(), ..KernelState::default() };
    let mut probes = Probes::new([(1, [true, true])].into());
    let mut bypass_netfilter = false;
    change(&mut state, &mut probes, &mut bypass_netfilter);
    let config = "[interfaces]\ningress = [\"lan0\"]\n[tunnel.wg0]\n[[policy]]\nname = \"p\"\nvia = \"wg0\"\n\
                  from = [\"10.1.0.0/16\", \"10.3.0.0/24\", \"2001:db8::/32\"]\n";
    let policies = crate::config::Config::parse("t.toml", config).unwrap().policies;
    let input = GateInput {
        state: &state,
        probes: &probes,
        ingress: &[1, 99],
        last: 20129,
        policies: &policies,
        bypass_netfilter,
    };
    let report = gates(&input);
    let closed = report.closed(1, family);
    assert_eq!(report.is_open(1, family), closed.is_empty());
    assert!(!report.is_open(99, family) && !report.is_open(4, family), "nobody asked, or it does not exist");
    assert!(closed.iter().all(|gate| !gate.advice().is_empty()));
    closed.iter().map(ToString::to_string).collect()
}

#[test]
fn an_ordinary_router_has_all_gates_open() {
    for family in Family::ALL {
        assert_eq!(closed(family, |_, _, _| {}), [""; 0]);
    }
}

#[test]
fn devices() {
    let with = |change: fn(&mut Link)| closed(Family::V6, |state, _, _| change(state.links.get_mut(&1).unwrap()));
    assert_eq!(with(|link| link.layer = LinkLayer::Ip), [""; 0]);
    assert_eq!(with(|link| link.layer = LinkLayer::Other), ["lan0 carries neither Ethernet nor bare IP packets"]);
    assert_eq!(with(|link| link.master = Some(2)), ["lan0 is a port of br0"]);
    assert_eq!(with(|link| link.master = Some(3)), ["lan0 belongs to a VRF"]);
    assert_eq!(with(|link| link.master = Some(77)), ["lan0 is a port of another device"]);
    assert_eq!(with(|link| link.kind = Some("vrf".into())), ["lan0 belongs to a VRF"]);
}

#[test]
fn forwarding_is_a_matter_of_the_family() {
    let only_v4 =
        |_: &mut KernelState, probes: &mut Probes, _: &mut bool| *probes = Probes::new([(1, [true, false])].into());
    assert_eq!(closed(Family::V4, only_v4), [""; 0]);
    assert_eq!(closed(Family::V6, only_v4), ["the kernel does not forward IPv6 from lan0"]);
    let unknown = |_: &mut KernelState, probes: &mut Probes, _: &mut bool| *probes = Probes::new(BTreeMap::new());
    assert_eq!(closed(Family::V4, unknown), ["the kernel does not forward IPv4 from lan0"]);
}

#[test]
fn rules_that_come_first() {
    let with = |rule: ObservedRule| closed(Family::V4, |state, _, _| state.rules.push(rule)).len();
    let from = |prefix: &str, inverted| {
        let from = Some(prefix.parse().unwrap());
        ObservedRule { foreign: Some(Box::new(Foreign { from, inverted, ..Foreign::default() })), ..rule(1) }
    };
    for (closes, rule) in [
        // Sources: around a policy's, the same, inside, beside, and all but those.
        (1, from("10.0.0.0/8", false)),
        (1, from("10.1.0.0/16", false)),
        (1, from("10.1.2.0/24", false)),
        (1, from("10.2.0.0/15", false)),
        (0, from("10.2.0.0/16", false)),
        (0, from("10.0.255.255/32", false)),
        (0, from("10.3.1.0/24", false)),
        (0, from("192.0.2.0/24", false)),
        (1, from("192.0.2.0/24", true)),
        (1, rule(1)),
        (1, rule(20129)),
        (0, rule(20130)),
        (0, rule(32766)),
        (0, ObservedRule { family: Family::V6, ..rule(1) }),
        (0, ObservedRule { ours: true, ..rule(1) }),
        (0, ObservedRule { looks_up_local: true, ..rule(0) }),
        (0, ObservedRule { l3mdev: true, ..rule(1000) }),
        (0, ObservedRule { looks_up_local: true, ..rule(100) }),
        (0, ObservedRule { oif: Some("lan0".into()), ..rule(1) }),
        (1, ObservedRule { iif: Some("lan0".into()), ..rule(1) }),
        (0, ObservedRule { iif: Some("lan1".into()), ..rule(1) }),
        (0, ObservedRule { iif: Some("lo".into()), ..rule(1) }),
    ] {
        assert_eq!(with(rule.clone()), closes, "{rule:?}");
    }
}

#[test]
fn netfilter() {
    let ingress = |devices: &[&str]| HookPoint::Ingress(devices.iter().map(ToString::to_string).collect());
    for (closes_v4, closes_v6, hook) in [
        (1, 1, hook(None, HookPoint::Forwarding)),
        (1, 0, hook(Some(Family::V4), HookPoint::Forwarding)),
        (0, 1, hook(Some(Family::V6), HookPoint::Forwarding)),
        (0, 0, hook(None, HookPoint::Local)),
        (1, 1, hook(None, HookPoint::Egress)),
        (1, 1, hook(None, ingress(&["lan1", "lan0"]))),
        (1, 1, hook(None, ingress(&["lan*"]))),
        (0, 0, hook(None, ingress(&["lan", "lan00", "br*"]))),
        (0, 0, hook(None, ingress(&[]))),
    ] {
        for (family, closes) in [(Family::V4, closes_v4), (Family::V6, closes_v6)] {
            let with = |bypass: bool| {
                closed(family, |_, probes, bypass_netfilter| {
                    probes.hooks = Ok(vec![hook.clone()]);
                    *bypass_netfilter = bypass;
                })
            };
            assert_eq!(with(false).len(), closes, "{hook:?}");
            assert_eq!(with(true), [""; 0], "{hook:?}");
        }
    }
    let many = closed(Family::V4, |_, probes, _| probes.hooks = Ok(vec![hook(None, HookPoint::Forwarding); 6]));
    assert_eq!(many, ["netfilter looks at forwarded IPv4 packets: HOOK, HOOK, HOOK, HOOK and 2 more"]);
}

#[test]
fn what_is_not_known_closes_the_gate() {
    let unknown = |_: &mut KernelState, probes: &mut Probes, _: &mut bool| {
        probes.hooks = Err("WHY".into());
        probes.xfrm = Err("WHY".into());
    };
    assert_eq!(
        closed(Family::V4, unknown),
        ["cannot tell whether there are netfilter hooks: WHY", "cannot tell whether there are IPsec policies: WHY"]
    );
    assert_eq!(
        closed(Family::V4, |_, probes, _| probes.xfrm = Ok(true)),
        ["IPsec policies (xfrm) apply to forwarded packets"]
    );
}
