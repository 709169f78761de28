//! Builds the trie that [`tunroute_common::trie::find`] looks up in, whole or the parts that a change concerns.

use tunroute_common::trie::{CHUNK, Entry, Key, Kind, Leaf, STRIDE, Words};

use crate::policy::net::Family;

/// From as many prefixes on, a table leads to them: it costs [`STRIDE`] words for each of its entries, and saves steps.
const TABLE_FROM: usize = 64;
/// A table has at most so many bits: 4 MiB, of which a processor's caches hold what is in use.
const TABLE_BITS: u32 = 18;
/// Passing over so many bits that all prefixes share is worth an entry of its own.
const SKIP_FROM: u32 = 2 * CHUNK;
/// A node has so many cells.
const CELLS: usize = 1 << CHUNK;
/// Bits of a half of a key.
const HALF: u32 = u64::BITS;

/// A table of so many bits, 256 KiB, is in the caches that are near in any case.
const SMALL_TABLE_BITS: u32 = 14;

/// So many bits choose at most among a table's entries: two entries for each prefix, or up to four; four times as many in a
/// small one.
fn table_bits(prefixes: usize) -> u32 {
    let bits = prefixes.checked_ilog2().unwrap_or_default();
    (bits + 2).max(SMALL_TABLE_BITS.min(bits + 4)).min(TABLE_BITS)
}

/// As many words as the first table has at most for so many prefixes.
pub fn table_words(prefixes: usize) -> u64 {
    if prefixes < TABLE_FROM { 0 } else { STRIDE << table_bits(prefixes) }
}

/// A prefix and what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Its first address, the first bit in the highest place, followed by zeros.
    pub start: u128,
    /// In bits.
    pub length: u32,
    /// Not 0, and of at most [`Entry::NUMBER_BITS`].
    pub number: u32,
}

/// The key of an address that begins in the highest place.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "the other half")]
pub const fn key(address: u128) -> Key {
    Key { high: (address >> HALF) as u64, low: address as u64 }
}

/// A part of the address space: that of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// So many of the key's first bits have led there.
    pub depth: u32,
    /// The number of the part around.
    pub around: u32,
    /// The number of the longest prefix that holds the whole part.
    pub cover: u32,
}

impl Part {
    /// The whole address space.
    pub const ALL: Self = Self { depth: 0, around: 0, cover: 0 };
}

/// New words, to be put into free places.
#[derive(Debug)]
pub struct Builder {
    /// As many bits as an address has.
    end: u32,
    /// The place of the first word.
    base: usize,
    words: Vec<u64>,
}

impl Builder {
    /// Words for the places from `base` on.
    #[must_use]
    pub const fn new(base: usize) -> Self {
        Self { end: 128, base, words: Vec::new() }
    }

    /// The words.
    #[must_use]
    pub fn into_words(self) -> Vec<u64> {
        self.words
    }

    /// Builds what stands in a part. The prefixes lie within it, sorted by start and then length; those that hold all of it
    /// have been taken for its cover already.
    pub fn build(&mut self, family: Family, part: Part, prefixes: &[Prefix]) -> Entry {
        self.end = if family == Family::V4 { 32 } else { 128 };
        self.entry(part, prefixes, None)
    }

    /// Room for so many words.
    fn reserve(&mut self, count: usize) -> usize {
        let at = self.words.len();
        self.words.resize(at + count, 0);
        at
    }

    /// The place of a word. One that does not fit is noticed by whoever has too many words then.
    fn place(&self, at: usize) -> u32 {
        u32::try_from(self.base + at).unwrap_or(u32::MAX) & ((1 << Entry::PLACE_BITS) - 1)
    }

    /// Where the half ends that the bits from there on belong to.
    fn half_end(&self, depth: u32) -> u32 {
        if depth < HALF { self.end.min(HALF) } else { self.end }
    }

    /// An entry, and all that it leads to. What belongs beside it is put there, if it has such a word.
    fn entry(&mut self, part: Part, prefixes: &[Prefix], beside: Option<usize>) -> Entry {
        let Part { depth, around, cover } = part;
        let [first, .., last] = prefixes else {
            return match prefixes {
                [only] if cover == around => self.single(part, only),
                [only] => self.skip(part, only.start, only.length.min(self.half_end(depth)), prefixes),
                _ => Entry::new(Kind::Near, 0, 0, cover, 0),
            };
        };
        if let ([one, other], Some(place)) = (prefixes, beside)
            && cover == around
            && let Some(entry) = self.two(part, one, other, place)
        {
            return entry;
        }
        // Sorted: if any is as short as what all share, the first is.
        let shared = (first.start ^ last.start).leading_zeros().min(first.length).min(self.half_end(depth));
        if shared >= depth + SKIP_FROM {
            return self.skip(part, first.start, shared, prefixes);
        }
        // Near the end of a half, a node looks at bits again that have led to it.
        let position = depth.min(self.half_end(depth) - CHUNK);
        if prefixes.iter().all(|prefix| prefix.length <= position + CHUNK) {
            return self.runs(position, cover, prefixes, beside);
        }
        let bits = enough_bits(depth, table_bits(prefixes.len()).min(self.half_end(depth) - depth), prefixes);
        if prefixes.len() >= TABLE_FROM && bits > CHUNK {
            return self.table(part, bits, prefixes);
        }
        self.sparse(position, cover, prefixes, beside)
    }

    /// One prefix, in a part in which nothing else is but what is around.
    fn single(&mut self, part: Part, prefix: &Prefix) -> Entry {
        if let Some(entry) = self.near(Kind::Near, part, prefix) {
            return entry;
        }
        let Prefix { start, length, number } = *prefix;
        let both = length > self.half_end(part.depth);
        let at = self.words.len();
        self.words.push(half(start, length - 1));
        if both {
            self.words.push(half(start, part.depth));
        }
        Entry::new(Kind::Path, length - 1, both.into(), number, self.place(at))
    }

    /// One prefix whose bits have room in an entry.
    fn near(&self, kind: Kind, Part { depth, .. }: Part, prefix: &Prefix) -> Option<Entry> {
        let width = prefix.length - depth;
        let fits = width <= Entry::PLACE_BITS && prefix.length <= self.half_end(depth);
        let value = Entry::new(kind, depth, width, prefix.number, 0).0;
        fits.then(|| Entry(value | bits(prefix.start, depth, width) as u64))
    }

    /// Two prefixes, the second one's entry beside that of the first.
    fn two(&mut self, part: Part, one: &Prefix, other: &Prefix, beside: usize) -> Option<Entry> {
        let nested = (one.start ^ other.start).leading_zeros() >= one.length;
        // What is nested in the other is looked at first. Sorted: it is the second of them.
        let (entry, last) = match (self.near(Kind::Two, part, other), self.near(Kind::Two, part, one)) {
            (Some(entry), _) => (entry, one),
            (None, Some(entry)) if !nested => (entry, other),
            _ => return None,
        };
        self.words[beside] = self.single(part, last).0;
        Some(entry)
    }

    /// Passes over the bits that all prefixes share.
    fn skip(&mut self, Part { depth, cover, .. }: Part, start: u128, shared: u32, prefixes: &[Prefix]) -> Entry {
        let at = self.reserve(2);
        self.words[at] = half(start, depth);
        let (whole, deeper) = prefixes.split_at(prefixes.partition_point(|prefix| prefix.length <= shared));
        let inner = Part { depth: shared, around: cover, cover: whole.last().map_or(cover, |prefix| prefix.number) };
        self.words[at + 1] = self.entry(inner, deeper, None).0;
        Entry::new(Kind::Skip, shared - 1, 0, cover, self.place(at))
    }

    #[allow(clippy::cast_possible_truncation, reason = "a small constant")]
    fn table(&mut self, Part { depth, cover, .. }: Part, bits: u32, prefixes: &[Prefix]) -> Entry {
        let stride = STRIDE as usize;
        let at = self.reserve(stride << bits);
        self.cells(&mut vec![0; 1 << bits], (depth, bits), cover, prefixes, |builder, cell, part, deeper| {
            let at = at + cell * stride;
            let entry = builder.entry(part, deeper, Some(at + 1));
            builder.words[at] = entry.0;
        });
        Entry::new(Kind::Table, depth, bits, cover, self.place(at))
    }

    fn sparse(&mut self, position: u32, cover: u32, prefixes: &[Prefix], beside: Option<usize>) -> Entry {
        let (mut bitmap, mut entries, mut count) = (0u64, [0u64; CELLS], 0);
        self.cells(&mut [0; CELLS], (position, CHUNK), cover, prefixes, |builder, cell, part, deeper| {
            if part.cover != cover || !deeper.is_empty() {
                bitmap |= 1 << cell;
                entries[count] = builder.entry(part, deeper, None).0;
                count += 1;
            }
        });
        let entries = &entries[..count];
        let mut leaves = [0u64; CELLS];
        let are_leaves = leaves
            .iter_mut()
            .zip(entries)
            .all(|(leaf, entry)| Leaf::of(Entry(*entry)).map(|of| *leaf = of.0).is_some());
        if are_leaves {
            self.node(Kind::Leaves, (position, 0), cover, bitmap, packed(u32::BITS.ilog2(), &leaves[..count]), beside)
        } else {
            self.node(Kind::Sparse, (position, 0), cover, bitmap, entries.iter().copied(), beside)
        }
    }

    /// Nothing here is deeper than a cell.
    fn runs(&mut self, position: u32, cover: u32, prefixes: &[Prefix], beside: Option<usize>) -> Entry {
        let mut numbers = [0; CELLS];
        covers(&mut numbers, (position, CHUNK), cover, prefixes);
        let (mut bitmap, mut runs, mut count) = (0u64, [u64::from(numbers[0]); CELLS], 1);
        for (cell, pair) in numbers.windows(2).enumerate() {
            if pair[0] != pair[1] {
                bitmap |= 1 << (cell + 1);
                runs[count] = pair[1].into();
                count += 1;
            }
        }
        let runs = &runs[..count];
        let needed = runs.iter().map(|number| u64::BITS - number.leading_zeros()).max().unwrap_or(1).max(1);
        let width = needed.next_power_of_two().ilog2();
        self.node(Kind::Runs, (position, width), 0, bitmap, packed(width, runs), beside)
    }

    /// A bitmap of cells, and what belongs to them. Where it looks at the key, and the width of its numbers, stand in its
    /// entry.
    fn node(
        &mut self,
        kind: Kind,
        (position, width): (u32, u32),
        number: u32,
        bitmap: u64,
        rest: impl Iterator<Item = u64>,
        beside: Option<usize>,
    ) -> Entry {
        let at = self.words.len();
        let width = match beside {
            Some(place) => {
                self.words[place] = bitmap;
                width + Entry::BESIDE
            }
            None => {
                self.words.push(bitmap);
                width
            }
        };
        self.words.extend(rest);
        Entry::new(kind, position, width, number, self.place(at))
    }

    /// Goes through the cells that so many bits from a position on make, with what holds each and what is in it. There is
    /// room for a number of each.
    fn cells(
        &mut self,
        numbers: &mut [u32],
        (position, width): (u32, u32),
        cover: u32,
        prefixes: &[Prefix],
        mut visit: impl FnMut(&mut Self, usize, Part, &[Prefix]),
    ) {
        covers(numbers, (position, width), cover, prefixes);
        let mut rest = prefixes;
        for (cell, held_by) in numbers.iter().copied().enumerate() {
            let in_cell = |prefix: &Prefix| bits(prefix.start, position, width) == cell;
            let end = rest.iter().position(|prefix| !in_cell(prefix)).unwrap_or(rest.len());
            let (here, after) = rest.split_at(end);
            rest = after;
            // Shorter ones come first, as all that hold the cell start where it does.
            let deeper = &here[here.partition_point(|prefix| prefix.length <= position + width)..];
            visit(self, cell, Part { depth: position + width, around: cover, cover: held_by }, deeper);
        }
    }
}

/// Numbers of 2 to the power of the width bits, in words.
fn packed(width: u32, numbers: &[u64]) -> impl Iterator<Item = u64> {
    let in_word = move |numbers: &[u64]| {
        numbers.iter().rev().fold(0, |word, number| (word << ((1 << width) % u64::BITS)) | number)
    };
    numbers.chunks((u64::BITS >> width) as usize).map(in_word)
}

/// The fewest bits of a table that are enough, where at most so many are allowed. In a small one, nearly every prefix is to
/// have an entry for itself: the programs' next instructions are always the same then. Else two have room in one, and what
/// is not touched for nothing stays in a processor's caches.
fn enough_bits(depth: u32, most: u32, prefixes: &[Prefix]) -> u32 {
    // Of those in a row, how many differ first in each bit.
    let mut differ = [0; TABLE_BITS as usize];
    for pair in prefixes.windows(2) {
        let at = (pair[0].start ^ pair[1].start).leading_zeros() - depth;
        if let Some(count) = differ.get_mut(at as usize) {
            *count += 1;
        }
    }
    let mut used = 1;
    for (bits, more) in (1..most).zip(differ) {
        used += more;
        let enough = if bits > SMALL_TABLE_BITS { prefixes.len() / 2 } else { prefixes.len() / 16 * 15 };
        if used >= enough {
            return bits;
        }
    }
    most
}

/// The number of the longest prefix that holds each of the cells that so many bits from a position on make.
fn covers(covers: &mut [u32], (position, width): (u32, u32), cover: u32, prefixes: &[Prefix]) {
    covers.fill(cover);
    for prefix in prefixes.iter().filter(|prefix| prefix.length <= position + width) {
        let first = bits(prefix.start, position, width);
        // Sorted: what is nested in another comes after it.
        covers[first..first + (1 << (position + width - prefix.length.max(position)))].fill(prefix.number);
    }
}

/// The bits of an address from a position on; at most as many as a place has.
const fn bits(address: u128, position: u32, width: u32) -> usize {
    (address << position >> (u128::BITS - width)) as usize
}

/// The half of the address that the bits at a depth belong to.
const fn half(address: u128, depth: u32) -> u64 {
    let Key { high, low } = key(address);
    if depth < HALF { high } else { low }
}

/// Entries that a change of one prefix concerns: the part of each is to be built anew, and nothing else.
#[derive(Debug, PartialEq, Eq)]
pub struct Sites {
    /// The place of the first one. The others stand [`STRIDE`] words apart.
    first: u64,
    /// As many as they are.
    pub count: u64,
    /// So many bits lead to each.
    pub depth: u32,
    /// The number of the part around them.
    pub around: u32,
}

impl Sites {
    /// Looks for those of a prefix below the entry at a place.
    pub fn find<W: Words + ?Sized>(words: &W, root: u64, start: u128, length: u32) -> Option<Self> {
        let mut sites = Self { first: root, count: 1, depth: 0, around: 0 };
        loop {
            let entry = Entry(words.word(sites.first));
            let (position, width) = (u32::try_from(entry.position()).ok()?, u32::try_from(entry.width()).ok()?);
            let around = u32::try_from(entry.number()).ok()?;
            match entry.kind() {
                Kind::Skip
                    if length > position
                        && (half(start, position) ^ words.word(entry.place())) >> (63 - position % HALF) == 0 =>
                {
                    sites = Self { first: entry.place() + 1, count: 1, depth: position + 1, around };
                }
                // What holds the whole table changes its number, too.
                Kind::Table if length > position => {
                    let first = entry.place() + bits(start, position, width) as u64 * STRIDE;
                    let depth = position + width;
                    let count = 1 << depth.saturating_sub(length);
                    sites = Self { first, count, depth, around };
                    if count > 1 {
                        return Some(sites);
                    }
                }
                _ => return Some(sites),
            }
        }
    }

    /// The places of the entries.
    pub fn places(&self) -> impl Iterator<Item = u64> {
        (0..self.count).map(|index| self.first + index * STRIDE)
    }
}

#[cfg(test)]
mod tests;
