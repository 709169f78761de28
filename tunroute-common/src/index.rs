//! The programs' view of prefixes: tries of sources and of exemptions in one array of words.

use crate::{
    maps::{Exempt, Source},
    trie::{Entry, Key, Words, find},
};

/// Places of the header words.
pub mod header {
    /// Root of the IPv4 sources.
    pub const SOURCES_V4: u64 = 0;
    /// Root of the IPv6 sources.
    pub const SOURCES_V6: u64 = 1;
    /// Start of the exemption sets; in the upper half their number less one. The number is a power of 2.
    pub const SETS: u64 = 3;
    /// Number of words of the record, which stands at the end of the array, last word first. For the daemon only.
    pub const RECORD: u64 = 4;
    /// Number of those that the list of all prefixes takes; the journal follows.
    pub const LISTED: u64 = 2;
    /// Number of used words from the first on. For the daemon only.
    pub const USED: u64 = 5;
    /// A word that stays 0: the programs read it in place of words past the end.
    pub const NOTHING: u64 = 7;
    /// Start of the table of numbers, one word each: 0 for no match, then the kinds of exemptions
    /// ([`number_of_exempt`](super::number_of_exempt)), then the sources. It ends where the sets begin.
    pub const TABLE: u64 = 8;
}

/// Words per exemption set: its number with [`SET_PRESENT`], the root of its IPv4 destinations, the root of its IPv6
/// destinations, and an unused one.
pub const SET_WORDS: u64 = 4;
/// Flag in a set's first word: the place is taken.
pub const SET_PRESENT: u64 = 1 << 32;
/// Maximum distance of a set from the place that its number's lowest bits name.
pub const SET_PROBES: u64 = 8;

/// An address family, as an index of roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Root {
    /// IPv4.
    V4 = 0,
    /// IPv6.
    V6 = 1,
}

/// Argument of [`look_up`]: the sources instead of an exemption set.
pub const SOURCES: u64 = u64::MAX;

/// The table word of the longest prefix that contains an address, or 0.
#[inline(always)]
pub fn look_up<W: Words + ?Sized>(words: &W, set: u64, family: Root, address: Key) -> u64 {
    let roots = if set == SOURCES { Some(header::SOURCES_V4) } else { root_of_set(words, set) };
    match roots {
        Some(roots) => words.word(header::TABLE + find(words, Entry(words.word(roots + family as u64)), address)),
        None => 0,
    }
}

/// The longest source prefix that contains an address.
#[inline(always)]
pub fn source<W: Words + ?Sized>(words: &W, family: Root, address: Key) -> Option<Source> {
    unpack(look_up(words, SOURCES, family, address))
}

/// What an exemption set says of an address.
#[inline(always)]
pub fn exempt<W: Words + ?Sized>(words: &W, set: u32, family: Root, address: Key) -> Exempt {
    unpack_exempt(look_up(words, set.into(), family, address))
}

/// The number of each kind of exemption in the table.
#[must_use]
pub const fn number_of_exempt(exempt: Exempt) -> u32 {
    1 + exempt as u32
}

/// The kind of exemption that a word of the table stands for.
#[inline(always)]
#[must_use]
pub const fn unpack_exempt(word: u64) -> Exempt {
    match word & 3 {
        0 => Exempt::No,
        1 => Exempt::Inside,
        _ => Exempt::Anywhere,
    }
}

/// Flag in a table word: there is a match.
pub const PRESENT: u64 = 1 << 31;

/// Packs a source as a table word; never 0.
#[must_use]
pub const fn pack(Source { slot, arrives_by }: Source) -> u64 {
    slot as u64 | PRESENT | (arrives_by as u64) << 32
}

/// Unpacks a table word; `None` if it is 0.
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
