//! The node of a contender: attaching pods to it, and filling it with them.

use std::{
    fs::{self, File},
    net::IpAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Attachment, Call, Network, Node, Outside, Sandbox, Verb};
use clap::ValueEnum;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    floor::{self, Netlink},
    measurement::Contender,
    memory,
};

/// The name of the network on every node.
pub(super) const NETWORK: &str = "bench";

/// The capability by which a runtime publishes ports.
pub(super) const PORT_MAPPINGS: &str = "portMappings";

/// The plugins of the stock chain.
pub(super) const STOCK_PLUGINS: [&str; 4] = ["bridge", "host-local", "portmap", "firewall"];

/// What the nodes of a run have in common.
pub(super) struct Recipe {
    /// The plugin under test.
    pub(super) plugin: PathBuf,
    /// Where the stock plugins are.
    pub(super) stock: PathBuf,
    /// What they write their rules with.
    pub(super) backend: Backend,
    /// Another build of bpf-bridge, which takes the place of the stock plugins.
    pub(super) against: Option<PathBuf>,
    /// A directory on a disk, below which each node keeps its addresses: on a
    /// file system in memory `fsync` would be free, as it is on no real node.
    pub(super) disk: PathBuf,
}

/// What the stock plugins write their rules with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Backend {
    /// Every version can.
    Iptables,
    /// From 1.6 (`portmap`) and 1.7 (`bridge`) on.
    Nftables,
}

impl Backend {
    /// As the configuration has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

/// A node on which one contender attaches pods.
pub(super) struct Arena {
    pub(super) contender: Contender,
    pub(super) node: Node,
    conflist: Value,
    netlink: Netlink,
    filled: usize,
    // Below the node's mounts.
    _disk: TempDir,
}

/// An attachment that was added.
pub(super) struct Added {
    /// How long the ADD took.
    pub(super) time: Duration,
    result: Value,
}

impl Added {
    /// The IPv4 address of a pod, or that of its gateway.
    pub(super) fn v4(&self, key: &str) -> Result<IpAddr> {
        self.addresses(key)
            .find(IpAddr::is_ipv4)
            .with_context(|| format!("no IPv4 {key} in {}", self.result))
    }

    /// The IPv6 address of a pod, or that of its gateway.
    pub(super) fn v6(&self, key: &str) -> Result<IpAddr> {
        self.addresses(key)
            .find(IpAddr::is_ipv6)
            .with_context(|| format!("no IPv6 {key} in {}", self.result))
    }

    fn addresses(&self, key: &str) -> impl Iterator<Item = IpAddr> {
        self.result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(move |ip| ip[key].as_str()?.split('/').next()?.parse().ok())
    }
}

impl Arena {
    /// Its network does the same work whoever the contender is: two families, a gateway,
    /// masquerade, and published ports.
    pub(super) fn new(contender: Contender, recipe: &Recipe) -> Result<Self> {
        let against = recipe.against.as_ref();
        let against = against.filter(|_| contender == Contender::Stock);
        let node = Node::with_plugin(against.unwrap_or(&recipe.plugin))?;
        let disk = TempDir::new_in(&recipe.disk)?;
        node.within(|| {
            let bind = MsFlags::MS_BIND;
            mount(
                Some(disk.path()),
                "/var/lib/cni",
                None::<&str>,
                bind,
                None::<&str>,
            )
            .context("mounting a directory for addresses")?;
            for plugin in STOCK_PLUGINS {
                let link = Path::new(Node::CNI_PATH).join(plugin);
                let _ = fs::remove_file(&link);
                symlink(recipe.stock.join(plugin), &link)?;
            }
            // A bridge at its best: without the detour through iptables that
            // kube-proxy makes it take.
            for family in ["iptables", "ip6tables", "arptables"] {
                let sysctl = format!("/proc/sys/net/bridge/bridge-nf-call-{family}");
                if Path::new(&sysctl).exists() {
                    fs::write(&sysctl, "0").with_context(|| format!("writing {sysctl}"))?;
                }
            }
            Ok(())
        })?;
        let stock = contender == Contender::Stock && against.is_none();
        let mut first = json!({
            "type": if stock { "bridge" } else { node.plugin() },
            "bridge": "cni0",
            "isGateway": true,
            "isDefaultGateway": true,
            "ipMasq": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": Network::V4_SUBNET}], [{"subnet": Network::V6_SUBNET}]],
            },
        });
        let capabilities = json!({PORT_MAPPINGS: true});
        let backend = recipe.backend.name();
        let plugins = if stock {
            if recipe.backend == Backend::Nftables {
                first["ipMasqBackend"] = backend.into();
            }
            json!([
                first,
                {"type": "portmap", "backend": backend, "capabilities": capabilities},
                // It has none for nftables.
                {"type": "firewall", "backend": "iptables"},
            ])
        } else {
            first["capabilities"] = capabilities;
            match contender {
                Contender::Xdp => first["xdpUplinks"] = json!([Outside::UPLINK]),
                Contender::NoNetfilter => first["netfilter"] = "none".into(),
                _ => {}
            }
            json!([first])
        };
        let conflist = json!({"cniVersion": "1.0.0", "name": NETWORK, "plugins": plugins});
        let netlink = Netlink::open(&node)?;
        Ok(Self {
            contender,
            node,
            conflist,
            netlink,
            filled: 0,
            _disk: disk,
        })
    }

    /// Attaches a sandbox as a runtime would; of the floor: makes the veth pair,
    /// and sets it up without that being counted.
    pub(super) fn add(&self, sandbox: &Sandbox) -> Result<Added> {
        let path = sandbox.path();
        if self.contender == Contender::Floor {
            let inside = self.node.within(|| floor::open_namespace(path))?;
            let time = self.netlink.create(sandbox.name(), &inside)?;
            sandbox.ip("link set eth0 up")?;
            self.netlink.set_up(sandbox.name())?;
            let index = self
                .node
                .read(format!("/sys/class/net/{}/ifindex", sandbox.name()))?;
            return Ok(Added {
                time,
                result: index.parse::<u32>()?.into(),
            });
        }
        self.node.within(|| self.add_here(&sandbox.attachment()))
    }

    /// Calls ADD in the node that the calling thread is in.
    pub(super) fn add_here(&self, attachment: &Attachment) -> Result<Added> {
        let mut added = Added {
            time: Duration::ZERO,
            result: Value::Null,
        };
        for mut config in self.configs(attachment)? {
            if !added.result.is_null() {
                config["prevResult"] = added.result;
            }
            let reply = call(Verb::Add, &config).attachment(attachment).run_here()?;
            added.time += reply.duration;
            added.result = reply.success()?;
        }
        Ok(added)
    }

    /// What the plugins of the chain read, in its order.
    fn configs(&self, attachment: &Attachment) -> Result<Vec<Value>> {
        Network::from_list(&self.node, self.conflist.clone()).configs(Some(attachment))
    }

    /// Detaches a sandbox again; returns how long that took.
    pub(super) fn del(&self, sandbox: &Sandbox, added: &Added) -> Result<Duration> {
        if self.contender == Contender::Floor {
            let index = added.result.as_u64().context("a device without an index")?;
            let time = self.netlink.delete(u32::try_from(index)?)?;
            return Ok(time);
        }
        self.node
            .within(|| self.del_here(&sandbox.attachment(), added))
    }

    /// Calls DEL in the node that the calling thread is in.
    pub(super) fn del_here(&self, attachment: &Attachment, added: &Added) -> Result<Duration> {
        let mut time = Duration::ZERO;
        for mut config in self.configs(attachment)?.into_iter().rev() {
            config["prevResult"] = added.result.clone();
            let reply = call(Verb::Del, &config).attachment(attachment).run_here()?;
            ensure!(reply.success()?.is_null(), "DEL wrote {}", reply.stdout);
            time += reply.duration;
        }
        Ok(time)
    }

    /// Attaches and detaches a pod; returns the most memory that a call had
    /// resident, in bytes. The floor has none: it is no process.
    pub(super) fn memory(&self, attachment: &Attachment) -> Result<Option<u64>> {
        if self.contender == Contender::Floor {
            return Ok(None);
        }
        self.node.within(|| {
            let peak = |verb: Verb, config: &Value| {
                let plugin = type_of(config);
                let mut command = Command::new(Path::new(Node::CNI_PATH).join(plugin));
                command.env("CNI_COMMAND", verb.as_str()).envs([
                    ("CNI_PATH", Node::CNI_PATH),
                    ("CNI_CONTAINERID", &attachment.container_id),
                    ("CNI_NETNS", &attachment.netns),
                    ("CNI_IFNAME", &attachment.ifname),
                ]);
                memory::peak(command, &config.to_string())
                    .with_context(|| format!("{} {plugin}", verb.as_str()))
            };
            let mut most = 0;
            let mut result = Value::Null;
            let configs = self.configs(attachment)?;
            for mut config in configs.clone() {
                if !result.is_null() {
                    config["prevResult"] = result;
                }
                let (text, add) = peak(Verb::Add, &config)?;
                result = serde_json::from_str(&text)?;
                most = most.max(add);
            }
            for mut config in configs.into_iter().rev() {
                config["prevResult"] = result.clone();
                most = most.max(peak(Verb::Del, &config)?.1);
            }
            Ok(Some(most))
        })
    }

    /// Whether ports are published by the stock plugin.
    pub(super) fn runs_portmap(&self) -> bool {
        self.conflist["plugins"][1]["type"] == "portmap"
    }

    /// How many pods [`Self::fill`] has attached.
    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// Attaches pods until there are `count`, each in a namespace of its own, and
    /// with the port mappings that `ports` tells by its number. They vanish with
    /// the node. `progress` is called after each.
    pub(super) fn fill(
        &mut self,
        count: usize,
        ports: impl Fn(usize) -> Value + Sync,
        progress: impl Fn() + Sync,
    ) -> Result<()> {
        let start = self.filled;
        self.node.within(|| {
            let node = floor::open_namespace(Path::new("/proc/thread-self/ns/net"))?;
            for number in start..count {
                let name = format!("fill{number}");
                let path = format!("/run/netns/{name}");
                File::create(&path).with_context(|| format!("creating {path}"))?;
                unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
                let (from, bind) = (Some("/proc/thread-self/ns/net"), MsFlags::MS_BIND);
                mount(from, path.as_str(), None::<&str>, bind, None::<&str>)
                    .with_context(|| format!("mounting a namespace on {path}"))?;
                setns(&node, CloneFlags::CLONE_NEWNET).context("going back to the node")?;
                if self.contender == Contender::Floor {
                    let inside = floor::open_namespace(Path::new(&path))?;
                    self.netlink.create(&name, &inside)?;
                    self.netlink.set_up(&name)?;
                } else {
                    let attachment = Attachment::new(&name, &path, "eth0")
                        .capability(PORT_MAPPINGS, ports(number));
                    self.add_here(&attachment)
                        .with_context(|| format!("attaching pod {number}"))?;
                }
                progress();
            }
            Ok(())
        })?;
        self.filled = count;
        Ok(())
    }
}

fn call(verb: Verb, config: &Value) -> Call {
    Call::new(type_of(config), verb).stdin(config)
}

fn type_of(config: &Value) -> &str {
    config["type"].as_str().unwrap_or_default()
}
