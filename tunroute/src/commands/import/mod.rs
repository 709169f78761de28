//! `tunroute import`: from rules and routes made by hand to a configuration that does the same.
//!
//! [`live()`] asks `ip` what is there and [`script`] reads commands, also those that files for [`wg_quick`] and [`network`]
//! amount to; both lead to a [`Setup`]. [`draft()`] finds the policies in it, and [`mod@write`] writes them down, with
//! comments for what could not be expressed.

mod draft;
mod ini;
mod live;
mod network;
mod script;
#[cfg(test)]
mod tests;
mod wg_quick;
mod write;

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

pub use self::{
    draft::{Draft, draft},
    live::live,
    script::{File, parse, table_names},
};
use crate::policy::net::Family;

/// What stands on a host, or would after a script.
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

/// A rule made by hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The family whose rule list it stands in.
    pub family: Family,
    /// Its priority, if it is known.
    pub priority: Option<u32>,
    /// Its source prefix, and the table that it looks up; none if it has any other selector or action.
    pub plain: Option<(IpNet, u32)>,
    /// As after `ip rule add`.
    pub text: String,
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
    /// Words of it that a configuration has no place for.
    pub extra: Vec<String>,
    /// As after `ip route add`.
    pub text: String,
}

/// What a route does with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// Leave by a device, or by what the gateway says.
    Unicast {
        /// The device.
        device: Option<String>,
        /// The next hop.
        gateway: Option<IpAddr>,
    },
    /// Go on with the next rule.
    Throw,
    /// Drop, with an ICMP error.
    Unreachable,
    /// Drop silently.
    Blackhole,
    /// Drop, with the other ICMP error.
    Prohibit,
    /// Anything else: several next hops, local delivery.
    Other,
}
