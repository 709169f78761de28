//! How the parts of a configuration fit together.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    fmt::Display,
};

use ipnet::IpNet;

use super::{
    Config, Datapath, DevicePattern, Follow, Policy,
    parse::Spans,
    report::{Finding, Findings, Span, quote},
    section::nearest,
};
use crate::policy::net::{Band, Family};

/// Maximum number of policies: the slots of the fast path's maps.
pub(crate) const MOST_POLICIES: usize = 1024;
/// The fast path falls through at most this many policies, one around the other.
pub(crate) const MOST_LEVELS: u32 = 8;
/// With more prefixes of a family than this, rules are hardly bearable: as many of each are made in 16 s and removed in 43 s
/// (`ARCHITECTURE.md`).
const RULES_WITHIN_A_MINUTE: usize = 100_000;
/// The priorities of the kernel's own rules: `local`, VRF (`FIB_RULE_PREF_L3MDEV` is 1000 in
/// `drivers/net/vrf.c`), `main` and `default`.
const KERNEL_RULES: [(u32, &str); 4] = [(0, "local"), (1000, "l3mdev"), (MAIN_RULE, "main"), (32767, "default")];
const MAIN_RULE: u32 = 32766;

/// Looks at everything that takes more than one value to see.
pub(super) fn check(config: &Config, spans: &Spans, findings: &mut Findings) {
    band(config, spans, findings);
    roles(config, spans, findings);
    policy_names(config, spans, findings);
    references(config, spans, findings);
    tables(config, spans, findings);
    prefixes(config, spans, findings);
    many_rules(config, spans, findings);
}

fn band(config: &Config, spans: &Spans, findings: &mut Findings) {
    let Some(span) = &spans.band else { return };
    let Some((first, last)) = Band(config.band).ends() else {
        let first = Band(config.band).local();
        let message = format!("the priorities from {first} on end beyond the last one, {}", u32::MAX);
        return findings.error(Finding::new(span, message, "leave `band` out, or write a band such as 20000"));
    };
    if let Some((priority, rule)) = KERNEL_RULES.iter().find(|(priority, _)| (first..=last).contains(priority)) {
        let message = format!("the priorities {first} to {last} include {priority}, the kernel's rule `{rule}`");
        let help = "write a band between the kernel's rules: 1003 to 32637, such as 20000";
        findings.error(Finding::new(span, message, help));
    } else if first > MAIN_RULE {
        let message = format!("priority {first} is asked after the main table, so a default route there always wins");
        findings.warning(Finding::new(span, message, "write a band from 1003 to 32637, such as 20000"));
    }
}

/// Rules are made one by one, and each takes longer the more there are.
fn many_rules(config: &Config, spans: &Spans, findings: &mut Findings) {
    if config.datapath == Datapath::Ebpf {
        return;
    }
    for family in Family::ALL {
        let of_family = |policy: &Policy| policy.from.iter().filter(|prefix| Family::of(prefix) == family).count();
        let counts = || config.policies.iter().map(of_family);
        let count: usize = counts().sum();
        let most = counts().zip(&spans.policies).max_by_key(|(count, _)| *count);
        if let Some((_, at)) = most.filter(|_| count > RULES_WITHIN_A_MINUTE) {
            let message =
                format!("{count} {family} prefixes as rules take minutes to be made, and longer to be removed");
            let help = "write `datapath = \"ebpf\"`, which has no rules";
            findings.warning(Finding::new(&at.header, message, help));
        }
    }
}

/// A tunnel is neither where traffic enters nor where it must not leave.
fn roles(config: &Config, spans: &Spans, findings: &mut Findings) {
    let tunnels: BTreeMap<&str, &Span> =
        config.tunnels.iter().zip(&spans.tunnels).map(|(tunnel, at)| (tunnel.name.as_str(), &at.name)).collect();
    let interfaces = &config.interfaces;
    let ingress = interfaces.ingress.iter().zip(&spans.ingress).map(|found| ("ingress", found));
    let uplink = interfaces.uplink.iter().zip(&spans.uplink).map(|found| ("uplink", found));
    for (role, (pattern, span)) in ingress.chain(uplink) {
        let DevicePattern(text) = pattern;
        let beginning = text.strip_suffix('*').unwrap_or(text);
        let matched = tunnels.range(beginning..).next().filter(|(name, _)| pattern.matches(name));
        if let Some((name, tunnel)) = matched {
            let message = format!("the tunnel {} is also an {role} interface, by {}", quote(name), quote(text));
            let help = format!("write `{role}` so that it does not match the tunnel");
            findings.error(Finding::new(span, message, help).and(tunnel, "the tunnel"));
        }
    }
    if let Some(span) = tunnels.get("main") {
        let help = "rename the device: `via = \"main\"` stands for the main table";
        findings.error(Finding::new(span, "a tunnel cannot have the name `main`", help));
    }
    if let Some(span) = tunnels.get("lo") {
        let help = "write the name of the tunnel's device";
        findings.error(Finding::new(span, "`lo` is the loopback device and leads nowhere", help));
    }
}

fn policy_names(config: &Config, spans: &Spans, findings: &mut Findings) {
    if let Some(at) = spans.policies.get(MOST_POLICIES) {
        let message = format!("{} policies are too many", config.policies.len());
        let help = format!("use at most {MOST_POLICIES}: sources with the same `via` may share a policy");
        findings.error(Finding::new(&at.header, message, help));
    }
    let mut names: HashMap<&str, &Span> = HashMap::new();
    for (policy, at) in config.policies.iter().zip(&spans.policies) {
        let Some(span) = &at.name else { continue };
        match names.entry(&policy.name) {
            Entry::Vacant(entry) => {
                entry.insert(span);
            }
            Entry::Occupied(entry) => {
                let message = format!("a second policy with the name {}", quote(&policy.name));
                findings.error(Finding::new(span, message, "give it another name").and(entry.get(), "the first"));
            }
        }
    }
}

/// Every tunnel named in a policy is declared, and named once.
fn references(config: &Config, spans: &Spans, findings: &mut Findings) {
    let declared: BTreeSet<&str> = config.tunnels.iter().map(|tunnel| tunnel.name.as_str()).collect();
    let mut used: BTreeSet<&str> = BTreeSet::new();
    for (policy, at) in config.policies.iter().zip(&spans.policies) {
        let mut seen: HashMap<&str, &Span> = HashMap::new();
        for (name, span) in policy.via.iter().zip(&at.via) {
            if let Some(first) = seen.insert(name, span) {
                let message = format!("the tunnel {} twice in one `via`", quote(name));
                findings.error(Finding::new(span, message, "remove one of the two").and(first, "the first"));
            }
            if declared.contains(name.as_str()) {
                used.insert(name);
                continue;
            }
            let help = match nearest(name, declared.iter().copied()) {
                Some(nearest) => format!("did you mean \"{nearest}\"?"),
                None => format!("declare it, with the header [tunnel.{}]", key(name)),
            };
            findings.error(Finding::new(span, format!("there is no tunnel {}", quote(name)), help));
        }
    }
    for (tunnel, at) in config.tunnels.iter().zip(&spans.tunnels) {
        if !used.contains(tunnel.name.as_str()) {
            let message = format!("no policy uses the tunnel {}", quote(&tunnel.name));
            findings.warning(Finding::new(&at.name, message, "name it in a policy's `via`, or remove it"));
        }
    }
}

/// A name as a TOML key.
fn key(name: &str) -> String {
    let bare = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    if name.bytes().all(bare) { name.to_owned() } else { format!("{name:?}") }
}

/// No table belongs to two policies, be it by way of a tunnel.
fn tables(config: &Config, spans: &Spans, findings: &mut Findings) {
    const HELP: &str = "write another number, or leave `table` out";
    let mut of_policies: HashMap<u32, (usize, &Span)> = HashMap::new();
    for (index, (policy, at)) in config.policies.iter().zip(&spans.policies).enumerate() {
        let (Some(table), Some(span)) = (policy.table, &at.table) else { continue };
        match of_policies.entry(table) {
            Entry::Vacant(entry) => {
                entry.insert((index, span));
            }
            Entry::Occupied(entry) => {
                let message = format!("a second policy with table {table}");
                findings.error(Finding::new(span, message, HELP).and(entry.get().1, "the first"));
            }
        }
    }
    let mut preferring: HashMap<&str, usize> = HashMap::new();
    for (index, policy) in config.policies.iter().enumerate() {
        if let Some(first) = policy.via.first() {
            preferring.entry(first).or_insert(index);
        }
    }
    let mut of_tunnels: HashMap<u32, &Span> = HashMap::new();
    for (tunnel, at) in config.tunnels.iter().zip(&spans.tunnels) {
        let (Some(table), Some(span)) = (tunnel.table, &at.table) else { continue };
        if let Some(first) = of_tunnels.insert(table, span) {
            let message = format!("a second tunnel with table {table}");
            findings.error(Finding::new(span, message, HELP).and(first, "the first"));
        }
        if let Some((policy, other)) = of_policies.get(&table)
            && preferring.get(tunnel.name.as_str()) != Some(policy)
        {
            let message = format!("table {table} of the tunnel {} is another policy's", quote(&tunnel.name));
            findings.error(Finding::new(span, message, HELP).and(other, "the policy's table"));
        }
    }
}

/// No source twice, no exemption twice in a policy, and no more policies around one another than can be followed.
fn prefixes(config: &Config, spans: &Spans, findings: &mut Findings) {
    let policies = || config.policies.iter().zip(&spans.policies);
    for (policy, at) in policies() {
        if let Some(span) = at.routed.as_ref().filter(|_| config.interfaces.uplink.is_empty()) {
            let help = "name the uplinks in `[interfaces]`: without them, every route seems to lead inside";
            findings.error(Finding::new(span, "\"routed\" without uplinks", help));
        }
        let mut exempt: Vec<(IpNet, &Span)> = policy.exempt.iter().copied().zip(&at.exempt).collect();
        exempt.sort_by_key(|(net, span)| (*net, span.start));
        for pair in exempt.windows(2) {
            if let [(first, earlier), (second, later)] = pair
                && first == second
            {
                let message = format!("{first} is exempt twice");
                findings.error(Finding::new(later, message, "remove one of the two").and(earlier, "the first"));
            }
        }
    }
    let mut followed: HashMap<&Follow, (usize, &Span)> = HashMap::new();
    for (index, (policy, at)) in policies().enumerate() {
        for (follow, span) in policy.follow.iter().zip(&at.follow) {
            match followed.entry(follow) {
                Entry::Vacant(entry) => {
                    entry.insert((index, span));
                }
                Entry::Occupied(entry) => {
                    let (first, earlier) = *entry.get();
                    findings.error(twice(&format!("@{follow}"), (index, span), (first, earlier), &config.policies));
                }
            }
        }
    }
    let mut sources: Vec<Source<'_>> = policies()
        .enumerate()
        .flat_map(|(index, (policy, at))| {
            policy.from.iter().zip(&at.from).map(move |(net, span)| Source { net: *net, policy: index, span })
        })
        .collect();
    // Shorter prefixes come before those that they contain. Stable, as files are mostly sorted already.
    sources.sort_by(|a, b| a.net.cmp(&b.net).then(a.span.start.cmp(&b.span.start)));
    let mut around: Vec<(Source<'_>, u32)> = Vec::new();
    for source in sources {
        while around.pop_if(|(outer, _)| !outer.net.contains(&source.net)).is_some() {}
        let level = match around.last() {
            Some((outer, _)) if outer.net == source.net => {
                let (second, first) = ((source.policy, source.span), (outer.policy, outer.span));
                findings.error(twice(&source.net, second, first, &config.policies));
                continue;
            }
            // A policy that does not apply does not apply by a shorter prefix either.
            Some((outer, level)) if outer.policy == source.policy => *level,
            Some((_, level)) => level + 1,
            None => 1,
        };
        if level > MOST_LEVELS {
            let message = format!("{} is inside {MOST_LEVELS} prefixes of other policies", source.net);
            let help = format!(
                "nest at most {MOST_LEVELS} {} prefixes of different policies in one another",
                Family::of(&source.net)
            );
            findings.error(Finding::new(source.span, message, help));
            continue;
        }
        around.push((source, level));
    }
}

/// A source prefix of a policy.
struct Source<'a> {
    net: IpNet,
    policy: usize,
    span: &'a Span,
}

/// A source that stands in two places, each given as the policy's index and where it stands there.
fn twice(source: &dyn Display, second: (usize, &Span), first: (usize, &Span), policies: &[Policy]) -> Finding {
    let (message, help) = match policies.get(first.0) {
        Some(other) if first.0 != second.0 => {
            let message = format!("the source {source} is already in the policy {}", quote(&other.name));
            (message, "keep it in the one whose tunnels it is to use")
        }
        _ => (format!("the source {source} twice in one policy"), "remove one of the two"),
    };
    Finding::new(second.1, message, help).and(first.1, "the first")
}
