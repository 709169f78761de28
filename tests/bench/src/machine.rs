//! On what and of what a run was made: figures mean little without.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};

/// Where and how a run was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Of the commit that was checked out, with `+` if something was changed since.
    pub commit: String,
    /// Seconds since 1970.
    pub time: u64,
    /// The kernel's version.
    pub kernel: String,
    /// The processor's name.
    pub cpu: String,
    /// How many of them.
    pub cpus: usize,
    /// MiB of memory.
    pub memory: u64,
    /// `net.core.bpf_jit_enable`
    pub jit: String,
    /// `/sys/devices/system/cpu/vulnerabilities`, other than "Not affected".
    pub mitigations: Vec<String>,
    /// Kernel settings that matter, of the namespaces that were measured.
    pub sysctls: Vec<String>,
    /// The bench's arguments.
    pub arguments: String,
    /// What happened during the run that one has to know.
    #[serde(default)]
    pub notes: Vec<String>,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn observe(sysctls: Vec<String>, notes: Vec<String>) -> Self {
        let proc = |path: &str, key: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':'));
            line.unwrap_or_default().trim().to_owned()
        };
        let memory = proc("/proc/meminfo", "MemTotal");
        Self {
            commit: commit().unwrap_or_else(|| "unknown".to_owned()),
            time: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: proc("/proc/cpuinfo", "model name"),
            cpus: fs::read_to_string("/proc/cpuinfo").unwrap_or_default().matches("processor\t").count(),
            memory: memory.trim_end_matches(" kB").parse().unwrap_or(0) / 1024,
            jit: read("/proc/sys/net/core/bpf_jit_enable"),
            mitigations: mitigations(),
            sysctls,
            arguments: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
            notes,
        }
    }
}

/// Bytes of the kernel's memory that are in use, as far as rules, routes, sets and maps are kept there: slab, `vmalloc` and
/// per-CPU memory of `/proc/meminfo`, of the whole machine.
#[must_use]
pub fn kernel_memory() -> f64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |key| {
        let line = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    ["Slab", "VmallocUsed", "Percpu"].map(of).iter().sum::<f64>() * 1024.0
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn mitigations() -> Vec<String> {
    let entries = fs::read_dir("/sys/devices/system/cpu/vulnerabilities").into_iter().flatten().flatten();
    let mut all: Vec<String> = entries
        .map(|entry| format!("{}: {}", entry.file_name().display(), read(entry.path())))
        .filter(|line| !line.ends_with(": Not affected"))
        .collect();
    all.sort();
    all
}

fn commit() -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(["-C", env!("CARGO_MANIFEST_DIR")]).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(format!("{}{}", git(&["rev-parse", "--short=12", "HEAD"])?, if changed { "+" } else { "" }))
}

/// Waits until the machine has nothing else to do, for instance to take down the namespaces before. Says whether it
/// came to that in time.
#[must_use]
pub fn settle(patience: Duration) -> bool {
    const LOOK: Duration = Duration::from_millis(100);
    let deadline = Instant::now() + patience;
    let mut before = times();
    while Instant::now() < deadline {
        std::thread::sleep(LOOK);
        let now = times();
        let (idle, all) = (now.0 - before.0, now.1 - before.1);
        if idle * 100 >= all * 93 {
            return true;
        }
        before = now;
    }
    false
}

/// Clock ticks that all CPUs together were idle, and all ticks.
fn times() -> (u64, u64) {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks: Vec<u64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).flat_map(str::parse).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; what guests took is part of user.
    (ticks.iter().skip(3).take(2).sum(), ticks.iter().take(8).sum())
}
