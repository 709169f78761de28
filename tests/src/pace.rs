//! How fast this machine is: an emulated one takes its time.

use std::{sync::OnceLock, time::Duration};

/// `duration`, or as many times of it as `TUNROUTE_TEST_SLOWDOWN` says. All waiting for what must come, or must not, is
/// stretched by this, and so is the time between two looks, each of which takes long there; how long something takes is not
/// asked of a machine that is slow.
#[must_use]
pub fn patience(duration: Duration) -> Duration {
    duration * slowdown()
}

/// The variable's value; 1 unless it is set.
#[must_use]
pub fn slowdown() -> u32 {
    static SLOWDOWN: OnceLock<u32> = OnceLock::new();
    *SLOWDOWN.get_or_init(|| {
        let value = std::env::var("TUNROUTE_TEST_SLOWDOWN").ok();
        value.and_then(|value| value.parse().ok()).unwrap_or(1)
    })
}
