//! The tunnels' `up` and `down` commands: supervised, with backoff, and a start limit that outlives the daemon.
//!
//! `up` may be a foreground daemon, which keeps running, or a starter such as `aiccu start`, which exits with status 0.
//! When it is run (again) is decided in [`machine`]; [`record`] is what is remembered of it on disk, before each start.
//!
//! The end of tunroute is not the end of the tunnels. A foreground `up` command runs on in its own process group, and
//! the next daemon finds it by the record: it watches it, logs its output and can stop it, but how it ends is not told
//! to it. (A service manager must not kill it either: systemd needs `KillMode=process`.) Only
//! [`Supervisor::stop`] takes a tunnel down, and only one that tunroute has brought up.

pub mod machine;
pub mod process;
pub mod record;
mod worker;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::Serialize;
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    config::{StartLimit, Tunnel},
    host::state::{BootTime, StateDir},
};

/// What `status` says of a tunnel's command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "CommandStatus")]
pub struct Status {
    /// Where it stands.
    pub state: machine::Phase,
    /// When it is started (again) unless the device comes up before.
    #[serde(rename = "next-start-ms", serialize_with = "from_now")]
    #[schemars(with = "Option<u64>")]
    pub next_start: Option<BootTime>,
    /// Starts within the interval of the start limit, counting those of earlier daemons.
    pub starts_in_window: usize,
    /// The process of the running command.
    pub pid: Option<i32>,
    /// How the command last ended, in words.
    pub last_exit: Option<String>,
}

/// A time as the milliseconds until then.
#[allow(clippy::ref_option, reason = "the signature is serde's")]
fn from_now<S: serde::Serializer>(time: &Option<BootTime>, serializer: S) -> Result<S::Ok, S::Error> {
    let until = |time: &BootTime| u64::try_from(time.since(BootTime::now()).as_millis()).unwrap_or(u64::MAX);
    time.as_ref().map(until).serialize(serializer)
}

/// What a tunnel's worker is to know; it looks at all of it whenever any of it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Input {
    up: Vec<String>,
    down: Option<Vec<String>>,
    limit: StartLimit,
    /// Is the device up, once that was looked at?
    device: Option<bool>,
    /// How often the operator said to try again.
    resets: u64,
    stop: bool,
}

/// A tunnel's worker.
#[derive(Debug)]
struct Worker {
    input: watch::Sender<Input>,
    status: watch::Receiver<Status>,
    task: JoinHandle<()>,
}

/// Runs the commands of all tunnels, each in a task of its own. Dropping it ends the tasks and leaves the tunnels up.
#[derive(Debug)]
pub struct Supervisor {
    state: Arc<StateDir>,
    workers: BTreeMap<String, Worker>,
    /// The tasks of tunnels that are on their way down.
    stopping: BTreeMap<String, JoinHandle<()>>,
}

impl Supervisor {
    /// A supervisor without tunnels.
    #[must_use]
    pub fn new(state: Arc<StateDir>) -> Self {
        Self { state, workers: BTreeMap::new(), stopping: BTreeMap::new() }
    }

    /// Takes the tunnels of a configuration: new ones with an `up` command are supervised, those that are gone or have
    /// no `up` command any more are stopped in the background. A changed command is used at the next start.
    ///
    /// To be called within a tokio runtime.
    pub fn reconfigure(&mut self, tunnels: &[Tunnel]) {
        self.stopping.retain(|_, task| !task.is_finished());
        let supervised = |name: &str| tunnels.iter().any(|tunnel| tunnel.name == name && tunnel.up.is_some());
        let gone: Vec<String> = self.workers.keys().filter(|name| !supervised(name)).cloned().collect();
        for name in gone {
            self.begin_stop(&name);
        }
        for tunnel in tunnels {
            let Some(up) = &tunnel.up else { continue };
            let (up, down, limit) = (up.clone(), tunnel.down.clone(), tunnel.start_limit);
            if let Some(worker) = self.workers.get(&tunnel.name) {
                worker.input.send_if_modified(|input| {
                    let new = Input { up, down, limit, ..input.clone() };
                    let changed = *input != new;
                    *input = new;
                    changed
                });
                continue;
            }
            let (input, inputs) = watch::channel(Input { up, down, limit, device: None, resets: 0, stop: false });
            let (statuses, status) = watch::channel(Status::default());
            // A tunnel that is taken away and given back is taken down before it is started.
            let before = self.stopping.remove(&tunnel.name);
            let task = worker::run(tunnel.name.clone(), Arc::clone(&self.state), inputs, statuses);
            let task = tokio::spawn(async move {
                if let Some(before) = before {
                    let _ = before.await;
                }
                task.await;
            });
            self.workers.insert(tunnel.name.clone(), Worker { input, status, task });
        }
    }

    /// Says whether a tunnel's device exists and can carry traffic. Nothing is started before this is first said, so it
    /// is to be said of devices that do not exist, too. Cheap when nothing has changed.
    pub fn device_up(&self, tunnel: &str, up: bool) {
        if let Some(worker) = self.workers.get(tunnel) {
            worker.input.send_if_modified(|input| input.device.replace(up) != Some(up));
        }
    }

    /// Tries a tunnel again that was given up, or waits; the start limit still holds. Returns whether it is supervised.
    pub fn reset(&self, tunnel: &str) -> bool {
        let worker = self.workers.get(tunnel);
        worker.inspect(|worker| worker.input.send_modify(|input| input.resets += 1)).is_some()
    }

    /// Takes down the tunnels that tunroute has brought up: runs `down`, then ends what is left of `up`. Returns when all
    /// of that is done, which takes at most [`STOP_TIME`] (all tunnels at once), and the record says so.
    pub async fn stop(&mut self) {
        let names: Vec<String> = self.workers.keys().cloned().collect();
        for name in names {
            self.begin_stop(&name);
        }
        futures::future::join_all(std::mem::take(&mut self.stopping).into_values()).await;
    }

    fn begin_stop(&mut self, name: &str) {
        if let Some(worker) = self.workers.remove(name) {
            worker.input.send_modify(|input| input.stop = true);
            self.stopping.insert(name.to_owned(), worker.task);
        }
    }

    /// The status of every supervised tunnel.
    #[must_use]
    pub fn status(&self) -> BTreeMap<String, Status> {
        self.workers.iter().map(|(name, worker)| (name.clone(), worker.status.borrow().clone())).collect()
    }
}

/// How long a `down` command may run.
const DOWN_TIME: Duration = Duration::from_secs(10);
/// The longest that [`Supervisor::stop`] takes: `down`, the end of `down`, the end of `up`, and the disk.
pub const STOP_TIME: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
