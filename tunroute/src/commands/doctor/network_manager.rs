//! NetworkManager, and which devices it has connections for.

use std::{fs, path::Path};

use crate::policy::net::IfIndex;

/// Does NetworkManager have a connection active on a device? While it runs it keeps a file for each device: a connection
/// stands in it only if the device is one that it manages (`nm_config_device_state_write()` in its `nm-config.c`). `root` is
/// where the file system begins.
pub(super) fn has_connection(root: &Path, device: IfIndex) -> bool {
    let file = root.join("run/NetworkManager/devices").join(device.to_string());
    fs::read_to_string(file).is_ok_and(|text| text.lines().any(|line| line.starts_with("connection-uuid=")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_with_a_connection_is_known() {
        let root = tempfile::tempdir().unwrap();
        let devices = root.path().join("run/NetworkManager/devices");
        fs::create_dir_all(&devices).unwrap();
        fs::write(devices.join("4"), "[device]\nmanaged=true\nconnection-uuid=1b4d\nnm-owned=false\n").unwrap();
        fs::write(devices.join("5"), "[device]\nmanaged=unknown\n").unwrap();
        assert_eq!([4, 5, 6].map(|device| has_connection(root.path(), device)), [true, false, false]);
    }
}
