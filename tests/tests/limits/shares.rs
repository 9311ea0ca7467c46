//! What one pod sends, or is sent, takes nothing from what other pods have of the tables
//! that they share.
//!
//! Each flood would be enough: the same is done on a node where a pod may have all of the
//! table, and there it does take it. (Two pods make it, as one that has a whole table forgets
//! its own.)

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_tests::{
    Frame, MacAddr, Namespace, Network, Node, Outside, Packet, PacketSocket, Pod, ReceiveFrom as _,
};
use serde_json::{Value, json};

use crate::{network, node, other_network};

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what must not happen.
const SILENCE: Duration = Duration::from_millis(200);
/// The least that the limits allow.
const LIMIT: u32 = 1024;
/// Of fragments an eighth as many can wait, and a table of less than that is not exact.
const FRAGMENTS: u32 = 4096;
/// More than enough to fill a table of that.
const FLOOD: u16 = 8192;

/// The identification of a datagram in fragments; the floods begin at 0, and all come from
/// the node's address in the end.
const ID: u16 = 60_000;

/// Runs a test with shares, where it must succeed, and without, where it must not.
fn only_with_shares(work: impl Fn(&Node) -> Result<bool>) -> Result<()> {
    let limits = json!({"learned": LIMIT, "flows": LIMIT, "fragments": FRAGMENTS});
    let node = node(&limits)?;
    ensure!(work(&node)?, "it was lost");
    drop(node);
    let settings = json!({"limits": limits, "podLimits": limits});
    // A busy machine may lose a part of the flood.
    for _ in 0..4 {
        let node = Node::new()?;
        node.set_settings(&settings.to_string())?;
        if !work(&node)? {
            return Ok(());
        }
    }
    bail!("the flood was not enough")
}

/// A way to send frames of one's own.
struct Wire {
    socket: PacketSocket,
    to: MacAddr,
    from: MacAddr,
}

impl Wire {
    /// From a pod to its gateway.
    fn of_pod(pod: &Pod, node: &Node) -> Result<Self> {
        Self::new(pod, MacAddr::of_device(node, "cni0")?)
    }

    /// From the outside to the node.
    fn of_outside(outside: &Outside, node: &Node) -> Result<Self> {
        Self::new(outside, MacAddr::of_device(node, Outside::UPLINK)?)
    }

    fn new(from: &Namespace, to: MacAddr) -> Result<Self> {
        Ok(Self {
            socket: PacketSocket::open(from, "eth0")?,
            to,
            from: MacAddr::of_device(from, "eth0")?,
        })
    }

    fn send(&self, packet: &[u8]) -> Result<()> {
        self.socket.send(&Frame::ip(self.to, self.from, packet))
    }
}

fn bound(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket> {
    let socket = namespace.within(|| Ok(UdpSocket::bind(address)?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Whether a datagram of `length` bytes comes from there.
fn hears(socket: &UdpSocket, from: SocketAddr, length: usize, limit: Duration) -> Result<bool> {
    socket.set_read_timeout(Some(limit))?;
    let mut buffer = [0; 4096];
    match socket.receive_from(&mut buffer) {
        Ok((heard, source)) => {
            ensure!((heard, source) == (length, from), "{heard} from {source}");
            Ok(true)
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether it was lost is known sooner than whether it comes.
fn patience(node: &Node) -> Result<Duration> {
    let text = node.run("cat /etc/bpf-bridge/node.json")?;
    Ok(if text.contains("podLimits") {
        SILENCE
    } else {
        PATIENCE
    })
}

fn masquerading(node: &Node) -> Network<'_> {
    network(node, &json!({"ipMasq": true}))
}

/// Datagrams of a pod to many others outside.
fn asks_many(pod: &Pod, wire: &Wire) -> Result<()> {
    let from = pod.v4()?;
    for number in 0..FLOOD {
        let to = (Outside::V4, 10_000 + number).into();
        wire.send(&Packet::udp((from, 5000 + number).into(), to, b"").bytes())?;
    }
    Ok(())
}

/// A pod sends to thousands of others outside; another one's remote, to which it has sent
/// once, can speak first still.
#[test]
fn flows_to_outside() -> Result<()> {
    only_with_shares(|node| {
        let outside = node.outside()?;
        let network = masquerading(node);
        let (bad, worse) = (network.pod("bad")?, network.pod("worse")?);
        let good = network.pod("good")?;
        let remote = bound(&outside, (Outside::V4, 7).into())?;
        let socket = bound(&good, (good.v4()?, 4000).into())?;
        socket.send_to(b"hello", remote.local_addr()?)?;
        let (_, seen) = remote.receive_from(&mut [0; 64]).context("the remote")?;

        for bad in [&bad, &worse] {
            asks_many(bad, &Wire::of_pod(bad, node)?)?;
        }
        remote.send_to(b"are you there?", seen)?;
        hears(&socket, remote.local_addr()?, 14, patience(node)?)
    })
}

/// The same from a network whose pods netfilter masquerades: what it has translated is
/// remembered too, and whose it was is not known any more.
#[test]
fn flows_that_netfilter_translates() -> Result<()> {
    only_with_shares(|node| {
        let outside = node.outside()?;
        let network = masquerading(node);
        let by_netfilter = json!({"ipMasq": true, "ipMasqBackend": "nftables"});
        let other = other_network(node, &by_netfilter);
        let (bad, worse) = (other.pod("bad")?, network.pod("worse")?);
        let good = network.pod("good")?;
        let remote = bound(&outside, (Outside::V4, 7).into())?;
        let socket = bound(&good, (good.v4()?, 4000).into())?;
        socket.send_to(b"hello", remote.local_addr()?)?;
        let (_, seen) = remote.receive_from(&mut [0; 64]).context("the remote")?;

        let cni1 = MacAddr::of_device(node, "cni1")?;
        asks_many(&worse, &Wire::of_pod(&worse, node)?)?;
        asks_many(&bad, &Wire::new(&bad, cni1)?)?;
        let held =
            node.json("bpftool -j map dump pinned /sys/fs/bpf/bpf-bridge/v1/maps/REPLIES")?;
        ensure!(
            held.as_array().is_some_and(|held| held.len() > 100),
            "nothing was noted"
        );
        remote.send_to(b"are you there?", seen)?;
        // What of the flow the pod's side remembers is not enough for that.
        hears(&socket, remote.local_addr()?, 14, patience(node)?)
    })
}

/// Thousands of clients ask a published port; the server of another one, which was asked
/// once, can speak first still.
#[test]
fn flows_of_clients_outside() -> Result<()> {
    only_with_shares(|node| {
        let outside = node.outside()?;
        let network = network(node, &json!({}));
        let port = |host: u16| -> Value {
            json!([{"hostPort": host, "containerPort": 80, "protocol": "udp"}])
        };
        let bad = network.pod_with_ports("bad", port(9090))?;
        let worse = network.pod_with_ports("worse", port(9091))?;
        let good = network.pod_with_ports("good", port(8080))?;
        // That nobody listens would be told.
        let _silent = (
            bound(&bad, (bad.v4()?, 80).into())?,
            bound(&worse, (worse.v4()?, 80).into())?,
        );
        let server = bound(&good, (good.v4()?, 80).into())?;
        let client = bound(&outside, (Outside::V4, 4000).into())?;
        let address = (Outside::NODE_V4, 8080).into();
        client.send_to(b"hello", address)?;
        let (_, seen) = server.receive_from(&mut [0; 64]).context("the server")?;

        let wire = Wire::of_outside(&outside, node)?;
        for number in 0..FLOOD {
            let from = (Outside::V4, 5000 + number).into();
            for port in [9090, 9091] {
                let to = (Outside::NODE_V4, port).into();
                wire.send(&Packet::udp(from, to, b"").bytes())?;
            }
        }
        server.send_to(b"are you there?", seen)?;
        // Untranslated it comes from the pod, which `hears` does not accept.
        let heard = hears(&client, address, 14, patience(node)?);
        Ok(heard.unwrap_or(false))
    })
}

/// A pod of the same network is a client like others, but the flows are its own.
#[test]
fn flows_of_clients_in_pods() -> Result<()> {
    only_with_shares(|node| {
        let outside = node.outside()?;
        let network = network(node, &json!({}));
        let (bad, worse) = (network.pod("bad")?, network.pod("worse")?);
        let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}]);
        let good = network.pod_with_ports("good", ports)?;
        let server = bound(&good, (good.v4()?, 80).into())?;
        let client = bound(&outside, (Outside::V4, 4000).into())?;
        let address = (Outside::NODE_V4, 8080).into();
        client.send_to(b"hello", address)?;
        let (_, seen) = server.receive_from(&mut [0; 64]).context("the server")?;

        for bad in [&bad, &worse] {
            let wire = Wire::of_pod(bad, node)?;
            for number in 0..FLOOD {
                let from = (bad.v4()?, 5000 + number).into();
                wire.send(&Packet::udp(from, address, b"").bytes())?;
            }
        }
        server.send_to(b"are you there?", seen)?;
        let heard = hears(&client, address, 14, patience(node)?);
        Ok(heard.unwrap_or(false))
    })
}

/// A pod begins thousands of datagrams that it does not end, while another one's waits for
/// its second half.
#[test]
fn fragments() -> Result<()> {
    only_with_shares(|node| {
        let outside = node.outside()?;
        let network = masquerading(node);
        let (bad, worse) = (network.pod("bad")?, network.pod("worse")?);
        let good = network.pod("good")?;
        let remote = bound(&outside, (Outside::V4, 7).into())?;
        let good_wire = Wire::of_pod(&good, node)?;
        // So that nobody has to be looked for while fragments wait.
        let from = (good.v4()?, 4000).into();
        let whole = Packet::udp(from, remote.local_addr()?, b"hello");
        good_wire.send(&whole.bytes())?;
        remote.receive_from(&mut [0; 64]).context("the remote")?;

        // All come from the node, many at once, and not one datagram's after the other's.
        outside.set_sysctl("net/ipv4/ipfrag_max_dist", "0")?;
        outside.set_sysctl("net/ipv4/ipfrag_high_thresh", "268435456")?;
        let halves = Packet::udp(from, remote.local_addr()?, &[0; 1800]).fragments(ID, 1104);
        good_wire.send(&halves[0])?;
        for bad in [&bad, &worse] {
            let wire = Wire::of_pod(bad, node)?;
            let begun = Packet::udp((bad.v4()?, 5000).into(), remote.local_addr()?, &[0; 64]);
            for number in 0..u16::try_from(FRAGMENTS)? {
                wire.send(&begun.fragments(number, 64)[0])?;
            }
        }
        good_wire.send(&halves[1])?;
        let from = (Outside::NODE_V4, 4000).into();
        hears(&remote, from, 1800, patience(node)?)
    })
}

/// A pod sends thousands of fragments whose datagrams have not begun, while another one's
/// waits for the first.
#[test]
fn fragments_that_wait() -> Result<()> {
    only_with_shares(|node| {
        let outside = node.outside()?;
        let network = masquerading(node);
        let (bad, worse) = (network.pod("bad")?, network.pod("worse")?);
        let good = network.pod("good")?;
        let remote = bound(&outside, (Outside::V4, 7).into())?;
        let good_wire = Wire::of_pod(&good, node)?;
        let from = (good.v4()?, 4000).into();
        let whole = Packet::udp(from, remote.local_addr()?, b"hello");
        good_wire.send(&whole.bytes())?;
        remote.receive_from(&mut [0; 64]).context("the remote")?;

        let halves = Packet::udp(from, remote.local_addr()?, &[0; 1800]).fragments(ID, 1104);
        good_wire.send(&halves[1])?;
        for bad in [&bad, &worse] {
            let wire = Wire::of_pod(bad, node)?;
            let begun = Packet::udp((bad.v4()?, 5000).into(), remote.local_addr()?, &[0; 64]);
            for number in 0..u16::try_from(LIMIT)? {
                wire.send(&begun.fragments(number, 64)[1])?;
            }
        }
        good_wire.send(&halves[0])?;
        let from = (Outside::NODE_V4, 4000).into();
        hears(&remote, from, 1800, patience(node)?)
    })
}

/// A pod sends from thousands of addresses; one that was learned from another pod is found
/// there still, and nobody else gets what is for it.
#[test]
fn learned_addresses() -> Result<()> {
    const NESTED: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    only_with_shares(|node| {
        let network = network(node, &json!({}));
        let pods = ["bad", "worse", "good", "asker", "other"].map(|name| network.pod(name));
        let [bad, worse, good, asker, other] = pods;
        let (bad, worse, good) = (bad?, worse?, good?);
        let (asker, other) = (asker?, other?);
        let open = |pod: &Pod| PacketSocket::open(pod, "eth0");
        let (bad, worse, good) = (open(&bad)?, open(&worse)?, open(&good)?);
        let (asker, other) = (open(&asker)?, open(&other)?);
        let frame = |to, from, number: u16| {
            Frame::new(to, from, Frame::EXPERIMENTAL, &number.to_be_bytes())
        };
        good.send(&frame(MacAddr::BROADCAST, NESTED, 0))?;
        for number in 0..FLOOD {
            let [high, low] = number.to_be_bytes();
            // To itself: it goes no further.
            for (bad, socket) in [(1, &bad), (2, &worse)] {
                let from = MacAddr([2, 0, 0, bad, high, low]);
                socket.send(&frame(from, from, number))?;
            }
        }
        let sent = frame(NESTED, MacAddr([2, 0, 0, 0, 0, 2]), 1);
        asker.send(&sent)?;
        let is_it = |captured: &bpf_bridge_tests::Captured| captured.bytes.starts_with(&NESTED.0);
        good.receive(PATIENCE, is_it)?.context("it did not come")?;
        Ok(other.receive(SILENCE, is_it)?.is_none())
    })
}
