//! `cargo xtask run`: the story of tunroute on real packets, played in network namespaces of its own.
//!
//! A scene is a function in [`scenes`]; what it claims, it expects of captured frames, exit statuses or the kernel's own
//! tables, through the [`stage::Stage`]. The exit status is 0 only if every expectation held.

mod guard;
mod journey;
mod outage;
mod scenes;
mod stage;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use nix::unistd::geteuid;
use tunroute_tests::{TunnelKind, World};

use stage::Stage;

fn main() -> ExitCode {
    if !geteuid().is_root() {
        eprintln!("demo: making network namespaces and loading eBPF needs root: start it with sudo");
        return ExitCode::FAILURE;
    }
    guard::watch_over(play)
}

/// The whole play. The world and all that is in it is gone before the last expectation.
fn play() -> ExitCode {
    let mut stage = Stage::new();
    if let Err(error) = play_on(&mut stage) {
        stage.broke_off(&error);
    }
    stage.finish()
}

fn play_on(stage: &mut Stage) -> Result<()> {
    scenes::prologue(stage);
    let before = machine()?;
    {
        let world = World::with(TunnelKind::Tun).build()?;
        stage.log_is(scenes::log_file(&world));
        if let Err(error) = scenes::all(stage, &world) {
            stage.broke_off(&error);
        }
    }
    stage.scene("And this machine", "All of it took place in namespaces, which are gone.");
    stage.expect_unchanged("its own rules, routes and links", &difference(&before, &machine()?));
    Ok(())
}

/// Rules, routes and links of the namespace in which the demo was started, without what changes by itself.
fn machine() -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for args in ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all", "-brief link"] {
        let output = Command::new("ip").args(args.split(' ')).output().context("cannot start ip: install iproute2")?;
        ensure!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            // The time that is left of a route which a router has announced.
            let line = line.split(" expires ").next().unwrap_or_default();
            lines.push(format!("ip {args}: {line}"));
        }
    }
    Ok(lines)
}

fn difference(before: &[String], after: &[String]) -> String {
    let gone = before.iter().filter(|line| !after.contains(line)).map(|line| format!("- {line}\n"));
    let came = after.iter().filter(|line| !before.contains(line)).map(|line| format!("+ {line}\n"));
    gone.chain(came).collect()
}
