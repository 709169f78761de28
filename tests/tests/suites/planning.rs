//! `plan` says what `reload` then does; `apply --confirm` takes it back unless it is confirmed.

use std::process::Output;

use anyhow::{Result, ensure};
use serde_json::Value;
use tunroute_tests::{Daemon, DaemonOptions, TunnelKind, World, pace::SOON};

/// The shortest trial there is.
const TRIAL: &str = "1s";

fn plan(daemon: &Daemon<'_>, expected: i32) -> Result<(String, Vec<String>)> {
    let text = daemon.client(&["plan"])?;
    ensure!(text.status.code() == Some(expected), "{text:?}");
    let json = daemon.client(&["plan", "--json"])?;
    ensure!(json.status.code() == Some(expected), "{json:?}");
    let preview: Value = serde_json::from_slice(&json.stdout)?;
    let steps = preview["steps"].as_array().map(Vec::as_slice).unwrap_or_default();
    let sign = |step: &Value| match step["change"].as_str() {
        Some("add") => '+',
        Some("set") => '~',
        Some("remove") => '-',
        _ => '?',
    };
    let steps = steps.iter().map(|step| format!("{} {}", sign(step), step["operation"].as_str().unwrap_or_default()));
    Ok((String::from_utf8(text.stdout)?, steps.collect()))
}

/// The story's configuration with one prefix fewer and one more.
fn changed(config: &str) -> String {
    config.replacen("from = [", "from = [\"2001:db8:77::/48\", ", 1).replacen("\"203.0.113.1\", ", "", 1)
}

fn rules(world: &World) -> Result<String> {
    Ok(world.host.query("ip", "-4 rule show")? + &world.host.query("ip", "-6 rule show")?)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_plan_is_what_a_reload_then_does() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let config = world.config();
    let mut daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let (text, steps) = plan(&daemon, 0)?;
    assert!(steps.is_empty(), "{steps:?}");
    assert!(text.starts_with("nothing to do: "), "{text}");

    let before = rules(&world)?;
    daemon.write_config(&changed(&config))?;
    let (text, steps) = plan(&daemon, 2)?;
    assert_eq!(rules(&world)?, before, "a plan changes nothing");
    assert!(steps.iter().any(|step| step.starts_with("+ ip -6 rule add from 2001:db8:77::/48 ")), "{steps:?}");
    assert!(steps.iter().any(|step| step.starts_with("- ip rule del from 203.0.113.1/32 ")), "{steps:?}");
    assert!(steps.contains(&"+ map source[2001:db8:77::/48] = policy[1]".to_owned()), "{steps:?}");
    assert!(steps.iter().all(|step| text.contains(step)), "{text}");

    let log = daemon.log().len();
    daemon.reload()?;
    let log = daemon.log().split_off(log);
    for step in steps.iter().filter(|step| !step.contains("map ")) {
        assert!(log.contains(&step[2..]), "planned, but not done: {step}\n{log}");
    }
    let (_, steps) = plan(&daemon, 0)?;
    assert!(steps.is_empty(), "{steps:?}");

    // Nothing that cannot be put in force is planned.
    daemon.write_config("[interfaces]\ningress = 3\n")?;
    let refused = daemon.client(&["plan"])?;
    assert_eq!((refused.status.code(), refused.stdout.as_slice()), (Some(1), &b""[..]), "{refused:?}");

    // What would hold the fast path back is said.
    daemon.write_config(&config)?;
    world.host.sysctl(&[("ipv4/ip_forward", "0")])?;
    let held_back = daemon.client(&["plan"])?;
    let text = String::from_utf8(held_back.stdout)?;
    assert!(
        text.contains("note: the kernel would decide in place of the fast path: the kernel does not forward"),
        "{text}"
    );
    world.host.sysctl(&[("ipv4/ip_forward", "1")])?;

    // Without a daemon: all that it would begin with.
    daemon.down()?;
    let file = world.host.dir().join("tunroute.toml").display().to_string();
    let state = world.host.dir().join("state").display().to_string();
    let pins = world.pin_dir().display().to_string();
    let first = daemon.client(&["plan", &file, "--state-dir", &state, "--pin-dir", &pins])?;
    let text = String::from_utf8(first.stdout)?;
    assert_eq!(first.status.code(), Some(2), "{text}");
    for line in text.lines().filter(|line| line.starts_with("+ ip ")) {
        assert!(daemon.log().contains(&line[2..]), "the daemon began otherwise: {line}");
    }
    assert!(text.contains("+ attach program ingress dev lan0\n"), "{text}");
    assert!(text.contains(" to add, ") && text.trim_end().ends_with(" 0 to remove"), "{text}");
    Ok(())
}

#[test]
fn a_change_that_nobody_confirms_is_undone() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let config = world.config();
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let before = rules(&world)?;
    let hint = |status: &Value, text: &str| {
        status["hints"]
            .as_array()
            .is_some_and(|hints| hints.iter().any(|hint| hint.as_str().is_some_and(|hint| hint.contains(text))))
    };

    let too_late = daemon.client(&["confirm"])?;
    assert!(!too_late.status.success() && said(&too_late).contains("nothing waits to be confirmed"), "{too_late:?}");

    daemon.write_config(&changed(&config))?;
    let applied = daemon.client(&["apply", "--confirm", TRIAL])?;
    assert!(applied.status.success(), "{applied:?}");
    assert!(String::from_utf8_lossy(&applied.stdout).contains("`tunroute confirm` within 1 s"), "{applied:?}");
    daemon.wait_status(|status| hint(status, "not confirmed in time"), SOON)?;
    assert_eq!(rules(&world)?, before, "the earlier rules are back");

    // A trial that goes on refuses other changes; once confirmed, the change stays.
    let applied = daemon.client(&["apply", "--confirm", "1h"])?;
    assert!(applied.status.success(), "{applied:?}");
    assert!(hint(&daemon.status()?, "on trial"), "{}", daemon.status()?);
    let after = rules(&world)?;
    assert_ne!(after, before);
    let refused = daemon.client(&["reload"])?;
    assert!(!refused.status.success() && said(&refused).contains("a change is on trial"), "{refused:?}");
    let confirmed = daemon.client(&["confirm"])?;
    assert!(confirmed.status.success(), "{confirmed:?}");
    daemon.reload()?;
    assert_eq!(rules(&world)?, after);
    assert!(!hint(&daemon.status()?, "confirm"), "{}", daemon.status()?);
    Ok(())
}

#[test]
fn a_daemon_that_stops_in_a_trial_leaves_the_earlier_configuration_in_force() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let config = world.config();
    let mut daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let before = rules(&world)?;
    daemon.write_config(&changed(&config))?;
    let applied = daemon.client(&["apply", "--confirm", "1h"])?;
    assert!(applied.status.success(), "{applied:?}");
    assert_ne!(rules(&world)?, before);
    daemon.terminate()?;
    assert_eq!(rules(&world)?, before);
    Ok(())
}
