//! Asks the loaded program and the kernel about a packet, and compares both with the configuration.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use etherparse::PacketBuilder;
use tunroute_common::{
    decide::{Arrival, Verdict, decide_egress, decide_ingress},
    maps::{Exempt, Outcome},
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Slice},
};

use super::{
    agreement::{Agreement, Handling, agreement, as_configured, no, without_rules},
    expected::{Expected, Intent, Looked, main_way},
};
use crate::{
    datapath::{DatapathError, Place, Trial, Trialled},
    kernel::{Answer, KernelError, Oracle, Question, Refused, sysctl},
    policy::fast::{FastState, Hook},
    policy::model::Model,
    policy::net::{Family, IfIndex, MainRoute},
};

/// The hop limit of the packets that are asked about.
pub const HOP_LIMIT: u8 = 64;
/// Their UDP ports: those of `traceroute`.
const PORT: u16 = 33434;

/// A packet to be asked about, and where it is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Where the program sees it, or would.
    pub place: Place,
    /// A program runs there; otherwise the kernel decides alone.
    pub program: bool,
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

    /// The packet as the kernel is asked about it.
    #[must_use]
    pub fn question(&self) -> Question {
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

/// What the host does with packets apart from the programs, and what is wanted of it.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// What the configuration asks for.
    pub intent: &'a Intent,
    /// The main table.
    pub main: &'a [MainRoute],
    /// The uplinks.
    pub uplinks: &'a BTreeSet<IfIndex>,
    /// The names of devices.
    pub names: &'a BTreeMap<IfIndex, String>,
    /// Rules are installed; without them the programs decide alone.
    pub rules: bool,
}

/// The answers about one packet.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// What the program counted and what its maps hold; none where none runs.
    pub program: Option<Trialled>,
    /// What the program does with it.
    pub handling: Option<Handling>,
    /// What the kernel would do without the program.
    pub kernel: Answer,
    /// The policies that were considered.
    pub looked: Vec<Looked>,
    /// The program against the rules.
    pub programs: Agreement,
    /// What becomes of the packet, against the configuration.
    pub configured: Agreement,
}

impl Sighting {
    /// Does everything agree?
    #[must_use]
    pub const fn agree(&self) -> bool {
        self.programs.agree && self.configured.agree
    }

    /// In which respect, or why not.
    #[must_use]
    pub const fn because(&self) -> &'static str {
        match (self.programs.agree, self.handling) {
            (false, _) => self.programs.because,
            (true, Some(Handling::Leaves { .. } | Handling::Dropped)) if self.configured.agree => self.programs.because,
            _ => self.configured.because,
        }
    }
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
    /// None while no programs are loaded.
    trial: Option<Trial>,
    oracle: Oracle,
}

impl Examiner {
    /// Connects to the kernel of the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// If no netlink socket can be opened.
    pub fn new(trial: Option<Trial>) -> Result<Self, ExamineError> {
        Ok(Self { trial, oracle: Oracle::connect()? })
    }

    /// Can the programs be asked?
    #[must_use]
    pub const fn has_programs(&self) -> bool {
        self.trial.is_some()
    }

    /// Asks about a packet.
    ///
    /// # Errors
    ///
    /// If one does not answer, as when the device has just gone.
    pub fn look(&mut self, subject: &Subject, setting: &Setting<'_>) -> Result<Sighting, ExamineError> {
        let program = match &mut self.trial {
            Some(trial) if subject.program => {
                Some(trial.run(&subject.place, subject.source, subject.destination, &subject.packet())?)
            }
            _ => None,
        };
        let handling = program.as_ref().map(|program| {
            let outcome = program.counted.map(|(_, outcome)| outcome);
            Handling::of(outcome, program.exit(), subject.family())
        });
        let kernel = self.oracle.ask(&subject.question())?;
        let programs = match (&program, handling) {
            (Some(program), Some(handling)) => compare_programs(subject, program, handling, kernel, setting),
            _ => Agreement { agree: true, because: "the kernel decides alone" },
        };
        let (looked, expected) = setting.intent.expect(&subject.question());
        let configured = compare_configured(subject, handling, kernel, &expected, setting);
        Ok(Sighting { program, handling, kernel, looked, programs, configured })
    }

    /// Would they agree, if the fast path did not leave this packet to the kernel because of a disagreement?
    ///
    /// # Errors
    ///
    /// As [`Self::look`].
    pub fn would_agree(&mut self, subject: &Subject, setting: &Setting<'_>) -> Result<bool, ExamineError> {
        let Sighting { program: Some(Trialled { mut maps, .. }), kernel, .. } = self.look(subject, setting)? else {
            return Ok(true);
        };
        for slot in maps.slots.values_mut() {
            slot.egress = slot.egress.disputed(false);
        }
        let counted = subject.decide(&maps);
        let exit = counted.and_then(|(slot, _)| maps.exit_of(maps.slots.get(&slot)?));
        let handling = Handling::of(counted.map(|(_, outcome)| outcome), exit, subject.family());
        Ok(compare_decisions(subject, &maps, handling, kernel, setting).agree)
    }

    /// The kernel alone.
    pub const fn oracle(&mut self) -> &mut Oracle {
        &mut self.oracle
    }
}

fn compare_programs(
    subject: &Subject,
    program: &Trialled,
    handling: Handling,
    kernel: Answer,
    setting: &Setting<'_>,
) -> Agreement {
    if program.left != (program.maps.shadow || handling == Handling::Left) {
        no("the program does one thing and counts another")
    } else if program.counted != subject.decide(&program.maps) {
        no("the program does not do what its maps say")
    } else if setting.rules {
        compare_decisions(subject, &program.maps, handling, kernel, setting)
    } else {
        Agreement { agree: true, because: "the program decides alone, without rules" }
    }
}

/// The program's decision, over these maps, against the rules.
fn compare_decisions(
    subject: &Subject,
    maps: &FastState,
    handling: Handling,
    kernel: Answer,
    setting: &Setting<'_>,
) -> Agreement {
    let elsewhere = matches!(kernel, Answer::Leaves { device, .. } if !setting.uplinks.contains(&device));
    let leads_inside = maps.exempt.iter().any(|exemption| exemption.kind == Exempt::Inside);
    if subject.place.hook == Hook::Egress && elsewhere && leads_inside {
        let because = "the destination is exempt, and the kernel sends it inside, where no program stops it";
        return Agreement { agree: true, because };
    }
    agreement(subject.place.hook, handling, kernel, |device| setting.uplinks.contains(&device))
}

fn compare_configured(
    subject: &Subject,
    handling: Option<Handling>,
    kernel: Answer,
    expected: &Expected,
    setting: &Setting<'_>,
) -> Agreement {
    let (hook, family) = (subject.place.hook, subject.family());
    let guarded = |device| setting.uplinks.contains(&device);
    let fate = match setting.rules {
        true => kernel,
        false => without_rules(hook, handling, kernel, expected, guarded),
    };
    let main = || main_way(setting.main, &setting.intent.main_refuses, subject.destination);
    let compared = as_configured(expected, fate, (setting.intent, family), main);
    match fate {
        Answer::Refused(refused) if !compared.agree && hook == Hook::Ingress => {
            refused_at(setting.names.get(&subject.place.device), family, refused).unwrap_or(compared)
        }
        _ => compared,
    }
}

/// Why the kernel refuses a packet before it looks for a route, if the device's settings say so. IPv4 only: for IPv6 the
/// kernel's answer does not depend on them.
fn refused_at(device: Option<&String>, family: Family, refused: Refused) -> Option<Agreement> {
    let device = device.filter(|_| family == Family::V4)?;
    let because = match refused {
        Refused::Unreachable if !sysctl::forwards(family, device) => "the kernel does not forward from this device",
        Refused::Dropped if sysctl::rp_filter(device).is_on() => {
            "the kernel drops it: rp_filter does not expect the source at this device"
        }
        _ => return None,
    };
    Some(Agreement { agree: true, because })
}
