//! Notifications, folded into which kinds of state have changed.

use std::{fmt, io};

use rtnetlink::{
    MulticastGroup,
    packet_core::NLMSG_OVERRUN,
    sys::{self, protocols::NETLINK_ROUTE},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    KernelError, Kinds, route, rule,
    socket::{self, Message, messages},
};
use crate::policy::net::{Family, IfIndex};

/// What is listened to.
const GROUPS: [MulticastGroup; 10] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    // A device's IPv6 settings; the message is that of a link.
    MulticastGroup::Ipv6Ifinfo,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Ipv4Netconf,
    MulticastGroup::Ipv6Netconf,
];
/// Maximum number of removals listed by name; further ones are counted.
const REMOVED: usize = 16;
/// After this many notifications the reader gets its turn, even in a storm.
const DATAGRAMS: usize = 4096;
/// `RTM_DELNETCONF` in `include/uapi/linux/rtnetlink.h`.
const RTM_DELNETCONF: u16 = 81;

/// A rule or route with tunroute's protocol number that another process removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// `rule` or `route`.
    pub object: &'static str,
    /// Its family.
    pub family: Family,
    /// The rule or route, in `ip` syntax.
    pub text: String,
    /// The netlink port of the process that did it: usually, but not necessarily, its process id.
    pub port: u32,
}

impl fmt::Display for Removed {
    /// The `ip` command that does the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { object, family, text, .. } = self;
        let ip = match family {
            Family::V4 => "ip",
            Family::V6 => "ip -6",
        };
        write!(f, "{ip} {object} del {text}")
    }
}

/// What has changed since the last one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The kinds of state that have to be observed anew.
    pub kinds: Kinds,
    /// Notifications were lost: all kinds are in `kinds`.
    pub overrun: bool,
    /// What others removed of tunroute's own; the first few of them.
    pub removed: Vec<Removed>,
    /// How many more were removed.
    pub removed_more: usize,
}

/// The kernel's notifications, as they wait in the socket's receive buffer: memory stays bounded however much happens.
#[derive(Debug)]
pub struct Events {
    socket: AsyncFd<sys::Socket>,
    /// The port of tunroute's own requests.
    own_port: u32,
    datagram: Vec<u8>,
}

impl Events {
    pub(super) fn subscribe(own_port: u32) -> io::Result<Self> {
        let (socket, _) = socket::open(NETLINK_ROUTE, &GROUPS.map(|group| group as u32))?;
        socket.set_non_blocking(true)?;
        // SAFETY: the socket owns its descriptor and keeps it until it is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self { socket, own_port, datagram: Vec::with_capacity(64 << 10) })
    }

    /// Waits until something has changed and returns all that has. May be dropped at any point without losing anything.
    ///
    /// Changes that this process made are reported like those of others, except that they are not in `removed`.
    ///
    /// # Errors
    /// The socket failed for good: connect anew.
    pub async fn next(&mut self) -> Result<Change, KernelError> {
        let mut change = Change::default();
        while change.kinds.is_empty() {
            let mut guard = self.socket.readable().await.map_err(KernelError::Socket)?;
            for _ in 0..DATAGRAMS {
                self.datagram.clear();
                match guard.try_io(|socket| socket.get_ref().recv(&mut self.datagram, libc::MSG_TRUNC)) {
                    Ok(Ok(length)) if length > self.datagram.len() => change.lost(),
                    Ok(Ok(_)) => {
                        for message in messages(&self.datagram) {
                            change.fold(&message, self.own_port);
                        }
                    }
                    Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => change.lost(),
                    Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(Err(error)) => return Err(KernelError::Socket(error)),
                    Err(_would_block) => break,
                }
            }
        }
        Ok(change)
    }
}

impl Change {
    fn lost(&mut self) {
        self.kinds = Kinds::ALL;
        self.overrun = true;
    }

    fn fold(&mut self, message: &Message<'_>, own_port: u32) {
        self.kinds |= match message.kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => Kinds::LINKS,
            libc::RTM_NEWADDR | libc::RTM_DELADDR => Kinds::ADDRESSES,
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => Kinds::ROUTES,
            libc::RTM_NEWRULE | libc::RTM_DELRULE => Kinds::RULES,
            libc::RTM_NEWNETCONF | RTM_DELNETCONF => Kinds::NETCONF,
            NLMSG_OVERRUN => return self.lost(),
            _ => Kinds::NONE,
        };
        // Port 0 is the kernel itself, which removes the routes of a device that goes away.
        if message.port == 0 || message.port == own_port {
            return;
        }
        let (object, family, text) = match message.kind {
            libc::RTM_DELRULE => match rule::parse_ours(message.payload) {
                Some(rule) => ("rule", rule.family, rule.text()),
                None => return,
            },
            libc::RTM_DELROUTE => match route::Seen::parse(message.payload).filter(|seen| seen.ours) {
                Some(seen) => ("route", seen.family, seen.text(&device_name)),
                None => return,
            },
            _ => return,
        };
        if self.removed.len() < REMOVED {
            self.removed.push(Removed { object, family, text, port: message.port });
        } else {
            self.removed_more += 1;
        }
    }
}

/// The name that the device has now.
fn device_name(index: IfIndex) -> String {
    nix::net::if_::if_indextoname(index)
        .map_or_else(|_| format!("if{index}"), |name| name.to_string_lossy().into_owned())
}
