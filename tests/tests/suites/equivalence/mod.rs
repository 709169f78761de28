//! The fast path decides exactly what the kernel's rules would, or steps aside for a reason that counts.
//!
//! Both decide as the configuration says (`intent.rs`). The same random hosts and packets are put before the decision in
//! user space and a model of the rule walk (`decided.rs`), before the loaded programs and the real kernel's route lookup (`asked.rs`), and through namespaces,
//! once with and once without the programs (`forwarded.rs`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod asked;
mod decided;
mod expect;
mod forwarded;
mod intent;
mod packet;
mod router;
mod scenario;
mod seeds;
mod tally;
