//! The packet reader and the decision, over any bytes and any maps, sane or not: what the verdicts promise, looked up
//! anew in the bytes.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use arbitrary::Arbitrary;
use bytemuck::cast;
use ipnet::IpNet;
use libfuzzer_sys::fuzz_target;
use tunroute::{
    policy::fast::{DeviceExit, Exemption, FastState, Open},
    policy::model::{Model, source_and_destination},
};
use tunroute_common::{
    decide::{Arrival, Lookup, Verdict, Way, decide_egress, decide_ingress},
    maps::{Action, Egress, Exempt, Exit, MAX_NESTING, Outcome, Slot, Source, flags},
    packet::{Addresses, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ipv4Header, Packet, Slice},
};

/// The checksums to which a hop adds a carry.
const EDGES: [u16; 2] = [0xfeff, 0xffff];

#[derive(Arbitrary, Debug)]
struct Input {
    sources: Vec<(Prefix, u8, u8)>,
    exempt: Vec<(u8, Prefix)>,
    slots: Vec<RawSlot>,
    exits: Vec<RawExit>,
    open: bool,
    ethertype: Option<u16>,
    ifindex: u8,
    to_this_host: bool,
    tagged: bool,
    packet: Vec<u8>,
}

/// A prefix around one of the packet's addresses, or anywhere.
#[derive(Arbitrary, Debug)]
struct Prefix {
    around: Option<bool>,
    bytes: [u8; 16],
    length: u8,
}

#[derive(Arbitrary, Debug)]
struct RawSlot {
    egress: u64,
    action: u8,
    exit: u8,
    exempt_set: u8,
    next: u8,
}

#[derive(Arbitrary, Debug)]
struct RawExit {
    /// 0 if it is gone.
    ifindex: u8,
    mtu: u16,
    flags: u8,
}

/// The addresses in the bytes, read by hand; none if they are too few.
fn addresses_at(ethertype: u16, packet: &[u8]) -> Option<Addresses> {
    let word =
        |at: usize| packet.get(at..at + 4).map(|bytes| u32::from_ne_bytes(bytes.try_into().expect("four bytes")));
    let wide = |at: usize| Some([word(at)?, word(at + 4)?, word(at + 8)?, word(at + 12)?]);
    match ethertype {
        ETHERTYPE_IPV4 => Some(Addresses::V4 { source: word(12)?, destination: word(16)? }),
        ETHERTYPE_IPV6 => Some(Addresses::V6 { source: wide(8)?, destination: wide(24)? }),
        _ => None,
    }
}

/// The same, but none in a header of another version, or one that is shorter than any.
fn addresses_in(ethertype: u16, packet: &[u8]) -> Option<Addresses> {
    let first = *packet.first()?;
    let right = match ethertype {
        ETHERTYPE_IPV4 => first >> 4 == 4 && first & 0xf >= 5,
        _ => first >> 4 == 6,
    };
    addresses_at(ethertype, packet).filter(|_| right)
}

fn hop_limit_in(addresses: &Addresses, packet: &[u8]) -> u8 {
    packet[if matches!(addresses, Addresses::V4 { .. }) { 8 } else { 7 }]
}

/// Is there nothing about the packet for which the reader steps aside, as far as its IP header says?
fn is_plain(addresses: &Addresses, packet: &[u8]) -> bool {
    let number = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let header = match addresses {
        Addresses::V4 { .. } => {
            packet[0] == 0x45 && usize::from(number(2)) == packet.len() && checksum(&packet[..20]) == 0
        }
        Addresses::V6 { .. } => packet[6] != 0 && usize::from(number(4)) + 40 == packet.len(),
    };
    let special = |address| match address {
        IpAddr::V4(address) => {
            let [first, ..] = address.octets();
            first == 0 || first >= 224 || address.is_loopback() || address.is_link_local()
        }
        IpAddr::V6(address) => {
            address.is_multicast()
                || address.is_unicast_link_local()
                || address.is_unspecified()
                || address.is_loopback()
                || address.to_ipv4_mapped().is_some()
        }
    };
    let (source, destination) = source_and_destination(addresses);
    header && !special(source) && !special(destination) && !is_discovery(addresses, packet)
}

/// As neighbour discovery, or what has nothing to tell its type by.
fn is_discovery(addresses: &Addresses, packet: &[u8]) -> bool {
    matches!(addresses, Addresses::V6 { .. })
        && packet[6] == 58
        && packet.get(40).is_none_or(|kind| matches!(kind, 133..=137))
}

/// The Internet checksum (RFC 1071).
fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// What the maps say about a packet.
enum Chain {
    /// This policy's slot applies.
    Applies(u32, Slot),
    /// No policy applies: what the first in the chain is counted as, and its slot.
    Ends(u32, Outcome),
    /// The chain is broken, or endless.
    Lost,
}

fn chain(maps: &Model, addresses: &Addresses, first: u32, least: Exempt) -> Chain {
    let mut index = first;
    let mut outcome = None;
    for _ in 0..=MAX_NESTING {
        let Some(slot) = maps.slot(index) else { return Chain::Lost };
        let passed = match slot.egress.action() {
            Action::Main => Outcome::Main,
            Action::Next => Outcome::Down,
            _ if maps.exempt(slot.exempt_set, addresses) < least => return Chain::Applies(index, slot),
            _ => Outcome::Exempt,
        };
        let outcome = *outcome.get_or_insert(passed);
        if slot.next == Slot::NO_NEXT {
            return Chain::Ends(first, outcome);
        }
        index = slot.next;
    }
    Chain::Lost
}

impl Input {
    fn maps(&self, addresses: Option<&Addresses>) -> Model {
        let prefix = |prefix: &Prefix| {
            let address = match (prefix.around, addresses.map(source_and_destination)) {
                (Some(true), Some((source, _))) => source,
                (Some(false), Some((_, destination))) => destination,
                (Some(_), None) => Ipv4Addr::from(u128::from_be_bytes(prefix.bytes) as u32).into(),
                (None, _) => Ipv6Addr::from(prefix.bytes).into(),
            };
            let width = if address.is_ipv4() { 32 } else { 128 };
            IpNet::new(address, prefix.length % (width + 1)).expect("its length is in range").trunc()
        };
        let source = |(around, slot, arrives_by): &(Prefix, u8, u8)| {
            let arrives_by = if *arrives_by == u8::MAX { Source::OWN_ADDRESS } else { u32::from(*arrives_by) };
            (prefix(around), Source { slot: u32::from(*slot), arrives_by })
        };
        let slot = |raw: &RawSlot| Slot {
            id: 1,
            egress: match raw.action {
                0..=127 => Egress::redirect(u32::from(raw.exit)).disputed(raw.egress & 1 != 0),
                128..=159 => Egress::down(Action::Reject),
                160..=191 => Egress::down(Action::Blackhole),
                192..=207 => Egress::down(Action::Next),
                208..=223 => Egress::down(Action::Main),
                // Any 64 bits.
                _ => cast(raw.egress),
            },
            exempt_set: u32::from(raw.exempt_set),
            next: if raw.next >= 128 { Slot::NO_NEXT } else { u32::from(raw.next) },
            table: 0,
            reserved: 0,
        };
        let exit = |raw: &RawExit| DeviceExit {
            ifindex: u32::from(raw.ifindex),
            exit: Exit { mtu: u32::from(raw.mtu), flags: u32::from(raw.flags), gateway: [0; 4] },
        };
        let exempt = |(set, around): &(u8, Prefix)| Exemption {
            set: u32::from(*set & 0x3f),
            prefix: prefix(around),
            kind: Exempt::ALL[usize::from(*set >> 6) % 3],
        };
        Model::from(&FastState {
            sources: self.sources.iter().map(source).collect(),
            exempt: self.exempt.iter().map(exempt).collect(),
            slots: (0..).zip(self.slots.iter().map(slot)).collect(),
            exits: (0..).zip(self.exits.iter().map(exit)).collect(),
            open: Open { v4: self.open, v6: self.open },
            ..FastState::default()
        })
    }
}

fn check_ingress(arrival: &Arrival, packet: &[u8], maps: &Model) {
    let verdict = decide_ingress(arrival, &Slice(packet), maps);
    let addresses = addresses_in(arrival.ethertype, packet);
    let plain = addresses.filter(|addresses| arrival.to_this_host && !arrival.tagged && is_plain(addresses, packet));
    let Some((addresses, source)) = plain.and_then(|addresses| Some((addresses, maps.source(&addresses)?))) else {
        assert_eq!(verdict, Verdict::Pass, "it is no policy's, or odd");
        return;
    };
    if !maps.open(&addresses) {
        assert_eq!(verdict, Verdict::StepAside(source.slot, Outcome::Closed));
        return;
    }
    let (index, slot) = match chain(maps, &addresses, source.slot, Exempt::Inside) {
        Chain::Applies(index, slot) => (index, slot),
        Chain::Ends(index, outcome) => return assert_eq!(verdict, Verdict::StepAside(index, outcome)),
        Chain::Lost => return assert_eq!(verdict, Verdict::Pass, "the maps make no sense"),
    };
    let hop_limit = hop_limit_in(&addresses, packet);
    let redirect = slot.egress.action() == Action::Redirect;
    let way = redirect.then(|| maps.way(slot.egress.exit())).flatten();
    match verdict {
        Verdict::Pass | Verdict::Forward(_) => panic!("a policy's packet is not counted"),
        Verdict::Drop(of, outcome) => {
            assert_eq!((of, outcome, slot.egress.action()), (index, Outcome::Blackholed, Action::Blackhole));
        }
        Verdict::StepAside(of, outcome) => {
            let so = match outcome {
                Outcome::Closed => slot.egress.is_disputed(),
                Outcome::SourceCheck => source.arrives_by != Source::ANY_DEVICE,
                Outcome::Down => slot.egress.action() == Action::Reject || redirect && way.is_none(),
                Outcome::Hairpin => way.is_some_and(|way| way.ifindex == arrival.ifindex),
                Outcome::Expired => redirect && hop_limit <= 1,
                Outcome::TooBig => way.is_some_and(|way| packet.len() > way.exit.mtu as usize),
                _ => false,
            };
            assert!(so && of == index, "stepped aside for what is not so: {of}, {outcome:?}, {slot:?}");
        }
        Verdict::Redirect(of, to, outcome) => {
            assert_eq!((of, Some(to), outcome), (index, way, Outcome::Forwarded));
            assert!(to.ifindex != arrival.ifindex && !slot.egress.is_disputed());
            assert!(hop_limit > 1, "its hop limit has ended");
            assert!(packet.len() <= to.exit.mtu as usize, "too big");
            assert!(source.arrives_by == Source::ANY_DEVICE || source.arrives_by == arrival.ifindex);
        }
    }
}

/// Where a checksum holds, it does after a hop.
fn check_hop(packet: &[u8]) {
    let Some(mut header) = Slice(packet).read::<Ipv4Header>(0) else { return };
    let holds = checksum(bytemuck::bytes_of(&header)) == 0;
    assert_eq!(header.checksum_holds(), holds, "{header:?}");
    if holds && header.ttl > 0 {
        header.checksum = header.checksum_after_hop();
        header.ttl -= 1;
        assert_eq!(checksum(bytemuck::bytes_of(&header)), 0, "the checksum after the hop: {header:?}");
    }
}

fn check_egress(arrival: &Arrival, packet: &[u8], maps: &Model) {
    let verdict = decide_egress(arrival, &Slice(packet), maps);
    let Some(addresses) = addresses_in(arrival.ethertype, packet) else {
        assert_eq!(verdict, Verdict::Pass, "nothing can be said of it");
        return;
    };
    let stays =
        addresses.stays_on_link() || hop_limit_in(&addresses, packet) == 255 && is_discovery(&addresses, packet);
    let Some(source) = maps.source(&addresses).filter(|_| !stays) else {
        assert_eq!(verdict, Verdict::Pass, "it is no policy's, or stays on the link");
        return;
    };
    let expected = match chain(maps, &addresses, source.slot, Exempt::Anywhere) {
        Chain::Applies(index, slot) => {
            let redirect = slot.egress.action() == Action::Redirect && !arrival.tagged;
            let way = redirect.then(|| maps.way(slot.egress.exit())).flatten();
            let fits = |way: &Way<'_>| way.exit.has(flags::ANSWERS_TOO_BIG) || packet.len() <= way.exit.mtu as usize;
            match way.filter(|way| way.ifindex != arrival.ifindex && fits(way)) {
                Some(way) => Verdict::Redirect(index, way, Outcome::Diverted),
                None => Verdict::Drop(index, Outcome::LeakPrevented),
            }
        }
        Chain::Ends(index, outcome) => Verdict::StepAside(index, outcome),
        Chain::Lost => Verdict::Drop(source.slot, Outcome::LeakPrevented),
    };
    assert_eq!(verdict, expected);
}

fuzz_target!(|input: Input| {
    // Half of those that are given are known ones, whatever the version says.
    let ethertype = match input.ethertype {
        Some(number) if number % 4 == ETHERTYPE_IPV4 % 4 => ETHERTYPE_IPV4,
        Some(number) if number % 4 == ETHERTYPE_IPV6 % 4 => ETHERTYPE_IPV6,
        Some(number) => number,
        None if input.packet.first().is_some_and(|first| first >> 4 == 6) => ETHERTYPE_IPV6,
        None => ETHERTYPE_IPV4,
    };
    let arrival = Arrival {
        ethertype,
        ifindex: u32::from(input.ifindex),
        to_this_host: input.to_this_host,
        tagged: input.tagged,
    };
    let mut packet = input.packet.clone();
    // Nobody guesses a length and a checksum: most packets have the right ones.
    let [right_length, right_checksum, at_the_edge] = [1, 2, 4].map(|bit| input.ifindex & bit == 0);
    if ethertype == ETHERTYPE_IPV4 && packet.len() >= 20 {
        let length = u16::try_from(packet.len()).unwrap_or(u16::MAX);
        if right_length {
            packet[2..4].copy_from_slice(&length.to_be_bytes());
        }
        if right_checksum {
            // Some have one that is about to overflow; the identification makes up for it.
            let (edge, free) = if at_the_edge { (EDGES[usize::from(input.ifindex >> 3 & 1)], 4) } else { (0, 10) };
            packet[10..12].copy_from_slice(&edge.to_be_bytes());
            packet[free..free + 2].fill(0);
            let sum = checksum(&packet[..20]);
            packet[free..free + 2].copy_from_slice(&sum.to_be_bytes());
        }
    } else if right_length && ethertype == ETHERTYPE_IPV6 && packet.len() >= 40 {
        let length = u16::try_from(packet.len() - 40).unwrap_or(u16::MAX);
        packet[4..6].copy_from_slice(&length.to_be_bytes());
    }
    let maps = input.maps(addresses_at(ethertype, &packet).as_ref());
    check_hop(&packet);
    check_ingress(&arrival, &packet, &maps);
    check_egress(&arrival, &packet, &maps);
});
