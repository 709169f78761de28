//! A network namespace for the length of a test.

use std::{
    fs::File,
    os::fd::AsRawFd,
    process::{Command, Output},
};

use nix::sched::{CloneFlags, unshare};
use rtnetlink::{
    MulticastGroup,
    sys::{Socket, protocols::NETLINK_ROUTE},
};

/// Runs a test in a network namespace of its own, which ends with the thread that it runs in.
pub fn in_namespace(test: impl AsyncFnOnce() + Send + 'static) {
    assert!(nix::unistd::geteuid().is_root(), "this test makes a network namespace: run it as root");
    let outcome = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(test());
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

fn run_ip(arguments: &str) -> Output {
    Command::new("ip").args(arguments.split_whitespace()).output().expect("iproute2 is installed")
}

/// `ip ARGUMENTS`, which must succeed; returns what it printed.
pub fn ip(arguments: &str) -> String {
    let output = run_ip(arguments);
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Listens to route notifications.
pub struct RouteMonitor(Socket);

impl RouteMonitor {
    pub fn start() -> Self {
        let mut socket = Socket::new(NETLINK_ROUTE).expect("a netlink socket");
        socket.bind_auto().expect("an address");
        socket.set_non_blocking(true).expect("a flag");
        for group in [MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route] {
            socket.add_membership(group as u32).expect("a membership");
        }
        Self(socket)
    }

    /// How many routes were made (or replaced), and how many removed.
    pub fn seen(&self) -> (usize, usize) {
        let mut seen = (0, 0);
        while let Ok((datagram, _)) = self.0.recv_from_full() {
            match u16::from_ne_bytes([datagram[4], datagram[5]]) {
                libc::RTM_NEWROUTE => seen.0 += 1,
                libc::RTM_DELROUTE => seen.1 += 1,
                other => panic!("a message of type {other}"),
            }
        }
        seen
    }
}

/// Gives up all of the calling thread's capabilities.
pub fn drop_capabilities() {
    // `struct __user_cap_header_struct` and two of `struct __user_cap_data_struct` in `include/uapi/linux/capability.h`.
    let header = [0x2008_0522_u32, 0];
    let none = [0_u32; 6];
    // SAFETY: both point to the number of bytes that version 3 of the interface reads.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Opens an existing `tun` device as its program does: it has a carrier until the file is closed.
pub fn serve_tun(name: &str) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    // `struct ifreq`: the name, then the flags IFF_TUN | IFF_NO_PI.
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&0x1001_u16.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which is 40 bytes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    file
}
