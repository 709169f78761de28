//! A netlink socket: requests out, replies in.
//!
//! The kernel answers a netlink request within `sendmsg()` and fills a dump within `recvmsg()`
//! (`netlink_unicast_kernel()` and `netlink_dump()` in `net/netlink/af_netlink.c`), so a blocking socket never waits for
//! anything but the kernel's own locks. That is why there is no task and no queue here: a dump of a million routes takes
//! one buffer, and an answer that does not arrive has been lost.

use std::{io, os::fd::AsFd, time::Duration};

use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
        NLMSG_NOOP, NLMSG_OVERRUN, NetlinkBuffer, NlaBuffer, NlasIterator, parse_i32, parse_string,
    },
    sys,
};

/// A dump arrives in datagrams of up to 32 KiB, a single message is never longer than 64 KiB.
const DATAGRAM: usize = 64 << 10;
/// The receive buffer: acknowledgements of a batch, and notifications while the daemon is busy.
const RECEIVE_BUFFER: usize = 8 << 20;
/// The kernel has answered long before; see the module's description.
const PATIENCE: Duration = Duration::from_secs(10);
/// The length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG` in `include/uapi/linux/netlink.h`.
const EXT_ACK_MESSAGE: u16 = 1;

/// A request: message type, flags beside `NLM_F_REQUEST`, and what follows the netlink header.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) payload: Vec<u8>,
}

impl Request {
    /// Appends the message, padded, to a datagram.
    fn emit(&self, flags: u16, sequence: u32, datagram: &mut Vec<u8>) -> io::Result<()> {
        let length = u32::try_from(HEADER + self.payload.len()).map_err(io::Error::other)?;
        datagram.extend(length.to_ne_bytes());
        datagram.extend(self.kind.to_ne_bytes());
        datagram.extend((self.flags | flags | NLM_F_REQUEST).to_ne_bytes());
        datagram.extend(sequence.to_ne_bytes());
        datagram.extend(0_u32.to_ne_bytes());
        datagram.extend(&self.payload);
        datagram.resize(datagram.len().next_multiple_of(4), 0);
        Ok(())
    }
}

/// A message as received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// Notifications: the port of the socket whose request caused it; 0 for the kernel itself.
    pub(crate) port: u32,
    /// What follows the netlink header.
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram; ends at the first that does not fit.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = NetlinkBuffer::new_checked(datagram).ok()?;
        let length = usize::try_from(header.length()).ok()?;
        let payload = datagram.get(HEADER..length)?;
        let message = Message {
            kind: header.message_type(),
            flags: header.flags(),
            sequence: header.sequence_number(),
            port: header.port_number(),
            payload,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes that follow a family's header of `skip` bytes; ends at the first that does not fit.
pub(crate) fn attributes(payload: &[u8], skip: usize) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(payload.get(skip..).unwrap_or_default()).map_while(Result::ok)
}

/// An attribute's value, borrowed from the datagram.
pub(crate) fn value<'a>(attribute: &NlaBuffer<&'a [u8]>) -> &'a [u8] {
    attribute.into_inner().get(4..usize::from(attribute.length())).unwrap_or_default()
}

/// A value of 4 bytes in host byte order.
pub(crate) fn u32_of(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

/// A string, with or without its terminating zero.
pub(crate) fn string_of(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(value.get(..end).unwrap_or_default()).into_owned()
}

/// Appends an attribute with its padding.
pub(crate) fn push_attribute(payload: &mut Vec<u8>, kind: u16, value: &[u8]) -> io::Result<()> {
    let length = u16::try_from(4 + value.len()).map_err(io::Error::other)?;
    payload.extend(length.to_ne_bytes());
    payload.extend(kind.to_ne_bytes());
    payload.extend(value);
    payload.resize(payload.len().next_multiple_of(4), 0);
    Ok(())
}

/// What the kernel said to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The error number, positive.
    pub(crate) errno: i32,
    /// The kernel's explanation (extended acknowledgement), where it gives one.
    pub(crate) message: Option<String>,
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        Self::from_raw_os_error(refusal.errno)
    }
}

/// Whether a dump saw one consistent state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dump {
    /// All of it is from one moment.
    Complete,
    /// The list changed under way (`NLM_F_DUMP_INTR`): something may be missing or there twice.
    Interrupted,
}

/// A netlink socket that speaks to the kernel.
#[derive(Debug)]
pub(crate) struct Socket {
    inner: sys::Socket,
    /// The number by which others see this socket's requests in notifications.
    port: u32,
    sequence: u32,
    /// A dump whose reader gave up before its end: it has to be drained before the next request.
    unfinished: Option<u32>,
    datagram: Vec<u8>,
}

/// Opens a socket with a receive buffer that survives a storm, joined to multicast groups.
pub(crate) fn open(protocol: isize, groups: &[u32]) -> io::Result<(sys::Socket, u32)> {
    let mut socket = sys::Socket::new(protocol)?;
    // Without CAP_NET_ADMIN the limit of net.core.rmem_max applies: an overrun comes sooner, and is handled.
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
    }
    let address = socket.bind_auto()?;
    for &group in groups {
        socket.add_membership(group)?;
    }
    Ok((socket, address.port_number()))
}

impl Socket {
    /// Opens a socket in the network namespace of the calling thread.
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let (inner, port) = open(protocol, &[])?;
        inner.set_ext_ack(true)?;
        inner.set_cap_ack(true)?;
        // Leaves cached exceptions out of route dumps. Kernels before 4.20 do not know it.
        let _ = inner.set_netlink_get_strict_chk(true);
        let patience = TimeVal::new(PATIENCE.as_secs().try_into().unwrap_or(10), 0);
        setsockopt(&inner.as_fd(), sockopt::ReceiveTimeout, &patience)?;
        inner.connect(&sys::SocketAddr::new(0, 0))?;
        Ok(Self { inner, port, sequence: 0, unfinished: None, datagram: Vec::with_capacity(DATAGRAM) })
    }

    /// The port by which notifications name this socket.
    pub(crate) const fn port(&self) -> u32 {
        self.port
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Reads the next datagram into the buffer.
    fn receive(&mut self) -> io::Result<()> {
        loop {
            self.datagram.clear();
            match self.inner.recv(&mut self.datagram, libc::MSG_TRUNC) {
                Ok(length) if length > self.datagram.len() => {
                    return Err(io::Error::other(format!("the kernel sent a message of {length} bytes")));
                }
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel's answer got lost"));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads to the end of a dump that was given up.
    fn drain(&mut self) -> io::Result<()> {
        while let Some(sequence) = self.unfinished {
            self.receive()?;
            if messages(&self.datagram).any(|m| m.sequence == sequence && matches!(m.kind, NLMSG_DONE | NLMSG_ERROR)) {
                self.unfinished = None;
            }
        }
        Ok(())
    }

    /// Asks for a list and hands each message of the answer to `each`. Other tasks get their turn after every datagram.
    ///
    /// # Errors
    /// The kernel's refusal, or that of the socket.
    pub(crate) async fn dump(&mut self, request: &Request, mut each: impl FnMut(&Message<'_>)) -> io::Result<Dump> {
        self.drain()?;
        let sequence = self.next_sequence();
        let mut datagram = Vec::with_capacity(HEADER + request.payload.len());
        request.emit(NLM_F_DUMP, sequence, &mut datagram)?;
        self.inner.send(&datagram, 0)?;
        self.unfinished = Some(sequence);
        let mut outcome = Dump::Complete;
        loop {
            self.receive()?;
            for message in messages(&self.datagram).filter(|message| message.sequence == sequence) {
                if message.flags & NLM_F_DUMP_INTR != 0 {
                    outcome = Dump::Interrupted;
                }
                match message.kind {
                    NLMSG_NOOP | NLMSG_OVERRUN => {}
                    // The end carries an error number, too: that of a dump which broke off.
                    NLMSG_DONE | NLMSG_ERROR => {
                        self.unfinished = None;
                        return refusal(&message).map_or(Ok(outcome), |refusal| Err(refusal.into()));
                    }
                    _ => each(&message),
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Asks for one thing; returns what follows the netlink header of the answer.
    pub(crate) fn get(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        Ok(self.ask(request)??)
    }

    /// Asks for one thing, where a refusal is an answer, too.
    pub(crate) fn ask(&mut self, request: &Request) -> io::Result<Result<Vec<u8>, Refusal>> {
        self.drain()?;
        let sequence = self.next_sequence();
        let mut datagram = Vec::with_capacity(HEADER + request.payload.len());
        request.emit(0, sequence, &mut datagram)?;
        self.inner.send(&datagram, 0)?;
        loop {
            self.receive()?;
            if let Some(message) = messages(&self.datagram).find(|message| message.sequence == sequence) {
                return Ok(match refusal(&message) {
                    Some(refusal) if message.kind == NLMSG_ERROR => Err(refusal),
                    _ => Ok(message.payload.to_vec()),
                });
            }
        }
    }

    /// Sends a batch in one datagram, which the kernel works through in order whatever becomes of each, and collects
    /// the answers in the same order.
    pub(crate) fn transact(&mut self, batch: &[Request]) -> io::Result<Vec<Result<(), Refusal>>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        self.drain()?;
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::new();
        for request in batch {
            let sequence = self.next_sequence();
            request.emit(NLM_F_ACK, sequence, &mut datagram)?;
        }
        self.inner.send(&datagram, 0)?;
        let mut answers: Vec<Option<Result<(), Refusal>>> = vec![None; batch.len()];
        let mut missing = batch.len();
        while missing > 0 {
            self.receive()?;
            for message in messages(&self.datagram).filter(|message| message.kind == NLMSG_ERROR) {
                // Anything else is the answer to an earlier request that was given up.
                let index = usize::try_from(message.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                if let Some(answer @ None) = answers.get_mut(index) {
                    *answer = Some(refusal(&message).map_or(Ok(()), Err));
                    missing -= 1;
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }
}

/// What an `NLMSG_ERROR` or `NLMSG_DONE` says; none for success.
fn refusal(message: &Message<'_>) -> Option<Refusal> {
    let code = message.payload.get(..4).and_then(|code| parse_i32(code).ok()).filter(|&code| code != 0)?;
    // `struct nlmsgerr`: the code, the header of the request, the request itself unless capped, then attributes.
    let request = match message.payload.get(4..8).and_then(u32_of) {
        Some(length) if message.flags & NLM_F_CAPPED == 0 => usize::try_from(length).unwrap_or(usize::MAX),
        _ => HEADER,
    };
    let text = if message.flags & NLM_F_ACK_TLVS == 0 || message.kind == NLMSG_DONE {
        None
    } else {
        attributes(message.payload, request.saturating_add(4).next_multiple_of(4))
            .find(|attribute| attribute.kind() == EXT_ACK_MESSAGE)
            .and_then(|attribute| parse_string(value(&attribute)).ok())
    };
    Some(Refusal { errno: code.saturating_neg(), message: text })
}
