//! Which programs stand at a TCX hook.
//!
//! aya's `SchedClassifier::query_tcx()` goes on to open each program by its number, for which `CAP_SYS_ADMIN` is needed
//! (`bpf_prog_get_fd_by_id()` in `kernel/bpf/syscall.c`); the numbers are enough here, and for them `CAP_NET_ADMIN` is.

use std::io;

use crate::{policy::fast::Hook, policy::net::IfIndex};

/// `BPF_PROG_QUERY` of `enum bpf_cmd` in `include/uapi/linux/bpf.h`.
const PROG_QUERY: libc::c_long = 16;
/// Of `enum bpf_attach_type`.
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
/// Maximum number of programs at one hook (`BPF_MPROG_MAX` in `include/linux/bpf_mprog.h`).
const ROOM: u32 = 64;

/// The part of `union bpf_attr` that belongs to `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct Query {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    /// Where the numbers go.
    program_ids: u64,
    /// How many there is room for; then, how many there are.
    count: u32,
    padding: u32,
    unused: [u64; 4],
}

/// The numbers of the programs at a hook, in the order in which they run.
pub(crate) fn programs(hook: Hook, ifindex: IfIndex) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; ROOM as usize];
    let attach_type = match hook {
        Hook::Ingress => TCX_INGRESS,
        Hook::Egress => TCX_EGRESS,
    };
    let mut query =
        Query { ifindex, attach_type, program_ids: ids.as_mut_ptr() as u64, count: ROOM, ..Query::default() };
    // SAFETY: the kernel reads and writes as many bytes of `query` as it is told, and writes at most `count` numbers to
    // `ids`; both live until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(query.count as usize).collect())
}
