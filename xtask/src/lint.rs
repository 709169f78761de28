//! `cargo xtask lint`: what can be said about the code without running it.

use std::time::Instant;

use anyhow::Result;

use crate::{
    build::target_dir,
    command::{cargo, run, say},
    documents, setup,
};

/// Checks formatting, code with clippy, and documents; stops at the first fault. With `fix`, generated pages are written anew.
pub fn lint(fix: bool) -> Result<()> {
    let start = Instant::now();
    say("checking the formatting");
    run(&mut cargo(["fmt", "--all", "--check"])?, "run `cargo fmt --all`")?;

    setup::for_building()?;
    say("checking the host's code with clippy");
    let mut clippy = cargo(["clippy", "--all-targets", "--", "-D", "warnings"])?;
    run(&mut clippy, "change what clippy names above")?;

    say("checking the eBPF code with clippy");
    let mut clippy = cargo(["clippy", "--release", "--target", "bpfel-unknown-none"])?;
    clippy.args(["--package", "tunroute-ebpf", "--package", "tunroute-bench-ebpf"]);
    clippy.args(["-Z", "build-std=core"]).env("RUSTC_BOOTSTRAP", "1");
    // Beside what tunroute's build script builds: another target and compiler environment must not share a place with
    // the host's build, or each would undo the other's.
    clippy.arg("--target-dir").arg(target_dir("ebpf")?);
    run(clippy.args(["--", "-D", "warnings"]), "change what clippy names above")?;

    say("checking the documentation");
    let mut doc = cargo(["doc", "--no-deps", "--document-private-items"])?;
    run(doc.env("RUSTDOCFLAGS", "-D warnings"), "change what rustdoc names above")?;

    say("checking README, links and generated pages");
    documents::check(fix)?;

    say(format_args!("nothing to complain about, after {:.0?}", start.elapsed()));
    Ok(())
}
