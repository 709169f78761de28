//! Real probes between two network namespaces that go with the threads that made them.

use std::{
    net::{SocketAddr, TcpListener},
    process::Command,
    sync::mpsc as channel,
    thread::JoinHandle,
};

use nix::sched::{CloneFlags, unshare};
use tokio::time::timeout;

use super::*;

type Job = Box<dyn FnOnce() + Send>;

/// How long is waited for what must come, on a busy machine too.
const SOON: Duration = Duration::from_secs(30);

/// A network namespace: a thread that lives in it and does what it is given.
struct Namespace {
    jobs: Option<channel::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    tid: i32,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, work) = channel::channel::<Job>();
        let (tell, told) = channel::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            work.into_iter().for_each(|job| job());
        });
        Self { jobs: Some(jobs), thread: Some(thread), tid: told.recv().expect("a network namespace") }
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = channel::channel();
        let job = Box::new(move || drop(tell.send(job())));
        self.jobs.as_ref().unwrap().send(job).unwrap();
        told.recv().expect("the job panicked")
    }

    /// `ip ARGUMENTS`, one command a line.
    fn ip(&self, commands: &str) {
        for command in commands.lines().map(str::trim).filter(|command| !command.is_empty()) {
            let arguments: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
            let output = self.run(move || Command::new("ip").args(arguments).output().expect("ip runs"));
            assert!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }

    fn block_on<T: Send + 'static, F: Future<Output = T>>(&self, job: impl FnOnce() -> F + Send + 'static) -> T {
        self.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(job())
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        // A failed job has been reported already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// `tun0` leads from the first namespace to the second; `tun1` leads to where nobody answers. None without root.
fn lab() -> Option<(Namespace, Namespace)> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make network namespaces");
        return None;
    }
    let (near, far) = (Namespace::new(), Namespace::new());
    for end in [&near, &far] {
        // No duplicate address detection, which keeps an address from use for a second.
        end.run(|| std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")).expect("a sysctl");
    }
    near.ip(&format!(
        "link set lo up
         link add tun0 type veth peer name far0 netns {tid}
         link add tun1 type veth peer name far1 netns {tid}
         addr add 192.0.2.1/24 dev tun0
         addr add 2001:db8::1/64 dev tun0 nodad
         addr add 198.51.100.1/24 dev tun1
         link set tun0 up
         link set tun1 up",
        tid = far.tid
    ));
    far.ip("link set lo up
        addr add 192.0.2.2/24 dev far0
        addr add 2001:db8::2/64 dev far0 nodad
        addr add 2001:db8:f::1/128 dev far0 nodad
        addr add 203.0.113.1/32 dev far0
        link set far0 up
        link set far1 up");
    // Neighbours need a second or two to find each other on a new link.
    for target in ["192.0.2.2", "2001:db8::2"] {
        let answered = || matches!(send(&near, "tun0", &probe(target), false), Outcome::Answer(_));
        assert!((0..5).any(|_| answered()), "the lab is not up");
    }
    Some((near, far))
}

fn probe(target: &str) -> Probe {
    let target = match target.parse::<SocketAddr>() {
        Ok(target) => ProbeTarget::Tcp(target),
        Err(_) => ProbeTarget::Echo(target.parse().unwrap()),
    };
    Probe {
        target,
        source: None,
        interval: Duration::from_millis(50),
        timeout: Duration::from_millis(50),
        fail: 3,
        rise: 2,
        hold_down: Duration::ZERO,
    }
}

fn tunnel(name: &str, probes: &[Probe]) -> Tunnel {
    Tunnel {
        name: name.to_owned(),
        table: None,
        via_v4: None,
        via_v6: None,
        up: None,
        down: None,
        start_limit: crate::config::StartLimit::default(),
        mss: None,
        probes: probes.to_vec(),
    }
}

/// Sends one probe; the answer must come, unless it is to be lost.
fn send(near: &Namespace, device: &'static str, probe: &Probe, lost: bool) -> Outcome {
    let probe = Probe { timeout: if lost { Duration::from_millis(300) } else { SOON }, ..probe.clone() };
    near.block_on(move || async move { probe::send(device, &probe, 7, &RandomState::new()).await })
}

#[test]
fn what_answers_and_what_does_not() {
    let Some((near, far)) = lab() else { return };
    let listen = |address: &'static str| far.run(move || TcpListener::bind(address).unwrap());
    let listeners = ["192.0.2.2:80", "[2001:db8::2]:80"].map(listen);
    let from = |target, source: &str| Probe { source: Some(source.parse().unwrap()), ..probe(target) };
    // An address of a neighbour that is there and does not answer, so that only the time-out ends the wait.
    near.ip("neigh add 192.0.2.9 dev tun0 lladdr 02:00:00:00:00:09
        neigh add 2001:db8::9 dev tun0 lladdr 02:00:00:00:00:09");

    // Device, probe, and a part of the reason where it is lost.
    let cases: [(&str, Probe, Option<&str>); 17] = [
        ("tun0", probe("192.0.2.2"), None),
        ("tun0", probe("2001:db8::2"), None),
        ("tun0", from("192.0.2.2", "192.0.2.1"), None),
        ("tun0", from("2001:db8::2", "2001:db8::1"), None),
        ("tun0", probe("192.0.2.2:80"), None),
        ("tun0", probe("[2001:db8::2]:80"), None),
        // Refused: answered.
        ("tun0", probe("192.0.2.2:81"), None),
        ("tun0", from("[2001:db8::2]:81", "2001:db8::1"), None),
        ("tun0", probe("192.0.2.9"), Some("no answer within 300ms")),
        ("tun0", probe("2001:db8::9"), Some("no answer within 300ms")),
        ("tun0", probe("192.0.2.9:80"), Some("no answer within 300ms")),
        ("tun0", probe("[2001:db8::9]:80"), Some("no answer within 300ms")),
        // The way leads by tun0, and the probe may not take it.
        ("tun1", probe("192.0.2.2"), Some("")),
        ("tun1", probe("2001:db8::2"), Some("no way by this device")),
        ("tun1", probe("[2001:db8::2]:80"), Some("")),
        ("tun0", from("192.0.2.2", "192.0.2.77"), Some("source address")),
        ("tun0", from("[2001:db8::2]:80", "2001:db8::77"), Some("source address")),
    ];
    for (device, probe, lost) in cases {
        let outcome = send(&near, device, &probe, lost.is_some());
        let expected = match (&outcome, lost) {
            (Outcome::Answer(delay), None) => *delay < SOON,
            (Outcome::Lost(reason), Some(part)) => reason.contains(part),
            _ => false,
        };
        assert!(expected, "{:?} from {:?} by {device}: {outcome:?}", probe.target, probe.source);
    }
    assert_eq!(send(&near, "tun9", &probe("192.0.2.2"), true), Outcome::NoDevice);
    assert_eq!(send(&near, "tun9", &probe("192.0.2.2:80"), true), Outcome::NoDevice);
    drop(listeners);
}

#[test]
fn a_link_local_target_is_one_of_the_device() {
    let Some((near, far)) = lab() else { return };
    far.ip("addr add fe80::99/64 dev far0 nodad");
    // The near end's own address may still be tentative.
    near.ip("addr add fe80::98/64 dev tun0 nodad");
    for target in ["fe80::99", "[fe80::99]:80"] {
        let outcome = send(&near, "tun0", &probe(target), false);
        assert!(matches!(outcome, Outcome::Answer(_)), "{target}: {outcome:?}");
    }
}

/// What the daemon has to provide, and why: a target beyond the link, seen from a policy whose tunnel is down.
#[test]
fn a_rule_for_the_device_lets_the_probe_out_while_its_policy_is_down() {
    let Some((near, _far)) = lab() else { return };
    near.ip("-6 route add unreachable default table 100
        -6 rule add from 2001:db8::1 lookup 100 pref 20000
        route add unreachable default table 100
        rule add from 192.0.2.1 lookup 100 pref 20000");
    let from = |target, source: &str| Probe { source: Some(source.parse().unwrap()), ..probe(target) };
    let v6 = [from("2001:db8:f::1", "2001:db8::1"), from("[2001:db8:f::1]:80", "2001:db8::1"), probe("2001:db8:f::1")];
    let v4 = [from("203.0.113.1", "192.0.2.1"), from("203.0.113.1:80", "192.0.2.1"), probe("203.0.113.1")];
    for probe in &v6 {
        let outcome = send(&near, "tun0", probe, true);
        assert!(matches!(&outcome, Outcome::Lost(reason) if reason.contains("unreachable")), "{probe:?}: {outcome:?}");
    }
    for probe in &v4 {
        let outcome = send(&near, "tun0", probe, false);
        assert!(matches!(outcome, Outcome::Answer(_)), "IPv4 falls back to the link: {probe:?}: {outcome:?}");
    }
    near.ip("-6 route add default dev tun0 table 101
        -6 rule add oif tun0 lookup 101 pref 19999");
    for probe in &v6 {
        let outcome = send(&near, "tun0", probe, false);
        assert!(matches!(outcome, Outcome::Answer(_)), "{probe:?}: {outcome:?}");
    }
}

/// The next change.
async fn next(changes: &mut mpsc::UnboundedReceiver<Change>) -> (String, Family, bool) {
    let change = timeout(SOON, changes.recv()).await.expect("a change in time").unwrap();
    (change.tunnel, change.family, change.up)
}

async fn quiet(changes: &mut mpsc::UnboundedReceiver<Change>) {
    if let Ok(change) = timeout(Duration::from_millis(400), changes.recv()).await {
        panic!("no change was expected: {change:?}");
    }
}

#[test]
fn changes_are_told_once_and_by_family() {
    let Some((near, far)) = lab() else { return };
    let down = |family| ("tun0".to_owned(), family, false);
    let up = |family| ("tun0".to_owned(), family, true);
    near.block_on(move || async move {
        let (tell, mut changes) = mpsc::unbounded_channel();
        let mut probes = Probes::new(tell);
        // Two probes in IPv6, of which one will fail alone.
        probes.reconfigure(&[tunnel("tun0", &["192.0.2.2", "2001:db8::2", "2001:db8:f::1"].map(probe))]);
        assert_eq!(next(&mut changes).await, down(Family::V6), "2001:db8:f::1 has no route");
        quiet(&mut changes).await;
        assert!(probes.is_up("tun0", Family::V4) && !probes.is_up("tun0", Family::V6));
        assert!(probes.is_up("tun1", Family::V4), "not probed");

        let verdicts = |probes: &Probes| probes.status().iter().map(|status| status.verdict).collect::<Vec<_>>();
        assert_eq!(verdicts(&probes), [Verdict::Up, Verdict::Up, Verdict::Down], "{:?}", probes.status());
        let status = &probes.status()[0];
        assert!(status.mean_delay_us.is_some() && status.last_error.is_none(), "{status:?}");
        assert_eq!(probes.status()[2].loss_percent, Some(100.0));

        // The probe that fails goes; the others go on as they were.
        probes.reconfigure(&[tunnel("tun0", &["192.0.2.2", "2001:db8::2"].map(probe))]);
        assert_eq!(next(&mut changes).await, up(Family::V6));
        assert_eq!(verdicts(&probes), [Verdict::Up, Verdict::Up]);

        far.ip("link set far0 down");
        let mut families = [next(&mut changes).await, next(&mut changes).await];
        families.sort_by_key(|change| change.1);
        assert_eq!(families, [down(Family::V4), down(Family::V6)]);
        quiet(&mut changes).await;

        // Other times: the verdict is kept.
        let slower = |target| Probe { interval: Duration::from_millis(60), ..probe(target) };
        probes.reconfigure(&[tunnel("tun0", &["192.0.2.2", "2001:db8::2"].map(slower))]);
        quiet(&mut changes).await;
        assert_eq!(verdicts(&probes), [Verdict::Down, Verdict::Down]);

        far.ip("link set far0 up\n addr replace 2001:db8::2/64 dev far0 nodad");
        let mut families = [next(&mut changes).await, next(&mut changes).await];
        families.sort_by_key(|change| change.1);
        assert_eq!(families, [up(Family::V4), up(Family::V6)]);

        probes.reconfigure(&[]);
        assert!(probes.status().is_empty());
        far.ip("link set far0 down");
        quiet(&mut changes).await;
    });
}

#[test]
fn a_device_that_comes_late_is_probed_at_once() {
    let Some((near, far)) = lab() else { return };
    near.block_on(move || async move {
        let (tell, mut changes) = mpsc::unbounded_channel();
        let mut probes = Probes::new(tell);
        let patient = Probe { interval: Duration::from_secs(3600), fail: 1, ..probe("192.0.2.2") };
        probes.reconfigure(&[tunnel("tun2", &[patient])]);
        quiet(&mut changes).await;
        assert_eq!(probes.status()[0].last_error.as_deref(), Some("the device does not exist"));
        assert!(probes.is_up("tun2", Family::V4), "nothing is held against it");
        // It comes, and does not answer; then it does.
        let ip = |command: &str| {
            let output = Command::new("ip").args(command.split(' ')).output().unwrap();
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        };
        ip("link set tun0 down");
        ip("link set tun0 name tun2");
        probes.nudge("tun2");
        assert_eq!(next(&mut changes).await, ("tun2".to_owned(), Family::V4, false));
        ip("link set tun2 up");
        for _ in 0..1000 {
            probes.nudge("tun2");
            sleep(Duration::from_millis(20)).await;
            if probes.is_up("tun2", Family::V4) {
                break;
            }
        }
        assert_eq!(next(&mut changes).await, ("tun2".to_owned(), Family::V4, true));
        drop(far);
    });
}
