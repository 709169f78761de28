//! The daemon itself is stopped, killed, restarted, given another configuration, or deprived of its disk.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::Signal,
};
use tunroute_common::maps::LAYOUT_VERSION;
use tunroute_tests::{Daemon, DaemonOptions, TUNNELS};

use crate::scene::{SECOND, Scene, Setting};

/// What the log calls changes.
const CHANGES: [&str; 6] = ["ip ", "ip -6", "map policy", "attach", "fast path IP", "prefix maps"];

fn restart(scene: &mut Scene<'_>, options: &DaemonOptions) -> Result<()> {
    scene.daemon = Daemon::start(scene.world, &scene.config, options)?;
    Ok(())
}

/// A daemon that died leaves everything working; the next one adopts it and has nothing to change.
#[test]
fn killed_and_restarted() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).lossless().run("kill -9 and restart", |scene| {
            for _ in 0..3 {
                scene.daemon.kill9()?;
                std::thread::sleep(Duration::from_millis(50));
                let log = scene.log_end();
                restart(scene, &DaemonOptions::default())?;
                let said: usize = CHANGES.iter().map(|change| scene.said(log, change)).sum();
                ensure!(said == 0, "the restarted daemon changed something");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn terminated_and_restarted() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).lossless().run("SIGTERM and restart", |scene| {
            scene.daemon.terminate()?;
            let log = scene.log_end();
            restart(scene, &DaemonOptions::default())?;
            let said: usize = CHANGES.iter().map(|change| scene.said(log, change)).sum();
            ensure!(said == 0, "the restarted daemon changed something");
            Ok(())
        })?;
    }
    Ok(())
}

/// What happened while no daemon ran is put right by the next one.
#[test]
fn changed_while_dead() -> Result<()> {
    Setting::new("both").run("changed while no daemon ran", |scene| {
        scene.daemon.kill9()?;
        let rules = scene.own_rules()?;
        let one = rules.first().cloned().unwrap_or_default();
        scene.host(&format!("-6 rule del {one}"))?;
        scene.world.set_tunnel(0, false)?;
        scene.world.set_tunnel(0, true)?;
        restart(scene, &DaemonOptions::default())?;
        ensure!(scene.own_rules()? == rules, "rules");
        scene.flows_again("carried again", SECOND)
    })
}

/// Maps of another layout give way to new ones, and programs are exchanged in the links that are there.
#[test]
fn another_layout_is_replaced() -> Result<()> {
    for mode in ["both", "ebpf"] {
        Setting::new(mode).lossless().run("upgrade to another layout", |scene| {
            let pins = scene.world.pin_dir();
            scene.daemon.kill9()?;
            fs::rename(pins.join(format!("v{LAYOUT_VERSION}")), pins.join("v0")).context("cannot rename the maps")?;
            restart(scene, &DaemonOptions::default())?;
            ensure!(!pins.join("v0").exists(), "the old maps are still there");
            ensure!(scene.programs("lan0", "ingress")? == 1 && scene.programs("net0", "egress")? == 1, "programs");
            scene.flows_again("carried", SECOND)
        })?;
    }
    Ok(())
}

/// Nobody follows the devices when the heartbeat is over: the ingress program steps aside, and the kernel carries on.
#[test]
fn stopped_for_a_while() -> Result<()> {
    Setting::new("both").run("SIGSTOP for 12 s, then SIGCONT", |scene| {
        scene.daemon.signal(Signal::SIGSTOP)?;
        // The heartbeat is valid for 10 s.
        std::thread::sleep(Duration::from_secs(12));
        let arrived = scene.forwarded();
        scene.flows_again("carried by the kernel", SECOND)?;
        scene.world.set_tunnel(0, false)?;
        scene.world.set_tunnel(0, true)?;
        scene.daemon.signal(Signal::SIGCONT)?;
        scene.flows_again("caught up", SECOND)?;
        let decided = scene.daemon.counters()?.packets("tunnel0", "forwarded")?;
        // Two seconds' worth was left to the kernel; half of it is the margin.
        ensure!(decided + 2000 < arrived as u64, "the fast path decided {decided} of {arrived} packets");
        Ok(())
    })
}

fn second_policy_too(scene: &Scene<'_>) -> String {
    format!("{}\n[[policy]]\nname = \"extra\"\nfrom = [\"2001:db8:e::/48\"]\nvia = [\"sixxs1\"]\n", scene.config)
}

#[test]
fn policies_change_by_reload() -> Result<()> {
    for mode in ["kernel", "both", "ebpf"] {
        Setting::new(mode).lossless().run("reload with changed policies", |scene| {
            let plan = &TUNNELS[0];
            let split = scene.config.replace(
                &format!("\"{}\", \"{}\"]\nvia = [\"sixxs0\"]", plan.prefix.v4, plan.prefix.v6),
                &format!(
                    "\"{}\"]\nvia = [\"sixxs0\"]\n[[policy]]\nname = \"client\"\nfrom = [\"{}\", \"{}\"]\nvia = [\"sixxs0\"]",
                    plan.prefix.v4, plan.prefix.v6, plan.client.v6
                ),
            );
            ensure!(split != scene.config, "{}", scene.config);
            let configs = [second_policy_too(scene), split, scene.config.replace("name = \"tunnel0\"", "name = \"other\"")];
            for config in &configs {
                scene.daemon.write_config(config)?;
                scene.daemon.reload()?;
                std::thread::sleep(Duration::from_millis(100));
            }
            scene.daemon.write_config(&scene.config)?;
            scene.daemon.signal(Signal::SIGHUP)?;
            scene.within("back by SIGHUP", SECOND, |scene| {
                Ok(scene.daemon.status()?["policies"][0]["name"] == "tunnel0")
            })
        })?;
    }
    Ok(())
}

#[test]
fn datapath_changes_by_reload() -> Result<()> {
    Setting::new("kernel").lossless().run("reload through all datapaths", |scene| {
        for mode in ["both", "shadow", "both", "ebpf", "shadow", "ebpf", "kernel", "shadow", "kernel"] {
            let config = scene.config.replace("datapath = \"kernel\"", &format!("datapath = \"{mode}\""));
            scene.daemon.write_config(&config)?;
            scene.daemon.reload()?;
            let programs = usize::from(mode != "kernel");
            // A link whose pin is removed goes a moment later (`bpf_link_put()` in kernel/bpf/syscall.c).
            scene.within(&format!("{mode}: programs"), SECOND, |scene| {
                Ok(scene.programs("lan0", "ingress")? == programs && scene.programs("net0", "egress")? == programs)
            })?;
            ensure!(scene.own_rules()?.is_empty() == (mode == "ebpf"), "{mode}: rules");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    })
}

/// A configuration that is refused changes nothing, and the answer says why.
fn refused(name: &str, mode: &'static str, config: impl Fn(&Scene<'_>) -> String, why: &str) -> Result<()> {
    Setting::new(mode).lossless().run(name, |scene| {
        let before = scene.world.host.snapshot()?;
        scene.daemon.write_config(&config(scene))?;
        let log = scene.log_end();
        let Err(error) = scene.daemon.reload() else { anyhow::bail!("it was taken") };
        ensure!(format!("{error:#}").contains(why), "another reason: {error:#}");
        ensure!(scene.said(log, "the old configuration stays in force") == 1, "the log does not say so");
        before.ensure_same(&scene.world.host.snapshot()?)?;
        let names = scene.daemon.status()?["policies"].as_array().map_or(0, Vec::len);
        ensure!(names == 2, "{names} policies");
        // What changes later is followed as the old configuration says.
        scene.daemon.write_config(&scene.config)?;
        scene.daemon.reload()
    })
}

#[test]
fn reload_is_refused_for_a_mistake() -> Result<()> {
    let config = |scene: &Scene<'_>| format!("{}\nnonsense = 1\n", second_policy_too(scene));
    refused("reload with a mistake", "both", config, "nonsense")
}

#[test]
fn reload_is_refused_for_a_taken_table() -> Result<()> {
    for mode in ["kernel", "both"] {
        let config = |scene: &Scene<'_>| format!("{}table = 999\n", second_policy_too(scene));
        refused("reload with a taken table", mode, config, "table 999")?;
    }
    Ok(())
}

#[test]
fn reload_is_refused_for_a_full_map() -> Result<()> {
    // Each inner policy is inside each outer one: every pair is a chain with a slot of its own.
    let config = |scene: &Scene<'_>| {
        let outer = (0..70).map(|n| (format!("outer{n}"), format!("\"3000:{n:x}::/32\"")));
        let inner = (0..70).map(|n| {
            let prefixes: Vec<String> = (0..70).map(|outer| format!("\"3000:{outer:x}:{n:x}::/48\"")).collect();
            (format!("inner{n}"), prefixes.join(", "))
        });
        let policies = outer
            .chain(inner)
            .map(|(name, from)| format!("\n[[policy]]\nname = \"{name}\"\nfrom = [{from}]\nvia = [\"sixxs1\"]\n"));
        scene.config.clone() + &policies.collect::<String>()
    };
    refused("reload that does not fit the map", "both", config, "slots")
}

/// A small disk of its own for the state directory.
fn state_disk(scene: &Scene<'_>) -> Result<PathBuf> {
    let state = scene.world.host.dir().join("state");
    mount(Some("tmpfs"), &state, Some("tmpfs"), MsFlags::empty(), Some("size=64k,mode=700"))
        .with_context(|| format!("cannot mount on {}", state.display()))?;
    Ok(state)
}

/// Reloads change which tables are allocated, which cannot be remembered: it is said once, and goes on.
fn without_state(scene: &mut Scene<'_>) -> Result<()> {
    let log = scene.log_end();
    for config in [second_policy_too(scene), scene.config.clone(), second_policy_too(scene)] {
        scene.daemon.write_config(&config)?;
        scene.daemon.reload()?;
    }
    let said = scene.said(log, "its old content is kept");
    ensure!(said == 1, "said {said} times");
    scene.flows_again("carried", SECOND)
}

#[test]
fn state_directory_is_full() -> Result<()> {
    Setting::new("both").lossless().run("state directory full", |scene| {
        scene.daemon.terminate()?;
        let state = state_disk(scene)?;
        restart(scene, &DaemonOptions::default())?;
        let filled =
            (0..).map(|n| fs::write(state.join(format!("fill-{n}")), [0; 4096])).position(|result| result.is_err());
        ensure!(filled.is_some_and(|files| files > 0), "not full");
        without_state(scene)
    })
}

#[test]
fn state_directory_is_read_only() -> Result<()> {
    Setting::new("both").lossless().run("state directory read-only", |scene| {
        scene.daemon.terminate()?;
        let state = state_disk(scene)?;
        restart(scene, &DaemonOptions::default())?;
        scene.daemon.terminate()?;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &state, None::<&str>, flags, None::<&str>).context("cannot make it read-only")?;
        restart(scene, &DaemonOptions::default())?;
        without_state(scene)?;
        scene.daemon.kill9()?;
        restart(scene, &DaemonOptions::default())
    })
}
