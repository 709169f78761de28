//! What the programs know of prefixes: tries of sources and of exemptions in one array of words.

use crate::{
    maps::Source,
    trie::{Entry, Key, Words, find},
};

/// The first words say where the rest is.
pub mod header {
    /// The root of the IPv4 sources.
    pub const SOURCES_V4: u64 = 0;
    /// The root of the IPv6 sources.
    pub const SOURCES_V6: u64 = 1;
    /// Where the exemption sets begin, and in the upper half their number less one; the number is a power of 2.
    pub const SETS: u64 = 3;
    /// As many words of the record as there are. It stands at the end of the array, the last word first, and is for the
    /// daemon only.
    pub const RECORD: u64 = 4;
    /// As many of them as the list of everything takes; the journal follows.
    pub const LISTED: u64 = 2;
    /// As many words as are used from the first on, for the daemon only.
    pub const USED: u64 = 5;
    /// A word that stays 0: the programs read it instead of what is past the end.
    pub const NOTHING: u64 = 7;
    /// Behind the header begins the table of what a number stands for, of one word each: 0 for no match, then
    /// [`EXEMPT`](super::EXEMPT), then the sources. It ends where the sets begin.
    pub const TABLE: u64 = 8;
}

/// An exemption set has so many words: its number and [`SET_PRESENT`], the root of its IPv4 destinations, the root of its
/// IPv6 destinations, and one that is not used.
pub const SET_WORDS: u64 = 4;
/// Added to a set's number.
pub const SET_PRESENT: u64 = 1 << 32;
/// A set stands at most so far behind the place that its number's lowest bits say.
pub const SET_PROBES: u64 = 8;

/// An address family, by its place among roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Root {
    /// IPv4
    V4 = 0,
    /// IPv6
    V6 = 1,
}

/// For [`look_up`]: the sources, instead of an exemption set.
pub const SOURCES: u64 = u64::MAX;

/// What is known of the longest prefix that holds an address: its word of the table, or 0 if there is none.
#[inline(always)]
pub fn look_up<W: Words + ?Sized>(words: &W, set: u64, family: Root, address: Key) -> u64 {
    let roots = if set == SOURCES { Some(header::SOURCES_V4) } else { root_of_set(words, set) };
    match roots {
        Some(roots) => words.word(header::TABLE + find(words, Entry(words.word(roots + family as u64)), address)),
        None => 0,
    }
}

/// What is known of the longest source prefix that holds an address.
#[inline(always)]
pub fn source<W: Words + ?Sized>(words: &W, family: Root, address: Key) -> Option<Source> {
    unpack(look_up(words, SOURCES, family, address))
}

/// Does an exemption set hold an address?
#[inline(always)]
pub fn exempt<W: Words + ?Sized>(words: &W, set: u32, family: Root, address: Key) -> bool {
    look_up(words, set.into(), family, address) != 0
}

/// The number of every exemption.
pub const EXEMPT: u32 = 1;

/// Set in the table where something matches.
pub const PRESENT: u64 = 1 << 31;

/// A word of the table. It is not 0.
#[must_use]
pub const fn pack(Source { slot, arrives_by }: Source) -> u64 {
    slot as u64 | PRESENT | (arrives_by as u64) << 32
}

/// The source that a word of the table stands for. None, if it is 0.
#[inline(always)]
#[must_use]
pub const fn unpack(word: u64) -> Option<Source> {
    if word & PRESENT == 0 {
        return None;
    }
    Some(Source { slot: (word & 0x7fff_ffff) as u32, arrives_by: (word >> 32) as u32 })
}

/// The place of a set's roots.
#[inline(always)]
pub fn root_of_set<W: Words + ?Sized>(words: &W, set: u64) -> Option<u64> {
    let sets = words.word(header::SETS);
    let (first, mask) = (sets & 0xffff_ffff, sets >> 32);
    for probe in 0..SET_PROBES {
        let place = first + (set.wrapping_add(probe) & mask) * SET_WORDS;
        let found = words.word(place);
        if found == set | SET_PRESENT {
            return Some(place + 1);
        }
        if found == 0 {
            break;
        }
    }
    None
}
