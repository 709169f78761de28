//! Ten thousand prefixes as a tree in a real kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use tunroute::{
    config::Config,
    kernel::{Answer, Kernel, Oracle, Question, Snapshot, rules_digest},
    policy::compile::{Desired, Inputs, compile},
    policy::net::{Family, KernelOp, RuleAction},
    policy::plan::{Op, Undone, plan},
};

use super::{
    devices,
    lab::{in_namespace, ip, serve_tun},
    observe,
};

/// Two policies, each with half of so many prefixes of each family; around them all and inside some of them, prefixes of
/// the other.
fn config(prefixes: u32) -> Config {
    let mut from = [String::new(), String::new()];
    for n in 0..prefixes {
        // Spread, but the same in every run.
        let spread = n.wrapping_mul(0x9e37_79b1);
        let v4 = (0x1000_0000 + spread % 0x4_0000 * 0x100).to_be_bytes();
        let v6 = ((0x2a02_u128 << 112) | (u128::from(spread) << 64)).to_be_bytes();
        for (address, length) in [(IpAddr::from(v4), 24), (IpAddr::from(v6), 64)] {
            let net = IpNet::new(address, length).unwrap();
            let _ = write!(from[n as usize % 2], "\"{net}\",");
            if n % 64 == 0 {
                let _ = write!(from[(n as usize + 1) % 2], "\"{address}\",");
            }
        }
    }
    from[0] += "\"16.0.0.0/6\",\"2a02::/16\"";
    let policy = |name: usize| {
        format!("[tunnel.t{name}]\n[[policy]]\nname = \"p{name}\"\nfrom = [{}]\nvia = \"t{name}\"\n", from[name])
    };
    Config::parse("many", &format!("{}{}", policy(0), policy(1))).unwrap()
}

fn desired(config: &Config, snapshot: &Snapshot) -> Desired {
    let tables: BTreeMap<String, u32> = [("p0".to_owned(), 200), ("p1".to_owned(), 201)].into();
    let failed = BTreeSet::new();
    compile(&Inputs {
        config,
        kernel: &snapshot.state,
        tables: &tables,
        failed: &failed,
        rules: true,
        fast: None,
        before: None,
    })
}

fn planned(desired: &Desired, snapshot: &Snapshot) -> Vec<KernelOp> {
    let operations = plan(desired, &snapshot.state, None).unwrap();
    let of_kernel = |operation| match operation {
        Op::Kernel(operation) => operation,
        Op::Fast(operation) => panic!("there is no fast path: {operation}"),
    };
    operations.into_iter().map(of_kernel).collect()
}

/// Brings the kernel to the desired state, after which the plan is empty. Returns the number of operations.
async fn reach(kernel: &Kernel, desired: &Desired, what: &str) -> usize {
    let snapshot = observe(kernel).await;
    let operations = planned(desired, &snapshot);
    let what = format!("{what}, {} operations", operations.len());
    time(&what, async || assert_eq!(kernel.apply_all(&operations, &snapshot, &mut Undone::default()).await.len(), 0))
        .await;
    assert_eq!(planned(desired, &observe(kernel).await), []);
    operations.len()
}

/// The processor time that this thread has used.
fn used() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

/// What processor time something takes.
async fn time<T>(what: &str, work: impl AsyncFnOnce() -> T) -> T {
    let start = used();
    let result = work().await;
    println!("{what}: {:.2?} of processor time", used() - start);
    result
}

#[test]
fn ten_thousand_prefixes_as_a_tree() {
    in_namespace(async || {
        let (t0, t1) = devices();
        let _carriers = ["t0", "t1"].map(serve_tun);
        ip("link add lan0 type veth peer name lan1");
        ip("link set lan0 up");
        for setting in ["ipv4/conf/lan0/forwarding", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
        }
        for setting in ["all", "lan0"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{setting}/rp_filter"), "0").unwrap();
        }
        let iif = Some(if_nametoindex("lan0").unwrap());
        let (kernel, _events) = Kernel::connect().unwrap();
        let prefixes = std::env::var("TUNROUTE_PREFIXES").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000);
        let config = config(prefixes);
        let snapshot = observe(&kernel).await;
        let desired = time("compiling", async || desired(&config, &snapshot)).await;
        assert_eq!(desired.trees, Family::ALL.into());
        let shortcuts = desired.rules.iter().filter(|rule| rule.is_shortcut()).count();
        println!("{} rules, {shortcuts} of them shortcuts", desired.rules.len());
        reach(&kernel, &desired, "from nothing").await;

        let lookups: BTreeMap<IpNet, u32> =
            desired.rules.iter().filter_map(|rule| Some((rule.from, rule.table()?))).collect();
        let mut oracle = Oracle::connect().unwrap();
        let mut asked = 0;
        let mut ask = |source: IpAddr| {
            let mut around = Some(IpNet::from(source));
            let table = loop {
                let Some(prefix) = around else { break None };
                match lookups.get(&prefix) {
                    Some(table) => break Some(*table),
                    None => around = prefix.supernet(),
                }
            };
            let Some(table) = table else { return };
            let destination = if source.is_ipv4() { "203.0.113.1" } else { "2001:db8::1" }.parse().unwrap();
            let answer = oracle.ask(&Question { source, destination, iif }).unwrap();
            let device = if table == 200 { t0 } else { t1 };
            assert_eq!(answer, Answer::Leaves { device, gateway: None, table }, "from {source}");
            asked += 1;
        };
        for prefix in lookups.keys() {
            ask(prefix.network());
            ask(prefix.broadcast());
        }
        println!("{asked} addresses asked about");

        let snapshot = time("observing", async || observe(&kernel).await).await;
        time("planning", async || planned(&desired, &snapshot)).await;

        // The periodic check sees what was observed, until another program changes it.
        assert_eq!(rules_digest().await.unwrap(), snapshot.rules_digest());
        // Rules in the midst are removed, of each kind, and one by one they are put back.
        let middle = |wanted: fn(RuleAction) -> bool| {
            let of_kind: Vec<_> = desired.rules.iter().filter(|rule| wanted(rule.action)).collect();
            of_kind[of_kind.len() / 2].del_command()
        };
        let commands = [
            middle(|action| matches!(action, RuleAction::Lookup(_))),
            middle(|action| matches!(action, RuleAction::Goto(_))),
            middle(|action| matches!(action, RuleAction::Nop)),
        ];
        for command in commands {
            ip(&command["ip ".len()..]);
            assert_ne!(rules_digest().await.unwrap(), snapshot.rules_digest());
            assert_eq!(reach(&kernel, &desired, &command).await, 1);
        }
        reach(&kernel, &Desired::default(), "to nothing").await;
    });
}

#[test]
fn a_list_becomes_a_tree_and_a_tree_a_list() {
    in_namespace(async || {
        let (kernel, _events) = Kernel::connect().unwrap();
        let config = config(1_000);
        let snapshot = observe(&kernel).await;
        let tree = desired(&config, &snapshot);
        let list = desired(&Config { tree_above: u32::MAX, ..config }, &snapshot);
        for (desired, what) in
            [(&list, "a list"), (&tree, "a tree"), (&list, "a list"), (&Desired::default(), "nothing")]
        {
            reach(&kernel, desired, what).await;
        }
    });
}
