//! Which policies each source prefix leads to, one around the other, and by which device its packets arrive.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use foldhash::{HashMap, HashMapExt as _};
use ipnet::IpNet;
use tunroute_common::maps::Source;

use super::{Inputs, fnv1a};
use crate::{
    config::Config,
    policy::net::{Family, IfIndex, MainRoute, is_link_local},
    prefixes::map::PrefixMap,
};

/// Names a chain of nested policies in one family, the same in every run: a hash of the policies' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainId(pub u64);

impl ChainId {
    pub(super) fn new(config: &Config, family: Family, policies: &[usize]) -> Self {
        let family = match family {
            Family::V4 => "v4",
            Family::V6 => "v6",
        };
        let names = policies.iter().map(|policy| config.policies[*policy].name.as_str());
        // 0 marks a free slot.
        Self(fnv1a(std::iter::once(family).chain(names)).max(1))
    }
}

/// Nested policies of one family, the innermost first, by their indices in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub id: ChainId,
    /// The family.
    pub family: Family,
    /// The policies.
    pub policies: Vec<usize>,
}

/// Where a source prefix leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lead {
    /// The chain, as an index among [`Sources::chains`].
    pub chain: u32,
    /// [`Source::arrives_by`]
    pub arrives_by: u32,
}

/// Where the main table would send what goes back to a policy's sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WayBack {
    /// The policy, as an index in the configuration.
    pub policy: usize,
    /// The device; none if there is no way back.
    pub device: Option<IfIndex>,
}

/// One of some prefixes, and how many others there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Several {
    /// The first.
    pub first: IpNet,
    /// The number of the others.
    pub others: usize,
}

/// All source prefixes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    prefixes: PrefixMap<Lead>,
    chains: Vec<Chain>,
    ways_back: BTreeMap<WayBack, Several>,
    origin: Origin,
}

/// What they depend on besides the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Origin {
    /// The host's own addresses, but for link-local ones: they come and go with any device, and are never looked up.
    own: BTreeSet<IpNet>,
    /// What the policies follow, in their order.
    followed: Vec<Vec<IpNet>>,
    /// The IPv4 routes of the main table, where they are asked for the reverse path; one to everywhere without a certain
    /// device, where rules of others are asked first.
    reverse: Option<Vec<MainRoute>>,
}

impl Sources {
    /// The prefixes.
    #[must_use]
    pub const fn prefixes(&self) -> &PrefixMap<Lead> {
        &self.prefixes
    }

    /// The chains that they lead to.
    #[must_use]
    pub fn chains(&self) -> &[Chain] {
        &self.chains
    }

    /// The chain that a prefix leads to.
    #[must_use]
    pub fn chain_of(&self, prefix: &IpNet) -> Option<&Chain> {
        let Lead { chain, .. } = self.prefixes.get(prefix)?;
        self.chains.get(usize::try_from(*chain).ok()?)
    }

    /// Where the ways back lead, if the reverse path is asked for. Left out is a prefix of which a part has a way back of its
    /// own or is this host, and one whose way back is not certain.
    #[must_use]
    pub const fn ways_back(&self) -> &BTreeMap<WayBack, Several> {
        &self.ways_back
    }

    /// Compiles them, unless they would be those before.
    pub(super) fn compile(inputs: &Inputs<'_>, reverse_path: bool) -> Arc<Self> {
        let reverse = || {
            if !inputs.kernel.main_leads_back() {
                return vec![MainRoute { dst: Family::V4.default_prefix(), ..MainRoute::default() }];
            }
            inputs.kernel.main.iter().filter(|route| Family::of(&route.dst) == Family::V4).cloned().collect()
        };
        let origin = Origin {
            own: inputs.kernel.local.iter().copied().filter(|own| !is_link_local(own)).collect(),
            followed: inputs.config.policies.iter().map(|policy| policy.followed.clone()).collect(),
            reverse: reverse_path.then(reverse),
        };
        match inputs.before.filter(|before| before.origin == origin) {
            Some(before) => Arc::clone(before),
            None => Arc::new(Self::of(inputs.config, origin)),
        }
    }

    fn of(config: &Config, origin: Origin) -> Self {
        let mut prefixes: Vec<(IpNet, Event)> = Vec::new();
        for (index, policy) in config.policies.iter().enumerate() {
            prefixes.extend(policy.sources().map(|prefix| (*prefix, Event::Policy(index))));
        }
        // What splits a policy's prefix, because packets from a part of it must arrive elsewhere, or nowhere.
        prefixes.extend(origin.own.iter().map(|own| (*own, Event::Own)));
        let reverse = origin.reverse.iter().flatten();
        prefixes.extend(reverse.map(|route| (route.dst, Event::Reverse(route.oif))));
        // A shorter prefix stands before the longer ones inside it. Stable, as each policy's are sorted already.
        prefixes.sort_by_key(|(prefix, event)| (*prefix, event.order()));

        let mut chains = Chains { config, chains: Vec::new(), known: HashMap::new() };
        let mut entries: Vec<(IpNet, Lead)> = Vec::with_capacity(prefixes.len());
        let mut ways_back: BTreeMap<WayBack, Several> = BTreeMap::new();
        let mut around: Vec<Around> = Vec::new();
        let mut paths: Vec<(IpNet, Option<IfIndex>)> = Vec::new();
        for (prefix, event) in prefixes {
            while let Some(left) = around.pop_if(|outer| !holds(&outer.prefix, &prefix)) {
                left.note_way_back(&mut ways_back);
            }
            while paths.pop_if(|(outer, _)| !holds(outer, &prefix)).is_some() {}
            match event {
                Event::Policy(policy) => {
                    let outer = around.last().map(|outer| outer.chain);
                    let chain = chains.inside(outer, policy, Family::of(&prefix));
                    let asked = origin.reverse.is_some() && Family::of(&prefix) == Family::V4;
                    let device = match paths.last() {
                        _ if !asked => None,
                        None => Some(None),
                        Some((_, device)) => device.map(Some),
                    };
                    around.push(Around { prefix, chain, back: device.map(|device| WayBack { policy, device }) });
                }
                Event::Reverse(oif) => {
                    around.iter_mut().for_each(|outer| outer.back = None);
                    match paths.last_mut() {
                        // Two routes to one prefix: whichever the kernel prefers, neither is certain.
                        Some((same, device)) if *same == prefix => *device = None,
                        _ => paths.push((prefix, oif)),
                    }
                }
                Event::Own => around.iter_mut().for_each(|outer| outer.back = None),
            }
            let Some(Around { chain, .. }) = around.last() else { continue };
            let arrives_by = match event {
                Event::Own => Source::OWN_ADDRESS,
                _ if origin.reverse.is_none() || Family::of(&prefix) == Family::V6 => Source::ANY_DEVICE,
                // Without a route back, or a certain one, the kernel decides.
                _ => paths.last().and_then(|(_, device)| *device).unwrap_or(Source::OWN_ADDRESS),
            };
            let lead = Lead { chain: *chain, arrives_by };
            match entries.last_mut() {
                Some((same, last)) if *same == prefix => *last = lead,
                _ => entries.push((prefix, lead)),
            }
        }
        around.into_iter().for_each(|left| left.note_way_back(&mut ways_back));
        let chains = chains.chains;
        Self { prefixes: PrefixMap::in_order(entries), chains, ways_back, origin }
    }
}

/// Does a prefix hold another? As [`IpNet::contains`], which makes the addresses at both ends of either, for each of a
/// million.
pub(super) fn holds(outer: &IpNet, inner: &IpNet) -> bool {
    let differ = match (outer, inner) {
        (IpNet::V4(outer), IpNet::V4(inner)) => u128::from(outer.addr().to_bits() ^ inner.addr().to_bits()) << 96,
        (IpNet::V6(outer), IpNet::V6(inner)) => outer.addr().to_bits() ^ inner.addr().to_bits(),
        _ => return false,
    };
    outer.prefix_len() <= inner.prefix_len() && differ.leading_zeros() >= outer.prefix_len().into()
}

/// A policy's prefix around the one that is looked at.
struct Around {
    prefix: IpNet,
    chain: u32,
    /// The way back to all of it, if it is certain.
    back: Option<WayBack>,
}

impl Around {
    fn note_way_back(self, ways_back: &mut BTreeMap<WayBack, Several>) {
        if let Some(back) = self.back {
            let more = |several: &mut Several| {
                *several = Several { first: several.first.min(self.prefix), others: several.others + 1 };
            };
            ways_back.entry(back).and_modify(more).or_insert(Several { first: self.prefix, others: 0 });
        }
    }
}

/// Why a prefix stands among the sources.
#[derive(Clone, Copy)]
enum Event {
    /// A route of the main table begins here: the reverse path is another inside.
    Reverse(Option<IfIndex>),
    /// A policy's prefix.
    Policy(usize),
    /// An address of this host.
    Own,
}

impl Event {
    /// What a prefix is to later ones with the same bits comes first.
    const fn order(&self) -> u8 {
        match self {
            Self::Reverse(_) => 0,
            Self::Policy(_) => 1,
            Self::Own => 2,
        }
    }
}

/// Chains as they are met: few of them, however many prefixes there are.
struct Chains<'a> {
    config: &'a Config,
    chains: Vec<Chain>,
    known: HashMap<(Family, Option<u32>, usize), u32>,
}

impl Chains<'_> {
    /// The chain of a policy's prefix inside one that leads to `outer`.
    fn inside(&mut self, outer: Option<u32>, policy: usize, family: Family) -> u32 {
        let key = (family, outer, policy);
        if let Some(chain) = self.known.get(&key) {
            return *chain;
        }
        // Of the policies around one that leaves its sources to the main table, none applies.
        let outer = outer.filter(|_| !self.config.policies[policy].main);
        let outer = outer.and_then(|outer| self.chains.get(usize::try_from(outer).ok()?));
        // A policy that was passed over once would be passed over again.
        let others = outer.into_iter().flat_map(|outer| &outer.policies).copied().filter(|outer| *outer != policy);
        let policies: Vec<usize> = std::iter::once(policy).chain(others).collect();
        let id = ChainId::new(self.config, family, &policies);
        let chain = self.chains.iter().position(|chain| chain.id == id).unwrap_or(self.chains.len());
        if chain == self.chains.len() {
            self.chains.push(Chain { id, family, policies });
        }
        let chain = u32::try_from(chain).unwrap_or(u32::MAX);
        self.known.insert(key, chain);
        chain
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_prefix_holds_what_it_contains(
            bits: u128,
            other: u128,
            differ in 0u32..=128,
            lengths: [u8; 2],
            v4: [bool; 2],
        ) {
            // Alike up to somewhere.
            let other = bits ^ other.checked_shr(differ).unwrap_or(0);
            let [outer, inner] = [(bits, 0), (other, 1)].map(|(bits, which): (u128, usize)| {
                let address = if v4[which] {
                    std::net::IpAddr::from(((bits >> 96) as u32).to_be_bytes())
                } else {
                    bits.to_be_bytes().into()
                };
                let most = if v4[which] { 32 } else { 128 };
                IpNet::new_assert(address, lengths[which] % (most + 1)).trunc()
            });
            prop_assert_eq!(holds(&outer, &inner), outer.contains(&inner), "{} {}", outer, inner);
        }
    }
}
