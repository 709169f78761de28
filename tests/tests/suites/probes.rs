//! Failover by probes, end to end: a broker that drops is noticed and left, one that has healed is taken again, and
//! nothing ever leaves by the uplink meanwhile.

use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, Flow, FlowOptions, TUNNELS, TunnelKind, TunnelPlan, Watch, World,
    pace::{SOON, patience},
    ping,
    plan::REMOTE,
    traffic::Answer,
};

/// Times as they are on a machine that is not slow. An answer may come late, as the tun pair's thread has to wait for a
/// processor; three in a row do not.
const INTERVAL: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_millis(190);
const FAIL: u32 = 3;
const RISE: u32 = 2;
const HOLD_DOWN: Duration = Duration::from_millis(2000);
/// What a busy machine adds.
const SLACK: Duration = Duration::from_secs(5);
/// What is under way when a way is closed has arrived after this.
const UNDER_WAY: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug)]
enum Ask {
    Echo,
    Tcp,
}

/// One policy for tunnel 0's sources, which prefers tunnel 0; both tunnels ask `remote`, behind the brokers.
fn config(world: &World, ask: Ask) -> String {
    let (interval, timeout, hold_down) = (patience(INTERVAL), patience(TIMEOUT), patience(HOLD_DOWN));
    let probe = |target: String| {
        format!(
            "{{ target = \"{target}\", interval = \"{}ms\", timeout = \"{}ms\", fail = {FAIL}, rise = {RISE}, \
             hold-down = \"{}ms\" }}",
            interval.as_millis(),
            timeout.as_millis(),
            hold_down.as_millis()
        )
    };
    // Nobody listens at the port: a refusal is an answer.
    let probes = Family::ALL.map(|family| match (ask, REMOTE.of(family)) {
        (Ask::Echo, target) => probe(target.to_string()),
        (Ask::Tcp, target) => probe(std::net::SocketAddr::new(target, 7).to_string()),
    });
    let story = world.config();
    let (tunnels, _) = story.split_once("[[policy]]").unwrap_or_default();
    let mut config = tunnels.to_owned();
    for plan in &TUNNELS {
        let header = format!("[tunnel.{}]", plan.device);
        config = config.replace(&header, &format!("{header}\nprobe = [{}]", probes.join(", ")));
    }
    let TunnelPlan { host, prefix, .. } = TUNNELS[0];
    config
        + &format!(
            "[[policy]]\nname = \"both\"\nfrom = [\"{}\", \"{}\", \"{}\", \"{}\"]\nvia = [\"sixxs0\", \"sixxs1\"]\n",
            host.v4, host.v6, prefix.v4, prefix.v6
        )
}

/// A broker loses its way to `remote`, or finds it again.
fn set_broker(world: &World, index: usize, works: bool) -> Result<SystemTime> {
    let verb = if works { "del" } else { "add" };
    let now = SystemTime::now();
    let script = Family::ALL.map(|family| format!("route {verb} blackhole {} metric 1\n", REMOTE.of(family)));
    world.brokers[index].ip(&script.concat())?;
    Ok(now)
}

#[test]
fn a_broker_that_drops_is_left_and_taken_again_when_it_has_healed() -> Result<()> {
    for (kind, datapath, ask) in [
        (TunnelKind::Tun, "both", Ask::Echo),
        (TunnelKind::Veth, "kernel", Ask::Tcp),
        (TunnelKind::Vxlan, "ebpf", Ask::Echo),
        (TunnelKind::Tun, "ebpf", Ask::Tcp),
    ] {
        let world = World::with(kind).build()?;
        let options = DaemonOptions { datapath: Some(datapath), ..DaemonOptions::default() };
        let mut daemon = Daemon::start(&world, &config(&world, ask), &options)?;
        fail_over_and_back(&world, &daemon, &format!("{kind:?}, {datapath}, {ask:?}"))?;
        daemon.down()?;
        for family in ["-4", "-6"] {
            let left = world.host.query("ip", &format!("{family} rule"))?;
            ensure!(!left.contains("116"), "{left}");
        }
    }
    Ok(())
}

fn fail_over_and_back(world: &World, daemon: &Daemon<'_>, what: &str) -> Result<()> {
    let probes_up = |status: &serde_json::Value| {
        let tunnels = status["tunnels"].as_array();
        let mut probes = tunnels.into_iter().flatten().flat_map(|tunnel| tunnel["probes"].as_array()).flatten();
        probes.all(|probe| probe["verdict"] == "up")
    };
    daemon.wait_status(probes_up, SOON)?;
    for family in Family::ALL {
        let remote = REMOTE.of(family);
        assert_eq!(ping(&world.client, TUNNELS[0].client.of(family), remote)?, Answer::Reply, "{what}, {family}");
    }
    let watch = [
        ("0", Watch::leaving(&world.host, "sixxs0")),
        ("1", Watch::leaving(&world.host, "sixxs1")),
        ("uplink", Watch::leaving(&world.host, "net0")),
    ];
    let flow = |family| {
        let (src, dst) = (TUNNELS[0].client.of(family), REMOTE.of(family));
        let (from, to) = (&world.client, &world.remote);
        Flow::start(FlowOptions { from, src, to, dst, rate: 2000, payload: 64, watch: &watch })
    };
    let flows = [flow(Family::V4)?, flow(Family::V6)?];
    let moved = |to: &str, since| -> Result<Vec<Duration>> {
        flows.iter().map(|flow| Ok(flow.wait_for(to, since, SOON)?.at.duration_since(since)?)).collect()
    };

    let broken = set_broker(world, 0, false)?;
    let away = moved("1", broken)?;
    let detection = patience(INTERVAL * FAIL + TIMEOUT + SLACK);
    ensure!(away.iter().all(|time| *time < detection), "{what}: moved after {away:?}, expected {detection:?}");

    let healed = set_broker(world, 0, true)?;
    let back = moved("0", healed + Duration::from_millis(1))?;
    // The hold-down is counted from the verdict, which was an instant before the first packet on the other tunnel.
    // If it is over by now, nothing is to be waited for.
    let earliest = (broken + patience(HOLD_DOWN)).duration_since(healed).unwrap_or_default();
    let latest = patience(HOLD_DOWN.max(INTERVAL * RISE) + INTERVAL + TIMEOUT + SLACK);
    ensure!(
        back.iter().all(|time| (earliest..latest).contains(time)),
        "{what}: back after {back:?}, expected {earliest:?} to {latest:?}"
    );
    daemon.wait_status(probes_up, SOON)?;

    for broker in 0..2 {
        set_broker(world, broker, false)?;
    }
    let down = serde_json::json!({ "v4": "(unreachable)", "v6": "(unreachable)" });
    daemon.wait_status(|status| status["policies"][0]["active"] == down, SOON)?;
    let since = SystemTime::now() + UNDER_WAY;
    std::thread::sleep(UNDER_WAY + Duration::from_millis(200));
    let later = ["0", "1"].map(|place| flows.each_ref().map(|flow| flow.count_since(place, since)));
    assert_eq!(later, [[0; 2]; 2], "{what}: all are down");
    // The other one first: the probes of a policy that is down altogether find their way, too.
    let healed = set_broker(world, 1, true)?;
    let second = moved("1", healed + Duration::from_millis(1))?;
    for flow in flows {
        assert_eq!(flow.stop()?.count("uplink"), 0, "{what}");
    }
    eprintln!(
        "{what}: left after {away:?}, back after {back:?}, from none to the second after {second:?} (IPv4, IPv6)"
    );
    Ok(())
}
