//! The scenes, in the order in which they are played.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use tunroute::control::status::Status;
use tunroute_common::maps::Outcome;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Flow, FlowOptions, Snapshot, TUNNELS, Watch, World,
    plan::{HOST, PLAIN_CLIENT, REMOTE_ISP_DEVICE},
};

use crate::{
    journey::{FAR, Journey, follow},
    outage,
    stage::Stage,
};

/// The configuration of the story.
pub const CONFIG: &str = r#"[interfaces]
ingress = ["lan0"]        # where the clients' packets enter
uplink  = ["net0"]        # where packets of the policies must never leave
[tunnel]
sixxs0 = { table = 200 }
sixxs1 = { table = 201 }
[[policy]]
name = "tunnel0"
from = ["2a02::1", "2a02:578:85a0::/48"]
via  = ["sixxs0"]
[[policy]]
name = "tunnel1"
from = ["2a02::2", "2a02:578:85a1::/48"]
via  = ["sixxs1"]
"#;
/// The source prefixes in it.
const PREFIXES: usize = 4;

/// What a packet of the host itself has left of its hop limit, 64, when it has passed the broker or the ISP.
const ONE_HOP: u8 = 63;
/// The same for a packet of the client: the host counts as a hop, whichever datapath forwards.
const TWO_HOPS: u8 = 62;

/// UDP packets per second, for half a second.
const RATE: u32 = 1000;

/// The IPv6 addresses of the host on its tunnels.
pub const OURS: [IpAddr; 2] = [IpAddr::V6(TUNNELS[0].host.v6), IpAddr::V6(TUNNELS[1].host.v6)];
/// Those of the client in the tunnels' networks.
pub const CLIENTS: [IpAddr; 2] = [IpAddr::V6(TUNNELS[0].client.v6), IpAddr::V6(TUNNELS[1].client.v6)];

/// Where the daemons of a world log.
pub fn log_file(world: &World) -> PathBuf {
    world.host.dir().join("tunroute.log")
}

/// Introduces the devices and hosts.
pub fn prologue(stage: &mut Stage) {
    stage.prologue(
        "tunroute: packets leave by the tunnel that their source address belongs to",
        "What follows happens to real packets, in network namespaces.\n\
         \n\
         \x20                   ┌ sixxs0 2a02::1 ═══ broker ─┐\n\
         client ─ lan0 host ─┼ sixxs1 2a02::2 ═══ broker ─┼─ remote 2001:db8:ee::1\n\
         \x20                   └ net0   2001::1 ─── ISP ────┘\n\
         \n\
         The client's networks 2a02:578:85a0::/48 and 2a02:578:85a1::/48 belong to the\n\
         tunnels sixxs0 and sixxs1. The host's default route leads to the ISP, which\n\
         drops what arrives on net0 from addresses that are not its customer's.",
    );
}

/// All scenes.
pub fn all(stage: &mut Stage, world: &World) -> Result<()> {
    without_tunroute(stage, world)?;
    let before = world.host.snapshot()?;
    kernel(stage, world, &before)?;
    both(stage, world, &before)?;
    ebpf(stage, world, &before)?;
    let daemon = start(world, "both")?;
    outage::scene(stage, world)?;
    status_and_down(stage, world, &before, daemon)
}

fn without_tunroute(stage: &mut Stage, world: &World) -> Result<()> {
    stage.scene("Without tunroute", "A reply leaves by the default route, whatever address it is from.");
    let mut isp = Capture::everywhere(&world.isp)?;
    stage.columns("ping", Journey::COLUMNS);
    for ours in OURS {
        let expected = Journey::lost("net0");
        let seen = follow(world, &world.remote, FAR, ours, &expected)?;
        stage.expect(&format!("remote pings {ours}"), &expected, &seen);
    }
    // Nothing is wrong with the host, the remote or the ISP as such.
    let uplink = IpAddr::V6(HOST.v6);
    let expected = Journey::answered("net0", REMOTE_ISP_DEVICE, ONE_HOP);
    let seen = follow(world, &world.remote, FAR, uplink, &expected)?;
    stage.expect(&format!("remote pings {uplink}"), &expected, &seen);

    let foreign = |src: Option<IpAddr>| src.is_some_and(|src| OURS.contains(&src));
    let frames: Vec<_> = isp.drain()?.into_iter().filter(|frame| foreign(frame.src)).collect();
    let (sent_on, received): (Vec<_>, Vec<_>) = frames.into_iter().partition(tunroute_tests::Seen::left);
    stage.columns("replies from 2a02::1 and 2a02::2", "packets");
    stage.expect("that reached the ISP on net0", &2, &received.len());
    stage.expect("that the ISP did not drop", &0, &sent_on.len());
    Ok(())
}

fn kernel(stage: &mut Stage, world: &World, before: &Snapshot) -> Result<()> {
    stage
        .scene("tunroute run --datapath kernel", "One rule for each source prefix, one routing table for each policy.");
    stage.show("tunroute.toml:", CONFIG);
    let mut daemon = start(world, "kernel")?;
    let log = daemon.log();
    // "TIME  INFO ip -6 rule add …"
    let commands: Vec<&str> =
        log.lines().filter_map(|line| line.split_once(" INFO ")).map(|(_, rest)| rest).filter(is_command).collect();
    stage.show("What tunroute makes of it, as it logs it:", &commands.join("\n"));
    stage.expect("rules for the policies' prefixes", &PREFIXES, &policy_rules(world)?);

    pings_of_the_story(stage, world)?;
    down(stage, world, before, &mut daemon)
}

fn is_command(line: &&str) -> bool {
    line.starts_with("ip ")
}

/// What could not be done in the first scene, and what could.
fn pings_of_the_story(stage: &mut Stage, world: &World) -> Result<()> {
    stage.columns("ping", Journey::COLUMNS);
    for (ours, tunnel) in OURS.into_iter().zip(&TUNNELS) {
        let expected = Journey::answered(tunnel.device, tunnel.remote_device, ONE_HOP);
        let seen = follow(world, &world.remote, FAR, ours, &expected)?;
        stage.expect(&format!("remote pings {ours}"), &expected, &seen);
        let seen = follow(world, &world.host, ours, FAR, &expected)?;
        stage.expect(&format!("host pings remote from {ours}"), &expected, &seen);
    }
    let uplink = IpAddr::V6(HOST.v6);
    let expected = Journey::answered("net0", REMOTE_ISP_DEVICE, ONE_HOP);
    let seen = follow(world, &world.host, uplink, FAR, &expected)?;
    stage.expect(&format!("host pings remote from {uplink}"), &expected, &seen);
    Ok(())
}

fn both(stage: &mut Stage, world: &World, before: &Snapshot) -> Result<()> {
    stage.scene(
        "tunroute run: both datapaths, which is the default",
        "The rules, and ahead of them an eBPF program on lan0: it hands the client's\n\
         packets straight to their tunnel, with a hop limit one less, as any router.",
    );
    let mut daemon = start(world, "both")?;
    let counted_before = counters(&daemon, Outcome::Forwarded)?;
    stage.columns("ping", Journey::COLUMNS);
    for (client, tunnel) in CLIENTS.into_iter().zip(&TUNNELS) {
        let expected = Journey::answered(tunnel.device, tunnel.remote_device, TWO_HOPS);
        let seen = follow(world, &world.client, client, FAR, &expected)?;
        stage.expect(&format!("from {client}"), &expected, &seen);
    }
    let plain = IpAddr::V6(PLAIN_CLIENT.v6);
    let expected = Journey::answered("net0", REMOTE_ISP_DEVICE, TWO_HOPS);
    let seen = follow(world, &world.client, plain, FAR, &expected)?;
    stage.expect(&format!("from {plain}, of no policy"), &expected, &seen);

    stage.columns("UDP packets, and how they left", "sent     sixxs0   sixxs1   net0");
    let mut sent = [1, 1];
    for (index, client) in CLIENTS.into_iter().enumerate() {
        let ways = ["sixxs0", "sixxs1", "net0"];
        let watch = ways.map(|device| (device, Watch::leaving(&world.host, device)));
        let (from, to) = (&world.client, &world.remote);
        let flow =
            Flow::start(FlowOptions { from, src: client, to, dst: FAR, rate: RATE, payload: 32, watch: &watch })?;
        std::thread::sleep(Duration::from_millis(500));
        let report = flow.stop()?;
        ensure!(report.sent > 0, "no packet was sent from {client}");
        let row = |counts: [u64; 3]| {
            let [a, b, c] = counts;
            format!("{:<9}{a:<9}{b:<9}{c}", report.sent)
        };
        let mut expected = [0; 3];
        expected[index] = report.sent;
        let seen = ways.map(|device| report.count(device) as u64);
        stage.expect(&format!("from {client}"), &row(expected), &row(seen));
        sent[index] += report.sent;
    }
    counters_grew_by(stage, &daemon, Outcome::Forwarded, counted_before, sent)?;
    down(stage, world, before, &mut daemon)
}

fn ebpf(stage: &mut Stage, world: &World, before: &Snapshot) -> Result<()> {
    stage.scene(
        "tunroute run --datapath ebpf",
        "No rules at all. The kernel routes the host's own packets to net0; there an\n\
         eBPF program diverts those of the policies before they leave.",
    );
    let mut daemon = start(world, "ebpf")?;
    let counted_before = counters(&daemon, Outcome::Diverted)?;
    stage.show("ip -6 rule:", &world.host.query("ip", "-6 rule")?.replace('\t', " "));
    stage.expect("rules for the policies' prefixes", &0, &policy_rules(world)?);
    pings_of_the_story(stage, world)?;
    // From each address a reply to the remote host and a request of its own.
    counters_grew_by(stage, &daemon, Outcome::Diverted, counted_before, [2, 2])?;
    down(stage, world, before, &mut daemon)
}

fn status_and_down(stage: &mut Stage, world: &World, before: &Snapshot, mut daemon: Daemon<'_>) -> Result<()> {
    stage.scene("tunroute status", "The same daemon. Counted are the packets that the eBPF programs decided.");
    let output = daemon.client(&["status"])?;
    stage.show("", &String::from_utf8_lossy(&output.stdout));
    stage.expect("exit status", &0, &output.status.code().unwrap_or(-1));
    down(stage, world, before, &mut daemon)
}

/// Starts the daemon in the world's host.
fn start<'a>(world: &'a World, datapath: &'static str) -> Result<Daemon<'a>> {
    // xtask puts both binaries into one directory.
    let demo = std::env::current_exe().context("cannot find the demo's own binary")?;
    let binary = Some(demo.with_file_name("tunroute")).filter(|path| path.is_file());
    Daemon::start(world, CONFIG, &DaemonOptions { datapath: Some(datapath), binary, ..DaemonOptions::default() })
}

/// Stops the daemon, and expects that the host is as it was.
fn down(stage: &mut Stage, world: &World, before: &Snapshot, daemon: &mut Daemon<'_>) -> Result<()> {
    let status = daemon.down()?;
    // The kernel lets go of some of it a moment later; what it does not, is shown.
    let _same = before.wait_same(|| world.host.snapshot());
    let after = world.host.snapshot()?;
    stage.columns("tunroute down", "");
    stage.expect("the daemon's exit status", &0, &status.code().unwrap_or(-1));
    stage.expect_unchanged("rules, routes, links, programs", &before.diff(&after));
    Ok(())
}

/// How many rules of the host are from a prefix: there are none but tunroute's.
fn policy_rules(world: &World) -> Result<usize> {
    Ok(world.host.query("ip", "-6 rule")?.lines().filter(|rule| rule.contains("from 2a02:")).count())
}

/// What the policies have counted of an outcome, in packets.
fn counters(daemon: &Daemon<'_>, outcome: Outcome) -> Result<[u64; 2]> {
    let status: Status = serde_json::from_value(daemon.status()?).context("status is of another kind than expected")?;
    let counts: Vec<u64> = status
        .policies
        .iter()
        .map(|policy| policy.outcomes.get(outcome.name()).map_or(0, |counter| counter.packets))
        .collect();
    counts.try_into().map_err(|counts| anyhow::anyhow!("two policies, but counters {counts:?}"))
}

fn counters_grew_by(
    stage: &mut Stage,
    daemon: &Daemon<'_>,
    outcome: Outcome,
    before: [u64; 2],
    packets: [u64; 2],
) -> Result<()> {
    let after = counters(daemon, outcome)?;
    stage.columns(&format!("counter \"{}\"", outcome.name()), "before   after    packets sent");
    for (index, ((before, after), packets)) in before.into_iter().zip(after).zip(packets).enumerate() {
        let row = |after: u64| format!("{before:<9}{after:<9}{packets}");
        stage.expect(&format!("policy tunnel{index}"), &row(before + packets), &row(after));
    }
    Ok(())
}
