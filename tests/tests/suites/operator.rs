//! What an operator asks besides: is the file right, is the host, and what `status` means to a program.

use std::{fs, process::Output};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tunroute::control::status::schema;
use tunroute_tests::{Daemon, DaemonOptions, TUNNELS, TunnelKind, World, daemon::binary};

fn run(world: &World, args: &[&str]) -> Result<Output> {
    world.host.command(binary()?).args(args).output().context("cannot start tunroute")
}

/// What fits a terminal of 80 columns.
fn narrow(text: &[u8]) -> Result<String> {
    let text = String::from_utf8(text.to_vec())?;
    let wide: Vec<&str> = text.lines().filter(|line| line.chars().count() > 80).collect();
    ensure!(wide.is_empty(), "wider than 80 columns: {wide:#?}");
    Ok(text)
}

#[test]
fn check_warns_of_what_is_probably_wrong() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let file = world.dir().join("t.toml");
    let path = file.display().to_string();
    fs::write(&file, world.config())?;
    let good = run(&world, &["check", &path])?;
    assert_eq!((good.status.code(), good.stderr.as_slice()), (Some(0), &b""[..]));
    assert_eq!(String::from_utf8(good.stdout)?, format!("{path}: good: 2 tunnels, 2 policies, 8 prefixes\n"));

    fs::write(&file, world.config().replacen("via = [\"sixxs0\"]", "via = \"sixxs1\"\non-down = \"next\"", 1))?;
    let doubtful = run(&world, &["check", &path])?;
    assert_eq!(doubtful.status.code(), Some(0));
    ensure!(String::from_utf8_lossy(&doubtful.stdout).trim_end().ends_with("; 2 warnings"), "{doubtful:?}");
    let said = narrow(&doubtful.stderr)?;
    ensure!(said.contains("no policy uses the tunnel `sixxs0`") && said.contains("leave by the uplink"), "{said}");

    fs::write(&file, "[tunnel.t]\ntabel = 3\n[[policy]]\nname = \"p\"\nfrom = \"10.0.0.1/8\"\nvia = \"t\"\n")?;
    let bad = run(&world, &["check", "--json", &path])?;
    assert_eq!(bad.status.code(), Some(1));
    let bad: Value = serde_json::from_slice(&bad.stdout)?;
    let at: Vec<_> =
        bad["problems"].as_array().context("no problems")?.iter().map(|p| (&p["severity"], &p["line"])).collect();
    assert_eq!(at, [(&Value::from("error"), &Value::from(2)), (&Value::from("error"), &Value::from(5))], "{bad:#}");
    narrow(&run(&world, &["check", &path])?.stderr)?;
    Ok(())
}

#[test]
fn doctor_finds_what_is_wrong_and_fixes_what_a_setting_fixes() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let file = world.dir().join("t.toml");
    fs::write(&file, world.config())?;
    let path = file.display().to_string();
    let healthy = run(&world, &["doctor", &path])?;
    let text = narrow(&healthy.stdout)?;
    ensure!(healthy.status.success(), "{text}{}", String::from_utf8_lossy(&healthy.stderr));

    world.host.sysctl(&[("ipv4/ip_forward", "0")])?;
    world.host.ip("-6 rule add from all fwmark 0x80000/0xff0000 lookup main pref 5210")?;
    let sick = run(&world, &["doctor", &path])?;
    let text = narrow(&sick.stdout)?;
    assert_eq!(sick.status.code(), Some(2), "{text}");
    for expected in [
        "problem: the kernel does not forward IPv4 from lan0",
        "fix:    sysctl -w net.ipv4.ip_forward=1",
        "Tailscale",
        "band = 5081",
        "2 problems, 0 warnings; `tunroute doctor --fix` fixes 1\n",
    ] {
        ensure!(text.contains(expected), "no `{expected}` in:\n{text}");
    }

    let mended = run(&world, &["doctor", "--fix", &path])?;
    let text = narrow(&mended.stdout)?;
    assert_eq!(mended.status.code(), Some(2), "{text}");
    ensure!(text.contains("    net.ipv4.ip_forward=1\n") && !text.contains("does not forward"), "{text}");
    let forwards = world.host.run_in(|| fs::read_to_string("/proc/sys/net/ipv4/ip_forward").context("no setting"))?;
    assert_eq!(forwards.trim(), "1");
    world.host.ip("-6 rule del pref 5210")?;
    let json = run(&world, &["doctor", "--json", &path])?;
    let json: Value = serde_json::from_slice(&json.stdout)?;
    assert_eq!(json["findings"], Value::Array(vec![]), "{json:#}");
    Ok(())
}

/// What only packets and the kernel's answers tell: which way an address answers, and what a tunnel carries.
#[test]
fn doctor_asks_which_way_and_how_large() -> Result<()> {
    // The other end of a veth pair drops what is larger than its own MTU, without a word.
    let world = World::with(TunnelKind::Veth).build()?;
    let target = TUNNELS[0].gateway.v6;
    let config = world.config().replacen(
        "[tunnel.sixxs0]\n",
        &format!("[tunnel.sixxs0]\nprobe = {{ target = \"{target}\", interval = \"100ms\" }}\n"),
        1,
    );
    // With the daemon, the probe's target is found by the tunnel.
    let _daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let path = world.host.dir().join("tunroute.toml").display().to_string();
    let healthy = run(&world, &["doctor", &path])?;
    let text = narrow(&healthy.stdout)?;
    ensure!(healthy.status.success(), "{text}{}", String::from_utf8_lossy(&healthy.stderr));

    world.host.ip("addr add 198.51.100.99/32 dev sixxs1")?;
    world.brokers[0].ip("link set sixxs0 mtu 1300")?;
    let json = run(&world, &["doctor", "--json", &path])?;
    let json: Value = serde_json::from_slice(&json.stdout)?;
    let found: Vec<&str> =
        json["findings"].as_array().context("no findings")?.iter().filter_map(|f| f["what"].as_str()).collect();
    let [large, answers] = found.as_slice() else { anyhow::bail!("{json:#}") };
    assert_eq!(*answers, "answers from 198.51.100.99 of sixxs1 leave by net0");
    // It lets a VLAN tag pass besides.
    let carries = format!("sixxs0 carries packets of 1304 bytes to {target} and back, but none of its MTU, 1400 bytes");
    ensure!(large.starts_with(&carries), "{large}");
    let mend = json["findings"][0]["fix"].as_str().context("nothing fixes it")?;
    world.host.ip(mend.strip_prefix("ip ").context("no command of ip")?)?;
    world.host.ip("addr del 198.51.100.99/32 dev sixxs1")?;
    let mended = run(&world, &["doctor", &path])?;
    ensure!(mended.status.success(), "{}", String::from_utf8_lossy(&mended.stdout));
    Ok(())
}

#[test]
fn status_is_as_its_schema_says() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let config = world.config().replacen(
        "[tunnel.sixxs0]\n",
        "[tunnel.sixxs0]\nup = [\"false\"]\nprobe = { target = \"192.0.2.1\", interval = \"100ms\" }\n",
        1,
    );
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let validator = jsonschema::draft202012::new(&schema()).map_err(|error| anyhow::anyhow!("{error}"))?;
    let status = daemon.status()?;
    let errors: Vec<String> =
        validator.iter_errors(&status).map(|error| format!("{}: {error}", error.instance_path())).collect();
    ensure!(errors.is_empty(), "{errors:#?}\n{status:#}");
    // It would notice.
    for (pointer, wrong) in
        [("/pid", Value::from("x")), ("/tunnels/0/command", Value::from(1)), ("/policies/0/bytes", Value::Null)]
    {
        let mut other = status.clone();
        *other.pointer_mut(pointer).with_context(|| format!("no {pointer} in {status:#}"))? = wrong;
        ensure!(!validator.is_valid(&other), "{pointer}");
    }
    Ok(())
}
