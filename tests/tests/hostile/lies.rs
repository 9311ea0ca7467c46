//! Frames that lie about what is in them, from pods and from outside: towards a pod of the
//! same network, of another one, a published port, and what is outside of the node.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_tests::{
    Captured, EchoServer, Frame, MacAddr, Namespace, Node, Outside, Packet, PacketSocket,
    internet_checksum,
};
use serde_json::{Value, json};

use crate::{PATIENCE, SILENCE, Station, network, other_network};

/// What the payload of every lie ends with.
const MARK: &[u8] = b"is a lie";
/// The port that is published, and the pod's.
const PUBLISHED: u16 = 8080;
const SERVED: u16 = 80;
/// Of a node with a default route, in whose settings no source is looked at.
const NODE: [IpAddr; 2] = [IpAddr::V4(Outside::NODE_V4), IpAddr::V6(Outside::NODE_V6)];
const OUTSIDE: [IpAddr; 2] = [IpAddr::V4(Outside::V4), IpAddr::V6(Outside::V6)];

/// Two networks, of which one has a liar and one who serves a published port.
struct Scene<'node> {
    node: &'node Node,
    outside: &'node Outside,
    liar: Station,
    server: Station,
    foreign: Station,
    at_outside: PacketSocket,
    outside_mac: MacAddr,
    gateway: MacAddr,
    _echo: [EchoServer; 4],
}

impl<'node> Scene<'node> {
    fn new(node: &'node Node, outside: &'node Outside, more: &Value) -> Result<Self> {
        let mut config = json!({"ipMasq": true, "capabilities": {"portMappings": true}});
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let network = network(node, &config);
        let ports = ["tcp", "udp"].map(|protocol| {
            json!({"hostPort": PUBLISHED, "containerPort": SERVED, "protocol": protocol})
        });
        let server = Station::of(network.pod_with_ports("server", json!(ports))?)?;
        let liar = Station::new(&network, "liar")?;
        let foreign = Station::new(&other_network(node), "foreign")?;
        let echo = |namespace: &Namespace, address, port| {
            EchoServer::start_on(namespace, SocketAddr::new(address, port))
        };
        let [v4, v6] = server.addresses()?;
        let scene = Self {
            _echo: [
                echo(&server.pod, v4, SERVED)?,
                echo(&server.pod, v6, SERVED)?,
                echo(outside, OUTSIDE[0], PUBLISHED)?,
                echo(outside, OUTSIDE[1], PUBLISHED)?,
            ],
            node,
            outside,
            at_outside: PacketSocket::open(outside, "eth0")?,
            outside_mac: MacAddr::of_device(outside, "eth0")?,
            gateway: MacAddr::of_device(node, "cni0")?,
            liar,
            server,
            foreign,
        };
        scene.works()?;
        Ok(scene)
    }

    /// All that the node is for.
    fn works(&self) -> Result<()> {
        for family in 0..2 {
            let server = self.server.addresses()?[family];
            self.liar.pod.ping(server, 1).context("pod to pod")?;
            self.liar
                .pod
                .ping(OUTSIDE[family], 1)
                .context("masquerade")?;
            self.foreign.pod.ping(server, 1).context("by the node")?;
            for client in [
                &**self.outside as &Namespace,
                &self.foreign.pod,
                &self.liar.pod,
            ] {
                let published = SocketAddr::new(NODE[family], PUBLISHED);
                client.tcp_echo(published, b"hello", PATIENCE)?;
                client.udp_echo(published, b"hello", PATIENCE)?;
            }
        }
        Ok(())
    }

    /// Forgets what was captured.
    fn quiet(&self) -> Result<()> {
        for socket in [
            &self.foreign.socket,
            &self.at_outside,
            &self.server.socket,
            &self.liar.socket,
        ] {
            while socket
                .receive(Duration::from_millis(1), |_| true)?
                .is_some()
            {}
        }
        Ok(())
    }

    /// That none of these sees a lie.
    fn sees_no_lie(&self, sockets: &[(&str, &PacketSocket)]) -> Result<()> {
        thread::sleep(Duration::from_millis(5));
        for (name, socket) in sockets {
            if let Some(seen) = socket.receive(Duration::ZERO, is_a_lie)? {
                bail!("{name} sees {seen:?}");
            }
        }
        Ok(())
    }

    /// Where a pod of the first network must never get a lie to.
    fn elsewhere(&self) -> [(&'static str, &PacketSocket); 2] {
        [
            ("the other network", &self.foreign.socket),
            ("the outside", &self.at_outside),
        ]
    }

    /// The sum of all counters that can have counted a frame that was not delivered.
    fn counted(&self) -> Result<u64> {
        let mut sum = kernel_counters(self.node)?;
        // What is for a published port is counted against its pod.
        for station in [&self.liar, &self.server] {
            let stats = station.stats(self.node)?;
            sum += stats.flooded + stats.drops.iter().sum::<u64>();
        }
        Ok(sum)
    }
}

/// What the kernel of a namespace has refused.
fn kernel_counters(namespace: &Namespace) -> Result<u64> {
    const NAMES: [&str; 22] = [
        "UdpNoPorts",
        "Udp6NoPorts",
        "TcpOutRsts",
        "TcpInErrs",
        "IpInHdrErrors",
        "IpInAddrErrors",
        "IpInDiscards",
        "IpInUnknownProtos",
        "IpExtInNoRoutes",
        "IpExtInTruncatedPkts",
        "IpExtInCsumErrors",
        "TcpExtIPReversePathFilter",
        "Ip6InHdrErrors",
        "Ip6InAddrErrors",
        "Ip6InDiscards",
        "Ip6InNoRoutes",
        "Ip6InTruncatedPkts",
        "Ip6InTooBigErrors",
        "Ip6OutNoRoutes",
        "IpOutNoRoutes",
        "IpReasmFails",
        "Ip6ReasmFails",
    ];
    let mut sum = 0;
    for line in namespace.run("nstat -asz")?.lines() {
        let mut words = line.split_whitespace();
        if words.next().is_some_and(|name| NAMES.contains(&name)) {
            sum += words
                .next()
                .and_then(|value| value.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    // Martians, in hexadecimal columns.
    let text = namespace.read("/proc/net/stat/rt_cache")?;
    let mut lines = text.lines();
    let columns: Vec<_> = lines
        .next()
        .context("no header")?
        .split_whitespace()
        .collect();
    for line in lines {
        for (name, value) in columns.iter().zip(line.split_whitespace()) {
            if name.starts_with("in_martian") || *name == "in_no_route" {
                sum += u64::from_str_radix(value, 16)?;
            }
        }
    }
    for device in ["cni0", "uplink0"] {
        for counter in ["rx_dropped", "rx_nohandler", "rx_otherhost_dropped"] {
            let path = format!("/sys/class/net/{device}/statistics/{counter}");
            sum += namespace
                .read(path)
                .ok()
                .and_then(|text| text.trim().parse::<u64>().ok())
                .unwrap_or(0);
        }
        let shown = namespace.json(&format!("ip -j -s -s link show {device}"))?;
        sum += shown[0]["stats64"]["rx"]["otherhost"].as_u64().unwrap_or(0);
    }
    Ok(sum)
}

fn is_a_lie(seen: &Captured) -> bool {
    seen.bytes.windows(MARK.len()).any(|bytes| bytes == MARK)
}

/// A packet that is true: UDP, or TCP's RST, which nobody answers.
fn truth(from: IpAddr, to: SocketAddr, tcp: bool) -> Vec<u8> {
    let from = SocketAddr::new(from, 4000);
    if !tcp {
        return Packet::udp(from, to, MARK).bytes();
    }
    let mut packet = Packet::tcp_reset(from, to, 1).bytes();
    // Data in an RST says why (RFC 9293 §3.5.2).
    packet.extend(MARK);
    let (at, length) = if to.is_ipv4() {
        (2, packet.len())
    } else {
        (4, packet.len() - 40)
    };
    packet[at..at + 2].copy_from_slice(&u16::try_from(length).unwrap_or(0).to_be_bytes());
    sealed(packet)
}

/// With a right IPv4 header checksum.
fn sealed(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 && packet.len() >= 20 {
        packet[10..12].fill(0);
        let length = (usize::from(packet[0] & 0xf) * 4).clamp(20, packet.len());
        let sum = internet_checksum(&packet[..length]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

fn with(packet: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[at..at + bytes.len()].copy_from_slice(bytes);
    packet
}

type Lie = (String, Vec<Frame>);

/// What no router forwards, in frames between these stations.
fn malformed(to: (MacAddr, SocketAddr), from: (MacAddr, IpAddr)) -> Vec<Lie> {
    let frame = |packet: &[u8]| {
        let ethertype = if to.1.is_ipv4() {
            Frame::IPV4
        } else {
            Frame::IPV6
        };
        Frame::new(to.0, from.0, ethertype, packet)
    };
    let mut lies = Vec::new();
    for tcp in [false, true] {
        let truth = truth(from.1, to.1, tcp);
        let mut add = |what: &str, packets: Vec<Vec<u8>>| {
            let frames = packets.iter().map(|packet| frame(packet)).collect();
            let transport = if tcp { "TCP" } else { "UDP" };
            lies.push((format!("{what}, {transport} to {}", to.1), frames));
        };
        add(
            "cut off",
            (1..truth.len())
                .map(|length| truth[..length].to_vec())
                .collect(),
        );
        if to.1.is_ipv4() {
            v4(&truth, &mut add);
        } else {
            v6(&truth, &mut add);
        }
    }
    lies
}

fn v4(truth: &[u8], add: &mut impl FnMut(&str, Vec<Vec<u8>>)) {
    let length = u16::try_from(truth.len()).unwrap_or(0);
    let lengths = [0, 1, 19, length + 1, length + 8, 1500, u16::MAX];
    add(
        "of another length",
        lengths
            .iter()
            .map(|length| sealed(with(truth, 2, &length.to_be_bytes())))
            .collect(),
    );
    add(
        "with a header of less than five words",
        (0..5)
            .map(|words| sealed(with(truth, 0, &[0x40 | words])))
            .collect(),
    );
    add(
        "of another version",
        [0, 1, 5, 6, 15]
            .map(|version: u8| with(truth, 0, &[version << 4 | 5]))
            .into(),
    );
    add(
        "with a wrong header checksum",
        [0, 1, 0xff]
            .map(|byte: u8| with(truth, 10, &[truth[10] ^ byte, truth[11] ^ 1]))
            .into(),
    );
    add("without a time to live", vec![sealed(with(truth, 8, &[0]))]);
    // Linux routes class E, and all of 0.0.0.0/8 but its first.
    let sources: [[u8; 4]; 6] = [
        [127, 0, 0, 1],
        [127, 1, 2, 3],
        [224, 0, 0, 1],
        [255; 4],
        Outside::NODE_V4.octets(),
        [10, 78, 0, 1],
    ];
    add(
        "from what is nobody's source",
        sources
            .iter()
            .map(|source| sealed(with(truth, 12, source)))
            .collect(),
    );
    let destinations: [[u8; 4]; 2] = [[127, 0, 0, 1], [0; 4]];
    add(
        "to what is nobody's address",
        destinations
            .iter()
            .map(|to| sealed(with(truth, 16, to)))
            .collect(),
    );
}

fn v6(truth: &[u8], add: &mut impl FnMut(&str, Vec<Vec<u8>>)) {
    let length = u16::try_from(truth.len() - 40).unwrap_or(0);
    add(
        "of another length",
        [length + 1, length + 8, 1500, u16::MAX]
            .iter()
            .map(|length| with(truth, 4, &length.to_be_bytes()))
            .collect(),
    );
    add(
        "of another version",
        [0, 1, 4, 5, 15]
            .map(|version: u8| with(truth, 0, &[version << 4]))
            .into(),
    );
    add("without hops", vec![with(truth, 7, &[0])]);
    let mut loopback = [0; 16];
    loopback[15] = 1;
    let mut group = [0; 16];
    group[..2].copy_from_slice(&[0xff, 2]);
    group[15] = 1;
    add(
        "from what is nobody's source",
        [loopback, group]
            .iter()
            .map(|source| with(truth, 8, source))
            .collect(),
    );
    add(
        "to what is nobody's address",
        [loopback].iter().map(|to| with(truth, 24, to)).collect(),
    );
    // A jumbogram (RFC 2675) that is none.
    let jumbo = [truth[6], 0, 0xc2, 4, 0, 1, 0, 0];
    let mut packet = [&truth[..40], &jumbo, &truth[40..]].concat();
    packet[4..7].fill(0);
    add("a jumbogram", vec![packet]);
}

/// Frames whose Ethernet header lies.
fn misaddressed(scene: &Scene<'_>, family: usize) -> Result<Vec<Lie>> {
    let from = scene.liar.addresses()?[family];
    let gateway = scene.gateway;
    let far = SocketAddr::new(scene.foreign.addresses()?[family], SERVED);
    let packet = truth(from, far, false);
    let own = scene.liar.mac;
    let mut lies = vec![
        (
            "from what is no station".to_owned(),
            [
                [0; 6],
                [0xff; 6],
                [1, 0, 0x5e, 0, 0, 1],
                [0x33, 0x33, 0, 0, 0, 1],
            ]
            .map(|source| Frame::ip(gateway, MacAddr(source), &packet))
            .into(),
        ),
        (
            "to a station of another network".to_owned(),
            vec![Frame::ip(scene.foreign.mac, own, &packet)],
        ),
        (
            "to a station of another network, as the gateway".to_owned(),
            vec![Frame::ip(scene.foreign.mac, gateway, &packet)],
        ),
        ("to itself".to_owned(), vec![Frame::ip(own, own, &packet)]),
        (
            "pause".to_owned(),
            vec![Frame::ip(MacAddr([1, 0x80, 0xc2, 0, 0, 1]), own, &packet)],
        ),
    ];
    for depth in 1..=8 {
        // A VLAN of which the node knows nothing, behind priorities and before others.
        for at in 0..depth {
            let mut tags = Vec::new();
            for level in 0..depth {
                let tpid = if level % 2 == 0 {
                    [0x81, 0]
                } else {
                    [0x88, 0xa8]
                };
                tags.extend(tpid);
                tags.extend(if level == at { [0, 7] } else { [0xe0, 0] });
            }
            let plain = Frame::ip(gateway, own, &packet).0;
            let frame = Frame([&plain[..12], &tags, &plain[12..]].concat());
            lies.push((format!("in {depth} VLANs, {at}"), vec![frame]));
        }
    }
    Ok(lies)
}

/// Sends what lies from a pod to wherever a packet of it can go.
#[test]
fn malformed_frames_of_a_pod_leave_no_network() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let outside = node.outside()?;
    let scene = Scene::new(&node, &outside, &json!({}))?;
    let mut failed = Vec::new();
    for family in 0..2 {
        let from = (scene.liar.mac, scene.liar.addresses()?[family]);
        let mut lies = misaddressed(&scene, family)?;
        for (mac, address, port) in [
            (scene.gateway, scene.foreign.addresses()?[family], SERVED),
            (scene.gateway, OUTSIDE[family], PUBLISHED),
            (scene.gateway, NODE[family], PUBLISHED),
            (scene.server.mac, scene.foreign.addresses()?[family], SERVED),
        ] {
            lies.extend(malformed((mac, SocketAddr::new(address, port)), from));
        }
        for (what, frames) in lies {
            scene.quiet()?;
            let before = scene.counted()?;
            for frame in &frames {
                scene.liar.socket.send(frame)?;
            }
            if let Err(error) = scene.sees_no_lie(&scene.elsewhere()) {
                failed.push(format!("{what}: {error}"));
            }
            let to_gateway = frames[0].0[..6] == scene.gateway.0;
            if to_gateway
                && let counted = scene.counted()? - before
                && counted < frames.len() as u64
            {
                failed.push(format!("{what}: {counted} of {} are counted", frames.len()));
            }
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    scene.works()
}

/// The same from outside, towards the published port and its pod.
fn from_outside(more: &Value) -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let outside = node.outside()?;
    for subnet in ["10.77.0.0/16", "fd77::/64"] {
        outside.route_to_node(subnet)?;
    }
    let scene = Scene::new(&node, &outside, more)?;
    let uplink = MacAddr::of_device(&node, Outside::UPLINK)?;
    let mut failed = Vec::new();
    for family in 0..2 {
        let from = (scene.outside_mac, OUTSIDE[family]);
        for (address, port) in [
            (NODE[family], PUBLISHED),
            (scene.server.addresses()?[family], SERVED),
            (scene.foreign.addresses()?[family], SERVED),
        ] {
            for (what, frames) in malformed((uplink, SocketAddr::new(address, port)), from) {
                scene.quiet()?;
                for frame in &frames {
                    scene.at_outside.send(frame)?;
                }
                let pods = [
                    ("the server", &scene.server.socket),
                    ("another pod", &scene.liar.socket),
                    ("the other network", &scene.foreign.socket),
                ];
                if let Err(error) = scene.sees_no_lie(&pods) {
                    failed.push(format!("{what}: {error}"));
                }
            }
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    scene.works()
}

#[test]
fn malformed_frames_from_outside_reach_no_pod() -> Result<()> {
    from_outside(&json!({}))
}

#[test]
fn malformed_frames_from_outside_reach_no_pod_by_xdp() -> Result<()> {
    from_outside(&json!({"xdpUplinks": [Outside::UPLINK]}))
}

/// What a router forwards, and a receiver must not take: nothing repairs it on its way.
fn unacceptable(from: IpAddr, to: SocketAddr) -> Vec<(String, Vec<Vec<u8>>)> {
    let l4 = if to.is_ipv4() { 20 } else { 40 };
    let udp = truth(from, to, false);
    let bytes = |at: usize| [udp[at], udp[at + 1]];
    let flip = |at: usize| with(&udp, at, &[bytes(at)[0] ^ 0x55, bytes(at)[1]]);
    let length = |value: u16| with(&udp, l4 + 4, &value.to_be_bytes());
    let mut lies = vec![
        ("a wrong UDP checksum".to_owned(), vec![flip(l4 + 6)]),
        ("changed data".to_owned(), vec![flip(udp.len() - 12)]),
        (
            "a wrong UDP length".to_owned(),
            [1, 7, 9, 17, 100, u16::MAX].map(length).into(),
        ),
    ];
    let datagram = Packet::udp(
        SocketAddr::new(from, 4000),
        to,
        &[&[0x2e; 64][..], MARK].concat(),
    );
    let parts = datagram.fragments(0x77, 24);
    let mut overlapping = parts.clone();
    let again = |packet: &[u8]| {
        let mut packet = packet.to_vec();
        let end = packet.len();
        packet[end - 1] ^= 1;
        packet
    };
    // The second part comes twice, with other data, 8 bytes early.
    let early = {
        let mut part = again(&parts[1]);
        let at = if to.is_ipv4() { 6 } else { 42 };
        let unit = if to.is_ipv4() { 1 } else { 8 };
        let field = u16::from_be_bytes([part[at], part[at + 1]]) - unit;
        part[at..at + 2].copy_from_slice(&field.to_be_bytes());
        sealed(part)
    };
    overlapping.insert(1, early);
    lies.push(("overlapping fragments".to_owned(), overlapping));
    let mut first_missing = parts.clone();
    first_missing.remove(0);
    lies.push(("fragments without their first".to_owned(), first_missing));
    let mut tiny = datagram.fragments(0x78, 8);
    tiny.truncate(3);
    lies.push(("tiny fragments without an end".to_owned(), tiny));
    lies
}

#[test]
fn nothing_makes_a_lie_acceptable() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let outside = node.outside()?;
    let scene = Scene::new(&node, &outside, &json!({}))?;
    let uplink = MacAddr::of_device(&node, Outside::UPLINK)?;
    let mut failed = Vec::new();
    for family in 0..2 {
        let liar = scene.liar.addresses()?[family];
        let server = scene.server.addresses()?[family];
        let rows = [
            (
                &scene.liar.socket,
                scene.liar.mac,
                scene.server.mac,
                liar,
                server,
                SERVED,
            ),
            (
                &scene.liar.socket,
                scene.liar.mac,
                scene.gateway,
                liar,
                NODE[family],
                PUBLISHED,
            ),
            (
                &scene.liar.socket,
                scene.liar.mac,
                scene.gateway,
                liar,
                OUTSIDE[family],
                PUBLISHED,
            ),
            (
                &scene.at_outside,
                scene.outside_mac,
                uplink,
                OUTSIDE[family],
                NODE[family],
                PUBLISHED,
            ),
        ];
        for (socket, own, to, from, address, port) in rows {
            for (what, packets) in unacceptable(from, SocketAddr::new(address, port)) {
                scene.quiet()?;
                for packet in packets {
                    socket.send(&Frame::ip(to, own, &packet))?;
                }
                thread::sleep(Duration::from_millis(10));
                // An answer that quotes the lie is an error message, and no echo.
                let echo = socket.receive(Duration::from_millis(20), |seen| {
                    is_a_lie(seen) && seen.ip_source() == Some(address) && !is_error(seen)
                })?;
                if let Some(echo) = echo {
                    failed.push(format!("{what} from {from} to {address}: {echo:?}"));
                }
            }
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    scene.works()
}

fn is_error(seen: &Captured) -> bool {
    match seen.ethertype() {
        Frame::IPV4 => seen.bytes.get(23) == Some(&1),
        _ => seen.bytes.get(20) == Some(&58),
    }
}

/// Options and headers that nobody needs to understand, but everybody must survive.
#[test]
fn odd_headers_hurt_nobody() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let outside = node.outside()?;
    let scene = Scene::new(&node, &outside, &json!({}))?;
    let options: [&[u8]; 8] = [
        // Record route, loose and strict source routes, timestamp, router alert, security.
        &[7, 39, 4],
        &[131, 7, 4, 10, 78, 0, 2],
        &[137, 7, 4, 127, 0, 0, 1],
        &[68, 12, 5, 0],
        &[148, 4, 0, 0],
        &[130, 11],
        // Lengths of nothing and too much.
        &[7, 0, 0, 0],
        &[7, 255, 4, 0],
    ];
    for destination in [
        scene.server.pod.v4()?.into(),
        scene.foreign.pod.v4()?.into(),
        NODE[0],
        OUTSIDE[0],
    ] {
        for options in options {
            let truth = truth(
                scene.liar.pod.v4()?.into(),
                SocketAddr::new(destination, PUBLISHED),
                false,
            );
            let mut padded = options.to_vec();
            padded.resize(40, 0);
            let mut packet = [&truth[..20], &padded, &truth[20..]].concat();
            packet[0] = 0x4f;
            let length = u16::try_from(packet.len())?.to_be_bytes();
            packet[2..4].copy_from_slice(&length);
            for mac in [scene.gateway, scene.server.mac] {
                let frame = Frame::ip(mac, scene.liar.mac, &sealed(packet.clone()));
                scene.liar.socket.send(&frame)?;
            }
        }
    }
    for destination in [
        scene.server.pod.v6()?.into(),
        scene.foreign.pod.v6()?.into(),
        NODE[1],
        OUTSIDE[1],
    ] {
        for kind in [0_u8, 43, 44, 51, 60, 135, 139, 140, 253] {
            for count in [1_usize, 6, 7, 9, 20, 60] {
                let truth = truth(
                    scene.liar.pod.v6()?.into(),
                    SocketAddr::new(destination, PUBLISHED),
                    false,
                );
                let mut headers = Vec::new();
                for index in 0..count {
                    let next = if index + 1 < count { kind } else { 17 };
                    headers.extend([next, 0, 1, 4, 0, 0, 0, 0]);
                }
                let mut packet = [&truth[..40], &headers, &truth[40..]].concat();
                packet[6] = kind;
                let length = u16::try_from(packet.len() - 40)?.to_be_bytes();
                packet[4..6].copy_from_slice(&length);
                for hops in [64, 255] {
                    packet[7] = hops;
                    for mac in [scene.gateway, scene.server.mac] {
                        scene
                            .liar
                            .socket
                            .send(&Frame::ip(mac, scene.liar.mac, &packet))?;
                    }
                }
            }
        }
    }
    thread::sleep(SILENCE);
    scene.quiet()?;
    scene.works()
}

/// Whether an IP packet in a frame is one that a router may have sent.
fn is_well_formed(seen: &Captured) -> bool {
    let packet = seen.bytes.get(14..).unwrap_or_default();
    match seen.ethertype() {
        Frame::IPV4 => {
            let Some(header) = packet.first_chunk::<20>() else {
                return false;
            };
            let words = usize::from(header[0] & 0xf) * 4;
            let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
            header[0] >> 4 == 4
                && words >= 20
                && length >= words
                && length <= packet.len()
                && header[8] > 0
                && internet_checksum(&packet[..words]) == 0
                && !matches!(header[12], 0 | 127 | 224..)
        }
        Frame::IPV6 => {
            let Some(header) = packet.first_chunk::<40>() else {
                return false;
            };
            let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
            header[0] >> 4 == 6 && header[8] != 0xff && length + 40 <= packet.len()
        }
        _ => true,
    }
}

/// Any of `frames`, with some of it changed.
fn mutated(random: &mut fastrand::Rng, frames: &[Frame], macs: &[MacAddr]) -> Frame {
    let mut frame = frames[random.usize(..frames.len())].0.clone();
    if random.u8(..4) == 0 {
        frame[..6].copy_from_slice(&macs[random.usize(..macs.len())].0);
    }
    for _ in 0..random.usize(..4) {
        let range: Range<usize> = if random.bool() {
            12..60
        } else {
            14..frame.len()
        };
        let at = random.usize(range).min(frame.len() - 1);
        frame[at] = random.u8(..);
    }
    match random.u8(..8) {
        0 => frame.truncate(random.usize(14..=frame.len())),
        1 => frame.resize(frame.len() + random.usize(..64), 0xa5),
        2 => {
            let tag = [0x81, 0, if random.bool() { 0 } else { 7 }, random.u8(..)];
            let tags = tag.repeat(random.usize(1..4));
            frame.splice(12..12, tags);
        }
        _ => {}
    }
    Frame(frame)
}

/// What comes out of a few seconds of anything at all is well formed, and the node works.
#[test]
fn a_storm_of_mutations_hurts_nobody() -> Result<()> {
    const FRAMES: usize = 30_000;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let _storm = crate::storm();
    let node = Node::new()?;
    let outside = node.outside()?;
    let scene = Scene::new(&node, &outside, &json!({}))?;
    let uplink = MacAddr::of_device(&node, Outside::UPLINK)?;
    let (mut by_pod, mut by_outside) = (Vec::new(), Vec::new());
    for family in 0..2 {
        let (liar, foreign, server) = (
            scene.liar.addresses()?[family],
            scene.foreign.addresses()?[family],
            scene.server.addresses()?[family],
        );
        for (mac, address, port) in [
            (scene.gateway, foreign, SERVED),
            (scene.gateway, OUTSIDE[family], PUBLISHED),
            (scene.gateway, NODE[family], PUBLISHED),
            (scene.server.mac, server, SERVED),
        ] {
            let to = SocketAddr::new(address, port);
            for tcp in [false, true] {
                let packet = truth(liar, to, tcp);
                by_pod.push(Frame::ip(mac, scene.liar.mac, &packet));
            }
            for (_, packets) in unacceptable(liar, to) {
                by_pod.extend(
                    packets
                        .iter()
                        .map(|packet| Frame::ip(mac, scene.liar.mac, packet)),
                );
            }
        }
        let to = SocketAddr::new(NODE[family], PUBLISHED);
        for packet in [
            truth(OUTSIDE[family], to, false),
            truth(OUTSIDE[family], to, true),
        ] {
            by_outside.push(Frame::ip(uplink, scene.outside_mac, &packet));
        }
        for (_, packets) in unacceptable(OUTSIDE[family], to) {
            by_outside.extend(
                packets
                    .iter()
                    .map(|packet| Frame::ip(uplink, scene.outside_mac, packet)),
            );
        }
    }
    by_pod.push(Frame::gratuitous_arp(
        scene.liar.mac,
        scene.server.pod.v4()?,
    ));
    by_pod.push(Frame::unsolicited_advertisement(
        scene.liar.mac,
        scene.server.pod.v6()?,
    ));
    let macs = [
        scene.gateway,
        scene.server.mac,
        scene.foreign.mac,
        MacAddr::BROADCAST,
        scene.liar.mac,
    ];
    scene.quiet()?;
    for number in 0..FRAMES {
        let (socket, frames): (_, &[_]) = if number % 4 == 0 {
            (&scene.at_outside, &by_outside)
        } else {
            (&scene.liar.socket, &by_pod)
        };
        socket.send(&mutated(&mut random, frames, &macs))?;
        if number % 64 != 0 {
            continue;
        }
        for (name, socket) in scene.elsewhere() {
            while let Some(seen) = socket.receive(Duration::ZERO, |seen| {
                matches!(seen.ethertype(), Frame::IPV4 | Frame::IPV6) && !seen.for_other
            })? {
                ensure!(is_well_formed(&seen), "seed {seed}: {name} sees {seen:?}");
                ensure!(
                    seen.source() != scene.liar.mac,
                    "seed {seed}: {name} sees {seen:?}"
                );
            }
        }
    }
    scene.quiet()?;
    scene.works().with_context(|| format!("seed {seed}"))
}
