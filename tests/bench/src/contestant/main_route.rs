//! No policy: what forwarding costs the kernel alone.

use anyhow::Result;

use super::{Contestant, Delivery, InTheKernel, Installed, Task, rules::version};
use crate::{load::Pattern, site::Site};

/// One route for all packets in the main table, and not one rule.
pub struct MainRoute {
    name: &'static str,
    about: &'static str,
}

/// The baseline.
pub const BASELINE: MainRoute = MainRoute {
    name: super::BASELINE,
    about: "one route and no policy: what forwarding costs a kernel in which no rule was ever added",
};
/// The same in another place.
pub const AGAIN: MainRoute =
    MainRoute { name: super::NULL, about: "the baseline once more, in a place of its own: its ratio has to be 1" };

impl Contestant for MainRoute {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn delivery(&self) -> Delivery {
        Delivery::Anywhere
    }

    fn routes_by_kernel(&self) -> bool {
        true
    }

    fn install(&self, site: &Site, task: &Task) -> Result<Box<dyn Installed>> {
        // Unmatched packets leave by the uplink in every contestant.
        if task.pattern != Pattern::Unmatched {
            let family = task.prefixes.family;
            site.host.ip(&format!("{} route replace default {}", version(family), site.towards(family, 0)))?;
        }
        Ok(Box::new(InTheKernel))
    }
}
