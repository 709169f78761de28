//! What the bench and its eBPF programs share: the maps' values, and how a packet says where it must leave.
//!
//! Every destination is in the range for benchmarks (RFC 2544, RFC 5180), and its lowest two bits are the number of the
//! exit by which the packet is to leave: each packet carries its own check.

use bytemuck::{Pod, Zeroable};

/// Number of flows that the generator cycles through. A power of two.
pub const FLOWS: u32 = 1 << 20;

/// The first 15 bits of 198.18.0.0/15.
pub const BENCH_V4: u32 = 0xc612_0000 >> 17;
/// 2001:2::/48, as the first two 32-bit words: all of the first, the upper half of the second.
pub const BENCH_V6: [u32; 2] = [0x2001_0002, 0];
/// The part of a destination that names an exit.
pub const EXIT_MASK: u32 = 3;

/// The network identifier of the first vxlan tunnel.
pub const FIRST_VNI: u32 = 100;
/// The tunnels' exits are 0 and 1; this is the uplink's.
pub const UPLINK: u32 = 2;
/// Number of exits.
pub const EXITS: u32 = 3;

/// Addresses in network byte order, IPv4 in the first word.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow {
    /// The source.
    pub source: [u32; 4],
    /// The destination.
    pub destination: [u32; 4],
}

/// What the generator writes into each packet besides the flow's addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Template {
    /// The Ethernet header; the last half word is not used.
    pub ethernet: [u32; 4],
    /// The IP header before the addresses. IPv6 has two words there.
    pub header: [u32; 3],
    /// IPv4: the sum of the header's 16-bit words other than the addresses, in the machine's byte order.
    pub checksum: u32,
    /// 4 or 6.
    pub version: u32,
    /// What the generator returns (`enum xdp_action`).
    pub verdict: u32,
    /// The device that it redirects to, if it does.
    pub out: u32,
}

/// What arrived at an exit.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Arrived {
    /// Packets that were to leave there.
    pub right: u64,
    /// Packets that were to leave elsewhere.
    pub wrong: u64,
}
