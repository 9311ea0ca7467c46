//! Under Kubernetes: what kube-proxy translates, and what passes the host's netfilter,
//! beside pods that talk to each other past the host.
//!
//! All is without `bridge-nf-call-iptables`, by which a Linux bridge shows what it
//! switches to netfilter; with the stock plugin, tests of pods that ask a ClusterIP of
//! their own network fail for want of it.

mod filters;
mod firewall;
mod lifetime;
mod proxy;
mod services;

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Client, EchoServer, Meeting, Namespace, Network, Node, Outside, Pod, Receive as _,
};
use nix::{
    libc,
    sys::socket::{setsockopt, sockopt},
};
use serde_json::Value;

use crate::proxy::{Mode, Service};

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what must not happen.
const SILENCE: Duration = Duration::from_millis(150);

/// The port of services.
const SERVICE_PORT: u16 = 80;
/// The port that pods listen on.
const POD_PORT: u16 = 8080;
/// The port of the node that leads to a service.
const NODE_PORT: u16 = 30_080;

/// The addresses of the first service, which are nobody's.
const CLUSTER_IPS: [IpAddr; 2] = cluster_ips(10);
/// The gateway's addresses.
const GATEWAYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
];
/// The node's addresses towards the outside.
const NODE: [IpAddr; 2] = [IpAddr::V4(Outside::NODE_V4), IpAddr::V6(Outside::NODE_V6)];
/// The addresses of the machine outside.
const OUTSIDE: [IpAddr; 2] = [IpAddr::V4(Outside::V4), IpAddr::V6(Outside::V6)];

/// The places of the families in such pairs: IPv4, IPv6.
const FAMILIES: [usize; 2] = [0, 1];

const fn cluster_ips(number: u8) -> [IpAddr; 2] {
    [
        IpAddr::V4(Ipv4Addr::new(10, 96, 0, number)),
        IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number as u16)),
    ]
}

/// What a test is repeated with.
#[derive(Debug, Clone, Copy)]
struct Setting {
    mode: Mode,
    /// The network has `ipMasq`.
    masquerade: bool,
    /// The node believes nobody: see [`tighten`].
    strict: bool,
}

/// Makes of each function a test in every [`Setting`] that matters.
macro_rules! in_every_setting {
    ($($name:ident)*) => {
        in_settings!(iptables(Iptables, true, false): $($name)*);
        in_settings!(nftables(Nftables, true, false): $($name)*);
        in_settings!(iptables_strict(Iptables, true, true): $($name)*);
        in_settings!(nftables_strict(Nftables, true, true): $($name)*);
        in_settings!(without_masquerade(Iptables, false, true): $($name)*);
    };
}
/// Makes of each function a test in one [`Setting`].
macro_rules! in_settings {
    ($module:ident($mode:ident, $masquerade:literal, $strict:literal): $($name:ident)*) => {
        mod $module {$(
            #[test]
            fn $name() -> anyhow::Result<()> {
                super::$name(crate::Setting {
                    mode: crate::Mode::$mode,
                    masquerade: $masquerade,
                    strict: $strict,
                })
            }
        )*}
    };
}
use {in_every_setting, in_settings};

impl Setting {
    /// A node that is a node of a cluster, so far without pods and services.
    fn node(self) -> Result<Node> {
        let node = Node::new()?;
        for protocol in ["iptables", "ip6tables"] {
            let bridge = format!("/proc/sys/net/bridge/bridge-nf-call-{protocol}");
            if node.read(&bridge).is_ok() {
                node.set_sysctl(&format!("net/bridge/bridge-nf-call-{protocol}"), "0")?;
            }
        }
        Ok(node)
    }

    /// The network of its pods.
    fn network(self, node: &Node) -> Network<'_> {
        Network::new(node, self.config(node))
    }

    fn config(self, node: &Node) -> Value {
        let mut config = Network::dual_stack(node);
        config["ipMasq"] = self.masquerade.into();
        if node.plugin() == "bridge" {
            config["hairpinMode"] = true.into();
        }
        config
    }

    /// With all devices there: the services, and in a strict setting what hardened nodes
    /// have on all devices and connections.
    fn serve(self, node: &Node, services: &[Service]) -> Result<()> {
        // Addresses of the stock plugin's are tentative for a while.
        if node.plugin() == "bridge" {
            thread::sleep(Duration::from_secs(3));
        }
        proxy::write(node, self.mode, services)?;
        if self.strict {
            tighten(node)?;
        }
        Ok(())
    }

    /// The machine outside, as whom a pod that asks it directly appears.
    fn seen_outside_as(self, pod: &Pod) -> Result<[IpAddr; 2]> {
        if self.masquerade {
            Ok(NODE)
        } else {
            addresses(pod)
        }
    }
}

/// Makes the node strict: sources are looked at on all devices, what connection tracking
/// finds invalid is dropped wherever it is seen, and no connection is picked up in its
/// middle.
fn tighten(node: &Node) -> Result<()> {
    let devices = node.within(|| {
        let entries = std::fs::read_dir("/proc/sys/net/ipv4/conf")?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect::<Result<Vec<_>>>()
    })?;
    for device in devices {
        node.set_sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "1")?;
    }
    // The second table is what IPv6 has in place of rp_filter, as firewalld writes it.
    proxy::feed(
        node,
        "nft",
        &["-f", "-"],
        "table inet strict; delete table inet strict
        table ip6 sources; delete table ip6 sources
        table inet strict {
            chain prerouting {
                type filter hook prerouting priority mangle;
                ct state invalid counter drop
            }
            chain input { type filter hook input priority filter; ct state invalid counter drop; }
            chain forward {
                type filter hook forward priority filter; ct state invalid counter drop;
            }
            chain output { type filter hook output priority filter; ct state invalid counter drop; }
        }
        table ip6 sources {
            chain prerouting {
                type filter hook prerouting priority raw;
                icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
                fib saddr . mark . iif oif missing counter drop
            }
        }",
    )?;
    for setting in ["tcp_be_liberal", "tcp_loose"] {
        node.set_sysctl(&format!("net/netfilter/nf_conntrack_{setting}"), "0")?;
    }
    Ok(())
}

/// A pod's addresses, IPv4 first.
fn addresses(pod: &Pod) -> Result<[IpAddr; 2]> {
    Ok([pod.v4()?.into(), pod.v6()?.into()])
}

/// A pod that answers on [`POD_PORT`] with its name.
struct Server {
    pod: Pod,
    _listeners: Vec<EchoServer>,
}

impl Server {
    fn new(network: &Network<'_>, name: &str) -> Result<Self> {
        Self::of(network.pod(name)?, name)
    }

    fn of(pod: Pod, name: &str) -> Result<Self> {
        settle(&pod)?;
        let listeners = listen(&pod, &addresses(&pod)?, POD_PORT, name)?;
        Ok(Self {
            pod,
            _listeners: listeners,
        })
    }

    fn endpoints(&self) -> Result<Vec<SocketAddr>> {
        endpoints(&self.pod)
    }
}

/// Waits until a pod's addresses can be listened on.
fn settle(pod: &Pod) -> Result<()> {
    bpf_bridge_tests::wait_for("address that can be bound to", PATIENCE, || {
        for address in addresses(pod)? {
            pod.within(|| Ok(UdpSocket::bind((address, 0))?))?;
        }
        Ok(true)
    })
}

impl std::ops::Deref for Server {
    type Target = Pod;

    fn deref(&self) -> &Pod {
        &self.pod
    }
}

/// Where a pod serves.
fn endpoints(pod: &Pod) -> Result<Vec<SocketAddr>> {
    Ok(addresses(pod)?
        .map(|address| SocketAddr::new(address, POD_PORT))
        .to_vec())
}

fn listen(at: &Namespace, on: &[IpAddr], port: u16, name: &str) -> Result<Vec<EchoServer>> {
    on.iter()
        .map(|&address| EchoServer::start_as(at, (address, port).into(), name))
        .collect()
}

/// That every kind of client meets the server of this name, at once; whom it saw.
fn meets(from: &Namespace, to: SocketAddr, name: &str) -> Result<Vec<Meeting>> {
    // Datagrams first: the first packet is not sent twice, should it be lost.
    Client::ALL
        .into_iter()
        .rev()
        .map(|client| {
            let meeting = from
                .meet(client, to, PATIENCE)
                .with_context(|| format!("{client:?} to {to}"))?;
            ensure!(
                meeting.server == name,
                "{client:?} to {to} met {}",
                meeting.server
            );
            Ok(meeting)
        })
        .collect()
}

/// That every kind of client meets the server, which sees it as `client`.
fn meets_as(from: &Namespace, to: SocketAddr, name: &str, client: IpAddr) -> Result<()> {
    for meeting in meets(from, to, name)? {
        ensure!(
            meeting.client.ip() == client,
            "{to} sees {}, not {client}",
            meeting.client
        );
    }
    Ok(())
}

/// The unspecified address of a family.
fn unspecified_like(other: SocketAddr) -> IpAddr {
    if other.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    }
}

/// Both ends of a TCP connection, in the test's hands.
struct Connection {
    client: TcpStream,
    server: TcpStream,
}

impl Connection {
    /// Connects `from` a port (0 for any) `to` where `listener` hears of it.
    fn open(from: &Namespace, port: u16, to: SocketAddr, listener: &TcpListener) -> Result<Self> {
        let any = unspecified_like(to);
        let client = from.tcp_connect_from((any, port).into(), to, PATIENCE)?;
        ensure!(client.peer_addr()? == to);
        let (server, _) = listener.accept().context("accepting")?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
        }
        Ok(Self { client, server })
    }

    /// Closes it at once, with nothing left to wait for.
    fn abort(self) -> Result<()> {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&self.client, sockopt::Linger, &linger)?;
        drop(self.client);
        // The server is told.
        let server = self.server;
        let end = server.receive(&mut [0]);
        ensure!(!matches!(end, Ok(1)), "something was left");
        ensure!(
            !end.as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
            "the server was not told of the end"
        );
        Ok(())
    }

    /// Whom the server sees.
    fn seen(&self) -> Result<SocketAddr> {
        Ok(self.server.peer_addr()?)
    }

    /// The client says something, and the server hears it.
    fn ask(&mut self) -> Result<()> {
        send(&mut self.client, &mut self.server).context("from the client")
    }

    /// The server says something, and the client hears it.
    fn answer(&mut self) -> Result<()> {
        send(&mut self.server, &mut self.client).context("from the server")
    }
}

fn send(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    from.write_all(b"and now?")?;
    let mut heard = [0; 8];
    to.read_exact(&mut heard)?;
    ensure!(&heard == b"and now?", "{heard:?}");
    Ok(())
}

/// Packets that the stack sees before it routes them, counted by `what` they match.
struct Counter<'a> {
    node: &'a Node,
    name: String,
}

impl<'a> Counter<'a> {
    /// Counts in `chain`, a hook of netfilter, what matches an nft expression.
    fn new(node: &'a Node, hook: &str, what: &str) -> Result<Self> {
        let name = format!(
            "count_{hook}_{}",
            what.replace(|c: char| !c.is_alphanumeric(), "_")
        );
        let rules = format!(
            "table inet {name} {{
                chain seen {{ type filter hook {hook} priority raw; {what} counter; }}
            }}"
        );
        proxy::feed(node, "nft", &["-f", "-"], &rules)?;
        Ok(Self { node, name })
    }

    fn packets(&self) -> Result<u64> {
        let table = self
            .node
            .run(&format!("nft list table inet {}", self.name))?;
        let mut words = table
            .split_whitespace()
            .skip_while(|&word| word != "packets");
        let packets = words.nth(1).context("no counter")?;
        Ok(packets.parse()?)
    }
}

/// The frames that the gateway device got and sent.
fn gateway_frames(node: &Node) -> Result<[u64; 2]> {
    let links = node.json("ip -j -s link show dev cni0")?;
    let count = |way: &str| {
        links[0]["stats64"][way]["packets"]
            .as_u64()
            .with_context(|| format!("no counters in {links}"))
    };
    Ok([count("rx")?, count("tx")?])
}

/// The map of this name that the plugin has pinned.
fn pinned(node: &Node, map: &str) -> Result<String> {
    let pins = node.run("find /sys/fs/bpf/bpf-bridge -type f")?;
    let pin = pins
        .lines()
        .find(|pin| Path::new(pin).file_name().is_some_and(|name| name == map))
        .with_context(|| format!("no map {map} in {pins}"))?;
    Ok(pin.to_owned())
}

/// Empties a map, as if all of its entries had been evicted: how many there were.
fn evict(node: &Node, map: &str) -> Result<usize> {
    let pin = pinned(node, map)?;
    let entries = node.json(&format!("bpftool -j map dump pinned {pin}"))?;
    let entries = entries.as_array().context("no entries")?;
    for entry in entries {
        let key = entry["key"].as_array().context("a key is no bytes")?;
        let key: Vec<_> = key.iter().filter_map(Value::as_str).collect();
        node.run(&format!(
            "bpftool map delete pinned {pin} key hex {}",
            key.join(" ").replace("0x", "")
        ))?;
    }
    Ok(entries.len())
}
