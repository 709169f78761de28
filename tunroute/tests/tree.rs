//! The rules as a tree decide as the list does: whole, in parts, and in the midst of any change.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

/// Of the integration tests, whose crate depends on this one.
#[path = "../../tests/src/rule_walk.rs"]
#[allow(dead_code, unreachable_pub, reason = "not all of it is needed here")]
mod rule_walk;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use proptest::{collection::btree_map, prelude::*, sample::select};
use rule_walk::{Host, Outcome, Packet};
use tunroute::{
    config::Config,
    policy::compile::{Desired, Inputs, compile},
    policy::net::{Family, Handle, KernelOp, KernelState, Link, LinkLayer, ObservedRoute, ObservedRule, Route, Rule},
    policy::plan::{Op, Undone, plan},
};

/// What leads on, and what does not: two policies whose tunnels are up, one that is passed over as a whole, one for a
/// part of the destinations, and one that leaves its sources to the main table.
const POLICIES: &str = r#"
    [interfaces]
    uplink = ["net0"]
    [tunnel.tun0]
    [tunnel.tun1]
    [tunnel.none0]
    [[policy]]
    name = "first"
    from = ["192.0.2.1"]
    via = "tun0"
    [[policy]]
    name = "second"
    from = ["192.0.2.2"]
    via = "tun1"
    [[policy]]
    name = "passed-over"
    from = ["192.0.2.3"]
    via = "none0"
    on-down = "next"
    [[policy]]
    name = "in-part"
    from = ["192.0.2.4"]
    via = "tun0"
    exempt = ["198.51.100.0/24", "2001:db8:7::/48"]
    [[policy]]
    name = "left"
    from = ["192.0.2.5"]
    via = "main"
"#;
const DESTINATIONS: [&str; 4] = ["198.51.100.1", "203.0.113.1", "2001:db8:7::1", "2001:db8:8::1"];
/// What prefixes are made around, so that they lie in one another.
const BASES: [&str; 6] =
    ["10.64.3.9", "10.64.3.200", "172.16.5.1", "2a02:578:85a0:1::9", "2a02:578:85a0:1::10", "fd00:1:2:3::4"];

fn prefix(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn link(index: u32, name: &str) -> Link {
    Link { mtu: 1400, ..Link::new(index, name, LinkLayer::Ip) }
}

/// The index of the policy with `via = "main"`.
const LEFT: usize = 4;

/// A configuration with these sources, by the policy's index, and a tree above this number of prefixes.
fn config(sources: impl IntoIterator<Item = (IpNet, usize)>, tree_above: u32) -> Config {
    let mut config = Config::parse("tree", POLICIES).unwrap();
    config.tree_above = tree_above;
    for policy in &mut config.policies {
        policy.from.clear();
    }
    for (prefix, policy) in sources {
        config.policies[policy].from.push(prefix);
    }
    config
}

/// A kernel's rules, in the order in which they were made, and its routes.
#[derive(Clone, Debug, Default)]
struct World {
    rules: Vec<Rule>,
    routes: BTreeMap<(u32, IpNet, u32), Route>,
    /// The priority of a foreign rule.
    foreign: Option<u32>,
}

impl World {
    fn state(&self) -> KernelState {
        let observed = |handle, family, priority, rule: Option<Rule>| ObservedRule {
            handle: Handle(handle),
            family,
            priority,
            ours: rule.is_some(),
            text: String::new(),
            rule,
            looks_up_local: false,
            looks_up_main: false,
            l3mdev: false,
            iif: None,
            oif: None,
            foreign: None,
        };
        let mut rules: Vec<ObservedRule> = (self.rules.iter().enumerate())
            .map(|(index, rule)| observed(index, rule.family(), rule.priority, Some(rule.clone())))
            .collect();
        let foreign = |priority| Family::ALL.map(|family| observed(usize::MAX, family, priority, None));
        rules.extend(self.foreign.into_iter().flat_map(foreign));
        let local = |family| ObservedRule { looks_up_local: true, ..observed(usize::MAX, family, 0, None) };
        rules.extend(Family::ALL.map(local));
        rules.sort_by_key(|rule| rule.priority);
        let routes = self.routes.values().enumerate().map(|(index, route)| ObservedRoute {
            handle: Handle(index),
            family: Family::of(&route.dst),
            route: Some(route.clone()),
            text: route.to_string(),
        });
        let links = [link(2, "net0"), link(3, "tun0"), link(4, "tun1")];
        KernelState {
            links: links.into_iter().map(|link| (link.index, link)).collect(),
            rules,
            routes: routes.collect(),
            ..KernelState::default()
        }
    }

    fn host(&self) -> Host {
        Host::new(self.rules.iter().map(Into::into), self.routes.values(), &KernelState::default())
    }

    fn desired(&self, config: &Config) -> Desired {
        let tables = config.policies.iter().map(|policy| policy.name.clone()).zip(200..).collect();
        let failed = BTreeSet::new();
        compile(&Inputs {
            config,
            kernel: &self.state(),
            tables: &tables,
            failed: &failed,
            rules: true,
            fast: None,
            before: None,
        })
    }

    /// Makes the world what the configuration says, and looks at it after every step. A second plan does nothing, but if the
    /// end of all rules has moved: a tree that wants to go further follows then.
    fn reach(&mut self, config: &Config, mut look: impl FnMut(&Self, &Op)) -> usize {
        let ends = |world: &Self| world.rules.iter().filter(|rule| rule.is_end()).cloned().collect::<BTreeSet<_>>();
        let before = ends(self);
        let mut operations = self.attempt(config, None, &mut look);
        if ends(self) != before {
            operations += self.attempt(config, None, &mut look);
        }
        assert_eq!(plan(&self.desired(config), &self.state(), None).unwrap(), [], "another plan must be empty");
        operations
    }

    /// The same, where one rule cannot be added, counted from the first.
    fn attempt(&mut self, config: &Config, failing: Option<usize>, mut look: impl FnMut(&Self, &Op)) -> usize {
        let desired = self.desired(config);
        let operations = plan(&desired, &self.state(), None).unwrap();
        let added =
            operations.iter().filter(|op| matches!(op, Op::Kernel(KernelOp::AddRule(rule)) if !rule.is_shortcut()));
        let added: Vec<&Op> = added.collect();
        let failing = failing.and_then(|number| added.get(number % added.len().max(1)).copied());
        let mut undone = Undone::new(&desired);
        let before = self.clone();
        for operation in &operations {
            match operation {
                Op::Kernel(operation) if undone.puts_off(operation) => continue,
                Op::Kernel(operation) if failing == Some(&Op::Kernel(operation.clone())) => {
                    undone.fail(operation);
                    continue;
                }
                Op::Kernel(KernelOp::AddRule(rule)) => self.rules.push(rule.clone()),
                Op::Kernel(KernelOp::DelRule { handle, .. }) => {
                    let place = self.rules.iter().position(|rule| *rule == before.rules[handle.0]).unwrap();
                    self.rules.remove(place);
                }
                Op::Kernel(KernelOp::AddRoute(route) | KernelOp::ReplaceRoute(route)) => {
                    self.routes.insert(route.key(), route.clone());
                }
                Op::Kernel(KernelOp::DelRoute { handle, .. }) => {
                    let route = before.routes.values().nth(handle.0).unwrap();
                    self.routes.remove(&route.key());
                }
                Op::Fast(operation) => panic!("there is no fast path: {operation}"),
            }
            look(self, operation);
        }
        operations.len()
    }
}

/// The first and last addresses of prefixes, and those around them.
fn edges<'a>(prefixes: impl IntoIterator<Item = &'a IpNet>) -> BTreeSet<IpAddr> {
    let mut edges = BTreeSet::new();
    for prefix in prefixes {
        for (edge, by) in [(prefix.network(), u128::MAX), (prefix.broadcast(), 1)] {
            edges.extend([edge, shifted(edge, by)]);
        }
    }
    edges
}

#[expect(clippy::cast_possible_truncation, reason = "addresses of a family are a ring")]
fn shifted(address: IpAddr, by: u128) -> IpAddr {
    match address {
        IpAddr::V4(address) => u32::from(address).wrapping_add(by as u32).to_be_bytes().into(),
        IpAddr::V6(address) => u128::from(address).wrapping_add(by).to_be_bytes().into(),
    }
}

/// What becomes of packets from all these sources.
fn outcomes(host: &Host, sources: &BTreeSet<IpAddr>) -> Vec<Outcome> {
    let destinations = DESTINATIONS.map(|text| text.parse::<IpAddr>().unwrap());
    let of = |source: &IpAddr| {
        let source = *source;
        let reached = destinations.into_iter().filter(move |to| to.is_ipv4() == source.is_ipv4());
        reached.map(move |destination| host.walk(&Packet { source, destination, iif: None, oif: None }))
    };
    sources.iter().flat_map(of).collect()
}

/// A prefix around one of the bases, whose last bit, or one before it, may be another.
fn nested() -> impl Strategy<Value = IpNet> {
    (select(&BASES[..]), 0_u8..=128, 0_u8..24, any::<bool>()).prop_map(|(base, length, bit, flip)| {
        let base: IpAddr = base.parse().unwrap();
        let bits = IpNet::from(base).max_prefix_len();
        let length = length % (bits + 1);
        let turned = u128::from(flip) << u32::from(bits - length).saturating_add(bit.into()).min(u32::from(bits) - 1);
        let base = match base {
            IpAddr::V4(base) => IpAddr::from((u32::from(base) ^ u32::try_from(turned).unwrap_or(0)).to_be_bytes()),
            IpAddr::V6(base) => IpAddr::from((u128::from(base) ^ turned).to_be_bytes()),
        };
        IpNet::new(base, length).unwrap().trunc()
    })
}

/// Sources and the index of the policy of each.
fn sources() -> impl Strategy<Value = BTreeMap<IpNet, usize>> {
    btree_map(nested(), 0_usize..5, 0..90)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    /// From one set of sources to another, as a list or a tree: at every step each packet is decided as before or as
    /// afterwards, and at the end as the list decides.
    #[test]
    fn every_step_decides_as_before_or_as_afterwards(
        situations in prop::collection::vec((sources(), select(vec![0, 20, u32::MAX]), any::<bool>()), 1..4),
        kept in any::<u8>(),
    ) {
        let mut world = World::default();
        let mut carried: BTreeMap<IpNet, usize> = BTreeMap::new();
        for (index, (mut wanted, tree_above, crowded)) in situations.into_iter().enumerate() {
            // Some of what there was stays.
            if kept & 1 << index != 0 {
                wanted.extend(carried.clone());
            }
            // While a rule of another program takes room away, the end of all rules stands for a moment before old rules of a
            // larger tree, and what `via = "main"` leaves to the main table may meet one of those (docs/limits.md).
            if !carried.values().chain(wanted.values()).any(|policy| *policy == LEFT) {
                world.foreign = crowded.then_some(20_129 + 40);
            }
            let mut list = World::default();
            list.reach(&config(wanted.clone(), u32::MAX), |_, _| {});
            let edges = edges(wanted.keys());
            let (before, after) = (outcomes(&world.host(), &edges), outcomes(&list.host(), &edges));
            world.reach(&config(wanted.clone(), tree_above), |world, operation| {
                for ((now, before), after) in outcomes(&world.host(), &edges).iter().zip(&before).zip(&after) {
                    assert!(now == before || now == after, "{now:?} after {operation}: {:#?}", world.rules);
                }
            });
            assert_eq!(outcomes(&world.host(), &edges), after);
            let last = world.rules.iter().map(|rule| rule.priority).max();
            assert!(world.foreign.is_none() || last < world.foreign, "somebody else's rule is still asked afterwards");
            carried = wanted;
        }
    }

    /// Whichever rule cannot be added, each packet is decided as before or as afterwards, and once it can, as afterwards.
    #[test]
    fn what_cannot_be_done_holds_back_what_it_replaces(
        (before, after) in (sources(), sources()),
        shape in (select(vec![0, 20, u32::MAX]), select(vec![0, 20, u32::MAX])),
        failing in any::<usize>(),
    ) {
        let mut world = World::default();
        world.reach(&config(before, shape.0), |_, _| {});
        let mut list = World::default();
        list.reach(&config(after.clone(), u32::MAX), |_, _| {});
        let edges = edges(after.keys());
        let (old, new) = (outcomes(&world.host(), &edges), outcomes(&list.host(), &edges));
        // It is tried again and again.
        for failing in [Some(failing), Some(failing), None] {
            world.attempt(&config(after.clone(), shape.1), failing, |world, operation| {
                for ((now, old), new) in outcomes(&world.host(), &edges).iter().zip(&old).zip(&new) {
                    assert!(now == old || now == new, "{now:?} after {operation}: {:#?}", world.rules);
                }
            });
        }
        prop_assert_eq!(outcomes(&world.host(), &edges), new);
        prop_assert_eq!(plan(&world.desired(&config(after, shape.1)), &world.state(), None).unwrap(), []);
    }

    /// Whichever shortcuts are missing, the same is decided.
    #[test]
    fn shortcuts_do_not_matter(sources in sources(), missing in prop::collection::vec(any::<bool>(), 100)) {
        let mut world = World::default();
        world.reach(&config(sources.clone(), 0), |_, _| {});
        let edges = edges(sources.keys());
        let whole = outcomes(&world.host(), &edges);
        let mut missing = missing.into_iter().cycle();
        world.rules.retain(|rule| !rule.is_shortcut() || missing.next() == Some(false));
        prop_assert_eq!(outcomes(&world.host(), &edges), whole);
    }
}

/// Number of different /24.
fn many(count: u32) -> impl Iterator<Item = (IpNet, usize)> {
    // Spread over 11.0.0.0/8 and 12.0.0.0/7.
    let net = |n: u32| (0x0b00_0000 + (n.wrapping_mul(0x9e37_79b1) >> 8) % 0x3_0000 * 0x100).to_be_bytes();
    let mut seen = BTreeSet::new();
    let each = (0..).map(move |n| IpNet::new(net(n).into(), 24).unwrap()).filter(move |net| seen.insert(*net));
    each.take(count as usize).map(|net| (net, 0))
}

#[test]
fn few_rules_are_asked() {
    let mut world = World::default();
    let (sources, more): (Vec<_>, Vec<_>) = (many(10_000).collect(), many(10_020).skip(10_000).collect());
    world.reach(&config(sources.clone(), 128), |_, _| {});
    let prefixes: Vec<IpNet> = sources.iter().map(|(prefix, _)| *prefix).collect();
    let host = world.host();
    let asked = |source| {
        host.walk_counting(&Packet { source, destination: prefix("203.0.113.1/32").addr(), iif: None, oif: None }).1
    };
    let asked: Vec<usize> = edges(&prefixes).into_iter().map(asked).collect();
    let (most, all) = (asked.iter().max().unwrap(), asked.iter().sum::<usize>());
    println!(
        "{} rules, up to priority {}; asked {:.1} on average, {most} at most",
        world.rules.len(),
        world.rules.iter().map(|rule| rule.priority).max().unwrap(),
        all as f64 / asked.len() as f64
    );
    assert!(*most < 60 && world.rules.len() < 16_000, "{most} of {}", world.rules.len());
    // One more prefix changes little, as a rule.
    let mut sources = sources;
    let mut changes: Vec<usize> = more
        .into_iter()
        .map(|source| {
            sources.push(source);
            world.reach(&config(sources.clone(), 128), |_, _| {})
        })
        .collect();
    changes.sort_unstable();
    println!("operations for one more prefix: median {}, most {}", changes[10], changes[19]);
    assert!(changes[10] < 100, "{changes:?}");
}

#[test]
fn a_small_tree() {
    let net = |n: u8| (IpNet::new([10, n * 16, 0, 0].into(), 16).unwrap(), 0);
    let nested = ["10.0.0.0/8", "10.16.32.0/24", "10.16.32.8/32", "2001:db8::/32"];
    let sources = (0..12).map(net).chain(nested.map(|text| (prefix(text), 1)));
    let desired = World::default().desired(&config(sources, 4));
    let rules: Vec<String> = desired.rules.iter().map(Rule::add_command).collect();
    insta::assert_snapshot!(rules.join("\n"));
}
