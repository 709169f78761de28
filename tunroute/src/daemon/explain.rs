//! The daemon's answer to `explain`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::Context as _;
use ipnet::IpNet;

use super::Daemon;
use crate::{
    commands::explain::{
        Candidate, Considered, Explanation, KernelSays, ProgramSays, Way,
        agreement::Handling,
        examiner::{HOP_LIMIT, Setting, Sighting, Subject},
        expected::{Intent, Looked},
    },
    config::{Datapath, Interfaces},
    datapath::Place,
    kernel::Answer,
    policy::compile::{ChainId, Inputs, TunnelState, tunnel_state},
    policy::devices::matching,
    policy::fast::Hook,
    policy::net::{Family, IfIndex, KernelState, Link, ObservedRule, Route, RouteKind},
    policy::plan::number_slots,
};

impl Daemon {
    /// What becomes of a packet.
    pub(super) fn explain(
        &mut self,
        source: IpAddr,
        destination: IpAddr,
        iif: Option<&str>,
    ) -> anyhow::Result<Explanation> {
        let family = Family::of_addr(&source);
        anyhow::ensure!(
            Family::of_addr(&destination) == family,
            "{source} and {destination} are of different families: give two IPv4 or two IPv6 addresses"
        );
        let snapshot = self.snapshot.take().context("the kernel could not be observed yet; try again")?;
        let result = self.explain_in(&snapshot.state, (source, destination), iif);
        self.snapshot = Some(snapshot);
        result
    }

    fn explain_in(
        &mut self,
        kernel: &KernelState,
        (source, destination): (IpAddr, IpAddr),
        iif: Option<&str>,
    ) -> anyhow::Result<Explanation> {
        let family = Family::of_addr(&source);
        let interfaces = self.config.interfaces.clone();
        let (hook, link, device_because) = place(&interfaces, kernel, source, iif)?;
        let runs = link.map(|link| self.runs(hook, link)).unwrap_or_else(|| Err("there is no uplink".to_owned()));
        let subject = Subject {
            program: runs.is_ok(),
            place: Place {
                hook,
                device: link.map_or(0, |link| link.index),
                address: link.map(|link| self.checker.address(link.index)).unwrap_or_default(),
                xdp: hook == Hook::Ingress && link.is_some_and(|link| self.decides_early(link.index)),
            },
            source,
            destination,
        };
        let way = |(device, gateway): (IfIndex, Option<IpAddr>)| Way { device: name(kernel, device), gateway };
        let intent = self.intent(kernel);
        let setting = Setting {
            intent: &intent,
            main: &kernel.main,
            uplinks: &self.uplinks(kernel),
            names: &names(kernel),
            rules: self.rules_installed(),
        };
        let sighting = self.examiner()?.look(&subject, &setting)?;
        let answer = sighting.kernel;
        let route = self.examiner()?.oracle().route(&subject.question(), &|index| name(kernel, index))?;
        let applying = sighting.looked.iter().find(|looked| looked.applies).map(|looked| looked.policy);
        let policy = applying.map(|policy| &self.config.policies[policy]);
        let mut candidates = Vec::new();
        for tunnel in policy.iter().flat_map(|policy| self.config.tunnels_of(policy)) {
            let state = tunnel_state(tunnel, family, kernel, &self.failed);
            let (word, link) = match state {
                TunnelState::Up(link) => ("up", Some(link)),
                TunnelState::Down(link) => ("down", Some(link)),
                TunnelState::Unable(link, _) => ("unable", Some(link)),
                TunnelState::Failed(link) => ("failed", Some(link)),
                TunnelState::Pending => ("pending", None),
            };
            candidates.push(Candidate {
                tunnel: tunnel.name.clone(),
                state: word.to_owned(),
                because: match state {
                    TunnelState::Unable(_, inability) => Some(inability.reason(&tunnel.name, family)),
                    _ => None,
                },
                mtu: link.map(|link| link.mtu_of(family)),
                gateway: tunnel.via(family),
                chosen: word == "up" && candidates.iter().all(|candidate: &Candidate| !candidate.chosen),
            });
        }
        let (rule, reject) = deciding(kernel, (source, destination), family, answer);
        let shadow = self.config.datapath == Datapath::Shadow;
        Ok(Explanation {
            source,
            destination,
            family,
            length: u32::try_from(subject.packet().len()).unwrap_or_default(),
            hop_limit: HOP_LIMIT,
            hook,
            device: link.map(|link| link.name.clone()),
            device_because,
            datapath: self.config.datapath,
            policies: self.considered(&sighting.looked, source),
            tunnels: candidates,
            on_down: policy.map(|policy| policy.on_down),
            gates: self.closed_gates(),
            program: program_says(&sighting, !shadow, way),
            no_program: runs.err(),
            kernel: KernelSays {
                decision: match answer {
                    Answer::Leaves { .. } => "leaves".to_owned(),
                    Answer::Local { .. } => "local".to_owned(),
                    Answer::Refused(refused) => refused.to_string(),
                },
                way: match answer {
                    Answer::Leaves { device, gateway, .. } => Some(way((device, gateway))),
                    _ => None,
                },
                rule,
                route: route.or(reject),
            },
            agree: sighting.agree(),
            because: sighting.because().to_owned(),
        })
    }

    /// Does a program run there? Otherwise why not.
    fn runs(&self, hook: Hook, link: &Link) -> Result<(), String> {
        if self.config.datapath == Datapath::Kernel {
            return Err("datapath = \"kernel\"".to_owned());
        }
        let Some(fast) = &self.fast else {
            return Err(self.fast_error.clone().unwrap_or_else(|| "it could not be loaded".to_owned()));
        };
        if fast.state().deciding().any(|attachment| attachment.hook == hook && attachment.ifindex == link.index) {
            return Ok(());
        }
        let interfaces = &self.config.interfaces;
        let (wanted, list) = match hook {
            Hook::Ingress => (&interfaces.ingress, "ingress"),
            Hook::Egress => (&interfaces.uplink, "uplink"),
        };
        if wanted.iter().any(|pattern| pattern.matches(&link.name)) {
            return Err(format!("not attached to {}", link.name));
        }
        Err(format!("{} is not in `{list}`", link.name))
    }

    pub(super) fn uplinks(&self, kernel: &KernelState) -> BTreeSet<IfIndex> {
        matching(&self.config.interfaces.uplink, kernel).map(|link| link.index).collect()
    }

    /// Are there rules to compare the programs with?
    pub(super) const fn rules_installed(&self) -> bool {
        !matches!(self.config.datapath, Datapath::Ebpf) || self.fallback
    }

    /// The policies that were considered, by name, with the prefix that holds the source.
    fn considered(&self, looked: &[Looked], source: IpAddr) -> Vec<Considered> {
        let named = looked.iter().filter_map(|Looked { policy, exempt, applies }| {
            let policy = self.config.policies.get(*policy)?;
            let holding = policy.sources().filter(|prefix| prefix.contains(&source));
            let prefix = holding.max_by_key(|prefix| prefix.prefix_len())?;
            let (name, main) = (policy.name.clone(), policy.main);
            Some(Considered { policy: name, prefix: *prefix, exempt: *exempt, applies: *applies, main })
        });
        named.collect()
    }

    /// What the configuration asks for on this host.
    pub(super) fn intent(&self, kernel: &KernelState) -> Intent {
        Intent::new(&Inputs {
            config: &self.config,
            kernel,
            tables: self.tables.numbers(),
            failed: &self.failed,
            rules: false,
            fast: Some(self.gates.inputs(&self.xdp.chosen)),
            before: self.sources.as_ref(),
        })
    }

    /// The policies that slots belong to, by the slots' numbers.
    pub(super) fn policies_of(&self, slots: impl IntoIterator<Item = u32>) -> BTreeSet<usize> {
        let (Some(fast), Some(desired)) = (&self.fast, self.desired.as_ref().and_then(|desired| desired.fast.as_ref()))
        else {
            return BTreeSet::new();
        };
        let Ok(numbers) = number_slots(desired, fast.state()) else { return BTreeSet::new() };
        let slots: BTreeSet<u32> = slots.into_iter().collect();
        let named = |id: &ChainId| numbers.get(id).is_some_and(|number| slots.contains(number));
        desired.slots.iter().filter(|(id, _)| named(id)).map(|(_, slot)| slot.policy).collect()
    }
}

/// Where a packet is seen, and why there.
fn place<'a>(
    interfaces: &'a Interfaces,
    kernel: &'a KernelState,
    source: IpAddr,
    iif: Option<&str>,
) -> anyhow::Result<(Hook, Option<&'a Link>, String)> {
    if let Some(device) = iif {
        let link = kernel.link(device).with_context(|| format!("there is no device {device} (`ip link`)"))?;
        return Ok((Hook::Ingress, Some(link), "as asked for".to_owned()));
    }
    let uplink = || matching(&interfaces.uplink, kernel).next();
    if kernel.local.contains(&IpNet::from(source)) {
        let text = match uplink() {
            Some(_) => "the uplink's program is asked, since the source is this host's own",
            None => "the source is this host's own",
        };
        return Ok((Hook::Egress, uplink(), text.to_owned()));
    }
    let ingress = matching(&interfaces.ingress, kernel).next();
    if let Some(link) = ingress {
        return Ok((Hook::Ingress, Some(link), "the first ingress device; --iif chooses another".to_owned()));
    }
    Ok((Hook::Egress, uplink(), "there is no ingress device, so as if it were this host's own".to_owned()))
}

fn program_says(
    sighting: &Sighting,
    acts: bool,
    way: impl Fn((IfIndex, Option<IpAddr>)) -> Way,
) -> Option<ProgramSays> {
    let program = sighting.program.as_ref()?;
    let (decision, way) = match sighting.handling? {
        Handling::Left => ("left", None),
        Handling::Dropped => ("dropped", None),
        Handling::Leaves { device, gateway } => ("leaves", Some(way((device, gateway)))),
    };
    Some(ProgramSays {
        acts,
        decision: decision.to_owned(),
        xdp: program.xdp,
        outcome: program.counted.map(|(_, outcome)| outcome.name().to_owned()),
        way,
    })
}

/// The names of all devices.
pub(super) fn names(kernel: &KernelState) -> BTreeMap<IfIndex, String> {
    kernel.links.values().map(|link| (link.index, link.name.clone())).collect()
}

pub(super) fn name(kernel: &KernelState, device: IfIndex) -> String {
    kernel.links.get(&device).map_or_else(|| format!("ifindex {device}"), |link| link.name.clone())
}

/// The rule, and where the kernel does not tell it the route, by which a packet is decided: the kernel names the table at
/// most.
fn deciding(
    kernel: &KernelState,
    (source, destination): (IpAddr, IpAddr),
    family: Family,
    answer: Answer,
) -> (Option<String>, Option<String>) {
    let mut rules = kernel.rules.iter().filter(|rule| rule.family == family && rule.oif.is_none());
    let ours = |table: Option<u32>| {
        move |rule: &&ObservedRule| {
            rule.rule.as_ref().is_some_and(|rule| {
                let asked = rule.table().filter(|_| rule.from.contains(&source) != rule.not);
                asked.is_some_and(|asked| table.is_none_or(|table| asked == table))
            })
        }
    };
    let table = match answer {
        Answer::Leaves { table, .. } | Answer::Local { table } => table,
        Answer::Refused(_) => {
            // Tables that throw are passed over.
            let reject = rules.filter(ours(None)).find_map(|rule| {
                let table = rule.rule.as_ref()?.table()?;
                let rejects = |route: &&Route| {
                    route.table == table
                        && Family::of(&route.dst) == family
                        && matches!(route.kind, RouteKind::Unreachable | RouteKind::Blackhole | RouteKind::Prohibit)
                };
                let route = kernel.routes.iter().filter_map(|route| route.route.as_ref()).find(rejects)?;
                Some((rule.text(), route.to_string()))
            });
            return reject.unzip();
        }
    };
    let theirs = |rule: &&ObservedRule| {
        rule.foreign.as_ref().is_some_and(|rule| rule.table == Some(table) && rule.may_match(source, destination))
    };
    let found = rules.clone().find(ours(Some(table))).or_else(|| rules.find(theirs));
    (found.map(ObservedRule::text), None)
}
