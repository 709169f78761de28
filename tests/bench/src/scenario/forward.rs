//! The stages of a run: who is put up with how many prefixes, and what is measured there.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use tunroute::net::Family;

use super::{Arena, Bench, host, latency, upkeep};
use crate::{
    contestant::Task,
    limits::Step,
    load::Pattern,
    machine::settle,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, Scenario, Unit},
    site::{Sysctls, Target},
};

/// The number of prefixes at which what does not depend on it is looked at.
const MIDDLE: u32 = 1000;

/// So many rules are put up at most: 50,000 take 25 seconds.
const MOST_RULES: u32 = 10_000;

/// The stages of a run: sites for a task, and the cases that are measured on them.
#[must_use]
pub fn stages(prefixes: &[u32], quick: bool) -> Vec<Vec<Case>> {
    let mut stages = Vec::new();
    for &count in prefixes {
        for family in Family::ALL {
            let plain = Case::new(Scenario::Forward, family, count);
            let mut cases = vec![plain];
            // IPv6 has no such setting.
            if family == Family::V4 && !(quick && count < MIDDLE) {
                cases.push(Case { sysctls: Sysctls::AcceptLocal, ..plain });
            }
            if count == MIDDLE && !quick {
                cases.push(Case { pattern: Pattern::ManyDestinations, ..plain });
                cases.push(Case { pattern: Pattern::OneFlow, ..plain });
                cases.push(Case { size: 1400, ..plain });
            }
            if [MIDDLE, 100_000].contains(&count) && !quick {
                cases.push(Case { pattern: Pattern::Zipf, ..plain });
            }
            if count == MIDDLE || !quick && [1, 100_000].contains(&count) {
                cases.push(Case { scenario: Scenario::Host, ..plain });
                cases.push(Case { scenario: Scenario::Latency, ..plain });
            }
            if count == MIDDLE {
                cases.push(Case { scenario: Scenario::Cores, cpus: 2, ..plain });
            }
            cases.push(Case { scenario: Scenario::Memory, ..plain });
            // Last, since it takes the tunnel's routes away from those who do not put them back.
            if count >= MIDDLE && count.ilog10().is_multiple_of(2) || count == MIDDLE {
                cases.push(Case { scenario: Scenario::Failover, ..plain });
            }
            stages.push(cases);
            if count == MIDDLE {
                stages.push(vec![Case { pattern: Pattern::Unmatched, ..plain }]);
                stages.push(vec![Case { target: Target::Vxlan, ..plain }]);
            }
        }
    }
    stages
}

/// Runs stages in the order of their numbers of prefixes, and stops a contestant where it becomes unbearable.
///
/// # Errors
/// A site cannot be made, or packets cannot be sent.
pub fn run(bench: &mut Bench, stages: &[Vec<Case>]) -> Result<Vec<Measurement>> {
    let contestants = std::mem::take(&mut bench.contestants);
    let mut measurements = Vec::new();
    let mut steps: BTreeMap<(u8, &str), Vec<Step>> = BTreeMap::new();
    let end = Instant::now() + bench.effort.time;
    for cases in stages {
        let Some(first) = cases.first() else { continue };
        if Instant::now() > end {
            bench.progress.note(&format!("no time left for {}", crate::report::table::title(first)));
            continue;
        }
        let prefixes = Prefixes { family: first.family(), count: first.prefixes };
        let task = Task { prefixes, target: first.target, pattern: first.pattern };
        bench.progress.say(format!("IPv{}, {} prefixes: setting up", first.ip, first.prefixes));
        let limits = bench.effort.limits;
        let arena = Arena::new(&bench.generator, &contestants, &task, |contestant| {
            if contestant.has_rules() && first.prefixes > MOST_RULES {
                return Some(format!(
                    "stopped after {MOST_RULES}: ten times the rules take a hundred times as long to install"
                ));
            }
            limits.stop(steps.get(&(first.ip, contestant.name()))?, first.prefixes)
        })?;
        if !settle(Duration::from_secs(5)) {
            bench.progress.note("the machine is busy with something else: intervals will be wide");
        }
        for case in cases {
            bench.progress.say(crate::report::table::title(case));
            measurements.extend(match case.scenario {
                Scenario::Host => host::measure(bench, &arena, *case)?,
                Scenario::Latency => latency::measure(bench, &arena, *case)?,
                Scenario::Failover => upkeep::failover(bench, &arena, *case)?,
                Scenario::Memory => upkeep::memory(&arena, *case),
                Scenario::Forward | Scenario::Cores | Scenario::Install => bench.measure(&arena, *case)?,
            });
            bench.progress.done(1);
        }
        let plain = Case::new(Scenario::Forward, first.family(), first.prefixes);
        if *first != plain {
            continue;
        }
        for place in arena.places.iter().filter(|place| place.contestant.scales()) {
            let name = place.contestant.name();
            let installed = Case { scenario: Scenario::Install, ..plain };
            let took = vec![place.took.as_secs_f64()];
            measurements.push(Measurement::of(installed, name, "", Unit::Seconds, took));
            let packet = measurements.iter().find(|measurement| {
                measurement.case == plain && measurement.contestant == name && measurement.outcome == Outcome::Measured
            });
            if let Some(estimate) = packet.and_then(|measurement| measurement.estimate) {
                let packet = Duration::from_secs_f64(estimate.median / 1e9);
                let step = Step { prefixes: first.prefixes, install: place.took, packet };
                steps.entry((first.ip, name)).or_default().push(step);
            }
        }
    }
    bench.contestants = contestants;
    Ok(measurements)
}
