//! The host's own packets: one unconnected UDP socket for each of some sources, so that each packet is routed anew.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};
use tunroute::{policy::fast::address_from_words, policy::net::Family};

use super::{Arena, Bench, Place, SENDER_CPU, arena::judge};
use crate::{
    contestant::BASELINE,
    generator::{Generator, Sent, pin_to},
    layout::Flow,
    load::flows,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, Unit},
    rounds::interleave,
};

/// Number of sources.
const SOURCES: usize = 100;
/// Packets in a slice.
const PACKETS: u32 = 4000;
/// UDP payload, for frames of 64 bytes with IPv4.
const PAYLOAD: [u8; 22] = [0; 22];

/// A socket, and where it sends to.
type Way = (Socket, SocketAddr);

/// Measures the time of one `sendto()`.
///
/// # Errors
/// Sockets cannot be made, or packets not be sent.
pub fn measure(bench: &mut Bench, arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
    let prefixes = Prefixes { family: case.family(), count: case.prefixes };
    let flows = flows(prefixes, case.pattern);
    let unit = Unit::NanosecondsPerPacket;
    let places: Vec<&Place<'_>> = arena.places.iter().filter(|place| !place.contestant.forwards_only()).collect();
    let baseline = places.iter().position(|place| place.contestant.name() == BASELINE);
    let baseline = baseline.context("the baseline must take part")?;
    let mut lost: Vec<Option<String>> = vec![None; places.len()];
    let mut ways = Vec::new();
    for place in &places {
        ways.push(place.site.host.run_in(|| {
            flows.iter().take(SOURCES).map(|flow| open(case.family(), flow)).collect::<Result<Vec<Way>>>()
        })?);
    }
    let generator = &bench.generator;
    let values = interleave(places.len(), bench.effort.rounds, &mut bench.rng, |who| {
        if lost[who].is_some() {
            return Ok(None);
        }
        match slice(generator, places[who], &ways[who])? {
            Ok(sent) => Ok(Some(sent.nanoseconds_each())),
            Err(why) => {
                lost[who] = Some(why);
                Ok(None)
            }
        }
    })?;
    let mut measurements = arena.not_there(case, unit);
    for ((place, mine), lost) in places.iter().zip(&values).zip(lost) {
        let name = place.contestant.name();
        measurements.push(match lost {
            Some(why) => Measurement::none(case, name, unit, Outcome::Disqualified(why)),
            None => Measurement::of(case, name, "", unit, mine.clone()).relative_to(&values[baseline]),
        });
    }
    Ok(measurements)
}

fn slice(generator: &Generator, place: &Place<'_>, ways: &[Way]) -> Result<Result<Sent, String>> {
    let before = generator.arrivals()?;
    let sent = place.site.host.run_in(|| {
        pin_to(SENDER_CPU)?;
        send(ways, PACKETS / 8)?;
        send(ways, PACKETS)
    })?;
    let packets = sent.packets + u64::from(PACKETS / 8);
    Ok(judge(place.contestant.delivery(), packets, &before, &generator.arrivals()?).map(|()| sent))
}

fn send(ways: &[Way], packets: u32) -> Result<Sent> {
    let start = Instant::now();
    for (socket, destination) in ways.iter().cycle().take(packets as usize) {
        socket.send_to(&PAYLOAD, &(*destination).into()).with_context(|| format!("cannot send to {destination}"))?;
    }
    Ok(Sent { packets: packets.into(), time: start.elapsed().max(Duration::from_nanos(1)) })
}

/// A socket with the flow's source, which need not be an address of the host.
fn open(family: Family, flow: &Flow) -> Result<Way> {
    let (domain, level, option) = match family {
        Family::V4 => (Domain::IPV4, libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        Family::V6 => (Domain::IPV6, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).context("cannot open a UDP socket")?;
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, which lives until the call returns.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), 4) };
    nix::errno::Errno::result(set).context("cannot make a socket transparent")?;
    let [source, destination]: [IpAddr; 2] =
        [flow.source, flow.destination].map(|words| address_from_words(family, words));
    socket.bind(&SocketAddr::new(source, 0).into()).with_context(|| format!("cannot bind to {source}"))?;
    Ok((socket, SocketAddr::new(destination, 9)))
}
