//! The record at the end of an array of words, for a restarted daemon: a list of all prefixes, written with the array,
//! and a journal of later changes. It starts at the end of the array and grows downwards.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv6Net};
use tunroute_common::{
    index::{header, number_of_exempt, unpack},
    maps::{Exempt, Source},
    trie::{Entry, Key},
};

use super::{Memory, prefix_at};
use crate::{policy::fast::Exemption, policy::net::Family, prefixes::map::PrefixMap, prefixes::trie::Prefix};

/// The words of a list: the sources of both families and the destinations of each exemption set, in order.
pub(super) fn list(sources: &[Vec<Prefix>; 2], sets: &BTreeMap<u32, [Vec<Prefix>; 2]>) -> Vec<u64> {
    let mut bytes = Bytes::default();
    bytes.prefixes(sources);
    bytes.push(sets.len() as u128);
    for (set, prefixes) in sets {
        bytes.push((*set).into());
        bytes.prefixes(prefixes);
    }
    bytes.0.chunks(8).map(|bytes| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))).collect()
}

/// A byte stream of numbers: seven bits per byte, lowest first; the highest bit is set in all bytes of a number but the
/// last.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn push(&mut self, mut number: u128) {
        while number >> 7 != 0 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    /// Writes the number of prefixes of each family, then for each prefix: its number, its length if it differs from
    /// the one before, and its distance from the one before in units of its own size.
    fn prefixes(&mut self, families: &[Vec<Prefix>; 2]) {
        for prefixes in families {
            self.push(prefixes.len() as u128);
            let mut before = Prefix { start: 0, length: 0, number: 0 };
            for prefix in prefixes {
                let another = prefix.length != before.length;
                self.push(u128::from(prefix.number) << 1 | u128::from(another));
                if another {
                    self.push(prefix.length.into());
                }
                self.push(first(prefix.start, prefix.length) - first(before.start, prefix.length));
                before = *prefix;
            }
        }
    }
}

/// The first bits of an address.
fn first(address: u128, length: u32) -> u128 {
    address.checked_shr(u128::BITS.saturating_sub(length)).unwrap_or(0)
}

/// Reads the next number.
fn pull(bytes: &mut impl Iterator<Item = u8>) -> Option<u128> {
    let mut number = 0;
    for at in (0..u128::BITS).step_by(7) {
        let byte = bytes.next()?;
        number |= u128::from(byte & 0x7f) << at;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// Reads the next prefixes of both families, with their numbers.
fn pull_prefixes(bytes: &mut impl Iterator<Item = u8>, mut each: impl FnMut(IpNet, u64)) -> Option<()> {
    for family in Family::ALL {
        let (mut start, mut length) = (0, 0);
        for _ in 0..pull(bytes)? {
            let number = pull(bytes)?;
            if number & 1 == 1 {
                length = u32::try_from(pull(bytes)?).ok().filter(|length| *length <= u128::BITS)?;
            }
            let bits = first(start, length).checked_add(pull(bytes)?)?;
            start = bits.checked_shl(u128::BITS - length).unwrap_or(0);
            each(prefix_at(family, start, length)?, u64::try_from(number >> 1).ok()?);
        }
    }
    Some(())
}

/// Reads an array's record. `None` if it is damaged.
#[must_use]
pub fn read<M: Memory + ?Sized>(memory: &M) -> Option<(PrefixMap<Source>, BTreeSet<Exemption>)> {
    let source = |number: u64| unpack(memory.word(header::TABLE + (number & MAX_NUMBER)));
    let word = |index: u64| Some(memory.word(memory.length().checked_sub(index)?));
    let (listed, count) = (memory.word(header::LISTED), memory.word(header::RECORD));

    let (mut sources, mut exempt) = (Vec::new(), BTreeSet::new());
    let mut bytes = (1..=listed).map_while(word).flat_map(u64::to_le_bytes);
    pull_prefixes(&mut bytes, |prefix, number| sources.push((prefix, source(number))))?;
    if sources.iter().any(|(_, source)| source.is_none()) {
        return None;
    }
    for _ in 0..pull(&mut bytes)? {
        let set = u32::try_from(pull(&mut bytes)?).ok()?;
        pull_prefixes(&mut bytes, |prefix, number| {
            exempt.extend(kind_of(number).map(|kind| Exemption { set, prefix, kind }));
        })?;
    }

    let mut words = (listed.checked_add(1)?..=count).map(word);
    while let Some(word) = words.next() {
        let first = word?;
        let mut next = || words.next().flatten();
        let (number, length) = (first >> NUMBER_AT & MAX_NUMBER, u8::try_from(first >> LENGTH_AT & 0xff).ok()?);
        let low = first as u32;
        let (is_source, address) = match first >> KIND_AT {
            SOURCE_V4 => (true, IpAddr::V4(Ipv4Addr::from_bits(low))),
            EXEMPT_V4 => (false, IpAddr::V4(Ipv4Addr::from_bits(next()? as u32))),
            kind @ (SOURCE_V6 | EXEMPT_V6) => {
                let high = next()?;
                let low = if length > 64 { next()? } else { 0 };
                (kind == SOURCE_V6, IpAddr::V6(Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low))))
            }
            _ => return None,
        };
        let prefix = IpNet::new(address, length).ok()?;
        match (is_source, number) {
            (true, 0) => sources.push((prefix, None)),
            (true, _) => sources.push((prefix, Some(source(number)?))),
            (false, number) => {
                for kind in Exempt::ALL {
                    exempt.remove(&Exemption { set: low, prefix, kind });
                }
                exempt.extend(kind_of(number).map(|kind| Exemption { set: low, prefix, kind }));
            }
        }
    }
    let mut read = PrefixMap::default();
    read.change(sources);
    Some((read, exempt))
}

/// The kind of exemption that a number stands for; none for 0.
fn kind_of(number: u64) -> Option<Exempt> {
    Exempt::ALL.into_iter().find(|kind| u64::from(number_of_exempt(*kind)) == number)
}

/// Kinds of journal entries, in the highest bits of their first word.
const SOURCE_V4: u64 = 1;
const SOURCE_V6: u64 = 2;
const EXEMPT_V4: u64 = 3;
const EXEMPT_V6: u64 = 4;
const KIND_AT: u32 = 61;
const LENGTH_AT: u32 = 53;
const NUMBER_AT: u32 = 32;
const MAX_NUMBER: u64 = (1 << Entry::NUMBER_BITS) - 1;

/// Words of the journal: kind, prefix length, number (0: removed) and 32 bits (an address or a set), then the address's
/// other words, without words that are zero behind the prefix.
#[derive(Default)]
pub(super) struct Journal(pub(super) Vec<u64>);

impl Journal {
    pub(super) fn source(&mut self, prefix: &IpNet, number: u32) {
        match prefix {
            IpNet::V4(prefix) => {
                self.first(SOURCE_V4, prefix.prefix_len(), number, prefix.addr().to_bits());
            }
            IpNet::V6(prefix) => {
                self.first(SOURCE_V6, prefix.prefix_len(), number, 0);
                self.v6(prefix);
            }
        }
    }

    pub(super) fn exemption(&mut self, set: u32, prefix: &IpNet, number: u32) {
        match prefix {
            IpNet::V4(prefix) => {
                self.first(EXEMPT_V4, prefix.prefix_len(), number, set);
                self.0.push(prefix.addr().to_bits().into());
            }
            IpNet::V6(prefix) => {
                self.first(EXEMPT_V6, prefix.prefix_len(), number, set);
                self.v6(prefix);
            }
        }
    }

    fn first(&mut self, kind: u64, length: u8, number: u32, low: u32) {
        self.0.push(kind << KIND_AT | u64::from(length) << LENGTH_AT | u64::from(number) << NUMBER_AT | u64::from(low));
    }

    fn v6(&mut self, prefix: &Ipv6Net) {
        let Key { high, low } = crate::prefixes::trie::key(prefix.addr().to_bits());
        self.0.push(high);
        if prefix.prefix_len() > 64 {
            self.0.push(low);
        }
    }
}
