#![allow(clippy::indexing_slicing, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Prefixes by start and length, as they are sorted, and their numbers.
type Prefixes = BTreeMap<(u128, u32), u32>;

fn bits_of(family: Family) -> u32 {
    if family == Family::V4 { 32 } else { 128 }
}

fn mask(length: u32) -> u128 {
    u128::MAX.checked_shl(128 - length).unwrap_or(0)
}

/// The oracle: the longest of all that hold the address.
fn longest(prefixes: &Prefixes, address: u128, at_most: u32) -> u32 {
    let holds = |length: &u32| prefixes.get(&(address & mask(*length), *length)).copied();
    (0..=at_most).rev().find_map(|length| holds(&length)).unwrap_or(0)
}

fn within(prefixes: &Prefixes, start: u128, depth: u32) -> Vec<Prefix> {
    let last = start | !mask(depth);
    prefixes
        .range((start, 0)..=(last, 128))
        .filter(|((_, length), _)| *length > depth)
        .map(|((start, length), number)| Prefix { start: *start, length: *length, number: *number })
        .collect()
}

/// The root is the first word.
fn build(family: Family, prefixes: &Prefixes) -> Vec<u64> {
    let mut builder = Builder::new(1);
    let part = Part { cover: longest(prefixes, 0, 0), ..Part::ALL };
    let root = builder.build(family, part, &within(prefixes, 0, 0));
    let mut words = vec![root.0];
    words.extend(builder.into_words());
    words
}

/// Builds anew what a change of a prefix concerns.
fn change(family: Family, words: &mut Vec<u64>, prefixes: &Prefixes, (start, length): (u128, u32)) {
    let sites = Sites::find(words.as_slice(), 0, start, length).expect("well-formed");
    let first = start & mask(sites.depth.min(length));
    for (index, place) in sites.places().enumerate() {
        let start = if sites.depth == 0 { 0 } else { first + ((index as u128) << (128 - sites.depth)) };
        let part = Part { depth: sites.depth, around: sites.around, cover: longest(prefixes, start, sites.depth) };
        let mut builder = Builder::new(words.len());
        let entry = builder.build(family, part, &within(prefixes, start, sites.depth));
        words.extend(builder.into_words());
        words[usize::try_from(place).expect("small")] = entry.0;
    }
}

/// The addresses at which something may change, and next to them.
fn edges(family: Family, prefixes: &Prefixes) -> Vec<u128> {
    let unit = 1u128 << (128 - bits_of(family));
    let edges = prefixes.keys().flat_map(|(start, length)| {
        let last = start | !mask(*length) & mask(bits_of(family));
        [*start, start.wrapping_sub(unit), last, last.wrapping_add(unit), start | ((last ^ start) / 2)]
    });
    edges.map(|address| address & mask(bits_of(family))).chain([0, mask(bits_of(family))]).collect()
}

fn check(family: Family, words: &[u64], prefixes: &Prefixes) -> Result<(), TestCaseError> {
    for address in edges(family, prefixes) {
        let found = tunroute_common::trie::find(words, Entry(words[0]), key(address));
        let expected = longest(prefixes, address, 128);
        prop_assert_eq!(found, u64::from(expected), "{:032x} in {:x?}", address, prefixes);
    }
    Ok(())
}

/// Prefixes that are near one another, so that they nest, and in many places.
fn any_prefix(family: Family) -> impl Strategy<Value = (u128, u32)> {
    let bits = bits_of(family);
    let clusters = [0u128, 0x2001_0db8 << 96, 0x2001_0db8_0001 << 80, u128::MAX, 0x0a00_0000 << 96, 0x2000 << 112];
    (prop::sample::select(clusters.to_vec()), any::<u128>(), 0..=bits, 0..=bits).prop_map(
        move |(cluster, random, keep, length)| {
            let start = cluster & mask(keep) | random & !mask(keep);
            (start & mask(length), length)
        },
    )
}

fn any_prefixes(family: Family, most: usize) -> impl Strategy<Value = Prefixes> {
    prop::collection::btree_map(any_prefix(family), 1u32..300, 0..most)
}

fn any_family() -> impl Strategy<Value = Family> {
    prop::sample::select(Family::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn finds_the_longest_prefix((family, prefixes) in any_family().prop_flat_map(|family| (Just(family), any_prefixes(family, 300)))) {
        check(family, &build(family, &prefixes), &prefixes)?;
    }

    #[test]
    fn a_changed_trie_is_as_one_built_anew(
        (family, mut prefixes, changes) in any_family().prop_flat_map(|family| {
            let changes = prop::collection::vec((any_prefix(family), prop::option::of(1u32..300)), 1..20);
            (Just(family), any_prefixes(family, 300), changes)
        })
    ) {
        let mut words = build(family, &prefixes);
        // Some of them concern what is there.
        let present: Vec<_> = prefixes.keys().copied().step_by(30).map(|prefix| (prefix, None)).collect();
        for (prefix, number) in changes.into_iter().chain(present) {
            match number {
                Some(number) => drop(prefixes.insert(prefix, number)),
                None => drop(prefixes.remove(&prefix)),
            }
            change(family, &mut words, &prefixes, prefix);
            check(family, &words, &prefixes)?;
        }
    }
}

/// As deep as it gets: every bit of one address is the end of a prefix.
#[test]
fn a_chain_of_all_lengths() {
    for family in Family::ALL {
        for address in [0, u128::MAX, 0x5555_5555_5555_5555_5555_5555_5555_5555] {
            let address = address & mask(bits_of(family));
            let prefixes: Prefixes =
                (0..=bits_of(family)).map(|length| ((address & mask(length), length), length + 1)).collect();
            check(family, &build(family, &prefixes), &prefixes).expect("the longest");
        }
    }
}

/// Many prefixes, so that there are tables, at the sizes that are promised.
#[test]
fn a_hundred_thousand() {
    for (family, length, words_each) in [(Family::V4, 24, 4), (Family::V6, 64, 5)] {
        let mut random = fastrand::Rng::with_seed(7);
        let prefixes: Prefixes =
            (0..100_000).map(|_| ((random.u128(..) & mask(length), length), random.u32(1..=200))).collect();
        let words = build(family, &prefixes);
        assert!(words.len() < words_each * prefixes.len(), "{family:?}: {} words", words.len());
        check(family, &words, &prefixes).expect("the longest");
    }
}
