//! The demo as a person meets it: it holds, fits the terminal, and leaves nothing behind, however it ends.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tunroute_tests::{daemon::copy_program, pace::until};

fn demo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Ends the demo if the test fails before it has ended.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = kill(pid(&self.0), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// The process in which the demo is played: its namespaces and files have its number in their names.
fn player(demo: &Child) -> Result<Pid> {
    let id = demo.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).context("the demo is gone")?;
    let player = children.split_whitespace().next().context("nobody plays")?;
    Ok(Pid::from_raw(player.parse()?))
}

fn left_by(player: Pid) -> Vec<String> {
    let prefix = format!("tr-{player}-");
    [Path::new("/run/netns"), &std::env::temp_dir()]
        .iter()
        .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path().display().to_string())
        .collect()
}

#[test]
fn every_expectation_holds_and_the_output_fits_a_terminal() -> Result<()> {
    let output = demo().output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    ensure!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(text.contains("✔ All ") && !text.contains('✘'), "{text}");
    for line in text.lines() {
        ensure!(line.chars().count() <= 80, "too wide: {line}");
        ensure!(!line.contains('\x1b'), "colours, but no terminal: {line}");
        ensure!(line == line.trim_end(), "blanks at the end: {line:?}");
    }
    Ok(())
}

#[test]
fn an_interrupted_demo_leaves_nothing() -> Result<()> {
    // While the world is made, in the middle of a scene, while packets flow. Enough is to come, lest the demo ends by itself.
    for (signal, start) in
        [(Signal::SIGINT, "tunroute:"), (Signal::SIGTERM, "2  "), (Signal::SIGHUP, "UDP packets, and how they left")]
    {
        let mut demo = Guarded(demo().spawn()?);
        let mut output = BufReader::new(demo.0.stdout.take().context("no output")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let player = player(&demo.0)?;
        while !line.trim_start().starts_with(start) {
            line.clear();
            ensure!(output.read_line(&mut line)? > 0, "the demo ended before {start:?}");
        }
        kill(pid(&demo.0), signal)?;
        // Nobody is to keep the pipe open, or this would not end.
        output.read_to_end(&mut Vec::new())?;
        until(&format!("{signal} ends the demo"), || Ok(demo.0.try_wait()?.is_some()))?;
        let status = demo.0.wait()?;
        ensure!(status.code() == Some(128 + signal as i32), "{signal}: {status}");
        ensure!(left_by(player).is_empty(), "{signal}: {:?}", left_by(player));
        ensure!(killpg(player, None) == Err(Errno::ESRCH), "{signal}: processes are left");
    }
    Ok(())
}

/// A daemon that does nothing is noticed: the expectations are real.
#[test]
fn a_daemon_that_cannot_be_started_fails_the_demo() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("demo");
    copy_program(Path::new(env!("CARGO_BIN_EXE_demo")), &copy)?;
    std::os::unix::fs::symlink("/bin/false", dir.path().join("tunroute"))?;
    let output = Command::new(copy).stdin(Stdio::null()).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(1), "{}: {text}", output.status);
    ensure!(text.contains("✘ the demo cannot go on") && text.contains("the daemon ended with"), "{text}");
    ensure!(text.contains("as before"), "the machine is looked at all the same: {text}");
    Ok(())
}
