//! The configuration: TOML with spans in, validated policies out. Says what is wrong, where, and what to write.
//!
//! [`load`] reads the file, [`parse`] takes each value, [`check`] looks at how they fit together; all of them go on after
//! an error, so that one run shows everything.

pub(crate) mod allowed;
mod check;
mod doubts;
mod file;
pub mod keys;
mod list;
mod load;
mod names;
mod parse;
mod prefix;
mod report;
mod schema;
mod section;
mod source;
#[cfg(test)]
mod tests;
mod values;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
pub use load::Loaded;
pub use prefix::can_be_source;
pub use report::{ConfigError, Problem};
pub use schema::schema;
use serde::{Deserialize, Serialize};
use tunroute_common::maps::Clamp;

/// Which datapath carries the traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Datapath {
    /// Rules and tables, with the fast path ahead of them.
    #[default]
    Both,
    /// Rules and tables only.
    Kernel,
    /// The eBPF programs only; rules are installed where a program cannot be.
    Ebpf,
    /// Rules and tables; the fast path decides and counts beside them, and leaves every packet to them.
    Shadow,
}

impl Datapath {
    /// As it is written in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Kernel => "kernel",
            Self::Ebpf => "ebpf",
            Self::Shadow => "shadow",
        }
    }
}

/// Who forwards unmatched traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unmatched {
    /// The kernel.
    #[default]
    Kernel,
    /// The programs, by the main table, where the kernel would ask nothing else.
    Fast,
}

/// Whether frames are decided before there is an skb.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Xdp {
    /// Where the devices can, as far as can be seen.
    #[default]
    Auto,
    /// Also at veth devices whose other end is out of sight.
    On,
    /// Nowhere.
    Off,
}

/// A validated configuration: every reference in it resolves, every value is in range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `datapath`
    pub datapath: Datapath,
    /// `band`: the priority of the rules for the longest prefixes. See [`Band`](crate::policy::net::Band).
    pub band: u32,
    /// `tree-above`: with more prefixes of a family, its policies' rules are a tree, behind the band.
    pub tree_above: u32,
    /// `bypass-netfilter`: attach the fast path although netfilter hooks would have seen the packets.
    pub bypass_netfilter: bool,
    /// `unmatched`: who forwards unmatched traffic.
    pub unmatched: Unmatched,
    /// `xdp`: whether frames are decided before there is an skb.
    pub xdp: Xdp,
    /// `metrics`: where a monitoring system reads; nowhere unless given.
    pub metrics: Option<Listen>,
    /// `[interfaces]`
    pub interfaces: Interfaces,
    /// `[tunnel.NAME]`, in the order of the file.
    pub tunnels: Vec<Tunnel>,
    /// `[[policy]]`, in the order of the file; at most 1024.
    pub policies: Vec<Policy>,
}

impl Config {
    /// Is the segment size of any tunnel limited?
    #[must_use]
    pub fn clamps(&self) -> bool {
        self.tunnels.iter().any(|tunnel| tunnel.mss.is_some())
    }

    /// The tunnels of a policy, in its order of preference.
    pub fn tunnels_of<'a>(&'a self, policy: &'a Policy) -> impl Iterator<Item = &'a Tunnel> {
        policy.via.iter().filter_map(|name| self.tunnels.iter().find(|tunnel| tunnel.name == *name))
    }

    /// The families that policies send by a tunnel.
    pub fn families_by(&self, tunnel: &Tunnel) -> impl Iterator<Item = crate::policy::net::Family> {
        let uses =
            |family: &_| self.policies.iter().any(|policy| policy.via.contains(&tunnel.name) && policy.uses(*family));
        crate::policy::net::Family::ALL.into_iter().filter(uses)
    }

    /// Has any policy a source prefix of this family?
    #[must_use]
    pub fn uses(&self, family: crate::policy::net::Family) -> bool {
        self.policies.iter().any(|policy| policy.uses(family))
    }
}

/// An address to listen at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP port of an address of this host.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}/metrics"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// `[interfaces]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// Where forwarded traffic enters.
    pub ingress: Vec<DevicePattern>,
    /// Where policy sources must never leave.
    pub uplink: Vec<DevicePattern>,
}

/// A device name, or a prefix of names ending in `*`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePattern(pub String);

impl DevicePattern {
    /// Does the device name match?
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => self.0 == name,
        }
    }
}

/// `from = ["@lan0"]` or `from = ["@lan0 in 2001:db8:a::/48"]`: sources that are read from interfaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Follow {
    /// The interfaces.
    pub devices: DevicePattern,
    /// The range that the sources must lie in.
    pub within: Option<IpNet>,
}

/// As it is written, without the `@`.
impl fmt::Display for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { devices: DevicePattern(name), within } = self;
        match within {
            Some(within) => write!(f, "{name} in {within}"),
            None => f.write_str(name),
        }
    }
}

/// `[tunnel.NAME]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The device's name.
    pub name: String,
    /// `table`: the table of the first policy that prefers this tunnel.
    pub table: Option<u32>,
    /// `via`: the gateway for IPv4.
    pub via_v4: Option<std::net::Ipv4Addr>,
    /// `via`: the gateway for IPv6.
    pub via_v6: Option<std::net::Ipv6Addr>,
    /// `up`: the command that brings the tunnel up, supervised. Never empty.
    pub up: Option<Vec<String>>,
    /// `down`: the command that takes it down. Never empty.
    pub down: Option<Vec<String>>,
    /// `start-limit`
    pub start_limit: StartLimit,
    /// `mss`: the largest segment size that TCP may tell through the tunnel; as it comes unless given.
    pub mss: Option<Mss>,
    /// `probe`: one or several, all of which must succeed in their family.
    pub probes: Vec<Probe>,
}

impl Tunnel {
    /// The gateway for an address family.
    #[must_use]
    pub fn via(&self, family: crate::policy::net::Family) -> Option<IpAddr> {
        match family {
            crate::policy::net::Family::V4 => self.via_v4.map(IpAddr::V4),
            crate::policy::net::Family::V6 => self.via_v6.map(IpAddr::V6),
        }
    }
}

/// `mss = "auto"`, or a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mss {
    /// What a packet of the tunnel's MTU has room for.
    Auto,
    /// A number of bytes, from 88 to 65495.
    Bytes(u16),
}

impl Mss {
    /// TCP's and IPv4's headers without options.
    const HEADERS_V4: u32 = 40;
    /// TCP's header without options, and IPv6's.
    const HEADERS_V6: u32 = 60;
    /// The least that Linux takes (`TCP_MIN_MSS` in `include/net/tcp.h`).
    pub const LEAST: u16 = 88;
    /// The most that an IPv4 packet has room for.
    pub const MOST: u16 = 65_495;

    /// The limits for a device.
    #[must_use]
    pub fn clamp(self, link: &crate::policy::net::Link) -> Clamp {
        let room = |family, headers| {
            let room = link.mtu_of(family).saturating_sub(headers);
            u16::try_from(room).unwrap_or(Self::MOST).clamp(Self::LEAST, Self::MOST)
        };
        match self {
            Self::Auto => Clamp {
                v4: room(crate::policy::net::Family::V4, Self::HEADERS_V4),
                v6: room(crate::policy::net::Family::V6, Self::HEADERS_V6),
            },
            Self::Bytes(bytes) => Clamp { v4: bytes, v6: bytes },
        }
    }
}

/// `start-limit = { burst = 4, interval = "60s" }`: at most `burst` starts in any `interval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartLimit {
    /// At most this many starts; at least 1.
    pub burst: u32,
    /// In any span of this length; more than zero and at most 30 days.
    pub interval: Duration,
}

impl Default for StartLimit {
    fn default() -> Self {
        Self { burst: 4, interval: Duration::from_secs(60) }
    }
}

/// What a probe sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeTarget {
    /// An ICMP or ICMPv6 echo request: `target = "2001:db8::1"`.
    Echo(IpAddr),
    /// A TCP connection: `target = "192.0.2.1:443"` or `"[2001:db8::1]:443"`.
    Tcp(SocketAddr),
}

/// `probe = { target = "…", interval = "5s", timeout = "1s", fail = 3, rise = 2, hold-down = "0s" }`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What is asked; its family is the one that the probe speaks for.
    pub target: ProbeTarget,
    /// The source address; otherwise the kernel chooses one of the tunnel's.
    pub source: Option<IpAddr>,
    /// From one probe to the next; 10 ms to 30 days.
    pub interval: Duration,
    /// How long an answer may take; more than zero and at most the interval.
    pub timeout: Duration,
    /// This many failures in a row and the tunnel counts as down; at least 1.
    pub fail: u32,
    /// This many answers in a row and it counts as up again; at least 1.
    pub rise: u32,
    /// After going down it stays down at least this long; at most 30 days.
    pub hold_down: Duration,
}

/// What happens to a policy's packets when none of its tunnels is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDown {
    /// Drop, and answer with ICMP "unreachable".
    #[default]
    Unreachable,
    /// Drop silently.
    Blackhole,
    /// Drop, and answer with ICMP "administratively prohibited".
    Prohibit,
    /// As if the policy were not there.
    Next,
}

/// `[[policy]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `name`: unique.
    pub name: String,
    /// `table`: the policy's routing table; otherwise its first tunnel's, otherwise allocated.
    pub table: Option<u32>,
    /// `from` and `from-file`: the source prefixes, without host bits, sorted. None twice in the whole configuration, and
    /// never empty unless `follow` has something.
    pub from: Vec<IpNet>,
    /// `from = ["@lan0"]`: the interfaces whose networks and addresses are sources, too, as they change. None twice in the
    /// whole configuration.
    pub follow: Vec<Follow>,
    /// The prefixes of those interfaces as [`crate::policy::compile::follow`] saw them last; none in what has just been read.
    pub followed: Vec<IpNet>,
    /// `via`: the tunnels' names, in order of preference. All of them declared, none twice, and at least one unless
    /// `main` is set.
    pub via: Vec<String>,
    /// `via = "main"`: the main table decides, as if there were no policy for these sources. Then `table`, `on-down` and
    /// `exempt` are not given.
    pub main: bool,
    /// `on-down`
    pub on_down: OnDown,
    /// `exempt`: the literal prefixes, without host bits, none twice and none of length 0.
    pub exempt: Vec<IpNet>,
    /// `exempt` contains `"connected"` (the default): the networks on the link at ingress interfaces and tunnels.
    pub exempt_connected: bool,
    /// `exempt` contains `"routed"`: the destinations that a route of the main table leads to by a device that is no uplink.
    pub exempt_routed: bool,
    /// `allow-default`: `connected` includes the networks on the link at uplinks, too.
    pub allow_default: bool,
}

impl Policy {
    /// All source prefixes: the literal ones, and those of the interfaces that it follows.
    pub fn sources(&self) -> impl Iterator<Item = &IpNet> {
        self.from.iter().chain(&self.followed)
    }

    /// Have its sources an address in common with a prefix?
    #[must_use]
    pub fn overlaps(&self, prefix: &IpNet) -> bool {
        // The literal ones are sorted: one inside the prefix is the first that does not stand before it.
        let next = self.from.partition_point(|from| from < prefix);
        let inside = self.from.get(next).is_some_and(|from| prefix.contains(from));
        let mut around = std::iter::successors(Some(*prefix), IpNet::supernet);
        inside
            || around.any(|around| self.from.binary_search(&around).is_ok())
            || self.followed.iter().any(|from| from.contains(prefix) || prefix.contains(from))
    }

    /// Has it a source prefix of this family?
    #[must_use]
    pub fn uses(&self, family: crate::policy::net::Family) -> bool {
        // Those of the configuration are sorted: IPv4 comes first.
        let ends = [self.from.first(), self.from.last()].into_iter().flatten();
        ends.chain(&self.followed).any(|prefix| crate::policy::net::Family::of(prefix) == family)
    }
}
