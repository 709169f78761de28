//! What an operator does to the daemon, and what befalls it, under a flow of 60,000 packets a second: none is lost, and none
//! leaves by another way. And how long a restart takes with 10,000 prefixes.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tunroute::datapath::HEARTBEAT_VALID;
use tunroute_tests::{
    Daemon, DaemonOptions, Earlier, Flow, FlowOptions, TUNNELS, TunnelKind, Watch, World,
    daemon::unit_capabilities,
    offload::{programs, xdp_forced},
    pace::SOON,
    reach,
};

/// Packets per second that are asked for.
const RATE: u32 = 60_000;
/// Those that must be reached on a machine that has other things to do: enough to see a gap of a millisecond.
const ENOUGH: f64 = 5000.0;
/// What a restart with 10,000 prefixes takes is a fraction of a second. On a busy machine, too, it is over before the
/// heartbeat of the daemon before is, after which the ingress programs step aside.
const RESTART: Duration = HEARTBEAT_VALID;
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
    options: DaemonOptions,
}

impl Scene<'_> {
    fn start(&mut self) -> Result<()> {
        self.daemon = Daemon::start(self.world, &self.config, &self.options)?;
        Ok(())
    }
}

/// Lets something happen under a flow from the client to the broker, over the tunnel alone.
fn under_load(
    world: &World,
    mode: &str,
    name: &str,
    options: DaemonOptions,
    event: impl FnOnce(&mut Scene<'_>) -> Result<()>,
) -> Result<()> {
    let config = format!("datapath = \"{mode}\"\n{}", world.config());
    let daemon = Daemon::start(world, &config, &options)?;
    let mut scene = Scene { world, daemon, config, options };
    let (src, dst) = (TUNNELS[0].client.v6.into(), TUNNELS[0].gateway.v6.into());
    reach(&world.client, src, dst)?;
    let watch = [
        ("right", Watch::entering(&world.brokers[0], TUNNELS[0].device)),
        ("wrong", Watch::entering(&world.brokers[1], TUNNELS[1].device)),
        ("uplink", Watch::leaving(&world.host, "net0")),
    ];
    let flow = Flow::start(FlowOptions {
        from: &world.client,
        src,
        to: &world.brokers[0],
        dst,
        rate: RATE,
        payload: 20,
        watch: &watch,
    })?;
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
    ensure!(report.rate() >= ENOUGH, "{name}, {mode}: only {:.0} packets/s", report.rate());
    ensure!(leaked == 0, "{name}, {mode}: {leaked} packets leaked; log:\n{}", scene.daemon.log());
    ensure!(lost == 0, "{name}, {mode}: {lost} packets lost; log:\n{}", scene.daemon.log());
    scene.daemon.terminate()?;
    Ok(())
}

/// XDP comes and goes under a flow.
#[test]
fn nothing_is_lost_as_xdp_comes_and_goes() -> Result<()> {
    let world = World::with(TunnelKind::Veth).alone().build()?;
    world.as_on_a_wire()?;
    under_load(&world, "both", "xdp on and off", DaemonOptions::default(), |scene| {
        for xdp in ["on", "off", "on", "off"] {
            scene.daemon.write_config(&format!("xdp = \"{xdp}\"\n{}", scene.config))?;
            scene.daemon.reload()?;
            // The kernel may not have let go of the program that was there before.
            let attached =
                |status: &Value| status["fast_path"]["attached"].to_string().contains("xdp ingress dev lan0");
            scene.daemon.wait_status(|status| attached(status) == (xdp == "on"), SOON)?;
            std::thread::sleep(STEADY);
        }
        Ok(())
    })
}

/// The daemon ends in the way of the event, and the next one starts.
fn restart(end: impl FnOnce(&mut Daemon<'_>) -> Result<()>) -> impl FnOnce(&mut Scene<'_>) -> Result<()> {
    |scene| {
        end(&mut scene.daemon)?;
        scene.start()
    }
}

#[test]
fn nothing_is_lost() -> Result<()> {
    // Without CAP_SYS_ADMIN, as in the unit, the next daemon cannot tell that the programs are as good as its own.
    let unit = || Ok::<_, anyhow::Error>(DaemonOptions::with_capabilities(&unit_capabilities()?));
    for mode in ["kernel", "both", "ebpf"].into_iter().filter(|mode| !xdp_forced() || *mode != "kernel") {
        let world = World::with(TunnelKind::Veth).alone().build()?;
        for (who, options) in [("root", DaemonOptions::default()), ("unit", unit()?)] {
            under_load(&world, mode, &format!("reload, {who}"), options.clone(), |scene| {
                let more = "\n[[policy]]\nname = \"extra\"\nfrom = [\"2001:db8:e::/48\"]\nvia = [\"sixxs1\"]\n";
                for config in [format!("{}{more}", scene.config), scene.config.clone()] {
                    scene.daemon.write_config(&config)?;
                    scene.daemon.reload()?;
                }
                scene.daemon.signal(Signal::SIGHUP)
            })?;
            let terminated = restart(|daemon| daemon.terminate().map(drop));
            under_load(&world, mode, &format!("SIGTERM and start, {who}"), options.clone(), terminated)?;
            let killed = restart(|daemon| daemon.kill9().map(drop));
            under_load(&world, mode, &format!("kill -9 and start, {who}"), options.clone(), |scene| {
                let log = scene.daemon.log().len();
                killed(scene)?;
                let replaced = scene.daemon.log().split_off(log).matches("attach program").count();
                // In their links, at once.
                let expected = if mode == "kernel" || who == "root" { 0 } else { programs() };
                ensure!(replaced == expected, "{replaced} programs were replaced; log:\n{}", scene.daemon.log());
                Ok(())
            })?;
            if mode != "kernel" {
                under_load(&world, mode, &format!("other layout, {who}"), options, |scene| {
                    scene.daemon.terminate()?;
                    let earlier = Earlier::take_over(scene.world)?;
                    scene.start()?;
                    earlier.ensure_gone(scene.world)
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn restart_with_10_000_prefixes() -> Result<()> {
    let world = World::with(TunnelKind::Veth).alone().build()?;
    let prefixes: Vec<String> =
        (0..10_000).map(|n| format!("\"2001:db8:{:x}:{:x}::/64\"", 0x100 + n / 256, n % 256)).collect();
    let more = format!("\n[[policy]]\nname = \"many\"\nfrom = [{}]\nvia = [\"sixxs1\"]\n", prefixes.join(", "));
    for mode in ["kernel", "both", "ebpf"] {
        let config = format!("datapath = \"{mode}\"\n{}{more}", world.config());
        let started = Instant::now();
        let mut daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
        let first = started.elapsed();
        daemon.kill9()?;
        let log = daemon.log().len();
        let started = Instant::now();
        daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
        let restart = started.elapsed();
        let log = daemon.log().split_off(log);
        let changed = log.lines().find(|line| CHANGES.iter().any(|change| line.contains(change)));
        ensure!(changed.is_none(), "{mode}: the plan was not empty: {changed:?}");
        tell(&format!(
            "restart with 10,000 prefixes, {mode}: first start {first:.0?}, restart {restart:.0?}, nothing changed"
        ));
        ensure!(restart < RESTART, "{mode}: a restart took {restart:?}");
        daemon.down()?;
    }
    Ok(())
}
