//! Real frames through a router, first by the rules alone and then with the programs: what leaves must be the same, by
//! the same device, byte for byte.

use std::{
    net::{IpAddr, Ipv4Addr},
    ops::{AddAssign, Range},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use tunroute::{
    config::{Unmatched, Xdp},
    policy::fast::Hook,
    policy::net::Family,
};
use tunroute_common::maps::Outcome;
use tunroute_tests::{
    Capture, Direction, Injector, Seen,
    pace::SOON,
    snapshot::{can_ask_main, can_use_xdp},
};

use super::{
    expect::{Fate, Situation},
    packet::{Edges, Oddity, Packet, recipe},
    router::{Product, Router, is_own, macs},
    scenario::{DEVICES, Scenario, scenario},
    seeds::{Draw, Seeds},
};

/// Random hosts and packets for each, unless told otherwise: see [`Seeds`].
const HOSTS: u64 = 40;
const PACKETS: usize = 250;
/// As long as chance has shown too little in that many hosts, there are more, up to so many times as many.
const MORE: u64 = 10;
/// The largest packet that a wire takes, with a VLAN tag.
const LONGEST: usize = 1496;
/// A frame that nobody takes for anything (`ETH_P_802_EX1`): when it has come in, all before it have been dealt with.
const FENCE: u16 = 0x88b5;
/// The tunnels that take frames from XDP.
const EARLY: [&str; 2] = ["eth0", "eth1"];
/// As many frames at a time as wait for the host (`net.core.netdev_max_backlog` is 1000).
const BATCH: usize = 100;

/// Where ICMP errors come from if there is no address (RFC 7600; `INADDR_DUMMY` in `include/uapi/linux/in.h`).
const DUMMY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8));

#[test]
fn frames_leave_alike_with_and_without_the_programs() -> Result<()> {
    let router = Router::new()?;
    router.hold_nothing_back()?;
    let seeds = Seeds::from_environment(HOSTS, PACKETS)?;
    let sum = router.run(async |product| {
        // Frames stay in order on one CPU, whose queue the fence closes.
        let mut cpu = CpuSet::new();
        cpu.set(0)?;
        sched_setaffinity(Pid::from_raw(0), &cpu)?;
        let (scenarios, recipes) = (scenario(), recipe());
        let wires = Wires::new(&router)?;
        let mut sum = Sum::default();
        let Range { start, end } = seeds.seeds;
        for seed in start..start + MORE * (end - start) {
            if seed >= end && (end - start < HOSTS || sum.is_enough()) {
                break;
            }
            let mut draw = Draw::new(seed);
            let mut scenario = draw.next(&scenarios);
            // On every second host, what no policy is about is forwarded by the programs, too.
            if seed % 2 == 1 {
                scenario.config.unmatched = Unmatched::Fast;
            }
            // On every third one, frames are decided before there is an skb.
            if seed % 3 == 0 {
                scenario.config.xdp = Xdp::On;
            }
            let edges = Edges::of(&scenario);
            let packets = (0..seeds.packets).map(|_| draw.next(&recipes).cook(&scenario, &edges));
            let fits = |packet: &Packet| packet.bytes.len() <= scenario.mtu_of(packet.device).min(LONGEST);
            let packets: Vec<Packet> = packets.filter(fits).map(whole).collect();
            router.set_up(&scenario)?;
            let compared = compare(product, &wires, &router, &scenario, &packets).await;
            sum += compared.with_context(|| format!("seed {seed} in {}\n{scenario}", seeds.again()))?;
        }
        Ok(sum)
    })?;
    let Sum { left, fast, early, unmatched } = sum;
    println!(
        "{left} frames left, {fast} of them by the programs, {early} by XDP, {unmatched} that no policy was about"
    );
    ensure!(seeds.seeds.end - seeds.seeds.start < HOSTS || sum.is_enough(), "too few to prove anything");
    Ok(())
}

/// How many frames left, how many of them by the programs for a policy, as XDP among them, and how many for none.
#[derive(Clone, Copy, Default)]
struct Sum {
    left: usize,
    fast: u64,
    early: usize,
    unmatched: u64,
}

impl Sum {
    /// Something has been proven of everything that this kernel can do.
    fn is_enough(self) -> bool {
        self.fast > 200 && (self.unmatched > 20 || !can_ask_main()) && (self.early > 20 || !can_use_xdp())
    }
}

impl AddAssign for Sum {
    fn add_assign(&mut self, other: Self) {
        self.left += other.left;
        self.fast += other.fast;
        self.early += other.early;
        self.unmatched += other.unmatched;
    }
}

/// As it is on the wire: cut into segments only by whoever sends it.
fn whole(packet: Packet) -> Packet {
    Packet { gso: 0, ..packet }
}

/// Sends the packets twice.
async fn compare(
    product: &mut Product,
    wires: &Wires,
    router: &Router,
    scenario: &Scenario,
    packets: &[Packet],
) -> Result<Sum> {
    let kernel = product.observe(scenario).await?.state;
    let situation = Situation::new(scenario, &kernel);
    // What a rule of others sends by the uplink, the guard there does not let out.
    let packets: Vec<Packet> = packets.iter().filter(|packet| !situation.others_decide(packet)).cloned().collect();
    let packets = packets.as_slice();
    let mut rules_alone = situation.desired.clone();
    rules_alone.fast = None;
    product.reach(&rules_alone, scenario).await?;
    router.wait_until_bare()?;
    let (by_rules, early) = wires.send(router, scenario, packets)?;
    ensure!(early == 0, "{early} frames left as if by XDP");
    product.reach(&situation.desired, scenario).await?;
    let before = (forwarded(product)?, product.datapath.unmatched()?.packets);
    let (with_programs, early) = wires.send(router, scenario, packets)?;
    let missing: Vec<_> = by_rules.iter().filter(|frame| !with_programs.contains(frame)).take(2).collect();
    let new: Vec<_> = with_programs.iter().filter(|frame| !by_rules.contains(frame)).take(2).collect();
    ensure!(by_rules == with_programs, "by the rules alone: {missing:02x?}\nwith the programs: {new:02x?}");

    let (fast, unmatched) = (forwarded(product)? - before.0, product.datapath.unmatched()?.packets - before.1);
    let attached = &situation.desired.fast.as_ref().context("a fast path is desired")?.attachments;
    let attached = |device| attached.iter().any(|program| program.hook == Hook::Ingress && program.device == device);
    let is_fast = |packet: &&Packet| attached(packet.device) && matches!(situation.ingress(packet), Fate::Redirect(..));
    let expected = packets.iter().filter(is_fast).count();
    ensure!(fast == expected as u64, "{fast} packets by the programs, instead of {expected}");
    Ok(Sum { left: with_programs.len(), fast, early, unmatched })
}

/// How many packets the ingress programs have forwarded.
fn forwarded(product: &Product) -> Result<u64> {
    let counters = product.datapath.counters()?;
    Ok(counters.values().map(|stats| stats.outcomes[Outcome::Forwarded as usize].packets).sum())
}

/// What left: the device and the frame.
type Left = (String, Vec<u8>);

/// The other ends of the router's Ethernet devices.
struct Wires {
    by_device: Vec<(&'static str, Injector)>,
    /// The router's own ends of those that take frames from XDP.
    near: Vec<(&'static str, Injector)>,
}

impl Wires {
    fn new(router: &Router) -> Result<Self> {
        let devices = DEVICES.into_iter().map(|(name, _)| name).filter(|name| !name.starts_with("tun"));
        let injector = |device| {
            let [near, far] = macs(device);
            Ok((device, Injector::ethernet(&router.far, device, far, near)?))
        };
        let near = |device| {
            let [near, far] = macs(device);
            Ok((device, Injector::ethernet(&router.host, device, near, far)?))
        };
        let by_device = devices.map(injector).collect::<Result<_>>()?;
        Ok(Self { by_device, near: EARLY.into_iter().map(near).collect::<Result<_>>()? })
    }

    fn send_frame(&self, device: &str, frame: &[u8]) -> Result<()> {
        let wire = self.by_device.iter().find(|(name, _)| *name == device);
        wire.context("no such wire")?.1.send_frame(frame)
    }

    /// Sends packets to the router and returns what leaves it, in no particular order: the device and the frame. What
    /// arrives at the other end of such a device counts as having left by it, which XDP lets nobody see; and how much XDP did.
    fn send(&self, router: &Router, scenario: &Scenario, packets: &[Packet]) -> Result<(Vec<Left>, usize)> {
        let (mut capture, mut beyond) = (Capture::everywhere(&router.host)?, Capture::everywhere(&router.far)?);
        let (mut left, mut seen_leaving, mut arrived) = (Vec::new(), 0, 0);
        for batch in packets.chunks(BATCH) {
            for packet in batch {
                self.send_frame(packet.device, &frame(packet)).with_context(|| format!("{packet:?}"))?;
            }
            let [near, far] = macs("lan0");
            self.send_frame("lan0", &[&near.0[..], &far.0, &FENCE.to_be_bytes(), &[0; 46]].concat())?;
            capture.wait_for(is_fence, SOON)?;
            // Behind what XDP has sent there, in the same queue.
            for (device, near) in &self.near {
                let [own, other] = macs(device);
                near.send_frame(&[&other.0[..], &own.0, &FENCE.to_be_bytes(), &[0; 46]].concat())?;
                beyond.wait_for(|seen| is_fence(seen) && seen.device == *device, SOON)?;
            }
            for seen in capture.drain()?.into_iter().filter(|seen| seen.direction == Direction::Out) {
                if !EARLY.contains(&seen.device.as_str()) {
                    left.extend(comparable(scenario, seen));
                } else if !fences(&seen) && comparable(scenario, seen).is_some() {
                    seen_leaving += 1;
                }
            }
            let arrives = |seen: &Seen| seen.direction == Direction::In && EARLY.contains(&seen.device.as_str());
            for mut seen in beyond.drain()?.into_iter().filter(arrives) {
                seen.direction = Direction::Out;
                if let Some(frame) = comparable(scenario, seen) {
                    left.push(frame);
                    arrived += 1;
                }
            }
        }
        left.sort();
        Ok((left, arrived - seen_leaving))
    }
}

/// All before it have been dealt with.
fn is_fence(seen: &Seen) -> bool {
    seen.direction == Direction::In && fences(seen)
}

fn fences(seen: &Seen) -> bool {
    seen.raw.get(12..14) == Some(&FENCE.to_be_bytes())
}

/// A packet in its frame.
fn frame(packet: &Packet) -> Vec<u8> {
    let [near, far] = macs(packet.device);
    let to = if packet.oddity == Oddity::ForOthers { far } else { near };
    // Any VLAN but 0, which is a priority and no VLAN.
    let tag = if packet.tagged() { vec![0x81, 0, 0, packet.hop_limit | 1] } else { Vec::new() };
    [&to.0[..], &far.0, &tag, &packet.ethertype.to_be_bytes(), &packet.bytes].concat()
}

/// What leaves, without what differs from one time to the next.
fn comparable(scenario: &Scenario, seen: Seen) -> Option<Left> {
    // An IPv6 router also has the first address of each of its networks (RFC 4291, 2.6.1).
    let anycast = |src: IpAddr| src.is_ipv6() && scenario.addresses.iter().any(|own| own.own.network() == src);
    let own = seen.src.is_some_and(|src| is_own(scenario, src) || anycast(src) || src == DUMMY);
    // What the host says on the link by itself, IPv6 redirects among it, which it sends once a second.
    let link_local = |src: IpAddr| matches!(src, IpAddr::V6(src) if src.is_unicast_link_local());
    let chatter = seen.src.is_some_and(link_local) || seen.dst.is_some_and(|dst| dst.is_multicast());
    // "Unreachable" for want of a route, by `ip_error()` in `net/ipv4/route.c`: so many a second for each source.
    let metered = own && matches!((seen.dst, seen.icmp), (Some(IpAddr::V4(_)), Some((3, 0 | 1 | 13))));
    // The host finds the way of its ICMP errors before it chooses their source (`icmp_route_lookup()` in
    // `net/ipv4/icmp.c`). If that is a policy's, rules alone let it out by the uplink, and the guard there does not.
    let of_policy =
        |src: IpAddr| scenario.config.policies.iter().flat_map(|policy| &policy.from).any(|net| net.contains(&src));
    let guarded = own && seen.src.is_some_and(of_policy);
    if seen.direction != Direction::Out || chatter || metered || guarded {
        return None;
    }
    let mut raw = seen.raw;
    if own && seen.src.is_some_and(|src| Family::of_addr(&src) == Family::V4) {
        // The host numbers its packets: identification and checksum.
        let at = if seen.eth.is_some() { 14 } else { 0 };
        for field in [at + 4..at + 6, at + 10..at + 12] {
            raw.get_mut(field)?.fill(0);
        }
    }
    Some((seen.device, raw))
}
