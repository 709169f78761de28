//! Netkit pairs, which carry bare packets in this mode: Debian's `ip` does not know them, so netlink makes them.

use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result};
use rtnetlink::{
    LinkMessageBuilder, LinkNetkit, LinkUnspec, new_connection,
    packet_route::link::{InfoData, InfoKind, InfoNetkit, NetkitMode},
};

use crate::device::{End, set_up};

/// Makes a pair in layer 3 mode; both ends are up. They are Ethernet devices that ask for no neighbour: all their MAC
/// addresses are zero, those in the frames too.
pub(crate) fn netkit(a: End<'_>, b: End<'_>, mtu: u32) -> Result<()> {
    let far = LinkMessageBuilder::<LinkUnspec>::new().name(b.device).mtu(mtu);
    let far = far.setns_by_fd(b.netns.handle().as_raw_fd()).build();
    let data = InfoData::Netkit(vec![InfoNetkit::Mode(NetkitMode::L3), InfoNetkit::Peer(far)]);
    let near = LinkMessageBuilder::<LinkNetkit>::new_with_info_kind(InfoKind::Netkit).name(a.device).mtu(mtu);
    let near = near.set_info_data(data).build();
    a.netns
        .run_in(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
            runtime.block_on(async {
                let (connection, handle, _) = new_connection()?;
                tokio::spawn(connection);
                handle.link().add(near).execute().await.context("the kernel makes no netkit pair")
            })
        })
        .with_context(|| format!("{} in namespace {}", a.device, a.netns.label()))?;
    [a, b].into_iter().try_for_each(set_up)
}
