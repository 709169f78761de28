//! Programs are loaded on threads of their own: the verifier takes its time, and tunnels must be followed meanwhile.

use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use super::{Daemon, Inbox, messages::forward_log, wants_no_programs};
use crate::{
    commands::explain::examiner::Examiner,
    config::Policy,
    control::socket::{Answer, Call, Request},
    datapath::{Datapath, Method},
    host::privilege,
    kernel::Kinds,
    policy::fast::{FastOp, Open},
    prefixes::index,
};

/// What a thread has loaded.
pub(super) enum Loaded {
    /// The programs, or why there are none.
    Programs(Result<Box<Datapath>, String>),
    /// Twins of the programs, which packets are tried on, or why there are none.
    Twins {
        /// [`Loader::generation`] of the programs.
        of: u64,
        /// Asks them.
        examiner: anyhow::Result<Box<Examiner>>,
    },
}

/// What is being loaded.
pub(super) struct Loader {
    loaded: mpsc::UnboundedSender<Loaded>,
    programs: bool,
    twins: bool,
    /// The number of times that other programs have come, or gone.
    generation: u64,
    /// Requests for explanations that wait for the twins.
    waiting: Vec<Call>,
}

impl Loader {
    pub(super) fn new(loaded: mpsc::UnboundedSender<Loaded>) -> Self {
        Self { loaded, programs: false, twins: false, generation: 0, waiting: Vec::new() }
    }

    /// Are programs being loaded?
    pub(super) const fn loads_programs(&self) -> bool {
        self.programs
    }

    /// Runs on a thread what ends with something loaded.
    fn start(&self, load: impl FnOnce() -> Loaded + Send + 'static) {
        let loaded = self.loaded.clone();
        std::thread::spawn(move || {
            let _daemon_ends = loaded.send(load());
        });
    }
}

impl Daemon {
    /// Begins to load the programs if there should be some and are none, or none that are large enough; their end comes as
    /// [`Loaded`]. Returns whether it has turned out that there can be none.
    pub(super) fn load_programs(&mut self) -> bool {
        let enough = self.fast.is_some() && self.outgrown.is_none();
        if self.loader.programs || enough || wants_no_programs(&self.config) {
            return false;
        }
        // In the kernel's words this would be the verifier's log.
        if let Some(missing) = privilege::missing_for_fast_path() {
            let known = self.fast_error.as_ref() == Some(&missing);
            self.give_up_programs(missing);
            return !known;
        }
        let pins = self.options.instance.pin_dir.clone();
        let method = self.options.method.unwrap_or_else(Method::detect);
        let expected = || index::expected(self.config.policies.iter().flat_map(Policy::sources));
        let words = self.outgrown.unwrap_or_else(expected);
        self.loader.programs = true;
        self.loader.start(move || {
            let opened = Datapath::open(&pins, method, words).map(Box::new);
            Loaded::Programs(opened.map_err(|error| error.to_string()))
        });
        false
    }

    /// There are no programs, so the rules do all of it.
    fn give_up_programs(&mut self, error: String) {
        if self.fast_error.as_ref() != Some(&error) {
            warn!("no fast path, the kernel's rules carry all traffic: {error}");
        }
        self.fast_error = Some(error);
        self.outgrown = None;
        // They stay attached, and are not looked after any more.
        if let Some(Err(error)) = self.take_programs().map(|mut fast| fast.apply(&FastOp::SetOpen(Open::default()))) {
            warn!("{error}");
        }
    }

    /// Takes the programs out of use. What was made for them goes with them.
    pub(super) fn take_programs(&mut self) -> Option<Datapath> {
        self.program_log.abort_all();
        self.checker.examiner = None;
        self.loader.generation += 1;
        self.fast.take()
    }

    /// Takes what a thread has loaded into use.
    pub(super) async fn finish_load(&mut self, loaded: Loaded) {
        match loaded {
            Loaded::Programs(opened) => {
                self.loader.programs = false;
                match opened {
                    Ok(fast) => {
                        self.use_programs(*fast);
                        // The devices anew, as the programs' exits are entered now.
                        self.reconcile(Kinds::LINKS).await;
                        if !self.loader.waiting.is_empty() {
                            self.load_twins();
                        }
                    }
                    // It is tried again when something happens.
                    Err(error) => {
                        self.give_up_programs(error);
                        self.settle(Kinds::NONE).await;
                        self.answer_waiting().await;
                    }
                }
            }
            Loaded::Twins { of, examiner } => {
                self.loader.twins = false;
                match examiner {
                    Ok(examiner) if of == self.loader.generation => self.checker.examiner = Some(*examiner),
                    Ok(_) => {}
                    Err(error) => {
                        let error = self.checker.complain(&error);
                        for (_, answer) in std::mem::take(&mut self.loader.waiting) {
                            let _nobody_waits = answer.send(Answer::Failed(error.clone()));
                        }
                    }
                }
                self.answer_waiting().await;
            }
        }
    }

    /// Answers what waited for twins, or puts it off again.
    async fn answer_waiting(&mut self) {
        for call in std::mem::take(&mut self.loader.waiting) {
            // An explanation does not end the daemon.
            let _goes_on = self.answer(call).await;
        }
    }

    fn use_programs(&mut self, mut fast: Datapath) {
        self.outgrown = None;
        self.fast_error = None;
        if self.take_programs().is_some()
            && let Err(error) = fast.read_again()
        {
            warn!("{error}");
        }
        forward_log(&mut fast, &mut self.program_log);
        self.fast = Some(fast);
    }

    /// Begins to load twins of the programs if there are none; their end comes as [`Loaded`]. Not of programs that others are
    /// about to replace.
    pub(super) fn load_twins(&mut self) {
        let Some(fast) = &mut self.fast else { return };
        if self.loader.twins || self.loader.programs {
            return;
        }
        let (of, twins) = (self.loader.generation, fast.twins());
        self.loader.twins = true;
        self.loader.start(move || {
            let trial = twins.and_then(|load| load()).map_err(anyhow::Error::from);
            let examiner = trial.and_then(|trial| Ok(Box::new(Examiner::new(Some(trial))?)));
            Loaded::Twins { of, examiner }
        });
    }

    /// Puts off a request until there are twins to answer it with, if it needs them. Returns it if it does not.
    pub(super) fn put_off(&mut self, request: Request, answer: oneshot::Sender<Answer>) -> Option<Call> {
        if !self.needs_twins() {
            return Some((request, answer));
        }
        self.load_twins();
        self.loader.waiting.push((request, answer));
        None
    }

    /// Waits until nothing is being loaded any more: what a thread is about to pin could not be removed else.
    pub(super) async fn stop_loading(&mut self, inbox: &mut Inbox) {
        while self.loader.programs || self.loader.twins {
            match inbox.loaded.recv().await {
                Some(Loaded::Programs(opened)) => {
                    self.loader.programs = false;
                    self.fast = opened.ok().map(|fast| *fast).or_else(|| self.fast.take());
                }
                Some(Loaded::Twins { .. }) => self.loader.twins = false,
                None => return,
            }
        }
    }

    /// Why there are no programs yet.
    pub(super) fn being_loaded(&self) -> Option<&'static str> {
        let because = match (&self.fast, self.adopting) {
            (Some(_), _) => "there are more prefixes than the programs have room for; larger ones are being loaded",
            (None, true) => "the programs are being loaded; an earlier daemon's decide until then",
            (None, false) => "the programs are being loaded; the kernel's rules carry all traffic until then",
        };
        self.loader.loads_programs().then_some(because)
    }
}
