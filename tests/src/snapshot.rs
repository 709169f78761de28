//! What a namespace looks like, to be compared: the proof that everything was left as it was.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use aya::{
    programs::{SchedClassifier, TcAttachType},
    util::KernelVersion,
};

use crate::{
    netns::Netns,
    pace::{SOON, patience},
};

/// Rules, routes of all tables, links, queueing disciplines, filters and TCX programs of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What was asked for, and the lines of the answer.
    sections: BTreeMap<String, Vec<String>>,
}

impl Netns {
    /// Takes a snapshot. Counters, timers and neighbours are not in it: they change by themselves.
    ///
    /// # Errors
    /// `ip` or `tc` fails.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let mut sections = BTreeMap::new();
        let mut add = |name: String, mut lines: Vec<String>, sorted: bool| {
            if sorted {
                lines.sort();
            }
            sections.insert(name, lines);
        };
        let links = lines(&self.query("ip", "-details -oneline link show")?);
        let devices: Vec<String> = links.iter().filter_map(|link| device(link)).collect();
        add("ip link".to_owned(), links, true);
        for family in ["-4", "-6"] {
            // The order of rules matters.
            add(format!("ip {family} rule"), lines(&self.query("ip", &format!("{family} -details rule show"))?), false);
            let routes = self.query("ip", &format!("{family} -details -oneline route show table all"))?;
            add(format!("ip {family} route"), lines(&routes), true);
            let addrs = self.query("ip", &format!("{family} -oneline addr show"))?;
            add(format!("ip {family} addr"), lines(&addrs), true);
        }
        add("tc qdisc".to_owned(), lines(&self.query("tc", "qdisc show")?), true);
        for device in devices {
            for direction in ["ingress", "egress"] {
                // tc fails where there is no clsact to ask.
                let filters = self.query("tc", &format!("filter show dev {device} {direction}")).unwrap_or_default();
                let mut all = lines(&filters);
                all.extend(self.tcx(&device, direction)?);
                if !all.is_empty() {
                    add(format!("tc filter {device} {direction}"), all, false);
                }
            }
        }
        Ok(Snapshot { sections })
    }

    /// The TCX programs of a device, which `tc` does not show, in the order in which they run; none before Linux 6.6, which
    /// has no TCX.
    ///
    /// # Errors
    /// The device is gone.
    pub fn tcx(&self, device: &str, direction: &str) -> Result<Vec<String>> {
        if !has_tcx() {
            return Ok(Vec::new());
        }
        let attach_type = if direction == "ingress" { TcAttachType::Ingress } else { TcAttachType::Egress };
        self.run_in(|| {
            let (_, programs) = SchedClassifier::query_tcx(device, attach_type)
                .with_context(|| format!("cannot ask for the TCX {direction} programs of {device}"))?;
            Ok(programs.iter().map(|program| format!("tcx {}", program.name_as_str().unwrap_or("?"))).collect())
        })
    }
}

fn is_since(major: u8, minor: u8) -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(major, minor, 0))
}

/// Whether this kernel has TCX: since Linux 6.6.
#[must_use]
pub fn has_tcx() -> bool {
    is_since(6, 6)
}

/// Whether programs can forward by the main table (`unmatched = "fast"`): since Linux 6.3.
#[must_use]
pub fn can_ask_main() -> bool {
    is_since(6, 3)
}

/// Whether XDP can be used: since Linux 6.5.
#[must_use]
pub fn can_use_xdp() -> bool {
    is_since(6, 5)
}

impl Snapshot {
    /// Without the lines for which `ours` says so, of which it gets the section's name (`ip -6 rule`) and the text.
    #[must_use]
    pub fn without(mut self, ours: impl Fn(&str, &str) -> bool) -> Self {
        for (name, lines) in &mut self.sections {
            lines.retain(|line| !ours(name, line));
        }
        self.sections.retain(|_, lines| !lines.is_empty());
        self
    }

    /// What is in the one and not in the other: a line each, `-` for what went and `+` for what came. Empty if nothing.
    #[must_use]
    pub fn diff(&self, after: &Self) -> String {
        let nothing = Vec::new();
        let mut names: Vec<&String> = self.sections.keys().chain(after.sections.keys()).collect();
        names.sort();
        names.dedup();
        let mut text = String::new();
        for name in names {
            let was = self.sections.get(name).unwrap_or(&nothing);
            let is = after.sections.get(name).unwrap_or(&nothing);
            let gone = was.iter().filter(|line| !is.contains(line)).map(|line| ('-', line));
            let came = is.iter().filter(|line| !was.contains(line)).map(|line| ('+', line));
            let changes: Vec<_> = gone.chain(came).collect();
            for (sign, line) in &changes {
                let _ = writeln!(text, "{sign} {name}: {line}");
            }
            if changes.is_empty() && was != is {
                let _ = writeln!(text, "~ {name}: the same lines in another order or number: {is:?}");
            }
        }
        text
    }

    /// Waits until what is looked at is the same again: the kernel lets go of a program a moment after its pin
    /// (`bpf_link_put()` in `kernel/bpf/syscall.c`), and does more by work queues.
    ///
    /// # Errors
    /// It stays another; the error has the last differences.
    pub fn wait_same(&self, mut look: impl FnMut() -> Result<Self>) -> Result<()> {
        let deadline = Instant::now() + patience(SOON);
        loop {
            // What is being removed may be gone before everything is asked about it.
            let same = look().and_then(|after| self.ensure_same(&after));
            if same.is_ok() || Instant::now() > deadline {
                return same;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Fails with the differences if there are any.
    ///
    /// # Errors
    /// The snapshots differ.
    pub fn ensure_same(&self, after: &Self) -> Result<()> {
        let diff = self.diff(after);
        if diff.is_empty() { Ok(()) } else { bail!("the namespace is not as it was:\n{diff}") }
    }
}

fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|line| !line.is_empty())
        .collect()
}

/// `2: lan0@if3: <BROADCAST,…` → `lan0`
fn device(link: &str) -> Option<String> {
    let name = link.split(": ").nth(1)?;
    Some(name.split('@').next()?.to_owned())
}
