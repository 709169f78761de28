//! What the reverse path filter (rp_filter) keeps from coming in. It closes nothing: the fast path leaves to the kernel what
//! does not come by its way back, and the kernel drops it, whoever would have decided afterwards.

use std::{collections::BTreeMap, fmt};

use crate::{
    commands::doctor::Setting,
    config::Config,
    kernel::sysctl::RpFilter,
    policy::compile::{
        Sources,
        sources::{Several, WayBack},
    },
    policy::devices::matching,
    policy::net::{IfIndex, KernelState, Link},
};

/// Sources of a policy that no packet can come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptOut {
    policy: String,
    from: Several,
    /// The ingress devices that drop.
    by: Vec<String>,
    /// The uplink that is the way back; none if there is no way back.
    back: Option<String>,
}

impl fmt::Display for KeptOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, from: Several { first, others }, by, back } = self;
        write!(f, "policy \"{policy}\": rp_filter of {} drops what comes from {first}", by.join(", "))?;
        match others {
            0 => {}
            1 => f.write_str(" and another prefix")?,
            _ => write!(f, " and {others} other prefixes")?,
        }
        match back {
            Some(uplink) => write!(f, ": the main table's way back is {uplink}"),
            None => f.write_str(": the main table has no way back"),
        }
    }
}

impl KeptOut {
    /// What lets it in.
    #[must_use]
    pub fn advice(&self) -> String {
        let route = format!("a route back by {}", self.by.join(" or "));
        if self.back.is_none() {
            return format!("make {route}");
        }
        let loose = |device| Setting { path: format!("ipv4/conf/{device}/rp_filter"), value: 2 }.to_string();
        format!("sysctl -w {}; or make {route}", self.by.iter().map(loose).collect::<Vec<_>>().join(" "))
    }
}

/// All of them, if the ingress devices are filtered so. Only what has its way back by an uplink, or none: what has it by a
/// device that is no ingress device comes by that, and nobody expects it at another.
#[must_use]
pub fn kept_out(
    config: &Config,
    kernel: &KernelState,
    sources: &Sources,
    filters: &BTreeMap<IfIndex, RpFilter>,
) -> Vec<KeptOut> {
    let named = |link: &Link| link.name.clone();
    let uplink =
        |index: IfIndex| matching(&config.interfaces.uplink, kernel).find(|link| link.index == index).map(named);
    let of = |(WayBack { policy, device }, from): (&WayBack, &Several)| {
        let back = device.map(uplink);
        if matches!(back, Some(None)) || device.is_some_and(|device| filters.contains_key(&device)) {
            return None;
        }
        let drops = |filter: RpFilter| filter == RpFilter::Strict || (device.is_none() && filter.is_on());
        let dropping = filters.iter().filter(|(_, filter)| drops(**filter));
        let by: Vec<String> = dropping.filter_map(|(index, _)| kernel.links.get(index)).map(named).collect();
        let policy = config.policies.get(*policy)?.name.clone();
        (!by.is_empty()).then(|| KeptOut { policy, from: *from, by, back: back.flatten() })
    };
    sources.ways_back().iter().filter_map(of).collect()
}
