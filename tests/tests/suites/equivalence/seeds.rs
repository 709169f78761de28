//! Which random cases are run, so that a failure can be run again.

use std::{env, ops::Range, str::FromStr};

use anyhow::{Context, Result};
use proptest::{
    strategy::{Strategy, ValueTree as _},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

/// The first seed; random unless told.
const SEED: &str = "TUNROUTE_SEED";
/// As many hosts, each with the next seed: more for a longer run.
const HOSTS: &str = "TUNROUTE_HOSTS";
/// As many packets for each.
const PACKETS: &str = "TUNROUTE_PACKETS";

/// The cases of a run.
pub struct Seeds {
    /// Each seed makes a host and its packets.
    pub seeds: Range<u64>,
    /// For each host.
    pub packets: usize,
}

impl Seeds {
    /// What the environment says, or else a random first seed, and as many hosts and packets.
    pub fn from_environment(hosts: u64, packets: usize) -> Result<Self> {
        let first = set(SEED)?.unwrap_or_else(|| u64::from(fastrand::u32(..)));
        let seeds =
            Self { seeds: first..first + set(HOSTS)?.unwrap_or(hosts), packets: set(PACKETS)?.unwrap_or(packets) };
        println!("{}", seeds.again());
        Ok(seeds)
    }

    /// How to run this again. What a host is changed from matters: a run begins with its first seed.
    pub fn again(&self) -> String {
        let Range { start, end } = self.seeds;
        format!("{SEED}={start} {HOSTS}={} {PACKETS}={}", end - start, self.packets)
    }
}

fn set<T: FromStr<Err: Send + Sync + std::error::Error + 'static>>(name: &str) -> Result<Option<T>> {
    let value = env::var(name).ok();
    value.map(|value| value.parse().with_context(|| format!("{name}={value} is no number"))).transpose()
}

/// Draws from strategies, the same for the same seed.
pub struct Draw(TestRunner);

impl Draw {
    /// Begins anew.
    pub fn new(seed: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        Self(TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)))
    }

    /// The next value.
    pub fn next<S: Strategy>(&mut self, strategy: &S) -> S::Value {
        strategy.new_tree(&mut self.0).expect("it can be drawn from").current()
    }
}
