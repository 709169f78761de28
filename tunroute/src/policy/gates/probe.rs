//! What the gates have to know beside devices and rules, asked of the kernel in well under a millisecond.

mod listed;

use std::{collections::BTreeMap, fmt, fs, io};

use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_XFRM};

use crate::{
    kernel::{
        socket::{Dump, Request, Socket, attributes, string_of, u32_of, value},
        sysctl,
    },
    policy::net::{Family, IfIndex, Link},
};

/// A list that changes while it is read is read again, this often at most.
const ATTEMPTS: usize = 5;

/// The answers.
#[derive(Clone, Debug)]
pub struct Probes {
    forwarding: BTreeMap<IfIndex, [bool; 2]>,
    /// The netfilter hooks with rules behind them, or why they are not known.
    pub hooks: Result<Vec<Hook>, String>,
    /// Does the kernel list all hooks? Otherwise only those of nftables and iptables are known.
    pub lists_hooks: bool,
    /// Are there IPsec policies, or why that is not known.
    pub xfrm: Result<bool, String>,
}

impl Probes {
    /// Asks the kernel of the calling thread's network namespace. What it refuses to tell is kept as such: it closes a
    /// gate.
    pub async fn read(ingress: impl IntoIterator<Item = &Link>) -> Self {
        let ingress: Vec<&Link> = ingress.into_iter().collect();
        let devices: Vec<&str> = ingress.iter().map(|link| link.name.as_str()).collect();
        let hooks = hooks(&devices).await;
        let forwarding = ingress
            .into_iter()
            .map(|link| (link.index, Family::ALL.map(|family| sysctl::forwards(family, &link.name))))
            .collect();
        Self {
            forwarding,
            lists_hooks: hooks.as_ref().is_ok_and(|(_, all)| *all),
            hooks: hooks.map(|(hooks, _)| hooks).map_err(|error| error.to_string()),
            xfrm: xfrm().map_err(|error| error.to_string()),
        }
    }

    /// Does the kernel forward what enters by this device?
    #[must_use]
    pub fn forwards(&self, device: IfIndex, family: Family) -> bool {
        self.forwarding.get(&device).is_some_and(|&[v4, v6]| match family {
            Family::V4 => v4,
            Family::V6 => v6,
        })
    }

    /// These answers, and neither netfilter hooks nor IPsec policies: for tests.
    #[must_use]
    pub const fn new(forwarding: BTreeMap<IfIndex, [bool; 2]>) -> Self {
        Self { forwarding, hooks: Ok(Vec::new()), lists_hooks: true, xfrm: Ok(false) }
    }
}

/// Where in the kernel a netfilter hook sits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookPoint {
    /// On the way through the stack (`NF_INET_PRE_ROUTING`, `NF_INET_FORWARD`, `NF_INET_POST_ROUTING`).
    Forwarding,
    /// Where a device receives, after TC ingress (`nf_ingress()` in `net/core/dev.c`): only on these devices. A name
    /// that ends in `*` stands for all that begin so.
    Ingress(Vec<String>),
    /// Where a device sends: not met by a packet that TC ingress redirects (`nf_skip_egress` in
    /// `include/linux/netfilter_netdev.h`).
    Egress,
    /// For the host's own packets alone (`NF_INET_LOCAL_IN`, `NF_INET_LOCAL_OUT`).
    Local,
}

/// A netfilter hook with rules behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The family of the packets; none for both.
    pub family: Option<Family>,
    /// Where it sits.
    pub point: HookPoint,
    /// In `nft` or `iptables` words, for people.
    pub name: String,
}

impl Hook {
    /// Would a packet of this family have met it, if it enters by this device and is forwarded?
    #[must_use]
    pub fn meets(&self, family: Family, device: &str) -> bool {
        self.family.is_none_or(|own| own == family)
            && match &self.point {
                HookPoint::Forwarding | HookPoint::Egress => true,
                HookPoint::Ingress(devices) => devices.iter().any(|name| match name.strip_suffix('*') {
                    Some(prefix) => device.starts_with(prefix),
                    None => name == device,
                }),
                HookPoint::Local => false,
            }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// All hooks of nftables and of the older iptables, and of what else is where packets are forwarded and where these devices
/// receive, if the kernel lists that; and whether it does.
async fn hooks(devices: &[&str]) -> io::Result<(Vec<Hook>, bool)> {
    let mut hooks = nftables().await?;
    let others = listed::listed(devices).await?;
    let lists_all = others.is_some();
    hooks.extend(others.into_iter().flatten());
    for (family, program, file) in [
        (Family::V4, "iptables", "/proc/thread-self/net/ip_tables_names"),
        (Family::V6, "ip6tables", "/proc/thread-self/net/ip6_tables_names"),
    ] {
        let tables = match fs::read_to_string(file) {
            Ok(tables) => tables,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io::Error::new(error.kind(), format!("{file}: {error}"))),
        };
        // Every table has a chain that forwarded packets pass.
        hooks.extend(tables.lines().map(|table| Hook {
            family: Some(family),
            point: HookPoint::Forwarding,
            name: format!("{program} -t {table}"),
        }));
    }
    Ok((hooks, lists_all))
}

/// `NFNL_SUBSYS_NFTABLES` with `NFT_MSG_GETCHAIN` and `NFT_MSG_NEWCHAIN`, in `include/uapi/linux/netfilter/`.
const GETCHAIN: u16 = 10 << 8 | 4;
const NEWCHAIN: u16 = 10 << 8 | 3;
/// The length of `struct nfgenmsg`.
const NFGENMSG: usize = 4;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_HOOK_DEVS: u16 = 4;
const NFTA_DEVICE_NAME: u16 = 1;
const NFTA_DEVICE_PREFIX: u16 = 2;

/// The base chains of nftables (and of the iptables that writes nftables).
async fn nftables() -> io::Result<Vec<Hook>> {
    let mut socket = match Socket::open(NETLINK_NETFILTER) {
        Ok(socket) => socket,
        Err(error) if is_missing(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    // All families, version 0, no resource.
    let request = Request { kind: GETCHAIN, flags: 0, payload: vec![0; NFGENMSG] };
    for _ in 0..ATTEMPTS {
        let mut hooks = Vec::new();
        let dump = socket.dump(&request, |message| {
            if message.kind == NEWCHAIN {
                hooks.extend(base_chain(message.payload));
            }
        });
        match dump.await {
            Ok(Dump::Complete) => return Ok(hooks),
            Ok(Dump::Interrupted) => {}
            Err(error) if is_missing(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("the nftables rule set kept changing"))
}

/// The hook of a chain; none if it is not a base chain, or not of a family that routes.
fn base_chain(payload: &[u8]) -> Option<Hook> {
    let (mut table, mut chain, mut hook) = (String::new(), String::new(), None);
    for attribute in attributes(payload, NFGENMSG) {
        match attribute.kind() {
            NFTA_CHAIN_TABLE => table = string_of(value(&attribute)),
            NFTA_CHAIN_NAME => chain = string_of(value(&attribute)),
            NFTA_CHAIN_HOOK => hook = Some(value(&attribute)),
            _ => {}
        }
    }
    let hook = hook?;
    let (mut number, mut devices) = (None, Vec::new());
    for attribute in attributes(hook, 0) {
        let value = value(&attribute);
        match attribute.kind() {
            NFTA_HOOK_HOOKNUM => number = u32_of(value).map(u32::from_be),
            NFTA_HOOK_DEV => devices.push(string_of(value)),
            NFTA_HOOK_DEVS => devices.extend(attributes(value, 0).filter_map(|device| device_name(&device))),
            _ => {}
        }
    }
    // `NFPROTO_…` and hook numbers in `include/uapi/linux/netfilter.h`.
    let (family, word) = match payload.first()? {
        1 => (None, "inet"),
        2 => (Some(Family::V4), "ip"),
        5 => (None, "netdev"),
        10 => (Some(Family::V6), "ip6"),
        // arp and bridge: what they see is not forwarded by IP, or has passed them before TC ingress.
        _ => return None,
    };
    let point = match (word, number?) {
        ("netdev", 0) | ("inet", 5) => HookPoint::Ingress(devices),
        ("netdev", _) => HookPoint::Egress,
        (_, 0 | 2 | 4) => HookPoint::Forwarding,
        _ => HookPoint::Local,
    };
    Some(Hook { family, point, name: format!("nft chain {word} {table} {chain}") })
}

/// A device name, or a prefix of such as `NAME*`.
fn device_name(attribute: &rtnetlink::packet_core::NlaBuffer<&[u8]>) -> Option<String> {
    let name = string_of(value(attribute));
    match attribute.kind() {
        NFTA_DEVICE_NAME => Some(name),
        NFTA_DEVICE_PREFIX => Some(name + "*"),
        _ => None,
    }
}

/// Messages and attributes in `include/uapi/linux/xfrm.h`.
const XFRM_MSG_GETSPDINFO: u16 = 0x25;
const XFRM_MSG_GETDEFAULT: u16 = 0x28;
const XFRMA_SPD_INFO: u16 = 1;
const XFRM_USERPOLICY_BLOCK: u8 = 1;

/// Are there IPsec policies that may touch forwarded packets, or is it the default to block?
fn xfrm() -> io::Result<bool> {
    let mut socket = match Socket::open(NETLINK_XFRM) {
        Ok(socket) => socket,
        Err(error) if is_missing(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    let ask = |socket: &mut Socket, kind| match socket.get(&Request { kind, flags: 0, payload: vec![0; 4] }) {
        Err(error) if is_missing(&error) => Ok(Vec::new()),
        answer => answer,
    };
    // A word of flags, then `struct xfrmu_spdinfo`: how many policies are for in, out and fwd.
    let info = ask(&mut socket, XFRM_MSG_GETSPDINFO)?;
    let policies = attributes(&info, 4)
        .filter(|attribute| attribute.kind() == XFRMA_SPD_INFO)
        .any(|attribute| value(&attribute).iter().take(12).any(|&byte| byte != 0));
    // `struct xfrm_userpolicy_default`: in, fwd, out. Since Linux 5.14.
    let default = ask(&mut socket, XFRM_MSG_GETDEFAULT)?;
    Ok(policies || default.iter().take(3).any(|&action| action == XFRM_USERPOLICY_BLOCK))
}

/// The kernel was built without it, or does not know this request yet.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP))
}
