//! tunroute as a systemd service: what the service manager and the journal hear of it, and what it needs to be allowed.

use std::{
    fs::{self, File},
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, TUNNELS, TunnelKind, World,
    daemon::unit_capabilities,
    pace::SOON,
    ping,
    plan::{PLAIN_CLIENT, REMOTE},
    traffic::Answer,
};

/// `WATCHDOG_USEC`: with the daemon's look every half second, it says that it is alive as often.
const WATCHDOG: Duration = Duration::from_millis(1200);

/// The service manager's end of `NOTIFY_SOCKET`.
struct Manager(UnixDatagram);

impl Manager {
    fn new(path: &Path) -> Result<Self> {
        let socket = UnixDatagram::bind(path).context("cannot bind NOTIFY_SOCKET")?;
        Ok(Self(socket))
    }

    /// The next message, if one comes in time.
    fn next(&self, timeout: Duration) -> Result<Option<String>> {
        self.0.set_read_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        let mut buffer = [0; 4096];
        match self.0.recv(&mut buffer) {
            // With a timeout it is not restarted after a signal, be it one that is ignored (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.next(timeout),
            Ok(length) => Ok(Some(String::from_utf8(buffer[..length].to_vec())?)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a message with this beginning; those before it are returned, too.
    fn wait(&self, beginning: &str) -> Result<(Vec<String>, String)> {
        let deadline = Instant::now() + SOON;
        let mut before = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(message) = self.next(left)? else { bail!("no {beginning} but {before:?}") };
            if message.starts_with(beginning) {
                return Ok((before, message));
            }
            before.push(message);
        }
    }
}

fn env(variables: &[(&str, &str)]) -> DaemonOptions {
    let env = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    DaemonOptions { env, ..DaemonOptions::default() }
}

#[test]
fn the_service_manager_hears_how_the_daemon_is() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let path = world.dir().join("notify");
    let manager = Manager::new(&path)?;
    let options =
        env(&[("NOTIFY_SOCKET", &path.to_string_lossy()), ("WATCHDOG_USEC", &WATCHDOG.as_micros().to_string())]);
    let mut daemon = Daemon::start(&world, &world.config(), &options)?;
    let (before, _) = manager.wait("READY=1")?;
    // Rules and routes are in force, and the programs follow.
    assert_eq!(before, ["STATUS=2 of 2 tunnels up; fast path off"]);
    assert_eq!(manager.wait("STATUS=")?.1, "STATUS=2 of 2 tunnels up; fast path on");
    // What READY promises.
    let remote = REMOTE.of(Family::V6);
    assert_eq!(ping(&world.host, TUNNELS[0].host.of(Family::V6), remote)?, Answer::Reply);

    // On a busy machine one or the other may come, or be looked at, late.
    let mut pauses = Vec::new();
    for _ in 0..8 {
        let last = Instant::now();
        let (before, _) = manager.wait("WATCHDOG=1")?;
        ensure!(before.is_empty(), "{before:?}");
        pauses.push(last.elapsed());
    }
    let in_time = pauses.iter().filter(|pause| **pause < WATCHDOG * 2 / 3).count();
    ensure!(in_time > pauses.len() / 2, "{pauses:?}");

    world.set_tunnel(1, false)?;
    let (_, status) = manager.wait("STATUS=")?;
    assert_eq!(status, "STATUS=1 of 2 tunnels up (sixxs1 down); fast path on");
    world.set_tunnel(1, true)?;
    let (_, status) = manager.wait("STATUS=")?;
    assert_eq!(status, "STATUS=2 of 2 tunnels up; fast path on");

    for good in [true, false] {
        daemon.write_config(&if good { world.config() } else { "nonsense".to_owned() })?;
        assert_eq!(daemon.reload().is_ok(), good);
        let (_, reloading) = manager.wait("RELOADING=1\nMONOTONIC_USEC=")?;
        ensure!(reloading.rsplit('=').next().is_some_and(|usec| usec.parse::<u64>().is_ok_and(|usec| usec > 0)));
        manager.wait("READY=1")?;
    }

    // A main loop that hangs is not said to be alive by anybody else.
    daemon.freeze()?;
    while manager.next(Duration::ZERO)?.is_some() {}
    assert_eq!(manager.next(WATCHDOG)?, None);
    daemon.signal(Signal::SIGCONT)?;
    manager.wait("WATCHDOG=1")?;
    ensure!(daemon.terminate()?.success());
    manager.wait("STOPPING=1")?;
    assert_eq!(manager.next(Duration::from_millis(50))?, None);
    Ok(())
}

#[test]
fn an_abstract_socket_and_somebody_elses_watchdog() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    // The abstract namespace is the network namespace's.
    let manager = world.host.run_in(|| {
        let address = SocketAddr::from_abstract_name("test/notify")?;
        Ok(Manager(UnixDatagram::bind_addr(&address)?))
    })?;
    let options = env(&[("NOTIFY_SOCKET", "@test/notify"), ("WATCHDOG_USEC", "300000"), ("WATCHDOG_PID", "1")]);
    let _daemon = Daemon::start(&world, &world.config(), &options)?;
    manager.wait("READY=1")?;
    assert_eq!(manager.wait("STATUS=")?.1, "STATUS=2 of 2 tunnels up; fast path on");
    assert_eq!(manager.next(Duration::from_millis(1200))?, None);
    Ok(())
}

#[test]
fn a_service_manager_that_hangs_does_not_hold_up_the_daemon() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let path = world.dir().join("notify");
    let manager = Manager::new(&path)?;
    let options = env(&[("NOTIFY_SOCKET", &path.to_string_lossy()), ("WATCHDOG_USEC", "300000")]);
    let daemon = Daemon::start(&world, &world.config(), &options)?;
    let room: usize = fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen")?.trim().parse()?;
    let mut changes = 0;
    while changes < 2 * room + 4 {
        for up in [false, true] {
            world.set_tunnel(0, up)?;
            let state = if up { "up" } else { "down" };
            daemon.wait_status(|status| status["tunnels"][0]["state"] == state, SOON)?;
            changes += 1;
        }
    }
    let mut heard = 0;
    while manager.next(Duration::from_millis(1))?.is_some() {
        heard += 1;
    }
    ensure!(heard > room / 2 && heard < changes, "{heard} of {changes} changes, with room for {room}");
    manager.wait("WATCHDOG=1")?;
    Ok(())
}

#[test]
fn the_journal_gets_priorities_and_everybody_else_gets_times() -> Result<()> {
    let world = World::with(TunnelKind::Tun).tunnels_present([true, false]).build()?;
    let log = world.host.dir().join("tunroute.log");
    let meta = File::create(&log)?.metadata()?;
    let stream = |inode| env(&[("JOURNAL_STREAM", &format!("{}:{inode}", meta.dev()))]);
    // What is wrong with this one takes several lines.
    for config in [world.config(), "[interfaces]\nupstream = 1\n".to_owned()] {
        fs::write(&log, "")?;
        let good = config == world.config();
        let mut daemon = Daemon::spawn(&world, &config, &stream(meta.ino()))?;
        if good {
            daemon.wait_ready()?;
            daemon.write_config("nonsense")?;
            ensure!(daemon.reload().is_err());
            daemon.terminate()?;
        } else {
            ensure!(!daemon.wait()?.success());
        }
        let text = daemon.log();
        let wrong: Vec<&str> = text.lines().filter(|line| !line.starts_with(['<'])).collect();
        ensure!(wrong.is_empty() && !text.contains('\u{1b}'), "{text}");
        let said = |line: &str| text.lines().any(|found| found.starts_with(line));
        if good {
            ensure!(said("<6>ready") && said("<3>the old configuration stays in force"), "{text}");
        } else {
            ensure!(text.lines().count() > 1 && text.lines().all(|line| line.starts_with("<3>")), "{text}");
        }
    }
    fs::write(&log, "")?;
    let daemon = Daemon::start(&world, &world.config(), &stream(meta.ino() + 1))?;
    let text = daemon.log();
    ensure!(text.lines().any(|line| line.starts_with("20") && line.ends_with(" INFO ready")), "{text}");
    Ok(())
}

/// A configuration with probes, whose raw sockets need a capability of their own.
fn probed(world: &World) -> String {
    let probe = "probe = { target = \"2001:db8:ee::1\", interval = \"200ms\", timeout = \"190ms\" }";
    world.config().replace("[tunnel.sixxs0]", &format!("[tunnel.sixxs0]\n{probe}"))
}

#[test]
fn the_units_capabilities_are_enough_and_none_is_too_many() -> Result<()> {
    let all = unit_capabilities()?;
    let names: Vec<&str> = all.split_whitespace().collect();
    let works = |capabilities: &str| -> Result<String> {
        let world = World::with(TunnelKind::Tun).build()?;
        let daemon = Daemon::start(&world, &probed(&world), &DaemonOptions::with_capabilities(capabilities))?;
        let probe = |status: &serde_json::Value| status["tunnels"][0]["probes"][0]["verdict"] == "up";
        let status = match daemon.wait_status(probe, Duration::from_secs(10)) {
            Ok(status) => status,
            Err(error) => return Ok(format!("no probe is answered: {error:#}")),
        };
        if status["fast_path"]["state"] != "on" || status["problems"] != serde_json::json!([]) {
            return Ok(format!("{status:#}"));
        }
        let src = TUNNELS[0].client.of(Family::V6);
        assert_eq!(ping(&world.client, src, REMOTE.of(Family::V6))?, Answer::Reply);
        // Two looks at the programs later they are still held to be where they were put.
        std::thread::sleep(Duration::from_millis(1100));
        let log = daemon.log();
        Ok(if log.matches("attach program ingress dev lan0").count() == 1 { String::new() } else { log })
    };
    assert_eq!(works(&all)?, "", "{all}");
    for left_out in &names {
        let others: Vec<&str> = names.iter().copied().filter(|name| name != left_out).collect();
        let missed = match works(&others.join(" ")) {
            Ok(missed) => missed,
            Err(error) => format!("{error:#}"),
        };
        // What is said without it: the daemon does not start without the first one, and tells what it lacks; nor do programs
        // without the next two; no probe is answered without raw sockets.
        let expected = match *left_out {
            "CAP_NET_RAW" => "no probe is answered",
            other => other,
        };
        ensure!(missed.contains(expected), "without {left_out}, {expected:?} should be said, not: {missed}");
    }
    Ok(())
}

#[test]
fn without_cap_bpf_the_kernel_datapath_carries_on_and_says_so() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    for (round, capabilities) in ["CAP_NET_ADMIN", "CAP_NET_ADMIN CAP_BPF"].into_iter().enumerate() {
        let mut daemon = Daemon::start(&world, &world.config(), &DaemonOptions::with_capabilities(capabilities))?;
        let status = daemon.status()?;
        assert_eq!(status["fast_path"]["state"], "off", "{status:#}");
        let reasons = status["fast_path"]["reasons"].to_string();
        eprintln!("{capabilities}: {reasons}");
        ensure!(reasons.contains("CAP_BPF") && reasons.contains("CAP_PERFMON"), "{reasons}");
        assert_eq!(status["problems"], serde_json::json!([]));
        // Said once, although it is tried again all the time.
        for up in [false, true] {
            world.set_tunnel(0, up)?;
            let state = if up { "up" } else { "down" };
            daemon.wait_status(|status| status["tunnels"][0]["state"] == state, SOON)?;
        }
        assert_eq!(daemon.log().matches("no fast path").count(), round + 1, "{}", daemon.log());
        for family in Family::ALL {
            let remote = REMOTE.of(family);
            for (netns, src) in
                [(&world.host, TUNNELS[1].host), (&world.client, TUNNELS[0].client), (&world.client, PLAIN_CLIENT)]
            {
                assert_eq!(ping(netns, src.of(family), remote)?, Answer::Reply, "{capabilities}, {}", src.of(family));
            }
        }
        daemon.terminate()?;
    }
    Ok(())
}
