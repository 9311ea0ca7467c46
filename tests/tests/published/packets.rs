//! What happens to packets on their way: size, fragments, options, errors,
//! checksums, ends of connections.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_bridge_tests::{
    EchoServer, Far, Frame, MacAddr, Meeting, Namespace, Network, Node, Offload, Outside, Packet,
    PacketSocket, Pod, Receive as _, ReceiveFrom as _, Tunnel, wait_for,
};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;

use crate::{
    GATEWAYS, HOST_PORT, NODE, PATIENCE, POD_PORT, Server, Uplinks, is, network, network_by, ports,
    settle, with_and_without_xdp,
};

/// A pod that publishes [`ports`] and sends back what it gets.
fn echo(network: &Network) -> Result<(Pod, Vec<EchoServer>)> {
    let pod = network.pod_with_ports("echo", ports())?;
    settle(network.node());
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

fn any_like(other: SocketAddr) -> SocketAddr {
    match other {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0; 16], 0).into(),
    }
}

const LOOPBACKS: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
    IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
];

with_and_without_xdp! {
    a_smaller_link_on_the_way_is_found
    an_uplink_smaller_than_the_pods_devices_is_found
    a_complaint_with_a_short_quotation_reaches_the_pod
    datagrams_larger_than_the_mtu_arrive_whole
    packets_that_no_kernel_would_send_arrive
    connections_end_as_their_ends_want_it
    large_transfers_are_intact_both_ways
    checksums_are_right_without_offloads
    a_flood_of_flows_breaks_no_connection
}

/// The client's own link is large, so the pod learns of the smaller one from the
/// router's complaints, which must find their way to it.
fn a_smaller_link_on_the_way_is_found(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let far = Far::new(&node, &outside, 1280)?;
    let network = network_by(&node, uplinks);
    let (pod, _servers) = echo(&network)?;
    for (address, client) in NODE.into_iter().zip(Far::CLIENT) {
        far.client
            .tcp_transfer(published(address), 1 << 20)
            .with_context(|| format!("from {client}"))?;
        let route = pod.run(&format!("ip route get {client}"))?;
        ensure!(route.contains("mtu 1280"), "the pod was not told: {route}");
        // It is told of what its datagrams are too large for, and cuts them.
        far.client
            .udp_echo(published(address), &[7; 1400], PATIENCE)
            .with_context(|| format!("from {client} over UDP"))?;
    }
    Ok(())
}

/// The node's own uplink is smaller than the pods' devices: nobody but us can
/// complain, and the node must not send what the link cannot take.
fn an_uplink_smaller_than_the_pods_devices_is_found(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    node.ip("link set uplink0 mtu 1280")?;
    outside.ip("link set eth0 mtu 1280")?;
    let far = Far::new(&node, &outside, 1500)?;
    let network = network_by(&node, uplinks);
    let (pod, _servers) = echo(&network)?;
    ensure!(pod.device("eth0")?["mtu"] == 1500);
    for (address, client) in NODE.into_iter().zip(Far::CLIENT) {
        far.client
            .tcp_transfer(published(address), 1 << 20)
            .with_context(|| format!("from {client}"))?;
        far.client
            .udp_echo(published(address), &[7; 4000], PATIENCE)
            .with_context(|| format!("from {client} over UDP"))?;
    }
    Ok(())
}

/// A complaint that quotes no more than the specification demands. Hazard: short
/// inner headers in ICMP errors, and their checksums.
fn a_complaint_with_a_short_quotation_reaches_the_pod(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let network = network_by(&node, uplinks);
    let (pod, _servers) = echo(&network)?;
    let wire = PacketSocket::open(&outside, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&outside, "eth0")?,
        MacAddr::of_device(&node, "uplink0")?,
    );
    for (node, client) in NODE
        .into_iter()
        .zip([IpAddr::from(Outside::V4), Outside::V6.into()])
    {
        let client = SocketAddr::new(client, 4001);
        let socket = outside.within(|| Ok(UdpSocket::bind(client)?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(b"?", published(node))?;
        socket.receive(&mut [0; 10])?;
        let answer = Packet::udp(published(node), client, &[7; 1400]);
        let complaint = Packet::too_big(client.ip(), &answer, 1300);
        wire.send(&Frame::ip(to, from, &complaint.bytes()))?;
        wait_for("news of a smaller path", PATIENCE, || {
            let route = pod.run(&format!("ip route get {}", client.ip()))?;
            Ok(route.contains("mtu 1300"))
        })?;
    }
    Ok(())
}

/// Nobody listens in the pod: its ICMP error reaches the client as one of whom
/// it asked.
#[test]
fn a_closed_port_of_the_pod_is_a_refusal() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let pod = network.pod_with_ports("server", ports())?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    let here: &Namespace = &outside;
    for (who, client, addresses) in [
        ("outside", here, NODE),
        ("a pod", &neighbour, NODE),
        ("a pod, by the gateway", &neighbour, GATEWAYS),
        ("the pod itself", &pod, NODE),
        ("the node", &node, NODE),
        ("the node, to itself", &node, LOOPBACKS),
    ] {
        for address in addresses {
            for error in [
                client
                    .udp_echo(published(address), b"anyone?", PATIENCE)
                    .map(drop),
                client.tcp_echo(published(address), b"anyone?", PATIENCE),
            ] {
                let error = error.err().context("an answer of nobody")?;
                ensure!(
                    is(&error, ErrorKind::ConnectionRefused),
                    "{who} to {address}: {error:#}"
                );
            }
        }
    }
    Ok(())
}

fn datagrams_larger_than_the_mtu_arrive_whole(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let network = network_by(&node, uplinks);
    let (pod, _servers) = echo(&network)?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    let here: &Namespace = &outside;
    for (who, client, addresses) in [
        ("outside", here, NODE),
        ("a pod", &neighbour, NODE),
        ("the pod itself", &pod, NODE),
        ("the node", &node, LOOPBACKS),
    ] {
        for address in addresses {
            for size in [1472, 1473, 4000, 20_000, 60_000] {
                let payload: Vec<u8> = (0..=255).cycle().take(size).collect();
                client
                    .udp_echo(published(address), &payload, PATIENCE)
                    .with_context(|| format!("{size} bytes, {who} to {address}"))?;
            }
        }
    }
    Ok(())
}

/// Options, extension headers, and fragments in any order. Hazards: fragments that
/// come before the first, identifications of before, extension headers and
/// fragments of IPv6.
fn packets_that_no_kernel_would_send_arrive(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let network = network_by(&node, uplinks);
    let _server = Server::new(&network, "server")?;
    let wire = PacketSocket::open(&outside, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&outside, "eth0")?,
        MacAddr::of_device(&node, "uplink0")?,
    );
    for (node, client) in NODE
        .into_iter()
        .zip([IpAddr::from(Outside::V4), Outside::V6.into()])
    {
        let client = SocketAddr::new(client, 4000);
        let socket = outside.within(|| Ok(UdpSocket::bind(client)?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let server = published(node);
        let payload: Vec<u8> = (0..=255).cycle().take(3000).collect();
        let short = || Packet::udp(client, server, &payload[..500]);
        let long = || Packet::udp(client, server, &payload);
        let mut identification = 0;
        let mut ordered = |packet: Packet, order: [usize; 3]| -> Vec<Vec<u8>> {
            identification += 1;
            let fragments = packet.fragments(identification, 1104);
            order.into_iter().map(|at| fragments[at].clone()).collect()
        };
        let mut table = vec![
            ("plain", vec![short().bytes()], 500),
            ("options", vec![short().with_options().bytes()], 500),
            (
                "hop-by-hop options",
                vec![short().with_hop_by_hop_options().bytes()],
                500,
            ),
            (
                "one fragment that is all",
                short().fragments(101, 1104),
                500,
            ),
            ("small fragments", long().fragments(102, 64), 3000),
            (
                "the same identification again",
                long().fragments(102, 1104),
                3000,
            ),
        ];
        for order in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ] {
            table.push(("fragments", ordered(long(), order), 3000));
            table.push((
                "fragments with options",
                ordered(long().with_options(), order),
                3000,
            ));
        }
        for (what, packets, length) in table {
            for packet in &packets {
                wire.send(&Frame::ip(to, from, packet))?;
            }
            let order: Vec<usize> = packets.iter().map(Vec::len).collect();
            let mut answer = vec![0; 4000];
            let (received, source) = socket
                .receive_from(&mut answer)
                .with_context(|| format!("{what} of {order:?} bytes to {server}"))?;
            ensure!(source == server, "{what}: {source} answered");
            let met = Meeting::parse(&answer[..received], &payload[..length])
                .with_context(|| format!("{what} to {server}"))?;
            ensure!(met.client == client, "{what}: {met:?}");
        }
    }
    Ok(())
}

/// Serves one connection.
fn serve_one(
    listener: &TcpListener,
    work: impl FnOnce(TcpStream) -> Result<()> + Send + 'static,
) -> Result<thread::JoinHandle<Result<()>>> {
    let listener = listener.try_clone()?;
    Ok(thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        work(stream)
    }))
}

fn join(server: thread::JoinHandle<Result<()>>) -> Result<()> {
    server.join().map_err(|_| anyhow!("the server panicked"))?
}

fn is_reset(result: io::Result<usize>) -> Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => Err(anyhow!("not a reset but {other:?}")),
    }
}

/// With a connection that ends, or half of it, by either side and in either way.
fn connections_end_as_their_ends_want_it(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let network = network_by(&node, uplinks);
    let pod = network.pod_with_ports("server", ports())?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    let wire = PacketSocket::open(&outside, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&outside, "eth0")?,
        MacAddr::of_device(&node, "uplink0")?,
    );
    let listeners = pod.within(|| {
        let addresses = [IpAddr::from(pod.v4()?), pod.v6()?.into()];
        let listeners = addresses.map(|address| TcpListener::bind((address, POD_PORT)));
        Ok(listeners.into_iter().collect::<io::Result<Vec<_>>>()?)
    })?;
    let here: &Namespace = &outside;
    for (who, client, addresses) in [
        ("outside", here, NODE),
        ("a pod", &neighbour, NODE),
        ("the pod itself", &pod, NODE),
        ("the node", &node, LOOPBACKS),
    ] {
        for (address, listener) in addresses.into_iter().zip(&listeners) {
            let server = published(address);
            let context = || format!("{who} to {server}");
            let connect = || -> Result<TcpStream> {
                let stream = client.tcp_connect_from(any_like(server), server, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok(stream)
            };
            let mut all = Vec::new();

            // The client has nothing more to say, and the server answers then.
            let task = serve_one(listener, |mut stream| {
                let mut question = Vec::new();
                stream.read_to_end(&mut question)?;
                thread::sleep(std::time::Duration::from_millis(20));
                Ok(stream.write_all(&question.repeat(1000))?)
            })?;
            let mut stream = connect().with_context(context)?;
            stream.write_all(b"half")?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_to_end(&mut all).with_context(context)?;
            ensure!(all == b"half".repeat(1000), "{}", context());
            join(task).with_context(context)?;

            // The server has nothing to say, and listens.
            let task = serve_one(listener, |mut stream| {
                stream.shutdown(Shutdown::Write)?;
                let mut all = Vec::new();
                stream.read_to_end(&mut all)?;
                ensure!(all == b"half".repeat(1000));
                Ok(())
            })?;
            let mut stream = connect().with_context(context)?;
            ensure!(stream.receive(&mut [0; 1])? == 0);
            stream.write_all(&b"half".repeat(1000))?;
            drop(stream);
            join(task).with_context(context)?;

            // Either resets.
            let task = serve_one(listener, |mut stream| is_reset(stream.read(&mut [0; 1])))?;
            let stream = connect().with_context(context)?;
            reset_when_dropped(&stream)?;
            drop(stream);
            join(task).with_context(context)?;
            let task = serve_one(listener, |stream| reset_when_dropped(&stream))?;
            let stream = connect().with_context(context)?;
            is_reset(stream.receive(&mut [0; 1])).with_context(context)?;
            join(task)?;

            // A reset that neither sent. Hazard: spurious resets that change what
            // is remembered of a connection.
            if who == "outside" {
                let task = serve_one(listener, |mut stream| {
                    let mut byte = [0];
                    while stream.read(&mut byte)? == 1 {
                        stream.write_all(&byte)?;
                    }
                    Ok(())
                })?;
                let mut stream = connect()?;
                let mut byte = [0];
                for round in 0..5 {
                    let reset = Packet::tcp_reset(stream.local_addr()?, server, round << 29);
                    wire.send(&Frame::ip(to, from, &reset.bytes()))?;
                    stream.write_all(&[7])?;
                    stream.read_exact(&mut byte).with_context(context)?;
                }
                drop(stream);
                join(task)?;
            }
        }
    }
    Ok(())
}

fn reset_when_dropped(stream: &TcpStream) -> Result<()> {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    Ok(setsockopt(stream, sockopt::Linger, &linger)?)
}

/// The same port again and again: connections that end in every way, one after
/// the other.
#[test]
fn a_client_may_use_the_same_port_again() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let (pod, _servers) = echo(&network)?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    let here: &Namespace = &outside;
    for (who, client, addresses) in [
        ("outside", here, NODE),
        ("a pod", &neighbour, NODE),
        ("the pod itself", &pod, NODE),
        ("the node", &node, NODE),
    ] {
        for server in addresses.map(published) {
            let mut local = any_like(server);
            local.set_port(4242);
            for round in 0..20_u8 {
                let context = || format!("round {round}, {who} to {server}");
                let mut stream = None;
                wait_for("closed socket", PATIENCE, || {
                    // Until it is executed, what another test starts has a copy.
                    let connected = client.tcp_connect_from(local, server, PATIENCE);
                    stream = match connected {
                        Err(error) if is(&error, ErrorKind::AddrNotAvailable) => None,
                        other => Some(other.with_context(context)?),
                    };
                    Ok(stream.is_some())
                })?;
                let mut stream = stream.context("no connection")?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.write_all(&[round])?;
                let mut echo = [0];
                stream.read_exact(&mut echo).with_context(context)?;
                ensure!(echo == [round]);
                // Or the kernel would keep the port for a minute.
                reset_when_dropped(&stream)?;
            }
        }
    }
    Ok(())
}

/// With large packets as the kernel hands them from device to device, and with
/// checksums that are not there yet.
fn large_transfers_are_intact_both_ways(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let network = network_by(&node, uplinks);
    let (pod, _servers) = echo(&network)?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    for (namespace, device) in [(&**pod, "eth0"), (&*node, "uplink0"), (&*outside, "eth0")] {
        for offload in [Offload::TxChecksum, Offload::TcpSegmentation] {
            // In front of XDP nothing large is sent, nor anything unfinished.
            ensure!(
                namespace.offload(device, offload)? || uplinks == Uplinks::Xdp,
                "{offload:?} of {device}"
            );
        }
    }
    let here: &Namespace = &outside;
    for (who, client, addresses) in [
        ("outside", here, NODE),
        ("a pod", &neighbour, NODE),
        ("the pod itself", &pod, NODE),
        ("the node", &node, LOOPBACKS),
    ] {
        for address in addresses {
            client
                .tcp_transfer(published(address), 20_000_000)
                .with_context(|| format!("{who} to {address}"))?;
        }
    }
    Ok(())
}

/// With checksums and segments that the sender makes itself.
fn checksums_are_right_without_offloads(uplinks: Uplinks) -> Result<()> {
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let network = network_by(&node, uplinks);
    let (pod, _servers) = echo(&network)?;
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    let here: &Namespace = &outside;
    let devices: [(&Namespace, &str); 3] = [(here, "eth0"), (&pod, "eth0"), (&neighbour, "eth0")];
    // Those of each alone, and of all.
    for off in [&devices[..1], &devices[1..2], &devices[..]] {
        for (namespace, device) in off {
            for offload in [Offload::TxChecksum, Offload::GenericSegmentation] {
                namespace.set_offload(device, offload, false)?;
            }
        }
        for (who, client) in [
            ("outside", here),
            ("a pod", &neighbour),
            ("the pod itself", &pod),
        ] {
            for address in NODE {
                let context = || format!("{who} to {address}, {} without", off.len());
                client
                    .tcp_transfer(published(address), 1_000_000)
                    .with_context(context)?;
                for size in [1, 2, 1000, 1473, 4000] {
                    client
                        .udp_echo(published(address), &vec![0xa5; size], PATIENCE)
                        .with_context(context)?;
                }
            }
        }
        for (namespace, device) in off {
            for offload in [Offload::TxChecksum, Offload::GenericSegmentation] {
                namespace.set_offload(device, offload, true)?;
            }
        }
    }
    Ok(())
}

/// As WireGuard's and others: packets without Ethernet headers.
#[test]
fn an_uplink_may_have_no_ethernet_headers() -> Result<()> {
    let node = Node::new()?;
    let tunnel = Tunnel::new(&node, "tun0")?;
    node.ip("addr add 203.0.113.2/24 dev tun0\naddr add 2001:db8:2::2/64 dev tun0 nodad")?;
    let network = network(&node);
    let _server = Server::new(&network, "server")?;
    for (client, address) in [
        ("203.0.113.1", "203.0.113.2"),
        ("2001:db8:2::1", "2001:db8:2::2"),
    ] {
        let client = SocketAddr::new(client.parse()?, 4000);
        let server = published(address.parse()?);
        let request = Packet::udp(client, server, b"who is there?");
        tunnel.send(&request.bytes())?;
        let answer = format!("server {client}\nwho is there?");
        let answer = answer.as_bytes();
        let reply = tunnel
            .receive(PATIENCE, |packet| {
                packet.windows(answer.len()).any(|window| window == answer)
            })?
            .with_context(|| format!("{client} heard nothing"))?;
        // Byte by byte what one would send who has the node's address.
        let mut expected = Packet::udp(server, client, answer).bytes();
        let fields = if client.is_ipv4() { 1..12 } else { 1..8 };
        expected[fields.clone()].copy_from_slice(&reply[fields]);
        ensure!(reply == expected, "{reply:x?}\n{expected:x?}");
    }
    Ok(())
}

/// More flows than are remembered. Hazards: an entry that is forgotten while its
/// connection lives, and one that is forgotten as soon as it is made.
fn a_flood_of_flows_breaks_no_connection(uplinks: Uplinks) -> Result<()> {
    /// As many as the table has places, and some more.
    const FLOWS: u32 = 140_000;
    let node = Node::new()?;
    let outside = uplinks.outside(&node)?;
    let network = network_by(&node, uplinks);
    let mut ports = ports();
    let closed = json!({"hostPort": 9999, "containerPort": 9999, "protocol": "udp"});
    ports.as_array_mut().context("no array")?.push(closed);
    let pod = network.pod_with_ports("echo", ports)?;
    let address = IpAddr::from(pod.v4()?);
    let _server = EchoServer::start_on(&pod, (address, POD_PORT).into())?;
    let server = published(NODE[0]);
    let connect = || -> Result<TcpStream> {
        let stream = outside.tcp_connect_from(any_like(server), server, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    let says = |mut stream: &TcpStream| -> Result<()> {
        stream.write_all(b"still there?")?;
        let mut echo = [0; 12];
        stream.read_exact(&mut echo)?;
        ensure!(&echo == b"still there?");
        Ok(())
    };
    let (idle, busy) = (connect()?, connect()?);
    says(&idle)?;
    let wire = PacketSocket::open(&outside, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&outside, "eth0")?,
        MacAddr::of_device(&node, "uplink0")?,
    );
    for number in 0..FLOWS {
        // Addresses for tests of this kind (RFC 2544).
        let [_, a, b, c] = number.to_be_bytes();
        let client = SocketAddr::from(([198, 18 + (a & 1), b, c], 1024 + u16::from(a)));
        let datagram = Packet::udp(client, (NODE[0], 9999).into(), &[]);
        wire.send(&Frame::ip(to, from, &datagram.bytes()))?;
        if number % 10_000 == 0 {
            says(&busy).with_context(|| format!("after {number} others"))?;
        }
    }
    says(&busy).context("the busy one")?;
    says(&idle).context("the idle one")?;
    says(&connect()?).context("a new one")
}
