//! `tunroute plan`: the operations that would bring the system to the state of a configuration, as a diff.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::{policy::fast::FastOp, policy::net::KernelOp, policy::plan::Op};

/// The number of prefix map entries shown for each kind of change; the rest is summed up.
const SHOWN_ENTRIES: usize = 20;

/// The planned steps, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preview {
    /// The configuration file.
    pub config: String,
    /// The steps.
    pub steps: Vec<Step>,
    /// What this preview does not know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// One planned operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The kind of change.
    pub change: Change,
    /// The datapath that is changed.
    pub datapath: Side,
    /// The operation: an `ip` command, or what changes in the fast path.
    pub operation: String,
    /// Whether it is an entry of a prefix map, of which there may be many.
    #[serde(default)]
    pub entry: bool,
}

/// A kind of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Adds something.
    Add,
    /// Replaces a value.
    Set,
    /// Removes something.
    Remove,
}

/// A datapath.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Rules and routes.
    Kernel,
    /// Maps and programs.
    FastPath,
}

impl From<&Op> for Step {
    fn from(op: &Op) -> Self {
        let operation = op.to_string();
        match op {
            Op::Kernel(op) => {
                let change = match op {
                    KernelOp::AddRule(_) | KernelOp::AddRoute(_) => Change::Add,
                    KernelOp::ReplaceRoute(_) => Change::Set,
                    KernelOp::DelRule { .. } | KernelOp::DelRoute { .. } => Change::Remove,
                };
                Self { change, datapath: Side::Kernel, operation, entry: false }
            }
            Op::Fast(op) => {
                let change = match op {
                    _ if op.is_removal() => Change::Remove,
                    FastOp::WriteSlot(..) | FastOp::SetOpen(_) => Change::Set,
                    _ => Change::Add,
                };
                Self { change, datapath: Side::FastPath, operation, entry: op.is_entry() }
            }
        }
    }
}

impl Preview {
    /// The diff as text, with or without colours.
    #[must_use]
    pub fn render(&self, colour: bool) -> String {
        let mut text = String::new();
        let entries = self.steps.iter().filter(|step| step.entry).count();
        let mut shown_entries = 0;
        for step in &self.steps {
            if step.entry {
                shown_entries += 1;
                if shown_entries > SHOWN_ENTRIES {
                    continue;
                }
            }
            let (sign, code) = match step.change {
                Change::Add => ('+', 32),
                Change::Set => ('~', 33),
                Change::Remove => ('-', 31),
            };
            // Writing to a string does not fail.
            let _infallible = if colour {
                writeln!(text, "\x1b[{code}m{sign} {}\x1b[0m", step.operation)
            } else {
                writeln!(text, "{sign} {}", step.operation)
            };
        }
        if let Some(more) = entries.checked_sub(SHOWN_ENTRIES).filter(|more| *more > 0) {
            let _infallible = writeln!(text, "  … and {more} more entries of the prefix maps (--json has them all)");
        }
        if !text.is_empty() {
            text.push('\n');
        }
        for note in &self.notes {
            let _infallible = writeln!(text, "note: {note}");
        }
        text + &self.summary() + "\n"
    }

    /// The last line: `3 to add, 1 to set, 0 to remove`, or that there is nothing to do.
    #[must_use]
    pub fn summary(&self) -> String {
        if self.steps.is_empty() {
            return format!("nothing to do: the system is as {} says", self.config);
        }
        let count = |change| self.steps.iter().filter(|step| step.change == change).count();
        let (add, set, remove) = (count(Change::Add), count(Change::Set), count(Change::Remove));
        format!("{}: {add} to add, {set} to set, {remove} to remove", self.config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(change: Change, operation: &str, entry: bool) -> Step {
        Step { change, datapath: Side::Kernel, operation: operation.into(), entry }
    }

    #[test]
    fn shows_signs_and_counts() {
        let preview = Preview {
            config: "a.toml".into(),
            steps: vec![
                step(Change::Add, "ip rule add x", false),
                step(Change::Set, "ip route replace y", false),
                step(Change::Remove, "ip rule del z", false),
            ],
            notes: vec!["something".into()],
        };
        let plain = "+ ip rule add x\n~ ip route replace y\n- ip rule del z\n\nnote: something\n\
                     a.toml: 1 to add, 1 to set, 1 to remove\n";
        assert_eq!(preview.render(false), plain);
        assert!(preview.render(true).starts_with("\x1b[32m+ ip rule add x\x1b[0m\n\x1b[33m~ "));
    }

    #[test]
    fn sums_up_entries_but_never_rules() {
        let mut steps = vec![step(Change::Add, "entry", true); SHOWN_ENTRIES + 5];
        steps.extend(vec![step(Change::Add, "rule", false); 100]);
        let text = Preview { config: "a.toml".into(), steps, notes: Vec::new() }.render(false);
        assert_eq!(text.matches("+ entry").count(), SHOWN_ENTRIES);
        assert_eq!(text.matches("+ rule").count(), 100);
        assert!(text.contains("and 5 more entries"), "{text}");
        assert!(text.ends_with("a.toml: 125 to add, 0 to set, 0 to remove\n"), "{text}");
    }

    #[test]
    fn says_when_there_is_nothing_to_do() {
        let nothing = Preview { config: "a.toml".into(), ..Preview::default() };
        assert_eq!(nothing.render(true), "nothing to do: the system is as a.toml says\n");
    }
}
