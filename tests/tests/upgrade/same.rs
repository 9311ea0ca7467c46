//! Another build of the same layout.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpStream, UdpSocket},
    panic::resume_unwind,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{EchoServer, Network, Node, Outside, Pod, Tunnel};
use serde_json::json;

use crate::{
    HOST_PORT, POD_PORT, ROOT, another_plugin, entries, install, is_well, layouts, links,
    load::Stage, network, ports, program_of, upgrade, upgrade_error,
};

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);

/// Several upgrades in a row, while everything flows.
fn under_load(xdp: bool) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let stage = Stage::new(&node, &outside, xdp)?;
    let pods = [&stage.server, &stage.client];
    // What is lost without an upgrade is not the upgrade's fault.
    stage.under_load(true, || {
        thread::sleep(Duration::from_secs(1));
        Ok(())
    })?;
    stage.under_load(true, || {
        for number in 1..=3 {
            let before = hooks(&node, &pods)?;
            install(&node, &another_plugin(number)?)?;
            // Old programs are as good as new ones, whoever asks.
            is_well(&stage.network, &pods)?;
            let words = upgrade(&node)?;
            ensure!(words.contains("in use on 3 ports"), "{words}");
            let after = hooks(&node, &pods)?;
            ensure!(
                before.keys().eq(after.keys())
                    && before.iter().all(|(hook, program)| after[hook] != *program),
                "{before:?} became {after:?}"
            );
            is_well(&stage.network, &pods)?;
        }
        Ok(())
    })?;
    let words = upgrade(&node)?;
    ensure!(
        words.contains("the programs are those of this binary"),
        "{words}"
    );
    stage.carries_everything()?;
    ensure!(layouts(&node)? == ["v1"], "{:?}", layouts(&node)?);
    for pod in pods {
        stage.network.del(pod.attachment())?;
    }
    Ok(())
}

/// The program of every hook that is in use.
fn hooks(node: &Node, pods: &[&Pod]) -> Result<BTreeMap<String, u64>> {
    let mut all = links(node, "v1")?;
    for pod in pods {
        all.insert(pod.host_veth()?.to_owned(), program_of(node, pod)?);
    }
    Ok(all)
}

#[test]
fn nothing_is_lost() -> Result<()> {
    under_load(false)
}

#[test]
fn nothing_is_lost_with_xdp() -> Result<()> {
    under_load(true)
}

/// `forward` goes on with what `from_pod` has found out, in memory that programs of one load
/// share; the first of them comes later if a port was published before.
#[test]
fn programs_that_work_together_are_loaded_together() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let far = EchoServer::start(&outside, Outside::V4.into())?;
    let published = network(&node, false);
    let server = published.pod_with_ports("server", ports())?;
    let _listener = EchoServer::start_on(&server, (server.v4()?, POD_PORT).into())?;
    let mut config = Network::dual_stack(&node);
    config["name"] = json!("direct");
    config["bridge"] = json!("cni1");
    config["ipMasq"] = json!(true);
    config["netfilter"] = json!("none");
    config["ipam"]["ranges"] = json!([[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]]);
    let direct = Network::new(&node, config);
    let pod = direct.pod("direct")?;
    let works = || {
        pod.udp_echo(far.address(), b"hello", PATIENCE)?;
        pod.tcp_echo(far.address(), b"hello", PATIENCE)?;
        let flows = entries(&node, "v1", "FLOWS")?;
        // `FLOW_MASQUERADED` and `FLOW_DIRECT`.
        ensure!(
            flows
                .iter()
                .any(|flow| flow["formatted"]["value"]["flags"] == 3),
            "no flow goes past the stack: {flows:?}"
        );
        let address = SocketAddr::from((Outside::NODE_V4, HOST_PORT));
        outside.tcp_echo(address, b"hello", PATIENCE)
    };
    works()?;
    install(&node, &another_plugin(1)?)?;
    upgrade(&node)?;
    works()
}

/// What a tunnel carries has no Ethernet header: its programs stay those for that.
#[test]
fn a_tunnel_keeps_programs_of_its_own() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let _tunnel = Tunnel::new(&node, "tun0")?;
    node.ip("addr add 192.0.2.1/24 dev tun0")?;
    let network = network(&node, false);
    let pod = network.pod_with_ports("pod", ports())?;
    let names = || -> Result<BTreeMap<String, String>> {
        links(&node, "v1")?
            .into_iter()
            .map(|(link, id)| {
                let program = node.json(&format!("bpftool -j prog show id {id}"))?;
                let name = program["name"].as_str().context("no name")?;
                Ok((link, name.to_owned()))
            })
            .collect()
    };
    let before = names()?;
    ensure!(
        before.values().any(|name| name == "egress_l3"),
        "{before:?}"
    );
    let old = hooks(&node, &[&pod])?;
    install(&node, &another_plugin(5)?)?;
    upgrade(&node)?;
    let after = names()?;
    ensure!(before == after, "{before:?} became {after:?}");
    let new = hooks(&node, &[&pod])?;
    ensure!(
        old.iter().all(|(hook, program)| new[hook] != *program),
        "{old:?} became {new:?}"
    );
    is_well(&network, &[&pod])
}

/// Several at once, and pods that come and go meanwhile.
#[test]
fn two_at_once_do_no_harm() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node, false);
    let first = network.pod_with_ports("first", ports())?;
    install(&node, &another_plugin(4)?)?;
    let words = thread::scope(|scope| {
        let upgrades = [(); 3].map(|()| scope.spawn(|| upgrade(&node)));
        let pods = ["a", "b"].map(|name| {
            let network = &network;
            scope.spawn(move || -> Result<()> {
                let pod = network.pod(name)?;
                network.check(pod.attachment())?;
                network.del(pod.attachment())
            })
        });
        for pod in pods {
            pod.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        }
        upgrades
            .into_iter()
            .map(|upgrade| upgrade.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect::<Result<Vec<_>>>()
    })?;
    let replaced = words.iter().filter(|words| words.contains("replaced"));
    ensure!(replaced.count() == 1, "{words:?}");
    let last = network.pod("last")?;
    last.ping(first.v4()?.into(), 1)?;
    is_well(&network, &[&first, &last])
}

/// How many entries a map has room for.
fn room(node: &Node, map: &str) -> Result<Option<u64>> {
    let shown = node.json(&format!("bpftool -j map show pinned {ROOT}/v1/maps/{map}"))?;
    Ok(shown["max_entries"].as_u64())
}

/// The tables become as large as the node's settings say, with all that is in them.
#[test]
fn limits_that_have_changed_are_followed() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let stage = Stage::new(&node, &outside, false)?;
    let pods = [&stage.server, &stage.client];
    node.set_settings(r#"{"limits": {"ports": 4, "flows": 8192}}"#)?;
    let words = stage.under_load(false, || upgrade(&node))?;
    ensure!(words.contains("made anew by the node's limits"), "{words}");
    ensure!(words.contains("in use on 3 ports"), "{words}");
    ensure!(layouts(&node)? == ["v1"], "{:?}", layouts(&node)?);
    ensure!(room(&node, "PORTS")? == Some(4) && room(&node, "FLOWS")? == Some(8192));
    is_well(&stage.network, &pods)?;
    stage.carries_everything()?;
    let words = upgrade(&node)?;
    ensure!(words.contains("those of this binary"), "{words}");
    let third = stage.network.pod("third")?;
    stage
        .network
        .pod("fourth")
        .err()
        .context("there is no room for a fourth")?;
    is_well(&stage.network, &[&third])?;

    // Settings in which what is there has no room are refused.
    node.set_settings(r#"{"limits": {"ports": 3, "flows": 8192}}"#)?;
    let error = upgrade_error(&node)?;
    for word in ["the map ", "3 entries", "nothing was changed"] {
        ensure!(error.contains(word), "no {word:?} in {error}");
    }
    ensure!(layouts(&node)? == ["v1"], "{:?}", layouts(&node)?);
    is_well(&stage.network, &pods)?;
    stage.carries_everything()?;

    // But flows may be forgotten, the oldest first.
    let published = SocketAddr::from((Outside::NODE_V4, HOST_PORT));
    let stream = outside.within(|| {
        for _ in 0..1500 {
            UdpSocket::bind("0.0.0.0:0")?.send_to(b"an old flow", published)?;
        }
        Ok(TcpStream::connect_timeout(&published, PATIENCE)?)
    })?;
    node.set_settings(r#"{"limits": {"ports": 4, "flows": 1024}}"#)?;
    upgrade(&node)?;
    ensure!(room(&node, "FLOWS")? == Some(1024));
    let newest = stream.local_addr()?.port();
    let flows = entries(&node, "v1", "FLOWS")?;
    ensure!(
        flows.len() > 500
            && flows
                .iter()
                .any(|flow| flow["formatted"]["key"]["client_port"] == newest),
        "of {} flows none is that of port {newest}",
        flows.len()
    );
    stage.carries_everything()?;

    node.set_settings("{}")?;
    upgrade(&node)?;
    ensure!(room(&node, "PORTS")? == Some(16_384));
    let fourth = stage.network.pod("fifth")?;
    is_well(&stage.network, &[&third, &fourth])?;
    stage.carries_everything()
}
