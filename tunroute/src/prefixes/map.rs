//! A sorted list of prefixes with values: up to a million, compared and changed as a whole far more often than one by
//! one.

use std::{cmp::Ordering, ops::RangeInclusive, slice, sync::Arc};

use ipnet::IpNet;

/// Sorted, unique prefixes with values. Copies share one list until one of them changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixMap<V>(Arc<Vec<(IpNet, V)>>);

impl<V> Default for PrefixMap<V> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<V: Copy> FromIterator<(IpNet, V)> for PrefixMap<V> {
    /// Of a prefix that occurs several times, the last value counts.
    fn from_iter<I: IntoIterator<Item = (IpNet, V)>>(entries: I) -> Self {
        let mut entries: Vec<(IpNet, V)> = entries.into_iter().collect();
        // Stable, so the last value stays last; nearly free for input that is sorted in parts.
        entries.sort_by_key(|(prefix, _)| *prefix);
        entries.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                *kept = *later;
            }
            same
        });
        Self(Arc::new(entries))
    }
}

impl<V: Copy, const N: usize> From<[(IpNet, V); N]> for PrefixMap<V> {
    fn from(entries: [(IpNet, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<'a, V> IntoIterator for &'a PrefixMap<V> {
    type Item = &'a (IpNet, V);
    type IntoIter = slice::Iter<'a, (IpNet, V)>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<V> PrefixMap<V> {
    /// Number of prefixes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All entries, in order.
    pub fn iter(&self) -> slice::Iter<'_, (IpNet, V)> {
        self.0.iter()
    }

    /// The prefixes, in order.
    pub fn keys(&self) -> impl Iterator<Item = &IpNet> + Clone {
        self.iter().map(|(prefix, _)| prefix)
    }

    /// The values, in order.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// The position of a prefix, or the one where it would be inserted.
    fn find(&self, prefix: &IpNet) -> Result<usize, usize> {
        self.0.binary_search_by(|(each, _)| each.cmp(prefix))
    }

    /// The value of a prefix.
    #[must_use]
    pub fn get(&self, prefix: &IpNet) -> Option<&V> {
        self.find(prefix).ok().and_then(|at| self.0.get(at)).map(|(_, value)| value)
    }

    /// Returns true if the prefix is present.
    #[must_use]
    pub fn contains_key(&self, prefix: &IpNet) -> bool {
        self.find(prefix).is_ok()
    }

    /// The entries in a range of prefixes.
    #[must_use]
    pub fn range(&self, range: RangeInclusive<IpNet>) -> &[(IpNet, V)] {
        let start = self.0.partition_point(|(each, _)| each < range.start());
        let end = self.0.partition_point(|(each, _)| each <= range.end());
        self.0.get(start..end).unwrap_or_default()
    }

    /// Merges two maps: each prefix of either, in order, with its value here and there.
    pub fn beside<'a, W>(
        &'a self,
        other: &'a PrefixMap<W>,
    ) -> impl Iterator<Item = (&'a IpNet, Option<&'a V>, Option<&'a W>)> {
        let (mut here, mut there) = (self.iter().peekable(), other.iter().peekable());
        std::iter::from_fn(move || {
            let order = match (here.peek(), there.peek()) {
                (Some((here, _)), Some((there, _))) => here.cmp(there),
                (Some(_), None) => Ordering::Less,
                (None, _) => Ordering::Greater,
            };
            match order {
                Ordering::Less => here.next().map(|(prefix, value)| (prefix, Some(value), None)),
                Ordering::Equal => {
                    let other = there.next().map(|(_, other)| other);
                    here.next().map(|(prefix, value)| (prefix, Some(value), other))
                }
                Ordering::Greater => there.next().map(|(prefix, other)| (prefix, None, Some(other))),
            }
        })
    }
}

impl<V: Copy> PrefixMap<V> {
    /// Makes a map of entries that are sorted and unique.
    #[must_use]
    pub(crate) fn in_order(entries: Vec<(IpNet, V)>) -> Self {
        debug_assert!(entries.is_sorted_by(|(one, _), (next, _)| one < next), "not in order");
        Self(Arc::new(entries))
    }

    /// Inserts or replaces a prefix. For many, use [`PrefixMap::change`].
    pub fn insert(&mut self, prefix: IpNet, value: V) {
        self.change(vec![(prefix, Some(value))]);
    }

    /// Removes a prefix if it is present.
    pub fn remove(&mut self, prefix: &IpNet) {
        self.change(vec![(*prefix, None)]);
    }

    /// Inserts the prefixes that come with a value and removes the others, in the time of one copy.
    pub fn change(&mut self, mut changes: Vec<(IpNet, Option<V>)>) {
        changes.sort_by_key(|(prefix, _)| *prefix);
        let mut changed = Vec::with_capacity(self.len() + changes.len());
        let mut rest = self.0.as_slice();
        for (index, (prefix, value)) in changes.iter().enumerate() {
            // Of several changes of a prefix, the last one counts.
            if changes.get(index + 1).is_some_and(|(next, _)| next == prefix) {
                continue;
            }
            let (before, after) = rest.split_at(ahead_of(rest, prefix));
            changed.extend_from_slice(before);
            changed.extend(value.map(|value| (*prefix, value)));
            rest = match after {
                [(first, _), after @ ..] if first == prefix => after,
                _ => after,
            };
        }
        changed.extend_from_slice(rest);
        self.0 = Arc::new(changed);
    }
}

/// Number of entries before a prefix. Searches from the front, where it is when there are many changes.
fn ahead_of<V>(entries: &[(IpNet, V)], prefix: &IpNet) -> usize {
    let mut bound = 1;
    while entries.get(bound).is_some_and(|(each, _)| each < prefix) {
        bound *= 2;
    }
    entries.get(..=bound).unwrap_or(entries).partition_point(|(each, _)| each < prefix)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn any_prefix() -> impl Strategy<Value = IpNet> {
        let v4 = (any::<u32>(), 0u8..=6)
            .prop_map(|(bits, length)| IpNet::new(std::net::Ipv4Addr::from(bits).into(), length));
        let v6 = (any::<u128>(), 0u8..=6)
            .prop_map(|(bits, length)| IpNet::new(std::net::Ipv6Addr::from(bits).into(), length));
        prop_oneof![v4, v6].prop_map(|prefix| prefix.expect("a length").trunc())
    }

    fn list<V: Copy>(map: &PrefixMap<V>) -> Vec<(IpNet, V)> {
        map.iter().copied().collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn does_what_a_tree_does(
            first in prop::collection::vec((any_prefix(), 0u8..4), 0..40),
            changes in prop::collection::vec((any_prefix(), prop::option::of(0u8..4)), 0..40),
            (from, to) in (any_prefix(), any_prefix()),
        ) {
            let mut tree: BTreeMap<IpNet, u8> = first.iter().copied().collect();
            let mut map: PrefixMap<u8> = first.into_iter().collect();
            let before = map.clone();
            for (prefix, value) in &changes {
                match value {
                    Some(value) => drop(tree.insert(*prefix, *value)),
                    None => drop(tree.remove(prefix)),
                }
            }
            map.change(changes);
            prop_assert_eq!(list(&map), tree.iter().map(|(prefix, value)| (*prefix, *value)).collect::<Vec<_>>());
            for prefix in tree.keys().chain(before.keys()).chain([&from]) {
                prop_assert_eq!(map.get(prefix), tree.get(prefix));
            }
            if from <= to {
                let range: Vec<_> = tree.range(from..=to).map(|(prefix, value)| (*prefix, *value)).collect();
                prop_assert_eq!(map.range(from..=to), range);
            }
            for (prefix, was, is) in before.beside(&map) {
                prop_assert_eq!((was, is), (before.get(prefix), map.get(prefix)));
                prop_assert!(was.is_some() || is.is_some());
            }
            let all: Vec<IpNet> = before.beside(&map).map(|(prefix, ..)| *prefix).collect();
            let mut expected: Vec<IpNet> = before.keys().chain(map.keys()).copied().collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(all, expected);
        }
    }
}
