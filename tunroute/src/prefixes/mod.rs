//! The prefix engine: sorted lists to compare, and the trie that programs search.

pub mod index;
pub mod map;
pub mod trie;
