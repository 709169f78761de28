//! Source-based policy routing for tunnels: kernel rules and an eBPF fast path, compiled from one file, that always agree.
//!
//! Each room answers one question; ARCHITECTURE.md is the map.

pub mod commands;
pub mod config;
pub mod control;
pub mod daemon;
pub mod datapath;
pub mod exits;
pub mod host;
pub mod kernel;
pub mod policy;
pub mod prefixes;
