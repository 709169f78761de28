//! Reading configurations on a thread of its own: a million prefixes take a while, and tunnels must be followed meanwhile.

use std::{path::PathBuf, sync::mpsc as jobs};

use tokio::sync::{mpsc, oneshot};

use super::{Daemon, reload::except, with_datapath};
use crate::{
    config::{Config, ConfigError},
    control::socket::{Answer, TrialTime},
};

/// What a configuration is read for.
pub(super) enum Purpose {
    /// To put it in force.
    Reload,
    /// Put it in force on trial for this time.
    Trial(TrialTime),
    /// To tell what would change.
    Plan(PathBuf),
}

/// A file to read.
struct Job {
    file: PathBuf,
    purpose: Purpose,
    answer: Option<oneshot::Sender<Answer>>,
}

/// A file that has been read.
pub(super) struct Read {
    purpose: Purpose,
    config: Result<Config, ConfigError>,
    /// The client that waits for the result.
    answer: Option<oneshot::Sender<Answer>>,
}

/// Reads one file after the other.
pub(super) struct Reader(jobs::Sender<Job>);

impl Reader {
    /// Starts the thread, which ends with its owner. What has been read comes by the channel.
    pub(super) fn start(read: mpsc::UnboundedSender<Read>) -> Self {
        let (sender, waiting) = jobs::channel::<Job>();
        std::thread::spawn(move || {
            while let Ok(Job { file, purpose, answer }) = waiting.recv() {
                let config = Config::load(&file);
                let _daemon_ends = read.send(Read { purpose, config, answer });
            }
        });
        Self(sender)
    }
}

/// The answer for a client whose configuration is in force except for this.
fn in_force(missing: &[String]) -> Answer {
    if missing.is_empty() { Answer::Done } else { Answer::Failed(except(missing)) }
}

impl Daemon {
    /// Begins to read a configuration; its end comes as [`Read`].
    pub(super) fn read(&self, purpose: Purpose, answer: Option<oneshot::Sender<Answer>>) {
        let file = match &purpose {
            Purpose::Plan(file) => file.clone(),
            Purpose::Reload | Purpose::Trial(_) => {
                self.service.reloading();
                self.options.config.clone()
            }
        };
        let _daemon_ends = self.reader.0.send(Job { file, purpose, answer });
    }

    /// Does what the configuration was read for, and answers.
    pub(super) async fn finish_read(&mut self, Read { purpose, config, answer }: Read) {
        let config = config.map(|config| with_datapath(config, self.options.datapath));
        let result = match purpose {
            Purpose::Reload => self.reload(config).await.map(|missing| in_force(&missing)),
            Purpose::Trial(time) => self.apply_on_trial(config, time).await.map(|missing| in_force(&missing)),
            Purpose::Plan(file) => match config {
                Ok(config) => self.preview(&file, config).await.map(Answer::Plan),
                Err(error) => Err(error.into()),
            },
        };
        if let Some(answer) = answer {
            let _nobody_waits = answer.send(result.unwrap_or_else(|error| Answer::Failed(format!("{error:#}"))));
        }
    }
}
