//! What is taken, and as what.

use std::{
    fmt::Write as _,
    net::{Ipv6Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use super::{from, policy, probe, take, take_file, tunnel};
use crate::config::{
    Config, Datapath, DevicePattern, Interfaces, Listen, Mss, OnDown, Policy, Probe, ProbeTarget, StartLimit, Tunnel,
    Unmatched, Xdp,
};

/// The example of the design.
const STORY: &str = r#"
[interfaces]
ingress = ["lan0", "br-*"]
uplink  = ["net0"]

[tunnel.sixxs0]
table = 200
up    = ["aiccu", "start", "/etc/aiccu/tunnel0.conf"]
down  = ["aiccu", "stop",  "/etc/aiccu/tunnel0.conf"]
start-limit = { burst = 4, interval = "60s" }
probe = { target = "2001:db8::1", interval = "5s", fail = 3, rise = 2 }

[tunnel.wg0]
via = "10.9.0.1"

[[policy]]
name    = "tunnel0"
from    = ["2a02::1", "2a02:578:85a0::/48"]
via     = ["sixxs0", "wg0"]
on-down = "unreachable"
exempt  = ["connected", "10.0.0.0/8"]
"#;

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

#[test]
fn the_story() {
    let loaded = take(STORY);
    assert!(loaded.warnings.is_empty());
    let pattern = |text: &str| DevicePattern(text.to_owned());
    let expected = Config {
        datapath: Datapath::Both,
        band: 20000,
        tree_above: 32,
        bypass_netfilter: false,
        unmatched: Unmatched::Kernel,
        xdp: Xdp::Auto,
        metrics: None,
        interfaces: Interfaces { ingress: vec![pattern("lan0"), pattern("br-*")], uplink: vec![pattern("net0")] },
        tunnels: vec![
            Tunnel {
                name: "sixxs0".to_owned(),
                table: Some(200),
                via_v4: None,
                via_v6: None,
                up: Some(strings(&["aiccu", "start", "/etc/aiccu/tunnel0.conf"])),
                down: Some(strings(&["aiccu", "stop", "/etc/aiccu/tunnel0.conf"])),
                start_limit: StartLimit { burst: 4, interval: Duration::from_secs(60) },
                mss: None,
                probes: vec![Probe {
                    target: ProbeTarget::Echo("2001:db8::1".parse().unwrap()),
                    source: None,
                    interval: Duration::from_secs(5),
                    timeout: Duration::from_secs(1),
                    fail: 3,
                    rise: 2,
                    hold_down: Duration::ZERO,
                }],
            },
            Tunnel {
                name: "wg0".to_owned(),
                table: None,
                via_v4: Some("10.9.0.1".parse().unwrap()),
                via_v6: None,
                up: None,
                down: None,
                start_limit: StartLimit::default(),
                mss: None,
                probes: Vec::new(),
            },
        ],
        policies: vec![Policy {
            name: "tunnel0".to_owned(),
            table: None,
            from: vec!["2a02::1/128".parse().unwrap(), "2a02:578:85a0::/48".parse().unwrap()],
            follow: Vec::new(),
            followed: Vec::new(),
            via: strings(&["sixxs0", "wg0"]),
            on_down: OnDown::Unreachable,
            exempt: vec!["10.0.0.0/8".parse().unwrap()],
            exempt_connected: true,
            exempt_routed: false,
            allow_default: false,
            main: false,
        }],
    };
    assert_eq!(loaded.config, expected);
}

#[test]
fn the_example_file() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tunroute.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let loaded = super::Loaded::load(&path).unwrap_or_else(|error| panic!("{error}"));
    assert!(loaded.warnings.is_empty());
    // What is commented out is right, too.
    let all = text.replace("\n#! ", "\n");
    assert_ne!(all, text);
    let all = take_file(&all).config;
    assert!(all.tunnels.len() > loaded.config.tunnels.len());
    assert!(all.policies.len() > loaded.config.policies.len());
}

#[test]
fn nothing() {
    let config = take("").config;
    assert_eq!((config.band, config.datapath, config.policies.len()), (20000, Datapath::Both, 0));
}

#[test]
fn variants() {
    let config =
        take("datapath = \"ebpf\"\nband = 1_500\nbypass-netfilter = true\ninterfaces.uplink = \"net0\"").config;
    assert_eq!((config.datapath, config.band, config.bypass_netfilter), (Datapath::Ebpf, 1500, true));
    assert!(config.interfaces.uplink.iter().any(|uplink| uplink.matches("net0")));

    for (text, listen) in [
        ("[::1]:9942", Listen::Tcp(SocketAddr::from((Ipv6Addr::LOCALHOST, 9942)))),
        ("unix:/run/tunroute/metrics.sock", Listen::Unix("/run/tunroute/metrics.sock".into())),
    ] {
        assert_eq!(take(&format!("metrics = \"{text}\"")).config.metrics, Some(listen));
    }

    for (word, unmatched) in [("kernel", Unmatched::Kernel), ("fast", Unmatched::Fast)] {
        assert_eq!(take(&format!("unmatched = \"{word}\"")).config.unmatched, unmatched);
    }
    for (word, on_down) in [
        ("unreachable", OnDown::Unreachable),
        ("blackhole", OnDown::Blackhole),
        ("prohibit", OnDown::Prohibit),
        ("next", OnDown::Next),
    ] {
        let policies = take(&policy(&format!("on-down = \"{word}\""))).config.policies;
        assert_eq!(policies.first().map(|policy| policy.on_down), Some(on_down));
    }
    for (exempt, prefixes, connected) in [
        ("[]", 0, false),
        ("\"connected\"", 0, true),
        ("\"224.0.0.0/4\"", 1, false),
        ("[\"connected\", \"fe80::/10\", \"10.0.0.1\"]", 2, true),
    ] {
        let policies = take(&policy(&format!("exempt = {exempt}"))).config.policies;
        let policy = policies.first().unwrap();
        assert_eq!((policy.exempt.len(), policy.exempt_connected), (prefixes, connected), "{exempt}");
    }
    for (value, length) in [("\"10.1.2.3\"", 32), ("[\"2a02::\"]", 128), ("\"10.0.0.0/7\"", 7), ("\"2000::/3\"", 3)] {
        let policies = take(&from(value, "")).config.policies;
        assert_eq!(policies[0].from[0].prefix_len(), length, "{value}");
    }
    for (value, literal, followed) in [
        ("\"@lan0\"", 0, 1),
        ("[\"@lan0\", \"2a02::1\", \"@br-*\"]", 1, 2),
        ("[\"@lan0 in 2001:db8:a::/48\", \"@lan0 in 0.0.0.0/0\"]", 0, 2),
    ] {
        let loaded = take(&from(value, ""));
        let policy = &loaded.config.policies[0];
        assert_eq!((policy.from.len(), policy.follow.len(), policy.followed.len()), (literal, followed, 0), "{value}");
        assert!(loaded.warnings.is_empty(), "{value}");
    }
    for all in ["0.0.0.0/0", "::/0", "0.0.0.0/1", "::/8"] {
        take(&from(&format!("\"{all}\""), "allow-default = true"));
    }
}

#[test]
fn tunnels() {
    let only = |text: &str| take(text).config.tunnels.into_iter().next().unwrap();
    let both = only(&tunnel("via = [\"fe80::1\", \"10.9.0.1\"]"));
    assert_eq!((both.via_v4, both.via_v6), ("10.9.0.1".parse().ok(), "fe80::1".parse().ok()));

    // The default timeout gives way to a short interval.
    let quick = only(&probe("target = \"192.0.2.1:443\", source = \"192.0.2.2\", interval = \"500ms\""));
    assert_eq!(quick.probes[0].target, ProbeTarget::Tcp("192.0.2.1:443".parse().unwrap()));
    assert_eq!(quick.probes[0].timeout, Duration::from_millis(500));

    let tables = "[[tunnel.t.probe]]\ntarget = \"[2001:db8::1]:22\"\n[[tunnel.t.probe]]\ntarget = \"fe80::1\"";
    for several in [tables, "probe = [{ target = \"[2001:db8::1]:22\" }, { target = \"fe80::1\" }]"] {
        let probes = only(&tunnel(several)).probes;
        assert_eq!(probes.len(), 2);
        assert_eq!(probes[0].target, ProbeTarget::Tcp("[2001:db8::1]:22".parse().unwrap()));
    }

    for (value, mss) in [("\"auto\"", Mss::Auto), ("88", Mss::Bytes(88)), ("65495", Mss::Bytes(65_495))] {
        assert_eq!(only(&tunnel(&format!("mss = {value}"))).mss, Some(mss), "{value}");
    }

    // In the order of the file, not of the names.
    let names: Vec<String> =
        take("[tunnel.b]\n[tunnel.\"eth0.100\"]\n[tunnel.a]").config.tunnels.into_iter().map(|t| t.name).collect();
    assert_eq!(names, ["b", "eth0.100", "a"]);
}

#[test]
fn unused_tunnel() {
    let warnings = take("[tunnel.wg0]\n").warnings;
    assert_eq!(
        warnings[0].line(),
        "t.toml:1:9: no policy uses the tunnel `wg0` (name it in a policy's `via`, or remove it)"
    );
}

/// Would take minutes if anything were quadratic.
#[test]
fn many_prefixes() {
    let mut list = String::new();
    for i in 0..100_000_u32 {
        write!(list, "\"2a02:{:x}:{:x}::/48\",", i >> 16, i & 0xffff).unwrap();
    }
    let text = from(&format!("[{list}]"), "");
    let start = Instant::now();
    let taken = take(&text);
    assert_eq!((taken.config.policies[0].from.len(), taken.warnings.len()), (100_000, 0));
    // One more, and the rules are too many to be comfortable.
    let more = text.replace("[\"2a02:0:0::/48\",", "[\"2a02:0:0::/48\", \"2a03::/48\",");
    let warnings = take(&more).warnings;
    assert_eq!(
        warnings.iter().map(|warning| warning.message()).collect::<Vec<_>>(),
        ["100001 IPv6 prefixes as rules take minutes to be made, and longer to be removed"]
    );
    let ebpf = format!("datapath = \"ebpf\"\ninterfaces.uplink = \"net0\"\n{more}");
    assert!(take(&ebpf).warnings.is_empty());
    let last = text.replace("\"2a02:1:869f::/48\",", "\"2a02:1:869f::/48\", \"2a02:0:0::/48\"");
    assert_eq!(super::only_error(&super::refuse(&last)).underlined().count(), 2);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}
