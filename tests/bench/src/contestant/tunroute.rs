//! tunroute itself: the daemon that users run, with a configuration file.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Contestant, Installed, Task};
use crate::site::{INGRESS, Site, TUNNELS, UPLINK};

/// How long it may take to be ready; 50,000 rules take half a minute.
const PATIENCE: Duration = Duration::from_mins(2);

/// The daemon with one of its datapaths.
pub struct Tunroute {
    name: &'static str,
    about: &'static str,
    datapath: &'static str,
    binary: PathBuf,
}

impl Tunroute {
    /// Rules and tables.
    pub fn kernel(binary: &Path) -> Self {
        let about = "tunroute with `datapath = \"kernel\"`: its rules alone";
        Self { name: "tunroute-kernel", about, datapath: "kernel", binary: binary.to_owned() }
    }

    /// Rules, tables and programs.
    pub fn both(binary: &Path) -> Self {
        let about = "tunroute's default: the fast path ahead of its rules";
        Self { name: "tunroute-both", about, datapath: "both", binary: binary.to_owned() }
    }

    /// Programs.
    pub fn ebpf(binary: &Path) -> Self {
        let about = "tunroute with `datapath = \"ebpf\"`: the fast path without rules";
        Self { name: "tunroute-ebpf", about, datapath: "ebpf", binary: binary.to_owned() }
    }
}

impl Contestant for Tunroute {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn has_rules(&self) -> bool {
        self.datapath != "ebpf"
    }

    fn install(&self, site: &Site, task: &Task) -> Result<Box<dyn Installed>> {
        Ok(Box::new(Daemon::start(site, &self.binary, &configuration(site, task, self.datapath)?)?))
    }
}

/// A policy for each tunnel, with all of its prefixes.
fn configuration(site: &Site, task: &Task, datapath: &str) -> Result<String> {
    let mut text =
        format!("datapath = \"{datapath}\"\n[interfaces]\ningress = [\"{INGRESS}\"]\nuplink = [\"{UPLINK}\"]\n");
    for (number, device) in TUNNELS.into_iter().enumerate() {
        writeln!(text, "[tunnel.{device}]")?;
        if let Some(gateway) = site.gateway(task.prefixes.family, number) {
            writeln!(text, "via = [\"{gateway}\"]")?;
        }
    }
    for (number, device) in (0..).zip(TUNNELS) {
        let mut prefixes = task.prefixes.of_tunnel(number).peekable();
        if prefixes.peek().is_none() {
            continue;
        }
        let other = TUNNELS[1 - number as usize];
        writeln!(text, "[[policy]]\nname = \"{device}\"\nvia = [\"{device}\", \"{other}\"]\nfrom = [")?;
        for prefix in prefixes {
            writeln!(text, "\"{prefix}\",")?;
        }
        writeln!(text, "]")?;
    }
    Ok(text)
}

/// A running daemon; killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(site: &Site, binary: &Path, configuration: &str) -> Result<Self> {
        let dir = site.dir();
        let (file, log, runtime) = (dir.join("tunroute.toml"), dir.join("log"), dir.join("run"));
        fs::write(&file, configuration).with_context(|| format!("cannot write {}", file.display()))?;
        let writer = fs::File::create(&log).context("cannot make the daemon's log")?;
        let mut command = site.host.command(binary);
        command.arg("run").arg("--config").arg(file).arg("--runtime-dir").arg(&runtime);
        command.arg("--state-dir").arg(dir.join("state")).arg("--rt-tables-dir").arg(dir.join("rt_tables.d"));
        command.arg("--pin-dir").arg(site.pin_dir()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer);
        let spawned = command.spawn().with_context(|| format!("cannot start {}: see --tunroute", binary.display()));
        let mut daemon = Self(spawned?);

        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = || fs::read_to_string(&log).unwrap_or_default();
            if let Some(status) = daemon.0.try_wait().context("cannot wait for the daemon")? {
                bail!("the daemon ended with {status}:\n{}", said());
            }
            let mut question = Command::new(binary);
            question.args(["status", "--json", "--runtime-dir"]).arg(&runtime);
            let answer = question.output().context("cannot ask the daemon for its status")?;
            if answer.status.success() {
                return Ok(daemon);
            }
            ensure!(Instant::now() < deadline, "the daemon is not ready after {PATIENCE:?}:\n{}", said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Installed for Daemon {
    fn process(&self) -> Option<u32> {
        Some(self.0.id())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already; either way it is reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
