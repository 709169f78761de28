//! Random packets to and from the edges of a scenario's prefixes, and everything that can be wrong with one.

use std::{fmt, net::IpAddr};

use etherparse::{IpNumber, Ipv4Header};
use proptest::{
    prelude::*,
    sample::{Index, select},
};
use tunroute::policy::net::Family;
use tunroute_common::packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};

use super::scenario::{DEVICES, Scenario};

/// How to make a packet, whatever the scenario is.
#[derive(Clone, Debug)]
pub struct Recipe {
    family: Family,
    source: Pick,
    destination: Pick,
    hop_limit: u8,
    protocol: u8,
    size: Size,
    gso: u32,
    oddity: Oddity,
    device: Index,
}

/// How to choose an address.
#[derive(Clone, Debug)]
enum Pick {
    /// An edge of a prefix.
    Edge(Index),
    /// An edge of a policy's source prefix.
    Source(Index),
    /// Any address.
    Any(u128),
}

/// How long a packet is.
#[derive(Clone, Debug)]
enum Size {
    /// This many bytes of payload.
    Payload(usize),
    /// As long as the MTU of a tunnel, or by so much longer or shorter.
    Mtu(Index, isize),
}

/// What is odd about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Oddity {
    /// Nothing.
    None,
    /// A fragment: of 8 bytes' offset or the first, with more to come or not.
    Fragment(u8, bool),
    /// Extension headers that are not a router's business; for IPv4 nothing.
    Extension(u8),
    /// IPv4 options, or a hop-by-hop header.
    Options,
    /// The IPv4 checksum is wrong; for IPv6, as the next.
    Checksum,
    /// The length field says that much more or less than there is.
    Length(i16),
    /// Another IP version than the link layer says.
    Version(u8),
    /// An IPv4 header that says it is shorter than a header can be.
    HeaderLength(u8),
    /// Cut off after so many bytes, perhaps in the header.
    Truncated(usize),
    /// The link layer says that it is something else.
    Ethertype(u16),
    /// It is for somebody else's link-layer address.
    ForOthers,
    /// It carries a VLAN tag.
    Tagged,
}

/// A packet, and what a test needs to know of it without reading it.
#[derive(Clone)]
pub struct Packet {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes to.
    pub destination: IpAddr,
    /// As it arrives.
    pub hop_limit: u8,
    /// What is odd about it.
    pub oddity: Oddity,
    /// The name of the device that it arrives at.
    pub device: &'static str,
    /// What the link layer says that it is.
    pub ethertype: u16,
    /// The payload's protocol, or the number of the first extension header.
    pub protocol: u8,
    /// Where the payload, or the first extension header, starts.
    pub header: usize,
    /// The payload bytes of each segment; 0 if it is not to be cut.
    pub gso: u32,
    /// From the network header on.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, destination, hop_limit, oddity, device, ethertype, protocol, gso, bytes, .. } = self;
        let length = bytes.len();
        write!(f, "{source} to {destination} by {device}, {length} bytes of {ethertype:04x}, protocol {protocol}, ")?;
        write!(f, "hop limit {hop_limit}, gso {gso}, oddity {oddity:?}; begins with {:02x?}", &bytes[..length.min(60)])
    }
}

fn pick() -> impl Strategy<Value = Pick> {
    let edge = any::<Index>().prop_map(Pick::Edge);
    let source = any::<Index>().prop_map(Pick::Source);
    prop_oneof![3 => edge, 5 => source, 1 => any::<u128>().prop_map(Pick::Any)]
}

fn oddity() -> impl Strategy<Value = Oddity> {
    let other = select(vec![0x0806u16, 0x8100, 0x88a8, ETHERTYPE_IPV4, ETHERTYPE_IPV6]);
    prop_oneof![
        24 => Just(Oddity::None),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(offset, more)| Oddity::Fragment(offset, more)),
        1 => select(vec![43u8, 44, 51, 60]).prop_map(Oddity::Extension),
        1 => Just(Oddity::Options),
        1 => Just(Oddity::Checksum),
        1 => prop_oneof![-40i16..0, 1i16..1000].prop_map(Oddity::Length),
        1 => (0u8..16).prop_filter("another version", |v| !matches!(v, 4 | 6)).prop_map(Oddity::Version),
        1 => (0u8..5).prop_map(Oddity::HeaderLength),
        1 => (0usize..64).prop_map(Oddity::Truncated),
        1 => other.prop_map(Oddity::Ethertype),
        1 => Just(Oddity::ForOthers),
        1 => Just(Oddity::Tagged),
    ]
}

/// Any packet.
pub fn recipe() -> impl Strategy<Value = Recipe> {
    let hop_limit = prop_oneof![1 => 0u8..3, 6 => any::<u8>(), 1 => Just(255)];
    let size = prop_oneof![
        6 => (0usize..100).prop_map(Size::Payload),
        3 => (any::<Index>(), -2isize..=2).prop_map(|(tunnel, by)| Size::Mtu(tunnel, by)),
        1 => (100usize..2000).prop_map(Size::Payload),
    ];
    let gso = prop_oneof![12 => Just(0u32), 1 => 1u32..1500];
    let family = select(Family::ALL.to_vec());
    let protocol = select(vec![6u8, 17, 58, 1, 4, 41]);
    (family, (pick(), pick()), hop_limit, protocol, size, gso, oddity(), any::<Index>()).prop_map(
        |(family, (source, destination), hop_limit, protocol, size, gso, oddity, device)| Recipe {
            family,
            source,
            destination,
            hop_limit,
            protocol,
            size,
            gso,
            oddity,
            device,
        },
    )
}

impl Pick {
    fn address(&self, scenario: &Scenario, family: Family, edges: &[IpAddr]) -> IpAddr {
        match self {
            Self::Source(index) => {
                let sources = scenario.config.policies.iter().flat_map(|policy| &policy.from);
                let sources: Vec<_> = sources.filter(|prefix| Family::of(prefix) == family).collect();
                if sources.is_empty() {
                    return Self::Edge(*index).address(scenario, family, edges);
                }
                let prefix = index.get(&sources);
                if prefix.prefix_len() % 2 == 0 { prefix.network() } else { prefix.broadcast() }
            }
            Self::Edge(index) => *index.get(edges),
            #[expect(clippy::cast_possible_truncation, reason = "any address")]
            Self::Any(bits) => match family {
                Family::V4 => (*bits as u32).to_be_bytes().into(),
                Family::V6 => bits.to_be_bytes().into(),
            },
        }
    }
}

/// The edges of a scenario's prefixes in both families.
pub struct Edges([Vec<IpAddr>; 2]);

impl Edges {
    /// Of this scenario.
    pub fn of(scenario: &Scenario) -> Self {
        Self(Family::ALL.map(|family| scenario.edges(family)))
    }
}

impl Recipe {
    /// Makes the packet.
    pub fn cook(&self, scenario: &Scenario, edges: &Edges) -> Packet {
        let edges = &edges.0[usize::from(self.family == Family::V6)];
        let source = self.source.address(scenario, self.family, edges);
        let destination = self.destination.address(scenario, self.family, edges);
        let header = match (self.family, self.oddity) {
            (Family::V4, Oddity::Options) => 24,
            (Family::V4, _) => 20,
            (Family::V6, _) => 40,
        };
        let length = match &self.size {
            Size::Payload(length) => *length,
            Size::Mtu(tunnel, by) => {
                let mtu = tunnel.get(&scenario.tunnels).mtu as usize;
                mtu.saturating_add_signed(*by) - header
            }
        };
        let mut packet = Packet {
            source,
            destination,
            hop_limit: self.hop_limit,
            oddity: self.oddity,
            device: index_of_device(&self.device),
            ethertype: if self.family == Family::V4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 },
            protocol: self.protocol,
            header,
            gso: self.gso,
            bytes: Vec::new(),
        };
        // Recognisable, and with something in every field that a protocol might have there.
        let payload = (0..=250).cycle().take(length).map(|byte: u8| byte ^ self.hop_limit);
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                packet.write_v4(source.octets(), destination.octets(), payload);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                packet.write_v6(source.octets(), destination.octets(), payload);
            }
            _ => unreachable!("both addresses are of the recipe's family"),
        }
        packet.damage();
        packet
    }
}

/// Mostly the ingress devices, sometimes a tunnel: what came from there and goes there is answered by the kernel.
fn index_of_device(index: &Index) -> &'static str {
    let devices: Vec<&str> = DEVICES.iter().map(|(name, _)| *name).filter(|name| !name.starts_with("tun")).collect();
    devices[index.index(devices.len())]
}

impl Packet {
    /// The family, as the link layer says it where nothing is wrong.
    pub fn family(&self) -> Family {
        Family::of_addr(&self.source)
    }

    fn write_v4(&mut self, source: [u8; 4], destination: [u8; 4], payload: impl Iterator<Item = u8>) {
        let length = u16::try_from(payload.size_hint().0).unwrap_or(u16::MAX);
        let number = IpNumber(self.protocol);
        let mut header =
            Ipv4Header::new(length, self.hop_limit, number, source, destination).expect("a length that fits");
        header.identification = u16::from(self.hop_limit) << 5;
        header.dont_fragment = self.hop_limit.is_multiple_of(2);
        if let Oddity::Fragment(offset, more) = self.oddity {
            header.dont_fragment = false;
            header.more_fragments = more;
            header.fragment_offset = u16::from(offset).try_into().expect("a small offset");
        }
        if self.oddity == Oddity::Options {
            header.options = [1, 1, 1, 0].into();
            header.total_len += 4;
        }
        header.header_checksum = header.calc_header_checksum();
        self.bytes = header.to_bytes().into_iter().chain(payload).collect();
    }

    fn write_v6(&mut self, source: [u8; 16], destination: [u8; 16], payload: impl Iterator<Item = u8>) {
        let extension = match self.oddity {
            Oddity::Fragment(offset, more) => {
                let offset = u16::from(offset) << 3 | u16::from(more);
                let [high, low] = offset.to_be_bytes();
                Some((44, [self.protocol, 0, high, low, 0, 0, 0, 1]))
            }
            Oddity::Extension(number) => Some((number, [self.protocol, 0, 1, 4, 0, 0, 0, 0])),
            Oddity::Options => Some((0, [self.protocol, 0, 1, 4, 0, 0, 0, 0])),
            _ => None,
        };
        let mut body: Vec<u8> = extension.iter().flat_map(|(_, bytes)| *bytes).collect();
        body.extend(payload);
        self.protocol = extension.map_or(self.protocol, |(number, _)| number);
        self.bytes = vec![0x60, 0, 0, self.hop_limit];
        self.bytes.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
        self.bytes.extend([self.protocol, self.hop_limit]);
        self.bytes.extend(source);
        self.bytes.extend(destination);
        self.bytes.extend(body);
    }

    fn damage(&mut self) {
        let v4 = self.family() == Family::V4;
        match self.oddity {
            // Neither 0 nor 0xffff, which are the same to a checksum, becomes the other.
            Oddity::Checksum if v4 => self.bytes[10] ^= 1,
            Oddity::Checksum => self.bytes[5] ^= 1,
            Oddity::Length(by) => {
                let at = if v4 { 2 } else { 4 };
                let length = u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]]);
                let mut wrong = length.wrapping_add_signed(by);
                if wrong == length {
                    wrong ^= 1;
                }
                self.bytes[at..at + 2].copy_from_slice(&wrong.to_be_bytes());
                if v4 {
                    let (mut header, _) = Ipv4Header::from_slice(&self.bytes).expect("the header is whole");
                    header.header_checksum = header.calc_header_checksum();
                    self.bytes[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
                }
            }
            Oddity::Version(version) => self.bytes[0] = self.bytes[0] & 0xf | version << 4,
            Oddity::HeaderLength(words) if v4 => self.bytes[0] = self.bytes[0] & 0xf0 | words,
            Oddity::HeaderLength(words) => self.bytes[0] = 0x40 | words,
            Oddity::Truncated(at) => self.bytes.truncate(at.min(self.bytes.len() - 1)),
            Oddity::Ethertype(other) if other != self.ethertype => self.ethertype = other,
            Oddity::Ethertype(_) => self.ethertype = 0x0806,
            _ => {}
        }
    }

    /// The bytes after a router has forwarded it.
    pub fn a_hop_later(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        if self.family() == Family::V6 {
            bytes[7] -= 1;
            return bytes;
        }
        bytes[8] -= 1;
        let (mut header, _) = Ipv4Header::from_slice(&bytes).expect("only whole headers are forwarded");
        header.header_checksum = header.calc_header_checksum();
        bytes[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
        bytes
    }

    /// Has its link-layer header as a device of this host would take it for its own.
    pub fn to_this_host(&self) -> bool {
        self.oddity != Oddity::ForOthers
    }

    /// Carries a VLAN tag.
    pub fn tagged(&self) -> bool {
        self.oddity == Oddity::Tagged
    }

    /// Nothing about it needs a second look by a router.
    pub fn is_plain(&self) -> bool {
        match self.oddity {
            Oddity::None | Oddity::Fragment(..) | Oddity::Extension(_) => true,
            Oddity::Options
            | Oddity::Checksum
            | Oddity::Length(_)
            | Oddity::Version(_)
            | Oddity::HeaderLength(_)
            | Oddity::Truncated(_)
            | Oddity::Ethertype(_)
            | Oddity::ForOthers
            | Oddity::Tagged => false,
        }
    }

    /// Its addresses can be read.
    pub fn is_readable(&self) -> bool {
        match self.oddity {
            Oddity::Version(_) | Oddity::HeaderLength(_) | Oddity::Ethertype(_) => false,
            Oddity::Truncated(_) => self.bytes.len() >= if self.family() == Family::V4 { 20 } else { 40 },
            _ => true,
        }
    }

    /// Neighbour or router discovery, as far as can be seen.
    pub fn is_discovery(&self) -> bool {
        let kind = self.bytes.get(40);
        self.family() == Family::V6 && self.protocol == 58 && kind.is_none_or(|kind| (133..=137).contains(kind))
    }

    /// The length of the longest packet on the wire; none if that cannot be told.
    pub fn length_on_wire(&self) -> Option<usize> {
        if self.gso == 0 {
            return Some(self.bytes.len());
        }
        if self.protocol != 6 || self.header == 24 {
            return None;
        }
        let tcp = usize::from(*self.bytes.get(self.header + 12)? >> 4) * 4;
        Some(self.header + tcp + self.gso as usize)
    }
}
