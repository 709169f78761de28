//! nftables without `nft`, which not every host has: in the calling thread's network namespace.

use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket},
};

/// `NFPROTO_INET`, for IPv4 and IPv6.
pub const INET: u8 = 1;
/// `NF_INET_FORWARD`
pub const FORWARD: u32 = 2;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NESTED: u16 = 0x8000;
/// Netlink's own header and `struct nfgenmsg`.
const HEADERS: usize = 20;

fn attribute(kind: u16, value: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = u16::try_from(4 + value.len())?.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(bytes)
}

/// Sends messages (type and attributes) of a family as one transaction.
fn transact(family: u8, messages: &[(u16, Vec<u8>)]) -> Result<()> {
    let mut datagram = Vec::new();
    let mut push = |kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]| -> Result<()> {
        datagram.extend(u32::try_from(HEADERS + attributes.len())?.to_ne_bytes());
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
        push(10 << 8 | kind, 0x405, family, 0, attributes)?;
    }
    push(0x11, 1, 0, 10, &[])?;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
        .context("cannot open a netfilter socket")?;
    sendto(socket.as_raw_fd(), &datagram, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    for _ in messages {
        let mut answer = [0; 4096];
        recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let error = i32::from_ne_bytes(answer[16..HEADERS].try_into()?);
        ensure!(error == 0, "nftables says {}", Errno::from_raw(-error));
    }
    Ok(())
}

/// `nft add table FAMILY t; add chain FAMILY t c`, as a base chain at a hook (`{ type filter hook … priority 0; }`, perhaps
/// with devices) or as an ordinary one.
///
/// # Errors
/// What the kernel says.
pub fn add_chain(family: u8, hook: Option<u32>, devices: &[&str]) -> Result<()> {
    let mut chain = [attribute(1, b"t\0")?, attribute(3, b"c\0")?].concat();
    if let Some(hook) = hook {
        // NFTA_HOOK_HOOKNUM and NFTA_HOOK_PRIORITY, in network byte order.
        let mut nested = [attribute(1, &hook.to_be_bytes())?, attribute(2, &0_u32.to_be_bytes())?].concat();
        if !devices.is_empty() {
            let names: Result<Vec<_>> =
                devices.iter().map(|name| attribute(1, format!("{name}\0").as_bytes())).collect();
            nested.extend(attribute(4 | NESTED, &names?.concat())?);
        }
        chain.extend(attribute(4 | NESTED, &nested)?);
        chain.extend(attribute(7, b"filter\0")?);
    }
    transact(family, &[(NEWTABLE, attribute(1, b"t\0")?), (NEWCHAIN, chain)])
}

/// `nft delete table FAMILY t`
///
/// # Errors
/// What the kernel says.
pub fn delete_table(family: u8) -> Result<()> {
    transact(family, &[(DELTABLE, attribute(1, b"t\0")?)])
}
