//! Notifications of a real kernel.

use std::{fs, time::Duration};

use tunroute::{
    kernel::{Change, Events, Kernel, Kinds, Snapshot},
    policy::net::{Family, KernelOp, ObservedRoute, Route, RouteKind},
    policy::plan::Undone,
};

use crate::{
    apply, deletion, devices, host,
    lab::{in_namespace, ip},
    observe, route, rule, unicast,
};

/// The next change; fails the test if none comes.
pub async fn next(events: &mut Events) -> Change {
    tokio::time::timeout(Duration::from_secs(30), events.next()).await.expect("an event").unwrap()
}

/// Waits until a change of these kinds was told, all that comes before it, and what follows up to a moment of silence. Some
/// of it the kernel does by work queues.
async fn told(events: &mut Events, what: &str, kinds: Kinds) {
    let mut told = Kinds::NONE;
    while !told.contains(kinds) {
        let change = tokio::time::timeout(Duration::from_secs(30), events.next()).await;
        let change = change.unwrap_or_else(|_| panic!("{what}: {told}")).unwrap();
        assert!(change.removed.is_empty() && !change.overrun, "{what}: {change:?}");
        told |= change.kinds;
    }
    changes(events).await;
}

/// All changes up to a moment of silence.
async fn changes(events: &mut Events) -> Kinds {
    let mut kinds = Kinds::NONE;
    while let Ok(change) = tokio::time::timeout(Duration::from_millis(50), events.next()).await {
        let change = change.unwrap();
        assert!(change.removed.is_empty() && !change.overrun, "{change:?}");
        kinds |= change.kinds;
    }
    kinds
}

#[test]
fn every_kind_of_change_is_told() {
    in_namespace(async || {
        devices();
        let (_kernel, mut events) = Kernel::connect().unwrap();
        assert_eq!(changes(&mut events).await, Kinds::NONE);
        for (arguments, kinds) in [
            ("link set t0 mtu 1400", Kinds::LINKS),
            ("link add v0 type veth peer name v1", Kinds::LINKS),
            ("-4 addr add 192.0.2.1/24 dev t0", Kinds::ADDRESSES | Kinds::ROUTES),
            ("-6 addr add 2001:db8::1/64 dev t0 nodad", Kinds::ADDRESSES | Kinds::ROUTES),
            ("-4 route add 198.51.100.0/24 dev t0", Kinds::ROUTES),
            ("-6 route add 2001:db8:1::/48 dev t0", Kinds::ROUTES),
            ("-4 rule add from 192.0.2.7 lookup 7", Kinds::RULES),
            ("-6 rule add from 2001:db8::7 lookup 7", Kinds::RULES),
        ] {
            ip(arguments);
            told(&mut events, arguments, kinds).await;
        }
        for setting in ["ipv4/conf/t0/forwarding", "ipv4/conf/t0/rp_filter", "ipv6/conf/all/forwarding"] {
            let path = format!("/proc/sys/net/{setting}");
            let old = fs::read_to_string(&path).unwrap();
            fs::write(&path, if old.trim() == "0" { "1" } else { "0" }).unwrap();
            told(&mut events, setting, Kinds::NETCONF).await;
        }
    });
}

#[test]
fn what_others_remove_is_told_by_name() {
    in_namespace(async || {
        let (t0, _) = devices();
        let (kernel, mut events) = Kernel::connect().unwrap();
        let rules: Vec<_> = (0..40).map(|i| rule(20000, &format!("2001:db8::{i:x}/128"), 200)).collect();
        let mut ops: Vec<_> = rules.iter().cloned().map(KernelOp::AddRule).collect();
        ops.push(KernelOp::AddRoute(route(200, "::/0", 1024, unicast("t0", t0, None))));
        ops.push(KernelOp::AddRoute(route(200, "0.0.0.0/0", 0, unicast("t0", t0, None))));
        apply(&kernel, &ops).await;
        ip("-6 rule add from 2001:db8::1 lookup 7");
        let snapshot = observe(&kernel).await;
        // Tunroute's own changes are not reported as others'.
        kernel.apply(&deletion(&snapshot, &rules[0]), &snapshot).await.unwrap();
        // A foreign rule is nobody's business, the kernel removing routes with their device is nobody's deed.
        ip("-6 rule del from 2001:db8::1 lookup 7");
        let change = next(&mut events).await;
        assert_eq!((change.removed, change.removed_more), (vec![], 0));
        ip("-6 rule del from 2001:db8::1 lookup 200");
        let change = next(&mut events).await;
        let [removed] = &change.removed[..] else { panic!("{change:?}") };
        assert_eq!((removed.object, removed.family, &removed.text), ("rule", Family::V6, &rules[1].to_string()));
        assert_ne!(removed.port, 0);
        ip("-4 route flush table 200");
        let change = next(&mut events).await;
        let [removed] = &change.removed[..] else { panic!("{change:?}") };
        assert_eq!(removed.to_string(), "ip route del default dev t0 table 200 protocol 116");
        // A flush is reported in part, and counted.
        ip("-6 rule flush");
        let change = next(&mut events).await;
        assert_eq!((change.removed.len(), change.removed_more), (16, 38 - 16), "{change:?}");
        ip("link del t0");
        let change = next(&mut events).await;
        assert!(change.removed.is_empty(), "{change:?}");
        let kinds = change.kinds;
        assert!(kinds.contains(Kinds::LINKS), "{kinds}");
        // IPv4 says nothing of the routes that went with the device: observing links looks at routes, too.
        let after = kernel.observe(Kinds::LINKS, Some(observe(&kernel).await)).await.unwrap();
        assert_eq!(after.state.routes, []);
    });
}

#[test]
fn an_overrun_means_everything() {
    in_namespace(async || {
        devices();
        let (kernel, mut events) = Kernel::connect().unwrap();
        let add: Vec<_> = (0..20_000)
            .map(|i| Route { table: 200, dst: host(i), metric: 1024, kind: RouteKind::Blackhole })
            .map(KernelOp::AddRoute)
            .collect();
        // Nothing reads until the receive buffer is full, at any size.
        for round in 0..50 {
            assert!(kernel.apply_all(&add, &Snapshot::default(), &mut Undone::default()).await.is_empty());
            let snapshot = kernel.observe(Kinds::ROUTES, None).await.unwrap();
            let remove: Vec<_> = (snapshot.state.routes.iter()).map(ObservedRoute::removal).collect();
            assert!(kernel.apply_all(&remove, &snapshot, &mut Undone::default()).await.is_empty());
            assert!(round < 49);
            if round % 2 == 1 {
                break;
            }
        }
        let mut overrun = false;
        while let Ok(change) = tokio::time::timeout(Duration::from_millis(50), events.next()).await {
            let change = change.unwrap();
            assert!(!change.overrun || change.kinds == Kinds::ALL);
            overrun |= change.overrun;
        }
        assert!(overrun);
        // It goes on after that.
        ip("rule add from 192.0.2.7 lookup 7");
        told(&mut events, "a rule", Kinds::RULES).await;
    });
}
