//! The fast path's state as the pure stages see it: what stands in the maps, and where programs are attached.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tunroute_common::maps::{Action, Clamp, Exempt, Exit, Slot, Source, Station, flags};

use crate::{
    policy::net::{Family, IfIndex, LinkLayer},
    prefixes::map::PrefixMap,
};

/// Where a program sees packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// Traffic about to leave the host by the device.
    Egress,
    /// Traffic that enters the host.
    Ingress,
}

impl Hook {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Egress, Self::Ingress];
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        })
    }
}

/// What a program is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// It decides what becomes of packets.
    Decide,
    /// It lowers the segment size that TCP tells through a tunnel.
    Clamp,
    /// It decides at once, as XDP, what needs no skb; where frames come in.
    Xdp,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Decide, Self::Clamp, Self::Xdp];
}

/// A program on a device. Two are the same if all but the names are: a device keeps its number when it is renamed.
#[derive(Clone, Debug, Serialize)]
pub struct Attachment {
    /// What it does with them.
    #[serde(skip)]
    pub part: Part,
    /// Where it sees packets.
    pub hook: Hook,
    /// The device's number.
    pub ifindex: IfIndex,
    /// The device's name, for display.
    pub device: String,
    /// Which variant of the program it is.
    #[serde(skip)]
    pub ethernet: bool,
}

impl Attachment {
    /// The attachment for a device, if there is a program for its kind of packets.
    #[must_use]
    pub fn new(part: Part, hook: Hook, link: &crate::policy::net::Link) -> Option<Self> {
        let ethernet = match link.layer {
            LinkLayer::Ethernet => true,
            LinkLayer::Ip => false,
            LinkLayer::Other => return None,
        };
        if part == Part::Xdp && (hook == Hook::Egress || !ethernet) {
            return None;
        }
        Some(Self { part, hook, ifindex: link.index, device: link.name.clone(), ethernet })
    }

    const fn identity(&self) -> (Part, Hook, IfIndex, bool) {
        (self.part, self.hook, self.ifindex, self.ethernet)
    }

    /// The program's name in the eBPF object.
    #[must_use]
    pub const fn program(&self) -> &'static str {
        match (self.part, self.hook, self.ethernet) {
            (Part::Decide, Hook::Ingress, true) => "ingress_l2",
            (Part::Decide, Hook::Ingress, false) => "ingress_l3",
            (Part::Decide, Hook::Egress, true) => "egress_l2",
            (Part::Decide, Hook::Egress, false) => "egress_l3",
            (Part::Clamp, _, true) => "clamp_l2",
            (Part::Clamp, _, false) => "clamp_l3",
            (Part::Xdp, ..) => "ingress_xdp",
        }
    }
}

impl PartialEq for Attachment {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for Attachment {}

impl Ord for Attachment {
    fn cmp(&self, other: &Self) -> Ordering {
        self.identity().cmp(&other.identity())
    }
}

impl PartialOrd for Attachment {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = match self.part {
            Part::Decide => "",
            Part::Clamp => "mss ",
            Part::Xdp => "xdp ",
        };
        write!(f, "{part}{} dev {}", self.hook, self.device)
    }
}

/// Destinations in one exemption set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Exemption {
    /// [`Slot::exempt_set`]
    pub set: u32,
    /// The destinations.
    pub prefix: IpNet,
    /// What holds for them, but for those in a longer prefix of the set.
    pub kind: Exempt,
}

impl fmt::Display for Exemption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { set, prefix, kind } = self;
        let kind = match kind {
            Exempt::No => "not",
            Exempt::Inside => "inside",
            Exempt::Anywhere => "anywhere",
        };
        write!(f, "exempt[{set:08x}, {prefix}] {kind}")
    }
}

/// An exit with its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceExit {
    /// The device's number; 0 if the kernel has cleared the entry, since the device is gone.
    pub ifindex: IfIndex,
    /// How packets leave by it.
    pub exit: Exit,
}

impl DeviceExit {
    /// The gateway, if there is one.
    #[must_use]
    pub fn gateway(&self, family: Family) -> Option<IpAddr> {
        self.exit.has(flags::GATEWAY).then(|| address_from_words(family, self.exit.gateway))
    }
}

/// Which families the ingress program may decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Open {
    /// IPv4 packets.
    pub v4: bool,
    /// IPv6 packets.
    pub v6: bool,
}

impl Open {
    /// What both may decide.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { v4: self.v4 && other.v4, v6: self.v6 && other.v6 }
    }

    /// May any packet be decided?
    #[must_use]
    pub const fn any(self) -> bool {
        self.v4 || self.v6
    }

    /// May packets of this family be decided?
    #[must_use]
    pub const fn family(self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// What stands in the maps and where programs are attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FastState {
    /// The source prefixes of `INDEX`.
    pub sources: PrefixMap<Source>,
    /// The exemptions of `INDEX`.
    pub exempt: BTreeSet<Exemption>,
    /// The used slots of `POLICY`.
    pub slots: BTreeMap<u32, Slot>,
    /// The used entries of `EXIT`, with those of `DEVICE`.
    pub exits: BTreeMap<u32, DeviceExit>,
    /// The entries of `CLAMP`.
    pub clamps: BTreeMap<IfIndex, Clamp>,
    /// The entries of `STATION`.
    pub stations: BTreeMap<IfIndex, Station>,
    /// Programs of this daemon, or as good as its own, that are attached.
    pub attached: BTreeSet<Attachment>,
    /// Where programs of any of this project's daemons are attached, this one's or an earlier one's.
    pub pinned: BTreeSet<Attachment>,
    /// `CONTROL`: what the ingress program may decide.
    pub open: Open,
    /// `CONTROL`: what the ingress program may forward by the main table.
    pub unmatched: Open,
    /// `CONTROL`: shadow mode, in which the programs leave every packet to the kernel.
    pub shadow: bool,
}

impl FastState {
    /// Where programs are attached that decide.
    pub fn deciding(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.iter().filter(|attachment| attachment.part == Part::Decide)
    }

    /// The exit that a slot leads to, if its device is there.
    #[must_use]
    pub fn exit_of(&self, slot: &Slot) -> Option<&DeviceExit> {
        let redirects = slot.egress.action() == Action::Redirect;
        let exit = redirects.then(|| self.exits.get(&slot.egress.exit())).flatten();
        exit.filter(|exit| exit.ifindex != 0)
    }

    /// Enters a change that has been made.
    pub fn enter(&mut self, operation: &FastOp) {
        match operation {
            FastOp::WriteSlot(index, slot) => drop(self.slots.insert(*index, *slot)),
            FastOp::ClearSlot(index) => drop(self.slots.remove(index)),
            FastOp::WriteExit(number, exit, _) => drop(self.exits.insert(*number, *exit)),
            FastOp::ClearExit(number) => drop(self.exits.remove(number)),
            FastOp::PutSource(prefix, source) => self.sources.insert(*prefix, *source),
            FastOp::RemoveSource(prefix) => self.sources.remove(prefix),
            FastOp::AddExemption(exemption) => drop(self.exempt.insert(*exemption)),
            FastOp::RemoveExemption(exemption) => drop(self.exempt.remove(exemption)),
            FastOp::Attach(attachment) => {
                self.attached.insert(attachment.clone());
                self.pinned.insert(attachment.clone());
            }
            FastOp::Detach(attachment) => {
                self.attached.remove(attachment);
                self.pinned.remove(attachment);
            }
            FastOp::SetClamp(ifindex, clamp) => drop(self.clamps.insert(*ifindex, *clamp)),
            FastOp::RemoveClamp(ifindex) => drop(self.clamps.remove(ifindex)),
            FastOp::SetStation(ifindex, station) => drop(self.stations.insert(*ifindex, *station)),
            FastOp::RemoveStation(ifindex) => drop(self.stations.remove(ifindex)),
            FastOp::SetOpen(open) => self.open = *open,
            FastOp::SetUnmatched(open) => self.unmatched = *open,
            FastOp::SetShadow(shadow) => self.shadow = *shadow,
        }
    }

    /// Enters changes that have been made together: the prefixes among them in one go.
    pub fn enter_all(&mut self, operations: &[&FastOp]) {
        let mut sources = Vec::with_capacity(operations.len());
        for operation in operations {
            match operation {
                FastOp::PutSource(prefix, source) => sources.push((*prefix, Some(*source))),
                FastOp::RemoveSource(prefix) => sources.push((*prefix, None)),
                operation => self.enter(operation),
            }
        }
        if !sources.is_empty() {
            self.sources.change(sources);
        }
    }
}

/// One change of the fast path. `Display` describes it the way the kernel's commands are shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FastOp {
    /// Write a slot.
    WriteSlot(u32, Slot),
    /// Free a slot and zero its counters.
    ClearSlot(u32),
    /// Enter an exit under a free number. The family is for display.
    WriteExit(u32, DeviceExit, Family),
    /// Free the number of an exit that no slot leads to.
    ClearExit(u32),
    /// Enter or change a source prefix.
    PutSource(IpNet, Source),
    /// Remove a source prefix.
    RemoveSource(IpNet),
    /// Enter an exemption.
    AddExemption(Exemption),
    /// Remove an exemption.
    RemoveExemption(Exemption),
    /// Attach a program, or put this daemon's program in the place of an earlier one's.
    Attach(Attachment),
    /// Detach a program.
    Detach(Attachment),
    /// Limit the segment size that TCP tells through a device.
    SetClamp(IfIndex, Clamp),
    /// Limit it no longer.
    RemoveClamp(IfIndex),
    /// Have frames decided at a device, which has this address.
    SetStation(IfIndex, Station),
    /// Have no frames decided there.
    RemoveStation(IfIndex),
    /// Say which families the ingress program may decide.
    SetOpen(Open),
    /// Set the families whose unmatched traffic the ingress program forwards by the main table.
    SetUnmatched(Open),
    /// Say whether the programs leave every packet to the kernel.
    SetShadow(bool),
}

impl FastOp {
    /// Changes one entry of a prefix map: there may be a great many of these.
    #[must_use]
    pub const fn is_entry(&self) -> bool {
        matches!(self, Self::PutSource(..) | Self::RemoveSource(_) | Self::AddExemption(_) | Self::RemoveExemption(_))
    }

    /// Takes something away, which must wait until what replaces it is there.
    #[must_use]
    pub const fn is_removal(&self) -> bool {
        matches!(
            self,
            Self::ClearSlot(_)
                | Self::ClearExit(_)
                | Self::RemoveSource(_)
                | Self::RemoveExemption(_)
                | Self::Detach(_)
                | Self::RemoveClamp(_)
        )
    }

    /// Nothing stops a policy's packets at an uplink any more.
    #[must_use]
    pub const fn ends_guard(&self) -> bool {
        matches!(self, Self::Detach(Attachment { part: Part::Decide, hook: Hook::Egress, .. }))
    }
}

impl fmt::Display for FastOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WriteSlot(index, slot) => {
                write!(f, "map policy[{index}] = ")?;
                display_slot(f, slot)
            }
            Self::ClearSlot(index) => write!(f, "map policy[{index}] cleared"),
            Self::WriteExit(number, entry, family) => {
                write!(f, "map exit[{number}] = ifindex {} mtu {}", entry.ifindex, entry.exit.mtu)?;
                if let Some(gateway) = entry.gateway(*family) {
                    write!(f, " via {gateway}")?;
                }
                if entry.exit.has(flags::TAKES_FRAMES) { f.write_str(", takes frames") } else { Ok(()) }
            }
            Self::ClearExit(number) => write!(f, "map exit[{number}] cleared"),
            Self::PutSource(prefix, source) => {
                write!(f, "map source[{prefix}] = policy[{}]", source.slot)?;
                match source.arrives_by {
                    Source::ANY_DEVICE => Ok(()),
                    Source::OWN_ADDRESS => f.write_str(", never from outside"),
                    ifindex => write!(f, ", only from ifindex {ifindex}"),
                }
            }
            Self::RemoveSource(prefix) => write!(f, "map source[{prefix}] removed"),
            Self::AddExemption(exemption) => write!(f, "map {exemption} added"),
            Self::RemoveExemption(exemption) => write!(f, "map {exemption} removed"),
            Self::Attach(attachment) => write!(f, "attach program {attachment}"),
            Self::Detach(attachment) => write!(f, "detach program {attachment}"),
            Self::SetClamp(ifindex, Clamp { v4, v6 }) => {
                write!(f, "map mss[ifindex {ifindex}] = IPv4 {v4}, IPv6 {v6}")
            }
            Self::RemoveClamp(ifindex) => write!(f, "map mss[ifindex {ifindex}] removed"),
            Self::SetStation(ifindex, Station { address, .. }) => {
                let [a, b, c, d, e, g]: [u8; 6] = bytemuck::cast(*address);
                write!(f, "map station[ifindex {ifindex}] = {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
            }
            Self::RemoveStation(ifindex) => write!(f, "map station[ifindex {ifindex}] removed"),
            Self::SetOpen(Open { v4, v6 }) => {
                let state = |open| if open { "open" } else { "closed" };
                write!(f, "fast path IPv4 {}, IPv6 {}", state(*v4), state(*v6))
            }
            Self::SetUnmatched(Open { v4, v6 }) => {
                let who = |open| if open { "program" } else { "kernel" };
                write!(f, "unmatched IPv4 by the {}, IPv6 by the {}", who(*v4), who(*v6))
            }
            Self::SetShadow(true) => f.write_str("programs only watch"),
            Self::SetShadow(false) => f.write_str("programs act"),
        }
    }
}

fn display_slot(f: &mut fmt::Formatter<'_>, slot: &Slot) -> fmt::Result {
    match slot.egress.action() {
        Action::Redirect => write!(f, "redirect exit[{}]", slot.egress.exit())?,
        Action::Reject => f.write_str("reject")?,
        Action::Blackhole => f.write_str("blackhole")?,
        Action::Next => f.write_str("next")?,
        Action::Main => f.write_str("main")?,
    }
    if slot.egress.is_disputed() {
        f.write_str(", left to the kernel")?;
    }
    if slot.next == Slot::NO_NEXT { Ok(()) } else { write!(f, ", else policy[{}]", slot.next) }
}

/// An address as the maps hold it: network byte order in memory, IPv4 in the first word.
#[must_use]
pub fn address_words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(address) => [u32::from_ne_bytes(address.octets()), 0, 0, 0],
        IpAddr::V6(address) => bytemuck::cast(address.octets()),
    }
}

/// The inverse of [`address_words`].
#[must_use]
pub fn address_from_words(family: Family, words: [u32; 4]) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from(words[0].to_ne_bytes()),
        Family::V6 => IpAddr::from(bytemuck::cast::<[u32; 4], [u8; 16]>(words)),
    }
}
