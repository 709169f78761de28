//! How long it takes to give prefixes to another tunnel, until packets go there.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Arena, Bench, Place, SENDER_CPU};
use crate::{
    contestant::Task,
    generator::{BATCH, Frame, pin_to},
    load::flows,
    prefixes::Prefixes,
    record::{Case, Measurement, ONE, Outcome, Unit},
};

/// Where there are more, one of them is changed only.
const FEW: u32 = 1000;
/// How often there and back, unless that has taken long already.
const TIMES: usize = 3;
const LONG: Duration = Duration::from_secs(1);
/// For packets to follow.
const PATIENCE: Duration = Duration::from_secs(5);

/// Has one prefix changed, then all of them.
///
/// # Errors
/// Packets cannot be sent.
pub fn measure(bench: &Bench, arena: &Arena<'_>, task: &Task, case: Case) -> Result<Vec<Measurement>> {
    // Packets of the first prefix, which is always among them.
    bench.generator.set_flows(&flows(Prefixes { count: 1, ..task.prefixes }, case.pattern))?;
    let frame = Frame { family: case.family(), size: case.size };
    let mut measurements = Vec::new();
    for place in arena.places.iter().filter(|place| place.contestant.scales()) {
        let name = place.contestant.name();
        for (figure, count) in
            [(ONE, 1), ("all", case.prefixes)].into_iter().take(if case.prefixes > FEW { 1 } else { 2 })
        {
            let (mut values, start) = (Vec::new(), Instant::now());
            let mut there_and_back = || {
                for time in 0..TIMES {
                    if time > 0 && start.elapsed() > LONG {
                        break;
                    }
                    for back in [false, true] {
                        values.push(change(bench, place, task, frame, count, back)?.as_secs_f64());
                    }
                }
                anyhow::Ok(())
            };
            let changed = there_and_back();
            let measured = Measurement::of(case, name, figure, Unit::Seconds, values);
            measurements.push(match changed {
                Ok(()) => measured,
                Err(error) => Measurement {
                    outcome: Outcome::Disqualified(format!("{error:#}")),
                    estimate: None,
                    values: Vec::new(),
                    ..measured
                },
            });
        }
    }
    Ok(measurements)
}

/// From the command to the first packets that all go the new way.
fn change(bench: &Bench, place: &Place<'_>, task: &Task, frame: Frame, count: u32, back: bool) -> Result<Duration> {
    let generator = &bench.generator;
    let entry = place.site.entry()?;
    place.contestant.prepare(&place.site, task, if back { 0 } else { count })?;
    let start = Instant::now();
    place.contestant.change(&place.site, task, count, back)?;
    place.site.at_entry(|| {
        pin_to(SENDER_CPU)?;
        loop {
            let before = generator.arrivals()?;
            let sent = generator.send(frame, entry, BATCH)?;
            let took = start.elapsed();
            let after = generator.arrivals()?;
            // The packets still name the exit of their own tunnel.
            let right: u64 = after.iter().zip(&before).map(|(after, before)| after.right - before.right).sum();
            let wrong: u64 = after.iter().zip(&before).map(|(after, before)| after.wrong - before.wrong).sum();
            if (if back { right } else { wrong }) == sent.packets {
                return Ok(took);
            }
            ensure!(took < PATIENCE + place.took, "packets did not follow a change of {count} prefixes");
        }
    })
}
