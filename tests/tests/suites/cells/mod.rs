//! The cells of the matrix: a kind of tunnel, a datapath, a family and a place where packets come from. For each: what
//! arrives at the far end, by which device it left, and who decided.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result, ensure};
use etherparse::IpNumber;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Counters, Daemon, DaemonOptions, Injector, Mac, Netns, Seen, Sender, TUNNELS, TunnelKind, TunnelPlan,
    World, bulk, inject::udp, pace::SOON, ping, plan::REMOTE, traffic::Answer,
};

/// Where packets are sent to.
const PORT: u16 = 7001;
/// What a sender gives: `inject` is told so, and `net.ipv4.ip_default_ttl` and `net.ipv6.conf.*.hop_limit` are.
const HOP_LIMIT: u8 = 64;
/// UDP payloads, up to a packet that just fits the tunnels (1400 bytes, with an IPv6 header).
const PAYLOADS: [usize; 6] = [1, 2, 35, 512, 1351, 1352];
/// Bytes of a TCP transfer.
const BULK: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Kernel,
    Both,
    Ebpf,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Both, Self::Ebpf];

    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Both => "both",
            Self::Ebpf => "ebpf",
        }
    }

    /// The outcome that the fast path counts for a packet that leaves by its tunnel.
    fn outcome(self, origin: Origin) -> Option<&'static str> {
        match (self, origin) {
            (Self::Kernel, _) | (Self::Both, Origin::Host) => None,
            (Self::Both | Self::Ebpf, Origin::Behind(_)) => Some("forwarded"),
            (Self::Ebpf, Origin::Host) => Some("diverted"),
        }
    }
}

/// Where packets come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From the client, by this device of the host.
    Behind(&'static str),
    /// From the host's own address on the tunnel.
    Host,
}

/// One row of the table: everything but the kind of traffic.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    pub kind: TunnelKind,
    pub mode: Mode,
    pub family: Family,
    pub origin: Origin,
    pub tunnel: usize,
    pub src: IpAddr,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, mode, family, origin, tunnel, .. } = self;
        write!(f, "{kind:?} target, {}, {family}, {origin:?}, tunnel {tunnel}", mode.name())
    }
}

impl Cell {
    fn plan(&self) -> &'static TunnelPlan {
        &TUNNELS[self.tunnel]
    }

    fn policy(&self) -> String {
        format!("tunnel{}", self.tunnel)
    }

    fn dst(&self) -> IpAddr {
        REMOTE.of(self.family)
    }

    /// The hop limit at the far end: the broker takes one, the host only from what it forwards.
    fn hop_limit(&self) -> u8 {
        if self.origin == Origin::Host { HOP_LIMIT - 1 } else { HOP_LIMIT - 2 }
    }

    fn origin<'a>(&self, world: &'a World) -> &'a Netns {
        if self.origin == Origin::Host { &world.host } else { &world.client }
    }

    /// Came from this cell's sender to the far end.
    fn arrived(&self, seen: &Seen) -> bool {
        !seen.left() && seen.is(self.src, self.dst())
    }
}

/// What watches a cell.
pub struct Bench<'a> {
    world: &'a World,
    daemon: &'a Daemon<'a>,
    host: Capture,
    remote: Capture,
}

impl<'a> Bench<'a> {
    pub fn new(world: &'a World, daemon: &'a Daemon<'a>) -> Result<Self> {
        Ok(Self { world, daemon, host: Capture::everywhere(&world.host)?, remote: Capture::everywhere(&world.remote)? })
    }

    /// Forgets what was seen so far and reads the counters.
    fn begin(&mut self) -> Result<Counters> {
        self.host.drain()?;
        self.remote.drain()?;
        self.daemon.counters()
    }

    /// All packets of the cell's source left by the tunnel, framed for the broker if it is an Ethernet device, and none
    /// by another device; returns them.
    fn left_by_the_tunnel(&mut self, cell: &Cell) -> Result<Vec<Seen>> {
        let device = cell.plan().device;
        let expected = self.world.macs(cell.tunnel);
        // What neighbours ask each other, they ask when it is time.
        let of_cell = |seen: &Seen| {
            let for_the_link =
                seen.icmp.is_some_and(|(kind, _)| cell.family == Family::V6 && (133..=137).contains(&kind));
            seen.left() && seen.src == Some(cell.src) && !for_the_link
        };
        let frames: Vec<Seen> = self.host.drain()?.into_iter().filter(of_cell).collect();
        for seen in &frames {
            ensure!(seen.device == device, "left by another device than {device}: {seen}");
            let macs = seen.eth.as_ref().map(|eth| (Mac(eth.source), Mac(eth.destination)));
            ensure!(macs == expected, "framed from and to {macs:?} instead of {expected:?}: {seen}");
        }
        Ok(frames)
    }

    /// The fast path decided exactly so many packets since `before`, and nothing else.
    fn decided(&self, cell: &Cell, before: &Counters, packets: u64) -> Result<()> {
        let since = self.daemon.counters()?.since(before);
        let expected = cell.mode.outcome(cell.origin).map(|outcome| ((cell.policy(), outcome.to_owned()), packets));
        ensure!(since == expected.into_iter().collect(), "the fast path counted {since:?}");
        Ok(())
    }

    fn udp(&mut self, cell: &Cell) -> Result<()> {
        let before = self.begin()?;
        let payload =
            |number: usize| -> Vec<u8> { (0..PAYLOADS[number]).map(|at| (at * 7 + number).to_le_bytes()[0]).collect() };
        let dst = SocketAddr::new(cell.dst(), PORT);
        let port = match cell.origin {
            Origin::Host => {
                let sender = Sender::open(&self.world.host, cell.src, None)?;
                for number in 0..PAYLOADS.len() {
                    sender.send(dst, &payload(number))?;
                }
                sender.port()?
            }
            Origin::Behind(device) => {
                let injector = match device {
                    "lan0" => self.world.client_injector()?,
                    device => Injector::layer3(&self.world.client, device)?,
                };
                for number in 0..PAYLOADS.len() {
                    injector.send(&udp(SocketAddr::new(cell.src, 7000), dst, HOP_LIMIT, &payload(number))?)?;
                }
                7000
            }
        };
        for number in 0..PAYLOADS.len() {
            let seen = self.remote.wait_for(|seen| cell.arrived(seen), SOON)?;
            ensure!(seen.device == cell.plan().remote_device, "came by another way: {seen}");
            ensure!(seen.protocol == Some(IpNumber::UDP) && seen.ports == Some((port, PORT)), "changed: {seen}");
            ensure!(seen.hop_limit == Some(cell.hop_limit()), "hop limit: {seen}");
            ensure!(seen.checksum_ok && !seen.checksum_partial, "checksum: {seen}");
            ensure!(seen.payload == payload(number), "packet {number}: another payload or out of order: {seen}");
        }
        let more = self.remote.drain()?.into_iter().find(|seen| cell.arrived(seen));
        ensure!(more.is_none(), "came twice: {more:?}");
        let left = self.left_by_the_tunnel(cell)?.len();
        ensure!(left == PAYLOADS.len(), "{left} packets left by the tunnel, {} were sent", PAYLOADS.len());
        self.decided(cell, &before, PAYLOADS.len() as u64)
    }

    fn echo(&mut self, cell: &Cell) -> Result<()> {
        let before = self.begin()?;
        let there = ping(cell.origin(self.world), cell.src, cell.dst())?;
        ensure!(there == Answer::Reply, "the request: {there:?}");
        let back = ping(&self.world.remote, cell.dst(), cell.src)?;
        ensure!(back == Answer::Reply, "the reply: {back:?}");
        let (request, reply) = if cell.family == Family::V4 { (8, 0) } else { (128, 129) };
        for kind in [request, reply] {
            let seen = self.remote.wait_for(|seen| cell.arrived(seen), SOON)?;
            ensure!(seen.device == cell.plan().remote_device, "came by another way: {seen}");
            ensure!(seen.icmp == Some((kind, 0)) && seen.hop_limit == Some(cell.hop_limit()), "changed: {seen}");
            ensure!(seen.checksum_ok && !seen.checksum_partial, "checksum: {seen}");
        }
        let left = self.left_by_the_tunnel(cell)?.len();
        ensure!(left == 2, "{left} packets left by the tunnel, a request and a reply were sent");
        self.decided(cell, &before, 2)
    }

    /// TCP, whose segments leave the sender as GSO packets and must arrive as they were sent.
    fn bulk(&mut self, cell: &Cell) -> Result<()> {
        let before = self.begin()?;
        bulk((cell.origin(self.world), cell.src), (&self.world.remote, cell.dst()), BULK, SOON)?;
        let left = self.left_by_the_tunnel(cell)?;
        ensure!(left.iter().all(|seen| seen.checksum_ok), "bad checksums");
        let longest = left.iter().map(|seen| seen.raw.len()).max().context("nothing left by the tunnel")?;
        ensure!(longest > 4000, "no GSO packet left by the tunnel: the longest has {longest} bytes");
        let Some(outcome) = cell.mode.outcome(cell.origin) else { return self.decided(cell, &before, 0) };
        let after = self.daemon.counters()?;
        let bytes = after.bytes(&cell.policy(), outcome)? - before.bytes(&cell.policy(), outcome)?;
        ensure!(bytes >= BULK as u64, "only {bytes} of {BULK} bytes took the fast path");
        let since = after.since(&before);
        // In `both` the first segments are too long, which the kernel tells the client.
        let others: Vec<_> = since.keys().filter(|(_, name)| name != outcome && name != "too_big").collect();
        ensure!(others.is_empty() && (cell.mode == Mode::Both || since.len() == 1), "the fast path counted {since:?}");
        Ok(())
    }

    pub fn all(&mut self, cell: &Cell) -> Result<()> {
        self.udp(cell).with_context(|| format!("{cell}: UDP"))?;
        self.echo(cell).with_context(|| format!("{cell}: echo"))?;
        self.bulk(cell).with_context(|| format!("{cell}: TCP bulk"))
    }
}

/// With no rules the senders' routes have the uplink's MTU, and nobody tells them of the tunnel's: what keeps TCP from
/// sending longer segments is the far end's MSS. This sets it, in the routes of `remote` to the tunnels.
pub fn limit_mss(world: &World) -> Result<()> {
    for family in Family::ALL {
        let version = if family == Family::V4 { "-4" } else { "-6" };
        let routes = world.remote.query("ip", &format!("{version} route show"))?;
        let script: String = routes
            .lines()
            .filter(|route| TUNNELS.iter().any(|plan| route.contains(plan.remote_device) && route.contains("via")))
            .map(|route| format!("{version} route replace {} advmss 1340\n", route.replace("pref medium", "")))
            .collect();
        world.remote.ip(&script)?;
    }
    Ok(())
}

/// The programs are where the mode wants them, and only there; `ingress` are the ingress devices.
pub fn check_attachments(world: &World, daemon: &Daemon<'_>, mode: Mode, ingress: &[(&str, &str)]) -> Result<()> {
    let status = daemon.status()?;
    let attached = status["fast_path"]["attached"].as_array().context("no fast_path.attached")?.len();
    let places = ingress.iter().map(|(device, program)| (*device, "ingress", *program));
    for (device, hook, program) in places.chain([("net0", "egress", "egress_l2")]) {
        let expected = if mode == Mode::Kernel { vec![] } else { vec![program] };
        let found = programs(world, device, hook)?;
        ensure!(found == expected, "{mode:?}: {hook} of {device}: {found:?}");
    }
    ensure!(attached == if mode == Mode::Kernel { 0 } else { ingress.len() + 1 }, "{mode:?}: {status:#}");
    let rules = status["kernel"]["rules"].as_u64().context("no kernel.rules")?;
    ensure!((rules == 0) == (mode == Mode::Ebpf), "{mode:?}: {rules} rules");
    Ok(())
}

/// The programs on a device: attached by TCX, or as filters of a clsact qdisc where the kernel has no TCX.
fn programs(world: &World, device: &str, hook: &str) -> Result<Vec<String>> {
    let mut programs = world.host.tcx(device, hook)?;
    for program in &mut programs {
        *program = program.trim_start_matches("tcx ").to_owned();
    }
    // Where there is no clsact qdisc there are no filters, and `tc` says so on its error output only.
    let filters = world.host.query("tc", &format!("filter show dev {device} {hook}")).unwrap_or_default();
    let words = filters.split_whitespace();
    programs.extend(words.filter(|word| word.starts_with(hook) && word.contains("_l")).map(str::to_owned));
    // Each filter is shown with its chain, and by itself.
    programs.dedup();
    Ok(programs)
}

/// All cells of a kind of tunnel.
pub fn matrix(kind: TunnelKind) -> Result<()> {
    let world = World::with(kind).vnet_hdr().build()?;
    let config = |mode: Mode| format!("datapath = \"{}\"\n{}", mode.name(), world.config());
    let daemon = Daemon::start(&world, &config(Mode::Kernel), &DaemonOptions::default())?;
    let mut bench = Bench::new(&world, &daemon)?;
    for mode in Mode::ALL {
        daemon.write_config(&config(mode))?;
        daemon.reload()?;
        check_attachments(&world, &daemon, mode, &[("lan0", "ingress_l2")])?;
        if mode == Mode::Ebpf {
            limit_mss(&world)?;
        }
        for &family in kind.families() {
            for (tunnel, plan) in TUNNELS.iter().enumerate() {
                for (origin, src) in [(Origin::Behind("lan0"), plan.client), (Origin::Host, plan.host)] {
                    bench.all(&Cell { kind, mode, family, origin, tunnel, src: src.of(family) })?;
                }
            }
        }
    }
    Ok(())
}
