//! XDP in the daemon: the devices that take part are chosen as gates are looked at; what the kernel refuses is left to
//! the TC programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use tracing::{info, warn};

use super::{Daemon, config_wants_no_fast_path};
use crate::{
    config::{self, Config},
    control::status::XdpStatus,
    datapath::{attach_xdp, tcx},
    kernel::xdp_features::look,
    policy::devices::matching,
    policy::fast::{Attachment, FastState, Hook, Part},
    policy::net::{IfIndex, KernelState, Link, LinkLayer},
    policy::xdp_devices::{Chosen, Device, Obstacle, Role, choose},
};

/// The chosen devices, as last looked at.
#[derive(Debug, Default)]
pub(super) struct Xdp {
    pub(super) chosen: Chosen,
    devices: BTreeMap<IfIndex, Device>,
    /// Devices at which the kernel has refused the program, as they are.
    refused: BTreeMap<IfIndex, String>,
    /// Why the kernel could not be asked, if it could not.
    error: Option<String>,
}

impl Daemon {
    /// Chooses devices anew. Returns whether the choice has changed.
    pub(super) async fn look_for_xdp(&mut self, kernel: &KernelState) -> bool {
        let fast = self.fast.as_ref().map(crate::datapath::Datapath::state);
        let looked = devices(&self.config, kernel, fast).await;
        let error = looked.as_ref().err().map(ToString::to_string);
        if let Some(error) = error.as_ref().filter(|error| self.xdp.error.as_ref() != Some(error)) {
            warn!("cannot look for XDP, the programs behind it decide: {error}");
        }
        self.xdp.error = error;
        let devices = looked.unwrap_or_default();
        // One that has changed is tried again. That the program is there or not is no change.
        let same = |index: &IfIndex| match (devices.get(index), self.xdp.devices.get(index)) {
            (Some(now), Some(before)) => {
                Device { program: None, ..now.clone() } == Device { program: None, ..before.clone() }
            }
            _ => false,
        };
        self.xdp.refused.retain(|index, _| same(index));
        let chosen = choose(&self.config, kernel, &devices, &ours(fast), &self.xdp.refused);
        let changed = chosen != self.xdp.chosen;
        if changed {
            let news = chosen.devices.iter().filter(|device| !self.xdp.chosen.devices.contains(device));
            for (role, device, obstacle) in news.filter(|_| !chosen.targets.is_empty()) {
                match obstacle {
                    None => info!("XDP: {role} {device} takes part"),
                    Some(obstacle) => info!("XDP: {role} {device} does not take part: {obstacle}"),
                }
            }
        }
        (self.xdp.chosen, self.xdp.devices) = (chosen, devices);
        changed
    }

    /// Are frames decided at the device?
    pub(super) fn decides_early(&self, device: IfIndex) -> bool {
        let attached = self.fast.iter().flat_map(|fast| &fast.state().attached);
        attached.into_iter().any(|attachment| attachment.part == Part::Xdp && attachment.ifindex == device)
    }

    /// The kernel has refused the program: the others do the work.
    pub(super) fn enter_refusal(&mut self, attachment: &Attachment, error: &crate::datapath::DatapathError) {
        warn!("{attachment}: {error}; the programs behind it decide");
        self.xdp.refused.insert(attachment.ifindex, error.to_string());
        let chosen = &mut self.xdp.chosen;
        chosen.stations.remove(&attachment.ifindex);
        for (role, device, obstacle) in &mut chosen.devices {
            if *role == Role::Ingress && *device == attachment.device {
                *obstacle = Some(Obstacle::Refused(error.to_string()));
            }
        }
    }

    /// Has the kernel refused the program somewhere in the last pass?
    pub(super) fn was_refused(&self) -> bool {
        let desired = self.desired.iter().filter_map(|desired| desired.fast.as_ref());
        let mut wanted = desired.flat_map(|desired| desired.stations.keys());
        wanted.any(|device| self.xdp.refused.contains_key(device))
    }

    /// The chosen devices, and why the others are not.
    pub(super) fn xdp_status(&self) -> Vec<XdpStatus> {
        let status = |(role, device, obstacle): &(Role, String, Option<Obstacle>)| XdpStatus {
            role: *role,
            device: device.clone(),
            because: obstacle.as_ref().map(ToString::to_string),
        };
        self.xdp.chosen.devices.iter().map(status).collect()
    }
}

/// The devices that this configuration would choose.
pub(super) async fn would_take_part(config: &Config, kernel: &KernelState, fast: Option<&FastState>) -> Chosen {
    let devices = devices(config, kernel, fast).await.unwrap_or_default();
    choose(config, kernel, &devices, &ours(fast), &BTreeMap::new())
}

/// The devices that could take part; none where none is to.
async fn devices(
    config: &Config,
    kernel: &KernelState,
    fast: Option<&FastState>,
) -> io::Result<BTreeMap<IfIndex, Device>> {
    if fast.is_none() || config.xdp == config::Xdp::Off || config_wants_no_fast_path(config) {
        return Ok(BTreeMap::new());
    }
    let is_ethernet = |link: &&Link| link.layer == LinkLayer::Ethernet;
    let tunnels = config.tunnels.iter().filter_map(|tunnel| kernel.link(&tunnel.name)).filter(is_ethernet);
    let tunnels: Vec<&Link> = tunnels.collect();
    if tunnels.is_empty() {
        return Ok(BTreeMap::new());
    }
    let devices = matching(&config.interfaces.ingress, kernel).filter(is_ethernet).chain(tunnels);
    // Kernels before 6.6 have no TCX.
    let programs = |device| tcx::programs(Hook::Egress, device).map_or(0, |programs| programs.len());
    look(devices, attach_xdp::is_usable(), programs).await
}

/// Where there are programs of this project's.
fn ours(fast: Option<&FastState>) -> BTreeSet<IfIndex> {
    let pinned = fast.into_iter().flat_map(|fast| &fast.pinned);
    pinned.filter(|attachment| attachment.part == Part::Xdp).map(|attachment| attachment.ifindex).collect()
}
