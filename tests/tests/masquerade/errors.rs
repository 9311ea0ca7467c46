//! What happens on the way: ICMP errors in both directions, links that are too small,
//! fragments.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    EchoServer, Far, Frame, MacAddr, Namespace, Node, Offload, Outside, Packet, PacketSocket, Pod,
    RawSocket, Receive as _, ReceiveFrom as _, internet_checksum, wait_for, when_free,
};
use nix::libc;

use crate::{
    By, GATEWAYS, IPTABLES, NODE, OUTSIDE, PATIENCE, SILENCE, addresses, both,
    by_stack_and_programs, each,
    flow::{Kind, Remote, udp_socket},
    settle,
};

by_stack_and_programs! {
    an_error_of_a_router_is_about_what_the_pod_has_sent
    nobody_there_is_a_refusal
    errors_of_pods_are_about_what_they_were_sent
    a_smaller_link_on_the_way_is_found
    an_uplink_smaller_than_the_pods_devices_is_found
    a_complaint_with_a_short_quotation_reaches_the_pod
    datagrams_larger_than_the_mtu_are_echoed
    fragments_may_come_in_any_order
    large_transfers_are_intact
}

/// Lets routers complain as often as they have reason to.
fn without_rate_limits(machines: &[&Namespace]) -> Result<()> {
    for machine in machines {
        for (limit, none) in [
            ("net/ipv4/icmp_ratelimit", "0"),
            ("net/ipv4/icmp_ratemask", "0"),
            ("net/ipv6/icmp/ratelimit", "0"),
            ("net/ipv6/icmp/ratemask", ""),
        ] {
            machine.set_sysctl(limit, none)?;
        }
    }
    Ok(())
}

/// The IP packet in a frame, with what a router changes in it taken out.
fn as_sent(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    match packet.first().map(|first| first >> 4) {
        Some(4) => {
            packet[8] = 0;
            packet[10..12].fill(0);
        }
        Some(6) => packet[7] = 0,
        _ => {}
    }
    packet
}

/// A packet that may not pass so many routers. The error must quote it byte by byte.
fn an_error_of_a_router_is_about_what_the_pod_has_sent(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let far = Far::new(&node, &outside, 1500)?;
    let network = by.network(&node);
    let pod = crate::pod(&network, "pod")?;
    without_rate_limits(&[&node, &outside, &far.router])?;
    // So that what is captured has its checksum.
    pod.set_offload("eth0", Offload::TxChecksum, false)?;
    let sent = PacketSocket::open(&node, pod.host_veth()?)?;
    let routers: [[IpAddr; 2]; 3] = [
        GATEWAYS,
        OUTSIDE,
        [Far::ROUTER[0].parse()?, Far::ROUTER[1].parse()?],
    ];
    let remotes = [
        Remote::new(&far.client, Far::CLIENT[0].parse::<IpAddr>()?)?,
        Remote::new(&far.client, Far::CLIENT[1].parse::<IpAddr>()?)?,
    ];
    let fresh_and_known = both(&Kind::ALL)
        .into_iter()
        .flat_map(|row| [(row, true), (row, false)]);
    each(fresh_and_known, |((kind, family), fresh)| {
        // Of TCP, the handshake must be over.
        if fresh && kind == Kind::Tcp {
            return Ok(());
        }
        let mut flow = remotes[family].open(kind, &pod, 0)?;
        if !fresh {
            flow.exchange()?;
        }
        let errors = RawSocket::open(&pod, addresses(&pod)?[family], [1, 58][family])?;
        for (hops, router) in routers.iter().enumerate() {
            flow.set_hop_limit(u8::try_from(hops)? + 1)?;
            // Those that ask for errors get this one, the next time.
            let _ = flow.sends();
            let found = errors.receive(PATIENCE, |from, message| {
                let wanted: u8 = if family == 0 { 11 } else { 3 };
                (message.first() == Some(&wanted)).then(|| (from, message.to_vec()))
            })?;
            let (from, message) = found.with_context(|| format!("no error from hop {hops}"))?;
            ensure!(from == router[family], "hop {hops} is {from}");
            // The kernel looks at that of IPv6 only.
            ensure!(
                family == 1 || internet_checksum(&message) == 0,
                "wrong checksum"
            );
            let quoted = &message[8..];
            if family == 0 {
                ensure!(internet_checksum(&quoted[..20]) == 0, "wrong quoted header");
            }
            let quoted = as_sent(quoted);
            sent.receive(SILENCE, |frame| {
                let packet = frame.bytes.get(14..).unwrap_or_default();
                as_sent(packet).starts_with(&quoted[..quoted.len().min(packet.len())])
            })?
            .with_context(|| format!("hop {hops} quotes what was not sent: {quoted:x?}"))?;
            // TCP goes on when its timer says so.
            if kind == Kind::Tcp {
                break;
            }
        }
        flow.set_hop_limit(64)?;
        flow.exchange()?;
        Ok(())
    })
}

fn is_refused(result: io::Result<usize>) -> Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        other => Err(anyhow::anyhow!("not a refusal but {other:?}")),
    }
}

/// Two pods that speak from the same port, at once: each learns of its own.
fn nobody_there_is_a_refusal(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let far = Far::new(&node, &outside, 1500)?;
    let network = by.network(&node);
    let pods = [network.pod("one")?, network.pod("two")?];
    settle(&node);
    without_rate_limits(&[&outside, &far.client])?;
    let fars: [IpAddr; 2] = [Far::CLIENT[0].parse()?, Far::CLIENT[1].parse()?];
    for address in OUTSIDE.into_iter().chain(fars) {
        let nobody = SocketAddr::new(address, 9999);
        for pod in &pods {
            let error = pod.tcp_echo(nobody, b"anyone?", PATIENCE).err();
            let error = error.context("an answer of nobody")?;
            ensure!(crate::is(&error, ErrorKind::ConnectionRefused), "{error:#}");
        }
        let sockets = pods
            .iter()
            .map(|pod| {
                let socket = connected(pod, 4000, nobody)?;
                socket.send(b"anyone?")?;
                Ok(socket)
            })
            .collect::<Result<Vec<_>>>()?;
        for socket in &sockets {
            is_refused(socket.receive(&mut [0; 10])).with_context(|| nobody.to_string())?;
        }
        // And the other way round.
        for socket in sockets.iter().rev() {
            socket.send(b"anyone?")?;
            is_refused(socket.receive(&mut [0; 10])).with_context(|| nobody.to_string())?;
        }
    }
    Ok(())
}

fn connected(from: &Namespace, port: u16, to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() {
        [0; 4].into()
    } else {
        [0; 16].into()
    };
    let socket = when_free(|| {
        from.within(|| {
            let socket = udp_socket((any, port).into())?;
            socket.connect(to)?;
            Ok(socket)
        })
    })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// The pod's socket is gone when the answer comes: the remote must learn it, of the very
/// port that it has answered.
fn errors_of_pods_are_about_what_they_were_sent(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pods = [network.pod("one")?, network.pod("two")?];
    settle(&node);
    without_rate_limits(&[&pods[0], &pods[1]])?;
    for address in OUTSIDE {
        let server = outside.within(|| Ok(UdpSocket::bind((address, 0))?))?;
        server.set_read_timeout(Some(PATIENCE))?;
        // The same port in both pods, so that one appears with another.
        let mut seen = Vec::new();
        for pod in &pods {
            connected(pod, 4000, server.local_addr()?)?.send(b"?")?;
            seen.push(server.receive_from(&mut [0; 10])?.1);
        }
        crate::all_differ(&seen)?;
        for seen in seen {
            outside.within(|| Ok(server.connect(seen)?))?;
            server.send(b"!")?;
            is_refused(server.receive(&mut [0; 10])).with_context(|| format!("of {seen}"))?;
        }
    }
    Ok(())
}

fn knows_mtu(pod: &Pod, remote: IpAddr, mtu: u32) -> Result<bool> {
    let route = pod.run(&format!("ip route get {remote}"))?;
    Ok(route.contains(&format!("mtu {mtu}")))
}

/// Uploads that are too large for a link: over UDP, which is cut when the pod has
/// learned of it, and not at all if the pod does not allow it; and over TCP.
fn uploads_fit(node: &Node, far: &Far, by: By, mtu: u32) -> Result<()> {
    let network = by.network(node);
    // Each learns for itself.
    let (by_udp, by_tcp) = (network.pod("udp")?, network.pod("tcp")?);
    settle(node);
    for address in Far::CLIENT {
        let address: IpAddr = address.parse()?;
        let echo = EchoServer::start(&far.client, address)?;
        let server = echo.address();
        // First, while the remote knows of nothing and announces large segments.
        by_tcp
            .tcp_transfer(server, 1 << 20)
            .with_context(|| format!("TCP to {server}"))?;
        ensure!(
            knows_mtu(&by_tcp, address, mtu)?,
            "TCP to {server} learned nothing"
        );
        let socket = connected(&by_udp, 0, server)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        wait_for("news of a smaller path", PATIENCE, || {
            // What comes back is the error, perhaps.
            let _ = socket.send(&[7; 1400]);
            let _ = socket.receive(&mut [0; 2000]);
            knows_mtu(&by_udp, address, mtu)
        })?;
        // The remote has to learn the same.
        wait_for("echo", PATIENCE, || {
            let limit = Duration::from_millis(200);
            by_udp.udp_echo(server, &[7; 1400], limit).map(|_| true)
        })
        .with_context(|| format!("UDP to {server}"))?;
        by_udp.udp_echo(server, &[7; 4000], PATIENCE)?;
        let strict = connected(&by_udp, 0, server)?;
        never_fragment(&strict)?;
        let sent = strict.send(&[7; 1400]);
        ensure!(
            sent.as_ref().err().and_then(io::Error::raw_os_error) == Some(libc::EMSGSIZE),
            "{sent:?}"
        );
    }
    Ok(())
}

/// Sets `IP_MTU_DISCOVER` or its like to `DO`.
fn never_fragment(socket: &UdpSocket) -> Result<()> {
    use std::os::fd::AsRawFd as _;
    let (level, name, value) = match socket.local_addr()? {
        SocketAddr::V4(_) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DO,
        ),
        SocketAddr::V6(_) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DO,
        ),
    };
    // SAFETY: the value's address and size are those of `value`.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            libc::socklen_t::try_from(size_of_val(&value))?,
        )
    };
    ensure!(set == 0, "{}", io::Error::last_os_error());
    Ok(())
}

/// The pod learns of it from a router's complaints about what the node has sent.
fn a_smaller_link_on_the_way_is_found(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let far = Far::new(&node, &outside, 1280)?;
    without_rate_limits(&[&outside, &far.router])?;
    uploads_fit(&node, &far, by, 1280)
}

/// The node itself is the router that has to complain.
fn an_uplink_smaller_than_the_pods_devices_is_found(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip("link set uplink0 mtu 1280")?;
    outside.ip("link set eth0 mtu 1280")?;
    let far = Far::new(&node, &outside, 1500)?;
    without_rate_limits(&[&node])?;
    uploads_fit(&node, &far, by, 1280)
}

/// A complaint that quotes no more than the specification demands.
fn a_complaint_with_a_short_quotation_reaches_the_pod(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = crate::pod(&network, "pod")?;
    let wire = PacketSocket::open(&outside, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&outside, "eth0")?,
        MacAddr::of_device(&node, "uplink0")?,
    );
    for address in OUTSIDE {
        let remote = Remote::new(&outside, address)?;
        let mut flow = remote.open(Kind::Udp, &pod, 0)?;
        let datagram = Packet::udp(flow.exchange()?, remote.address, &[7; 1450]);
        let complaint = Packet::too_big(address, &datagram, 1400);
        wire.send(&Frame::ip(to, from, &complaint.bytes()))?;
        wait_for("news of a smaller path", PATIENCE, || {
            knows_mtu(&pod, address, 1400)
        })?;
    }
    Ok(())
}

/// Turns on netfilter's connection tracking, which puts fragments together.
fn track(node: &Node) -> Result<()> {
    for iptables in IPTABLES {
        node.run(&format!(
            "{iptables} -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT"
        ))?;
    }
    Ok(())
}

fn datagrams_larger_than_the_mtu_are_echoed(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = crate::pod(&network, "pod")?;
    for tracked in [false, true] {
        if tracked {
            track(&node)?;
        }
        for address in OUTSIDE {
            let server = EchoServer::start(&outside, address)?;
            for size in [1472, 1473, 4000, 20_000, 60_000] {
                let payload: Vec<u8> = (0..=255).cycle().take(size).collect();
                pod.udp_echo(server.address(), &payload, PATIENCE)
                    .with_context(|| format!("{size} bytes, tracked: {tracked}"))?;
            }
            pod.ping_with(address, 3, &["-s", "5000"])
                .with_context(|| format!("tracked: {tracked}"))?;
        }
    }
    Ok(())
}

/// With large packets and unfinished checksums, as the kernel hands them on, and
/// without.
fn large_transfers_are_intact(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = crate::pod(&network, "pod")?;
    let servers = OUTSIDE.map(|address| EchoServer::start(&outside, address));
    let ends: [(&Namespace, &str); 2] = [(&pod, "eth0"), (&outside, "eth0")];
    for (offloads, bytes) in [(true, 20_000_000), (false, 2_000_000)] {
        for (namespace, device) in ends {
            for offload in [Offload::TxChecksum, Offload::GenericSegmentation] {
                namespace.set_offload(device, offload, offloads)?;
            }
        }
        for server in &servers {
            let server = server
                .as_ref()
                .map_err(|error| anyhow::anyhow!("{error:#}"))?;
            pod.tcp_transfer(server.address(), bytes)
                .with_context(|| format!("{}, offloads: {offloads}", server.address()))?;
        }
    }
    Ok(())
}

/// Both ways, with and without options and netfilter's connection tracking.
fn fragments_may_come_in_any_order(by: By) -> Result<()> {
    const SIZE: usize = 3000;
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = crate::pod(&network, "pod")?;
    let wires = [
        (
            PacketSocket::open(&pod, "eth0")?,
            MacAddr::of_device(&node, "cni0")?,
            MacAddr::of_device(&pod, "eth0")?,
        ),
        (
            PacketSocket::open(&outside, "eth0")?,
            MacAddr::of_device(&node, "uplink0")?,
            MacAddr::of_device(&outside, "eth0")?,
        ),
    ];
    let payload: Vec<u8> = (0..=255).cycle().take(SIZE).collect();
    let mut identification = 0;
    let mut send = |side: usize, packet: &Packet, order: [usize; 3]| -> Result<()> {
        identification += 1;
        let fragments = packet.fragments(identification, 1104);
        let (wire, to, from) = &wires[side];
        for at in order {
            wire.send(&Frame::ip(*to, *from, &fragments[at]))?;
        }
        Ok(())
    };
    let mut port = 4000;
    for tracked in [false, true] {
        if tracked {
            track(&node)?;
        }
        for (family, address) in OUTSIDE.into_iter().enumerate() {
            let remote = outside.within(|| Ok(UdpSocket::bind((address, 7))?))?;
            remote.set_read_timeout(Some(PATIENCE))?;
            let mut buffer = vec![0; 4000];
            for order in [
                [0, 1, 2],
                [0, 2, 1],
                [1, 0, 2],
                [1, 2, 0],
                [2, 0, 1],
                [2, 1, 0],
            ] {
                for options in [false, true] {
                    let what = format!("{order:?} to {address}, options {options}, {tracked}");
                    // The flow's first packet is in fragments.
                    port += 1;
                    let own = SocketAddr::new(addresses(&pod)?[family], port);
                    let socket = pod.within(|| Ok(UdpSocket::bind(own)?))?;
                    socket.set_read_timeout(Some(PATIENCE))?;
                    let with = |packet: Packet| {
                        if options {
                            packet.with_options()
                        } else {
                            packet
                        }
                    };
                    let there = with(Packet::udp(own, (address, 7).into(), &payload));
                    send(0, &there, order).context(what.clone())?;
                    let (length, seen) = remote
                        .receive_from(&mut buffer)
                        .with_context(|| format!("{what}: the remote"))?;
                    ensure!(buffer[..length] == payload, "{what}: {length} bytes");
                    ensure!(seen.ip() == NODE[family], "{what}: seen as {seen}");
                    let back = with(Packet::udp((address, 7).into(), seen, &payload));
                    send(1, &back, order)?;
                    let (length, from) = socket
                        .receive_from(&mut buffer)
                        .with_context(|| format!("{what}: the pod"))?;
                    ensure!(buffer[..length] == payload, "{what}: {length} bytes");
                    ensure!(from == (address, 7).into(), "{what}: from {from}");
                }
            }
        }
    }
    Ok(())
}

/// What the outside itself complains of when it is told to reject.
#[test]
fn a_rejection_by_a_firewall_reaches_the_pod() -> Result<()> {
    let node = Node::new()?;
    let outside: Outside = node.outside()?;
    let network = crate::network(&node);
    let pod = crate::pod(&network, "pod")?;
    for (iptables, reason) in IPTABLES
        .into_iter()
        .zip(["icmp-host-prohibited", "icmp6-adm-prohibited"])
    {
        outside.run(&format!(
            "{iptables} -A INPUT -p udp --dport 9999 -j REJECT --reject-with {reason}"
        ))?;
    }
    for address in OUTSIDE {
        let socket = connected(&pod, 0, (address, 9999).into())?;
        socket.send(b"?")?;
        let error = socket.receive(&mut [0; 10]).err().context("an answer")?;
        let number = error.raw_os_error();
        ensure!(
            number == Some(libc::EHOSTUNREACH) || number == Some(libc::EACCES),
            "{error}"
        );
    }
    Ok(())
}
