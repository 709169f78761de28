//! What daemons have left in the kernel: finding and removing it takes no loaded programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::{
    Datapath, Method, Result,
    attach::clsact_filter,
    attachments,
    pins::{self, Pins},
};
use crate::{
    policy::fast::Attachment,
    policy::net::{IfIndex, Link},
};

/// Detaches what daemons of this project have attached to these devices, in whatever way, and removes their pins, and with
/// them what is left of the maps. Returns the devices whose clsact qdisc a daemon has added.
///
/// # Errors
///
/// If a filter or a pin cannot be removed.
pub fn remove(pin_dir: &Path, links: &BTreeMap<IfIndex, Link>) -> Result<BTreeSet<IfIndex>> {
    let pins = Pins::new(pin_dir);
    let qdiscs = pins.added_qdiscs();
    // A link goes with its pin. A filter does not.
    for attachment in links.values().flat_map(attachments) {
        if pins.is_pinned(Method::Clsact, &attachment) {
            drop(clsact_filter(&attachment)?);
        }
    }
    pins.remove_all()?;
    Ok(qdiscs)
}

/// Has an earlier daemon left a program at all of these places?
#[must_use]
pub fn left_attached(pin_dir: &Path, attachments: &[Attachment]) -> bool {
    let pins = Pins::new(pin_dir);
    let is_pinned = |attachment| [Method::Tcx, Method::Clsact].iter().any(|way| pins.is_pinned(*way, attachment));
    attachments.iter().all(is_pinned)
}

/// Has a daemon left anything pinned below the directory?
#[must_use]
pub fn anything_pinned(pin_dir: &Path) -> bool {
    pins::any(pin_dir)
}

impl Datapath {
    /// As [`remove`], with what is attached and no longer pinned.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn remove(mut self, links: &BTreeMap<IfIndex, Link>) -> Result<BTreeSet<IfIndex>> {
        for attachment in std::mem::take(&mut self.state.pinned) {
            self.detach(self.method, &attachment)?;
        }
        let (root, mut qdiscs) = (self.pins.root().to_owned(), std::mem::take(&mut self.qdiscs));
        drop(self);
        qdiscs.extend(remove(&root, links)?);
        Ok(qdiscs)
    }
}
