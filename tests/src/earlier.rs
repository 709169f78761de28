//! What another version of tunroute leaves to this one: programs at work on maps of another layout, and one where this
//! version wants none.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, Map, MapData, MapInfo, xdp::DevMapHash},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType, Xdp,
        links::{FdLink, PinnedLink},
        tc::{SchedClassifierLink, TcAttachOptions},
        xdp::XdpLink,
    },
};
use tunroute::{
    datapath::{Index, OBJECT, WORD_COUNT, WordMap},
    prefixes::index::{self, Content, Memory as _},
};
use tunroute_common::maps::{Control, Exit, LAYOUT_VERSION, MAX_SLOTS, Slot, Station, names};

use crate::{pace::until, plan::TUNNELS, world::World};

/// Its number, which no version has had.
const LAYOUT: &str = "v0";

/// An earlier version at work, without a daemon.
#[derive(Debug)]
pub struct Earlier(());

impl Earlier {
    /// Puts an earlier version in the place of this one, whose daemon must be gone: the same decisions by programs of
    /// their own, whose maps have other sizes. Beside the programs that there were, it has one on what enters by tunnel 1.
    ///
    /// # Errors
    /// This version has nothing pinned, tunnel 1 is no Ethernet device, or the kernel refuses something.
    pub fn take_over(world: &World) -> Result<Self> {
        let (links, old) = (world.pin_dir().join("links"), world.pin_dir().join(LAYOUT));
        let present = world.pin_dir().join(format!("v{LAYOUT_VERSION}"));
        fs::create_dir(&old).with_context(|| format!("cannot make {}", old.display()))?;
        let mut loader = EbpfLoader::new();
        loader.default_map_pin_directory(&old);
        let words = WordMap::pinned(&present)?;
        let (sources, exempt) = index::read(&words).context("the map of prefixes is damaged")?;
        let mut index = Index::open(&old, words.length() * 2)?;
        index.renew(Content { sources: &sources, exempt: &exempt })?;
        let length = index.length();
        loader.override_global(WORD_COUNT, &length, true);
        loader.map_max_entries(names::POLICY, MAX_SLOTS * 2).map_max_entries(names::STATS, MAX_SLOTS * 2);
        let mut ebpf = loader.load(OBJECT).context("cannot load the programs")?;
        copy_array::<Slot>(&mut ebpf, &present, names::POLICY)?;
        copy_array::<Exit>(&mut ebpf, &present, names::EXIT)?;
        copy_array::<Control>(&mut ebpf, &present, names::CONTROL)?;
        world.host.run_in(|| copy_devices(&mut ebpf, &present))?;
        let mut replaced = 0;
        for entry in fs::read_dir(&links)? {
            let entry = entry?;
            let name = entry.file_name().into_string().unwrap_or_default();
            let link: FdLink = PinnedLink::from_pin(entry.path())?.into();
            replaced += 1;
            if name.starts_with("xdp") {
                let program: &mut Xdp = ebpf.program_mut("ingress_xdp").context("no XDP program")?.try_into()?;
                program.load()?;
                program.attach_to_link(XdpLink::try_from(link)?).with_context(|| name.clone())?;
                continue;
            }
            let program = classifier(&mut ebpf, if name.starts_with("ingress") { "ingress_l2" } else { "egress_l2" })?;
            program.attach_to_link(SchedClassifierLink::try_from(link)?).with_context(|| name.clone())?;
        }
        ensure!(replaced > 0, "nothing is attached");
        let device = TUNNELS[1].device;
        let pin = links.join(format!("ingress-{}", world.host.ifindex(device)?));
        world.host.run_in(|| {
            let program = classifier(&mut ebpf, "ingress_l2")?;
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = program.attach_with_options(device, TcAttachType::Ingress, first)?;
            FdLink::try_from(program.take_link(id)?)?.pin(pin)?;
            Ok(())
        })?;
        fs::remove_dir_all(&present).context("cannot unpin this version's maps")?;
        Ok(Self(()))
    }

    /// A daemon of this version has replaced everything.
    ///
    /// # Errors
    /// Something of the earlier version is there, or something of this one is not.
    pub fn ensure_gone(self, world: &World) -> Result<()> {
        let pins = world.pin_dir();
        ensure!(!pins.join(LAYOUT).exists(), "the old maps are still there");
        let map = MapInfo::from_pin(pins.join(format!("v{LAYOUT_VERSION}")).join(names::POLICY))?;
        ensure!(map.max_entries() == MAX_SLOTS, "a map has room for {} slots", map.max_entries());
        for (device, hook, expected) in
            [("lan0", "ingress", 1), ("net0", "egress", 1), (TUNNELS[1].device, "ingress", 0)]
        {
            // The kernel detaches a link that is unpinned a little later.
            until(&format!("{expected} programs of tunroute: {device} {hook}"), || {
                let programs = world.host.tcx(device, hook)?;
                Ok(programs.iter().filter(|name| name.contains("gress_l")).count() == expected)
            })?;
        }
        Ok(())
    }
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program: &mut SchedClassifier =
        ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
    // Several links want the same program.
    if program.fd().is_err() {
        program.load().with_context(|| format!("cannot load {name}"))?;
    }
    Ok(program)
}

fn map<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    ebpf.map_mut(name).with_context(|| format!("no map {name}"))
}

fn copy_array<V: Pod>(ebpf: &mut Ebpf, from: &Path, name: &str) -> Result<()> {
    let from: Array<_, V> = Map::Array(MapData::from_pin(from.join(name))?).try_into()?;
    let mut to: Array<&mut MapData, V> = map(ebpf, name)?.try_into()?;
    for index in 0..from.len() {
        to.set(index, from.get(&index, 0)?, 0)?;
    }
    Ok(())
}

/// Copies the exits' devices and the XDP devices. The kernel resolves device numbers in the namespace of the process that
/// enters them, so this is done in the host's.
fn copy_devices(ebpf: &mut Ebpf, from: &Path) -> Result<()> {
    let stations: HashMap<_, u32, Station> = Map::HashMap(MapData::from_pin(from.join(names::STATION))?).try_into()?;
    let mut to: HashMap<&mut MapData, u32, Station> = map(ebpf, names::STATION)?.try_into()?;
    for entry in &stations {
        let (ifindex, station) = entry?;
        to.insert(ifindex, station, 0)?;
    }
    let devices = DevMapHash::try_from(Map::DevMapHash(MapData::from_pin(from.join(names::DEVICE))?))?;
    let mut to = DevMapHash::try_from(map(ebpf, names::DEVICE)?)?;
    for number in devices.keys() {
        let number = number?;
        to.insert(number, devices.get(number, 0)?.if_index, None, 0)?;
    }
    Ok(())
}
