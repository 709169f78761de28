//! The gates as last looked at, and what they mean for the fast path.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{info, warn};

use crate::{
    compile::matching,
    config::Config,
    fast::Open,
    gates::{Gate, GateInput, Probes, gates},
    kernel::sysctl::{self, RpFilter},
    net::{Family, IfIndex, KernelState, Link},
};

/// The rules' priorities span this many beyond the band's first.
const BAND: u32 = 129;

/// Which families and devices the fast path may decide, and why not the others.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Gates {
    open: Open,
    closed_devices: BTreeSet<IfIndex>,
    reverse_path: bool,
    reasons: Vec<String>,
}

impl Gates {
    pub(super) async fn look(config: &Config, kernel: &KernelState) -> Self {
        let ingress: BTreeMap<IfIndex, Link> =
            matching(&config.interfaces.ingress, kernel).map(|link| (link.index, link.clone())).collect();
        let probes = Probes::read(ingress.values()).await;
        let report = gates(&GateInput {
            state: kernel,
            probes: &probes,
            ingress: &ingress.keys().copied().collect::<Vec<_>>(),
            band: config.band..=config.band.saturating_add(BAND),
            bypass_netfilter: config.bypass_netfilter,
        });
        // A family has one switch for all devices, so a device that is closed for one family closes it for all; a device
        // that is closed for both is left out instead.
        let is_open = |device, family| report.is_open(device, family);
        let closed = |device: &IfIndex| !Family::ALL.into_iter().any(|family| is_open(*device, family));
        let closed_devices: BTreeSet<IfIndex> = ingress.keys().copied().filter(|device| closed(device)).collect();
        let open = |family| ingress.keys().all(|device| closed_devices.contains(device) || is_open(*device, family));

        let mut closed_gates: Vec<&Gate> = Vec::new();
        for family in Family::ALL.into_iter().filter(|family| config.uses(*family)) {
            for gate in ingress.keys().flat_map(|device| report.closed(*device, family)) {
                if !closed_gates.contains(&gate) {
                    closed_gates.push(gate);
                }
            }
        }
        Self {
            open: Open { v4: open(Family::V4), v6: open(Family::V6) },
            closed_devices,
            reverse_path: ingress.values().any(|link| sysctl::rp_filter(&link.name) != RpFilter::Off),
            reasons: closed_gates.iter().map(|gate| format!("{gate} ({})", gate.advice())).collect(),
        }
    }

    /// The families that the ingress program may decide.
    pub(super) const fn open(&self) -> Open {
        self.open
    }

    /// All families that policies speak of may be decided, on all ingress devices.
    pub(super) fn all_open(&self, config: &Config) -> bool {
        self.closed_devices.is_empty()
            && Family::ALL.into_iter().all(|family| self.open.family(family) || !config.uses(family))
    }

    /// Ingress devices at which nothing may be decided.
    pub(super) const fn closed_devices(&self) -> &BTreeSet<IfIndex> {
        &self.closed_devices
    }

    /// IPv4 ingress checks the way back to the source.
    pub(super) const fn reverse_path(&self) -> bool {
        self.reverse_path
    }

    /// Says which gates have closed and opened since an earlier look.
    pub(super) fn log_since(&self, earlier: &Self) {
        for reason in self.reasons.iter().filter(|reason| !earlier.reasons.contains(reason)) {
            warn!("the kernel decides in place of the fast path: {reason}");
        }
        for reason in earlier.reasons.iter().filter(|reason| !self.reasons.contains(reason)) {
            info!("no longer so: {reason}");
        }
    }

    /// The closed gates in words, with what to do about each.
    pub(super) fn reasons(&self) -> &[String] {
        &self.reasons
    }
}
