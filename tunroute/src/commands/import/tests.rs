//! Scripts in, configurations out.

use std::collections::BTreeMap;

use super::{Draft, File, draft, parse};
use crate::config::{Config, OnDown, Policy};

const STORY: &str = r#"
echo "200 sixxs0" >> /etc/iproute2/rt_tables
echo '201	sixxs1' >>/etc/iproute2/rt_tables
/sbin/ip -6 route add default dev sixxs0 table sixxs0   # the first
ip -6 route add default dev sixxs1 table sixxs1
sudo ip -6 rule add from 2a02::1 table sixxs0; ip -6 rule add from 2a02::2 table sixxs1
"#;

pub(super) fn import(script: &str) -> (Draft, Config) {
    import_files(&[File { path: "script", text: script }])
}

/// What the files amount to, and the configuration read again: what is written must be what `check` takes.
pub(super) fn import_files(files: &[File<'_>]) -> (Draft, Config) {
    let draft = draft(&parse(files, BTreeMap::new(), &|_| None));
    let text = draft.write();
    let config = Config::parse("t.toml", &text).unwrap_or_else(|error| panic!("{text}\n{error}"));
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
        exempt_routed: false,
        allow_default: false,
        main: false,
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
    noted("ip rule add fwmark 1 lookup 9", "a policy can only do");
    noted("ip -6 rule add from 2001:db8::/48 to 2001:db8:1::/48 lookup 9", "a policy can only do");
    noted("ip rule add from all lookup 9", "for all sources");
    noted("ip rule add from 10.0.0.0/8 lookup main", "a table of the kernel, as no policy does");
    noted("ip rule add from 10.0.0.0/8 lookup 9 pref 32800", "after the rule for the main table");
    noted("ip rule add from 10.0.0.0/8 lookup 9", "table 9 has no default route for IPv4 by a device");
    noted(
        "ip rule add from $ADDRESS lookup 9",
        "script:7: `$ADDRESS` has no known value: ip rule add from $ADDRESS lookup 9",
    );
    noted("ip rule add from 10.0.0.0/8 lookup nowhere", "names a table `nowhere`");
    noted("ip route add default dev a table", "there is nothing after `table`");
    noted("ip -6 route add 2001:db8::/32 dev eth7 table sixxs0", "the main table does not have the same route");
    noted("ip -6 route add default dev sixxs0 mtu 1280 table sixxs0 metric 9", "`mtu 1280` is left out");
    noted("ip -6 rule add from 2a02::2 table sixxs0 pref 32765", "takes its packets");
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
        let draft = draft(&parse(&[File { path: "script", text: &script }], BTreeMap::new(), &|_| None));
        assert!(draft.is_empty(), "{draft:?}");
    }
}

/// The policies in words: `name: from by via`.
fn policies(config: &Config) -> Vec<String> {
    let list = |policy: &Policy| policy.from.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    config
        .policies
        .iter()
        .map(|policy| format!("{}: {} by {}", policy.name, list(policy), policy.via.join(" ")))
        .collect()
}

#[test]
fn wg_quick_files() {
    let file = |interface: &str, allowed: &str| {
        format!(
            "# A comment.\n[Interface]\nPrivateKey = x=\nAddress = 10.9.0.2/24, 2001:db8:9::2/64\n{interface}\n[Peer]\n\
             PublicKey = y=\nEndpoint = 192.0.2.7:51820\nallowedips = {allowed}\n"
        )
    };
    let wg0 = |text: &str| import_files(&[File { path: "/etc/wireguard/wg0.conf", text }]);
    let rules = "PostUp = ip rule add from 10.9.0.2 table 200; ip -6 rule add from 2001:db8:9::2 table 200\n\
                 PostDown = ip rule del from 10.9.0.2 table 200";
    let expected = ["table200: 10.9.0.2/32 2001:db8:9::2/128 by wg0"];
    // By its own table, or by hand.
    for (interface, allowed) in [
        (format!("Table = 200 # ours\n{rules}"), "0.0.0.0/0, ::/0"),
        (
            format!(
                "Table = off\nPostUp = ip route add default dev %i table 200\nPostUp = ip -6 route add default dev %i table 200\n{rules}"
            ),
            "0.0.0.0/0",
        ),
    ] {
        let (draft, config) = wg0(&file(&interface, allowed));
        assert_eq!(draft.notes(), [""; 0], "{interface}");
        assert_eq!(policies(&config), expected, "{interface}");
    }
    // A table that nothing leads to.
    let text = file("Table = 200", "::/0");
    let unused = draft(&parse(&[File { path: "wg0.conf", text: &text }], BTreeMap::new(), &|_| None));
    assert!(unused.is_empty());
    let [note] = unused.notes() else { panic!("{:?}", unused.notes()) };
    assert!(note.starts_with("no rule leads to table 200, which has a default route by wg0"), "{note}");
    // A tunnel that takes everything is no policy; what else there is, is.
    let all = file(
        &format!("PostUp = ip route add default dev %i table 200\n{}", rules.lines().next().unwrap()),
        "0.0.0.0/0",
    );
    let (draft, config) = wg0(&all.replace("; ip -6 rule add from 2001:db8:9::2 table 200", ""));
    assert_eq!(policies(&config), ["table200: 10.9.0.2/32 by wg0"]);
    let noted: Vec<_> = draft.notes().iter().filter(|note| note.contains("a policy can only do")).collect();
    assert_eq!(noted.len(), 2, "{:?}", draft.notes());
    assert!(draft.notes().iter().any(|note| note.contains("not fwmark 51820")), "{:?}", draft.notes());
}

#[test]
fn networkd_files() {
    let tunnel = "[Match]\nName=sixxs0\n\n[Route]\nTable=200\nDestination=::/0\n\n[Route]\nDestination=0.0.0.0/0\n\
                  Gateway=10.9.0.1\nTable=200\nGatewayOnLink=yes\n\n[Route]\nDestination=2001:db8:5::/48\nType=throw\nTable=200\n";
    let rules = "[RoutingPolicyRule]\nFrom=2a02::1\nTable=200\nPriority=1000\n\n\
                 ; the other family\n[RoutingPolicyRule]\nPriority=1000\nTable=200\nFrom=192.0.2.0/24\nFamily=ipv4\n";
    let uplink = format!(
        "[Match]\nName=net0\n[Network]\nAddress=198.51.100.7/24\nGateway=198.51.100.1\nGateway=fe80::1\n{rules}"
    );
    let lan = "[Match]\nName=lan0\n[Address]\nAddress=10.1.0.1/24\n";
    let files = [("10-a", tunnel), ("20-b", &uplink), ("30-c", lan)].map(|(path, text)| File { path, text });
    let (draft, config) = import_files(&files);
    assert_eq!(draft.notes(), [""; 0]);
    assert_eq!(policies(&config), ["table200: 192.0.2.0/24 2a02::1/128 by sixxs0"]);
    assert_eq!(config.tunnels[0].via_v4, "10.9.0.1".parse().ok());
    assert_eq!(config.policies[0].exempt.iter().map(ToString::to_string).collect::<Vec<_>>(), ["2001:db8:5::/48"]);
    let names = |patterns: &[crate::config::DevicePattern]| patterns.iter().map(|p| p.0.clone()).collect::<Vec<_>>();
    assert_eq!(
        (names(&config.interfaces.uplink), names(&config.interfaces.ingress)),
        (vec!["net0".into()], vec!["lan0".into()])
    );

    for (section, note) in [
        ("[RoutingPolicyRule]\nFrom=10.0.0.0/8\nTo=10.1.0.0/16\nTable=9", "a policy can only do"),
        ("[RoutingPolicyRule]\nFrom=10.0.0.0/8\nInvertRule=yes\nTable=9", "InvertRule=yes"),
        ("[RoutingPolicyRule]\nFirewallMark=7\nFamily=both\nTable=9", "ip -6 rule add fwmark 7 table 9"),
        ("[RoutingPolicyRule]\nFrom=10.0.0.0/8\nFamily=ipv5\nTable=9", "`ipv5` is not a family"),
        ("[RoutingPolicyRule]\nFrom=10.0.0.0/8\nTable=nowhere", "names a table `nowhere`"),
        ("[Route]\nGateway=_dhcp4\nTable=200", "`_dhcp4` is known only when"),
        ("[DHCPv4]\nRouteTable=200", "known only when a server"),
        ("[Route]\nDestination=::/0\nMetric=9\nTable=200\nMTUBytes=1280", "`mtu 1280` is left out"),
        ("[Match]\nName=wg*\n[Route]\nDestination=::/0\nTable=9", "must be one name"),
    ] {
        let last = if section.starts_with("[Match]") {
            section.to_owned()
        } else {
            format!("[Match]\nName=sixxs0\n{section}")
        };
        let files = [("a", tunnel), ("b", rules), ("c", &last)].map(|(path, text)| File { path, text });
        let (draft, config) = import_files(&files);
        assert!(draft.notes().iter().any(|noted| noted.contains(note)), "{section}: {:?}", draft.notes());
        assert_eq!(config.policies.len(), 1, "{section}");
    }
}

#[test]
fn the_rule_for_the_local_table_may_stand_anywhere() {
    let (draft, _) = import(&format!("ip rule add from all table local pref 32765\n{STORY}"));
    assert_eq!(draft.notes(), [""; 0]);
}

#[test]
fn a_script_that_begins_with_a_test_is_a_script() {
    let (_, config) = import(&format!("[ -x /sbin/ip ] || exit 1\n{STORY}"));
    assert_eq!(config.policies.len(), 2);
}
