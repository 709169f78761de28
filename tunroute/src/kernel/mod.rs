//! The kernel's rules, routes and devices over rtnetlink: observe, apply, watch. Knows nothing of configuration.
//!
//! It speaks netlink with rtnetlink's message types and sockets, but without its request queue: that drops a message
//! it cannot decode (a foreign rule must not be overlooked), holds a whole dump or event storm in memory, and forgets
//! the bytes that make a deletion exact.

mod address;
mod apply;
mod filter;
mod link;
mod neighbour;
mod observe;
mod query;
mod route;
mod rule;
pub(crate) mod socket;
pub mod sysctl;
mod traffic;
mod watch;
pub mod xdp_features;

use std::{collections::BTreeSet, fmt, io, net::IpAddr, ops};

use rtnetlink::{packet_route::AddressFamily, sys::protocols::NETLINK_ROUTE};

pub use self::{
    observe::Snapshot,
    query::{Answer, Oracle, Question, Refused},
    traffic::{Traffic, traffic},
    watch::{Change, Events, Removed},
};
use crate::{
    policy::fast::Hook,
    policy::net::{Family, IfIndex, KernelOp},
    policy::plan::Undone,
};

/// A set of the kinds of state that the kernel reports on.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Kinds(u8);

impl Kinds {
    /// None.
    pub const NONE: Self = Self(0);
    /// Devices.
    pub const LINKS: Self = Self(1);
    /// Routes of all tables.
    pub const ROUTES: Self = Self(2);
    /// Policy rules.
    pub const RULES: Self = Self(4);
    /// The devices' addresses; read with the routes, since both change together.
    pub const ADDRESSES: Self = Self(8);
    /// Settings such as forwarding and rp_filter: not part of the state, but gates depend on them.
    pub const NETCONF: Self = Self(16);
    /// All but the rules, which may be many.
    pub const BUT_RULES: Self = Self(27);
    /// All of them: after an overrun.
    pub const ALL: Self = Self(31);

    /// Are all of `other` in this set?
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Is nothing in this set?
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Adds what changes along without an event of its own: IPv4 routes vanish silently with their device or address
    /// (`fib_table_flush()` in `net/ipv4/fib_trie.c`), and routes are shown with device names. When IPv6 is disabled on a
    /// device, only its routes are reported (`addrconf_ifdown()` in `net/ipv6/addrconf.c`).
    #[must_use]
    fn with_consequences(self) -> Self {
        let both = Self::LINKS | Self::ROUTES;
        if self.0 & (both | Self::ADDRESSES).0 == 0 { self } else { self | both }
    }
}

impl ops::BitOr for Kinds {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl ops::BitOrAssign for Kinds {
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

impl fmt::Display for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::LINKS, "links"),
            (Self::ROUTES, "routes"),
            (Self::RULES, "rules"),
            (Self::ADDRESSES, "addresses"),
            (Self::NETCONF, "settings"),
        ];
        let mut separator = "";
        for (_, name) in names.into_iter().filter(|&(kind, _)| self.contains(kind)) {
            write!(f, "{separator}{name}")?;
            separator = ", ";
        }
        if self.is_empty() { f.write_str("nothing") } else { Ok(()) }
    }
}

impl fmt::Debug for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kinds({self})")
    }
}

/// What went wrong between tunroute and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}; the service may be confined from AF_NETLINK (RestrictAddressFamilies)")]
    Open(#[source] io::Error),
    /// The socket failed, or the kernel's answer was lost.
    #[error("cannot talk to the kernel over netlink: {0}")]
    Socket(#[source] io::Error),
    /// A list was refused or broke off.
    #[error("cannot read the list of {what} from the kernel: {source}")]
    List {
        /// What was to be listed.
        what: &'static str,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// A list never held still.
    #[error("the list of {what} changed during each of {attempts} readings; will be read again")]
    Unstable {
        /// What was to be listed.
        what: &'static str,
        /// How often it was tried.
        attempts: usize,
    },
    /// The kernel refused a change.
    #[error("`{command}` failed: {source}{}{}", explained(.explanation.as_ref()), advised(*.advice))]
    Refused {
        /// What was tried, in `ip` syntax.
        command: String,
        /// The kernel's error number.
        source: io::Error,
        /// The kernel's explanation, where it gives one.
        explanation: Option<String>,
        /// What the operator can do, where the error number tells.
        advice: Option<&'static str>,
    },
    /// An operation names an object that the snapshot does not have: it was planned from another one.
    #[error("`{command}` was planned from another observation; nothing was done")]
    Stale {
        /// What was to be done, in `ip` syntax.
        command: String,
    },
    /// The kernel could not say what would become of a packet.
    #[error("cannot ask the kernel for the way of a packet from {from} to {to}: {source}")]
    Question {
        /// The packet's source.
        from: IpAddr,
        /// The packet's destination.
        to: IpAddr,
        /// The kernel's refusal.
        source: io::Error,
    },
}

fn explained(explanation: Option<&String>) -> String {
    explanation.map(|explanation| format!(" ({explanation})")).unwrap_or_default()
}

fn advised(advice: Option<&str>) -> String {
    advice.map(|advice| format!("; {advice}")).unwrap_or_default()
}

/// The kernel of one network namespace.
#[derive(Debug)]
pub struct Kernel {
    socket: tokio::sync::Mutex<socket::Socket>,
}

impl Kernel {
    /// Connects to the kernel of the calling thread's network namespace.
    ///
    /// The events begin before anything is observed, so no change is missed between the two. Must be called within a
    /// tokio runtime with I/O enabled.
    ///
    /// # Errors
    /// [`KernelError::Open`]
    pub fn connect() -> Result<(Self, Events), KernelError> {
        let socket = socket::Socket::open(NETLINK_ROUTE).map_err(KernelError::Open)?;
        let events = Events::subscribe(socket.port()).map_err(KernelError::Open)?;
        Ok((Self { socket: tokio::sync::Mutex::new(socket) }, events))
    }

    /// Observes the kinds in `what` anew and keeps the others from `previous`; without one, observes everything.
    ///
    /// # Errors
    /// The list that could not be read. The previous snapshot is gone then: observe everything next time.
    pub async fn observe(&self, what: Kinds, previous: Option<Snapshot>) -> Result<Snapshot, KernelError> {
        observe::observe(&mut *self.socket.lock().await, what, previous).await
    }

    /// Observes the devices alone. Routes and their handles stay as they were, though some may have gone with a device.
    ///
    /// # Errors
    /// As [`Self::observe`].
    pub async fn observe_devices(&self, previous: Snapshot) -> Result<Snapshot, KernelError> {
        observe::observe_devices(&mut *self.socket.lock().await, previous).await
    }

    /// Applies one operation that was planned from `snapshot`.
    ///
    /// Adding a rule that exists, and deleting what is gone, is success. Adding a route where another one with the same
    /// table, destination and metric exists is an error, since that one is somebody else's; but an odd one that carries
    /// tunroute's number ([`crate::policy::net::ObservedRoute::route`] is none) is replaced at once.
    ///
    /// # Errors
    /// What the kernel said, with what was tried and what can be done about it.
    pub async fn apply(&self, op: &KernelOp, snapshot: &Snapshot) -> Result<(), KernelError> {
        match self.apply_all(std::iter::once(op), snapshot, &mut Undone::default()).await.pop() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Applies operations in order, several to a request. Every addition is tried; what has to wait for something that is
    /// undone is put off, so that nothing is broken before its replacement is made. What fails or is put off is noted in
    /// `undone`.
    ///
    /// Returns what failed; empty means that the rest is done.
    pub async fn apply_all<'a>(
        &self,
        ops: impl IntoIterator<Item = &'a KernelOp>,
        snapshot: &Snapshot,
        undone: &mut Undone<'_>,
    ) -> Vec<KernelError> {
        apply::apply_all(&mut *self.socket.lock().await, ops, snapshot, undone).await
    }

    /// The BPF programs in filters on the devices' clsact qdiscs: where, and each program's number.
    ///
    /// # Errors
    /// The list that could not be read.
    pub async fn bpf_filters(
        &self,
        devices: impl IntoIterator<Item = IfIndex>,
    ) -> Result<BTreeSet<(Hook, IfIndex, u32)>, KernelError> {
        let mut found = BTreeSet::new();
        for device in devices {
            for hook in [Hook::Ingress, Hook::Egress] {
                let filters = self.filters(hook, device).await?;
                found.extend(filters.iter().filter_map(|filter| Some((hook, device, filter.program?))));
            }
        }
        Ok(found)
    }

    /// Has the kernel ask these neighbours whether they are still there, where it does not know.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub async fn refresh_neighbours(
        &self,
        neighbours: impl IntoIterator<Item = (IfIndex, IpAddr)>,
    ) -> Result<(), KernelError> {
        let mut socket = self.socket.lock().await;
        for (device, address) in neighbours {
            neighbour::refresh(&mut socket, device, address).map_err(KernelError::Socket)?;
        }
        Ok(())
    }

    /// Removes a device's clsact qdisc, unless another program has a filter on it.
    ///
    /// # Errors
    /// What the kernel said.
    pub async fn remove_unused_clsact(&self, device: IfIndex) -> Result<(), KernelError> {
        for hook in [Hook::Ingress, Hook::Egress] {
            if !self.filters(hook, device).await?.is_empty() {
                return Ok(());
            }
        }
        let mut socket = self.socket.lock().await;
        // One that is gone already is what was asked for.
        let _gone = socket.transact(&[filter::remove_qdisc(device)]).map_err(KernelError::Socket)?;
        Ok(())
    }

    async fn filters(&self, hook: Hook, device: IfIndex) -> Result<Vec<filter::Filter>, KernelError> {
        let mut filters = Vec::new();
        let dump = filter::dump(hook, device);
        match self.socket.lock().await.dump(&dump, |message| filters.extend(filter::parse(message))).await {
            Err(source) if !filter::none_there(&source) => Err(KernelError::List { what: "filters", source }),
            _ => Ok(filters),
        }
    }
}

/// A number that stands for all rules of the calling thread's network namespace; see [`Snapshot::rules_digest`]. If it is
/// another one than before, somebody has changed something, or is just doing so.
///
/// It has a socket of its own, and other tasks get their turn while it reads.
///
/// # Errors
/// The list that could not be read.
pub async fn rules_digest() -> Result<u64, KernelError> {
    let mut socket = socket::Socket::open(NETLINK_ROUTE).map_err(KernelError::Open)?;
    observe::rules_digest(&mut socket).await
}

/// The family's number in netlink messages.
const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

#[cfg(test)]
mod tests;
