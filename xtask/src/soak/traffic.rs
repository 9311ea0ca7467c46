//! Pods that stay, and what they and others say to each other all the time.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Scope},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Attachment, Client, EchoServer, Namespace, Node, Outside, Pod, storm::Storm,
};
use serde_json::json;

/// How long an answer may take on a busy machine. Nothing is sent twice.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two of a kind.
const BREATH: Duration = Duration::from_millis(15);
/// The bytes of one transfer.
const TRANSFER: u64 = 1 << 20;
/// The port on the node that is published all the time.
const PORT: u16 = 8080;
/// The pod's.
const POD_PORT: u16 = 80;

/// The pods that stay, one or more in each network of the storm.
pub(super) struct Stayers {
    pods: BTreeMap<&'static str, Vec<Pod>>,
    echoes: Vec<EchoServer>,
    outside: SocketAddr,
}

impl Stayers {
    pub(super) fn new(storm: &Storm<'_>, outside: &Outside) -> Result<Self> {
        let ports = json!([
            {"hostPort": PORT, "containerPort": POD_PORT, "protocol": "tcp"},
            {"hostPort": PORT, "containerPort": POD_PORT, "protocol": "udp"},
        ]);
        let mut pods = BTreeMap::new();
        let mut echoes = Vec::new();
        for (name, network) in storm.networks() {
            let mut of_network = Vec::new();
            for number in 0..2 {
                let name = format!("stays-{name}-{number}");
                let publishes = name.starts_with("stays-publishes-0");
                let ports = if publishes { ports.clone() } else { json!([]) };
                of_network.push(network.pod_with_ports(&name, ports)?);
            }
            if let Some(server) = of_network.first() {
                for address in server.addresses() {
                    echoes.push(EchoServer::start_as(
                        server,
                        (address, POD_PORT).into(),
                        name,
                    )?);
                    // Without a greeting, for what must come back as it was sent.
                    echoes.push(EchoServer::start_on(
                        server,
                        (address, POD_PORT + 1).into(),
                    )?);
                }
            }
            pods.insert(name, of_network);
        }
        let there = EchoServer::start_as(outside, (Outside::V4, POD_PORT).into(), "outside")?;
        let outside = there.address();
        echoes.push(there);
        Ok(Self {
            pods,
            echoes,
            outside,
        })
    }

    /// The network and the attachment of each.
    pub(super) fn attachments(&self) -> Vec<(&'static str, Attachment)> {
        let pods = self.pods.iter();
        pods.flat_map(|(name, pods)| pods.iter().map(|pod| (*name, pod.attachment().clone())))
            .collect()
    }

    /// The first of a network answers, the second asks.
    fn pair(&self, network: &str) -> Result<(&Pod, &Pod)> {
        match self.pods.get(network).map(Vec::as_slice) {
            Some([server, client]) => Ok((server, client)),
            _ => anyhow::bail!("no two pods stay in network {network}"),
        }
    }

    /// Lets them talk until `stop`.
    pub(super) fn talk<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        node: &'scope Node,
        outside: &'scope Outside,
        stop: &'scope AtomicBool,
        said: &'scope Said,
    ) -> Result<()> {
        let repeat = |name: &'static str, once: Box<dyn Fn() -> Result<()> + Send + 'scope>| {
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    said.note(name, once());
                    thread::sleep(BREATH);
                }
            });
        };
        for network in ["plain", "shares"] {
            let (server, client) = self.pair(network)?;
            let at = SocketAddr::new(server.v4()?.into(), POD_PORT + 1);
            repeat(
                "pod to pod, TCP",
                Box::new(move || client.tcp_transfer(at, TRANSFER).map(drop)),
            );
            repeat(
                "pod to pod, UDP",
                Box::new(move || client.udp_echo(at, b"are you there?", PATIENCE).map(drop)),
            );
        }
        for (network, name) in [
            ("masquerades", "masqueraded"),
            ("netfilter", "masqueraded by netfilter"),
        ] {
            let (_, client) = self.pair(network)?;
            let to = self.outside;
            repeat(
                name,
                Box::new(move || {
                    for kind in [Client::Tcp, Client::Udp] {
                        let met = client.meet(kind, to, PATIENCE)?;
                        let seen = IpAddr::V4(Outside::NODE_V4);
                        ensure!(met.client.ip() == seen, "seen as {}", met.client);
                    }
                    Ok(())
                }),
            );
        }
        let published = [
            (
                outside as &Namespace,
                Outside::NODE_V4,
                "published, from outside",
            ),
            (
                node as &Namespace,
                Ipv4Addr::LOCALHOST,
                "published, from the node",
            ),
        ];
        for (from, address, name) in published {
            repeat(
                name,
                Box::new(move || {
                    for kind in [Client::Tcp, Client::Udp] {
                        let met = from.meet(kind, (address, PORT).into(), PATIENCE)?;
                        ensure!(met.server == "publishes", "met {}", met.server);
                    }
                    Ok(())
                }),
            );
        }
        ensure!(!self.echoes.is_empty(), "nobody answers");
        Ok(())
    }
}

/// How often each kind of talk succeeded and failed, and the first failure.
#[derive(Debug, Default)]
pub(super) struct Said(Mutex<BTreeMap<&'static str, Talk>>);

/// One kind of talk.
#[derive(Clone, Debug, Default)]
pub(super) struct Talk {
    pub(super) good: u64,
    pub(super) bad: u64,
    pub(super) why: Option<String>,
}

impl Said {
    fn note(&self, name: &'static str, done: Result<()>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let talk = all.entry(name).or_default();
        match done.with_context(|| format!("after {} that went well", talk.good)) {
            Ok(()) => talk.good += 1,
            Err(error) => {
                talk.bad += 1;
                talk.why.get_or_insert_with(|| format!("{error:#}"));
            }
        }
    }

    pub(super) fn tell(&self) -> BTreeMap<&'static str, Talk> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
