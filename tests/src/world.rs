//! The whole story in six namespaces.
//!
//! ```text
//!                                ┌────────┐ sixxs0      sixxs0 ┌─────────┐
//!                     ┌──────┐   │        ╞════════════════════╡ broker0 ├──── via-b0 ─┐
//!                     │client├───┤  host  │ sixxs1      sixxs1 ├─────────┤             │
//!                     └──────┘   │        ╞════════════════════╡ broker1 ├──── via-b1 ─┤
//!                          lan0  │        │                    └────┬────┘       ┌─────┴──┐
//!                                │        │ net0      net0 ┌─────┐  │ to-isp     │ remote │
//!                                │        ├────────────────┤ isp ├──┘            └─────┬──┘
//!                                └────────┘                │     ├────────── via-isp ──┘
//!                                                          └─────┘
//!
//! lan0     client  10.0.0.2/24 2a02:578:85a0::2/64    host  10.0.0.1/24 2a02:578:85a0::1/64     belong to sixxs0
//!                  10.1.0.2/24 2a02:578:85a1::2/64          10.1.0.1/24 2a02:578:85a1::1/64     belong to sixxs1
//!                  10.9.0.2/24 2001:db8:c::2/64             10.9.0.1/24 2001:db8:c::1/64        belong to the isp
//! net0     host    192.0.2.1/30 2001::1/64            isp   192.0.2.2/30 2001::ff/64
//! sixxs0   host    198.51.100.1/32 2a02::1/128        broker0 198.51.100.254/32 2a02::b0/128    10.0.0.0/16 2a02:578:85a0::/48
//! sixxs1   host    203.0.113.1/32  2a02::2/128        broker1 203.0.113.254/32  2a02::b1/128    10.1.0.0/16 2a02:578:85a1::/48
//! underlay isp     192.0.2.65/30 2001:db8:f:3::1/64   broker0 192.0.2.66, 2001:db8:f:3::2       carries what encapsulates
//!          isp     192.0.2.69/30 2001:db8:f:4::1/64   broker1 192.0.2.70, 2001:db8:f:4::2
//! via-…    isp     192.0.2.129/30 2001:db8:f::1/64    remote  192.0.2.130, 2001:db8:f::2
//!          broker0 192.0.2.133/30 2001:db8:f:1::1/64  remote  192.0.2.134, 2001:db8:f:1::2
//!          broker1 192.0.2.137/30 2001:db8:f:2::1/64  remote  192.0.2.138, 2001:db8:f:2::2
//! lo       remote  198.18.0.1/32 2001:db8:ee::1/128
//! ```
//!
//! `host` and `client` have default routes to `isp` and `host`. `remote` reaches the tunnel addresses and their client
//! prefixes by the broker of the tunnel, everything else by `isp`, so the device of `remote` on which a packet arrives
//! tells which way it came. `isp` drops what arrives on `net0` from a source that is not its customer's; each broker
//! drops what arrives on the tunnel from a source that is not the tunnel's. So without tunroute nobody can ping
//! 2a02::1: the reply leaves by `net0` and `isp` drops it.
//!
//! Neighbours are resolved on first use. Addresses stay when a link goes down (`keep_addr_on_down`); IPv6 routes of
//! the broker through a veth do, too, since only its carrier goes.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result};
use tunroute::policy::net::Family;

use crate::{
    device::{End, Mac, veth},
    inject::Injector,
    lab::{Lab, Share},
    netkit::netkit,
    netns::{BpfFs, Netns},
    offload::{AS_ON_A_WIRE, switch},
    pace::until,
    plan::{
        Addrs, HOST, ISP, MAC_CLIENT, MAC_HOST, MAC_ISP, MAC_LAN, Nets, PLAIN, PLAIN_CLIENT, PLAIN_LAN, REMOTE,
        REMOTE_ISP_DEVICE, TUNNELS, TunnelPlan, UPLINK, mac_broker, mac_tunnel, mac_wire,
    },
    tun::{TunOptions, TunPair},
    tunnel::{TunnelKind, encapsulating, wireguard},
};

/// The MTU of all links but the tunnels, in bytes.
pub const MTU: u32 = 1500;

/// How a world shall be.
#[derive(Clone, Copy, Debug)]
pub struct WorldBuilder {
    kind: TunnelKind,
    mtu: u32,
    vnet_hdr: bool,
    present: [bool; 2],
    share: Share,
}

impl WorldBuilder {
    /// MTU of the tunnels at layer 3, in bytes; 1400 by default, at most 1450 for vxlan.
    #[must_use]
    pub const fn tunnel_mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// tun devices take GSO packets whole; off by default.
    #[must_use]
    pub const fn vnet_hdr(mut self) -> Self {
        self.vnet_hdr = true;
        self
    }

    /// The tunnels that exist at the start; by default both. See [`World::create_tunnel`].
    #[must_use]
    pub const fn tunnels_present(mut self, present: [bool; 2]) -> Self {
        self.present = present;
        self
    }

    /// No other lab exists meanwhile, on the whole machine: for a test that measures time.
    #[must_use]
    pub const fn alone(mut self) -> Self {
        self.share = Share::Nobody;
        self
    }

    /// Makes the world.
    ///
    /// # Errors
    /// Not root, or something cannot be set up.
    pub fn build(self) -> Result<World> {
        World::build(self)
    }
}

/// The world. See the module's documentation for its map.
#[derive(Debug)]
pub struct World {
    options: WorldBuilder,
    // Fields are dropped in this order: what is in the namespaces, the namespaces, the directory.
    tuns: Mutex<[Option<TunPair>; 2]>,
    /// A machine in the network behind the host.
    pub client: Netns,
    /// Where tunroute runs.
    pub host: Netns,
    /// The router at the other end of `net0`.
    pub isp: Netns,
    /// The routers at the other end of the tunnels.
    pub brokers: [Netns; 2],
    /// A machine on the internet.
    pub remote: Netns,
    bpffs: BpfFs,
    lab: Lab,
}

impl World {
    /// Starts to describe a world.
    #[must_use]
    pub const fn with(kind: TunnelKind) -> WorldBuilder {
        WorldBuilder { kind, mtu: 1400, vnet_hdr: false, present: [true; 2], share: Share::Others }
    }

    fn build(options: WorldBuilder) -> Result<Self> {
        let lab = Lab::new(options.share)?;
        let [client, host, isp, broker0, broker1, remote] =
            lab.netns(["client", "host", "isp", "broker0", "broker1", "remote"])?;
        for router in [&host, &isp, &broker0, &broker1] {
            router.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
        }
        let bpffs = BpfFs::mount(host.dir().join("bpf"))?;
        let brokers = [broker0, broker1];
        let world = Self { options, tuns: Mutex::default(), client, host, isp, brokers, remote, bpffs, lab };
        world.connect().context("cannot connect the namespaces")?;
        world.client.ip(&world.client_script()?)?;
        world.host.ip(&world.host_script()?)?;
        world.isp.ip(&world.isp_script()?)?;
        for (index, broker) in world.brokers.iter().enumerate() {
            broker.ip(&broker_script(index)?)?;
        }
        world.remote.ip(&world.remote_script()?)?;
        for (index, present) in options.present.into_iter().enumerate() {
            if present {
                world.set_present(index, true)?;
            }
        }
        world.settle()?;
        Ok(world)
    }

    /// Waits until the kernel has taken note of every carrier in the host, within a second (`net/core/link_watch.c`): only
    /// then it adds the prefix `fe80::/64`. And until all addresses are in use, everywhere.
    fn settle(&self) -> Result<()> {
        let noted = || Ok(!self.host.query("ip", "-oneline link show up")?.contains("NO-CARRIER"));
        until("every device of the host has a carrier", noted)?;
        let Self { client, host, isp, brokers: [broker0, broker1], remote, .. } = self;
        [client, host, isp, broker0, broker1, remote].into_iter().try_for_each(|netns| netns.wait_for_addresses(None))
    }

    /// All links but the tunnels.
    fn connect(&self) -> Result<()> {
        let Self { client, host, isp, brokers: [broker0, broker1], remote, .. } = self;
        let wires = [
            (client, "lan0", MAC_CLIENT, host, "lan0", MAC_LAN),
            (host, "net0", MAC_HOST, isp, "net0", MAC_ISP),
            (isp, "to-b0", mac_wire(0, 1), broker0, "to-isp", mac_wire(0, 2)),
            (isp, "to-b1", mac_wire(1, 1), broker1, "to-isp", mac_wire(1, 2)),
            (isp, "to-remote", mac_wire(2, 1), remote, REMOTE_ISP_DEVICE, mac_wire(2, 2)),
            (broker0, "to-remote", mac_wire(3, 1), remote, TUNNELS[0].remote_device, mac_wire(3, 2)),
            (broker1, "to-remote", mac_wire(4, 1), remote, TUNNELS[1].remote_device, mac_wire(4, 2)),
        ];
        for (a, a_device, a_mac, b, b_device, b_mac) in wires {
            let a = End { netns: a, device: a_device, mac: a_mac };
            let b = End { netns: b, device: b_device, mac: b_mac };
            veth(a, b, MTU)?;
        }
        Ok(())
    }

    fn client_script(&self) -> Result<String> {
        let mut script = String::new();
        for addrs in [PLAIN_CLIENT, TUNNELS[0].client, TUNNELS[1].client] {
            add_addrs(&mut script, "lan0", addrs, [24, 64])?;
        }
        add_routes(&mut script, "default", PLAIN_LAN, "lan0")?;
        Ok(script)
    }

    fn host_script(&self) -> Result<String> {
        let mut script = String::new();
        for addrs in [PLAIN_LAN, TUNNELS[0].lan, TUNNELS[1].lan] {
            add_addrs(&mut script, "lan0", addrs, [24, 64])?;
        }
        add_addrs(&mut script, "net0", HOST, [30, 64])?;
        add_routes(&mut script, "default", ISP, "net0")?;
        Ok(script)
    }

    fn isp_script(&self) -> Result<String> {
        let mut script = String::new();
        add_addrs(&mut script, "net0", ISP, [30, 64])?;
        for (index, device) in ["to-b0", "to-b1"].into_iter().enumerate() {
            add_addrs(&mut script, device, underlay_gateway(index), [30, 64])?;
        }
        writeln!(script, "addr add 192.0.2.129/30 dev to-remote\naddr add 2001:db8:f::1/64 dev to-remote nodad")?;
        for family in Family::ALL {
            writeln!(script, "route add {} via {} dev net0", PLAIN.of(family), HOST.of(family))?;
            let remote = remote_gateway(2).of(family);
            writeln!(script, "route add {} via {remote} dev to-remote", REMOTE.of(family))?;
        }
        only_from(&mut script, "net0", &[UPLINK, PLAIN])?;
        Ok(script)
    }

    fn remote_script(&self) -> Result<String> {
        let mut script = String::new();
        add_addrs(&mut script, "lo", REMOTE, [32, 128])?;
        for (link, device) in [(0, TUNNELS[0].remote_device), (1, TUNNELS[1].remote_device), (2, REMOTE_ISP_DEVICE)] {
            add_addrs(&mut script, device, remote_gateway(link), [30, 64])?;
        }
        for family in Family::ALL {
            for prefix in [UPLINK, PLAIN] {
                let gateway = wire_gateway(2).of(family);
                writeln!(script, "route add {} via {gateway} dev {REMOTE_ISP_DEVICE}", prefix.of(family))?;
            }
            for (index, TunnelPlan { host, prefix, remote_device, .. }) in TUNNELS.iter().enumerate() {
                let gateway = wire_gateway(index).of(family);
                writeln!(script, "route add {} via {gateway} dev {remote_device}", host.of(family))?;
                writeln!(script, "route add {} via {gateway} dev {remote_device}", prefix.of(family))?;
            }
        }
        Ok(script)
    }

    /// Makes a tunnel with its addresses and the broker's routes into it. If there was one, it is deleted first.
    ///
    /// # Errors
    /// A device cannot be made.
    pub fn create_tunnel(&mut self, index: usize) -> Result<()> {
        self.set_present(index, true)
    }

    /// Deletes a tunnel, at both ends; nothing happens if it does not exist.
    ///
    /// # Errors
    /// `ip link del` fails.
    pub fn delete_tunnel(&mut self, index: usize) -> Result<()> {
        self.set_present(index, false)
    }

    /// Makes a tunnel anew, or deletes it, while a daemon runs in the world.
    ///
    /// # Errors
    /// A device cannot be made or deleted.
    pub fn set_present(&self, index: usize, present: bool) -> Result<()> {
        self.remove(index)?;
        if present { self.make(index) } else { Ok(()) }
    }

    fn make(&self, index: usize) -> Result<()> {
        let WorldBuilder { kind, mtu, vnet_hdr, .. } = self.options;
        let (plan, broker) = (&TUNNELS[index], &self.brokers[index]);
        let number = u8::try_from(index)?;
        let device = plan.device;
        let ends = [
            End { netns: &self.host, device, mac: mac_tunnel(number) },
            End { netns: broker, device, mac: mac_broker(number) },
        ];
        match kind {
            TunnelKind::Tun => {
                let options = TunOptions { mtu, vnet_hdr };
                let pair = TunPair::new((&self.host, device), (broker, device), options)?;
                self.tuns()[index] = Some(pair);
            }
            TunnelKind::Veth => veth(ends[0], ends[1], mtu)?,
            TunnelKind::Netkit => netkit(ends[0], ends[1], mtu)?,
            TunnelKind::Wireguard => wireguard((ends[0], HOST.v4), (ends[1], plan.underlay.v4), number, mtu)?,
            kind => {
                let underlay = [HOST, plan.underlay].map(|addrs| addrs.of(kind.underlay()));
                encapsulating(kind, (ends[0], underlay[0]), (ends[1], underlay[1]), number, mtu)?;
            }
        }
        let mut script = String::new();
        add_addrs(&mut script, device, plan.host, [32, 128])?;
        self.host.ip(&script)?;
        let mut script = String::new();
        add_addrs(&mut script, device, plan.gateway, [32, 128])?;
        for family in Family::ALL {
            let host = plan.host.of(family);
            writeln!(script, "route add {host} dev {device}")?;
            let via = if kind.needs_gateway() { format!("via {host}") } else { String::new() };
            writeln!(script, "route add {} {via} dev {device}", plan.prefix.of(family))?;
        }
        broker.ip(&script)?;
        [&self.host, broker].into_iter().try_for_each(|netns| netns.wait_for_addresses(Some(device)))
    }

    fn tuns(&self) -> MutexGuard<'_, [Option<TunPair>; 2]> {
        self.tuns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, index: usize) -> Result<()> {
        self.tuns()[index] = None;
        for netns in [&self.host, &self.brokers[index]] {
            if netns.ifindex(TUNNELS[index].device).is_ok() {
                netns.ip(&format!("link del {}", TUNNELS[index].device))?;
            }
        }
        Ok(())
    }

    /// Has the client and the brokers leave nothing to be done to their frames, and take frames from XDP, as machines at
    /// the other end of a wire do. The tunnels must be veth pairs.
    ///
    /// # Errors
    /// A tunnel is not there.
    pub fn as_on_a_wire(&self) -> Result<()> {
        switch(&self.client, "lan0", &AS_ON_A_WIRE)?;
        self.brokers.iter().zip(&TUNNELS).try_for_each(|(broker, plan)| switch(broker, plan.device, &AS_ON_A_WIRE))
    }

    /// Sets the host's end of a tunnel up or down.
    ///
    /// # Errors
    /// It does not exist.
    pub fn set_tunnel(&self, index: usize, up: bool) -> Result<()> {
        self.host.ip(&format!("link set {} {}", TUNNELS[index].device, if up { "up" } else { "down" }))
    }

    /// Sends packets from the client to the host, over `lan0`.
    ///
    /// # Errors
    /// `lan0` was deleted.
    pub fn client_injector(&self) -> Result<Injector> {
        Injector::ethernet(&self.client, "lan0", MAC_CLIENT, MAC_LAN)
    }

    /// Sends packets from the ISP to the host, over `net0`.
    ///
    /// # Errors
    /// `net0` was deleted.
    pub fn isp_injector(&self) -> Result<Injector> {
        Injector::ethernet(&self.isp, "net0", MAC_ISP, MAC_HOST)
    }

    /// Sends packets from a broker to the host, through the tunnel.
    ///
    /// # Errors
    /// The tunnel does not exist.
    pub fn broker_injector(&self, index: usize) -> Result<Injector> {
        let (broker, device) = (&self.brokers[index], TUNNELS[index].device);
        match self.macs(index) {
            Some((tunnel, broker_end)) => Injector::ethernet(broker, device, broker_end, tunnel),
            None => Injector::layer3(broker, device),
        }
    }

    /// The MAC addresses of a tunnel, the host's and the broker's, where it is an Ethernet device.
    #[must_use]
    pub fn macs(&self, index: usize) -> Option<(Mac, Mac)> {
        let number = u8::try_from(index).ok()?;
        match self.options.kind {
            TunnelKind::Vxlan | TunnelKind::Veth => Some((mac_tunnel(number), mac_broker(number))),
            TunnelKind::Netkit => Some((Mac([0; 6]), Mac([0; 6]))),
            _ => None,
        }
    }

    /// What the tunnels are made of.
    #[must_use]
    pub const fn kind(&self) -> TunnelKind {
        self.options.kind
    }

    /// Where the daemons of this world pin, on a bpffs that outlives them. The first one makes it.
    #[must_use]
    pub fn pin_dir(&self) -> PathBuf {
        self.bpffs.path().join("tunroute")
    }

    /// The world's directory, for files of the test's own.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.lab.dir()
    }

    /// The configuration of the story: each tunnel's address and client prefix leave by it, and by nothing else.
    #[must_use]
    pub fn config(&self) -> String {
        let mut config = "[interfaces]\ningress = [\"lan0\"]\nuplink = [\"net0\"]\n".to_owned();
        for TunnelPlan { device, gateway, .. } in TUNNELS {
            config += &format!("\n[tunnel.{device}]\n");
            if self.options.kind.needs_gateway() {
                config += &format!("via = [\"{}\", \"{}\"]\n", gateway.v4, gateway.v6);
            }
        }
        for (index, TunnelPlan { device, host, prefix, .. }) in TUNNELS.iter().enumerate() {
            config += &format!(
                "\n[[policy]]\nname = \"tunnel{index}\"\nfrom = [\"{}\", \"{}\", \"{}\", \"{}\"]\nvia = [\"{device}\"]\n",
                host.v4, host.v6, prefix.v4, prefix.v6
            );
        }
        config
    }
}

fn broker_script(index: usize) -> Result<String> {
    let TunnelPlan { device, host, prefix, underlay, .. } = TUNNELS[index];
    let mut script = String::new();
    add_addrs(&mut script, "to-isp", underlay, [30, 64])?;
    for family in Family::ALL {
        let isp = underlay_gateway(index).of(family);
        writeln!(script, "route add {} via {isp} dev to-isp", UPLINK.of(family))?;
    }
    add_addrs(&mut script, "to-remote", wire_gateway(index), [30, 64])?;
    add_routes(&mut script, "default", remote_gateway(index), "to-remote")?;
    let hosts = Nets { v4: host.v4.into(), v6: host.v6.into() };
    only_from(&mut script, device, &[hosts, prefix])?;
    Ok(script)
}

/// The ISP's address on its link to a broker.
fn underlay_gateway(index: usize) -> Addrs {
    let (v4, v6): (u8, u16) = [(65, 3), (69, 4)][index];
    Addrs { v4: [192, 0, 2, v4].into(), v6: [0x2001, 0xdb8, 0xf, v6, 0, 0, 0, 1].into() }
}

/// The address of broker 0, broker 1 or (2) the ISP on its link to `remote`.
fn wire_gateway(link: usize) -> Addrs {
    link_address(link, 1)
}

/// The address of `remote` on its link to broker 0, broker 1 or (2) the ISP.
fn remote_gateway(link: usize) -> Addrs {
    link_address(link, 2)
}

fn link_address(link: usize, side: u8) -> Addrs {
    let (v4, v6): (u8, u16) = [(132, 1), (136, 2), (128, 0)][link];
    Addrs { v4: [192, 0, 2, v4 + side].into(), v6: [0x2001, 0xdb8, 0xf, v6, 0, 0, 0, side.into()].into() }
}

fn add_addrs(script: &mut String, device: &str, addrs: Addrs, lengths: [u8; 2]) -> Result<()> {
    writeln!(script, "addr add {}/{} dev {device}", addrs.v4, lengths[0])?;
    writeln!(script, "addr add {}/{} dev {device} nodad", addrs.v6, lengths[1])?;
    Ok(())
}

fn add_routes(script: &mut String, to: &str, via: Addrs, device: &str) -> Result<()> {
    for family in Family::ALL {
        writeln!(script, "route add {to} via {} dev {device}", via.of(family))?;
    }
    Ok(())
}

/// A router's filter: what arrives on a device from any other source is dropped.
fn only_from(script: &mut String, device: &str, sources: &[Nets]) -> Result<()> {
    for family in Family::ALL {
        let version = if family == Family::V4 { "-4" } else { "-6" };
        for source in sources {
            writeln!(script, "{version} rule add iif {device} from {} lookup main pref 100", source.of(family))?;
        }
        writeln!(script, "{version} rule add iif {device} blackhole pref 101")?;
    }
    Ok(())
}
