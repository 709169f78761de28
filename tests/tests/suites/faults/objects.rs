//! Others remove tunroute's rules and routes, or put their own beside them.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tunroute::policy::net::Family;

use super::scene::{IN_TIME, Scene, Setting};

/// Removes something of tunroute's; it comes back in time, and one line of the log says what happened.
fn restored(
    scene: &mut Scene<'_>,
    remove: impl FnOnce(&Scene<'_>) -> Result<()>,
    whole: impl Fn(&Scene<'_>) -> Result<bool>,
) -> Result<()> {
    ensure!(whole(scene)?, "not whole before the fault");
    let (log, started) = (scene.log_end(), Instant::now());
    remove(scene)?;
    let most = 3 + repairs_in(started.elapsed());
    scene.within("restored", IN_TIME, |scene| whole(scene))?;
    scene.flows_again("carried", IN_TIME)?;
    let said = scene.said(log, "another program");
    // A flush takes them one by one, and may not be through when the daemon looks.
    ensure!((1..=most).contains(&said), "{said} lines say what happened");
    Ok(())
}

/// So many repairs are made at most in some time, after the first: ten a second.
fn repairs_in(time: Duration) -> usize {
    usize::try_from(time.as_millis() / 100).unwrap_or(usize::MAX)
}

#[test]
fn one_rule_is_deleted() -> Result<()> {
    for family in Family::ALL {
        let setting = Setting { family, ..Setting::new("both") };
        setting.lossless().run("one rule deleted", |scene| {
            let rules = scene.own_rules()?;
            let one = rules.first().cloned().unwrap_or_default();
            let remove = |scene: &Scene<'_>| scene.host(&format!("{} rule del {one}", scene.version()));
            restored(scene, remove, |scene| Ok(scene.own_rules()? == rules))
        })?;
    }
    Ok(())
}

/// `ip rule flush` takes everybody's rules but the first; others restore theirs.
#[test]
fn rules_are_flushed() -> Result<()> {
    Setting::new("both").run("ip rule flush", |scene| {
        let rules = scene.own_rules()?;
        let others: Vec<String> = scene
            .ip("-6 -details rule show")?
            .lines()
            .filter(|line| !line.contains("proto 116") && !line.starts_with("0:"))
            .filter_map(|line| line.split_once(':'))
            .map(|(pref, rest)| format!("-6 rule add pref {pref} {}", rest.replace(" unicast", "").trim()))
            .collect();
        restored(scene, |scene| scene.host("-6 rule flush"), |scene| Ok(scene.own_rules()? == rules))?;
        scene.host(&others.join("\n"))
    })
}

#[test]
fn route_is_deleted() -> Result<()> {
    for mode in ["both", "kernel"] {
        Setting::new(mode).run("route deleted", |scene| {
            let table = scene.table()?;
            let routes = scene.routes(table)?;
            let remove = |scene: &Scene<'_>| scene.host(&format!("-6 route del default dev sixxs0 table {table}"));
            restored(scene, remove, |scene| Ok(scene.routes(table)? == routes))
        })?;
    }
    Ok(())
}

#[test]
fn route_for_the_worst_case_is_deleted() -> Result<()> {
    Setting::new("both").lossless().run("unreachable route deleted", |scene| {
        let table = scene.table()?;
        let routes = scene.routes(table)?;
        let remove = |scene: &Scene<'_>| {
            scene.host(&format!("-6 route del unreachable default metric 4294967295 table {table}"))
        };
        restored(scene, remove, |scene| Ok(scene.routes(table)? == routes))
    })
}

#[test]
fn table_is_flushed() -> Result<()> {
    for family in Family::ALL {
        Setting { family, ..Setting::new("both") }.run("table flushed", |scene| {
            let table = scene.table()?;
            let routes = scene.routes(table)?;
            let remove = |scene: &Scene<'_>| scene.host(&format!("{} route flush table {table}", scene.version()));
            restored(scene, remove, |scene| Ok(scene.routes(table)? == routes))
        })?;
    }
    Ok(())
}

/// Two managers that undo each other's work must not burn a CPU, nor starve the rest.
#[test]
fn somebody_deletes_again_and_again() -> Result<()> {
    Setting::new("both").lossless().run("a rule deleted again and again", |scene| {
        let rules = scene.own_rules()?;
        let one = rules.first().cloned().unwrap_or_default();
        let log = scene.log_end();
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(1) || scene.said(log, "another program") == 0 {
            // It may not be back yet.
            let _gone = scene.host(&format!("-6 rule del {one}"));
        }
        let repairs = scene.said(log, "another program");
        // Some before and after.
        let took = started.elapsed();
        ensure!(repairs <= repairs_in(took) + 10, "{repairs} repairs in {took:?}");
        scene.within("restored", IN_TIME, |scene| Ok(scene.own_rules()? == rules))
    })
}

/// A rule of somebody else's that comes first decides, and the fast path steps aside for it.
#[test]
fn foreign_rule_comes_first() -> Result<()> {
    Setting::new("both").lossless().run("foreign rule comes first", |scene| {
        let open = |scene: &Scene<'_>| Ok(scene.daemon.status()?["policies"][0]["carried_by"]["v6"] == "fast path");
        ensure!(open(scene)?, "{:#}", scene.daemon.status()?);
        scene.host("-6 rule add pref 100 from 2a02:578:85a0:4::/64 lookup 999")?;
        scene.within("gate closed", IN_TIME, |scene| Ok(!open(scene)?))?;
        scene.flows_again("carried by the kernel", IN_TIME)?;
        scene.host("-6 rule del pref 100")?;
        scene.within("gate open", IN_TIME, open)
    })
}

#[test]
fn notifications_overrun() -> Result<()> {
    use nix::sys::signal::Signal;
    Setting::new("both").run("notifications overrun", |scene| {
        let log = scene.log_end();
        // What happens while nobody reads the socket does not fit its buffer.
        scene.daemon.signal(Signal::SIGSTOP)?;
        let range = |verb: &str| -> String {
            (0..20_000).map(|n| format!("-6 route {verb} unreachable 2001:db8:aaaa:{n:x}::/64 table 997\n")).collect()
        };
        scene.host(&range("add"))?;
        let one = scene.own_rules()?.first().cloned().unwrap_or_default();
        scene.host(&format!("-6 rule del {one}"))?;
        scene.daemon.signal(Signal::SIGCONT)?;
        scene.within("restored", IN_TIME, |scene| Ok(scene.own_rules()?.contains(&one)))?;
        ensure!(scene.said(log, "notifications overran") >= 1, "no overrun");
        scene.host(&range("del"))?;
        scene.world.set_tunnel(0, false)?;
        scene.within("seen down", IN_TIME, |scene| scene.tunnel_is("down"))?;
        scene.world.set_tunnel(0, true)?;
        scene.flows_again("carried again", IN_TIME)
    })
}
