//! The daemon does not run for a minute. The name comes first, so that the other tests run meanwhile.

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::scene::{IN_TIME, Setting};

/// Nobody follows the devices when the heartbeat is over: the ingress program steps aside, and the kernel carries on.
#[test]
fn for_a_minute() -> Result<()> {
    Setting::new("both").run("SIGSTOP for a minute, SIGCONT", |scene| {
        scene.daemon.signal(Signal::SIGSTOP)?;
        // The heartbeat is valid for 10 s.
        std::thread::sleep(Duration::from_secs(60));
        let arrived = scene.forwarded();
        scene.flows_again("carried by the kernel", IN_TIME)?;
        scene.world.set_tunnel(0, false)?;
        scene.world.set_tunnel(0, true)?;
        scene.daemon.signal(Signal::SIGCONT)?;
        scene.flows_again("caught up", IN_TIME)?;
        let decided = scene.daemon.counters()?.packets("tunnel0", "forwarded")?;
        // A fifth is decided until the heartbeat is over; another one is the margin.
        ensure!(decided * 5 < arrived as u64 * 2, "the fast path decided {decided} of {arrived} packets");
        Ok(())
    })
}
