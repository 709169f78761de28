//! Memory: of the daemon, of the BPF maps it holds, and of the kernel as a whole.

use std::fs;

use super::Arena;
use crate::record::{Case, Measurement, Unit};

/// Minimum number of prefixes whose memory stands out from what the kernel allocates and frees meanwhile.
const MANY: u32 = 10_000;

/// What each contestant takes.
#[must_use]
pub fn measure(arena: &Arena<'_>, case: Case) -> Vec<Measurement> {
    let mut measurements = Vec::new();
    for place in arena.places.iter().filter(|place| place.contestant.scales()) {
        let name = place.contestant.name();
        let mut add = |figure, bytes| {
            measurements.push(Measurement::of(case, name, figure, Unit::Bytes, vec![bytes]));
        };
        if case.prefixes >= MANY {
            add("kernel", place.kernel_memory);
        }
        let Some(process) = place.installed.process() else { continue };
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        for (figure, key) in [("daemon", "VmRSS:"), ("daemon at most", "VmHWM:")] {
            if let Some(kilobytes) = number(&status, key) {
                add(figure, kilobytes * 1024.0);
            }
        }
        let maps = maps(process);
        if maps > 0 {
            add("maps", maps as f64);
        }
    }
    measurements
}

/// Bytes that the kernel counts for the maps that a process holds (`bpf_map_memory_usage()` in `kernel/bpf/syscall.c`).
fn maps(process: u32) -> u64 {
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
    maps.into_iter().map(|(_, bytes)| bytes).sum()
}

fn number(text: &str, key: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
}
