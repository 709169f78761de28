//! What became of one ping: whether it was answered, and by which devices the packets went, as captures saw them.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use anyhow::Result;
use tunroute_tests::{Capture, Netns, World, ping, ping_briefly, plan::REMOTE, traffic::Answer};

/// The host on the internet that all pings are from or to.
pub const FAR: IpAddr = IpAddr::V6(REMOTE.v6);

/// The way of the packets whose source is the host's or its client's: of the requests it sends, or the replies.
#[derive(Clone, PartialEq, Eq)]
pub struct Journey {
    answer: &'static str,
    /// The devices by which they left the host.
    left_by: BTreeSet<String>,
    /// The device by which they came to the remote host, and their hop limit there.
    arrived: BTreeSet<(String, u8)>,
}

impl Journey {
    /// The names of the columns.
    pub const COLUMNS: &str = "answer   left by  far end   hop limit";

    /// The packet left by a device of the host and came to the remote host, which answered.
    pub fn answered(left_by: &str, far_end: &str, hop_limit: u8) -> Self {
        Self { answer: "yes", left_by: [left_by.to_owned()].into(), arrived: [(far_end.to_owned(), hop_limit)].into() }
    }

    /// The packet left by a device of the host, and was lost.
    pub fn lost(left_by: &str) -> Self {
        Self { answer: "none", left_by: [left_by.to_owned()].into(), arrived: BTreeSet::new() }
    }

    /// The host did not let it leave, and said so with an ICMP error.
    pub fn refused() -> Self {
        Self { answer: "refused", left_by: BTreeSet::new(), arrived: BTreeSet::new() }
    }
}

impl fmt::Display for Journey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: Vec<String>| if items.is_empty() { "-".to_owned() } else { items.join(",") };
        let left_by = list(self.left_by.iter().cloned().collect());
        let devices = list(self.arrived.iter().map(|(device, _)| device.clone()).collect());
        let hop_limits = list(self.arrived.iter().map(|(_, hop_limit)| hop_limit.to_string()).collect());
        write!(f, "{:<9}{left_by:<9}{devices:<10}{hop_limits}", self.answer)
    }
}

/// Pings once, and follows the packets between `ours` and the remote host. Does not wait for long if no answer is expected.
pub fn follow(world: &World, from: &Netns, src: IpAddr, dst: IpAddr, expected: &Journey) -> Result<Journey> {
    let ours = if src == FAR { dst } else { src };
    let mut host = Capture::everywhere(&world.host)?;
    let mut remote = Capture::everywhere(&world.remote)?;
    let ping = if expected.answer == "none" { ping_briefly } else { ping };
    let answer = match ping(from, src, dst)? {
        Answer::Reply => "yes",
        Answer::Silence => "none",
        Answer::Refused(_) => "refused",
    };
    let left_by = host.drain()?.into_iter().filter(|frame| frame.is(ours, FAR) && frame.left());
    let arrived = remote.drain()?.into_iter().filter(|frame| frame.is(ours, FAR) && !frame.left());
    Ok(Journey {
        answer,
        left_by: left_by.map(|frame| frame.device).collect(),
        arrived: arrived.filter_map(|frame| Some((frame.device, frame.hop_limit?))).collect(),
    })
}
