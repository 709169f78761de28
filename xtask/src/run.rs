//! `cargo xtask run`: builds tunroute and the demo, and becomes one of them.

use std::{ffi::OsString, iter, os::unix::process::CommandExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build,
    command::{is_installed, is_root, say},
    setup,
};

/// Starts the demo; or with `args`, `tunroute run` with them. Returns only if it cannot be started.
pub fn run(args: &[OsString]) -> Result<()> {
    setup::for_building()?;
    if args.is_empty() {
        setup::for_labs()?;
    }
    let programs = build::programs()?;
    if args.is_empty() {
        return start(&programs.join("demo"), &[]);
    }
    let args: Vec<OsString> = iter::once("run".into()).chain(args.iter().cloned()).collect();
    start(&programs.join("tunroute"), &args)
}

/// Becomes `program`, as root: signals reach it, and its exit status is ours. Returns only if it cannot be started.
pub fn start(program: &Path, args: &[OsString]) -> Result<()> {
    if !is_root() {
        ensure!(is_installed("sudo"), "making network devices and loading eBPF needs root: install sudo, or be root");
        say("starting it through sudo, as making network devices and loading eBPF needs root");
    }
    let mut command = as_root(program, is_root());
    let error = command.args(args).exec();
    Err(error).with_context(|| format!("cannot start {}", command.get_program().display()))
}

/// The command that starts `program` as root, with this environment.
pub fn as_root(program: &Path, is_root: bool) -> Command {
    if is_root {
        return Command::new(program);
    }
    let mut sudo = Command::new("sudo");
    sudo.args(["-E", "--"]).arg(program);
    sudo
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_started_as_root() {
        for (is_root, expected) in [(true, &["/t/demo"][..]), (false, &["sudo", "-E", "--", "/t/demo"])] {
            let command = as_root(Path::new("/t/demo"), is_root);
            let words: Vec<_> = [command.get_program()].into_iter().chain(command.get_args()).collect();
            assert_eq!(words, expected);
        }
    }
}
