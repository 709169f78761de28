//! `tunroute trace`: the filter, the recorded decisions, and how they are printed.

use std::{net::IpAddr, time::SystemTime};

use anyhow::Context as _;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tunroute_common::{
    maps::{Filter, Ipv6},
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6},
    trace::SPAN,
};

use crate::{control::status::in_words, policy::fast::address_words, policy::net::Family};

/// The filter: which decisions to record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Only packets from this prefix.
    pub from: Option<IpNet>,
    /// Only packets to this prefix.
    pub to: Option<IpNet>,
    /// Maximum number of decisions a second on each CPU.
    pub rate: u32,
}

impl Wanted {
    /// The filter for the programs.
    ///
    /// # Errors
    ///
    /// If no packet can match.
    pub fn filter(&self) -> anyhow::Result<Filter> {
        let families: Vec<Family> = self.from.iter().chain(&self.to).map(Family::of).collect();
        let ethertype = match families.as_slice() {
            [] => 0,
            [Family::V4] | [Family::V4, Family::V4] => ETHERTYPE_IPV4,
            [Family::V6] | [Family::V6, Family::V6] => ETHERTYPE_IPV6,
            _ => anyhow::bail!("no packet goes from IPv4 to IPv6 or back: give `--from` and `--to` of one family"),
        };
        let ((from, from_mask), (to, to_mask)) = (bits(self.from), bits(self.to));
        let limit = (u64::from(self.rate) << SPAN).div_ceil(1_000_000_000);
        let limit =
            u32::try_from(limit).context("this rate is more than the programs can record: give a lower `--rate`")?;
        Ok(Filter { from, from_mask, to, to_mask, ethertype: ethertype.into(), limit })
    }
}

/// A prefix as bits and mask.
fn bits(prefix: Option<IpNet>) -> (Ipv6, Ipv6) {
    prefix.map_or_else(Default::default, |prefix| (address_words(prefix.network()), address_words(prefix.netmask())))
}

/// The decisions since the last request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traced {
    /// The decisions, in the order of their making.
    pub decisions: Vec<Decision>,
    /// Number of decisions that matched and were dropped by the rate limit.
    pub omitted: u64,
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Time of the decision.
    pub time: SystemTime,
    /// The device at which the program saw the packet.
    pub device: String,
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The payload's protocol, or the first IPv6 extension header's number.
    pub protocol: u16,
    /// The policy that decided.
    pub policy: String,
    /// The outcome, named as in `status`.
    pub outcome: String,
    /// The tunnel that the packet was sent to.
    pub tunnel: Option<String>,
    /// The layer 3 length in bytes.
    pub length: u32,
    /// Recorded in shadow mode: the kernel decided.
    pub shadow: bool,
}

impl Decision {
    /// A line for people.
    #[must_use]
    pub fn render(&self) -> String {
        let Self { device, source, destination, policy, length, .. } = self;
        let time = self.rfc3339();
        // A live view needs no date.
        let time = time.split_once('T').map_or(time.as_str(), |(_, time)| time.trim_end_matches('Z'));
        let tunnel = self.tunnel.as_deref().unwrap_or("a device that is gone");
        let outcome = match self.outcome.as_str() {
            "forwarded" => format!("leaves by {tunnel}"),
            "diverted" => format!("diverted from the uplink to {tunnel}"),
            outcome => in_words(outcome).unwrap_or(outcome).to_owned(),
        };
        let would = if self.shadow { "would be: " } else { "" };
        let protocol = protocol(self.protocol);
        format!("{time} {device}: {source} → {destination} {protocol}, {length} bytes: {policy}: {would}{outcome}")
    }

    /// An object for programs.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "time": self.rfc3339(),
            "device": self.device,
            "source": self.source,
            "destination": self.destination,
            "protocol": protocol(self.protocol),
            "length": self.length,
            "policy": self.policy,
            "outcome": self.outcome,
            "tunnel": self.tunnel,
            "shadow": self.shadow,
        })
    }

    fn rfc3339(&self) -> String {
        humantime::format_rfc3339_millis(self.time).to_string()
    }
}

/// The name of a protocol, or its number.
fn protocol(number: u16) -> String {
    match number {
        1 => "ICMP",
        6 => "TCP",
        17 => "UDP",
        47 => "GRE",
        50 => "ESP",
        58 => "ICMPv6",
        132 => "SCTP",
        number => return format!("protocol {number}"),
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tunroute_common::{maps::Event, packet::Slice, trace::read};

    use super::*;

    fn address() -> impl Strategy<Value = IpAddr> {
        // Few, so that prefixes hold some of them.
        prop_oneof![
            (0u8..4, any::<u8>()).prop_map(|(net, host)| IpAddr::from([10, 0, net, host])),
            (0u16..4, any::<u16>()).prop_map(|(net, host)| IpAddr::from([0x2a02, net, 0, 0, 0, 0, 0, host])),
        ]
    }

    fn prefix() -> impl Strategy<Value = Option<IpNet>> {
        prop::option::of((address(), 0u8..=128).prop_map(|(address, length)| {
            let longest = if address.is_ipv4() { 32 } else { 128 };
            IpNet::new(address, length.min(longest)).map(|prefix| prefix.trunc()).unwrap_or_else(|_| address.into())
        }))
    }

    proptest! {
        #[test]
        fn a_filter_takes_what_its_prefixes_hold(
            (from, to) in (prefix(), prefix()),
            (source, destination) in (address(), address()).prop_filter("of one family", |(a, b)| a.is_ipv4() == b.is_ipv4()),
        ) {
            let holds = |prefix: Option<IpNet>, address| prefix.is_none_or(|prefix| prefix.contains(&address));
            let ethertype = if source.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
            let (source_words, destination_words) = (address_words(source), address_words(destination));
            let event =
                Event { source: source_words, destination: destination_words, ethertype, ..Event::default() };
            match (Wanted { from, to, rate: 1 }).filter() {
                Ok(filter) => {
                    prop_assert!(filter.limit >= 1);
                    prop_assert_eq!(filter.takes(&event), holds(from, source) && holds(to, destination));
                }
                Err(_) => prop_assert!(from.zip(to).is_some_and(|(from, to)| Family::of(&from) != Family::of(&to))),
            }
        }
    }

    #[test]
    fn the_rate_is_limited_in_each_span() {
        let mut traced = tunroute_common::maps::Traced::default();
        let admitted =
            |traced: &mut tunroute_common::maps::Traced, now| (0..9).filter(|_| traced.admit(now, 5)).count();
        assert_eq!([admitted(&mut traced, 1), admitted(&mut traced, 2), admitted(&mut traced, 1 << SPAN)], [5, 0, 5]);
    }

    #[test]
    fn the_lines() {
        let mut decision = Decision {
            time: SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(3_723_045),
            device: "lan0".to_owned(),
            source: "10.0.0.2".parse().unwrap(),
            destination: "198.18.0.1".parse().unwrap(),
            protocol: 17,
            policy: "tunnel0".to_owned(),
            outcome: "forwarded".to_owned(),
            tunnel: Some("sixxs0".to_owned()),
            length: 92,
            shadow: false,
        };
        let start = "01:02:03.045 lan0: 10.0.0.2 → 198.18.0.1 UDP, 92 bytes: tunnel0: ";
        assert_eq!(decision.render(), format!("{start}leaves by sixxs0"));
        decision.shadow = true;
        assert_eq!(decision.render(), format!("{start}would be: leaves by sixxs0"));
        (decision.shadow, decision.outcome, decision.tunnel) = (false, "too_big".to_owned(), None);
        assert_eq!(decision.render(), format!("{start}left to the kernel: too big for the tunnel"));
        assert_eq!(read(0x0806, &Slice(&[0; 60]), Event::default()), None);
    }
}
