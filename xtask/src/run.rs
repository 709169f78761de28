//! `cargo xtask run`: builds the release binaries and becomes one of them.

use std::{ffi::OsString, iter, os::unix::process::CommandExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    command::{cargo, is_installed, is_root, release_dir, run as run_command, say},
    setup,
};

/// The profile of everything that is built here, so that the dependencies are compiled once.
pub fn build_release() -> Result<()> {
    say("building tunroute");
    run_command(
        &mut cargo(["build", "--release", "--package", "tunroute", "--package", "tunroute-tests", "--bins"])?,
        "see the compiler's messages above",
    )
}

/// Without `args`, the demo; otherwise `tunroute run` with them. Returns only if it cannot be started.
pub fn run(args: &[OsString]) -> Result<()> {
    setup::for_building()?;
    if args.is_empty() {
        setup::for_labs()?;
    }
    build_release()?;
    if args.is_empty() {
        return start("demo", &[]);
    }
    let args: Vec<OsString> = iter::once("run".into()).chain(args.iter().cloned()).collect();
    start("tunroute", &args)
}

/// Becomes one of the release binaries, as root: signals reach it, and its exit status is ours. Returns only if it cannot
/// be started.
pub fn start(program: &str, args: &[OsString]) -> Result<()> {
    if !is_root() {
        ensure!(is_installed("sudo"), "making network devices and loading eBPF needs root: install sudo, or be root");
        say("starting it through sudo, as making network devices and loading eBPF needs root");
    }
    let mut command = command_line(&release_dir()?, program, args, is_root());
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", command.get_program().display()))
}

fn command_line(release_dir: &Path, program: &str, args: &[OsString], is_root: bool) -> Command {
    let program = release_dir.join(program);
    let mut command = if is_root {
        Command::new(program)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg("--").arg(program);
        sudo
    };
    command.args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_what_was_built_as_root() {
        for (program, args, is_root, expected) in [
            ("demo", &[][..], true, &["/t/release/demo"][..]),
            ("demo", &[], false, &["sudo", "--", "/t/release/demo"]),
            ("tunroute", &["run", "--config", "x y"], true, &["/t/release/tunroute", "run", "--config", "x y"]),
            ("tunroute", &["run", "--once"], false, &["sudo", "--", "/t/release/tunroute", "run", "--once"]),
        ] {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            let command = command_line(Path::new("/t/release"), program, &args, is_root);
            let words: Vec<_> = [command.get_program()].into_iter().chain(command.get_args()).collect();
            assert_eq!(words, expected);
        }
    }
}
