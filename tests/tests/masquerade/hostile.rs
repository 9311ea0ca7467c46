//! Pods that mean harm: what they send must hurt neither the node nor other pods.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Frame, MacAddr, Namespace, Network, Node, Packet, PacketSocket, RawSocket};

use crate::{
    By, NODE, OUTSIDE, SILENCE, addresses, by_stack_and_programs, each,
    flow::{Kind, PORT},
    network, remotes, settle,
};

by_stack_and_programs! {
    pods_take_no_neighbours_from_the_node
    an_identifier_of_zero_takes_nothing_from_the_node
    the_nodes_own_traffic_comes_first
    a_forged_segment_of_a_remote_stops_no_connection
}

const ICMP6: u8 = 58;

/// That the machines reach each other, also if they have to find each other first.
fn are_neighbours(node: &Node, outside: &Namespace) -> Result<()> {
    for _ in 0..2 {
        outside
            .ping(NODE[1], 1)
            .context("the outside asks the node")?;
        node.ping(OUTSIDE[1], 1)
            .context("the node asks the outside")?;
        outside.ip("neigh flush dev eth0")?;
        node.ip("neigh flush dev uplink0")?;
    }
    Ok(())
}

/// Neighbour discovery has no ports: to take one of its messages for the answer to
/// something would be to take all of them.
fn pods_take_no_neighbours_from_the_node(by: By) -> Result<()> {
    // A question for an identifier of 0, a neighbour's question, its answer, and what is
    // for experiments (RFC 4443).
    each([128, 135, 136, 200], |kind| {
        let node = Node::new()?;
        let outside = node.outside()?;
        let network = by.network(&node);
        let pod = crate::pod(&network, "pod")?;
        let raw = RawSocket::open(&pod, addresses(&pod)?[1], ICMP6)?;
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        message.extend([0; 16]);
        // The node must find the outside before anything leaves.
        for _ in 0..3 {
            raw.send(OUTSIDE[1], &message)?;
            std::thread::sleep(SILENCE);
        }
        are_neighbours(&node, &outside)
    })
}

/// The outside asks the node with the identifier that a pod has asked the outside with.
fn an_identifier_of_zero_takes_nothing_from_the_node(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = crate::pod(&network, "pod")?;
    for (remote, node) in OUTSIDE.into_iter().zip(NODE) {
        pod.ping_with(remote, 1, &["-e", "0"])?;
        outside.ping_with(node, 1, &["-e", "0"])?;
        pod.ping_with(remote, 1, &["-e", "0"])?;
    }
    Ok(())
}

/// Of a protocol without ports there is one flow to each remote: a pod that speaks it
/// must not silence a tunnel of the node.
fn the_nodes_own_traffic_comes_first(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = crate::pod(&network, "pod")?;
    let remotes = remotes(&outside)?;
    let kinds = [Kind::Portless(47), Kind::Portless(253), Kind::Sctp];
    each(crate::both(&kinds), |(kind, family)| {
        let remote = &remotes[family];
        remote.open(kind, &pod, 4000)?.exchange()?;
        let mut own = remote.open(kind, &node, 4000)?;
        own.exchange()?;
        remote.never_meets(kind, &pod, 4000)?;
        own.exchange().map(drop)
    })
}

/// Another pod writes a remote's address into a segment for its neighbour, and has the
/// node bring it there.
fn a_forged_segment_of_a_remote_stops_no_connection(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let (victim, forger) = (network.pod("victim")?, network.pod("forger")?);
    settle(&node);
    let wire = PacketSocket::open(&forger, "eth0")?;
    let (to, from) = (
        MacAddr::of_device(&node, "cni0")?,
        MacAddr::of_device(&forger, "eth0")?,
    );
    let remotes = remotes(&outside)?;
    each([0, 1], |family: usize| {
        let own = SocketAddr::new(addresses(&victim)?[family], 4000);
        let remote = SocketAddr::new(OUTSIDE[family], PORT);
        wire.send(&Frame::ip(
            to,
            from,
            &Packet::tcp_reset(remote, own, 1).bytes(),
        ))?;
        std::thread::sleep(SILENCE);
        let mut flow = remotes[family].open(Kind::Tcp, &victim, 4000)?;
        for _ in 0..2 {
            let seen = flow.exchange()?;
            ensure!(seen.ip() == NODE[family], "seen as {seen}");
        }
        Ok(())
    })
}

/// Only the first fragment of an answer says that it is one.
#[test]
fn answers_in_fragments_keep_their_address() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let pod = crate::pod(&network, "pod")?;
    for subnet in [Network::V4_SUBNET, Network::V6_SUBNET] {
        outside.route_to_node(subnet)?;
    }
    each(addresses(&pod)?, |address: IpAddr| {
        outside.ping_with(address, 2, &["-s", "5000"])
    })
}
