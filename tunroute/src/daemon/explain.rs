//! The daemon's answer to `explain`.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::Context as _;
use ipnet::IpNet;

use super::Daemon;
use crate::{
    commands::explain::{
        Candidate, Considered, Explanation, KernelSays, ProgramSays, Way,
        agreement::Decision,
        examiner::{HOP_LIMIT, Sighting, Subject},
    },
    config::{Datapath, Interfaces, OnDown},
    datapath::Place,
    kernel::{Answer, Question},
    policy::compile::{ChainId, DesiredFast, Inputs, TunnelState, compile, matching, tunnel_state},
    policy::fast::{Exemption, Hook},
    policy::net::{Family, IfIndex, KernelState, Link, RouteKind, TABLE_LOCAL, TABLE_MAIN},
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
        let subject = Subject {
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
        let runs = link.map(|link| self.runs(hook, link)).unwrap_or_else(|| Err("there is no uplink".to_owned()));
        let uplinks = self.uplinks(kernel);
        let (sighting, no_program) = match runs {
            Ok(()) => (Some(self.examiner()?.look(&subject, &uplinks)?), None),
            Err(why) => (None, Some(why)),
        };
        let question = Question { source, destination, iif: (hook == Hook::Ingress).then_some(subject.place.device) };
        let answer = match &sighting {
            Some(sighting) => sighting.kernel,
            None => self.checker.oracle()?.ask(&question)?,
        };
        let route = self.checker.oracle()?.route(&question, &|index| name(kernel, index))?;
        let (policies, applying) = self.considered(kernel, source, destination);
        let policy = applying.map(|policy| &self.config.policies[policy]);
        let mut candidates = Vec::new();
        for tunnel in policy.iter().flat_map(|policy| &policy.via) {
            let state = tunnel_state(tunnel, family, kernel, &self.failed);
            let (word, link) = match state {
                TunnelState::Up(link) => ("up", Some(link)),
                TunnelState::Down(link) => ("down", Some(link)),
                TunnelState::Failed(link) => ("failed", Some(link)),
                TunnelState::Pending => ("pending", None),
            };
            let configured = self.config.tunnels.iter().find(|candidate| candidate.name == *tunnel);
            candidates.push(Candidate {
                tunnel: tunnel.clone(),
                state: word.to_owned(),
                mtu: link.map(|link| link.mtu_of(family)),
                gateway: configured.and_then(|tunnel| tunnel.via(family)),
                chosen: word == "up" && candidates.iter().all(|candidate: &Candidate| !candidate.chosen),
            });
        }
        let comparable = self.rules_installed();
        let (agree, because) = match &sighting {
            Some(sighting) if comparable => (Some(sighting.agreement.agree), sighting.agreement.because),
            Some(_) => (None, "datapath = \"ebpf\" has no rules; the program alone decides"),
            None => (Some(true), "only the kernel decides here"),
        };
        let (rule, reject) = deciding(kernel, source, family, answer);
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
            policies,
            tunnels: candidates,
            on_down: policy.map(|policy| policy.on_down),
            gates: self.closed_gates(),
            program: sighting.as_ref().map(|sighting| program_says(sighting, !shadow, way)),
            no_program,
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
            agree,
            because: because.to_owned(),
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

    /// The policies around a source, up to the one that applies, and that one's index.
    fn considered(
        &self,
        kernel: &KernelState,
        source: IpAddr,
        destination: IpAddr,
    ) -> (Vec<Considered>, Option<usize>) {
        let desired = self.desired_fast(kernel);
        let mut considered = Vec::new();
        let mut next =
            longest(source, |prefix| desired.sources.chain_of(prefix).map(|chain| chain.id)).map(|(_, id)| id);
        while let Some(slot) = next.and_then(|id| desired.slots.get(&id)) {
            let policy = &self.config.policies[slot.policy];
            let holding = policy.sources().filter(|prefix| prefix.contains(&source));
            let Some(prefix) = holding.max_by_key(|prefix| prefix.prefix_len()) else { break };
            let set = slot.exempt_set;
            let exempt = longest(destination, |prefix| {
                desired.exempt.contains(&Exemption { set, prefix: *prefix }).then_some(())
            });
            let up = policy
                .via
                .iter()
                .any(|tunnel| matches!(tunnel_state(tunnel, slot.family, kernel, &self.failed), TunnelState::Up(_)));
            let applies = exempt.is_none() && (up || policy.on_down != OnDown::Next);
            considered.push(Considered {
                policy: policy.name.clone(),
                prefix: *prefix,
                exempt: exempt.map(|(prefix, ())| prefix),
                applies,
            });
            if applies {
                return (considered, Some(slot.policy));
            }
            next = slot.next;
        }
        (considered, None)
    }

    /// What the maps should hold, whether there are programs or not.
    pub(super) fn desired_fast(&self, kernel: &KernelState) -> DesiredFast {
        let inputs = Inputs {
            config: &self.config,
            kernel,
            tables: self.tables.numbers(),
            failed: &self.failed,
            rules: false,
            fast: Some(self.gates.inputs(&self.xdp.chosen)),
            before: self.sources.as_ref(),
        };
        compile(&inputs).fast.unwrap_or_default()
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

fn program_says(sighting: &Sighting, acts: bool, way: impl Fn((IfIndex, Option<IpAddr>)) -> Way) -> ProgramSays {
    let (decision, way) = match sighting.decision {
        Decision::Left => ("left", None),
        Decision::Dropped => ("dropped", None),
        Decision::Leaves { device, gateway } => ("leaves", Some(way((device, gateway)))),
    };
    ProgramSays {
        acts,
        decision: decision.to_owned(),
        xdp: sighting.program.xdp,
        outcome: sighting.program.counted.map(|(_, outcome)| outcome.name().to_owned()),
        way,
    }
}

pub(super) fn name(kernel: &KernelState, device: IfIndex) -> String {
    kernel.links.get(&device).map_or_else(|| format!("ifindex {device}"), |link| link.name.clone())
}

/// The longest prefix around an address for which there is something.
fn longest<T>(address: IpAddr, find: impl Fn(&IpNet) -> Option<T>) -> Option<(IpNet, T)> {
    let mut prefix = Some(IpNet::from(address));
    while let Some(current) = prefix {
        if let Some(found) = find(&current) {
            return Some((current, found));
        }
        prefix = current.supernet();
    }
    None
}

/// The rule, and where the kernel does not tell it the route, by which a packet is decided: the kernel names the table at
/// most.
fn deciding(kernel: &KernelState, source: IpAddr, family: Family, answer: Answer) -> (Option<String>, Option<String>) {
    let mut rules = kernel.rules.iter().filter(|rule| rule.family == family && rule.oif.is_none());
    let ours = |table: Option<u32>| {
        move |rule: &&crate::policy::net::ObservedRule| {
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
                let rejects = |route: &&crate::policy::net::Route| {
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
    let named = match table {
        TABLE_LOCAL => "local".to_owned(),
        TABLE_MAIN => "main".to_owned(),
        table => table.to_string(),
    };
    let looks_up = format!("lookup {named} ");
    let found = rules.clone().find(ours(Some(table)));
    let found = found.or_else(|| rules.find(|rule| rule.rule.is_none() && rule.text.contains(&looks_up)));
    (found.map(crate::policy::net::ObservedRule::text), None)
}
