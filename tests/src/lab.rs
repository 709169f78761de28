//! One lab: a directory and a name that its namespaces share, and the broom for labs whose process died.
//!
//! Names are `tr-PID-N-LABEL`: unique among concurrent processes and within one, and they tell who made them.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, umount2},
    unistd::geteuid,
};
use tempfile::TempDir;

use crate::netns::{Netns, kill_processes_in};

/// Where `ip netns` keeps its names.
pub(crate) const NETNS_DIR: &str = "/run/netns";
const PREFIX: &str = "tr-";
/// Locked by every lab on the machine: see [`Share`].
const LOCK: &str = "tunroute-lab.lock";

/// What else may go on on the machine while a lab exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Other labs.
    Others,
    /// Excludes all other labs, of other processes, too: for tests that measure time.
    Nobody,
}

/// A directory for configuration, state and pins, and a family of namespace names.
#[derive(Debug)]
pub struct Lab {
    id: String,
    dir: TempDir,
    /// Held for its lock.
    _lock: File,
}

impl Lab {
    /// Opens a lab; the first one of a process removes what dead processes left. Waits for labs that share the machine
    /// with nobody, or if this one does, for all others.
    ///
    /// # Errors
    /// Not root, or the temporary directory cannot be written.
    pub fn new(share: Share) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        ensure!(geteuid().is_root(), "the network lab makes network namespaces and needs root: run it with sudo");
        SWEEP.call_once(|| {
            for failure in remove_stale() {
                eprintln!("network lab: cannot remove what a dead run left: {failure:#}");
            }
        });
        let path = std::env::temp_dir().join(LOCK);
        let lock = File::options().create(true).append(true).open(&path);
        let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
        match share {
            Share::Others => lock.lock_shared(),
            Share::Nobody => lock.lock(),
        }
        .with_context(|| format!("cannot lock {}", path.display()))?;
        let id = format!("{PREFIX}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let dir =
            tempfile::Builder::new().prefix(&format!("{id}-")).tempdir().context("cannot make the lab's directory")?;
        Ok(Self { id, dir, _lock: lock })
    }

    /// The start of the names of this lab's namespaces.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The lab's directory; it goes when the lab is dropped.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Makes one namespace for each label.
    ///
    /// # Errors
    /// `ip netns add` fails, or a sysctl cannot be set.
    pub fn netns<const N: usize>(&self, labels: [&str; N]) -> Result<[Netns; N]> {
        let made = Netns::create(self, &labels)?;
        made.try_into().map_err(|_| anyhow::anyhow!("made another number of namespaces than asked for"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A bpffs that a test mounted and forgot would keep the directory from being removed.
        for mount in mounts_below(self.dir.path()) {
            let _ = umount2(&mount, MntFlags::MNT_DETACH);
        }
    }
}

/// The process that made a lab name, if it is one.
fn owner(name: &OsStr) -> Option<u32> {
    name.to_str()?.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// Entries of a directory that a process made which lives no more.
fn orphans(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| owner(&entry.file_name()).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()))
        .map(|entry| entry.path())
        .collect()
}

/// Mount points at or below a directory, the deepest first.
pub(crate) fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut below: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .filter(|mount| mount.starts_with(dir))
        .collect();
    below.sort_by_key(|mount| std::cmp::Reverse(mount.components().count()));
    below
}

/// Removes the namespaces, processes, mounts and directories of labs whose process is dead; returns what could not be.
#[must_use]
pub fn remove_stale() -> Vec<anyhow::Error> {
    let mut failures = Vec::new();
    for path in orphans(Path::new(NETNS_DIR)) {
        failures.extend(remove_netns(&path).err());
    }
    for dir in orphans(&std::env::temp_dir()) {
        for mount in mounts_below(&dir) {
            let gone = umount2(&mount, MntFlags::MNT_DETACH);
            failures.extend(gone.with_context(|| format!("cannot unmount {}", mount.display())).err());
        }
        let gone = match fs::remove_dir_all(&dir) {
            // Another process swept at the same time.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        failures.extend(gone.with_context(|| format!("cannot remove {}", dir.display())).err());
    }
    failures
}

/// Kills what runs in a named namespace and removes the name, as `ip netns del` does.
pub(crate) fn remove_netns(path: &Path) -> Result<()> {
    if let Ok(handle) = File::open(path) {
        kill_processes_in(&handle).with_context(|| format!("in {}", path.display()))?;
    }
    // A name whose mount is already gone is an empty file: only the file is left to remove.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
