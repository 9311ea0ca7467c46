use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::{
    frame::{ETH_HLEN, ETH_P_ARP},
    testing::{
        ErrorShape, Frame, Part, Shape, Transport, errors, ethertype, expected, shapes, tuple,
        tuples, version,
    },
};

const VERSIONS: [Version; 2] = [Version::V4, Version::V6];

fn frame(shape: &Shape) -> Frame {
    let version = shape.version;
    Frame::new(version, &shape.build(&tuple(version, 1)), &[])
}

/// The frame of `shape` with `bytes` written at offset `at` of the packet.
fn patched(shape: &Shape, at: usize, bytes: &[u8]) -> Option<Parsed> {
    let mut frame = frame(shape);
    frame.0[ETH_HLEN + at..][..bytes.len()].copy_from_slice(bytes);
    frame.parse(shape.version)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn what_was_built_is_read(
        (shape, tuple) in version().prop_flat_map(|version| (shapes(version), tuples(version))),
        padding: Vec<u8>,
    ) {
        let frame = Frame::new(shape.version, &shape.build(&tuple), &padding);
        prop_assert_eq!(frame.parse(shape.version), Some(expected(&shape, &tuple)));
    }

    #[test]
    fn a_plain_packet_is_read_the_same_without_a_search(
        (mut shape, tuple) in version().prop_flat_map(|version| (shapes(version), tuples(version))),
        padding: Vec<u8>,
        bare: bool,
    ) {
        if bare {
            shape.options.clear();
            shape.extensions.clear();
        }
        let version = shape.version;
        let frame = Frame::new(version, &shape.build(&tuple), &padding);
        let no_extras = match version {
            Version::V4 => shape.options.is_empty(),
            Version::V6 => shape.extensions.is_empty() && !matches!(shape.part, Part::Atomic),
        };
        let parsed = expected(&shape, &tuple);
        let plain = no_extras
            && matches!(shape.transport, Transport::Tcp { .. } | Transport::Udp { .. })
            && parsed.fragment == Fragment::Whole;
        let read = parse_plain(&frame, ETH_HLEN, ethertype(version));
        prop_assert_eq!(read, plain.then_some(parsed));
        if let Some(read) = read {
            let again = read.with_plain_offsets(ETH_HLEN, ethertype(version));
            prop_assert_eq!(again, read);
        }
    }

    #[test]
    fn an_unfinished_checksum_looks_like_one(
        (mut shape, tuple) in version().prop_flat_map(|version| (shapes(version), tuples(version))),
        padding: Vec<u8>,
    ) {
        shape.options.clear();
        shape.extensions.clear();
        shape.part = Part::Whole;
        shape.partial = true;
        let version = shape.version;
        let frame = Frame::new(version, &shape.build(&tuple), &padding);
        if let Some(parsed) = parse_plain(&frame, ETH_HLEN, ethertype(version)) {
            let has_one = parsed.checksum.is_some();
            prop_assert_eq!(looks_unfinished(&frame, &parsed), Some(has_one));
        }
    }

    #[test]
    fn what_an_error_is_about_is_read(
        (error, own, about) in version().prop_flat_map(|version| {
            (errors(version), tuples(version), tuples(version))
        }),
        padding: Vec<u8>,
    ) {
        let version = error.outer.version;
        let frame = Frame::new(version, &error.build(&own, &about), &padding);
        let outer = frame.parse(version).unwrap();
        let mut expected = expected(&error.inner, &about);
        let shift = outer.l4 + 8 - expected.l3;
        expected.l3 += shift;
        expected.l4 += shift;
        expected.checksum = expected.checksum.map(|at| at + shift);
        // A UDP packet's zero stands at the end of what is always quoted, and is seen.
        let end = outer.l3 + outer.length;
        expected.checksum = expected.checksum.filter(|at| at + 2 <= end);
        prop_assert_eq!(quoted(&frame, &outer), Some(expected));
    }

    #[test]
    fn no_bytes_make_it_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        l3 in prop_oneof![0..200usize, any::<usize>()],
        v6: bool,
    ) {
        let mut frame = Frame(bytes);
        let (first, ethertype) = if v6 { (0x60, ETH_P_IPV6) } else { (0x45, ETH_P_IP) };
        if let Some(byte) = frame.0.get_mut(l3) {
            *byte = first;
        }
        if let Some(outer) = parse(&frame, l3, ethertype) {
            prop_assert!(usize::from(outer.l4) <= l3 + MAX_HEADERS);
            let _ = quoted(&frame, &outer);
        }
        if let Some(plain) = parse_plain(&frame, l3, ethertype) {
            prop_assert_eq!(parse(&frame, l3, ethertype), Some(plain));
            let _ = looks_unfinished(&frame, &plain);
        }
    }
}

#[test]
fn a_finished_checksum_does_not_look_unfinished() {
    for version in VERSIONS {
        for transport in [
            Transport::Tcp { options: vec![] },
            Transport::Udp { checksum: true },
            Transport::Udp { checksum: false },
        ] {
            let frame = frame(&Shape::plain(version, transport));
            let parsed = parse_plain(&frame, ETH_HLEN, ethertype(version)).unwrap();
            assert_eq!(looks_unfinished(&frame, &parsed), Some(false));
        }
    }
}

#[test]
fn a_packet_that_is_cut_or_leaves_its_length_open_is_not_plain() {
    for version in VERSIONS {
        for transport in [
            Transport::Tcp { options: vec![] },
            Transport::Udp { checksum: true },
        ] {
            let whole = frame(&Shape::plain(version, transport));
            let plain = |frame: &Frame| parse_plain(frame, ETH_HLEN, ethertype(version));
            let enough = usize::from(plain(&whole).unwrap().checksum.unwrap()) + 2;
            for len in 0..whole.0.len() {
                let read = plain(&Frame(whole.0[..len].to_vec())).is_some();
                assert_eq!(read, len >= enough, "{version:?}: {len} bytes");
            }
            let mut open = whole.clone();
            let at = ETH_HLEN + if version == Version::V4 { 2 } else { 4 };
            open.0[at..at + 2].fill(0);
            assert_eq!(plain(&open), None);
        }
    }
}

#[test]
fn other_protocols_are_not_ip() {
    let frame = frame(&Shape::tcp(Version::V4));
    assert!(parse(&frame, ETH_HLEN, ETH_P_IP).is_some());
    assert_eq!(parse(&frame, ETH_HLEN, ETH_P_IPV6), None, "version 4");
    assert_eq!(parse(&frame, ETH_HLEN, ETH_P_ARP), None);
    let frame = self::frame(&Shape::tcp(Version::V6));
    assert_eq!(parse(&frame, ETH_HLEN, ETH_P_IP), None, "version 6");
}

#[test]
fn a_header_is_not_looked_for_far_away() {
    let packet = Shape::tcp(Version::V4).build(&tuple(Version::V4, 1));
    for (l3, read) in [(MAX_L3, true), (MAX_L3 + 1, false), (70_000, false)] {
        let mut frame = Frame(std::vec![0; l3]);
        frame.0.extend(&packet);
        assert_eq!(parse(&frame, l3, ETH_P_IP).is_some(), read, "{l3}");
    }
}

#[test]
fn a_protocol_number_means_the_same_in_its_own_version_only() {
    // ICMPv6 in IPv4, and ICMP in IPv6: nobody's checksum, and no error.
    for (version, at, protocol) in [(Version::V4, 9, 58), (Version::V6, 6, 1)] {
        let packet = error(Shape::tcp(version), 3).build(&tuple(version, 1), &tuple(version, 2));
        let mut frame = Frame::new(version, &packet, &[]);
        frame.0[ETH_HLEN + at] = protocol;
        let parsed = frame.parse(version).unwrap();
        assert_eq!(parsed.protocol, protocol);
        assert_eq!(parsed.checksum, None);
        assert_eq!(quoted(&frame, &parsed), None);
    }
}

#[test]
fn nothing_behind_a_later_fragments_header_is_read() {
    let mut shape = Shape::tcp(Version::V6);
    shape.part = Part::Later(1);
    // 0x80 in place of a type would be an echo request's.
    shape.payload = [0x80; 40].to_vec();
    for next in [0, 43, 44, 50, 51, 60, 135, 58] {
        let parsed = patched(&shape, 40, &[next]).unwrap();
        assert!(!parsed.is_query());
        assert_eq!((parsed.protocol, parsed.l4), (next, ETH_HLEN as u16 + 48));
        assert_eq!((parsed.checksum, parsed.has_ports()), (None, false));
    }
}

#[test]
fn a_frame_that_ends_too_soon_is_not_read() {
    for version in VERSIONS {
        for (transport, needed) in [
            (
                Transport::Tcp {
                    options: Vec::new(),
                },
                18,
            ),
            (Transport::Udp { checksum: false }, 8),
            (Transport::Sctp, 4),
            (echo(version), 6),
            (Transport::Other, 0),
        ] {
            let shape = Shape::plain(version, transport);
            let whole = frame(&shape);
            let enough = ETH_HLEN + shape.header_len() + needed;
            for len in 0..whole.0.len() {
                let cut = Frame(whole.0[..len].to_vec());
                let read = cut.parse(version).is_some();
                assert_eq!(read, len >= enough, "{shape:?}: {len} bytes");
            }
        }
    }
}

#[test]
fn a_packet_that_says_it_ends_too_soon_is_not_read() {
    for version in VERSIONS {
        for (transport, needed) in [
            (
                Transport::Tcp {
                    options: Vec::new(),
                },
                18u16,
            ),
            (Transport::Udp { checksum: true }, 8),
            (Transport::Sctp, 4),
            (echo(version), 6),
            (Transport::Other, 0),
        ] {
            let shape = Shape::plain(version, transport);
            // IPv4's length counts the header, IPv6's does not; zero leaves it open.
            let (at, header) = match version {
                Version::V4 => (2, 20),
                Version::V6 => (4, 0),
            };
            for length in 1..header + 40u16 {
                let read = patched(&shape, at, &length.to_be_bytes()).is_some();
                assert_eq!(
                    read,
                    length >= header + needed,
                    "{shape:?}: length {length}"
                );
            }
            let open = patched(&shape, at, &[0, 0]).map(|parsed| parsed.length);
            assert_eq!(open, Some(0), "{shape:?}");
            let long = patched(&shape, at, &[0xff, 0xff]).map(|parsed| parsed.length);
            assert_eq!(long, Some(u16::MAX), "{shape:?}");
        }
    }
}

#[test]
fn malformed_ipv4_is_not_read() {
    let shape = Shape::tcp(Version::V4);
    assert!(patched(&shape, 0, &[0x45]).is_some());
    for first in [0x05, 0x35, 0x55, 0x65, 0x40, 0x44] {
        assert_eq!(patched(&shape, 0, &[first]), None, "first byte {first:#x}");
    }
    // Options up to byte 60, and a length that ends right there or in the midst of them.
    let other = Shape::plain(Version::V4, Transport::Other);
    assert!(patched(&other, 0, &[0x4f, 0, 0, 60]).is_some());
    assert_eq!(patched(&other, 0, &[0x4f, 0, 0, 59]), None);
}

#[test]
fn a_first_fragment_without_ports_and_checksum_is_not_read() {
    for version in VERSIONS {
        for (transport, enough) in [
            (
                Transport::Tcp {
                    options: Vec::new(),
                },
                3,
            ),
            (Transport::Udp { checksum: true }, 1),
            (Transport::Sctp, 1),
            (echo(version), 1),
        ] {
            for units in 0..4 {
                let mut shape = Shape::plain(version, transport.clone());
                shape.part = Part::First(units);
                // What follows in the frame must not be taken for it.
                let packet = shape.build(&tuple(version, 1));
                let frame = Frame::new(version, &packet, &[1; 40]);
                // An IPv4 packet that ends where its header does has no ports either.
                let read = frame.parse(version).is_some();
                assert_eq!(read, units >= enough, "{shape:?}");
            }
        }
    }
}

#[test]
fn as_many_extension_headers_as_are_skipped() {
    let mut shape = Shape::tcp(Version::V6);
    shape.extensions = [(60, 0); MAX_EXTENSION_HEADERS].to_vec();
    assert!(frame(&shape).parse(Version::V6).is_some());
    shape.part = Part::Atomic;
    assert_eq!(
        frame(&shape).parse(Version::V6),
        None,
        "a fragment header is one"
    );
    shape.part = Part::Whole;
    shape.extensions.push((60, 0));
    assert_eq!(frame(&shape).parse(Version::V6), None);
}

#[test]
fn extension_headers_that_hide_the_rest() {
    let mut shape = Shape::tcp(Version::V6);
    let parsed = patched(&shape, 6, &[50]).unwrap();
    assert_eq!((parsed.protocol, parsed.is_transport()), (50, false), "ESP");
    for next in [135, 139, 140] {
        assert_eq!(patched(&shape, 6, &[next]), None, "next header {next}");
    }
    shape.extensions = [(43, 0)].to_vec();
    assert!(patched(&shape, 43, &[0]).is_some());
    assert_eq!(patched(&shape, 43, &[1]), None, "another destination");
    // A second fragment header.
    shape.extensions = [(60, 0)].to_vec();
    shape.part = Part::Atomic;
    assert!(frame(&shape).parse(Version::V6).is_some());
    assert_eq!(patched(&shape, 6, &[44]), None, "two fragment headers");
}

#[test]
fn extension_headers_of_any_length_stay_in_reach() {
    let mut shape = Shape::plain(Version::V6, Transport::Udp { checksum: true });
    shape.payload = [0; 400].to_vec();
    shape.extensions = [(60, 0)].to_vec();
    // The header reaches into the data, which does as a UDP packet.
    for words in 0..=u8::MAX {
        let end = 40 + 8 * (usize::from(words) + 1);
        let l4 = patched(&shape, 41, &[words]).map(|parsed| usize::from(parsed.l4) - ETH_HLEN);
        assert_eq!(l4, Some(end).filter(|end| *end <= MAX_HEADERS), "{words}");
    }
    // The payload ends in the midst of the extension header.
    shape.transport = Transport::Other;
    assert!(patched(&shape, 4, &[0, 8]).is_some());
    assert_eq!(patched(&shape, 4, &[0, 7]), None);
}

#[test]
fn only_errors_quote() {
    for version in VERSIONS {
        let about = [3, 4, 5, 11, 12];
        for kind in 0..=u8::MAX {
            let error = error(Shape::tcp(version), kind);
            let quotes = match version {
                Version::V4 => about.contains(&kind),
                Version::V6 => (1..=4).contains(&kind),
            };
            assert_eq!(read_quoted(&error).is_some(), quotes, "{version:?} {kind}");
        }
    }
}

#[test]
fn what_cannot_be_told_of_a_quoted_packet() {
    for version in VERSIONS {
        let kind = 3;
        assert!(read_quoted(&error(Shape::tcp(version), kind)).is_some());

        let mut later = Shape::tcp(version);
        later.part = Part::Later(1);
        assert_eq!(read_quoted(&error(later, kind)), None, "a later fragment");

        let mut fragmented = error(Shape::tcp(version), kind);
        fragmented.outer.part = Part::First(8);
        assert_eq!(read_quoted(&fragmented), None, "the error is a fragment");

        let open = error(Shape::plain(version, Transport::Other), kind);
        let packet = open.build(&tuple(version, 1), &tuple(version, 2));
        let mut frame = Frame::new(version, &packet, &[]);
        let at = match version {
            Version::V4 => 2,
            Version::V6 => 4,
        };
        frame.0[ETH_HLEN + at..][..2].fill(0);
        let outer = frame.parse(version).unwrap();
        assert_eq!(quoted(&frame, &outer), None, "who knows where it ends");
    }
}

#[test]
fn a_quoted_packet_without_its_ports_is_not_read() {
    for version in VERSIONS {
        for (transport, needed) in [
            (
                Transport::Tcp {
                    options: Vec::new(),
                },
                4,
            ),
            (Transport::Udp { checksum: true }, 4),
            (Transport::Sctp, 4),
            (echo(version), 6),
        ] {
            let whole = error(Shape::plain(version, transport), 3);
            let packet = whole.build(&tuple(version, 1), &tuple(version, 2));
            let inner_at = whole.outer.header_len() + 8;
            // IPv4's length counts the header, IPv6's does not.
            let (at, header) = match version {
                Version::V4 => (2, 0),
                Version::V6 => (4, 40),
            };
            for quoted_bytes in 0..=8 {
                let end = whole.inner.header_len() + quoted_bytes;
                // The error ends there, whatever stands in the padding; or the quoted packet
                // itself says that it has no more (a length of 0 would leave that open).
                for (l3, length) in [(0, inner_at + end), (inner_at, end)] {
                    let mut frame = Frame::new(version, &packet, &[]);
                    let length = ((length - header) as u16).max(1);
                    frame.0[ETH_HLEN + l3 + at..][..2].copy_from_slice(&length.to_be_bytes());
                    let outer = frame.parse(version).unwrap();
                    let inner = quoted(&frame, &outer);
                    assert_eq!(
                        inner.is_some(),
                        quoted_bytes >= needed,
                        "{:?}: {quoted_bytes} bytes, header at {l3}",
                        whole.inner
                    );
                }
            }
        }
    }
}

#[test]
fn a_quoted_header_that_is_padding_is_not_read() {
    for version in VERSIONS {
        // What has no ports is read without a look at what follows its header.
        let whole = error(Shape::plain(version, Transport::Other), 3);
        let packet = whole.build(&tuple(version, 1), &tuple(version, 2));
        let (at, header) = match version {
            Version::V4 => (2, 0),
            Version::V6 => (4, 40),
        };
        let enough = whole.outer.header_len() + 8 + whole.inner.header_len();
        for length in [enough - 1, enough] {
            let mut frame = Frame::new(version, &packet, &[]);
            let said = ((length - header) as u16).to_be_bytes();
            frame.0[ETH_HLEN + at..][..2].copy_from_slice(&said);
            let outer = frame.parse(version).unwrap();
            assert_eq!(quoted(&frame, &outer).is_some(), length == enough);
        }
    }
}

/// An echo request.
fn echo(version: Version) -> Transport {
    let kind = match version {
        Version::V4 => 8,
        Version::V6 => 128,
    };
    Transport::Icmp {
        kind,
        code: 0,
        rest: [0; 4],
    }
}

fn error(inner: Shape, kind: u8) -> ErrorShape {
    let message = Transport::Icmp {
        kind,
        code: 0,
        rest: [0; 4],
    };
    ErrorShape {
        outer: Shape::plain(inner.version, message),
        inner,
        more: usize::MAX / 2,
    }
}

fn read_quoted(error: &ErrorShape) -> Option<Parsed> {
    let version = error.outer.version;
    let packet = error.build(&tuple(version, 1), &tuple(version, 2));
    let frame = Frame::new(version, &packet, &[]);
    quoted(&frame, &frame.parse(version)?)
}

/// An IPv4 and an IPv6 packet with 8 bytes of UDP, behind an Ethernet header.
fn datagrams() -> [Frame; 2] {
    let udp = [0, 7, 0, 7, 0, 8, 0, 0];
    let mut v4 = std::vec![
        0x46, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1
    ];
    let sum = v4.chunks(2).fold(0u32, |sum, word| {
        sum + u32::from(u16::from_be_bytes([word[0], word[1]]))
    });
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    v4[10..12].copy_from_slice(&sum.to_be_bytes());
    v4.extend(udp);
    let mut v6 = std::vec![0x60, 0, 0, 0, 0, 8, 17, 64];
    v6.extend([0xfd; 32]);
    v6.extend(udp);
    [
        Frame::new(Version::V4, &v4, &[]),
        Frame::new(Version::V6, &v6, &[]),
    ]
}

#[test]
fn what_the_stack_would_drop_is_not_sound() {
    let [v4, v6] = datagrams();
    for (frame, version, length_at, hops_at) in
        [(v4, Version::V4, 16, 22), (v6, Version::V6, 18, 21)]
    {
        let sound = |frame: &Frame, room: usize, segmented: bool| {
            frame
                .parse(version)
                .is_some_and(|parsed| is_sound(frame, &parsed, room, segmented))
        };
        let room = frame.0.len() - ETH_HLEN;
        assert!(sound(&frame, room, false), "{version:?}");
        assert!(sound(&frame, room + 100, false), "{version:?} with padding");
        assert!(!sound(&frame, room - 1, false), "{version:?} cut off");
        let mut lie = frame.clone();
        lie.0[hops_at] = 0;
        assert!(!sound(&lie, room, false), "{version:?} without hops");
        let mut open = frame.clone();
        open.0[length_at..length_at + 2].fill(0);
        if version == Version::V6 {
            assert!(sound(&open, room, true), "segments of no length");
            assert!(!sound(&open, room, false), "no segments, and no length");
            continue;
        }
        for at in ETH_HLEN..ETH_HLEN + 24 {
            let mut lie = frame.clone();
            lie.0[at] ^= 0x80;
            assert!(!sound(&lie, room, false), "byte {at} of the header");
        }
    }
}
