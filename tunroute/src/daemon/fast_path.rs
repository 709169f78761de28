//! The fast path in the daemon's hands: filled, closed and removed.

use tracing::{info, warn};

use super::{Daemon, UNDER_WAY, down::remove_fast_path, wants_no_programs};
use crate::{
    config::Datapath,
    datapath::{self, DatapathError, anything_pinned},
    policy::compile::{Desired, DesiredFast},
    policy::devices::matching,
    policy::fast::{Attachment, FastOp, Hook, Part},
    policy::net::{IfIndex, KernelState},
    policy::plan::Undone,
    prefixes::index::Full,
};

impl Daemon {
    /// Pins maps again whose pins were removed.
    pub(super) fn restore_pins(&mut self) {
        // While other programs are being loaded, some maps are on their way.
        let Some(fast) = self.fast.as_ref().filter(|fast| !self.loader.loads_programs() && !fast.maps_pinned()) else {
            return;
        };
        let pins = self.options.instance.pin_dir.display();
        let error = fast.restore_pins().err().map(|error| error.to_string());
        match &error {
            None => warn!("another program has removed the pinned maps below {pins}; pinned them again"),
            Some(_) if self.fast_error == error => {}
            Some(error) => warn!("the pinned maps are gone, a restart of tunroute will have a gap: {error}"),
        }
        self.fast_error = error;
    }

    /// Has the kernel look for the gateways of tunnels that are up, where it does not know whether they are there: it does
    /// not see the frames that programs send, and without rules nothing else would have it look.
    pub(super) async fn ask_for_gateways(&self, desired: Option<&Desired>, kernel: &KernelState) {
        let gateways = desired.and_then(|desired| desired.fast.as_ref()).into_iter().flat_map(DesiredFast::gateways);
        let is_up = |device: &IfIndex| kernel.links.get(device).is_some_and(|link| link.up);
        if let Err(error) = self.kernel.refresh_neighbours(gateways.filter(|(device, _)| is_up(device))).await {
            warn!("{error}");
        }
    }

    /// Removes the programs if there should be none: this daemon's, or what an earlier one has left.
    pub(super) async fn remove_fast_path(&mut self) -> anyhow::Result<()> {
        let pins = self.options.instance.pin_dir.clone();
        let unwanted = wants_no_programs(&self.config) && !self.loader.loads_programs();
        let Some(snapshot) = self.snapshot.take_if(|_| unwanted && (self.fast.is_some() || anything_pinned(&pins)))
        else {
            return Ok(());
        };
        if self.fast.is_none() {
            // The rules may just have taken over, and what was routed before is on its way to the uplink.
            tokio::time::sleep(UNDER_WAY).await;
        }
        let fast = self.take_programs();
        let result = remove_fast_path(&self.kernel, fast, &pins, &snapshot).await;
        self.snapshot = Some(snapshot);
        result?;
        info!("the fast path is removed");
        Ok(())
    }

    /// Looks whether an earlier daemon's programs stand at all ingress devices and uplinks, without rules, while this one's
    /// are not loaded.
    pub(super) fn look_for_earlier_programs(&mut self, kernel: &KernelState) {
        let interfaces = &self.config.interfaces;
        let places = [(Hook::Ingress, &interfaces.ingress), (Hook::Egress, &interfaces.uplink)];
        let places = places.into_iter().flat_map(|(hook, patterns)| {
            matching(patterns, kernel).filter_map(move |link| Attachment::new(Part::Decide, hook, link))
        });
        let places: Vec<Attachment> = places.collect();
        let with_rules = kernel.rules.iter().any(|rule| rule.ours && rule.oif.is_none());
        self.adopting = self.fast.is_none()
            && self.fast_error.is_none()
            && !with_rules
            && !places.is_empty()
            && datapath::left_attached(&self.options.instance.pin_dir, &places);
    }

    /// In `ebpf` mode: finds out whether rules are needed. Returns whether the answer has changed.
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

    /// In `ebpf` mode: do rules have to stand in for the programs, whichever of them are attached? An earlier daemon's
    /// programs do their work until this one's are loaded.
    pub(super) fn needs_rules(&self) -> bool {
        let none = self.fast.is_none() && !self.adopting;
        self.config.datapath == Datapath::Ebpf && (none || !self.gates.complete())
    }

    /// All programs are attached that the configuration asks for, and know its prefixes.
    fn all_attached(&self) -> bool {
        let Some(fast) = &self.fast else { return self.adopting };
        let Some(desired) = self.desired.as_ref().and_then(|desired| desired.fast.as_ref()) else { return false };
        // What XDP does not do, the others do.
        let mut needed = desired.attachments.iter().filter(|attachment| attachment.part != Part::Xdp);
        needed.all(|attachment| fast.state().attached.contains(attachment)) && self.outgrown.is_none()
    }

    /// Changes the prefixes that the programs know, all at once. If there is no room, they stay as they are until other
    /// programs with more room take their place.
    pub(super) fn apply_entries(&mut self, batch: &[&FastOp], undone: &mut Undone<'_>) {
        let batch: Vec<&FastOp> = batch.iter().copied().filter(|op| !undone.puts_off_fast(op)).collect();
        let (Some(fast), [first, ..]) = (&mut self.fast, batch.as_slice()) else { return };
        if self.outgrown.is_some() {
            undone.fail_entries();
            return;
        }
        match fast.apply_entries(&batch) {
            Ok(()) => {}
            Err(DatapathError::Full(Full { needed })) if needed > fast.words().1 => {
                self.outgrown = Some(needed);
                undone.fail_entries();
            }
            Err(error) => {
                batch.iter().for_each(|op| undone.fail_fast(op));
                self.problem(format!("{first}, and others: {error}"));
            }
        }
    }

    /// What could not be done in the kernel, the fast path must not do either: it leaves the families concerned to the
    /// kernel until it is done.
    pub(super) fn close_fast_path(&mut self, undone: &Undone<'_>) {
        let Some(fast) = &mut self.fast else { return };
        let allowed = undone.allow(fast.state().open);
        if allowed != fast.state().open {
            warn!("the fast path steps aside until all is done");
            if let Err(error) = fast.apply(&FastOp::SetOpen(allowed)) {
                self.problem(error.to_string());
            }
        }
    }
}
