//! Two clients that would look the same to the pod, and memory that is lost.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
};

use bpf_bridge_common::{
    drops::DropReason,
    layout::{FLOW_IDLE_NS, FLOW_REFRESH_NS, SPARED_NS},
};

use super::{
    super::{
        super::{ANY, Wire},
        bench::{REDIRECT, SHOT},
    },
    packets::{ACK, FIN, RST, SCTP, SYN, TCP, UDP, flagged, whole},
    requests::with_each,
    stage::{
        FAMILIES, Family, PASS, Stage, frame, inbound, into, mac, out_of, ports, wire, with_stage,
        with_stage_of,
    },
};
use crate::node::Limits;

/// A request by `up0`.
fn request(protocol: u8, client: SocketAddr, original: SocketAddr) -> Vec<u8> {
    inbound(&whole(protocol, client, original, b"?"))
}

#[test]
fn two_addresses_that_lead_to_one_port_are_told_apart() {
    // Hazard 12.
    with_each(|stage, family, protocol| {
        if protocol == SCTP {
            return;
        }
        stage.publish(family.unspecified(), protocol, "a");
        stage.publish_as(
            SocketAddr::new(family.unspecified(), 9090),
            protocol,
            "a",
            80,
        );
        let (client, pod) = (family.end("x", 4000), family.end("a", 80));
        let originals = [
            family.end("up0", 8080),
            family.end("up1", 8080),
            family.end("up0", 9090),
        ];
        let mut shown = Vec::new();
        for original in originals {
            let run = stage.run("uplink", "up0", &request(protocol, client, original));
            assert_eq!(run.verdict, REDIRECT);
            shown.push(stage.shown(client, original).unwrap());
        }
        assert_eq!(shown[0], 4000, "the first keeps its port");
        assert!(
            shown[0] != shown[1] && shown[1] != shown[2] && shown[0] != shown[2],
            "{shown:?}"
        );
        assert!(shown.iter().all(|port| *port >= 1024));

        let both_ways = |stage: &Stage, row: &str| {
            for (original, port) in originals.into_iter().zip(&shown) {
                let seen_as = SocketAddr::new(client.ip(), *port);
                let there = into("a", &whole(protocol, seen_as, pod, b"?"));
                let request = request(protocol, client, original);
                stage.becomes(row, "uplink", "up0", &request, &there);
                let reply = out_of("a", &whole(protocol, pod, seen_as, b"!"));
                let undone = out_of("a", &whole(protocol, original, client, b"!"));
                stage.becomes(row, "from_pod", "a", &reply, &undone);
            }
        };
        both_ways(stage, "the same again");

        // Hazards 2 and 3: the first one is forgotten; the others stay as they are.
        forget(stage, client, originals[0]);
        for original in &originals[1..] {
            let packet = flagged(protocol, client, *original, ACK, b"?");
            stage.run("uplink", "up0", &inbound(&packet));
        }
        assert_eq!(stage.seen().len(), 2);
        both_ways(stage, "and the first one is found where it was");
        forget(stage, client, originals[1]);
        both_ways(stage, "and so is the second");
        assert_eq!(stage.seen().len(), 3);
    });
}

fn forget(stage: &mut Stage, client: SocketAddr, original: SocketAddr) {
    change(stage, client, original, |_| None);
}

/// Changes or removes the one flow from `client` to `original`.
fn change(
    stage: &mut Stage,
    client: SocketAddr,
    original: SocketAddr,
    with: impl Fn(bpf_bridge_common::layout::Flow) -> Option<bpf_bridge_common::layout::Flow>,
) {
    let mut keys = Vec::new();
    for entry in stage.flows.iter() {
        let (key, Wire(flow)) = entry.unwrap();
        if (flow.client, flow.client_port) == (wire(client.ip()), client.port())
            && (flow.original, flow.original_port) == (wire(original.ip()), original.port())
        {
            keys.push((key, flow));
        }
    }
    assert_eq!(keys.len(), 1);
    for (key, flow) in keys {
        match with(flow) {
            Some(flow) => stage.flows.insert(key, Wire(flow), ANY).unwrap(),
            None => stage.flows.remove(&key).unwrap(),
        }
    }
}

#[test]
fn a_forgotten_flow_is_made_again_by_the_next_request() {
    // Hazard 2.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (client, original) = (family.end("x", 4000), family.end("up0", port));
        let pod = family.end("a", pod_port);
        let reply = out_of("a", &whole(protocol, pod, client, b"!"));
        let undone = out_of("a", &whole(protocol, original, client, b"!"));
        for _ in 0..2 {
            stage.run("uplink", "up0", &request(protocol, client, original));
            stage.becomes("reply", "from_pod", "a", &reply, &undone);
            forget(stage, client, original);
            stage.passes("nobody knows it", "from_pod", "a", &reply);
        }
    });
}

#[test]
fn pods_with_one_source_port_are_told_apart() {
    // Hazard 12, by way of the gateway's address.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (original, pod) = (family.end("cni0", port), family.end("a", pod_port));
        let packet = |client: &str| whole(protocol, family.end(client, 4000), original, b"?");
        assert_eq!(
            stage
                .run("from_pod", "c", &out_of("c", &packet("c")))
                .verdict,
            REDIRECT
        );
        let second = out_of("b", &packet("b"));
        if protocol == SCTP {
            // Hazard 32: its checksum covers the port that would have to change.
            let reason = DropReason::NoSourcePort;
            stage.drops_for("SCTP", ("from_pod", "b"), &second, "a", reason);
            return;
        }
        assert_eq!(stage.run("from_pod", "b", &second).verdict, REDIRECT);
        for client in ["c", "b"] {
            let end = family.end(client, 4000);
            let port = stage.shown(end, original).unwrap();
            assert_eq!(port == 4000, client == "c");
            let reply = whole(protocol, pod, family.end("cni0", port), b"!");
            let undone = frame(
                mac(client),
                mac("cni0"),
                &whole(protocol, original, end, b"!"),
            );
            stage.becomes(client, "from_pod", "a", &out_of("a", &reply), &undone);
        }
    });
}

#[test]
fn without_a_free_port_a_client_is_refused_and_counted() {
    // Hazard 5.
    for family in FAMILIES {
        with_stage(|stage| {
            let wildcard = family.unspecified();
            for port in 1000..1007 {
                stage.publish_as(SocketAddr::new(wildcard, port), UDP, "a", 80);
            }
            // One pod that asks for everything from everywhere takes every port.
            let client = family.end("x", 4000);
            let asked = |port| request(UDP, client, family.end("up0", port));
            let mut made = 0;
            for port in 1000..1007 {
                if stage.run("uplink", "up0", &asked(port)).verdict == REDIRECT {
                    made += 1;
                }
            }
            assert_eq!(made, 7, "all have a port");

            // What the next one could have is taken, by flows that are in use.
            stage.publish_as(SocketAddr::new(wildcard, 2000), UDP, "a", 80);
            let original = family.end("up0", 2000);
            take_every_port(stage, client, original);
            let reason = DropReason::NoSourcePort;
            stage.drops_for("none", ("uplink", "up0"), &asked(2000), "a", reason);
            stage.reset_counters();

            // Those that nobody used for long make room.
            let keys: Vec<_> = stage.flows.iter().map(Result::unwrap).collect();
            for (key, Wire(mut flow)) in keys {
                if flow.client == wire(family.of("far")) && key.0.client_port != 4000 {
                    flow.seen = flow.seen.wrapping_sub(FLOW_IDLE_NS + 1);
                    stage.flows.insert(key, Wire(flow), ANY).unwrap();
                    break;
                }
            }
            let run = stage.run("uplink", "up0", &asked(2000));
            assert_eq!((run.verdict, stage.drops()), (REDIRECT, vec![]));
            let shown = stage.shown(client, original).unwrap();
            assert_ne!(shown, 4000);
            let seen_as = SocketAddr::new(client.ip(), shown);
            let reply = out_of("a", &whole(UDP, family.end("a", 80), seen_as, b"!"));
            let undone = out_of("a", &whole(UDP, original, client, b"!"));
            stage.becomes("its reply", "from_pod", "a", &reply, &undone);
        });
    }
}

/// Lets every port under which the flow could be known be another client's, by seeing
/// which the program would take.
pub(super) fn take_every_port(stage: &mut Stage, client: SocketAddr, original: SocketAddr) {
    let other = SocketAddr::new(
        if client.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
        .of("far"),
        4000,
    );
    for _ in 0..16 {
        let request = request(UDP, client, original);
        if stage.run("uplink", "up0", &request).verdict == SHOT {
            stage.reset_counters();
            return;
        }
        change(stage, client, original, |mut flow| {
            flow.client = wire(other.ip());
            Some(flow)
        });
    }
    panic!("there is always another port");
}

#[test]
fn an_address_that_is_gone_is_not_served_any_longer() {
    // Not even to a client that never stops.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        stage.add_address("up1", family.of("new"));
        let port = ports(protocol).0;
        let (client, original) = (family.end("x", 4000), family.end("new", port));
        let request = request(protocol, client, original);
        assert_eq!(stage.run("uplink", "up0", &request).verdict, REDIRECT);
        stage.delete_address("up1", family.of("new"));
        change(stage, client, original, |mut flow| {
            flow.seen = flow.seen.wrapping_sub(FLOW_REFRESH_NS + 1);
            Some(flow)
        });
        stage.passes("half a second later", "uplink", "up0", &request);

        stage.add_address("up1", family.of("new"));
        assert_eq!(stage.run("uplink", "up0", &request).verdict, REDIRECT);
        stage.delete_address("up1", family.of("new"));
        // It was looked at just now.
        assert_eq!(stage.run("uplink", "up0", &request).verdict, REDIRECT);
    });
}

#[test]
fn a_port_that_moves_takes_its_clients_along_at_once() {
    // Hazard 11: the UDP client that never stops.
    with_each(|stage, family, protocol| {
        let (port, pod_port) = ports(protocol);
        let (client, original) = (family.end("x", 4000), family.end("up0", port));
        for pod in ["a", "b", "a"] {
            stage.publish(family.unspecified(), protocol, pod);
            let there = whole(protocol, client, family.end(pod, pod_port), b"?");
            let request = request(protocol, client, original);
            stage.becomes(pod, "uplink", "up0", &request, &into(pod, &there));
            let reply = out_of(
                pod,
                &whole(protocol, family.end(pod, pod_port), client, b"!"),
            );
            let undone = out_of(pod, &whole(protocol, original, client, b"!"));
            stage.becomes(pod, "from_pod", pod, &reply, &undone);
        }
    });
}

#[test]
fn a_client_may_come_by_another_uplink() {
    // Hazard 17.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (client, original) = (family.end("far", 4000), family.end("up0", port));
        let packet = whole(protocol, client, original, b"?");
        let there = into(
            "a",
            &whole(protocol, client, family.end("a", pod_port), b"?"),
        );
        for device in ["up0", "up1", "up0"] {
            let request = frame(mac(device), mac("x"), &packet);
            stage.becomes(device, "uplink", device, &request, &there);
        }
        assert_eq!(stage.seen().len(), 1);
    });
}

#[test]
fn link_local_clients_on_two_links_are_two() {
    let client = SocketAddr::new("fe80::1234".parse().unwrap(), 4000);
    let own: IpAddr = "fe80::2".parse().unwrap();
    for protocol in [TCP, UDP] {
        with_stage(|stage| {
            stage.publish(Family::V6.unspecified(), protocol, "a");
            stage
                .addresses
                .insert(Wire(wire(own)), Wire(1), ANY)
                .unwrap();
            let packet = whole(protocol, client, SocketAddr::new(own, 8080), b"?");
            for device in ["up0", "up1", "up0"] {
                let request = frame(mac(device), mac("x"), &packet);
                assert_eq!(stage.run("uplink", device, &request).verdict, REDIRECT);
            }
            let seen = stage.seen();
            let from: Vec<_> = seen.iter().map(|flow| flow.4.as_str()).collect();
            assert_eq!(seen.len(), 2, "{seen:?}");
            assert!(from.contains(&"up0") && from.contains(&"up1"));
        });
    }
}

#[test]
fn a_pod_cannot_take_a_client_s_flow() {
    // It writes the client's address into its packets.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let pod = family.end("a", pod_port);
        let original = family.end("up0", port);
        let victims = [("x", "up0", "x"), ("m", "m", "m"), ("b", "b", "cni0")];
        for (victim, device, seen_as) in victims {
            stage.reset();
            let (client, seen_as) = (family.end(victim, 4000), family.end(seen_as, 4000));
            let packet = whole(protocol, client, original, b"?");
            let (program, request) = match device {
                "up0" => ("uplink", inbound(&packet)),
                _ => ("from_pod", out_of(device, &packet)),
            };
            assert_eq!(stage.run(program, device, &request).verdict, REDIRECT);
            let before = stage.seen();
            let reply = out_of("a", &whole(protocol, pod, seen_as, b"!"));
            let undone = stage.run("from_pod", "a", &reply);
            for thief in ["c", "m", "b"] {
                if thief != victim {
                    stage.run("from_pod", thief, &out_of(thief, &packet));
                }
            }
            assert!(stage.seen().is_superset(&before), "{victim}");
            assert_eq!(stage.run("from_pod", "a", &reply), undone, "{victim}");
            let again = stage.run(program, device, &request);
            assert_eq!(
                again.bytes,
                into("a", &whole(protocol, seen_as, pod, b"?")),
                "{victim}"
            );
        }
    });
}

#[test]
fn what_the_stack_brings_goes_back_to_it() {
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let pod_port = ports(protocol).1;
        let pod = family.end("a", pod_port);
        for client in ["cni0", "x", "far"] {
            stage.reset();
            let client = family.end(client, 4000);
            let packet = whole(protocol, client, pod, b"?");
            let run = stage.run_from_host("a", &packet);
            assert_eq!((run.verdict, run.mark), (REDIRECT, 0));
            assert_eq!(run.bytes, into("a", &packet));
            assert_eq!(
                stage.seen(),
                [(pod, client, pod, client, "stack".to_owned())].into()
            );
            let reply = out_of("a", &whole(protocol, pod, client, b"!"));
            stage.becomes("reply", "from_pod", "a", &reply, &reply);
            // A pod that is spoken to by the stack is still not at its mercy.
            stage.passes("another pod", "from_pod", "c", &out_of("c", &reply[14..]));
        }
    });
}

#[test]
fn answers_to_what_netfilter_has_translated_are_no_requests() {
    // Netfilter has chosen a number that is published.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let node = family.end("up0", ports(protocol).0);
        let far = family.end("far", 53);
        stage
            .addresses
            .insert(Wire(wire(node.ip())), Wire(1), ANY)
            .unwrap();
        let answer = inbound(&whole(protocol, far, node, b"!"));
        assert_eq!(
            stage.run("uplink", "up0", &answer).verdict,
            REDIRECT,
            "nobody has asked"
        );
        stage.reset();
        let asked = frame(mac("x"), mac("up0"), &whole(protocol, node, far, b"?"));
        assert_eq!(stage.run_forwarded("up0", "gate", &asked).verdict, PASS);
        stage.passes("asked", "uplink", "up0", &answer);
        // From there only.
        let other = inbound(&whole(protocol, family.end("far", 54), node, b"?"));
        assert_eq!(stage.run("uplink", "up0", &other).verdict, REDIRECT);
    });
}

#[test]
fn a_flow_of_the_stack_stays_its_own() {
    // A machine with a route to the pods speaks to the pod itself; the number that the
    // pod listens on is published as well.
    with_each(|stage, family, protocol| {
        stage.publish_as(SocketAddr::new(family.unspecified(), 80), protocol, "a", 80);
        let (client, pod) = (family.end("far", 4000), family.end("a", 80));
        let packet = whole(protocol, client, pod, b"?");
        stage.passes("before", "uplink", "up0", &inbound(&packet));
        stage.run_from_host("a", &packet);
        stage.passes("after", "uplink", "up0", &inbound(&packet));
        stage.passes("a pod", "from_pod", "m", &out_of("m", &packet));
    });
}

#[test]
fn the_stack_and_a_client_outside_are_told_apart() {
    // Hazard 6: netfilter has chosen the same source.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let (port, pod_port) = ports(protocol);
        let (client, original) = (family.end("x", 4000), family.end("up0", port));
        let pod = family.end("a", pod_port);
        stage.run("uplink", "up0", &request(protocol, client, original));
        let packet = whole(protocol, client, pod, b"routed");
        let run = stage.run_from_host("a", &packet);
        if protocol == SCTP {
            assert_eq!(run.verdict, SHOT);
            let reason = DropReason::NoSourcePort;
            // Once with a sum over the packet.
            assert_eq!(stage.drops(), [("a".to_owned(), reason, 2)]);
            return;
        }
        let shown = SocketAddr::new(client.ip(), stage.shown(client, pod).unwrap());
        assert_ne!(shown.port(), 4000);
        assert_eq!(
            run.bytes,
            into("a", &whole(protocol, shown, pod, b"routed"))
        );
        let reply = out_of("a", &whole(protocol, pod, shown, b"!"));
        let undone = out_of("a", &whole(protocol, pod, client, b"!"));
        stage.becomes("the stack's", "from_pod", "a", &reply, &undone);
        let reply = out_of("a", &whole(protocol, pod, client, b"!"));
        let undone = out_of("a", &whole(protocol, original, client, b"!"));
        stage.becomes("the client's", "from_pod", "a", &reply, &undone);
    });
}

#[test]
fn a_connection_that_the_node_has_begun_is_not_stolen() {
    // Hazard 1: the published number is one that the node takes for itself, or that
    // somebody is masqueraded with.
    for family in FAMILIES {
        with_stage(|stage| {
            stage.publish(family.unspecified(), TCP, "a");
            for (server, node, program, device) in [
                ("far", "up0", "uplink", "up0"),
                ("c", "cni0", "from_pod", "c"),
            ] {
                let (server, own) = (family.end(server, 443), family.end(node, 8080));
                let frame = |flags| {
                    let packet = flagged(TCP, server, own, flags, b"");
                    if device == "c" {
                        out_of("c", &packet)
                    } else {
                        inbound(&packet)
                    }
                };
                let run = stage.run(program, device, &frame(SYN | ACK));
                assert_eq!(run.bytes, frame(SYN | ACK), "the answer");
                assert_eq!(
                    stage.seen().iter().filter(|flow| flow.4 == "stack").count(),
                    1
                );
                for flags in [ACK, ACK | FIN, RST, ACK] {
                    stage.passes("what follows", program, device, &frame(flags));
                }
                // Only the other side can begin another one.
                let run = stage.run(program, device, &frame(SYN));
                assert_eq!(run.verdict, REDIRECT);
                assert_ne!(run.bytes, frame(SYN), "a request");
                let run = stage.run(program, device, &frame(ACK));
                assert_ne!(run.bytes, frame(ACK), "and what follows");
                // Hazard 23: nobody can end it by pretending an answer.
                let run = stage.run(program, device, &frame(SYN | ACK));
                assert_ne!(run.bytes, frame(SYN | ACK), "and whatever comes");
                stage.reset();
            }
        });
    }
}

#[test]
fn a_connected_socket_of_the_node_is_not_stolen_from() {
    // Hazard 1, for connections that were there before, and for those without a
    // handshake.
    for family in FAMILIES {
        with_stage(|stage| {
            stage.publish(family.unspecified(), UDP, "a");
            stage.publish(family.unspecified(), TCP, "a");
            let (server, own) = (family.end("x", 53), family.end("up0", 8080));
            let socket = UdpSocket::bind(own).unwrap();
            let asked = |client| request(UDP, client, own);
            socket.connect(server).unwrap();
            stage.passes("the answer", "uplink", "up0", &asked(server));
            // Another client is none of that socket's, nor is one that only waits.
            let run = stage.run("uplink", "up0", &asked(family.end("x", 54)));
            assert_eq!(run.verdict, REDIRECT);
            assert_ne!(run.bytes, asked(family.end("x", 54)));
            drop(socket);
            let _waiting = UdpSocket::bind(own).unwrap();
            let there = into("a", &whole(UDP, server, family.end("a", 80), b"?"));
            stage.becomes("nobody asked", "uplink", "up0", &asked(server), &there);

            let listener = TcpListener::bind(own).unwrap();
            let data = |client| inbound(&flagged(TCP, client, own, ACK, b""));
            let run = stage.run("uplink", "up0", &data(server));
            assert_ne!(run.bytes, data(server), "a listener");
            drop(listener);
        });
    }
}

#[test]
fn nobody_outside_can_appear_as_a_neighbour_of_the_pod() {
    // Hazard 16: the programs come before the kernel's own look at the source. The
    // pod would answer these by itself, or the node would not.
    with_each(|stage, family, protocol| {
        stage.publish(family.unspecified(), protocol, "a");
        let original = family.end("up0", ports(protocol).0);
        let mut sources = vec![
            family.of("c"),
            family.of("cni0"),
            family.of("up0"),
            family.of("up1"),
            family.unspecified(),
        ];
        if family == Family::V4 {
            let group = ["224.0.0.1", "255.255.255.255", "127.0.0.1", "10.0.7.255"];
            sources.extend(group.map(|source| source.parse::<IpAddr>().unwrap()));
        } else {
            // The routing tables say nothing of these: the stack drops them.
            for source in ["ff02::1", "::1"] {
                let source = SocketAddr::new(source.parse().unwrap(), 4000);
                let packet = whole(protocol, source, original, b"?");
                stage.passes("outside", "uplink", "up0", &inbound(&packet));
                stage.passes("a pod", "from_pod", "m", &out_of("m", &packet));
            }
        }
        for source in sources {
            let packet = whole(protocol, SocketAddr::new(source, 4000), original, b"?");
            for (program, device, request) in [
                ("uplink", "up0", inbound(&packet)),
                ("from_pod", "m", out_of("m", &packet)),
            ] {
                let reason = DropReason::NoRoute;
                let row = format!("{source} by {device}");
                stage.drops_for(&row, (program, device), &request, "a", reason);
                assert_eq!(stage.seen().len(), 0, "{row}");
                stage.reset_counters();
            }
        }
    });
}

/// How many flows a pod can have in the tests of shares.
const SHARE: u16 = 256;

fn with_shares(work: impl FnOnce(&mut Stage)) {
    let limits = format!(r#"{{"podLimits": {{"flows": {SHARE}}}}}"#);
    with_stage_of(&Limits::of(&limits), work);
}

/// The ports of the clients whose flows are a pod's.
fn clients_of(stage: &Stage, pod: SocketAddr) -> BTreeSet<u16> {
    let seen = stage.seen();
    (seen.iter())
        .filter(|flow| flow.0 == pod)
        .map(|flow| flow.3.port())
        .collect()
}

#[test]
fn who_has_more_flows_than_its_share_loses_its_oldest() {
    with_shares(|stage| {
        let family = FAMILIES[0];
        stage.publish(family.unspecified(), UDP, "a");
        stage.publish_as(SocketAddr::new(family.unspecified(), 9090), UDP, "b", 80);
        let ask = |stage: &Stage, client: u16, original: u16| {
            let (client, original) = (family.end("x", client), family.end("up0", original));
            let run = stage.run("uplink", "up0", &request(UDP, client, original));
            assert_eq!(run.verdict, REDIRECT);
        };
        let (a, b) = (family.end("a", 80), family.end("b", 80));
        ask(stage, 1, 9090);
        for client in 1..=SHARE {
            ask(stage, 1000 + client, 8080);
        }
        let expected = |first: u16| -> BTreeSet<u16> { (first..first + SHARE).collect() };
        assert_eq!(
            clients_of(stage, a),
            expected(1001),
            "there is room for all"
        );
        for more in 1..=2 * SHARE {
            ask(stage, 1000 + SHARE + more, 8080);
            assert_eq!(clients_of(stage, a), expected(1001 + more));
        }
        assert_eq!(clients_of(stage, b), BTreeSet::from([1]));
    });
}

#[test]
fn what_is_in_use_is_spared() {
    with_shares(|stage| {
        let family = FAMILIES[0];
        stage.publish(family.unspecified(), UDP, "a");
        let original = family.end("up0", 8080);
        let ask = |stage: &Stage, client: u16| {
            stage.run(
                "uplink",
                "up0",
                &request(UDP, family.end("x", client), original),
            );
        };
        for client in 1..=SHARE {
            ask(stage, 1000 + client);
        }
        // The oldest one is the only one that has been used for long.
        for client in 1..=SHARE {
            change(stage, family.end("x", 1000 + client), original, |flow| {
                let seen = if client == 1 {
                    // As if it were used all the time.
                    flow.seen + u64::MAX / 4
                } else {
                    flow.seen.wrapping_sub(SPARED_NS + 1)
                };
                Some(bpf_bridge_common::layout::Flow { seen, ..flow })
            });
        }
        for more in 1..=2 * SHARE {
            ask(stage, 2000 + more);
            let clients = clients_of(stage, family.end("a", 80));
            assert!(clients.contains(&1001), "after {more}: {clients:?}");
            assert!(clients.contains(&(2000 + more)));
            assert_eq!(clients.len(), usize::from(SHARE));
        }
    });
}

#[test]
fn what_a_pod_asks_another_is_of_its_own_share() {
    with_shares(|stage| {
        let family = FAMILIES[0];
        stage.publish(family.unspecified(), UDP, "a");
        let original = family.end("up0", 8080);
        stage.run("uplink", "up0", &request(UDP, family.end("x", 1), original));
        let before = clients_of(stage, family.end("a", 80));
        for client in 1..=2 * SHARE {
            let asked = whole(UDP, family.end("b", 1000 + client), original, b"?");
            stage.run("from_pod", "b", &out_of("b", &asked));
        }
        let after = clients_of(stage, family.end("a", 80));
        assert_eq!(after.len(), usize::from(SHARE) + 1);
        assert!(before.is_subset(&after));
    });
}
