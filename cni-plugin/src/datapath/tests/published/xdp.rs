//! The program of XDP beside that of tc: the same frame becomes the same, or is left as
//! it is.

use std::net::SocketAddr;

use aya::programs::{TestRun as _, TestRunOptions, Xdp, XdpMode};
use bpf_bridge_common::{
    drops::DropReason,
    layout::{Mac, PUBLISHED_XDP},
};

use super::{
    super::{
        super::{ANY, Table, Wire},
        frames::tagged,
    },
    flows::take_every_port,
    packets::{Header, SCTP, TCP, UDP, flagged, packet, segment, too_big, unfinished, whole},
    stage::{FAMILIES, Family, Run, Stage, frame, inbound, into, mac, table, with_stage},
};

/// Verdicts of `enum xdp_action` (`linux/bpf.h`).
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

/// `struct xdp_md` of `linux/bpf.h`: its length, and the fields that are set here.
const MD_LEN: usize = 24;
const MD_DATA_END: usize = 4;
const MD_INGRESS_IFINDEX: usize = 12;

/// Runs `work` on a node whose `up0` has XDP.
fn with_xdp(work: impl FnOnce(&mut Stage)) {
    with_stage(|stage| {
        let device = stage.index("up0");
        let mut uplinks: Table<u32, Mac> = table(&stage.ebpf, "XDP_UPLINKS");
        uplinks.insert(Wire(device), Wire(mac("up0")), ANY).unwrap();
        let program: &mut Xdp = stage.ebpf.program_mut("xdp").unwrap().try_into().unwrap();
        // A veth has a queue that frames can come from only then.
        program.attach_to_if_index(device, XdpMode::Driver).unwrap();
        work(stage);
    });
}

/// One frame through the program, as if it had arrived on `up0`.
fn run(stage: &Stage, frame: &[u8]) -> Run {
    let mut context = [0; MD_LEN];
    let length = u32::try_from(frame.len()).unwrap();
    context[MD_DATA_END..MD_DATA_END + 4].copy_from_slice(&length.to_ne_bytes());
    context[MD_INGRESS_IFINDEX..MD_INGRESS_IFINDEX + 4]
        .copy_from_slice(&stage.index("up0").to_ne_bytes());
    let mut bytes = vec![0; 8192];
    let program: &Xdp = stage.ebpf.program("xdp").unwrap().try_into().unwrap();
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut bytes),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        })
        .unwrap();
    bytes.truncate(result.data_size_out as usize);
    Run {
        verdict: result.return_value,
        bytes,
        mark: 0,
    }
}

fn passes(stage: &Stage, row: &str, frame: &[u8]) {
    let before = stage.seen();
    let run = run(stage, frame);
    assert_eq!(run.verdict, XDP_PASS, "{row}: verdict");
    assert_eq!(run.bytes, frame, "{row}: bytes");
    assert_eq!(stage.seen(), before, "{row}: flows");
    assert_eq!(stage.drops(), [], "{row}: drops");
}

/// What the program of tc makes of a frame, XDP makes of it, and they remember the same.
fn becomes(stage: &mut Stage, row: &str, frame: &[u8], becomes: &[u8]) {
    for known in [false, true] {
        let run = run(stage, frame);
        assert_eq!(stage.drops(), [], "{row}: drops");
        assert_eq!(run.verdict, XDP_REDIRECT, "{row}: verdict, known: {known}");
        assert_eq!(run.bytes, becomes, "{row}: bytes, known: {known}");
    }
    let seen = stage.seen();
    assert_eq!(seen.len(), 1, "{row}");
    // The flow is tc's as well, and tc's is XDP's.
    stage.becomes(row, "uplink", "up0", frame, becomes);
    assert_eq!(stage.seen(), seen, "{row}");
    stage.reset();
    stage.becomes(row, "uplink", "up0", frame, becomes);
    assert_eq!(stage.seen(), seen, "{row}");
    assert_eq!(run(stage, frame).bytes, becomes, "{row}");
    assert_eq!(stage.seen(), seen, "{row}");
    stage.reset();
}

/// Publishes the tests' port for a pod that takes what XDP redirects, in every protocol.
fn publish(stage: &mut Stage, family: Family) {
    for protocol in [TCP, UDP, SCTP] {
        stage.publish(family.unspecified(), protocol, "a");
        stage.change_published(family, protocol, |entry| entry.flags = PUBLISHED_XDP);
    }
}

#[test]
fn plain_packets_become_what_tc_makes_of_them() {
    with_xdp(|stage| {
        for family in FAMILIES {
            publish(stage, family);
            let pod = family.end("a", 80);
            for protocol in [TCP, UDP] {
                for (client, at) in [("x", "up0"), ("far", "up1"), ("x1", "cni0")] {
                    let (client, original) = (family.end(client, 4000), family.end(at, 8080));
                    for data in [&b""[..], b"x", b"xy", &[7; 1400]] {
                        let row = format!("{client} to {original}, protocol {protocol}");
                        let row = format!("{row}, {} bytes", data.len());
                        becomes(
                            stage,
                            &row,
                            &inbound(&whole(protocol, client, original, data)),
                            &into("a", &whole(protocol, client, pod, data)),
                        );
                    }
                }
            }
            let (client, original) = (family.end("x", 4000), family.end("up0", 8080));
            // An answer (SYN and ACK) to what the pod has not asked begins no flow.
            for flags in (0..64).filter(|flags| flags & 0x12 != 0x12) {
                becomes(
                    stage,
                    &format!("TCP flags {flags}"),
                    &inbound(&flagged(TCP, client, original, flags, b"x")),
                    &into("a", &flagged(TCP, client, pod, flags, b"x")),
                );
            }
            // What a link adds to a short frame.
            let padded = |mut frame: Vec<u8>| {
                frame.resize(100, 0x5a);
                frame
            };
            becomes(
                stage,
                "padding",
                &padded(inbound(&whole(UDP, client, original, b"x"))),
                &padded(into("a", &whole(UDP, client, pod, b"x"))),
            );
            stage.clear();
        }
    });
}

#[test]
fn every_port_and_address_keeps_its_checksum_right() {
    // Sums with every carry, and UDP's that come out as zero.
    with_xdp(|stage| {
        for family in FAMILIES {
            publish(stage, family);
            let (original, pod) = (family.end("up0", 8080), family.end("a", 80));
            for number in (1..=u16::MAX).step_by(511) {
                let client = family.end("x", number);
                for data in [number, !number] {
                    let data = data.to_be_bytes();
                    becomes(
                        stage,
                        &format!("{client}, {data:?}"),
                        &inbound(&whole(UDP, client, original, &data)),
                        &into("a", &whole(UDP, client, pod, &data)),
                    );
                }
            }
            stage.clear();
        }
    });
}

#[test]
fn udp_without_a_checksum_stays_so() {
    with_xdp(|stage| {
        publish(stage, Family::V4);
        let bare = |from: SocketAddr, to: SocketAddr| {
            let mut payload = segment(UDP, from, to, 0, b"sum");
            payload[6..8].copy_from_slice(&[0, 0]);
            packet(from.ip(), to.ip(), UDP, &Header::default(), &payload)
        };
        let (client, pod) = (Family::V4.end("x", 4000), Family::V4.end("a", 80));
        becomes(
            stage,
            "request",
            &inbound(&bare(client, Family::V4.end("up0", 8080))),
            &into("a", &bare(client, pod)),
        );
    });
}

#[test]
fn what_is_not_plain_is_left_as_it_is() {
    with_xdp(|stage| {
        for family in FAMILIES {
            publish(stage, family);
            let (client, original) = (family.end("x", 4000), family.end("up0", 8080));
            let request = whole(UDP, client, original, &[7; 100]);
            let with = |header: Header| {
                let payload = segment(UDP, client, original, 0, &[7; 100]);
                inbound(&packet(client.ip(), original.ip(), UDP, &header, &payload))
            };
            let option = match family {
                Family::V4 => (0, vec![0x94, 4, 0, 0]),
                Family::V6 => (60, vec![1, 4, 0, 0, 0, 0]),
            };
            let reply = whole(UDP, original, client, &[7; 100]);
            let mut rows = vec![
                (
                    "options",
                    with(Header {
                        options: vec![option],
                        ..Header::default()
                    }),
                ),
                ("SCTP", inbound(&whole(SCTP, client, original, b"x"))),
                (
                    "an error",
                    inbound(&too_big(client.ip(), original.ip(), &reply)),
                ),
                ("a VLAN", tagged(&inbound(&request), 5)),
                (
                    "for another station",
                    frame([2, 0, 0, 0, 0, 0x77], mac("x"), &request),
                ),
                ("broadcast", frame([0xff; 6], mac("x"), &request)),
                (
                    "another port",
                    inbound(&whole(UDP, client, family.end("up0", 8081), b"x")),
                ),
                (
                    "another machine",
                    inbound(&whole(UDP, client, family.end("far", 8080), b"x")),
                ),
                (
                    "longer than the pod's link takes",
                    inbound(&whole(UDP, client, original, &[7; 1500])),
                ),
            ];
            for (row, fragment) in [("the first", (0, true)), ("another", (8, false))] {
                let header = Header {
                    fragment: Some(fragment),
                    ..Header::default()
                };
                rows.push((row, with(header)));
            }
            for protocol in [TCP, UDP] {
                rows.push((
                    "an unfinished checksum",
                    inbound(&unfinished(protocol, client, original, b"x")),
                ));
            }
            for (row, frame) in &rows {
                passes(stage, &format!("{row}, {family:?}"), frame);
            }
            // Cut anywhere before its end.
            let all = inbound(&whole(TCP, client, original, b""));
            let headers = all.len() - 2;
            for length in 14..headers {
                passes(stage, &format!("{length} bytes"), &all[..length]);
            }

            for protocol in [TCP, UDP] {
                stage.change_published(family, protocol, |entry| entry.flags = 0);
                let request = inbound(&whole(protocol, client, original, b"x"));
                passes(stage, "a pod that takes nothing of XDP", &request);
            }
            stage.clear();
        }
    });
}

#[test]
fn a_refused_client_is_counted() {
    for family in FAMILIES {
        with_xdp(|stage| {
            publish(stage, family);
            let (client, original) = (family.end("x", 4000), family.end("up0", 8080));
            take_every_port(stage, client, original);
            let run = run(stage, &inbound(&whole(UDP, client, original, b"?")));
            assert_eq!(run.verdict, XDP_DROP);
            let reason = DropReason::NoSourcePort;
            assert_eq!(stage.drops(), [("a".to_owned(), reason, 1)]);
        });
    }
}
