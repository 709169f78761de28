//! How often each fate came about: a generator that never gets anywhere would prove nothing.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use super::expect::Fate;

/// Every fate of the two programs.
pub const FATES: [&str; 17] = [
    "ingress pass",
    "ingress forwarded",
    "ingress blackholed",
    "ingress exempt",
    "ingress down",
    "ingress hairpin",
    "ingress expired",
    "ingress too_big",
    "ingress source_check",
    "ingress closed",
    "ingress main",
    "egress pass",
    "egress diverted",
    "egress leak_prevented",
    "egress exempt",
    "egress down",
    "egress main",
];

/// What XDP does by itself.
pub const EARLY: [&str; 2] = ["xdp forwarded", "xdp blackholed"];

/// Counts by fate.
#[derive(Default)]
pub struct Tally(Mutex<BTreeMap<String, u64>>);

impl Tally {
    /// Counts a fate.
    pub fn count(&self, hook: &str, fate: Fate) {
        let name = match fate {
            Fate::Pass => "pass",
            Fate::Aside(_, outcome) | Fate::Drop(_, outcome) | Fate::Redirect(_, outcome, ..) => outcome.name(),
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(format!("{hook} {name}")).or_default() += 1;
    }

    /// Prints the counts, and fails unless each of these fates came about often.
    pub fn check(&self, expected: &[&str]) {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (fate, count) in &*counts {
            println!("{count:>9} {fate}");
        }
        for fate in expected {
            assert!(counts.get(*fate).is_some_and(|count| *count >= 20), "too few of: {fate}");
        }
    }
}
