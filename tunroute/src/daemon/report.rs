//! The daemon's answer to `status`.

use std::{collections::BTreeMap, path::Path};

use tracing::warn;
use tunroute_common::maps::{Clamp, Counter, MAX_SLOTS, Outcome, Stats, names};

use super::Daemon;
use crate::{
    config::{Datapath, DevicePattern, OnDown, Policy},
    control::status::{FastPathStatus, KernelStatus, MapStatus, OutcomeStatus, PolicyStatus, Status, TunnelStatus},
    datapath::{self, Method},
    host::networkd,
    kernel::traffic,
    policy::ability::{Shortcoming, inability, shortcomings},
    policy::compile::{TunnelState, active_tunnel, decisions, tunnel_state, wants_tree},
    policy::devices::matching,
    policy::fast::{Hook, Part},
    policy::net::{Family, KernelState, Link},
    policy::plan::number_slots,
};

impl Daemon {
    pub(super) fn status(&self) -> Status {
        let nothing = KernelState::default();
        let kernel = self.snapshot.as_ref().map_or(&nothing, |snapshot| &snapshot.state);
        let counters = self.counters();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime: self.started.elapsed().as_secs(),
            datapath: self.config.datapath,
            tunnels: self.tunnels(kernel),
            policies: self
                .config
                .policies
                .iter()
                .enumerate()
                .map(|(index, policy)| self.policy(policy, kernel, counters.get(&index)))
                .collect(),
            fast_path: self.fast_path(),
            kernel: KernelStatus {
                rules: kernel.rules.iter().filter(|rule| rule.ours).count(),
                trees: self.desired.iter().flat_map(|desired| &desired.trees).copied().collect(),
                routes: kernel.routes.len(),
            },
            problems: self
                .problems()
                .into_iter()
                .chain(self.contested.iter().cloned())
                .chain(self.unlimited(kernel))
                .collect(),
            hints: self
                .trial_hint()
                .into_iter()
                .chain(self.gates.hints().iter().cloned())
                .chain(self.kept_out())
                .chain(self.checker.strays().map(|stray| format!("not as configured: {stray}")))
                .chain(shortcomings(&self.config, kernel).into_iter().map(|found| {
                    let Shortcoming { reason, effect, advice } = found;
                    format!("{reason}, so {effect}; to change that: {advice}")
                }))
                .chain(self.endpoint_error.clone())
                .chain(self.lists())
                .chain(self.config.policies.iter().filter_map(without_sources))
                .chain(networkd::hint(Path::new("/")))
                .collect(),
        }
    }

    /// What could not be done, and what waits for it.
    pub(super) fn problems(&self) -> Vec<String> {
        let waits = match self.put_off.as_slice() {
            _ if self.problems.is_empty() => None,
            [] => None,
            [one] => Some(format!("`{one}` waits until what comes before it is in place")),
            [first, rest @ ..] => {
                let more = rest.len();
                Some(format!("`{first}` and {more} more changes wait until what comes before them is in place"))
            }
        };
        self.problems.iter().cloned().chain(waits).collect()
    }

    /// The families whose rules are a list although a tree is wanted.
    fn lists(&self) -> impl Iterator<Item = String> {
        let desired = self.desired.as_ref().filter(|_| self.rules_installed());
        let is_list = move |family: &Family| desired.is_some_and(|desired| !desired.trees.contains(family));
        let lists = Family::ALL.into_iter().filter(is_list).filter(|family| wants_tree(&self.config, *family));
        lists.map(|family| {
            format!(
                "every packet walks all {family} rules: between `band` and the next rule of another program there is no room \
                 for a tree; write a lower `band`, such as 1003"
            )
        })
    }

    /// Sources of policies that rp_filter keeps from coming in.
    fn kept_out(&self) -> Vec<String> {
        let Some(snapshot) = self.snapshot.as_ref().filter(|_| self.gates.filters_ways_back()) else {
            return Vec::new();
        };
        // Without programs the sources are not compiled.
        match &self.sources {
            Some(sources) => self.gates.kept_out(&self.config, &snapshot.state, sources),
            None => {
                let sources = decisions(&self.inputs(&self.config, snapshot), true).sources;
                self.gates.kept_out(&self.config, &snapshot.state, &sources)
            }
        }
    }

    /// Tunnels with a configured MSS limit that is not in force.
    fn unlimited(&self, kernel: &KernelState) -> Vec<String> {
        let clamps = |link: &Link| {
            let attached = self.fast.iter().flat_map(|fast| &fast.state().attached);
            attached.filter(|attachment| attachment.part == Part::Clamp && attachment.ifindex == link.index).count()
        };
        let limited = self.config.tunnels.iter().filter(|tunnel| tunnel.mss.is_some());
        let missing =
            limited.filter_map(|tunnel| kernel.link(&tunnel.name)).filter(|link| clamps(link) < Hook::ALL.len());
        let because = self.being_loaded().or(self.fast_error.as_deref()).unwrap_or("its programs are not attached");
        let told =
            |link: &Link| format!("tunnel {}: the segment size that TCP tells is not limited: {because}", link.name);
        missing.map(told).collect()
    }

    /// The state in one line, for the service manager.
    pub(super) fn summary(&self) -> String {
        let nothing = KernelState::default();
        let kernel = self.snapshot.as_ref().map_or(&nothing, |snapshot| &snapshot.state);
        let tunnels = self.tunnels(kernel);
        let not_up: Vec<String> = tunnels
            .iter()
            .filter(|tunnel| tunnel.state != "up")
            .map(|tunnel| format!("{} {}", tunnel.name, tunnel.state))
            .collect();
        let mut summary = format!("{} of {} tunnels up", tunnels.len() - not_up.len(), tunnels.len());
        if !not_up.is_empty() {
            summary += &format!(" ({})", not_up.join(", "));
        }
        summary += &format!("; fast path {}", self.fast_path().state);
        if let [first, rest @ ..] = self.problems.as_slice() {
            summary += &format!("; problem: {first}");
            if !rest.is_empty() {
                summary += &format!(" (and {} more)", rest.len());
            }
        }
        summary
    }

    fn tunnels(&self, kernel: &KernelState) -> Vec<TunnelStatus> {
        let families: Vec<Family> = Family::ALL.into_iter().filter(|family| self.config.uses(*family)).collect();
        let commands = self.supervisor.status();
        let probes = self.probes.status();
        let traffic = traffic();
        self.config
            .tunnels
            .iter()
            .map(|tunnel| {
                let failed: Vec<Family> = families
                    .iter()
                    .copied()
                    .filter(|family| {
                        matches!(tunnel_state(tunnel, *family, kernel, &self.failed), TunnelState::Failed(_))
                    })
                    .collect();
                let link: Option<&Link> = kernel.link(&tunnel.name);
                let mut by_it = self.config.families_by(tunnel).peekable();
                let unable: BTreeMap<Family, String> = link
                    .into_iter()
                    .flat_map(|link| self.config.families_by(tunnel).map(move |family| (family, link)))
                    .filter_map(|(family, link)| {
                        Some((family, inability(tunnel, link, family)?.reason(&tunnel.name, family)))
                    })
                    .collect();
                let state = match link {
                    None => "pending",
                    Some(link) if !link.up => "down",
                    Some(_) if by_it.peek().is_some() && by_it.all(|family| unable.contains_key(&family)) => "unable",
                    Some(_)
                        if !failed.is_empty()
                            && families.iter().all(|family| failed.contains(family) || unable.contains_key(family)) =>
                    {
                        "failed"
                    }
                    Some(_) => "up",
                };
                TunnelStatus {
                    name: tunnel.name.clone(),
                    state: state.to_owned(),
                    ifindex: link.map(|link| link.index),
                    mtu: link.map(|link| link.mtu),
                    mss: link.zip(tunnel.mss).map(|(link, mss)| {
                        let Clamp { v4, v6 } = mss.clamp(link);
                        [(Family::V4, v4), (Family::V6, v6)].into()
                    }),
                    failed,
                    unable,
                    traffic: link.and_then(|link| traffic.get(&link.name).copied()),
                    command: commands.get(&tunnel.name).and_then(|status| serde_json::to_value(status).ok()),
                    probes: probes.iter().filter(|status| status.tunnel == tunnel.name).cloned().collect(),
                }
            })
            .collect()
    }

    fn policy(&self, policy: &Policy, kernel: &KernelState, stats: Option<&Stats>) -> PolicyStatus {
        let families: Vec<Family> = Family::ALL.into_iter().filter(|family| policy.uses(*family)).collect();
        let active = |family| match active_tunnel(policy, family, &self.config, kernel, &self.failed) {
            Some((tunnel, _)) => tunnel.name.clone(),
            None if policy.main => "main".to_owned(),
            None => match policy.on_down {
                OnDown::Unreachable => "(unreachable)",
                OnDown::Blackhole => "(blackhole)",
                OnDown::Prohibit => "(prohibit)",
                OnDown::Next => "(next)",
            }
            .to_owned(),
        };
        let stands_back = self.config.datapath == Datapath::Shadow || self.checker.is_disputed(&policy.name);
        let carried_by = |family| {
            // Open says nothing where no program is: it is detached from a device that is closed for both families.
            let open = self.fast.as_ref().map(datapath::Datapath::state).is_some_and(|fast| {
                !self.rules_installed()
                    || fast.open.family(family) && fast.deciding().any(|attachment| attachment.hook == Hook::Ingress)
            });
            if open && !stands_back { "fast path" } else { "kernel" }.to_owned()
        };
        let counter = |outcome: Outcome| stats.map(|stats| stats.outcomes[outcome as usize]).unwrap_or_default();
        let (forwarded, diverted) = (counter(Outcome::Forwarded), counter(Outcome::Diverted));
        PolicyStatus {
            name: policy.name.clone(),
            prefixes: policy.sources().count(),
            follows: policy.follow.iter().map(ToString::to_string).collect(),
            table: self.tables.numbers().get(&policy.name).copied(),
            active: families.iter().map(|family| (*family, active(*family))).collect(),
            carried_by: families.iter().map(|family| (*family, carried_by(*family))).collect(),
            packets: forwarded.packets.wrapping_add(diverted.packets),
            bytes: forwarded.bytes.wrapping_add(diverted.bytes),
            outcomes: Outcome::ALL
                .into_iter()
                .map(|outcome| {
                    let counter = counter(outcome);
                    (outcome.name().to_owned(), OutcomeStatus { packets: counter.packets, bytes: counter.bytes })
                })
                .collect(),
        }
    }

    /// The counters by policy: a policy has a slot for each family and chain that begins with it.
    fn counters(&self) -> BTreeMap<usize, Stats> {
        let mut by_policy: BTreeMap<usize, Stats> = BTreeMap::new();
        let desired = self.desired.as_ref().and_then(|desired| desired.fast.as_ref());
        let (Some(fast), Some(desired)) = (&self.fast, desired) else { return by_policy };
        let counters = fast.counters().unwrap_or_else(|error| {
            warn!("{error}");
            BTreeMap::new()
        });
        // The numbers are those of the last pass: an observed chain keeps its own.
        let Ok(numbers) = number_slots(desired, fast.state()) else { return by_policy };
        for (id, slot) in &desired.slots {
            let Some(stats) = numbers.get(id).and_then(|number| counters.get(number)) else { continue };
            let sum = by_policy.entry(slot.policy).or_default();
            for (sum, counter) in sum.outcomes.iter_mut().zip(&stats.outcomes) {
                sum.packets = sum.packets.wrapping_add(counter.packets);
                sum.bytes = sum.bytes.wrapping_add(counter.bytes);
            }
        }
        by_policy
    }

    /// How many devices match: a program has its place there.
    fn deciding_devices(&self, patterns: &[DevicePattern]) -> usize {
        self.snapshot.as_ref().map_or(0, |snapshot| matching(patterns, &snapshot.state).count())
    }

    /// Why the programs see no packets, or only those that leave by an uplink.
    fn without_devices(&self) -> Option<String> {
        let interfaces = &self.config.interfaces;
        let of = |patterns| self.deciding_devices(patterns) > 0;
        match (of(&interfaces.ingress), of(&interfaces.uplink)) {
            (true, _) => None,
            // What passes the guard is what the rules would have caught: it does their work.
            (false, true) if !self.rules_installed() => None,
            (false, true) => Some("there is no ingress device: the programs only guard the uplinks".to_owned()),
            (false, false) => Some("there is no ingress device and no uplink: the programs do nothing".to_owned()),
        }
    }

    fn fast_path(&self) -> FastPathStatus {
        FastPathStatus { loading: self.loader.loads_programs(), ..self.loaded_fast_path() }
    }

    fn loaded_fast_path(&self) -> FastPathStatus {
        if self.config.datapath == Datapath::Kernel {
            let reasons = vec!["datapath = \"kernel\" is configured".to_owned()];
            let attached = self.fast.iter().flat_map(|fast| &fast.state().attached).map(ToString::to_string).collect();
            return FastPathStatus { state: "off".to_owned(), reasons, attached, ..FastPathStatus::default() };
        }
        let Some(fast) = &self.fast else {
            let reasons = self.being_loaded().map(str::to_owned).or_else(|| self.fast_error.clone());
            let reasons = reasons.into_iter().collect();
            return FastPathStatus { state: "off".to_owned(), reasons, ..FastPathStatus::default() };
        };
        let mut reasons: Vec<String> = self.without_devices().into_iter().chain(self.closed_gates()).collect();
        reasons.extend(self.being_loaded().map(str::to_owned));
        reasons.extend(self.too_large.map(|error| error.to_string()));
        let desired = self.desired.iter().filter_map(|desired| desired.fast.as_ref());
        let missing = desired.flat_map(|desired| desired.attachments.difference(&fast.state().attached));
        let missing = missing.filter(|attachment| attachment.part != Part::Xdp);
        reasons.extend(missing.map(|attachment| format!("not attached: {attachment}")));
        let method = match fast.method() {
            Method::Tcx => "tcx",
            Method::Clsact => "clsact",
        };
        FastPathStatus {
            state: match (self.config.datapath, reasons.is_empty()) {
                _ if self.deciding_devices(&self.config.interfaces.uplink) == 0
                    && self.deciding_devices(&self.config.interfaces.ingress) == 0 =>
                {
                    "off"
                }
                (Datapath::Shadow, _) => "shadow",
                (_, true) => "on",
                (_, false) => "partly",
            }
            .to_owned(),
            reasons,
            gates: self.gates.by_name(self.checker.reasons().count(), self.kept_out().len()),
            attached: fast.state().attached.iter().map(ToString::to_string).collect(),
            method: Some(method.to_owned()),
            maps: maps(fast),
            xdp: self.xdp_status(),
            loading: false,
            unseen: self.gates.unseen(),
            unmatched: fast.state().unmatched.any().then(|| unmatched(fast)),
        }
    }
}

fn unmatched(datapath: &datapath::Datapath) -> OutcomeStatus {
    let Counter { packets, bytes } = datapath.unmatched().unwrap_or_else(|error| {
        warn!("{error}");
        Counter::default()
    });
    OutcomeStatus { packets, bytes }
}

/// The interfaces that a policy follows have no networks and no addresses.
fn without_sources(policy: &Policy) -> Option<String> {
    let names: Vec<String> = policy.follow.iter().map(ToString::to_string).collect();
    policy.sources().next().is_none().then(|| {
        format!("policy \"{}\" has no sources: {} has no prefix just now (`ip addr`)", policy.name, names.join(", "))
    })
}

fn maps(datapath: &datapath::Datapath) -> Vec<MapStatus> {
    let fast = datapath.state();
    let (used, words) = datapath.words();
    let number = |number| usize::try_from(number).unwrap_or(usize::MAX);
    [(names::INDEX, number(used), number(words)), (names::POLICY, fast.slots.len(), number(MAX_SLOTS.into()))]
        .into_iter()
        .map(|(name, entries, capacity)| MapStatus { name: name.to_owned(), entries, capacity })
        .collect()
}
