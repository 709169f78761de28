//! Programs on skbs are attached and detached: by TCX links, or as filters on clsact qdiscs.

use std::collections::BTreeSet;

use aya::programs::{
    LinkOrder, ProgramError, ProgramInfo, SchedClassifier, TcAttachType,
    links::{FdLink, LinkError},
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use nix::net::if_::if_indextoname;
use tracing::debug;

use super::{Datapath, DatapathError, Method, Result, classifier, error::chain, key, tcx};
use crate::{
    policy::fast::{Attachment, Hook, Part},
    policy::net::IfIndex,
};

/// Where the filters stand on a clsact qdisc, so that a later daemon finds them again: ahead of the priorities that
/// others let the kernel choose (49152 and down).
const CLSACT_PRIORITY: u16 = 1;

impl Datapath {
    /// Attaches ahead of all others; where an earlier program of this project is in place, it is replaced without a gap.
    pub(super) fn attach(&mut self, attachment: &Attachment) -> Result<()> {
        match self.method {
            Method::Tcx => self.attach_link(attachment),
            Method::Clsact => self.attach_filter(attachment),
        }
    }

    fn attach_link(&mut self, attachment: &Attachment) -> Result<()> {
        let name = attachment.program();
        let path = self.pins.path(Method::Tcx, attachment);
        let link_error = |source: LinkError| DatapathError::Link { path: path.clone(), source };
        let program = classifier(&mut self.ebpf, name)?;
        let place = key(attachment);
        let pinned = self.pins.is_pinned(Method::Tcx, attachment);
        let earlier = match self.links.remove(&place) {
            None => self.pins.pinned(attachment)?,
            held => held,
        };
        let updated = match earlier {
            None => None,
            // A recreated device leaves a link that opens but fails to update (ENOLINK).
            Some(link) => program
                .attach_to_link(SchedClassifierLink::try_from(link).map_err(link_error)?)
                .inspect_err(|error| debug!(%attachment, "attaching anew: {}", chain(error)))
                .ok(),
        };
        let keep_pin = pinned && updated.is_some();
        let link = match updated {
            Some(id) => program.take_link(id).map_err(program_error(name))?,
            None => {
                self.pins.unpin(Method::Tcx, attachment);
                // Where a segment size is limited, that comes before packets are handed on.
                let clamp = key(&Attachment { part: Part::Clamp, ..attachment.clone() });
                let before = self.links.remove(&clamp).map(SchedClassifierLink::try_from);
                let before = before.transpose().map_err(link_error)?;
                let attached = by_name(attachment.ifindex, |device| {
                    let order = match &before {
                        Some(before) => LinkOrder::after_link(before).map_err(link_error)?,
                        None => LinkOrder::first(),
                    };
                    let hook = attach_type(attachment.hook);
                    let id = program.attach_with_options(device, hook, TcAttachOptions::TcxOrder(order));
                    id.and_then(|id| program.take_link(id)).map_err(program_error(name))
                });
                if let Some(before) = before {
                    self.links.insert(clamp, FdLink::try_from(before).map_err(link_error)?);
                }
                attached?
            }
        };
        let link = FdLink::try_from(link).map_err(link_error)?;
        let link = if keep_pin { link } else { self.pins.pin(attachment, link)? };
        self.links.insert(place, link);
        Ok(())
    }

    fn attach_filter(&mut self, attachment: &Attachment) -> Result<()> {
        let name = attachment.program();
        let program = classifier(&mut self.ebpf, name)?;
        let added = by_name(attachment.ifindex, |device| match tc::qdisc_add_clsact(device) {
            Ok(()) => Ok(true),
            Err(tc::TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(source) => Err(DatapathError::Clsact { device: device.to_owned(), source }),
        })?;
        if added {
            self.qdiscs.insert(attachment.ifindex);
            self.pins.mark_qdisc(attachment.ifindex, program)?;
        }
        let link = match program.attach_to_link(clsact_filter(attachment)?) {
            Ok(replaced) => program.take_link(replaced).map_err(program_error(name))?,
            Err(error) => {
                debug!(%attachment, "attaching anew: {}", chain(&error));
                by_name(attachment.ifindex, |device| {
                    let options = TcAttachOptions::Netlink(clsact(attachment));
                    let id = program.attach_with_options(device, attach_type(attachment.hook), options);
                    id.and_then(|id| program.take_link(id)).map_err(program_error(name))
                })?
            }
        };
        // A filter's handle that is dropped removes the filter; it has nothing else to let go of.
        std::mem::forget(link);
        self.pins.pin_program(attachment, program)
    }

    pub(super) fn detach(&mut self, method: Method, attachment: &Attachment) -> Result<()> {
        match method {
            _ if attachment.part == Part::Xdp => drop(self.links.remove(&key(attachment))),
            Method::Tcx => drop(self.links.remove(&key(attachment))),
            // Dropping a filter's handle removes the filter.
            Method::Clsact => drop(clsact_filter(attachment)?),
        }
        self.pins.unpin(method, attachment);
        Ok(())
    }

    /// Does this daemon's program, which has the number, or an earlier daemon's that is as good, stand at its hook?
    pub(super) fn runs(&self, attachment: &Attachment, id: u32) -> bool {
        if tcx::programs(attachment.hook, attachment.ifindex).is_ok_and(|programs| programs.contains(&id)) {
            return true;
        }
        // This takes CAP_SYS_ADMIN: see `adopt`.
        let query = |name: &str| {
            SchedClassifier::query_tcx(name, attach_type(attachment.hook)).map_err(program_error(attachment.program()))
        };
        by_name(attachment.ifindex, query)
            .is_ok_and(|(_, programs)| programs.iter().any(|info| self.loaded.is(attachment.program(), info)))
    }

    /// Is an earlier daemon's program, which is as good as this daemon's, the filter? It is pinned.
    pub(super) fn is_filter(&self, attachment: &Attachment, filters: &BTreeSet<(Hook, IfIndex, u32)>) -> bool {
        let info = ProgramInfo::from_pin(self.pins.path(Method::Clsact, attachment));
        info.is_ok_and(|info| {
            filters.contains(&(attachment.hook, attachment.ifindex, info.id()))
                && self.loaded.is(attachment.program(), &info)
        })
    }
}

/// Does something to a device by its name, which is all that aya takes, and makes sure that it was this device: names may be
/// exchanged at any time. What has been done to another one is undone by dropping it.
fn by_name<T>(ifindex: IfIndex, act: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let name = || match if_indextoname(ifindex) {
        Ok(name) => Ok(name.to_string_lossy().into_owned()),
        Err(source) => Err(DatapathError::Device { ifindex, source }),
    };
    let before = name()?;
    let done = act(&before)?;
    if name()? == before { Ok(done) } else { Err(DatapathError::Renamed { ifindex, name: before }) }
}

fn program_error(program: &'static str) -> impl Fn(ProgramError) -> DatapathError {
    move |source| DatapathError::Program { program, source }
}

/// Where an attachment's filter stands on a clsact qdisc: at a handle of its own.
const fn clsact(attachment: &Attachment) -> NlOptions {
    // Segment sizes are limited before packets are handed on.
    let (minor, priority) = match attachment.part {
        Part::Clamp => (0x7473, CLSACT_PRIORITY),
        // XDP has no filters.
        Part::Decide | Part::Xdp => (0x7472, CLSACT_PRIORITY + 1),
    };
    NlOptions { priority, handle: TcHandle::new(0, minor), classid: None }
}

const fn attach_type(hook: Hook) -> TcAttachType {
    match hook {
        Hook::Ingress => TcAttachType::Ingress,
        Hook::Egress => TcAttachType::Egress,
    }
}

/// The filter that this daemon or an earlier one has on a clsact qdisc.
pub(super) fn clsact_filter(attachment: &Attachment) -> Result<SchedClassifierLink> {
    let NlOptions { priority, handle, classid } = clsact(attachment);
    by_name(attachment.ifindex, |device| {
        SchedClassifierLink::attached(device, attach_type(attachment.hook), priority, handle, classid)
            .map_err(|error| program_error(attachment.program())(tc::TcError::IoError(error).into()))
    })
}
