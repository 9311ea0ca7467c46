//! Published ports by XDP: what it takes, what it leaves to the program of tc, and how
//! it comes and goes.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_tests::{
    Captured, Client, EchoServer, Frame, MacAddr, Network, Node, Offload, Outside, Packet,
    PacketSocket, Pod, Receive as _, Verb, wait_for,
};
use serde_json::json;

use crate::{
    HOST_PORT, NODE, PATIENCE, POD_PORT, SILENCE, Server, conflist, meets, network, other_network,
    ports,
};

/// `XDP_ATTACHED_DRV` and `XDP_ATTACHED_SKB` of `linux/if_link.h`.
const NATIVE: u64 = 1;
const GENERIC: u64 = 2;

/// A neighbour whose frames are as on a wire: their checksums are finished. What a veth
/// hands over is not, and XDP has nobody to ask.
fn outside(node: &Node) -> Result<Outside> {
    let outside = node.outside()?;
    outside.set_offload("eth0", Offload::TxChecksum, false)?;
    Ok(outside)
}

/// A network with XDP on this device.
fn network_on<'n>(node: &'n Node, device: &str) -> Network<'n> {
    let mut config = Network::dual_stack(node);
    config["xdpUplinks"] = json!([device]);
    Network::from_list(node, conflist(config))
}

/// How XDP runs on a device, if it does.
fn mode(node: &Node, device: &str) -> Result<Option<u64>> {
    Ok(node.device(device)?["xdp"]["mode"].as_u64())
}

/// Whether it is a plain request for [`HOST_PORT`]. XDP comes before any socket that
/// watches the device.
fn is_request(frame: &Captured) -> bool {
    let (protocol, port) = match frame.ethertype() {
        Frame::IPV4 => (23, 36),
        _ => (20, 56),
    };
    matches!(frame.bytes.get(protocol), Some(6 | 17))
        && frame.bytes.get(port..port + 2) == Some(&HOST_PORT.to_be_bytes())
}

/// That XDP took all requests that `work` made, or left some.
fn watched(
    node: &Node,
    device: &str,
    taken: bool,
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let wire = PacketSocket::open(node, device)?;
    work()?;
    let seen = wire.receive(SILENCE, is_request)?;
    match (taken, seen) {
        (true, None) | (false, Some(_)) => Ok(()),
        (true, Some(frame)) => bail!("XDP has left {frame:?}"),
        (false, None) => bail!("XDP has taken them all"),
    }
}

/// A pod that publishes [`ports`] and sends back what it gets.
fn echo(network: &Network) -> Result<(Pod, Vec<EchoServer>)> {
    let pod = network.pod_with_ports("echo", ports())?;
    let servers = pod
        .addresses()
        .into_iter()
        .map(|address| EchoServer::start_on(&pod, (address, POD_PORT).into()))
        .collect::<Result<_>>()?;
    Ok((pod, servers))
}

fn published(address: IpAddr) -> SocketAddr {
    (address, HOST_PORT).into()
}

#[test]
fn plain_requests_never_reach_the_stack() -> Result<()> {
    let node = Node::new()?;
    let outside = outside(&node)?;
    let network = network_on(&node, Outside::UPLINK);
    let (pod, servers) = echo(&network)?;
    ensure!(mode(&node, Outside::UPLINK)? == Some(NATIVE));
    // What is redirected to it is received by its queue for GRO.
    ensure!(pod.offload("eth0", Offload::GenericReceive)?);
    for address in NODE {
        watched(&node, Outside::UPLINK, true, || {
            // Up, and down again.
            outside.tcp_transfer(published(address), 5 << 20)?;
            outside.udp_echo(published(address), &[7; 1400], PATIENCE)?;
            Ok(())
        })
        .with_context(|| format!("to {address}"))?;
    }
    drop(servers);
    network.del(pod.attachment())?;

    let _server = Server::new(&network, "server")?;
    for address in NODE {
        watched(&node, Outside::UPLINK, true, || {
            for meeting in meets(&outside, address, "server")? {
                ensure!(meeting.client.ip() == Outside::address_like(address));
            }
            Ok(())
        })
        .with_context(|| format!("to {address}"))?;
    }
    Ok(())
}

#[test]
fn what_is_not_published_passes() -> Result<()> {
    let node = Node::new()?;
    let outside = outside(&node)?;
    let network = network_on(&node, Outside::UPLINK);
    let _server = Server::new(&network, "server")?;
    for address in NODE {
        let own = EchoServer::start(&node, address)?;
        outside.ping(address, 3)?;
        outside.tcp_transfer(own.address(), 1 << 20)?;
        outside.udp_echo(own.address(), &[7; 4000], PATIENCE)?;
    }
    // The same number of another machine, which this one leads to.
    node.set_sysctl("net/ipv4/ip_forward", "1")?;
    node.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
    let other = network.pod("other")?;
    for subnet in ["10.77.0.0/16", "fd77::/64"] {
        outside.route_to_node(subnet)?;
    }
    for address in other.addresses() {
        let routed = EchoServer::start_on(&other, (address, HOST_PORT).into())?;
        outside.tcp_transfer(routed.address(), 1 << 20)?;
    }
    Ok(())
}

/// Fragments, options, errors, and frames with unfinished checksums.
#[test]
fn what_xdp_leaves_the_other_program_takes() -> Result<()> {
    let node = Node::new()?;
    let outside = outside(&node)?;
    let network = network_on(&node, Outside::UPLINK);
    let (pod, _servers) = echo(&network)?;
    let wire = PacketSocket::open(&outside, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&outside, "eth0")?,
        MacAddr::of_device(&node, Outside::UPLINK)?,
    );
    for address in NODE {
        let server = published(address);
        let client = SocketAddr::new(Outside::address_like(address), 4000);
        let socket = outside.within(|| Ok(UdpSocket::bind(client)?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut answer = [0; 4000];
        let context = |what: &str| format!("{what} to {address}");

        outside
            .udp_echo(server, &[7; 4000], PATIENCE)
            .with_context(|| context("fragments"))?;
        for packet in [
            Packet::udp(client, server, b"options").with_options(),
            Packet::udp(client, server, b"options").with_hop_by_hop_options(),
        ] {
            wire.send(&Frame::ip(to, from, &packet.bytes()))?;
            let length = socket
                .receive(&mut answer)
                .with_context(|| context("options"))?;
            ensure!(answer[..length] == *b"options");
        }

        // The flow is one that XDP has made.
        watched(&node, Outside::UPLINK, true, || {
            socket.send_to(b"plain", server)?;
            socket.receive(&mut answer)?;
            Ok(())
        })?;
        let long = Packet::udp(server, client, &[7; 1400]);
        let complaint = Packet::too_big(client.ip(), &long, 1300);
        wire.send(&Frame::ip(to, from, &complaint.bytes()))?;
        wait_for("news of a smaller path", PATIENCE, || {
            let route = pod.run(&format!("ip route get {}", client.ip()))?;
            Ok(route.contains("mtu 1300"))
        })
        .with_context(|| context("a complaint"))?;

        outside.set_offload("eth0", Offload::TxChecksum, true)?;
        watched(&node, Outside::UPLINK, false, || {
            outside.tcp_transfer(server, 5 << 20)?;
            outside.udp_echo(server, &[7; 1400], PATIENCE)?;
            Ok(())
        })
        .with_context(|| context("unfinished checksums"))?;
        outside.set_offload("eth0", Offload::TxChecksum, false)?;
    }
    Ok(())
}

/// Frames for another station, as a switch floods them and a promiscuous device takes
/// them.
#[test]
fn frames_for_others_are_not_captured() -> Result<()> {
    let node = Node::new()?;
    let outside = outside(&node)?;
    let network = network_on(&node, Outside::UPLINK);
    let _echo = echo(&network)?;
    node.ip(&format!("link set {} promisc on", Outside::UPLINK))?;
    let wire = PacketSocket::open(&outside, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&outside, "eth0")?,
        MacAddr::of_device(&node, Outside::UPLINK)?,
    );
    for address in NODE {
        let client = SocketAddr::new(Outside::address_like(address), 4000);
        let socket = outside.within(|| Ok(UdpSocket::bind(client)?))?;
        let packet = Packet::udp(client, published(address), b"?").bytes();
        let mut answer = [0; 10];
        for (destination, answered) in [(MacAddr([2, 0, 0, 0, 0, 9]), false), (to, true)] {
            socket.set_read_timeout(Some(if answered { PATIENCE } else { SILENCE }))?;
            wire.send(&Frame::ip(destination, from, &packet))?;
            let received = socket.receive(&mut answer).is_ok();
            ensure!(received == answered, "{destination:?} of {address}");
        }
    }
    Ok(())
}

/// The pods of a network without XDP cannot take what it redirects.
#[test]
fn a_network_without_xdp_is_served_beside_one_with_it() -> Result<()> {
    let node = Node::new()?;
    let outside = outside(&node)?;
    let (with, without) = (network_on(&node, Outside::UPLINK), other_network(&node));
    let _fast = Server::new(&with, "with")?;
    let other = json!([{"hostPort": 9090, "containerPort": POD_PORT, "protocol": "tcp"}]);
    let plain = Server::publishing(&without, "without", other)?;
    ensure!(!plain.offload("eth0", Offload::GenericReceive)?);
    for address in NODE {
        meets(&outside, address, "with")?;
        let server = SocketAddr::new(address, 9090);
        let meeting = outside.meet(Client::Tcp, server, PATIENCE)?;
        ensure!(meeting.server == "without", "{meeting:?}");
    }
    Ok(())
}

/// A macvlan has no XDP of its own.
#[test]
fn a_driver_without_xdp_is_said_plainly() -> Result<()> {
    let node = Node::new()?;
    let outside = outside(&node)?;
    node.ip(&format!(
        "link add link {uplink} name macvlan0 type macvlan mode bridge\n\
         addr flush dev {uplink}\n\
         link set macvlan0 up\n\
         addr add {v4}/24 dev macvlan0\n\
         addr add {v6}/64 dev macvlan0 nodad\n\
         route replace default via {far_v4}\n\
         route replace default via {far_v6}",
        uplink = Outside::UPLINK,
        v4 = Outside::NODE_V4,
        v6 = Outside::NODE_V6,
        far_v4 = Outside::V4,
        far_v6 = Outside::V6,
    ))?;
    // Or it answers for the macvlan's address.
    node.set_sysctl("net/ipv4/conf/uplink0/arp_ignore", "1")?;
    let network = network_on(&node, "macvlan0");
    let sandbox = node.sandbox("echo")?;
    let attachment = sandbox.attachment().capability("portMappings", ports());
    let config = network
        .configs(Some(&attachment))?
        .into_iter()
        .next()
        .context("no plugin")?;
    let call = |verb| {
        network
            .call(&config, verb)
            .map(|call| call.attachment(&attachment))
    };
    let reply = call(Verb::Add)?.run(&node)?;
    let result = reply.success()?;
    let warning = "XDP runs on macvlan0 as generic XDP only";
    ensure!(reply.stderr.contains(warning), "{}", reply.stderr);
    ensure!(reply.stderr.contains("os error 95"), "{}", reply.stderr);
    ensure!(mode(&node, "macvlan0")? == Some(GENERIC));

    let mut checked = config.clone();
    checked["prevResult"] = result.clone();
    let reply = network
        .call(&checked, Verb::Check)?
        .attachment(&attachment)
        .run(&node)?;
    ensure!(reply.status.success(), "{}", reply.stdout);
    ensure!(reply.stderr.contains(warning), "{}", reply.stderr);

    let addresses = result["ips"].as_array().context("no addresses")?;
    let _servers = addresses
        .iter()
        .map(|ip| {
            let address = ip["address"].as_str().and_then(|ip| ip.split('/').next());
            let address: IpAddr = address.context("no address")?.parse()?;
            EchoServer::start_on(&sandbox, (address, POD_PORT).into())
        })
        .collect::<Result<Vec<_>>>()?;
    for address in NODE {
        watched(&node, "macvlan0", true, || {
            outside.tcp_transfer(published(address), 5 << 20)?;
            outside.udp_echo(published(address), &[7; 1400], PATIENCE)?;
            Ok(())
        })
        .with_context(|| format!("to {address}"))?;
        outside.udp_echo(published(address), &[7; 4000], PATIENCE)?;
    }
    Ok(())
}

#[test]
fn it_comes_and_goes_with_published_ports() -> Result<()> {
    let node = Node::new()?;
    let outside = outside(&node)?;
    let network = network_on(&node, Outside::UPLINK);
    let quiet = network.pod("quiet")?;
    ensure!(mode(&node, Outside::UPLINK)?.is_none());
    for deleted in [false, true] {
        let server = Server::new(&network, "server")?;
        ensure!(mode(&node, Outside::UPLINK)? == Some(NATIVE));
        network.check(server.attachment())?;

        // Lost, and made good by any call that looks.
        let pins = "/sys/fs/bpf/bpf-bridge";
        let pin = node.run(&format!("find {pins} -name xdp-*"))?;
        node.run(&format!("rm {}", pin.trim()))?;
        wait_for("end of XDP", PATIENCE, || {
            Ok(mode(&node, Outside::UPLINK)?.is_none())
        })?;
        for address in NODE {
            meets(&outside, address, "server")?;
        }
        if deleted {
            network.check(server.attachment())?;
        } else {
            for reply in network.status()? {
                ensure!(reply.status.success(), "{}", reply.stdout);
            }
        }
        ensure!(mode(&node, Outside::UPLINK)? == Some(NATIVE));
        for address in NODE {
            watched(&node, Outside::UPLINK, true, || {
                meets(&outside, address, "server").map(drop)
            })?;
        }

        if deleted {
            network.del(server.attachment())?;
        }
        // The programs stay for the next pod, until somebody cleans up.
        network.gc(&[quiet.attachment()])?;
        wait_for("end of XDP", PATIENCE, || {
            Ok(mode(&node, Outside::UPLINK)?.is_none())
        })?;
        ensure!(node.run(&format!("find {pins} -name xdp*"))?.is_empty());
    }
    Ok(())
}

#[test]
fn a_foreign_program_is_named_and_left_alone() -> Result<()> {
    let node = Node::new()?;
    let outside = outside(&node)?;
    let with_xdp = network_on(&node, Outside::UPLINK);
    // A program of before, which nobody knows any more.
    let pod = with_xdp.pod_with_ports("before", ports())?;
    let foreign = "/sys/fs/bpf/foreign";
    node.run(&format!("ln /sys/fs/bpf/bpf-bridge/v1/nat/xdp {foreign}"))?;
    with_xdp.del(pod.attachment())?;
    with_xdp.gc(&[])?;
    wait_for("end of XDP", PATIENCE, || {
        Ok(mode(&node, Outside::UPLINK)?.is_none())
    })?;
    node.run(&format!(
        "ip link set {} xdpdrv pinned {foreign}",
        Outside::UPLINK
    ))?;
    let program = node.device(Outside::UPLINK)?["xdp"]["prog"]["id"].clone();

    let error = with_xdp.pod_with_ports("pod", ports()).err();
    let error = error.context("a foreign program is no error")?.to_string();
    ensure!(
        error.contains(&format!(
            "{} carries an XDP program already",
            Outside::UPLINK
        )) && error.contains(&program.to_string()),
        "{error}"
    );
    ensure!(node.device(Outside::UPLINK)?["xdp"]["prog"]["id"] == program);

    // Without XDP it goes on as ever: that program passes what it does not know.
    let plain = network(&node);
    let _server = Server::new(&plain, "server")?;
    for address in NODE {
        meets(&outside, address, "server")?;
    }
    Ok(())
}

#[test]
fn a_device_that_is_not_there_is_named() -> Result<()> {
    let node = Node::new()?;
    let network = network_on(&node, "nowhere0");
    let error = network.pod_with_ports("pod", ports()).err();
    let error = error.context("nowhere0 is there")?.to_string();
    ensure!(
        error.contains("xdpUplinks") && error.contains("nowhere0"),
        "{error}"
    );
    Ok(())
}
