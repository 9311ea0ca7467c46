//! The host's own firewall: what it sees, and what it does not.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Client, Namespace, Network, Node, Pod, Receive as _};
use serde_json::json;

use crate::{
    CLUSTER_IPS, Counter, FAMILIES, GATEWAYS, NODE, NODE_PORT, OUTSIDE, PATIENCE, POD_PORT,
    SERVICE_PORT, SILENCE, Server, Setting, addresses, in_settings, listen, meets, meets_as,
    proxy::{self, ExternalTrafficPolicy::Local, Mode, Service},
    tighten,
};

in_settings!(strict(Iptables, true, true): a_dropping_forward_policy_spares_pods_and_published_ports);
in_settings!(nftables(Nftables, true, false): a_dropping_forward_policy_spares_pods_and_published_ports);
in_settings!(all(Iptables, true, true): netfilter_sees_all_that_was_asked_for);
in_settings!(all_nftables(Nftables, false, false): netfilter_sees_all_that_was_asked_for);

/// As Docker and ufw set it.
fn drop_forwarded(node: &Node) -> Result<()> {
    for iptables in ["iptables", "ip6tables"] {
        node.run(&format!("{iptables} -P FORWARD DROP"))?;
    }
    Ok(())
}

/// That no kind of client meets anyone.
fn meets_nobody(from: &Namespace, to: SocketAddr) -> Result<()> {
    for client in [Client::Tcp, Client::UnconnectedUdp] {
        let met = from.meet(client, to, SILENCE);
        ensure!(met.is_err(), "{client:?} to {to}: {met:?}");
    }
    Ok(())
}

fn a_dropping_forward_policy_spares_pods_and_published_ports(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    let mut config = setting.config(&node);
    config["capabilities"] = json!({"portMappings": true});
    let network = Network::new(&node, config);
    let ports = ["tcp", "udp"]
        .map(|protocol| json!({"hostPort": 8088, "containerPort": POD_PORT, "protocol": protocol}));
    let server = Server::of(network.pod_with_ports("server", json!(ports))?, "server")?;
    let client = Server::new(&network, "client")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, server.endpoints()?);
    setting.serve(&node, &[web.node_port(NODE_PORT, Local)])?;
    let _outside = listen(&outside, &OUTSIDE, POD_PORT, "outside")?;
    drop_forwarded(&node)?;
    let goes_on = || -> Result<()> {
        for family in FAMILIES {
            for (from, to) in [(&client, &server), (&server, &client)] {
                let own = addresses(from)?[family];
                let other = SocketAddr::new(addresses(to)?[family], POD_PORT);
                meets_as(from, other, to.name(), own)?;
            }
            let published = SocketAddr::new(NODE[family], 8088);
            meets_as(&outside, published, "server", OUTSIDE[family])?;
            for from in [&*node as &Namespace, &client, &server] {
                meets(from, published, "server")?;
            }
            // The host's own are not forwarded.
            meets(
                &node,
                (addresses(&server)?[family], POD_PORT).into(),
                "server",
            )?;
            meets(&node, (CLUSTER_IPS[family], SERVICE_PORT).into(), "server")?;
        }
        Ok(())
    };
    goes_on()?;
    // What the host routes is the policy's.
    for family in FAMILIES {
        meets_nobody(&client, (OUTSIDE[family], POD_PORT).into())?;
        meets_nobody(&outside, (addresses(&server)?[family], POD_PORT).into())?;
        meets_nobody(&client, (CLUSTER_IPS[family], SERVICE_PORT).into())?;
    }
    // With the rules by which Kubernetes' nodes let it pass, all of it does.
    for (iptables, subnet) in [
        ("iptables", Network::V4_SUBNET),
        ("ip6tables", Network::V6_SUBNET),
    ] {
        for way in ["-s", "-d"] {
            node.run(&format!("{iptables} -A FORWARD {way} {subnet} -j ACCEPT"))?;
        }
    }
    goes_on()?;
    for family in FAMILIES {
        let seen = setting.seen_outside_as(&client)?[family];
        meets_as(&client, (OUTSIDE[family], POD_PORT).into(), "outside", seen)?;
        let pod = addresses(&server)?[family];
        meets_as(&outside, (pod, POD_PORT).into(), "server", OUTSIDE[family])?;
        meets(
            &client,
            (CLUSTER_IPS[family], SERVICE_PORT).into(),
            "server",
        )?;
    }
    Ok(())
}

/// `netfilter: all`: what pods of one network say to each other passes `FORWARD`, both
/// ways, and everything works as without.
fn netfilter_sees_all_that_was_asked_for(setting: Setting) -> Result<()> {
    let node = setting.node()?;
    let outside = node.outside()?;
    let mut config = setting.config(&node);
    config["netfilter"] = json!("all");
    let network = Network::new(&node, config);
    let server = Server::new(&network, "server")?;
    let client = Server::new(&network, "client")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, server.endpoints()?);
    setting.serve(&node, &[web.node_port(NODE_PORT, Local)])?;
    let _outside = listen(&outside, &OUTSIDE, POD_PORT, "outside")?;
    let [requests, replies] = ["th dport", "th sport"].map(|port| {
        Counter::new(
            &node,
            "forward",
            &format!("iifname cni0 oifname cni0 {port} {POD_PORT}"),
        )
    });
    let (requests, replies) = (requests?, replies?);
    let services_work = || -> Result<()> {
        for family in FAMILIES {
            let own = addresses(&client)?[family];
            let service = SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT);
            meets_as(&client, service, "server", own)?;
            meets_as(&server, service, "server", GATEWAYS[family])?;
            meets_as(&node, service, "server", GATEWAYS[family])?;
            let by_node = SocketAddr::new(NODE[family], NODE_PORT);
            meets_as(&outside, by_node, "server", OUTSIDE[family])?;
            let seen = setting.seen_outside_as(&client)?[family];
            if setting.masquerade {
                meets_as(&client, (OUTSIDE[family], POD_PORT).into(), "outside", seen)?;
            }
        }
        Ok(())
    };
    let pods_meet = |from: &Pod, to: &Pod| -> Result<()> {
        for (own, other) in addresses(from)?.into_iter().zip(addresses(to)?) {
            meets_as(from, (other, POD_PORT).into(), to.name(), own)?;
            from.ping(other, 2)?;
            let big = (0..2_900).map(|at| at as u8).collect::<Vec<_>>();
            let socket = from.within(|| Ok(std::net::UdpSocket::bind((own, 0))?))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send_to(&big, (other, POD_PORT))?;
            let length = socket
                .receive(&mut [0; 4_000])
                .context("a fragmented datagram")?;
            ensure!(length > big.len());
        }
        Ok(())
    };
    for _ in 0..2 {
        let before = (requests.packets()?, replies.packets()?);
        pods_meet(&client, &server)?;
        pods_meet(&server, &client)?;
        let after = (requests.packets()?, replies.packets()?);
        // In each direction and family, eight for TCP and two datagrams, in parts of
        // these; a little less if something was merged.
        ensure!(
            after.0 >= before.0 + 20 && after.1 >= before.1 + 20,
            "before {before:?}, after {after:?}"
        );
        services_work()?;
    }
    // A rule bites: one way only, and one port only.
    let server_addresses = addresses(&server)?;
    proxy::feed(
        &node,
        "nft",
        &["-f", "-"],
        &format!(
            "table inet rules {{
                chain forward {{
                    type filter hook forward priority 10;
                    ip daddr {} th dport {POD_PORT} drop
                    ip6 daddr {} th dport {POD_PORT} drop
                }}
            }}",
            server_addresses[0], server_addresses[1]
        ),
    )?;
    for address in server_addresses {
        meets_nobody(&client, (address, POD_PORT).into())?;
    }
    for (address, own) in addresses(&client)?.into_iter().zip(server_addresses) {
        meets_as(&server, (address, POD_PORT).into(), "client", own)?;
        client.ping(own, 1)?;
    }
    node.run("nft delete table inet rules")?;
    // As the policy does.
    drop_forwarded(&node)?;
    for address in server_addresses {
        meets_nobody(&client, (address, POD_PORT).into())?;
        meets(&node, (address, POD_PORT).into(), "server")?;
    }
    Ok(())
}

/// Without the option, rules for what is forwarded do not matter between pods, and a
/// network that has it does not change one that has not.
#[test]
fn one_network_may_have_the_option_and_another_not() -> Result<()> {
    let setting = Setting {
        mode: Mode::Nftables,
        masquerade: true,
        strict: true,
    };
    let node = setting.node()?;
    let _outside = node.outside()?;
    let network = setting.network(&node);
    let mut config = setting.config(&node);
    config["name"] = json!("filtered");
    config["bridge"] = json!("cni1");
    config["netfilter"] = json!("all");
    config["ipam"]["ranges"] = json!([[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]]);
    let filtered = Network::new(&node, config);
    let plain = [Server::new(&network, "a")?, Server::new(&network, "b")?];
    let seen = [Server::new(&filtered, "c")?, Server::new(&filtered, "d")?];
    tighten(&node)?;
    let between = |[from, to]: &[Server; 2]| -> Result<[IpAddr; 2]> {
        for address in addresses(to)? {
            meets(from, (address, POD_PORT).into(), to.name())?;
        }
        addresses(to)
    };
    between(&plain)?;
    between(&seen)?;
    // Between networks the host routes anyway.
    between(&[Server::new(&network, "e")?, Server::new(&filtered, "f")?])?;
    drop_forwarded(&node)?;
    between(&plain)?;
    for address in addresses(&seen[1])? {
        meets_nobody(&seen[0], (address, POD_PORT).into())?;
    }
    Ok(())
}
