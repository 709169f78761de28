//! One probe: an echo request or a TCP connection out of the tunnel's device, and what comes back.
//!
//! Each probe opens a socket of its own, bound to the device, so that a device that was recreated under the same name is
//! met as it is now. The kernel still wants a route by that device to the target: see `health`.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    io,
    net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket as StdUdpSocket},
    os::fd::OwnedFd,
};

use nix::{errno::Errno, net::if_::if_nametoindex};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpSocket, UdpSocket},
    time::{Instant, timeout},
};

use super::{echo::Request, verdict::Outcome};
use crate::{
    config::{Probe, ProbeTarget},
    policy::net::Family,
};

/// Sends one probe by a device and waits for the answer.
///
/// A TCP connection that is refused is an answer, too: it is the tunnel that is asked for, not the service, and the
/// refusal came back through it.
pub async fn send(device: &str, probe: &Probe, sequence: u16, secret: &RandomState) -> Outcome {
    let Ok(index) = if_nametoindex(device) else { return Outcome::NoDevice };
    let begun = Instant::now();
    let asked = async {
        match probe.target {
            ProbeTarget::Echo(target) => ask_echo(device, index, target, probe.source, sequence, secret).await,
            ProbeTarget::Tcp(target) => ask_tcp(device, index, target, probe.source).await,
        }
    };
    match timeout(probe.timeout, asked).await {
        Ok(Ok(())) => Outcome::Answer(begun.elapsed()),
        Ok(Err(outcome)) => outcome,
        Err(_) => Outcome::Lost(format!("no answer within {}", humantime::format_duration(probe.timeout))),
    }
}

/// A failure that the tunnel has to answer for.
fn lost(what: &str) -> impl Fn(io::Error) -> Outcome + '_ {
    move |error| Outcome::Lost(format!("{what}: {error}"))
}

/// A failure to get a socket, or to bind it to the device: the daemon's own, unless the device has just gone.
fn unable(what: &str) -> impl Fn(io::Error) -> Outcome + '_ {
    move |error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENODEV) => Outcome::NoDevice,
        _ => Outcome::Unable(format!("{what}: {error}")),
    }
}

/// An address with the device as its scope, where it needs one.
fn scoped(address: SocketAddr, index: u32) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => {
            SocketAddrV6::new(*v6.ip(), v6.port(), 0, index).into()
        }
        other => other,
    }
}

async fn ask_tcp(device: &str, index: u32, target: SocketAddr, source: Option<IpAddr>) -> Result<(), Outcome> {
    let socket = if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.map_err(unable("socket"))?;
    socket.bind_device(Some(device.as_bytes())).map_err(unable("SO_BINDTODEVICE"))?;
    if let Some(source) = source {
        socket.bind(scoped(SocketAddr::new(source, 0), index)).map_err(lost("source address"))?;
    }
    match socket.connect(scoped(target, index)).await {
        Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => Err(lost("connect")(error)),
        Ok(_) | Err(_) => Ok(()),
    }
}

async fn ask_echo(
    device: &str,
    index: u32,
    target: IpAddr,
    source: Option<IpAddr>,
    sequence: u16,
    secret: &RandomState,
) -> Result<(), Outcome> {
    let socket = open_echo(device, index, target, source)?;
    // Without having seen the request, the cookie cannot be guessed.
    let request = Request::new(Family::of_addr(&target), sequence, secret.hash_one((target, sequence)));
    exchange_echo(socket, target, request).await.map_err(lost("echo"))
}

/// A socket for echo messages to a target by a device.
pub(crate) fn open_echo(device: &str, index: u32, target: IpAddr, source: Option<IpAddr>) -> Result<Socket, Outcome> {
    let (domain, protocol) = match Family::of_addr(&target) {
        Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
        Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
    };
    // Not SOCK_DGRAM, which net.ipv4.ping_group_range may forbid even to root.
    let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(protocol)).map_err(unable("raw socket"))?;
    socket.bind_device(Some(device.as_bytes())).map_err(unable("SO_BINDTODEVICE"))?;
    if let Some(source) = source {
        socket.bind(&scoped(SocketAddr::new(source, 0), index).into()).map_err(lost("source address"))?;
    }
    // Connected, a raw socket gets the target's packets only.
    socket.connect(&scoped(SocketAddr::new(target, 0), index).into()).map_err(lost("no way by this device"))?;
    Ok(socket)
}

/// Sends a request and waits for its answer, for however long.
pub(crate) async fn exchange_echo(socket: Socket, target: IpAddr, request: Request) -> io::Result<()> {
    // tokio's type for sockets that send and receive whole packets; nothing in it is particular to UDP.
    let socket = UdpSocket::from_std(StdUdpSocket::from(OwnedFd::from(socket)))?;
    socket.send(&request.to_bytes()).await?;
    // Room for the answer behind the longest IPv4 header; a longer packet is somebody else's, and cut.
    let mut buffer = vec![0; 60 + request.length() + 1];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await?;
        if from.ip() == target && request.is_answered_by(buffer.get(..length).unwrap_or_default()) {
            return Ok(());
        }
    }
}
