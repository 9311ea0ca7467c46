//! As whom pods appear, and to whom.

use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Client, EchoServer, Namespace, Network, Node, Outside, PacketSocket, RawSocket,
};
use nix::libc;
use serde_json::{Value, json};

use crate::{
    By, GATEWAYS, IPTABLES, NODE, OUTSIDE, PATIENCE, addresses, both, by_stack_and_programs, each,
    flow::{Kind, PORT, Remote},
    is_stock, network, network_with, other_network, pod, reaches, reaches_by, remotes,
};

by_stack_and_programs! {
    the_outside_sees_the_node
    on_the_node_pods_keep_their_addresses
    replies_are_not_masqueraded
    strict_settings_break_nothing
}

/// Lets the outside answer to pods' own addresses.
fn route_to_pods(outside: &Outside) -> Result<()> {
    for subnet in [
        Network::V4_SUBNET,
        Network::V6_SUBNET,
        "10.88.0.0/16",
        "fd88::/64",
    ] {
        outside.route_to_node(subnet)?;
    }
    Ok(())
}

/// Rules that belong to a firewall, in the table `filter` of both families.
fn filter(node: &Node, rules: &[&str]) -> Result<()> {
    for iptables in IPTABLES {
        for rule in rules {
            node.run(&format!("{iptables} {rule}"))?;
        }
    }
    Ok(())
}

fn the_outside_sees_the_node(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    reaches(&pod, &remotes(&outside)?, NODE)
}

/// Though there is a way back to the pod's own address.
#[test]
fn a_way_back_changes_nothing() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    route_to_pods(&outside)?;
    let network = network(&node);
    let pod = pod(&network, "pod")?;
    reaches(&pod, &remotes(&outside)?, NODE)
}

/// Neither alone, nor beside a network that is masqueraded.
#[test]
fn without_masquerade_the_outside_sees_the_pod() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    route_to_pods(&outside)?;
    let remotes = remotes(&outside)?;
    let plain = network_with(&node, &json!({"ipMasq": false}));
    let one = pod(&plain, "one")?;
    reaches(&one, &remotes, addresses(&one)?)?;
    let other = other_network(&node);
    let two = pod(&other, "two")?;
    reaches(&two, &remotes, NODE)?;
    reaches(&one, &remotes, addresses(&one)?)
}

/// Two networks on one bridge: it is the pod's own that counts.
#[test]
fn on_a_shared_bridge_each_network_decides_for_its_pods() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    route_to_pods(&outside)?;
    let remotes = remotes(&outside)?;
    let masqueraded = network(&node);
    let plain = network_with(
        &node,
        &json!({"name": "plain", "ipMasq": false, "ipam": {
            "type": "host-local",
            "ranges": [
                [{"subnet": Network::V4_SUBNET, "rangeStart": "10.77.1.1"}],
                [{"subnet": Network::V6_SUBNET, "rangeStart": "fd77::1:1"}],
            ],
        }}),
    );
    let (one, two) = (pod(&masqueraded, "one")?, pod(&plain, "two")?);
    reaches(&one, &remotes, NODE)?;
    reaches(&two, &remotes, addresses(&two)?)
}

/// What stays on the node is nobody's business: pods of other networks, and the node.
fn on_the_node_pods_keep_their_addresses(by: By) -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let (network, other) = (by.network(&node), other_network(&node));
    let (one, two) = (network.pod("one")?, network.pod("two")?);
    let foreigner = pod(&other, "foreigner")?;
    let own = addresses(&one)?;
    let near = addresses(&two)?;
    let far = addresses(&foreigner)?;
    let here: &Namespace = &node;
    let rows: [(&str, &Namespace, [IpAddr; 2]); 4] = [
        ("neighbour", &two, near),
        ("foreigner", &foreigner, far),
        ("gateway", here, GATEWAYS),
        ("node", here, NODE),
    ];
    for (who, server, addresses) in rows {
        // As stock does, which masquerades what goes to other networks, too.
        if is_stock(&node) && who == "foreigner" {
            continue;
        }
        for (family, address) in addresses.into_iter().enumerate() {
            let server = EchoServer::start_as(server, (address, PORT).into(), who)?;
            for client in Client::ALL {
                let met = one
                    .meet(client, server.address(), PATIENCE)
                    .with_context(|| format!("{client:?} to {who}"))?;
                ensure!(met.client.ip() == own[family], "{who} saw {met:?}");
            }
            one.ping(address, 1).context(who)?;
        }
    }
    Ok(())
}

/// What others begin toward a pod is answered by the pod, as itself.
fn replies_are_not_masqueraded(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    route_to_pods(&outside)?;
    let (network, other) = (by.network(&node), other_network(&node));
    let server = network.pod("server")?;
    let foreigner = pod(&other, "foreigner")?;
    let remotes = [
        Remote::new(&server, server.v4()?)?,
        Remote::new(&server, server.v6()?)?,
    ];
    let here: &Namespace = &outside;
    let clients: [(&str, &Namespace); 3] = [
        ("outside", here),
        ("the node", &node),
        ("a foreigner", &foreigner),
    ];
    for (who, client) in clients {
        // Stock masquerades what goes from one network to another.
        if is_stock(&node) && who == "a foreigner" {
            continue;
        }
        each(both(&Kind::ALL), |(kind, family)| {
            // The flow checks that it hears whom it has asked.
            let mut flow = remotes[family].open(kind, client, 0)?;
            for _ in 0..3 {
                let seen = flow.exchange()?;
                if who == "outside" {
                    ensure!(seen.ip() == OUTSIDE[family], "seen as {seen}");
                }
            }
            Ok(())
        })
        .context(who)?;
    }
    Ok(())
}

/// Destinations that are exempt, beside those that border on them.
#[test]
fn exempt_destinations_see_the_pod() -> Result<()> {
    let rows: &[(Value, &[(&str, bool)])] = &[
        (json!([]), &[("203.0.113.1", true), ("2001:db8:e::1", true)]),
        (
            json!(["203.0.113.0/25", "2001:db8:e::/64"]),
            &[
                ("203.0.113.1", false),
                ("203.0.113.127", false),
                ("203.0.113.128", true),
                ("203.0.112.255", true),
                ("2001:db8:e::1", false),
                ("2001:db8:e:0:ffff:ffff:ffff:ffff", false),
                ("2001:db8:e:1::", true),
                ("2001:db8:d:ffff:ffff:ffff:ffff:ffff", true),
            ],
        ),
        (
            // An address, and one prefix within another.
            json!([
                "203.0.113.7",
                "192.0.2.0/24",
                "192.0.2.64/26",
                "2001:db8:e::7/128",
                "2001:db8:f::/48",
                "2001:db8:f:1::/64"
            ]),
            &[
                ("203.0.113.6", true),
                ("203.0.113.7", false),
                ("203.0.113.8", true),
                ("192.0.2.1", false),
                ("192.0.2.65", false),
                ("2001:db8:e::6", true),
                ("2001:db8:e::7", false),
                ("2001:db8:f:1::1", false),
                ("2001:db8:f:2::1", false),
            ],
        ),
        (
            json!(["0.0.0.0/0"]),
            &[("203.0.113.1", false), ("2001:db8:e::1", true)],
        ),
        (
            json!(["::/0"]),
            &[("203.0.113.1", true), ("2001:db8:e::1", false)],
        ),
    ];
    let node = Node::new()?;
    let outside = node.outside()?;
    route_to_pods(&outside)?;
    for &(_, destinations) in rows {
        for (destination, _) in destinations {
            let length = if destination.contains(':') { 128 } else { 32 };
            outside.ip(&format!("addr replace {destination}/{length} dev lo"))?;
        }
    }
    // All at once, so that each network has a policy of its own.
    let networks: Vec<Network> = (rows.iter().enumerate())
        .map(|(number, (exempt, _))| {
            network_with(
                &node,
                &json!({
                    "name": format!("net{number}"),
                    "bridge": format!("cni{number}"),
                    "ipMasqExempt": exempt,
                    "ipam": {"type": "host-local", "ranges": [
                        [{"subnet": format!("10.{}.0.0/16", 77 + number)}],
                        [{"subnet": format!("fd{}::/64", 77 + number)}],
                    ]},
                }),
            )
        })
        .collect();
    for number in 1..rows.len() {
        outside.route_to_node(&format!("10.{}.0.0/16", 77 + number))?;
        outside.route_to_node(&format!("fd{}::/64", 77 + number))?;
    }
    for (network, (exempt, destinations)) in networks.iter().zip(rows) {
        let pod = network.pod("pod")?;
        let own = addresses(&pod)?;
        each(destinations.iter(), |&(destination, masqueraded)| {
            let destination: IpAddr = destination.parse()?;
            let family = usize::from(destination.is_ipv6());
            let seen = if masqueraded { NODE } else { own }[family];
            let remote = Remote::new(&outside, destination)?;
            for kind in Kind::FREE {
                let met = remote.meet(kind, &pod, 0)?;
                ensure!(met.ip() == seen, "{kind:?} seen as {met}, not {seen}");
            }
            Ok(())
        })
        .with_context(|| exempt.to_string())?;
        drop(pod);
    }
    Ok(())
}

/// Makes the node a router of one IPv4 group, from one source, until the socket is
/// closed.
fn route_multicast(
    node: &Node,
    (from, to): (&str, &str),
    source: Ipv4Addr,
    group: Ipv4Addr,
) -> Result<RawSocket> {
    /// `linux/mroute.h`.
    const MRT_INIT: libc::c_int = 200;
    const MRT_ADD_VIF: libc::c_int = 202;
    const MRT_ADD_MFC: libc::c_int = 204;
    const VIFF_USE_IFINDEX: u8 = 8;
    const IGMP: u8 = 2;
    #[repr(C)]
    struct Device {
        number: u16,
        flags: u8,
        threshold: u8,
        rate_limit: u32,
        ifindex: u32,
        remote: u32,
    }
    #[repr(C)]
    struct Route {
        source: [u8; 4],
        group: [u8; 4],
        from: u16,
        hops: [u8; 32],
        counters: [u32; 3],
        expire: i32,
    }
    fn set<T>(socket: &RawSocket, name: libc::c_int, value: &T) -> Result<()> {
        // SAFETY: the value's address and size are those of `value`.
        let set = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::IPPROTO_IP,
                name,
                std::ptr::from_ref(value).cast(),
                libc::socklen_t::try_from(size_of::<T>())?,
            )
        };
        ensure!(
            set == 0,
            "option {name}: {}",
            std::io::Error::last_os_error()
        );
        Ok(())
    }
    let socket = RawSocket::open(node, Ipv4Addr::UNSPECIFIED.into(), IGMP)?;
    set(&socket, MRT_INIT, &1_i32)?;
    for (number, device) in [from, to].into_iter().enumerate() {
        let ifindex = node.device(device)?["ifindex"]
            .as_u64()
            .context("no index")?;
        let device = Device {
            number: u16::try_from(number)?,
            flags: VIFF_USE_IFINDEX,
            threshold: 1,
            rate_limit: 0,
            ifindex: u32::try_from(ifindex)?,
            remote: 0,
        };
        set(&socket, MRT_ADD_VIF, &device)?;
    }
    let mut hops = [0; 32];
    hops[1] = 1;
    let route = Route {
        source: source.octets(),
        group: group.octets(),
        from: 0,
        hops,
        counters: [0; 3],
        expire: 0,
    };
    set(&socket, MRT_ADD_MFC, &route)?;
    Ok(socket)
}

/// Nobody could answer a group's member that is shown as somebody else.
#[test]
fn groups_see_the_pod() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let pod = pod(&network, "pod")?;
    let group = Ipv4Addr::new(239, 1, 2, 3);
    let _router = route_multicast(&node, ("cni0", "uplink0"), pod.v4()?, group)?;
    let wire = PacketSocket::open(&outside, "eth0")?;
    let socket = pod.within(|| Ok(UdpSocket::bind("0.0.0.0:4000")?))?;
    socket.set_multicast_ttl_v4(8)?;
    socket.send_to(b"to the group", (group, 4000))?;
    let frame = wire.receive(PATIENCE, |frame| frame.bytes.ends_with(b"to the group"))?;
    let seen = frame.context("the group heard nothing")?.ip_source();
    ensure!(seen == Some(pod.v4()?.into()), "seen as {seen:?}");
    Ok(())
}

#[test]
fn what_is_no_prefix_is_refused_by_name() -> Result<()> {
    let node = Node::new()?;
    for (exempt, word) in [
        (json!(["203.0.113.0/33"]), "203.0.113.0/33"),
        (json!(["anywhere"]), "anywhere"),
        (json!(["203.0.113.77/27"]), "203.0.113.77/27"),
        (json!("203.0.113.0/24"), "ipMasqExempt"),
        (json!([7]), "ipMasqExempt"),
    ] {
        let network = network_with(&node, &json!({"ipMasqExempt": exempt}));
        let error = network.pod("pod").err().context("it was taken")?;
        let error = format!("{error:#}");
        ensure!(error.contains(word), "{exempt}: {error}");
    }
    Ok(())
}

/// What a careful operator sets on a node.
fn strict_settings_break_nothing(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    node.set_sysctl("net/ipv4/conf/all/rp_filter", "1")?;
    node.set_sysctl("net/ipv4/conf/default/rp_filter", "1")?;
    for device in node.device_names()? {
        node.set_sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "1")?;
    }
    filter(
        &node,
        &[
            "-A INPUT -m conntrack --ctstate INVALID -j DROP",
            "-A OUTPUT -m conntrack --ctstate INVALID -j DROP",
            "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
        ],
    )?;
    node.set_sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", "0")?;
    node.run("ip6tables -t raw -A PREROUTING -m rpfilter --invert -j DROP")?;
    let remotes = remotes(&outside)?;
    reaches(&pod, &remotes, NODE)?;
    // New pods as well.
    let other = other_network(&node);
    let other = crate::pod(&other, "other")?;
    reaches_by(&Kind::PORTS, &other, &remotes, NODE)?;
    for remote in OUTSIDE {
        let server = EchoServer::start(&outside, remote)?;
        pod.tcp_transfer(server.address(), 1 << 22)?;
    }
    Ok(())
}

/// The firewall sees what pods send as the pods have sent it, and what they get.
#[test]
fn a_firewall_decides_as_with_stock() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let pod = pod(&network, "pod")?;
    let own = addresses(&pod)?;
    let remotes = remotes(&outside)?;
    filter(&node, &["-P FORWARD DROP"])?;
    each(both(&Kind::ALL), |(kind, family)| {
        remotes[family].never_meets(kind, &pod, 0)
    })?;
    for (iptables, own) in IPTABLES.into_iter().zip(own) {
        for rule in [
            format!("-A FORWARD -i cni0 -o uplink0 -s {own} -j ACCEPT"),
            format!(
                "-A FORWARD -i uplink0 -o cni0 -d {own} \
                 -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
            ),
        ] {
            node.run(&format!("{iptables} {rule}"))?;
        }
    }
    reaches(&pod, &remotes, NODE)?;
    // What nobody has asked for is not let in.
    outside.route_to_node(Network::V4_SUBNET)?;
    outside.route_to_node(Network::V6_SUBNET)?;
    for address in own {
        let server = EchoServer::start_as(&pod, (address, 80).into(), "pod")?;
        for client in Client::ALL {
            let met = outside.meet(client, server.address(), Duration::from_millis(100));
            ensure!(met.is_err(), "{client:?} to {address} met {met:?}");
        }
    }
    Ok(())
}

/// With `netfilter` `none` the firewall is not asked.
#[test]
fn without_netfilter_no_firewall_decides() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network_with(&node, &json!({"netfilter": "none"}));
    let pod = pod(&network, "pod")?;
    let remotes = remotes(&outside)?;
    reaches(&pod, &remotes, NODE)?;
    filter(&node, &["-P FORWARD DROP"])?;
    reaches(&pod, &remotes, NODE)?;
    for remote in OUTSIDE {
        let server = EchoServer::start(&outside, remote)?;
        pod.tcp_transfer(server.address(), 1 << 22)?;
    }
    Ok(())
}

/// Rules that masquerade, of all tables of nftables.
fn masquerading_rules(node: &Node) -> Result<Vec<String>> {
    let rules = node.run("nft -s list ruleset")?;
    Ok((rules.lines())
        .filter(|line| line.contains("masquerade"))
        .map(|line| line.trim().to_owned())
        .collect())
}

/// In netfilter, for those who want it there: by rules of the networks, not of pods.
#[test]
fn netfilter_may_masquerade() -> Result<()> {
    for backend in ["nftables", "iptables"] {
        let node = Node::new()?;
        let outside = node.outside()?;
        outside.ip("addr add 203.0.113.1/32 dev lo")?;
        route_to_pods(&outside)?;
        let before = node.run("nft -s list ruleset")?;
        let exempt = json!({"ipMasqBackend": backend, "ipMasqExempt": ["203.0.113.0/24"]});
        let network = network_with(&node, &exempt);
        let one = pod(&network, "one")?;
        let remotes = remotes(&outside)?;
        reaches(&one, &remotes, NODE)?;
        let rules = node.run("nft -s list ruleset")?;
        ensure!(!masquerading_rules(&node)?.is_empty(), "{rules}");
        let two = network.pod("two")?;
        reaches_by(&Kind::PORTS, &two, &remotes, NODE)?;
        ensure!(
            node.run("nft -s list ruleset")? == rules,
            "a rule for a pod: {rules}"
        );
        let exempt = Remote::new(&outside, "203.0.113.1".parse::<IpAddr>()?)?;
        let seen = exempt.meet(Kind::Udp, &two, 0)?;
        ensure!(seen.ip() == addresses(&two)?[0], "{seen}");
        network.check(two.attachment())?;
        network.del(one.attachment())?;
        ensure!(
            node.run("nft -s list ruleset")? == rules,
            "not the last pod"
        );
        reaches_by(&Kind::PORTS, &two, &remotes, NODE)?;
        network.del(two.attachment())?;
        ensure!(masquerading_rules(&node)?.is_empty());
        ensure!(
            node.run("nft -s list ruleset")? == before,
            "{}",
            node.run("nft list ruleset")?
        );
    }
    Ok(())
}

/// A network whose gateway is not the pods' default route still has one.
#[test]
fn a_gateway_by_a_single_route_will_do() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network_with(
        &node,
        &json!({
            "isDefaultGateway": false,
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": Network::V4_SUBNET}], [{"subnet": Network::V6_SUBNET}]],
                "routes": [{"dst": "198.51.100.0/24"}, {"dst": "2001:db8:ffff::/64"}],
            },
        }),
    );
    let pod = pod(&network, "pod")?;
    reaches(&pod, &remotes(&outside)?, NODE)
}

/// Networks of one family.
#[test]
fn one_family_is_enough() -> Result<()> {
    for (family, subnet) in [Network::V4_SUBNET, Network::V6_SUBNET]
        .into_iter()
        .enumerate()
    {
        let node = Node::new()?;
        let outside = node.outside()?;
        let ipam = json!({"type": "host-local", "ranges": [[{"subnet": subnet}]]});
        let network = network_with(&node, &json!({"ipam": ipam}));
        let pod = pod(&network, "pod")?;
        let remote = Remote::new(&outside, OUTSIDE[family])?;
        each(Kind::ALL, |kind| {
            let seen = remote.meet(kind, &pod, 0)?;
            ensure!(seen.ip() == NODE[family], "seen as {seen}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The node's own flows are its own.
#[test]
fn the_node_speaks_for_itself() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let _pod = pod(&network, "pod")?;
    let remotes = remotes(&outside)?;
    reaches(&node, &remotes, NODE)?;
    let servers = [Remote::new(&node, NODE[0])?, Remote::new(&node, NODE[1])?];
    reaches(&outside, &servers, OUTSIDE)
}
