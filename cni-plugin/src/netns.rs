//! Network namespaces: opening the one a runtime names, telling two apart, and
//! running code inside one.
//!
//! A process that handles one attachment works in two namespaces at once. Most
//! work needs no switching, since a netlink socket stays in the namespace it was
//! opened in; what remains (opening those sockets, `/proc/sys/net`) goes through
//! [`Netns::run_in`], which no path leaves switched. It does without a thread of
//! its own: on a busy node the hand-over alone took longer (3 ms, the scheduler's
//! slice) than all else that is done for an attachment.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixDatagram,
    },
    path::{Path, PathBuf},
    process,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    libc,
    sched::{CloneFlags, setns},
    sys::{
        socket::{getsockopt, sockopt::GetStruct},
        stat::{Mode, fstat},
        statfs::{FsType, fstatfs},
    },
};
use thiserror::Error;

/// The calling thread's own namespace. `/proc/self/ns/net` would be the main
/// thread's.
pub(crate) const CURRENT: &str = "/proc/thread-self/ns/net";

/// `NSFS_MAGIC` of the kernel's `include/uapi/linux/magic.h`.
const NSFS: FsType = FsType(0x6e73_6673);

mod ioctl {
    // `NS_GET_NSTYPE` of the kernel's `include/uapi/linux/nsfs.h` (Linux 4.11).
    nix::ioctl_none!(ns_get_nstype, 0xb7, 3);
}

/// `SO_NETNS_COOKIE`.
#[derive(Clone, Copy)]
struct NetnsCookie;

nix::getsockopt_impl!(
    NetnsCookie,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    u64,
    GetStruct<u64>
);

/// The number by which eBPF programs know the calling thread's network namespace
/// (`bpf_get_netns_cookie`), never used again. `None` before Linux 5.14, which
/// does not tell.
///
/// # Errors
///
/// There is no socket to ask by.
pub fn cookie() -> io::Result<Option<u64>> {
    match getsockopt(&UnixDatagram::unbound()?, NetnsCookie) {
        Ok(cookie) => Ok(Some(cookie)),
        Err(Errno::ENOPROTOOPT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Why a network namespace could not be used.
#[derive(Debug, Error)]
pub enum NetnsError {
    /// The path cannot be opened: usually it does not exist (any more).
    #[error("cannot open network namespace {}: {source}", path.display())]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The path leads to something that is no network namespace.
    #[error("{} is not a network namespace", path.display())]
    NotNetns {
        /// What was opened.
        path: PathBuf,
    },
    /// The namespace could not be entered.
    #[error("cannot enter network namespace {}: {source}", path.display())]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}

impl NetnsError {
    /// Whether the namespace does not exist, as after a pod's end or a reboot.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Open { source, .. }
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory))
    }
}

/// An open network namespace. It lives at least as long as this does.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Netns {
    /// Opens the network namespace that `path` leads to, following symbolic
    /// links (`/var/run/netns/…` often is one).
    ///
    /// The path comes from outside (CNI_NETNS), so nothing is opened for
    /// reading before it is known to be a namespace: opening a device or a
    /// FIFO has effects.
    ///
    /// # Errors
    ///
    /// [`NetnsError::Open`] and [`NetnsError::NotNetns`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetnsError> {
        let path = path.as_ref();
        let failed = |errno: Errno| NetnsError::Open {
            path: path.to_owned(),
            source: errno.into(),
        };
        let found = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed)?;
        if fstatfs(&found).map_err(failed)?.filesystem_type() != NSFS {
            return Err(NetnsError::NotNetns {
                path: path.to_owned(),
            });
        }
        // The very file that was checked, not the path a second time.
        let reopen = format!("/proc/self/fd/{}", found.as_raw_fd());
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = open(reopen.as_str(), flags, Mode::empty()).map_err(failed)?;
        // SAFETY: NS_GET_NSTYPE takes no argument and the descriptor is open.
        match unsafe { ioctl::ns_get_nstype(file.as_raw_fd()) } {
            Ok(kind) if kind == CloneFlags::CLONE_NEWNET.bits() => {}
            Ok(_) | Err(Errno::ENOTTY) => {
                return Err(NetnsError::NotNetns {
                    path: path.to_owned(),
                });
            }
            Err(errno) => return Err(failed(errno)),
        }
        let stat = fstat(&file).map_err(failed)?;
        Ok(Self {
            file: file.into(),
            path: path.to_owned(),
            dev: stat.st_dev,
            ino: stat.st_ino,
        })
    }

    /// The calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// [`NetnsError::Open`], without `/proc` for instance.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open(CURRENT)
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode number, which no other living namespace has. A number
    /// is used again once its namespace is gone.
    #[must_use]
    pub fn identity(&self) -> (u64, u64) {
        (self.dev, self.ino)
    }

    /// Whether both are the same namespace, by whichever path each was opened.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }

    /// Runs `work` inside the namespace and returns what it returned.
    ///
    /// The calling thread is in its own namespace again when this returns,
    /// whether `work` returned or panicked. Should the kernel refuse the way
    /// back the process is aborted: to go on would be to take the sandbox for
    /// the host.
    ///
    /// # Errors
    ///
    /// [`NetnsError::Open`] for the caller's own namespace and
    /// [`NetnsError::Enter`]; then `work` was not run.
    pub fn run_in<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let home = File::open(CURRENT).map_err(|source| NetnsError::Open {
            path: CURRENT.into(),
            source,
        })?;
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter {
            path: self.path.clone(),
            source: errno.into(),
        })?;
        let _back = WayBack(home);
        Ok(work())
    }
}

/// Returns the thread to the namespace when dropped.
struct WayBack(File);

impl Drop for WayBack {
    fn drop(&mut self) {
        if let Err(errno) = setns(&self.0, CloneFlags::CLONE_NEWNET) {
            #[expect(clippy::print_stderr, reason = "nobody is left to report it to")]
            {
                eprintln!("cannot return to the host's network namespace: {errno}");
            }
            process::abort();
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, panic};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;
    use crate::link::testing;

    #[test]
    fn tells_namespaces_apart() {
        let home = Netns::current().unwrap();
        let other = testing::netns();
        assert!(!home.is_same(&other));
        assert!(home.is_same(&Netns::open("/proc/thread-self/ns/net").unwrap()));
        let inside = other.run_in(|| Netns::current().unwrap()).unwrap();
        assert!(inside.is_same(&other));
        assert_eq!(inside.identity(), other.identity());
    }

    #[test]
    fn each_namespace_has_a_cookie_of_its_own() {
        let here = cookie().unwrap().unwrap();
        let other = testing::netns();
        let there = other.run_in(cookie).unwrap().unwrap().unwrap();
        assert_ne!(here, there);
        assert_eq!(other.run_in(cookie).unwrap().unwrap(), Some(there));
        assert_eq!(cookie().unwrap(), Some(here));
    }

    #[test]
    fn the_caller_stays_where_it_is() {
        let home = Netns::current().unwrap().identity();
        let other = testing::netns();
        other.run_in(|| ()).unwrap();
        assert_eq!(Netns::current().unwrap().identity(), home);
        let early: Result<(), ()> = other.run_in(|| Err(())).unwrap();
        assert!(early.is_err());
        assert_eq!(Netns::current().unwrap().identity(), home);
        let panicked = panic::catch_unwind(|| other.run_in(|| panic!("on purpose")));
        assert!(panicked.is_err());
        assert_eq!(Netns::current().unwrap().identity(), home);
    }

    #[test]
    fn refuses_what_is_no_network_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let fifo = dir.path().join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        for path in [
            file.as_path(),
            fifo.as_path(),
            dir.path(),
            Path::new("/dev/null"),
            Path::new("/proc/self/ns/mnt"),
            Path::new("/proc/self/ns/pid_for_children"),
        ] {
            let error = Netns::open(path).unwrap_err();
            assert!(matches!(error, NetnsError::NotNetns { .. }), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()));
            assert!(!error.is_missing());
        }
    }

    #[test]
    fn a_missing_namespace_is_told_apart() {
        for path in ["/run/netns/gone-for-good", "", "/dev/null/x"] {
            let error = Netns::open(path).unwrap_err();
            assert!(error.is_missing(), "{error}");
        }
    }
}
