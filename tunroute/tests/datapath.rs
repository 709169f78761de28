//! The loaded programs: what the verifier makes of them, and that they decide as the same code does in user space.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Instant,
};

use aya::{TestRun as _, TestRunOptions, programs::SchedClassifier, util::KernelVersion};
use ipnet::IpNet;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use proptest::{
    prelude::*,
    test_runner::{Config as RunnerConfig, TestRunner},
};
use tunroute::{
    commands::trace::Wanted,
    datapath::{Datapath, Method, Place},
    policy::fast::{DeviceExit, Exemption, FastOp, FastState, Hook, Open, address_words},
    policy::model::Model,
    policy::net::Family,
    prefixes::index,
    prefixes::map::PrefixMap,
};
use tunroute_common::{
    decide::{Arrival, Verdict, decide_egress, decide_ingress},
    maps::{Action, Clamp, Egress, Exempt, Exit, LAYOUT_VERSION, Outcome, Slot, Source, Stats, flags},
    mss,
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Segmented, Slice},
};

/// The device that `BPF_PROG_TEST_RUN` pretends a packet to be at: the namespace's loopback.
const TEST_DEVICE: u32 = 1;
/// `TC_ACT_UNSPEC`
const UNSPEC: i32 = -1;
/// `TC_ACT_SHOT`
const SHOT: i32 = 2;
/// `TC_ACT_REDIRECT`
const REDIRECT: i32 = 7;
/// Packets that are run through both.
const PACKETS: u32 = 50_000;

/// Runs in namespaces of its own, with a private bpffs.
fn isolated(test: impl FnOnce(&Path) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
                .expect("needs root: run it by cargo xtask test");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let directory = tempfile::tempdir().unwrap();
            mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
            // The devices that the example's exits lead to.
            for index in 7..=10 {
                add_device(&format!("tunnel{index}"), index);
            }
            test(&directory.path().join("tunroute"));
            umount2(directory.path(), MntFlags::MNT_DETACH).unwrap();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Runs `ip` in the thread's network namespace.
fn ip(arguments: &str) {
    let status = std::process::Command::new("ip").args(arguments.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Adds a device with this number, which is up and leads nowhere.
fn add_device(name: &str, index: u32) {
    ip(&format!("link add {name} index {index} type veth peer name far-{name} index {}", 100 + index));
    ip(&format!("link set {name} up"));
    ip(&format!("link set far-{name} up"));
}

/// What `cargo xtask test --vm` puts into its tables: it is seen although the test passes.
fn note(about: &str, note: &str) {
    writeln!(std::io::stderr().lock(), "note: {about}: {note}").unwrap();
}

#[test]
fn the_verifier_has_room_to_spare() {
    isolated(|pins| {
        let start = Instant::now();
        let datapath = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        note("all programs and maps loaded in", &format!("{} ms", start.elapsed().as_millis()));
        for (program, instructions) in datapath.verified_instructions().unwrap() {
            note(&format!("instructions that the verifier goes through in `{program}`"), &instructions.to_string());
            // It gives up at a million (BPF_COMPLEXITY_LIMIT_INSNS); older verifiers prune less.
            assert!((1..100_000).contains(&instructions), "{program}: {instructions}");
        }
    });
}

#[test]
fn another_daemon_finds_what_one_has_left() {
    isolated(|pins| {
        let mut first = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        let state = example();
        for operation in filling(&state) {
            first.apply(&operation).unwrap();
        }
        assert_eq!(first.state(), &state);
        drop(first);
        let mut second = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        assert_eq!(second.state(), &state);

        for prefix in state.sources.keys() {
            second.apply(&FastOp::RemoveSource(*prefix)).unwrap();
            second.apply(&FastOp::RemoveSource(*prefix)).expect("what is gone is removed");
        }
        for exemption in &state.exempt {
            second.apply(&FastOp::RemoveExemption(*exemption)).unwrap();
        }
        for index in state.slots.keys() {
            second.apply(&FastOp::ClearSlot(*index)).unwrap();
        }
        for number in state.exits.keys() {
            second.apply(&FastOp::ClearExit(*number)).unwrap();
        }
        second.apply(&FastOp::SetOpen(Open::default())).unwrap();
        drop(second);
        let third = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        assert_eq!(third.state(), &FastState::default());
        third.remove(&BTreeMap::new()).unwrap();
        assert!(!pins.exists());
    });
}

/// Every kind of slot, nested prefixes, exemptions of every kind in two sets.
fn example() -> FastState {
    let slot = |id, egress, exempt_set, next| Slot { id, egress, exempt_set, next, table: 0, reserved: 0 };
    let exit = |ifindex, flags, gateway: Option<&str>| DeviceExit {
        ifindex,
        exit: Exit {
            mtu: 600,
            flags,
            gateway: gateway.map(|gateway| address_words(gateway.parse().unwrap())).unwrap_or_default(),
        },
    };
    let none = Slot::NO_NEXT;
    let slots = [
        slot(11, Egress::redirect(0), 1, none),
        slot(12, Egress::redirect(1), 2, 0),
        slot(13, Egress::redirect(2), 1, 1),
        slot(14, Egress::redirect(3), 1, none),
        slot(15, Egress::redirect(4), 1, none),
        slot(16, Egress::down(Action::Reject), 1, 0),
        slot(17, Egress::down(Action::Blackhole), 2, 0),
        slot(18, Egress::down(Action::Next), 1, 2),
        slot(19, Egress::down(Action::Next), 1, none),
        slot(20, Egress::down(Action::Main), 1, none),
    ];
    let exits = [
        exit(7, 0, None),
        exit(8, flags::ETHERNET, None),
        exit(9, flags::ETHERNET | flags::GATEWAY, Some("2001:db8::9")),
        exit(10, flags::ANSWERS_TOO_BIG, None),
        exit(TEST_DEVICE, 0, None),
    ];
    let prefix = |text: &str| text.parse::<IpNet>().unwrap();
    let mut sources = PrefixMap::default();
    for (index, arrives_by) in (0u32..10).zip([0, 0, 0, 0, 0, TEST_DEVICE, 0, 5, 0, 0]) {
        sources.insert(prefix(&format!("10.{index}.0.0/16")), Source { slot: index, arrives_by });
        sources.insert(prefix(&format!("2a02:{index:x}::/32")), Source { slot: index, arrives_by });
    }
    sources.insert(prefix("10.0.0.0/8"), Source { slot: 3, arrives_by: 0 });
    sources.insert(prefix("10.1.1.1/32"), Source { slot: 1, arrives_by: Source::OWN_ADDRESS });
    sources.insert(prefix("2a02:1::1/128"), Source { slot: 1, arrives_by: Source::OWN_ADDRESS });
    sources.insert(prefix("2a02:2:1::/48"), Source { slot: 7, arrives_by: TEST_DEVICE });
    let exempt = [
        (1, "192.0.2.0/24", Exempt::Anywhere),
        (1, "192.0.2.128/25", Exempt::No),
        (1, "2001:db8:1::/48", Exempt::Anywhere),
        (2, "198.51.100.0/24", Exempt::Inside),
        (2, "198.51.100.128/25", Exempt::Anywhere),
        (2, "2001:db8:2::/48", Exempt::Inside),
    ];
    FastState {
        sources,
        exempt: exempt.into_iter().map(|(set, text, kind)| Exemption { set, prefix: prefix(text), kind }).collect(),
        slots: (0..).zip(slots).collect(),
        exits: (0..).zip(exits).collect(),
        open: Open { v4: true, v6: true },
        ..FastState::default()
    }
}

fn filling(state: &FastState) -> Vec<FastOp> {
    let exits = state.exits.iter().map(|(number, exit)| FastOp::WriteExit(*number, *exit, Family::V6));
    let slots = state.slots.iter().map(|(index, slot)| FastOp::WriteSlot(*index, *slot));
    let exemptions = state.exempt.iter().map(|exemption| FastOp::AddExemption(*exemption));
    let sources = state.sources.iter().map(|(prefix, source)| FastOp::PutSource(*prefix, *source));
    exits.chain(slots).chain(exemptions).chain(sources).chain([FastOp::SetOpen(state.open)]).collect()
}

/// A packet from the network header on, mostly well-formed, and the payload bytes of its segments.
fn packet() -> impl Strategy<Value = (Vec<u8>, u32)> {
    let v4 = || {
        prop_oneof![
            4 => (0u8..12, 0u8..3, 0u8..3).prop_map(|(a, b, c)| Ipv4Addr::new(10, a, b, c)),
            2 => any::<u8>().prop_map(|host| Ipv4Addr::new(192, 0, 2, host)),
            2 => any::<u8>().prop_map(|host| Ipv4Addr::new(198, 51, 100, host)),
            1 => any::<u32>().prop_map(Ipv4Addr::from),
        ]
    };
    let v6 = || {
        prop_oneof![
            4 => (0u16..12, 0u16..3, 0u16..3).prop_map(|(a, b, c)| Ipv6Addr::new(0x2a02, a, b, 0, 0, 0, 0, c)),
            3 => (0u16..4, any::<u16>()).prop_map(|(net, host)| Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, host)),
            1 => prop::sample::select(vec!["::", "::1", "fe80::1", "ff02::1", "::ffff:10.0.0.1"])
                .prop_map(|text| text.parse().unwrap()),
            1 => any::<u128>().prop_map(Ipv6Addr::from),
        ]
    };
    let hop_limit = prop_oneof![1 => 0u8..3, 4 => any::<u8>()];
    let kind = prop::sample::select(vec![6u8, 17, 58, 1, 0, 43, 44, 60]);
    let body = prop_oneof![
        8 => prop::collection::vec(any::<u8>(), 0..80),
        // Around the tunnels' MTU.
        2 => prop::collection::vec(any::<u8>(), 540..640),
    ];
    let gso = prop_oneof![6 => Just(0u32), 1 => 1u32..1500];
    let addresses = prop_oneof![(v4(), v4()).prop_map(Ok), (v6(), v6()).prop_map(Err)];
    let damage = prop_oneof![
        5 => Just(None),
        1 => (0usize..60, any::<u8>()).prop_map(Some),
    ];
    let cut = prop_oneof![12 => Just(None), 1 => (0usize..60).prop_map(Some)];
    (addresses, hop_limit, kind, body, gso, damage, cut).prop_map(
        |(addresses, hop_limit, kind, body, gso, damage, cut)| {
            let length = u16::try_from(body.len()).unwrap();
            let mut bytes = match addresses {
                Ok((source, destination)) => {
                    let number = etherparse::IpNumber(kind);
                    let (source, destination) = (source.octets(), destination.octets());
                    let mut header =
                        etherparse::Ipv4Header::new(length, hop_limit, number, source, destination).unwrap();
                    header.header_checksum = header.calc_header_checksum();
                    header.to_bytes().to_vec()
                }
                Err((source, destination)) => {
                    let mut header = vec![0x60, 0, 0, 0];
                    header.extend(length.to_be_bytes());
                    header.extend([kind, hop_limit]);
                    header.extend(source.octets());
                    header.extend(destination.octets());
                    header
                }
            };
            bytes.extend(body);
            if let Some((at, by)) = damage
                && let Some(byte) = bytes.get_mut(at)
            {
                *byte ^= by;
            }
            // The kernel takes no packet without its whole IP header into a test run; the lab sends such.
            let whole_header = if bytes[0] >> 4 == 6 { 40 } else { 20 };
            bytes.truncate(cut.unwrap_or(usize::MAX));
            bytes.resize(bytes.len().max(whole_header), 0);
            (bytes, gso)
        },
    )
}

/// What a program did with a packet: its result, and the frame afterwards.
fn run(datapath: &mut Datapath, program: &str, frame: &[u8], gso_size: u32) -> (i32, Vec<u8>) {
    let program: &mut SchedClassifier = datapath.ebpf().program_mut(program).unwrap().try_into().unwrap();
    test_run(program, frame, gso_size)
}

fn test_run(program: &SchedClassifier, frame: &[u8], gso_size: u32) -> (i32, Vec<u8>) {
    // `struct __sk_buff` in `include/uapi/linux/bpf.h`.
    let mut context = [0u8; 192];
    context[176..180].copy_from_slice(&gso_size.to_ne_bytes());
    let mut out = vec![0; frame.len() + 64];
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            repeat: 1,
            ..TestRunOptions::default()
        })
        .unwrap();
    out.truncate(usize::try_from(result.data_size_out).unwrap());
    (result.return_value.cast_signed(), out)
}

/// What should become of the frame.
fn expected(verdict: Verdict<'_>, frame: &[u8], decrement: bool) -> (i32, Vec<u8>) {
    let mut frame = frame.to_vec();
    let result = match verdict {
        // The model has no main table, and the programs do not ask the kernel's here.
        Verdict::Pass | Verdict::StepAside(..) | Verdict::Forward(_) => UNSPEC,
        Verdict::Drop(..) => SHOT,
        Verdict::Redirect(..) => REDIRECT,
    };
    if decrement && result == REDIRECT {
        if frame[14] >> 4 == 4 {
            frame[14 + 8] -= 1;
            let (mut header, _) = etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap();
            header.header_checksum = header.calc_header_checksum();
            frame[14 + 10..14 + 12].copy_from_slice(&header.header_checksum.to_be_bytes());
        } else {
            frame[14 + 7] -= 1;
        }
    }
    (result, frame)
}

#[test]
fn the_programs_decide_as_the_code_does_in_user_space() {
    isolated(|pins| {
        let state = example();
        let model = Model::from(&state);
        let mut datapath = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        for operation in filling(&state) {
            datapath.apply(&operation).unwrap();
        }
        let datapath = std::cell::RefCell::new(datapath);
        let outcomes = std::cell::RefCell::new(BTreeMap::<String, u64>::new());
        let config = RunnerConfig { cases: PACKETS, failure_persistence: None, ..RunnerConfig::default() };
        let result = TestRunner::new(config).run(&packet(), |(bytes, gso_size)| {
            let ethertype =
                if bytes.first().is_some_and(|first| first >> 4 == 6) { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
            let arrival = Arrival { ethertype, ifindex: TEST_DEVICE, to_this_host: true, tagged: false };
            let mut frame = vec![0; 12];
            frame.extend(ethertype.to_be_bytes());
            frame.extend(&bytes);
            let packet = Segmented(Slice(&bytes), gso_size);
            // An emulated machine takes longer for all packets than one heartbeat is good for.
            datapath.borrow_mut().beat().unwrap();
            for (program, verdict) in [
                ("ingress_l2", decide_ingress(&arrival, &packet, &model)),
                ("egress_l2", decide_egress(&arrival, &packet, &model)),
            ] {
                let (got, frame_got) = run(&mut datapath.borrow_mut(), program, &frame, gso_size);
                let (wanted, frame_wanted) = expected(verdict, &frame, program == "ingress_l2");
                prop_assert_eq!(got, wanted, "{}: {:?}", program, verdict);
                prop_assert_eq!(frame_got, frame_wanted, "{}: {:?}", program, verdict);
                let name = match verdict {
                    Verdict::Pass | Verdict::Forward(_) => "pass",
                    Verdict::StepAside(_, outcome) | Verdict::Drop(_, outcome) | Verdict::Redirect(_, _, outcome) => {
                        outcome.name()
                    }
                };
                *outcomes.borrow_mut().entry(format!("{program} {name}")).or_default() += 1;
            }
            Ok(())
        });
        result.unwrap();
        let outcomes = outcomes.into_inner();
        for (outcome, packets) in &outcomes {
            println!("{packets:>7} {outcome}");
        }
        // A generator that never gets anywhere would prove nothing.
        for outcome in Outcome::ALL {
            let on_egress = matches!(outcome, Outcome::Diverted | Outcome::LeakPrevented);
            let program = if on_egress { "egress_l2" } else { "ingress_l2" };
            let seen = outcomes.get(&format!("{program} {}", outcome.name())).copied().unwrap_or(0);
            let never = matches!(outcome, Outcome::Closed | Outcome::Unresolved);
            assert_eq!(seen > 0, !never, "{program} {}: {seen}", outcome.name());
        }
        let counted = datapath.into_inner().counters().unwrap();
        let counted: u64 = counted.values().flat_map(|stats| stats.outcomes).map(|counter| counter.packets).sum();
        let decided: u64 =
            outcomes.iter().filter(|(name, _)| !name.ends_with("pass")).map(|(_, packets)| packets).sum();
        assert_eq!(counted, decided, "every decision is counted once");
    });
}

/// A number of a device, used again by another while nobody follows, is no way out: neither where packets enter nor at the
/// uplink, before and after a daemon has looked.
#[test]
fn a_device_with_the_number_of_one_that_has_gone_gets_nothing() {
    isolated(|pins| {
        let state = example();
        let mut datapath = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        for operation in filling(&state) {
            datapath.apply(&operation).unwrap();
        }
        let frame = ethernet([10, 3, 0, 1], [203, 0, 113, 1]);
        let decided = |datapath: &mut Datapath| {
            let [ingress, egress] = ["ingress_l2", "egress_l2"].map(|program| run(datapath, program, &frame, 0).0);
            let stats = datapath.counters().unwrap()[&3];
            let counted =
                [Outcome::Down, Outcome::LeakPrevented].map(|outcome| stats.outcomes[outcome as usize].packets);
            ((ingress, egress), counted)
        };
        assert_eq!(decided(&mut datapath), ((REDIRECT, REDIRECT), [0, 0]));
        ip("link del tunnel10");
        assert_eq!(decided(&mut datapath), ((UNSPEC, SHOT), [1, 1]));
        add_device("uplink", 10);
        assert_eq!(decided(&mut datapath), ((UNSPEC, SHOT), [2, 2]));
        // A daemon finds out, and another one, too.
        datapath.observe_attachments(&BTreeMap::new(), &BTreeSet::new()).unwrap();
        assert_eq!(datapath.state().exits[&3].ifindex, 0);
        assert_eq!(datapath.state().exits[&2], state.exits[&2]);
        drop(datapath);
        let mut datapath = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        assert_eq!(datapath.state().exits[&3].ifindex, 0);
        // It may be meant after all, under a number that no slot leads to: the old one stays void.
        datapath.apply(&FastOp::WriteExit(5, state.exits[&3], Family::V4)).unwrap();
        datapath.beat().unwrap();
        assert_eq!(decided(&mut datapath), ((UNSPEC, SHOT), [3, 3]));
        datapath.apply(&FastOp::WriteSlot(3, Slot { egress: Egress::redirect(5), ..state.slots[&3] })).unwrap();
        assert_eq!(decided(&mut datapath), ((REDIRECT, REDIRECT), [3, 3]));
        datapath.apply(&FastOp::ClearExit(3)).unwrap();
        datapath.apply(&FastOp::WriteExit(3, state.exits[&0], Family::V4)).unwrap();
        assert_eq!(datapath.state().exits[&3], state.exits[&0], "a number is used again");
        // One whose device is not there is refused, and what stands under its number stays void.
        let missing = DeviceExit { ifindex: 999, ..state.exits[&0] };
        datapath.apply(&FastOp::WriteExit(6, missing, Family::V4)).unwrap_err();
        assert!(!datapath.state().exits.contains_key(&6));
    });
}

/// A next hop whose link-layer address the kernel knows gets a frame, and one that has failed or that nobody has looked for
/// is left to the kernel, which looks for it and tells the sender.
#[test]
fn a_next_hop_that_does_not_answer_is_left_to_the_kernel() {
    isolated(|pins| {
        let state = example();
        let mut datapath = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        for operation in filling(&state) {
            datapath.apply(&operation).unwrap();
        }
        if !asks_for_neighbours() {
            return;
        }
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        ip("link set lo up");
        ip("link set tunnel8 address 02:00:00:00:00:08");
        ip("link set tunnel9 address 02:00:00:00:00:09");
        ip("route add default via 10.99.0.1 dev tunnel9 onlink table 500");
        ip("route add default dev tunnel8 table 501");
        let gateway = address_words("10.99.0.1".parse().unwrap());
        let via = DeviceExit { ifindex: 9, exit: Exit { gateway, ..state.exits[&2].exit } };
        datapath.apply(&FastOp::WriteExit(6, via, Family::V4)).unwrap();
        for (index, egress, table) in [(2, Egress::redirect(6), 500), (1, Egress::redirect(1), 501)] {
            datapath.apply(&FastOp::WriteSlot(index, Slot { egress, table, ..state.slots[&index] })).unwrap();
        }
        let unresolved = |datapath: &mut Datapath, slot: u8| {
            let before = datapath.counters().unwrap();
            let (result, frame) = run(datapath, "ingress_l2", &ethernet([10, slot, 0, 1], [203, 0, 113, 1]), 0);
            let counted =
                |stats: &BTreeMap<u32, Stats>| stats[&u32::from(slot)].outcomes[Outcome::Unresolved as usize].packets;
            let new = counted(&datapath.counters().unwrap()) - counted(&before);
            assert_eq!(new == 1, result == UNSPEC, "{slot}: {result}");
            (result == UNSPEC).then_some(()).ok_or(frame[..12].to_vec())
        };
        let [gateway, destination] = [([2, 0, 0, 0, 9, 1], [2, 0, 0, 0, 0, 9]), ([0; 6], [0; 6])]
            .map(|(to, from): ([u8; 6], [u8; 6])| Err([to, from].concat()));
        for (slot, address, device, resolved) in
            [(2, "10.99.0.1", "tunnel9", &gateway), (1, "203.0.113.1", "tunnel8", &destination)]
        {
            assert_eq!(unresolved(&mut datapath, slot), Ok(()), "nobody has looked for {address}");
            ip(&format!("neigh replace {address} dev {device} lladdr 02:00:00:00:09:01 nud reachable"));
            assert_eq!(&unresolved(&mut datapath, slot), resolved, "{address} is known");
            ip(&format!("neigh replace {address} dev {device} lladdr 02:00:00:00:09:01 nud stale"));
            assert_eq!(&unresolved(&mut datapath, slot), resolved, "{address} is known");
            ip(&format!("neigh change {address} dev {device} nud failed"));
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert_eq!(unresolved(&mut datapath, slot), Ok(()), "{address} has failed");
        }
        // By a table that leads elsewhere nothing can be said.
        ip("route replace default via 10.99.0.2 dev tunnel9 onlink table 500");
        ip("neigh replace 10.99.0.2 dev tunnel9 lladdr 02:00:00:00:09:02 nud reachable");
        assert_eq!(unresolved(&mut datapath, 2), Err(vec![0; 12]), "the kernel looks for the gateway of the slot");
    });
}

/// A large change makes a new map. If that cannot be pinned, the change is in force all the same, in the programs as in the
/// mirror, and the map is pinned later, for the next daemon.
#[test]
fn a_large_change_is_made_although_it_cannot_be_pinned() {
    /// A slot of the example's.
    const DROPS: u32 = 6;
    isolated(|pins| {
        let bpffs = pins.parent().unwrap();
        let state = example();
        let mut datapath = Datapath::open(pins, Method::Tcx, 8 * index::MINIMUM).unwrap();
        for operation in filling(&state) {
            datapath.apply(&operation).unwrap();
        }
        let change = |slot| -> Vec<FastOp> {
            let prefix = |index: u16| format!("172.16.{}.{}/32", index >> 8, index & 255).parse().unwrap();
            (0..300).map(|index| FastOp::PutSource(prefix(index), Source { slot, arrives_by: 0 })).collect()
        };
        let is_made = |datapath: &mut Datapath, slot, result| {
            datapath.apply_entries(&change(slot).iter().collect::<Vec<_>>()).unwrap();
            let source = |text: &str| datapath.state().sources.get(&text.parse().unwrap()).map(|source| source.slot);
            assert_eq!(source("172.16.1.43/32"), Some(slot));
            datapath.beat().unwrap();
            let decided = run(datapath, "ingress_l2", &ethernet([172, 16, 1, 43], [203, 0, 113, 1]), 0).0;
            assert_eq!(decided, result, "the programs read the new prefixes");
        };
        umount2(bpffs, MntFlags::MNT_DETACH).unwrap();
        is_made(&mut datapath, 0, REDIRECT);
        is_made(&mut datapath, DROPS, SHOT);
        assert!(!datapath.maps_pinned());
        mount(Some("bpf"), bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        datapath.restore_pins().unwrap();
        assert!(datapath.maps_pinned());
        // A missing pin of the published map alone is noticed, too.
        std::fs::remove_file(pins.join(format!("v{LAYOUT_VERSION}/WORDS"))).unwrap();
        assert!(!datapath.maps_pinned());
        datapath.restore_pins().unwrap();
        assert!(datapath.maps_pinned());
        let state = datapath.state().clone();
        drop(datapath);
        assert_eq!(Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap().state(), &state);
    });
}

/// Can the kernel be asked for link-layer addresses by a table? Since Linux 6.5.
fn asks_for_neighbours() -> bool {
    KernelVersion::current().unwrap() >= KernelVersion::new(6, 5, 0)
}

/// A small packet of UDP in a frame between nobody and nobody.
fn ethernet(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = etherparse::PacketBuilder::ethernet2([0; 6], [0; 6]).ipv4(source, destination, 64);
    builder.udp(1, 2).write(&mut bytes, &[0; 20]).unwrap();
    bytes
}

/// What is told is what is counted, if the filter takes it and there are not too many; and twins tell nothing.
#[test]
fn decisions_are_told_to_who_asks() {
    isolated(|pins| {
        let state = example();
        let mut datapath = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        for operation in filling(&state) {
            datapath.apply(&operation).unwrap();
        }
        let (asked, exempt) = (ethernet([10, 0, 0, 1], [203, 0, 113, 1]), ethernet([10, 0, 0, 1], [192, 0, 2, 1]));
        let other = ethernet([10, 1, 0, 1], [203, 0, 113, 1]);
        let wanted = |from: &str, rate| Wanted { from: Some(from.parse().unwrap()), to: None, rate };
        let pass = |datapath: &mut Datapath| {
            for frame in [&asked, &other, &exempt] {
                run(datapath, "ingress_l2", frame, 0);
            }
            datapath.traced().unwrap()
        };
        assert_eq!(pass(&mut datapath), (vec![], 0), "nobody has asked");
        datapath.trace(Some(wanted("10.0.0.0/16", 1000).filter().unwrap())).unwrap();
        let (events, omitted) = pass(&mut datapath);
        let told: Vec<_> = events
            .iter()
            .map(|event| (event.source[0].to_ne_bytes(), event.slot, event.outcome, event.tunnel, event.length))
            .collect();
        let both = [(Outcome::Forwarded, 7), (Outcome::Exempt, 7)];
        assert_eq!(told, both.map(|(outcome, tunnel)| ([10, 0, 0, 1], 0, outcome as u32, tunnel, 48)));
        assert!(events.iter().all(|event| event.ifindex == TEST_DEVICE && event.protocol == 17 && event.time > 0));
        assert_eq!(omitted, 0);
        // Another filter, and ten in a span.
        datapath.trace(Some(wanted("2a02::/16", 1000).filter().unwrap())).unwrap();
        assert_eq!(pass(&mut datapath), (vec![], 0));
        datapath.trace(Some(wanted("10.0.0.0/8", 70).filter().unwrap())).unwrap();
        let (mut told, mut omitted) = (0, 0);
        for _ in 0..100 {
            let (events, all) = pass(&mut datapath);
            (told, omitted) = (told + events.len(), all);
        }
        assert!(omitted > 0 && told > 0 && told as u64 + omitted == 300, "{told} told, {omitted} not");
        let mut trial = datapath.twins().unwrap()().unwrap();
        let place = Place { hook: Hook::Ingress, device: TEST_DEVICE, address: [0; 6], xdp: false };
        datapath.trace(Some(wanted("10.0.0.0/8", 1000).filter().unwrap())).unwrap();
        let (source, destination) = (Ipv4Addr::new(10, 0, 0, 1).into(), Ipv4Addr::new(203, 0, 113, 1).into());
        assert!(!trial.run(&place, source, destination, &asked[14..]).unwrap().left);
        assert_eq!(datapath.traced().unwrap(), (vec![], omitted));
        datapath.trace(None).unwrap();
        assert_eq!(pass(&mut datapath), (vec![], omitted));
    });
}

/// The same bytes change as in user space, whose choice is held against etherparse elsewhere, and the checksum holds.
#[test]
fn the_programs_lower_segment_sizes_as_the_code_does_in_user_space() {
    isolated(|pins| {
        let mut datapath = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        let most = Clamp { v4: 1000, v6: 900 };
        // Before there is a limit for the device, and after, nothing changes.
        for limit in [None, Some(most), None] {
            datapath
                .apply(&limit.map_or(FastOp::RemoveClamp(TEST_DEVICE), |most| FastOp::SetClamp(TEST_DEVICE, most)))
                .unwrap();
            let mut changed = 0;
            for (v6, syn, options) in [false, true].into_iter().flat_map(|v6| {
                let size = [2, 4, 0x05, 0xb4];
                let mut cases: Vec<(bool, bool, Vec<u8>)> = vec![(v6, true, vec![]), (v6, false, size.to_vec())];
                // The size behind any number of options, at even and odd places, up to the longest header.
                cases.extend((0..=36).map(|before| (v6, true, [&vec![1; before][..], &size].concat())));
                cases.extend([(v6, true, vec![4, 2, 2, 4, 0, 100]), (v6, true, vec![3, 1, 2, 4, 0x05, 0xb4])]);
                cases
            }) {
                let builder = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6]);
                let builder =
                    if v6 { builder.ipv6([0x2a; 16], [0x20; 16], 64) } else { builder.ipv4([10; 4], [192; 4], 64) };
                let mut tcp = builder.tcp(1, 2, 3, 4).options_raw(&options).unwrap();
                if syn {
                    tcp = tcp.syn();
                }
                let mut frame = Vec::new();
                tcp.write(&mut frame, &[7; 3]).unwrap();
                let ethertype = if v6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
                let (result, got) = run(&mut datapath, "clamp_l2", &frame, 0);
                assert_eq!(result, UNSPEC);
                let change = limit.and_then(|most| mss::lower(ethertype, &Slice(&frame[14..]), &most));
                if let Some(change) = change {
                    changed += 1;
                    frame[14 + change.at..][..2].copy_from_slice(&change.value.to_ne_bytes());
                    let headers = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
                    let (tcp, payload) = (headers.transport.unwrap().tcp().unwrap(), headers.payload.slice());
                    let checksum = match headers.net.unwrap() {
                        etherparse::NetHeaders::Ipv4(ip, _) => tcp.calc_checksum_ipv4(&ip, payload),
                        etherparse::NetHeaders::Ipv6(ip, _) => tcp.calc_checksum_ipv6(&ip, payload),
                        other => panic!("{other:?}"),
                    };
                    let checksum = checksum.unwrap();
                    frame[14 + change.checksum..][..2].copy_from_slice(&checksum.to_be_bytes());
                }
                assert_eq!(got, frame, "{options:?}");
            }
            assert_eq!(changed, if limit.is_some() { 2 * 37 } else { 0 });
        }
    });
}

/// Prefixes are put, moved and removed a thousand times, in place and by publishing another map, while packets pass: each is
/// decided as before or as after, and what does not change always alike.
#[test]
fn no_packet_is_decided_wrongly_while_prefixes_change() {
    const SWAPS: u32 = 1000;
    /// A slot of the example's.
    const DROPS: u32 = 6;
    isolated(|pins| {
        let state = example();
        let mut datapath = Datapath::open(pins, Method::Tcx, index::MINIMUM).unwrap();
        for operation in filling(&state) {
            datapath.apply(&operation).unwrap();
        }
        let frame = |source: [u8; 4]| {
            let mut bytes = vec![0; 12];
            bytes.extend(ETHERTYPE_IPV4.to_be_bytes());
            etherparse::PacketBuilder::ipv4(source, [203, 0, 113, 1], 64)
                .udp(1, 2)
                .write(&mut bytes, &[0; 20])
                .unwrap();
            bytes
        };
        let (standing, moving) = (frame([10, 1, 0, 1]), frame([10, 0, 7, 1]));
        let [standing_is, before] = [&standing, &moving].map(|frame| run(&mut datapath, "egress_l2", frame, 0).0);
        // To be run by another thread than that which has the datapath.
        let pin = pins.with_file_name("egress");
        let program: &mut SchedClassifier = datapath.ebpf().program_mut("egress_l2").unwrap().try_into().unwrap();
        program.pin(&pin).unwrap();
        let program = SchedClassifier::from_pin(&pin).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        // Numbers of packets decided as before, and as after.
        let seen = [const { std::sync::atomic::AtomicU64::new(0) }; 2];
        let ordering = std::sync::atomic::Ordering::Relaxed;
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !done.load(ordering) {
                    assert_eq!(test_run(&program, &standing, 0).0, standing_is);
                    let is = test_run(&program, &moving, 0).0;
                    let state = [before, SHOT].iter().position(|state| *state == is);
                    seen[state.unwrap_or_else(|| panic!("neither as before nor as after: {is}"))]
                        .fetch_add(1, ordering);
                }
            });
            let prefix: IpNet = "10.0.7.0/24".parse().unwrap();
            // Longer, if the reader has not had its turn.
            let few = || !reader.is_finished() && seen.iter().any(|packets| packets.load(ordering) <= 100);
            for swap in (0..).take_while(|swap| *swap < SWAPS || few()) {
                let operation = match swap % 2 {
                    0 => FastOp::PutSource(prefix, Source { slot: DROPS, arrives_by: 0 }),
                    _ => FastOp::RemoveSource(prefix),
                };
                datapath.apply(&operation).unwrap();
                // Waits for programs to end, so that the reader gets to see either state, even on one CPU.
                if swap % 11 == 0 {
                    datapath.read_again().unwrap();
                }
            }
            done.store(true, ordering);
            reader.join().unwrap();
        });
    });
}
