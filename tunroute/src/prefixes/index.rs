//! The array of words in which the programs look up prefixes: built whole, or changed in place.
//!
//! Besides the tries it holds a [record], from which a restarted daemon reads the prefixes back.
#![allow(
    clippy::cast_possible_truncation,
    reason = "words are cut into their fields, and a place in memory fits a usize"
)]

mod record;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use foldhash::{HashMap, HashMapExt as _};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tunroute_common::{
    index::{Root, SET_PRESENT, SET_PROBES, SET_WORDS, header, number_of_exempt, pack, root_of_set},
    maps::{Exempt, Source},
    trie::{Entry, Key, Words},
};

use self::record::Journal;
pub use self::record::read;
use crate::{
    policy::fast::{Exemption, FastOp},
    policy::net::Family,
    prefixes::map::PrefixMap,
    prefixes::trie::{self, Builder, Part, Prefix, Sites},
};

/// Prefixes to look up.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    /// The source prefixes and their values.
    pub sources: &'a PrefixMap<Source>,
    /// The destinations of each exemption set.
    pub exempt: &'a BTreeSet<Exemption>,
}

/// An array that is written while programs read it.
pub trait Memory: Words {
    /// Length in words.
    fn length(&self) -> u64;

    /// Writes a word after all earlier writes: a reader that sees this word sees those.
    fn write(&self, index: u64, word: u64);
}

/// The array is too small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Number of words needed.
    pub needed: u64,
}

/// A compiled array, with free space behind the used words.
#[derive(Debug)]
pub struct Image {
    used: Vec<u64>,
    /// In the order of construction; the first word belongs at the end of the array.
    record: Vec<u64>,
}

/// Number of the first source in the table.
const FIRST_SOURCE: u32 = number_of_exempt(Exempt::Anywhere) + 1;
/// Room in the table for sources beyond the known ones.
const TABLE_ROOM: usize = 64;

impl Image {
    /// Compiles everything.
    #[must_use]
    pub fn compile(content: Content<'_>) -> Self {
        let mut distinct: Vec<Source> = Vec::new();
        let mut numbers: HashMap<(u32, u32), u32> = HashMap::new();
        let mut sources = [Vec::new(), Vec::new()];
        for (prefix, source) in content.sources {
            let number = *numbers.entry((source.slot, source.arrives_by)).or_insert_with(|| {
                distinct.push(*source);
                u32::try_from(distinct.len()).map_or(u32::MAX, |known| FIRST_SOURCE + known - 1)
            });
            sources[Family::of(prefix) as usize].push(numbered(prefix, number));
        }
        let mut sets: BTreeMap<u32, [Vec<Prefix>; 2]> = BTreeMap::new();
        for Exemption { set, prefix, kind } in content.exempt {
            let prefixes = &mut sets.entry(*set).or_default()[Family::of(prefix) as usize];
            let prefix = numbered(prefix, number_of_exempt(*kind));
            // While one kind takes the place of another, both are there.
            prefixes.pop_if(|last| (last.start, last.length) == (prefix.start, prefix.length));
            prefixes.push(prefix);
        }

        let table = header::TABLE as usize;
        let room = FIRST_SOURCE as usize + distinct.len() + TABLE_ROOM.max(distinct.len());
        let places = place_sets(sets.keys().copied());
        let first_set = table + room;
        let base = first_set + places.len() * SET_WORDS as usize;
        let mut used = vec![0; base];
        used[header::SETS as usize] = first_set as u64 | (places.len() as u64 - 1) << 32;
        for kind in Exempt::ALL {
            used[table + number_of_exempt(kind) as usize] = kind as u64;
        }
        for (word, source) in used[table + FIRST_SOURCE as usize..].iter_mut().zip(&distinct) {
            *word = pack(*source);
        }
        let build = || {
            let mut builder = Builder::new(base);
            for family in Family::ALL {
                used[(header::SOURCES_V4 + family as u64) as usize] =
                    whole(&mut builder, family, &sources[family as usize]);
            }
            for (place, set) in places.iter().enumerate() {
                let Some((set, prefixes)) = set.and_then(|set| Some((set, sets.get(&set)?))) else { continue };
                let at = first_set + place * SET_WORDS as usize;
                used[at] = u64::from(set) | SET_PRESENT;
                for family in Family::ALL {
                    used[at + 1 + family as usize] = whole(&mut builder, family, &prefixes[family as usize]);
                }
            }
            used.extend(builder.into_words());
        };
        let ((), record) = rayon::join(build, || record::list(&sources, &sets));
        used[header::USED as usize] = used.len() as u64;
        used[header::LISTED as usize] = record.len() as u64;
        used[header::RECORD as usize] = record.len() as u64;
        Self { used, record }
    }

    /// Size in words, without room for changes.
    #[must_use]
    pub fn length(&self) -> u64 {
        (self.used.len() + self.record.len()) as u64
    }

    /// Recommended size in words of the array that it is written into, with room for changes.
    #[must_use]
    pub fn length_with_room(&self) -> u64 {
        (self.length() + self.length() / 4 + MINIMUM).next_multiple_of(MINIMUM)
    }

    /// Writes it into an array of zeros that no program reads yet.
    ///
    /// # Errors
    ///
    /// The array is too small.
    pub fn write<M: Memory + ?Sized>(&self, memory: &M) -> Result<(), Full> {
        if self.length() > memory.length() || memory.length() > 1 << Entry::PLACE_BITS {
            return Err(Full { needed: self.length_with_room() });
        }
        for (index, word) in self.used.iter().enumerate() {
            memory.write(index as u64, *word);
        }
        for (index, word) in self.record.iter().enumerate() {
            memory.write(memory.length() - 1 - index as u64, *word);
        }
        Ok(())
    }
}

/// Minimum size of an array in words; sizes are multiples of it.
pub const MINIMUM: u64 = 1 << 13;

/// Estimated size in words for source prefixes that are not compiled yet, so that programs are not loaded a second
/// time: the first table, and the bytes per prefix that random prefixes have taken.
#[must_use]
pub fn expected<'a>(prefixes: impl Iterator<Item = &'a IpNet>) -> u64 {
    let (mut counts, mut bytes) = ([0; 2], 0);
    for prefix in prefixes {
        let family = Family::of(prefix);
        counts[family as usize] += 1;
        bytes += match (family, prefix.prefix_len()) {
            (Family::V4, ..=24) => 6,
            (Family::V4, _) => 10,
            (Family::V6, ..=64) => 27,
            (Family::V6, _) => 45,
        };
    }
    let words = bytes / 8 + counts.into_iter().map(trie::table_words).sum::<u64>();
    (words + words / 16 + MINIMUM).next_multiple_of(MINIMUM)
}

/// Applies operations to an array that programs read; `content` is the state afterwards. Returns false if there is no
/// room and a new array is needed; some operations may have been applied by then.
#[must_use]
pub fn change<M: Memory + ?Sized>(memory: &M, content: Content<'_>, operations: &[&FastOp]) -> bool {
    // The parts built for one operation may refer to what another operation adds.
    let known = operations.iter().all(|operation| match operation {
        FastOp::PutSource(_, source) => number_of(memory, *source).is_some(),
        _ => true,
    });
    known && operations.iter().all(|operation| change_one(memory, content, operation).is_some())
}

fn change_one<M: Memory + ?Sized>(memory: &M, content: Content<'_>, operation: &FastOp) -> Option<()> {
    let exempt = |set, prefix| {
        let of_kind = |kind: &Exempt| content.exempt.contains(&Exemption { set, prefix, kind: *kind });
        Exempt::ALL.into_iter().rfind(of_kind).map(number_of_exempt)
    };
    let mut journal = Journal::default();
    match operation {
        FastOp::PutSource(prefix, source) => journal.source(prefix, number_of(memory, *source)?),
        FastOp::RemoveSource(prefix) => journal.source(prefix, 0),
        FastOp::AddExemption(Exemption { set, prefix, .. })
        | FastOp::RemoveExemption(Exemption { set, prefix, .. }) => {
            journal.exemption(*set, prefix, exempt(*set, *prefix).unwrap_or_default());
        }
        _ => return None,
    }
    match operation {
        FastOp::PutSource(prefix, _) | FastOp::RemoveSource(prefix) => {
            let root = header::SOURCES_V4 + Family::of(prefix) as u64;
            let number = |source: &Source| number_of(memory, *source).unwrap_or_default();
            rebuild(
                memory,
                &journal,
                root,
                prefix,
                |range| {
                    content
                        .sources
                        .range(range)
                        .iter()
                        .map(|(prefix, source)| numbered(prefix, number(source)))
                        .collect()
                },
                |prefix| content.sources.get(prefix).map(number),
            )
        }
        FastOp::AddExemption(Exemption { set, prefix, .. })
        | FastOp::RemoveExemption(Exemption { set, prefix, .. }) => {
            let root = root_of_set(memory, u64::from(*set))? + Family::of(prefix) as u64;
            let of_set = |prefix, kind| Exemption { set: *set, prefix, kind };
            rebuild(
                memory,
                &journal,
                root,
                prefix,
                |range| {
                    let range = of_set(*range.start(), Exempt::No)..=of_set(*range.end(), Exempt::Anywhere);
                    let of_kind = |Exemption { prefix, kind, .. }: &_| numbered(prefix, number_of_exempt(*kind));
                    let mut prefixes: Vec<Prefix> = content.exempt.range(range).map(of_kind).collect();
                    // Of several kinds of one prefix, the last.
                    prefixes.reverse();
                    prefixes.dedup_by_key(|prefix| (prefix.start, prefix.length));
                    prefixes.reverse();
                    prefixes
                },
                |prefix| exempt(*set, *prefix),
            )
        }
        _ => None,
    }
}

/// Maximum number of parts rebuilt for one operation; beyond that a new array is as fast.
const MAX_SITES: u64 = 1 << 12;

/// Rebuilds the parts that a prefix affects: first all new words, then the entries that lead to them.
fn rebuild<M: Memory + ?Sized>(
    memory: &M,
    journal: &Journal,
    root: u64,
    prefix: &IpNet,
    within: impl Fn(std::ops::RangeInclusive<IpNet>) -> Vec<Prefix>,
    number: impl Fn(&IpNet) -> Option<u32>,
) -> Option<()> {
    let family = Family::of(prefix);
    let Prefix { start, length, .. } = numbered(prefix, 0);
    let sites = Sites::find(memory, root, start, length)?;
    if sites.count > MAX_SITES {
        return None;
    }
    let (used, recorded) = (memory.word(header::USED), memory.word(header::RECORD));
    // Not so in a damaged array.
    let free = memory.length().checked_sub(used.checked_add(recorded)?)?;
    let mut builder = Builder::new(usize::try_from(used).ok()?);
    let mut entries = Vec::new();
    let first = start & mask(sites.depth);
    for (index, place) in sites.places().enumerate() {
        let start = if sites.depth == 0 { 0 } else { first + ((index as u128) << (128 - sites.depth)) };
        let part = prefix_at(family, start, sites.depth)?;
        let cover = (0..=sites.depth).rev().find_map(|length| number(&prefix_at(family, start, length)?));
        let last = prefix_at(family, start | !mask(sites.depth), if family == Family::V4 { 32 } else { 128 })?;
        let mut deeper = within(part..=last);
        deeper.retain(|prefix| prefix.length > sites.depth);
        let part = Part { depth: sites.depth, around: sites.around, cover: cover.unwrap_or_default() };
        entries.push((place, builder.build(family, part, &deeper)));
    }
    let words = builder.into_words();
    if words.len() as u64 + journal.0.len() as u64 > free {
        return None;
    }
    let end = used + words.len() as u64;
    let record_end = recorded + journal.0.len() as u64;
    for (word, place) in words.iter().zip(used..) {
        memory.write(place, *word);
    }
    for (word, index) in journal.0.iter().zip(recorded..) {
        memory.write(memory.length() - 1 - index, *word);
    }
    memory.write(header::USED, end);
    for (place, entry) in entries {
        memory.write(place, entry.0);
    }
    // Last: a recorded change has been made, even if the daemon dies here.
    memory.write(header::RECORD, record_end);
    Some(())
}

/// Number of used words of an array.
pub fn used<M: Memory + ?Sized>(memory: &M) -> u64 {
    memory.word(header::USED).saturating_add(memory.word(header::RECORD))
}

fn whole(builder: &mut Builder, family: Family, prefixes: &[Prefix]) -> u64 {
    let whole = prefixes.partition_point(|prefix| prefix.length == 0);
    let cover = prefixes[..whole].last().map_or(0, |prefix| prefix.number);
    builder.build(family, Part { cover, ..Part::ALL }, &prefixes[whole..]).0
}

/// The number of a source in the table; adds it if it is not there.
fn number_of<M: Memory + ?Sized>(memory: &M, source: Source) -> Option<u32> {
    let end = (memory.word(header::SETS) & 0xffff_ffff).min(memory.length());
    for place in header::TABLE + u64::from(FIRST_SOURCE)..end {
        let word = memory.word(place);
        if word == 0 {
            memory.write(place, pack(source));
        }
        if word == 0 || word == pack(source) {
            return u32::try_from(place - header::TABLE).ok();
        }
    }
    None
}

/// Places sets where [`root_of_set`] finds them. The number of places is a power of 2.
fn place_sets(sets: impl Iterator<Item = u32> + Clone) -> Vec<Option<u32>> {
    let mut size = (sets.clone().count() * 2).next_power_of_two();
    'size: loop {
        let mut places = vec![None; size];
        for set in sets.clone() {
            let probes = (0..SET_PROBES).map(|probe| (u64::from(set) + probe) as usize & (size - 1));
            let Some(free) = probes.into_iter().find(|place| places[*place].is_none()) else {
                size *= 2;
                continue 'size;
            };
            places[free] = Some(set);
        }
        return places;
    }
}

fn numbered(prefix: &IpNet, number: u32) -> Prefix {
    let start = match prefix {
        IpNet::V4(prefix) => u128::from(prefix.addr().to_bits()) << 96,
        IpNet::V6(prefix) => prefix.addr().to_bits(),
    };
    Prefix { start, length: prefix.prefix_len().into(), number }
}

fn prefix_at(family: Family, start: u128, length: u32) -> Option<IpNet> {
    let (start, length) = (start & mask(length), u8::try_from(length).ok()?);
    match family {
        Family::V4 => Ipv4Net::new(Ipv4Addr::from_bits((start >> 96) as u32), length).ok().map(IpNet::V4),
        Family::V6 => Ipv6Net::new(Ipv6Addr::from_bits(start), length).ok().map(IpNet::V6),
    }
}

fn mask(length: u32) -> u128 {
    u128::MAX.checked_shl(128 - length.min(128)).unwrap_or(0)
}

/// Family and address in the programs' form.
#[must_use]
pub fn key(address: IpAddr) -> (Root, Key) {
    match address {
        IpAddr::V4(address) => (Root::V4, trie::key(u128::from(address.to_bits()) << 96)),
        IpAddr::V6(address) => (Root::V6, trie::key(address.to_bits())),
    }
}

#[cfg(test)]
mod tests;
