//! What the fast path needs of the kernel.

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{is_map_supported, is_program_supported},
    util::KernelVersion,
};

/// Can a program ask the main table alone, and leave the neighbour to whoever sends the packet? Since Linux 6.3
/// (`BPF_FIB_LOOKUP_SKIP_NEIGH`).
#[must_use]
pub fn asks_main() -> bool {
    !KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 3, 0))
}

/// What this kernel lacks, in words; empty if nothing, or if unknown.
#[must_use]
pub fn missing() -> Vec<&'static str> {
    let no_programs = is_program_supported(ProgramType::SchedClassifier).is_ok_and(|supported| !supported);
    let maps = [(MapType::PerCpuArray, "arrays for each CPU"), (MapType::ArrayOfMaps, "maps in maps")];
    let no_maps = maps.into_iter().filter(|(map, _)| is_map_supported(*map).is_ok_and(|supported| !supported));
    let programs = no_programs.then_some("programs for traffic control");
    programs.into_iter().chain(no_maps.map(|(_, name)| name)).collect()
}
