//! File systems of this process's own, mounted where nobody else sees them.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use rustix::{
    fs::{CWD, Mode, OFlags, fstat, openat, stat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};
use thiserror::Error;

/// Where cgroup2 is mounted: alone, and beside the hierarchies of version 1.
const CGROUP2: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// The inode number of the root of cgroup2.
const CGROUP2_ROOT: u64 = 1;
/// `PROC_CGROUP_INIT_INO` of the kernel's `include/linux/proc_ns.h`: the inode
/// number of the machine's cgroup namespace.
const INITIAL_CGROUP_NAMESPACE: u64 = 0xefff_fffb;

/// Why a file system could not be mounted.
#[derive(Debug, Error)]
#[error("cannot mount a {fstype} file system for itself: {source}")]
pub struct MountError {
    fstype: &'static str,
    source: io::Error,
}

/// Mounts a file system in no place: it lives as long as what is returned, to
/// which paths may be relative. It needs `fsopen` (Linux 5.2).
///
/// # Errors
///
/// [`MountError`].
pub fn detached(fstype: &'static str) -> Result<OwnedFd, MountError> {
    let mount = || {
        let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(context.as_fd())?;
        fsmount(
            context.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOEXEC,
        )
    };
    mount().map_err(|errno| failed(fstype, errno))
}

/// The root directory of cgroup2, as the calling thread's cgroup namespace shows
/// it.
///
/// In the machine's own namespace it is opened where it is mounted, if it is.
/// Mounting it there once more would take away the options of the first mount
/// (`nsdelegate`, `memory_recursiveprot`, …), which are the hierarchy's, not the
/// mount's (`apply_cgroup_root_flags`, kernel/cgroup/cgroup.c).
///
/// # Errors
///
/// [`MountError`], for instance on a kernel without cgroup2.
pub fn cgroup_root() -> Result<OwnedFd, MountError> {
    if in_initial_cgroup_namespace()
        && let Some(root) = CGROUP2.into_iter().find_map(mounted_cgroup_root)
    {
        return Ok(root);
    }
    let fstype = "cgroup2";
    open_directory(detached(fstype)?.as_fd(), ".").map_err(|errno| failed(fstype, errno))
}

fn in_initial_cgroup_namespace() -> bool {
    stat("/proc/thread-self/ns/cgroup").is_ok_and(|stat| stat.st_ino == INITIAL_CGROUP_NAMESPACE)
}

/// The root of cgroup2, if it is what is mounted here.
fn mounted_cgroup_root(path: &str) -> Option<OwnedFd> {
    let directory = open_directory(CWD, path).ok()?;
    let is_root = fstat(&directory).ok()?.st_ino == CGROUP2_ROOT;
    (is_root && is_cgroup2(&directory)).then_some(directory)
}

fn is_cgroup2(directory: &OwnedFd) -> bool {
    fstatfs(directory).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

fn open_directory(base: BorrowedFd<'_>, path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(base, path, flags, Mode::empty())
}

fn failed(fstype: &'static str, errno: rustix::io::Errno) -> MountError {
    MountError {
        fstype,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, path::PathBuf, process, process::Command};

    use nix::sched::{CloneFlags, unshare};
    use rustix::fs::{AtFlags, StatxFlags, statx};

    use super::*;

    /// Tells the test, when it calls itself, the cgroup that it is to move to.
    const CGROUP: &str = "BPF_BRIDGE_TEST_CGROUP";

    /// Where this machine has cgroup2.
    fn machine() -> PathBuf {
        let shown = |path: &&str| is_cgroup2(&open_directory(CWD, path).unwrap());
        CGROUP2.into_iter().find(shown).unwrap().into()
    }

    fn names(directory: &OwnedFd) -> Vec<String> {
        let names = rustix::fs::Dir::read_from(directory).unwrap();
        names
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// A cgroup of this test's own, which goes when the value does.
    struct Cgroup(PathBuf);

    impl Cgroup {
        fn new(name: &str) -> Self {
            let path = machine().join(format!("bpf-bridge-{name}-{}", process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Cgroup {
        fn drop(&mut self) {
            let _ = fs::remove_dir(self.0.join("inner"));
            let _ = fs::remove_dir(&self.0);
        }
    }

    #[test]
    fn a_cgroup_namespace_shows_its_own_root() {
        let Some(path) = env::var_os(CGROUP).map(PathBuf::from) else {
            // A cgroup is the whole process's, so this is for another one.
            let cgroup = Cgroup::new("namespace");
            let done = Command::new(env::current_exe().unwrap())
                .args([
                    "--exact",
                    "mount::tests::a_cgroup_namespace_shows_its_own_root",
                ])
                .env(CGROUP, &cgroup.0)
                .output()
                .unwrap();
            assert!(done.status.success(), "{done:?}");
            assert!(cgroup.0.join("inner").is_dir());
            return;
        };
        fs::write(path.join("cgroup.procs"), "0").unwrap();
        unshare(CloneFlags::CLONE_NEWCGROUP).unwrap();
        assert!(!in_initial_cgroup_namespace());
        let root = cgroup_root().unwrap();
        rustix::fs::mkdirat(&root, "inner", Mode::RWXU).unwrap();
        let names = names(&root);
        assert!(names.contains(&"inner".to_owned()), "{names:?}");
        // A root of its own has what the machine's has not.
        assert!(names.contains(&"cgroup.type".to_owned()), "{names:?}");
        let own = stat(&path).unwrap();
        assert_eq!(fstat(&root).unwrap().st_ino, own.st_ino);
        assert_ne!(own.st_ino, CGROUP2_ROOT);
    }

    #[test]
    fn only_in_a_namespace_of_its_own_are_cgroups_mounted_again() {
        let initial = in_initial_cgroup_namespace();
        let mount = |directory: &OwnedFd| {
            statx(directory, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
                .unwrap()
                .stx_mnt_id
        };
        let root = cgroup_root().unwrap();
        let machine = open_directory(CWD, machine().to_str().unwrap()).unwrap();
        assert_eq!(mount(&root) == mount(&machine), initial);
        assert_eq!(fstat(&root).unwrap().st_ino == CGROUP2_ROOT, initial);
    }

    #[test]
    fn what_is_not_the_root_of_cgroup2_is_not_taken_for_it() {
        let cgroup = Cgroup::new("subtree");
        for path in ["/proc", "/nonexistent", cgroup.0.to_str().unwrap()] {
            assert!(mounted_cgroup_root(path).is_none(), "{path}");
        }
    }

    #[test]
    fn an_unknown_file_system_is_named() {
        let error = detached("no-such-fs").unwrap_err().to_string();
        assert!(
            error.starts_with("cannot mount a no-such-fs file system for itself: "),
            "{error}"
        );
    }
}
