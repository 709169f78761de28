//! What a policy means for packets, in every state of the tunnels and every datapath, seen at the far end.
//!
//! Where `ebpf` differs, the tests say so: with no rules there is nobody to answer a packet that is too big for the
//! tunnel, or that has none; it is dropped at the uplink and counted.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use tunroute::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, End, Flow, FlowOptions, Mac, Netns, Seen, Sender, TUNNELS, TunnelKind, Watch,
    World,
    device::veth,
    inject::{self, udp},
    ping,
    plan::{HOST, ISP, MAC_CLIENT, MAC_LAN, PLAIN_LAN, REMOTE},
    traffic::Answer,
};

/// A frame comes at once, or it is lost.
const SOON: Duration = Duration::from_secs(3);
/// Long enough for a frame that must not come.
const A_WHILE: Duration = Duration::from_millis(40);
/// How soon a change of the system has taken effect; the daemon promises 100 ms.
const FOLLOWED: Duration = Duration::from_millis(500);
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

/// A UDP packet, marked by its source port.
fn packet(src: IpAddr, dst: IpAddr, hop_limit: u8, port: u16, payload: usize) -> Result<Vec<u8>> {
    udp(SocketAddr::new(src, port), SocketAddr::new(dst, 9), hop_limit, &vec![0x5a; payload])
}

fn header(family: Family) -> usize {
    if family == Family::V4 { 20 } else { 40 }
}

fn marked(seen: &Seen, port: u16) -> bool {
    !seen.left() && seen.ports.is_some_and(|(from, _)| from == port)
}

/// Unique marks for packets.
struct Marks(u16);

impl Marks {
    fn next(&mut self) -> u16 {
        self.0 += 1;
        self.0
    }
}

/// The places outside of the host that a packet can get to.
struct Places(Vec<(&'static str, Capture)>);

impl Places {
    fn watch(world: &World) -> Result<Self> {
        Ok(Self(vec![
            ("sixxs0", Capture::on(&world.brokers[0], "sixxs0")?),
            ("sixxs1", Capture::on(&world.brokers[1], "sixxs1")?),
            ("net0", Capture::on(&world.isp, "net0")?),
        ]))
    }

    /// The marked packet arrives at this place with its checksums right, or nowhere, and at no other.
    fn expect(&mut self, place: Option<&str>, mark: u16) -> Result<()> {
        if let Some(place) = place {
            let found = self.0.iter_mut().find(|(name, _)| *name == place).map(|(_, capture)| capture);
            let seen = found.context("no such place")?.wait_for(|seen| marked(seen, mark), SOON)?;
            ensure!(seen.checksum_ok, "bad checksum: {seen}");
        }
        let within = if place.is_some() { Duration::ZERO } else { A_WHILE };
        for (name, capture) in &mut self.0 {
            capture.ensure_none(|seen| marked(seen, mark), within).with_context(|| format!("at {name}"))?;
            capture.drain()?;
        }
        Ok(())
    }
}

impl Places {
    /// Where a packet arrives first.
    fn saw(&mut self, wanted: impl Fn(&Seen) -> bool) -> Result<(&'static str, Seen)> {
        let deadline = Instant::now() + SOON;
        loop {
            for (name, capture) in &mut self.0 {
                if let Ok(seen) = capture.wait_for(|seen| !seen.left() && wanted(seen), Duration::from_millis(1)) {
                    return Ok((name, seen));
                }
            }
            ensure!(Instant::now() < deadline, "no such packet arrives anywhere");
        }
    }
}

fn neighbour_solicitation(src: Ipv6Addr, dst: Ipv6Addr) -> Result<Vec<u8>> {
    let kind = etherparse::Icmpv6Type::Unknown { type_u8: 135, code_u8: 0, bytes5to8: [0; 4] };
    let mut packet = Vec::new();
    PacketBuilder::ipv6(src.octets(), dst.octets(), 255).icmpv6(kind).write(&mut packet, &dst.octets())?;
    Ok(packet)
}

/// Waits at the client for the host's ICMP error about the packet.
fn expect_error(client: &mut Capture, family: Family, sent: &[u8], expected: (u8, u8)) -> Result<Seen> {
    // Addresses and ports: what comes before may change on the way.
    let (from, to) = if family == Family::V4 { (12, 24) } else { (8, 44) };
    let about = |seen: &Seen| seen.payload.get(from..to) == sent.get(from..to);
    let seen = client.wait_for(|seen| !seen.left() && seen.icmp == Some(expected) && about(seen), SOON)?;
    let host = [PLAIN_LAN, TUNNELS[0].lan, TUNNELS[1].lan, HOST].map(|addrs| addrs.of(family));
    ensure!(seen.src.is_some_and(|src| host.contains(&src)), "not from the host: {seen}");
    ensure!(seen.checksum_ok, "{seen}");
    Ok(seen)
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
                injector.send(&sent)?;
                let error = if family == Family::V4 { (11, 0) } else { (3, 0) };
                expect_error(&mut client, family, &sent, error).with_context(|| format!("{family}, {hop_limit}"))?;
                places.expect(None, mark)?;
                let since = daemon.counters()?.since(&before);
                let expected = (mode != "kernel").then(|| (("tunnel0".to_owned(), "expired".to_owned()), 1));
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
            injector.send(&sent)?;
            if mode == "ebpf" {
                // Nobody is told: the limit of this mode.
                expect_no_error(&mut client, family)?;
            } else {
                let kind = if family == Family::V4 { (3, 4) } else { (2, 0) };
                let error = expect_error(&mut client, family, &sent, kind).with_context(|| format!("{family}"))?;
                // The last two bytes before the quoted packet, behind Ethernet and IP.
                let at = 14 + header(family) + 6;
                assert_eq!(error.raw.get(at..at + 2), Some(&[0x05, 0x78][..]), "the MTU of {error}");
            }
            places.expect(None, mark)?;
            let since: Vec<_> = daemon.counters()?.since(&before).into_keys().map(|(_, outcome)| outcome).collect();
            let expected: &[&str] = match mode {
                "kernel" => &[],
                "both" => &["too_big"],
                _ => &["leak_prevented", "too_big"],
            };
            assert_eq!(since, expected, "{mode} {family}");

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
                    ensure!(started.elapsed() < FOLLOWED, "{mode}: {dst}: addr {command} is not followed");
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
                injector.send(&sent)?;
                match error {
                    // With no rules nobody answers: the limit of this mode.
                    Some(error) if mode != "ebpf" => {
                        expect_error(&mut client, family, &sent, error).with_context(|| what.clone())?;
                    }
                    _ => expect_no_error(&mut client, family).with_context(|| what.clone())?,
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
                let report = flow.stop()?;
                let counts = (report.count("uplink"), report.count("wrong tunnel"));
                assert_eq!(counts, (0, 0), "{kind:?}, {mode}: {from} {family} leaked");
                ensure!(report.sent > 100 && report.count("remote") > 100, "{kind:?}, {mode}: nothing was tested");
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
                assert_eq!(ping(&world.client, src, dst)?, Answer::Reply, "{mode}: {src} > {dst}");
            }
        }
        client.wait_for(|seen| !seen.left() && seen.icmp == Some((136, 0)), SOON).context("an advertisement")?;
        // The link-local address that `lan0` of the host has from its MAC address.
        world.client.run("ping", &["-n", "-c", "1", "-W", "1", "-I", "lan0", "fe80::ff:fe00:102"])?;
        world.host.run("ping", &["-n", "-c", "1", "-W", "1", "-I", "lan0", "fe80::ff:fe00:101"])?;
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

/// A frame to be injected, with a name for messages.
type Named = (String, Vec<u8>);

/// What marks the payload of injected frames.
const MARKER: &[u8] = b"marked by the test of malformed frames";

fn frame(ether_type: u16, packet: &[u8]) -> Vec<u8> {
    [&MAC_LAN.0[..], &MAC_CLIENT.0, &ether_type.to_be_bytes(), packet].concat()
}

fn good(family: Family, protocol: u8) -> Result<Vec<u8>> {
    let (src, dst) = (TUNNELS[0].client.of(family), REMOTE.of(family));
    let builder = PacketBuilder::ip(inject::ip(src, dst, 64)?);
    let mut packet = Vec::new();
    match protocol {
        6 => builder.tcp(1, 2, 3, 4).write(&mut packet, MARKER)?,
        1 if family == Family::V4 => builder.icmpv4_echo_request(1, 2).write(&mut packet, MARKER)?,
        1 => builder.icmpv6_echo_request(1, 2).write(&mut packet, MARKER)?,
        _ => builder.udp(1, 2).write(&mut packet, MARKER)?,
    }
    Ok(packet)
}

/// Everything that a network may deliver besides good packets, and some odd ones that are good.
fn odd_frames() -> Result<Vec<Named>> {
    let v4 = good(Family::V4, 17)?;
    let v6 = good(Family::V6, 17)?;
    let mut frames: Vec<Named> = Vec::new();
    let mut add = |name: &str, frame: Vec<u8>| frames.push((name.to_owned(), frame));
    for (family, good, ether_type) in [("IPv4", &v4, 0x0800), ("IPv6", &v6, 0x86dd)] {
        add(&format!("{family} good"), frame(ether_type, good));
        add(&format!("{family} in the other's EtherType"), frame(ether_type ^ 0x0800 ^ 0x86dd, good));
        for length in [0, 1, 19, 20, 21, 27, 28, 39, 40, 41, 47, 48, good.len() - 1] {
            add(&format!("{family} truncated to {length}"), frame(ether_type, &good[..length.min(good.len())]));
        }
        for padding in [1, 7, 100] {
            add(&format!("{family} padded by {padding}"), frame(ether_type, &[good, &vec![0; padding][..]].concat()));
        }
        for version in [0, 5, 7, 15] {
            let mut bad = good.clone();
            bad[0] = version << 4 | (bad[0] & 0xf);
            add(&format!("{family} version {version}"), frame(ether_type, &bad));
        }
        let mut tagged = frame(0x8100, &[0x00, 0x2a]);
        tagged.extend_from_slice(&u16::to_be_bytes(ether_type));
        tagged.extend_from_slice(good);
        add(&format!("{family} with a VLAN tag"), tagged);
        let mut priority = frame(0x8100, &[0xe0, 0x00]);
        priority.extend_from_slice(&u16::to_be_bytes(ether_type));
        priority.extend_from_slice(good);
        add(&format!("{family} with a priority tag"), priority);
        for (name, mac) in [("broadcast", [0xff; 6]), ("multicast", [1, 0, 0x5e, 0, 0, 1]), ("another", [2; 6])] {
            let mut other = frame(ether_type, good);
            other[..6].copy_from_slice(&mac);
            add(&format!("{family} to the MAC address of {name}"), other);
        }
    }
    let changed_v4 = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = v4.clone();
        change(&mut packet);
        if packet.len() >= usize::from(packet[0] & 0xf) * 4 && packet[0] & 0xf >= 5 {
            fix_checksum(&mut packet);
        }
        frame(0x0800, &packet)
    };
    for ihl in [0, 1, 4, 6, 15] {
        add(&format!("IHL {ihl}"), changed_v4(&|packet| packet[0] = 0x40 | ihl));
    }
    for length in [0_u16, 19, 20, 28, u16::try_from(v4.len())? - 1, u16::try_from(v4.len())? + 1, 0xffff] {
        add(
            &format!("IPv4 length {length}"),
            changed_v4(&|packet| packet[2..4].copy_from_slice(&length.to_be_bytes())),
        );
    }
    for fragment in [0x2000_u16, 0x2001, 0x0001, 0x1fff, 0x8000] {
        add(
            &format!("fragment field {fragment:#x}"),
            changed_v4(&|packet| packet[6..8].copy_from_slice(&fragment.to_be_bytes())),
        );
    }
    let options: [(&str, [u8; 4]); 5] = [
        ("no operation", [1, 1, 1, 1]),
        ("router alert", [0x94, 4, 0, 0]),
        ("an unknown one", [0x9e, 4, 1, 2]),
        ("one of length 0", [0x9e, 0, 1, 2]),
        ("one that is too long", [0x9e, 9, 1, 2]),
    ];
    for (name, option) in options {
        add(
            &format!("IPv4 options: {name}"),
            changed_v4(&|packet| {
                packet[0] = 0x46;
                packet.splice(20..20, option);
                let length = u16::try_from(packet.len()).unwrap_or(0);
                packet[2..4].copy_from_slice(&length.to_be_bytes());
            }),
        );
    }
    let mut wrong = v4.clone();
    wrong[10] ^= 1;
    add("IPv4 checksum wrong", frame(0x0800, &wrong));
    for checksum in [[0, 0], [0xff, 0xff]] {
        let mut wrong = v4.clone();
        wrong[10..12].copy_from_slice(&checksum);
        add(&format!("IPv4 checksum {checksum:?}"), frame(0x0800, &wrong));
    }
    let with_next = |next: u8, header: &[u8]| {
        let mut packet = v6.clone();
        packet[6] = next;
        packet.splice(40..40, header.iter().copied());
        let length = u16::try_from(packet.len() - 40).unwrap_or(0);
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        frame(0x86dd, &packet)
    };
    for (name, next, header) in [
        ("hop-by-hop, padding", 0, &[17, 0, 1, 4, 0, 0, 0, 0]),
        ("hop-by-hop, router alert", 0, &[17, 0, 5, 2, 0, 0, 1, 0]),
        ("hop-by-hop, unknown, to be reported", 0, &[17, 0, 0x9e, 4, 0, 0, 0, 0]),
        ("hop-by-hop, longer than the packet", 0, &[17, 0xff, 1, 4, 0, 0, 0, 0]),
        ("destination options", 60, &[17, 0, 1, 4, 0, 0, 0, 0]),
        ("routing", 43, &[17, 0, 0, 0, 0, 0, 0, 0]),
        ("routing, segments left", 43, &[17, 0, 0, 1, 0, 0, 0, 0]),
        ("first fragment", 44, &[17, 0, 0, 1, 0, 0, 0, 7]),
        ("last fragment", 44, &[17, 0, 0, 8, 0, 0, 0, 7]),
        ("atomic fragment", 44, &[17, 0, 0, 0, 0, 0, 0, 7]),
        ("no next header", 59, &[0, 0, 0, 0, 0, 0, 0, 0]),
        ("authentication", 51, &[17, 0, 0, 0, 0, 0, 0, 1]),
    ] {
        add(&format!("IPv6 extension: {name}"), with_next(next, header));
    }
    for length in [0_u16, 1, u16::try_from(v6.len())? - 41, u16::try_from(v6.len())? - 39, 0xffff] {
        let mut packet = v6.clone();
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        add(&format!("IPv6 payload length {length}"), frame(0x86dd, &packet));
    }
    let sources: [(&str, Vec<u8>, Vec<u8>); 4] = [
        ("this host", TUNNELS[0].lan.v4.octets().into(), TUNNELS[0].lan.v6.octets().into()),
        ("this host's tunnel", TUNNELS[0].host.v4.octets().into(), TUNNELS[0].host.v6.octets().into()),
        ("a broadcast address", vec![10, 0, 0, 255], vec![0xff; 16]),
        ("nobody", vec![0; 4], vec![0; 16]),
    ];
    for (name, from_v4, from_v6) in sources {
        add(&format!("IPv4 from {name}"), changed_v4(&|packet| packet[12..16].copy_from_slice(&from_v4)));
        let mut packet = v6.clone();
        packet[8..24].copy_from_slice(&from_v6);
        add(&format!("IPv6 from {name}"), frame(0x86dd, &packet));
    }
    Ok(frames)
}

/// Good packets with a few bytes of the headers changed, cut off or added, the same in every run.
fn mutated_frames(count: usize) -> Result<Vec<Named>> {
    let mut random = fastrand::Rng::with_seed(0x7472);
    let mut frames = Vec::new();
    for number in 0..count {
        let family = Family::ALL[number % 2];
        let (ether_type, headers) = if family == Family::V4 { (0x0800, 34) } else { (0x86dd, 54) };
        let mut bytes = frame(ether_type, &good(family, [17, 6, 1][number / 2 % 3])?);
        let mut name = format!("mutation {number}:");
        for _ in 0..random.usize(1..=3) {
            match random.u8(0..10) {
                0 => bytes.truncate(random.usize(14..bytes.len().max(15))),
                1 => bytes.extend(std::iter::repeat_n(0, random.usize(1..20))),
                _ => {
                    // Not the addresses: where a packet goes is not the question here.
                    let at = random.usize(12..if family == Family::V4 { 26 } else { 22 });
                    let value = *random.choice(&[0, 1, 4, 6, 0x0f, 0x40, 0x7f, 0x80, 0xff]).unwrap_or(&0);
                    let value = if random.bool() { value } else { random.u8(..) };
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = value;
                        name += &format!(" [{at}] = {value:#x}");
                    }
                }
            }
        }
        // Half of them with a right checksum, so that something else is wrong.
        if family == Family::V4 && random.bool() && bytes.len() >= headers && bytes[14] & 0xf == 5 {
            fix_checksum(&mut bytes[14..]);
        }
        frames.push((format!("{name}, {} bytes", bytes.len()), bytes));
    }
    Ok(frames)
}

/// What became of a frame: the layer 3 packets that came to each place because of it.
type Fate = Vec<(&'static str, Vec<u8>)>;

/// Injects the frames one after the other. After each, a good packet for the tunnel and an echo request for the host:
/// what arrives before these are answered is because of the frame.
fn fates(world: &World, places: &mut Places, client: &mut Capture, frames: &[Named]) -> Result<Vec<Fate>> {
    // On one CPU nothing overtakes.
    let mut cpu = CpuSet::new();
    cpu.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &cpu)?;
    let injector = world.client_injector()?;
    let (src, lan) = (TUNNELS[0].client.v4.into(), TUNNELS[0].lan.v4.into());
    let errors_from: Vec<Option<IpAddr>> = Family::ALL
        .into_iter()
        .flat_map(|family| [PLAIN_LAN, TUNNELS[0].lan, TUNNELS[1].lan, HOST].map(|addrs| Some(addrs.of(family))))
        .collect();
    let mut fates = Vec::new();
    for (number, (name, bytes)) in (0_u16..).zip(frames) {
        let mark = 10_000 + number;
        injector.send_frame(bytes).with_context(|| format!("cannot send {name}"))?;
        injector.send(&packet(src, REMOTE.v4.into(), 64, mark, 1)?)?;
        injector.send(&inject::echo_request(src, lan, 64, mark, 1, b"done?")?)?;
        let mut fate = Fate::new();
        places.0[0].1.wait_for(|seen| marked(seen, mark), SOON).with_context(|| format!("after {name}"))?;
        let reply = |seen: &Seen| seen.icmp == Some((0, 0)) && seen.raw.get(38..40) == Some(&mark.to_be_bytes()[..]);
        client.wait_for(|seen| !seen.left() && reply(seen), SOON).with_context(|| format!("after {name}"))?;
        for (place, capture) in &mut places.0 {
            for seen in capture.drain()?.into_iter().filter(|seen| !seen.left()) {
                let at = if seen.eth.is_some() { 14 } else { 0 };
                let ours = place.starts_with("sixxs") || seen.raw.windows(8).any(|window| window == &MARKER[..8]);
                // What the link itself is kept going with (neighbour discovery, MLD) comes when it comes.
                let for_the_link =
                    seen.src.is_none_or(|src| matches!(src, IpAddr::V6(src) if src.is_unicast_link_local()));
                if ours && !for_the_link && seen.icmp.is_none_or(|(kind, _)| !(133..=137).contains(&kind)) {
                    fate.push((*place, seen.raw[at..].to_vec()));
                }
            }
        }
        for seen in client.drain()?.into_iter().filter(|seen| !seen.left() && errors_from.contains(&seen.src)) {
            let Some((kind, code)) = seen.icmp else { continue };
            let is_error =
                if seen.src.is_some_and(|src| src.is_ipv4()) { [3, 5, 11, 12].contains(&kind) } else { kind < 128 };
            if is_error {
                // Its own IPv4 id is new each time.
                fate.push(("client", [&[kind, code][..], &seen.payload].concat()));
            }
        }
        fates.push(fate);
    }
    Ok(fates)
}

/// The kernel datapath is the specification: for any frame the fast path does the same, to the byte.
#[test]
fn odd_frames_fare_in_both_as_in_kernel() -> Result<()> {
    for kind in [TunnelKind::Tun, TunnelKind::Veth] {
        let world = World::with(kind).build()?;
        let frames = [odd_frames()?, mutated_frames(600)?].concat();
        let (mut places, mut client) = (Places::watch(&world)?, Capture::on(&world.client, "lan0")?);
        let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
        let mut all = Vec::new();
        for mode in ["kernel", "both"] {
            daemon.write_config(&format!("datapath = \"{mode}\"\n{}", world.config()))?;
            daemon.reload()?;
            for family in Family::ALL {
                // Neighbours are known from here on.
                let (src, dst) = (TUNNELS[0].client.of(family), REMOTE.of(family));
                assert_eq!(ping(&world.client, src, dst)?, Answer::Reply, "{mode}");
                assert_eq!(ping(&world.host, HOST.of(family), ISP.of(family))?, Answer::Reply, "{mode}");
            }
            places.0.iter_mut().try_for_each(|(_, capture)| capture.drain().map(drop))?;
            all.push(fates(&world, &mut places, &mut client, &frames)?);
        }
        let differing = frames.iter().zip(all[0].iter().zip(&all[1])).filter(|(_, (kernel, both))| kernel != both);
        let differing: Vec<String> = differing
            .map(|((name, frame), (kernel, both))| {
                format!("{name}: {frame:02x?}\n  kernel: {kernel:02x?}\n  both:   {both:02x?}")
            })
            .collect();
        ensure!(differing.is_empty(), "{kind:?}: {} frames differ:\n{}", differing.len(), differing.join("\n"));
        let arrived = all[0].iter().filter(|fate| fate.iter().any(|(place, _)| *place == "sixxs0")).count();
        let refused = all[0].iter().filter(|fate| fate.iter().any(|(place, _)| *place == "client")).count();
        let leaked = all.iter().flatten().flatten().find(|(place, _)| *place == "net0");
        ensure!(leaked.is_none(), "{kind:?}: {leaked:02x?}");
        eprintln!("{kind:?}: {} frames, {arrived} arrived, {refused} were answered with an error", frames.len());
        ensure!(arrived > 100 && refused > 3, "the frames test too little");
    }
    Ok(())
}
