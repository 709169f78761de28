//! What a plan could not do, and which of its removals have to wait for that.
//!
//! A removal waits only for what replaces it: one lasting problem does not hold back the others.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::{
    policy::compile::Desired,
    policy::fast::{FastOp, Hook, Open, Part},
    policy::net::{Family, KernelOp, Route, Rule, RuleAction},
};

/// The operations of a plan that failed or were put off, by what they are about.
#[derive(Debug, Default)]
pub struct Undone<'a> {
    desired: Option<&'a Desired>,
    /// Families for which anything is undone that decides about packets.
    families: BTreeSet<Family>,
    /// Tables whose routes are not yet as desired, or that an obsolete rule still leads to.
    tables: BTreeSet<(Family, u32)>,
    /// Sources whose rules or map entries are not yet as desired, or lead to such a table.
    sources: BTreeSet<IpNet>,
    /// The same of rules for sockets that are bound to a device.
    bound: BTreeSet<(Family, String)>,
    /// Families whose list of rules is not yet as desired.
    lists: BTreeSet<Family>,
    /// Sources whose rules are missing.
    missing: BTreeSet<IpNet>,
    /// Families without the rule for the local table or the end of all rules, which the policies' rules rely on.
    baseless: BTreeSet<Family>,
    /// Programs that are not attached.
    attachments: BTreeSet<(Part, Hook)>,
    /// Families of which map entries may lead to slots that are to go.
    entries: BTreeSet<Family>,
    /// The programs cannot do all that they are to.
    programs: bool,
    put_off: Vec<String>,
}

impl<'a> Undone<'a> {
    /// Nothing yet, of a plan that leads to this state.
    #[must_use]
    pub fn new(desired: &'a Desired) -> Self {
        Self { desired: Some(desired), ..Self::default() }
    }

    /// The changes that were put off, as commands.
    #[must_use]
    pub fn put_off(self) -> Vec<String> {
        self.put_off
    }

    /// Are there all rules?
    #[must_use]
    pub fn rules_in_place(&self) -> bool {
        self.missing.is_empty() && self.baseless.is_empty()
    }

    /// The families of these that may be decided by the programs: those for which all is done.
    #[must_use]
    pub fn allow(&self, open: Open) -> Open {
        let done = |family| !self.families.contains(&family);
        open.and(Open { v4: done(Family::V4), v6: done(Family::V6) })
    }

    /// Notes that a change of rules or routes was not made.
    pub fn fail(&mut self, operation: &KernelOp) {
        if matches!(operation, KernelOp::AddRule(rule) if rule.is_shortcut()) {
            // Without it the same is decided.
            return;
        }
        self.families.insert(operation.family());
        match operation {
            KernelOp::AddRule(rule) => {
                if rule.is_local() || rule.is_end() {
                    self.baseless.insert(rule.family());
                } else if rule.oif.is_none() && !matches!(rule.action, RuleAction::Goto(_) | RuleAction::Nop) {
                    self.missing.insert(rule.from);
                }
                self.note_rule(rule);
            }
            KernelOp::DelRule { family, rule, .. } => {
                self.lists.insert(*family);
                if let Some(rule) = rule {
                    self.note_rule(rule);
                    self.tables.extend(rule.table().map(|table| (*family, table)));
                }
            }
            KernelOp::AddRoute(route) | KernelOp::ReplaceRoute(route) => self.note_route(route),
            KernelOp::DelRoute { .. } => {}
        }
    }

    fn note_rule(&mut self, rule: &Rule) {
        self.lists.insert(rule.family());
        match (&rule.oif, rule.action) {
            (Some(device), _) => drop(self.bound.insert((rule.family(), device.clone()))),
            (None, RuleAction::Lookup(_) | RuleAction::Leave(_)) => drop(self.sources.insert(rule.from)),
            // These decide nothing.
            (None, RuleAction::Goto(_) | RuleAction::Nop) => {}
        }
    }

    fn note_route(&mut self, route: &Route) {
        let (family, table) = (Family::of(&route.dst), route.table);
        if !self.tables.insert((family, table)) {
            return;
        }
        let rules = self.desired.iter().flat_map(|desired| &desired.rules);
        for rule in rules.filter(|rule| rule.family() == family && rule.table() == Some(table)) {
            match &rule.oif {
                Some(device) => drop(self.bound.insert((family, device.clone()))),
                None => drop(self.sources.insert(rule.from)),
            }
        }
    }

    /// Notes that a change of the fast path was not made.
    pub fn fail_fast(&mut self, operation: &FastOp) {
        match operation {
            FastOp::WriteSlot(..) | FastOp::WriteExit(..) => {
                Family::ALL.into_iter().for_each(|family| self.note_entry(family));
            }
            FastOp::PutSource(prefix, _) | FastOp::RemoveSource(prefix) => {
                self.sources.insert(*prefix);
                self.note_entry(Family::of(prefix));
            }
            FastOp::AddExemption(exemption) => self.note_entry(Family::of(&exemption.prefix)),
            FastOp::Attach(attachment) => {
                self.attachments.insert((attachment.part, attachment.hook));
                if attachment.part == Part::Decide {
                    self.programs = true;
                    self.families.extend(Family::ALL);
                }
            }
            FastOp::SetOpen(_) | FastOp::SetUnmatched(_) | FastOp::SetShadow(_) => self.families.extend(Family::ALL),
            // The kernel, or the programs behind XDP, do what is right without these.
            FastOp::SetClamp(..)
            | FastOp::SetStation(..)
            | FastOp::RemoveExemption(_)
            | FastOp::ClearSlot(_)
            | FastOp::ClearExit(_)
            | FastOp::Detach(_)
            | FastOp::RemoveClamp(_)
            | FastOp::RemoveStation(_) => {}
        }
    }

    fn note_entry(&mut self, family: Family) {
        self.programs = true;
        self.families.insert(family);
        self.entries.insert(family);
    }

    /// Notes that the map of prefixes has no room: its entries stay as they are until other programs take the place of
    /// these, which go on.
    pub fn fail_entries(&mut self) {
        self.programs = true;
        self.entries.extend(Family::ALL);
    }

    /// Must a change of rules or routes wait? It is undone then, too.
    pub fn puts_off(&mut self, operation: &KernelOp) -> bool {
        let waits = match operation {
            // Correct only if the rules that it skips are as desired.
            KernelOp::AddRule(rule) if rule.is_shortcut() => return self.lists.contains(&rule.family()),
            // It might be asked before the old rule of a longer prefix whose new one is missing.
            KernelOp::AddRule(rule) => {
                rule.oif.is_none() && (inside(&self.missing, &rule.from) || self.baseless.contains(&rule.family()))
            }
            KernelOp::AddRoute(_) | KernelOp::ReplaceRoute(_) => false,
            KernelOp::DelRule { family, rule: None, .. } => self.families.contains(family),
            KernelOp::DelRule { family, rule: Some(rule), .. } => match (&rule.oif, rule.action) {
                (Some(device), _) => self.bound.contains(&(*family, device.clone())),
                (None, _) if rule.is_local() || rule.is_end() => self.lists.contains(family),
                (None, RuleAction::Lookup(_) | RuleAction::Leave(_)) => {
                    self.overlaps(&rule.from) || self.replaces_rules(*family)
                }
                (None, RuleAction::Goto(_) | RuleAction::Nop) => false,
            },
            KernelOp::DelRoute { family, table: None, .. } => self.families.contains(family),
            KernelOp::DelRoute { family, table: Some(table), .. } => self.tables.contains(&(*family, *table)),
        };
        if waits {
            self.fail(operation);
            self.put_off.push(operation.to_string());
        }
        waits
    }

    /// Must a change of the fast path wait? It is undone then, too.
    pub fn puts_off_fast(&mut self, operation: &FastOp) -> bool {
        let waits = match operation {
            FastOp::RemoveSource(prefix) => self.overlaps(prefix),
            FastOp::RemoveExemption(exemption) => self.entries.contains(&Family::of(&exemption.prefix)),
            FastOp::ClearSlot(_) | FastOp::ClearExit(_) => !self.entries.is_empty(),
            FastOp::Detach(attachment) => {
                self.attachments.contains(&(attachment.part, attachment.hook))
                    || attachment.part == Part::Decide && !self.rules_in_place()
            }
            _ => false,
        };
        if waits {
            self.fail_fast(operation);
            self.put_off.push(operation.to_string());
        }
        waits
    }

    /// Do programs take the place of all rules, and are not all of them there?
    fn replaces_rules(&self, family: Family) -> bool {
        let rules = self.desired.iter().flat_map(|desired| &desired.rules);
        let programs = self.desired.is_some_and(|desired| desired.fast.is_some());
        (self.programs || self.families.contains(&family)) && programs && !rules.clone().any(|rule| rule.oif.is_none())
    }

    /// Is anything undone of sources that are inside this prefix, or around it?
    fn overlaps(&self, prefix: &IpNet) -> bool {
        let around = |length| IpNet::new(prefix.network(), length).is_ok_and(|net| self.sources.contains(&net.trunc()));
        inside(&self.sources, prefix) || (0..prefix.prefix_len()).any(around)
    }
}

/// Has the set this prefix, or one inside it?
fn inside(set: &BTreeSet<IpNet>, prefix: &IpNet) -> bool {
    set.range(*prefix..).next().is_some_and(|next| prefix.contains(next))
}

#[cfg(test)]
mod tests {
    use tunroute_common::maps::{Exempt, Source};

    use super::*;
    use crate::policy::{
        fast::{Attachment, Exemption},
        net::{Handle, RouteKind},
    };

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    fn rule(from: &str, table: u32) -> Rule {
        Rule::new(20000, net(from), RuleAction::Lookup(table))
    }

    fn del_rule(rule: Rule) -> KernelOp {
        KernelOp::DelRule { handle: Handle(0), family: rule.family(), text: rule.to_string(), rule: Some(rule) }
    }

    fn del_route(family: Family, table: u32) -> KernelOp {
        KernelOp::DelRoute { handle: Handle(0), family, table: Some(table), text: String::new() }
    }

    fn add_route(dst: &str, table: u32) -> KernelOp {
        KernelOp::AddRoute(Route { table, dst: net(dst), metric: 0, kind: RouteKind::Throw })
    }

    fn attachment(hook: Hook) -> Attachment {
        Attachment { part: Part::Decide, hook, ifindex: 2, device: "net0".into(), ethernet: true }
    }

    const NEW: Source = Source { slot: 1, arrives_by: Source::ANY_DEVICE };

    /// What fails, and of the removals that follow, which wait for it and which do not.
    #[test]
    fn a_removal_waits_for_what_replaces_it_and_for_nothing_else() {
        let rules = [rule("2001:db8:1::/48", 101), rule("2001:db8:2::/48", 102), rule("10.1.0.0/16", 101)];
        let desired = Desired { rules: rules.into(), ..Desired::default() };
        let cases = [
            (
                "a route of a table: the sources that are asked there",
                add_route("::/0", 101),
                vec![
                    del_rule(rule("2001:db8:1::/48", 7)),
                    del_rule(rule("2001:db8:1:2::/64", 7)),
                    del_route(Family::V6, 101),
                    // A rule that stays leads there.
                    del_route(Family::V6, 7),
                ],
                vec![
                    del_rule(rule("2001:db8:2::/48", 8)),
                    del_rule(rule("10.1.0.0/16", 8)),
                    del_route(Family::V4, 101),
                    del_route(Family::V6, 102),
                    del_route(Family::V6, 8),
                ],
            ),
            (
                "a rule: the sources that have one in common with it",
                KernelOp::AddRule(rule("10.1.128.0/17", 103)),
                vec![del_rule(rule("10.1.128.0/24", 7)), del_rule(rule("10.1.0.0/16", 7)), del_route(Family::V4, 7)],
                vec![del_rule(rule("10.2.0.0/16", 8)), del_rule(rule("2001:db8:1::/48", 8)), del_route(Family::V4, 8)],
            ),
            (
                "a shortcut: nothing, as the same is decided without it",
                KernelOp::AddRule(Rule::new(20000, net("10.0.0.0/8"), RuleAction::Goto(20100))),
                vec![],
                vec![del_rule(rule("10.1.0.0/16", 7)), del_route(Family::V4, 7)],
            ),
        ];
        for (what, failing, waiting, free) in cases {
            let mut undone = Undone::new(&desired);
            undone.fail(&failing);
            for operation in &waiting {
                assert!(undone.puts_off(operation), "{what}: {operation} waits");
            }
            for operation in &free {
                assert!(!undone.puts_off(operation), "{what}: {operation} does not wait");
            }
            assert_eq!(undone.put_off().len(), waiting.len(), "{what}");
        }
    }

    /// Only the families that something is undone of are left to the kernel.
    #[test]
    fn a_family_is_closed_by_what_is_its_own() {
        let desired = Desired::default();
        let both = Open { v4: true, v6: true };
        let after = |fail: &dyn Fn(&mut Undone<'_>)| {
            let mut undone = Undone::new(&desired);
            fail(&mut undone);
            undone.allow(both)
        };
        assert_eq!(after(&|_| ()), both);
        assert_eq!(after(&|undone| undone.fail(&add_route("::/0", 1))), Open { v4: true, v6: false });
        let source = FastOp::PutSource(net("10.0.0.0/8"), NEW);
        assert_eq!(after(&|undone| undone.fail_fast(&source)), Open { v4: false, v6: true });
        let attach = FastOp::Attach(attachment(Hook::Egress));
        assert_eq!(after(&|undone| undone.fail_fast(&attach)), Open::default());
        assert_eq!(after(&|undone| undone.fail_entries()), both, "the prefixes are as they were");
    }

    #[test]
    fn programs_and_maps_wait_for_rules_and_the_other_way_round() {
        let with_rules = Desired { rules: [rule("10.1.0.0/16", 101)].into(), ..Desired::default() };
        let mut undone = Undone::new(&with_rules);
        undone.fail(&KernelOp::AddRule(rule("10.1.0.0/16", 101)));
        for waits in [
            FastOp::Detach(attachment(Hook::Egress)),
            FastOp::RemoveSource(net("10.1.2.0/24")),
            FastOp::ClearSlot(3),
            FastOp::RemoveExemption(Exemption { set: 1, prefix: net("10.9.0.0/16"), kind: Exempt::Inside }),
        ] {
            assert!(undone.puts_off_fast(&waits), "{waits}");
        }
        for free in [
            FastOp::RemoveSource(net("10.2.0.0/16")),
            FastOp::RemoveExemption(Exemption { set: 1, prefix: net("2001:db8::/32"), kind: Exempt::Inside }),
        ] {
            assert!(!undone.puts_off_fast(&free), "{free}");
        }
        let programs_alone =
            Desired { fast: Some(crate::policy::compile::DesiredFast::default()), ..Desired::default() };
        let mut undone = Undone::new(&programs_alone);
        assert!(!undone.puts_off(&del_rule(rule("10.1.0.0/16", 101))), "the programs are in place");
        undone.fail_fast(&FastOp::Attach(attachment(Hook::Ingress)));
        assert!(undone.puts_off(&del_rule(rule("10.1.0.0/16", 101))), "the programs are not in place");
    }
}
