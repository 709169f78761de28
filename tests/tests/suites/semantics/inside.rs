//! What stays off the tunnels: this host's own addresses, neighbours on the link, networks inside, and sources that are
//! left to the main table.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, End, Flow, FlowOptions, Mac, Sender, TUNNELS, TunnelKind, Watch, World,
    device::veth,
    pace::{SOON, until},
    ping,
    plan::{HOST, ISP, PLAIN_LAN, REMOTE},
    traffic::{Answer, ping_briefly},
};

use super::{
    MODES, in_each_mode,
    places::{Marks, Places, packet},
};

/// VRFs, ifupdown2 and others move the kernel's rule for the local table behind those of policies.
#[test]
fn own_addresses_stay_own_wherever_the_rule_for_the_local_table_stands() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    in_each_mode(&world, &world.config(), |mode, _| {
        for (stands, next) in [(0, 32765), (32765, 0)] {
            for version in ["-4", "-6"] {
                let moved = format!(
                    "{version} rule add pref {next} lookup local\n{version} rule del pref {stands} lookup local"
                );
                world.host.ip(&moved)?;
            }
            for family in Family::ALL {
                let client = TUNNELS[0].client.of(family);
                let own = [PLAIN_LAN, HOST, TUNNELS[0].lan, TUNNELS[0].host, TUNNELS[1].host];
                for own in own.map(|addrs| addrs.of(family)) {
                    let answered = || Ok(ping_briefly(&world.client, client, own)? == Answer::Reply);
                    until(&format!("{mode}, the rule at {next}: {own} answers"), answered)?;
                }
            }
        }
        Ok(())
    })
}

/// The policy's gateway does not exist, so what answers has been reached without it.
#[test]
fn a_neighbour_on_a_tunnels_link_is_reached_directly() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let tunnel = TUNNELS[0];
    world.host.ip(&format!(
        "addr del {0}/32 dev sixxs0\naddr add {0}/24 dev sixxs0\naddr del {1}/128 dev sixxs0\naddr add {1}/64 dev sixxs0 \
         nodad",
        tunnel.host.v4, tunnel.host.v6
    ))?;
    let config = r#"
        [interfaces]
        ingress = ["lan0"]
        uplink = ["net0"]
        [tunnel.sixxs0]
        via = ["198.51.100.200", "2a02::c8"]
        [[policy]]
        name = "tunnel0"
        from = ["198.51.100.1", "2a02::1", "10.0.0.0/16", "2a02:578:85a0::/48"]
        via = "sixxs0"
    "#;
    in_each_mode(&world, config, |mode, _| {
        for family in Family::ALL {
            let neighbour = tunnel.gateway.of(family);
            let sources = [(&world.host, tunnel.host), (&world.client, tunnel.client)];
            for (netns, source) in sources.map(|(netns, addrs)| (netns, addrs.of(family))) {
                assert_eq!(ping(netns, source, neighbour)?, Answer::Reply, "{mode}: {source} to {neighbour}");
            }
        }
        Ok(())
    })
}

/// Everything by a tunnel, and a session from the uplink's own network goes on.
#[test]
fn a_policy_for_everything_leaves_the_uplinks_own_network_alone() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let config = r#"
        [interfaces]
        ingress = ["lan0"]
        uplink = ["net0"]
        [tunnel.sixxs0]
        [[policy]]
        name = "all"
        from = ["0.0.0.0/0", "::/0"]
        allow-default = true
        via = "sixxs0"
    "#;
    let mut places = Places::watch(&world)?;
    in_each_mode(&world, config, |mode, _| {
        for family in Family::ALL {
            let (own, neighbour) = (HOST.of(family), ISP.of(family));
            assert_eq!(ping(&world.isp, neighbour, own)?, Answer::Reply, "{mode}: {neighbour} asks {own}");
            let sender = Sender::open(&world.host, own, None)?;
            sender.send((REMOTE.of(family), 9).into(), b"everything")?;
            places.expect(Some("sixxs0"), sender.port()?).with_context(|| format!("{mode}: {own} to elsewhere"))?;
        }
        Ok(())
    })
}

/// A route to a network behind an inside router comes and goes, under traffic to there: with programs, no packet leaves
/// by the uplink.
#[test]
fn a_withdrawn_inside_route_is_no_leak() -> Result<()> {
    // The link to the inside router (here the second broker's namespace), and what is behind it.
    const ROUTES: [(&str, &str, &str); 2] =
        [("172.16.8.0/24", "172.16.9.2", "172.16.8.1"), ("2001:db8:8::/48", "2001:db8:9::2", "2001:db8:8::1")];
    for mode in MODES {
        let world = World::with(TunnelKind::Tun).build()?;
        let router = &world.brokers[1];
        let ends = [(&world.host, Mac([2, 0, 0, 0, 9, 1])), (router, Mac([2, 0, 0, 0, 9, 2]))];
        let [a, b] = ends.map(|(netns, mac)| End { netns, device: "lan1", mac });
        veth(a, b, 1500)?;
        world.host.ip("addr add 172.16.9.1/24 dev lan1\naddr add 2001:db8:9::1/64 dev lan1 nodad")?;
        router.ip(
            "addr add 172.16.9.2/24 dev lan1\naddr add 2001:db8:9::2/64 dev lan1 nodad\naddr add 172.16.8.1/32 dev lo\naddr \
             add 2001:db8:8::1/128 dev lo nodad",
        )?;
        let routed = "via = [\"sixxs0\"]\nexempt = [\"connected\", \"routed\"]\n";
        let config = world.config().replace("via = [\"sixxs0\"]\n", routed);
        let options = DaemonOptions { datapath: Some(mode), ..DaemonOptions::default() };
        let _daemon = Daemon::start(&world, &config, &options)?;
        for (family, (net, gateway, dst)) in Family::ALL.into_iter().zip(ROUTES) {
            let what = || format!("{mode}, {family}");
            let route = |change: &str| world.host.ip(&format!("route {change} {net} via {gateway} dev lan1"));
            let watch = [
                ("inside", Watch::entering(router, "lan1")),
                ("tunnel", Watch::leaving(&world.host, TUNNELS[0].device)),
                ("uplink", Watch::leaving(&world.host, "net0")),
            ];
            let flow = Flow::start(FlowOptions {
                from: &world.client,
                src: TUNNELS[0].client.of(family),
                to: router,
                dst: dst.parse()?,
                rate: 2000,
                payload: 64,
                watch: &watch,
            })?;
            flow.wait_for("tunnel", SystemTime::UNIX_EPOCH, SOON).with_context(what)?;
            for _ in 0..5 {
                let since = SystemTime::now();
                route("add")?;
                flow.wait_for("inside", since, SOON).with_context(what)?;
                let since = SystemTime::now();
                route("del")?;
                flow.wait_for("tunnel", since, SOON).with_context(what)?;
            }
            let since = SystemTime::now();
            flow.wait_for_many("tunnel", since, 100).with_context(what)?;
            ensure!(
                flow.count_since("uplink", since) == 0,
                "{}: by the uplink although it is no longer exempt",
                what()
            );
            let report = flow.stop()?;
            let leaked = report.count("uplink");
            eprintln!("{}: {leaked} of {:.0} packets/s left by the uplink in five times", what(), report.rate());
            ensure!(leaked == 0 || mode == "kernel", "{}: {leaked} packets left by the uplink", what());
        }
    }
    Ok(())
}

/// One client of a network that has a tunnel leaves by the provider.
#[test]
fn one_client_inside_a_wider_policy_is_left_to_the_main_table() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let one = TUNNELS[0].client;
    let television =
        format!("\n[[policy]]\nname = \"television\"\nfrom = [\"{}\", \"{}\"]\nvia = \"main\"\n", one.v4, one.v6);
    let (mut places, mut marks) = (Places::watch(&world)?, Marks(8000));
    let injector = world.client_injector()?;
    in_each_mode(&world, &(world.config() + &television), |mode, daemon| {
        let before = daemon.counters()?;
        for (family, other) in Family::ALL.into_iter().zip(["10.0.0.3", "2a02:578:85a0::3"]) {
            for (source, place) in [(one.of(family), "net0"), (other.parse()?, "sixxs0")] {
                let mark = marks.next();
                injector.send(&packet(source, REMOTE.of(family), 64, mark, 64)?)?;
                places.expect(Some(place), mark).with_context(|| format!("{mode}: from {source}"))?;
            }
        }
        let since = daemon.counters()?.since(&before);
        let outcomes: Vec<&str> =
            since.keys().filter(|(policy, _)| policy == "television").map(|(_, outcome)| outcome.as_str()).collect();
        assert_eq!(outcomes, if mode == "kernel" { vec![] } else { vec!["main"] }, "{mode}");
        Ok(())
    })
}
