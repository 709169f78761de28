//! Taking everything away again, with a daemon or after it.

use std::path::Path;

use anyhow::Context as _;

use super::messages::log_plan;
use crate::{
    datapath::{self, Datapath},
    host::instance::{Instance, NamespaceLock},
    host::state::StateDir,
    kernel::{Kernel, Kinds, Snapshot},
    policy::compile::Desired,
    policy::net::KernelOp,
    policy::plan::{Op, Undone, plan},
};

/// Detaches all programs and removes the pins, and the qdiscs without other users.
pub(super) async fn remove_fast_path(
    kernel: &Kernel,
    fast: Option<Datapath>,
    pin_dir: &Path,
    snapshot: &Snapshot,
) -> anyhow::Result<()> {
    let links = &snapshot.state.links;
    let qdiscs = match fast {
        Some(fast) => fast.remove(links)?,
        None => datapath::remove(pin_dir, links)?,
    };
    for device in qdiscs {
        kernel.remove_unused_clsact(device).await?;
    }
    Ok(())
}

/// Removes rules, routes, programs, maps and names: for a running daemon, or in the place of one that is gone.
pub(super) async fn clean(kernel: &Kernel, fast: Option<Datapath>, instance: &Instance) -> anyhow::Result<()> {
    let snapshot = kernel.observe(Kinds::ALL, None).await?;
    // Programs first: they are ahead of the rules, and would go on deciding. If they cannot be removed, rules and routes
    // are removed all the same.
    let programs = remove_fast_path(kernel, fast, &instance.pin_dir, &snapshot).await;
    let operations = plan(&Desired::default(), &snapshot.state, None)?;
    log_plan(&operations);
    let operations: Vec<&KernelOp> = operations
        .iter()
        .filter_map(|op| match op {
            Op::Kernel(op) => Some(op),
            Op::Fast(_) => None,
        })
        .collect();
    let problems = kernel.apply_all(operations.iter().copied(), &snapshot, &mut Undone::default()).await;
    instance.unname_tables();
    let programs = programs.err().map(|error| format!("{error:#}"));
    let problems: Vec<String> = problems.iter().map(ToString::to_string).chain(programs).collect();
    if problems.is_empty() {
        return Ok(());
    }
    anyhow::bail!("not everything could be removed: {}", problems.join("; "))
}

/// Removes what a daemon that is gone has left. Returns whether there was anything to remove.
///
/// # Errors
///
/// If something cannot be removed, or a daemon is running after all.
pub async fn down_without_daemon(runtime_dir: &Path) -> anyhow::Result<bool> {
    let Some(instance) = Instance::recorded(runtime_dir)? else { return Ok(false) };
    let _state = StateDir::open(&instance.state_dir)?;
    let _lock = NamespaceLock::take()?;
    let _runtime_lock = instance.record(runtime_dir)?;
    let (kernel, _events) = Kernel::connect()?;
    clean(&kernel, None, &instance).await.context("cannot remove what an earlier daemon has left")?;
    Instance::forget(runtime_dir);
    Ok(true)
}
