//! In user space: the decision over the maps against the rule walk over the rules.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{TestError, TestRunner},
};
use tunroute::model::Model;
use tunroute_common::{
    decide::{decide_egress, decide_ingress},
    packet::{Segmented, Slice},
};

use crate::{
    expect::{Fate, Situation},
    packet::{Edges, Recipe, recipe},
    scenario::{Scenario, scenario},
};

/// Random hosts, and packets for each.
const HOSTS: u32 = 1500;
const PACKETS: usize = 60;

/// How often each fate came about: a generator that never gets anywhere would prove nothing.
#[derive(Default)]
pub struct Tally(Mutex<BTreeMap<String, u32>>);

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

/// Every fate of the two programs.
pub const FATES: [&str; 14] = [
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
    "egress pass",
    "egress diverted",
    "egress leak_prevented",
    "egress down",
];

fn agree(scenario: &Scenario, recipes: &[Recipe], tally: &Tally) -> Result<(), TestCaseError> {
    let kernel = scenario.kernel_state();
    let situation = Situation::new(scenario, &kernel);
    let state = situation.fast_state();
    let model = Model::from(&state);
    let edges = Edges::of(scenario);
    for recipe in recipes {
        let packet = recipe.cook(scenario, &edges);
        let (arrival, bytes) = (situation.arrival(&packet), Segmented(Slice(&packet.bytes), packet.gso));
        for (hook, verdict, expected) in [
            ("ingress", decide_ingress(&arrival, &bytes, &model), situation.ingress(&packet)),
            ("egress", decide_egress(&arrival, &bytes, &model), situation.egress(&packet)),
        ] {
            let fate = situation.fate(verdict, &state);
            tally.count(hook, fate);
            prop_assert_eq!(
                fate,
                expected,
                "{}: {:?}\nby the rules: {:?}\n{}\n{:?} {:?}",
                hook,
                packet,
                situation.walk(&packet),
                scenario.text,
                scenario.tunnels,
                scenario.routes
            );
        }
    }
    Ok(())
}

#[test]
fn the_decision_is_that_of_the_rules() {
    let tally = Tally::default();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(HOSTS) };
    let cases = (scenario(), vec(recipe(), PACKETS));
    let result = TestRunner::new(config).run(&cases, |(scenario, recipes)| agree(&scenario, &recipes, &tally));
    match result {
        Ok(()) => tally.check(&FATES),
        // What proptest adds is how the packet was drawn.
        Err(TestError::Fail(reason, _)) => panic!("{reason}"),
        Err(error) => panic!("{error}"),
    }
}
