//! The node of a contender: attaching pods to it, and filling it with them.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Attachment, Call, Network, Node, Sandbox, Verb};
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

/// What the nodes of a run have in common.
pub(super) struct Recipe {
    /// The plugin under test.
    pub(super) plugin: PathBuf,
    /// Where the stock plugins are.
    pub(super) stock: PathBuf,
    /// Another build of bpf-bridge, which takes the place of the stock plugins.
    pub(super) against: Option<PathBuf>,
    /// A directory on a disk, below which each node keeps its addresses: on a
    /// file system in memory `fsync` would be free, as it is on no real node.
    pub(super) disk: PathBuf,
}

/// A node on which one contender attaches pods.
pub(super) struct Arena {
    pub(super) contender: Contender,
    pub(super) node: Node,
    config: Value,
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
    /// The address of a pod, or that of its gateway; of IPv4.
    pub(super) fn v4(&self, key: &str) -> Result<std::net::IpAddr> {
        self.result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip[key].as_str()?.split('/').next()?.parse().ok())
            .find(std::net::IpAddr::is_ipv4)
            .with_context(|| format!("no IPv4 {key} in {}", self.result))
    }
}

impl Arena {
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
            for plugin in ["bridge", "host-local"] {
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
        let plugin = if contender == Contender::Stock && against.is_none() {
            "bridge"
        } else {
            node.plugin()
        };
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "bench",
            "type": plugin,
            "bridge": "cni0",
            "isGateway": true,
            "isDefaultGateway": true,
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": Network::V4_SUBNET}], [{"subnet": Network::V6_SUBNET}]],
            },
        });
        let netlink = Netlink::open(&node)?;
        Ok(Self {
            contender,
            node,
            config,
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
        let reply = self
            .call(Verb::Add)
            .stdin(&self.config)
            .attachment(attachment)
            .run_here()?;
        Ok(Added {
            time: reply.duration,
            result: reply.success()?,
        })
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
        let mut config = self.config.clone();
        config["prevResult"] = added.result.clone();
        let reply = self
            .call(Verb::Del)
            .stdin(&config)
            .attachment(attachment)
            .run_here()?;
        ensure!(reply.success()?.is_null(), "DEL wrote {}", reply.stdout);
        Ok(reply.duration)
    }

    fn call(&self, verb: Verb) -> Call {
        Call::new(self.config["type"].as_str().unwrap_or_default(), verb)
    }

    /// Attaches and detaches a sandbox; returns the most memory that a call had
    /// resident, in bytes. The floor has none: it is no process.
    pub(super) fn memory(&self, sandbox: &Sandbox) -> Result<Option<u64>> {
        if self.contender == Contender::Floor {
            return Ok(None);
        }
        self.node.within(|| {
            let call = |verb: Verb, config: &Value| {
                let plugin = config["type"].as_str().unwrap_or_default();
                let attachment = sandbox.attachment();
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
            let (result, add) = call(Verb::Add, &self.config)?;
            let mut config = self.config.clone();
            config["prevResult"] = serde_json::from_str(&result)?;
            let (_, del) = call(Verb::Del, &config)?;
            Ok(Some(add.max(del)))
        })
    }

    /// Attaches pods until there are `count`, each in a namespace of its own.
    /// They vanish with the node. `progress` is called after each.
    pub(super) fn fill(&mut self, count: usize, progress: impl Fn() + Sync) -> Result<()> {
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
                    self.add_here(&Attachment::new(&name, &path, "eth0"))
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
