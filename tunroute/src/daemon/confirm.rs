//! A configuration on trial: unless it is confirmed in time, the one before it returns.
//!
//! If a change locks you out, you cannot confirm it, and so you get the connection back.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::{Daemon, tables::Tables};
use crate::{
    config::{Config, ConfigError},
    control::socket::TrialTime,
};

/// What comes back, and when.
pub(super) struct Trial {
    ends: Instant,
    config: Config,
    tables: Tables,
}

impl Daemon {
    /// As [`Self::reload`], but on trial for `time`.
    pub(super) async fn apply_on_trial(
        &mut self,
        config: Result<Config, ConfigError>,
        time: TrialTime,
    ) -> anyhow::Result<Vec<String>> {
        let (before, tables) = (self.config.clone(), self.tables.clone());
        let missing = self.reload(config).await?;
        let time = Duration::from(time);
        warn!("the earlier configuration comes back in {time:?} unless `tunroute confirm` is said");
        self.trial = Some(Trial { ends: Instant::now() + time, config: before, tables });
        Ok(missing)
    }

    /// The configuration stays.
    pub(super) fn confirm(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.trial.take().is_some(), "nothing waits to be confirmed: was it too late?");
        info!("the configuration is confirmed");
        Ok(())
    }

    /// Refuses a change while another one is on trial: what would come back then?
    pub(super) fn check_no_trial(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.trial.is_none(),
            "a change is on trial: `tunroute confirm` first, or wait until it is undone"
        );
        Ok(())
    }

    /// When the trial ends, if there is one.
    pub(super) fn trial_ends(&self) -> Option<Instant> {
        self.trial.as_ref().map(|trial| trial.ends)
    }

    /// Not confirmed: the earlier configuration returns. Without a trial, nothing happens.
    pub(super) async fn undo_trial(&mut self) {
        let Some(Trial { config, tables, .. }) = self.trial.take() else { return };
        warn!(
            "the change was not confirmed: the earlier configuration is in force again, {} has the unconfirmed one",
            self.options.config.display()
        );
        self.go_back(config, tables).await;
        self.configure_tunnels();
        self.undone = true;
    }

    /// What the operator should know of trials.
    pub(super) fn trial_hint(&self) -> Option<String> {
        let file = self.options.config.display();
        match self.trial_ends() {
            Some(ends) => Some(format!(
                "the configuration is on trial: `tunroute confirm` within {} s, or the earlier one comes back",
                ends.saturating_duration_since(Instant::now()).as_secs()
            )),
            None if self.undone => Some(format!(
                "{file} has a configuration that was not confirmed in time and is not in force: mend it, then \
                 `tunroute reload`"
            )),
            None => None,
        }
    }
}
