//! What is forgotten, and what must be.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_bridge_tests::{
    EchoServer, Frame, MacAddr, Namespace, Network, Node, Packet, PacketSocket, Pod,
    ReceiveFrom as _, Snapshot,
};
use serde_json::json;

use crate::{
    By, NODE, OUTSIDE, PATIENCE, PINS, addresses, both, by_stack_and_programs, dump, each,
    flow::{Kind, Remote},
    is_stock, network, network_with, other_network, pod, remotes,
};

by_stack_and_programs! {
    flows_go_on_when_they_are_forgotten
    the_node_ends_no_connection_that_it_has_forgotten
    a_flood_of_flows_breaks_no_connection
    nothing_reaches_the_heir_of_an_address
    a_pod_may_ask_whom_it_has_answered
    an_answer_comes_in_time_or_is_none
}

/// Deletes all entries of a map, or of one whose keys begin with an address.
fn forget(node: &Node, map: &str) -> Result<usize> {
    let entries = dump(node, map)?;
    for (key, _) in &entries {
        let key: Vec<String> = key.iter().map(|byte| format!("{byte:02x}")).collect();
        node.run(&format!(
            "bpftool map delete pinned {PINS}/maps/{map} key hex {}",
            key.join(" ")
        ))?;
    }
    Ok(entries.len())
}

/// Makes all entries of a map 301 s older, be it older than the machine.
fn age(node: &Node, map: &str) -> Result<()> {
    const BY: u64 = 301_000_000_000;
    let hex =
        |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x} ")).collect() };
    for (key, mut value) in dump(node, map)? {
        let (seen, _) = value.split_first_chunk_mut().context("no time")?;
        *seen = u64::from_ne_bytes(*seen).wrapping_sub(BY).to_ne_bytes();
        node.run(&format!(
            "bpftool map update pinned {PINS}/maps/{map} key hex {} value hex {}",
            hex(&key),
            hex(&value)
        ))?;
    }
    Ok(())
}

fn bound(at: &Namespace, address: IpAddr, port: u16) -> Result<UdpSocket> {
    let socket = at.within(|| Ok(UdpSocket::bind((address, port))?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn hears(socket: &UdpSocket) -> Result<SocketAddr> {
    Ok(socket.receive_from(&mut [0; 10])?.1)
}

/// Long after the last packet of what the other one has begun.
fn a_pod_may_ask_whom_it_has_answered(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    for subnet in [Network::V4_SUBNET, Network::V6_SUBNET] {
        outside.route_to_node(subnet)?;
    }
    each([0, 1], |family: usize| {
        let there = bound(&outside, OUTSIDE[family], 7)?;
        let here = bound(&pod, addresses(&pod)?[family], 4000)?;
        let own = here.local_addr()?;
        there.send_to(b"?", own)?;
        hears(&here)?;
        for _ in 0..2 {
            here.send_to(b"!", there.local_addr()?)?;
            let seen = hears(&there)?;
            ensure!(seen == own, "an answer of {seen}");
        }
        age(&node, "FLOWS")?;
        here.send_to(b"?", there.local_addr()?)?;
        let seen = hears(&there)?;
        ensure!(seen.ip() == NODE[family], "a question of {seen}");
        there.send_to(b"!", seen)?;
        hears(&here).map(drop)
    })
}

/// Whoever speaks to the node's port long after a pod has used it means the node.
fn an_answer_comes_in_time_or_is_none(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    each([0, 1], |family: usize| {
        let there = bound(&outside, OUTSIDE[family], 7)?;
        let here = bound(&pod, addresses(&pod)?[family], 4000)?;
        here.send_to(b"?", there.local_addr()?)?;
        let seen = hears(&there)?;
        let of_node = bound(&node, seen.ip(), seen.port())?;
        there.send_to(b"!", seen)?;
        hears(&here).context("in time")?;
        age(&node, "REPLIES")?;
        there.send_to(b"?", seen)?;
        hears(&of_node).context("too late")?;
        here.send_to(b"?", there.local_addr()?)?;
        let again = hears(&there)?;
        ensure!(again == seen, "seen as {again}, not {seen}");
        there.send_to(b"!", again)?;
        hears(&here).context("in time again")?;
        // The same if half of the flow was forgotten meanwhile.
        age(&node, "REPLIES")?;
        forget(&node, "FLOWS")?;
        here.send_to(b"?", there.local_addr()?)?;
        there.send_to(b"!", hears(&there)?)?;
        hears(&here).context("half forgotten").map(drop)
    })
}

/// An eviction at any time: the next packet of either direction makes it good.
fn flows_go_on_when_they_are_forgotten(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pods = [network.pod("one")?, pod(&network, "two")?];
    let remotes = remotes(&outside)?;
    let rows = [Kind::Udp, Kind::Tcp, Kind::Echo, Kind::Sctp]
        .into_iter()
        .flat_map(|kind| {
            let both = [(kind, 0), (kind, 1)];
            let maps: &[&[&str]] = &[&["FLOWS"], &["REPLIES"], &["FLOWS", "REPLIES"]];
            both.into_iter()
                .flat_map(move |row| maps.iter().map(move |maps| (row, *maps)))
        });
    let mut port = 4000;
    each(rows, |((kind, family), maps)| {
        for remote_first in [false, true] {
            // Nobody could know whom the answer is for then.
            if remote_first && maps.contains(&"REPLIES") {
                continue;
            }
            port += 1;
            let mut flow = remotes[family].open(kind, &pods[0], port)?;
            let seen = flow.exchange()?;
            for map in maps {
                ensure!(forget(&node, map)? > 0, "{map} is empty");
            }
            if remote_first {
                flow.hears().context("the remote first")?;
            }
            ensure!(flow.exchange()? == seen, "seen as another");
            for map in maps.iter().rev() {
                forget(&node, map)?;
            }
            ensure!(flow.exchange()? == seen, "seen as another, again");
        }
        Ok(())
    })?;
    // Two that look the same, so that one has another port, are found again by what is
    // left of either.
    each(both(&Kind::FREE[..3]), |(kind, family)| {
        port += 1;
        let mut flows = pods
            .iter()
            .map(|pod| remotes[family].open(kind, pod, port))
            .collect::<Result<Vec<_>>>()?;
        for flow in &mut flows {
            flow.exchange()?;
        }
        for map in ["FLOWS", "REPLIES"] {
            forget(&node, map)?;
            for flow in flows.iter_mut().rev() {
                flow.exchange().with_context(|| format!("without {map}"))?;
            }
        }
        Ok(())
    })
}

/// If the remote speaks first, the node's own stack gets a segment that it knows nothing
/// of. The pod's next packet brings the connection back, and nothing is lost.
fn the_node_ends_no_connection_that_it_has_forgotten(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    for address in OUTSIDE {
        let listener = outside.within(|| Ok(TcpListener::bind((address, 0))?))?;
        let to = listener.local_addr()?;
        let mut near = pod.within(|| Ok(TcpStream::connect_timeout(&to, PATIENCE)?))?;
        let (mut far, _) = listener.accept()?;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(PATIENCE))?;
        }
        let mut buffer = [0; 4];
        near.write_all(b"ping")?;
        far.read_exact(&mut buffer)?;
        ensure!(forget(&node, "REPLIES")? > 0, "nothing was known");
        far.write_all(b"push")?;
        thread::sleep(Duration::from_millis(50));
        ensure!(far.take_error()?.is_none(), "the node has ended it");
        near.write_all(b"pong")?;
        far.read_exact(&mut buffer)?;
        ensure!(&buffer == b"pong", "the remote got {buffer:?}");
        near.read_exact(&mut buffer)?;
        ensure!(&buffer == b"push", "the pod got {buffer:?}");
    }
    // Whoever has no connection with anybody here is told so.
    for address in NODE {
        let refused = outside.within(|| Ok(TcpStream::connect((address, 9))))?;
        ensure!(refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused));
    }
    Ok(())
}

/// More flows than are remembered.
fn a_flood_of_flows_breaks_no_connection(by: By) -> Result<()> {
    /// As many as the tables have places, and some more.
    const FLOWS: u32 = 140_000;
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pods = [network.pod("calm")?, pod(&network, "flood")?];
    let remotes = remotes(&outside)?;
    outside.ip("route add blackhole 198.18.0.0/15")?;
    let mut flows = both(&[Kind::Tcp, Kind::Udp])
        .into_iter()
        .map(|(kind, family)| remotes[family].open(kind, &pods[0], 0))
        .collect::<Result<Vec<_>>>()?;
    for flow in &mut flows {
        flow.exchange()?;
    }
    let wire = PacketSocket::open(&pods[1], "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&pods[1], "eth0")?,
        MacAddr::of_device(&node, "cni0")?,
    );
    let own = SocketAddr::new(addresses(&pods[1])?[0], 4000);
    for number in 0..FLOWS {
        // Addresses for tests of this kind (RFC 2544).
        let [_, a, b, c] = number.to_be_bytes();
        let remote = SocketAddr::from(([198, 18 + (a & 1), b, c], 1024 + u16::from(a)));
        let datagram = Packet::udp(own, remote, &[]);
        wire.send(&Frame::ip(to, from, &datagram.bytes()))?;
        if number % 10_000 == 0 {
            // One is busy, the others idle.
            flows[0]
                .exchange()
                .with_context(|| format!("after {number} others"))?;
        }
    }
    for flow in &mut flows {
        // Forgotten, all of it: the pod is the one to speak.
        flow.exchange()?;
    }
    Ok(())
}

/// A remote that never stops answering a pod that is gone; another gets its address.
fn nothing_reaches_the_heir_of_an_address(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let more = match by {
        By::Stack => json!({}),
        By::Programs => json!({"netfilter": "none"}),
    };
    let mut more = more;
    // There is no other.
    more["ipam"] = json!({"type": "host-local", "ranges": [
        [{"subnet": Network::V4_SUBNET, "rangeStart": "10.77.0.9", "rangeEnd": "10.77.0.9"}],
        [{"subnet": Network::V6_SUBNET, "rangeStart": "fd77::9", "rangeEnd": "fd77::9"}],
    ]});
    let network = network_with(&node, &more);
    let first = pod(&network, "first")?;
    let own = addresses(&first)?;
    let (mut sockets, mut seen) = (Vec::new(), Vec::new());
    for address in OUTSIDE {
        let remote = outside.within(|| Ok(UdpSocket::bind((address, 7))?))?;
        remote.set_read_timeout(Some(PATIENCE))?;
        let any: IpAddr = if address.is_ipv4() {
            [0; 4].into()
        } else {
            [0; 16].into()
        };
        let socket =
            first.within(|| Ok(UdpSocket::bind((any, 4000 + u16::from(address.is_ipv6())))?))?;
        socket.send_to(b"?", (address, 7))?;
        seen.push(remote.receive_from(&mut [0; 10])?.1);
        sockets.push(remote);
    }
    ensure!(
        seen.iter().zip(NODE).all(|(seen, node)| seen.ip() == node),
        "{seen:?}"
    );
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let stream = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                for (socket, seen) in sockets.iter().zip(&seen) {
                    // The node may say that nobody is there.
                    let _ = socket.send_to(b"stale", seen);
                }
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        let heirs = || -> Result<()> {
            let mut last: Pod = first;
            for round in 0..3 {
                network.del(last.attachment())?;
                drop(last);
                let heir = network.pod(&format!("heir{round}"))?;
                ensure!(addresses(&heir)? == own, "another address");
                let wire = PacketSocket::open(&heir, "eth0")?;
                let stale = wire.receive(Duration::from_millis(150), |frame| {
                    frame.bytes.windows(5).any(|bytes| bytes == b"stale")
                })?;
                ensure!(stale.is_none(), "round {round}: {stale:?}");
                // And what it asks itself is answered.
                for (kind, address) in [Kind::Udp, Kind::Tcp].iter().zip(OUTSIDE) {
                    let server = EchoServer::start(&outside, address)?;
                    heir.udp_echo(server.address(), b"mine", PATIENCE)
                        .with_context(|| format!("{kind:?}"))?;
                    heir.tcp_echo(server.address(), b"mine", PATIENCE)?;
                }
                last = heir;
            }
            Ok(())
        };
        let done = heirs();
        stop.store(true, Ordering::Relaxed);
        stream
            .join()
            .map_err(|_| anyhow!("the stream panicked"))??;
        done
    })
}

/// Nothing is left of a pod that is gone, whoever it spoke to.
#[test]
fn nothing_is_left() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network_with(
        &node,
        &json!({"ipMasqExempt": ["203.0.113.0/24", "2001:db8:e::/64"]}),
    );
    let _neighbour = pod(&network, "neighbour")?;
    let remotes = remotes(&outside)?;
    // Once, for what stays.
    network.del(network.pod("before")?.attachment())?;
    let before = Snapshot::take(&node)?;
    for round in 0..3 {
        let pod = pod(&network, "pod")?;
        crate::reaches_by(&Kind::PORTS, &pod, &remotes, NODE)?;
        match round {
            0 => network.del(pod.attachment())?,
            1 => network.gc(&[_neighbour.attachment()])?,
            _ => {
                let attachment = pod.attachment().clone();
                drop(pod);
                network.del(&attachment.without_netns())?;
            }
        }
        before
            .ensure_same(&Snapshot::take(&node)?)
            .with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

/// CHECK sees that a pod is not masqueraded any more, whatever the reason.
#[test]
fn check_sees_what_is_missing() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node);
    let pod = pod(&network, "pod")?;
    network.check(pod.attachment())?;
    ensure!(forget(&node, "MASQUERADED")? == 2);
    let error = network
        .check(pod.attachment())
        .err()
        .context("CHECK saw nothing")?;
    ensure!(format!("{error:#}").contains("masquerade"), "{error:#}");
    network.del(pod.attachment())
}

/// Calls that come from other networks, and a network that changes its mind.
#[test]
fn a_network_may_change_its_mind() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    for subnet in [Network::V4_SUBNET, Network::V6_SUBNET] {
        outside.route_to_node(subnet)?;
    }
    let remotes: [Remote; 2] = remotes(&outside)?;
    let kinds = &Kind::PORTS;
    let before = network(&node);
    let old = pod(&before, "old")?;
    let plain = network_with(&node, &json!({"ipMasq": false}));
    let new = pod(&plain, "new")?;
    let other = pod(&other_network(&node), "other")?;
    // Each pod stays what it was made as.
    crate::reaches_by(kinds, &old, &remotes, NODE)?;
    crate::reaches_by(kinds, &new, &remotes, addresses(&new)?)?;
    crate::reaches_by(kinds, &other, &remotes, NODE)?;
    // And is undone as what it was made as.
    plain.del(old.attachment())?;
    if !is_stock(&node) {
        ensure!(dump(&node, "MASQUERADED")?.len() == 2, "of the other one");
    }
    Ok(())
}
