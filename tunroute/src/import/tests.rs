//! Scripts in, configurations out.

use std::collections::BTreeMap;

use super::{Draft, draft, parse};
use crate::config::{Config, OnDown, Policy};

const STORY: &str = r#"
echo "200 sixxs0" >> /etc/iproute2/rt_tables
echo '201	sixxs1' >>/etc/iproute2/rt_tables
/sbin/ip -6 route add default dev sixxs0 table sixxs0   # the first
ip -6 route add default dev sixxs1 table sixxs1
sudo ip -6 rule add from 2a02::1 table sixxs0; ip -6 rule add from 2a02::2 table sixxs1
"#;

fn import(script: &str) -> (Draft, Config) {
    let draft = draft(&parse(script, BTreeMap::new()));
    let text = draft.write();
    let config = Config::parse("t.toml", &text).unwrap_or_else(|error| panic!("{text}\n{error}"));
    assert!(text.lines().all(|line| line.chars().count() <= 80 || line.starts_with("#   ip ")), "{text}");
    (draft, config)
}

/// The notes on a script that has nothing but this besides the story.
#[track_caller]
fn noted(line: &str, note: &str) {
    let (draft, config) = import(&format!("{STORY}{line}\n"));
    assert!(draft.notes().iter().any(|noted| noted.contains(note)), "{line}: {:?}", draft.notes());
    assert_eq!(config.policies.len(), 2, "{line}");
}

#[test]
fn the_story() {
    let (draft, config) = import(STORY);
    assert_eq!(draft.notes(), [""; 0]);
    let policy = |name: &str, from: &str| Policy {
        name: name.to_owned(),
        table: None,
        from: vec![from.parse().unwrap()],
        follow: vec![],
        followed: vec![],
        via: vec![name.to_owned()],
        on_down: OnDown::Next,
        exempt: vec![],
        exempt_connected: false,
    };
    assert_eq!(config.policies, [policy("sixxs0", "2a02::1/128"), policy("sixxs1", "2a02::2/128")]);
    insta::assert_snapshot!(draft.write());
}

#[test]
fn what_a_table_has_becomes_the_policy() {
    for (script, via, on_down, exempt) in [
        ("ip route add default via 10.9.0.1 dev vx0 table 7", &["vx0"][..], OnDown::Next, &[][..]),
        (
            "ip route add default dev b table 7 metric 20\nip route add default dev a table 7 metric 10",
            &["a", "b"],
            OnDown::Next,
            &[],
        ),
        (
            "ip route add default dev a table 7\nip route add blackhole default table 7 metric 4000",
            &["a"],
            OnDown::Blackhole,
            &[],
        ),
        (
            "ip route add default dev a table 7\nip route add prohibit default table 7 metric 4000\n\
             ip route add throw 10.0.0.0/8 table 7",
            &["a"],
            OnDown::Prohibit,
            &["10.0.0.0/8"],
        ),
        // A copy of a route of the main table.
        (
            "ip route add 10.1.0.0/16 dev lan0\nip route add 10.1.0.0/16 dev lan0 proto static table 7\n\
             ip route add default dev a table 7",
            &["a"],
            OnDown::Next,
            &["10.1.0.0/16"],
        ),
    ] {
        let (draft, config) = import(&format!("{script}\nip rule add from 192.0.2.0/24 lookup 7 pref 100"));
        assert_eq!(draft.notes(), [""; 0], "{script}");
        let [policy] = config.policies.as_slice() else { panic!("{script}: {:?}", config.policies) };
        assert_eq!(policy.via, via, "{script}");
        assert_eq!((policy.on_down, &policy.from[0].to_string()), (on_down, &"192.0.2.0/24".to_owned()), "{script}");
        assert_eq!(policy.exempt.iter().map(ToString::to_string).collect::<Vec<_>>(), exempt, "{script}");
    }
}

#[test]
fn a_gateway_belongs_to_the_tunnel() {
    let (_, config) = import(
        "ip route add default via 10.9.0.1 dev vx0 table 7\nip -6 route add default via fe80::1 dev vx0 table 7\n\
         ip rule add from 192.0.2.1 lookup 7\nip -6 rule add from 2001:db8::/48 lookup 7",
    );
    let [tunnel] = config.tunnels.as_slice() else { panic!("{:?}", config.tunnels) };
    assert_eq!((tunnel.via_v4, tunnel.via_v6), ("10.9.0.1".parse().ok(), "fe80::1".parse().ok()));
    // One policy for both families, which leave alike.
    assert_eq!(config.policies.iter().map(|policy| policy.from.len()).collect::<Vec<_>>(), [2]);
}

#[test]
fn families_that_leave_differently_are_two_policies() {
    let (_, config) = import(
        "ip route add default dev a table 7\nip -6 route add default dev b table 7\n\
         ip rule add from 192.0.2.1 lookup 7\nip -6 rule add from 2001:db8::/48 lookup 7",
    );
    let policies: Vec<_> =
        config.policies.iter().map(|policy| (policy.name.as_str(), policy.via[0].as_str())).collect();
    assert_eq!(policies, [("table7", "a"), ("table7-v6", "b")]);
}

#[test]
fn the_other_devices_are_found_in_the_main_table() {
    let (_, config) = import(&format!(
        "{STORY}ip route add default via 192.0.2.1 dev net0\nip route add 10.0.0.0/24 dev lan0 scope link\n\
         ip -6 route add fe80::/64 dev other\nip -6 route add 2a02::/64 dev sixxs0"
    ));
    let names = |patterns: &[crate::config::DevicePattern]| patterns.iter().map(|p| p.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(&config.interfaces.uplink), ["net0"]);
    assert_eq!(names(&config.interfaces.ingress), ["lan0"]);
}

#[test]
fn what_cannot_be_expressed_is_noted() {
    noted("ip rule add fwmark 1 lookup 9", "only rules of the form");
    noted("ip -6 rule add from 2001:db8::/48 to 2001:db8:1::/48 lookup 9", "only rules of the form");
    noted("ip rule add from all lookup 9", "for all sources");
    noted("ip rule add from 10.0.0.0/8 lookup main", "no policy applies to 10.0.0.0/8");
    noted("ip rule add from 10.0.0.0/8 lookup 9 pref 32800", "asked after the main table");
    noted("ip rule add from 10.0.0.0/8 lookup 9", "table 9 has no default route for IPv4 by a device");
    noted("ip rule add from $ADDRESS lookup 9", "`$ADDRESS` is no prefix");
    noted("ip rule add from 10.0.0.0/8 lookup nowhere", "no table `nowhere`");
    noted("ip route add default dev a table", "nothing after `table`");
    noted("ip -6 route add 2001:db8::/32 dev eth7 table sixxs0", "the main table does not have the same route");
    noted("ip -6 route add default dev sixxs0 mtu 1280 table sixxs0 metric 9", "`mtu 1280` is left out");
    noted("ip -6 rule add from 2a02::2 table sixxs0 pref 32000", "takes its packets");
}

#[test]
fn a_rule_that_is_never_reached_is_left_out() {
    // Without priorities, the rule that was added last is asked first: the /32 is never reached.
    let tables = "ip route add default dev a table 7\nip route add default dev b table 8\n";
    for (rules, reached) in [
        ("ip rule add from 10.0.0.1 lookup 8\nip rule add from 10.0.0.0/8 lookup 7", 1),
        ("ip rule add from 10.0.0.0/8 lookup 7\nip rule add from 10.0.0.1 lookup 8", 2),
        ("ip rule add from 10.0.0.1 lookup 8 pref 10\nip rule add from 10.0.0.0/8 lookup 7 pref 20", 2),
    ] {
        let (_, config) = import(&format!("{tables}{rules}"));
        assert_eq!(config.policies.len(), reached, "{rules}");
    }
}

#[test]
fn tunroutes_own_rules_and_routes_are_not_imported() {
    for protocol in ["116", "tunroute"] {
        let script = format!(
            "ip route add default dev a table 7 proto {protocol}\nip rule add from 10.0.0.1 lookup 7 proto {protocol}"
        );
        let draft = draft(&parse(&script, BTreeMap::new()));
        assert!(draft.is_empty() && draft.notes().is_empty(), "{draft:?}");
    }
}
