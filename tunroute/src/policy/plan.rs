//! Desired minus observed: the ordered operations that lead from one to the other. Pure.
//!
//! Make before break: what is new comes first, in the order routes, rules, maps, programs; what goes, afterwards, in the
//! opposite order. Only closing the fast path comes before everything. A removal waits for what replaces it, and for
//! nothing else ([`Undone`]).
//!
//! Among rules, the longer of two nested prefixes is added first and removed last, so that the rules which a packet meets
//! in the midst of a change are the first of those that it met before, the first of those that it will meet, or all of
//! either: it is decided as before or as afterwards. Shortcuts ([`Rule::is_shortcut`]) are right only while no rule that
//! they pass over matters: those that go are removed before other rules are added, new ones are added when the other
//! rules are as they are to be. What all others rely on, the rule for the local table and the end of all rules, is added
//! first and removed last.

mod undone;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use tunroute_common::maps::{Egress, MAX_EXITS, MAX_NESTING, MAX_PREFIXES, MAX_SLOTS, Slot, Source, Station};

pub use self::undone::Undone;
use crate::{
    policy::compile::{ChainId, Desired, DesiredFast, Lead},
    policy::fast::{DeviceExit, Exemption, FastOp, FastState},
    policy::net::{Family, IfIndex, KernelOp, KernelState, ObservedRule, Route, RouteKind, Rule},
};

/// One operation on either datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// On rules and routes.
    Kernel(KernelOp),
    /// On maps and programs.
    Fast(FastOp),
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(op) => op.fmt(f),
            Self::Fast(op) => op.fmt(f),
        }
    }
}

impl From<KernelOp> for Op {
    fn from(op: KernelOp) -> Self {
        Self::Kernel(op)
    }
}

impl From<FastOp> for Op {
    fn from(op: FastOp) -> Self {
        Self::Fast(op)
    }
}

/// Why the desired state cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// More chains of nested policies than slots.
    #[error(
        "the policies need {needed} slots of the fast path's policy map, which has {MAX_SLOTS}; use fewer policies"
    )]
    Slots {
        /// How many would be used at once.
        needed: usize,
    },
    /// More ways out by tunnels than entries.
    #[error(
        "the tunnels need {needed} entries of the fast path's map of exits, which has {MAX_EXITS}; use fewer tunnels"
    )]
    Exits {
        /// How many would be used at once.
        needed: usize,
    },
    /// More policies around one another than the programs follow, by way of what is on the link at interfaces.
    #[error(
        "{needed} policies stand around one another, and the fast path follows {MAX_NESTING}; use fewer prefixes inside \
         one another"
    )]
    Nesting {
        /// How many there are.
        needed: usize,
    },
    /// More prefixes than a map takes.
    #[error("the fast path would need {needed} {family} {what} at once, and its map takes {MAX_PREFIXES}; use fewer")]
    Prefixes {
        /// Sources or exemptions.
        what: &'static str,
        /// Of which family.
        family: Family,
        /// How many would be there at once: those that go stay until the new ones are in.
        needed: usize,
    },
}

/// The operations that make the observed state the desired one. `fast` is none where no programs are loaded.
///
/// # Errors
///
/// If the desired state does not fit the maps; nothing has been changed then.
pub fn plan(desired: &Desired, kernel: &KernelState, fast: Option<&FastState>) -> Result<Vec<Op>, PlanError> {
    let mut kernel_plan = KernelPlan::new(desired, kernel);
    let mut fast_plan = match fast {
        Some(fast) => FastPlan::new(desired.fast.as_ref(), fast)?,
        None => FastPlan::default(),
    };
    let mut operations = Vec::new();
    operations.append(&mut fast_plan.close);
    operations.append(&mut kernel_plan.withdrawn);
    operations.append(&mut kernel_plan.removed_shortcuts);
    operations.append(&mut kernel_plan.routes);
    operations.append(&mut fast_plan.exempt);
    operations.append(&mut fast_plan.slots);
    operations.append(&mut kernel_plan.rules);
    operations.append(&mut fast_plan.add);
    operations.append(&mut fast_plan.remove);
    operations.append(&mut kernel_plan.removed_rules);
    operations.append(&mut kernel_plan.shortcuts);
    operations.append(&mut kernel_plan.removed_routes);
    Ok(operations)
}

/// Only what moves packets from one tunnel to another or keeps them from an uplink: exemptions withdrawn, routes added and
/// replaced, then slots. What is observed may be older than the devices are; a plan of everything has to follow.
///
/// # Errors
///
/// As [`plan`].
pub fn plan_failover(desired: &Desired, kernel: &KernelState, fast: Option<&FastState>) -> Result<Vec<Op>, PlanError> {
    let mut kernel_plan = KernelPlan::default();
    kernel_plan.plan_routes(desired, kernel);
    let mut operations = kernel_plan.withdrawn;
    operations.append(&mut kernel_plan.routes);
    if let (Some(desired), Some(observed)) = (&desired.fast, fast) {
        let mut fast_plan = FastPlan::default();
        fast_plan.plan_slots(desired, observed, &Numbers::new(desired, observed)?);
        operations.append(&mut fast_plan.slots);
    }
    Ok(operations)
}

#[derive(Default)]
struct KernelPlan {
    /// What leads out of a table that stays: in the main table, the way may be by an uplink now.
    withdrawn: Vec<Op>,
    routes: Vec<Op>,
    rules: Vec<Op>,
    shortcuts: Vec<Op>,
    removed_shortcuts: Vec<Op>,
    removed_rules: Vec<Op>,
    removed_routes: Vec<Op>,
}

impl KernelPlan {
    fn new(desired: &Desired, kernel: &KernelState) -> Self {
        let mut plan = Self::default();
        plan.plan_routes(desired, kernel);
        plan.plan_rules(desired, kernel);
        plan
    }

    fn plan_routes(&mut self, desired: &Desired, kernel: &KernelState) {
        let by_key: BTreeMap<_, &Route> = desired.routes.iter().map(|route| (route.key(), route)).collect();
        // A key is settled once the desired route stands there or replaces what does.
        let mut settled = BTreeSet::new();
        let present = kernel.routes.iter().filter_map(|observed| observed.route.as_ref());
        settled.extend(present.filter(|route| desired.routes.contains(*route)).map(Route::key));

        let part = |route: &Route| (route.table, Family::of(&route.dst));
        let tables: BTreeSet<(u32, Family)> = desired.routes.iter().map(part).collect();
        let mut kept = BTreeSet::new();
        for observed in &kernel.routes {
            let mut removed = &mut self.removed_routes;
            if let Some(route) = &observed.route {
                if desired.routes.contains(route) && kept.insert(route) {
                    continue;
                }
                if let Some(wanted) = by_key.get(&route.key())
                    && settled.insert(route.key())
                {
                    self.routes.push(KernelOp::ReplaceRoute((*wanted).clone()).into());
                    continue;
                }
                if route.kind == RouteKind::Throw && tables.contains(&part(route)) {
                    removed = &mut self.withdrawn;
                }
            }
            removed.push(observed.removal().into());
        }
        let missing = desired.routes.iter().filter(|route| !settled.contains(&route.key()));
        self.routes.extend(missing.map(|route| KernelOp::AddRoute(route.clone()).into()));
        // What leads out of a table comes last: destinations within it may be the policy's, by routes of their own.
        self.routes.sort_by_key(|op| match op {
            Op::Kernel(KernelOp::AddRoute(route) | KernelOp::ReplaceRoute(route)) => route.kind == RouteKind::Throw,
            _ => false,
        });
    }

    fn plan_rules(&mut self, desired: &Desired, kernel: &KernelState) {
        let mut kept = BTreeSet::new();
        let mut removed: Vec<&ObservedRule> = Vec::new();
        for observed in kernel.rules.iter().filter(|observed| observed.ours) {
            match &observed.rule {
                Some(rule) if desired.rules.contains(rule) && kept.insert(rule) => {}
                _ => removed.push(observed),
            }
        }
        let is_shortcut = |observed: &&ObservedRule| observed.rule.as_ref().is_some_and(Rule::is_shortcut);
        let (removed_shortcuts, mut removed): (Vec<_>, Vec<_>) = removed.into_iter().partition(is_shortcut);
        // A prefix stands before those inside it.
        removed
            .sort_by_key(|observed| observed.rule.as_ref().map(|rule| (rule.is_end() || rule.is_local(), rule.from)));
        self.removed_shortcuts.extend(removed_shortcuts.into_iter().map(removal));
        self.removed_rules.extend(removed.into_iter().map(removal));

        let missing = desired.rules.iter().filter(|rule| !kept.contains(rule));
        let (mut shortcuts, mut missing): (Vec<_>, Vec<_>) = missing.partition(|rule| rule.is_shortcut());
        // The kernel looks for a rule's place from the front, so what stands behind comes first. Flat rules are sorted by
        // their prefixes' lengths as they are.
        let as_tree = |rule: &Rule| desired.trees.contains(&rule.family()) && rule.oif.is_none();
        let is_first = |rule: &Rule| rule.is_end() || rule.is_local();
        missing.sort_by_key(|rule| (!is_first(rule), as_tree(rule).then_some(Reverse(rule.from))));
        // Of the same priority, those for most sources are asked first.
        shortcuts.sort_by_key(|rule| (Reverse(rule.priority), rule.from.prefix_len()));
        self.rules.extend(missing.into_iter().map(addition));
        self.shortcuts.extend(shortcuts.into_iter().map(addition));
    }
}

fn addition(rule: &Rule) -> Op {
    KernelOp::AddRule(rule.clone()).into()
}

fn removal(observed: &ObservedRule) -> Op {
    observed.removal().into()
}

#[derive(Default)]
struct FastPlan {
    close: Vec<Op>,
    exempt: Vec<Op>,
    slots: Vec<Op>,
    add: Vec<Op>,
    sources_removed: Vec<Op>,
    remove: Vec<Op>,
}

impl FastPlan {
    fn new(desired: Option<&DesiredFast>, observed: &FastState) -> Result<Self, PlanError> {
        // On the way out the programs go on doing what they do.
        let nothing = DesiredFast { shadow: observed.shadow, ..DesiredFast::default() };
        let desired = desired.unwrap_or(&nothing);
        let numbers = Numbers::new(desired, observed)?;
        check_room(desired, observed)?;
        check_nesting(desired)?;
        let mut plan = Self::default();

        let (both, unmatched) = (observed.open.and(desired.open), observed.unmatched.and(desired.unmatched));
        if both != observed.open {
            plan.close.push(FastOp::SetOpen(both).into());
        }
        if unmatched != observed.unmatched {
            plan.close.push(FastOp::SetUnmatched(unmatched).into());
        }
        plan.plan_xdp(desired, observed);
        plan.plan_slots(desired, observed, &numbers);
        plan.plan_entries(desired, observed, &numbers.slots);
        // Before a program is attached that is not to act; and as the last thing, if all of them are to.
        if desired.shadow && !observed.shadow {
            plan.add.push(FastOp::SetShadow(true).into());
        }
        let limits = desired.clamps.iter().filter(|(ifindex, clamp)| observed.clamps.get(*ifindex) != Some(*clamp));
        plan.add.extend(limits.map(|(ifindex, clamp)| FastOp::SetClamp(*ifindex, *clamp).into()));
        plan.plan_attachments(desired, observed);
        if observed.shadow && !desired.shadow {
            plan.add.push(FastOp::SetShadow(false).into());
        }
        if both != desired.open {
            plan.add.push(FastOp::SetOpen(desired.open).into());
        }
        if unmatched != desired.unmatched {
            plan.add.push(FastOp::SetUnmatched(desired.unmatched).into());
        }
        plan.plan_removals(desired, observed, &numbers);
        Ok(plan)
    }

    fn plan_slots(&mut self, desired: &DesiredFast, observed: &FastState, numbers: &Numbers) {
        // Slots refer to exits, so those are written first.
        for (exit, family) in &desired.exits {
            let Some(number) = numbers.exits.get(exit).filter(|number| !observed.exits.contains_key(number)) else {
                continue;
            };
            self.slots.push(FastOp::WriteExit(*number, *exit, *family).into());
        }
        // Inner slots refer to outer ones, so those are written first: a shorter chain has fewer to follow.
        let mut slots: Vec<(u32, Slot)> = Vec::new();
        for (id, spec) in &desired.slots {
            let Some(index) = numbers.slots.get(id) else { continue };
            let exit = spec.exit.and_then(|exit| numbers.exits.get(&exit));
            let egress = exit.map_or(Egress::down(spec.on_down), |number| Egress::redirect(*number));
            let slot = Slot {
                id: id.0,
                egress: egress.disputed(spec.disputed),
                exempt_set: spec.exempt_set,
                next: spec.next.and_then(|next| numbers.slots.get(&next).copied()).unwrap_or(Slot::NO_NEXT),
                table: spec.table,
                reserved: 0,
            };
            if observed.slots.get(index) != Some(&slot) {
                slots.push((*index, slot));
            }
        }
        // Those that refer to nothing first; the others only refer to slots that no source leads to yet, or to old ones.
        slots.sort_by_key(|(index, slot)| (slot.next != Slot::NO_NEXT, *index));
        self.slots.extend(slots.into_iter().map(|(index, slot)| FastOp::WriteSlot(index, slot).into()));
    }

    fn plan_entries(&mut self, desired: &DesiredFast, observed: &FastState, numbers: &BTreeMap<ChainId, u32>) {
        // These come first of all: a slot whose set is not yet filled would redirect too far.
        let exemptions = desired.exempt.difference(&observed.exempt);
        self.exempt.extend(exemptions.map(|exemption| FastOp::AddExemption(*exemption).into()));
        let chains = desired.sources.chains();
        let slots: Vec<Option<u32>> = chains.iter().map(|chain| numbers.get(&chain.id).copied()).collect();
        for (prefix, lead, present) in desired.sources.prefixes().beside(&observed.sources) {
            let Some(Lead { chain, arrives_by }) = lead else {
                self.sources_removed.push(FastOp::RemoveSource(*prefix).into());
                continue;
            };
            let slot = usize::try_from(*chain).ok().and_then(|chain| *slots.get(chain)?);
            let Some(source) = slot.map(|slot| Source { slot, arrives_by: *arrives_by }) else { continue };
            if present != Some(&source) {
                self.add.push(FastOp::PutSource(*prefix, source).into());
            }
        }
    }

    /// What XDP no longer does is done by the programs behind it, so there is nothing to wait for.
    fn plan_xdp(&mut self, desired: &DesiredFast, observed: &FastState) {
        let stations = observed.stations.keys().filter(|ifindex| !desired.stations.contains_key(ifindex));
        self.close.extend(stations.map(|ifindex| FastOp::RemoveStation(*ifindex).into()));
        let is_new = |(ifindex, station): &(&IfIndex, &Station)| observed.stations.get(*ifindex) != Some(*station);
        let stations = desired.stations.iter().filter(is_new);
        self.add.extend(stations.map(|(ifindex, station)| FastOp::SetStation(*ifindex, *station).into()));
    }

    fn plan_attachments(&mut self, desired: &DesiredFast, observed: &FastState) {
        let missing = desired.attachments.difference(&observed.attached);
        self.add.extend(missing.map(|attachment| FastOp::Attach(attachment.clone()).into()));
        // An earlier daemon's programs, too, which this one has not taken over.
        let present: BTreeSet<_> = observed.attached.union(&observed.pinned).collect();
        let extra = present.into_iter().filter(|attachment| !desired.attachments.contains(*attachment));
        self.remove.extend(extra.map(|attachment| FastOp::Detach(attachment.clone()).into()));
    }

    fn plan_removals(&mut self, desired: &DesiredFast, observed: &FastState, numbers: &Numbers) {
        self.remove.append(&mut self.sources_removed);
        let exemptions = observed.exempt.difference(&desired.exempt);
        self.remove.extend(exemptions.map(|exemption| FastOp::RemoveExemption(*exemption).into()));
        let limits = observed.clamps.keys().filter(|ifindex| !desired.clamps.contains_key(ifindex));
        self.remove.extend(limits.map(|ifindex| FastOp::RemoveClamp(*ifindex).into()));
        let used: BTreeSet<u32> = numbers.slots.values().copied().collect();
        let slots = observed.slots.keys().filter(|index| !used.contains(index));
        self.remove.extend(slots.map(|index| FastOp::ClearSlot(*index).into()));
        let used: BTreeSet<u32> = numbers.exits.values().copied().collect();
        let exits = observed.exits.keys().filter(|number| !used.contains(number));
        self.remove.extend(exits.map(|number| FastOp::ClearExit(*number).into()));
    }
}

/// Is there room in the prefix maps for old and new together?
fn check_room(desired: &DesiredFast, observed: &FastState) -> Result<(), PlanError> {
    let check = |what, family, added: usize, present: usize| {
        let needed = added.saturating_add(present);
        let fits = u32::try_from(needed).is_ok_and(|needed| needed <= MAX_PREFIXES);
        if fits { Ok(()) } else { Err(PlanError::Prefixes { what, family, needed }) }
    };
    let limit = usize::try_from(MAX_PREFIXES).unwrap_or(usize::MAX);
    // The usual case costs nothing.
    let sources = desired.sources.prefixes();
    if sources.len().saturating_add(observed.sources.len()) > limit {
        let mut needed = [0usize; 2];
        for (prefix, ..) in sources.beside(&observed.sources) {
            needed[Family::of(prefix) as usize] += 1;
        }
        for family in Family::ALL {
            check("sources", family, needed[family as usize], 0)?;
        }
    }
    if desired.exempt.len().saturating_add(observed.exempt.len()) > limit {
        for family in Family::ALL {
            let of_family = |exemption: &&Exemption| Family::of(&exemption.prefix) == family;
            let added = desired.exempt.difference(&observed.exempt).filter(of_family).count();
            check("exemptions", family, added, observed.exempt.iter().filter(of_family).count())?;
        }
    }
    Ok(())
}

/// Can the programs follow every chain to its end? A configuration that is too deep by itself is refused when it is read.
fn check_nesting(desired: &DesiredFast) -> Result<(), PlanError> {
    let length = |id: &ChainId| std::iter::successors(Some(*id), |id| desired.slots.get(id)?.next).count();
    match desired.slots.keys().map(length).max() {
        Some(needed) if u32::try_from(needed).is_ok_and(|needed| needed > MAX_NESTING) => {
            Err(PlanError::Nesting { needed })
        }
        _ => Ok(()),
    }
}

/// The numbers of slots and exits.
struct Numbers {
    slots: BTreeMap<ChainId, u32>,
    exits: BTreeMap<DeviceExit, u32>,
}

impl Numbers {
    fn new(desired: &DesiredFast, observed: &FastState) -> Result<Self, PlanError> {
        Ok(Self { slots: number_slots(desired, observed)?, exits: number_exits(desired, observed)? })
    }
}

/// The slot numbers: a chain keeps the one it has, a new one gets the lowest that no observed chain has.
///
/// # Errors
///
/// If the old and the new chains together do not fit.
pub fn number_slots(desired: &DesiredFast, observed: &FastState) -> Result<BTreeMap<ChainId, u32>, PlanError> {
    let taken = observed.slots.iter().map(|(index, slot)| (*index, ChainId(slot.id)));
    number(desired.slots.keys(), taken, MAX_SLOTS).map_err(|needed| PlanError::Slots { needed })
}

/// The exit numbers: an exit keeps the one it has, a new one gets the lowest that no observed exit has. So an exit of which
/// anything has changed is a new one, and the old one stays as it is until no slot leads there.
fn number_exits(desired: &DesiredFast, observed: &FastState) -> Result<BTreeMap<DeviceExit, u32>, PlanError> {
    let taken = observed.exits.iter().map(|(number, exit)| (*number, *exit));
    number(desired.exits.keys(), taken, MAX_EXITS).map_err(|needed| PlanError::Exits { needed })
}

/// Numbers below a limit for what is wanted. The error is how many numbers would be used at once, if there are too few.
fn number<'a, T: Ord + Copy + 'a>(
    wanted: impl Iterator<Item = &'a T> + Clone,
    taken: impl Iterator<Item = (u32, T)>,
    limit: u32,
) -> Result<BTreeMap<T, u32>, usize> {
    let taken: BTreeMap<u32, T> = taken.collect();
    let existing: BTreeMap<T, u32> = taken.iter().map(|(number, one)| (*one, *number)).collect();
    let mut free = (0..limit).filter(|number| !taken.contains_key(number));
    let mut number = |one: &T| Some((*one, existing.get(one).copied().or_else(|| free.next())?));
    let numbers: Option<BTreeMap<T, u32>> = wanted.clone().map(&mut number).collect();
    numbers.ok_or_else(|| taken.len() + wanted.filter(|one| !existing.contains_key(*one)).count())
}
