//! Gates: where the fast path would decide otherwise than the kernel, it must not be attached.
//!
//! The redirect happens at TC ingress, so the packet meets none of what comes after it on its way through the kernel:
//! netfilter, the rule walk, xfrm, the VRF. [`gates()`] is pure; [`Probes::read`] asks the kernel.

pub mod owner;
mod probe;
mod reverse_path;
mod unguarded;

use std::{collections::BTreeMap, fmt};

pub use self::{
    probe::{Hook, HookPoint, Probes},
    reverse_path::{KeptOut, kept_out},
    unguarded::unguarded,
};
use crate::{
    config::Policy,
    policy::net::{Family, IfIndex, KernelState, Link, LinkLayer, ObservedRule},
};

/// A reason for which the fast path must leave an ingress device and family to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gate {
    /// The kernel does not forward what enters there; the fast path would.
    Forwarding {
        /// The family that is not forwarded.
        family: Family,
        /// The ingress device.
        device: String,
    },
    /// A foreign rule is asked before tunroute's and may decide otherwise.
    ForeignRule {
        /// The family whose rule list it stands in.
        family: Family,
        /// Its priority.
        priority: u32,
        /// In `ip rule` syntax.
        text: String,
    },
    /// Netfilter would have seen the packets, to filter, translate or mangle them.
    Netfilter {
        /// The family of the packets.
        family: Family,
        /// The hooks, by name.
        hooks: String,
    },
    /// The device belongs to a VRF, whose table is asked first.
    Vrf {
        /// The ingress device.
        device: String,
    },
    /// The device is a port of a bridge, bond or the like: what enters there is not yet the host's to route.
    Port {
        /// The ingress device.
        device: String,
        /// The device that it is a port of.
        master: String,
    },
    /// IPsec policies would have been applied.
    Xfrm,
    /// The device is neither Ethernet nor bare IP.
    UnsupportedLink {
        /// The ingress device.
        device: String,
    },
    /// Unknown.
    Unknown {
        /// What was to be found out.
        what: &'static str,
        /// Why it could not be.
        why: String,
    },
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forwarding { family, device } => write!(f, "the kernel does not forward {family} from {device}"),
            Self::ForeignRule { family, priority, text } => {
                write!(f, "an {family} rule ")?;
                if let Some(owner) = owner::owner(text, *priority) {
                    write!(f, "of {owner} ")?;
                }
                write!(f, "at priority {priority} is asked before the policies' rules: {text}")
            }
            Self::Netfilter { family, hooks } => write!(f, "netfilter looks at forwarded {family} packets: {hooks}"),
            Self::Vrf { device } => write!(f, "{device} belongs to a VRF"),
            Self::Port { device, master } => write!(f, "{device} is a port of {master}"),
            Self::Xfrm => f.write_str("IPsec policies (xfrm) apply to forwarded packets"),
            Self::UnsupportedLink { device } => write!(f, "{device} carries neither Ethernet nor bare IP packets"),
            Self::Unknown { what, why } => write!(f, "cannot tell whether there are {what}: {why}"),
        }
    }
}

impl Gate {
    /// All names.
    pub const NAMES: [&str; 8] =
        ["forwarding", "foreign-rule", "netfilter", "vrf", "port", "xfrm", "unsupported-link", "unknown"];

    /// The name in `status --json` and in metrics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        let [forwarding, foreign_rule, netfilter, vrf, port, xfrm, unsupported_link, unknown] = Self::NAMES;
        match self {
            Self::Forwarding { .. } => forwarding,
            Self::ForeignRule { .. } => foreign_rule,
            Self::Netfilter { .. } => netfilter,
            Self::Vrf { .. } => vrf,
            Self::Port { .. } => port,
            Self::Xfrm => xfrm,
            Self::UnsupportedLink { .. } => unsupported_link,
            Self::Unknown { .. } => unknown,
        }
    }

    /// What opens the gate: a command, or what to change in the configuration.
    #[must_use]
    pub fn advice(&self) -> String {
        const NO_FAST_PATH: &str = "or leave this device to the kernel: take it out of `ingress`";
        match self {
            Self::Forwarding { family: Family::V4, .. } => "sysctl -w net.ipv4.ip_forward=1".into(),
            Self::Forwarding { family: Family::V6, device } => format!(
                "sysctl -w net.ipv6.conf.all.forwarding=1, and see that net.ipv6.conf.{device}.disable_ipv6 is 0"
            ),
            Self::ForeignRule { family, priority, text } => {
                owner::advice(*family, *priority, text, Some("a `band` ahead of it"))
            }
            Self::Netfilter { .. } => {
                "if these may be skipped for policy traffic: `bypass-netfilter = true`; else the kernel carries on"
                    .into()
            }
            Self::Vrf { device } => format!("ip link set {device} nomaster; {NO_FAST_PATH}"),
            Self::Port { master, .. } => format!("name {master} in `ingress` instead"),
            Self::Xfrm => "ip xfrm policy shows them; without IPsec on this host: ip xfrm policy flush".into(),
            Self::UnsupportedLink { device } => format!("take {device} out of `ingress`"),
            Self::Unknown { .. } => "run tunroute with CAP_NET_ADMIN in this network namespace".into(),
        }
    }
}

/// What the gates depend on.
#[derive(Clone, Debug)]
pub struct GateInput<'a> {
    /// Devices and rules.
    pub state: &'a KernelState,
    /// What else the kernel was asked; for all of `ingress`.
    pub probes: &'a Probes,
    /// The devices to which the fast path would be attached; those that do not exist have no gates.
    pub ingress: &'a [IfIndex],
    /// The last priority of tunroute's own rules, but for a tree.
    pub last: u32,
    /// The policies: a rule that cannot match any of their packets closes nothing.
    pub policies: &'a [Policy],
    /// `bypass-netfilter`: netfilter closes no gate.
    pub bypass_netfilter: bool,
}

/// The closed gates, by ingress device and family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GateReport {
    closed: BTreeMap<(IfIndex, Family), Vec<Gate>>,
}

impl GateReport {
    /// The closed gates; none for a device that was not asked about.
    #[must_use]
    pub fn closed(&self, device: IfIndex, family: Family) -> &[Gate] {
        self.closed.get(&(device, family)).map_or(&[], Vec::as_slice)
    }

    /// Returns true if the fast path may be attached; false if the gates were not looked at.
    #[must_use]
    pub fn is_open(&self, device: IfIndex, family: Family) -> bool {
        self.closed.get(&(device, family)).is_some_and(Vec::is_empty)
    }
}

/// The closed gates of each ingress device and family.
#[must_use]
pub fn gates(input: &GateInput<'_>) -> GateReport {
    let mut report = GateReport::default();
    for link in input.ingress.iter().filter_map(|index| input.state.links.get(index)) {
        for family in Family::ALL {
            report.closed.insert((link.index, family), closed(input, link, family));
        }
    }
    report
}

fn closed(input: &GateInput<'_>, link: &Link, family: Family) -> Vec<Gate> {
    let GateInput { state, probes, .. } = input;
    let device = || link.name.clone();
    let mut closed = Vec::new();
    if link.layer == LinkLayer::Other {
        closed.push(Gate::UnsupportedLink { device: device() });
    }
    let master = link.master.map(|master| state.links.get(&master));
    match master {
        _ if link.kind.as_deref() == Some("vrf") => closed.push(Gate::Vrf { device: device() }),
        Some(Some(master)) if master.kind.as_deref() == Some("vrf") => closed.push(Gate::Vrf { device: device() }),
        Some(Some(master)) => closed.push(Gate::Port { device: device(), master: master.name.clone() }),
        // Known by number only: it went away while the devices were listed.
        Some(None) => closed.push(Gate::Port { device: device(), master: "another device".into() }),
        None => {}
    }
    if !probes.forwards(link.index, family) {
        closed.push(Gate::Forwarding { family, device: device() });
    }
    closed.extend(
        (state.rules.iter())
            .filter(|rule| comes_first(rule, family, &link.name, input.last) && concerns(rule, input.policies))
            .map(|rule| Gate::ForeignRule { family, priority: rule.priority, text: rule.text.clone() }),
    );
    match &probes.hooks {
        _ if input.bypass_netfilter => {}
        Ok(hooks) => {
            let met: Vec<_> =
                hooks.iter().filter(|hook| hook.meets(family, &link.name)).map(ToString::to_string).collect();
            if !met.is_empty() {
                closed.push(Gate::Netfilter { family, hooks: shortened(&met) });
            }
        }
        Err(why) => closed.push(Gate::Unknown { what: "netfilter hooks", why: why.clone() }),
    }
    match &probes.xfrm {
        Ok(false) => {}
        Ok(true) => closed.push(Gate::Xfrm),
        Err(why) => closed.push(Gate::Unknown { what: "IPsec policies", why: why.clone() }),
    }
    closed
}

/// Does the main table alone decide what no policy is about? Not where somebody else's rule is asked before the main
/// table's, or where one of its routes has several ways.
#[must_use]
pub fn main_decides(state: &KernelState, family: Family) -> bool {
    let mut others = state.rules.iter().filter(|rule| {
        // These decide nothing that is forwarded to others from devices that belong to no VRF.
        rule.family == family && !rule.ours && !rule.looks_up_local && !rule.l3mdev && rule.oif.is_none()
    });
    let mut routes = state.main.iter().filter(|route| Family::of(&route.dst) == family);
    others.next().is_some_and(|rule| rule.looks_up_main) && routes.all(|route| route.oif.is_some())
}

/// Returns true if this is a foreign rule that might match a packet from the device before tunroute's own rules do.
fn comes_first(rule: &ObservedRule, family: Family, device: &str, last: u32) -> bool {
    rule.family == family
        && !rule.ours
        && rule.priority <= last
        // Local destinations are not the fast path's.
        && !rule.looks_up_local
        // What enters by a VRF's port is a gate of its own.
        && !rule.l3mdev
        // Only the host's own packets have chosen a device before the rules are asked.
        && rule.oif.is_none()
        && rule.iif.as_ref().is_none_or(|iif| iif == device)
}

/// May the rule match a packet from a policy's sources? Marks and ports count as possible.
#[must_use]
pub fn concerns(rule: &ObservedRule, policies: &[Policy]) -> bool {
    let from = rule.foreign.as_ref().filter(|rule| !rule.inverted).and_then(|rule| rule.from);
    from.is_none_or(|from| policies.iter().any(|policy| policy.overlaps(&from)))
}

/// The first few names, and how many more.
fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests;
