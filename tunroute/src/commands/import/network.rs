//! systemd-networkd's `.network` files, as the commands that they amount to (systemd.network(5)).

use std::fmt::Write as _;

use super::ini::{Section, sections};

/// What a rule's keys are to `ip rule`.
const RULE_WORDS: [(&str, &str); 10] = [
    ("From", "from"),
    ("To", "to"),
    ("FirewallMark", "fwmark"),
    ("IncomingInterface", "iif"),
    ("OutgoingInterface", "oif"),
    ("IPProtocol", "ipproto"),
    ("SourcePort", "sport"),
    ("DestinationPort", "dport"),
    ("Table", "table"),
    ("Priority", "pref"),
];
/// What a route's keys are to `ip route`.
const ROUTE_WORDS: [(&str, &str); 5] =
    [("Gateway", "via"), ("Table", "table"), ("Metric", "metric"), ("PreferredSource", "src"), ("MTUBytes", "mtu")];

/// The `ip` commands of a file, and what has none.
pub(super) fn commands(text: &str) -> (String, Vec<String>) {
    let text = text.replace("\\\n", " ");
    let sections = sections(&text);
    let names = sections.iter().filter(|section| section.name == "Match").flat_map(|section| section.values("Name"));
    let names: Vec<&str> = names.flat_map(str::split_whitespace).collect();
    let device = match names.as_slice() {
        [name] if !name.contains(['*', '?', '[', '!']) => Some(*name),
        _ => None,
    };
    let mut script = String::new();
    let mut notes = Vec::new();
    for section in &sections {
        let command = match (section.name, device) {
            ("RoutingPolicyRule", _) => rules(section),
            ("Route", Some(device)) => route(section, device),
            ("Route", None) => Err("it is for no single device: `Name=` of `[Match]` must be one name".to_owned()),
            ("Network" | "Address", Some(device)) => Ok(addresses(section, device)),
            ("DHCPv4" | "IPv6AcceptRA", _) if section.value("RouteTable").is_some() => {
                Err("its routes are not known before a server or router has told them".to_owned())
            }
            _ => continue,
        };
        match command {
            Ok(command) => script += &command,
            Err(why) => notes.push(format!("{why}: {}", shown(section))),
        }
    }
    (script, notes)
}

/// A section in one line.
fn shown(section: &Section<'_>) -> String {
    let assignments = section.all().map(|(key, value)| format!(" {key}={value}"));
    format!("[{}]{}", section.name, assignments.collect::<String>())
}

/// A rule; one for each family that it is for.
fn rules(section: &Section<'_>) -> Result<String, String> {
    let is_v6 = ["From", "To"].iter().filter_map(|key| section.value(key)).any(|prefix| prefix.contains(':'));
    let families: &[&str] = match section.value("Family") {
        Some("both") => &["-4", "-6"],
        Some("ipv6") => &["-6"],
        Some("ipv4") => &["-4"],
        Some(family) => return Err(format!("`{family}` is no family")),
        None if is_v6 => &["-6"],
        None => &["-4"],
    };
    let words = words(section, &RULE_WORDS, &["Family"]);
    Ok(families.iter().map(|family| format!("ip {family} rule add{words}\n")).collect())
}

fn route(section: &Section<'_>, device: &str) -> Result<String, String> {
    let gateway = section.value("Gateway");
    if let Some(told @ ("_dhcp4" | "_ipv6ra")) = gateway {
        return Err(format!("the gateway `{told}` is not known before a server or router has told it"));
    }
    let to = section.value("Destination");
    let is_v6 =
        to.or(gateway).or_else(|| section.value("PreferredSource")).is_some_and(|address| address.contains(':'));
    let family = if is_v6 { "-6" } else { "-4" };
    let kind = section.value("Type").unwrap_or_default();
    // A route that leads nowhere is no device's.
    let dev = if matches!(kind, "" | "unicast") { format!(" dev {device}") } else { String::new() };
    let words = words(section, &ROUTE_WORDS, &["Destination", "Type"]);
    Ok(format!("ip {family} route add {kind} {}{dev}{words}\n", to.unwrap_or("default")))
}

/// The words for `ip`. What it has none for stays as it is, so that it is noticed.
fn words(section: &Section<'_>, known: &[(&str, &str)], done: &[&str]) -> String {
    let mut words = String::new();
    for (key, value) in section.all().filter(|(key, value)| !done.contains(key) && !value.is_empty()) {
        let _infallible = match known.iter().find(|(name, _)| *name == key) {
            Some((_, word)) => write!(words, " {word} {value}"),
            None if key == "GatewayOnLink" => write!(words, " onlink"),
            None => write!(words, " {key}={value}"),
        };
    }
    words
}

/// The main table's routes that come with addresses and a gateway.
fn addresses(section: &Section<'_>, device: &str) -> String {
    let nets = section.values("Address").filter_map(|address| address.parse::<ipnet::IpNet>().ok());
    let nets = nets.filter(|net| net.prefix_len() < net.max_prefix_len());
    let mut script: String = nets.map(|net| format!("ip route add {} dev {device}\n", net.trunc())).collect();
    for gateway in section.values("Gateway").filter_map(|gateway| gateway.parse::<std::net::IpAddr>().ok()) {
        let _infallible = writeln!(script, "ip route add default via {gateway} dev {device}");
    }
    script
}
