//! What the guests' tests have shown, and the table of it.

use std::collections::{BTreeMap, BTreeSet};

use crate::test::Tally;

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
    ended: usize,
    failures: Vec<String>,
    devices: BTreeMap<String, Outcome>,
}

/// The tests of this suite are named `DEVICE::TEST`.
const TUNNELS: &str = "tunnels";
/// The tests of this suite that are named after a device.
const MATRIX: (&str, [&str; 3]) = ("matrix", ["tun", "veth", "vxlan"]);

impl Results {
    /// Takes a line: of `/payload/run`, or of a test binary.
    pub fn read(&mut self, line: &str) {
        if let Some(word) = line.strip_prefix("vm: ") {
            match word.split_once(" ended with ") {
                Some((suite, status)) => {
                    self.ended += 1;
                    if status != "0" {
                        self.failures.push(format!("{suite} ended with {status}"));
                    }
                }
                None => self.suite = word.strip_prefix("suite ").unwrap_or_default().to_owned(),
            }
        } else if let Some(tally) = Tally::read(line) {
            self.tally += tally;
        } else if let Some((name, outcome)) = outcome(line) {
            if outcome == Outcome::Failed {
                self.failures.push(format!("{} {name}", self.suite));
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
            (self.suite == matrix && devices.contains(&test)).then(|| test.to_owned())
        }
    }

    /// What went wrong, of so many suites.
    pub fn failures(mut self, suites: usize) -> Vec<String> {
        if self.ended != suites {
            self.failures.push(format!("only {} of {suites} suites ended", self.ended));
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

/// Kernels and the devices that the tests have used on them, as a table in Markdown.
pub fn table<'a>(results: impl IntoIterator<Item = (&'a str, &'a Results)> + Clone) -> String {
    let devices: BTreeSet<&str> =
        results.clone().into_iter().flat_map(|(_, results)| results.devices.keys().map(String::as_str)).collect();
    let mut rows = vec![String::from("| device |"), String::from("|---|")];
    for (release, _) in results.clone() {
        rows[0] += &format!(" Linux {release} |");
        rows[1] += "---|";
    }
    for device in devices {
        let mut row = format!("| `{device}` |");
        for (_, results) in results.clone() {
            row += match results.devices.get(device) {
                Some(Outcome::Passed) => " passed |",
                Some(Outcome::Failed) => " failed |",
                Some(Outcome::Ignored) => " not in this kernel |",
                None => " not tested |",
            };
        }
        rows.push(row);
    }
    rows.join("\n")
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
            "vm: up\nvm: suite matrix\ntest tun ... ok\ntest clsact ... ok\nvm: matrix ended with 0\nvm: suite tunnels\n\
             test gre::carries ... ok\ntest gre::too_big    ... FAILED\ntest netkit::carries ... ignored\n\
             test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured\nvm: tunnels ended with 101",
        );
        let new = read("vm: suite tunnels\ntest netkit::carries ... ok\ntest gre::carries ... ok");
        assert_eq!(
            table([("6.1", &old), ("6.12", &new)]),
            "| device | Linux 6.1 | Linux 6.12 |\n|---|---|---|\n| `gre` | failed | passed |\n\
             | `netkit` | not in this kernel | passed |\n| `tun` | passed | not tested |"
        );
        assert_eq!(old.tally, Tally { passed: 1, failed: 1, ignored: 1 });
        assert_eq!(old.failures(2), ["tunnels gre::too_big", "tunnels ended with 101"]);
        assert_eq!(new.failures(1), ["only 0 of 1 suites ended"]);
    }
}
