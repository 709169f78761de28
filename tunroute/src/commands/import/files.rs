//! The kinds of files that make rules and routes, and those that are not read.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use ipnet::IpNet;

use super::{
    Origin, RouteKind, Setup, ifupdown,
    ini::{is_ini, lines, sections},
    iproute::request,
    network,
    script::{ReadFile, Script, batch_lines},
    tables::{is_names, names},
    wg_quick,
};
use crate::policy::net::{Family, TABLE_MAIN};

/// A file that makes rules and routes.
#[derive(Clone, Copy, Debug)]
pub struct File<'t> {
    /// Its path. The name tells what kind of file it is; with `wg-quick`, it is the device's.
    pub path: &'t str,
    /// Its contents.
    pub text: &'t str,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A shell script.
    Script,
    /// Commands for `ip -batch`.
    Batch,
    /// Names of tables.
    Names,
    /// For `wg-quick`.
    WgQuick,
    /// For systemd-networkd.
    Networkd,
    /// A unit of systemd that runs commands.
    Unit,
    /// For ifupdown.
    Ifupdown,
    /// RHEL's `rule-DEV` or `rule6-DEV`.
    RhelRules(Option<Family>),
    /// RHEL's `route-DEV` or `route6-DEV`.
    RhelRoutes(Option<Family>),
    /// Not read; whose it is, and what to do.
    Foreign(&'static str),
}

const LIVE: &str = "load it, and run `tunroute import` without --from-script, which reads what is in force";
const NETPLAN: &str = "a netplan file is not read: run `netplan generate` and import the files that it writes to \
                       /run/systemd/network, or";
const NETWORK_MANAGER: &str = "a NetworkManager profile is not read:";
const IFCFG: &str = "an ifcfg file is not read (the route- and rule- files beside it are):";
const OPENWRT: &str = "an OpenWrt configuration is not read:";
const UNKNOWN: &str = "a file with these sections is not read:";

/// Reads files in this order. `names` has the host's own names of tables; `read` reads other files that a script names.
#[must_use]
pub fn parse<'t>(files: &[File<'t>], names: BTreeMap<u32, String>, read: ReadFile<'_>) -> Setup {
    let mut setup = Setup { names, ..Setup::default() };
    // Names count from the beginning, wherever their file stands.
    for file in files.iter().filter(|file| kind(**file) == Kind::Names) {
        setup.names.extend(self::names(file.text));
    }
    for file in files {
        let before = (setup.rules.len(), setup.routes.len(), setup.notes.len(), setup.names.len());
        let mut reader = Reader { setup: &mut setup, file: file.path, read };
        reader.file(*file, kind(*file));
        let after = (setup.rules.len(), setup.routes.len(), setup.notes.len(), setup.names.len());
        if before == after && kind(*file) != Kind::Names {
            setup.notes.push(format!("{}: no command in it makes a rule or a route", file.path));
        }
    }
    setup.rules.sort_by_key(|rule| rule.priority);
    setup.find_devices();
    // A function that is called twice is noted once.
    let mut seen = BTreeSet::new();
    setup.notes.retain(|note| seen.insert(note.clone()));
    setup
}

impl Setup {
    /// Routes with a gateway alone get the device by which the gateway is on the link, in their own table or the main one
    /// (`fib_check_nh_v4_gw()` in `net/ipv4/fib_semantics.c`).
    fn find_devices(&mut self) {
        let mut on_link: Vec<(u32, IpNet, String)> = Vec::new();
        for route in &self.routes {
            if let RouteKind::Unicast { device: Some(device), gateway: None } = &route.kind {
                on_link.push((route.table, route.dst, device.clone()));
            }
        }
        for route in &mut self.routes {
            let RouteKind::Unicast { device: device @ None, gateway: Some(gateway) } = &mut route.kind else {
                continue;
            };
            let contains = |(table, net, _): &&(u32, IpNet, String)| {
                [route.table, TABLE_MAIN].contains(table) && net.prefix_len() > 0 && net.contains(&*gateway)
            };
            let longest = on_link.iter().filter(contains).max_by_key(|(_, net, _)| net.prefix_len());
            *device = longest.map(|(_, _, device)| device.clone());
        }
    }
}

fn kind(file: File<'_>) -> Kind {
    let path = Path::new(file.path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    let lines = lines(file.text);
    let first_words = || lines.iter().filter_map(|(_, line)| line.split_whitespace().next());
    let is_script = file.text.starts_with("#!");
    if name == "rt_tables" || file.path.contains("rt_tables.d/") || is_names(file.text) {
        return Kind::Names;
    }
    if matches!(&*extension, "yaml" | "yml") || first_words().next() == Some("network:") {
        return Kind::Foreign(NETPLAN);
    }
    if is_ini(file.text) {
        let sections = sections(file.text);
        let has = |names: &[&str]| {
            sections.iter().any(|section| names.iter().any(|name| section.name.eq_ignore_ascii_case(name)))
        };
        return match () {
            () if extension == "nmconnection" || has(&["connection"]) => Kind::Foreign(NETWORK_MANAGER),
            () if has(&["Interface"]) => Kind::WgQuick,
            () if has(&["Match", "Network", "Address", "Route", "RoutingPolicyRule"]) => Kind::Networkd,
            () if has(&["Unit", "Service"]) => Kind::Unit,
            () => Kind::Foreign(UNKNOWN),
        };
    }
    if ifupdown::is_interfaces(file.text) {
        return Kind::Ifupdown;
    }
    if first_words().all(|word| matches!(word, "config" | "option" | "list" | "package")) && !lines.is_empty() {
        return Kind::Foreign(OPENWRT);
    }
    if name.starts_with("ifcfg-") {
        return Kind::Foreign(IFCFG);
    }
    let runs_ip =
        || lines.iter().any(|(_, line)| line.split_whitespace().any(|word| word == "ip" || word.ends_with("/ip")));
    for (start, kind) in [
        ("rule-", Kind::RhelRules(None)),
        ("rule6-", Kind::RhelRules(Some(Family::V6))),
        ("route-", Kind::RhelRoutes(None)),
        ("route6-", Kind::RhelRoutes(Some(Family::V6))),
    ] {
        if name.starts_with(start) && !is_script && !runs_ip() {
            return kind;
        }
    }
    let commands = batch_lines(file.text, 1);
    let is_change = |(_, words): &(usize, Vec<String>)| {
        !matches!(request(words, None), Ok(super::iproute::Request::Other) | Err(_))
    };
    let objects = ["route", "rule", "address", "link", "neighbour", "tunnel", "tuntap", "addrlabel"];
    let is_object = |(_, words): &(usize, Vec<String>)| {
        words
            .first()
            .is_some_and(|word| objects.iter().any(|object| object.starts_with(word.as_str())) || word.starts_with('-'))
    };
    let net_tools =
        |(_, words): &(usize, Vec<String>)| words.iter().any(|word| matches!(word.as_str(), "gw" | "-net" | "-host"));
    if !is_script && commands.iter().all(is_object) && commands.iter().any(is_change) && !commands.iter().any(net_tools)
    {
        return Kind::Batch;
    }
    Kind::Script
}

/// Reads files into a setup.
pub(super) struct Reader<'r> {
    setup: &'r mut Setup,
    /// The path of the file that is being read.
    file: &'r str,
    read: ReadFile<'r>,
}

impl Reader<'_> {
    fn file(&mut self, file: File<'_>, kind: Kind) {
        let text = file.text;
        let name = Path::new(file.path).file_stem().unwrap_or_default().to_string_lossy();
        match kind {
            Kind::Names => {}
            Kind::Script => self.script(text, 1, &[]),
            Kind::Batch => Script::new(self.setup, self.file, self.read).batch(text, 1, None),
            Kind::WgQuick => wg_quick::read(text, &name, self),
            Kind::Networkd => network::read(text, self),
            Kind::Ifupdown => ifupdown::read(text, self),
            Kind::Unit => self.unit(text),
            Kind::RhelRules(family) => self.arguments(text, "rule", family),
            Kind::RhelRoutes(family) => {
                let device = name.split_once('-').map_or("", |(_, device)| device);
                if text.contains("ADDRESS0") {
                    self.numbered(text, device)
                } else {
                    self.arguments(text, "route", family)
                }
            }
            Kind::Foreign(whose) => self.setup.notes.push(format!("{}: {whose} {LIVE}", file.path)),
        }
    }

    /// The commands that a unit starts, with the prefixes of systemd.service(5).
    fn unit(&mut self, text: &str) {
        let sections = sections(text);
        let keys = ["ExecStartPre", "ExecStart", "ExecStartPost"];
        for found in
            sections.iter().flat_map(|section| section.all()).filter(|found| keys.contains(&found.key.as_str()))
        {
            self.script(found.value.trim_start_matches(['@', '-', ':', '+', '!']), found.line, &[]);
        }
    }

    /// Lines that have what stands after `ip rule add` or `ip route add`.
    fn arguments(&mut self, text: &str, object: &str, family: Option<Family>) {
        let option = if family == Some(Family::V6) { "-6 " } else { "" };
        for (line, words) in batch_lines(text, 1) {
            // A line may have the family of its own.
            let at = words.iter().take_while(|word| word.starts_with('-')).count();
            let (own, words) = words.split_at(at);
            self.ip(&format!("{option}{} {object} add {}", own.join(" "), words.join(" ")), line);
        }
    }

    /// `ADDRESS0=`, `NETMASK0=` and `GATEWAY0=` of a `route-DEV` file.
    fn numbered(&mut self, text: &str, device: &str) {
        let lines = lines(text);
        let assignments: Vec<(usize, &str, &str)> = lines
            .iter()
            .filter_map(|(line, text)| text.split_once('=').map(|(key, value)| (*line, key, value)))
            .collect();
        for (line, key, address) in &assignments {
            let Some(number) = key.strip_prefix("ADDRESS") else { continue };
            let value = |name: &str| {
                let found = assignments.iter().find(|(_, key, _)| key.strip_prefix(name) == Some(number));
                found.map(|(_, _, value)| value.trim_matches(['"', '\'']))
            };
            let mask = value("NETMASK").map_or(String::new(), |mask| format!("/{mask}"));
            let via = value("GATEWAY").map_or(String::new(), |gateway| format!(" via {gateway}"));
            self.ip(&format!("route add {}{mask}{via} dev {device}", address.trim_matches(['"', '\''])), *line);
        }
    }

    /// Follows a script that begins on this line, with these variables set.
    pub(super) fn script(&mut self, text: &str, line: usize, variables: &[(String, &str)]) {
        let mut script = Script::new(self.setup, self.file, self.read);
        variables.iter().for_each(|(name, value)| script.set(name, value));
        script.run(text, line);
    }

    /// An `ip` command, without its first word and without quoting.
    pub(super) fn ip(&mut self, command: &str, line: usize) {
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        let origin = self.origin(line, &format!("ip {}", words.join(" ")));
        let applied = request(&words, None).and_then(|request| self.setup.apply(&request, true, &origin));
        if let Err(why) = applied {
            self.setup.notes.push(origin.note(&why));
        }
    }

    /// The main table's route that comes with an address of a device.
    pub(super) fn on_link(&mut self, address: &str, device: &str, line: usize) {
        if let Some((_, length)) = address.split_once('/')
            && !matches!(length, "32" | "128")
        {
            self.main(&format!("route append {address} dev {device}"), line);
        }
    }

    /// The main table's default route by a device.
    pub(super) fn gateway(&mut self, gateway: &str, device: &str, line: usize) {
        self.main(&format!("route append default via {gateway} dev {device}"), line);
    }

    /// A command that only tells which devices are uplinks or have networks: no policy depends on it, and what cannot be
    /// read is left out.
    fn main(&mut self, command: &str, line: usize) {
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        let origin = self.origin(line, command);
        let _unread = request(&words, None).and_then(|request| self.setup.apply(&request, true, &origin));
    }

    fn origin(&self, line: usize, command: &str) -> Origin {
        Origin { place: Some((self.file.to_owned(), line)), command: command.to_owned() }
    }

    /// Says why something is not read.
    pub(super) fn note(&mut self, why: &str, line: usize, text: &str) {
        let origin = self.origin(line, text);
        self.setup.notes.push(origin.note(why));
    }
}
