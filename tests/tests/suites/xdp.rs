//! Decided before there is an skb: who takes part, that frames arrive as they should, and that nothing else changes. Before
//! Linux 6.5 nobody takes part, as the first test sees, and there is nothing more to see.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Flow, FlowOptions, ForeignProgram, Seen, TUNNELS, TunnelKind, TunnelPlan, Watch,
    World, bulk,
    inject::udp,
    offload::{AS_ON_A_WIRE, switch},
    pace::{SOON, until},
    ping,
    plan::REMOTE,
    snapshot::can_use_xdp,
    traffic::{self, Answer},
};

const PORT: u16 = 9;
const PACKETS: u64 = 20;
const BULK: usize = 1 << 20;

fn start<'a>(world: &'a World, datapath: &'static str, more: &str) -> Result<Daemon<'a>> {
    let options = DaemonOptions { datapath: Some(datapath), ..DaemonOptions::default() };
    Daemon::start(world, &format!("{more}\n{}", world.config()), &options)
}

/// Why a device does not take part; null if it does.
fn because(status: &Value, role: &str, device: &str) -> Option<Value> {
    let devices = status["fast_path"]["xdp"].as_array()?;
    let found = devices.iter().find(|candidate| candidate["role"] == role && candidate["device"] == device)?;
    Some(found["because"].clone())
}

fn attached(status: &Value) -> bool {
    status["fast_path"]["attached"].as_array().is_some_and(|all| all.contains(&json!("xdp ingress dev lan0")))
}

/// Sends packets from the client by a tunnel, which arrive at the far end one hop later as they were sent. Returns how many
/// of them were seen leaving the host: those that XDP hands on are not.
fn send(world: &World, family: Family, tunnel: usize) -> Result<usize> {
    let plan = &TUNNELS[tunnel];
    let (src, dst) = (plan.client.of(family), REMOTE.of(family));
    let (mut host, mut remote) =
        (Capture::on(&world.host, plan.device)?, Capture::on(&world.remote, plan.remote_device)?);
    let mut broker = Capture::on(&world.brokers[tunnel], plan.device)?;
    let injector = world.client_injector()?;
    for number in 0..PACKETS {
        let payload = number.to_be_bytes();
        injector.send(&udp(SocketAddr::new(src, 7000), SocketAddr::new(dst, PORT), 64, &payload)?)?;
    }
    let (near, far) = world.macs(tunnel).context("no Ethernet device")?;
    for number in 0..PACKETS {
        let is_it = |seen: &Seen| !seen.left() && seen.is(src, dst) && seen.payload == number.to_be_bytes();
        let seen = remote.wait_for(is_it, SOON)?;
        // The host takes one, and the broker another.
        ensure!(seen.hop_limit == Some(62) && seen.checksum_ok, "{seen}");
        let framed = broker.wait_for(is_it, SOON)?;
        let eth = framed.eth.as_ref().context("no Ethernet header")?;
        ensure!((eth.source, eth.destination) == (near.0, far.0), "{framed}");
    }
    Ok(host.drain()?.into_iter().filter(|seen| seen.left() && seen.is(src, dst)).count())
}

#[test]
fn frames_are_handed_on_without_an_skb() -> Result<()> {
    for datapath in ["both", "ebpf", "shadow"] {
        let world = World::with(TunnelKind::Veth).build()?;
        world.as_on_a_wire()?;
        // On one ingress device: the first tunnel takes frames, the second one does not.
        switch(&world.brokers[1], TUNNELS[1].device, &[("rx-gro", false)])?;
        let daemon = start(&world, datapath, "xdp = \"on\"")?;
        let status = daemon.status()?;
        if can_use_xdp() {
            ensure!(attached(&status), "{datapath}: {status:#}");
        } else {
            ensure!(!attached(&status), "{datapath}: {status:#}");
            assert_eq!(because(&status, "ingress", "lan0"), Some(json!("it takes Linux 6.5")), "{datapath}");
        }
        for family in Family::ALL {
            for (tunnel, plan) in TUNNELS.iter().enumerate() {
                let (src, dst) = (plan.client.of(family), REMOTE.of(family));
                assert_eq!(ping(&world.client, src, dst)?, Answer::Reply, "{datapath}, {family}, {tunnel}");
                let before = daemon.counters()?;
                let seen = send(&world, family, tunnel)?;
                let early = tunnel == 0 && datapath != "shadow" && can_use_xdp();
                assert_eq!(seen == 0, early, "{datapath}, {family}, {tunnel}: {seen} seen leaving");
                let policy = format!("tunnel{tunnel}");
                let since = daemon.counters()?.since(&before);
                let expected = ((policy, "forwarded".to_owned()), PACKETS);
                assert_eq!(since.into_iter().collect::<Vec<_>>(), [expected], "{datapath}, {family}, {tunnel}");
                // Without rules nobody tells the client of the tunnel's MTU.
                if datapath != "ebpf" {
                    let carried = bulk((&world.client, src), (&world.remote, dst), BULK, SOON);
                    carried.with_context(|| format!("{datapath}, {family}, {tunnel}: TCP"))?;
                }

                let said = daemon.client(&["explain", "--json", &src.to_string(), &dst.to_string()])?;
                let said: Value = serde_json::from_slice(&said.stdout)?;
                assert_eq!(said["program"]["xdp"], json!(early), "{datapath}, {family}, {tunnel}: {said:#}");
            }
        }
        if datapath != "ebpf" {
            let verified = daemon.client(&["verify"])?;
            ensure!(verified.status.success(), "{datapath}: {}", String::from_utf8_lossy(&verified.stdout));
        }
    }
    Ok(())
}

/// What keeps a device from taking part, in the words of `status`.
const NO_GRO: &str = "it takes no frames from XDP";
const QUEUE: &str = "its queue, pfifo, would be";
const FILTERS: &str = "programs or filters at its egress";
const PROGRAM: &str = "another XDP program";

/// What keeps a device from taking part is seen, told, and seen again when it is gone. Packets are forwarded all the while.
#[test]
fn devices_take_part_as_long_as_nothing_is_passed_over() -> Result<()> {
    if !can_use_xdp() {
        return Ok(());
    }
    let world = World::with(TunnelKind::Veth).build()?;
    world.as_on_a_wire()?;
    let daemon = start(&world, "both", "xdp = \"on\"")?;
    let tunnel = TUNNELS[0].device;
    // A program of somebody else's, as long as it is there.
    let mut foreign = None;
    let mut change = |what: &str, there: bool| -> Result<()> {
        let verb = if there { "add" } else { "del" };
        match what {
            NO_GRO => switch(&world.brokers[0], tunnel, &[("rx-gro", !there)]),
            QUEUE => world.host.query("tc", &format!("qdisc {verb} dev {tunnel} root pfifo")).map(drop),
            FILTERS => {
                foreign = there.then(|| ForeignProgram::attach(&world.host, tunnel, false)).transpose()?;
                Ok(())
            }
            _ => {
                // A device has room for one program.
                daemon.write_config(&format!("xdp = \"off\"\n{}", world.config()))?;
                daemon.reload()?;
                // The kernel lets go of the daemon's a moment after its pin.
                let free = || Ok(!world.host.query("ip", "link show dev lan0")?.contains(" xdp "));
                if there {
                    until("lan0 has no program", free)?;
                }
                foreign = there.then(|| ForeignProgram::attach_xdp(&world.host, "lan0")).transpose()?;
                daemon.write_config(&format!("xdp = \"on\"\n{}", world.config()))?;
                daemon.reload()
            }
        }
    };
    let (src, dst) = (TUNNELS[0].client.v6.into(), REMOTE.v6.into());
    let works = |what: &str| -> Result<()> {
        ensure!(ping(&world.client, src, dst)? == Answer::Reply, "{what}");
        Ok(())
    };
    works("at first")?;
    for words in [NO_GRO, QUEUE, FILTERS, PROGRAM] {
        let (role, device) = if words == PROGRAM { ("ingress", "lan0") } else { ("tunnel", tunnel) };
        change(words, true)?;
        let told = |status: &Value| {
            because(status, role, device).is_some_and(|text| text.as_str().is_some_and(|text| text.contains(words)))
        };
        daemon.wait_status(told, SOON).with_context(|| words.to_owned())?;
        works(words)?;
        if role == "tunnel" {
            ensure!(send(&world, Family::V6, 0)? > 0, "{words}: passed over");
        }
        change(words, false)?;
        let well = |status: &Value| because(status, role, device) == Some(Value::Null) && attached(status);
        daemon.wait_status(well, SOON).with_context(|| format!("no longer: {words}"))?;
        works(&format!("after: {words}"))?;
        assert_eq!(send(&world, Family::V6, 0)?, 0, "after: {words}");
    }
    let shown = String::from_utf8(daemon.client(&["status"])?.stdout)?;
    ensure!(
        shown.contains("xdp: ingress lan0 used") && shown.lines().all(|line| line.chars().count() <= 80),
        "{shown}"
    );

    // Without being asked to, nothing is done that could break a checksum; and `off` is off.
    for (xdp, reason) in [("auto", Some("its other end is in another namespace")), ("off", None)] {
        daemon.write_config(&format!("xdp = \"{xdp}\"\n{}", world.config()))?;
        daemon.reload()?;
        let status = daemon.status()?;
        let said = because(&status, "ingress", "lan0");
        let as_expected = match reason {
            Some(reason) => {
                said.as_ref().is_some_and(|said| said.as_str().is_some_and(|said| said.starts_with(reason)))
            }
            None => said.is_none(),
        };
        ensure!(as_expected && !attached(&status), "{xdp}: {status:#}");
        works(xdp)?;
    }
    // What limits segment sizes stands where XDP does not pass.
    let limited = world.config().replacen("[tunnel.sixxs0]", "[tunnel.sixxs0]\nmss = \"auto\"", 1);
    daemon.write_config(&format!("xdp = \"on\"\n{limited}"))?;
    daemon.reload()?;
    let said = because(&daemon.status()?, "tunnel", tunnel);
    ensure!(said.as_ref().is_some_and(|said| said.as_str().is_some_and(|said| said.contains("mss"))), "{said:?}");
    Ok(())
}

/// With both ends of the pair in sight, `auto` takes part exactly where frames are whole.
#[test]
fn the_other_end_is_looked_at_where_it_can_be() -> Result<()> {
    if !can_use_xdp() {
        return Ok(());
    }
    let world = World::with(TunnelKind::Veth).build()?;
    world.as_on_a_wire()?;
    world.host.ip("link add lan9 type veth peer name peer9\nlink set lan9 up\nlink set peer9 up\n\
         tuntap add dev tap9 mode tap\ntuntap add dev tun9 mode tun")?;
    let config = world.config().replacen("ingress = [", "ingress = [\"lan9\", ", 1);
    let config = format!("{config}\n[tunnel.tap9]\n[tunnel.tun9]\n");
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let said = because(&daemon.status()?, "ingress", "lan9");
    ensure!(
        said.as_ref().is_some_and(|said| said.as_str().is_some_and(|said| said.contains("PEER tx off"))),
        "{said:?}"
    );
    switch(&world.host, "peer9", &AS_ON_A_WIRE)?;
    daemon.wait_status(|status| because(status, "ingress", "lan9") == Some(Value::Null), SOON)?;
    let status = daemon.status()?;
    // A device that takes Ethernet frames takes them from XDP, too, and one that takes bare packets does not.
    assert_eq!(because(&status, "tunnel", "tap9"), Some(Value::Null), "{status:#}");
    let said = because(&status, "tunnel", "tun9");
    ensure!(said.as_ref().is_some_and(|said| said.as_str().is_some_and(|said| said.contains("takes no"))), "{said:?}");
    let attached = status["fast_path"]["attached"].to_string();
    ensure!(attached.contains("xdp ingress dev lan9") && !attached.contains("xdp ingress dev lan0"), "{attached}");
    Ok(())
}

/// The kernel never sees the frames, so it would not ask whether the neighbour is still there: the daemon has it ask. A
/// broker with another address is found.
#[test]
fn a_neighbour_that_has_changed_is_found() -> Result<()> {
    if !can_use_xdp() {
        return Ok(());
    }
    let world = World::with(TunnelKind::Veth).build()?;
    world.as_on_a_wire()?;
    let device = TUNNELS[0].device;
    for family in ["ipv4", "ipv6"] {
        let neigh = |name: &str| format!("{family}/neigh/{device}/{name}");
        world.host.sysctl(&[
            (&neigh("base_reachable_time_ms"), "1000"),
            (&neigh("delay_first_probe_time"), "1"),
            (&neigh("retrans_time_ms"), "50"),
        ])?;
    }
    let _daemon = start(&world, "both", "xdp = \"on\"")?;
    for family in Family::ALL {
        let (src, dst): (IpAddr, IpAddr) = (TUNNELS[0].client.of(family), TUNNELS[0].gateway.of(family));
        // The address has changed for the other family already, so the first packets may still go to the old one.
        traffic::reach(&world.client, src, dst)?;
        let watch =
            [("leaving", Watch::leaving(&world.host, device)), ("far", Watch::entering(&world.brokers[0], device))];
        let (from, to) = (&world.client, &world.brokers[0]);
        let flow = Flow::start(FlowOptions { from, src, to, dst, rate: 1000, payload: 64, watch: &watch })?;
        flow.wait_for("far", SystemTime::now(), SOON)?;
        std::thread::sleep(Duration::from_secs(3));
        let since = SystemTime::now();
        flow.wait_for_many("far", since, 100).with_context(|| format!("{family}: not carried"))?;
        assert_eq!(flow.count_since("leaving", since), 0, "{family}: not by XDP");

        let last = if family == Family::V4 { "04" } else { "06" };
        world.brokers[0].ip(&format!("link set {device} address 02:00:00:0b:0b:{last}"))?;
        let changed = SystemTime::now();
        // To the old address it goes on for a while; what answers is the new one.
        let mut capture = Capture::on(&world.brokers[0], device)?;
        let to_new = |seen: &Seen| {
            seen.is(src, dst) && seen.eth.as_ref().is_some_and(|eth| eth.destination[3..5] == [0x0b, 0x0b])
        };
        capture.wait_for(to_new, SOON).with_context(|| format!("{family}: still the old one"))?;
        println!("{family}: found after {:.1?}", changed.elapsed()?);
        flow.stop()?;
    }
    Ok(())
}

/// Whose address is asked for and who sends the frame is one device, also where somebody has changed the table and the
/// daemon has not seen it yet: such packets take the way behind.
#[test]
fn a_table_that_says_otherwise_is_not_believed() -> Result<()> {
    if !can_use_xdp() {
        return Ok(());
    }
    let world = World::with(TunnelKind::Veth).build()?;
    world.as_on_a_wire()?;
    let daemon = start(&world, "both", "xdp = \"on\"")?;
    for family in Family::ALL {
        // Both neighbours are known.
        for plan in &TUNNELS {
            let (src, dst) = (plan.client.of(family), REMOTE.of(family));
            ensure!(ping(&world.client, src, dst)? == Answer::Reply, "{family} by {}", plan.device);
        }
        assert_eq!(send(&world, family, 0)?, 0, "{family}: not by XDP");
    }
    daemon.freeze()?;
    for (family, option) in [(Family::V4, "-4"), (Family::V6, "-6")] {
        let TunnelPlan { device, gateway, .. } = TUNNELS[1];
        let gateway = gateway.of(family);
        world.host.ip(&format!("{option} route replace default via {gateway} dev {device} onlink table 20000"))?;
    }
    // What has been asked before is believed a little longer.
    std::thread::sleep(Duration::from_millis(100));
    for family in Family::ALL {
        let seen = send(&world, family, 0)?;
        assert_eq!(seen as u64, PACKETS, "{family}: by XDP, to the other tunnel's neighbour");
    }
    daemon.signal(Signal::SIGCONT)
}
