//! Observations in, findings out.

use std::{collections::BTreeMap, net::IpAddr};

use super::{Finding, Narrow, Observation, OwnAddress, Settings, Severity, examine, report};
use crate::{
    config::Config,
    kernel::sysctl::RpFilter,
    policy::gates::Gate,
    policy::net::{Family, Foreign, Handle, Inability, KernelState, Link, LinkLayer, MainRoute, ObservedRule},
};

const CONFIG: &str = r#"
[interfaces]
ingress = ["lan0"]
uplink = ["net0"]
[tunnel.wg0]
[[policy]]
name = "p"
from = ["192.0.2.0/24", "2001:db8::/32"]
via = "wg0"
"#;

fn config(change: impl Fn(&str) -> String) -> Config {
    Config::parse("t.toml", &change(CONFIG)).unwrap()
}

/// With a reason why it carries no IPv6.
fn unable((index, link): (u32, Link), why: Inability) -> (u32, Link) {
    (index, Link { unable: [(Family::V6, why)].into(), ..link })
}

fn link(index: u32, name: &str, kind: Option<&str>, mtu: u32) -> (u32, Link) {
    (index, Link { kind: kind.map(str::to_owned), mtu, ..Link::new(index, name, LinkLayer::Ip) })
}

fn own(device: &str, address: [u8; 4], leaves_by: &str) -> OwnAddress {
    OwnAddress { device: device.to_owned(), address: IpAddr::from(address), leaves_by: Some(leaves_by.to_owned()) }
}

/// A route behind a router.
fn route(dst: &str, oif: u32) -> MainRoute {
    MainRoute { dst: dst.parse().unwrap(), oif: Some(oif), ..MainRoute::default() }
}

/// A host on which nothing is wrong.
fn healthy() -> Observation {
    let main = |dst: &str, oif: u32| MainRoute { on_link: oif == 2, ..route(dst, oif) };
    let kernel = KernelState {
        links: [link(2, "lan0", None, 1500), link(3, "net0", None, 1500), link(4, "wg0", Some("wireguard"), 1420)]
            .into(),
        main: vec![main("0.0.0.0/0", 3), main("::/0", 3), main("10.0.0.0/24", 2)],
        ..KernelState::default()
    };
    let settings = [("ipv6/conf/all/forwarding", 1), ("ipv6/conf/net0/accept_ra", 1), ("core/bpf_jit_enable", 1)];
    Observation {
        kernel,
        gates: Vec::new(),
        filters: BTreeMap::new(),
        settings: settings.map(|(path, value)| (path.to_owned(), value)).into(),
        addresses: vec![own("net0", [198, 51, 100, 7], "net0"), own("wg0", [192, 0, 2, 1], "net0")],
        narrow: Vec::new(),
        lacking: Vec::new(),
        network_manager: Vec::new(),
        bpffs: true,
        networkd: None,
    }
}

#[test]
fn segments_that_do_not_fit_are_found() {
    let with = |settings: &str, mss: &str| {
        let config =
            config(|text| format!("{settings}{}", text.replace("[tunnel.wg0]", &format!("[tunnel.wg0]\n{mss}"))));
        examine(&config, &healthy()).into_iter().map(|finding| finding.what).collect::<Vec<_>>()
    };
    for (settings, mss, told) in [
        ("", "mss = 1380", None),
        ("", "mss = 1381", Some("more than fits its MTU of 1420 bytes: 1380 (IPv6: 1360)")),
        ("", "mss = \"auto\"", None),
        ("datapath = \"ebpf\"\n", "mss = \"auto\"", None),
        ("datapath = \"ebpf\"\n", "", Some("no ICMP error tells the sender")),
    ] {
        let findings = with(settings, mss);
        assert_eq!(findings.len(), usize::from(told.is_some()), "{settings}{mss}: {findings:?}");
        assert!(findings.iter().all(|what| told.is_some_and(|told| what.contains(told))), "{findings:?}");
    }
}

fn rule(priority: u32, text: &str) -> ObservedRule {
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
        text: text.to_owned(),
    }
}

fn other_source() -> ObservedRule {
    let foreign = Foreign { from: Some("198.51.100.7/32".parse().unwrap()), ..Foreign::default() };
    ObservedRule { foreign: Some(Box::new(foreign)), ..rule(100, "from 198.51.100.7 lookup 7 pref 100") }
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    assert_eq!(examine(&config(str::to_owned), &healthy()), []);
    assert!(report(&[], &[], false).starts_with("nothing found"));
}

/// What is found after one thing went wrong.
fn found(break_it: impl Fn(&mut Observation)) -> Finding {
    let mut seen = healthy();
    break_it(&mut seen);
    let findings = examine(&config(str::to_owned), &seen);
    assert_eq!(findings.len(), 1, "{findings:#?}");
    findings.into_iter().next().unwrap()
}

#[test]
fn each_thing_that_goes_wrong_is_found_with_its_fix() {
    type Break = fn(&mut Observation);
    let set = |seen: &mut Observation, path: &str, value| Settings::insert(&mut seen.settings, path.to_owned(), value);
    let cases: &[(Break, Severity, &str, &str)] = &[
        (
            |seen| seen.gates.push(Gate::Forwarding { family: Family::V4, device: "lan0".to_owned() }),
            Severity::Problem,
            "the kernel does not forward IPv4 from lan0",
            "sysctl -w net.ipv4.ip_forward=1",
        ),
        (|seen| seen.gates.push(Gate::Xfrm), Severity::Warning, "IPsec policies", "ip xfrm policy"),
        (|seen| drop(seen.kernel.links.remove(&2)), Severity::Warning, "no ingress device lan0", "ip -brief link"),
        (
            |seen| {
                seen.kernel.main.push(MainRoute {
                    dst: "0.0.0.0/1".parse().unwrap(),
                    oif: Some(2),
                    on_link: true,
                    ..MainRoute::default()
                })
            },
            Severity::Problem,
            "the main table has 0.0.0.0/1 by lan0",
            "write `uplink = [\"net0\", \"lan0\"]`",
        ),
        (
            |seen| seen.kernel.rules.push(rule(5210, "from all fwmark 0x80000/0xff0000 lookup main pref 5210")),
            Severity::Problem,
            "an IPv4 rule of Tailscale at priority 5210: from all fwmark",
            "leave it, as Tailscale needs it, and write `band = 5081`",
        ),
        (
            |seen| seen.kernel.rules.push(rule(100, "from all to 10.0.0.0/8 lookup 7 pref 100")),
            Severity::Problem,
            "an IPv4 rule of another program at priority 100: from all",
            "no room for a `band` ahead of it; if it is not needed, ip rule del from all to 10.0.0.0/8 lookup 7 pref 100",
        ),
        (
            |seen| seen.kernel.links.extend([link(4, "wg0", Some("wireguard"), 1500)]),
            Severity::Warning,
            "with 60 bytes of wireguard do not fit net0 (1500)",
            "ip link set dev wg0 mtu 1440",
        ),
        (
            |seen| seen.kernel.links.extend([unable(link(4, "wg0", None, 1200), Inability::Mtu(1200))]),
            Severity::Problem,
            "the MTU of wg0 is 1200 bytes, and IPv6 needs 1280",
            "ip link set dev wg0 mtu 1280",
        ),
        (
            |seen| seen.kernel.links.extend([unable(link(4, "wg0", None, 1420), Inability::Disabled)]),
            Severity::Problem,
            "IPv6 is disabled on wg0",
            "sysctl -w net/ipv6/conf/wg0/disable_ipv6=0",
        ),
        (
            |seen| seen.addresses.push(own("net0", [192, 0, 2, 9], "net0")),
            Severity::Problem,
            "the address 192.0.2.9 of the uplink net0 is in 192.0.2.0/24 of the policy p",
            "`exempt` of p",
        ),
        (
            |seen| seen.kernel.main.retain(|route| route.dst != Family::V6.default_prefix()),
            Severity::Warning,
            "net0 has no IPv6 default route",
            "sysctl -w net.ipv6.conf.net0.accept_ra=2",
        ),
        (
            |seen| {
                seen.kernel.main.push(MainRoute {
                    dst: "2000::/3".parse().unwrap(),
                    oif: Some(2),
                    on_link: true,
                    ..MainRoute::default()
                })
            },
            Severity::Problem,
            "the main table has 2000::/3 by lan0",
            "write `uplink = [\"net0\", \"lan0\"]`",
        ),
        (
            |seen| seen.addresses.push(own("wg0", [10, 9, 0, 2], "net0")),
            Severity::Warning,
            "answers from 10.9.0.2 of wg0 leave by net0",
            "write \"10.9.0.2\" to `from` of a policy with `via = \"wg0\"`",
        ),
        (
            |seen| seen.addresses.push(own("net0", [198, 51, 100, 9], "lan0")),
            Severity::Warning,
            "answers from 198.51.100.9 of net0 leave by lan0",
            "write `[tunnel.net0]` with the gateway",
        ),
        (
            |seen| {
                let target = IpAddr::from([192, 0, 2, 200]);
                seen.narrow.push(Narrow { tunnel: "wg0".to_owned(), mtu: 1420, carries: 1352, target });
            },
            Severity::Problem,
            "wg0 carries packets of 1352 bytes to 192.0.2.200 and back, but none of its MTU, 1420 bytes",
            "ip link set dev wg0 mtu 1352",
        ),
        (
            |seen| seen.lacking = vec!["programs for traffic control", "maps in maps"],
            Severity::Warning,
            "this kernel has no eBPF programs for traffic control, no maps in maps",
            "datapath = \"kernel\"",
        ),
        (
            |seen| seen.network_manager.push("wg0".to_owned()),
            Severity::Warning,
            "NetworkManager has a connection for the tunnel wg0",
            "nmcli device set wg0 managed no",
        ),
        (|seen| seen.bpffs = false, Severity::Warning, "no bpf file system", "mount -t bpf bpf /sys/fs/bpf"),
        (
            |seen| *seen.settings.entry("core/bpf_jit_enable".to_owned()).or_default() = 0,
            Severity::Warning,
            "does not compile eBPF",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        (
            |seen| seen.networkd = Some("systemd-networkd removes rules: write this".to_owned()),
            Severity::Problem,
            "systemd-networkd removes rules",
            "write this",
        ),
    ];
    for (break_it, severity, what, mend) in cases {
        let finding = found(break_it);
        assert_eq!(finding.severity, *severity, "{finding:?}");
        assert!(finding.what.contains(what) && finding.fix.contains(mend), "{finding:?}");
        assert_eq!(finding.setting.is_some(), finding.fix.starts_with("sysctl"), "{finding:?}");
        let text = report(&[finding], &[], false);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
    // The reverse path filter asks the rules, where there are any.
    let mut seen = healthy();
    set(&mut seen, "ipv4/conf/wg0/rp_filter", 0);
    set(&mut seen, "ipv4/conf/all/rp_filter", 1);
    assert_eq!(examine(&config(str::to_owned), &seen), []);
    let findings = examine(&config(|text| format!("datapath = \"ebpf\"\n{text}")), &seen);
    assert_eq!(findings[0].fix, "sysctl -w net.ipv4.conf.wg0.rp_filter=2");
}

/// "Everything by the VPN", with an uplink's own address among the sources.
#[test]
fn advice_that_was_followed_is_not_given_again() {
    let host = |exempt: &str| {
        let config = config(|text| {
            let all = text.replace("from = [\"192.0.2.0/24\", ", "allow-default = true\nfrom = [\"0.0.0.0/0\", ");
            format!("{all}exempt = [{exempt}]\n")
        });
        let mut seen = healthy();
        let net =
            MainRoute { dst: "198.51.100.0/24".parse().unwrap(), oif: Some(3), on_link: true, ..MainRoute::default() };
        seen.kernel.main.push(net);
        seen.kernel.local.extend(["198.51.100.7/32".parse::<ipnet::IpNet>().unwrap()]);
        seen.addresses.truncate(1);
        examine(&config, &seen)
    };
    let text = |findings: &[Finding]| report(findings, &[], false).split_whitespace().collect::<Vec<_>>().join(" ");
    let first = text(&host("\"10.0.0.0/8\", \"2001:db8::1\""));
    assert!(
        first.contains("198.51.100.0/24, the network of the uplink net0, gets no answers from 198.51.100.7"),
        "{first}"
    );
    assert!(first.contains("write \"198.51.100.0/24\" to `exempt` of p"), "{first}");
    let first = text(&host("\"198.51.100.0/24\""));
    assert!(!first.contains("far ends"), "{first}");
    let first = text(&host(""));
    assert!(first.contains("198.51.100.7 of the uplink net0 is in 0.0.0.0/0 of the policy p"), "{first}");
    assert!(first.contains("write the far ends of the tunnels"), "{first}");
    assert_eq!(host("\"10.0.0.0/24\", \"198.51.100.0/24\", \"203.0.113.9/32\""), []);
}

#[test]
fn main_table_routes_that_a_policy_overrules_are_found() {
    // What stands below the policy, the routes besides those of a healthy host, and what is found with its fix.
    type Case<'a> = (&'a str, &'a [(&'a str, u32)], Option<(&'a str, &'a str)>);
    let docker = ("172.17.0.0/16", 5);
    let behind = ("10.64.0.0/10", 2);
    let many: Vec<String> = (0..200).map(|net| format!("10.64.{net}.0/24")).collect();
    let many: Vec<(&str, u32)> = many.iter().map(|dst| (dst.as_str(), 2)).collect();
    let cases: [Case<'_>; 14] = [
        (
            "",
            &[docker],
            Some((
                "leads inside to 172.17.0.0/16 by docker0, and the policy p overrules it",
                "write \"172.17.0.0/16\" to `exempt` of p; or \"routed\"",
            )),
        ),
        (
            "",
            &[docker, behind, ("fd00:7::/48", 2)],
            Some((
                "10.64.0.0/10 by lan0, 172.17.0.0/16 by docker0, fd00:7::/48 by lan0, and the policy",
                "write \"routed\" to `exempt` of p; or some of the networks, such as \"10.64.0.0/10\"",
            )),
        ),
        ("", &many, Some(("10.64.2.0/24 by lan0 and 197 more, and", "\"routed\""))),
        // Not exempt: the rest of a prefix, and what is on the link at an ingress device.
        ("exempt = [\"connected\", \"10.64.0.0/11\"]", &[behind], Some(("10.64.0.0/10", "\"routed\""))),
        ("exempt = []", &[], Some(("10.0.0.0/24 by lan0", "\"10.0.0.0/24\""))),
        // Advice that was followed.
        ("exempt = [\"connected\", \"routed\"]", &many, None),
        ("exempt = [\"connected\", \"10.64.0.0/10\"]", &[behind, ("10.64.7.0/24", 2)], None),
        // By an uplink, by the policy's own tunnel, a default route, or of a family that the policy has no source of.
        ("", &[("198.51.100.0/24", 3)], None),
        ("", &[("198.51.100.0/24", 4)], None),
        ("", &[("fe80::/64", 2)], None),
        ("from = \"192.0.2.0/24\"", &[("fd00:7::/48", 2)], None),
        ("from = \"192.0.2.0/24\"", &[behind], Some(("10.64.0.0/10 by lan0", "\"10.64.0.0/10\""))),
        // Left to the main table.
        ("via = \"main\"", &many, None),
        ("via = \"main\"", &[docker], None),
    ];
    for (setting, routes, expected) in cases {
        let config = config(|text| {
            let key = setting.split(' ').next().filter(|key| !key.is_empty());
            let kept = text.lines().filter(|line| key.is_none_or(|key| !line.starts_with(key)));
            kept.collect::<Vec<_>>().join("\n") + "\n" + setting
        });
        let mut seen = healthy();
        seen.kernel.links.extend([link(5, "docker0", Some("bridge"), 1500)]);
        seen.kernel.main.extend(routes.iter().map(|(dst, oif)| route(dst, *oif)));
        let findings = examine(&config, &seen);
        let found: Vec<&Finding> = findings.iter().filter(|finding| finding.what.contains("leads inside")).collect();
        let Some((what, fix)) = expected else {
            assert_eq!(found, [] as [&Finding; 0], "{setting} {routes:?}");
            continue;
        };
        let [Finding { severity: Severity::Warning, what: told, fix: advice, .. }] = found.as_slice() else {
            panic!("{setting} {routes:?}: {findings:#?}")
        };
        assert!(told.contains(what) && advice.contains(fix), "{told}: {advice}");
    }
}

#[test]
fn sources_that_rp_filter_drops_are_found_in_every_datapath() {
    for datapath in ["kernel", "both", "ebpf", "shadow"] {
        let mss = |text: &str| text.replace("[tunnel.wg0]", "[tunnel.wg0]\nmss = \"auto\"");
        let config = config(|text| format!("datapath = \"{datapath}\"\n{}", mss(text)));
        let mut seen = healthy();
        assert_eq!(examine(&config, &seen), [], "{datapath}");
        seen.filters.insert(2, RpFilter::Strict);
        let findings = examine(&config, &seen);
        assert_eq!(findings.len(), 1, "{datapath}: {findings:#?}");
        let Finding { what, fix, .. } = &findings[0];
        assert!(what.contains("rp_filter of lan0 drops what comes from 192.0.2.0/24"), "{datapath}: {what}");
        assert!(fix.starts_with("sysctl -w net.ipv4.conf.lan0.rp_filter=2"), "{datapath}: {fix}");
    }
}

#[test]
fn what_is_fine_is_no_finding() {
    type Case = (fn(&mut Observation), &'static str);
    let changes: [Case; 8] = [
        (
            |seen| {
                seen.kernel.main.push(MainRoute {
                    dst: "fc00::/7".parse().unwrap(),
                    oif: Some(2),
                    on_link: true,
                    ..MainRoute::default()
                })
            },
            "private addresses",
        ),
        (|seen| seen.addresses.push(own("lan0", [10, 0, 0, 1], "net0")), "behind the uplink, as everything there"),
        (|seen| seen.kernel.rules.push(rule(30_000, "from all lookup 9 pref 30000")), "asked later"),
        (|seen| seen.addresses.push(own("wg0", [192, 0, 2, 9], "net0")), "a tunnel's own address"),
        (|seen| seen.kernel.rules.push(other_source()), "a rule for other sources"),
        (
            |seen| seen.kernel.rules.push(ObservedRule { iif: Some("net0".to_owned()), ..rule(1001, "from all") }),
            "mwan3's rule for what enters by an uplink",
        ),
        (
            |seen| seen.kernel.rules.push(ObservedRule { oif: Some("eth9".to_owned()), ..rule(1001, "from all") }),
            "a rule for bound sockets",
        ),
        (|seen| seen.kernel.links.extend([link(4, "wg0", None, 1500)]), "its overhead is not known"),
    ];
    for (change, why) in changes {
        let mut seen = healthy();
        change(&mut seen);
        assert_eq!(examine(&config(str::to_owned), &seen), [], "{why}");
    }
}

#[test]
fn a_setting_of_a_device_with_a_dot_is_written_with_slashes() {
    let setting = |path: &str| super::Setting { path: path.to_owned(), value: 2 }.to_string();
    assert_eq!(setting("ipv4/conf/eth0.7/rp_filter"), "net/ipv4/conf/eth0.7/rp_filter=2");
    assert_eq!(setting("ipv4/conf/wg0/rp_filter"), "net.ipv4.conf.wg0.rp_filter=2");
}
