//! What the kernel has: dumps, turned into [`KernelState`].

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hasher as _},
};

use rtnetlink::packet_route::route::RouteType;

use super::{
    KernelError, Kinds, address, link, route, rule,
    socket::{Dump, Message, Request, Socket},
};
use crate::policy::net::{
    Address, Family, Handle, KernelState, MainRoute, ObservedRoute, Route, TABLE_LOCAL, TABLE_MAIN,
};

/// A list that changes while it is read is read again, this often at most.
const ATTEMPTS: usize = 10;

/// What was observed, with the messages of all rules and of tunroute's routes for exact deletion.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The state that the messages say.
    pub state: KernelState,
    rules: Vec<Box<[u8]>>,
    routes: Vec<Box<[u8]>>,
}

impl Snapshot {
    /// The observed message of a rule.
    pub(super) fn rule(&self, handle: Handle) -> Option<&[u8]> {
        self.rules.get(handle.0).map(AsRef::as_ref)
    }

    /// The observed message of a route.
    pub(super) fn route(&self, handle: Handle) -> Option<&[u8]> {
        self.routes.get(handle.0).map(AsRef::as_ref)
    }

    /// What [`super::rules_digest`] would say of the rules.
    #[must_use]
    pub fn rules_digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.rules.iter().for_each(|message| hasher.write(message));
        hasher.finish()
    }

    /// An odd route with tunroute's number that takes the place of one to be added.
    pub(super) fn in_the_way(&self, route: &Route) -> Option<Handle> {
        let odd = self.state.routes.iter().filter(|observed| observed.route.is_none());
        odd.map(|observed| observed.handle).find(|&handle| {
            self.route(handle).and_then(route::Seen::parse).is_some_and(|seen| seen.key() == route.key())
        })
    }
}

/// Reads the dirty kinds; the others are kept from the previous snapshot.
pub(super) async fn observe(
    socket: &mut Socket,
    what: Kinds,
    previous: Option<Snapshot>,
) -> Result<Snapshot, KernelError> {
    let (mut snapshot, what) = match previous {
        Some(snapshot) => (snapshot, what.with_consequences()),
        None => (Snapshot::default(), Kinds::ALL),
    };
    if what.contains(Kinds::LINKS) {
        observe_links(socket, &mut snapshot).await?;
    }
    if what.contains(Kinds::RULES) {
        observe_rules(socket, &mut snapshot).await?;
    }
    if what.contains(Kinds::ROUTES) {
        observe_addresses(socket, &mut snapshot.state).await?;
        observe_routes(socket, &mut snapshot).await?;
    }
    Ok(snapshot)
}

/// Reads the devices and keeps the rest.
pub(super) async fn observe_devices(socket: &mut Socket, mut snapshot: Snapshot) -> Result<Snapshot, KernelError> {
    observe_links(socket, &mut snapshot).await?;
    Ok(snapshot)
}

async fn observe_links(socket: &mut Socket, snapshot: &mut Snapshot) -> Result<(), KernelError> {
    let request = link::dump().map_err(KernelError::Socket)?;
    let links = &mut snapshot.state.links;
    list(
        socket,
        "devices",
        &request,
        links,
        |links| links.clear(),
        |links, message| {
            if message.kind == libc::RTM_NEWLINK
                && let Some(link) = link::parse(message.payload)
            {
                links.insert(link.index, link);
            }
        },
    )
    .await
}

async fn observe_rules(socket: &mut Socket, snapshot: &mut Snapshot) -> Result<(), KernelError> {
    snapshot.rules.clear();
    snapshot.state.rules.clear();
    for family in Family::ALL {
        let start = snapshot.rules.len();
        list(
            socket,
            "rules",
            &rule::dump(family),
            snapshot,
            |snapshot| {
                snapshot.rules.truncate(start);
                snapshot.state.rules.truncate(start);
            },
            |snapshot, message| {
                if message.kind == libc::RTM_NEWRULE
                    && let Some(rule) = rule::parse(family, message.payload, Handle(snapshot.rules.len()))
                {
                    snapshot.rules.push(message.payload.into());
                    snapshot.state.rules.push(rule);
                }
            },
        )
        .await?;
        rule::resolve(&mut snapshot.state.rules[start..]);
    }
    Ok(())
}

/// See [`super::rules_digest`].
pub(super) async fn rules_digest(socket: &mut Socket) -> Result<u64, KernelError> {
    let mut hasher = DefaultHasher::new();
    for family in Family::ALL {
        let each = |message: &Message<'_>| {
            if message.kind == libc::RTM_NEWRULE {
                hasher.write(message.payload);
            }
        };
        match socket.dump(&rule::dump(family), each).await {
            Ok(_) => {}
            Err(error) if is_unsupported(&error) => {}
            Err(source) => return Err(KernelError::List { what: "rules", source }),
        }
    }
    Ok(hasher.finish())
}

/// A kernel without IPv6 has none of it.
fn is_unsupported(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}

async fn observe_addresses(socket: &mut Socket, state: &mut KernelState) -> Result<(), KernelError> {
    let mut addresses = Vec::new();
    for family in Family::ALL {
        let start = addresses.len();
        let each = |addresses: &mut Vec<Address>, message: &Message<'_>| {
            if message.kind == libc::RTM_NEWADDR {
                addresses.extend(address::parse(family, message.payload));
            }
        };
        let reset = |addresses: &mut Vec<Address>| addresses.truncate(start);
        list(socket, "addresses", &address::dump(family), &mut addresses, reset, each).await?;
    }
    state.addresses = addresses.into_iter().collect();
    Ok(())
}

async fn observe_routes(socket: &mut Socket, snapshot: &mut Snapshot) -> Result<(), KernelError> {
    snapshot.routes.clear();
    let KernelState { links, routes, local, main, main_refuses, foreign_tables, .. } = &mut snapshot.state;
    routes.clear();
    local.clear();
    main.clear();
    main_refuses.clear();
    foreign_tables.clear();
    let messages = &mut snapshot.routes;
    // The kernel does not flag an interrupted route dump, and one that went on after a change repeats itself
    // (`fib6_dump_table()` in `net/ipv6/ip6_fib.c`): a route seen twice must not look like one too many.
    let mut seen_ours = HashSet::new();
    let name = |index| links.get(&index).map_or_else(|| format!("if{index}"), |link| link.name.clone());
    for family in Family::ALL {
        let start = main.len();
        let each = |main: &mut Vec<MainRoute>, message: &Message<'_>| {
            let Some(seen) = Some(message)
                .filter(|message| message.kind == libc::RTM_NEWROUTE)
                .and_then(|message| route::Seen::parse(message.payload))
                .filter(|seen| seen.family == family)
            else {
                return;
            };
            if seen.ours {
                if seen_ours.insert(Box::<[u8]>::from(message.payload)) {
                    let handle = Handle(messages.len());
                    messages.push(message.payload.into());
                    routes.push(ObservedRoute { handle, family, route: seen.route(&name), text: seen.text(&name) });
                }
            } else if foreign_tables.last() != Some(&seen.table) {
                foreign_tables.insert(seen.table);
            }
            match seen.table {
                TABLE_LOCAL => {
                    local.insert(seen.dst);
                }
                TABLE_MAIN if seen.kind == RouteType::Unicast => main.push(seen.main_route()),
                TABLE_MAIN => {
                    main_refuses.insert(seen.dst);
                }
                _ => {}
            }
        };
        list(socket, "routes", &route::dump(family), main, |main| main.truncate(start), each).await?;
    }
    // Grown by doubling; the next observation takes as much again.
    main.shrink_to_fit();
    Ok(())
}

/// Reads a list into `target`, again if it changed under way.
async fn list<T>(
    socket: &mut Socket,
    what: &'static str,
    request: &Request,
    target: &mut T,
    reset: impl Fn(&mut T),
    mut each: impl FnMut(&mut T, &Message<'_>),
) -> Result<(), KernelError> {
    for _ in 0..ATTEMPTS {
        reset(target);
        match socket.dump(request, |message| each(target, message)).await {
            Ok(Dump::Complete) => return Ok(()),
            Ok(Dump::Interrupted) => tokio::task::yield_now().await,
            Err(error) if is_unsupported(&error) => return Ok(()),
            Err(source) => return Err(KernelError::List { what, source }),
        }
    }
    Err(KernelError::Unstable { what, attempts: ATTEMPTS })
}
