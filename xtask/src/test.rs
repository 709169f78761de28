//! `cargo xtask test`: all tests, and their count in one line at the end.

use std::{
    ffi::OsString,
    io::{self, BufRead, BufReader, Write},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    command::{cargo, is_installed, is_root, output_of, release_dir, runner_variable, say, shown},
    dist, fuzz,
    run::build_release,
    setup,
    tally::Tally,
    vm::{self, Selection},
};

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

/// The command that builds and runs every test on this machine.
pub fn all_tests() -> Result<Command> {
    cargo(["test", "--release", "--workspace", "--exclude", "tunroute-ebpf", "--exclude", "tunroute-bench-ebpf"])
}

/// The suites that are run once more with XDP wherever devices allow.
const WITH_XDP: [&str; 6] = ["semantics::", "faults::", "survival::", "explain::", "trace::", "following::"];

/// The command that does so.
fn with_xdp() -> Result<Command> {
    let mut tests = cargo(["test", "--release", "--package", "tunroute-tests", "--no-fail-fast"])?;
    tests.args(["--test", "suites", "--"]).args(WITH_XDP).env("TUNROUTE_XDP", "on");
    Ok(tests)
}

/// Runs all tests, or with `args`, what the test binaries make of these.
fn test(args: &[OsString]) -> Result<()> {
    let start = Instant::now();
    setup::for_building()?;
    let prometheus = setup::for_testing()?;
    build_release()?;

    let mut tests = all_tests()?;
    tests.args(["--no-fail-fast", "--"]);
    // The integration tests start what a user would, wherever cargo has been told to put it.
    tests.args(args).env("TUNROUTE_BIN", release_dir()?.join("tunroute"));
    tests.env("TUNROUTE_PROMETHEUS", prometheus);
    if !is_root() {
        ensure!(is_installed("sudo"), "the tests make network namespaces, which needs root: install sudo, or be root");
        say("running the tests through sudo, as they make network namespaces");
        // The build stays unprivileged: cargo starts only what it has built through this.
        tests.env(runner_variable(&host()?), "sudo -E");
    }
    let (mut tally, mut success) = run_and_count(&mut tests)?;
    if args.is_empty() {
        say("the same with XDP wherever devices allow");
        let mut again = with_xdp()?;
        again.envs(tests.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let (more, well) = run_and_count(&mut again)?;
        tally += more;
        success &= well;
    }

    say(format_args!("tests ended after {:.0?}", start.elapsed()));
    println!("tests: {} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.ignored);
    if tally.failed > 0 {
        bail!("{} tests: they are named above, and `cargo xtask test -- NAME` runs one alone", tally.failed);
    }
    ensure!(success, "`{}`, though no test did: see above for what ended it", shown(&tests));
    Ok(())
}

fn host() -> Result<String> {
    let version = output_of(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("`rustc -vV` names no host")
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
