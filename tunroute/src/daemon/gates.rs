//! The gates as last looked at, and what they mean for the fast path.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{info, warn};

use crate::{
    config::{Config, Datapath, Unmatched},
    datapath::features,
    kernel::sysctl::{self, RpFilter},
    policy::compile::{FastInputs, Sources},
    policy::devices::matching,
    policy::fast::Open,
    policy::gates::{Gate, GateInput, Probes, gates, kept_out, main_decides, unguarded},
    policy::net::{Band, Family, IfIndex, KernelState, Link, LinkLayer},
    policy::xdp_devices::Chosen,
};

/// Which families and devices the fast path may decide, and why not the others.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Gates {
    open: Open,
    complete: bool,
    closed_devices: BTreeSet<IfIndex>,
    /// How IPv4 ingress devices check the way back.
    filters: BTreeMap<IfIndex, RpFilter>,
    unmatched: Open,
    returning: BTreeSet<IfIndex>,
    reasons: Vec<Reason>,
    /// Netfilter hooks are known only as far as they belong to rule sets.
    only_rule_sets: bool,
    /// Why unmatched traffic is left to the kernel, if the configuration wants it forwarded.
    hints: Vec<String>,
}

/// Why the kernel decides in place of the fast path.
#[derive(Debug, PartialEq, Eq)]
struct Reason {
    /// The gate's name.
    gate: &'static str,
    /// What is so, and what to do about it.
    text: String,
}

/// Gates that are not an ingress device's.
const FOREIGN_ROUTES: &str = "foreign-routes";
const UNGUARDED_UPLINK: &str = "unguarded-uplink";
/// Not closed, but the kernel drops what comes from some sources, and the fast path leaves it to the kernel.
const REVERSE_PATH: &str = "reverse-path";
/// Closed by policies that the datapaths disagree about.
const DISAGREEMENT: &str = "disagreement";

impl Gates {
    /// Looks at the gates now. `tables` are those of the policies.
    pub(super) async fn look(config: &Config, kernel: &KernelState, tables: &BTreeMap<String, u32>) -> Self {
        let ingress: BTreeMap<IfIndex, Link> =
            matching(&config.interfaces.ingress, kernel).map(|link| (link.index, link.clone())).collect();
        let asks_main = features::asks_main();
        let tunnels: Vec<&Link> = match config.unmatched {
            Unmatched::Fast if asks_main => {
                config.tunnels.iter().filter_map(|tunnel| kernel.link(&tunnel.name)).collect()
            }
            Unmatched::Fast | Unmatched::Kernel => Vec::new(),
        };
        let probes = Probes::read(ingress.values().chain(tunnels.iter().copied())).await;
        let report = gates(&GateInput {
            state: kernel,
            probes: &probes,
            ingress: &ingress.keys().copied().chain(tunnels.iter().map(|link| link.index)).collect::<Vec<_>>(),
            last: Band(config.band).last(),
            policies: &config.policies,
            bypass_netfilter: config.bypass_netfilter,
        });
        // A family has one switch for all devices, so a device that is closed for one family closes it for all; a device
        // that is closed for both is left out instead.
        let is_open = |device, family| report.is_open(device, family);
        let closed = |device: &IfIndex| !Family::ALL.into_iter().any(|family| is_open(*device, family));
        let closed_devices: BTreeSet<IfIndex> = ingress.keys().copied().filter(|device| closed(device)).collect();
        let deciding: Vec<IfIndex> =
            ingress.keys().copied().filter(|device| !closed_devices.contains(device)).collect();
        // Without a device that may decide, a program that is still attached must not decide either.
        let open = |family| !deciding.is_empty() && deciding.iter().all(|device| is_open(*device, family));

        let mut closed_gates: Vec<&Gate> = Vec::new();
        for family in Family::ALL.into_iter().filter(|family| config.uses(*family)) {
            for gate in ingress.keys().flat_map(|device| report.closed(*device, family)) {
                if !closed_gates.contains(&gate) {
                    closed_gates.push(gate);
                }
            }
        }
        let closed = closed_gates.iter();
        let mut reasons: Vec<Reason> =
            closed.map(|gate| Reason { gate: gate.name(), text: format!("{gate} ({})", gate.advice()) }).collect();
        // Other differences between the kernel and the fast path, on any device.
        let foreign = tables.values().filter(|table| kernel.foreign_tables.contains(table)).map(|table| Reason {
            gate: FOREIGN_ROUTES,
            text: format!(
                "table {table} has routes of another program (`ip route show table {table}`, also -6: remove them)"
            ),
        });
        let agreed = reasons.len();
        reasons.extend(foreign);
        let agreed = agreed == reasons.len();
        let unknown = matching(&config.interfaces.uplink, kernel).filter(|link| link.layer == LinkLayer::Other);
        let unknown = unknown
            .map(|link| format!("the uplink {} carries neither Ethernet nor bare IP: it cannot be guarded", link.name));
        let alone = if config.datapath == Datapath::Ebpf { unguarded(config, kernel) } else { Vec::new() };
        let alone = alone.into_iter().map(|reason| format!("rules stand in for the programs: {reason}"));
        let unguarded: Vec<Reason> = unknown.chain(alone).map(|text| Reason { gate: UNGUARDED_UPLINK, text }).collect();
        let all_open = |family| ingress.keys().all(|device| is_open(*device, family)) || !config.uses(family);
        let complete = agreed && unguarded.is_empty() && Family::ALL.into_iter().all(all_open);
        reasons.extend(unguarded);
        let open = Open { v4: agreed && open(Family::V4), v6: agreed && open(Family::V6) };
        let filters: BTreeMap<IfIndex, RpFilter> =
            ingress.iter().map(|(index, link)| (*index, sysctl::rp_filter(&link.name))).collect();
        let reverse_path = filters.values().any(|filter| filter.is_on());
        let mut hints = Vec::new();
        let mut unmatched = |family: Family| {
            if config.unmatched == Unmatched::Kernel || !open.family(family) {
                return false;
            }
            let why = match family {
                _ if !asks_main => "before Linux 6.3 programs cannot ask for a route of the main table alone",
                Family::V4 if reverse_path => "rp_filter looks at their way back",
                _ if main_decides(kernel, family) => return true,
                _ => "a rule of others comes before that of the main table, or one of its routes has several ways",
            };
            hints.push(format!("unmatched {family} packets are left to the kernel: {why}"));
            false
        };
        let unmatched = Open { v4: unmatched(Family::V4), v6: unmatched(Family::V6) };
        // A tunnel at which not all is certain is left out, which closes nothing for the ingress devices.
        let certain = |link: &&Link| {
            Family::ALL.into_iter().all(|family| is_open(link.index, family)) && !sysctl::rp_filter(&link.name).is_on()
        };
        let returning = tunnels.into_iter().filter(certain).map(|link| link.index).collect();
        let only_rule_sets = !probes.lists_hooks && !config.bypass_netfilter;
        Self { only_rule_sets, open, complete, closed_devices, filters, unmatched, returning, reasons, hints }
    }

    /// What the fast path's desired state depends on.
    pub(super) fn inputs<'a>(&'a self, xdp: &'a Chosen) -> FastInputs<'a> {
        FastInputs {
            open: self.open,
            closed: &self.closed_devices,
            reverse_path: self.filters_ways_back(),
            unmatched: self.unmatched,
            returning: &self.returning,
            xdp,
        }
    }

    /// Tunnels that packets come back by and are forwarded from by the programs.
    pub(super) const fn returning(&self) -> &BTreeSet<IfIndex> {
        &self.returning
    }

    /// What cannot be seen on this kernel.
    pub(super) fn unseen(&self) -> Option<String> {
        self.only_rule_sets
            .then(|| "netfilter: hooks of BPF programs and IPVS cannot be seen on this kernel".to_owned())
    }

    /// Hints for the operator about unmatched traffic.
    pub(super) fn hints(&self) -> &[String] {
        &self.hints
    }

    /// Does any ingress device check the way back of IPv4 packets?
    pub(super) fn filters_ways_back(&self) -> bool {
        self.filters.values().any(|filter| filter.is_on())
    }

    /// Sources of policies that rp_filter keeps from coming in, in words, with what to do about it.
    pub(super) fn kept_out(&self, config: &Config, kernel: &KernelState, sources: &Sources) -> Vec<String> {
        let all = kept_out(config, kernel, sources, &self.filters);
        all.iter().map(|kept| format!("{kept} ({})", kept.advice())).collect()
    }

    /// The families that the ingress program may decide.
    pub(super) const fn open(&self) -> Open {
        self.open
    }

    /// The programs may do all the work: on all ingress devices, for all families that policies speak of, and every uplink
    /// can be guarded.
    pub(super) const fn complete(&self) -> bool {
        self.complete
    }

    /// Says which gates have closed and opened since an earlier look.
    pub(super) fn log_since(&self, earlier: &Self) {
        for reason in self.reasons.iter().filter(|reason| !earlier.reasons.contains(reason)) {
            warn!("the kernel decides in place of the fast path: {}", reason.text);
        }
        for reason in earlier.reasons.iter().filter(|reason| !self.reasons.contains(reason)) {
            info!("no longer so: {}", reason.text);
        }
    }

    /// The closed gates in words, with what to do about each.
    pub(super) fn reasons(&self) -> impl Iterator<Item = &str> {
        self.reasons.iter().map(|reason| reason.text.as_str())
    }

    /// All gates by name, with the number of each that are closed, for this many disputed policies and parts of
    /// policies kept out.
    pub(super) fn by_name(&self, disputed: usize, kept_out: usize) -> BTreeMap<String, usize> {
        let names = Gate::NAMES.into_iter().chain([FOREIGN_ROUTES, UNGUARDED_UPLINK]);
        let closed = |name| self.reasons.iter().filter(|reason| reason.gate == name).count();
        let all = names.map(|name| (name, closed(name))).chain([(DISAGREEMENT, disputed), (REVERSE_PATH, kept_out)]);
        all.map(|(name, number)| (name.to_owned(), number)).collect()
    }
}
