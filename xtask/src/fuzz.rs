//! `cargo xtask test --fuzz`: a short run of each fuzz target.

use std::{env, fs, time::Instant};

use anyhow::{Context as _, Result};

use crate::{
    build::target_dir,
    command::{cargo, run, say, workspace},
    setup,
};

/// The targets in `tests/fuzz/targets`.
const TARGETS: [&str; 3] = ["config", "control", "decide"];

/// Runs each target for so many seconds. What it finds interesting goes to `target/fuzz`; the corpus that is kept in the
/// repository is where it starts from.
pub fn fuzz(seconds: u32) -> Result<()> {
    let start = Instant::now();
    let tools = setup::for_fuzzing()?;
    let fuzz_dir = workspace()?.join("tests/fuzz");
    let target_dir = target_dir("fuzz")?;
    let inherited = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([tools].into_iter().chain(env::split_paths(&inherited)))
        .context("the path of the workspace cannot stand in PATH")?;
    for target in TARGETS {
        say(format_args!("fuzzing {target} for {seconds} s"));
        let found = target_dir.join("corpus").join(target);
        fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
        // Assertions, not memory errors, are what is looked for: a sanitizer would cost half of the speed.
        let mut fuzz = cargo(["fuzz", "run", "--sanitizer", "none", "--fuzz-dir"])?;
        fuzz.arg(&fuzz_dir).arg(target).arg(found).arg(fuzz_dir.join("corpus").join(target));
        fuzz.args(["--", &format!("-max_total_time={seconds}"), "-max_len=4096", "-timeout=10", "-verbosity=0"]);
        fuzz.arg("-print_final_stats=1");
        // The fuzzer's instrumentation takes options that are not stable; the eBPF programs are not needed.
        fuzz.env("PATH", &path).env("CARGO_TARGET_DIR", &target_dir).env("RUSTC_BOOTSTRAP", "1");
        run(fuzz.env("AYA_BUILD_SKIP", "1"), "the input that did it, and how to run it again, are named above")?;
    }
    say(format_args!("nothing found in {} targets, after {:.0?}", TARGETS.len(), start.elapsed()));
    Ok(())
}
