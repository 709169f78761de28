//! Judges an observation of the host: pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{Finding, Narrow, Observation, OwnAddress, Setting, Severity};
use crate::{
    commands::explain::expected::{Expected, Intent},
    config::{Config, Datapath, DevicePattern, Mss, Policy},
    kernel::Question,
    policy::ability::shortcomings,
    policy::compile::{Inputs, decisions, follow, overruled, tree, wants_tree},
    policy::devices::matching,
    policy::gates::{
        Gate, concerns, kept_out,
        owner::{advice, owner},
    },
    policy::net::{Band, Family, Link, MainRoute, ObservedRule},
};

/// Bytes that a tunnel adds to a packet, by the driver's name, with the shortest outer header.
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
/// Number of addresses of a network among which one is looked for that is not this host's own.
const FIRST_HOSTS: usize = 64;
/// Number of routes that one finding names.
const NAMED_ROUTES: usize = 3;
/// The lowest band behind the kernel's rules for VRFs.
const FIRST_BAND: u32 = 1003;

/// Everything that is not as this configuration needs it, problems first.
#[must_use]
pub fn examine(config: &Config, seen: &Observation) -> Vec<Finding> {
    let mut config = config.clone();
    follow(&mut config, &seen.kernel);
    let config = &config;
    let (tables, failed) = (BTreeMap::new(), BTreeSet::new());
    let inputs = Inputs {
        config,
        kernel: &seen.kernel,
        tables: &tables,
        failed: &failed,
        rules: true,
        fast: None,
        before: None,
    };
    let mut findings = Vec::new();
    findings.extend(seen.gates.iter().map(gate));
    findings.extend(devices(config, seen));
    findings.extend(foreign_rules(config, seen));
    findings.extend(local_rules(config, seen));
    findings.extend(other_ways_out(config, seen));
    findings.extend(inabilities(config, seen));
    findings.extend(sizes(config, seen));
    findings.extend(segments(config, seen));
    findings.extend(seen.narrow.iter().map(narrow));
    findings.extend(own_packets(config, seen));
    findings.extend(unanswered(config, seen, &Intent::new(&inputs)));
    findings.extend(inside_routes(&inputs));
    findings.extend(kept_from_entering(config, seen, &inputs));
    findings.extend(answers(config, seen));
    findings.extend(reverse_paths(config, seen));
    findings.extend(advertisements(config, seen));
    findings.extend(programs(config, seen));
    findings.extend(seen.network_manager.iter().map(|tunnel| network_manager(tunnel)));
    findings.extend(seen.networkd.iter().map(|hint| networkd(hint)));
    findings.sort_by_key(|finding| finding.severity);
    findings
}

fn problem(what: impl Into<String>, effect: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { severity: Severity::Problem, what: what.into(), effect: effect.into(), fix: fix.into(), setting: None }
}

fn warning(what: impl Into<String>, effect: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { severity: Severity::Warning, ..problem(what, effect, fix) }
}

impl Finding {
    /// A setting fixes it.
    fn by(self, path: String, value: i64) -> Self {
        let setting = Setting { path, value };
        Self { fix: format!("sysctl -w {setting}"), setting: Some(setting), ..self }
    }
}

/// A closed gate of the fast path.
fn gate(gate: &Gate) -> Finding {
    match gate {
        Gate::Forwarding { family, device } => {
            let path = match family {
                Family::V4 => "ipv4/ip_forward",
                Family::V6 => "ipv6/conf/all/forwarding",
            };
            let effect = format!("{family} packets that enter by {device} for other hosts are dropped");
            problem(gate.to_string(), effect, "").by(path.to_owned(), 1)
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
            "nothing enters by it; tunroute uses it as soon as it appears",
            "if the name is wrong, write the right one; `ip -brief link` lists the devices",
        )
    });
    let uplinks = missing(&interfaces.uplink).map(|DevicePattern(name)| {
        problem(
            format!("there is no uplink {name}"),
            "if the uplink has another name, nothing guards it",
            "write its name; `ip route show default` and `ip -6 route show default` name it",
        )
    });
    ingress.chain(uplinks)
}

/// Rules of others that are asked before tunroute's and may match a policy's packets.
fn foreign_rules<'a>(config: &'a Config, seen: &'a Observation) -> impl Iterator<Item = Finding> + use<'a> {
    let enters = |rule: &ObservedRule| {
        let ingress = |iif: &String| config.interfaces.ingress.iter().any(|pattern| pattern.matches(iif));
        rule.iif.as_ref().is_none_or(|iif| iif == "lo" || ingress(iif))
    };
    let before = move |rule: &&ObservedRule| {
        !rule.ours
            && !rule.looks_up_local
            && !rule.l3mdev
            && rule.oif.is_none()
            && enters(rule)
            && rule.priority <= Band(config.band).last()
            && config.uses(rule.family)
            && concerns(rule, &config.policies)
    };
    let lowest = seen.kernel.rules.iter().filter(before).map(|rule| rule.priority).min();
    let band = lowest.and_then(|lowest| lowest.checked_sub(Band::LENGTH - 2)).filter(|band| *band >= FIRST_BAND);
    let room = if Family::ALL.into_iter().any(|family| wants_tree(config, family)) { tree::ROOM } else { 0 };
    let band = band.map(|band| band.saturating_sub(room).max(FIRST_BAND));
    let ahead = band.map(|band| format!("`band = {band}`, which is ahead of it"));
    seen.kernel.rules.iter().filter(before).map(move |rule| {
        let ObservedRule { family, priority, text, .. } = rule;
        problem(
            match owner(text, *priority) {
                Some(owner) => format!("an {family} rule of {owner} at priority {priority}: {text}"),
                None => format!("an {family} rule of another program at priority {priority}: {text}"),
            },
            "it is asked before tunroute's and may send a policy's packets elsewhere; so the fast path does not decide",
            advice(*family, *priority, text, ahead.as_deref()),
        )
    })
}

/// Rules for the local table that stand behind tunroute's.
fn local_rules<'a>(config: &'a Config, seen: &'a Observation) -> impl Iterator<Item = Finding> + use<'a> {
    let priority = Band(config.band).local();
    let late = move |family: &Family| {
        let rules = seen.kernel.rules.iter().filter(|rule| rule.family == *family && !rule.ours && rule.looks_up_local);
        let first = rules.min_by_key(|rule| rule.priority)?;
        (config.uses(*family) && first.priority > priority).then_some((*family, first.priority))
    };
    let late = Family::ALL.into_iter().filter_map(move |family| late(&family));
    late.map(move |(family, stands)| {
        let ip = match family {
            Family::V4 => "ip",
            Family::V6 => "ip -6",
        };
        warning(
            format!("the {family} rule for the local table stands at priority {stands}, behind tunroute's rules"),
            format!(
                "only a rule of tunroute's own, `from all lookup local` at priority {priority}, keeps packets to this host \
                 out of the policies; without tunroute, rules of others come first"
            ),
            format!(
                "nothing, if VRFs or another manager need it there; otherwise {ip} rule add pref 0 lookup local && {ip} \
                 rule del pref {stands} lookup local"
            ),
        )
    })
}

/// Default routes of the main table by devices that are neither uplinks nor tunnels of the configuration.
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
            format!(
                "the main table has {} by {}, which is neither an uplink nor a tunnel of the configuration",
                route.dst, link.name
            ),
            "nothing keeps a policy's packets from leaving there",
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
                    "the MTU of {} is {} bytes, which with {overhead} bytes of {kind} do not fit {} ({})",
                    link.name, link.mtu, uplink.name, uplink.mtu
                ),
                "large packets are fragmented, or lost on the way, and TCP connections hang",
                format!("ip link set dev {} mtu {fits}", link.name),
            ));
        }
    }
    findings
}

/// Tunnels for which TCP may announce larger segments than fit, with nothing to correct it.
fn segments(config: &Config, seen: &Observation) -> Vec<Finding> {
    let widest = matching(&config.interfaces.ingress, &seen.kernel).map(|link| link.mtu).max();
    let mut findings = Vec::new();
    for (tunnel, link) in config.tunnels.iter().filter_map(|tunnel| Some((tunnel, seen.kernel.link(&tunnel.name)?))) {
        let (name, mtu, room) = (&link.name, link.mtu, Mss::Auto.clamp(link));
        let what = match tunnel.mss {
            Some(Mss::Bytes(bytes)) if bytes > room.v4 => format!(
                "`mss = {bytes}` of {name} is more than fits its MTU of {mtu} bytes: {} (IPv6: {})",
                room.v4, room.v6
            ),
            None if config.datapath == Datapath::Ebpf && widest.is_some_and(|widest| mtu < widest) => format!(
                "the MTU of {name} is {mtu} bytes, less than that of the ingress interfaces, and with `datapath = \
                 \"ebpf\"` no ICMP error tells the sender"
            ),
            _ => continue,
        };
        findings.push(warning(
            what,
            "TCP sends segments that do not fit, and connections hang",
            format!("write `mss = \"auto\"` below [tunnel.{name}]"),
        ));
    }
    findings
}

/// A tunnel that loses large packets silently.
fn narrow(narrow: &Narrow) -> Finding {
    let Narrow { tunnel, mtu, carries, target } = narrow;
    problem(
        format!(
            "{tunnel} carries packets of {carries} bytes to {target} and back, but none of its MTU, {mtu} bytes, and \
             no ICMP error says why"
        ),
        "large packets are lost on the way, and TCP connections hang",
        format!("ip link set dev {tunnel} mtu {carries}"),
    )
}

/// The tunnels' own packets carry an address of an uplink, and the policy has no exempt destination that could be their
/// far end.
fn own_packets(config: &Config, seen: &Observation) -> Vec<Finding> {
    let mut findings = Vec::new();
    let of_uplinks = seen.addresses.iter().filter(|own| is_uplink(config, &own.device));
    for OwnAddress { device, address, .. } in of_uplinks.filter(|own| !is_link_local(own.address)) {
        if let Some((net, policy)) = policy_of(config, *address)
            && policy.exempt.is_empty()
        {
            findings.push(problem(
                format!("the address {address} of the uplink {device} is in {net} of the policy {}", policy.name),
                "the tunnels' own packets carry it: they are sent into the tunnel that they are to carry",
                format!(
                    "write the far ends of the tunnels (`wg show all endpoints`, `ip -details link`) to `exempt` of {}, \
                     or take the address out of `from`",
                    policy.name
                ),
            ));
        }
    }
    findings
}

/// Networks on the link at an uplink that get no answers: a policy sends what this host answers into a tunnel.
fn unanswered(config: &Config, seen: &Observation, intent: &Intent) -> Vec<Finding> {
    let mut findings = Vec::new();
    for OwnAddress { device, address: source, .. } in &seen.addresses {
        let Some(link) = seen.kernel.link(device).filter(|_| is_uplink(config, device)) else { continue };
        let here = |route: &&MainRoute| {
            route.on_link && route.oif == Some(link.index) && route.dst.contains(source) && route.dst.prefix_len() > 0
        };
        for MainRoute { dst: net, .. } in seen.kernel.main.iter().filter(here) {
            // The first addresses of a network are often this host's own, as the anycast address of IPv6's.
            let other = |host: &IpAddr| host != source && !seen.kernel.local.contains(&IpNet::from(*host));
            let Some(destination) = net.hosts().take(FIRST_HOSTS).find(other) else { continue };
            let (looked, expected) = intent.expect(&Question { source: *source, destination, iif: None });
            let policy = looked.last().and_then(|looked| config.policies.get(looked.policy));
            if let (Expected::Tunnel { .. } | Expected::Refused(_), Some(policy)) = (expected, policy) {
                findings.push(problem(
                    format!("{net}, the network of the uplink {device}, gets no answers from {source}"),
                    format!("the policy {} sends them into its tunnel: sessions from there hang", policy.name),
                    format!("write \"{net}\" to `exempt` of {}", policy.name),
                ));
            }
        }
    }
    findings
}

/// Networks that the main table leads inside to, and that policies send into their tunnels.
fn inside_routes(inputs: &Inputs<'_>) -> Vec<Finding> {
    let Inputs { config, kernel, .. } = *inputs;
    let finding = |(index, routes): (usize, Vec<&MainRoute>)| {
        let policy = config.policies.get(index)?;
        let device = |route: &MainRoute| {
            let link = route.devices().find_map(|device| kernel.links.get(device));
            link.map(|link| format!("{} by {}", route.dst, link.name))
        };
        let named: Vec<String> = routes.iter().copied().filter_map(device).take(NAMED_ROUTES).collect();
        let rest = match routes.len() - named.len() {
            0 => String::new(),
            rest => format!(" and {rest} more"),
        };
        let (name, first) = (&policy.name, routes.first()?.dst);
        let one = format!("write \"{first}\" to `exempt` of {name}");
        Some(warning(
            format!("the main table leads inside to {}{rest}, and the policy {name} overrules it", named.join(", ")),
            "packets from the policy's sources to these networks go into its tunnel",
            match routes.len() {
                _ if config.interfaces.uplink.is_empty() => one,
                1 => format!("{one}; or \"routed\", for all such networks"),
                _ => format!("write \"routed\" to `exempt` of {name}; or some of the networks, such as \"{first}\""),
            },
        ))
    };
    overruled(inputs).into_iter().filter_map(finding).collect()
}

/// Sources of policies that the reverse path filter of the ingress devices drops, whichever datapath is configured.
fn kept_from_entering(config: &Config, seen: &Observation, inputs: &Inputs<'_>) -> Vec<Finding> {
    if !seen.filters.values().any(|filter| filter.is_on()) {
        return Vec::new();
    }
    let sources = decisions(inputs, true).sources;
    let dropped = kept_out(config, &seen.kernel, &sources, &seen.filters);
    let effect = "the kernel drops these packets as they enter, before any rule or program decides";
    dropped.iter().map(|kept| problem(kept.to_string(), effect, kept.advice())).collect()
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

/// The policy that an address belongs to, with its prefix: the longest one decides. None if it leaves its sources to the main
/// table.
fn policy_of(config: &Config, address: IpAddr) -> Option<(&IpNet, &Policy)> {
    let prefixes = config.policies.iter().flat_map(|policy| policy.sources().map(move |net| (net, policy)));
    let longest = prefixes.filter(|(net, _)| net.contains(&address)).max_by_key(|(net, _)| net.prefix_len());
    longest.filter(|(_, policy)| !policy.main)
}

/// Addresses of tunnels and uplinks whose answers leave by another device: the kernel accepts packets for any of its
/// addresses from any device, and routes the answers by their destination alone unless a policy has the address.
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
            format!("answers from {address} of {device} leave by {other}"),
            format!("they are lost where the provider of {other} drops sources that it did not assign"),
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

/// Strict reverse path filters of tunnels, which drop every answer without rules. (With rules the kernel looks up the way
/// back by them, from the packet's destination: `__fib_validate_source()` in `net/ipv4/fib_frontend.c`.)
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
                format!(
                    "IPv4 answers that come by {name} are dropped, as without rules their way back is another device"
                ),
                "",
            )
            .by(format!("ipv4/conf/{name}/rp_filter"), 2)
        })
        .collect()
}

/// Uplinks that ignore router advertisements, as a host that forwards does by default.
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
                "a host that forwards accepts no default route from its provider's router by default",
                "",
            )
            .by(format!("ipv6/conf/{name}/accept_ra"), 2)
        })
        .collect()
}

/// Requirements of the eBPF programs.
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
        let effect = "the programs are interpreted, and several times slower";
        findings.push(
            warning("the kernel does not compile eBPF programs", effect, "").by("core/bpf_jit_enable".to_owned(), 1),
        );
    }
    findings
}

fn network_manager(tunnel: &str) -> Finding {
    warning(
        format!("NetworkManager has a connection for the tunnel {tunnel}"),
        "when it activates or deactivates it, it removes the device's routes; tunroute puts its own back",
        format!(
            "nmcli device set {tunnel} managed no; for good: `[keyfile]` and below it \
             `unmanaged-devices=interface-name:{tunnel}` in /etc/NetworkManager/conf.d/tunroute.conf"
        ),
    )
}

fn networkd(hint: &str) -> Finding {
    let (what, fix) = hint.split_once(": ").unwrap_or((hint, "see networkd.conf(5)"));
    problem(what, "tunroute puts them back, and until then packets leave another way", fix)
}
