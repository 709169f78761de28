//! How fast this machine is: an emulated one takes its time, and a busy one some of it.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

/// How long is waited for what must come. It is there in a blink, unless something waits for a processor: whoever waits goes
/// on at once, and only a failure takes as long as this.
pub const SOON: Duration = Duration::from_secs(30);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// `duration`, or as many times of it as `TUNROUTE_TEST_SLOWDOWN` says. All waiting for what must come, or must not, is
/// stretched by this, and so is the time between two looks, each of which takes long there; how long something takes is not
/// asked of a machine that is slow.
#[must_use]
pub fn patience(duration: Duration) -> Duration {
    duration * slowdown()
}

/// Waits until something is so.
///
/// # Errors
/// It is not [`SOON`]; or one cannot see whether it is.
pub fn until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience(SOON);
    while !is_so().with_context(|| what.to_owned())? {
        ensure!(Instant::now() < deadline, "not in {SOON:?}: {what}");
        std::thread::sleep(patience(LOOK));
    }
    Ok(())
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
