//! Keys, values and names of the BPF maps: the contract between the eBPF programs and the daemon.
//!
//! Every type is `repr(C)` without padding. Addresses are kept as they stand in a packet: network byte order in memory,
//! held in 32-bit words so that the eBPF compiler reads words, not bytes.

use bytemuck::{Pod, Zeroable};

/// Raised with every change of a map's name, key, value or meaning: it names the pin directory, so that two versions of
/// the daemon never read each other's maps.
pub const LAYOUT_VERSION: u32 = 7;

/// Number of slots in [`POLICY`](names::POLICY); [`STATS`](names::STATS) has one more.
pub const MAX_SLOTS: u32 = 4096;

/// The number of exits that [`EXIT`](names::EXIT) and [`DEVICE`](names::DEVICE) have room for.
pub const MAX_EXITS: u32 = 4096;

/// The place in [`STATS`](names::STATS) of unmatched traffic that the programs forward.
pub const UNMATCHED: u32 = MAX_SLOTS;

/// The exemption set of the host's own addresses, and of those that it broadcasts to.
pub const OWN_SET: u32 = 0;

/// Maximum number of source prefixes, and of exemptions, of each family, old and new together during a change: a bound,
/// not a reservation.
pub const MAX_PREFIXES: u32 = 1 << 22;

/// Size of the ring buffer of traced decisions, in bytes.
pub const EVENTS_BYTES: u32 = 1 << 18;

/// Maximum number of tunnels with an MSS limit.
pub const MAX_CLAMPS: u32 = 4096;

/// Maximum number of devices at which XDP decides frames.
pub const MAX_XDP_DEVICES: u32 = 4096;

/// Maximum nesting depth of policies: the fast path follows [`Slot::next`] at most this often.
pub const MAX_NESTING: u32 = 8;

/// The maps' names, in the eBPF object and below the pin directory.
pub mod names {
    /// Array of one map, whose one element is the words of [`index`](crate::index).
    pub const INDEX: &str = "INDEX";
    /// Array: slot number → [`Slot`](super::Slot).
    pub const POLICY: &str = "POLICY";
    /// Array: exit number → [`Exit`](super::Exit).
    pub const EXIT: &str = "EXIT";
    /// Hash of devices: exit number → the exit's device. The kernel removes an entry when its device is unregistered, so
    /// a device that later gets the same number is never taken for the one that was meant. The kernel's hash of a number
    /// is the number, so a lookup takes as long as in an array, which programs of two types may not share
    /// (`map_type_contains_progs()` in `include/linux/bpf.h`).
    pub const DEVICE: &str = "DEVICE";
    /// Per-CPU array: slot number, or [`UNMATCHED`](super::UNMATCHED) → [`Stats`](super::Stats).
    pub const STATS: &str = "STATS";
    /// Array of one [`Control`](super::Control).
    pub const CONTROL: &str = "CONTROL";
    /// Hash: a tunnel's device number → [`Clamp`](super::Clamp).
    pub const CLAMP: &str = "CLAMP";
    /// Ring buffer of [`Event`](super::Event).
    pub const EVENTS: &str = "EVENTS";
    /// Array of one [`Filter`](super::Filter).
    pub const TRACE: &str = "TRACE";
    /// Per-CPU array of one [`Traced`](super::Traced).
    pub const TRACED: &str = "TRACED";

    /// Hash: an ingress device's number → [`Station`](super::Station), where XDP decides.
    pub const STATION: &str = "STATION";

    /// All of them, in the order in which they are pinned.
    pub const ALL: [&str; 11] = [INDEX, POLICY, EXIT, DEVICE, STATS, CONTROL, CLAMP, EVENTS, TRACE, TRACED, STATION];
}

/// An IPv4 address in network byte order, as in the packet.
pub type Ipv4 = u32;
/// An IPv6 address in network byte order, as in the packet.
pub type Ipv6 = [u32; 4];

/// What is known of a source prefix.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Source {
    /// The number of its slot in `POLICY`.
    pub slot: u32,
    /// The only device by which such packets may be forwarded past the kernel: [`Source::ANY_DEVICE`], a device's
    /// number (the reverse path, where rp_filter is on), or [`Source::OWN_ADDRESS`].
    pub arrives_by: u32,
}

/// What an exemption set says of a destination: the kind of the longest of its prefixes that holds it.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Exempt {
    /// The policy applies.
    No = 0,
    /// The policy does not apply, and the way there leads inside. A packet that is about to leave by an uplink all the
    /// same (the inside route has been withdrawn) is the policy's.
    Inside = 1,
    /// The policy does not apply, and the packet may leave by any device.
    Anywhere = 2,
}

impl Exempt {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::No, Self::Inside, Self::Anywhere];
}

impl Source {
    /// Packets of this source may arrive by any device.
    pub const ANY_DEVICE: u32 = 0;
    /// An address of this host: packets from it that arrive from outside are left to the kernel, which takes them for
    /// martians (`fib_validate_source()` in `net/ipv4/fib_frontend.c`).
    pub const OWN_ADDRESS: u32 = u32::MAX;
}

/// What is done with packets of the source prefixes that point here.
///
/// A slot belongs to a policy, an address family and the policies around the prefix: nested prefixes of different
/// policies form a chain by [`Slot::next`], which is what falling through a routing table means in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Slot {
    /// Names the chain across restarts; 0 in a free slot. Not read by the eBPF programs.
    pub id: u64,
    /// What is done, and by which exit.
    pub egress: Egress,
    /// The set of destinations that the policy does not apply to.
    pub exempt_set: u32,
    /// The slot of the next shorter prefix that belongs to another policy, or [`Slot::NO_NEXT`].
    pub next: u32,
    /// The policy's routing table, by which the kernel is asked for the next hop's link-layer address; 0 if it is not asked.
    pub table: u32,
    /// Always 0: keeps the type free of padding.
    pub reserved: u32,
}

impl Slot {
    /// No policy stands around this one.
    pub const NO_NEXT: u32 = u32::MAX;
}

/// Action, exit number and dispute mark in one aligned word, read by one load. The kernel writes an array's element by
/// `memcpy()` (`copy_map_value()` in `include/linux/bpf.h`), so a program that reads at that moment sees the old word or
/// the new one wherever that copies aligned words whole, as it does on the 64-bit machines that this runs on.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Egress(u64);

impl Egress {
    const DISPUTED: u64 = 1 << 32;

    /// Hand packets to the exit with this number.
    #[must_use]
    pub const fn redirect(exit: u32) -> Self {
        Self(exit as u64 | (Action::Redirect as u64) << 48)
    }

    /// No tunnel is up.
    #[must_use]
    pub const fn down(action: Action) -> Self {
        Self((action as u64) << 48)
    }

    /// The same, but disputed or not: a disputed slot leaves to the kernel what enters, since the fast path was found to
    /// decide otherwise. The uplinks stay guarded.
    #[must_use]
    pub const fn disputed(self, disputed: bool) -> Self {
        Self(if disputed { self.0 | Self::DISPUTED } else { self.0 & !Self::DISPUTED })
    }

    /// Returns true if the slot is disputed.
    #[inline(always)]
    #[must_use]
    pub const fn is_disputed(self) -> bool {
        self.0 & Self::DISPUTED != 0
    }

    /// What is done.
    #[inline(always)]
    #[must_use]
    pub const fn action(self) -> Action {
        match self.0 >> 48 {
            1 => Action::Redirect,
            2 => Action::Blackhole,
            3 => Action::Next,
            4 => Action::Main,
            _ => Action::Reject,
        }
    }

    /// The exit's number; only meaningful if the action is [`Action::Redirect`].
    #[inline(always)]
    #[must_use]
    pub const fn exit(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }
}

impl core::fmt::Debug for Egress {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Egress")
            .field("action", &self.action())
            .field("exit", &self.exit())
            .field("disputed", &self.is_disputed())
            .finish()
    }
}

/// What a slot does with its packets. `Reject`, `Blackhole` and `Next` are for when no tunnel is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The kernel answers with an ICMP error.
    Reject = 0,
    /// Hand them to the tunnel.
    Redirect = 1,
    /// Drop them.
    Blackhole = 2,
    /// As if the policy were not there: the policy around it decides.
    Next = 3,
    /// As if there were no policy for these sources at all: the main table decides.
    Main = 4,
}

/// How packets leave by a device, whose number is in [`DEVICE`](names::DEVICE).
///
/// An exit never changes while a slot refers to it: another gateway or MTU is another exit, with another number. So one
/// load of a slot's [`Egress`] yields device and gateway of one and the same state.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
pub struct Exit {
    /// The largest layer 3 packet that the device takes, in bytes; 0 in a free entry.
    pub mtu: u32,
    /// A union of [`flags`].
    pub flags: u32,
    /// The next hop in network byte order (IPv4: the first word), where [`flags::GATEWAY`] is set.
    pub gateway: Ipv6,
}

impl Exit {
    /// Returns true if any of these [`flags`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }
}

/// Properties of an exit.
pub mod flags {
    /// Its device has Ethernet framing: the next hop's link-layer address must be resolved.
    pub const ETHERNET: u32 = 1;
    /// There is a gateway.
    pub const GATEWAY: u32 = 2;
    /// The device itself answers a packet that is too big (sit, gre, ip6tnl).
    pub const ANSWERS_TOO_BIG: u32 = 4;
    /// The device takes frames from XDP.
    pub const TAKES_FRAMES: u32 = 8;
}

/// The outcomes that are counted for each slot.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Handed to the tunnel by the ingress program; of unmatched traffic: forwarded by the main table.
    Forwarded,
    /// Handed to the tunnel by the egress program of an uplink.
    Diverted,
    /// Dropped at an uplink that it must not leave by.
    LeakPrevented,
    /// Dropped, since no tunnel is up and the policy says `blackhole`.
    Blackholed,
    /// Left to the kernel: the destination is exempt.
    Exempt,
    /// Left to the kernel: no tunnel is up, or its device has just gone.
    Down,
    /// Left to the kernel: the tunnel is where the packet came from.
    Hairpin,
    /// Left to the kernel: the hop limit expires here.
    Expired,
    /// Left to the kernel: larger than the tunnel's MTU.
    TooBig,
    /// Left to the kernel: the source is this host's own, or not expected from this device.
    SourceCheck,
    /// Left to the kernel: the daemon's heartbeat is overdue, or the fast path is closed for this family or policy.
    Closed,
    /// Left to the kernel: the next hop's link-layer address is not known. The kernel asks for it, and tells the sender if
    /// there is no answer.
    Unresolved,
    /// Left to the main table, as the policy says (`via = "main"`).
    Main,
}

impl Outcome {
    /// All outcomes, in the order in which they are counted.
    pub const ALL: [Self; 13] = [
        Self::Forwarded,
        Self::Diverted,
        Self::LeakPrevented,
        Self::Blackholed,
        Self::Exempt,
        Self::Down,
        Self::Hairpin,
        Self::Expired,
        Self::TooBig,
        Self::SourceCheck,
        Self::Closed,
        Self::Unresolved,
        Self::Main,
    ];

    /// The name in `status --json` and in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Diverted => "diverted",
            Self::LeakPrevented => "leak_prevented",
            Self::Blackholed => "blackholed",
            Self::Exempt => "exempt",
            Self::Down => "down",
            Self::Hairpin => "hairpin",
            Self::Expired => "expired",
            Self::TooBig => "too_big",
            Self::SourceCheck => "source_check",
            Self::Closed => "closed",
            Self::Unresolved => "unresolved",
            Self::Main => "main",
        }
    }
}

/// Packets and layer 3 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counter {
    /// Packets, as the hook sees them: a GSO packet is one.
    pub packets: u64,
    /// Layer 3 bytes.
    pub bytes: u64,
}

/// A slot's counters, one for each [`Outcome`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Stats {
    /// Indexed by the outcome's number.
    pub outcomes: [Counter; Outcome::ALL.len()],
}

/// The largest segment size (MSS) that TCP may tell the other end through a tunnel, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Clamp {
    /// Over IPv4.
    pub v4: u16,
    /// Over IPv6.
    pub v6: u16,
}

/// A device as the link knows it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Station {
    /// Its link-layer address, as it stands in a frame.
    pub address: [u16; 3],
    /// Always 0: keeps the type's length a power of two.
    pub reserved: u16,
}

/// What the daemon tells all programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Control {
    /// `CLOCK_MONOTONIC` in nanoseconds until which the ingress program may decide: later no daemon follows device
    /// changes.
    pub valid_until: u64,
    /// The ingress program may decide IPv4 packets if 1.
    pub open_v4: u32,
    /// The ingress program may decide IPv6 packets if 1.
    pub open_v6: u32,
    /// If 1, all programs decide and count, and leave every packet to the kernel.
    pub shadow: u32,
    /// If 1, decisions that pass [`Filter`] are traced, until `valid_until`.
    pub tracing: u32,
    /// Families of which the ingress program forwards unmatched traffic by the main table: 1 for IPv4, 2 for IPv6, or
    /// both.
    pub unmatched: u32,
    /// Always 0: keeps the type free of padding.
    pub reserved: u32,
}

/// Which decisions are traced.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Filter {
    /// The source's first bits, those of `from_mask`.
    pub from: Ipv6,
    /// Which bits of the source count.
    pub from_mask: Ipv6,
    /// The destination's first bits, those of `to_mask`.
    pub to: Ipv6,
    /// Which bits of the destination count.
    pub to_mask: Ipv6,
    /// The ethertype, in host byte order; 0 for any.
    pub ethertype: u32,
    /// Maximum number of decisions traced on each CPU in a [`SPAN`](crate::trace::SPAN); further ones are counted. 0:
    /// tracing is off and nothing is counted.
    pub limit: u32,
}

/// A traced decision.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub time: u64,
    /// The source; of IPv4, the first word.
    pub source: Ipv6,
    /// The destination, likewise.
    pub destination: Ipv6,
    /// The number of the slot that it is counted in.
    pub slot: u32,
    /// The [`Outcome`]'s number.
    pub outcome: u32,
    /// The device at which the packet was seen.
    pub ifindex: u32,
    /// The slot's tunnel; 0 if it has none now.
    pub tunnel: u32,
    /// The layer 3 length in bytes.
    pub length: u32,
    /// The ethertype, in host byte order.
    pub ethertype: u16,
    /// The payload's protocol, or the first extension header's number.
    pub protocol: u16,
}

/// Traced decisions of a CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Traced {
    /// The last span's number.
    pub span: u64,
    /// Those in it.
    pub told: u64,
    /// Decisions that passed the filter and were not traced.
    pub omitted: u64,
    /// The one that is under way.
    pub event: Event,
}

#[cfg(feature = "user")]
mod user {
    //! aya reads and writes maps of types that are its own kind of Pod.

    macro_rules! pod {
        ($($name:ident),*) => {
            // SAFETY: `repr(C)`, without padding, and valid for every bit pattern, as bytemuck's derive has checked.
            $(unsafe impl aya::Pod for super::$name {})*
        };
    }
    pod!(Slot, Exit, Counter, Stats, Control, Clamp, Filter, Traced, Station);
}
