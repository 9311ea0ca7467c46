//! ICMP and ICMPv6 errors: what they quote must be what their receiver has sent.

use std::net::SocketAddr;

use super::{
    super::bench::REDIRECT,
    packets::{SCTP, SYN, TCP, UDP, flagged, icmp, too_big, whole},
    requests::with_each,
    stage::{Family, PASS, frame, inbound, into, mac, out_of, ports},
};

/// Makes a packet the frame that comes by a device.
type Wrap = fn(&str, &[u8]) -> Vec<u8>;

/// How much of a packet is quoted: all, and as little as RFC 792 asks for.
fn quotes(family: Family, packet: &[u8]) -> [usize; 3] {
    let head = if family == Family::V4 { 20 } else { 40 };
    [packet.len(), head + 18, head + 8]
}

fn cut(packet: &[u8], length: usize) -> &[u8] {
    &packet[..length.min(packet.len())]
}

#[test]
fn an_error_about_a_reply_reaches_the_pod() {
    // Hazard 20: path MTU discovery of a pod's answers.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (original, pod) = (family.end("up0", port), family.end("a", pod_port));
        for (device, client, seen_as, router) in [
            ("up0", "far", "far", "router"),
            ("up0", "x", "x", "x"),
            ("c", "c", "cni0", "c"),
            ("m", "m", "m", "m"),
        ] {
            stage.reset();
            let (client, seen_as) = (family.end(client, 4000), family.end(seen_as, 4000));
            let (program, wrap): (_, Wrap) = match device {
                "up0" => ("uplink", |_, packet| inbound(packet)),
                _ => ("from_pod", |device, packet| out_of(device, packet)),
            };
            let reply = whole(protocol, original, client, &[7; 50]);
            let own = whole(protocol, pod, seen_as, &[7; 50]);
            let router = family.of(router);
            for length in quotes(family, &reply) {
                let row = format!("{client}, protocol {protocol}, {length} quoted");
                let error = too_big(router, original.ip(), cut(&reply, length));
                let error = wrap(device, &error);
                let before = stage.seen();
                if before.is_empty() {
                    stage.passes("about nothing", program, device, &error);
                    let request = whole(protocol, client, original, b"?");
                    let run = stage.run(program, device, &wrap(device, &request));
                    assert_eq!(run.verdict, REDIRECT);
                }
                let there = too_big(router, pod.ip(), cut(&own, length));
                stage.becomes(&row, program, device, &error, &into("a", &there));
            }
            // Nobody else can say so.
            let forged = too_big(family.of("m"), original.ip(), &reply);
            if device != "m" {
                stage.passes("a pod", "from_pod", "m", &out_of("m", &forged));
            }
        }
    });
}

#[test]
fn an_error_about_a_request_reaches_the_client() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (original, pod) = (family.end("up0", port), family.end("a", pod_port));
        for (device, client, seen_as) in
            [("up0", "far", "far"), ("c", "c", "cni0"), ("m", "m", "m")]
        {
            stage.reset();
            let (client, seen_as) = (family.end(client, 4000), family.end(seen_as, 4000));
            let request = whole(protocol, client, original, &[7; 50]);
            let (program, sent) = match device {
                "up0" => ("uplink", inbound(&request)),
                _ => ("from_pod", out_of(device, &request)),
            };
            assert_eq!(stage.run(program, device, &sent).verdict, REDIRECT);
            let own = whole(protocol, seen_as, pod, &[7; 50]);
            for length in quotes(family, &own) {
                let kind = if family == Family::V4 { [3, 3] } else { [1, 4] };
                let error = icmp(pod.ip(), seen_as.ip(), kind, [0; 4], cut(&own, length));
                let undone = icmp(
                    original.ip(),
                    client.ip(),
                    kind,
                    [0; 4],
                    cut(&request, length),
                );
                let undone = match device {
                    "up0" => out_of("a", &undone),
                    "m" => frame(mac("m"), mac("cni1"), &undone),
                    _ => frame(mac(device), mac("cni0"), &undone),
                };
                let row = format!("{client}, protocol {protocol}, {length} quoted");
                stage.becomes(&row, "from_pod", "a", &out_of("a", &error), &undone);
                // A pod speaks for itself only.
                let forged = out_of("b", &error);
                stage.passes("another pod", "from_pod", "b", &forged);
            }
        }
    });
}

#[test]
fn errors_name_the_port_that_the_other_side_knows() {
    with_each(|stage, family, protocol| {
        if protocol == SCTP {
            return;
        }
        stage.publish(family.unspecified(), protocol, "a");
        let (client, pod) = (family.end("x", 4000), family.end("a", 80));
        let first = whole(protocol, client, family.end("up1", 8080), b"?");
        stage.run("uplink", "up0", &inbound(&first));
        let original = family.end("up0", 8080);
        stage.run(
            "uplink",
            "up0",
            &inbound(&whole(protocol, client, original, b"?")),
        );
        let shown = SocketAddr::new(client.ip(), stage.shown(client, original).unwrap());
        assert_ne!(shown, client);

        let quoted = whole(protocol, original, client, &[1; 20]);
        let error = inbound(&too_big(family.of("router"), original.ip(), &quoted));
        let own = whole(protocol, pod, shown, &[1; 20]);
        let there = into("a", &too_big(family.of("router"), pod.ip(), &own));
        stage.becomes("about a reply", "uplink", "up0", &error, &there);

        // The stack's flow has another port as well: its errors too.
        let run = stage.run_from_host("a", &whole(protocol, client, pod, b"?"));
        assert_eq!(run.verdict, REDIRECT);
        let shown = SocketAddr::new(client.ip(), stage.shown(client, pod).unwrap());
        let quoted = whole(protocol, pod, client, &[1; 20]);
        let run = stage.run_from_host("a", &too_big(family.of("x1"), pod.ip(), &quoted));
        let own = whole(protocol, pod, shown, &[1; 20]);
        let there = into("a", &too_big(family.of("x1"), pod.ip(), &own));
        assert_eq!(
            (run.verdict, run.bytes == there),
            (REDIRECT, true),
            "the stack's"
        );
    });
}

#[test]
fn messages_that_are_no_errors_are_left_alone() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (client, original) = (family.end("x", 4000), family.end("up0", ports(protocol).0));
        stage.run(
            "uplink",
            "up0",
            &inbound(&whole(protocol, client, original, b"?")),
        );
        let quoted = whole(protocol, original, client, &[1; 20]);
        let kinds: &[[u8; 2]] = match family {
            Family::V4 => &[[8, 0], [0, 0], [13, 0]],
            Family::V6 => &[[128, 0], [129, 0], [135, 0], [0, 0]],
        };
        for kind in kinds {
            let message = icmp(client.ip(), original.ip(), *kind, [0; 4], &quoted);
            stage.passes(&format!("{kind:?}"), "uplink", "up0", &inbound(&message));
        }
    });
}

#[test]
fn an_error_that_ends_too_early_is_left_alone() {
    // Hazard 20.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (client, original) = (family.end("x", 4000), family.end("up0", port));
        stage.run(
            "uplink",
            "up0",
            &inbound(&whole(protocol, client, original, b"?")),
        );
        let quoted = whole(protocol, original, client, &[1; 20]);
        let ports_at = if family == Family::V4 { 24 } else { 44 };
        for length in 0..quoted.len() {
            // Half a checksum is left as it is.
            let half = match protocol {
                TCP => 17,
                UDP => 7,
                _ => 0,
            };
            if length == ports_at - 4 + half {
                continue;
            }
            let error = too_big(client.ip(), original.ip(), &quoted[..length]);
            let run = stage.run("uplink", "up0", &inbound(&error));
            if length < ports_at {
                assert_eq!(
                    (run.verdict, run.bytes == inbound(&error)),
                    (PASS, true),
                    "{length}"
                );
            } else {
                let pod = family.end("a", pod_port);
                let own = whole(protocol, pod, client, &[1; 20]);
                let there = into("a", &too_big(client.ip(), pod.ip(), &own[..length]));
                assert_eq!(
                    (run.verdict, run.bytes == there),
                    (REDIRECT, true),
                    "{length}"
                );
            }
        }
        assert_eq!(stage.drops(), []);
    });
}

#[test]
fn an_error_changes_no_flow() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (client, original) = (family.end("x", 4000), family.end("up0", ports(protocol).0));
        let request = inbound(&flagged(protocol, client, original, SYN, b"?"));
        stage.run("uplink", "up0", &request);
        let before = stage.seen();
        let quoted = whole(protocol, original, client, b"!");
        let error = too_big(family.of("router"), original.ip(), &quoted);
        for device in ["up0", "up1"] {
            stage.run("uplink", device, &frame(mac(device), mac("x"), &error));
        }
        for pod in ["a", "b", "c", "m"] {
            stage.run("from_pod", pod, &out_of(pod, &error));
        }
        assert_eq!(stage.seen(), before);
    });
}
