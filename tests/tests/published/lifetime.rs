//! Published ports come and go with their pods.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_bridge_tests::{
    Client, EchoServer, Meeting, Namespace, Network, Node, Outside, Receive as _, ReceiveFrom as _,
    Snapshot, Verb, wait_for,
};
use serde_json::{Value, json};

use crate::{
    GATEWAYS, HOST_PORT, NODE, PATIENCE, POD_PORT, Server, is, mapping, meets, network, ports,
    settle,
};

/// Where the plugin pins the map of what is published.
const PUBLISHED: &str = "/sys/fs/bpf/bpf-bridge/v1/maps/PUBLISHED";

/// That a port of the node is closed, not silent.
fn refuses(from: &Namespace, address: IpAddr) -> Result<()> {
    let server = SocketAddr::new(address, HOST_PORT);
    for client in Client::ALL {
        // A socket that names each destination is not told of errors.
        if client == Client::UnconnectedUdp {
            continue;
        }
        let error = match from.meet(client, server, PATIENCE) {
            Ok(met) => Err(anyhow!("{client:?} to {server} met {met:?}"))?,
            Err(error) => error,
        };
        ensure!(
            is(&error, ErrorKind::ConnectionRefused),
            "{client:?} to {server}: {error:#}"
        );
    }
    Ok(())
}

#[test]
fn nothing_is_open_after_del_or_gc() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let neighbour = network.pod("neighbour")?;
    // Once, for what stays.
    network.del(network.pod_with_ports("before", ports())?.attachment())?;
    let before = Snapshot::take(&node)?;
    let here: &Namespace = &outside;
    let clients = [
        ("outside", here),
        ("a pod", &neighbour),
        ("the node", &node),
    ];
    type End = fn(&Network, &Server, &bpf_bridge_tests::Attachment) -> Result<()>;
    let ends: [(&str, End); 4] = [
        ("DEL", |network, server, _| network.del(server.attachment())),
        ("DEL without a netns or a result", |network, server, _| {
            let mut config = network.configs(None)?.remove(0);
            config["runtimeConfig"] = json!({"portMappings": "?"});
            network
                .call(&config, Verb::Del)?
                .attachment(&server.attachment().clone().without_netns())
                .run(network.node())?
                .success()
                .map(drop)
        }),
        ("GC", |network, _, neighbour| network.gc(&[neighbour])),
        ("DEL after the sandbox", |network, server, _| {
            let path = server.path().display().to_string();
            network.node().run(&format!("umount {path}"))?;
            network.del(server.attachment())
        }),
    ];
    for (end, work) in ends {
        let server = Server::new(&network, "server")?;
        for (who, client) in clients {
            for address in NODE {
                meets(client, address, "server").context(who)?;
            }
        }
        work(&network, &server, neighbour.attachment()).context(end)?;
        // The programs may go with the last port, and what they know of the node.
        let mut left = before.changes(&Snapshot::take(&node)?);
        left.retain(|change| {
            !change.starts_with("-pin ")
                && !change.ends_with(" 0 keys:")
                && !change.contains("/PROGRAMS ")
        });
        ensure!(left.is_empty(), "after {end}: {left:#?}");
        for (who, client) in clients {
            for address in NODE {
                refuses(client, address).with_context(|| format!("after {end}, {who}"))?;
            }
        }
        for loopback in ["127.0.0.1", "::1"] {
            refuses(&node, loopback.parse()?)?;
        }
    }
    Ok(())
}

#[test]
fn a_failed_add_publishes_nothing() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    network.del(network.pod_with_ports("before", ports())?.attachment())?;
    let before = Snapshot::take(&node)?;
    // A name that is taken in the sandbox is found out when much is done.
    let sandbox = node.sandbox("pod")?;
    sandbox.ip("link add eth0 type veth peer name other")?;
    let attachment = sandbox.attachment().capability("portMappings", ports());
    ensure!(network.add(&attachment).is_err());
    before.ensure_same(&Snapshot::take(&node)?)?;
    refuses(&outside, NODE[0])
}

/// The published ports of one pod do not end with another's.
#[test]
fn a_deleted_pod_takes_only_its_own_ports_away() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    let other = json!([{"hostPort": 9999, "containerPort": POD_PORT}]);
    let other = network.pod_with_ports("other", other)?;
    network.del(other.attachment())?;
    // Neither does a DEL of what was refused.
    let rival = node.sandbox("rival")?;
    let attachment = rival.attachment().capability("portMappings", ports());
    ensure!(network.add(&attachment).is_err());
    network.del(&attachment)?;
    for address in NODE {
        meets(&outside, address, "server")?;
        meets(&node, address, "server")?;
    }
    // Nor a GC that knows it.
    network.gc(&[server.attachment()])?;
    meets(&outside, NODE[0], "server")?;
    Ok(())
}

#[test]
fn check_sees_a_port_that_is_gone() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    network.check(server.attachment())?;
    let entries = node.json(&format!("bpftool -j map dump pinned {PUBLISHED}"))?;
    let entries = entries.as_array().context("no list")?;
    // Two protocols, two families.
    ensure!(entries.len() == 4, "{entries:?}");
    let key: Vec<&str> = entries[0]["key"]
        .as_array()
        .context("no key")?
        .iter()
        .filter_map(Value::as_str)
        .collect();
    node.run(&format!(
        "bpftool map delete pinned {PUBLISHED} key hex {}",
        key.join(" ")
    ))?;
    let error = network.check(server.attachment()).err();
    let error = error.context("CHECK saw nothing")?;
    ensure!(format!("{error:#}").contains("8080"), "{error:#}");
    // What is left goes with the pod.
    network.del(server.attachment())?;
    let entries = node.json(&format!("bpftool -j map dump pinned {PUBLISHED}"))?;
    ensure!(entries.as_array().is_some_and(Vec::is_empty), "{entries}");
    Ok(())
}

#[test]
fn five_hundred_ports_in_one_add() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    network.del(network.pod_with_ports("before", ports())?.attachment())?;
    let before = Snapshot::take(&node)?;
    let many = |range: std::ops::Range<u16>| -> Value {
        range
            .map(|port| json!({"hostPort": port, "containerPort": POD_PORT, "protocol": "tcp"}))
            .collect()
    };
    let start = Instant::now();
    let server = Server::publishing(&network, "server", many(10_000..10_500))?;
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(1), "{took:?}");
    for port in [10_000, 10_250, 10_499] {
        for address in NODE {
            let met = outside.meet(Client::Tcp, (address, port).into(), PATIENCE)?;
            ensure!(met.server == "server");
            node.meet(Client::Tcp, (address, port).into(), PATIENCE)?;
        }
    }
    network.check(server.attachment())?;
    let start = Instant::now();
    network.del(server.attachment())?;
    ensure!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    before.ensure_same(&Snapshot::take(&node)?)
}

#[test]
fn a_pod_comes_again_with_its_ports() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    for _ in 0..10 {
        let server = Server::new(&network, "server")?;
        for address in NODE {
            meets(&outside, address, "server")?;
            meets(&node, address, "server")?;
        }
        network.del(server.attachment())?;
    }
    Ok(())
}

// UDP clients that never stop sending. Hazard: stale flows to a pod that is gone,
// and to none at all from before there was one.

/// A client that sends a datagram every other millisecond, from one socket.
struct Flood {
    who: &'static str,
    /// Whom the last answer was from.
    heard: Mutex<Option<String>>,
    stop: AtomicBool,
}

impl Flood {
    fn new(who: &'static str) -> Self {
        Self {
            who,
            heard: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    fn run(&self, socket: &UdpSocket, server: SocketAddr, connected: bool) -> Result<()> {
        socket.set_read_timeout(Some(Duration::from_millis(2)))?;
        let mut answer = [0; 200];
        while !self.stop.load(Ordering::Relaxed) {
            let sent = if connected {
                socket.send(b"?")
            } else {
                socket.send_to(b"?", server)
            };
            let received = sent.and_then(|_| socket.receive_from(&mut answer));
            // Nothing came otherwise, or somebody said that nobody is there.
            if let Ok((length, from)) = received {
                ensure!(from == server, "{}: {from} answered", self.who);
                let server = Meeting::parse(&answer[..length], b"?")?.server;
                *self.heard.lock().map_err(|_| anyhow!("a panic"))? = Some(server);
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn hears(&self, name: &str, limit: Duration) -> Result<()> {
        wait_for(&format!("answer of {name} for {}", self.who), limit, || {
            let heard = self.heard.lock().map_err(|_| anyhow!("a panic"))?;
            Ok(heard.as_deref() == Some(name))
        })
    }
}

#[test]
fn a_udp_client_that_never_stops_reaches_the_new_pod_at_once() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let neighbour = network.pod("neighbour")?;
    settle(&node);
    // The first ADD with ports loads the programs.
    network.del(network.pod_with_ports("before", ports())?.attachment())?;
    let here: &Namespace = &outside;
    let floods = [
        (Flood::new("outside"), here, NODE, true),
        (Flood::new("outside, not connected"), here, NODE, false),
        (Flood::new("a pod"), &neighbour, NODE, true),
        (
            Flood::new("a pod, by the gateway"),
            &neighbour,
            GATEWAYS,
            false,
        ),
        (Flood::new("the node, not connected"), &node, NODE, false),
        (
            Flood::new("the node, to itself"),
            &node,
            ["127.0.0.1".parse()?, "::1".parse()?],
            false,
        ),
    ];
    for family in 0..2 {
        thread::scope(|scope| -> Result<()> {
            let mut threads = Vec::new();
            for (flood, from, servers, connected) in &floods {
                flood.stop.store(false, Ordering::Relaxed);
                let server = SocketAddr::new(servers[family], HOST_PORT);
                let any: IpAddr = match server {
                    SocketAddr::V4(_) => [0; 4].into(),
                    SocketAddr::V6(_) => [0; 16].into(),
                };
                let socket = from.within(|| {
                    let socket = UdpSocket::bind((any, 0))?;
                    if *connected {
                        socket.connect(server)?;
                    }
                    Ok(socket)
                })?;
                threads.push(scope.spawn(move || flood.run(&socket, server, *connected)));
            }
            let outcome = (|| -> Result<()> {
                // They speak to nobody at first.
                thread::sleep(Duration::from_millis(50));
                for name in ["first", "second", "third"] {
                    let server = Server::new(&network, name)?;
                    let since = Instant::now();
                    for (flood, ..) in &floods {
                        let left = Duration::from_millis(500).saturating_sub(since.elapsed());
                        flood.hears(name, left)?;
                    }
                    network.del(server.attachment())?;
                }
                Ok(())
            })();
            for (flood, ..) in &floods {
                flood.stop.store(true, Ordering::Relaxed);
            }
            for thread in threads {
                thread.join().map_err(|_| anyhow!("a client panicked"))??;
            }
            outcome
        })?;
    }
    Ok(())
}

/// The node's own socket that is connected is connected to the pod. When the pod
/// goes, its socket is told, and connects anew.
#[test]
fn a_connected_socket_of_the_node_is_told_of_its_pods_end() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node);
    for address in [NODE[0], NODE[1], "127.0.0.1".parse()?, "::1".parse()?] {
        let address = SocketAddr::new(address, HOST_PORT);
        let server = Server::new(&network, "first")?;
        let any: SocketAddr = match address {
            SocketAddr::V4(_) => ([0; 4], 0).into(),
            SocketAddr::V6(_) => ([0; 16], 0).into(),
        };
        let connect = || {
            node.within(|| {
                let socket = UdpSocket::bind(any)?;
                socket.connect(address)?;
                Ok(socket)
            })
        };
        let socket = connect()?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let ask = |socket: &UdpSocket| -> std::io::Result<Vec<u8>> {
            socket.send(b"?")?;
            let mut answer = vec![0; 200];
            let length = socket.receive(&mut answer)?;
            answer.truncate(length);
            Ok(answer)
        };
        ensure!(Meeting::parse(&ask(&socket)?, b"?")?.server == "first");
        network.del(server.attachment())?;
        let server = Server::new(&network, "second")?;
        let told = socket.receive(&mut [0; 10]);
        ensure!(
            told.as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::ConnectionAborted),
            "{told:?}"
        );
        ensure!(ask(&socket).is_err(), "it is connected to nobody");
        let socket = connect()?;
        socket.set_read_timeout(Some(PATIENCE))?;
        ensure!(Meeting::parse(&ask(&socket)?, b"?")?.server == "second");
        network.del(server.attachment())?;
    }
    Ok(())
}

/// A connection ends with its pod, whose successor must not be sent its rest.
#[test]
fn a_connection_does_not_go_over_to_the_next_pod() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    for address in NODE {
        let address = SocketAddr::new(address, HOST_PORT);
        let first = Server::new(&network, "first")?;
        let any = if address.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let stream = outside.tcp_connect_from(any.parse()?, address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut name = [0; 6];
        (&stream).read_exact(&mut name)?;
        ensure!(&name == b"first ");
        network.del(first.attachment())?;
        let second = Server::new(&network, "second")?;
        (&stream).write_all(b"still there?")?;
        let mut rest = Vec::new();
        let end = (&stream).read_to_end(&mut rest);
        ensure!(
            end.as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
            "{end:?}, {rest:?}"
        );
        meets(&outside, address.ip(), "second")?;
        network.del(second.attachment())?;
    }
    Ok(())
}

/// The number is free for the node again, and what it captured is the node's.
#[test]
fn the_node_has_its_port_again() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    meets(&outside, NODE[0], "server")?;
    network.del(server.attachment())?;
    let _process: Vec<EchoServer> = NODE
        .into_iter()
        .map(|address| EchoServer::start_as(&node, (address, HOST_PORT).into(), "process"))
        .collect::<Result<_>>()?;
    for address in NODE {
        meets(&outside, address, "process")?;
        meets(&node, address, "process")?;
    }
    // Another family of one pod alone does not take it.
    let v4 = json!([mapping("tcp", "0.0.0.0"), mapping("udp", "0.0.0.0")]);
    let _server = Server::publishing(&network, "other", v4)?;
    meets(&outside, Outside::NODE_V4, "other")?;
    meets(&outside, Outside::NODE_V6, "process")?;
    Ok(())
}
