//! Where a daemon keeps its things, and what it leaves behind for a `tunroute down` after it is gone.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write as _},
    ops::Range,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use serde::{Deserialize, Serialize};
use tracing::warn;

/// The record's name in the runtime directory.
const RECORD: &str = "instance.json";
/// The drop-in with the tables' names.
const NAMES: &str = "tunroute.conf";
/// The port numbers of netlink sockets that are a daemon's lock, the first one unless somebody else has it. The kernel
/// gives none of them by itself: it takes process numbers and negative numbers.
const LOCK_PORTS: Range<u32> = 0x4000_0000..0x8000_0000;
/// `RTNLGRP_IPV4_MROUTE_R`, as a bit: to be a member takes `CAP_NET_ADMIN` in the user namespace that owns the network
/// namespace (`rtnetlink_bind()` in `net/core/rtnetlink.c`).
const LOCK_GROUP: u32 = 1 << 29;
/// Attempts to find a port number that nobody else has.
const ATTEMPTS: usize = 64;

/// The directories of one daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Allocated tables and start histories.
    pub state_dir: PathBuf,
    /// Pinned maps and links.
    pub pin_dir: PathBuf,
    /// Where iproute2 looks for the names of tables.
    pub rt_tables_dir: PathBuf,
}

/// What went wrong with an instance's files.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// The runtime directory cannot be used.
    #[error("cannot use the runtime directory {}: {source}; choose another one with --runtime-dir", path.display())]
    RuntimeDir {
        /// The directory or a file in it.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another daemon has the runtime directory.
    #[error("another tunroute daemon has the runtime directory {}; choose another one with --runtime-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// Somebody else's routing.
    #[error(
        "another tunroute manages this network namespace; stop it with `tunroute down` (and its --runtime-dir), or run \
         this one in a namespace of its own"
    )]
    NamespaceTaken,
    /// The lock cannot be taken.
    #[error("cannot take the lock of this network namespace: {0}")]
    NamespaceLock(#[source] io::Error),
}

/// Holds the network namespace for this daemon until it is dropped, or its process gone.
///
/// It is a netlink socket, which belongs to the network namespace whatever the mounts: bound to a port number that only
/// one socket can have, and a member of a group that only those who may change routes can join. Others can have the
/// number, but not both.
#[derive(Debug)]
pub struct NamespaceLock(#[expect(dead_code, reason = "held, never read from")] Socket);

/// Holds a runtime directory for this daemon until it is dropped, or its process gone.
#[derive(Debug)]
pub struct RuntimeLock(#[expect(dead_code, reason = "held for its lock")] File);

impl NamespaceLock {
    /// Takes the lock of the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// If another daemon has it.
    pub fn take() -> Result<Self, InstanceError> {
        let mut port = LOCK_PORTS.start;
        for _ in 0..ATTEMPTS {
            let mut socket = Socket::new(NETLINK_ROUTE).map_err(InstanceError::NamespaceLock)?;
            match socket.bind(&SocketAddr::new(port, LOCK_GROUP)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    if holders()?.contains(&port) {
                        return Err(InstanceError::NamespaceTaken);
                    }
                    warn!("a process that may not change routes has netlink port {port}; locking by another number");
                    port = fastrand::u32(LOCK_PORTS);
                    continue;
                }
                Err(error) => return Err(InstanceError::NamespaceLock(error)),
            }
            // Of two daemons, the one that is bound later sees the other.
            if holders()?.iter().any(|holder| *holder != port) {
                return Err(InstanceError::NamespaceTaken);
            }
            return Ok(Self(socket));
        }
        Err(InstanceError::NamespaceLock(io::ErrorKind::AddrInUse.into()))
    }
}

/// The port numbers of all locks in the calling thread's network namespace.
fn holders() -> Result<Vec<u32>, InstanceError> {
    let sockets = fs::read_to_string("/proc/thread-self/net/netlink").map_err(InstanceError::NamespaceLock)?;
    Ok(sockets.lines().filter_map(lock_port).collect())
}

/// The port number of a lock, from its line in `/proc/net/netlink`; none of other sockets.
fn lock_port(line: &str) -> Option<u32> {
    let mut columns = line.split_whitespace().skip(1);
    let (protocol, port, groups) = (columns.next()?, columns.next()?.parse().ok()?, columns.next()?);
    let groups = u32::from_str_radix(groups, 16).ok()?;
    (protocol == "0" && LOCK_PORTS.contains(&port) && groups & LOCK_GROUP != 0).then_some(port)
}

impl Instance {
    /// Makes the runtime directory, for nobody else's eyes, takes its lock and leaves the record there.
    ///
    /// # Errors
    ///
    /// If the directory cannot be made or written, others could write to it, or another daemon has it.
    pub fn record(&self, runtime_dir: &Path) -> Result<RuntimeLock, InstanceError> {
        let error = |source| InstanceError::RuntimeDir { path: runtime_dir.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(runtime_dir).map_err(error)?;
        let directory = File::open(runtime_dir).map_err(error)?;
        let metadata = directory.metadata().map_err(error)?;
        if metadata.uid() != nix::unistd::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            let why = "it belongs to another user, or others may write to it";
            return Err(error(io::Error::new(io::ErrorKind::PermissionDenied, why)));
        }
        match directory.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(InstanceError::InUse { path: runtime_dir.to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(error(source)),
        }
        let record = serde_json::to_vec_pretty(self).map_err(|source| error(source.into()))?;
        fs::write(runtime_dir.join(RECORD), record).map_err(error)?;
        Ok(RuntimeLock(directory))
    }

    /// The record that a daemon has left, if one has.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn recorded(runtime_dir: &Path) -> Result<Option<Self>, InstanceError> {
        let path = runtime_dir.join(RECORD);
        let error = |source| InstanceError::RuntimeDir { path: path.clone(), source };
        match fs::read(&path) {
            Ok(record) => serde_json::from_slice(&record).map(Some).map_err(|source| error(source.into())),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(error(source)),
        }
    }

    /// Removes what the daemon has in the runtime directory, and the directory if nothing else is in it.
    pub fn forget(runtime_dir: &Path) {
        for name in [RECORD, crate::control::socket::SOCKET] {
            let _gone = fs::remove_file(runtime_dir.join(name));
        }
        let _not_empty = fs::remove_dir(runtime_dir);
    }

    /// Tells iproute2 the tables' names, if it has a place for them.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn name_tables<'a>(&self, tables: impl Iterator<Item = (&'a str, u32)>) -> io::Result<()> {
        let mut text = b"# Written by tunroute: the routing tables of its policies.\n".to_vec();
        for (name, table) in tables {
            writeln!(text, "{table}\t{name}")?;
        }
        let path = self.rt_tables_dir.join(NAMES);
        if fs::read(&path).is_ok_and(|present| present == text) {
            return Ok(());
        }
        fs::create_dir_all(&self.rt_tables_dir)?;
        fs::write(path, text)
    }

    /// Takes the tables' names back.
    pub fn unname_tables(&self) {
        let _gone = fs::remove_file(self.rt_tables_dir.join(NAMES));
        // Only if tunroute has made it.
        let _not_empty = fs::remove_dir(&self.rt_tables_dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_a_route_socket_with_a_port_of_the_range_and_the_group() {
        let line = |protocol, port: u32, groups| {
            lock_port(&format!("000000003461aecd {protocol:<3} {port:<10} {groups:08x} 0        0        0     2"))
        };
        assert_eq!(line(0, LOCK_PORTS.start, LOCK_GROUP), Some(LOCK_PORTS.start));
        assert_eq!(line(0, LOCK_PORTS.end - 1, LOCK_GROUP | 1), Some(LOCK_PORTS.end - 1));
        assert_eq!(line(0, LOCK_PORTS.start, 1), None, "anybody may be bound there");
        assert_eq!(line(4, LOCK_PORTS.start, LOCK_GROUP), None, "another protocol has groups of its own");
        assert_eq!(line(0, 4242, LOCK_GROUP), None, "a multicast router, whose port the kernel has chosen");
        assert_eq!(lock_port("sk               Eth Pid        Groups   Rmem     Wmem"), None);
    }
}
