//! The way of a packet, as the kernel says it.

use std::time::Instant;

use super::{
    devices,
    lab::{in_namespace, ip},
};
use nix::net::if_::if_nametoindex;
use tunroute::{
    kernel::{Answer, KernelError, Oracle, Question, Refused},
    policy::net::IfIndex,
};

fn question(source: &str, destination: &str, iif: Option<IfIndex>) -> Question {
    Question { source: source.parse().unwrap(), destination: destination.parse().unwrap(), iif }
}

/// A pair of devices, for a neighbour that can be a gateway; returns the number of `lan0`, where packets enter.
fn lan() -> IfIndex {
    ip("link add lan0 type veth peer name lan1");
    for name in ["lan0", "lan1"] {
        ip(&format!("link set {name} up"));
    }
    ip("addr add 192.0.2.1/24 dev lan0");
    ip("addr add 2001:db8::1/64 dev lan0 nodad");
    for setting in ["ipv4/conf/lan0/forwarding", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
    }
    for setting in ["all", "lan0"] {
        std::fs::write(format!("/proc/sys/net/ipv4/conf/{setting}/rp_filter"), "0").unwrap();
    }
    if_nametoindex("lan0").unwrap()
}

#[test]
fn every_kind_of_answer() {
    in_namespace(async || {
        let (t0, t1) = devices();
        let lan0 = lan();
        ip("addr add 192.0.2.129/25 dev t1");
        for (table, v4, v6) in [
            (1, "default dev t0", "default dev t0"),
            (1000, "default via 192.0.2.130 dev t1 onlink", "default via fe80::7 dev t1"),
            (3, "unreachable default", "unreachable default"),
            (4, "prohibit default", "prohibit default"),
            (5, "blackhole default", "blackhole default"),
            (6, "throw default", "throw default"),
        ] {
            ip(&format!("route add {v4} table {table}"));
            ip(&format!("-6 route add {v6} table {table}"));
        }
        for (host, table) in [(1, 1), (2, 1000), (3, 3), (4, 4), (5, 5), (6, 6)] {
            ip(&format!("rule add from 10.0.0.{host} lookup {table} pref 100"));
            ip(&format!("-6 rule add from 2001:db8:1::{host} lookup {table} pref 100"));
        }
        let leaves = |device, gateway: Option<&str>, table| Answer::Leaves {
            device,
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            table,
        };
        let mut oracle = Oracle::connect().unwrap();
        let v4 = [
            ("10.0.0.1", "198.51.100.1", leaves(t0, None, 1)),
            ("10.0.0.2", "198.51.100.1", leaves(t1, Some("192.0.2.130"), 1000)),
            ("10.0.0.3", "198.51.100.1", Answer::Refused(Refused::Unreachable)),
            ("10.0.0.4", "198.51.100.1", Answer::Refused(Refused::Prohibit)),
            ("10.0.0.5", "198.51.100.1", Answer::Refused(Refused::Dropped)),
            // A throw falls through to the main table, which has a connected route only.
            ("10.0.0.6", "198.51.100.1", Answer::Refused(Refused::NoRoute)),
            ("10.0.0.6", "192.0.2.9", leaves(lan0, None, 254)),
            ("10.0.0.1", "192.0.2.1", Answer::Local { table: 255 }),
            ("10.0.0.1", "192.0.2.255", Answer::Local { table: 255 }),
            // The host's own address, from outside.
            ("192.0.2.1", "192.0.2.9", Answer::Refused(Refused::Dropped)),
        ];
        let v6 = [
            ("2001:db8:1::1", "2001:db8:9::1", leaves(t0, None, 1)),
            ("2001:db8:1::2", "2001:db8:9::1", leaves(t1, Some("fe80::7"), 1000)),
            ("2001:db8:1::3", "2001:db8:9::1", Answer::Refused(Refused::Unreachable)),
            ("2001:db8:1::4", "2001:db8:9::1", Answer::Refused(Refused::Prohibit)),
            ("2001:db8:1::5", "2001:db8:9::1", Answer::Refused(Refused::Dropped)),
            ("2001:db8:1::6", "2001:db8:9::1", Answer::Refused(Refused::NoRoute)),
            ("2001:db8:1::6", "2001:db8::9", leaves(lan0, None, 254)),
            ("2001:db8:1::1", "2001:db8::1", Answer::Local { table: 255 }),
        ];
        for (source, destination, expected) in v4.into_iter().chain(v6) {
            let answer = oracle.ask(&question(source, destination, Some(lan0))).unwrap();
            assert_eq!(answer, expected, "{source} to {destination}");
        }
        // The host's own packets. The kernel lets nobody send from a foreign IPv4 address, and asks nobody about IPv6.
        let own = |source, destination| question(source, destination, None);
        assert_eq!(oracle.ask(&own("192.0.2.1", "192.0.2.9")).unwrap(), leaves(lan0, None, 254));
        assert!(matches!(oracle.ask(&own("10.0.0.1", "198.51.100.1")), Ok(Answer::Refused(_))));
        assert_eq!(oracle.ask(&own("2001:db8:1::1", "2001:db8:9::1")).unwrap(), leaves(t0, None, 1));

        let name = |index: IfIndex| format!("if{index}");
        let mut route = |source, destination| oracle.route(&question(source, destination, Some(lan0)), &name).unwrap();
        assert_eq!(route("10.0.0.1", "198.51.100.1"), Some(format!("default dev if{t0} table 1 metric 0")));
        assert_eq!(route("10.0.0.6", "192.0.2.9").unwrap().split(' ').next(), Some("192.0.2.0/24"));
        assert_eq!(route("2001:db8:1::1", "2001:db8:9::1"), Some(format!("default dev if{t0} table 1 metric 1024")));
        assert_eq!(route("10.0.0.3", "198.51.100.1"), None);
    });
}

#[test]
fn a_device_that_does_not_forward_or_is_gone() {
    in_namespace(async || {
        devices();
        let lan0 = lan();
        ip("route add default dev t0");
        let mut oracle = Oracle::connect().unwrap();
        let asked = question("10.0.0.1", "198.51.100.1", Some(lan0));
        assert!(matches!(oracle.ask(&asked), Ok(Answer::Leaves { .. })));
        std::fs::write("/proc/sys/net/ipv4/conf/lan0/rp_filter", "1").unwrap();
        assert_eq!(oracle.ask(&asked).unwrap(), Answer::Refused(Refused::Dropped));
        std::fs::write("/proc/sys/net/ipv4/conf/lan0/rp_filter", "0").unwrap();
        std::fs::write("/proc/sys/net/ipv4/conf/lan0/forwarding", "0").unwrap();
        // The kernel drops what it could route, and only says so for what it could not.
        assert!(matches!(oracle.ask(&asked), Ok(Answer::Leaves { .. } | Answer::Refused(Refused::Unreachable))));
        let error = oracle.ask(&Question { iif: Some(9999), ..asked }).unwrap_err();
        assert!(matches!(error, KernelError::Question { .. }));
        assert_eq!(
            error.to_string(),
            "cannot ask the kernel for the way of a packet from 10.0.0.1 to 198.51.100.1: No such device (os error 19)"
        );
        assert!(oracle.ask(&question("10.0.0.1", "2001:db8::1", None)).is_err());
        // What went wrong does not stick.
        std::fs::write("/proc/sys/net/ipv4/conf/lan0/forwarding", "1").unwrap();
        assert!(matches!(oracle.ask(&asked), Ok(Answer::Leaves { .. })));
    });
}

#[test]
fn a_hundred_thousand_questions_in_seconds() {
    in_namespace(async || {
        let (t0, _) = devices();
        let lan0 = lan();
        ip("-6 route add default dev t0");
        let mut oracle = Oracle::connect().unwrap();
        let asked = question("2001:db8:1::1", "2001:db8:9::1", Some(lan0));
        let start = Instant::now();
        for _ in 0..100_000 {
            assert_eq!(oracle.ask(&asked).unwrap(), Answer::Leaves { device: t0, gateway: None, table: 254 });
        }
        println!("{:.2} µs a question", start.elapsed().as_secs_f64() * 10.0);
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    });
}
