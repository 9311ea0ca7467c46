//! The bare netlink operations: what no plugin that gives a pod a veth pair can
//! go below.

use std::{
    fs::File,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::Namespace;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_route::link::{InfoData, InfoVeth, LinkAttribute},
};
use tokio::runtime::{Builder, Runtime};

/// An rtnetlink connection of a namespace.
pub(super) struct Netlink {
    runtime: Runtime,
    handle: Handle,
}

impl Netlink {
    pub(super) fn open(namespace: &Namespace) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        // A socket belongs to the namespace of the thread that makes it.
        let (connection, handle, _) = namespace.within(|| {
            let _reactor = runtime.enter();
            rtnetlink::new_connection().context("opening an rtnetlink socket")
        })?;
        runtime.spawn(connection);
        Ok(Self { runtime, handle })
    }

    /// Creates a veth pair with its peer, `eth0`, in `sandbox`; returns how long
    /// that took.
    pub(super) fn create(&self, name: &str, sandbox: &OwnedFd) -> Result<Duration> {
        let mut peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name("eth0".to_owned())
            .build();
        peer.attributes
            .push(LinkAttribute::NetNsFd(sandbox.as_raw_fd()));
        let pair = LinkMessageBuilder::<LinkVeth>::new(name, "eth0")
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        let start = Instant::now();
        self.runtime
            .block_on(self.handle.link().add(pair).execute())
            .with_context(|| format!("creating the veth pair {name}"))?;
        Ok(start.elapsed())
    }

    pub(super) fn set_up(&self, name: &str) -> Result<()> {
        let up = LinkMessageBuilder::<LinkUnspec>::new()
            .name(name.to_owned())
            .up()
            .build();
        self.runtime
            .block_on(self.handle.link().set(up).execute())
            .with_context(|| format!("setting {name} up"))
    }

    /// Deletes a device by its index, and its peer with it; returns how long that
    /// took.
    pub(super) fn delete(&self, index: u32) -> Result<Duration> {
        let start = Instant::now();
        self.runtime
            .block_on(self.handle.link().del(index).execute())
            .with_context(|| format!("deleting the device with index {index}"))?;
        Ok(start.elapsed())
    }
}

/// The network namespace that is mounted at `path`.
pub(super) fn open_namespace(path: &Path) -> Result<OwnedFd> {
    Ok(File::open(path)
        .with_context(|| format!("opening {}", path.display()))?
        .into())
}
