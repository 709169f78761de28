//! Operations, turned into requests, and the kernel's refusals, turned into advice.

use std::{collections::HashSet, io};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};

use super::{
    KernelError, Kinds, Snapshot, observe, route, rule,
    socket::{Refusal, Request, Socket},
};
use crate::net::{KernelOp, Rule};

/// This many requests go out in one datagram. A rule costs the kernel up to 0.1 ms, so other tasks wait 6 ms at most.
const BATCH: usize = 64;

/// From this many rules on it pays to look once at what is there, instead of having the kernel look for each of them:
/// 10,000 rules take 0.65 s so, and 3.3 s with `NLM_F_EXCL`, which walks all rules each time.
const BULK: usize = 100;

/// Applies operations in order; see [`super::Kernel::apply_all`].
pub(super) async fn apply_all(
    socket: &mut Socket,
    ops: impl IntoIterator<Item = &KernelOp>,
    snapshot: &Snapshot,
) -> Vec<KernelError> {
    let mut errors = Vec::new();
    let ops: Vec<_> = ops.into_iter().collect();
    let present = match rules_present(socket, &ops).await {
        Ok(present) => present,
        Err(error) => return vec![error],
    };
    let mut ops = ops.into_iter().peekable();
    while let Some(first) = ops.peek() {
        // A batch is either additions or deletions: whether to delete depends on the outcome of all additions before.
        let deletes = is_deletion(first);
        let mut batch = Vec::with_capacity(BATCH);
        let mut requests = Vec::with_capacity(BATCH);
        while batch.len() < BATCH
            && let Some(op) = ops.next_if(|op| is_deletion(op) == deletes)
        {
            if deletes && !errors.is_empty() {
                errors.push(KernelError::PutOff { command: op.to_string() });
                continue;
            }
            if let (KernelOp::AddRule(rule), Some(present)) = (op, &present)
                && present.contains(rule)
            {
                continue;
            }
            match request(op, snapshot, present.is_some()) {
                Some(request) => {
                    batch.push(op);
                    requests.push(request);
                }
                None => errors.push(KernelError::Stale { command: op.to_string() }),
            }
        }
        match socket.transact(&requests) {
            Ok(answers) => {
                let failed = batch.into_iter().zip(answers).filter_map(|(op, answer)| verdict(op, answer).err());
                errors.extend(failed);
            }
            Err(error) => {
                errors.push(KernelError::Socket(error));
                return errors;
            }
        }
        tokio::task::yield_now().await;
    }
    errors
}

/// Tunroute's rules, if there are so many to add that they are looked up here rather than by the kernel.
async fn rules_present(socket: &mut Socket, ops: &[&KernelOp]) -> Result<Option<HashSet<Rule>>, KernelError> {
    if ops.iter().filter(|op| matches!(op, KernelOp::AddRule(_))).count() < BULK {
        return Ok(None);
    }
    let now = observe::observe(socket, Kinds::RULES, Some(Snapshot::default())).await?;
    Ok(Some(now.state.rules.into_iter().filter_map(|observed| observed.rule).collect()))
}

const fn is_deletion(op: &KernelOp) -> bool {
    matches!(op, KernelOp::DelRule { .. } | KernelOp::DelRoute { .. })
}

/// The request for an operation; none if the snapshot does not have its object. In `bulk`, rules are known to be new.
fn request(op: &KernelOp, snapshot: &Snapshot, bulk: bool) -> Option<Request> {
    Some(match op {
        // Without NLM_F_EXCL the kernel adds the same rule a second time.
        KernelOp::AddRule(rule) => {
            let flags = if bulk { NLM_F_CREATE } else { NLM_F_CREATE | NLM_F_EXCL };
            Request { kind: libc::RTM_NEWRULE, flags, payload: rule::message(rule) }
        }
        KernelOp::DelRule { handle, .. } => {
            Request { kind: libc::RTM_DELRULE, flags: 0, payload: snapshot.rule(*handle)?.to_vec() }
        }
        KernelOp::AddRoute(route) => {
            Request { kind: libc::RTM_NEWROUTE, flags: NLM_F_CREATE | NLM_F_EXCL, payload: route::message(route) }
        }
        KernelOp::ReplaceRoute(route) => {
            Request { kind: libc::RTM_NEWROUTE, flags: NLM_F_CREATE | NLM_F_REPLACE, payload: route::message(route) }
        }
        KernelOp::DelRoute { handle, .. } => {
            Request { kind: libc::RTM_DELROUTE, flags: 0, payload: snapshot.route(*handle)?.to_vec() }
        }
    })
}

/// What the kernel's answer means for an operation.
fn verdict(op: &KernelOp, answer: Result<(), Refusal>) -> Result<(), KernelError> {
    let Err(refusal) = answer else { return Ok(()) };
    match (op, refusal.errno) {
        // `rule_exists()` compares all that a rule of tunroute's has, the protocol included. One that has more besides
        // passes for it, but carries the protocol, too: it is removed, and this one added the next time.
        (KernelOp::AddRule(_), libc::EEXIST)
        | (KernelOp::DelRule { .. }, libc::ENOENT)
        | (KernelOp::DelRoute { .. }, libc::ESRCH) => Ok(()),
        (_, errno) => Err(KernelError::Refused {
            command: op.to_string(),
            source: io::Error::from_raw_os_error(errno),
            explanation: refusal.message,
            advice: advice(errno),
        }),
    }
}

/// What the operator can do about an error number.
const fn advice(errno: i32) -> &'static str {
    match errno {
        libc::EPERM | libc::EACCES => "tunroute needs CAP_NET_ADMIN in this network namespace: run it as root",
        libc::ENODEV | libc::ENXIO => "the device is gone: it is tried again when a device of that name appears",
        libc::ENETDOWN => "the device is down: set it up with `ip link set DEVICE up`",
        libc::EEXIST => {
            "another route has this table, destination and metric: remove it, or give the policy another `table`"
        }
        libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL => {
            "if the route has a gateway: it must be a neighbour's address of the same family, and not one of this host"
        }
        libc::EAFNOSUPPORT | libc::EOPNOTSUPP => {
            "the kernel was built or booted without this: for IPv6 see ipv6.disable=1, for rules \
             CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES"
        }
        libc::ENOSPC | libc::ENOMEM | libc::ENOBUFS => {
            "the kernel has no room: look for memory, and for IPv6 at net.ipv6.route.max_size"
        }
        _ => "please report this with the output of `ip rule` and `ip route show table all`",
    }
}
