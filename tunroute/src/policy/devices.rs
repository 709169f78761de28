//! The devices that the configuration's patterns stand for.

use super::net::{KernelState, Link};
use crate::config::DevicePattern;

/// The existing devices that match one of the patterns.
pub fn matching<'a>(patterns: &'a [DevicePattern], kernel: &'a KernelState) -> impl Iterator<Item = &'a Link> {
    kernel.links.values().filter(|link| patterns.iter().any(|pattern| pattern.matches(&link.name)))
}
