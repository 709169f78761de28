//! Where a daemon keeps its things, and what it leaves behind for a `tunroute down` after it is gone.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write as _},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::{DirBuilderExt as _, MetadataExt as _},
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::{Deserialize, Serialize};
use tracing::warn;

/// The record's name in the runtime directory.
const RECORD: &str = "instance.json";
/// The drop-in with the tables' names.
const NAMES: &str = "tunroute.conf";
/// In the abstract socket namespace, which belongs to the network namespace: whoever has bound it manages its routing.
const NAMESPACE_LOCK: &str = "tunroute/routing";

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
#[derive(Debug)]
pub struct NamespaceLock(#[expect(dead_code, reason = "held, never accepted from")] Option<UnixListener>);

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
        let address = SocketAddr::from_abstract_name(NAMESPACE_LOCK).map_err(InstanceError::NamespaceLock)?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(Self(Some(listener))),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => match holder(&address) {
                // Anybody may bind such an address: only who could manage routing is believed to do so.
                Some(user) if user != 0 && user != nix::unistd::geteuid().as_raw() => {
                    warn!("user {user} holds the lock of this network namespace without being able to route; ignored");
                    Ok(Self(None))
                }
                _ => Err(InstanceError::NamespaceTaken),
            },
            Err(error) => Err(InstanceError::NamespaceLock(error)),
        }
    }
}

/// The user that listens at an address, if that can be told.
fn holder(address: &SocketAddr) -> Option<u32> {
    let stream = UnixStream::connect_addr(address).ok()?;
    let credentials = getsockopt(&stream, PeerCredentials).ok()?;
    Some(credentials.uid())
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
            let why = "it belongs to somebody else, or others may write to it";
            return Err(error(io::Error::new(io::ErrorKind::PermissionDenied, why)));
        }
        match directory.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(error(io::Error::new(io::ErrorKind::ResourceBusy, "another tunroute daemon has it")));
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
