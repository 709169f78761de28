//! An nftables map from source to mark, and a rule for each mark.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use tunroute::policy::net::Family;

use super::{Contestant, InTheKernel, Installed, Task, rules, tunnel_after};
use crate::site::{INGRESS, Site};

/// One interval map, and one rule for each tunnel.
pub struct NftMap;

impl Contestant for NftMap {
    fn name(&self) -> &'static str {
        super::NFT
    }

    fn about(&self) -> &'static str {
        "an nftables interval map from source to mark, and an `ip rule fwmark` for each tunnel, for \
         forwarded packets"
    }

    fn forwards_only(&self) -> bool {
        true
    }

    fn install(&self, site: &Site, task: &Task) -> Result<Box<dyn Installed>> {
        let family = task.prefixes.family;
        let mut script = rules::tables(site, task)?;
        // Without `iif`, a vxlan tunnel would route its own packets, which inherit the mark, into itself.
        for tunnel in 0..2 {
            let (version, table) = (rules::version(family), rules::table(tunnel));
            writeln!(
                script,
                "{version} rule add iif {INGRESS} fwmark {} lookup {table} pref {}",
                tunnel + 1,
                1000 + tunnel
            )?;
        }
        site.host.ip(&script)?;
        nft(&mut site.host.command("nft"), &ruleset(task)?)?;
        Ok(Box::new(InTheKernel))
    }

    fn change(&self, site: &Site, task: &Task, count: u32, back: bool) -> Result<()> {
        let elements = |back| -> Result<String> {
            let mut elements = String::new();
            for number in 0..count {
                let mark = 1 + tunnel_after(number, count, back);
                write!(elements, "{} : {mark}, ", task.prefixes.get(number))?;
            }
            Ok(elements)
        };
        // One transaction.
        let script = format!(
            "delete element inet bench marks {{ {} }}\nadd element inet bench marks {{ {} }}\n",
            elements(!back)?,
            elements(back)?
        );
        nft(&mut site.host.command("nft"), &script)
    }
}

fn ruleset(task: &Task) -> Result<String> {
    let (kind, key) = match task.prefixes.family {
        Family::V4 => ("ipv4_addr", "ip saddr"),
        Family::V6 => ("ipv6_addr", "ip6 saddr"),
    };
    let mut script =
        format!("table inet bench {{\n map marks {{\n  type {kind} : mark\n  flags interval\n  elements = {{");
    for (prefix, tunnel) in task.prefixes.iter() {
        write!(script, "{prefix} : {}, ", tunnel + 1)?;
    }
    write!(
        script,
        "}}\n }}\n chain prerouting {{\n  type filter hook prerouting priority mangle\n  meta mark set {key} map \
         @marks\n }}\n}}\n"
    )?;
    Ok(script)
}

fn nft(command: &mut Command, script: &str) -> Result<()> {
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start nft: install nftables, or run `cargo xtask setup`")?;
    if let Some(mut stdin) = child.stdin.take() {
        // If nft stops early it closes the pipe; its message below says why.
        let _ = stdin.write_all(script.as_bytes());
    }
    let output = child.wait_with_output().context("cannot wait for nft")?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nft: {}", message.lines().next().unwrap_or("failed without a message"));
    Ok(())
}
