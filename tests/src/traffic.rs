//! Traffic that end hosts make: echo requests and a TCP transfer.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, sendto, setsockopt, socket,
        sockopt::{BindToDevice, ReceiveTimeout, SendTimeout},
    },
    time::TimeVal,
};

use crate::{
    netns::Netns,
    pace::{SOON, patience, until},
};

/// How long is waited for an answer that is not to come.
const BRIEFLY: Duration = Duration::from_millis(500);

/// What became of an echo request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// An echo reply.
    Reply,
    /// Nothing. `ping` does not tell it from its own kernel's refusal to send.
    Silence,
    /// An ICMP error; what `ping` said of it.
    Refused(String),
}

/// Sends one echo request with `ping`, from an address of the namespace, and waits for the answer, which is to come.
///
/// # Errors
/// `ping` cannot be started, or the namespace has no such source address.
pub fn ping(netns: &Netns, src: IpAddr, dst: IpAddr) -> Result<Answer> {
    echo(netns, src, dst, SOON)
}

/// The same where no answer is expected: it waits half a second.
///
/// # Errors
/// As [`ping`].
pub fn ping_briefly(netns: &Netns, src: IpAddr, dst: IpAddr) -> Result<Answer> {
    echo(netns, src, dst, BRIEFLY)
}

/// Sends echo requests until one is answered: from then on the neighbours on the way know each other, and no packet is lost
/// for want of that.
///
/// # Errors
/// None is.
pub fn reach(netns: &Netns, src: IpAddr, dst: IpAddr) -> Result<()> {
    until(&format!("{src} reaches {dst}"), || Ok(ping_briefly(netns, src, dst)? == Answer::Reply))
}

fn echo(netns: &Netns, src: IpAddr, dst: IpAddr, wait: Duration) -> Result<Answer> {
    let wait = patience(wait).as_secs_f64().to_string();
    let output = netns
        .command("ping")
        .args(["-n", "-c", "1", "-W", &wait, "-I", &src.to_string(), &dst.to_string()])
        .stdin(Stdio::null())
        .output()
        .context("cannot start ping: install iputils-ping")?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    Ok(match output.status.code() {
        Some(0) => Answer::Reply,
        // "0 received, +1 errors" tells of an ICMP error.
        Some(1) if text.contains("errors,") => Answer::Refused(text.into_owned()),
        Some(1) => Answer::Silence,
        _ => bail!("ping from {src} in {}: {text}", netns.label()),
    })
}

/// A UDP socket that sends as a program on a host does, with checksums that the kernel computes in full.
#[derive(Debug)]
pub struct Sender {
    socket: UdpSocket,
}

impl Sender {
    /// Opens one with a source address and any port, bound to a device if one is given (`SO_BINDTODEVICE`).
    ///
    /// # Errors
    /// The namespace has no such address or device.
    pub fn open(netns: &Netns, src: IpAddr, device: Option<&str>) -> Result<Self> {
        let socket = netns.run_in(|| {
            let socket = UdpSocket::bind((src, 0)).with_context(|| format!("cannot bind {src}"))?;
            if let Some(device) = device {
                setsockopt(&socket, BindToDevice, &device.into()).context("cannot bind to a device")?;
            }
            Ok(socket)
        })?;
        Ok(Self { socket })
    }

    /// Sets "don't fragment" as path MTU discovery does (`IP_PMTUDISC_DO`).
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn dont_fragment(&self) -> Result<()> {
        let v4 = self.socket.local_addr()?.is_ipv4();
        let (level, option, value) = if v4 {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
        } else {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
        };
        let length = libc::socklen_t::try_from(size_of_val(&value))?;
        // SAFETY: both options take an int, which lives until the call returns.
        let set =
            unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
        nix::errno::Errno::result(set).context("cannot set the path MTU discovery")?;
        Ok(())
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// What the kernel says: no route, too long, …
    pub fn send(&self, dst: SocketAddr, payload: &[u8]) -> io::Result<()> {
        let dst = SockaddrStorage::from(dst);
        // In two parts: then the kernel does not leave the checksum to the device (`__ip_append_data()` in
        // `net/ipv4/ip_output.c`).
        let fd = self.socket.as_raw_fd();
        sendto(fd, payload, &dst, MsgFlags::from_bits_retain(libc::MSG_MORE))?;
        sendto(fd, &[], &dst, MsgFlags::empty())?;
        Ok(())
    }

    /// The port that it sends from.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn port(&self) -> Result<u16> {
        Ok(self.socket.local_addr()?.port())
    }
}

/// Sends `bytes` over one TCP connection from an address of one namespace to an address of another, and checks that
/// they arrive as they were sent. Returns how long it took.
///
/// # Errors
/// The connection cannot be made or stalls for longer than `timeout`; or other bytes arrive.
pub fn bulk(from: (&Netns, IpAddr), to: (&Netns, IpAddr), bytes: usize, timeout: Duration) -> Result<Duration> {
    let timeout = patience(timeout);
    let listener =
        to.0.run_in(|| TcpListener::bind((to.1, 0)).with_context(|| format!("cannot listen on {}", to.1)))?;
    setsockopt(&listener, ReceiveTimeout, &timeval(timeout)).context("cannot set a timeout")?;
    let target = listener.local_addr().context("a listener without an address")?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(&listener, bytes, timeout));
        let sent =
            from.0.run_in(|| send(from.1, target, bytes, timeout)).with_context(|| format!("{} > {target}", from.1));
        let received = receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        sent.and(received)
    })?;
    Ok(started.elapsed())
}

fn timeval(duration: Duration) -> TimeVal {
    TimeVal::new(duration.as_secs().cast_signed(), duration.subsec_micros().into())
}

/// The byte at a position of the stream: no two places within 16 MiB look alike for long.
fn pattern(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|at| (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0]).collect()
}

fn send(src: IpAddr, target: SocketAddr, bytes: usize, timeout: Duration) -> Result<()> {
    let family = if src.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd: OwnedFd =
        socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("cannot open a TCP socket")?;
    setsockopt(&fd, SendTimeout, &timeval(timeout)).context("cannot set a timeout")?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(src, 0))).context("cannot bind")?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(target)).context("cannot connect")?;
    let mut stream = TcpStream::from(fd);
    for start in (0..bytes).step_by(1 << 18) {
        stream.write_all(&pattern(start..bytes.min(start + (1 << 18)))).context("cannot send")?;
    }
    // Only when the other end has closed, too, is nothing more on its way. What went wrong there, the receiver says.
    stream.set_read_timeout(Some(timeout)).context("cannot set a timeout")?;
    let _ = stream.shutdown(Shutdown::Write).and_then(|()| stream.read(&mut [0]));
    Ok(())
}

fn receive(listener: &TcpListener, bytes: usize, timeout: Duration) -> Result<()> {
    let (mut stream, _) = listener.accept().context("nobody connects")?;
    stream.set_read_timeout(Some(timeout)).context("cannot set a timeout")?;
    let mut buffer = vec![0; 1 << 18];
    let mut count = 0;
    loop {
        let length = match stream.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other.with_context(|| format!("stalled after {count} of {bytes} bytes"))?,
        };
        if length == 0 {
            break;
        }
        ensure!(buffer.starts_with(&pattern(count..count + length)), "other bytes than sent, after {count}");
        count += length;
    }
    ensure!(count == bytes, "{count} of {bytes} bytes arrived");
    Ok(())
}
