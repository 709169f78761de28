//! Probes: does a tunnel carry packets? Asked by echo requests and TCP connections, per tunnel and address family.
//!
//! A probe's socket is bound to the tunnel's device, so the kernel looks for a route *by that device* and finds none but
//! the tunnel's. Such a route must exist while the tunnel is held to be down, too, or the probe could never find
//! out that it is back: see [`crate::policy::compile::probes`].

pub(crate) mod echo;
pub(crate) mod probe;
pub mod verdict;

use std::{
    collections::hash_map::RandomState,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
    time::sleep,
};

pub use self::verdict::Verdict;
use self::verdict::{Health, Outcome};
use crate::{
    config::{Probe, ProbeTarget, Tunnel},
    policy::net::Family,
};

/// A tunnel has gone down or come up in one address family, as its probes see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The tunnel's name.
    pub tunnel: String,
    /// The address family that its probes speak for.
    pub family: Family,
    /// Up, or down.
    pub up: bool,
}

/// What `status` says of one probe.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "ProbeStatus")]
pub struct Status {
    /// The tunnel's name.
    pub tunnel: String,
    /// What is asked: an address, or an address and a port.
    pub target: String,
    /// The address family that the probe speaks for.
    pub family: Family,
    /// What is held of the tunnel.
    pub verdict: Verdict,
    /// The share of the last 100 probes that were lost, in percent.
    pub loss_percent: Option<f32>,
    /// The mean time to the answer over the last 100 probes, in microseconds.
    pub mean_delay_us: Option<u64>,
    /// Why the last probe had no answer.
    pub last_error: Option<String>,
}

/// A probe that fails at once (no route, no device) is not repeated faster than this.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

/// What makes a probe the same probe after a reload: its other settings may change under it.
type Key = (String, ProbeTarget, Option<IpAddr>);

/// The probes of all tunnels, each in a task of its own. Dropping it ends them.
#[derive(Debug)]
pub struct Probes {
    shared: Arc<Shared>,
    tasks: Vec<(Key, Task)>,
}

/// A running probe. Dropping it ends it.
#[derive(Debug)]
struct Task {
    probe: Probe,
    nudge: Arc<Notify>,
    handle: AbortHandle,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

/// What the tasks have found.
#[derive(Debug)]
struct Shared {
    found: Mutex<Vec<Found>>,
    changes: mpsc::UnboundedSender<Change>,
    /// The key to the cookies.
    secret: RandomState,
}

#[derive(Debug)]
struct Found {
    key: Key,
    health: Health,
    last_error: Option<String>,
}

/// The family that a probe speaks for.
fn family(target: &ProbeTarget) -> Family {
    match target {
        ProbeTarget::Echo(target) => Family::of_addr(target),
        ProbeTarget::Tcp(target) => Family::of_addr(&target.ip()),
    }
}

/// Returns true if all probes of the tunnel in this family are answered; also without any probe.
fn is_up(found: &[Found], tunnel: &str, wanted: Family) -> bool {
    let mut probes = found.iter().filter(|found| found.key.0 == tunnel && family(&found.key.1) == wanted);
    probes.all(|found| found.health.verdict() != Verdict::Down)
}

impl Shared {
    fn found(&self) -> MutexGuard<'_, Vec<Found>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what was found; tells of the tunnels that went up or down by it, in the order in which it happened.
    fn change(&self, tunnel: &str, change: impl FnOnce(&mut Vec<Found>)) {
        let mut found = self.found();
        let before = Family::ALL.map(|family| is_up(&found, tunnel, family));
        change(&mut found);
        for (family, before) in Family::ALL.into_iter().zip(before) {
            let up = is_up(&found, tunnel, family);
            if up != before {
                // The receiver is gone: the daemon is ending.
                let _ = self.changes.send(Change { tunnel: tunnel.to_owned(), family, up });
            }
        }
    }
}

impl Probes {
    /// No probes yet. `changes` receives changes only: every tunnel counts as up until reported down.
    #[must_use]
    pub fn new(changes: mpsc::UnboundedSender<Change>) -> Self {
        let shared = Shared { found: Mutex::default(), changes, secret: RandomState::new() };
        Self { shared: Arc::new(shared), tasks: Vec::new() }
    }

    /// Takes the probes of a configuration. A probe that is there already goes on as it is; one whose times or counts
    /// have changed keeps its verdict. The first probes of a new one are sent at once.
    ///
    /// To be called within a tokio runtime, in the network namespace of the tunnels.
    pub fn reconfigure(&mut self, tunnels: &[Tunnel]) {
        let mut wanted: Vec<(Key, Probe)> = Vec::new();
        for (tunnel, probe) in tunnels.iter().flat_map(|tunnel| tunnel.probes.iter().map(move |p| (tunnel, p))) {
            let key = (tunnel.name.clone(), probe.target, probe.source);
            if wanted.iter().all(|(other, _)| *other != key) {
                wanted.push((key, probe.clone()));
            }
        }
        self.tasks.retain(|(key, task)| wanted.iter().any(|wanted| wanted.0 == *key && wanted.1 == task.probe));
        let gone: Vec<Key> = self.shared.found().iter().map(|found| found.key.clone()).collect();
        for key in gone.iter().filter(|key| wanted.iter().all(|wanted| wanted.0 != **key)) {
            self.shared.change(&key.0, |found| found.retain(|found| found.key != *key));
        }
        for (key, probe) in wanted {
            if self.tasks.iter().any(|(other, _)| *other == key) {
                continue;
            }
            self.shared.change(&key.0, |found| match found.iter_mut().find(|found| found.key == key) {
                Some(found) => found.health = found.health.clone().with_settings(&probe),
                None => found.push(Found { key: key.clone(), health: Health::new(&probe), last_error: None }),
            });
            let nudge = Arc::new(Notify::new());
            let task = run(Arc::clone(&self.shared), key.clone(), probe.clone(), Arc::clone(&nudge));
            let handle = tokio::spawn(task).abort_handle();
            self.tasks.push((key, Task { probe, nudge, handle }));
        }
    }

    /// Probes a tunnel now rather than at the next interval: its device has come or changed.
    pub fn nudge(&self, tunnel: &str) {
        for (_, task) in self.tasks.iter().filter(|(key, _)| key.0 == tunnel) {
            task.nudge.notify_one();
        }
    }

    /// Is a tunnel up in a family, as far as its probes know?
    #[must_use]
    pub fn is_up(&self, tunnel: &str, family: Family) -> bool {
        is_up(&self.shared.found(), tunnel, family)
    }

    /// The status of every probe.
    #[must_use]
    pub fn status(&self) -> Vec<Status> {
        let micros = |delay: Duration| u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        let status = |Found { key: (tunnel, target, _), health, last_error }: &Found| Status {
            tunnel: tunnel.clone(),
            target: match target {
                ProbeTarget::Echo(target) => target.to_string(),
                ProbeTarget::Tcp(target) => target.to_string(),
            },
            family: family(target),
            verdict: health.verdict(),
            loss_percent: health.loss_percent(),
            mean_delay_us: health.mean_delay().map(micros),
            last_error: last_error.clone(),
        };
        self.shared.found().iter().map(status).collect()
    }
}

/// Sends one probe after the other.
async fn run(shared: Arc<Shared>, key: Key, probe: Probe, nudge: Arc<Notify>) {
    let mut sequence = 0u16;
    let mut unable = false;
    loop {
        let begun = Instant::now();
        let outcome = probe::send(&key.0, &probe, sequence, &shared.secret).await;
        sequence = sequence.wrapping_add(1);
        if let Outcome::Unable(error) = &outcome
            && !unable
        {
            tracing::error!(
                tunnel = key.0,
                "cannot probe ({error}); the tunnel is held to be as it was. Raw sockets and SO_BINDTODEVICE need \
                 CAP_NET_RAW. This is not said again until it works"
            );
        }
        unable = matches!(outcome, Outcome::Unable(_));

        let mut pause = probe.interval;
        shared.change(&key.0, |found| {
            let Some(found) = found.iter_mut().find(|found| found.key == key) else { return };
            found.health.observe(Instant::now(), &outcome);
            pause = found.health.next(&probe, &outcome);
            found.last_error = match outcome {
                Outcome::Answer(_) => None,
                Outcome::NoDevice => Some("the device does not exist".to_owned()),
                Outcome::Lost(error) | Outcome::Unable(error) => Some(error),
            };
        });
        let pause = pause.saturating_sub(begun.elapsed()).max(SHORTEST_PAUSE);
        tokio::select! {
            () = sleep(pause) => {}
            () = nudge.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests;
