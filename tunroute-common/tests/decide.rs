//! The decision, case by case: packets built by etherparse, maps held in vectors.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;
use proptest::prelude::*;
use tunroute_common::{
    decide::{Arrival, Lookup, NextHop, Verdict, Way, decide_egress, decide_ingress},
    maps::{Action, Egress, Exempt, Exit, MAX_NESTING, Outcome, Slot, Source, flags},
    packet::{
        Addresses, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Header, Ipv4Header, Packet as _, Segmented, Slice, read_strict,
    },
};

/// The device that packets are seen at.
const LAN: u32 = 2;
/// The tunnel's device.
const TUNNEL: u32 = 7;
/// The tunnel's MTU.
const MTU: u32 = 1280;

/// The maps, searched by brute force: an oracle for the kernel's tries.
#[derive(Clone, Debug, Default)]
struct Maps {
    sources: Vec<(IpAddr, u8, Source)>,
    exempt: Vec<(u32, IpAddr, u8, Exempt)>,
    slots: Vec<Slot>,
    /// The exits, with their devices, by their numbers.
    exits: Vec<(u32, Exit)>,
    closed: bool,
    own: Vec<IpAddr>,
    /// The main table's only route, and the longest packet that it takes.
    main: Option<(NextHop, u32)>,
}

fn holds(prefix: IpAddr, length: u8, address: IpAddr) -> bool {
    let bits = |address| match address {
        IpAddr::V4(address) => (32, u128::from(u32::from(address))),
        IpAddr::V6(address) => (128, u128::from(address)),
    };
    let ((width, prefix), (other, address)) = (bits(prefix), bits(address));
    width == other && (prefix ^ address).checked_shr(width - u32::from(length)).unwrap_or(0) == 0
}

fn source_and_destination(addresses: &Addresses) -> (IpAddr, IpAddr) {
    match *addresses {
        Addresses::V4 { source, destination } => {
            (Ipv4Addr::from(source.to_ne_bytes()).into(), Ipv4Addr::from(destination.to_ne_bytes()).into())
        }
        Addresses::V6 { source, destination } => {
            let address = |words| Ipv6Addr::from(bytemuck::cast::<[u32; 4], [u8; 16]>(words)).into();
            (address(source), address(destination))
        }
    }
}

impl Maps {
    fn longest(&self, address: IpAddr) -> Option<Source> {
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

    fn exempt(&self, set: u32, addresses: &Addresses) -> Exempt {
        let destination = source_and_destination(addresses).1;
        let holding = self.exempt.iter().filter(|(of, at, length, _)| *of == set && holds(*at, *length, destination));
        holding.max_by_key(|(_, _, length, _)| *length).map_or(Exempt::No, |(.., kind)| *kind)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(index as usize).copied()
    }

    fn way(&self, number: u32) -> Option<Way<'_>> {
        self.exits.get(number as usize).map(|(ifindex, exit)| Way { number, ifindex: *ifindex, exit })
    }

    fn touches_host(&self, addresses: &Addresses) -> bool {
        let (source, destination) = source_and_destination(addresses);
        self.own.contains(&source) || self.own.contains(&destination)
    }

    fn forwards_unmatched(&self, _addresses: &Addresses) -> bool {
        self.main.is_some()
    }

    fn main_route(&self, _arrival: &Arrival, _header: &Header, length: u32) -> Option<NextHop> {
        self.main.filter(|(_, longest)| length <= *longest).map(|(next_hop, _)| next_hop)
    }

    fn open(&self, _addresses: &Addresses) -> bool {
        !self.closed
    }
}

fn slot(egress: Egress, next: u32) -> Slot {
    Slot { id: 1, egress, exempt_set: 0, next, table: 0, reserved: 0 }
}

/// The exits by the tunnel, by a tunnel that answers a packet that is too big, by the LAN, and by another tunnel.
const TO_TUNNEL: Egress = Egress::redirect(0);
const TO_ANSWERING: Egress = Egress::redirect(1);
const TO_LAN: Egress = Egress::redirect(2);
const TO_OTHER: Egress = Egress::redirect(3);
/// An exit whose device is gone.
const TO_NOWHERE: Egress = Egress::redirect(4);

fn exits() -> Vec<(u32, Exit)> {
    let devices = [(TUNNEL, 0), (TUNNEL, flags::ANSWERS_TOO_BIG), (LAN, 0), (TUNNEL + 1, 0)];
    devices.map(|(ifindex, flags)| (ifindex, Exit { mtu: MTU, flags, gateway: [0; 4] })).into()
}

/// 2a02::/16 and 10.0.0.0/8 leave by the tunnel.
fn maps() -> Maps {
    let source = Source { slot: 0, arrives_by: Source::ANY_DEVICE };
    Maps {
        sources: vec![(address("2a02::"), 16, source), (address("10.0.0.0"), 8, source)],
        exempt: [("2001:db8:1::", 48), ("192.0.2.0", 24)]
            .map(|(at, length)| (0, address(at), length, Exempt::Anywhere))
            .into(),
        slots: vec![slot(TO_TUNNEL, Slot::NO_NEXT)],
        exits: exits(),
        ..Maps::default()
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A UDP packet from the network header on.
fn udp(source: &str, destination: &str, hop_limit: u8, payload: usize) -> Vec<u8> {
    let builder = match (address(source), address(destination)) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            PacketBuilder::ipv4(source.octets(), destination.octets(), hop_limit)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            PacketBuilder::ipv6(source.octets(), destination.octets(), hop_limit)
        }
        _ => panic!("{source} and {destination} are of two families"),
    };
    let builder = builder.udp(1000, 2000);
    let mut packet = Vec::new();
    builder.write(&mut packet, &vec![0xab; payload]).unwrap();
    packet
}

fn v6() -> Vec<u8> {
    udp("2a02::2", "2001:db8::1", 64, 10)
}

fn v4() -> Vec<u8> {
    udp("10.0.0.2", "198.51.100.1", 64, 10)
}

fn arrival(packet: &[u8]) -> Arrival {
    let ethertype = if packet.first().is_some_and(|first| first >> 4 == 6) { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
    Arrival { ethertype, ifindex: LAN, to_this_host: true, tagged: false }
}

/// What becomes of a packet, without the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Pass,
    Aside(Outcome),
    Drop(Outcome),
    Tunnel(u32, Outcome),
    Main(NextHop),
}

fn fate(verdict: Verdict<'_>) -> Fate {
    match verdict {
        Verdict::Pass => Fate::Pass,
        Verdict::Forward(next_hop) => Fate::Main(next_hop),
        Verdict::StepAside(_, outcome) => Fate::Aside(outcome),
        Verdict::Drop(_, outcome) => Fate::Drop(outcome),
        Verdict::Redirect(_, way, outcome) => Fate::Tunnel(way.ifindex, outcome),
    }
}

fn ingress(packet: &[u8], maps: &Maps) -> Fate {
    fate(decide_ingress(&arrival(packet), &Slice(packet), maps))
}

fn egress(packet: &[u8], maps: &Maps) -> Fate {
    fate(decide_egress(&arrival(packet), &Slice(packet), maps))
}

#[test]
fn policy_packets_go_by_the_tunnel() {
    for packet in [v4(), v6()] {
        assert_eq!(ingress(&packet, &maps()), Fate::Tunnel(TUNNEL, Outcome::Forwarded));
        assert_eq!(egress(&packet, &maps()), Fate::Tunnel(TUNNEL, Outcome::Diverted));
    }
}

/// Whatever a packet's source, these are left to the kernel on the way in. On the way out only what stays on the link
/// passes: `(source, destination, stays on the link)`.
#[test]
fn special_addresses_pass() {
    let everything = Maps {
        sources: vec![
            (address("::"), 0, Source { slot: 0, arrives_by: 0 }),
            (address("0.0.0.0"), 0, Source { slot: 0, arrives_by: 0 }),
        ],
        ..maps()
    };
    for (source, destination, stays) in [
        ("fe80::1", "2001:db8::1", false),
        ("2a02::2", "fe80::1", true),
        ("2a02::2", "febf::1", true),
        ("2a02::2", "ff02::1", true),
        ("2a02::2", "ff0e::1", true),
        ("::1", "2001:db8::1", false),
        ("2a02::2", "::1", true),
        ("::", "2001:db8::1", false),
        ("2a02::2", "::ffff:10.0.0.1", false),
        ("127.0.0.1", "198.51.100.1", false),
        ("10.0.0.2", "127.0.0.1", true),
        ("0.0.0.0", "198.51.100.1", false),
        ("169.254.0.1", "198.51.100.1", false),
        ("10.0.0.2", "169.254.255.1", false),
        ("10.0.0.2", "224.0.0.1", true),
        ("10.0.0.2", "255.255.255.255", true),
    ] {
        let packet = udp(source, destination, 64, 10);
        assert_eq!(ingress(&packet, &everything), Fate::Pass, "{source} to {destination}");
        let expected = if stays { Fate::Pass } else { Fate::Tunnel(TUNNEL, Outcome::Diverted) };
        assert_eq!(egress(&packet, &everything), expected, "{source} to {destination}");
    }
    // Just beside the special ranges.
    for (source, destination) in
        [("2a02::2", "fec0::1"), ("2a02::2", "::2"), ("10.0.0.2", "169.253.255.255"), ("10.0.0.2", "223.255.255.255")]
    {
        let packet = udp(source, destination, 64, 10);
        assert_eq!(
            ingress(&packet, &everything),
            Fate::Tunnel(TUNNEL, Outcome::Forwarded),
            "{source} to {destination}"
        );
    }
}

#[test]
fn neighbour_discovery_passes_and_other_icmp_does_not() {
    for (kind, ours) in [(132, true), (133, false), (135, false), (136, false), (137, false), (138, true), (128, true)]
    {
        let mut packet = v6();
        packet[6] = 58;
        packet[40] = kind;
        let expected = if ours { Fate::Tunnel(TUNNEL, Outcome::Forwarded) } else { Fate::Pass };
        assert_eq!(ingress(&packet, &maps()), expected, "ICMPv6 type {kind}");
    }
}

#[test]
fn packets_for_others_tagged_or_of_other_kinds_pass() {
    let packet = v6();
    let maps = maps();
    let decide = |arrival: Arrival| fate(decide_ingress(&arrival, &Slice(&packet), &maps));
    let usual = arrival(&packet);
    assert_eq!(decide(Arrival { to_this_host: false, ..usual }), Fate::Pass);
    assert_eq!(decide(Arrival { tagged: true, ..usual }), Fate::Pass);
    assert_eq!(decide(Arrival { ethertype: 0x0806, ..usual }), Fate::Pass);
    assert_eq!(decide(Arrival { ethertype: ETHERTYPE_IPV4, ..usual }), Fate::Pass);
    let tagged = fate(decide_egress(&Arrival { tagged: true, ..usual }, &Slice(&packet), &maps));
    assert_eq!(tagged, Fate::Drop(Outcome::LeakPrevented));
}

/// A header that a router must look at twice is left to the kernel on the way in; on the way out of an uplink, the stack
/// has looked, and the packet must not leave there.
#[test]
fn odd_headers_step_aside_but_do_not_leak() {
    let changed = |mut packet: Vec<u8>, at: usize, to: u8| {
        packet[at] = to;
        packet
    };
    let options = {
        let mut packet = v4();
        packet[0] = 0x46;
        packet.splice(20..20, [1, 1, 1, 0]);
        let length = u16::try_from(packet.len()).unwrap();
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet
    };
    let padded = {
        let mut packet = v4();
        packet.extend([0; 6]);
        packet
    };
    for (what, packet) in [
        ("IPv4 options", options),
        ("IPv4 checksum", changed(v4(), 10, 0x55)),
        ("IPv4 total length", changed(v4(), 3, 200)),
        ("padding behind IPv4", padded),
        ("hop-by-hop header", changed(v6(), 6, 0)),
        ("IPv6 payload length", changed(v6(), 5, 200)),
    ] {
        assert_eq!(ingress(&packet, &maps()), Fate::Pass, "{what}");
        assert_eq!(egress(&packet, &maps()), Fate::Tunnel(TUNNEL, Outcome::Diverted), "{what}");
    }
    for (what, packet) in [("IPv4 header length", changed(v4(), 0, 0x44)), ("version", changed(v4(), 0, 0x55))] {
        assert_eq!(ingress(&packet, &maps()), Fate::Pass, "{what}");
        assert_eq!(egress(&packet, &maps()), Fate::Pass, "{what}");
    }
}

#[test]
fn fragments_are_forwarded_like_anything_else() {
    let mut packet = v4();
    packet[6] = 0x20;
    let (mut header, _) = etherparse::Ipv4Header::from_slice(&packet).unwrap();
    header.header_checksum = header.calc_header_checksum();
    packet[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
    assert_eq!(ingress(&packet, &maps()), Fate::Tunnel(TUNNEL, Outcome::Forwarded));
}

#[test]
fn hop_limit_and_size() {
    for (hop_limit, expected) in [
        (0, Fate::Aside(Outcome::Expired)),
        (1, Fate::Aside(Outcome::Expired)),
        (2, Fate::Tunnel(TUNNEL, Outcome::Forwarded)),
    ] {
        for packet in [udp("2a02::2", "2001:db8::1", hop_limit, 10), udp("10.0.0.2", "198.51.100.1", hop_limit, 10)] {
            assert_eq!(ingress(&packet, &maps()), expected, "hop limit {hop_limit}");
            assert_eq!(egress(&packet, &maps()), Fate::Tunnel(TUNNEL, Outcome::Diverted), "hop limit {hop_limit}");
        }
    }
    let (fits, too_big) = (MTU as usize - 48, MTU as usize - 47);
    let packet = |payload| udp("2a02::2", "2001:db8::1", 64, payload);
    assert_eq!(ingress(&packet(fits), &maps()), Fate::Tunnel(TUNNEL, Outcome::Forwarded));
    assert_eq!(ingress(&packet(too_big), &maps()), Fate::Aside(Outcome::TooBig));
    assert_eq!(egress(&packet(too_big), &maps()), Fate::Drop(Outcome::LeakPrevented));
    let answering = Maps { slots: vec![slot(TO_ANSWERING, Slot::NO_NEXT)], ..maps() };
    assert_eq!(egress(&packet(too_big), &answering), Fate::Tunnel(TUNNEL, Outcome::Diverted));
}

#[test]
fn segments_count_not_the_whole() {
    let mut packet = Vec::new();
    let source: Ipv6Addr = "2a02::2".parse().unwrap();
    let destination: Ipv6Addr = "2001:db8::1".parse().unwrap();
    let builder = PacketBuilder::ipv6(source.octets(), destination.octets(), 64).tcp(1, 2, 3, 4);
    builder.write(&mut packet, &[0; 20_000]).unwrap();
    let decide = |gso_size| fate(decide_ingress(&arrival(&packet), &Segmented(Slice(&packet), gso_size), &maps()));
    assert_eq!(decide(0), Fate::Aside(Outcome::TooBig));
    assert_eq!(decide(MTU - 60), Fate::Tunnel(TUNNEL, Outcome::Forwarded));
    assert_eq!(decide(MTU - 59), Fate::Aside(Outcome::TooBig));
    // Other protocols may carry a tunnel, whose segments are not as long as they look.
    packet[6] = 17;
    let decide = |gso_size| fate(decide_ingress(&arrival(&packet), &Segmented(Slice(&packet), gso_size), &maps()));
    assert_eq!(decide(100), Fate::Aside(Outcome::TooBig));
}

/// What the fast path was found to decide wrongly is the kernel's on the way in; the uplink stays guarded.
#[test]
fn a_disputed_policy_is_left_to_the_kernel_and_does_not_leak() {
    let disputed = |egress: Egress| Maps { slots: vec![slot(egress.disputed(true), Slot::NO_NEXT)], ..maps() };
    for (egress_word, out) in [
        (TO_TUNNEL, Fate::Tunnel(TUNNEL, Outcome::Diverted)),
        (Egress::down(Action::Reject), Fate::Drop(Outcome::LeakPrevented)),
        (Egress::down(Action::Blackhole), Fate::Drop(Outcome::LeakPrevented)),
    ] {
        for packet in [v4(), v6()] {
            assert_eq!(ingress(&packet, &disputed(egress_word)), Fate::Aside(Outcome::Closed), "{egress_word:?}");
            assert_eq!(egress(&packet, &disputed(egress_word)), out, "{egress_word:?}");
        }
        assert_eq!(egress_word.disputed(true).disputed(false), egress_word);
    }
}

#[test]
fn where_a_packet_may_come_from() {
    let arriving =
        |arrives_by| Maps { sources: vec![(address("10.0.0.0"), 8, Source { slot: 0, arrives_by })], ..maps() };
    let tunnelled = Fate::Tunnel(TUNNEL, Outcome::Forwarded);
    assert_eq!(ingress(&v4(), &arriving(LAN)), tunnelled);
    for arrives_by in [LAN + 1, Source::OWN_ADDRESS] {
        assert_eq!(ingress(&v4(), &arriving(arrives_by)), Fate::Aside(Outcome::SourceCheck));
        assert_eq!(egress(&v4(), &arriving(arrives_by)), Fate::Tunnel(TUNNEL, Outcome::Diverted));
    }
    // The reverse path is by policy, too.
    let between = udp("10.0.0.2", "10.1.0.1", 64, 10);
    assert_eq!(ingress(&between, &arriving(LAN)), Fate::Aside(Outcome::SourceCheck));
    assert_eq!(ingress(&between, &arriving(Source::ANY_DEVICE)), tunnelled);
}

#[test]
fn what_happens_while_no_tunnel_is_up() {
    for (action, on_ingress, on_egress) in [
        (Action::Reject, Fate::Aside(Outcome::Down), Fate::Drop(Outcome::LeakPrevented)),
        (Action::Blackhole, Fate::Drop(Outcome::Blackholed), Fate::Drop(Outcome::LeakPrevented)),
        (Action::Next, Fate::Aside(Outcome::Down), Fate::Aside(Outcome::Down)),
        (Action::Main, Fate::Aside(Outcome::Main), Fate::Aside(Outcome::Main)),
    ] {
        let maps = Maps { slots: vec![slot(Egress::down(action), Slot::NO_NEXT)], ..maps() };
        assert_eq!(ingress(&v6(), &maps), on_ingress, "{action:?}");
        assert_eq!(egress(&v6(), &maps), on_egress, "{action:?}");
    }
    let gone = Maps { slots: vec![slot(TO_NOWHERE, Slot::NO_NEXT)], ..maps() };
    assert_eq!(ingress(&v6(), &gone), Fate::Aside(Outcome::Down));
    assert_eq!(egress(&v6(), &gone), Fate::Drop(Outcome::LeakPrevented));
    let hairpin = Maps { slots: vec![slot(TO_LAN, Slot::NO_NEXT)], ..maps() };
    assert_eq!(ingress(&v6(), &hairpin), Fate::Aside(Outcome::Hairpin));
    let closed = Maps { closed: true, ..maps() };
    assert_eq!(ingress(&v6(), &closed), Fate::Aside(Outcome::Closed));
    assert_eq!(egress(&v6(), &closed), Fate::Tunnel(TUNNEL, Outcome::Diverted));
}

#[test]
fn nested_policies_are_passed_over() {
    let exempt = udp("2a02::2", "2001:db8:1::1", 64, 10);
    assert_eq!(ingress(&exempt, &maps()), Fate::Aside(Outcome::Exempt));
    assert_eq!(egress(&exempt, &maps()), Fate::Aside(Outcome::Exempt));

    // What leads inside is exempt where it enters, and not at an uplink; a part of it may not be exempt at all.
    let mut inside = maps();
    inside.exempt[0].3 = Exempt::Inside;
    assert_eq!(ingress(&exempt, &inside), Fate::Aside(Outcome::Exempt));
    assert_eq!(egress(&exempt, &inside), Fate::Tunnel(TUNNEL, Outcome::Diverted));
    inside.exempt.push((0, address("2001:db8:1::"), 64, Exempt::No));
    assert_eq!(ingress(&exempt, &inside), Fate::Tunnel(TUNNEL, Outcome::Forwarded));

    let outer = Slot { exempt_set: 1, ..slot(TO_OTHER, Slot::NO_NEXT) };
    let nested = Maps { slots: vec![slot(TO_TUNNEL, 1), outer], ..maps() };
    assert_eq!(ingress(&v6(), &nested), Fate::Tunnel(TUNNEL, Outcome::Forwarded));
    assert_eq!(ingress(&exempt, &nested), Fate::Tunnel(TUNNEL + 1, Outcome::Forwarded));
    let next = Maps { slots: vec![slot(Egress::down(Action::Next), 1), outer], ..maps() };
    assert_eq!(ingress(&v6(), &next), Fate::Tunnel(TUNNEL + 1, Outcome::Forwarded));
    assert_eq!(egress(&v6(), &next), Fate::Tunnel(TUNNEL + 1, Outcome::Diverted));
}

#[test]
fn the_deepest_nesting_is_followed_and_a_circle_ends() {
    let down = |next| slot(Egress::down(Action::Next), next);
    let mut slots: Vec<Slot> = (1..=MAX_NESTING).map(down).collect();
    slots.push(slot(TO_TUNNEL, Slot::NO_NEXT));
    assert_eq!(ingress(&v6(), &Maps { slots, ..maps() }), Fate::Tunnel(TUNNEL, Outcome::Forwarded));
    let circle = Maps { slots: vec![down(0)], ..maps() };
    assert_eq!(ingress(&v6(), &circle), Fate::Pass);
    assert_eq!(egress(&v6(), &circle), Fate::Drop(Outcome::LeakPrevented));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn any_bytes_are_decided(bytes in proptest::collection::vec(any::<u8>(), 0..120), v6: bool) {
        let ethertype = if v6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
        let arrival = Arrival { ethertype, ifindex: LAN, to_this_host: true, tagged: false };
        let maps = maps();
        // A redirect is only for what reads as a packet of a policy.
        if let Verdict::Redirect(..) = decide_ingress(&arrival, &Slice(&bytes), &maps) {
            prop_assert!(read_strict(ethertype, &Slice(&bytes)).is_some());
        }
        let _no_panic = decide_egress(&arrival, &Slice(&bytes), &maps);
    }

    #[test]
    fn cut_short_is_never_redirected(length in 0usize..58) {
        let packet = v6();
        let cut = &packet[..length.min(packet.len() - 1)];
        prop_assert_eq!(ingress(cut, &maps()), Fate::Pass);
    }

    /// The header's checksum holds as etherparse computes it, and after a hop again.
    #[test]
    fn checksum_is_kept(
        source: [u8; 4], destination: [u8; 4], ttl in 2u8.., id: u16, tos: u8, flip in 0usize..160, payload in 0usize..64,
    ) {
        let mut header = etherparse::Ipv4Header::new(0, ttl, etherparse::IpNumber::UDP, source, destination).unwrap();
        header.identification = id;
        header.dscp = etherparse::IpDscp::try_new(tos >> 2).unwrap();
        header.total_len = 20 + u16::try_from(payload).unwrap();
        header.header_checksum = header.calc_header_checksum();
        let bytes = header.to_bytes();
        let read = |bytes: &[u8]| Slice(bytes).read::<Ipv4Header>(0).unwrap();
        prop_assert!(read(&bytes).checksum_holds());

        let mut damaged = bytes.clone();
        damaged[flip / 8] ^= 1 << (flip % 8);
        prop_assert!(!read(&damaged).checksum_holds());

        let next_checksum = read(&bytes).checksum_after_hop();
        let mut forwarded = bytes.clone();
        forwarded[Ipv4Header::TTL_OFFSET] -= 1;
        forwarded[Ipv4Header::CHECKSUM_OFFSET..12].copy_from_slice(&next_checksum.to_ne_bytes());
        prop_assert!(read(&forwarded).checksum_holds());
        header.time_to_live -= 1;
        // Both representations of zero are valid; the kernel's way gives the one that etherparse gives, but for them.
        let expected = header.calc_header_checksum();
        let got = u16::from_be(next_checksum);
        prop_assert!(got == expected || (got == 0xffff && expected == 0) || (got == 0 && expected == 0xffff));
    }
}

/// What no policy is about goes where the main table says, where nothing else could come between.
#[test]
fn the_main_table_forwards_what_no_policy_is_about() {
    let next_hop = NextHop { ifindex: 9, address: [1, 2, 3, 4], is_v6: true };
    let others = udp("2a03::2", "2001:db8::1", 64, 10);
    let length = u32::try_from(others.len()).unwrap();
    let open = Maps { main: Some((next_hop, length)), ..maps() };
    assert_eq!(ingress(&others, &open), Fate::Main(next_hop));
    let back = NextHop { ifindex: LAN, ..next_hop };
    for (what, maps) in [
        ("the kernel must say", Maps { main: None, ..open.clone() }),
        ("too big", Maps { main: Some((next_hop, length - 1)), ..open.clone() }),
        ("back where it came from", Maps { main: Some((back, length)), ..open.clone() }),
        ("closed", Maps { closed: true, ..open.clone() }),
        ("to this host", Maps { own: vec![address("2001:db8::1")], ..open.clone() }),
        ("from an address of this host's", Maps { own: vec![address("2a03::2")], ..open.clone() }),
    ] {
        assert_eq!(ingress(&others, &maps), Fate::Pass, "{what}");
    }
    assert_eq!(ingress(&udp("2a03::2", "2001:db8::1", 1, 10), &open), Fate::Pass, "the hop limit ends");
    assert_eq!(ingress(&udp("fe80::2", "2001:db8::1", 64, 10), &open), Fate::Pass, "link-local");
    // What a policy is about never goes this way, whatever becomes of it.
    let down = Maps { slots: vec![slot(Egress::down(Action::Next), Slot::NO_NEXT)], ..open.clone() };
    assert_eq!(ingress(&v6(), &down), Fate::Aside(Outcome::Down));
    assert_eq!(egress(&others, &open), Fate::Pass, "it is on its way out already");
}
