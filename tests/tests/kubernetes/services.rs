//! Who reaches what by kube-proxy's rules, and whom the pod then sees.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Client, EchoServer, Frame, MacAddr, Namespace, Network, Packet, PacketSocket, Receive as _,
    ReceiveFrom as _,
};
use serde_json::json;

use crate::{
    CLUSTER_IPS, Connection, Counter, FAMILIES, GATEWAYS, NODE, NODE_PORT, OUTSIDE, PATIENCE,
    POD_PORT, SERVICE_PORT, Server, Setting, addresses, cluster_ips, endpoints, gateway_frames,
    in_every_setting, in_settings, listen, meets, meets_as,
    proxy::{
        ExternalTrafficPolicy::{self, Cluster, Local},
        Service,
    },
    unspecified_like,
};

in_every_setting! {
    everybody_reaches_services
    outside_reaches_a_pod_by_its_address
    endpoints_may_be_outside
    pods_talk_past_the_host_at_the_same_time
    one_source_port_for_a_cluster_ip_and_the_pod_behind_it
    streams_errors_and_fragments_pass
}
in_settings!(one(Iptables, true, true):
    many_connections_in_a_row
    one_client_port_may_take_every_way_at_once
    fragments_may_come_in_any_order
    smaller_links_further_on_are_found
);
in_settings!(other(Nftables, true, true):
    a_service_balances_between_its_pods
    services_are_reached_where_the_programs_log
);

fn service(server: &Server) -> Result<Service> {
    Ok(Service::new(
        "web",
        CLUSTER_IPS,
        SERVICE_PORT,
        server.endpoints()?,
    ))
}

/// A service with a node port of either policy: the second has the next number.
fn node_ports(server: &Server) -> Result<[Service; 2]> {
    let of = |name, number, port, policy: ExternalTrafficPolicy| {
        let endpoints = server.endpoints()?;
        let service = Service::new(name, cluster_ips(number), SERVICE_PORT, endpoints);
        Ok::<_, anyhow::Error>(service.node_port(port, policy))
    };
    Ok([
        of("cluster", 20, NODE_PORT, Cluster)?,
        of("local", 21, NODE_PORT + 1, Local)?,
    ])
}

/// Those who ask, whom they ask, and as whom the pod sees them. All of them are tried, on
/// one node; the error names those that failed.
fn everybody_reaches_services(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    let network = setting.network(&node);
    let server = Server::new(&network, "server")?;
    let client = network.pod("client")?;
    let mut config = setting.config(&node);
    config["name"] = json!("other");
    config["bridge"] = json!("cni1");
    config["ipam"]["ranges"] = json!([[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]]);
    let other = Network::new(&node, config);
    let stranger = other.pod("stranger")?;
    let [cluster, local] = node_ports(&server)?;
    setting.serve(&node, &[service(&server)?, cluster, local])?;
    let mut failed = Vec::new();
    for family in FAMILIES {
        let own = addresses(&client)?[family];
        let gateway = GATEWAYS[family];
        let service = SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT);
        let cluster = SocketAddr::new(NODE[family], NODE_PORT);
        let local = SocketAddr::new(NODE[family], NODE_PORT + 1);
        let everybody: [(&str, &Namespace, SocketAddr, IpAddr); 12] = [
            // The answer to a pod of the same network must go back through the host, which
            // alone knows whom it had asked.
            ("a pod", &client, service, own),
            ("the pod itself", &server, service, gateway),
            ("the node", &node, service, gateway),
            ("outside", &outside, cluster, gateway),
            ("outside", &outside, local, OUTSIDE[family]),
            ("a pod", &client, cluster, gateway),
            // kube-proxy takes what pods ask of node ports for asked of the cluster IP.
            ("a pod", &client, local, own),
            ("the pod itself", &server, cluster, gateway),
            ("the pod itself", &server, local, gateway),
            // Whom kube-proxy does not know for a pod is outside.
            ("a stranger", &stranger, service, gateway),
            ("a stranger", &stranger, cluster, gateway),
            (
                "a stranger",
                &stranger,
                local,
                addresses(&stranger)?[family],
            ),
        ];
        for (who, from, to, seen) in everybody {
            for _ in 0..2 {
                if let Err(error) = meets_as(from, to, "server", seen) {
                    failed.push(format!("{who} to {to}: {error:#}"));
                    break;
                }
            }
        }
    }
    ensure!(failed.is_empty(), "{failed:#?}");
    Ok(())
}

/// What outside begins is answered as the pod; what the pod begins is masqueraded.
fn outside_reaches_a_pod_by_its_address(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    let network = setting.network(&node);
    let server = Server::new(&network, "server")?;
    setting.serve(&node, &[service(&server)?])?;
    let _outside = listen(&outside, &OUTSIDE, POD_PORT, "outside")?;
    for family in FAMILIES {
        let pod = addresses(&server)?[family];
        for _ in 0..2 {
            meets_as(&outside, (pod, POD_PORT).into(), "server", OUTSIDE[family])?;
            let seen = setting.seen_outside_as(&server)?[family];
            meets_as(&server, (OUTSIDE[family], POD_PORT).into(), "outside", seen)?;
        }
        // From one port of their own.
        let from = SocketAddr::new(unspecified_like((pod, 0).into()), 4242);
        for client in Client::ALL {
            let meeting = outside.meet_from(client, from, (pod, POD_PORT).into(), PATIENCE)?;
            ensure!(
                meeting.client == (OUTSIDE[family], 4242).into(),
                "{meeting:?}"
            );
            server
                .meet_from(client, from, (OUTSIDE[family], POD_PORT).into(), PATIENCE)
                .with_context(|| format!("{client:?} to the outside"))?;
        }
        outside.ping(pod, 1)?;
        server.ping(OUTSIDE[family], 1)?;
    }
    Ok(())
}

/// The API server: a pod's request is translated by kube-proxy and masqueraded by us. And
/// a node port may lead to another machine: what kube-proxy forwards and masquerades
/// itself is netfilter's, there and back, on devices where pods are masqueraded by us.
fn endpoints_may_be_outside(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    let elsewhere = node.machine()?;
    node.connect("uplink1", &elsewhere, "eth0")?;
    node.ip("addr add 203.0.113.2/24 dev uplink1\n\
         addr add 2001:db8:2::2/64 dev uplink1 nodad")?;
    elsewhere.ip("addr add 203.0.113.1/24 dev eth0\n\
         addr add 2001:db8:2::1/64 dev eth0 nodad")?;
    let there: [IpAddr; 2] = ["203.0.113.1".parse()?, "2001:db8:2::1".parse()?];
    let here: [IpAddr; 2] = ["203.0.113.2".parse()?, "2001:db8:2::2".parse()?];
    if !setting.masquerade {
        outside.route_to_node(Network::V4_SUBNET)?;
        outside.route_to_node(Network::V6_SUBNET)?;
    }
    let network = setting.network(&node);
    let client = network.pod("client")?;
    let service = |name, cluster_ips, node_port, address: [IpAddr; 2]| {
        let endpoints = address.map(|address| SocketAddr::new(address, 6443));
        Service::new(name, cluster_ips, 443, endpoints).node_port(node_port, Cluster)
    };
    setting.serve(
        &node,
        &[
            service("kubernetes", CLUSTER_IPS, NODE_PORT, OUTSIDE),
            service("elsewhere", cluster_ips(20), NODE_PORT + 1, there),
        ],
    )?;
    let _outside = listen(&outside, &OUTSIDE, 6443, "api")?;
    let _elsewhere = listen(&elsewhere, &there, 6443, "elsewhere")?;
    for family in FAMILIES {
        let api = SocketAddr::new(CLUSTER_IPS[family], 443);
        let seen = setting.seen_outside_as(&client)?[family];
        for _ in 0..3 {
            meets_as(&client, api, "api", seen)?;
        }
        meets_as(&node, api, "api", NODE[family])?;
        // And at the same time by its own address, from the same port.
        let any = SocketAddr::new(unspecified_like(api), 4242);
        for server in [api, (OUTSIDE[family], 6443).into()] {
            let meeting = client.meet_from(Client::UnconnectedUdp, any, server, PATIENCE)?;
            ensure!(meeting.client.ip() == seen, "{meeting:?}");
        }
        let at = |port| SocketAddr::new(NODE[family], port);
        meets_as(&outside, at(NODE_PORT), "api", NODE[family])?;
        meets_as(&outside, at(NODE_PORT + 1), "elsewhere", here[family])?;
    }
    Ok(())
}

/// The port that pods talk to each other on.
const DIRECT_PORT: u16 = 9090;
/// The port behind the service whose connections stay open.
const LIVE_PORT: u16 = 8081;

/// Nothing of what they say passes the gateway or the host's stack.
fn pods_talk_past_the_host_at_the_same_time(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    let network = setting.network(&node);
    let server = Server::new(&network, "server")?;
    let client = Server::new(&network, "client")?;
    let [cluster, local] = node_ports(&server)?;
    let live = addresses(&server)?.map(|address| SocketAddr::new(address, LIVE_PORT));
    let live = Service::new("live", CLUSTER_IPS, SERVICE_PORT, live).node_port(30_099, Local);
    setting.serve(&node, &[cluster, local, live])?;
    let _client = listen(&client, &addresses(&client)?, DIRECT_PORT, "client")?;
    let _server = listen(&server, &addresses(&server)?, DIRECT_PORT, "server")?;
    let counters = [
        Counter::new(&node, "prerouting", &format!("th dport {DIRECT_PORT}"))?,
        Counter::new(&node, "prerouting", &format!("th sport {DIRECT_PORT}"))?,
    ];

    let everybody: [(&str, &Namespace); 3] =
        [("client", &client), ("node", &node), ("outside", &outside)];
    let mut connections = Vec::new();
    for family in FAMILIES {
        let pod = addresses(&server)?[family];
        let listener = server.within(|| Ok(TcpListener::bind((pod, LIVE_PORT))?))?;
        for (who, from) in everybody {
            let to = match who {
                "outside" => SocketAddr::new(NODE[family], 30_099),
                _ => SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT),
            };
            connections.push((who, Connection::open(from, 0, to, &listener).context(who)?));
        }
        let direct = SocketAddr::new(pod, LIVE_PORT);
        connections.push(("routed", Connection::open(&outside, 0, direct, &listener)?));
    }
    let mut all_work = || -> Result<()> {
        for (who, connection) in &mut connections {
            connection.ask().context(*who)?;
            connection.answer().context(*who)?;
        }
        for family in FAMILIES {
            let service = SocketAddr::new(cluster_ips(20)[family], SERVICE_PORT);
            for from in [&*client as &Namespace, &server, &node] {
                meets(from, service, "server")?;
            }
            for from in [&*client as &Namespace, &server, &outside] {
                for port in [NODE_PORT, NODE_PORT + 1] {
                    meets(from, (NODE[family], port).into(), "server")?;
                }
            }
        }
        Ok(())
    };
    for _ in 0..2 {
        all_work()?;
        let before = gateway_frames(&node)?;
        for (from, to) in [(&client, &server), (&server, &client)] {
            for (own, other) in addresses(from)?.into_iter().zip(addresses(to)?) {
                meets_as(from, (other, DIRECT_PORT).into(), to.name(), own)?;
                // The port that serves the services, too.
                meets_as(from, (other, POD_PORT).into(), to.name(), own)?;
                from.ping(other, 2)?;
            }
        }
        let after = gateway_frames(&node)?;
        let passed: u64 = after
            .iter()
            .zip(&before)
            .map(|(after, before)| after - before)
            .sum();
        // Well over a hundred were exchanged; what may pass is what the host itself says.
        ensure!(
            passed < 10,
            "{passed} frames passed by the gateway: {before:?}, {after:?}"
        );
    }
    for counter in &counters {
        let packets = counter.packets()?;
        ensure!(
            packets == 0,
            "the host's stack saw {packets} packets between pods"
        );
    }
    Ok(())
}

/// A pod asks another by a service and directly, from one and the same port: the two
/// flows are one 5-tuple to the pod that is asked.
fn one_source_port_for_a_cluster_ip_and_the_pod_behind_it(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let _outside = node.outside()?;
    let network = setting.network(&node);
    let server = Server::new(&network, "server")?;
    let client = network.pod("client")?;
    let live = addresses(&server)?.map(|address| SocketAddr::new(address, LIVE_PORT));
    let live = Service::new("live", cluster_ips(20), SERVICE_PORT, live);
    setting.serve(&node, &[service(&server)?, live])?;
    for family in FAMILIES {
        let pod = addresses(&server)?[family];
        let own = addresses(&client)?[family];
        let listener = server.within(|| Ok(TcpListener::bind((pod, LIVE_PORT))?))?;
        let by_service = SocketAddr::new(cluster_ips(20)[family], SERVICE_PORT);
        let directly = SocketAddr::new(pod, LIVE_PORT);
        let open = |to| {
            let connection = Connection::open(&client, 4242, to, &listener)?;
            ensure!(connection.seen()?.ip() == own, "{}", connection.seen()?);
            Ok(connection)
        };
        let mut first = open(directly).context("directly, first")?;
        ensure!(first.seen()?.port() == 4242, "{}", first.seen()?);
        first.ask()?;
        first.answer()?;
        first.abort()?;
        for round in 0..2 {
            let mut service =
                open(by_service).with_context(|| format!("by the service, {round}"))?;
            service.answer()?;
            service.ask()?;
            let mut direct = open(directly).with_context(|| format!("beside it, {round}"))?;
            in_turns(&mut direct, &mut service)?;
            direct.abort()?;
            service.answer().context("when the other is closed")?;
            service.ask()?;
            let mut again = open(directly).context("once more beside it")?;
            service.abort()?;
            again.answer()?;
            again.ask()?;
            again.abort()?;
        }
        // Both are begun anew in the other order.
        let mut direct = open(directly)?;
        let mut service = open(by_service).context("after the direct one")?;
        in_turns(&mut direct, &mut service)?;

        let any = unspecified_like(directly);
        let socket = client.within(|| Ok(UdpSocket::bind((any, 4243))?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let servers = [
            SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT),
            SocketAddr::new(pod, POD_PORT),
        ];
        for round in 0..20_u8 {
            for (number, server) in (0_u8..).zip(servers) {
                socket.send_to(&[round, number], server)?;
            }
            let mut answered = Vec::new();
            for _ in servers {
                let mut answer = [0; 100];
                let (length, from) = socket.receive_from(&mut answer).context("over UDP")?;
                let number = answer[..length].last().copied().unwrap_or_default();
                ensure!(
                    from == servers[usize::from(number)],
                    "{from} answered for {number}"
                );
                answered.push(number);
            }
            answered.sort_unstable();
            ensure!(answered == [0, 1], "{answered:?}");
        }
    }
    Ok(())
}

fn in_turns(one: &mut Connection, other: &mut Connection) -> Result<()> {
    for _ in 0..2 {
        for connection in [&mut *one, &mut *other] {
            connection.ask()?;
            connection.answer()?;
        }
    }
    Ok(())
}

/// Packets that are more than one on the wire, what a pod says about a packet that came by
/// a service, and what has no ports.
fn streams_errors_and_fragments_pass(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    let network = setting.network(&node);
    let server = Server::new(&network, "server")?;
    let client = network.pod("client")?;
    let silent = addresses(&server)?.map(|address| SocketAddr::new(address, 9));
    let silent = Service::new("silent", cluster_ips(30), 9, silent).node_port(30_009, Local);
    let stream = addresses(&server)?.map(|address| SocketAddr::new(address, LIVE_PORT));
    let stream = Service::new("stream", cluster_ips(31), 5001, stream).node_port(30_501, Local);
    let [web, _] = node_ports(&server)?;
    setting.serve(&node, &[silent, web, stream])?;
    for family in FAMILIES {
        let echo = SocketAddr::new(addresses(&server)?[family], LIVE_PORT);
        let _echo = EchoServer::start_on(&server, echo)?;
        let streaming = SocketAddr::new(cluster_ips(31)[family], 5001);
        let everybody: [(&str, &Namespace, SocketAddr); 4] = [
            ("client", &client, streaming),
            ("the server itself", &server, streaming),
            ("node", &node, streaming),
            ("outside", &outside, (NODE[family], 30_501).into()),
        ];
        for (who, from, to) in everybody {
            from.tcp_transfer(to, 1 << 20)
                .with_context(|| format!("a stream from {who} to {to}"))?;
        }
        let refusing = SocketAddr::new(cluster_ips(30)[family], 9);
        let everybody: [(&str, &Namespace, SocketAddr); 4] = [
            ("client", &client, refusing),
            ("the server itself", &server, refusing),
            ("node", &node, refusing),
            ("outside", &outside, (NODE[family], 30_009).into()),
        ];
        for (who, from, to) in everybody {
            is_refused(from, to).with_context(|| format!("{who} to {to}"))?;
        }
        let echoing = SocketAddr::new(cluster_ips(20)[family], SERVICE_PORT);
        let everybody: [(&str, &Namespace, SocketAddr); 4] = [
            ("client", &client, echoing),
            ("the server itself", &server, echoing),
            ("node", &node, echoing),
            ("outside", &outside, (NODE[family], NODE_PORT).into()),
        ];
        for (who, from, to) in everybody {
            for length in [2_000, 20_000] {
                datagram(from, to, length)
                    .with_context(|| format!("{length} bytes from {who} to {to}"))?;
            }
        }
    }
    Ok(())
}

/// That nobody listens there, and that this is said: over TCP and UDP.
fn is_refused(from: &Namespace, to: SocketAddr) -> Result<()> {
    let any = SocketAddr::new(unspecified_like(to), 0);
    let socket = from.within(|| {
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    })?;
    socket.send(b"anyone?")?;
    let error = socket
        .receive(&mut [0; 10])
        .err()
        .context("something was answered")?;
    ensure!(
        error.kind() == ErrorKind::ConnectionRefused,
        "over UDP: {error}"
    );
    let error = from.tcp_connect_from(any, to, PATIENCE).err();
    let refused = |error: &anyhow::Error| {
        error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    };
    ensure!(error.as_ref().is_some_and(refused), "over TCP: {error:?}");
    Ok(())
}

/// That a datagram comes back behind the greeting.
fn datagram(from: &Namespace, to: SocketAddr, length: usize) -> Result<()> {
    let any = SocketAddr::new(unspecified_like(to), 0);
    let socket = from.within(|| Ok(UdpSocket::bind(any)?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let message: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    socket.send_to(&message, to)?;
    let mut answer = vec![0; 65_536];
    let (received, source) = socket.receive_from(&mut answer)?;
    ensure!(source == to, "{source} answered");
    ensure!(
        answer[..received].ends_with(&message),
        "something else came back"
    );
    Ok(())
}

/// A host that forwards a packet to where it came from tells the sender of the shorter
/// way; who took it would lose kube-proxy.
fn many_connections_in_a_row(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let _outside = node.outside()?;
    let network = setting.network(&node);
    let server = Server::new(&network, "server")?;
    let client = network.pod("client")?;
    setting.serve(&node, &[service(&server)?])?;
    for device in ["all", "cni0"] {
        node.set_sysctl(&format!("net/ipv4/conf/{device}/send_redirects"), "1")?;
    }
    for device in ["all", "eth0"] {
        for family in ["ipv4", "ipv6"] {
            client.set_sysctl(&format!("net/{family}/conf/{device}/accept_redirects"), "1")?;
        }
    }
    for cluster_ip in CLUSTER_IPS {
        for round in 0..150 {
            meets(&client, (cluster_ip, SERVICE_PORT).into(), "server")
                .with_context(|| format!("round {round}"))?;
        }
    }
    Ok(())
}

/// The asker is one of a service's own pods, and meets itself and the others.
fn a_service_balances_between_its_pods(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let _outside = node.outside()?;
    let network = setting.network(&node);
    let first = Server::new(&network, "first")?;
    let second = Server::new(&network, "second")?;
    let third = Server::new(&network, "third")?;
    let mut all = Vec::new();
    for server in [&first, &second, &third] {
        all.extend(server.endpoints()?);
    }
    setting.serve(
        &node,
        &[Service::new("web", CLUSTER_IPS, SERVICE_PORT, all)],
    )?;
    for cluster_ip in CLUSTER_IPS {
        let mut met = std::collections::BTreeSet::new();
        for _ in 0..60 {
            for client in Client::ALL {
                let to = SocketAddr::new(cluster_ip, SERVICE_PORT);
                met.insert(first.meet(client, to, PATIENCE)?.server);
            }
            if met.len() == 3 {
                break;
            }
        }
        ensure!(met.len() == 3, "{met:?}");
    }
    Ok(())
}

/// By a service, by a published port, and by the pod's own address: to the pod they are
/// all one flow.
fn one_client_port_may_take_every_way_at_once(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    let mut config = setting.config(&node);
    config["capabilities"] = json!({"portMappings": true});
    let network = Network::new(&node, config);
    let ports = ["tcp", "udp"]
        .map(|protocol| json!({"hostPort": 8088, "containerPort": POD_PORT, "protocol": protocol}));
    let pod = network.pod_with_ports("server", json!(ports))?;
    let client = network.pod("client")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, endpoints(&pod)?);
    setting.serve(&node, &[web.node_port(NODE_PORT, Local)])?;
    for family in FAMILIES {
        let at = addresses(&pod)?[family];
        let direct = SocketAddr::new(at, POD_PORT);
        let listener = pod.within(|| Ok(TcpListener::bind(direct)?))?;
        let ways = [
            (NODE[family], NODE_PORT).into(),
            (NODE[family], 8088).into(),
            direct,
            (CLUSTER_IPS[family], SERVICE_PORT).into(),
        ];
        let everybody: [(&str, &Namespace, &[SocketAddr]); 2] = [
            ("outside", &outside, &ways[..3]),
            ("client", &client, &ways),
        ];
        for (who, from, ways) in everybody {
            for turn in 0..ways.len() {
                let mut open = Vec::new();
                for at in 0..ways.len() {
                    let way = ways[(turn + at) % ways.len()];
                    let connection = Connection::open(from, 4242, way, &listener);
                    open.push((way, connection.with_context(|| format!("{who} to {way}"))?));
                }
                for _ in 0..2 {
                    for (way, connection) in &mut open {
                        let spoken = connection.answer().and_then(|()| connection.ask());
                        spoken.with_context(|| format!("{who} with {way}"))?;
                    }
                }
                for (way, connection) in open {
                    connection
                        .abort()
                        .with_context(|| format!("{who}, end of {way}"))?;
                }
            }
        }
    }
    Ok(())
}

/// The last fragment of an answer first: only the first one has ports, by which it is
/// known where the answer must go.
fn fragments_may_come_in_any_order(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let _outside = node.outside()?;
    let network = setting.network(&node);
    let server = network.pod("server")?;
    let client = network.pod("client")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, endpoints(&server)?);
    setting.serve(&node, &[web])?;
    let wire = PacketSocket::open(&server, "eth0")?;
    let from = MacAddr::of_device(&server, "eth0")?;
    let to = MacAddr::of_device(&client, "eth0")?;
    for family in FAMILIES {
        let own = SocketAddr::new(addresses(&server)?[family], POD_PORT);
        let listener = server.within(|| Ok(UdpSocket::bind(own)?))?;
        let any = unspecified_like(own);
        let service = SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT);
        for round in 0..6_u16 {
            // By turns by the service and directly, from ports of their own.
            let asked = if round % 2 == 0 { service } else { own };
            let socket = client.within(|| Ok(UdpSocket::bind((any, 0))?))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send_to(b"much, please", asked)?;
            listener.set_read_timeout(Some(PATIENCE))?;
            let (_, asker) = listener.receive_from(&mut [0; 100])?;
            let answer: Vec<u8> = (0..3_500).map(|at| (at % 251) as u8).collect();
            let packet = Packet::udp(own, asker, &answer);
            let mut fragments = packet.fragments(1000 + round, 1_000);
            match round / 2 {
                0 => {}
                1 => fragments.reverse(),
                _ => fragments.swap(0, 1),
            }
            for fragment in fragments {
                wire.send(&Frame::ip(to, from, &fragment))?;
            }
            let mut received = vec![0; 5_000];
            let (length, source) = socket
                .receive_from(&mut received)
                .with_context(|| format!("{asked}, round {round}"))?;
            ensure!(source == asked, "{source} answered in place of {asked}");
            ensure!(received[..length] == answer, "something else was answered");
        }
    }
    Ok(())
}

/// Programs that log are others than those that do not.
fn services_are_reached_where_the_programs_log(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let _outside = node.outside()?;
    for (number, level) in (0..).zip(["off", "debug", "trace"]) {
        let mut config = setting.config(&node);
        config["logLevel"] = json!(level);
        if node.plugin() == "bridge" {
            config["logLevel"].take();
        }
        let network = Network::new(&node, config);
        let server = Server::new(&network, &format!("server{number}"))?;
        let client = network.pod(&format!("client{number}"))?;
        setting.serve(&node, &[service(&server)?])?;
        for (own, cluster_ip) in addresses(&client)?.into_iter().zip(CLUSTER_IPS) {
            let to = SocketAddr::new(cluster_ip, SERVICE_PORT);
            meets_as(&client, to, server.name(), own).context(level)?;
        }
    }
    Ok(())
}

/// What a router says of packets that are too large for its next link reaches whoever has
/// sent them, through both translations.
fn smaller_links_further_on_are_found(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    let (router, far) = (node.machine()?, node.machine()?);
    outside.connect("eth1", &router, "eth0")?;
    router.connect("eth1", &far, "eth0")?;
    for (machine, device) in [(&*outside as &Namespace, "eth1"), (&router, "eth0")] {
        machine.ip(&format!("link set {device} mtu 1300"))?;
    }
    outside.ip("addr add 192.0.2.1/30 dev eth1\n\
         addr add 2001:db8:4::1/64 dev eth1 nodad\n\
         route add 203.0.113.0/24 via 192.0.2.2\n\
         route add 2001:db8:2::/64 via 2001:db8:4::2")?;
    router.ip("addr add 192.0.2.2/30 dev eth0\n\
         addr add 2001:db8:4::2/64 dev eth0 nodad\n\
         addr add 203.0.113.1/24 dev eth1\n\
         addr add 2001:db8:2::1/64 dev eth1 nodad\n\
         route add default via 192.0.2.1\n\
         route add default via 2001:db8:4::1")?;
    far.ip("addr add 203.0.113.9/24 dev eth0\n\
         addr add 2001:db8:2::9/64 dev eth0 nodad\n\
         route add default via 203.0.113.1\n\
         route add default via 2001:db8:2::1")?;
    for machine in [&*outside as &Namespace, &router] {
        machine.set_sysctl("net.ipv4.ip_forward", "1")?;
        machine.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
    }
    let there: [IpAddr; 2] = ["203.0.113.9".parse()?, "2001:db8:2::9".parse()?];
    let network = setting.network(&node);
    let server = network.pod("server")?;
    let [cluster, local] = [
        ("cluster", NODE_PORT, Cluster),
        ("local", NODE_PORT + 1, Local),
    ]
    .map(|(name, port, policy)| {
        let number = if policy == Local { 21 } else { 20 };
        let at = endpoints(&server)?;
        let service = Service::new(name, cluster_ips(number), SERVICE_PORT, at);
        Ok::<_, anyhow::Error>(service.node_port(port, policy))
    });
    let api = there.map(|address| SocketAddr::new(address, 6443));
    let api = Service::new("api", CLUSTER_IPS, 443, api);
    setting.serve(&node, &[cluster?, local?, api])?;
    for family in FAMILIES {
        let own = SocketAddr::new(addresses(&server)?[family], POD_PORT);
        let _here = EchoServer::start_on(&server, own)?;
        let _there = EchoServer::start_on(&far, (there[family], 6443).into())?;
        // With whom the pod then speaks, by its own account.
        let everybody: [(&Namespace, SocketAddr, IpAddr); 4] = [
            (&far, (NODE[family], NODE_PORT).into(), GATEWAYS[family]),
            (&far, (NODE[family], NODE_PORT + 1).into(), there[family]),
            (&server, (there[family], 6443).into(), there[family]),
            (
                &server,
                (CLUSTER_IPS[family], 443).into(),
                CLUSTER_IPS[family],
            ),
        ];
        for (from, to, peer) in everybody {
            // Who has learned it offers smaller segments from then on.
            for machine in [&far, &server as &Namespace] {
                machine.ip("route flush cache")?;
                machine.run("ip -6 route flush cache")?;
            }
            from.tcp_transfer(to, 300_000)
                .with_context(|| format!("a stream to {to}"))?;
            let route = server.run(&format!("ip route get {peer}"))?;
            ensure!(
                route.contains("mtu 1300"),
                "the pod was not told, when {to} was asked: {route}"
            );
        }
    }
    Ok(())
}
