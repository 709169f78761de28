//! `tunroute trace`: decisions of real packets as they are made, what a filter keeps out, and that it ends.

use std::{
    io::{BufRead as _, BufReader},
    process::Child,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tunroute::policy::net::Family;
use tunroute_common::maps::{Control, LAYOUT_VERSION, names};
use tunroute_tests::{
    Daemon, DaemonOptions, Flow, FlowOptions, TUNNELS, TunnelKind, Watch, World,
    pace::{SOON, until},
    ping,
    plan::REMOTE,
    traffic::Answer,
};

/// A running `tunroute trace`, and the lines that it has printed.
struct Trace {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Trace {
    fn start(daemon: &Daemon<'_>, args: &[&str]) -> Result<Self> {
        let mut child = daemon.spawn_client(&[&["trace"], args].concat())?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let printed = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                printed.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Self { child, lines })
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn json(&self) -> Result<Vec<Value>> {
        self.lines().iter().map(|line| serde_json::from_str(line).with_context(|| line.clone())).collect()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // It may have ended already; either way it is reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Do the programs tell decisions?
fn tells(world: &World) -> Result<bool> {
    let pin = world.pin_dir().join(format!("v{LAYOUT_VERSION}")).join(names::CONTROL);
    let control: Array<MapData, Control> = Map::Array(MapData::from_pin(pin)?).try_into()?;
    Ok(control.get(&0, 0)?.tracing == 1)
}

#[test]
fn decisions_are_shown_as_they_are_made() -> Result<()> {
    for datapath in ["both", "ebpf", "shadow"] {
        let world = World::with(TunnelKind::Veth).build()?;
        let options = DaemonOptions { datapath: Some(datapath), ..DaemonOptions::default() };
        let daemon = Daemon::start(&world, &world.config(), &options)?;
        ensure!(!tells(&world)?, "{datapath}: nobody has asked");
        let trace = Trace::start(&daemon, &["--json", "--from", "10.0.0.0/16", "--to", "198.18.0.1"])?;
        until("the programs tell", || tells(&world))?;
        let before = daemon.counters()?;
        for round in 0..5 {
            for family in Family::ALL {
                for tunnel in &TUNNELS {
                    let answer = ping(&world.client, tunnel.client.of(family), REMOTE.of(family))?;
                    ensure!(answer == Answer::Reply, "{datapath}, {round}: {answer:?}");
                }
            }
        }
        // One of four flows is asked for, and all are counted.
        until("five decisions", || Ok(trace.lines().len() >= 5))?;
        let decisions = trace.json()?;
        assert_eq!(decisions.len(), 5, "{datapath}: {decisions:#?}");
        for decision in &decisions {
            let mut decision = decision.clone();
            let time = decision["time"].take();
            ensure!(time.as_str().is_some_and(|time| time.ends_with('Z')), "{time}");
            let expected = json!({
                "time": null, "device": "lan0", "source": TUNNELS[0].client.v4, "destination": REMOTE.v4,
                "protocol": "ICMP", "length": decision["length"], "policy": "tunnel0", "outcome": "forwarded",
                "tunnel": "sixxs0", "shadow": datapath == "shadow",
            });
            assert_eq!(decision, expected, "{datapath}");
        }
        let since = daemon.counters()?.since(&before);
        let counted = ["tunnel0", "tunnel1"].map(|policy| since.get(&(policy.to_owned(), "forwarded".to_owned())));
        assert_eq!(counted, [Some(&10); 2], "{datapath}: {since:?}");

        // One at a time; and what cannot be is refused.
        let refused = daemon.client(&["trace"])?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(refused.status.code() == Some(1) && said.contains("another `tunroute trace` is running"), "{said}");
        // Interrupted it ends well, and killed it leaves nothing behind either.
        let mut trace = trace;
        trace.signal(Signal::SIGINT)?;
        ensure!(trace.child.wait()?.success(), "{datapath}: interrupted");
        until("nobody listens any more", || Ok(!tells(&world)?))?;
        let mut trace = Trace::start(&daemon, &[])?;
        until("the programs tell again", || tells(&world))?;
        ping(&world.client, TUNNELS[1].client.v6.into(), REMOTE.v6.into())?;
        until("a line", || Ok(!trace.lines().is_empty()))?;
        let would = if datapath == "shadow" { "would be: " } else { "" };
        let end = format!(" bytes: tunnel1: {would}leaves by sixxs1");
        let line = trace.lines().swap_remove(0);
        ensure!(line.contains(" lan0: 2a02:578:85a1::2 → 2001:db8:ee::1 ICMPv6, ") && line.ends_with(&end), "{line}");
        trace.child.kill()?;
        trace.child.wait()?;
        until("nobody listens any more", || Ok(!tells(&world)?))?;
    }
    Ok(())
}

/// There may be more than can be told: then all are counted, some are told, and so is how many were not.
#[test]
fn too_many_are_counted() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let (src, dst) = (TUNNELS[0].client.of(Family::V6), REMOTE.of(Family::V6));
    ping(&world.client, src, dst)?;
    let trace = Trace::start(&daemon, &["--json", "--rate", "20", "--from", "2a02:578:85a0::/48"])?;
    until("the programs tell", || tells(&world))?;
    let before = daemon.counters()?;
    let watch = [("remote", Watch::entering(&world.remote, TUNNELS[0].remote_device))];
    let flow = Flow::start(FlowOptions {
        from: &world.client,
        src,
        to: &world.remote,
        dst,
        rate: 5000,
        payload: 64,
        watch: &watch,
    })?;
    flow.wait_for("remote", SystemTime::now() + Duration::from_secs(1), SOON)?;
    flow.stop()?;
    let forwarded = daemon.counters()?.packets("tunnel0", "forwarded")? - before.packets("tunnel0", "forwarded")?;
    let sum = || -> Result<(u64, u64)> {
        let lines = trace.json()?;
        let omitted: Vec<u64> = lines.iter().filter_map(|line| line["omitted"].as_u64()).collect();
        Ok(((lines.len() - omitted.len()) as u64, omitted.iter().sum()))
    };
    until("all are accounted for", || sum().map(|(told, omitted)| told + omitted >= forwarded))?;
    let (told, omitted) = sum()?;
    ensure!(told + omitted == forwarded && told > 0 && omitted > told, "{told} + {omitted} of {forwarded}");
    Ok(())
}

#[test]
fn without_programs_there_is_nothing_to_show() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let options = DaemonOptions { datapath: Some("kernel"), ..DaemonOptions::default() };
    let daemon = Daemon::start(&world, &world.config(), &options)?;
    let refused = daemon.client(&["trace"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(1) && said.contains("no program runs; \"shadow\""), "{said}");
    let refused = daemon.client(&["trace", "--from", "10.0.0.1", "--to", "2001:db8::1"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(said.contains("no packet goes from IPv4 to IPv6"), "{said}");
    Ok(())
}
