//! The policies that a setup amounts to. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{Route, RouteKind, Rule, Setup, tables::TABLE_DEFAULT};
use crate::{
    config::{
        OnDown,
        allowed::{self, MOST_LEVELS, MOST_POLICIES},
    },
    policy::net::{Family, TABLE_LOCAL, TABLE_MAIN, is_link_local},
};

/// The kernel's own rules for the main and the default table.
const KERNEL_RULES: [(u32, u32); 2] = [(MAIN_PRIORITY, TABLE_MAIN), (32767, TABLE_DEFAULT)];
const MAIN_PRIORITY: u32 = 32766;
/// The first priority of the policies' rules, as a configuration without `band` has it.
const BAND: u32 = 20000;

/// A configuration to be written down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    pub(super) ingress: BTreeSet<String>,
    pub(super) uplink: BTreeSet<String>,
    /// By device and family: the gateway, if there is one.
    pub(super) tunnels: BTreeMap<(String, Family), Option<IpAddr>>,
    pub(super) policies: Vec<Policy>,
    /// What could not be expressed, and why.
    pub(super) notes: Vec<String>,
    /// The commands that remove what the policies replace.
    pub(super) removal: Vec<String>,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) name: String,
    /// The table that did this until now.
    pub(super) table: u32,
    pub(super) from: Vec<IpNet>,
    pub(super) way: Way,
}

/// What a table does with the packets of a family, as far as a policy can say it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Way {
    /// The devices, in order of preference.
    pub(super) via: Vec<String>,
    pub(super) exempt: BTreeSet<IpNet>,
    /// What happens to packets without a device; none if they go on to the next rule.
    pub(super) on_down: Option<OnDown>,
}

/// Finds the policies in a setup.
#[must_use]
pub fn draft(setup: &Setup) -> Draft {
    let mut draft = Draft { notes: setup.notes.clone(), ..Draft::default() };
    // By table, and by family in it: the rules that look it up.
    let mut lookups: BTreeMap<u32, BTreeMap<Family, Vec<&Rule>>> = BTreeMap::new();
    for family in Family::ALL {
        for rule in draft.decisive(setup, family) {
            if let Some(table) = rule.table {
                lookups.entry(table).or_default().entry(family).or_default().push(rule);
            }
        }
    }
    let mut names = BTreeSet::new();
    for (table, by_family) in lookups {
        let mut policies: Vec<Policy> = Vec::new();
        for (family, rules) in by_family {
            let Some(way) = draft.way(setup, family, table, &rules) else { continue };
            let from = rules.iter().map(|rule| rule.from);
            match policies.iter_mut().find(|policy| same(&policy.way, &way)) {
                Some(policy) => {
                    policy.from.extend(from);
                    policy.way.exempt.extend(way.exempt);
                }
                None => {
                    let name = name(table, (!policies.is_empty()).then_some(family), &setup.names, &mut names);
                    policies.push(Policy { name, table, from: from.collect(), way });
                }
            }
        }
        for policy in &mut policies {
            policy.from.sort();
        }
        draft.policies.extend(policies);
    }
    draft.keep_within_limits();
    draft.replaced(setup);
    draft.notes.extend(unused(setup));
    draft.interfaces(setup);
    for note in &mut draft.notes {
        *note = note.chars().map(allowed::printable).collect();
    }
    draft
}

/// Notes on tables that no rule looks up, as `Table =` of wg-quick makes one.
fn unused(setup: &Setup) -> Vec<String> {
    let mut tables: BTreeMap<u32, &String> = BTreeMap::new();
    for route in setup.routes.iter().filter(|route| !is_kernels(route.table)) {
        if let RouteKind::Unicast { device: Some(device), .. } = &route.kind
            && route.dst.prefix_len() == 0
        {
            tables.entry(route.table).or_insert(device);
        }
    }
    let looked_up: BTreeSet<u32> = setup.rules.iter().filter_map(|rule| rule.table).collect();
    let unused = tables.into_iter().filter(|(table, _)| !looked_up.contains(table));
    unused
        .map(|(table, device)| {
            format!(
                "no rule leads to table {table}, which has a default route by {device}: write a policy whose `from` has \
                 the sources that are to leave by {device}"
            )
        })
        .collect()
}

/// Whether it is one of the tables that every host has.
fn is_kernels(table: u32) -> bool {
    matches!(table, TABLE_LOCAL | TABLE_MAIN | TABLE_DEFAULT)
}

/// Whether two families leave alike: a policy has one list of tunnels for both.
fn same(a: &Way, b: &Way) -> bool {
    (&a.via, a.on_down) == (&b.via, b.on_down)
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

/// A word of a command, quoted for a shell if it must be.
fn word(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b':' | b'@' | b'+');
    if text.bytes().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

impl Rule {
    /// The command that removes it.
    fn removal(&self) -> String {
        let table = self.table.map_or(String::new(), |table| format!(" lookup {table}"));
        let priority =
            self.priority.filter(|_| self.is_given).map_or(String::new(), |priority| format!(" pref {priority}"));
        format!("{} rule del from {}{table}{priority}", ip(self.family), short(&self.from))
    }
}

impl Route {
    /// The command that removes it.
    fn removal(&self) -> String {
        let family = Family::of(&self.dst);
        let dst = if self.dst.prefix_len() == 0 { "default".to_owned() } else { short(&self.dst) };
        let (kind, way) = match &self.kind {
            RouteKind::Unicast { device, gateway } => {
                let version = |via: &IpAddr| match Family::of_addr(via) {
                    own if own == family => "",
                    Family::V4 => "inet ",
                    Family::V6 => "inet6 ",
                };
                let via = gateway.as_ref().map_or(String::new(), |via| format!(" via {}{via}", version(via)));
                let dev = device.as_ref().map_or(String::new(), |device| format!(" dev {}", word(device)));
                ("", via + &dev)
            }
            RouteKind::Throw => ("throw ", String::new()),
            RouteKind::Unreachable => ("unreachable ", String::new()),
            RouteKind::Blackhole => ("blackhole ", String::new()),
            RouteKind::Prohibit => ("prohibit ", String::new()),
            RouteKind::Other => ("", String::new()),
        };
        let metric = if self.metric == 0 { String::new() } else { format!(" metric {}", self.metric) };
        format!("{} route del {kind}{dst}{way} table {}{metric}", ip(family), self.table)
    }
}

/// A prefix as one writes it: without its length if it is one address.
pub(super) fn short(prefix: &IpNet) -> String {
    if prefix.prefix_len() == prefix.max_prefix_len() { prefix.addr().to_string() } else { prefix.to_string() }
}

impl Draft {
    /// The rules of a family that decide by the source alone. Others are noted; those that are never reached are removed,
    /// too, as they would come into force.
    fn decisive<'a>(&mut self, setup: &'a Setup, family: Family) -> Vec<&'a Rule> {
        let mut decisive: Vec<&Rule> = Vec::new();
        for rule in setup.rules.iter().filter(|rule| rule.family == family) {
            let mut note = |why: &str| self.notes.push(rule.origin.note(why));
            let Some(table) = rule.table.filter(|_| rule.plain) else {
                note("a policy can only do what `from PREFIX lookup TABLE` does");
                continue;
            };
            if rule.from.prefix_len() == 0 {
                let is_kernels =
                    KERNEL_RULES.iter().any(|(priority, of)| (Some(*priority), *of) == (rule.priority, table));
                if !is_kernels && table != TABLE_LOCAL {
                    note("it is for all sources: write a policy with `allow-default = true` if that is meant");
                }
                continue;
            }
            if is_kernels(table) {
                note("it leaves its packets to a table of the kernel, as no policy does");
                continue;
            }
            if rule.priority.is_some_and(|priority| priority > MAIN_PRIORITY) {
                note("it comes after the rule for the main table");
                continue;
            }
            if let Err(why) = allowed::source(&rule.from) {
                note(&why);
                continue;
            }
            match decisive.iter().find(|earlier| earlier.from.contains(&rule.from)) {
                Some(earlier) => {
                    if (earlier.from, earlier.table) != (rule.from, rule.table) {
                        note(&format!(
                            "it does nothing, as the rule from {} comes before it and takes its packets",
                            earlier.from
                        ));
                    }
                    self.removal.push(rule.removal());
                }
                None => decisive.push(rule),
            }
        }
        decisive
    }

    /// What a table does with packets of a family; none, with notes, if a policy cannot say it.
    fn way(&mut self, setup: &Setup, family: Family, table: u32, rules: &[&Rule]) -> Option<Way> {
        let mut routes: Vec<&Route> =
            setup.routes.iter().filter(|route| route.table == table && Family::of(&route.dst) == family).collect();
        // The kernel prefers the lowest metric.
        routes.sort_by_key(|route| route.metric);
        let mut way = Way::default();
        let mut gateways = BTreeMap::new();
        let mut refused = false;
        for route in routes {
            let default = route.dst.prefix_len() == 0;
            let mut note = |why: &str| self.notes.push(route.origin.note(why));
            match &route.kind {
                RouteKind::Unicast { device: Some(device), gateway } if default && way.on_down.is_none() => {
                    let other = gateways.get(device).or_else(|| self.tunnels.get(&(device.clone(), family)));
                    if let Err(why) = tunnel(device, family, *gateway, other) {
                        refused = true;
                        note(&why);
                        continue;
                    }
                    if !route.extra.is_empty() {
                        note(&format!("`{}` is left out", route.extra.join(" ")));
                    }
                    gateways.insert(device.clone(), *gateway);
                    if !way.via.contains(device) {
                        way.via.push(device.clone());
                    }
                }
                RouteKind::Unreachable if default => way.on_down = way.on_down.or(Some(OnDown::Unreachable)),
                RouteKind::Blackhole if default => way.on_down = way.on_down.or(Some(OnDown::Blackhole)),
                RouteKind::Prohibit if default => way.on_down = way.on_down.or(Some(OnDown::Prohibit)),
                kind if !default
                    && (*kind == RouteKind::Throw || setup.routes.iter().any(|main| copies(route, main))) =>
                {
                    match allowed::exempt(&route.dst) {
                        Ok(()) => {
                            way.exempt.insert(route.dst);
                        }
                        Err(why) => note(&why),
                    }
                }
                RouteKind::Unicast { .. } if !default => note(
                    "the main table does not have the same route: add it there, and its destination to `exempt`, and its \
                     packets go the same way",
                ),
                RouteKind::Unicast { .. } => {
                    refused = true;
                    note("its device is not known: add `dev` and the device to it");
                }
                _ => note("a policy has nothing like it"),
            }
        }
        if way.via.is_empty() {
            let from: Vec<String> = rules.iter().map(|rule| rule.from.to_string()).collect();
            let from = from.join(", ");
            self.notes.push(if refused {
                format!("there is no policy for {from}: no default route for {family} in table {table} can be expressed")
            } else {
                format!(
                    "there is no policy for {from}: table {table} has no default route for {family} by a device (is the \
                     tunnel down?)"
                )
            });
            return None;
        }
        self.tunnels.extend(gateways.into_iter().map(|(device, gateway)| ((device, family), gateway)));
        Some(way)
    }

    /// Takes out what exceeds the number and the nesting of policies that a configuration may have.
    fn keep_within_limits(&mut self) {
        for policy in self.policies.split_off(self.policies.len().min(MOST_POLICIES)) {
            let from: Vec<String> = policy.from.iter().map(IpNet::to_string).collect();
            self.notes.push(format!("{}: there are more than {MOST_POLICIES} policies", from.join(", ")));
        }
        let indexed = self.policies.iter().enumerate();
        let mut sources: Vec<(IpNet, usize)> =
            indexed.flat_map(|(index, policy)| policy.from.iter().map(move |net| (*net, index))).collect();
        sources.sort();
        let mut around: Vec<(IpNet, usize, u32)> = Vec::new();
        for (net, index) in sources {
            while around.pop_if(|(outer, ..)| !outer.contains(&net)).is_some() {}
            let level = around.last().map_or(1, |(_, outer, level)| level + u32::from(*outer != index));
            if level <= MOST_LEVELS {
                around.push((net, index, level));
                continue;
            }
            self.notes.push(format!("{net}: it is inside {MOST_LEVELS} prefixes of other policies"));
            if let Some(policy) = self.policies.get_mut(index) {
                policy.from.retain(|from| *from != net);
            }
        }
        self.policies.retain(|policy| !policy.from.is_empty());
        let used: BTreeSet<(&String, Family)> = self
            .policies
            .iter()
            .flat_map(|policy| {
                policy.way.via.iter().flat_map(|via| policy.from.iter().map(move |net| (via, Family::of(net))))
            })
            .collect();
        self.tunnels.retain(|(device, family), _| used.contains(&(device, *family)));
    }

    /// The commands that remove what the policies replace, and notes on rules that stay.
    fn replaced(&mut self, setup: &Setup) {
        let replaces = |rule: &Rule, policy: &Policy| {
            rule.plain && rule.table == Some(policy.table) && policy.from.contains(&rule.from)
        };
        let is_replaced = |rule: &&Rule| self.policies.iter().any(|policy| replaces(rule, policy));
        let (replaced, stay): (Vec<&Rule>, Vec<&Rule>) = setup.rules.iter().partition(is_replaced);
        let mut removal: Vec<String> = replaced.iter().map(|rule| rule.removal()).collect();
        let mut kept: BTreeSet<(u32, Family)> = BTreeSet::new();
        for route in &setup.routes {
            let family = Family::of(&route.dst);
            let leads_to = |rule: &&&Rule| rule.table == Some(route.table) && rule.family == family;
            if !replaced.iter().any(|rule| leads_to(&rule)) {
                continue;
            }
            match stay.iter().find(|rule| leads_to(rule) && !self.removal.contains(&rule.removal())) {
                None => removal.push(route.removal()),
                Some(rule) if kept.insert((route.table, family)) => {
                    let table = route.table;
                    self.notes.push(
                        rule.origin.note(&format!("the routes of table {table} stay, as this rule leads there, too")),
                    );
                }
                Some(_) => {}
            }
        }
        removal.retain(|command| !self.removal.contains(command));
        self.removal.extend(removal);
        for rule in stay.iter().filter(|rule| rule.plain && rule.priority.is_some_and(|priority| priority >= BAND)) {
            let around = |policy: &&Policy| policy.from.iter().any(|net| net.contains(&rule.from) && *net != rule.from);
            if let Some(policy) = self.policies.iter().find(around)
                && !self.removal.contains(&rule.removal())
            {
                let why = format!(
                    "the policy {} would take its packets: give it a priority below {BAND}, before the policies",
                    policy.name
                );
                self.notes.push(rule.origin.note(&why));
            }
        }
    }

    /// Guesses the other devices' roles: an uplink has a default route in the main table, and traffic enters by devices
    /// with networks on the link.
    fn interfaces(&mut self, setup: &Setup) {
        let tunnels: BTreeSet<&String> = self.tunnels.keys().map(|(device, _)| device).collect();
        let main = setup.routes.iter().filter(|route| route.table == TABLE_MAIN);
        let by_device = main.filter_map(|route| match &route.kind {
            RouteKind::Unicast { device: Some(device), gateway } => Some((route.dst, device, gateway.is_some())),
            _ => None,
        });
        let by_device: Vec<_> =
            by_device.filter(|(_, device, _)| allowed::tunnel(device).is_ok() && !tunnels.contains(device)).collect();
        let uplinks = by_device.iter().filter(|(dst, ..)| dst.prefix_len() == 0);
        self.uplink = uplinks.map(|(_, device, _)| (*device).clone()).collect();
        let on_link = by_device.iter().filter(|(dst, device, gateway)| {
            dst.prefix_len() > 0 && !gateway && !is_link_local(dst) && !self.uplink.contains(*device)
        });
        self.ingress = on_link.map(|(_, device, _)| (*device).clone()).collect();
    }
}

/// Whether a device can be a tunnel with this gateway, or why not. `other` is the gateway that it has already in this
/// family, if it is a tunnel.
fn tunnel(device: &str, family: Family, gateway: Option<IpAddr>, other: Option<&Option<IpAddr>>) -> Result<(), String> {
    allowed::tunnel(device)?;
    if let Some(gateway) = gateway {
        if Family::of_addr(&gateway) != family {
            return Err(format!("a gateway for {family} must have an {family} address"));
        }
        allowed::gateway(gateway)?;
    }
    match other {
        Some(other) if *other != gateway => {
            let other = other.map_or("no gateway".to_owned(), |other| format!("the gateway {other}"));
            Err(format!("the tunnel {device} has {other} already, and a tunnel has one for each family"))
        }
        _ => Ok(()),
    }
}

/// Whether a route of the main table does what this one does. Without `throw`, such copies are how tables are made by hand.
fn copies(route: &Route, main: &Route) -> bool {
    let is_unicast = matches!(route.kind, RouteKind::Unicast { .. });
    is_unicast && main.table == TABLE_MAIN && (main.dst, &main.kind) == (route.dst, &route.kind)
}

/// A policy's name: that of its table, if a policy may have it.
fn name(table: u32, family: Option<Family>, names: &BTreeMap<u32, String>, taken: &mut BTreeSet<String>) -> String {
    let allowed = |name: &&String| {
        name.len() <= 60 && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    let mut name = names.get(&table).filter(allowed).cloned().unwrap_or_else(|| format!("table{table}"));
    if let Some(family) = family {
        name += match family {
            Family::V4 => "-v4",
            Family::V6 => "-v6",
        };
    }
    let mut number = taken.len();
    while !taken.insert(name.clone()) {
        number += 1;
        name = format!("table{table}-{number}");
    }
    name
}
