//! What there is besides packets: memory, and how long a tunnel's end goes unnoticed.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{Arena, Bench, Place, SENDER_CPU};
use crate::{
    generator::{BATCH, Frame, pin_to},
    load::flows,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, Unit},
    site::{INGRESS, TUNNELS},
};

/// How often a tunnel goes down.
const FAILURES: usize = 10;
/// How long that may go unnoticed.
const PATIENCE: Duration = Duration::from_secs(2);

/// The memory of each contestant's processes, and of the BPF maps that they hold.
#[must_use]
pub fn memory(arena: &Arena<'_>, case: Case) -> Vec<Measurement> {
    let mut measurements = Vec::new();
    for place in &arena.places {
        let Some(process) = place.installed.process() else { continue };
        let name = place.contestant.name();
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let resident = number(&status, "VmRSS:").unwrap_or(0.0) * 1024.0;
        measurements.push(Measurement::of(case, name, "daemon", Unit::Bytes, vec![resident]));
        let maps = maps(process);
        if maps > 0.0 {
            measurements.push(Measurement::of(case, name, "maps", Unit::Bytes, vec![maps]));
        }
    }
    measurements
}

/// Bytes that the kernel counts for the maps that a process holds (`bpf_map_memory_usage()` in `kernel/bpf/syscall.c`).
fn maps(process: u32) -> f64 {
    let entries = fs::read_dir(format!("/proc/{process}/fdinfo")).into_iter().flatten().flatten();
    let mut maps: Vec<(u64, u64)> = entries
        .filter_map(|entry| {
            let info = fs::read_to_string(entry.path()).ok()?;
            let whole = |key| info.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
            Some((whole("map_id:")?, whole("memlock:")?))
        })
        .collect();
    // Several descriptors may be of the same map.
    maps.sort_unstable();
    maps.dedup_by_key(|map| map.0);
    maps.into_iter().map(|(_, bytes)| bytes as f64).sum()
}

fn number(text: &str, key: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
}

/// How long packets of the first tunnel's policy are not delivered after the tunnel went down: until the second, next in
/// the policy's order, has them all.
///
/// # Errors
/// Packets cannot be sent.
pub fn failover(bench: &mut Bench, arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
    let prefixes = Prefixes { family: case.family(), count: case.prefixes };
    bench.generator.set_flows(&flows(prefixes, case.pattern))?;
    let frame = Frame { family: case.family(), size: case.size };
    let mut measurements = Vec::new();
    for place in arena.places.iter().filter(|place| place.installed.process().is_some()) {
        let name = place.contestant.name();
        let mut times = Vec::new();
        let mut failure = None;
        while times.len() < FAILURES && failure.is_none() {
            match one_failure(bench, place, frame)? {
                Some(time) => times.push(time.as_secs_f64()),
                None => failure = Some(format!("the second tunnel had not all packets within {PATIENCE:?}")),
            }
        }
        measurements.push(match failure {
            Some(why) => Measurement::none(case, name, Unit::Seconds, Outcome::Disqualified(why)),
            None => Measurement::of(case, name, "", Unit::Seconds, times),
        });
    }
    Ok(measurements)
}

fn one_failure(bench: &Bench, place: &Place<'_>, frame: Frame) -> Result<Option<Duration>> {
    let ingress = place.site.host.ifindex(INGRESS)?;
    let time = place.site.host.run_in(|| {
        pin_to(SENDER_CPU)?;
        let mut set = std::process::Command::new("ip");
        let status = set.args(["link", "set", TUNNELS[0], "down"]).status()?;
        anyhow::ensure!(status.success(), "cannot set a tunnel down");
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let before = bench.generator.arrivals()?;
            let sent = bench.generator.send(frame, ingress, BATCH)?;
            let after = bench.generator.arrivals()?;
            let second = after[1].right + after[1].wrong - before[1].right - before[1].wrong;
            if second == sent.packets {
                return Ok(Some(start.elapsed()));
            }
        }
        Ok(None)
    })?;
    place.site.host.ip(&format!("link set {} up", TUNNELS[0]))?;
    // The daemon must have noticed before the next failure.
    std::thread::sleep(Duration::from_millis(100));
    Ok(time)
}
