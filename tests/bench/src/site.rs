//! Where one contestant works: a namespace with an ingress device, two tunnels and an uplink.
//!
//! ```text
//!             ┌──────── host ────────┐  tun0   exit 0
//!   packets → │ lan0                 ├───────────────
//!             │                      │  tun1   exit 1
//!             │   (the contestant)   ├───────────────
//!             │                      │  net0   exit 2
//!             └──────────────────────┴───────────────
//! ```
//!
//! An exit is a program at the end of the device's egress chain that counts the packet and drops it. With vxlan tunnels
//! the packets are counted where they leave by net0, in their new headers; with veth tunnels at their other ends, as
//! frames, and they come in by the other end of lan0. Neighbours are known and permanent.

use std::{
    fmt::{self, Write as _},
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{tc::SchedClassifierLink, xdp::XdpLink};
use serde::{Deserialize, Serialize};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Lab, Mac, Netns, Share, TunOptions,
    device::{End, veth},
    netns::BpfFs,
    offload::{AS_ON_A_WIRE, switch},
    tun,
};

use crate::{
    generator::{Entry, Generator},
    layout::FIRST_VNI,
};

/// The tunnels' devices, in the order of their numbers.
pub const TUNNELS: [&str; 2] = ["tun0", "tun1"];
/// Where packets enter.
pub const INGRESS: &str = "lan0";
/// The device by which unmatched traffic leaves.
pub const UPLINK: &str = "net0";
/// The MAC addresses of the sender at lan0, and of lan0.
pub const LAN_MACS: (Mac, Mac) = (Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));

/// The settings of every site, for the record. [`Sysctls`] says which vary.
pub const SETTINGS: [&str; 3] = ["rp_filter=0", "ip_forward=1", "ipv6.conf.all.forwarding=1"];

/// The length of `struct virtio_net_hdr`, which is zero before a plain packet (`include/uapi/linux/virtio_net.h`).
pub const VNET_HEADER: usize = 10;

const NET_MACS: (Mac, Mac) = (Mac([2, 0, 0, 0, 1, 1]), Mac([2, 0, 0, 0, 1, 2]));
/// Of all devices but the vxlan tunnels, in bytes.
pub const MTU: u32 = 1500;
/// Carriers are noted within a second; a busy machine gets more.
const SETTLED: Duration = Duration::from_secs(30);
/// What VXLAN over IPv4 leaves of it.
const VXLAN_MTU: u32 = 1450;

/// What the tunnels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Layer 3 devices, as WireGuard, 6in4 and GRE are, without the cost of encapsulation.
    Tun,
    /// Ethernet devices that encapsulate, with a gateway.
    Vxlan,
    /// Ethernet devices that take frames from XDP, with a gateway; packets come in by a wire, as frames.
    Veth,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tun => "tun",
            Self::Vxlan => "vxlan",
            Self::Veth => "veth",
        })
    }
}

/// Settings of the kernel that decide how much a rule costs packets that do not match it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sysctls {
    /// As the kernel comes: `rp_filter=0`, `accept_local=0`. Once there is any rule, each IPv4 packet's source is looked
    /// up as well (`fib_validate_source()` in `net/ipv4/fib_frontend.c`).
    Default,
    /// `accept_local=1` on the ingress device, with which the kernel leaves that out.
    AcceptLocal,
}

impl fmt::Display for Sysctls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::AcceptLocal => "accept_local=1",
        })
    }
}

/// One contestant's place. Dropping it removes everything.
pub struct Site {
    // Dropped in this order: what is in the namespaces, the namespaces, the directory.
    _exits: Vec<SchedClassifierLink>,
    _programs: Vec<XdpLink>,
    tunnels: Vec<File>,
    /// Where veth tunnels end.
    _brokers: Option<Netns>,
    /// Where the contestant works.
    pub host: Netns,
    /// Where clients are.
    pub neighbours: Netns,
    bpffs: BpfFs,
    lab: Lab,
    /// What its tunnels are.
    pub target: Target,
}

impl Site {
    /// Makes one.
    ///
    /// # Errors
    /// Not root, or a device cannot be made.
    pub fn new(generator: &Generator, target: Target) -> Result<Self> {
        let lab = Lab::new(Share::Others)?;
        let [host, neighbours] = lab.netns(["host", "neighbours"])?;
        host.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
        for (device, macs) in [(INGRESS, LAN_MACS), (UPLINK, NET_MACS)] {
            let outside = End { netns: &neighbours, device, mac: macs.0 };
            veth(outside, End { netns: &host, device, mac: macs.1 }, MTU)?;
        }
        host.ip(&format!(
            "addr add 10.99.0.1/24 dev lan0
             addr add fd99::1/64 dev lan0 nodad
             addr add 192.0.2.1/30 dev net0
             addr add 2001:db8::1/64 dev net0 nodad
             neigh add 192.0.2.2 lladdr {mac} dev net0 nud permanent
             neigh add 2001:db8::2 lladdr {mac} dev net0 nud permanent
             route add default via 192.0.2.2
             -6 route add default via 2001:db8::2",
            mac = NET_MACS.0,
        ))?;
        let (mut programs, mut brokers) = (Vec::new(), None);
        let tunnels = match target {
            Target::Tun => tun_tunnels(&host)?,
            Target::Vxlan => vxlan_tunnels(&host)?,
            Target::Veth => {
                let [far] = lab.netns(["far"])?;
                programs.extend(veth_tunnels(&host, &far, generator)?);
                brokers = Some(far);
                Vec::new()
            }
        };
        let exits = host.run_in(|| {
            let mut exits = vec![generator.attach_exit("exit_uplink", UPLINK)?];
            if target == Target::Tun {
                exits.push(generator.attach_exit("exit0", TUNNELS[0])?);
                exits.push(generator.attach_exit("exit1", TUNNELS[1])?);
            }
            Ok(exits)
        })?;
        // What is put in must be able to come in, in skbs or as frames.
        let (entrance, other_end) = if target == Target::Veth { (&neighbours, &host) } else { (&host, &neighbours) };
        programs.push(entrance.run_in(|| generator.attach_entry(INGRESS))?);
        if target == Target::Veth {
            switch(other_end, INGRESS, &AS_ON_A_WIRE)?;
        }
        programs.push(neighbours.run_in(|| generator.hold("lo"))?);
        let bpffs = BpfFs::mount(host.dir().join("bpf"))?;
        Ok(Self {
            _exits: exits,
            _programs: programs,
            _brokers: brokers,
            tunnels,
            host,
            neighbours,
            bpffs,
            lab,
            target,
        })
    }

    /// Where packets are put in, by a thread that [`Self::at_entry`] runs.
    ///
    /// # Errors
    /// There is no such device any more.
    pub fn entry(&self) -> Result<Entry> {
        Ok(match self.target {
            Target::Veth => Entry::Sent(self.neighbours.ifindex(INGRESS)?),
            Target::Tun | Target::Vxlan => Entry::Received(self.host.ifindex(INGRESS)?),
        })
    }

    /// Runs something in the namespace where packets are put in.
    ///
    /// # Errors
    /// As it says.
    pub fn at_entry<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let netns = if self.target == Target::Veth { &self.neighbours } else { &self.host };
        netns.run_in(work)
    }

    /// Where tunroute may pin.
    #[must_use]
    pub fn pin_dir(&self) -> std::path::PathBuf {
        self.bpffs.path().join("tunroute")
    }

    /// A directory for files of the contestant.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.lab.dir()
    }

    /// What a tun device sends comes out here, and what is written here it receives, each with a [`VNET_HEADER`] before it.
    ///
    /// # Errors
    /// The tunnels are no tun devices.
    pub fn tunnel(&self, number: usize) -> Result<&File> {
        self.tunnels.get(number).context("there is no such tun device")
    }

    /// Another namespace of this site.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn netns(&self, label: &str) -> Result<Netns> {
        let [netns] = self.lab.netns([label])?;
        Ok(netns)
    }

    /// The gateway of a tunnel, where it needs one.
    #[must_use]
    pub fn gateway(&self, family: Family, tunnel: usize) -> Option<String> {
        (self.target != Target::Tun).then(|| gateway(family, tunnel))
    }

    /// A route's `via` and `dev` towards a tunnel, in `ip route` syntax.
    #[must_use]
    pub fn towards(&self, family: Family, tunnel: usize) -> String {
        let device = TUNNELS[tunnel];
        match self.gateway(family, tunnel) {
            Some(gateway) => format!("via {gateway} dev {device}"),
            None => format!("dev {device}"),
        }
    }

    /// Changes the settings.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn set(&self, sysctls: Sysctls) -> Result<()> {
        let value = if sysctls == Sysctls::AcceptLocal { "1" } else { "0" };
        self.host.sysctl(&[("ipv4/conf/lan0/accept_local", value)])
    }
}

fn gateway(family: Family, tunnel: usize) -> String {
    match family {
        Family::V4 => format!("10.98.{tunnel}.2"),
        Family::V6 => format!("fd98:{tunnel}::2"),
    }
}

fn tun_tunnels(host: &Netns) -> Result<Vec<File>> {
    TUNNELS
        .into_iter()
        .map(|device| {
            let file = tun::open(host, device, TunOptions { mtu: MTU, vnet_hdr: true })?;
            host.ip(&format!("link set {device} mtu {MTU} up"))?;
            Ok(file)
        })
        .collect()
}

/// Gives a tunnel its addresses and its gateway, which has this link-layer address.
fn addressed(script: &mut String, tunnel: usize, mac: Mac) -> Result<()> {
    let device = TUNNELS[tunnel];
    writeln!(
        script,
        "addr add 10.98.{tunnel}.1/24 dev {device}
         addr add fd98:{tunnel}::1/64 dev {device} nodad"
    )?;
    for family in Family::ALL {
        writeln!(script, "neigh add {} lladdr {mac} dev {device} nud permanent", gateway(family, tunnel))?;
    }
    Ok(())
}

fn veth_tunnels(host: &Netns, far: &Netns, generator: &Generator) -> Result<Vec<XdpLink>> {
    let (mut script, mut programs) = (String::new(), Vec::new());
    for (tunnel, device) in TUNNELS.into_iter().enumerate() {
        let number = u8::try_from(tunnel)?;
        let [near, other] = [1, 2].map(|side| Mac([2, 0, 0, 0, 2 + side, number]));
        veth(End { netns: host, device, mac: near }, End { netns: far, device, mac: other }, MTU)?;
        addressed(&mut script, tunnel, other)?;
        programs.push(far.run_in(|| generator.attach_far(["far0", "far1"][tunnel], device))?);
    }
    host.ip(&script).context("cannot make the veth tunnels")?;
    // The carrier is noted a moment later (`net/core/link_watch.c`), and only then do IPv6 prefixes get their routes.
    let deadline = Instant::now() + SETTLED;
    for device in TUNNELS {
        while !host.query("ip", &format!("-6 route show dev {device}"))?.contains("fd98:") {
            ensure!(Instant::now() < deadline, "{device} has no carrier after {SETTLED:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(programs)
}

fn vxlan_tunnels(host: &Netns) -> Result<Vec<File>> {
    let mut script = String::new();
    for (tunnel, device) in TUNNELS.into_iter().enumerate() {
        let vni = FIRST_VNI + u32::try_from(tunnel)?;
        writeln!(
            script,
            "link add {device} mtu {VXLAN_MTU} type vxlan id {vni} local 192.0.2.1 remote 192.0.2.2 dstport 4789
             link set {device} up"
        )?;
        addressed(&mut script, tunnel, Mac([2, 0, 0, 0, 2, u8::try_from(tunnel)?]))?;
    }
    host.ip(&script).context("cannot make the vxlan tunnels")?;
    Ok(Vec::new())
}
