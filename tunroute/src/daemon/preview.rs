//! What a configuration would change: observed, compiled and planned as a pass does, and not applied.

use std::{collections::BTreeSet, path::Path};

use super::{Daemon, config_wants_no_fast_path, gates::Gates, tables::Tables, wants_no_programs, xdp::would_take_part};
use crate::{
    commands::preview::{Preview, Step},
    config::{Config, Datapath},
    datapath::anything_pinned,
    host::instance::Instance,
    host::privilege,
    host::state::StateDir,
    kernel::{Kernel, Kinds, Snapshot},
    policy::compile::{Inputs, compile, follow},
    policy::fast::FastState,
    policy::net::Family,
    policy::plan::plan,
};

impl Daemon {
    /// What a reload with this file would do now.
    pub(super) async fn preview(&self, file: &Path, mut config: Config) -> anyhow::Result<Preview> {
        let snapshot = self.kernel.observe(Kinds::ALL, None).await?;
        follow(&mut config, &snapshot.state);
        self.tables.check_free(&config, &snapshot.state)?;
        let tables = self.tables.following(&config, &snapshot.state);
        let fast = self.fast.as_ref().map(crate::datapath::Datapath::state);
        preview(file, &config, &snapshot, &tables, &self.failed, fast).await
    }
}

/// What a daemon that is started with this configuration would do first.
///
/// # Errors
///
/// If the kernel cannot be asked, or the configuration does not fit it.
pub async fn preview_without_daemon(file: &Path, mut config: Config, instance: &Instance) -> anyhow::Result<Preview> {
    let remembered = if instance.state_dir.is_dir() {
        Tables::load(&StateDir::open(&instance.state_dir)?)
    } else {
        Tables::default()
    };
    let (kernel, _events) = Kernel::connect()?;
    let snapshot = kernel.observe(Kinds::ALL, None).await?;
    follow(&mut config, &snapshot.state);
    let config = &config;
    remembered.check_free(config, &snapshot.state)?;
    let tables = remembered.following(config, &snapshot.state);
    let mut notes = Vec::new();
    let mut fast = Some(FastState::default());
    if !wants_no_programs(config) {
        if let Some(missing) = privilege::missing_for_fast_path() {
            notes.push(format!("no fast path, the kernel's rules would carry all traffic: {missing}"));
            fast = None;
        } else if anything_pinned(&instance.pin_dir) {
            notes.push(format!(
                "an earlier daemon's fast path is in place below {}; the next daemon adopts it, and knows what changes \
                 there",
                instance.pin_dir.display()
            ));
            fast = None;
        }
    }
    let mut preview = preview(file, config, &snapshot, &tables, &BTreeSet::new(), fast.as_ref()).await?;
    preview.notes.extend(notes);
    Ok(preview)
}

async fn preview(
    file: &Path,
    config: &Config,
    snapshot: &Snapshot,
    tables: &Tables,
    failed: &BTreeSet<(String, Family)>,
    fast: Option<&FastState>,
) -> anyhow::Result<Preview> {
    let gates = Gates::look(config, &snapshot.state, tables.numbers()).await;
    let fast = fast.filter(|_| !wants_no_programs(config));
    let xdp = would_take_part(config, &snapshot.state, fast).await;
    let desired = compile(&Inputs {
        config,
        kernel: &snapshot.state,
        tables: tables.numbers(),
        failed,
        rules: config.datapath != Datapath::Ebpf || fast.is_none() || !gates.complete(),
        fast: fast.map(|_| gates.inputs(&xdp)),
        before: None,
    });
    let steps = plan(&desired, &snapshot.state, fast)?.iter().map(Step::from).collect();
    let held_back = |reason: &str| format!("the kernel would decide in place of the fast path: {reason}");
    let notes = if fast.is_some() && !config_wants_no_fast_path(config) {
        gates.reasons().map(held_back).collect()
    } else {
        Vec::new()
    };
    Ok(Preview { config: file.display().to_string(), steps, notes })
}
