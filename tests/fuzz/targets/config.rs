//! The configuration: whatever is written is refused in words that point at it; or keeps what its types promise, means the
//! same when it is printed and read again, and compiles to rules, routes and maps in which every reference resolves.
#![no_main]

mod few_words;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use arbitrary::{Arbitrary as _, Unstructured};
use libfuzzer_sys::fuzz_target;
use toml::{Table, Value};
use tunroute::{
    policy::compile::{FastInputs, Inputs, compile},
    config::{Config, Listen, Mss, OnDown, Probe, ProbeTarget, Unmatched},
    policy::fast::{FastState, Open},
    policy::net::{KernelState, Link, LinkLayer, Rule, RuleAction},
    policy::plan::{number_slots, plan}};
use tunroute_common::maps::MAX_NESTING;

use crate::few_words::FewWords;

/// The longest duration of a configuration.
const MONTH: Duration = Duration::from_secs(30 * 24 * 60 * 60);

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> Value {
    Value::Array(items.into_iter().map(|item| Value::String(item.to_string())).collect())
}

fn duration(duration: Duration) -> Value {
    Value::String(format!("{}ns", duration.as_nanos()))
}

fn table<const N: usize>(entries: [(&str, Option<Value>); N]) -> Value {
    Value::Table(entries.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect())
}

fn probe(probe: &Probe) -> Value {
    let target = match probe.target {
        ProbeTarget::Echo(address) => address.to_string(),
        ProbeTarget::Tcp(address) => address.to_string(),
    };
    table([
        ("target", Some(target.into())),
        ("source", probe.source.map(|source| source.to_string().into())),
        ("interval", Some(duration(probe.interval))),
        ("timeout", Some(duration(probe.timeout))),
        ("fail", Some(i64::from(probe.fail).into())),
        ("rise", Some(i64::from(probe.rise).into())),
        ("hold-down", Some(duration(probe.hold_down))),
    ])
}

/// The configuration as a file.
fn print(config: &Config) -> String {
    let tunnels: Table = config
        .tunnels
        .iter()
        .map(|tunnel| {
            let via =
                tunnel.via_v4.map(|via| via.to_string()).into_iter().chain(tunnel.via_v6.map(|via| via.to_string()));
            let via: Vec<String> = via.collect();
            let limit = tunnel.start_limit;
            let limit = [("burst", Some(i64::from(limit.burst).into())), ("interval", Some(duration(limit.interval)))];
            let value = table([
                ("table", tunnel.table.map(|table| i64::from(table).into())),
                ("via", (!via.is_empty()).then(|| list(via))),
                ("up", tunnel.up.as_ref().map(list)),
                ("down", tunnel.down.as_ref().map(list)),
                ("start-limit", Some(table(limit))),
                (
                    "mss",
                    tunnel.mss.map(|mss| match mss {
                        Mss::Auto => "auto".into(),
                        Mss::Bytes(bytes) => i64::from(bytes).into(),
                    }),
                ),
                (
                    "probe",
                    (!tunnel.probes.is_empty()).then(|| tunnel.probes.iter().map(probe).collect::<Vec<_>>().into()),
                ),
            ]);
            (tunnel.name.clone(), value)
        })
        .collect();
    let policies = config.policies.iter().map(|policy| {
        let on_down = match policy.on_down {
            OnDown::Unreachable => "unreachable",
            OnDown::Blackhole => "blackhole",
            OnDown::Prohibit => "prohibit",
            OnDown::Next => "next",
        };
        let exempt = policy.exempt.iter().map(ToString::to_string);
        let words = [(policy.exempt_connected, "connected"), (policy.exempt_routed, "routed")];
        let words = words.into_iter().filter(|(declared, _)| *declared).map(|(_, word)| word);
        let from = policy.from.iter().map(ToString::to_string);
        table([
            ("name", Some(policy.name.clone().into())),
            ("table", policy.table.map(|table| i64::from(table).into())),
            ("from", Some(list(from.chain(policy.follow.iter().map(|follow| format!("@{follow}")))))),
            ("via", Some(if policy.main { "main".into() } else { list(&policy.via) })),
            ("on-down", (!policy.main).then(|| on_down.into())),
            ("exempt", (!policy.main).then(|| list(exempt.chain(words.map(str::to_owned))))),
            ("allow-default", Some(policy.allow_default.into())),
        ])
    });
    let metrics = config.metrics.as_ref().map(|listen| match listen {
        Listen::Tcp(address) => address.to_string(),
        Listen::Unix(path) => format!("unix:{}", path.display()),
    });
    let interfaces = table([
        ("ingress", Some(list(config.interfaces.ingress.iter().map(|pattern| &pattern.0)))),
        ("uplink", Some(list(config.interfaces.uplink.iter().map(|pattern| &pattern.0)))),
    ]);
    let whole = table([
        ("datapath", Some(config.datapath.name().into())),
        ("metrics", metrics.map(Into::into)),
        ("band", Some(i64::from(config.band).into())),
        ("tree-above", Some(i64::from(config.tree_above).into())),
        ("bypass-netfilter", Some(config.bypass_netfilter.into())),
        (
            "unmatched",
            Some(match config.unmatched {
                Unmatched::Kernel => "kernel".into(),
                Unmatched::Fast => "fast".into(),
            }),
        ),
        ("interfaces", Some(interfaces)),
        ("tunnel", Some(Value::Table(tunnels))),
        ("policy", Some(Value::Array(policies.collect()))),
    ]);
    toml::to_string(&whole).expect("a table can be printed")
}

fn ensure_none_twice<T: Ord>(items: impl IntoIterator<Item = T>, what: &str) {
    let mut seen = BTreeSet::new();
    assert!(items.into_iter().all(|item| seen.insert(item)), "{what} twice");
}

/// What the configuration's types promise, in their descriptions and on [`Config`]'s.
fn check_promises(config: &Config) {
    let Config { band, interfaces, tunnels, policies, .. } = config;
    for (priority, rule) in [(0, "local"), (1000, "l3mdev"), (32766, "main"), (32767, "default")] {
        assert!(!(band - 1..=band + 128).contains(&priority), "the rule `{rule}` is within the band");
    }

    ensure_none_twice(tunnels.iter().map(|tunnel| &tunnel.name), "a tunnel");
    for tunnel in tunnels {
        let mut roles = interfaces.ingress.iter().chain(&interfaces.uplink);
        assert!(
            tunnel.name != "lo" && !roles.any(|role| role.matches(&tunnel.name)),
            "a tunnel is something else, too"
        );
        assert!(tunnel.start_limit.burst >= 1 && !tunnel.start_limit.interval.is_zero());
        assert!(tunnel.start_limit.interval <= MONTH);
        for probe in &tunnel.probes {
            assert!((Duration::from_millis(10)..=MONTH).contains(&probe.interval), "{probe:?}");
            assert!(!probe.timeout.is_zero() && probe.timeout <= probe.interval, "{probe:?}");
            assert!(probe.fail >= 1 && probe.rise >= 1 && probe.hold_down <= MONTH, "{probe:?}");
        }
    }

    assert!(policies.len() <= 1024, "too many policies");
    ensure_none_twice(policies.iter().map(|policy| &policy.name), "a policy's name");
    ensure_none_twice(policies.iter().flat_map(|policy| &policy.from), "a source");
    ensure_none_twice(policies.iter().flat_map(|policy| &policy.follow), "an interface that is followed");
    for policy in policies {
        assert!(!(policy.from.is_empty() && policy.follow.is_empty()) && policy.via.is_empty() == policy.main, "{policy:?}");
        assert!(policy.from.is_sorted() && policy.followed.is_empty(), "{policy:?}");
        assert!(
            policy.from.iter().chain(&policy.exempt).all(|prefix| *prefix == prefix.trunc()),
            "host bits: {policy:?}"
        );
        ensure_none_twice(&policy.exempt, "an exemption");
        assert!(policy.exempt.iter().all(|prefix| prefix.prefix_len() > 0), "everything is exempt");
        ensure_none_twice(&policy.via, "a tunnel in `via`");
        let is_declared = |name: &String| tunnels.iter().any(|tunnel| tunnel.name == *name);
        assert!(policy.via.iter().all(is_declared), "a tunnel that is not declared: {:?}", policy.via);
    }

    let of_policies = || policies.iter().filter_map(|policy| policy.table);
    let of_tunnels = || tunnels.iter().filter_map(|tunnel| tunnel.table);
    assert!(of_policies().chain(of_tunnels()).all(|table| !matches!(table, 0 | 253..=255)), "a table of the kernel's");
    ensure_none_twice(of_policies(), "a policy's table");
    ensure_none_twice(of_tunnels(), "a tunnel's table");
    for tunnel in tunnels {
        let first = policies.iter().find(|policy| policy.via.first() == Some(&tunnel.name));
        let mut others = policies.iter().filter(|policy| first.is_none_or(|first| first.name != policy.name));
        let mine = |table| tunnel.table.is_some_and(|table_of_tunnel| table == table_of_tunnel);
        assert!(!others.any(|policy| policy.table.is_some_and(mine)), "two policies have a table");
    }
}

/// A host on which every other tunnel is up.
fn host(config: &Config) -> KernelState {
    let names = config.tunnels.iter().map(|tunnel| tunnel.name.as_str()).chain(["lan0", "net0"]);
    let links = names.zip(1..).map(|(name, index)| {
        let layer = [LinkLayer::Ip, LinkLayer::Ethernet, LinkLayer::Other][index as usize % 3];
        let link = Link { mtu: 1400, up: index % 2 == 0, ..Link::new(index, name, layer) };
        (index, link)
    });
    KernelState { links: links.collect(), ..KernelState::default() }
}

fn check_compiled(config: &Config) {
    let kernel = host(config);
    let policies = config.policies.iter().map(|policy| policy.name.clone());
    let probed = config.tunnels.iter().map(|tunnel| tunroute::policy::compile::probes::table_name(&tunnel.name));
    let tables: BTreeMap<String, u32> = policies.chain(probed).zip(30_000..).collect();
    let (closed, chosen) = (BTreeSet::new(), tunroute::policy::xdp_devices::Chosen::default());
    let fast = Some(FastInputs {
        open: Open { v4: true, v6: true },
        closed: &closed,
        reverse_path: false,
        unmatched: Open { v4: true, v6: true },
        returning: &closed,
        xdp: &chosen,
    });
    let failed = BTreeSet::new();
    let inputs = Inputs { config, kernel: &kernel, tables: &tables, failed: &failed, rules: true, fast, before: None };
    let desired = compile(&inputs);

    let prefixes: usize = config.policies.iter().map(|policy| policy.from.len()).sum();
    let is_policy = |rule: &&Rule| matches!(rule.action, RuleAction::Lookup(_) | RuleAction::Leave(_));
    let policy_rules = desired.rules.iter().filter(|rule| rule.oif.is_none() && is_policy(rule) && !rule.is_local());
    assert_eq!(policy_rules.clone().count(), prefixes, "a rule for each prefix");
    for rule in policy_rules.filter(|rule| !desired.trees.contains(&rule.family())) {
        assert_eq!(rule.priority, config.band + 128 - u32::from(rule.from.prefix_len()), "the longest first: {rule:?}");
    }
    let fast = desired.fast.as_ref().expect("a fast path was asked for");
    assert_eq!(fast.sources.prefixes().len(), prefixes, "an entry for each prefix");
    for prefix in fast.sources.prefixes().keys() {
        let first = fast.sources.chain_of(prefix).and_then(|chain| fast.slots.get(&chain.id));
        let chain = std::iter::successors(first, |slot| fast.slots.get(&slot.next?));
        assert!(
            (1..=MAX_NESTING as usize + 1).contains(&chain.count()),
            "a source without a slot, or too deep a chain"
        );
    }
    for slot in fast.slots.values() {
        assert!(slot.next.is_none_or(|next| fast.slots.contains_key(&next)), "a chain that leads nowhere");
    }
    let observed = FastState::default();
    if number_slots(fast, &observed).is_ok() {
        assert!(plan(&desired, &kernel, Some(&observed)).is_ok_and(|operations| operations.len() >= prefixes));
    }
}

fuzz_target!(|input: &[u8]| {
    // No configuration begins with a zero: here one of few words is written.
    let written =
        input.strip_prefix(&[0]).and_then(|choices| FewWords::arbitrary(&mut Unstructured::new(choices)).ok());
    let written = written.map(|words| words.write());
    if let Some(text) = written.as_deref().or(std::str::from_utf8(input).ok()) {
        check(text);
    }
});

fn check(text: &str) {
    match Config::parse("fuzz.toml", text) {
        Ok(config) => {
            check_promises(&config);
            let printed = print(&config);
            match Config::parse("printed.toml", &printed) {
                // Tables of a file have no order; their names do.
                Ok(mut again) => {
                    let place = |name: &str| config.tunnels.iter().position(|tunnel| tunnel.name == name);
                    again.tunnels.sort_by_key(|tunnel| place(&tunnel.name));
                    assert_eq!(again, config, "{printed}");
                }
                Err(error) => panic!("{printed}\n{error}"),
            }
            check_compiled(&config);
        }
        Err(error) => {
            assert!(!error.problems().is_empty());
            let _report = error.render(false);
            for problem in error.problems() {
                let (line, column) = problem.position().expect("every problem has a place");
                assert!(line <= text.matches('\n').count() + 2 && column >= 1, "{error}");
                assert!(!problem.message().is_empty() && !problem.help().is_empty(), "{error}");
            }
        }
    }
}
