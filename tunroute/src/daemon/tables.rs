//! Which routing table each policy has, and each probed tunnel: from the configuration, remembered, or allocated.

use std::collections::{BTreeMap, BTreeSet};

use tracing::warn;

use crate::{
    config::Config,
    host::state::{StateDir, tables},
    policy::compile::probes,
    policy::net::KernelState,
};

/// The policies' tables, by the policies' names, and those of the tunnels' probes, by [`probes::table_name`].
#[derive(Clone, Debug, Default)]
pub(super) struct Tables {
    numbers: BTreeMap<String, u32>,
    /// Allocated ones, as they stand in the state directory.
    remembered: BTreeMap<String, u32>,
    named: bool,
}

impl Tables {
    pub(super) fn load(state: &StateDir) -> Self {
        let remembered = state.load(tables::FILE).unwrap_or_else(|error| {
            warn!("{error}; allocating tables anew");
            None
        });
        Self { remembered: remembered.unwrap_or_default(), ..Self::default() }
    }

    pub(super) const fn numbers(&self) -> &BTreeMap<String, u32> {
        &self.numbers
    }

    /// The policies' tables in the order of the configuration, then the probes'.
    pub(super) fn names<'a>(&'a self, config: &'a Config) -> impl Iterator<Item = (&'a str, u32)> {
        let table = |name: &'a String| Some((name.as_str(), *self.numbers.get(name)?));
        let of_probes = self.numbers.iter().filter(|(name, _)| name.starts_with(probes::TABLE_PREFIX));
        let of_policies = config.policies.iter().filter_map(move |policy| table(&policy.name));
        of_policies.chain(of_probes.map(|(name, table)| (name.as_str(), *table)))
    }

    /// Fails if the configuration names a table with foreign routes.
    pub(super) fn check_free(&self, config: &Config, kernel: &KernelState) -> anyhow::Result<()> {
        for (policy, table) in explicit(config) {
            // A table already in use by tunroute stays in use although it has foreign routes now.
            let used = self.numbers.values().any(|used| *used == table);
            anyhow::ensure!(
                used || !kernel.foreign_tables.contains(&table),
                "table {table} of policy \"{policy}\" has routes of another program (`ip route show table {table}` and \
                 `ip -6 route show table {table}`): remove them, or choose another `table`"
            );
        }
        Ok(())
    }

    /// Goes back to what was, because the configuration goes back.
    pub(super) fn restore(&mut self, earlier: Self, state: &StateDir) {
        if self.remembered != earlier.remembered {
            state.save_or_say(tables::FILE, &earlier.remembered);
        }
        *self = Self { named: false, ..earlier };
    }

    /// Brings the numbers up to date with the configuration. Returns whether any has changed.
    pub(super) fn update(&mut self, config: &Config, kernel: &KernelState, state: &StateDir) -> bool {
        let next = self.following(config, kernel);
        if next.remembered != self.remembered {
            state.save_or_say(tables::FILE, &next.remembered);
        }
        let changed = next.numbers != self.numbers || !self.named;
        *self = Self { named: true, ..next };
        changed
    }

    /// What the numbers would be with this configuration.
    pub(super) fn following(&self, config: &Config, kernel: &KernelState) -> Self {
        let mut numbers = explicit(config);
        let unnumbered: Vec<&str> = config
            .policies
            .iter()
            .filter(|policy| !policy.main)
            .map(|policy| policy.name.as_str())
            .filter(|name| !numbers.contains_key(*name))
            .collect();
        let probed = config.tunnels.iter().filter(|tunnel| probes::needs_table(tunnel));
        let of_probes: Vec<String> = probed.map(|tunnel| probes::table_name(&tunnel.name)).collect();
        // A table already in use by tunroute stays in use although it has foreign routes now.
        let foreign = kernel.foreign_tables.iter().filter(|table| !self.numbers.values().any(|used| used == *table));
        let taken: BTreeSet<u32> = numbers.values().chain(foreign).copied().collect();
        let allocated = tables::allocate_tables(
            unnumbered.into_iter().chain(of_probes.iter().map(String::as_str)),
            &self.remembered,
            &taken,
        );
        numbers.extend(allocated.iter().map(|(name, table)| (name.clone(), *table)));
        Self { numbers, remembered: allocated, named: self.named }
    }
}

/// The numbers that the configuration gives: a policy's own, or that of the tunnel it prefers, which goes to the first
/// such policy.
fn explicit(config: &Config) -> BTreeMap<String, u32> {
    let mut numbers = BTreeMap::new();
    let mut used: BTreeSet<u32> = config.policies.iter().filter_map(|policy| policy.table).collect();
    for policy in &config.policies {
        let preferred = policy.via.first().and_then(|name| config.tunnels.iter().find(|tunnel| tunnel.name == *name));
        let tunnels = || preferred?.table.filter(|table| used.insert(*table));
        if let Some(table) = policy.table.or_else(tunnels) {
            numbers.insert(policy.name.clone(), table);
        }
    }
    numbers
}
