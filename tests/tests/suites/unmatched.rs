//! `unmatched = "fast"`: what no policy is about, and what comes back by the tunnels, is forwarded by the programs.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, TUNNELS, TunnelKind, World,
    pace::SOON,
    plan::{PLAIN_CLIENT, PLAIN_LAN, REMOTE},
    snapshot::can_ask_main,
    traffic::{Answer, ping},
};

fn unmatched(daemon: &Daemon<'_>) -> Result<u64> {
    let counter = daemon.status()?["fast_path"]["unmatched"].take();
    if !can_ask_main() {
        ensure!(counter.is_null(), "{counter}");
        return Ok(0);
    }
    counter["packets"].as_u64().context("it is not counted")
}

/// Asks from the client, and returns how many packets the programs have forwarded by the main table for it.
fn ask(world: &World, daemon: &Daemon<'_>, source: IpAddr, destination: IpAddr) -> Result<u64> {
    let before = unmatched(daemon)?;
    let answer = ping(&world.client, source, destination)?;
    ensure!(answer == Answer::Reply, "{source} to {destination}: {answer:?}");
    Ok(unmatched(daemon)? - before)
}

fn attached(status: &Value, to: &str) -> bool {
    status["fast_path"]["attached"].to_string().contains(&format!("ingress dev {to}"))
}

#[test]
fn what_no_policy_is_about_goes_by_the_main_table() -> Result<()> {
    let by_program = u64::from(can_ask_main());
    for kind in [TunnelKind::Tun, TunnelKind::Veth] {
        let world = World::with(kind).build()?;
        let config = world.config();
        let fast = format!("unmatched = \"fast\"\n{config}");
        let daemon = Daemon::start(&world, &fast, &DaemonOptions::default())?;
        let tunnel = TUNNELS[0].device;
        daemon.wait_status(|status| attached(status, tunnel) == can_ask_main(), SOON)?;
        for family in Family::ALL {
            // Neighbours are asked for by the kernel first.
            for _ in 0..2 {
                ping(&world.client, PLAIN_CLIENT.of(family), REMOTE.of(family))?;
                ping(&world.client, TUNNELS[0].client.of(family), REMOTE.of(family))?;
            }
            let [plain, policy] = [PLAIN_CLIENT, TUNNELS[0].client].map(|client| client.of(family));
            let asked = |source, destination| ask(&world, &daemon, source, destination);
            ensure!(asked(plain, REMOTE.of(family))? == by_program, "{kind:?} {family}: the request, by net0");
            ensure!(asked(policy, REMOTE.of(family))? == by_program, "{kind:?} {family}: the reply, by {tunnel}");
            ensure!(asked(plain, PLAIN_LAN.of(family))? == 0, "{kind:?} {family}: to the host itself");
            let left = format!("unmatched {family} packets are left to the kernel");
            if !can_ask_main() {
                let hints = daemon.status()?["hints"].to_string();
                ensure!(hints.contains(&format!("{left}: before Linux 6.3 ")), "{kind:?} {family}: {hints}");
                continue;
            }

            // Whom it is about, another rule may know: the kernel asks it.
            let ip = if family == Family::V4 { "rule" } else { "-6 rule" };
            let rule = format!("from {plain} lookup main pref 30000");
            world.host.ip(&format!("{ip} add {rule}"))?;
            daemon.wait_status(|status| status["hints"].to_string().contains(&left), SOON)?;
            ensure!(asked(plain, REMOTE.of(family))? == 0, "{kind:?} {family}: with a foreign rule");
            ensure!(asked(policy, REMOTE.of(family))? == 0, "{kind:?} {family}: with a foreign rule");
            world.host.ip(&format!("{ip} del {rule}"))?;
            daemon.wait_status(|status| !status["hints"].to_string().contains(&left), SOON)?;
            ensure!(asked(policy, REMOTE.of(family))? == 1, "{kind:?} {family}: without it again");
        }
        // `explain` knows no policy of it, and both agree.
        let output = daemon.client(&["explain", &PLAIN_CLIENT.v4.to_string(), &REMOTE.v4.to_string()])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));

        daemon.write_config(&config)?;
        daemon.reload()?;
        let status = daemon.status()?;
        ensure!(!attached(&status, tunnel) && attached(&status, "lan0"), "{status:#}");
        ensure!(status["fast_path"]["unmatched"].is_null(), "{status:#}");
        let answer = ping(&world.client, TUNNELS[0].client.v6.into(), REMOTE.v6.into())?;
        ensure!(answer == Answer::Reply, "{answer:?}");
    }
    Ok(())
}
