//! How long a policy's packets wait when their tunnel goes down, until the first one takes the next tunnel.

use std::{io::Write as _, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tunroute_tests::{
    Daemon, DaemonOptions, Flow, FlowOptions, TUNNELS, TunnelKind, Watch, World, ping, plan::REMOTE, traffic::Answer,
};

const ROUNDS: usize = 50;
/// Packets per second: their distance, 0.2 ms, is how exact the measurement is.
const RATE: u32 = 5000;
/// The promise. On an idle machine the worst is one tenth of it.
const LIMIT: Duration = Duration::from_millis(50);
/// To come back there is more time: nobody waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

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
    let reached = (0..5).any(|_| matches!(ping(&world.client, src, dst), Ok(Answer::Reply)));
    ensure!(reached, "{src} cannot reach {dst}");
    let watch = [
        ("first", Watch::entering(&world.brokers[0], TUNNELS[0].device)),
        ("second", Watch::entering(&world.brokers[1], TUNNELS[1].device)),
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
        let before = std::time::SystemTime::now();
        flow.wait_for("first", before, PATIENCE).context("before")?;
        world.set_tunnel(0, false)?;
        flow.wait_for("second", before, PATIENCE).with_context(|| daemon.log())?;
        // What the first failover has set off ends before the next one.
        std::thread::sleep(Duration::from_millis(50));
        world.set_tunnel(0, true)?;
        let up = std::time::SystemTime::now();
        flow.wait_for("first", up, PATIENCE).with_context(|| daemon.log())?;
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
        let mut medians = Vec::new();
        for prefixes in [1, 10_000] {
            let pauses = pauses(mode, prefixes)?;
            let (median, worst) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
            let _ = writeln!(
                std::io::stderr().lock(),
                "failover {mode:6} {prefixes:6} prefixes: median {median:.1?}, worst of {} {worst:.1?}",
                pauses.len()
            );
            ensure!(worst < LIMIT, "{mode}, {prefixes} prefixes: the worst failover took {worst:?}");
            medians.push(median);
        }
        // "Not growing": within what a loaded machine makes of the same work, far below what 10,000 writes take.
        ensure!(medians[1] < medians[0] * 2 + Duration::from_millis(5), "{mode}: grows with the prefixes: {medians:?}");
    }
    Ok(())
}
