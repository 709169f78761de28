//! The words of `ip`, with the abbreviations that it takes.
//!
//! The tables below follow `main()` in `ip/ip.c`, `iprule_modify()` in `ip/iprule.c` and `iproute_modify()` in
//! `ip/iproute.c` of iproute2, in their order: the first entry that a word is the beginning of is what `ip` takes it for.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::{Origin, Route, RouteKind, Rule, Setup, tables::number};
use crate::policy::net::{Family, PROTOCOL, TABLE_LOCAL, TABLE_MAIN};

/// How a word is compared with one that `ip` knows.
#[derive(Clone, Copy)]
enum Form {
    /// It must be the whole word (`strcmp()`).
    Whole(&'static str),
    /// Its beginning will do (`matches()`).
    Beginning(&'static str),
}

use Form::{Beginning, Whole};

impl Form {
    fn is(self, word: &str) -> bool {
        match self {
            Whole(known) => word == known,
            Beginning(known) => !word.is_empty() && known.starts_with(word),
        }
    }
}

fn find<T: Copy>(words: &[(Form, T)], word: &str) -> Option<T> {
    words.iter().find(|(form, _)| form.is(word)).map(|(_, meaning)| *meaning)
}

/// What an option before the object does.
#[derive(Clone, Copy)]
enum Choice {
    /// Has a value, and does not change which rules and routes are meant.
    Value,
    /// Stands alone, and does not change them either.
    Alone,
    /// Names the family.
    Family,
    /// Is the family.
    Is(Family),
    /// Names a file of commands.
    Batch,
    /// Names a network namespace.
    Namespace,
    /// Makes it another command.
    Other,
}

const OPTIONS: [(Form, Choice); 28] = [
    (Beginning("-loops"), Choice::Value),
    (Beginning("-family"), Choice::Family),
    (Whole("-4"), Choice::Is(Family::V4)),
    (Whole("-6"), Choice::Is(Family::V6)),
    // Links, MPLS and bridges.
    (Whole("-0"), Choice::Other),
    (Whole("-M"), Choice::Other),
    (Whole("-B"), Choice::Other),
    (Beginning("-human-readable"), Choice::Alone),
    (Beginning("-iec"), Choice::Alone),
    (Beginning("-statistics"), Choice::Alone),
    (Beginning("-details"), Choice::Alone),
    (Beginning("-resolve"), Choice::Alone),
    (Beginning("-oneline"), Choice::Alone),
    (Beginning("-timestamp"), Choice::Alone),
    (Beginning("-tshort"), Choice::Alone),
    (Beginning("-Version"), Choice::Other),
    (Beginning("-force"), Choice::Alone),
    (Beginning("-batch"), Choice::Batch),
    (Beginning("-brief"), Choice::Alone),
    (Beginning("-json"), Choice::Alone),
    (Beginning("-pretty"), Choice::Alone),
    (Beginning("-rcvbuf"), Choice::Value),
    (Beginning("-color"), Choice::Alone),
    (Beginning("-help"), Choice::Other),
    (Beginning("-netns"), Choice::Namespace),
    (Beginning("-Numeric"), Choice::Alone),
    (Beginning("-all"), Choice::Alone),
    (Whole("-echo"), Choice::Alone),
];

/// The objects, of those that a configuration is made of.
const OBJECTS: [(Form, Object); 2] = [(Beginning("route"), Object::Route), (Beginning("rule"), Object::Rule)];

/// What an `ip` command is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Object {
    /// `ip route`
    Route,
    /// `ip rule`
    Rule,
}

/// What is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    /// Made, if it is not there.
    Add,
    /// Made, behind or before one that is there.
    Append,
    /// Made, in place of one that is there.
    Replace,
    /// Removed.
    Delete,
    /// All that match are removed.
    Flush,
}

const RULE_VERBS: [(Form, Option<Verb>); 8] = [
    (Beginning("list"), None),
    (Beginning("lst"), None),
    (Beginning("show"), None),
    (Beginning("save"), None),
    (Beginning("restore"), None),
    (Beginning("add"), Some(Verb::Add)),
    (Beginning("delete"), Some(Verb::Delete)),
    (Beginning("flush"), Some(Verb::Flush)),
];

const ROUTE_VERBS: [(Form, Option<Verb>); 10] = [
    (Beginning("add"), Some(Verb::Add)),
    (Beginning("change"), Some(Verb::Replace)),
    (Whole("chg"), Some(Verb::Replace)),
    (Beginning("replace"), Some(Verb::Replace)),
    (Beginning("prepend"), Some(Verb::Append)),
    (Beginning("append"), Some(Verb::Append)),
    (Beginning("test"), None),
    (Beginning("delete"), Some(Verb::Delete)),
    (Beginning("list"), None),
    (Beginning("flush"), Some(Verb::Flush)),
];

/// What an `ip` command asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request<'w> {
    /// Rules or routes are changed.
    Change {
        /// The family that an option names.
        family: Option<Family>,
        /// Rules or routes.
        object: Object,
        /// What is done.
        verb: Verb,
        /// The words after it.
        words: &'w [String],
    },
    /// The commands of a file; `-` is standard input.
    Batch {
        /// The file.
        file: &'w str,
        /// The family that an option names.
        family: Option<Family>,
    },
    /// Anything else.
    Other,
}

/// Reads what stands after `ip`. `family` is what holds unless an option says otherwise.
pub(super) fn request(words: &[String], mut family: Option<Family>) -> Result<Request<'_>, String> {
    let mut rest = words.iter();
    let (mut batch, mut foreign) = (None, None);
    while let Some(word) = rest.as_slice().first().filter(|word| word.starts_with('-')) {
        rest.next();
        if word == "--" {
            break;
        }
        let option = if word.starts_with("--") { &word[1..] } else { word };
        let mut value = || rest.next().ok_or_else(|| format!("there is nothing after `{word}`"));
        match find(&OPTIONS, option).ok_or_else(|| format!("`ip` has no option `{word}`"))? {
            Choice::Alone => {}
            Choice::Value => {
                value()?;
            }
            Choice::Is(which) => family = Some(which),
            Choice::Family => {
                family = match value()?.as_str() {
                    "inet" => Some(Family::V4),
                    "inet6" => Some(Family::V6),
                    _ => return Ok(Request::Other),
                }
            }
            Choice::Batch => batch = Some(value()?),
            Choice::Namespace => foreign = Some(value()?),
            Choice::Other => return Ok(Request::Other),
        }
    }
    let of_namespace = |netns: &String| format!("it is for the network namespace `{netns}`");
    match (batch, foreign) {
        (Some(_), Some(netns)) => return Err(of_namespace(netns)),
        (Some(file), None) => return Ok(Request::Batch { file, family }),
        (None, _) => {}
    }
    let [object, verb, words @ ..] = rest.as_slice() else { return Ok(Request::Other) };
    let (object, verb) = match find(&OBJECTS, object) {
        Some(Object::Rule) => (Object::Rule, find(&RULE_VERBS, verb)),
        Some(Object::Route) => (Object::Route, find(&ROUTE_VERBS, verb)),
        None => return Ok(Request::Other),
    };
    match (verb.flatten(), foreign) {
        (None, _) => Ok(Request::Other),
        (Some(_), Some(netns)) => Err(of_namespace(netns)),
        (Some(verb), None) => Ok(Request::Change { family, object, verb, words }),
    }
}

/// What a word of a rule means.
#[derive(Clone, Copy)]
enum RuleWord {
    From,
    To,
    Table,
    Priority,
    Protocol,
    /// A condition or an action that policies do not have; has this number of words after it.
    Foreign(usize),
    /// `type`, which may stand before an action.
    Nothing,
}

const RULE_WORDS: [(Form, RuleWord); 40] = [
    (Whole("not"), RuleWord::Foreign(0)),
    (Whole("from"), RuleWord::From),
    (Whole("to"), RuleWord::To),
    (Beginning("preference"), RuleWord::Priority),
    (Beginning("order"), RuleWord::Priority),
    (Beginning("priority"), RuleWord::Priority),
    (Whole("tos"), RuleWord::Foreign(1)),
    (Beginning("dsfield"), RuleWord::Foreign(1)),
    (Whole("fwmark"), RuleWord::Foreign(1)),
    (Beginning("realms"), RuleWord::Foreign(1)),
    (Beginning("protocol"), RuleWord::Protocol),
    (Beginning("tun_id"), RuleWord::Foreign(1)),
    (Beginning("table"), RuleWord::Table),
    (Whole("lookup"), RuleWord::Table),
    (Beginning("suppress_prefixlength"), RuleWord::Foreign(1)),
    (Whole("sup_pl"), RuleWord::Foreign(1)),
    (Beginning("suppress_ifgroup"), RuleWord::Foreign(1)),
    (Whole("sup_group"), RuleWord::Foreign(1)),
    (Whole("dev"), RuleWord::Foreign(1)),
    (Whole("iif"), RuleWord::Foreign(1)),
    (Whole("oif"), RuleWord::Foreign(1)),
    (Whole("l3mdev"), RuleWord::Foreign(0)),
    (Whole("uidrange"), RuleWord::Foreign(1)),
    (Whole("nat"), RuleWord::Foreign(1)),
    (Beginning("map-to"), RuleWord::Foreign(1)),
    (Whole("ipproto"), RuleWord::Foreign(1)),
    (Whole("sport"), RuleWord::Foreign(1)),
    (Whole("dport"), RuleWord::Foreign(1)),
    (Whole("dscp"), RuleWord::Foreign(1)),
    (Whole("flowlabel"), RuleWord::Foreign(1)),
    (Whole("type"), RuleWord::Nothing),
    (Beginning("goto"), RuleWord::Foreign(1)),
    (Beginning("nop"), RuleWord::Foreign(0)),
    (Beginning("prohibit"), RuleWord::Foreign(0)),
    (Beginning("unreachable"), RuleWord::Foreign(0)),
    (Beginning("blackhole"), RuleWord::Foreign(0)),
    (Beginning("unicast"), RuleWord::Nothing),
    // As `ip rule show` prints it.
    (Whole("[detached]"), RuleWord::Nothing),
    (Whole("[unresolved]"), RuleWord::Nothing),
    (Whole("[l3mdev-table]"), RuleWord::Foreign(0)),
];

/// What a word of a route means.
#[derive(Clone, Copy)]
enum RouteWord {
    Via,
    Device,
    Table,
    Metric,
    Protocol,
    /// Does not change where packets go; has this number of words after it.
    Indifferent(usize),
    /// Something that a configuration has no place for, with a value.
    Extra,
    /// Makes it a route that policies do not have; has this number of words after it.
    Foreign(usize),
    /// As `Foreign`, and all words after it.
    ForeignRest,
    /// Names the table by a device.
    Vrf,
    /// The address of the host for packets that have none yet. It changes nothing here: no rule with a source leads such
    /// packets to a table.
    Source,
}

const ROUTE_WORDS: [(Form, RouteWord); 50] = [
    (Whole("src"), RouteWord::Source),
    (Whole("as"), RouteWord::Foreign(1)),
    (Whole("via"), RouteWord::Via),
    (Whole("from"), RouteWord::Foreign(1)),
    (Whole("tos"), RouteWord::Foreign(1)),
    (Beginning("dsfield"), RouteWord::Foreign(1)),
    (Whole("expires"), RouteWord::Indifferent(1)),
    (Beginning("metric"), RouteWord::Metric),
    (Beginning("priority"), RouteWord::Metric),
    (Whole("preference"), RouteWord::Metric),
    (Whole("scope"), RouteWord::Indifferent(1)),
    (Whole("mtu"), RouteWord::Extra),
    (Whole("hoplimit"), RouteWord::Extra),
    (Whole("advmss"), RouteWord::Extra),
    (Beginning("reordering"), RouteWord::Extra),
    (Whole("rtt"), RouteWord::Extra),
    (Whole("rto_min"), RouteWord::Extra),
    (Beginning("window"), RouteWord::Extra),
    (Beginning("cwnd"), RouteWord::Extra),
    (Beginning("initcwnd"), RouteWord::Extra),
    (Beginning("initrwnd"), RouteWord::Extra),
    (Beginning("features"), RouteWord::Extra),
    (Beginning("quickack"), RouteWord::Extra),
    (Beginning("congctl"), RouteWord::Extra),
    (Beginning("rttvar"), RouteWord::Extra),
    (Beginning("ssthresh"), RouteWord::Extra),
    (Beginning("realms"), RouteWord::Indifferent(1)),
    (Whole("onlink"), RouteWord::Indifferent(0)),
    (Whole("nexthop"), RouteWord::ForeignRest),
    (Whole("nhid"), RouteWord::Foreign(1)),
    (Beginning("protocol"), RouteWord::Protocol),
    (Beginning("table"), RouteWord::Table),
    (Beginning("vrf"), RouteWord::Vrf),
    (Whole("dev"), RouteWord::Device),
    (Whole("oif"), RouteWord::Device),
    (Beginning("pref"), RouteWord::Indifferent(1)),
    (Whole("encap"), RouteWord::ForeignRest),
    (Whole("ttl-propagate"), RouteWord::Extra),
    (Beginning("fastopen_no_cookie"), RouteWord::Extra),
    // As `ip route show` prints them.
    (Whole("weight"), RouteWord::Indifferent(1)),
    (Whole("error"), RouteWord::Indifferent(1)),
    (Whole("linkdown"), RouteWord::Indifferent(0)),
    (Whole("dead"), RouteWord::Indifferent(0)),
    (Whole("pervasive"), RouteWord::Indifferent(0)),
    (Whole("offload"), RouteWord::Indifferent(0)),
    (Whole("rt_offload"), RouteWord::Indifferent(0)),
    (Whole("trap"), RouteWord::Indifferent(0)),
    (Whole("rt_trap"), RouteWord::Indifferent(0)),
    (Whole("notify"), RouteWord::Indifferent(0)),
    (Whole("cache"), RouteWord::Indifferent(0)),
];

/// The types of routes (`rtnl_rtntype_a2n()` in `ip/rtm_map.c`).
const ROUTE_TYPES: [(Form, Option<Fate>); 12] = [
    (Whole("local"), None),
    (Whole("nat"), None),
    (Beginning("broadcast"), None),
    (Whole("brd"), None),
    (Beginning("anycast"), None),
    (Beginning("multicast"), None),
    (Beginning("prohibit"), Some(Fate::Prohibit)),
    (Beginning("unreachable"), Some(Fate::Unreachable)),
    (Beginning("blackhole"), Some(Fate::Blackhole)),
    (Beginning("xresolve"), None),
    (Beginning("unicast"), Some(Fate::Unicast)),
    (Whole("throw"), Some(Fate::Throw)),
];

#[derive(Clone, Copy)]
enum Fate {
    Unicast,
    Throw,
    Unreachable,
    Blackhole,
    Prohibit,
}

/// A word that must follow another.
fn after<'w>(rest: &mut std::slice::Iter<'w, String>, word: &str) -> Result<&'w str, String> {
    rest.next().map(String::as_str).ok_or_else(|| format!("there is nothing after `{word}`"))
}

impl Setup {
    /// Does what a request asks for. Nothing is removed unless `unconditional`: a script often removes in one branch what
    /// it adds in another.
    pub(super) fn apply(&mut self, request: &Request<'_>, unconditional: bool, origin: &Origin) -> Result<(), String> {
        let Request::Change { family, object, verb, words } = *request else { return Ok(()) };
        match (object, verb) {
            (_, Verb::Delete | Verb::Flush) if !unconditional => Ok(()),
            (Object::Rule, Verb::Delete) => self.delete_rule(family, words, origin),
            (Object::Route, Verb::Delete) => self.delete_route(family, words, origin),
            (Object::Route, Verb::Flush) => self.flush_routes(family, words),
            (Object::Rule, Verb::Flush) => {
                let family = family.unwrap_or(Family::V4);
                self.rules.retain(|rule| rule.family != family || rule.priority == Some(0));
                Ok(())
            }
            (Object::Rule, _) => self.add_rule(family, words, origin),
            (Object::Route, verb) => self.add_route(family, verb, words, origin),
        }
    }

    /// Reads a rule, as it stands after `ip rule add`; none if it is tunroute's own.
    fn rule(&self, family: Option<Family>, words: &[String], origin: &Origin) -> Result<Option<Rule>, String> {
        let family = family.unwrap_or(Family::V4);
        let (mut from, mut table, mut priority) = (family.default_prefix(), None, None);
        let (mut plain, mut is_ours) = (true, false);
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            match find(&RULE_WORDS, word).ok_or_else(|| format!("`ip rule` has no word `{word}`"))? {
                RuleWord::From => from = prefix(after(&mut rest, word)?, Some(family))?,
                RuleWord::To => plain &= prefix(after(&mut rest, word)?, Some(family))?.prefix_len() == 0,
                RuleWord::Table => match after(&mut rest, word)? {
                    "[l3mdev-table]" => plain = false,
                    text => table = Some(self.table(text)?),
                },
                RuleWord::Priority => {
                    let text = after(&mut rest, word)?;
                    priority = Some(number(text).ok_or_else(|| format!("`{text}` is not a priority"))?);
                }
                RuleWord::Protocol => is_ours = is_tunroute(after(&mut rest, word)?),
                RuleWord::Foreign(values) => {
                    plain = false;
                    for _ in 0..values {
                        after(&mut rest, word)?;
                    }
                }
                RuleWord::Nothing => {}
            }
        }
        let rule = Rule { family, priority, is_given: priority.is_some(), from, table, plain, origin: origin.clone() };
        Ok((!is_ours).then_some(rule))
    }

    /// What stands after `ip rule add`.
    pub(super) fn add_rule(&mut self, family: Option<Family>, words: &[String], origin: &Origin) -> Result<(), String> {
        let Some(mut rule) = self.rule(family, words, origin)? else { return Ok(()) };
        if rule.plain {
            rule.table = rule.table.or(Some(TABLE_MAIN));
        }
        let of_family = || self.rules.iter().filter(|other| other.family == rule.family);
        let same = |other: &Rule| rule.plain && other.plain && (other.from, other.table) == (rule.from, rule.table);
        if of_family().any(|other| same(other) && (!rule.is_given || other.priority == rule.priority)) {
            // The kernel refuses it (`rule_exists()` in `net/core/fib_rules.c`).
            return Ok(());
        }
        // A rule without a priority comes before all others but the first (`fib_default_rule_pref()`).
        let first = of_family().filter_map(|other| other.priority).filter(|priority| *priority > 0).min();
        rule.priority = rule.priority.or_else(|| first.unwrap_or(MAIN_PRIORITY).min(MAIN_PRIORITY).checked_sub(1));
        self.rules.push(rule);
        Ok(())
    }

    /// What stands after `ip rule del`.
    pub(super) fn delete_rule(
        &mut self,
        family: Option<Family>,
        words: &[String],
        origin: &Origin,
    ) -> Result<(), String> {
        let Some(rule) = self.rule(family, words, origin)? else { return Ok(()) };
        let matches = |other: &Rule| {
            (other.family, other.from, other.plain) == (rule.family, rule.from, rule.plain)
                && (rule.table.is_none() || rule.table == other.table)
                && (!rule.is_given || rule.priority == other.priority)
        };
        if let Some(found) = self.rules.iter().position(matches) {
            self.rules.remove(found);
        }
        Ok(())
    }

    /// Reads a route, as it stands after `ip route add`; none if it is tunroute's own.
    fn route(&self, mut family: Option<Family>, words: &[String], origin: &Origin) -> Result<Option<Route>, String> {
        let (mut fate, mut table, mut metric, mut extra) = (Some(Fate::Unicast), None, 0, Vec::new());
        let (mut dst, mut device, mut gateway, mut is_ours) = (None, None, None, false);
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            let Some(meaning) = find(&ROUTE_WORDS, word) else {
                let mut word = word.as_str();
                if word == "to" {
                    word = after(&mut rest, word)?;
                }
                if !word.starts_with(|c: char| c.is_ascii_digit())
                    && let Some(kind) = find(&ROUTE_TYPES, word)
                {
                    fate = kind;
                    word = after(&mut rest, word)?;
                }
                if let Some(earlier) = dst.replace(word) {
                    return Err(format!(
                        "`{word}` is a second destination after `{earlier}`, or not a word of `ip route`"
                    ));
                }
                let named = prefix(word, family)?;
                if !is_every(word) {
                    family.get_or_insert(Family::of(&named));
                }
                continue;
            };
            match meaning {
                RouteWord::Device => device = Some(after(&mut rest, word)?.to_owned()),
                RouteWord::Via => {
                    let text = match after(&mut rest, word)? {
                        named @ ("inet" | "inet6") => after(&mut rest, named)?,
                        text => text,
                    };
                    let via = address(text).ok_or_else(|| format!("`{text}` is not an address"))?;
                    family.get_or_insert(Family::of_addr(&via));
                    gateway = Some(via);
                }
                RouteWord::Table => table = Some(self.table(after(&mut rest, word)?)?),
                RouteWord::Metric => {
                    let text = after(&mut rest, word)?;
                    metric = number(text).ok_or_else(|| format!("`{text}` is not a metric"))?;
                }
                RouteWord::Protocol => is_ours = is_tunroute(after(&mut rest, word)?),
                RouteWord::Indifferent(values) => {
                    for _ in 0..values {
                        after(&mut rest, word)?;
                    }
                }
                RouteWord::Extra => {
                    let mut value = after(&mut rest, word)?;
                    if value == "lock" {
                        value = after(&mut rest, value)?;
                    }
                    extra.push(format!("{word} {value}"));
                }
                RouteWord::Foreign(values) => {
                    fate = None;
                    for _ in 0..values {
                        after(&mut rest, word)?;
                    }
                }
                RouteWord::ForeignRest => {
                    if rest.as_slice().iter().any(|word| word == "table") {
                        return Err(format!("`ip` takes no `table` after `{word}`"));
                    }
                    fate = None;
                    rest = [].iter();
                }
                RouteWord::Vrf => return Err("it is for a VRF, which policies do not know".to_owned()),
                RouteWord::Source => {
                    if let Some(source) = address(after(&mut rest, word)?) {
                        family.get_or_insert(Family::of_addr(&source));
                    }
                }
            }
        }
        let dst = prefix(dst.ok_or("the route has no destination")?, family)?;
        let local = fate.is_none() && words.iter().any(|word| word == "local" || word == "broadcast");
        let table = table.unwrap_or(if local { TABLE_LOCAL } else { TABLE_MAIN });
        let kind = match fate {
            None => RouteKind::Other,
            Some(Fate::Unicast) => RouteKind::Unicast { device, gateway },
            Some(Fate::Throw) => RouteKind::Throw,
            Some(Fate::Unreachable) => RouteKind::Unreachable,
            Some(Fate::Blackhole) => RouteKind::Blackhole,
            Some(Fate::Prohibit) => RouteKind::Prohibit,
        };
        Ok((!is_ours).then(|| Route { table, dst, kind, metric, extra, origin: origin.clone() }))
    }

    /// What stands after `ip route add` and the like.
    pub(super) fn add_route(
        &mut self,
        family: Option<Family>,
        verb: Verb,
        words: &[String],
        origin: &Origin,
    ) -> Result<(), String> {
        let Some(route) = self.route(family, words, origin)? else { return Ok(()) };
        let key = |route: &Route| (route.table, route.dst, route.metric);
        let earlier = self.routes.iter().position(|other| key(other) == key(&route));
        match (verb, earlier) {
            (Verb::Add, Some(earlier)) => {
                let same = self
                    .routes
                    .get(earlier)
                    .is_some_and(|other| (&other.kind, &other.extra) == (&route.kind, &route.extra));
                if !same {
                    let text = "table has a route to this destination already, with the same metric: `ip route add` adds no other";
                    return Err(format!("the {text}"));
                }
            }
            (Verb::Replace, Some(earlier)) => {
                self.routes.splice(earlier..=earlier, [route]);
            }
            _ => self.routes.push(route),
        }
        Ok(())
    }

    /// What stands after `ip route del`.
    pub(super) fn delete_route(
        &mut self,
        family: Option<Family>,
        words: &[String],
        origin: &Origin,
    ) -> Result<(), String> {
        let Some(route) = self.route(family, words, origin)? else { return Ok(()) };
        let matches = |other: &Route| {
            let way = match (&route.kind, &other.kind) {
                (RouteKind::Unicast { device, gateway }, RouteKind::Unicast { device: of, gateway: by }) => {
                    (device.is_none() || device == of) && (gateway.is_none() || gateway == by)
                }
                (RouteKind::Unicast { device: None, gateway: None }, _) => true,
                (kind, other) => kind == other,
            };
            (other.table, other.dst) == (route.table, route.dst)
                && (route.metric == 0 || route.metric == other.metric)
                && way
        };
        if let Some(found) = self.routes.iter().position(matches) {
            self.routes.remove(found);
        }
        Ok(())
    }

    /// What stands after `ip route flush`, if it names a table only.
    pub(super) fn flush_routes(&mut self, family: Option<Family>, words: &[String]) -> Result<(), String> {
        if let [word, table] = words
            && Beginning("table").is(word)
        {
            let (table, family) = (self.table(table)?, family.unwrap_or(Family::V4));
            self.routes.retain(|route| route.table != table || Family::of(&route.dst) != family);
        }
        Ok(())
    }
}

/// The priority of the kernel's rule for the main table.
const MAIN_PRIORITY: u32 = 32766;

/// Whether it is tunroute's own protocol, by number or by the name that its package gives it.
fn is_tunroute(protocol: &str) -> bool {
    protocol == "tunroute" || number(protocol) == Some(PROTOCOL.into())
}

/// An address, as `ip` takes it: `10.1` is 10.1.0.0.
fn address(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        return text.parse().ok();
    }
    let mut octets = [0; 4];
    let parts: Vec<&str> = text.split('.').collect();
    if parts.len() > octets.len() {
        return None;
    }
    for (octet, part) in octets.iter_mut().zip(parts) {
        *octet = u8::try_from(number(part)?).ok()?;
    }
    Some(Ipv4Addr::from(octets).into())
}

/// Whether a word stands for the prefix of length 0 of the command's family.
fn is_every(text: &str) -> bool {
    matches!(text, "all" | "any" | "default")
}

/// A prefix, or an address for the prefix of that address alone. `all` and `default` are of the family of the command.
fn prefix(text: &str, family: Option<Family>) -> Result<IpNet, String> {
    if is_every(text) {
        return Ok(family.unwrap_or(Family::V4).default_prefix());
    }
    let (start, length) = text.split_once('/').map_or((text, None), |(start, length)| (start, Some(length)));
    let net = address(start).and_then(|start| {
        let host = IpNet::from(start);
        let length = match length {
            None => host.prefix_len(),
            Some(length) => match (number(length), length.parse::<Ipv4Addr>()) {
                (Some(length), _) => u8::try_from(length).ok()?,
                (None, Ok(mask)) if start.is_ipv4() => ipnet::ipv4_mask_to_prefix(mask).ok()?,
                _ => return None,
            },
        };
        IpNet::new(start, length).ok()
    });
    let net = net.ok_or_else(|| format!("`{text}` is not a prefix"))?.trunc();
    match family {
        Some(family) if family != Family::of(&net) => {
            Err(format!("`{text}` is {}, and the command is for {family}", Family::of(&net)))
        }
        _ => Ok(net),
    }
}
