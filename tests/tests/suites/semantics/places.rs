//! Marked packets, and where they arrive.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tunroute_tests::{
    Capture, Seen, World,
    inject::udp,
    pace::{SOON, patience},
};

/// Long enough for a frame that must not come.
pub const A_WHILE: Duration = Duration::from_millis(40);

/// A UDP packet, marked by its source port.
pub fn packet(src: IpAddr, dst: IpAddr, hop_limit: u8, port: u16, payload: usize) -> Result<Vec<u8>> {
    udp(SocketAddr::new(src, port), SocketAddr::new(dst, 9), hop_limit, &vec![0x5a; payload])
}

pub fn marked(seen: &Seen, port: u16) -> bool {
    !seen.left() && seen.ports.is_some_and(|(from, _)| from == port)
}

/// Unique marks for packets.
pub struct Marks(pub u16);

impl Marks {
    pub fn next(&mut self) -> u16 {
        self.0 += 1;
        self.0
    }
}

/// The places outside of the host that a packet can get to.
pub struct Places(pub Vec<(&'static str, Capture)>);

impl Places {
    pub fn watch(world: &World) -> Result<Self> {
        Ok(Self(vec![
            ("sixxs0", Capture::on(&world.brokers[0], "sixxs0")?),
            ("sixxs1", Capture::on(&world.brokers[1], "sixxs1")?),
            ("net0", Capture::on(&world.isp, "net0")?),
        ]))
    }

    /// The marked packet arrives at this place with its checksums right, or nowhere, and at no other.
    pub fn expect(&mut self, place: Option<&str>, mark: u16) -> Result<()> {
        if let Some(place) = place {
            let found = self.0.iter_mut().find(|(name, _)| *name == place).map(|(_, capture)| capture);
            let seen = found.context("no such place")?.wait_for(|seen| marked(seen, mark), SOON)?;
            ensure!(seen.checksum_ok, "bad checksum: {seen}");
        }
        let within = if place.is_some() { Duration::ZERO } else { A_WHILE };
        for (name, capture) in &mut self.0 {
            capture.ensure_none(|seen| marked(seen, mark), within).with_context(|| format!("at {name}"))?;
            capture.drain()?;
        }
        Ok(())
    }

    /// Where a packet arrives first.
    pub fn saw(&mut self, wanted: impl Fn(&Seen) -> bool) -> Result<(&'static str, Seen)> {
        let deadline = Instant::now() + patience(SOON);
        loop {
            for (name, capture) in &mut self.0 {
                if let Ok(seen) = capture.wait_for(|seen| !seen.left() && wanted(seen), Duration::from_millis(1)) {
                    return Ok((name, seen));
                }
            }
            ensure!(Instant::now() < deadline, "no such packet arrives anywhere");
        }
    }
}
