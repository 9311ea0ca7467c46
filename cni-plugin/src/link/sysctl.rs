//! Settings below `/proc/sys/net`, which shows every thread those of its own
//! network namespace: for a sandbox, use [`Netns::run_in`].
//!
//! [`Netns::run_in`]: crate::netns::Netns::run_in

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

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
        match fs::read_to_string(&self.path) {
            Ok(text) => text
                .trim()
                .parse()
                .map(Some)
                .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error))),
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
        match self.get()? {
            None => return Ok(Outcome::Missing),
            Some(found) if found == i64::from(value) => return Ok(Outcome::Unchanged),
            Some(_) => {}
        }
        match fs::write(&self.path, value.to_string()) {
            Ok(()) => Ok(Outcome::Changed),
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

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}
