//! What runs where the kernel lacks something: `cargo xtask test --kernel` runs this on
//! others than the machine's own.
//!
//! Whether a kernel has a thing is asked of its type information, so not in the way of the
//! plugin, which tries.

use std::{fs, net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Client, EchoServer, Namespace, Network, Node, Outside, Pod};
use serde_json::{Value, json};

const PINS: &str = "/sys/fs/bpf/bpf-bridge/v1";
/// Long enough on a slow machine.
const PATIENCE: Duration = Duration::from_secs(10);
/// The programs of an uplink, and where they are attached.
const PROGRAMS: [(&str, &str); 2] = [("uplink", "ingress"), ("egress", "egress")];

/// Whether the kernel has a type, or a value of one, of this name.
fn kernel_has(name: &str) -> Result<bool> {
    let types = fs::read("/sys/kernel/btf/vmlinux").context("reading the kernel's types")?;
    let name = [b"\0", name.as_bytes(), b"\0"].concat();
    Ok(types.windows(name.len()).any(|window| window == name))
}

/// A network whose pods are masqueraded and may publish ports.
fn network(node: &Node) -> Network<'_> {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    config["ipMasq"] = json!(true);
    config["capabilities"] = json!({"portMappings": true});
    Network::new(node, config)
}

/// Servers on the pod and outside, and the ways to them.
struct Scene<'node> {
    node: &'node Node,
    outside: &'node Outside,
    pod: Pod,
    _servers: Vec<EchoServer>,
}

impl<'node> Scene<'node> {
    const PUBLISHED: u16 = 8080;
    const PORT: u16 = 80;
    const OUTSIDE: [IpAddr; 2] = [IpAddr::V4(Outside::V4), IpAddr::V6(Outside::V6)];
    const NODE: [IpAddr; 2] = [IpAddr::V4(Outside::NODE_V4), IpAddr::V6(Outside::NODE_V6)];

    fn new(network: &Network<'node>, outside: &'node Outside) -> Result<Self> {
        let ports = json!([{
            "hostPort": Self::PUBLISHED, "containerPort": Self::PORT, "protocol": "tcp",
        }]);
        let pod = network.pod_with_ports("pod", ports)?;
        let listen = |namespace: &Namespace, name: &str, address: IpAddr| {
            EchoServer::start_as(namespace, (address, Self::PORT).into(), name)
        };
        let mut servers = Vec::new();
        for (there, own) in Self::OUTSIDE.into_iter().zip(pod.addresses()) {
            servers.push(listen(outside, "outside", there)?);
            servers.push(listen(&pod, "pod", own)?);
        }
        Ok(Self {
            node: network.node(),
            outside,
            pod,
            _servers: servers,
        })
    }

    /// That all is served: the pod is reached by its published port, sees who asks, and
    /// appears outside with these addresses.
    fn is_served(&self, seen: [IpAddr; 2]) -> Result<()> {
        for (family, seen) in seen.into_iter().enumerate() {
            let published = (Self::NODE[family], Self::PUBLISHED).into();
            let met = self.outside.meet(Client::Tcp, published, PATIENCE)?;
            ensure!(
                met.server == "pod" && met.client.ip() == Self::OUTSIDE[family],
                "{published}: {met:?}"
            );
            let there = (Self::OUTSIDE[family], Self::PORT).into();
            let met = self.pod.meet(Client::Tcp, there, PATIENCE)?;
            ensure!(
                met.server == "outside" && met.client.ip() == seen,
                "{there}: {met:?}"
            );
        }
        Ok(())
    }

    /// The kernel's id of a pinned program.
    fn program(&self, name: &str) -> Result<u64> {
        let program =
            (self.node).json(&format!("bpftool -j prog show pinned {PINS}/nat/{name}"))?;
        program["id"].as_u64().context("a program without an id")
    }

    /// The pin of a program's attachment to the uplink, as a link or as a filter.
    fn pin(&self, program: &str, tcx: bool) -> Result<String> {
        let device = self.node.device(Outside::UPLINK)?;
        let kind = if tcx { "" } else { "filter-" };
        Ok(format!(
            "{PINS}/links/{kind}{program}-{}",
            device["ifindex"]
        ))
    }

    /// Whether the program is the filter of the uplink's clsact.
    fn is_filter(&self, program: &str, hook: &str) -> Result<bool> {
        let filters = self.node.json(&format!(
            "tc -json filter show dev {} {hook}",
            Outside::UPLINK
        ))?;
        let id = self.program(program)?;
        let mut filters = filters.as_array().into_iter().flatten();
        Ok(filters.any(|filter| filter["options"]["prog"]["id"] == id))
    }

    /// Whether it is what the link holds.
    fn is_link(&self, program: &str) -> Result<bool> {
        let pin = self.pin(program, true)?;
        let link: Value = self
            .node
            .json(&format!("bpftool -j link show pinned {pin}"))?;
        Ok(link["prog_id"] == self.program(program)?)
    }

    /// That the programs are attached by links of tcx alone, or by filters alone.
    fn is_attached_by(&self, tcx: bool) -> Result<()> {
        let pins = self.node.run(&format!("ls {PINS}/links"))?;
        for (program, hook) in PROGRAMS {
            for way in [true, false] {
                let pin = self.pin(program, way)?;
                let pin = pin.rsplit('/').next().unwrap_or_default();
                ensure!(
                    pins.split_whitespace().any(|there| there == pin) == (way == tcx),
                    "{pin}, with tcx: {tcx}; there are {pins}"
                );
            }
            ensure!(
                self.is_filter(program, hook)? != tcx,
                "{program}: the filter"
            );
            ensure!(!tcx || self.is_link(program)?, "{program}: the link");
        }
        Ok(())
    }

    /// Takes a program off the uplink, as an operator would.
    fn detach(&self, program: &str, hook: &str, tcx: bool) -> Result<()> {
        if tcx {
            let pin = self.pin(program, true)?;
            self.node
                .run(&format!("bpftool link detach pinned {pin}"))?;
        } else {
            let device = Outside::UPLINK;
            self.node
                .run(&format!("tc filter del dev {device} {hook}"))?;
            ensure!(!self.is_filter(program, hook)?, "the filter is there still");
        }
        Ok(())
    }
}

/// Links before whom the kernel has none are filters; either is missed when it is taken
/// away, and put right.
#[test]
fn uplinks_are_served_by_tcx_or_else_by_clsact() -> Result<()> {
    let tcx = kernel_has("BPF_TCX_INGRESS")?;
    println!("tcx: {tcx}");
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let scene = Scene::new(&network, &outside)?;
    scene.is_attached_by(tcx)?;
    scene.is_served(Scene::NODE)?;
    let attachment = scene.pod.attachment();
    for (program, hook) in PROGRAMS {
        scene.detach(program, hook, tcx)?;
        let error = match network.check(attachment) {
            Ok(()) => String::new(),
            Err(error) => format!("{error:#}"),
        };
        ensure!(
            error.contains(Outside::UPLINK) && error.contains("detached"),
            "CHECK without {program}: {error:?}"
        );
        scene.is_attached_by(tcx).context("after CHECK")?;
        network.check(attachment)?;
        scene.detach(program, hook, tcx)?;
        for reply in network.status()? {
            ensure!(reply.status.success(), "{}", reply.stdout);
        }
        scene.is_attached_by(tcx).context("after STATUS")?;
        network.check(attachment)?;
    }
    scene.is_served(Scene::NODE)?;
    // Nothing is left where nobody needs it.
    network.del(attachment)?;
    network.gc(&[])?;
    for (program, hook) in PROGRAMS {
        let filters = node.run(&format!("tc filter show dev {} {hook}", Outside::UPLINK))?;
        ensure!(!filters.contains(program), "{filters}");
    }
    Ok(())
}

/// The address that a route names counts where the kernel tells of it (Linux 6.7, and 6.1 as
/// Debian has it); elsewhere it is the uplink's first, as ever.
#[test]
fn a_masqueraded_pod_has_the_address_that_the_kernel_tells() -> Result<()> {
    const NAMED: [&str; 2] = ["198.51.100.50", "2001:db8:ffff::50"];
    let told = kernel_has("BPF_FIB_LOOKUP_SRC")?;
    println!("BPF_FIB_LOOKUP_SRC: {told}");
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let scene = Scene::new(&network, &outside)?;
    let uplink = Outside::UPLINK;
    node.ip(&format!(
        "addr add {}/24 dev {uplink}\n\
         addr add {}/64 dev {uplink} nodad\n\
         route replace {} dev {uplink} src {}\n\
         route replace {} dev {uplink} src {}",
        NAMED[0],
        NAMED[1],
        Outside::V4,
        NAMED[0],
        Outside::V6,
        NAMED[1],
    ))?;
    let seen = if told {
        [NAMED[0].parse()?, NAMED[1].parse()?]
    } else {
        Scene::NODE
    };
    scene.is_served(seen)
}
