//! `ip rule`s, one for each prefix, as one would write them by hand.

use std::fmt::Write as _;

use anyhow::Result;
use tunroute::policy::net::Family;

use super::{Contestant, InTheKernel, Installed, Task, tunnel_after};
use crate::{prefixes::tunnel, site::Site};

/// One rule for each prefix, and a table for each tunnel.
pub struct FlatRules;

impl Contestant for FlatRules {
    fn name(&self) -> &'static str {
        super::FLAT_RULES
    }

    fn about(&self) -> &'static str {
        "one `ip rule` for each prefix, written by `ip -batch`"
    }

    /// The kernel finds each new rule's place by a walk over those before it (`fib_nl_newrule()` in
    /// `net/core/fib_rules.c`).
    fn growth(&self) -> f64 {
        2.0
    }

    fn install(&self, site: &Site, task: &Task) -> Result<Box<dyn Installed>> {
        let family = version(task.prefixes.family);
        site.host.ip(&tables(site, task)?)?;
        let mut script = String::new();
        for (number, (prefix, tunnel)) in task.prefixes.iter().enumerate() {
            writeln!(script, "{family} rule add from {prefix} lookup {} pref {}", table(tunnel), 1000 + number)?;
        }
        site.host.ip(&script)?;
        Ok(Box::new(InTheKernel))
    }

    fn change(&self, site: &Site, task: &Task, count: u32, back: bool) -> Result<()> {
        let family = version(task.prefixes.family);
        let mut script = String::new();
        for number in 0..count {
            let (prefix, table) = (task.prefixes.get(number), table(tunnel_after(number, count, back)));
            let preference = 1000 + number;
            writeln!(script, "{family} rule del pref {preference}")?;
            writeln!(script, "{family} rule add from {prefix} lookup {table} pref {preference}")?;
        }
        site.host.ip(&script)
    }
}

/// The option of `ip` for a family.
pub(super) const fn version(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

/// A tunnel's routing table.
pub(super) const fn table(tunnel: u32) -> u32 {
    200 + tunnel
}

/// The commands that fill the tunnels' tables.
pub(super) fn tables(site: &Site, task: &Task) -> Result<String> {
    let family = task.prefixes.family;
    let mut script = String::new();
    for number in 0..2 {
        let towards = site.towards(family, tunnel(number) as usize);
        writeln!(script, "{} route add default {towards} table {}", version(family), table(number))?;
    }
    Ok(script)
}
