//! What an attached pod can reach and be reached by, packet for packet: the
//! network must behave as a Linux bridge does.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Captured, EchoServer, Frame, MacAddr, Namespace, Network, Node, Offload, Outside, PacketSocket,
    Pod, Receive as _, wait_for,
};
use serde_json::json;

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what must not happen.
const SILENCE: Duration = Duration::from_millis(200);
/// A station that no one has heard of.
const STRANGER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x77]);

/// Pods `a`, `b`, `c`… on a network.
fn pods<const N: usize>(network: &Network) -> Result<[Pod; N]> {
    let pods: Vec<Pod> = ('a'..='z')
        .take(N)
        .map(|name| network.pod(&name.to_string()))
        .collect::<Result<_>>()?;
    settle(network.node());
    pods.try_into().ok().context("too many pods")
}

/// Lets IPv6 addresses cease to be tentative when these tests run against the
/// stock bridge, to see whether it is the test or the plugin that is wrong.
/// With ours everything must work at once.
fn settle(node: &Node) {
    if node.plugin() == "bridge" {
        std::thread::sleep(Duration::from_secs(3));
    }
}

/// A dual-stack network with one more option.
fn network_with<'node>(node: &'node Node, key: &str, value: serde_json::Value) -> Network<'node> {
    let mut config = Network::dual_stack(node);
    config[key] = value;
    Network::new(node, config)
}

/// ICMP, TCP and UDP from one namespace to an address of another.
fn talks(from: &Namespace, to: &Namespace, address: IpAddr) -> Result<()> {
    from.ping(address, 2)?;
    let server = EchoServer::start(to, address)?;
    from.tcp_echo(server.address(), &[1; 100_000], PATIENCE)?;
    from.udp_echo(server.address(), b"one datagram", PATIENCE)?;
    Ok(())
}

fn addresses(pod: &Pod) -> Result<[IpAddr; 2]> {
    Ok([pod.v4()?.into(), pod.v6()?.into()])
}

fn gateways() -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 77, 0, 1).into(),
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1).into(),
    ]
}

fn eth0(pod: &Namespace) -> Result<(PacketSocket, MacAddr)> {
    Ok((
        PacketSocket::open(pod, "eth0")?,
        MacAddr::of_device(pod, "eth0")?,
    ))
}

/// That exactly this frame comes.
fn arrives(socket: &PacketSocket, frame: &Frame) -> Result<Captured> {
    socket
        .receive(PATIENCE, |seen| seen.bytes == frame.0)?
        .with_context(|| format!("{frame:?} did not arrive"))
}

/// That this frame does not come, nor one that was made from it: from the same
/// station, of the same type.
fn stays_away(socket: &PacketSocket, frame: &Frame) -> Result<()> {
    let seen = socket.receive(SILENCE, |seen| seen.bytes.get(6..14) == frame.0.get(6..14))?;
    ensure!(seen.is_none(), "{frame:?} arrived as {seen:?}");
    Ok(())
}

fn experimental(destination: MacAddr, source: MacAddr) -> Frame {
    // Every byte different, so that a changed one shows.
    let payload: Vec<u8> = (0..=255).collect();
    Frame::new(destination, source, Frame::EXPERIMENTAL, &payload)
}

// Who reaches whom.

#[test]
fn pods_reach_each_other() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        for address in addresses(to)? {
            talks(from, to, address)?;
        }
    }
    Ok(())
}

#[test]
fn pods_and_their_host_reach_each_other() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [pod] = pods(&network)?;
    for (gateway, address) in gateways().into_iter().zip(addresses(&pod)?) {
        talks(&pod, &node, gateway)?;
        talks(&node, &pod, address)?;
    }
    Ok(())
}

#[test]
fn pods_and_the_outside_reach_each_other() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [pod] = pods(&network)?;
    for address in addresses(&pod)? {
        talks(&pod, &outside, Outside::address_like(address))?;
        talks(&outside, &pod, address)?;
    }
    Ok(())
}

#[test]
fn jumbo_frames_pass_whole() -> Result<()> {
    let node = Node::new()?;
    let network = network_with(&node, "mtu", json!(9000));
    let [a, b] = pods(&network)?;
    for (address, payload) in [
        (IpAddr::from(b.v4()?), "8972"),
        (b.v6()?.into(), "8952"),
        (gateways()[0], "8972"),
        (gateways()[1], "8952"),
    ] {
        a.ping_with(address, 1, &["-M", "do", "-s", payload])?;
    }
    let server = EchoServer::start(&b, b.v4()?.into())?;
    a.udp_echo(server.address(), &[3; 8972], PATIENCE)?;
    a.tcp_transfer(server.address(), 20_000_000)?;
    Ok(())
}

#[test]
fn no_reverse_path_filter_waits_on_a_port() -> Result<()> {
    let node = Node::new()?;
    node.set_sysctl("net/ipv4/conf/default/rp_filter", "1")?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let pod = network.pod("pod")?;
    let mut ports = vec![pod.host_veth()?.to_owned()];
    ports.extend(
        node.device_names()?
            .into_iter()
            .filter(|name| name.starts_with("port")),
    );
    ensure!(ports.len() == 2, "{ports:?}");
    for port in ports {
        let setting = format!("net/ipv4/conf/{port}/rp_filter");
        ensure!(node.sysctl(&setting)? == "0", "{setting}");
    }
    // Nor does a strict one on the gateway device stand in the way.
    ensure!(node.sysctl("net/ipv4/conf/cni0/rp_filter")? == "1");
    node.ping(pod.v4()?.into(), 1)
}

#[test]
fn ipv6_works_the_moment_add_returns() -> Result<()> {
    ipv6_works_at_once(3)
}

/// On a machine that is busy, what the kernel does in the background (a local
/// route is inserted by a worker, even without duplicate address detection)
/// lags behind the ADD that caused it.
#[test]
fn ipv6_works_the_moment_add_returns_on_a_busy_machine() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let server = EchoServer::start(&b, b.v4()?.into())?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let _ = a.tcp_transfer(server.address(), 5_000_000);
                }
            });
        }
        let result = ipv6_works_at_once(20);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

fn ipv6_works_at_once(count: usize) -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    // A lost solicitation is sent again after a second, a lost datagram never.
    let limit = Duration::from_millis(700);
    let mut earlier: Option<Pod> = None;
    for name in ('a'..='z').take(count).map(|name| name.to_string()) {
        let pod = network.pod(&name)?;
        node.ping_with(pod.v6()?.into(), 1, &["-W", "0.7"])
            .with_context(|| format!("from the host to {name}"))?;
        let server = EchoServer::start(&pod, pod.v6()?.into())
            .context("an address that ADD returned is still tentative")?;
        node.udp_echo(server.address(), b"from the host", limit)
            .with_context(|| format!("from the host to {name}"))?;
        if let Some(earlier) = &earlier {
            earlier
                .udp_echo(server.address(), b"from a pod", limit)
                .with_context(|| format!("from an earlier pod to {name}"))?;
        }
        let server = EchoServer::start(&node, gateways()[1])
            .context("the gateway's address is still tentative")?;
        pod.udp_echo(server.address(), b"from the pod", limit)
            .with_context(|| format!("from {name} to the host"))?;
        earlier = Some(pod);
    }
    Ok(())
}

// A switch.

#[test]
fn broadcast_and_multicast_reach_all_others_and_the_host_but_not_the_sender() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b, c] = pods(&network)?;
    let ((at_a, mac), (at_b, _), (at_c, _)) = (eth0(&a)?, eth0(&b)?, eth0(&c)?);
    let at_host = PacketSocket::open(&node, "cni0")?;
    let host_mac = MacAddr::of_device(&node, "cni0")?;
    for destination in [
        MacAddr::BROADCAST,
        MacAddr([0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb]),
        MacAddr([0x33, 0x33, 0x00, 0x00, 0x00, 0xfb]),
    ] {
        let frame = experimental(destination, mac);
        at_a.send(&frame)?;
        for socket in [&at_b, &at_c, &at_host] {
            ensure!(!arrives(socket, &frame)?.for_other);
            // Once, and not once per way through the network.
            stays_away(socket, &frame)?;
        }
        stays_away(&at_a, &frame)?;

        let frame = experimental(destination, host_mac);
        at_host.send(&frame)?;
        for socket in [&at_a, &at_b, &at_c] {
            arrives(socket, &frame)?;
            stays_away(socket, &frame)?;
        }
        stays_away(&at_host, &frame)?;
    }
    Ok(())
}

#[test]
fn applications_can_broadcast_and_multicast() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let group_v4 = Ipv4Addr::new(224, 0, 0, 251);
    let group_v6 = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
    let listeners = |namespace: &Namespace, device: &str| -> Result<[UdpSocket; 2]> {
        let index = namespace.device(device)?["ifindex"]
            .as_u64()
            .context("no index")?;
        let index = u32::try_from(index)?;
        let address = namespace.device(device)?["addr_info"]
            .as_array()
            .into_iter()
            .flatten()
            .find_map(|info| info["local"].as_str()?.parse::<Ipv4Addr>().ok())
            .context("no IPv4 address")?;
        namespace.within(|| {
            let v4 = UdpSocket::bind("0.0.0.0:5353")?;
            v4.join_multicast_v4(&group_v4, &address)?;
            let v6 = UdpSocket::bind("[::]:5354")?;
            v6.join_multicast_v6(&group_v6, index)?;
            for socket in [&v4, &v6] {
                socket.set_read_timeout(Some(PATIENCE))?;
            }
            Ok([v4, v6])
        })
    };
    let at_host = listeners(&node, "cni0")?;
    let at_b = listeners(&b, "eth0")?;
    let heard = |what: &[u8], sockets: [&UdpSocket; 2]| -> Result<()> {
        for socket in sockets {
            let mut buffer = [0; 64];
            let length = socket
                .receive(&mut buffer)
                .with_context(|| format!("waiting for the {}", String::from_utf8_lossy(what)))?;
            ensure!(&buffer[..length] == what);
        }
        Ok(())
    };
    let index = u32::try_from(a.device("eth0")?["ifindex"].as_u64().context("no index")?)?;
    let (from_v4, from_v6) = a.within(|| {
        let v4 = UdpSocket::bind("0.0.0.0:0")?;
        v4.set_broadcast(true)?;
        Ok((v4, UdpSocket::bind("[::]:0")?))
    })?;
    for to in ["10.77.255.255:5353", "255.255.255.255:5353"] {
        from_v4.send_to(b"broadcast", to)?;
        heard(b"broadcast", [&at_host[0], &at_b[0]])?;
    }
    from_v4.send_to(b"IPv4 multicast", (group_v4, 5353))?;
    heard(b"IPv4 multicast", [&at_host[0], &at_b[0]])?;
    let to = std::net::SocketAddrV6::new(group_v6, 5354, 0, index);
    from_v6.send_to(b"IPv6 multicast", to)?;
    heard(b"IPv6 multicast", [&at_host[1], &at_b[1]])
}

#[test]
fn frames_of_any_type_and_with_vlan_tags_pass_unmodified() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let ((at_a, mac_a), (at_b, mac_b)) = (eth0(&a)?, eth0(&b)?);
    let payload: Vec<u8> = (0..=255).collect();
    for destination in [mac_b, MacAddr::BROADCAST] {
        let mut double = 0x0009_u16.to_be_bytes().to_vec();
        double.extend(Frame::VLAN.to_be_bytes());
        double.extend(0x0008_u16.to_be_bytes());
        double.extend(Frame::EXPERIMENTAL.to_be_bytes());
        double.extend(&payload);
        for frame in [
            experimental(destination, mac_a),
            // Priority 5, VLAN 291.
            Frame::tagged(destination, mac_a, 0xa123, &payload),
            Frame::new(destination, mac_a, 0x88a8, &double),
            // Shorter than any header that a program may expect.
            Frame::new(destination, mac_a, Frame::EXPERIMENTAL, &[1]),
            // Nonsense of a type that a program looks into. (What is cut off, a
            // Linux bridge drops.)
            Frame::new(destination, mac_a, Frame::ARP, &[0xff; 46]),
            // IEEE 802.3 length in place of a type.
            Frame::new(destination, mac_a, 0x0020, &[0x42; 32]),
        ] {
            at_a.send(&frame)?;
            ensure!(!arrives(&at_b, &frame)?.for_other);
        }
    }
    Ok(())
}

#[test]
fn a_station_is_looked_for_everywhere_until_it_was_heard() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b, c] = pods(&network)?;
    let ((at_a, mac), (at_b, _), (at_c, _)) = (eth0(&a)?, eth0(&b)?, eth0(&c)?);
    let frame = experimental(STRANGER, mac);
    at_a.send(&frame)?;
    for socket in [&at_b, &at_c] {
        ensure!(arrives(socket, &frame)?.for_other);
    }
    // It speaks, from behind b, and is known to be there.
    let hello = experimental(mac, STRANGER);
    at_b.send(&hello)?;
    arrives(&at_a, &hello)?;
    at_a.send(&frame)?;
    arrives(&at_b, &frame)?;
    stays_away(&at_c, &frame)?;
    // It speaks from behind c, and is known to have moved.
    at_c.send(&hello)?;
    arrives(&at_a, &hello)?;
    at_a.send(&frame)?;
    arrives(&at_c, &frame)?;
    stays_away(&at_b, &frame)
}

#[test]
fn unicast_is_not_shown_to_third_parties() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b, c] = pods(&network)?;
    let ((at_a, mac_a), (at_b, mac_b), (at_c, _)) = (eth0(&a)?, eth0(&b)?, eth0(&c)?);
    // Both have been heard from here on.
    a.ping(b.v4()?.into(), 1)?;
    let frame = experimental(mac_b, mac_a);
    at_a.send(&frame)?;
    ensure!(!arrives(&at_b, &frame)?.for_other);
    stays_away(&at_c, &frame)
}

#[test]
fn a_second_address_that_a_pod_gives_itself_is_reachable() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    a.ip("addr add 10.77.200.1/16 dev eth0\naddr add fd77::c8:1/64 dev eth0 nodad")?;
    for address in ["10.77.200.1", "fd77::c8:1"] {
        let address = address.parse()?;
        talks(&b, &a, address)?;
        talks(&node, &a, address)?;
    }
    Ok(())
}

#[test]
fn a_macvlan_inside_a_pod_is_reachable() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let inner = node.sandbox("inner")?;
    a.ip("link add link eth0 name mv0 netns inner type macvlan mode bridge")?;
    inner.ip("link set mv0 up\n\
         addr add 10.77.200.3/16 dev mv0\n\
         addr add fd77::c8:3/64 dev mv0 nodad")?;
    for address in ["10.77.200.3", "fd77::c8:3"] {
        let address = address.parse()?;
        talks(&b, &inner, address)?;
        talks(&node, &inner, address)?;
    }
    talks(&inner, &b, b.v4()?.into())?;
    talks(&inner, &b, b.v6()?.into())
}

#[test]
fn a_bridge_inside_a_pod_is_reachable() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let inner = node.sandbox("inner")?;
    a.ip("link add br0 type bridge\n\
          link set br0 up\n\
          link set eth0 master br0\n\
          link add tap0 type veth peer name eth0 netns inner\n\
          link set tap0 master br0\n\
          link set tap0 up")?;
    inner.ip("link set eth0 up\n\
         addr add 10.77.200.4/16 dev eth0\n\
         addr add fd77::c8:4/64 dev eth0 nodad")?;
    for address in ["10.77.200.4", "fd77::c8:4"] {
        let address = address.parse()?;
        talks(&b, &inner, address)?;
        talks(&node, &inner, address)?;
    }
    talks(&inner, &b, b.v4()?.into())?;
    talks(&inner, &b, b.v6()?.into())
}

#[test]
fn an_address_can_move_from_pod_to_pod() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b, c] = pods(&network)?;
    let (v4, v6) = (
        "10.77.200.5".parse::<Ipv4Addr>()?,
        "fd77::c8:5".parse::<Ipv6Addr>()?,
    );
    let take = format!("addr add {v4}/16 dev eth0\naddr add {v6}/64 dev eth0 nodad");
    let give = take.replace("add ", "del ").replace(" nodad", "");
    a.ip(&take)?;
    for address in [v4.into(), v6.into()] {
        talks(&b, &a, address)?;
        talks(&node, &a, address)?;
    }
    for (from, to) in [(&a, &c), (&c, &a)] {
        from.ip(&give)?;
        to.ip(&take)?;
        let (socket, mac) = eth0(to)?;
        socket.send(&Frame::gratuitous_arp(mac, v4))?;
        socket.send(&Frame::unsolicited_advertisement(mac, v6))?;
        for address in [v4.into(), v6.into()] {
            // No waiting: one lost packet and this fails.
            b.ping_with(address, 1, &["-W", "0.3"])?;
            node.ping_with(address, 1, &["-W", "0.3"])?;
            talks(&b, to, address)?;
        }
    }
    Ok(())
}

#[test]
fn networks_on_different_bridges_are_separate_segments() -> Result<()> {
    let node = Node::new()?;
    let one = Network::new(&node, Network::dual_stack(&node));
    let mut config = Network::dual_stack(&node);
    config["name"] = json!("other");
    config["bridge"] = json!("cni1");
    config["ipam"]["ranges"] = json!([[{"subnet": "10.78.0.0/16"}], [{"subnet": "fd78::/64"}]]);
    let two = Network::new(&node, config);
    let (a, b, other) = (one.pod("a")?, one.pod("b")?, two.pod("other")?);
    let ((at_a, mac_a), (at_b, _), (at_other, mac_other)) = (eth0(&a)?, eth0(&b)?, eth0(&other)?);
    let at_cni1 = PacketSocket::open(&node, "cni1")?;
    for destination in [MacAddr::BROADCAST, STRANGER, mac_other] {
        let frame = experimental(destination, mac_a);
        at_a.send(&frame)?;
        arrives(&at_b, &frame)?;
        stays_away(&at_other, &frame)?;
        stays_away(&at_cni1, &frame)?;
    }
    // The other network's addresses are answered for there, and not here.
    at_a.send(&Frame::arp_probe(mac_a, other.v4()?))?;
    let answer = at_a.receive(SILENCE, |seen| seen.ethertype() == Frame::ARP)?;
    ensure!(answer.is_none(), "{answer:?}");
    // The host routes between the two.
    talks(&a, &other, other.v4()?.into())?;
    talks(&a, &other, other.v6()?.into())
}

#[test]
fn separate_segments_may_have_the_same_addresses() -> Result<()> {
    let node = Node::new()?;
    let network = |name: &str, bridge: &str| {
        let mut config = Network::dual_stack(&node);
        config["name"] = json!(name);
        config["bridge"] = json!(bridge);
        // Two connected routes to one subnet could not both be right.
        config["isDefaultGateway"] = json!(false);
        Network::new(&node, config)
    };
    let (one, two) = (network("one", "cni0"), network("two", "cni1"));
    let (a, b) = (one.pod("a")?, one.pod("b")?);
    let (other_a, other_b) = (two.pod("other-a")?, two.pod("other-b")?);
    ensure!(addresses(&b)? == addresses(&other_b)?);
    for address in addresses(&b)? {
        talks(&a, &b, address)?;
        talks(&other_a, &other_b, address)?;
    }
    two.del(other_b.attachment())?;
    for address in addresses(&b)? {
        talks(&a, &b, address)?;
        ensure!(other_a.ping(address, 1).is_err(), "{address} is answered");
    }
    Ok(())
}

#[test]
fn networks_on_one_bridge_share_a_segment() -> Result<()> {
    let node = Node::new()?;
    let one = Network::new(&node, Network::dual_stack(&node));
    let mut config = Network::dual_stack(&node);
    config["name"] = json!("other");
    config["ipam"]["ranges"] = json!([
        [{"subnet": Network::V4_SUBNET, "rangeStart": "10.77.100.1"}],
        [{"subnet": Network::V6_SUBNET, "rangeStart": "fd77::100:1"}],
    ]);
    let two = Network::new(&node, config);
    let (a, other) = (one.pod("a")?, two.pod("other")?);
    let ((at_a, mac), (at_other, _)) = (eth0(&a)?, eth0(&other)?);
    let frame = experimental(MacAddr::BROADCAST, mac);
    at_a.send(&frame)?;
    arrives(&at_other, &frame)?;
    for address in addresses(&other)? {
        talks(&a, &other, address)?;
    }
    Ok(())
}

// Options of the port.

#[test]
fn a_frame_comes_back_to_its_port_only_in_hairpin_mode() -> Result<()> {
    for hairpin in [false, true] {
        let node = Node::new()?;
        let network = network_with(&node, "hairpinMode", json!(hairpin));
        let [a, _b] = pods(&network)?;
        let (at_a, mac) = eth0(&a)?;
        for frame in [
            experimental(MacAddr::BROADCAST, mac),
            // From here on the network knows where this station is.
            experimental(mac, STRANGER),
        ] {
            at_a.send(&frame)?;
            if hairpin {
                arrives(&at_a, &frame)?;
            } else {
                stays_away(&at_a, &frame)?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_host_sees_what_pods_send_each_other_only_in_promiscuous_mode() -> Result<()> {
    for promiscuous in [false, true] {
        let node = Node::new()?;
        let network = network_with(&node, "promiscMode", json!(promiscuous));
        let [a, b] = pods(&network)?;
        a.ping(b.v4()?.into(), 1)?;
        let ((at_a, mac_a), (at_b, mac_b)) = (eth0(&a)?, eth0(&b)?);
        let at_host = PacketSocket::open(&node, "cni0")?;
        let frame = experimental(mac_b, mac_a);
        at_a.send(&frame)?;
        arrives(&at_b, &frame)?;
        if promiscuous {
            // Not its own: the host's stack must not take it in.
            ensure!(arrives(&at_host, &frame)?.for_other);
        } else {
            stays_away(&at_host, &frame)?;
        }
        for address in addresses(&b)? {
            talks(&a, &b, address)?;
        }
        let flags = node.device("cni0")?["flags"].to_string();
        ensure!(flags.contains("PROMISC") == promiscuous, "{flags}");
    }
    Ok(())
}

#[test]
fn isolated_ports_reach_everything_but_each_other() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    let isolated = network_with(&node, "portIsolation", json!(true));
    let [a, b] = pods(&isolated)?;
    let open = Network::new(&node, Network::dual_stack(&node));
    let c = open.pod("open")?;
    let ((at_a, mac_a), (at_b, mac_b), (at_c, mac_c)) = (eth0(&a)?, eth0(&b)?, eth0(&c)?);
    for destination in [MacAddr::BROADCAST, STRANGER, mac_b] {
        let frame = experimental(destination, mac_a);
        at_a.send(&frame)?;
        stays_away(&at_b, &frame)?;
    }
    for destination in [MacAddr::BROADCAST, mac_c] {
        let frame = experimental(destination, mac_a);
        at_a.send(&frame)?;
        arrives(&at_c, &frame)?;
    }
    let frame = experimental(mac_a, mac_c);
    at_c.send(&frame)?;
    arrives(&at_a, &frame)?;
    for address in addresses(&b)? {
        ensure!(
            a.ping_with(address, 1, &["-W", "0.3"]).is_err(),
            "{address}"
        );
    }
    for address in addresses(&c)? {
        talks(&a, &c, address)?;
    }
    for gateway in gateways() {
        talks(&a, &node, gateway)?;
    }
    talks(&a, &outside, Outside::V4.into())
}

#[test]
fn the_mac_spoof_check_passes_only_the_pods_own_address() -> Result<()> {
    let node = Node::new()?;
    let network = network_with(&node, "macspoofchk", json!(true));
    let [a, b] = pods(&network)?;
    let ((at_a, mac_a), (at_b, mac_b)) = (eth0(&a)?, eth0(&b)?);
    let at_host = PacketSocket::open(&node, "cni0")?;
    for destination in [MacAddr::BROADCAST, mac_b] {
        for spoofed in [STRANGER, mac_b, MacAddr::of_device(&node, "cni0")?] {
            let frame = experimental(destination, spoofed);
            at_a.send(&frame)?;
            stays_away(&at_b, &frame)?;
            stays_away(&at_host, &frame)?;
        }
        let honest = experimental(destination, mac_a);
        at_a.send(&honest)?;
        arrives(&at_b, &honest)?;
    }
    // The lies were not learned, either.
    for address in addresses(&b)? {
        talks(&a, &b, address)?;
        talks(&node, &b, address)?;
    }
    Ok(())
}

#[test]
fn a_foreign_source_address_passes_without_the_check() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let ((at_a, _), (at_b, _)) = (eth0(&a)?, eth0(&b)?);
    let frame = experimental(MacAddr::BROADCAST, STRANGER);
    at_a.send(&frame)?;
    arrives(&at_b, &frame)?;
    Ok(())
}

// Address resolution.

#[test]
fn duplicate_address_detection_is_set_as_configured() -> Result<()> {
    for (enabled, accept) in [(false, "0"), (true, "1")] {
        let node = Node::new()?;
        let network = network_with(&node, "enabledad", json!(enabled));
        let [pod] = pods(&network)?;
        let value = pod.sysctl("net/ipv6/conf/eth0/accept_dad")?;
        ensure!(value == accept, "enabledad {enabled}: accept_dad {value}");
        if enabled {
            ensure!(pod.sysctl("net/ipv6/conf/eth0/enhanced_dad")? == "1");
        }
    }
    Ok(())
}

#[test]
fn duplicate_address_detection_finds_anothers_address_and_never_the_own() -> Result<()> {
    let node = Node::new()?;
    let network = network_with(&node, "enabledad", json!(true));
    let [a, b] = pods(&network)?;
    let state = |pod: &Pod, address: &Ipv6Addr| pod.run(&format!("ip addr show to {address}"));
    let settle = |pod: &Pod, address: &Ipv6Addr| {
        wait_for("end of detection", PATIENCE, || {
            let state = state(pod, address)?;
            Ok(!state.contains(" tentative ") || state.contains("dadfailed"))
        })
    };
    for (pod, own) in [(&a, a.v6()?), (&b, b.v6()?)] {
        settle(pod, &own)?;
        pod.ip(&format!(
            "addr del {own}/64 dev eth0\naddr add {own}/64 dev eth0"
        ))?;
        settle(pod, &own)?;
        ensure!(
            !state(pod, &own)?.contains("dadfailed"),
            "{}",
            state(pod, &own)?
        );
    }
    for taken in [a.v6()?, "fd77::1".parse()?] {
        b.ip(&format!("addr add {taken}/64 dev eth0"))?;
        settle(&b, &taken)?;
        ensure!(
            state(&b, &taken)?.contains("dadfailed"),
            "{}",
            state(&b, &taken)?
        );
    }
    Ok(())
}

#[test]
fn an_add_waits_for_duplicate_address_detection_and_fails_if_it_does() -> Result<()> {
    let node = Node::new()?;
    let network = network_with(&node, "enabledad", json!(true));
    let a = network.pod("a")?;
    let tentative = a.run("ip -6 addr show tentative")?;
    ensure!(tentative.is_empty(), "{tentative}");
    // What the next one would get, somebody has whom no store knows of.
    let taken = "fd77::3";
    a.ip(&format!("addr add {taken}/64 dev eth0 nodad"))?;
    let sandbox = node.sandbox("b")?;
    let error = network.add(&sandbox.attachment());
    let error = format!("{:#}", error.err().context("a duplicate was assigned")?);
    ensure!(
        error.contains("duplicate") && error.contains(taken),
        "{error}"
    );
    ensure!(sandbox.device_names()? == ["lo"]);
    // The addresses go round, so the next attempt has better luck.
    let attachment = sandbox.attachment();
    let b = network.pod_with(sandbox, attachment)?;
    talks(&a, &b, b.v6()?.into())
}

#[test]
fn probes_are_answered_for_others_and_never_for_the_asker() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let (socket, mac) = eth0(&a)?;
    let (mac_b, mac_host) = (
        MacAddr::of_device(&b, "eth0")?,
        MacAddr::of_device(&node, "cni0")?,
    );
    let gateway: Ipv4Addr = "10.77.0.1".parse()?;
    let arp_answer = |limit| {
        socket.receive(limit, |seen| {
            seen.ethertype() == Frame::ARP && seen.bytes.get(20..22) == Some(&[0, 2])
        })
    };
    let sender_of = |answer: &Captured| answer.bytes.get(22..28).map(<[u8]>::to_vec);
    for (address, owner) in [(b.v4()?, mac_b), (gateway, mac_host)] {
        let unicast = Frame::arp(owner, 1, (mac, a.v4()?), (MacAddr([0; 6]), address));
        for frame in [Frame::arp_probe(mac, address), unicast] {
            socket.send(&frame)?;
            let answer =
                arp_answer(PATIENCE)?.with_context(|| format!("no answer to {frame:?}"))?;
            ensure!(sender_of(&answer) == Some(owner.0.to_vec()), "{answer:?}");
            let second = arp_answer(SILENCE)?;
            ensure!(second.is_none(), "answered twice: {second:?}");
        }
    }
    socket.send(&Frame::arp_probe(mac, a.v4()?))?;
    let answer = arp_answer(SILENCE)?;
    ensure!(answer.is_none(), "{answer:?}");
    // Nobody has it, so nobody answers.
    socket.send(&Frame::arp_probe(mac, "10.77.222.222".parse()?))?;
    ensure!(arp_answer(SILENCE)?.is_none());

    // The same for neighbour solicitations; type 136 is an advertisement, and
    // its option, the last six bytes, holds the link-layer address.
    let advertisement = |limit, target: Ipv6Addr| {
        socket.receive(limit, |seen| {
            seen.ethertype() == Frame::IPV6
                && seen.bytes.get(54) == Some(&136)
                && seen.bytes.get(62..78) == Some(&target.octets())
        })
    };
    for (address, owner) in [(b.v6()?, mac_b), ("fd77::1".parse()?, mac_host)] {
        for source in [a.v6()?, Ipv6Addr::UNSPECIFIED] {
            socket.send(&Frame::solicitation(mac, source, address))?;
            let answer = advertisement(PATIENCE, address)?
                .with_context(|| format!("no answer for {address} to {source}"))?;
            ensure!(answer.bytes.ends_with(&owner.0), "{answer:?}");
        }
    }
    for source in [a.v6()?, Ipv6Addr::UNSPECIFIED] {
        socket.send(&Frame::solicitation(mac, source, a.v6()?))?;
        let answer = advertisement(SILENCE, a.v6()?)?;
        ensure!(answer.is_none(), "{answer:?}");
    }
    Ok(())
}

#[test]
fn neighbours_stay_reachable_when_probed() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let confirm = |from: &Namespace, device: &str, address: IpAddr| -> Result<()> {
        from.ping(address, 1)?;
        let entry = from.run(&format!("ip neigh show {address} dev {device}"))?;
        let mac = entry
            .split_whitespace()
            .skip_while(|word| *word != "lladdr")
            .nth(1)
            .with_context(|| format!("{address}: {entry:?}"))?;
        // Sends unicast requests, as the kernel does minutes later by itself.
        from.ip(&format!(
            "neigh change {address} lladdr {mac} dev {device} nud probe"
        ))?;
        wait_for(&format!("confirmation of {address}"), PATIENCE, || {
            Ok(from
                .run(&format!("ip neigh show {address} dev {device}"))?
                .contains("REACHABLE"))
        })
    };
    for address in addresses(&b)?.into_iter().chain(gateways()) {
        confirm(&a, "eth0", address)?;
    }
    for address in addresses(&a)? {
        confirm(&node, "cni0", address)?;
    }
    Ok(())
}

// Throughput.

#[test]
fn offloads_stay_on_and_large_transfers_are_intact() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    for offload in [
        Offload::TxChecksum,
        Offload::TcpSegmentation,
        Offload::GenericSegmentation,
    ] {
        ensure!(a.offload("eth0", offload)?, "{offload:?} of eth0");
        ensure!(node.offload("cni0", offload)?, "{offload:?} of cni0");
        ensure!(
            node.offload(b.host_veth()?, offload)?,
            "{offload:?} of the host veth"
        );
    }
    let host: &Namespace = &node;
    let (inside, other): (&Namespace, &Namespace) = (&a, &b);
    for (from, to, addresses) in [
        (inside, other, addresses(&b)?),
        (inside, host, gateways()),
        (host, inside, addresses(&a)?),
        (inside, &*outside, [Outside::V4.into(), Outside::V6.into()]),
        (&*outside, inside, addresses(&a)?),
    ] {
        for address in addresses {
            let server = EchoServer::start(to, address)?;
            from.tcp_transfer(server.address(), 30_000_000)
                .with_context(|| format!("to {address}"))?;
        }
    }
    Ok(())
}

#[test]
fn datagrams_larger_than_the_mtu_arrive_whole() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    for address in addresses(&b)? {
        let server = EchoServer::start(&b, address)?;
        a.udp_echo(server.address(), &[5; 20_000], PATIENCE)?;
    }
    let to_host = EchoServer::start(&node, gateways()[0])?;
    a.udp_echo(to_host.address(), &[5; 20_000], PATIENCE)?;
    Ok(())
}

#[test]
fn link_local_addresses_work() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let [a, b] = pods(&network)?;
    let link_local = |namespace: &Namespace, device: &str| -> Result<Ipv6Addr> {
        let mut found = None;
        wait_for("link-local address", PATIENCE, || {
            found = namespace.device(device)?["addr_info"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|info| info["scope"] == "link" && info.get("tentative").is_none())
                .find_map(|info| info["local"].as_str()?.parse().ok());
            Ok(found.is_some())
        })?;
        found.context("no link-local address")
    };
    link_local(&a, "eth0")?;
    let of_b = link_local(&b, "eth0")?;
    a.ping_with(of_b.into(), 2, &["-I", "eth0"])?;
    let of_gateway = link_local(&node, "cni0")?;
    a.ping_with(of_gateway.into(), 2, &["-I", "eth0"])?;
    Ok(())
}

#[test]
fn a_port_that_comes_back_with_another_pod_has_no_memory_of_the_first() -> Result<()> {
    let node = Node::new()?;
    let mut config = Network::dual_stack(&node);
    config["args"] = json!({"cni": {"ips": ["10.77.0.50", "fd77::50"]}});
    let one = Network::new(&node, config);
    let plain = Network::new(&node, Network::dual_stack(&node));
    let observer = plain.pod("observer")?;
    let fixed: [IpAddr; 2] = ["10.77.0.50".parse()?, "fd77::50".parse()?];
    for name in ["first", "second"] {
        // Same addresses, another MAC; the observer's neighbour entry is old.
        let pod = one.pod(name)?;
        settle(&node);
        for address in fixed {
            let server: SocketAddr = EchoServer::start(&pod, address)?.address();
            ensure!(server.ip() == address);
            observer
                .ping_with(address, 1, &["-W", "0.5"])
                .with_context(|| format!("from the observer to the {name}"))?;
            node.ping_with(address, 1, &["-W", "0.5"])
                .with_context(|| format!("from the host to the {name}"))?;
        }
        one.del(pod.attachment())?;
    }
    Ok(())
}
