//! The node of a contender: attaching pods to it, and filling it with them.

use std::{
    fs::{self, File},
    net::IpAddr,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
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
    rules::{Pod, Rules},
};

/// The name of the network on every node.
pub(super) const NETWORK: &str = "bench";

/// The capability by which a runtime publishes ports.
pub(super) const PORT_MAPPINGS: &str = "portMappings";

/// The port with which it is tried whose CHECK works.
const TRIED_PORT: usize = 21_999;
/// So many characters of its error are told.
const TOLD: usize = 80;

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

impl Recipe {
    /// How large the files are that a contender consists of, in bytes; the floor has none.
    pub(super) fn binaries(&self, contender: Contender) -> Result<Option<u64>> {
        let files = match (contender, &self.against) {
            (Contender::Floor, _) => return Ok(None),
            (Contender::Stock, None) => STOCK_PLUGINS.map(|name| self.stock.join(name)).into(),
            (Contender::Stock, Some(other)) => vec![other.clone()],
            _ => vec![self.plugin.clone()],
        };
        let mut sum = 0;
        for file in &files {
            let data = fs::metadata(file);
            sum += data
                .with_context(|| format!("looking at {}", file.display()))?
                .len();
        }
        Ok(Some(sum))
    }
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
    backend: Backend,
    /// Plugins of the chain whose CHECK cannot work.
    unchecked: Vec<String>,
    // Below the node's mounts.
    _disk: TempDir,
}

/// A sandbox that is attached and detached again and again: making and removing
/// namespaces would go on in the background while the next call is measured.
pub(super) struct Slot {
    pub(super) attachment: Attachment,
    /// Of the floor: the socket and the file of its namespace.
    inside: Option<(Netlink, OwnedFd)>,
    _sandbox: Sandbox,
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
            backend: recipe.backend,
            unchecked: Vec::new(),
            _disk: disk,
        })
    }

    /// Makes a sandbox that is attached, with these port mappings, again and again.
    pub(super) fn slot(&self, name: &str, ports: Value) -> Result<Slot> {
        let sandbox = self.node.sandbox(name)?;
        let attachment = sandbox.attachment().capability(PORT_MAPPINGS, ports);
        let inside = if self.contender == Contender::Floor {
            let netlink = Netlink::open(&sandbox)?;
            let path = sandbox.path();
            let namespace = self.node.within(|| floor::open_namespace(path))?;
            Some((netlink, namespace))
        } else {
            None
        };
        Ok(Slot {
            attachment,
            inside,
            _sandbox: sandbox,
        })
    }

    /// ADD of a slot, as a runtime would; of the floor: the bare requests. The calling
    /// thread is in the node.
    pub(super) fn attach_here(&self, slot: &Slot) -> Result<Added> {
        let Some((inside, namespace)) = &slot.inside else {
            return self.add_here(&slot.attachment);
        };
        let name = &slot.attachment.container_id;
        let (pair, time) = self
            .netlink
            .attach(name, inside, namespace)
            .with_context(|| self.whose(Verb::Add, &slot.attachment))?;
        let result = pair.host.into();
        Ok(Added { time, result })
    }

    /// DEL of a slot; returns how long it took. The calling thread is in the node.
    pub(super) fn detach_here(&self, slot: &Slot, added: &Added) -> Result<Duration> {
        if slot.inside.is_none() {
            return self.del_here(&slot.attachment, added);
        }
        let index = added.result.as_u64().context("a device without an index")?;
        self.netlink
            .delete(u32::try_from(index)?)
            .with_context(|| self.whose(Verb::Del, &slot.attachment))
    }

    /// CHECK of a slot; returns how long it took. The calling thread is in the node.
    pub(super) fn check_here(&self, slot: &Slot, added: &Added) -> Result<Duration> {
        let mut time = Duration::ZERO;
        for mut config in self.configs(&slot.attachment)? {
            if self
                .unchecked
                .iter()
                .any(|plugin| plugin == type_of(&config))
            {
                continue;
            }
            config["prevResult"] = added.result.clone();
            time += self.call(Verb::Check, &config, &slot.attachment)?.1;
        }
        Ok(time)
    }

    /// Whether there is a CHECK to be measured: the floor has none, nor a chain in which
    /// none works.
    pub(super) fn checks(&self) -> bool {
        let plugins = self.conflist["plugins"].as_array().map_or(0, Vec::len);
        self.contender != Contender::Floor && self.unchecked.len() < plugins
    }

    /// Finds out whose CHECK fails among the plugins of the stock chain, which is known of
    /// portmap 1.1.1: that is left out of what is measured. Returns what must be told of it.
    pub(super) fn try_checks(&mut self) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        if !self.is_stock() {
            return Ok(notes);
        }
        let slot = self.slot("tried", json!([port_mapping(TRIED_PORT, TRIED_PORT)]))?;
        let added = self.node.within(|| self.attach_here(&slot))?;
        for mut config in self.configs(&slot.attachment)? {
            config["prevResult"] = added.result.clone();
            let call = self
                .node
                .within(|| self.call(Verb::Check, &config, &slot.attachment));
            if let Err(error) = call {
                let plugin = type_of(&config).to_owned();
                let why: String = message(&error.root_cause().to_string())
                    .chars()
                    .take(TOLD)
                    .collect();
                notes.push(format!(
                    "CHECK of stock is without that of {plugin}, which fails for a pod that is \
                     as it should be (\"{why} …\")."
                ));
                self.unchecked.push(plugin);
            }
        }
        self.node.within(|| self.detach_here(&slot, &added))?;
        Ok(notes)
    }

    /// Attaches a sandbox as a runtime would.
    pub(super) fn add(&self, sandbox: &Sandbox) -> Result<Added> {
        self.node.within(|| self.add_here(&sandbox.attachment()))
    }

    /// Calls ADD in the node that the calling thread is in.
    pub(super) fn add_here(&self, attachment: &Attachment) -> Result<Added> {
        self.add_by(self.configs(attachment)?, attachment)
    }

    /// The same by other plugins than those of the list, or by some of them.
    fn add_by(&self, configs: Vec<Value>, attachment: &Attachment) -> Result<Added> {
        let mut added = Added {
            time: Duration::ZERO,
            result: Value::Null,
        };
        for mut config in configs {
            if !added.result.is_null() {
                config["prevResult"] = added.result;
            }
            let (result, time) = self.call(Verb::Add, &config, attachment)?;
            added.time += time;
            added.result = result;
        }
        Ok(added)
    }

    /// What the plugins of the chain read, in its order.
    fn configs(&self, attachment: &Attachment) -> Result<Vec<Value>> {
        Network::from_list(&self.node, self.conflist.clone()).configs(Some(attachment))
    }

    /// Calls DEL in the node that the calling thread is in.
    pub(super) fn del_here(&self, attachment: &Attachment, added: &Added) -> Result<Duration> {
        let mut time = Duration::ZERO;
        for mut config in self.configs(attachment)?.into_iter().rev() {
            config["prevResult"] = added.result.clone();
            time += self.call(Verb::Del, &config, attachment)?.1;
        }
        Ok(time)
    }

    /// One call of one plugin: what it wrote, and how long it took.
    fn call(
        &self,
        verb: Verb,
        config: &Value,
        attachment: &Attachment,
    ) -> Result<(Value, Duration)> {
        let call = || {
            let reply = Call::new(type_of(config), verb)
                .stdin(config)
                .attachment(attachment)
                .run_here()?;
            let result = reply.success()?;
            ensure!(
                verb == Verb::Add || result.is_null(),
                "{} wrote {}",
                type_of(config),
                reply.stdout
            );
            Ok((result, reply.duration))
        };
        call().with_context(|| self.whose(verb, attachment))
    }

    /// For an error.
    fn whose(&self, verb: Verb, attachment: &Attachment) -> String {
        format!(
            "{} of container {} by {}",
            verb.as_str(),
            attachment.container_id,
            self.contender.name()
        )
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
                    .with_context(|| format!("{plugin} under ptrace"))
                    .with_context(|| self.whose(verb, attachment))
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

    /// Whether the stock plugins are called, and not another build in their place.
    pub(super) fn is_stock(&self) -> bool {
        self.conflist["plugins"][0]["type"] == STOCK_PLUGINS[0]
    }

    /// Whether what it costs to have many pods is rules, which can be written without them.
    pub(super) fn has_rules(&self) -> bool {
        self.is_stock() && self.backend == Backend::Iptables
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
        self.fill_by(count, &progress, |arena, number, attachment| {
            let attachment = attachment.capability(PORT_MAPPINGS, ports(number));
            arena.add_here(&attachment).map(drop)
        })
    }

    /// The same for pods without ports, where the stock chain has [rules](Self::has_rules):
    /// devices and leases are those of `bridge`, rules are copies.
    pub(super) fn fill_copying(
        &mut self,
        count: usize,
        rules: &Rules,
        progress: impl Fn() + Sync,
    ) -> Result<()> {
        let pods = Mutex::new(Vec::new());
        self.fill_by(count, &progress, |arena, _, attachment| {
            let mut configs = arena.configs(&attachment)?;
            configs.truncate(1);
            configs[0]["ipMasq"] = false.into();
            let added = arena.add_by(configs, &attachment)?;
            let pod = Pod::new(&attachment.container_id, &added, 0)?;
            pods.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(pod);
            Ok(())
        })?;
        let pods = pods.into_inner().unwrap_or_else(PoisonError::into_inner);
        rules.write(&self.node, &pods)
    }

    fn fill_by(
        &mut self,
        count: usize,
        progress: &(impl Fn() + Sync),
        attach: impl Fn(&Self, usize, Attachment) -> Result<()> + Sync,
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
                let inside = Netlink::open_here()?;
                setns(&node, CloneFlags::CLONE_NEWNET).context("going back to the node")?;
                if self.contender == Contender::Floor {
                    let namespace = floor::open_namespace(Path::new(&path))?;
                    self.netlink.attach(&name, &inside, &namespace)?;
                } else {
                    attach(self, number, Attachment::new(&name, &path, "eth0"))?;
                }
                progress();
            }
            Ok(())
        })?;
        self.filled = count;
        Ok(())
    }
}

/// The message in the error object that is in a text; else the text.
fn message(text: &str) -> String {
    let object = text.find('{').and_then(|start| {
        let mut objects = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
        objects.next()?.ok()
    });
    let message = object.as_ref().and_then(|object| object["msg"].as_str());
    message.unwrap_or(text).to_owned()
}

fn type_of(config: &Value) -> &str {
    config["type"].as_str().unwrap_or_default()
}

/// A TCP port of the node's that is one of the pod's.
pub(super) fn port_mapping(host: usize, container: usize) -> Value {
    json!({"hostPort": host, "containerPort": container, "protocol": "tcp"})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_of_a_plugin_is_found() {
        let text =
            "CHECK portmap: exit status: 1: {\n \"code\": 999,\n \"msg\": \"no rule\"\n} warning";
        assert_eq!(message(text), "no rule");
        for text in ["signal: 9", "{", "{}", ""] {
            assert_eq!(message(text), text);
        }
    }
}
