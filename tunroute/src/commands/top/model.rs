//! The state of the view: rates, their history, and events, computed from the daemon's answers and the time between them.
//! Pure.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use super::events::events;
use crate::{
    control::status::{OutcomeStatus, PolicyStatus, Status, TunnelStatus, by_family, in_words},
    kernel::Traffic,
};

/// The number of samples kept for a sparkline: more than a terminal is wide.
const REMEMBERED: usize = 500;
/// The number of events kept: more than a terminal is high.
const EVENTS: usize = 200;

/// A rate per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A row of the tunnels' table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelRow {
    /// Its name.
    pub name: String,
    /// `up`, `down`, `failed` or `pending`.
    pub state: String,
    /// What is sent into it.
    pub sent: Rate,
    /// What is received from it.
    pub received: Rate,
}

/// A row of the policies' table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRow {
    /// Its name.
    pub name: String,
    /// The tunnel that carries its packets, or their fate while none is up.
    pub leaves_by: String,
    /// The datapath that decides forwarded packets.
    pub decided_by: String,
    /// The rate at which the fast path sends into the tunnel.
    pub rate: Rate,
}

/// Packets of a policy that were not handed to its tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutcomeRow {
    /// The policy's name.
    pub policy: String,
    /// The outcome.
    pub what: &'static str,
    /// The rate.
    pub rate: Rate,
    /// The count since the counters started.
    pub total: u64,
}

/// What two consecutive answers show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// The tunnels, in the order of the configuration.
    pub tunnels: Vec<TunnelRow>,
    /// The policies, in the order of the configuration.
    pub policies: Vec<PolicyRow>,
    /// Outcomes with a count, by policy.
    pub outcomes: Vec<OutcomeRow>,
}

/// The growth of a counter per second. A counter that has been reset, by a new device or daemon, has none.
fn per_second(before: u64, after: u64, interval: Duration) -> u64 {
    let grown = u128::from(after.saturating_sub(before)) * 1_000_000;
    let micros = interval.as_micros().max(1);
    u64::try_from((grown + micros / 2) / micros).unwrap_or(u64::MAX)
}

/// Compares two answers.
#[must_use]
pub fn rows(before: &Status, after: &Status, interval: Duration) -> Rows {
    let rate = |before: OutcomeStatus, after: OutcomeStatus| Rate {
        packets: per_second(before.packets, after.packets, interval),
        bytes: per_second(before.bytes, after.bytes, interval),
    };
    let mut rows = Rows::default();
    for tunnel in &after.tunnels {
        let same = |old: &&TunnelStatus| (&old.name, old.ifindex) == (&tunnel.name, tunnel.ifindex);
        let [old, new] = [before.tunnels.iter().find(same), Some(tunnel)]
            .map(|tunnel| tunnel.and_then(|tunnel| tunnel.traffic).map(both_directions));
        // A new device starts at zero.
        let [sent, received] = match (old, new) {
            (old, Some(new)) => {
                let old = old.unwrap_or_default();
                [rate(old[0], new[0]), rate(old[1], new[1])]
            }
            (_, None) => [Rate::default(); 2],
        };
        rows.tunnels.push(TunnelRow { name: tunnel.name.clone(), state: tunnel.state.clone(), sent, received });
    }
    for policy in &after.policies {
        let Some(old) = before.policies.iter().find(|old| old.name == policy.name) else { continue };
        let counter = |policy: &PolicyStatus| OutcomeStatus { packets: policy.packets, bytes: policy.bytes };
        rows.policies.push(PolicyRow {
            name: policy.name.clone(),
            leaves_by: by_family(&policy.active).replace('\n', ", "),
            decided_by: by_family(&policy.carried_by).replace('\n', ", "),
            rate: rate(counter(old), counter(policy)),
        });
        for (outcome, counter) in policy.outcomes.iter().filter(|(_, counter)| counter.packets > 0) {
            if let Some(what) = in_words(outcome) {
                let old = old.outcomes.get(outcome).copied().unwrap_or_default();
                let (policy, total) = (policy.name.clone(), counter.packets);
                rows.outcomes.push(OutcomeRow { policy, what, rate: rate(old, *counter), total });
            }
        }
    }
    rows
}

/// The rates sent and received.
fn both_directions(traffic: Traffic) -> [OutcomeStatus; 2] {
    let Traffic { sent_packets, sent_bytes, received_packets, received_bytes } = traffic;
    [(sent_packets, sent_bytes), (received_packets, received_bytes)]
        .map(|(packets, bytes)| OutcomeStatus { packets, bytes })
}

/// The subject of a sparkline.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A tunnel, by its name.
    Tunnel(String),
    /// A policy, by its name.
    Policy(String),
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The time since the first answer.
    pub at: Duration,
    /// The text.
    pub what: String,
}

/// The state of the view.
#[derive(Clone, Debug)]
pub struct Model {
    status: Status,
    rows: Rows,
    history: BTreeMap<Subject, VecDeque<u64>>,
    events: VecDeque<Event>,
    clock: Duration,
    /// The time since the last answer.
    silence: Duration,
}

impl Model {
    /// The state after the first answer, without rates.
    #[must_use]
    pub fn new(status: Status) -> Self {
        let rows = rows(&status, &status, Duration::ZERO);
        let (clock, silence) = (Duration::ZERO, Duration::ZERO);
        Self { status, rows, history: BTreeMap::new(), events: VecDeque::new(), clock, silence }
    }

    /// Takes an answer, and the time since the one before or since the last failure.
    pub fn answer(&mut self, status: Status, after: Duration) {
        self.clock += after;
        if !self.silence.is_zero() {
            self.note("the daemon answers again".to_owned());
        }
        for event in events(&self.status, &status) {
            self.note(event);
        }
        self.rows = rows(&self.status, &status, after + self.silence);
        self.silence = Duration::ZERO;
        self.status = status;

        let tunnels = self
            .rows
            .tunnels
            .iter()
            .map(|row| (Subject::Tunnel(row.name.clone()), row.sent.bytes.saturating_add(row.received.bytes)));
        let policies = self.rows.policies.iter().map(|row| (Subject::Policy(row.name.clone()), row.rate.bytes));
        let mut history = BTreeMap::new();
        for (subject, bytes) in tunnels.chain(policies) {
            let mut values = self.history.remove(&subject).unwrap_or_default();
            values.push_back(bytes);
            if values.len() > REMEMBERED {
                values.pop_front();
            }
            history.insert(subject, values);
        }
        self.history = history;
    }

    /// Takes the reason for a missing answer.
    pub fn no_answer(&mut self, why: String, after: Duration) {
        self.clock += after;
        if self.silence.is_zero() {
            self.note(why);
        }
        self.silence += after;
    }

    fn note(&mut self, what: String) {
        self.events.push_front(Event { at: self.clock, what });
        self.events.truncate(EVENTS);
    }

    /// The last answer.
    #[must_use]
    pub const fn status(&self) -> &Status {
        &self.status
    }

    /// What the last two answers show.
    #[must_use]
    pub const fn rows(&self) -> &Rows {
        &self.rows
    }

    /// The events with their age, the newest first.
    pub fn events(&self) -> impl Iterator<Item = (Duration, &str)> {
        self.events.iter().map(|event| (self.clock.saturating_sub(event.at), event.what.as_str()))
    }

    /// How long the daemon has not answered; none if it answers.
    #[must_use]
    pub fn silence(&self) -> Option<Duration> {
        (!self.silence.is_zero()).then_some(self.silence)
    }

    /// A sparkline of bytes per second, the newest at the right. The highest value is a full block, and zero a space.
    #[must_use]
    pub fn sparkline(&self, subject: &Subject, width: usize) -> String {
        const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let values = self.history.get(subject).into_iter().flatten();
        let newest: Vec<u64> = values.copied().rev().take(width).collect();
        let highest = newest.iter().copied().max().unwrap_or(0).max(1);
        let block = |value: u64| {
            let eighths = (u128::from(value) * 8).div_ceil(u128::from(highest));
            usize::try_from(eighths).ok().and_then(|eighths| BLOCKS.get(eighths.checked_sub(1)?)).copied()
        };
        let line: String = newest.into_iter().rev().map(|value| block(value).unwrap_or(' ')).collect();
        format!("{line:>width$}")
    }
}
