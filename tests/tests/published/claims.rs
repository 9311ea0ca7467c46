//! Which ports may be published, where, and what is refused.

use std::{net::IpAddr, thread};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bpf_bridge_tests::{
    Client, CniError, EchoServer, Namespace, Network, Node, Outside, Snapshot, Verb,
};
use serde_json::{Value, json};

use crate::{
    HOST_PORT, NODE, PATIENCE, POD_PORT, Server, all_meet_nobody, conflist, listen, mapping, meets,
    meets_nobody, network, ports, ports_at, settle,
};

const SECOND: &str = "198.51.100.22";
const LOOPBACK: [&str; 2] = ["127.0.0.1", "::1"];

/// ADD, with what it wrote to standard error.
fn add(
    network: &Network,
    name: &str,
    ports: Value,
) -> Result<std::result::Result<String, CniError>> {
    let sandbox = network.node().sandbox(name)?;
    let attachment = sandbox.attachment().capability("portMappings", ports);
    let config = network
        .configs(Some(&attachment))?
        .into_iter()
        .next()
        .context("no plugin")?;
    let reply = network
        .call(&config, Verb::Add)?
        .attachment(&attachment)
        .run(network.node())?;
    if reply.status.success() {
        network.del(&attachment)?;
        return Ok(Ok(reply.stderr));
    }
    Ok(Err(reply.failure()?))
}

/// The error of an ADD, which must have left nothing.
fn refused(network: &Network, name: &str, ports: Value) -> Result<CniError> {
    let before = Snapshot::take(network.node())?;
    let shown = ports.to_string();
    match add(network, name, ports)? {
        Ok(_) => bail!("{shown} was accepted"),
        Err(error) => {
            before.ensure_same(&Snapshot::take(network.node())?)?;
            Ok(error)
        }
    }
}

#[test]
fn a_port_may_be_published_on_some_addresses_only() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip(&format!("addr add {SECOND}/24 dev uplink0"))?;
    let network = network(&node);
    let neighbour = network.pod("neighbour")?;
    let [v4, v6] = NODE;
    let second: IpAddr = SECOND.parse()?;
    let [loopback_v4, loopback_v6]: [IpAddr; 2] = [LOOPBACK[0].parse()?, LOOPBACK[1].parse()?];
    let all = [v4, second, v6];
    // The host's address, and where it is reached from outside and from pods, and
    // besides from the node itself.
    let table: [(&str, &[IpAddr], &[IpAddr]); 8] = [
        ("", &all, &[loopback_v4, loopback_v6]),
        ("0.0.0.0", &[v4, second], &[loopback_v4]),
        ("::", &[v6], &[loopback_v6]),
        ("198.51.100.2", &[v4], &[]),
        (SECOND, &[second], &[]),
        ("2001:db8:ffff::2", &[v6], &[]),
        ("127.0.0.1", &[], &[loopback_v4]),
        ("::1", &[], &[loopback_v6]),
    ];
    for (host, everywhere, locally) in table {
        let server = Server::publishing(&network, "server", ports_at(host))?;
        let here: &Namespace = &outside;
        let clients = [
            ("outside", here),
            ("a pod", &neighbour),
            ("the node", &node),
        ];
        let anyone = clients
            .into_iter()
            .flat_map(|(who, client)| all.map(|address| (who, client, address)))
            .map(|attempt| (attempt, everywhere));
        let node_itself =
            [loopback_v4, loopback_v6].map(|address| (("the node", &*node, address), locally));
        let mut closed = Vec::new();
        for ((who, client, address), open) in anyone.chain(node_itself) {
            if open.contains(&address) {
                meets(client, address, "server")
                    .with_context(|| format!("published on {host:?}, {who}"))?;
            } else {
                closed.push((who, client, address));
            }
        }
        all_meet_nobody(&closed).with_context(|| format!("published on {host:?}"))?;
        network.del(server.attachment())?;
    }
    Ok(())
}

/// Only clients on the node: nobody comes to a loopback address from elsewhere,
/// not even with a route to it.
#[test]
fn loopback_addresses_are_not_reached_from_elsewhere() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let neighbour = network.pod("neighbour")?;
    let _server = Server::publishing(&network, "server", ports_at("127.0.0.1"))?;
    let here: &Namespace = &outside;
    for (client, device, gateway) in [
        (here, "eth0", Outside::NODE_V4.to_string()),
        (&neighbour, "eth0", "10.77.0.1".to_owned()),
    ] {
        client.set_sysctl("net/ipv4/conf/all/route_localnet", "1")?;
        client.ip("addr del 127.0.0.1/8 dev lo")?;
        client.ip(&format!(
            "route add 127.0.0.1/32 via {gateway} dev {device}"
        ))?;
        meets_nobody(client, "127.0.0.1".parse::<IpAddr>()?)?;
    }
    meets(&node, "127.0.0.1".parse::<IpAddr>()?, "server")?;
    Ok(())
}

/// As Kubernetes' conformance tests do it: one number, three pods, which differ in
/// the address or in the protocol.
#[test]
fn the_same_number_may_go_to_several_pods() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip(&format!("addr add {SECOND}/24 dev uplink0"))?;
    let network = network(&node);
    let only = |protocol: &str, address: &str| json!([mapping(protocol, address)]);
    let _pods = [
        Server::publishing(&network, "local", only("tcp", "127.0.0.1"))?,
        Server::publishing(&network, "first", only("tcp", "198.51.100.2"))?,
        Server::publishing(&network, "second", only("tcp", SECOND))?,
        Server::publishing(&network, "datagrams", only("udp", "198.51.100.2"))?,
        Server::publishing(&network, "sixth", only("tcp", "::"))?,
    ];
    let here: &Namespace = &outside;
    let [v4, v6] = NODE;
    let (tcp, udp) = (
        &[Client::Tcp][..],
        &[Client::Udp, Client::UnconnectedUdp][..],
    );
    for (from, clients, address, name) in [
        (&*node, tcp, "127.0.0.1".parse()?, "local"),
        (&*node, tcp, v4, "first"),
        (here, tcp, v4, "first"),
        (&*node, tcp, SECOND.parse()?, "second"),
        (here, tcp, SECOND.parse()?, "second"),
        (&*node, udp, v4, "datagrams"),
        (here, udp, v4, "datagrams"),
        (&*node, tcp, v6, "sixth"),
        (here, tcp, v6, "sixth"),
        (&*node, tcp, "::1".parse()?, "sixth"),
    ] {
        for client in clients {
            let met = from
                .meet(*client, (address, HOST_PORT).into(), PATIENCE)
                .with_context(|| format!("{client:?} to {address}"))?;
            ensure!(met.server == name, "{client:?} to {address} met {met:?}");
        }
    }
    Ok(())
}

#[test]
fn a_number_that_is_taken_is_refused_and_its_owner_named() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip(&format!("addr add {SECOND}/24 dev uplink0"))?;
    let network = network(&node);
    let other = crate::other_network(&node);
    // So that a refused ADD is not the first of its network.
    for network in [&network, &other] {
        let first = network.pod_with_ports("before", ports())?;
        network.del(first.attachment())?;
    }
    let pairs = [
        ("tcp", "", "tcp", "", true),
        ("udp", "", "udp", "", true),
        ("tcp", "", "udp", "", false),
        ("tcp", "", "tcp", "198.51.100.2", true),
        ("tcp", "198.51.100.2", "tcp", "", true),
        ("tcp", "198.51.100.2", "tcp", "198.51.100.2", true),
        ("tcp", "198.51.100.2", "tcp", SECOND, false),
        ("tcp", "", "tcp", "0.0.0.0", true),
        ("tcp", "", "tcp", "::", true),
        ("tcp", "0.0.0.0", "tcp", "::", false),
        ("tcp", "0.0.0.0", "tcp", "2001:db8:ffff::2", false),
        ("tcp", "::", "tcp", "2001:db8:ffff::2", true),
        ("tcp", "127.0.0.1", "tcp", "198.51.100.2", false),
        ("tcp", "127.0.0.1", "tcp", "", true),
        ("tcp", "0.0.0.0", "tcp", "127.0.0.1", true),
        ("udp", "::1", "udp", "::", true),
    ];
    for (first, on, second, also_on, conflict) in pairs {
        let owner = Server::publishing(&network, "owner", json!([mapping(first, on)]))?;
        let rival = json!([mapping(second, also_on)]);
        let what = format!("{first} on {on:?}, then {second} on {also_on:?}");
        if conflict {
            let error = refused(&network, "rival", rival.clone()).context(what.clone())?;
            for word in ["8080", "net", "owner", "eth0"] {
                ensure!(
                    error.text().contains(word),
                    "{what}: {:?} says no {word}",
                    error.text()
                );
            }
        }
        for network in [&network, &other] {
            let answer = add(network, "rival", rival.clone())?;
            ensure!(answer.is_err() == conflict, "{what}: {answer:?}");
        }
        // The owner is undisturbed.
        let client = if first == "tcp" {
            Client::Tcp
        } else {
            Client::Udp
        };
        let (from, address): (&Namespace, &str) = match on {
            "" | "0.0.0.0" => (&outside, "198.51.100.2"),
            "::" => (&outside, "2001:db8:ffff::2"),
            "127.0.0.1" | "::1" => (&node, on),
            _ => (&outside, on),
        };
        let met = from.meet(
            client,
            (address.parse::<IpAddr>()?, HOST_PORT).into(),
            PATIENCE,
        );
        ensure!(met.context(what)?.server == "owner");
        network.del(owner.attachment())?;
    }
    // Free again, for the other network.
    let _server = Server::new(&other, "rival")?;
    meets(&outside, NODE[0], "rival")?;
    Ok(())
}

/// All or nothing: ports of the same ADD that were free are free afterwards.
#[test]
fn a_refused_add_claims_none_of_its_ports() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let _owner = Server::new(&network, "owner")?;
    let many: Value = (9000..9050)
        .map(|port| json!({"hostPort": port, "containerPort": POD_PORT, "protocol": "tcp"}))
        .chain([mapping("tcp", "")])
        .collect();
    refused(&network, "greedy", many)?;
    outside
        .tcp_connect_from(
            "0.0.0.0:0".parse()?,
            (Outside::NODE_V4, 9000).into(),
            PATIENCE,
        )
        .err()
        .context("a port of a pod that is not there is open")?;
    let free = json!([{"hostPort": 9000, "containerPort": POD_PORT, "protocol": "tcp"}]);
    ensure!(add(&network, "modest", free)?.is_ok());
    meets(&outside, NODE[0], "owner")?;
    Ok(())
}

#[test]
fn a_process_that_listens_already_is_a_warning() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let warning = |ports: Value| -> Result<String> {
        match add(&network, "pod", ports)? {
            Ok(stderr) => Ok(stderr),
            Err(error) => bail!("{}", error.text()),
        }
    };
    ensure!(!warning(ports())?.contains("8080"), "nobody listens");
    for (listening, published, warned) in [
        ("0.0.0.0", "", true),
        ("::", "", true),
        ("198.51.100.2", "", true),
        ("198.51.100.2", "198.51.100.2", true),
        ("0.0.0.0", "198.51.100.2", true),
        ("127.0.0.1", "198.51.100.2", false),
        ("198.51.100.2", "::", false),
    ] {
        let address: IpAddr = listening.parse()?;
        let process = EchoServer::start_as(&node, (address, HOST_PORT).into(), "process")?;
        for protocol in ["tcp", "udp"] {
            let said = warning(json!([mapping(protocol, published)]))?;
            ensure!(
                said.contains("8080") == warned,
                "{protocol}: {listening} listens, {published:?} is published: {said:?}"
            );
        }
        if listening == "0.0.0.0" {
            // The port is the pod's while it is published.
            let server = Server::new(&network, "server")?;
            meets(&outside, NODE[0], "server")?;
            network.del(server.attachment())?;
            meets(&outside, NODE[0], "process")?;
        }
        drop(process);
    }
    Ok(())
}

/// What `portmap` can be told and we do not do is refused by name, and what
/// asks for what we do is not.
#[test]
fn options_of_portmap_that_are_not_built_are_refused_by_name() -> Result<()> {
    let node = Node::new()?;
    let plain = network(&node);
    let first = plain.pod_with_ports("first", ports())?;
    plain.del(first.attachment())?;
    for (key, value, accepted) in [
        ("snat", json!(true), true),
        ("snat", json!(false), false),
        ("masqAll", json!(false), true),
        ("masqAll", json!(true), false),
        ("conditionsV4", json!([]), true),
        ("conditionsV4", json!(["!", "-d", "192.0.2.0/24"]), false),
        ("conditionsV6", json!(["!", "-d", "2001:db8::/64"]), false),
        ("markMasqBit", json!(5), false),
        ("externalSetMarkChain", json!("MARK"), false),
        ("backend", json!("nftables"), false),
    ] {
        let mut config = Network::dual_stack(&node);
        config[key] = value.clone();
        let network = Network::from_list(&node, conflist(config));
        if accepted {
            let answer = add(&network, "pod", ports())?;
            ensure!(answer.is_ok(), "{key} {value}: {answer:?}");
        } else {
            let error = refused(&network, "pod", ports()).context(key)?;
            ensure!(error.text().contains(key), "{key}: {}", error.text());
        }
    }
    Ok(())
}

#[test]
fn mappings_that_make_no_sense_are_refused() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node);
    let first = network.pod_with_ports("first", ports())?;
    network.del(first.attachment())?;
    for (key, value) in [
        ("hostPort", json!(0)),
        ("hostPort", json!(-1)),
        ("hostPort", json!(65_536)),
        ("hostPort", json!("http")),
        ("containerPort", json!(0)),
        ("containerPort", json!(70_000)),
        ("protocol", json!("icmp")),
        ("hostIP", json!("localhost")),
        ("hostIP", json!("198.51.100.2/24")),
        ("hostIP", json!("224.0.0.1")),
    ] {
        let mut wrong = mapping("tcp", "");
        wrong[key] = value.clone();
        let error =
            refused(&network, "pod", json!([wrong])).with_context(|| format!("{key} {value}"))?;
        ensure!(
            matches!(error.code, 6 | 7) && error.text().contains(key),
            "{key} {value}: {error:?}"
        );
        // DEL needs no valid ports.
        let sandbox = node.sandbox("pod")?;
        let attachment = sandbox
            .attachment()
            .capability("portMappings", json!([wrong]));
        network
            .del(&attachment)
            .with_context(|| format!("{key} {value}"))?;
    }
    // A number of the node that goes to two places.
    let twice = json!([mapping("tcp", ""), mapping("tcp", "198.51.100.2")]);
    ensure!(refused(&network, "pod", twice)?.text().contains("8080"));
    Ok(())
}

/// The checksum of SCTP covers the ports, in a way that no program can update.
#[test]
fn sctp_keeps_its_ports() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node);
    let mut sctp = mapping("sctp", "");
    let error = refused(&network, "pod", json!([sctp]))?;
    ensure!(
        error.text().to_lowercase().contains("sctp"),
        "{}",
        error.text()
    );
    sctp["containerPort"] = HOST_PORT.into();
    let answer = add(&network, "pod", json!([sctp]))?;
    ensure!(answer.is_ok(), "{answer:?}");
    Ok(())
}

/// containerd's capital letters, protocols in any case, and defaults.
#[test]
fn mappings_are_read_as_every_runtime_writes_them() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    settle(&node);
    for ports in [
        json!([{"HostPort": HOST_PORT, "ContainerPort": POD_PORT, "Protocol": "TCP", "HostIP": ""}]),
        json!([{"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": "tcp", "unknown": 1}]),
    ] {
        let server = Server::publishing(&network, "server", ports.clone())?;
        for address in NODE {
            let met = outside
                .meet(Client::Tcp, (address, HOST_PORT).into(), PATIENCE)
                .with_context(|| ports.to_string())?;
            ensure!(met.server == "server");
        }
        network.del(server.attachment())?;
    }
    // No ports at all, as the runtime may say it.
    for none in [json!([]), Value::Null] {
        ensure!(add(&network, "pod", none)?.is_ok());
    }
    Ok(())
}

/// Hazard: attachments that race for the same hook and leave pods without it.
#[test]
fn adds_at_once_share_what_they_want_and_only_one_gets_a_number() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let own = |index: u16| json!({"hostPort": 9000 + index, "containerPort": POD_PORT});
    // The first of them load the programs, all want the same number, and half of them
    // one of their own.
    let pods = thread::scope(|scope| -> Result<Vec<_>> {
        let adds: Vec<_> = (0..12)
            .map(|index| {
                let network = &network;
                scope.spawn(move || {
                    let ports = if index % 2 == 0 {
                        json!([own(index)])
                    } else {
                        json!([mapping("tcp", "")])
                    };
                    let name = format!("pod-{index}");
                    Ok((index, network.pod_with_ports(&name, ports)))
                })
            })
            .collect();
        adds.into_iter()
            .map(|add| add.join().map_err(|_| anyhow!("a panic"))?)
            .collect()
    })?;
    let (single, rivals): (Vec<_>, Vec<_>) =
        pods.into_iter().partition(|(index, _)| index % 2 == 0);
    let mut winners: Vec<_> = rivals
        .into_iter()
        .filter_map(|(index, pod)| Some((index, pod.ok()?)))
        .collect();
    ensure!(winners.len() == 1, "{} have it", winners.len());
    let (index, winner) = winners.remove(0);
    let mut listeners = listen(&winner, &format!("pod-{index}"), POD_PORT)?;
    let met = outside.meet(Client::Tcp, (NODE[0], HOST_PORT).into(), PATIENCE)?;
    ensure!(met.server == format!("pod-{index}"), "{met:?}");
    network.check(winner.attachment())?;
    for (index, pod) in single {
        let (name, pod) = (format!("pod-{index}"), pod?);
        listeners.extend(listen(&pod, &name, POD_PORT)?);
        for address in NODE {
            let server = (address, 9000 + index).into();
            for client in [&*outside, &*node] {
                let met = client.meet(Client::Tcp, server, PATIENCE);
                ensure!(met.with_context(|| name.clone())?.server == name);
            }
        }
        network.check(pod.attachment())?;
    }
    Ok(())
}
