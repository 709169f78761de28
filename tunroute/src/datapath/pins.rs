//! The pin directory: what keeps maps and links alive while no daemon runs.
//!
//! Maps stand below a directory named by their layout, links beside it: a daemon with another layout fills new maps and
//! then puts its programs into the same links.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use aya::programs::{
    SchedClassifier,
    links::{FdLink, PinnedLink},
};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use tracing::info;
use tunroute_common::maps::{LAYOUT_VERSION, names};

use super::{DatapathError, Method, Result, words::WORDS};
use crate::{
    policy::fast::{Attachment, Part},
    policy::net::{IfIndex, Link},
};

/// Where bpffs belongs.
const BPFFS: &str = "/sys/fs/bpf";
/// The directory of pinned links, below the pin directory.
const LINKS: &str = "links";

/// The directory with everything that is pinned.
pub(super) struct Pins {
    root: PathBuf,
    /// The maps of this layout.
    pub(super) maps: PathBuf,
    links: PathBuf,
}

impl Pins {
    /// The directories, which need not be there.
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), maps: root.join(format!("v{LAYOUT_VERSION}")), links: root.join(LINKS) }
    }

    /// Makes the directories, and mounts bpffs where it is missing.
    pub(super) fn create(root: &Path) -> Result<Self> {
        let pins = Self::new(root);
        pins.make()?;
        Ok(pins)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the directories where they are missing, and mounts bpffs first.
    pub(super) fn make(&self) -> Result<()> {
        mount_bpffs(&self.root)?;
        for directory in [&self.maps, &self.links] {
            fs::create_dir_all(directory)
                .map_err(|source| DatapathError::PinDir { path: directory.clone(), source })?;
        }
        Ok(())
    }

    /// A recreated device has another number, so it never meets the link of its predecessor. Links and filters have
    /// names of their own, so that each is found by a daemon that attaches in the other way.
    pub(super) fn path(&self, method: Method, attachment: &Attachment) -> PathBuf {
        let Attachment { hook, ifindex, .. } = attachment;
        let part = match attachment.part {
            Part::Decide => "",
            Part::Clamp => "mss-",
            Part::Xdp => return self.links.join(format!("xdp-{ifindex}")),
        };
        self.links.join(match method {
            Method::Tcx => format!("{part}{hook}-{ifindex}"),
            Method::Clsact => format!("filter-{part}{hook}-{ifindex}"),
        })
    }

    /// Returns true if the maps are still pinned: another process may have removed them, or unmounted bpffs.
    pub(super) fn maps_pinned(&self) -> bool {
        names::ALL.iter().chain([&WORDS]).all(|name| self.maps.join(name).exists())
    }

    pub(super) fn is_pinned(&self, method: Method, attachment: &Attachment) -> bool {
        self.path(method, attachment).exists()
    }

    /// The link that an earlier daemon has pinned.
    pub(super) fn pinned(&self, attachment: &Attachment) -> Result<Option<FdLink>> {
        let path = self.path(Method::Tcx, attachment);
        if !path.exists() {
            return Ok(None);
        }
        let link = PinnedLink::from_pin(&path).map_err(|source| DatapathError::Link { path, source })?;
        Ok(Some(link.into()))
    }

    pub(super) fn pin(&self, attachment: &Attachment, link: FdLink) -> Result<FdLink> {
        let path = self.path(Method::Tcx, attachment);
        Ok(link.pin(&path).map_err(|source| DatapathError::Pin { path, source })?.into())
    }

    /// Remembers a filter on a qdisc, which has no link to pin.
    pub(super) fn pin_program(&self, attachment: &Attachment, program: &mut SchedClassifier) -> Result<()> {
        self.unpin(Method::Clsact, attachment);
        let path = self.path(Method::Clsact, attachment);
        program.pin(&path).map_err(|source| DatapathError::Pin { path, source })
    }

    pub(super) fn unpin(&self, method: Method, attachment: &Attachment) {
        // One that is not there is removed.
        let _gone = fs::remove_file(self.path(method, attachment));
    }

    /// Removes what belongs to devices that are gone.
    pub(super) fn forget_missing(&self, links: &BTreeMap<IfIndex, Link>) {
        for (name, ifindex) in self.entries() {
            if !links.contains_key(&ifindex) {
                let _gone = fs::remove_file(self.links.join(name));
            }
        }
    }

    /// Remembers that the device had no clsact qdisc before: pins are the only state that bpffs keeps.
    pub(super) fn mark_qdisc(&self, ifindex: IfIndex, program: &mut SchedClassifier) -> Result<()> {
        let path = self.links.join(format!("qdisc-{ifindex}"));
        if path.exists() {
            return Ok(());
        }
        program.pin(&path).map_err(|source| DatapathError::Pin { path, source })
    }

    pub(super) fn added_qdiscs(&self) -> BTreeSet<IfIndex> {
        self.entries().filter(|(name, _)| name.starts_with("qdisc-")).map(|(_, ifindex)| ifindex).collect()
    }

    /// The names below the link directory with the device's number in each.
    fn entries(&self) -> impl Iterator<Item = (String, IfIndex)> {
        fs::read_dir(&self.links).into_iter().flatten().filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let ifindex = name.rsplit_once('-')?.1.parse().ok()?;
            Some((name, ifindex))
        })
    }

    /// Removes the maps of other layouts, once nothing uses them.
    pub(super) fn remove_other_layouts(&self) {
        for path in layouts(&self.root).filter(|path| *path != self.maps) {
            let _gone = fs::remove_dir_all(path);
        }
    }

    pub(super) fn remove_all(self) -> Result<()> {
        // bpffs: removing a pin lets go of what it held.
        for path in layouts(&self.root).chain([self.links]) {
            match fs::remove_dir_all(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(DatapathError::PinDir { path, source });
                }
                _ => {}
            }
        }
        // It stays if others have something in it, or if bpffs is mounted there.
        let _not_empty = fs::remove_dir(&self.root);
        Ok(())
    }
}

/// Has a daemon pinned anything below the directory?
pub(super) fn any(root: &Path) -> bool {
    root.join(LINKS).exists() || layouts(root).next().is_some()
}

/// The directories of maps of all layouts: `v1`, `v2`, … The pin directory may have others' pins beside them.
fn layouts(root: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let is_layout = |name: &str| name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok());
    fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .filter(move |entry| entry.file_name().to_str().is_some_and(is_layout))
        .map(|entry| entry.path())
}

/// Mounts bpffs on `/sys/fs/bpf`, if the pin directory belongs there and it is missing.
fn mount_bpffs(root: &Path) -> Result<()> {
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(root);
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
    if is_bpffs(existing) {
        return Ok(());
    }
    if !root.starts_with(BPFFS) {
        let source = io::Error::new(io::ErrorKind::Unsupported, "another file system");
        return Err(DatapathError::PinDir { path: root.to_owned(), source });
    }
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=700"),
    )
    .map_err(|source| DatapathError::Mount { path: BPFFS.into(), source })?;
    info!("mounted the bpf file system on {BPFFS}");
    Ok(())
}
