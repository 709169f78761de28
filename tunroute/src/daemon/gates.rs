//! What stands between the fast path and its being allowed to decide.

use std::collections::BTreeSet;

use crate::{
    compile::matching,
    config::Config,
    fast::Open,
    kernel::sysctl::{self, RpFilter},
    net::{Family, IfIndex, KernelState},
};

/// The gates as last looked at.
#[derive(Debug, Default)]
pub(super) struct Gates {
    open: Open,
    closed_devices: BTreeSet<IfIndex>,
    reverse_path: bool,
    reasons: Vec<String>,
}

impl Gates {
    pub(super) fn update(&mut self, config: &Config, kernel: &KernelState) {
        *self = Self { open: Open { v4: true, v6: true }, ..Self::default() };
        for link in matching(&config.interfaces.ingress, kernel) {
            for family in Family::ALL {
                if !sysctl::forwards(family, &link.name) {
                    match family {
                        Family::V4 => self.open.v4 = false,
                        Family::V6 => self.open.v6 = false,
                    }
                    self.reasons.push(format!("{family} forwarding is off on {}", link.name));
                }
            }
            self.reverse_path |= sysctl::rp_filter(&link.name) != RpFilter::Off;
        }
    }

    /// The families that the ingress program may decide.
    pub(super) const fn open(&self) -> Open {
        self.open
    }

    /// As [`Self::open`], but families that no policy speaks of count as open.
    pub(super) fn open_in_use(&self, config: &Config) -> Open {
        let unused = |family| !config.policies.iter().any(|policy| policy.from.iter().any(|from| Family::of(from) == family));
        Open { v4: self.open.v4 || unused(Family::V4), v6: self.open.v6 || unused(Family::V6) }
    }

    pub(super) fn closed_devices(&self) -> BTreeSet<IfIndex> {
        self.closed_devices.clone()
    }

    pub(super) const fn reverse_path(&self) -> bool {
        self.reverse_path
    }

    pub(super) fn reasons(&self) -> Vec<String> {
        self.reasons.clone()
    }
}
