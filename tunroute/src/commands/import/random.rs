//! Random files: the result is always valid, and no rule is lost.

use std::net::Ipv4Addr;

use super::{
    File,
    tests::{import, import_files},
};

/// Words that scripts and files consist of, and some that they should not have.
const WORDS: &[&str] = &[
    "ip",
    "ip -6",
    "/sbin/ip",
    "-batch",
    "-",
    "-n",
    "rule",
    "ru",
    "route",
    "r",
    "add",
    "a",
    "del",
    "flush",
    "replace",
    "from",
    "to",
    "table",
    "tab",
    "lookup",
    "prio",
    "pref",
    "via",
    "dev",
    "metric",
    "default",
    "throw",
    "unreachable",
    "nexthop",
    "not",
    "fwmark",
    "inet6",
    "200",
    "0x10",
    "main",
    "local",
    "4294967295",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "127.0.0.1",
    "0.0.0.0/0",
    "0.0.0.0/1",
    "2001:db8::/32",
    "::ffff:10.0.0.0/104",
    "fe80::1",
    "wg0",
    "lo",
    r#"a\"b"#,
    "x*",
    "\u{7}",
    "é",
    "$X",
    "${X}",
    "$(x)",
    "`x`",
    "X=wg0",
    "'",
    "\"",
    "\\",
    "\n",
    "\n",
    ";",
    "&&",
    "||",
    "|",
    "(",
    ")",
    "<<EOF",
    "EOF",
    "if",
    "fi",
    "for i in a b; do",
    "done",
    "f() {",
    "}",
    "case x in",
    "esac",
    ";;",
    ">",
    "sh -c",
    "eval",
    "echo",
    "rt_tables",
    "ip rule add from 10.7.0.0/16 table 200",
    "ip route add default dev wg0 table 200",
];

/// Names of files, by which their kinds are told.
const PATHS: &[&str] = &[
    "a.sh",
    "wg0.conf",
    "20-a.network",
    "a.service",
    "interfaces",
    "rule-eth0",
    "route6-eth0",
    "rt_tables",
    "a.yaml",
    "x\ny\u{7}.sh",
];

/// Beginnings that make a text a file of some kind.
const BEGINNINGS: &[&str] = &[
    "",
    "#!/bin/sh\n",
    "[Interface]\nPostUp = ",
    "[Match]\nName=wg0\n[Route]\nTable=",
    "iface wg0 inet manual\nup ",
    "[RoutingPolicyRule]\nFrom=",
];

proptest::proptest! {
    /// Whatever is in a file, the result is a configuration that `check` takes.
    #[test]
    fn the_result_is_always_valid(
        words in proptest::collection::vec(proptest::sample::select(WORDS), 0..60),
        path in proptest::sample::select(PATHS),
        beginning in proptest::sample::select(BEGINNINGS),
        noise in ".{0,20}",
    ) {
        let text = format!("{beginning}{} {noise}", words.join(" "));
        import_files(&[File { path, text: &text }]);
    }

    /// Each rule of a script is in the result, or in a note.
    #[test]
    fn no_rule_is_lost(
        rules in proptest::collection::vec((6u8..=32, proptest::num::u32::ANY, 1u32..5, 1u32..40_000), 1..20),
        routes in proptest::collection::vec(
            (1u32..5, "[a-c*' é$/-]{1,3}", proptest::num::u32::ANY, proptest::bool::ANY), 0..8
        ),
    ) {
        let mut script = String::new();
        let mut sources = Vec::new();
        for (length, address, table, priority) in rules {
            // Few addresses, so that many prefixes are nested.
            let address = Ipv4Addr::from(0x0a00_0000 | address & 0x0003_0303);
            let net = ipnet::Ipv4Net::new(address, length).unwrap().trunc();
            script += &format!("ip rule add from {net} table {table} pref {priority}\n");
            sources.push(net);
        }
        for (table, device, gateway, has_gateway) in routes {
            let via = if has_gateway { format!("via {} ", Ipv4Addr::from(gateway)) } else { String::new() };
            script += &format!("ip route append default {via}dev \"{device}\" table {table}\n");
        }
        let (draft, config) = import(&script);
        for (net, line) in sources.into_iter().zip(1..) {
            let is_source = config.policies.iter().any(|policy| policy.from.contains(&net.into()));
            let start = format!("script:{line}: ");
            let is_noted = draft.notes().iter().any(|note| note.starts_with(&start) || note.contains(&net.to_string()));
            proptest::prop_assert!(is_source || is_noted, "{net}:\n{script}\n{}", draft.write());
        }
    }
}
