//! The fast path's maps in user space: the decision that the programs take, taken here, over the same values.
//!
//! [`Model`] answers what `tunroute-ebpf` looks up in BPF maps.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use tunroute_common::{
    decide::{Arrival, Lookup, NextHop, Way},
    maps::{Exempt, OWN_SET, Slot, Source},
    packet::{Addresses, Header},
};

use crate::{
    policy::fast::{DeviceExit, Exemption, FastState, Open, address_from_words},
    policy::net::Family,
};

/// What stands in the maps, ready to be searched.
#[derive(Clone, Debug)]
pub struct Model {
    sources: JointPrefixMap<IpNet, Source>,
    /// By [`Slot::exempt_set`].
    exempt: HashMap<u32, JointPrefixMap<IpNet, Exempt>>,
    slots: BTreeMap<u32, Slot>,
    exits: BTreeMap<u32, DeviceExit>,
    open: Open,
}

impl From<&FastState> for Model {
    fn from(state: &FastState) -> Self {
        let mut exempt = HashMap::<u32, JointPrefixMap<IpNet, Exempt>>::new();
        for Exemption { set, prefix, kind } in &state.exempt {
            exempt.entry(*set).or_default().insert(*prefix, *kind);
        }
        Self {
            sources: state.sources.iter().copied().collect(),
            exempt,
            slots: state.slots.clone(),
            exits: state.exits.clone(),
            open: state.open,
        }
    }
}

impl Model {
    /// The longest source prefix that holds an address.
    #[must_use]
    pub fn source_of(&self, address: IpAddr) -> Option<(IpNet, Source)> {
        self.sources.get_lpm(&address.into()).map(|(prefix, source)| (prefix, *source))
    }

    /// The longest prefix of an exemption set that holds a destination, and what it says.
    #[must_use]
    pub fn exemption_of(&self, set: u32, destination: IpAddr) -> Option<(IpNet, Exempt)> {
        self.exempt.get(&set)?.get_lpm(&destination.into()).map(|(prefix, kind)| (prefix, *kind))
    }
}

impl Lookup for Model {
    fn source(&self, addresses: &Addresses) -> Option<Source> {
        Some(self.source_of(source_and_destination(addresses).0)?.1)
    }

    fn destination_is_source(&self, addresses: &Addresses) -> bool {
        self.source_of(source_and_destination(addresses).1).is_some()
    }

    fn exempt(&self, set: u32, addresses: &Addresses) -> Exempt {
        self.exemption_of(set, source_and_destination(addresses).1).map_or(Exempt::No, |(_, kind)| kind)
    }

    /// The kernel's routes are not kept here: unmatched traffic is left to the kernel.
    fn forwards_unmatched(&self, _addresses: &Addresses) -> bool {
        false
    }

    fn touches_host(&self, addresses: &Addresses) -> bool {
        let (source, destination) = source_and_destination(addresses);
        [source, destination].into_iter().any(|address| self.exemption_of(OWN_SET, address).is_some())
    }

    fn main_route(&self, _arrival: &Arrival, _header: &Header, _length: u32) -> Option<NextHop> {
        None
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(&index).copied()
    }

    fn way(&self, number: u32) -> Option<Way<'_>> {
        let DeviceExit { ifindex, exit } = self.exits.get(&number)?;
        (*ifindex != 0).then_some(Way { number, ifindex: *ifindex, exit })
    }

    /// The daemon counts as alive.
    fn open(&self, addresses: &Addresses) -> bool {
        self.open.family(match addresses {
            Addresses::V4 { .. } => Family::V4,
            Addresses::V6 { .. } => Family::V6,
        })
    }
}

/// A packet's addresses as the rest of the program writes them.
#[must_use]
pub fn source_and_destination(addresses: &Addresses) -> (IpAddr, IpAddr) {
    let (family, source, destination) = match *addresses {
        Addresses::V4 { source, destination } => (Family::V4, [source, 0, 0, 0], [destination, 0, 0, 0]),
        Addresses::V6 { source, destination } => (Family::V6, source, destination),
    };
    (address_from_words(family, source), address_from_words(family, destination))
}
