//! A foreign program that lets everything pass: at a TCX hook, where the kernel has these, or as XDP.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::{netns::Netns, snapshot::has_tcx};

/// `BPF_PROG_LOAD`, `BPF_LINK_CREATE` in `include/uapi/linux/bpf.h`.
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const PROG_TYPE_XDP: u32 = 6;
const XDP: u32 = 37;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
/// `r0 = TC_ACT_UNSPEC` and `r0 = XDP_PASS`: `BPF_ALU64 | BPF_MOV | BPF_K` of `struct bpf_insn`.
const UNSPEC: u64 = 0xffff_ffff_0000_00b7;
const PASS: u64 = 0x0000_0002_0000_00b7;
/// `BPF_JMP | BPF_EXIT`
const EXIT: u64 = 0x95;

/// A program of two instructions, attached to a device. Dropping it detaches it.
#[derive(Debug)]
pub struct ForeignProgram {
    _link: Option<OwnedFd>,
}

impl ForeignProgram {
    /// Attaches one at the end of a device's TCX chain; does nothing before Linux 6.6, which has no TCX.
    ///
    /// # Errors
    /// There is no such device.
    pub fn attach(netns: &Netns, device: &str, ingress: bool) -> Result<Self> {
        if !has_tcx() {
            return Ok(Self { _link: None });
        }
        Self::load(netns, device, (PROG_TYPE_SCHED_CLS, UNSPEC), if ingress { TCX_INGRESS } else { TCX_EGRESS })
    }

    /// Attaches one as XDP.
    ///
    /// # Errors
    /// There is no such device, its driver has no XDP, or there is a program.
    pub fn attach_xdp(netns: &Netns, device: &str) -> Result<Self> {
        Self::load(netns, device, (PROG_TYPE_XDP, PASS), XDP)
    }

    fn load(netns: &Netns, device: &str, (kind, result): (u32, u64), attach_type: u32) -> Result<Self> {
        let ifindex = netns.ifindex(device)?;
        let code = [result, EXIT];
        let licence = c"GPL";
        // The beginning of `union bpf_attr` for each command; the rest is 0.
        let mut load = [0_u64; 16];
        load[0] = u64::from(kind) | (code.len() as u64) << 32;
        load[1] = code.as_ptr() as u64;
        load[2] = licence.as_ptr() as u64;
        // The name, 16 bytes at offset 48.
        load[6..8].copy_from_slice(&[u64::from_ne_bytes(*b"somebody"), u64::from_ne_bytes(*b"_elses\0\0")]);
        netns.run_in(|| {
            let program = bpf(PROG_LOAD, &load).context("cannot load a program")?;
            let mut create = [0_u64; 16];
            create[0] = u64::from(program.as_raw_fd().unsigned_abs()) | u64::from(ifindex) << 32;
            create[1] = u64::from(attach_type);
            let link = bpf(LINK_CREATE, &create).with_context(|| format!("cannot attach to {device}"))?;
            Ok(Self { _link: Some(link) })
        })
    }
}

fn bpf(command: libc::c_long, attributes: &[u64; 16]) -> Result<OwnedFd> {
    // SAFETY: the attributes, and what they point to, live until the call returns.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    let fd = i32::try_from(Errno::result(fd)?)?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
