//! What the programs know of prefixes: tries of sources and of exemptions in one array of words.

use crate::{
    maps::Source,
    trie::{Entry, Key, Words, find},
};

/// The first words say where the rest is.
pub mod header {
    /// The root of the IPv4 sources, whose numbers are places in the table of [`Source`](crate::maps::Source)s.
    pub const SOURCES_V4: u64 = 0;
    /// The root of the IPv6 sources.
    pub const SOURCES_V6: u64 = 1;
    /// Where the table of sources begins. Each is one word: the slot, and in the upper half the device.
    pub const TABLE: u64 = 2;
    /// Where the exemption sets begin, and in the upper half their number less one; the number is a power of 2.
    pub const SETS: u64 = 3;
    /// As many words of the record as there are. It stands at the end of the array, the last word first, and is for the
    /// daemon only.
    pub const RECORD: u64 = 4;
    /// As many words as are used from the first on, for the daemon only.
    pub const USED: u64 = 5;
    /// As many words as the header has.
    pub const LENGTH: u64 = 8;
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

/// What is known of the longest source prefix that holds an address.
#[inline(always)]
pub fn source<W: Words + ?Sized>(words: &W, family: Root, address: Key) -> Option<Source> {
    let root = Entry(words.word(header::SOURCES_V4 + family as u64)?);
    let number = find(words, root, address)?;
    if number == 0 {
        return None;
    }
    let source = words.word(words.word(header::TABLE)? + number)?;
    Some(Source { slot: source as u32, arrives_by: (source >> 32) as u32 })
}

/// Does an exemption set hold an address?
#[inline(always)]
pub fn exempt<W: Words + ?Sized>(words: &W, set: u32, family: Root, address: Key) -> bool {
    root_of_set(words, set)
        .and_then(|place| words.word(place + family as u64))
        .and_then(|root| find(words, Entry(root), address))
        .is_some_and(|number| number != 0)
}

/// The place of a set's roots.
#[inline(always)]
pub fn root_of_set<W: Words + ?Sized>(words: &W, set: u32) -> Option<u64> {
    let sets = words.word(header::SETS)?;
    let (first, mask) = (sets & 0xffff_ffff, sets >> 32);
    for probe in 0..core::hint::black_box(SET_PROBES) {
        let place = first + ((u64::from(set) + probe) & mask) * SET_WORDS;
        let found = words.word(place)?;
        if found == u64::from(set) | SET_PRESENT {
            return Some(place + 1);
        }
        if found == 0 {
            break;
        }
    }
    None
}
