//! What a policy means for packets, in every state of the tunnels and every datapath, seen at the far end.
//!
//! Where `ebpf` differs, the tests say so: with no rules there is nobody to answer a packet that is too big for the
//! tunnel, or that has none; it is dropped at the uplink and counted.

mod inside;
mod odd_frames;
mod places;

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, End, Flow, FlowOptions, Injector, Mac, Netns, Seen, Sender, TUNNELS, TunnelKind,
    Watch, World,
    device::veth,
    pace::{SOON, patience, slowdown, until},
    ping,
    plan::{HOST, ISP, PLAIN_LAN, REMOTE},
    traffic::{self, Answer},
};

use self::places::{A_WHILE, Marks, Places, marked, packet};

/// How soon a change of the system has taken effect, on a busy machine too: the daemon is told of it, and does not come across
/// it when it looks at everything, twice a minute.
const FOLLOWED: Duration = Duration::from_secs(10);
const MODES: [&str; 3] = ["kernel", "both", "ebpf"];
/// The MTU of the tunnels.
const MTU: usize = 1400;

/// Runs the daemon in each mode, one after the other, with the same configuration.
fn in_each_mode(world: &World, config: &str, mut test: impl FnMut(&str, &Daemon<'_>) -> Result<()>) -> Result<()> {
    let with = |mode: &str| format!("datapath = \"{mode}\"\n{config}");
    let daemon = Daemon::start(world, &with("kernel"), &DaemonOptions::default())?;
    for mode in MODES {
        daemon.write_config(&with(mode))?;
        daemon.reload()?;
        test(mode, &daemon).with_context(|| format!("datapath {mode}"))?;
    }
    Ok(())
}

/// Sets a tunnel up or down and waits until the daemon has followed.
fn set_tunnel(world: &World, daemon: &Daemon<'_>, index: usize, up: bool) -> Result<()> {
    world.set_tunnel(index, up)?;
    let state = if up { "up" } else { "down" };
    daemon.wait_status(|status| status["tunnels"][index]["state"] == state, FOLLOWED).map(drop)
}

fn header(family: Family) -> usize {
    if family == Family::V4 { 20 } else { 40 }
}

fn neighbour_solicitation(src: Ipv6Addr, dst: Ipv6Addr) -> Result<Vec<u8>> {
    let kind = etherparse::Icmpv6Type::Unknown { type_u8: 135, code_u8: 0, bytes5to8: [0; 4] };
    let mut packet = Vec::new();
    PacketBuilder::ipv6(src.octets(), dst.octets(), 255).icmpv6(kind).write(&mut packet, &dst.octets())?;
    Ok(packet)
}

/// Sends a packet from the client until the host's ICMP error about it arrives there. Returns the error and how many times
/// the packet was sent.
fn refused(
    client: &mut Capture,
    injector: &Injector,
    family: Family,
    packet: &[u8],
    expected: (u8, u8),
) -> Result<(Seen, u64)> {
    // Addresses and ports: what comes before may change on the way.
    let (from, to) = if family == Family::V4 { (12, 24) } else { (8, 44) };
    let about = |seen: &Seen| seen.payload.get(from..to) == packet.get(from..to);
    let is_error = |seen: &Seen| !seen.left() && seen.icmp == Some(expected) && about(seen);
    let (seen, sent) = client.wait_for_answer(|| injector.send(packet), is_error)?;
    let host = [PLAIN_LAN, TUNNELS[0].lan, TUNNELS[1].lan, HOST].map(|addrs| addrs.of(family));
    ensure!(seen.src.is_some_and(|src| host.contains(&src)), "not from the host: {seen}");
    ensure!(seen.checksum_ok, "{seen}");
    Ok((seen, sent))
}

/// No ICMP error of the host comes to the client.
fn expect_no_error(client: &mut Capture, family: Family) -> Result<()> {
    let errors: &[u8] = if family == Family::V4 { &[3, 11, 12] } else { &[1, 2, 3, 4] };
    // `remote` complains that nobody listens there.
    let remote = Some(REMOTE.of(family));
    client.ensure_none(
        |seen| !seen.left() && seen.src != remote && seen.icmp.is_some_and(|(kind, _)| errors.contains(&kind)),
        A_WHILE,
    )
}

/// Clears "don't fragment" and makes the checksum right again.
fn without_df(mut packet: Vec<u8>) -> Vec<u8> {
    packet[6] &= !0x40;
    fix_checksum(&mut packet);
    packet
}

fn fix_checksum(packet: &mut [u8]) {
    let length = usize::from(packet[0] & 0xf) * 4;
    packet[10..12].fill(0);
    let mut sum: u32 = packet[..length].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[10..12].copy_from_slice(&(!u16::try_from(sum).unwrap_or(0)).to_be_bytes());
}

#[test]
fn an_expired_hop_limit_is_answered_by_the_host() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let (mut places, mut client) = (Places::watch(&world)?, Capture::on(&world.client, "lan0")?);
    let (injector, mut marks) = (world.client_injector()?, Marks(2000));
    in_each_mode(&world, &world.config(), |mode, daemon| {
        for family in Family::ALL {
            for hop_limit in [0, 1] {
                let mark = marks.next();
                let sent = packet(TUNNELS[0].client.of(family), REMOTE.of(family), hop_limit, mark, 64)?;
                let before = daemon.counters()?;
                let error = if family == Family::V4 { (11, 0) } else { (3, 0) };
                let (_, times) = refused(&mut client, &injector, family, &sent, error)
                    .with_context(|| format!("{family}, {hop_limit}"))?;
                places.expect(None, mark)?;
                let since = daemon.counters()?.since(&before);
                let expected = (mode != "kernel").then(|| (("tunnel0".to_owned(), "expired".to_owned()), times));
                assert_eq!(since, expected.into_iter().collect(), "{mode} {family} {hop_limit}");
            }
            // 2 is enough.
            let mark = marks.next();
            injector.send(&packet(TUNNELS[0].client.of(family), REMOTE.of(family), 2, mark, 64)?)?;
            places.expect(Some("sixxs0"), mark)?;
        }
        Ok(())
    })
}

#[test]
fn a_packet_too_big_is_answered_with_the_tunnels_mtu() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let (mut places, mut client) = (Places::watch(&world)?, Capture::on(&world.client, "lan0")?);
    let (injector, mut marks) = (world.client_injector()?, Marks(3000));
    in_each_mode(&world, &world.config(), |mode, daemon| {
        for family in Family::ALL {
            let (src, dst) = (TUNNELS[0].client.of(family), REMOTE.of(family));
            let room = MTU - header(family) - 8;
            let mark = marks.next();
            injector.send(&packet(src, dst, 64, mark, room)?)?;
            places.expect(Some("sixxs0"), mark).context("a packet that just fits")?;

            client.drain()?;
            let before = daemon.counters()?;
            let mark = marks.next();
            let sent = packet(src, dst, 64, mark, room + 1)?;
            if mode == "ebpf" {
                // Nobody is told: the limit of this mode.
                injector.send(&sent)?;
                expect_no_error(&mut client, family)?;
            } else {
                let kind = if family == Family::V4 { (3, 4) } else { (2, 0) };
                let (error, _) =
                    refused(&mut client, &injector, family, &sent, kind).with_context(|| format!("{family}"))?;
                // The last two bytes before the quoted packet, behind Ethernet and IP.
                let at = 14 + header(family) + 6;
                assert_eq!(error.raw.get(at..at + 2), Some(&[0x05, 0x78][..]), "the MTU of {error}");
            }
            places.expect(None, mark)?;
            let expected: &[&str] = match mode {
                "kernel" => &[],
                "both" => &["too_big"],
                _ => &["leak_prevented", "too_big"],
            };
            // At the uplink it may have to wait until the neighbour there is known.
            until(&format!("{expected:?} for {family}"), || {
                let since = daemon.counters()?.since(&before).into_keys().map(|(_, outcome)| outcome);
                Ok(since.eq(expected.iter().copied()))
            })?;

            // The host itself: a socket knows the tunnel's MTU from its route, where there are rules.
            let sender = Sender::open(&world.host, TUNNELS[0].host.of(family), None)?;
            sender.dont_fragment()?;
            let sent = sender.send(SocketAddr::new(dst, 9), &vec![0; room + 1]);
            let error = sent.as_ref().err().and_then(std::io::Error::raw_os_error);
            assert_eq!(error, (mode != "ebpf").then_some(libc::EMSGSIZE), "{mode} {family}");
            places.expect(None, sender.port()?)?;
        }
        // Without "don't fragment" the host fragments.
        let (src, dst) = (TUNNELS[0].client.v4, REMOTE.v4);
        let whole = without_df(packet(src.into(), dst.into(), 64, marks.next(), 1450)?);
        injector.send(&whole)?;
        let (_, broker) = &mut places.0[0];
        if mode == "ebpf" {
            return broker.ensure_none(|seen| seen.src == Some(src.into()), A_WHILE);
        }
        let fragments = [0, 1].map(|_| broker.wait_for(|seen| seen.src == Some(src.into()), SOON));
        let mut data = Vec::new();
        for fragment in fragments {
            let fragment = fragment?;
            ensure!(fragment.checksum_ok && fragment.raw.len() <= MTU, "{fragment}");
            let at = usize::from(u16::from_be_bytes([fragment.raw[6], fragment.raw[7]]) & 0x1fff) * 8;
            assert_eq!(at, data.len(), "the fragments come in order");
            data.extend_from_slice(&fragment.raw[20..]);
        }
        assert_eq!(data, whole[20..], "{mode}: reassembled");
        Ok(())
    })
}

#[test]
fn local_and_exempt_destinations_are_not_captured() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    // tunnel0 does not apply to `remote`; tunnel1 does.
    let exempt = format!("exempt = [\"connected\", \"{}/31\", \"{}/127\"]", REMOTE.v4, "2001:db8:ee::");
    let exempt = exempt.replace("198.18.0.1/31", "198.18.0.0/31");
    let config = world.config().replace("via = [\"sixxs0\"]\n", &format!("via = [\"sixxs0\"]\n{exempt}\n"));
    let (mut places, mut marks) = (Places::watch(&world)?, Marks(4000));
    let injector = world.client_injector()?;
    in_each_mode(&world, &config, |mode, daemon| {
        for family in Family::ALL {
            let before = daemon.counters()?;
            let client = TUNNELS[0].client.of(family);
            let own = [PLAIN_LAN, HOST, TUNNELS[0].lan, TUNNELS[1].lan, TUNNELS[0].host, TUNNELS[1].host];
            for dst in own.map(|addrs| addrs.of(family)) {
                assert_eq!(ping(&world.client, client, dst)?, Answer::Reply, "{mode}: the host's own {dst}");
            }
            let since = daemon.counters()?.since(&before);
            let outcomes: Vec<&str> = since.keys().map(|(_, outcome)| outcome.as_str()).collect();
            assert_eq!(outcomes, if mode == "kernel" { vec![] } else { vec!["exempt"] }, "{mode} {family}");

            for (tunnel, place) in [(0, "net0"), (1, "sixxs1")] {
                let mark = marks.next();
                injector.send(&packet(TUNNELS[tunnel].client.of(family), REMOTE.of(family), 64, mark, 64)?)?;
                places.expect(Some(place), mark).with_context(|| format!("{family}, client of tunnel {tunnel}"))?;
                let sender = Sender::open(&world.host, TUNNELS[tunnel].host.of(family), None)?;
                sender.send(SocketAddr::new(REMOTE.of(family), 9), b"exempt?")?;
                places.expect(Some(place), sender.port()?).with_context(|| format!("{family}, host, {tunnel}"))?;
            }
        }
        Ok(())
    })
}

#[test]
fn connected_follows_addresses_as_they_come_and_go() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let ends = [(&world.host, Mac([2, 0, 0, 0, 9, 1])), (&world.client, Mac([2, 0, 0, 0, 9, 2]))];
    let [a, b] = ends.map(|(netns, mac)| End { netns, device: "lan1", mac });
    veth(a, b, 1500)?;
    world.client.ip("addr add 172.16.5.2/24 dev lan1\naddr add 2001:db8:5::2/64 dev lan1 nodad")?;
    let neighbours: [IpAddr; 2] = ["172.16.5.2".parse()?, "2001:db8:5::2".parse()?];
    let (mut places, mut marks) = (Places::watch(&world)?, Marks(5000));
    let mut lan = Capture::on(&world.client, "lan1")?;
    let injector = world.client_injector()?;
    in_each_mode(&world, &world.config().replace("\"lan0\"", "\"lan*\""), |mode, _| {
        for dst in neighbours {
            let family = Family::of_addr(&dst);
            let send = |mark| injector.send(&packet(TUNNELS[0].client.of(family), dst, 64, mark, 64)?);
            let address = if family == Family::V4 { "172.16.5.1/24" } else { "2001:db8:5::1/64" };
            let nodad = if family == Family::V6 { "nodad" } else { "" };
            let mark = marks.next();
            send(mark)?;
            places.expect(Some("sixxs0"), mark).with_context(|| format!("{dst}, not connected yet"))?;
            for (command, connected) in [("add", true), ("del", false)] {
                let nodad = if connected { nodad } else { "" };
                world.host.ip(&format!("addr {command} {address} dev lan1 {nodad}"))?;
                // A packet each few milliseconds, until one takes the new way.
                let started = Instant::now();
                loop {
                    let mark = marks.next();
                    send(mark)?;
                    let there = |seen: &Seen| marked(seen, mark);
                    let found = if connected {
                        lan.wait_for(there, Duration::from_millis(20))
                    } else {
                        places.0[0].1.wait_for(there, Duration::from_millis(20))
                    };
                    if found.is_ok() {
                        break;
                    }
                    ensure!(started.elapsed() < patience(FOLLOWED), "{mode}: {dst}: addr {command} is not followed");
                }
                eprintln!("{mode}: addr {command} {address}: followed in {:?}", started.elapsed());
            }
        }
        Ok(())
    })
}

#[test]
fn a_policy_that_does_not_apply_leaves_it_to_the_next_shorter_prefix() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let config = r#"
        [interfaces]
        ingress = ["lan0"]
        uplink = ["net0"]
        [tunnel.sixxs0]
        [tunnel.sixxs1]
        [[policy]]
        name = "inner"
        from = ["10.0.0.0/30", "198.51.100.1", "2a02:578:85a0::/126", "2a02::1"]
        via = ["sixxs1"]
        on-down = "next"
        exempt = ["connected", "198.18.0.64/26", "2001:db8:ee:64::/64"]
        [[policy]]
        name = "outer"
        from = ["10.0.0.0/16", "198.51.100.0/24", "2a02:578:85a0::/48", "2a02::/127"]
        via = ["sixxs0"]
        exempt = ["connected", "198.18.0.96/27", "2001:db8:ee:64:1::/80"]
    "#;
    // Destinations that both policies apply to, only the outer one, and none.
    let destinations: [[IpAddr; 3]; 2] = [
        ["198.18.0.1".parse()?, "198.18.0.65".parse()?, "198.18.0.97".parse()?],
        ["2001:db8:ee::1".parse()?, "2001:db8:ee:64::1".parse()?, "2001:db8:ee:64:1::1".parse()?],
    ];
    // Which tunnels are up, and where packets to these go.
    let table = [
        ([true, true], [Some("sixxs1"), Some("sixxs0"), Some("net0")]),
        ([true, false], [Some("sixxs0"), Some("sixxs0"), Some("net0")]),
        ([false, false], [None, None, Some("net0")]),
        ([false, true], [Some("sixxs1"), None, Some("net0")]),
    ];
    let (mut places, mut marks) = (Places::watch(&world)?, Marks(6000));
    let injector = world.client_injector()?;
    in_each_mode(&world, config, |_, daemon| {
        for (up, expected) in table {
            for (tunnel, up) in up.into_iter().enumerate() {
                set_tunnel(&world, daemon, tunnel, up)?;
            }
            for (dst, place) in destinations.iter().flat_map(|family| family.iter().copied().zip(expected)) {
                let what = || format!("up {up:?}, to {dst}");
                let family = Family::of_addr(&dst);
                let mark = marks.next();
                injector.send(&packet(TUNNELS[0].client.of(family), dst, 64, mark, 64)?)?;
                places.expect(place, mark).with_context(|| format!("{}, from the client", what()))?;
                let sender = Sender::open(&world.host, TUNNELS[0].host.of(family), None)?;
                // With no tunnel the kernel may refuse it: what matters is where it goes.
                let sent = sender.send(SocketAddr::new(dst, 9), b"nested");
                ensure!(sent.is_ok() || place.is_none(), "{}, from the host: {sent:?}", what());
                places.expect(place, sender.port()?).with_context(|| format!("{}, from the host", what()))?;
            }
        }
        set_tunnel(&world, daemon, 0, true)
    })
}

#[test]
fn on_down_decides_what_becomes_of_packets_without_a_tunnel() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    // The ICMP error for each family, and the errno of a sender on the host.
    type Errors = [Option<(u8, u8)>; 2];
    let table: [(&str, Errors, Option<i32>, Option<&str>); 4] = [
        ("unreachable", [Some((3, 1)), Some((1, 0))], Some(libc::EHOSTUNREACH), None),
        ("prohibit", [Some((3, 13)), Some((1, 1))], Some(libc::EACCES), None),
        ("blackhole", [None, None], Some(libc::EINVAL), None),
        ("next", [None, None], None, Some("net0")),
    ];
    let (mut places, mut client) = (Places::watch(&world)?, Capture::on(&world.client, "lan0")?);
    let (injector, mut marks) = (world.client_injector()?, Marks(7000));
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    set_tunnel(&world, &daemon, 0, false)?;
    for mode in MODES {
        for (on_down, errors, errno, place) in table {
            let down = format!("via = [\"sixxs0\"]\non-down = \"{on_down}\"\n");
            let config = world.config().replace("via = [\"sixxs0\"]\n", &down);
            daemon.write_config(&format!("datapath = \"{mode}\"\n{config}"))?;
            daemon.reload()?;
            for (family, error) in Family::ALL.into_iter().zip(errors) {
                let what = format!("{mode}, {on_down}, {family}");
                let mark = marks.next();
                let sent = packet(TUNNELS[0].client.of(family), REMOTE.of(family), 64, mark, 64)?;
                client.drain()?;
                match error {
                    // With no rules nobody answers: the limit of this mode.
                    Some(error) if mode != "ebpf" => {
                        refused(&mut client, &injector, family, &sent, error).with_context(|| what.clone())?;
                    }
                    _ => {
                        injector.send(&sent)?;
                        expect_no_error(&mut client, family).with_context(|| what.clone())?;
                    }
                }
                places.expect(place, mark).with_context(|| what.clone())?;

                let sender = Sender::open(&world.host, TUNNELS[0].host.of(family), None)?;
                let sent = sender.send(SocketAddr::new(REMOTE.of(family), 9), b"down");
                let got = sent.err().and_then(|error| error.raw_os_error());
                assert_eq!(got, errno.filter(|_| mode != "ebpf"), "{what}: the host's own");
                places.expect(place, sender.port()?).with_context(|| format!("{what}: the host's own"))?;
            }
        }
    }
    Ok(())
}

/// Up, down, missing, flapping, made anew: under traffic from behind the host and from itself, in both families.
#[test]
fn nothing_ever_leaks_in_any_state_of_the_tunnels() -> Result<()> {
    for kind in [TunnelKind::Tun, TunnelKind::Veth] {
        for mode in MODES {
            let world = World::with(kind).tunnels_present([false, true]).build()?;
            let options = DaemonOptions { datapath: Some(mode), ..DaemonOptions::default() };
            let daemon = Daemon::start(&world, &world.config(), &options)?;
            let watch = [
                ("uplink", Watch::leaving(&world.host, "net0")),
                ("remote", Watch::entering(&world.remote, TUNNELS[0].remote_device)),
                ("wrong tunnel", Watch::leaving(&world.host, "sixxs1")),
            ];
            let flow = |from: &Netns, src: IpAddr| {
                let dst = REMOTE.of(Family::of_addr(&src));
                Flow::start(FlowOptions { from, src, to: &world.remote, dst, rate: 2000, payload: 64, watch: &watch })
            };
            // The host's own address is on the tunnel, and not there while that is missing.
            let mut flows = Vec::new();
            for family in Family::ALL {
                flows.push(("client", family, flow(&world.client, TUNNELS[0].client.of(family))?));
            }
            let arrives = |flows: &[(&str, Family, Flow)], what: &str| {
                let now = SystemTime::now();
                flows.iter().try_for_each(|(from, family, flow)| {
                    let arrival = flow.wait_for("remote", now, FOLLOWED);
                    arrival.map(drop).with_context(|| format!("{kind:?}, {mode}, {what}: {from} {family}"))
                })
            };
            world.set_present(0, true)?;
            for family in Family::ALL {
                flows.push(("host", family, flow(&world.host, TUNNELS[0].host.of(family))?));
            }
            arrives(&flows, "come late")?;
            set_tunnel(&world, &daemon, 0, false)?;
            set_tunnel(&world, &daemon, 0, true)?;
            arrives(&flows, "down and up")?;
            for _ in 0..10 {
                world.set_tunnel(0, false)?;
                world.set_tunnel(0, true)?;
            }
            arrives(&flows, "after flapping")?;
            for _ in 0..3 {
                world.set_present(0, true)?;
            }
            arrives(&flows, "made anew")?;
            for (from, family, flow) in flows {
                // Fewer are no test. A slow machine sends as much less.
                flow.wait_for_many("remote", SystemTime::UNIX_EPOCH, 100 / slowdown() as usize)?;
                let report = flow.stop()?;
                let counts = (report.count("uplink"), report.count("wrong tunnel"));
                assert_eq!(counts, (0, 0), "{kind:?}, {mode}: {from} {family} leaked");
            }
        }
    }
    Ok(())
}

/// A socket bound to the uplink passes by the rules: the program there catches it.
#[test]
fn a_socket_bound_to_the_uplink_does_not_leak() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let mut places = Places::watch(&world)?;
    for family in Family::ALL {
        // What goes to the ISP itself needs no route: its neighbour entry must be there.
        assert_eq!(ping(&world.host, HOST.of(family), ISP.of(family))?, Answer::Reply);
    }
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    for mode in ["both", "ebpf"] {
        daemon.write_config(&format!("datapath = \"{mode}\"\n{}", world.config()))?;
        daemon.reload()?;
        for up in [true, false, true] {
            set_tunnel(&world, &daemon, 0, up)?;
            for family in Family::ALL {
                for dst in [REMOTE.of(family), ISP.of(family)] {
                    let what = || format!("{mode}, up: {up}, to {dst}");
                    let sender = Sender::open(&world.host, TUNNELS[0].host.of(family), Some("net0"))?;
                    let before = daemon.counters()?;
                    let sent = sender.send(SocketAddr::new(dst, 9), b"bound");
                    // In `both` the rules may have refused it already.
                    let reached = daemon.counters()?.since(&before);
                    let diverted = reached.contains_key(&("tunnel0".to_owned(), "diverted".to_owned()));
                    ensure!(diverted == up || (mode == "both" && !diverted), "{}: {reached:?}, {sent:?}", what());
                    ensure!(mode == "both" || (sent.is_ok() && reached.len() == 1), "{}: {reached:?}", what());
                    places.expect(diverted.then_some("sixxs0"), sender.port()?).with_context(what)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn neighbour_discovery_link_local_and_multicast_traffic_is_left_alone() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let mut places = Places::watch(&world)?;
    let mut client = Capture::on(&world.client, "lan0")?;
    let (injector, mut marks) = (world.client_injector()?, Marks(8000));
    in_each_mode(&world, &world.config(), |mode, daemon| {
        for netns in [&world.client, &world.host, &world.brokers[0]] {
            for family in ["-4", "-6"] {
                netns.ip(&format!("{family} neigh flush all"))?;
            }
        }
        // From a policy's source: solicitations and their answers, and then the packet itself.
        for family in Family::ALL {
            let src = TUNNELS[0].client.of(family);
            for dst in [TUNNELS[0].lan.of(family), REMOTE.of(family)] {
                // In `ebpf` mode what comes before the gateway is known may be lost (docs/limits.md).
                traffic::reach(&world.client, src, dst).with_context(|| mode.to_owned())?;
            }
        }
        client.wait_for(|seen| !seen.left() && seen.icmp == Some((136, 0)), SOON).context("an advertisement")?;
        // The link-local address that `lan0` of the host has from its MAC address.
        world.client.run("ping", &["-n", "-c", "1", "-W", "30", "-I", "lan0", "fe80::ff:fe00:102"])?;
        world.host.run("ping", &["-n", "-c", "1", "-W", "30", "-I", "lan0", "fe80::ff:fe00:101"])?;
        let before = daemon.counters()?;
        for (src, dst, place) in [
            ("10.0.0.2", "255.255.255.255", None),
            ("10.0.0.2", "224.0.0.251", None),
            ("10.0.0.2", "127.0.0.1", None),
            ("2a02:578:85a0::2", "ff02::fb", None),
            ("2a02:578:85a0::2", "fe80::ff:fe00:102", None),
            ("2a02:578:85a0::2", "::1", None),
            ("fe80::ff:fe00:101", "2001:db8:ee::1", None),
            // These are special, too, but Linux forwards to them.
            ("10.0.0.2", "169.254.1.1", Some("sixxs0")),
            ("10.0.0.2", "240.0.0.1", Some("sixxs0")),
        ] {
            let mark = marks.next();
            injector.send(&packet(src.parse()?, dst.parse()?, 64, mark, 64)?)?;
            places.expect(place, mark).with_context(|| format!("{src} > {dst}"))?;
        }
        let since: Vec<_> = daemon.counters()?.since(&before).into_iter().collect();
        let diverted = (("tunnel0".to_owned(), "diverted".to_owned()), 2);
        assert_eq!(since, if mode == "ebpf" { vec![diverted] } else { vec![] }, "{mode}");
        // What looks like neighbour discovery but is sent to the internet is forwarded as anything else.
        let solicitation = neighbour_solicitation(TUNNELS[0].client.v6, REMOTE.v6)?;
        injector.send(&solicitation)?;
        let (name, _) = places.saw(|seen| seen.icmp == Some((135, 0)) && seen.dst == Some(REMOTE.v6.into()))?;
        assert_eq!(name, "sixxs0", "{mode}: a neighbour solicitation to the internet");
        Ok(())
    })
}
