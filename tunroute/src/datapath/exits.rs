//! The exits: how packets leave, and by which device, in two maps of the same numbers.

use std::collections::BTreeSet;

use aya::{
    Ebpf,
    maps::{
        Array, MapData, MapError,
        xdp::{DevMapHash, XdpMapError},
    },
};
use bytemuck::Zeroable as _;
use tunroute_common::maps::{Exit, names};

use super::{Index, Result, gone, map_error, take};
use crate::{policy::fast::DeviceExit, policy::net::IfIndex};

/// `EXIT` and `DEVICE`.
pub(super) struct Exits {
    exits: Array<MapData, Exit>,
    devices: DevMapHash<MapData>,
    /// Numbers that were in use a moment ago.
    cleared: BTreeSet<u32>,
}

impl Exits {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        let (exits, devices) = (take(ebpf, names::EXIT)?, take(ebpf, names::DEVICE)?);
        Ok(Self { exits, devices, cleared: BTreeSet::new() })
    }

    /// The exit with a number, if there is one.
    pub(super) fn read(&self, number: u32) -> Result<Option<DeviceExit>> {
        let exit = self.exits.get(&number, 0).map_err(map_error(names::EXIT))?;
        if exit == Exit::zeroed() {
            return Ok(None);
        }
        Ok(Some(DeviceExit { ifindex: self.device(number)?, exit }))
    }

    /// The device of an exit; 0 if it has gone.
    pub(super) fn device(&self, number: u32) -> Result<IfIndex> {
        match self.devices.get(number, 0) {
            Ok(device) => Ok(device.if_index),
            Err(MapError::KeyNotFound) => Ok(0),
            Err(error) => Err(map_error(names::DEVICE)(error)),
        }
    }

    /// Enters an exit under a number that no slot leads to. A program that has read the number from a slot just before it
    /// was cleared must not find another exit there, so it is given time to end first.
    pub(super) fn write(
        &mut self,
        number: u32,
        DeviceExit { ifindex, exit }: &DeviceExit,
        index: &Index,
    ) -> Result<()> {
        if self.cleared.contains(&number) {
            index.wait_for_programs()?;
            self.cleared.clear();
        }
        // The exit comes last: without it nothing fits, so a slot that leads here already waits.
        match self.devices.insert(number, *ifindex, None, 0) {
            Ok(()) | Err(XdpMapError::ChainedProgramNotSupported) => {}
            Err(XdpMapError::MapError(error)) => return Err(map_error(names::DEVICE)(error)),
        }
        self.exits.set(number, exit, 0).map_err(map_error(names::EXIT))
    }

    /// Frees the number of an exit that no slot leads to.
    pub(super) fn clear(&mut self, number: u32) -> Result<()> {
        self.cleared.insert(number);
        self.exits.set(number, Exit::zeroed(), 0).map_err(map_error(names::EXIT))?;
        // The kernel has removed devices that are gone.
        gone(self.devices.remove(number)).map_err(map_error(names::DEVICE))
    }
}
