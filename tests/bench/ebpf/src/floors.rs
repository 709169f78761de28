//! The least that a program could do at the ingress device: what no policy router at that place can beat.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the functions are seen by the kernel only")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a helper that returns a small number in a wide register"
)]

mod licence;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action::XDP_PASS},
    helpers::generated::bpf_redirect,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

/// Set before loading: the device to redirect to.
#[unsafe(no_mangle)]
static TARGET: u32 = 0;

/// Receives, and no more.
#[classifier]
pub fn drop_all(_context: TcContext) -> i32 {
    TC_ACT_SHOT
}

/// Receives and sends.
#[classifier]
pub fn redirect_all(_context: TcContext) -> i32 {
    // SAFETY: a number that the loader has set, read once; the helper takes numbers.
    unsafe { bpf_redirect(core::ptr::read_volatile(&raw const TARGET), 0) as i32 }
}

/// Looks at nothing and leaves everything to the kernel.
#[classifier]
pub fn step_aside(_context: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// Sends, before the kernel has made anything of the frame.
#[xdp]
pub fn redirect_early(_context: XdpContext) -> u32 {
    // SAFETY: as above.
    unsafe { bpf_redirect(core::ptr::read_volatile(&raw const TARGET), 0) as u32 }
}

/// Looks at nothing and leaves everything to the kernel, as early.
#[xdp]
pub fn step_aside_early(_context: XdpContext) -> u32 {
    XDP_PASS
}
