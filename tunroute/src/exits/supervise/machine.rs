//! Decides when a tunnel is started: a pure state machine over events and times.

use std::time::Duration;

use serde::Serialize;

use super::{
    process::ProcessId,
    record::{Permission, Record},
};
use crate::{config::StartLimit, host::state::BootTime};

/// How long a device may be missing before its tunnel is started again: it appears late, and it flaps.
pub const GRACE: Duration = Duration::from_secs(30);
/// A tunnel that was up this long after its start has recovered: the next failure is a first one.
pub const STABLE: Duration = Duration::from_secs(60);
/// The pause after a first failure. It doubles with each further one, and up to a quarter is added by chance.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// What the pause grows to, before chance adds to it: 5 minutes at most.
const LAST_PAUSE: Duration = Duration::from_secs(240);

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Whether the tunnel's device exists and is up. Nothing is started before this is first said.
    Device(bool),
    /// The command runs.
    Spawned(ProcessId),
    /// The command has ended, or could not be run.
    Ended(End),
    /// The time of [`Machine::deadline`] has come.
    Tick,
    /// The operator says to try again.
    Reset,
    /// The configuration has another limit.
    Limit(StartLimit),
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Exit status 0, as a starter's; or not known, as that of a command which an earlier daemon started. In both cases
    /// the device shows whether the tunnel is up.
    Success,
    /// Any other way: it is started again even if the device is up, as a device may outlive the daemon that feeds it.
    Failure,
}

/// Actions for the caller, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write [`Machine::record`] to disk.
    Save,
    /// Run the command, and report [`Event::Spawned`] or [`Event::Ended`].
    Start,
}

/// Where a tunnel stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Not started by tunroute: its device is up already, or not looked at yet.
    #[default]
    Idle,
    /// The command runs.
    Running,
    /// The command has ended with status 0; the device is up or expected.
    Started,
    /// The command has failed, or the device stays away: started again later.
    Backoff,
    /// Due, but the start limit forbids it until earlier starts are long enough ago.
    Limited,
    /// The limit was reached twice within 24 hours: the operator has to look at it.
    GivenUp,
}

/// A start that is due at some time.
#[derive(Clone, Copy, Debug)]
struct Due {
    at: BootTime,
    cause: Cause,
    phase: Phase,
}

/// Why a start is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The command failed: it is due even if the device is up.
    Failure,
    /// The device is away: not due any more once it is up.
    Device,
}

/// The state of one tunnel's `up` command.
#[derive(Debug)]
pub struct Machine {
    limit: StartLimit,
    record: Record,
    rng: fastrand::Rng,
    /// The command runs, or is about to.
    running: bool,
    /// Has the command ended with status 0?
    started: bool,
    /// Is the device up; since when?
    device: Option<bool>,
    up_since: Option<BootTime>,
    /// Failures since the tunnel was last [`STABLE`].
    failures: u32,
    due: Option<Due>,
}

impl Machine {
    /// A tunnel with the record of its earlier starts. `running`: the command that an earlier daemon started still runs.
    #[must_use]
    pub fn new(limit: StartLimit, record: Record, running: bool, rng: fastrand::Rng) -> Self {
        Self { limit, record, rng, running, started: false, device: None, up_since: None, failures: 0, due: None }
    }

    /// The state to save.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The disk does not take the record, so the next daemon will not know of the starts of this one, nor this one of
    /// those before it: none for one interval.
    pub fn hold(&mut self, now: BootTime) {
        self.record.hold(now, self.limit);
    }

    /// The tunnel was taken down: nothing of it is left for the next daemon to take care of.
    pub fn stopped(&mut self) {
        self.record.process = None;
        self.record.ours = false;
    }

    /// Where the tunnel stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.due {
            _ if self.running => Phase::Running,
            _ if self.record.given_up => Phase::GivenUp,
            Some(due) => due.phase,
            None => self.resting(),
        }
    }

    /// When [`Event::Tick`] is wanted.
    #[must_use]
    pub fn deadline(&self) -> Option<BootTime> {
        self.due.map(|due| due.at)
    }

    /// Takes one event; returns the actions that follow.
    pub fn step(&mut self, now: BootTime, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Device(up) => self.device(now, up),
            Event::Spawned(process) => {
                self.record.started(now, Some(process));
                actions.push(Action::Save);
            }
            Event::Ended(end) => self.ended(now, end),
            Event::Tick => {}
            Event::Reset => {
                self.record.forgive();
                self.failures = 0;
                if self.due.is_some() || self.device == Some(false) {
                    let cause = self.due.map_or(Cause::Device, |due| due.cause);
                    self.expect(now, cause, Phase::Backoff);
                }
                actions.push(Action::Save);
            }
            Event::Limit(limit) => {
                self.limit = limit;
                // A wait for the old limit is asked for anew.
                if let Some(due) = self.due.as_mut().filter(|due| due.phase == Phase::Limited) {
                    due.at = now;
                }
            }
        }
        if let Some(due) = self.due.filter(|due| due.at <= now) {
            self.try_start(now, due, &mut actions);
        }
        actions
    }

    /// The device is up, or not.
    fn device(&mut self, now: BootTime, up: bool) {
        let before = self.device.replace(up);
        if before == Some(up) {
            return;
        }
        if up {
            self.up_since = Some(now);
            self.due = self.due.filter(|due| due.cause == Cause::Failure);
            return;
        }
        self.recover(now);
        self.up_since = None;
        if self.running || self.due.is_some() {
            return;
        }
        if before.is_none() {
            // An earlier daemon may have started it a moment ago, and the device is on its way.
            let at = self.record.last_start().map_or(now, |start| start.after(GRACE));
            self.expect(at, Cause::Device, self.resting());
        } else {
            self.expect_device(now);
        }
    }

    /// The command has ended.
    fn ended(&mut self, now: BootTime, end: End) {
        self.running = false;
        self.record.process = None;
        self.recover(now);
        match end {
            End::Success => {
                self.started = true;
                if self.device != Some(true) {
                    self.expect_device(now);
                }
            }
            End::Failure => {
                self.started = false;
                let pause = self.pause();
                self.expect(now.after(pause), Cause::Failure, Phase::Backoff);
            }
        }
    }

    /// The device is expected to appear; if it does not, the tunnel is started again.
    fn expect_device(&mut self, now: BootTime) {
        let pause = self.pause();
        let phase = if pause > GRACE { Phase::Backoff } else { self.resting() };
        self.expect(now.after(pause.max(GRACE)), Cause::Device, phase);
    }

    /// A start is due at a time.
    fn expect(&mut self, at: BootTime, cause: Cause, phase: Phase) {
        if !self.running && !self.record.given_up {
            self.due = Some(Due { at, cause, phase });
        }
    }

    /// Where the tunnel stands when nothing runs and nothing is due.
    fn resting(&self) -> Phase {
        if self.started { Phase::Started } else { Phase::Idle }
    }

    /// Forgets the failures, if the last start brought the tunnel up to stay.
    fn recover(&mut self, now: BootTime) {
        let up = self.up_since.map_or(Duration::ZERO, |since| now.since(since));
        let started = self.record.last_start().map_or(Duration::MAX, |start| now.since(start));
        if up.min(started) >= STABLE {
            self.failures = 0;
        }
    }

    /// The pause after one more failure.
    fn pause(&mut self) -> Duration {
        let doubled = 2u32.checked_pow(self.failures).and_then(|times| FIRST_PAUSE.checked_mul(times));
        self.failures = self.failures.saturating_add(1);
        doubled.unwrap_or(LAST_PAUSE).min(LAST_PAUSE).mul_f64(1.0 + self.rng.f64() / 4.0)
    }

    /// A start is due: is it allowed?
    fn try_start(&mut self, now: BootTime, due: Due, actions: &mut Vec<Action>) {
        match self.record.permission(self.limit, now) {
            Permission::Granted => {
                self.due = None;
                self.running = true;
                self.record.start(self.limit, now);
                actions.extend([Action::Save, Action::Start]);
            }
            Permission::Held(until) => self.due = Some(Due { at: until, phase: Phase::Limited, ..due }),
            Permission::Limited(until) => {
                if self.record.trip(now) {
                    actions.push(Action::Save);
                }
                self.due = Some(Due { at: until, phase: Phase::Limited, ..due }).filter(|_| !self.record.given_up);
            }
        }
    }
}

#[cfg(test)]
mod tests;
