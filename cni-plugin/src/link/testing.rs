//! Namespaces for tests. They need root, and touch nothing of the machine.

use std::{path::Path, thread};

use nix::{
    mount::{MsFlags, mount, umount},
    sched::{CloneFlags, unshare},
};

use super::{Netlink, VethIndices, VethSpec};
use crate::netns::Netns;

/// A network namespace of its own, which goes when the value does. Its loopback
/// is down.
pub(crate) fn netns() -> Netns {
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("network namespaces need root");
        Netns::current().unwrap()
    })
    .join()
    .unwrap()
}

/// Runs `work` with the namespace's own `/sys/class/net`, as a second opinion
/// beside rtnetlink's.
pub(crate) fn sys<T: Send>(netns: &Netns, work: impl FnOnce(&Path) -> T + Send) -> T {
    let none = None::<&str>;
    let inside = || {
        // The mount ends with the thread; nobody else sees it.
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let point = tempfile::tempdir().unwrap();
        let (kind, flags) = (Some("sysfs"), MsFlags::MS_RDONLY);
        mount(kind, point.path(), kind, flags, none).unwrap();
        let result = work(&point.path().join("class/net"));
        umount(point.path()).unwrap();
        result
    };
    thread::scope(|scope| scope.spawn(|| netns.run_in(inside).unwrap()).join()).unwrap()
}

/// A veth pair between two namespaces: `veth0` on the host, `eth0` in the
/// sandbox, both down.
pub(crate) struct Pair {
    pub(crate) sandbox: Netns,
    pub(crate) outside: Netlink,
    pub(crate) inside: Netlink,
    pub(crate) made: VethIndices,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let sandbox = netns();
        let outside = Netlink::open(&netns()).unwrap();
        let inside = Netlink::open(&sandbox).unwrap();
        let made = outside
            .create_veth(&VethSpec {
                name: "veth0",
                mac: None,
                peer_name: "eth0",
                peer_mac: None,
                peer_netns: Some(&sandbox),
                mtu: 0,
            })
            .unwrap();
        Self {
            sandbox,
            outside,
            inside,
            made,
        }
    }

    /// Sets both ends up, the sandbox's last.
    pub(crate) fn up(&self) {
        self.outside.set_up(self.made.host).unwrap();
        self.inside.set_up(self.made.peer).unwrap();
    }
}
