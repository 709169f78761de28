//! What was measured: one line of JSON each.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tunroute::policy::net::Family;

use crate::{
    contestant::{BASELINE, FLOOR, NULL},
    load::Pattern,
    machine::Machine,
    site::{Sysctls, Target},
    stats::{Estimate, place_noise},
};

/// One line of a record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Line {
    /// The first: where and how it was measured.
    Run(Machine),
    /// Each of the others.
    Measurement(Measurement),
}

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Time for one forwarded packet.
    Forward,
    /// Time for one packet of the host's own, by an unconnected UDP socket.
    Host,
    /// Round trips through a tunnel.
    Latency,
    /// A TCP transfer through a tunnel.
    Throughput,
    /// Forwarding on all CPUs at the same time.
    Cores,
    /// Time for a decision of the program at the ingress device alone.
    Decision,
    /// Time in the program while packets go through it, as the kernel counts it.
    Counted,
    /// Time to install all prefixes.
    Install,
    /// Time to compile prefixes and publish them to the programs, and what they take there.
    Publish,
    /// Time to give prefixes to another tunnel.
    Change,
    /// Time without packets when a tunnel goes down.
    Failover,
    /// Memory of the kernel and the daemon.
    Memory,
}

impl Scenario {
    /// Does it matter which packets are sent?
    #[must_use]
    pub const fn has_load(self) -> bool {
        matches!(self, Self::Forward | Self::Host | Self::Cores | Self::Decision | Self::Counted)
    }

    /// The contestant that ratios are to.
    #[must_use]
    pub const fn baseline(self) -> &'static str {
        match self {
            Self::Decision => FLOOR,
            _ => BASELINE,
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "forwarding",
            Self::Host => "the host's own packets",
            Self::Latency => "round trips",
            Self::Throughput => "a TCP transfer",
            Self::Cores => "forwarding on all CPUs",
            Self::Decision => "the program alone",
            Self::Counted => "time in the program (bpf_stats)",
            Self::Install => "time to install",
            Self::Publish => "prefixes compiled and published",
            Self::Change => "time to change prefixes",
            Self::Failover => "failover",
            Self::Memory => "memory",
        })
    }
}

/// Under which circumstances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Case {
    /// What was asked.
    pub scenario: Scenario,
    /// 4 or 6.
    pub ip: u8,
    /// What the tunnels were.
    pub target: Target,
    /// How many prefixes the policies had.
    pub prefixes: u32,
    /// Which of them the packets came from.
    pub pattern: Pattern,
    /// The size of frames, in bytes.
    pub size: u16,
    /// The kernel's settings.
    pub sysctls: Sysctls,
    /// How many CPUs worked at the same time.
    pub cpus: u8,
}

impl Case {
    /// The plainest case of a scenario: 64-byte frames from all of the prefixes into tun devices, on one CPU.
    #[must_use]
    pub const fn new(scenario: Scenario, family: Family, prefixes: u32) -> Self {
        let ip = match family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        let (target, pattern, sysctls) = (Target::Tun, Pattern::Uniform, Sysctls::Default);
        Self { scenario, ip, target, prefixes, pattern, size: 64, sysctls, cpus: 1 }
    }

    /// IPv4 or IPv6.
    #[must_use]
    pub const fn family(&self) -> Family {
        if self.ip == 4 { Family::V4 } else { Family::V6 }
    }
}

/// The figure of a failover that is not the kernel's part of it.
pub const TOLD: &str = "after the kernel told that the device was down";

/// The figure of the trie, of what is compiled and published.
pub const TRIE: &str = "trie";
/// The figure of one prefix among many.
pub const ONE: &str = "one";
/// The figure of what the programs look prefixes up in.
pub const LOOKUP: &str = "lookup";
/// The figure of what a daemon that starts reads what is published from.
pub const RECORD: &str = "record";
/// The figure of how many cache lines a lookup reads.
pub const LINES: &str = "cache lines read";
/// The figure of what one such read takes, if it says where the next one is.
pub const ACCESS: &str = "one read";

/// In what it was measured. Less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Nanoseconds for one packet, or for one step on its way.
    NanosecondsPerPacket,
    /// Microseconds.
    Microseconds,
    /// Seconds.
    Seconds,
    /// Seconds for 10^9 bytes.
    SecondsPerGigabyte,
    /// Bytes.
    Bytes,
    /// A count.
    Number,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// There are values.
    Measured,
    /// Packets were lost, or left where they must not.
    Disqualified(String),
    /// Not measured, as it would have taken too long.
    Stopped(String),
    /// Not measured, as the contestant cannot do this.
    Declined(String),
}

/// What a contestant did in a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The circumstances.
    #[serde(flatten)]
    pub case: Case,
    /// Who.
    pub contestant: String,
    /// What was measured, where a case has several figures: `p99`, `maps`, …
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub figure: String,
    /// In what.
    pub unit: Unit,
    /// What came of it.
    pub outcome: Outcome,
    /// One for each round.
    pub values: Vec<f64>,
    /// Their median.
    pub estimate: Option<Estimate>,
    /// The ratio to the baseline of the same round.
    pub ratio: Option<Estimate>,
}

impl Measurement {
    /// Of values without a baseline.
    #[must_use]
    pub fn of(case: Case, contestant: &str, figure: &str, unit: Unit, values: Vec<f64>) -> Self {
        Self {
            case,
            contestant: contestant.to_owned(),
            figure: figure.to_owned(),
            unit,
            outcome: Outcome::Measured,
            estimate: Estimate::of(&values),
            values,
            ratio: None,
        }
    }

    /// None, and why.
    #[must_use]
    pub fn none(case: Case, contestant: &str, unit: Unit, outcome: Outcome) -> Self {
        Self { outcome, ..Self::of(case, contestant, "", unit, Vec::new()) }
    }

    /// With the ratio to the baseline's values of the same rounds.
    #[must_use]
    pub fn relative_to(mut self, baseline: &[f64]) -> Self {
        self.ratio = Estimate::of_ratio(&self.values, baseline);
        self
    }
}

/// A whole run.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Where and how.
    pub machine: Machine,
    /// What.
    pub measurements: Vec<Measurement>,
}

impl Record {
    /// Reads one.
    ///
    /// # Errors
    /// It cannot be read, or is not one.
    pub fn read(path: &Path) -> Result<Self> {
        let what = || path.display().to_string();
        let file = fs::File::open(path).with_context(what)?;
        let (mut machine, mut measurements) = (None, Vec::new());
        for (number, line) in BufReader::new(file).lines().enumerate() {
            let line = line.with_context(what)?;
            let line = serde_json::from_str(&line)
                .with_context(|| format!("{}, line {}: not of a record of this bench", path.display(), number + 1))?;
            match line {
                Line::Run(run) => machine = Some(run),
                Line::Measurement(measurement) => measurements.push(measurement),
            }
        }
        let machine = machine.with_context(|| format!("{} does not say where it was measured", path.display()))?;
        Ok(Self { machine, measurements })
    }

    /// Writes it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let what = || format!("cannot write {}", path.display());
        let mut text = Vec::new();
        let run = Line::Run(self.machine.clone());
        for line in std::iter::once(run).chain(self.measurements.iter().cloned().map(Line::Measurement)) {
            serde_json::to_writer(&mut text, &line).with_context(what)?;
            text.write_all(b"\n").with_context(what)?;
        }
        fs::write(path, text).with_context(what)
    }

    /// By how much ratios of a scenario are off because contestants stand in different places: [`place_noise`] of the
    /// scenario's null pairs, or of all where these are few.
    #[must_use]
    pub fn noise(&self, scenario: Scenario) -> f64 {
        const FEW: usize = 3;
        let nulls = |wanted: Option<Scenario>| -> Vec<Estimate> {
            let pairs = self.measurements.iter().filter(|measurement| {
                measurement.contestant == NULL && wanted.is_none_or(|wanted| measurement.case.scenario == wanted)
            });
            pairs
                .filter_map(|null| Estimate::of_ratio(&null.values, &self.find(&null.case, BASELINE)?.values))
                .collect()
        };
        let own = nulls(Some(scenario));
        place_noise(&if own.len() < FEW { nulls(None) } else { own })
    }

    /// Makes the intervals of all ratios as wide as the places' noise demands. For a run that has just ended.
    pub fn widen(&mut self) {
        let mut noise = BTreeMap::new();
        for scenario in self.measurements.iter().map(|measurement| measurement.case.scenario) {
            noise.entry(scenario).or_insert_with(|| self.noise(scenario));
        }
        for measurement in &mut self.measurements {
            if let Some(ratio) = &mut measurement.ratio
                && measurement.contestant != measurement.case.scenario.baseline()
            {
                *ratio = ratio.widened(noise[&measurement.case.scenario]);
            }
        }
    }

    /// The ratio of what two contestants took in the same case.
    #[must_use]
    pub fn ratio(&self, of: &Measurement, to: &Measurement) -> Option<Estimate> {
        Some(Estimate::of_ratio(&of.values, &to.values)?.widened(self.noise(of.case.scenario)))
    }

    /// What a contestant did in a case, if it was measured.
    #[must_use]
    pub fn find(&self, case: &Case, contestant: &str) -> Option<&Measurement> {
        self.figure(case, contestant, "")
    }

    /// One of several figures of a case, if it was measured.
    #[must_use]
    pub fn figure(&self, case: &Case, contestant: &str, figure: &str) -> Option<&Measurement> {
        self.all(case, contestant, figure).find(|measurement| measurement.outcome == Outcome::Measured)
    }

    /// Why a contestant was not measured in a case, if that was recorded.
    #[must_use]
    pub fn why_not(&self, case: &Case, contestant: &str) -> Option<&Outcome> {
        self.all(case, contestant, "").map(|measurement| &measurement.outcome).find(|&why| *why != Outcome::Measured)
    }

    fn all(&self, case: &Case, contestant: &str, figure: &str) -> impl Iterator<Item = &Measurement> {
        let wanted = (*case, contestant.to_owned(), figure.to_owned());
        self.measurements.iter().filter(move |measurement| {
            (measurement.case, &measurement.contestant, &measurement.figure) == (wanted.0, &wanted.1, &wanted.2)
        })
    }
}
