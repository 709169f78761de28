//! Others detach, unpin and unmount, and settings change that the fast path depends on.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tunroute::policy::net::Family;
use tunroute_common::maps::{LAYOUT_VERSION, names};
use tunroute_tests::{DaemonOptions, nft, offload::programs, snapshot::has_tcx};

use super::{
    scene::{IN_TIME, OUR_FILTERS, Scene, Setting},
    tools,
};

/// All programs are on their hooks and pinned.
fn in_place(scene: &Scene<'_>) -> Result<bool> {
    let pins = fs::read_dir(scene.world.pin_dir().join("links")).map_or(0, Iterator::count);
    Ok(scene.programs("lan0", "ingress")? == 1 && scene.programs("net0", "egress")? == 1 && pins == programs())
}

/// May the fast path decide this scene's packets?
fn open(scene: &Scene<'_>, family: &str) -> Result<bool> {
    Ok(scene.daemon.status()?["policies"][0]["carried_by"][family] == "fast path")
}

/// Removes programs or pins; they come back in time, no packet is lost meanwhile, and the log says what happened: once, or if
/// they are removed in so many steps, perhaps as often.
fn restored(name: &str, words: &str, steps: usize, remove: impl Fn(&Scene<'_>) -> Result<()>) -> Result<()> {
    for mode in ["both", "ebpf"] {
        Setting::new(mode).lossless().run(name, |scene| {
            ensure!(in_place(scene)?, "not in place before the fault");
            let log = scene.log_end();
            remove(scene)?;
            scene.within("restored", IN_TIME, in_place)?;
            scene.flows_again("carried", IN_TIME)?;
            let said = scene.said(log, words);
            ensure!((1..=steps).contains(&said), "{said} lines say what happened");
            Ok(())
        })?;
    }
    Ok(())
}

/// Takes a program off its hook by force: its link, or its filter where there is no TCX.
fn detach(scene: &Scene<'_>, device: &str, hook: &str) -> Result<()> {
    let host = &scene.world.host;
    if has_tcx() {
        let name = format!("{hook}-{}", host.ifindex(device)?);
        return tools::detach_link(&scene.world.pin_dir().join("links").join(name));
    }
    host.query("tc", &format!("filter del dev {device} {hook} {OUR_FILTERS}")).map(drop)
}

#[test]
fn ingress_link_is_detached() -> Result<()> {
    restored("ingress link detached", "another program has detached ingress dev lan0", 1, |scene| {
        detach(scene, "lan0", "ingress")
    })
}

#[test]
fn egress_link_is_detached() -> Result<()> {
    // In `ebpf` mode the host's own packets would have nothing left: that is in the README.
    Setting::new("both").lossless().run("egress link detached", |scene| {
        detach(scene, "net0", "egress")?;
        scene.within("restored", IN_TIME, in_place)
    })
}

#[test]
fn link_pins_are_removed() -> Result<()> {
    restored("link pins removed", "another program has", programs(), |scene| {
        for link in fs::read_dir(scene.world.pin_dir().join("links"))? {
            fs::remove_file(link?.path())?;
        }
        Ok(())
    })
}

#[test]
fn all_pins_are_removed() -> Result<()> {
    restored("all pins removed", "another program has removed the pinned maps", 1, |scene| {
        // All at once, lest some are made again before the others are gone.
        let gone = scene.world.pin_dir().with_file_name("gone");
        fs::rename(scene.world.pin_dir(), &gone).context("cannot move the pins")?;
        fs::remove_dir_all(gone).context("cannot remove the pins")
    })
}

/// `/sys/fs/bpf` is unmounted under the daemon, which mounts it again and pins what it holds.
#[test]
fn bpffs_is_unmounted() -> Result<()> {
    for mode in ["both", "ebpf"] {
        let options = DaemonOptions { pin_dir: Some("/sys/fs/bpf/tunroute".into()), ..DaemonOptions::default() };
        Setting { options, ..Setting::new(mode) }.lossless().run("bpffs unmounted", |scene| {
            let root = format!("/proc/{}/root", scene.daemon.pid()?);
            let pinned = |root: &str| {
                let maps =
                    fs::read_dir(format!("{root}/sys/fs/bpf/tunroute/v{LAYOUT_VERSION}")).map_or(0, Iterator::count);
                let links = fs::read_dir(format!("{root}/sys/fs/bpf/tunroute/links")).map_or(0, Iterator::count);
                // And the words that INDEX leads to.
                maps == names::ALL.len() + 1 && links == programs()
            };
            ensure!(pinned(&root), "not pinned before the fault");
            let log = scene.log_end();
            let pid = scene.daemon.pid()?.to_string();
            scene.world.host.run("nsenter", &["-t", &pid, "-m", "umount", "-l", "/sys/fs/bpf"])?;
            scene.within("restored", IN_TIME, |_| Ok(pinned(&root)))?;
            scene.flows_again("carried", IN_TIME)?;
            let said = scene.said(log, "another program has removed the pinned maps");
            ensure!(said == 1, "{said} lines say what happened");
            Ok(())
        })?;
    }
    Ok(())
}

/// Where no bpf file system can be mounted again, everything goes on unpinned.
#[test]
fn bpffs_is_unmounted_for_good() -> Result<()> {
    for attach in [None, Some("clsact")] {
        let options = DaemonOptions { attach, ..DaemonOptions::default() };
        Setting { options, ..Setting::new("both") }.lossless().run("bpffs unmounted for good", |scene| {
            let log = scene.log_end();
            let pins = scene.world.pin_dir();
            let mount = pins.parent().context("no parent")?.to_string_lossy().into_owned();
            let pid = scene.daemon.pid()?.to_string();
            scene.world.host.run("nsenter", &["-t", &pid, "-m", "umount", "-l", &mount])?;
            scene.within("said", IN_TIME, |scene| Ok(scene.said(log, "the pinned maps are gone") == 1))?;
            std::thread::sleep(Duration::from_millis(700));
            ensure!(scene.said(log, "the pinned maps are gone") == 1, "said again");
            ensure!(scene.programs("lan0", "ingress")? == 1 && scene.programs("net0", "egress")? == 1, "detached");
            ensure!(open(scene, "v6")?, "closed");
            scene.daemon.reload()?;
            scene.flows_again("carried", IN_TIME)
        })?;
    }
    Ok(())
}

/// With TCX the qdisc has nothing of tunroute's.
#[test]
fn clsact_is_deleted_and_added() -> Result<()> {
    if !has_tcx() {
        return Ok(());
    }
    for mode in ["both", "ebpf"] {
        let setting = Setting { changed: &["clsact", "filter"], ..Setting::new(mode) };
        setting.lossless().run("clsact deleted and added", |scene| {
            for verb in ["del", "add"] {
                for device in ["lan0", "net0"] {
                    scene.world.host.query("tc", &format!("qdisc {verb} dev {device} clsact"))?;
                }
                std::thread::sleep(Duration::from_millis(100));
                scene.within(&format!("in place after {verb}"), IN_TIME, in_place)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Before Linux 6.6 the programs are filters, which go with their qdisc.
#[test]
fn clsact_is_deleted_with_the_filters() -> Result<()> {
    let options = DaemonOptions { attach: Some("clsact"), ..DaemonOptions::default() };
    let setting = Setting { options, changed: &["clsact", "filter"], ..Setting::new("both") };
    setting.lossless().run("clsact deleted with the filters", |scene| {
        let places = [("lan0", "ingress"), ("net0", "egress")];
        let in_place = |scene: &Scene<'_>| -> Result<bool> {
            for (device, hook) in places {
                let filters = scene.world.host.query("tc", &format!("filter show dev {device} {hook}"))?;
                if !filters.contains(&format!("{hook}_l2")) {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        ensure!(in_place(scene)?, "not in place before the fault");
        let log = scene.log_end();
        for (device, _) in places {
            scene.world.host.query("tc", &format!("qdisc del dev {device} clsact"))?;
        }
        scene.within("restored", IN_TIME, in_place)?;
        let said = scene.said(log, "another program has detached");
        ensure!((1..=2).contains(&said), "{said} lines say what happened");
        scene.flows_again("carried", IN_TIME)
    })
}

#[test]
fn forwarding_is_switched_off_and_on() -> Result<()> {
    for mode in ["both", "ebpf"] {
        Setting::new(mode).run("forwarding off and on", |scene| {
            scene.world.host.sysctl(&[("ipv6/conf/all/forwarding", "0")])?;
            scene.within("gate closed", IN_TIME, |scene| Ok(!open(scene, "v6")?))?;
            scene.ensure_silence(Duration::from_millis(200))?;
            scene.world.host.sysctl(&[("ipv6/conf/all/forwarding", "1")])?;
            scene.within("gate open", IN_TIME, |scene| open(scene, "v6"))?;
            scene.flows_again("carried again", IN_TIME)
        })?;
    }
    Ok(())
}

/// Strict reverse path filtering is a promise that the fast path keeps.
#[test]
fn reverse_path_filter_is_set() -> Result<()> {
    for mode in ["kernel", "both"] {
        let setting = Setting { family: Family::V4, ..Setting::new(mode) };
        setting.lossless().run("rp_filter set", |scene| {
            for value in ["1", "0"] {
                scene.world.host.sysctl(&[("ipv4/conf/lan0/rp_filter", value)])?;
                std::thread::sleep(Duration::from_millis(300));
                scene.flows_again(&format!("carried with {value}"), IN_TIME)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Nobody tells of a new firewall; the daemon looks.
#[test]
fn netfilter_chain_is_added_and_removed() -> Result<()> {
    for mode in ["both", "ebpf"] {
        Setting::new(mode).lossless().run("netfilter chain comes and goes", |scene| {
            scene.world.host.run_in(|| nft::add_chain(nft::INET, Some(nft::FORWARD), &[]))?;
            scene.within("gate closed", IN_TIME, |scene| Ok(!open(scene, "v6")?))?;
            scene.flows_again("carried by the kernel", IN_TIME)?;
            scene.world.host.run_in(|| nft::delete_table(nft::INET))?;
            scene.within("gate open", IN_TIME, |scene| open(scene, "v6"))?;
            scene.flows_again("carried", IN_TIME)
        })?;
    }
    Ok(())
}
