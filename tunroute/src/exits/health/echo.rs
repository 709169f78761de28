//! ICMP and ICMPv6 echo messages (RFC 792, RFC 4443 section 4).

use crate::policy::net::Family;

/// The length of an echo message with the cookie as its payload and nothing behind it, in bytes.
pub const LENGTH: usize = 16;
/// The protocol number of ICMP in an IPv4 header.
const ICMP: u8 = 1;

/// An echo request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    family: Family,
    identifier: u16,
    sequence: u16,
    cookie: [u8; 8],
    padding: usize,
}

impl Request {
    /// A request whose identifier and payload come from the cookie, a number that others cannot guess.
    #[must_use]
    pub fn new(family: Family, sequence: u16, cookie: u64) -> Self {
        let cookie = cookie.to_be_bytes();
        Self { family, identifier: u16::from_be_bytes([cookie[0], cookie[1]]), sequence, cookie, padding: 0 }
    }

    /// With so many zeros behind the cookie.
    #[must_use]
    pub const fn padded(self, padding: usize) -> Self {
        Self { padding, ..self }
    }

    /// How long the message is.
    #[must_use]
    pub const fn length(&self) -> usize {
        LENGTH + self.padding
    }

    /// The message as it is sent. The kernel fills in the checksum of ICMPv6 (`rawv6_push_pending_frames()` in
    /// `net/ipv6/raw.c`), not that of ICMP.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        let mut message = self.message(match self.family {
            Family::V4 => 8,
            Family::V6 => 128,
        });
        if self.family == Family::V4 {
            let [high, low] = checksum(&message).to_be_bytes();
            (message[2], message[3]) = (high, low);
        }
        message
    }

    /// Is this packet the reply? IPv4 raw sockets deliver the IP header and do not check the ICMP checksum
    /// (`raw_local_deliver()` in `net/ipv4/raw.c`); IPv6 ones deliver the message alone, checked.
    #[must_use]
    pub fn is_answered_by(&self, packet: &[u8]) -> bool {
        let (message, reply) = match self.family {
            Family::V4 => (icmp_of(packet).filter(|message| checksum(message) == 0), 0),
            Family::V6 => (Some(packet), 129),
        };
        // All but the checksum.
        let parts = |message: &[u8]| Some((message.get(..2)?.to_vec(), message.get(4..)?.to_vec()));
        message.and_then(parts) == parts(&self.message(reply))
    }

    /// The message with a type, and no checksum.
    fn message(&self, kind: u8) -> Vec<u8> {
        let mut message = vec![0; self.length()];
        message[0] = kind;
        message[4..6].copy_from_slice(&self.identifier.to_be_bytes());
        message[6..8].copy_from_slice(&self.sequence.to_be_bytes());
        message[8..LENGTH].copy_from_slice(&self.cookie);
        message
    }
}

/// The ICMP message in an IPv4 packet that is whole.
fn icmp_of(packet: &[u8]) -> Option<&[u8]> {
    let &[version, _, length_high, length_low, _, _, _, _, _, protocol, ..] = packet else { return None };
    let header = usize::from(version & 0xf) * 4;
    if version >> 4 != 4 || header < 20 || protocol != ICMP {
        return None;
    }
    packet.get(header..usize::from(u16::from_be_bytes([length_high, length_low])))
}

/// The Internet checksum (RFC 1071); zero over a message that contains its own.
fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks(2).map(|word| match *word {
        [high, low] => u16::from_be_bytes([high, low]),
        [high] => u16::from_be_bytes([high, 0]),
        _ => 0,
    });
    !words.fold(0u16, |sum, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a host that answers sends back: another type, the rest as it was.
    fn answer(request: Request, options: usize) -> Vec<u8> {
        let mut message = request.to_bytes();
        if request.family == Family::V6 {
            message[0] = 129;
            // Checked and not looked at any more.
            message[2..4].copy_from_slice(&[0xab, 0xcd]);
            return message;
        }
        message[0] = 0;
        message[2..4].fill(0);
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let header = 20 + 4 * options;
        let mut packet = vec![0; header];
        packet[0] = 0x45 + u8::try_from(options).unwrap();
        packet[2..4].copy_from_slice(&u16::try_from(header + request.length()).unwrap().to_be_bytes());
        packet[9] = ICMP;
        packet.extend(message);
        packet
    }

    #[test]
    fn a_known_message() {
        // As tcpdump shows it of a ping with this payload; the checksum by hand.
        let request = Request::new(Family::V4, 1, 0x0102_0304_0506_0708);
        let expected = [8, 0, 0xe6, 0xe8, 1, 2, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(request.to_bytes(), expected);
        assert_eq!(checksum(&expected), 0);
        assert_eq!(checksum(&[0xff, 0xff, 0x01]), !0x0100);
        assert_eq!(Request::new(Family::V6, 1, 0).to_bytes()[..4], [128, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn the_answer_is_known_and_nothing_else(
            v4 in any::<bool>(),
            sequence in any::<u16>(),
            cookie in any::<u64>(),
            options in 0..=10usize,
            (bit, cut) in (0..480usize, 0..60usize),
            noise in prop::collection::vec(any::<u8>(), 0..128),
            padding in 0..2000usize,
        ) {
            let family = if v4 { Family::V4 } else { Family::V6 };
            let request = Request::new(family, sequence, cookie).padded(padding);
            let reply = answer(request, options);
            prop_assert!(request.is_answered_by(&reply));
            prop_assert!(!request.is_answered_by(&request.to_bytes()), "its own request");
            prop_assert!(!request.is_answered_by(&noise));
            prop_assert!(!Request::new(family, sequence.wrapping_add(1), cookie).padded(padding).is_answered_by(&reply));
            prop_assert!(!Request::new(family, sequence, cookie ^ 1).padded(padding).is_answered_by(&reply));
            prop_assert!(!request.padded(padding + 1).is_answered_by(&reply), "of another length");
            prop_assert!(!request.is_answered_by(&reply[..cut.min(reply.len() - 1)]), "cut short");

            let mut flipped = reply.clone();
            let bit = bit % (8 * reply.len());
            flipped[bit / 8] ^= 1 << (bit % 8);
            // Of the IPv4 header only the version, the lengths and the protocol are looked at; the ICMPv6 checksum is not.
            let looked_at = match family {
                Family::V4 => matches!(bit / 8, 0 | 2 | 3 | 9) || bit / 8 >= reply.len() - request.length(),
                Family::V6 => !matches!(bit / 8, 2 | 3),
            };
            prop_assert_eq!(request.is_answered_by(&flipped), !looked_at);
        }
    }
}
