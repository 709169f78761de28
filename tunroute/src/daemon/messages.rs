//! What the daemon says of what it and others do.

use std::fs;

use tokio::{
    io::{Interest, unix::AsyncFd},
    task::JoinSet,
};
use tracing::{debug, info, warn};

use crate::{datapath::Datapath, kernel::Change, policy::plan::Op};

/// Maximum number of operations of a plan that are logged one by one; a larger plan is summed up.
const LOGGED_OPERATIONS: usize = 50;

/// Says in one line what others have removed. Returns whether anything was.
pub(super) fn report_removed(change: &Change) -> bool {
    if change.overrun {
        warn!("the kernel's notifications overran; looking at everything");
    }
    let Some(first) = change.removed.first() else { return false };
    let who = fs::read_to_string(format!("/proc/{}/comm", first.port)).unwrap_or_default();
    let who = if who.is_empty() { String::new() } else { format!(" ({})", who.trim()) };
    match change.removed.len().saturating_sub(1).saturating_add(change.removed_more) {
        0 => warn!("another program{who} did `{first}`; undoing it"),
        more => {
            warn!(
                "another program{who} did `{first}` and removed {more} more of tunroute's rules and routes; undoing it"
            )
        }
    }
    true
}

/// Map entries are many and say little: they are only counted by default.
pub(super) fn log_plan(operations: &[Op]) {
    let (entries, main): (Vec<&Op>, Vec<&Op>) = operations.iter().partition(|op| match op {
        Op::Fast(op) => op.is_entry(),
        Op::Kernel(_) => false,
    });
    for operation in main.iter().take(LOGGED_OPERATIONS) {
        info!("{operation}");
    }
    if let Some(more) = main.len().checked_sub(LOGGED_OPERATIONS).filter(|more| *more > 0) {
        info!("and {more} more operations");
    }
    for entry in &entries {
        debug!("{entry}");
    }
    if !entries.is_empty() {
        info!("{} entries of the fast path's prefix maps", entries.len());
    }
}

/// Sends what the eBPF programs log to the daemon's log, by a task of the set. It ends when it is aborted, and lets go of
/// the programs' map then.
pub(super) fn forward_log(fast: &mut Datapath, tasks: &mut JoinSet<()>) {
    let logger = match aya_log::EbpfLogger::init(fast.ebpf()) {
        Ok(logger) => logger,
        Err(error) => return warn!("cannot show what the eBPF programs log: {error}"),
    };
    // SAFETY: the logger owns its descriptor and keeps it until it is dropped.
    match unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) } {
        Ok(mut logger) => {
            tasks.spawn(async move {
                while let Ok(mut guard) = logger.readable_mut().await {
                    guard.get_inner_mut().flush();
                    guard.clear_ready();
                }
            });
        }
        Err(error) => warn!("cannot show what the eBPF programs log: {error}"),
    }
}
