//! Policies and the observed state in, desired state out: what both datapaths are to look like. Pure.

mod follow;
pub mod probes;
pub mod sources;
pub mod tree;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

pub use follow::follow;
use ipnet::IpNet;
use tunroute_common::maps::{Action, Clamp, Exit, OWN_SET, Station, flags};

pub use self::sources::{Chain, ChainId, Lead, Sources};
use crate::{
    config::{Config, Datapath, DevicePattern, OnDown, Policy, Tunnel},
    policy::ability::inability,
    policy::fast::{Attachment, DeviceExit, Exemption, Hook, Open, Part, address_words},
    policy::net::{
        Family, IfIndex, Inability, KernelState, Link, LinkLayer, MainRoute, Route, RouteKind, Rule, RuleAction,
    },
    policy::xdp,
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
    /// The policies' rules and tables are to be installed.
    pub rules: bool,
    /// The fast path, if there is to be one.
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
    /// The families of which it may forward by the main table what no policy is about.
    pub unmatched: Open,
    /// Tunnels where such packets come back, to be forwarded likewise.
    pub returning: &'a BTreeSet<IfIndex>,
    /// Who takes part in XDP.
    pub xdp: &'a xdp::Chosen,
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
    /// The fast path; none if there is to be nothing of it.
    pub fast: Option<DesiredFast>,
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
    /// What is done while there is none.
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

/// The existing devices that match one of the patterns.
pub fn matching<'a>(patterns: &'a [DevicePattern], kernel: &'a KernelState) -> impl Iterator<Item = &'a Link> {
    kernel.links.values().filter(|link| patterns.iter().any(|pattern| pattern.matches(&link.name)))
}

/// Compiles the configuration against what is observed.
#[must_use]
pub fn compile(inputs: &Inputs<'_>) -> Desired {
    let connected = connected(inputs);
    let mut desired = Desired { rules: probes::rules(inputs), ..Desired::default() };
    if inputs.rules {
        for family in Family::ALL {
            compile_rules(inputs, family, &mut desired);
        }
    }
    desired.routes = compile_routes(inputs, &connected);
    desired.fast = inputs.fast.map(|fast| compile_fast(inputs, &fast, &connected));
    desired
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
    let band = inputs.config.band;
    let mut sources: Vec<(IpNet, u32)> = Vec::new();
    for policy in &inputs.config.policies {
        let Some(table) = inputs.tables.get(&policy.name) else { continue };
        let of_family = policy.sources().filter(|prefix| Family::of(prefix) == family);
        sources.extend(of_family.map(|prefix| (*prefix, *table)));
    }
    if wants_tree(inputs.config, family) {
        sources.sort_unstable();
        if let Some(rules) = tree::rules(&sources, tree::room(band, family, &inputs.kernel.rules)) {
            desired.rules.extend(rules);
            desired.trees.insert(family);
            return;
        }
    }
    // Longest first: an ordered list that equals a longest-prefix match. IPv4 prefixes begin at the band's 96th priority,
    // which nothing minds.
    let priority = |prefix: &IpNet| band + u32::from(128 - prefix.prefix_len());
    let rule = |(from, table): (IpNet, u32)| Rule::new(priority(&from), from, RuleAction::Lookup(table));
    desired.rules.extend(sources.into_iter().map(rule));
}

impl Desired {
    /// Brings up to date what depends on the tunnels alone: routes and slots. It takes the same time however many
    /// prefixes there are. The configuration must be the one that this was compiled from.
    pub fn follow_tunnels(&mut self, inputs: &Inputs<'_>) {
        self.routes = compile_routes(inputs, &connected(inputs));
        let Some(fast) = &mut self.fast else { return };
        for slot in fast.slots.values_mut() {
            *slot = compile_slot(inputs, (slot.policy, slot.exempt_set), slot.family, slot.next);
        }
        if !fast.slots.is_empty() {
            fast.exits = compile_exits(inputs);
        }
    }
}

/// The on-link prefixes of the ingress devices.
fn connected(inputs: &Inputs<'_>) -> BTreeSet<IpNet> {
    let ingress: BTreeSet<IfIndex> =
        matching(&inputs.config.interfaces.ingress, inputs.kernel).map(|link| link.index).collect();
    let on_ingress = |route: &&MainRoute| route.on_link && route.oif.is_some_and(|oif| ingress.contains(&oif));
    inputs.kernel.main.iter().filter(on_ingress).map(|route| route.dst).filter(|dst| dst.prefix_len() > 0).collect()
}

/// The destinations that a policy does not apply to, in one family.
fn exempt<'a>(
    policy: &'a Policy,
    family: Family,
    connected: &'a BTreeSet<IpNet>,
) -> impl Iterator<Item = IpNet> + use<'a> {
    let connected = policy.exempt_connected.then_some(connected);
    policy.exempt.iter().chain(connected.into_iter().flatten()).copied().filter(move |dst| Family::of(dst) == family)
}

/// The routes of all tables, the policies' and the probes'.
fn compile_routes(inputs: &Inputs<'_>, connected: &BTreeSet<IpNet>) -> BTreeSet<Route> {
    let mut routes = probes::routes(inputs);
    for policy in &inputs.config.policies {
        let Some(table) = inputs.tables.get(&policy.name) else { continue };
        if !inputs.rules && !asks_for_neighbours(inputs, policy) {
            continue;
        }
        for family in Family::ALL {
            compile_table(inputs, policy, family, *table, connected, &mut routes);
        }
    }
    routes
}

/// Do programs ask the kernel for link-layer addresses by the policy's table, whether rules lead there or not?
fn asks_for_neighbours(inputs: &Inputs<'_>, policy: &Policy) -> bool {
    let links = || policy.via.iter().filter_map(|tunnel| inputs.kernel.link(tunnel));
    inputs.fast.is_some() && links().any(|link| link.layer == LinkLayer::Ethernet)
}

/// A policy's routes in one family.
fn compile_table(
    inputs: &Inputs<'_>,
    policy: &Policy,
    family: Family,
    table: u32,
    connected: &BTreeSet<IpNet>,
    routes: &mut BTreeSet<Route>,
) {
    if !policy.uses(family) {
        return;
    }
    let mut default_exempt = false;
    for dst in exempt(policy, family, connected) {
        default_exempt |= dst.prefix_len() == 0;
        routes.insert(Route { table, dst, metric: family.default_metric(), kind: RouteKind::Throw });
    }
    let dst = family.default_prefix();
    if let Some((tunnel, link)) = active_tunnel(policy, family, inputs.config, inputs.kernel, inputs.failed)
        && !default_exempt
    {
        let kind = RouteKind::Unicast { oif: link.index, device: link.name.clone(), gateway: tunnel.via(family) };
        routes.insert(Route { table, dst, metric: family.default_metric(), kind });
    }
    let on_down = match policy.on_down {
        OnDown::Unreachable => RouteKind::Unreachable,
        OnDown::Blackhole => RouteKind::Blackhole,
        OnDown::Prohibit => RouteKind::Prohibit,
        OnDown::Next => return,
    };
    routes.insert(Route { table, dst, metric: LAST_METRIC, kind: on_down });
}

fn compile_fast(inputs: &Inputs<'_>, fast: &FastInputs<'_>, connected: &BTreeSet<IpNet>) -> DesiredFast {
    let mut desired = match inputs.config.datapath {
        Datapath::Kernel => DesiredFast::default(),
        Datapath::Both | Datapath::Ebpf | Datapath::Shadow => compile_programs(inputs, fast, connected),
    };
    compile_clamps(inputs, &mut desired);
    desired
}

/// What is decided on each source and destination, whichever datapath is configured: sources, slots and exemptions.
#[must_use]
pub fn decisions(inputs: &Inputs<'_>, reverse_path: bool) -> DesiredFast {
    compile_decisions(inputs, reverse_path, &connected(inputs))
}

fn compile_decisions(inputs: &Inputs<'_>, reverse_path: bool, connected: &BTreeSet<IpNet>) -> DesiredFast {
    let mut desired = DesiredFast { sources: Sources::compile(inputs, reverse_path), ..DesiredFast::default() };
    let sets = exempt_sets(inputs.config);
    for Chain { id, family, policies } in desired.sources.chains() {
        // Every suffix is a chain of its own: it is where the one before goes on.
        let mut id = Some(*id);
        let mut policies = policies.as_slice();
        while let (Some(current), [policy, rest @ ..]) = (id, policies) {
            let next = (!rest.is_empty()).then(|| ChainId::new(inputs.config, *family, rest));
            desired.slots.insert(current, compile_slot(inputs, (*policy, sets[*policy]), *family, next));
            (id, policies) = (next, rest);
        }
    }
    desired.exits = compile_exits(inputs);
    for (policy, set) in inputs.config.policies.iter().zip(&sets) {
        let set = *set;
        for family in Family::ALL {
            let local = inputs.kernel.local.iter().copied().filter(|dst| Family::of(dst) == family);
            desired
                .exempt
                .extend(exempt(policy, family, connected).chain(local).map(|prefix| Exemption { set, prefix }));
        }
    }
    desired
}

/// The decisions, and the programs that take them.
fn compile_programs(inputs: &Inputs<'_>, fast: &FastInputs<'_>, connected: &BTreeSet<IpNet>) -> DesiredFast {
    let mut desired = compile_decisions(inputs, fast.reverse_path, connected);
    desired.shadow = inputs.config.datapath == Datapath::Shadow;
    (desired.open, desired.unmatched) = (fast.open, fast.unmatched);
    if fast.unmatched.any() {
        desired.exempt.extend(inputs.kernel.local.iter().map(|own| Exemption { set: OWN_SET, prefix: *own }));
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

/// Who takes part in XDP, of the devices that are not closed.
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

/// The exemption set of each policy. Policies with the same exemptions share one; it is named by what is declared, so that
/// it stays the same while the connected prefixes change.
fn exempt_sets(config: &Config) -> Vec<u32> {
    let mut taken: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    let set = |policy: &Policy| {
        let mut declared: Vec<String> = policy.exempt.iter().map(ToString::to_string).collect();
        declared.sort_unstable();
        if policy.exempt_connected {
            declared.push("connected".to_owned());
        }
        let mut set = u32::try_from(fnv1a(declared.iter().map(String::as_str)) >> 32).unwrap_or_default();
        // One policy's exemption must not become another's because of a hash.
        while set == OWN_SET || taken.get(&set).is_some_and(|other| *other != declared) {
            set = set.wrapping_add(1);
        }
        taken.entry(set).or_insert(declared);
        set
    };
    config.policies.iter().map(set).collect()
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
