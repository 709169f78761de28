//! Table numbers for policies that name none, and for probes: the same after every restart.

use std::collections::{BTreeMap, BTreeSet};

/// The file of the state directory that remembers the numbers, as a `BTreeMap<String, u32>`.
pub const FILE: &str = "tables.json";
/// The first number that is given out.
pub const FIRST: u32 = 20_000;

/// Gives each policy a routing table number of its own.
///
/// A policy keeps the number that is remembered for it. A new one gets the lowest number from [`FIRST`] that is neither
/// in `taken` (tables that the configuration names, and tables in which others have routes) nor remembered for any
/// other policy: also not for one that has just been removed, whose rules may still point to that table until the
/// change is through. Remembered numbers outside the range (a damaged file) are not used.
///
/// Returns the numbers of `names` and no others: it is what to remember next. A name is missing from it only if all
/// numbers of the range are taken.
#[must_use]
pub fn allocate_tables<'a>(
    names: impl IntoIterator<Item = &'a str>,
    remembered: &BTreeMap<String, u32>,
    taken: &BTreeSet<u32>,
) -> BTreeMap<String, u32> {
    let mut tables = BTreeMap::new();
    let mut used: BTreeSet<u32> = remembered.values().chain(taken).copied().collect();
    let mut kept = BTreeSet::new();
    let mut new = BTreeSet::new();
    for name in names {
        match remembered.get(name) {
            _ if tables.contains_key(name) => {}
            // `kept`: a damaged file may remember one number for two policies.
            Some(&table) if table >= FIRST && !taken.contains(&table) && kept.insert(table) => {
                tables.insert(name.to_owned(), table);
            }
            _ => {
                new.insert(name);
            }
        }
    }
    let mut free = FIRST..=u32::MAX;
    for name in new {
        if let Some(table) = free.find(|table| used.insert(*table)) {
            tables.insert(name.to_owned(), table);
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[a-e]{1,2}", 0..12)
    }

    fn numbers() -> impl Strategy<Value = u32> {
        prop_oneof![FIRST - 3..FIRST + 12, Just(u32::MAX), Just(0)]
    }

    proptest! {
        #[test]
        fn numbers_are_own_free_and_stable(
            names in names(),
            more in names(),
            remembered in prop::collection::btree_map("[a-e]{1,2}", numbers(), 0..12),
            taken in prop::collection::btree_set(numbers(), 0..8),
        ) {
            let allocate = |names: &[String], remembered: &BTreeMap<String, u32>| {
                allocate_tables(names.iter().map(String::as_str), remembered, &taken)
            };
            let first = allocate(&names, &remembered);
            // Everyone has one, nobody else has.
            let wanted: BTreeSet<&String> = names.iter().collect();
            prop_assert_eq!(first.keys().collect::<BTreeSet<_>>(), wanted);
            // No two share one; all are in the range and free.
            prop_assert_eq!(first.values().collect::<BTreeSet<_>>().len(), first.len());
            prop_assert!(first.values().all(|table| *table >= FIRST && !taken.contains(table)));
            // What was remembered and usable is kept by somebody who had it; what is new was nobody's.
            for (name, table) in &first {
                let holders: Vec<&String> = remembered.iter().filter(|(_, t)| *t == table).map(|(n, _)| n).collect();
                prop_assert!(holders.is_empty() || holders.contains(&name), "{} got {} of {:?}", name, table, holders);
            }
            for (name, table) in &remembered {
                let alone = remembered.values().filter(|other| *other == table).count() == 1;
                if alone && *table >= FIRST && !taken.contains(table) && names.contains(name) {
                    prop_assert_eq!(first.get(name), Some(table));
                }
            }
            // Again, in another order, with others beside them: the same numbers.
            let mut both = more;
            both.extend(names.iter().rev().cloned());
            let second = allocate(&both, &first);
            for (name, table) in &first {
                prop_assert_eq!(second.get(name), Some(table));
            }
        }
    }

    #[test]
    fn a_removed_policy_does_not_hand_its_table_on_at_once() {
        let first = allocate_tables(["a"], &BTreeMap::new(), &BTreeSet::new());
        assert_eq!(first, BTreeMap::from([("a".to_owned(), FIRST)]));
        let second = allocate_tables(["b"], &first, &BTreeSet::new());
        assert_eq!(second, BTreeMap::from([("b".to_owned(), FIRST + 1)]));
        assert_eq!(allocate_tables(["b", "c"], &second, &BTreeSet::new())["c"], FIRST);
    }
}
