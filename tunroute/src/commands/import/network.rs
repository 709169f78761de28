//! systemd-networkd's `.network` files, as the commands that they amount to (systemd.network(5)).

use std::fmt::Write as _;

use super::{
    files::Reader,
    ini::{Section, sections},
};

/// The words of `ip rule` for the keys of `[RoutingPolicyRule]`.
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
/// The words of `ip route` for the keys of `[Route]`.
const ROUTE_WORDS: [(&str, &str); 5] =
    [("Gateway", "via"), ("Table", "table"), ("Metric", "metric"), ("PreferredSource", "src"), ("MTUBytes", "mtu")];

/// Does what networkd would do.
pub(super) fn read(text: &str, reader: &mut Reader<'_>) {
    let sections = sections(text);
    let names = sections.iter().filter(|section| section.name == "Match").flat_map(|section| section.values("Name"));
    let names: Vec<&str> = names.flat_map(str::split_whitespace).collect();
    let device = match names.as_slice() {
        [name] if !name.contains(['*', '?', '[', '!']) => Some(*name),
        _ => None,
    };
    for section in &sections {
        let commands = match (section.name.as_str(), device) {
            ("RoutingPolicyRule", _) => rules(section),
            ("Route", Some(device)) => route(section, device).map(|command| vec![command]),
            ("Route", None) => Err("it is for no single device: `Name=` of `[Match]` must be one name".to_owned()),
            ("Network" | "Address", Some(device)) => {
                addresses(section, device, reader);
                continue;
            }
            ("DHCPv4" | "IPv6AcceptRA", _) if section.value("RouteTable").is_some() => {
                Err("its routes are known only when a server or router has announced them".to_owned())
            }
            _ => continue,
        };
        match commands {
            Ok(commands) => commands.iter().for_each(|command| reader.ip(command, section.line)),
            Err(why) => reader.note(&why, section.line, &shown(section)),
        }
    }
}

/// A section in one line.
fn shown(section: &Section) -> String {
    let assignments = section.all().map(|found| format!(" {}={}", found.key, found.value));
    format!("[{}]{}", section.name, assignments.collect::<String>())
}

/// A rule; one for each family that it is for.
fn rules(section: &Section) -> Result<Vec<String>, String> {
    let is_v6 = ["From", "To"].iter().filter_map(|key| section.value(key)).any(|prefix| prefix.contains(':'));
    let families: &[&str] = match section.value("Family") {
        Some("both") => &["-4", "-6"],
        Some("ipv6") => &["-6"],
        Some("ipv4") => &["-4"],
        Some(family) => return Err(format!("`{family}` is not a family")),
        None if is_v6 => &["-6"],
        None => &["-4"],
    };
    let words = words(section, &RULE_WORDS, &["Family"]);
    Ok(families.iter().map(|family| format!("{family} rule add{words}")).collect())
}

fn route(section: &Section, device: &str) -> Result<String, String> {
    let gateway = section.value("Gateway");
    if let Some(announced @ ("_dhcp4" | "_ipv6ra")) = gateway {
        return Err(format!("the gateway `{announced}` is known only when a server or router has announced it"));
    }
    let to = section.value("Destination");
    let is_v6 =
        to.or(gateway).or_else(|| section.value("PreferredSource")).is_some_and(|address| address.contains(':'));
    let family = if is_v6 { "-6" } else { "-4" };
    let kind = section.value("Type").unwrap_or_default();
    // A route that leads nowhere is no device's.
    let dev = if matches!(kind, "" | "unicast") { format!(" dev {device}") } else { String::new() };
    let words = words(section, &ROUTE_WORDS, &["Destination", "Type"]);
    Ok(format!("{family} route append {kind} {}{dev}{words}", to.unwrap_or("default")))
}

/// The words for `ip`. A key without one stays as it is, so that the command is reported.
fn words(section: &Section, known: &[(&str, &str)], done: &[&str]) -> String {
    let mut words = String::new();
    for found in section.all().filter(|found| !done.contains(&found.key.as_str()) && !found.value.is_empty()) {
        let value = &found.value;
        let _infallible = match known.iter().find(|(name, _)| *name == found.key) {
            Some((_, word)) => write!(words, " {word} {value}"),
            None if found.key == "GatewayOnLink" => write!(words, " onlink"),
            None => write!(words, " {}={value}", found.key),
        };
    }
    words
}

/// The main table's routes that come with addresses and a gateway.
fn addresses(section: &Section, device: &str, reader: &mut Reader<'_>) {
    for found in section.of("Address") {
        reader.on_link(&found.value, device, found.line);
    }
    for found in section.of("Gateway") {
        reader.gateway(&found.value, device, found.line);
    }
}
