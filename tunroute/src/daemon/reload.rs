//! A new configuration is put in force in full, or the old one stays.

use std::sync::Arc;

use tracing::{error, info, warn};

use super::{Daemon, tables};
use crate::{
    config::{Config, ConfigError},
    datapath,
    kernel::Kinds,
    policy::compile::{Sources, follow},
    policy::plan::plan,
};

/// Tells of a configuration that is in force but for this.
pub(super) fn except(missing: &[String]) -> String {
    format!("the new configuration is in force, except for this, which is tried again: {}", missing.join("; "))
}

impl Daemon {
    /// Applies a configuration that has been read again. Returns what of it is not in force, because something stands in
    /// the way that did so before.
    ///
    /// # Errors
    ///
    /// If it is refused, or something else cannot be done: the old one stays in force.
    pub(super) async fn reload(&mut self, config: Result<Config, ConfigError>) -> anyhow::Result<Vec<String>> {
        let result = match self.check_no_trial().and_then(|()| Ok(config?)) {
            Ok(config) => self.try_reload(config).await,
            Err(error) => Err(error),
        };
        self.service.ready();
        match &result {
            Ok(missing) if missing.is_empty() => info!("the new configuration is in force"),
            Ok(missing) => warn!("{}", except(missing)),
            Err(error) => error!("the old configuration stays in force: {error:#}"),
        }
        result
    }

    async fn try_reload(&mut self, mut config: Config) -> anyhow::Result<Vec<String>> {
        self.reconcile(Kinds::ALL).await;
        let sources = self.check_applicable(&mut config)?;
        // What cannot be done anyway says nothing about the new configuration.
        let before = self.problems.clone();
        let old = std::mem::replace(&mut self.config, config);
        (self.desired, self.sources) = (None, sources);
        let tables = self.tables.clone();
        self.reconcile(Kinds::NONE).await;
        let new: Vec<&str> =
            self.problems.iter().filter(|problem| !before.contains(problem)).map(String::as_str).collect();
        if new.is_empty() {
            self.configure_tunnels();
            self.update_endpoint().await;
            self.undone = false;
            self.checker.forgive();
            return Ok(self.problems());
        }
        let problems = new.join("; ");
        self.go_back(old, tables).await;
        anyhow::bail!("the new configuration cannot be applied in full: {problems}")
    }

    /// Puts an earlier configuration in force again.
    pub(super) async fn go_back(&mut self, config: Config, tables: tables::Tables) {
        self.config = config;
        (self.desired, self.sources) = (None, None);
        self.tables.restore(tables, &self.state);
        self.reconcile(Kinds::ALL).await;
    }

    /// Refuses what is known to fail, before anything is changed for it. Returns the prefixes, which need not be compiled
    /// twice.
    fn check_applicable(&self, config: &mut Config) -> anyhow::Result<Option<Arc<Sources>>> {
        let Some(snapshot) = &self.snapshot else { return Ok(None) };
        follow(config, &snapshot.state);
        self.tables.check_free(config, &snapshot.state)?;
        let desired = self.desired_of(config, snapshot);
        plan(&desired, &snapshot.state, self.fast.as_ref().map(datapath::Datapath::state))?;
        Ok(desired.fast.map(|fast| fast.sources))
    }
}
