//! Which families each tunnel can carry, and why not the others. Pure.

use crate::{
    config::{Config, Tunnel},
    policy::net::{Family, Inability, KernelState, Link},
};

/// Why a tunnel's device cannot carry a family.
#[must_use]
pub fn inability(tunnel: &Tunnel, link: &Link, family: Family) -> Option<Inability> {
    let other_gateway = || Family::ALL.into_iter().any(|other| tunnel.via(other).is_some());
    let no_gateway = on_link_only(tunnel, link, family) && other_gateway();
    link.unable.get(&family).copied().or(no_gateway.then_some(Inability::NoGateway))
}

/// Whether a tunnel reaches only hosts that answer on its link: its device asks for its neighbours, and there is no gateway.
fn on_link_only(tunnel: &Tunnel, link: &Link, family: Family) -> bool {
    link.asks_neighbours && tunnel.via(family).is_none()
}

/// A family that policies send by a tunnel, and that does not leave by it, or only in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortcoming {
    /// Why.
    pub reason: String,
    /// What becomes of the packets.
    pub effect: String,
    /// What to do about it.
    pub advice: String,
}

/// The shortcomings of the tunnels whose devices exist.
#[must_use]
pub fn shortcomings(config: &Config, kernel: &KernelState) -> Vec<Shortcoming> {
    let mut found = Vec::new();
    for (tunnel, link) in config.tunnels.iter().filter_map(|tunnel| Some((tunnel, kernel.link(&tunnel.name)?))) {
        let name = &tunnel.name;
        for family in config.families_by(tunnel) {
            let (reason, effect, advice) = match inability(tunnel, link, family) {
                Some(inability) => (
                    inability.reason(name, family),
                    format!("policies treat {name} as down for {family}"),
                    inability.advice(name, family),
                ),
                None if on_link_only(tunnel, link, family) => (
                    format!("{name} is an Ethernet device, and has no {family} gateway"),
                    format!("{family} reaches only destinations that answer on its link"),
                    Inability::NoGateway.advice(name, family),
                ),
                None => continue,
            };
            found.push(Shortcoming { reason, effect, advice });
        }
    }
    found
}
