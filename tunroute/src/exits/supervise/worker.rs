//! One tunnel's task: feeds its state machine, runs its commands, keeps its record on disk.

use std::{collections::VecDeque, io, sync::Arc};

use tokio::{
    process::Child,
    sync::watch,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{
    DOWN_TIME, Input, Status,
    machine::{Action, End, Event, Machine, Phase},
    process::{self, ProcessId},
    record::Record,
};
use crate::host::state::{BootTime, StateDir, boot_id};

/// The `up` command's process.
enum Process {
    /// Started by this daemon.
    Child(Child),
    /// Started by an earlier one.
    Adopted(ProcessId),
}

impl Process {
    /// Waits for its end; says how it ended. Can be dropped and called again.
    async fn end(&mut self) -> (End, String) {
        match self {
            Self::Child(child) => match child.wait().await {
                Ok(status) => (if status.success() { End::Success } else { End::Failure }, status.to_string()),
                Err(error) => (End::Failure, format!("how it ended cannot be told: {error}")),
            },
            Self::Adopted(process) => {
                process.ended().await;
                (End::Success, "ended; how is not known, as an earlier daemon had started it".to_owned())
            }
        }
    }
}

struct Worker {
    name: String,
    state: Arc<StateDir>,
    boot: Option<String>,
    input: Input,
    machine: Machine,
    process: Option<Process>,
    last_exit: Option<String>,
    status: watch::Sender<Status>,
}

/// Supervises one tunnel until it is stopped or its sender is gone.
pub async fn run(
    name: String,
    state: Arc<StateDir>,
    mut inputs: watch::Receiver<Input>,
    status: watch::Sender<Status>,
) {
    let input = Input { device: None, resets: 0, ..inputs.borrow().clone() };
    let mut worker = Worker::new(name, state, input, status).await;
    worker.publish();
    inputs.mark_changed();
    loop {
        let deadline = worker.machine.deadline();
        let tick = async {
            match deadline {
                Some(deadline) => sleep(deadline.since(BootTime::now())).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = inputs.changed() => {
                if changed.is_err() {
                    return;
                }
                let input = inputs.borrow_and_update().clone();
                if input.stop {
                    return worker.stop(input.down).await;
                }
                worker.take(input).await;
            }
            (end, text) = end(&mut worker.process) => {
                worker.process = None;
                worker.ended(end, text).await;
            }
            () = tick => worker.tell(Event::Tick).await,
        }
    }
}

/// Waits for the end of the process, for ever if there is none.
async fn end(process: &mut Option<Process>) -> (End, String) {
    match process {
        Some(process) => process.end().await,
        None => std::future::pending().await,
    }
}

/// The record's file. Device names have no `/` in them.
pub fn file(tunnel: &str) -> String {
    format!("starts-{tunnel}.json")
}

impl Worker {
    async fn new(name: String, state: Arc<StateDir>, input: Input, status: watch::Sender<Status>) -> Self {
        let (boot, now, limit) = (boot_id(), BootTime::now(), input.limit);
        let mut record = match state.load::<Record>(&file(&name)) {
            Ok(None) => Record::default(),
            Ok(Some(record)) => record.restored(boot.as_deref(), now, limit),
            Err(error) => {
                tracing::error!(
                    tunnel = name,
                    "{error}; as earlier starts of the tunnel are not known, it is not started for {:?}",
                    limit.interval
                );
                Record::unknown(now, limit)
            }
        };
        let adopted = record.process.filter(ProcessId::runs);
        record.process = adopted;
        if let Some(process) = adopted {
            tracing::info!(tunnel = name, "its command still runs as process {}", process.pid);
            if let Some(output) = process.output() {
                tokio::spawn(process::log_output(name.clone(), output));
            }
        }
        let machine = Machine::new(limit, record, adopted.is_some(), fastrand::Rng::new());
        let process = adopted.map(Process::Adopted);
        let mut worker = Self { name, state, boot, input, machine, process, last_exit: None, status };
        if !worker.save().await {
            worker.machine.hold(BootTime::now());
        }
        worker
    }

    /// Tells the machine what is new in the input.
    async fn take(&mut self, input: Input) {
        let old = std::mem::replace(&mut self.input, input);
        if self.input.limit != old.limit {
            self.tell(Event::Limit(self.input.limit)).await;
        }
        if let Some(up) = self.input.device.filter(|_| self.input.device != old.device) {
            self.tell(Event::Device(up)).await;
        }
        if self.input.resets != old.resets {
            self.tell(Event::Reset).await;
        }
    }

    /// Takes one event, and does what comes of it.
    async fn tell(&mut self, event: Event) {
        let before = self.machine.phase();
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.machine.step(BootTime::now(), event) {
                match action {
                    Action::Save => drop(self.save().await),
                    Action::Start => events.push_back(self.start()),
                }
            }
        }
        if self.machine.phase() != before {
            self.announce();
        }
        self.publish();
    }

    async fn ended(&mut self, end: End, text: String) {
        tracing::info!(tunnel = self.name, "`{}`: {text}", self.input.up.join(" "));
        self.last_exit = Some(text);
        self.tell(Event::Ended(end)).await;
    }

    /// Runs `up`.
    fn start(&mut self) -> Event {
        let command = self.input.up.join(" ");
        match process::spawn(&self.input.up) {
            Ok((child, process, output)) => {
                tracing::info!(tunnel = self.name, "started `{command}` as process {}", process.pid);
                tokio::spawn(process::log_output(self.name.clone(), output));
                self.process = Some(Process::Child(child));
                Event::Spawned(process)
            }
            Err(error) => {
                self.last_exit = Some(cannot_run(&error));
                tracing::error!(tunnel = self.name, "`{command}` {}", cannot_run(&error));
                Event::Ended(End::Failure)
            }
        }
    }

    /// Writes the record. The disk may be slow: no other task waits for it.
    async fn save(&self) -> bool {
        let record = self.machine.record().to_save(self.boot.as_deref(), BootTime::now());
        let (state, file) = (Arc::clone(&self.state), file(&self.name));
        spawn_blocking(move || state.save_or_say(&file, &record)).await.unwrap_or(false)
    }

    /// Runs `down` and ends `up`, if tunroute brought the tunnel up.
    async fn stop(mut self, down: Option<Vec<String>>) {
        if self.machine.record().ours {
            if let Some(down) = down {
                self.down(&down).await;
            }
            let process = self.machine.record().process;
            if let (Some(process), Some(_)) = (process, &self.process) {
                process.terminate().await;
            }
            if let Some(Process::Child(child)) = &mut self.process {
                // What SIGKILL does not end (a process in a dead network file system) is not waited for.
                let _ = timeout(process::TERM_TIME, child.wait()).await;
            }
            tracing::info!(tunnel = self.name, "stopped");
        }
        self.machine.stopped();
        self.save().await;
    }

    /// Runs `down` for a bounded time.
    async fn down(&self, argv: &[String]) {
        let command = argv.join(" ");
        let (mut child, process, output) = match process::spawn(argv) {
            Ok(spawned) => spawned,
            Err(error) => return tracing::error!(tunnel = self.name, "`{command}` {}", cannot_run(&error)),
        };
        tokio::spawn(process::log_output(self.name.clone(), output));
        if timeout(DOWN_TIME, process.ended()).await.is_err() {
            tracing::warn!(tunnel = self.name, "`{command}` still runs after {DOWN_TIME:?} and is ended");
            process.terminate().await;
        }
        match timeout(process::TERM_TIME, child.wait()).await {
            Ok(Ok(status)) => tracing::info!(tunnel = self.name, "`{command}`: {status}"),
            Ok(Err(error)) => tracing::warn!(tunnel = self.name, "`{command}`: {error}"),
            Err(_) => tracing::warn!(tunnel = self.name, "`{command}` cannot be ended"),
        }
    }

    /// Says what the operator should know.
    fn announce(&self) {
        let name = &self.name;
        let limit = format!("{} starts in {:?}", self.input.limit.burst, self.input.limit.interval);
        let next = self.machine.deadline().map(|deadline| deadline.since(BootTime::now())).unwrap_or_default();
        match self.machine.phase() {
            Phase::Backoff => tracing::warn!(tunnel = name, "started again in {next:.1?}"),
            Phase::Limited => tracing::warn!(
                tunnel = name,
                "the start limit ({limit}) allows the next start in {next:.1?}; if it is reached again within 24 hours, \
                 the tunnel is given up"
            ),
            Phase::GivenUp => tracing::error!(
                tunnel = name,
                "given up: its start limit ({limit}) was reached twice within 24 hours, and a broker may lock out who \
                 connects too often. The command last ended with: {}. Find out why `{}` does not bring up {name}, then \
                 run `tunroute start {name}`; restarting tunroute does not try again",
                self.last_exit.as_deref().unwrap_or("not known, as an earlier daemon had started it"),
                self.input.up.join(" "),
            ),
            Phase::Idle | Phase::Running | Phase::Started => {}
        }
    }

    fn publish(&self) {
        let (record, now) = (self.machine.record(), BootTime::now());
        self.status.send_replace(Status {
            state: self.machine.phase(),
            next_start: self.machine.deadline(),
            starts_in_window: record.starts_in_window(self.input.limit, now),
            pid: record.process.map(|process| process.pid),
            last_exit: self.last_exit.clone(),
        });
    }
}

fn cannot_run(error: &io::Error) -> String {
    format!("cannot be run: {error}")
}
