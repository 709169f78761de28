//! Warnings about what is legal, and probably wrong.

use super::take;

/// A file with these policies, each as its sources and what else it says.
fn file(policies: &[(&str, &str)]) -> String {
    let mut text = "[interfaces]\nuplink = [\"net0\"]\n[tunnel.t]\n".to_owned();
    for (index, (from, rest)) in policies.iter().enumerate() {
        text += &format!("[[policy]]\nname = \"p{index}\"\nvia = \"t\"\nfrom = [{from}]\n{rest}\n");
    }
    text
}

#[track_caller]
fn warned(text: &str, messages: &[&str]) {
    let warnings = take(text).warnings;
    assert_eq!(warnings.iter().map(|warning| warning.message()).collect::<Vec<_>>(), messages, "{text}");
}

#[test]
fn a_policy_that_others_take_everything_from() {
    let nothing = ["the policy `p0` decides nothing"];
    for (policies, messages) in [
        (&[("\"10.0.0.0/8\"", ""), ("\"10.0.0.0/9\", \"10.128.0.0/9\"", "")][..], &nothing[..]),
        (&[("\"10.0.0.0/8\"", ""), ("\"10.0.0.0/9\"", ""), ("\"10.128.0.0/9\"", "")], &nothing),
        // By halves of halves, and by a prefix of its own that is taken in turn.
        (
            &[("\"10.0.0.0/8\", \"10.0.0.0/9\"", ""), ("\"10.0.0.0/10\", \"10.64.0.0/10\", \"10.128.0.0/9\"", "")],
            &nothing,
        ),
        (&[("\"2a02::/127\"", ""), ("\"2a02::\", \"2a02::1\"", "")], &nothing),
        (&[("\"::/0\"", "allow-default = true"), ("\"::/1\", \"8000::/1\"", "allow-default = true")], &nothing),
        // One address is left.
        (&[("\"10.0.0.0/30\"", ""), ("\"10.0.0.0/31\", \"10.0.0.2\"", "")], &[]),
        (&[("\"10.0.0.0/8\", \"192.168.0.0/16\"", ""), ("\"10.0.0.0/9\", \"10.128.0.0/9\"", "")], &[]),
        // What falls through comes to it.
        (&[("\"10.0.0.0/8\"", ""), ("\"10.0.0.0/9\", \"10.128.0.0/9\"", "on-down = \"next\"")], &[]),
        (&[("\"10.0.0.0/8\", \"10.0.0.0/9\", \"10.128.0.0/9\"", "")], &[]),
    ] {
        warned(&file(policies), messages);
    }
}

#[test]
fn sources_of_an_uplink() {
    warned(&file(&[("\"@net0\"", "")]), &["the sources are those of the uplink `net0`"]);
    warned(&file(&[("\"@lan0\"", "")]), &[]);
}

#[test]
fn inside_routes_without_programs_at_the_uplink() {
    let window = "when an inside route is withdrawn, packets to there leave by the uplink for some milliseconds";
    for (datapath, exempt, messages) in [
        ("kernel", "\"routed\"", &[window][..]),
        ("shadow", "\"connected\", \"routed\"", &[window]),
        ("kernel", "\"connected\"", &[]),
        ("both", "\"routed\"", &[]),
        ("ebpf", "\"routed\"", &[]),
    ] {
        let policies = file(&[("\"10.0.0.0/8\"", &format!("exempt = [{exempt}]"))]);
        warned(&format!("datapath = \"{datapath}\"\n{policies}"), messages);
    }
}

#[test]
fn programs_without_rules_at_unknown_ways_out() {
    let none = "no device is an `uplink`, so rules stand in for the programs";
    let pattern = "a new device that matches `net*` is not guarded at first, so rules stand in";
    for (datapath, uplink, messages) in [
        ("ebpf", "[]", &[none][..]),
        ("ebpf", "[\"net0\"]", &[]),
        ("ebpf", "[\"net0\", \"net*\"]", &[pattern]),
        ("both", "[\"net*\"]", &[]),
        ("both", "[]", &[]),
    ] {
        let text = file(&[("\"10.0.0.0/8\"", "")]).replace("[\"net0\"]", uplink);
        warned(&format!("datapath = \"{datapath}\"\n{text}"), messages);
    }
}

#[test]
fn a_source_that_goes_to_the_uplink_while_its_tunnel_is_down() {
    let next = "on-down = \"next\"";
    let leaves = |source: &str| format!("while no tunnel is up, packets from {source} leave by the uplink");
    for (policies, source) in [
        (&[("\"2a02::1\"", next)][..], Some("2a02::1/128")),
        (&[("\"10.0.0.1\", \"192.0.2.0/24\"", next)], Some("192.0.2.0/24")),
        (&[("\"2a02::1\"", "")], None),
        // What a router translates.
        (&[("\"10.0.0.0/8\", \"192.168.1.1\", \"172.16.0.0/12\", \"100.64.0.0/10\", \"fd00::/8\"", next)], None),
        (&[("\"100.128.0.1\"", next)], Some("100.128.0.1/32")),
        // The policy around it keeps it back.
        (&[("\"2a02::/32\"", ""), ("\"2a02::1\"", next)], None),
    ] {
        warned(&file(policies), &source.map(leaves).iter().map(String::as_str).collect::<Vec<_>>());
    }
    // Without uplinks nothing is known of providers.
    warned(&file(&[("\"2a02::1\"", next)]).replace("uplink = [\"net0\"]", ""), &[]);
}
