//! How long it takes to give prefixes to another tunnel, until packets go there.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Arena, Bench, Place, SENDER_CPU};
use crate::{
    contestant::Task,
    generator::{BATCH, Frame, pin_to},
    load::flows,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, Unit},
    site::INGRESS,
};

/// Who takes longer to install all prefixes is asked to change one only.
const QUICK: Duration = Duration::from_secs(1);
/// How often there and back.
const TIMES: usize = 2;
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
        for (figure, count) in [("one", 1), ("all", case.prefixes)] {
            if count > 1 && place.took > QUICK {
                let why = format!("stopped: installing them took {:.1?} already", place.took);
                measurements.push(Measurement {
                    figure: figure.to_owned(),
                    ..Measurement::none(case, name, Unit::Seconds, Outcome::Stopped(why))
                });
                continue;
            }
            let mut values = Vec::new();
            let changed = (0..TIMES).flat_map(|_| [false, true]).try_for_each(|back| {
                values.push(change(bench, place, task, frame, count, back)?.as_secs_f64());
                anyhow::Ok(())
            });
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
    let ingress = place.site.host.ifindex(INGRESS)?;
    let start = Instant::now();
    place.contestant.change(&place.site, task, count, back)?;
    place.site.host.run_in(|| {
        pin_to(SENDER_CPU)?;
        loop {
            let before = generator.arrivals()?;
            let sent = generator.send(frame, ingress, BATCH)?;
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
