//! The daemon's life: what it leaves behind, what it refuses, what it says of itself.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::{
        signal::Signal,
        socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket},
    },
};
use serde_json::json;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, Flow, FlowOptions, ForeignProgram, Snapshot, TUNNELS, TunnelKind, Watch, World,
    daemon::{binary, copy_program},
    pace::{SOON, patience, until},
    ping, ping_briefly,
    plan::REMOTE,
    snapshot::has_tcx,
    traffic::Answer,
};

const MODES: [&str; 3] = ["kernel", "both", "ebpf"];

fn mode(datapath: &'static str) -> DaemonOptions {
    DaemonOptions { datapath: Some(datapath), ..DaemonOptions::default() }
}

/// Both tunnels carry, from behind the host and from itself.
fn ensure_carries(world: &World) -> Result<()> {
    for family in Family::ALL {
        for plan in &TUNNELS {
            for (netns, src) in [(&world.client, plan.client.of(family)), (&world.host, plan.host.of(family))] {
                let answer = ping(netns, src, REMOTE.of(family))?;
                ensure!(answer == Answer::Reply, "{src}: {answer:?}");
            }
        }
    }
    Ok(())
}

/// Nothing of a daemon is left in the world's host.
fn ensure_gone(world: &World, before: &Snapshot) -> Result<()> {
    before.wait_same(|| world.host.snapshot())?;
    for path in [world.pin_dir(), world.host.dir().join("run"), world.host.dir().join("rt_tables.d")] {
        ensure!(!path.exists(), "{} is still there", path.display());
    }
    Ok(())
}

/// Somebody else's rules inside tunroute's band, routes, filters and programs on the devices that it uses.
fn install_foreign(world: &World) -> Result<Vec<ForeignProgram>> {
    world.host.ip(
        "rule add from 10.77.0.0/16 lookup 777 pref 20112\n-6 rule add from 2001:db8:77::/48 lookup 777 pref 20080\n\
         route add 10.78.0.0/16 dev lan0 table 777\n-6 route add 2001:db8:78::/48 dev lan0 table 777\n\
         route add 10.79.0.0/16 via 10.0.0.2 proto static",
    )?;
    for command in [
        "qdisc add dev lan0 clsact",
        "filter add dev lan0 ingress prio 7 protocol ip u32 match ip dst 10.99.0.0/16 flowid 1:1",
        "filter add dev lan0 egress prio 7 protocol ip u32 match ip dst 10.99.0.0/16 flowid 1:1",
    ] {
        world.host.query("tc", command)?;
    }
    Ok(vec![ForeignProgram::attach(&world.host, "lan0", true)?, ForeignProgram::attach(&world.host, "net0", false)?])
}

#[test]
fn down_leaves_everything_as_it_was_even_after_a_crash() -> Result<()> {
    for foreign in [false, true] {
        let world = World::with(TunnelKind::Veth).build()?;
        let _programs = if foreign { install_foreign(&world)? } else { Vec::new() };
        let before = world.host.snapshot()?;
        for mode_name in MODES {
            for crash in [false, true] {
                let what = || format!("{mode_name}, crash: {crash}, foreign: {foreign}");
                let mut daemon = Daemon::start(&world, &world.config(), &mode(mode_name))?;
                ensure_carries(&world).with_context(what)?;
                ensure!(!before.diff(&world.host.snapshot()?).is_empty(), "{}: it has done nothing", what());
                if crash {
                    daemon.kill9()?;
                    ensure_carries(&world).with_context(what).context("with no daemon")?;
                    let down = daemon.client(&["down"])?;
                    ensure!(down.status.success(), "{}: {}", what(), String::from_utf8_lossy(&down.stderr));
                } else {
                    ensure!(daemon.down()?.success(), "{}: {}", what(), daemon.log());
                }
                ensure_gone(&world, &before).with_context(what)?;
                // Once more is no error, and says so.
                let again = daemon.client(&["down"])?;
                let said = String::from_utf8_lossy(&again.stdout).into_owned();
                ensure!(again.status.success() && said.contains("nothing to do"), "{}: {said}", what());
            }
        }
    }
    Ok(())
}

/// Whoever removes what is left does not know how it was attached.
#[test]
fn down_removes_filters_of_a_daemon_that_crashed() -> Result<()> {
    for foreign in [false, true] {
        let world = World::with(TunnelKind::Veth).build()?;
        let _programs = if foreign { install_foreign(&world)? } else { Vec::new() };
        let before = world.host.snapshot()?;
        // The second daemon attaches in another way, beside what the first has left.
        let successors = [None, Some("tcx"), Some("clsact")];
        for successor in successors.into_iter().filter(|successor| has_tcx() || *successor != Some("tcx")) {
            let options = DaemonOptions { attach: Some("clsact"), ..DaemonOptions::default() };
            let mut daemon = Daemon::start(&world, &world.config(), &options)?;
            ensure_carries(&world)?;
            daemon.kill9()?;
            if successor.is_some() {
                let options = DaemonOptions { attach: successor, ..DaemonOptions::default() };
                daemon = Daemon::start(&world, &world.config(), &options)?;
                assert_eq!(daemon.status()?["problems"], json!([]));
                ensure_carries(&world)?;
                daemon.kill9()?;
            }
            let down = daemon.client(&["down"])?;
            ensure!(down.status.success(), "{successor:?}: {}", String::from_utf8_lossy(&down.stderr));
            ensure_gone(&world, &before).with_context(|| format!("foreign: {foreign}, successor: {successor:?}"))?;
        }
    }
    Ok(())
}

/// `--pin-dir /sys/fs/bpf` is where others pin, too, and cannot be removed.
#[test]
fn others_pins_in_the_pin_directory_stay() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let root = world.pin_dir().parent().context("a bpffs")?.to_owned();
    let entries = || -> Result<Vec<_>> {
        let mut names: Vec<_> = fs::read_dir(&root)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        names.sort();
        Ok(names)
    };
    for name in ["somebody", "vpn", "v1x"] {
        fs::create_dir(root.join(name))?;
    }
    let (before, pristine) = (entries()?, world.host.snapshot()?);
    let options = DaemonOptions { pin_dir: Some(root.clone()), ..DaemonOptions::default() };
    let mut daemon = Daemon::start(&world, &world.config(), &options)?;
    ensure!(entries()?.len() == before.len() + 2, "maps and links: {:?}", entries()?);
    daemon.write_config(&format!("datapath = \"kernel\"\n{}", world.config()))?;
    daemon.reload()?;
    assert_eq!(entries()?, before, "with no fast path");
    daemon.write_config(&world.config())?;
    daemon.reload()?;
    ensure_carries(&world)?;
    ensure!(daemon.down()?.success(), "{}", daemon.log());
    assert_eq!(entries()?, before, "down");
    pristine.wait_same(|| world.host.snapshot())
}

#[test]
fn sigterm_leaves_the_datapaths_unless_told_otherwise() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let before = world.host.snapshot()?;
    for mode_name in MODES {
        let mut daemon = Daemon::start(&world, &world.config(), &mode(mode_name))?;
        let running = world.host.snapshot()?;
        ensure!(daemon.terminate()?.success(), "{mode_name}: {}", daemon.log());
        running.ensure_same(&world.host.snapshot()?).with_context(|| format!("{mode_name}, after SIGTERM"))?;
        ensure_carries(&world).with_context(|| format!("{mode_name}, with no daemon"))?;
        let options = DaemonOptions { down_on_exit: true, ..mode(mode_name) };
        let mut daemon = Daemon::start(&world, &world.config(), &options)?;
        running.ensure_same(&world.host.snapshot()?).with_context(|| format!("{mode_name}, adopted"))?;
        ensure!(daemon.terminate()?.success(), "{mode_name}: {}", daemon.log());
        ensure_gone(&world, &before).with_context(|| format!("{mode_name}, down on exit"))?;
    }
    Ok(())
}

/// No packet is lost over a restart, an orderly one or not, and the next daemon finds nothing to do.
#[test]
fn a_restart_adopts_what_is_there() -> Result<()> {
    // Not tun, whose other end is a thread of this process: its queue overflows when the thread has to wait.
    let world = World::with(TunnelKind::Veth).build()?;
    for mode_name in MODES {
        let mut daemon = Daemon::start(&world, &world.config(), &mode(mode_name))?;
        ensure_carries(&world)?;
        let watch = [
            ("remote", Watch::entering(&world.remote, TUNNELS[0].remote_device)),
            ("uplink", Watch::leaving(&world.host, "net0")),
        ];
        let (src, dst) = (TUNNELS[0].client.of(Family::V6), REMOTE.of(Family::V6));
        let flow = Flow::start(FlowOptions {
            from: &world.client,
            src,
            to: &world.remote,
            dst,
            rate: 5000,
            payload: 64,
            watch: &watch,
        })?;
        for kill in [false, true] {
            if kill {
                daemon.kill9()?
            } else {
                daemon.terminate()?
            };
            let said = daemon.log().len();
            drop(daemon);
            daemon = Daemon::start(&world, &world.config(), &mode(mode_name))?;
            let log = daemon.log()[said..].to_owned();
            let changes: Vec<&str> =
                log.lines().filter(|line| [" rule ", " route ", " map "].iter().any(|op| line.contains(op))).collect();
            ensure!(changes.is_empty(), "{mode_name}, killed: {kill}: {changes:#?}");
            flow.wait_for("remote", SystemTime::now(), SOON)?;
        }
        let report = flow.stop()?;
        let (lost, leaked) = (report.lost(&["remote"]), report.count("uplink"));
        assert_eq!((lost, leaked), (0, 0), "{mode_name}: lost and leaked of {}", report.sent);
        daemon.down()?;
    }
    Ok(())
}

/// Rules are in force, others' removal of them is repaired, and `status` answers, while the programs are being loaded; and a
/// reload that needs programs for the first time does not wait for them either.
#[test]
fn nothing_waits_for_programs() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let rules = || -> Result<bool> {
        Ok(world.host.query("ip", "rule show")?.contains(&format!("proto {}", tunroute::policy::net::PROTOCOL)))
    };
    for mode_name in ["both", "ebpf"] {
        let mut daemon = Daemon::spawn(&world, &world.config(), &mode(mode_name))?;
        until("rules stand in", rules)?;
        world.host.ip("rule flush\nrule add pref 32766 lookup main")?;
        until("repaired", || Ok(rules()? || daemon.log().contains("no rules needed")))?;
        daemon.wait_ready()?;
        let log = daemon.log();
        let at = |words: &str| log.find(words).with_context(|| format!("\"{words}\" is not in\n{log}"));
        ensure!(at("ip rule add")? < at(" ready")? && at(" ready")? < at("attach program")?, "{log}");
        ensure_carries(&world).context(mode_name)?;
        assert_eq!(rules()?, mode_name == "both", "{mode_name}");
        daemon.down()?;
        fs::remove_file(world.host.dir().join("tunroute.log"))?;
    }
    let kernel = format!("datapath = \"kernel\"\n{}", world.config());
    let mut daemon = Daemon::start(&world, &kernel, &DaemonOptions::default())?;
    let log = daemon.log().len();
    daemon.write_config(&world.config())?;
    daemon.reload()?;
    let log = daemon.log().split_off(log);
    let at = |words: &str| log.find(words).with_context(|| format!("\"{words}\" is not in\n{log}"));
    ensure!(at("is in force")? < at("attach program")?, "{log}");
    daemon.down()?;
    Ok(())
}

/// More prefixes than the programs have room for: others are loaded, and what is decided goes on meanwhile.
#[test]
fn programs_with_more_room_take_the_place_of_others() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let prefixes: Vec<String> = (0..4_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761))
        .map(|n| format!("\"2001:db8:{:x}:{:x}::/64\"", n >> 16, n & 0xffff))
        .collect();
    let more = format!("\n[[policy]]\nname = \"many\"\nfrom = [{}]\nvia = [\"sixxs1\"]\n", prefixes.join(", "));
    let mut daemon = Daemon::start(&world, &world.config(), &mode("ebpf"))?;
    let words = |daemon: &Daemon<'_>| -> Result<u64> {
        let status = daemon.status()?;
        let capacity = status["fast_path"]["maps"][0]["capacity"].as_u64();
        capacity.with_context(|| format!("no capacity: {:#}\n{}", status["fast_path"], daemon.log()))
    };
    let before = words(&daemon)?;
    daemon.write_config(&format!("{}{more}", world.config()))?;
    daemon.reload()?;
    let status = daemon.status()?;
    ensure!(words(&daemon)? > before, "{status:#}");
    assert_eq!((&status["fast_path"]["state"], &status["problems"]), (&json!("on"), &json!([])), "{status:#}");
    assert_eq!(status["kernel"]["rules"], 0, "{status:#}");
    ensure_carries(&world)?;
    daemon.down()?;
    Ok(())
}

/// `down` is heard by a daemon that has just begun, and ends it.
#[test]
fn down_ends_a_daemon_that_is_starting() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let before = world.host.snapshot()?;
    let record = world.host.dir().join("run/instance.json");
    for mode_name in MODES {
        let mut daemon = Daemon::spawn(&world, &world.config(), &mode(mode_name))?;
        until("it has begun", || Ok(record.exists()))?;
        ensure!(daemon.down()?.success(), "{mode_name}: {}", daemon.log());
        ensure_gone(&world, &before).context(mode_name)?;
    }
    Ok(())
}

#[test]
fn down_removes_everything_although_the_pins_are_gone() -> Result<()> {
    let world = World::with(TunnelKind::Veth).build()?;
    let before = world.host.snapshot()?;
    for (mode_name, attach) in [("both", None), ("ebpf", None), ("kernel", None), ("both", Some("clsact"))] {
        let config = world.config().replace("[tunnel.sixxs0]", "[tunnel.sixxs0]\nmss = \"auto\"");
        let mut daemon = Daemon::start(&world, &config, &DaemonOptions { attach, ..mode(mode_name) })?;
        fs::remove_dir_all(world.pin_dir())?;
        ensure!(daemon.down()?.success(), "{mode_name}, {attach:?}: {}", daemon.log());
        ensure_gone(&world, &before).with_context(|| format!("{mode_name}, {attach:?}"))?;
    }
    Ok(())
}

/// What belongs to programs is closed with them.
#[test]
fn programs_that_come_and_go_leave_no_descriptors() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let descriptors = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", daemon.pid()?))?.count()) };
    const ROUNDS: usize = 8;
    let mut first = None;
    for _ in 0..ROUNDS {
        daemon.write_config(&format!("datapath = \"kernel\"\n{}", world.config()))?;
        daemon.reload()?;
        first = first.map_or_else(descriptors, Ok).map(Some)?;
        daemon.write_config(&world.config())?;
        daemon.reload()?;
    }
    daemon.write_config(&format!("datapath = \"kernel\"\n{}", world.config()))?;
    daemon.reload()?;
    // Sockets that are opened once may have come since; what was being loaded may take a moment more to go.
    let first = first.context("there were rounds")?;
    until("fewer new descriptors than rounds", || Ok(descriptors()? < first + ROUNDS))?;
    Ok(())
}

fn output(child: std::process::Child) -> Result<Output> {
    child.wait_with_output().context("cannot wait")
}

/// `tunroute run` in the world's host with directories of its own, or those of the daemon.
fn second(world: &World, runtime: &str, state: &str, config: &Path) -> Result<Command> {
    let dir = world.host.dir();
    let mut command = world.host.command(binary()?);
    command.arg("run").arg("--config").arg(config);
    command.arg("--runtime-dir").arg(dir.join(runtime)).arg("--state-dir").arg(dir.join(state));
    command.arg("--rt-tables-dir").arg(dir.join("rt_tables.d")).arg("--pin-dir").arg(world.pin_dir());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// What anybody can do to the lock of a network namespace: to have the port number of its netlink socket.
fn take_lock_without_privileges(world: &World) -> Result<OwnedFd> {
    world.host.run_in(|| {
        // SAFETY: a system call with plain numbers, for this thread alone, which ends after it.
        let nobody = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        ensure!(nobody == 0, "{}", io::Error::last_os_error());
        let open = || socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        let refused = bind(open()?.as_raw_fd(), &NetlinkAddr::new(1 << 30, 1 << 29));
        ensure!(refused == Err(Errno::EPERM), "nobody has joined the group: {refused:?}");
        let stranger = open()?;
        bind(stranger.as_raw_fd(), &NetlinkAddr::new(1 << 30, 0))?;
        Ok(stranger)
    })
}

#[test]
fn a_second_daemon_refuses_and_the_first_goes_on() -> Result<()> {
    for with_stranger in [false, true] {
        second_daemon_refuses(with_stranger)
            .with_context(|| format!("with a stranger at the lock: {with_stranger}"))?;
    }
    Ok(())
}

fn second_daemon_refuses(with_stranger: bool) -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let _stranger = with_stranger.then(|| take_lock_without_privileges(&world)).transpose()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let running = world.host.snapshot()?;
    let config = world.host.dir().join("tunroute.toml");
    for (runtime, state, expected) in [
        ("run", "state", "in use by process"),
        ("run2", "state", "in use by process"),
        ("run", "state2", "another tunroute manages this network namespace"),
        ("run2", "state2", "another tunroute manages this network namespace"),
    ] {
        let output = output(second(&world, runtime, state, &config)?.spawn()?)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{runtime}, {state}: {}: {said}", output.status);
        let lines = said.lines().filter(|line| !line.contains("locking by another number")).count();
        ensure!(said.contains(expected) && lines == 1, "{runtime}, {state}: {said}");
        running.ensure_same(&world.host.snapshot()?)?;
        daemon.status()?;
    }
    ensure_carries(&world)
}

/// Takes all capabilities from a command, or makes it somebody else's.
fn unprivileged(mut command: Command, as_root: bool) -> Command {
    let drop = move || {
        if as_root {
            // PR_CAPBSET_DROP for each: what is not in the bounding set is not given to root by execve.
            for capability in 0..64 {
                // SAFETY: a system call with plain numbers; refusal means that there is no such capability.
                unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            }
            return Ok(());
        }
        // SAFETY: system calls with plain numbers.
        if unsafe { libc::setgid(65534) } != 0 || unsafe { libc::setuid(65534) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: it only makes system calls.
    unsafe { command.pre_exec(drop) };
    command
}

#[test]
fn without_capabilities_it_says_so_in_one_line() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let before = world.host.snapshot()?;
    // Where everybody may read and start it.
    let public = tempfile::Builder::new().prefix("tr-public-").tempdir()?;
    let allow = |path: &Path| fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755));
    let copy = public.path().join("tunroute");
    copy_program(&binary()?, &copy)?;
    let config = public.path().join("tunroute.toml");
    fs::write(&config, world.config())?;
    [public.path(), &copy, &config].into_iter().try_for_each(allow)?;
    let state = public.path().join("state").display().to_string();
    for as_root in [true, false] {
        let mut command = world.host.command(&copy);
        command.args(["run", "--config"]).arg(&config).args(["--state-dir", &state, "--runtime-dir", &state]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = output(unprivileged(command, as_root).spawn()?)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(77), "root: {as_root}: {}: {said}", output.status);
        ensure!(said.lines().count() == 1 && said.contains("CAP_NET_ADMIN"), "root: {as_root}: {said}");
        ensure!(output.stdout.is_empty() && !Path::new(&state).exists(), "root: {as_root}: it has begun");
    }
    before.ensure_same(&world.host.snapshot()?)
}

#[test]
fn a_tunnel_that_comes_late_is_pending_and_then_works() -> Result<()> {
    for kind in TunnelKind::ALL {
        for mode_name in MODES {
            let world = World::with(kind).tunnels_present([false, true]).build()?;
            let daemon = Daemon::start(&world, &world.config(), &mode(mode_name))?;
            let status = daemon.status()?;
            let tunnel = &status["tunnels"][0];
            assert_eq!((&tunnel["state"], &tunnel["ifindex"]), (&json!("pending"), &json!(null)), "{tunnel:#}");
            assert_eq!(status["policies"][0]["active"]["v6"], "(unreachable)", "{status:#}");
            assert_eq!(status["problems"], json!([]), "{status:#}");
            world.set_present(0, true)?;
            // From here on: the device itself appeared a little earlier.
            let appeared = Instant::now();
            until(&format!("{kind:?}, {mode_name}: works"), || {
                let answer = ping_briefly(&world.client, TUNNELS[0].client.of(Family::V6), REMOTE.of(Family::V6))?;
                Ok(answer == Answer::Reply)
            })
            .with_context(|| daemon.log())?;
            let worked = appeared.elapsed();
            eprintln!("{kind:?}, {mode_name}: works {worked:?} after it appeared, a ping included");
            // It has been told of it, and has not come across it when it looked at everything, twice a minute.
            ensure!(worked < patience(Duration::from_secs(10)), "{kind:?}, {mode_name}: after {worked:?}");
            let status = daemon.status()?;
            assert_eq!(status["tunnels"][0]["state"], "up");
            assert_eq!(status["tunnels"][0]["ifindex"], world.host.ifindex("sixxs0")?);
        }
    }
    Ok(())
}

#[test]
fn check_tells_good_files_from_bad_ones_and_run_touches_nothing_with_a_bad_one() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let before = world.host.snapshot()?;
    let file = world.host.dir().join("checked.toml");
    let good = world.config();
    let check = || -> Result<Output> {
        let mut command = world.host.command(binary()?);
        command.arg("check").arg(&file).stdin(Stdio::null()).output().context("cannot start")
    };
    fs::write(&file, &good)?;
    let output_of_good = check()?;
    let said = String::from_utf8_lossy(&output_of_good.stdout).into_owned();
    ensure!(output_of_good.status.success() && said.contains("good: 2 tunnels, 2 policies, 8 prefixes"), "{said}");
    let bad: [(&str, Vec<u8>, &str); 7] = [
        ("unknown key", format!("colour = 1\n{good}").into(), "colour"),
        ("not TOML", format!("{good}\n[[[").into(), "checked.toml"),
        ("not UTF-8", vec![0xff, 0xfe, b'a'], "UTF-8"),
        ("twice the same prefix", good.replace("203.0.113.1", "198.51.100.1").into(), "198.51.100.1"),
        ("host bits", good.replace("10.1.0.0/16", "10.1.0.1/16").into(), "10.1.0.1/16"),
        ("an unknown tunnel", good.replace("via = [\"sixxs1\"]", "via = [\"sixxs7\"]").into(), "sixxs7"),
        ("a main table", good.replace("[tunnel.sixxs1]", "[tunnel.sixxs1]\ntable = 254").into(), "254"),
    ];
    for (name, content, expected) in bad {
        fs::write(&file, content)?;
        for (command, output) in
            [("check", check()?), ("run", output(second(&world, "run", "state", &file)?.spawn()?)?)]
        {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(1), "{command}, {name}: {}: {said}", output.status);
            ensure!(said.contains(expected) && said.contains("checked.toml"), "{command}, {name}: {said}");
            ensure!(!said.contains("panicked"), "{command}, {name}: {said}");
        }
        ensure_gone(&world, &before).with_context(|| name.to_owned())?;
        ensure!(!world.host.dir().join("state").exists(), "{name}");
    }
    for path in [Path::new("/nonexistent/tunroute.toml"), world.host.dir()] {
        let output = output(second(&world, "run", "state", path)?.spawn()?)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1) && said.contains(&path.display().to_string()), "{said}");
    }
    Ok(())
}

#[test]
fn reload_with_a_bad_configuration_keeps_the_old_one_in_force() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let running = world.host.snapshot()?;
    daemon.write_config(&world.config().replace("on-down", "on-up").replace("[interfaces]", "[interface]"))?;
    let refused = daemon.client(&["reload"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(1) && said.contains("interface"), "{}: {said}", refused.status);
    // By signal, nobody but the log is told.
    let length = daemon.log().len();
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_said(length, "the old configuration stays in force")?;
    running.ensure_same(&world.host.snapshot()?)?;
    ensure_carries(&world)?;
    // A good one is taken: tunnel1's sources go, tunnel0's stay.
    let config = world.config();
    let (first, _) = config.rsplit_once("[[policy]]").context("two policies")?;
    daemon.write_config(first)?;
    daemon.reload()?;
    let policies = daemon.status()?["policies"].as_array().map(Vec::len);
    assert_eq!(policies, Some(1));
    let rules = world.host.query("ip", "rule show")?;
    ensure!(!rules.contains("203.0.113.1") && rules.contains("198.51.100.1"), "{rules}");
    Ok(())
}

/// Somebody's route stands where one of a policy's belongs, for good: all the rest of a new configuration is put in force, and
/// `reload` says what is not.
#[test]
fn a_lasting_problem_holds_back_nothing_else() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let with = |policies: &str| format!("{}\n{policies}", world.config());
    let extra = "[[policy]]\nname = \"extra\"\nfrom = \"10.200.0.0/16\"\nvia = \"sixxs1\"\n";
    for mode_name in ["kernel", "both"] {
        let mut daemon = Daemon::start(&world, &with(extra), &mode(mode_name))?;
        let table = |policy: usize| -> Result<u64> {
            daemon.status()?["policies"][policy]["table"].as_u64().context("a table")
        };
        let (broken, extras) = (table(0)?, table(2)?);
        daemon.freeze()?;
        world.host.ip(&format!("-6 route replace default dev lan0 table {broken}"))?;
        daemon.signal(Signal::SIGCONT)?;
        daemon.wait_status(|status| status["problems"].to_string().contains("File exists"), SOON)?;
        daemon.write_config(&world.config())?;
        let reload = daemon.client(&["reload"])?;
        let said = String::from_utf8_lossy(&reload.stderr).into_owned();
        ensure!(reload.status.code() == Some(1), "{mode_name}: {said}");
        ensure!(said.contains("in force, except for") && said.contains("File exists"), "{mode_name}: {said}");
        let rules = world.host.query("ip", "rule show")?;
        ensure!(!rules.contains("10.200.0.0/16") && rules.contains("198.51.100.1"), "{mode_name}: {rules}");
        let routes = world.host.query("ip", &format!("route show table {extras}")).unwrap_or_default();
        ensure!(routes.is_empty(), "{mode_name}: {routes}");
        // What the routes of the table would replace stays.
        let sources = world.config().replace("2a02:578:85a0::/48", "2a02:578:85a0::/49");
        ensure!(sources != world.config(), "the policy has that source");
        daemon.write_config(&sources)?;
        let reload = daemon.client(&["reload"])?;
        let said = String::from_utf8_lossy(&reload.stderr).into_owned();
        ensure!(reload.status.code() == Some(1) && said.contains("until what comes before"), "{mode_name}: {said}");
        let rules = world.host.query("ip", "-6 rule show")?;
        ensure!(rules.contains("2a02:578:85a0::/48") && rules.contains("2a02:578:85a0::/49"), "{mode_name}: {rules}");
        world.host.ip(&format!("-6 route del default dev lan0 table {broken}"))?;
        daemon.wait_status(|status| status["problems"] == json!([]), SOON)?;
        daemon.reload()?;
        let rules = world.host.query("ip", "-6 rule show")?;
        ensure!(!rules.contains("2a02:578:85a0::/48"), "{mode_name}: {rules}");
        daemon.down()?;
    }
    Ok(())
}

#[test]
fn status_tells_everything() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let plan = &TUNNELS[0];
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    for mode_name in MODES {
        daemon.write_config(&format!("datapath = \"{mode_name}\"\n{}", world.config()))?;
        daemon.reload()?;
        let before = daemon.counters()?;
        for family in Family::ALL {
            assert_eq!(ping(&world.client, plan.client.of(family), REMOTE.of(family))?, Answer::Reply);
        }
        let status = daemon.status()?;
        assert_eq!(status["datapath"], mode_name);
        assert_eq!(status["pid"], daemon.pid()?.as_raw());
        assert_eq!(status["problems"], json!([]));
        let tunnel = &status["tunnels"][0];
        let expected = (json!("sixxs0"), json!("up"), json!(world.host.ifindex("sixxs0")?), json!(1400));
        let got = ["name", "state", "ifindex", "mtu"].map(|key| tunnel[key].clone());
        assert_eq!(got, <[_; 4]>::from(expected), "{mode_name}");

        let policy = &status["policies"][0];
        assert_eq!((&policy["name"], &policy["prefixes"]), (&json!("tunnel0"), &json!(4)), "{policy:#}");
        assert_eq!(policy["active"], json!({ "v4": "sixxs0", "v6": "sixxs0" }));
        let carrier = if mode_name == "kernel" { "kernel" } else { "fast path" };
        assert_eq!(policy["carried_by"], json!({ "v4": carrier, "v6": carrier }), "{mode_name}");
        let table = policy["table"].as_u64().context("a table")?;
        let routes = world.host.query("ip", &format!("route show table {table}")).unwrap_or_default();
        assert_eq!(routes.contains("default dev sixxs0"), mode_name != "ebpf", "{mode_name}: {routes}");

        let names = [
            "forwarded",
            "diverted",
            "leak_prevented",
            "blackholed",
            "exempt",
            "down",
            "hairpin",
            "expired",
            "too_big",
            "source_check",
            "closed",
            "unresolved",
            "main",
        ];
        let outcomes = policy["outcomes"].as_object().context("outcomes")?;
        assert!(names.iter().all(|name| outcomes[*name]["packets"].is_u64() && outcomes[*name]["bytes"].is_u64()));
        assert_eq!(outcomes.len(), names.len(), "{outcomes:#?}");
        let since: Vec<_> = daemon.counters()?.since(&before).into_iter().collect();
        if mode_name == "kernel" {
            assert_eq!(since, vec![]);
            assert_eq!(status["fast_path"]["state"], "off");
            assert_eq!(status["fast_path"]["reasons"], json!(["datapath = \"kernel\" is configured"]));
        } else {
            assert_eq!(since, vec![(("tunnel0".to_owned(), "forwarded".to_owned()), 2)], "{mode_name}");
            // Two echo requests with 56 bytes of data.
            assert_eq!(policy["packets"].as_u64(), outcomes["forwarded"]["packets"].as_u64());
            assert_eq!(outcomes["forwarded"]["bytes"], json!(84 + 104), "{mode_name}: {policy:#}");
            assert_eq!(status["fast_path"]["state"], "on", "{status:#}");
            assert_eq!(status["fast_path"]["attached"], json!(["egress dev net0", "ingress dev lan0"]));
        }
        let text = String::from_utf8(daemon.client(&["status"])?.stdout)?;
        for word in ["sixxs0", "tunnel1", carrier, "1400"] {
            assert!(text.contains(word), "{word} in:\n{text}");
        }
        if mode_name == "both" {
            // Each datapath counts from its beginning: the next mode starts anew.
            daemon.write_config(&format!("datapath = \"kernel\"\n{}", world.config()))?;
            daemon.reload()?;
        }
    }
    // A family that the host does not forward is the kernel's, with the reason.
    daemon.write_config(&format!("datapath = \"both\"\n{}", world.config()))?;
    daemon.reload()?;
    world.host.sysctl(&[("ipv4/ip_forward", "0")])?;
    let closed = |status: &serde_json::Value| status["policies"][0]["carried_by"]["v4"] == "kernel";
    let status = daemon.wait_status(closed, SOON)?;
    assert_eq!(status["policies"][0]["carried_by"]["v6"], "fast path", "{status:#}");
    assert_eq!(status["fast_path"]["state"], "partly", "{status:#}");
    let reasons = status["fast_path"]["reasons"].to_string();
    assert!(reasons.contains("forward") && reasons.contains("lan0"), "{reasons}");
    Ok(())
}
