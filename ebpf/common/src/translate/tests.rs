use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::{
    checksum,
    frame::ETH_HLEN,
    packet::{Fragment, IPPROTO_ICMP, quoted},
    testing::{
        ErrorShape, Frame, Part, Shape, Transport, errors, ethertype, shapes, sum, tuple, tuples,
        version,
    },
};

/// What the kernel knows of a packet's checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Summed {
    /// A device is still to complete it (`CHECKSUM_PARTIAL`).
    Partial,
    /// The sum of all bytes of the packet (`CHECKSUM_COMPLETE`).
    Complete(u64),
}

/// A frame whose checksums are changed as the kernel's helpers do
/// (`inet_proto_csum_replace_by_diff`, `bpf_l4_csum_replace`).
struct Skb {
    frame: Frame,
    summed: Summed,
}

impl Skb {
    fn complete(frame: Frame) -> Self {
        let summed = Summed::Complete(u64::from(sum(&frame.0[ETH_HLEN..])));
        Self { frame, summed }
    }

    fn partial(frame: Frame) -> Self {
        let summed = Summed::Partial;
        Self { frame, summed }
    }

    /// Whether the sum that the kernel knows is that of the bytes.
    fn knows_its_sum(&self) -> bool {
        let real = u64::from(sum(&self.frame.0[ETH_HLEN..]));
        matches!(self.summed, Summed::Complete(known) if known % 0xffff == real % 0xffff)
    }

    fn add(&mut self, diff: u32) {
        if let Summed::Complete(known) = &mut self.summed {
            // Differences are in memory's order, the sum of the tests in the network's.
            *known += u64::from((diff as u16).to_be());
        }
    }
}

impl Packet for Skb {
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.frame.load(at)
    }

    fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        self.frame.store(at, bytes)
    }

    fn store_uncovered<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        self.add(diff(self.load(at)?, bytes));
        self.store(at, bytes)
    }

    fn fix_transport_checksum(&mut self, at: usize, diff: u32, field: Covered) -> Option<()> {
        let old: [u8; 2] = self.load(at)?;
        if field.udp && old == [0, 0] {
            return Some(());
        }
        match self.summed {
            Summed::Partial if field.pseudo_header => {
                let [a, b] = old;
                let new = adjust([!a, !b], diff);
                self.store(at, new.map(|byte| !byte))
            }
            Summed::Partial => Some(()),
            Summed::Complete(_) => {
                self.frame.fix_transport_checksum(at, diff, field)?;
                if field.pseudo_header && !field.ipv6 {
                    self.add(checksum::diff(old, self.load(at)?));
                }
                Some(())
            }
        }
    }
}

/// A packet, its tuple and another; SCTP keeps its ports.
fn rewrites() -> impl Strategy<Value = (Shape, Tuple, Tuple)> {
    version()
        .prop_flat_map(|version| (shapes(version), tuples(version), tuples(version)))
        .prop_map(|(shape, from, to)| (keep_sctp_ports(&shape, from, to), shape, from))
        .prop_map(|(to, shape, from)| (shape, from, to))
}

/// An error, its and the quoted packet's tuple, and others.
fn error_rewrites() -> impl Strategy<Value = (ErrorShape, [Tuple; 2], [Tuple; 2])> {
    version()
        .prop_flat_map(|version| {
            let pair = || [tuples(version), tuples(version)];
            (errors(version), pair(), pair())
        })
        .prop_map(|(error, from, mut to)| {
            to[1] = keep_sctp_ports(&error.inner, from[1], to[1]);
            (error, from, to)
        })
}

fn keep_sctp_ports(shape: &Shape, from: Tuple, mut to: Tuple) -> Tuple {
    if matches!(shape.transport, Transport::Sctp) {
        (to.source_port, to.destination_port) = (from.source_port, from.destination_port);
    }
    to
}

/// Rewrites the packet whose IP header follows Ethernet's.
fn rewrite_frame(packet: &mut impl Packet, version: Version, to: &Tuple) -> Option<()> {
    let parsed = crate::packet::parse(packet, ETH_HLEN, ethertype(version))?;
    rewrite(packet, &parsed, to)
}

/// Rewrites an error likewise.
fn rewrite_error(packet: &mut impl Packet, version: Version, to: &[Tuple; 2]) -> Option<()> {
    let outer = crate::packet::parse(packet, ETH_HLEN, ethertype(version))?;
    let inner = quoted(packet, &outer)?;
    let [own, about] = to;
    rewrite_quoted(packet, &outer, &inner, &own.source, &own.destination, about)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_rewritten_packet_is_the_one_its_new_sender_would_send(
        (shape, from, to) in rewrites(),
        padding: Vec<u8>,
    ) {
        let before = Frame::new(shape.version, &shape.build(&from), &padding);
        let mut frame = before.clone();
        prop_assert_eq!(rewrite_frame(&mut frame, shape.version, &to), Some(()));
        if matches!(shape.part, Part::Later(_)) {
            // Its data is from a datagram whose first fragment is elsewhere.
            let expected = [
                &Frame::new(shape.version, &shape.build(&to), &[]).0[..ETH_HLEN + shape.header_len()],
                &before.0[ETH_HLEN + shape.header_len()..],
            ].concat();
            prop_assert_eq!(&frame.0, &expected);
        } else {
            let expected = Frame::new(shape.version, &shape.build(&to), &padding);
            prop_assert_eq!(&frame, &expected);
        }
        prop_assert_eq!(rewrite_frame(&mut frame, shape.version, &from), Some(()));
        prop_assert_eq!(frame, before, "undone");
    }

    #[test]
    fn a_rewritten_error_is_the_one_its_new_sender_would_send(
        (error, from, to) in error_rewrites(),
        padding: Vec<u8>,
    ) {
        let version = error.outer.version;
        let before = Frame::new(version, &error.build(&from[0], &from[1]), &padding);
        let mut frame = before.clone();
        prop_assert_eq!(rewrite_error(&mut frame, version, &to), Some(()));
        let expected = Frame::new(version, &error.build(&to[0], &to[1]), &padding);
        prop_assert_eq!(&frame, &expected);
        prop_assert_eq!(rewrite_error(&mut frame, version, &from), Some(()));
        prop_assert_eq!(frame, before, "undone");
    }

    #[test]
    fn the_sum_that_the_kernel_knows_stays_right(
        (shape, from, to) in rewrites(),
        (error, error_from, error_to) in error_rewrites(),
    ) {
        let frame = Frame::new(shape.version, &shape.build(&from), &[]);
        let mut skb = Skb::complete(frame.clone());
        prop_assert_eq!(rewrite_frame(&mut skb, shape.version, &to), Some(()));
        prop_assert!(skb.knows_its_sum());
        let mut plain = frame;
        prop_assert_eq!(rewrite_frame(&mut plain, shape.version, &to), Some(()));
        prop_assert_eq!(skb.frame, plain);

        let version = error.outer.version;
        let quoting = error.build(&error_from[0], &error_from[1]);
        let mut skb = Skb::complete(Frame::new(version, &quoting, &[]));
        prop_assert_eq!(rewrite_error(&mut skb, version, &error_to), Some(()));
        prop_assert!(skb.knows_its_sum());
    }

    #[test]
    fn a_checksum_that_a_device_completes_is_left_to_it(
        (mut shape, from, to) in rewrites(),
        (mut error, error_from, error_to) in error_rewrites(),
    ) {
        shape.partial = true;
        if let Part::First(_) | Part::Later(_) = shape.part {
            shape.part = Part::Whole;
            shape.id = 0;
        }
        // No device knows ICMP's checksum, but ICMPv6's is one of those it knows.
        let known = shape.protocol() != IPPROTO_ICMP;
        if known {
            let mut skb = Skb::partial(Frame::new(shape.version, &shape.build(&from), &[]));
            prop_assert_eq!(rewrite_frame(&mut skb, shape.version, &to), Some(()));
            prop_assert_eq!(skb.frame, Frame::new(shape.version, &shape.build(&to), &[]));
        }

        let version = Version::V6;
        if error.outer.version == version {
            error.outer.partial = true;
            let frame = |[own, about]: &[Tuple; 2]| {
                Frame::new(version, &error.build(own, about), &[])
            };
            let mut skb = Skb::partial(frame(&error_from));
            prop_assert_eq!(rewrite_error(&mut skb, version, &error_to), Some(()));
            prop_assert_eq!(skb.frame, frame(&error_to));
        }
    }

    #[test]
    fn whatever_is_parsed_can_be_rewritten(
        (error, from, to) in error_rewrites(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut: prop::sample::Index,
        plain: bool,
    ) {
        let version = error.outer.version;
        let packet = if plain {
            error.inner.build(&from[1])
        } else {
            error.build(&from[0], &from[1])
        };
        let mut frame = Frame::new(version, &packet, &[]);
        for (at, byte) in damage {
            let at = at.index(frame.0.len());
            frame.0[at] = byte;
        }
        let len = frame.0.len();
        frame.0.truncate(len - cut.index(len).saturating_sub(len / 2));

        let Some(parsed) = frame.parse(version) else {
            return Ok(());
        };
        if let Some(inner) = quoted(&frame, &parsed) {
            let about = Tuple {
                source_port: inner.tuple.source_port,
                ..to[1]
            };
            let sctp = inner.protocol == IPPROTO_SCTP;
            let mut frame = frame.clone();
            let done = rewrite_error(&mut frame, version, &[to[0], about]);
            prop_assert!(done.is_some() || sctp);
            if done.is_some() {
                let outer = frame.parse(version).unwrap();
                let inner = quoted(&frame, &outer).unwrap();
                prop_assert_eq!(outer.tuple.source, to[0].source);
                prop_assert_eq!(inner.tuple.source, about.source);
                prop_assert_eq!(inner.tuple.destination, about.destination);
            }
        }
        let done = rewrite(&mut frame, &parsed, &to[0]);
        prop_assert!(done.is_some() || parsed.protocol == IPPROTO_SCTP);
        if done.is_some() {
            let mut expected = to[0];
            match parsed.query {
                Query::Request => expected.destination_port = 0,
                Query::Reply => expected.source_port = 0,
                Query::None if parsed.has_ports() => {}
                Query::None => (expected.source_port, expected.destination_port) = (0, 0),
            }
            prop_assert_eq!(frame.parse(version).unwrap().tuple, expected);
        }
    }
}

#[test]
fn an_identifier_is_the_port_of_who_asked() {
    for (version, request, reply) in [(Version::V4, 8, 0), (Version::V6, 128, 129)] {
        let (from, to) = (tuple(version, 1), tuple(version, 2));
        for (kind, asks) in [(request, true), (reply, false)] {
            let shape = query(version, kind);
            let frame = |tuple: &Tuple| Frame::new(version, &shape.build(tuple), &[]);
            let at = ETH_HLEN + shape.header_len() + 4;
            let (port, other) = if asks {
                (to.source_port, to.destination_port)
            } else {
                (to.destination_port, to.source_port)
            };
            let mut rewritten = frame(&from);
            rewrite_frame(&mut rewritten, version, &to).unwrap();
            // What follows the identifier is the sequence number.
            let [a, b] = port.to_be_bytes();
            assert_eq!(rewritten.load(at), Some([a, b, 8, 9]), "{version:?} {kind}");
            assert_eq!(rewritten, frame(&to));
            assert_ne!(port, other);

            // The other port is nobody's.
            let mut indifferent = to;
            if asks {
                indifferent.destination_port = 0;
            } else {
                indifferent.source_port = 0;
            }
            let mut again = frame(&from);
            rewrite_frame(&mut again, version, &indifferent).unwrap();
            assert_eq!(again, rewritten);

            // In what an error quotes, too; eight bytes of it are enough.
            let error = error_about(shape.clone(), 0);
            let frame = |about| Frame::new(version, &error.build(&from, about), &[]);
            let mut rewritten = frame(&from);
            rewrite_error(&mut rewritten, version, &[from, to]).unwrap();
            let at = at + error.outer.header_len() + 8;
            assert_eq!(rewritten.load(at), Some([a, b, 8, 9]), "{version:?} {kind}");
            assert_eq!(rewritten, frame(&to));
            rewrite_error(&mut rewritten, version, &[from, from]).unwrap();
            assert_eq!(rewritten, frame(&from), "undone");
        }
    }
}

#[test]
fn what_is_no_query_has_no_identifier() {
    // The numbers of one version's echo are nothing, or something else, in the other.
    for (version, kind) in [
        (Version::V4, 128),
        (Version::V4, 129),
        (Version::V4, 9),
        (Version::V6, 8),
        (Version::V6, 0),
        (Version::V6, 135),
    ] {
        let (from, to) = (tuple(version, 1), tuple(version, 2));
        let shape = query(version, kind);
        let mut frame = Frame::new(version, &shape.build(&from), &[]);
        rewrite_frame(&mut frame, version, &to).unwrap();
        let at = ETH_HLEN + shape.header_len() + 4;
        assert_eq!(frame.load(at), Some([6, 7, 8, 9]), "{version:?} {kind}");
        assert_eq!(frame, Frame::new(version, &shape.build(&to), &[]));
    }
}

/// An ICMP message that looks like a query of type `kind`.
fn query(version: Version, kind: u8) -> Shape {
    let (code, rest) = (0, [6, 7, 8, 9]);
    Shape::plain(version, Transport::Icmp { kind, code, rest })
}

#[test]
fn ports_of_sctp_stay_as_they_are() {
    for version in [Version::V4, Version::V6] {
        let shape = Shape::plain(version, Transport::Sctp);
        let (from, to) = (tuple(version, 1), tuple(version, 2));
        let before = Frame::new(version, &shape.build(&from), &[]);
        for to in [
            Tuple {
                source_port: from.source_port,
                ..to
            },
            Tuple {
                destination_port: from.destination_port,
                ..to
            },
        ] {
            let mut frame = before.clone();
            assert_eq!(rewrite_frame(&mut frame, version, &to), None);
            assert_eq!(frame, before);
            let error = error_about(shape.clone(), usize::MAX / 2);
            let before = Frame::new(version, &error.build(&from, &from), &[]);
            let mut frame = before.clone();
            assert_eq!(rewrite_error(&mut frame, version, &[to, to]), None);
            assert_eq!(frame, before);
        }
    }
}

#[test]
fn a_checksum_may_come_out_as_zero() {
    let tcp = Transport::Tcp {
        options: Vec::new(),
    };
    let udp = Transport::Udp { checksum: true };
    // Zero says in UDP that there is none: ones, which are the same, are sent instead.
    for (transport, offset, zero) in [(tcp, 16, [0, 0]), (udp, 6, [0xff, 0xff])] {
        for version in [Version::V4, Version::V6] {
            let shape = Shape::plain(version, transport.clone());
            let frame = |tuple: &Tuple| Frame::new(version, &shape.build(tuple), &[]);
            let from = tuple(version, 1);
            let at = ETH_HLEN + shape.header_len() + offset;
            let to = (0..=u16::MAX)
                .map(|destination_port| Tuple {
                    destination_port,
                    ..tuple(version, 2)
                })
                .find(|to| frame(to).load(at) == Some(zero))
                .unwrap();

            let mut rewritten = frame(&from);
            rewrite_frame(&mut rewritten, version, &to).unwrap();
            assert_eq!(rewritten, frame(&to), "{shape:?}");
            rewrite_frame(&mut rewritten, version, &from).unwrap();
            assert_eq!(rewritten, frame(&from), "{shape:?}, undone");

            let error = error_about(shape, usize::MAX / 2);
            let frame = |about| Frame::new(version, &error.build(&from, about), &[]);
            let mut rewritten = frame(&from);
            rewrite_error(&mut rewritten, version, &[from, to]).unwrap();
            assert_eq!(rewritten, frame(&to), "{error:?}");
            rewrite_error(&mut rewritten, version, &[from, from]).unwrap();
            assert_eq!(rewritten, frame(&from), "{error:?}, undone");
        }
    }
}

#[test]
fn padding_behind_a_quoted_packet_is_no_checksum() {
    for version in [Version::V4, Version::V6] {
        let error = error_about(Shape::tcp(version), 0);
        let (from, to) = (tuple(version, 1), tuple(version, 2));
        let mut frame = Frame::new(version, &error.build(&from, &from), &[0xaa; 20]);
        let outer = frame.parse(version).unwrap();
        let inner = quoted(&frame, &outer).unwrap();
        assert_eq!((inner.checksum, inner.fragment), (None, Fragment::Whole));
        rewrite_error(&mut frame, version, &[to, to]).unwrap();
        let expected = Frame::new(version, &error.build(&to, &to), &[0xaa; 20]);
        assert_eq!(frame, expected);
    }
}

fn error_about(inner: Shape, more: usize) -> ErrorShape {
    let kind = match inner.version {
        Version::V4 => 3,
        Version::V6 => 1,
    };
    let message = Transport::Icmp {
        kind,
        code: 0,
        rest: [0; 4],
    };
    ErrorShape {
        outer: Shape::plain(inner.version, message),
        inner,
        more,
    }
}
