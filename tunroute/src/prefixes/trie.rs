//! Builds the trie that [`tunroute_common::trie::find`] searches: all of it, or the parts that a change affects.

use tunroute_common::trie::{CHUNK, Entry, Key, Kind, Leaf, STRIDE, Words};

use crate::policy::net::Family;

/// Minimum number of prefixes for a table: it costs [`STRIDE`] words per entry and saves lookup steps.
const TABLE_FROM: usize = 64;
/// Maximum size of a table, in bits of its index: 4 MiB, of which processor caches hold the part in use.
const TABLE_BITS: u32 = 18;
/// Minimum number of shared bits for which a skip entry pays.
const SKIP_FROM: u32 = 2 * CHUNK;
/// Number of cells of a node.
const CELLS: usize = 1 << CHUNK;
/// Bits in a half of a key.
const HALF: u32 = u64::BITS;

/// Size of a table, in bits of its index, up to which it is always in the nearest caches: 256 KiB.
const SMALL_TABLE_BITS: u32 = 14;

/// Maximum number of index bits for a number of prefixes: two to four table entries per prefix; four times that in a
/// small table.
fn table_bits(prefixes: usize) -> u32 {
    let bits = prefixes.checked_ilog2().unwrap_or_default();
    (bits + 2).max(SMALL_TABLE_BITS.min(bits + 4)).min(TABLE_BITS)
}

/// Maximum size in words of the first table for a number of prefixes.
pub fn table_words(prefixes: usize) -> u64 {
    if prefixes < TABLE_FROM { 0 } else { STRIDE << table_bits(prefixes) }
}

/// A prefix and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// First address: the first bit is the most significant one, zeros follow the prefix.
    pub start: u128,
    /// Length in bits.
    pub length: u32,
    /// Number of the match: not 0, at most [`Entry::NUMBER_BITS`] bits.
    pub number: u32,
}

/// The key of an address whose first bit is the most significant one.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "the other half")]
pub const fn key(address: u128) -> Key {
    Key { high: (address >> HALF) as u64, low: address as u64 }
}

/// Part of the address space that an entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Number of key bits that lead here.
    pub depth: u32,
    /// Number of the surrounding part.
    pub around: u32,
    /// Number of the longest prefix that covers the whole part.
    pub cover: u32,
}

impl Part {
    /// The whole address space.
    pub const ALL: Self = Self { depth: 0, around: 0, cover: 0 };
}

/// New words for free places of the array.
#[derive(Debug)]
pub struct Builder {
    /// Bits of an address: 32 or 128.
    end: u32,
    /// Place of the first word.
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

    /// Builds a part. The prefixes lie within it, sorted by start and then length; prefixes that cover all of it are
    /// not among them: they are its cover.
    pub fn build(&mut self, family: Family, part: Part, prefixes: &[Prefix]) -> Entry {
        self.end = if family == Family::V4 { 32 } else { 128 };
        self.entry(part, prefixes, None)
    }

    /// Reserves room for `len` words.
    fn reserve(&mut self, count: usize) -> usize {
        let at = self.words.len();
        self.words.resize(at + count, 0);
        at
    }

    /// The place of a word as a number. A place that does not fit means that the array is too large, which its owner
    /// checks.
    fn place(&self, at: usize) -> u32 {
        u32::try_from(self.base + at).unwrap_or(u32::MAX) & ((1 << Entry::PLACE_BITS) - 1)
    }

    /// End of the key half that holds the bit at `depth`.
    fn half_end(&self, depth: u32) -> u32 {
        if depth < HALF { self.end.min(HALF) } else { self.end }
    }

    /// Builds an entry and everything below it. The word beside it is written too, if the place has one.
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
        // Sorted: if any prefix is as short as the shared bits, the first one is.
        let shared = (first.start ^ last.start).leading_zeros().min(first.length).min(self.half_end(depth));
        if shared >= depth + SKIP_FROM {
            return self.skip(part, first.start, shared, prefixes);
        }
        // Near the end of a half, a node reads some bits a second time.
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

    /// The entry of a single prefix in a part.
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

    /// The entry of a single prefix whose remaining bits fit into the entry.
    fn near(&self, kind: Kind, Part { depth, .. }: Part, prefix: &Prefix) -> Option<Entry> {
        let width = prefix.length - depth;
        let fits = width <= Entry::PLACE_BITS && prefix.length <= self.half_end(depth);
        let value = Entry::new(kind, depth, width, prefix.number, 0).0;
        fits.then(|| Entry(value | bits(prefix.start, depth, width) as u64))
    }

    /// The entry of two prefixes: the second one's entry stands beside the first one's.
    fn two(&mut self, part: Part, one: &Prefix, other: &Prefix, beside: usize) -> Option<Entry> {
        let nested = (one.start ^ other.start).leading_zeros() >= one.length;
        // The nested prefix is tried first. Sorted: it is the second one.
        let (entry, last) = match (self.near(Kind::Two, part, other), self.near(Kind::Two, part, one)) {
            (Some(entry), _) => (entry, one),
            (None, Some(entry)) if !nested => (entry, other),
            _ => return None,
        };
        self.words[beside] = self.single(part, last).0;
        Some(entry)
    }

    /// Skips the bits that all prefixes share.
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

    /// No prefix in this part is longer than a cell's.
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

    /// A bitmap of cells and their contents. The entry holds the node's position in the key and the width of its
    /// numbers.
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

    /// Iterates over the 2^`bits` cells from `depth` on: for each, the number that covers it and the prefixes inside.
    /// `covers` has one element per cell.
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
            // Shorter prefixes come first: every prefix that covers the cell starts where the cell starts.
            let deeper = &here[here.partition_point(|prefix| prefix.length <= position + width)..];
            visit(self, cell, Part { depth: position + width, around: cover, cover: held_by }, deeper);
        }
    }
}

/// Packs numbers of 2^`width` bits into words.
fn packed(width: u32, numbers: &[u64]) -> impl Iterator<Item = u64> {
    let in_word = move |numbers: &[u64]| {
        numbers.iter().rev().fold(0, |word, number| (word << ((1 << width) % u64::BITS)) | number)
    };
    numbers.chunks((u64::BITS >> width) as usize).map(in_word)
}

/// Smallest sufficient number of index bits of a table, at most `most`. In a small table nearly every prefix gets an
/// entry of its own, so the programs always run the same instructions. In a large one two prefixes may share an entry,
/// which keeps unused words out of the caches.
fn enough_bits(depth: u32, most: u32, prefixes: &[Prefix]) -> u32 {
    // For each bit: how many neighbouring prefixes differ first there.
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

/// For each of the 2^`bits` cells from `depth` on: the number of the longest prefix that covers it.
fn covers(covers: &mut [u32], (position, width): (u32, u32), cover: u32, prefixes: &[Prefix]) {
    covers.fill(cover);
    for prefix in prefixes.iter().filter(|prefix| prefix.length <= position + width) {
        let first = bits(prefix.start, position, width);
        // Sorted: a nested prefix comes after the one around it.
        covers[first..first + (1 << (position + width - prefix.length.max(position)))].fill(prefix.number);
    }
}

/// Bits of an address from a position on, at most as many as fit a place.
const fn bits(address: u128, position: u32, width: u32) -> usize {
    (address << position >> (u128::BITS - width)) as usize
}

/// The half of the address that holds the bits at a depth.
const fn half(address: u128, depth: u32) -> u64 {
    let Key { high, low } = key(address);
    if depth < HALF { high } else { low }
}

/// The entries that a change of one prefix affects: exactly these parts are rebuilt.
#[derive(Debug, PartialEq, Eq)]
pub struct Sites {
    /// Place of the first entry. The others follow every [`STRIDE`] words.
    first: u64,
    /// Number of entries.
    pub count: u64,
    /// Number of key bits that lead to each.
    pub depth: u32,
    /// Number of the part around them.
    pub around: u32,
}

impl Sites {
    /// Finds the affected entries of a prefix below the entry at `root`. `None` if an entry on the path is damaged.
    pub fn find<W: Words + ?Sized>(words: &W, root: u64, start: u128, length: u32) -> Option<Self> {
        let mut sites = Self { first: root, count: 1, depth: 0, around: 0 };
        loop {
            let entry = Entry(words.word(sites.first));
            let (position, width) = (u32::try_from(entry.position()).ok()?, u32::try_from(entry.width()).ok()?);
            let around = u32::try_from(entry.number()).ok()?;
            match entry.kind() {
                // Each entry examines later bits of the key than the one before.
                Kind::Skip | Kind::Table if position < sites.depth => return None,
                Kind::Table if width == 0 || position + width > u128::BITS => return None,
                Kind::Skip
                    if length > position
                        && (half(start, position) ^ words.word(entry.place())) >> (63 - position % HALF) == 0 =>
                {
                    sites = Self { first: entry.place() + 1, count: 1, depth: position + 1, around };
                }
                // A prefix that covers the whole table changes the table's number as well.
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

    /// Places of the entries.
    pub fn places(&self) -> impl Iterator<Item = u64> {
        (0..self.count).map(|index| self.first + index * STRIDE)
    }
}

#[cfg(test)]
mod tests;
