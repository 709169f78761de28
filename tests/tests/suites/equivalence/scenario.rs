//! Random hosts: a configuration, and the addresses, routes and tunnels that it finds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    net::IpAddr,
};

use ipnet::IpNet;
use proptest::{collection::vec, prelude::*, sample::select};
use tunroute::{
    config::{Config, can_be_source},
    policy::compile::probes,
    policy::net::{
        Family, Handle, Inability, KernelState, Link, LinkLayer, MainRoute, ObservedRule, RuleAction, TABLE_LOCAL,
        TABLE_MAIN,
    },
};
use tunroute_tests::rule_walk::{Action, Decision, Entry};

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
/// The device towards the provider.
pub const UPLINK: &str = "net0";
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
    /// Its MTU in bytes. Below 1280 the kernel has no IPv6 there.
    pub mtu: u32,
    /// IPv6 is not switched off on it (`disable_ipv6`).
    pub v6: bool,
}

impl Tunnel {
    /// Can the device have addresses and routes of a family?
    pub fn has(&self, family: Family) -> bool {
        family == Family::V4 || self.v6 && self.mtu >= 1280
    }
}

/// An address of the host.
#[derive(Clone, Debug)]
pub struct Address {
    /// The device's name.
    pub device: &'static str,
    /// The address, with the length of its network.
    pub own: IpNet,
    /// The address at the other end of the link, which takes the network's place (`addr add OWN peer PEER`).
    pub peer: Option<IpAddr>,
}

impl Address {
    /// The network that it connects to; none if the address is alone in it.
    pub fn connected(&self) -> Option<IpNet> {
        match self.peer {
            Some(peer) => Some(peer.into()),
            None => (self.own.prefix_len() < self.own.max_prefix_len()).then(|| self.own.trunc()),
        }
    }
}

/// How a route of the main table leads somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// On the link.
    Link,
    /// By a router on the link.
    Router,
    /// By two routers, the second one on the uplink's link.
    Several,
}

/// A route of the main table.
#[derive(Clone, Debug)]
pub struct Inside {
    /// The destination.
    pub dst: IpNet,
    /// The device's name.
    pub device: &'static str,
    /// How it leads there.
    pub through: Through,
}

/// A rule of somebody else.
#[derive(Clone, Debug)]
pub struct Foreign {
    /// The family of [`Entry::from`] is the rule's.
    pub entry: Entry,
    /// In `ip rule` syntax.
    pub text: String,
}

/// The table that other people's rules ask.
pub const TABLE_OTHERS: u32 = 3000;
/// The first of tunroute's priorities, and the last but for those of trees.
pub const BAND: (u32, u32) = (19998, 20128);

/// A host and its configuration.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The configuration file.
    pub text: String,
    /// What it says.
    pub config: Config,
    /// In the order of [`TUNNELS`].
    pub tunnels: Vec<Tunnel>,
    /// The host's addresses.
    pub addresses: Vec<Address>,
    /// Routes of the main table by devices that are up.
    pub routes: Vec<Inside>,
    /// The priority of the rule `from all lookup local`.
    pub local_rule: u32,
    /// Rules of others, no two of a family with the same priority.
    pub others: Vec<Foreign>,
    /// The routes of [`TABLE_OTHERS`].
    pub foreign: Vec<(IpNet, ForeignRoute)>,
    /// The ingress devices have a strict rp_filter.
    pub reverse_path: bool,
    /// The families that the fast path may decide.
    pub open: [bool; 2],
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, tunnels, addresses, routes, local_rule, others, foreign, reverse_path, open, .. } = self;
        f.write_str(text)?;
        for (name, Tunnel { up, answers, mtu, v6 }) in TUNNELS.iter().zip(tunnels) {
            writeln!(f, "# {name}: up {up}, IPv4 and IPv6 answer {answers:?}, MTU {mtu}, has IPv6 {v6}")?;
        }
        for Address { device, own, peer } in addresses {
            writeln!(f, "# address {own} peer {peer:?} dev {device}")?;
        }
        for Inside { dst, device, through } in routes {
            writeln!(f, "# route {dst} dev {device} {through:?}")?;
        }
        writeln!(f, "# rule pref {local_rule} lookup local")?;
        for Foreign { text, .. } in others {
            writeln!(f, "# rule {text}")?;
        }
        for (dst, route) in foreign {
            writeln!(f, "# route {dst} table {TABLE_OTHERS} {route:?}")?;
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
    // Rarely enough for a tree of several levels, where a tree is configured.
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
    let mtu = select(vec![1280u32, 1281, 1400, 1500, 1279, 576]);
    let one = (prop::bool::weighted(0.7), answers, mtu, prop::bool::weighted(0.8));
    let ethernet = |name: &str| DEVICES.contains(&(name, LinkLayer::Ethernet));
    vec(one, TUNNELS.len()).prop_map(move |all| {
        let all = TUNNELS.into_iter().zip(all);
        all.map(|(name, (up, answers, mtu, v6))| Tunnel { up: up || ethernet(name), answers, mtu, v6 }).collect()
    })
}

/// A route in the table of others.
#[derive(Clone, Copy, Debug)]
pub enum ForeignRoute {
    /// By this device.
    Device(&'static str),
    /// Refused.
    Refused(Decision),
}

fn foreign_routes() -> impl Strategy<Value = Vec<(IpNet, ForeignRoute)>> {
    let devices = select(vec!["lan0", "net0", "tun0", "eth0"]).prop_map(ForeignRoute::Device);
    let refusals = select(vec![Decision::Unreachable, Decision::Prohibit, Decision::Blackhole]);
    vec((prefix(0), prop_oneof![3 => devices, 1 => refusals.prop_map(ForeignRoute::Refused)]), 1..4)
}

/// Other people's rules: before the band, right beside it and behind it, with every selector.
fn others() -> impl Strategy<Value = Vec<Foreign>> {
    let (first, last) = BAND;
    let priority = select(vec![1, 99, 5000, first - 1, last + 1, last + 200, 30000, 32000]);
    let devices = || select(vec!["lan0", "lan1", "net0", "tun0", "eth1"]);
    let sometimes = |strategy: BoxedStrategy<IpNet>| prop::option::weighted(0.4, strategy);
    let selectors = (
        select(Family::ALL.to_vec()),
        sometimes(prefix(0).boxed()),
        sometimes(prefix(1).boxed()),
        prop::option::weighted(0.4, devices()),
        prop::option::weighted(0.1, devices()),
        prop::bool::weighted(0.25),
    );
    let action = select(vec![0u8, 0, 0, 1, 1, 2]);
    let refusal = select(vec![Decision::Unreachable, Decision::Prohibit, Decision::Blackhole]);
    let rule = (priority, selectors, action, refusal).prop_map(|(priority, selectors, action, refusal)| {
        let (family, from, to, iif, oif, marked) = selectors;
        let of_family = |net: &IpNet| Family::of(net) == family;
        let (from, to) = (from.filter(of_family), to.filter(of_family));
        let (action, suppress, words) = match action {
            0 => (Action::Rule(RuleAction::Lookup(TABLE_OTHERS)), None, format!("lookup {TABLE_OTHERS}")),
            1 => (Action::Rule(RuleAction::Lookup(TABLE_MAIN)), Some(0), "lookup main suppress_prefixlength 0".into()),
            _ => (Action::Refuse(refusal), None, format!("{refusal:?}").to_lowercase()),
        };
        let entry = Entry {
            to,
            iif: iif.map(str::to_owned),
            oif: oif.map(str::to_owned),
            marked,
            suppress,
            ..Entry::new(priority, from.unwrap_or(family.default_prefix()), action)
        };
        let mut text = format!("pref {priority} from {}", from.map_or("all".to_owned(), |from| from.to_string()));
        let _ = to.map(|to| write!(text, " to {to}"));
        let _ = iif.map(|iif| write!(text, " iif {iif}"));
        let _ = oif.map(|oif| write!(text, " oif {oif}"));
        let _ = write!(text, "{} {words}", if marked { " fwmark 0x77" } else { "" });
        Foreign { entry, text }
    });
    vec(rule, 0..4).prop_map(|rules| {
        let mut taken = BTreeSet::new();
        let key = |rule: &Foreign| (Family::of(&rule.entry.from), rule.entry.priority);
        rules.into_iter().filter(|rule| taken.insert(key(rule))).collect()
    })
}

/// What makes a host untidy, beside its tunnels.
#[derive(Clone, Debug)]
struct Mess {
    local_rule: u32,
    others: Vec<Foreign>,
    foreign: Vec<(IpNet, ForeignRoute)>,
    /// Addresses anywhere, some of them with the other end's beside: a prefix and which address of it is the other end's.
    addresses: Vec<(&'static str, IpNet, u8, Option<u8>)>,
    /// Routes behind routers.
    inside: Vec<(IpNet, &'static str, Through)>,
}

fn mess() -> impl Strategy<Value = Mess> {
    let anywhere = select(vec!["lan0", "lan1", "net0", "tun0", "tun1", "eth0", "eth1", "lo"]);
    let peer = prop::option::weighted(0.3, 1u8..250);
    let through = select(vec![Through::Router, Through::Router, Through::Router, Through::Several]);
    let inside = select(vec!["lan0", "lan1", "net0", "tun0", "eth0", "eth1"]);
    let split = select(vec!["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"]).prop_map(|net| net.parse().unwrap());
    let dst = prop_oneof![4 => prefix(0), 1 => split];
    (
        prop_oneof![2 => Just(0u32), 1 => Just(500), 2 => Just(32765)],
        others(),
        foreign_routes(),
        vec((anywhere, prefix(8), 1u8..250, peer), 0..5),
        vec((dst, inside, through), 0..4),
    )
        .prop_map(|(local_rule, others, foreign, addresses, inside)| Mess {
            local_rule,
            others,
            foreign,
            addresses,
            inside,
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
        mess(),
    )
        .prop_filter_map(
            "the configuration is accepted",
            |((policies, trees), tunnels, addresses, routes, reverse_path, open, mess)| {
                let text = write(&policies, trees);
                let config = Config::parse("generated", &text).ok()?;
                let Mess { local_rule, others, foreign, addresses: more, inside } = mess;
                let addresses = addresses.into_iter().map(|(device, prefix, host)| (device, prefix, host, None));
                let routes = routes.into_iter().map(|(dst, device)| (dst, device, Through::Link));
                let mut scenario = Scenario {
                    text,
                    config,
                    tunnels,
                    addresses: Vec::new(),
                    routes: Vec::new(),
                    local_rule,
                    others,
                    foreign: Vec::new(),
                    reverse_path,
                    open,
                };
                for (device, prefix, host, peer) in addresses.chain(more) {
                    scenario.add_address(device, prefix, host, peer);
                }
                for (dst, device, through) in routes.chain(inside) {
                    scenario.add_route(dst, device, through);
                }
                for (dst, route) in foreign {
                    scenario.add_foreign(dst, route);
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
            "[[policy]]\nname = \"p{index}\"\nfrom = [{}]\nvia = {via:?}\nallow-default = {}",
            list(&from).join(", "),
            from.iter().any(|net| !can_be_source(net)),
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
    /// A tunnel's state, by its name.
    pub fn tunnel(&self, device: &str) -> Option<&Tunnel> {
        self.tunnels.get(TUNNELS.iter().position(|name| *name == device)?)
    }

    /// Has a device a family, and forwards what enters there?
    pub fn has(&self, device: &str, family: Family) -> bool {
        self.tunnel(device).is_none_or(|tunnel| tunnel.has(family))
    }

    /// Can a device have addresses and routes of a family now?
    fn takes(&self, device: &str, family: Family) -> bool {
        self.has(device, family) && self.tunnel(device).is_none_or(|tunnel| tunnel.up)
    }

    /// Gives a device an address in a prefix, unless that is special or there already. With another one in it that is at the
    /// other end of the link, the prefix is not on the link.
    fn add_address(&mut self, device: &'static str, prefix: IpNet, host: u8, peer: Option<u8>) {
        let within = |host: u8| flip_bit(prefix.addr(), u128::from(host) & mask(&prefix));
        let length = if peer.is_some() || device == "lo" { prefix.max_prefix_len() } else { prefix.prefix_len() };
        let Ok(own) = IpNet::new(within(host), length) else { return };
        let address = Address { device, own, peer: peer.map(within) };
        let taken = |net: &IpNet| {
            self.addresses.iter().any(|other| {
                other.own.addr() == net.addr() || other.own.trunc() == net.trunc() || other.connected() == Some(*net)
            })
        };
        let odd = own.broadcast() == own.addr() && own.prefix_len() < 31 || special(own.addr());
        let alone = address.peer.is_none_or(|peer| {
            let peer = IpNet::from(peer);
            device != "lo" && peer.addr() != own.addr() && !special(peer.addr()) && !taken(&peer)
        });
        if !odd && alone && !taken(&own) && self.takes(device, Family::of(&own)) {
            self.addresses.push(address);
        }
    }

    /// Adds a route to the main table, unless one with its destination is there.
    fn add_route(&mut self, dst: IpNet, device: &'static str, through: Through) {
        let connected = self.addresses.iter().any(|address| {
            address.connected() == Some(dst) || Family::of(&dst) == Family::V6 && IpNet::from(address.own.addr()) == dst
        });
        // IPv6 takes no gateway that a route of the main table leads to by another device
        // (`ip6_route_check_nh_onlink()` in `net/ipv6/route.c`).
        let is_gateway = |gateway: &str| gateway.parse::<IpAddr>().is_ok_and(|gateway| dst.contains(&gateway));
        if dst.prefix_len() > 0 && GATEWAYS.into_iter().any(is_gateway) {
            return;
        }
        let several = device == "net0" && through == Through::Several;
        let taken = connected || several || self.routes.iter().any(|other| other.dst == dst);
        if self.takes(device, Family::of(&dst)) && !taken {
            self.routes.push(Inside { dst, device, through });
        }
    }

    /// Adds a route to the table of others.
    fn add_foreign(&mut self, dst: IpNet, route: ForeignRoute) {
        let possible = match route {
            ForeignRoute::Device(device) => self.takes(device, Family::of(&dst)),
            ForeignRoute::Refused(_) => true,
        };
        if possible && self.foreign.iter().all(|(other, _)| *other != dst) {
            self.foreign.push((dst, route));
        }
    }

    /// All rules that are not tunroute's but those of the main and the default table, and the routes that they lead to.
    pub fn others_routes(&self, kernel: &KernelState) -> Vec<(u32, IpNet, Decision)> {
        let decision = |route| match route {
            ForeignRoute::Device(device) => {
                Decision::Leaves { device: kernel.link(device).map(|link| link.index), gateway: None }
            }
            ForeignRoute::Refused(decision) => decision,
        };
        self.foreign.iter().map(|(dst, route)| (TABLE_OTHERS, *dst, decision(*route))).collect()
    }

    /// A device's MTU in bytes.
    pub fn mtu_of(&self, device: &str) -> usize {
        self.tunnel(device).map_or(MTU, |tunnel| tunnel.mtu) as usize
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
            let tunnel = self.tunnel(name);
            let mut link = Link {
                // One that answers what is too big for it.
                kind: (name == "tun1").then(|| "sit".to_owned()),
                mtu: tunnel.map_or(MTU, |tunnel| tunnel.mtu),
                up: tunnel.is_none_or(|tunnel| tunnel.up),
                ..Link::new(index, name, layer)
            };
            let too_small = (link.mtu < 1280).then_some(Inability::Mtu(link.mtu));
            let disabled = tunnel.is_some_and(|tunnel| !tunnel.v6).then_some(Inability::Disabled);
            link.unable.extend(disabled.or(too_small).map(|inability| (Family::V6, inability)));
            state.links.insert(index, link);
        }
        let number = |device: &str| state.links.values().find(|link| link.name == device).map(|link| link.index);
        for address in &self.addresses {
            state.local.insert(address.own.addr().into());
            match address.own {
                IpNet::V4(v4) if v4.prefix_len() < 31 => drop(state.local.insert(IpAddr::V4(v4.broadcast()).into())),
                // Every router answers to the subnet's own address (RFC 4291).
                IpNet::V6(v6) if v6.prefix_len() < 127 => drop(state.local.insert(IpAddr::V6(v6.network()).into())),
                _ => {}
            }
            if let Some(dst) = address.connected() {
                let oif = number(address.device);
                state.main.push(MainRoute { dst, oif, on_link: true, network: true, ..MainRoute::default() });
            }
        }
        for Inside { dst, device, through } in &self.routes {
            let several = *through == Through::Several;
            let hops = [*device, "net0"].into_iter().filter(|_| several).filter_map(number).collect();
            let (oif, on_link) = (number(device).filter(|_| !several), *through == Through::Link);
            state.main.push(MainRoute { dst: *dst, oif, hops, on_link, ..MainRoute::default() });
        }
        state.rules = self.observed_rules();
        state
    }

    /// All rules, in the order in which the kernel asks them.
    fn observed_rules(&self) -> Vec<ObservedRule> {
        let observed = |entry: &Entry, text: &str| ObservedRule {
            handle: Handle(0),
            family: Family::of(&entry.from),
            priority: entry.priority,
            ours: false,
            rule: None,
            looks_up_local: entry.action == Action::Rule(RuleAction::Lookup(TABLE_LOCAL)),
            looks_up_main: entry.action == Action::Rule(RuleAction::Lookup(TABLE_MAIN)) && entry.suppress.is_none(),
            l3mdev: false,
            iif: entry.iif.clone(),
            oif: entry.oif.clone(),
            foreign: None,
            text: text.to_owned(),
        };
        let kernels = Family::ALL.into_iter().flat_map(|family| {
            [(self.local_rule, TABLE_LOCAL), (32766, TABLE_MAIN)].map(|(priority, table)| {
                let entry = Entry::new(priority, family.default_prefix(), Action::Rule(RuleAction::Lookup(table)));
                observed(&entry, &format!("from all lookup {table} pref {priority}"))
            })
        });
        let others = self.others.iter().map(|rule| observed(&rule.entry, &rule.text));
        let mut rules: Vec<ObservedRule> = kernels.chain(others).collect();
        rules.sort_by_key(|rule| rule.priority);
        rules
    }

    /// Addresses at and around the edges of every prefix that plays a part.
    pub fn edges(&self, family: Family) -> Vec<IpAddr> {
        let policies = self.config.policies.iter().flat_map(|policy| policy.from.iter().chain(&policy.exempt)).copied();
        let mut edges = BTreeSet::new();
        let prefixes = policies
            .chain(self.addresses.iter().flat_map(|address| [address.own, address.own.addr().into()]))
            .chain(self.addresses.iter().filter_map(Address::connected))
            .chain(self.routes.iter().map(|route| route.dst))
            .chain(self.foreign.iter().map(|(dst, _)| *dst))
            .chain(self.others.iter().flat_map(|rule| [rule.entry.to, Some(rule.entry.from)]).flatten())
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
