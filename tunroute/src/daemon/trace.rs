//! The daemon's part of `tunroute trace`: returns the decisions since the last request, and stops recording when no request
//! comes any more.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use tokio::time::Instant;
use tracing::warn;
use tunroute_common::maps::{Event, Outcome};

use super::{Daemon, explain::name};
use crate::{
    commands::trace::{Decision, Traced, Wanted},
    config::Datapath,
    datapath::monotonic_now,
    policy::compile::ChainId,
    policy::fast::address_from_words,
    policy::net::{Family, KernelState},
    policy::plan::number_slots,
};

/// Time after the last request until recording stops: longer than a pass of the daemon.
const PATIENCE: Duration = Duration::from_secs(3);

/// The client that decisions are recorded for.
pub(super) struct Listener {
    session: u64,
    until: Instant,
    /// The counter of dropped decisions, as of the last request.
    omitted: u64,
}

impl Daemon {
    /// Returns the decisions since the session's last request; the first one starts recording.
    pub(super) fn trace(&mut self, session: u64, wanted: &Wanted) -> anyhow::Result<Traced> {
        let filter = wanted.filter()?;
        if self.listener.as_ref().is_some_and(|listener| listener.session != session) {
            self.end_tracing();
            anyhow::ensure!(
                self.listener.is_none(),
                "another `tunroute trace` is running, and only one can at a time; try again when it has ended"
            );
        }
        anyhow::ensure!(
            self.config.datapath != Datapath::Kernel,
            "with datapath = \"kernel\" no program runs; \"shadow\" shows what the programs would do"
        );
        let no_programs = || match &self.fast_error {
            Some(error) => format!("no program runs: {error}"),
            None => "no program runs yet".to_owned(),
        };
        let fast = self.fast.as_mut().with_context(no_programs)?;
        fast.trace(Some(filter))?;
        let (events, omitted) = fast.traced()?;
        let before = self.listener.replace(Listener { session, until: Instant::now() + PATIENCE, omitted });
        // Not counted: what was dropped before the session.
        let omitted = before.map_or(0, |before| omitted.saturating_sub(before.omitted));
        Ok(Traced { decisions: self.decisions(&events), omitted })
    }

    /// No client has asked for a while: tracing ends.
    pub(super) fn end_tracing(&mut self) {
        if self.listener.take_if(|listener| listener.until <= Instant::now()).is_some()
            && let Some(Err(error)) = self.fast.as_mut().map(|fast| fast.trace(None))
        {
            warn!("{error}");
        }
    }

    fn decisions(&self, events: &[Event]) -> Vec<Decision> {
        let (Some(fast), Some(desired)) = (&self.fast, self.desired.as_ref().and_then(|desired| desired.fast.as_ref()))
        else {
            return Vec::new();
        };
        if events.is_empty() {
            return Vec::new();
        }
        let numbers = number_slots(desired, fast.state()).unwrap_or_default();
        let by_number: std::collections::BTreeMap<u32, &ChainId> =
            numbers.iter().map(|(id, number)| (*number, id)).collect();
        let policy = |slot: u32| {
            let slot = desired.slots.get(by_number.get(&slot).copied()?)?;
            Some(self.config.policies.get(slot.policy)?.name.clone())
        };
        let nothing = KernelState::default();
        let kernel = self.snapshot.as_ref().map_or(&nothing, |snapshot| &snapshot.state);
        let (now, ticks) = (SystemTime::now(), monotonic_now());
        let shadow = self.config.datapath == Datapath::Shadow;
        let decision = |event: &Event| {
            let family =
                if event.ethertype == tunroute_common::packet::ETHERTYPE_IPV4 { Family::V4 } else { Family::V6 };
            let outcome = *Outcome::ALL.get(usize::try_from(event.outcome).ok()?)?;
            let leaves = matches!(outcome, Outcome::Forwarded | Outcome::Diverted) && event.tunnel != 0;
            Some(Decision {
                time: now.checked_sub(Duration::from_nanos(ticks.saturating_sub(event.time)))?,
                device: name(kernel, event.ifindex),
                source: address_from_words(family, event.source),
                destination: address_from_words(family, event.destination),
                protocol: event.protocol,
                policy: policy(event.slot).unwrap_or_else(|| "a policy that is gone".to_owned()),
                outcome: outcome.name().to_owned(),
                tunnel: leaves.then(|| name(kernel, event.tunnel)),
                length: event.length,
                shadow,
            })
        };
        events.iter().filter_map(decision).collect()
    }
}
