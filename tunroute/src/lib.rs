//! tunroute: source-based policy routing for tunnels, with an eBPF fast path that always agrees with the kernel's
//! rules. See ARCHITECTURE.md for the map of the house.

pub mod cli;
pub mod compile;
pub mod config;
pub mod control;
pub mod daemon;
pub mod datapath;
pub mod doctor;
pub mod explain;
pub mod fast;
pub mod gates;
pub mod health;
pub mod import;
pub mod index;
pub mod instance;
pub mod kernel;
pub mod log;
pub mod metrics;
pub mod model;
pub mod net;
pub mod networkd;
pub mod plan;
pub mod prefix_map;
pub mod preview;
pub mod privilege;
pub mod service;
pub mod state;
pub mod status;
pub mod supervise;
pub mod text;
pub mod top;
pub mod trace;
pub mod trie;
pub mod verify;
pub mod xdp;
