//! Golden plans: configurations beside the commands that they compile to, as files in `tests/golden`.
//!
//! A file is a title, a configuration, and steps. Each step is a heading `== EVENT` followed by the commands of that plan, in
//! order; entries of the eBPF maps are left out. With `UPDATE_GOLDEN=1` the commands are written anew.

#![allow(clippy::panic, reason = "a plan that cannot be read fails the test")]

use std::{fs, path::Path};

use tunroute::{config::Config, policy::net::KernelState, policy::plan::Op};

use super::{FastOp, World, follow, host, link};

/// What stands between a file's title and configuration, and its steps.
const STEP: &str = "== ";

#[test]
fn golden_plans() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut differing = Vec::new();
    let mut files: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    assert!(files.len() > 5, "the golden plans are in {}", directory.display());
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        let replayed = replay(&text);
        if replayed != text {
            if update {
                fs::write(&path, &replayed).unwrap();
            }
            differing.push(format!("{}, which would be:\n{replayed}", path.display()));
        }
    }
    assert!(update || differing.is_empty(), "UPDATE_GOLDEN=1 writes these plans anew:\n{}", differing.join("\n"));
}

/// The file with the commands that its steps lead to.
fn replay(text: &str) -> String {
    let start = text.find(STEP).expect("a golden plan has steps");
    let (head, steps) = text.split_at(start);
    let config = Config::parse("golden", head).unwrap_or_else(|error| panic!("{error:?}\nin\n{head}"));
    let mut host = host();
    let mut world = World::default();
    let mut replayed = head.to_owned();
    for event in steps.lines().filter_map(|line| line.strip_prefix(STEP)) {
        happen(event, &mut host, &mut world);
        let rules = config.datapath != tunroute::config::Datapath::Ebpf;
        let mut config = config.clone();
        assert_eq!(follow(&mut config, &host), [""; 0], "no policy wants what another one has");
        let operations = world.plan(&config, &host, rules);
        replayed += &format!("{STEP}{event}\n");
        let commands: Vec<String> = operations.iter().filter(|op| is_shown(op)).map(ToString::to_string).collect();
        replayed += if commands.is_empty() { "(no command)".to_owned() } else { commands.join("\n") }.as_str();
        replayed += "\n\n";
    }
    replayed.truncate(replayed.trim_end().len());
    replayed.push('\n');
    replayed
}

fn is_shown(operation: &Op) -> bool {
    matches!(operation, Op::Kernel(_) | Op::Fast(FastOp::Attach(_) | FastOp::Detach(_)))
}

/// Changes the host as an event says: `start`, `DEVICE up|down|gone`, `DEVICE appears`, `route add|del
/// PREFIX dev DEVICE` (behind a router), `network add|del PREFIX dev DEVICE` (on the link), or `local table at PRIORITY`.
fn happen(event: &str, host: &mut KernelState, world: &mut World) {
    let words: Vec<&str> = event.split(' ').collect();
    let index = |host: &KernelState, name: &str| host.link(name).unwrap_or_else(|| panic!("no {name}")).index;
    match *words.as_slice() {
        ["start"] => {}
        ["local", "table", "at", priority] => host.rules = super::local_rules(priority.parse().unwrap()),
        [what @ ("route" | "network"), change, prefix, "dev", device] => {
            let route = super::main_route(prefix, index(host, device), what == "network");
            host.main.retain(|present| present.dst != route.dst);
            if change == "add" {
                host.main.push(route);
            }
        }
        [device, "appears"] => {
            let index = host.links.keys().max().map_or(1, |index| index + 1);
            let layer = tunroute::policy::net::LinkLayer::Ip;
            host.links.insert(index, link(index, device, layer));
        }
        [device, change] => {
            let index = index(host, device);
            match change {
                "gone" => drop(host.links.remove(&index)),
                "up" | "down" => host.links.get_mut(&index).unwrap().up = change == "up",
                _ => panic!("unknown event: {event}"),
            }
            if change != "up" {
                // The kernel removes the routes of a device that is down or gone.
                world.routes.retain(|_, route| !format!("{route} ").contains(&format!("dev {device} ")));
            }
        }
        _ => panic!("unknown event: {event}"),
    }
}
