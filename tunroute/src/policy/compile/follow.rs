//! The sources that are not literal prefixes: `from = ["@lan0"]` stands for the networks on the link at lan0, and for its
//! own addresses.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::{
    config::{Config, Follow, can_be_source},
    policy::devices::matching,
    policy::net::{IfIndex, KernelState},
};

/// A prefix that a policy finds on an interface.
#[derive(Clone, Copy)]
struct Found {
    device: IfIndex,
    /// The length of the range that it was asked for in; none without a range.
    range: Option<u8>,
}

/// Enters the prefixes of the interfaces that policies follow, as they are now, in [`followed`]. Returns which prefixes a
/// policy does not get, because another one has them, in words.
///
/// A prefix goes to the policy that has it literally, else to the one that asked for it in the longest range, else to the
/// first.
///
/// [`followed`]: crate::config::Policy::followed
pub fn follow(config: &mut Config, kernel: &KernelState) -> Vec<String> {
    if config.policies.iter().all(|policy| policy.follow.is_empty()) {
        return Vec::new();
    }
    let found: Vec<BTreeMap<IpNet, Found>> =
        config.policies.iter().map(|policy| on_interfaces(&policy.follow, kernel)).collect();
    let mut followers: BTreeMap<IpNet, (usize, Option<u8>)> = BTreeMap::new();
    for (index, found) in found.iter().enumerate() {
        for (prefix, Found { range, .. }) in found {
            let follower = followers.entry(*prefix).or_insert((index, *range));
            if follower.1 < *range {
                *follower = (index, *range);
            }
        }
    }
    let mut literal: BTreeMap<IpNet, usize> = BTreeMap::new();
    for (index, policy) in config.policies.iter().enumerate() {
        literal
            .extend(policy.from.iter().filter(|prefix| followers.contains_key(prefix)).map(|prefix| (*prefix, index)));
    }
    let mut problems = Vec::new();
    for (index, found) in found.iter().enumerate() {
        let mut followed = Vec::new();
        for (prefix, Found { device, range }) in found {
            let owner = match (literal.get(prefix), followers.get(prefix)) {
                // Its own, literally.
                (Some(owner), _) if *owner == index => continue,
                (Some(owner), _) => *owner,
                (None, Some((owner, _))) if *owner == index => {
                    followed.push(*prefix);
                    continue;
                }
                (None, Some((owner, longest))) if longest == range => *owner,
                // A longer range is more particular, as a longer prefix is.
                _ => continue,
            };
            problems.push(format!(
                "policy \"{}\" does not get {prefix} of {}: policy \"{}\" has it; name it in one of them only, or follow \
                 other interfaces",
                config.policies[index].name,
                kernel.links.get(device).map_or("a device that is gone", |link| &link.name),
                config.policies[owner].name,
            ));
        }
        config.policies[index].followed = followed;
    }
    problems
}

/// The prefixes that packets can come from at the interfaces that a policy follows.
fn on_interfaces(follow: &[Follow], kernel: &KernelState) -> BTreeMap<IpNet, Found> {
    let mut all: BTreeMap<IpNet, Found> = BTreeMap::new();
    for Follow { devices, within } in follow {
        let devices: BTreeSet<IfIndex> =
            matching(std::slice::from_ref(devices), kernel).map(|link| link.index).collect();
        let addresses = || kernel.addresses.iter().filter(|address| devices.contains(&address.device));
        let peers: BTreeSet<IpNet> = addresses().filter_map(|address| address.peer).map(IpNet::from).collect();
        let wanted = |prefix: &IpNet| {
            can_be_source(prefix) && within.is_none_or(|within| within.contains(prefix)) && !peers.contains(prefix)
        };
        let on_link = kernel.main.iter().filter(|route| route.on_link && wanted(&route.dst));
        let mut found: BTreeMap<IpNet, IfIndex> =
            on_link.filter_map(|route| Some((route.dst, route.oif.filter(|oif| devices.contains(oif))?))).collect();
        // Most of a device's own addresses are in one of its networks.
        let own = addresses().map(|address| (IpNet::from(address.own), address.device));
        let alone: Vec<(IpNet, IfIndex)> =
            own.filter(|(own, _)| wanted(own) && !found.keys().any(|network| network.contains(own))).collect();
        found.extend(alone);
        let range = within.map(|within| within.prefix_len());
        for (prefix, device) in found {
            let known = all.entry(prefix).or_insert(Found { device, range });
            known.range = known.range.max(range);
        }
    }
    all
}
