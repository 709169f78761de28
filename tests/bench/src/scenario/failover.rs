//! How long packets of a policy are not delivered when its tunnel goes down.
//!
//! Watches at the tunnels' devices write down when packets of the first tunnel's policy leave there, so that the figures
//! are as exact as the packets are close to one another.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::tc::SchedClassifierLink;
use nix::time::{ClockId, clock_gettime};

use super::{Arena, Bench, Place, SENDER_CPU};
use crate::{
    generator::{Frame, Generator, pin_to},
    load::flows,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, Unit},
    site::{INGRESS, TUNNELS},
};

/// Packets are sent for so long at a time: between two times there are none.
const FLOW: Duration = Duration::from_millis(60);
/// For packets to leave by a tunnel. To take a device down the kernel alone needs up to 70 ms while packets are sent.
const PATIENCE: Duration = Duration::from_secs(1);
/// After so much of the flow the tunnel goes down.
const BEFORE: Duration = Duration::from_millis(10);
/// For the daemon to find the tunnel up again.
const BACK: Duration = Duration::from_millis(50);
/// `IFF_UP` in `include/uapi/linux/if.h`, as wide as the flags of an ifreq.
const UP: i16 = 1;

/// One failover, in seconds.
#[derive(Clone, Copy)]
struct Failover {
    /// From the last packet that left by the first tunnel to the first by the second.
    outage: f64,
    /// From when the kernel had taken the device down, and told so, to the first packet by the second tunnel.
    reaction: f64,
}

/// Takes the first tunnel of each daemon down, again and again.
///
/// # Errors
/// Packets cannot be sent.
pub fn measure(bench: &Bench, arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
    // Packets of the first tunnel's policy alone, all alike.
    let first = Prefixes { family: case.family(), count: 1 };
    bench.generator.set_flows(&flows(first, case.pattern))?;
    let frame = Frame { family: case.family(), size: case.size };
    let failures = if bench.effort.quick { 5 } else { 9 };
    let mut measurements = Vec::new();
    for place in arena.places.iter().filter(|place| place.installed.process().is_some()) {
        let name = place.contestant.name();
        let times: Result<Vec<Failover>> = (0..failures).map(|_| one(bench, place, frame)).collect();
        match times {
            Ok(times) => {
                for (figure, of) in [
                    ("", (|time| time.outage) as fn(&Failover) -> f64),
                    ("after the device was down", |time| time.reaction),
                ] {
                    let values = times.iter().map(of).collect();
                    measurements.push(Measurement::of(case, name, figure, Unit::Seconds, values));
                }
            }
            Err(error) => {
                let why = Outcome::Disqualified(format!("{error:#}"));
                measurements.push(Measurement::none(case, name, Unit::Seconds, why));
            }
        }
    }
    Ok(measurements)
}

fn one(bench: &Bench, place: &Place<'_>, frame: Frame) -> Result<Failover> {
    let (generator, site) = (&bench.generator, &place.site);
    let packets = bench.packets_in(FLOW, place, frame)?;
    let ingress = site.host.ifindex(INGRESS)?;
    let _watches: [SchedClassifierLink; 2] = site.host.run_in(|| {
        Ok([generator.attach_watch("watch0", TUNNELS[0])?, generator.attach_watch("watch1", TUNNELS[1])?])
    })?;
    generator.forget_seen()?;
    let done = AtomicBool::new(false);
    let failed = site.host.run_in(|| {
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                pin_to(SENDER_CPU)?;
                while !done.load(Ordering::Acquire) {
                    generator.send(frame, ingress, packets)?;
                }
                anyhow::Ok(())
            });
            let down = (|| {
                until_seen(generator, 0).context("while it was up")?;
                std::thread::sleep(BEFORE);
                set_down(TUNNELS[0])?;
                let down = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
                until_seen(generator, 1).with_context(|| format!("after {} went down", TUNNELS[0]))?;
                Ok(down)
            })();
            done.store(true, Ordering::Release);
            sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            down
        })
    });
    let seen = [generator.seen(0)?, generator.seen(1)?];
    site.host.ip(&format!("link set {} up", TUNNELS[0]))?;
    std::thread::sleep(BACK);
    let down = failed?;
    let after = |earlier: u64| seen[1].first.saturating_sub(earlier) as f64 / 1e9;
    Ok(Failover { outage: after(seen[0].last), reaction: after(u64::try_from(down.as_nanos())?) })
}

fn until_seen(generator: &Generator, tunnel: usize) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while generator.seen(u32::try_from(tunnel)?)?.first == 0 {
        ensure!(Instant::now() < deadline, "no packet left by {} within {PATIENCE:?}", TUNNELS[tunnel]);
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// `ip link set DEVICE down`, without the time that starting `ip` takes.
fn set_down(device: &str) -> Result<()> {
    // SAFETY: a new socket, which nobody else closes.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("cannot open a socket");
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: an ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: both take a pointer to an ifreq, which lives until the calls return; the first has filled in the flags.
    let done = unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) < 0 {
            -1
        } else {
            request.ifr_ifru.ifru_flags &= !UP;
            libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request)
        }
    };
    nix::errno::Errno::result(done).with_context(|| format!("cannot set {device} down"))?;
    Ok(())
}
