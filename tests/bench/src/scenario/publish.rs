//! The prefix engine without the daemon around it: a configuration's prefixes compiled and published, one of them changed,
//! and what a lookup reads.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    hint::black_box,
    path::Path,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use tunroute::{
    config::{Config, Policy},
    datapath::{Index, WordMap},
    policy::compile::{FastInputs, Inputs, Lead, compile},
    policy::fast::{FastOp, Open},
    policy::net::KernelState,
    policy::xdp_devices,
    prefixes::index::{self, Content, Memory as _},
    prefixes::map::PrefixMap,
};
use tunroute_common::{
    index::{SOURCES, header, look_up},
    maps::Source,
    trie::Words,
};

use super::{Arena, SENDER_CPU};
use crate::{
    contestant::{TUNROUTE_EBPF, configuration_of},
    generator::pin_to,
    prefixes::Prefixes,
    record::{ACCESS, Case, LINES, LOOKUP, Measurement, ONE, RECORD, TRIE, Unit},
    site::Site,
};

/// Number of repetitions.
const TIMES: usize = 5;
/// Number of changes of one prefix, which are much faster.
const CHANGES: usize = 101;
/// Number of sources for which the cache lines of a lookup are counted.
const LOOKUPS: usize = 10_000;
/// Bytes that come into the cache together.
const LINE: usize = 64;

/// Compiles and publishes what the daemon of a place has before it.
///
/// # Errors
/// The configuration cannot be read, or the kernel refuses a map.
pub fn measure(arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
    let Some(place) = arena.places.iter().find(|place| place.contestant.name() == TUNROUTE_EBPF) else {
        return Ok(Vec::new());
    };
    let config = Config::load(&configuration_of(&place.site)).context("the daemon's configuration")?;
    let directory = place.site.pin_dir().join("publish");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let prefixes = Prefixes { family: case.family(), count: case.prefixes };
    let engine = engine(&config, &directory, prefixes, &place.site);
    fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    let Engine { all, trie, one, lookup, record, lines, accesses } = engine?;
    let of = |figure, unit, values| Measurement::of(case, TUNROUTE_EBPF, figure, unit, values);
    let bytes = |words| vec![(words * size_of::<u64>()) as f64];
    Ok(vec![
        of("", Unit::Seconds, all),
        of(TRIE, Unit::Seconds, trie),
        of(ONE, Unit::Seconds, one),
        of(LOOKUP, Unit::Bytes, bytes(lookup)),
        of(RECORD, Unit::Bytes, bytes(record)),
        of(LINES, Unit::Number, vec![lines]),
        of(ACCESS, Unit::NanosecondsPerPacket, accesses),
    ])
}

struct Engine {
    /// Seconds to compile policies to a trie, and to publish it.
    all: Vec<f64>,
    /// The part of it that is the trie's.
    trie: Vec<f64>,
    /// Seconds to change one prefix.
    one: Vec<f64>,
    /// Words that the programs look prefixes up in.
    lookup: usize,
    /// Words from which a daemon that starts reads what is published.
    record: usize,
    /// Cache lines that a lookup reads.
    lines: f64,
    /// Nanoseconds for one such read.
    accesses: Vec<f64>,
}

fn engine(config: &Config, directory: &Path, prefixes: Prefixes, site: &Site) -> Result<Engine> {
    let words = index::expected(config.policies.iter().flat_map(Policy::sources));
    let mut index = Index::open(directory, words).context("cannot make the maps")?;
    let exempt = BTreeSet::new();
    let (mut all, mut trie, mut sources) = (Vec::new(), Vec::new(), PrefixMap::default());
    for _ in 0..TIMES {
        let start = Instant::now();
        sources = compiled(config)?;
        let leads = Instant::now();
        index.renew(Content { sources: &sources, exempt: &exempt }).context("cannot publish")?;
        all.push(start.elapsed().as_secs_f64());
        trie.push(leads.elapsed().as_secs_f64());
    }
    let published = WordMap::pinned(directory)?;
    let count = |at| usize::try_from(published.word(at));
    let (lookup, record) = (count(header::USED)?, count(header::RECORD)?);
    let lines = lines(&published, prefixes)?;

    let prefix = *sources.keys().next().context("no prefix")?;
    let mut known: Vec<Source> = sources.values().copied().take(2).collect();
    let mut one = Vec::new();
    for _ in 0..CHANGES {
        known.rotate_left(1);
        let source = *known.first().context("no source")?;
        sources.insert(prefix, source);
        let content = Content { sources: &sources, exempt: &exempt };
        let start = Instant::now();
        index.update(content, &[&FastOp::PutSource(prefix, source)]).context("cannot change a prefix")?;
        one.push(start.elapsed().as_secs_f64());
    }
    let published = WordMap::pinned(directory)?;
    let accesses = site.at_entry(|| {
        pin_to(SENDER_CPU)?;
        Ok(access(&published, lookup))
    })?;
    Ok(Engine { all, trie, one, lookup, record, lines, accesses })
}

/// The prefixes as the index takes them, of policies without a tunnel that is up: that makes no difference to prefixes.
fn compiled(config: &Config) -> Result<PrefixMap<Source>> {
    let (kernel, tables, failed) = (KernelState::default(), BTreeMap::new(), BTreeSet::new());
    let (open, none, xdp) = (Open { v4: true, v6: true }, BTreeSet::new(), xdp_devices::Chosen::default());
    let fast = FastInputs {
        open,
        closed: &none,
        reverse_path: false,
        unmatched: Open::default(),
        returning: &none,
        xdp: &xdp,
    };
    let inputs = Inputs {
        config,
        kernel: &kernel,
        tables: &tables,
        failed: &failed,
        rules: false,
        fast: Some(fast),
        before: None,
    };
    let fast = compile(&inputs).fast.context("no fast path was compiled")?;
    let source = |lead: &Lead| Source { slot: lead.chain, arrives_by: lead.arrives_by };
    Ok(fast.sources.prefixes().iter().map(|(prefix, lead)| (*prefix, source(lead))).collect())
}

/// Words, and which cache lines of them were read.
struct Read<'a> {
    words: &'a WordMap,
    lines: RefCell<BTreeSet<u64>>,
}

impl Words for Read<'_> {
    fn word(&self, index: u64) -> u64 {
        self.lines.borrow_mut().insert(index * size_of::<u64>() as u64 / LINE as u64);
        self.words.word(index)
    }
}

/// Cache lines that a lookup reads, on average.
fn lines(published: &WordMap, prefixes: Prefixes) -> Result<f64> {
    let (mut rng, mut lines) = (Rng::with_seed(1), 0);
    for _ in 0..LOOKUPS {
        let (family, key) = index::key(prefixes.random_source(rng.u32(..prefixes.count), &mut rng));
        let read = Read { words: published, lines: RefCell::default() };
        ensure!(look_up(&read, SOURCES, family, key) != 0, "a source of a prefix is not found");
        lines += read.lines.into_inner().len();
    }
    Ok(lines as f64 / LOOKUPS as f64)
}

/// Nanoseconds for a read from somewhere in the first so many words of a map, where each says where the next one is. They
/// are written over for that.
fn access(map: &WordMap, words: usize) -> Vec<f64> {
    const READS: usize = 1 << 18;
    let per_line = LINE / size_of::<u64>();
    // One cycle through all lines (Sattolo).
    let mut order: Vec<u64> = (0..(words / per_line).max(1) as u64).collect();
    let mut rng = Rng::with_seed(2);
    for last in (1..order.len()).rev() {
        order.swap(last, rng.usize(..last));
    }
    for (line, next) in (0..).zip(&order) {
        map.write(line * per_line as u64, next * per_line as u64);
    }
    let mut at = 0;
    let mut read = |reads| {
        let start = Instant::now();
        for _ in 0..reads {
            at = map.word(black_box(at));
        }
        start.elapsed().as_nanos() as f64 / reads as f64
    };
    let _warm_up = read(order.len().min(READS));
    (0..TIMES).map(|_| read(READS)).collect()
}
