//! `cargo xtask bench`: builds the bench and what it measures, and becomes it.

use std::{ffi::OsString, iter};

use anyhow::Result;

use crate::{
    command::{cargo, release_dir, run, say},
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

    // By argument, as sudo keeps the environment to itself.
    let tunroute = iter::once("--tunroute".into()).chain(iter::once(release_dir()?.join("tunroute").into()));
    let args: Vec<OsString> = tunroute.chain(args.iter().cloned()).collect();
    start("tunroute-bench", &args)
}
