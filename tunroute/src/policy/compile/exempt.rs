//! The destinations that policies do not apply to: literal ones, networks on the link, and routes that lead inside.
//!
//! An exemption is one of two kinds ([`Exempt`]). One that the configuration names, and the network on the link at an
//! uplink, may leave by any device. One that follows the main table leads *inside*, and never lets a packet leave by an
//! uplink. So a route by an uplink within an inside prefix is entered as not exempt ([`Exempt::No`]), and what is within
//! an exemption of the first kind is of the first kind itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    net::IpAddr,
};

use ipnet::IpNet;
use tunroute_common::maps::{Exempt, OWN_SET};

use super::{Inputs, fnv1a, sources::holds};
use crate::{
    config::{DevicePattern, Policy},
    policy::devices::matching,
    policy::net::{Family, IfIndex, KernelState, MainRoute, is_link_local},
};

/// The exemptions of all policies. Policies that declare the same ones share a set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exemptions {
    /// The set of each policy, by its index in the configuration.
    of_policies: Vec<u32>,
    sets: BTreeMap<u32, BTreeMap<IpNet, Entry>>,
}

/// What a set says of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The kind of exemption.
    pub(super) kind: Exempt,
    /// An address of this host and nothing else: the local table comes before the policies' tables.
    own: bool,
}

/// What a prefix is, as far as exemptions go. Of several that are one prefix, the last counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    /// The main table leads to an uplink.
    Outside,
    /// In the local table.
    Own,
    /// Exempt, and leads inside.
    Inside,
    /// Exempt, wherever it leads.
    Anywhere,
}

/// Where the main table leads.
struct Way<'a> {
    route: &'a MainRoute,
    /// None of its devices is an uplink.
    inside: bool,
    /// On the link at an ingress device or a tunnel.
    connected: bool,
}

impl Exemptions {
    /// The exemptions as the main and the local table are now.
    pub(super) fn compile(inputs: &Inputs<'_>) -> Self {
        let mut sets: BTreeMap<u32, BTreeMap<IpNet, Entry>> = BTreeMap::new();
        let (ways, of_policies) = (ways(inputs), numbers(&inputs.config.policies));
        for (policy, set) in inputs.config.policies.iter().zip(&of_policies).filter(|(policy, _)| !policy.main) {
            sets.entry(*set).or_insert_with(|| entries(policy, &ways, inputs.kernel));
        }
        Self { of_policies, sets }
    }

    /// A policy's set.
    pub(super) fn set_of(&self, policy: usize) -> u32 {
        self.of_policies.get(policy).copied().unwrap_or(OWN_SET)
    }

    /// All sets, with what stands in them.
    pub(super) fn sets(&self) -> impl Iterator<Item = (u32, IpNet, Exempt)> {
        self.sets.iter().flat_map(|(set, entries)| entries.iter().map(|(dst, entry)| (*set, *dst, entry.kind)))
    }

    /// The destinations for which a policy's routing table in one family has routes of its own.
    pub(super) fn routes_of(&self, policy: usize, family: Family) -> impl Iterator<Item = (IpNet, Exempt)> {
        let entries = self.sets.get(&self.set_of(policy)).into_iter().flatten();
        let of_family = entries.filter(move |(dst, entry)| Family::of(dst) == family && !entry.own);
        of_family.map(|(dst, entry)| (*dst, entry.kind))
    }
}

/// Routes of the main table that lead inside and that policies overrule, as none of their exemptions holds the destination:
/// of each such policy, by its index. In order.
#[must_use]
pub fn overruled<'a>(inputs: &Inputs<'a>) -> Vec<(usize, Vec<&'a MainRoute>)> {
    let exemptions = Exemptions::compile(inputs);
    let ways = ways(inputs);
    let policies = inputs.config.policies.iter().enumerate().filter(|(_, policy)| !policy.main);
    let of_policy = |(index, policy): (usize, &Policy)| {
        let entries = exemptions.sets.get(&exemptions.set_of(index))?;
        let is_exempt = |dst: &IpNet| {
            let longest = iter::successors(Some(*dst), IpNet::supernet).find_map(|around| entries.get(&around));
            longest.is_some_and(|entry| entry.kind != Exempt::No)
        };
        let leads_elsewhere =
            |device: &IfIndex| inputs.kernel.links.get(device).is_some_and(|link| !policy.via.contains(&link.name));
        let routes = ways.iter().filter(|way| way.inside).map(|way| way.route);
        let routes: Vec<&MainRoute> = routes
            .filter(|route| policy.uses(Family::of(&route.dst)) && !is_link_local(&route.dst))
            .filter(|route| route.devices().any(leads_elsewhere) && !is_exempt(&route.dst))
            .collect();
        (!routes.is_empty()).then_some((index, routes))
    };
    policies.filter_map(of_policy).collect()
}

/// A prefix that is so short that it is a default route, or one in parts (0.0.0.0/1 and 128.0.0.0/1, 2000::/3), and no
/// network inside.
#[must_use]
pub fn is_default(dst: &IpNet) -> bool {
    match dst {
        IpNet::V4(dst) => dst.prefix_len() < 8,
        IpNet::V6(dst) => dst.prefix_len() < 4,
    }
}

/// Where the main table leads for each destination, default routes aside: by the route with the least metric. In order.
fn ways<'a>(inputs: &Inputs<'a>) -> Vec<Way<'a>> {
    let devices = |patterns: &[DevicePattern]| -> BTreeSet<IfIndex> {
        matching(patterns, inputs.kernel).map(|link| link.index).collect()
    };
    let interfaces = &inputs.config.interfaces;
    let (ingress, uplinks) = (devices(&interfaces.ingress), devices(&interfaces.uplink));
    let tunnels = inputs.config.tunnels.iter().filter_map(|tunnel| inputs.kernel.link(&tunnel.name));
    let tunnels: BTreeSet<IfIndex> = tunnels.map(|link| link.index).collect();
    let mut routes: Vec<&MainRoute> = inputs.kernel.main.iter().filter(|route| !is_default(&route.dst)).collect();
    routes.sort_by_key(|route| (route.dst, route.metric));
    let connected = |route: &&MainRoute| {
        let on = |devices: &BTreeSet<IfIndex>| route.oif.is_some_and(|oif| devices.contains(&oif));
        route.on_link && on(&ingress) || route.network && on(&tunnels)
    };
    let way = |same: &[&'a MainRoute]| {
        let route = *same.first()?;
        let mut hops = route.devices().peekable();
        let inside = hops.peek().is_some() && !hops.any(|device| uplinks.contains(device));
        Some(Way { route, inside, connected: same.iter().any(connected) })
    };
    routes.chunk_by(|a, b| a.dst == b.dst).filter_map(way).collect()
}

/// What the set of a policy says.
fn entries(policy: &Policy, ways: &[Way<'_>], kernel: &KernelState) -> BTreeMap<IpNet, Entry> {
    let at_uplink = |way: &Way<'_>| !way.inside && way.route.network;
    let mark = |way: &Way<'_>| match way.inside {
        // Its neighbours are reached by the uplink itself.
        false if policy.exempt_connected && (policy.allow_default && at_uplink(way) || way.connected) => {
            Some(Mark::Anywhere)
        }
        false => Some(Mark::Outside),
        true if policy.exempt_routed || policy.exempt_connected && way.connected => Some(Mark::Inside),
        true => None,
    };
    let mut marks: Vec<(IpNet, Mark)> =
        ways.iter().filter_map(|way| mark(way).map(|mark| (way.route.dst, mark))).collect();
    marks.extend(policy.exempt.iter().map(|dst| (*dst, Mark::Anywhere)));
    marks.extend(kernel.local.iter().map(|dst| (*dst, Mark::Own)));
    marks.sort_unstable();

    // Broadcasts to an uplink's network leave by it, and multicast leaves by any device.
    let uplinks: Vec<IpNet> = ways.iter().filter(|way| at_uplink(way)).map(|way| way.route.dst).collect();
    let leaves = |dst: &IpNet| is_multicast(dst.addr()) || uplinks.iter().any(|network| network.contains(dst));
    let mut entries = BTreeMap::new();
    let mut around: Vec<(IpNet, Exempt)> = Vec::new();
    for (index, (dst, mark)) in marks.iter().enumerate() {
        if marks.get(index + 1).is_some_and(|(same, _)| same == dst) {
            continue;
        }
        while around.pop_if(|(outer, _)| !holds(outer, dst)).is_some() {}
        let outer = around.last().map_or(Exempt::No, |(_, kind)| *kind);
        let kind = match mark {
            Mark::Outside if outer != Exempt::Inside => continue,
            Mark::Outside => Exempt::No,
            Mark::Own if leaves(dst) => Exempt::Anywhere,
            Mark::Own | Mark::Inside => outer.max(Exempt::Inside),
            Mark::Anywhere => Exempt::Anywhere,
        };
        let own = *mark == Mark::Own;
        entries.insert(*dst, Entry { kind, own });
        // The local table is asked first for its addresses.
        around.push((*dst, if own { Exempt::Anywhere } else { kind }));
    }
    entries
}

const fn is_multicast(address: IpAddr) -> bool {
    address.is_multicast()
}

/// The number of each policy's set, by what the policy declares, so that it stays the same while the main table changes.
fn numbers(policies: &[Policy]) -> Vec<u32> {
    let mut taken: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    let set = |policy: &Policy| {
        let mut declared: Vec<String> = policy.exempt.iter().map(ToString::to_string).collect();
        declared.sort_unstable();
        let words = [
            (policy.exempt_connected, "connected"),
            (policy.exempt_connected && policy.allow_default, "uplinks"),
            (policy.exempt_routed, "routed"),
        ];
        declared.extend(words.into_iter().filter(|(declared, _)| *declared).map(|(_, word)| word.to_owned()));
        let mut set = u32::try_from(fnv1a(declared.iter().map(String::as_str)) >> 32).unwrap_or_default();
        // One policy's exemption must not become another's because of a hash.
        while set == OWN_SET || taken.get(&set).is_some_and(|other| *other != declared) {
            set = set.wrapping_add(1);
        }
        taken.entry(set).or_insert(declared);
        set
    };
    policies.iter().map(set).collect()
}
