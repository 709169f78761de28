//! {IPv4, IPv6} × {tun, vxlan, veth} × {kernel, both, ebpf} × {UDP, TCP bulk with GSO, ICMP echo} × {from behind the host,
//! from the host itself}: what arrives at the far end, by which device it left, and who decided.

use std::{net::IpAddr, time::Duration};

use anyhow::{Result, ensure};
use tunroute::policy::net::Family;
use tunroute_tests::{Daemon, DaemonOptions, TUNNELS, TunOptions, TunPair, TunnelKind, World};

use crate::cells::{Bench, Cell, Mode, Origin, check_attachments, limit_mss, matrix};

#[test]
fn tun() -> Result<()> {
    matrix(TunnelKind::Tun)
}

#[test]
fn vxlan() -> Result<()> {
    matrix(TunnelKind::Vxlan)
}

#[test]
fn veth() -> Result<()> {
    matrix(TunnelKind::Veth)
}

/// Packets that enter by a device without link-layer header get one, where the tunnel wants one.
#[test]
fn layer_3_ingress() -> Result<()> {
    for kind in [TunnelKind::Tun, TunnelKind::Veth] {
        let world = World::with(kind).vnet_hdr().build()?;
        let options = TunOptions { mtu: 1500, vnet_hdr: true };
        let _pair = TunPair::new((&world.host, "tin0"), (&world.client, "tin0"), options)?;
        let sources: [(Family, IpAddr); 2] =
            [(Family::V4, "10.0.5.2".parse()?), (Family::V6, "2a02:578:85a0:5::2".parse()?)];
        for (family, src) in sources {
            let (version, length) = if family == Family::V4 { ("-4", 32) } else { ("-6", 128) };
            world.host.ip(&format!("{version} route add {src}/{length} dev tin0"))?;
            let nodad = if family == Family::V6 { "nodad" } else { "" };
            world.client.ip(&format!(
                "addr add {src}/{length} dev tin0 {nodad}\n{version} rule add from {src} lookup 77 pref 77\n\
                 {version} route add default dev tin0 table 77"
            ))?;
        }
        let config = |mode: Mode| {
            let config = world.config().replace("[\"lan0\"]", "[\"lan0\", \"tin0\"]");
            format!("datapath = \"{}\"\n{config}", mode.name())
        };
        let daemon = Daemon::start(&world, &config(Mode::Kernel), &DaemonOptions::default())?;
        let mut bench = Bench::new(&world, &daemon)?;
        for mode in Mode::ALL {
            daemon.write_config(&config(mode))?;
            daemon.reload()?;
            check_attachments(&world, &daemon, mode, &[("lan0", "ingress_l2"), ("tin0", "ingress_l3")])?;
            if mode == Mode::Ebpf {
                limit_mss(&world)?;
            }
            for (family, src) in sources {
                bench.all(&Cell { kind, mode, family, origin: Origin::Behind("tin0"), tunnel: 0, src })?;
            }
        }
    }
    Ok(())
}

/// Kernels before 6.6 have no TCX: filters on a clsact qdisc do the same, stay where they are and go with `down`.
#[test]
fn clsact() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let pristine = world.host.snapshot()?;
    for mode in [Mode::Both, Mode::Ebpf] {
        let options = DaemonOptions { attach: Some("clsact"), datapath: Some(mode.name()), ..DaemonOptions::default() };
        let mut daemon = Daemon::start(&world, &world.config(), &options)?;
        for (device, hook, program) in [("lan0", "ingress", "ingress_l2"), ("net0", "egress", "egress_l2")] {
            let filters = world.host.query("tc", &format!("filter show dev {device} {hook}"))?;
            ensure!(filters.contains(program), "{device} {hook}: {filters}");
            ensure!(world.host.tcx(device, hook)?.is_empty(), "{device} {hook}");
        }
        ensure!(daemon.status()?["fast_path"]["method"] == "clsact", "{:#}", daemon.status()?);
        let rules = daemon.status()?["kernel"]["rules"].as_u64();
        ensure!((rules == Some(0)) == (mode == Mode::Ebpf), "{mode:?}: {rules:?} rules");
        let mut bench = Bench::new(&world, &daemon)?;
        let plan = &TUNNELS[1];
        if mode == Mode::Ebpf {
            limit_mss(&world)?;
        }
        for family in Family::ALL {
            for (origin, src) in [(Origin::Behind("lan0"), plan.client), (Origin::Host, plan.host)] {
                let kind = TunnelKind::Veth;
                bench.all(&Cell { kind, mode, family, origin, tunnel: 1, src: src.of(family) })?;
            }
        }
        // The daemon looks twice a second whether its programs are in place.
        std::thread::sleep(Duration::from_millis(1100));
        ensure!(!daemon.log().contains("detached"), "it does not find its own filters:\n{}", daemon.log());
        drop(bench);
        daemon.down()?;
        pristine.wait_same(|| world.host.snapshot())?;
    }
    Ok(())
}
