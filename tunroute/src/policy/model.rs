//! The fast path's maps in user space: the decision that the programs take, taken here, over the same values.
//!
//! [`Model`] answers what `tunroute-ebpf` looks up in BPF maps. [`Trace`] writes down what the decision asked and was
//! told, so that a verdict is explained by what led to it, not by a second opinion.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use prefix_trie::joint::{JointPrefixMap, JointPrefixSet};
use tunroute_common::{
    decide::{Arrival, Lookup, NextHop},
    maps::{OWN_SET, Slot, Source},
    packet::{Addresses, Header},
};

use crate::{
    policy::fast::{Exemption, FastState, Open, address_from_words},
    policy::net::Family,
};

/// What stands in the maps, ready to be searched.
#[derive(Clone, Debug)]
pub struct Model {
    sources: JointPrefixMap<IpNet, Source>,
    /// By [`Slot::exempt_set`].
    exempt: HashMap<u32, JointPrefixSet<IpNet>>,
    slots: BTreeMap<u32, Slot>,
    open: Open,
}

impl From<&FastState> for Model {
    fn from(state: &FastState) -> Self {
        let mut exempt = HashMap::<u32, JointPrefixSet<IpNet>>::new();
        for Exemption { set, prefix } in &state.exempt {
            exempt.entry(*set).or_default().insert(*prefix);
        }
        Self { sources: state.sources.iter().copied().collect(), exempt, slots: state.slots.clone(), open: state.open }
    }
}

impl Model {
    /// The longest source prefix that holds an address.
    #[must_use]
    pub fn source_of(&self, address: IpAddr) -> Option<(IpNet, Source)> {
        self.sources.get_lpm(&address.into()).map(|(prefix, source)| (prefix, *source))
    }

    /// The longest prefix of an exemption set that holds a destination.
    #[must_use]
    pub fn exemption_of(&self, set: u32, destination: IpAddr) -> Option<IpNet> {
        self.exempt.get(&set)?.get_lpm(&destination.into())
    }
}

impl Lookup for Model {
    fn source(&self, addresses: &Addresses) -> Option<Source> {
        Some(self.source_of(source_and_destination(addresses).0)?.1)
    }

    fn destination_is_source(&self, addresses: &Addresses) -> bool {
        self.source_of(source_and_destination(addresses).1).is_some()
    }

    fn exempt(&self, set: u32, addresses: &Addresses) -> bool {
        self.exemption_of(set, source_and_destination(addresses).1).is_some()
    }

    /// The kernel's routes are not kept here: what no policy is about is left to it.
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

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(&index)
    }

    /// Whether the daemon is alive is not asked here: whoever has the state is.
    fn open(&self, addresses: &Addresses) -> bool {
        self.open.family(match addresses {
            Addresses::V4 { .. } => Family::V4,
            Addresses::V6 { .. } => Family::V6,
        })
    }
}

/// One question of the decision, with the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The source prefix that holds the source address.
    Source(Option<(IpNet, Source)>),
    /// Is the family open?
    Open(bool),
    /// The slot with this number; none if there is no such slot.
    Slot(u32, Option<Slot>),
    /// The prefix of this exemption set that holds the destination address.
    Exempt(u32, Option<IpNet>),
    /// The source prefix that holds the destination address.
    Destination(Option<IpNet>),
}

/// A [`Model`] that writes down what it is asked.
#[derive(Debug)]
pub struct Trace<'a> {
    model: &'a Model,
    steps: RefCell<Vec<Step>>,
}

impl<'a> Trace<'a> {
    /// Nothing has been asked yet.
    #[must_use]
    pub const fn new(model: &'a Model) -> Self {
        Self { model, steps: RefCell::new(Vec::new()) }
    }

    /// What was asked, in order.
    #[must_use]
    pub fn steps(&self) -> Vec<Step> {
        self.steps.borrow().clone()
    }

    fn note(&self, step: Step) {
        self.steps.borrow_mut().push(step);
    }
}

impl Lookup for Trace<'_> {
    fn source(&self, addresses: &Addresses) -> Option<Source> {
        let found = self.model.source_of(source_and_destination(addresses).0);
        self.note(Step::Source(found));
        Some(found?.1)
    }

    fn destination_is_source(&self, addresses: &Addresses) -> bool {
        let found = self.model.source_of(source_and_destination(addresses).1).map(|(prefix, _)| prefix);
        self.note(Step::Destination(found));
        found.is_some()
    }

    fn exempt(&self, set: u32, addresses: &Addresses) -> bool {
        let found = self.model.exemption_of(set, source_and_destination(addresses).1);
        self.note(Step::Exempt(set, found));
        found.is_some()
    }

    fn forwards_unmatched(&self, addresses: &Addresses) -> bool {
        self.model.forwards_unmatched(addresses)
    }

    fn touches_host(&self, addresses: &Addresses) -> bool {
        self.model.touches_host(addresses)
    }

    fn main_route(&self, arrival: &Arrival, header: &Header, length: u32) -> Option<NextHop> {
        self.model.main_route(arrival, header, length)
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        let found = self.model.slot(index);
        self.note(Step::Slot(index, found.copied()));
        found
    }

    fn open(&self, addresses: &Addresses) -> bool {
        let open = self.model.open(addresses);
        self.note(Step::Open(open));
        open
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

#[cfg(test)]
mod tests {
    use tunroute_common::{
        decide::{Verdict, decide_ingress},
        maps::{Egress, Outcome},
        packet::{ETHERTYPE_IPV4, Ipv4Header, Slice},
    };

    use super::*;

    fn prefix(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    #[test]
    fn a_trace_tells_what_led_to_the_verdict() {
        let slot =
            |egress, exempt_set, next| Slot { id: 1, egress, mtu: 1400, exempt_set, next, table: 0, gateway: [0; 4] };
        let (inner, outer) = (slot(Egress::redirect(7, 0), 5, 1), slot(Egress::redirect(8, 0), 6, Slot::NO_NEXT));
        let source = |slot| Source { slot, arrives_by: Source::ANY_DEVICE };
        let state = FastState {
            sources: [(prefix("10.0.0.0/8"), source(1)), (prefix("10.1.0.0/16"), source(0))].into(),
            exempt: [Exemption { set: 5, prefix: prefix("192.0.2.0/24") }].into(),
            slots: [(0, inner), (1, outer)].into(),
            open: Open { v4: true, v6: false },
            ..FastState::default()
        };
        let mut header = Ipv4Header {
            version_ihl: 0x45,
            tos: 0,
            total_length: 20u16.to_be(),
            id: 0,
            fragment: 0,
            ttl: 64,
            protocol: 17,
            checksum: 0,
            source: u32::from_ne_bytes([10, 1, 2, 3]),
            destination: u32::from_ne_bytes([192, 0, 2, 9]),
        };
        header.checksum = (0..=u16::MAX)
            .find(|checksum| Ipv4Header { checksum: *checksum, ..header }.checksum_holds())
            .expect("one of them holds");

        let model = Model::from(&state);
        let trace = Trace::new(&model);
        let arrival = Arrival { ethertype: ETHERTYPE_IPV4, ifindex: 2, to_this_host: true, tagged: false };
        let verdict = decide_ingress(&arrival, &Slice(bytemuck::bytes_of(&header)), &trace);
        assert_eq!(verdict, Verdict::Redirect(1, &outer, Outcome::Forwarded));
        assert_eq!(
            trace.steps(),
            [
                Step::Source(Some((prefix("10.1.0.0/16"), source(0)))),
                Step::Open(true),
                Step::Slot(0, Some(inner)),
                Step::Exempt(5, Some(prefix("192.0.2.0/24"))),
                Step::Slot(1, Some(outer)),
                Step::Exempt(6, None),
            ]
        );
    }
}
