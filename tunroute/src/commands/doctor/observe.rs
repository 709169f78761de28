//! Observes the host, for the examination.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use nix::{
    ifaddrs::getifaddrs,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{
    network_manager,
    path::{self, Narrow},
};
use crate::{
    config::{Config, Datapath},
    datapath::features,
    host::networkd,
    kernel::{
        Answer, Kernel, Kinds, Oracle, Question,
        sysctl::{RpFilter, rp_filter},
    },
    policy::compile::follow,
    policy::devices::matching,
    policy::gates::{Gate, GateInput, Probes, gates},
    policy::net::{Band, Family, IfIndex, KernelState},
};

/// Kernel settings by their paths below `/proc/sys/net`; one that does not exist is left out.
pub type Settings = BTreeMap<String, i64>;

/// An address of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnAddress {
    /// The device that has it.
    pub device: String,
    /// The address.
    pub address: IpAddr,
    /// The device by which packets from it leave to a distant destination; none if they are not routed.
    pub leaves_by: Option<String>,
}

/// Distant destinations: addresses for benchmarks between networks (RFC 2544, RFC 5180), which no link has.
const FAR_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1));
const FAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 1));

/// An observation of this host.
#[derive(Clone, Debug)]
pub struct Observation {
    /// Devices, rules and routes.
    pub kernel: KernelState,
    /// The closed gates of the fast path, except for rules of others.
    pub gates: Vec<Gate>,
    /// The kernel's settings.
    pub settings: Settings,
    /// The reverse path filters of the ingress devices.
    pub filters: BTreeMap<IfIndex, RpFilter>,
    /// The host's addresses.
    pub addresses: Vec<OwnAddress>,
    /// Tunnels that lose large packets silently.
    pub narrow: Vec<Narrow>,
    /// Features of the kernel that the fast path needs and that are missing.
    pub lacking: Vec<&'static str>,
    /// Tunnels that NetworkManager has a connection for.
    pub network_manager: Vec<String>,
    /// A bpf file system is mounted where pins belong.
    pub bpffs: bool,
    /// A setting that systemd-networkd needs.
    pub networkd: Option<String>,
}

impl Observation {
    /// Observes this host.
    ///
    /// # Errors
    ///
    /// The kernel cannot be asked.
    pub async fn take(config: &Config) -> anyhow::Result<Self> {
        let (netlink, _events) = Kernel::connect()?;
        let kernel = netlink.observe(Kinds::ALL, None).await?.state;
        let mut config = config.clone();
        follow(&mut config, &kernel);
        let config = &config;
        let ingress: Vec<_> = matching(&config.interfaces.ingress, &kernel).collect();
        let probes = Probes::read(ingress.iter().copied()).await;
        let numbers: Vec<IfIndex> = ingress.iter().map(|link| link.index).collect();
        let report = gates(&GateInput {
            state: &kernel,
            probes: &probes,
            ingress: &numbers,
            last: Band(config.band).last(),
            policies: &config.policies,
            bypass_netfilter: config.bypass_netfilter,
        });
        let mut closed: Vec<Gate> = Vec::new();
        for family in Family::ALL.into_iter().filter(|family| config.uses(*family)) {
            for gate in numbers.iter().flat_map(|device| report.closed(*device, family)) {
                if !closed.contains(gate) && !matches!(gate, Gate::ForeignRule { .. }) {
                    closed.push(gate.clone());
                }
            }
        }
        let addresses = getifaddrs().into_iter().flatten().filter_map(|entry| {
            let address = entry.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            let address = v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))?;
            Some((entry.interface_name, address))
        });
        let mut oracle = Oracle::connect()?;
        let addresses = addresses.map(|(device, address)| {
            let leaves_by = leaves_by(&mut oracle, address, &kernel);
            OwnAddress { device, address, leaves_by }
        });
        let addresses = addresses.collect();
        let root = Path::new("/");
        let tunnels = config.tunnels.iter().filter_map(|tunnel| kernel.link(&tunnel.name));
        let managed = tunnels.filter(|link| network_manager::has_connection(root, link.index));
        let managed = managed.map(|link| link.name.clone()).collect();
        Ok(Self {
            settings: settings(config, &kernel),
            filters: ingress.iter().map(|link| (link.index, rp_filter(&link.name))).collect(),
            gates: closed,
            addresses,
            narrow: path::narrow(config, &kernel).await,
            lacking: if config.datapath == Datapath::Kernel { Vec::new() } else { features::missing() },
            network_manager: managed,
            bpffs: statfs("/sys/fs/bpf").is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC),
            networkd: networkd::hint(root),
            kernel,
        })
    }
}

/// The device by which the kernel sends answers from an address.
fn leaves_by(oracle: &mut Oracle, address: IpAddr, kernel: &KernelState) -> Option<String> {
    let destination = if address.is_ipv4() { FAR_V4 } else { FAR_V6 };
    match oracle.ask(&Question { source: address, destination, iif: None }) {
        Ok(Answer::Leaves { device, .. }) => kernel.links.get(&device).map(|link| link.name.clone()),
        Ok(Answer::Local { .. } | Answer::Refused(_)) | Err(_) => None,
    }
}

fn settings(config: &Config, kernel: &KernelState) -> Settings {
    let mut paths =
        ["ipv6/conf/all/forwarding", "ipv4/conf/all/rp_filter", "core/bpf_jit_enable"].map(str::to_owned).to_vec();
    paths.extend(config.tunnels.iter().map(|tunnel| format!("ipv4/conf/{}/rp_filter", tunnel.name)));
    paths.extend(matching(&config.interfaces.uplink, kernel).map(|link| format!("ipv6/conf/{}/accept_ra", link.name)));
    let read = |path: String| {
        let value = fs::read_to_string(Path::new("/proc/sys/net").join(&path)).ok()?.trim().parse().ok()?;
        Some((path, value))
    };
    paths.into_iter().filter_map(read).collect()
}
