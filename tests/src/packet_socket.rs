//! `AF_PACKET` sockets: what [`crate::Capture`], [`crate::Flow`] and [`crate::Injector`] see and send frames with.

use std::{
    ffi::CStr,
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::netns::Netns;

/// Frames asked for in one `recvmmsg`.
const BATCH: usize = 32;
/// Room for frames not yet read, in bytes as the kernel counts them: some 400,000 small ones.
const RECEIVE_BUFFER: libc::c_int = 256 << 20;
/// Room for a timestamp and a `tpacket_auxdata` with their headers, aligned as a `cmsghdr` must be.
type Control = [u64; 16];

/// What the kernel says of a frame beside its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meta {
    pub ifindex: u32,
    /// `ARPHRD_…` of the device.
    pub hatype: u16,
    /// `PACKET_HOST`, `PACKET_OUTGOING`, …
    pub pkttype: u8,
    pub at: SystemTime,
    /// `TP_STATUS_…`
    pub status: u32,
    /// The VLAN tag that stands beside the frame.
    pub vlan_tci: Option<u16>,
}

/// A raw packet socket on one device, or on all of a namespace.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    fd: OwnedFd,
    snaplen: usize,
    buffer: Vec<u8>,
    drops: u64,
}

impl PacketSocket {
    /// Opens one that only sends.
    pub fn sender(netns: &Netns) -> Result<Self> {
        let fd = netns.run_in(|| {
            // SAFETY: no pointers are passed.
            let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
            Errno::result(fd).context("cannot open a packet socket")?;
            // SAFETY: the descriptor was just made and has no other owner.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        })?;
        Ok(Self { fd, snaplen: 0, buffer: Vec::new(), drops: 0 })
    }

    /// Opens one that receives what a device (or every device) takes in or sends out, `snaplen` bytes of each frame.
    pub fn receiver(netns: &Netns, device: Option<&str>, snaplen: usize) -> Result<Self> {
        let mut socket = Self::sender(netns)?;
        socket.snaplen = snaplen;
        socket.buffer = vec![0; BATCH * snaplen];
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER)?;
        socket.set(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)?;
        socket.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
        let ifindex = device.map_or(Ok(0), |device| netns.ifindex(device))?;
        // Nothing is received before this: the socket was opened for protocol 0.
        let address = address(ifindex, libc::ETH_P_ALL)?;
        // SAFETY: `address` is a sockaddr_ll of the length given.
        let bound = unsafe { libc::bind(socket.fd.as_raw_fd(), (&raw const address).cast(), socklen(&address)) };
        Errno::result(bound).with_context(|| format!("cannot bind a packet socket to {}", device.unwrap_or("all")))?;
        Ok(socket)
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Result<()> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: all options used here take an int, which lives until the call returns.
        let set = unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), socklen(&value)) };
        Errno::result(set).with_context(|| format!("cannot set option {level}/{option} of a packet socket"))?;
        Ok(())
    }

    /// Hands over all frames that wait, without waiting for more.
    pub fn receive(&mut self, mut each: impl FnMut(Meta, &[u8])) -> Result<()> {
        loop {
            match self.receive_batch(&mut each) {
                Ok(BATCH) => {}
                Ok(_) | Err(Errno::EAGAIN) => return Ok(()),
                // The device went down or away, which is reported once; it may come up again.
                Err(Errno::ENETDOWN | Errno::EINTR) => {}
                Err(error) => return Err(error).context("cannot receive from a packet socket"),
            }
        }
    }

    fn receive_batch(&mut self, each: &mut impl FnMut(Meta, &[u8])) -> nix::Result<usize> {
        let mut controls: [Control; BATCH] = [Control::default(); BATCH];
        // SAFETY: these are plain data for which all zeroes is a valid value.
        let mut addresses: [libc::sockaddr_ll; BATCH] = unsafe { mem::zeroed() };
        // SAFETY: as above.
        let mut parts: [libc::iovec; BATCH] = unsafe { mem::zeroed() };
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let slots =
            parts.iter_mut().zip(&mut addresses).zip(&mut controls).zip(self.buffer.chunks_exact_mut(self.snaplen));
        for (message, (((part, address), control), room)) in messages.iter_mut().zip(slots) {
            *part = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
            let header = &mut message.msg_hdr;
            header.msg_name = ptr::from_mut(address).cast();
            header.msg_namelen = socklen(address);
            header.msg_iov = part;
            header.msg_iovlen = 1;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = size_of_val(control);
        }
        let count = u32::try_from(BATCH).unwrap_or(1);
        // SAFETY: every header points to buffers of the stated lengths, which live until the end of this function.
        let received = unsafe {
            libc::recvmmsg(self.fd.as_raw_fd(), messages.as_mut_ptr(), count, libc::MSG_DONTWAIT, ptr::null_mut())
        };
        let received = usize::try_from(Errno::result(received)?).unwrap_or(0);
        let frames = messages.iter().zip(&addresses).zip(self.buffer.chunks_exact(self.snaplen));
        for ((message, address), room) in frames.take(received) {
            let bytes = room.get(..message.msg_len as usize).unwrap_or(room);
            each(meta(&message.msg_hdr, address), bytes);
        }
        Ok(received)
    }

    /// Waits until a frame is there or the time is over.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the last wait does not become a busy loop.
            let millis = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(millis)) {
                Err(Errno::EINTR) => {}
                result => return result.map(drop).context("cannot poll a packet socket"),
            }
        }
    }

    /// How many frames came when there was no room for them, since the socket was opened.
    pub fn drops(&mut self) -> Result<u64> {
        let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = socklen(&stats);
        let fd = self.fd.as_raw_fd();
        let to = (&raw mut stats).cast();
        // SAFETY: PACKET_STATISTICS writes a tpacket_stats, of which there is one.
        let got = unsafe { libc::getsockopt(fd, libc::SOL_PACKET, libc::PACKET_STATISTICS, to, &raw mut length) };
        Errno::result(got).context("cannot read the statistics of a packet socket")?;
        // Reading sets the kernel's count to 0.
        self.drops += u64::from(stats.tp_drops);
        Ok(self.drops)
    }

    /// The present name of a device in the socket's namespace.
    pub fn device_name(&self, ifindex: u32) -> Option<String> {
        // SAFETY: an ifreq is plain data for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        request.ifr_ifru.ifru_ifindex = i32::try_from(ifindex).ok()?;
        // SAFETY: SIOCGIFNAME takes a pointer to an ifreq, which lives until the call returns.
        let got = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::SIOCGIFNAME, &raw mut request) };
        Errno::result(got).ok()?;
        let name = request.ifr_name.map(i8::cast_unsigned);
        CStr::from_bytes_until_nul(&name).ok()?.to_str().ok().map(str::to_owned)
    }

    /// Sends a frame as it is out of a device; `protocol` is its EtherType.
    pub fn send(&self, ifindex: u32, protocol: u16, frame: &[u8]) -> Result<()> {
        let address = address(ifindex, protocol.into())?;
        let to = (&raw const address).cast();
        // SAFETY: `frame` and `address` are of the lengths given and live until the call returns.
        let sent =
            unsafe { libc::sendto(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, to, socklen(&address)) };
        if sent < 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("cannot send a frame of {} bytes", frame.len()));
        }
        Ok(())
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn socklen<T>(value: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of_val(value)).unwrap_or_default()
}

/// A device and a protocol (in host byte order) as `bind` and `sendto` take them.
fn address(ifindex: u32, protocol: libc::c_int) -> Result<libc::sockaddr_ll> {
    // SAFETY: a sockaddr_ll is plain data for which all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_protocol = u16::try_from(protocol)?.to_be();
    address.sll_ifindex = i32::try_from(ifindex)?;
    Ok(address)
}

/// Reads the address and the control messages of a received frame.
fn meta(header: &libc::msghdr, address: &libc::sockaddr_ll) -> Meta {
    let mut meta = Meta {
        ifindex: address.sll_ifindex.cast_unsigned(),
        hatype: address.sll_hatype,
        pkttype: address.sll_pkttype,
        at: SystemTime::UNIX_EPOCH,
        status: 0,
        vlan_tci: None,
    };
    // SAFETY: the kernel has filled the control buffer of this header and set its length.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a whole header within the buffer.
        let control = unsafe { &*message };
        // SAFETY: the data of a message follows its header.
        let data = unsafe { libc::CMSG_DATA(message) };
        match (control.cmsg_level, control.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                // SAFETY: the data of this type is a timespec, perhaps unaligned.
                let at: libc::timespec = unsafe { ptr::read_unaligned(data.cast()) };
                let nanos = u32::try_from(at.tv_nsec).unwrap_or(0);
                meta.at = SystemTime::UNIX_EPOCH + Duration::new(at.tv_sec.cast_unsigned(), nanos);
            }
            (libc::SOL_PACKET, libc::PACKET_AUXDATA) => {
                // SAFETY: the data of this type is a tpacket_auxdata, perhaps unaligned.
                let aux: libc::tpacket_auxdata = unsafe { ptr::read_unaligned(data.cast()) };
                meta.status = aux.tp_status;
                meta.vlan_tci = (aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(aux.tp_vlan_tci);
            }
            _ => {}
        }
        // SAFETY: `message` is a header within this buffer.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    meta
}
