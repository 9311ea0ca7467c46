//! More flows than the tables have room for: what is forgotten comes back, and what was
//! there before the storm is there after it.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::{Namespace, Node, Outside, Pod, Receive as _, ReceiveFrom as _};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::network;

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many flows the tables have room for.
const LIMIT: u32 = 1024;
/// How many each of two pods has.
const FLOWS: u16 = 800;

/// A node where one pod may have all of the tables, so that it is the kernel that forgets.
fn node() -> Result<Node> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most.min(1 << 16), most)?;
    let node = Node::new()?;
    let limits = json!({"flows": LIMIT, "peers": LIMIT});
    let settings = json!({"limits": limits, "podLimits": {"flows": LIMIT}});
    node.set_settings(&settings.to_string())?;
    Ok(node)
}

/// Both ends of a connection.
struct Connection {
    near: TcpStream,
    far: TcpStream,
}

impl Connection {
    fn new(
        client: &Namespace,
        port: u16,
        server: SocketAddr,
        listener: &TcpListener,
    ) -> Result<Self> {
        let from = (Ipv4Addr::UNSPECIFIED, port).into();
        let near = client.tcp_connect_from(from, server, PATIENCE)?;
        let (far, _) = listener.accept().context("nobody came")?;
        for end in [&near, &far] {
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_nodelay(true)?;
        }
        Ok(Self { near, far })
    }

    /// A byte there and one back.
    fn exchange(&mut self) -> Result<()> {
        let mut byte = [0];
        self.near.write_all(b"?")?;
        self.far.read_exact(&mut byte).context("there")?;
        self.far.write_all(b"!")?;
        self.near.read_exact(&mut byte).context("back")
    }
}

/// Each speaks again after all others have: more than once, since what brings one back
/// has another one forgotten.
fn all_go_on(connections: &mut [Connection]) -> Result<()> {
    for round in 0..3 {
        for (number, connection) in connections.iter_mut().enumerate() {
            connection
                .exchange()
                .with_context(|| format!("connection {number}, round {round}"))?;
        }
    }
    Ok(())
}

fn listener(namespace: &Namespace, address: SocketAddr) -> Result<TcpListener> {
    namespace.within(|| Ok(TcpListener::bind(address)?))
}

#[test]
fn connections_to_outside() -> Result<()> {
    let node = node()?;
    let outside = node.outside()?;
    let network = network(&node, &json!({"ipMasq": true}));
    let pods = [network.pod("a")?, network.pod("b")?];
    let server = (Outside::V4, 7).into();
    let listener = listener(&outside, server)?;
    let mut connections = Vec::new();
    // Two pods with one port to one remote are told apart by another port, and which of them
    // has it is forgotten too.
    for (pod, first) in pods.iter().zip([20_000, 30_000]) {
        for number in 0..FLOWS {
            let connection = Connection::new(pod, first + number, server, &listener);
            connections.push(connection.with_context(|| format!("connection {number}"))?);
        }
    }
    all_go_on(&mut connections)
}

#[test]
fn connections_to_published_ports() -> Result<()> {
    let node = node()?;
    let outside = node.outside()?;
    let network = network(&node, &json!({}));
    let mut connections = Vec::new();
    let mut pods = Vec::new();
    for (name, port) in [("a", 8080), ("b", 9090)] {
        let ports = json!([{"hostPort": port, "containerPort": 80, "protocol": "tcp"}]);
        let pod = network.pod_with_ports(name, ports)?;
        let listener = listener(&pod, (pod.v4()?, 80).into())?;
        let server = (Outside::NODE_V4, port).into();
        for number in 0..FLOWS {
            let connection = Connection::new(&outside, 0, server, &listener);
            connections.push(connection.with_context(|| format!("connection {number}"))?);
        }
        pods.push(pod);
    }
    all_go_on(&mut connections)
}

/// The first of many has not spoken since; a table that has had room since forgets nothing.
#[test]
fn datagrams_to_outside() -> Result<()> {
    let node = node()?;
    let outside = node.outside()?;
    let network = network(&node, &json!({"ipMasq": true}));
    let pods = [network.pod("a")?, network.pod("b")?];
    let remote = outside.within(|| Ok(UdpSocket::bind((Outside::V4, 7))?))?;
    remote.set_read_timeout(Some(PATIENCE))?;
    let open = |pod: &Pod| -> Result<UdpSocket> {
        let own = pod.v4()?;
        let socket = pod.within(|| Ok(UdpSocket::bind((own, 0))?))?;
        socket.connect(remote.local_addr()?)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    };
    let exchange = |socket: &UdpSocket, what: &str| -> Result<SocketAddr> {
        socket.send(b"?")?;
        let (_, seen) = remote
            .receive_from(&mut [0; 8])
            .with_context(|| format!("{what}: there"))?;
        remote.send_to(b"!", seen)?;
        socket
            .receive(&mut [0; 8])
            .with_context(|| format!("{what}: back"))?;
        Ok(seen)
    };
    let mut sockets = Vec::new();
    for pod in &pods {
        for _ in 0..FLOWS {
            sockets.push(open(pod)?);
        }
    }
    for round in 0..3 {
        for (number, socket) in sockets.iter().enumerate() {
            exchange(socket, &format!("socket {number}, round {round}"))?;
        }
    }
    // After the storm.
    for (number, socket) in sockets.iter().take(100).enumerate() {
        let seen = exchange(socket, &format!("socket {number}, after"))?;
        remote.send_to(b"first", seen)?;
        socket
            .receive(&mut [0; 8])
            .with_context(|| format!("the remote speaks first to {number}"))?;
    }
    Ok(())
}

/// The node's own sockets, each of which asks without a connection and must see the answer
/// come from where it has asked.
#[test]
fn datagrams_of_the_node() -> Result<()> {
    let node = node()?;
    let network = network(&node, &json!({}));
    let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}]);
    let pod = network.pod_with_ports("pod", ports)?;
    let own = pod.v4()?;
    let server = pod.within(|| Ok(UdpSocket::bind((own, 80))?))?;
    server.set_read_timeout(Some(PATIENCE))?;
    let address: SocketAddr = (Ipv4Addr::LOCALHOST, 8080).into();
    let mut sockets = Vec::new();
    for _ in 0..2 * FLOWS {
        let socket = node.within(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        sockets.push(socket);
    }
    for round in 0..2 {
        for (number, socket) in sockets.iter().enumerate() {
            let what = || format!("socket {number}, round {round}");
            socket.send_to(b"?", address).with_context(what)?;
            let (_, client) = server.receive_from(&mut [0; 8]).with_context(what)?;
            server.send_to(b"!", client).with_context(what)?;
            let (_, from) = socket.receive_from(&mut [0; 8]).with_context(what)?;
            anyhow::ensure!(from == address, "{}: from {from}", what());
        }
    }
    Ok(())
}
