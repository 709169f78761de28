//! The packets: which sources and destinations they have, and in which order.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use fastrand::Rng;
use serde::{Deserialize, Serialize};
use tunroute::{policy::fast::address_words, policy::net::Family};

use crate::{
    layout::{BENCH_V4, BENCH_V6, EXIT_MASK, FLOWS, Flow, UPLINK},
    prefixes::{Prefixes, tunnel},
};

/// To so many destinations most packets go: few enough for the kernel to keep each as a neighbour (`gc_thresh1` is 128,
/// `gc_thresh3` 1024), many enough for none to follow itself.
pub const DESTINATIONS: u32 = 100;

/// Which sources and destinations the packets have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Any address of any prefix, all as likely; in any order to [`DESTINATIONS`] destinations.
    Uniform,
    /// The same, each packet to another destination. For IPv6 into a layer 3 device the kernel then makes a neighbour
    /// for each packet (`ip6_finish_output2()` in `net/ipv6/ip6_output.c`) and soon forgets others for it.
    ManyDestinations,
    /// Any address of prefixes of which few are frequent (Zipf's law with exponent 1), as real traffic is.
    Zipf,
    /// One source and one destination.
    OneFlow,
    /// Sources of no policy: return traffic, and everything else on the host.
    Unmatched,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uniform => "uniform",
            Self::ManyDestinations => "uniform, many destinations",
            Self::Zipf => "Zipf",
            Self::OneFlow => "one flow",
            Self::Unmatched => "unmatched",
        })
    }
}

/// The flows that the generator takes; the same for the same arguments.
#[must_use]
pub fn flows(prefixes: Prefixes, pattern: Pattern) -> Vec<Flow> {
    let mut rng = Rng::with_seed(u64::from(prefixes.count));
    let pool: Vec<u128> = (0..DESTINATIONS).map(|_| rng.u128(..)).collect();
    let family = prefixes.family;
    let flow = |number, rng: &mut Rng| {
        let drawn = if pattern == Pattern::ManyDestinations { rng.u128(..) } else { pool[rng.usize(..pool.len())] };
        let (source, exit) = match number {
            Some(number) => (prefixes.random_source(number, rng), tunnel(number)),
            None => (prefixes.unmatched_source(rng), UPLINK),
        };
        Flow { source: address_words(source), destination: address_words(destination(family, drawn, exit)) }
    };
    let one = flow(Some(prefixes.count / 2), &mut rng);
    (0..FLOWS)
        .map(|_| match pattern {
            Pattern::Uniform | Pattern::ManyDestinations => {
                let number = rng.u32(..prefixes.count);
                flow(Some(number), &mut rng)
            }
            Pattern::Zipf => {
                let number = zipf(prefixes.count, rng.f64());
                flow(Some(number), &mut rng)
            }
            Pattern::OneFlow => one,
            Pattern::Unmatched => flow(None, &mut rng),
        })
        .collect()
}

/// The destination for benchmarks that has these bits and names an exit.
fn destination(family: Family, bits: u128, exit: u32) -> IpAddr {
    match family {
        Family::V4 => {
            let low = (bits >> 96) as u32 >> 15;
            Ipv4Addr::from_bits(BENCH_V4 << 17 | low & !EXIT_MASK | exit).into()
        }
        Family::V6 => {
            let prefix = u128::from(BENCH_V6[0]) << 96 | u128::from(BENCH_V6[1]) << 80;
            Ipv6Addr::from_bits(prefix | bits >> 48 & !u128::from(EXIT_MASK) | u128::from(exit)).into()
        }
    }
}

/// A number below `count` of which n + 1 is about 1/(n + 1) as likely as 1: the inverse of the continuous distribution.
fn zipf(count: u32, uniform: f64) -> u32 {
    let rank = f64::from(count + 1).powf(uniform);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to count + 1")]
    let number = rank as u32 - 1;
    number.min(count - 1)
}

#[cfg(test)]
mod tests {
    use tunroute::policy::fast::address_from_words;

    use super::*;

    #[test]
    fn each_flow_names_the_exit_of_its_source() {
        for family in Family::ALL {
            let prefixes = Prefixes { family, count: 16 };
            for pattern in
                [Pattern::Uniform, Pattern::ManyDestinations, Pattern::Zipf, Pattern::OneFlow, Pattern::Unmatched]
            {
                for flow in flows(prefixes, pattern).into_iter().step_by(997) {
                    let source = address_from_words(family, flow.source);
                    let owner = prefixes.iter().find(|(prefix, _)| prefix.contains(&source));
                    let exit = owner.map_or(UPLINK, |(_, tunnel)| tunnel);
                    assert_eq!(owner.is_none(), pattern == Pattern::Unmatched);
                    let last = if family == Family::V4 { flow.destination[0] } else { flow.destination[3] };
                    assert_eq!(u32::from_be(last) & EXIT_MASK, exit);
                }
            }
        }
    }

    #[test]
    fn zipf_prefers_low_numbers_and_reaches_all() {
        let mut rng = Rng::with_seed(7);
        let mut seen = [0_u32; 100];
        for _ in 0..100_000 {
            seen[zipf(100, rng.f64()) as usize] += 1;
        }
        assert!(seen.iter().all(|&count| count > 0));
        // log(2)/log(101) of all.
        assert!((14_000..16_100).contains(&seen[0]), "{}", seen[0]);
        assert!(seen[0] > 30 * seen[99]);
    }
}
