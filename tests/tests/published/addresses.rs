//! Addresses that come and go on the node after ADD.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Client, Namespace, Network, Node, Outside};
use serde_json::json;

use crate::{
    HOST_PORT, NODE, PATIENCE, Server, all_meet_nobody, conflist, meets, meets_nobody, network,
    ports, settle,
};

const NEW: [&str; 2] = ["198.51.100.50", "2001:db8:ffff::50"];

fn change(node: &Node, verb: &str) -> Result<()> {
    node.ip(&format!(
        "addr {verb} {}/24 dev uplink0\naddr {verb} {}/64 dev uplink0 nodad",
        NEW[0], NEW[1]
    ))
}

fn status(network: &Network) -> Result<()> {
    // Of the versions that have it, there is a call.
    for reply in network.status()? {
        reply.success()?;
    }
    Ok(())
}

#[test]
fn outside_and_pods_reach_a_new_address_at_once() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    let here: &Namespace = &outside;
    let clients = [
        ("outside", here),
        ("a pod", &neighbour),
        ("the pod itself", &server),
    ];
    for round in 0..2 {
        change(&node, "add")?;
        // Their first datagram counts: it is not sent twice.
        for address in NEW {
            for (who, client) in clients {
                meets(client, address.parse::<IpAddr>()?, "server")
                    .with_context(|| format!("{who}, round {round}"))?;
            }
        }
        change(&node, "del")?;
        for address in NEW {
            let address = address.parse()?;
            all_meet_nobody(&clients.map(|(who, client)| (who, client, address)))
                .with_context(|| format!("round {round}"))?;
        }
    }
    Ok(())
}

/// The documented limit: the node's own programs reach an address that came after
/// ADD from the next call on that has to do with published ports.
#[test]
fn the_node_itself_reaches_a_new_address_after_the_next_call() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node);
    let _server = Server::new(&network, "server")?;
    change(&node, "add")?;
    status(&network)?;
    for address in NEW {
        meets(&node, address.parse::<IpAddr>()?, "server")?;
    }
    change(&node, "del")?;
    status(&network)?;
    for address in NEW {
        // Now it is someone else's, who is not there.
        let server = SocketAddr::new(address.parse()?, HOST_PORT);
        let met = node.meet(Client::Tcp, server, Duration::from_millis(200));
        ensure!(met.is_err(), "{met:?}");
    }
    // Those that stay need no call.
    for address in NODE
        .into_iter()
        .chain(["127.0.0.1".parse()?, "::1".parse()?])
    {
        let server = SocketAddr::new(address, HOST_PORT);
        ensure!(node.meet(Client::Tcp, server, PATIENCE)?.server == "server");
    }
    Ok(())
}

/// The other documented limit: on a node without a default route nobody can tell an
/// address that is the node's from one that is nobody's, until the next call.
#[test]
fn without_a_default_route_a_new_address_is_served_after_the_next_call() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip("route del default")?;
    node.run("ip -6 route del default")?;
    let network = network(&node);
    let _server = Server::new(&network, "server")?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    change(&node, "add")?;
    status(&network)?;
    for address in NEW {
        meets(&outside, address.parse::<IpAddr>()?, "server")?;
        meets(&neighbour, address.parse::<IpAddr>()?, "server")?;
    }
    Ok(())
}

/// A whole uplink that comes after ADD is found by the next call, too, and so is one
/// that takes the place of another.
#[test]
fn a_new_uplink_is_found_by_the_next_call() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    for _ in 0..2 {
        let outside = node.outside()?;
        status(&network)?;
        network.check(server.attachment())?;
        for address in NODE {
            meets(&outside, address, "server")?;
            meets(&node, address, "server")?;
        }
        node.ip("link del uplink0")?;
    }
    Ok(())
}

/// The operator may say which devices are uplinks.
#[test]
fn only_the_uplinks_that_are_named_are_served() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let elsewhere = node.machine()?;
    node.connect("uplink1", &elsewhere, "eth0")?;
    node.ip("addr add 203.0.113.2/24 dev uplink1")?;
    elsewhere.ip("addr add 203.0.113.1/24 dev eth0")?;
    let there: IpAddr = "203.0.113.2".parse()?;
    for (uplinks, by_outside, by_elsewhere) in [
        (json!([]), false, false),
        (json!(["uplink1"]), false, true),
        (json!(["uplink1", "uplink0"]), true, true),
    ] {
        let mut config = Network::dual_stack(&node);
        config["uplinks"] = uplinks.clone();
        let network = Network::from_list(&node, conflist(config));
        let server = Server::new(&network, "server")?;
        let neighbour = network.pod("neighbour")?;
        for (client, address, served) in [
            (&*outside, NODE[0], by_outside),
            (&*outside, NODE[1], by_outside),
            (&elsewhere, there, by_elsewhere),
            (&*neighbour, there, true),
            (&*node, there, true),
        ] {
            if served {
                meets(client, address, "server").map(drop)
            } else {
                meets_nobody(client, address)
            }
            .with_context(|| format!("uplinks {uplinks}, {address}"))?;
        }
        network.check(server.attachment())?;
        for pod in [&neighbour, &*server] {
            network.del(pod.attachment())?;
        }
    }
    let mut config = Network::dual_stack(&node);
    config["uplinks"] = json!(["uplink7"]);
    let network = Network::from_list(&node, conflist(config));
    let error = network.pod_with_ports("pod", ports()).err();
    let error = error.context("a device that is not there")?.to_string();
    ensure!(
        error.contains("uplinks") && error.contains("uplink7"),
        "{error}"
    );
    Ok(())
}

/// An uplink may be a bridge, as on a machine with virtual ones: what is served is
/// the device that has the address.
#[test]
fn an_uplink_may_be_a_bridge() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    // Takes its routes away, too.
    node.ip("addr flush dev uplink0 scope global")?;
    node.run("ip -6 route flush default")?;
    node.ip(&format!(
        "link add br0 type bridge\n\
         link set br0 up\n\
         link set uplink0 master br0\n\
         addr add {}/24 dev br0\n\
         addr add {}/64 dev br0 nodad\n\
         route add default via {}\n\
         route add default via {}",
        NODE[0],
        NODE[1],
        Outside::V4,
        Outside::V6
    ))?;
    outside.ping(NODE[0], 1)?;
    let _server = Server::new(&network(&node), "server")?;
    for address in NODE {
        for meeting in meets(&outside, address, "server")? {
            let client = Outside::address_like(address);
            ensure!(meeting.client.ip() == client, "{meeting:?}");
        }
    }
    Ok(())
}
