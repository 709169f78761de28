//! `cargo xtask bench`: builds the bench and what it measures, and becomes it.

use std::{ffi::OsString, iter};

use anyhow::Result;

use crate::{
    build::target_dir,
    command::{cargo, run, say},
    run::start,
    setup,
};

/// Returns only if the bench cannot be started.
pub fn bench(args: &[OsString]) -> Result<()> {
    setup::for_building()?;
    setup::for_measuring()?;
    say("building tunroute and its bench");
    let packages = ["build", "--release", "--package", "tunroute", "--package", "tunroute-bench", "--bins"];
    run(&mut cargo(packages)?, "see the compiler's messages above")?;

    let release = target_dir("release")?;
    // By argument, as sudo keeps the environment to itself.
    let tunroute = iter::once("--tunroute".into()).chain(iter::once(release.join("tunroute").into()));
    let args: Vec<OsString> = tunroute.chain(args.iter().cloned()).collect();
    start(&release.join("tunroute-bench"), &args)
}
