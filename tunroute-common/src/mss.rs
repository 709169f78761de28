//! The segment size that TCP tells the other end (MSS), lowered to what a tunnel takes.

use core::hint::black_box;

use bytemuck::{Pod, Zeroable};

use crate::{
    maps::Clamp,
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ipv4Header, Ipv6Header, PROTOCOL_TCP, Packet},
};

/// The fragment offset's bits of [`Ipv4Header::fragment`].
const FRAGMENT_OFFSET: u16 = 0x1fff_u16.to_be();
/// Where the flags' byte of a TCP header has SYN.
const SYN: u8 = 2;
/// The kinds of TCP options (RFC 9293) that are not of the form kind, length, value.
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
/// The maximum segment size: kind, length, two bytes.
const MAXIMUM_SEGMENT_SIZE: u8 = 2;
const OPTION: usize = 4;
/// The longest header has 40 bytes of options: so many may be passed over before the last that has room for this one.
const MOST_OPTIONS: usize = 37;
/// All bits that the place of an option can have.
const ROOM: usize = 63;

/// A TCP header without its options; multi-byte fields in network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
struct TcpHeader {
    ports: u32,
    sequence: u32,
    acknowledgement: u32,
    /// The header's length in words, in the upper half.
    data_offset: u8,
    flags: u8,
    window: u16,
    checksum: u16,
    urgent: u16,
}

/// Where the checksum stands in a TCP header.
const CHECKSUM: usize = 16;

/// A change of two bytes of a TCP segment. Offsets count from the network header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where they stand.
    pub at: usize,
    /// What is to stand there, as it stands in memory.
    pub value: u16,
    /// Where the segment's checksum stands.
    pub checksum: usize,
    /// What the checksum loses and gains, as words in memory: bytes at an odd place belong to two words, and so count
    /// swapped.
    pub words: (u16, u16),
}

/// What lowers the segment size of a SYN to the most that is allowed for its family. `None` for everything that it need not
/// or cannot be done to: another packet, no such option, a lower size, a later fragment, IPv6 extension headers before TCP.
#[inline(always)]
pub fn lower<P: Packet>(ethertype: u16, packet: &P, most: &Clamp) -> Option<Change> {
    let (start, protocol, most) = match ethertype {
        ETHERTYPE_IPV4 => {
            let header = packet.read::<Ipv4Header>(0)?;
            let length = usize::from(header.version_ihl & 0xf) * 4;
            if header.version_ihl >> 4 != 4
                || length < size_of::<Ipv4Header>()
                || header.fragment & FRAGMENT_OFFSET != 0
            {
                return None;
            }
            (length, header.protocol, most.v4)
        }
        ETHERTYPE_IPV6 => {
            let header = packet.read::<Ipv6Header>(0)?;
            if u32::from_be(header.version_class_flow) >> 28 != 6 {
                return None;
            }
            (size_of::<Ipv6Header>(), header.next_header, most.v6)
        }
        _ => return None,
    };
    if protocol != PROTOCOL_TCP {
        return None;
    }
    let header = packet.read::<TcpHeader>(start)?;
    if header.flags & SYN == 0 {
        return None;
    }
    let length = (usize::from(header.data_offset >> 4) * 4).checked_sub(size_of::<TcpHeader>())?;
    let at = segment_size(packet, start + size_of::<TcpHeader>(), length)?;
    let (value, old) = (most.to_be(), packet.read::<u16>(at)?);
    if u16::from_be(old) <= most {
        return None;
    }
    let words = if (at - start).is_multiple_of(2) { (old, value) } else { (old.swap_bytes(), value.swap_bytes()) };
    Some(Change { at, value, checksum: start + CHECKSUM, words })
}

/// Finds the option's value among `length` bytes of options.
#[inline(always)]
fn segment_size<P: Packet>(packet: &P, options: usize, length: usize) -> Option<usize> {
    let mut at = 0;
    for _ in 0..MOST_OPTIONS {
        if at + OPTION > length {
            return None;
        }
        // Kind and length, in this order in memory.
        let [kind, size] = packet.read::<u16>(options + at)?.to_ne_bytes();
        let next = at
            + match (kind, size) {
                (MAXIMUM_SEGMENT_SIZE, 4) => return Some(options + at + 2),
                (END, _) => return None,
                (NO_OPERATION, _) => 1,
                // A length counts the two bytes before the value.
                (_, 0 | 1) => return None,
                (_, size) => usize::from(size),
            };
        if next > ROOM {
            return None;
        }
        // Changes nothing; but the verifier need not remember any more by which options it came here.
        at = black_box(next) & ROOM;
    }
    None
}
