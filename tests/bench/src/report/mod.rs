//! What a record says, for people.

pub mod table;
