//! Random hosts: a configuration, and the addresses, routes and tunnels that it finds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    net::IpAddr,
};

use ipnet::IpNet;
use proptest::{collection::vec, prelude::*, sample::select};
use tunroute::{
    config::Config,
    policy::compile::probes,
    policy::net::{Family, KernelState, Link, LinkLayer, MainRoute},
};

/// The devices of the host. The index of each plus 2 is its number in [`Scenario::kernel_state`].
pub const DEVICES: [(&str, LinkLayer); 7] = [
    ("lan0", LinkLayer::Ethernet),
    ("lan1", LinkLayer::Ethernet),
    ("net0", LinkLayer::Ethernet),
    ("tun0", LinkLayer::Ip),
    ("tun1", LinkLayer::Ip),
    ("eth0", LinkLayer::Ethernet),
    ("eth1", LinkLayer::Ethernet),
];
/// Those of them that are tunnels; one more is configured and never there.
pub const TUNNELS: [&str; 4] = ["tun0", "tun1", "eth0", "eth1"];
const MISSING: &str = "none0";
/// The gateways of `eth1`.
pub const GATEWAYS: [&str; 2] = ["203.0.113.254", "2001:db8:ffff::1"];
/// The MTU of what is not a tunnel.
const MTU: u32 = 1500;

/// What prefixes are made around, so that they lie in one another.
const BASES: [&str; 10] = [
    "10.64.3.9",
    "10.64.3.200",
    "10.65.0.1",
    "172.16.5.1",
    "198.51.100.77",
    "2a02:578:85a0:1::9",
    "2a02:578:85a0:1::10",
    "2a02:578:85a1::1",
    "2a02::2",
    "fd00:1:2:3::4",
];

/// A tunnel's state.
#[derive(Clone, Copy, Debug)]
pub struct Tunnel {
    /// Its device is up. Ethernet ones always are, and fail by their probes alone: a carrier that comes back is noticed by
    /// the kernel only within a second (`linkwatch_schedule_work()` in `net/core/link_watch.c`).
    pub up: bool,
    /// Its probes of each family are answered.
    pub answers: [bool; 2],
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// A host and its configuration.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The configuration file.
    pub text: String,
    /// What it says.
    pub config: Config,
    /// In the order of [`TUNNELS`].
    pub tunnels: Vec<Tunnel>,
    /// The host's addresses: the device and the connected prefix.
    pub addresses: Vec<(&'static str, IpNet)>,
    /// Routes of the main table by devices that are up.
    pub routes: Vec<(IpNet, &'static str)>,
    /// The ingress devices have a strict rp_filter.
    pub reverse_path: bool,
    /// The families that the fast path may decide.
    pub open: [bool; 2],
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, tunnels, addresses, routes, reverse_path, open, .. } = self;
        f.write_str(text)?;
        for (name, Tunnel { up, answers, mtu }) in TUNNELS.iter().zip(tunnels) {
            writeln!(f, "# {name}: up {up}, IPv4 and IPv6 answer {answers:?}, MTU {mtu}")?;
        }
        for (device, address) in addresses {
            writeln!(f, "# address {address} dev {device}")?;
        }
        for (dst, device) in routes {
            writeln!(f, "# route {dst} dev {device}")?;
        }
        write!(f, "# rp_filter {reverse_path}, IPv4 and IPv6 open {open:?}")
    }
}

/// A prefix around one of the bases, of any length from `shortest` on.
fn prefix(shortest: u8) -> impl Strategy<Value = IpNet> {
    let length = prop_oneof![3 => 0u8..=128, 1 => select(vec![0u8, 1, 31, 32, 33, 63, 64, 65, 127, 128])];
    // The sibling of a prefix differs in its last bit.
    (select(&BASES[..]), length, any::<bool>()).prop_map(move |(base, length, sibling)| {
        let base: IpAddr = base.parse().expect("an address");
        let bits = IpNet::from(base).max_prefix_len();
        let length = (length % (bits + 1)).max(shortest);
        let flip = u128::from(sibling && length > 1);
        net(flip_bit(base, flip.checked_shl(u32::from(bits - length)).unwrap_or(0)), length)
    })
}

fn flip_bit(address: IpAddr, mask: u128) -> IpAddr {
    match address {
        IpAddr::V4(address) => (u32::from(address) ^ u32::try_from(mask).unwrap_or(0)).to_be_bytes().into(),
        IpAddr::V6(address) => (u128::from(address) ^ mask).to_be_bytes().into(),
    }
}

fn net(address: IpAddr, length: u8) -> IpNet {
    IpNet::new(address, length).expect("a length of the family").trunc()
}

/// A policy's part of the configuration, before what is there twice is taken out.
#[derive(Clone, Debug)]
struct PolicyPart {
    from: Vec<IpNet>,
    via: Vec<&'static str>,
    exempt: Vec<IpNet>,
    /// The words among the exemptions.
    words: Vec<&'static str>,
    on_down: &'static str,
}

fn policy() -> impl Strategy<Value = PolicyPart> {
    let names: Vec<&str> = TUNNELS.into_iter().chain([MISSING]).collect();
    let via = prop::sample::subsequence(names, 1..=3).prop_shuffle();
    let on_down = select(vec!["unreachable", "blackhole", "prohibit", "next", "next"]);
    // Rarely so many that they are a tree of several levels, where a tree is asked for.
    let from = prop_oneof![9 => vec(prefix(0), 1..6), 1 => vec(prefix(0), 20..50)];
    let via = prop_oneof![7 => via, 1 => Just(vec!["main"])];
    let words = prop::sample::subsequence(vec!["connected", "routed"], 0..=2);
    (from, via, vec(prefix(1), 0..3), words, on_down).prop_map(|(from, via, exempt, words, on_down)| PolicyPart {
        from,
        via,
        exempt,
        words,
        on_down,
    })
}

fn tunnels() -> impl Strategy<Value = Vec<Tunnel>> {
    let answers = prop::array::uniform2(prop::bool::weighted(0.75));
    let one = (prop::bool::weighted(0.7), answers, select(vec![1280u32, 1281, 1400, 1500]));
    let ethernet = |name: &str| DEVICES.contains(&(name, LinkLayer::Ethernet));
    vec(one, TUNNELS.len()).prop_map(move |all| {
        let all = TUNNELS.into_iter().zip(all);
        all.map(|(name, (up, answers, mtu))| Tunnel { up: up || ethernet(name), answers, mtu }).collect()
    })
}

/// A random host.
pub fn scenario() -> impl Strategy<Value = Scenario> {
    let wired = select(vec!["lan0", "lan1", "net0"]);
    let tunnel_routes = select(vec!["lan0", "lan1", "net0", "net0", "tun0", "tun1", "eth0"]);
    (
        (vec(policy(), 1..7), any::<bool>()),
        tunnels(),
        vec((wired, prefix(8), 1u8..250), 0..5),
        vec((prefix(0), tunnel_routes), 0..6),
        prop::bool::weighted(0.3),
        prop::array::uniform2(prop::bool::weighted(0.9)),
    )
        .prop_filter_map(
            "the configuration is accepted",
            |((policies, trees), tunnels, addresses, routes, reverse_path, open)| {
                let text = write(&policies, trees);
                let config = Config::parse("generated", &text).ok()?;
                let mut scenario =
                    Scenario { text, config, tunnels, addresses: Vec::new(), routes: Vec::new(), reverse_path, open };
                for (device, prefix, host) in addresses {
                    scenario.add_address(device, prefix, host);
                }
                for (dst, device) in routes {
                    scenario.add_route(dst, device);
                }
                Some(scenario)
            },
        )
}

/// Writes a configuration. Its rules are trees wherever there are enough for one, or as many as is usual.
fn write(policies: &[PolicyPart], trees: bool) -> String {
    let list = |prefixes: &[IpNet]| prefixes.iter().map(|net| format!("\"{net}\"")).collect::<Vec<_>>();
    let mut text = if trees { "tree-above = 1\n" } else { "" }.to_owned();
    text += "[interfaces]\ningress = [\"lan*\"]\nuplink = [\"net0\"]\n";
    // Probes have rules of their own, which no forwarded packet may notice.
    text += "[tunnel.tun0]\nprobe = { target = \"2001:db8:ee::1\" }\n[tunnel.tun1]\n[tunnel.eth0]\n";
    let _ = writeln!(text, "[tunnel.eth1]\nvia = {GATEWAYS:?}\n[tunnel.{MISSING}]");
    let mut taken = BTreeSet::new();
    for (index, PolicyPart { from, via, exempt, words, on_down }) in policies.iter().enumerate() {
        let from: Vec<IpNet> = from.iter().copied().filter(|net| taken.insert(*net)).collect();
        if from.is_empty() {
            continue;
        }
        let exempt: BTreeSet<IpNet> = exempt.iter().copied().collect();
        let mut exempt = list(&exempt.into_iter().collect::<Vec<_>>());
        exempt.extend(words.iter().map(|word| format!("\"{word}\"")));
        let _ = writeln!(
            text,
            "[[policy]]\nname = \"p{index}\"\nfrom = [{}]\nvia = {via:?}\nallow-default = true",
            list(&from).join(", "),
        );
        if *via != ["main"] {
            let _ = writeln!(text, "exempt = [{}]\non-down = \"{on_down}\"", exempt.join(", "));
        }
    }
    text
}

/// No packet is forwarded to or from there (IPv4: `ip_route_input_slow()` in `net/ipv4/route.c`; IPv6: `ip6_rcv_core()`
/// and `ip6_forward()`), or the fast path leaves it to the kernel.
pub const SPECIAL: [&str; 10] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "ff00::/8",
    "fe80::/10",
    "::/128",
    "::1/128",
    "::ffff:0:0/96",
];

/// Is the address one of [`SPECIAL`]?
pub fn special(address: IpAddr) -> bool {
    SPECIAL.iter().any(|prefix| prefix.parse::<IpNet>().is_ok_and(|prefix| prefix.contains(&address)))
}

impl Scenario {
    /// Gives a device an address in a prefix, unless that is special or there already.
    fn add_address(&mut self, device: &'static str, prefix: IpNet, host: u8) {
        let address = flip_bit(prefix.addr(), u128::from(host) & (mask(&prefix)));
        let Ok(address) = IpNet::new(address, prefix.prefix_len()) else { return };
        let there = |(_, other): &(&str, IpNet)| other.addr() == address.addr() || other.trunc() == address.trunc();
        let odd = address.broadcast() == address.addr() && address.prefix_len() < 31 || special(address.addr());
        if !odd && !self.addresses.iter().any(there) {
            self.addresses.push((device, address));
        }
    }

    /// Adds a route to the main table, unless one with its destination is there.
    fn add_route(&mut self, dst: IpNet, device: &'static str) {
        let tunnel = TUNNELS.iter().position(|name| *name == device).and_then(|index| self.tunnels.get(index));
        let connected = self.addresses.iter().any(|(_, address)| address.trunc() == dst);
        // IPv6 takes no gateway that a route of the main table leads to by another device
        // (`ip6_route_check_nh_onlink()` in `net/ipv6/route.c`).
        let is_gateway = |gateway: &str| gateway.parse::<IpAddr>().is_ok_and(|gateway| dst.contains(&gateway));
        if dst.prefix_len() > 0 && GATEWAYS.into_iter().any(is_gateway) {
            return;
        }
        if tunnel.is_none_or(|tunnel| tunnel.up) && !connected && self.routes.iter().all(|(other, _)| *other != dst) {
            self.routes.push((dst, device));
        }
    }

    /// A device's MTU in bytes.
    pub fn mtu_of(&self, device: &str) -> usize {
        let tunnel = TUNNELS.iter().position(|name| *name == device).and_then(|index| self.tunnels.get(index));
        tunnel.map_or(MTU, |tunnel| tunnel.mtu) as usize
    }

    /// The tables of policies and probes, as the daemon would have allocated them.
    pub fn tables(&self) -> BTreeMap<String, u32> {
        let policies = self.config.policies.iter().map(|policy| policy.name.clone()).zip(1000..);
        let probed = self.config.tunnels.iter().filter(|tunnel| probes::needs_table(tunnel));
        policies.chain(probed.map(|tunnel| probes::table_name(&tunnel.name)).zip(2000..)).collect()
    }

    /// The tunnels whose probes are not answered.
    pub fn failed(&self) -> BTreeSet<(String, Family)> {
        let each = TUNNELS.iter().zip(&self.tunnels).flat_map(|(name, tunnel)| {
            Family::ALL.into_iter().zip(tunnel.answers).map(move |(family, answers)| (*name, family, answers))
        });
        each.filter(|(.., answers)| !answers).map(|(name, family, _)| (name.to_owned(), family)).collect()
    }

    /// What the kernel of such a host would say.
    pub fn kernel_state(&self) -> KernelState {
        let mut state = KernelState::default();
        for ((name, layer), index) in DEVICES.into_iter().zip(2..) {
            let tunnel = TUNNELS.iter().position(|tunnel| *tunnel == name).and_then(|index| self.tunnels.get(index));
            let link = Link {
                // One that answers what is too big for it.
                kind: (name == "tun1").then(|| "sit".to_owned()),
                mtu: tunnel.map_or(MTU, |tunnel| tunnel.mtu),
                up: tunnel.is_none_or(|tunnel| tunnel.up),
                ..Link::new(index, name, layer)
            };
            state.links.insert(index, link);
        }
        let number = |device: &str| state.links.values().find(|link| link.name == device).map(|link| link.index);
        for (device, address) in &self.addresses {
            state.local.insert(address.addr().into());
            match address {
                IpNet::V4(v4) if v4.prefix_len() < 31 => drop(state.local.insert(IpAddr::V4(v4.broadcast()).into())),
                // Every router answers to the subnet's own address (RFC 4291).
                IpNet::V6(v6) if v6.prefix_len() < 127 => drop(state.local.insert(IpAddr::V6(v6.network()).into())),
                _ => {}
            }
            // An address that is alone in its prefix connects nobody.
            if address.prefix_len() < address.max_prefix_len() {
                state.main.push(MainRoute {
                    dst: address.trunc(),
                    oif: number(device),
                    on_link: true,
                    network: true,
                    ..MainRoute::default()
                });
            }
        }
        for (dst, device) in &self.routes {
            state.main.push(MainRoute { dst: *dst, oif: number(device), on_link: true, ..MainRoute::default() });
        }
        state
    }

    /// Addresses at and around the edges of every prefix that plays a part.
    pub fn edges(&self, family: Family) -> Vec<IpAddr> {
        let policies = self.config.policies.iter().flat_map(|policy| policy.from.iter().chain(&policy.exempt)).copied();
        let mut edges = BTreeSet::new();
        let prefixes = policies
            .chain(self.addresses.iter().flat_map(|(_, address)| [*address, address.addr().into()]))
            .chain(self.routes.iter().map(|(dst, _)| *dst))
            .chain(SPECIAL.iter().filter_map(|prefix| prefix.parse().ok()))
            .filter(|prefix| Family::of(prefix) == family);
        for prefix in prefixes {
            edges.extend([prefix.network(), prefix.broadcast()]);
            edges.extend([step(prefix.network(), false), step(prefix.broadcast(), true)]);
        }
        edges.into_iter().collect()
    }
}

/// The host bits of a prefix.
fn mask(prefix: &IpNet) -> u128 {
    match prefix {
        IpNet::V4(prefix) => u32::from(prefix.hostmask()).into(),
        IpNet::V6(prefix) => prefix.hostmask().into(),
    }
}

/// The next address, or the one before.
fn step(address: IpAddr, up: bool) -> IpAddr {
    let by = if up { 1 } else { u128::MAX };
    match address {
        #[expect(clippy::cast_possible_truncation, reason = "addresses of a family are a ring")]
        IpAddr::V4(address) => u32::from(address).wrapping_add(by as u32).to_be_bytes().into(),
        IpAddr::V6(address) => u128::from(address).wrapping_add(by).to_be_bytes().into(),
    }
}
