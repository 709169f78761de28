//! A frame as it was seen on a device, taken apart.

use std::{fmt, net::IpAddr, time::SystemTime};

use etherparse::{Ethernet2Header, IpNumber, LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice};

/// Which way a frame went through the device it was seen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Received.
    In,
    /// Sent.
    Out,
}

/// A frame as it was seen on a device. What cannot be read of it (ARP, malformed) is `None` or empty.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The device's name when the frame was read from the capture, `#INDEX` if it was gone by then.
    pub device: String,
    /// Which way it went.
    pub direction: Direction,
    /// When the kernel saw it.
    pub at: SystemTime,
    /// The Ethernet header, on a device that has them.
    pub eth: Option<Ethernet2Header>,
    /// The VLAN tag (TCI) that the kernel keeps beside the frame.
    pub vlan_tci: Option<u16>,
    /// The source address.
    pub src: Option<IpAddr>,
    /// The destination address.
    pub dst: Option<IpAddr>,
    /// TTL or hop limit.
    pub hop_limit: Option<u8>,
    /// The protocol of the payload, after IPv6 extension headers.
    pub protocol: Option<IpNumber>,
    /// Source and destination port, of UDP and TCP.
    pub ports: Option<(u16, u16)>,
    /// Type and code, of ICMP and ICMPv6.
    pub icmp: Option<(u8, u8)>,
    /// What follows the transport header (8 bytes of ICMP), or the IP header if the transport is unknown.
    pub payload: Vec<u8>,
    /// All checksums that are there are right: IPv4 header, UDP, TCP, ICMP. A transport checksum that is left to the
    /// device (`CHECKSUM_PARTIAL`) or that covers more than this fragment is taken as right.
    pub checksum_ok: bool,
    /// The transport checksum was left to the device: the frame was never on a wire.
    pub checksum_partial: bool,
    /// The whole frame; larger than the MTU if it is a GSO packet.
    pub raw: Vec<u8>,
}

/// Where and how a frame was seen.
#[derive(Clone, Debug)]
pub(crate) struct Sighting {
    pub device: String,
    pub direction: Direction,
    pub at: SystemTime,
    pub ethernet: bool,
    pub vlan_tci: Option<u16>,
    pub checksum_partial: bool,
}

impl Seen {
    pub(crate) fn parse(sighting: Sighting, raw: Vec<u8>) -> Self {
        let Sighting { device, direction, at, ethernet, vlan_tci, checksum_partial } = sighting;
        let mut seen = Self {
            device,
            direction,
            at,
            eth: None,
            vlan_tci,
            src: None,
            dst: None,
            hop_limit: None,
            protocol: None,
            ports: None,
            icmp: None,
            payload: Vec::new(),
            checksum_ok: true,
            checksum_partial,
            raw: Vec::new(),
        };
        if ethernet {
            if let Ok(sliced) = LaxSlicedPacket::from_ethernet(&raw) {
                seen.read(&sliced);
            }
        } else if let Ok(sliced) = LaxSlicedPacket::from_ip(&raw) {
            seen.read(&sliced);
        }
        seen.raw = raw;
        seen
    }

    fn read(&mut self, sliced: &LaxSlicedPacket<'_>) {
        if let Some(LinkSlice::Ethernet2(eth)) = &sliced.link {
            self.eth = Some(eth.to_header());
        }
        let (src, dst, hop_limit, payload) = match &sliced.net {
            Some(LaxNetSlice::Ipv4(ip)) => {
                let header = ip.header();
                self.checksum_ok &= sum(header.slice()) == 0xffff;
                (header.source_addr().into(), header.destination_addr().into(), header.ttl(), ip.payload())
            }
            Some(LaxNetSlice::Ipv6(ip)) => {
                let header = ip.header();
                (header.source_addr().into(), header.destination_addr().into(), header.hop_limit(), ip.payload())
            }
            _ => return,
        };
        (self.src, self.dst, self.hop_limit) = (Some(src), Some(dst), Some(hop_limit));
        self.protocol = Some(payload.ip_number);
        self.payload = payload.payload.to_vec();
        if !self.checksum_partial && !payload.fragmented {
            self.checksum_ok &= transport_checksum_ok(src, dst, payload.ip_number, payload.payload);
        }
        match &sliced.transport {
            Some(TransportSlice::Udp(udp)) => {
                self.ports = Some((udp.source_port(), udp.destination_port()));
                self.payload = udp.payload().to_vec();
            }
            Some(TransportSlice::Tcp(tcp)) => {
                self.ports = Some((tcp.source_port(), tcp.destination_port()));
                self.payload = tcp.payload().to_vec();
            }
            Some(TransportSlice::Icmpv4(icmp)) => {
                self.icmp = Some((icmp.type_u8(), icmp.code_u8()));
                self.payload = icmp.slice().get(8..).unwrap_or_default().to_vec();
            }
            Some(TransportSlice::Icmpv6(icmp)) => {
                self.icmp = Some((icmp.type_u8(), icmp.code_u8()));
                self.payload = icmp.slice().get(8..).unwrap_or_default().to_vec();
            }
            _ => {}
        }
    }

    /// From this address to that one.
    #[must_use]
    pub fn is(&self, src: IpAddr, dst: IpAddr) -> bool {
        self.src == Some(src) && self.dst == Some(dst)
    }

    /// Sent by the device (not received).
    #[must_use]
    pub fn left(&self) -> bool {
        self.direction == Direction::Out
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.left() { "out" } else { "in" };
        write!(f, "{} {way}: ", self.device)?;
        match (self.src, self.dst, self.hop_limit, self.protocol) {
            (Some(src), Some(dst), Some(hop_limit), Some(protocol)) => {
                write!(f, "{src} > {dst} hop limit {hop_limit} {protocol:?}")?;
            }
            _ => write!(f, "{:?}", self.eth.as_ref().map(|eth| eth.ether_type))?,
        }
        if let Some((from, to)) = self.ports {
            write!(f, " {from} > {to}")?;
        }
        if let Some((kind, code)) = self.icmp {
            write!(f, " type {kind} code {code}")?;
        }
        let checksum = if self.checksum_ok { "" } else { ", bad checksum" };
        write!(f, ", {} bytes{checksum}", self.raw.len())
    }
}

/// The one's complement sum of RFC 1071: 0xffff over anything that includes its own right checksum.
fn sum(bytes: &[u8]) -> u16 {
    fold(words(bytes))
}

fn words(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(pair.first().copied().unwrap_or(0)) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)))
        .sum()
}

fn fold(mut sum: u64) -> u16 {
    loop {
        match u16::try_from(sum) {
            Ok(folded) => return folded,
            Err(_) => sum = (sum >> 16) + (sum & 0xffff),
        }
    }
}

fn transport_checksum_ok(src: IpAddr, dst: IpAddr, protocol: IpNumber, segment: &[u8]) -> bool {
    let pseudo_header = || {
        let addresses = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => words(&src.octets()) + words(&dst.octets()),
            (IpAddr::V6(src), IpAddr::V6(dst)) => words(&src.octets()) + words(&dst.octets()),
            _ => 0,
        };
        addresses + segment.len() as u64 + u64::from(protocol.0)
    };
    match protocol {
        // An IPv4 sender may leave it out.
        IpNumber::UDP if src.is_ipv4() && segment.get(6..8) == Some(&[0, 0]) => true,
        IpNumber::UDP | IpNumber::TCP | IpNumber::IPV6_ICMP => fold(pseudo_header() + words(segment)) == 0xffff,
        IpNumber::ICMP => sum(segment) == 0xffff,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use etherparse::{IpNumber, PacketBuilder};

    use super::{Direction, Seen, Sighting};

    fn see(ethernet: bool, checksum_partial: bool, raw: &[u8]) -> Seen {
        let sighting = Sighting {
            device: "tun0".to_owned(),
            direction: Direction::In,
            at: SystemTime::UNIX_EPOCH,
            ethernet,
            vlan_tci: None,
            checksum_partial,
        };
        Seen::parse(sighting, raw.to_vec())
    }

    /// Every single corrupted bit after the IP header is noticed, whatever the protocol; etherparse is the oracle for
    /// the right checksum.
    #[test]
    fn checksums_agree_with_etherparse_and_notice_every_flipped_bit() {
        let v4 = || PacketBuilder::ipv4([192, 0, 2, 1], [198, 18, 0, 1], 64);
        let v6 = || PacketBuilder::ipv6([0x2a; 16], [0x20; 16], 64);
        let payload = b"odd";
        let mut packets = vec![Vec::new(); 6];
        v4().udp(1, 2).write(&mut packets[0], payload).unwrap();
        v6().udp(1, 2).write(&mut packets[1], payload).unwrap();
        v4().tcp(1, 2, 3, 4).write(&mut packets[2], payload).unwrap();
        v6().tcp(1, 2, 3, 4).write(&mut packets[3], payload).unwrap();
        v4().icmpv4_echo_request(1, 2).write(&mut packets[4], payload).unwrap();
        v6().icmpv6_echo_request(1, 2).write(&mut packets[5], payload).unwrap();
        for packet in packets {
            let seen = see(false, false, &packet);
            assert!(seen.checksum_ok, "{seen}");
            assert_eq!(seen.payload, payload, "{seen}");
            let payload_at = packet.len() - payload.len();
            for bit in payload_at * 8..packet.len() * 8 {
                let mut flipped = packet.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(!see(false, false, &flipped).checksum_ok, "bit {bit} of {seen}");
                assert!(see(false, true, &flipped).checksum_ok, "left to the device: {seen}");
            }
        }
    }

    #[test]
    fn a_wrong_ipv4_header_is_noticed_even_if_the_transport_is_left_to_the_device() {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([192, 0, 2, 1], [198, 18, 0, 1], 64).udp(1, 2).write(&mut packet, b"x").unwrap();
        packet[8] -= 1;
        assert!(!see(false, true, &packet).checksum_ok);
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        for raw in [&[][..], &[0x45], &[0xff; 60], &[0x60; 12]] {
            for ethernet in [false, true] {
                let seen = see(ethernet, false, raw);
                assert_eq!((seen.src, seen.ports, seen.raw.as_slice()), (None, None, raw), "{seen}");
            }
        }
    }

    #[test]
    fn ethernet_and_ports_are_read() {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv6([0x2a; 16], [0x20; 16], 9)
            .udp(7, 8)
            .write(&mut frame, b"hi")
            .unwrap();
        let seen = see(true, false, &frame);
        assert_eq!(seen.eth.as_ref().map(|eth| eth.source), Some([2; 6]));
        assert_eq!((seen.hop_limit, seen.protocol, seen.ports), (Some(9), Some(IpNumber::UDP), Some((7, 8))));
        assert_eq!(seen.payload, b"hi");
    }
}
