//! What a running daemon says: the control socket's protocol, the types of `status`, and metrics.

pub mod metrics;
pub mod socket;
pub mod status;
