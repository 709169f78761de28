//! Makes packets and counts where they come out. The programs are in `ebpf/src/traffic.rs`.

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{Mutex, RwLock},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, TestRun as _, TestRunAttrs, TestRunOptions,
    maps::{Array, Map, MapData, PerCpuArray, ProgramArray},
    programs::{
        LinkOrder, ProgramFd, SchedClassifier, TcAttachType, Xdp, XdpMode,
        tc::{SchedClassifierLink, TcAttachOptions},
        xdp::XdpLink,
    },
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use tunroute::policy::net::Family;
use tunroute_tests::Mac;

use crate::layout::{Arrived, EXITS, FLOWS, Flow, Template};

/// Packets that the kernel makes before it hands them to the stack together (`xdp_test_run_batch()` in
/// `net/bpf/test_run.c`), like a NAPI poll.
pub const BATCH: u32 = 64;
/// `enum xdp_action` in `include/uapi/linux/bpf.h`: the packet goes nowhere, into the stack, or out of a device.
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
/// The place of `ifindex` in `struct __sk_buff`, and the struct's length (`include/uapi/linux/bpf.h`).
const CONTEXT_IFINDEX: usize = 40;
const CONTEXT: usize = 192;
/// Ethernet and UDP headers.
const ETHERNET: u16 = 14;
const UDP: u16 = 8;
/// The discard port.
const PORT: u16 = 9;

/// The packets to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The whole Ethernet frame without its checksum, in bytes.
    pub size: u16,
}

/// Where packets are put in: a device's number in this thread's namespace.
#[derive(Clone, Copy, Debug)]
pub enum Entry {
    /// As if the device had received them, and its driver had made skbs of them.
    Received(u32),
    /// The device sends them, to the other end of the wire, whose driver receives them as frames.
    Sent(u32),
}

/// Packets that were sent, how long it took, and where they came out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// Number of packets.
    pub packets: u64,
    /// As the kernel has measured it.
    pub time: Duration,
}

impl Sent {
    /// Nanoseconds for one.
    #[must_use]
    pub fn nanoseconds_each(&self) -> f64 {
        self.time.as_nanos() as f64 / self.packets as f64
    }
}

/// What came out, by exit.
pub type Arrivals = [Arrived; EXITS as usize];

/// The programs, loaded once for all sites.
pub struct Generator {
    ebpf: RwLock<Ebpf>,
    flows: MapData,
    template: Mutex<Array<MapData, Template>>,
    arrived: PerCpuArray<MapData, Arrived>,
    seen: Mutex<Array<MapData, u64>>,
    tried: Mutex<ProgramArray<MapData>>,
    macs: (Mac, Mac),
}

// SAFETY: plain data without padding.
unsafe impl aya::Pod for Template {}
// SAFETY: as above.
unsafe impl aya::Pod for Arrived {}

impl Generator {
    /// Loads the programs. Frames go from the first MAC address to the second.
    ///
    /// # Errors
    /// The kernel refuses them: see that this is root on Linux 6.6 or newer.
    pub fn load(macs: (Mac, Mac)) -> Result<Self> {
        let mut ebpf = Ebpf::load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/traffic")))
            .context("cannot load the bench's eBPF programs")?;
        for name in ["generate", "enter", "far0", "far1"] {
            let program: &mut Xdp = ebpf.program_mut(name).context("a program is missing")?.try_into()?;
            program.load()?;
        }
        for name in ["exit0", "exit1", "exit_uplink", "watch0", "watch1", "try_next"] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).context("a program is missing")?.try_into()?;
            program.load()?;
        }
        let Some(Map::Array(flows)) = ebpf.take_map("FLOW_TABLE") else { bail!("the map of flows is missing") };
        let template = Mutex::new(Array::try_from(ebpf.take_map("TEMPLATE").context("a map is missing")?)?);
        let arrived = PerCpuArray::try_from(ebpf.take_map("ARRIVED").context("a map is missing")?)?;
        let seen = Mutex::new(Array::try_from(ebpf.take_map("SEEN").context("a map is missing")?)?);
        let tried = Mutex::new(ProgramArray::try_from(ebpf.take_map("TRIED").context("a map is missing")?)?);
        Ok(Self { ebpf: RwLock::new(ebpf), flows, template, arrived, seen, tried, macs })
    }

    /// Attaches an exit at the end of the egress chain of a device of this thread's namespace.
    ///
    /// # Errors
    /// There is no such device, or the kernel has no TCX (before 6.6).
    pub fn attach_exit(&self, program: &str, device: &str) -> Result<SchedClassifierLink> {
        self.attach(program, device, LinkOrder::last())
    }

    /// Attaches a watch at the beginning of the egress chain.
    ///
    /// # Errors
    /// As [`Self::attach_exit`].
    pub fn attach_watch(&self, program: &str, device: &str) -> Result<SchedClassifierLink> {
        self.attach(program, device, LinkOrder::first())
    }

    fn attach(&self, program: &str, device: &str, order: LinkOrder) -> Result<SchedClassifierLink> {
        let mut ebpf = self.ebpf.write().map_err(|_| poisoned())?;
        let program: &mut SchedClassifier = ebpf.program_mut(program).context("a program is missing")?.try_into()?;
        let options = TcAttachOptions::TcxOrder(order);
        let link = program.attach_with_options(device, TcAttachType::Egress, options)?;
        Ok(program.take_link(link)?)
    }

    /// Makes a device of this thread's namespace take live frames.
    ///
    /// # Errors
    /// There is no such device, or its driver has no XDP.
    pub fn attach_entry(&self, device: &str) -> Result<XdpLink> {
        self.attach_xdp("enter", device)
    }

    /// Attaches the far end of a tunnel to a device of this thread's namespace, which takes frames from XDP.
    ///
    /// # Errors
    /// As [`Self::attach_entry`].
    pub fn attach_far(&self, program: &str, device: &str) -> Result<XdpLink> {
        self.attach_xdp(program, device)
    }

    fn attach_xdp(&self, program: &str, device: &str) -> Result<XdpLink> {
        let mut ebpf = self.ebpf.write().map_err(|_| poisoned())?;
        let program: &mut Xdp = ebpf.program_mut(program).context("a program is missing")?.try_into()?;
        let link = program.attach(device, XdpMode::Driver)?;
        Ok(program.take_link(link)?)
    }

    /// Keeps the generator in the kernel's dispatcher for XDP programs, by a device of this thread's namespace at which no
    /// packets arrive: otherwise each run waits for grace periods, 30 ms, while it is put there and taken away again
    /// (`bpf_prog_change_xdp()` in `net/core/filter.c`).
    ///
    /// # Errors
    /// There is no such device.
    pub fn hold(&self, device: &str) -> Result<XdpLink> {
        let mut ebpf = self.ebpf.write().map_err(|_| poisoned())?;
        let program: &mut Xdp = ebpf.program_mut("generate").context("a program is missing")?.try_into()?;
        let link = program.attach(device, XdpMode::Skb)?;
        Ok(program.take_link(link)?)
    }

    /// Says which flows the next packets have.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_flows(&self, flows: &[Flow]) -> Result<()> {
        ensure!(flows.len() == FLOWS as usize, "the generator takes {FLOWS} flows, not {}", flows.len());
        let bytes: &[u8] = bytemuck::cast_slice(flows);
        let fd = self.flows.fd().as_fd().as_raw_fd();
        // SAFETY: a new mapping of the map's values, which are as long as `bytes`; it is written, and removed again.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(std::ptr::null_mut(), bytes.len(), protection, libc::MAP_SHARED, fd, 0);
            if start == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error()).context("cannot map the table of flows");
            }
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.cast(), bytes.len());
            libc::munmap(start, bytes.len());
        }
        Ok(())
    }

    /// Sends at least `packets` packets.
    ///
    /// # Errors
    /// The device takes no live frames: see [`Self::attach_entry`].
    pub fn send(&self, frame: Frame, entry: Entry, packets: u32) -> Result<Sent> {
        match entry {
            Entry::Received(ifindex) => self.run(frame, ifindex, packets, XDP_PASS),
            Entry::Sent(ifindex) => self.run(frame, ifindex, packets, XDP_REDIRECT),
        }
    }

    /// Makes packets and drops them at once: what the generator itself costs.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_nowhere(&self, frame: Frame, entry: Entry, packets: u32) -> Result<Sent> {
        let (Entry::Received(ifindex) | Entry::Sent(ifindex)) = entry;
        self.run(frame, ifindex, packets, XDP_DROP)
    }

    fn run(&self, frame: Frame, ifindex: u32, packets: u32, verdict: u32) -> Result<Sent> {
        let packets = packets.max(1).next_multiple_of(BATCH);
        let (template, data) = template(frame, self.macs, verdict)?;
        let template = Template { out: ifindex, ..template };
        let mut map = self.template.lock().map_err(|_| poisoned())?;
        map.set(0, template, 0).context("cannot write the generator's template")?;
        drop(map);
        // `struct xdp_md` of `include/uapi/linux/bpf.h`: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
        // egress_ifindex.
        let context = [0, u32::try_from(data.len())?, 0, ifindex, 0, 0];
        let ebpf = self.ebpf.read().map_err(|_| poisoned())?;
        let program: &Xdp = ebpf.program("generate").context("a program is missing")?.try_into()?;
        let result = program.test_run(TestRunOptions {
            data_in: Some(&data),
            ctx_in: Some(bytemuck::cast_slice(&context)),
            repeat: packets,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::default()
        })?;
        Ok(Sent { packets: packets.into(), time: result.duration * packets })
    }

    /// Runs a TC program alone on packets of the flows, as if a device of this thread's namespace had received them. What
    /// it does with them is not done (`bpf_prog_test_run_skb()` in `net/bpf/test_run.c`); only the time is told.
    ///
    /// # Errors
    /// The kernel refuses: there is no such device, for instance.
    pub fn try_program(&self, program: &ProgramFd, frame: Frame, ifindex: u32, packets: u32) -> Result<Sent> {
        let (template, data) = template(frame, self.macs, XDP_PASS)?;
        self.template.lock().map_err(|_| poisoned())?.set(0, template, 0).context("cannot write the template")?;
        let mut tried = self.tried.lock().map_err(|_| poisoned())?;
        tried.set(0, program, 0).context("the kernel does not let the bench call the program")?;
        let mut context = [0; CONTEXT];
        context[CONTEXT_IFINDEX..CONTEXT_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        let ebpf = self.ebpf.read().map_err(|_| poisoned())?;
        let caller: &SchedClassifier = ebpf.program("try_next").context("a program is missing")?.try_into()?;
        // The kernel tells whole nanoseconds for each packet only.
        let start = Instant::now();
        caller.test_run(TestRunOptions {
            data_in: Some(&data),
            ctx_in: Some(&context),
            repeat: packets,
            ..TestRunOptions::default()
        })?;
        let time = start.elapsed();
        tried.clear_index(&0)?;
        Ok(Sent { packets: packets.into(), time })
    }

    /// Forgets what the watches have seen.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn forget_seen(&self) -> Result<()> {
        let mut seen = self.seen.lock().map_err(|_| poisoned())?;
        for exit in 0..EXITS {
            seen.set(exit, 0, 0).context("cannot write what was seen")?;
        }
        Ok(())
    }

    /// When the watch at an exit has seen the first packet, in nanoseconds of `CLOCK_MONOTONIC`; 0 for never.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn seen(&self, exit: u32) -> Result<u64> {
        self.seen.lock().map_err(|_| poisoned())?.get(&exit, 0).context("cannot read what was seen")
    }

    /// What has come out so far, on all CPUs.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn arrivals(&self) -> Result<Arrivals> {
        let mut arrivals = Arrivals::default();
        for (index, sum) in (0..).zip(&mut arrivals) {
            for arrived in self.arrived.get(&index, 0).context("cannot read what has arrived")?.iter() {
                sum.right += arrived.right;
                sum.wrong += arrived.wrong;
            }
        }
        Ok(arrivals)
    }
}

fn poisoned() -> anyhow::Error {
    anyhow::anyhow!("another thread has failed while it used the generator")
}

/// What the generator writes into each packet, and the whole packet as the kernel lays it out at first.
fn template(frame: Frame, (from, to): (Mac, Mac), verdict: u32) -> Result<(Template, Vec<u8>)> {
    let l3 = frame.size.checked_sub(ETHERNET).context("a frame is at least its headers")?;
    let mut ethernet = [0_u8; 16];
    ethernet[..6].copy_from_slice(&to.0);
    ethernet[6..12].copy_from_slice(&from.0);
    let mut header = [0_u8; 12];
    let (version, header_length) = match frame.family {
        Family::V4 => {
            ethernet[12..14].copy_from_slice(&0x0800_u16.to_be_bytes());
            header[0] = 0x45;
            header[2..4].copy_from_slice(&l3.to_be_bytes());
            // A TTL of 64, and UDP.
            (header[8], header[9]) = (64, 17);
            (4, 20)
        }
        Family::V6 => {
            ethernet[12..14].copy_from_slice(&0x86dd_u16.to_be_bytes());
            header[0] = 0x60;
            header[4..6].copy_from_slice(&(l3.saturating_sub(40)).to_be_bytes());
            // UDP, and a hop limit of 64.
            (header[6], header[7]) = (17, 64);
            (6, 40)
        }
    };
    let udp = l3.checked_sub(header_length).filter(|&length| length >= UDP);
    let udp = udp.with_context(|| format!("{} bytes are too few for the headers", frame.size))?;
    let words: [u16; 6] = bytemuck::cast(header);
    let template = Template {
        ethernet: bytemuck::cast(ethernet),
        header: bytemuck::cast(header),
        checksum: words.into_iter().map(u32::from).sum(),
        version,
        verdict,
        out: 0,
    };
    let mut data = vec![0; frame.size.into()];
    // The kernel reads the Ethernet header of a packet for a TC program before that runs.
    data[..usize::from(ETHERNET)].copy_from_slice(&ethernet[..usize::from(ETHERNET)]);
    let start = usize::from(ETHERNET + header_length);
    data[start..start + 2].copy_from_slice(&PORT.to_be_bytes());
    data[start + 2..start + 4].copy_from_slice(&PORT.to_be_bytes());
    data[start + 4..start + 6].copy_from_slice(&udp.to_be_bytes());
    Ok((template, data))
}

/// Keeps the calling thread, and what it starts, on one CPU.
///
/// # Errors
/// There is no such CPU.
pub fn pin_to(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("no CPU {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on CPU {cpu}"))
}
