//! What the kernel says of devices, as far as XDP cares: over rtnetlink, netdev and ethtool netlink.

use std::{collections::BTreeMap, io};

use rtnetlink::sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};

use super::{
    filter, link,
    socket::{Request, Socket, attributes, push_attribute, string_of, u32_of, value},
};
use crate::{
    policy::fast::Hook,
    policy::net::{IfIndex, Link},
    policy::xdp_devices::{Device, Origin},
};

/// The length of `struct genlmsghdr`.
const GENERIC_HEADER: usize = 4;
/// Attributes in `include/uapi/linux/if_link.h`.
const IFLA_ADDRESS: u16 = 1;
const IFLA_LINK: u16 = 5;
const IFLA_QDISC: u16 = 6;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_PROG_ID: u16 = 4;
/// `include/uapi/linux/genetlink.h`
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `NETDEV_CMD_DEV_GET` and its attributes in `include/uapi/linux/netdev.h`.
const DEVICE_GET: u8 = 1;
const DEVICE_IFINDEX: u16 = 1;
const DEVICE_XDP_FEATURES: u16 = 3;
/// `ETHTOOL_MSG_FEATURES_GET` and its attributes in `include/uapi/linux/ethtool_netlink_generated.h`.
const FEATURES_GET: u8 = 11;
const FEATURES_HEADER: u16 = 1;
const HEADER_DEVICE: u16 = 1;
const FEATURES_ACTIVE: u16 = 4;
const BITSET_BITS: u16 = 3;
const BIT_NAME: u16 = 2;
/// Set in the type of an attribute that holds others.
const NESTED: u16 = 1 << 15;

/// Looks at these devices; one that is gone by now is left out. `usable` says whether the program can run on this kernel, and
/// `programs` counts those at a device's egress, which netlink does not.
///
/// # Errors
///
/// If the kernel cannot be asked.
pub async fn look<'a>(
    links: impl IntoIterator<Item = &'a Link>,
    usable: bool,
    programs: impl Fn(IfIndex) -> usize,
) -> io::Result<BTreeMap<IfIndex, Device>> {
    let mut sockets = Sockets::open()?;
    if !usable {
        sockets.netdev = None;
    }
    let mut devices = BTreeMap::new();
    for link in links {
        if let Some(mut device) = sockets.device(link).await? {
            device.filters += programs(link.index);
            devices.insert(link.index, device);
        }
    }
    Ok(devices)
}

struct Sockets {
    route: Socket,
    generic: Socket,
    /// The numbers of the families `netdev` and `ethtool`, where the kernel has them.
    netdev: Option<u16>,
    ethtool: Option<u16>,
}

impl Sockets {
    fn open() -> io::Result<Self> {
        let (route, mut generic) = (Socket::open(NETLINK_ROUTE)?, Socket::open(NETLINK_GENERIC)?);
        let (netdev, ethtool) = (family(&mut generic, "netdev")?, family(&mut generic, "ethtool")?);
        Ok(Self { route, generic, netdev, ethtool })
    }

    async fn device(&mut self, of: &Link) -> io::Result<Option<Device>> {
        let mut header = vec![0; link::HEADER];
        header[4..8].copy_from_slice(&of.index.to_ne_bytes());
        let request = Request { kind: libc::RTM_GETLINK, flags: 0, payload: header };
        let Ok(answer) = self.route.ask(&request)? else { return Ok(None) };
        let mut device = Device::default();
        let (mut peer, mut elsewhere) = (None, false);
        for attribute in attributes(&answer, link::HEADER) {
            let value = value(&attribute);
            match attribute.kind() {
                IFLA_ADDRESS => device.address = value.try_into().unwrap_or_default(),
                IFLA_QDISC => device.queue = string_of(value),
                IFLA_LINK => peer = u32_of(value),
                IFLA_LINK_NETNSID => elsewhere = true,
                IFLA_XDP => device.program = find(value, 0, IFLA_XDP_PROG_ID).and_then(u32_of).filter(|id| *id != 0),
                _ => {}
            }
        }
        device.features = self.xdp_features(of.index)?;
        device.origin = match (of.kind.as_deref(), peer) {
            (Some("veth"), Some(peer)) if !elsewhere => self.offloads(peer)?.map_or(Origin::Elsewhere, |offloads| {
                let has = |part: &str| offloads.iter().any(|offload| offload.starts_with(part));
                Origin::Peer { checksums: has("tx-checksum-"), tags: has("tx-vlan-") }
            }),
            (Some("veth"), _) => Origin::Elsewhere,
            (Some("tun"), _) => Origin::Tap,
            _ => {
                let takes = |offload: &String| offload.starts_with("rx-vlan-") && offload.ends_with("-parse");
                // One that does not say might.
                Origin::Card { tags: self.offloads(of.index)?.is_none_or(|offloads| offloads.iter().any(takes)) }
            }
        };
        device.filters = self.filters(of.index).await?;
        Ok(Some(device))
    }

    /// `NETDEV_XDP_ACT_…`, where the kernel tells.
    fn xdp_features(&mut self, device: IfIndex) -> io::Result<Option<u64>> {
        let Some(family) = self.netdev else { return Ok(None) };
        let mut payload = vec![DEVICE_GET, 1, 0, 0];
        push_attribute(&mut payload, DEVICE_IFINDEX, &device.to_ne_bytes())?;
        let Ok(answer) = self.generic.ask(&Request { kind: family, flags: 0, payload })? else { return Ok(Some(0)) };
        let features = find(&answer, GENERIC_HEADER, DEVICE_XDP_FEATURES);
        Ok(Some(features.and_then(|value| value.try_into().ok()).map_or(0, u64::from_ne_bytes)))
    }

    /// The names of the offloads that a device has switched on; none if the kernel does not tell.
    fn offloads(&mut self, device: IfIndex) -> io::Result<Option<Vec<String>>> {
        let Some(family) = self.ethtool else { return Ok(None) };
        let (mut header, mut payload) = (Vec::new(), vec![FEATURES_GET, 1, 0, 0]);
        push_attribute(&mut header, HEADER_DEVICE, &device.to_ne_bytes())?;
        push_attribute(&mut payload, FEATURES_HEADER | NESTED, &header)?;
        let Ok(answer) = self.generic.ask(&Request { kind: family, flags: 0, payload })? else { return Ok(None) };
        let Some(active) = find(&answer, GENERIC_HEADER, FEATURES_ACTIVE) else { return Ok(None) };
        let bits = attributes(find(active, 0, BITSET_BITS).unwrap_or_default(), 0);
        // A set without a mask lists what is set.
        Ok(Some(bits.filter_map(|bit| find(value(&bit), 0, BIT_NAME).map(string_of)).collect()))
    }

    /// How many filters see what leaves by a device.
    async fn filters(&mut self, device: IfIndex) -> io::Result<usize> {
        let mut count = 0;
        let request = filter::dump(Hook::Egress, device);
        match self.route.dump(&request, |message| count += usize::from(filter::parse(message).is_some())).await {
            Err(error) if !filter::none_there(&error) => Err(error),
            _ => Ok(count),
        }
    }
}

/// The number of a generic netlink family; none if the kernel does not have it.
fn family(socket: &mut Socket, name: &str) -> io::Result<Option<u16>> {
    let mut payload = vec![GET_FAMILY, 1, 0, 0];
    push_attribute(&mut payload, FAMILY_NAME, format!("{name}\0").as_bytes())?;
    let Ok(answer) = socket.ask(&Request { kind: CONTROL, flags: 0, payload })? else { return Ok(None) };
    Ok(find(&answer, GENERIC_HEADER, FAMILY_ID).and_then(|value| value.try_into().ok()).map(u16::from_ne_bytes))
}

/// The value of the first attribute of a kind behind a header of `skip` bytes.
fn find(payload: &[u8], skip: usize, kind: u16) -> Option<&[u8]> {
    attributes(payload, skip).find(|attribute| attribute.kind() == kind).map(|attribute| value(&attribute))
}
