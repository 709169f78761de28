//! Asks both datapaths about a packet.

use std::{collections::BTreeSet, net::IpAddr};

use etherparse::PacketBuilder;
use tunroute_common::{
    decide::{Arrival, Verdict, decide_egress, decide_ingress},
    maps::{Outcome, flags},
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Slice},
};

use super::agreement::{Agreement, Decision, agreement, no};
use crate::{
    datapath::{DatapathError, Place, Trial, Trialled},
    kernel::{Answer, KernelError, Oracle, Question},
    policy::fast::{FastState, Hook},
    policy::model::Model,
    policy::net::{Family, IfIndex},
};

/// The hop limit of the packets that are asked about.
pub const HOP_LIMIT: u8 = 64;
/// Their UDP ports: those of `traceroute`.
const PORT: u16 = 33434;

/// A packet to be asked about, and where it is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Where the program sees it.
    pub place: Place,
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes to, of the same family.
    pub destination: IpAddr,
}

impl Subject {
    /// A small UDP packet, from its IP header on.
    #[must_use]
    pub fn packet(&self) -> Vec<u8> {
        let builder = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                PacketBuilder::ipv4(source.octets(), destination.octets(), HOP_LIMIT)
            }
            (source, destination) => {
                let octets = |address| match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                    IpAddr::V6(address) => address.octets(),
                };
                PacketBuilder::ipv6(octets(source), octets(destination), HOP_LIMIT)
            }
        }
        .udp(PORT, PORT);
        let mut packet = Vec::with_capacity(builder.size(0));
        // Writing to a vector does not fail.
        let _infallible = builder.write(&mut packet, &[]);
        packet
    }

    fn question(&self) -> Question {
        let iif = (self.place.hook == Hook::Ingress).then_some(self.place.device);
        Question { source: self.source, destination: self.destination, iif }
    }

    fn family(&self) -> Family {
        Family::of_addr(&self.source)
    }

    /// What the programs' code decides over maps that hold this.
    fn decide(&self, maps: &FastState) -> Option<(u32, Outcome)> {
        let packet = self.packet();
        let ethertype = match self.family() {
            Family::V4 => ETHERTYPE_IPV4,
            Family::V6 => ETHERTYPE_IPV6,
        };
        let arrival = Arrival { ethertype, ifindex: self.place.device, to_this_host: true, tagged: false };
        let model = Model::from(maps);
        let verdict = match self.place.hook {
            Hook::Ingress => decide_ingress(&arrival, &Slice(&packet), &model),
            Hook::Egress => decide_egress(&arrival, &Slice(&packet), &model),
        };
        match verdict {
            Verdict::Pass | Verdict::Forward(_) => None,
            Verdict::StepAside(slot, outcome) | Verdict::Drop(slot, outcome) | Verdict::Redirect(slot, _, outcome) => {
                Some((slot, outcome))
            }
        }
    }
}

/// What both say.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// What the program counted and what its maps hold.
    pub program: Trialled,
    /// What it decides.
    pub decision: Decision,
    /// What the kernel would do without it.
    pub kernel: Answer,
    /// Whether they agree.
    pub agreement: Agreement,
}

/// Why nothing could be asked.
#[derive(Debug, thiserror::Error)]
pub enum ExamineError {
    /// The programs.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Both datapaths, ready to be asked.
pub struct Examiner {
    trial: Trial,
    oracle: Oracle,
}

impl Examiner {
    /// Connects to the kernel of the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// If there is no socket to be had.
    pub fn new(trial: Trial) -> Result<Self, ExamineError> {
        Ok(Self { trial, oracle: Oracle::connect()? })
    }

    /// Asks both.
    ///
    /// # Errors
    ///
    /// If one does not answer, as when the device has just gone.
    pub fn look(&mut self, subject: &Subject, uplinks: &BTreeSet<IfIndex>) -> Result<Sighting, ExamineError> {
        let program = self.trial.run(&subject.place, subject.source, subject.destination, &subject.packet())?;
        let outcome = program.counted.map(|(_, outcome)| outcome);
        let decision = Decision::of(outcome, program.slot(), subject.family());
        let kernel = self.oracle.ask(&subject.question())?;
        let agreement = if program.left != (program.maps.shadow || decision == Decision::Left) {
            no("the program does one thing and counts another")
        } else if program.counted != subject.decide(&program.maps) {
            no("the program does not do what its maps say")
        } else {
            agreement(subject.place.hook, decision, kernel, |device| uplinks.contains(&device))
        };
        Ok(Sighting { program, decision, kernel, agreement })
    }

    /// Would they agree, if the fast path did not leave this packet to the kernel because of a disagreement?
    ///
    /// # Errors
    ///
    /// As [`Self::look`].
    pub fn would_agree(&mut self, subject: &Subject, uplinks: &BTreeSet<IfIndex>) -> Result<bool, ExamineError> {
        let Sighting { program: Trialled { mut maps, .. }, kernel, .. } = self.look(subject, uplinks)?;
        for slot in maps.slots.values_mut() {
            slot.egress = slot.egress.without(flags::DISPUTED);
        }
        let counted = subject.decide(&maps);
        let slot = counted.and_then(|(slot, _)| maps.slots.get(&slot));
        let decision = Decision::of(counted.map(|(_, outcome)| outcome), slot, subject.family());
        Ok(agreement(subject.place.hook, decision, kernel, |device| uplinks.contains(&device)).agree)
    }

    /// The kernel alone.
    pub const fn oracle(&mut self) -> &mut Oracle {
        &mut self.oracle
    }
}
