//! The gates of a real kernel, each closed and opened.

use std::{
    fs,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use tunroute::{
    config::Config,
    kernel::{Kernel, Kinds, sysctl},
    policy::gates::{Gate, GateInput, Probes, gates},
    policy::net::Family,
};

use crate::{
    lab::{in_namespace, ip},
    nft,
};

/// The closed gates of `v0`, IPv4 and IPv6.
async fn closed() -> [Vec<Gate>; 2] {
    let (kernel, _events) = Kernel::connect().unwrap();
    let state = kernel.observe(Kinds::ALL, None).await.unwrap().state;
    let link = state.link("v0").unwrap();
    let probes = Probes::read([link]).await;
    let ingress = [link.index];
    let config = "[interfaces]\ningress = [\"v0\"]\n[tunnel.wg0]\n[[policy]]\nname = \"p\"\nvia = \"wg0\"\n\
                  from = [\"192.0.2.0/24\", \"2001:db8::/32\"]\n";
    let policies = Config::parse("t.toml", config).unwrap().policies;
    let input = GateInput {
        state: &state,
        probes: &probes,
        ingress: &ingress,
        last: 20129,
        policies: &policies,
        bypass_netfilter: false,
    };
    let report = gates(&input);
    Family::ALL.map(|family| report.closed(link.index, family).to_vec())
}

/// The closed gates in words: IPv4's, then IPv6's.
async fn words() -> [Vec<String>; 2] {
    closed().await.map(|gates| gates.iter().map(ToString::to_string).collect())
}

const OPEN: [Vec<String>; 2] = [Vec::new(), Vec::new()];

fn set(name: &str, value: &str) {
    fs::write(format!("/proc/sys/net/{name}"), value).unwrap();
}

/// A host that forwards both families from `v0`.
fn router() {
    ip("link add v0 type veth peer name v1");
    set("ipv4/ip_forward", "1");
    set("ipv6/conf/all/forwarding", "1");
}

#[test]
fn forwarding() {
    in_namespace(async || {
        router();
        assert_eq!(words().await, OPEN);
        set("ipv4/conf/v0/forwarding", "0");
        assert_eq!(words().await, [vec!["the kernel does not forward IPv4 from v0".to_owned()], vec![]]);
        set("ipv4/conf/v0/forwarding", "1");
        set("ipv6/conf/v0/disable_ipv6", "1");
        assert_eq!(words().await, [vec![], vec!["the kernel does not forward IPv6 from v0".to_owned()]]);
        set("ipv6/conf/v0/disable_ipv6", "0");
        set("ipv6/conf/all/forwarding", "0");
        assert_eq!(words().await, [vec![], vec!["the kernel does not forward IPv6 from v0".to_owned()]]);
        // Linux 6.17 lets a single device forward.
        if fs::exists("/proc/sys/net/ipv6/conf/v0/force_forwarding").unwrap() {
            set("ipv6/conf/v0/force_forwarding", "1");
            assert_eq!(words().await, OPEN);
        }
    });
}

#[test]
fn reverse_path_filter() {
    in_namespace(async || {
        router();
        for (all, own, expected) in [
            ("0", "0", sysctl::RpFilter::Off),
            ("1", "0", sysctl::RpFilter::Strict),
            ("0", "1", sysctl::RpFilter::Strict),
            ("0", "2", sysctl::RpFilter::Loose),
            ("1", "2", sysctl::RpFilter::Loose),
            ("2", "1", sysctl::RpFilter::Loose),
        ] {
            set("ipv4/conf/all/rp_filter", all);
            set("ipv4/conf/v0/rp_filter", own);
            assert_eq!(sysctl::rp_filter("v0"), expected, "all {all}, v0 {own}");
        }
        assert_eq!(sysctl::rp_filter("gone0"), sysctl::RpFilter::Strict);
        assert!(!sysctl::forwards(Family::V4, "gone0"));
    });
}

#[test]
fn foreign_rules() {
    in_namespace(async || {
        router();
        for harmless in [
            "from 192.0.2.1 lookup 7 pref 20130",
            "from 198.51.100.0/24 lookup 7 pref 100",
            "from 192.0.2.1 oif v0 lookup 7 pref 100",
            "from all iif lo lookup 7 pref 100",
            "from all iif v1 lookup 7 pref 100",
            "from all lookup local pref 100",
            "from 192.0.2.1 lookup 7 pref 20000 protocol 116",
        ] {
            ip(&format!("rule add {harmless}"));
            assert_eq!(words().await, OPEN, "{harmless}");
        }
        for closing in [
            "from all fwmark 0x1 lookup 7 pref 100",
            "from all iif v0 lookup 7 pref 100",
            "not from all iif v7 lookup 7 pref 100",
            "from 192.0.2.1/32 lookup 7 pref 20129",
            "from 192.0.2.1/32 to 192.0.2.2/32 lookup local pref 20129",
            "from all goto 32766 pref 5",
        ] {
            for (family, option) in Family::ALL.into_iter().zip(["-4", "-6"]) {
                let closing = match family {
                    Family::V4 => closing.to_owned(),
                    Family::V6 => closing.replace("192.0.2.1/32", "2001:db8::1/128").replace("192.0.2.2/32", "::5/128"),
                };
                ip(&format!("{option} rule add {closing}"));
                let mut both = words().await;
                let of_family = std::mem::take(&mut both[usize::from(family == Family::V6)]);
                assert_eq!(both, OPEN);
                assert!(matches!(&of_family[..], [gate] if gate.ends_with(&format!(": {closing}"))), "{of_family:?}");
                ip(&format!("{option} rule del {closing}"));
            }
        }
        assert_eq!(words().await, OPEN);
    });
}

#[test]
fn nftables() {
    use nft::INET;
    const IP: u8 = 2;
    const NETDEV: u8 = 5;
    const BRIDGE: u8 = 7;
    const IP6: u8 = 10;
    in_namespace(async || {
        router();
        assert_eq!(words().await, OPEN);
        for (closes, family, hook, devices) in [
            ([1, 1], INET, Some(0), &[][..]),
            ([0, 0], INET, Some(1), &[]),
            ([1, 1], INET, Some(2), &[]),
            ([0, 0], INET, Some(3), &[]),
            ([1, 1], INET, Some(4), &[]),
            ([1, 1], INET, Some(5), &["v1", "v0"]),
            ([0, 0], INET, Some(5), &["v1"]),
            ([0, 0], INET, None, &[]),
            ([1, 0], IP, Some(2), &[]),
            ([0, 0], IP, Some(1), &[]),
            ([0, 1], IP6, Some(4), &[]),
            ([1, 1], NETDEV, Some(0), &["v0"]),
            ([0, 0], NETDEV, Some(0), &["v1"]),
            ([1, 1], NETDEV, Some(1), &["v1"]),
            ([0, 0], BRIDGE, Some(2), &[]),
        ] {
            nft::add_chain(family, hook, devices).unwrap();
            let found = words().await;
            assert_eq!(found.each_ref().map(Vec::len), closes, "{family} {hook:?} {devices:?}: {found:?}");
            assert!(found.iter().flatten().all(|gate| gate.starts_with("netfilter") && gate.ends_with(" t c")));
            nft::delete_table(family).unwrap();
            assert_eq!(words().await, OPEN);
        }
    });
}

#[test]
fn iptables_legacy() {
    in_namespace(async || {
        router();
        for (family, domain, level, closes) in [
            (Family::V4, libc::AF_INET, libc::IPPROTO_IP, [1, 0]),
            (Family::V6, libc::AF_INET6, libc::IPPROTO_IPV6, [1, 1]),
        ] {
            // As `iptables -t filter -L` does: asking for a table registers it.
            // SAFETY: no pointers.
            let socket = unsafe { libc::socket(domain, libc::SOCK_RAW, libc::IPPROTO_RAW) };
            // `struct ipt_getinfo` begins with the table's name.
            let mut info = [0_u8; 84];
            info[..6].copy_from_slice(b"filter");
            let mut length: libc::socklen_t = 84;
            // SAFETY: IPT_SO_GET_INFO (64) reads and writes one `struct ipt_getinfo` of 84 bytes.
            let result =
                unsafe { libc::getsockopt(socket.as_raw_fd(), level, 64, info.as_mut_ptr().cast(), &raw mut length) };
            assert_eq!(result, 0, "this kernel has no {family} iptables-legacy: {}", std::io::Error::last_os_error());
            // SAFETY: it has no other owner.
            unsafe { libc::close(socket) };
            let found = words().await;
            assert_eq!(found.each_ref().map(Vec::len), closes, "{found:?}");
            assert!(found[usize::from(family == Family::V6)][0].contains("tables -t filter"), "{found:?}");
        }
    });
}

#[test]
fn xfrm() {
    in_namespace(async || {
        router();
        for direction in ["out", "fwd"] {
            ip(&format!("xfrm policy add src 192.0.2.0/24 dst 198.51.100.0/24 dir {direction} action block"));
            assert_eq!(closed().await, [vec![Gate::Xfrm], vec![Gate::Xfrm]]);
            ip("xfrm policy flush");
            assert_eq!(words().await, OPEN);
        }
        ip("xfrm policy setdefault fwd block");
        assert_eq!(closed().await, [vec![Gate::Xfrm], vec![Gate::Xfrm]]);
        ip("xfrm policy setdefault fwd accept");
        assert_eq!(words().await, OPEN);
    });
}

#[test]
fn ports() {
    in_namespace(async || {
        router();
        ip("link add br0 type bridge");
        ip("link set v0 master br0");
        let port = Gate::Port { device: "v0".into(), master: "br0".into() };
        assert_eq!(closed().await, [vec![port.clone()], vec![port]]);
        ip("link set v0 nomaster");
        assert_eq!(words().await, OPEN);
    });
}

#[test]
fn a_probe_takes_no_time_and_what_it_is_not_told_closes_gates() {
    in_namespace(async || {
        router();
        nft::add_chain(nft::INET, Some(nft::FORWARD), &[]).unwrap();
        let (kernel, _events) = Kernel::connect().unwrap();
        let state = kernel.observe(Kinds::LINKS, None).await.unwrap().state;
        let mut fastest = Duration::MAX;
        for _ in 0..100 {
            let start = Instant::now();
            Probes::read(state.links.values()).await;
            fastest = fastest.min(start.elapsed());
        }
        println!("probing: {fastest:?} at best");
        assert!(fastest < Duration::from_millis(5), "{fastest:?}");
        crate::lab::drop_capabilities();
        let gates = closed().await;
        for gates in gates {
            assert!(matches!(&gates[..], [Gate::Unknown { .. }, Gate::Unknown { .. }]), "{gates:?}");
        }
    });
}
