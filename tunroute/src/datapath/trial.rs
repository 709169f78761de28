//! What the programs would do with a packet, without a counter moving that anybody looks at.
//!
//! A trial has twins of the daemon's programs: the same code (the kernel's hash of it is compared) on the same maps,
//! except for the counters, which are its own and so tell what became of the one packet that ran through
//! (`BPF_PROG_TEST_RUN`). For devices without link-layer header the Ethernet variants stand in, whose decision is the
//! same: the kernel has no test run for packets that begin with an IP header.

use std::{collections::BTreeMap, fs, net::IpAddr, path::Path};

use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunOptions, TestRunResult,
    maps::{Array, MapData, PerCpuArray},
    programs::ProgramError,
};
use tunroute_common::{
    index as prefixes,
    maps::{Action, Control, MAX_NESTING, Outcome, Slot, Stats, names},
};

use super::{
    DatapathError, OBJECT, Result, WORD_COUNT, attach_xdp, classifier, exits::Exits, info, map_error, summed, take,
    words::Published,
};
use crate::{
    policy::fast::{DeviceExit, Exemption, FastState, Hook, Open},
    policy::net::IfIndex,
    prefixes::index::{self, Memory as _},
};

/// The twins, and where each stands in.
const TWINS: [(Hook, &str); 2] = [(Hook::Ingress, "ingress_l2"), (Hook::Egress, "egress_l2")];
/// The maps that twins have for themselves: the counters, and the filter of decisions that are told, which takes none of
/// theirs. They are pinned under these names while they are loaded: aya reuses maps by their pins alone.
const OWN: [(&str, &str); 2] = [(names::STATS, "STATS-trial"), (names::TRACE, "TRACE-trial")];
/// The place of `ifindex` in `struct __sk_buff`, and the struct's length (`include/uapi/linux/bpf.h`).
const CONTEXT_IFINDEX: usize = 40;
const CONTEXT: usize = 192;
/// The place of `ingress_ifindex` in `struct xdp_md`, that of `data_end`, and the struct's length.
const XDP_IFINDEX: usize = 12;
const XDP_END: usize = 4;
const XDP_CONTEXT: usize = 24;
/// `XDP_DROP`, `XDP_PASS` and `XDP_REDIRECT` in `include/uapi/linux/bpf.h`.
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
const XDP_REDIRECT: i32 = 4;
/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT` and `TC_ACT_REDIRECT` in `include/uapi/linux/pkt_cls.h`.
const UNSPEC: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

/// Where a packet is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// By which program.
    pub hook: Hook,
    /// At which device.
    pub device: IfIndex,
    /// The device's link-layer address, or zeros: the packet is sent to it.
    pub address: [u8; 6],
    /// XDP decides there, too, and first.
    pub xdp: bool,
}

/// What the program did.
#[derive(Clone, Debug)]
pub struct Trialled {
    /// The packet was left to the kernel.
    pub left: bool,
    /// XDP has decided it.
    pub xdp: bool,
    /// The slot and the outcome that were counted; none where no policy has the source.
    pub counted: Option<(u32, Outcome)>,
    /// What stands in the maps about this packet: its addresses as whole prefixes, the slots from its own outwards, and
    /// those of their exemptions that hold its destination. Read from the kernel, not from what the daemon has written.
    pub maps: FastState,
}

impl Trialled {
    /// The exit of the slot that was counted in.
    #[must_use]
    pub fn exit(&self) -> Option<&DeviceExit> {
        self.maps.exit_of(self.maps.slots.get(&self.counted?.0)?)
    }
}

/// Twins of the loaded programs.
pub struct Trial {
    ebpf: Ebpf,
    index: Published,
    policy: Array<MapData, Slot>,
    exits: Exits,
    control: Array<MapData, Control>,
    stats: PerCpuArray<MapData, Stats>,
    /// The counters as they were read last.
    counted: BTreeMap<u32, Stats>,
}

impl Trial {
    /// Loads twins on the maps pinned in the directory. `originals` has the hash of the code of each of the daemon's
    /// programs.
    pub(super) fn open(pins: &Path, index: Published, originals: &BTreeMap<&'static str, u64>) -> Result<Self> {
        let own = OWN.map(|(map, pin)| (map, pins.join(pin)));
        let forget = || own.iter().for_each(|(_, pin)| drop(fs::remove_file(pin)));
        // A daemon that was killed may have left some.
        forget();
        let length = index.words().length();
        let mut loader = EbpfLoader::new();
        loader.default_map_pin_directory(pins).override_global(WORD_COUNT, &length, true);
        // The kernel is asked about its routes and neighbours by itself.
        loader.override_global("ASK_KERNEL", &0u32, true);
        for (map, pin) in &own {
            loader.map_pin_path(map, pin.as_path());
        }
        let loaded = loader.load(OBJECT);
        forget();
        let mut ebpf = loaded?;
        let early = attach_xdp::is_usable().then_some(attach_xdp::PROGRAM);
        for program in TWINS.map(|(_, program)| program).into_iter().chain(early) {
            let error = |source| DatapathError::Program { program, source };
            if program == attach_xdp::PROGRAM {
                attach_xdp::program(&mut ebpf)?.load().map_err(error)?;
            } else {
                classifier(&mut ebpf, program)?.load().map_err(error)?;
            }
            if originals.get(program) != Some(&info(&ebpf, program)?.tag()) {
                return Err(DatapathError::NoTwin { program });
            }
        }
        Ok(Self {
            index,
            policy: take(&mut ebpf, names::POLICY)?,
            exits: Exits::take(&mut ebpf)?,
            control: take(&mut ebpf, names::CONTROL)?,
            stats: take(&mut ebpf, names::STATS)?,
            ebpf,
            counted: BTreeMap::new(),
        })
    }

    /// Runs a packet, from its IP header on, through a twin. It goes nowhere.
    ///
    /// # Errors
    ///
    /// If the kernel refuses: the device may be gone.
    pub fn run(&mut self, place: &Place, source: IpAddr, destination: IpAddr, packet: &[u8]) -> Result<Trialled> {
        let maps = self.excerpt(source, destination)?;
        let mut frame = Vec::with_capacity(14 + packet.len());
        frame.extend(place.address);
        frame.extend([0; 6]);
        frame.extend(if source.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 }.to_be_bytes().split_at(2).1);
        frame.extend(packet);
        let early = place.xdp && self.decides_early(place, &frame)?;
        let left = !early && self.leaves(place, &frame)?;
        Ok(Trialled { left, xdp: early, counted: self.counted(&maps)?, maps })
    }

    /// Runs a frame through the twin of the program that decides it as XDP, if it can.
    fn decides_early(&mut self, place: &Place, frame: &[u8]) -> Result<bool> {
        let error = |source| DatapathError::Program { program: attach_xdp::PROGRAM, source };
        let mut context = [0; XDP_CONTEXT];
        let length = u32::try_from(frame.len()).unwrap_or_default();
        context[XDP_END..XDP_END + 4].copy_from_slice(&length.to_ne_bytes());
        context[XDP_IFINDEX..XDP_IFINDEX + 4].copy_from_slice(&place.device.to_ne_bytes());
        match result_of(attach_xdp::program(&mut self.ebpf)?, frame, &context).map_err(error)? {
            XDP_PASS => Ok(false),
            XDP_DROP | XDP_REDIRECT => Ok(true),
            other => Err(error(odd_result(other))),
        }
    }

    /// Runs a frame through the twin of a program on an skb: does it leave it to the kernel?
    fn leaves(&mut self, place: &Place, frame: &[u8]) -> Result<bool> {
        let (_, program) = TWINS[usize::from(place.hook == Hook::Egress)];
        let error = |source| DatapathError::Program { program, source };
        let mut context = [0; CONTEXT];
        context[CONTEXT_IFINDEX..CONTEXT_IFINDEX + 4].copy_from_slice(&place.device.to_ne_bytes());
        match result_of(classifier(&mut self.ebpf, program)?, frame, &context).map_err(error)? {
            UNSPEC => Ok(true),
            SHOT | REDIRECT => Ok(false),
            other => Err(error(odd_result(other))),
        }
    }

    /// Finds the counter that has moved.
    fn counted(&mut self, maps: &FastState) -> Result<Option<(u32, Outcome)>> {
        let mut found = None;
        for index in maps.slots.keys() {
            let now = summed(&self.stats.get(index, 0).map_err(map_error(names::STATS))?);
            let before = self.counted.insert(*index, now).unwrap_or_default();
            let moved = |outcome: &Outcome| {
                now.outcomes[*outcome as usize].packets != before.outcomes[*outcome as usize].packets
            };
            found = found.or_else(|| Outcome::ALL.into_iter().find(moved).map(|outcome| (*index, outcome)));
        }
        Ok(found)
    }

    /// What stands in the maps about a packet.
    fn excerpt(&self, source: IpAddr, destination: IpAddr) -> Result<FastState> {
        let control = self.control.get(&0, 0).map_err(map_error(names::CONTROL))?;
        let mut state = FastState {
            open: Open { v4: control.open_v4 == 1, v6: control.open_v6 == 1 },
            shadow: control.shadow == 1,
            ..FastState::default()
        };
        let words = self.index.words();
        for address in [destination, source] {
            let (family, key) = index::key(address);
            if let Some(found) = prefixes::source(&*words, family, key) {
                state.sources.insert(address.into(), found);
            }
        }
        let (family, key) = index::key(destination);
        let mut next = state.sources.get(&source.into()).map(|source| source.slot);
        while let Some(index) = next
            && state.slots.len() <= MAX_NESTING as usize
        {
            // One that is not there ends the decision, too.
            let Ok(slot) = self.policy.get(&index, 0) else { break };
            let kind = prefixes::exempt(&*words, slot.exempt_set, family, key);
            state.exempt.insert(Exemption { set: slot.exempt_set, prefix: destination.into(), kind });
            if slot.egress.action() == Action::Redirect
                && let Some(exit) = self.exits.read(slot.egress.exit())?
            {
                state.exits.insert(slot.egress.exit(), exit);
            }
            state.slots.insert(index, slot);
            next = (slot.next != Slot::NO_NEXT).then_some(slot.next);
        }
        Ok(state)
    }
}

/// What a program returns for a frame.
fn result_of<P>(program: &P, frame: &[u8], context: &[u8]) -> Result<i32, ProgramError>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let options =
        TestRunOptions { data_in: Some(frame), ctx_in: Some(context), repeat: 1, ..TestRunOptions::default() };
    Ok(program.test_run(options)?.return_value.cast_signed())
}

fn odd_result(code: i32) -> ProgramError {
    ProgramError::IOError(std::io::Error::other(format!("it returned {code}")))
}
