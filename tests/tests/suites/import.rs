//! From rules made by hand to managed ones: import, plan, run, and remove what was made by hand.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, TUNNELS, TunnelKind, World, daemon::binary, ping, plan::REMOTE, traffic::Answer,
};

/// The cure of the story, as one types it.
fn by_hand(world: &World) -> Result<()> {
    for (tunnel, table) in TUNNELS.iter().zip([200, 201]) {
        for family in Family::ALL {
            let option = if family == Family::V4 { "-4" } else { "-6" };
            world.host.ip(&format!("{option} route add default dev {} table {table}", tunnel.device))?;
            for source in [tunnel.host.of(family).to_string(), tunnel.prefix.of(family).to_string()] {
                world.host.ip(&format!("{option} rule add from {source} table {table}"))?;
            }
        }
    }
    Ok(())
}

fn all_answer(world: &World) -> Result<()> {
    for tunnel in TUNNELS {
        for family in Family::ALL {
            for (netns, source) in [(&world.host, tunnel.host), (&world.client, tunnel.client)] {
                let answer = ping(netns, source.of(family), REMOTE.of(family))?;
                ensure!(answer == Answer::Reply, "{}: {answer:?}", source.of(family));
            }
        }
    }
    Ok(())
}

#[test]
fn a_setup_made_by_hand_becomes_a_managed_one() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    by_hand(&world)?;
    all_answer(&world)?;

    let binary = binary()?;
    let run = |args: &[&str]| world.host.command(&binary).args(args).output().context("cannot start tunroute");
    let imported = run(&["import"])?;
    let said = String::from_utf8_lossy(&imported.stderr).into_owned();
    ensure!(imported.status.success(), "{said}");
    assert_eq!(said.trim(), "tunroute: 2 policies with 8 prefixes");
    let config = String::from_utf8(imported.stdout)?;
    let file = world.dir().join("imported.toml");
    fs::write(&file, &config)?;

    // The plan: the same rules and routes, and nothing else, with tunroute's mark and in its band and tables.
    let plan = run(&[
        "plan",
        "--json",
        &file.display().to_string(),
        "--state-dir",
        &world.dir().join("nowhere").display().to_string(),
        "--runtime-dir",
        &world.dir().join("nobody").display().to_string(),
    ])?;
    ensure!(plan.status.code() == Some(2), "{}", String::from_utf8_lossy(&plan.stderr));
    let plan: Value = serde_json::from_slice(&plan.stdout)?;
    let mut planned: Vec<&str> = plan["steps"]
        .as_array()
        .context("no steps")?
        .iter()
        .filter(|step| step["datapath"] == "kernel")
        .filter_map(|step| step["operation"].as_str())
        .collect();
    let mut expected: Vec<String> = Vec::new();
    for (tunnel, table) in TUNNELS.iter().zip([20000, 20001]) {
        for (family, ip) in Family::ALL.into_iter().zip(["ip", "ip -6"]) {
            expected.push(format!("{ip} route add default dev {} table {table} protocol 116", tunnel.device));
            for source in [tunnel.host.of(family).into(), tunnel.prefix.of(family)] {
                let priority = 20128 - u32::from(source.prefix_len());
                expected.push(format!("{ip} rule add from {source} lookup {table} pref {priority} protocol 116"));
            }
        }
    }
    planned.sort_unstable();
    expected.sort_unstable();
    assert_eq!(planned, expected, "{config}");

    // The daemon takes over, and what was made by hand is removed by the commands that the file names.
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    all_answer(&world)?;
    let removal = config.lines().filter_map(|line| line.strip_prefix("#   ip "));
    let removal: Vec<&str> = removal.filter(|command| command.contains(" del ")).collect();
    assert_eq!(removal.len(), 12, "{config}");
    world.host.ip(&removal.join("\n"))?;
    all_answer(&world)?;
    let rules = world.host.query("ip", "-4 rule show")? + &world.host.query("ip", "-6 rule show")?;
    assert_eq!(rules.lines().filter(|rule| rule.contains("lookup 20") && !rule.contains("proto 116")).count(), 0);
    let nothing = daemon.client(&["plan"])?;
    ensure!(nothing.status.code() == Some(0), "{}", String::from_utf8_lossy(&nothing.stdout));
    Ok(())
}

/// Where nothing is made by hand, `import` says so; and so it does after its own commands have removed everything.
#[test]
fn the_removal_commands_leave_nothing_behind() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let import = || -> Result<_> { Ok(world.host.command(binary()?).arg("import").output()?) };
    let nothing = || -> Result<()> {
        let imported = import()?;
        assert_eq!((imported.status.code(), imported.stdout.len()), (Some(1), 0));
        let said = String::from_utf8_lossy(&imported.stderr).into_owned();
        ensure!(said.contains("there is nothing to import"), "{said}");
        Ok(())
    };
    nothing()?;
    let [first, second] = TUNNELS.map(|tunnel| tunnel.device);
    let by_hand = format!(
        "route add default dev {first} table 200 metric 10
         route add default dev {second} table 200 metric 20
         route add unreachable default table 200 metric 4000
         route add throw 10.99.0.0/16 table 200
         -6 route add default dev {first} table 200
         -6 route add prohibit default table 200 metric 4000
         -6 route add blackhole 2001:db8:99::/48 table 200
         rule add from 10.98.0.0/16 table 200 pref 100
         rule add from 10.98.7.0/24 table 200 pref 200
         rule add from 10.98.0.0/16 table 200 pref 300
         -6 rule add from 2001:db8:98::/48 table 200
         route add default dev {second} table 201
         rule add from 10.97.0.0/16 table 201
         rule add fwmark 1 table 201"
    );
    for command in by_hand.lines() {
        world.host.ip(command.trim())?;
    }
    let imported = import()?;
    let config = String::from_utf8(imported.stdout)?;
    ensure!(config.contains("the routes of table 201 stay"), "{config}");
    let removal: Vec<&str> =
        config.lines().filter_map(|line| line.strip_prefix("#   ip ")).filter(|line| line.contains(" del ")).collect();
    for command in &removal {
        world.host.ip(command).with_context(|| config.clone())?;
    }
    nothing()?;
    for family in ["-4", "-6"] {
        assert_eq!(world.host.query("ip", &format!("{family} route show table 200"))?.trim(), "", "{config}");
    }
    let rules = world.host.query("ip", "rule show")? + &world.host.query("ip", "-6 rule show")?;
    assert_eq!(rules.lines().filter(|rule| rule.contains("20")).count(), 1, "{rules}");
    ensure!(world.host.query("ip", "route show table 201")?.contains(second), "{config}");
    Ok(())
}

/// The same from files: a tunnel by `wg-quick`, one by systemd-networkd, and a script.
#[test]
fn files_become_a_configuration() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let [first, second] = TUNNELS;
    let files = [
        (
            "sixxs0.conf",
            format!(
                "[Interface]\nPrivateKey = x=\nTable = 200\nPostUp = ip rule add from {} table 200\n\
                 [Peer]\nAllowedIPs = 0.0.0.0/0\n",
                first.prefix.v4
            ),
        ),
        (
            "10-sixxs1.network",
            format!(
                "[Match]\nName={}\n[RoutingPolicyRule]\nFrom={}\nTable=201\n[RoutingPolicyRule]\nFirewallMark=1\n\
                 Table=201\n[Route]\nTable=201\nDestination=::/0\n",
                second.device, second.prefix.v6
            ),
        ),
        ("routes.sh", "#!/bin/sh\nip route add default via 192.0.2.1 dev net0\n".to_owned()),
    ];
    let mut import = world.host.command(binary()?);
    import.args(["import", "--from-script"]);
    for (name, text) in &files {
        let file = world.dir().join(name);
        fs::write(&file, text)?;
        import.arg(file);
    }
    let imported = import.output()?;
    let said = String::from_utf8_lossy(&imported.stderr).into_owned();
    ensure!(imported.status.success(), "{said}");
    assert_eq!(said.trim(), "tunroute: 2 policies with 2 prefixes; 1 thing is not expressed: see the end of the file");
    let config = String::from_utf8(imported.stdout)?;
    ensure!(config.contains("uplink = [\"net0\"]") && config.contains("fwmark 1"), "{config}");
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    for (tunnel, family) in [(first, Family::V4), (second, Family::V6)] {
        let answer = ping(&world.client, tunnel.client.of(family), REMOTE.of(family))?;
        ensure!(answer == Answer::Reply, "{}: {answer:?}\n{}", tunnel.device, daemon.log());
    }
    Ok(())
}
