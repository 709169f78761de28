//! Builds the trie that [`tunroute_common::trie::find`] looks up in, whole or the parts that a change concerns.

use std::ops::Range;

use tunroute_common::trie::{CHUNK, Entry, Key, Kind, Words};

use crate::net::Family;

/// From as many prefixes on, a table leads to them: it costs a word for each of its entries, and saves steps.
const TABLE_FROM: usize = 64;
/// A table has at most so many bits: 2 MiB, which a processor's caches hold.
const TABLE_BITS: u32 = 18;
/// Passing over so many bits that all prefixes share is worth an entry of its own.
const SKIP_FROM: u32 = 2 * CHUNK;
/// Bits of a half of a key.
const HALF: u32 = u64::BITS;

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
        self.entry(part, prefixes)
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

    fn entry(&mut self, part: Part, prefixes: &[Prefix]) -> Entry {
        let Part { depth, around, cover } = part;
        let [first, .., last] = prefixes else {
            return match prefixes {
                [only] if cover == around => self.single(part, only),
                [only] => self.skip(part, only.start, only.length.min(self.half_end(depth)), prefixes),
                _ => Entry::new(Kind::Number, 0, 0, cover, 0),
            };
        };
        // Sorted: if any is as short as what all share, the first is.
        let shared = (first.start ^ last.start).leading_zeros().min(first.length).min(self.half_end(depth));
        if shared >= depth + SKIP_FROM {
            return self.skip(part, first.start, shared, prefixes);
        }
        // Near the end of a half, a node looks at bits again that have led to it.
        let position = depth.min(self.half_end(depth) - CHUNK);
        if prefixes.iter().all(|prefix| prefix.length <= position + CHUNK) {
            return self.runs(position, cover, prefixes);
        }
        let bits = TABLE_BITS.min(prefixes.len().ilog2() + 2).min(self.half_end(depth) - depth);
        if prefixes.len() >= TABLE_FROM && bits > CHUNK {
            return self.table(part, bits, prefixes);
        }
        self.sparse(position, cover, prefixes)
    }

    /// One prefix, in a part in which nothing else is but what is around.
    fn single(&mut self, part: Part, prefix: &Prefix) -> Entry {
        let Prefix { start, length, number } = *prefix;
        let depth = part.depth;
        let width = length - depth;
        if length > self.half_end(depth) {
            return self.skip(part, start, HALF, &[*prefix]);
        }
        if width <= Entry::PLACE_BITS {
            let value = Entry::new(Kind::Near, depth, width, number, 0);
            return Entry(value.0 | bits(start, depth, width) as u64);
        }
        let at = self.reserve(1);
        self.words[at] = half(start, depth);
        Entry::new(Kind::Path, length - 1, 0, number, self.place(at))
    }

    /// Passes over the bits that all prefixes share.
    fn skip(&mut self, Part { depth, cover, .. }: Part, start: u128, shared: u32, prefixes: &[Prefix]) -> Entry {
        let at = self.reserve(2);
        self.words[at] = half(start, depth);
        let (whole, deeper) = prefixes.split_at(prefixes.partition_point(|prefix| prefix.length <= shared));
        let inner = Part { depth: shared, around: cover, cover: whole.last().map_or(cover, |prefix| prefix.number) };
        self.words[at + 1] = self.entry(inner, deeper).0;
        Entry::new(Kind::Skip, shared - 1, 0, cover, self.place(at))
    }

    fn table(&mut self, Part { depth, cover, .. }: Part, bits: u32, prefixes: &[Prefix]) -> Entry {
        let at = self.reserve(1 << bits);
        self.cells(depth, bits, cover, prefixes, |builder, cell, part, deeper| {
            let entry = builder.entry(part, deeper);
            builder.words[at + cell] = entry.0;
        });
        Entry::new(Kind::Table, depth, bits, cover, self.place(at))
    }

    fn sparse(&mut self, position: u32, cover: u32, prefixes: &[Prefix]) -> Entry {
        let mut bitmap = 0u64;
        self.cells(position, CHUNK, cover, prefixes, |_, cell, part, deeper| {
            bitmap |= u64::from(part.cover != cover || !deeper.is_empty()) << cell;
        });
        let at = self.reserve(1 + bitmap.count_ones() as usize);
        self.words[at] = bitmap;
        let mut next = at;
        self.cells(position, CHUNK, cover, prefixes, |builder, cell, part, deeper| {
            if bitmap >> cell & 1 == 1 {
                next += 1;
                let entry = builder.entry(part, deeper);
                builder.words[next] = entry.0;
            }
        });
        Entry::new(Kind::Sparse, position, 0, cover, self.place(at))
    }

    /// Nothing here is deeper than a cell.
    fn runs(&mut self, position: u32, cover: u32, prefixes: &[Prefix]) -> Entry {
        let numbers = covers(position, CHUNK, cover, prefixes);
        let mut bitmap = 0u64;
        let mut runs = vec![numbers[0]];
        for (cell, pair) in numbers.windows(2).enumerate() {
            if pair[0] != pair[1] {
                bitmap |= 1 << (cell + 1);
                runs.push(pair[1]);
            }
        }
        let needed = runs.iter().map(|number| u32::BITS - number.leading_zeros()).max().unwrap_or(1).max(1);
        let width = needed.next_power_of_two().ilog2();
        let per_word = (u64::BITS >> width) as usize;
        let at = self.reserve(1 + runs.len().div_ceil(per_word));
        self.words[at] = bitmap;
        for (index, number) in runs.iter().enumerate() {
            self.words[at + 1 + index / per_word] |= u64::from(*number) << ((index % per_word) << width);
        }
        Entry::new(Kind::Runs, position, width, 0, self.place(at))
    }

    /// Goes through the cells that the bits from a position on make, with what holds each and what is in it.
    fn cells(
        &mut self,
        position: u32,
        width: u32,
        cover: u32,
        prefixes: &[Prefix],
        mut visit: impl FnMut(&mut Self, usize, Part, &[Prefix]),
    ) {
        let mut rest = prefixes;
        for (cell, held_by) in covers(position, width, cover, prefixes).into_iter().enumerate() {
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

/// The number of the longest prefix that holds each cell.
fn covers(position: u32, width: u32, cover: u32, prefixes: &[Prefix]) -> Vec<u32> {
    let mut covers = vec![cover; 1 << width];
    for prefix in prefixes.iter().filter(|prefix| prefix.length <= position + width) {
        let first = bits(prefix.start, position, width);
        // Sorted: what is nested in another comes after it.
        covers[first..first + (1 << (position + width - prefix.length.max(position)))].fill(prefix.number);
    }
    covers
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
    /// The places of the entries.
    pub places: Range<u64>,
    /// So many bits lead to each.
    pub depth: u32,
    /// The number of the part around them.
    pub around: u32,
}

impl Sites {
    /// Looks for those of a prefix below the entry at a place.
    pub fn find<W: Words + ?Sized>(words: &W, root: u64, start: u128, length: u32) -> Option<Self> {
        let mut sites = Self { places: root..root + 1, depth: 0, around: 0 };
        loop {
            let entry = Entry(words.word(sites.places.start));
            let (position, width) = (u32::try_from(entry.position()).ok()?, u32::try_from(entry.width()).ok()?);
            let around = u32::try_from(entry.number()).ok()?;
            match entry.kind() {
                Kind::Skip
                    if length > position
                        && (half(start, position) ^ words.word(entry.place())) >> (63 - position % HALF) == 0 =>
                {
                    let inner = entry.place() + 1;
                    sites = Self { places: inner..inner + 1, depth: position + 1, around };
                }
                // What holds the whole table changes its number, too.
                Kind::Table if length > position => {
                    let first = entry.place() + bits(start, position, width) as u64;
                    let depth = position + width;
                    let count = 1 << depth.saturating_sub(length);
                    sites = Self { places: first..first + count, depth, around };
                    if count > 1 {
                        return Some(sites);
                    }
                }
                _ => return Some(sites),
            }
        }
    }
}

#[cfg(test)]
mod tests;
