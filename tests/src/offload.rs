//! What a device leaves to others: offloads, by name as `ethtool -k` knows them (`net/ethtool/ioctl.c`).

use std::{mem, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use crate::netns::Netns;

/// In `include/uapi/linux/ethtool.h`.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
/// `ETH_GSTRING_LEN`
const NAME: usize = 32;
const SIOCETHTOOL: libc::c_ulong = 0x8946;

/// What a device does with frames where XDP is to take them as they are: all of it itself, and it collects what comes in
/// (a veth device takes frames from XDP only if its other end does that, `veth_set_xdp_features()` in
/// `drivers/net/veth.c`).
pub const AS_ON_A_WIRE: [(&str, bool); 3] = [("tx-checksum-", false), ("tx-vlan-", false), ("rx-gro", true)];

/// `TUNROUTE_XDP` is set: tests about other subjects use XDP where devices allow it.
#[must_use]
pub fn xdp_forced() -> bool {
    std::env::var_os("TUNROUTE_XDP").is_some()
}

/// How many programs decide in a world with Ethernet devices alone: at the ingress device, at the uplink, and as XDP where
/// that is forced.
#[must_use]
pub fn programs() -> usize {
    2 + usize::from(xdp_forced())
}

/// Switches the offloads whose names begin so on or off; one that is fixed stays as it is.
///
/// # Errors
/// There is no such device.
pub fn switch(netns: &Netns, device: &str, offloads: &[(&str, bool)]) -> Result<()> {
    netns.run_in(|| {
        let names = names(device)?;
        let mut blocks = vec![[0_u32; 2]; names.len().div_ceil(32)];
        for (index, name) in names.iter().enumerate() {
            let wanted = |(start, _): &&(&str, bool)| name.starts_with(start) && !name.starts_with("rx-gro-");
            if let Some((_, on)) = offloads.iter().find(wanted) {
                blocks[index / 32][0] |= 1 << (index % 32);
                blocks[index / 32][1] |= u32::from(*on) << (index % 32);
            }
        }
        let mut request = vec![ETHTOOL_SFEATURES, u32::try_from(blocks.len())?];
        request.extend(blocks.iter().flatten());
        call(device, &mut request).with_context(|| format!("cannot switch {offloads:?} of {device}"))
    })
}

/// The names of all offloads, by their numbers.
fn names(device: &str) -> Result<Vec<String>> {
    // struct ethtool_sset_info: command, reserved, a mask of 64 bits, room for one length.
    let mut count = [ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0, 0];
    call(device, &mut count)?;
    let count = count[4];
    let words = NAME / 4;
    let mut request = vec![0_u32; 3 + words * usize::try_from(count)?];
    request[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count]);
    call(device, &mut request)?;
    let name = |name: &[u32]| {
        let bytes: Vec<u8> = name.iter().flat_map(|word| word.to_ne_bytes()).take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Ok(request[3..].chunks_exact(words).map(name).collect())
}

fn call(device: &str, request: &mut [u32]) -> Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: plain data, for which all zeroes is a valid value.
    let mut ifreq: libc::ifreq = unsafe { mem::zeroed() };
    ensure!(device.len() < ifreq.ifr_name.len(), "{device} is no device's name");
    for (to, byte) in ifreq.ifr_name.iter_mut().zip(device.bytes()) {
        *to = byte.cast_signed();
    }
    ifreq.ifr_ifru.ifru_data = request.as_mut_ptr().cast();
    // SAFETY: the request is as long as its command says, and lives until the call returns.
    match Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut ifreq) }) {
        Ok(_) | Err(Errno::EOPNOTSUPP) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("ethtool on {device}")),
    }
}
