//! The Debian package as a user meets it: installed in a clean root (`cargo xtask test --dist` makes one and tells where in
//! `TUNROUTE_DIST_ROOT`), it runs the story in a namespace, and leaves nothing behind when it is removed.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tunroute::policy::net::Family;
use tunroute_tests::{
    TUNNELS, TunnelKind, World,
    pace::{SOON, until},
    ping, ping_briefly,
    plan::REMOTE,
    traffic::Answer,
};

/// The kernel's file systems, in a mount namespace that the process has to itself.
const ENTER: &str = "root=$1; mount -t proc proc $root/proc && mount -t sysfs sysfs $root/sys && \
                     mount -t bpf bpf $root/sys/fs/bpf && exec chroot \"$@\"";

/// The root that the package is installed in, with the network of a world's host.
struct Installed<'a> {
    root: PathBuf,
    world: &'a World,
}

impl Installed<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.world.host.command("sh");
        command.args(["-c", ENTER, "sh"]).arg(&self.root).args(words).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Result<Output> {
        self.command(words).output().with_context(|| format!("cannot start {words:?}"))
    }

    /// What a command prints that must end well.
    fn output(&self, words: &[&str]) -> Result<String> {
        let output = self.run(words)?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{}: {}: {err}{out}", words.join(" "), output.status);
        Ok(out.into_owned())
    }

    /// The daemon as the unit starts it.
    fn daemon(&self) -> Result<Daemon> {
        let unit = fs::read_to_string(self.root.join("usr/lib/systemd/system/tunroute.service"))?;
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).context("the unit starts nothing")?;
        let words: Vec<&str> = line.split(' ').collect();
        let mut daemon = Daemon(self.command(&words).spawn().context("cannot start the daemon")?);
        let deadline = Instant::now() + SOON;
        while !self.run(&["tunroute", "status"])?.status.success() {
            if let Some(status) = daemon.0.try_wait()? {
                bail!("the daemon ended with {status}");
            }
            ensure!(Instant::now() < deadline, "the daemon does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }
}

struct Daemon(Child);

impl Daemon {
    fn wait(&mut self) -> Result<()> {
        until("the daemon ends", || Ok(self.0.try_wait()?.is_some()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the package brings, less what goes with it.
fn files(root: &Path) -> Result<Vec<String>> {
    let list = fs::read_to_string(root.join("var/lib/dpkg/info/tunroute.list"))?;
    Ok(list.lines().filter(|path| path.contains("tunroute")).map(str::to_owned).collect())
}

#[test]
#[ignore = "needs a root with the package installed: cargo xtask test --dist"]
fn the_package_runs_the_story_and_leaves_nothing_behind() -> Result<()> {
    let root = PathBuf::from(env::var_os("TUNROUTE_DIST_ROOT").context("TUNROUTE_DIST_ROOT is not set")?);
    let world = World::with(TunnelKind::Tun).build()?;
    let installed = Installed { root: root.clone(), world: &world };
    let installed_files = files(&root)?;
    looks_right(&installed, &installed_files)?;

    let pings = |expected: &Answer| -> Result<()> {
        for (family, tunnel) in Family::ALL.into_iter().zip(TUNNELS) {
            let ping = if *expected == Answer::Silence { ping_briefly } else { ping };
            let answer = ping(&world.host, tunnel.host.of(family), REMOTE.of(family))?;
            ensure!(answer == *expected, "{} from {}: {answer:?}", family, tunnel.host.of(family));
        }
        Ok(())
    };
    // The provider drops what carries a tunnel's address.
    pings(&Answer::Silence)?;
    fs::write(root.join("etc/tunroute/tunroute.toml"), world.config())?;
    installed.output(&["tunroute", "check", "/etc/tunroute/tunroute.toml"])?;
    let mut daemon = installed.daemon()?;
    pings(&Answer::Reply)?;

    let status: Value = serde_json::from_str(&installed.output(&["tunroute", "status", "--json"])?)?;
    ensure!(status["fast_path"]["state"] == "on", "the fast path is not on: {status:#}");
    let (source, remote) = (TUNNELS[0].client.v6.to_string(), REMOTE.v6.to_string());
    let explained = installed.output(&["tunroute", "explain", &source, &remote])?;
    ensure!(explained.contains("they agree"), "{explained}");
    ensure!(installed.output(&["tunroute", "plan"])?.starts_with("nothing to do"));
    let names = fs::read_to_string(root.join("etc/iproute2/rt_tables.d/tunroute.conf"))?;
    ensure!(names.contains("tunnel0"), "{names}");
    let rules = installed.output(&["ip", "-6", "rule", "show"])?;
    ensure!(rules.contains("proto tunroute"), "iproute2 does not know the protocol's name: {rules}");

    // Removing the package takes back what it has done.
    installed.output(&["dpkg", "--remove", "tunroute"])?;
    daemon.wait()?;
    pings(&Answer::Silence)?;
    let rules = world.host.query("ip", "-6 rule show")? + &world.host.query("ip", "-4 rule show")?;
    ensure!(!rules.contains("116"), "{rules}");
    installed.output(&["dpkg", "--purge", "tunroute"])?;
    for path in installed_files.iter().chain(&["/var/lib/tunroute".to_owned()]) {
        let left = root.join(path.trim_start_matches('/'));
        // The operator's file is in it.
        ensure!(path == "/etc/tunroute" || !left.exists(), "{path} is left");
    }
    ensure!(root.join("etc/tunroute/tunroute.toml").exists(), "the operator's configuration is gone");
    Ok(())
}

fn looks_right(installed: &Installed<'_>, files: &[String]) -> Result<()> {
    let root = &installed.root;
    installed.output(&["dpkg", "--verify", "tunroute"])?;
    let version = installed.output(&["tunroute", "--version"])?;
    assert_eq!(version.trim(), concat!("tunroute ", env!("CARGO_PKG_VERSION")));
    for file in [
        "/usr/share/man/man8/tunroute.8.gz",
        "/usr/share/man/man8/tunroute-run.8.gz",
        "/usr/share/man/man5/tunroute.toml.5.gz",
        "/usr/share/zsh/vendor-completions/_tunroute",
        "/usr/share/fish/vendor_completions.d/tunroute.fish",
        "/usr/share/tunroute/tunroute.schema.json",
        "/usr/share/tunroute/grafana.json",
    ] {
        ensure!(files.iter().any(|installed| installed == file), "{file} is not in the package");
    }
    let complete = ". /usr/share/bash-completion/completions/tunroute && COMP_WORDS=(tunroute expl) && COMP_CWORD=1 && \
                    _tunroute tunroute expl tunroute && echo \"${COMPREPLY[@]}\"";
    assert_eq!(installed.output(&["bash", "-c", complete])?.trim(), "explain");
    installed.output(&["tunroute", "check", "/usr/share/doc/tunroute/examples/tunroute.toml"])?;
    for directory in ["etc/tunroute", "etc/iproute2/rt_tables.d"] {
        let mode = fs::metadata(root.join(directory))?.permissions().mode();
        ensure!(mode & 0o7777 == 0o755, "{directory} has mode {mode:o}");
    }
    Ok(())
}
