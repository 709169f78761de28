//! `cargo xtask test --vm`: the integration tests on other kernels, in virtual machines.
//!
//! Stock Debian kernels have the tunnel devices that a developer's machine may lack, and 6.1 is from before TCX. Without
//! KVM they are emulated, 10 to 30 times slower: suites that are about time are not run there.

mod initramfs;
mod kernel;
mod machine;
mod results;
mod suites;

use std::{
    ffi::OsString,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    kernel::Kernel,
    machine::{Accelerator, boot},
    results::Results,
    suites::{SUITES, Suite},
};
use crate::{
    build,
    command::{say, workspace},
    setup,
    tally::Tally,
};

/// The series that are tested unless others are named: the oldest that is supported, and the newest of Debian stable.
const SERIES: [&str; 2] = ["6.1", "6.12"];

/// The tests measure time, and wait for what does not come: this many times as long under emulation.
const SLOWDOWN: (&str, &str) = ("TUNROUTE_TEST_SLOWDOWN", "10");
/// A suite that takes longer hangs.
const SUITE_LIMIT: Duration = Duration::from_secs(1200);
/// The same for all suites of a smoke test, and the guest's start. They take a minute or two of a processor, which may have
/// other things to do.
const SMOKE_LIMIT: Duration = Duration::from_secs(1800);

/// Which suites are run.
pub enum Selection<'a> {
    /// A few tests of some of them.
    Smoke,
    /// Those with these names; all of them if there are none.
    Suites(&'a [String]),
}

impl Selection<'_> {
    fn suites(&self) -> Result<Vec<&'static Suite>> {
        let chosen = |suite: &&Suite| match self {
            Self::Smoke => suite.smoke.is_some(),
            Self::Suites(names) => names.is_empty() || names.iter().any(|name| name == suite.name),
        };
        if let Self::Suites(names) = self {
            let unknown = names.iter().find(|name| SUITES.iter().all(|suite| suite.name != name.as_str()));
            let known = SUITES.map(|suite| suite.name).join(", ");
            ensure!(
                unknown.is_none(),
                "no suite {} is run in virtual machines, but {known}",
                unknown.map_or("", |name| name)
            );
        }
        Ok(SUITES.iter().filter(chosen).collect())
    }
}

/// Runs the tests on the newest kernel of each series. `args` are for the test binaries: options, and how names begin
/// within a suite.
pub fn test(series: &[String], selection: &Selection<'_>, args: &[OsString]) -> Result<()> {
    let start = Instant::now();
    let suites = selection.suites()?;
    let smoke = matches!(selection, Selection::Smoke);
    setup::for_building()?;
    setup::for_virtual_machines()?;
    let dir = workspace()?.join("target/vm");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;

    let programs = programs(&suites)?;
    let series: Vec<&str> =
        if series.is_empty() { SERIES.to_vec() } else { series.iter().map(String::as_str).collect() };
    // What the guests get is there before the first one runs, so that whatever is built meanwhile, all test the same.
    let mut guests = Vec::new();
    for series in series {
        let kernel = Kernel::fetch(series, &dir)?;
        let console = dir.join(format!("console-{}", kernel.release));
        let base = initramfs::base(&kernel, &dir)?;
        let accelerator = Accelerator::choose(&kernel, &base, &console);
        let run = script(&suites, smoke, accelerator, args)?;
        let initramfs = initramfs::with_payload(&base, &programs, &run)?;
        guests.push((kernel, console, accelerator, initramfs));
    }
    let mut all = Vec::new();
    for (kernel, console, accelerator, initramfs) in guests {
        say(format_args!("testing on Linux {} ({accelerator})", kernel.release));
        let limit = if smoke { SMOKE_LIMIT } else { SUITE_LIMIT * u32::try_from(suites.len())? };
        let mut results = Results::default();
        boot(accelerator, &kernel, &initramfs, &console, limit, |line| {
            println!("{line}");
            results.read(line);
        })?;
        all.push((kernel.release, results));
    }

    for table in results::tables(&all) {
        println!("\n{table}");
    }
    println!();
    for (suite, (test, why)) in suites.iter().flat_map(|suite| suite.skip.iter().map(|skip| (suite.name, skip))) {
        println!("left out: {suite} {test}: {why}");
    }
    let mut failed = false;
    for (release, results) in all {
        let Tally { passed, failed: failures, ignored } = results.tally;
        println!("tests on Linux {release}: {passed} passed, {failures} failed, {ignored} skipped");
        for failure in results.failures(suites.len()) {
            println!("  {failure}");
            failed = true;
        }
    }
    say(format_args!("virtual machines ended after {:.0?}", start.elapsed()));
    if failed {
        bail!("tests in virtual machines: they are named above");
    }
    Ok(())
}

/// tunroute itself and the binaries of the suites, built, with their names.
fn programs(suites: &[&Suite]) -> Result<Vec<(String, PathBuf)>> {
    let mut programs = vec![("tunroute".to_owned(), build::programs()?.join("tunroute"))];
    let tests = build::tests()?.into_iter().filter(|binary| !binary.is_unit);
    let wanted = tests.filter(|binary| suites.iter().any(|suite| suite.binary() == binary.name));
    programs.extend(wanted.map(|binary| (binary.name, binary.path)));
    Ok(programs)
}

/// What the guest does, in the words that [`Results::read`] knows. Of `args`, those without a dash are parts of names.
fn script(suites: &[&Suite], smoke: bool, accelerator: Accelerator, args: &[OsString]) -> Result<String> {
    let args = args.iter().map(|arg| arg.to_str().with_context(|| format!("not text: {}", arg.display())));
    let args = args.collect::<Result<Vec<&str>>>()?;
    let (options, names): (Vec<&str>, Vec<&str>) = args.into_iter().partition(|arg| arg.starts_with('-'));
    let quoted = |arg: &str| format!(" '{}'", arg.replace('\'', r"'\''"));
    let (slowdown, factor) = SLOWDOWN;
    let mut script = String::from("cd /payload\nexport TUNROUTE_BIN=/payload/tunroute RUST_BACKTRACE=0");
    if accelerator == Accelerator::Emulation {
        script += &format!(" {slowdown}={factor}");
    }
    for suite in suites {
        let Suite { name, smoke: few, skip, emulated } = suite;
        script += &format!("\necho 'vm: suite {name}'\n");
        for (variable, value) in emulated.iter().filter(|_| accelerator == Accelerator::Emulation) {
            script += &format!("{variable}={value} ");
        }
        // Two at a time, so that one works while the other waits.
        script += &format!("timeout -s KILL {} ./{} --test-threads 2", SUITE_LIMIT.as_secs(), suite.binary());
        for (test, _) in *skip {
            script += &format!(" --skip {test}");
        }
        let names = few.filter(|_| smoke).unwrap_or(&names);
        if names.is_empty() {
            script.extend(Some(suite.prefix()).filter(|prefix| !prefix.is_empty()).map(|prefix| quoted(&prefix)));
        }
        for name in names {
            script += &quoted(&format!("{}{name}", suite.prefix()));
        }
        options.iter().for_each(|option| script += &quoted(option));
        script += &format!("\necho \"vm: {name} ended with $?\"");
    }
    script.push('\n');
    Ok(script)
}
