//! Policies and the observed state in, desired state out: what both datapaths are to look like. Pure.

mod exempt;
mod follow;
pub mod probes;
pub mod sources;
pub mod tree;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

pub use exempt::{Exemptions, is_default, overruled};
pub use follow::follow;
use ipnet::IpNet;
use tunroute_common::maps::{Action, Clamp, Exempt, Exit, OWN_SET, Station, flags};

pub use self::sources::{Chain, ChainId, Lead, Sources};
use crate::{
    config::{Config, Datapath, OnDown, Policy, Tunnel},
    policy::ability::inability,
    policy::devices::matching,
    policy::fast::{Attachment, DeviceExit, Exemption, Hook, Open, Part, address_words},
    policy::net::{
        Band, Family, IfIndex, Inability, KernelState, Link, LinkLayer, Route, RouteKind, Rule, RuleAction, TABLE_LOCAL,
    },
    policy::xdp_devices,
};

/// The metric of the route that catches a policy's packets when no tunnel is up: the last one asked.
const LAST_METRIC: u32 = u32::MAX;

/// The drivers that answer a packet that is too big for the tunnel with an ICMP error of their own.
const ANSWERING_KINDS: [&str; 6] = ["sit", "gre", "ipip", "ip6tnl", "ip6gre", "vti"];

/// Everything that the desired state depends on.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The configuration, in which [`follow()`] has entered what the interfaces have.
    pub config: &'a Config,
    /// What the kernel says.
    pub kernel: &'a KernelState,
    /// Each policy's routing table, by the policy's name, and each probed tunnel's, by [`probes::table_name`].
    pub tables: &'a BTreeMap<String, u32>,
    /// Tunnels that do not answer their probes, with the family asked.
    pub failed: &'a BTreeSet<(String, Family)>,
    /// Install the policies' rules and tables.
    pub rules: bool,
    /// Input of the fast path, if it is wanted.
    pub fast: Option<FastInputs<'a>>,
    /// What was compiled from the same configuration before: it is taken if nothing has changed for the prefixes.
    pub before: Option<&'a Arc<Sources>>,
}

/// What the fast path's desired state depends on besides.
#[derive(Clone, Copy, Debug)]
pub struct FastInputs<'a> {
    /// The families that the ingress program may decide.
    pub open: Open,
    /// Ingress devices at which it must not decide.
    pub closed: &'a BTreeSet<IfIndex>,
    /// IPv4 ingress checks the reverse path (rp_filter).
    pub reverse_path: bool,
    /// The families whose unmatched traffic it may forward by the main table.
    pub unmatched: Open,
    /// Tunnels where such packets come back, to be forwarded likewise.
    pub returning: &'a BTreeSet<IfIndex>,
    /// The devices that take part in XDP.
    pub xdp: &'a xdp_devices::Chosen,
}

/// What both datapaths are to look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The rules.
    pub rules: BTreeSet<Rule>,
    /// The families whose policies' rules are a tree.
    pub trees: BTreeSet<Family>,
    /// The routes of all tables of tunroute's.
    pub routes: BTreeSet<Route>,
    /// The fast path; none if nothing of it is wanted.
    pub fast: Option<DesiredFast>,
    /// The destinations that policies do not apply to.
    pub exemptions: Exemptions,
}

/// What the fast path is to look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredFast {
    /// The slots, by the chain that each stands for.
    pub slots: BTreeMap<ChainId, SlotSpec>,
    /// The exits, with a family that uses each: of all tunnels that policies may use, so that failover only writes slots.
    pub exits: BTreeMap<DeviceExit, Family>,
    /// The source prefixes.
    pub sources: Arc<Sources>,
    /// The exemptions.
    pub exempt: BTreeSet<Exemption>,
    /// The tunnels whose segment size is limited.
    pub clamps: BTreeMap<IfIndex, Clamp>,
    /// The devices at which frames are decided.
    pub stations: BTreeMap<IfIndex, Station>,
    /// The programs.
    pub attachments: BTreeSet<Attachment>,
    /// What the ingress program may decide.
    pub open: Open,
    /// What the ingress program may forward by the main table.
    pub unmatched: Open,
    /// The programs only watch.
    pub shadow: bool,
}

impl DesiredFast {
    /// The gateways that programs send frames to, and may send frames to after a failover.
    pub fn gateways(&self) -> impl Iterator<Item = (IfIndex, IpAddr)> {
        let ethernet = self.exits.iter().filter(|(exit, _)| exit.exit.has(flags::ETHERNET));
        ethernet.filter_map(|(exit, family)| Some((exit.ifindex, exit.gateway(*family)?)))
    }

    /// Leaves to the kernel what enters and belongs to these policies, by their indices in the configuration.
    pub fn dispute(&mut self, policies: &BTreeSet<usize>) {
        for slot in self.slots.values_mut().filter(|slot| policies.contains(&slot.policy)) {
            slot.disputed = true;
        }
    }
}

/// What a slot is to hold, before it has a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSpec {
    /// The policy's index in the configuration, for the counters.
    pub policy: usize,
    /// The family.
    pub family: Family,
    /// The exit that packets are handed to; none while no tunnel is up.
    pub exit: Option<DeviceExit>,
    /// The action while there is none.
    pub on_down: Action,
    /// What enters is left to the kernel.
    pub disputed: bool,
    /// The exemption set.
    pub exempt_set: u32,
    /// The chain of the policies around this one.
    pub next: Option<ChainId>,
    /// The policy's table, by which the kernel is asked for the next hop's link-layer address; 0 if it is not asked.
    pub table: u32,
}

/// Whether a tunnel can carry packets of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelState<'a> {
    /// It can.
    Up(&'a Link),
    /// The device is down.
    Down(&'a Link),
    /// The device is up, but cannot carry the family.
    Unable(&'a Link, Inability),
    /// The device is up, but its probe is not answered.
    Failed(&'a Link),
    /// There is no such device yet.
    Pending,
}

/// How a tunnel is, for a family.
#[must_use]
pub fn tunnel_state<'a>(
    tunnel: &Tunnel,
    family: Family,
    kernel: &'a KernelState,
    failed: &BTreeSet<(String, Family)>,
) -> TunnelState<'a> {
    let Some(link) = kernel.link(&tunnel.name) else { return TunnelState::Pending };
    match inability(tunnel, link, family) {
        _ if !link.up => TunnelState::Down(link),
        Some(inability) => TunnelState::Unable(link, inability),
        None if failed.contains(&(tunnel.name.clone(), family)) => TunnelState::Failed(link),
        None => TunnelState::Up(link),
    }
}

/// The tunnel that carries a policy's packets of a family: the first in order of preference that is up.
#[must_use]
pub fn active_tunnel<'a>(
    policy: &'a Policy,
    family: Family,
    config: &'a Config,
    kernel: &'a KernelState,
    failed: &BTreeSet<(String, Family)>,
) -> Option<(&'a Tunnel, &'a Link)> {
    config.tunnels_of(policy).find_map(|tunnel| match tunnel_state(tunnel, family, kernel, failed) {
        TunnelState::Up(link) => Some((tunnel, link)),
        _ => None,
    })
}

/// Compiles the configuration against what is observed.
#[must_use]
pub fn compile(inputs: &Inputs<'_>) -> Desired {
    let exemptions = Exemptions::compile(inputs);
    let mut desired = Desired { rules: probes::rules(inputs), exemptions, ..Desired::default() };
    for family in Family::ALL {
        if inputs.rules {
            compile_rules(inputs, family, &mut desired);
        }
        desired.rules.extend(local_rule(inputs, family));
    }
    desired.routes = compile_routes(inputs, &desired.exemptions);
    desired.fast = inputs.fast.map(|fast| compile_fast(inputs, &fast, &desired.exemptions));
    desired
}

/// The rule that asks the local table before all other rules of tunroute's, where the host's own rule for it stands behind
/// them: else a policy would take what is sent to this host. Without rules of policies, the rules of others in between
/// might.
fn local_rule(inputs: &Inputs<'_>, family: Family) -> Option<Rule> {
    let priority = Band(inputs.config.band).local();
    let mut others = inputs.kernel.rules.iter().filter(|rule| rule.family == family && !rule.ours);
    let stands_ahead = others.any(|rule| rule.looks_up_local && rule.priority <= priority);
    let rule = Rule::new(priority, family.default_prefix(), RuleAction::Lookup(TABLE_LOCAL));
    (inputs.config.uses(family) && !stands_ahead).then_some(rule)
}

/// Are a family's rules to be a tree, if there is room for one?
#[must_use]
pub fn wants_tree(config: &Config, family: Family) -> bool {
    let sources = config.policies.iter().flat_map(Policy::sources);
    let count = sources.filter(|prefix| Family::of(prefix) == family).count();
    count > tree::LEAF && u32::try_from(count).unwrap_or(u32::MAX) > config.tree_above
}

/// The policies' rules in one family: a list, or a tree where there are many.
fn compile_rules(inputs: &Inputs<'_>, family: Family, desired: &mut Desired) {
    let band = Band(inputs.config.band);
    let mut room = tree::room(band, family, &inputs.kernel.rules);
    // Where the policies that leave their sources to the main table lead: behind all other rules of policies.
    let end = (*room.end()).max(*room.start());
    // While rules lead to an end that stands elsewhere, no tree may come behind it: the end moves first.
    let ours = inputs
        .kernel
        .rules
        .iter()
        .filter(|observed| observed.family == family)
        .filter_map(|observed| observed.rule.as_ref());
    let present = ours.filter(|rule| rule.is_end()).map(|rule| rule.priority).min().unwrap_or(end);
    let mut sources: Vec<(IpNet, RuleAction)> = Vec::new();
    for policy in inputs.config.policies.iter().filter(|policy| policy.uses(family)) {
        let action = match inputs.tables.get(&policy.name) {
            _ if policy.main => RuleAction::Leave(end),
            Some(table) => RuleAction::Lookup(*table),
            None => continue,
        };
        if policy.main {
            desired.rules.insert(Rule::end(end, family));
            room = *room.start()..=end.min(present).saturating_sub(1);
        }
        let of_family = policy.sources().filter(|prefix| Family::of(prefix) == family);
        sources.extend(of_family.map(|prefix| (*prefix, action)));
    }
    if wants_tree(inputs.config, family) {
        sources.sort_unstable();
        if let Some(rules) = tree::rules(&sources, room) {
            desired.rules.extend(rules);
            desired.trees.insert(family);
            return;
        }
    }
    // Longest first: an ordered list that equals a longest-prefix match.
    let rule = |(from, action): (IpNet, RuleAction)| Rule::new(band.of_length(from.prefix_len()), from, action);
    desired.rules.extend(sources.into_iter().map(rule));
}

impl Desired {
    /// Brings up to date what depends on the tunnels alone: routes and slots. It takes the same time however many
    /// source prefixes there are. The configuration must be the one that this was compiled from.
    pub fn follow_tunnels(&mut self, inputs: &Inputs<'_>) {
        self.routes = compile_routes(inputs, &self.exemptions);
        let Some(fast) = &mut self.fast else { return };
        for slot in fast.slots.values_mut() {
            *slot = compile_slot(inputs, (slot.policy, slot.exempt_set), slot.family, slot.next);
        }
        if !fast.slots.is_empty() {
            fast.exits = compile_exits(inputs);
        }
    }

    /// Brings up to date the routes of the policies' tables, which follow the main table. The configuration must be the one
    /// that this was compiled from. Returns whether anything has changed.
    pub fn follow_routes(&mut self, inputs: &Inputs<'_>) -> bool {
        let exemptions = Exemptions::compile(inputs);
        let changed = exemptions != self.exemptions;
        if changed {
            self.exemptions = exemptions;
            self.routes = compile_routes(inputs, &self.exemptions);
        }
        changed
    }
}

/// The routes of all tables, the policies' and the probes'.
fn compile_routes(inputs: &Inputs<'_>, exemptions: &Exemptions) -> BTreeSet<Route> {
    let mut routes = probes::routes(inputs);
    for (index, policy) in inputs.config.policies.iter().enumerate().filter(|(_, policy)| !policy.main) {
        let Some(table) = inputs.tables.get(&policy.name) else { continue };
        if !inputs.rules && !asks_for_neighbours(inputs, policy) {
            continue;
        }
        for family in Family::ALL.into_iter().filter(|family| policy.uses(*family)) {
            compile_table(inputs, policy, family, *table, exemptions.routes_of(index, family), &mut routes);
        }
    }
    routes
}

/// Do programs ask the kernel for link-layer addresses by the policy's table, although no rule leads there? Also while they are
/// being loaded: an earlier daemon's programs ask until then.
fn asks_for_neighbours(inputs: &Inputs<'_>, policy: &Policy) -> bool {
    let links = || policy.via.iter().filter_map(|tunnel| inputs.kernel.link(tunnel));
    inputs.config.datapath == Datapath::Ebpf && links().any(|link| link.layer == LinkLayer::Ethernet)
}

/// A policy's routes in one family.
fn compile_table(
    inputs: &Inputs<'_>,
    policy: &Policy,
    family: Family,
    table: u32,
    exempt: impl Iterator<Item = (IpNet, Exempt)>,
    routes: &mut BTreeSet<Route>,
) {
    let tunnel = active_tunnel(policy, family, inputs.config, inputs.kernel, inputs.failed);
    let by_tunnel = tunnel.map(|(tunnel, link)| RouteKind::Unicast {
        oif: link.index,
        device: link.name.clone(),
        gateway: tunnel.via(family),
    });
    let on_down = match policy.on_down {
        OnDown::Unreachable => Some(RouteKind::Unreachable),
        OnDown::Blackhole => Some(RouteKind::Blackhole),
        OnDown::Prohibit => Some(RouteKind::Prohibit),
        OnDown::Next => None,
    };
    let mut insert = |dst, metric, kind| routes.insert(Route { table, dst, metric, kind });
    for (dst, exempt) in std::iter::once((family.default_prefix(), Exempt::No)).chain(exempt) {
        if exempt != Exempt::No {
            insert(dst, family.default_metric(), RouteKind::Throw);
            continue;
        }
        // All destinations, and such as are not exempt in the midst of others that are.
        if let Some(kind) = &by_tunnel {
            insert(dst, family.default_metric(), kind.clone());
        }
        if let Some(kind) = &on_down {
            insert(dst, LAST_METRIC, kind.clone());
        }
    }
}

fn compile_fast(inputs: &Inputs<'_>, fast: &FastInputs<'_>, exemptions: &Exemptions) -> DesiredFast {
    let mut desired = match inputs.config.datapath {
        Datapath::Kernel => DesiredFast::default(),
        Datapath::Both | Datapath::Ebpf | Datapath::Shadow => compile_programs(inputs, fast, exemptions),
    };
    compile_clamps(inputs, &mut desired);
    desired
}

/// The decision on each source and destination, for any datapath: sources, slots and exemptions.
#[must_use]
pub fn decisions(inputs: &Inputs<'_>, reverse_path: bool) -> DesiredFast {
    compile_decisions(inputs, reverse_path, &Exemptions::compile(inputs))
}

fn compile_decisions(inputs: &Inputs<'_>, reverse_path: bool, exemptions: &Exemptions) -> DesiredFast {
    let mut desired = DesiredFast { sources: Sources::compile(inputs, reverse_path), ..DesiredFast::default() };
    for Chain { id, family, policies } in desired.sources.chains() {
        // Every suffix is a chain of its own: it is where the one before goes on.
        let mut id = Some(*id);
        let mut policies = policies.as_slice();
        while let (Some(current), [policy, rest @ ..]) = (id, policies) {
            let next = (!rest.is_empty()).then(|| ChainId::new(inputs.config, *family, rest));
            desired.slots.insert(current, compile_slot(inputs, (*policy, exemptions.set_of(*policy)), *family, next));
            (id, policies) = (next, rest);
        }
    }
    desired.exits = compile_exits(inputs);
    desired.exempt.extend(exemptions.sets().map(|(set, prefix, kind)| Exemption { set, prefix, kind }));
    desired
}

/// The decisions, and the programs that take them.
fn compile_programs(inputs: &Inputs<'_>, fast: &FastInputs<'_>, exemptions: &Exemptions) -> DesiredFast {
    let mut desired = compile_decisions(inputs, fast.reverse_path, exemptions);
    desired.shadow = inputs.config.datapath == Datapath::Shadow;
    (desired.open, desired.unmatched) = (fast.open, fast.unmatched);
    if fast.unmatched.any() {
        let own = |own: &IpNet| Exemption { set: OWN_SET, prefix: *own, kind: Exempt::Anywhere };
        desired.exempt.extend(inputs.kernel.local.iter().map(own));
    }
    let returning = fast.returning.iter().filter_map(|index| inputs.kernel.links.get(index));
    let interfaces = &inputs.config.interfaces;
    desired.attachments.extend(
        matching(&interfaces.uplink, inputs.kernel)
            .filter_map(|link| Attachment::new(Part::Decide, Hook::Egress, link))
            .chain(
                matching(&interfaces.ingress, inputs.kernel)
                    .filter(|link| !fast.closed.contains(&link.index))
                    .chain(returning)
                    .filter_map(|link| Attachment::new(Part::Decide, Hook::Ingress, link)),
            ),
    );
    compile_xdp(inputs, fast, &mut desired);
    desired
}

/// The devices that take part in XDP and are not closed.
fn compile_xdp(inputs: &Inputs<'_>, fast: &FastInputs<'_>, desired: &mut DesiredFast) {
    for (ifindex, address) in fast.xdp.stations.iter().filter(|(ifindex, _)| !fast.closed.contains(*ifindex)) {
        let link = inputs.kernel.links.get(ifindex);
        if let Some(attachment) = link.and_then(|link| Attachment::new(Part::Xdp, Hook::Ingress, link)) {
            desired.attachments.insert(attachment);
            desired.stations.insert(*ifindex, Station { address: bytemuck::cast(*address), reserved: 0 });
        }
    }
}

/// The limits of what TCP tells through tunnels: in both directions, whichever datapath sends packets there.
fn compile_clamps(inputs: &Inputs<'_>, desired: &mut DesiredFast) {
    for tunnel in &inputs.config.tunnels {
        let (Some(mss), Some(link)) = (tunnel.mss, inputs.kernel.link(&tunnel.name)) else { continue };
        desired.clamps.insert(link.index, mss.clamp(link));
        desired.attachments.extend(Hook::ALL.iter().filter_map(|hook| Attachment::new(Part::Clamp, *hook, link)));
    }
}

/// The exits of all tunnels that policies may use.
fn compile_exits(inputs: &Inputs<'_>) -> BTreeMap<DeviceExit, Family> {
    let mut exits = BTreeMap::new();
    for policy in &inputs.config.policies {
        for (name, family) in policy.via.iter().flat_map(|name| Family::ALL.map(|family| (name, family))) {
            let tunnel = inputs.config.tunnels.iter().find(|tunnel| tunnel.name == *name);
            let exit =
                tunnel.zip(inputs.kernel.link(name)).and_then(|(tunnel, link)| exit(inputs, tunnel, link, family));
            if let Some(exit) = exit.filter(|_| policy.uses(family)) {
                exits.insert(exit, family);
            }
        }
    }
    exits
}

/// How packets of a family leave by a tunnel; none if the fast path does not know this kind of device.
fn exit(inputs: &Inputs<'_>, tunnel: &Tunnel, link: &Link, family: Family) -> Option<DeviceExit> {
    if link.layer == LinkLayer::Other {
        return None;
    }
    let gateway = tunnel.via(family);
    let answers = link.kind.as_deref().is_some_and(|kind| ANSWERING_KINDS.contains(&kind));
    let properties = [
        (link.layer == LinkLayer::Ethernet, flags::ETHERNET),
        (gateway.is_some(), flags::GATEWAY),
        (answers, flags::ANSWERS_TOO_BIG),
        (inputs.fast.is_some_and(|fast| fast.xdp.targets.contains(&link.index)), flags::TAKES_FRAMES),
    ];
    let flags = properties.into_iter().filter(|(is_so, _)| *is_so).fold(0, |all, (_, flag)| all | flag);
    let gateway = gateway.map(address_words).unwrap_or_default();
    Some(DeviceExit { ifindex: link.index, exit: Exit { mtu: link.mtu_of(family), flags, gateway } })
}

/// The slot of a policy, which comes with its exemption set.
fn compile_slot(
    inputs: &Inputs<'_>,
    (policy, exempt_set): (usize, u32),
    family: Family,
    next: Option<ChainId>,
) -> SlotSpec {
    let policy_config = &inputs.config.policies[policy];
    let active = active_tunnel(policy_config, family, inputs.config, inputs.kernel, inputs.failed);
    let exit = active.and_then(|(tunnel, link)| exit(inputs, tunnel, link, family));
    let on_down = match policy_config.on_down {
        _ if policy_config.main => Action::Main,
        // The rules know this device, the fast path does not: the kernel decides.
        _ if active.is_some() => Action::Reject,
        OnDown::Unreachable | OnDown::Prohibit => Action::Reject,
        OnDown::Blackhole => Action::Blackhole,
        OnDown::Next => Action::Next,
    };
    // Without a gateway, each destination is a neighbour that only the kernel's own forwarding looks for.
    let asks = exit.is_some_and(|exit| inputs.rules || exit.exit.has(flags::GATEWAY));
    let table = inputs.tables.get(&policy_config.name).copied().filter(|_| asks).unwrap_or_default();
    SlotSpec { policy, family, exit, on_down, disputed: false, exempt_set, next, table }
}

/// FNV-1a over the words and their ends. It must never change: pinned maps hold its results.
fn fnv1a<'a>(words: impl Iterator<Item = &'a str>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for word in words {
        for byte in word.bytes().chain([0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    hash
}
