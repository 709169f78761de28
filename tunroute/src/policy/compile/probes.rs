//! The route for a tunnel's probes: by the tunnel, also while the policies avoid it.
//!
//! A probe's socket is bound to the tunnel's device, and the kernel looks for a route *by that device*. While a policy
//! keeps off the tunnel there is none, and the probe could never find out that the tunnel is back. So each probed tunnel
//! has a rule that only sockets bound to its device match (`from all oif TUNNEL lookup TABLE`), at the priority
//! before the band, since a policy's `unreachable` default would end the lookup; and a table of its own with the way to each
//! target, and to nothing else: what others send from sockets bound to the tunnel goes on as if there were no probes.
//!
//! Not so where the kernel needs no help: in IPv4 it takes a target that has no route to be on the link
//! (`ip_route_output_key_hash_rcu()` in `net/ipv4/route.c`), which is as good unless there is a gateway; and a link-local
//! target is on the link. That matters with `datapath = "ebpf"`, where such a rule may be the only one on the host and
//! costs every packet of its family a little.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::Inputs;
use crate::{
    config::{ProbeTarget, Tunnel},
    policy::ability::inability,
    policy::net::{Band, Family, KernelState, Link, Route, RouteKind, Rule, RuleAction},
};

/// What the names of the probes' tables begin with. No policy's name has a colon.
pub const TABLE_PREFIX: &str = "probe:";

/// The name under which the table of a tunnel's probes is allocated, and shown by iproute2.
#[must_use]
pub fn table_name(tunnel: &str) -> String {
    format!("{TABLE_PREFIX}{tunnel}")
}

/// Does a tunnel need a table for its probes?
#[must_use]
pub fn needs_table(tunnel: &Tunnel) -> bool {
    Family::ALL.into_iter().any(|family| !targets(tunnel, family).is_empty())
}

/// The targets in a family for which the kernel needs a route.
fn targets(tunnel: &Tunnel, family: Family) -> BTreeSet<IpAddr> {
    if family == Family::V4 && tunnel.via(family).is_none() {
        return BTreeSet::new();
    }
    let target = tunnel.probes.iter().map(|probe| match probe.target {
        ProbeTarget::Echo(target) => target,
        ProbeTarget::Tcp(target) => target.ip(),
    });
    let link_local = |target: &IpAddr| match target {
        IpAddr::V4(target) => target.is_link_local(),
        IpAddr::V6(target) => target.is_unicast_link_local(),
    };
    target.filter(|target| Family::of_addr(target) == family && !link_local(target)).collect()
}

/// The tunnels that need rules and routes for their probes: the table, the family, and the targets.
fn probed<'a>(inputs: &Inputs<'a>) -> impl Iterator<Item = (&'a Tunnel, u32, Family, BTreeSet<IpAddr>)> {
    let tables = inputs.tables;
    let with_table = |tunnel: &'a Tunnel| Some((tunnel, *tables.get(&table_name(&tunnel.name))?));
    let by_family = |(tunnel, table)| Family::ALL.map(|family| (tunnel, table, family, targets(tunnel, family)));
    let some_target = |(_, _, _, targets): &(_, _, _, BTreeSet<IpAddr>)| !targets.is_empty();
    inputs.config.tunnels.iter().filter_map(with_table).flat_map(by_family).filter(some_target)
}

/// The rules of all tunnels' probes, at the priority before the band.
pub(super) fn rules(inputs: &Inputs<'_>) -> BTreeSet<Rule> {
    let priority = Band(inputs.config.band).probes();
    let rule = |(tunnel, table, family, _): (&Tunnel, u32, Family, _)| Rule {
        oif: Some(tunnel.name.clone()),
        ..Rule::new(priority, family.default_prefix(), RuleAction::Lookup(table))
    };
    probed(inputs).map(rule).collect()
}

/// The routes of all tunnels' probes.
pub(super) fn routes(inputs: &Inputs<'_>) -> BTreeSet<Route> {
    let mut routes = BTreeSet::new();
    for (tunnel, table, family, targets) in probed(inputs) {
        let able = |link: &&Link| link.up && inability(tunnel, link, family).is_none();
        let Some(link) = inputs.kernel.link(&tunnel.name).filter(able) else { continue };
        for target in targets {
            let gateway = tunnel.via(family).filter(|gateway| !on_link(target, *gateway, link, inputs.kernel));
            let kind = RouteKind::Unicast { oif: link.index, device: link.name.clone(), gateway };
            routes.insert(Route { table, dst: target.into(), metric: family.default_metric(), kind });
        }
    }
    routes
}

/// Is the target reached without the gateway: because it is the gateway, or by a connected prefix of the tunnel?
fn on_link(target: IpAddr, gateway: IpAddr, link: &Link, kernel: &KernelState) -> bool {
    let connected = |prefix: &IpNet| prefix.prefix_len() > 0 && prefix.contains(&target);
    target == gateway
        || kernel.main.iter().any(|route| route.on_link && route.oif == Some(link.index) && connected(&route.dst))
}
