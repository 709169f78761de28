//! From TOML to the validated types, and where everything stood.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Duration,
};

use toml::de::{DeTable, DeValue};

use super::{
    Config, Datapath, Interfaces, Mss, OnDown, Policy, Probe, ProbeTarget, StartLimit, Tunnel, Unmatched, Xdp,
    keys::{INTERFACES, POLICY, PROBE, START_LIMIT, TOP, TUNNEL},
    list, names, prefix,
    report::{Finding, Findings, Span, quote},
    section::{Field, Section},
    values,
};
use crate::policy::net::Family;

/// The priority band used if the file names none.
const DEFAULT_BAND: u32 = 20000;
/// A list that can be read at a glance, and whose walk takes an IPv4 packet 1.5 times as long as a tree; twice with 64.
const DEFAULT_TREE_ABOVE: u32 = 32;
/// More often, a probe would be a load of its own.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

/// Where the parts of a configuration stand, index by index.
#[derive(Debug, Default)]
pub(super) struct Spans {
    pub(super) datapath: Option<Span>,
    pub(super) band: Option<Span>,
    pub(super) ingress: Vec<Span>,
    pub(super) uplink: Vec<Span>,
    pub(super) tunnels: Vec<TunnelSpans>,
    pub(super) policies: Vec<PolicySpans>,
}

#[derive(Debug)]
pub(super) struct TunnelSpans {
    pub(super) name: Span,
    pub(super) table: Option<Span>,
}

#[derive(Debug)]
pub(super) struct PolicySpans {
    pub(super) header: Span,
    pub(super) name: Option<Span>,
    pub(super) table: Option<Span>,
    pub(super) from: Vec<Span>,
    pub(super) follow: Vec<Span>,
    pub(super) via: Vec<Span>,
    pub(super) on_down: Option<Span>,
    pub(super) exempt: Vec<Span>,
    pub(super) routed: Option<Span>,
}

/// Reads a document. What is wrong in itself is noted and left out; how the parts fit together is not looked at.
pub(super) fn document(root: &DeTable<'_>, directory: &Path, findings: &mut Findings) -> (Config, Spans) {
    let top = Section::new(root, TOP, "the file's top level", 0..0, findings);
    let mut spans = Spans::default();
    let datapath = top.get("datapath").and_then(|field| {
        spans.datapath = Some(field.span());
        let choices =
            [Datapath::Both, Datapath::Kernel, Datapath::Ebpf, Datapath::Shadow].map(|choice| (choice.name(), choice));
        field.choice(&choices, findings)
    });
    let band = top.get("band").and_then(|field| {
        spans.band = Some(field.span());
        field.integer(findings)
    });
    let tree_above = top.get("tree-above").and_then(|field| field.integer(findings));
    let bypass_netfilter = top.get("bypass-netfilter").and_then(|field| field.boolean(findings));
    let unmatched = top
        .get("unmatched")
        .and_then(|field| field.choice(&[("kernel", Unmatched::Kernel), ("fast", Unmatched::Fast)], findings));
    let xdp = top
        .get("xdp")
        .and_then(|field| field.choice(&[("auto", Xdp::Auto), ("on", Xdp::On), ("off", Xdp::Off)], findings));
    let metrics = top.get("metrics").and_then(|field| {
        let text = field.string(findings)?;
        findings.accept(values::listen(text), &field.span())
    });
    let mut interfaces = Interfaces::default();
    if let Some(field) = top.get("interfaces")
        && let Some((table, span)) = only_table(&field, findings)
    {
        let section = Section::new(table, INTERFACES, "[interfaces]", span, findings);
        for (key, patterns, spans) in [
            ("ingress", &mut interfaces.ingress, &mut spans.ingress),
            ("uplink", &mut interfaces.uplink, &mut spans.uplink),
        ] {
            let names = section.get(key).and_then(|field| field.one_or_more(findings)).unwrap_or_default();
            (*patterns, *spans) = accepted(names, values::pattern, findings);
        }
    }
    let mut tunnels = Vec::new();
    if let Some(field) = top.get("tunnel") {
        for (name, span, table) in named_tables(&field, findings) {
            findings.accept(names::tunnel_name(name), &span);
            let (tunnel, tunnel_spans) = tunnel(name, span, table, findings);
            tunnels.push(tunnel);
            spans.tunnels.push(tunnel_spans);
        }
    }
    let mut policies = Vec::new();
    if let Some(field) = top.get("policy") {
        if field.value().is_array() {
            for (table, span) in field.tables(findings) {
                let (policy, policy_spans) = policy(table, span, directory, findings);
                policies.push(policy);
                spans.policies.push(policy_spans);
            }
        } else {
            field.mistyped_self("a list of tables", findings);
        }
    }
    let config = Config {
        datapath: datapath.unwrap_or_default(),
        band: band.unwrap_or(DEFAULT_BAND),
        tree_above: tree_above.unwrap_or(DEFAULT_TREE_ABOVE),
        bypass_netfilter: bypass_netfilter.unwrap_or_default(),
        unmatched: unmatched.unwrap_or_default(),
        xdp: xdp.unwrap_or_default(),
        metrics,
        interfaces,
        tunnels,
        policies,
    };
    (config, spans)
}

/// The values that are as they should be, and where they stand.
fn accepted<T>(
    texts: Vec<(&str, Span)>,
    parse: impl Fn(&str) -> Result<T, super::report::Refusal>,
    findings: &mut Findings,
) -> (Vec<T>, Vec<Span>) {
    texts.into_iter().filter_map(|(text, span)| findings.accept(parse(text), &span).map(|value| (value, span))).unzip()
}

/// A field that is a table, not a list of tables.
fn only_table<'a, 't>(field: &Field<'a, 't>, findings: &mut Findings) -> Option<(&'a DeTable<'t>, Span)> {
    match field.value() {
        DeValue::Table(table) => Some((table, field.span())),
        _ => {
            field.mistyped_self("a table", findings);
            None
        }
    }
}

/// The tables `[tunnel.NAME]`, in the order of the file.
fn named_tables<'a, 't>(
    field: &Field<'a, 't>,
    findings: &mut Findings,
) -> Vec<(&'a str, Span, (&'a DeTable<'t>, Span))> {
    let Some((table, _)) = only_table(field, findings) else { return Vec::new() };
    let mut named = Vec::with_capacity(table.len());
    for (name, item) in table {
        match item.get_ref() {
            DeValue::Table(table) => named.push((name.get_ref().as_ref(), name.span(), (table, item.span()))),
            _ if TUNNEL.iter().any(|key| key.name == name.get_ref()) => {
                let message = format!("{} without the tunnel that it belongs to", quote(name.get_ref()));
                findings.error(Finding::new(&name.span(), message, "write it below a header such as [tunnel.sixxs0]"));
            }
            _ => field.mistyped(item, "a table for each device", findings),
        }
    }
    named.sort_by_key(|(_, span, _)| span.start);
    named
}

fn tunnel(
    name: &str,
    name_span: Span,
    (table, span): (&DeTable<'_>, Span),
    findings: &mut Findings,
) -> (Tunnel, TunnelSpans) {
    let section = Section::new(table, TUNNEL, "[tunnel.NAME]", span, findings);
    let (table, table_span) = table_number(&section, findings);
    let (via_v4, via_v6) = section.get("via").map(|field| gateways(&field, findings)).unwrap_or_default();
    let up = section.get("up").and_then(|field| command(&field, findings));
    let down = section.get("down").and_then(|field| command(&field, findings));
    let start_limit = section.get("start-limit").and_then(|field| start_limit(&field, findings)).unwrap_or_default();
    let mss = section.get("mss").and_then(|field| segment_size(&field, findings));
    let mut probes = Vec::new();
    if let Some(field) = section.get("probe") {
        for (table, span) in field.tables(findings) {
            let section = Section::new(table, PROBE, "probe", span, findings);
            probes.extend(probe(&section, findings));
        }
    }
    let tunnel = Tunnel { name: name.to_owned(), table, via_v4, via_v6, up, down, start_limit, mss, probes };
    (tunnel, TunnelSpans { name: name_span, table: table_span })
}

fn table_number(section: &Section<'_, '_>, findings: &mut Findings) -> (Option<u32>, Option<Span>) {
    let Some(field) = section.get("table") else { return (None, None) };
    let number = field.integer(findings).and_then(|number| findings.accept(values::table(number), &field.span()));
    (number, Some(field.span()))
}

/// At most one gateway for each family.
fn gateways(field: &Field<'_, '_>, findings: &mut Findings) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let (addrs, spans) = accepted(field.at_least_one(findings).unwrap_or_default(), values::gateway, findings);
    let (mut v4, mut v6) = (None, None);
    for (addr, span) in addrs.iter().zip(&spans) {
        let earlier = match addr {
            std::net::IpAddr::V4(addr) => v4.replace((*addr, span)).map(|(_, span)| span),
            std::net::IpAddr::V6(addr) => v6.replace((*addr, span)).map(|(_, span)| span),
        };
        if let Some(earlier) = earlier {
            let message = format!("a second gateway for {}", Family::of_addr(addr));
            let help = "keep one: a tunnel has at most one gateway for each family";
            findings.error(Finding::new(span, message, help).and(earlier, "the first"));
        }
    }
    (v4.map(|(addr, _)| addr), v6.map(|(addr, _)| addr))
}

fn command(field: &Field<'_, '_>, findings: &mut Findings) -> Option<Vec<String>> {
    if let Some(line) = field.value().as_str() {
        let words: Vec<String> = line.split_whitespace().map(|word| format!("{word:?}")).collect();
        let help = format!("there is no shell: write [{}]", words.join(", "));
        findings.error(Finding::new(&field.span(), "a command must be a list of strings", help));
        return None;
    }
    let words: Vec<&str> = field.list(findings)?.into_iter().map(|(word, _)| word).collect();
    findings.accept(values::command(&words), &field.span())?;
    Some(words.into_iter().map(str::to_owned).collect())
}

/// A number of bytes, or `auto`.
fn segment_size(field: &Field<'_, '_>, findings: &mut Findings) -> Option<Mss> {
    match field.value().as_str() {
        Some("auto") => return Some(Mss::Auto),
        Some(_) => {
            field.mistyped_self("\"auto\" or a number of bytes", findings);
            return None;
        }
        None => {}
    }
    let bytes: u32 = field.integer(findings)?;
    match u16::try_from(bytes) {
        Ok(bytes) if (Mss::LEAST..=Mss::MOST).contains(&bytes) => Some(Mss::Bytes(bytes)),
        _ => {
            let message = format!("a segment size of {bytes} bytes is out of range");
            let help = format!("write \"auto\", or a number from {} to {}", Mss::LEAST, Mss::MOST);
            findings.error(Finding::new(&field.span(), message, help));
            None
        }
    }
}

fn start_limit(field: &Field<'_, '_>, findings: &mut Findings) -> Option<StartLimit> {
    let (table, span) = only_table(field, findings)?;
    let section = Section::new(table, START_LIMIT, "start-limit", span, findings);
    let default = StartLimit::default();
    let burst = positive(&section, "burst", default.burst, findings);
    let interval = section.get("interval").and_then(|field| {
        let interval = field.duration(findings)?;
        if interval.is_zero() {
            let help = "write the time in which that many starts are allowed, such as \"60s\"";
            findings.error(Finding::new(&field.span(), "`interval` is zero", help));
        }
        Some(interval)
    });
    Some(StartLimit { burst, interval: interval.unwrap_or(default.interval) })
}

/// A count that is at least 1.
fn positive(section: &Section<'_, '_>, key: &str, default: u32, findings: &mut Findings) -> u32 {
    let Some(field) = section.get(key) else { return default };
    let Some(count) = field.integer(findings) else { return default };
    if count == 0 {
        findings.error(Finding::new(&field.span(), format!("`{key}` is 0"), "write 1 or more"));
    }
    count
}

fn probe(section: &Section<'_, '_>, findings: &mut Findings) -> Option<Probe> {
    let target = section.require("target", findings).and_then(|field| {
        let text = field.string(findings)?;
        findings.accept(values::probe_target(text), &field.span())
    });
    let source = section.get("source").and_then(|field| {
        let text = field.string(findings)?;
        let addr = prefix::address(text).and_then(|addr| values::host(addr, "source"));
        Some((findings.accept(addr, &field.span())?, field.span()))
    });
    let family = |target: &ProbeTarget| match target {
        ProbeTarget::Echo(addr) => Family::of_addr(addr),
        ProbeTarget::Tcp(addr) => Family::of_addr(&addr.ip()),
    };
    if let (Some(target), Some((source, span))) = (&target, &source)
        && family(target) != Family::of_addr(source)
    {
        let message = format!("the source is {}, the target {}", Family::of_addr(source), family(target));
        findings.error(Finding::new(span, message, "write a source of the target's family, or leave `source` out"));
    }
    let mut duration =
        |key: &str| section.get(key).and_then(|field| field.duration(findings).map(|value| (value, field.span())));
    let (interval, timeout, hold_down) = (duration("interval"), duration("timeout"), duration("hold-down"));
    let every = interval.as_ref().map_or(Duration::from_secs(5), |(interval, _)| *interval);
    if let Some((_, span)) = interval.filter(|(interval, _)| *interval < SHORTEST_INTERVAL) {
        findings.error(Finding::new(&span, "`interval` is too short", "write at least \"10ms\""));
    }
    if let Some((timeout, span)) = &timeout {
        if timeout.is_zero() {
            let help = "write how long an answer may take, such as \"1s\"";
            findings.error(Finding::new(span, "`timeout` is zero", help));
        } else if *timeout > every {
            let (timeout, every) = (humantime::format_duration(*timeout), humantime::format_duration(every));
            let message = format!("`timeout` ({timeout}) is longer than `interval` ({every})");
            findings.error(Finding::new(span, message, format!("write at most \"{every}\", or a longer interval")));
        }
    }
    Some(Probe {
        fail: positive(section, "fail", 3, findings),
        rise: positive(section, "rise", 2, findings),
        interval: every,
        timeout: timeout.map_or(Duration::from_secs(1).min(every), |(timeout, _)| timeout),
        hold_down: hold_down.map_or(Duration::ZERO, |(hold_down, _)| hold_down),
        source: source.map(|(source, _)| source),
        target: target?,
    })
}

/// The keys that a policy with `via = "main"` has not, and why.
const BESIDE_MAIN: [(&str, &str); 3] = [
    ("on-down", "no tunnel carries these sources, so none can be down"),
    ("exempt", "the main table decides for every destination"),
    ("table", "the policy has no routes of its own"),
];

fn policy(table: &DeTable<'_>, header: Span, directory: &Path, findings: &mut Findings) -> (Policy, PolicySpans) {
    let section = Section::new(table, POLICY, "[[policy]]", header.clone(), findings);
    let name = section.require("name", findings).and_then(|field| {
        let name = field.string(findings)?;
        findings.accept(names::policy_name(name), &field.span()).map(|name| (name, field.span()))
    });
    let (name, name_span) = name.unzip();
    let (table, table_span) = table_number(&section, findings);
    let allow_default = section.get("allow-default").and_then(|field| field.boolean(findings)).unwrap_or_default();
    let files = section.get("from-file");
    let from = if files.is_some() { section.get("from") } else { section.require("from", findings) };
    let from = from.and_then(|field| field.at_least_one(findings)).unwrap_or_default();
    let (follow, from): (Vec<_>, Vec<_>) = from.into_iter().partition(|(text, _)| text.starts_with('@'));
    let (follow, follow_spans) = accepted(follow, values::followed, findings);
    let (mut from, mut from_spans) = accepted(from, |text| prefix::source(text, allow_default), findings);
    for (file, span) in files.and_then(|field| field.at_least_one(findings)).unwrap_or_default() {
        match list::sources(&directory.join(file), allow_default) {
            Ok(prefixes) => {
                from_spans.extend(std::iter::repeat_n(span, prefixes.len()));
                from.extend(prefixes);
            }
            Err(refusals) => refusals.into_iter().for_each(|refusal| findings.error(refusal.at(&span))),
        }
    }
    let via = section.require("via", findings).and_then(|field| field.at_least_one(findings)).unwrap_or_default();
    let (main, via): (Vec<_>, Vec<_>) = via.into_iter().partition(|(name, _)| *name == "main");
    let main = main.into_iter().next();
    if let (Some((_, span)), Some((_, tunnel))) = (&main, via.first()) {
        let help = "write `via = \"main\"` alone, or tunnels only";
        findings.error(Finding::new(span, "\"main\" beside tunnels in one `via`", help).and(tunnel, "a tunnel"));
    }
    let main = main.is_some();
    for (key, why) in BESIDE_MAIN.iter().filter(|_| main) {
        if let Some(field) = section.get(key) {
            let message = format!("`{key}` in a policy with `via = \"main\"`");
            findings.error(Finding::new(&field.span(), message, format!("remove it: {why}")));
        }
    }
    let (via, via_spans) = via.into_iter().map(|(name, span)| (name.to_owned(), span)).unzip();
    let mut on_down_span = None;
    let on_down = section.get("on-down").and_then(|field| {
        on_down_span = Some(field.span());
        let choices = [
            ("unreachable", OnDown::Unreachable),
            ("blackhole", OnDown::Blackhole),
            ("prohibit", OnDown::Prohibit),
            ("next", OnDown::Next),
        ];
        field.choice(&choices, findings)
    });
    let exempt = section.get("exempt").map(|field| field.one_or_more(findings).unwrap_or_default());
    let exempt_connected =
        exempt.as_ref().map_or(!main, |entries| entries.iter().any(|(text, _)| *text == "connected"));
    let entries = exempt.unwrap_or_default().into_iter().filter(|(text, _)| *text != "connected");
    let (routed, prefixes): (Vec<_>, Vec<_>) = entries.partition(|(text, _)| *text == "routed");
    let routed = routed.into_iter().next().map(|(_, span)| span);
    let (exempt, exempt_spans) = accepted(prefixes, prefix::exempt, findings);
    let policy = Policy {
        name: name.unwrap_or_default(),
        table,
        from,
        follow,
        followed: Vec::new(),
        via,
        main,
        on_down: on_down.unwrap_or_default(),
        exempt,
        exempt_connected,
        exempt_routed: routed.is_some(),
        allow_default,
    };
    let spans = PolicySpans {
        header,
        name: name_span,
        table: table_span,
        from: from_spans,
        follow: follow_spans,
        via: via_spans,
        on_down: on_down_span,
        exempt: exempt_spans,
        routed,
    };
    (policy, spans)
}
