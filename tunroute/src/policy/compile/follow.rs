//! The sources that are no literal prefixes: `from = ["@lan0"]` stands for what is on the link at lan0.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use ipnet::IpNet;

use super::matching;
use crate::{
    config::{Config, DevicePattern, can_be_source},
    policy::net::{IfIndex, KernelState, MainRoute},
};

/// Enters the prefixes of the interfaces that policies follow, as they are now, in [`followed`]. Returns which prefixes a
/// policy does not get, because another one has them, in words.
///
/// [`followed`]: crate::config::Policy::followed
pub fn follow(config: &mut Config, kernel: &KernelState) -> Vec<String> {
    if config.policies.iter().all(|policy| policy.follow.is_empty()) {
        return Vec::new();
    }
    let found: Vec<BTreeMap<IpNet, IfIndex>> =
        config.policies.iter().map(|policy| on_link(&policy.follow, kernel)).collect();
    // Whoever has it literally comes before all who follow; of those, the first.
    let wanted: BTreeSet<IpNet> = found.iter().flat_map(BTreeMap::keys).copied().collect();
    let mut owners: BTreeMap<IpNet, usize> = BTreeMap::new();
    for (index, policy) in config.policies.iter().enumerate() {
        owners.extend(policy.from.iter().filter(|prefix| wanted.contains(prefix)).map(|prefix| (*prefix, index)));
    }
    let mut problems = Vec::new();
    for (index, found) in found.iter().enumerate() {
        let mut followed = Vec::new();
        for (prefix, device) in found {
            match owners.entry(*prefix) {
                Entry::Vacant(free) => {
                    free.insert(index);
                    followed.push(*prefix);
                }
                // Its own, literally.
                Entry::Occupied(owner) if *owner.get() == index => {}
                Entry::Occupied(owner) => problems.push(format!(
                    "policy \"{}\" does not get {prefix} of {}: policy \"{}\" has it; name it in one of them only, or \
                     follow other interfaces",
                    config.policies[index].name,
                    kernel.links.get(device).map_or("a device that is gone", |link| &link.name),
                    config.policies[*owner.get()].name,
                )),
            }
        }
        config.policies[index].followed = followed;
    }
    problems
}

/// The prefixes on the link at the devices that packets can come from, each with one of the devices.
fn on_link(patterns: &[DevicePattern], kernel: &KernelState) -> BTreeMap<IpNet, IfIndex> {
    let devices: BTreeSet<IfIndex> = matching(patterns, kernel).map(|link| link.index).collect();
    let prefix = |route: &MainRoute| {
        let device = route.oif.filter(|oif| route.on_link && devices.contains(oif))?;
        can_be_source(&route.dst).then_some((route.dst, device))
    };
    kernel.main.iter().filter_map(prefix).collect()
}
