//! What is legal, and probably wrong.

use ipnet::IpNet;

use super::{
    Config, Datapath, DevicePattern, Follow, OnDown, Policy,
    parse::Spans,
    report::{Finding, Findings, Span, quote},
};

/// Looks for it in a configuration without errors.
pub(super) fn doubts(config: &Config, spans: &Spans, findings: &mut Findings) {
    if let Some(span) = spans.datapath.as_ref().filter(|_| config.datapath == Datapath::Ebpf) {
        unguarded(config, span, spans, findings);
    }
    let unprotected = matches!(config.datapath, Datapath::Kernel | Datapath::Shadow);
    let fates = fates(config);
    for ((policy, at), fate) in config.policies.iter().zip(&spans.policies).zip(fates) {
        if fate.shadowed {
            let message = format!("the policy {} decides nothing", quote(&policy.name));
            let help = "longer prefixes of other policies take all of its sources, but for what they exempt: remove it, \
                        or look at their `from`";
            findings.warning(Finding::new(at.name.as_ref().unwrap_or(&at.header), message, help));
        }
        for (Follow { devices: pattern, .. }, span) in policy.follow.iter().zip(&at.follow) {
            if config.interfaces.uplink.contains(pattern) {
                let message = format!("the sources are those of the uplink {}", quote(&pattern.0));
                let help = "the tunnels' own packets carry an address of it, and would be sent into the tunnel: name the \
                            interface that the sources are behind";
                findings.warning(Finding::new(span, message, help));
            }
        }
        if let Some(span) = at.routed.as_ref().filter(|_| unprotected) {
            let message =
                "when an inside route is withdrawn, packets to there leave by the uplink for some milliseconds";
            let help = "without programs nothing stands at the uplink until the exemption is removed: write `datapath = \
                        \"both\"`, or leave a route such as `unreachable` in the main table for the inside networks";
            findings.warning(Finding::new(span, message, help));
        }
        if let (Some(span), Some(source)) = (&at.on_down, fate.let_go)
            && !config.interfaces.uplink.is_empty()
        {
            let message = format!("while no tunnel is up, packets from {source} leave by the uplink");
            let help = "a provider drops sources that are not its own: write \"unreachable\", so that they do not leave, and \
                        the sender is told";
            findings.warning(Finding::new(span, message, help));
        }
    }
}

/// Without rules, programs have to stand at every way out, from the first packet on.
fn unguarded(config: &Config, datapath: &Span, spans: &Spans, findings: &mut Findings) {
    if config.interfaces.uplink.is_empty() {
        let message = "no device is an `uplink`, so rules stand in for the programs";
        let help = "name the devices of the default routes in `uplink`, or write \"both\"";
        findings.warning(Finding::new(datapath, message, help));
    }
    for (DevicePattern(name), span) in config.interfaces.uplink.iter().zip(&spans.uplink) {
        if name.ends_with('*') {
            let message =
                format!("a new device that matches {} is not guarded at first, so rules stand in", quote(name));
            let help = "write the whole names of the uplinks, or `datapath = \"both\"`";
            findings.warning(Finding::new(span, message, help).and(datapath, "programs without rules"));
        }
    }
}

/// What becomes of a policy's sources.
#[derive(Clone, Default)]
struct Fate {
    /// Longer prefixes of other policies take all of them.
    shadowed: bool,
    /// A public source that no policy keeps back while this one's tunnels are down.
    let_go: Option<IpNet>,
}

/// A prefix that the ones after it may lie in.
struct Outer<'a> {
    net: IpNet,
    policy: usize,
    config: &'a Policy,
    /// How many addresses of it belong to others.
    taken: u128,
    /// A policy around it keeps packets back.
    kept: bool,
}

/// Number of addresses of a prefix; one too few for `::/0`, which no file lists completely but for one.
fn addresses(net: &IpNet) -> u128 {
    1u128.checked_shl(u32::from(net.max_prefix_len() - net.prefix_len())).unwrap_or(u128::MAX)
}

fn fates(config: &Config) -> Vec<Fate> {
    // What interfaces have is not known before the daemon looks.
    let fate = |policy: &Policy| Fate { shadowed: policy.follow.is_empty(), let_go: None };
    let mut fates: Vec<Fate> = config.policies.iter().map(fate).collect();
    let mut sources: Vec<(IpNet, usize)> = Vec::new();
    for (index, policy) in config.policies.iter().enumerate() {
        sources.extend(policy.from.iter().map(|net| (*net, index)));
    }
    // Shorter prefixes come before those that they contain. Stable, as files are mostly sorted already.
    sources.sort();
    let mut around: Vec<Outer<'_>> = Vec::new();
    for (net, index) in sources {
        while around.last().is_some_and(|outer| !outer.net.contains(&net)) {
            leave(&mut around, &mut fates);
        }
        let (Some(policy), Some(fate)) = (config.policies.get(index), fates.get_mut(index)) else { continue };
        let kept = !policy.main && (around.last().is_some_and(|outer| outer.kept) || policy.on_down != OnDown::Next);
        if !kept && public(&net) {
            fate.let_go.get_or_insert(net);
        }
        around.push(Outer { net, policy: index, config: policy, taken: 0, kept });
    }
    while !around.is_empty() {
        leave(&mut around, &mut fates);
    }
    fates
}

/// All that lies in the last prefix has been seen.
fn leave(around: &mut Vec<Outer<'_>>, fates: &mut [Fate]) {
    let Some(inner) = around.pop() else { return };
    if inner.taken < addresses(&inner.net)
        && let Some(fate) = fates.get_mut(inner.policy)
    {
        fate.shadowed = false;
    }
    if let Some(outer) = around.last_mut() {
        // What falls through reaches the policy around.
        let taken = match inner.config.on_down {
            _ if outer.policy == inner.policy => inner.taken,
            OnDown::Next => 0,
            _ => addresses(&inner.net),
        };
        outer.taken = outer.taken.saturating_add(taken);
    }
}

/// Others are translated before they leave by an uplink.
fn public(net: &IpNet) -> bool {
    match net {
        IpNet::V4(net) => {
            let shared = u32::from(net.addr()) >> 22 == 0x6440_0000 >> 22;
            !net.addr().is_private() && !shared
        }
        IpNet::V6(net) => !net.addr().is_unique_local(),
    }
}
