//! The way that a packet is meant to take, from the configuration and the host alone.
//!
//! The fast path and the rules come from one compilation, so a fault of it makes both go the same wrong way. This says in
//! few lines what the documentation promises, and shares nothing with `compile`.

use std::{cmp::Reverse, net::IpAddr};

use ipnet::IpNet;
use tunroute::{
    config::{OnDown, Policy},
    policy::net::{Family, IfIndex, KernelState, MainRoute},
};
use tunroute_tests::rule_walk::{Decision, Host, Packet};

use super::scenario::{BAND, Scenario, TUNNELS, UPLINK};

/// Where a packet is meant to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As this says; the next hop aside.
    Goes(Decision),
    /// Nothing is promised.
    Any,
}

/// Facts about a host that do not depend on policies.
pub struct Intent<'a> {
    scenario: &'a Scenario,
    kernel: &'a KernelState,
    /// The rules before tunroute's own, and those behind them.
    around: [Host; 2],
}

impl<'a> Intent<'a> {
    /// For a host that is as the kernel says.
    pub fn new(scenario: &'a Scenario, kernel: &'a KernelState) -> Self {
        let others = scenario.others.iter().map(|rule| rule.entry.clone());
        let host = Host::new([], [], kernel).with_others(scenario.local_rule, others, scenario.others_routes(kernel));
        let (first, last) = BAND;
        Self { scenario, kernel, around: [host.among(..first), host.among(last + 1..)] }
    }

    /// The way of a packet that is forwarded.
    pub fn way(&self, packet: &Packet<'_>) -> Way {
        let [before, behind] = &self.around;
        match before.walk(packet).decision {
            Decision::NoRoute => {}
            decision => return Way::Goes(decision),
        }
        // Where a family has no policy, other people's rules may come before the local table.
        let family = Family::of_addr(&packet.source);
        let is_own = self.kernel.local.iter().any(|own| own.contains(&packet.destination));
        if is_own && self.scenario.config.uses(family) {
            return Way::Goes(Decision::Local);
        }
        for policy in self.policies(packet.source) {
            if policy.main {
                break;
            }
            match self.exempt(policy, packet.destination) {
                None => return Way::Any,
                Some(true) => continue,
                Some(false) => {}
            }
            if let Some(device) = policy.via.iter().find_map(|name| self.carries(name, family)) {
                return Way::Goes(Decision::Leaves { device: Some(device), gateway: None });
            }
            match policy.on_down {
                OnDown::Unreachable => return Way::Goes(Decision::Unreachable),
                OnDown::Prohibit => return Way::Goes(Decision::Prohibit),
                OnDown::Blackhole => return Way::Goes(Decision::Blackhole),
                OnDown::Next => {}
            }
        }
        Way::Goes(behind.walk(packet).decision)
    }

    /// The policies with a prefix that holds the address, that with the longest one first.
    fn policies(&self, source: IpAddr) -> impl Iterator<Item = &'a Policy> {
        let longest =
            |policy: &Policy| policy.from.iter().filter(|net| net.contains(&source)).map(IpNet::prefix_len).max();
        let mut policies: Vec<(u8, &Policy)> =
            self.scenario.config.policies.iter().filter_map(|policy| Some((longest(policy)?, policy))).collect();
        policies.sort_by_key(|(length, _)| Reverse(*length));
        policies.into_iter().map(|(_, policy)| policy)
    }

    /// The device of a tunnel that can carry a family now.
    fn carries(&self, name: &str, family: Family) -> Option<IfIndex> {
        let tunnel = self.scenario.tunnel(name)?;
        let answers = tunnel.answers[usize::from(family == Family::V6)];
        self.kernel.link(name).filter(|_| tunnel.up && answers && tunnel.has(family)).map(|link| link.index)
    }

    /// Does the policy leave this destination alone? None if nothing is promised: of a route that is longer than that of the
    /// network on the link around it, and of one that is short, but no half of everything.
    fn exempt(&self, policy: &Policy, destination: IpAddr) -> Option<bool> {
        if policy.exempt.iter().any(|net| net.contains(&destination)) {
            return Some(true);
        }
        let holding = || self.kernel.main.iter().filter(|route| route.dst.contains(&destination));
        let longest = holding().min_by_key(|route| (Reverse(route.dst.prefix_len()), route.metric));
        let Some(longest) = longest.filter(|_| policy.exempt_connected || policy.exempt_routed) else {
            return Some(false);
        };
        match longest.dst.prefix_len() {
            0 | 1 => return Some(false),
            2..8 => return None,
            _ => {}
        }
        let inside = self.leads_inside(longest);
        // What leads to an uplink from within a network inside is no exemption.
        let mut around = holding().filter(|route| inside || !self.leads_inside(route));
        if self.is_connected(policy, longest) || inside && policy.exempt_routed {
            Some(true)
        } else if around.any(|route| self.is_connected(policy, route)) {
            None
        } else {
            Some(false)
        }
    }

    /// Is none of the route's devices an uplink?
    fn leads_inside(&self, route: &MainRoute) -> bool {
        let uplink = self.kernel.link(UPLINK).map(|link| link.index);
        !route.oif.iter().chain(&route.hops).any(|device| Some(*device) == uplink)
    }

    /// Is that the network on a link where the policy leaves the neighbours alone?
    fn is_connected(&self, policy: &Policy, route: &MainRoute) -> bool {
        let device = route.oif.and_then(|index| self.kernel.links.get(&index)).map_or("", |link| link.name.as_str());
        policy.exempt_connected
            && (route.on_link && device.starts_with("lan")
                || route.network && (TUNNELS.contains(&device) || device == UPLINK && policy.allow_default))
    }
}
