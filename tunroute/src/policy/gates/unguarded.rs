//! Where packets of the policies could leave by the main table and no program would see them. Without rules
//! (`datapath = "ebpf"`), that must not be.

use std::net::Ipv6Addr;

use ipnet::{IpNet, Ipv6Net};

use crate::{
    config::{Config, DevicePattern},
    policy::net::{Family, KernelState, MainRoute},
};

/// The ways out that no program guards, in words, each with what to do about it.
#[must_use]
pub fn unguarded(config: &Config, kernel: &KernelState) -> Vec<String> {
    let uplinks = &config.interfaces.uplink;
    let mut reasons = Vec::new();
    if uplinks.is_empty() {
        reasons.push(
            "no device is an `uplink`, so no program guards the ways out (name those of the default routes)".into(),
        );
    }
    for DevicePattern(name) in uplinks {
        if name.ends_with('*') {
            reasons.push(format!(
                "a new device that matches the uplink \"{name}\" is not guarded at first (write the devices' whole names)"
            ));
        } else if kernel.link(name).is_none() {
            reasons.push(format!("the uplink {name} does not exist, and is not guarded at first when it appears"));
        }
    }
    let mut seen = Vec::new();
    for route in kernel.main.iter().filter(|route| config.uses(Family::of(&route.dst))) {
        let family = Family::of(&route.dst);
        let Some(link) = route.oif.and_then(|oif| kernel.links.get(&oif)) else {
            if route.covers_everything() {
                reasons.push(format!("the main table has {} by several next hops, which are not looked at", route.dst));
            }
            continue;
        };
        if seen.contains(&(link.index, family)) || uplinks.iter().any(|pattern| pattern.matches(&link.name)) {
            continue;
        }
        // What is on a tunnel's own link is no way out.
        let by_tunnel = || !route.on_link && config.tunnels.iter().any(|tunnel| tunnel.name == link.name);
        if route.covers_everything() || by_tunnel() {
            seen.push((link.index, family));
            reasons.push(format!(
                "the main table has {} by {}, which is no uplink and not guarded (remove the route, or write \
                 `datapath = \"both\"`)",
                route.dst, link.name
            ));
        }
    }
    reasons
}

impl MainRoute {
    /// A default route, or one of those that are written in its place so that it stays: 0.0.0.0/1 and 128.0.0.0/1; of
    /// IPv6's unicast addresses (RFC 4291: 2000::/3) ::/1, 2000::/3, or 2000::/4 and 3000::/4.
    #[must_use]
    pub fn covers_everything(&self) -> bool {
        const UNICAST: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3));
        let longest = match Family::of(&self.dst) {
            Family::V4 => 1,
            Family::V6 if UNICAST.contains(&self.dst) || self.dst.contains(&UNICAST) => 4,
            Family::V6 => 0,
        };
        self.dst.prefix_len() <= longest
    }
}
