//! Settings below `/proc/sys/net`, which shows every thread those of its own
//! network namespace: for a sandbox, use [`Netns::run_in`].
//!
//! [`Netns::run_in`]: crate::netns::Netns::run_in

use std::{
    fmt,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rustix::fs::{CWD, OFlags, openat};
use thiserror::Error;

use crate::{
    fault::{self, Kind},
    mount,
};

const ROOT: &str = "/proc/sys/net";

/// Which protocol's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `net.ipv4`.
    Ipv4,
    /// `net.ipv6`, which a kernel may lack (`ipv6.disable=1`).
    Ipv6,
}

impl Family {
    const fn directory(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }
}

/// Why a setting could not be read or made.
#[derive(Debug, Error)]
pub enum SysctlError {
    /// No device can have this name and settings of its own.
    #[error(
        "{0:?} is not the name of an interface with settings: 1 to 15 bytes without '/', ':' and white space, and none of '.', '..', 'all', 'default'"
    )]
    Device(String),
    /// The setting cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Its file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The setting cannot be made.
    #[error("cannot write {value} to {}: {source}", path.display())]
    Write {
        /// Its file.
        path: PathBuf,
        /// What was to be written.
        value: u32,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// One numeric setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    path: PathBuf,
}

/// What [`Sysctl::set`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It was right already, and was not written.
    Unchanged,
    /// It was written.
    Changed,
    /// The kernel has no such setting: no IPv6, an older kernel, or no such
    /// device.
    Missing,
}

impl Sysctl {
    /// A setting of one device: `net.<family>.conf.<device>.<key>`.
    ///
    /// # Errors
    ///
    /// [`SysctlError::Device`]. `all` and `default` are refused, as the kernel
    /// gives devices of these names no settings: they would be everybody's.
    pub fn device(family: Family, device: &str, key: &str) -> Result<Self, SysctlError> {
        let has_settings = !matches!(device, "" | "." | ".." | "all" | "default")
            && device.len() < 16
            && !device
                .bytes()
                .any(|b| matches!(b, b'/' | b':' | 0 | 0x0b) || b.is_ascii_whitespace());
        if !has_settings {
            return Err(SysctlError::Device(device.to_owned()));
        }
        Ok(Self::below(
            family,
            Path::new("conf").join(device).join(key),
        ))
    }

    /// A setting of the namespace's: `net.<family>.<path>`, for instance
    /// `conf/all/rp_filter`. The path is the program's own, never input.
    #[must_use]
    pub fn namespace(family: Family, path: &'static str) -> Self {
        Self::below(family, PathBuf::from(path))
    }

    /// Whether IPv4 packets are forwarded: `net.ipv4.ip_forward`.
    #[must_use]
    pub fn ipv4_forwarding() -> Self {
        Self::namespace(Family::Ipv4, "ip_forward")
    }

    /// Whether IPv6 packets are forwarded: `net.ipv6.conf.all.forwarding`.
    #[must_use]
    pub fn ipv6_forwarding() -> Self {
        Self::namespace(Family::Ipv6, "conf/all/forwarding")
    }

    fn below(family: Family, path: PathBuf) -> Self {
        Self {
            path: Path::new(ROOT).join(family.directory()).join(path),
        }
    }

    fn open(&self, how: OFlags) -> io::Result<File> {
        let flags = how | OFlags::CLOEXEC;
        let (directory, path) = match (own_procfs(), self.path.strip_prefix("/proc")) {
            (Some(procfs), Ok(path)) => (procfs, path),
            _ => (CWD, self.path.as_path()),
        };
        let file = openat(directory, path, flags, rustix::fs::Mode::empty())?;
        Ok(File::from(file))
    }

    /// Its value; `None` if the kernel has no such setting.
    ///
    /// # Errors
    ///
    /// [`SysctlError::Read`].
    pub fn get(&self) -> Result<Option<i64>, SysctlError> {
        let failed = |source| SysctlError::Read {
            path: self.path.clone(),
            source,
        };
        match self.open(OFlags::RDONLY).and_then(|file| read(&file)) {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// Makes it `value`, if it is not already: so nothing is asked of a
    /// read-only `/proc/sys` that is right as it is.
    ///
    /// # Errors
    ///
    /// [`SysctlError::Read`] and [`SysctlError::Write`].
    pub fn set(&self, value: u32) -> Result<Outcome, SysctlError> {
        let opened = self.open(OFlags::RDWR);
        let found = match &opened {
            Ok(file) => read(file).ok(),
            Err(_) => self.get()?,
        };
        match (found, &opened) {
            (Some(found), _) if found == i64::from(value) => return Ok(Outcome::Unchanged),
            (None, Err(_)) => return Ok(Outcome::Missing),
            _ => {}
        }
        let written = fault::request(Kind::File, self)
            .and(opened)
            // Behind the beginning it would be ignored.
            .and_then(|file| file.write_all_at(value.to_string().as_bytes(), 0));
        match written {
            Ok(()) => {
                fault::point(self);
                Ok(Outcome::Changed)
            }
            // The device went away in between.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Outcome::Missing),
            Err(source) => Err(SysctlError::Write {
                path: self.path.clone(),
                value,
                source,
            }),
        }
    }
}

/// The number that a setting's file has.
fn read(file: &File) -> io::Result<i64> {
    let mut text = [0; 32];
    let length = file.read_at(&mut text, 0)?;
    str::from_utf8(&text[..length])
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is no number"))
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// A procfs of this process's own, seen by nobody else.
///
/// In the machine's, the kernel keeps a directory entry of each name for each
/// network namespace, in one list that every look-up walks: with 1,000 pods, a
/// pod's first setting took 5 ms, and each of the host's one. A new one knows only
/// what this process has looked up. `None` on kernels without `fsopen` (before
/// 5.2), or where the mount is refused: then the machine's is as good.
fn own_procfs() -> Option<BorrowedFd<'static>> {
    static PROCFS: OnceLock<Option<OwnedFd>> = OnceLock::new();
    PROCFS
        .get_or_init(|| mount::detached("proc").ok())
        .as_ref()
        .map(AsFd::as_fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        link::{Netlink, VethSpec, testing},
        mac::MacAddr,
        netns::Netns,
    };

    fn read(path: &str) -> String {
        std::fs::read_to_string(path).unwrap().trim().to_owned()
    }

    /// A namespace with a device whose name has a dot, as VLAN devices have.
    fn sandbox() -> Netns {
        let sandbox = testing::netns();
        Netlink::open(&sandbox)
            .unwrap()
            .create_veth(&VethSpec {
                name: "eth0.100",
                mac: Some(MacAddr::from_hash(0x5e_1234)),
                peer_name: "eth0",
                peer_mac: None,
                peer_netns: None,
                mtu: 0,
            })
            .unwrap();
        sandbox
    }

    #[test]
    fn settings_are_made_through_a_procfs_of_our_own() {
        let own = own_procfs().unwrap();
        let machine = File::open("/proc").unwrap();
        let device = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_dev;
        assert_ne!(device(own), device(machine.as_fd()));
    }

    #[test]
    fn a_device_setting_is_made_once_and_of_that_device_only() {
        sandbox()
            .run_in(|| {
                let setting = Sysctl::device(Family::Ipv6, "eth0.100", "accept_dad").unwrap();
                assert_eq!(setting.get().unwrap(), Some(1));
                assert_eq!(setting.set(0).unwrap(), Outcome::Changed);
                assert_eq!(setting.set(0).unwrap(), Outcome::Unchanged);
                assert_eq!(setting.get().unwrap(), Some(0));
                assert_eq!(read("/proc/sys/net/ipv6/conf/eth0.100/accept_dad"), "0");
                assert_eq!(read("/proc/sys/net/ipv6/conf/eth0/accept_dad"), "1");
            })
            .unwrap();
    }

    #[test]
    fn settings_are_those_of_the_threads_namespace() {
        let before = read("/proc/sys/net/ipv6/conf/all/forwarding");
        let wanted = u32::from(before == "0");
        testing::netns()
            .run_in(|| {
                // A fresh namespace's IPv4 settings may be the machine's.
                let _ = Sysctl::ipv4_forwarding().set(0).unwrap();
                assert_eq!(Sysctl::ipv4_forwarding().set(1).unwrap(), Outcome::Changed);
                assert_eq!(read("/proc/sys/net/ipv4/ip_forward"), "1");
                let _ = Sysctl::ipv6_forwarding().set(wanted).unwrap();
                assert_eq!(
                    read("/proc/sys/net/ipv6/conf/all/forwarding"),
                    wanted.to_string()
                );
            })
            .unwrap();
        assert_eq!(read("/proc/sys/net/ipv6/conf/all/forwarding"), before);
    }

    #[test]
    fn a_setting_that_is_not_there_is_no_error() {
        testing::netns()
            .run_in(|| {
                for (device, key) in [("nosuch", "accept_dad"), ("lo", "no_such_key")] {
                    let setting = Sysctl::device(Family::Ipv6, device, key).unwrap();
                    assert_eq!(setting.get().unwrap(), None);
                    assert_eq!(setting.set(1).unwrap(), Outcome::Missing);
                }
            })
            .unwrap();
    }

    #[test]
    fn a_refused_value_is_named() {
        sandbox()
            .run_in(|| {
                let setting = Sysctl::device(Family::Ipv6, "eth0", "addr_gen_mode").unwrap();
                let error = setting.set(77).unwrap_err();
                assert!(matches!(error, SysctlError::Write { value: 77, .. }));
                let text = error.to_string();
                assert!(
                    text.starts_with(
                        "cannot write 77 to /proc/sys/net/ipv6/conf/eth0/addr_gen_mode: "
                    ),
                    "{text}"
                );
            })
            .unwrap();
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "all",
            "default",
            "../../core",
            "a/b",
            "/",
            "a b",
            "a\tb",
            "a\x0bb",
            "a:1",
            "a\0",
            "sixteen-bytes-xx",
        ] {
            let error = Sysctl::device(Family::Ipv4, name, "rp_filter").unwrap_err();
            assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
        }
        for name in ["eth0", "eth0.100", "...", "fifteen-bytes-x"] {
            let setting = Sysctl::device(Family::Ipv4, name, "rp_filter").unwrap();
            assert_eq!(
                setting.to_string(),
                format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")
            );
        }
    }
}
