//! Flows that would look the same outside of the node.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_bridge_tests::{
    Client, EchoServer, Frame, MacAddr, Meeting, Namespace, Network, Node, Offload, Outside,
    Packet, PacketSocket, Pod, Receive as _, when_free,
};
use nix::{
    libc,
    sched::{CloneFlags, unshare},
};
use serde_json::json;

use crate::{
    By, Drops, GATEWAYS, IPTABLES, NODE, OUTSIDE, PATIENCE, addresses, all_differ, both,
    by_stack_and_programs, drops, each,
    flow::{Flow, Kind, PORT, Remote},
    is_stock, network, other_network, pod, publishing_network, remotes, settle,
};

const HOST_PORT: u16 = 8080;
const POD_PORT: u16 = 80;

by_stack_and_programs! {
    flows_of_one_port_to_one_remote_are_told_apart
    ports_are_kept_where_nobody_is_in_the_way
    what_cannot_be_told_apart_is_dropped_and_counted
    ten_thousand_connections_of_a_pod_to_one_remote
    when_no_port_is_left_that_is_counted
    a_port_may_be_used_again
    a_port_that_was_given_to_who_gave_way_is_taken
}

/// Who speaks to the outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Who {
    Pod,
    Neighbour,
    /// A pod of another network.
    Foreigner,
    Node,
    /// A machine behind the node that netfilter masquerades.
    Guest,
}
use Who::{Foreigner, Guest, Neighbour, Pod as APod};

/// All of them, around a node.
struct Everybody<'node> {
    node: &'node Node,
    network: Network<'node>,
    pod: Pod,
    neighbour: Pod,
    foreigner: Pod,
    guest: Namespace,
}

impl<'node> Everybody<'node> {
    fn new(node: &'node Node, by: By) -> Result<Self> {
        let (network, other) = (by.network(node), other_network(node));
        let (first, neighbour) = (network.pod("pod")?, network.pod("neighbour")?);
        Ok(Self {
            node,
            pod: first,
            neighbour,
            foreigner: pod(&other, "foreigner")?,
            network,
            guest: guest(node)?,
        })
    }

    fn who(&self, who: Who) -> &Namespace {
        match who {
            APod => &self.pod,
            Neighbour => &self.neighbour,
            Foreigner => &self.foreigner,
            Who::Node => self.node,
            Guest => &self.guest,
        }
    }
}

/// A machine whose way to the outside is masqueraded by netfilter.
fn guest(node: &Node) -> Result<Namespace> {
    let guest = node.machine()?;
    node.connect("guest0", &guest, "eth0")?;
    node.ip("addr add 192.0.2.1/24 dev guest0\naddr add 2001:db8:9::1/64 dev guest0 nodad")?;
    guest.ip("addr add 192.0.2.2/24 dev eth0\n\
         addr add 2001:db8:9::2/64 dev eth0 nodad\n\
         route add default via 192.0.2.1\n\
         route add default via 2001:db8:9::1")?;
    for (iptables, subnet) in IPTABLES
        .into_iter()
        .zip(["192.0.2.0/24", "2001:db8:9::/64"])
    {
        node.run(&format!(
            "{iptables} -t nat -A POSTROUTING -s {subnet} -o uplink0 -j MASQUERADE"
        ))?;
    }
    // Its neighbours are there with the first network.
    node.set_sysctl("net/ipv4/ip_forward", "1")?;
    node.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
    Ok(guest)
}

/// Flows from one port by everybody in this order. Each hears what was said to it and
/// nothing else, also when all are there.
fn all_are_told_apart(
    all: &Everybody,
    order: &[Who],
    remote: &Remote,
    kind: Kind,
    port: u16,
) -> Result<()> {
    let mut flows: Vec<(Who, Flow)> = Vec::new();
    for &who in order {
        let mut flow = remote.open(kind, all.who(who), port)?;
        flow.exchange().with_context(|| format!("{who:?}"))?;
        flows.push((who, flow));
    }
    for _ in 0..2 {
        for (who, flow) in &mut flows {
            flow.exchange()
                .with_context(|| format!("{who:?}, with all there"))?;
        }
    }
    let seen: Vec<_> = flows.iter().filter_map(|(_, flow)| flow.seen).collect();
    all_differ(&seen)?;
    let node = NODE[usize::from(remote.address.is_ipv6())];
    ensure!(seen.iter().all(|seen| seen.ip() == node), "{seen:?}");
    Ok(())
}

fn flows_of_one_port_to_one_remote_are_told_apart(by: By) -> Result<()> {
    const ORDERS: &[&[Who]] = &[
        &[APod, Neighbour],
        &[APod, Foreigner],
        &[APod, Who::Node],
        &[Who::Node, APod],
        &[APod, Guest],
        &[Guest, APod],
        &[APod, Neighbour, Foreigner, Who::Node, Guest],
        &[Neighbour, Foreigner, Who::Node, Guest, APod],
        &[Foreigner, Who::Node, Guest, APod, Neighbour],
        &[Who::Node, Guest, APod, Neighbour, Foreigner],
        &[Guest, APod, Neighbour, Foreigner, Who::Node],
    ];
    let node = Node::new()?;
    let outside = node.outside()?;
    let all = Everybody::new(&node, by)?;
    let remotes = remotes(&outside)?;
    let mut port = 5000;
    let rows = ORDERS.iter().flat_map(|order| {
        both(&Kind::FREE)
            .into_iter()
            .map(move |(kind, family)| (order, kind, family))
    });
    each(rows, |(order, kind, family)| {
        port += 1;
        all_are_told_apart(&all, order, &remotes[family], kind, port)
    })
}

/// A flow that the stack has made gives way to a pod's, and so has a port that it does not
/// know of. The next one of the stack's, which comes from that port, must not meet it there.
fn a_port_that_was_given_to_who_gave_way_is_taken(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let all = Everybody::new(&node, by)?;
    let remotes = remotes(&outside)?;
    let mut port = 6000;
    let rows = [Guest, Who::Node].into_iter().flat_map(|who| {
        both(&[Kind::Udp, Kind::Tcp])
            .into_iter()
            .map(move |(kind, family)| (who, kind, family))
    });
    each(rows, |(who, kind, family)| {
        port += 1;
        let remote = &remotes[family];
        let mut flows = vec![remote.open(kind, &all.pod, port)?];
        flows[0].exchange()?;
        flows.push(remote.open(kind, all.who(who), port)?);
        let given = flows[1].exchange()?.port();
        ensure!(given != port, "it kept {port}");
        flows.push(remote.open(kind, all.who(who), given)?);
        for _ in 0..2 {
            for flow in &mut flows {
                flow.exchange()?;
            }
        }
        let seen: Vec<_> = flows.iter().filter_map(|flow| flow.seen).collect();
        all_differ(&seen)
    })
}

/// Another port of the remote is another flow, of which the port can be kept.
fn ports_are_kept_where_nobody_is_in_the_way(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let all = Everybody::new(&node, by)?;
    for (address, node) in OUTSIDE.into_iter().zip(NODE) {
        let remotes = [
            Remote::on(&outside, (address, 9000))?,
            Remote::on(&outside, (address, 9001))?,
        ];
        for kind in [Kind::Udp, Kind::Tcp, Kind::Sctp] {
            let mut one = remotes[0].open(kind, &all.pod, 4000)?;
            let mut two = remotes[1].open(kind, &all.neighbour, 4000)?;
            for _ in 0..2 {
                for flow in [&mut one, &mut two] {
                    ensure!(flow.exchange()? == (node, 4000).into(), "{:?}", flow.seen);
                }
            }
        }
    }
    Ok(())
}

/// Where the port cannot be changed, the second is not served, and that is counted.
fn what_cannot_be_told_apart_is_dropped_and_counted(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let all = Everybody::new(&node, by)?;
    let remotes = remotes(&outside)?;
    let reasons = [Drops::Exhausted, Drops::NotTranslatable];
    let kinds = [Kind::Sctp, Kind::Portless(47), Kind::Portless(253)];
    each(both(&kinds), |(kind, family)| {
        // Netfilter computes SCTP's checksum anew.
        if is_stock(&node) && kind == Kind::Sctp {
            return Ok(());
        }
        let remote = &remotes[family];
        let mut first = remote.open(kind, &all.pod, 4000)?;
        first.exchange()?;
        let before = drops(&all.neighbour, &all.network, &reasons);
        remote.never_meets(kind, &all.neighbour, 4000)?;
        if !is_stock(&node) {
            let counted = drops(&all.neighbour, &all.network, &reasons)? - before?;
            ensure!(counted == 1, "counted {counted}");
        }
        first.exchange()?;
        first.exchange().map(drop)
    })
}

/// Gives the thread a table of descriptors of its own, with one of them: a process may
/// not have enough for both ends of so many connections.
fn leave_descriptors_but(listener: &TcpListener) -> Result<()> {
    unshare(CloneFlags::CLONE_FILES)?;
    let own = libc::c_uint::try_from(listener.as_raw_fd())?;
    for (first, last) in [(0, own - 1), (own + 1, libc::c_uint::MAX)] {
        // SAFETY: nothing else is used by this thread, and no other uses its table.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        ensure!(
            closed == 0,
            "closing descriptors: {}",
            io::Error::last_os_error()
        );
    }
    Ok(())
}

/// More than the kernel would let itself have to one remote, if pods shared its ports:
/// each with a token of its own.
fn ten_thousand_connections_of_a_pod_to_one_remote(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let all = Everybody::new(&node, by)?;
    // From the same ports, both of them.
    for pod in [&all.pod, &all.neighbour] {
        pod.set_sysctl("net/ipv4/ip_local_port_range", "20000 32000")?;
    }
    for (address, [first, second]) in OUTSIDE.into_iter().zip([[10_000, 1_000], [1_000, 1_000]]) {
        let listener = outside.within(|| Ok(TcpListener::bind((address, PORT))?))?;
        let server = listener.local_addr()?;
        let (again, wait) = mpsc::channel();
        let echoes = thread::spawn(move || -> Result<()> {
            leave_descriptors_but(&listener)?;
            let mut connections = Vec::new();
            let mut token = [0; 8];
            for stream in listener.incoming() {
                let mut stream = stream?;
                stream.read_exact(&mut token)?;
                stream.write_all(&token)?;
                connections.push(stream);
                if connections.len() == first + second {
                    break;
                }
            }
            wait.recv()?;
            for mut stream in &connections {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.read_exact(&mut token)?;
                stream.write_all(&token)?;
            }
            Ok(())
        });
        let before = drops(&all.pod, &all.network, &[Drops::Exhausted]);
        let says = |mut stream: &TcpStream, number: usize| -> Result<()> {
            let token = number.to_be_bytes();
            stream.write_all(&token)?;
            let mut echo = [0; 8];
            stream.read_exact(&mut echo)?;
            ensure!(echo == token, "{token:x?} came back as {echo:x?}");
            Ok(())
        };
        let mut connections = Vec::new();
        for (pod, count) in [(&all.pod, first), (&all.neighbour, second)] {
            let some = pod.within(|| {
                (0..count)
                    .map(|number| {
                        let stream = TcpStream::connect_timeout(&server, PATIENCE)
                            .with_context(|| format!("connection {number} to {server}"))?;
                        stream.set_read_timeout(Some(PATIENCE))?;
                        says(&stream, number)?;
                        Ok(stream)
                    })
                    .collect::<Result<Vec<_>>>()
            });
            connections.extend(some.with_context(|| {
                let after = drops(&all.pod, &all.network, &[Drops::Exhausted]);
                format!("dropped for want of ports: before {before:?}, after {after:?}")
            })?);
        }
        again.send(())?;
        for (number, stream) in connections.iter().enumerate() {
            says(stream, number ^ 0x5555_5555)
                .with_context(|| format!("connection {number} to {server}, again"))?;
        }
        echoes
            .join()
            .map_err(|_| anyhow!("the server panicked"))??;
    }
    Ok(())
}

/// One pod takes every port: others are refused and counted, and hear nothing of it.
fn when_no_port_is_left_that_is_counted(by: By) -> Result<()> {
    const LATE: u16 = 200;
    let node = Node::new()?;
    // Its share of flows is not what stops it.
    node.set_settings(r#"{"podLimits": {"flows": 131072}}"#)?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let greedy = network.pod("greedy")?;
    let late = pod(&network, "late")?;
    let wire = PacketSocket::open(&greedy, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&greedy, "eth0")?,
        MacAddr::of_device(&node, "cni0")?,
    );
    let remotes = remotes(&outside)?;
    let before = drops(&late, &network, &[Drops::Exhausted])?;
    let remote = &remotes[0];
    let mut first: Vec<Flow> = [1024, 30_000, 65_535]
        .into_iter()
        .map(|port| remote.open(Kind::Udp, &greedy, port))
        .collect::<Result<_>>()?;
    for flow in &mut first {
        flow.exchange()?;
    }
    for port in 1..=u16::MAX {
        let datagram = Packet::udp(
            (addresses(&greedy)?[0], port).into(),
            remote.address,
            b"mine",
        );
        wire.send(&Frame::ip(to, from, &datagram.bytes()))?;
    }
    ensure!(drops(&greedy, &network, &[Drops::Exhausted])? < 200);
    let mut reached = Vec::new();
    for number in 0..LATE {
        let mut flow = remote.open(Kind::Udp, &late, 10_000 + number * 7)?;
        flow.limit = Duration::from_millis(2);
        if flow.says().is_ok() {
            reached.push(flow);
        }
    }
    let exhausted = drops(&late, &network, &[Drops::Exhausted])? - before;
    ensure!(exhausted > 0, "{} of {LATE} found a port", reached.len());
    ensure!(
        exhausted + u64::try_from(reached.len())? == u64::from(LATE),
        "{exhausted} dropped, {} seen",
        reached.len()
    );
    for flow in first.iter_mut().chain(&mut reached) {
        flow.limit = PATIENCE;
        flow.exchange()?;
    }
    Ok(())
}

/// What serves published ports on the uplink.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Serves {
    Tc,
    /// XDP, of what it can do.
    Xdp,
}

impl Serves {
    /// One whose packets XDP serves, if it does.
    fn outside(self, node: &Node) -> Result<Outside> {
        let outside = node.outside()?;
        if self == Self::Xdp {
            outside.set_offload("eth0", Offload::TxChecksum, false)?;
        }
        Ok(outside)
    }

    fn network(self, node: &Node) -> Network<'_> {
        publishing_network(
            node,
            &match self {
                Self::Tc => json!({}),
                Self::Xdp => json!({"xdpUplinks": ["uplink0"]}),
            },
        )
    }
}

mod tc {
    #[test]
    fn a_published_number_may_be_a_source_port() -> anyhow::Result<()> {
        super::a_published_number_may_be_a_source_port(super::Serves::Tc)
    }
    #[test]
    fn replies_to_what_netfilter_masquerades_are_not_captured() -> anyhow::Result<()> {
        super::replies_to_what_netfilter_masquerades_are_not_captured(super::Serves::Tc)
    }
}

mod xdp {
    #[test]
    fn a_published_number_may_be_a_source_port() -> anyhow::Result<()> {
        super::a_published_number_may_be_a_source_port(super::Serves::Xdp)
    }
    #[test]
    fn replies_to_what_netfilter_masquerades_are_not_captured() -> anyhow::Result<()> {
        super::replies_to_what_netfilter_masquerades_are_not_captured(super::Serves::Xdp)
    }
}

/// A pod that publishes [`HOST_PORT`], and answers with its name.
struct Server {
    pod: Pod,
    _listeners: Vec<EchoServer>,
}

impl Server {
    fn new(network: &Network, name: &str) -> Result<Self> {
        let ports = ["tcp", "udp"].map(|protocol| {
            json!({"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": protocol})
        });
        let pod = network.pod_with_ports(name, json!(ports))?;
        settle(network.node());
        let listeners = (pod.addresses().into_iter())
            .map(|address| EchoServer::start_as(&pod, (address, POD_PORT).into(), name))
            .collect::<Result<_>>()?;
        Ok(Self {
            pod,
            _listeners: listeners,
        })
    }
}

/// That the outside meets the pod of this name behind the published port.
fn is_served(outside: &Outside, name: &str) -> Result<()> {
    for address in NODE {
        for client in Client::ALL {
            let met = outside
                .meet(client, (address, HOST_PORT).into(), PATIENCE)
                .with_context(|| format!("{client:?} to the published port"))?;
            ensure!(met.server == name, "{met:?}");
        }
    }
    Ok(())
}

/// As [`is_served`], from the very port that others speak to.
fn is_served_from(remote: &Remote, name: &str) -> Result<()> {
    let node = NODE[usize::from(remote.address.is_ipv6())];
    let answer = remote.asks((node, HOST_PORT).into(), b"?")?;
    let met = Meeting::parse(&answer, b"?")?;
    ensure!(met.server == name, "{met:?}");
    Ok(())
}

/// Who reaches a published port does so whether or not its pod is masqueraded.
#[test]
fn published_ports_are_reached_by_everybody() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let (network, other) = (publishing_network(&node, &json!({})), other_network(&node));
    let server = Server::new(&network, "server")?;
    let (neighbour, foreigner) = (network.pod("neighbour")?, pod(&other, "foreigner")?);
    let here: &Namespace = &outside;
    let clients: [(&str, &Namespace); 5] = [
        ("outside", here),
        ("the node", &node),
        ("a neighbour", &neighbour),
        ("a foreigner", &foreigner),
        ("the pod itself", &server.pod),
    ];
    for (who, client) in clients {
        for address in NODE {
            for kind in Client::ALL {
                let met = client
                    .meet(kind, (address, HOST_PORT).into(), PATIENCE)
                    .with_context(|| format!("{kind:?} of {who}"))?;
                ensure!(met.server == "server", "{met:?}");
                // Nobody's own address is hidden who has one of the pod's.
                ensure!(
                    who != "outside" || OUTSIDE.contains(&met.client.ip()),
                    "{met:?}"
                );
            }
        }
    }
    Ok(())
}

/// A pod speaks from the number of a published port.
fn a_published_number_may_be_a_source_port(serves: Serves) -> Result<()> {
    let node = Node::new()?;
    let outside = serves.outside(&node)?;
    let network = serves.network(&node);
    let remotes = remotes(&outside)?;
    let server = Server::new(&network, "server")?;
    let neighbour = pod(&network, "neighbour")?;
    for (who, speaker) in [("the server", &server.pod), ("a neighbour", &neighbour)] {
        each(both(&Kind::FREE[..3]), |(kind, family)| {
            let remote = &remotes[family];
            let mut flow = remote.open(kind, speaker, HOST_PORT)?;
            for _ in 0..3 {
                flow.exchange()?;
                is_served(&outside, "server")?;
                // With stock, the conversation of the pod is mistaken for another.
                if !is_stock(&node) {
                    is_served_from(remote, "server")?;
                }
            }
            Ok(())
        })
        .context(who)?;
    }
    Ok(())
}

/// … and did so before the port was published.
#[test]
fn a_source_port_may_be_published_later() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = publishing_network(&node, &json!({}));
    let remotes = remotes(&outside)?;
    let speaker = pod(&network, "speaker")?;
    let mut flows = both(&[Kind::Udp, Kind::Tcp])
        .into_iter()
        .map(|(kind, family)| remotes[family].open(kind, &speaker, HOST_PORT))
        .collect::<Result<Vec<_>>>()?;
    for flow in &mut flows {
        flow.exchange()?;
    }
    let _server = Server::new(&network, "server")?;
    for _ in 0..3 {
        for flow in &mut flows {
            flow.exchange()?;
        }
        is_served(&outside, "server")?;
    }
    Ok(())
}

/// Nor does a process of the node that waits on a port get a pod's replies, or lose
/// its own requests to one.
#[test]
fn a_process_of_the_node_keeps_its_port() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let pod = pod(&network, "pod")?;
    for (remote, address) in remotes(&outside)?.iter().zip(NODE) {
        for listens in [
            address,
            ["0.0.0.0", "::"][usize::from(address.is_ipv6())].parse()?,
        ] {
            let process = EchoServer::start_as(&node, (listens, 5353).into(), "node")?;
            for kind in [Kind::Udp, Kind::UnconnectedUdp] {
                let mut flow = remote.open(kind, &pod, 5353)?;
                for _ in 0..2 {
                    flow.exchange()?;
                    if !is_stock(&node) {
                        let answer = remote.asks((address, 5353).into(), b"?")?;
                        ensure!(Meeting::parse(&answer, b"?")?.server == "node");
                    }
                }
            }
            for kind in [Client::Tcp, Client::Udp] {
                let met = outside.meet(kind, (address, 5353).into(), PATIENCE)?;
                ensure!(met.server == "node");
            }
            drop(process);
        }
    }
    Ok(())
}

/// The other half of the hazard of published ports: netfilter masquerades somebody
/// else's flow from a number that is published.
fn replies_to_what_netfilter_masquerades_are_not_captured(serves: Serves) -> Result<()> {
    /// How the guest comes to appear with the number.
    #[derive(Clone, Copy, Debug)]
    enum By {
        ItsOwnPort,
        TheRule,
    }
    for (by, port) in [(By::ItsOwnPort, HOST_PORT), (By::TheRule, 4711)] {
        let node = Node::new()?;
        let outside = serves.outside(&node)?;
        let network = serves.network(&node);
        let guest = guest(&node)?;
        if matches!(by, By::TheRule) {
            for iptables in IPTABLES {
                for protocol in ["tcp", "udp"] {
                    node.run(&format!(
                        "{iptables} -t nat -I POSTROUTING -p {protocol} -o uplink0 \
                         --sport {port} -j MASQUERADE --to-ports {HOST_PORT}"
                    ))?;
                }
            }
        }
        let remotes = remotes(&outside)?;
        // A flow from before the port is published.
        let _pod = network.pod("pod")?;
        let early: Vec<Remote> = OUTSIDE
            .into_iter()
            .map(|address| Remote::on(&outside, (address, 9)))
            .collect::<Result<_>>()?;
        let mut flows = both(&[Kind::Tcp])
            .into_iter()
            .map(|(kind, family)| early[family].open(kind, &guest, port))
            .collect::<Result<Vec<_>>>()?;
        for flow in &mut flows {
            flow.exchange().with_context(|| format!("{by:?}"))?;
        }
        let _server = Server::new(&network, "server")?;
        for flow in &mut flows {
            flow.exchange()
                .with_context(|| format!("{by:?}, when published"))?;
        }
        drop(flows);
        each(both(&Kind::FREE[..3]), |(kind, family)| {
            let remote = &remotes[family];
            let mut flow = remote.open(kind, &guest, port)?;
            for _ in 0..3 {
                let seen: SocketAddr = flow.exchange()?;
                ensure!(seen.port() == HOST_PORT, "no collision: {seen}");
                is_served(&outside, "server")?;
            }
            Ok(())
        })
        .with_context(|| format!("{by:?}"))?;
    }
    Ok(())
}

/// The gateway's own address is as good a source as any for the host's stack.
#[test]
fn the_gateway_address_is_no_pod() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let pod = pod(&network, "pod")?;
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    for (gateway, address) in GATEWAYS.into_iter().zip(OUTSIDE) {
        let server = EchoServer::start_as(&outside, (address, 4000).into(), "outside")?;
        let met = node.meet_from(
            Client::Udp,
            (gateway, 4001).into(),
            server.address(),
            PATIENCE,
        )?;
        let seen: IpAddr = met.client.ip();
        ensure!(seen == gateway, "{met:?}");
        let met = pod.meet(Client::Udp, server.address(), PATIENCE)?;
        ensure!(NODE.contains(&met.client.ip()), "{met:?}");
    }
    Ok(())
}

/// One connection after the other, from the same port of two pods, however they end.
fn a_port_may_be_used_again(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let all = Everybody::new(&node, by)?;
    for address in OUTSIDE {
        let server = EchoServer::start_as(&outside, (address, PORT).into(), "outside")?;
        let any = SocketAddr::new(
            if address.is_ipv4() {
                [0; 4].into()
            } else {
                [0; 16].into()
            },
            4242,
        );
        for round in 0..20 {
            let who = if round % 3 == 0 {
                &all.neighbour
            } else {
                &all.pod
            };
            let mut stream = when_free(|| who.tcp_connect_from(any, server.address(), PATIENCE))
                .with_context(|| format!("round {round}"))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            // Its end comes first, so that the pod's port is free.
            stream.write_all(b"!")?;
            let mut answer = [0; 10];
            let length = stream
                .receive(&mut answer)
                .with_context(|| format!("round {round}"))?;
            ensure!(length > 0, "round {round}: closed");
            crate::flow::reset_when_dropped(&stream)?;
        }
    }
    Ok(())
}
