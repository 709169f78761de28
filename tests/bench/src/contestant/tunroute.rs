//! tunroute itself: the daemon that users run, with a configuration file.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{Contestant, Installed, Task, TooSlow, tunnel_after};
use crate::{
    load::Pattern,
    site::{INGRESS, Site, TUNNELS, Target, UPLINK},
};

/// How long it may take to be ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// The daemon with one of its datapaths.
pub struct Tunroute {
    name: &'static str,
    about: &'static str,
    /// The first lines of its configuration.
    settings: &'static str,
    binary: PathBuf,
}

impl Tunroute {
    /// Rules and tables.
    pub fn kernel(binary: &Path) -> Self {
        let about = "tunroute with `datapath = \"kernel\"`: its rules alone";
        Self { name: super::TUNROUTE_KERNEL, about, settings: "datapath = \"kernel\"", binary: binary.to_owned() }
    }

    /// Rules, tables and programs.
    pub fn both(binary: &Path) -> Self {
        let about = "tunroute's default: the fast path ahead of its rules";
        Self { name: super::TUNROUTE_BOTH, about, settings: "datapath = \"both\"", binary: binary.to_owned() }
    }

    /// Programs.
    pub fn ebpf(binary: &Path) -> Self {
        let about = "tunroute with `datapath = \"ebpf\"`: the fast path without rules";
        Self { name: super::TUNROUTE_EBPF, about, settings: "datapath = \"ebpf\"", binary: binary.to_owned() }
    }

    /// Rules, tables and programs; the programs also forward unmatched traffic.
    pub fn unmatched(binary: &Path) -> Self {
        let about = "tunroute's default with `unmatched = \"fast\"`, for unmatched packets";
        let settings = "datapath = \"both\"\nunmatched = \"fast\"";
        Self { name: super::TUNROUTE_UNMATCHED, about, settings, binary: binary.to_owned() }
    }

    /// Programs, one of which is asked before there is an skb.
    pub fn xdp(binary: &Path) -> Self {
        let about = "tunroute with `datapath = \"ebpf\"` and `xdp = \"on\"`, where packets come in as frames";
        let settings = "datapath = \"ebpf\"\nxdp = \"on\"";
        Self { name: super::TUNROUTE_XDP, about, settings, binary: binary.to_owned() }
    }
}

impl Contestant for Tunroute {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn declines(&self, task: &Task) -> Option<&'static str> {
        if self.name == super::TUNROUTE_XDP && task.target != Target::Veth {
            return Some("these devices take no frames from XDP");
        }
        let special = self.name == super::TUNROUTE_UNMATCHED && task.pattern != Pattern::Unmatched;
        special.then_some("with a policy's packets it is tunroute-both")
    }

    fn prepare(&self, site: &Site, task: &Task, changed: u32) -> Result<()> {
        configure(site, task, self.settings, changed)
    }

    fn install(&self, site: &Site, _task: &Task) -> Result<Box<dyn Installed>> {
        let wants = Wants { programs: self.name != super::TUNROUTE_KERNEL, xdp: self.name == super::TUNROUTE_XDP };
        Ok(Box::new(Daemon::start(site, &self.binary, wants)?))
    }

    fn change(&self, site: &Site, _task: &Task, _count: u32, _back: bool) -> Result<()> {
        let mut reload = Command::new(&self.binary);
        reload.arg("reload").arg("--runtime-dir").arg(runtime(site));
        let output = reload.output().context("cannot ask the daemon to reload")?;
        ensure!(output.status.success(), "tunroute reload: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

/// Its configuration.
pub(crate) fn file(site: &Site) -> PathBuf {
    site.dir().join("tunroute.toml")
}

fn runtime(site: &Site) -> PathBuf {
    site.dir().join("run")
}

/// Writes a configuration in which the first `changed` prefixes belong to the other tunnel: a policy for each tunnel, whose
/// prefixes are in a file beside it.
fn configure(site: &Site, task: &Task, settings: &str, changed: u32) -> Result<()> {
    let write =
        |path: &Path, text: &str| fs::write(path, text).with_context(|| format!("cannot write {}", path.display()));
    let mut text = format!("{settings}\n[interfaces]\ningress = [\"{INGRESS}\"]\nuplink = [\"{UPLINK}\"]\n");
    for (number, device) in TUNNELS.into_iter().enumerate() {
        writeln!(text, "[tunnel.{device}]")?;
        if let Some(gateway) = site.gateway(task.prefixes.family, number) {
            writeln!(text, "via = [\"{gateway}\"]")?;
        }
    }
    for (number, device) in (0..).zip(TUNNELS) {
        let mut prefixes = String::new();
        for prefix in (0..task.prefixes.count).filter(|&prefix| tunnel_after(prefix, changed, false) == number) {
            writeln!(prefixes, "{}", task.prefixes.get(prefix))?;
        }
        if prefixes.is_empty() {
            continue;
        }
        write(&site.dir().join(device), &prefixes)?;
        let other = TUNNELS[1 - number as usize];
        writeln!(text, "[[policy]]\nname = \"{device}\"\nvia = [\"{device}\", \"{other}\"]\nfrom-file = \"{device}\"")?;
    }
    write(&file(site), &text)
}

/// What must be attached once a daemon is ready.
#[derive(Clone, Copy)]
struct Wants {
    programs: bool,
    xdp: bool,
}

/// A running daemon; killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(site: &Site, binary: &Path, wants: Wants) -> Result<Self> {
        let dir = site.dir();
        let (log, runtime) = (dir.join("log"), runtime(site));
        let writer = fs::File::create(&log).context("cannot make the daemon's log")?;
        let mut command = site.host.command(binary);
        command.arg("run").arg("--config").arg(file(site)).arg("--runtime-dir").arg(&runtime);
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
                let status: Value = serde_json::from_slice(&answer.stdout).context("the status is no JSON")?;
                let fast = &status["fast_path"];
                if fast["loading"] == true && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                // Rules that stand in for programs must not be taken for them.
                let runs = fast["state"] == if wants.programs { "on" } else { "off" };
                let early = fast["attached"].to_string().contains("xdp") == wants.xdp;
                ensure!(runs && early, "the fast path is not as it should be: {fast:#}");
                return Ok(daemon);
            }
            if Instant::now() > deadline {
                return Err(TooSlow(PATIENCE).into());
            }
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
