//! Packets for the tests, built by another implementation (etherparse): what the
//! translation leaves behind is compared to what a sender would have written.

use std::{vec, vec::Vec};

use etherparse::{
    Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpFragOffset, IpNumber, Ipv4Header,
    Ipv6FragmentHeader, Ipv6Header, TcpHeader, UdpHeader,
};
use proptest::{collection::vec as vec_of, prelude::*};

use crate::{
    frame::{ETH_HLEN, ETH_P_IP, ETH_P_IPV6},
    layout::Address,
    packet::{
        Fragment, IPPROTO_ICMP, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP, Packet, Parsed, Query,
        Tuple, Version, parse,
    },
    responder::IPPROTO_ICMPV6,
};

/// A frame that nobody else looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame(pub(crate) Vec<u8>);

impl Frame {
    /// `packet` after an Ethernet header, and before `padding`.
    pub(crate) fn new(version: Version, packet: &[u8], padding: &[u8]) -> Self {
        let mut frame = vec![0x5a; ETH_HLEN - 2];
        frame.extend(ethertype(version).to_be_bytes());
        frame.extend(packet);
        frame.extend(padding);
        Self(frame)
    }

    pub(crate) fn parse(&self, version: Version) -> Option<Parsed> {
        parse(self, ETH_HLEN, ethertype(version))
    }
}

impl Packet for Frame {
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at + N)?.try_into().ok()
    }

    fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        self.0.get_mut(at..at + N)?.copy_from_slice(&bytes);
        Some(())
    }
}

pub(crate) fn ethertype(version: Version) -> u16 {
    match version {
        Version::V4 => ETH_P_IP,
        Version::V6 => ETH_P_IPV6,
    }
}

/// What an IP packet carries.
#[derive(Clone, Debug)]
pub(crate) enum Transport {
    Tcp {
        options: Vec<u8>,
    },
    Udp {
        checksum: bool,
    },
    Sctp,
    /// The first half of `rest` is the tuple's port instead, if it is a query's.
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
    },
    Other,
}

/// Which part of a datagram a packet is; the unit is eight bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Whole,
    /// A fragment header that says that there are no other fragments (RFC 6946).
    Atomic,
    First(usize),
    Later(usize),
}

/// All of a packet but its addresses and ports.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) version: Version,
    pub(crate) transport: Transport,
    pub(crate) payload: Vec<u8>,
    /// IPv4 options.
    pub(crate) options: Vec<u8>,
    /// Types of IPv6 extension headers, and bytes that their length is taken from.
    pub(crate) extensions: Vec<(u8, u8)>,
    pub(crate) part: Part,
    pub(crate) id: u32,
    /// The checksum is the pseudo-header's sum only, as the stack leaves it to a device
    /// that completes it (`CHECKSUM_PARTIAL`).
    pub(crate) partial: bool,
}

impl Shape {
    pub(crate) fn plain(version: Version, transport: Transport) -> Self {
        Self {
            version,
            transport,
            payload: vec![7; 40],
            options: Vec::new(),
            extensions: Vec::new(),
            part: Part::Whole,
            id: 0,
            partial: false,
        }
    }

    pub(crate) fn tcp(version: Version) -> Self {
        Self::plain(version, Transport::Tcp { options: vec![] })
    }

    pub(crate) fn protocol(&self) -> u8 {
        match (&self.transport, self.version) {
            (Transport::Tcp { .. }, _) => IPPROTO_TCP,
            (Transport::Udp { .. }, _) => IPPROTO_UDP,
            (Transport::Sctp, _) => IPPROTO_SCTP,
            (Transport::Icmp { .. }, Version::V4) => IPPROTO_ICMP,
            (Transport::Icmp { .. }, Version::V6) => IPPROTO_ICMPV6,
            // GRE.
            (Transport::Other, _) => 47,
        }
    }

    pub(crate) fn has_ports(&self) -> bool {
        !matches!(self.transport, Transport::Icmp { .. } | Transport::Other)
            && !matches!(self.part, Part::Later(_))
    }

    /// What kind of ICMP query it is, in whatever fragment.
    fn query(&self) -> Query {
        let Transport::Icmp { kind, .. } = self.transport else {
            return Query::None;
        };
        let (requests, replies) = match self.version {
            Version::V4 => (&[8, 13, 15, 17][..], &[0, 14, 16, 18][..]),
            Version::V6 => (&[128][..], &[129][..]),
        };
        if requests.contains(&kind) {
            Query::Request
        } else if replies.contains(&kind) {
            Query::Reply
        } else {
            Query::None
        }
    }

    /// The four bytes after an ICMP message's checksum.
    fn rest(&self, rest: [u8; 4], tuple: &Tuple) -> [u8; 4] {
        let [a, b] = match self.query() {
            Query::None => return rest,
            Query::Request => tuple.source_port.to_be_bytes(),
            Query::Reply => tuple.destination_port.to_be_bytes(),
        };
        [a, b, rest[2], rest[3]]
    }

    /// What of the tuple is in the packet.
    pub(crate) fn shown(&self, tuple: &Tuple) -> Tuple {
        let mut tuple = *tuple;
        match self.query() {
            Query::Request if !matches!(self.part, Part::Later(_)) => tuple.destination_port = 0,
            Query::Reply if !matches!(self.part, Part::Later(_)) => tuple.source_port = 0,
            _ if !self.has_ports() => (tuple.source_port, tuple.destination_port) = (0, 0),
            _ => {}
        }
        tuple
    }

    /// The length of the IP header and its extensions.
    pub(crate) fn header_len(&self) -> usize {
        match self.version {
            Version::V4 => 20 + self.options.len(),
            Version::V6 => {
                let extensions = self.extensions.iter();
                let fragment = match self.part {
                    Part::Whole => 0,
                    Part::Atomic | Part::First(_) | Part::Later(_) => 8,
                };
                40 + fragment
                    + extensions
                        .map(|each| extension(*each, 0).len())
                        .sum::<usize>()
            }
        }
    }

    /// Where the transport checksum is, counted from the transport header.
    pub(crate) fn checksum_offset(&self) -> Option<usize> {
        match (&self.transport, self.version) {
            (Transport::Tcp { .. }, _) => Some(16),
            (Transport::Udp { checksum: true }, _) => Some(6),
            (Transport::Icmp { .. }, Version::V6) => Some(2),
            _ => None,
        }
    }

    /// The packet, from its IP header on.
    pub(crate) fn build(&self, tuple: &Tuple) -> Vec<u8> {
        let segment = self.segment(tuple);
        let (fragment, offset, more) = match self.part {
            Part::Whole | Part::Atomic => (&segment[..], 0, false),
            Part::First(units) => (&segment[..units * 8], 0, true),
            Part::Later(units) => (&segment[units * 8..], units as u16, false),
        };
        let offset = IpFragOffset::try_new(offset).unwrap();
        let mut packet = match self.version {
            Version::V4 => {
                let mut header = Ipv4Header {
                    total_len: (self.header_len() + fragment.len()) as u16,
                    identification: self.id as u16,
                    fragment_offset: offset,
                    more_fragments: more,
                    time_to_live: 64,
                    protocol: IpNumber(self.protocol()),
                    source: tuple.source.octets_v4(),
                    destination: tuple.destination.octets_v4(),
                    options: self.options[..].try_into().unwrap(),
                    ..Default::default()
                };
                header.header_checksum = header.calc_header_checksum();
                header.to_bytes().to_vec()
            }
            Version::V6 => {
                let fragmented = !matches!(self.part, Part::Whole);
                let last = if fragmented { 44 } else { self.protocol() };
                let types: Vec<u8> = self.extensions.iter().map(|(kind, _)| *kind).collect();
                let mut following = types.iter().copied().chain([last]);
                let header = Ipv6Header {
                    payload_length: (self.header_len() - 40 + fragment.len()) as u16,
                    next_header: IpNumber(following.next().unwrap()),
                    hop_limit: 64,
                    source: tuple.source.octets(),
                    destination: tuple.destination.octets(),
                    ..Default::default()
                };
                let mut packet = header.to_bytes().to_vec();
                for (each, next) in self.extensions.iter().zip(following) {
                    packet.extend(extension(*each, next));
                }
                if fragmented {
                    let next = IpNumber(self.protocol());
                    let header = Ipv6FragmentHeader::new(next, offset, more, self.id);
                    packet.extend(header.to_bytes());
                }
                packet
            }
        };
        packet.extend(fragment);
        packet
    }

    /// The transport header, its checksum made, and what follows.
    fn segment(&self, tuple: &Tuple) -> Vec<u8> {
        let (source, destination) = (tuple.source.octets(), tuple.destination.octets());
        let (source4, destination4) = (tuple.source.octets_v4(), tuple.destination.octets_v4());
        let v4 = self.version == Version::V4;
        let payload = &self.payload[..];
        let mut segment = match &self.transport {
            Transport::Tcp { options } => {
                let mut header = TcpHeader::new(tuple.source_port, tuple.destination_port, 1, 2);
                header.set_options_raw(options).unwrap();
                header.checksum = if v4 {
                    header.calc_checksum_ipv4_raw(source4, destination4, payload)
                } else {
                    header.calc_checksum_ipv6_raw(source, destination, payload)
                }
                .unwrap();
                header.to_bytes().to_vec()
            }
            Transport::Udp { checksum } => {
                let mut header = UdpHeader {
                    source_port: tuple.source_port,
                    destination_port: tuple.destination_port,
                    length: (8 + payload.len()) as u16,
                    checksum: 0,
                };
                if *checksum {
                    header.checksum = if v4 {
                        header.calc_checksum_ipv4_raw(source4, destination4, payload)
                    } else {
                        header.calc_checksum_ipv6_raw(source, destination, payload)
                    }
                    .unwrap();
                }
                header.to_bytes().to_vec()
            }
            Transport::Sctp => {
                let mut header = tuple.source_port.to_be_bytes().to_vec();
                header.extend(tuple.destination_port.to_be_bytes());
                // The verification tag, and a CRC32c that covers neither addresses nor
                // anything else that is changed.
                header.extend([1, 2, 3, 4, 5, 6, 7, 8]);
                header
            }
            Transport::Icmp { kind, code, rest } if v4 => {
                let message = Icmpv4Type::Unknown {
                    type_u8: *kind,
                    code_u8: *code,
                    bytes5to8: self.rest(*rest, tuple),
                };
                Icmpv4Header::with_checksum(message, payload)
                    .to_bytes()
                    .to_vec()
            }
            Transport::Icmp { kind, code, rest } => {
                let message = Icmpv6Type::Unknown {
                    type_u8: *kind,
                    code_u8: *code,
                    bytes5to8: self.rest(*rest, tuple),
                };
                Icmpv6Header::with_checksum(message, source, destination, payload)
                    .unwrap()
                    .to_bytes()
                    .to_vec()
            }
            Transport::Other => Vec::new(),
        };
        segment.extend(payload);
        if self.partial
            && let Some(at) = self.checksum_offset()
        {
            let mut pseudo = if v4 {
                [source4, destination4].concat()
            } else {
                [source, destination].concat()
            };
            pseudo.extend((segment.len() as u32).to_be_bytes());
            pseudo.extend([0, 0, 0, self.protocol()]);
            segment[at..at + 2].copy_from_slice(&sum(&pseudo).to_be_bytes());
        }
        segment
    }
}

/// An extension header; its length comes from `size`, and a routing header has nowhere
/// left to go.
fn extension((kind, size): (u8, u8), next: u8) -> Vec<u8> {
    let (words, len) = match kind {
        51 => (1 + (size % 4), 12 + usize::from(size % 4) * 4),
        _ => (size % 3, 8 + usize::from(size % 3) * 8),
    };
    let mut header = vec![next, words, 0, 0];
    header.resize(len, size);
    header
}

/// The one's complement sum of words in network order.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    for word in bytes.chunks(2) {
        sum += u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// A tuple that is easy to recognize.
pub(crate) fn tuple(version: Version, number: u8) -> Tuple {
    let address = |last| match version {
        Version::V4 => Address::v4([10, 0, number, last]),
        Version::V6 => Address::v6([
            0x20, 1, 0xd, 0xb8, 0, 0, 0, number, 0, 0, 0, 0, 0, 0, 0, last,
        ]),
    };
    Tuple {
        source: address(1),
        destination: address(2),
        source_port: 40_000 + u16::from(number),
        destination_port: 80 + u16::from(number),
    }
}

/// Bytes that carries, and words of zeroes and ones, are frequent among.
fn byte() -> impl Strategy<Value = u8> + Clone {
    any::<[u8; 2]>().prop_map(|[kind, other]| match kind {
        0..80 => 0,
        80..160 => 0xff,
        _ => other,
    })
}

pub(crate) fn version() -> impl Strategy<Value = Version> {
    prop_oneof![Just(Version::V4), Just(Version::V6)]
}

fn address(version: Version) -> BoxedStrategy<Address> {
    match version {
        Version::V4 => proptest::array::uniform4(byte())
            .prop_map(Address::v4)
            .boxed(),
        Version::V6 => proptest::array::uniform16(byte())
            .prop_map(Address::v6)
            // Those are of IPv4, and no packet may have them.
            .prop_filter("mapped", |address| !address.is_v4())
            .boxed(),
    }
}

pub(crate) fn tuples(version: Version) -> impl Strategy<Value = Tuple> {
    let ends = (address(version), address(version));
    (ends, any::<u16>(), any::<u16>()).prop_map(
        |((source, destination), source_port, destination_port)| Tuple {
            source,
            destination,
            source_port,
            destination_port,
        },
    )
}

/// `len` bytes; what is in them matters less.
fn data(len: impl Strategy<Value = usize>) -> impl Strategy<Value = Vec<u8>> {
    (proptest::array::uniform4(byte()), len)
        .prop_map(|(bytes, len)| bytes.into_iter().cycle().take(len).collect())
}

/// TCP's or IPv4's options: up to ten words.
fn options() -> impl Strategy<Value = Vec<u8>> {
    data((0..=10usize).prop_map(|words| words * 4))
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![
        3 => options().prop_map(|options| Transport::Tcp { options }),
        2 => Just(Transport::Udp { checksum: true }),
        1 => Just(Transport::Udp { checksum: false }),
        1 => Just(Transport::Sctp),
        // Queries in either protocol's numbers, and what is neither that nor an error.
        2 => (
            prop::sample::select(&[8, 13, 15, 17, 0, 14, 16, 18, 128, 129, 9, 133][..]),
            any::<[u8; 4]>(),
        ).prop_map(|(kind, rest)| Transport::Icmp { kind, code: 0, rest }),
        1 => Just(Transport::Other),
    ]
}

fn part() -> impl Strategy<Value = Part> {
    prop_oneof![
        3 => Just(Part::Whole),
        1 => Just(Part::Atomic),
        // The first must hold a TCP checksum.
        1 => (3..=7usize).prop_map(Part::First),
        1 => (1..=7usize).prop_map(Part::Later),
    ]
}

pub(crate) fn shapes(version: Version) -> impl Strategy<Value = Shape> {
    let kind = prop_oneof![Just(0u8), Just(43), Just(51), Just(60)];
    let extensions = vec_of((kind, any::<u8>()), 0..=5);
    (
        transport(),
        data(60..=100usize),
        options(),
        extensions,
        part(),
        any::<u32>(),
    )
        .prop_map(
            move |(transport, payload, options, extensions, part, id)| Shape {
                version,
                transport,
                payload,
                options,
                extensions,
                part,
                id: match (version, part) {
                    (Version::V4, _) => id & 0xffff,
                    (Version::V6, Part::Whole) => 0,
                    (Version::V6, _) => id,
                },
                partial: false,
            },
        )
}

/// An ICMP or ICMPv6 error without its addresses.
#[derive(Clone, Debug)]
pub(crate) struct ErrorShape {
    /// The error's own packet; what it carries is made by [`ErrorShape::build`].
    pub(crate) outer: Shape,
    /// The packet that it is about.
    pub(crate) inner: Shape,
    /// How much of that is quoted after the eight bytes that always are.
    pub(crate) more: usize,
}

impl ErrorShape {
    pub(crate) fn build(&self, outer: &Tuple, inner: &Tuple) -> Vec<u8> {
        let mut shape = self.outer.clone();
        shape.payload = self.inner.build(inner);
        shape
            .payload
            .truncate(self.inner.header_len() + 8 + self.more);
        shape.build(outer)
    }
}

pub(crate) fn errors(version: Version) -> impl Strategy<Value = ErrorShape> {
    let kind = match version {
        Version::V4 => prop_oneof![Just(3u8), Just(4), Just(5), Just(11), Just(12)].boxed(),
        Version::V6 => (1..=4u8).boxed(),
    };
    let inner = shapes(version).prop_map(|mut inner| {
        if matches!(inner.part, Part::Later(_)) {
            inner.part = Part::First(3);
        }
        inner
    });
    let message = (kind, any::<u8>(), any::<[u8; 4]>());
    let more = prop_oneof![0..=20usize, Just(usize::MAX / 2)]
        // Half of a TCP checksum is left as it is: nobody could check it.
        .prop_filter("half a checksum", |more| *more != 9);
    (shapes(version), inner, message, more).prop_map(|(mut outer, inner, message, more)| {
        let (kind, code, rest) = message;
        outer.transport = Transport::Icmp { kind, code, rest };
        if !matches!(outer.part, Part::Whole | Part::Atomic) {
            outer.part = Part::Atomic;
        }
        ErrorShape { outer, inner, more }
    })
}

/// What [`parse`] must say of the packet, at the place where [`Frame::new`] puts it.
pub(crate) fn expected(shape: &Shape, tuple: &Tuple) -> Parsed {
    let length = shape.build(tuple).len() as u16;
    let l4 = ETH_HLEN + shape.header_len();
    let (fragment, units) = match shape.part {
        Part::Whole | Part::Atomic => (Fragment::Whole, 0),
        Part::First(_) => (Fragment::First, 0),
        Part::Later(units) => (Fragment::Later, units),
    };
    let checksum = shape.checksum_offset().map(|offset| (l4 + offset) as u16);
    Parsed {
        tuple: shape.shown(tuple),
        fragment_id: shape.id,
        fragment_offset: units as u16 * 8,
        length,
        l3: ETH_HLEN as u16,
        l4: l4 as u16,
        checksum: checksum.filter(|_| fragment != Fragment::Later),
        version: shape.version,
        protocol: shape.protocol(),
        fragment,
        more_fragments: fragment == Fragment::First,
        query: match fragment {
            Fragment::Later => Query::None,
            _ => shape.query(),
        },
    }
}
