//! Beside what others do on the node: portmap behind us, and other programs on
//! the uplink.

use std::{
    ffi::CString,
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{EchoServer, MacAddr, Namespace, Network, Node, Outside};
use nix::libc;
use serde_json::json;

use crate::{HOST_PORT, NODE, PATIENCE, POD_PORT, Server, conflist, listen, meets, network, ports};

/// The rules of portmap that translate, with the packets that each has seen.
fn translations(node: &Node) -> Result<Vec<String>> {
    let mut rules = Vec::new();
    for save in ["iptables-save", "ip6tables-save"] {
        let table = node.run(&format!("{save} -c -t nat"))?;
        rules.extend(
            table
                .lines()
                .filter(|rule| rule.contains("-j DNAT"))
                .map(str::to_owned),
        );
    }
    Ok(rules)
}

/// If both have the capability, every packet meets us first.
#[test]
fn a_portmap_behind_us_finds_nothing_to_do() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    let mut list = conflist(Network::dual_stack(&node));
    // The newest that Debian's portmap speaks.
    list["cniVersion"] = json!("1.0.0");
    let plugins = list["plugins"].as_array_mut();
    plugins.context("no list")?.push(portmap);
    let network = Network::from_list(&node, list);
    let server = Server::new(&network, "server")?;
    let neighbour = network.pod("neighbour")?;
    let rules = translations(&node)?;
    ensure!(rules.len() == 4, "{rules:#?}");
    let here: &Namespace = &outside;
    let clients = [
        ("outside", here),
        ("a pod", &neighbour),
        ("the pod itself", &server),
        ("the node", &node),
    ];
    for (who, client) in clients {
        for address in NODE {
            meets(client, address, "server").context(who)?;
        }
    }
    for loopback in ["127.0.0.1", "::1"] {
        meets(&node, loopback.parse::<IpAddr>()?, "server")?;
    }
    for rule in translations(&node)? {
        ensure!(rule.starts_with("[0:0]"), "{rule}");
    }
    network.del(server.attachment())?;
    ensure!(translations(&node)?.is_empty());
    Ok(())
}

/// If only portmap has it, iptables does it all, as behind a stock bridge.
#[test]
fn without_the_capability_ports_are_portmaps() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let mut list = conflist(Network::dual_stack(&node));
    list["cniVersion"] = json!("1.0.0");
    list["plugins"] = json!([
        list["plugins"][0],
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]);
    list["plugins"][0]["capabilities"] = json!({"portMappings": false});
    let network = Network::from_list(&node, list);
    let pod = network.pod_with_ports("server", ports())?;
    let _listeners = listen(&pod, "server", POD_PORT)?;
    for address in NODE {
        meets(&outside, address, "server")?;
    }
    let rules = translations(&node)?;
    ensure!(
        rules.iter().any(|rule| !rule.starts_with("[0:0]")),
        "{rules:#?}"
    );
    let entries = node.run("bpftool map dump pinned /sys/fs/bpf/bpf-bridge/v1/maps/PUBLISHED");
    ensure!(
        entries
            .as_ref()
            .map_or(true, |text| text.contains("Found 0 elements")
                || text.trim() == "[]"),
        "{entries:?}"
    );
    Ok(())
}

/// What the host's stack brings to the pod, translated by its own rules, goes back to
/// it: the law of the datapath.
#[test]
fn replies_to_what_netfilter_brought_go_back_to_it() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let other = crate::other_network(&node);
    let foreigner = other.pod("foreigner")?;
    let server = Server::new(&network, "server")?;
    // As kube-proxy serves an address that nobody has.
    let services: [IpAddr; 2] = ["10.96.0.1".parse()?, "fd96::1".parse()?];
    for (service, iptables, pod) in [
        (services[0], "iptables", server.v4()?.to_string()),
        (services[1], "ip6tables", format!("[{}]", server.v6()?)),
    ] {
        for (chain, protocol) in [
            ("PREROUTING", "tcp"),
            ("PREROUTING", "udp"),
            ("OUTPUT", "tcp"),
            ("OUTPUT", "udp"),
        ] {
            node.run(&format!(
                "{iptables} -t nat -A {chain} -d {service} -p {protocol} --dport {HOST_PORT} \
                 -j DNAT --to-destination {pod}:{POD_PORT}"
            ))?;
        }
    }
    outside.route_to_node("10.96.0.0/16")?;
    outside.route_to_node("fd96::/64")?;
    let here: &Namespace = &outside;
    let clients = [
        ("outside", here),
        ("a pod", &foreigner),
        ("the node", &node),
    ];
    for (who, client) in clients {
        for (service, published) in services.into_iter().zip(NODE) {
            let seen = meets(client, service, "server").context(who)?;
            // And at the same time, both as the same client.
            let published = meets(client, published, "server").context(who)?;
            for (seen, published) in seen.iter().zip(&published) {
                ensure!(
                    seen.client.ip() == published.client.ip() || who == "the node",
                    "{who}: {seen:?}, {published:?}"
                );
            }
        }
    }
    Ok(())
}

/// Loads a program for traffic control that drops everything, and pins it.
fn pin_a_program_that_drops(node: &Node, pin: &str) -> Result<()> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_OBJ_PIN: libc::c_long = 6;
    const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;

    /// The beginnings of `union bpf_attr` for the two commands (`linux/bpf.h`).
    #[repr(C)]
    struct Load {
        program_type: u32,
        count: u32,
        instructions: *const u64,
        license: *const libc::c_char,
    }
    #[repr(C)]
    struct Pin {
        path: *const libc::c_char,
        program: u32,
        flags: u32,
    }

    // r0 = TC_ACT_SHOT; exit
    let instructions: [u64; 2] = [0x0000_0002_0000_00b7, 0x95];
    let load = Load {
        program_type: BPF_PROG_TYPE_SCHED_CLS,
        count: 2,
        instructions: instructions.as_ptr(),
        license: c"GPL".as_ptr(),
    };
    // SAFETY: the attributes are as long as is said and point to live values.
    let program = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of::<Load>(),
        )
    };
    ensure!(
        program >= 0,
        "loading a program: {}",
        io::Error::last_os_error()
    );
    // SAFETY: the kernel has just made the descriptor.
    let program = unsafe { OwnedFd::from_raw_fd(i32::try_from(program)?) };
    let path = CString::new(pin)?;
    let program = u32::try_from(program.as_raw_fd())?;
    node.within(|| {
        let pin = Pin {
            path: path.as_ptr(),
            program,
            flags: 0,
        };
        // SAFETY: as above.
        let done =
            unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_PIN, &raw const pin, size_of::<Pin>()) };
        ensure!(done == 0, "pinning it: {}", io::Error::last_os_error());
        Ok(())
    })
}

/// Hazard: a program that ends the chain for what is not its own, so that others
/// never see it.
#[test]
fn other_programs_on_the_uplink_see_what_is_not_published() -> Result<()> {
    let pin = "/sys/fs/bpf/other";
    let node = Node::new()?;
    let outside = node.outside()?;
    pin_a_program_that_drops(&node, pin)?;
    let attach = || -> Result<()> {
        node.run(&format!(
            "tc filter add dev uplink0 ingress prio 7 bpf da object-pinned {pin}"
        ))
        .map(drop)
    };
    // Neither a neighbour entry nor an echo of before may help.
    let node_is_silent = || -> Result<()> {
        let pinged = outside.ping_with(Outside::NODE_V4.into(), 1, &["-W", "0.3"]);
        ensure!(pinged.is_err(), "the other program saw nothing");
        Ok(())
    };
    let answers = || -> Result<()> {
        let met = meets(&outside, Outside::NODE_V4, "server")?;
        ensure!(!met.is_empty());
        Ok(())
    };
    node.run("tc qdisc add dev uplink0 clsact")?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    answers()?;
    outside.ping(Outside::NODE_V4.into(), 1)?;
    // Answers to ARP are dropped, too.
    for (namespace, device, peer, far, address) in [
        (&*node, "uplink0", &*outside, "eth0", Outside::V4),
        (&*outside, "eth0", &*node, "uplink0", Outside::NODE_V4),
    ] {
        let mac = MacAddr::of_device(peer, far)?;
        namespace.ip(&format!(
            "neigh replace {address} lladdr {mac} dev {device}"
        ))?;
    }
    attach()?;
    answers().context("with another program behind ours")?;
    node_is_silent()?;
    // It stays when ours is added again, and when ours goes.
    network.del(server.attachment())?;
    node_is_silent()?;
    drop(server);
    let server = Server::new(&network, "server")?;
    answers()?;
    node_is_silent()?;
    network.del(server.attachment())?;
    node.run("tc filter del dev uplink0 ingress")?;
    outside.ping(Outside::NODE_V4.into(), 1)?;
    let process = EchoServer::start(&node, Outside::NODE_V4.into())?;
    outside.tcp_echo(process.address(), b"the node's own", PATIENCE)
}
