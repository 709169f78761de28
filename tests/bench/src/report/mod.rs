//! What a record says, for people.

pub mod findings;
pub mod goals;
pub mod markdown;
pub mod plot;
pub mod table;
