//! The contestants. A new one is a type that implements [`Contestant`] and a line in [`all`].

mod floor;
mod main_route;
mod nft;
mod rules;
mod subtree;
mod tunroute;

use std::{path::Path, time::Duration};

use anyhow::Result;

pub(crate) use self::tunroute::file as configuration_of;

use crate::{
    load::Pattern,
    prefixes::{Prefixes, tunnel},
    site::{Site, Target},
};

/// Where packets must come out for a contestant to have done the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Each at the exit that its source's policy names.
    Policy,
    /// At whatever exit: the contestant has no policies and shows what forwarding alone costs.
    Anywhere,
    /// At none: the contestant drops them.
    Nowhere,
}

/// What a contestant has to do.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// The policies' prefixes.
    pub prefixes: Prefixes,
    /// What the tunnels are.
    pub target: Target,
    /// Which packets will come. Only those without policies may look at it, to know where all packets must go.
    pub pattern: Pattern,
}

/// A way to route by source, or a bound for all of them.
pub trait Contestant: Sync {
    /// Short and stable: the name in records.
    fn name(&self) -> &'static str;

    /// What it is, in a few words.
    fn about(&self) -> &'static str;

    /// Where packets must come out.
    fn delivery(&self) -> Delivery {
        Delivery::Policy
    }

    /// Does the number of prefixes matter to it?
    fn scales(&self) -> bool {
        self.delivery() == Delivery::Policy
    }

    /// Does it leave forwarding to the kernel's routes, if it has no policies?
    fn routes_by_kernel(&self) -> bool {
        false
    }

    /// Does it have to do with forwarded packets only, not with the host's own?
    fn forwards_only(&self) -> bool {
        false
    }

    /// With which power of the number of prefixes the time to install them grows at least, once they are many.
    fn growth(&self) -> f64 {
        0.0
    }

    /// Why it cannot do this, if it cannot.
    fn declines(&self, _task: &Task) -> Option<&'static str> {
        None
    }

    /// Writes what a person would have written, with the first `changed` prefixes at the other tunnel each: before
    /// [installing](Self::install) and [changing](Self::change), and not part of the time that these take.
    ///
    /// # Errors
    /// It could not be written.
    fn prepare(&self, site: &Site, task: &Task, changed: u32) -> Result<()> {
        let _ = (site, task, changed);
        Ok(())
    }

    /// Sets it up, completely: when this returns, packets may come.
    ///
    /// # Errors
    /// It could not be set up.
    fn install(&self, site: &Site, task: &Task) -> Result<Box<dyn Installed>>;

    /// Gives the first `count` prefixes to the other tunnel each, or back; packets are forwarded by the change when this
    /// returns. Asked of those that [scale](Self::scales) only.
    ///
    /// # Errors
    /// It could not be changed.
    fn change(&self, site: &Site, task: &Task, count: u32, back: bool) -> Result<()> {
        let _ = (site, task, count, back);
        anyhow::bail!("{} has no prefixes", self.name())
    }
}

/// The contestant did not get there in time.
#[derive(Debug, thiserror::Error)]
#[error("not ready after {0:.0?}")]
pub struct TooSlow(pub Duration);

/// The tunnel of a prefix by its number, after [`Contestant::change`].
pub(crate) const fn tunnel_after(number: u32, count: u32, back: bool) -> u32 {
    if number < count && !back { 1 - tunnel(number) } else { tunnel(number) }
}

/// A contestant at work. Dropping it stops its processes; the rest goes with the site.
pub trait Installed: Send + Sync {
    /// Its processes, whose memory counts.
    fn process(&self) -> Option<u32> {
        None
    }
}

/// Nothing to stop.
struct InTheKernel;

impl Installed for InTheKernel {}

/// All contestants, in the order of the tables. `daemon` is tunroute's binary.
#[must_use]
pub fn all(daemon: &Path) -> Vec<Box<dyn Contestant>> {
    vec![
        Box::new(rules::FlatRules),
        Box::new(nft::NftMap),
        Box::new(subtree::Subtree),
        Box::new(tunroute::Tunroute::kernel(daemon)),
        Box::new(tunroute::Tunroute::both(daemon)),
        Box::new(tunroute::Tunroute::ebpf(daemon)),
        Box::new(tunroute::Tunroute::unmatched(daemon)),
        Box::new(tunroute::Tunroute::xdp(daemon)),
        Box::new(main_route::BASELINE),
        Box::new(main_route::AGAIN),
        Box::new(floor::ASIDE),
        Box::new(floor::REDIRECT),
        Box::new(floor::DROP),
        Box::new(floor::EARLY_ASIDE),
        Box::new(floor::EARLY_REDIRECT),
    ]
}

/// The baseline of all ratios: no policy at all, which every machine and number of prefixes can do.
pub const BASELINE: &str = "main-route";
/// What a TC program takes at least that hands a packet to a device: the baseline of programs alone.
pub const FLOOR: &str = "floor-redirect";
/// What an XDP program takes at least that hands a frame to a device.
pub const XDP_FLOOR: &str = "floor-xdp-redirect";
/// Flat rules.
pub const FLAT_RULES: &str = "ip-rules";
/// The nftables map.
pub const NFT: &str = "nft-map";
/// tunroute's datapaths.
pub const TUNROUTE_KERNEL: &str = "tunroute-kernel";
/// tunroute's default.
pub const TUNROUTE_BOTH: &str = "tunroute-both";
/// Without rules.
pub const TUNROUTE_EBPF: &str = "tunroute-ebpf";
/// With unmatched traffic forwarded by the programs.
pub const TUNROUTE_UNMATCHED: &str = "tunroute-unmatched";
/// With frames decided before there is an skb.
pub const TUNROUTE_XDP: &str = "tunroute-xdp";
/// The baseline's second entry: what differs between the two is noise.
pub const NULL: &str = "main-route-again";
