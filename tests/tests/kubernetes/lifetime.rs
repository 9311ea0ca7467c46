//! What lasts: connections that are idle, flows that are forgotten, and pods that are
//! replaced.

use std::{
    net::{SocketAddr, TcpListener, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Meeting, Namespace, Network, Node, Pod, ReceiveFrom as _};
use serde_json::json;

use crate::{
    CLUSTER_IPS, Connection, FAMILIES, NODE, OUTSIDE, PATIENCE, POD_PORT, SERVICE_PORT, Server,
    Setting, addresses, cluster_ips, evict, in_settings, listen, meets_as,
    proxy::{ExternalTrafficPolicy::Local, Service},
    settle, unspecified_like,
};

in_settings!(iptables(Iptables, true, true):
    connections_outlast_idleness_and_eviction
    an_endpoint_may_be_replaced
    a_client_may_be_replaced
    other_calls_of_the_plugin_disturb_nobody
);
in_settings!(nftables(Nftables, false, true):
    connections_outlast_idleness_and_eviction
    an_endpoint_may_be_replaced
    a_client_may_be_replaced
);

/// The port of the node that leads to the service, as whoever asks.
const NODE_PORT: u16 = 30_080;
/// Longer than a flow is taken for fresh.
const IDLE: Duration = Duration::from_millis(700);

/// The client that is masqueraded.
const TO_OUTSIDE: &str = "a pod to outside";

/// A client's UDP socket and the pod's, in the test's hands.
struct Datagrams {
    client: UdpSocket,
    server: UdpSocket,
    /// Whom the client asks.
    to: SocketAddr,
    /// Whom the server answers.
    from: SocketAddr,
}

impl Datagrams {
    fn open(from: &Namespace, to: SocketAddr, server: &UdpSocket) -> Result<Self> {
        let client = from.within(|| Ok(UdpSocket::bind((unspecified_like(to), 0))?))?;
        client.set_read_timeout(Some(PATIENCE))?;
        let server = server.try_clone()?;
        server.set_read_timeout(Some(PATIENCE))?;
        client.send_to(b"hello", to)?;
        let (_, from) = server
            .receive_from(&mut [0; 10])
            .context("the first datagram")?;
        Ok(Self {
            client,
            server,
            to,
            from,
        })
    }

    fn ask(&self) -> Result<()> {
        self.client.send_to(b"ask", self.to)?;
        let (_, from) = self
            .server
            .receive_from(&mut [0; 10])
            .context("asking over UDP")?;
        ensure!(from == self.from, "{from} asks in place of {}", self.from);
        Ok(())
    }

    fn answer(&self) -> Result<()> {
        self.server.send_to(b"answer", self.from)?;
        let (_, from) = self
            .client
            .receive_from(&mut [0; 10])
            .context("answering over UDP")?;
        ensure!(from == self.to, "{from} answers in place of {}", self.to);
        Ok(())
    }
}

/// What a server listens on.
struct Sockets {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Sockets {
    fn bind(at: &Namespace, on: SocketAddr) -> Result<Self> {
        at.within(|| {
            Ok(Self {
                tcp: TcpListener::bind(on)?,
                udp: UdpSocket::bind(on)?,
            })
        })
    }
}

/// Either end may be the first to speak after a while, whatever the programs have
/// forgotten meanwhile.
fn connections_outlast_idleness_and_eviction(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    let network = setting.network(&node);
    let server = Server::new(&network, "server")?;
    let client = network.pod("client")?;
    let live = addresses(&server)?.map(|address| SocketAddr::new(address, 8081));
    let live = Service::new("live", CLUSTER_IPS, SERVICE_PORT, live).node_port(NODE_PORT, Local);
    let api = OUTSIDE.map(|address| SocketAddr::new(address, 6443));
    let api = Service::new("api", cluster_ips(20), 443, api);
    setting.serve(&node, &[live, api])?;
    let mut connections = Vec::new();
    let mut datagrams = Vec::new();
    for family in FAMILIES {
        let pod = SocketAddr::new(addresses(&server)?[family], 8081);
        let api = SocketAddr::new(OUTSIDE[family], 6443);
        let service = SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT);
        let here = Sockets::bind(&server, pod)?;
        let there = Sockets::bind(&outside, api)?;
        let node_port = SocketAddr::new(NODE[family], NODE_PORT);
        let outer = SocketAddr::new(cluster_ips(20)[family], 443);
        let everybody: [(&str, &Namespace, SocketAddr, &Sockets); 7] = [
            ("a pod", &client, service, &here),
            ("a pod, directly", &client, pod, &here),
            ("the pod itself", &server, service, &here),
            ("the node", &node, service, &here),
            ("outside", &outside, node_port, &here),
            ("outside, by the pod's address", &outside, pod, &here),
            (TO_OUTSIDE, &client, outer, &there),
        ];
        for (who, from, to, at) in everybody {
            connections.push((who, Connection::open(from, 0, to, &at.tcp).context(who)?));
            datagrams.push((who, Datagrams::open(from, to, &at.udp).context(who)?));
        }
    }
    let mut check = |what: &str, server_first: bool| -> Result<()> {
        let mut failed = Vec::new();
        for (who, connection) in &mut connections {
            // Without this map nobody knows whose the node's port is: the pod must speak.
            let masqueraded = setting.masquerade && *who == TO_OUTSIDE;
            let server_first = server_first && !(masqueraded && what == "without REPLIES");
            let spoken = if server_first {
                connection.answer().and_then(|()| connection.ask())
            } else {
                connection.ask().and_then(|()| connection.answer())
            };
            failed.extend(
                spoken
                    .err()
                    .map(|error| format!("{who}, over TCP: {error:#}")),
            );
        }
        for (who, datagrams) in &datagrams {
            let masqueraded = setting.masquerade && *who == TO_OUTSIDE;
            let server_first = server_first && !(masqueraded && what == "without REPLIES");
            let spoken = if server_first {
                datagrams.answer().and_then(|()| datagrams.ask())
            } else {
                datagrams.ask().and_then(|()| datagrams.answer())
            };
            failed.extend(
                spoken
                    .err()
                    .map(|error| format!("{who}, over UDP: {error:#}")),
            );
        }
        ensure!(
            failed.is_empty(),
            "{what}, the server first: {server_first}: {failed:#?}"
        );
        Ok(())
    };
    check("at first", true)?;
    for server_first in [true, false] {
        thread::sleep(IDLE);
        check("after a while", server_first)?;
        if node.plugin() == "bridge" {
            continue;
        }
        for map in ["FLOWS", "REPLIES"] {
            let entries = evict(&node, map)?;
            ensure!(entries > 0, "{map} was empty");
            check(&format!("without {map}"), server_first)?;
        }
    }
    Ok(())
}

/// A network whose pods may ask for addresses.
fn network_of_known(setting: Setting, node: &Node) -> Network<'_> {
    let mut config = setting.config(node);
    config["capabilities"] = json!({"ips": true});
    Network::new(node, config)
}

fn pod_at(network: &Network<'_>, name: &str, host: u8) -> Result<Pod> {
    let sandbox = network.node().sandbox(name)?;
    let addresses = json!([format!("10.77.0.{host}"), format!("fd77::{host:x}")]);
    let attachment = sandbox.attachment().capability("ips", addresses);
    let pod = network.pod_with(sandbox, attachment)?;
    settle(&pod)?;
    Ok(pod)
}

/// Nothing of the former pod is left to mislead those who go on asking, from the same
/// port, by the service and directly.
fn an_endpoint_may_be_replaced(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    let network = network_of_known(setting, &node);
    let client = network.pod("client")?;
    let first = Server::of(pod_at(&network, "first", 99)?, "first")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, first.endpoints()?);
    setting.serve(&node, &[web.node_port(NODE_PORT, Local)])?;
    let mut sockets = Vec::new();
    for family in FAMILIES {
        let service = SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT);
        let direct = SocketAddr::new(addresses(&first)?[family], POD_PORT);
        let by_node = SocketAddr::new(NODE[family], NODE_PORT);
        let clients: [(&Namespace, SocketAddr); 4] = [
            (&client, service),
            (&client, direct),
            (&node, service),
            (&outside, by_node),
        ];
        for (from, to) in clients {
            let socket = from.within(|| Ok(UdpSocket::bind((unspecified_like(to), 0))?))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            sockets.push((socket, to));
        }
        // And one for both.
        let socket = client.within(|| Ok(UdpSocket::bind((unspecified_like(direct), 0))?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        sockets.push((socket.try_clone()?, service));
        sockets.push((socket, direct));
    }
    let all_meet = |name: &str| -> Result<()> {
        for (socket, server) in &sockets {
            let met = ask(socket, *server).with_context(|| format!("{server} by UDP"))?;
            ensure!(met.server == name, "{server}: {met:?}");
        }
        for family in FAMILIES {
            let own = addresses(&client)?[family];
            meets_as(
                &client,
                (CLUSTER_IPS[family], SERVICE_PORT).into(),
                name,
                own,
            )?;
            let by_node = (NODE[family], NODE_PORT).into();
            meets_as(&outside, by_node, name, OUTSIDE[family])?;
        }
        Ok(())
    };
    all_meet("first")?;
    network.del(first.attachment())?;
    drop(first);
    let _second = Server::of(pod_at(&network, "second", 99)?, "second")?;
    all_meet("second")
}

fn ask(socket: &UdpSocket, server: SocketAddr) -> Result<Meeting> {
    socket.send_to(b"who?", server)?;
    let mut answer = [0; 200];
    let (length, from) = socket.receive_from(&mut answer)?;
    ensure!(from == server, "{from} answered");
    Meeting::parse(&answer[..length], b"who?")
}

/// A pod asks directly from the port, and the address, from which a former one has asked
/// by the service; and the other way round.
fn a_client_may_be_replaced(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let _outside = node.outside()?;
    let network = network_of_known(setting, &node);
    let server = Server::new(&network, "server")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, server.endpoints()?);
    setting.serve(&node, &[web])?;
    for round in 0..2 {
        let name = format!("client{round}");
        let pod = pod_at(&network, &name, 77)?;
        let _own = listen(&pod, &addresses(&pod)?, POD_PORT, &name)?;
        for family in FAMILIES {
            let servers = [
                SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT),
                SocketAddr::new(addresses(&server)?[family], POD_PORT),
            ];
            let to = servers[(round + family) % 2];
            let from = SocketAddr::new(unspecified_like(to), 4242);
            for client in bpf_bridge_tests::Client::ALL {
                let met = pod
                    .meet_from(client, from, to, PATIENCE)
                    .with_context(|| format!("{name}, {client:?} to {to}"))?;
                ensure!(met.server == "server", "{met:?}");
            }
            let own = SocketAddr::new(addresses(&pod)?[family], POD_PORT);
            meets_as(&server, own, &name, addresses(&server)?[family])?;
        }
        network.del(pod.attachment())?;
    }
    Ok(())
}

/// What the programs have noted of a pod stays when the plugin is called again.
fn other_calls_of_the_plugin_disturb_nobody(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let _outside = node.outside()?;
    let mut config = setting.config(&node);
    config["cniVersion"] = json!("1.1.0");
    let network = Network::new(&node, config);
    let server = Server::new(&network, "server")?;
    let client = network.pod("client")?;
    let live = addresses(&server)?.map(|address| SocketAddr::new(address, 8081));
    setting.serve(
        &node,
        &[Service::new("live", CLUSTER_IPS, SERVICE_PORT, live)],
    )?;
    let mut connections = Vec::new();
    let mut datagrams = Vec::new();
    for family in FAMILIES {
        let at = Sockets::bind(&server, live[family])?;
        let to = SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT);
        connections.push(Connection::open(&client, 0, to, &at.tcp)?);
        datagrams.push(Datagrams::open(&client, to, &at.udp)?);
    }
    let mut all_go_on = |what: &str| -> Result<()> {
        for connection in &mut connections {
            connection.answer().with_context(|| what.to_owned())?;
            connection.ask().with_context(|| what.to_owned())?;
        }
        for datagrams in &datagrams {
            datagrams.answer().with_context(|| what.to_owned())?;
            datagrams.ask().with_context(|| what.to_owned())?;
        }
        Ok(())
    };
    all_go_on("at first")?;
    let other = network.pod("other")?;
    all_go_on("after ADD")?;
    for pod in [&*server, &client] {
        network.check(pod.attachment())?;
    }
    all_go_on("after CHECK")?;
    network.gc(&[server.attachment(), client.attachment(), other.attachment()])?;
    all_go_on("after GC")?;
    network.status()?;
    network.del(other.attachment())?;
    drop(other);
    all_go_on("after STATUS and DEL")?;
    network.gc(&[server.attachment(), client.attachment()])?;
    all_go_on("after GC again")
}
