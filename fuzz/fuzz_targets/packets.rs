//! Packets: the parsers, the translators and the responder of the eBPF programs.
//!
//! What they read of a packet is what another implementation (etherparse) reads; what
//! they translate has the addresses and ports that were asked for, checksums as right as
//! they were, and nothing else changed; undone, it is what it was.

#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use bpf_bridge_common::{
    frame::{ETH_HLEN, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6},
    guard::{self, Payload, Said},
    layout::Address,
    packet::{
        Fragment, IPPROTO_ICMP, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP, MAX_HEADERS, Packet,
        Parsed, Query, Tuple, Version, is_neighbor_discovery, looks_unfinished, parse, parse_plain,
        quoted,
    },
    responder::{ARP_FRAME_LEN, ArpRequest, IPPROTO_ICMPV6, NS_FRAME_LEN, NeighborSolicitation},
    translate::{pass_on, rewrite, rewrite_quoted},
};
use etherparse::{
    ArpOperation, ArpPacketSlice, Icmpv6Slice, IpPayloadSlice, Ipv4Slice, Ipv6Slice,
    TcpHeaderSlice, UdpHeaderSlice,
};
use libfuzzer_sys::fuzz_target;

/// A frame that nobody else looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Frame(Vec<u8>);

impl Packet for Frame {
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        self.0
            .get_mut(at..at.checked_add(N)?)?
            .copy_from_slice(&bytes);
        Some(())
    }
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    v6: bool,
    l3: u8,
    /// What addresses and ports become, for the packet and for one that it quotes.
    to: [[u8; 36]; 2],
    frame: &'a [u8],
}

fuzz_target!(|data: &[u8]| {
    neighbors(data);
    claims(data);
    // The frame is what is left when the rest was read.
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let l3 = usize::from(input.l3 % 24);
    let (version, ethertype, first) = if input.v6 {
        (Version::V6, ETH_P_IPV6, 0x60)
    } else {
        (Version::V4, ETH_P_IP, 0x40)
    };
    let mut frame = Frame(vec![0x5a; l3]);
    frame.0.extend(input.frame);
    if let Some(byte) = frame.0.get_mut(l3) {
        *byte = first | *byte & 0xf;
    }
    let Some(parsed) = parse(&frame, l3, ethertype) else {
        assert_eq!(parse_plain(&frame, l3, ethertype), None);
        return;
    };
    assert_eq!(parsed.version, version);
    assert!(usize::from(parsed.l4) <= l3 + MAX_HEADERS);
    if let Some(plain) = parse_plain(&frame, l3, ethertype) {
        assert_eq!(plain, parsed);
        assert_eq!(plain.with_plain_offsets(l3, ethertype), plain);
        assert!(looks_unfinished(&frame, &plain).is_some());
    }
    let _ = is_neighbor_discovery(&frame, &parsed);
    compare(&frame, &parsed);

    let [to, inner_to] = input.to.map(|bytes| tuple(version, bytes));
    translate(&frame, &parsed, &to, ethertype);
    forward(&frame, &parsed, ethertype);
    if let Some(inner) = quoted(&frame, &parsed) {
        assert_eq!(parsed.fragment, Fragment::Whole);
        assert_ne!(inner.fragment, Fragment::Later);
        translate_quoted(&frame, [&parsed, &inner], [&to, &inner_to], ethertype);
    }
});

fn tuple(version: Version, bytes: [u8; 36]) -> Tuple {
    let part = |at: usize| -> [u8; 16] { bytes[at..at + 16].try_into().unwrap_or_default() };
    let address = |octets: [u8; 16]| match version {
        Version::V4 => Address::v4([octets[0], octets[1], octets[2], octets[3]]),
        Version::V6 => match Address::v6(octets) {
            // No packet may have one.
            mapped if mapped.is_v4() => Address::LOOPBACK,
            address => address,
        },
    };
    Tuple {
        source: address(part(0)),
        destination: address(part(16)),
        source_port: u16::from_be_bytes([bytes[32], bytes[33]]),
        destination_port: u16::from_be_bytes([bytes[34], bytes[35]]),
    }
}

/// The bytes of the packet, as its header says how many, if they are all there.
fn whole<'a>(frame: &'a Frame, parsed: &Parsed) -> Option<&'a [u8]> {
    let l3 = usize::from(parsed.l3);
    let length = usize::from(parsed.length);
    (length != 0)
        .then(|| frame.0.get(l3..l3 + length))
        .flatten()
}

/// Another implementation says the same of the packet.
fn compare(frame: &Frame, parsed: &Parsed) {
    let Some(bytes) = whole(frame, parsed) else {
        return;
    };
    let (source, destination) = (parsed.tuple.source, parsed.tuple.destination);
    let payload: IpPayloadSlice<'_> = match parsed.version {
        Version::V4 => {
            let Ok(packet) = Ipv4Slice::from_slice(bytes) else {
                return;
            };
            assert_eq!(packet.header().source(), source.octets_v4());
            assert_eq!(packet.header().destination(), destination.octets_v4());
            assert_eq!(packet.header().protocol().0, parsed.protocol);
            let fragment = packet.header().fragments_offset().byte_offset();
            assert_eq!(fragment, parsed.fragment_offset);
            assert_eq!(packet.header().more_fragments(), parsed.more_fragments);
            if packet.extensions().auth.is_some() {
                // To them an authentication header is a part of IPv4's.
                return;
            }
            packet.payload().clone()
        }
        Version::V6 => {
            if parsed.length == u16::MAX {
                return;
            }
            let Ok(packet) = Ipv6Slice::from_slice(bytes) else {
                return;
            };
            assert_eq!(packet.header().source(), source.octets());
            assert_eq!(packet.header().destination(), destination.octets());
            if parsed.fragment == Fragment::Later {
                return;
            }
            packet.payload().clone()
        }
    };
    assert_eq!(payload.fragmented, parsed.fragment != Fragment::Whole);
    if payload.ip_number.0 == parsed.protocol {
        let at = payload.payload.as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(
            at,
            usize::from(parsed.l4 - parsed.l3),
            "where the payload is"
        );
    } else {
        // They stop at a header that we skip, if it is not in its place.
        assert_eq!(parsed.version, Version::V6);
        assert!(
            matches!(payload.ip_number.0, 0 | 43 | 44 | 51 | 60),
            "{:?}",
            payload.ip_number
        );
        return;
    }
    let ports = match parsed.protocol {
        _ if parsed.fragment == Fragment::Later => (0, 0),
        IPPROTO_TCP => match TcpHeaderSlice::from_slice(payload.payload) {
            Ok(tcp) => (tcp.source_port(), tcp.destination_port()),
            Err(_) => return,
        },
        IPPROTO_UDP => match UdpHeaderSlice::from_slice(payload.payload) {
            Ok(udp) => {
                assert_eq!(parsed.checksum.is_some(), udp.checksum() != 0);
                (udp.source_port(), udp.destination_port())
            }
            Err(_) => return,
        },
        _ => return,
    };
    assert_eq!(
        (parsed.tuple.source_port, parsed.tuple.destination_port),
        ports
    );
}

/// The one's complement sum of words in network order.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes
        .chunks(2)
        .map(|word| u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum
}

/// Whether a checksum among the bytes is right. That of nothing but zeroes may be written
/// in two ways, and a difference cannot tell them apart.
fn is_right(bytes: &[u8]) -> bool {
    sum(bytes) % 0xffff == 0
}

/// Whether each checksum is right; `None` for one that is not there, or whose bytes are
/// not all there.
#[derive(Debug, PartialEq, Eq)]
struct Right {
    header: Option<bool>,
    transport: Option<bool>,
}

fn right(frame: &Frame, parsed: &Parsed) -> Right {
    let l3 = usize::from(parsed.l3);
    let l4 = usize::from(parsed.l4);
    let header = match parsed.version {
        Version::V4 => frame.0.get(l3..l4).map(|header| is_right(header)),
        Version::V6 => None,
    };
    let icmp = parsed.version == Version::V4 && parsed.protocol == IPPROTO_ICMP;
    let covered = parsed.checksum.is_some() || icmp;
    let transport = whole(frame, parsed)
        .filter(|_| covered && parsed.fragment == Fragment::Whole)
        .and_then(|packet| packet.get(l4 - l3..))
        .map(|segment| {
            let mut all = Vec::new();
            if !icmp {
                // Of IPv4 only the words that are not zero count, so both may be written so.
                all.extend(match parsed.version {
                    Version::V4 => [
                        parsed.tuple.source.octets_v4(),
                        parsed.tuple.destination.octets_v4(),
                    ]
                    .concat(),
                    Version::V6 => [
                        parsed.tuple.source.octets(),
                        parsed.tuple.destination.octets(),
                    ]
                    .concat(),
                });
                all.extend((segment.len() as u32).to_be_bytes());
                all.extend([0, 0, 0, parsed.protocol]);
            }
            all.extend(segment);
            is_right(&all)
        });
    Right { header, transport }
}

/// What was right is so still, and what was wrong has not become right.
fn as_right(before: (&Frame, &Parsed), after: (&Frame, &Parsed)) {
    let was = right(before.0, before.1);
    let is = right(after.0, after.1);
    assert_eq!(was, is, "{before:02x?} became {after:02x?}");
}

/// What of the tuple a packet like this one shows.
fn shown(parsed: &Parsed, to: &Tuple) -> Tuple {
    let (source_port, destination_port) = match parsed.query {
        _ if parsed.has_ports() => (to.source_port, to.destination_port),
        Query::Request => (to.source_port, 0),
        Query::Reply => (0, to.destination_port),
        Query::None => (0, 0),
    };
    Tuple {
        source_port,
        destination_port,
        ..*to
    }
}

/// Whether the frames are the same, but for checksums of zero, which may be written in
/// two ways.
fn same(one: &Frame, other: &Frame) -> bool {
    let words = |frame: &Frame, from: usize| -> Vec<[u8; 2]> {
        frame.0[from..]
            .chunks_exact(2)
            .map(|word| [word[0], word[1]])
            .collect()
    };
    let alike = |from: usize| {
        let all = words(one, from).into_iter().zip(words(other, from));
        all.clone()
            .filter(|(a, b)| a != b)
            .all(|(a, b)| matches!((a, b), ([0, 0], [255, 255]) | ([255, 255], [0, 0])))
    };
    // Checksums lie at even or at odd offsets of the frame, all of them.
    one.0.len() == other.0.len() && (one == other || alike(0) || one.0.len() > 1 && alike(1))
}

fn translate(before: &Frame, parsed: &Parsed, to: &Tuple, ethertype: u16) {
    let mut frame = before.clone();
    let to = shown(parsed, to);
    if rewrite(&mut frame, parsed, &to).is_none() {
        let tuple = &parsed.tuple;
        let ports = |tuple: &Tuple| (tuple.source_port, tuple.destination_port);
        assert_eq!(parsed.protocol, IPPROTO_SCTP);
        assert_ne!(ports(tuple), ports(&to));
        assert_eq!(&frame, before);
        return;
    }
    let after = parse(&frame, usize::from(parsed.l3), ethertype).expect("what was translated");
    assert_eq!(
        after,
        Parsed {
            tuple: to,
            ..*parsed
        }
    );
    as_right((before, parsed), (&frame, &after));
    assert_eq!(rewrite(&mut frame, &after, &parsed.tuple), Some(()));
    assert!(same(&frame, before), "undone: {frame:02x?} {before:02x?}");
}

fn translate_quoted(before: &Frame, parsed: [&Parsed; 2], to: [&Tuple; 2], ethertype: u16) {
    let [outer, inner] = parsed;
    let mut frame = before.clone();
    let (own, about) = (shown(outer, to[0]), shown(inner, to[1]));
    let rewritten = rewrite_quoted(
        &mut frame,
        outer,
        inner,
        &own.source,
        &own.destination,
        &about,
    );
    if rewritten.is_none() {
        assert_eq!(inner.protocol, IPPROTO_SCTP);
        assert_eq!(&frame, before);
        return;
    }
    let l3 = usize::from(outer.l3);
    let outer_after = parse(&frame, l3, ethertype).expect("what was translated");
    assert_eq!(
        outer_after,
        Parsed {
            tuple: own,
            ..*outer
        }
    );
    let inner_after = quoted(&frame, &outer_after).expect("what it is about");
    assert_eq!(
        inner_after,
        Parsed {
            tuple: about,
            ..*inner
        }
    );
    as_right((before, outer), (&frame, &outer_after));
    as_right((before, inner), (&frame, &inner_after));
    let (own, about) = (&outer.tuple, &inner.tuple);
    let undone = rewrite_quoted(
        &mut frame,
        &outer_after,
        &inner_after,
        &own.source,
        &own.destination,
        about,
    );
    assert_eq!(undone, Some(()));
    assert!(same(&frame, before), "undone: {frame:02x?} {before:02x?}");
}

fn forward(before: &Frame, parsed: &Parsed, ethertype: u16) {
    let mut frame = before.clone();
    let l3 = usize::from(parsed.l3);
    let at = l3
        + match parsed.version {
            Version::V4 => 8,
            Version::V6 => 7,
        };
    let goes_on = pass_on(&mut frame, parsed);
    assert_eq!(goes_on, before.0[at] > 1);
    if !goes_on {
        assert_eq!(&frame, before);
        return;
    }
    assert_eq!(frame.0[at], before.0[at] - 1);
    assert_eq!(parse(&frame, l3, ethertype).as_ref(), Some(parsed));
    as_right((before, parsed), (&frame, parsed));
}

/// What another implementation finds somebody to say of addresses, so do we.
fn claims(data: &[u8]) {
    let Payload::Packet(ethertype, l3) = guard::payload(data) else {
        return;
    };
    assert!(l3 == ETH_HLEN || l3 == ETH_HLEN + 4);
    let said = guard::said(data, ethertype, l3);
    let packet = &data[l3..];
    match ethertype {
        ETH_P_ARP => {
            let Ok(arp) = ArpPacketSlice::from_slice(packet) else {
                return;
            };
            if let (6, Ok(sender)) = (arp.hw_addr_size(), arp.sender_protocol_addr().try_into()) {
                assert_eq!(said, Said::V4(sender));
            }
        }
        ETH_P_IPV6 => {
            let Ok(packet) = Ipv6Slice::from_slice(packet) else {
                return;
            };
            let (header, payload) = (packet.header(), packet.payload());
            let message = payload.payload;
            if payload.ip_number.0 != IPPROTO_ICMPV6 || message.len() < 24 {
                return;
            }
            let target = message[8..24].try_into().unwrap_or_default();
            let expected = match message[0] {
                _ if header.hop_limit() != 255 => Said::Nothing,
                133..=137 if payload.fragmented => Said::Hidden,
                133 => Said::V6(header.source()),
                134 => Said::Advertised(header.source()),
                135 if header.source() == [0; 16] => Said::V6(target),
                135 => Said::V6(header.source()),
                136 => Said::V6(target),
                137 => Said::Redirected(target),
                _ => Said::Nothing,
            };
            // It skips more headers than we do.
            let later = said == Said::Nothing && payload.fragmented;
            assert!(
                said == expected || said == Said::Hidden || later,
                "{said:?} {expected:?}"
            );
        }
        _ => {}
    }
}

/// Questions of neighbours, and the answers to them.
fn neighbors(data: &[u8]) {
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
    if let Some(frame) = data.first_chunk::<ARP_FRAME_LEN>()
        && let Some(asked) = ArpRequest::parse(frame)
    {
        let theirs = ArpPacketSlice::from_slice(&frame[14..]).expect("a request is ARP");
        assert_eq!(theirs.operation(), ArpOperation::REQUEST);
        assert_eq!(theirs.sender_hw_addr(), asked.sender_mac);
        assert_eq!(theirs.sender_protocol_addr(), asked.sender);
        assert_eq!(theirs.target_protocol_addr(), asked.target);
        let reply = asked.reply(MAC);
        let theirs = ArpPacketSlice::from_slice(&reply[14..]).expect("a reply is ARP");
        assert_eq!(theirs.operation(), ArpOperation::REPLY);
        assert_eq!(theirs.sender_hw_addr(), MAC);
        assert_eq!(theirs.sender_protocol_addr(), asked.target);
        assert_eq!(theirs.target_hw_addr(), asked.sender_mac);
        assert_eq!(theirs.target_protocol_addr(), asked.sender);
        assert_eq!(reply[..6], asked.sender_mac);
    }
    if let Some(frame) = data.first_chunk::<NS_FRAME_LEN>()
        && let Some(asked) = NeighborSolicitation::parse(frame)
    {
        assert_eq!(frame[20], IPPROTO_ICMPV6);
        let answer = asked.advertisement(MAC, true);
        let packet = Ipv6Slice::from_slice(&answer[14..]).expect("an answer is IPv6");
        let header = packet.header();
        assert_eq!(header.source(), asked.target);
        let message = Icmpv6Slice::from_slice(packet.payload().payload).expect("and ICMPv6");
        assert!(message.is_checksum_valid(header.source(), header.destination()));
        assert_eq!(message.type_u8(), 136);
        let nameless = asked.sender == [0; 16];
        assert_eq!(
            header.destination()[0] == 0xff,
            nameless || asked.sender[0] == 0xff
        );
    }
}
