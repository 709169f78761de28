//! The fast path in the daemon's hands: opened, filled, closed and removed.

use tracing::{info, warn};

use super::{Daemon, down::remove_fast_path, messages::forward_log, wants_no_programs};
use crate::{
    config::{Datapath, Policy},
    datapath::{self, DatapathError, Method},
    host::privilege,
    policy::fast::{FastOp, Open, Part},
    prefixes::index::{self, Full},
};

impl Daemon {
    /// Loads the programs if there should be some and are none.
    pub(super) fn open_fast_path(&mut self) {
        let pins = &self.options.instance.pin_dir;
        if let Some(fast) = &self.fast
            && !fast.maps_pinned()
        {
            let error = fast.restore_pins().err().map(|error| error.to_string());
            match &error {
                None => warn!("somebody has removed the pinned maps below {}; pinned them again", pins.display()),
                Some(_) if self.fast_error == error => {}
                Some(error) => warn!("the pinned maps are gone, a restart of tunroute will have a gap: {error}"),
            }
            self.fast_error = error;
        }
        // With `datapath = "kernel"` only to remove what an earlier daemon has left.
        let wanted = !wants_no_programs(&self.config) || datapath::anything_pinned(pins);
        if self.fast.is_some() || !wanted {
            return;
        }
        let opened = match privilege::missing_for_fast_path() {
            // In the kernel's words this would be the verifier's log.
            Some(missing) => Err(missing),
            None => {
                let method = self.options.method.unwrap_or_else(Method::detect);
                let expected = || index::expected(self.config.policies.iter().flat_map(Policy::sources));
                let words = self.outgrown.take().unwrap_or_else(expected);
                datapath::Datapath::open(pins, method, words).map_err(|error| error.to_string())
            }
        };
        match opened {
            Ok(mut fast) => {
                forward_log(&mut fast);
                self.checker.forget_programs();
                self.fast = Some(fast);
                self.fast_error = None;
            }
            Err(error) => {
                if self.fast_error.as_ref() != Some(&error) {
                    warn!("no fast path, the kernel's rules carry all traffic: {error}");
                }
                self.fast_error = Some(error);
            }
        }
    }

    pub(super) async fn remove_fast_path(&mut self) -> anyhow::Result<()> {
        self.checker.forget_programs();
        if let (Some(fast), Some(snapshot)) = (self.fast.take(), &self.snapshot) {
            remove_fast_path(&self.kernel, fast, snapshot).await?;
            info!("the fast path is removed");
        }
        Ok(())
    }

    /// In `ebpf` mode: are the programs in place, so that no rules are needed? Returns whether the answer has changed.
    pub(super) fn update_fallback(&mut self) -> bool {
        let needed = self.needs_rules() || self.config.datapath == Datapath::Ebpf && !self.all_attached();
        if needed == self.fallback {
            return false;
        }
        if needed {
            warn!("the programs cannot do without rules: installing rules until they can");
        } else {
            info!("the programs do all the work: removing the rules");
        }
        self.fallback = needed;
        true
    }

    /// In `ebpf` mode: do rules have to stand in for the programs, whichever of them are attached?
    pub(super) fn needs_rules(&self) -> bool {
        self.config.datapath == Datapath::Ebpf && (self.fast.is_none() || !self.gates.complete())
    }

    /// All programs are attached that the configuration asks for.
    fn all_attached(&self) -> bool {
        let Some(fast) = &self.fast else { return false };
        let Some(desired) = self.desired.as_ref().and_then(|desired| desired.fast.as_ref()) else { return false };
        // What XDP does not do, the others do.
        let mut needed = desired.attachments.iter().filter(|attachment| attachment.part != Part::Xdp);
        needed.all(|attachment| fast.state().attached.contains(attachment))
    }

    /// Changes the prefixes that the programs know, all at once. If there is no room, other programs with more take their
    /// place in the next pass.
    pub(super) fn apply_entries(&mut self, first: &FastOp, batch: &[&FastOp]) {
        if first.is_removal() && !self.problems.is_empty() {
            return;
        }
        let Some(fast) = &mut self.fast else { return };
        match fast.apply_entries(batch) {
            Ok(()) => {}
            Err(DatapathError::Full(Full { needed })) if needed > fast.words().1 => {
                self.fast = None;
                self.outgrown = Some(needed);
            }
            Err(error) => self.problem(format!("{first}, and others: {error}")),
        }
    }

    /// What could not be done in the kernel, the fast path must not do either: it steps aside until it is done.
    pub(super) fn close_fast_path(&mut self) {
        if let Some(fast) = &mut self.fast
            && fast.state().open.any()
        {
            warn!("the fast path steps aside until all is done");
            if let Err(error) = fast.apply(&FastOp::SetOpen(Open::default())) {
                self.problem(error.to_string());
            }
        }
    }
}
