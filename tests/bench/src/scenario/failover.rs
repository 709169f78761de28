//! How long packets of a policy are not delivered when its tunnel goes down.
//!
//! Watches at the tunnels' devices write down when the first packet of the first tunnel's policy leaves there, so that the
//! figures are as exact as the packets are close to one another. The last packet tells nothing: the watch is ahead of the
//! queue, where a device that is being taken down drops what it still gets.

use std::{
    io::{self, Read as _},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::tc::SchedClassifierLink;
use nix::{
    sys::socket::NetlinkAddr,
    time::{ClockId, clock_gettime},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Arena, Bench, Place, SENDER_CPU};
use crate::{
    generator::{Frame, Generator, pin_to},
    load::flows,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, TOLD, Unit},
    site::TUNNELS,
};

/// Packets are sent for so long at a time: between two times there are none.
const FLOW: Duration = Duration::from_millis(60);
/// For packets to leave by a tunnel. To take a device down the kernel alone needs up to 70 ms while packets are sent; to
/// find it up again, a daemon with a million prefixes needs seconds.
const PATIENCE: Duration = Duration::from_secs(15);
/// For so long all packets leave by the tunnel before it goes down.
const BEFORE: Duration = Duration::from_millis(10);
/// `IFF_UP` in `include/uapi/linux/if.h`, as wide as the flags of an ifreq.
const UP: i16 = 1;

/// One failover, in seconds.
#[derive(Clone, Copy)]
struct Failover {
    /// From the command to take the device down to the first packet by the second tunnel: no packet can be lost for longer.
    outage: f64,
    /// The part that is not the kernel's: from its notification that the device is down.
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
                for (figure, of) in [("", (|time| time.outage) as fn(&Failover) -> f64), (TOLD, |time| time.reaction)] {
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
    let entry = site.entry()?;
    let _watches: [SchedClassifierLink; 2] = site.host.run_in(|| {
        Ok([generator.attach_watch("watch0", TUNNELS[0])?, generator.attach_watch("watch1", TUNNELS[1])?])
    })?;
    let done = AtomicBool::new(false);
    let first = site.host.ifindex(TUNNELS[0])?;
    let failed = site.host.run_in(|| {
        let links = link_messages()?;
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                pin_to(SENDER_CPU)?;
                while !done.load(Ordering::Acquire) {
                    generator.send(frame, entry, packets)?;
                }
                anyhow::Ok(())
            });
            let down = (|| {
                until(|| settled(generator)).with_context(|| format!("not all packets leave by {}", TUNNELS[0]))?;
                // The notification comes before the kernel has finished and the command returns.
                let told = scope.spawn(|| until_told(&links, first));
                let commanded = now()?;
                set_down(TUNNELS[0])?;
                let told = told.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                let follows = until(|| Ok(Some(generator.seen(1)?).filter(|&seen| seen != 0)))
                    .with_context(|| format!("{} is down, but no packet leaves by {}", TUNNELS[0], TUNNELS[1]))?;
                Ok((commanded, told, Duration::from_nanos(follows)))
            })();
            done.store(true, Ordering::Release);
            sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            down
        })
    });
    site.host.ip(&format!("link set {} up", TUNNELS[0]))?;
    let (commanded, told, follows) = failed?;
    let outage =
        follows.checked_sub(commanded).context("packets left by the second tunnel before the first was down")?;
    // The daemon may receive the notification, and act, before this process does.
    Ok(Failover { outage: outage.as_secs_f64(), reaction: follows.saturating_sub(told).as_secs_f64() })
}

fn now() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

/// What the kernel tells of this namespace's devices, from now on.
fn link_messages() -> Result<Socket> {
    let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::DGRAM, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let groups = u32::try_from(libc::RTMGRP_LINK)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups)).context("cannot listen to the kernel")?;
    Ok(socket)
}

/// Time of the notification that a device is down.
fn until_told(mut links: &Socket, device: u32) -> Result<Duration> {
    /// `struct nlmsghdr`, whose second field is the message's type, and `struct ifinfomsg`, whose fifth and sixth are the
    /// device and its flags, of `include/uapi/linux/netlink.h` and `rtnetlink.h`.
    const START: usize = 32;
    let mut message = [0; 8192];
    loop {
        let length = links.read(&mut message).context("it was not told that the device is down")?;
        let told = now()?;
        let field = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| message[at + byte]));
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        let up = field(24) & u32::from(UP.cast_unsigned()) != 0;
        if length >= START && kind == libc::RTM_NEWLINK && field(20) == device && !up {
            return Ok(told);
        }
    }
}

/// Do all packets leave by the first tunnel? They do not until the daemon has found it up again.
fn settled(generator: &Generator) -> Result<Option<()>> {
    generator.forget_seen()?;
    std::thread::sleep(BEFORE);
    Ok((generator.seen(0)? != 0 && generator.seen(1)? == 0).then_some(()))
}

/// Asks until there is an answer.
fn until<T>(ask: impl Fn() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "after {PATIENCE:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// `ip link set DEVICE down`, without the time that starting `ip` takes.
fn set_down(device: &str) -> Result<()> {
    // SAFETY: a new socket, which nothing else closes.
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
