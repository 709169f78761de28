//! Which policies a setup amounts to. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::{Route, RouteKind, Rule, Setup};
use crate::{
    config::OnDown,
    policy::net::{Family, TABLE_LOCAL, TABLE_MAIN, is_link_local},
};

/// The rules of the main and the default table, which the kernel has by itself.
const KERNEL_RULES: [(u32, u32); 3] = [(0, TABLE_LOCAL), (32766, TABLE_MAIN), (32767, 253)];

/// A configuration to be written down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    pub(super) ingress: BTreeSet<String>,
    pub(super) uplink: BTreeSet<String>,
    /// By device.
    pub(super) tunnels: BTreeMap<String, Tunnel>,
    pub(super) policies: Vec<Policy>,
    /// What could not be expressed.
    pub(super) notes: Vec<String>,
    /// The commands that remove what the policies stand for.
    pub(super) removal: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tunnel {
    pub(super) via_v4: Option<Ipv4Addr>,
    pub(super) via_v6: Option<Ipv6Addr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) name: String,
    /// The table that did this until now.
    pub(super) table: u32,
    pub(super) from: Vec<IpNet>,
    pub(super) way: Way,
}

/// What a table does with the packets of a family, so far as a policy can say it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) via: Vec<String>,
    pub(super) exempt: BTreeSet<IpNet>,
    /// Nothing: the packets go on to the next rule.
    pub(super) on_down: Option<OnDown>,
}

/// Finds the policies in a setup.
#[must_use]
pub fn draft(setup: &Setup) -> Draft {
    let mut draft = Draft { notes: setup.notes.clone(), ..Draft::default() };
    // By table, and by family in it: the sources that look it up.
    let mut sources: BTreeMap<u32, BTreeMap<Family, Vec<&Rule>>> = BTreeMap::new();
    for family in Family::ALL {
        for rule in decisive(setup, family, &mut draft.notes) {
            if let Some((_, table)) = rule.plain {
                sources.entry(table).or_default().entry(family).or_default().push(rule);
            }
        }
    }
    let mut names = BTreeSet::new();
    for (table, by_family) in sources {
        let mut policies: Vec<Policy> = Vec::new();
        for (family, rules) in by_family {
            let Some(way) = draft.way(setup, family, table, &rules) else { continue };
            let from = rules.iter().filter_map(|rule| rule.plain.map(|(from, _)| from));
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
            draft.removal.extend(rules.iter().map(|rule| format!("{} rule del {}", ip(family), rule.text)));
            let routes = setup.routes.iter().filter(|route| route.table == table && Family::of(&route.dst) == family);
            draft.removal.extend(routes.map(|route| format!("{} route del {}", ip(family), removal(route))));
        }
        draft.policies.extend(policies);
    }
    draft.notes.extend(unused(setup));
    draft.interfaces(setup);
    draft
}

/// What is said of tables that no rule looks up, as `Table =` of wg-quick makes one.
fn unused(setup: &Setup) -> Vec<String> {
    let mut tables: BTreeMap<u32, &String> = BTreeMap::new();
    for route in setup.routes.iter().filter(|route| !matches!(route.table, TABLE_LOCAL | TABLE_MAIN | 253)) {
        if let RouteKind::Unicast { device: Some(device), .. } = &route.kind
            && route.dst.prefix_len() == 0
        {
            tables.entry(route.table).or_insert(device);
        }
    }
    let is_named =
        |table: u32, word: &str| word.parse() == Ok(table) || setup.names.get(&table).is_some_and(|name| name == word);
    let looked_up =
        |table: u32| setup.rules.iter().any(|rule| rule.text.split_whitespace().any(|word| is_named(table, word)));
    let unused = tables.into_iter().filter(|(table, _)| !looked_up(*table));
    unused
        .map(|(table, device)| {
            format!(
                "no rule leads to table {table}, by which {device} has a default route: write a policy whose `from` has \
                 the sources that are to leave by {device}"
            )
        })
        .collect()
}

/// Leave alike: a policy has one list of tunnels for both families.
fn same(a: &Way, b: &Way) -> bool {
    (&a.via, a.on_down) == (&b.via, b.on_down)
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

/// The words for `ip route del`, which takes no state of the device.
fn removal(route: &Route) -> String {
    let words = route.text.split_whitespace().filter(|word| !matches!(*word, "linkdown" | "dead" | "pervasive"));
    words.collect::<Vec<_>>().join(" ")
}

/// The rules of a family that decide by the source alone, less those that are never reached. Others are noted.
fn decisive<'a>(setup: &'a Setup, family: Family, notes: &mut Vec<String>) -> Vec<&'a Rule> {
    let mut decisive: Vec<(&Rule, IpNet)> = Vec::new();
    for rule in setup.rules.iter().filter(|rule| rule.family == family) {
        let mut note = |why: String| notes.push(format!("{why}: {} rule add {}", ip(family), rule.text));
        let Some((from, table)) = rule.plain else {
            note("only rules of the form `from PREFIX lookup TABLE` can be expressed".to_owned());
            continue;
        };
        if from.prefix_len() == 0 {
            let kernels = KERNEL_RULES.iter().any(|(priority, of)| *of == table && rule.priority == Some(*priority));
            if !kernels {
                note("it is for all sources: write a policy with `allow-default = true` if that is meant".to_owned());
            }
            continue;
        }
        if matches!(table, TABLE_LOCAL | TABLE_MAIN | 253) {
            note(format!("no policy applies to {from}: it must not be in one, nor in a policy's shorter prefix"));
            continue;
        }
        if rule.priority.is_some_and(|priority| priority > 32766) {
            note("it is asked after the main table".to_owned());
            continue;
        }
        match decisive.iter().find(|(_, earlier)| earlier.contains(&from)) {
            Some((earlier, _)) if earlier.plain == rule.plain => note("it is there twice".to_owned()),
            Some((_, earlier)) => note(format!("the rule from {earlier} is asked before it, and takes its packets")),
            None => decisive.push((rule, from)),
        }
    }
    decisive.into_iter().map(|(rule, _)| rule).collect()
}

impl Draft {
    /// What a table does with packets of a family; none, with a note, if that is nothing that a policy can say.
    fn way(&mut self, setup: &Setup, family: Family, table: u32, rules: &[&Rule]) -> Option<Way> {
        let mut routes: Vec<&Route> =
            setup.routes.iter().filter(|route| route.table == table && Family::of(&route.dst) == family).collect();
        // The kernel asks the lowest metric first.
        routes.sort_by_key(|route| route.metric);
        let mut way = Way::default();
        for route in routes {
            let default = route.dst.prefix_len() == 0;
            let mut note = |why: &str| self.notes.push(format!("{why}: {} route add {}", ip(family), route.text));
            if !route.extra.is_empty() {
                note(&format!("`{}` is left out", route.extra.join(" ")));
            }
            match &route.kind {
                RouteKind::Unicast { device: Some(device), gateway } if default && way.on_down.is_none() => {
                    let tunnel = self.tunnels.entry(device.clone()).or_default();
                    let other = match gateway {
                        Some(std::net::IpAddr::V4(via)) => tunnel.via_v4.replace(*via).is_some_and(|old| old != *via),
                        Some(std::net::IpAddr::V6(via)) => tunnel.via_v6.replace(*via).is_some_and(|old| old != *via),
                        None => false,
                    };
                    if other {
                        note(&format!(
                            "{device} has another gateway in another table; a tunnel has one for each family"
                        ));
                    }
                    if !way.via.contains(device) {
                        way.via.push(device.clone());
                    }
                }
                RouteKind::Unreachable if default => way.on_down = way.on_down.or(Some(OnDown::Unreachable)),
                RouteKind::Blackhole if default => way.on_down = way.on_down.or(Some(OnDown::Blackhole)),
                RouteKind::Prohibit if default => way.on_down = way.on_down.or(Some(OnDown::Prohibit)),
                RouteKind::Throw if !default => {
                    way.exempt.insert(route.dst);
                }
                RouteKind::Unicast { .. } if !default && setup.routes.iter().any(|main| copies(route, main)) => {
                    way.exempt.insert(route.dst);
                }
                RouteKind::Unicast { .. } if !default => note(
                    "the main table does not have the same route: with it there, and the destination in `exempt`, its \
                     packets would go the same way",
                ),
                _ => note("a policy has nothing like it"),
            }
        }
        if way.via.is_empty() {
            let from: Vec<String> =
                rules.iter().filter_map(|rule| rule.plain.map(|(from, _)| from.to_string())).collect();
            self.notes.push(format!(
                "table {table} has no default route for {family} by a device (is the tunnel down?): no policy for {}",
                from.join(", ")
            ));
            return None;
        }
        Some(way)
    }

    /// Guesses what the other devices are: an uplink has a default route in the main table, and traffic enters where
    /// networks are on the link.
    fn interfaces(&mut self, setup: &Setup) {
        let main = setup.routes.iter().filter(|route| route.table == TABLE_MAIN);
        let by_device = main.filter_map(|route| match &route.kind {
            RouteKind::Unicast { device: Some(device), gateway } => Some((route.dst, device, gateway.is_some())),
            _ => None,
        });
        let by_device: Vec<_> =
            by_device.filter(|(_, device, _)| *device != "lo" && !self.tunnels.contains_key(*device)).collect();
        let uplinks = by_device.iter().filter(|(dst, ..)| dst.prefix_len() == 0);
        self.uplink = uplinks.map(|(_, device, _)| (*device).clone()).collect();
        let on_link = by_device.iter().filter(|(dst, device, gateway)| {
            dst.prefix_len() > 0 && !gateway && !is_link_local(dst) && !self.uplink.contains(*device)
        });
        self.ingress = on_link.map(|(_, device, _)| (*device).clone()).collect();
    }
}

/// Does a route of the main table do what this one does? (Without `throw` it is how such tables are made by hand.)
fn copies(route: &Route, main: &Route) -> bool {
    main.table == TABLE_MAIN && (main.dst, &main.kind) == (route.dst, &route.kind)
}

/// A policy's name: that of its table, if it has one that a policy may have.
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
    if !taken.insert(name.clone()) {
        name = format!("table{table}-{}", taken.len());
        taken.insert(name.clone());
    }
    name
}
