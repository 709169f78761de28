//! Gates of a running daemon: each closes and opens without a restart, and `status` says what to do.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, TUNNELS, TunnelKind, World,
    inject::udp,
    nft,
    pace::{SOON, until},
    plan::REMOTE,
    traffic::{Answer, ping_briefly},
};

/// What is not to come does not come within this.
const A_WHILE: Duration = Duration::from_millis(100);

struct Case {
    name: &'static str,
    close: fn(&World) -> Result<()>,
    open: fn(&World) -> Result<()>,
    family: &'static str,
    /// In the reason, and in the advice.
    words: [&'static str; 2],
}

fn forwarding(world: &World, name: &str, value: &str) -> Result<()> {
    world.host.sysctl(&[(name, value)])
}

const CASES: [Case; 8] = [
    Case {
        name: "a foreign IPv6 rule",
        close: |world| world.host.ip("-6 rule add from 2a02::/16 lookup main pref 100"),
        open: |world| world.host.ip("-6 rule del from 2a02::/16 lookup main pref 100"),
        family: "v6",
        words: ["an IPv6 rule at priority 100 is asked before the policies' rules", "ip -6 rule del from 2a02::/16"],
    },
    Case {
        name: "a foreign IPv4 rule for the ingress device",
        close: |world| world.host.ip("rule add iif lan0 lookup main pref 200"),
        open: |world| world.host.ip("rule del iif lan0 lookup main pref 200"),
        family: "v4",
        words: ["an IPv4 rule at priority 200 is asked before the policies' rules", "ip rule del from all iif lan0"],
    },
    Case {
        name: "IPv4 forwarding",
        close: |world| forwarding(world, "ipv4/conf/lan0/forwarding", "0"),
        open: |world| forwarding(world, "ipv4/conf/lan0/forwarding", "1"),
        family: "v4",
        words: ["does not forward IPv4 from lan0", "sysctl -w net.ipv4.ip_forward=1"],
    },
    Case {
        name: "IPv6 forwarding",
        close: |world| forwarding(world, "ipv6/conf/all/forwarding", "0"),
        open: |world| forwarding(world, "ipv6/conf/all/forwarding", "1"),
        family: "v6",
        words: ["does not forward IPv6 from lan0", "sysctl -w net.ipv6.conf.all.forwarding=1"],
    },
    Case {
        name: "netfilter",
        close: |world| world.host.run_in(|| nft::add_chain(nft::INET, Some(nft::FORWARD), &[])),
        open: |world| world.host.run_in(|| nft::delete_table(nft::INET)),
        family: "v6",
        words: ["netfilter looks at forwarded IPv6 packets", "`bypass-netfilter = true`"],
    },
    Case {
        name: "IPsec",
        close: |world| world.host.ip("xfrm policy add src 192.0.2.0/24 dst 198.51.100.0/24 dir fwd action block"),
        open: |world| world.host.ip("xfrm policy flush"),
        family: "v4",
        words: ["IPsec policies (xfrm) apply to forwarded packets", "ip xfrm policy flush"],
    },
    Case {
        name: "a bridge",
        close: |world| world.host.ip("link add br0 type bridge\nlink set br0 up\nlink set lan0 master br0"),
        open: |world| world.host.ip("link set lan0 nomaster\nlink del br0"),
        family: "v6",
        words: ["lan0 is a port of br0", "name br0 in `ingress` instead"],
    },
    Case {
        name: "a foreign route in a policy's table",
        close: |world| world.host.ip("-6 route add 2001:db8:ffff::/48 dev net0 table 20000"),
        open: |world| world.host.ip("-6 route del 2001:db8:ffff::/48 dev net0 table 20000"),
        family: "v6",
        words: ["table 20000 has routes of another program", "remove them"],
    },
];

fn carried_by<'a>(status: &'a Value, family: &str) -> &'a Value {
    &status["policies"][0]["carried_by"][family]
}

#[test]
fn each_closes_and_opens_while_the_daemon_runs() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    for Case { name, close, open, family, words } in CASES {
        daemon.wait_status(|status| carried_by(status, family) == "fast path", SOON).context(name)?;
        close(&world).context(name)?;
        let status = daemon.wait_status(|status| carried_by(status, family) == "kernel", SOON).context(name)?;
        let reasons = status["fast_path"]["reasons"].as_array().context("no reasons")?;
        let told = |word: &&str| reasons.iter().filter_map(Value::as_str).any(|reason| reason.contains(*word));
        ensure!(words.iter().all(told), "{name}: {reasons:?}");
        // `explain` tells of it, too. Only a rule that is asked first sends the packet another way than configured.
        let client = TUNNELS[0].client;
        let (source, destination) = match family {
            "v4" => (client.v4.to_string(), REMOTE.v4.to_string()),
            _ => (client.v6.to_string(), REMOTE.v6.to_string()),
        };
        let output = daemon.client(&["explain", &source, &destination, "--json"])?;
        let said: Value = serde_json::from_slice(&output.stdout)?;
        let code = Some(i32::from(words[0].contains("is asked before")));
        ensure!(output.status.code() == code && said["gates"].to_string().contains(words[0]), "{name}: {said:#}");
        open(&world).context(name)?;
        let status = daemon.wait_status(|status| carried_by(status, family) == "fast path", SOON).context(name)?;
        ensure!(!status["fast_path"]["reasons"].to_string().contains(words[0]), "{name}: {status:#}");
    }
    Ok(())
}

#[test]
fn a_device_of_another_kind_is_left_out_and_the_others_decide() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let config = world.config().replace("ingress = [\"lan0\"]", "ingress = [\"lan0\", \"odd*\"]");
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let is = |state: &'static str| move |status: &Value| status["fast_path"]["state"] == state;
    daemon.wait_status(is("on"), SOON)?;
    world.host.ip("link set lo down\nlink set lo name odd0\nlink set odd0 up")?;
    let status = daemon.wait_status(is("partly"), SOON)?;
    let reasons = status["fast_path"]["reasons"].to_string();
    ensure!(
        reasons.contains("odd0 carries neither Ethernet nor bare IP") && reasons.contains("out of `ingress`"),
        "{reasons}"
    );
    assert_eq!(carried_by(&status, "v6"), "fast path");
    world.host.ip("link set odd0 down\nlink set odd0 name lo\nlink set lo up")?;
    daemon.wait_status(is("on"), SOON)?;
    Ok(())
}

/// What rp_filter does not believe, the kernel drops, whoever decides afterwards: it is told where that is a policy's.
#[test]
fn rp_filter_is_told_where_it_bites() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let (source, destination) = ("10.77.0.2".parse()?, REMOTE.v4.into());
    let packet = udp(SocketAddr::new(source, 1), SocketAddr::new(destination, 2), 64, b"from afar")?;
    let config = world.config().replace("\"10.0.0.0/16\"", "\"10.0.0.0/16\", \"10.77.0.0/24\"");
    let hint = "policy \\\"tunnel0\\\": rp_filter of lan0 drops what comes from 10.77.0.0/24: the main table's way back is \
                net0 (sysctl -w net.ipv4.conf.lan0.rp_filter=2; or make a route back by lan0)";
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let (client, mut broker) = (world.client_injector()?, Capture::on(&world.brokers[0], TUNNELS[0].device)?);
    // Whether it bites then, and whether the program forwards it.
    for (step, bites, by_program) in [
        ("filter 0", false, true),
        ("filter 1", true, false),
        // The uplink will do for a way back, which the program does not know.
        ("filter 2", false, false),
        ("filter 1", true, false),
        ("route add", false, true),
        ("route del", true, false),
        ("filter 0", false, true),
    ] {
        match step.split_once(' ') {
            Some(("filter", value)) => world.host.sysctl(&[("ipv4/conf/lan0/rp_filter", value)])?,
            _ => world.host.ip(&format!("{step} 10.77.0.0/24 via {} dev lan0", TUNNELS[0].client.v4))?,
        }
        let told = |status: &Value| status["hints"].to_string().contains(hint);
        let status = daemon.wait_status(|status| told(status) == bites, SOON).context(step)?;
        ensure!(status["fast_path"]["gates"]["reverse-path"] == u64::from(bites), "{step}: {:#}", status["fast_path"]);
        ensure!(status["fast_path"]["state"] == "on", "{step}: {:#}", status["fast_path"]);
        let before = daemon.counters()?;
        client.send(&packet)?;
        if bites {
            broker.ensure_none(|seen| seen.is(source, destination), A_WHILE).context(step)?;
        } else {
            broker.wait_for(|seen| seen.is(source, destination), SOON).context(step)?;
        }
        let outcome = if by_program { "forwarded" } else { "source_check" };
        let counted = daemon.counters()?.since(&before);
        ensure!(counted == [(("tunnel0".to_owned(), outcome.to_owned()), 1)].into(), "{step}: {counted:?}");
    }
    Ok(())
}

/// With `datapath = "ebpf"`, rules stand in wherever a policy's packets could leave without a program seeing them, and go
/// when that is over.
#[test]
fn rules_stand_in_where_no_program_guards() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let options = DaemonOptions { datapath: Some("ebpf"), ..DaemonOptions::default() };
    let config = world.config();
    let daemon = Daemon::start(&world, &config, &options)?;
    let (own, remote) = (TUNNELS[0].host.v4.into(), REMOTE.v4.into());
    let is = |state: &'static str, rules: bool, reason: &str| {
        daemon.wait_status(
            |status| {
                let fast = &status["fast_path"];
                fast["state"] == state
                    && (status["kernel"]["rules"] != 0) == rules
                    && fast["reasons"].to_string().contains(reason)
            },
            SOON,
        )
    };
    // Whoever decides, the policy's packets leave by its tunnel and by nothing else.
    let by_its_tunnel = |when: &str| -> Result<()> {
        let mut others = [Capture::on(&world.host, "net0")?, Capture::on(&world.host, TUNNELS[1].device)?];
        until(when, || Ok(ping_briefly(&world.host, own, remote)? == Answer::Reply))?;
        for other in &mut others {
            other.ensure_none(|seen| seen.src == Some(own), A_WHILE).with_context(|| when.to_owned())?;
        }
        Ok(())
    };
    let reload = |config: &str| {
        daemon.write_config(config)?;
        daemon.reload()
    };
    is("on", false, "")?;
    by_its_tunnel("guarded")?;

    // The default route moves to the other policy's tunnel.
    for gateway in ["", "via inet6 fe80::1"] {
        world.host.ip(&format!("-4 route replace default {gateway} dev sixxs1"))?;
        is("partly", true, "the main table has 0.0.0.0/0 by sixxs1")?;
        by_its_tunnel("the default route by a tunnel")?;
        world.host.ip("-4 route replace default via 192.0.2.2 dev net0")?;
        is("on", false, "")?;
    }

    // An uplink that may come.
    reload(&config.replace("[\"net0\"]", "[\"net0\", \"net1\"]"))?;
    is("partly", true, "the uplink net1 does not exist")?;
    world.host.ip("link add net1 type veth peer name peer1\nlink set net1 up")?;
    is("on", false, "")?;
    world.host.ip("link del net1")?;
    is("partly", true, "the uplink net1 does not exist")?;

    // No program at all.
    reload(&config.replace("uplink = [\"net0\"]", "").replace("ingress = [\"lan0\"]", ""))?;
    is("off", true, "there is no ingress device and no uplink")?;
    by_its_tunnel("no uplink")?;
    reload(&config)?;
    is("on", false, "")?;
    by_its_tunnel("guarded again")
}
