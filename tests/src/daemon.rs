//! The daemon under test: the built `tunroute` binary, running in a world's host.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    netns::Netns,
    offload::xdp_forced,
    pace::{SOON, patience, until},
    world::World,
};

/// Between two questions whether it is ready.
const POLL: Duration = Duration::from_millis(5);

/// How the daemon is started.
#[derive(Clone, Debug, Default)]
pub struct DaemonOptions {
    /// `--datapath`, over the configuration's: `both`, `kernel` or `ebpf`.
    pub datapath: Option<&'static str>,
    /// `--down-on-exit`
    pub down_on_exit: bool,
    /// `--attach`: `tcx` or `clsact`; by default what the kernel has.
    pub attach: Option<&'static str>,
    /// `--pin-dir`; by default the world's. Below `/sys/fs/bpf` it is the daemon's alone, and gone with it.
    pub pin_dir: Option<PathBuf>,
    /// The binary; by default [`binary`].
    pub binary: Option<PathBuf>,
    /// Environment variables, by name and value.
    pub env: Vec<(String, String)>,
    /// A program, and its arguments, that becomes the daemon by `exec`: `setpriv …`.
    pub under: Vec<String>,
}

/// The unit for systemd that comes with tunroute.
const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tunroute/systemd/tunroute.service");

impl DaemonOptions {
    /// As root with these capabilities and no others, `CAP_NET_ADMIN …` as in a unit.
    #[must_use]
    pub fn with_capabilities(capabilities: &str) -> Self {
        let plus: Vec<String> = capabilities
            .split_whitespace()
            .map(|capability| format!(",+{}", capability.trim_start_matches("CAP_").to_lowercase()))
            .collect();
        let bounding = format!("--bounding-set=-all{}", plus.concat());
        Self { under: ["setpriv", "--inh-caps=-all", &bounding].map(str::to_owned).to_vec(), ..Self::default() }
    }
}

/// The capabilities that the unit leaves to the daemon.
///
/// # Errors
/// The unit cannot be read, or bounds none.
pub fn unit_capabilities() -> Result<String> {
    let unit = fs::read_to_string(UNIT).context("cannot read the unit")?;
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    Ok(line.context("the unit bounds no capabilities")?.to_owned())
}

/// The `tunroute` binary: `$TUNROUTE_BIN`, else the newest of `target/release` and `target/debug`.
///
/// # Errors
/// It was not built.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("TUNROUTE_BIN") {
        return Ok(path.into());
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    ["release", "debug"]
        .map(|profile| target.join(profile).join("tunroute"))
        .into_iter()
        .filter(|path| path.is_file())
        .max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok())
        .with_context(|| format!("no tunroute binary below {}: run `cargo build -p tunroute`", target.display()))
}

/// Copies a program so that it can be started at once. `cp` does it: a file that this process writes stays open in children
/// that other threads start meanwhile, and the kernel refuses to run it (ETXTBSY).
///
/// # Errors
/// It cannot be copied.
pub fn copy_program(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg(from).arg(to).status().context("cannot start cp")?;
    ensure!(status.success(), "cannot copy {} to {}", from.display(), to.display());
    Ok(())
}

/// The same, with XDP if that is forced and the configuration does not mention it.
fn forced(config: &str) -> Cow<'_, str> {
    if xdp_forced() && !config.contains("xdp = ") { format!("xdp = \"on\"\n{config}").into() } else { config.into() }
}

/// The counters of a status.
#[derive(Clone, Debug)]
pub struct Counters(Value);

impl Counters {
    /// Packets of a policy with an outcome (`forwarded`, `diverted`, …).
    ///
    /// # Errors
    /// The status has no such policy or outcome.
    pub fn packets(&self, policy: &str, outcome: &str) -> Result<u64> {
        self.get(policy, outcome, "packets")
    }

    /// Layer 3 bytes of a policy with an outcome.
    ///
    /// # Errors
    /// The status has no such policy or outcome.
    pub fn bytes(&self, policy: &str, outcome: &str) -> Result<u64> {
        self.get(policy, outcome, "bytes")
    }

    fn get(&self, policy: &str, outcome: &str, unit: &str) -> Result<u64> {
        let policies = self.0["policies"].as_array().context("a status without policies")?;
        let policy = policies.iter().find(|candidate| candidate["name"] == policy);
        let counter = policy.and_then(|policy| policy["outcomes"][outcome][unit].as_u64());
        counter.with_context(|| format!("no {unit} of {outcome} in {:#}", self.0))
    }

    /// The packets of each policy and outcome that came since an earlier look; those that did not change are left out.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> BTreeMap<(String, String), u64> {
        let mut since = BTreeMap::new();
        for policy in self.0["policies"].as_array().into_iter().flatten() {
            let name = policy["name"].as_str().unwrap_or_default();
            for (outcome, counter) in policy["outcomes"].as_object().into_iter().flatten() {
                let before = earlier.packets(name, outcome).unwrap_or(0);
                let grown = counter["packets"].as_u64().unwrap_or(0).saturating_sub(before);
                if grown > 0 {
                    since.insert((name.to_owned(), outcome.clone()), grown);
                }
            }
        }
        since
    }
}

/// A running daemon. Its directories are the world's, so a second one started there adopts what the first left.
/// Dropping it kills it and leaves its datapaths to the namespace.
#[derive(Debug)]
pub struct Daemon<'a> {
    host: &'a Netns,
    binary: PathBuf,
    child: Child,
    config: PathBuf,
    runtime_dir: PathBuf,
    log: PathBuf,
}

impl<'a> Daemon<'a> {
    /// Starts the daemon in the world's host and waits until `status` answers.
    ///
    /// # Errors
    /// It was not built, exits, or does not answer soon; the error has its log.
    pub fn start(world: &'a World, config: &str, options: &DaemonOptions) -> Result<Self> {
        let mut daemon = Self::spawn(world, config, options)?;
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// Starts the daemon and does not wait.
    ///
    /// # Errors
    /// It was not built, or cannot be started.
    pub fn spawn(world: &'a World, config: &str, options: &DaemonOptions) -> Result<Self> {
        let binary = options.binary.clone().map_or_else(binary, Ok)?;
        let dir = world.host.dir();
        let config_file = dir.join("tunroute.toml");
        let config = forced(config);
        fs::write(&config_file, &*config).with_context(|| format!("cannot write {}", config_file.display()))?;
        let log = dir.join("tunroute.log");
        // Appended: a restarted daemon goes on in the same log.
        let writer = File::options().create(true).append(true).open(&log).context("cannot open the log")?;
        let mut command = match options.under.split_first() {
            Some((program, arguments)) => {
                let mut command = world.host.command(program);
                command.args(arguments).arg(&binary);
                command
            }
            None => world.host.command(&binary),
        };
        command.envs(options.env.iter().map(|(name, value)| (name, value)));
        command.arg("run").arg("--config").arg(&config_file);
        for (option, name) in [("--runtime-dir", "run"), ("--state-dir", "state"), ("--rt-tables-dir", "rt_tables.d")] {
            command.arg(option).arg(dir.join(name));
        }
        command.arg("--pin-dir").arg(options.pin_dir.clone().unwrap_or_else(|| world.pin_dir()));
        if let Some(datapath) = options.datapath {
            command.args(["--datapath", datapath]);
        }
        if options.down_on_exit {
            command.arg("--down-on-exit");
        }
        if let Some(attach) = options.attach {
            command.args(["--attach", attach]);
        }
        command.stdin(Stdio::null()).stdout(writer.try_clone().context("cannot share the log")?).stderr(writer);
        let child = command.spawn().with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(Self { host: &world.host, binary, child, config: config_file, runtime_dir: dir.join("run"), log })
    }

    /// Waits until `status` answers, and no programs are being loaded any more.
    ///
    /// # Errors
    /// The daemon exits, or does not answer soon; the error has its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + patience(SOON);
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for the daemon")? {
                bail!("the daemon ended with {status}; its log:\n{}", self.log());
            }
            let answer = self.client(&["status", "--json"])?;
            if answer.status.success() {
                return self.wait_loaded();
            }
            ensure!(
                Instant::now() < deadline,
                "the daemon is not ready after {SOON:?}: {}\nits log:\n{}",
                String::from_utf8_lossy(&answer.stderr),
                self.log()
            );
            std::thread::sleep(patience(POLL));
        }
    }

    /// Waits until no programs are being loaded.
    ///
    /// # Errors
    /// As [`Daemon::wait_status`].
    pub fn wait_loaded(&self) -> Result<()> {
        self.wait_status(|status| status["fast_path"]["loading"] != true, SOON).map(drop)
    }

    /// Runs the binary as a client of this daemon: `COMMAND… --runtime-dir DIR`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn client(&self, args: &[&str]) -> Result<Output> {
        // In the daemon's namespace, but with the mounts of the test.
        self.host.run_in(|| {
            Command::new(&self.binary)
                .args(args)
                .arg("--runtime-dir")
                .arg(&self.runtime_dir)
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot start {}", self.binary.display()))
        })
    }

    /// Starts the binary as a client of this daemon that runs until it is stopped; its output can be read.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_client(&self, args: &[&str]) -> Result<Child> {
        self.host.run_in(|| {
            Command::new(&self.binary)
                .args(args)
                .arg("--runtime-dir")
                .arg(&self.runtime_dir)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot start {}", self.binary.display()))
        })
    }

    fn ask(&self, args: &[&str]) -> Result<Output> {
        let output = self.client(args)?;
        ensure!(
            output.status.success(),
            "tunroute {}: {}: {}\nthe daemon's log:\n{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        Ok(output)
    }

    /// `status --json`
    ///
    /// # Errors
    /// The command fails, or its output is not JSON.
    pub fn status(&self) -> Result<Value> {
        let output = self.ask(&["status", "--json"])?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("status is not JSON: {}", String::from_utf8_lossy(&output.stdout)))
    }

    /// Waits until the status is as wanted, and returns it.
    ///
    /// # Errors
    /// It is not in time; the error has the last status.
    pub fn wait_status(&self, wanted: impl Fn(&Value) -> bool, timeout: Duration) -> Result<Value> {
        let timeout = patience(timeout);
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.status()?;
            if wanted(&status) {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "after {timeout:?} the status is still {status:#}\nlog:\n{}",
                self.log()
            );
            std::thread::sleep(patience(POLL));
        }
    }

    /// What the fast path has counted so far.
    ///
    /// # Errors
    /// As [`Daemon::status`].
    pub fn counters(&self) -> Result<Counters> {
        Ok(Counters(self.status()?))
    }

    /// Writes another configuration, which the daemon does not read before [`Daemon::reload`] or SIGHUP.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_config(&self, config: &str) -> Result<()> {
        fs::write(&self.config, &*forced(config)).with_context(|| format!("cannot write {}", self.config.display()))
    }

    /// `reload`; waits until no programs are being loaded that the new configuration needs.
    ///
    /// # Errors
    /// The command fails: the new configuration was refused.
    pub fn reload(&self) -> Result<()> {
        self.ask(&["reload"])?;
        self.wait_loaded()
    }

    /// `down`: stops the daemon and removes what it made; waits for its end.
    ///
    /// # Errors
    /// The command fails, or the daemon does not end.
    pub fn down(&mut self) -> Result<ExitStatus> {
        self.ask(&["down"])?;
        self.wait()
    }

    /// Sends a signal to the daemon.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid()?, signal).with_context(|| format!("cannot send {signal} to the daemon"))
    }

    /// Stops the daemon in its tracks (SIGSTOP), until SIGCONT, and waits until no thread of it runs.
    ///
    /// # Errors
    /// It is gone.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        let tasks = format!("/proc/{}/task", self.child.id());
        until("the daemon stands still", || {
            let mut tasks = fs::read_dir(&tasks).context("the daemon is gone")?.flatten();
            // A thread that has ended meanwhile does not run either.
            Ok(tasks.all(|task| {
                let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.is_empty() || stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T'))
            }))
        })
    }

    /// Kills the daemon as if it had crashed.
    ///
    /// # Errors
    /// It is gone.
    pub fn kill9(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        self.wait()
    }

    /// Asks the daemon to end (SIGTERM), as a service manager does, and waits for it.
    ///
    /// # Errors
    /// It does not end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait()
    }

    /// Waits for the daemon to end by itself.
    ///
    /// # Errors
    /// It does not; the error has its log.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience(SOON);
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for the daemon")? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "the daemon has not ended in {SOON:?}; its log:\n{}", self.log());
            std::thread::sleep(patience(POLL));
        }
    }

    /// The daemon's process.
    ///
    /// # Errors
    /// Its number does not fit, which cannot be.
    pub fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    /// Waits for a text in the log after its first `from` bytes.
    ///
    /// # Errors
    /// It is not; the error has the log.
    pub fn wait_said(&self, from: usize, words: &str) -> Result<()> {
        let said = || Ok(self.log().get(from..).is_some_and(|log| log.contains(words)));
        until(words, said).with_context(|| format!("the daemon's log:\n{}", self.log()))
    }

    /// All that the daemons of this world have said so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // It may have ended already; either way it is reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
    }
}
