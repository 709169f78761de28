//! The changes between two answers of the daemon. Pure.

use std::collections::BTreeMap;

use crate::control::status::Status;

/// The changes, one on each line: the subject, its earlier state and its new one.
#[must_use]
pub fn events(before: &Status, after: &Status) -> Vec<String> {
    let mut events = Vec::new();
    if before.pid != after.pid {
        events.push(format!("the daemon has been restarted: tunroute {}, pid {}", after.version, after.pid));
    }
    let (was, is) = (states(before), states(after));
    for (subject, state) in &is {
        match was.get(subject) {
            None => events.push(format!("{subject}: new, {state}")),
            Some(old) if old != state => events.push(format!("{subject}: {old} → {state}")),
            Some(_) => {}
        }
    }
    let gone = was.keys().filter(|subject| !is.contains_key(*subject));
    events.extend(gone.map(|subject| format!("{subject}: removed")));
    for (began, ended, before, after) in [
        ("closed", "opened", &before.fast_path.reasons, &after.fast_path.reasons),
        ("problem", "solved", &before.problems, &after.problems),
    ] {
        let missing = |from: &[String], of: &[String], what: &str| -> Vec<String> {
            of.iter().filter(|text| !from.contains(text)).map(|text| format!("{what}: {text}")).collect()
        };
        events.extend(missing(before, after, began));
        events.extend(missing(after, before, ended));
    }
    events
}

/// All states, by the name of what they belong to.
fn states(status: &Status) -> BTreeMap<String, String> {
    let mut states = BTreeMap::new();
    let mut add = |subject: String, state: &str| drop(states.insert(subject, state.to_owned()));
    add("datapath".to_owned(), status.datapath.name());
    add("fast path".to_owned(), &status.fast_path.state);
    for tunnel in &status.tunnels {
        add(format!("tunnel {}", tunnel.name), &tunnel.state);
        if let Some(state) = tunnel.command.as_ref().and_then(|command| command["state"].as_str()) {
            add(format!("command of {}", tunnel.name), state);
        }
        for probe in &tunnel.probes {
            add(format!("probe of {} by {}", probe.target, probe.tunnel), probe.verdict.name());
        }
    }
    for policy in &status.policies {
        for (family, by) in &policy.active {
            add(format!("policy {}, {family}, leaves by", policy.name), by);
        }
        for (family, by) in &policy.carried_by {
            add(format!("policy {}, {family}, decided by", policy.name), by);
        }
    }
    states
}
