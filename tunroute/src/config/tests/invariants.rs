//! Any input is refused with a message, or keeps what the types promise.

use std::collections::HashSet;

use proptest::{prelude::*, strategy::ValueTree};

use crate::config::{Config, ConfigError, Loaded};

/// Reports can be made, and point into the text.
fn reported(text: &str, error: &ConfigError) {
    assert!(!error.problems().is_empty());
    let report = error.render(false);
    for problem in error.problems() {
        let Some((line, column)) = problem.position() else { panic!("no place: {error}") };
        assert!(line <= text.matches('\n').count() + 2, "{error}");
        assert!(column >= 1 && !problem.help().is_empty() && !problem.message().is_empty(), "{error}");
        assert!(!problem.line().contains('\n'), "{error}");
    }
    assert!(!report.contains("Failed to read"), "{report}");
}

/// What the documentation of the types promises.
fn valid(config: &Config) {
    assert!(config.band.checked_add(128).is_some());
    for reserved in [0, 1000, 32766, 32767] {
        assert!(!(config.band - 2..=config.band + 128).contains(&reserved));
    }
    let table = |table: Option<u32>| assert!(!matches!(table, Some(0 | 253 | 254 | 255)));
    let mut tunnels = HashSet::new();
    for tunnel in &config.tunnels {
        assert!((1..=15).contains(&tunnel.name.len()) && !tunnel.name.contains(['/', ':', '%', '*', ' ']));
        assert!(tunnels.insert(&tunnel.name));
        let roles = config.interfaces.ingress.iter().chain(&config.interfaces.uplink);
        assert!(!roles.into_iter().any(|pattern| pattern.matches(&tunnel.name)));
        table(tunnel.table);
        for command in [&tunnel.up, &tunnel.down].into_iter().flatten() {
            assert!(!command[0].is_empty());
        }
        assert!(tunnel.start_limit.burst >= 1 && !tunnel.start_limit.interval.is_zero());
        for probe in &tunnel.probes {
            assert!(!probe.interval.is_zero() && !probe.timeout.is_zero() && probe.timeout <= probe.interval);
            assert!(probe.fail >= 1 && probe.rise >= 1);
        }
    }
    let (mut names, mut sources, mut tables) = (HashSet::new(), HashSet::new(), HashSet::new());
    let mut followed = HashSet::new();
    for policy in &config.policies {
        assert!(names.insert(&policy.name));
        table(policy.table);
        assert!(policy.table.is_none_or(|table| tables.insert(table)));
        assert!(policy.via.is_empty() == policy.main && (!policy.from.is_empty() || !policy.follow.is_empty()));
        for net in &policy.from {
            assert_eq!(*net, net.trunc());
            assert!(sources.insert(net));
        }
        assert!(policy.followed.is_empty() && policy.follow.iter().all(|pattern| followed.insert(pattern)));
        assert!(policy.via.iter().all(|name| tunnels.contains(name)));
        assert_eq!(policy.via.iter().collect::<HashSet<_>>().len(), policy.via.len());
    }
}

fn hold(text: &str) -> bool {
    match Loaded::parse("t.toml", text) {
        Ok(loaded) => valid(&loaded.config),
        Err(error) => {
            reported(text, &error);
            return false;
        }
    }
    true
}

/// Values right and wrong, for any key.
fn value() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "a",
        "b",
        "wg0",
        "a*",
        "*",
        ".",
        "connected",
        "@lan0",
        "2a02::1",
        "2a02::/32",
        "2a02::/33",
        "10.0.0.0/8",
        "10.0.0.1",
        "::/0",
        "0.0.0.0/0",
        "fe80::1",
        "::ffff:1.2.3.4",
        "1.2.3.4:80",
        "[::2]:80",
        "5s",
        "1ms",
        "0s",
        "10",
        "both",
        "ebpf",
        "shadow",
        "next",
        "unreachable",
        "é",
        "à",
        "\\u0000",
        "\\n",
        "",
        "x/y",
        "584542046090y1s",
    ]);
    let string = word.prop_map(|word| format!("\"{word}\""));
    let scalar = prop_oneof![
        6 => string,
        1 => any::<i64>().prop_map(|number| number.to_string()),
        2 => (0_u32..300).prop_map(|number| number.to_string()),
        1 => prop::sample::select(vec!["true", "false", "1.5", "nan", "1979-05-27", "kernel", "'''\nx\n'''"]).prop_map(str::to_owned),
    ];
    prop_oneof![3 => scalar.clone(), 1 => prop::collection::vec(scalar, 0..4).prop_map(|list| format!("[{}]", list.join(", ")))]
}

fn key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "datapath",
        "band",
        "bypass-netfilter",
        "metrics",
        "ingress",
        "uplink",
        "table",
        "via",
        "up",
        "down",
        "start-limit",
        "start-limit.burst",
        "start-limit.interval",
        "probe.target",
        "probe.source",
        "probe.interval",
        "probe.timeout",
        "probe.fail",
        "probe.rise",
        "probe.hold-down",
        "name",
        "from",
        "on-down",
        "exempt",
        "allow-default",
        "x",
    ])
}

/// Something like a configuration.
fn document() -> impl Strategy<Value = String> {
    let header = prop::sample::select(vec![
        "[interfaces]",
        "[tunnel.a]",
        "[tunnel.b]",
        "[tunnel.wg0]",
        "[tunnel]",
        "[[tunnel.a.probe]]",
        "[[policy]]",
        "[policy]",
        "[tunnel.a.probe]",
        "[tunnel.\"a b\"]",
    ]);
    let line = prop_oneof![
        1 => header.prop_map(str::to_owned),
        4 => (key(), value()).prop_map(|(key, value)| format!("{key} = {value}")),
    ];
    prop::collection::vec(line, 0..20).prop_map(|lines| lines.join("\n"))
}

/// A whole configuration with values of the right kind, most of them valid.
fn likely() -> impl Strategy<Value = String> {
    let policy = (
        prop::collection::btree_set((0_u8..4, 16_u8..40), 1..5),
        prop::sample::subsequence(vec!["a", "b", "c"], 1..=3),
        prop::option::of(1_u32..260),
        any::<bool>(),
    );
    let tunnel = (prop::option::of(1_u32..260), 1_u32..4, 1_u32..20, 1_u32..20);
    (prop::collection::vec(policy, 0..4), prop::collection::vec(tunnel, 3), 0_u32..40_000).prop_map(
        |(policies, tunnels, band)| {
            let table = |table: Option<u32>| table.map(|table| format!("table = {table}\n")).unwrap_or_default();
            let mut text = format!("band = {band}\n");
            for (name, (number, fail, interval, timeout)) in ["a", "b", "c"].iter().zip(tunnels) {
                text += &format!(
                    "[tunnel.{name}]\n{}probe = {{ target = \"::2\", fail = {fail}, interval = \"{interval}s\", \
                     timeout = \"{timeout}s\" }}\n",
                    table(number)
                );
            }
            for (index, (from, via, number, default)) in policies.into_iter().enumerate() {
                let from: Vec<String> =
                    from.into_iter().map(|(net, length)| format!("2a02:{net}::/{}", length.max(32))).collect();
                text += &format!(
                    "[[policy]]\nname = \"p{index}\"\nfrom = {from:?}\nvia = {via:?}\nallow-default = {default}\n{}",
                    table(number)
                );
            }
            text
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text(text in any::<String>()) {
        hold(&text);
    }

    #[test]
    fn characters_of_toml(text in "[\\[\\]{}=\"'.,#\\\\ab1:/% \t\r\n\u{1b}é-]{0,60}") {
        hold(&text);
    }

    #[test]
    fn like_a_configuration(text in document()) {
        hold(&text);
    }

    #[test]
    fn any_value(key in key(), text in any::<String>()) {
        let quoted = toml::Value::String(text).to_string();
        hold(&super::tunnel(&format!("{key} = {quoted}")));
        hold(&super::policy(&format!("{key} = {quoted}")));
        hold(&super::from(&quoted, ""));
        hold(&format!("{key} = {quoted}\n[interfaces]\n{key} = {quoted}"));
    }

    #[test]
    fn any_duration(text in "[0-9]{0,21}(y|M|w|d|h|m|s|ms|us|ns|µs| ){0,2}[0-9]{0,10}(s|ms|ns|.)?") {
        hold(&super::tunnel(&format!("start-limit.interval = {}", toml::Value::String(text))));
    }

    #[test]
    fn broken_off(cut in 0_usize..1000, at in 0_usize..1000, with in any::<char>()) {
        let story = include_str!("../../../examples/tunroute.toml");
        let mut text: String = story.chars().take(cut * 5).collect();
        hold(&text);
        let at = text.floor_char_boundary(at * 5);
        text.insert(at, with);
        hold(&text);
    }
}

/// The strategy above does reach configurations that are taken: otherwise it would show nothing about them.
#[test]
fn likely_ones_are_taken() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut taken = 0;
    for _ in 0..512 {
        let text = likely().new_tree(&mut runner).expect("a text").current();
        taken += usize::from(hold(&text));
    }
    assert!(taken > 20, "only {taken} of 512");
}
