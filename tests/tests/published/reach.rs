//! Who reaches a published port, by which address, and whom the pod sees.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Client, EchoServer, Frame, MacAddr, Meeting, Namespace, Network, Node, Outside, Packet,
    PacketSocket, Pod, Receive as _, ReceiveFrom as _, wait_for,
};

use crate::{
    GATEWAYS, HOST_PORT, NODE, PATIENCE, POD_PORT, SILENCE, Server, Uplinks, all_meet_nobody,
    listen, meets, meets_nobody, network, network_by, other_network, settle, with_and_without_xdp,
};

/// More addresses of the node: a second pair on its uplink, on the loopback
/// device, and on another uplink.
const SECOND: [&str; 2] = ["198.51.100.22", "2001:db8:ffff::22"];
const ON_LOOPBACK: [&str; 2] = ["192.0.2.77", "2001:db8:77::1"];
const OTHER_UPLINK: [&str; 2] = ["203.0.113.2", "2001:db8:2::2"];
/// The machine at the other uplink.
const ELSEWHERE: [&str; 2] = ["203.0.113.1", "2001:db8:2::1"];

/// Whom the pod sees.
#[derive(Clone, Copy)]
enum Seen {
    /// The client's own address, of the family that it spoke.
    Own([IpAddr; 2]),
    /// The gateway.
    Gateway,
    /// An address of the node.
    Node,
}

/// A node with all those addresses, and what is around it.
struct Surroundings {
    outside: Outside,
    elsewhere: Namespace,
}

impl Surroundings {
    fn new(node: &Node, uplinks: Uplinks) -> Result<Self> {
        let outside = uplinks.outside(node)?;
        let elsewhere = node.machine()?;
        node.connect("uplink1", &elsewhere, "eth0")?;
        for (namespace, device, addresses) in [
            (&**node, Outside::UPLINK, SECOND),
            (node, "lo", ON_LOOPBACK),
            (node, "uplink1", OTHER_UPLINK),
            (&elsewhere, "eth0", ELSEWHERE),
        ] {
            let (v4, v6) = match device {
                "lo" => (32, 128),
                _ => (24, 64),
            };
            namespace.ip(&format!(
                "addr add {}/{v4} dev {device}\naddr add {}/{v6} dev {device} nodad",
                addresses[0], addresses[1]
            ))?;
        }
        for [v4, v6] in [
            [Network::V4_SUBNET, Network::V6_SUBNET],
            ON_LOOPBACK,
            OTHER_UPLINK,
        ] {
            outside.route_to_node(v4)?;
            outside.route_to_node(v6)?;
        }
        Ok(Self { outside, elsewhere })
    }
}

fn parsed(addresses: [&str; 2]) -> Result<[IpAddr; 2]> {
    Ok([addresses[0].parse()?, addresses[1].parse()?])
}

fn of(pod: &Pod) -> Result<[IpAddr; 2]> {
    Ok([pod.v4()?.into(), pod.v6()?.into()])
}

/// Every row of clients and addresses, with every kind of client.
fn everyone_reaches_the_pod(
    node: &Node,
    surroundings: &Surroundings,
    uplinks: Uplinks,
) -> Result<()> {
    let network = network_by(node, uplinks);
    let other = other_network(node);
    let neighbour = network.pod("neighbour")?;
    let foreigner = other.pod("foreigner")?;
    let server = Server::new(&network, "server")?;

    let [second, on_loopback, other_uplink, elsewheres] =
        [SECOND, ON_LOOPBACK, OTHER_UPLINK, ELSEWHERE].map(parsed);
    let nodes = [NODE, second?, on_loopback?, other_uplink?, GATEWAYS].concat();
    let mut others_gateway = nodes.clone();
    others_gateway.extend(parsed(["10.88.0.1", "fd88::1"])?);
    let mut local = others_gateway.clone();
    for address in [
        "127.0.0.1",
        "127.0.0.53",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:198.51.100.2",
        "::ffff:10.77.0.1",
    ] {
        local.push(address.parse()?);
    }
    let outsides = Seen::Own([Outside::V4.into(), Outside::V6.into()]);
    let elsewheres = Seen::Own(elsewheres?);
    let foreigners = Seen::Own(of(&foreigner)?);

    let rows: [(&str, &Namespace, &[IpAddr], Seen); 6] = [
        ("outside", &surroundings.outside, &nodes, outsides),
        (
            "elsewhere",
            &surroundings.elsewhere,
            &parsed(OTHER_UPLINK)?,
            elsewheres,
        ),
        ("the node", node, &local, Seen::Node),
        ("a neighbour", &neighbour, &nodes, Seen::Gateway),
        (
            "a pod of another network",
            &foreigner,
            &others_gateway,
            foreigners,
        ),
        ("the pod itself", &server, &nodes, Seen::Gateway),
    ];
    for (who, from, addresses, seen) in rows {
        for address in addresses {
            let expected = |client: IpAddr| match (seen, client) {
                (Seen::Own([v4, v6]), _) => client == v4 || client == v6,
                (Seen::Gateway, _) => GATEWAYS.contains(&client),
                (Seen::Node, _) => local.contains(&client),
            };
            for meeting in meets(from, *address, "server").context(who)? {
                let client = meeting.client.ip();
                ensure!(
                    expected(client) && (client.is_ipv4() == address.to_canonical().is_ipv4()),
                    "{who} to {address} is seen as {client}"
                );
            }
        }
    }
    Ok(())
}

with_and_without_xdp! {
    everyone_reaches_a_published_port_by_every_address_of_the_node
    everyone_reaches_it_on_a_node_with_a_strict_firewall
    a_client_may_have_a_link_local_address_only
    one_client_port_may_use_two_addresses_and_two_ports_at_once
    requests_and_replies_may_take_different_uplinks
    replies_to_the_nodes_own_connections_are_not_captured
}

/// Hazard: native host ports that missed 127.0.0.1 and other addresses of the
/// node that portmap serves.
fn everyone_reaches_a_published_port_by_every_address_of_the_node(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let surroundings = Surroundings::new(&node, uplinks)?;
    everyone_reaches_the_pod(&node, &surroundings, uplinks)
}

/// What passes the host's firewall is said in the README; published ports do
/// not.
fn everyone_reaches_it_on_a_node_with_a_strict_firewall(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    for which in ["all", "default"] {
        node.set_sysctl(&format!("net/ipv4/conf/{which}/rp_filter"), "1")?;
    }
    let surroundings = Surroundings::new(&node, uplinks)?;
    node.set_sysctl("net/ipv4/conf/uplink0/rp_filter", "1")?;
    for iptables in ["iptables", "ip6tables"] {
        for rule in [
            "-P FORWARD DROP",
            "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
            "-A INPUT -m conntrack --ctstate INVALID -j DROP",
            "-A OUTPUT -m conntrack --ctstate INVALID -j DROP",
        ] {
            node.run(&format!("{iptables} {rule}"))?;
        }
    }
    everyone_reaches_the_pod(&node, &surroundings, uplinks)
}

fn a_client_may_have_a_link_local_address_only(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let _server = Server::new(&network_by(&node, uplinks), "server")?;
    let nodes = link_local(&node, Outside::UPLINK)?;
    let index = outside.device("eth0")?["ifindex"].as_u64();
    let index = u32::try_from(index.context("no index")?)?;
    let server = SocketAddrV6::new(nodes, HOST_PORT, 0, index);
    link_local(&outside, "eth0")?;
    for client in Client::ALL {
        let meeting = outside
            .meet(client, server.into(), PATIENCE)
            .with_context(|| format!("{client:?}"))?;
        ensure!(meeting.server == "server");
        // The address would mean something else in the pod's network.
        ensure!(meeting.client.ip() == GATEWAYS[1], "{meeting:?}");
    }
    Ok(())
}

/// A device's link-local address, when it may be used.
fn link_local(namespace: &Namespace, device: &str) -> Result<Ipv6Addr> {
    let mut found = None;
    wait_for("link-local address", PATIENCE, || {
        found = namespace.device(device)?["addr_info"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|info| info["scope"] == "link" && info.get("tentative").is_none())
            .find_map(|info| info["local"].as_str()?.parse().ok());
        Ok(found.is_some())
    })?;
    found.context("no link-local address")
}

/// `0.0.0.0` and `::` stand for the node itself, whatever the socket then says to
/// be connected to.
#[test]
fn the_node_may_leave_out_the_address() -> Result<()> {
    let node = Node::new()?;
    let _server = Server::new(&network(&node), "server")?;
    for address in parsed(["0.0.0.0", "::"])? {
        let (any, server) = ((address, 0).into(), (address, HOST_PORT).into());
        let mut stream = node.tcp_connect_from(any, server, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut name = [0; 7];
        stream.read_exact(&mut name)?;
        ensure!(&name == b"server ");
        let socket = node.within(|| Ok(UdpSocket::bind(any)?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(b"who?", server)?;
        let mut answer = [0; 100];
        let length = socket.receive(&mut answer).context("over UDP")?;
        ensure!(Meeting::parse(&answer[..length], b"who?")?.server == "server");
    }
    Ok(())
}

/// A client that chose its own source address: one of the node's addresses that
/// can be routed from.
#[test]
fn the_node_may_choose_the_address_that_it_comes_from() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let _server = Server::new(&network(&node), "server")?;
    for (local, server) in NODE.into_iter().zip(NODE) {
        for client in Client::ALL {
            let meeting = node
                .meet_from(
                    client,
                    (local, 0).into(),
                    (server, HOST_PORT).into(),
                    PATIENCE,
                )
                .with_context(|| format!("{client:?} from {local} to {server}"))?;
            ensure!(meeting.client.ip() == local, "{meeting:?}");
        }
    }
    Ok(())
}

/// A documented limit: whoever binds itself to a loopback address cannot be led to a
/// pod, for nothing leaves the node from there. It is refused at once.
#[test]
fn whoever_is_bound_to_a_loopback_address_is_refused() -> Result<()> {
    let node = Node::new()?;
    let _server = Server::new(&network(&node), "server")?;
    for loopback in parsed(["127.0.0.1", "::1"])? {
        let start = Instant::now();
        let met = node.meet_from(
            Client::Tcp,
            (loopback, 0).into(),
            (loopback, HOST_PORT).into(),
            PATIENCE,
        );
        ensure!(met.is_err(), "from {loopback}: {met:?}");
        ensure!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
    }
    Ok(())
}

/// Hazard: a host port that is reachable from every pod by *its* localhost.
#[test]
fn a_pods_loopback_addresses_are_its_own() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    let neighbour = network.pod("neighbour")?;
    for loopback in parsed(["127.0.0.1", "::1"])? {
        for pod in [&*server, &neighbour] {
            meets_nobody(pod, loopback).with_context(|| pod.name().to_owned())?;
        }
        let _own = EchoServer::start_as(&neighbour, (loopback, HOST_PORT).into(), "own")?;
        meets(&neighbour, loopback, "own")?;
    }
    Ok(())
}

#[test]
fn the_same_port_of_other_addresses_is_not_captured() -> Result<()> {
    let node = Node::new()?;
    let surroundings = Surroundings::new(&node, Uplinks::Tc)?;
    let (outside, elsewhere) = (&surroundings.outside, &surroundings.elsewhere);
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    let neighbour = network.pod("neighbour")?;
    let second = network.pod("second")?;
    settle(&node);
    for (subnet, node) in ["203.0.113.0/24", "2001:db8:2::/64"].into_iter().zip(NODE) {
        outside.ip(&format!("route add {subnet} via {node}"))?;
    }
    elsewhere.ip(&format!(
        "route add default via {}\nroute add default via {}",
        OTHER_UPLINK[0], OTHER_UPLINK[1]
    ))?;
    // Servers behind the node, on the number that the node publishes.
    let far = parsed(ELSEWHERE)?;
    let _far: Vec<EchoServer> = far
        .into_iter()
        .map(|address| EchoServer::start_as(elsewhere, (address, HOST_PORT).into(), "far"))
        .collect::<Result<_>>()?;
    let _second = listen(&second, "second", HOST_PORT)?;
    let _outside: Vec<EchoServer> = [Outside::V4.into(), Outside::V6.into()]
        .into_iter()
        .map(|address: IpAddr| {
            EchoServer::start_as(outside, (address, HOST_PORT).into(), "outside")
        })
        .collect::<Result<_>>()?;

    let clients: [(&str, &Namespace); 4] = [
        ("outside", outside),
        ("node", &node),
        ("neighbour", &neighbour),
        ("server", &server),
    ];
    // Nobody has the first two, and the pod itself does not listen there.
    let nobodys = [parsed(["192.0.2.9", "2001:db8:9::9"])?, of(&server)?].concat();
    let captures_nothing = || -> Result<()> {
        let attempts: Vec<_> = clients
            .into_iter()
            .flat_map(|(who, client)| nobodys.iter().map(move |&to| (who, client, to)))
            .collect();
        all_meet_nobody(&attempts)?;
        for (who, client) in clients {
            for address in far {
                meets(client, address, "far").context(who)?;
            }
            for address in of(&second)? {
                meets(client, address, "second").context(who)?;
            }
        }
        for (who, client) in clients.into_iter().skip(1) {
            // The pods' addresses are not translated on their way out.
            for address in [Outside::V4.into(), Outside::V6.into()] {
                let address: IpAddr = address;
                meets(client, address, "outside").context(who)?;
            }
        }
        Ok(())
    };
    // With a default route to the outside, and without any.
    outside.ip(
        "route add 192.0.2.0/24 via 198.51.100.2\nroute add 2001:db8:9::/64 via 2001:db8:ffff::2",
    )?;
    captures_nothing()?;
    node.ip("route del default")?;
    node.run("ip -6 route del default")?;
    captures_nothing()?;
    for (who, client) in clients {
        for address in NODE {
            meets(client, address, "server").context(who)?;
        }
    }
    Ok(())
}

/// Datagrams to all, and those to a group, are the node's.
#[test]
fn broadcast_and_multicast_are_not_captured() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let _server = Server::new(&network(&node), "server")?;
    let wire = PacketSocket::open(&outside, "eth0")?;
    let source = MacAddr::of_device(&outside, "eth0")?;
    for (from, to) in [
        (Outside::V4.into(), "198.51.100.255"),
        (Outside::V4.into(), "255.255.255.255"),
        (Outside::V4.into(), "224.0.0.1"),
        (IpAddr::from(Outside::V6), "ff02::1"),
    ] {
        let (from, to) = (
            SocketAddr::new(from, 4000),
            SocketAddr::new(to.parse()?, HOST_PORT),
        );
        let client = outside.within(|| Ok(UdpSocket::bind(from)?))?;
        client.set_read_timeout(Some(SILENCE))?;
        let mac = match to.ip() {
            IpAddr::V6(group) => MacAddr::of_multicast(group),
            IpAddr::V4(group) if group.is_multicast() => MacAddr([1, 0, 0x5e, 0, 0, 1]),
            IpAddr::V4(_) => MacAddr::BROADCAST,
        };
        wire.send(&Frame::ip(
            mac,
            source,
            &Packet::udp(from, to, b"all").bytes(),
        ))?;
        let mut answer = [0; 100];
        let received = client.receive(&mut answer);
        ensure!(received.is_err(), "{to}: {received:?}");
    }
    Ok(())
}

/// Two original destinations that become one: the same client, from the same
/// port, asks for the same pod by two addresses and by two ports at once.
/// Hazard: two flows that are one 5-tuple once they are translated.
fn one_client_port_may_use_two_addresses_and_two_ports_at_once(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    node.ip(&format!(
        "addr add {}/24 dev uplink0\naddr add {}/64 dev uplink0 nodad",
        SECOND[0], SECOND[1]
    ))?;
    let network = network_by(&node, uplinks);
    let mut ports = crate::ports();
    for mut second in [crate::mapping("tcp", ""), crate::mapping("udp", "")] {
        second["hostPort"] = (HOST_PORT + 1).into();
        ports.as_array_mut().context("no array")?.push(second);
    }
    let server = Server::publishing(&network, "server", ports)?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    let here: &Namespace = &outside;
    for (who, from) in [("outside", here), ("neighbour", &neighbour)] {
        let addresses = NODE.into_iter().zip(parsed(SECOND)?).zip(of(&server)?);
        for ((first, second), own) in addresses {
            let servers = [
                // By its own address, without any translation.
                SocketAddr::new(own, POD_PORT),
                SocketAddr::new(first, HOST_PORT),
                SocketAddr::new(second, HOST_PORT),
                SocketAddr::new(first, HOST_PORT + 1),
                SocketAddr::new(second, HOST_PORT + 1),
            ];
            several_at_once(from, &servers).with_context(|| format!("{who} to {servers:?}"))?;
        }
    }
    Ok(())
}

fn several_at_once(from: &Namespace, servers: &[SocketAddr]) -> Result<()> {
    let any: IpAddr = match servers[0] {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => [0; 16].into(),
    };
    let local = SocketAddr::new(any, 4242);
    let streams = servers
        .iter()
        .map(|server| {
            let stream = from.tcp_connect_from(local, *server, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(BufReader::new(stream))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut seen = BTreeSet::new();
    for mut stream in streams {
        let mut greeting = String::new();
        stream.read_line(&mut greeting)?;
        // The pod can tell them apart.
        ensure!(seen.insert(greeting.clone()), "two are {greeting}");
        stream.get_mut().write_all(b"own\n")?;
        let mut echo = String::new();
        stream.read_line(&mut echo)?;
        ensure!(echo == "own\n", "{echo:?}");
    }

    let socket = from.within(|| Ok(UdpSocket::bind(local)?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    for round in 0..3_u8 {
        let mut waiting: Vec<(Vec<u8>, SocketAddr)> = Vec::new();
        for (index, server) in servers.iter().enumerate() {
            let message = vec![round, u8::try_from(index)?, 0xff];
            socket.send_to(&message, server)?;
            waiting.push((message, *server));
        }
        while !waiting.is_empty() {
            let mut answer = [0; 200];
            let (length, source) = socket
                .receive_from(&mut answer)
                .with_context(|| format!("waiting for {waiting:?}"))?;
            let answered = waiting
                .iter()
                .position(|(message, _)| answer[..length].ends_with(message))
                .context("an answer to nothing")?;
            let (_, server) = waiting.swap_remove(answered);
            ensure!(source == server, "{source} answered in place of {server}");
        }
    }
    Ok(())
}

/// A request that comes by one uplink is answered by the other, if the route is
/// there. Hazard: replies that are pinned to the device of the request.
fn requests_and_replies_may_take_different_uplinks(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    node.connect("uplink1", &outside, "eth1")?;
    node.ip("addr add 203.0.113.2/24 dev uplink1\n\
         addr add 2001:db8:2::2/64 dev uplink1 nodad")?;
    outside.ip("addr add 203.0.113.1/24 dev eth1\n\
         addr add 2001:db8:2::1/64 dev eth1 nodad\n\
         addr add 192.0.2.1/32 dev lo\n\
         addr add 2001:db8:9::1/128 dev lo nodad\n\
         route add 198.51.100.99/32 via 203.0.113.2 src 192.0.2.1\n\
         route add 2001:db8:99::1/128 via 2001:db8:2::2 src 2001:db8:9::1")?;
    // Comes by uplink1, and the way back is the default route by uplink0.
    node.ip("addr add 198.51.100.99/32 dev lo\naddr add 2001:db8:99::1/128 dev lo nodad")?;
    for device in ["all", "eth0", "eth1"] {
        outside.set_sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "0")?;
    }
    let _server = Server::new(&network_by(&node, uplinks), "server")?;
    let replies = PacketSocket::open(&outside, "eth0")?;
    for (address, client) in [
        ("198.51.100.99", "192.0.2.1"),
        ("2001:db8:99::1", "2001:db8:9::1"),
    ] {
        let (address, client): (IpAddr, IpAddr) = (address.parse()?, client.parse()?);
        for meeting in meets(&outside, address, "server")? {
            ensure!(meeting.client.ip() == client, "{meeting:?}");
        }
        let reply = replies.receive(PATIENCE, |frame| frame.ip_source() == Some(address))?;
        ensure!(reply.is_some(), "no reply on the other device");
    }
    Ok(())
}

/// The node's own connection from the number that is published is not the
/// pod's. Hazard: a host port within the range of ports that the node's
/// own connections, or masqueraded ones, come from.
fn replies_to_the_nodes_own_connections_are_not_captured(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let _server = Server::new(&network_by(&node, uplinks), "server")?;
    for (local, server) in [
        (IpAddr::from(Outside::NODE_V4), IpAddr::from(Outside::V4)),
        (Outside::NODE_V6.into(), Outside::V6.into()),
    ] {
        let server = EchoServer::start_as(&outside, (server, POD_PORT).into(), "outside")?;
        for client in Client::ALL {
            let meeting = node
                .meet_from(
                    client,
                    (local, HOST_PORT).into(),
                    server.address(),
                    PATIENCE,
                )
                .with_context(|| format!("{client:?} from {local}"))?;
            ensure!(meeting.server == "outside", "{meeting:?}");
        }
        meets(&outside, local, "server")?;
    }
    Ok(())
}
