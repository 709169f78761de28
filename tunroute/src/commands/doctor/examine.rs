//! From what was seen to findings. Pure.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Finding, Narrow, Observation, OwnAddress, Setting, Severity};
use crate::{
    config::{Config, Datapath, DevicePattern, Mss, Policy},
    policy::ability::shortcomings,
    policy::compile::{follow, matching, tree, wants_tree},
    policy::gates::Gate,
    policy::net::{Family, Link, MainRoute, ObservedRule},
};

/// What a tunnel puts before a packet, in bytes, by the driver's name: with the shortest outer header there is.
const OVERHEADS: [(&str, u32); 9] = [
    ("sit", 20),
    ("ipip", 20),
    ("gre", 24),
    ("gretap", 38),
    ("ip6tnl", 40),
    ("ip6gre", 44),
    ("ip6gretap", 58),
    ("wireguard", 60),
    ("vxlan", 50),
];
/// A band is so many priorities long, with that of the probes.
const BAND: u32 = 130;
/// The last priority that belongs to the kernel before there is room for a band.
const FIRST_BAND: u32 = 1002;

/// Everything that is not as this configuration needs it; what is worse comes first.
#[must_use]
pub fn examine(config: &Config, seen: &Observation) -> Vec<Finding> {
    let mut config = config.clone();
    follow(&mut config, &seen.kernel);
    let config = &config;
    let mut findings = Vec::new();
    findings.extend(seen.gates.iter().map(gate));
    findings.extend(devices(config, seen));
    findings.extend(foreign_rules(config, seen));
    findings.extend(other_ways_out(config, seen));
    findings.extend(inabilities(config, seen));
    findings.extend(sizes(config, seen));
    findings.extend(segments(config, seen));
    findings.extend(seen.narrow.iter().map(narrow));
    findings.extend(own_packets(config, seen));
    findings.extend(answers(config, seen));
    findings.extend(reverse_paths(config, seen));
    findings.extend(advertisements(config, seen));
    findings.extend(programs(config, seen));
    findings.extend(seen.network_manager.iter().map(|tunnel| network_manager(tunnel)));
    findings.extend(seen.networkd.iter().map(|hint| networkd(hint)));
    findings.sort_by_key(|finding| finding.severity);
    findings
}

fn problem(what: impl Into<String>, breaks: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { severity: Severity::Problem, what: what.into(), breaks: breaks.into(), mend: mend.into(), setting: None }
}

fn warning(what: impl Into<String>, breaks: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { severity: Severity::Warning, ..problem(what, breaks, mend) }
}

impl Finding {
    /// A setting mends it.
    fn by(self, path: String, value: i64) -> Self {
        let setting = Setting { path, value };
        Self { mend: format!("sysctl -w {setting}"), setting: Some(setting), ..self }
    }
}

/// What keeps the fast path from deciding.
fn gate(gate: &Gate) -> Finding {
    match gate {
        Gate::Forwarding { family, device } => {
            let path = match family {
                Family::V4 => "ipv4/ip_forward",
                Family::V6 => "ipv6/conf/all/forwarding",
            };
            let breaks = format!("{family} packets that enter by {device} for somebody else are dropped");
            problem(gate.to_string(), breaks, "").by(path.to_owned(), 1)
        }
        _ => warning(gate.to_string(), "the fast path leaves these packets to the kernel's rules", gate.advice()),
    }
}

/// Devices that the configuration names and that are not there.
fn devices<'a>(config: &'a Config, seen: &'a Observation) -> impl Iterator<Item = Finding> + use<'a> {
    let interfaces = &config.interfaces;
    let missing = |patterns: &'a [DevicePattern]| {
        patterns.iter().filter(|pattern| matching(std::slice::from_ref(*pattern), &seen.kernel).next().is_none())
    };
    let ingress = missing(&interfaces.ingress).map(|DevicePattern(name)| {
        warning(
            format!("there is no ingress device {name}"),
            "nothing enters by it; it is followed as soon as it appears",
            "if the name is wrong, write another: `ip -brief link` shows them",
        )
    });
    let uplinks = missing(&interfaces.uplink).map(|DevicePattern(name)| {
        problem(
            format!("there is no uplink {name}"),
            "if the uplink has another name, nothing guards it",
            "write its name: `ip route show default` and `ip -6 route show default` tell it",
        )
    });
    ingress.chain(uplinks)
}

/// Rules of others that are asked before tunroute's.
fn foreign_rules<'a>(config: &'a Config, seen: &'a Observation) -> impl Iterator<Item = Finding> + use<'a> {
    let before = |rule: &&ObservedRule| {
        !rule.ours && !rule.looks_up_local && !rule.l3mdev && rule.priority <= config.band.saturating_add(BAND - 2)
    };
    let lowest = seen.kernel.rules.iter().filter(before).map(|rule| rule.priority).min();
    let band = lowest.and_then(|lowest| lowest.checked_sub(BAND - 1)).filter(|band| *band >= FIRST_BAND);
    let room = if Family::ALL.into_iter().any(|family| wants_tree(config, family)) { tree::ROOM } else { 0 };
    let band = band.map(|band| band.saturating_sub(room).max(FIRST_BAND));
    seen.kernel.rules.iter().filter(before).filter(|rule| config.uses(rule.family)).map(move |rule| {
        let whose = whose(&rule.text).map_or_else(String::new, |whose| format!(", which looks like {whose}'s"));
        let ip = match rule.family {
            Family::V4 => "ip",
            Family::V6 => "ip -6",
        };
        let remove = format!("{ip} rule del {}", rule.text);
        problem(
            format!("somebody else's {} rule at priority {}{whose}: {}", rule.family, rule.priority, rule.text),
            "it is asked before tunroute's and may send a policy's packets elsewhere; so the fast path does not decide",
            match band {
                Some(band) => format!("write `band = {band}`, which is before it; or {remove}"),
                None => remove,
            },
        )
    })
}

/// Who makes rules like this one.
fn whose(text: &str) -> Option<&'static str> {
    let has = |part| text.contains(part);
    match () {
        () if has("fwmark 0x80000/0xff0000") || has("lookup 52 ") || text.ends_with("lookup 52") => Some("Tailscale"),
        () if has("suppress_prefixlength") || has("0xca6c") || has("lookup 51820") => Some("wg-quick"),
        () if has("/0x3f00") => Some("mwan3"),
        _ => None,
    }
}

/// Default routes of the main table by devices that the configuration does not know.
fn other_ways_out(config: &Config, seen: &Observation) -> Vec<Finding> {
    let known = |name: &str| {
        let uplink = config.interfaces.uplink.iter().any(|pattern| pattern.matches(name));
        uplink || config.tunnels.iter().any(|tunnel| tunnel.name == name)
    };
    let mut findings = Vec::new();
    let mut named: Vec<&str> = Vec::new();
    for route in seen.kernel.main.iter().filter(|route| route.covers_everything()) {
        let Some(link) = route.oif.and_then(|oif| seen.kernel.links.get(&oif)) else { continue };
        if known(&link.name) || named.contains(&link.name.as_str()) {
            continue;
        }
        named.push(&link.name);
        let mut uplinks: Vec<String> =
            config.interfaces.uplink.iter().map(|DevicePattern(name)| format!("\"{name}\"")).collect();
        uplinks.push(format!("\"{}\"", link.name));
        findings.push(problem(
            format!("the main table has {} by {}, which is no uplink of the configuration", route.dst, link.name),
            "nothing keeps packets with a policy's source from leaving there",
            format!("write `uplink = [{}]`", uplinks.join(", ")),
        ));
    }
    findings
}

/// Families that policies send by a tunnel, and that it does not carry.
fn inabilities(config: &Config, seen: &Observation) -> impl Iterator<Item = Finding> {
    shortcomings(config, &seen.kernel).into_iter().map(|found| problem(found.reason, found.effect, found.advice))
}

/// Tunnels whose packets do not fit the uplink.
fn sizes(config: &Config, seen: &Observation) -> Vec<Finding> {
    let uplink: Option<&Link> = matching(&config.interfaces.uplink, &seen.kernel).min_by_key(|link| link.mtu);
    let mut findings = Vec::new();
    for link in config.tunnels.iter().filter_map(|tunnel| seen.kernel.link(&tunnel.name)) {
        let overhead = OVERHEADS.iter().find(|(kind, _)| link.kind.as_deref() == Some(kind));
        if let (Some((kind, overhead)), Some(uplink)) = (overhead, uplink)
            && link.mtu.saturating_add(*overhead) > uplink.mtu
        {
            let fits = uplink.mtu.saturating_sub(*overhead);
            findings.push(warning(
                format!(
                    "{} takes packets of {} bytes, which with {overhead} bytes of {kind} do not fit {} ({})",
                    link.name, link.mtu, uplink.name, uplink.mtu
                ),
                "large packets are cut in two, or lost on the way, and TCP stands still",
                format!("ip link set dev {} mtu {fits}", link.name),
            ));
        }
    }
    findings
}

/// Tunnels through which TCP is told of larger segments than they take, where nobody else says so.
fn segments(config: &Config, seen: &Observation) -> Vec<Finding> {
    let widest = matching(&config.interfaces.ingress, &seen.kernel).map(|link| link.mtu).max();
    let mut findings = Vec::new();
    for (tunnel, link) in config.tunnels.iter().filter_map(|tunnel| Some((tunnel, seen.kernel.link(&tunnel.name)?))) {
        let (name, mtu, room) = (&link.name, link.mtu, Mss::Auto.clamp(link));
        let what = match tunnel.mss {
            Some(Mss::Bytes(bytes)) if bytes > room.v4 => format!(
                "`mss = {bytes}` of {name} is more than its MTU of {mtu} bytes has room for: {} (IPv6: {})",
                room.v4, room.v6
            ),
            None if config.datapath == Datapath::Ebpf && widest.is_some_and(|widest| mtu < widest) => format!(
                "{name} takes packets of {mtu} bytes, others come from the ingress interfaces, and with `datapath = \
                 \"ebpf\"` nobody answers those"
            ),
            _ => continue,
        };
        findings.push(warning(
            what,
            "TCP sends segments that do not fit, and stands still where it is not told",
            format!("write `mss = \"auto\"` below [tunnel.{name}]"),
        ));
    }
    findings
}

/// A tunnel by which large packets vanish.
fn narrow(narrow: &Narrow) -> Finding {
    let Narrow { tunnel, mtu, carries, target } = narrow;
    problem(
        format!(
            "{tunnel} carries packets of {carries} bytes to {target} and back, but none of its MTU, {mtu} bytes, and \
             nothing says why"
        ),
        "large packets vanish on the way, and TCP stands still",
        format!("ip link set dev {tunnel} mtu {carries}"),
    )
}

/// The tunnels' own packets carry an address of an uplink.
fn own_packets(config: &Config, seen: &Observation) -> Vec<Finding> {
    let mut findings = Vec::new();
    let of_uplinks = seen.addresses.iter().filter(|own| is_uplink(config, &own.device));
    for OwnAddress { device, address, .. } in of_uplinks.filter(|own| !is_link_local(own.address)) {
        if let Some((net, policy)) = policy_of(config, *address) {
            findings.push(problem(
                format!("the address {address} of the uplink {device} is in {net} of the policy {}", policy.name),
                "the tunnels' own packets carry it: they are sent into the tunnel that they are to carry",
                format!("take it out of `from`, or write the far ends of the tunnels to `exempt` of {}", policy.name),
            ));
        }
    }
    findings
}

fn is_uplink(config: &Config, device: &str) -> bool {
    config.interfaces.uplink.iter().any(|pattern| pattern.matches(device))
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// The policy that an address belongs to, with its prefix: the longest one decides.
fn policy_of(config: &Config, address: IpAddr) -> Option<(&IpNet, &Policy)> {
    let prefixes = config.policies.iter().flat_map(|policy| policy.sources().map(move |net| (net, policy)));
    prefixes.filter(|(net, _)| net.contains(&address)).max_by_key(|(net, _)| net.prefix_len())
}

/// Addresses of tunnels and uplinks whose answers leave by another device, which no policy prevents: the kernel takes
/// packets for any of its addresses from any device, and looks for the way back by the destination alone.
fn answers(config: &Config, seen: &Observation) -> Vec<Finding> {
    let is_tunnel = |device: &str| config.tunnels.iter().any(|tunnel| tunnel.name == device);
    let mut findings = Vec::new();
    for OwnAddress { device, address, leaves_by } in &seen.addresses {
        let Some(other) = leaves_by.as_ref().filter(|other| *other != device) else { continue };
        if is_link_local(*address)
            || !(is_tunnel(device) || is_uplink(config, device))
            || policy_of(config, *address).is_some()
        {
            continue;
        }
        findings.push(warning(
            format!("what {address} of {device} is asked is answered by {other}"),
            format!("nobody gets an answer from {address} where the provider of {other} drops sources not its own"),
            if is_tunnel(device) {
                format!("write \"{address}\" to `from` of a policy with `via = \"{device}\"`")
            } else {
                format!(
                    "write `[tunnel.{device}]` with the gateway in `via`, and a policy with `from = \"{address}\"` and \
                     `via = \"{device}\"`"
                )
            },
        ));
    }
    findings
}

/// Without rules, the kernel's reverse path filter does not know of the tunnels. (With them it asks the rules for the way
/// back, from the packet's destination: `__fib_validate_source()` in `net/ipv4/fib_frontend.c`.)
fn reverse_paths(config: &Config, seen: &Observation) -> Vec<Finding> {
    if config.datapath != Datapath::Ebpf || !config.uses(Family::V4) {
        return Vec::new();
    }
    let value = |device: &str| seen.settings.get(&format!("ipv4/conf/{device}/rp_filter")).copied().unwrap_or(0);
    let strict = config
        .tunnels
        .iter()
        .filter(|tunnel| seen.kernel.link(&tunnel.name).is_some() && value(&tunnel.name).max(value("all")) == 1);
    strict
        .map(|tunnel| {
            let name = &tunnel.name;
            problem(
                format!("the reverse path filter of {name} is strict"),
                format!("IPv4 answers that come by {name} are dropped: their way back would be another device"),
                "",
            )
            .by(format!("ipv4/conf/{name}/rp_filter"), 2)
        })
        .collect()
}

/// A router takes no advertisements unless told to, and loses its default route when it becomes one.
fn advertisements(config: &Config, seen: &Observation) -> Vec<Finding> {
    let forwards = seen.settings.get("ipv6/conf/all/forwarding") == Some(&1);
    let ignored = matching(&config.interfaces.uplink, &seen.kernel).filter(|link| {
        let default = |route: &MainRoute| route.dst == Family::V6.default_prefix() && route.oif == Some(link.index);
        let accept = seen.settings.get(&format!("ipv6/conf/{}/accept_ra", link.name));
        forwards && accept == Some(&1) && !seen.kernel.main.iter().any(default)
    });
    ignored
        .map(|link| {
            let name = &link.name;
            warning(
                format!("{name} has no IPv6 default route, and ignores router advertisements"),
                "a host that forwards takes no default route from its provider's router unless told to",
                "",
            )
            .by(format!("ipv6/conf/{name}/accept_ra"), 2)
        })
        .collect()
}

/// What the eBPF programs need.
fn programs(config: &Config, seen: &Observation) -> Vec<Finding> {
    let mut findings = Vec::new();
    if config.datapath == Datapath::Kernel {
        return findings;
    }
    if !seen.bpffs {
        findings.push(warning(
            "no bpf file system is mounted on /sys/fs/bpf",
            "the programs cannot be pinned there and would end with the daemon",
            "mount -t bpf bpf /sys/fs/bpf",
        ));
    }
    if !seen.lacking.is_empty() {
        findings.push(warning(
            format!("this kernel has no eBPF {}", seen.lacking.join(", no ")),
            "there is no fast path: the kernel's rules carry all traffic",
            "boot a kernel with CONFIG_NET_CLS_BPF (5.15 or later), or write `datapath = \"kernel\"`",
        ));
    }
    if seen.settings.get("core/bpf_jit_enable") == Some(&0) {
        let breaks = "the programs are interpreted, and several times slower";
        findings.push(
            warning("the kernel does not compile eBPF programs", breaks, "").by("core/bpf_jit_enable".to_owned(), 1),
        );
    }
    findings
}

fn network_manager(tunnel: &str) -> Finding {
    warning(
        format!("NetworkManager has a connection for the tunnel {tunnel}"),
        "when it takes the connection up or down, it takes the device's routes away; tunroute puts its own back",
        format!(
            "nmcli device set {tunnel} managed no; for good: `[keyfile]` and below it \
             `unmanaged-devices=interface-name:{tunnel}` in /etc/NetworkManager/conf.d/tunroute.conf"
        ),
    )
}

fn networkd(hint: &str) -> Finding {
    let (what, mend) = hint.split_once(": ").unwrap_or((hint, "see networkd.conf(5)"));
    problem(what, "tunroute puts them back, and for that moment packets go astray", mend)
}
