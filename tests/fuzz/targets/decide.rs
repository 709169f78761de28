//! The packet reader and the decision, over any bytes and any maps, sane or not: what the verdicts promise, looked up
//! anew in the bytes.
#![no_main]

use arbitrary::Arbitrary;
use bytemuck::cast;
use libfuzzer_sys::fuzz_target;
use tunroute_common::{
    decide::{Arrival, Lookup, Verdict, decide_egress, decide_ingress},
    maps::{Action, Egress, MAX_NESTING, Slot, Source},
    packet::{Addresses, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ipv4Header, Packet, Slice},
};

#[derive(Arbitrary, Debug)]
struct Input {
    sources: Vec<(Prefix, u8, u8)>,
    exempt: Vec<(u8, Prefix)>,
    slots: Vec<RawSlot>,
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
    ifindex: u8,
    mtu: u16,
    exempt_set: u8,
    next: u8,
}

/// An address as a number, left-aligned, and its width.
type Address = (u32, u128);

struct Maps {
    sources: Vec<(Address, u32, Source)>,
    exempt: Vec<(u32, Address, u32)>,
    slots: Vec<Slot>,
    open: bool,
}

fn holds((width, prefix): Address, length: u32, (other, address): Address) -> bool {
    width == other && (length == 0 || (prefix ^ address) >> (128 - length) == 0)
}

fn source_and_destination(addresses: &Addresses) -> (Address, Address) {
    match *addresses {
        Addresses::V4 { source, destination } => {
            let left = |address: u32| (32, u128::from(u32::from_be(address)) << 96);
            (left(source), left(destination))
        }
        Addresses::V6 { source, destination } => {
            let left = |address: [u32; 4]| (128, u128::from_be_bytes(cast(address)));
            (left(source), left(destination))
        }
    }
}

impl Maps {
    fn longest(&self, address: Address) -> Option<Source> {
        let matching = self.sources.iter().filter(|(prefix, length, _)| holds(*prefix, *length, address));
        matching.max_by_key(|(_, length, _)| *length).map(|(.., source)| *source)
    }
}

impl Lookup for Maps {
    fn source(&self, addresses: &Addresses) -> Option<Source> {
        self.longest(source_and_destination(addresses).0)
    }

    fn destination_is_source(&self, addresses: &Addresses) -> bool {
        self.longest(source_and_destination(addresses).1).is_some()
    }

    fn exempt(&self, set: u32, addresses: &Addresses) -> bool {
        let destination = source_and_destination(addresses).1;
        self.exempt.iter().any(|(of, prefix, length)| *of == set && holds(*prefix, *length, destination))
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    fn open(&self, _addresses: &Addresses) -> bool {
        self.open
    }
}

/// The addresses in the bytes, read by hand; none if they are too few, or of another version.
fn addresses_in(ethertype: u16, packet: &[u8]) -> Option<Addresses> {
    let word = |at: usize| packet.get(at..at + 4).map(|bytes| u32::from_ne_bytes(bytes.try_into().expect("four bytes")));
    let wide = |at: usize| Some([word(at)?, word(at + 4)?, word(at + 8)?, word(at + 12)?]);
    let first = *packet.first()?;
    match ethertype {
        ETHERTYPE_IPV4 if first >> 4 == 4 && first & 0xf >= 5 => {
            Some(Addresses::V4 { source: word(12)?, destination: word(16)? })
        }
        ETHERTYPE_IPV6 if first >> 4 == 6 => Some(Addresses::V6 { source: wide(8)?, destination: wide(24)? }),
        _ => None,
    }
}

fn hop_limit_in(addresses: &Addresses, packet: &[u8]) -> u8 {
    packet[if matches!(addresses, Addresses::V4 { .. }) { 8 } else { 7 }]
}

/// The slots that a source leads to, one after the other, until one is reached that is not there.
fn chain(maps: &Maps, first: u32) -> Vec<(u32, &Slot)> {
    let mut chain = Vec::new();
    let mut index = first;
    while let Some(slot) = maps.slot(index)
        && chain.len() <= MAX_NESTING as usize
    {
        chain.push((index, slot));
        index = slot.next;
    }
    chain
}

impl Input {
    fn maps(&self, addresses: Option<&Addresses>) -> Maps {
        let prefix = |prefix: &Prefix| {
            let (width, address) = match (prefix.around, addresses.map(source_and_destination)) {
                (Some(true), Some((source, _))) => source,
                (Some(false), Some((_, destination))) => destination,
                (around, _) => (if around.is_some() { 32 } else { 128 }, u128::from_be_bytes(prefix.bytes)),
            };
            ((width, address), u32::from(prefix.length) % (width + 1))
        };
        let source = |(around, slot, arrives_by): &(Prefix, u8, u8)| {
            let (address, length) = prefix(around);
            let arrives_by = if *arrives_by == u8::MAX { Source::OWN_ADDRESS } else { u32::from(*arrives_by) };
            (address, length, Source { slot: u32::from(*slot), arrives_by })
        };
        let slot = |raw: &RawSlot| Slot {
            id: 1,
            egress: match raw.action {
                0..=127 => Egress::redirect(u32::from(raw.ifindex), (raw.egress & 7) as u16),
                128..=159 => Egress::down(Action::Reject),
                160..=191 => Egress::down(Action::Blackhole),
                192..=223 => Egress::down(Action::Next),
                // Any 64 bits.
                _ => cast(raw.egress),
            },
            mtu: u32::from(raw.mtu),
            exempt_set: u32::from(raw.exempt_set),
            next: if raw.next >= 128 { Slot::NO_NEXT } else { u32::from(raw.next) },
            reserved: 0,
            gateway: [0; 4],
        };
        let exempt = |(set, around): &(u8, Prefix)| {
            let (address, length) = prefix(around);
            (u32::from(*set), address, length)
        };
        Maps {
            sources: self.sources.iter().map(source).collect(),
            exempt: self.exempt.iter().map(exempt).collect(),
            slots: self.slots.iter().map(slot).collect(),
            open: self.open,
        }
    }
}

fn check_ingress(arrival: &Arrival, packet: &[u8], maps: &Maps) {
    let addresses = addresses_in(arrival.ethertype, packet);
    match decide_ingress(arrival, &Slice(packet), maps) {
        Verdict::Pass => {}
        Verdict::StepAside(index, _) => assert!(maps.slot(index).is_some() || !maps.open, "counted in no slot"),
        Verdict::Drop(index, _) => assert_eq!(maps.slots[index as usize].egress.action(), Action::Blackhole),
        Verdict::Redirect(index, slot, _) => {
            let addresses = addresses.expect("a packet that is redirected has addresses");
            assert!(maps.open && arrival.to_this_host && !arrival.tagged);
            assert!(hop_limit_in(&addresses, packet) > 1, "its hop limit has ended");
            assert!(packet.len() <= slot.mtu as usize, "too big");
            check_redirect(arrival, maps, &addresses, (index, slot));
            let source = maps.source(&addresses).expect("a source");
            assert!(source.arrives_by == Source::ANY_DEVICE || source.arrives_by == arrival.ifindex);
            if let Some(mut header) = Slice(packet).read::<Ipv4Header>(0).filter(|_| arrival.ethertype == ETHERTYPE_IPV4) {
                assert_eq!(header.version_ihl, 0x45, "options");
                header.checksum = header.checksum_after_hop();
                header.ttl -= 1;
                assert!(header.checksum_holds(), "the checksum after the hop: {header:?}");
            }
        }
    }
}

fn check_egress(arrival: &Arrival, packet: &[u8], maps: &Maps) {
    let verdict = decide_egress(arrival, &Slice(packet), maps);
    let Some(addresses) = addresses_in(arrival.ethertype, packet) else {
        assert_eq!(verdict, Verdict::Pass, "nothing can be said of it");
        return;
    };
    // As neighbour discovery is sent, or at least looks: with nothing to tell its type by.
    let discovery = matches!(addresses, Addresses::V6 { .. })
        && hop_limit_in(&addresses, packet) == 255
        && packet[6] == 58
        && packet.get(40).is_none_or(|kind| matches!(kind, 133..=137));
    match (verdict, maps.source(&addresses)) {
        (Verdict::Pass, None) => {}
        (Verdict::Pass, Some(_)) => assert!(addresses.stays_on_link() || discovery, "a policy's packet passes"),
        (Verdict::StepAside(..), source) => {
            let source = source.expect("only a policy's packet is counted");
            for (_, slot) in chain(maps, source.slot) {
                let next = slot.egress.action() == Action::Next;
                assert!(next || maps.exempt(slot.exempt_set, &addresses), "a policy applies, and the packet passes");
            }
        }
        (Verdict::Drop(..), source) => assert!(source.is_some(), "dropped, though no policy's"),
        (Verdict::Redirect(index, slot, _), _) => {
            assert!(!arrival.tagged);
            check_redirect(arrival, maps, &addresses, (index, slot));
        }
    }
}

/// The slot is the first in the chain that applies, and has a device which is not that of the packet.
fn check_redirect(arrival: &Arrival, maps: &Maps, addresses: &Addresses, (index, slot): (u32, &Slot)) {
    assert_eq!(slot.egress.action(), Action::Redirect);
    assert_ne!(slot.egress.ifindex(), arrival.ifindex, "back to where it came from");
    let source = maps.source(addresses).expect("only a policy's packet is redirected");
    let first = chain(maps, source.slot).into_iter().find(|(_, slot)| {
        slot.egress.action() != Action::Next && !maps.exempt(slot.exempt_set, addresses)
    });
    let (expected, its_slot) = first.expect("a policy applies");
    assert_eq!((expected, its_slot), (index, slot));
}

fuzz_target!(|input: Input| {
    let ethertype = input.ethertype.unwrap_or_else(|| {
        if input.packet.first().is_some_and(|first| first >> 4 == 6) { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 }
    });
    let arrival = Arrival {
        ethertype,
        ifindex: u32::from(input.ifindex),
        to_this_host: input.to_this_host,
        tagged: input.tagged,
    };
    let mut packet = input.packet.clone();
    // Nobody guesses a length and a checksum: every other packet has the right ones.
    if input.open && ethertype == ETHERTYPE_IPV4 && packet.len() >= 20 {
        let length = u16::try_from(packet.len()).unwrap_or(u16::MAX);
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet[10..12].fill(0);
        let mut sum: u32 = packet[..20].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    } else if input.open && ethertype == ETHERTYPE_IPV6 && packet.len() >= 40 {
        let length = u16::try_from(packet.len() - 40).unwrap_or(u16::MAX);
        packet[4..6].copy_from_slice(&length.to_be_bytes());
    }
    let maps = input.maps(addresses_in(ethertype, &packet).as_ref());
    check_ingress(&arrival, &packet, &maps);
    check_egress(&arrival, &packet, &maps);
});
