//! The decisions that the programs tell.

use aya::{
    Ebpf,
    maps::{Array, MapData, PerCpuArray, RingBuf},
};
use tunroute_common::maps::{Event, Filter, Traced, names};

use super::{Result, map_error, take};

/// The maps that control and carry traced decisions.
pub(super) struct Events {
    told: RingBuf<MapData>,
    filter: Array<MapData, Filter>,
    traced: PerCpuArray<MapData, Traced>,
}

impl Events {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            told: take(ebpf, names::EVENTS)?,
            filter: take(ebpf, names::TRACE)?,
            traced: take(ebpf, names::TRACED)?,
        })
    }

    /// Starts tracing. Events still waiting belong to an earlier client.
    pub(super) fn ask(&mut self, filter: &Filter) -> Result<()> {
        while self.told.next().is_some() {}
        self.filter.set(0, filter, 0).map_err(map_error(names::TRACE))
    }

    /// The decisions traced since the last call, and the number omitted since the maps were made.
    pub(super) fn read(&mut self) -> Result<(Vec<Event>, u64)> {
        let mut events = Vec::new();
        while let Some(item) = self.told.next() {
            events.extend(bytemuck::try_pod_read_unaligned::<Event>(&item).ok());
        }
        let traced = self.traced.get(&0, 0).map_err(map_error(names::TRACED))?;
        Ok((events, traced.iter().map(|traced| traced.omitted).sum()))
    }
}
