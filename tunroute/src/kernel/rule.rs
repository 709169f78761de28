//! Policy rules, to and from netlink (`net/core/fib_rules.c`).

use std::{collections::BTreeSet, fmt::Write, net::IpAddr};

use ipnet::IpNet;
use rtnetlink::{
    packet_core::{Emitable, Parseable},
    packet_route::{
        AddressFamily,
        route::RouteProtocol,
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleHeader, RuleMessage},
    },
};

use super::{
    address_family,
    socket::{Request, attributes},
};
use crate::policy::net::{
    self, Family, Foreign, Handle, ObservedRule, PROTOCOL, Rule, TABLE_LOCAL, TABLE_MAIN, TableName,
};

/// The length of `struct fib_rule_hdr`.
const HEADER: usize = 12;
/// The kernel writes "not set" as −1.
const UNSET: u32 = u32::MAX;

/// The payload of the message that makes a rule.
pub(super) fn message(rule: &Rule) -> Vec<u8> {
    let (table, action, attribute) = match rule.action {
        // Larger tables are named by the attribute alone.
        net::RuleAction::Lookup(table) => {
            (u8::try_from(table).unwrap_or(0), RuleAction::ToTable, Some(RuleAttribute::Table(table)))
        }
        net::RuleAction::Goto(target) | net::RuleAction::Leave(target) => {
            (0, RuleAction::Goto, Some(RuleAttribute::Goto(target)))
        }
        net::RuleAction::Nop => (0, RuleAction::Nop, None),
    };
    let mut message = RuleMessage::default();
    message.header = RuleHeader {
        family: address_family(rule.family()),
        src_len: rule.from.prefix_len(),
        table,
        action,
        flags: if rule.not { RuleFlags::Invert } else { RuleFlags::empty() },
        ..RuleHeader::default()
    };
    message.attributes =
        vec![RuleAttribute::Priority(rule.priority), RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL))];
    message.attributes.extend(attribute);
    if rule.from.prefix_len() > 0 {
        message.attributes.push(RuleAttribute::Source(rule.from.addr()));
    }
    if let Some(oif) = &rule.oif {
        message.attributes.push(RuleAttribute::Oifname(oif.clone()));
    }
    let mut payload = vec![0; message.buffer_len()];
    message.emit(&mut payload);
    payload
}

/// The request for all rules of a family.
pub(super) fn dump(family: Family) -> Request {
    let header = RuleHeader { family: address_family(family), ..RuleHeader::default() };
    let mut payload = vec![0; HEADER];
    header.emit(&mut payload);
    Request { kind: libc::RTM_GETRULE, flags: 0, payload }
}

/// Reads a rule; none if it is not of this family, or not a rule at all.
pub(super) fn parse(family: Family, payload: &[u8], handle: Handle) -> Option<ObservedRule> {
    let header = RuleHeader::parse(payload).ok().filter(|header| header.family == address_family(family))?;
    let mut seen = Seen::new(family, &header);
    for attribute in attributes(payload, HEADER) {
        match RuleAttribute::parse(&attribute) {
            Ok(attribute) => seen.take(attribute),
            Err(_) => seen.unknown(attribute.kind()),
        }
    }
    Some(seen.finish(&header, handle))
}

/// Reads a rule of either family if it is tunroute's.
pub(super) fn parse_ours(payload: &[u8]) -> Option<ObservedRule> {
    let rule = Family::ALL.into_iter().find_map(|family| parse(family, payload, Handle(0)))?;
    rule.ours.then_some(rule)
}

/// Tells the `goto` rules that leave the policies from shortcuts, by what they lead to, in all rules of one family.
pub(super) fn resolve(rules: &mut [ObservedRule]) {
    let ends: BTreeSet<u32> = rules
        .iter()
        .filter_map(|observed| observed.rule.as_ref())
        .filter(|rule| rule.is_end())
        .map(|rule| rule.priority)
        .collect();
    for rule in rules.iter_mut().filter_map(|observed| observed.rule.as_mut()) {
        if let net::RuleAction::Goto(target) = rule.action
            && ends.contains(&target)
        {
            rule.action = net::RuleAction::Leave(target);
        }
    }
}

/// What was found in a rule.
struct Seen {
    from: Option<IpNet>,
    to: Option<IpNet>,
    source_length: u8,
    destination_length: u8,
    priority: u32,
    table: u32,
    protocol: u8,
    goto: Option<u32>,
    mark: Option<u32>,
    mask: Option<u32>,
    l3mdev: bool,
    iif: Option<String>,
    oif: Option<String>,
    /// The other selectors, in `ip rule` syntax.
    selectors: String,
    /// What follows the action, in `ip rule` syntax.
    suffix: String,
    /// Has nothing but a source prefix, an output device, a priority, a protocol and an action that tunroute writes.
    plain: bool,
}

impl Seen {
    fn new(family: Family, header: &RuleHeader) -> Self {
        // Until an attribute says otherwise: `from all`.
        let mut seen = Self {
            from: (header.src_len == 0).then(|| family.default_prefix()),
            to: None,
            source_length: header.src_len,
            destination_length: header.dst_len,
            priority: 0,
            table: u32::from(header.table),
            protocol: 0,
            goto: None,
            mark: None,
            mask: None,
            l3mdev: false,
            iif: None,
            oif: None,
            selectors: String::new(),
            suffix: String::new(),
            plain: header.dst_len == 0 && header.tos == 0,
        };
        if header.tos != 0 {
            seen.selector(format_args!("tos {:#04x}", header.tos));
        }
        seen
    }

    fn selector(&mut self, text: std::fmt::Arguments<'_>) {
        self.plain = false;
        // Writing to a string does not fail.
        let _ = write!(self.selectors, " {text}");
    }

    fn unknown(&mut self, kind: u16) {
        self.selector(format_args!("[attribute {kind}]"));
    }

    fn take(&mut self, attribute: RuleAttribute) {
        match attribute {
            RuleAttribute::Priority(priority) => self.priority = priority,
            RuleAttribute::Table(table) => self.table = table,
            RuleAttribute::Protocol(protocol) => self.protocol = protocol.into(),
            RuleAttribute::Source(address) => self.from = prefix(address, self.source_length),
            RuleAttribute::Destination(address) => {
                self.plain = false;
                self.to = prefix(address, self.destination_length);
            }
            RuleAttribute::SuppressPrefixLen(UNSET) | RuleAttribute::SuppressIfGroup(UNSET) => {}
            RuleAttribute::SuppressPrefixLen(length) => self.suffix(format_args!("suppress_prefixlength {length}")),
            RuleAttribute::SuppressIfGroup(group) => self.suffix(format_args!("suppress_ifgroup {group}")),
            RuleAttribute::Realm(realm) => {
                self.suffix(format_args!("realms {}/{}", realm.source, realm.destination));
            }
            RuleAttribute::Goto(target) => self.goto = Some(target),
            RuleAttribute::FwMark(mark) => {
                self.plain = false;
                self.mark = Some(mark);
            }
            RuleAttribute::FwMask(mask) => {
                self.plain = false;
                self.mask = Some(mask);
            }
            RuleAttribute::Iifname(name) => {
                self.selector(format_args!("iif {name}"));
                self.iif = Some(name);
            }
            RuleAttribute::Oifname(name) => self.oif = Some(name),
            RuleAttribute::L3MDev(_) => {
                self.selector(format_args!("l3mdev"));
                self.l3mdev = true;
            }
            RuleAttribute::TunId(id) => self.selector(format_args!("tun_id {id}")),
            RuleAttribute::UidRange(range) => self.selector(format_args!("uidrange {}-{}", range.start, range.end)),
            RuleAttribute::IpProtocol(protocol) => self.selector(format_args!("ipproto {}", u8::from(protocol))),
            RuleAttribute::SourcePortRange(range) => self.selector(format_args!("sport {}-{}", range.start, range.end)),
            RuleAttribute::DestinationPortRange(range) => {
                self.selector(format_args!("dport {}-{}", range.start, range.end));
            }
            RuleAttribute::Other(other) => {
                let kind = rtnetlink::packet_core::Nla::kind(&other);
                self.unknown(kind);
            }
            _ => self.selector(format_args!("[unknown selector]")),
        }
    }

    fn suffix(&mut self, text: std::fmt::Arguments<'_>) {
        self.plain = false;
        let _ = write!(self.suffix, " {text}");
    }

    fn finish(self, header: &RuleHeader, handle: Handle) -> ObservedRule {
        let ours = self.protocol == PROTOCOL;
        let family = if header.family == AddressFamily::Inet6 { Family::V6 } else { Family::V4 };
        let inverted = header.flags.contains(RuleFlags::Invert);
        let action = match (header.action, self.goto) {
            (RuleAction::ToTable, None) if self.table != 0 => Some(net::RuleAction::Lookup(self.table)),
            (RuleAction::Goto, Some(target)) => Some(net::RuleAction::Goto(target)),
            (RuleAction::Nop, None) => Some(net::RuleAction::Nop),
            _ => None,
        };
        let rule = match (self.from, action) {
            (Some(from), Some(action)) if self.plain && ours => {
                Some(Rule { priority: self.priority, from, not: inverted, oif: self.oif.clone(), action })
            }
            _ => None,
        };
        let text = if rule.is_some() { String::new() } else { self.text(header) };
        let looks_up = |table| {
            self.plain
                && !inverted
                && header.src_len == 0
                && self.oif.is_none()
                && action == Some(net::RuleAction::Lookup(table))
        };
        let foreign = (!ours).then(|| {
            Box::new(Foreign {
                inverted,
                from: self.from.filter(|from| from.prefix_len() > 0),
                to: self.to,
                table: match action {
                    Some(net::RuleAction::Lookup(table)) => Some(table),
                    _ => None,
                },
                others: !self.selectors.is_empty() || self.mark.is_some() || self.mask.is_some() || self.oif.is_some(),
            })
        });
        ObservedRule {
            handle,
            foreign,
            family,
            priority: self.priority,
            ours,
            looks_up_local: looks_up(TABLE_LOCAL),
            looks_up_main: looks_up(TABLE_MAIN),
            l3mdev: self.l3mdev && !inverted,
            // `not iif eth0` matches everything but: it restricts nothing that can be relied on.
            iif: self.iif.filter(|_| !inverted),
            oif: self.oif.filter(|_| !inverted),
            rule,
            text,
        }
    }

    /// In `ip rule` syntax.
    fn text(&self, header: &RuleHeader) -> String {
        let mut text = String::new();
        if header.flags.contains(RuleFlags::Invert) {
            text.push_str("not ");
        }
        let _ = match self.from {
            Some(from) if from.prefix_len() > 0 => write!(text, "from {from}"),
            Some(_) => write!(text, "from all"),
            None => write!(text, "from [unreadable]"),
        };
        if let Some(to) = self.to {
            let _ = write!(text, " to {to}");
        }
        match (self.mark, self.mask) {
            (None, None) => {}
            (mark, None | Some(u32::MAX)) => {
                let _ = write!(text, " fwmark {:#x}", mark.unwrap_or(0));
            }
            (mark, Some(mask)) => {
                let _ = write!(text, " fwmark {:#x}/{mask:#x}", mark.unwrap_or(0));
            }
        }
        text.push_str(&self.selectors);
        if let Some(oif) = &self.oif {
            let _ = write!(text, " oif {oif}");
        }
        let _ = match header.action {
            RuleAction::ToTable => match self.table {
                // The table of the device's VRF.
                0 => Ok(()),
                table => write!(text, " lookup {}", TableName(table)),
            },
            RuleAction::Goto => write!(text, " goto {}", self.goto.unwrap_or(0)),
            RuleAction::Nop => write!(text, " nop"),
            RuleAction::Blackhole => write!(text, " blackhole"),
            RuleAction::Unreachable => write!(text, " unreachable"),
            RuleAction::Prohibit => write!(text, " prohibit"),
            action => write!(text, " [action {}]", u8::from(action)),
        };
        text.push_str(&self.suffix);
        let _ = write!(text, " pref {}", self.priority);
        // Those that the kernel and iproute2 write by themselves say nothing.
        if !matches!(self.protocol, libc::RTPROT_UNSPEC | libc::RTPROT_KERNEL | libc::RTPROT_BOOT) {
            let _ = write!(text, " protocol {}", self.protocol);
        }
        text
    }
}

/// The prefix, with host bits cleared; none if the length does not fit.
fn prefix(address: IpAddr, length: u8) -> Option<IpNet> {
    IpNet::new(address, length).ok().map(|net| net.trunc())
}
