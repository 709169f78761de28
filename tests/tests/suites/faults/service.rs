//! The daemon itself is stopped, killed, restarted, given another configuration, or deprived of its disk.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::Signal,
};
use tunroute_tests::{Daemon, DaemonOptions, Earlier, TUNNELS, snapshot::has_tcx};

use super::scene::{IN_TIME, Scene, Setting};

/// What the log calls changes.
const CHANGES: [&str; 6] = ["ip ", "ip -6", "map policy", "attach", "fast path IP", "prefix maps"];

fn restart(scene: &mut Scene<'_>, options: &DaemonOptions) -> Result<()> {
    scene.daemon = Daemon::start(scene.world, &scene.config, options)?;
    Ok(())
}

/// A daemon that died leaves everything working; the next one adopts it and has nothing to change.
#[test]
fn killed_and_restarted() -> Result<()> {
    for (mode, attach) in [("kernel", None), ("both", None), ("ebpf", None), ("both", Some("clsact"))] {
        let options = DaemonOptions { attach, ..DaemonOptions::default() };
        Setting { options: options.clone(), ..Setting::new(mode) }.lossless().run("kill -9 and restart", |scene| {
            for _ in 0..3 {
                scene.daemon.kill9()?;
                std::thread::sleep(Duration::from_millis(50));
                let log = scene.log_end();
                restart(scene, &options)?;
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
        scene.flows_again("carried again", IN_TIME)
    })
}

/// Maps of another layout give way to new ones, and programs are exchanged in the links that are there. (Without TCX there
/// are none.)
#[test]
fn another_layout_is_replaced() -> Result<()> {
    if !has_tcx() {
        return Ok(());
    }
    for mode in ["both", "ebpf"] {
        Setting::new(mode).lossless().run("upgrade from another layout", |scene| {
            scene.daemon.kill9()?;
            let earlier = Earlier::take_over(scene.world)?;
            scene.flows_again("carried by the earlier version", IN_TIME)?;
            restart(scene, &DaemonOptions::default())?;
            earlier.ensure_gone(scene.world)?;
            ensure!(scene.programs("lan0", "ingress")? == 1 && scene.programs("net0", "egress")? == 1, "programs");
            scene.flows_again("carried", IN_TIME)
        })?;
    }
    Ok(())
}

/// The daemon's wall clock jumps by years. What it does goes by clocks that do not.
#[test]
fn the_clock_jumps() -> Result<()> {
    const YEAR: i64 = 365 * 24 * 60 * 60;
    let library = tempfile::Builder::new().prefix("tr-clock-").tempdir()?;
    let (preload, offset) = (library.path().join("clock.so"), library.path().join("offset"));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/suites/faults/clock.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", source, "-o"]).arg(&preload).output();
    let built = built.context("cannot start cc, with which cargo links")?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let variables = [("LD_PRELOAD", &preload), ("WALL_CLOCK_OFFSET", &offset)];
    let env = variables.map(|(name, path)| (name.to_owned(), path.display().to_string())).to_vec();
    let options = DaemonOptions { env, ..DaemonOptions::default() };
    // A tunnel that fails to start, with a limit; and one whose probe must go on being answered.
    let config = |config: String| {
        let probe = "probe = { target = \"2001:db8:ee::1\", interval = \"100ms\", timeout = \"90ms\", fail = 5 }";
        config.replace("[tunnel.sixxs0]", &format!("[tunnel.sixxs0]\n{probe}"))
            + "\n[tunnel.late0]\nup = [\"false\"]\nstart-limit = { burst = 2, interval = \"600s\" }\n"
    };
    fs::write(&offset, "0")?;
    Setting { options: options.clone(), config, ..Setting::new("both") }.lossless().run("the clock jumps", |scene| {
        let limited = |scene: &Scene<'_>| {
            let status = scene.daemon.status()?;
            let command = &status["tunnels"][2]["command"];
            Ok(command["starts-in-window"] == 2 && (command["state"] == "limited" || command["state"] == "given-up"))
        };
        scene.within("the start limit is reached", IN_TIME, limited)?;
        for years in [10, -10, 0, -30, 0] {
            fs::write(&offset, (years * YEAR).to_string())?;
            let log = scene.log_end();
            let decided = scene.daemon.counters()?.packets("tunnel0", "forwarded")?;
            std::thread::sleep(Duration::from_millis(700));
            scene.daemon.reload()?;
            // Its log shows that it lives in that year.
            let year = scene.daemon.log().get(log..log + 4).and_then(|year| year.parse::<i64>().ok());
            let now = i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs())? / YEAR + 1970;
            ensure!(year.is_some_and(|year| (year - now - years).abs() <= 1), "{years} years: the log says {year:?}");
            scene.within("the fast path decides", IN_TIME, |scene| {
                Ok(scene.daemon.counters()?.packets("tunnel0", "forwarded")? > decided + 500)
            })?;
            ensure!(limited(scene)?, "{years} years: {:#}", scene.daemon.status()?["tunnels"]);
            ensure!(scene.said(log, "does not answer") == 0, "{years} years: a probe has failed");
        }
        // A daemon that starts under another clock knows of the starts before.
        for years in [20, -20] {
            scene.daemon.kill9()?;
            fs::write(&offset, (years * YEAR).to_string())?;
            restart(scene, &options)?;
            std::thread::sleep(Duration::from_millis(1500));
            let command = &scene.daemon.status()?["tunnels"][2]["command"];
            ensure!(command["starts-in-window"] == 2, "{years} years, restarted: {command:#}");
        }
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
            scene.within("back by SIGHUP", IN_TIME, |scene| {
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
            scene.within(&format!("{mode}: programs"), IN_TIME, |scene| {
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

/// Policies that do not fit the fast path's map: each inner one is inside each outer one, and every pair is a chain with a
/// slot of its own.
fn too_many_policies() -> String {
    let outer = (0..70).map(|n| (format!("outer{n}"), format!("\"3000:{n:x}::/32\"")));
    let inner = (0..70).map(|n| {
        let prefixes: Vec<String> = (0..70).map(|outer| format!("\"3000:{outer:x}:{n:x}::/48\"")).collect();
        (format!("inner{n}"), prefixes.join(", "))
    });
    outer
        .chain(inner)
        .map(|(name, from)| format!("\n[[policy]]\nname = \"{name}\"\nfrom = [{from}]\nvia = [\"sixxs1\"]\n"))
        .collect()
}

#[test]
fn reload_is_refused_for_a_full_map() -> Result<()> {
    refused("reload that does not fit the map", "both", |scene| scene.config.clone() + &too_many_policies(), "slots")
}

/// At a start there is no configuration to go back to: the kernel carries what does not fit, and what happens is followed.
#[test]
fn start_that_does_not_fit_the_map() -> Result<()> {
    for mode in ["both", "ebpf"] {
        Setting::new(mode).run("start that does not fit the map", |scene| {
            let carried_by = |scene: &Scene<'_>, carrier: &str| -> Result<bool> {
                Ok(scene.daemon.status()?["policies"][0]["carried_by"]["v6"] == carrier)
            };
            scene.daemon.terminate()?;
            let good = scene.config.clone();
            scene.config = good.clone() + &too_many_policies();
            restart(scene, &DaemonOptions::default())?;
            scene.flows_again("carried by the kernel", IN_TIME)?;
            let status = scene.daemon.status()?;
            let reasons = status["fast_path"]["reasons"].to_string();
            ensure!(reasons.contains("slots") && status["problems"] == serde_json::json!([]), "{status:#}");
            ensure!(carried_by(scene, "kernel")? && scene.own_rules()?.len() > 4900, "{status:#}");
            scene.world.set_tunnel(0, false)?;
            scene.within("seen down", IN_TIME, |scene| scene.tunnel_is("down"))?;
            scene.ensure_silence(Duration::from_millis(200))?;
            scene.world.set_tunnel(0, true)?;
            scene.flows_again("carried again", IN_TIME)?;
            scene.daemon.write_config(&good)?;
            scene.daemon.reload()?;
            scene.config = good;
            scene.within("the fast path is back", IN_TIME, |scene| carried_by(scene, "fast path"))?;
            ensure!(scene.own_rules()?.is_empty() == (mode == "ebpf"), "rules");
            scene.flows_again("carried", IN_TIME)
        })?;
    }
    Ok(())
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
    scene.flows_again("carried", IN_TIME)
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
