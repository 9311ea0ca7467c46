//! IPv4 and IPv6 packets: from whom to whom they are, and what an ICMP error is
//! about.
//!
//! Everything in a packet is hostile. Nothing here panics, each loop has a small
//! bound, and a transport header is at most [`MAX_HEADERS`] bytes behind its IP
//! header: the kernel's verifier must see all of that.

use bytemuck::{Pod, Zeroable};

use crate::{
    checksum,
    frame::{ETH_P_IP, ETH_P_IPV6},
    layout::Address,
    responder::IPPROTO_ICMPV6,
};

/// ICMP, RFC 792.
pub const IPPROTO_ICMP: u8 = 1;
/// TCP, RFC 9293.
pub const IPPROTO_TCP: u8 = 6;
/// UDP, RFC 768.
pub const IPPROTO_UDP: u8 = 17;
/// SCTP, RFC 9260.
pub const IPPROTO_SCTP: u8 = 132;

/// How many IPv6 extension headers are skipped at most.
pub const MAX_EXTENSION_HEADERS: usize = 6;
/// How far behind the start of its IP header a transport header may be.
pub const MAX_HEADERS: usize = 255;
/// The furthest start of an IP header; no frame that is parsed comes near it.
const MAX_L3: usize = 1023;

/// Where the checksum is in a TCP header.
const TCP_CHECKSUM: u16 = 16;
/// Where the checksum is in a UDP header.
const UDP_CHECKSUM: u16 = 6;
const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
/// The part of an ICMP error that comes before the packet it is about.
const ICMP_ERROR_LEN: usize = 8;
/// Where the checksum is in an ICMP or ICMPv6 message.
pub(crate) const ICMP_CHECKSUM: usize = 2;
/// Where the identifier is in a query.
pub(crate) const ICMP_IDENTIFIER: usize = 4;

// RFC 8200 §4, RFC 4302 and the registry of IPv6 extension header types.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HOST_IDENTITY: u8 = 139;
const SHIM6: u8 = 140;

/// A frame that can be read and written: what a program was given, or a slice.
pub trait Packet {
    /// `N` bytes from offset `at` on; `None` if the frame ends before.
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]>;

    /// Writes `bytes` at offset `at`; `None` if the frame ends before.
    ///
    /// A checksum in the packet covers the bytes and is changed as well, so that
    /// a sum over the whole packet (`CHECKSUM_COMPLETE`) stays what it was.
    fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()>;

    /// [`store`](Self::store) for bytes that no checksum in the packet makes up
    /// for: a sum over the whole packet, where there is one, changes with them
    /// (`BPF_F_RECOMPUTE_CSUM`).
    #[inline(always)]
    fn store_uncovered<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        self.store(at, bytes)
    }

    /// Corrects the IPv4 header checksum at offset `at` after the header changed by
    /// `diff` (see [`checksum::diff`]).
    #[inline(always)]
    fn fix_header_checksum(&mut self, at: usize, diff: u32) -> Option<()> {
        let old = self.load(at)?;
        self.store(at, checksum::adjust(old, diff))
    }

    /// Corrects the TCP, UDP, ICMP or ICMPv6 checksum at offset `at` after
    /// something that it covers changed by `diff`.
    #[inline(always)]
    fn fix_transport_checksum(&mut self, at: usize, diff: u32, field: Covered) -> Option<()> {
        let old = self.load(at)?;
        let new = if field.udp {
            checksum::adjust_udp(old, diff)
        } else {
            checksum::adjust(old, diff)
        };
        self.store(at, new)
    }
}

/// What changed under a transport checksum: the kernel's helper treats a checksum
/// that the device is still to complete by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    /// Addresses, which are in the pseudo-header only; else bytes of the transport
    /// header or what follows it.
    pub pseudo_header: bool,
    /// The checksum is UDP's: zero says that there is none.
    pub udp: bool,
    /// The packet is an IPv6 one.
    pub ipv6: bool,
}

/// The version of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// The first of several: it has the transport header.
    First,
    /// Another: it has no transport header.
    Later,
}

/// Whether an ICMP message asks or answers. What asks has an identifier, which comes
/// back in the answer: it tells one asker from another as a port does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Query {
    /// Neither, or its header is in another fragment.
    None,
    /// It asks; the identifier is the source port.
    Request,
    /// It answers; the identifier is the destination port.
    Reply,
}

impl Query {
    /// What a message of this type is.
    #[inline(always)]
    const fn of(version: Version, kind: u8) -> Self {
        match (version, kind) {
            // Echo, timestamp and information (RFC 792), address mask (RFC 950).
            (Version::V4, 8 | 13 | 15 | 17) => Self::Request,
            (Version::V4, 0 | 14 | 16 | 18) => Self::Reply,
            // Echo (RFC 4443 §4).
            (Version::V6, 128) => Self::Request,
            (Version::V6, 129) => Self::Reply,
            _ => Self::None,
        }
    }
}

/// From whom to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Tuple {
    /// The source address; IPv4 is mapped into IPv6 (RFC 4291 §2.5.5.2).
    pub source: Address,
    /// The destination address, likewise.
    pub destination: Address,
    /// The source port; in an ICMP request the identifier.
    pub source_port: u16,
    /// The destination port; in the reply to an ICMP request the identifier.
    pub destination_port: u16,
}

/// What the headers of a packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Addresses and ports; ports are 0 where the protocol has none, and in a
    /// [`Later`](Fragment::Later) fragment. A [`Query`] has one, and the other is 0.
    pub tuple: Tuple,
    /// The identification that fragments of one datagram share; 16 bits in IPv4, 0 in
    /// an IPv6 packet without a fragment header.
    pub fragment_id: u32,
    /// Where in the datagram this fragment's data belongs, in bytes.
    pub fragment_offset: u16,
    /// Bytes from the first of the IP header to the last of the packet, as the header
    /// says (65535 if it says more); 0 if it leaves that open (jumbograms, BIG TCP).
    pub length: u16,
    /// Where in the frame the IP header is.
    pub l3: u16,
    /// Where in the frame that is which follows the IP header and its extensions.
    pub l4: u16,
    /// Where in the frame the transport checksum is that covers the addresses. `None`
    /// if the protocol has no such checksum, if this is a [`Later`](Fragment::Later)
    /// fragment or a UDP packet without one, or if a quoted packet ends before it.
    pub checksum: Option<u16>,
    /// The version of the IP header.
    pub version: Version,
    /// The protocol of what is at `l4`, as the header says. In a
    /// [`Later`](Fragment::Later) IPv6 fragment this is the first header of the
    /// fragmented part, which may be another extension header.
    pub protocol: u8,
    /// Which part of a datagram this is.
    pub fragment: Fragment,
    /// Whether other fragments follow this one.
    pub more_fragments: bool,
    /// Whether it is an ICMP message with an identifier, and which port that is.
    pub query: Query,
}

impl Parsed {
    /// Whether the protocol is one of those that know ports.
    #[inline(always)]
    pub const fn is_transport(&self) -> bool {
        matches!(self.protocol, IPPROTO_TCP | IPPROTO_UDP | IPPROTO_SCTP)
    }

    /// Whether it is a message of the IP layer itself.
    #[inline(always)]
    pub const fn is_icmp(&self) -> bool {
        matches!(self.protocol, IPPROTO_ICMP | IPPROTO_ICMPV6)
    }

    /// Whether it is an ICMP message with an identifier, be it a request or a reply.
    #[inline(always)]
    pub const fn is_query(&self) -> bool {
        !matches!(self.query, Query::None)
    }

    /// Whether it is an ICMP message that neither asks nor answers: nothing but its
    /// addresses says whose it is. An error is one, and what neighbours tell each other.
    #[inline(always)]
    pub const fn is_bare_icmp(&self) -> bool {
        self.is_icmp() && !self.is_query() && !matches!(self.fragment, Fragment::Later)
    }

    /// What is filled in by and by: returned parts would each take stack of their own.
    const EMPTY: Self = Self {
        tuple: Tuple {
            source: Address::UNSPECIFIED,
            destination: Address::UNSPECIFIED,
            source_port: 0,
            destination_port: 0,
        },
        fragment_id: 0,
        fragment_offset: 0,
        length: 0,
        l3: 0,
        l4: 0,
        checksum: None,
        version: Version::V4,
        protocol: 0,
        fragment: Fragment::Whole,
        more_fragments: false,
        query: Query::None,
    };

    #[inline(always)]
    fn set_fragment(&mut self, offset: u16, more: bool) {
        self.fragment_offset = offset;
        self.more_fragments = more;
        self.fragment = match (offset, more) {
            (0, false) => Fragment::Whole,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        };
    }

    /// What [`parse_plain`] said of a packet of this ethertype at `l3`, with the offsets
    /// as constants: they are not where it was kept meanwhile.
    #[inline(always)]
    pub const fn with_plain_offsets(&self, l3: usize, ethertype: u16) -> Self {
        let (version, header) = match ethertype {
            ETH_P_IP => (Version::V4, IPV4_HEADER_LEN),
            _ => (Version::V6, IPV6_HEADER_LEN),
        };
        let l4 = l3.wrapping_add(header) as u16;
        let checksum = match (self.checksum, self.protocol) {
            (None, _) => None,
            (Some(_), IPPROTO_TCP) => Some(l4.wrapping_add(TCP_CHECKSUM)),
            (Some(_), _) => Some(l4.wrapping_add(UDP_CHECKSUM)),
        };
        Self {
            l3: l3 as u16,
            l4,
            checksum,
            version,
            fragment: Fragment::Whole,
            query: Query::None,
            ..*self
        }
    }

    /// Whether the protocol has ports and they are in this packet.
    #[inline(always)]
    pub const fn has_ports(&self) -> bool {
        self.is_transport() && !matches!(self.fragment, Fragment::Later)
    }
}

/// Reads the packet whose IP header is at offset `l3` of the frame.
///
/// `None` if it is not IP, truncated or malformed; if its IPv6 extension headers are
/// too many, too long or cannot be skipped, or name a next destination that
/// the packet is still to visit; or if a first fragment is too short for its ports, or
/// an ICMP message's identifier, and its checksum.
#[inline(always)]
pub fn parse(packet: &impl Packet, l3: usize, ethertype: u16) -> Option<Parsed> {
    let mut parsed = Parsed::EMPTY;
    network(packet, l3, ethertype, &mut parsed)?;
    let end = match parsed.length {
        0 => usize::MAX,
        length => l3.wrapping_add(length as usize),
    };
    transport(packet, &mut parsed, end, false)?;
    Some(parsed)
}

/// Reads the packet as [`parse`] does, if it is a plain one: a whole TCP or UDP packet
/// that says its length, without IPv4 options and IPv6 extension headers.
///
/// Nothing is searched for, so every offset is known when the program is compiled: the
/// verifier must see that where a program reads the frame itself.
#[inline(always)]
pub fn parse_plain(packet: &impl Packet, l3: usize, ethertype: u16) -> Option<Parsed> {
    let mut parsed = Parsed::EMPTY;
    parsed.l3 = l3 as u16;
    let l4 = match ethertype {
        ETH_P_IP => {
            ipv4(packet, &mut parsed)?;
            l3.wrapping_add(IPV4_HEADER_LEN)
        }
        ETH_P_IPV6 => {
            ipv6_header(packet, &mut parsed)?;
            parsed.l4 = parsed.l3.wrapping_add(IPV6_HEADER_LEN as u16);
            l3.wrapping_add(IPV6_HEADER_LEN)
        }
        _ => return None,
    };
    if parsed.l4 as usize != l4
        || parsed.length == 0
        || parsed.fragment != Fragment::Whole
        || !matches!(parsed.protocol, IPPROTO_TCP | IPPROTO_UDP)
    {
        return None;
    }
    parsed.l4 = l4 as u16;
    let end = l3.wrapping_add(parsed.length as usize);
    transport(packet, &mut parsed, end, false)?;
    Some(parsed)
}

/// Whether the host's stack would take the packet from a wire: what goes past it must be
/// looked at in its place (RFC 1812 §5.2.2). It cannot be told by what [`parse`] says alone:
/// `room` is how many bytes the frame has from the first of the IP header on, and
/// `segmented` says that it will be cut into packets, whose length is not in the header.
#[inline(always)]
pub fn is_sound(packet: &impl Packet, parsed: &Parsed, room: usize, segmented: bool) -> bool {
    let length = parsed.length as usize;
    length <= room
        && (length != 0 || segmented)
        && match parsed.version {
            Version::V4 => is_sound_v4(packet, parsed) == Some(true),
            Version::V6 => {
                let next_and_hops = packet.load((parsed.l3 as usize).wrapping_add(6));
                next_and_hops.is_some_and(|[_, hops]: [u8; 2]| hops != 0)
            }
        }
}

#[inline(always)]
fn is_sound_v4(packet: &impl Packet, parsed: &Parsed) -> Option<bool> {
    let l3 = parsed.l3 as usize;
    let header: [u8; IPV4_HEADER_LEN] = packet.load(l3)?;
    let [_, _, _, _, _, _, _, _, hops, ..] = header;
    let mut sum = checksum::sum(header);
    for words in 5..15 {
        let at = l3.wrapping_add(words * 4);
        if at >= parsed.l4 as usize {
            break;
        }
        sum = sum.wrapping_add(checksum::sum(packet.load::<4>(at)?));
    }
    // Of all words, the checksum among them, the sum is all ones.
    Some(hops != 0 && checksum::is_sum([0xff; 2], sum))
}

/// Whether the packet looks like one whose transport checksum a device is still to
/// complete (`CHECKSUM_PARTIAL`): in place of the checksum it has the sum of the
/// pseudo-header. One finished checksum in 65536 looks the same.
///
/// `parsed` is what [`parse_plain`] says of the packet.
#[inline(always)]
pub fn looks_unfinished(packet: &impl Packet, parsed: &Parsed) -> Option<bool> {
    let Some(at) = parsed.checksum else {
        return Some(false);
    };
    let field = packet.load(at as usize)?;
    let length = parsed
        .length
        .wrapping_sub(parsed.l4.wrapping_sub(parsed.l3));
    let [high, low] = length.to_be_bytes();
    // What is before a mapped IPv4 address adds nothing: it is a zero of the sum.
    let pseudo_header = checksum::sum(parsed.tuple.source.octets())
        .wrapping_add(checksum::sum(parsed.tuple.destination.octets()))
        .wrapping_add(checksum::sum([high, low, 0, parsed.protocol]));
    Some(checksum::is_sum(field, pseudo_header))
}

/// Reads the packet that an ICMP or ICMPv6 error is about.
///
/// `None` if `outer` is no error or is fragmented, or if the quoted packet is not one
/// that [`parse`] would read, has no ports or identifier although its protocol has
/// some, or is a [`Later`](Fragment::Later) fragment.
#[inline(always)]
pub fn quoted(packet: &impl Packet, outer: &Parsed) -> Option<Parsed> {
    if outer.fragment != Fragment::Whole || outer.length == 0 {
        return None;
    }
    let [kind] = packet.load(outer.l4 as usize)?;
    let ethertype = match (outer.version, outer.protocol, kind) {
        // Destination unreachable, source quench, redirect, time exceeded, parameter
        // problem (RFC 792).
        (Version::V4, IPPROTO_ICMP, 3 | 4 | 5 | 11 | 12) => ETH_P_IP,
        // Destination unreachable, packet too big, time exceeded, parameter problem
        // (RFC 4443 §3).
        (Version::V6, IPPROTO_ICMPV6, 1..=4) => ETH_P_IPV6,
        _ => return None,
    };
    let l3 = (outer.l4 as usize).wrapping_add(ICMP_ERROR_LEN);
    let mut inner = Parsed::EMPTY;
    network(packet, l3, ethertype, &mut inner)?;
    if inner.fragment == Fragment::Later {
        return None;
    }
    // What comes after the end is the frame's padding, whatever it looks like.
    let mut end = (outer.l3 as usize).wrapping_add(outer.length as usize);
    let own_end = l3.wrapping_add(inner.length as usize);
    if inner.length != 0 && own_end < end {
        end = own_end;
    }
    if inner.l4 as usize > end {
        // A part of its header is in the padding, which no checksum covers.
        return None;
    }
    transport(packet, &mut inner, end, true)?;
    Some(inner)
}

/// Whether the packet is one by which IPv6 neighbours and routers find each other (RFC
/// 4861 §4): it is of no use behind a router.
#[inline(always)]
pub fn is_neighbor_discovery(packet: &impl Packet, parsed: &Parsed) -> bool {
    parsed.protocol == IPPROTO_ICMPV6
        && matches!(packet.load(parsed.l4 as usize), Some([133..=137]))
}

/// Reads the IP header and its extensions.
#[inline(always)]
fn network(packet: &impl Packet, l3: usize, ethertype: u16, parsed: &mut Parsed) -> Option<()> {
    if l3 > MAX_L3 {
        return None;
    }
    parsed.l3 = l3 as u16;
    match ethertype {
        ETH_P_IP => ipv4(packet, parsed),
        ETH_P_IPV6 => {
            ipv6_header(packet, parsed)?;
            skip_extensions(packet, parsed)
        }
        _ => None,
    }
}

#[inline(always)]
fn ipv4(packet: &impl Packet, parsed: &mut Parsed) -> Option<()> {
    let header: [u8; IPV4_HEADER_LEN] = packet.load(parsed.l3 as usize)?;
    #[rustfmt::skip]
    let [
        version_and_words, _, length_high, length_low,
        id_high, id_low, offset_high, offset_low,
        _, protocol, _, _,
        s0, s1, s2, s3,
        d0, d1, d2, d3,
    ] = header;
    let header_len = (version_and_words & 0xf) as u16 * 4;
    let length = u16::from_be_bytes([length_high, length_low]);
    if version_and_words >> 4 != 4
        || header_len < IPV4_HEADER_LEN as u16
        || (length != 0 && length < header_len)
    {
        return None;
    }
    let flags_and_offset = u16::from_be_bytes([offset_high, offset_low]);
    parsed.version = Version::V4;
    parsed.protocol = protocol;
    parsed.length = length;
    parsed.l4 = parsed.l3.wrapping_add(header_len);
    parsed.tuple.source = Address::v4([s0, s1, s2, s3]);
    parsed.tuple.destination = Address::v4([d0, d1, d2, d3]);
    parsed.fragment_id = u16::from_be_bytes([id_high, id_low]) as u32;
    parsed.set_fragment(
        (flags_and_offset & 0x1fff) << 3,
        flags_and_offset & 0x2000 != 0,
    );
    Some(())
}

#[inline(always)]
fn ipv6_header(packet: &impl Packet, parsed: &mut Parsed) -> Option<()> {
    let l3 = parsed.l3 as usize;
    let [version, _, _, _, length_high, length_low, next, _] = packet.load(l3)?;
    if version >> 4 != 6 {
        return None;
    }
    let payload = u16::from_be_bytes([length_high, length_low]);
    parsed.version = Version::V6;
    parsed.protocol = next;
    parsed.length = match payload {
        0 => 0,
        _ => payload.saturating_add(IPV6_HEADER_LEN as u16),
    };
    parsed.tuple.source = Address::v6(packet.load(l3.wrapping_add(8))?);
    parsed.tuple.destination = Address::v6(packet.load(l3.wrapping_add(24))?);
    if parsed.tuple.source.is_v4() || parsed.tuple.destination.is_v4() {
        // A mapped address on the wire would be taken for the IPv4 one (RFC 4942 §2.2).
        return None;
    }
    Some(())
}

/// Finds what follows the extension headers of an IPv6 packet.
#[inline(always)]
fn skip_extensions(packet: &impl Packet, parsed: &mut Parsed) -> Option<()> {
    let mut skipped = IPV6_HEADER_LEN;
    let mut fragmented = false;
    for _ in 0..=MAX_EXTENSION_HEADERS {
        let this = parsed.protocol;
        let at = (parsed.l3 as usize).wrapping_add(skipped);
        match this {
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS
                if parsed.fragment != Fragment::Later => {}
            MOBILITY | HOST_IDENTITY | SHIM6 if parsed.fragment != Fragment::Later => {
                return None;
            }
            _ => {
                if parsed.length != 0 && skipped > parsed.length as usize {
                    return None;
                }
                parsed.l4 = at as u16;
                return Some(());
            }
        }
        let [next, words, a, b, id @ ..]: [u8; 8] = packet.load(at)?;
        let words = words as usize;
        let len = match this {
            FRAGMENT => {
                if fragmented {
                    return None;
                }
                fragmented = true;
                let offset_and_more = u16::from_be_bytes([a, b]);
                parsed.set_fragment(offset_and_more & !7, offset_and_more & 1 != 0);
                parsed.fragment_id = u32::from_be_bytes(id);
                8
            }
            AUTHENTICATION => (words + 2) * 4,
            // The header's destination is not the one that checksums are made with.
            ROUTING if b != 0 => return None,
            _ => (words + 1) * 8,
        };
        skipped = skipped.wrapping_add(len);
        if skipped > MAX_HEADERS {
            return None;
        }
        parsed.protocol = next;
    }
    None
}

/// Reads ports or an identifier, and finds the checksum; `end` is where in the frame the
/// packet ends. Only a quoted one may end before its checksum.
#[inline(always)]
fn transport(packet: &impl Packet, parsed: &mut Parsed, end: usize, quoted: bool) -> Option<()> {
    if parsed.fragment == Fragment::Later {
        return Some(());
    }
    let l4 = parsed.l4 as usize;
    if parsed.has_ports() {
        if l4.wrapping_add(4) > end {
            return None;
        }
        let [a, b, c, d] = packet.load(l4)?;
        parsed.tuple.source_port = u16::from_be_bytes([a, b]);
        parsed.tuple.destination_port = u16::from_be_bytes([c, d]);
    }
    if let (Version::V4, IPPROTO_ICMP) | (Version::V6, IPPROTO_ICMPV6) =
        (parsed.version, parsed.protocol)
    {
        // Whatever the message is, it is longer than that.
        if l4.wrapping_add(ICMP_IDENTIFIER + 2) > end {
            return None;
        }
        let [kind, _, _, _, a, b] = packet.load(l4)?;
        let identifier = u16::from_be_bytes([a, b]);
        parsed.query = Query::of(parsed.version, kind);
        match parsed.query {
            Query::Request => parsed.tuple.source_port = identifier,
            Query::Reply => parsed.tuple.destination_port = identifier,
            Query::None => {}
        }
    }
    let offset = match (parsed.version, parsed.protocol) {
        (_, IPPROTO_TCP) => TCP_CHECKSUM as usize,
        (_, IPPROTO_UDP) => UDP_CHECKSUM as usize,
        (Version::V6, IPPROTO_ICMPV6) => ICMP_CHECKSUM,
        // SCTP's covers no addresses, and ICMP's neither.
        _ => return Some(()),
    };
    let at = l4.wrapping_add(offset);
    if at.wrapping_add(2) > end {
        return if quoted { Some(()) } else { None };
    }
    let checksum: [u8; 2] = packet.load(at)?;
    if parsed.protocol != IPPROTO_UDP || checksum != [0, 0] {
        parsed.checksum = Some(at as u16);
    }
    Some(())
}

#[cfg(test)]
mod tests;
