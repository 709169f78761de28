//! The decision: what becomes of a packet, as a pure function.
//!
//! It decides exactly what the kernel's rules and routes would decide, or steps aside and leaves the packet to them.
//! Everything uncertain steps aside.

use crate::{
    maps::{Action, Egress, Exempt, Exit, Ipv6, MAX_NESTING, Outcome, Slot, Source, flags},
    packet::{Addresses, Header, Packet, read_lenient, read_strict},
};

/// The maps, as far as the decision reads them.
pub trait Lookup {
    /// The longest source prefix that holds the packet's source address.
    fn source(&self, addresses: &Addresses) -> Option<Source>;

    /// A policy's prefix holds the packet's *destination* address: packets going the other way are routed by policy.
    fn destination_is_source(&self, addresses: &Addresses) -> bool;

    /// What the exemption set says of the packet's destination address.
    fn exempt(&self, set: u32, addresses: &Addresses) -> Exempt;

    /// A copy of the slot with this number, whose [`Slot::egress`] was read by one load.
    fn slot(&self, index: u32) -> Option<Slot>;

    /// The way out by the exit with this number. `None` if its device is gone.
    fn way(&self, exit: u32) -> Option<Way<'_>>;

    /// Unmatched traffic of this family may be forwarded by the main table.
    fn forwards_unmatched(&self, addresses: &Addresses) -> bool;

    /// Source or destination is this host's own, or a broadcast address of its networks.
    fn touches_host(&self, addresses: &Addresses) -> bool;

    /// Where the main table sends a packet with such a header, whose largest piece on the wire is so long. `None` where the
    /// kernel must say: it would ask something else, has an answer other than a way out, or would have to cut the packet.
    fn main_route(&self, arrival: &Arrival, header: &Header, length: u32) -> Option<NextHop>;

    /// The daemon is alive, and the fast path agrees with the kernel for the family of these addresses.
    fn open(&self, addresses: &Addresses) -> bool;
}

/// What is known of a packet besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The ethertype, in host byte order.
    pub ethertype: u16,
    /// The device at which the packet is seen.
    pub ifindex: u32,
    /// The packet is addressed to this host's link-layer address (`PACKET_HOST`).
    pub to_this_host: bool,
    /// The packet carries a VLAN tag.
    pub tagged: bool,
}

/// The device that a packet leaves by, and to whom it goes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The device's number.
    pub ifindex: u32,
    /// The gateway, or the destination itself, in network byte order (IPv4: the first word).
    pub address: Ipv6,
    /// The address is an IPv6 one, for a packet of either family (RFC 8950).
    pub is_v6: bool,
}

/// An exit whose device is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way<'a> {
    /// The exit's number.
    pub number: u32,
    /// The device's number.
    pub ifindex: u32,
    /// How packets leave by it.
    pub exit: &'a Exit,
}

/// What becomes of a packet, and in which slot it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// No policy's business: the kernel decides.
    Pass,
    /// A policy's packet, but left to the kernel.
    StepAside(u32, Outcome),
    /// Dropped.
    Drop(u32, Outcome),
    /// Handed to the slot's exit.
    Redirect(u32, Way<'a>, Outcome),
    /// No policy's business either: sent on by the main table.
    Forward(NextHop),
}

/// Where a packet's source leads, once nested policies that do not apply have been passed over.
enum Applies {
    /// This slot decides, and says so.
    To(u32, Egress),
    /// No policy applies any more; the first one that did not, and why.
    ToNone(u32, Outcome),
}

/// Follows the chain of nested policies, from the longest prefix on, to the first one that applies: whose destination is
/// not exempt, and which does not say `next` while it is down. `exempt` is the least that an exemption must allow.
#[inline(always)]
fn apply<L: Lookup>(first: u32, exempt: Exempt, addresses: &Addresses, maps: &L) -> Option<Applies> {
    let mut index = first;
    let mut passed = None;
    for _ in 0..=MAX_NESTING {
        let slot = maps.slot(index)?;
        let outcome = match slot.egress.action() {
            Action::Main => Outcome::Main,
            Action::Next => Outcome::Down,
            _ if maps.exempt(slot.exempt_set, addresses) >= exempt => Outcome::Exempt,
            _ => return Some(Applies::To(index, slot.egress)),
        };
        let passed = *passed.get_or_insert(outcome);
        if slot.next == Slot::NO_NEXT {
            return Some(Applies::ToNone(first, passed));
        }
        index = slot.next;
    }
    None
}

/// Decides a packet that has just arrived and would be forwarded by the kernel next. On [`Verdict::Redirect`] the caller
/// takes one from the hop limit.
#[inline(always)]
pub fn decide_ingress<'a, P: Packet, L: Lookup>(arrival: &Arrival, packet: &P, maps: &'a L) -> Verdict<'a> {
    if !arrival.to_this_host || arrival.tagged {
        return Verdict::Pass;
    }
    let Some(header) = read_strict(arrival.ethertype, packet) else { return Verdict::Pass };
    if header.addresses.any_special() || header.is_neighbour_discovery(packet) {
        return Verdict::Pass;
    }
    let Some(source) = maps.source(&header.addresses) else { return unmatched(arrival, &header, packet, maps) };

    if !maps.open(&header.addresses) {
        return Verdict::StepAside(source.slot, Outcome::Closed);
    }
    let (index, egress) = match apply(source.slot, Exempt::Inside, &header.addresses, maps) {
        Some(Applies::To(index, egress)) => (index, egress),
        Some(Applies::ToNone(index, outcome)) => return Verdict::StepAside(index, outcome),
        None => return Verdict::Pass,
    };
    if egress.is_disputed() {
        return Verdict::StepAside(index, Outcome::Closed);
    }
    if source.arrives_by != Source::ANY_DEVICE
        && (source.arrives_by != arrival.ifindex || maps.destination_is_source(&header.addresses))
    {
        return Verdict::StepAside(index, Outcome::SourceCheck);
    }
    match egress.action() {
        Action::Redirect => {
            let Some(way) = maps.way(egress.exit()) else { return Verdict::StepAside(index, Outcome::Down) };
            if way.ifindex == arrival.ifindex {
                Verdict::StepAside(index, Outcome::Hairpin)
            } else if header.hop_limit <= 1 {
                Verdict::StepAside(index, Outcome::Expired)
            } else if header.length_on_wire(packet).is_none_or(|length| length > way.exit.mtu) {
                Verdict::StepAside(index, Outcome::TooBig)
            } else {
                Verdict::Redirect(index, way, Outcome::Forwarded)
            }
        }
        Action::Blackhole => Verdict::Drop(index, Outcome::Blackholed),
        Action::Reject | Action::Next | Action::Main => Verdict::StepAside(index, Outcome::Down),
    }
}

/// Decides unmatched traffic: after the rules comes the main table.
#[inline(always)]
fn unmatched<'a, P: Packet, L: Lookup>(arrival: &Arrival, header: &Header, packet: &P, maps: &'a L) -> Verdict<'a> {
    let addresses = &header.addresses;
    if !maps.forwards_unmatched(addresses)
        || header.hop_limit <= 1
        || !maps.open(addresses)
        || maps.touches_host(addresses)
    {
        return Verdict::Pass;
    }
    let next_hop = header.length_on_wire(packet).and_then(|length| maps.main_route(arrival, header, length));
    match next_hop {
        Some(next_hop) if next_hop.ifindex != arrival.ifindex => Verdict::Forward(next_hop),
        _ => Verdict::Pass,
    }
}

/// Decides a packet that is about to leave by an uplink. A policy's packet passes only where no policy applies to it;
/// otherwise it goes by its tunnel, or nowhere. The hop limit has been dealt with by then.
#[inline(always)]
pub fn decide_egress<'a, P: Packet, L: Lookup>(arrival: &Arrival, packet: &P, maps: &'a L) -> Verdict<'a> {
    let Some(header) = read_lenient(arrival.ethertype, packet) else { return Verdict::Pass };
    // What is let through here leaves by the uplink, so these are only what no rule would have sent elsewhere.
    // Neighbour discovery has this hop limit (RFC 4861); what looks like it and was forwarded has not.
    if header.addresses.stays_on_link() || (header.hop_limit == 255 && header.is_neighbour_discovery(packet)) {
        return Verdict::Pass;
    }
    let Some(source) = maps.source(&header.addresses) else { return Verdict::Pass };

    // An exemption that leads inside is none here.
    let (index, egress) = match apply(source.slot, Exempt::Anywhere, &header.addresses, maps) {
        Some(Applies::To(index, egress)) => (index, egress),
        Some(Applies::ToNone(index, outcome)) => return Verdict::StepAside(index, outcome),
        None => return Verdict::Drop(source.slot, Outcome::LeakPrevented),
    };
    let fits = |exit: &Exit| {
        exit.has(flags::ANSWERS_TOO_BIG) || header.length_on_wire(packet).is_none_or(|length| length <= exit.mtu)
    };
    // A tagged packet is on its way to a VLAN of the uplink. It must not leave there either, but keeps its tag if redirected.
    let redirects = !arrival.tagged && egress.action() == Action::Redirect;
    let way = if redirects { maps.way(egress.exit()) } else { None };
    match way {
        Some(way) if way.ifindex != arrival.ifindex && fits(way.exit) => {
            Verdict::Redirect(index, way, Outcome::Diverted)
        }
        _ => Verdict::Drop(index, Outcome::LeakPrevented),
    }
}
