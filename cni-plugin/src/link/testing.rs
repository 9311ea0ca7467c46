//! Namespaces for tests. They need root, and touch nothing of the machine.

use std::thread;

use nix::sched::{CloneFlags, unshare};

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
