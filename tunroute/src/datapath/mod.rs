//! The fast path's kernel side: loads and pins the programs and maps, attaches, writes the maps, reads the counters.
//!
//! Knows nothing of the configuration. What stands in the maps is kept in a mirror, which an adopting daemon reads back.

mod adopt;
mod attach;
pub(crate) mod attach_xdp;
mod error;
mod events;
mod exits;
pub mod features;
mod pins;
mod remains;
pub(crate) mod tcx;
mod trial;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, PerCpuValues},
    programs::{ProgramInfo, SchedClassifier, links::FdLink},
    util::{KernelVersion, nr_cpus},
};
use nix::time::{ClockId, clock_gettime};
use tunroute_common::maps::{
    Clamp, Control, Counter, Event, Filter, MAX_EXITS, MAX_SLOTS, Outcome, Slot, Station, Stats, UNMATCHED, names,
};

pub use self::{
    error::DatapathError,
    remains::{anything_pinned, left_attached, remove},
    trial::{Place, Trial, Trialled},
    words::{Index, WordMap},
};
use self::{events::Events, exits::Exits};
use crate::{
    datapath::{adopt::Loaded, pins::Pins},
    policy::fast::{Attachment, FastOp, FastState, Hook, Open, Part},
    policy::net::{IfIndex, Link},
    prefixes::index::{self, Content},
};

/// How long the ingress program goes on deciding after the daemon's last heartbeat.
pub const HEARTBEAT_VALID: Duration = Duration::from_secs(10);

/// The eBPF object, made by the build script; public for other loaders, such as tests. Empty if built with
/// `AYA_BUILD_SKIP=1`.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tunroute-ebpf"));

/// The programs on skbs, in the object's terms.
const CLASSIFIERS: [&str; 6] = ["ingress_l2", "ingress_l3", "egress_l2", "egress_l3", "clamp_l2", "clamp_l3"];

/// All programs that are loaded on this kernel.
fn programs() -> impl Iterator<Item = &'static str> {
    CLASSIFIERS.into_iter().chain(attach_xdp::is_usable().then_some(attach_xdp::PROGRAM))
}

/// The programs' constant for the number of words of the map of prefixes, for other loaders.
pub const WORD_COUNT: &str = "WORD_COUNT";

/// Held while programs or twins are loaded: what the one pins the other finds by its name.
static LOADING: Mutex<()> = Mutex::new(());

type Result<T, E = DatapathError> = std::result::Result<T, E>;

fn map_error(map: &'static str) -> impl FnOnce(MapError) -> DatapathError {
    move |source| DatapathError::Map { map, source }
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// TCX links, from Linux 6.6 on.
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

impl Method {
    /// What this kernel has.
    #[must_use]
    pub fn detect() -> Self {
        match KernelVersion::current() {
            Ok(version) if version < KernelVersion::new(6, 6, 0) => Self::Clsact,
            _ => Self::Tcx,
        }
    }
}

/// The loaded programs and their maps.
pub struct Datapath {
    ebpf: Ebpf,
    index: Index,
    policy: Array<MapData, Slot>,
    exits: Exits,
    stats: PerCpuArray<MapData, Stats>,
    control: Array<MapData, Control>,
    clamp: HashMap<MapData, u32, Clamp>,
    station: HashMap<MapData, u32, Station>,
    events: Events,
    /// Traced decisions, if a client listens.
    filter: Option<Filter>,
    pins: Pins,
    loaded: Loaded,
    method: Method,
    /// The TCX links. Held besides the pins, so that removing a pin does not detach a program while the daemon runs.
    links: BTreeMap<(Part, Hook, IfIndex), FdLink>,
    state: FastState,
    /// The devices whose clsact qdisc an instance of this daemon has added.
    qdiscs: BTreeSet<IfIndex>,
}

impl Datapath {
    /// Loads the programs, with the maps that an earlier daemon has left in `pin_dir` or with new ones. The map of prefixes
    /// has at least so many words.
    ///
    /// # Errors
    ///
    /// If the kernel has no BPF, the capabilities are missing, or the pin directory is not on a bpf file system.
    pub fn open(pin_dir: &Path, method: Method, words: u64) -> Result<Self> {
        if OBJECT.is_empty() {
            return Err(DatapathError::NoObject);
        }
        let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let pins = Pins::create(pin_dir)?;
        let index = Index::open(&pins.maps, words)?;
        let mut ebpf = EbpfLoader::new()
            .default_map_pin_directory(&pins.maps)
            .override_global(WORD_COUNT, &index.length(), true)
            .load(OBJECT)?;
        for program in programs() {
            let error = |source| DatapathError::Program { program, source };
            if program == attach_xdp::PROGRAM {
                attach_xdp::program(&mut ebpf)?.load().map_err(error)?;
            } else {
                classifier(&mut ebpf, program)?.load().map_err(error)?;
            }
        }
        let loaded = Loaded::read(&ebpf, &pins.maps)?;
        let qdiscs = pins.added_qdiscs();
        let mut datapath = Self {
            index,
            policy: take(&mut ebpf, names::POLICY)?,
            exits: Exits::take(&mut ebpf)?,
            stats: take(&mut ebpf, names::STATS)?,
            control: take(&mut ebpf, names::CONTROL)?,
            clamp: take(&mut ebpf, names::CLAMP)?,
            station: take(&mut ebpf, names::STATION)?,
            events: Events::take(&mut ebpf)?,
            filter: None,
            ebpf,
            pins,
            loaded,
            method,
            links: BTreeMap::new(),
            state: FastState::default(),
            qdiscs,
        };
        datapath.read_maps()?;
        Ok(datapath)
    }

    /// The loaded programs, for forwarding their log.
    pub const fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// What stands in the maps and where programs are attached.
    #[must_use]
    pub const fn state(&self) -> &FastState {
        &self.state
    }

    /// How programs are attached.
    #[must_use]
    pub const fn method(&self) -> Method {
        self.method
    }

    /// Reads the maps again, in case somebody else has written to them: what differs is then put right by the next plan, or
    /// at once for prefixes.
    ///
    /// # Errors
    ///
    /// If the maps cannot be read.
    pub fn read_again(&mut self) -> Result<()> {
        let FastState { attached, pinned, sources, exempt, .. } = std::mem::take(&mut self.state);
        let result = self.read_maps();
        // Compiled prefixes are not read back, but compiled anew.
        self.state = FastState { attached, pinned, sources, exempt, ..std::mem::take(&mut self.state) };
        result.and(self.index.renew(Content { sources: &self.state.sources, exempt: &self.state.exempt }))
    }

    /// Reads what stands in the maps, which an earlier daemon may have left.
    fn read_maps(&mut self) -> Result<()> {
        let mut state = FastState::default();
        // What cannot be read is written anew.
        (state.sources, state.exempt) = index::read(&*self.index.published().words()).unwrap_or_default();
        for index in 0..MAX_SLOTS {
            let slot = self.policy.get(&index, 0).map_err(map_error(names::POLICY))?;
            if slot.id != 0 {
                state.slots.insert(index, slot);
            }
        }
        for number in 0..MAX_EXITS {
            if let Some(exit) = self.exits.read(number)? {
                state.exits.insert(number, exit);
            }
        }
        for entry in self.clamp.iter() {
            let (ifindex, clamp) = entry.map_err(map_error(names::CLAMP))?;
            state.clamps.insert(ifindex, clamp);
        }
        for entry in self.station.iter() {
            let (ifindex, station) = entry.map_err(map_error(names::STATION))?;
            state.stations.insert(ifindex, station);
        }
        let control = self.control.get(&0, 0).map_err(map_error(names::CONTROL))?;
        state.open = Open { v4: control.open_v4 == 1, v6: control.open_v6 == 1 };
        state.unmatched = Open { v4: control.unmatched & 1 != 0, v6: control.unmatched & 2 != 0 };
        state.shadow = control.shadow == 1;
        self.state = state;
        Ok(())
    }

    /// Looks which attachments of this daemon's programs are in place and which exits still have their devices, as the
    /// kernel sees it. `filters` are the BPF filters on clsact qdiscs, for kernels without TCX.
    ///
    /// # Errors
    ///
    /// If a program's number cannot be read.
    pub fn observe_attachments(
        &mut self,
        links: &BTreeMap<IfIndex, Link>,
        filters: &BTreeSet<(Hook, IfIndex, u32)>,
    ) -> Result<()> {
        let mut attached = BTreeSet::new();
        let mut pinned = BTreeSet::new();
        self.pins.forget_missing(links);
        self.links.retain(|(_, _, ifindex), _| links.contains_key(ifindex));
        // Where nothing can be pinned, an unpinned link is the best there is, and a filter is known by its program.
        let pins_wanted = self.maps_pinned();
        for link in links.values() {
            for attachment in attachments(link) {
                let hook = attachment.hook;
                let is_pinned = self.pins.is_pinned(self.method, &attachment);
                let known = is_pinned || self.links.contains_key(&key(&attachment));
                if !known && (pins_wanted || self.method == Method::Tcx) {
                    continue;
                }
                let id = self.info(attachment.program())?.id();
                if !known && !filters.contains(&(hook, link.index, id)) {
                    continue;
                }
                pinned.insert(attachment.clone());
                // A link without its pin would not outlive this daemon: it is attached again, which pins it.
                let in_place = (!pins_wanted || is_pinned)
                    && match self.method {
                        _ if attachment.part == Part::Xdp => self.hold(&attachment) && self.runs_xdp(&attachment, id),
                        Method::Tcx => self.runs(&attachment, id) && self.hold(&attachment),
                        Method::Clsact => {
                            filters.contains(&(hook, link.index, id)) || self.is_filter(&attachment, filters)
                        }
                    };
                if in_place {
                    attached.insert(attachment);
                }
            }
        }
        self.state.attached = attached;
        self.state.pinned = pinned;
        // Those of devices that have gone are void, even if there is a device with the same number by now.
        for (number, exit) in &mut self.state.exits {
            exit.ifindex = self.exits.device(*number)?;
        }
        Ok(())
    }

    /// Holds the link of a program in place. False if there is none, so that the program must be attached anew.
    fn hold(&mut self, attachment: &Attachment) -> bool {
        let Entry::Vacant(vacant) = self.links.entry(key(attachment)) else { return true };
        match self.pins.pinned(attachment) {
            Ok(Some(link)) => {
                vacant.insert(link);
                true
            }
            _ => false,
        }
    }

    fn info(&self, program: &'static str) -> Result<ProgramInfo> {
        info(&self.ebpf, program)
    }

    /// The programs with the number of instructions that the verifier has gone through for each.
    ///
    /// # Errors
    ///
    /// If the kernel does not tell.
    pub fn verified_instructions(&self) -> Result<Vec<(&'static str, u32)>> {
        let mut instructions = Vec::new();
        for program in programs() {
            instructions.push((program, self.info(program)?.verified_instruction_count().unwrap_or(0)));
        }
        Ok(instructions)
    }

    /// Loads twins of the programs, to run packets through, when it is called, on any thread.
    ///
    /// # Errors
    ///
    /// If the pinned maps are gone; and then, if the kernel refuses to load the twins.
    pub fn twins(&self) -> Result<impl FnOnce() -> Result<Trial> + Send + use<>> {
        self.restore_pins()?;
        let tags: Result<BTreeMap<_, _>> = programs().map(|program| Ok((program, self.info(program)?.tag()))).collect();
        let (tags, pins, index, maps) = (tags?, self.pins.maps.clone(), self.index.published(), self.loaded.maps());
        Ok(move || {
            let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
            adopt::check_pins(&maps, &pins)?;
            Trial::open(&pins, index, &tags)
        })
    }

    /// Carries out one operation and enters it in the mirror.
    ///
    /// # Errors
    ///
    /// If the kernel refuses it; the mirror then still says what was there before.
    pub fn apply(&mut self, operation: &FastOp) -> Result<()> {
        match operation {
            FastOp::WriteSlot(index, slot) => self.policy.set(*index, slot, 0).map_err(map_error(names::POLICY))?,
            FastOp::ClearSlot(index) => {
                self.policy.set(*index, <Slot as bytemuck::Zeroable>::zeroed(), 0).map_err(map_error(names::POLICY))?;
                let cpus = nr_cpus().map_err(|(_, error)| map_error(names::STATS)(MapError::IoError(error)))?;
                let zero = PerCpuValues::try_from(vec![Stats::default(); cpus])
                    .map_err(|error| map_error(names::STATS)(MapError::IoError(error)))?;
                self.stats.set(*index, zero, 0).map_err(map_error(names::STATS))?;
            }
            FastOp::WriteExit(number, exit, _) => self.exits.write(*number, exit, &self.index)?,
            FastOp::ClearExit(number) => self.exits.clear(*number)?,
            FastOp::PutSource(..) | FastOp::RemoveSource(_) | FastOp::AddExemption(_) | FastOp::RemoveExemption(_) => {
                return self.apply_entries(&[operation]);
            }
            FastOp::SetClamp(ifindex, clamp) => {
                self.clamp.insert(ifindex, clamp, 0).map_err(map_error(names::CLAMP))?;
            }
            FastOp::RemoveClamp(ifindex) => gone(self.clamp.remove(ifindex)).map_err(map_error(names::CLAMP))?,
            FastOp::SetStation(ifindex, station) => {
                self.station.insert(ifindex, station, 0).map_err(map_error(names::STATION))?;
            }
            FastOp::RemoveStation(ifindex) => gone(self.station.remove(ifindex)).map_err(map_error(names::STATION))?,
            FastOp::Attach(attachment) if attachment.part == Part::Xdp => self.attach_xdp(attachment)?,
            FastOp::Attach(attachment) => self.attach(attachment)?,
            FastOp::Detach(attachment) => self.detach(self.method, attachment)?,
            FastOp::SetOpen(open) => {
                let before = std::mem::replace(&mut self.state.open, *open);
                self.beat().inspect_err(|_| self.state.open = before)?;
            }
            FastOp::SetUnmatched(open) => {
                let before = std::mem::replace(&mut self.state.unmatched, *open);
                self.beat().inspect_err(|_| self.state.unmatched = before)?;
            }
            FastOp::SetShadow(shadow) => {
                let before = std::mem::replace(&mut self.state.shadow, *shadow);
                self.beat().inspect_err(|_| self.state.shadow = before)?;
            }
        }
        self.state.enter(operation);
        Ok(())
    }

    /// Carries out operations on prefixes, all or none of them, and enters them in the mirror.
    ///
    /// # Errors
    ///
    /// If the map has no room for them, or the kernel refuses another one.
    pub fn apply_entries(&mut self, operations: &[&FastOp]) -> Result<()> {
        let before = (self.state.sources.clone(), self.state.exempt.clone());
        self.state.enter_all(operations);
        let content = Content { sources: &self.state.sources, exempt: &self.state.exempt };
        let result = self.index.update(content, operations);
        if result.is_err() {
            (self.state.sources, self.state.exempt) = before;
        }
        result
    }

    /// Number of words of the map of prefixes, and how many of them are used.
    #[must_use]
    pub fn words(&self) -> (u64, u64) {
        let published = self.index.published();
        let words = published.words();
        (index::used(&*words), self.index.length())
    }

    /// Tells the ingress program that the daemon follows what happens, for another [`HEARTBEAT_VALID`].
    ///
    /// # Errors
    ///
    /// If the map cannot be written.
    pub fn beat(&mut self) -> Result<()> {
        let Open { v4, v6 } = self.state.open;
        let control = Control {
            valid_until: monotonic_now() + u64::try_from(HEARTBEAT_VALID.as_nanos()).unwrap_or(u64::MAX),
            open_v4: v4.into(),
            open_v6: v6.into(),
            shadow: self.state.shadow.into(),
            unmatched: u32::from(self.state.unmatched.v4) | u32::from(self.state.unmatched.v6) << 1,
            tracing: self.filter.is_some().into(),
            reserved: 0,
        };
        self.control.set(0, control, 0).map_err(map_error(names::CONTROL))
    }

    /// Has the programs tell decisions, others than before if the filter is another, or none any more. They stop by
    /// themselves, too, when nobody beats.
    ///
    /// # Errors
    ///
    /// If a map cannot be written.
    pub fn trace(&mut self, filter: Option<Filter>) -> Result<()> {
        if filter == self.filter {
            return Ok(());
        }
        if let Some(filter) = &filter {
            self.events.ask(filter)?;
        }
        self.filter = filter;
        self.beat()
    }

    /// The decisions traced since the last call, and the number omitted since the maps were made.
    ///
    /// # Errors
    ///
    /// If a map cannot be read.
    pub fn traced(&mut self) -> Result<(Vec<Event>, u64)> {
        self.events.read()
    }

    /// Are the maps still pinned? If not, see [`Self::restore_pins`].
    #[must_use]
    pub fn maps_pinned(&self) -> bool {
        self.pins.maps_pinned()
    }

    /// Pins the maps again that somebody has unpinned: else they would not outlive this daemon. The links follow as
    /// they are attached again.
    ///
    /// # Errors
    ///
    /// If there is no bpf file system any more, and none can be mounted.
    pub fn restore_pins(&self) -> Result<()> {
        self.pins.make()?;
        self.index.pin_missing()?;
        self.loaded.pin_missing(&self.pins.maps)
    }

    /// Removes the maps of other layouts, once this daemon's programs are in all links.
    pub fn forget_other_layouts(&self) {
        self.pins.remove_other_layouts();
    }

    /// The counters of all used slots, summed over the CPUs.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub fn counters(&self) -> Result<BTreeMap<u32, Stats>> {
        let mut counters = BTreeMap::new();
        for index in self.state.slots.keys() {
            counters.insert(*index, summed(&self.stats.get(index, 0).map_err(map_error(names::STATS))?));
        }
        Ok(counters)
    }

    /// Unmatched traffic forwarded by the ingress programs, summed over the CPUs.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub fn unmatched(&self) -> Result<Counter> {
        let stats = summed(&self.stats.get(&UNMATCHED, 0).map_err(map_error(names::STATS))?);
        Ok(stats.outcomes[Outcome::Forwarded as usize])
    }
}

/// What is not there needs no removal.
fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// What the kernel says of a loaded program.
fn info(ebpf: &Ebpf, name: &'static str) -> Result<ProgramInfo> {
    let program = ebpf.program(name).ok_or(DatapathError::Missing(name))?;
    program.info().map_err(|source| DatapathError::Program { program: name, source })
}

/// A slot's counters, summed over the CPUs.
fn summed(counters: &PerCpuValues<Stats>) -> Stats {
    let mut sum = Stats::default();
    for stats in counters.iter() {
        for (sum, Counter { packets, bytes }) in sum.outcomes.iter_mut().zip(stats.outcomes) {
            sum.packets = sum.packets.wrapping_add(packets);
            sum.bytes = sum.bytes.wrapping_add(bytes);
        }
    }
    sum
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf.program_mut(name).ok_or(DatapathError::Missing(name))?;
    program.try_into().map_err(|source| DatapathError::Program { program: name, source })
}

fn take<M: TryFrom<aya::maps::Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<M> {
    M::try_from(ebpf.take_map(name).ok_or(DatapathError::Missing(name))?).map_err(map_error(name))
}

/// All that may be attached to a device.
fn attachments(link: &Link) -> impl Iterator<Item = Attachment> {
    let places = Part::ALL.into_iter().flat_map(|part| Hook::ALL.map(|hook| (part, hook)));
    places.filter_map(|(part, hook)| Attachment::new(part, hook, link))
}

/// What names an attachment's link.
const fn key(attachment: &Attachment) -> (Part, Hook, IfIndex) {
    (attachment.part, attachment.hook, attachment.ifindex)
}

/// `CLOCK_MONOTONIC` in nanoseconds, as `bpf_ktime_get_coarse_ns` counts.
#[must_use]
pub fn monotonic_now() -> u64 {
    // Linux always has this clock; 0 would close the fast path, which is safe.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|now| u64::try_from(Duration::from(now).as_nanos()).ok())
        .unwrap_or(0)
}
