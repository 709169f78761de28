//! The rules and routes that are in force, as `ip` shows them. Its words are those of its commands, so that one reader
//! does for both.

use std::{io, process::Command};

use anyhow::{Context as _, bail};

use super::{Origin, Setup, iproute::Verb, tables::table_names};
use crate::policy::net::Family;

/// Asks `ip` for the rules, and for the routes of all tables.
///
/// # Errors
///
/// `ip` is not installed or fails.
pub fn live() -> anyhow::Result<Setup> {
    let mut setup = Setup { names: table_names(), ..Setup::default() };
    for (family, option) in Family::ALL.into_iter().zip(["-4", "-6"]) {
        for line in ip(&[option, "-oneline", "rule", "show"])?.lines() {
            let (priority, rule) = line.split_once(':').with_context(|| format!("`ip rule` printed `{line}`"))?;
            let rule = format!("pref {priority} {}", rule.trim());
            setup.shown(&format!("ip {option} rule add {rule}"), |setup, origin| {
                setup.add_rule(Some(family), &words(&rule), origin)
            });
        }
        for line in ip(&[option, "-oneline", "route", "show", "table", "all"])?.lines() {
            let route = line.replace('\\', " ");
            setup.shown(&format!("ip {option} route add {}", route.trim()), |setup, origin| {
                setup.add_route(Some(family), Verb::Append, &words(&route), origin)
            });
        }
    }
    Ok(setup)
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

impl Setup {
    fn shown(&mut self, command: &str, read: impl FnOnce(&mut Self, &Origin) -> Result<(), String>) {
        let origin = Origin { place: None, command: command.replace("ip -4 ", "ip ") };
        if let Err(why) = read(self, &origin) {
            self.notes.push(origin.note(&why));
        }
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    let output = match Command::new("ip").args(arguments).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("`ip` is not installed: install iproute2, or name a script with --from-script")
        }
        output => output.context("cannot start `ip`")?,
    };
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("`ip {}` fails: {}", arguments.join(" "), error.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
