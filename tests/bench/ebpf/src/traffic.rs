//! The generator, which makes packets under `BPF_PROG_TEST_RUN`, the exits, which count what they get and drop it, and what
//! looks at packets for single scenarios.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the functions are seen by the kernel only")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the halves of words that are wanted, and a helper that returns a small number in a wide register"
)]

mod layout;
mod licence;

use aya_ebpf::{
    bindings::{
        BPF_F_MMAPABLE, TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT},
    },
    helpers::generated::{bpf_ktime_get_ns, bpf_redirect},
    macros::{classifier, map, xdp},
    maps::{Array, PerCpuArray, ProgramArray},
    programs::{TcContext, XdpContext},
};

use crate::layout::{Arrived, BENCH_V4, BENCH_V6, EXIT_MASK, EXITS, FIRST_VNI, FLOWS, Flow, Template, UPLINK};

#[map]
static FLOW_TABLE: Array<Flow> = Array::with_max_entries(FLOWS, BPF_F_MMAPABLE);
#[map]
static TEMPLATE: Array<Template> = Array::with_max_entries(1, 0);
/// The next flow, on each CPU.
#[map]
static POSITION: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);
#[map]
static ARRIVED: PerCpuArray<Arrived> = PerCpuArray::with_max_entries(EXITS, 0);
/// What the watches have seen, by exit.
#[map]
static SEEN: Array<u64> = Array::with_max_entries(EXITS, 0);
/// The program that is tried.
#[map]
static TRIED: ProgramArray = ProgramArray::with_max_entries(1, 0);

const ETHERNET: usize = 14;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Outer IPv4 and UDP headers, the VXLAN header and the inner Ethernet header.
const VXLAN: usize = IPV4_HEADER + 8 + 8 + ETHERNET;
const VXLAN_PORT: u16 = 4789;
const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// Writes the next flow's packet. Frames are recycled with what was done to them, so all headers are written each time.
#[xdp]
pub fn generate(context: XdpContext) -> u32 {
    match write_packet(context.data(), context.data_end()) {
        // SAFETY: the helper takes numbers.
        Some(XDP_REDIRECT) => TEMPLATE.get(0).map_or(0, |template| unsafe { bpf_redirect(template.out, 0) as u32 }),
        verdict => verdict.unwrap_or(0),
    }
}

/// Writes the next flow's packet, and becomes the program that is tried.
#[classifier]
pub fn try_next(context: TcContext) -> i32 {
    if write_packet(context.data(), context.data_end()).is_some() {
        // SAFETY: nothing is held that would have to be given back.
        unsafe { TRIED.tail_call(&context, 0) };
    }
    TC_ACT_SHOT
}

#[inline(always)]
fn write_packet(start: usize, end: usize) -> Option<u32> {
    let template = TEMPLATE.get(0)?;
    let position = POSITION.get_ptr_mut(0)?;
    // SAFETY: this CPU's value of the map.
    let flow = unsafe {
        let flow = FLOW_TABLE.get(*position & (FLOWS - 1))?;
        *position += 1;
        flow
    };
    let [a, b, c, d] = template.ethernet;
    if template.version == 4 {
        if start + ETHERNET + IPV4_HEADER > end {
            return None;
        }
        let (source, destination) = (flow.source[0], flow.destination[0]);
        let mut sum = template.checksum + halves(source) + halves(destination);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        let header = (start + ETHERNET) as *mut u32;
        // SAFETY: within the packet, as just checked. BPF stores may be unaligned where the verifier does not insist.
        unsafe {
            write_ethernet(start, [a, b, c, d]);
            header.write(template.header[0]);
            header.add(1).write(template.header[1]);
            // TTL and protocol come before the checksum in memory: the checksum is the second half of the word.
            header.add(2).write(template.header[2]);
            header.cast::<u16>().add(5).write(!(sum as u16));
            header.add(3).write(source);
            header.add(4).write(destination);
        }
    } else {
        if start + ETHERNET + IPV6_HEADER > end {
            return None;
        }
        let header = (start + ETHERNET) as *mut u32;
        // SAFETY: as above.
        unsafe {
            write_ethernet(start, [a, b, c, d]);
            header.write(template.header[0]);
            header.add(1).write(template.header[1]);
            header.add(2).cast::<[u32; 4]>().write(flow.source);
            header.add(6).cast::<[u32; 4]>().write(flow.destination);
        }
    }
    Some(template.verdict)
}

#[inline(always)]
const fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

/// # Safety
/// `start` is that of a packet with an Ethernet header.
#[inline(always)]
unsafe fn write_ethernet(start: usize, [a, b, c, d]: [u32; 4]) {
    // SAFETY: said above.
    unsafe {
        (start as *mut u32).write(a);
        (start as *mut u32).add(1).write(b);
        (start as *mut u32).add(2).write(c);
        ((start + 12) as *mut u16).write(d as u16);
    }
}

/// On the ingress device: without a native XDP program there, it takes no live frames.
#[xdp]
pub fn enter(_context: XdpContext) -> u32 {
    XDP_PASS
}

/// The exit at the first tunnel, a layer 3 device.
#[classifier]
pub fn exit0(context: TcContext) -> i32 {
    exit_layer3::<0>(&context)
}

/// The exit at the second tunnel.
#[classifier]
pub fn exit1(context: TcContext) -> i32 {
    exit_layer3::<1>(&context)
}

/// The far end of the first tunnel, where that is a veth pair.
#[xdp]
pub fn far0(context: XdpContext) -> u32 {
    far::<0>(&context)
}

/// That of the second one.
#[xdp]
pub fn far1(context: XdpContext) -> u32 {
    far::<1>(&context)
}

#[inline(always)]
fn far<const EXIT: u32>(context: &XdpContext) -> u32 {
    let frame = Bytes { start: context.data(), end: context.data_end() };
    let protocol = frame.read::<u16>(ETHERNET - 2).map_or(0, u32::from);
    if arrive(EXIT, wanted_exit::<ETHERNET>(&frame, protocol)) == TC_ACT_SHOT { XDP_DROP } else { XDP_PASS }
}

/// At the first tunnel, before the exit: when the first packet leaves there.
#[classifier]
pub fn watch0(_context: TcContext) -> i32 {
    see(0)
}

/// At the second tunnel.
#[classifier]
pub fn watch1(_context: TcContext) -> i32 {
    see(1)
}

#[inline(always)]
fn see(exit: u32) -> i32 {
    if let Some(seen) = SEEN.get_ptr_mut(exit) {
        // SAFETY: the map's value; the bench sends on one CPU while it watches.
        unsafe {
            if *seen == 0 {
                *seen = bpf_ktime_get_ns();
            }
        }
    }
    TC_ACT_UNSPEC
}

/// The exit at the uplink, an Ethernet device, which also carries the vxlan tunnels.
#[classifier]
pub fn exit_uplink(context: TcContext) -> i32 {
    let (packet, protocol) = (Bytes::of(&context), protocol(&context));
    let (exit, wanted) = match vni(&packet, protocol) {
        Some(vni) => {
            let inner = packet.read::<u16>(ETHERNET + VXLAN - 2).map_or(0, u32::from);
            (vni.wrapping_sub(FIRST_VNI), wanted_exit::<{ ETHERNET + VXLAN }>(&packet, inner))
        }
        None => (UPLINK, wanted_exit::<ETHERNET>(&packet, protocol)),
    };
    arrive(exit, wanted)
}

#[inline(always)]
fn exit_layer3<const EXIT: u32>(context: &TcContext) -> i32 {
    arrive(EXIT, wanted_exit::<0>(&Bytes::of(context), protocol(context)))
}

#[inline(always)]
fn arrive(exit: u32, wanted: Option<u32>) -> i32 {
    // What the bench did not send, neighbour discovery for instance, is none of its business.
    let Some(wanted) = wanted else { return TC_ACT_UNSPEC };
    if let Some(arrived) = ARRIVED.get_ptr_mut(exit) {
        // SAFETY: this CPU's value; programs on one CPU do not interrupt one another here.
        unsafe {
            if wanted == exit {
                (*arrived).right += 1;
            } else {
                (*arrived).wrong += 1;
            }
        }
    }
    TC_ACT_SHOT
}

#[inline(always)]
fn protocol(context: &TcContext) -> u32 {
    // SAFETY: the context that the kernel gave.
    unsafe { (*context.skb.skb).protocol }
}

/// The bytes of a packet.
struct Bytes {
    start: usize,
    end: usize,
}

impl Bytes {
    #[inline(always)]
    fn of(context: &TcContext) -> Self {
        Self { start: context.data(), end: context.data_end() }
    }

    #[inline(always)]
    fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        let pointer = self.start + offset;
        // SAFETY: within the packet, as is checked first; unaligned as above.
        (pointer + size_of::<T>() <= self.end).then(|| unsafe { (pointer as *const T).read() })
    }
}

/// The network identifier, if this is a VXLAN packet over IPv4 without options.
#[inline(always)]
fn vni(packet: &Bytes, protocol: u32) -> Option<u32> {
    let is_vxlan = protocol == ETH_P_IP
        && packet.read::<u8>(ETHERNET + 9)? == 17
        && packet.read::<u16>(ETHERNET + IPV4_HEADER + 2)? == VXLAN_PORT.to_be();
    if !is_vxlan {
        return None;
    }
    Some(u32::from_be(packet.read::<u32>(ETHERNET + IPV4_HEADER + 8 + 4)?) >> 8)
}

/// The exit that a packet of the bench names; none in others. Its IP header is at `OFFSET`.
#[inline(always)]
fn wanted_exit<const OFFSET: usize>(packet: &Bytes, protocol: u32) -> Option<u32> {
    let last = if protocol == ETH_P_IP {
        let destination = u32::from_be(packet.read(OFFSET + 16)?);
        (destination >> 17 == BENCH_V4).then_some(destination)
    } else if protocol == ETH_P_IPV6 {
        let [a, b, _, last] = packet.read::<[u32; 4]>(OFFSET + 24)?.map(u32::from_be);
        ([a, b >> 16] == BENCH_V6).then_some(last)
    } else {
        None
    };
    last.map(|last| last & EXIT_MASK)
}
