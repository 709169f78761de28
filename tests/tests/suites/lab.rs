//! The lab itself: what it shows without tunroute, and that it leaves nothing behind.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use etherparse::IpNumber;
use nix::{
    mount::{MsFlags, mount},
    sys::signal::Signal,
};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Direction, Flow, FlowOptions, Injector, Lab, Seen, Share, TUNNELS, TunOptions,
    TunPair, TunnelKind, Watch, World, bulk,
    inject::{echo_request, tcp_syn, udp},
    lab::remove_stale,
    pace::{SOON, until},
    ping, ping_briefly,
    plan::{PLAIN_CLIENT, REMOTE},
    traffic::Answer,
};

/// Long enough for a frame that must not come.
const A_WHILE: Duration = Duration::from_millis(50);

/// The hand-made cure of the story, for both tunnels, families and client prefixes.
fn cure(world: &World) -> Result<()> {
    let mut rules = String::new();
    for (index, plan) in TUNNELS.iter().enumerate() {
        for family in Family::ALL {
            let (version, table) = (version(family), 200 + index);
            for from in [plan.host.of(family).to_string(), plan.prefix.of(family).to_string()] {
                // What lies in the client network is not for the tunnel.
                rules += &format!("{version} rule add from {from} lookup main suppress_prefixlength 0 pref 999\n");
                rules += &format!("{version} rule add from {from} lookup {table} pref 1000\n");
            }
        }
        cure_routes(world, index)?;
    }
    world.host.ip(&rules)
}

/// The part of the cure that goes with the device.
fn cure_routes(world: &World, index: usize) -> Result<()> {
    let plan = &TUNNELS[index];
    let mut routes = String::new();
    for family in Family::ALL {
        let via = if world.kind().needs_gateway() {
            format!("via {} onlink", plan.gateway.of(family))
        } else {
            String::new()
        };
        let (version, table) = (version(family), 200 + index);
        routes += &format!("{version} route add default {via} dev {} table {table}\n", plan.device);
    }
    world.host.ip(&routes)
}

fn version(family: Family) -> &'static str {
    if family == Family::V4 { "-4" } else { "-6" }
}

fn leaves(seen: &Seen, device: &str, src: IpAddr) -> bool {
    seen.direction == Direction::Out && seen.device == device && seen.src == Some(src)
}

#[test]
fn without_a_cure_nobody_can_ping_the_tunnels_and_the_isp_drops_the_replies() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let mut isp = Capture::everywhere(&world.isp)?;
    for family in Family::ALL {
        let remote = REMOTE.of(family);
        for plan in &TUNNELS {
            let tunnel = plan.host.of(family);
            assert_eq!(ping_briefly(&world.remote, remote, tunnel)?, Answer::Silence, "remote > {tunnel}");
            let reply = isp.wait_for(|seen| seen.is(tunnel, remote), SOON)?;
            assert_eq!((reply.device.as_str(), reply.direction), ("net0", Direction::In), "{reply}");
            isp.ensure_none(|seen| seen.left() && seen.src == Some(tunnel), A_WHILE)?;
            let answer = ping_briefly(&world.client, plan.client.of(family), remote)?;
            assert_eq!(answer, Answer::Silence, "client's {family}");
        }
        // The ISP's own addresses are served.
        assert_eq!(ping(&world.client, PLAIN_CLIENT.of(family), remote)?, Answer::Reply, "{family}");
        assert_eq!(ping(&world.remote, remote, PLAIN_CLIENT.of(family))?, Answer::Reply, "{family}");
    }
    Ok(())
}

#[test]
fn with_the_cure_every_source_leaves_by_its_tunnel_whatever_that_is_made_of() -> Result<()> {
    for kind in TunnelKind::ALL {
        let world = World::with(kind).build()?;
        cure(&world)?;
        let mut host = Capture::everywhere(&world.host)?;
        let mut remote_side = Capture::everywhere(&world.remote)?;
        for family in Family::ALL {
            let remote = REMOTE.of(family);
            for plan in &TUNNELS {
                for (netns, addr) in [(&world.host, plan.host.of(family)), (&world.client, plan.client.of(family))] {
                    let what = format!("{kind:?}, {addr}");
                    assert_eq!(ping(netns, addr, remote)?, Answer::Reply, "{what} > remote");
                    assert_eq!(ping(&world.remote, remote, addr)?, Answer::Reply, "remote > {what}");
                    let sent = host.drain()?;
                    ensure!(sent.iter().any(|seen| leaves(seen, plan.device, addr)), "{what} left by {sent:?}");
                    ensure!(!sent.iter().any(|seen| leaves(seen, "net0", addr)), "{what} leaked: {sent:?}");
                    let arrived = remote_side.drain()?;
                    let arrived: Vec<&Seen> =
                        arrived.iter().filter(|seen| !seen.left() && seen.is(addr, remote)).collect();
                    assert_eq!(arrived.len(), 2, "{what}: {arrived:?}");
                    ensure!(
                        arrived.iter().all(|seen| seen.device == plan.remote_device && seen.checksum_ok),
                        "{what} arrived as {arrived:?}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_broker_drops_sources_that_are_not_its_tunnels() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    cure(&world)?;
    let mut broker = Capture::everywhere(&world.brokers[0])?;
    for family in Family::ALL {
        let wrong = TUNNELS[1].host.of(family);
        world.host.ip(&format!("{} rule add from {wrong} lookup 200 pref 1", version(family)))?;
        assert_eq!(ping_briefly(&world.host, wrong, REMOTE.of(family))?, Answer::Silence);
        broker.wait_for(|seen| !seen.left() && seen.src == Some(wrong), SOON)?;
        broker.ensure_none(|seen| seen.left() && seen.src == Some(wrong), A_WHILE)?;
    }
    Ok(())
}

#[test]
fn ping_tells_an_error_from_silence() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    cure(&world)?;
    for family in Family::ALL {
        let (client, remote) = (TUNNELS[0].client.of(family), REMOTE.of(family));
        assert_eq!(ping(&world.client, client, remote)?, Answer::Reply);
        world.host.ip(&format!("route replace unreachable {remote} table 200"))?;
        let answer = ping(&world.client, client, remote)?;
        assert!(matches!(&answer, Answer::Refused(text) if text.to_lowercase().contains("unreachable")), "{answer:?}");
        assert!(ping(&world.host, remote, remote).is_err(), "a source that the host does not have");
    }
    Ok(())
}

#[test]
fn injected_packets_arrive_with_what_they_were_given() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    cure(&world)?;
    let injector = world.client_injector()?;
    let mut remote_side = Capture::on(&world.remote, TUNNELS[0].remote_device)?;
    for family in Family::ALL {
        let (src, dst) = (TUNNELS[0].client.of(family), REMOTE.of(family));
        let (from, to) = (SocketAddr::new(src, 1000), SocketAddr::new(dst, 2000));
        let payload = vec![7; 1000];
        let packets = [
            (IpNumber::UDP, Some((1000, 2000)), &payload[..], udp(from, to, 9, &payload)?),
            (IpNumber::TCP, Some((1000, 2000)), &[][..], tcp_syn(from, to, 9)?),
            (
                if family == Family::V4 { IpNumber::ICMP } else { IpNumber::IPV6_ICMP },
                None,
                &payload[..],
                echo_request(src, dst, 9, 1, 2, &payload)?,
            ),
        ];
        for (protocol, ports, payload, packet) in packets {
            injector.send(&packet)?;
            let seen = remote_side.wait_for(|seen| seen.is(src, dst) && seen.protocol == Some(protocol), SOON)?;
            // Host and broker have each taken one.
            assert_eq!((seen.hop_limit, seen.ports, seen.payload.as_slice()), (Some(7), ports, payload), "{seen}");
            assert!(seen.checksum_ok && !seen.checksum_partial, "{seen}");
        }
    }
    Ok(())
}

#[test]
fn malformed_frames_arrive_as_they_were_sent() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let mut lan = Capture::on(&world.host, "lan0")?;
    let injector = world.client_injector()?;
    let packet = udp("10.0.0.2:1".parse()?, "198.18.0.1:2".parse()?, 64, b"marked")?;
    let mut short_header = packet.clone();
    short_header[0] = 0x44;
    let bad = [packet[..27].to_vec(), packet[..19].to_vec(), short_header, vec![0x60; 30], vec![0xff; 40]];
    for bytes in &bad {
        injector.send(bytes)?;
        // The Ethernet header is added, the bytes are not touched. Only the first has a whole IP header.
        let seen = lan.wait_for(|seen| seen.raw.get(14..) == Some(bytes), SOON)?;
        assert_eq!((seen.direction, seen.hop_limit), (Direction::In, (bytes.len() == 27).then_some(64)), "{seen}");
    }
    // A tag in the frame is taken off by the receiving kernel and stands beside it.
    let mut tagged = vec![0x02, 0, 0, 0, 1, 2, 0x02, 0, 0, 0, 1, 1, 0x81, 0x00, 0x00, 0x2a, 0x08, 0x00];
    tagged.extend_from_slice(&packet);
    injector.send_frame(&tagged)?;
    let seen = lan.wait_for(|seen| seen.payload == b"marked", SOON)?;
    assert!(seen.vlan_tci == Some(42) || seen.raw == tagged, "{seen:?}");
    // On a layer 3 device, too.
    let mut tunnel = Capture::on(&world.host, TUNNELS[0].device)?;
    // The tun driver itself refuses what is neither version 4 nor 6.
    for bytes in bad.iter().filter(|bytes| matches!(bytes[0] >> 4, 4 | 6)) {
        world.broker_injector(0)?.send(bytes)?;
        tunnel.wait_for(|seen| seen.raw == *bytes, SOON)?;
    }
    Ok(())
}

#[test]
fn a_tun_pair_carries_packets_up_to_its_mtu_and_survives_its_ends() -> Result<()> {
    let lab = Lab::new(Share::Others)?;
    let [a, b] = lab.netns(["a", "b"])?;
    let pair = TunPair::new((&a, "tun0"), (&b, "tun0"), TunOptions::default())?;
    a.ip("addr add 10.0.0.1/24 dev tun0")?;
    b.ip("addr add 10.0.0.2/24 dev tun0")?;
    let (src, dst) = ("10.0.0.1".parse()?, "10.0.0.2".parse()?);
    let mut there = Capture::on(&b, "tun0")?;
    let injector = Injector::layer3(&a, "tun0")?;
    let packet = |length: usize| echo_request(src, dst, 64, 1, 1, &vec![0x5a; length - 28]);
    injector.send(&packet(1400)?)?;
    let seen = there.wait_for(|seen| seen.raw.len() == 1400, SOON)?;
    assert_eq!(seen.raw, packet(1400)?, "{seen}");
    assert!(injector.send(&packet(1401)?).is_err(), "longer than the MTU");
    a.ip("link set tun0 down")?;
    assert!(injector.send(&packet(100)?).is_err(), "down");
    a.ip("link set tun0 up")?;
    assert_eq!(ping(&a, src, dst)?, Answer::Reply, "up again");
    b.ip("link set tun0 down")?;
    assert_eq!(ping_briefly(&a, src, dst)?, Answer::Silence, "the other end is down");
    b.ip("link set tun0 up")?;
    assert_eq!(ping(&a, src, dst)?, Answer::Reply, "the other end is up again");
    // Deleted under the pair: it must end, and the name must be free.
    a.ip("link del tun0")?;
    drop(pair);
    assert!(b.ifindex("tun0").is_err(), "both ends go with the pair");
    let _again = TunPair::new((&a, "tun0"), (&b, "tun0"), TunOptions::default())?;
    Ok(())
}

#[test]
fn bulk_tcp_goes_through_every_kind_of_tunnel_and_whole_gso_packets_where_told() -> Result<()> {
    for (world, gso) in [
        (World::with(TunnelKind::Tun), false),
        (World::with(TunnelKind::Tun).vnet_hdr(), true),
        (World::with(TunnelKind::Vxlan), true),
        (World::with(TunnelKind::Veth), true),
    ] {
        let world = world.build()?;
        cure(&world)?;
        for family in Family::ALL {
            let (src, dst) = (TUNNELS[1].client.of(family), REMOTE.of(family));
            let mut tunnel = Capture::on(&world.host, TUNNELS[1].device)?;
            bulk((&world.client, src), (&world.remote, dst), 2 << 20, SOON)?;
            let seen = tunnel.drain()?;
            let longest = seen.iter().filter(|seen| seen.left() && seen.is(src, dst)).map(|seen| seen.raw.len()).max();
            let what = format!("{:?} {family}: {longest:?} bytes at most", world.kind());
            assert_eq!(longest.context("nothing left by the tunnel")? > 4000, gso, "{what}");
            ensure!(seen.iter().all(|seen| seen.checksum_ok), "{what}: bad checksums");
        }
    }
    Ok(())
}

#[test]
fn bulk_fails_where_nothing_comes_through() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let remote = REMOTE.of(Family::V6);
    let from = (&world.client, TUNNELS[0].client.of(Family::V6));
    assert!(bulk(from, (&world.remote, remote), 1000, Duration::from_millis(300)).is_err());
    Ok(())
}

#[test]
fn a_flow_counts_what_arrives_and_notices_the_leak_of_the_story() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    cure(&world)?;
    let (src, dst) = (TUNNELS[0].client.of(Family::V6), REMOTE.of(Family::V6));
    assert_eq!(ping(&world.client, src, dst)?, Answer::Reply);
    let watch = [
        ("tunnel", Watch::leaving(&world.host, "sixxs0")),
        ("wrong tunnel", Watch::leaving(&world.host, "sixxs1")),
        ("uplink", Watch::leaving(&world.host, "net0")),
        ("remote", Watch::entering(&world.remote, "via-b0")),
    ];
    let options =
        FlowOptions { from: &world.client, src, to: &world.remote, dst, rate: 5000, payload: 64, watch: &watch };

    let flow = Flow::start(options)?;
    flow.wait_for_many("remote", SystemTime::UNIX_EPOCH, 1000)?;
    let report = flow.stop()?;
    eprintln!("{:.0} packets/s of {} asked for", report.rate(), options.rate);
    for place in ["tunnel", "remote"] {
        assert_eq!((report.lost(&[place]), report.duplicated(&[place])), (0, 0), "{place}");
    }
    assert_eq!((report.count("uplink"), report.count("wrong tunnel")), (0, 0));
    // Each was seen at two places.
    assert_eq!(report.duplicated(&["tunnel", "remote"]) as u64, report.sent);
    assert_eq!(report.lost(&["uplink"]), report.sent);

    // A tunnel that goes down empties its table, and the sources fall through to the uplink.
    let flow = Flow::start(options)?;
    flow.wait_for("remote", SystemTime::UNIX_EPOCH, SOON)?;
    let down = SystemTime::now();
    world.set_tunnel(0, false)?;
    let leak = flow.wait_for("uplink", down, SOON)?;
    let report = flow.stop()?;
    assert!(leak.at >= down && report.count("uplink") > 0 && report.lost(&["remote"]) > 0, "{leak:?}");
    Ok(())
}

#[test]
fn a_tunnel_can_come_late_go_and_come_again() -> Result<()> {
    for kind in TunnelKind::ALL {
        let mut world = World::with(kind).tunnels_present([false, true]).build()?;
        let (device, src, dst) = (TUNNELS[0].device, TUNNELS[0].host.of(Family::V6), REMOTE.of(Family::V6));
        assert!(world.host.ifindex(device).is_err(), "{kind:?}: late");
        for round in 0..2 {
            world.create_tunnel(0)?;
            if round == 0 {
                cure(&world)?
            } else {
                cure_routes(&world, 0)?
            }
            assert_eq!(ping(&world.host, src, dst)?, Answer::Reply, "{kind:?}, round {round}");
            world.set_tunnel(0, false)?;
            world.set_tunnel(0, true)?;
            let addrs = world.host.query("ip", &format!("-6 addr show dev {device}"))?;
            assert!(addrs.contains(&format!("{src}/128")), "{kind:?}: the address stays");
            // The story again: after a flap nobody adds the route.
            assert_eq!(ping_briefly(&world.host, src, dst)?, Answer::Silence, "{kind:?}, round {round}");
            cure_routes(&world, 0)?;
            assert_eq!(ping(&world.host, src, dst)?, Answer::Reply, "{kind:?}, round {round}");
            world.delete_tunnel(0)?;
            world.delete_tunnel(0)?;
            assert!(world.host.ifindex(device).is_err(), "{kind:?}: deleted");
        }
    }
    Ok(())
}

#[test]
fn programs_see_the_namespace_they_run_in() -> Result<()> {
    let lab = Lab::new(Share::Others)?;
    let [a, b] = lab.netns(["a", "b"])?;
    a.ip(&format!("link add only-a type veth peer name only-b netns {}", b.name()))?;
    assert_eq!(a.run("ls", &["/sys/class/net"])?, "lo\nonly-a\n");
    assert_eq!(b.run("ls", &["/sys/class/net"])?, "lo\nonly-b\n");
    assert!(a.run("cat", &["/proc/mounts"])?.contains("bpffs /sys/fs/bpf bpf"));
    assert!(!fs::read_to_string("/proc/mounts")?.contains(&lab.dir().display().to_string()));
    let error = a.run("ls", &["/nowhere"]).unwrap_err();
    assert!(format!("{error:#}").contains("/nowhere"), "{error:#}");
    let error = a.ip("link set lo up\nlink set nothing up\nlink set lo down").unwrap_err();
    assert!(format!("{error:#}").contains("link set nothing up: Cannot find device"), "{error:#}");
    Ok(())
}

#[test]
fn snapshots_show_every_change_and_nothing_else() -> Result<()> {
    let world = World::with(TunnelKind::Vxlan).build()?;
    let before = world.host.snapshot()?;
    // Traffic alone changes nothing.
    assert_eq!(ping(&world.client, PLAIN_CLIENT.of(Family::V6), REMOTE.of(Family::V6))?, Answer::Reply);
    before.ensure_same(&world.host.snapshot()?)?;
    let changes = [
        (
            "ip",
            "rule add from 10.0.0.0/16 lookup 200 pref 9",
            "rule del pref 9",
            "+ ip -4 rule: 9: from 10.0.0.0/16 lookup 200",
        ),
        (
            "ip",
            "-6 route add default dev net0 table 200",
            "-6 route del default table 200",
            "+ ip -6 route: unicast default dev net0 table 200",
        ),
        ("ip", "link set sixxs0 mtu 1300", "link set sixxs0 mtu 1400", "- ip link: "),
        ("ip", "addr add 10.9.0.77/32 dev lan0", "addr del 10.9.0.77/32 dev lan0", "+ ip -4 addr: "),
        ("tc", "qdisc add dev lan0 clsact", "qdisc del dev lan0 clsact", "+ tc qdisc: qdisc clsact"),
    ];
    for (program, change, undo, expected) in changes {
        world.host.query(program, change)?;
        let diff = before.diff(&world.host.snapshot()?);
        assert!(diff.contains(expected), "{change}:\n{diff}");
        world.host.query(program, undo)?;
        before.wait_same(|| world.host.snapshot()).with_context(|| format!("after {undo}"))?;
    }
    Ok(())
}

/// A stand-in for the binary, to test the handling and not the daemon.
const STAND_IN: &str = r#"#!/bin/sh
command=$1
while [ $# -gt 0 ]; do
    case $1 in
    --config) config=$2 ;;
    --runtime-dir) dir=$2 ;;
    --pin-dir) pins=$2 ;;
    esac
    shift
done
case $command in
run)
    grep -q refuse "$config" && { echo "bad config"; exit 2; }
    mkdir -p "$dir"
    touch "$pins/not-a-pin" 2>/dev/null || echo "pins go to a bpffs"
    trap 'echo reloaded' HUP
    trap 'rm -f "$dir/ready"; echo stopped; exit 0' TERM
    echo "started in $(ls /sys/class/net | tr '\n' ' ')"
    echo $$ >"$dir/ready"
    while :; do sleep 0.01; done ;;
status) test -e "$dir/ready" && echo '{"state": "'$(ls /sys/class/net | wc -l)'"}' ;;
reload) kill -HUP "$(cat "$dir/ready")" ;;
down) kill -TERM "$(cat "$dir/ready")" ;;
esac
"#;

#[test]
fn a_daemon_is_started_asked_and_ended_in_every_way() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let binary = world.dir().join("stand-in");
    fs::write(&binary, STAND_IN)?;
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755))?;
    let options = DaemonOptions { binary: Some(binary), ..DaemonOptions::default() };
    let mut daemon = Daemon::start(&world, &world.config(), &options)?;
    assert!(daemon.status()?["state"].is_string());
    assert!(daemon.log().contains("started in lan0 lo net0 sixxs0 sixxs1"), "{}", daemon.log());
    assert!(daemon.log().contains("pins go to a bpffs"), "{}", daemon.log());
    daemon.reload()?;
    daemon.wait_said(0, "reloaded")?;
    assert!(daemon.wait_status(|status| status["state"] == "never", A_WHILE).is_err());
    assert!(daemon.down()?.success());
    assert!(daemon.status().is_err(), "stopped");
    drop(daemon);

    let mut daemon = Daemon::start(&world, &world.config(), &options)?;
    assert!(daemon.terminate()?.success());
    let mut daemon = Daemon::start(&world, &world.config(), &options)?;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&daemon.kill9()?), Some(Signal::SIGKILL as i32));
    fs::remove_file(world.host.dir().join("run/ready"))?;
    let error = Daemon::start(&world, "refuse", &options).unwrap_err();
    assert!(format!("{error:#}").contains("bad config"), "{error:#}");
    Ok(())
}

/// What a lab of this name has left on the machine.
fn remains(id: &str) -> Result<Vec<String>> {
    let mut remains = Vec::new();
    for dir in [Path::new("/run/netns"), &std::env::temp_dir()] {
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!("{id}-")) {
                remains.push(name);
            }
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    remains.extend(mounts.lines().filter(|line| line.contains(&format!("/{id}-"))).map(str::to_owned));
    Ok(remains)
}

#[test]
fn nothing_is_left_after_a_world_even_if_its_test_panics() -> Result<()> {
    for panics in [false, true] {
        let (tell, told) = std::sync::mpsc::channel();
        let test = std::thread::spawn(move || {
            let world = World::with(TunnelKind::Tun).build().unwrap();
            // A process that detaches itself, as a tunnel client does.
            let script = "setsid sleep 20 >/dev/null 2>&1 & echo $!";
            let pid: i32 = world.host.run("sh", &["-c", script]).unwrap().trim().parse().unwrap();
            let id = world.host.name().strip_suffix("-host").unwrap().to_owned();
            assert!(Path::new(&format!("/proc/{pid}")).exists());
            assert!(remains(&id).unwrap().len() > 6, "the check itself finds things");
            tell.send((id, pid)).unwrap();
            assert!(!panics, "as a failing test does");
        });
        let (id, pid) = told.recv()?;
        assert_eq!(test.join().is_err(), panics);
        assert_eq!(remains(&id)?, Vec::<String>::new(), "panics: {panics}");
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "the process lives: {state}");
    }
    Ok(())
}

#[test]
fn what_a_dead_run_left_is_removed_and_what_lives_is_not() -> Result<()> {
    let live = Lab::new(Share::Others)?;
    let [_ns] = live.netns(["live"])?;
    let mut dead = Command::new("true").spawn()?;
    dead.wait()?;
    let id = format!("tr-{}-0", dead.id());
    let name = format!("{id}-host");
    assert!(Command::new("ip").args(["netns", "add", &name]).status()?.success());
    let mut orphan = Command::new("ip").args(["netns", "exec", &name, "sleep", "20"]).spawn()?;
    let bpf = std::env::temp_dir().join(format!("{id}-dir/host/bpf"));
    fs::create_dir_all(&bpf)?;
    mount(Some("bpffs"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>)?;
    // The program has entered the namespace when it is `sleep`.
    let comm = format!("/proc/{}/comm", orphan.id());
    until("ip netns exec starts sleep", || Ok(fs::read_to_string(&comm)? == "sleep\n"))?;
    assert_eq!(remains(&id)?.len(), 4, "a name and its mount, a directory and its mount");
    let failures = remove_stale();
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(remains(&id)?, Vec::<String>::new());
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&orphan.wait()?), Some(Signal::SIGKILL as i32));
    assert_eq!(remains(live.id())?.len(), 3, "a name and its mount, and a directory");
    Ok(())
}

#[test]
fn a_world_is_made_and_gone_quickly() -> Result<()> {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let started = Instant::now();
        drop(World::with(TunnelKind::Vxlan).build()?);
        best = best.min(started.elapsed());
    }
    eprintln!("made and gone in {best:?}");
    // Some hundred milliseconds on an idle machine. Hundreds of worlds are made in a run of all tests.
    assert!(best < Duration::from_secs(10), "{best:?}");
    Ok(())
}
