//! XDP on the uplinks that the operator names.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Client, Frame, Network, Node, Outside, PacketSocket, Verb};
use serde_json::{Value, json};

use crate::{
    HOST_PORT, NODE, PATIENCE, Server, Uplinks, conflist, meets, network, network_by, ports,
};

/// The XDP program of a device, if it has one.
fn program_of(node: &Node, device: &str) -> Result<Value> {
    Ok(node.device(device)?["xdp"].clone())
}

/// What XDP redirects is seen by nobody on the uplink, not even by those who listen
/// to the device.
#[test]
fn xdp_takes_requests_before_anyone_sees_them() -> Result<()> {
    let node = Node::new()?;
    let outside = Uplinks::Xdp.outside(&node)?;
    for uplinks in [Uplinks::Tc, Uplinks::Xdp] {
        let network = network_by(&node, uplinks);
        let server = Server::new(&network, "server")?;
        let by_xdp = uplinks == Uplinks::Xdp;
        let program = program_of(&node, Outside::UPLINK)?;
        // Native: 1 is the driver's, 2 is what the kernel does for any device.
        ensure!(program.is_object() == by_xdp, "{program}");
        ensure!(!by_xdp || program["mode"] == 1, "{program}");
        network.check(server.attachment())?;
        let listener = PacketSocket::open(&node, Outside::UPLINK)?;
        for address in NODE {
            meets(&outside, address, "server")?;
            let asked = SocketAddr::new(address, HOST_PORT);
            let met = outside.meet(Client::Udp, asked, PATIENCE)?;
            ensure!(met.client.ip() == Outside::address_like(address));
        }
        let [high, low] = HOST_PORT.to_be_bytes();
        let seen = listener.receive(Duration::from_millis(100), |frame| {
            let at = if frame.ethertype() == Frame::IPV4 {
                36
            } else {
                56
            };
            frame.ip_source().is_some() && frame.bytes.get(at..at + 2) == Some(&[high, low][..])
        })?;
        ensure!(seen.is_none() == by_xdp, "{seen:?}");
        network.del(server.attachment())?;
    }
    Ok(())
}

/// On a device that has no XDP of its own the operator is told that it does not pay.
#[test]
fn xdp_behind_the_driver_is_a_warning() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip("addr flush dev uplink0 scope global")?;
    node.ip(&format!(
        "link add br0 type bridge\n\
         link set br0 up\n\
         link set uplink0 master br0\n\
         addr add {}/24 dev br0\n\
         addr add {}/64 dev br0 nodad",
        NODE[0], NODE[1]
    ))?;
    for address in NODE {
        outside.ping(address, 1)?;
    }
    let mut config = Network::dual_stack(&node);
    config["xdpUplinks"] = json!(["br0"]);
    let network = Network::from_list(&node, conflist(config));
    let sandbox = node.sandbox("pod")?;
    let attachment = sandbox.attachment().capability("portMappings", ports());
    let config = network.configs(Some(&attachment))?.remove(0);
    let reply = network
        .call(&config, Verb::Add)?
        .attachment(&attachment)
        .run(&node)?;
    reply.success()?;
    ensure!(
        reply.stderr.contains("br0") && reply.stderr.contains("generic"),
        "{}",
        reply.stderr
    );
    network.del(&attachment)
}

#[test]
fn a_device_that_is_not_there_is_named() -> Result<()> {
    let node = Node::new()?;
    let mut config = Network::dual_stack(&node);
    config["xdpUplinks"] = json!(["uplink7"]);
    let network = Network::from_list(&node, conflist(config));
    let error = network.pod_with_ports("pod", ports()).err();
    let error = error.context("a device that is not there")?.to_string();
    ensure!(
        error.contains("xdpUplinks") && error.contains("uplink7"),
        "{error}"
    );
    Ok(())
}

/// Networks with XDP and without share the uplink, and each one's pods are reached.
#[test]
fn networks_with_xdp_and_without_live_side_by_side() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let with = network_by(&node, Uplinks::Xdp);
    let without = network(&node);
    let other = |network: &Network| -> Result<_> {
        let ports = json!([{"hostPort": 9999, "containerPort": 80}]);
        let pod = network.pod_with_ports("other", ports)?;
        let listeners = crate::listen(&pod, "other", 80)?;
        Ok((pod, listeners))
    };
    let server = Server::new(&with, "server")?;
    let _other = other(&without)?;
    let reached = |port: u16, name: &str| -> Result<()> {
        for address in NODE {
            let met = outside.meet(Client::Tcp, (address, port).into(), PATIENCE)?;
            ensure!(met.server == name);
        }
        Ok(())
    };
    reached(HOST_PORT, "server")?;
    reached(9999, "other")?;
    with.del(server.attachment())?;
    reached(9999, "other")?;
    // A moment for what XDP might still hold.
    thread::sleep(Duration::from_millis(10));
    let gone = outside.meet(Client::Tcp, (NODE[0], HOST_PORT).into(), PATIENCE);
    ensure!(gone.is_err(), "{gone:?}");
    Ok(())
}
