//! Many source prefixes as rules that the kernel need not walk one by one.
//!
//! The rules stand so that a prefix comes after those inside it; that alone makes them decide as the list by length does.
//! Among them stand *shortcuts*, `goto` rules past others. Each is right by itself, since nothing that it passes over has
//! an address in common with what it matches: where one is missing, or its target is, more rules are asked and the same one
//! decides.
//!
//! The tree is that of the addresses. A region with more than a few prefixes is cut in halves at the first bit in which
//! its prefixes differ, so that its shape at one place does not depend on what there is elsewhere. In a region cut into
//! `LEFT` and `RIGHT`, which is the smallest around its prefixes, stand, one after the other,
//!
//! ```text
//! not from REGION goto end      unless only sources of the region come here
//! from RIGHT goto middle
//!   … LEFT
//! from LEFT goto end            middle
//!   … RIGHT
//!                               end: what comes after the region
//! ```
//!
//! A region with few prefixes is a leaf: a list. Rules share a priority where their order does not matter, which is where
//! none matches what another does, or all of them are shortcuts.

use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::policy::net::{Band, Family, ObservedRule, Rule, RuleAction};

/// No more priorities than this are used, so that there is room for others.
pub const ROOM: u32 = 8192;
/// A leaf has up to this many prefixes, if that fits; otherwise twice as many, and so on.
pub(super) const LEAF: usize = 8;
/// A region with up to this many prefixes for each in a leaf is a block: it has more priorities than it needs, so that
/// what changes there moves nothing elsewhere.
const LEAVES_OF_BLOCK: usize = 16;

/// A source prefix and what its policy's rule does.
type Source = (IpNet, RuleAction);

/// The priorities that a tree may have: those between the band and the next rule of another program, who expects to be asked
/// after the policies.
pub(super) fn room(band: Band, family: Family, observed: &[ObservedRule]) -> RangeInclusive<u32> {
    let first = band.last().saturating_add(1);
    let others = observed.iter().filter(|rule| rule.family == family && !rule.ours && rule.priority >= first);
    let end = others.map(|rule| rule.priority).min().unwrap_or(u32::MAX);
    first..=end.saturating_sub(1).min(first.saturating_add(ROOM - 1))
}

/// The tree of one family's sources, which are sorted and none twice; none if it does not fit into the room.
pub(super) fn rules(sources: &[Source], room: RangeInclusive<u32>) -> Option<Vec<Rule>> {
    let family = Family::of(&sources.first()?.0);
    let (first, last) = room.into_inner();
    // With ever larger leaves, up to one that holds everything and would be no tree.
    let leaves = std::iter::successors(Some(LEAF), |leaf| leaf.checked_mul(2)).take_while(|leaf| *leaf < sources.len());
    let smallest = leaves.map(|leaf| Region::new(sources, leaf, false));
    let root = { smallest }.find(|root| first.checked_add(root.size).is_some_and(|end| end <= last))?;
    let end = first + root.size;
    let mut rules = vec![Rule::new(end, family.default_prefix(), RuleAction::Nop)];
    root.write(family.default_prefix(), first, end, &mut rules);
    Some(rules)
}

/// A part of the tree.
struct Region<'a> {
    /// The smallest prefix around its sources.
    around: IpNet,
    /// How many priorities it has.
    size: u32,
    content: Content<'a>,
}

enum Content<'a> {
    /// Few sources, with how many levels of others each has inside it.
    Leaf(Vec<(&'a Source, u32)>),
    /// A source around all others.
    Around(&'a Source, Box<Region<'a>>),
    /// Sources in both halves.
    Halves(Box<[Region<'a>; 2]>),
}

impl<'a> Region<'a> {
    /// The region of these sources, of which there is at least one. What is in a block is no block of its own.
    fn new(sources: &'a [Source], leaf: usize, in_block: bool) -> Self {
        let block = !in_block && sources.len() <= leaf.saturating_mul(LEAVES_OF_BLOCK);
        let around = match sources {
            [(first, _), .., (last, _)] => common(first, last),
            [(only, _)] => *only,
            [] => Family::V6.default_prefix(),
        };
        let inner = |sources| Self::new(sources, leaf, in_block || block);
        let (content, size) = match sources {
            _ if sources.len() <= leaf => {
                let levels = levels(sources);
                // Before the sources there is room for shortcuts.
                let size = 2 + levels.iter().copied().max().unwrap_or(0);
                (Content::Leaf(sources.iter().zip(levels).collect()), size)
            }
            [first, rest @ ..] if first.0 == around => {
                let rest = inner(rest);
                let size = rest.size + 1;
                (Content::Around(first, Box::new(rest)), size)
            }
            _ => {
                let [_, right] = halves(&around);
                let (left, right) = sources.split_at(sources.partition_point(|(prefix, _)| !right.contains(prefix)));
                let halves = Box::new([inner(left), inner(right)]);
                let size = halves[0].size + halves[1].size;
                (Content::Halves(halves), size)
            }
        };
        Self { around, size: if block { size.next_power_of_two() } else { size }, content }
    }

    /// Writes the region's rules, from the priority `start` on. To where it begins come at least the sources in `whole`;
    /// after it come the rules at `end`.
    fn write(&self, whole: IpNet, start: u32, end: u32, rules: &mut Vec<Rule>) {
        let decide = |priority, (from, action): &Source| Rule::new(priority, *from, *action);
        let goto = |priority, from, target| Rule::new(priority, from, RuleAction::Goto(target));
        if self.around != whole && !matches!(self.content, Content::Leaf(_)) {
            rules.push(Rule { not: true, ..goto(start, self.around, end) });
        }
        match &self.content {
            Content::Leaf(sources) => {
                rules.extend(sources.iter().map(|(source, level)| decide(start + 1 + level, source)));
            }
            Content::Around(source, inner) => {
                let after = start + inner.size;
                inner.write(self.around, start, after, rules);
                rules.push(decide(after, source));
            }
            Content::Halves(regions) => {
                let [left, right] = halves(&self.around);
                let middle = start + regions[0].size;
                rules.push(goto(start, right, middle));
                rules.push(goto(middle, left, end));
                regions[0].write(left, start, middle, rules);
                regions[1].write(right, middle, end, rules);
            }
        }
    }
}

/// How many levels of others each source has inside it.
fn levels(sources: &[Source]) -> Vec<u32> {
    let mut levels = vec![0; sources.len()];
    let mut outer: Vec<Option<usize>> = Vec::with_capacity(sources.len());
    for (index, (prefix, _)) in sources.iter().enumerate() {
        // The source before, or one around it, or none.
        let mut around = index.checked_sub(1);
        while let Some(candidate) = around.filter(|candidate| !sources[*candidate].0.contains(prefix)) {
            around = outer[candidate];
        }
        outer.push(around);
    }
    for index in (0..sources.len()).rev() {
        if let Some(around) = outer[index] {
            levels[around] = levels[around].max(levels[index] + 1);
        }
    }
    levels
}

/// The smallest prefix around two of the same family.
fn common(a: &IpNet, b: &IpNet) -> IpNet {
    let shorter = a.prefix_len().min(b.prefix_len());
    let length = |equal: u32| u8::try_from(equal).unwrap_or(u8::MAX).min(shorter);
    match (a, b) {
        (IpNet::V4(a), IpNet::V4(b)) => {
            let equal = (u32::from(a.addr()) ^ u32::from(b.addr())).leading_zeros();
            IpNet::V4(Ipv4Net::new_assert(a.addr(), length(equal)).trunc())
        }
        (IpNet::V6(a), IpNet::V6(b)) => {
            let equal = (u128::from(a.addr()) ^ u128::from(b.addr())).leading_zeros();
            IpNet::V6(Ipv6Net::new_assert(a.addr(), length(equal)).trunc())
        }
        (IpNet::V4(_), IpNet::V6(_)) | (IpNet::V6(_), IpNet::V4(_)) => Family::V6.default_prefix(),
    }
}

/// The halves of a prefix; itself twice if it is one address.
fn halves(prefix: &IpNet) -> [IpNet; 2] {
    let mut halves = prefix.subnets(prefix.prefix_len().saturating_add(1)).into_iter().flatten();
    [halves.next().unwrap_or(*prefix), halves.next().unwrap_or(*prefix)]
}
