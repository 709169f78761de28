//! `tunroute import`: a configuration that does what rules and routes made by hand do.
//!
//! Two readers fill a [`Setup`]: [`live()`] asks `ip` for what is in force, and [`parse`] reads files: scripts ([`script`],
//! with its lexer [`shell`]), and configurations of [`wg_quick`], networkd ([`network`]) and [`ifupdown`]. All of them end in
//! words of `ip`, which [`iproute`] understands. [`draft()`] finds the policies in a setup, and [`mod@write`] writes them
//! down.
//!
//! Whatever has a rule or a route and is not understood, or has no place in a configuration, becomes a note in the result,
//! with its file and line.

mod draft;
mod files;
#[cfg(test)]
mod golden;
mod ifupdown;
mod ini;
mod iproute;
mod live;
mod network;
#[cfg(test)]
mod random;
mod script;
mod shell;
mod tables;
#[cfg(test)]
mod tests;
mod wg_quick;
mod write;

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

pub use self::{
    draft::{Draft, draft},
    files::{File, parse},
    live::live,
    script::ReadFile,
    tables::table_names,
};
use crate::policy::net::Family;

/// Rules and routes: those of a host, or those that files would make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// The rules, in the order in which the kernel asks them in each family.
    pub rules: Vec<Rule>,
    /// The routes of all tables.
    pub routes: Vec<Route>,
    /// The names of tables.
    pub names: BTreeMap<u32, String>,
    /// What was not understood, and why.
    pub notes: Vec<String>,
}

/// Where a rule or a route comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The file and the line; none for what is in force.
    pub place: Option<(String, usize)>,
    /// The command, or the line.
    pub command: String,
}

impl Origin {
    /// A note about it: `FILE:LINE: why: command`.
    #[must_use]
    pub fn note(&self, why: &str) -> String {
        let place = self.place.as_ref().map_or(String::new(), |(file, line)| format!("{file}:{line}: "));
        let command = self.command.split_whitespace().collect::<Vec<_>>().join(" ");
        if command.is_empty() { format!("{place}{why}") } else { format!("{place}{why}: {command}") }
    }
}

/// A rule made by hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The family of the list that it is in.
    pub family: Family,
    /// Its priority: given, or the one that the kernel would choose.
    pub priority: Option<u32>,
    /// Whether the priority was given.
    pub is_given: bool,
    /// Its source prefix; of length 0 for all sources.
    pub from: IpNet,
    /// The table that it looks up.
    pub table: Option<u32>,
    /// Whether it has no other selector, and no other action than to look up its table.
    pub plain: bool,
    /// Where it comes from.
    pub origin: Origin,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The table's number.
    pub table: u32,
    /// The destination prefix.
    pub dst: IpNet,
    /// What it does.
    pub kind: RouteKind,
    /// Its metric; 0 unless given.
    pub metric: u32,
    /// Options that a configuration has no place for.
    pub extra: Vec<String>,
    /// Where it comes from.
    pub origin: Origin,
}

/// What a route does with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// Send it by a device, by a gateway, or both.
    Unicast {
        /// The device.
        device: Option<String>,
        /// The next hop.
        gateway: Option<IpAddr>,
    },
    /// Go on with the next rule.
    Throw,
    /// Drop it, with the ICMP error "unreachable".
    Unreachable,
    /// Drop it silently.
    Blackhole,
    /// Drop it, with the ICMP error "administratively prohibited".
    Prohibit,
    /// Anything else: several next hops, local delivery, a source prefix.
    Other,
}
