//! What all commands have in common: exit statuses, colours, `--json`, and an example in the help.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Output, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tunroute_tests::{
    Daemon, DaemonOptions, TUNNELS, Terminal, TunnelKind, World,
    daemon::{binary, copy_program},
    plan::REMOTE,
    terminal::ENDED,
};

const NO_PERMISSION: i32 = 77;

fn run(world: &World, args: &[&str]) -> Result<Output> {
    let mut command = world.host.command(binary()?);
    command.args(args).env_remove("NO_COLOR").stdin(Stdio::null()).output().context("cannot start tunroute")
}

/// Everything that asks a daemon, as words.
fn questions() -> Vec<Vec<String>> {
    let (source, remote) = (TUNNELS[0].client.v6.to_string(), REMOTE.v6.to_string());
    let explain = format!("explain {source} {remote}");
    let questions =
        ["status", "plan", &explain, "verify", "reload", "apply --confirm 5s", "confirm", "start sixxs0", "down"];
    questions.map(|question| question.split(' ').map(str::to_owned).collect()).to_vec()
}

/// The commands, as the help lists them.
fn commands(world: &World) -> Result<Vec<String>> {
    let help = String::from_utf8(run(world, &["--help"])?.stdout)?;
    let (_, list) = help.split_once("Commands:\n").context("no list of commands")?;
    let names = list.lines().map_while(|line| line.strip_prefix("  ")?.split_whitespace().next());
    Ok(names.filter(|name| *name != "help").map(str::to_owned).collect())
}

#[test]
fn each_command_has_an_example_in_its_help() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let commands = commands(&world)?;
    ensure!(commands.len() > 10, "{commands:?}");
    for command in commands {
        let help = run(&world, &[&command, "--help"])?;
        let text = String::from_utf8(help.stdout)?;
        let example = text.lines().find_map(|line| line.strip_prefix("Example: ")).with_context(|| text.clone())?;
        ensure!(help.status.success() && example.contains(&format!("tunroute {command}")), "{example}");
    }
    Ok(())
}

#[test]
fn exit_statuses_and_messages() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let nobody = world.dir().join("nobody").display().to_string();
    let with = |question: &[String]| {
        let mut args: Vec<&str> = question.iter().map(String::as_str).collect();
        args.extend(["--runtime-dir", &nobody]);
        run(&world, &args)
    };
    for question in questions().into_iter().filter(|question| !matches!(question[0].as_str(), "plan" | "down")) {
        let output = with(&question)?;
        let said = String::from_utf8(output.stderr)?;
        let expected = if matches!(question[0].as_str(), "explain" | "verify") { 2 } else { 1 };
        assert_eq!(output.status.code(), Some(expected), "{question:?}: {said}");
        ensure!(said.starts_with("tunroute: no tunroute daemon answers at ") && said.lines().count() == 1, "{said}");
    }
    for wrong in [&["stauts"][..], &["explain", "here", "there"], &["verify", "--samples", "x"], &[]] {
        assert_eq!(run(&world, wrong)?.status.code(), Some(2), "{wrong:?}");
    }
    Ok(())
}

#[test]
fn who_may_not_is_told_so_and_what_to_do() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    // For another user, who must reach the binary, but not the daemon: the world's directory is root's.
    let open = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir()?;
    let copy = open.path().join("tunroute");
    copy_program(&binary()?, &copy)?;
    let config = open.path().join("tunroute.toml");
    fs::write(&config, world.config())?;
    let runtime = world.host.dir().join("run").display().to_string();
    let as_nobody = |args: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = world.host.command("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&copy).args(args);
        let output = command.stdin(Stdio::null()).output().context("cannot start setpriv")?;
        ensure!(output.stdout.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stdout));
        Ok((output.status.code(), String::from_utf8(output.stderr)?))
    };
    for question in questions() {
        let mut args: Vec<&str> = question.iter().map(String::as_str).collect();
        args.extend(["--runtime-dir", &runtime]);
        let (code, said) = as_nobody(&args)?;
        assert_eq!(code, Some(NO_PERMISSION), "{question:?}: {said}");
        ensure!(
            said.lines().count() == 1 && said.contains("only root") && said.ends_with("run this as root\n"),
            "{said}"
        );
    }
    world.host.sysctl(&[("ipv4/ip_forward", "0")])?;
    let config = config.display().to_string();
    for args in [&["run", "--config", &config][..], &["doctor", "--fix", &config]] {
        let (code, said) = as_nobody(args)?;
        assert_eq!(code, Some(NO_PERMISSION), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    drop(daemon);
    Ok(())
}

/// The commands that print something for people, with something to say; `bad` is a configuration with a fault.
fn colourful(world: &World, bad: &Path) -> Vec<String> {
    let runtime = world.host.dir().join("run");
    let runtime = runtime.display();
    let (source, remote) = (TUNNELS[0].client.v6, REMOTE.v6);
    vec![
        format!("check {}", bad.display()),
        format!("doctor {}", world.host.dir().join("tunroute.toml").display()),
        format!("plan --runtime-dir {runtime}"),
        format!("explain {source} {remote} --runtime-dir {runtime}"),
    ]
}

#[test]
fn colours_are_for_terminals_of_those_who_like_them() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let bad = world.dir().join("bad.toml");
    fs::write(&bad, "[tunnel.t]\ntabel = 3\n")?;
    // Something for `plan`, and for `doctor`.
    daemon.write_config(&world.config().replacen("from = [", "from = [\"2001:db8:77::/48\", ", 1))?;
    world.host.ip("-6 rule add from all fwmark 0x80000/0xff0000 lookup main pref 5210")?;
    let terminal = Terminal::open(&world, (100, 40))?;
    for command in colourful(&world, &bad) {
        let words: Vec<&str> = command.split(' ').collect();
        let output = run(&world, &words)?;
        let piped = [output.stdout, output.stderr].concat();
        ensure!(!piped.is_empty() && !piped.contains(&0x1b), "{command}: {}", String::from_utf8_lossy(&piped));
        for (variables, coloured) in [("", true), ("NO_COLOR=1", false), ("NO_COLOR=", true)] {
            terminal.tunroute(variables, &command)?;
            terminal.wait(&command, |screen| screen.contains(ENDED))?;
            let painted = terminal.painted()?;
            assert_eq!(painted.contains("\x1b[3"), coloured, "{variables} {command}:\n{painted}");
        }
    }
    // The plan is a diff: what is added is green.
    terminal.tunroute("", &colourful(&world, &bad)[2])?;
    terminal.wait("the plan", |screen| screen.contains(ENDED))?;
    let painted = terminal.painted()?;
    ensure!(painted.contains("\x1b[32m+ ip -6 rule add from 2001:db8:77::/48"), "{painted}");
    Ok(())
}

#[test]
fn what_is_data_is_told_as_json_too() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let config = world.host.dir().join("tunroute.toml").display().to_string();
    let (source, remote) = (TUNNELS[0].client.v6.to_string(), REMOTE.v6.to_string());
    for (args, key) in [
        (&["status"][..], "tunnels"),
        (&["plan"], "steps"),
        (&["explain", &source, &remote], "agree"),
        (&["verify", "--samples", "1"], "packets"),
    ] {
        let output = daemon.client(&[args, &["--json"]].concat())?;
        let value: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{args:?}"))?;
        ensure!(value.get(key).is_some(), "{args:?}: no {key} in {value:#}");
    }
    for (command, key) in [("check", "problems"), ("doctor", "findings")] {
        let output = run(&world, &[command, "--json", &config])?;
        let value: Value = serde_json::from_slice(&output.stdout).with_context(|| command.to_owned())?;
        ensure!(value.get(key).is_some(), "{command}: no {key} in {value:#}");
    }

    // Again and again, each in a line.
    let mut watch = world.host.command(binary()?);
    watch.args(["status", "--json", "--watch", "--runtime-dir"]).arg(world.host.dir().join("run"));
    let mut watch = watch.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(watch.stdout.take().context("no output")?).lines().take(2);
    let statuses: Vec<Value> = lines.map(|line| Ok(serde_json::from_str(&line?)?)).collect::<Result<_>>()?;
    watch.kill()?;
    watch.wait()?;
    ensure!(statuses.len() == 2 && statuses.iter().all(|status| status["tunnels"].is_array()), "{statuses:#?}");
    Ok(())
}
