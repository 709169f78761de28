//! Policies and the observed state in, desired state out: what both datapaths are to look like. Pure.

mod follow;
pub mod probes;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

pub use follow::follow;
use ipnet::IpNet;
use tunroute_common::maps::{Action, Clamp, Egress, Source, flags};

use crate::{
    config::{Config, Datapath, DevicePattern, OnDown, Policy, Tunnel},
    fast::{Attachment, Exemption, Hook, Open, Part, address_words},
    net::{Family, IfIndex, KernelState, Link, LinkLayer, MainRoute, Route, RouteKind, Rule},
};

/// The metric of the route that catches a policy's packets when no tunnel is up: the last one asked.
const LAST_METRIC: u32 = u32::MAX;

/// The drivers that answer a packet that is too big for the tunnel with an ICMP error of their own.
const ANSWERING_KINDS: [&str; 6] = ["sit", "gre", "ipip", "ip6tnl", "ip6gre", "vti"];

/// Everything that the desired state depends on.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The configuration, in which [`follow`] has entered what the interfaces have.
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
}

/// What both datapaths are to look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The rules.
    pub rules: BTreeSet<Rule>,
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
    /// The source prefixes: the chain and [`Source::arrives_by`].
    pub sources: BTreeMap<IpNet, (ChainId, u32)>,
    /// The exemptions.
    pub exempt: BTreeSet<Exemption>,
    /// The tunnels whose segment size is limited.
    pub clamps: BTreeMap<IfIndex, Clamp>,
    /// The programs.
    pub attachments: BTreeSet<Attachment>,
    /// What the ingress program may decide.
    pub open: Open,
    /// The programs only watch.
    pub shadow: bool,
}

impl DesiredFast {
    /// Leaves to the kernel what enters and belongs to these policies, by their indices in the configuration.
    pub fn dispute(&mut self, policies: &BTreeSet<usize>) {
        for slot in self.slots.values_mut().filter(|slot| policies.contains(&slot.policy)) {
            slot.egress = slot.egress.with(flags::DISPUTED);
        }
    }
}

/// Names a chain of nested policies in one family, the same in every run: a hash of the policies' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainId(pub u64);

/// What a slot is to hold, before it has a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSpec {
    /// The policy's index in the configuration, for the counters.
    pub policy: usize,
    /// The family.
    pub family: Family,
    /// What is done.
    pub egress: Egress,
    /// The tunnel's MTU.
    pub mtu: u32,
    /// The exemption set.
    pub exempt_set: u32,
    /// The chain of the policies around this one.
    pub next: Option<ChainId>,
    /// The gateway, as the maps hold it.
    pub gateway: [u32; 4],
}

/// Whether a tunnel can carry packets of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelState<'a> {
    /// It can.
    Up(&'a Link),
    /// The device is down.
    Down(&'a Link),
    /// The device is up, but its probe is not answered.
    Failed(&'a Link),
    /// There is no such device yet.
    Pending,
}

/// How a tunnel is, for a family.
#[must_use]
pub fn tunnel_state<'a>(
    name: &str,
    family: Family,
    kernel: &'a KernelState,
    failed: &BTreeSet<(String, Family)>,
) -> TunnelState<'a> {
    match kernel.link(name) {
        None => TunnelState::Pending,
        Some(link) if !link.up => TunnelState::Down(link),
        Some(link) if failed.contains(&(name.to_owned(), family)) => TunnelState::Failed(link),
        Some(link) => TunnelState::Up(link),
    }
}

/// The tunnel that carries a policy's packets of a family: the first in order of preference that is up.
#[must_use]
pub fn active_tunnel<'a>(
    policy: &Policy,
    family: Family,
    config: &'a Config,
    kernel: &'a KernelState,
    failed: &BTreeSet<(String, Family)>,
) -> Option<(&'a Tunnel, &'a Link)> {
    policy.via.iter().find_map(|name| match tunnel_state(name, family, kernel, failed) {
        TunnelState::Up(link) => Some((config.tunnels.iter().find(|tunnel| tunnel.name == *name)?, link)),
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
        for policy in &inputs.config.policies {
            let Some(table) = inputs.tables.get(&policy.name) else { continue };
            // Longest first: an ordered list that equals a longest-prefix match. IPv4 prefixes begin at the band's 96th
            // priority, which nothing minds.
            let priority = |prefix: &IpNet| inputs.config.band + u32::from(128 - prefix.prefix_len());
            let rule = |from: &IpNet| Rule { priority: priority(from), from: *from, oif: None, table: *table };
            desired.rules.extend(policy.sources().map(rule));
        }
    }
    desired.routes = compile_routes(inputs, &connected);
    desired.fast = inputs.fast.map(|fast| compile_fast(inputs, &fast, &connected));
    desired
}

impl Desired {
    /// Brings up to date what depends on the tunnels alone: routes and slots. It takes the same time however many
    /// prefixes there are. The configuration must be the one that this was compiled from.
    pub fn follow_tunnels(&mut self, inputs: &Inputs<'_>) {
        self.routes = compile_routes(inputs, &connected(inputs));
        for slot in self.fast.iter_mut().flat_map(|fast| fast.slots.values_mut()) {
            *slot = compile_slot(inputs, (slot.policy, slot.exempt_set), slot.family, slot.next);
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
    if inputs.rules {
        for policy in &inputs.config.policies {
            let Some(table) = inputs.tables.get(&policy.name) else { continue };
            for family in Family::ALL {
                compile_table(inputs, policy, family, *table, connected, &mut routes);
            }
        }
    }
    routes
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
    let shadow = inputs.config.datapath == Datapath::Shadow;
    let mut desired = DesiredFast { shadow, ..DesiredFast::default() };
    compile_clamps(inputs, &mut desired);
    if inputs.config.datapath == Datapath::Kernel {
        return desired;
    }
    desired.open = fast.open;
    let sets = exempt_sets(inputs.config);
    for family in Family::ALL {
        let chains = compile_sources(inputs, fast, family, &mut desired.sources);
        for (policies, id) in chains {
            // Every suffix is a chain of its own: it is where the one before goes on.
            let mut id = Some(id);
            let mut policies = policies.as_slice();
            while let (Some(current), [policy, rest @ ..]) = (id, policies) {
                let next = (!rest.is_empty()).then(|| chain_id(inputs.config, family, rest));
                desired.slots.insert(current, compile_slot(inputs, (*policy, sets[*policy]), family, next));
                (id, policies) = (next, rest);
            }
        }
    }
    for (policy, set) in inputs.config.policies.iter().zip(&sets) {
        let set = *set;
        for family in Family::ALL {
            let local = inputs.kernel.local.iter().copied().filter(|dst| Family::of(dst) == family);
            desired
                .exempt
                .extend(exempt(policy, family, connected).chain(local).map(|prefix| Exemption { set, prefix }));
        }
    }
    let interfaces = &inputs.config.interfaces;
    desired.attachments.extend(
        matching(&interfaces.uplink, inputs.kernel)
            .filter_map(|link| Attachment::new(Part::Decide, Hook::Egress, link))
            .chain(
                matching(&interfaces.ingress, inputs.kernel)
                    .filter(|link| !fast.closed.contains(&link.index))
                    .filter_map(|link| Attachment::new(Part::Decide, Hook::Ingress, link)),
            ),
    );
    desired
}

/// The limits of what TCP tells through tunnels: in both directions, whichever datapath sends packets there.
fn compile_clamps(inputs: &Inputs<'_>, desired: &mut DesiredFast) {
    for tunnel in &inputs.config.tunnels {
        let (Some(mss), Some(link)) = (tunnel.mss, inputs.kernel.link(&tunnel.name)) else { continue };
        desired.clamps.insert(link.index, mss.clamp(link));
        desired.attachments.extend(Hook::ALL.iter().filter_map(|hook| Attachment::new(Part::Clamp, *hook, link)));
    }
}

/// Enters a family's source prefixes, and returns the chains of policies that they need.
fn compile_sources(
    inputs: &Inputs<'_>,
    fast: &FastInputs<'_>,
    family: Family,
    sources: &mut BTreeMap<IpNet, (ChainId, u32)>,
) -> HashMap<Vec<usize>, ChainId> {
    let reverse = (fast.reverse_path && family == Family::V4).then(|| ReversePaths::new(&inputs.kernel.main));
    let mut prefixes: Vec<(IpNet, Event)> = Vec::new();
    for (index, policy) in inputs.config.policies.iter().enumerate() {
        let of_family = policy.sources().filter(|prefix| Family::of(prefix) == family);
        prefixes.extend(of_family.map(|prefix| (*prefix, Event::Policy(index))));
    }
    // What splits a policy's prefix, because packets from a part of it must arrive elsewhere, or nowhere.
    let of_family = |prefix: &&IpNet| Family::of(prefix) == family;
    prefixes.extend(inputs.kernel.local.iter().filter(of_family).map(|own| (*own, Event::Own)));
    if reverse.is_some() {
        let of_family = inputs.kernel.main.iter().filter(|route| Family::of(&route.dst) == family);
        prefixes.extend(of_family.map(|route| (route.dst, Event::Reverse)));
    }
    // A shorter prefix stands before the longer ones inside it; the policy of a prefix before what splits it.
    prefixes.sort_unstable_by_key(|(prefix, event)| (*prefix, event.order()));

    let mut chains = HashMap::new();
    let mut around: Vec<(IpNet, Vec<usize>, ChainId)> = Vec::new();
    for (prefix, event) in prefixes {
        while around.last().is_some_and(|(outer, ..)| !outer.contains(&prefix)) {
            around.pop();
        }
        if let Event::Policy(policy) = event {
            let mut chain = vec![policy];
            if let Some((_, outer, _)) = around.last() {
                // A policy that was passed over once would be passed over again.
                chain.extend(outer.iter().copied().filter(|outer| *outer != policy));
            }
            let id = *chains.entry(chain.clone()).or_insert_with(|| chain_id(inputs.config, family, &chain));
            around.push((prefix, chain, id));
        }
        let Some((_, _, id)) = around.last() else { continue };
        let arrives_by = match (event, &reverse) {
            (Event::Own, _) => Source::OWN_ADDRESS,
            (Event::Policy(_) | Event::Reverse, None) => Source::ANY_DEVICE,
            (Event::Policy(_) | Event::Reverse, Some(reverse)) => reverse.device(&prefix),
        };
        sources.insert(prefix, (*id, arrives_by));
    }
    chains
}

/// Why a prefix stands among the sources.
#[derive(Clone, Copy)]
enum Event {
    /// A policy's prefix.
    Policy(usize),
    /// A route of the main table ends here: the reverse path is another inside.
    Reverse,
    /// An address of this host.
    Own,
}

impl Event {
    const fn order(&self) -> u8 {
        match self {
            Self::Policy(_) => 0,
            Self::Reverse => 1,
            Self::Own => 2,
        }
    }
}

/// The main table, asked the other way round: by which device are a source's packets expected?
struct ReversePaths(BTreeMap<IpNet, Option<IfIndex>>);

impl ReversePaths {
    fn new(main: &[MainRoute]) -> Self {
        let mut paths = BTreeMap::new();
        for route in main {
            // Two routes to one prefix: whichever the kernel prefers, neither is certain.
            paths.entry(route.dst).and_modify(|oif| *oif = None).or_insert(route.oif);
        }
        Self(paths)
    }

    /// [`Source::arrives_by`] for the sources of a prefix that no route of the table splits.
    fn device(&self, prefix: &IpNet) -> u32 {
        let mut candidate = Some(*prefix);
        while let Some(current) = candidate {
            if let Some(oif) = self.0.get(&current.trunc()) {
                return oif.unwrap_or(Source::OWN_ADDRESS);
            }
            candidate = current.supernet();
        }
        // No route back: the kernel decides.
        Source::OWN_ADDRESS
    }
}

/// The slot of a policy, which comes with its exemption set.
fn compile_slot(
    inputs: &Inputs<'_>,
    (policy, exempt_set): (usize, u32),
    family: Family,
    next: Option<ChainId>,
) -> SlotSpec {
    let policy_config = &inputs.config.policies[policy];
    let spec = |egress, mtu, gateway: Option<IpAddr>| SlotSpec {
        policy,
        family,
        egress,
        mtu,
        exempt_set,
        next,
        gateway: gateway.map(address_words).unwrap_or_default(),
    };
    match active_tunnel(policy_config, family, inputs.config, inputs.kernel, inputs.failed) {
        Some((tunnel, link)) if link.layer != LinkLayer::Other => {
            let gateway = tunnel.via(family);
            let answers = link.kind.as_deref().is_some_and(|kind| ANSWERING_KINDS.contains(&kind));
            let flags = [
                (link.layer == LinkLayer::Ethernet, flags::ETHERNET),
                (gateway.is_some(), flags::GATEWAY),
                (answers, flags::ANSWERS_TOO_BIG),
            ];
            let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
            spec(Egress::redirect(link.index, flags), link.mtu_of(family), gateway)
        }
        // The rules know this device, the fast path does not: the kernel decides.
        Some(_) => spec(Egress::down(Action::Reject), 0, None),
        None => {
            let action = match policy_config.on_down {
                OnDown::Unreachable | OnDown::Prohibit => Action::Reject,
                OnDown::Blackhole => Action::Blackhole,
                OnDown::Next => Action::Next,
            };
            spec(Egress::down(action), 0, None)
        }
    }
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
        while taken.get(&set).is_some_and(|other| *other != declared) {
            set = set.wrapping_add(1);
        }
        taken.entry(set).or_insert(declared);
        set
    };
    config.policies.iter().map(set).collect()
}

fn chain_id(config: &Config, family: Family, policies: &[usize]) -> ChainId {
    let family = match family {
        Family::V4 => "v4",
        Family::V6 => "v6",
    };
    let names = policies.iter().map(|policy| config.policies[*policy].name.as_str());
    // 0 marks a free slot.
    ChainId(fnv1a(std::iter::once(family).chain(names)).max(1))
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
