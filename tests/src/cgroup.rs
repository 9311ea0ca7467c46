//! A cgroup of the process's own, which its nodes see as the root of all.
//!
//! A plugin attaches programs to the root of the cgroup hierarchy. A node's root
//! is this process's cgroup, by a cgroup namespace, so they meet what the node
//! runs and nothing else on the machine.

use std::{
    fs,
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use crate::namespace::{on_thread, open_current};

/// What the cgroups of such processes are called, before the process id.
const PREFIX: &str = "bpf-bridge-";
/// The cgroup below that the process is in: one with processes of its own cannot
/// give its children controllers, which runtimes ask for.
const LEAF: &str = "all";

struct Own {
    namespace: OwnedFd,
    /// Removes the cgroup when its standard input is closed: with this process,
    /// however it ends.
    _remover: Child,
}

/// The namespace that shows this process's cgroup as the root. The process moves
/// there when it is first asked for.
pub(crate) fn namespace() -> Result<&'static OwnedFd> {
    static OWN: OnceLock<Result<Own, String>> = OnceLock::new();
    OWN.get_or_init(|| move_to_own().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map(|own| &own.namespace)
        .map_err(|error| anyhow!("giving this process a cgroup of its own: {error}"))
}

/// Mounts what the calling thread's cgroup namespace shows in place of what the
/// machine's does.
pub(crate) fn mount_namespace() -> Result<()> {
    let place = mount_point()?;
    umount2(&place, MntFlags::MNT_DETACH).with_context(|| place.display().to_string())?;
    mount(
        Some("cgroup2"),
        &place,
        Some("cgroup2"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| place.display().to_string())?;
    // Every cgroup has this file but the root.
    ensure!(
        place.join("cgroup.events").exists(),
        "the node would see the machine's root cgroup, to which no test may attach a program"
    );
    Ok(())
}

/// Where the cgroups of version 2 are: `/sys/fs/cgroup`, or below it on a
/// machine that has those of version 1 as well.
fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").context("reading the mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let path = mount.split(' ').nth(4)?;
            (kind.starts_with("cgroup2 ") && path.starts_with("/sys/fs/cgroup"))
                .then(|| path.into())
        })
        .context("no cgroup2 is mounted at /sys/fs/cgroup or below")
}

fn move_to_own() -> Result<Own> {
    let root = mount_point()?;
    remove_leftovers(&root);
    let own = root.join(format!("{PREFIX}{}", process::id()));
    let leaf = own.join(LEAF);
    fs::create_dir_all(&leaf).with_context(|| format!("creating {}", leaf.display()))?;
    // What was killed with this process may take a moment to end. The group of
    // its own spares it the terminal's interrupts.
    let remover = Command::new("sh")
        .args([
            "-c",
            r#"cat; for i in 1 2 3 4 5; do rmdir "$@" && exit; sleep 0.2; done"#,
        ])
        .args([Path::new("remover"), &leaf, &own])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("starting a shell")?;
    enter(&own)?;
    let namespace = on_thread(|| {
        unshare(CloneFlags::CLONE_NEWCGROUP).context("making a cgroup namespace")?;
        open_current("cgroup")
    })?;
    enter(&leaf)?;
    Ok(Own {
        namespace,
        _remover: remover,
    })
}

fn enter(cgroup: &Path) -> Result<()> {
    let processes = cgroup.join("cgroup.procs");
    fs::write(&processes, process::id().to_string())
        .with_context(|| format!("writing to {}", processes.display()))
}

/// Removes the cgroups of processes that are gone, where their removers are too.
fn remove_leftovers(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let gone = owner.is_some_and(|pid| {
            pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()
        });
        if gone {
            let _ = fs::remove_dir(entry.path().join(LEAF));
            let _ = fs::remove_dir(entry.path());
        }
    }
}
