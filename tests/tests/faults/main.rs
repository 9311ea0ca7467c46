//! Whatever dies or fails, wherever: a plugin with fault points is killed at each of
//! them in turn, and each of its requests is refused once; then DEL, GC, an ADD of the
//! same container and one of another each leave exactly what should be there.

mod killed;
mod refused;
mod storage;

use std::{fs, os::unix::fs::symlink, path::Path};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Attachment, Call, Network, Node, Outside, Pod, Reply, Sandbox, Snapshot, Verb, faults_binary,
};
use serde_json::{Value, json};

/// What the plugin with fault points is called on a node.
const FAULTY: &str = "bpf-bridge-faults";
/// Where it lists its points, on the node.
const LIST: &str = "/run/faults.list";
/// Where the position of the round robin is.
const LAST: [(&str, &str); 2] = [
    ("/var/lib/cni/networks/net/last_reserved_ip.0", "10.77.0.1"),
    ("/var/lib/cni/networks/net/last_reserved_ip.1", "fd77::1"),
];
/// The settings of the node that an ADD makes, and that nothing takes back.
const FORWARDING: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// A node with an uplink and the plugin with fault points beside the other.
fn node() -> Result<Node> {
    let binary = fs::canonicalize(faults_binary()?).context("looking for BPF_BRIDGE_FAULTS_BIN")?;
    let node = Node::new()?;
    node.within(|| Ok(symlink(&binary, Path::new(Node::CNI_PATH).join(FAULTY))?))?;
    node.ip("link add uplink0 type veth peer name far0\n\
         link set uplink0 up\n\
         link set far0 up\n\
         addr add 198.51.100.2/24 dev uplink0\n\
         addr add 2001:db8:ffff::2/64 dev uplink0 nodad")?;
    node.wait_local(Outside::NODE_V6)?;
    Ok(node)
}

fn config(node: &Node, more: &Value) -> Value {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    config["capabilities"] = json!({"ips": true, "portMappings": true});
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    config
}

/// What a call is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// Attach the container.
    Add,
    /// The same, but a route cannot be added at the end: all is undone.
    FailingAdd,
    /// Detach it.
    Del,
    /// Remove it because it is not among the valid.
    Gc,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Del,
    Gc,
    AddSame,
    /// And then a GC, which knows of the other.
    AddOther,
}

impl Then {
    const ALL: [Self; 4] = [Self::Del, Self::Gc, Self::AddSame, Self::AddOther];
}

/// On what node the call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// One that the plugin was never called on.
    Fresh,
    /// One whose programs are loaded, but there is no pod any more.
    Empty,
    /// One with a pod.
    Inhabited,
}

/// A node, a network, a container that things are done to, and how it should look.
struct Stage<'node> {
    node: &'node Node,
    network: Network<'node>,
    before: Before,
    victim: (Sandbox, Attachment),
    other: (Sandbox, Attachment),
    neighbour: Option<Pod>,
    /// Whether netfilter's rules are looked at.
    rules: bool,
    /// Without the container, with it, and with the other.
    without: State,
    with: State,
    with_other: State,
}

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    seen: Snapshot,
    netfilter: String,
}

impl State {
    fn of(node: &Node, rules: bool) -> Result<Self> {
        Ok(Self {
            seen: Snapshot::exact(node)?,
            // Without the handles, which are never given twice.
            netfilter: match rules {
                true => node.run("nft list ruleset")?,
                false => String::new(),
            },
        })
    }

    fn ensure_same(&self, now: &Self) -> Result<()> {
        self.seen.ensure_same(&now.seen)?;
        ensure!(
            self.netfilter == now.netfilter,
            "netfilter was\n{}and is\n{}",
            self.netfilter,
            now.netfilter
        );
        Ok(())
    }
}

fn ports(host: u16) -> Value {
    json!([
        {"hostPort": host, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": host, "containerPort": 80, "protocol": "udp", "hostIP": "198.51.100.2"},
    ])
}

impl<'node> Stage<'node> {
    /// `publishes`: the containers publish ports.
    fn new(node: &'node Node, config: Value, publishes: bool, before: Before) -> Result<Self> {
        let rules = config["ipMasqBackend"] == "nftables";
        let network = Network::new(node, config);
        let attach = |name: &str, last: Option<u8>, port: u16| -> Result<_> {
            let sandbox = node.sandbox(name)?;
            let mut attachment = sandbox.attachment();
            if let Some(last) = last {
                let ips = json!([format!("10.77.0.{last}"), format!("fd77::{last}")]);
                attachment = attachment.capability("ips", ips);
            }
            if publishes {
                attachment = attachment.capability("portMappings", ports(port));
            }
            Ok((sandbox, attachment))
        };
        // The container's address is the store's to choose; others are in nobody's way.
        let victim = attach("victim", None, 8080)?;
        let other = attach("other", Some(20), 8081)?;
        let fresh = State::of(node, rules)?;
        let mut stage = Self {
            node,
            network,
            before,
            victim,
            other,
            neighbour: None,
            rules,
            without: fresh.clone(),
            with: fresh.clone(),
            with_other: fresh,
        };
        match before {
            Before::Fresh => {}
            Before::Empty => {
                stage.network.add(&stage.other.1)?;
                stage.network.del(&stage.other.1)?;
            }
            Before::Inhabited => {
                let (sandbox, attachment) = attach("neighbour", Some(30), 8082)?;
                stage.neighbour = Some(stage.network.pod_with(sandbox, attachment)?);
            }
        }
        stage.without = stage.state()?;
        stage.add()?;
        stage.with = stage.state()?;
        stage.clean()?;
        stage.ensure_like(&stage.without)?;
        stage.network.add(&stage.other.1)?;
        stage.with_other = stage.state()?;
        stage.clean()?;
        stage.ensure_like(&stage.without)?;
        Ok(stage)
    }

    fn state(&self) -> Result<State> {
        State::of(self.node, self.rules)
    }

    fn ensure_like(&self, state: &State) -> Result<()> {
        state.ensure_same(&self.state()?)
    }

    fn valid(&self) -> Vec<&Attachment> {
        self.neighbour.iter().map(Pod::attachment).collect()
    }

    /// An ADD of the container, which has the same address each time.
    fn add(&self) -> Result<()> {
        self.rewind()?;
        self.network.add(&self.victim.1).map(drop)
    }

    /// Sets the round robin of addresses back. That changes no directory.
    fn rewind(&self) -> Result<()> {
        self.node.within(|| {
            for (path, address) in LAST {
                if Path::new(path).exists() {
                    fs::write(path, address)?;
                }
            }
            Ok(())
        })
    }

    /// Makes the node what it was before: what comes next begins there.
    fn clean(&self) -> Result<()> {
        for (_, attachment) in [&self.victim, &self.other] {
            self.network.del(attachment)?;
        }
        if self.before == Before::Fresh {
            wipe(self.node)?;
        }
        Ok(())
    }

    /// The call, with a fault.
    fn call(&self, victim: Victim, fault: &str) -> Result<Reply> {
        match victim {
            Victim::Add | Victim::FailingAdd => self.rewind()?,
            Victim::Del | Victim::Gc => self.add()?,
        }
        let (verb, attachment) = match victim {
            Victim::Add | Victim::FailingAdd => (Verb::Add, Some(&self.victim.1)),
            Victim::Del => (Verb::Del, Some(&self.victim.1)),
            Victim::Gc => (Verb::Gc, None),
        };
        let mut config = self.network.configs(attachment)?.remove(0);
        match victim {
            Victim::FailingAdd => {
                // No pod can reach the next hop.
                let route = json!([{"dst": "203.0.113.0/24", "gw": "192.0.2.1"}]);
                config["ipam"]["routes"] = route;
            }
            Victim::Gc => {
                let valid = self
                    .valid()
                    .into_iter()
                    .map(|it| json!({"containerID": it.container_id, "ifname": it.ifname}));
                config["cni.dev/valid-attachments"] = valid.collect();
            }
            Victim::Add | Victim::Del => {}
        }
        let mut call = Call::new(FAULTY, verb)
            .stdin(config)
            .env("BPF_BRIDGE_FAULT", fault);
        if let Some(attachment) = attachment {
            call = call.attachment(attachment);
        }
        call.run(self.node)
    }

    /// The names of all points, or of all requests of a kind, in their order.
    fn list(&self, victim: Victim, kind: &str) -> Result<Vec<String>> {
        self.node.within(|| Ok(fs::write(LIST, "")?))?;
        let reply = self.call(victim, &format!("list:{LIST}"))?;
        ensure!(
            reply.status.success() == (victim != Victim::FailingAdd),
            "{} {}",
            reply.stdout,
            reply.stderr
        );
        let names = self
            .node
            .read(LIST)?
            .lines()
            .filter_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))
            .map(str::to_owned)
            .collect();
        self.clean()?;
        Ok(names)
    }

    /// What comes after a call that did not come to its end, and that it leaves exactly
    /// what should be there. `attached`: the call was an ADD that had succeeded.
    fn recover(&self, then: Then, attached: bool) -> Result<()> {
        match then {
            Then::AddSame if attached => {
                let again = self.network.add(&self.victim.1);
                let error = format!("{:#}", again.err().context("a second ADD succeeded")?);
                ensure!(
                    error.contains("has interface eth0 in network net"),
                    "{error}"
                );
                self.ensure_like(&self.with)?;
            }
            Then::Del => self.network.del(&self.victim.1)?,
            Then::Gc => self.network.gc(&self.valid())?,
            Then::AddSame => {
                self.add()?;
                self.network.check(&self.victim.1)?;
                self.ensure_like(&self.with)?;
            }
            Then::AddOther => {
                self.network.add(&self.other.1)?;
                let mut valid = self.valid();
                valid.push(&self.other.1);
                self.network.gc(&valid)?;
                self.ensure_like(&self.with_other)?;
            }
        }
        if matches!(then, Then::Del | Then::Gc) {
            self.ensure_gone()?;
            if self.before != Before::Fresh {
                return Ok(());
            }
        }
        self.clean()
    }

    /// Nothing is there of the container.
    fn ensure_gone(&self) -> Result<()> {
        ensure!(self.victim.0.device_names()? == ["lo"]);
        if self.before == Before::Fresh {
            // What the pods of a network share may be there in part. What is not
            // does not show later either.
            let seen = Snapshot::take(self.node)?;
            for word in [
                "device veth",
                "victim",
                "networks/net/10.",
                "networks/net/fd77:",
            ] {
                let left = seen.matching(word);
                ensure!(left.is_empty(), "left behind: {left:?}");
            }
            self.network.add(&self.other.1)?;
            self.ensure_like(&self.with_other)
        } else {
            self.ensure_like(&self.without)
        }
    }
}

/// Makes a node one that the plugin was never called on.
fn wipe(node: &Node) -> Result<()> {
    let ours = |name: &str| {
        ["veth", "port", "cni"]
            .iter()
            .any(|it| name.starts_with(it))
    };
    // The other end of a pair goes with the first.
    while let Some(device) = node.device_names()?.into_iter().find(|name| ours(name)) {
        node.ip(&format!("link del {device}"))?;
    }
    node.within(|| {
        for directory in ["/run/bpf-bridge", "/var/lib/cni", "/sys/fs/bpf/bpf-bridge"] {
            let _ = fs::remove_dir_all(directory);
        }
        // Those that are mounted cannot go: what is in them did.
        Ok(fs::create_dir_all("/run/bpf-bridge")?)
    })?;
    for setting in FORWARDING {
        node.set_sysctl(setting, "0")?;
    }
    Ok(())
}
