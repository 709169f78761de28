//! Longest-prefix match in a flat array of 64-bit words, read by the eBPF programs and in user space alike.
//!
//! A trie is a tree of [`Entry`]s of one word each. So an entry is read and replaced at once: whoever changes the trie
//! writes what is new into free words first and then the one entry that leads there.

use crate::maps::{Ipv4, Ipv6};

/// No lookup goes through more entries: each node but the last, but where a half of the key ends, leaves at least
/// [`CHUNK`] bits of the key behind.
pub const MAX_DEPTH: u32 = 24;

/// As many bits of the key choose one of a node's cells, whose bitmap is one word.
pub const CHUNK: u32 = 6;

/// An array of words, wherever it is.
pub trait Words {
    /// One word. 0 past the end, which a well-formed trie never asks for: there, nothing matches.
    fn word(&self, index: u64) -> u64;
}

impl Words for [u64] {
    fn word(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.get(index)).copied().unwrap_or_default()
    }
}

/// An address as a number, its first bit in the highest place, cut in halves. What is shorter is followed by zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The first 64 bits.
    pub high: u64,
    /// The other 64 bits.
    pub low: u64,
}

impl Key {
    /// An IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn v4(address: Ipv4) -> Self {
        Self { high: (u32::from_be(address) as u64) << 32, low: 0 }
    }

    /// An IPv6 address.
    #[inline(always)]
    #[must_use]
    pub const fn v6([first, second, third, fourth]: Ipv6) -> Self {
        Self {
            high: (u32::from_be(first) as u64) << 32 | u32::from_be(second) as u64,
            low: (u32::from_be(third) as u64) << 32 | u32::from_be(fourth) as u64,
        }
    }
}

/// What stands in a part of the address space. From the highest bit on: kind (3 bits), position in the key (7), width (5),
/// number (21), place in the array (28).
///
/// A part's *number* is what matches where nothing deeper does; 0 is no match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

/// The kinds of [`Entry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The number, and nothing deeper.
    Number = 0,
    /// The key's bits from the position on, as many as the width says, choose one of the entries at the place.
    Table = 1,
    /// At the place are a bitmap of the cells with an entry of their own, and those entries.
    Sparse = 2,
    /// At the place are a bitmap of the cells whose number is not that of the cell before, and the numbers in order, each
    /// of 2 to the power of the width bits.
    Runs = 3,
    /// One prefix: where the key's bits from the position on, as many as the width says, are those that stand in the
    /// field for the place, the number; else that of the part around.
    Near = 4,
    /// One prefix: where the key's half, up to and with the bit at the position, is that at the place, the number; else that
    /// of the part around.
    Path = 5,
    /// As [`Kind::Path`], but where it is, another entry follows at the place; else the number.
    Skip = 6,
}

impl Entry {
    /// Bits of a place, and of the value of [`Kind::Near`].
    pub const PLACE_BITS: u32 = 28;
    /// Bits of a number.
    pub const NUMBER_BITS: u32 = 21;
    const WIDTH_AT: u32 = Self::PLACE_BITS + Self::NUMBER_BITS;
    const POSITION_AT: u32 = Self::WIDTH_AT + 5;
    const KIND_AT: u32 = Self::POSITION_AT + 7;

    /// Puts an entry together.
    #[must_use]
    pub const fn new(kind: Kind, position: u32, width: u32, number: u32, place: u32) -> Self {
        Self(
            (kind as u64) << Self::KIND_AT
                | (position as u64) << Self::POSITION_AT
                | (width as u64) << Self::WIDTH_AT
                | (number as u64) << Self::PLACE_BITS
                | place as u64,
        )
    }

    /// What it is. A kind that does not exist is a number.
    #[inline(always)]
    #[must_use]
    pub const fn kind(self) -> Kind {
        match self.0 >> Self::KIND_AT {
            1 => Kind::Table,
            2 => Kind::Sparse,
            3 => Kind::Runs,
            4 => Kind::Near,
            5 => Kind::Path,
            6 => Kind::Skip,
            _ => Kind::Number,
        }
    }

    /// Where in the key, counted from the first bit.
    #[inline(always)]
    #[must_use]
    pub const fn position(self) -> u64 {
        self.0 >> Self::POSITION_AT & 127
    }

    /// As many bits.
    #[inline(always)]
    #[must_use]
    pub const fn width(self) -> u64 {
        self.0 >> Self::WIDTH_AT & 31
    }

    /// What matches.
    #[inline(always)]
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0 >> Self::PLACE_BITS & ((1 << Self::NUMBER_BITS) - 1)
    }

    /// Where in the array.
    #[inline(always)]
    #[must_use]
    pub const fn place(self) -> u64 {
        self.0 & ((1 << Self::PLACE_BITS) - 1)
    }

    /// The key's bits from the position on come first.
    #[inline(always)]
    const fn bits(self, key: Key) -> u64 {
        let half = if self.position() < 64 { key.high } else { key.low };
        half << (self.position() & 63)
    }

    /// Which of a node's 64 cells.
    #[inline(always)]
    const fn cell(self, key: Key) -> u64 {
        self.bits(key) >> (64 - CHUNK)
    }

    /// Which of a table's entries, or the value of a near prefix.
    #[inline(always)]
    const fn index(self, key: Key) -> u64 {
        // The width is at least 1.
        self.bits(key) >> ((64 - self.width()) & 63)
    }

    /// Is the key's half, up to and with the position, this one?
    #[inline(always)]
    const fn on_path(self, key: Key, path: u64) -> bool {
        let half = if self.position() < 64 { key.high } else { key.low };
        (half ^ path) >> (63 - (self.position() & 63)) == 0
    }
}

/// Where a lookup has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This number matches; 0 is none.
    Found(u64),
    /// To this entry, and the number of the part around it.
    On(Entry, u64),
}

/// One step of a lookup, from an entry on.
///
/// All arithmetic is in 64 bits: the eBPF verifier would lose track of what is narrowed in between.
#[inline(always)]
pub fn step<W: Words + ?Sized>(words: &W, entry: Entry, around: u64, key: Key) -> Step {
    let (number, place) = (entry.number(), entry.place());
    let next = match entry.kind() {
        Kind::Number => return Step::Found(number),
        Kind::Near => return Step::Found(if entry.index(key) == place { number } else { around }),
        Kind::Path => return Step::Found(if entry.on_path(key, words.word(place)) { number } else { around }),
        Kind::Table => place + entry.index(key),
        Kind::Sparse => {
            let (bitmap, cell) = (words.word(place), entry.cell(key));
            if bitmap >> cell & 1 == 0 {
                return Step::Found(number);
            }
            place + 1 + u64::from((bitmap & ((1 << cell) - 1)).count_ones())
        }
        Kind::Runs => {
            let begun = words.word(place) & (u64::MAX >> (63 - entry.cell(key)));
            let bit = u64::from(begun.count_ones()) << entry.width();
            let word = words.word(place + 1 + (bit >> 6));
            return Step::Found(word >> (bit & 63) & ((1 << (1 << (entry.width() & 7) & 63)) - 1));
        }
        Kind::Skip if entry.on_path(key, words.word(place)) => place + 1,
        Kind::Skip => return Step::Found(number),
    };
    Step::On(Entry(words.word(next)), number)
}

/// The number of the longest prefix that holds the key; 0 if there is none.
#[inline(always)]
pub fn find<W: Words + ?Sized>(words: &W, root: Entry, key: Key) -> u64 {
    let (mut entry, mut around) = (root, 0);
    for _ in 0..MAX_DEPTH {
        match step(words, entry, around, key) {
            Step::Found(number) => return number,
            Step::On(next, number) => (entry, around) = (next, number),
        }
    }
    0
}
