//! Stock plugins from Debian's `containernetworking-plugins` behind and below
//! ours.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{EchoServer, MacAddr, Network, Node, Outside, Snapshot};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(5);

/// Our plugin with others behind it.
fn chain(node: &Node, others: &[Value]) -> Result<Value> {
    let mut ours = Network::dual_stack(node);
    for key in ["name", "cniVersion"] {
        ours.as_object_mut().context("no object")?.remove(key);
    }
    let mut plugins = vec![ours];
    plugins.extend_from_slice(others);
    // The newest that Debian's plugins speak.
    Ok(json!({"cniVersion": "1.0.0", "name": "net", "plugins": plugins}))
}

#[test]
fn portmap_publishes_ports_to_everyone() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    let network = Network::from_list(&node, chain(&node, &[portmap])?);
    let client = network.pod("client")?;
    let before = Snapshot::take(&node)?;
    let rules = node.run("iptables-save")?;

    let ports = json!([
        {"hostPort": 8080, "containerPort": 7, "protocol": "tcp"},
        {"hostPort": 8080, "containerPort": 7, "protocol": "udp"},
    ]);
    let pod = network.pod_with_ports("server", ports)?;
    let on = |address: IpAddr| EchoServer::start_on(&pod, (address, 7).into());
    let servers = [on(pod.v4()?.into())?, on(pod.v6()?.into())?];
    // No CHECK of the chain: that of portmap 1.1.1 fails behind any bridge.

    for address in [IpAddr::from(Outside::NODE_V4), Outside::NODE_V6.into()] {
        let published = (address, 8080).into();
        outside.tcp_echo(published, &[1; 100_000], PATIENCE)?;
        outside.udp_echo(published, b"from outside", PATIENCE)?;
        node.tcp_echo(published, b"from the host", PATIENCE)?;
        client.tcp_echo(published, b"from another pod", PATIENCE)?;
        client.udp_echo(published, b"from another pod", PATIENCE)?;
        pod.tcp_echo(published, b"from the pod itself", PATIENCE)?;
    }
    node.tcp_echo("127.0.0.1:8080".parse()?, b"from localhost", PATIENCE)?;
    for server in &servers {
        client.tcp_echo(server.address(), b"not translated", PATIENCE)?;
    }

    drop(servers);
    network.del(pod.attachment())?;
    before.ensure_same(&Snapshot::take(&node)?)?;
    let left = node.run("iptables-save")?;
    ensure!(
        left.matches("8080").count() == rules.matches("8080").count(),
        "{left}"
    );
    Ok(())
}

#[test]
fn firewall_and_tuning_do_their_work_behind_us() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    let others = [
        json!({"type": "firewall", "backend": "iptables"}),
        json!({
            "type": "tuning",
            "mac": "02:00:00:00:00:42",
            "mtu": 1400,
            // Not with IFNAME in it, which tuning 1.1.1 forgets on CHECK.
            "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"},
        }),
    ];
    let network = Network::from_list(&node, chain(&node, &others)?);
    // What a distribution's firewall does; ours passes because of the plugin.
    node.run("iptables -P FORWARD DROP")?;
    let pod = network.pod("pod")?;
    ensure!(MacAddr::of_device(&pod, "eth0")?.to_string() == "02:00:00:00:00:42");
    let eth0 = pod.device("eth0")?;
    ensure!(eth0["mtu"] == 1400, "{eth0}");
    ensure!(pod.sysctl("net/ipv4/conf/eth0/arp_filter")? == "1");
    network.check(pod.attachment())?;
    pod.ping(Outside::V4.into(), 2)?;
    outside.ping(pod.v4()?.into(), 2).err().context(
        "new connections from outside are not the firewall plugin's to allow, so this one is lost",
    )?;
    node.ping(pod.v4()?.into(), 2)?;
    node.ping(pod.v6()?.into(), 2)?;
    network.del(pod.attachment())?;
    ensure!(!node.run("iptables-save")?.contains(&pod.v4()?.to_string()));
    Ok(())
}

#[test]
fn a_mac_that_tuning_changed_is_reached_by_everyone() -> Result<()> {
    let node = Node::new()?;
    let tuning = json!({"type": "tuning", "capabilities": {"mac": true}});
    let network = Network::from_list(&node, chain(&node, &[tuning])?);
    let other = network.pod("other")?;
    let sandbox = node.sandbox("pod")?;
    let attachment = sandbox
        .attachment()
        .capability("mac", json!("02:00:00:00:00:43"));
    let pod = network.pod_with(sandbox, attachment)?;
    ensure!(MacAddr::of_device(&pod, "eth0")?.to_string() == "02:00:00:00:00:43");
    for address in pod.addresses() {
        node.ping(address, 2)?;
        other.ping(address, 2)?;
    }
    for address in other.addresses() {
        pod.ping(address, 2)?;
    }
    network.check(pod.attachment())
}

#[test]
fn stock_host_local_can_be_executed_as_any_other_plugin() -> Result<()> {
    let node = Node::new()?;
    // Under another name, so that it is not the embedded store.
    node.run("ln -s host-local /run/cni/bin/stock-host-local")?;
    let mut config = Network::dual_stack(&node);
    config["ipam"]["type"] = json!("stock-host-local");
    let network = Network::new(&node, config);
    let (a, b) = (network.pod("a")?, network.pod("b")?);
    for address in b.addresses() {
        a.ping(address, 1)?;
        node.ping(address, 1)?;
    }
    network.check(a.attachment())?;
    for pod in [&a, &b] {
        network.del(pod.attachment())?;
    }
    let leases = Snapshot::take(&node)?.matching("/var/lib/cni/networks/net/10.");
    ensure!(leases.is_empty(), "{leases:?}");
    Ok(())
}
