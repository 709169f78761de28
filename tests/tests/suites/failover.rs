//! How long a policy's packets wait when their tunnel goes down, until the first one takes the next tunnel.

use std::{
    io::Write as _,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use tunroute_tests::{
    Daemon, DaemonOptions, Flow, FlowOptions, TUNNELS, TunnelKind, Watch, World, pace::SOON, plan::REMOTE, reach,
};

const ROUNDS: usize = 50;
/// Packets per second: their distance, 0.2 ms, is how exact the measurement is.
const RATE: u32 = 5000;
/// The promise. On an idle machine the worst is one tenth of it. On a busy one some take as long as the daemon, or the sender,
/// has to wait for a processor: most do not, and the bench says how long each takes.
const LIMIT: Duration = Duration::from_millis(50);

/// The pauses of 50 failovers, sorted.
fn pauses(mode: &str, prefixes: usize) -> Result<Vec<Duration>> {
    let world = World::with(TunnelKind::Tun).alone().build()?;
    let plan = &TUNNELS[0];
    let more: String =
        (1..prefixes).map(|n| format!(", \"2001:db8:{:x}:{:x}::/64\"", 0x100 + n / 256, n % 256)).collect();
    let config = format!(
        "datapath = \"{mode}\"\n[interfaces]\ningress = [\"lan0\"]\nuplink = [\"net0\"]\n[tunnel.sixxs0]\n[tunnel.sixxs1]\n\
         [[policy]]\nname = \"both\"\nfrom = [\"{}\"{more}]\nvia = [\"sixxs0\", \"sixxs1\"]\n",
        plan.prefix.v6
    );
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let (src, dst) = (plan.client.v6.into(), REMOTE.v6.into());
    reach(&world.client, src, dst)?;
    let watch = [
        ("first", Watch::leaving(&world.host, TUNNELS[0].device)),
        ("second", Watch::leaving(&world.host, TUNNELS[1].device)),
        ("uplink", Watch::leaving(&world.host, "net0")),
    ];
    let flow = Flow::start(FlowOptions {
        from: &world.client,
        src,
        to: &world.remote,
        dst,
        rate: RATE,
        payload: 20,
        watch: &watch,
    })?;
    for _ in 0..ROUNDS {
        let before = SystemTime::now();
        flow.wait_for("first", before, SOON).context("before")?;
        let down = SystemTime::now();
        world.set_tunnel(0, false)?;
        flow.wait_for("second", down, SOON).with_context(|| daemon.log())?;
        // What the first failover has set off ends before the next one.
        std::thread::sleep(Duration::from_millis(50));
        world.set_tunnel(0, true)?;
        let up = SystemTime::now();
        flow.wait_for("first", up, SOON).with_context(|| daemon.log())?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let report = flow.stop()?;
    ensure!(report.count("uplink") == 0, "{} packets leaked", report.count("uplink"));
    // From the last packet on the first tunnel to the first on the second.
    let mut seen: Vec<_> = ["first", "second"]
        .into_iter()
        .flat_map(|place| report.arrivals[place].iter().map(move |arrival| (arrival.at, place)))
        .collect();
    seen.sort();
    let mut pauses: Vec<Duration> = seen
        .windows(2)
        .filter(|pair| pair[0].1 == "first" && pair[1].1 == "second")
        .map(|pair| pair[1].0.duration_since(pair[0].0).unwrap_or_default())
        .collect();
    pauses.sort();
    ensure!(pauses.len() >= ROUNDS, "{} failovers were seen", pauses.len());
    Ok(pauses)
}

#[test]
fn failover_does_not_depend_on_the_number_of_prefixes() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        let mut fastest = Vec::new();
        for prefixes in [1, 10_000] {
            let pauses = pauses(mode, prefixes)?;
            let (median, worst) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
            let _ = writeln!(
                std::io::stderr().lock(),
                "failover {mode:6} {prefixes:6} prefixes: median {median:.1?}, worst of {} {worst:.1?}",
                pauses.len()
            );
            ensure!(
                median < LIMIT,
                "{mode}, {prefixes} prefixes: most failovers took {median:?}, and the worst {worst:?}"
            );
            fastest.push(pauses[0]);
        }
        // "Not growing": far below what 10,000 writes take. Work that has to be done is done in the fastest, too, and nothing
        // else is.
        ensure!(fastest[1] < fastest[0] * 2 + Duration::from_millis(5), "{mode}: grows with the prefixes: {fastest:?}");
    }
    Ok(())
}
