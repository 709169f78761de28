//! `ip` commands, from files or as `ip … show` prints what is there.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;

use super::{
    Route, RouteKind, Rule, Setup,
    ini::{is_ini, sections},
    network, wg_quick,
};
use crate::policy::net::{Family, PROTOCOL, TABLE_LOCAL, TABLE_MAIN};

/// The tables that the kernel and iproute2 name themselves.
const TABLES: [(&str, u32); 4] = [("local", TABLE_LOCAL), ("main", TABLE_MAIN), ("default", 253), ("unspec", 0)];
/// Where iproute2 looks for more.
const DIRECTORIES: [&str; 2] = ["/usr/share/iproute2", "/etc/iproute2"];
/// Words of a route that have one more word after them and do not change where its packets go.
const INDIFFERENT: [&str; 5] = ["scope", "pref", "error", "expires", "weight"];
/// Such words that stand alone.
const INDIFFERENT_ALONE: [&str; 4] = ["onlink", "linkdown", "dead", "pervasive"];

/// The names of routing tables on this host, by number.
#[must_use]
pub fn table_names() -> BTreeMap<u32, String> {
    let mut files: Vec<PathBuf> = DIRECTORIES.iter().map(|dir| Path::new(dir).join("rt_tables")).collect();
    for dir in DIRECTORIES {
        let entries = fs::read_dir(Path::new(dir).join("rt_tables.d")).into_iter().flatten().flatten();
        files
            .extend(entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "conf")));
    }
    let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    texts.flat_map(|text| text.lines().filter_map(table_name).collect::<Vec<_>>()).collect()
}

/// A line of `rt_tables`: `200 sixxs0`.
fn table_name(line: &str) -> Option<(u32, String)> {
    let mut words = line.split('#').next()?.split_whitespace();
    let number = words.next()?;
    let number = match number.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => number.parse(),
    };
    Some((number.ok()?, words.next()?.to_owned()))
}

/// A file that makes rules and routes.
#[derive(Clone, Copy, Debug)]
pub struct File<'t> {
    /// Its name, less directory and extension: with `wg-quick`, the device's.
    pub name: &'t str,
    /// What stands in it.
    pub text: &'t str,
}

/// Reads files in this order: shell scripts, and files for `wg-quick` and systemd-networkd, which begin with a section. The
/// host's own names of tables are in `names`.
#[must_use]
pub fn parse<'t>(files: impl IntoIterator<Item = File<'t>>, names: BTreeMap<u32, String>) -> Setup {
    let mut setup = Setup { names, ..Setup::default() };
    for File { name, text } in files {
        if !is_ini(text) {
            setup.script(text);
        } else if sections(text).iter().any(|section| section.name.eq_ignore_ascii_case("Interface")) {
            setup.script(&wg_quick::commands(text, name));
        } else {
            let (commands, notes) = network::commands(text);
            setup.notes.extend(notes);
            setup.script(&commands);
        }
    }
    // Rules without a priority are put before all that are there (`fib_default_rule_pref()` in
    // `net/core/fib_rules.c`).
    setup.rules.reverse();
    setup.rules.sort_by_key(|rule| rule.priority);
    setup
}

/// `echo "200 sixxs0" >> /etc/iproute2/rt_tables`
fn named_in(line: &str) -> Option<(u32, String)> {
    let (entry, file) = line.trim().strip_prefix("echo")?.split_once('>')?;
    let entry = entry.trim().trim_matches(['"', '\'']).replace("\\t", " ");
    file.contains("rt_tables").then(|| table_name(&entry)).flatten()
}

impl Setup {
    /// Of a shell script's commands, those with `ip rule add`, `ip route add` and the like, and `echo NUMBER NAME >>
    /// …/rt_tables`.
    fn script(&mut self, text: &str) {
        let text = text.replace("\\\n", " ");
        for line in text.lines() {
            if let Some(name) = named_in(line) {
                self.names.extend([name]);
                continue;
            }
            for command in line.split([';', '&', '|']) {
                let command: Vec<&str> = command.split_whitespace().take_while(|word| !word.starts_with('#')).collect();
                let Some(ip) = command.iter().position(|word| *word == "ip" || word.ends_with("/ip")) else { continue };
                self.command(&command[ip + 1..]);
            }
        }
    }

    /// An `ip` command, without its first word.
    fn command(&mut self, words: &[&str]) {
        let options = words.iter().take_while(|word| word.starts_with('-')).count();
        let (options, words) = words.split_at(options);
        let family = match () {
            () if options.iter().any(|word| matches!(*word, "-6" | "-inet6")) => Some(Family::V6),
            () if options.iter().any(|word| matches!(*word, "-4" | "-inet")) => Some(Family::V4),
            () => None,
        };
        let [object, verb, rest @ ..] = words else { return };
        if !matches!(*verb, "add" | "a" | "append" | "replace" | "change" | "prepend") {
            return;
        }
        let read = match *object {
            "rule" | "ru" => self.add_rule(family.unwrap_or(Family::V4), rest),
            "route" | "ro" | "r" => self.add_route(family, rest),
            _ => return,
        };
        if let Err(why) = read {
            self.notes.push(format!("{why}: ip {} {}", options.join(" "), words.join(" ")).replace("ip  ", "ip "));
        }
    }

    /// What stands after `ip rule add`.
    pub(super) fn add_rule(&mut self, family: Family, words: &[&str]) -> Result<(), String> {
        let (mut from, mut table, mut priority, mut plain) = (family.default_prefix(), None, None, true);
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            let mut value = || rest.next().copied().ok_or_else(|| format!("nothing after `{word}`"));
            match *word {
                "from" => from = prefix(value()?, Some(family))?,
                "lookup" | "table" => table = Some(self.table(value()?)?),
                "pref" | "priority" | "preference" | "order" => {
                    let text = value()?;
                    priority = Some(text.parse().map_err(|_| format!("`{text}` is no priority"))?);
                }
                "proto" | "protocol" => {
                    if is_ours(value()?) {
                        return Ok(());
                    }
                }
                _ => plain = false,
            }
        }
        let plain = table.filter(|_| plain).map(|table| (from, table));
        self.rules.push(Rule { family, priority, plain, text: words.join(" ") });
        Ok(())
    }

    /// What stands after `ip route add`.
    pub(super) fn add_route(&mut self, family: Option<Family>, words: &[&str]) -> Result<(), String> {
        let (mut kind, mut table, mut metric, mut extra) = (None, TABLE_MAIN, 0, Vec::new());
        let (mut dst, mut device, mut gateway) = (None, None, None);
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            let mut value = || rest.next().copied().ok_or_else(|| format!("nothing after `{word}`"));
            match *word {
                "unicast" => {}
                "throw" => kind = Some(RouteKind::Throw),
                "unreachable" => kind = Some(RouteKind::Unreachable),
                "blackhole" => kind = Some(RouteKind::Blackhole),
                "prohibit" => kind = Some(RouteKind::Prohibit),
                "local" | "broadcast" | "anycast" | "multicast" | "nexthop" | "nhid" => kind = Some(RouteKind::Other),
                "to" => dst = Some(value()?),
                "dev" => device = Some(value()?.to_owned()),
                "via" => {
                    let text = match value()? {
                        "inet" | "inet6" => value()?,
                        text => text,
                    };
                    gateway = Some(text.parse::<IpAddr>().map_err(|_| format!("`{text}` is no address"))?);
                }
                "table" => table = self.table(value()?)?,
                "metric" | "preference" | "priority" => {
                    let text = value()?;
                    metric = text.parse().map_err(|_| format!("`{text}` is no metric"))?;
                }
                "proto" | "protocol" => {
                    if is_ours(value()?) {
                        return Ok(());
                    }
                }
                word if INDIFFERENT.contains(&word) => {
                    value()?;
                }
                word if INDIFFERENT_ALONE.contains(&word) => {}
                word if dst.is_none() => dst = Some(word),
                word => extra.push(word.to_owned()),
            }
        }
        let family = family.or_else(|| gateway.as_ref().map(Family::of_addr));
        let dst = prefix(dst.ok_or("no destination")?, family)?;
        let kind = kind.unwrap_or(RouteKind::Unicast { device, gateway });
        self.routes.push(Route { table, dst, kind, metric, extra, text: words.join(" ") });
        Ok(())
    }

    fn table(&self, text: &str) -> Result<u32, String> {
        let named = |(_, name): &(&u32, &String)| name.as_str() == text;
        if let Ok(number) = text.parse() {
            return Ok(number);
        }
        let number = TABLES.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
        let number = number.or_else(|| self.names.iter().find(named).map(|(number, _)| *number));
        number.ok_or_else(|| format!("no table `{text}` in rt_tables"))
    }
}

/// Is it tunroute's own protocol, by number or by the name that its package gives it?
fn is_ours(protocol: &str) -> bool {
    protocol == "tunroute" || protocol.parse() == Ok(PROTOCOL)
}

/// A prefix, or an address for the prefix of that address alone. `all` and `default` are of the family of the command.
fn prefix(text: &str, family: Option<Family>) -> Result<IpNet, String> {
    if matches!(text, "all" | "any" | "default") {
        return Ok(family.unwrap_or(Family::V4).default_prefix());
    }
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.map(|net| net.trunc()).map_err(|_| format!("`{text}` is no prefix"))
}
