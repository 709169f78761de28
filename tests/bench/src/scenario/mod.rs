//! What is measured, and under which circumstances.

mod arena;
mod change;
mod failover;
mod host;
mod latency;
mod memory;
mod program;
mod publish;
pub mod stages;
mod throughput;

use std::time::{Duration, Instant};

use fastrand::Rng;

pub use self::arena::{Arena, Place, judge};
use crate::{contestant::Contestant, generator::Generator, limits::Limits};

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Effort {
    /// The numbers of prefixes.
    pub prefixes: Vec<u32>,
    /// How many rounds.
    pub rounds: usize,
    /// How long a contestant works in each.
    pub slice: Duration,
    /// What is bearable.
    pub limits: Limits,
    /// What has not begun after this time is left out.
    pub time: Duration,
    /// Less of everything.
    pub quick: bool,
}

/// What all scenarios work with.
pub struct Bench {
    /// Sends and counts.
    pub generator: Generator,
    /// The contestants.
    pub contestants: Vec<Box<dyn Contestant>>,
    /// How much is measured.
    pub effort: Effort,
    /// The order of the rounds.
    pub rng: Rng,
    /// The progress that is shown.
    pub progress: Progress,
}

/// Shows the progress.
pub struct Progress {
    bar: indicatif::ProgressBar,
    begun: Instant,
}

impl Progress {
    /// Number of steps.
    #[must_use]
    pub fn new(steps: u64) -> Self {
        let bar = indicatif::ProgressBar::new(steps);
        let style = indicatif::ProgressStyle::with_template("{bar:30} {percent:>3} %, {eta} left: {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_secs(1));
        Self { bar, begun: Instant::now() }
    }

    /// What begins now. Without a terminal, a line.
    pub fn say(&self, message: String) {
        if self.bar.is_hidden() {
            eprintln!("{:4} s: {message}", self.begun.elapsed().as_secs());
        }
        self.bar.set_message(message);
    }

    /// Advances by this many steps.
    pub fn done(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// The bar goes.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// The CPU that packets are sent on.
pub const SENDER_CPU: usize = 0;
