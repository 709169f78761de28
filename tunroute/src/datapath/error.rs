//! What can go wrong with programs and maps.

use std::{io, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    pin::PinError,
    programs::{ProgramError, links::LinkError, tc},
};

use crate::{policy::net::IfIndex, prefixes::index::Full};

/// What went wrong with the fast path.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// This binary has no eBPF object.
    #[error("this binary was built without its eBPF programs (AYA_BUILD_SKIP=1); build it with `cargo xtask run`")]
    NoObject,
    /// The pin directory cannot be used.
    #[error("cannot use {} for pinned maps: {source}; it must be on a bpf file system", path.display())]
    PinDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// bpffs cannot be mounted.
    #[error("cannot mount the bpf file system on {}: {source}", path.display())]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// What the system said.
        source: nix::Error,
    },
    /// The kernel refused a map or program.
    #[error("cannot load the eBPF programs: {}", chain(.0))]
    Load(#[from] EbpfError),
    /// The kernel refused a program.
    #[error("cannot load or attach eBPF program {program}: {}", chain(.source))]
    Program {
        /// Which one.
        program: &'static str,
        /// What the kernel said.
        source: ProgramError,
    },
    /// A program or map that should be in the object is not there.
    #[error("the eBPF object has no {0}; the binary is damaged")]
    Missing(&'static str),
    /// A map operation failed.
    #[error("cannot write BPF map {map}: {}", chain(.source))]
    Map {
        /// Which one.
        map: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// The map of prefixes could not be made or published.
    #[error("cannot make or publish the BPF map of prefixes: {source}")]
    Words {
        /// What the system said.
        source: io::Error,
    },
    /// The map of prefixes is too small.
    #[error("the BPF map of prefixes needs {} MiB", (.0.needed * 8).div_ceil(1 << 20))]
    Full(Full),
    /// A link could not be pinned.
    #[error("cannot pin {}: {}", path.display(), chain(.source))]
    Pin {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: PinError,
    },
    /// A pinned link could not be used.
    #[error("cannot use the pinned link {}: {}", path.display(), chain(.source))]
    Link {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: LinkError,
    },
    /// A program for trials is not what runs.
    #[error("the kernel has another eBPF program {program} than this daemon would load; restart the daemon")]
    NoTwin {
        /// Which one.
        program: &'static str,
    },
    /// The pinned maps are not those that the programs use.
    #[error("the maps pinned in {} are not those of the loaded programs; restart the daemon", path.display())]
    OtherMaps {
        /// The directory.
        path: PathBuf,
    },
    /// A device has no name, since it is gone.
    #[error("the device with ifindex {ifindex} is gone: {source}")]
    Device {
        /// Its number.
        ifindex: IfIndex,
        /// What the system said.
        source: nix::Error,
    },
    /// A device was renamed while a program was attached to it.
    #[error("{name} (ifindex {ifindex}) was renamed while a program was attached; trying again")]
    Renamed {
        /// Its number.
        ifindex: IfIndex,
        /// The name that it had.
        name: String,
    },
    /// The clsact qdisc could not be added.
    #[error("cannot add the clsact qdisc to {device}: {}", chain(.source))]
    Clsact {
        /// The device.
        device: String,
        /// What the kernel said.
        source: tc::TcError,
    },
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
