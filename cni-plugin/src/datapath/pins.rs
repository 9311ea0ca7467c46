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
//! The version in the path is [`ABI`]: a plugin never sees maps of another layout, but to
//! carry them over ([`carry`]). While it does so, `v2/unfinished` says that nobody uses the
//! new ones yet; `v1-old` are maps that are replaced by larger or smaller ones.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use bpf_bridge_common::layout::ABI;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{Error, LogLevel, carry};
use crate::{
    fault::{self, Kind},
    lock::{Lock, Mode},
};

/// Where bpffs is expected to be mounted.
pub const BPFFS: &str = "/sys/fs/bpf";

/// The lock that is held shared by who uses the pins, and alone by who makes or
/// removes them.
const LOCK: &str = "/run/bpf-bridge/datapath.lock";

/// What is there while a layout is being made from an older one: nothing of it is in use yet.
const UNFINISHED: &str = "unfinished";
/// What the directory of the pins is renamed to while the maps are made anew.
const OLD: &str = "old";
/// The pin that says that the programs of a log level are there: it comes last.
pub(super) const LAST: &str = "port";

/// The directory of all pins of one layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Root {
    path: PathBuf,
}

impl Root {
    /// That of this version.
    pub(super) fn own() -> Self {
        Self {
            path: top().join(format!("v{ABI}")),
        }
    }

    /// Where this version's own pins are while the maps are made anew.
    fn old() -> Self {
        Self {
            path: top().join(format!("v{ABI}-{OLD}")),
        }
    }

    /// What it is called among the others.
    pub(super) fn name(&self) -> String {
        self.path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// The pin path of a shared map.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.path.join("maps").join(name)
    }

    /// The directory of the programs that were loaded for `level`.
    pub(super) fn variant(&self, level: LogLevel) -> PathBuf {
        self.path.join(level.name())
    }

    /// The pin path of a program that translates.
    pub(super) fn nat(&self, name: &str) -> PathBuf {
        self.path.join("nat").join(name)
    }

    /// The pin path of a link.
    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.path.join("links").join(name)
    }

    /// The ifindex of every device that has a pinned link of this kind.
    pub(super) fn devices(&self, kind: &str) -> Vec<u32> {
        let Ok(entries) = fs::read_dir(self.path.join("links")) else {
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

    /// The log levels whose programs are there.
    pub(super) fn levels(&self) -> impl Iterator<Item = LogLevel> + '_ {
        LogLevel::ALL
            .into_iter()
            .filter(|level| self.variant(*level).join(LAST).exists())
    }

    /// Whether a load ever came to its end.
    pub(super) fn is_loaded(&self) -> bool {
        self.levels().next().is_some()
    }

    /// Whether it is in use: not one that is being made.
    pub(super) fn is_complete(&self) -> bool {
        self.is_loaded() && !self.path.join(UNFINISHED).exists()
    }

    /// Creates the directories of a layout that is to be made from an older one.
    pub(super) fn begin(&self) -> Result<(), Error> {
        create(&[self.path.join(UNFINISHED)])
    }

    /// Puts this version's own pins aside, so that they can be made anew.
    pub(super) fn put_aside(&self) -> Result<Self, Error> {
        let old = Self::old();
        self.rename(&old)?;
        Ok(old)
    }

    /// Undoes that.
    pub(super) fn put_back(&self) -> Result<(), Error> {
        if *self == Self::old() {
            self.rename(&Self::own())?;
        }
        Ok(())
    }

    /// Whether it is of this version's layout.
    pub(super) fn is_put_aside(&self) -> bool {
        *self == Self::old()
    }

    fn rename(&self, to: &Self) -> Result<(), Error> {
        fs::rename(&self.path, &to.path).map_err(|source| Error::Pin {
            path: self.path.clone(),
            source,
        })?;
        fault::point(format_args!("put {} aside", self.path.display()));
        Ok(())
    }

    /// From now on it is in use.
    pub(super) fn complete(&self) -> Result<(), Error> {
        remove(&self.path.join(UNFINISHED))
    }

    /// Removes every pin.
    pub(super) fn remove(&self) -> Result<(), Error> {
        // The pins that say that all is there go first, in case this is killed.
        for level in LogLevel::ALL {
            remove(&self.variant(level).join(LAST))?;
        }
        remove(&self.path)
    }
}

/// Where the layouts are.
fn top() -> PathBuf {
    Path::new(BPFFS).join("bpf-bridge")
}

/// What is pinned beside this version's own.
pub(super) enum Other {
    /// An older layout, the newest of them if there are several.
    Older(Root),
    /// One that a newer version made and uses.
    Newer(u32),
}

/// The layout that is pinned besides this version's own, if one is.
pub(super) fn other() -> Result<Option<Other>, Error> {
    let path = top();
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Pin { path, source }),
    };
    let mut older = None;
    for entry in entries {
        let entry = entry.map_err(|source| Error::Pin {
            path: path.clone(),
            source,
        })?;
        let root = Root { path: entry.path() };
        if root == Root::old() {
            return Ok(Some(Other::Older(root)));
        }
        let version = root
            .name()
            .strip_prefix('v')
            .and_then(|number| number.parse().ok());
        match version {
            Some(version) if version > ABI && root.is_complete() => {
                return Ok(Some(Other::Newer(version)));
            }
            Some(version) if version < ABI => older = older.max(Some(version)),
            _ => {}
        }
    }
    Ok(older.map(|version: u32| {
        Other::Older(Root {
            path: path.join(format!("v{version}")),
        })
    }))
}

/// The root of this version's pins.
pub(super) fn root() -> PathBuf {
    Root::own().path
}

/// The pin path of a shared map.
pub(super) fn map(name: &str) -> PathBuf {
    Root::own().map(name)
}

/// The directory of the programs that were loaded for `level`.
pub(super) fn variant(level: LogLevel) -> PathBuf {
    Root::own().variant(level)
}

/// The pin path of a program that translates.
pub(super) fn nat(name: &str) -> PathBuf {
    Root::own().nat(name)
}

/// Where the links of programs that translate are.
pub(super) fn links() -> PathBuf {
    Root::own().link("")
}

/// The pin path of a link.
pub(super) fn link(name: &str) -> PathBuf {
    Root::own().link(name)
}

/// The ifindex of every device that has a pinned link of this kind.
pub(super) fn devices(kind: &str) -> Vec<u32> {
    Root::own().devices(kind)
}

/// Pins with `pin`, in place of what is at `path`: whoever looks finds one or the other.
pub(super) fn replace<E>(path: &Path, pin: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), Error>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    Successor::new(path, pin)?.take_over()
}

/// A pin beside the one whose place it is to take.
pub(super) struct Successor {
    at: PathBuf,
    path: PathBuf,
}

impl Successor {
    /// Pins with `by`.
    pub(super) fn new<E>(
        path: &Path,
        by: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<Self, Error>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let at = Self::beside(path);
        // What a call that was killed has left.
        remove(&at)?;
        pin(&at, by)?;
        Ok(Self {
            at,
            path: path.to_owned(),
        })
    }

    /// Whether one is left of a call that was killed.
    pub(super) fn is_left(path: &Path) -> bool {
        Self::beside(path).exists()
    }

    fn beside(path: &Path) -> PathBuf {
        // bpffs refuses names with dots in them.
        let mut at = path.as_os_str().to_owned();
        at.push("-new");
        at.into()
    }

    /// Takes the place.
    pub(super) fn take_over(self) -> Result<(), Error> {
        let Self { at, path } = self;
        fs::rename(at, &path).map_err(|source| Error::Pin {
            path: path.clone(),
            source,
        })?;
        fault::point(format_args!("replace {}", path.display()));
        Ok(())
    }
}

/// Creates the directories for the programs that translate.
pub(super) fn create_nat() -> Result<(), Error> {
    create(&[nat(""), links()])
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

/// Creates the directory for the maps.
pub(super) fn create_maps() -> Result<(), Error> {
    create(&[map("")])
}

/// Creates the directories for the pins of `level`.
pub(super) fn create_directories(level: LogLevel) -> Result<(), Error> {
    create(&[map(""), variant(level)])
}

fn create(paths: &[PathBuf]) -> Result<(), Error> {
    for path in paths {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| Error::Pin {
                path: path.clone(),
                source,
            })?;
    }
    Ok(())
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
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    let removed = if found.is_dir() {
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

/// Takes the lock of the pins, when they are of this version's layout: an older one is
/// carried over first.
pub(super) fn lock(mode: Mode) -> Result<Lock, Error> {
    loop {
        let lock = lock_any(mode)?;
        if other()?.is_none() {
            return Ok(lock);
        }
        drop(lock);
        carry::settle()?;
    }
}

/// Takes the lock of the pins, of whatever layout they are.
pub(super) fn lock_any(mode: Mode) -> Result<Lock, Error> {
    Ok(Lock::take(Path::new(LOCK), mode)?)
}
