//! The loaded programs against the real kernel: the same packets through `BPF_PROG_TEST_RUN` and `RTM_GETROUTE`, on a
//! router whose rules, routes and maps the product's own code has made.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Context, Result, ensure};
use aya::{
    TestRun, TestRunOptions, TestRunResult,
    programs::{SchedClassifier, Xdp},
};
use tunroute::{
    config,
    datapath::Datapath,
    kernel::{Answer, Oracle, Question, Refused},
    policy::fast::FastState,
    policy::model::Model,
    policy::net::{Family, IfIndex, TABLE_MAIN},
};
use tunroute_common::{
    decide::{Verdict, decide_egress, decide_ingress},
    maps::{Outcome, flags},
    packet::{Segmented, Slice},
};
use tunroute_tests::{rule_walk::Decision, snapshot::has_tcx};

use super::{
    expect::{Fate, Situation},
    packet::{Edges, Oddity, Packet, Recipe, recipe},
    router::{Product, Router, is_own, macs},
    scenario::{Scenario, scenario, special},
    seeds::{Draw, Seeds},
    tally::{EARLY, FATES, Tally},
};

/// Random hosts and packets for each, unless told otherwise: see [`Seeds`].
const HOSTS: u64 = 200;
const PACKETS: usize = 560;
/// As many must have been asked about: some of the packets drawn cannot be put into a test run.
const ENOUGH: usize = 100_000;

/// `XDP_DROP`, `XDP_PASS` and `XDP_REDIRECT`.
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT` and `TC_ACT_REDIRECT`.
const UNSPEC: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

#[test]
fn the_loaded_programs_decide_as_the_kernel_does() -> Result<()> {
    let router = Router::new()?;
    router.hold_nothing_back()?;
    let seeds = Seeds::from_environment(HOSTS, PACKETS)?;
    let tally = Tally::default();
    let asked = router.run(async |product| {
        let (scenarios, recipes) = (scenario(), recipe());
        let mut oracle = Oracle::connect()?;
        let mut asked = 0;
        for seed in seeds.seeds.clone() {
            let mut draw = Draw::new(seed);
            let mut scenario = draw.next(&scenarios);
            // On every second host, some frames are decided before there is an skb.
            if seed % 2 == 1 {
                scenario.config.xdp = config::Xdp::On;
            }
            let recipes: Vec<Recipe> = (0..seeds.packets).map(|_| draw.next(&recipes)).collect();
            router.set_up(&scenario)?;
            let compared = compare(product, &mut oracle, &scenario, &recipes, &tally).await;
            asked += compared.with_context(|| format!("seed {seed} in {}\n{scenario}", seeds.again()))?;
        }
        Ok(asked)
    })?;
    println!("{asked} packets");
    if seeds.seeds.clone().count() >= 200 {
        ensure!(asked >= ENOUGH, "only {asked} packets");
        let early = if has_tcx() { &EARLY[..] } else { &[] };
        tally.check(&[&FATES[..], early].concat());
    }
    Ok(())
}

/// Puts the packets before a router that is as the scenario says. Returns how many.
async fn compare(
    product: &mut Product,
    oracle: &mut Oracle,
    scenario: &Scenario,
    recipes: &[Recipe],
    tally: &Tally,
) -> Result<usize> {
    let kernel = product.observe(scenario).await?.state;
    let situation = Situation::new(scenario, &kernel);
    product.reach(&situation.desired, scenario).await?;
    let state = product.datapath.state().clone();
    let model = Model::from(&state);
    let edges = Edges::of(scenario);
    let before = counted(&product.datapath)?;
    let mut counts = BTreeMap::new();
    let mut compared = 0;
    for packet in recipes.iter().map(|recipe| recipe.cook(scenario, &edges)).filter(can_be_tried) {
        compared += 1;
        let (arrival, bytes) = (situation.arrival(&packet), Segmented(Slice(&packet.bytes), packet.gso));
        let answer = if special(packet.source) || special(packet.destination) {
            None
        } else {
            Some(ask(oracle, &situation, &packet).with_context(|| format!("{packet:?}"))?)
        };
        for (program, verdict, expected) in [
            ("ingress", decide_ingress(&arrival, &bytes, &model), situation.ingress(&packet)),
            ("egress", decide_egress(&arrival, &bytes, &model), situation.egress(&packet)),
        ] {
            if situation.unseen(program, &packet) {
                continue;
            }
            let fate = situation.fate(verdict, &state);
            if let Verdict::StepAside(slot, outcome)
            | Verdict::Drop(slot, outcome)
            | Verdict::Redirect(slot, _, outcome) = verdict
            {
                let outcome = if is_unresolved(fate, &state) { Outcome::Unresolved } else { outcome };
                *counts.entry((slot, outcome.name())).or_default() += 1;
            }
            tally.count(program, fate);
            let about = || format!("{program}: {packet:?}, the kernel says {answer:?}");
            ensure!(fate == expected, "{fate:?} instead of {expected:?}\n{}", about());
            if program == "ingress" {
                let meant = situation.check_intent(&packet, fate);
                ensure!(meant.is_ok(), "{meant:?}\n{}", about());
            }
            if program == "ingress" && state.stations.contains_key(&arrival.ifindex) && packet.gso == 0 {
                let got = run_early(&mut product.datapath, &situation, &packet)?;
                let expected = early(fate, &situation, &packet, &state);
                ensure!(got == expected, "{fate:?}, but XDP: {got:x?}\n{}", about());
                if let (XDP_REDIRECT | XDP_DROP, Verdict::Redirect(slot, _, outcome) | Verdict::Drop(slot, outcome)) =
                    (got.0, verdict)
                {
                    tally.count("xdp", fate);
                    *counts.entry((slot, outcome.name())).or_default() += 1;
                }
            }
            let got = run(&mut product.datapath, program, &situation, &packet)?;
            ensure!(
                got == forwarded(fate, &situation, &packet, &state),
                "{fate:?}, but the program: {got:x?}\n{}",
                about()
            );
            // The guard at an uplink heeds no rules of others, and no exemption that leads inside.
            let guarded = program == "egress" && situation.walk(&packet) != situation.guarded(&packet);
            if let Some(answer) = answer.filter(|_| !guarded) {
                ensure!(agrees(fate, answer, &packet), "{fate:?}\n{}", about());
            }
        }
    }
    let after = counted(&product.datapath)?;
    let moved: BTreeMap<_, u64> = after
        .iter()
        .map(|(key, count)| (*key, count - before.get(key).unwrap_or(&0)))
        .filter(|(_, count)| *count > 0)
        .collect();
    ensure!(moved == counts, "counted by the programs: {moved:?}\nto be counted: {counts:?}");
    Ok(compared)
}

/// The kernel takes no packet without its whole IP header into a test run, and none with a tag beside it.
fn can_be_tried(packet: &Packet) -> bool {
    let header = if packet.ethertype == tunroute_common::packet::ETHERTYPE_IPV6 { 40 } else { 20 };
    !packet.tagged() && packet.bytes.len() >= header
}

/// The kernel's answer, which must be that of the rule walk.
fn ask(oracle: &mut Oracle, situation: &Situation<'_>, packet: &Packet) -> Result<Answer> {
    let Packet { source, destination, .. } = *packet;
    let own = is_own(situation.scenario, source);
    let iif = situation.ifindex(packet.device);
    let answer = oracle.ask(&Question { source, destination, iif: (!own).then_some(iif) })?;
    let walk = situation.walk(packet);
    let strict = situation.scenario.reverse_path;
    let refused = match walk.decision {
        // A rule that says so (`fib4_rule_action()` in `net/ipv4/fib_rules.c`).
        Decision::Unreachable if walk.table.is_none() => Some(Refused::NoRoute),
        Decision::Unreachable => Some(Refused::Unreachable),
        Decision::Prohibit => Some(Refused::Prohibit),
        Decision::Blackhole => Some(Refused::Dropped),
        Decision::NoRoute => Some(Refused::NoRoute),
        Decision::Local | Decision::Leaves { .. } => {
            let v4 = packet.family() == Family::V4;
            // For a broadcast, the kernel looks for a way back from nowhere (`brd_input` in `ip_route_input_slow()`).
            let broadcast = walk.decision == Decision::Local && !is_own(situation.scenario, destination);
            let to = if broadcast { Ipv4Addr::UNSPECIFIED.into() } else { destination };
            let name = |device| situation.kernel.links[&device].name.as_str();
            let out = match (walk.decision, answer) {
                (Decision::Leaves { device: Some(device), .. }, _) => Some(name(device)),
                (Decision::Leaves { .. }, Answer::Leaves { device, .. }) => Some(name(device)),
                // It is not known which of several next hops the kernel has refused.
                (Decision::Leaves { .. }, _) => return Ok(answer),
                _ => None,
            };
            let believed = if v4 && !own { situation.host.believes(source, to, iif, out, strict) } else { Some(true) };
            match believed {
                Some(true) => None,
                Some(false) => Some(Refused::Dropped),
                None => return Ok(answer),
            }
        }
    };
    let expected = match (refused, walk.decision, walk.table, answer) {
        (Some(refused), ..) => Answer::Refused(refused),
        (_, Decision::Local, Some(table), _) => Answer::Local { table },
        // The model does not know the main table's gateways, nor which of several next hops is taken.
        (_, Decision::Leaves { device, .. }, Some(TABLE_MAIN), Answer::Leaves { device: taken, gateway, .. }) => {
            Answer::Leaves { device: device.unwrap_or(taken), gateway, table: TABLE_MAIN }
        }
        (_, Decision::Leaves { device: Some(device), gateway }, Some(table), _) => {
            Answer::Leaves { device, gateway, table }
        }
        _ => anyhow::bail!("{walk:?} is no decision, and the kernel says {answer:?}"),
    };
    ensure!(answer == expected, "the kernel says {answer:?}, the rule walk {expected:?} by {walk:?}");
    Ok(answer)
}

/// Is a fate what the kernel says?
fn agrees(fate: Fate, answer: Answer, packet: &Packet) -> bool {
    match fate {
        // The kernel has the last word.
        Fate::Pass | Fate::Aside(..) => true,
        Fate::Redirect(_, Outcome::Forwarded, to, next_hop) => {
            matches!(answer, Answer::Leaves { device, gateway, table } if (device, gateway) == (to, next_hop) && table >= 1000)
        }
        Fate::Drop(_, Outcome::Blackholed) => answer == Answer::Refused(Refused::Dropped),
        // On its way out, the kernel has believed the source; and a leak is what it must not do.
        Fate::Redirect(_, _, to, _) => match answer {
            Answer::Leaves { device, .. } => device == to,
            Answer::Refused(refused) => refused == Refused::Dropped && packet.family() == Family::V4,
            Answer::Local { .. } => false,
        },
        Fate::Drop(..) => !matches!(answer, Answer::Leaves { table: TABLE_MAIN, .. } | Answer::Local { .. }),
    }
}

/// The packet in an Ethernet frame.
fn frame(packet: &Packet) -> Vec<u8> {
    let [near, far] = macs(packet.device);
    let to = if packet.oddity == Oddity::ForOthers { far } else { near };
    [&to.0[..], &far.0, &packet.ethertype.to_be_bytes(), &packet.bytes].concat()
}

/// What a program did with a packet: its result, and the frame afterwards.
fn run(datapath: &mut Datapath, program: &str, situation: &Situation<'_>, packet: &Packet) -> Result<(i32, Vec<u8>)> {
    // `struct __sk_buff` in `include/uapi/linux/bpf.h`: ifindex and gso_size.
    let mut context = [0u8; 192];
    context[40..44].copy_from_slice(&situation.ifindex(packet.device).to_ne_bytes());
    context[176..180].copy_from_slice(&packet.gso.to_ne_bytes());
    let frame = frame(packet);
    let program: &mut SchedClassifier =
        datapath.ebpf().program_mut(&format!("{program}_l2")).context("no such program")?.try_into()?;
    let (result, out) = tried(program, &frame, &context)?;
    Ok((result.cast_signed(), out))
}

/// What XDP did with a packet: its result, and the frame afterwards.
fn run_early(datapath: &mut Datapath, situation: &Situation<'_>, packet: &Packet) -> Result<(u32, Vec<u8>)> {
    let frame = frame(packet);
    // `struct xdp_md` in `include/uapi/linux/bpf.h`: data_end and ingress_ifindex.
    let mut context = [0u8; 24];
    context[4..8].copy_from_slice(&u32::try_from(frame.len())?.to_ne_bytes());
    context[12..16].copy_from_slice(&situation.ifindex(packet.device).to_ne_bytes());
    let program: &mut Xdp = datapath.ebpf().program_mut("ingress_xdp").context("no such program")?.try_into()?;
    tried(program, &frame, &context)
}

/// Runs a frame through a program: its result, and the frame afterwards.
fn tried<P>(program: &P, frame: &[u8], context: &[u8]) -> Result<(u32, Vec<u8>)>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0; frame.len() + 64];
    let result = program.test_run(TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out),
        ctx_in: Some(context),
        repeat: 1,
        ..TestRunOptions::default()
    })?;
    out.truncate(usize::try_from(result.data_size_out)?);
    Ok((result.return_value, out))
}

/// What XDP must do with a packet. It leaves to the program behind it what its devices do not take.
fn early(fate: Fate, situation: &Situation<'_>, packet: &Packet, state: &FastState) -> (u32, Vec<u8>) {
    match fate {
        Fate::Drop(..) => (XDP_DROP, frame(packet)),
        // Without a gateway, it is left to the program behind.
        Fate::Redirect(_, _, device, Some(_)) if leads(state, device, flags::TAKES_FRAMES) => {
            (XDP_REDIRECT, readdressed(situation, packet, device))
        }
        _ => (XDP_PASS, frame(packet)),
    }
}

/// The frame in which a packet goes to a tunnel's gateway.
fn readdressed(situation: &Situation<'_>, packet: &Packet, device: IfIndex) -> Vec<u8> {
    let [near, far] = macs(&situation.kernel.links[&device].name);
    [&far.0[..], &near.0, &frame(packet)[12..14], &packet.a_hop_later()].concat()
}

/// Has an exit by a device such a property?
fn leads(state: &FastState, device: IfIndex, property: u32) -> bool {
    state.exits.values().any(|exit| exit.ifindex == device && exit.exit.has(property))
}

/// Is the packet left to the kernel where it enters, since nobody has looked for its next hop? The gateways are known.
fn is_unresolved(fate: Fate, state: &FastState) -> bool {
    let Fate::Redirect(_, Outcome::Forwarded, device, None) = fate else { return false };
    has_tcx() && leads(state, device, flags::ETHERNET)
}

/// What a program must do with a packet: its result, and the frame afterwards.
fn forwarded(fate: Fate, situation: &Situation<'_>, packet: &Packet, state: &FastState) -> (i32, Vec<u8>) {
    let frame = frame(packet);
    match fate {
        Fate::Pass | Fate::Aside(..) => (UNSPEC, frame),
        Fate::Drop(..) => (SHOT, frame),
        Fate::Redirect(..) if is_unresolved(fate, state) => (UNSPEC, frame),
        Fate::Redirect(_, Outcome::Forwarded, device, Some(_))
            if has_tcx() && leads(state, device, flags::ETHERNET) =>
        {
            (REDIRECT, readdressed(situation, packet, device))
        }
        Fate::Redirect(_, Outcome::Forwarded, ..) => (REDIRECT, [&frame[..14], &packet.a_hop_later()].concat()),
        Fate::Redirect(..) => (REDIRECT, frame),
    }
}

/// The counters of all slots, by slot and outcome.
fn counted(datapath: &Datapath) -> Result<BTreeMap<(u32, &'static str), u64>> {
    let mut counts = BTreeMap::new();
    for (slot, stats) in datapath.counters()? {
        for outcome in Outcome::ALL {
            counts.insert((slot, outcome.name()), stats.outcomes[outcome as usize].packets);
        }
    }
    Ok(counts)
}
