//! The program that decides before there is an skb, attached by a link of its own kind, and the tunnels that take frames.

use aya::{
    Ebpf,
    programs::{
        Xdp, XdpMode,
        links::{FdLink, LinkError},
        loaded_programs,
        xdp::XdpLink,
    },
    util::KernelVersion,
};
use tracing::debug;

use super::{Datapath, DatapathError, Method, Result, error::chain, key};
use crate::policy::fast::Attachment;

/// Its name in the object.
pub(super) const PROGRAM: &str = "ingress_xdp";

/// Can the program do anything on this kernel? It asks for link-layer addresses by a policy's table, which takes Linux 6.5
/// (`BPF_FIB_LOOKUP_TBID`, commit 8ad77e72caae).
pub(crate) fn is_usable() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 5, 0))
}

pub(super) fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    let program = ebpf.program_mut(PROGRAM).ok_or(DatapathError::Missing(PROGRAM))?;
    program.try_into().map_err(|source| DatapathError::Program { program: PROGRAM, source })
}

impl Datapath {
    /// Attaches to the driver, never to the generic hook, which is slower than the programs behind it; where an earlier
    /// program of this project is in place, it is replaced without a gap.
    pub(super) fn attach_xdp(&mut self, attachment: &Attachment) -> Result<()> {
        let program_error = |source| DatapathError::Program { program: PROGRAM, source };
        let path = self.pins.path(Method::Tcx, attachment);
        let link_error = |source: LinkError| DatapathError::Link { path, source };
        let place = key(attachment);
        let pinned = self.pins.is_pinned(Method::Tcx, attachment);
        let earlier = match self.links.remove(&place) {
            None => self.pins.pinned(attachment)?,
            held => held,
        };
        let program = program(&mut self.ebpf)?;
        let updated = earlier.and_then(|link| {
            let link = XdpLink::try_from(link).ok()?;
            let updated = program.attach_to_link(link);
            updated.inspect_err(|error| debug!(%attachment, "attaching anew: {}", chain(error))).ok()
        });
        let keep_pin = pinned && updated.is_some();
        let id = match updated {
            Some(id) => id,
            None => {
                self.pins.unpin(Method::Tcx, attachment);
                program.attach_to_if_index(attachment.ifindex, XdpMode::Driver).map_err(program_error)?
            }
        };
        let link = program.take_link(id).map_err(program_error)?;
        let link = FdLink::try_from(link).map_err(link_error)?;
        let link = if keep_pin { link } else { self.pins.pin(attachment, link)? };
        self.links.insert(place, link);
        Ok(())
    }

    /// Does the link that is held have this daemon's program, which has the number, or an earlier daemon's that is as good?
    pub(super) fn runs_xdp(&self, attachment: &Attachment, id: u32) -> bool {
        let Some(Ok(link)) = self.links.get(&key(attachment)).map(FdLink::info) else { return false };
        // Looking at others' programs takes CAP_SYS_ADMIN: see `adopt`.
        let is_as_good = || {
            let found = loaded_programs().flatten().find(|program| program.id() == link.program_id());
            found.is_some_and(|program| self.loaded.is(PROGRAM, &program))
        };
        link.program_id() == id || is_as_good()
    }
}
