//! What the guests' tests have shown, and the table of it.

use std::collections::{BTreeMap, BTreeSet};

use crate::tally::Tally;

/// What became of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Left out, since the kernel has no such device.
    Ignored,
    /// As it should be.
    Passed,
    /// Not so.
    Failed,
}

/// The results on one kernel, read from the guest's output line by line.
#[derive(Default)]
pub struct Results {
    /// Numbers over all suites.
    pub tally: Tally,
    suite: String,
    /// The suites that have ended, with what they said.
    suites: BTreeMap<String, String>,
    /// What tests want to be known, by what it is about.
    notes: BTreeMap<String, String>,
    failures: Vec<String>,
    devices: BTreeMap<String, Outcome>,
}

/// How a test begins a line `note: ABOUT: NOTE` for the tables, on the standard error, which is not captured.
const NOTE: &str = "note: ";
/// The tests of this suite are named `DEVICE::TEST`.
const TUNNELS: &str = "tunnels";
/// The tests of this suite that are named after a device, `matrix::DEVICE`.
const MATRIX: (&str, [&str; 3]) = ("matrix", ["tun", "veth", "vxlan"]);

impl Results {
    /// Takes a line: of `/payload/run`, or of a test binary.
    pub fn read(&mut self, line: &str) {
        if let Some(word) = line.strip_prefix("vm: ") {
            match word.split_once(" ended with ") {
                Some((suite, status)) => {
                    self.suites.entry(suite.to_owned()).or_insert_with(|| "no result".to_owned());
                    if status != "0" {
                        self.failures.push(format!("{suite} ended with {status}"));
                    }
                }
                None => self.suite = word.strip_prefix("suite ").unwrap_or_default().to_owned(),
            }
        } else if let Some((about, note)) = line.strip_prefix(NOTE).and_then(|note| note.split_once(": ")) {
            self.notes.insert(about.to_owned(), note.to_owned());
        } else if let Some(tally) = Tally::read(line) {
            self.suites.insert(self.suite.clone(), tally.to_string());
            self.tally += tally;
        } else if let Some((name, outcome)) = outcome(line) {
            if outcome == Outcome::Failed {
                self.failures.push(format!("{} {}", self.suite, name.trim_start_matches(&format!("{}::", self.suite))));
            }
            if let Some(device) = self.device(name) {
                let worst = self.devices.entry(device).or_insert(outcome);
                *worst = outcome.max(*worst);
            }
        }
    }

    fn device(&self, test: &str) -> Option<String> {
        let (matrix, devices) = MATRIX;
        if self.suite == TUNNELS {
            test.split_once("::").map(|(device, _)| device.to_owned())
        } else {
            devices
                .iter()
                .find(|device| self.suite == matrix && test == format!("{matrix}::{device}"))
                .map(ToString::to_string)
        }
    }

    /// The failures, of this many suites.
    pub fn failures(mut self, suites: usize) -> Vec<String> {
        if self.suites.len() != suites {
            self.failures.push(format!("only {} of {suites} suites ended", self.suites.len()));
        }
        self.failures
    }
}

/// The name and outcome in `test NAME ... OUTCOME`.
fn outcome(line: &str) -> Option<(&str, Outcome)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let outcome = match rest.split([',', ' ']).next()? {
        "ok" => Outcome::Passed,
        "ignored" => Outcome::Ignored,
        "FAILED" => Outcome::Failed,
        _ => return None,
    };
    // libtest-mimic aligns the outcomes.
    Some((name.trim_end(), outcome))
}

/// What the tests have shown of devices, what became of the suites, and the tests' notes: tables in Markdown, with a column
/// for each kernel.
pub fn tables(results: &[(String, Results)]) -> Vec<String> {
    let name = |outcome: &Outcome| match outcome {
        Outcome::Passed => "passed",
        Outcome::Failed => "failed",
        Outcome::Ignored => "not in this kernel",
    };
    let devices = table("device", results, |results| {
        results.devices.iter().map(|(device, outcome)| (format!("`{device}`"), name(outcome).to_owned())).collect()
    });
    [
        devices,
        table("suite", results, |results| results.suites.clone()),
        table("", results, |results| results.notes.clone()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// None if it would have no rows.
fn table(
    title: &str,
    results: &[(String, Results)],
    rows: impl Fn(&Results) -> BTreeMap<String, String>,
) -> Option<String> {
    let columns: Vec<_> = results.iter().map(|(_, results)| rows(results)).collect();
    let names: BTreeSet<&String> = columns.iter().flat_map(BTreeMap::keys).collect();
    let mut lines = vec![format!("| {title} |"), String::from("|---|")];
    for (release, _) in results {
        lines[0] += &format!(" Linux {release} |");
        lines[1] += "---|";
    }
    for name in &names {
        let cells = columns.iter().map(|column| column.get(*name).map_or("not tested", String::as_str));
        lines.push(format!("| {name} | {} |", cells.collect::<Vec<_>>().join(" | ")));
    }
    (!names.is_empty()).then(|| lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Results {
        let mut results = Results::default();
        text.lines().for_each(|line| results.read(line));
        results
    }

    #[test]
    fn a_device_is_as_good_as_its_worst_test() {
        let old = read(
            "vm: up\nvm: suite matrix\ntest matrix::tun ... ok\ntest matrix::clsact ... ok\nvm: matrix ended with 0\nvm: suite tunnels\n\
             test gre::carries ... ok\ntest gre::too_big    ... FAILED\ntest netkit::carries ... ignored\n\
             test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured\nvm: tunnels ended with 101",
        );
        let new =
            read("vm: suite tunnels\ntest netkit::carries ... ok\ntest gre::carries ... ok\nnote: load: 7 ms: slow");
        let results = [("6.1".to_owned(), old), ("6.12".to_owned(), new)];
        assert_eq!(
            tables(&results),
            [
                "| device | Linux 6.1 | Linux 6.12 |\n|---|---|---|\n| `gre` | failed | passed |\n\
                 | `netkit` | not in this kernel | passed |\n| `tun` | passed | not tested |",
                "| suite | Linux 6.1 | Linux 6.12 |\n|---|---|---|\n| matrix | no result | not tested |\n\
                 | tunnels | 1 passed, 1 failed, 1 skipped | not tested |",
                "|  | Linux 6.1 | Linux 6.12 |\n|---|---|---|\n| load | not tested | 7 ms: slow |",
            ]
        );
        let [(_, old), (_, new)] = results;
        assert_eq!(old.tally, Tally { passed: 1, failed: 1, ignored: 1 });
        assert_eq!(old.failures(2), ["tunnels gre::too_big", "tunnels ended with 101"]);
        assert_eq!(new.failures(1), ["only 0 of 1 suites ended"]);
    }
}
