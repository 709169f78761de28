//! The lowered segment size against etherparse's reading and checksum.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use etherparse::{IpHeaders, PacketBuilder, PacketHeaders, TcpOptionElement, TransportHeader};
use proptest::prelude::*;
use tunroute_common::{
    maps::Clamp,
    mss::{Change, lower},
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Slice},
};

/// What the kernel's helpers do: the two bytes, and the checksum by RFC 1624.
fn apply(packet: &mut [u8], change: &Change) {
    packet[change.at..][..2].copy_from_slice(&change.value.to_ne_bytes());
    let checksum = u16::from_ne_bytes(packet[change.checksum..][..2].try_into().unwrap());
    let (lost, gained) = change.words;
    let mut sum = u32::from(!checksum) + u32::from(!lost) + u32::from(gained);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    packet[change.checksum..][..2].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_ne_bytes());
}

/// A segment with these bytes of options.
fn segment(v6: bool, syn: bool, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let builder = if v6 {
        PacketBuilder::ipv6([0x2a; 16], [0x20; 16], 64)
    } else {
        PacketBuilder::ipv4([10, 0, 0, 2], [192, 0, 2, 1], 64)
    };
    let mut tcp = builder.tcp(1234, 443, 77, 4096).options_raw(options).unwrap();
    if syn {
        tcp = tcp.syn();
    }
    let mut bytes = Vec::new();
    tcp.write(&mut bytes, payload).unwrap();
    bytes
}

fn ethertype(packet: &[u8]) -> u16 {
    if packet[0] >> 4 == 6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 }
}

/// The segment size that a packet tells, as etherparse reads it; its checksum must hold.
fn told(packet: &[u8]) -> Option<u16> {
    let headers = PacketHeaders::from_ip_slice(packet).unwrap();
    let Some(TransportHeader::Tcp(tcp)) = headers.transport else { panic!("no TCP: {headers:?}") };
    let payload = headers.payload.slice();
    let checksum = match headers.net.unwrap() {
        etherparse::NetHeaders::Ipv4(ip, _) => tcp.calc_checksum_ipv4(&ip, payload),
        etherparse::NetHeaders::Ipv6(ip, _) => tcp.calc_checksum_ipv6(&ip, payload),
        other => panic!("{other:?}"),
    };
    assert_eq!(tcp.checksum, checksum.unwrap(), "the checksum holds");
    let options = tcp.options_iterator().map_while(Result::ok);
    options.into_iter().find_map(|option| match option {
        TcpOptionElement::MaximumSegmentSize(size) => Some(size),
        _ => None,
    })
}

/// Options as they come, the size at any place among them; the last may be cut off.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let option = prop_oneof![
        4 => Just(vec![1]),
        1 => Just(vec![0]),
        3 => any::<u16>().prop_map(|size| [2, 4].into_iter().chain(size.to_be_bytes()).collect()),
        2 => Just(vec![4, 2]),
        2 => any::<u8>().prop_map(|shift| vec![3, 3, shift]),
        2 => any::<u64>().prop_map(|time| [8, 10].into_iter().chain(time.to_ne_bytes()).collect()),
    ];
    prop::collection::vec(option, 0..12).prop_map(|options| {
        let mut bytes = options.concat();
        bytes.truncate(40);
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_size_goes_down_and_all_else_stays(
        v6: bool,
        syn in prop::bool::weighted(0.8),
        options in options(),
        payload in prop::collection::vec(any::<u8>(), 0..9),
        v4_most in 88u16.., v6_most in 88u16..,
    ) {
        let before = segment(v6, syn, &options, &payload);
        let most = Clamp { v4: v4_most, v6: v6_most };
        let (own, size) = (if v6 { v6_most } else { v4_most }, told(&before));
        let mut after = before.clone();
        match lower(ethertype(&before), &Slice(&before), &most) {
            Some(change) => {
                apply(&mut after, &change);
                prop_assert!(syn && size > Some(own), "{:?} to {}", size, own);
                prop_assert_eq!(told(&after), Some(own));
                let changed = |index: &usize| before[*index] != after[*index];
                let allowed = [change.at, change.at + 1, change.checksum, change.checksum + 1];
                prop_assert!((0..before.len()).filter(changed).all(|index| allowed.contains(&index)));
            }
            None => prop_assert!(!syn || size.is_none_or(|size| size <= own), "{:?} stays over {}", size, own),
        }
    }

    /// Whatever arrives, nothing is read or changed beyond it.
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..120), v6: bool) {
        let ethertype = if v6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
        if let Some(change) = lower(ethertype, &Slice(&bytes), &Clamp { v4: 1, v6: 1 }) {
            prop_assert!(change.at + 2 <= bytes.len() && change.checksum + 2 <= bytes.len());
        }
    }
}

#[test]
fn what_is_left_alone() {
    let most = Clamp { v4: 1000, v6: 1000 };
    let size = [2, 4, 0x05, 0xb4];
    let syn = |v6| segment(v6, true, &size, &[]);
    for v6 in [false, true] {
        assert!(lower(ethertype(&syn(v6)), &Slice(&syn(v6)), &most).is_some());
        // Cut short anywhere, of another ethertype, or of another version.
        for length in 0..syn(v6).len() {
            assert_eq!(lower(ethertype(&syn(v6)), &Slice(&syn(v6)[..length]), &most), None, "{length}");
        }
        assert_eq!(lower(ethertype(&syn(!v6)), &Slice(&syn(v6)), &most), None);
        assert_eq!(lower(0x0806, &Slice(&syn(v6)), &most), None);
    }
    // A later fragment's payload looks like anything; the first one has the header.
    let mut fragment = syn(false);
    fragment[7] = 1;
    assert_eq!(lower(ETHERTYPE_IPV4, &Slice(&fragment), &most), None);
    (fragment[6], fragment[7]) = (0x20, 0);
    assert!(lower(ETHERTYPE_IPV4, &Slice(&fragment), &most).is_some());
    // Behind IPv4 options.
    let (ip, _) = IpHeaders::from_slice(&syn(false)).map(|(ip, ..)| (ip, ())).unwrap();
    let IpHeaders::Ipv4(mut ip, _) = ip else { panic!("no IPv4") };
    ip.options = [1, 1, 1, 0].into();
    ip.total_len += 4;
    let mut with_options = ip.to_bytes().to_vec();
    with_options.extend(&syn(false)[20..]);
    let change = lower(ETHERTYPE_IPV4, &Slice(&with_options), &most).unwrap();
    assert_eq!((change.at, change.checksum), (24 + 22, 24 + 16));
    // Options of kinds that nobody knows are passed over; lengths that cannot be end the search.
    let search = |options: &[u8]| {
        let packet = segment(false, true, options, &[]);
        lower(ETHERTYPE_IPV4, &Slice(&packet), &most).map(|change| change.at - 40)
    };
    assert_eq!(search(&[254, 5, 2, 4, 5, 2, 4, 0x05, 0xb4]), Some(7));
    for options in
        [[254, 0, 2, 4, 0x05, 0xb4], [254, 1, 2, 4, 0x05, 0xb4], [254, 99, 2, 4, 0x05, 0xb4], [0, 1, 2, 4, 5, 6]]
    {
        assert_eq!(search(&options), None, "{options:?}");
    }
    // The size with another length is another option.
    assert_eq!(search(&[2, 3, 0x05, 2, 4, 0x05, 0xb4]), Some(5));
    // UDP.
    let mut other = syn(true);
    other[6] = 17;
    assert_eq!(lower(ETHERTYPE_IPV6, &Slice(&other), &most), None);
}
