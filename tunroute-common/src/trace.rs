//! Selects and limits the decisions that are traced.

use crate::{
    maps::{Event, Filter, Ipv6, Traced},
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ipv4Header, Ipv6Header, Packet},
};

/// A span's length is two to the power of this, in nanoseconds: 134 ms.
pub const SPAN: u32 = 27;

/// Fills in an event for a decided packet, whose header is complete.
#[inline(always)]
pub fn read<P: Packet>(ethertype: u16, packet: &P, event: Event) -> Option<Event> {
    let (source, destination, protocol) = match ethertype {
        ETHERTYPE_IPV4 => {
            let Ipv4Header { source, destination, protocol, .. } = packet.read(0)?;
            ([source, 0, 0, 0], [destination, 0, 0, 0], protocol)
        }
        ETHERTYPE_IPV6 => {
            let Ipv6Header { source, destination, next_header, .. } = packet.read(0)?;
            (source, destination, next_header)
        }
        _ => return None,
    };
    Some(Event { source, destination, length: packet.length(), ethertype, protocol: protocol.into(), ..event })
}

impl Filter {
    /// Is this asked for?
    #[inline(always)]
    #[must_use]
    pub fn takes(&self, event: &Event) -> bool {
        (self.ethertype == 0 || self.ethertype == u32::from(event.ethertype))
            && within(&event.source, &self.from, &self.from_mask)
            && within(&event.destination, &self.to, &self.to_mask)
    }
}

#[inline(always)]
fn within(address: &Ipv6, bits: &Ipv6, mask: &Ipv6) -> bool {
    let [a, b, c, d] = *address;
    let ([e, f, g, h], [k, l, m, n]) = (*bits, *mask);
    ((a ^ e) & k) | ((b ^ f) & l) | ((c ^ g) & m) | ((d ^ h) & n) == 0
}

impl Traced {
    /// Returns true if one more decision may be traced now, and counts it.
    #[inline(always)]
    #[must_use]
    pub fn admit(&mut self, now: u64, limit: u32) -> bool {
        let span = now >> SPAN;
        if self.span != span {
            (self.span, self.told) = (span, 0);
        }
        let admitted = self.told < u64::from(limit);
        self.told += u64::from(admitted);
        admitted
    }
}
