//! A steady flow of numbered UDP packets, and the places where they were seen.
//!
//! The sender takes numbers at the given rate; watchers note every number that passes a device, with the kernel's time.
//! So a test can say: nothing was lost, nothing came twice, nothing was seen where it must not be, and how long after
//! an event the first packet took the new way.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IoSlice,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg},
};

use crate::{
    netns::Netns,
    pace::{patience, slowdown, until},
    packet_socket::PacketSocket,
    seen::Direction,
};

/// Packets sent by one system call at most.
const BURST: usize = 32;
/// Between two looks at the clock.
const TICK: Duration = Duration::from_micros(250);
/// A sender that did not run for longer than this does not catch up: a burst must fit the queues of the tunnels.
const CATCH_UP: Duration = Duration::from_millis(50);
/// Between two looks at what was seen.
const LOOK: Duration = Duration::from_millis(2);
/// A packet that has not arrived after this is lost. Until then it may be in a queue, or in the hands of a tun pair's thread
/// that waits for a processor.
const UNDER_WAY: Duration = Duration::from_secs(2);
/// A tail of what was seen at a place that has the last packet, even if some have overtaken others.
const TAIL: usize = 2 * BURST;
/// Enough of a frame for its headers and the number.
const SNAPLEN: usize = 128;
/// Starts the payload of every packet; the flow's own number and the packet's follow.
const MAGIC: &[u8; 8] = b"tunroute";
/// The shortest payload: magic, flow (4 bytes), number (8 bytes), the integers in network byte order.
const HEADER: usize = 20;
/// Ethernet, IPv6, UDP: the furthest that the payload can be from the start of a frame.
const HEADERS: [usize; 4] = [14 + 20 + 8, 14 + 40 + 8, 20 + 8, 40 + 8];

/// A place where the packets of a flow are looked for.
#[derive(Clone, Copy, Debug)]
pub struct Watch<'a> {
    netns: &'a Netns,
    device: &'a str,
    direction: Direction,
}

impl<'a> Watch<'a> {
    /// What a device receives.
    #[must_use]
    pub const fn entering(netns: &'a Netns, device: &'a str) -> Self {
        Self { netns, device, direction: Direction::In }
    }

    /// What a device sends.
    #[must_use]
    pub const fn leaving(netns: &'a Netns, device: &'a str) -> Self {
        Self { netns, device, direction: Direction::Out }
    }
}

/// What a flow is.
#[derive(Clone, Copy, Debug)]
pub struct FlowOptions<'a> {
    /// Where it starts.
    pub from: &'a Netns,
    /// The source, an address of `from`.
    pub src: IpAddr,
    /// The destination; a socket there receives the packets, so that no "port unreachable" is sent.
    pub to: &'a Netns,
    /// The destination, an address of `to`.
    pub dst: IpAddr,
    /// Packets per second; a slow machine sends fewer.
    pub rate: u32,
    /// Bytes of UDP payload; at least 20.
    pub payload: usize,
    /// Where to look, by a name for the report.
    pub watch: &'a [(&'a str, Watch<'a>)],
}

/// A packet of the flow, seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Its number, from 0.
    pub number: u64,
    /// When the kernel saw it.
    pub at: SystemTime,
}

type Arrivals = BTreeMap<String, Vec<Arrival>>;

#[derive(Debug, Default)]
struct Shared {
    arrivals: Mutex<Arrivals>,
    sent: AtomicU64,
    refused: Mutex<BTreeSet<u64>>,
    stop_sending: AtomicBool,
    stop_watching: AtomicBool,
}

impl Shared {
    fn arrivals(&self) -> MutexGuard<'_, Arrivals> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A flow that runs. Resolve neighbours with a ping first where no packet may be lost: the queue of an unresolved
/// neighbour is short.
///
/// All hops run on the sender's CPU, some 1 to 2 µs each. For a high rate on a small machine let the flow end at the
/// broker's address on the tunnel (`to: &world.brokers[0]`, `dst: TUNNELS[0].gateway`) and not at `remote`, and look at
/// [`FlowReport::rate`].
#[derive(Debug)]
pub struct Flow {
    shared: Arc<Shared>,
    sender: Option<JoinHandle<Result<()>>>,
    watcher: Option<JoinHandle<Result<u64>>>,
    started: Instant,
    _sink: UdpSocket,
}

impl Flow {
    /// Starts a flow.
    ///
    /// # Errors
    /// The source or destination is not an address of its namespace, or a watched device does not exist.
    pub fn start(options: FlowOptions<'_>) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let FlowOptions { from, src, to, dst, rate, payload, watch } = options;
        ensure!(payload >= HEADER, "a flow needs {HEADER} bytes of payload");
        ensure!(rate > 0, "a flow needs a rate");
        let rate = (rate / slowdown()).max(1);
        let bind = |netns: &Netns, addr| {
            netns.run_in(|| {
                UdpSocket::bind((addr, 0)).with_context(|| format!("cannot bind {addr} in {}", netns.label()))
            })
        };
        let (socket, sink) = (bind(from, src)?, bind(to, dst)?);
        let target = sink.local_addr().context("a socket without an address")?;
        let id = COUNTER.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared::default());
        let mut watchers = Vec::new();
        for &(name, Watch { netns, device, direction }) in watch {
            shared.arrivals().insert(name.to_owned(), Vec::new());
            let socket = PacketSocket::receiver(netns, Some(device), SNAPLEN)?;
            watchers.push(Watcher { name: name.to_owned(), direction, socket });
        }
        let watcher = std::thread::Builder::new().name("flow watcher".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || watch_all(&mut watchers, id, &shared)
        });
        let sender = std::thread::Builder::new().name("flow sender".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || send_all(&socket, target, (id, payload), rate, &shared)
        });
        Ok(Self {
            shared,
            sender: Some(sender.context("cannot start a thread")?),
            watcher: Some(watcher.context("cannot start a thread")?),
            started: Instant::now(),
            _sink: sink,
        })
    }

    /// Packets seen so far at a place.
    #[must_use]
    pub fn count(&self, place: &str) -> usize {
        self.shared.arrivals().get(place).map_or(0, Vec::len)
    }

    /// Packets that the kernel saw at a place at or after a time, as far as the watcher has come.
    #[must_use]
    pub fn count_since(&self, place: &str, since: SystemTime) -> usize {
        let arrivals = self.shared.arrivals();
        arrivals.get(place).into_iter().flatten().filter(|arrival| arrival.at >= since).count()
    }

    /// Waits for the first packet seen at a place at or after a time.
    ///
    /// # Errors
    /// There was none for `timeout`.
    pub fn wait_for(&self, place: &str, after: SystemTime, timeout: Duration) -> Result<Arrival> {
        let timeout = patience(timeout);
        let deadline = Instant::now() + timeout;
        loop {
            let first = self.shared.arrivals().get(place).and_then(|seen| {
                // Only the tail can be as late as that.
                let tail = seen.iter().rev().take_while(|arrival| arrival.at >= after);
                tail.last().copied()
            });
            match first {
                Some(arrival) => return Ok(arrival),
                None => ensure!(Instant::now() < deadline, "no packet of the flow at {place} in {timeout:?}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the kernel has seen `count` packets at a place at or after a time.
    ///
    /// # Errors
    /// There are fewer.
    pub fn wait_for_many(&self, place: &str, since: SystemTime, count: usize) -> Result<()> {
        until(&format!("{count} packets of the flow at {place}"), || Ok(self.count_since(place, since) >= count))
    }

    /// Stops sending, lets what is under way arrive, and tells what was seen.
    ///
    /// # Errors
    /// Packets cannot be sent or watched; or the watchers could not keep up, so that nothing can be said.
    pub fn stop(mut self) -> Result<FlowReport> {
        let (sent_ok, elapsed, watched) = self.join();
        sent_ok?;
        let overrun = watched?;
        ensure!(overrun == 0, "the watchers of the flow lost {overrun} frames: the machine is too slow for this rate");
        Ok(FlowReport {
            sent: self.shared.sent.load(Ordering::Relaxed),
            refused: std::mem::take(&mut self.shared.refused.lock().unwrap_or_else(PoisonError::into_inner)),
            elapsed,
            arrivals: std::mem::take(&mut self.shared.arrivals()),
        })
    }

    fn join(&mut self) -> (Result<()>, Duration, Result<u64>) {
        self.shared.stop_sending.store(true, Ordering::Relaxed);
        let sent = self.sender.take().map_or(Ok(()), join);
        let elapsed = self.started.elapsed();
        if !std::thread::panicking() {
            self.let_arrive();
        }
        self.shared.stop_watching.store(true, Ordering::Release);
        let watched = self.watcher.take().map_or(Ok(0), join);
        (sent, elapsed, watched)
    }

    /// Waits for what is under way: until each place where packets pass has seen the last one, or none for long.
    fn let_arrive(&self) {
        std::thread::sleep(Duration::from_millis(100));
        let last = self.shared.sent.load(Ordering::Relaxed).saturating_sub(1);
        let is_through = |seen: &Vec<Arrival>| {
            let tail = seen.iter().rev().take(TAIL);
            tail.clone().any(|arrival| arrival.number == last)
                || !tail.clone().any(|arrival| arrival.at.elapsed().is_ok_and(|past| past < patience(UNDER_WAY)))
        };
        while !self.shared.arrivals().values().all(is_through) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if self.sender.is_some() {
            // A flow that is dropped without being stopped belongs to a failed test.
            let _ = self.join();
        }
    }
}

fn join<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What was seen of a flow, from its start to its stop.
#[derive(Clone, Debug)]
pub struct FlowReport {
    /// Packets sent, or refused by the sender's own kernel.
    pub sent: u64,
    /// The numbers of those that the sender's own kernel refused (no route, link down).
    pub refused: BTreeSet<u64>,
    /// For how long they were sent.
    pub elapsed: Duration,
    /// What was seen at each place, in the order of arrival.
    pub arrivals: Arrivals,
}

impl FlowReport {
    /// Packets seen at a place.
    #[must_use]
    pub fn count(&self, place: &str) -> usize {
        self.arrivals.get(place).map_or(0, Vec::len)
    }

    /// Packets sent that were seen at none of the places.
    #[must_use]
    pub fn lost(&self, places: &[&str]) -> u64 {
        let seen: BTreeSet<u64> = places.iter().flat_map(|place| self.numbers(place)).collect();
        self.sent - seen.len() as u64
    }

    /// Packets seen more than once at these places together.
    #[must_use]
    pub fn duplicated(&self, places: &[&str]) -> usize {
        let seen: Vec<u64> = places.iter().flat_map(|place| self.numbers(place)).collect();
        seen.len() - seen.iter().collect::<BTreeSet<_>>().len()
    }

    /// Packets per second that were really sent.
    #[must_use]
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a count of packets is far below 2^52")]
        let sent = self.sent as f64;
        sent / self.elapsed.as_secs_f64()
    }

    fn numbers(&self, place: &str) -> impl Iterator<Item = u64> {
        self.arrivals.get(place).into_iter().flatten().map(|arrival| arrival.number)
    }
}

fn send_all(
    socket: &UdpSocket,
    target: SocketAddr,
    (id, payload): (u32, usize),
    rate: u32,
    shared: &Shared,
) -> Result<()> {
    let target = Some(SockaddrStorage::from(target));
    let targets = [target; BURST];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BURST, None);
    let mut buffers = vec![[MAGIC.as_slice(), &id.to_be_bytes(), &vec![0; payload - 12]].concat(); BURST];
    let catch_up = u64::from(rate) * u64::try_from(CATCH_UP.as_micros())? / 1_000_000 + 1;
    // Packets that were never sent because the sender did not run.
    let (mut next, mut skipped) = (0_u64, 0_u64);
    let started = Instant::now();
    while !shared.stop_sending.load(Ordering::Relaxed) {
        let due =
            u64::try_from(started.elapsed().as_nanos() * u128::from(rate) / 1_000_000_000)?.saturating_sub(skipped);
        let mut backlog = due.saturating_sub(next);
        if backlog > catch_up {
            skipped += backlog - catch_up;
            backlog = catch_up;
        }
        while backlog > 0 {
            let count = usize::try_from(backlog)?.min(BURST);
            for (buffer, number) in buffers.iter_mut().zip(next..) {
                buffer[12..HEADER].copy_from_slice(&number.to_be_bytes());
            }
            let slices: Vec<[IoSlice<'_>; 1]> = buffers[..count].iter().map(|buffer| [IoSlice::new(buffer)]).collect();
            let sent =
                sendmmsg(socket.as_raw_fd(), &mut headers, slices.iter(), &targets[..count], [], MsgFlags::empty());
            let taken = match sent {
                Ok(results) => results.count(),
                Err(Errno::EINTR) => 0,
                // The first packet was refused: no route, the device is down or its queue is full.
                Err(
                    Errno::ENETUNREACH
                    | Errno::EHOSTUNREACH
                    | Errno::ENETDOWN
                    | Errno::EINVAL
                    | Errno::EACCES
                    | Errno::EPERM
                    | Errno::ENOBUFS,
                ) => {
                    shared.refused.lock().unwrap_or_else(PoisonError::into_inner).insert(next);
                    1
                }
                Err(error) => return Err(error).context("cannot send a packet of a flow"),
            };
            next += taken as u64;
            backlog -= taken as u64;
            shared.sent.store(next, Ordering::Relaxed);
        }
        std::thread::sleep(patience(TICK));
    }
    Ok(())
}

#[derive(Debug)]
struct Watcher {
    name: String,
    direction: Direction,
    socket: PacketSocket,
}

/// Records what passes until it is stopped; returns the number of frames it could not read.
fn watch_all(watchers: &mut [Watcher], id: u32, shared: &Shared) -> Result<u64> {
    loop {
        // Read before the sockets are, so that what came before the stop is seen.
        let stop = shared.stop_watching.load(Ordering::Acquire);
        for watcher in watchers.iter_mut() {
            let mut seen = Vec::new();
            watcher.socket.receive(|meta, frame| {
                let outgoing = meta.pkttype == libc::PACKET_OUTGOING;
                if outgoing == (watcher.direction == Direction::Out)
                    && let Some(number) = number(frame, id)
                {
                    seen.push(Arrival { number, at: meta.at });
                }
            })?;
            if let Some(arrivals) = shared.arrivals().get_mut(&watcher.name) {
                arrivals.append(&mut seen);
            }
        }
        if stop {
            let drops: Result<Vec<u64>> = watchers.iter_mut().map(|watcher| watcher.socket.drops()).collect();
            return Ok(drops?.iter().sum());
        }
        // The kernel keeps the times. A thread that waited in `poll` would be woken for every packet, by the sender.
        std::thread::sleep(LOOK);
    }
}

/// The number of a packet, if it is one of this flow.
fn number(frame: &[u8], id: u32) -> Option<u64> {
    HEADERS.iter().find_map(|&at| {
        let (start, rest) = frame.get(at..at + HEADER)?.split_at(12);
        (start.starts_with(MAGIC) && start.ends_with(&id.to_be_bytes()))
            .then(|| rest.try_into().ok().map(u64::from_be_bytes))?
    })
}
