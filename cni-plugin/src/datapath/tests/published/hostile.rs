//! Packets that lie: nothing crashes, and what cannot be read goes on as it came.

use std::net::SocketAddr;

use super::{
    super::bench::{REDIRECT, SHOT},
    packets::{Header, SYN, TCP, checksum, packet, segment, too_big, whole},
    requests::with_each,
    stage::{Family, PASS, inbound, out_of, ports, with_stage},
};

/// BPF_PROG_TEST_RUN takes no packet that ends within its IP header.
fn shortest(family: Family) -> usize {
    14 + if family == Family::V4 { 20 } else { 40 }
}

/// Options that say nothing, so that a packet is not a plain one.
fn padding(family: Family) -> Vec<(u8, Vec<u8>)> {
    match family {
        Family::V4 => vec![(0, vec![1; 8])],
        Family::V6 => vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0])],
    }
}

#[test]
fn a_packet_that_ends_early_is_left_alone() {
    // Hazard 19.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let original = family.end("up0", ports(protocol).0);
        let header = Header {
            options: padding(family),
            ..Header::default()
        };
        for from in ["x", "c"] {
            let client = family.end(from, 4000);
            let payload = segment(protocol, client, original, SYN, b"");
            let whole = packet(client.ip(), original.ip(), protocol, &header, &payload);
            let request = if from == "x" {
                inbound(&whole)
            } else {
                out_of("c", &whole)
            };
            let (program, device) = if from == "x" {
                ("uplink", "up0")
            } else {
                ("from_pod", "c")
            };
            let ports_end = request.len() - payload.len() + 4;
            for length in shortest(family)..request.len() {
                stage.reset();
                let short = &request[..length];
                if length < ports_end {
                    let row = format!("{device}, {length} of {}", request.len());
                    stage.passes(&row, program, device, short);
                } else {
                    // Whatever becomes of it, the rest is not made up.
                    let run = stage.run(program, device, short);
                    assert_eq!(run.bytes.len(), length);
                    assert_ne!(run.verdict, u32::from(u16::MAX));
                }
            }
        }
    });
}

#[test]
fn lengths_that_lie_are_left_alone() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (client, original) = (family.end("x", 4000), family.end("up0", ports(protocol).0));
        let good = inbound(&whole(protocol, client, original, b"data"));
        let with = |at: usize, bytes: &[u8]| {
            let mut frame = good.clone();
            frame[at..at + bytes.len()].copy_from_slice(bytes);
            frame
        };
        let rows = match family {
            Family::V4 => vec![
                ("no header", with(14, &[0x40])),
                ("a short header", with(14, &[0x44])),
                ("another version", with(14, &[0x65])),
                ("shorter than the header", with(16, &[0, 19])),
                ("ends before the ports", with(16, &[0, 23])),
            ],
            Family::V6 => vec![
                ("another version", with(14, &[0x40])),
                ("ends before the ports", with(18, &[0, 3])),
            ],
        };
        for (row, frame) in rows {
            stage.passes(row, "uplink", "up0", &frame);
        }
    });
}

#[test]
fn what_the_stack_would_drop_is_left_to_it() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let original = family.end("up0", ports(protocol).0);
        for options in [vec![], padding(family)] {
            let header = Header {
                options,
                ..Header::default()
            };
            for (from, program, device) in [("x", "uplink", "up0"), ("c", "from_pod", "c")] {
                let client = family.end(from, 4000);
                let payload = segment(protocol, client, original, SYN, b"data");
                let good = packet(client.ip(), original.ip(), protocol, &header, &payload);
                let with = |at: usize, byte: u8, sums_up: bool| {
                    let mut packet = good.clone();
                    packet[at] = byte;
                    if family == Family::V4 && sums_up {
                        packet[10..12].fill(0);
                        let end = good.len() - payload.len();
                        let sum = checksum(&packet[..end]);
                        packet[10..12].copy_from_slice(&sum);
                    }
                    packet
                };
                let rows = match family {
                    Family::V4 => vec![
                        ("a wrong checksum", with(10, good[10] ^ 1, false)),
                        ("no time left", with(8, 0, true)),
                        ("longer than it is", with(3, good[3] + 1, true)),
                    ],
                    Family::V6 => vec![
                        ("no hop left", with(7, 0, true)),
                        ("longer than it is", with(5, good[5] + 1, true)),
                    ],
                };
                for (row, packet) in rows {
                    let frame = match from {
                        "x" => inbound(&packet),
                        _ => out_of("c", &packet),
                    };
                    stage.passes(row, program, device, &frame);
                }
            }
        }
    });
}

#[test]
fn a_mapped_address_is_not_an_ipv4_one() {
    with_each(|stage, family, protocol| {
        if family == Family::V6 {
            return;
        }
        stage.publish(family.unspecified(), protocol, "a");
        stage.publish(Family::V6.unspecified(), protocol, "a");
        let port = ports(protocol).0;
        let mapped = |name, port| {
            let std::net::IpAddr::V4(address) = Family::V4.of(name) else {
                unreachable!()
            };
            SocketAddr::new(address.to_ipv6_mapped().into(), port)
        };
        let (client, original) = (mapped("x", 4000), mapped("up0", port));
        let real = Family::V6.end("up0", port);
        for to in [original, real] {
            let request = inbound(&whole(protocol, client, to, b"?"));
            stage.passes("mapped", "uplink", "up0", &request);
        }
        let request = whole(protocol, Family::V6.end("x", 1), original, b"?");
        stage.passes("mapped", "uplink", "up0", &inbound(&request));
    });
}

#[test]
fn any_bytes_are_borne() {
    // A packet, an error and a fragment, with each byte of their headers at its limits.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (client, original) = (family.end("x", 4000), family.end("up0", ports(protocol).0));
        let request = whole(protocol, client, original, b"data");
        stage.run("uplink", "up0", &inbound(&request));
        let reply = whole(protocol, original, client, b"data");
        let error = too_big(client.ip(), original.ip(), &reply);
        for packet in [request, error] {
            for at in 0..packet.len() {
                for value in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut packet = packet.clone();
                    packet[at] = value;
                    // The kernel reads the ethertype, not the version.
                    let mut frame = inbound(&packet);
                    frame[12..14].copy_from_slice(match family {
                        Family::V4 => &[8, 0],
                        Family::V6 => &[0x86, 0xdd],
                    });
                    let run = stage.run("uplink", "up0", &frame);
                    assert!(
                        [PASS, REDIRECT, SHOT].contains(&run.verdict),
                        "{at} {value}"
                    );
                    if run.verdict == PASS {
                        assert_eq!(run.bytes, frame, "byte {at} is {value}");
                    }
                    let run = stage.run("from_pod", "a", &frame);
                    assert!([REDIRECT, SHOT].contains(&run.verdict), "{at} {value}");
                }
            }
        }
    });
}

#[test]
fn a_tcp_header_that_ends_early_has_no_flags() {
    with_stage(|stage| {
        stage.publish(Family::V4.unspecified(), TCP, "a");
        let (client, original) = (Family::V4.end("x", 4000), Family::V4.end("up0", 8080));
        let payload = segment(TCP, client, original, SYN, b"");
        for length in 0..payload.len() {
            let cut = packet(
                client.ip(),
                original.ip(),
                TCP,
                &Header::default(),
                &payload[..length],
            );
            let run = stage.run("uplink", "up0", &inbound(&cut));
            // The checksum is behind the flags.
            assert_eq!(run.verdict == PASS, length < 18, "{length}");
            stage.reset();
        }
    });
}
