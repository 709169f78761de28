//! What others do to a host for which there is no program that every host has.

use std::{ffi::CString, os::unix::ffi::OsStrExt as _, path::Path};

use anyhow::{Context as _, Result};
use nix::errno::Errno;

/// `BPF_OBJ_GET` and `BPF_LINK_DETACH` in `include/uapi/linux/bpf.h`.
const OBJ_GET: libc::c_int = 7;
const LINK_DETACH: libc::c_int = 34;

fn bpf(command: libc::c_int, attributes: &[u64; 4]) -> Result<libc::c_long> {
    // SAFETY: the attributes live until the call returns, and what they point to does.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    Errno::result(result).with_context(|| format!("bpf({command})"))
}

/// Detaches a pinned link by force, as `bpftool link detach` does.
pub fn detach_link(pin: &Path) -> Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let link = bpf(OBJ_GET, &[path.as_ptr() as u64, 0, 0, 0])?;
    let link = u32::try_from(link)?;
    let detached = bpf(LINK_DETACH, &[link.into(), 0, 0, 0]);
    // SAFETY: the descriptor was made above and is nobody else's.
    unsafe { libc::close(i32::try_from(link)?) };
    detached.map(drop)
}
