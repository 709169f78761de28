//! What an operator does to the daemon, and what befalls it, under a flow of at least 50,000 packets a second: none is
//! lost, and none leaves by another way. And how long a restart takes with 10,000 prefixes.

use std::{
    fs,
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tunroute_common::maps::LAYOUT_VERSION;
use tunroute_tests::{
    Daemon, DaemonOptions, Flow, FlowOptions, TUNNELS, TunnelKind, Watch, World, ping, traffic::Answer,
};

/// Packets per second that are asked for; a machine that does other things reaches less, which is told.
const RATE: u32 = 60_000;
/// Before and after what happens.
const STEADY: Duration = Duration::from_millis(300);
/// What the log calls changes.
const CHANGES: [&str; 6] = ["ip rule", "ip route", "ip -6", "map policy", "attach", "prefix maps"];

/// Prints a line that is seen although the test passes.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

struct Scene<'a> {
    world: &'a World,
    daemon: Daemon<'a>,
    config: String,
}

impl Scene<'_> {
    fn start(&mut self) -> Result<()> {
        self.daemon = Daemon::start(self.world, &self.config, &DaemonOptions::default())?;
        Ok(())
    }
}

/// Lets something happen under a flow from the client to the broker, over the tunnel alone.
fn under_load(world: &World, mode: &str, name: &str, event: impl FnOnce(&mut Scene<'_>) -> Result<()>) -> Result<()> {
    let config = format!("datapath = \"{mode}\"\n{}", world.config());
    let daemon = Daemon::start(world, &config, &DaemonOptions::default())?;
    let mut scene = Scene { world, daemon, config };
    let (src, dst) = (TUNNELS[0].client.v6.into(), TUNNELS[0].gateway.v6.into());
    let reached = (0..5).any(|_| matches!(ping(&world.client, src, dst), Ok(Answer::Reply)));
    ensure!(reached, "{src} cannot reach {dst}");
    let watch = [
        ("right", Watch::entering(&world.brokers[0], TUNNELS[0].device)),
        ("wrong", Watch::leaving(&world.host, TUNNELS[1].device)),
        ("uplink", Watch::leaving(&world.host, "net0")),
    ];
    let options =
        FlowOptions { from: &world.client, src, to: &world.brokers[0], dst, rate: RATE, payload: 20, watch: &watch };
    let flow = Flow::start(options)?;
    std::thread::sleep(STEADY);
    let started = Instant::now();
    event(&mut scene)?;
    let took = started.elapsed();
    std::thread::sleep(STEADY);
    let report = flow.stop()?;
    let (lost, leaked) = (report.lost(&["right"]), report.count("uplink") + report.count("wrong"));
    tell(&format!(
        "survival {name:24} {mode:6} {:7.0} packets/s, {:6} sent, {lost} lost, {leaked} leaked, took {took:.0?}",
        report.rate(),
        report.sent
    ));
    ensure!(leaked == 0, "{name}, {mode}: {leaked} packets leaked; log:\n{}", scene.daemon.log());
    ensure!(lost == 0, "{name}, {mode}: {lost} packets lost; log:\n{}", scene.daemon.log());
    scene.daemon.terminate()?;
    Ok(())
}

#[test]
fn nothing_is_lost() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        let world = World::with(TunnelKind::Veth).build()?;
        under_load(&world, mode, "reload", |scene| {
            let more = "\n[[policy]]\nname = \"extra\"\nfrom = [\"2001:db8:e::/48\"]\nvia = [\"sixxs1\"]\n";
            for config in [format!("{}{more}", scene.config), scene.config.clone()] {
                scene.daemon.write_config(&config)?;
                scene.daemon.reload()?;
            }
            scene.daemon.signal(Signal::SIGHUP)
        })?;
        under_load(&world, mode, "SIGTERM and start", |scene| {
            scene.daemon.terminate()?;
            scene.start()
        })?;
        under_load(&world, mode, "kill -9 and start", |scene| {
            scene.daemon.kill9()?;
            scene.start()
        })?;
        if mode != "kernel" {
            under_load(&world, mode, "upgrade, another layout", |scene| {
                scene.daemon.terminate()?;
                // As if the daemon before had maps of another layout.
                let pins = scene.world.pin_dir();
                fs::rename(pins.join(format!("v{LAYOUT_VERSION}")), pins.join("v0"))
                    .context("cannot rename the maps")?;
                scene.start()?;
                ensure!(!pins.join("v0").exists(), "the old maps are still there");
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn restart_with_10_000_prefixes() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let prefixes: Vec<String> =
        (0..10_000).map(|n| format!("\"2001:db8:{:x}:{:x}::/64\"", 0x100 + n / 256, n % 256)).collect();
    let more = format!("\n[[policy]]\nname = \"many\"\nfrom = [{}]\nvia = [\"sixxs1\"]\n", prefixes.join(", "));
    for mode in ["kernel", "both", "ebpf"] {
        let config = format!("datapath = \"{mode}\"\n{}{more}", world.config());
        let started = Instant::now();
        let mut daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
        let first = started.elapsed();
        let mut best = Duration::MAX;
        // The best of five: the machine may do something else meanwhile, which takes time but never gives any.
        for _ in 0..5 {
            daemon.kill9()?;
            let log = daemon.log().len();
            let started = Instant::now();
            daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
            best = best.min(started.elapsed());
            let log = daemon.log().split_off(log);
            let changed = log.lines().find(|line| CHANGES.iter().any(|change| line.contains(change)));
            ensure!(changed.is_none(), "{mode}: the plan was not empty: {changed:?}");
        }
        tell(&format!(
            "restart with 10,000 prefixes, {mode}: first start {first:.0?}, restart {best:.0?}, nothing changed"
        ));
        ensure!(best < Duration::from_secs(1), "{mode}: a restart took {best:?}");
        daemon.down()?;
    }
    Ok(())
}
