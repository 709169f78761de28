//! Sources that follow an interface, `from = ["@lan0"]`: it is renumbered under a flow.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Flow, FlowOptions, TUNNELS, TunnelKind, Watch, World,
    pace::{SOON, until},
    plan::REMOTE,
    traffic::{Answer, ping_briefly},
};

/// The prefix that comes, and the client's address in it.
const NEW: [(&str, &str); 2] = [("10.0.5.0/24", "10.0.5.2"), ("2a02:578:85a0:5::/64", "2a02:578:85a0:5::2")];

/// One policy has what is on the link at `lan0`, the other one of these prefixes literally.
const CONFIG: &str = r#"
[interfaces]
ingress = ["lan0"]
uplink = ["net0"]
[tunnel.sixxs0]
via = ["198.51.100.254", "2a02::b0"]
[tunnel.sixxs1]
via = ["203.0.113.254", "2a02::b1"]
[[policy]]
name = "lan"
from = ["2a02::1", "@lan0", "@lan9"]
via = "sixxs0"
[[policy]]
name = "literal"
from = ["10.1.0.0/24"]
via = "sixxs1"
"#;

fn rules(world: &World) -> Result<String> {
    Ok(world.host.query("ip", "-4 rule show")? + &world.host.query("ip", "-6 rule show")?)
}

fn prefixes(status: &Value) -> &Value {
    &status["policies"][0]["prefixes"]
}

#[test]
fn both_datapaths_follow_a_renumbered_interface() -> Result<()> {
    for datapath in ["kernel", "both", "ebpf"] {
        let world = World::with(TunnelKind::Veth).build()?;
        world.client.ip("addr add 10.0.5.2/24 dev lan0\naddr add 2a02:578:85a0:5::2/64 dev lan0 nodad")?;
        let options = DaemonOptions { datapath: Some(datapath), ..DaemonOptions::default() };
        let daemon = Daemon::start(&world, CONFIG, &options)?;
        // Its own, the three of each family on lan0, and not the one that is somebody else's.
        let status = daemon.status()?;
        assert_eq!((prefixes(&status), &status["policies"][0]["follows"]), (&json!(6), &json!(["lan0", "lan9"])));
        let [problem] = status["problems"].as_array().context("no problems")?.as_slice() else {
            anyhow::bail!("one problem expected: {status:#}")
        };
        let expected = "policy \"lan\" does not get 10.1.0.0/24 of lan0: policy \"literal\" has it; ";
        ensure!(problem.as_str().is_some_and(|problem| problem.starts_with(expected)), "{problem}");
        let reasons = &status["fast_path"]["reasons"];
        ensure!(datapath == "kernel" || *reasons == json!([]), "{datapath}: {reasons}");

        for (family, (prefix, client)) in Family::ALL.into_iter().zip(NEW) {
            let what = || format!("{datapath}, {family}");
            let watch = [
                ("tunnel", Watch::entering(&world.remote, TUNNELS[0].remote_device)),
                ("uplink", Watch::leaving(&world.host, "net0")),
            ];
            let flow = Flow::start(FlowOptions {
                from: &world.client,
                src: client.parse()?,
                to: &world.remote,
                dst: REMOTE.of(family),
                rate: 1000,
                payload: 64,
                watch: &watch,
            })?;
            // It is nobody's yet.
            flow.wait_for("uplink", SystemTime::now(), SOON).with_context(what)?;
            let before = daemon.counters()?;
            let (length, gateway) =
                (prefix.split_once('/').context("no length")?.1, client.replace("5.2", "5.1").replace("5::2", "5::1"));
            let nodad = if family == Family::V6 { " nodad" } else { "" };
            world.host.ip(&format!("addr add {gateway}/{length} dev lan0{nodad}"))?;
            flow.wait_for("tunnel", SystemTime::now(), SOON).with_context(what)?;
            daemon.wait_status(|status| *prefixes(status) == json!(7), SOON).with_context(what)?;
            assert_eq!(rules(&world)?.contains(&format!("from {prefix} ")), datapath != "ebpf", "{}", what());
            // Nothing goes astray from now on, and the program decides where there is one.
            let since = SystemTime::now();
            flow.wait_for_many("tunnel", since, 200).with_context(what)?;
            assert_eq!(flow.count_since("uplink", since), 0, "{}", what());
            let forwarded = daemon.counters()?.packets("lan", "forwarded")? - before.packets("lan", "forwarded")?;
            assert_eq!(forwarded >= 200, datapath != "kernel", "{}: {forwarded} forwarded", what());

            world.host.ip(&format!("addr del {gateway}/{length} dev lan0"))?;
            flow.wait_for("uplink", SystemTime::now(), SOON).with_context(what)?;
            daemon.wait_status(|status| *prefixes(status) == json!(6), SOON).with_context(what)?;
            ensure!(!rules(&world)?.contains(prefix), "{}: {}", what(), rules(&world)?);
            flow.stop()?;
        }
    }
    Ok(())
}

/// The own address of a point-to-point device leaves by that device, also after it has changed; the peer's address is
/// nobody's.
#[test]
fn own_addresses_of_point_to_point_devices() -> Result<()> {
    const CONFIG: &str = r#"
[interfaces]
uplink = ["net0"]
[tunnel.sixxs0]
[tunnel.sixxs1]
[[policy]]
name = "first"
from = ["@sixxs0"]
via = "sixxs0"
[[policy]]
name = "second"
from = ["@sixxs1"]
via = "sixxs1"
"#;
    const PEER: &str = "198.51.100.77";
    for datapath in ["kernel", "both", "ebpf"] {
        let world = World::with(TunnelKind::Tun).build()?;
        let own = TUNNELS[0].host.v4;
        world.host.ip(&format!("addr del {own}/32 dev sixxs0\naddr add {own} peer {PEER}/32 dev sixxs0"))?;
        let options = DaemonOptions { datapath: Some(datapath), ..DaemonOptions::default() };
        let daemon = Daemon::start(&world, CONFIG, &options)?;
        let answered = |index: usize, family| {
            let answer = ping_briefly(&world.host, TUNNELS[index].host.of(family), REMOTE.of(family))?;
            Ok(answer == Answer::Reply)
        };
        for (index, family) in [(0, Family::V4), (0, Family::V6), (1, Family::V4), (1, Family::V6)] {
            until(&format!("{datapath}: {family} by {}", TUNNELS[index].device), || answered(index, family))?;
        }
        let status = daemon.status()?;
        ensure!((prefixes(&status), &status["problems"]) == (&json!(2), &json!([])), "{datapath}: {status:#}");
        ensure!(!rules(&world)?.contains(PEER), "{}", rules(&world)?);
        // The address goes and comes back.
        world.host.ip(&format!("addr del {own} peer {PEER}/32 dev sixxs0"))?;
        daemon.wait_status(|status| *prefixes(status) == json!(1), SOON)?;
        world.host.ip(&format!("addr add {own} peer {PEER}/32 dev sixxs0"))?;
        until(&format!("{datapath}: again by {}", TUNNELS[0].device), || answered(0, Family::V4))?;
        // While the device is down its address is still the policy's: it does not leave by the uplink.
        let mut uplink = Capture::on(&world.host, "net0")?;
        world.set_tunnel(0, false)?;
        daemon.wait_status(|status| status["tunnels"][0]["state"] == json!("down"), SOON)?;
        ensure!(!answered(0, Family::V4)?, "{datapath}: an answer");
        uplink.ensure_none(|seen| seen.src == Some(own.into()), Duration::from_millis(100))?;
    }
    Ok(())
}

/// Without a prefix a policy has no sources, which is no error.
#[test]
fn an_interface_without_prefixes() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let config = CONFIG.replace("\"2a02::1\", \"@lan0\", ", "");
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let status = daemon.status()?;
    assert_eq!((prefixes(&status), &status["problems"]), (&json!(0), &json!([])));
    let shown = String::from_utf8(daemon.client(&["status"])?.stdout)?.split_whitespace().collect::<Vec<_>>().join(" ");
    let hint = "hint: policy \"lan\" has no sources: lan9 has no prefix just now (`ip addr`)";
    ensure!(shown.contains(hint), "{shown}");
    world.host.ip("link add lan9 type veth peer name peer9\nlink set lan9 up\naddr add 10.44.0.1/24 dev lan9")?;
    daemon.wait_status(|status| *prefixes(status) == json!(1) && status["hints"] == json!([]), SOON)?;
    let explained = daemon.client(&["explain", "10.44.0.7", "198.18.0.1"])?;
    let explained = String::from_utf8(explained.stdout)?;
    ensure!(explained.contains("lan by 10.44.0.0/24: applies"), "{explained}");
    let verified = daemon.client(&["verify"])?;
    ensure!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stdout));
    world.host.ip("link del lan9")?;
    daemon.wait_status(|status| *prefixes(status) == json!(0), SOON)?;
    Ok(())
}
