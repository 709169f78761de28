//! The programs alone: what a decision costs, without a packet's way in and out.

use anyhow::{Context as _, Result};
use aya::{
    programs::{ProgramInfo, SchedClassifier, TcAttachType},
    sys::{Stats, enable_stats},
};

use super::{Arena, Bench, Place, SENDER_CPU};
use crate::{
    contestant::FLOOR,
    generator::{Frame, pin_to},
    load::flows,
    prefixes::Prefixes,
    record::{Case, Measurement, Unit},
    rounds::interleave,
    site::INGRESS,
};

/// Decisions in a slice: some milliseconds.
const DECISIONS: u32 = 50_000;
/// Slices for the kernel's own clock.
const SLICES: usize = 5;

/// The first program at the ingress device of a place, if it has one there.
fn program(place: &Place<'_>) -> Result<Option<ProgramInfo>> {
    let (_, attached) = place.site.host.run_in(|| Ok(SchedClassifier::query_tcx(INGRESS, TcAttachType::Ingress)?))?;
    Ok(attached.into_iter().next())
}

/// The time of a decision by `BPF_PROG_TEST_RUN`: a program of the bench writes the next packet and becomes the one that
/// is loaded. All pay for that, the floor as well: ratios and differences are to the floor.
///
/// # Errors
/// A program cannot be run.
pub fn decisions(bench: &mut Bench, arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
    let frame = Frame { family: case.family(), size: case.size };
    let prefixes = Prefixes { family: case.family(), count: case.prefixes };
    bench.generator.set_flows(&flows(prefixes, case.pattern))?;
    let mut programs = Vec::new();
    for place in &arena.places {
        programs.extend(program(place)?.map(|program| (place, program)));
    }
    let floor = programs.iter().position(|(place, _)| place.contestant.name() == FLOOR);
    let floor = floor.context("the floor must take part")?;
    let generator = &bench.generator;
    let values = interleave(programs.len(), bench.effort.rounds, &mut bench.rng, |who| {
        let (place, program) = &programs[who];
        let (fd, ingress) = (program.fd()?, place.site.host.ifindex(INGRESS)?);
        let sent = place.site.host.run_in(|| {
            pin_to(SENDER_CPU)?;
            generator.try_program(&fd, frame, ingress, DECISIONS / 4)?;
            generator.try_program(&fd, frame, ingress, DECISIONS)
        })?;
        Ok(Some(sent.nanoseconds_each()))
    })?;
    let of = |((place, _), mine): (&(&Place<'_>, ProgramInfo), &Vec<f64>)| {
        Measurement::of(case, place.contestant.name(), "", Unit::NanosecondsPerPacket, mine.clone())
            .relative_to(&values[floor])
    };
    Ok(programs.iter().zip(&values).map(of).collect())
}

/// The time in each program while packets go through it, as the kernel counts it for `bpf_stats`; on for this alone, since
/// the clock costs each packet some 20 ns, which are part of the figure.
///
/// # Errors
/// The kernel does not count, or packets cannot be sent.
pub fn counted(bench: &Bench, arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
    let frame = Frame { family: case.family(), size: case.size };
    let prefixes = Prefixes { family: case.family(), count: case.prefixes };
    bench.generator.set_flows(&flows(prefixes, case.pattern))?;
    let mut measurements = Vec::new();
    for place in &arena.places {
        let look = || program(place);
        if look()?.is_none() {
            continue;
        }
        let packets = bench.packets_in(bench.effort.slice, place, frame)?;
        let _on = enable_stats(Stats::RunTime).context("the kernel does not count the programs' time")?;
        let mut values = Vec::new();
        for _ in 0..SLICES {
            let before = look()?;
            // Losses are reported where packets are timed.
            let _judged = place.slice(&bench.generator, frame, packets, 1)?;
            let (Some(before), Some(after)) = (before, look()?) else { continue };
            let runs = after.run_count() - before.run_count();
            values.push((after.run_time() - before.run_time()).as_nanos() as f64 / runs as f64);
        }
        let unit = Unit::NanosecondsPerPacket;
        measurements.push(Measurement::of(case, place.contestant.name(), "", unit, values));
    }
    Ok(measurements)
}
