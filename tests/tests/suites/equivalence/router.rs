//! A real router for scenarios: its devices, and the product's own way from a configuration to rules, routes and maps.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use ipnet::IpNet;
use tunroute::{
    datapath::{Datapath, Method},
    kernel::{Events, Kernel, Kinds, Snapshot},
    policy::compile::Desired,
    policy::net::{Family, KernelOp, LinkLayer},
    policy::plan::{Op, Undone, plan},
};
use tunroute_tests::{
    Lab, Mac, Netns, Share, TunOptions, TunPair,
    device::{End, veth},
    netns::BpfFs,
    offload::{AS_ON_A_WIRE, switch},
    pace::{SOON, patience, until},
};

use super::scenario::{
    Address, DEVICES, Foreign, ForeignRoute, GATEWAYS, Inside, Scenario, TABLE_OTHERS, TUNNELS, Through, special,
};

/// The protocol number of a scenario's own routes, by which they are removed again.
const PROTOCOL: u32 = 99;
/// As many words as the programs' map of prefixes has: a scenario fits.
const WORDS: u64 = 1 << 17;

/// The router, and a namespace at the other end of all its devices.
pub struct Router {
    // Dropped in this order.
    _tuns: [TunPair; 2],
    /// The router's namespace.
    pub host: Netns,
    /// The other ends, by the same names.
    pub far: Netns,
    /// The priority of the rule of the local table.
    local_rule: AtomicU32,
    bpffs: BpfFs,
    _lab: Lab,
}

/// The link-layer addresses of a device: the router's and the other end's.
pub fn macs(device: &str) -> [Mac; 2] {
    let number = DEVICES.iter().position(|(name, _)| *name == device).and_then(|index| u8::try_from(index).ok());
    [1, 2].map(|side| Mac([2, 0, 0, 0, number.unwrap_or(0xff), side]))
}

impl Router {
    /// Makes the namespaces and the devices.
    pub fn new() -> Result<Self> {
        let lab = Lab::new(Share::Others)?;
        let [host, far] = lab.netns(["host", "far"])?;
        host.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
        // Until somebody has added a rule, IPv4 has one table for the local and the main one, and believes sources that
        // are broadcast addresses (`fib_trie_unmerge()` in `net/ipv4/fib_trie.c`, `fib_validate_source()` in
        // `net/ipv4/fib_frontend.c`). A host with policies is past that.
        host.ip("rule add pref 32000 lookup main\nrule del pref 32000")?;
        let ethernet = DEVICES.into_iter().filter(|(_, layer)| *layer == LinkLayer::Ethernet);
        for (device, _) in ethernet {
            let [near, other] = macs(device);
            veth(End { netns: &host, device, mac: near }, End { netns: &far, device, mac: other }, 1500)?;
            switch(&far, device, &AS_ON_A_WIRE)?;
            // What comes out there goes nowhere, and nobody answers.
            far.ip(&format!("link set {device} arp off"))?;
        }
        let tun = |device| TunPair::new((&host, device), (&far, device), TunOptions::default());
        let tuns = [tun("tun0")?, tun("tun1")?];
        let bpffs = BpfFs::mount(host.dir().join("bpf"))?;
        Ok(Self { _tuns: tuns, host, far, local_rule: AtomicU32::new(0), bpffs, _lab: lab })
    }

    /// Gives the router a scenario's addresses, routes and tunnels in the place of the last one's.
    pub fn set_up(&self, scenario: &Scenario) -> Result<()> {
        let mut script = String::new();
        for (device, _) in DEVICES.into_iter().chain([("lo", LinkLayer::Other)]) {
            writeln!(script, "addr flush dev {device} scope global")?;
        }
        for family in ["-4", "-6"] {
            writeln!(script, "{family} route flush table all proto {PROTOCOL}\n{family} rule flush proto {PROTOCOL}")?;
        }
        // IPv6 is away while the MTU is too small for it, its settings, too.
        for (device, tunnel) in TUNNELS.iter().zip(&scenario.tunnels) {
            let state = if tunnel.up { "up" } else { "down" };
            writeln!(script, "link set {device} mtu 1500 {state}")?;
        }
        self.host.ip(&script)?;
        let mut script = String::new();
        for (device, tunnel) in TUNNELS.iter().zip(&scenario.tunnels) {
            let disabled = if tunnel.v6 { "0" } else { "1" };
            self.host.sysctl(&[(&format!("ipv6/conf/{device}/disable_ipv6"), disabled)])?;
            writeln!(script, "link set {device} mtu {}", tunnel.mtu)?;
        }
        for Address { device, own, peer } in &scenario.addresses {
            let nodad = if Family::of(own) == Family::V6 { "nodad" } else { "" };
            let peer = peer.map_or_else(String::new, |peer| format!("peer {peer}"));
            let own = if peer.is_empty() { own.to_string() } else { own.addr().to_string() };
            writeln!(script, "addr add {own} {peer} dev {device} {nodad}")?;
        }
        // With a device's last IPv4 address, its neighbours go (`fib_disable_ip()` in `net/ipv4/fib_frontend.c`).
        for (gateway, family) in GATEWAYS.into_iter().zip(Family::ALL) {
            if scenario.tunnel("eth1").is_some_and(|tunnel| tunnel.has(family)) {
                writeln!(script, "neigh replace {gateway} lladdr {} dev eth1 nud permanent", macs("eth1")[1])?;
            }
        }
        for family in Family::ALL {
            let (version, router) = match family {
                Family::V4 => ("-4", "198.18.0.77"),
                Family::V6 => ("-6", "fe80::77"),
            };
            for Inside { dst, device, through } in
                scenario.routes.iter().filter(|route| Family::of(&route.dst) == family)
            {
                let way = match through {
                    Through::Link => format!("dev {device}"),
                    Through::Router => format!("via {router} dev {device} onlink"),
                    Through::Several => {
                        format!("nexthop via {router} dev {device} onlink nexthop via {router} dev net0 onlink")
                    }
                };
                writeln!(script, "{version} route add {dst} proto {PROTOCOL} {way}")?;
            }
            for (dst, route) in scenario.foreign.iter().filter(|(dst, _)| Family::of(dst) == family) {
                let route = match route {
                    ForeignRoute::Device(device) => format!("{dst} dev {device}"),
                    ForeignRoute::Refused(decision) => format!("{} {dst}", format!("{decision:?}").to_lowercase()),
                };
                writeln!(script, "{version} route add {route} table {TABLE_OTHERS} proto {PROTOCOL}")?;
            }
            for Foreign { text, .. } in scenario.others.iter().filter(|rule| Family::of(&rule.entry.from) == family) {
                writeln!(script, "{version} rule add {text} protocol {PROTOCOL}")?;
            }
            let old = self.local_rule.load(Ordering::Relaxed);
            if old != scenario.local_rule {
                let new = scenario.local_rule;
                writeln!(
                    script,
                    "{version} rule add pref {new} lookup local\n{version} rule del pref {old} lookup local"
                )?;
            }
        }
        self.host.ip(&script)?;
        self.local_rule.store(scenario.local_rule, Ordering::Relaxed);
        let strict = if scenario.reverse_path { "1" } else { "0" };
        self.host.sysctl(&[("ipv4/conf/all/rp_filter", strict)])
    }

    /// Has every frame sent at once and nothing held back: neighbours need not be asked for, and what the kernel meters by time it does not send (redirects) or does not meter (other ICMP).
    pub fn hold_nothing_back(&self) -> Result<()> {
        let mut script = String::new();
        for (device, layer) in DEVICES {
            self.host.sysctl(&[(&format!("ipv4/conf/{device}/send_redirects"), "0")])?;
            if layer == LinkLayer::Ethernet {
                writeln!(script, "link set {device} arp off")?;
            }
        }
        self.host.ip(&script)?;
        // 255: a type that nothing sends.
        let unmetered = [("ipv4/icmp_ratemask", "0"), ("ipv6/icmp/ratemask", "255")];
        self.host.sysctl(&[("ipv4/conf/all/send_redirects", "0"), unmetered[0], unmetered[1]])
    }

    /// Waits until no program is left on a device: the kernel lets go of a link some time after its pin has gone
    /// (`bpf_free_inode()` in `kernel/bpf/inode.c`, `bpf_link_put()` in `kernel/bpf/syscall.c`).
    pub fn wait_until_bare(&self) -> Result<()> {
        let tunnels = TUNNELS.into_iter().map(|device| (device, "ingress"));
        let hooks = [("lan0", "ingress"), ("lan1", "ingress"), ("net0", "egress")].into_iter().chain(tunnels);
        for (device, hook) in hooks.filter(|_| Method::detect() == Method::Tcx) {
            until(&format!("no program on {device}"), || Ok(self.host.tcx(device, hook)?.is_empty()))?;
        }
        until("no XDP program on a device", || Ok(!self.host.query("ip", "link")?.contains(" xdp ")))
    }

    /// Runs in the router's namespace, with what the daemon would have there.
    pub fn run<T: Send>(&self, work: impl AsyncFnOnce(&mut Product) -> Result<T> + Send) -> Result<T> {
        self.host.run_in(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (kernel, events) = Kernel::connect()?;
                let datapath = Datapath::open(&self.bpffs.path().join("tunroute"), Method::detect(), WORDS)?;
                work(&mut Product { kernel, _events: events, datapath }).await
            })
        })
    }
}

/// The product's two backends, driven as the daemon drives them.
pub struct Product {
    kernel: Kernel,
    _events: Events,
    pub datapath: Datapath,
}

impl Product {
    /// Looks until devices and addresses are as the scenario says: IPv6 ones come by a work queue (`addrconf_dad_work()`
    /// in `net/ipv6/addrconf.c`).
    pub async fn observe(&self, scenario: &Scenario) -> Result<Snapshot> {
        let wanted = scenario.kernel_state();
        let deadline = Instant::now() + patience(SOON);
        loop {
            let snapshot = self.kernel.observe(Kinds::ALL, None).await?;
            let state = &snapshot.state;
            let local: BTreeSet<IpNet> = state.local.iter().copied().filter(|net| !special(net.addr())).collect();
            let is_up = |name| state.link(name).is_some_and(|link| link.up);
            if local == wanted.local && wanted.links.values().all(|link| is_up(&link.name) == link.up) {
                return Ok(snapshot);
            }
            ensure!(Instant::now() < deadline, "not as wanted: {:?}, {local:?}, {:?}", wanted.local, state.links);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Makes rules, routes, maps and attachments what is desired; nothing is left to do then.
    pub async fn reach(&mut self, desired: &Desired, scenario: &Scenario) -> Result<()> {
        let snapshot = self.observe(scenario).await?;
        let mut batch: Vec<KernelOp> = Vec::new();
        for operation in plan(desired, &snapshot.state, Some(self.datapath.state()))? {
            match operation {
                Op::Kernel(operation) => batch.push(operation),
                Op::Fast(operation) => {
                    self.apply(&mut batch, &snapshot).await?;
                    // The kernel lets go of a detached XDP program a moment later, and is busy until then.
                    until(&operation.to_string(), || match self.datapath.apply(&operation) {
                        Ok(()) => Ok(true),
                        Err(error) => {
                            let error = anyhow::Error::from(error);
                            if format!("{error:#}").contains("os error 16") { Ok(false) } else { Err(error) }
                        }
                    })?;
                }
            }
        }
        self.apply(&mut batch, &snapshot).await?;
        let after = self.observe(scenario).await?;
        let left = plan(desired, &after.state, Some(self.datapath.state()))?;
        ensure!(left.is_empty(), "something is left to do: {}", left[0]);
        Ok(self.datapath.beat()?)
    }

    async fn apply(&self, batch: &mut Vec<KernelOp>, snapshot: &Snapshot) -> Result<()> {
        let failed = self.kernel.apply_all(batch.iter(), snapshot, &mut Undone::default()).await;
        batch.clear();
        failed.into_iter().next().map_or(Ok(()), |error| Err(error.into()))
    }
}

/// Is the address one that the router itself has?
pub fn is_own(scenario: &Scenario, address: std::net::IpAddr) -> bool {
    scenario.addresses.iter().any(|own| own.own.addr() == address)
}
