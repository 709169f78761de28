//! Supervised tunnel commands, end to end: they make the device, they are not started too often whatever becomes of the
//! daemon, and `down` takes the tunnel down.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, TUNNELS, TunnelKind, World,
    pace::{SOON, patience, until},
    ping,
    plan::{REMOTE, mac_broker, mac_tunnel},
    traffic::Answer,
};

fn script(world: &World, name: &str, text: &str) -> Result<PathBuf> {
    let path = world.dir().join(name);
    fs::write(&path, format!("#!/bin/sh\nset -e\n{text}"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// The story's configuration with settings for tunnel 0.
fn config(world: &World, settings: &str) -> String {
    world.config().replace("[tunnel.sixxs0]", &format!("[tunnel.sixxs0]\n{settings}"))
}

/// What makes tunnel 0, at both ends.
fn make_tunnel(world: &World) -> Result<String> {
    let (plan, broker) = (&TUNNELS[0], format!("ip -n {}", world.brokers[0].name()));
    let (device, near, far) = (plan.device, mac_tunnel(0), mac_broker(0));
    let mut text = String::new();
    writeln!(
        text,
        "ip link add {device} address {near} type veth peer name {device} address {far} netns {}",
        world.brokers[0].name()
    )?;
    writeln!(text, "{broker} link set {device} up")?;
    for family in Family::ALL {
        let (host, gateway) = (plan.host.of(family), plan.gateway.of(family));
        let (length, nodad) = if family == Family::V4 { (32, "") } else { (128, "nodad") };
        writeln!(text, "ip addr add {host}/{length} dev {device} {nodad}")?;
        writeln!(text, "{broker} addr add {gateway}/{length} dev {device} {nodad}")?;
        writeln!(text, "{broker} route add {host} dev {device}")?;
        writeln!(text, "{broker} route add {} via {host} dev {device}", plan.prefix.of(family))?;
    }
    writeln!(text, "ip link set {device} up")?;
    Ok(text)
}

fn command(status: &serde_json::Value) -> &serde_json::Value {
    &status["tunnels"][0]["command"]
}

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

#[test]
fn the_up_command_makes_the_tunnel_and_the_down_command_takes_it_down() -> Result<()> {
    let world = World::with(TunnelKind::Veth).tunnels_present([false, true]).build()?;
    let said = world.dir().join("said");
    let up = format!("echo up >> {0}\n{1}echo tunnel made\n", said.display(), make_tunnel(&world)?);
    let up = script(&world, "up", &up)?;
    let down = format!("echo \"down $1 ${{NOTIFY_SOCKET-unset}}\" >> {}\nip link del sixxs0\n", said.display());
    let down = script(&world, "down", &down)?;
    let settings = format!("up = [\"{}\"]\ndown = [\"{}\", \"$HOME *\"]", up.display(), down.display());
    // Without an address on the uplink the command could do nothing but fail.
    world.host.ip("link set net0 down")?;
    let notify = ("NOTIFY_SOCKET".to_owned(), world.dir().join("nobody").display().to_string());
    let options = DaemonOptions { env: vec![notify], ..DaemonOptions::default() };
    let mut daemon = Daemon::start(&world, &config(&world, &settings), &options)?;
    std::thread::sleep(patience(Duration::from_millis(300)));
    assert_eq!((lines(&said), command(&daemon.status()?)["state"].as_str()), (vec![], Some("idle")));
    world
        .host
        .ip("link set net0 up\nroute replace default via 192.0.2.2\n-6 route replace default via 2001::ff dev net0")?;

    let status = daemon.wait_status(|status| status["tunnels"][0]["state"] == "up", SOON)?;
    let status = if command(&status)["state"] == "started" {
        status
    } else {
        daemon.wait_status(|status| command(status)["state"] == "started", SOON)?
    };
    assert_eq!(command(&status)["starts-in-window"], 1, "{status:#}");
    for family in Family::ALL {
        for (netns, src) in [(&world.host, TUNNELS[0].host), (&world.client, TUNNELS[0].client)] {
            assert_eq!(ping(netns, src.of(family), REMOTE.of(family))?, Answer::Reply, "{}", src.of(family));
        }
    }
    daemon.wait_said(0, "tunnel made").context("its output is not in the log")?;
    assert_eq!(lines(&said), ["up"]);

    // The end of the daemon is not the end of the tunnel, and its successor does not start it again.
    daemon.terminate()?;
    let mut daemon = Daemon::start(&world, &config(&world, &settings), &options)?;
    daemon.wait_status(|status| status["tunnels"][0]["state"] == "up", SOON)?;
    assert_eq!(lines(&said), ["up"]);
    daemon.down()?;
    // No shell has looked at the argument, and the command is not to speak to the service manager.
    assert_eq!(lines(&said), ["up", "down $HOME * unset"]);
    ensure!(world.host.ifindex("sixxs0").is_err(), "the device is still there");
    Ok(())
}

#[test]
fn a_foreground_command_outlives_the_daemon_and_ends_with_down() -> Result<()> {
    let world = World::with(TunnelKind::Veth).tunnels_present([false, true]).build()?;
    let up = script(&world, "up", &format!("{}exec sleep 1000\n", make_tunnel(&world)?))?;
    let config = config(&world, &format!("up = [\"{}\"]", up.display()));
    let mut daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let running = |status: &serde_json::Value| command(status)["pid"].is_u64() && status["tunnels"][0]["state"] == "up";
    let pid = command(&daemon.wait_status(running, SOON)?)["pid"].clone();
    daemon.kill9()?;
    let mut daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let adopted = daemon.wait_status(running, SOON)?;
    assert_eq!((&command(&adopted)["pid"], command(&adopted)["starts-in-window"].as_u64()), (&pid, Some(1)));
    let family = Family::V6;
    assert_eq!(ping(&world.host, TUNNELS[0].host.of(family), REMOTE.of(family))?, Answer::Reply);
    daemon.down()?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid.as_i64().context("no pid")?)?);
    // Its parent is gone; whoever has inherited it reaps it in time.
    let gone = || {
        kill(pid, None::<Signal>).is_err()
            || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    };
    until(&format!("process {pid} is gone"), || Ok(gone()))
}

#[test]
fn the_start_limit_holds_whatever_becomes_of_the_daemon() -> Result<()> {
    let world = World::with(TunnelKind::Veth).tunnels_present([false, true]).build()?;
    let starts = world.dir().join("starts");
    let up = script(&world, "up", &format!("date +%s%N >> {}\necho no broker\nexit 1\n", starts.display()))?;
    // Longer than all of this takes.
    let window = patience(Duration::from_secs(600)).as_secs();
    let limit = format!("start-limit = {{ burst = 4, interval = \"{window}s\" }}");
    let config = config(&world, &format!("up = [\"{}\"]\n{limit}", up.display()));
    for _ in 0..12 {
        let mut daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
        daemon.wait_status(|status| command(status)["starts-in-window"].as_u64() >= Some(1), SOON)?;
        std::thread::sleep(Duration::from_millis(100));
        daemon.kill9()?;
    }
    eprintln!("12 daemons, killed: {} starts", lines(&starts).len());
    ensure!((1..=4).contains(&lines(&starts).len()), "{:?}", lines(&starts));
    Ok(())
}

#[test]
fn a_limit_that_is_reached_twice_ends_the_attempts_for_later_daemons_too() -> Result<()> {
    const BURST: usize = 1;
    const INTERVAL: Duration = Duration::from_secs(8);
    let world = World::with(TunnelKind::Veth).tunnels_present([false, true]).build()?;
    let starts = world.dir().join("starts");
    let up = script(&world, "up", &format!("date +%s%N >> {}\nexit 1\n", starts.display()))?;
    let settings = format!(
        "up = [\"{}\"]\nstart-limit = {{ burst = {BURST}, interval = \"{}s\" }}",
        up.display(),
        INTERVAL.as_secs()
    );
    let config = config(&world, &settings);
    let mut daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let status = daemon.wait_status(|status| command(status)["state"] == "limited", SOON)?;
    assert_eq!(command(&status)["last-exit"], "exit status: 1");
    ensure!(command(&status)["next-start-ms"].as_u64().is_some_and(|ms| ms <= 8000), "{status:#}");
    daemon.wait_status(|status| command(status)["state"] == "given-up", INTERVAL + SOON)?;
    let log = daemon.log();
    daemon.kill9()?;
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    daemon.wait_status(|status| command(status)["state"] == "given-up", SOON)?;
    std::thread::sleep(Duration::from_millis(500));
    let times: Vec<u64> = lines(&starts).iter().map(|line| line.parse()).collect::<Result<_, _>>()?;
    eprintln!("{} starts before giving up", times.len());
    assert_eq!(times.len(), 2, "{log}");
    // The script may come to look at the clock only some time after its start: without the limit it is little more than 1 s.
    let apart = Duration::from_nanos(times[1] - times[0]);
    ensure!(apart > INTERVAL / 2, "{BURST} start in {INTERVAL:?}, but two after {apart:?}");
    Ok(())
}
