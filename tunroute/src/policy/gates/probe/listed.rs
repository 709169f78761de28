//! The netfilter hooks as the kernel lists them, since Linux 5.14 where `CONFIG_NETFILTER_NETLINK_HOOK` is set: those of
//! programs and modules, too, which belong to no nftables or iptables rule set.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use super::{ATTEMPTS, Hook, HookPoint, NFGENMSG, is_missing};
use crate::{
    kernel::socket::{Dump, Request, Socket, attributes, push_attribute, string_of, u32_of, value},
    policy::net::Family,
};

/// `NFNL_SUBSYS_HOOK` with `NFNL_MSG_HOOK_GET`, in `include/uapi/linux/netfilter/`, and what follows from
/// `nfnetlink_hook.h`.
const HOOK_GET: u16 = 12 << 8;
const HOOK_HOOKNUM: u16 = 1;
const HOOK_DEV: u16 = 3;
const HOOK_FUNCTION: u16 = 4;
const HOOK_MODULE: u16 = 5;
const HOOK_CHAIN: u16 = 6;
const CHAIN_DESCRIPTION: u16 = 1;
const CHAIN_TYPE: u16 = 2;
const TYPE_NFTABLES: u32 = 1;
const TYPE_BPF: u32 = 2;
const BPF_ID: u16 = 1;

/// `NFPROTO_…` and hook numbers in `include/uapi/linux/netfilter.h`.
const FAMILIES: [(u8, Family); 2] = [(2, Family::V4), (10, Family::V6)];
const NETDEV: u8 = 5;
const INGRESS: u32 = 0;
/// `NF_INET_PRE_ROUTING`, `NF_INET_FORWARD`, `NF_INET_POST_ROUTING`
const ON_THE_WAY: [u32; 3] = [0, 2, 4];

/// How the functions begin that decide nothing by themselves: those of rule sets, which are found by their chains and tables;
/// connection tracking, whose state rules ask for; security modules, which act on marks that rules set; and what a bridge
/// keeps for frames of its ports.
const SEEN_OTHERWISE: [&str; 17] = [
    "nft_",
    "nf_flow_",
    "nf_nat_",
    "ipt_",
    "ip6t_",
    "iptable_",
    "ip6table_",
    "nf_conntrack_",
    "nf_confirm",
    "ipv4_conntrack_",
    "ipv6_conntrack_",
    "ipv4_confirm",
    "ipv6_confirm",
    "ipv6_defrag",
    "selinux_",
    "apparmor_",
    "ip_sabotage_in",
];

/// The kernel has no such list. It is not asked again, as each time it would look for a module.
static MISSING: AtomicBool = AtomicBool::new(false);

/// The hooks that no rule set accounts for, where packets are forwarded and where these devices receive; none if the kernel
/// does not list them.
pub(super) async fn listed(devices: &[&str]) -> io::Result<Option<Vec<Hook>>> {
    if MISSING.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let mut socket = match Socket::open(NETLINK_NETFILTER) {
        Ok(socket) => socket,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut hooks = Vec::new();
    for (number, family) in FAMILIES {
        for hook in ON_THE_WAY {
            match dump(&mut socket, &request(number, hook, None)?, Some(family), &HookPoint::Forwarding).await {
                Ok(found) => hooks.extend(found),
                Err(error) if is_missing(&error) && family == Family::V4 => {
                    MISSING.store(true, Ordering::Relaxed);
                    return Ok(None);
                }
                // A kernel without IPv6.
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    for device in devices {
        let point = HookPoint::Ingress(vec![(*device).to_owned()]);
        match dump(&mut socket, &request(NETDEV, INGRESS, Some(device))?, None, &point).await {
            Ok(found) => hooks.extend(found),
            // A kernel without such hooks, or the device has just gone.
            Err(error) if is_missing(&error) || error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(hooks))
}

/// `struct nfgenmsg` and what the kernel wants to know.
fn request(family: u8, hook: u32, device: Option<&str>) -> io::Result<Request> {
    let mut payload = vec![family, 0, 0, 0];
    push_attribute(&mut payload, HOOK_HOOKNUM, &hook.to_be_bytes())?;
    if let Some(device) = device {
        push_attribute(&mut payload, HOOK_DEV, &[device.as_bytes(), &[0]].concat())?;
    }
    Ok(Request { kind: HOOK_GET, flags: 0, payload })
}

async fn dump(
    socket: &mut Socket,
    request: &Request,
    family: Option<Family>,
    point: &HookPoint,
) -> io::Result<Vec<Hook>> {
    for _ in 0..ATTEMPTS {
        let mut hooks = Vec::new();
        let dump = socket.dump(request, |message| {
            let name = (message.kind == HOOK_GET).then(|| name(message.payload)).flatten();
            hooks.extend(name.map(|name| Hook { family, point: point.clone(), name }));
        });
        if dump.await? == Dump::Complete {
            return Ok(hooks);
        }
    }
    Err(io::Error::other("the list of netfilter hooks kept changing"))
}

/// What stands at a hook, in words; none if it is seen otherwise.
fn name(payload: &[u8]) -> Option<String> {
    let (mut function, mut module, mut kind, mut program) = (String::new(), String::new(), None, None);
    for attribute in attributes(payload, NFGENMSG) {
        match attribute.kind() {
            HOOK_FUNCTION => function = string_of(value(&attribute)),
            HOOK_MODULE => module = format!(" of the module {}", string_of(value(&attribute))),
            HOOK_CHAIN => {
                for part in attributes(value(&attribute), 0) {
                    match part.kind() {
                        CHAIN_TYPE => kind = u32_of(value(&part)).map(u32::from_be),
                        CHAIN_DESCRIPTION => {
                            let id = attributes(value(&part), 0).find(|one| one.kind() == BPF_ID);
                            program = id.and_then(|id| u32_of(value(&id))).map(u32::from_be);
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    match (kind, program) {
        (Some(TYPE_NFTABLES), _) => None,
        (Some(TYPE_BPF), Some(program)) => Some(format!("BPF program {program}")),
        _ if SEEN_OTHERWISE.iter().any(|beginning| function.starts_with(beginning)) => None,
        _ if function.is_empty() => Some("a function without a name".to_owned()),
        _ => Some(format!("{function}(){module}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attributes by kind and value.
    type Attributes<'a> = &'a [(u16, &'a [u8])];

    /// A hook as `nfnl_hook_dump_one()` in `net/netfilter/nfnetlink_hook.c` tells it.
    fn told(function: &str, module: Option<&str>, chain: Option<(u32, Attributes<'_>)>) -> Vec<u8> {
        let mut payload = vec![2, 0, 0, 0];
        let mut push = |kind, value: &[u8]| push_attribute(&mut payload, kind, value).expect("short");
        if let Some((kind, description)) = chain {
            let (mut inner, mut outer) = (Vec::new(), Vec::new());
            description.iter().for_each(|(kind, value)| push_attribute(&mut inner, *kind, value).expect("short"));
            // Nested: NLA_F_NESTED.
            push_attribute(&mut outer, 1 << 15 | CHAIN_DESCRIPTION, &inner).expect("short");
            push_attribute(&mut outer, CHAIN_TYPE, &kind.to_be_bytes()).expect("short");
            push(1 << 15 | HOOK_CHAIN, &outer);
        }
        if let Some(module) = module {
            push(HOOK_MODULE, &[module.as_bytes(), &[0]].concat());
        }
        push(HOOK_FUNCTION, &[function.as_bytes(), &[0]].concat());
        push(HOOK_HOOKNUM, &2u32.to_be_bytes());
        push(2, &(-100i32).to_be_bytes());
        payload
    }

    #[test]
    fn hooks_of_programs_and_modules_are_named_and_those_of_rule_sets_are_seen_otherwise() {
        let chain: [(u16, &[u8]); 3] = [(1, b"filter\0"), (3, b"forward\0"), (2, &[1])];
        for (hook, expected) in [
            (told("nf_hook_run_bpf", None, Some((2, &[(BPF_ID, &77u32.to_be_bytes())]))), Some("BPF program 77")),
            (told("ip_vs_forward_icmp", Some("ip_vs"), None), Some("ip_vs_forward_icmp() of the module ip_vs")),
            (told("somebody", None, None), Some("somebody()")),
            (told("", None, None), Some("a function without a name")),
            (told("nft_do_chain_inet", Some("nf_tables"), Some((1, &chain))), None),
            (told("ipt_do_table", Some("ip_tables"), None), None),
            (told("ipv4_conntrack_in", Some("nf_conntrack"), None), None),
            (told("selinux_ip_forward", None, None), None),
            // What a later kernel adds.
            (told("new", None, Some((9, &[]))), Some("new()")),
        ] {
            assert_eq!(name(&hook).as_deref(), expected);
        }
        for cut in 0..40 {
            let hook = told("nf_hook_run_bpf", None, Some((2, &[(BPF_ID, &77u32.to_be_bytes())])));
            let _no_panic = name(hook.get(..cut).unwrap_or_default());
        }
    }

    #[test]
    fn it_is_asked_by_family_hook_and_device() {
        let bytes = |family, hook, device| request(family, hook, device).expect("short").payload;
        assert_eq!(bytes(2, 4, None), [2, 0, 0, 0, 8, 0, 1, 0, 0, 0, 0, 4]);
        let device = [5, 0, 0, 0, 8, 0, 1, 0, 0, 0, 0, 0, 9, 0, 3, 0, b'l', b'a', b'n', b'0', 0, 0, 0, 0];
        assert_eq!(bytes(NETDEV, INGRESS, Some("lan0")), device);
    }
}
