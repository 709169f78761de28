//! A model of how Linux decides where a packet goes, written from what ip-rule(8), ip-route(8) and `fib_rules_lookup()` in
//! `net/core/fib_rules.c` say: rules by priority, the first that matches and leads somewhere.
//!
//! It knows nothing of tunroute's policies: it is told rules and routes, compiled or observed, and walks them. What it
//! makes of them is compared with the fast path on the one hand and with the real kernel on the other.

use std::{collections::BTreeMap, net::IpAddr, ops::RangeBounds};

use ipnet::IpNet;
use tunroute::policy::net::{
    Family, IfIndex, KernelState, Route, RouteKind, Rule, RuleAction, TABLE_LOCAL, TABLE_MAIN,
};

/// The priorities of the kernel's own rules that ask the local and the main table.
const KERNEL_RULES: [(u32, u32); 2] = [(0, TABLE_LOCAL), (32766, TABLE_MAIN)];

/// A packet, as far as rules and routes look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes to.
    pub destination: IpAddr,
    /// The device that it has entered by; none if it is the host's own.
    pub iif: Option<&'a str>,
    /// The device that its socket is bound to; none if it is forwarded.
    pub oif: Option<&'a str>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Lower numbers are asked first.
    pub priority: u32,
    /// The source must be in here.
    pub from: IpNet,
    /// The destination must be in here.
    pub to: Option<IpNet>,
    /// Matches what the selectors do not match.
    pub not: bool,
    /// The packet must have entered by this device.
    pub iif: Option<String>,
    /// The socket must be bound to this device.
    pub oif: Option<String>,
    /// The packet must carry a mark (`fwmark`), which none does here.
    pub marked: bool,
    /// A route with a prefix of this length or shorter is passed over (`suppress_prefixlength`).
    pub suppress: Option<u8>,
    /// What is done then.
    pub action: Action,
}

/// What a rule does with a packet that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// What tunroute's rules do, among others.
    Rule(RuleAction),
    /// Refuses the packet: `unreachable`, `prohibit` or `blackhole`.
    Refuse(Decision),
}

impl From<&Rule> for Entry {
    fn from(rule: &Rule) -> Self {
        let Rule { priority, from, not, oif, action } = rule.clone();
        Self { not, oif, ..Self::new(priority, from, Action::Rule(action)) }
    }
}

impl Entry {
    /// A rule that looks at the source alone.
    #[must_use]
    pub const fn new(priority: u32, from: IpNet, action: Action) -> Self {
        Self { priority, from, to: None, not: false, iif: None, oif: None, marked: false, suppress: None, action }
    }

    /// Does the rule match a packet?
    #[must_use]
    pub fn matches(&self, packet: &Packet<'_>) -> bool {
        let selected = self.from.contains(&packet.source)
            && self.to.is_none_or(|to| to.contains(&packet.destination))
            && self.iif.as_deref().is_none_or(|iif| packet.iif == Some(iif))
            && self.oif.as_deref().is_none_or(|oif| packet.oif == Some(oif))
            && !self.marked;
        Family::of(&self.from) == Family::of_addr(&packet.source) && selected != self.not
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// For this host, or for all on a link.
    Local,
    /// Leaves.
    Leaves {
        /// By this device; none if the route has several.
        device: Option<IfIndex>,
        /// To this neighbour; none where the destination is the neighbour, or in the main table, whose gateways are not
        /// known here.
        gateway: Option<IpAddr>,
    },
    /// Answered with an error.
    Unreachable,
    /// Answered with an error.
    Prohibit,
    /// Dropped.
    Blackhole,
    /// No rule leads anywhere.
    NoRoute,
}

/// The outcome of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What becomes of the packet.
    pub decision: Decision,
    /// The table that said so; none if none did.
    pub table: Option<u32>,
}

/// A route, as far as it decides. `None` is `throw`: this table has no route for it.
type Hop = (IpNet, u32, Option<Decision>);

/// The rules and tables of a host.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// In the order in which they are asked.
    rules: Vec<Entry>,
    tables: BTreeMap<u32, Vec<Hop>>,
}

impl Host {
    /// The rules and routes given, beside the kernel's own rules and what is observed of the local and the main table.
    #[must_use]
    pub fn new<'a>(
        rules: impl IntoIterator<Item = Entry>,
        routes: impl IntoIterator<Item = &'a Route>,
        kernel: &KernelState,
    ) -> Self {
        let mut host = Self { rules: rules.into_iter().collect(), ..Self::default() };
        for ((priority, table), family) in KERNEL_RULES.into_iter().flat_map(|rule| Family::ALL.map(|f| (rule, f))) {
            host.rules.push(Entry::new(priority, family.default_prefix(), Action::Rule(RuleAction::Lookup(table))));
        }
        // Of the same priority, the one made first is asked first.
        host.rules.sort_by_key(|rule| rule.priority);
        for Route { table, dst, metric, kind } in routes {
            let decision = match kind {
                RouteKind::Unicast { oif, gateway, .. } => {
                    Some(Decision::Leaves { device: Some(*oif), gateway: *gateway })
                }
                RouteKind::Throw => None,
                RouteKind::Unreachable => Some(Decision::Unreachable),
                RouteKind::Blackhole => Some(Decision::Blackhole),
                RouteKind::Prohibit => Some(Decision::Prohibit),
            };
            host.tables.entry(*table).or_default().push((*dst, *metric, decision));
        }
        let local = kernel.local.iter().map(|dst| (*dst, 0, Some(Decision::Local)));
        host.tables.entry(TABLE_LOCAL).or_default().extend(local);
        let leaves = |oif| Some(Decision::Leaves { device: oif, gateway: None });
        let main = kernel.main.iter().map(|route| (route.dst, route.metric, leaves(route.oif)));
        host.tables.entry(TABLE_MAIN).or_default().extend(main);
        host
    }

    /// The same host with other people's rules and routes, and with the rule of the local table at this priority.
    #[must_use]
    pub fn with_others(
        mut self,
        local_rule: u32,
        rules: impl IntoIterator<Item = Entry>,
        routes: impl IntoIterator<Item = (u32, IpNet, Decision)>,
    ) -> Self {
        let is_local = |rule: &&mut Entry| rule.action == Action::Rule(RuleAction::Lookup(TABLE_LOCAL));
        for rule in self.rules.iter_mut().filter(|rule| rule.priority == 0).filter(is_local) {
            rule.priority = local_rule;
        }
        self.rules.extend(rules);
        self.rules.sort_by_key(|rule| rule.priority);
        for (table, dst, decision) in routes {
            self.tables.entry(table).or_default().push((dst, 0, Some(decision)));
        }
        self
    }

    /// The same host with the rules of these priorities alone.
    #[must_use]
    pub fn among(&self, priorities: impl RangeBounds<u32>) -> Self {
        let mut host = self.clone();
        host.rules.retain(|rule| priorities.contains(&rule.priority));
        host
    }

    /// Walks the rules.
    #[must_use]
    pub fn walk(&self, packet: &Packet<'_>) -> Outcome {
        self.walk_counting(packet).0
    }

    /// Walks the rules, and counts those that are asked.
    #[must_use]
    pub fn walk_counting(&self, packet: &Packet<'_>) -> (Outcome, usize) {
        let (mut at, mut asked) = (0, 0);
        while let Some(rule) = self.rules.get(at) {
            at += 1;
            asked += usize::from(Family::of(&rule.from) == Family::of_addr(&packet.source));
            if !rule.matches(packet) {
                continue;
            }
            match rule.action {
                // One that leads nowhere is passed over (`fib_rules_lookup()`: `ctarget` is not set).
                Action::Rule(RuleAction::Nop) => {}
                Action::Refuse(decision) => return (Outcome { decision, table: None }, asked),
                Action::Rule(RuleAction::Goto(priority) | RuleAction::Leave(priority)) => {
                    let family = Family::of(&rule.from);
                    let is_target = |target: &Entry| target.priority == priority && Family::of(&target.from) == family;
                    at = self.rules.iter().position(is_target).unwrap_or(at).max(at);
                }
                Action::Rule(RuleAction::Lookup(table)) => {
                    if let Some((length, decision)) = self.look_up(table, packet.destination)
                        && rule.suppress.is_none_or(|suppressed| length > suppressed)
                    {
                        return (Outcome { decision, table: Some(table) }, asked);
                    }
                }
            }
        }
        (Outcome { decision: Decision::NoRoute, table: None }, asked)
    }

    /// A table's answer, with the length of its prefix: of the longest prefixes the one with the lowest metric. None if there
    /// is none, or a `throw`.
    fn look_up(&self, table: u32, destination: IpAddr) -> Option<(u8, Decision)> {
        let holding = self.tables.get(&table)?.iter().filter(|(dst, ..)| dst.contains(&destination));
        let (dst, _, decision) = holding.min_by_key(|(dst, metric, _)| (u8::MAX - dst.prefix_len(), *metric))?;
        decision.map(|decision| (dst.prefix_len(), decision))
    }

    /// Is an IPv4 packet's source believed when it enters by one device, to leave by another (`__fib_validate_source()` in
    /// `net/ipv4/fib_frontend.c`)? That other one is the `iif` of the lookup (`__mkroute_input()` in `net/ipv4/route.c`).
    /// `strict` is rp_filter 1; otherwise it is 0. None if the way back has several devices, which are not known here.
    #[must_use]
    pub fn believes(
        &self,
        source: IpAddr,
        destination: IpAddr,
        iif: IfIndex,
        out: Option<&str>,
        strict: bool,
    ) -> Option<bool> {
        let back = Packet { source: destination, destination: source, iif: out, oif: None };
        match self.walk(&back).decision {
            Decision::Leaves { device, .. } if strict => device.map(|device| device == iif),
            Decision::Leaves { .. } => Some(true),
            Decision::Local => Some(false),
            Decision::Unreachable | Decision::Prohibit | Decision::Blackhole | Decision::NoRoute => Some(!strict),
        }
    }
}

#[cfg(test)]
mod tests {
    use tunroute::policy::net::MainRoute;

    use super::*;

    const TUNNEL: IfIndex = 7;

    fn prefix(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    fn route(table: u32, dst: &str, metric: u32, kind: RouteKind) -> Route {
        Route { table, dst: prefix(dst), metric, kind }
    }

    fn leaves(device: IfIndex) -> Decision {
        Decision::Leaves { device: Some(device), gateway: None }
    }

    /// Each way in which a walk goes on or ends. The tables: 1 has the tunnel, 2 throws 192.0.2/24, 3 rejects, 4 is empty.
    #[test]
    fn rules_are_walked_as_documented() {
        let unicast = || RouteKind::Unicast { oif: TUNNEL, device: "tunnel".into(), gateway: None };
        let routes = [
            route(1, "0.0.0.0/0", u32::MAX, RouteKind::Unreachable),
            route(1, "0.0.0.0/0", 0, unicast()),
            route(1, "198.51.100.0/24", 0, RouteKind::Blackhole),
            route(2, "0.0.0.0/0", 0, RouteKind::Blackhole),
            route(2, "192.0.2.0/24", 0, RouteKind::Throw),
            route(3, "0.0.0.0/0", 0, RouteKind::Prohibit),
        ];
        let kernel = KernelState {
            local: [prefix("192.0.2.1/32")].into(),
            main: vec![MainRoute { dst: prefix("192.0.2.0/24"), oif: Some(2), on_link: true, ..MainRoute::default() }],
            ..KernelState::default()
        };
        let lookup = |priority, from, table| Entry::from(&Rule::new(priority, prefix(from), RuleAction::Lookup(table)));
        let goto = |priority, from, to| Entry::new(priority, prefix(from), Action::Rule(RuleAction::Goto(to)));
        let elsewhere = |priority, from, to| Entry { not: true, ..goto(priority, from, to) };
        let nop = |priority| Entry::new(priority, prefix("0.0.0.0/0"), Action::Rule(RuleAction::Nop));
        let bound = |priority, table| Entry { oif: Some("tunnel".into()), ..lookup(priority, "0.0.0.0/0", table) };
        let check = |rules: Vec<Entry>, destination: &str, expected: Decision, table: Option<u32>| {
            let host = Host::new(rules.clone(), &routes, &kernel);
            let (source, destination) = (prefix("10.0.0.5/32").addr(), destination.parse().expect("an address"));
            let outcome = host.walk(&Packet { source, destination, iif: Some("lan"), oif: None });
            assert_eq!(outcome, Outcome { decision: expected, table }, "to {destination} by {rules:?}");
        };
        let local = (Decision::Local, Some(TABLE_LOCAL));
        let main = (leaves(2), Some(TABLE_MAIN));
        let none = (Decision::NoRoute, None);
        for (rules, destination, (decision, table)) in [
            (vec![], "192.0.2.1", local),
            (vec![], "192.0.2.9", main),
            (vec![], "203.0.113.1", none),
            // The local table comes first; the lowest metric wins; the longest prefix before that.
            (vec![lookup(100, "10.0.0.0/8", 1)], "192.0.2.1", local),
            (vec![lookup(100, "10.0.0.0/8", 1)], "203.0.113.1", (leaves(TUNNEL), Some(1))),
            (vec![lookup(100, "10.0.0.0/8", 1)], "198.51.100.7", (Decision::Blackhole, Some(1))),
            // Sources of others, sockets bound to a device, and tables without a route are passed over.
            (vec![lookup(100, "10.0.1.0/24", 1)], "192.0.2.9", main),
            (vec![bound(100, 1)], "192.0.2.9", main),
            (
                vec![lookup(100, "0.0.0.0/0", 4), lookup(101, "10.0.0.5/32", 3)],
                "192.0.2.9",
                (Decision::Prohibit, Some(3)),
            ),
            // `throw` ends the table, not the walk.
            (vec![lookup(100, "0.0.0.0/0", 2)], "192.0.2.9", main),
            (vec![lookup(100, "0.0.0.0/0", 2)], "203.0.113.1", (Decision::Blackhole, Some(2))),
            (vec![lookup(100, "0.0.0.0/0", 2), lookup(101, "0.0.0.0/0", 1)], "192.0.2.9", (leaves(TUNNEL), Some(1))),
            // Order is by priority, not by mention.
            (vec![lookup(101, "0.0.0.0/0", 3), lookup(100, "0.0.0.0/0", 1)], "203.0.113.1", (leaves(TUNNEL), Some(1))),
            // `goto` skips the rules between; one without a target is skipped itself.
            (
                vec![goto(100, "10.0.0.0/8", 102), lookup(101, "0.0.0.0/0", 3), lookup(102, "0.0.0.0/0", 1)],
                "203.0.113.1",
                (leaves(TUNNEL), Some(1)),
            ),
            (
                vec![goto(100, "11.0.0.0/8", 102), lookup(101, "0.0.0.0/0", 3), lookup(102, "0.0.0.0/0", 1)],
                "203.0.113.1",
                (Decision::Prohibit, Some(3)),
            ),
            (
                vec![goto(100, "10.0.0.0/8", 103), lookup(101, "0.0.0.0/0", 3)],
                "203.0.113.1",
                (Decision::Prohibit, Some(3)),
            ),
            (vec![goto(100, "10.0.0.0/8", 32766), lookup(101, "0.0.0.0/0", 3)], "192.0.2.9", main),
            // `not` turns the source around; `nop` does nothing.
            (vec![elsewhere(100, "11.0.0.0/8", 32766), lookup(101, "0.0.0.0/0", 3)], "192.0.2.9", main),
            (
                vec![elsewhere(100, "10.0.0.0/8", 32766), nop(101), lookup(102, "0.0.0.0/0", 3)],
                "192.0.2.9",
                (Decision::Prohibit, Some(3)),
            ),
            // Selectors of others: destination, device, mark; a refusal; routes that are too short.
            (vec![Entry { to: Some(prefix("192.0.2.0/24")), ..lookup(100, "0.0.0.0/0", 3) }], "203.0.113.1", none),
            (
                vec![Entry { to: Some(prefix("192.0.2.0/24")), ..lookup(100, "0.0.0.0/0", 3) }],
                "192.0.2.9",
                (Decision::Prohibit, Some(3)),
            ),
            (vec![Entry { iif: Some("wan".into()), ..lookup(100, "0.0.0.0/0", 3) }], "192.0.2.9", main),
            (
                vec![Entry { iif: Some("lan".into()), ..lookup(100, "0.0.0.0/0", 3) }],
                "192.0.2.9",
                (Decision::Prohibit, Some(3)),
            ),
            (vec![Entry { marked: true, ..lookup(100, "0.0.0.0/0", 3) }], "192.0.2.9", main),
            (
                vec![Entry { marked: true, not: true, ..lookup(100, "0.0.0.0/0", 3) }],
                "192.0.2.9",
                (Decision::Prohibit, Some(3)),
            ),
            (
                vec![Entry::new(100, prefix("10.0.0.0/8"), Action::Refuse(Decision::Blackhole))],
                "192.0.2.9",
                (Decision::Blackhole, None),
            ),
            (vec![Entry { suppress: Some(0), ..lookup(100, "0.0.0.0/0", 1) }], "192.0.2.9", main),
            (
                vec![Entry { suppress: Some(0), ..lookup(100, "0.0.0.0/0", 1) }],
                "198.51.100.7",
                (Decision::Blackhole, Some(1)),
            ),
        ] {
            check(rules, destination, decision, table);
        }
        let late = Host::new([lookup(100, "0.0.0.0/0", 3)], &routes, &kernel).with_others(200, [], []);
        let (source, destination) = (prefix("10.0.0.5/32").addr(), prefix("192.0.2.1/32").addr());
        let outcome = late.walk(&Packet { source, destination, iif: None, oif: None });
        assert_eq!(outcome.decision, Decision::Prohibit, "the local table's rule comes after");
    }
}
