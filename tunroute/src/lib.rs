//! tunroute: source-based policy routing for tunnels, with an eBPF fast path that always agrees with the kernel's
//! rules. See ARCHITECTURE.md for the map of the house.

pub mod config;
pub mod health;
pub mod net;
pub mod state;
pub mod supervise;
