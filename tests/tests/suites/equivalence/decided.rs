//! In user space: the decision over the maps against the rule walk over the rules.

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{TestError, TestRunner},
};
use tunroute::policy::model::Model;
use tunroute_common::{
    decide::{decide_egress, decide_ingress},
    packet::{Segmented, Slice},
};

use super::{
    expect::Situation,
    packet::{Edges, Recipe, recipe},
    scenario::{Scenario, scenario},
    tally::{FATES, Tally},
};

/// Random hosts, and packets for each.
const HOSTS: u32 = 1500;
const PACKETS: usize = 60;

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
            if situation.unseen(hook, &packet) {
                continue;
            }
            let fate = situation.fate(verdict, &state);
            tally.count(hook, fate);
            let about = || format!("{hook}: {packet:?}\nby the rules: {:?}\n{scenario}", situation.walk(&packet));
            prop_assert_eq!(fate, expected, "{}", about());
            if hook == "ingress" {
                let meant = situation.check_intent(&packet, fate);
                prop_assert!(meant.is_ok(), "{meant:?}\n{}", about());
            }
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
