//! Sends frames of any shape out of a device, and builds well-formed ones.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use etherparse::{
    EtherType, Ethernet2Header, IpHeaders, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder,
};

use crate::{device::Mac, netns::Netns, packet_socket::PacketSocket};

/// Sends frames out of one device, so that they arrive at its other end.
#[derive(Debug)]
pub struct Injector {
    socket: PacketSocket,
    ifindex: u32,
    /// Source and destination MAC of IP packets; none on a layer 3 device.
    macs: Option<(Mac, Mac)>,
}

impl Injector {
    /// Sends out of an Ethernet device, IP packets from and to the given MAC addresses.
    ///
    /// # Errors
    /// There is no such device.
    pub fn ethernet(netns: &Netns, device: &str, src: Mac, dst: Mac) -> Result<Self> {
        Ok(Self { socket: PacketSocket::sender(netns)?, ifindex: netns.ifindex(device)?, macs: Some((src, dst)) })
    }

    /// Sends out of a layer 3 device (tun).
    ///
    /// # Errors
    /// There is no such device.
    pub fn layer3(netns: &Netns, device: &str) -> Result<Self> {
        Ok(Self { socket: PacketSocket::sender(netns)?, ifindex: netns.ifindex(device)?, macs: None })
    }

    /// Sends an IP packet, well-formed or not, with an Ethernet header where the device has them.
    ///
    /// # Errors
    /// It is longer than the device's MTU, or the device is down.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        // The version only chooses the EtherType; anything but 6 goes as IPv4.
        let protocol =
            if packet.first().is_some_and(|first| first >> 4 == 6) { EtherType::IPV6 } else { EtherType::IPV4 };
        match self.macs {
            Some((src, dst)) => self.send_frame(&ethernet(src, dst, protocol, packet)),
            None => self.socket.send(self.ifindex, protocol.0, packet),
        }
    }

    /// Sends a frame of any shape, from the first byte that the device knows.
    ///
    /// # Errors
    /// It is longer than the device takes, shorter than its header, or the device is down.
    pub fn send_frame(&self, frame: &[u8]) -> Result<()> {
        // What the kernel takes the frame for on the sending side; the receiver reads the frame itself.
        let protocol = frame.get(12..14).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_be_bytes);
        self.socket.send(self.ifindex, protocol, frame)
    }
}

/// An Ethernet frame.
#[must_use]
pub fn ethernet(src: Mac, dst: Mac, ether_type: EtherType, payload: &[u8]) -> Vec<u8> {
    let header = Ethernet2Header { source: src.0, destination: dst.0, ether_type };
    [header.to_bytes().as_slice(), payload].concat()
}

/// An IP header in the family of the addresses.
///
/// # Errors
/// The addresses are of two families.
pub fn ip(src: IpAddr, dst: IpAddr, hop_limit: u8) -> Result<IpHeaders> {
    // The builder sets lengths, checksum and protocol.
    let header = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header = Ipv4Header::new(0, hop_limit, IpNumber::UDP, src.octets(), dst.octets())?;
            header.dont_fragment = true;
            IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default())
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => IpHeaders::Ipv6(
            Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::ZERO,
                payload_length: 0,
                next_header: IpNumber::UDP,
                hop_limit,
                source: src.octets(),
                destination: dst.octets(),
            },
            etherparse::Ipv6Extensions::default(),
        ),
        _ => anyhow::bail!("{src} and {dst} are of two families"),
    };
    Ok(header)
}

/// A UDP packet, from the IP header on; "don't fragment" is set.
///
/// # Errors
/// The addresses are of two families, or the payload is too long.
pub fn udp(src: SocketAddr, dst: SocketAddr, hop_limit: u8, payload: &[u8]) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ip(ip(src.ip(), dst.ip(), hop_limit)?).udp(src.port(), dst.port());
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).context("cannot build a UDP packet")?;
    Ok(packet)
}

/// A TCP SYN, from the IP header on.
///
/// # Errors
/// The addresses are of two families.
pub fn tcp_syn(src: SocketAddr, dst: SocketAddr, hop_limit: u8) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ip(ip(src.ip(), dst.ip(), hop_limit)?).tcp(src.port(), dst.port(), 1, 65535).syn();
    let mut packet = Vec::new();
    builder.write(&mut packet, &[]).context("cannot build a TCP SYN")?;
    Ok(packet)
}

/// An ICMP or ICMPv6 echo request, from the IP header on.
///
/// # Errors
/// The addresses are of two families, or the payload is too long.
pub fn echo_request(src: IpAddr, dst: IpAddr, hop_limit: u8, id: u16, seq: u16, payload: &[u8]) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ip(ip(src, dst, hop_limit)?);
    let mut packet = Vec::new();
    let built = if src.is_ipv4() {
        builder.icmpv4_echo_request(id, seq).write(&mut packet, payload)
    } else {
        builder.icmpv6_echo_request(id, seq).write(&mut packet, payload)
    };
    built.context("cannot build an echo request")?;
    Ok(packet)
}
