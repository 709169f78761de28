//! A pair of tun devices in two namespaces, joined by a thread that carries packets from each to the other: a layer 3
//! tunnel with nothing in between.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, PipeReader, PipeWriter, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::OpenOptionsExt,
    },
    process::{Command, Stdio},
    thread::JoinHandle,
};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::Netns;

/// Packets carried in one direction before the other gets its turn.
const TURN: usize = 64;
/// The largest IP packet, and the `virtio_net_hdr` before it.
const BUFFER: usize = 65535 + 10;
/// Packets that wait in a device for the thread: a second at 100,000 packets per second, since a wire does not lose
/// packets because the machine is busy.
const QUEUE: u32 = 10_000;

/// How a pair of tun devices is made.
#[derive(Clone, Copy, Debug)]
pub struct TunOptions {
    /// The largest layer 3 packet, in bytes.
    pub mtu: u32,
    /// `IFF_VNET_HDR` with checksum and segmentation offload: GSO packets pass whole, checksums stay partial.
    pub vnet_hdr: bool,
}

impl Default for TunOptions {
    fn default() -> Self {
        Self { mtu: 1400, vnet_hdr: false }
    }
}

/// Two joined tun devices. They exist as long as this value: dropping it stops the thread and deletes both.
#[derive(Debug)]
pub struct TunPair {
    shuttle: Option<Shuttle>,
    /// Namespace and device, by name.
    devices: [(String, String); 2],
}

impl TunPair {
    /// Makes a device of the given name in each namespace; both are up.
    ///
    /// # Errors
    /// `/dev/net/tun` is missing, the name is taken, or `ip link set` fails.
    pub fn new(a: (&Netns, &str), b: (&Netns, &str), options: TunOptions) -> Result<Self> {
        let ends = [open(a.0, a.1, options)?, open(b.0, b.1, options)?];
        for (netns, device) in [a, b] {
            netns.ip(&format!("link set {device} mtu {} txqueuelen {QUEUE} up", options.mtu))?;
        }
        let devices = [a, b].map(|(netns, device)| (netns.name().to_owned(), device.to_owned()));
        Ok(Self { shuttle: Some(Shuttle::start(ends)?), devices })
    }
}

impl Drop for TunPair {
    fn drop(&mut self) {
        // Closing the files would do it, but not at once: a process that is being started elsewhere in this one holds
        // copies of them until it has become another program.
        for (netns, device) in &self.devices {
            // A test may have deleted it already.
            let _ = Command::new("ip").args(["-n", netns, "link", "del", device]).stderr(Stdio::null()).status();
        }
        self.shuttle = None;
    }
}

/// The thread that carries packets between two tun devices, until this is dropped.
#[derive(Debug)]
pub struct Shuttle {
    // The thread polls the other end, and ends when this one is closed.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Shuttle {
    /// Joins two devices that were opened with the same [`TunOptions::vnet_hdr`]. The thread runs on the caller's CPUs.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(ends: [File; 2]) -> Result<Self> {
        let (stopped, stop) = std::io::pipe().context("cannot make a pipe")?;
        let thread = std::thread::Builder::new()
            .name("tun shuttle".to_owned())
            .spawn(move || shuttle(&ends, &stopped))
            .context("cannot start the shuttle thread")?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Shuttle {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Opens a non-persistent tun device: it goes when the file is closed. It is down.
///
/// # Errors
/// `/dev/net/tun` is missing, or the name is taken or too long.
pub fn open(netns: &Netns, device: &str, options: TunOptions) -> Result<File> {
    netns.run_in(|| {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("cannot open /dev/net/tun")?;
        // SAFETY: an ifreq is plain data for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if device.len() >= request.ifr_name.len() {
            bail!("device name {device} is too long");
        }
        for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from.cast_signed();
        }
        let header = if options.vnet_hdr { libc::IFF_VNET_HDR } else { 0 };
        // `ifr_flags` is a short, of which all bits are used.
        request.ifr_ifru.ifru_flags =
            i16::from_ne_bytes(u16::try_from(libc::IFF_TUN | libc::IFF_NO_PI | header)?.to_ne_bytes());
        // SAFETY: TUNSETIFF takes a pointer to an ifreq, which lives until the call returns.
        let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        nix::errno::Errno::result(made).with_context(|| format!("cannot make tun device {device}"))?;
        if options.vnet_hdr {
            let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
            // SAFETY: TUNSETOFFLOAD takes its flags by value.
            let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
            nix::errno::Errno::result(set).with_context(|| format!("cannot set the offloads of {device}"))?;
        }
        Ok(file)
    })
}

/// Carries packets both ways until it is stopped, or until one of the devices is deleted.
fn shuttle(ends: &[File; 2], stop: &PipeReader) {
    let [a, b] = ends;
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut fds = [a.as_fd(), b.as_fd(), stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        if poll(&mut fds, PollTimeout::NONE).is_err_and(|error| error != nix::errno::Errno::EINTR) {
            return;
        }
        let [a_ready, b_ready, stopped] = fds.map(|fd| fd.any().unwrap_or(false));
        if stopped {
            return;
        }
        let carried = (!a_ready || carry(a, b, &mut buffer)) && (!b_ready || carry(b, a, &mut buffer));
        if !carried {
            return;
        }
    }
}

/// Carries what waits, at most one turn; false if the device to read from is gone.
fn carry(mut from: &File, mut to: &File, buffer: &mut [u8]) -> bool {
    for _ in 0..TURN {
        match from.read(buffer) {
            // A device that is down takes nothing: the packet is lost, as on a wire. So is one it finds malformed.
            Ok(length) => drop(to.write(buffer.get(..length).unwrap_or_default())),
            Err(error) => return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }
    true
}
