//! `explain` and `verify`, the daemon's own sampling, and shadow mode, as an operator meets them.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Output,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tunroute::{
    datapath::WordMap,
    policy::fast::{Exemption, FastOp},
    policy::net::Family,
    prefixes::index::{self, Content},
};
use tunroute_common::maps::{Action, Egress, LAYOUT_VERSION, Slot, names};
use tunroute_tests::{
    Daemon, DaemonOptions, TUNNELS, TunnelKind, World,
    offload::programs,
    pace::{SOON, patience, until},
    ping,
    plan::REMOTE,
    traffic::Answer,
};

/// The daemon comes across a disagreement by chance, a few packets at a time.
const BY_CHANCE: Duration = Duration::from_secs(120);
/// How often a disagreement that is mended meanwhile is made again.
const ATTEMPTS: u32 = 10;

fn start<'a>(world: &'a World, datapath: &str) -> Result<Daemon<'a>> {
    Daemon::start(world, &format!("datapath = \"{datapath}\"\n{}", world.config()), &DaemonOptions::default())
}

/// Runs a command that prints JSON; returns its exit status, too.
fn asked(daemon: &Daemon<'_>, arguments: &[&str]) -> Result<(Option<i32>, Value)> {
    let output = daemon.client(&[arguments, &["--json"]].concat())?;
    let value = serde_json::from_slice(&output.stdout);
    Ok((output.status.code(), value.with_context(|| format!("{arguments:?}: {}", text(&output)))?))
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// The screen for a person: fits, and has no colours, since this is no terminal.
fn screen(daemon: &Daemon<'_>, arguments: &[&str]) -> Result<String> {
    let shown = text(&daemon.client(arguments)?);
    println!("$ tunroute {}\n{shown}", arguments.join(" "));
    ensure!(!shown.contains('\x1b'), "{shown}");
    for line in shown.lines() {
        // What the kernel and the operator have named is not broken.
        ensure!(line.chars().count() <= 80 || !line.trim().contains("  "), "too wide: {line}");
    }
    Ok(shown)
}

fn counters(daemon: &Daemon<'_>) -> Result<Value> {
    let status = daemon.status()?;
    Ok(status["policies"].as_array().context("no policies")?.iter().map(|policy| policy["outcomes"].clone()).collect())
}

fn pinned(world: &World, name: &str) -> Result<MapData> {
    Ok(MapData::from_pin(world.pin_dir().join(format!("v{LAYOUT_VERSION}")).join(name))?)
}

/// Who writes to the map of prefixes behind the daemon's back.
struct Meddler<'a> {
    world: &'a World,
    daemon: &'a Daemon<'a>,
    /// The exemptions in the map of a daemon that has nothing to do.
    all: BTreeSet<Exemption>,
}

impl<'a> Meddler<'a> {
    fn new(world: &'a World, daemon: &'a Daemon<'a>) -> Result<Self> {
        let (_, all) = index::read(&prefixes(world)?).context("the map of prefixes is damaged")?;
        ensure!(all.iter().any(|exemption| exemption.prefix.addr().is_ipv6()), "there are no exemptions");
        Ok(Self { world, daemon, all })
    }

    /// Takes all IPv6 exemptions out of the map, if all are there. Says whether it did.
    ///
    /// The daemon stands still meanwhile: of two that write at the same time, one undoes what the other builds on. If all are
    /// there, it is not in the middle of writing either.
    fn remove_exemptions(&self) -> Result<bool> {
        if !self.is_whole() {
            return Ok(false);
        }
        let removed = self.daemon.freeze().and_then(|()| {
            if !self.is_whole() {
                return Ok(false);
            }
            let words = prefixes(self.world)?;
            let (sources, mut exempt) = index::read(&words).context("the map of prefixes is damaged")?;
            let removals = exempt.extract_if(.., |exemption| exemption.prefix.addr().is_ipv6());
            let removals: Vec<_> = removals.map(FastOp::RemoveExemption).collect();
            let content = Content { sources: &sources, exempt: &exempt };
            ensure!(index::change(&words, content, &removals.iter().collect::<Vec<_>>()), "no room");
            Ok(true)
        });
        self.daemon.signal(Signal::SIGCONT)?;
        removed
    }

    /// All exemptions are in the map. While the daemon writes, it may look as if there were no map.
    fn is_whole(&self) -> bool {
        let read = prefixes(self.world).ok().and_then(|words| index::read(&words));
        read.is_some_and(|(_, exempt)| exempt == self.all)
    }
}

fn prefixes(world: &World) -> Result<WordMap> {
    Ok(WordMap::pinned(&world.pin_dir().join(format!("v{LAYOUT_VERSION}")))?)
}

/// Among many rules, which are a tree then, the one that decides is named.
#[test]
fn a_rule_of_a_tree_is_explained() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let many: Vec<String> = (0x100..0x128).map(|n| format!("\"2001:db8:{n:x}::/48\"")).collect();
    let config = format!(
        "datapath = \"kernel\"\ntree-above = 20\n[interfaces]\ningress = [\"lan0\"]\nuplink = [\"net0\"]\n\
         [tunnel.sixxs0]\n[tunnel.sixxs1]\n\
         [[policy]]\nname = \"many\"\nfrom = [{}]\nvia = \"sixxs0\"\n\
         [[policy]]\nname = \"in-and-around\"\nfrom = [\"2001:db8:117:5::/64\", \"2001:db8::/32\"]\nvia = \"sixxs1\"\n",
        many.join(", ")
    );
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    for (source, prefix, tunnel) in [
        ("2001:db8:117:5::1", "2001:db8:117:5::/64", 1),
        ("2001:db8:117:6::1", "2001:db8:117::/48", 0),
        ("2001:db8:100::", "2001:db8:100::/48", 0),
        ("2001:db8:128::", "2001:db8::/32", 1),
    ] {
        let (code, said) = asked(&daemon, &["explain", source, &REMOTE.v6.to_string()])?;
        let rule = said["kernel"]["rule"].as_str().context("no rule")?;
        ensure!(code == Some(0) && rule.starts_with(&format!("from {prefix} lookup")), "{said:#}");
        assert_eq!(said["kernel"]["way"]["device"], TUNNELS[tunnel].device, "{said:#}");
        assert_eq!((&said["policies"][0]["prefix"], &said["agree"]), (&json!(prefix), &json!(true)), "{said:#}");
    }
    assert_eq!(daemon.status()?["kernel"]["trees"], json!(["v6"]));
    let shown = screen(&daemon, &["status"])?;
    ensure!(shown.contains("rules (IPv6 as a tree), "), "{shown}");
    Ok(())
}

#[test]
fn a_packet_is_explained_and_no_counter_moves() -> Result<()> {
    for kind in [TunnelKind::Tun, TunnelKind::Veth] {
        let world = World::with(kind).build()?;
        let daemon = start(&world, "both")?;
        let before = counters(&daemon)?;
        for (index, plan) in TUNNELS.iter().enumerate() {
            for family in Family::ALL {
                let (client, own) = (plan.client.of(family).to_string(), plan.host.of(family).to_string());
                let (remote, lan) = (REMOTE.of(family).to_string(), TUNNELS[1 - index].client.of(family).to_string());
                let gateway = if kind == TunnelKind::Veth { json!(plan.gateway.of(family)) } else { Value::Null };
                let way = json!({ "device": plan.device, "gateway": gateway });

                let (code, said) = asked(&daemon, &["explain", &client, &remote])?;
                assert_eq!((code, &said["agree"]), (Some(0), &json!(true)), "{said:#}");
                assert_eq!((&said["hook"], &said["device"]), (&json!("ingress"), &json!("lan0")), "{said:#}");
                assert_eq!((&said["program"]["way"], &said["kernel"]["way"]), (&way, &way), "{said:#}");
                assert_eq!(said["program"]["outcome"], "forwarded");
                let considered = &said["policies"][0];
                assert_eq!(considered["policy"], format!("tunnel{index}"));
                assert_eq!(considered["prefix"], json!(plan.prefix.of(family)));
                let route = said["kernel"]["route"].as_str().context("no route")?;
                ensure!(route.starts_with("default") && route.contains(plan.device), "{said:#}");
                let rule = said["kernel"]["rule"].as_str().context("no rule")?;
                ensure!(rule.starts_with(&format!("from {} lookup", plan.prefix.of(family))), "{said:#}");

                // To the other prefix on the same link: exempt.
                let (code, said) = asked(&daemon, &["explain", &client, &lan, "--iif", "lan0"])?;
                assert_eq!((code, &said["program"]["outcome"]), (Some(0), &json!("exempt")), "{said:#}");
                assert_eq!(said["policies"][0]["applies"], false);
                assert_eq!(said["kernel"]["way"]["device"], "lan0");

                // The host's own.
                let (code, said) = asked(&daemon, &["explain", &own, &remote])?;
                assert_eq!(
                    (code, &said["hook"], &said["device"]),
                    (Some(0), &json!("egress"), &json!("net0")),
                    "{said:#}"
                );
                assert_eq!(
                    (&said["program"]["way"], &said["program"]["outcome"]),
                    (&way, &json!("diverted")),
                    "{said:#}"
                );
                assert_eq!(said["kernel"]["way"], way);
            }
        }
        // Nobody's source; and a device without a program.
        let (code, said) = asked(&daemon, &["explain", "2001:db8:77::1", &REMOTE.v6.to_string()])?;
        assert_eq!(
            (code, &said["policies"], &said["program"]["outcome"]),
            (Some(0), &json!([]), &Value::Null),
            "{said:#}"
        );
        let client = TUNNELS[0].client.v6.to_string();
        let (code, said) = asked(&daemon, &["explain", &client, &REMOTE.v6.to_string(), "--iif", "sixxs1"])?;
        assert_eq!((code, &said["program"]), (Some(0), &Value::Null), "{said:#}");
        assert_eq!(counters(&daemon)?, before, "counters moved");
        let shown = screen(&daemon, &["explain", &client, &REMOTE.v6.to_string()])?;
        ensure!(shown.contains("Verdict    they agree"), "{shown}");
    }
    Ok(())
}

#[test]
fn what_a_policy_that_is_down_does_is_explained() -> Result<()> {
    let (client, remote) = (TUNNELS[0].client.v6.to_string(), REMOTE.v6.to_string());
    for (on_down, outcome, decision, kernel) in [
        ("unreachable", "down", "left", "unreachable"),
        ("prohibit", "down", "left", "prohibited"),
        ("blackhole", "blackholed", "dropped", "dropped"),
        ("next", "down", "left", "leaves"),
    ] {
        let world = World::with(TunnelKind::Tun).build()?;
        let config =
            world.config().replace("via = [\"sixxs0\"]", &format!("via = [\"sixxs0\"]\non-down = \"{on_down}\""));
        let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
        world.set_tunnel(0, false)?;
        daemon.wait_status(|status| status["tunnels"][0]["state"] == "down", SOON)?;
        let (code, said) = asked(&daemon, &["explain", &client, &remote])?;
        assert_eq!((code, &said["agree"]), (Some(0), &json!(true)), "{said:#}");
        assert_eq!((&said["program"]["outcome"], &said["program"]["decision"]), (&json!(outcome), &json!(decision)));
        assert_eq!(said["kernel"]["decision"], kernel, "{said:#}");
        let shown = screen(&daemon, &["explain", &client, &remote])?;
        ensure!(shown.contains(&format!("on-down = \"{on_down}\"")), "{shown}");
    }
    Ok(())
}

/// A packet that goes another way than the configuration says is never called right, whatever sends it there.
#[test]
fn a_packet_that_goes_another_way_than_configured_is_told() -> Result<()> {
    let (client, remote, lan) = (TUNNELS[0].client.v4, REMOTE.v4, TUNNELS[1].client.v4);
    let sixxs1 = TUNNELS[1].device;
    // What is done to the host and undone, with TABLE for the policy's; source and destination; what `explain` says of it.
    let meddling: [(&str, &str, String, String, &str); 4] = [
        (
            "rule add pref 100 lookup 77\nroute add default dev DEV table 77",
            "rule del pref 100\nroute flush table 77",
            client.to_string(),
            remote.to_string(),
            "it leaves by another device than the policy's tunnel",
        ),
        (
            "rule add pref 100 lookup 77\nroute add default dev DEV table 77",
            "rule del pref 100\nroute flush table 77",
            client.to_string(),
            lan.to_string(),
            "a rule of others ahead of the policies sends it another way than the main table",
        ),
        (
            "route add 198.18.0.0/24 dev DEV table TABLE",
            "route del 198.18.0.0/24 dev DEV table TABLE",
            client.to_string(),
            remote.to_string(),
            "it leaves by another device than the policy's tunnel",
        ),
        (
            "rule add pref 100 to 198.18.0.0/24 blackhole",
            "rule del pref 100",
            client.to_string(),
            remote.to_string(),
            "it is refused, although the policy's tunnel is up",
        ),
    ];
    let world = World::with(TunnelKind::Tun).build()?;
    world.host.ip("rule add pref 200 from 10.77.0.0/16 lookup 78")?;
    for datapath in ["kernel", "both", "ebpf"] {
        let mut daemon = start(&world, datapath)?;
        for (make, undo, source, destination, because) in &meddling {
            let (code, said) = asked(&daemon, &["explain", source, destination])?;
            assert_eq!((code, &said["agree"]), (Some(0), &json!(true)), "{datapath}: {said:#}");
            let table = daemon.status()?["policies"][0]["table"].to_string();
            let script = |script: &str| script.replace("TABLE", &table).replace("DEV", sixxs1);
            world.host.ip(&script(make))?;
            // In `ebpf` mode rules have to come first where a gate has closed.
            until("explain tells it", || {
                let (code, said) = asked(&daemon, &["explain", source, destination])?;
                let told = said["because"] == *because || said["because"] == "they send it by different devices";
                Ok(code == Some(1) && said["agree"] == false && told)
            })?;
            if datapath == "kernel" && make.contains("lookup 77") {
                let output = daemon.client(&["verify", "--samples", "200"])?;
                ensure!(output.status.code() == Some(1), "{}", text(&output));
            }
            world.host.ip(&script(undo))?;
            until("explain is content", || Ok(asked(&daemon, &["explain", source, destination])?.0 == Some(0)))?;
        }
        until("verify is content", || Ok(daemon.client(&["verify", "--samples", "50"])?.status.success()))?;
        daemon.down()?;
    }
    Ok(())
}

#[test]
fn what_cannot_be_asked_ends_with_2_and_says_why() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let mut daemon = start(&world, "ebpf")?;
    for (arguments, why) in [
        (&["explain", "10.0.0.1", "2001:db8::1"][..], "different families"),
        (&["explain", "10.0.0.1", "10.0.0.2", "--iif", "nowhere0"], "no device nowhere0"),
        (&["explain", "10.0.0.1"], "required"),
        (&["explain", "10.0.0.1", "somewhere"], "invalid"),
        (&["verify", "--samples", "1000000"], "10000"),
    ] {
        let output = daemon.client(arguments)?;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output));
        ensure!(text(&output).contains(why), "{arguments:?}: {}", text(&output));
    }
    let (client, remote) = (TUNNELS[0].client.v6.to_string(), REMOTE.v6.to_string());
    let (code, said) = asked(&daemon, &["explain", &client, &remote])?;
    assert_eq!((code, &said["agree"], &said["program"]["outcome"]), (Some(0), &json!(true), &json!("forwarded")));
    daemon.terminate()?;
    for arguments in [&["explain", &client, &remote][..], &["verify"]] {
        let output = daemon.client(arguments)?;
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        ensure!(text(&output).contains("is it running? (`tunroute run`"), "{}", text(&output));
    }
    Ok(())
}

#[test]
fn both_datapaths_are_compared_on_everything() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let daemon = start(&world, "both")?;
    let before = counters(&daemon)?;
    for state in ["up", "one tunnel down"] {
        let (code, said) = asked(&daemon, &["verify", "--samples", "200"])?;
        assert_eq!(
            (code, &said["disagreeing"], &said["unanswered"]),
            (Some(0), &json!(0), &json!(0)),
            "{state}: {said:#}"
        );
        // Eight prefixes, of which four are single addresses.
        assert_eq!((said["prefixes"].as_u64(), said["packets"].as_u64()), (Some(8), Some(8 * 200 + 4 * 4 + 4 * 3)));
        world.set_tunnel(0, false)?;
        daemon.wait_status(|status| status["tunnels"][0]["state"] == "down", SOON)?;
    }
    assert_eq!(counters(&daemon)?, before, "counters moved");
    let shown = screen(&daemon, &["verify"])?;
    ensure!(shown.contains("they agree on all of them"), "{shown}");
    Ok(())
}

#[test]
fn a_foreign_hand_in_the_maps_is_found_told_and_undone() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = start(&world, "both")?;
    let (client, lan) = (TUNNELS[0].client.v6.to_string(), TUNNELS[1].client.v6.to_string());
    let meddler = Meddler::new(&world, &daemon)?;
    // On a busy machine the daemon may have put it right before anybody asks: then it is done again.
    let mut log = 0;
    until("they disagree", || {
        log = daemon.log().len();
        if !meddler.remove_exemptions()? {
            return Ok(false);
        }
        let output = daemon.client(&["explain", &client, &lan])?;
        println!("{}", text(&output));
        Ok(output.status.code() == Some(1)
            && text(&output).contains("they DISAGREE: they send it by different devices"))
    })?;
    // The daemon samples, finds it, looks at the maps and puts them right. Nobody has to ask.
    let deadline = std::time::Instant::now() + patience(BY_CHANCE);
    let said = || daemon.log().split_off(log);
    while !said().contains("both datapaths agree again") {
        ensure!(std::time::Instant::now() < deadline, "not found; log:\n{}", daemon.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(said().matches("disagreement: ").count() <= 2, "said too often:\n{}", daemon.log());
    daemon.wait_status(|status| status["fast_path"]["state"] == "on", SOON)?;
    let (code, said) = asked(&daemon, &["explain", &client, &lan])?;
    assert_eq!((code, &said["program"]["outcome"]), (Some(0), &json!("exempt")), "{said:#}");
    Ok(())
}

#[test]
fn while_they_disagree_the_kernel_decides() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = start(&world, "both")?;
    let (client, lan) = (TUNNELS[0].client.v6, TUNNELS[1].client.v6);
    let stop = AtomicBool::new(false);
    let meddler = Meddler::new(&world, &daemon)?;
    std::thread::scope(|scope| {
        let meddling = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                meddler.remove_exemptions()?;
                std::thread::sleep(patience(Duration::from_millis(2)));
            }
            anyhow::Ok(())
        });
        let outcome = (|| {
            let closed = |status: &Value| {
                (0..2).all(|policy| status["policies"][policy]["carried_by"]["v6"] == "kernel")
                    && status["fast_path"]["state"] == "partly"
            };
            // What the meddler has done the daemon puts right, and opens the policies again if it looks at that moment: on a
            // busy machine that may come about before anybody asks. Then it is to be found once more.
            let verify = || daemon.client(&["verify", "--samples", "500"]).ok();
            let told = |_| {
                let output = verify()?;
                println!("$ tunroute verify --samples 500\n{}", text(&output));
                (output.status.code() == Some(1) && text(&output).contains("they DISAGREE on")).then_some(())
            };
            (0..ATTEMPTS).find_map(told).with_context(|| format!("never told; log:\n{}", daemon.log()))?;
            let seen = |attempt| {
                let _found_again = if attempt > 0 { verify() } else { None };
                daemon.wait_status(closed, Duration::from_secs(1)).ok()
            };
            let status = (0..ATTEMPTS).find_map(seen);
            let status = status.with_context(|| format!("never closed; log:\n{}", daemon.log()))?;
            let reasons = status["fast_path"]["reasons"].to_string();
            ensure!(reasons.contains("disagreement") && reasons.contains("tunroute explain"), "{reasons}");
            println!("{}", text(&daemon.client(&["status"])?));
            // What enters is left to the kernel now, so that it is right although the maps are not.
            let (client_text, lan_text) = (client.to_string(), lan.to_string());
            let left = |attempt| {
                let _found_again = if attempt > 0 { verify() } else { None };
                let (code, said) = asked(&daemon, &["explain", &client_text, &lan_text]).ok()?;
                (said["program"]["outcome"] == "closed").then_some(code)
            };
            assert_eq!((0..ATTEMPTS).find_map(left), Some(Some(0)), "log:\n{}", daemon.log());
            let counted = |attempt| {
                let _found_again = if attempt > 0 { verify() } else { None };
                let answer = ping(&world.client, client.into(), REMOTE.v6.into()).ok();
                let closed = daemon.counters().and_then(|counters| counters.packets("tunnel0", "closed")).ok();
                answer == Some(Answer::Reply) && closed.is_some_and(|closed| closed > 0)
            };
            ensure!((0..ATTEMPTS).any(counted), "not counted as closed; log:\n{}", daemon.log());
            // The uplink stays guarded.
            let own = TUNNELS[0].host.v6.to_string();
            let (_, said) = asked(&daemon, &["explain", &own, &REMOTE.v6.to_string()])?;
            assert_eq!(said["program"]["outcome"], "diverted", "{said:#}");
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        meddling.join().map_err(|_| anyhow::anyhow!("the meddler panicked"))??;
        outcome
    })?;
    // The policies may be open again although the last meddling is still to be found.
    until("both datapaths agree, and the policies are open", || {
        let (code, _) = asked(&daemon, &["verify", "--samples", "100"])?;
        Ok(code == Some(0) && daemon.status()?["fast_path"]["state"] == "on")
    })
}

#[test]
fn in_shadow_the_programs_only_watch() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let daemon = start(&world, "shadow")?;
    let status = daemon.status()?;
    assert_eq!(
        (&status["datapath"], &status["fast_path"]["state"]),
        (&json!("shadow"), &json!("shadow")),
        "{status:#}"
    );
    assert_eq!(status["fast_path"]["attached"].as_array().map(Vec::len), Some(programs()), "{status:#}");
    assert_eq!(status["policies"][0]["carried_by"], json!(BTreeMap::from([("v4", "kernel"), ("v6", "kernel")])));
    let client = TUNNELS[0].client.v6;
    let pings = || (0..3).all(|_| matches!(ping(&world.client, client.into(), REMOTE.v6.into()), Ok(Answer::Reply)));
    ensure!(pings(), "no way out; log:\n{}", daemon.log());
    ensure!(daemon.counters()?.packets("tunnel0", "forwarded")? >= 3, "they count what they would do");

    // Whatever the programs decide, the rules do. The daemon may have put it right before anybody asks.
    let mut policy = Array::<_, Slot>::try_from(Map::Array(pinned(&world, names::POLICY)?))?;
    until("they disagree", || {
        for index in 0..policy.len() {
            let slot = policy.get(&index, 0)?;
            if slot.id != 0 {
                policy.set(index, Slot { egress: Egress::down(Action::Blackhole), ..slot }, 0)?;
            }
        }
        let (code, said) = asked(&daemon, &["explain", &client.to_string(), &REMOTE.v6.to_string()])?;
        assert_eq!(said["program"]["acts"], false, "{said:#}");
        Ok((code, &said["agree"]) == (Some(1), &json!(false)))
    })?;
    ensure!(pings(), "a program acts; log:\n{}", daemon.log());
    let shown = screen(&daemon, &["explain", &client.to_string(), &REMOTE.v6.to_string()])?;
    let words = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(words.contains("only watches (shadow)"), "{shown}");
    Ok(())
}
