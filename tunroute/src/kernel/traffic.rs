//! What devices have sent and received, as the kernel has counted it: in its table of the calling thread's network
//! namespace, which is there whatever is mounted on `/sys`.

use std::{collections::BTreeMap, fs};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// That of the calling thread, not of the process that mounted `/proc`.
const TABLE: &str = "/proc/thread-self/net/dev";

/// All traffic of a device since it was made, unmatched traffic included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DeviceTraffic")]
pub struct Traffic {
    /// Packets handed to the device; how many of several in one (GSO) its driver counts is its own affair.
    pub sent_packets: u64,
    /// Their bytes, with what link-layer header the device has.
    pub sent_bytes: u64,
    /// Packets that came from the device.
    pub received_packets: u64,
    /// Their bytes.
    pub received_bytes: u64,
}

/// By the device's name; empty if it cannot be read.
#[must_use]
pub fn traffic() -> BTreeMap<String, Traffic> {
    fs::read_to_string(TABLE).map(|table| parse(&table)).unwrap_or_default()
}

/// `NAME: ` and 16 numbers, of which bytes and packets come first in either direction (`dev_seq_printf_stats()` in
/// `net/core/net-procfs.c`). The two lines of headings have no such numbers.
fn parse(table: &str) -> BTreeMap<String, Traffic> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().map_while(|number| number.parse().ok()).collect();
        let [received_bytes, received_packets, _, _, _, _, _, _, sent_bytes, sent_packets, ..] = numbers[..] else {
            return None;
        };
        let traffic = Traffic { sent_packets, sent_bytes, received_packets, received_bytes };
        Some((name.trim().to_owned(), traffic))
    };
    table.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let table = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:    1000      10    0    0    0     0          0         0     1000      10    0    0    0     0       0          0
fifteen-letters:18446744073709551615 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
  odd: 1 2 3
";
        let lo = Traffic { sent_packets: 10, sent_bytes: 1000, received_packets: 10, received_bytes: 1000 };
        let long = Traffic { sent_packets: 10, sent_bytes: 9, received_packets: 2, received_bytes: u64::MAX };
        assert_eq!(parse(table), [("fifteen-letters".to_owned(), long), ("lo".to_owned(), lo)].into());
        assert!(traffic().contains_key("lo"));
    }
}
