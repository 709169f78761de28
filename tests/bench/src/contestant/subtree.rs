//! IPv6 routes that have a source: `ip -6 route add default from PREFIX`.

use std::fmt::Write as _;

use anyhow::Result;
use tunroute::policy::net::Family;

use super::{Contestant, InTheKernel, Installed, Task, tunnel_after};
use crate::site::Site;

/// One route for each prefix, in the main table.
pub struct Subtree;

impl Contestant for Subtree {
    fn name(&self) -> &'static str {
        "subtree"
    }

    fn about(&self) -> &'static str {
        "one source-specific IPv6 route for each prefix (`ip -6 route add default from PREFIX`), without rules"
    }

    fn declines(&self, task: &Task) -> Option<&'static str> {
        (task.prefixes.family == Family::V4).then_some("IPv4 has no source-specific routes")
    }

    fn install(&self, site: &Site, task: &Task) -> Result<Box<dyn Installed>> {
        let towards = [0, 1].map(|tunnel| site.towards(task.prefixes.family, tunnel));
        let mut script = String::new();
        for (prefix, tunnel) in task.prefixes.iter() {
            writeln!(script, "-6 route add default from {prefix} {}", towards[tunnel as usize])?;
        }
        site.host.ip(&script)?;
        Ok(Box::new(InTheKernel))
    }

    fn change(&self, site: &Site, task: &Task, count: u32, back: bool) -> Result<()> {
        let towards = [0, 1].map(|tunnel| site.towards(task.prefixes.family, tunnel));
        let mut script = String::new();
        for number in 0..count {
            let (prefix, tunnel) = (task.prefixes.get(number), tunnel_after(number, count, back));
            writeln!(script, "-6 route replace default from {prefix} {}", towards[tunnel as usize])?;
        }
        site.host.ip(&script)
    }
}
