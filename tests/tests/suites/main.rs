//! All suites of the lab, a module each, in one binary: `cargo test -p tunroute-tests --test suites SUITE::`.
//!
//! One binary is linked, and the suites run beside one another: tests wait far more than they compute. Each test has
//! network namespaces of its own.

mod cells;
mod commands;
mod conventions;
mod demo;
mod dist;
mod equivalence;
mod explain;
mod failover;
mod faults;
mod following;
mod gates;
mod import;
mod lab;
mod lifecycle;
mod matrix;
mod metrics;
mod mss;
mod operator;
mod planning;
mod probes;
mod prometheus;
mod semantics;
mod service;
mod survival;
mod top;
mod trace;
mod unmatched;
mod xdp;
