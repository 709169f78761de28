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

/// A table has so many words for each of its entries: the entry, and beside it the bitmap of the node that it leads to, or a
/// second entry. So the two are read together, and memory is reached once less.
///
/// What is beside stays as it is when the entry is replaced: one that comes later has all in places of its own.
pub const STRIDE: u64 = 2;

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

    /// The half that a position is in.
    #[inline(always)]
    const fn half(self, position: u64) -> u64 {
        if position < 64 { self.high } else { self.low }
    }

    /// The bits from a position on come first.
    #[inline(always)]
    const fn from(self, position: u64) -> u64 {
        self.half(position) << (position & 63)
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
    /// One prefix: where the key's bits from the position on, as many as the width says, are those that stand in the
    /// field for the place, the number; else that of the part around. With no bits, the number and nothing deeper.
    Near = 0,
    /// The key's bits from the position on, as many as the width says, choose one of the entries at the place, which stand
    /// [`STRIDE`] words apart.
    Table = 1,
    /// A node: a bitmap of the cells with an entry of their own, and those entries.
    Sparse = 2,
    /// A node: a bitmap of the cells with a [`Leaf`] of their own, and those, two in a word.
    Leaves = 3,
    /// A node: a bitmap of the cells whose number is not that of the cell before, and the numbers in order, each of 2 to the
    /// power of the width bits.
    Runs = 4,
    /// One prefix: where the key's half, up to and with the bit at the position, is that at the place, the number; else that
    /// of the part around. If the width is 1, the first half must be what follows there, too.
    Path = 5,
    /// Where the key's half, up to and with the bit at the position, is that at the place, another entry follows there; else
    /// the number.
    Skip = 6,
    /// As [`Kind::Near`], but where the bits are others, the entry beside it follows.
    Two = 7,
}

/// What stands in a cell of [`Kind::Leaves`], in half a word: the number, and as [`Kind::Near`], at most so many bits and
/// their value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf(pub u64);

impl Leaf {
    /// At most so many bits it has.
    pub const BITS: u32 = 8;
    const NUMBER_AT: u32 = Self::BITS + 4;

    /// The leaf that stands for an entry, if there is one.
    #[must_use]
    pub const fn of(entry: Entry) -> Option<Self> {
        let (number, width) = (entry.number(), entry.width());
        let fits = matches!(entry.kind(), Kind::Near) && width <= Self::BITS as u64;
        if !fits || number >> (u32::BITS - Self::NUMBER_AT) != 0 {
            return None;
        }
        Some(Self(number << Self::NUMBER_AT | width << Self::BITS | entry.place()))
    }

    /// The number where the bits, which come first, are the leaf's; else that of the part around.
    #[inline(always)]
    const fn find(self, bits: u64, around: u64) -> u64 {
        if first(bits, self.0 >> Self::BITS & 15) == self.0 & ((1 << Self::BITS) - 1) {
            self.0 >> Self::NUMBER_AT
        } else {
            around
        }
    }
}

/// So many of the first bits, at most 63. More are of no harm.
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
    /// Added to a node's width where its bitmap is beside the entry; else it is at the place, before the rest.
    pub const BESIDE: u32 = 16;

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

    /// What it is.
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

    /// Which of a table's entries, or the value of a near prefix.
    #[inline(always)]
    const fn index(self, key: Key) -> u64 {
        first(key.from(self.position()), self.width())
    }

    /// Is the key's half, up to and with the position, this one?
    #[inline(always)]
    const fn on_path(self, key: Key, path: u64) -> bool {
        (key.half(self.position()) ^ path) >> (63 - (self.position() & 63)) == 0
    }
}

/// An entry that a lookup has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The entry.
    pub entry: Entry,
    /// The word beside it, which may belong to it.
    pub beside: u64,
    /// The number of the part around.
    pub around: u64,
}

impl At {
    /// The one that stands for everything.
    #[inline(always)]
    #[must_use]
    pub const fn root(entry: Entry) -> Self {
        Self { entry, beside: 0, around: 0 }
    }
}

/// A node, as a key sees it.
struct Node {
    /// The place of what belongs to the cells.
    rest: u64,
    /// The cell's bit is set.
    begins: bool,
    /// As many bits are set up to and with the cell's.
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

/// Where a lookup has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This number matches; 0 is none.
    Found(u64),
    /// There is more.
    On(At),
}

/// One step of a lookup.
///
/// All arithmetic is in 64 bits: the eBPF verifier would lose track of what is narrowed in between.
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
    // Read at once, and so that the verifier need not follow from where.
    Step::On(At { entry: Entry(words.word(next)), beside: words.word(next + 1), around: number })
}

/// The number of the longest prefix that holds the key; 0 if there is none.
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
