//! A TCP transfer from a client behind the host through a tunnel, in segments as large as the devices take (GSO).
//!
//! The sender's CPU does the host's work, too; the far end of the tunnel, a second tun device in a namespace of its own, is
//! on the other one with the thread that carries packets between the two.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use fastrand::Rng;
use socket2::{Domain, Socket, Type};
use tunroute_tests::{
    Netns, TunOptions,
    tun::{self, Shuttle},
};

use super::{Arena, Bench, Place, SENDER_CPU, latency};
use crate::{
    contestant::{BASELINE, Delivery},
    generator::pin_to,
    prefixes::Prefixes,
    record::{Case, Measurement, Outcome, Unit},
    rounds::interleave,
    site::MTU,
};

/// Bytes in a slice.
const BYTES: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(5);
/// The device at the far end.
const FAR: &str = "far0";

/// A connection through the first tunnel.
struct Connection {
    sender: TcpStream,
    receiver: TcpStream,
    _shuttle: Shuttle,
    _far: Netns,
}

/// Measures the transfer of all contestants that let packets of the first prefix through the first tunnel.
///
/// # Errors
/// The clients cannot be set up.
pub fn measure(bench: &mut Bench, arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
    let prefixes = Prefixes { family: case.family(), count: case.prefixes };
    let unit = Unit::SecondsPerGigabyte;
    let client = prefixes.random_source(0, &mut Rng::with_seed(5));
    let (mut places, mut connections, mut lost) = (Vec::new(), Vec::new(), Vec::new());
    for place in &arena.places {
        if place.contestant.delivery() == Delivery::Policy || place.contestant.routes_by_kernel() {
            let connection = connect(place, client);
            lost.push(connection.as_ref().err().map(|error| format!("{error:#}")));
            places.push(place);
            connections.push(connection.ok());
        }
    }
    let values = interleave(places.len(), bench.effort.rounds / 2, &mut bench.rng, |who| {
        let Some(connection) = &connections[who] else { return Ok(None) };
        match transfer(connection) {
            Ok(time) => Ok(Some(time.as_secs_f64() / (BYTES as f64 / 1e9))),
            Err(error) => {
                lost[who] = Some(format!("{error:#}"));
                Ok(None)
            }
        }
    })?;
    let baseline = places.iter().position(|place| place.contestant.name() == BASELINE);
    let baseline = baseline.context("the baseline must take part")?;
    let mut measurements = arena.not_there(case, unit);
    for (who, place) in places.iter().enumerate() {
        let name = place.contestant.name();
        measurements.push(match lost[who].take() {
            Some(why) => Measurement::none(case, name, unit, Outcome::Disqualified(why)),
            None => Measurement::of(case, name, "", unit, values[who].clone()).relative_to(&values[baseline]),
        });
    }
    Ok(measurements)
}

fn connect(place: &Place<'_>, client: IpAddr) -> Result<Connection> {
    let server = latency::reach(place, client)?;
    let far = place.site.netns("far")?;
    let near = place.site.tunnel(0)?.try_clone().context("cannot share a tun device")?;
    let end = tun::open(&far, FAR, TunOptions { mtu: MTU, vnet_hdr: true })?;
    let (version, nodad) = if client.is_ipv6() { ("-6", "nodad") } else { ("-4", "") };
    far.ip(&format!(
        "link set {FAR} mtu {MTU} txqueuelen 10000 up
         addr add {server} dev {FAR} {nodad}
         {version} route add default dev {FAR}"
    ))?;
    let shuttle = Shuttle::start([near, end])?;
    let listener =
        far.run_in(|| TcpListener::bind((server, 0)).with_context(|| format!("cannot listen on {server}")))?;
    let target = listener.local_addr().context("a listener without an address")?;
    let sender = place.site.neighbours.run_in(|| {
        let socket =
            Socket::new(Domain::for_address(target), Type::STREAM, None).context("cannot open a TCP socket")?;
        socket.bind(&SocketAddr::new(client, 0).into()).with_context(|| format!("cannot bind to {client}"))?;
        socket.connect_timeout(&target.into(), PATIENCE).with_context(|| format!("cannot connect to {target}"))?;
        Ok(TcpStream::from(socket))
    })?;
    let (receiver, _) = listener.accept().context("nobody connects")?;
    sender.set_write_timeout(Some(PATIENCE)).context("cannot set a timeout")?;
    receiver.set_read_timeout(Some(PATIENCE)).context("cannot set a timeout")?;
    Ok(Connection { sender, receiver, _shuttle: shuttle, _far: far })
}

fn transfer(connection: &Connection) -> Result<Duration> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            pin_to(SENDER_CPU)?;
            let buffer = vec![0; 1 << 18];
            for _ in 0..BYTES / buffer.len() {
                (&connection.sender).write_all(&buffer).context("cannot send")?;
            }
            anyhow::Ok(())
        });
        let (mut left, mut buffer) = (BYTES, vec![0; 1 << 18]);
        let received = loop {
            match (&connection.receiver).read(&mut buffer) {
                Ok(0) => break Err(anyhow::anyhow!("the connection ended with {left} bytes to come")),
                Ok(length) if length >= left => break Ok(start.elapsed()),
                Ok(length) => left -= length,
                Err(error) => break Err(error).with_context(|| format!("stalled with {left} bytes to come")),
            }
        };
        sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        received
    })
}
