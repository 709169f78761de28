//! Captures: the frames that a device received and sent, whatever the rest of the system says of them.
//!
//! Frames wait in the socket until somebody looks, so a look sees everything that passed before it. On the way in a
//! frame is seen before any eBPF program or netfilter; on the way out only when it really leaves, after both.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::{
    netns::Netns,
    pace::{SOON, patience},
    packet_socket::{Meta, PacketSocket},
    seen::{Direction, Seen, Sighting},
};

/// Longer than any frame: a whole GSO packet with its Ethernet header.
const SNAPLEN: usize = 65536 + 64;
/// Frames that an error message lists at most.
const LISTED: usize = 12;

/// A capture on one device, or on all devices of a namespace.
#[derive(Debug)]
pub struct Capture {
    socket: PacketSocket,
    place: String,
    seen: Vec<Seen>,
}

impl Capture {
    /// Captures on one device. It goes on when the device is set down and up, but not when it is deleted and made anew.
    ///
    /// # Errors
    /// There is no such device.
    pub fn on(netns: &Netns, device: &str) -> Result<Self> {
        Self::open(netns, Some(device))
    }

    /// Captures on all devices, also those that come later.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn everywhere(netns: &Netns) -> Result<Self> {
        Self::open(netns, None)
    }

    fn open(netns: &Netns, device: Option<&str>) -> Result<Self> {
        let place = format!("{} of {}", device.unwrap_or("all devices"), netns.label());
        Ok(Self { socket: PacketSocket::receiver(netns, device, SNAPLEN)?, place, seen: Vec::new() })
    }

    /// Moves what waits in the socket to `seen`.
    fn look(&mut self) -> Result<()> {
        let mut frames: Vec<(Meta, Vec<u8>)> = Vec::new();
        self.socket.receive(|meta, raw| frames.push((meta, raw.to_vec())))?;
        let socket = &self.socket;
        self.seen.extend(frames.into_iter().map(|(meta, raw)| Seen::parse(sighting(socket, &meta), raw)));
        Ok(())
    }

    /// Fails if frames were lost because there was no room for them: what follows would be guesswork.
    fn ensure_complete(&mut self) -> Result<()> {
        let drops = self.socket.drops()?;
        ensure!(drops == 0, "the capture on {} lost {drops} frames: look more often or send less", self.place);
        Ok(())
    }

    /// Waits for a frame, takes it out of the capture and returns it. Frames seen earlier count.
    ///
    /// # Errors
    /// None came in time; the error lists what did.
    pub fn wait_for(&mut self, wanted: impl Fn(&Seen) -> bool, timeout: Duration) -> Result<Seen> {
        let timeout = patience(timeout);
        let deadline = Instant::now() + timeout;
        loop {
            self.look()?;
            if let Some(at) = self.seen.iter().position(&wanted) {
                return Ok(self.seen.remove(at));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.ensure_complete()?;
                bail!("no such frame on {} in {timeout:?}; seen: {}", self.place, list(&self.seen));
            }
            self.socket.wait(left)?;
        }
    }

    /// Waits for the answer to a packet that nobody promises to answer, as an ICMP error (RFC 1812, 4.3.2.8; RFC 4443, 2.4):
    /// the packet is sent again once a second, which is how often IPv4 refuses one (`ip_error()` in `net/ipv4/route.c`).
    /// Returns the answer and how many times the packet was sent.
    ///
    /// # Errors
    /// The packet cannot be sent, or no answer came in time.
    pub fn wait_for_answer(
        &mut self,
        mut send: impl FnMut() -> Result<()>,
        wanted: impl Fn(&Seen) -> bool,
    ) -> Result<(Seen, u64)> {
        let deadline = Instant::now() + patience(SOON);
        let mut sent = 0;
        loop {
            send()?;
            sent += 1;
            match self.wait_for(&wanted, Duration::from_secs(1)) {
                Ok(answer) => return Ok((answer, sent)),
                Err(error) if Instant::now() >= deadline => return Err(error.context(format!("sent {sent} times"))),
                Err(_) => {}
            }
        }
    }

    /// All frames seen so far, which are forgotten.
    ///
    /// # Errors
    /// Frames were lost.
    pub fn drain(&mut self) -> Result<Vec<Seen>> {
        self.look()?;
        self.ensure_complete()?;
        Ok(std::mem::take(&mut self.seen))
    }

    /// Watches for the given time that no such frame is there: neither seen so far, nor coming.
    ///
    /// # Errors
    /// There is one; or frames were lost.
    pub fn ensure_none(&mut self, unwanted: impl Fn(&Seen) -> bool, within: Duration) -> Result<()> {
        let deadline = Instant::now() + patience(within);
        loop {
            self.look()?;
            let found: Vec<Seen> = self.seen.iter().filter(|seen| unwanted(seen)).cloned().collect();
            ensure!(found.is_empty(), "unwanted frames on {}: {}", self.place, list(&found));
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return self.ensure_complete();
            }
            self.socket.wait(left)?;
        }
    }
}

fn sighting(socket: &PacketSocket, meta: &Meta) -> Sighting {
    Sighting {
        device: socket.device_name(meta.ifindex).unwrap_or_else(|| format!("#{}", meta.ifindex)),
        direction: if meta.pkttype == libc::PACKET_OUTGOING { Direction::Out } else { Direction::In },
        at: meta.at,
        ethernet: matches!(meta.hatype, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK),
        vlan_tci: meta.vlan_tci,
        checksum_partial: meta.status & libc::TP_STATUS_CSUMNOTREADY != 0,
    }
}

fn list(seen: &[Seen]) -> String {
    let mut text = format!("{} frames", seen.len());
    for frame in seen.iter().take(LISTED) {
        text.push_str(&format!("\n  {frame}"));
    }
    text
}
