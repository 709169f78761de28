//! Each contestant does the work: every packet comes out at the tunnel that its source belongs to. And who does not is
//! noticed. Needs root.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tunroute::policy::net::Family;
use tunroute_bench::{
    contestant::{self, Contestant, Delivery, Installed, Task},
    generator::{Frame, Generator},
    load::{Pattern, flows},
    prefixes::Prefixes,
    record::Outcome,
    scenario::Arena,
    site::{LAN_MACS, Site, Target},
};

const PACKETS: u32 = 6400;

fn daemon() -> PathBuf {
    std::env::var_os("TUNROUTE_BIN")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/release/tunroute"), PathBuf::from)
}

#[test]
fn each_contestant_forwards_every_packet_to_the_right_tunnel() -> Result<()> {
    let generator = Generator::load(LAN_MACS)?;
    let contestants = contestant::all(&daemon());
    for (family, target, pattern) in [
        (Family::V4, Target::Tun, Pattern::Uniform),
        (Family::V4, Target::Tun, Pattern::Unmatched),
        (Family::V4, Target::Vxlan, Pattern::Uniform),
        (Family::V6, Target::Tun, Pattern::Uniform),
        (Family::V6, Target::Tun, Pattern::Unmatched),
        (Family::V6, Target::Vxlan, Pattern::Uniform),
    ] {
        let prefixes = Prefixes { family, count: 20 };
        let arena = Arena::new(&generator, &contestants, &Task { prefixes, target, pattern }, |_| None, |_| ())?;
        for (name, why) in &arena.absent {
            assert!(matches!(why, Outcome::Declined(_)), "{name}: {why:?}");
        }
        generator.set_flows(&flows(prefixes, pattern))?;
        for place in &arena.places {
            let sent = place.slice(&generator, Frame { family, size: 64 }, PACKETS, 1)?;
            let name = place.contestant.name();
            assert!(sent.is_ok(), "{name}, {family}, {target}, {pattern}: {sent:?}");
        }
    }
    Ok(())
}

/// Has rules for all prefixes but the last, or sends those of the second tunnel into the first.
struct Faulty {
    astray: bool,
}

impl Contestant for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn about(&self) -> &'static str {
        "loses packets"
    }

    fn delivery(&self) -> Delivery {
        Delivery::Policy
    }

    fn install(&self, site: &Site, task: &Task) -> Result<Box<dyn Installed>> {
        let rules = contestant::all(&daemon()).into_iter().find(|contestant| contestant.name() == "ip-rules");
        let installed = rules.context("there are flat rules")?.install(site, task)?;
        let last = task.prefixes.get(task.prefixes.count - 1);
        if self.astray {
            site.host.ip("route replace default dev tun0 table 201")?;
        } else {
            site.host.ip(&format!("rule add from {last} blackhole pref 1"))?;
        }
        Ok(installed)
    }
}

#[test]
fn a_contestant_that_loses_packets_or_sends_them_astray_is_disqualified() -> Result<()> {
    let generator = Generator::load(LAN_MACS)?;
    let prefixes = Prefixes { family: Family::V4, count: 20 };
    let task = Task { prefixes, target: Target::Tun, pattern: Pattern::Uniform };
    generator.set_flows(&flows(prefixes, Pattern::Uniform))?;
    for (astray, expected) in [(false, "0 left by the wrong device"), (true, " 0 were lost")] {
        let contestants: Vec<Box<dyn Contestant>> = vec![Box::new(Faulty { astray })];
        let arena = Arena::new(&generator, &contestants, &task, |_| None, |_| ())?;
        let frame = Frame { family: Family::V4, size: 64 };
        let why = arena.places[0].slice(&generator, frame, PACKETS, 1)?.expect_err("must be noticed");
        assert!(why.contains(expected), "{why}");
    }
    Ok(())
}
