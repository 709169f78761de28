//! The state directory: what must outlive the daemon, in small JSON files.
//!
//! Nothing in it is needed to forward packets. A file that cannot be written is said once and memory goes on; a file
//! that cannot be read is reported to its reader, who chooses the safe assumption.

pub mod tables;

use std::{
    collections::BTreeSet,
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

/// The file that is locked; it holds the process number of the daemon that has the lock.
const LOCK: &str = "lock";
/// No state file of ours comes near this size, in bytes; a larger one is not read into memory.
const MAX_SIZE: u64 = 16 << 20;

/// Why the state directory or a file in it cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// The directory cannot be made or opened.
    #[error("cannot use the state directory {}: {source}; make it writable for tunroute, or name another with --state-dir", path.display())]
    Directory {
        /// The directory, or the lock file in it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another daemon has the directory.
    #[error("the state directory {} is in use by {}; stop that daemon first, or name another directory with --state-dir", path.display(), holder(*pid))]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process that holds the lock, where it could be read.
        pid: Option<u32>,
    },
    /// A file cannot be written; its old content is still there.
    #[error("cannot write {}: {source}; its old content is kept", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is not what tunroute writes.
    #[error("{} is damaged: {source}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it stops making sense.
        source: serde_json::Error,
    },
}

/// `process 42`, for the error.
fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

/// The state directory, locked for as long as this value lives.
///
/// The lock is a `flock`: the kernel drops it when the daemon dies, however it dies.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Holds the lock; never read.
    _lock: File,
    /// The files whose last write failed and was said.
    failing: Mutex<BTreeSet<String>>,
}

impl StateDir {
    /// Makes the directory (mode 0700) where it is missing, and locks it.
    ///
    /// A directory that was used before works on a read-only file system, too.
    ///
    /// # Errors
    /// [`StateError::InUse`] if another process holds the lock, [`StateError::Directory`] if there is no such directory
    /// and it cannot be made.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StateError> {
        let path = path.into();
        let failed = |path: &Path, source| StateError::Directory { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(|source| failed(&path, source))?;
        let lock_path = path.join(LOCK);
        let lock = private().create(true).truncate(false).read(true).open(&lock_path);
        let lock = lock
            .or_else(|error| match error.kind() {
                io::ErrorKind::ReadOnlyFilesystem => File::open(&lock_path).or(Err(error)),
                _ => Err(error),
            })
            .map_err(|source| failed(&lock_path, source))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let pid = read_small(&lock).ok().and_then(|text| String::from_utf8(text).ok()?.trim().parse().ok());
                return Err(StateError::InUse { path, pid });
            }
            Err(TryLockError::Error(source)) => return Err(failed(&lock_path, source)),
        }
        // The lock is what counts; its holder's number is a courtesy, which a full disk may refuse.
        let _ = lock.set_len(0).and_then(|()| writeln!(&lock, "{}", std::process::id()));
        Ok(Self { path, _lock: lock, failing: Mutex::default() })
    }

    /// Where a file of the directory lies.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Reads a file; none if it does not exist.
    ///
    /// # Errors
    /// [`StateError::Read`] or [`StateError::Damaged`]: the caller goes on with what is safe.
    pub fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.file(name);
        let text = match File::open(&path).and_then(|file| read_small(&file)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StateError::Read { path, source }),
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| StateError::Damaged { path, source })
    }

    /// Replaces a file: after a crash or a power cut either the old content or the new is there, never a part.
    ///
    /// Blocks for as long as the disk takes. Each file has one writer.
    ///
    /// # Errors
    /// [`StateError::Write`]: the disk is full, read-only or broken. The old content is still there.
    pub fn save<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let path = self.file(name);
        let temporary = self.file(&format!(".{name}.new"));
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_vec_pretty(value)?;
            text.push(b'\n');
            let mut file = private().create(true).truncate(true).open(&temporary)?;
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            // The rename is a change of the directory, which has a sync of its own.
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|source| {
            // A partial file is useless, and on a full disk its blocks are needed elsewhere.
            let _ = std::fs::remove_file(&temporary);
            StateError::Write { path, source }
        })
    }

    /// As [`Self::save`], for a caller that continues with memory: logs each file's first failure, and its end.
    ///
    /// Returns whether the file was written.
    pub fn save_or_say<T: Serialize>(&self, name: &str, value: &T) -> bool {
        let result = self.save(name, value);
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => {
                if failing.remove(name) {
                    tracing::info!("{} can be written again", self.file(name).display());
                }
                true
            }
            Err(error) => {
                if failing.insert(name.to_owned()) {
                    tracing::error!("{error}; going on without it, which is not said again until it works");
                }
                false
            }
        }
    }
}

/// How a file of ours is opened for writing: for us alone, and never through a symbolic link.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options
}

/// Reads a file of at most [`MAX_SIZE`].
fn read_small(file: &File) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_SIZE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_SIZE} bytes")));
    }
    Ok(text)
}

/// A time in milliseconds since the machine was booted (`CLOCK_BOOTTIME`): it never jumps, and goes on during suspend.
///
/// Negative for what happened under an earlier boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootTime(pub i64);

impl BootTime {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        // Every kernel since 2.6.39 has this clock. One that stands still would only ever forbid starts.
        clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Self(0), |time| {
            let time = Duration::from(time);
            Self(i64::try_from(time.as_millis()).unwrap_or(i64::MAX))
        })
    }

    /// This much later.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// The time from `earlier` to this one; zero if it is not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// What tells this boot of the machine from every other (`/proc/sys/kernel/random/boot_id`); none where it is hidden.
#[must_use]
pub fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let id = id.trim();
    (!id.is_empty()).then(|| id.to_owned())
}

#[cfg(test)]
mod tests;
