//! The vocabulary that all stages share: links, rules and routes, free of netlink and of BPF.
//!
//! `Display` writes what an operator would type with iproute2, so that logs, plans and tests read alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The protocol number that marks tunroute's own rules (`FRA_PROTOCOL`) and routes (`RTPROT`).
///
/// Nothing without it is ever changed. iproute2 has no name for it, so `ip` prints the number.
pub const PROTOCOL: u8 = 116;

/// The kernel's local table (`RT_TABLE_LOCAL`).
pub const TABLE_LOCAL: u32 = 255;
/// The kernel's main table (`RT_TABLE_MAIN`).
pub const TABLE_MAIN: u32 = 254;
/// The kernel's default table (`RT_TABLE_DEFAULT`), which is asked last.
pub const TABLE_DEFAULT: u32 = 253;

/// A routing table as `ip` writes it: the kernel's own three by name, others by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableName(pub u32);

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            TABLE_LOCAL => f.write_str("local"),
            TABLE_MAIN => f.write_str("main"),
            TABLE_DEFAULT => f.write_str("default"),
            table => table.fmt(f),
        }
    }
}

/// The priorities of tunroute's rules, by the one of the rules for the longest prefixes (`band` in the configuration).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band(pub u32);

impl Band {
    /// How many priorities there are: for the local table, for the probes, and one for each prefix length.
    pub const LENGTH: u32 = 2 + 129;

    /// The priority of the rule for the local table, before all others.
    #[must_use]
    pub const fn local(self) -> u32 {
        self.0.saturating_sub(2)
    }

    /// The priority of the probes' rules.
    #[must_use]
    pub const fn probes(self) -> u32 {
        self.0.saturating_sub(1)
    }

    /// The priority of the rules for prefixes of this length: the longer one is asked first. IPv4 prefixes begin at the
    /// 96th priority, which nothing minds.
    #[must_use]
    pub const fn of_length(self, length: u8) -> u32 {
        self.0.saturating_add(128_u32.saturating_sub(length as u32))
    }

    /// The last priority.
    #[must_use]
    pub const fn last(self) -> u32 {
        self.of_length(0)
    }

    /// The first priority and the last; none if there is no such number as the last.
    #[must_use]
    pub fn ends(self) -> Option<(u32, u32)> {
        self.0.checked_add(128).map(|last| (self.local(), last))
    }
}

/// The kernel's number of a network device in this namespace; never 0.
pub type IfIndex = u32;

/// An address family that tunroute routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, for loops over them.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of a prefix.
    #[must_use]
    pub const fn of(prefix: &IpNet) -> Self {
        match prefix {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// The family of an address.
    #[must_use]
    pub const fn of_addr(addr: &IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// `0.0.0.0/0` or `::/0`.
    #[must_use]
    pub const fn default_prefix(self) -> IpNet {
        match self {
            Self::V4 => IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::UNSPECIFIED, 0)),
            Self::V6 => IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::UNSPECIFIED, 0)),
        }
    }

    /// The smallest MTU with which the kernel has the family on a device (`IPV4_MIN_MTU` in `include/net/ip.h`,
    /// `IPV6_MIN_MTU` in `include/uapi/linux/ipv6.h`).
    #[must_use]
    pub const fn smallest_mtu(self) -> u32 {
        match self {
            Self::V4 => 68,
            Self::V6 => 1280,
        }
    }

    /// The metric that the kernel gives a route for which none is asked
    /// (`IP6_RT_PRIO_USER` in `include/uapi/linux/ipv6_route.h`; 0 for IPv4).
    #[must_use]
    pub const fn default_metric(self) -> u32 {
        match self {
            Self::V4 => 0,
            Self::V6 => 1024,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Is it within fe80::/10?
#[must_use]
pub const fn is_link_local(prefix: &IpNet) -> bool {
    matches!(prefix, IpNet::V6(prefix) if prefix.addr().is_unicast_link_local())
}

/// How a device takes packets, which decides how the fast path hands them over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkLayer {
    /// Ethernet framing (`ARPHRD_ETHER`): veth, vxlan, bridges, most cards.
    Ethernet,
    /// Bare IP packets: the types for which `dev_is_mac_header_xmit()` in `include/linux/if_arp.h` is false
    /// (tun, WireGuard, sit, gre, ip6tnl, PPP).
    Ip,
    /// Anything else: only the kernel datapath serves it.
    Other,
}

/// A network device as last observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Link {
    /// The device's number in this namespace.
    pub index: IfIndex,
    /// The device's name.
    pub name: String,
    /// How it takes packets.
    pub layer: LinkLayer,
    /// The driver's name (`IFLA_INFO_KIND`): `tun`, `vxlan`, `veth`, `vrf`, `bridge`, …
    pub kind: Option<String>,
    /// The largest layer 3 packet, in bytes.
    pub mtu: u32,
    /// The largest IPv6 packet, in bytes, where it is less: an advertisement or a setting may lower it.
    pub mtu_v6: Option<u32>,
    /// Can carry traffic: administratively up, with a carrier, and neither dormant nor under test.
    pub up: bool,
    /// The device that this one is a port of: a bridge, bond or VRF.
    pub master: Option<IfIndex>,
    /// The families that it cannot carry.
    pub unable: BTreeMap<Family, Inability>,
    /// It asks for the link-layer address of each next hop: Ethernet with ARP and neighbour discovery.
    pub asks_neighbours: bool,
}

/// Why a device carries no packets of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inability {
    /// The setting `disable_ipv6` is 1.
    Disabled,
    /// The MTU is too small for the family, so the kernel has removed the family from the device.
    Mtu(u32),
    /// The kernel has nothing of the family on the device: it was booted without it.
    Absent,
    /// The driver carries packets of the other family only.
    Driver,
    /// The device asks for its neighbours, and the tunnel has a gateway of the other family only.
    NoGateway,
}

impl Inability {
    /// The reason, in words.
    #[must_use]
    pub fn reason(self, device: &str, family: Family) -> String {
        match self {
            Self::Disabled => format!("{family} is disabled on {device} (net/ipv6/conf/{device}/disable_ipv6 is 1)"),
            Self::Mtu(mtu) => {
                format!("the MTU of {device} is {mtu} bytes, and {family} needs {}", family.smallest_mtu())
            }
            Self::Absent => format!("the kernel has no {family} on {device}"),
            Self::Driver => format!("{device} is of a kind that carries no {family}"),
            Self::NoGateway => {
                format!("{device} is an Ethernet device, and the tunnel's `via` has no {family} gateway")
            }
        }
    }

    /// What makes the device carry the family.
    #[must_use]
    pub fn advice(self, device: &str, family: Family) -> String {
        match self {
            Self::Disabled => {
                format!("if the tunnel carries {family}: sysctl -w net/ipv6/conf/{device}/disable_ipv6=0")
            }
            Self::Mtu(_) => format!("ip link set dev {device} mtu {}", family.smallest_mtu()),
            Self::Absent => "boot without ipv6.disable=1".to_owned(),
            Self::Driver => "name a tunnel of another kind in `via` of the policy".to_owned(),
            Self::NoGateway => {
                let other = match family {
                    Family::V4 => "; an IPv6 gateway for IPv4 (`via inet6`) is not supported",
                    Family::V6 => "",
                };
                format!("write the {family} gateway in `via` of [tunnel.{device}]{other}")
            }
        }
    }
}

impl Link {
    /// A device that is up, with an MTU of 1500 bytes, and carries both families.
    #[must_use]
    pub fn new(index: IfIndex, name: impl Into<String>, layer: LinkLayer) -> Self {
        Self {
            index,
            name: name.into(),
            layer,
            kind: None,
            mtu: 1500,
            mtu_v6: None,
            up: true,
            master: None,
            unable: BTreeMap::new(),
            asks_neighbours: layer == LinkLayer::Ethernet,
        }
    }

    /// The largest packet of a family, in bytes (`ip6_dst_mtu_maybe_forward()` in `include/net/ip6_route.h`).
    #[must_use]
    pub fn mtu_of(&self, family: Family) -> u32 {
        match (family, self.mtu_v6) {
            (Family::V6, Some(lower)) => self.mtu.min(lower),
            _ => self.mtu,
        }
    }
}

/// What a rule does with a packet that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleAction {
    /// Ask this routing table; if that leads nowhere, go on at the next rule.
    Lookup(u32),
    /// A shortcut: go on at the first rule with this priority, a higher number.
    Goto(u32),
    /// Go on behind all rules of policies, at the [`Rule::end`] with this priority: the main table decides.
    Leave(u32),
    /// Go on at the next rule: something to go to.
    Nop,
}

/// A rule as tunroute writes it: `from PREFIX lookup TABLE` for a policy, or `from PREFIX goto PRIORITY` where the main
/// table is to decide; `from all oif DEVICE lookup TABLE` for probes; `from all lookup 255` for the host's own addresses;
/// `[not] from PREFIX goto PRIORITY` and `[not] from all nop` to go on at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// The priority (preference): lower numbers are asked first.
    pub priority: u32,
    /// The source prefix.
    pub from: IpNet,
    /// Matches the sources that are *not* in the prefix.
    pub not: bool,
    /// The device that the sender has bound its socket to: such a rule matches nothing that is forwarded.
    pub oif: Option<String>,
    /// What is done when all of that matches.
    pub action: RuleAction,
}

/// `ip` or `ip -6`, by the family of a prefix.
struct Ip<'a>(&'a IpNet);

impl fmt::Display for Ip<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            IpNet::V4(_) => "ip",
            IpNet::V6(_) => "ip -6",
        })
    }
}

impl Rule {
    /// `from PREFIX` with this action.
    #[must_use]
    pub const fn new(priority: u32, from: IpNet, action: RuleAction) -> Self {
        Self { priority, from, not: false, oif: None, action }
    }

    /// The routing table that it asks.
    #[must_use]
    pub const fn table(&self) -> Option<u32> {
        match self.action {
            RuleAction::Lookup(table) => Some(table),
            RuleAction::Goto(_) | RuleAction::Leave(_) | RuleAction::Nop => None,
        }
    }

    /// A shortcut past rules that do not match: what is decided does not depend on it, only how soon.
    #[must_use]
    pub const fn is_shortcut(&self) -> bool {
        matches!(self.action, RuleAction::Goto(_))
    }

    /// The rule behind all rules of a family's policies. It matches nothing, which tells it from the rules that shortcuts
    /// lead to.
    #[must_use]
    pub const fn end(priority: u32, family: Family) -> Self {
        Self { priority, from: family.default_prefix(), not: true, oif: None, action: RuleAction::Nop }
    }

    /// See [`Self::end`].
    #[must_use]
    pub const fn is_end(&self) -> bool {
        self.not && matches!(self.action, RuleAction::Nop)
    }

    /// Asks the local table, before all other rules of tunroute's.
    #[must_use]
    pub const fn is_local(&self) -> bool {
        matches!(self.action, RuleAction::Lookup(TABLE_LOCAL))
    }

    /// The family whose rule list it stands in.
    #[must_use]
    pub const fn family(&self) -> Family {
        Family::of(&self.from)
    }

    /// The `ip rule add` command that makes this rule.
    #[must_use]
    pub fn add_command(&self) -> String {
        format!("{} rule add {self}", Ip(&self.from))
    }

    /// The `ip rule del` command that removes this rule.
    #[must_use]
    pub fn del_command(&self) -> String {
        format!("{} rule del {self}", Ip(&self.from))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { priority, from, not, oif, action } = self;
        if *not {
            f.write_str("not ")?;
        }
        match from.prefix_len() {
            0 => f.write_str("from all")?,
            _ => write!(f, "from {from}")?,
        }
        if let Some(oif) = oif {
            write!(f, " oif {oif}")?;
        }
        match action {
            RuleAction::Lookup(table) => write!(f, " lookup {}", TableName(*table))?,
            RuleAction::Goto(target) | RuleAction::Leave(target) => write!(f, " goto {target}")?,
            RuleAction::Nop => f.write_str(" nop")?,
        }
        write!(f, " pref {priority} protocol {PROTOCOL}")
    }
}

/// What a route does with a packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// Leave by a device, to a gateway or directly.
    Unicast {
        /// The device's number.
        oif: IfIndex,
        /// The device's name, for people.
        device: String,
        /// The next hop; none where the device itself is the next hop.
        gateway: Option<IpAddr>,
    },
    /// Leave this table, as if it had no route: the rule walk goes on.
    Throw,
    /// Drop and answer with ICMP "no route" (IPv4: host unreachable).
    Unreachable,
    /// Drop silently.
    Blackhole,
    /// Drop and answer with ICMP "administratively prohibited".
    Prohibit,
}

/// A route in one of tunroute's tables.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// The table's number.
    pub table: u32,
    /// The destination prefix.
    pub dst: IpNet,
    /// The metric as the kernel reports it; see [`Family::default_metric`].
    pub metric: u32,
    /// What it does.
    pub kind: RouteKind,
}

impl Route {
    /// The `ip route add` command that makes this route.
    #[must_use]
    pub fn add_command(&self) -> String {
        format!("{} route add {self}", Ip(&self.dst))
    }

    /// The `ip route replace` command that puts this route in the place of the one with the same table, destination
    /// and metric.
    #[must_use]
    pub fn replace_command(&self) -> String {
        format!("{} route replace {self}", Ip(&self.dst))
    }

    /// The `ip route del` command that removes this route.
    #[must_use]
    pub fn del_command(&self) -> String {
        format!("{} route del {self}", Ip(&self.dst))
    }

    /// What identifies the route to the kernel: a replacement has the same.
    #[must_use]
    pub const fn key(&self) -> (u32, IpNet, u32) {
        (self.table, self.dst, self.metric)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, dst, metric, kind } = self;
        match kind {
            RouteKind::Unicast { .. } => {}
            RouteKind::Throw => f.write_str("throw ")?,
            RouteKind::Unreachable => f.write_str("unreachable ")?,
            RouteKind::Blackhole => f.write_str("blackhole ")?,
            RouteKind::Prohibit => f.write_str("prohibit ")?,
        }
        if dst.prefix_len() == 0 {
            f.write_str("default")?;
        } else {
            write!(f, "{dst}")?;
        }
        if let RouteKind::Unicast { device, gateway, .. } = kind {
            match gateway {
                // `onlink`: the gateway need not be covered by an address of the tunnel.
                Some(gateway) => write!(f, " via {gateway} dev {device} onlink")?,
                None => write!(f, " dev {device}")?,
            }
        }
        write!(f, " table {}", TableName(*table))?;
        if *metric != Family::of(dst).default_metric() {
            write!(f, " metric {metric}")?;
        }
        write!(f, " protocol {PROTOCOL}")
    }
}

/// Where the kernel keeps what was observed, so that a deletion names exactly the object that was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub usize);

/// A rule as observed, tunroute's or foreign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedRule {
    /// The observed message, for an exact deletion.
    pub handle: Handle,
    /// The family whose rule list it stands in.
    pub family: Family,
    /// Its priority.
    pub priority: u32,
    /// Carries [`PROTOCOL`].
    pub ours: bool,
    /// The rule as tunroute would write it; none if it has any other selector or action.
    pub rule: Option<Rule>,
    /// Looks up [`TABLE_LOCAL`] for every packet, as the kernel's own rule at priority 0 does.
    pub looks_up_local: bool,
    /// Looks up [`TABLE_MAIN`] for every packet.
    pub looks_up_main: bool,
    /// The `l3mdev` selector: such a rule, which the kernel makes with the first VRF, matches only what enters by a VRF's
    /// port or is bound to one (`l3mdev_fib_rule_match()` in `net/l3mdev/l3mdev.c`).
    pub l3mdev: bool,
    /// The `iif` selector.
    pub iif: Option<String>,
    /// The `oif` selector: such a rule never matches a packet that is being forwarded.
    pub oif: Option<String>,
    /// What a rule of others selects and asks; none for tunroute's own, and where it is not known.
    pub foreign: Option<Box<Foreign>>,
    /// In `ip rule` syntax, for people; empty where `rule` says it, for those are many. See [`Self::text`].
    pub text: String,
}

/// The prefixes that a rule of others selects, and the table that it asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    /// `not`: it matches what the selectors do not.
    pub inverted: bool,
    /// The source prefix; none for all sources.
    pub from: Option<IpNet>,
    /// The destination prefix; none for all destinations.
    pub to: Option<IpNet>,
    /// The routing table that it asks; none for any other action.
    pub table: Option<u32>,
    /// It has selectors besides the two prefixes, such as `fwmark` or `iif`.
    pub others: bool,
}

impl Foreign {
    /// May the rule match a packet, as far as its prefixes tell?
    #[must_use]
    pub fn may_match(&self, source: IpAddr, destination: IpAddr) -> bool {
        let holds = |prefix: &Option<IpNet>, address| prefix.is_none_or(|prefix| prefix.contains(address));
        let matches = holds(&self.from, &source) && holds(&self.to, &destination);
        matches != (self.inverted && !self.others)
    }
}

impl ObservedRule {
    /// In `ip rule` syntax, for people.
    #[must_use]
    pub fn text(&self) -> String {
        self.rule.as_ref().map_or_else(|| self.text.clone(), ToString::to_string)
    }

    /// The operation that removes it.
    #[must_use]
    pub fn removal(&self) -> KernelOp {
        let (handle, family, rule) = (self.handle, self.family, self.rule.clone());
        KernelOp::DelRule { handle, family, rule, text: self.text() }
    }
}

/// A route that carries [`PROTOCOL`], as observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedRoute {
    /// The observed message, for an exact deletion.
    pub handle: Handle,
    /// Its family.
    pub family: Family,
    /// The route as tunroute would write it; none if it has anything that tunroute does not write.
    pub route: Option<Route>,
    /// In `ip route` syntax, for people.
    pub text: String,
}

impl ObservedRoute {
    /// The operation that removes it.
    #[must_use]
    pub fn removal(&self) -> KernelOp {
        let (handle, family, text) = (self.handle, self.family, self.text.clone());
        KernelOp::DelRoute { handle, family, table: self.route.as_ref().map(|route| route.table), text }
    }
}

/// A unicast route of the main table, as far as exemptions and the reverse path need it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct MainRoute {
    /// The destination prefix.
    pub dst: IpNet,
    /// The metric: of several routes to one destination, the kernel takes the one with the least.
    pub metric: u32,
    /// The device; none if there are several next hops.
    pub oif: Option<IfIndex>,
    /// The devices of several next hops.
    pub hops: Vec<IfIndex>,
    /// Reached directly, without a gateway.
    pub on_link: bool,
    /// A network that the kernel, a router's advertisement or DHCP has put on the link, together with an address of this
    /// host: no static route by a device.
    pub network: bool,
}

impl MainRoute {
    /// The devices of all next hops.
    pub fn devices(&self) -> impl Iterator<Item = &IfIndex> {
        self.oif.iter().chain(&self.hops)
    }
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The device.
    pub device: IfIndex,
    /// The device's own address.
    pub own: IpAddr,
    /// The address of the other end, on a point-to-point device that has been told it.
    pub peer: Option<IpAddr>,
}

/// What the kernel says of this network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    /// All devices, by number.
    pub links: BTreeMap<IfIndex, Link>,
    /// All rules of both families, in the order in which the kernel asks them.
    pub rules: Vec<ObservedRule>,
    /// The routes that carry [`PROTOCOL`], of all tables.
    pub routes: Vec<ObservedRoute>,
    /// The destinations in the local table: local, broadcast and anycast addresses.
    pub local: BTreeSet<IpNet>,
    /// The devices' addresses, whether the devices are up or not.
    pub addresses: BTreeSet<Address>,
    /// The unicast routes of the main table.
    pub main: Vec<MainRoute>,
    /// The destinations that the main table refuses, or leaves to the rules behind it (`throw`).
    pub main_refuses: BTreeSet<IpNet>,
    /// Tables with routes of others in them.
    pub foreign_tables: BTreeSet<u32>,
}

impl KernelState {
    /// The device with this name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    /// The main table alone says where IPv4 sources are when rp_filter looks for the way back: no rule of somebody else is
    /// asked before it. The `iif` of that lookup is the device by which the packet leaves (`__mkroute_input()` in
    /// `net/ipv4/route.c`); it has no `oif`.
    #[must_use]
    pub fn main_leads_back(&self) -> bool {
        let decides = |rule: &&ObservedRule| {
            rule.family == Family::V4 && !rule.ours && !rule.looks_up_local && !rule.l3mdev && rule.oif.is_none()
        };
        self.rules.iter().find(decides).is_none_or(|rule| rule.looks_up_main)
    }
}

/// One change to the kernel's rules and routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelOp {
    /// Make a rule.
    AddRule(Rule),
    /// Remove a rule, exactly as observed.
    DelRule {
        /// The observed rule.
        handle: Handle,
        /// The family whose rule list it stands in.
        family: Family,
        /// [`ObservedRule::rule`]
        rule: Option<Rule>,
        /// In `ip rule` syntax, for people.
        text: String,
    },
    /// Make a route where none has its [`Route::key`].
    AddRoute(Route),
    /// Put a route in the place of the one with its [`Route::key`], at once.
    ReplaceRoute(Route),
    /// Remove a route, exactly as observed.
    DelRoute {
        /// The observed route.
        handle: Handle,
        /// Its family.
        family: Family,
        /// Its table; none of a route that tunroute would not write.
        table: Option<u32>,
        /// In `ip route` syntax, for people.
        text: String,
    },
}

impl KernelOp {
    /// The family of the rule or route.
    #[must_use]
    pub const fn family(&self) -> Family {
        match self {
            Self::AddRule(rule) => rule.family(),
            Self::AddRoute(route) | Self::ReplaceRoute(route) => Family::of(&route.dst),
            Self::DelRule { family, .. } | Self::DelRoute { family, .. } => *family,
        }
    }

    /// Is it about a shortcut ([`Rule::is_shortcut`])?
    #[must_use]
    pub const fn is_shortcut(&self) -> bool {
        match self {
            Self::AddRule(rule) | Self::DelRule { rule: Some(rule), .. } => rule.is_shortcut(),
            _ => false,
        }
    }
}

impl fmt::Display for KernelOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddRule(rule) => f.write_str(&rule.add_command()),
            Self::DelRule { family, text, .. } => write!(f, "{} rule del {text}", Ip(&family.default_prefix())),
            Self::AddRoute(route) => f.write_str(&route.add_command()),
            Self::ReplaceRoute(route) => f.write_str(&route.replace_command()),
            Self::DelRoute { family, text, .. } => write!(f, "{} route del {text}", Ip(&family.default_prefix())),
        }
    }
}
