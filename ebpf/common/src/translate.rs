//! Packets get other addresses and ports, and every checksum stays as right as it
//! was.

use crate::{
    checksum::{adjust, adjust_udp, diff},
    layout::Address,
    packet::{
        Covered, ICMP_CHECKSUM, ICMP_IDENTIFIER, IPPROTO_SCTP, IPPROTO_UDP, Packet, Parsed, Query,
        Tuple, Version,
    },
};

/// Makes addresses and ports of the packet those of `to`, which is of the same IP
/// version; checksums follow.
///
/// Ports are left where there are none: in a fragment that is not the first, and in
/// protocols other than TCP, UDP and SCTP. Of an ICMP [`Query`], the one that is its
/// identifier is written. `None` if a store fails, or if SCTP's ports were to change: its
/// checksum would have to be made anew, over all of the packet.
#[inline(always)]
pub fn rewrite(packet: &mut impl Packet, parsed: &Parsed, to: &Tuple) -> Option<()> {
    let new_ports = ports_to_write(parsed, to)?;
    let covered = parsed.checksum.is_some();
    let addresses = write_addresses(packet, parsed, &to.source, &to.destination, covered)?;
    if new_ports {
        let ports = ports(to);
        match parsed.checksum {
            Some(_) => packet.store(parsed.l4 as usize, ports)?,
            None => packet.store_uncovered(parsed.l4 as usize, ports)?,
        }
    }
    let mut field = Covered {
        pseudo_header: true,
        udp: parsed.protocol == IPPROTO_UDP,
        ipv6: parsed.version == Version::V6,
    };
    if let Some(at) = parsed.checksum {
        packet.fix_transport_checksum(at as usize, addresses, field)?;
    }
    field.pseudo_header = false;
    if let Some((old, new)) = identifiers(parsed, to) {
        let l4 = parsed.l4 as usize;
        packet.store(l4.wrapping_add(ICMP_IDENTIFIER), new)?;
        // ICMP's covers nothing but the message.
        packet.fix_transport_checksum(l4.wrapping_add(ICMP_CHECKSUM), diff(old, new), field)?;
    }
    if let Some(at) = parsed.checksum
        && new_ports
    {
        let ports = diff(ports(&parsed.tuple), ports(to));
        packet.fix_transport_checksum(at as usize, ports, field)?;
    }
    Some(())
}

/// Takes one from the packet's time to live, as each router does (RFC 1812 §5.3.1); says
/// whether it may go on. If not, it stays as it was.
#[inline(always)]
pub fn pass_on(packet: &mut impl Packet, parsed: &Parsed) -> bool {
    let l3 = parsed.l3 as usize;
    match parsed.version {
        Version::V4 => {
            let at = l3.wrapping_add(8);
            let Some([time, protocol]) = packet.load(at) else {
                return false;
            };
            let old = [time, protocol];
            let new = [time.saturating_sub(1), protocol];
            new[0] != 0
                && packet.store(at, new).is_some()
                && packet
                    .fix_header_checksum(l3.wrapping_add(10), diff(old, new))
                    .is_some()
        }
        Version::V6 => {
            let at = l3.wrapping_add(7);
            match packet.load(at) {
                Some([limit]) if limit > 1 => packet.store_uncovered(at, [limit - 1]).is_some(),
                _ => false,
            }
        }
    }
}

/// Makes the tuple of the packet that an error is about `inner_to`, and the error's own
/// addresses `source` and `destination`; all checksums follow, as far as they are there.
///
/// `outer` and `inner` are what [`parse`](crate::packet::parse) and
/// [`quoted`](crate::packet::quoted) say of the packet. `None` as in [`rewrite`].
#[inline(always)]
pub fn rewrite_quoted(
    packet: &mut impl Packet,
    outer: &Parsed,
    inner: &Parsed,
    source: &Address,
    destination: &Address,
    inner_to: &Tuple,
) -> Option<()> {
    let message = rewrite_inner(packet, inner, inner_to)?;
    rewrite_outer(packet, outer, source, destination, message)
}

/// The first half of [`rewrite_quoted`]: the packet that the error is about. Returns
/// what changed under the error's own checksum, for [`rewrite_outer`].
#[inline(always)]
pub fn rewrite_inner(packet: &mut impl Packet, inner: &Parsed, inner_to: &Tuple) -> Option<u32> {
    let mut message = 0;
    let new_ports = ports_to_write(inner, inner_to)?;
    let addresses = write_addresses(packet, inner, &inner_to.source, &inner_to.destination, true)?;
    if inner.version == Version::V6 {
        // In IPv4 the header's own checksum has made up for them.
        message = addresses;
    }
    let mut transport = addresses;
    if new_ports {
        packet.store(inner.l4 as usize, ports(inner_to))?;
        let ports = diff(ports(&inner.tuple), ports(inner_to));
        message = ports.wrapping_add(message);
        transport = ports.wrapping_add(transport);
    }
    let mut checksum = inner.checksum;
    if let Some((old, new)) = identifiers(inner, inner_to) {
        packet.store((inner.l4 as usize).wrapping_add(ICMP_IDENTIFIER), new)?;
        let identifier = diff(old, new);
        message = identifier.wrapping_add(message);
        if checksum.is_none() {
            // ICMP's, which covers nothing but the message.
            checksum = Some(inner.l4.wrapping_add(ICMP_CHECKSUM as u16));
            transport = 0;
        }
        transport = identifier.wrapping_add(transport);
    }
    if let Some(at) = checksum {
        // Data of this packet: never a checksum that a device is still to complete.
        let old = packet.load(at as usize)?;
        let new = if inner.protocol == IPPROTO_UDP {
            adjust_udp(old, transport)
        } else {
            adjust(old, transport)
        };
        packet.store(at as usize, new)?;
        message = diff(old, new).wrapping_add(message);
    }
    Some(message)
}

/// The second half of [`rewrite_quoted`]: the error itself.
#[inline(always)]
pub fn rewrite_outer(
    packet: &mut impl Packet,
    outer: &Parsed,
    source: &Address,
    destination: &Address,
    message: u32,
) -> Option<()> {
    let addresses = write_addresses(packet, outer, source, destination, true)?;
    let at = (outer.l4 as usize).wrapping_add(ICMP_CHECKSUM);
    let ipv6 = outer.version == Version::V6;
    let mut field = Covered {
        pseudo_header: false,
        udp: false,
        ipv6,
    };
    packet.fix_transport_checksum(at, message, field)?;
    if ipv6 {
        field.pseudo_header = true;
        packet.fix_transport_checksum(at, addresses, field)?;
    }
    Some(())
}

/// Whether the packet's ports are to be written; `None` if they cannot be.
#[inline(always)]
fn ports_to_write(parsed: &Parsed, to: &Tuple) -> Option<bool> {
    let from = &parsed.tuple;
    let change = parsed.has_ports()
        && (from.source_port != to.source_port || from.destination_port != to.destination_port);
    if change && parsed.protocol == IPPROTO_SCTP {
        return None;
    }
    Some(change)
}

/// The identifier of an ICMP query, and the one that it is to have; `None` if there is
/// none, or it stays.
#[inline(always)]
fn identifiers(parsed: &Parsed, to: &Tuple) -> Option<([u8; 2], [u8; 2])> {
    let (old, new) = match parsed.query {
        Query::None => return None,
        Query::Request => (parsed.tuple.source_port, to.source_port),
        Query::Reply => (parsed.tuple.destination_port, to.destination_port),
    };
    (old != new).then_some((old.to_be_bytes(), new.to_be_bytes()))
}

/// Writes both addresses, and corrects the header's checksum if it has one; the
/// difference is what other checksums with a pseudo-header change by.
///
/// `covered`: a checksum behind the header makes up for the change. In IPv4 the header's
/// own does.
#[inline(always)]
fn write_addresses(
    packet: &mut impl Packet,
    parsed: &Parsed,
    source: &Address,
    destination: &Address,
    covered: bool,
) -> Option<u32> {
    let l3 = parsed.l3 as usize;
    let from = &parsed.tuple;
    match parsed.version {
        Version::V4 => {
            // They are next to each other: one store does.
            let old = adjacent(&from.source, &from.destination);
            let new = adjacent(source, destination);
            let changed = diff(old, new);
            packet.store(l3.wrapping_add(12), new)?;
            packet.fix_header_checksum(l3.wrapping_add(10), changed)?;
            Some(changed)
        }
        Version::V6 => {
            let changed = diff(from.source.octets(), source.octets())
                .wrapping_add(diff(from.destination.octets(), destination.octets()));
            let (source_at, destination_at) = (l3.wrapping_add(8), l3.wrapping_add(24));
            if covered {
                packet.store(source_at, source.octets())?;
                packet.store(destination_at, destination.octets())?;
            } else {
                packet.store_uncovered(source_at, source.octets())?;
                packet.store_uncovered(destination_at, destination.octets())?;
            }
            Some(changed)
        }
    }
}

/// Both addresses as they are in an IPv4 header.
#[inline(always)]
const fn adjacent(source: &Address, destination: &Address) -> [u8; 8] {
    let source = u32::from_be_bytes(source.octets_v4()) as u64;
    let destination = u32::from_be_bytes(destination.octets_v4()) as u64;
    (source << 32 | destination).to_be_bytes()
}

/// Both ports as they are in a packet.
#[inline(always)]
const fn ports(tuple: &Tuple) -> [u8; 4] {
    let [a, b] = tuple.source_port.to_be_bytes();
    let [c, d] = tuple.destination_port.to_be_bytes();
    [a, b, c, d]
}

#[cfg(test)]
mod tests;
