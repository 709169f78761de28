//! The host around the daemon: service manager, privileges, saved state, single instance, log.

pub mod instance;
pub mod log;
pub mod networkd;
pub mod privilege;
pub mod service;
pub mod state;
