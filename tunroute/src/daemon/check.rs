//! The daemon checks itself: it runs `verify`, samples both datapaths all the time, and leaves to the kernel what they
//! disagree about.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tracing::{debug, info, warn};

use super::{Daemon, explain::names};
use crate::{
    commands::explain::{
        examiner::{Examiner, Setting, Sighting, Subject},
        expected::Intent,
    },
    commands::verify::{Field, MAX_SAMPLES, Names, Spot, Verification, Verifier, Wanted},
    config::{Config, Policy},
    control::socket::Answer,
    datapath::{Datapath, Place},
    kernel::Kinds,
    policy::compile::Desired,
    policy::devices::matching,
    policy::fast::Hook,
    policy::net::{Family, IfIndex, KernelState, MainRoute},
};

/// Packets that are asked about at each audit, some 50 µs each.
const SAMPLES: usize = 3;
/// Maximum number of stray packets that are remembered and shown by `status`.
const STRAYS: usize = 3;
/// While a policy is closed, the maps are read this often: they may hold the cause.
const READ_MAPS: Duration = Duration::from_secs(10);

/// A finished verification, and the client that waits for it.
pub(super) struct Verified {
    verification: Verification,
    disagreements: Vec<(Subject, Sighting)>,
    answer: oneshot::Sender<Answer>,
}

/// A policy that is left to the kernel.
struct Dispute {
    subject: Subject,
    /// In words.
    reason: String,
    /// The maps or the kernel are at fault, so that it can be seen when they agree again. Otherwise it is the program.
    mendable: bool,
}

/// What the checks need, and what they have found.
pub(super) struct Checker {
    pub(super) examiner: Option<Examiner>,
    intent: Option<Arc<Intent>>,
    /// What a running verification compares with, as it changes.
    wanted: Arc<Wanted>,
    /// Link-layer addresses, as far as they were asked for.
    addresses: BTreeMap<IfIndex, [u8; 6]>,
    field: Option<Arc<Field>>,
    generation: Arc<AtomicU64>,
    verifying: Arc<AtomicBool>,
    verified: mpsc::UnboundedSender<Verified>,
    /// Disagreements to be looked at again.
    suspects: Vec<Subject>,
    /// By the policy's name.
    disputes: BTreeMap<String, Dispute>,
    /// Packets that go another way than configured, in words.
    strays: Vec<(Subject, String)>,
    maps_read: Instant,
    /// Why nothing can be sampled, as it was said last.
    complaint: Option<String>,
}

impl Checker {
    pub(super) fn new(verified: mpsc::UnboundedSender<Verified>) -> Self {
        Self {
            examiner: None,
            intent: None,
            wanted: Arc::default(),
            addresses: BTreeMap::new(),
            field: None,
            generation: Arc::default(),
            verifying: Arc::default(),
            verified,
            suspects: Vec::new(),
            disputes: BTreeMap::new(),
            strays: Vec::new(),
            maps_read: Instant::now(),
            complaint: None,
        }
    }

    /// Says once why nothing can be sampled, and returns it in words.
    pub(super) fn complain(&mut self, error: &anyhow::Error) -> String {
        let error = format!("{error:#}");
        if self.complaint.as_ref() != Some(&error) {
            warn!("cannot compare the datapaths: {error}");
            self.complaint = Some(error.clone());
        }
        error
    }

    /// Something is being changed, or has been.
    pub(super) fn note_change(&mut self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        (self.field, self.intent) = (None, None);
        self.addresses.clear();
    }

    /// After a reload everything begins anew.
    pub(super) fn forgive(&mut self) {
        self.disputes.clear();
        self.suspects.clear();
        self.strays.clear();
    }

    /// Packets that go another way than configured.
    pub(super) fn strays(&self) -> impl Iterator<Item = String> {
        self.strays.iter().map(|(_, text)| text.clone())
    }

    /// A device's link-layer address; zeros if it has none.
    pub(super) fn address(&mut self, device: IfIndex) -> [u8; 6] {
        if !self.addresses.contains_key(&device) {
            let links = getifaddrs().into_iter().flatten().filter_map(|entry| entry.address);
            self.addresses.extend(links.filter_map(|address| {
                let link = address.as_link_addr()?;
                Some((IfIndex::try_from(link.ifindex()).ok()?, link.addr()?))
            }));
        }
        *self.addresses.entry(device).or_default()
    }

    /// Why policies are left to the kernel.
    pub(super) fn reasons(&self) -> impl Iterator<Item = String> {
        self.disputes.values().map(|dispute| dispute.reason.clone())
    }

    /// Is this policy left to the kernel?
    pub(super) fn is_disputed(&self, policy: &str) -> bool {
        self.disputes.contains_key(policy)
    }
}

impl Daemon {
    /// Asks the kernel, and the twins of the programs if there are some.
    pub(super) fn examiner(&mut self) -> anyhow::Result<&mut Examiner> {
        if self.checker.examiner.is_none() {
            self.checker.examiner = Some(Examiner::new(None)?);
        }
        self.checker.examiner.as_mut().context("the kernel cannot be asked")
    }

    /// The programs, if any of them decides.
    fn deciding(&self) -> Option<&Datapath> {
        self.fast.as_ref().filter(|fast| fast.state().deciding().next().is_some())
    }

    /// Does a program decide whose twin has to be loaded before it can be asked?
    pub(super) fn needs_twins(&self) -> bool {
        self.deciding().is_some() && !self.checker.examiner.as_ref().is_some_and(Examiner::has_programs)
    }

    /// Enters in the desired state which policies are left to the kernel.
    pub(super) fn enter_disputes(&self, config: &Config, desired: &mut Desired) {
        if let Some(fast) = &mut desired.fast {
            let disputed = |(_, policy): &(usize, &Policy)| self.checker.is_disputed(&policy.name);
            let policies = config.policies.iter().enumerate().filter(disputed).map(|(index, _)| index);
            fast.dispute(&policies.collect::<BTreeSet<_>>());
        }
    }

    /// The closed gates, and what to do about each.
    pub(super) fn closed_gates(&self) -> Vec<String> {
        self.gates.reasons().map(str::to_owned).chain(self.checker.reasons()).collect()
    }

    fn field(&mut self, kernel: &KernelState) -> Arc<Field> {
        if let Some(field) = &self.checker.field {
            return Arc::clone(field);
        }
        let deciding: BTreeSet<(Hook, IfIndex)> = (self.fast.iter().flat_map(|fast| fast.state().deciding()))
            .map(|attachment| (attachment.hook, attachment.ifindex))
            .collect();
        let interfaces = &self.config.interfaces;
        let ingress = matching(&interfaces.ingress, kernel).map(|link| (Hook::Ingress, link.index));
        let uplink = matching(&interfaces.uplink, kernel).map(|link| (Hook::Egress, link.index));
        let mut spots: BTreeSet<(Hook, IfIndex)> = ingress.chain(uplink).chain(deciding.iter().copied()).collect();
        // The host's own packets are asked about in any case.
        if !spots.iter().any(|(hook, _)| *hook == Hook::Egress) {
            spots.insert((Hook::Egress, 0));
        }
        let spots = spots.into_iter().map(|(hook, device)| Spot {
            program: deciding.contains(&(hook, device)),
            place: Place {
                hook,
                device,
                address: self.checker.address(device),
                xdp: hook == Hook::Ingress && self.decides_early(device),
            },
        });
        let spots = spots.collect();
        // Nobody sends from the addresses at the ends of an IPv4 network, which are for broadcasts.
        let ends = |route: &MainRoute| match route.dst {
            IpNet::V4(net) if route.on_link && net.prefix_len() < 31 => {
                vec![net.network().into(), net.broadcast().into()]
            }
            _ => Vec::new(),
        };
        let broadcast: BTreeSet<IpAddr> = kernel.main.iter().flat_map(ends).collect();
        let own = kernel.local.iter().filter(|local| local.prefix_len() == local.max_prefix_len());
        let own = own.map(IpNet::addr).filter(|address| !broadcast.contains(address));
        let literal = self.config.policies.iter().flat_map(|policy| &policy.exempt).copied();
        let on_link = kernel.main.iter().filter(|route| route.on_link).map(|route| route.dst);
        let field = Arc::new(Field {
            spots,
            own: own.collect(),
            exempt: kernel.local.iter().copied().chain(literal).chain(on_link).collect(),
        });
        self.checker.field = Some(Arc::clone(&field));
        field
    }

    /// Starts a verification beside everything else; its end comes as [`Verified`].
    pub(super) fn start_verify(&mut self, samples: u32, answer: oneshot::Sender<Answer>) {
        let failed = |error: anyhow::Error| Answer::Failed(format!("{error:#}"));
        match self.verifier(samples) {
            Ok(verifier) => {
                let (running, verified) = (Arc::clone(&self.checker.verifying), self.checker.verified.clone());
                running.store(true, Ordering::Release);
                std::thread::spawn(move || {
                    let result = verifier().map(Verifier::run);
                    running.store(false, Ordering::Release);
                    let _nobody_waits = match result {
                        Ok((verification, disagreements)) => {
                            verified.send(Verified { verification, disagreements, answer }).is_ok()
                        }
                        Err(error) => answer.send(failed(error)).is_ok(),
                    };
                });
            }
            Err(error) => {
                let _nobody_waits = answer.send(failed(error));
            }
        }
    }

    /// What makes a verifier, on the thread that it is to run on: it loads programs.
    fn verifier(&mut self, samples: u32) -> anyhow::Result<impl FnOnce() -> anyhow::Result<Verifier> + Send + use<>> {
        anyhow::ensure!(samples <= MAX_SAMPLES, "at most {MAX_SAMPLES} samples of each prefix");
        anyhow::ensure!(
            !self.checker.verifying.load(Ordering::Acquire),
            "a verification is under way; wait for its end"
        );
        anyhow::ensure!(!self.loader.loads_programs(), "the programs are being loaded; try again in a moment");
        let snapshot = self.snapshot.take().context("the kernel could not be observed yet; try again")?;
        let field = self.field(&snapshot.state);
        let names = names(&snapshot.state);
        self.snapshot = Some(snapshot);
        self.publish_wanted();
        let twins = self.deciding().map(Datapath::twins).transpose()?;
        let (policies, generation) = (self.config.policies.clone(), Arc::clone(&self.checker.generation));
        let wanted = Arc::clone(&self.checker.wanted);
        Ok(move || {
            let examiner = Examiner::new(twins.map(|load| load()).transpose()?)?;
            Ok(Verifier { policies, samples, field, wanted, names: Names(names), generation, examiner })
        })
    }

    /// What the configuration asks for, as of the last pass.
    fn intended(&mut self, kernel: &KernelState) -> Arc<Intent> {
        let intent = self.checker.intent.take().unwrap_or_else(|| Arc::new(self.intent(kernel)));
        self.checker.intent = Some(Arc::clone(&intent));
        intent
    }

    /// Tells a running verification what is wanted now.
    pub(super) fn publish_wanted(&mut self) {
        let Some(snapshot) = self.snapshot.take() else { return };
        let intent = self.intended(&snapshot.state);
        self.checker.wanted.set(intent, &snapshot.state, self.uplinks(&snapshot.state), self.rules_installed());
        self.snapshot = Some(snapshot);
    }

    /// Is a verification running?
    pub(super) fn is_verifying(&self) -> bool {
        self.checker.verifying.load(Ordering::Acquire)
    }

    /// Records the result of a verification, and answers the client that waits for it.
    pub(super) async fn finish_verify(&mut self, verified: Verified) {
        let Verified { mut verification, disagreements, answer } = verified;
        self.dispute(&disagreements).await;
        self.checker.wanted = Arc::default();
        verification.closed = self.checker.reasons().collect();
        let _nobody_waits = answer.send(Answer::Verified(Box::new(verification)));
    }

    /// Asks about a few packets, and again about those of the last time that something was wrong with.
    pub(super) async fn sample(&mut self) {
        // Not while something is being changed: it is done again when it is.
        let steady = self.postponed == Kinds::NONE && self.outgrown.is_none() && !self.adopting;
        let quiet = self.problems.is_empty() && self.retry.is_none() && steady;
        if !quiet {
            return;
        }
        if self.needs_twins() {
            self.load_twins();
            return;
        }
        if let Err(error) = self.examiner() {
            self.checker.complain(&error);
            return;
        }
        let Some(snapshot) = self.snapshot.take() else { return };
        let (field, intent) = (self.field(&snapshot.state), self.intended(&snapshot.state));
        let (uplinks, device_names) = (self.uplinks(&snapshot.state), names(&snapshot.state));
        let Some(mut examiner) = self.checker.examiner.take() else { return };
        let setting = Setting {
            intent: &intent,
            main: &snapshot.state.main,
            uplinks: &uplinks,
            names: &device_names,
            rules: self.rules_installed(),
        };
        let (mut disputed, mut strays) = (Vec::new(), Vec::new());
        let again = std::mem::take(&mut self.checker.suspects);
        let again = again.into_iter().chain(self.checker.strays.iter().map(|(subject, _)| *subject));
        let again = again.collect::<Vec<_>>().into_iter().map(|subject| (subject, true));
        let firsts = (0..SAMPLES).filter_map(|_| field.any(&self.config.policies)).map(|subject| (subject, false));
        for (subject, seen_before) in again.chain(firsts) {
            match examiner.look(&subject, &setting) {
                Ok(sighting) if sighting.agree() => {}
                Ok(_) if !seen_before => self.checker.suspects.push(subject),
                Ok(sighting) if !sighting.programs.agree => disputed.push((subject, sighting)),
                Ok(sighting) => strays.push((subject, sighting)),
                // The device may have gone.
                Err(error) => debug!("{error}"),
            }
        }
        let mended: Vec<String> = (self.checker.disputes.iter())
            .filter(|(_, dispute)| dispute.mendable)
            .filter(|(_, dispute)| matches!(examiner.would_agree(&dispute.subject, &setting), Ok(true)))
            .map(|(policy, _)| policy.clone())
            .collect();
        self.checker.examiner = Some(examiner);
        self.snapshot = Some(snapshot);
        self.note_strays(&Names(device_names), strays);
        for policy in &mended {
            info!("policy \"{policy}\": both datapaths agree again");
            self.checker.disputes.remove(policy);
        }
        let look_closer = !self.checker.disputes.is_empty() && self.checker.maps_read.elapsed() > READ_MAPS;
        if look_closer {
            self.read_maps();
        }
        self.dispute(&disputed).await;
        if look_closer || !mended.is_empty() {
            self.reconcile(Kinds::NONE).await;
        }
    }

    /// Remembers packets that go another way than configured.
    fn note_strays(&mut self, names: &Names, strays: Vec<(Subject, Sighting)>) {
        let before = std::mem::take(&mut self.checker.strays);
        for (subject, sighting) in strays.into_iter().take(STRAYS) {
            let told = names.describe(&subject, &sighting);
            let text = format!("{} to {}: {} ({})", told.source, told.destination, told.because, told.explain);
            if !before.iter().any(|(known, _)| *known == subject) {
                warn!("not as configured: {text}");
            }
            self.checker.strays.push((subject, text));
        }
    }

    /// Leaves to the kernel the policies of packets that both datapaths disagree about.
    async fn dispute(&mut self, disagreements: &[(Subject, Sighting)]) {
        let Some(snapshot) = self.snapshot.as_ref().filter(|_| !disagreements.is_empty()) else { return };
        let (uplinks, kernel) = (self.uplinks(&snapshot.state), &snapshot.state);
        let (main, rules) = (kernel.main.clone(), self.rules_installed());
        let names = Names(names(kernel));
        let intent = self.intent(kernel);
        let setting = Setting { intent: &intent, main: &main, uplinks: &uplinks, names: &names.0, rules };
        let mut new = false;
        for (subject, sighting) in disagreements {
            // Where a gate is closed, the uplink's program is meant to stop what others' rules send there.
            if sighting.programs.agree || !self.gates.open().family(Family::of_addr(&subject.source)) {
                continue;
            }
            let slots = sighting.program.iter().flat_map(|program| program.maps.slots.keys().copied());
            let policies = self.policies_of(slots);
            let name = |policy: usize| Some(self.config.policies.get(policy)?.name.clone());
            let policies: Vec<String> = policies.into_iter().filter_map(name).collect();
            for policy in policies {
                if self.checker.is_disputed(&policy) {
                    continue;
                }
                let told = names.describe(subject, sighting);
                let reason = format!(
                    "disagreement: policy \"{policy}\" is left to the kernel: {} ({} to {}: the program {}, the kernel {}; {} shows \
                     it; it opens again when they agree, or after `tunroute reload`)",
                    told.because, told.source, told.destination, told.program, told.kernel, told.explain
                );
                warn!("{reason}");
                let examiner = self.checker.examiner.as_mut();
                let mendable =
                    examiner.is_some_and(|examiner| matches!(examiner.would_agree(subject, &setting), Ok(false)));
                self.checker.disputes.insert(policy, Dispute { subject: *subject, reason, mendable });
                new = true;
            }
        }
        if new {
            self.read_maps();
            self.reconcile(Kinds::NONE).await;
        }
    }

    /// Another process may have written to the maps: the next pass corrects what differs.
    fn read_maps(&mut self) {
        // While larger programs are being loaded, the pins of some maps are theirs.
        if self.loader.loads_programs() {
            return;
        }
        self.checker.maps_read = Instant::now();
        if let Some(Err(error)) = self.fast.as_mut().map(Datapath::read_again) {
            warn!("{error}");
        }
    }
}
