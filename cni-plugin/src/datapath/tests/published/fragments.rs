//! Fragments: only the first of a datagram says for which port it is.

use std::net::SocketAddr;

use bpf_bridge_common::layout::FRAGMENT_NS;

use super::{
    super::{
        super::{ANY, Wire},
        bench::{REDIRECT, SHOT},
    },
    packets::{UDP, fragments},
    requests::with_each,
    stage::{FAMILIES, Stage, inbound, into, out_of, ports, with_stage},
};

const DATA: [u8; 100] = [7; 100];

fn split(protocol: u8, from: SocketAddr, to: SocketAddr, id: u32) -> Vec<Vec<u8>> {
    let parts = fragments(protocol, from, to, id, &DATA, 32);
    assert!(parts.len() > 3);
    parts
}

#[test]
fn fragments_follow_the_first() {
    // Hazards 21 and 22.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let pod = family.end("a", pod_port);
        for (program, device, client, seen_as) in [
            ("uplink", "up0", "x", "x"),
            ("from_pod", "c", "c", "cni0"),
            ("from_pod", "a", "a", "cni0"),
            ("from_pod", "m", "m", "m"),
        ] {
            stage.reset();
            let (client, seen_as) = (family.end(client, 4000), family.end(seen_as, 4000));
            let original = family.end("up0", port);
            let parts = split(protocol, client, original, 77);
            let there = split(protocol, seen_as, pod, 77);
            for (part, there) in parts.iter().zip(&there) {
                let request = match program {
                    "uplink" => inbound(part),
                    _ => out_of(device, part),
                };
                stage.becomes(device, program, device, &request, &into("a", there));
            }
            if program == "uplink" {
                let parts = split(protocol, pod, seen_as, 78);
                let back = split(protocol, original, client, 78);
                for (part, back) in parts.iter().zip(&back) {
                    stage.becomes("a", "from_pod", "a", &out_of("a", part), &out_of("a", back));
                }
            }
        }
    });
}

#[test]
fn fragments_of_the_stack_follow_the_first() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (client, pod) = (family.end("far", 4000), family.end("a", ports(protocol).1));
        for part in split(protocol, client, pod, 5) {
            let run = stage.run_from_host("a", &part);
            assert_eq!(
                (run.verdict, run.bytes == into("a", &part)),
                (REDIRECT, true)
            );
        }
        for part in split(protocol, pod, client, 6) {
            let part = out_of("a", &part);
            stage.becomes("reply", "from_pod", "a", &part, &part);
        }
    });
}

#[test]
fn fragments_whose_first_is_not_known_are_left_to_the_stack() {
    // Hazard 21.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (client, original) = (family.end("x", 4000), family.end("up0", ports(protocol).0));
        let parts: Vec<_> = split(protocol, client, original, 77)
            .iter()
            .map(|part| inbound(part))
            .collect();
        stage.passes("none came", "uplink", "up0", &parts[1]);

        stage.run("uplink", "up0", &parts[0]);
        let run = stage.run("uplink", "up0", &parts[2]);
        assert_eq!(
            run.verdict, REDIRECT,
            "in any order, once the first is there"
        );
        let another = inbound(&split(protocol, client, original, 78)[1]);
        stage.passes("of another datagram", "uplink", "up0", &another);
        let other = split(protocol, family.end("far", 4000), original, 77);
        stage.passes("of another sender", "uplink", "up0", &inbound(&other[1]));
        let other = split(protocol, client, family.end("up1", 8080), 77);
        stage.passes("to another address", "uplink", "up0", &inbound(&other[1]));
        // A pod cannot add to what somebody outside sends, nor another pod to a pod's.
        let forged = out_of("m", &split(protocol, client, original, 77)[1]);
        stage.passes("by a pod", "from_pod", "m", &forged);

        age(stage, FRAGMENT_NS + 1);
        stage.passes("too late", "uplink", "up0", &parts[1]);
    });
}

fn age(stage: &mut Stage, by: u64) {
    let entries: Vec<_> = stage.fragments.iter().map(Result::unwrap).collect();
    assert_eq!(entries.len(), 1);
    for (key, Wire(mut value)) in entries {
        assert_eq!((value.held, key.0.reserved), (0, [0; 3]));
        assert_ne!(value.protocol, 0);
        value.seen = value.seen.wrapping_sub(by);
        stage.fragments.insert(key, Wire(value), ANY).unwrap();
    }
}

#[test]
fn the_table_has_no_place_for_what_is_not_ours() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (client, other) = (family.end("x", 4000), family.end("up0", 1));
        let first = inbound(&split(protocol, client, other, 77)[0]);
        stage.passes("not published", "uplink", "up0", &first);
        for pod in ["c", "m"] {
            let first = split(protocol, family.end(pod, 80), family.end("far", 4000), 77);
            stage.passes(pod, "from_pod", pod, &out_of(pod, &first[0]));
        }
        assert_eq!(stage.fragments.keys().count(), 0);
    });
}

#[test]
fn fragments_of_a_client_with_another_port_are_its_own() {
    for family in FAMILIES {
        with_stage(|stage| {
            stage.publish(family.unspecified(), UDP, "a");
            let (client, pod) = (family.end("x", 4000), family.end("a", 80));
            stage.run(
                "uplink",
                "up0",
                &inbound(&split(UDP, client, family.end("up1", 8080), 1)[0]),
            );
            let original = family.end("up0", 8080);
            let parts = split(UDP, client, original, 2);
            assert_ne!(
                stage.run("uplink", "up0", &inbound(&parts[0])).verdict,
                SHOT
            );
            let shown = SocketAddr::new(client.ip(), stage.shown(client, original).unwrap());
            assert_ne!(shown.port(), 4000);
            for (part, there) in parts.iter().zip(&split(UDP, shown, pod, 2)) {
                stage.becomes("part", "uplink", "up0", &inbound(part), &into("a", there));
            }
        });
    }
}
