//! What the kernel would do with a packet: `RTM_GETROUTE` for one source, destination and device (`inet_rtm_getroute()`
//! in `net/ipv4/route.c`, `inet6_rtm_getroute()` in `net/ipv6/route.c`). It walks the rules and tables as a packet does.

use std::{fmt, io, net::IpAddr};

use rtnetlink::{
    packet_core::Emitable,
    packet_route::route::{RouteFlags, RouteHeader, RouteType},
    sys::protocols::NETLINK_ROUTE,
};

use super::{
    KernelError, address_family,
    route::{HEADER, RTA_VIA, Seen, address},
    socket::{Refusal, Request, Socket, attributes, push_attribute, u32_of, value},
};
use crate::policy::net::{Family, IfIndex};

/// `RTM_F_LOOKUP_TABLE` and `RTM_F_FIB_MATCH` in `include/uapi/linux/rtnetlink.h`: name the table that had the route
/// (IPv6 always does), and show that route rather than what was made of it for the packet.
const LOOKUP_TABLE: u32 = 0x1000;
const FIB_MATCH: u32 = 0x2000;

/// A packet, as far as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes to, of the same family.
    pub destination: IpAddr,
    /// The device that it has entered by; none for a packet of the host's own. IPv4 refuses that from an address that
    /// is not the host's.
    pub iif: Option<IfIndex>,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It leaves.
    Leaves {
        /// By this device.
        device: IfIndex,
        /// To this neighbour; none where the destination is the next hop itself.
        gateway: Option<IpAddr>,
        /// By a route of this table.
        table: u32,
    },
    /// It is for this host, or for all on a link, by a route of this table.
    Local {
        /// Usually [`crate::policy::net::TABLE_LOCAL`].
        table: u32,
    },
    /// It is answered with an ICMP error, or dropped.
    Refused(Refused),
}

/// Why a packet goes nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refused {
    /// `ENETUNREACH`: no rule leads to a route.
    NoRoute,
    /// `EHOSTUNREACH`: an `unreachable` route or rule; for IPv4 also where a device does not forward.
    Unreachable,
    /// `EACCES`: a `prohibit` route or rule.
    Prohibit,
    /// `EINVAL`: dropped without a word, by a `blackhole` route or rule, or for IPv4 because the source is not to be
    /// believed (`ip_route_input_slow()` in `net/ipv4/route.c`: reverse path filter, one of the host's own addresses).
    /// `EXDEV`: the reverse path filter before Linux 6.13 (`fib_validate_source()` in `net/ipv4/fib_frontend.c`).
    Dropped,
}

impl Refused {
    /// The errors of `fib_props` in `net/ipv4/fib_semantics.c` and `fib6_prop` in `net/ipv6/route.c`.
    fn of(refusal: &Refusal) -> Option<Self> {
        // An explanation is given for a request that is wrong, not for a packet that goes nowhere.
        match refusal.errno {
            _ if refusal.message.is_some() => None,
            libc::ENETUNREACH => Some(Self::NoRoute),
            libc::EHOSTUNREACH => Some(Self::Unreachable),
            libc::EACCES => Some(Self::Prohibit),
            libc::EINVAL | libc::EXDEV => Some(Self::Dropped),
            _ => None,
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoRoute => "no route",
            Self::Unreachable => "unreachable",
            Self::Prohibit => "prohibited",
            Self::Dropped => "dropped",
        })
    }
}

/// Asks the kernel of one network namespace, some 100,000 times a second.
#[derive(Debug)]
pub struct Oracle(Socket);

impl Oracle {
    /// Connects to the kernel of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`KernelError::Open`]
    pub fn connect() -> Result<Self, KernelError> {
        Socket::open(NETLINK_ROUTE).map(Self).map_err(KernelError::Open)
    }

    /// What becomes of a packet.
    ///
    /// # Errors
    /// [`KernelError::Question`] for a question that makes no sense, as with a device that is gone.
    pub fn ask(&mut self, question: &Question) -> Result<Answer, KernelError> {
        match self.get(question, 0)? {
            Ok(payload) => parse(&payload).ok_or_else(|| failed(question, io::Error::other("the answer is no route"))),
            Err(refused) => Ok(Answer::Refused(refused)),
        }
    }

    /// The route that decides on a packet, in `ip route` syntax; none where it is refused: the kernel does not say which
    /// route refuses. `name` names devices.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn route(
        &mut self,
        question: &Question,
        name: &dyn Fn(IfIndex) -> String,
    ) -> Result<Option<String>, KernelError> {
        let payload = self.get(question, FIB_MATCH)?;
        Ok(payload.ok().and_then(|payload| Some(Seen::parse(&payload)?.text(name))))
    }

    fn get(&mut self, question: &Question, flags: u32) -> Result<Result<Vec<u8>, Refused>, KernelError> {
        let request = request(question, flags).map_err(|error| failed(question, error))?;
        match self.0.ask(&request).map_err(KernelError::Socket)? {
            Ok(payload) => Ok(Ok(payload)),
            Err(refusal) => match Refused::of(&refusal) {
                Some(refused) => Ok(Err(refused)),
                None => Err(failed(question, refusal.into())),
            },
        }
    }
}

fn failed(question: &Question, source: io::Error) -> KernelError {
    KernelError::Question { from: question.source, to: question.destination, source }
}

fn request(question: &Question, flags: u32) -> io::Result<Request> {
    let family = Family::of_addr(&question.source);
    if Family::of_addr(&question.destination) != family {
        return Err(io::Error::other("the source and the destination are of different families"));
    }
    let (bits, flags) = match family {
        Family::V4 => (32, flags | LOOKUP_TABLE),
        Family::V6 => (128, flags),
    };
    let header = RouteHeader {
        address_family: address_family(family),
        destination_prefix_length: bits,
        source_prefix_length: bits,
        flags: RouteFlags::from_bits_retain(flags),
        ..RouteHeader::default()
    };
    let mut payload = vec![0; HEADER];
    header.emit(&mut payload);
    for (kind, address) in [(libc::RTA_DST, question.destination), (libc::RTA_SRC, question.source)] {
        match address {
            IpAddr::V4(address) => push_attribute(&mut payload, kind, &address.octets())?,
            IpAddr::V6(address) => push_attribute(&mut payload, kind, &address.octets())?,
        }
    }
    if let Some(iif) = question.iif {
        push_attribute(&mut payload, libc::RTA_IIF, &iif.to_ne_bytes())?;
    }
    Ok(Request { kind: libc::RTM_GETROUTE, flags: 0, payload })
}

/// Reads an answer; none if it is not one.
fn parse(payload: &[u8]) -> Option<Answer> {
    let header = RouteHeader::parse(payload).ok()?;
    let family = Family::ALL.into_iter().find(|&family| address_family(family) == header.address_family)?;
    let (mut table, mut device, mut gateway) = (u32::from(header.table), None, None);
    for attribute in attributes(payload, HEADER) {
        let value = value(&attribute);
        match attribute.kind() {
            libc::RTA_TABLE => table = u32_of(value)?,
            libc::RTA_OIF => device = u32_of(value),
            libc::RTA_GATEWAY => gateway = address(family, value),
            // `struct rtvia`: an IPv4 packet goes to an IPv6 neighbour.
            RTA_VIA => gateway = value.get(2..).and_then(|value| address(Family::V6, value)),
            _ => {}
        }
    }
    match header.kind {
        RouteType::Unicast => Some(Answer::Leaves { device: device?, gateway, table }),
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast => {
            Some(Answer::Local { table })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_numbers() {
        for (errno, message, expected) in [
            (libc::ENETUNREACH, None, Some(Refused::NoRoute)),
            (libc::EHOSTUNREACH, None, Some(Refused::Unreachable)),
            (libc::EACCES, None, Some(Refused::Prohibit)),
            (libc::EINVAL, None, Some(Refused::Dropped)),
            (libc::EXDEV, None, Some(Refused::Dropped)),
            (libc::EINVAL, Some("ipv4: Invalid values in header"), None),
            (libc::ENODEV, None, None),
            (libc::EPERM, None, None),
        ] {
            let refusal = Refusal { errno, message: message.map(str::to_owned) };
            assert_eq!(Refused::of(&refusal), expected, "{errno} {message:?}");
        }
    }

    #[test]
    fn damaged_answers_are_no_answers() {
        let whole = request(
            &Question { source: "10.0.0.1".parse().unwrap(), destination: "10.0.0.2".parse().unwrap(), iif: None },
            0,
        );
        let mut payload = whole.unwrap().payload;
        assert_eq!(parse(&payload), None, "a request is no answer");
        payload[7] = libc::RTN_UNICAST;
        push_attribute(&mut payload, libc::RTA_OIF, &7_u32.to_ne_bytes()).unwrap();
        push_attribute(&mut payload, libc::RTA_TABLE, &1000_u32.to_ne_bytes()).unwrap();
        let expected = Answer::Leaves { device: 7, gateway: None, table: 1000 };
        assert_eq!(parse(&payload), Some(expected));
        for length in 0..payload.len() {
            assert_ne!(parse(&payload[..length]), Some(expected), "{length}");
        }
    }
}
