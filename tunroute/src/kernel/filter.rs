//! BPF filters on clsact qdiscs, over netlink (`net/sched/cls_api.c`): how programs are attached before Linux 6.6.

use std::io;

use super::socket::{Message, Request, attributes, u32_of, value};
use crate::{policy::fast::Hook, policy::net::IfIndex};

/// The length of `struct tcmsg`.
const HEADER: usize = 20;
/// `TC_H_CLSACT` in `include/uapi/linux/pkt_sched.h`, and the two places below it.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;
/// The handle that a clsact qdisc has.
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// Attributes in `include/uapi/linux/rtnetlink.h` and `include/uapi/linux/pkt_cls.h`.
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_ID: u16 = 11;

/// A filter on a clsact qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// The BPF program's number, if it is one.
    pub(super) program: Option<u32>,
}

/// The request for the filters at one place of a device.
pub(super) fn dump(hook: Hook, device: IfIndex) -> Request {
    let parent = match hook {
        Hook::Ingress => CLSACT_INGRESS,
        Hook::Egress => CLSACT_EGRESS,
    };
    Request { kind: libc::RTM_GETTFILTER, flags: 0, payload: header(device, 0, parent) }
}

/// The request that removes a device's clsact qdisc and all that is on it.
pub(super) fn remove_qdisc(device: IfIndex) -> Request {
    Request { kind: libc::RTM_DELQDISC, flags: 0, payload: header(device, CLSACT_HANDLE, CLSACT) }
}

fn header(device: IfIndex, handle: u32, parent: u32) -> Vec<u8> {
    let mut payload = vec![0; 4];
    for field in [device, handle, parent, 0] {
        payload.extend(field.to_ne_bytes());
    }
    payload
}

/// Reads a filter. For each priority the kernel first names the filter's kind alone, without a handle.
pub(super) fn parse(message: &Message<'_>) -> Option<Filter> {
    let handle = message.payload.get(8..12).and_then(u32_of)?;
    if message.kind != libc::RTM_NEWTFILTER || handle == 0 {
        return None;
    }
    let options = attributes(message.payload, HEADER).find(|attribute| attribute.kind() == TCA_OPTIONS);
    let program = options.and_then(|options| {
        let id = attributes(value(&options), 0).find(|nested| nested.kind() == TCA_BPF_ID)?;
        u32_of(value(&id))
    });
    Some(Filter { program })
}

/// A device without a clsact qdisc has no filters.
pub(super) fn none_there(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP))
}
