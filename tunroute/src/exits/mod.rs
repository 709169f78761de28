//! What makes an exit usable: probes that test it, and the commands that bring it up.

pub mod health;
pub mod supervise;
