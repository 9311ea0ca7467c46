//! What a pod answers, and where that goes.

use std::net::{IpAddr, SocketAddr};

use bpf_bridge_common::drops::DropReason;

use super::{
    super::{super::Wire, bench::REDIRECT},
    packets::{Header, TCP, UDP, packet, segment, whole},
    requests::{PROTOCOLS, with_each},
    stage::{FAMILIES, Family, frame, inbound, into, mac, out_of, ports, wire, with_stage},
};

#[test]
fn a_reply_is_the_request_undone() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let pod = family.end("a", pod_port);
        for (device, client, seen_as) in [
            ("up0", "x", "x"),
            ("up1", "far", "far"),
            ("c", "c", "cni0"),
            ("a", "a", "cni0"),
            ("m", "m", "m"),
        ] {
            let (client, seen_as) = (family.end(client, 4000), family.end(seen_as, 4000));
            let original = family.end("up1", port);
            let row = format!("{client}, protocol {protocol}");
            stage.reset();
            let request = whole(protocol, client, original, b"?");
            let (program, request) = if device.starts_with("up") {
                ("uplink", frame(mac(device), mac("x"), &request))
            } else {
                ("from_pod", out_of(device, &request))
            };
            let there = into("a", &whole(protocol, seen_as, pod, b"?"));
            stage.becomes(&row, program, device, &request, &there);

            let reply = out_of("a", &whole(protocol, pod, seen_as, b"answer"));
            let undone = whole(protocol, original, client, b"answer");
            let undone = if device.starts_with("up") {
                // The neighbour's address is written after the program.
                out_of("a", &undone)
            } else {
                let gateway = if device == "m" { "cni1" } else { "cni0" };
                frame(mac(device), mac(gateway), &undone)
            };
            stage.becomes(&row, "from_pod", "a", &reply, &undone);
        }
    });
}

#[test]
fn what_is_no_reply_goes_to_the_stack() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        stage.publish_as(family.end("up0", 9090), protocol, "b", 80);
        let (port, pod_port) = ports(protocol);
        let (client, pod) = (family.end("x", 4000), family.end("a", pod_port));
        let request = whole(protocol, client, family.end("up0", port), b"?");
        stage.run("uplink", "up0", &inbound(&request));
        assert_eq!(stage.seen().len(), 1);

        let rows = [
            ("another port of the pod's", family.end("a", 81), client),
            ("to another port", pod, family.end("x", 4001)),
            ("to another client", pod, family.end("far", 4000)),
        ];
        for (row, from, to) in rows {
            stage.passes(
                row,
                "from_pod",
                "a",
                &out_of("a", &whole(protocol, from, to, b"!")),
            );
        }
        // Nobody else can answer in the pod's name, by whatever it writes there.
        for other in ["b", "c", "m"] {
            let forged = out_of(other, &whole(protocol, pod, client, b"!"));
            stage.passes("another pod", "from_pod", other, &forged);
        }
    });
}

#[test]
fn a_link_local_client_is_answered_on_its_link() {
    let client = SocketAddr::new("fe80::1234".parse().unwrap(), 4000);
    let own: IpAddr = "fe80::2".parse().unwrap();
    for protocol in PROTOCOLS {
        with_stage(|stage| {
            stage.publish(Family::V6.unspecified(), protocol, "a");
            let (port, pod_port) = ports(protocol);
            stage.addresses.insert(Wire(wire(own)), Wire(1), 0).unwrap();
            let (pod, shown) = (Family::V6.end("a", pod_port), Family::V6.end("cni0", 4000));
            for at in [Family::V6.of("up0"), own] {
                stage.reset();
                let original = SocketAddr::new(at, port);
                stage.run(
                    "uplink",
                    "up0",
                    &inbound(&whole(protocol, client, original, b"?")),
                );
                stage.becomes(
                    &format!("from {at}"),
                    "from_pod",
                    "a",
                    &out_of("a", &whole(protocol, pod, shown, b"!")),
                    &out_of("a", &whole(protocol, original, client, b"!")),
                );
            }
        });
    }
}

#[test]
fn without_a_route_a_reply_is_dropped_and_counted() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (client, pod) = (family.end("far", 4000), family.end("a", pod_port));
        let request = inbound(&whole(protocol, client, family.end("up0", port), b"?"));
        assert_eq!(stage.run("uplink", "up0", &request).verdict, REDIRECT);
        let reply = out_of("a", &whole(protocol, pod, client, b"!"));
        stage.delete_default_routes();
        stage.drops_for(
            "no route",
            ("from_pod", "a"),
            &reply,
            "a",
            DropReason::NoRoute,
        );
    });
}

#[test]
fn a_reply_that_is_too_long_is_left_to_the_stack_to_refuse() {
    // Hazard 20. The uplink has a smaller MTU than the pod.
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            with_stage(|stage| {
                stage.publish(family.unspecified(), protocol, "a");
                let (port, pod_port) = ports(protocol);
                let (client, pod) = (family.end("far", 4000), family.end("a", pod_port));
                let original = family.end("up0", port);
                stage.set_mtu("up0", 1300);
                let request = inbound(&whole(protocol, client, original, b"?"));
                assert_eq!(stage.run("uplink", "up0", &request).verdict, REDIRECT);

                let of_length = |length: usize, from: SocketAddr, df| {
                    let head = if family == Family::V4 { 20 } else { 40 };
                    let transport = segment(protocol, from, client, 16, b"").len();
                    let data = vec![7; length - head - transport];
                    let payload = segment(protocol, from, client, 16, &data);
                    let header = Header {
                        df,
                        ..Header::default()
                    };
                    out_of(
                        "a",
                        &packet(from.ip(), client.ip(), protocol, &header, &payload),
                    )
                };
                for df in [false, true] {
                    stage.becomes(
                        "as long as the device allows",
                        "from_pod",
                        "a",
                        &of_length(1300, pod, df),
                        &of_length(1300, original, df),
                    );
                    // Its own addresses, and not to be fragmented.
                    stage.becomes(
                        "longer",
                        "from_pod",
                        "a",
                        &of_length(1301, pod, df),
                        &of_length(1301, pod, true),
                    );
                }
            });
        }
    }
}

#[test]
fn a_large_packet_is_as_long_as_its_segments() {
    for family in FAMILIES {
        with_stage(|stage| {
            stage.publish(family.unspecified(), TCP, "a");
            stage.publish(family.unspecified(), UDP, "a");
            let (client, pod) = (family.end("x", 4000), family.end("a", 80));
            let original = family.end("up0", 8080);
            let head = if family == Family::V4 { 20 } else { 40 };
            for (protocol, transport) in [(TCP, 20), (UDP, 8)] {
                let request = inbound(&whole(protocol, client, original, b"?"));
                assert_eq!(stage.run("uplink", "up0", &request).verdict, REDIRECT);
                let data = vec![7; 3000];
                let reply = out_of("a", &whole(protocol, pod, client, &data));
                let undone = out_of("a", &whole(protocol, original, client, &data));
                let fits = 1500 - head - transport;
                let run = stage.run_large("from_pod", "a", &reply, fits);
                assert_eq!(
                    (run.verdict, run.bytes == undone),
                    (REDIRECT, true),
                    "{fits}"
                );
                let run = stage.run_large("from_pod", "a", &reply, fits + 1);
                assert_eq!(run.bytes[26..], reply[26..], "{fits} and one more");
            }
        });
    }
}
