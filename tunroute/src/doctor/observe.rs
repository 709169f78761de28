//! What the examination looks at.

use std::{collections::BTreeMap, fs, net::IpAddr, path::Path};

use nix::{
    ifaddrs::getifaddrs,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::{
    compile::{follow, matching},
    config::Config,
    gates::{Gate, GateInput, Probes, gates},
    kernel::{Kernel, Kinds},
    net::{Family, IfIndex, KernelState},
    networkd,
};

/// Settings below `/proc/sys/net`, by their paths; those that do not exist are missing.
pub type Settings = BTreeMap<String, i64>;

/// This host as it is.
#[derive(Clone, Debug)]
pub struct Observation {
    /// Devices, rules and routes.
    pub kernel: KernelState,
    /// What closes the fast path, but for foreign rules.
    pub gates: Vec<Gate>,
    /// The kernel's settings.
    pub settings: Settings,
    /// The host's addresses, with their devices.
    pub addresses: Vec<(String, IpAddr)>,
    /// A bpf file system is mounted where pins belong.
    pub bpffs: bool,
    /// What systemd-networkd is to be told.
    pub networkd: Option<String>,
}

impl Observation {
    /// Looks at this host.
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
            band: config.band..=config.band.saturating_add(128),
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
        Ok(Self {
            settings: settings(config, &kernel),
            gates: closed,
            addresses: addresses.collect(),
            bpffs: statfs("/sys/fs/bpf").is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC),
            networkd: networkd::hint(Path::new("/")),
            kernel,
        })
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
