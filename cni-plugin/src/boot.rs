//! Which boot of the machine this is, and which network namespace is the node's: what
//! the kernel's numbers mean something in.

use std::{fs, os::unix::fs::MetadataExt as _, sync::OnceLock};

use crate::netns;

/// Names the running system: another value after every boot (Linux 2.4 and later).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The name of this boot, one word; empty if the system does not tell.
pub fn id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| {
        let id = fs::read_to_string(BOOT_ID).unwrap_or_default();
        id.split_whitespace().next().unwrap_or_default().into()
    })
}

/// The name of this boot and of the node's network namespace. Within both, the kernel
/// gives no ifindex to another device; beyond, the same numbers are other devices'.
pub fn era() -> &'static str {
    static ERA: OnceLock<String> = OnceLock::new();
    ERA.get_or_init(|| {
        let namespace = match netns::cookie() {
            Ok(Some(cookie)) => cookie.to_string(),
            // Before Linux 5.14. An inode number may come again, but not soon.
            _ => fs::metadata(netns::CURRENT)
                .map(|namespace| format!("inode {}", namespace.ino()))
                .unwrap_or_default(),
        };
        format!("{} {namespace}", id())
    })
}
