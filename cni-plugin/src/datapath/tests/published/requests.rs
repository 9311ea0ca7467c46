//! What leads to a pod, and what is none of ours.

use std::net::{IpAddr, SocketAddr};

use bpf_bridge_common::layout::Mac;

use super::{
    super::super::Wire,
    super::frames::{BROADCAST, OTHER, ethernet, tagged},
    packets::{ACK, Header, Options, SCTP, SYN, TCP, UDP, flagged, packet, segment, whole},
    stage::{
        FAMILIES, Family, PASS, Stage, frame, inbound, into, mac, out_of, ports, wire, with_stage,
    },
};

pub(super) const PROTOCOLS: [u8; 3] = [TCP, UDP, SCTP];

/// Every family with every protocol, on a node that publishes nothing else.
pub(super) fn with_each(mut work: impl FnMut(&mut Stage, Family, u8)) {
    with_stage(|stage| {
        for family in FAMILIES {
            for protocol in PROTOCOLS {
                work(stage, family, protocol);
                stage.clear();
            }
        }
    });
}

#[test]
fn clients_outside_keep_their_address() {
    // Hazard 8: every address of the node, not one only.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let pod = family.end("a", pod_port);
        let mut seen = Vec::new();
        for client in ["x", "far"] {
            for at in ["up0", "up1", "cni0", "cni1"] {
                let number = 4000 + u16::try_from(seen.len()).unwrap();
                let (client, original) = (family.end(client, number), family.end(at, port));
                let row = format!("{client} to {original}, protocol {protocol}");
                for data in [&b""[..], b"x", &[7; 1400]] {
                    stage.becomes(
                        &row,
                        "uplink",
                        "up0",
                        &inbound(&whole(protocol, client, original, data)),
                        &into("a", &whole(protocol, client, pod, data)),
                    );
                }
                seen.push((pod, client, original, client, "up0".to_owned()));
            }
        }
        assert_eq!(stage.seen(), seen.into_iter().collect());
    });
}

#[test]
fn an_address_that_just_came_is_served() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (client, original) = (family.end("x", 4000), family.end("new", port));
        let request = inbound(&whole(protocol, client, original, b"?"));
        stage.passes("not yet", "uplink", "up0", &request);

        stage.add_address("up1", family.of("new"));
        let served = into(
            "a",
            &whole(protocol, client, family.end("a", pod_port), b"?"),
        );
        stage.becomes("with a default route", "uplink", "up0", &request, &served);

        // Nothing leads elsewhere any more: the list is what is left to ask.
        stage.reset();
        stage.delete_default_routes();
        stage.passes("without, not in the list", "uplink", "up0", &request);
        stage
            .addresses
            .insert(Wire(wire(family.of("new"))), Wire(1), 0)
            .unwrap();
        stage.becomes("without, in the list", "uplink", "up0", &request, &served);
    });
}

#[test]
fn only_the_published_port_of_the_published_address_leads_to_a_pod() {
    with_each(|stage, family, protocol| {
        let (port, pod_port) = ports(protocol);
        let client = family.end("x", 4000);
        stage.publish(family.of("up1"), protocol, "a");
        let to = |at: SocketAddr| inbound(&whole(protocol, client, at, b"?"));
        let other = if protocol == TCP { UDP } else { TCP };
        let at = family.end("up1", port);

        stage.passes(
            "another address",
            "uplink",
            "up0",
            &to(family.end("up0", port)),
        );
        stage.passes(
            "another port",
            "uplink",
            "up0",
            &to(family.end("up1", port + 1)),
        );
        stage.passes(
            "the pod's port",
            "uplink",
            "up0",
            &to(family.end("up1", 81)),
        );
        let wrong = inbound(&whole(other, client, at, b"?"));
        stage.passes("another protocol", "uplink", "up0", &wrong);
        stage.passes(
            "to the client",
            "uplink",
            "up0",
            &to(family.end("far", port)),
        );
        stage.becomes(
            "the address",
            "uplink",
            "up0",
            &to(at),
            &into(
                "a",
                &whole(protocol, client, family.end("a", pod_port), b"?"),
            ),
        );
    });
}

#[test]
fn one_number_on_two_addresses_is_two_pods() {
    with_each(|stage, family, protocol| {
        let (port, pod_port) = ports(protocol);
        let client = family.end("x", 4000);
        for (at, pod) in [("up0", "a"), ("up1", "b")] {
            stage.publish(family.of(at), protocol, pod);
        }
        for (at, pod) in [("up0", "a"), ("up1", "b")] {
            let request = inbound(&whole(protocol, client, family.end(at, port), b"?"));
            let served = whole(protocol, client, family.end(pod, pod_port), b"?");
            stage.becomes(at, "uplink", "up0", &request, &into(pod, &served));
        }
        assert_eq!(stage.seen().len(), 2);
    });
}

/// An address that is no single station's, or nobody's.
fn not_the_nodes(family: Family) -> Vec<(&'static str, IpAddr)> {
    let list: &[(&str, &str)] = match family {
        Family::V4 => &[
            ("loopback", "127.0.0.1"),
            ("loopback, another", "127.1.2.3"),
            ("unspecified", "0.0.0.0"),
            ("multicast", "224.0.0.1"),
            ("class E", "240.0.0.1"),
            ("broadcast", "255.255.255.255"),
            ("a neighbour", "10.0.7.21"),
            ("behind a router", "198.51.100.2"),
            ("the far end of the default route's test", "192.0.2.254"),
            ("a pod", "10.0.0.10"),
        ],
        Family::V6 => &[
            ("loopback", "::1"),
            ("unspecified", "::"),
            ("multicast", "ff02::1"),
            ("a neighbour", "fd00:7::21"),
            ("another's on the link", "fe80::21"),
            ("behind a router", "2001:db8::2"),
            ("the far end of the default route's test", "100::fe"),
            ("a pod", "fd00::a"),
        ],
    };
    list.iter()
        .map(|(row, address)| (*row, address.parse().unwrap()))
        .collect()
}

#[test]
fn an_address_that_is_not_the_nodes_is_never_captured() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let port = ports(protocol).0;
        let rows = |stage: &Stage, also: &str| {
            for (row, address) in not_the_nodes(family) {
                let to = SocketAddr::new(address, port);
                for (program, device, from) in [
                    ("uplink", "up0", "x"),
                    ("from_pod", "c", "c"),
                    ("from_pod", "m", "m"),
                ] {
                    let packet = whole(protocol, family.end(from, 4000), to, b"?");
                    let request = match program {
                        "uplink" => inbound(&packet),
                        _ => out_of(from, &packet),
                    };
                    stage.passes(
                        &format!("{row}, {device}, {also}"),
                        program,
                        device,
                        &request,
                    );
                }
            }
        };
        rows(stage, "default route");
        stage.delete_default_routes();
        rows(stage, "no default route");
    });
}

#[test]
fn a_loopback_host_ip_is_not_for_others() {
    // Hazards 8 and 9.
    with_each(|stage, family, protocol| {
        let loopback: &[&str] = match family {
            Family::V4 => &["127.0.0.1", "127.0.0.2"],
            Family::V6 => &["::1"],
        };
        for address in loopback {
            let at: IpAddr = address.parse().unwrap();
            stage.publish(at, protocol, "a");
            stage.addresses.insert(Wire(wire(at)), Wire(1), 0).unwrap();
            for to in [at, family.of("up0"), family.of("cni0")] {
                let to = SocketAddr::new(to, ports(protocol).0);
                let packet = |from| whole(protocol, family.end(from, 4000), to, b"?");
                stage.passes("outside", "uplink", "up0", &inbound(&packet("x")));
                stage.passes("a pod", "from_pod", "c", &out_of("c", &packet("c")));
                stage.passes("the same pod", "from_pod", "a", &out_of("a", &packet("a")));
            }
        }
    });
}

#[test]
fn a_frame_that_is_not_for_this_host_is_left_alone() {
    // Hazard 22: VLAN.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let port = ports(protocol).0;
        let packet_ends = (family.end("x", 4000), family.end("up0", port));
        let packet = whole(protocol, packet_ends.0, packet_ends.1, b"?");
        let group: Mac = match family {
            Family::V4 => [1, 0, 0x5e, 0, 0, 1],
            Family::V6 => [0x33, 0x33, 0, 0, 0, 1],
        };
        for (row, to) in [
            ("broadcast", BROADCAST),
            ("multicast", group),
            ("another station", mac("up1")),
        ] {
            stage.passes(row, "uplink", "up0", &frame(to, mac("x"), &packet));
        }
        let request = inbound(&packet);
        stage.passes("tagged", "uplink", "up0", &tagged(&request, 7));
        stage.passes(
            "tagged, of a pod",
            "from_pod",
            "c",
            &tagged(&out_of("c", &packet), 7),
        );
        let strange = ethernet(mac("up0"), mac("x"), OTHER, &packet);
        stage.passes("another ethertype", "uplink", "up0", &strange);
        let packet = whole(protocol, packet_ends.0, packet_ends.1, &[1; 40]);
        let swapped = match family {
            Family::V4 => ethernet(mac("up0"), mac("x"), 0x86dd, &packet),
            Family::V6 => ethernet(mac("up0"), mac("x"), 0x800, &packet),
        };
        stage.passes("the wrong version", "uplink", "up0", &swapped);
    });
}

#[test]
fn pods_of_the_network_appear_as_the_gateway() {
    // And the pod to itself: the hairpin.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let pod = family.end("a", pod_port);
        let mut seen = Vec::new();
        for (number, client) in ["c", "a", "b"].into_iter().enumerate() {
            let number = 4000 + u16::try_from(number).unwrap();
            for at in ["cni0", "up0"] {
                let number = if at == "up0" { number + 100 } else { number };
                let (from, original) = (family.end(client, number), family.end(at, port));
                let shown = family.end("cni0", number);
                stage.becomes(
                    &format!("{client} to {original}, protocol {protocol}"),
                    "from_pod",
                    client,
                    &out_of(client, &whole(protocol, from, original, b"?")),
                    &into("a", &whole(protocol, shown, pod, b"?")),
                );
                seen.push((pod, shown, original, from, client.to_owned()));
            }
        }
        assert_eq!(stage.seen(), seen.into_iter().collect());
    });
}

#[test]
fn pods_of_other_networks_keep_their_address() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (client, pod) = (family.end("m", 4000), family.end("a", pod_port));
        for at in ["cni0", "cni1", "up0"] {
            stage.reset();
            let original = family.end(at, port);
            stage.becomes(
                at,
                "from_pod",
                "m",
                &out_of("m", &whole(protocol, client, original, b"?")),
                &into("a", &whole(protocol, client, pod, b"?")),
            );
            let flow = (pod, client, original, client, "m".to_owned());
            assert_eq!(stage.seen(), [flow].into());
        }
    });
}

#[test]
fn without_a_gateway_address_its_pods_have_no_way_back() {
    with_each(|stage, family, protocol| {
        stage.publish_without_gateway(family, protocol, "a");
        let (port, pod_port) = ports(protocol);
        let original = family.end("up0", port);
        let packet = |from: &str| whole(protocol, family.end(from, 4000), original, b"?");
        stage.passes("the network's", "from_pod", "c", &out_of("c", &packet("c")));
        let served = whole(
            protocol,
            family.end("x", 4000),
            family.end("a", pod_port),
            b"?",
        );
        stage.becomes(
            "outside",
            "uplink",
            "up0",
            &inbound(&packet("x")),
            &into("a", &served),
        );
    });
}

#[test]
fn link_local_clients_appear_as_the_gateway() {
    let link_local = |port| SocketAddr::new("fe80::1234".parse().unwrap(), port);
    for protocol in PROTOCOLS {
        with_stage(|stage| {
            stage.publish(Family::V6.unspecified(), protocol, "a");
            let (port, pod_port) = ports(protocol);
            let own: IpAddr = "fe80::2".parse().unwrap();
            stage.addresses.insert(Wire(wire(own)), Wire(1), 0).unwrap();
            for (number, at) in [(4000, Family::V6.of("up0")), (4001, own)] {
                let request = whole(
                    protocol,
                    link_local(number),
                    SocketAddr::new(at, port),
                    b"?",
                );
                let shown = Family::V6.end("cni0", number);
                let served = whole(protocol, shown, Family::V6.end("a", pod_port), b"?");
                stage.becomes(
                    &format!("to {at}"),
                    "uplink",
                    "up0",
                    &inbound(&request),
                    &into("a", &served),
                );
            }
        });
    }
}

#[test]
fn udp_without_a_checksum_stays_so() {
    with_stage(|stage| {
        stage.publish(Family::V4.unspecified(), UDP, "a");
        let bare = |from: SocketAddr, to: SocketAddr| {
            let mut payload = segment(UDP, from, to, 0, b"sum");
            payload[6..8].copy_from_slice(&[0, 0]);
            packet(from.ip(), to.ip(), UDP, &Header::default(), &payload)
        };
        let (client, pod) = (Family::V4.end("x", 4000), Family::V4.end("a", 80));
        stage.becomes(
            "request",
            "uplink",
            "up0",
            &inbound(&bare(client, Family::V4.end("up0", 8080))),
            &into("a", &bare(client, pod)),
        );
    });
}

#[test]
fn a_udp_checksum_never_becomes_none() {
    for family in FAMILIES {
        with_stage(|stage| {
            stage.publish(family.unspecified(), UDP, "a");
            let (client, original) = (family.end("x", 4000), family.end("up0", 8080));
            let pod = family.end("a", 80);
            let zero = (0..=u16::MAX).map(u16::to_be_bytes).find(|data| {
                let sum = segment(UDP, client, pod, 0, data);
                sum[6..8] == [0xff, 0xff]
            });
            let data = zero.expect("some data sums up to nothing");
            stage.becomes(
                "zero, which says that there is none",
                "uplink",
                "up0",
                &inbound(&whole(UDP, client, original, &data)),
                &into("a", &whole(UDP, client, pod, &data)),
            );
        });
    }
}

#[test]
fn options_and_extension_headers_stay() {
    // Hazard 22: an authentication header that is not checked on the way.
    let rows: [(Family, &str, Options); 6] = [
        (Family::V4, "router alert", vec![(0, vec![0x94, 4, 0, 0])]),
        (Family::V4, "as many options as fit", vec![(0, vec![1; 40])]),
        (
            Family::V6,
            "hop by hop",
            vec![(0, vec![0, 0, 5, 2, 0, 0, 1, 0])],
        ),
        (
            Family::V6,
            "destination",
            vec![(60, vec![0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])],
        ),
        (
            Family::V6,
            "hop by hop, routing to the end, destination",
            vec![
                (0, vec![0, 0, 1, 4, 0, 0, 0, 0]),
                (43, vec![0, 0, 4, 0, 0, 0, 0, 0]),
                (60, vec![0, 0, 1, 4, 0, 0, 0, 0]),
            ],
        ),
        (
            Family::V6,
            "authentication",
            vec![(51, vec![0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 9, 9, 9, 9])],
        ),
    ];
    for (family, row, options) in rows {
        for protocol in PROTOCOLS {
            with_stage(|stage| {
                stage.publish(family.unspecified(), protocol, "a");
                let (port, pod_port) = ports(protocol);
                let header = Header {
                    options: options.clone(),
                    ..Header::default()
                };
                let build = |from: SocketAddr, to: SocketAddr| {
                    let payload = segment(protocol, from, to, SYN, b"data");
                    packet(from.ip(), to.ip(), protocol, &header, &payload)
                };
                let (client, original) = (family.end("x", 4000), family.end("up0", port));
                let pod = family.end("a", pod_port);
                stage.becomes(
                    row,
                    "uplink",
                    "up0",
                    &inbound(&build(client, original)),
                    &into("a", &build(client, pod)),
                );
                stage.becomes(
                    row,
                    "from_pod",
                    "a",
                    &out_of("a", &build(pod, client)),
                    &out_of("a", &build(original, client)),
                );
            });
        }
    }
}

#[test]
fn headers_that_hide_what_follows_are_left_alone() {
    let rows: [(&str, Options); 4] = [
        (
            "routing, a stop to come",
            vec![(43, vec![0, 0, 4, 1, 0, 0, 0, 0])],
        ),
        ("encryption", vec![(50, vec![0; 8])]),
        ("mobility", vec![(135, vec![0; 8])]),
        ("seven headers", vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0]); 7]),
    ];
    with_stage(|stage| {
        stage.publish(Family::V6.unspecified(), TCP, "a");
        let (client, original) = (Family::V6.end("x", 4000), Family::V6.end("up0", 8080));
        for (row, options) in rows {
            let header = Header {
                options,
                ..Header::default()
            };
            let payload = segment(TCP, client, original, SYN, b"");
            let packet = packet(client.ip(), original.ip(), TCP, &header, &payload);
            stage.passes(row, "uplink", "up0", &inbound(&packet));
        }
    });
}

#[test]
fn a_tunnel_has_no_ethernet_header() {
    // BPF_PROG_TEST_RUN takes the first bytes for an Ethernet header all the same: so
    // they have to be one, with the ethertype in the packet's source address and the
    // device's address in front of it.
    let rows: [(Family, &str, Header, Mac); 2] = [
        (
            Family::V4,
            "8.0.3.4",
            Header {
                id: 0x1234,
                options: vec![(0, vec![1; 4])],
                ..Header::default()
            },
            [0x46, 0, 0, 24 + 8 + 40, 0x12, 0x34],
        ),
        (
            Family::V6,
            "fd00:7:86dd::1",
            Header::default(),
            [0x60, 0, 0, 0, 0, 8 + 40],
        ),
    ];
    for (family, client, header, address) in rows {
        with_stage(|stage| {
            stage.rename("up1", address);
            stage.publish(family.unspecified(), UDP, "a");
            let client = SocketAddr::new(client.parse().unwrap(), 4000);
            let build = |to: SocketAddr| {
                let payload = segment(UDP, client, to, 0, &[7; 40]);
                packet(client.ip(), to.ip(), UDP, &header, &payload)
            };
            let request = build(family.end("up1", 8080));
            let served = into("a", &build(family.end("a", 80)));
            let run = stage.run("uplink_l3", "up1", &request);
            assert_eq!((run.verdict, run.mark), (super::super::bench::REDIRECT, 0));
            assert_eq!(run.bytes, served, "{family:?}");
            let elsewhere = stage.run("uplink_l3", "up1", &build(family.end("far", 8080)));
            assert_eq!(elsewhere.verdict, PASS);
        });
    }
}

#[test]
fn the_mark_does_not_reach_the_pod() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let original = family.end("up0", ports(protocol).0);
        let packet = whole(protocol, family.end("x", 4000), original, b"?");
        assert_eq!(stage.run("uplink", "up0", &inbound(&packet)).mark, 0);
        let packet = whole(protocol, family.end("c", 4000), original, b"?");
        assert_eq!(stage.run("from_pod", "c", &out_of("c", &packet)).mark, 0);
    });
}

#[test]
fn every_flag_of_tcp_is_led_alike() {
    // Hazard 23: no state of a connection is kept, so none can be poisoned.
    with_stage(|stage| {
        stage.publish(Family::V4.unspecified(), TCP, "a");
        let (client, original) = (Family::V4.end("x", 4000), Family::V4.end("up0", 8080));
        let pod = Family::V4.end("a", 80);
        for flags in [SYN, ACK, ACK | 1, 4, ACK | 4, ACK | 8, SYN] {
            stage.becomes(
                &format!("{flags:#x}"),
                "uplink",
                "up0",
                &inbound(&flagged(TCP, client, original, flags, b"")),
                &into("a", &flagged(TCP, client, pod, flags, b"")),
            );
        }
        assert_eq!(stage.seen().len(), 1);
    });
}
