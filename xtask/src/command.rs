//! How this program says things and starts others.

use std::{
    env,
    ffi::OsStr,
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// Says what is being done, on stderr.
pub fn say(message: impl fmt::Display) {
    eprintln!("xtask: {message}");
}

/// The root of the workspace.
pub fn workspace() -> Result<PathBuf> {
    let crate_dir = env::var_os("CARGO_MANIFEST_DIR").context("start this program as `cargo xtask`")?;
    let root = Path::new(&crate_dir).parent().context("the crate xtask has no workspace around it")?;
    Ok(root.to_owned())
}

/// The cargo that runs this program, with `args`, in the root of the workspace.
pub fn cargo<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Result<Command> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(workspace()?);
    Ok(command)
}

/// Runs `command` to its end with this program's input and output. `advice` is what to do if it fails.
pub fn run(command: &mut Command, advice: &str) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run `{}`", shown(command)))?;
    ensure!(status.success(), "`{}` ended with {status}: {advice}", shown(command));
    Ok(())
}

/// What `command` prints.
pub fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run `{}`", shown(command)))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{}` ended with {}: {}", shown(command), output.status, stderr.trim());
    String::from_utf8(output.stdout).with_context(|| format!("`{}` printed something other than text", shown(command)))
}

/// `command` as one would type it; for people only, as nothing is quoted.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut words = vec![name.to_string_lossy()];
    words.extend(command.get_args().map(OsStr::to_string_lossy));
    words.join(" ")
}

/// Finds `program` in `PATH` or where Debian keeps programs that root uses.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let root_only = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(root_only).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// Whether [`find_program`] finds it.
pub fn is_installed(program: &str) -> bool {
    find_program(program).is_some()
}

/// Whether this program runs as root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    #[test]
    fn shows_a_command_by_name_and_arguments() {
        let mut command = Command::new("/opt/rust/bin/cargo");
        command.args(["build", "--release"]).arg(OsStr::from_bytes(b"\xff"));
        assert_eq!(shown(&command), "cargo build --release \u{fffd}");
    }

    #[test]
    fn a_failure_names_the_command_its_status_and_the_advice() {
        let error = run(Command::new("false").arg("x"), "try again").expect_err("false fails");
        assert_eq!(error.to_string(), "`false x` ended with exit status: 1: try again");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("/nowhere/tool"), "").expect_err("there is no such program");
        assert_eq!(error.to_string(), "cannot run `tool`");
    }
}
