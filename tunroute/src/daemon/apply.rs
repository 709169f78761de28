//! Carrying out a plan.

use tracing::error;

use super::{Daemon, UNDER_WAY};
use crate::{
    kernel::{Kinds, Snapshot},
    policy::fast::{FastOp, Part},
    policy::net::KernelOp,
    policy::plan::{Op, Undone},
};

impl Daemon {
    /// Carries out a plan. What cannot be done is a problem, and the removals of what it should have replaced are put off.
    /// Returns which kinds may have changed.
    pub(super) async fn apply(&mut self, operations: &[Op], snapshot: &Snapshot, undone: &mut Undone<'_>) -> Kinds {
        let (mut changed, mut waited) = (Kinds::NONE, false);
        let mut rest = operations;
        while let [first, ..] = rest {
            match first {
                Op::Fast(entry) if entry.is_entry() => {
                    let same =
                        |op: &Op| matches!(op, Op::Fast(op) if op.is_entry() && op.is_removal() == entry.is_removal());
                    let (batch, after) = rest.split_at(rest.iter().position(|op| !same(op)).unwrap_or(rest.len()));
                    rest = after;
                    let batch = batch.iter().filter_map(|op| match op {
                        Op::Fast(op) => Some(op),
                        Op::Kernel(_) => None,
                    });
                    self.apply_entries(&batch.collect::<Vec<_>>(), undone);
                }
                Op::Fast(operation) => {
                    rest = &rest[1..];
                    // Rules take over, and what was routed before they did is on its way to the uplink.
                    if operation.ends_guard() && !waited && changed.contains(Kinds::RULES) {
                        tokio::time::sleep(UNDER_WAY).await;
                        waited = true;
                    }
                    self.apply_fast(operation, undone);
                }
                Op::Kernel(_) => {
                    let end = rest.iter().position(|op| matches!(op, Op::Fast(_))).unwrap_or(rest.len());
                    let (batch, after) = rest.split_at(end);
                    rest = after;
                    changed |= batch.iter().map(kind).fold(Kinds::NONE, |all, kind| all | kind);
                    let batch = batch.iter().filter_map(|op| match op {
                        Op::Kernel(op) => Some(op),
                        Op::Fast(_) => None,
                    });
                    for error in self.kernel.apply_all(batch, snapshot, undone).await {
                        self.problem(error.to_string());
                    }
                }
            }
        }
        changed
    }

    /// Carries out an operation of the fast path that is not on prefixes.
    fn apply_fast(&mut self, operation: &FastOp, undone: &mut Undone<'_>) {
        let limited = match operation {
            FastOp::SetOpen(open) => FastOp::SetOpen(undone.allow(*open)),
            FastOp::SetUnmatched(open) => FastOp::SetUnmatched(undone.allow(*open)),
            operation => operation.clone(),
        };
        if matches!(operation, FastOp::SetShadow(false)) {
            self.close_fast_path(undone);
        }
        let Some(fast) = &mut self.fast else { return };
        if undone.puts_off_fast(operation) {
            return;
        }
        match (fast.apply(&limited), operation) {
            (Ok(()), _) => {}
            (Err(error), FastOp::Attach(attachment)) if attachment.part == Part::Xdp => {
                self.enter_refusal(attachment, &error);
            }
            (Err(error), _) => {
                undone.fail_fast(operation);
                self.problem(format!("{operation}: {error}"));
            }
        }
    }

    /// Says what could not be done, once while it lasts: it is tried again every second.
    pub(super) fn problem(&mut self, problem: String) {
        if !self.logged.contains(&problem) {
            error!("{problem}");
        }
        self.problems.push(problem);
    }
}

/// What an operation changes.
const fn kind(operation: &Op) -> Kinds {
    match operation {
        Op::Kernel(KernelOp::AddRule(_) | KernelOp::DelRule { .. }) => Kinds::RULES,
        Op::Kernel(_) => Kinds::ROUTES,
        Op::Fast(_) => Kinds::NONE,
    }
}
