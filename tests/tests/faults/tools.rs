//! What others do to a host for which there is no program that every host has.

use std::{ffi::CString, os::unix::ffi::OsStrExt as _, path::Path};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket},
};
use std::os::fd::AsRawFd as _;
use tunroute_tests::Netns;

/// `BPF_OBJ_GET` and `BPF_LINK_DETACH` in `include/uapi/linux/bpf.h`.
const OBJ_GET: libc::c_int = 7;
const LINK_DETACH: libc::c_int = 34;

fn bpf(command: libc::c_int, attributes: &[u64; 4]) -> Result<libc::c_long> {
    // SAFETY: the attributes live until the call returns, and what they point to does.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    Errno::result(result).with_context(|| format!("bpf({command})"))
}

/// Detaches a pinned link by force, as `bpftool link detach` does.
pub fn detach_link(pin: &Path) -> Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let link = bpf(OBJ_GET, &[path.as_ptr() as u64, 0, 0, 0])?;
    let link = u32::try_from(link)?;
    let detached = bpf(LINK_DETACH, &[link.into(), 0, 0, 0]);
    // SAFETY: the descriptor was made above and is nobody else's.
    unsafe { libc::close(i32::try_from(link)?) };
    detached.map(drop)
}

/// An attribute of an nftables message.
fn attribute(kind: u16, value: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = u16::try_from(4 + value.len())?.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(bytes)
}

const NESTED: u16 = 0x8000;
/// `NFPROTO_INET`
const INET: u8 = 1;

/// Sends messages (type and attributes) to nftables as one transaction, as `nft` does.
fn nft(netns: &Netns, messages: &[(u16, Vec<u8>)]) -> Result<()> {
    let mut datagram = Vec::new();
    let mut push = |kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]| -> Result<()> {
        datagram.extend(u32::try_from(20 + attributes.len())?.to_ne_bytes());
        datagram.extend(kind.to_ne_bytes());
        datagram.extend(flags.to_ne_bytes());
        datagram.extend([0; 8]);
        datagram.extend([family, 0]);
        datagram.extend(resource.to_be_bytes());
        datagram.extend(attributes);
        Ok(())
    };
    // NFNL_MSG_BATCH_BEGIN and _END name the subsystem; requests are NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE.
    push(0x10, 1, 0, 10, &[])?;
    for (kind, attributes) in messages {
        push(10 << 8 | kind, 0x405, INET, 0, attributes)?;
    }
    push(0x11, 1, 0, 10, &[])?;
    netns.run_in(|| {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
                .context("cannot open a netfilter socket")?;
        sendto(socket.as_raw_fd(), &datagram, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        for _ in messages {
            let mut answer = [0; 4096];
            recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            let error = i32::from_ne_bytes(answer[16..20].try_into()?);
            ensure!(error == 0, "nftables says {}", Errno::from_raw(-error));
        }
        Ok(())
    })
}

/// `nft add table inet t; add chain inet t c { type filter hook forward priority 0; }`
pub fn add_forward_chain(netns: &Netns) -> Result<()> {
    let table = attribute(1, b"t\0")?;
    // NFTA_HOOK_HOOKNUM (NF_INET_FORWARD) and NFTA_HOOK_PRIORITY, in network byte order.
    let hook = [attribute(1, &2_u32.to_be_bytes())?, attribute(2, &0_u32.to_be_bytes())?].concat();
    let chain =
        [attribute(1, b"t\0")?, attribute(3, b"c\0")?, attribute(4 | NESTED, &hook)?, attribute(7, b"filter\0")?];
    nft(netns, &[(0, table), (3, chain.concat())])
}

/// `nft delete table inet t`
pub fn delete_table(netns: &Netns) -> Result<()> {
    nft(netns, &[(2, attribute(1, b"t\0")?)])
}
