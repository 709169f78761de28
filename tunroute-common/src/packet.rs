//! Bounds-checked reading of network headers.
//!
//! Offsets count from the network header. Nothing here trusts a length field: what does not fit the packet is not read.

use bytemuck::{Pod, Zeroable};

use crate::maps::{Ipv4, Ipv6};

/// `ETH_P_IP`
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// `ETH_P_IPV6`
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// `IPPROTO_TCP`
pub const PROTOCOL_TCP: u8 = 6;
/// `IPPROTO_ICMPV6`
pub const PROTOCOL_ICMPV6: u8 = 58;
/// `NEXTHDR_HOP`: the hop-by-hop options that every router must look at.
pub const NEXT_HEADER_HOP_BY_HOP: u8 = 0;

/// A packet from its network header on: an skb, an XDP frame or a byte slice.
pub trait Packet {
    /// Reads a `T` at `offset`, if the packet's directly readable part reaches that far.
    fn read<T: Pod>(&self, offset: usize) -> Option<T>;

    /// The layer 3 length in bytes.
    fn length(&self) -> u32;

    /// The payload bytes of each segment that this packet will be cut into; 0 if it will not.
    fn gso_size(&self) -> u32;
}

/// A packet in a byte slice, for everything outside the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a>(pub &'a [u8]);

impl Packet for Slice<'_> {
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        let bytes = self.0.get(offset..offset.checked_add(size_of::<T>())?)?;
        Some(bytemuck::pod_read_unaligned(bytes))
    }

    fn length(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    fn gso_size(&self) -> u32 {
        0
    }
}

/// A packet in a byte slice that will be cut into segments with this many payload bytes each.
#[derive(Clone, Copy, Debug)]
pub struct Segmented<'a>(pub Slice<'a>, pub u32);

impl Packet for Segmented<'_> {
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        self.0.read(offset)
    }

    fn length(&self) -> u32 {
        self.0.length()
    }

    fn gso_size(&self) -> u32 {
        self.1
    }
}

/// The fixed part of an IPv4 header; multi-byte fields in network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Ipv4Header {
    /// Version and header length in words.
    pub version_ihl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Header and payload, in bytes.
    pub total_length: u16,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Hop limit.
    pub ttl: u8,
    /// The payload's protocol.
    pub protocol: u8,
    /// Internet checksum of the header.
    pub checksum: u16,
    /// Source address.
    pub source: Ipv4,
    /// Destination address.
    pub destination: Ipv4,
}

impl Ipv4Header {
    /// Where the TTL stands.
    pub const TTL_OFFSET: usize = 8;
    /// Where the checksum stands.
    pub const CHECKSUM_OFFSET: usize = 10;

    /// The length of a header without options, in bytes.
    pub const LENGTH: u32 = 20;

    /// The internet checksum over the fixed header holds (RFC 1071). The byte order does not matter to it.
    #[inline(always)]
    #[must_use]
    pub fn checksum_holds(&self) -> bool {
        let words: [u32; 5] = bytemuck::cast(*self);
        let mut sum = 0u64;
        for word in words {
            sum += u64::from(word);
        }
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum == 0xffff
    }

    /// The checksum after the TTL went down by one (RFC 1624), in network byte order, as `ip_decrease_ttl()` in
    /// `include/net/ip.h` computes it.
    #[inline(always)]
    #[must_use]
    pub const fn checksum_after_hop(&self) -> u16 {
        let sum = self.checksum as u32 + 0x0100u16.to_be() as u32;
        #[expect(clippy::cast_possible_truncation, reason = "the carry is folded back in")]
        let folded = (sum + (sum >= 0xffff) as u32) as u16;
        folded
    }
}

/// An IPv6 header; multi-byte fields in network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Ipv6Header {
    /// Version, traffic class and flow label.
    pub version_class_flow: u32,
    /// The bytes after this header.
    pub payload_length: u16,
    /// The next header's number.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub source: Ipv6,
    /// Destination address.
    pub destination: Ipv6,
}

impl Ipv6Header {
    /// Where the hop limit stands.
    pub const HOP_LIMIT_OFFSET: usize = 7;
    /// The length of the header, in bytes.
    pub const LENGTH: u32 = 40;
}

/// Source and destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// Of an IPv4 packet.
    V4 {
        /// Source.
        source: Ipv4,
        /// Destination.
        destination: Ipv4,
    },
    /// Of an IPv6 packet.
    V6 {
        /// Source.
        source: Ipv6,
        /// Destination.
        destination: Ipv6,
    },
}

impl Addresses {
    /// One of the addresses is special: link-local, multicast, loopback, unspecified, broadcast. Such packets are not
    /// forwarded by source, and often not at all.
    #[inline(always)]
    #[must_use]
    pub const fn any_special(&self) -> bool {
        match self {
            Self::V4 { source, destination } => special_v4(*source) || special_v4(*destination),
            Self::V6 { source, destination } => special_v6(source) || special_v6(destination),
        }
    }
}

impl Addresses {
    /// The destination lies on the link that the packet is sent on, whatever rules say: multicast, IPv4 broadcast, IPv6
    /// link-local, loopback. Unlike IPv6 ones, Linux forwards to IPv4 link-local addresses, and to 0/8 and 240/4, too.
    #[inline(always)]
    #[must_use]
    pub const fn stays_on_link(&self) -> bool {
        match self {
            Self::V4 { destination, .. } => {
                let first = u32::from_be(*destination) >> 24;
                first == 127 || first >> 4 == 0xe || *destination == u32::MAX
            }
            Self::V6 { destination, .. } => {
                let [first, second, third, fourth] = *destination;
                let top = u32::from_be(first);
                top >> 24 == 0xff
                    || top >> 22 == 0xfe80 >> 6
                    || (first | second | third == 0 && u32::from_be(fourth) <= 1)
            }
        }
    }
}

/// 0/8 and 127/8, 169.254/16, 224/4 and 240/4 (the broadcast address among them).
const fn special_v4(address: Ipv4) -> bool {
    let address = u32::from_be(address);
    let first = address >> 24;
    first == 0 || first == 127 || first >= 224 || address >> 16 == 0xa9fe
}

/// ff00::/8, fe80::/10, `::` and `::1`, and IPv4-mapped addresses, which must not be seen on the wire.
const fn special_v6(address: &Ipv6) -> bool {
    let first = u32::from_be(address[0]);
    first >> 24 == 0xff
        || first >> 22 == 0xfe80 >> 6
        || (first == 0
            && address[1] == 0
            && (address[2] == 0 && u32::from_be(address[3]) <= 1 || u32::from_be(address[2]) == 0xffff))
}

/// What the decision needs to know of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source and destination.
    pub addresses: Addresses,
    /// The hop limit as received.
    pub hop_limit: u8,
    /// The payload's protocol, or the first extension header's number.
    pub protocol: u8,
    /// The network header's length in bytes, options included.
    pub length: u32,
    /// IPv4: the TOS byte. IPv6: traffic class and flow label, where they stand in the header's first word, in network byte
    /// order.
    pub class: u32,
}

/// Reads a network header that a router may forward without a second look: neither options nor hop-by-hop header, a valid
/// IPv4 checksum, and a length field that says what is there. `None`: leave it to the kernel.
#[inline(always)]
pub fn read_strict<P: Packet>(ethertype: u16, packet: &P) -> Option<Header> {
    match ethertype {
        ETHERTYPE_IPV4 => {
            let header = packet.read::<Ipv4Header>(0)?;
            if header.version_ihl != 0x45
                || u32::from(u16::from_be(header.total_length)) != packet.length()
                || !header.checksum_holds()
            {
                return None;
            }
            Some(header_v4(&header))
        }
        ETHERTYPE_IPV6 => {
            let header = packet.read::<Ipv6Header>(0)?;
            if u32::from_be(header.version_class_flow) >> 28 != 6
                || header.next_header == NEXT_HEADER_HOP_BY_HOP
                || u32::from(u16::from_be(header.payload_length)) + Ipv6Header::LENGTH != packet.length()
            {
                return None;
            }
            Some(header_v6(&header))
        }
        _ => None,
    }
}

/// Reads a network header that the stack has already checked: source and destination only.
#[inline(always)]
pub fn read_lenient<P: Packet>(ethertype: u16, packet: &P) -> Option<Header> {
    match ethertype {
        ETHERTYPE_IPV4 => {
            let header = packet.read::<Ipv4Header>(0)?;
            (header.version_ihl >> 4 == 4 && header.version_ihl & 0xf >= 5).then(|| header_v4(&header))
        }
        ETHERTYPE_IPV6 => {
            let header = packet.read::<Ipv6Header>(0)?;
            (u32::from_be(header.version_class_flow) >> 28 == 6).then(|| header_v6(&header))
        }
        _ => None,
    }
}

#[inline(always)]
fn header_v4(header: &Ipv4Header) -> Header {
    Header {
        addresses: Addresses::V4 { source: header.source, destination: header.destination },
        hop_limit: header.ttl,
        protocol: header.protocol,
        length: u32::from(header.version_ihl & 0xf) * 4,
        class: u32::from(header.tos),
    }
}

#[inline(always)]
fn header_v6(header: &Ipv6Header) -> Header {
    Header {
        addresses: Addresses::V6 { source: header.source, destination: header.destination },
        hop_limit: header.hop_limit,
        protocol: header.next_header,
        length: Ipv6Header::LENGTH,
        class: header.version_class_flow & 0x0fff_ffff_u32.to_be(),
    }
}

impl Header {
    /// Neighbour and router discovery (ICMPv6 types 133 to 137), which speaks for the link and is never forwarded.
    #[inline(always)]
    pub fn is_neighbour_discovery<P: Packet>(&self, packet: &P) -> bool {
        matches!(self.addresses, Addresses::V6 { .. })
            && self.protocol == PROTOCOL_ICMPV6
            && packet.read::<u8>(size_of::<Ipv6Header>()).is_none_or(|kind| matches!(kind, 133..=137))
    }

    /// The layer 3 length of the largest packet that will be on the wire, in bytes: of each segment, if the packet will
    /// be cut (`skb_gso_network_seglen()` in `net/core/gso.c`). `None`: it will be cut in a way not visible here.
    #[inline(always)]
    pub fn length_on_wire<P: Packet>(&self, packet: &P) -> Option<u32> {
        let gso_size = packet.gso_size();
        if gso_size == 0 {
            return Some(packet.length());
        }
        // Only directly behind a header without options can the eBPF verifier follow the offset.
        let offset = match self.addresses {
            Addresses::V4 { .. } if self.length == Ipv4Header::LENGTH => size_of::<Ipv4Header>(),
            Addresses::V6 { .. } => size_of::<Ipv6Header>(),
            Addresses::V4 { .. } => return None,
        };
        // Other protocols may carry a tunnel, whose segments are cut further inside.
        if self.protocol != PROTOCOL_TCP {
            return None;
        }
        let data_offset = packet.read::<u8>(offset + 12)? >> 4;
        Some(self.length + u32::from(data_offset) * 4 + gso_size)
    }
}
