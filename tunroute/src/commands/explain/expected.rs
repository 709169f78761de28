//! The way that the configuration asks for: a pure function of the configuration, the observed devices and routes, and a
//! packet. Neither installed rules nor maps matter, so that what they do can be compared with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;
use tunroute_common::maps::Exempt;

use crate::{
    config::OnDown,
    kernel::{Question, Refused},
    policy::compile::{ChainId, Inputs, Sources, active_tunnel, decisions},
    policy::fast::Exemption,
    policy::net::{Band, Family, IfIndex, MainRoute},
};

/// What must become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It is for this host.
    Own,
    /// The policy's active tunnel carries it.
    Tunnel {
        /// The tunnel's device.
        device: IfIndex,
        /// The gateway; none where the destination is the next hop itself.
        gateway: Option<IpAddr>,
    },
    /// The policy refuses it, as no tunnel is up.
    Refused(Refused),
    /// No policy applies: the main table decides, or rules of others behind the policies.
    Main {
        /// A policy has the source, but not this destination.
        exempt: bool,
    },
    /// Not compared, for this reason: a sentence without its full stop.
    Unknown(&'static str),
}

/// What the main table says about a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MainWay {
    /// Its longest prefix leads to one of these devices.
    By(BTreeSet<IfIndex>),
    /// One of several ways, which the kernel chooses among.
    Several,
    /// It refuses the destination.
    Refuses,
    /// It has no route.
    NoRoute,
}

/// The longest prefix of the main table that holds a destination, and of its routes those with the least metric. It looks
/// at all routes.
#[must_use]
pub fn main_way(main: &[MainRoute], refuses: &BTreeSet<IpNet>, destination: IpAddr) -> MainWay {
    let longest =
        main.iter().filter(|route| route.dst.contains(&destination)).map(|route| route.dst.prefix_len()).max();
    let refused = around(destination).find(|prefix| refuses.contains(prefix)).map(|prefix| prefix.prefix_len());
    match (longest, refused) {
        (None, None) => MainWay::NoRoute,
        (longest, Some(refused)) if longest.is_none_or(|longest| longest <= refused) => MainWay::Refuses,
        (longest, _) => {
            let best = main.iter().filter(|route| route.dst.contains(&destination));
            let best = best.filter(|route| Some(route.dst.prefix_len()) == longest);
            let least = best.clone().map(|route| route.metric).min();
            let best = best.filter(|route| Some(route.metric) == least);
            best.map(|route| route.oif).collect::<Option<BTreeSet<IfIndex>>>().map_or(MainWay::Several, MainWay::By)
        }
    }
}

/// An address and the prefixes around it, the longest first.
fn around(address: IpAddr) -> impl Iterator<Item = IpNet> {
    std::iter::successors(Some(IpNet::from(address)), IpNet::supernet)
}

/// A policy whose prefix holds a packet's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Looked {
    /// Its index in the configuration.
    pub policy: usize,
    /// The exempt destination that holds the packet's.
    pub exempt: Option<IpNet>,
    /// It applies; otherwise it is exempt, or down with `on-down = "next"`.
    pub applies: bool,
}

/// A policy as [`Intent`] walks it.
#[derive(Clone, Debug)]
struct Step {
    policy: usize,
    exempt_set: u32,
    next: Option<ChainId>,
    /// What becomes of its packets; none if it leaves them to the policies around it.
    way: Option<Expected>,
}

/// Everything that [`Expected`] depends on, ready for many packets.
#[derive(Clone, Debug, Default)]
pub struct Intent {
    sources: Arc<Sources>,
    steps: BTreeMap<ChainId, Step>,
    exempt: BTreeSet<Exemption>,
    local: BTreeSet<IpNet>,
    /// See [`crate::policy::net::KernelState::main_refuses`].
    pub main_refuses: BTreeSet<IpNet>,
    /// The tables of policies and probes.
    tables: BTreeSet<u32>,
    /// The tables that rules of others ask before the policies' rules.
    asked_first: BTreeSet<(Family, u32)>,
    /// Rules of others, besides the kernel's own.
    foreign: BTreeSet<Family>,
}

impl Intent {
    /// From the same inputs that both datapaths are compiled from.
    #[must_use]
    pub fn new(inputs: &Inputs<'_>) -> Self {
        let Inputs { config, kernel, tables, failed, .. } = *inputs;
        let desired = decisions(inputs, inputs.fast.is_some_and(|fast| fast.reverse_path));
        let way = |policy: usize, family| {
            let policy = &config.policies[policy];
            let on_down = match policy.on_down {
                OnDown::Unreachable => Some(Expected::Refused(Refused::Unreachable)),
                OnDown::Blackhole => Some(Expected::Refused(Refused::Dropped)),
                OnDown::Prohibit => Some(Expected::Refused(Refused::Prohibit)),
                OnDown::Next => None,
            };
            match active_tunnel(policy, family, config, kernel, failed) {
                _ if policy.main => None,
                Some((tunnel, link)) => Some(Expected::Tunnel { device: link.index, gateway: tunnel.via(family) }),
                None => on_down,
            }
        };
        let steps = desired.slots.iter().map(|(id, slot)| {
            let way = way(slot.policy, slot.family);
            (*id, Step { policy: slot.policy, exempt_set: slot.exempt_set, next: slot.next, way })
        });
        let others = kernel.rules.iter().filter(|rule| {
            !rule.ours && !rule.looks_up_local && !rule.looks_up_main && !rule.l3mdev && rule.oif.is_none()
        });
        let first = others.clone().filter(|rule| rule.priority <= Band(config.band).last());
        Self {
            steps: steps.collect(),
            sources: desired.sources,
            exempt: desired.exempt,
            local: kernel.local.clone(),
            main_refuses: kernel.main_refuses.clone(),
            tables: tables.values().copied().collect(),
            asked_first: first.filter_map(|rule| Some((rule.family, rule.foreign.as_ref()?.table?))).collect(),
            foreign: others.map(|rule| rule.family).collect(),
        }
    }

    /// What must become of a packet, and the policies that were considered, up to the one that applies.
    #[must_use]
    pub fn expect(&self, packet: &Question) -> (Vec<Looked>, Expected) {
        let Question { source, destination, .. } = *packet;
        let mut considered = Vec::new();
        let mut next = around(source).find_map(|prefix| self.sources.chain_of(&prefix)).map(|chain| chain.id);
        let mut applies = None;
        while let Some(step) = next.and_then(|id| self.steps.get(&id)) {
            let set = step.exempt_set;
            let said = around(destination).find_map(|prefix| {
                let of_kind = |kind: &Exempt| self.exempt.contains(&Exemption { set, prefix, kind: *kind });
                Exempt::ALL.into_iter().find(of_kind).map(|kind| (prefix, kind))
            });
            let exempt = said.filter(|(_, kind)| *kind != Exempt::No).map(|(prefix, _)| prefix);
            applies = step.way.clone().filter(|_| exempt.is_none());
            considered.push(Looked { policy: step.policy, exempt, applies: applies.is_some() });
            if applies.is_some() {
                break;
            }
            next = step.next;
        }
        let expected = match self.not_compared(packet) {
            Some(why) => Expected::Unknown(why),
            None if self.is_own(destination) => Expected::Own,
            None => applies.unwrap_or(Expected::Main { exempt: !considered.is_empty() }),
        };
        (considered, expected)
    }

    /// Why a packet is the kernel's alone, whatever the configuration says.
    fn not_compared(&self, packet: &Question) -> Option<&'static str> {
        let Question { source, destination, iif } = *packet;
        match (iif, self.is_own(source)) {
            _ if is_special(source) || is_special(destination) => {
                Some("an address that is not routed: the kernel alone decides")
            }
            (Some(_), true) => Some("the source is this host's own: the kernel takes no such packet from outside"),
            (None, false) if source.is_ipv4() => Some("the kernel sends nothing from an address that is not its own"),
            _ => None,
        }
    }

    fn is_own(&self, address: IpAddr) -> bool {
        around(address).any(|prefix| self.local.contains(&prefix))
    }

    /// Is this the table of a policy, or of a tunnel's probes?
    #[must_use]
    pub fn is_ours(&self, table: u32) -> bool {
        self.tables.contains(&table)
    }

    /// Does a rule of others ask this table before the policies' rules?
    #[must_use]
    pub fn is_asked_first(&self, family: Family, table: u32) -> bool {
        self.asked_first.contains(&(family, table))
    }

    /// Are there rules of others?
    #[must_use]
    pub fn has_foreign_rules(&self, family: Family) -> bool {
        self.foreign.contains(&family)
    }
}

/// Not routed as others are: multicast, broadcast, loopback, link-local and unspecified addresses.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            address.is_multicast()
                || address.is_loopback()
                || address.octets()[0] == 0
                || address == Ipv4Addr::BROADCAST
        }
        IpAddr::V6(address) => {
            address.is_multicast()
                || address.is_loopback()
                || address.is_unspecified()
                || address.is_unicast_link_local()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        commands::explain::agreement::as_configured,
        config::Config,
        kernel::Answer,
        policy::compile::follow,
        policy::net::{Foreign, Handle, KernelState, Link, LinkLayer, ObservedRule, TABLE_LOCAL, TABLE_MAIN},
    };

    const CONFIG: &str = r#"
band = 20000
[interfaces]
ingress = ["lan0"]
uplink = ["net0"]
[tunnel.wg0]
[tunnel.wg1]
via = "10.9.0.1"
[[policy]]
name = "lan"
from = ["10.1.0.0/16"]
via = "wg0"
exempt = ["connected", "198.51.100.0/24", "203.0.113.0/24", "192.0.2.128/25"]
[[policy]]
name = "inner"
from = ["10.1.7.0/24"]
via = "wg1"
on-down = "next"
[[policy]]
name = "down"
from = ["10.2.0.0/24"]
via = "wg2"
on-down = "prohibit"
[tunnel.wg2]
"#;
    const LAN: IfIndex = 2;
    const NET: IfIndex = 3;
    const WG0: IfIndex = 4;
    const WG1: IfIndex = 5;

    fn host() -> KernelState {
        let link = |index, name: &str| (index, Link::new(index, name, LinkLayer::Ip));
        let main = |dst: &str, oif, on_link| MainRoute {
            dst: dst.parse().unwrap(),
            oif: Some(oif),
            on_link,
            ..MainRoute::default()
        };
        KernelState {
            links: [link(LAN, "lan0"), link(NET, "net0"), link(WG0, "wg0"), link(WG1, "wg1")].into(),
            local: ["10.1.0.1/32", "192.0.2.2/32", "127.0.0.0/8"].map(|own| own.parse().unwrap()).into(),
            main: vec![
                main("0.0.0.0/0", NET, false),
                main("10.1.0.0/24", LAN, true),
                main("198.51.100.0/24", LAN, false),
            ],
            main_refuses: ["203.0.113.0/24".parse().unwrap()].into(),
            ..KernelState::default()
        }
    }

    /// What is said of packets on a host, as `(source, destination, fate, agree)`.
    fn check(host: &KernelState, packets: &[(&str, &str, Answer, bool)]) {
        let mut config = Config::parse("t.toml", CONFIG).unwrap();
        follow(&mut config, host);
        let tables = [("lan", 1000), ("inner", 1001), ("down", 1002)].map(|(name, table)| (name.to_owned(), table));
        let (tables, failed) = (tables.into(), BTreeSet::new());
        let inputs = Inputs {
            config: &config,
            kernel: host,
            tables: &tables,
            failed: &failed,
            rules: true,
            fast: None,
            before: None,
        };
        let intent = Intent::new(&inputs);
        for (source, destination, fate, agree) in packets {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let (_, expected) = intent.expect(&Question { source, destination, iif: Some(LAN) });
            let main = || main_way(&host.main, &host.main_refuses, destination);
            let found = as_configured(&expected, *fate, (&intent, Family::V4), main);
            assert_eq!(found.agree, *agree, "{source} to {destination}, {fate:?}, {expected:?}: {}", found.because);
        }
    }

    fn by(device: IfIndex, gateway: Option<&str>, table: u32) -> Answer {
        Answer::Leaves { device, gateway: gateway.map(|gateway| gateway.parse().unwrap()), table }
    }

    #[test]
    fn every_way_is_compared_with_the_configuration() {
        let (local, refused) = (Answer::Local { table: TABLE_LOCAL }, Answer::Refused);
        let (far, client) = ("203.0.112.9", "10.1.0.9");
        check(
            &host(),
            &[
                (client, far, by(WG0, None, 1000), true),
                // The rule is missing; another device; a gateway that is not configured; refused.
                (client, far, by(NET, Some("192.0.2.1"), TABLE_MAIN), false),
                (client, far, by(WG1, None, 1000), false),
                (client, far, by(WG0, Some("10.8.0.1"), 1000), false),
                (client, far, refused(Refused::Unreachable), false),
                (client, far, local, false),
                // The inner policy has a gateway.
                ("10.1.7.9", far, by(WG1, Some("10.9.0.1"), 1001), true),
                ("10.1.7.9", far, by(WG1, None, 1001), false),
                ("10.1.7.9", far, by(WG0, None, 1000), false),
                // No tunnel is up.
                ("10.2.0.9", far, refused(Refused::Prohibit), true),
                ("10.2.0.9", far, refused(Refused::Unreachable), false),
                ("10.2.0.9", far, by(NET, None, TABLE_MAIN), false),
                // This host's own address, with the rule of the local table behind the policies' rules.
                (client, "192.0.2.2", local, true),
                (client, "192.0.2.2", by(WG0, None, 1000), false),
                // Exempt: on the link, behind an inside router, refused by the main table.
                (client, "10.1.0.8", by(LAN, None, TABLE_MAIN), true),
                (client, "198.51.100.9", by(LAN, Some("10.1.0.3"), TABLE_MAIN), true),
                (client, "198.51.100.9", by(WG0, None, 1000), false),
                (client, "198.51.100.9", refused(Refused::Unreachable), false),
                (client, "203.0.113.9", refused(Refused::Unreachable), true),
                (client, "192.0.2.200", by(NET, None, TABLE_MAIN), true),
                // Exempt from the outer policy, not from the inner one.
                ("10.1.7.9", "198.51.100.9", by(WG1, Some("10.9.0.1"), 1001), true),
                ("10.1.7.9", "198.51.100.9", by(LAN, None, TABLE_MAIN), false),
                // No policy's source.
                ("172.16.0.9", far, by(NET, None, TABLE_MAIN), true),
                ("172.16.0.9", far, by(WG0, None, 1000), false),
                ("172.16.0.9", far, refused(Refused::NoRoute), false),
                // Not routed, or not taken from outside.
                (client, "224.0.0.5", refused(Refused::Dropped), true),
                ("192.0.2.2", far, refused(Refused::Dropped), true),
            ],
        );
    }

    #[test]
    fn rules_of_others_decide_where_no_policy_has_the_source() {
        let rule = |priority| ObservedRule {
            handle: Handle(0),
            family: Family::V4,
            priority,
            ours: false,
            rule: None,
            looks_up_local: false,
            looks_up_main: false,
            l3mdev: false,
            iif: None,
            oif: None,
            foreign: Some(Box::new(Foreign { table: Some(52), ..Foreign::default() })),
            text: "from all lookup 52".to_owned(),
        };
        let (client, far, inside) = ("10.1.0.9", "203.0.112.9", "198.51.100.9");
        for (priority, agree) in [(5270, false), (30_000, true)] {
            let mut host = host();
            host.rules.push(rule(priority));
            check(
                &host,
                &[
                    (client, inside, by(NET, None, 52), agree),
                    // As by the main table.
                    (client, inside, by(LAN, None, 52), true),
                    (client, far, by(NET, None, 52), false),
                    ("172.16.0.9", far, by(NET, None, 52), true),
                    ("172.16.0.9", far, Answer::Refused(Refused::Unreachable), true),
                    ("172.16.0.9", far, by(WG0, None, 1000), false),
                ],
            );
        }
    }

    #[test]
    fn the_main_table_has_several_ways() {
        let mut host = host();
        let way = |host: &KernelState, destination: &str| {
            main_way(&host.main, &host.main_refuses, destination.parse().unwrap())
        };
        let route =
            |dst: &str, oif| MainRoute { dst: dst.parse().unwrap(), oif, on_link: false, ..MainRoute::default() };
        assert_eq!(way(&host, "8.8.8.8"), MainWay::By([NET].into()));
        assert_eq!(way(&host, "203.0.113.1"), MainWay::Refuses);
        host.main.push(route("203.0.113.0/25", Some(LAN)));
        assert_eq!(way(&host, "203.0.113.1"), MainWay::By([LAN].into()));
        host.main.push(route("0.0.0.0/0", Some(LAN)));
        assert_eq!(way(&host, "8.8.8.8"), MainWay::By([NET, LAN].into()));
        host.main.push(route("0.0.0.0/0", None));
        assert_eq!(way(&host, "8.8.8.8"), MainWay::Several);
        host.main.clear();
        assert_eq!(way(&host, "8.8.8.8"), MainWay::NoRoute);
    }
}
