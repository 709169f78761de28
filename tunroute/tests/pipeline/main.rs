//! Config in, operations out: the pure stages together, on made-up hosts.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod golden;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use proptest::prelude::*;
use tunroute::{
    config::{Config, Unmatched, Xdp},
    kernel::sysctl::RpFilter,
    policy::ability::shortcomings,
    policy::compile::{Desired, FastInputs, Inputs, compile, follow, probes},
    policy::fast::{FastOp, FastState, Open, Part},
    policy::gates::{kept_out, unguarded},
    policy::net::{
        Address, Family, Handle, Inability, KernelOp, KernelState, Link, LinkLayer, MainRoute, ObservedRoute,
        ObservedRule, Route, RouteKind, Rule, RuleAction,
    },
    policy::plan::{Op, PlanError, plan},
    policy::xdp_devices::Chosen,
};
use tunroute_common::maps::{Action, Source, flags};

const STORY: &str = r#"
    [interfaces]
    ingress = ["lan0", "br-*"]
    uplink = ["net0"]
    [tunnel.sixxs0]
    table = 200
    [tunnel.wg0]
    via = "10.9.0.1"
    [[policy]]
    name = "tunnel0"
    from = ["2a02::1", "2a02:578:85a0::/48", "10.0.0.0/8"]
    via = ["sixxs0", "wg0"]
    exempt = ["connected", "192.0.2.0/24"]
    [[policy]]
    name = "inner"
    from = ["2a02:578:85a0:1::/64"]
    via = "wg0"
    on-down = "next"
"#;

fn link(index: u32, name: &str, layer: LinkLayer) -> Link {
    Link { mtu: 1400, ..Link::new(index, name, layer) }
}

fn main_route(dst: &str, oif: u32, on_link: bool) -> MainRoute {
    MainRoute { dst: dst.parse().unwrap(), oif: Some(oif), on_link, network: on_link, ..MainRoute::default() }
}

/// The kernel's own rule for the local table, of both families.
fn local_rules(priority: u32) -> Vec<ObservedRule> {
    let rule = |family| ObservedRule {
        handle: Handle(usize::MAX),
        family,
        priority,
        ours: false,
        rule: None,
        foreign: None,
        looks_up_local: true,
        looks_up_main: false,
        l3mdev: false,
        iif: None,
        oif: None,
        text: String::new(),
    };
    Family::ALL.map(rule).into()
}

fn host() -> KernelState {
    let links = [
        link(2, "net0", LinkLayer::Ethernet),
        link(3, "lan0", LinkLayer::Ethernet),
        link(4, "sixxs0", LinkLayer::Ip),
        link(5, "wg0", LinkLayer::Ip),
        link(6, "br-guests", LinkLayer::Ethernet),
    ];
    let prefix = |text: &str| text.parse::<IpNet>().unwrap();
    KernelState {
        links: links.into_iter().map(|link| (link.index, link)).collect(),
        rules: local_rules(0),
        local: BTreeSet::from([prefix("10.0.0.1/32"), prefix("2a02::1/128")]),
        main: vec![
            main_route("0.0.0.0/0", 2, false),
            main_route("10.0.0.0/24", 3, true),
            main_route("2a02:578:85a0::/64", 3, true),
            main_route("203.0.113.0/24", 2, true),
        ],
        ..KernelState::default()
    }
}

fn tables(config: &Config) -> BTreeMap<String, u32> {
    let policies = config.policies.iter().map(|policy| policy.name.clone()).zip(200..);
    let probed = config.tunnels.iter().filter(|tunnel| probes::needs_table(tunnel));
    policies.chain(probed.map(|tunnel| probes::table_name(&tunnel.name)).zip(300..)).collect()
}

/// Who takes part in XDP, where that is asked for.
fn early(config: &Config) -> Chosen {
    let all = Chosen { stations: [(3, [2; 6])].into(), targets: [5].into(), devices: Vec::new() };
    if config.xdp == Xdp::On { all } else { Chosen::default() }
}

/// The desired state, with or without rules.
fn desired(config: &Config, kernel: &KernelState, rules: bool, reverse_path: bool) -> Desired {
    compile(&Inputs {
        config,
        kernel,
        tables: &tables(config),
        failed: &BTreeSet::new(),
        rules,
        fast: Some(FastInputs {
            open: Open { v4: true, v6: true },
            closed: &BTreeSet::new(),
            reverse_path,
            unmatched: if config.unmatched == Unmatched::Fast { Open { v4: true, v6: true } } else { Open::default() },
            returning: &BTreeSet::new(),
            xdp: &early(config),
        }),
        before: None,
    })
}

/// The world that the operations are carried out on.
#[derive(Clone, Debug, Default)]
struct World {
    rules: BTreeSet<Rule>,
    routes: BTreeMap<(u32, IpNet, u32), Route>,
    fast: FastState,
}

impl World {
    /// What the kernel of this world says.
    fn kernel(&self, host: &KernelState) -> KernelState {
        let rules = self.rules.iter().enumerate().map(|(index, rule)| ObservedRule {
            handle: Handle(index),
            family: rule.family(),
            priority: rule.priority,
            ours: true,
            rule: Some(rule.clone()),
            looks_up_local: false,
            looks_up_main: false,
            l3mdev: false,
            iif: None,
            oif: rule.oif.clone(),
            foreign: None,
            text: rule.to_string(),
        });
        let routes = self.routes.values().enumerate().map(|(index, route)| ObservedRoute {
            handle: Handle(index),
            family: Family::of(&route.dst),
            route: Some(route.clone()),
            text: route.to_string(),
        });
        let rules = host.rules.iter().cloned().chain(rules).collect();
        KernelState { rules, routes: routes.collect(), ..host.clone() }
    }

    /// Carries out a plan, checking at every step that nothing refers to what is not there.
    fn carry_out(&mut self, operations: &[Op], desired: &Desired) {
        let rules: Vec<Rule> = self.rules.iter().cloned().collect();
        let routes: Vec<_> = self.routes.keys().copied().collect();
        for operation in operations {
            match operation {
                Op::Kernel(KernelOp::AddRule(rule)) => {
                    let missing = desired.routes.iter().find(|route| {
                        Some(route.table) == rule.table() && self.routes.get(&route.key()) != Some(*route)
                    });
                    assert_eq!(missing, None, "{rule} is there before its table's route");
                    let first = desired.rules.iter().find(|first| first.is_local() && first.family() == rule.family());
                    assert!(
                        first.is_none_or(|first| first == rule || self.rules.contains(first)),
                        "{rule} before {first:?}"
                    );
                    if let RuleAction::Leave(end) = rule.action {
                        assert!(self.rules.contains(&Rule::end(end, rule.family())), "{rule} leads nowhere");
                    }
                    assert!(self.rules.insert(rule.clone()), "{rule} twice");
                }
                Op::Kernel(KernelOp::DelRule { handle, .. }) => {
                    let rule = &rules[handle.0];
                    assert!(self.rules.remove(rule));
                    let of_family = |other: &&Rule| other.family() == rule.family() && !desired.rules.contains(*other);
                    let left = self.rules.iter().filter(of_family).find(|other| !other.is_end() && !other.is_local());
                    assert!(!(rule.is_end() || rule.is_local()) || left.is_none(), "{rule} goes before {left:?}");
                }
                Op::Kernel(KernelOp::AddRoute(route)) => {
                    assert!(self.routes.insert(route.key(), route.clone()).is_none(), "{route} is there");
                }
                Op::Kernel(KernelOp::ReplaceRoute(route)) => {
                    assert!(self.routes.insert(route.key(), route.clone()).is_some(), "{route} is not there");
                }
                Op::Kernel(KernelOp::DelRoute { handle, .. }) => {
                    let part = |route: &Route| (route.table, Family::of(&route.dst));
                    let route = self.routes.remove(&routes[handle.0]).unwrap();
                    if route.kind == RouteKind::Throw && desired.routes.iter().any(|other| part(other) == part(&route))
                    {
                        continue;
                    }
                    let undesired = self.rules.iter().find(|rule| !desired.rules.contains(rule));
                    assert_eq!(undesired, None, "an old rule is still there while its routes go");
                }
                Op::Fast(operation) => {
                    if let (FastOp::WriteSlot(_, slot), Some(fast)) = (operation, &desired.fast) {
                        let mut of_set = fast.exempt.iter().filter(|exemption| exemption.set == slot.exempt_set);
                        let missing = of_set.find(|exemption| !self.fast.exempt.contains(exemption));
                        assert_eq!(missing, None, "{operation} before its exemptions");
                    }
                    self.carry_out_fast(operation, desired.fast.as_ref().is_some_and(|fast| fast.shadow));
                }
            }
        }
    }

    fn carry_out_fast(&mut self, operation: &FastOp, shadow: bool) {
        let fast = &mut self.fast;
        match operation {
            FastOp::ClearSlot(index) => {
                assert!(!fast.sources.values().any(|source| source.slot == *index), "slot {index} is in use");
                assert!(fast.slots.contains_key(index));
            }
            FastOp::PutSource(prefix, source) => {
                assert!(fast.slots.contains_key(&source.slot), "{prefix} leads to an empty slot");
            }
            FastOp::RemoveSource(prefix) => assert!(fast.sources.contains_key(prefix)),
            FastOp::AddExemption(exemption) => assert!(!fast.exempt.contains(exemption)),
            FastOp::RemoveExemption(exemption) => assert!(fast.exempt.contains(exemption)),
            FastOp::Attach(attachment) => {
                assert!(!fast.attached.contains(attachment));
                assert!(fast.shadow || !shadow, "{attachment} acts before it is told to watch");
                let ready = fast.stations.contains_key(&attachment.ifindex)
                    && fast.exits.values().any(|exit| exit.exit.has(flags::TAKES_FRAMES));
                assert!(attachment.part != Part::Xdp || ready, "{attachment} has nothing to do");
            }
            FastOp::SetStation(ifindex, station) => assert_ne!(fast.stations.get(ifindex), Some(station)),
            FastOp::RemoveStation(ifindex) => assert!(fast.stations.contains_key(ifindex)),
            FastOp::SetShadow(on) => assert_eq!(*on, shadow),
            FastOp::Detach(attachment) => assert!(fast.attached.contains(attachment)),
            FastOp::WriteSlot(index, slot) => {
                let leads = slot.egress.action() != Action::Redirect || fast.exit_of(slot).is_some();
                assert!(leads, "slot {index} leads to an exit that is not there");
            }
            FastOp::WriteExit(number, ..) => {
                assert!(!fast.exits.contains_key(number), "exit {number} changes");
                assert!(!leads_to(fast, *number), "exit {number} comes under a slot that leads there");
            }
            FastOp::ClearExit(number) => {
                assert!(fast.exits.contains_key(number));
                assert!(!leads_to(fast, *number), "exit {number} goes while a slot leads there");
            }
            FastOp::SetOpen(_) | FastOp::SetUnmatched(_) | FastOp::SetClamp(..) | FastOp::RemoveClamp(_) => {}
        }
        fast.enter(operation);
    }

    fn reach(&mut self, config: &Config, host: &KernelState, rules: bool) -> Vec<String> {
        self.plan(config, host, rules).iter().map(ToString::to_string).collect()
    }

    /// Plans and carries out what leads to a configuration on a host; a second plan must be empty.
    fn plan(&mut self, config: &Config, host: &KernelState, rules: bool) -> Vec<Op> {
        let desired = desired(config, host, rules, false);
        let operations = plan(&desired, &self.kernel(host), Some(&self.fast)).unwrap();
        self.carry_out(&operations, &desired);
        let again = plan(&desired, &self.kernel(host), Some(&self.fast)).unwrap();
        assert_eq!(again, [], "a second plan must be empty");
        operations
    }
}

/// Does any slot lead to the exit with this number?
fn leads_to(fast: &FastState, number: u32) -> bool {
    fast.slots.values().any(|slot| slot.egress.action() == Action::Redirect && slot.egress.exit() == number)
}

#[test]
fn the_story_from_nothing() {
    let config = Config::parse("story", STORY).unwrap();
    let operations = World::default().reach(&config, &host(), true);
    insta::assert_snapshot!(operations.join("\n"));
}

/// Where a policy's frames go XDP asks its table, which is there without rules, too; and what it no longer does, it stops
/// doing at once.
#[test]
fn xdp_comes_and_goes() {
    let without = Config::parse("story", STORY).unwrap();
    let with = Config::parse("story", &format!("xdp = \"on\"\n{STORY}")).unwrap();
    let mut world = World::default();
    let mut host = host();
    host.links.get_mut(&5).unwrap().layer = LinkLayer::Ethernet;
    world.reach(&without, &host, false);
    let came = world.reach(&with, &host, false);
    let went = world.reach(&without, &host, false);
    insta::assert_snapshot!(format!("on:\n{}\n\noff:\n{}", came.join("\n"), went.join("\n")));
}

#[test]
fn a_tunnel_goes_down() {
    let config = Config::parse("story", STORY).unwrap();
    let mut world = World::default();
    let mut host = host();
    world.reach(&config, &host, true);
    host.links.get_mut(&4).unwrap().up = false;
    // The kernel takes the routes of a device that is down away by itself.
    world.routes.retain(|_, route| !route.to_string().contains("dev sixxs0"));
    let first = world.reach(&config, &host, true);
    host.links.get_mut(&5).unwrap().up = false;
    world.routes.retain(|_, route| !route.to_string().contains("dev wg0"));
    let both = world.reach(&config, &host, true);
    insta::assert_snapshot!(format!("sixxs0 down:\n{}\n\nwg0 down, too:\n{}", first.join("\n"), both.join("\n")));
}

#[test]
fn probes_have_a_way_out_with_or_without_rules() {
    let text = STORY
        .replace(
            "table = 200",
            r#"table = 200
            probe = [{ target = "2001:db8::1" }, { target = "[2001:db8::1]:443" }, { target = "2001:db8::2" },
                     { target = "fe80::1" }, { target = "198.51.100.9" }]"#,
        )
        .replace(
            "[tunnel.wg0]",
            r#"[tunnel.wg0]
            probe = [{ target = "10.9.0.1" }, { target = "10.9.8.7" }, { target = "198.51.100.9:443" }]"#,
        );
    let config = Config::parse("probed", &text).unwrap();
    let mut host = host();
    // What is connected to the tunnel needs no gateway; a default route is no such thing.
    for dst in ["10.9.8.0/24", "0.0.0.0/0"] {
        host.main.push(MainRoute { dst: dst.parse().unwrap(), oif: Some(5), on_link: true, ..MainRoute::default() });
    }
    let mut world = World::default();
    for rules in [true, false] {
        let operations = World::default().reach(&config, &host, rules);
        let ways: Vec<&str> = operations
            .iter()
            .filter(|operation| operation.contains("oif") || operation.contains("table 30"))
            .map(String::as_str)
            .collect();
        assert_eq!(
            ways,
            [
                // IPv4 finds sixxs0's target on the link by itself.
                "ip -6 route add 2001:db8::1/128 dev sixxs0 table 300 protocol 116",
                "ip -6 route add 2001:db8::2/128 dev sixxs0 table 300 protocol 116",
                "ip route add 10.9.0.1/32 dev wg0 table 301 protocol 116",
                "ip route add 10.9.8.7/32 dev wg0 table 301 protocol 116",
                "ip route add 198.51.100.9/32 via 10.9.0.1 dev wg0 onlink table 301 protocol 116",
                "ip rule add from all oif wg0 lookup 301 pref 19999 protocol 116",
                "ip -6 rule add from all oif sixxs0 lookup 300 pref 19999 protocol 116",
            ]
        );
    }
    world.reach(&config, &host, true);
    host.links.get_mut(&4).unwrap().up = false;
    world.routes.retain(|_, route| !route.to_string().contains("dev sixxs0"));
    let operations = world.reach(&config, &host, true);
    assert!(!operations.iter().any(|operation| operation.contains("table 300")), "no device, no way: {operations:#?}");
}

#[test]
fn reverse_paths_split_the_sources() {
    let config = Config::parse("story", STORY).unwrap();
    let fast = desired(&config, &host(), true, true).fast.unwrap();
    let sources: Vec<String> =
        fast.sources.prefixes().iter().map(|(prefix, lead)| format!("{prefix} by {}", lead.arrives_by)).collect();
    assert_eq!(
        sources,
        [
            // All of 10/8 would come by the default route's device, but what is on the link by the ingress device.
            "10.0.0.0/8 by 2",
            "10.0.0.0/24 by 3",
            "10.0.0.1/32 by 4294967295",
            "2a02::1/128 by 4294967295",
            "2a02:578:85a0::/48 by 0",
            "2a02:578:85a0:1::/64 by 0",
        ]
    );

    // A rule of somebody else that is asked before the main table may know another way back.
    let mut kernel = host();
    kernel.rules.extend(local_rules(30000).into_iter().map(|rule| ObservedRule { looks_up_local: false, ..rule }));
    let fast = desired(&config, &kernel, true, true).fast.unwrap();
    let mut v4 = fast.sources.prefixes().iter().filter(|(prefix, _)| Family::of(prefix) == Family::V4);
    assert!(v4.all(|(_, lead)| lead.arrives_by == Source::OWN_ADDRESS), "{:?}", fast.sources);
}

#[test]
fn the_reverse_path_filter_keeps_out_what_has_its_way_back_by_an_uplink() {
    const DEFAULT: (&str, Option<u32>) = ("0.0.0.0/0", Some(2));
    let lan = |dst| (dst, Some(3));
    let (strict, loose) = (RpFilter::Strict, RpFilter::Loose);
    let by_uplink = "policy \"tunnel0\": rp_filter of lan0 drops what comes from 10.0.0.0/8: the main table's way back is \
                     net0 (sysctl -w net.ipv4.conf.lan0.rp_filter=2; or make a route back by lan0)";
    let no_way = "policy \"tunnel0\": rp_filter of lan0 drops what comes from 10.0.0.0/8: the main table has no way back \
                  (make a route back by lan0)";
    let and_more = no_way.replace("0/8:", "0/8 and 2 other prefixes:");
    for (from, main, own, filter, expected) in [
        ("\"10.0.0.0/8\"", &[DEFAULT][..], None, strict, Some(by_uplink)),
        ("\"10.0.0.0/8\"", &[DEFAULT], None, loose, None),
        ("\"10.0.0.0/8\"", &[DEFAULT], None, RpFilter::Off, None),
        ("\"10.0.0.0/8\"", &[], None, strict, Some(no_way)),
        ("\"10.0.0.0/8\"", &[], None, loose, Some(no_way)),
        // It comes in as it should, at least a part of it.
        ("\"10.0.0.0/8\"", &[DEFAULT, lan("10.0.0.0/8")], None, strict, None),
        ("\"10.0.0.0/8\"", &[DEFAULT, lan("10.5.0.0/16")], None, strict, None),
        ("\"10.0.0.0/8\"", &[DEFAULT], Some("10.0.0.1/32"), strict, None),
        // It comes by a tunnel, or by one of several ways.
        ("\"10.0.0.0/8\"", &[DEFAULT, ("10.0.0.0/8", Some(4))], None, strict, None),
        ("\"10.0.0.0/8\"", &[("0.0.0.0/0", None)], None, strict, None),
        ("\"10.0.0.0/8\"", &[DEFAULT, DEFAULT], None, strict, None),
        ("\"10.0.0.0/8\", \"10.6.0.0/16\", \"11.0.0.0/8\"", &[], None, strict, Some(&and_more)),
        // It is IPv4's.
        ("\"2a02:578:85a0::/48\"", &[], None, strict, None),
    ] {
        let text = format!(
            "[interfaces]\ningress = [\"lan0\"]\nuplink = [\"net0\"]\n[tunnel.sixxs0]\n[[policy]]\nname = \"tunnel0\"\n\
             from = [{from}]\nvia = \"sixxs0\""
        );
        let config = Config::parse("filtered", &text).unwrap();
        let main = main.iter().map(|(dst, oif)| MainRoute {
            dst: dst.parse().unwrap(),
            oif: *oif,
            on_link: false,
            ..MainRoute::default()
        });
        let local = own.into_iter().map(|own| own.parse().unwrap());
        let kernel = KernelState { main: main.collect(), local: local.collect(), ..host() };
        let sources = desired(&config, &kernel, true, filter.is_on()).fast.unwrap().sources;
        let kept = kept_out(&config, &kernel, &sources, &[(3, filter)].into());
        let words: Vec<String> = kept.iter().map(|kept| format!("{kept} ({})", kept.advice())).collect();
        assert_eq!(words, Vec::from_iter(expected), "{from} by {main:?}, {own:?}, {filter:?}", main = kernel.main);
    }
}

#[test]
fn sources_follow_an_interface() {
    let text = |policies: &str| {
        let interfaces = "[interfaces]\ningress = [\"lan0\"]\n[tunnel.sixxs0]\n[tunnel.wg0]\n";
        let config = Config::parse("following", &format!("{interfaces}{policies}")).unwrap();
        (config, host())
    };
    let policy = |name: &str, from: &str| format!("[[policy]]\nname = \"{name}\"\nvia = \"sixxs0\"\nfrom = [{from}]\n");
    let sources = |config: &Config| {
        let prefixes = config.policies.iter().map(|policy| policy.sources().map(ToString::to_string).collect());
        prefixes.collect::<Vec<Vec<String>>>()
    };
    let v6 = "2a02:578:85a0::/64";

    // No link-local, no default route, and nothing behind a gateway.
    let (mut config, mut host) = text(&policy("office", "\"2a02::1\", \"@lan0\""));
    for (dst, oif, on_link) in [("fe80::/64", 3, true), ("::/0", 3, true), ("10.7.0.0/16", 3, false)] {
        host.main.push(MainRoute { dst: dst.parse().unwrap(), oif: Some(oif), on_link, ..MainRoute::default() });
    }
    assert_eq!(follow(&mut config, &host), [""; 0]);
    assert_eq!(sources(&config), [["2a02::1/128", "10.0.0.0/24", v6]]);
    // Another prefix in the place of one: what comes is there before what goes.
    let mut world = World::default();
    world.reach(&config, &host, true);
    let new = "2a02:578:85af::/64".parse().unwrap();
    host.main.iter_mut().filter(|route| route.dst.to_string() == v6).for_each(|route| route.dst = new);
    follow(&mut config, &host);
    let operations = world.reach(&config, &host, true);
    let place = |text: &str| {
        let place = operations.iter().position(|operation| operation.contains(text));
        place.unwrap_or_else(|| panic!("no {text:?} in {operations:#?}"))
    };
    assert!(place("rule add from 2a02:578:85af::/64") < place("rule del from 2a02:578:85a0::/64"), "{operations:#?}");
    assert!(place("source[2a02:578:85af::/64] =") < place("source[2a02:578:85a0::/64] removed"), "{operations:#?}");
    // The interface has nothing any more, and then it is gone.
    host.main.retain(|route| route.oif != Some(3));
    follow(&mut config, &host);
    assert_eq!(sources(&config), [["2a02::1/128"]]);
    host.links.remove(&3);
    assert_eq!((follow(&mut config, &host), sources(&config)), (vec![], vec![vec!["2a02::1/128".to_owned()]]));

    // The literal one comes before the first, the first before the second; a policy may have its own twice.
    let policies = policy("first", "\"@lan*\", \"10.0.0.0/24\"") + &policy("second", "\"@lan0\"");
    let (mut config, host) = text(&(policies + &policy("third", &format!("\"{v6}\""))));
    let problems = follow(&mut config, &host);
    assert_eq!(sources(&config), [vec!["10.0.0.0/24"], vec![], vec![v6]]);
    let starts = [
        format!("policy \"first\" does not get {v6} of lan0: policy \"third\" has it;"),
        "policy \"second\" does not get 10.0.0.0/24 of lan0: policy \"first\" has it;".to_owned(),
        format!("policy \"second\" does not get {v6} of lan0: policy \"third\" has it;"),
    ];
    assert!(problems.len() == 3 && problems.iter().zip(&starts).all(|(problem, start)| problem.starts_with(start)));
    World::default().reach(&config, &host, true);

    // Own addresses, without those in a network that is there anyway; never the peer, and nothing link-local. A longer range
    // takes its part from a shorter one.
    for (first, second, expected) in [
        ("@ppp0", "@wg0", [vec!["100.64.3.7/32", "2001:db8:a::7/128"], vec!["10.8.0.2/32", "2001:db8:b::2/128"]]),
        ("@lan0", "@ppp0", [vec!["10.0.0.0/24", v6], vec!["100.64.3.7/32", "2001:db8:a::7/128"]]),
        (
            "@*",
            "@* in 2001:db8:a::/48",
            [
                vec!["10.0.0.0/24", "10.8.0.2/32", "100.64.3.7/32", "203.0.113.0/24", "2001:db8:b::2/128", v6],
                vec!["2001:db8:a::7/128"],
            ],
        ),
        ("@ppp0 in ::/0", "@ppp0 in 100.64.0.0/10", [vec!["2001:db8:a::7/128"], vec!["100.64.3.7/32"]]),
        ("@lan0 in 2a02:578:85a0::/64", "@lan0 in 2a02:578:85a0::/48", [vec![v6], vec![]]),
        ("@lan0 in 10.0.0.0/25", "@wg0 in 10.8.0.0/16", [vec!["10.0.0.1/32"], vec!["10.8.0.2/32"]]),
    ] {
        let policies = policy("first", &format!("\"{first}\"")) + &policy("second", &format!("\"{second}\""));
        let (mut config, mut host) = text(&policies);
        host.links.insert(7, link(7, "ppp0", LinkLayer::Ip));
        // The peer's address is on the link, as the kernel sees it.
        host.main.push(main_route("100.64.0.1/32", 7, true));
        let addresses = [
            (3, "10.0.0.1", None),
            (3, "2a02:578:85a0::1", None),
            (3, "fe80::3", None),
            (5, "10.8.0.2", None),
            (5, "2001:db8:b::2", None),
            (7, "100.64.3.7", Some("100.64.0.1")),
            (7, "2001:db8:a::7", Some("fe80::9")),
        ];
        let parse = |text: &str| text.parse().unwrap();
        let address =
            |(device, own, peer): (_, _, Option<&str>)| Address { device, own: parse(own), peer: peer.map(parse) };
        host.addresses = addresses.map(address).into();
        assert_eq!(follow(&mut config, &host), [""; 0], "{first}, {second}");
        assert_eq!(sources(&config), expected, "{first}, {second}");
    }

    // What the interface has may be inside more policies than the programs follow: that is told, and not done halfway.
    let nested: String =
        (40..48).map(|length| policy(&length.to_string(), &format!("\"2a02:578:8500::/{length}\""))).collect();
    let (mut config, mut host) = text(&(nested + &policy("office", "\"@lan0\"")));
    host.main.push(MainRoute {
        dst: "2a02:578:8500::/64".parse().unwrap(),
        oif: Some(3),
        on_link: true,
        ..MainRoute::default()
    });
    follow(&mut config, &host);
    let refused = plan(&desired(&config, &host, true, false), &host, Some(&FastState::default())).unwrap_err();
    assert_eq!(refused, PlanError::Nesting { needed: 9 });
}

/// What a tunnel cannot carry goes by the next one, or nowhere; the other family does not notice.
#[test]
fn each_family_has_its_own_tunnel() {
    const VIA: &str = "[tunnel.sixxs0]\n[tunnel.wg0]\nvia = \"2001:db8::1\"\n";
    let by = |device: &str, family| Some((device.to_owned(), family));
    let (v4, v6) = (Family::V4, Family::V6);
    for (unable, up, expected) in [
        (None, true, [by("sixxs0", v4), by("sixxs0", v6)]),
        (Some((v6, Inability::Disabled)), true, [by("sixxs0", v4), by("wg0", v6)]),
        (Some((v6, Inability::Mtu(1200))), true, [by("sixxs0", v4), by("wg0", v6)]),
        (Some((v4, Inability::Driver)), true, [None, by("sixxs0", v6)]),
        (None, false, [None, by("wg0", v6)]),
    ] {
        let what = format!("{unable:?}, up: {up}");
        let text = format!(
            "{VIA}[[policy]]\nname = \"p\"\nfrom = [\"10.0.0.0/8\", \"2a02::/16\"]\nvia = [\"sixxs0\", \"wg0\"]\n"
        );
        let config = Config::parse("families", &text).unwrap();
        let mut host = host();
        // An Ethernet device whose gateway is IPv6's alone carries no IPv4.
        host.links.insert(5, link(5, "wg0", LinkLayer::Ethernet));
        host.links.insert(4, Link { unable: unable.into_iter().collect(), up, ..link(4, "sixxs0", LinkLayer::Ip) });
        let told: Vec<String> = shortcomings(&config, &host).into_iter().map(|found| found.reason).collect();
        assert_eq!(
            told.last().map(String::as_str),
            Some("wg0 is an Ethernet device, and the tunnel's `via` has no IPv4 gateway")
        );
        assert_eq!(told.len(), 1 + usize::from(unable.is_some()), "{what}: {told:?}");
        let desired = desired(&config, &host, true, false);
        let device = |route: &Route| match &route.kind {
            RouteKind::Unicast { device, .. } => Some((device.clone(), Family::of(&route.dst))),
            _ => None,
        };
        let routes: Vec<_> = desired.routes.iter().filter_map(device).collect();
        assert_eq!(routes, Vec::from_iter(expected.iter().flatten().cloned()), "{what}");
        for slot in desired.fast.unwrap().slots.values() {
            let there = expected[slot.family as usize].as_ref().and_then(|(device, _)| host.link(device));
            assert_eq!(slot.exit.map(|exit| exit.ifindex), there.map(|link| link.index), "{what}, {}", slot.family);
        }
    }
}

/// Without rules, each way out of the main table has to be guarded from the first packet on.
#[test]
fn ways_out_that_no_program_guards() {
    for (uplinks, routes, expected) in [
        ("\"net0\"", &[][..], &[][..]),
        ("", &[], &["no device is an `uplink`", "the main table has 0.0.0.0/0 by net0"]),
        ("\"net0\", \"net1\"", &[], &["the uplink net1 does not exist"]),
        ("\"net*\"", &[], &["a new device that matches the uplink \"net*\""]),
        // Another way out, whole or in parts; and destinations behind a tunnel.
        ("\"net0\"", &[("::/0", 4, true)], &["the main table has ::/0 by sixxs0"]),
        ("\"net0\"", &[("128.0.0.0/1", 6, false)], &["the main table has 128.0.0.0/1 by br-guests"]),
        ("\"net0\"", &[("203.0.113.0/24", 5, false)], &["the main table has 203.0.113.0/24 by wg0"]),
        // On a tunnel's link, and behind an inside router.
        ("\"net0\"", &[("10.8.0.0/24", 5, true), ("10.9.0.0/24", 3, false)], &[]),
    ] {
        let config = Config::parse("story", &STORY.replace("\"net0\"", uplinks)).unwrap();
        let mut host = host();
        host.main.extend(routes.iter().map(|(dst, oif, on_link)| main_route(dst, *oif, *on_link)));
        let reasons = unguarded(&config, &host);
        let as_expected = reasons.iter().zip(expected).all(|(reason, start)| reason.starts_with(start));
        assert!(as_expected && reasons.len() == expected.len(), "{uplinks}, {routes:?}: {reasons:#?}");
    }
}

/// Whoever decides, the tunnels' segment sizes are limited; with the kernel datapath the programs do nothing else.
#[test]
fn segment_sizes_are_limited_with_every_datapath() {
    for datapath in ["both", "kernel", "ebpf", "shadow"] {
        let text = STORY.replace("table = 200", "mss = \"auto\"");
        let config = Config::parse("story", &format!("datapath = \"{datapath}\"\n{text}")).unwrap();
        let mut host = host();
        let mut world = World::default();
        let operations = world.reach(&config, &host, true);
        let decide = operations.iter().any(|operation| operation.contains("map source["));
        assert_eq!(decide, datapath != "kernel");
        let programs: Vec<&str> = operations.iter().filter_map(|text| text.strip_prefix("attach program ")).collect();
        assert!(programs.contains(&"mss egress dev sixxs0") && programs.contains(&"mss ingress dev sixxs0"));
        assert_eq!(programs.len() == 2, datapath == "kernel", "{programs:?}");
        let limit = operations.iter().position(|operation| operation == "map mss[ifindex 4] = IPv4 1360, IPv6 1340");
        let attached = operations.iter().position(|operation| operation.starts_with("attach program mss"));
        assert!(limit.is_some() && limit < attached, "{operations:#?}");
        // The tunnel shrinks, and then another one of its name has its place.
        host.links.get_mut(&4).unwrap().mtu = 1300;
        assert!(world.reach(&config, &host, true).contains(&"map mss[ifindex 4] = IPv4 1260, IPv6 1240".to_owned()));
        let link = Link { index: 9, ..host.links.remove(&4).unwrap() };
        host.links.insert(9, link);
        world.fast.attached.retain(|attachment| attachment.ifindex != 4);
        world.fast.pinned.retain(|attachment| attachment.ifindex != 4);
        world.routes.retain(|_, route| !route.to_string().contains("dev sixxs0"));
        let operations = world.reach(&config, &host, true);
        assert!(operations.contains(&"map mss[ifindex 4] removed".to_owned()), "{operations:#?}");
    }
}

#[test]
fn without_rules_no_kernel_operation() {
    let config = Config::parse("story", STORY).unwrap();
    let operations = World::default().reach(&config, &host(), false);
    assert!(operations.iter().all(|operation| !operation.starts_with("ip ")), "{operations:#?}");
    assert!(operations.iter().any(|operation| operation.starts_with("attach ")));
}

/// A policy's part of a configuration.
fn policy() -> impl Strategy<Value = String> {
    let prefix = prop_oneof![
        (0u8..4, 8u8..=32)
            .prop_map(|(net, length)| { IpNet::new([10, net, 0, 0].into(), length).unwrap().trunc().to_string() }),
        (0u16..4, 16u8..=128).prop_map(|(net, length)| {
            IpNet::new([0x2a02, net, 0, 0, 0, 0, 0, 0].into(), length).unwrap().trunc().to_string()
        }),
    ];
    let via = prop::sample::subsequence(vec!["\"sixxs0\"", "\"wg0\""], 1..=2).prop_shuffle();
    let exempt = prop::sample::subsequence(vec!["\"connected\"", "\"192.0.2.0/24\"", "\"2001:db8::/32\""], 0..=3);
    let on_down = prop::sample::select(vec!["unreachable", "blackhole", "prohibit", "next"]);
    (prop::collection::btree_set(prefix, 1..4), via, exempt, on_down).prop_map(|(from, via, exempt, on_down)| {
        let from: Vec<String> = from.iter().map(|prefix| format!("\"{prefix}\"")).collect();
        format!(
            "from = [{}]\nvia = [{}]\nexempt = [{}]\non-down = \"{on_down}\"\n",
            from.join(", "),
            via.join(", "),
            exempt.join(", ")
        )
    })
}

/// A tunnel's device: its number, its MTU, and whether it is up.
fn device() -> impl Strategy<Value = (u32, u32, bool)> {
    (0u32..2, prop::sample::select(vec![1280, 1400]), any::<bool>())
}

/// A configuration that holds, and the tunnels' devices.
fn situation() -> impl Strategy<Value = (Config, [(u32, u32, bool); 2], bool)> {
    let policies = prop::collection::vec((policy(), 0u8..5), 0..6);
    let datapath = prop::sample::select(vec!["both", "shadow"]);
    (policies, [device(), device()], any::<bool>(), datapath).prop_filter_map(
        "valid",
        |(policies, devices, rules, datapath)| {
            let mut text = format!("datapath = \"{datapath}\"\n");
            text += "[interfaces]\ningress = [\"lan0\"]\nuplink = [\"net0\"]\n[tunnel.sixxs0]\n[tunnel.wg0]\n";
            for (policy, name) in policies {
                text += &format!("[[policy]]\nname = \"p{name}\"\n{policy}");
            }
            Some((Config::parse("generated", &text).ok()?, devices, rules))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// From any situation to any other: every step is sound, and the next plan is empty.
    #[test]
    fn any_change_is_made_before_anything_breaks(situations in prop::collection::vec(situation(), 1..5)) {
        let mut world = World::default();
        for (config, devices, rules) in situations {
            let mut host = host();
            for (usual, (other, mtu, up)) in [4, 5].into_iter().zip(devices) {
                let link = host.links.remove(&usual).unwrap();
                let index = usual + 10 * other;
                host.links.insert(index, Link { index, mtu, up, ..link });
            }
            // The kernel clears what leads to devices that are gone.
            for exit in world.fast.exits.values_mut().filter(|exit| !host.links.contains_key(&exit.ifindex)) {
                exit.ifindex = 0;
            }
            world.routes.retain(|_, route| match &route.kind {
                RouteKind::Unicast { oif, .. } => host.links.get(oif).is_some_and(|link| link.up),
                _ => true,
            });
            world.reach(&config, &host, rules);
        }
    }
}
