//! The stages of a run: which contestants are installed with how many prefixes, and what is measured then.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use tunroute::policy::net::Family;

use super::{Arena, Bench, change, failover, host, latency, memory, program, publish, throughput};
use crate::{
    contestant::{BASELINE, Contestant, NULL, TUNROUTE_EBPF, TUNROUTE_XDP, Task, XDP_FLOOR},
    generator::Frame,
    limits::Step,
    load::{Pattern, flows},
    machine::settle,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, Scenario, Unit},
    report::table::{place, title},
    site::{Sysctls, Target},
};

/// The contestants where packets come in as frames.
const ON_A_WIRE: [&str; 7] = [BASELINE, NULL, TUNROUTE_EBPF, TUNROUTE_XDP, "floor-aside", "floor-xdp-aside", XDP_FLOOR];
/// The number of prefixes at which what does not depend on it is looked at.
const MIDDLE: u32 = 1000;
const MANY: u32 = 100_000;

/// The stages of a run: sites for a task, and the cases that are measured on them. What matters most comes first, by growing
/// numbers of prefixes.
#[must_use]
pub fn stages(prefixes: &[u32], quick: bool) -> Vec<Vec<Case>> {
    let mut stages = Vec::new();
    for &count in prefixes {
        stages.extend(Family::ALL.map(|family| main_stage(prefixes, family, count, quick)));
        // What XDP does for IPv4 it does for IPv6.
        stages.push(vec![Case { target: Target::Veth, ..Case::new(Scenario::Forward, Family::V6, count) }]);
    }
    for family in Family::ALL.into_iter().filter(|&family| !quick || family == Family::V4) {
        let plain = Case::new(Scenario::Forward, family, MIDDLE);
        let vxlan = Case { target: Target::Vxlan, ..plain };
        if prefixes.contains(&MIDDLE) {
            stages.push(vec![Case { pattern: Pattern::Unmatched, ..plain }]);
            stages.push(vec![Case { pattern: Pattern::Unmatched, target: Target::Veth, ..plain }]);
            stages.push(vec![vxlan]);
        }
        if quick {
            continue;
        }
        if prefixes.contains(&MIDDLE) {
            let patterns = [Pattern::ManyDestinations, Pattern::OneFlow, Pattern::Zipf];
            let mut cases = patterns.map(|pattern| Case { pattern, ..plain }).to_vec();
            cases.push(Case { size: 1400, ..plain });
            stages.push(cases);
            stages.push(vec![Case { size: 1400, ..vxlan }]);
        }
        if prefixes.contains(&MANY) {
            stages.push(vec![Case { pattern: Pattern::Zipf, prefixes: MANY, ..plain }]);
        }
    }
    stages
}

fn main_stage(prefixes: &[u32], family: Family, count: u32, quick: bool) -> Vec<Case> {
    let plain = Case::new(Scenario::Forward, family, count);
    let scenario = |scenario| Case { scenario, ..plain };
    let mut cases = vec![plain];
    // IPv6 has no such setting.
    if family == Family::V4 && (!quick || count >= MIDDLE) {
        cases.push(Case { sysctls: Sysctls::AcceptLocal, ..plain });
    }
    if count == 1 || count >= MIDDLE {
        cases.push(scenario(Scenario::Decision));
    }
    if count == MIDDLE || !quick && count == MANY {
        cases.push(scenario(Scenario::Host));
        cases.push(scenario(Scenario::Latency));
    }
    if count == MIDDLE {
        cases.push(Case { scenario: Scenario::Cores, cpus: 2, ..plain });
        cases.push(scenario(Scenario::Throughput));
        cases.push(scenario(Scenario::Counted));
    }
    cases.push(scenario(Scenario::Memory));
    if count >= MIDDLE {
        cases.push(scenario(Scenario::Publish));
        cases.push(scenario(Scenario::Change));
    }
    // Last, since it takes the tunnel's routes away from those who do not put them back.
    if count == MIDDLE || !quick && prefixes.iter().max() == Some(&count) {
        cases.push(scenario(Scenario::Failover));
    }
    cases
}

/// What is known of each family's contestants so far.
type Steps = BTreeMap<(Family, &'static str), Vec<Step>>;

/// Runs stages in the order of their numbers of prefixes, and stops a contestant where it becomes unbearable. What is said
/// about the run goes to `notes`.
///
/// # Errors
/// A site cannot be made.
pub fn run(bench: &mut Bench, stages: &[Vec<Case>], notes: &mut Vec<String>) -> Result<Vec<Measurement>> {
    let contestants = std::mem::take(&mut bench.contestants);
    let mut measurements = Vec::new();
    let mut steps = Steps::new();
    let end = Instant::now() + bench.effort.time;
    for cases in stages {
        let Some(first) = cases.first() else { continue };
        let family = first.family();
        if Instant::now() > end {
            notes.push(format!("No time was left for {}.", title(first)));
            continue;
        }
        if first.prefixes > MIDDLE {
            pilot(bench, &contestants, family, &mut steps)?;
        }
        let prefixes = Prefixes { family, count: first.prefixes };
        let task = Task { prefixes, target: first.target, pattern: first.pattern };
        let (limits, progress) = (bench.effort.limits, &bench.progress);
        let stop = |contestant: &dyn Contestant| {
            if first.target == Target::Veth && !ON_A_WIRE.contains(&contestant.name()) {
                return Some(
                    "not asked: XDP is compared with what else tunroute does, and with the kernel alone".to_owned(),
                );
            }
            limits.stop(steps.get(&(family, contestant.name()))?, first.prefixes, contestant.growth())
        };
        let told = |name: &str| progress.say(format!("Setting up: {}, {name}", place(first)));
        let arena = match Arena::new(&bench.generator, &contestants, &task, stop, told) {
            Ok(arena) => arena,
            Err(error) => {
                notes.push(format!("{} could not be set up: {error:#}.", title(first)));
                continue;
            }
        };
        if !settle(Duration::from_secs(5)) {
            notes.push(format!("The machine was busy with something else before {}.", title(first)));
        }
        for case in cases {
            if Instant::now() > end {
                notes.push(format!("No time was left for {}.", title(case)));
                continue;
            }
            bench.progress.say(title(case));
            match measure(bench, &arena, &task, *case) {
                Ok(measured) => measurements.extend(measured),
                // What has been measured so far is not lost for that.
                Err(error) => notes.push(format!("{} could not be measured: {error:#}.", title(case))),
            }
            bench.progress.done(1);
        }
        if *first == Case::new(Scenario::Forward, family, first.prefixes) {
            installed(&arena, *first, &mut measurements, &mut steps);
        }
    }
    bench.contestants = contestants;
    Ok(measurements)
}

fn measure(bench: &mut Bench, arena: &Arena<'_>, task: &Task, case: Case) -> Result<Vec<Measurement>> {
    match case.scenario {
        Scenario::Host => host::measure(bench, arena, case),
        Scenario::Latency => latency::measure(bench, arena, case),
        Scenario::Throughput => throughput::measure(bench, arena, case),
        Scenario::Decision => program::decisions(bench, arena, case),
        Scenario::Counted => program::counted(bench, arena, case),
        Scenario::Failover => failover::measure(bench, arena, case),
        Scenario::Change => change::measure(bench, arena, task, case),
        Scenario::Memory => Ok(memory::measure(arena, case)),
        Scenario::Publish => publish::measure(arena, case),
        Scenario::Forward | Scenario::Cores | Scenario::Install => bench.measure(arena, case),
    }
}

/// Notes how long it took to put everybody up.
fn installed(arena: &Arena<'_>, plain: Case, measurements: &mut Vec<Measurement>, steps: &mut Steps) {
    let case = Case { scenario: Scenario::Install, ..plain };
    for place in arena.places.iter().filter(|place| place.contestant.scales()) {
        let name = place.contestant.name();
        measurements.push(Measurement::of(case, name, "", Unit::Seconds, vec![place.took.as_secs_f64()]));
        let packet = measurements.iter().find(|measurement| {
            measurement.case == plain && measurement.contestant == name && measurement.outcome == Outcome::Measured
        });
        if let Some(estimate) = packet.and_then(|measurement| measurement.estimate) {
            let packet = Duration::from_secs_f64(estimate.median / 1e9);
            let step = Step { prefixes: plain.prefixes, install: place.took, packet };
            steps.entry((plain.family(), name)).or_default().push(step);
        }
    }
}

/// Finds out how those begin of whom it is known that they grow fast, where a run begins with many prefixes.
fn pilot(bench: &Bench, contestants: &[Box<dyn Contestant>], family: Family, steps: &mut Steps) -> Result<()> {
    let unknown =
        |contestant: &dyn Contestant| contestant.growth() > 1.0 && !steps.contains_key(&(family, contestant.name()));
    if !contestants.iter().any(|contestant| unknown(contestant.as_ref())) {
        return Ok(());
    }
    let prefixes = Prefixes { family, count: MIDDLE };
    let task = Task { prefixes, target: Target::Tun, pattern: Pattern::Uniform };
    let stop = |contestant: &dyn Contestant| (!unknown(contestant)).then(|| "it needs no pilot".to_owned());
    let arena = Arena::new(&bench.generator, contestants, &task, stop, |_| ())?;
    bench.generator.set_flows(&flows(prefixes, Pattern::Uniform))?;
    for place in &arena.places {
        let packet = Duration::from_secs_f64(bench.nanoseconds_each(place, Frame { family, size: 64 })? / 1e9);
        let step = Step { prefixes: MIDDLE, install: place.took, packet };
        steps.entry((family, place.contestant.name())).or_default().push(step);
    }
    Ok(())
}
