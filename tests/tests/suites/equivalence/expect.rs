//! What must become of a packet: told from the rule walk, the configuration and the packet, never from the fast path.
//!
//! The fast path may leave a packet to the kernel only for a reason that is given here. A program that always stepped aside
//! would agree with every kernel, and would fail here.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use tunroute::{
    config::{OnDown, Policy, Unmatched, Xdp},
    policy::compile::{ChainId, Desired, FastInputs, Inputs, active_tunnel, compile},
    policy::fast::{DeviceExit, FastState, Open},
    policy::gates::{GateInput, GateReport, Probes, gates, main_decides},
    policy::net::{Family, IfIndex, KernelState, LinkLayer, Route, RouteKind},
    policy::plan::{Op, plan},
    policy::xdp_devices::Chosen,
};
use tunroute_common::{
    decide::{Arrival, Verdict},
    maps::{Outcome, Slot},
};
use tunroute_tests::{
    rule_walk::{self, Decision, Entry, Host},
    snapshot::has_tcx,
};

use super::{
    intent::{Intent, Way},
    packet::Packet,
    router::{is_own, macs},
    scenario::{BAND, DEVICES, Foreign, Scenario, TUNNELS, UPLINK, special},
};

/// What becomes of a packet. The first part of each is the policy that it is counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// No policy's business.
    Pass,
    /// Left to the kernel.
    Aside(usize, Outcome),
    /// Dropped.
    Drop(usize, Outcome),
    /// Handed to this device, for this gateway.
    Redirect(usize, Outcome, IfIndex, Option<IpAddr>),
}

/// Who takes part in XDP on a router, where that is on.
fn early(scenario: &Scenario, kernel: &KernelState) -> Chosen {
    let mut chosen = Chosen::default();
    // It takes Linux 6.5; the next one that is tested has TCX, too.
    if scenario.config.xdp != Xdp::On || !has_tcx() {
        return chosen;
    }
    for (device, _) in DEVICES.iter().filter(|(_, layer)| *layer == LinkLayer::Ethernet) {
        let Some(link) = kernel.link(device) else { continue };
        if TUNNELS.contains(device) {
            chosen.targets.insert(link.index);
        } else if device.starts_with("lan") {
            let [near, _] = macs(device);
            chosen.stations.insert(link.index, near.0);
        }
    }
    chosen
}

/// What the gates say of a host, as the daemon asks them.
struct Gated {
    report: GateReport,
    open: Open,
    /// The ingress devices that are closed for both families: no program is there.
    closed: BTreeSet<IfIndex>,
}

impl Gated {
    fn new(scenario: &Scenario, kernel: &KernelState) -> Self {
        let all: Vec<IfIndex> = kernel.links.keys().copied().collect();
        let forwards = |device: &str| Family::ALL.map(|family| scenario.has(device, family));
        let forwarding = kernel.links.values().map(|link| (link.index, forwards(&link.name)));
        let report = gates(&GateInput {
            state: kernel,
            probes: &Probes::new(forwarding.collect()),
            ingress: &all,
            last: BAND.1,
            policies: &scenario.config.policies,
            bypass_netfilter: false,
        });
        let ingress = ["lan0", "lan1"].iter().filter_map(|name| Some(kernel.link(name)?.index));
        let is_closed = |index: &IfIndex| !Family::ALL.into_iter().any(|family| report.is_open(*index, family));
        let (closed, deciding): (BTreeSet<IfIndex>, BTreeSet<IfIndex>) = ingress.partition(is_closed);
        let open = |family| !deciding.is_empty() && deciding.iter().all(|index| report.is_open(*index, family));
        let [v4, v6] = scenario.open;
        let open = Open { v4: v4 && open(Family::V4), v6: v6 && open(Family::V6) };
        Self { report, open, closed }
    }
}

/// A scenario, compiled, in the sight of both datapaths.
pub struct Situation<'a> {
    pub scenario: &'a Scenario,
    pub kernel: &'a KernelState,
    pub desired: Desired,
    /// The policies' tables: the policy's index in the configuration.
    policies: BTreeMap<u32, usize>,
    failed: BTreeSet<(String, Family)>,
    gated: Gated,
    /// The compiled rules and routes beside everybody else's.
    pub host: Host,
    /// The same without other people's rules.
    alone: Host,
    /// The same as a guard sees it: besides, what leads inside is not exempt where a packet leaves by an uplink.
    guarded: Host,
    intent: Intent<'a>,
}

impl<'a> Situation<'a> {
    /// Compiles a scenario against what is, or might be, observed of its host.
    pub fn new(scenario: &'a Scenario, kernel: &'a KernelState) -> Self {
        let (tables, failed) = (scenario.tables(), scenario.failed());
        let gated = Gated::new(scenario, kernel);
        let Open { v4, v6 } = gated.open;
        let fast = scenario.config.unmatched == Unmatched::Fast;
        let unmatched =
            |family| fast && !(family == Family::V4 && scenario.reverse_path) && main_decides(kernel, family);
        let unmatched = Open { v4: v4 && unmatched(Family::V4), v6: v6 && unmatched(Family::V6) };
        let tunnels = kernel.links.values().filter(|link| TUNNELS.contains(&link.name.as_str()));
        let xdp = early(scenario, kernel);
        let certain = |index| Family::ALL.into_iter().all(|family| gated.report.is_open(index, family));
        let returning =
            tunnels.map(|link| link.index).filter(|index| fast && !scenario.reverse_path && certain(*index)).collect();
        let desired = compile(&Inputs {
            config: &scenario.config,
            kernel,
            tables: &tables,
            failed: &failed,
            rules: true,
            fast: Some(FastInputs {
                open: gated.open,
                closed: &gated.closed,
                reverse_path: scenario.reverse_path,
                unmatched,
                returning: &returning,
                xdp: &xdp,
            }),
            before: None,
        });
        let others = scenario.others.iter().map(|rule| rule.entry.clone());
        let number = |policy: &Policy| tables.get(&policy.name).copied();
        let policies = scenario.config.policies.iter().map(number).zip(0..);
        let policies: BTreeMap<u32, usize> = policies.filter_map(|(table, index)| Some((table?, index))).collect();
        let may_leave = |route: &&Route| {
            let policy = policies.get(&route.table).map(|policy| &scenario.config.policies[*policy]);
            route.kind != RouteKind::Throw || policy.is_none_or(|policy| leaves_anywhere(policy, &route.dst, kernel))
        };
        let is_multicast = |own: &&IpNet| own.addr().is_multicast();
        let of_uplink = |own: &&IpNet| networks_of_uplink(kernel).any(|network| network.contains(*own));
        let local = kernel.local.iter().filter(|own| is_multicast(own) || of_uplink(own)).copied().collect();
        let outside = KernelState { local, ..kernel.clone() };
        let rules = || desired.rules.iter().map(Into::into);
        let alone = Host::new(rules(), &desired.routes, kernel).with_others(scenario.local_rule, [], []);
        let guarded = Host::new(rules(), desired.routes.iter().filter(may_leave), &outside);
        Self {
            scenario,
            kernel,
            guarded: guarded.with_others(scenario.local_rule, [], []),
            policies,
            failed,
            gated,
            host: Host::new(rules(), &desired.routes, kernel).with_others(
                scenario.local_rule,
                others,
                scenario.others_routes(kernel),
            ),
            alone,
            intent: Intent::new(scenario, kernel),
            desired,
        }
    }

    /// Fails where the kernel's rules, or what becomes of a packet besides, differ from what is meant.
    pub fn check_intent(&self, packet: &Packet, fate: Fate) -> Result<(), String> {
        let Packet { source, destination, .. } = *packet;
        let Way::Goes(meant) = self.intent.way(&self.as_seen(packet)) else { return Ok(()) };
        if special(source) || special(destination) {
            return Ok(());
        }
        let walk = self.walk(packet);
        let same = |one: Decision| match (one, meant) {
            (Decision::Leaves { device: one, .. }, Decision::Leaves { device: other, .. }) => one == other,
            _ => one == meant,
        };
        if !same(walk.decision) {
            return Err(format!("by the rules {walk:?}, and meant is {meant:?}"));
        }
        let right = match fate {
            Fate::Pass | Fate::Aside(..) => true,
            Fate::Drop(..) => meant == Decision::Blackhole,
            Fate::Redirect(_, _, device, _) => same(Decision::Leaves { device: Some(device), gateway: None }),
        };
        if right { Ok(()) } else { Err(format!("{fate:?}, and meant is {meant:?}")) }
    }

    /// What a plan from nothing writes to the maps.
    pub fn fast_state(&self) -> FastState {
        let mut state = FastState::default();
        let nothing = KernelState::default();
        for operation in plan(&self.desired, &nothing, Some(&state.clone())).expect("it fits the maps") {
            if let Op::Fast(operation) = operation {
                state.enter(&operation);
            }
        }
        state
    }

    /// Does no program of this kind ever see the packet? What is sent to this host does not leave it. And a program that is at
    /// no ingress device is asked nevertheless, unless a rule of others is about that device.
    pub fn unseen(&self, program: &str, packet: &Packet) -> bool {
        let index = self.ifindex(packet.device);
        let ingress = packet.device.starts_with("lan");
        match program {
            "egress" => is_own(self.scenario, packet.destination),
            _ => self.gated.closed.contains(&index) || !ingress && !self.gated.report.is_open(index, packet.family()),
        }
    }

    /// How the packet arrives.
    pub fn arrival(&self, packet: &Packet) -> Arrival {
        Arrival {
            ethertype: packet.ethertype,
            ifindex: self.ifindex(packet.device),
            to_this_host: packet.to_this_host(),
            tagged: packet.tagged(),
        }
    }

    /// A device's number.
    pub fn ifindex(&self, device: &str) -> IfIndex {
        self.kernel.link(device).expect("every device is there").index
    }

    /// What a verdict comes to.
    pub fn fate(&self, verdict: Verdict<'_>, state: &FastState) -> Fate {
        match verdict {
            Verdict::Pass | Verdict::Forward(_) => Fate::Pass,
            Verdict::StepAside(index, outcome) => Fate::Aside(self.policy_of(index, state), outcome),
            Verdict::Drop(index, outcome) => Fate::Drop(self.policy_of(index, state), outcome),
            Verdict::Redirect(index, way, outcome) => {
                let exit = DeviceExit { ifindex: way.ifindex, exit: *way.exit };
                self.redirect(index, &exit, outcome, state)
            }
        }
    }

    /// The fate of a packet that is handed to a slot's exit.
    pub fn redirect(&self, index: u32, exit: &DeviceExit, outcome: Outcome, state: &FastState) -> Fate {
        let policy = self.policy_of(index, state);
        let chain = state.slots.get(&index).map(|slot| ChainId(slot.id));
        let spec = chain.and_then(|chain| self.desired.fast.as_ref()?.slots.get(&chain));
        Fate::Redirect(policy, outcome, exit.ifindex, spec.and_then(|spec| exit.gateway(spec.family)))
    }

    /// The policy that a slot counts for.
    pub fn policy_of(&self, index: u32, state: &FastState) -> usize {
        let spec = |slot: &Slot| Some(self.desired.fast.as_ref()?.slots.get(&ChainId(slot.id))?.policy);
        state.slots.get(&index).and_then(spec).expect("every slot in use is a chain's")
    }

    /// The policy with the longest prefix that holds an address.
    fn policy_from(&self, address: IpAddr) -> Option<usize> {
        let policies = self.scenario.config.policies.iter().enumerate();
        let from = policies.flat_map(|(index, policy)| policy.from.iter().map(move |prefix| (prefix, index)));
        from.filter(|(prefix, _)| prefix.contains(&address))
            .max_by_key(|(prefix, _)| prefix.prefix_len())
            .map(|(_, i)| i)
    }

    /// What the rules make of the packet's addresses.
    pub fn walk(&self, packet: &Packet) -> rule_walk::Outcome {
        self.host.walk(&self.as_seen(packet))
    }

    /// The packet, as rules see it. One from an address of this host has not come in.
    fn as_seen(&self, packet: &Packet) -> rule_walk::Packet<'static> {
        let Packet { source, destination, device, .. } = *packet;
        let iif = (!is_own(self.scenario, source)).then_some(device);
        rule_walk::Packet { source, destination, iif, oif: None }
    }

    /// Do rules of others send the packet another way?
    pub fn others_decide(&self, packet: &Packet) -> bool {
        let seen = self.as_seen(packet);
        self.host.walk(&seen) != self.alone.walk(&seen)
    }

    /// What the guard at an uplink makes of the packet's addresses.
    pub fn guarded(&self, packet: &Packet) -> rule_walk::Outcome {
        self.guarded.walk(&self.as_seen(packet))
    }

    /// Why the packet's policy does not apply, if none does.
    fn none_applies(&self, first: usize, family: Family) -> Fate {
        let policy = &self.scenario.config.policies[first];
        let up = active_tunnel(policy, family, &self.scenario.config, self.kernel, &self.failed).is_some();
        let outcome = match policy.on_down {
            _ if policy.main => Outcome::Main,
            OnDown::Next if !up => Outcome::Down,
            _ => Outcome::Exempt,
        };
        Fate::Aside(first, outcome)
    }

    /// The device's MTU.
    fn mtu(&self, device: IfIndex, family: Family) -> usize {
        self.kernel.links[&device].mtu_of(family) as usize
    }

    /// What the ingress program must do.
    pub fn ingress(&self, packet: &Packet) -> Fate {
        let Packet { source, destination, .. } = *packet;
        if !packet.is_plain() || special(source) || special(destination) || packet.is_discovery() {
            return Fate::Pass;
        }
        let Some(first) = self.policy_from(source) else { return Fate::Pass };
        let family = packet.family();
        if !self.gated.open.family(family) {
            return Fate::Aside(first, Outcome::Closed);
        }
        let walk = self.walk(packet);
        let Some(policy) = walk.table.and_then(|table| self.policies.get(&table)).copied() else {
            return self.none_applies(first, family);
        };
        if !self.may_arrive(packet) {
            return Fate::Aside(policy, Outcome::SourceCheck);
        }
        match walk.decision {
            Decision::Leaves { device: Some(device), gateway } => {
                if device == self.ifindex(packet.device) {
                    Fate::Aside(policy, Outcome::Hairpin)
                } else if packet.hop_limit <= 1 {
                    Fate::Aside(policy, Outcome::Expired)
                } else if packet.length_on_wire().is_none_or(|length| length > self.mtu(device, family)) {
                    Fate::Aside(policy, Outcome::TooBig)
                } else {
                    Fate::Redirect(policy, Outcome::Forwarded, device, gateway)
                }
            }
            Decision::Blackhole => Fate::Drop(policy, Outcome::Blackholed),
            Decision::Unreachable | Decision::Prohibit => Fate::Aside(policy, Outcome::Down),
            other => unreachable!("no table of a policy says {other:?}"),
        }
    }

    /// May the fast path believe the source? It must where the kernel does, but for what it cannot know: with rp_filter, a
    /// way back by policy, by a rule of others, or by one of several routes.
    fn may_arrive(&self, packet: &Packet) -> bool {
        let Packet { source, destination, .. } = *packet;
        if self.kernel.local.iter().any(|own| own.contains(&source)) {
            return false;
        }
        if packet.family() == Family::V6 || !self.scenario.reverse_path {
            return true;
        }
        let others = |rule: &Foreign| {
            let Foreign { entry: Entry { from, oif, .. }, .. } = rule;
            Family::of(from) == Family::V4 && oif.is_none() && rule.entry.priority < 32766
        };
        self.policy_from(destination).is_none()
            && !self.scenario.others.iter().any(others)
            && self.is_only_way_back(source)
            && self.host.believes(source, destination, self.ifindex(packet.device), None, true) == Some(true)
    }

    /// Has the main table one route back to the source, of one next hop?
    fn is_only_way_back(&self, source: IpAddr) -> bool {
        let mut ways: Vec<(IpNet, Option<IfIndex>)> = self
            .kernel
            .main
            .iter()
            .map(|route| (route.dst, route.oif))
            .filter(|(dst, _)| dst.contains(&source))
            .collect();
        ways.sort_by_key(|(dst, _)| std::cmp::Reverse(dst.prefix_len()));
        match ways.as_slice() {
            [(_, None), ..] => false,
            [(first, _), (second, _), ..] => first != second,
            _ => true,
        }
    }

    /// What the egress program of a device must do.
    pub fn egress(&self, packet: &Packet) -> Fate {
        let Packet { source, destination, .. } = *packet;
        if !packet.is_readable() || stays_on_link(destination) || (packet.hop_limit == 255 && packet.is_discovery()) {
            return Fate::Pass;
        }
        let Some(first) = self.policy_from(source) else { return Fate::Pass };
        let family = packet.family();
        let walk = self.guarded(packet);
        let Some(policy) = walk.table.and_then(|table| self.policies.get(&table)).copied() else {
            return self.none_applies(first, family);
        };
        match walk.decision {
            Decision::Leaves { device: Some(device), gateway }
                if device != self.ifindex(packet.device) && !packet.tagged() && self.takes(device, packet) =>
            {
                Fate::Redirect(policy, Outcome::Diverted, device, gateway)
            }
            _ => Fate::Drop(policy, Outcome::LeakPrevented),
        }
    }

    /// Does a tunnel take the packet, or answer that it is too big? One whose segments cannot be told has passed the stack,
    /// and is the tunnel's either way.
    fn takes(&self, device: IfIndex, packet: &Packet) -> bool {
        self.kernel.links[&device].kind.as_deref() == Some("sit")
            || packet.length_on_wire().is_none_or(|length| length <= self.mtu(device, packet.family()))
    }
}

/// The networks on the link at the uplink.
fn networks_of_uplink(kernel: &KernelState) -> impl Iterator<Item = &IpNet> {
    let uplink = kernel.link(UPLINK).map(|link| link.index);
    kernel.main.iter().filter(move |route| route.network && route.oif == uplink).map(|route| &route.dst)
}

/// May packets of a policy for an exempt destination leave by an uplink?
fn leaves_anywhere(policy: &Policy, dst: &IpNet, kernel: &KernelState) -> bool {
    policy.exempt.iter().any(|exempt| exempt.contains(dst))
        || policy.exempt_connected
            && policy.allow_default
            && networks_of_uplink(kernel).any(|network| network.contains(dst))
}

/// The destination is on the link that the packet is sent on, whatever rules say.
fn stays_on_link(destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(address) => address.is_loopback() || address.is_multicast() || address.is_broadcast(),
        IpAddr::V6(address) => {
            address.is_loopback()
                || address.is_unspecified()
                || address.is_multicast()
                || address.is_unicast_link_local()
        }
    }
}
