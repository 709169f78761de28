//! The segment size that TCP tells through a tunnel (`mss`): a real handshake, by every datapath, seen at both ends.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use etherparse::{PacketBuilder, TcpHeaderSlice, TcpOptionElement};
use serde_json::json;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Seen, TUNNELS, TunnelKind, World, inject,
    pace::SOON,
    plan::REMOTE,
    snapshot::{can_ask_main, has_tcx},
    traffic::bulk,
};

/// So many have to be cut into segments.
const BYTES: usize = 100_000;
/// SYN among TCP's flags.
const SYN: u8 = 2;

/// A world's configuration in which both tunnels say this.
fn config(world: &World, line: &str) -> String {
    let config = world.config();
    TUNNELS.iter().fold(config, |config, tunnel| {
        let header = format!("[tunnel.{}]\n", tunnel.device);
        config.replace(&header, &format!("{header}{line}\n"))
    })
}

fn start<'a>(world: &'a World, line: &str, datapath: &'static str, attach: Option<&'static str>) -> Result<Daemon<'a>> {
    let options = DaemonOptions { datapath: Some(datapath), attach, ..DaemonOptions::default() };
    let daemon = Daemon::start(world, &config(world, line), &options)?;
    let status = daemon.status()?;
    assert_eq!(status["problems"], json!([]), "{datapath}");
    Ok(daemon)
}

/// The TCP header of a frame.
fn tcp(seen: &Seen) -> Option<TcpHeaderSlice<'_>> {
    let packet = if seen.eth.is_some() { seen.raw.get(14..)? } else { &seen.raw };
    let header = if packet.first()? >> 4 == 6 { 40 } else { 20 };
    (seen.protocol?.0 == 6).then(|| TcpHeaderSlice::from_slice(packet.get(header..)?).ok()).flatten()
}

/// The segment size told in a SYN.
fn told(seen: &Seen) -> Result<Option<u16>> {
    ensure!(seen.checksum_ok, "a wrong checksum: {seen}");
    let tcp = tcp(seen).context("no TCP")?;
    let mut options = tcp.options_iterator();
    Ok(options.find_map(|option| match option {
        Ok(TcpOptionElement::MaximumSegmentSize(size)) => Some(size),
        _ => None,
    }))
}

/// Waits for the SYN of one side, of a connection or by itself, and tells its segment size.
fn syn(capture: &mut Capture, src: IpAddr, dst: IpAddr) -> Result<Option<u16>> {
    let wanted = |seen: &Seen| seen.is(src, dst) && tcp(seen).is_some_and(|tcp| tcp.slice()[13] & SYN != 0);
    told(&capture.wait_for(wanted, SOON)?)
}

/// What both ends hear in the handshake of a connection with so many bytes: the remote one of `src`, and `src` of the
/// remote one.
fn handshake(world: &World, family: Family, host: bool, bytes: usize) -> Result<[Option<u16>; 2]> {
    let plan = TUNNELS[0];
    let (netns, src) = if host { (&world.host, plan.host) } else { (&world.client, plan.client) };
    let (src, dst) = (src.of(family), REMOTE.of(family));
    let mut far = Capture::on(&world.remote, plan.remote_device)?;
    let mut near = if host { Capture::on(netns, plan.device)? } else { Capture::on(netns, "lan0")? };
    bulk((netns, src), (&world.remote, dst), bytes, SOON)?;
    Ok([syn(&mut far, src, dst)?, syn(&mut near, dst, src)?])
}

#[test]
fn both_ends_hear_what_the_tunnel_takes() -> Result<()> {
    // A tun device computes checksums on the way out, and what it takes in has one: both ends check it.
    for kind in [TunnelKind::Tun, TunnelKind::Veth] {
        let world = World::with(kind).tunnel_mtu(1400).build()?;
        for datapath in ["both", "kernel", "ebpf", "shadow"] {
            // Without larger packets nobody learns of the path's MTU, which is told in the next SYN, too.
            let without = || handshake(&world, Family::V4, false, 10);
            let attaches: &[_] = if datapath == "both" { &[None, Some("clsact")] } else { &[None] };
            for attach in attaches.iter().copied().filter(|attach| has_tcx() || attach.is_none()) {
                let daemon = start(&world, "mss = \"auto\"", datapath, attach)?;
                assert_eq!(daemon.status()?["tunnels"][0]["mss"], json!({ "v4": 1360, "v6": 1340 }));
                for (family, size) in [(Family::V4, 1360), (Family::V6, 1340)] {
                    let heard = handshake(&world, family, false, BYTES)?;
                    assert_eq!(heard, [Some(size); 2], "{kind:?}, {datapath}, {attach:?}, {family}");
                }
                // The tunnel shrinks; and what is less already stays.
                world.host.ip("link set sixxs0 mtu 1380")?;
                daemon.wait_status(|status| status["tunnels"][0]["mss"]["v4"] == 1340, SOON)?;
                assert_eq!(handshake(&world, Family::V4, false, BYTES)?, [Some(1340); 2], "{kind:?}, {datapath}");
                world.host.ip("link set sixxs0 mtu 1400")?;
                daemon.write_config(&config(&world, "mss = 1200"))?;
                daemon.reload()?;
                for host in [false, true] {
                    // The host's own SYN leaves smaller; what comes in is seen on the tunnel before its program.
                    let [far, near] = handshake(&world, Family::V6, host, BYTES)?;
                    assert_eq!(far, Some(1200), "{kind:?}, {datapath}, host: {host}");
                    ensure!(host || near == Some(1200), "{kind:?}, {datapath}: {near:?}");
                }
                daemon.write_config(&config(&world, "mss = 9000"))?;
                daemon.reload()?;
                assert_eq!(without()?, [Some(1460); 2], "{kind:?}, {datapath}: never up");
                daemon.write_config(&world.config())?;
                daemon.reload()?;
                let gone = daemon.status()?;
                ensure!(!gone["fast_path"]["attached"].to_string().contains("mss"), "{gone:#}");
                assert_eq!(without()?, [Some(1460); 2], "{kind:?}, {datapath}: no longer");
                let mut daemon = daemon;
                ensure!(daemon.down()?.success(), "{}", daemon.log());
            }
        }
    }
    Ok(())
}

/// A SYN that comes back by the tunnel is limited before the program there hands it on, whichever of the two came first.
#[test]
fn what_comes_back_is_limited_before_it_is_forwarded() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let fast = |config: String| format!("unmatched = \"fast\"\n{config}");
    let unmatched = |daemon: &Daemon<'_>| Ok::<_, anyhow::Error>(daemon.status()?["fast_path"]["unmatched"].clone());
    for attach in [None, Some("clsact")].into_iter().filter(|attach| has_tcx() || attach.is_none()) {
        for first in [fast(world.config()), config(&world, "mss = 1000")] {
            let mut daemon = Daemon::start(&world, &first, &DaemonOptions { attach, ..DaemonOptions::default() })?;
            daemon.write_config(&fast(config(&world, "mss = 1000")))?;
            daemon.reload()?;
            for family in Family::ALL {
                handshake(&world, family, false, BYTES)?;
                let before = unmatched(&daemon)?;
                assert_eq!(handshake(&world, family, false, BYTES)?, [Some(1000); 2], "{attach:?}, {family}");
                let handed_on = unmatched(&daemon)? != before;
                assert_eq!(handed_on, can_ask_main(), "{attach:?}, {family}: by the program, or by an old kernel");
            }
            ensure!(daemon.down()?.success(), "{}", daemon.log());
        }
    }
    Ok(())
}

/// Frames that no stack has made: no option, one at an odd place, and a checksum that is there already.
#[test]
fn frames_with_whole_checksums() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let _daemon = start(&world, "mss = 1000", "both", None)?;
    let client = world.client_injector()?;
    let mut far = Capture::on(&world.remote, TUNNELS[0].remote_device)?;
    for family in Family::ALL {
        let (src, dst) = (TUNNELS[0].client.of(family), REMOTE.of(family));
        let at = |address, port| SocketAddr::new(address, port);
        client.send(&inject::tcp_syn(at(src, 1), at(dst, 2), 64)?)?;
        assert_eq!(syn(&mut far, src, dst)?, None, "{family}: nothing is added");
        for (options, size) in [
            (&[2, 4, 0x05, 0xb4][..], 1000),
            (&[1, 2, 4, 0x05, 0xb4, 3, 3, 7], 1000),
            (&[1, 1, 1, 2, 4, 0xff, 0xff, 1], 1000),
            (&[4, 2, 2, 4, 0x03, 0xe7], 999),
        ] {
            let mut packet = Vec::new();
            let syn_segment =
                PacketBuilder::ip(inject::ip(src, dst, 64)?).tcp(1, 2, 3, 4).syn().options_raw(options)?;
            syn_segment.write(&mut packet, &[])?;
            client.send(&packet)?;
            assert_eq!(syn(&mut far, src, dst)?, Some(size), "{family}: {options:?}");
        }
    }
    Ok(())
}

/// Without CAP_BPF the rules carry all traffic, and `status` names what is missing.
#[test]
fn without_ebpf_it_is_a_problem_with_a_name() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    for datapath in ["kernel", "both"] {
        let options =
            DaemonOptions { datapath: Some(datapath), ..DaemonOptions::with_capabilities("CAP_NET_ADMIN CAP_NET_RAW") };
        let mut daemon = Daemon::start(&world, &config(&world, "mss = \"auto\""), &options)?;
        let problems = daemon.status()?["problems"].to_string();
        ensure!(problems.contains("tunnel sixxs0: the segment size that TCP tells is not limited: "), "{problems}");
        ensure!(problems.contains("CAP_BPF"), "{problems}");
        daemon.kill9()?;
    }
    Ok(())
}
