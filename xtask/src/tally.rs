//! Counts of test results, read from what test binaries print.

use std::{fmt, ops::AddAssign};

/// Numbers of tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
    pub ignored: usize,
}

impl Tally {
    /// Reads the closing line of a test binary, `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    pub fn read(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |name| counts.split("; ").find_map(|part| part.strip_suffix(name)?.trim_end().parse().ok());
        Some(Self { passed: count("passed")?, failed: count("failed")?, ignored: count("ignored")? })
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed", self.passed)?;
        let others = [(self.failed, "failed"), (self.ignored, "skipped")];
        others.into_iter().filter(|(count, _)| *count > 0).try_for_each(|(count, what)| write!(f, ", {count} {what}"))
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_closing_line_of_a_test_binary() {
        for (line, expected) in [
            (
                "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
                Some(Tally { passed: 12, failed: 0, ignored: 3 }),
            ),
            (
                "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\n",
                Some(Tally { passed: 1, failed: 2, ignored: 0 }),
            ),
            ("test lab::test_result ... ok\n", None),
            ("test result: ok. many passed; 0 failed; 0 ignored\n", None),
            ("", None),
        ] {
            assert_eq!(Tally::read(line), expected, "{line:?}");
        }
    }
}
