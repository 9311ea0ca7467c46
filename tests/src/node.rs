//! Nodes, what is outside of them, and the sandboxes on them.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Deref,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{
    cgroup,
    namespace::Namespace,
    plugin::{Attachment, plugin_binary},
};

/// Where leases are.
const LEASES: &str = "/var/lib/cni";
/// Where the node's settings are.
const SETTINGS: &str = "/etc/bpf-bridge";

/// A machine that pods run on: namespaces with a `/sys`, `/sys/fs/bpf`, `/run`,
/// `/var/lib/cni` and `/etc/bpf-bridge` of their own, and with the plugin and the stock plugins in
/// [`Node::CNI_PATH`].
///
/// The cgroups of version 2 are seen from this process's own as the root;
/// everything else is the machine's. No device but `lo`
/// is there, and forwarding is off, as on a fresh machine.
#[derive(Debug)]
pub struct Node {
    namespace: Namespace,
    plugin: String,
}

impl Node {
    /// The plugin directory, as seen on the node.
    pub const CNI_PATH: &str = "/run/cni/bin";
    /// Where the stock plugins of Debian's `containernetworking-plugins` are.
    pub const STOCK_PLUGINS: &str = "/usr/lib/cni";

    /// Makes a node with the plugin that [`plugin_binary`] names.
    ///
    /// # Errors
    ///
    /// That this is not root, or the plugin was not named.
    pub fn new() -> Result<Self> {
        Self::with_plugin(&plugin_binary()?)
    }

    /// Makes a node with a plugin of the caller's choice, which is called by
    /// its file name.
    ///
    /// # Errors
    ///
    /// That this is not root, or there is no such file.
    pub fn with_plugin(binary: &Path) -> Result<Self> {
        let binary = fs::canonicalize(binary)
            .with_context(|| format!("looking for the plugin {}", binary.display()))?;
        let plugin = binary
            .file_name()
            .and_then(|name| name.to_str())
            .with_context(|| format!("the plugin {} has no usable name", binary.display()))?
            .to_owned();
        // Not in the node: the directories must be there to be mounted over.
        for path in [LEASES, SETTINGS] {
            fs::create_dir_all(path).with_context(|| format!("creating {path}"))?;
        }
        let namespace = Namespace::new(|| {
            mount_all().context("mounting the node's file systems")?;
            install_plugins(&binary)
        })?;
        namespace.ip("link set lo up")?;
        // A new network namespace takes its IPv4 settings from the machine's.
        namespace.set_sysctl("net.ipv4.ip_forward", "0")?;
        Ok(Self { namespace, plugin })
    }

    /// The name of the plugin under test in [`Node::CNI_PATH`]: what a
    /// configuration gives as `type`.
    #[must_use]
    pub fn plugin(&self) -> &str {
        &self.plugin
    }

    /// Makes a sandbox: what a runtime prepares for a pod.
    ///
    /// # Errors
    ///
    /// That the node already has one of this name.
    pub fn sandbox(&self, name: &str) -> Result<Sandbox> {
        let path = PathBuf::from(format!("/run/netns/{name}"));
        let namespace = self.namespace.new_network(|| {
            File::create_new(&path).with_context(|| format!("creating {}", path.display()))?;
            mount(
                Some("/proc/thread-self/ns/net"),
                &path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .with_context(|| format!("mounting the namespace on {}", path.display()))
        })?;
        namespace.ip("link set lo up")?;
        Ok(Sandbox {
            namespace,
            name: name.to_owned(),
            path,
        })
    }

    /// Puts a plugin of the test's own, a shell script, into [`Node::CNI_PATH`].
    ///
    /// # Errors
    ///
    /// That it could not be written.
    pub fn install_script(&self, name: &str, script: &str) -> Result<()> {
        let path = format!("{}/{name}", Self::CNI_PATH);
        // Another process writes it: a descriptor of this one could be inherited
        // by what other threads start, and the script not be executed for that.
        let mut writer = Command::new("sh");
        writer
            .args([
                "-c",
                r#"printf %s "$2" >"$1.new" && chmod 755 "$1.new" && mv "$1.new" "$1""#,
            ])
            .args(["sh", &path, script]);
        let output = self.output(&mut writer)?;
        ensure!(
            output.status.success(),
            "writing {path}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Writes the node's settings, `node.json`; an empty text removes the file.
    ///
    /// # Errors
    ///
    /// That it could not be written.
    pub fn set_settings(&self, text: &str) -> Result<()> {
        let path = Path::new(SETTINGS).join("node.json");
        self.namespace.within(|| {
            let done = if text.is_empty() {
                fs::remove_file(&path).or_else(|error| match error.kind() {
                    io::ErrorKind::NotFound => Ok(()),
                    _ => Err(error),
                })
            } else {
                fs::write(&path, text)
            };
            done.with_context(|| format!("writing {}", path.display()))
        })
    }

    /// Makes another machine, connected to nothing, to be [connected].
    ///
    /// [connected]: Namespace::connect
    ///
    /// # Errors
    ///
    /// That the kernel refused.
    pub fn machine(&self) -> Result<Namespace> {
        let machine = self.namespace.new_network(|| Ok(()))?;
        machine.ip("link set lo up")?;
        // A new network namespace takes its IPv4 settings from the machine's.
        machine.set_sysctl("net.ipv4.ip_forward", "0")?;
        Ok(machine)
    }

    /// Makes the node's neighbour: a machine on the other side of `uplink0`.
    ///
    /// # Errors
    ///
    /// That the node already has one.
    pub fn outside(&self) -> Result<Outside> {
        let namespace = self.machine()?;
        self.connect(Outside::UPLINK, &namespace, "eth0")?;
        self.namespace.ip(&format!(
            "addr add {v4}/24 dev {uplink}\n\
             addr add {v6}/64 dev {uplink} nodad\n\
             route add default via {far_v4}\n\
             route add default via {far_v6}",
            uplink = Outside::UPLINK,
            v4 = Outside::NODE_V4,
            v6 = Outside::NODE_V6,
            far_v4 = Outside::V4,
            far_v6 = Outside::V6,
        ))?;
        namespace.ip(&format!(
            "addr add {}/24 dev eth0\n\
             addr add {}/64 dev eth0 nodad",
            Outside::V4,
            Outside::V6
        ))?;
        self.namespace.wait_local(Outside::NODE_V6)?;
        namespace.wait_local(Outside::V6)?;
        Ok(Outside { namespace })
    }
}

impl Deref for Node {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

/// A machine next to a [`Node`], on the other side of the node's uplink.
#[derive(Debug)]
pub struct Outside {
    namespace: Namespace,
}

impl Outside {
    /// The node's device towards it.
    pub const UPLINK: &str = "uplink0";
    /// Its own IPv4 address (RFC 5737).
    pub const V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
    /// Its own IPv6 address (RFC 3849).
    pub const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1);
    /// The node's IPv4 address on the uplink.
    pub const NODE_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
    /// The node's IPv6 address on the uplink.
    pub const NODE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 2);

    /// Its own address of the family of `other`.
    #[must_use]
    pub fn address_like(other: IpAddr) -> IpAddr {
        match other {
            IpAddr::V4(_) => Self::V4.into(),
            IpAddr::V6(_) => Self::V6.into(),
        }
    }

    /// Gives it a way to a pod subnet, through the node.
    ///
    /// # Errors
    ///
    /// That `subnet` is not a prefix.
    pub fn route_to_node(&self, subnet: &str) -> Result<()> {
        let node: IpAddr = if subnet.contains(':') {
            Self::NODE_V6.into()
        } else {
            Self::NODE_V4.into()
        };
        self.namespace
            .ip(&format!("route add {subnet} via {node} dev eth0"))
    }
}

impl Deref for Outside {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

/// A client three hops away from a [`Node`]: it, a router, and the [`Outside`], which
/// becomes a router too. The link between the routers has an MTU of the caller's.
#[derive(Debug)]
pub struct Far {
    /// The client.
    pub client: Namespace,
    /// The router next to it.
    pub router: Namespace,
}

impl Far {
    /// The client's addresses.
    pub const CLIENT: [&str; 2] = ["192.0.2.2", "2001:db8:a::2"];
    /// The router's, towards the [`Outside`].
    pub const ROUTER: [&str; 2] = ["203.0.113.2", "2001:db8:b::2"];

    /// Makes them.
    ///
    /// # Errors
    ///
    /// That the outside already has a client.
    pub fn new(node: &Node, outside: &Outside, mtu: u32) -> Result<Self> {
        let (client, router) = (node.machine()?, node.machine()?);
        outside.connect("far0", &router, "near0")?;
        router.connect("client0", &client, "eth0")?;
        for router in [&**outside, &router] {
            router.set_sysctl("net/ipv4/ip_forward", "1")?;
            router.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
        }
        outside.ip(&format!(
            "link set far0 mtu {mtu}\n\
             addr add 203.0.113.1/24 dev far0\n\
             addr add 2001:db8:b::1/64 dev far0 nodad\n\
             route add 192.0.2.0/24 via 203.0.113.2\n\
             route add 2001:db8:a::/64 via 2001:db8:b::2"
        ))?;
        router.ip(&format!(
            "link set near0 mtu {mtu}\n\
             addr add 203.0.113.2/24 dev near0\n\
             addr add 2001:db8:b::2/64 dev near0 nodad\n\
             addr add 192.0.2.1/24 dev client0\n\
             addr add 2001:db8:a::1/64 dev client0 nodad\n\
             route add 198.51.100.0/24 via 203.0.113.1\n\
             route add 2001:db8:ffff::/64 via 2001:db8:b::1"
        ))?;
        client.ip("addr add 192.0.2.2/24 dev eth0\n\
             addr add 2001:db8:a::2/64 dev eth0 nodad\n\
             route add default via 192.0.2.1\n\
             route add default via 2001:db8:a::1")?;
        Ok(Self { client, router })
    }
}

/// The network namespace of a pod, found at `/run/netns/NAME` on its node.
#[derive(Debug)]
pub struct Sandbox {
    namespace: Namespace,
    name: String,
    path: PathBuf,
}

impl Sandbox {
    /// The name it was made with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path on the node, for `CNI_NETNS`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its first attachment, `eth0`, with the sandbox's name as container id.
    #[must_use]
    pub fn attachment(&self) -> Attachment {
        Attachment::new(&self.name, &self.path.to_string_lossy(), "eth0")
    }
}

impl Deref for Sandbox {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // So that the name can be had again, and the kernel takes the namespace
        // down now and not with the node. A test may have done it already.
        let path = self.path.clone();
        let _ = self.namespace.within(move || {
            umount2(&path, MntFlags::MNT_DETACH)?;
            Ok(fs::remove_file(&path)?)
        });
    }
}

/// Gives the calling thread's mount namespace file systems of a node's own.
fn mount_all() -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("/")?;
    let tmpfs = |path: &str| {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), none)
            .with_context(|| path.to_owned())
    };
    tmpfs("/run")?;
    tmpfs(LEASES)?;
    tmpfs(SETTINGS)?;
    for directory in ["netns", "cni", "cni/bin", "bpf-bridge", "lock", "cgroup"] {
        fs::create_dir(Path::new("/run").join(directory))?;
    }
    // A new sysfs shows the node's devices. The cgroups below the old one are
    // kept, as runtimes need them.
    let cgroups = Path::new("/run/cgroup");
    mount(
        Some("/sys/fs/cgroup"),
        cgroups,
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )
    .context("/sys/fs/cgroup")?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("/sys")?;
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        none,
    )
    .context("/sys/fs/bpf")?;
    mount(
        Some(cgroups),
        "/sys/fs/cgroup",
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )
    .context("/sys/fs/cgroup")?;
    umount2(cgroups, MntFlags::MNT_DETACH).context("/run/cgroup")?;
    fs::remove_dir(cgroups)?;
    cgroup::mount_namespace()
}

/// Fills [`Node::CNI_PATH`].
fn install_plugins(binary: &Path) -> Result<()> {
    let directory = Path::new(Node::CNI_PATH);
    // Links: while a copy is written, a process that another thread starts would
    // hold it open for writing, and it could not be executed.
    if let Ok(stock) = fs::read_dir(Node::STOCK_PLUGINS) {
        for entry in stock {
            let entry = entry?;
            symlink(entry.path(), directory.join(entry.file_name()))?;
        }
    }
    let ours = directory.join(binary.file_name().unwrap_or_default());
    let _ = fs::remove_file(&ours);
    symlink(binary, &ours).with_context(|| format!("linking {}", ours.display()))
}
