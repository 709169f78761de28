//! Round trips: a client behind the host asks, and the far end of a tunnel answers.
//!
//! One thread plays both ends: it sends by a UDP socket, takes the packet out of the tun device, writes the answer into
//! it, and receives that. The kernel does its part within these calls, so what is measured is its time and no scheduler's.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use fastrand::Rng;
use hdrhistogram::Histogram;
use tunroute::policy::net::Family;

use super::{Arena, Bench, Place, SENDER_CPU};
use crate::{
    contestant::Delivery,
    generator::pin_to,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, Unit},
    rounds::interleave,
    site::VNET_HEADER,
};

/// Round trips in each slice.
const TRIPS: usize = 200;
/// How long one may take.
const PATIENCE: Duration = Duration::from_millis(500);
/// What is reported.
const PERCENTILES: [(&str, f64); 4] = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9)];

/// Measures round trips of all contestants that let packets of the first prefix through the first tunnel.
///
/// # Errors
/// The clients cannot be set up.
pub fn measure(bench: &mut Bench, arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
    let prefixes = Prefixes { family: case.family(), count: case.prefixes };
    let unit = Unit::Microseconds;
    let places: Vec<&Place<'_>> = arena
        .places
        .iter()
        .filter(|place| place.contestant.delivery() == Delivery::Policy || place.contestant.routes_by_kernel())
        .collect();
    let client = prefixes.random_source(0, &mut Rng::with_seed(5));
    let sockets: Vec<UdpSocket> = places.iter().map(|place| connect(place, client)).collect::<Result<_>>()?;
    let mut histograms = vec![Histogram::<u64>::new_with_bounds(1, 1_000_000_000, 3)?; places.len()];
    let mut lost: Vec<Option<String>> = vec![None; places.len()];
    let medians = interleave(places.len(), bench.effort.rounds, &mut bench.rng, |who| {
        let mut slice = Histogram::<u64>::new_with_bounds(1, 1_000_000_000, 3)?;
        let trips = places[who].site.host.run_in(|| {
            pin_to(SENDER_CPU)?;
            for _ in 0..TRIPS / 10 {
                round_trip(&sockets[who], places[who].site.tunnel(0)?)?;
            }
            for _ in 0..TRIPS {
                let time = round_trip(&sockets[who], places[who].site.tunnel(0)?)?;
                slice.saturating_record(u64::try_from(time.as_nanos())?);
            }
            Ok(())
        });
        if let Err(why) = trips {
            lost[who] = Some(format!("{why:#}"));
            return Ok(None);
        }
        histograms[who].add(&slice)?;
        Ok(Some(slice.value_at_percentile(50.0) as f64 / 1000.0))
    })?;
    let baseline = places.iter().position(|place| place.contestant.name() == crate::contestant::BASELINE);
    let baseline = baseline.context("the baseline must take part")?;
    let mut measurements = arena.not_there(case, unit);
    for (who, place) in places.iter().enumerate() {
        let name = place.contestant.name();
        if let Some(why) = lost[who].take() {
            measurements.push(Measurement::none(case, name, unit, Outcome::Disqualified(why)));
            continue;
        }
        let typical = Measurement::of(case, name, "", unit, medians[who].clone());
        measurements.push(typical.relative_to(&medians[baseline]));
        for (figure, percentile) in PERCENTILES {
            let value = histograms[who].value_at_percentile(percentile) as f64 / 1000.0;
            measurements.push(Measurement::of(case, name, figure, unit, vec![value]));
        }
    }
    Ok(measurements)
}

/// Puts a client with this address behind the host, and the host's way back to it; tells the server's address.
pub(super) fn reach(place: &Place<'_>, client: IpAddr) -> Result<IpAddr> {
    let (gateway, neighbour, server) = match client {
        IpAddr::V4(_) => ("10.99.0.1", "10.99.0.2/24", "203.0.113.1"),
        IpAddr::V6(_) => ("fd99::1", "fd99::2/64", "2001:db8:ffff::1"),
    };
    let (site, by) = (&place.site, neighbour.split('/').next().unwrap_or(neighbour));
    let nodad = if client.is_ipv6() { "nodad" } else { "" };
    let version = if client.is_ipv6() { "-6" } else { "-4" };
    site.neighbours.ip(&format!(
        "addr replace {neighbour} dev lan0 {nodad}
         addr replace {client} dev lan0 {nodad}
         {version} route replace default via {gateway} dev lan0"
    ))?;
    site.host.ip(&format!("{version} route replace {client} via {by} dev lan0"))?;
    Ok(server.parse()?)
}

/// A client with this address that sends to the server.
fn connect(place: &Place<'_>, client: IpAddr) -> Result<UdpSocket> {
    let server = reach(place, client)?;
    let bind = || UdpSocket::bind((client, 0)).with_context(|| format!("cannot bind to {client}"));
    let socket = place.site.neighbours.run_in(bind)?;
    socket.connect(SocketAddr::new(server, 7)).context("cannot connect a UDP socket")?;
    socket.set_nonblocking(true).context("cannot configure a socket")?;
    Ok(socket)
}

/// One question and its answer.
fn round_trip(client: &UdpSocket, mut tunnel: &File) -> Result<Duration> {
    let mut packet = [0_u8; 2048];
    let start = Instant::now();
    client.send(&[0; 22]).context("cannot send")?;
    let length = loop {
        let length = within(start, "did not come out of the tunnel", || tunnel.read(&mut packet))?;
        if answer(packet.get_mut(VNET_HEADER..length).unwrap_or_default()) {
            break length;
        }
    };
    // Its header says how much of the checksum has been computed, which stays true.
    tunnel.write_all(&packet[..length]).context("cannot answer")?;
    within(start, "was answered, but the answer did not come", || client.recv(&mut [0; 64]))?;
    Ok(start.elapsed())
}

/// Tries until there is something.
fn within(start: Instant, what: &str, mut attempt: impl FnMut() -> std::io::Result<usize>) -> Result<usize> {
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::WouldBlock && start.elapsed() < PATIENCE => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("a packet {what} within {PATIENCE:?}"),
            other => return other.with_context(|| format!("a packet {what}")),
        }
    }
}

/// Turns a UDP packet into its answer; false if it is something else. Checksums stay right when addresses change places.
fn answer(packet: &mut [u8]) -> bool {
    let (family, protocol, addresses, ports) = match packet.first().map(|byte| byte >> 4) {
        Some(4) => (Family::V4, 9, 12, 20),
        Some(6) => (Family::V6, 6, 8, 40),
        _ => return false,
    };
    let length = if family == Family::V4 { 4 } else { 16 };
    if packet.len() < ports + 8 || packet[protocol] != 17 {
        return false;
    }
    for at in 0..length {
        packet.swap(addresses + at, addresses + length + at);
    }
    packet.swap(ports, ports + 2);
    packet.swap(ports + 1, ports + 3);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_goes_back_where_the_question_came_from() {
        let mut packet = [0_u8; 28];
        packet[0] = 0x45;
        packet[9] = 17;
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 192, 0, 2, 7]);
        packet[20..24].copy_from_slice(&[1, 2, 0, 7]);
        assert!(answer(&mut packet));
        assert_eq!(packet[12..24], [192, 0, 2, 7, 10, 0, 0, 1, 0, 7, 1, 2]);
        packet[9] = 1;
        assert!(!answer(&mut packet));
    }
}
