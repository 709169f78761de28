//! What is remembered of a tunnel's starts, so that a start limit holds across restarts, crashes and reboots.
//!
//! Times are [`BootTime`]s, for the wall clock may jump. A record of an earlier boot is moved so that it was saved at
//! time zero of this boot: the time that the machine was off counts as none, because only the wall clock knows it, and
//! one that jumped ahead would allow more starts than the limit. The price is that a start may wait longer than it had
//! to, by at most the interval after a reboot.
//!
//! A record that cannot be trusted (damaged, unreadable, or of a boot that cannot be told) is replaced by a pause of one
//! interval: whatever was started before, it is out of the window after that. A daemon that finds the disk refusing the
//! record makes the same pause before its first start and then counts in memory, so that one that crashes again and
//! again on a full disk stays within the limit. What remains: starts made while the disk refused are unknown to a next
//! daemon for which it works again within the interval.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::process::ProcessId;
use crate::{config::StartLimit, host::state::BootTime};

/// A second trip of the limit within this time gives the tunnel up.
pub const TRIP_MEMORY: Duration = Duration::from_secs(24 * 60 * 60);
/// At least this many starts are remembered, so that a limit that is raised by a reload counts the past, too.
const KEEP: usize = 256;

/// The starts of one tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The boot under which the times were taken; empty if unknown.
    boot: String,
    /// When it was written.
    saved_at: BootTime,
    /// The starts, oldest first.
    starts: Vec<BootTime>,
    /// When the limit forbade a start that was due: once for each time it was reached.
    trips: Vec<BootTime>,
    /// Tripped twice within [`TRIP_MEMORY`]: no more starts until the operator says so.
    pub(super) given_up: bool,
    /// No start before this time, since earlier starts are not known.
    hold_until: Option<BootTime>,
    /// The `up` process as last started.
    pub(super) process: Option<ProcessId>,
    /// Brought up by tunroute under this boot, so for tunroute to take down.
    pub(super) ours: bool,
}

/// May a tunnel be started?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Yes.
    Granted,
    /// Not before this time: earlier starts are not known.
    Held(BootTime),
    /// Not before this time: the limit is used up.
    Limited(BootTime),
}

impl Record {
    /// A record for a tunnel of whose starts nothing is known: none is allowed for one interval.
    #[must_use]
    pub fn unknown(now: BootTime, limit: StartLimit) -> Self {
        let mut record = Self::default();
        record.hold(now, limit);
        record
    }

    /// No start for one interval.
    pub fn hold(&mut self, now: BootTime, limit: StartLimit) {
        self.hold_until = Some(now.after(limit.interval));
    }

    /// Makes a record that was read from disk count under this boot.
    #[must_use]
    pub fn restored(mut self, boot: Option<&str>, now: BootTime, limit: StartLimit) -> Self {
        let same = boot == Some(self.boot.as_str());
        let shift = if same { 0 } else { self.saved_at.0 };
        // Nothing in the past has happened in the future: a virtual machine taken back to a snapshot, or a damaged file.
        let past = |time: &mut BootTime| *time = BootTime(time.0.saturating_sub(shift)).min(now);
        self.starts.iter_mut().for_each(past);
        self.trips.iter_mut().for_each(past);
        self.starts.sort_unstable();
        self.trips.sort_unstable();
        // A pause is never longer than the one that would be made now.
        self.hold_until =
            self.hold_until.map(|hold| BootTime(hold.0.saturating_sub(shift)).min(now.after(limit.interval)));
        if boot.is_none() || self.boot.is_empty() {
            self.hold(now, limit);
        }
        if !same {
            self.process = None;
            self.ours = false;
        }
        self
    }

    /// The record as written to disk.
    #[must_use]
    pub fn to_save(&self, boot: Option<&str>, now: BootTime) -> Self {
        Self { boot: boot.unwrap_or_default().to_owned(), saved_at: now, ..self.clone() }
    }

    /// Would a start now exceed the limit?
    #[must_use]
    pub fn permission(&self, limit: StartLimit, now: BootTime) -> Permission {
        if let Some(hold) = self.hold_until.filter(|hold| *hold > now) {
            return Permission::Held(hold);
        }
        // The start that must have left the window before there may be another. The millisecond makes up for rounding.
        let burst = usize::try_from(limit.burst).unwrap_or(usize::MAX);
        let oldest = self.starts.len().checked_sub(burst).and_then(|index| self.starts.get(index));
        match oldest.map(|start| start.after(limit.interval).after(Duration::from_millis(1))) {
            Some(free) if free > now => Permission::Limited(free),
            _ => Permission::Granted,
        }
    }

    /// Notes a start. It must be on disk before the command runs.
    pub fn start(&mut self, limit: StartLimit, now: BootTime) {
        self.starts.push(now);
        let keep = KEEP.max(usize::try_from(limit.burst).unwrap_or(usize::MAX));
        self.starts.drain(..self.starts.len().saturating_sub(keep));
        self.ours = true;
    }

    /// Moves the last start to when the command really ran: the disk may have taken its time.
    pub fn started(&mut self, now: BootTime, process: Option<ProcessId>) {
        if let Some(last) = self.starts.last_mut() {
            *last = now;
        }
        self.process = process;
    }

    /// Notes that the limit forbids a start that is due. Returns whether that is news: the wait for one and the same
    /// start counts once, however often it is asked for, also by the next daemon.
    pub fn trip(&mut self, now: BootTime) -> bool {
        if self.trips.last().is_some_and(|trip| self.starts.last().is_none_or(|start| trip >= start)) {
            return false;
        }
        self.trips.retain(|trip| now.since(*trip) <= TRIP_MEMORY);
        self.given_up = !self.trips.is_empty();
        self.trips.push(now);
        true
    }

    /// The operator says to try again. The starts made so far still count.
    pub fn forgive(&mut self) {
        self.trips.clear();
        self.given_up = false;
    }

    /// The last start.
    #[must_use]
    pub fn last_start(&self) -> Option<BootTime> {
        self.starts.last().copied()
    }

    /// The number of starts in the interval that ends now.
    #[must_use]
    pub fn starts_in_window(&self, limit: StartLimit, now: BootTime) -> usize {
        self.starts.iter().rev().take_while(|start| now.since(**start) <= limit.interval).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: StartLimit = StartLimit { burst: 2, interval: Duration::from_secs(60) };

    fn at(seconds: i64) -> BootTime {
        BootTime(seconds * 1000)
    }

    fn started_at(times: &[i64]) -> Record {
        let mut record = Record::default();
        for time in times {
            record.start(LIMIT, at(*time));
        }
        record
    }

    /// Saved at 1000 s of boot "a", read again.
    #[test]
    fn restored_records() {
        let saved = started_at(&[970, 990]).to_save(Some("a"), at(1000));
        let free = |seconds: i64| Permission::Limited(BootTime(seconds * 1000 + 1));
        let cases = [
            ("same boot", Some("a"), at(1010), free(1030)),
            ("same boot, later", Some("a"), at(1031), Permission::Granted),
            ("same boot, a snapshot taken back", Some("a"), at(500), free(560)),
            ("another boot: as if no time had passed", Some("b"), at(10), free(30)),
            ("another boot, later", Some("b"), at(31), Permission::Granted),
            ("a boot that cannot be told", None, at(5000), Permission::Held(at(5060))),
        ];
        for (name, boot, now, expected) in cases {
            assert_eq!(saved.clone().restored(boot, now, LIMIT).permission(LIMIT, now), expected, "{name}");
        }
        let nameless = started_at(&[970]).to_save(None, at(1000));
        assert_eq!(nameless.restored(Some("a"), at(10), LIMIT).permission(LIMIT, at(10)), Permission::Held(at(70)));
    }

    #[test]
    fn absurd_times_hold_at_most_one_interval() {
        let absurd = [i64::MIN, -1, 0, i64::MAX];
        for (time, saved_at, now) in absurd.into_iter().flat_map(|a| absurd.map(|b| (a, b, at(100)))) {
            let record = Record {
                boot: "a".to_owned(),
                saved_at: BootTime(saved_at),
                starts: vec![BootTime(time); 3],
                trips: vec![BootTime(time); 3],
                hold_until: Some(BootTime(time)),
                ..Record::default()
            };
            for boot in ["a", "b"] {
                let record = record.clone().restored(Some(boot), now, LIMIT);
                assert!(record.starts.iter().all(|start| *start <= now));
                assert_eq!(
                    record.permission(LIMIT, BootTime(160_001)),
                    Permission::Granted,
                    "{time} {saved_at} {boot}"
                );
            }
        }
    }

    #[test]
    fn a_reboot_ends_what_ran() {
        let mut record = started_at(&[10]);
        record.started(at(11), Some(ProcessId { pid: 5, start_ticks: 6, output: 7 }));
        let saved = record.to_save(Some("a"), at(12));
        let same = saved.clone().restored(Some("a"), at(13), LIMIT);
        assert!(same.ours && same.process.is_some());
        let other = saved.restored(Some("b"), at(13), LIMIT);
        assert!(!other.ours && other.process.is_none());
    }

    #[test]
    fn a_second_trip_within_a_day_gives_up() {
        let day = i64::try_from(TRIP_MEMORY.as_secs()).unwrap();
        for (second, given_up) in [(1000, true), (20 + day, true), (21 + day, false)] {
            let mut record = started_at(&[0, 10]);
            assert!(record.trip(at(20)));
            assert!(!record.trip(at(30)), "the same wait");
            record.start(LIMIT, at(61));
            assert!(record.trip(at(second)));
            assert_eq!(record.given_up, given_up, "{second}");
            record.forgive();
            assert!(!record.given_up);
            assert_eq!(record.last_start(), Some(at(61)), "the limit still counts the past");
        }
    }

    #[test]
    fn the_record_does_not_grow() {
        let mut record = Record::default();
        for second in 0..1000 {
            record.start(LIMIT, at(second));
        }
        assert_eq!(record.starts.len(), KEEP);
        assert_eq!(record.last_start(), Some(at(999)));
        assert_eq!(record.starts_in_window(LIMIT, at(999)), 61);
    }
}
