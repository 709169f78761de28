//! Measures whether a tunnel carries packets of its MTU: echo requests that must not be fragmented, to its probes' targets.

use std::{
    io,
    net::IpAddr,
    os::fd::AsRawFd as _,
    ptr,
    time::{Duration, Instant},
};

use futures::future::join_all;
use nix::errno::Errno;
use socket2::Socket;
use tokio::time::timeout;

use crate::{
    config::{Config, ProbeTarget, Tunnel},
    exits::health::{
        echo::{LENGTH, Request},
        probe::{exchange_echo, open_echo},
    },
    policy::net::{Family, KernelState, Link},
};

/// Maximum time to the first answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Number of lost packets after which a size counts as lost.
const TRIES: usize = 2;
/// `IP_PMTUDISC_DO` and `IPV6_PMTUDISC_DO` in the kernel's headers: never fragment.
const WHOLE: libc::c_int = 2;

/// A tunnel that loses large packets silently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Narrow {
    /// Its name.
    pub tunnel: String,
    /// Its MTU, in bytes: packets of this size are not answered, and no ICMP error says why.
    pub mtu: u32,
    /// The size of the largest packet that was answered, in bytes.
    pub carries: u32,
    /// The target.
    pub target: IpAddr,
}

/// Measures all tunnels that are up and have an echo probe.
pub(super) async fn narrow(config: &Config, kernel: &KernelState) -> Vec<Narrow> {
    let targets = |tunnel: &Tunnel| {
        let echo = tunnel.probes.iter().filter_map(|probe| match probe.target {
            ProbeTarget::Echo(target) => Some((target, probe.source)),
            ProbeTarget::Tcp(_) => None,
        });
        echo.collect::<Vec<_>>()
    };
    let up =
        config.tunnels.iter().filter_map(|tunnel| Some((tunnel, kernel.link(&tunnel.name).filter(|link| link.up)?)));
    let paths = up.flat_map(|(tunnel, link)| {
        targets(tunnel).into_iter().map(move |(target, source)| Path { link, target, source })
    });
    join_all(paths.map(Path::look)).await.into_iter().flatten().collect()
}

/// The path by a device to a target.
struct Path<'a> {
    link: &'a Link,
    target: IpAddr,
    source: Option<IpAddr>,
}

impl Path<'_> {
    async fn look(self) -> Option<Narrow> {
        let smallest = u32::try_from(self.header() + LENGTH).ok()?;
        let begun = Instant::now();
        // No answer at all is not a matter of size; missing permission is reported elsewhere.
        if !matches!(self.ask(smallest, PATIENCE).await, Ok(true)) {
            return None;
        }
        let patience = (begun.elapsed() * 4 + Duration::from_millis(200)).min(PATIENCE);
        let (mut passes, mut vanishes) = (smallest, self.link.mtu);
        if vanishes <= passes || self.passes(vanishes, patience).await {
            return None;
        }
        while passes + 1 < vanishes {
            let middle = passes.midpoint(vanishes);
            if self.passes(middle, patience).await {
                passes = middle;
            } else {
                vanishes = middle;
            }
        }
        // The tunnel may have gone down meanwhile.
        if !matches!(self.ask(smallest, patience).await, Ok(true)) {
            return None;
        }
        let Self { link, target, .. } = self;
        Some(Narrow { tunnel: link.name.clone(), mtu: link.mtu, carries: passes, target })
    }

    /// Length of the IP header, in bytes.
    fn header(&self) -> usize {
        match Family::of_addr(&self.target) {
            Family::V4 => 20,
            Family::V6 => 40,
        }
    }

    /// Returns true if a packet of this size is answered, or an ICMP error says that it is too big.
    async fn passes(&self, size: u32, patience: Duration) -> bool {
        for _ in 0..TRIES {
            match self.ask(size, patience).await {
                Ok(true) => return true,
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => return true,
                // A device may report that it has dropped a packet: `ENOBUFS`.
                Ok(false) | Err(_) => {}
            }
        }
        false
    }

    async fn ask(&self, size: u32, patience: Duration) -> io::Result<bool> {
        let family = Family::of_addr(&self.target);
        let socket = open_echo(&self.link.name, self.link.index, self.target, self.source)
            .map_err(|_| io::Error::from(io::ErrorKind::NetworkUnreachable))?;
        keep_whole(&socket, family)?;
        let padding = usize::try_from(size).unwrap_or(0).saturating_sub(self.header() + LENGTH);
        let request = Request::new(family, 0, fastrand::u64(..)).padded(padding);
        match timeout(patience, exchange_echo(socket, self.target, request)).await {
            Ok(answered) => answered.map(|()| true),
            Err(_) => Ok(false),
        }
    }
}

/// Forbids fragmentation of the socket's packets.
fn keep_whole(socket: &Socket, family: Family) -> io::Result<()> {
    let (level, option) = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    let length = libc::socklen_t::try_from(size_of_val(&WHOLE)).map_err(io::Error::other)?;
    // SAFETY: the option is an integer of that length, which is only read during the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, ptr::from_ref(&WHOLE).cast(), length) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}
