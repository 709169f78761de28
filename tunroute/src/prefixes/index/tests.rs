#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

use std::{
    hint::black_box,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Instant,
};

use prefix_trie::joint::JointPrefixMap;
use proptest::prelude::*;
use tunroute_common::{
    index::{exempt, source},
    trie::Kind,
};

use super::*;

struct Cells(Vec<AtomicU64>);

impl Cells {
    fn of(image: &Image, room: u64) -> Self {
        let cells = Self((0..image.length() + room).map(|_| AtomicU64::new(0)).collect());
        image.write(&cells).unwrap();
        cells
    }
}

impl Words for Cells {
    fn word(&self, index: u64) -> u64 {
        self.0.get(usize::try_from(index).unwrap()).map_or(0, |word| word.load(Ordering::Acquire))
    }
}

impl Memory for Cells {
    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn write(&self, index: u64, word: u64) {
        if let Some(place) = self.0.get(usize::try_from(index).unwrap()) {
            place.store(word, Ordering::Release);
        }
    }
}

#[derive(Clone, Debug, Default)]
struct State {
    sources: PrefixMap<Source>,
    exempt: BTreeSet<Exemption>,
}

impl State {
    fn content(&self) -> Content<'_> {
        Content { sources: &self.sources, exempt: &self.exempt }
    }

    fn apply(&mut self, operation: &FastOp) {
        match operation {
            FastOp::PutSource(prefix, source) => self.sources.insert(*prefix, *source),
            FastOp::RemoveSource(prefix) => self.sources.remove(prefix),
            FastOp::AddExemption(exemption) => drop(self.exempt.insert(*exemption)),
            FastOp::RemoveExemption(exemption) => drop(self.exempt.remove(exemption)),
            _ => {}
        }
    }
}

fn look_up<W: Words + ?Sized>(words: &W, address: IpAddr) -> Option<Source> {
    let (family, key) = key(address);
    source(words, family, key)
}

/// Few networks and all lengths, so that prefixes nest and meet again.
fn any_prefix() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<u16>(), 0u8..=32).prop_map(|(bits, length)| {
            let address = 0x0a00_0000 | u32::from(bits & 0xf) << 20 | u32::from(bits >> 4);
            IpNet::from(Ipv4Net::new(address.into(), length).unwrap().trunc())
        }),
        (any::<u32>(), 0u8..=128).prop_map(|(bits, length)| {
            let address = 0x2a02_u128 << 112 | u128::from(bits & 0xf) << 84 | u128::from(bits >> 4);
            IpNet::from(Ipv6Net::new(address.into(), length).unwrap().trunc())
        }),
    ]
}

fn any_operation() -> impl Strategy<Value = FastOp> {
    let exemption = || {
        (0u32..20, any_prefix(), prop::sample::select(&Exempt::ALL[..])).prop_map(|(set, prefix, kind)| Exemption {
            set,
            prefix,
            kind,
        })
    };
    prop_oneof![
        3 => (any_prefix(), 0u32..12, 0u32..3)
            .prop_map(|(prefix, slot, arrives_by)| FastOp::PutSource(prefix, Source { slot, arrives_by })),
        1 => any_prefix().prop_map(FastOp::RemoveSource),
        2 => exemption().prop_map(FastOp::AddExemption),
        1 => exemption().prop_map(FastOp::RemoveExemption),
    ]
}

fn check(cells: &Cells, state: &State) -> Result<(), TestCaseError> {
    let (sources, exemptions) = read(cells).expect("a record");
    prop_assert_eq!(&sources, &state.sources);
    // Of several kinds of one prefix, the last is recorded.
    let kinds: BTreeMap<(u32, IpNet), Exempt> =
        state.exempt.iter().map(|each| ((each.set, each.prefix), each.kind)).collect();
    let recorded: BTreeMap<(u32, IpNet), Exempt> =
        exemptions.iter().map(|each| ((each.set, each.prefix), each.kind)).collect();
    prop_assert_eq!((exemptions.len(), recorded), (kinds.len(), kinds));
    let oracle: JointPrefixMap<IpNet, Source> = state.sources.iter().copied().collect();
    let prefixes = state.sources.keys().chain(state.exempt.iter().map(|exemption| &exemption.prefix));
    for address in prefixes.flat_map(|prefix| [prefix.network(), prefix.broadcast()]) {
        let expected = oracle.get_lpm(&address.into()).map(|(_, source)| *source);
        prop_assert_eq!(look_up(cells, address), expected, "{}", address);
        let (family, key) = key(address);
        for set in 0..20 {
            let holding = state.exempt.iter().filter(|each| each.set == set && each.prefix.contains(&address));
            let longest = holding.max_by_key(|each| (each.prefix.prefix_len(), each.kind));
            let expected = longest.map_or(Exempt::No, |each| each.kind);
            prop_assert_eq!(exempt(cells, set, family, key), expected, "{} in set {}", address, set);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_in_place_it_is_as_compiled_anew(
        first in prop::collection::vec(any_operation(), 0..60),
        then in prop::collection::vec(prop::collection::vec(any_operation(), 1..5), 0..20),
    ) {
        let mut state = State::default();
        first.iter().for_each(|operation| state.apply(operation));
        let mut cells = Cells::of(&Image::compile(state.content()), 1 << 14);
        for operations in &then {
            operations.iter().for_each(|operation| state.apply(operation));
            if !change(&cells, state.content(), &operations.iter().collect::<Vec<_>>()) {
                // Only a set that is new takes a new array.
                let new_set = operations.iter().any(|operation| matches!(operation, FastOp::AddExemption(_)));
                let removed = operations.iter().any(|operation| matches!(operation, FastOp::RemoveExemption(_)));
                prop_assert!(new_set || removed, "{:?}", operations);
                cells = Cells::of(&Image::compile(state.content()), 1 << 14);
            }
            check(&cells, &state)?;
        }
    }

    #[test]
    fn garbage_is_read_without_harm(
        words in prop::collection::vec(any_word(), 8..200),
        address in any::<u128>(),
        operation in any_operation(),
        operations in prop::collection::vec(any_operation(), 0..20),
    ) {
        read_garbage(words, address, &operation, &operations);
    }
}

/// A word as a damaged array may have it: anything, a small number, or an entry.
fn any_word() -> impl Strategy<Value = u64> {
    let kind = prop::sample::select(vec![
        Kind::Near,
        Kind::Table,
        Kind::Sparse,
        Kind::Leaves,
        Kind::Runs,
        Kind::Path,
        Kind::Skip,
        Kind::Two,
    ]);
    let entry = (kind, 0u32..128, 0u32..32, 0u32..100, 0u32..200);
    prop_oneof![
        any::<u64>(),
        0..300u64,
        entry.prop_map(|(kind, position, width, number, place)| Entry::new(kind, position, width, number, place).0),
    ]
}

/// Reads and changes an array of any content: it ends, without a panic.
fn read_garbage(words: Vec<u64>, address: u128, operation: &FastOp, operations: &[FastOp]) {
    let mut state = State::default();
    operations.iter().chain([operation]).for_each(|operation| state.apply(operation));
    let cells = Cells(words.into_iter().map(AtomicU64::new).collect());
    let _whatever = (read(&cells), used(&cells));
    for address in [IpAddr::V6(address.into()), IpAddr::V4((address as u32).into())] {
        let (family, key) = key(address);
        let _whatever = (look_up(&cells, address), exempt(&cells, 1, family, key));
        let _whatever = change(&cells, State::default().content(), &[&FastOp::RemoveSource(address.into())]);
    }
    let _whatever = change(&cells, state.content(), &[operation]);
}

/// Entries and counts of words that only a damaged array has.
#[test]
fn damaged_entries_are_read_without_harm() {
    let root = |kind, position, width, place| Entry::new(kind, position, width, 1, place).0;
    let counts = [(u64::MAX, u64::MAX), (u64::MAX, 1), (1, u64::MAX), (8, 8)];
    let roots = [
        root(Kind::Table, 0, 0, 9),
        root(Kind::Table, 120, 31, 9),
        // Leads to itself.
        root(Kind::Skip, 0, 0, 19),
    ];
    for ((used, recorded), root) in counts.into_iter().flat_map(|counts| roots.map(|root| (counts, root))) {
        let mut words = vec![0; 64];
        for (place, word) in [(header::SOURCES_V4, root), (header::SOURCES_V6, root), (20, root)] {
            words[place as usize] = word;
        }
        words[header::USED as usize] = used;
        words[header::RECORD as usize] = recorded;
        words[header::SETS as usize] = u64::MAX;
        let put = FastOp::PutSource("::/128".parse().unwrap(), Source { slot: 1, arrives_by: 0 });
        read_garbage(words, 0, &put, &[]);
    }
}

/// While prefixes come, go, and move, a reader sees each as it was before or as it is after, and all others as ever.
#[test]
fn a_reader_sees_what_was_or_what_is() {
    let mut state = State::default();
    let mut random = fastrand::Rng::with_seed(3);
    let of = |slot| Source { slot, arrives_by: 0 };
    let prefix = |address: u32, length| IpNet::from(Ipv4Net::new(address.into(), length).unwrap().trunc());
    for _ in 0..20_000 {
        let length = random.u8(12..=32);
        state.sources.insert(prefix(random.u32(..) | 1 << 31, length), of(u32::from(length)));
    }
    // Each of the moving ones lies in a network of its own, which stays; all around are others.
    let moving: Vec<u32> = (0..500).map(|index| 0x0a00_0000 | index << 12).collect();
    for address in &moving {
        state.sources.insert(prefix(*address, 20), of(1));
    }
    let standing: Vec<(IpAddr, Option<Source>)> = {
        let cells = Cells::of(&Image::compile(state.content()), 0);
        let addresses = (0..2000).map(|_| IpAddr::from((random.u32(..) | 1 << 31).to_be_bytes()));
        addresses.map(|address| (address, look_up(&cells, address))).collect()
    };
    let cells = Cells::of(&Image::compile(state.content()), 200_000);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = [0u64; 3];
            while !done.load(Ordering::Relaxed) {
                for address in &moving {
                    let found = look_up(&cells, IpAddr::from((address + 77).to_be_bytes())).map(|source| source.slot);
                    match found {
                        Some(slot @ 1..=2) => seen[slot as usize] += 1,
                        other => panic!("{other:?}"),
                    }
                }
                for (address, expected) in &standing {
                    assert_eq!(look_up(&cells, *address), *expected, "{address}");
                }
            }
            seen
        });
        for round in 0..2000 {
            let address = moving[random.usize(..moving.len())];
            let prefix = prefix(address + 64, random.u8(22..=26));
            let operation = match state.sources.contains_key(&prefix) {
                true => FastOp::RemoveSource(prefix),
                false => FastOp::PutSource(prefix, of(2)),
            };
            state.apply(&operation);
            assert!(change(&cells, state.content(), &[&operation]), "no room in round {round}");
        }
        done.store(true, Ordering::Relaxed);
        let seen = reader.join().unwrap();
        assert!(seen[1] > 0 && seen[2] > 0, "the reader saw no change: {seen:?}");
    });
}

/// What is promised for each prefix, in bytes. Times are for `ARCHITECTURE.md`, and for those who change the layout.
#[test]
fn populations() {
    // Lengths of an internet routing table, in 1/1000.
    const TABLE_V4: [(u8, u32); 9] =
        [(24, 590), (23, 100), (22, 110), (21, 50), (20, 45), (19, 30), (18, 15), (17, 10), (16, 50)];
    const TABLE_V6: [(u8, u32); 8] =
        [(48, 470), (44, 110), (40, 95), (36, 45), (32, 130), (29, 50), (56, 50), (64, 50)];
    let mut random = fastrand::Rng::with_seed(1);
    let mut drawn = |lengths: &[(u8, u32)]| {
        let mut at = random.u32(..1000);
        lengths
            .iter()
            .find(|(_, share)| {
                at < *share || {
                    at -= share;
                    false
                }
            })
            .map_or(24, |(length, _)| *length)
    };
    let count = if cfg!(debug_assertions) { 20_000 } else { 1_000_000 };
    println!(
        "{:<14} {:>9} {:>12} {:>12} {:>10} {:>10} {:>10}",
        "", "prefixes", "trie B each", "all B each", "compile ms", "lookup ns", "change us"
    );
    for (name, family, lengths, limit) in [
        ("IPv4 /24", Family::V4, &[(24, 1000)][..], 10.0),
        ("IPv4 table", Family::V4, &TABLE_V4[..], 11.0),
        ("IPv4 /32", Family::V4, &[(32, 1000)][..], 14.0),
        ("IPv6 /64", Family::V6, &[(64, 1000)][..], 32.0),
        ("IPv6 table", Family::V6, &TABLE_V6[..], 23.0),
        ("IPv6 /128", Family::V6, &[(128, 1000)][..], 50.0),
    ] {
        let mut random = fastrand::Rng::with_seed(2);
        let mut state = State::default();
        let sources = (0..count).map(|_| {
            let length = drawn(lengths);
            let prefix = match family {
                Family::V4 => Ipv4Net::new(random.u32(..).into(), length).unwrap().trunc().into(),
                Family::V6 => Ipv6Net::new((1 << 125 | random.u128(..) >> 3).into(), length).unwrap().trunc().into(),
            };
            (prefix, Source { slot: random.u32(..16), arrives_by: 0 })
        });
        state.sources = sources.collect();
        let prefixes = state.sources.len() as f64;
        let begun = Instant::now();
        let image = Image::compile(state.content());
        let compiled = begun.elapsed();
        let (trie, all) = (image.used.len() as f64 * 8.0 / prefixes, image.length() as f64 * 8.0 / prefixes);
        let cells = Cells::of(&image, 1 << 16);
        let keys: Vec<(Root, Key)> = {
            let prefixes: Vec<&IpNet> = state.sources.keys().collect();
            (0..1 << 20).map(|_| key(prefixes[random.usize(..prefixes.len())].addr())).collect()
        };
        let begun = Instant::now();
        for (family, key) in &keys {
            black_box(source(&cells, *family, *key));
        }
        let lookup = begun.elapsed() / (1 << 20);
        let some: Vec<IpNet> = state.sources.keys().step_by(state.sources.len() / 100).copied().collect();
        let changes: Vec<FastOp> =
            some.iter().map(|prefix| FastOp::PutSource(*prefix, Source { slot: 15, arrives_by: 0 })).collect();
        state.sources.change(some.iter().map(|prefix| (*prefix, Some(Source { slot: 15, arrives_by: 0 }))).collect());
        let begun = Instant::now();
        for operation in &changes {
            assert!(change(&cells, state.content(), &[operation]), "{operation:?}");
        }
        let changed = begun.elapsed() / u32::try_from(changes.len()).unwrap();
        println!(
            "{name:<14} {prefixes:>9} {trie:>12.1} {all:>12.1} {:>10} {:>10} {:>10}",
            compiled.as_millis(),
            lookup.as_nanos(),
            changed.as_micros()
        );
        assert!(cfg!(debug_assertions) || all <= limit, "{name}: {all} bytes for each prefix");
        let expected = expected(state.sources.keys());
        assert!(image.length() <= expected, "{name}: {} words, {expected} expected", image.length());
    }
}
