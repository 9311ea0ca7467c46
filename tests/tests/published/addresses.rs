//! Addresses that come and go on the node after ADD.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Client, Namespace, Network, Node};

use crate::{HOST_PORT, NODE, PATIENCE, Server, meets, meets_nobody, network, settle};

const NEW: [&str; 2] = ["198.51.100.50", "2001:db8:ffff::50"];
/// How soon it must be right.
const SOON: Duration = Duration::from_secs(1);

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
        let changed = Instant::now();
        for address in NEW {
            for (who, client) in clients {
                meets(client, address.parse::<IpAddr>()?, "server")
                    .with_context(|| format!("{who}, round {round}"))?;
            }
        }
        ensure!(changed.elapsed() < SOON, "{:?}", changed.elapsed());
        change(&node, "del")?;
        for address in NEW {
            for (who, client) in clients {
                meets_nobody(client, address.parse::<IpAddr>()?)
                    .with_context(|| format!("{who}, round {round}"))?;
            }
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

/// A whole uplink that comes after ADD is found by the next call, too.
#[test]
fn a_new_uplink_is_found_by_the_next_call() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node);
    let _server = Server::new(&network, "server")?;
    let outside = node.outside()?;
    status(&network)?;
    for address in NODE {
        meets(&outside, address, "server")?;
        meets(&node, address, "server")?;
    }
    Ok(())
}
