//! The kernel's own tunnel devices, and VRFs: what not every kernel has. Each is asked for first; the tests of a device that
//! is not there are reported as ignored. `cargo xtask test --vm` runs them on kernels that have them.

#[path = "suites/cells/mod.rs"]
mod cells;

use std::{
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Seen, TUNNELS, TunnelKind, World, inject::udp, pace::SOON, ping, plan::REMOTE,
    traffic::Answer, tunnel::is_available,
};

use crate::cells::{Mode, matrix};

/// Long enough for a frame that must not come.
const A_WHILE: Duration = Duration::from_millis(40);

fn main() -> Result<ExitCode> {
    let mut trials = Vec::new();
    for kind in TunnelKind::OPTIONAL {
        let name = kind.name();
        trials.push(trial(name, "carries", move || matrix(kind))?);
        trials.push(trial(name, "too_big", move || too_big(kind))?);
    }
    for kind in [TunnelKind::Sit, TunnelKind::Wireguard, TunnelKind::Netkit] {
        trials.push(trial(kind.name(), "enters_by", move || enters_by(kind))?);
    }
    trials.push(trial("vrf", "closes_the_fast_path", vrf_closes_the_fast_path)?);
    Ok(libtest_mimic::run(&Arguments::from_args(), trials).exit_code())
}

fn trial(device: &str, test: &str, run: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Trial> {
    let run = || run().map_err(|error| format!("{error:?}").into());
    Ok(Trial::test(format!("{device}::{test}"), run).with_ignored_flag(!is_available(device)?))
}

fn config(world: &World, mode: Mode) -> String {
    format!("datapath = \"{}\"\n{}", mode.name(), world.config())
}

/// A packet of the client that has this length.
fn packet(family: Family, length: usize) -> Result<Vec<u8>> {
    let header = if family == Family::V4 { 28 } else { 48 };
    let (src, dst) = (TUNNELS[0].client.of(family), REMOTE.of(family));
    udp(SocketAddr::new(src, 7000), SocketAddr::new(dst, 7001), 64, &vec![0x5a; length - header])
}

fn too_big_error(family: Family, seen: &Seen) -> bool {
    !seen.left() && seen.icmp == Some(if family == Family::V4 { (3, 4) } else { (2, 0) })
}

/// What is longer than the tunnel takes goes nowhere, and the sender is told: by the host; or, without rules, by the
/// device, where it is one that does, and the encapsulated packet does not fit the uplink either.
fn too_big(kind: TunnelKind) -> Result<()> {
    const MTU: usize = 1400;
    let world = World::with(kind).build()?;
    let device_answers = !matches!(kind, TunnelKind::Wireguard | TunnelKind::Netkit);
    let injector = world.client_injector()?;
    let mut client = Capture::on(&world.client, "lan0")?;
    let mut remote = Capture::everywhere(&world.remote)?;
    let daemon = Daemon::start(&world, &config(&world, Mode::Kernel), &DaemonOptions::default())?;
    for mode in Mode::ALL {
        daemon.write_config(&config(&world, mode))?;
        daemon.reload()?;
        for &family in kind.families() {
            let what = || format!("{}, {family}", mode.name());
            let src = TUNNELS[0].client.of(family);
            injector.send(&packet(family, MTU)?)?;
            remote.wait_for(|seen| !seen.left() && seen.src == Some(src), SOON).with_context(what)?;

            client.drain()?;
            let length = if mode == Mode::Ebpf { 1500 } else { MTU + 1 };
            let packet = packet(family, length)?;
            let send = || injector.send(&packet);
            if mode != Mode::Ebpf || device_answers {
                let (error, _) = client.wait_for_answer(send, |seen| too_big_error(family, seen)).with_context(what)?;
                // The last two bytes before the quoted packet, behind Ethernet and IP.
                let at = 14 + if family == Family::V4 { 20 } else { 40 } + 6;
                let told = error.raw.get(at..at + 2).and_then(|mtu| mtu.try_into().ok()).map(u16::from_be_bytes);
                let told = usize::from(told.with_context(what)?);
                let right = if mode == Mode::Ebpf { (MTU..1500).contains(&told) } else { told == MTU };
                ensure!(right, "{}: told an MTU of {told}", what());
            } else {
                send()?;
                client.ensure_none(|seen| too_big_error(family, seen), A_WHILE).with_context(what)?;
            }
            remote.ensure_none(|seen| seen.src == Some(src), A_WHILE).with_context(what)?;
        }
    }
    Ok(())
}

/// Packets that come out of one tunnel, from a source of the other's policy, leave by the other: the fast path sees them
/// behind the first device's decapsulation.
fn enters_by(kind: TunnelKind) -> Result<()> {
    let world = World::with(kind).build()?;
    let [first, second] = &TUNNELS;
    // A network behind broker 0 that has addresses of tunnel 1, and is reached by tunnel 0.
    let src = second.client.v6;
    world.host.ip(&format!("-6 route add {src}/128 dev {}", first.device))?;
    world.brokers[0].ip(&format!("-6 addr add {src}/128 dev lo nodad"))?;
    let own = world.config();
    // The device cannot be tunnel and ingress at once.
    let tunnel = format!("\n[tunnel.{}]\n", first.device);
    let policy = own.find("\n[[policy]]\nname = \"tunnel0\"").context("a policy of tunnel 0")?;
    let next = own.find("\n[[policy]]\nname = \"tunnel1\"").context("a policy of tunnel 1")?;
    let own = format!("{}{}", &own[..policy], &own[next..]).replace(&tunnel, "");
    let own = own.replace("ingress = [\"lan0\"]", &format!("ingress = [\"{}\"]", first.device));
    let daemon = Daemon::start(&world, &own, &DaemonOptions::default())?;
    let mut far = Capture::on(&world.brokers[1], second.device)?;
    let before = daemon.counters()?;
    let dst = REMOTE.v6;
    world.brokers[0].ip(&format!(
        "-6 route add {dst}/128 dev {} table 70\n-6 rule add from {src} lookup 70 pref 70",
        first.device
    ))?;
    let answer = ping(&world.brokers[0], src.into(), dst.into())?;
    // The answer comes by tunnel 1, and is routed on to tunnel 0.
    ensure!(answer == Answer::Reply, "{answer:?}; {}", daemon.log());
    let seen = far.wait_for(|seen| !seen.left() && seen.is(src.into(), dst.into()), SOON)?;
    ensure!(seen.hop_limit == Some(63) && seen.checksum_ok, "{seen}");
    let since = daemon.counters()?.since(&before);
    ensure!(since == [(("tunnel1".to_owned(), "forwarded".to_owned()), 1)].into(), "the fast path counted {since:?}");
    Ok(())
}

/// The table of a VRF is asked before the policies, so the fast path must not decide what enters by one of its ports.
fn vrf_closes_the_fast_path() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    world.host.ip("link add vrf0 type vrf table 900\nlink set vrf0 up")?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let injector = world.client_injector()?;
    let mut broker = Capture::on(&world.brokers[0], TUNNELS[0].device)?;
    for enslaved in [false, true, false] {
        world.host.ip(&format!("link set lan0 {}", if enslaved { "master vrf0" } else { "nomaster" }))?;
        let carrier = if enslaved { "kernel" } else { "fast path" };
        let is_carried = |status: &serde_json::Value| {
            ["v4", "v6"].iter().all(|family| status["policies"][0]["carried_by"][family] == carrier)
        };
        let status = daemon.wait_status(is_carried, SOON)?;
        let reasons = status["fast_path"]["reasons"].to_string();
        for word in ["lan0 belongs to a VRF", "ip link set lan0 nomaster"] {
            ensure!(reasons.contains(word) == enslaved, "enslaved: {enslaved}: {reasons}");
        }
        for family in Family::ALL {
            let before = daemon.counters()?;
            let sent = SystemTime::now();
            injector.send(&packet(family, 100)?)?;
            // Where the VRF has no route, the kernel goes on to the policies.
            let src = TUNNELS[0].client.of(family);
            let seen = broker.wait_for(|seen| !seen.left() && seen.src == Some(src), SOON)?;
            ensure!(seen.at >= sent, "a packet of before");
            let since = daemon.counters()?.since(&before);
            let forwarded = since.contains_key(&("tunnel0".to_owned(), "forwarded".to_owned()));
            ensure!(forwarded != enslaved, "enslaved: {enslaved}, {family}: the fast path counted {since:?}");
        }
    }
    Ok(())
}
