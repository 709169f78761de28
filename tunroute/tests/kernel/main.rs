//! The kernel backend against a real kernel: every test in a network namespace of its own. Needs root.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail anywhere, its helpers too")]

mod gates;
mod lab;
/// Of the integration tests, whose crate depends on this one.
#[path = "../../../tests/src/nft.rs"]
mod nft;
mod query;
mod tree;
mod watch;

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use lab::{RouteMonitor, in_namespace, ip};
use tunroute::{
    kernel::{Kernel, KernelError, Kinds, Snapshot},
    policy::compile::Desired,
    policy::net::{Family, Handle, IfIndex, KernelOp, LinkLayer, ObservedRoute, Route, RouteKind, Rule, RuleAction},
    policy::plan::Undone,
};
use watch::next;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn rule(priority: u32, from: &str, table: u32) -> Rule {
    Rule::new(priority, net(from), RuleAction::Lookup(table))
}

fn bound(priority: u32, from: &str, oif: &str, table: u32) -> Rule {
    Rule { oif: Some(oif.to_owned()), ..rule(priority, from, table) }
}

fn route(table: u32, dst: &str, metric: u32, kind: RouteKind) -> Route {
    Route { table, dst: net(dst), metric, kind }
}

fn unicast(device: &str, oif: IfIndex, gateway: Option<&str>) -> RouteKind {
    RouteKind::Unicast { oif, device: device.into(), gateway: gateway.map(|gateway| gateway.parse().unwrap()) }
}

/// Two devices that are up, `t0` and `t1`, and their numbers.
fn devices() -> (IfIndex, IfIndex) {
    for name in ["t0", "t1"] {
        ip(&format!("tuntap add {name} mode tun"));
        ip(&format!("link set {name} up"));
    }
    let index = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
    (index("t0"), index("t1"))
}

async fn observe(kernel: &Kernel) -> Snapshot {
    kernel.observe(Kinds::ALL, None).await.unwrap()
}

async fn apply(kernel: &Kernel, ops: &[KernelOp]) {
    let snapshot = observe(kernel).await;
    let errors = kernel.apply_all(ops, &snapshot, &mut Undone::default()).await;
    assert!(errors.is_empty(), "{errors:?}");
}

fn our_rules(snapshot: &Snapshot) -> BTreeSet<Rule> {
    snapshot.state.rules.iter().filter_map(|observed| observed.rule.clone()).collect()
}

fn our_routes(snapshot: &Snapshot) -> BTreeSet<Route> {
    snapshot.state.routes.iter().filter_map(|observed| observed.route.clone()).collect()
}

/// A rule of ours as an operation that deletes it.
fn deletion(snapshot: &Snapshot, wanted: &Rule) -> KernelOp {
    let observed = snapshot.state.rules.iter().find(|observed| observed.rule.as_ref() == Some(wanted)).unwrap();
    observed.removal()
}

#[test]
fn rules_are_read_as_they_were_written() {
    in_namespace(async || {
        let (kernel, _events) = Kernel::connect().unwrap();
        let rules: BTreeSet<_> = [
            rule(20128, "0.0.0.0/0", 7),
            rule(20096, "192.0.2.1/32", 200),
            rule(20104, "192.0.2.0/24", 255 + 1),
            rule(20000, "2a02::1/128", 200),
            rule(20080, "2a02:578:85a0::/48", 4_000_000_000),
            rule(20128, "::/0", 100_000),
            rule(1, "10.0.0.0/8", 1),
            // Of a device that exists, and of one that does not.
            bound(20000, "0.0.0.0/0", "lo", 300),
            bound(20000, "::/0", "lo", 300),
            bound(20000, "::/0", "a-late.tunnel1", 301),
            bound(20000, "2a02::1/128", "a-late.tunnel1", 301),
        ]
        .into();
        let ops: Vec<_> = rules.iter().cloned().map(KernelOp::AddRule).collect();
        apply(&kernel, &ops).await;
        let snapshot = observe(&kernel).await;
        assert_eq!(our_rules(&snapshot), rules);
        assert!(snapshot.state.rules.iter().filter(|observed| observed.ours).all(|observed| observed.rule.is_some()));
        // In the order in which the kernel asks them.
        for family in Family::ALL {
            let order: Vec<_> =
                snapshot.state.rules.iter().filter(|r| r.family == family).map(|rule| rule.priority).collect();
            assert!(order.is_sorted(), "{order:?}");
        }
        // Written twice they are still there once.
        apply(&kernel, &ops).await;
        assert_eq!(observe(&kernel).await.state.rules.len(), snapshot.state.rules.len());
        // iproute2 deletes it by the text that is printed here.
        for observed in snapshot.state.rules.iter().filter(|observed| observed.ours) {
            ip(&observed.rule.as_ref().unwrap().del_command()["ip ".len()..]);
        }
        assert_eq!(our_rules(&observe(&kernel).await), BTreeSet::new());
    });
}

#[test]
fn routes_are_read_as_they_were_written() {
    in_namespace(async || {
        let (t0, t1) = devices();
        let (kernel, _events) = Kernel::connect().unwrap();
        let mut routes = BTreeSet::new();
        for (default, dst, gateway) in
            [("0.0.0.0/0", "198.51.100.0/24", "192.0.2.1"), ("::/0", "2001:db8:1::/48", "2001:db8::1")]
        {
            let metric = Family::of(&net(default)).default_metric();
            routes.extend([
                route(200, default, metric, unicast("t0", t0, None)),
                route(100_000, default, metric, unicast("t1", t1, Some(gateway))),
                route(201, default, 7, unicast("t1", t1, None)),
            ]);
            let rejecting = [RouteKind::Throw, RouteKind::Unreachable, RouteKind::Blackhole, RouteKind::Prohibit];
            for (table, kind) in (300..).zip(rejecting) {
                routes.insert(route(table, default, u32::MAX, kind.clone()));
                routes.insert(route(table, dst, metric, kind));
            }
        }
        let ops: Vec<_> = routes.iter().cloned().map(KernelOp::AddRoute).collect();
        apply(&kernel, &ops).await;
        let snapshot = observe(&kernel).await;
        assert_eq!(our_routes(&snapshot), routes);
        assert_eq!(snapshot.state.routes.len(), routes.len());
        // Deleted exactly, half of them by us and half by the text that we print.
        let (by_us, by_ip): (Vec<_>, Vec<_>) =
            snapshot.state.routes.iter().partition(|observed| observed.handle.0 % 2 == 0);
        for observed in by_ip {
            ip(&observed.route.as_ref().unwrap().del_command()["ip ".len()..]);
        }
        let ops: Vec<_> = by_us.into_iter().map(ObservedRoute::removal).collect();
        // Twice: what is gone is gone.
        for _ in 0..2 {
            assert!(kernel.apply_all(&ops, &snapshot, &mut Undone::default()).await.is_empty());
        }
        assert_eq!(observe(&kernel).await.state.routes, []);
    });
}

/// Rules that are almost `from 192.0.2.1 lookup 200 pref 20096`, in `ip rule` syntax.
const SIMILAR_RULES: [&str; 16] = [
    "from 192.0.2.0/31 lookup 200",
    "from all lookup 200",
    "from 192.0.2.1 iif lo lookup 200",
    "from 192.0.2.1 oif lo lookup 200",
    "from 192.0.2.1 to 198.51.100.1/32 lookup 200",
    "not from 192.0.2.1 lookup 200",
    "from 192.0.2.1 fwmark 0x1 lookup 200",
    "from 192.0.2.1 fwmark 0x1/0xff lookup 200",
    "from 192.0.2.1 ipproto 17 lookup 200",
    "from 192.0.2.1 sport 53-54 lookup 200",
    "from 192.0.2.1 dport 53-54 lookup 200",
    "from 192.0.2.1 uidrange 5-6 lookup 200",
    "from 192.0.2.1 lookup 200 suppress_prefixlength 0",
    "from 192.0.2.1 tos 0x10 lookup 200",
    "from 192.0.2.1 blackhole",
    "from 192.0.2.1 goto 32766",
];

#[test]
fn what_looks_like_ours_is_left_alone() {
    in_namespace(async || {
        let (kernel, _events) = Kernel::connect().unwrap();
        let ours = rule(20096, "192.0.2.1/32", 200);
        // `rule_exists()` compares only what the new rule has, so each gets a protocol of its own.
        for (protocol, similar) in (120..).zip(SIMILAR_RULES.into_iter().chain(["from 192.0.2.1 lookup 200"])) {
            ip(&format!("rule add {similar} pref 20096 protocol {protocol}"));
        }
        let before = ip("rule");
        let snapshot = observe(&kernel).await;
        assert!(snapshot.state.rules.iter().all(|observed| !observed.ours && observed.rule.is_none()), "{before}");
        // Ours stands last among them; it alone goes away.
        apply(&kernel, &[KernelOp::AddRule(ours.clone())]).await;
        let snapshot = observe(&kernel).await;
        assert_eq!(our_rules(&snapshot), BTreeSet::from([ours.clone()]), "{}", ip("rule"));
        kernel.apply(&deletion(&snapshot, &ours), &snapshot).await.unwrap();
        assert_eq!(ip("rule"), before);
    });
}

#[test]
fn a_rule_with_our_number_is_described_and_deleted_exactly() {
    in_namespace(async || {
        let (kernel, _events) = Kernel::connect().unwrap();
        let before = ip("rule");
        for similar in
            SIMILAR_RULES.into_iter().filter(|similar| similar.contains("192.0.2.1 ") || similar.contains("/31"))
        {
            let text = format!("{similar} pref 20096 protocol 116");
            ip(&format!("rule add {text}"));
            let snapshot = observe(&kernel).await;
            let observed = snapshot.state.rules.iter().find(|observed| observed.ours).unwrap();
            let plain = ["/31", " oif ", "not ", " goto "].into_iter().any(|word| similar.contains(word));
            assert_eq!(observed.rule.is_some(), plain, "{text}");
            if !plain {
                assert_eq!(observed.text, text.replace("192.0.2.1 ", "192.0.2.1/32 "));
            }
            let op = observed.removal();
            kernel.apply(&op, &snapshot).await.unwrap();
            assert_eq!(ip("rule"), before, "{text}");
        }
    });
}

#[test]
fn routes_of_others_are_not_ours() {
    in_namespace(async || {
        let (t0, _) = devices();
        let (kernel, _events) = Kernel::connect().unwrap();
        for foreign in [
            "-4 default dev t0 table 200",
            "-6 default dev t0 table 200 metric 5",
            "-4 198.51.100.0/24 dev t0 table 100000 protocol 115",
            "-4 203.0.113.0/24 dev t0",
            "-4 203.0.114.0/24 via 192.0.2.1 dev t0 onlink",
            "-4 203.0.115.0/24 nexthop dev t0 nexthop dev t1",
            "-6 2001:db8:7::/48 via 2001:db8::1 dev t0 onlink",
            "-4 blackhole 203.0.116.0/24",
            // Ours by number, but tunroute writes none of it.
            "-4 default dev t0 table 300 protocol 116 src 127.0.0.1",
            "-4 198.51.100.0/24 tos 0x10 dev t0 table 300 protocol 116",
            "-6 default from 2001:db8::/32 dev t0 table 300 protocol 116",
            "-6 2001:db8:8::/48 dev t0 table 300 protocol 116 mtu 1400",
            "-6 2001:db8:9::/48 dev t0 table 300 protocol 116 pref high",
            "-4 203.0.115.0/24 table 300 protocol 116 nexthop dev t0 nexthop dev t1",
        ] {
            ip(&foreign.replacen(' ', " route add ", 1));
        }
        let snapshot = observe(&kernel).await;
        assert_eq!(our_routes(&snapshot), BTreeSet::new());
        assert_eq!(snapshot.state.routes.len(), 6, "{:?}", snapshot.state.routes);
        assert!(snapshot.state.foreign_tables.is_superset(&BTreeSet::from([200, 254, 255, 100_000])));
        assert!(!snapshot.state.foreign_tables.contains(&300));
        let main: BTreeSet<_> = snapshot.state.main.iter().map(|r| (r.dst.to_string(), r.oif, r.on_link)).collect();
        for expected in [
            ("203.0.113.0/24".to_owned(), Some(t0), true),
            ("203.0.114.0/24".to_owned(), Some(t0), false),
            ("203.0.115.0/24".to_owned(), None, false),
            ("2001:db8:7::/48".to_owned(), Some(t0), false),
        ] {
            assert!(main.contains(&expected), "{expected:?} in {main:?}");
        }
        assert!(!main.iter().any(|(dst, ..)| dst.starts_with("203.0.116")));
        assert!(snapshot.state.local.contains(&net("127.0.0.1/32")));
        // Ours are deleted as observed, nothing else is.
        let ops: Vec<_> = (snapshot.state.routes.iter()).map(ObservedRoute::removal).collect();
        assert!(kernel.apply_all(&ops, &snapshot, &mut Undone::default()).await.is_empty());
        let after = observe(&kernel).await.state;
        assert_eq!(after.routes, []);
        assert_eq!((after.main, after.foreign_tables), (snapshot.state.main, snapshot.state.foreign_tables));
    });
}

#[test]
fn replacing_leaves_exactly_one_route_at_any_moment() {
    in_namespace(async || {
        let (t0, t1) = devices();
        let (kernel, _events) = Kernel::connect().unwrap();
        for (default, gateway) in [("0.0.0.0/0", "192.0.2.1"), ("::/0", "2001:db8::1")] {
            let metric = Family::of(&net(default)).default_metric();
            let unreachable = route(200, default, u32::MAX, RouteKind::Unreachable);
            // Device to device, to a gateway, to another one, back to a device: the kernel has a case for each.
            let hops = [
                unicast("t0", t0, None),
                unicast("t1", t1, None),
                unicast("t0", t0, Some(gateway)),
                unicast("t1", t1, Some(gateway)),
                unicast("t0", t0, None),
                unicast("t0", t0, None),
            ];
            apply(&kernel, &[KernelOp::AddRoute(unreachable.clone())]).await;
            let monitor = RouteMonitor::start();
            for hop in hops {
                let wanted = route(200, default, metric, hop);
                apply(&kernel, &[KernelOp::ReplaceRoute(wanted.clone())]).await;
                let mine: BTreeSet<_> =
                    our_routes(&observe(&kernel).await).into_iter().filter(|route| route.dst == net(default)).collect();
                assert_eq!(mine, BTreeSet::from([wanted, unreachable.clone()]));
            }
            // A single moment without the route would have been notified as a deletion.
            let (made, removed) = monitor.seen();
            // IPv4 does not tell of the last one, which changed nothing.
            assert!(made >= 5 && removed == 0, "{default}: {made} made, {removed} removed");
        }
    });
}

#[test]
fn refusals_say_what_and_why_and_what_to_do() {
    in_namespace(async || {
        let (t0, t1) = devices();
        ip("link set t1 down");
        ip("route add default dev t0 table 200");
        let (kernel, _events) = Kernel::connect().unwrap();
        let snapshot = observe(&kernel).await;
        for (op, words) in [
            (
                KernelOp::AddRoute(route(200, "0.0.0.0/0", 0, unicast("t0", t0, None))),
                ["`ip route add default dev t0 table 200 protocol 116`", "File exists", "another `table`"],
            ),
            (
                KernelOp::AddRoute(route(200, "::/0", 1024, unicast("gone0", 9999, None))),
                ["`ip -6 route add default dev gone0 table 200 protocol 116`", "No such device", "os error 19"],
            ),
            (
                KernelOp::AddRoute(route(201, "0.0.0.0/0", 0, unicast("t1", t1, None))),
                ["dev t1", "Network is down (", "ip link set"],
            ),
            (
                KernelOp::AddRoute(route(202, "0.0.0.0/0", 0, unicast("t0", t0, Some("127.0.0.1")))),
                ["via 127.0.0.1 dev t0 onlink", "Nexthop has invalid gateway", "table 202"],
            ),
            (
                KernelOp::DelRule {
                    handle: Handle(4711),
                    family: Family::V6,
                    rule: None,
                    text: "from all lookup 7".into(),
                },
                ["`ip -6 rule del from all lookup 7`", "another observation", "nothing was done"],
            ),
        ] {
            let error = kernel.apply(&op, &snapshot).await.unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{word:?} in {error:?}");
            }
        }
        // A deletion waits for the routes of the table that the sources are asked in afterwards; others do not.
        let ours = [rule(20096, "192.0.2.1/32", 200), rule(20096, "192.0.2.2/32", 200)];
        let other = rule(20096, "192.0.2.129/32", 200);
        apply(&kernel, &[KernelOp::AddRule(ours[0].clone()), KernelOp::AddRule(other.clone())]).await;
        let snapshot = observe(&kernel).await;
        let failing = KernelOp::AddRoute(route(200, "0.0.0.0/0", 0, unicast("t0", t0, None)));
        let (kept, gone) = (deletion(&snapshot, &ours[0]), deletion(&snapshot, &other));
        let ops = [failing, KernelOp::AddRule(ours[1].clone()), kept.clone(), gone];
        let desired = Desired { rules: [rule(20104, "192.0.2.0/25", 200)].into(), ..Desired::default() };
        let mut undone = Undone::new(&desired);
        let errors = kernel.apply_all(&ops, &snapshot, &mut undone).await;
        assert!(matches!(&errors[..], [KernelError::Refused { .. }]), "{errors:?}");
        assert_eq!(undone.put_off(), [kept.to_string()]);
        assert_eq!(our_rules(&observe(&kernel).await), BTreeSet::from(ours));
    });
}

#[test]
fn without_the_capability_it_says_so() {
    in_namespace(async || {
        let (kernel, _events) = Kernel::connect().unwrap();
        let snapshot = observe(&kernel).await;
        lab::drop_capabilities();
        // The socket remembers who opened it, and the kernel asks both.
        let op = KernelOp::AddRule(rule(20096, "192.0.2.1/32", 200));
        let error = kernel.apply(&op, &snapshot).await.unwrap_err().to_string();
        assert!(error.contains("Operation not permitted") && error.contains("CAP_NET_ADMIN"), "{error}");
        assert!(error.contains("`ip rule add from 192.0.2.1/32 lookup 200 pref 20096 protocol 116`"), "{error}");
        // Looking is allowed.
        let (kernel, _events) = Kernel::connect().unwrap();
        assert!(!observe(&kernel).await.state.rules.is_empty());
    });
}

#[test]
fn only_what_is_dirty_is_read_again() {
    in_namespace(async || {
        devices();
        let (kernel, _events) = Kernel::connect().unwrap();
        let before = observe(&kernel).await;
        ip("rule add from 192.0.2.7 lookup 7");
        ip("route add 198.51.100.0/24 dev t0");
        let same = kernel.observe(Kinds::NETCONF, Some(before.clone())).await.unwrap();
        assert_eq!(same.state, before.state);
        let rules = kernel.observe(Kinds::RULES, Some(before.clone())).await.unwrap();
        assert_eq!((rules.state.rules.len(), &rules.state.main), (before.state.rules.len() + 1, &before.state.main));
        let routes = kernel.observe(Kinds::ROUTES, Some(before.clone())).await.unwrap();
        assert_eq!((&routes.state.rules, routes.state.main.len()), (&before.state.rules, before.state.main.len() + 1));
        let all = kernel.observe(Kinds::RULES, Some(routes)).await.unwrap();
        assert_eq!(all.state, observe(&kernel).await.state);
    });
}

#[test]
fn devices_are_described() {
    in_namespace(async || {
        devices();
        ip("tuntap add tap0 mode tap");
        ip("link add br0 type bridge");
        ip("link add v0 mtu 1300 type veth peer name v1");
        ip("link set v0 up master br0");
        ip("link set v1 up");
        ip("link add vx0 type vxlan id 7 remote 192.0.2.1 dstport 4789 dev v1");
        ip("link set t1 down");
        // Somebody serves the tunnel: it has a carrier.
        let tun = lab::serve_tun("t0");
        let (kernel, mut events) = Kernel::connect().unwrap();
        // The kernel takes up to a second to notice a carrier (`net/core/link_watch.c`), and then tells.
        let mut state = observe(&kernel).await.state;
        while !["t0", "v0"].iter().all(|name| state.link(name).unwrap().up) {
            next(&mut events).await;
            state = observe(&kernel).await.state;
        }
        let link = |name: &str| state.link(name).unwrap();
        for (name, layer, kind, up) in [
            ("lo", LinkLayer::Other, None, true),
            ("t0", LinkLayer::Ip, Some("tun"), true),
            ("t1", LinkLayer::Ip, Some("tun"), false),
            ("tap0", LinkLayer::Ethernet, Some("tun"), false),
            ("br0", LinkLayer::Ethernet, Some("bridge"), false),
            ("v0", LinkLayer::Ethernet, Some("veth"), true),
            ("vx0", LinkLayer::Ethernet, Some("vxlan"), false),
        ] {
            let found = link(name);
            assert_eq!((found.layer, found.kind.as_deref(), found.up), (layer, kind, up), "{found:?}");
        }
        assert_eq!(link("v0").mtu, 1300);
        assert_eq!(link("v0").master, Some(link("br0").index));
        assert_eq!(link("v1").master, None);
        // Its program ends: the tunnel carries nothing, and the kernel notifies that.
        drop(tun);
        while observe(&kernel).await.state.link("t0").unwrap().up {
            next(&mut events).await;
        }
    });
}

#[test]
fn an_observation_that_was_given_up_does_not_disturb_the_next() {
    in_namespace(async || {
        let (kernel, _events) = Kernel::connect().unwrap();
        let ops: Vec<_> = (0..30_000_u32)
            .map(|i| {
                let dst =
                    IpNet::new(IpAddr::from((0x2001_0db8_u128 << 96 | u128::from(i)).to_be_bytes()), 128).unwrap();
                KernelOp::AddRoute(Route { table: 200, dst, metric: 1024, kind: RouteKind::Blackhole })
            })
            .collect();
        apply(&kernel, &ops).await;
        // Polled once and dropped, it leaves the kernel in the middle of a dump.
        let given_up = kernel.observe(Kinds::ALL, None);
        assert!(futures::FutureExt::now_or_never(given_up).is_none());
        kernel.apply(&KernelOp::AddRule(rule(20096, "192.0.2.1/32", 200)), &Snapshot::default()).await.unwrap();
        let given_up = kernel.observe(Kinds::ALL, None);
        assert!(futures::FutureExt::now_or_never(given_up).is_none());
        let snapshot = observe(&kernel).await;
        assert_eq!(our_routes(&snapshot).len(), ops.len());
        assert_eq!(our_rules(&snapshot).len(), 1);
    });
}

/// An address of 2001:db8::/32 as a prefix of its own.
fn host(number: u32) -> IpNet {
    let address = (0x2001_0db8_u128 << 96) | u128::from(number);
    IpNet::new(IpAddr::from(address.to_be_bytes()), 128).unwrap()
}

#[test]
fn ten_thousand_rules_and_routes() {
    in_namespace(async || {
        let (t0, _) = devices();
        let (kernel, mut events) = Kernel::connect().unwrap();
        let rules: Vec<_> =
            (0..10_000).map(|i| KernelOp::AddRule(Rule::new(20000, host(i), RuleAction::Lookup(200)))).collect();
        let routes: Vec<_> = (0..10_000)
            .map(|i| Route { table: 200, dst: host(i), metric: 1024, kind: unicast("t0", t0, None) })
            .map(KernelOp::AddRoute)
            .collect();
        for (name, ops) in [("rules", rules), ("routes", routes)] {
            let start = Instant::now();
            assert!(kernel.apply_all(&ops, &Snapshot::default(), &mut Undone::default()).await.is_empty());
            println!("applying 10,000 {name}: {:?}", start.elapsed());
            // Existing rules are not added twice, even in great numbers.
            if name == "rules" {
                assert!(kernel.apply_all(&ops, &Snapshot::default(), &mut Undone::default()).await.is_empty());
            }
        }
        let start = Instant::now();
        let snapshot = observe(&kernel).await;
        let took = start.elapsed();
        println!("observing 10,000 rules and 10,000 routes: {took:?}");
        assert!(took < Duration::from_secs(20), "{took:?}");
        assert_eq!((our_rules(&snapshot).len(), our_routes(&snapshot).len()), (10_000, 10_000));
        assert_eq!(snapshot.state.rules.iter().filter(|observed| observed.ours).count(), 10_000);
        // The notifications of it all are one change.
        let start = Instant::now();
        let told = next(&mut events).await;
        println!("reading what waited of 20,000 notifications: {:?}", start.elapsed());
        assert!(told.kinds.contains(Kinds::RULES), "{told:?}");
    });
}

#[test]
fn what_is_odd_gives_way_without_a_gap() {
    in_namespace(async || {
        let (t0, _) = devices();
        let (kernel, _events) = Kernel::connect().unwrap();
        for (odd, wanted) in [
            (
                "default dev t0 table 200 protocol 116 src 127.0.0.1",
                route(200, "0.0.0.0/0", 0, unicast("t0", t0, None)),
            ),
            ("default dev t0 table 200 protocol 116 mtu 1300", route(200, "::/0", 1024, unicast("t0", t0, None))),
        ] {
            let ip_version = if Family::of(&wanted.dst) == Family::V4 { "-4" } else { "-6" };
            ip(&format!("{ip_version} route add {odd}"));
            let snapshot = observe(&kernel).await;
            let [observed] = &snapshot.state.routes[..] else { panic!("{:?}", snapshot.state.routes) };
            assert_eq!(observed.route, None);
            let monitor = RouteMonitor::start();
            let ops = [KernelOp::AddRoute(wanted.clone()), observed.removal()];
            let errors = kernel.apply_all(&ops, &snapshot, &mut Undone::default()).await;
            assert!(errors.is_empty(), "{errors:?}");
            assert_eq!(monitor.seen(), (1, 0), "{odd}");
            let snapshot = observe(&kernel).await;
            assert_eq!(our_routes(&snapshot), BTreeSet::from([wanted]));
            assert_eq!(snapshot.state.routes.len(), 1);
            ip(&format!("{ip_version} route flush table 200"));
        }
        // The kernel takes this for the rule that is wanted.
        ip("rule add from 192.0.2.1 to 198.51.100.1 lookup 200 pref 20096 protocol 116");
        let wanted = rule(20096, "192.0.2.1/32", 200);
        let snapshot = observe(&kernel).await;
        let odd = snapshot.state.rules.iter().find(|observed| observed.ours).unwrap();
        let ops = [KernelOp::AddRule(wanted.clone()), odd.removal()];
        let errors = kernel.apply_all(&ops, &snapshot, &mut Undone::default()).await;
        assert!(errors.is_empty(), "{errors:?}");
        let snapshot = observe(&kernel).await;
        assert_eq!(our_rules(&snapshot), BTreeSet::from([wanted]));
        assert_eq!(snapshot.state.rules.iter().filter(|observed| observed.ours).count(), 1);
    });
}
