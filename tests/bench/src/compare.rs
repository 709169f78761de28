//! What has become slower or faster since an older run.
//!
//! Machines drift by several percent from run to run, so times of two runs are not compared, but their ratios to the
//! baseline of the same run, where there is one.

use crate::{
    contestant::{BASELINE, NULL},
    record::{Measurement, Outcome, Record},
    stats::Estimate,
};

/// Ratios of two runs differ by up to so much without anything having changed: programs and maps lie elsewhere in
/// memory.
pub const NOISE: f64 = 0.05;

/// What has become of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Better beyond noise.
    Faster,
    /// Worse beyond noise.
    Slower,
    /// It was measured, and is not any more: lost packets, for instance.
    Failed,
}

/// A figure that has changed.
#[derive(Clone, Debug)]
pub struct Change<'a> {
    /// How.
    pub verdict: Verdict,
    /// Before.
    pub old: &'a Measurement,
    /// Now.
    pub new: &'a Measurement,
    /// Now divided by before.
    pub factor: f64,
}

/// What has changed beyond noise, and how many figures there were to compare.
#[must_use]
pub fn compare<'a>(old: &'a Record, new: &'a Record) -> (Vec<Change<'a>>, usize) {
    let (mut changes, mut compared) = (Vec::new(), 0);
    for before in &old.measurements {
        if before.outcome != Outcome::Measured || [BASELINE, NULL].contains(&before.contestant.as_str()) {
            continue;
        }
        let same = |now: &&Measurement| {
            (now.case, &now.contestant, &now.figure) == (before.case, &before.contestant, &before.figure)
        };
        let Some(now) = new.measurements.iter().find(same) else { continue };
        compared += 1;
        if matches!(now.outcome, Outcome::Disqualified(_)) {
            changes.push(Change { verdict: Verdict::Failed, old: before, new: now, factor: f64::NAN });
            continue;
        }
        // One value says nothing of noise.
        let (Some(a), Some(b)) = (before.ratio, now.ratio) else { continue };
        if let Some(larger) = differs(&a, &b) {
            let verdict = if larger { Verdict::Slower } else { Verdict::Faster };
            changes.push(Change { verdict, old: before, new: now, factor: b.median / a.median });
        }
    }
    (changes, compared)
}

/// Whether the second is larger, if the two differ by more than their intervals and noise allow.
fn differs(old: &Estimate, new: &Estimate) -> Option<bool> {
    if new.low > old.high * (1.0 + NOISE) {
        Some(true)
    } else if new.high < old.low / (1.0 + NOISE) {
        Some(false)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use tunroute::policy::net::Family;

    use super::*;
    use crate::{
        machine::Machine,
        record::{Case, Scenario, Unit},
    };

    fn record(contestant: &str, values: &[f64]) -> Record {
        let case = Case::new(Scenario::Forward, Family::V4, 1000);
        let measurement = Measurement::of(case, contestant, "", Unit::NanosecondsPerPacket, values.to_vec());
        let measurements = vec![measurement.relative_to(&vec![100.0; values.len()])];
        Record { machine: Machine::observe(Vec::new(), Vec::new()), measurements }
    }

    #[test]
    fn only_what_goes_beyond_noise_is_a_change() {
        let around = |centre: f64| -> Vec<f64> { (0..20).map(|round| centre + f64::from(round % 5) - 2.0).collect() };
        for (old, new, expected) in [
            (around(100.0), around(100.0), None),
            (around(100.0), around(104.0), None),
            (around(100.0), around(120.0), Some(Verdict::Slower)),
            (around(120.0), around(100.0), Some(Verdict::Faster)),
            // The median has doubled, but the interval is too wide to tell.
            (vec![50.0, 150.0, 250.0], vec![100.0, 300.0, 500.0], None),
        ] {
            let (old, new) = (record("tunroute-both", &old), record("tunroute-both", &new));
            let (changes, compared) = compare(&old, &new);
            assert_eq!(compared, 1);
            assert_eq!(changes.first().map(|change| change.verdict), expected, "{changes:?}");
        }
    }

    #[test]
    fn losing_packets_is_a_regression_and_the_baseline_is_not_compared_with_itself() {
        let old = record("tunroute-both", &[100.0; 20]);
        let mut new = old.clone();
        new.measurements[0].outcome = Outcome::Disqualified("lost".to_owned());
        assert_eq!(compare(&old, &new).0[0].verdict, Verdict::Failed);
        assert_eq!(compare(&record(BASELINE, &[1.0; 9]), &record(BASELINE, &[9.0; 9])).1, 0);
    }
}
