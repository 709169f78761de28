//! Frames that no well-behaved host sends, and some odd ones that are good: the fast path treats them as the kernel does.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Seen, TUNNELS, TunnelKind, World, inject,
    pace::SOON,
    ping,
    plan::{HOST, ISP, MAC_CLIENT, MAC_LAN, PLAIN_LAN, REMOTE},
    traffic::Answer,
};

use super::{
    fix_checksum,
    places::{Places, marked, packet},
};

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
