//! Where the programs and maps live between calls: bpffs.
//!
//! ```text
//! /sys/fs/bpf/bpf-bridge/v1/maps/PORTS …      the tables, shared by everything
//! /sys/fs/bpf/bpf-bridge/v1/off/port …        the programs, built for log level `off`
//! /sys/fs/bpf/bpf-bridge/v1/off/PROGRAMS      the table by which they call each other
//! /sys/fs/bpf/bpf-bridge/v1/nat/uplink …    the programs that translate
//! /sys/fs/bpf/bpf-bridge/v1/links/uplink-2 …  where they are attached: what the device of ifindex 2 receives
//! /sys/fs/bpf/bpf-bridge/v1/links/egress-2 …  and what it sends
//! /sys/fs/bpf/bpf-bridge/v1/links/xdp-2 …     and where XDP is
//! ```
//!
//! The version in the path is [`ABI`]: a plugin never sees maps of another layout.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use bpf_bridge_common::layout::ABI;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{Error, LogLevel};
use crate::{
    fault::{self, Kind},
    lock::{Lock, Mode},
};

/// Where bpffs is expected to be mounted.
pub const BPFFS: &str = "/sys/fs/bpf";

/// The lock that is held shared by who uses the pins, and alone by who makes or
/// removes them.
const LOCK: &str = "/run/bpf-bridge/datapath.lock";

/// The root of this version's pins.
pub(super) fn root() -> PathBuf {
    Path::new(BPFFS).join("bpf-bridge").join(format!("v{ABI}"))
}

/// The pin path of a shared map.
pub(super) fn map(name: &str) -> PathBuf {
    root().join("maps").join(name)
}

/// The directory of the programs that were loaded for `level`.
pub(super) fn variant(level: LogLevel) -> PathBuf {
    root().join(level.name())
}

/// The pin path of a program that translates.
pub(super) fn nat(name: &str) -> PathBuf {
    root().join("nat").join(name)
}

/// Where the links of programs that translate are.
pub(super) fn links() -> PathBuf {
    root().join("links")
}

/// The pin path of a link.
pub(super) fn link(name: &str) -> PathBuf {
    links().join(name)
}

/// The ifindex of every device that has a pinned link of this kind.
pub(super) fn devices(kind: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(links()) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .to_str()?
                .strip_prefix(kind)?
                .parse()
                .ok()
        })
        .collect()
}

/// Creates the directories for the programs that translate.
pub(super) fn create_nat() -> Result<(), Error> {
    create([nat(""), links()])
}

/// Refuses to go on without bpffs.
///
/// # Errors
///
/// [`Error::NoBpffs`].
pub fn require_bpffs() -> Result<(), Error> {
    let mounted = statfs(BPFFS).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
    if mounted { Ok(()) } else { Err(Error::NoBpffs) }
}

/// Creates the directories for the pins of `level`.
pub(super) fn create_directories(level: LogLevel) -> Result<(), Error> {
    create([root().join("maps"), variant(level)])
}

fn create(paths: [PathBuf; 2]) -> Result<(), Error> {
    for path in paths {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|source| Error::Pin { path, source })?;
    }
    Ok(())
}

/// Removes every pin of this version.
pub(super) fn remove_all() -> Result<(), Error> {
    // The pins that say that all is there go first, in case this is killed.
    for level in LogLevel::ALL {
        remove(&variant(level).join("port"))?;
    }
    remove(&root())
}

/// Pins a program or a link, by `pin`.
pub(super) fn pin<E>(path: &Path, pin: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), Error>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let at = path.display();
    fault::request(Kind::Bpf, format_args!("pin {at}"))
        .and_then(|()| pin(path).map_err(io::Error::other))
        .map_err(|source| Error::Pin {
            path: path.to_owned(),
            source,
        })?;
    fault::point(format_args!("pin {at}"));
    Ok(())
}

/// Removes a pin, or a directory of pins; that there is none is no error.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    remove_below(path).map_err(|source| Error::Pin {
        path: path.to_owned(),
        source,
    })
}

fn remove_below(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() {
        for entry in fs::read_dir(path)? {
            remove_below(&entry?.path())?;
        }
        fs::remove_dir(path)
    } else {
        fault::request(Kind::Bpf, format_args!("remove {}", path.display()))?;
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => {
            fault::point(format_args!("remove {}", path.display()));
            Ok(())
        }
    }
}

/// Takes the lock of the pins.
pub(super) fn lock(mode: Mode) -> Result<Lock, Error> {
    Ok(Lock::take(Path::new(LOCK), mode)?)
}
