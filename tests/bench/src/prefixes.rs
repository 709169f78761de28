//! The policies' source prefixes: how many, how long, where, and which tunnel each belongs to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastrand::Rng;
use ipnet::IpNet;
use tunroute::policy::net::Family;

/// The prefixes are spread over this many equal slots and do not overlap.
const SLOTS: u32 = 1 << 22;
/// Odd, so that it sends each slot to another one.
const SCATTER: u32 = 0x2545_f491;
/// The slots are the /24s from here on: 32.0.0.0 to 95.255.255.255.
const FIRST_V4: u32 = 32 << 24;
/// The slots are the /48s from here on, every 1024th: 2a00::/10.
const FIRST_V6: u128 = 0x2a00 << 112;
/// Of eight prefixes in a row, the lengths.
const LENGTHS_V4: [u8; 8] = [24, 24, 24, 24, 24, 28, 28, 32];
const LENGTHS_V6: [u8; 8] = [48, 48, 48, 56, 56, 64, 64, 128];

/// What the prefixes are like, for the report.
pub const DESCRIPTION: &str = "disjoint prefixes spread evenly over the address space; IPv4: 5/8 of them /24, 2/8 /28, \
                               1/8 /32; IPv6: 3/8 /48, 2/8 /56, 2/8 /64, 1/8 /128; every second belongs to the second \
                               tunnel";

/// The first `count` prefixes of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefixes {
    /// Of which family they are.
    pub family: Family,
    /// How many there are; at most 4 million.
    pub count: u32,
}

impl Prefixes {
    /// A prefix by its number.
    #[must_use]
    pub fn get(&self, number: u32) -> IpNet {
        let address = self.address(number, 0);
        let lengths = if self.family == Family::V4 { LENGTHS_V4 } else { LENGTHS_V6 };
        let length = lengths[number as usize % lengths.len()];
        IpNet::new_assert(address, length)
    }

    /// All of them, with the number of the tunnel that each belongs to.
    pub fn iter(self) -> impl Iterator<Item = (IpNet, u32)> {
        (0..self.count).map(move |number| (self.get(number), tunnel(number)))
    }

    /// Any address of a prefix.
    #[must_use]
    pub fn random_source(&self, number: u32, rng: &mut Rng) -> IpAddr {
        self.address(number, rng.u128(..) & host_mask(&self.get(number)))
    }

    /// An address that no prefix contains.
    #[must_use]
    pub fn unmatched_source(&self, rng: &mut Rng) -> IpAddr {
        match self.family {
            // 128.0.0.0/3
            Family::V4 => Ipv4Addr::from_bits(1 << 31 | rng.u32(..) >> 3).into(),
            // 2400::/12
            Family::V6 => Ipv6Addr::from_bits(0x2400 << 112 | rng.u128(..) >> 12).into(),
        }
    }

    fn address(&self, number: u32, host: u128) -> IpAddr {
        let slot = number.wrapping_mul(SCATTER) % SLOTS;
        match self.family {
            Family::V4 => {
                let host = u32::try_from(host & u128::from(u32::MAX)).unwrap_or(0);
                Ipv4Addr::from_bits(FIRST_V4 + (slot << 8) + host).into()
            }
            Family::V6 => Ipv6Addr::from_bits(FIRST_V6 + (u128::from(slot) << 90) + host).into(),
        }
    }
}

/// The tunnel that a prefix belongs to, by its number.
#[must_use]
pub const fn tunnel(number: u32) -> u32 {
    number % 2
}

fn host_mask(prefix: &IpNet) -> u128 {
    match prefix {
        IpNet::V4(prefix) => prefix.hostmask().to_bits().into(),
        IpNet::V6(prefix) => prefix.hostmask().to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn prefixes_are_disjoint_and_contain_their_sources() {
        let mut rng = Rng::with_seed(1);
        for family in Family::ALL {
            let prefixes = Prefixes { family, count: 5000 };
            let sorted: BTreeSet<IpNet> = prefixes.iter().map(|(prefix, _)| prefix).collect();
            assert_eq!(sorted.len(), 5000);
            let sorted: Vec<IpNet> = sorted.into_iter().collect();
            assert!(sorted.windows(2).all(|pair| !pair[0].contains(&pair[1])), "{family}: nested");
            for number in 0..prefixes.count {
                assert_eq!(prefixes.get(number), prefixes.get(number).trunc());
                assert!(prefixes.get(number).contains(&prefixes.random_source(number, &mut rng)));
                let unmatched = prefixes.unmatched_source(&mut rng);
                assert!(!sorted.iter().any(|prefix| prefix.contains(&unmatched)), "{unmatched}");
            }
        }
    }
}
