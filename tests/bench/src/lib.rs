//! The bench: what does the fast path save on this machine, at which number of prefixes, and what does it cost?
//!
//! The same packets go through all contestants, between the same devices, in short rounds of random order. Every packet
//! says where it must leave, and the exits check that: who does not deliver all of them there is out.
//!
//! A scenario puts up a [`site::Site`] for each contestant and yields [`record::Measurement`]s; the reports and the
//! comparison are made from these alone.

pub mod compare;
pub mod contestant;
pub mod generator;
#[path = "../ebpf/src/layout.rs"]
pub mod layout;
pub mod limits;
pub mod load;
pub mod machine;
pub mod prefixes;
pub mod record;
pub mod report;
pub mod rounds;
pub mod scenario;
pub mod site;
pub mod stats;
