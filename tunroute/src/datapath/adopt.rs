//! Which programs in the kernel are as good as this daemon's: the same code on the same pinned maps. So a restarted
//! daemon takes over what its predecessor has attached, and changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use aya::{Ebpf, maps::MapData, programs::ProgramInfo};
use tunroute_common::maps::names;

use super::{DatapathError, Result, info, map_error, programs};

/// What the loaded programs are.
pub(super) struct Loaded {
    programs: BTreeMap<&'static str, Identity>,
    /// The pinned maps, by their numbers in the kernel. Held open, since opening one by its number takes `CAP_SYS_ADMIN`.
    maps: BTreeMap<u32, (&'static str, MapData)>,
}

struct Identity {
    /// A hash of the code (`bpf_prog_calc_tag()` in `kernel/bpf/core.c`), in which the maps do not count.
    tag: u64,
    /// The pinned maps that it uses. Others (the log) are made anew for every load.
    maps: BTreeSet<u32>,
}

impl Loaded {
    /// Reads the programs just loaded, whose maps are pinned in the directory.
    pub(super) fn read(ebpf: &Ebpf, directory: &Path) -> Result<Self> {
        let mut loaded = Self { programs: BTreeMap::new(), maps: BTreeMap::new() };
        for name in names::ALL {
            let map = MapData::from_pin(directory.join(name)).map_err(map_error(name))?;
            let id = map.info().map_err(map_error(name))?.id();
            loaded.maps.insert(id, (name, map));
        }
        for program in programs() {
            let info = info(ebpf, program)?;
            // aya opens the program by its number for this, which takes CAP_SYS_ADMIN. Without it nobody else's program can
            // be looked into either: an earlier daemon's is then replaced in its link, at once.
            let Ok(Some(maps)) = info.map_ids() else { continue };
            let maps = maps.into_iter().filter(|id| loaded.maps.contains_key(id)).collect();
            loaded.programs.insert(program, Identity { tag: info.tag(), maps });
        }
        Ok(loaded)
    }

    /// Is this the program of that name, perhaps as another daemon has loaded it?
    pub(super) fn is(&self, name: &str, info: &ProgramInfo) -> bool {
        let Some(own) = self.programs.get(name) else { return false };
        let maps = || info.map_ids().ok().flatten();
        info.tag() == own.tag
            && maps().is_some_and(|maps| own.maps == maps.into_iter().filter(|id| self.maps.contains_key(id)).collect())
    }

    /// The numbers in the kernel of the pinned maps, by name.
    pub(super) fn maps(&self) -> BTreeMap<&'static str, u32> {
        self.maps.iter().map(|(id, (name, _))| (*name, *id)).collect()
    }

    /// Pins the maps that are no longer pinned.
    pub(super) fn pin_missing(&self, directory: &Path) -> Result<()> {
        for (name, map) in self.maps.values() {
            let path = directory.join(name);
            if !path.exists() {
                map.pin(&path).map_err(|source| DatapathError::Pin { path, source })?;
            }
        }
        Ok(())
    }
}

/// Fails unless the maps pinned in the directory have these numbers.
pub(super) fn check_pins(maps: &BTreeMap<&'static str, u32>, directory: &Path) -> Result<()> {
    for (name, id) in maps {
        let pinned = MapData::from_pin(directory.join(name)).map_err(map_error(name))?;
        if pinned.info().map_err(map_error(name))?.id() != *id {
            return Err(DatapathError::OtherMaps { path: directory.to_owned() });
        }
    }
    Ok(())
}
