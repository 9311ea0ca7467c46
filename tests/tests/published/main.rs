//! Published ports: who reaches them and whom they see, what happens to the
//! packets, what is refused, and what remains.
//!
//! The tests run against the stock chain as well (the plugin `bridge`, with
//! `portmap` behind it), to see whether it is the test or the plugin that is
//! wrong; some then fail, as they show what is better here.
//!
//! Where a test covers a known weakness of such datapaths, it names it: "hazard"
//! and what other projects ran into.

mod addresses;
mod beside;
mod claims;
mod lifetime;
mod packets;
mod reach;
mod robust;
mod xdp;

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    panic::resume_unwind,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Client, EchoServer, Meeting, Namespace, Network, Node, Offload, Outside, Pod,
};
use serde_json::{Value, json};

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what must not happen.
const SILENCE: Duration = Duration::from_millis(100);

/// The port on the node, in most tests.
const HOST_PORT: u16 = 8080;
/// The port in the pod.
const POD_PORT: u16 = 80;

/// The gateway's addresses in the network of [`network`].
const GATEWAYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
];
/// The node's addresses towards the outside.
const NODE: [IpAddr; 2] = [IpAddr::V4(Outside::NODE_V4), IpAddr::V6(Outside::NODE_V6)];

/// What serves published ports on the uplinks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Uplinks {
    /// What does by default.
    Tc,
    /// XDP besides, on `uplink0`.
    Xdp,
}

impl Uplinks {
    /// A neighbour whose packets are served so: XDP leaves those whose checksums a
    /// device is to finish to others.
    fn outside(self, node: &Node) -> Result<Outside> {
        let outside = node.outside()?;
        if self == Self::Xdp {
            outside.set_offload("eth0", Offload::TxChecksum, false)?;
        }
        Ok(outside)
    }
}

/// Makes of each function a test with either of [`Uplinks`].
macro_rules! with_and_without_xdp {
    ($($name:ident)*) => {
        mod tc {$(
            #[test]
            fn $name() -> anyhow::Result<()> {
                super::$name(crate::Uplinks::Tc)
            }
        )*}
        mod xdp {$(
            #[test]
            fn $name() -> anyhow::Result<()> {
                super::$name(crate::Uplinks::Xdp)
            }
        )*}
    };
}
use with_and_without_xdp;

/// A dual-stack network that publishes ports.
fn network(node: &Node) -> Network<'_> {
    network_by(node, Uplinks::Tc)
}

fn network_by(node: &Node, uplinks: Uplinks) -> Network<'_> {
    let mut config = Network::dual_stack(node);
    if uplinks == Uplinks::Xdp {
        config["xdpUplinks"] = json!(["uplink0"]);
    }
    Network::from_list(node, conflist(config))
}

/// A conflist of a configuration that gets the capability.
fn conflist(mut config: Value) -> Value {
    config["cniVersion"].take();
    let name = config["name"].take();
    let publishes = json!({"portMappings": true});
    if config["type"] == "bridge" {
        config["hairpinMode"] = json!(true);
        let portmap = json!({"type": "portmap", "capabilities": publishes});
        return json!({"cniVersion": "1.0.0", "name": name, "plugins": [config, portmap]});
    }
    config["capabilities"] = publishes;
    json!({"cniVersion": "1.1.0", "name": name, "plugins": [config]})
}

/// A second network, on a bridge of its own.
fn other_network(node: &Node) -> Network<'_> {
    let mut config = Network::dual_stack(node);
    config["name"] = json!("other");
    config["bridge"] = json!("cni1");
    config["ipam"]["ranges"] = json!([[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]]);
    Network::from_list(node, conflist(config))
}

/// [`HOST_PORT`] to [`POD_PORT`], for TCP and UDP.
fn ports() -> Value {
    ports_at("")
}

/// As [`ports`], on one address of the node.
fn ports_at(address: &str) -> Value {
    ["tcp", "udp"]
        .map(|protocol| mapping(protocol, address))
        .to_vec()
        .into()
}

fn mapping(protocol: &str, address: &str) -> Value {
    let mut mapping = json!({
        "hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": protocol,
    });
    if !address.is_empty() {
        mapping["hostIP"] = json!(address);
    }
    mapping
}

/// A pod that publishes [`ports`] and answers on them with its name.
struct Server {
    pod: Pod,
    _listeners: Vec<EchoServer>,
}

impl Server {
    fn new(network: &Network, name: &str) -> Result<Self> {
        Self::publishing(network, name, ports())
    }

    fn publishing(network: &Network, name: &str, ports: Value) -> Result<Self> {
        let pod = network.pod_with_ports(name, ports)?;
        settle(network.node());
        let listeners = listen(&pod, name, POD_PORT)?;
        Ok(Self {
            pod,
            _listeners: listeners,
        })
    }
}

impl std::ops::Deref for Server {
    type Target = Pod;

    fn deref(&self) -> &Pod {
        &self.pod
    }
}

/// Answers on both of a pod's addresses.
fn listen(pod: &Pod, name: &str, port: u16) -> Result<Vec<EchoServer>> {
    pod.addresses()
        .into_iter()
        .map(|address| EchoServer::start_as(pod, (address, port).into(), name))
        .collect()
}

/// Lets IPv6 addresses of the stock bridge cease to be tentative.
fn settle(node: &Node) {
    if node.plugin() == "bridge" {
        thread::sleep(Duration::from_secs(3));
    }
}

/// That every kind of client meets the server of this name, at once.
fn meets(from: &Namespace, to: impl Into<IpAddr>, name: &str) -> Result<Vec<Meeting>> {
    let server = SocketAddr::new(to.into(), HOST_PORT);
    // Datagrams first: the first packet is not sent twice, should it be lost.
    Client::ALL
        .into_iter()
        .rev()
        .map(|client| {
            let meeting = from
                .meet(client, server, PATIENCE)
                .with_context(|| format!("{client:?} to {server}"))?;
            ensure!(
                meeting.server == name,
                "{client:?} to {server} met {}",
                meeting.server
            );
            Ok(meeting)
        })
        .collect()
}

/// That no kind of client meets anyone.
fn meets_nobody(from: &Namespace, to: impl Into<IpAddr>) -> Result<()> {
    let server = SocketAddr::new(to.into(), HOST_PORT);
    let met = thread::scope(|scope| {
        let clients =
            Client::ALL.map(|client| scope.spawn(move || from.meet(client, server, SILENCE)));
        clients.map(|client| client.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    ensure!(met.iter().all(Result::is_err), "{server}: {met:?}");
    Ok(())
}

/// That none of these clients meets anyone at the address beside it. All at once, as
/// silence takes its time.
fn all_meet_nobody(attempts: &[(&str, &Namespace, IpAddr)]) -> Result<()> {
    thread::scope(|scope| {
        let attempts: Vec<_> = attempts
            .iter()
            .map(|&(who, from, to)| {
                scope.spawn(move || meets_nobody(from, to).context(who.to_owned()))
            })
            .collect();
        attempts
            .into_iter()
            .try_for_each(|attempt| attempt.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// Whether an error came from one of the kernel's, of this kind.
fn is(error: &anyhow::Error, kind: ErrorKind) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == kind)
}
