//! Operations, turned into requests, and the kernel's refusals, turned into advice.

use std::{
    collections::HashSet,
    io,
    mem::{Discriminant, discriminant},
};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};

use super::{
    KernelError, Kinds, Snapshot, observe, route, rule,
    socket::{Refusal, Request, Socket},
};
use crate::policy::{
    net::{KernelOp, Route, Rule},
    plan::Undone,
};

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
    undone: &mut Undone<'_>,
) -> Vec<KernelError> {
    let mut errors = Vec::new();
    let ops: Vec<_> = ops.into_iter().collect();
    let present = match rules_present(socket, &ops, snapshot).await {
        Ok(present) => present,
        Err(error) => {
            ops.into_iter().for_each(|op| undone.fail(op));
            return vec![error];
        }
    };
    // Odd routes whose place was taken: IPv6 would now delete the new one in their stead, since it compares little more
    // than table, destination, metric and next hop (`ip6_route_del()` in `net/ipv6/route.c`).
    let mut replaced = Vec::new();
    let mut ops = ops.into_iter().peekable();
    while let Some(first) = ops.peek() {
        // A batch is of one kind: whether it is done depends on the outcome of those before.
        let kind = kind(first);
        let mut batch = Vec::with_capacity(BATCH);
        let mut requests = Vec::with_capacity(BATCH);
        while batch.len() < BATCH
            && let Some(op) = ops.next_if(|op| self::kind(op) == kind)
        {
            let request = match op {
                op if undone.puts_off(op) => continue,
                KernelOp::AddRule(rule) if present.as_ref().is_some_and(|present| present.contains(rule)) => continue,
                // Without NLM_F_EXCL the kernel adds the same rule a second time. With it, a `goto` is the same wherever it
                // leads to: the one that is to go has gone before.
                KernelOp::AddRule(rule) => Some(rule_request(rule, if present.is_some() { 0 } else { NLM_F_EXCL })),
                KernelOp::DelRule { handle, .. } => {
                    snapshot.rule(*handle).map(|rule| deletion(libc::RTM_DELRULE, rule))
                }
                KernelOp::AddRoute(route) => Some(match snapshot.in_the_way(route) {
                    Some(odd) => {
                        replaced.push(odd);
                        route_request(route, NLM_F_REPLACE)
                    }
                    None => route_request(route, NLM_F_EXCL),
                }),
                KernelOp::ReplaceRoute(route) => Some(route_request(route, NLM_F_REPLACE)),
                KernelOp::DelRoute { handle, .. } if replaced.contains(handle) => continue,
                KernelOp::DelRoute { handle, .. } => {
                    snapshot.route(*handle).map(|route| deletion(libc::RTM_DELROUTE, route))
                }
            };
            match request {
                Some(request) => {
                    batch.push(op);
                    requests.push(request);
                }
                None => {
                    undone.fail(op);
                    errors.push(KernelError::Stale { command: op.to_string() });
                }
            }
        }
        match socket.transact(&requests) {
            Ok(answers) => {
                for (op, answer) in batch.into_iter().zip(answers) {
                    if let Err(error) = verdict(op, answer) {
                        undone.fail(op);
                        errors.push(error);
                    }
                }
            }
            Err(error) => {
                batch.into_iter().chain(ops).for_each(|op| undone.fail(op));
                errors.push(KernelError::Socket(error));
                return errors;
            }
        }
        tokio::task::yield_now().await;
    }
    errors
}

/// Tunroute's rules, if they are to be looked up here rather than by the kernel: because there are many to add, or
/// because `rule_exists()` in `net/core/fib_rules.c` takes a rule for one that has only some of its selectors: where there
/// are odd ones with tunroute's number, or one for all sources is to be added beside others of its priority and table.
async fn rules_present(
    socket: &mut Socket,
    ops: &[&KernelOp],
    snapshot: &Snapshot,
) -> Result<Option<HashSet<Rule>>, KernelError> {
    let added = ops.iter().filter_map(|op| if let KernelOp::AddRule(rule) = op { Some(rule) } else { None });
    let additions = added.clone().count();
    let for_all = || added.clone().any(|rule| rule.from.prefix_len() == 0 && rule.oif.is_none());
    let odd = || snapshot.state.rules.iter().any(|observed| observed.ours && observed.rule.is_none());
    if additions == 0 || (additions < BULK && !odd() && !for_all()) {
        return Ok(None);
    }
    let now = observe::observe(socket, Kinds::RULES, Some(Snapshot::default())).await?;
    Ok(Some(now.state.rules.into_iter().filter_map(|observed| observed.rule).collect()))
}

/// What operations have in common that go out together.
fn kind(op: &KernelOp) -> (Discriminant<KernelOp>, bool) {
    (discriminant(op), op.is_shortcut())
}

fn rule_request(rule: &Rule, flags: u16) -> Request {
    Request { kind: libc::RTM_NEWRULE, flags: NLM_F_CREATE | flags, payload: rule::message(rule) }
}

fn route_request(route: &Route, flags: u16) -> Request {
    Request { kind: libc::RTM_NEWROUTE, flags: NLM_F_CREATE | flags, payload: route::message(route) }
}

fn deletion(kind: u16, observed: &[u8]) -> Request {
    Request { kind, flags: 0, payload: observed.to_vec() }
}

/// What the kernel's answer means for an operation.
fn verdict(op: &KernelOp, answer: Result<(), Refusal>) -> Result<(), KernelError> {
    let Err(refusal) = answer else { return Ok(()) };
    match (op, refusal.errno) {
        // `rule_exists()` in `net/core/fib_rules.c` compares all that a rule of tunroute's has: it is there.
        (KernelOp::AddRule(_), libc::EEXIST)
        | (KernelOp::DelRule { .. }, libc::ENOENT)
        | (KernelOp::DelRoute { .. }, libc::ESRCH) => Ok(()),
        (_, errno) => Err(KernelError::Refused {
            command: op.to_string(),
            source: io::Error::from_raw_os_error(errno),
            explanation: refusal.message,
            advice: advice(op, errno),
        }),
    }
}

/// What the operator can do, where the error number has one meaning for the operation. The kernel's explanation says the
/// rest.
const fn advice(op: &KernelOp, errno: i32) -> Option<&'static str> {
    match (op, errno) {
        (_, libc::EPERM) => Some("tunroute needs CAP_NET_ADMIN in this network namespace: run it as root"),
        (KernelOp::AddRoute(_), libc::ENETDOWN) => Some("the device is down: set it up with `ip link set DEVICE up`"),
        (KernelOp::AddRoute(_), libc::EEXIST) => {
            Some("another route has this table, destination and metric: remove it, or give the policy another `table`")
        }
        _ => None,
    }
}
