//! The node's addresses, and the devices by which its pods' packets leave.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    EchoServer, Joined, Namespace, Network, Node, Outside, Pod, Tunnel, wait_for,
};

use serde_json::json;

use crate::{
    By, IPTABLES, NODE, OUTSIDE, PATIENCE, addresses, both, by_stack_and_programs, each,
    flow::{Flow, Kind, PORT, Remote},
    is_stock, network_with, pod, reaches, reaches_by, remotes,
};

/// The node's addresses and the other machine's on a second uplink.
const NODE_THERE: [&str; 2] = ["203.0.113.2", "2001:db8:2::2"];
const ELSEWHERE: [&str; 2] = ["203.0.113.1", "2001:db8:2::1"];
/// An address behind both uplinks.
const BEHIND: [&str; 2] = ["192.0.2.99", "2001:db8:99::1"];
/// Another address of the node's first uplink.
const NEW: [&str; 2] = ["198.51.100.50", "2001:db8:ffff::50"];

by_stack_and_programs! {
    new_flows_have_the_new_address
    each_route_has_its_uplinks_address
    rules_for_packets_choose_the_uplink
    a_route_chooses_the_address
    when_an_uplink_fails_flows_go_on_by_the_other
    a_new_uplink_is_found_by_the_next_call
    flows_stay_on_one_of_two_ways
    an_uplink_may_be_a_tunnel
    an_uplink_may_be_a_bridge
}

fn parsed(addresses: [&str; 2]) -> Result<[IpAddr; 2]> {
    Ok([addresses[0].parse()?, addresses[1].parse()?])
}

/// Gives a device an address of both families.
fn give(machine: &Namespace, device: &str, [v4, v6]: [&str; 2]) -> Result<()> {
    machine.ip(&format!(
        "addr add {v4}/24 dev {device}\naddr add {v6}/64 dev {device} nodad"
    ))
}

/// A second uplink, and who is there.
fn second_uplink(node: &Node) -> Result<Namespace> {
    let elsewhere = node.machine()?;
    node.connect("uplink1", &elsewhere, "eth0")?;
    give(node, "uplink1", NODE_THERE)?;
    give(&elsewhere, "eth0", ELSEWHERE)?;
    Ok(elsewhere)
}

/// `ip` with both families' words.
fn both_families(machine: &Namespace, script: impl Fn(usize) -> String) -> Result<()> {
    for (family, option) in ["-4", "-6"].into_iter().enumerate() {
        machine.run(&format!("ip {option} {}", script(family)))?;
    }
    Ok(())
}

/// No call of the plugin comes between: the kernel is asked when a flow begins.
fn new_flows_have_the_new_address(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    let remotes = remotes(&outside)?;
    reaches(&pod, &remotes, NODE)?;
    let mut old = both(&[Kind::Udp, Kind::Echo])
        .into_iter()
        .map(|(kind, family)| remotes[family].open(kind, &pod, 4000))
        .collect::<Result<Vec<Flow>>>()?;
    for flow in &mut old {
        flow.exchange()?;
    }
    for ([v4, v6], now) in [
        (NEW, parsed(NEW)?),
        (
            ["198.51.100.51", "2001:db8:ffff::51"],
            parsed(["198.51.100.51", "2001:db8:ffff::51"])?,
        ),
    ] {
        node.ip("addr flush dev uplink0 scope global")?;
        give(&node, "uplink0", [v4, v6])?;
        node.ip(&format!(
            "route replace default via {}\nroute replace default via {}",
            OUTSIDE[0], OUTSIDE[1]
        ))?;
        reaches_by(&Kind::PORTS, &pod, &remotes, now).with_context(|| format!("at {v4}"))?;
        // Those that nobody has to keep take the new one, too, soon.
        for flow in &mut old {
            let family = usize::from(flow.remote_is_v6());
            flow.limit = Duration::from_millis(300);
            wait_for("flow of the new address", PATIENCE, || {
                Ok(flow.says()?.ip() == now[family])
            })?;
            flow.exchange()?;
        }
    }
    Ok(())
}

fn each_route_has_its_uplinks_address(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let elsewhere = second_uplink(&node)?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    let theirs = parsed(ELSEWHERE)?;
    let there = [
        Remote::new(&elsewhere, theirs[0])?,
        Remote::new(&elsewhere, theirs[1])?,
    ];
    reaches(&pod, &remotes(&outside)?, NODE)?;
    reaches(&pod, &there, parsed(NODE_THERE)?)
}

/// By others, packets leave as pods have sent them.
#[test]
fn only_the_uplinks_that_are_named_masquerade() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let elsewhere = second_uplink(&node)?;
    let network = network_with(&node, &json!({"uplinks": ["uplink0"]}));
    let pod = pod(&network, "pod")?;
    let theirs = parsed(ELSEWHERE)?;
    let there = [
        Remote::new(&elsewhere, theirs[0])?,
        Remote::new(&elsewhere, theirs[1])?,
    ];
    for (subnet, via) in [Network::V4_SUBNET, Network::V6_SUBNET]
        .into_iter()
        .zip(NODE_THERE)
    {
        elsewhere.ip(&format!("route add {subnet} via {via}"))?;
    }
    reaches(&pod, &remotes(&outside)?, NODE)?;
    reaches(&pod, &there, addresses(&pod)?)
}

/// Two machines with one address; the second is behind the uplink that only some
/// packets take.
fn rules_for_packets_choose_the_uplink(by: By) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let elsewhere = second_uplink(&node)?;
    for machine in [&*outside, &elsewhere] {
        machine.ip(&format!(
            "addr add {}/32 dev lo\naddr add {}/128 dev lo",
            BEHIND[0], BEHIND[1]
        ))?;
    }
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    both_families(&node, |family| {
        format!(
            "route add default via {} dev uplink1 table 100",
            ELSEWHERE[family]
        )
    })?;
    let behind = parsed(BEHIND)?;
    let here = [
        Remote::new(&outside, behind[0])?,
        Remote::new(&outside, behind[1])?,
    ];
    let there = [
        Remote::new(&elsewhere, behind[0])?,
        Remote::new(&elsewhere, behind[1])?,
    ];
    reaches(&pod, &here, NODE).context("before there are rules")?;
    let subnets = [Network::V4_SUBNET, Network::V6_SUBNET];
    let by_source = |verb: &str| {
        both_families(&node, |family| {
            format!("rule {verb} from {} lookup 100", subnets[family])
        })
    };
    by_source("add")?;
    reaches(&pod, &there, parsed(NODE_THERE)?).context("from the subnet")?;
    by_source("del")?;
    reaches(&pod, &here, NODE).context("without the rule")?;
    both_families(&node, |_| "rule add iif cni0 lookup 100".to_owned())?;
    reaches(&pod, &there, parsed(NODE_THERE)?).context("from the gateway device")?;
    both_families(&node, |_| "rule del iif cni0 lookup 100".to_owned())?;
    for protocol in ["udp", "tcp"] {
        both_families(&node, |_| {
            format!("rule add ipproto {protocol} dport {PORT} lookup 100")
        })?;
    }
    reaches_by(&Kind::PORTS[..3], &pod, &there, parsed(NODE_THERE)?).context("by their ports")?;
    for protocol in ["udp", "tcp"] {
        both_families(&node, |_| {
            format!("rule del ipproto {protocol} dport {PORT} lookup 100")
        })?;
    }
    // Marks are netfilter's, which programs alone do not ask.
    if by == By::Stack {
        for (iptables, subnet) in IPTABLES.into_iter().zip(subnets) {
            node.run(&format!(
                "{iptables} -t mangle -A PREROUTING -i cni0 -s {subnet} -j MARK --set-mark 7"
            ))?;
        }
        both_families(&node, |_| "rule add fwmark 7 lookup 100".to_owned())?;
        reaches(&pod, &there, parsed(NODE_THERE)?).context("by a mark")?;
    }
    Ok(())
}

/// An address of the route's own, of the device or of another; a second one of the
/// device alone is none.
fn a_route_chooses_the_address(by: By) -> Result<()> {
    const ON_LOOPBACK: [&str; 2] = ["192.0.2.77", "2001:db8:77::1"];
    let node = Node::new()?;
    let outside = node.outside()?;
    outside.ip(&format!(
        "addr add {}/32 dev lo\naddr add {}/128 dev lo",
        BEHIND[0], BEHIND[1]
    ))?;
    node.ip(&format!(
        "addr add {}/32 dev lo\naddr add {}/128 dev lo nodad",
        ON_LOOPBACK[0], ON_LOOPBACK[1]
    ))?;
    outside.route_to_node(ON_LOOPBACK[0])?;
    outside.route_to_node(ON_LOOPBACK[1])?;
    // IPv6 prefers the newest address but for those that are deprecated.
    node.ip(&format!(
        "addr add {}/24 dev uplink0\naddr add {}/64 dev uplink0 nodad preferred_lft 0",
        NEW[0], NEW[1]
    ))?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    let behind = parsed(BEHIND)?;
    let remotes = [
        Remote::new(&outside, behind[0])?,
        Remote::new(&outside, behind[1])?,
    ];
    reaches(&pod, &remotes, NODE).context("by default")?;
    // Netfilter's own masquerade does not look at the route's.
    if is_stock(&node) {
        return Ok(());
    }
    for source in [NEW, ON_LOOPBACK] {
        both_families(&node, |family| {
            format!(
                "route replace {} via {} src {}",
                BEHIND[family], OUTSIDE[family], source[family]
            )
        })?;
        reaches_by(&Kind::PORTS, &pod, &remotes, parsed(source)?)
            .with_context(|| format!("src {}", source[0]))?;
    }
    Ok(())
}

/// One machine behind two uplinks.
struct TwoWays {
    node: Node,
    outside: Outside,
}

impl TwoWays {
    fn new() -> Result<Self> {
        let node = Node::new()?;
        let outside = node.outside()?;
        node.connect("uplink1", &outside, "eth1")?;
        give(&node, "uplink1", NODE_THERE)?;
        give(&outside, "eth1", ELSEWHERE)?;
        outside.ip(&format!(
            "addr add {}/32 dev lo\naddr add {}/128 dev lo",
            BEHIND[0], BEHIND[1]
        ))?;
        for (metric, device, via) in [
            (10, "uplink0", OUTSIDE.map(|address| address.to_string())),
            (20, "uplink1", ELSEWHERE.map(str::to_owned)),
        ] {
            both_families(&node, |family| {
                format!(
                    "route add {} via {} dev {device} metric {metric}",
                    BEHIND[family], via[family]
                )
            })?;
        }
        Ok(Self { node, outside })
    }
}

/// With the device goes its address: datagrams take the other at once, and their
/// answers come; a connection of TCP's is over, and a new one is made.
fn when_an_uplink_fails_flows_go_on_by_the_other(by: By) -> Result<()> {
    let TwoWays { node, outside } = TwoWays::new()?;
    let network = by.network(&node);
    let pod: Pod = pod(&network, "pod")?;
    let behind = parsed(BEHIND)?;
    let remotes = [
        Remote::new(&outside, behind[0])?,
        Remote::new(&outside, behind[1])?,
    ];
    let there = parsed(NODE_THERE)?;
    let kinds = [
        Kind::Udp,
        Kind::UnconnectedUdp,
        Kind::Echo,
        Kind::Portless(253),
    ];
    let mut flows = both(&kinds)
        .into_iter()
        .map(|(kind, family)| Ok((family, remotes[family].open(kind, &pod, 0)?)))
        .collect::<Result<Vec<_>>>()?;
    for (family, flow) in &mut flows {
        ensure!(flow.exchange()?.ip() == NODE[*family]);
    }
    // First the way alone: the address stays the node's, and nobody knows better.
    node.ip("link set uplink0 down")?;
    each(0..flows.len(), |number| {
        let (family, flow) = &mut flows[number];
        let seen = flow.says()?;
        // Addresses of IPv4 stay on a device that is down.
        ensure!(
            seen.ip() == there[*family] || *family == 0,
            "seen as {seen}"
        );
        if seen.ip() == there[*family] {
            flow.hears()?;
        }
        Ok(())
    })?;
    reaches_by(&Kind::PORTS, &pod, &remotes, there).context("new flows")?;
    node.ip("addr flush dev uplink0 scope global")?;
    each(0..flows.len(), |number| {
        let (family, flow) = &mut flows[number];
        flow.limit = Duration::from_millis(300);
        wait_for("flow of the other uplink", PATIENCE, || {
            Ok(flow.says()?.ip() == there[*family])
        })?;
        flow.exchange()?;
        Ok(())
    })
}

/// And needs no more than that.
fn a_new_uplink_is_found_by_the_next_call(by: By) -> Result<()> {
    let node = Node::new()?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    for _ in 0..2 {
        let outside = node.outside()?;
        if !is_stock(&node) {
            for reply in network.status()? {
                reply.success()?;
            }
        }
        reaches(&pod, &remotes(&outside)?, NODE)?;
        network.check(pod.attachment())?;
        node.ip("link del uplink0")?;
    }
    Ok(())
}

/// Each flow has the address of the way that it takes, for as long as it lives.
fn flows_stay_on_one_of_two_ways(by: By) -> Result<()> {
    let TwoWays { node, outside } = TwoWays::new()?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    both_families(&node, |family| format!("route flush {}", BEHIND[family]))?;
    both_families(&node, |family| {
        format!(
            "route add {} nexthop via {} dev uplink0 nexthop via {} dev uplink1",
            BEHIND[family], OUTSIDE[family], ELSEWHERE[family]
        )
    })?;
    // By ports, too.
    node.set_sysctl("net/ipv4/fib_multipath_hash_policy", "1")?;
    node.set_sysctl("net/ipv6/fib_multipath_hash_policy", "1")?;
    let behind = parsed(BEHIND)?;
    let there = parsed(NODE_THERE)?;
    for family in [0, 1] {
        let remote = Remote::new(&outside, behind[family])?;
        for kind in [Kind::Udp, Kind::Tcp] {
            let mut flows = (0..20)
                .map(|_| remote.open(kind, &pod, 0))
                .collect::<Result<Vec<_>>>()?;
            let mut ways = [0, 0];
            for _ in 0..2 {
                for flow in &mut flows {
                    let seen = flow.exchange()?.ip();
                    let way = [NODE[family], there[family]]
                        .iter()
                        .position(|&address| address == seen)
                        .with_context(|| format!("seen as {seen}"))?;
                    ways[way] += 1;
                }
            }
            ensure!(!ways.contains(&0), "{kind:?} took one way only: {ways:?}");
        }
    }
    Ok(())
}

/// As WireGuard's and others: packets without Ethernet headers.
fn an_uplink_may_be_a_tunnel(by: By) -> Result<()> {
    let node = Node::new()?;
    let peer = node.machine()?;
    let _wire = Joined::new(Tunnel::new(&node, "tun0")?, Tunnel::new(&peer, "tun0")?);
    give(&node, "tun0", NODE_THERE)?;
    give(&peer, "tun0", ELSEWHERE)?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    let theirs = parsed(ELSEWHERE)?;
    let remotes = [
        Remote::new(&peer, theirs[0])?,
        Remote::new(&peer, theirs[1])?,
    ];
    reaches(&pod, &remotes, parsed(NODE_THERE)?)?;
    for address in theirs {
        let server = EchoServer::start(&peer, address)?;
        pod.tcp_transfer(server.address(), 1 << 20)?;
        pod.udp_echo(server.address(), &[7; 4000], PATIENCE)?;
    }
    Ok(())
}

/// The device that has the address is the uplink; what it consists of is not.
fn an_uplink_may_be_a_bridge(by: By) -> Result<()> {
    let node = Node::new()?;
    let peer = node.machine()?;
    node.connect("nic0", &peer, "eth0")?;
    node.ip("link add br0 type bridge\nlink set nic0 master br0\nlink set br0 up")?;
    give(&node, "br0", NODE_THERE)?;
    give(&peer, "eth0", ELSEWHERE)?;
    let network = by.network(&node);
    let pod = pod(&network, "pod")?;
    let theirs = parsed(ELSEWHERE)?;
    let remotes = [
        Remote::new(&peer, theirs[0])?,
        Remote::new(&peer, theirs[1])?,
    ];
    reaches(&pod, &remotes, parsed(NODE_THERE)?)
}
