//! Devices come, go, change and are replaced.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Seen, TUNNELS, TunnelKind, World,
    device::ask_neighbours_often,
    pace::until,
    plan::{ISP, PLAIN_CLIENT, REMOTE},
    reach,
    traffic::{Answer, ping_briefly},
};

use super::scene::{IN_TIME, Scene, Setting, programs};

const DEVICE: &str = TUNNELS[0].device;

fn flaps(scene: &mut Scene<'_>) -> Result<()> {
    for _ in 0..5 {
        scene.world.set_tunnel(0, false)?;
        std::thread::sleep(Duration::from_millis(30));
        scene.world.set_tunnel(0, true)?;
        std::thread::sleep(Duration::from_millis(30));
    }
    scene.flows_again("carried again", IN_TIME)
}

#[test]
fn tunnel_flaps() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).run("tunnel flaps", flaps)?;
    }
    Ok(())
}

/// IPv4 routes vanish without a word when a device goes down.
#[test]
fn tunnel_flaps_ipv4() -> Result<()> {
    let setting = || Setting { family: Family::V4, ..Setting::new("both") };
    setting().run("tunnel flaps, IPv4", flaps)?;
    Setting { kind: TunnelKind::Tun, ..setting() }.run("tun flaps, IPv4", flaps)
}

#[test]
fn tunnel_stays_down() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).run("tunnel stays down", |scene| {
            scene.world.set_tunnel(0, false)?;
            scene.within("seen down", IN_TIME, |scene| scene.tunnel_is("down"))?;
            scene.ensure_silence(Duration::from_millis(400))?;
            scene.world.set_tunnel(0, true)?;
            scene.flows_again("carried again", IN_TIME)
        })?;
    }
    Ok(())
}

#[test]
fn tunnel_comes_late() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting { present: [false, true], ..Setting::new(mode) }.run("tunnel comes late", |scene| {
            scene.ensure_silence(Duration::from_millis(400))?;
            scene.world.set_present(0, true)?;
            scene.flows_again("carried", IN_TIME)
        })?;
    }
    Ok(())
}

#[test]
fn tunnel_is_renamed() -> Result<()> {
    Setting::new("both").run("tunnel is renamed", |scene| {
        scene.rename(DEVICE, "other0")?;
        scene.within("given up", IN_TIME, |scene| scene.tunnel_is("pending"))?;
        scene.ensure_silence(Duration::from_millis(300))?;
        scene.rename("other0", DEVICE)?;
        scene.flows_again("carried again", IN_TIME)
    })
}

/// Each change comes while the other one is being made.
#[test]
fn tunnel_flaps_during_reloads() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).run("tunnel flaps during reloads", |scene| {
            let more = "\n[[policy]]\nname = \"extra\"\nfrom = [\"2001:db8:e::/48\"]\nvia = [\"sixxs0\", \"sixxs1\"]\n";
            let configs = [format!("{}{more}", scene.config), scene.config.clone()];
            let (world, daemon) = (scene.world, &scene.daemon);
            // Enough of both, whichever is faster.
            let (reloads, mut taken) = (AtomicUsize::new(0), [0, 0]);
            std::thread::scope(|scope| -> Result<()> {
                let flapping = scope.spawn(|| -> Result<()> {
                    for round in (0_u64..).take_while(|round| *round < 20 || reloads.load(Ordering::Relaxed) < 10) {
                        world.set_tunnel(0, false)?;
                        std::thread::sleep(Duration::from_millis(round % 7));
                        world.set_tunnel(0, true)?;
                        std::thread::sleep(Duration::from_millis(round % 5 * 3));
                    }
                    Ok(())
                });
                while !flapping.is_finished() {
                    let which = reloads.load(Ordering::Relaxed) % 2;
                    daemon.write_config(&configs[which])?;
                    // A tunnel that goes at the wrong moment cannot be given a route: then the old configuration stays.
                    let output = daemon.client(&["reload"])?;
                    let said = String::from_utf8_lossy(&output.stderr).into_owned();
                    let success = output.status.success();
                    ensure!(success || said.contains("cannot be applied in full"), "{said}");
                    if success {
                        let policies = daemon.status()?["policies"].as_array().map(Vec::len);
                        ensure!(policies == Some([3, 2][which]), "taken, and not in force: {policies:?} policies");
                        taken[which] += 1;
                        reloads.fetch_add(1, Ordering::Relaxed);
                    }
                }
                flapping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?;
            ensure!(taken.iter().all(|taken| *taken >= 5), "too few reloads were taken: {taken:?}");
            scene.flows_again("carried again", IN_TIME)?;
            scene.daemon.write_config(&scene.config)?;
            scene.daemon.reload()?;
            scene.within("no problems", IN_TIME, |scene| {
                Ok(scene.daemon.status()?["problems"] == serde_json::json!([]))
            })?;
            scene.flows_again("carried", IN_TIME)
        })?;
    }
    Ok(())
}

/// The name is what counts: another device under it is the tunnel.
#[test]
fn tunnel_is_recreated() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).run("tunnel is recreated", |scene| {
            let before = scene.world.host.ifindex(DEVICE)?;
            scene.host(&format!("link del {DEVICE}"))?;
            scene.within("given up", IN_TIME, |scene| scene.tunnel_is("pending"))?;
            scene.world.set_present(0, true)?;
            ensure!(scene.world.host.ifindex(DEVICE)? != before, "the same number again");
            scene.flows_again("carried again", IN_TIME)
        })?;
    }
    Ok(())
}

/// A redirect to a number that is somebody else's by now delivers the policy's packets to him.
#[test]
fn ifindex_is_reused_by_a_stranger() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).run("ifindex reused by a stranger", |scene| {
            let index = scene.world.host.ifindex(DEVICE)?;
            let client = &scene.world.client;
            let mut capture = Capture::everywhere(client)?;
            scene.host(&format!(
                "link del {DEVICE}\nlink add stranger index {index} up type veth peer name stranger-peer netns {}",
                client.name()
            ))?;
            client.ip("link set stranger-peer up")?;
            ensure!(scene.world.host.ifindex("stranger")? == index);
            scene.within("given up", IN_TIME, |scene| scene.tunnel_is("pending"))?;
            std::thread::sleep(Duration::from_millis(300));
            let plan = &TUNNELS[0];
            let astray = |seen: &Seen| {
                seen.device == "stranger-peer"
                    && seen.src.is_some_and(|src| src == plan.client.v6 || src == plan.host.v6)
            };
            let astray = capture.drain()?.into_iter().filter(astray).count();
            ensure!(astray == 0, "{astray} packets were delivered to the stranger");
            scene.world.set_present(0, true)?;
            scene.flows_again("carried again", IN_TIME)?;
            scene.host("link del stranger")
        })?;
    }
    Ok(())
}

/// The daemon follows nothing for a moment, and its heartbeat is still valid, when the tunnel's number goes to another uplink,
/// which gets the default routes. No packet of a policy leaves by it.
#[test]
fn ifindex_is_reused_by_an_uplink_unseen() -> Result<()> {
    for family in Family::ALL {
        let setting = Setting { family, changed: &["default"], ..Setting::new("both") };
        setting.run("ifindex reused by an uplink unseen", |scene| {
            let (world, plan) = (scene.world, &TUNNELS[0]);
            let index = world.host.ifindex(DEVICE)?;
            scene.daemon.freeze()?;
            scene.host(&format!(
                "link del {DEVICE}\nlink add net1 index {index} type veth peer name spare netns {}\n\
                 link set net1 arp off up",
                world.isp.name()
            ))?;
            world.isp.ip("link set spare up")?;
            let mut capture = Capture::on(&world.isp, "spare")?;
            scene.host("-4 route replace default dev net1\n-6 route replace default dev net1")?;
            ensure!(world.host.ifindex("net1")? == index);
            let own = |seen: &Seen| [plan.client, plan.host].map(|addrs| Some(addrs.of(family))).contains(&seen.src);
            // What belongs to no policy takes the new uplink.
            let (plain, remote) = (PLAIN_CLIENT.of(family), REMOTE.of(family));
            until("the new uplink carries packets", || {
                ping_briefly(&world.client, plain, remote)?;
                let seen = capture.drain()?;
                let leaked = seen.iter().filter(|seen| own(seen)).count();
                ensure!(leaked == 0, "{leaked} packets left by the new uplink");
                Ok(seen.iter().any(|seen| seen.src == Some(plain)))
            })?;
            capture.ensure_none(own, Duration::from_millis(500))?;
            scene.daemon.signal(Signal::SIGCONT)?;
            scene.within("given up", IN_TIME, |scene| scene.tunnel_is("pending"))?;
            capture.ensure_none(own, Duration::from_millis(100))?;
            scene.host(&format!(
                "link del net1\n-4 route replace default via {} dev net0\n-6 route replace default via {} dev net0",
                ISP.v4, ISP.v6
            ))?;
            world.set_present(0, true)?;
            scene.flows_again("carried again", IN_TIME)
        })?;
    }
    Ok(())
}

/// As udev names devices at boot: a tunnel and the uplink exchange their names while the daemon loads its programs, which end
/// up on the devices that have the configured names then.
#[test]
fn names_are_exchanged_while_programs_are_loaded() -> Result<()> {
    let other = TUNNELS[1].device;
    for (mode, delay) in ["both", "ebpf"].into_iter().flat_map(|mode| [0, 150].map(|delay| (mode, delay))) {
        let world = World::with(TunnelKind::Veth).build()?;
        let config = format!("datapath = \"{mode}\"\n{}", world.config());
        // Back and forth again.
        for _ in 0..2 {
            let mut daemon = Daemon::spawn(&world, &config, &DaemonOptions::default())?;
            let log = daemon.log().len();
            until("it answers", || Ok(daemon.client(&["status"])?.status.success()))?;
            std::thread::sleep(Duration::from_millis(delay));
            world.host.ip(&format!(
                "link set net0 down\nlink set {other} down\nlink set net0 name away\nlink set {other} name net0\n\
                 link set away name {other}\nlink set net0 up\nlink set {other} up"
            ))?;
            daemon.wait_ready()?;
            let told = |daemon: &Daemon<'_>| format!("{mode}, {delay} ms; log:\n{}", daemon.log());
            for (device, hook, wanted) in [("lan0", "ingress", 1), ("net0", "egress", 1), (other, "egress", 0)] {
                until("the programs are in place", || Ok(programs(&world.host, device, hook)? == wanted))
                    .with_context(|| format!("{device} {hook}; {}", told(&daemon)))?;
            }
            until("nothing to do", || Ok(daemon.client(&["plan"])?.status.success())).with_context(|| told(&daemon))?;
            for family in Family::ALL {
                let (src, dst) = (TUNNELS[0].client.of(family), REMOTE.of(family));
                reach(&world.client, src, dst).with_context(|| told(&daemon))?;
            }
            let said = daemon.log().get(log..).unwrap_or_default().to_owned();
            ensure!(!said.contains("File exists"), "{}", told(&daemon));
            daemon.down()?;
        }
    }
    Ok(())
}

#[test]
fn tunnel_moves_to_another_namespace() -> Result<()> {
    Setting::new("both").run("tunnel moves to another namespace", |scene| {
        let host = scene.world.host.name().to_owned();
        let client = &scene.world.client;
        scene.host(&format!("link set {DEVICE} netns {}", client.name()))?;
        scene.within("given up", IN_TIME, |scene| scene.tunnel_is("pending"))?;
        scene.ensure_silence(Duration::from_millis(200))?;
        client.ip(&format!("link set {DEVICE} netns {host}"))?;
        ask_neighbours_often(&scene.world.host, DEVICE)?;
        let own = TUNNELS[0].host;
        scene.host(&format!(
            "link set {DEVICE} up\naddr add {}/32 dev {DEVICE}\naddr add {}/128 dev {DEVICE} nodad",
            own.v4, own.v6
        ))?;
        scene.flows_again("carried again", IN_TIME)
    })
}

#[test]
fn mtu_changes() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).lossless().run("MTU changes", |scene| {
            for mtu in [1280, 1400] {
                scene.host(&format!("link set {DEVICE} mtu {mtu}"))?;
                let followed = format!("mtu {mtu} followed");
                scene.within(&followed, IN_TIME, |scene| Ok(scene.daemon.status()?["tunnels"][0]["mtu"] == mtu))?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The kernel takes IPv6 from a tunnel: IPv6 is as if the tunnel were down, and IPv4 goes on by the fast path.
#[test]
fn a_family_is_taken_from_the_tunnel() -> Result<()> {
    const DISABLE: &str = "ipv6/conf/sixxs0/disable_ipv6";
    for mode in ["kernel", "both", "ebpf"] {
        let setting = Setting { kind: TunnelKind::Tun, family: Family::V4, ..Setting::new(mode) };
        setting.lossless().run("IPv6 taken from a tunnel", |scene| {
            let (plan, remote) = (&TUNNELS[0], REMOTE.v6.into());
            let world = scene.world;
            let ask = || ping_briefly(&world.client, plan.client.v6.into(), remote);
            for (disabled, mtu, reason) in [("1", 1400, "IPv6 is disabled on sixxs0"), ("0", 1200, "IPv6 needs 1280")] {
                scene.within("answered before", IN_TIME, |_| Ok(ask()? == Answer::Reply))?;
                let mut uplink = Capture::on(&world.host, "net0")?;
                world.host.sysctl(&[(DISABLE, disabled)])?;
                scene.host(&format!("link set {DEVICE} mtu {mtu}"))?;
                scene.within(reason, IN_TIME, |scene| {
                    let tunnel = scene.daemon.status()?["tunnels"][0].take();
                    ensure!(tunnel["state"] == "up", "{tunnel}");
                    Ok(tunnel["unable"]["v6"].as_str().is_some_and(|told| told.contains(reason)))
                })?;
                let since = scene.daemon.counters()?;
                ensure!(ask()? != Answer::Reply, "an answer");
                uplink.ensure_none(|seen| seen.src == Some(plan.client.v6.into()), Duration::from_millis(100))?;
                scene.flows_again("IPv4", IN_TIME)?;
                let status = scene.daemon.status()?;
                let policy = &status["policies"][0];
                ensure!(policy["active"] == json!({"v4": DEVICE, "v6": "(unreachable)"}), "{policy}");
                ensure!(status["problems"] == json!([]), "{status:#}");
                if mode != "kernel" {
                    ensure!(status["fast_path"]["state"] == "on", "{status:#}");
                    ensure!(
                        scene.daemon.counters()?.packets("tunnel0", "forwarded")?
                            > since.packets("tunnel0", "forwarded")?
                    );
                }
                // Below 1280 there is no such setting.
                scene.host(&format!("link set {DEVICE} mtu 1400"))?;
                world.host.sysctl(&[(DISABLE, "0")])?;
                scene.host(&format!("-6 addr replace {}/128 dev {DEVICE} nodad", plan.host.v6))?;
                scene.within("able again", IN_TIME, |_| Ok(ask()? == Answer::Reply))?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// tun and wg devices never say that they are up: their state is UNKNOWN.
#[test]
fn operstate_is_unknown() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        let setting = Setting { kind: TunnelKind::Tun, ..Setting::new(mode) };
        setting.lossless().run("operstate UNKNOWN is up", |scene| {
            let link = scene.ip(&format!("link show {DEVICE}"))?;
            ensure!(link.contains("state UNKNOWN"), "{link}");
            ensure!(scene.tunnel_is("up")?, "not up");
            std::thread::sleep(Duration::from_millis(300));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn wildcard_ingress_follows_new_devices() -> Result<()> {
    let config = |config: String| config.replace("[\"lan0\"]", "[\"lan0\", \"br-*\"]");
    let setting = Setting { config, changed: &["br-"], ..Setting::new("both") };
    setting.lossless().run("wildcard ingress", |scene| {
        for _ in 0..2 {
            scene.host("link add br-guests type veth peer name guests")?;
            scene.within("attached", IN_TIME, |scene| Ok(scene.programs("br-guests", "ingress")? == 1))?;
            scene.host("addr add 2001:db8:9::1/64 dev br-guests nodad\nlink set guests up\nlink set br-guests up")?;
            let table = scene.table()?;
            let exempt = |scene: &Scene<'_>| scene.exempt(table, "2001:db8:9::/64");
            scene.within("exempt", IN_TIME, exempt)?;
            scene.rename("br-guests", "other")?;
            scene.within("detached from what is renamed", IN_TIME, |scene| {
                Ok(scene.programs("other", "ingress")? == 0)
            })?;
            scene.host("link del other")?;
            scene.within("no longer exempt", IN_TIME, |scene| Ok(!exempt(scene)?))?;
        }
        Ok(())
    })
}

#[test]
fn address_and_connected_prefix_change() -> Result<()> {
    for mode in ["kernel", "both"] {
        let setting = Setting { changed: &["2001:db8:77:"], ..Setting::new(mode) };
        setting.lossless().run("connected prefix comes and goes", |scene| {
            let table = scene.table()?;
            let exempt = |scene: &Scene<'_>| scene.exempt(table, "2001:db8:77::/64");
            scene.host("addr add 2001:db8:77::1/64 dev lan0 nodad")?;
            scene.within("exempt", IN_TIME, exempt)?;
            scene.host("addr del 2001:db8:77::1/64 dev lan0")?;
            scene.within("no longer exempt", IN_TIME, |scene| Ok(!exempt(scene)?))
        })?;
    }
    Ok(())
}

#[test]
fn uplink_goes_down_and_up() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        let setting = Setting { changed: &["net0"], ..Setting::new(mode) };
        // Without rules the host's own packets are guarded on the uplink: without one they have nowhere to go.
        let setting = Setting { lossless: mode != "ebpf", ..setting };
        setting.run("uplink down and up", |scene| {
            scene.host("link set net0 down")?;
            std::thread::sleep(Duration::from_millis(200));
            scene.host("link set net0 up")?;
            scene.host(
                "-6 route replace default via 2001::ff dev net0\n-4 route replace default via 192.0.2.2 dev net0",
            )?;
            let guarded = usize::from(mode != "kernel");
            scene.within("guarded", IN_TIME, |scene| Ok(scene.programs("net0", "egress")? == guarded))
        })?;
    }
    Ok(())
}

/// Without a tunnel the main table would be next, whatever stands there.
#[test]
fn default_route_of_main_is_replaced() -> Result<()> {
    for mode in ["kernel", "both"] {
        let setting = Setting { changed: &["default"], ..Setting::new(mode) };
        setting.lossless().run("default route replaced", |scene| {
            for gateway in ["2001::fe", "2001::ff"] {
                scene.host(&format!("-6 route replace default via {gateway} dev net0"))?;
                std::thread::sleep(Duration::from_millis(100));
            }
            scene.host("-6 route del default\n-6 route add default via 2001::ff dev net0")
        })?;
    }
    Ok(())
}

impl Scene<'_> {
    /// Is a destination exempt in the table of policy 0?
    fn exempt(&self, table: u64, prefix: &str) -> Result<bool> {
        let routes = self.routes(table).context("routes")?;
        Ok(routes.iter().any(|route| route.starts_with(&format!("throw {prefix}"))))
    }
}
