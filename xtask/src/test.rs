//! `cargo xtask test`: all tests, and their count in one line at the end.

use std::{
    ffi::OsString,
    io::{self, BufRead, BufReader, Write},
    num::NonZero,
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    build,
    command::{is_installed, is_root, say, shown},
    dist, fuzz,
    run::as_root,
    setup,
    tally::Tally,
    vm::{self, Selection},
};

/// The variable by which the lab is told to use XDP in suites that are about something else.
const XDP: &str = "TUNROUTE_XDP";

/// Which tests.
#[derive(clap::Args)]
pub struct Options {
    /// Instead, run the integration tests in virtual machines: on stock Debian kernels of these series, or 6.1 and 6.12
    #[arg(long, value_name = "SERIES", num_args = 0..)]
    vm: Option<Vec<String>>,
    /// Only a few tests in each virtual machine
    #[arg(long, requires = "vm")]
    smoke: bool,
    /// Only these suites in each virtual machine
    #[arg(long, value_name = "NAME", requires = "vm", conflicts_with = "smoke", num_args = 1..)]
    suite: Vec<String>,
    /// Instead, look for inputs that break something, for so many seconds in each place, or 20
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "20", conflicts_with = "vm")]
    fuzz: Option<u32>,
    /// Instead, install the Debian package in a clean Debian root, and run the story there
    #[arg(long, conflicts_with_all = ["vm", "fuzz"])]
    dist: bool,
    /// Arguments for the test binaries, such as a part of a test's name
    #[arg(last = true)]
    args: Vec<OsString>,
}

impl Options {
    /// Runs them.
    pub fn run(&self) -> Result<()> {
        match (&self.vm, self.fuzz) {
            _ if self.dist => dist::test(&self.args),
            (Some(series), _) if self.smoke => vm::test(series, &Selection::Smoke, &self.args),
            (Some(series), _) => vm::test(series, &Selection::Suites(&self.suite), &self.args),
            (None, Some(seconds)) => fuzz::fuzz(seconds),
            (None, None) => test(&self.args),
        }
    }
}

/// The test binary whose modules are the suites of the lab.
const SUITES: &str = "suites";
/// The suites that measure time: nothing runs beside them.
const TIMED: [&str; 2] = ["failover::", "survival::"];
/// The suites that run once more with XDP wherever devices allow.
const WITH_XDP: [&str; 6] = ["semantics::", "faults::", "survival::", "explain::", "trace::", "following::"];
/// Tests of the lab at a time, for each processor: they wait far more than they compute.
const TESTS_PER_PROCESSOR: usize = 3;

/// Runs all tests; with `args`, those that the test binaries choose by them.
fn test(args: &[OsString]) -> Result<()> {
    let start = Instant::now();
    setup::for_building()?;
    let prometheus = setup::for_testing()?;
    let tunroute = build::programs()?.join("tunroute");
    let binaries = build::tests()?;
    if !is_root() {
        ensure!(is_installed("sudo"), "the tests make network namespaces, which needs root: install sudo, or be root");
        say("running the tests through sudo, as they make network namespaces");
    }

    let mut total = Total::default();
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = format!("--test-threads={}", processors * TESTS_PER_PROCESSOR);
    for binary in &binaries {
        let command = |more: &[&str]| {
            let mut command = as_root(&binary.path, is_root());
            command.current_dir(&binary.package).env("CARGO_MANIFEST_DIR", &binary.package);
            command.env("TUNROUTE_BIN", &tunroute).env("TUNROUTE_PROMETHEUS", &prometheus).args(args).args(more);
            command
        };
        if !args.is_empty() || binary.name != SUITES {
            total.run(&binary.name, &mut command(&[]))?;
            continue;
        }
        let others: Vec<&str> = TIMED.iter().flat_map(|suite| ["--skip", suite]).chain([threads.as_str()]).collect();
        total.run("the suites", &mut command(&others))?;
        let with_xdp = [&others[..], &WITH_XDP].concat();
        total.run("suites with XDP wherever devices allow", command(&with_xdp).env(XDP, "on"))?;
        let alone = [&["--test-threads=1"], &TIMED[..]].concat();
        total.run("suites that measure time", &mut command(&alone))?;
        let alone: Vec<&str> = alone.into_iter().filter(|arg| !TIMED.contains(arg) || WITH_XDP.contains(arg)).collect();
        total.run("suites that measure time, with XDP", command(&alone).env(XDP, "on"))?;
    }

    say(format_args!("tests ended after {:.0?}", start.elapsed()));
    let Total { tally, broken } = total;
    println!("tests: {} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.ignored);
    if tally.failed > 0 {
        bail!("{} tests: they are named above, and `cargo xtask test -- NAME` runs one alone", tally.failed);
    }
    ensure!(broken.is_empty(), "ended badly, though no test of them failed: {}: see above", broken.join(", "));
    Ok(())
}

/// The results of all binaries.
#[derive(Default)]
struct Total {
    tally: Tally,
    /// What ended badly though none of its tests failed.
    broken: Vec<String>,
}

impl Total {
    /// Runs a test binary. `name` is what it is called in messages.
    fn run(&mut self, name: &str, binary: &mut Command) -> Result<()> {
        let start = Instant::now();
        let (tally, success) = run_and_count(binary)?;
        say(format_args!("{name}: {tally}, after {:.1?}", start.elapsed()));
        if !success && tally.failed == 0 {
            self.broken.push(name.to_owned());
        }
        self.tally += tally;
        Ok(())
    }
}

/// Runs `tests` with its output passed on, and counts what it reports. Also says whether it ended well.
fn run_and_count(tests: &mut Command) -> Result<(Tally, bool)> {
    let mut child = tests.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run `{}`", shown(tests)))?;
    let tally = match child.stdout.take() {
        Some(output) => pass_on_and_count(BufReader::new(output), io::stdout())?,
        None => Tally::default(),
    };
    let status = child.wait().context("cannot wait for the tests")?;
    Ok((tally, status.success()))
}

fn pass_on_and_count(mut from: impl BufRead, mut to: impl Write) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).context("cannot read what the tests print")? > 0 {
        to.write_all(&line).context("cannot pass on what the tests print")?;
        if let Some(counted) = Tally::read(&String::from_utf8_lossy(&line)) {
            tally += counted;
        }
        line.clear();
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_over_all_test_binaries_and_passes_on_every_byte() {
        let output = b"running 3 tests\n\xff\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured\n\
                       test result: FAILED. 3 passed; 4 failed; 0 ignored; 0 measured";
        let mut passed_on = Vec::new();
        let tally = pass_on_and_count(&output[..], &mut passed_on).expect("memory can be read and written");
        assert_eq!(tally, Tally { passed: 5, failed: 4, ignored: 1 });
        assert_eq!(passed_on, output);
    }

    #[test]
    fn tells_a_good_end_from_a_bad_one() {
        for (program, success) in [("true", true), ("false", false)] {
            let ended = run_and_count(&mut Command::new(program)).expect("it can be run");
            assert_eq!(ended, (Tally::default(), success), "{program}");
        }
    }
}
