//! What is there now, as `ip` shows it. Its words are those of its commands, so that one reader does for both.

use std::{io, process::Command};

use anyhow::{Context as _, bail};

use super::{Setup, script::table_names};
use crate::policy::net::Family;

/// Asks `ip` for the rules, and for the routes of all tables.
///
/// # Errors
///
/// `ip` is not installed, or cannot tell.
pub fn live() -> anyhow::Result<Setup> {
    let mut setup = Setup { names: table_names(), ..Setup::default() };
    for (family, option) in Family::ALL.into_iter().zip(["-4", "-6"]) {
        for line in ip(&[option, "-oneline", "rule", "show"])?.lines() {
            let (priority, rule) = line.split_once(':').with_context(|| format!("`ip rule` printed `{line}`"))?;
            let rule = rule.replace("[detached]", "");
            let words: Vec<&str> = ["pref", priority].into_iter().chain(rule.split_whitespace()).collect();
            setup.note(line, |setup| setup.add_rule(family, &words));
        }
        for line in ip(&[option, "-oneline", "route", "show", "table", "all"])?.lines() {
            let route = line.replace('\\', " ");
            let words: Vec<&str> = route.split_whitespace().collect();
            setup.note(line, |setup| setup.add_route(Some(family), &words));
        }
    }
    Ok(setup)
}

impl Setup {
    fn note(&mut self, line: &str, read: impl FnOnce(&mut Self) -> Result<(), String>) {
        if let Err(why) = read(self) {
            self.notes.push(format!("{why}: {}", line.trim()));
        }
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    let output = match Command::new("ip").args(arguments).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("there is no `ip` here: install iproute2, or name a script with --from-script")
        }
        output => output.context("cannot start `ip`")?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`ip {}` says: {}", arguments.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
