//! Longest-prefix match in a flat array of 64-bit words, shared by the eBPF programs and user space.
//!
//! A trie is a tree of [`Entry`]s of one word each, so an entry is read and replaced atomically: a change writes new
//! parts into free words, then the one entry that leads there.

use crate::maps::{Ipv4, Ipv6};

/// Maximum number of entries on a lookup's way: each node but the last consumes at least [`CHUNK`] bits of the key,
/// except at the end of a half.
pub const MAX_DEPTH: u32 = 24;

/// Number of key bits that choose one of a node's cells; the bitmap of the cells is one word.
pub const CHUNK: u32 = 6;

/// Words per table entry: the entry, and beside it the bitmap of the node that it leads to, or a second entry. Both are
/// in one cache line.
///
/// The word beside an entry stays when the entry is replaced: the new entry has all its words elsewhere.
pub const STRIDE: u64 = 2;

/// An array of words, in a BPF map or in memory.
pub trait Words {
    /// One word. Past the end it is 0, which matches nothing; a well-formed trie never reads there.
    fn word(&self, index: u64) -> u64;
}

impl Words for [u64] {
    fn word(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.get(index)).copied().unwrap_or_default()
    }
}

/// An address in two halves, its first bit the most significant one. Shorter addresses are followed by zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The first 64 bits.
    pub high: u64,
    /// The other 64 bits.
    pub low: u64,
}

impl Key {
    /// The key of an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn v4(address: Ipv4) -> Self {
        Self { high: (u32::from_be(address) as u64) << 32, low: 0 }
    }

    /// The key of an IPv6 address.
    #[inline(always)]
    #[must_use]
    pub const fn v6([first, second, third, fourth]: Ipv6) -> Self {
        Self {
            high: (u32::from_be(first) as u64) << 32 | u32::from_be(second) as u64,
            low: (u32::from_be(third) as u64) << 32 | u32::from_be(fourth) as u64,
        }
    }

    /// The half that holds a position.
    #[inline(always)]
    const fn half(self, position: u64) -> u64 {
        if position < 64 { self.high } else { self.low }
    }

    /// The bits from a position on, left-aligned.
    #[inline(always)]
    const fn from(self, position: u64) -> u64 {
        self.half(position) << (position & 63)
    }
}

/// One word that describes a part of the address space. From the highest bit on: kind (3 bits), position in the key
/// (7), width (5), number (21), place in the array (28).
///
/// The *number* of a part is the match if nothing below matches; 0 is no match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

/// The kinds of [`Entry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// One prefix: if the `width` key bits from the position on equal the place field, its number; else the number of
    /// the surrounding part. With width 0: the number, and nothing below.
    Near = 0,
    /// A table: the `width` key bits from the position on choose an entry at the place; entries are [`STRIDE`] words
    /// apart.
    Table = 1,
    /// A node: a bitmap of the cells with an entry of their own, and those entries.
    Sparse = 2,
    /// A node: a bitmap of the cells with a [`Leaf`] of their own, and those leaves, two in a word.
    Leaves = 3,
    /// A node of runs: a bitmap of the cells whose number differs from the previous cell's, and the numbers in order,
    /// each of 2^`width` bits.
    Runs = 4,
    /// One prefix: if the key's half, through the bit at the position, equals the word at the place, its number; else
    /// the number of the surrounding part. With width 1, the first half must equal the next word as well.
    Path = 5,
    /// A skip: if the key's half, through the bit at the position, equals the word at the place, another entry follows
    /// there; else the number.
    Skip = 6,
    /// Like [`Kind::Near`], but if the bits differ, the entry beside it follows.
    Two = 7,
}

/// Content of a cell of [`Kind::Leaves`], half a word: the number, and as in [`Kind::Near`] a few bits and their value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf(pub u64);

impl Leaf {
    /// Maximum number of bits of a leaf.
    pub const BITS: u32 = 8;
    const NUMBER_AT: u32 = Self::BITS + 4;

    /// The leaf that equals an entry, if there is one.
    #[must_use]
    pub const fn of(entry: Entry) -> Option<Self> {
        let (number, width) = (entry.number(), entry.width());
        let fits = matches!(entry.kind(), Kind::Near) && width <= Self::BITS as u64;
        if !fits || number >> (u32::BITS - Self::NUMBER_AT) != 0 {
            return None;
        }
        Some(Self(number << Self::NUMBER_AT | width << Self::BITS | entry.place()))
    }

    /// The number if the leading bits equal the leaf's; else the surrounding part's.
    #[inline(always)]
    const fn find(self, bits: u64, around: u64) -> u64 {
        if first(bits, self.0 >> Self::BITS & 15) == self.0 & ((1 << Self::BITS) - 1) {
            self.0 >> Self::NUMBER_AT
        } else {
            around
        }
    }
}

/// The first `count` bits, at most 63; a larger count is harmless.
#[inline(always)]
const fn first(bits: u64, width: u64) -> u64 {
    bits >> 1 >> ((63 - width) & 63)
}

impl Entry {
    /// Bits of a place, and of the value of [`Kind::Near`].
    pub const PLACE_BITS: u32 = 28;
    /// Bits of a number.
    pub const NUMBER_BITS: u32 = 21;
    const WIDTH_AT: u32 = Self::PLACE_BITS + Self::NUMBER_BITS;
    const POSITION_AT: u32 = Self::WIDTH_AT + 5;
    const KIND_AT: u32 = Self::POSITION_AT + 7;
    /// Added to a node's width if its bitmap stands beside the entry; else it is at the place, ahead of the rest.
    pub const BESIDE: u32 = 16;

    /// Packs an entry.
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

    /// The kind.
    #[inline(always)]
    #[must_use]
    pub const fn kind(self) -> Kind {
        match self.0 >> Self::KIND_AT {
            1 => Kind::Table,
            2 => Kind::Sparse,
            3 => Kind::Leaves,
            4 => Kind::Runs,
            5 => Kind::Path,
            6 => Kind::Skip,
            7 => Kind::Two,
            _ => Kind::Near,
        }
    }

    /// Position in the key, counted from the first bit.
    #[inline(always)]
    #[must_use]
    pub const fn position(self) -> u64 {
        self.0 >> Self::POSITION_AT & 127
    }

    /// Width in bits.
    #[inline(always)]
    #[must_use]
    pub const fn width(self) -> u64 {
        self.0 >> Self::WIDTH_AT & 31
    }

    /// Number of the match.
    #[inline(always)]
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0 >> Self::PLACE_BITS & ((1 << Self::NUMBER_BITS) - 1)
    }

    /// Place in the array.
    #[inline(always)]
    #[must_use]
    pub const fn place(self) -> u64 {
        self.0 & ((1 << Self::PLACE_BITS) - 1)
    }

    /// Index of a table's entry, or the value of a near prefix.
    #[inline(always)]
    const fn index(self, key: Key) -> u64 {
        first(key.from(self.position()), self.width())
    }

    /// Returns true if the key's half equals this one through the position.
    #[inline(always)]
    const fn on_path(self, key: Key, path: u64) -> bool {
        (key.half(self.position()) ^ path) >> (63 - (self.position() & 63)) == 0
    }
}

/// An entry that a lookup has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The entry.
    pub entry: Entry,
    /// The word beside it, which may belong to it.
    pub beside: u64,
    /// Number of the surrounding part.
    pub around: u64,
}

impl At {
    /// The root entry.
    #[inline(always)]
    #[must_use]
    pub const fn root(entry: Entry) -> Self {
        Self { entry, beside: 0, around: 0 }
    }
}

/// A node, seen from one key.
struct Node {
    /// Place of the cells' contents.
    rest: u64,
    /// Whether the cell's bit is set.
    begins: bool,
    /// Number of set bits through the cell's.
    begun: u64,
}

impl Node {
    #[inline(always)]
    fn of<W: Words + ?Sized>(words: &W, entry: Entry, beside: u64, key: Key) -> Self {
        let is_beside = entry.width() & u64::from(Entry::BESIDE) != 0;
        let bitmap = if is_beside { beside } else { words.word(entry.place()) };
        let cell = key.from(entry.position()) >> (64 - CHUNK);
        Self {
            rest: entry.place() + u64::from(!is_beside),
            begins: bitmap >> cell & 1 == 1,
            begun: u64::from((bitmap & (u64::MAX >> (63 - cell))).count_ones()),
        }
    }
}

/// Result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This number matches; 0 is no match.
    Found(u64),
    /// The lookup goes on here.
    On(At),
}

/// One step of a lookup.
///
/// All arithmetic is in 64 bits: the eBPF verifier loses track of values that are narrowed in between.
#[inline(always)]
pub fn step<W: Words + ?Sized>(words: &W, At { entry, beside, around }: At, key: Key) -> Step {
    let (number, place) = (entry.number(), entry.place());
    let next = match entry.kind() {
        Kind::Near => return Step::Found(if entry.index(key) == place { number } else { around }),
        Kind::Two if entry.index(key) == place => return Step::Found(number),
        Kind::Two => return Step::On(At { entry: Entry(beside), beside: 0, around }),
        Kind::Table => place + entry.index(key) * STRIDE,
        Kind::Path => {
            let both = entry.width() & 1;
            let differs = both * (key.high ^ words.word(place + both));
            let found = differs == 0 && entry.on_path(key, words.word(place));
            return Step::Found(if found { number } else { around });
        }
        Kind::Skip if entry.on_path(key, words.word(place)) => place + 1,
        Kind::Skip => return Step::Found(number),
        Kind::Runs => {
            let node = Node::of(words, entry, beside, key);
            let bit = node.begun << (entry.width() & 7);
            let word = words.word(node.rest + (bit >> 6));
            return Step::Found(word >> (bit & 63) & ((1 << (1 << (entry.width() & 7) & 63)) - 1));
        }
        Kind::Leaves => {
            let node = Node::of(words, entry, beside, key);
            if !node.begins {
                return Step::Found(number);
            }
            let index = node.begun - 1;
            let leaf = Leaf(words.word(node.rest + (index >> 1)) >> ((index & 1) * 32) & 0xffff_ffff);
            return Step::Found(leaf.find(key.from(entry.position() + u64::from(CHUNK)), number));
        }
        Kind::Sparse => {
            let node = Node::of(words, entry, beside, key);
            if !node.begins {
                return Step::Found(number);
            }
            node.rest + node.begun - 1
        }
    };
    // One load, so that the verifier need not track where it came from.
    Step::On(At { entry: Entry(words.word(next)), beside: words.word(next + 1), around: number })
}

/// Number of the longest prefix that contains the key; 0 if there is none.
#[inline(always)]
pub fn find<W: Words + ?Sized>(words: &W, root: Entry, key: Key) -> u64 {
    let mut at = At::root(root);
    for _ in 0..MAX_DEPTH {
        match step(words, at, key) {
            Step::Found(number) => return number,
            Step::On(next) => at = next,
        }
    }
    0
}
