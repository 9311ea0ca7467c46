//! Work on the entries of one directory, through its descriptor.
//!
//! Names are never resolved further than to an entry of this directory: no symbolic
//! link is followed, and what is created did not exist before.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, Metadata},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat, renameat},
    sys::{
        stat::{Mode, SFlag, fstatat, futimens},
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime},
    unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat},
};

use super::store::StoreError;
use crate::fault::{self, Kind};

/// Of a file that is read whole, no more than this is read, in bytes. A lease is a
/// container id and an interface name.
const READ_MAX: u64 = 4096;

/// What a draft is called where the file system has no nameless files.
const DRAFT: &str = ".bpf-bridge.draft";

/// When something was last changed: seconds and nanoseconds since 1970.
///
/// Only ever compared for equality.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp(i64, i64);

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self(metadata.mtime(), metadata.mtime_nsec())
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (seconds, nanoseconds) = text.split_once('.')?;
        Some(Self(seconds.parse().ok()?, nanoseconds.parse().ok()?))
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:09}", self.0, self.1)
    }
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

/// A file that is whole before it has a name.
#[derive(Debug)]
pub(super) struct Draft {
    file: File,
    named: bool,
}

impl Draft {
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn into_file(self) -> File {
        self.file
    }
}

impl Directory {
    /// Opens the directory; none if it does not exist. A symbolic link is none: only
    /// what is above it may be reached by one.
    pub(super) fn open(path: PathBuf) -> Result<Option<Self>, StoreError> {
        step();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(AT_FDCWD, &path, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(StoreError::io("opening the directory", path, errno)),
        }
    }

    /// Opens the directory; it and those above it are made if they do not exist.
    pub(super) fn create(path: PathBuf, mode: u32) -> Result<Self, StoreError> {
        if let Some(directory) = Self::open(path.clone())? {
            return Ok(directory);
        }
        step();
        let built = fault::request(Kind::File, path.display())
            .and_then(|()| DirBuilder::new().recursive(true).mode(mode).create(&path));
        built.map_err(|error| StoreError::io("creating the directory", path.clone(), error))?;
        fault::point(format_args!("create {}", path.display()));
        let gone = || StoreError::io("opening the directory", path.clone(), Errno::ENOENT);
        Self::open(path.clone())?.ok_or_else(gone)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn error(
        &self,
        action: &'static str,
        name: &(impl AsRef<Path> + ?Sized),
        source: impl Into<io::Error>,
    ) -> StoreError {
        StoreError::io(action, self.path.join(name), source)
    }

    /// Opens a file for both ways, making it if need be.
    pub(super) fn open_file(&self, name: &str) -> Result<File, StoreError> {
        mutation(self, name)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&self.fd, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map(File::from)
            .map_err(|errno| self.error("opening", name, errno))?;
        self.changed("open", name);
        Ok(file)
    }

    /// The same of a file that is written to: whatever else has the name makes way for
    /// it. A file with further names is not this directory's alone.
    pub(super) fn open_own_file(&self, name: &str) -> Result<File, StoreError> {
        let file = self.open_file(name)?;
        let failed = |error| self.error("looking at", name, error);
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_file() && metadata.nlink() == 1 {
            return Ok(file);
        }
        self.unlink(name)?;
        self.open_file(name)
    }

    /// Writes to the beginning of a file that was opened under this name.
    pub(super) fn write(&self, name: &str, file: &File, text: &str) -> Result<(), StoreError> {
        mutation(self, name)?;
        file.write_all_at(text.as_bytes(), 0)
            .map_err(|error| self.error("writing", name, error))?;
        self.changed("write", name);
        Ok(())
    }

    /// Ends it after so many bytes.
    pub(super) fn cut(&self, name: &str, file: &File, length: usize) -> Result<(), StoreError> {
        mutation(self, name)?;
        file.set_len(length as u64)
            .map_err(|error| self.error("cutting", name, error))?;
        self.changed("cut", name);
        Ok(())
    }

    fn changed(&self, action: &str, name: &str) {
        fault::point(format_args!("{action} {}", self.path.join(name).display()));
    }

    /// Opens what is there for reading; none if there is nothing, [`Errno::ELOOP`] for a
    /// symbolic link. Does not wait for the other end of a pipe.
    pub(super) fn open_existing(&self, name: &str) -> Result<Option<File>, Errno> {
        step();
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(fd.into())),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Whether an entry is a file without content; none if there is nothing.
    pub(super) fn is_empty_file(&self, name: &str) -> Result<Option<bool>, StoreError> {
        step();
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
                Ok(Some(kind == SFlag::S_IFREG && stat.st_size == 0))
            }
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.error("looking for", name, errno)),
        }
    }

    /// The names of all entries, in no order.
    pub(super) fn names(&self) -> Result<Vec<OsString>, StoreError> {
        step();
        let listing = fs::read_dir(format!("/proc/self/fd/{}", self.fd.as_raw_fd()));
        listing
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
            .map_err(|error| StoreError::io("listing the directory", self.path.clone(), error))
    }

    /// Starts a file that appears under its names only when it is whole.
    pub(super) fn draft(&self, content: &[u8]) -> Result<Draft, StoreError> {
        mutation(self, DRAFT)?;
        let flags = OFlag::O_WRONLY | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
        match openat(&self.fd, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(fd) => self.fill(
                Draft {
                    file: fd.into(),
                    named: false,
                },
                content,
            ),
            // What file systems and kernels without O_TMPFILE say.
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => {
                self.named_draft(content)
            }
            Err(errno) => Err(self.error("creating a file in", "", errno)),
        }
    }

    /// The same for file systems without nameless files (NFS, 9p, older overlayfs).
    pub(super) fn named_draft(&self, content: &[u8]) -> Result<Draft, StoreError> {
        self.unlink(DRAFT)?;
        mutation(self, DRAFT)?;
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&self.fd, DRAFT, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map(File::from)
            .map_err(|errno| self.error("creating", DRAFT, errno))?;
        self.changed("create", DRAFT);
        self.fill(Draft { file, named: true }, content)
    }

    fn fill(&self, draft: Draft, content: &[u8]) -> Result<Draft, StoreError> {
        use std::io::Write as _;

        step();
        (&draft.file)
            .write_all(content)
            .map_err(|error| self.error("writing a file in", "", error))?;
        Ok(draft)
    }

    /// Puts the content of a draft on the disk.
    pub(super) fn sync_draft(&self, draft: &Draft) -> Result<(), StoreError> {
        step();
        let synced = draft.file.sync_all();
        synced.map_err(|error| self.error("syncing a file in", "", error))
    }

    /// Gives the draft a (further) name, which nothing has yet.
    pub(super) fn publish(&self, draft: &Draft, name: &str) -> Result<(), StoreError> {
        mutation(self, name)?;
        let linked = if draft.named {
            linkat(&self.fd, DRAFT, &self.fd, name, AtFlags::empty())
        } else {
            // The way that needs no capability, see open(2).
            let path = format!("/proc/self/fd/{}", draft.file.as_raw_fd());
            linkat(AT_FDCWD, &*path, &self.fd, name, AtFlags::AT_SYMLINK_FOLLOW)
        };
        linked.map_err(|errno| self.error("creating", name, errno))?;
        self.changed("publish", name);
        Ok(())
    }

    /// Takes away the name that a draft has where it cannot be without one.
    pub(super) fn settle(&self, draft: &Draft) -> Result<(), StoreError> {
        if draft.named {
            self.unlink(DRAFT)?;
        }
        Ok(())
    }

    /// Removes an entry; nothing there is no error.
    pub(super) fn unlink(&self, name: &str) -> Result<(), StoreError> {
        mutation(self, name)?;
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => {
                self.changed("remove", name);
                Ok(())
            }
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(self.error("removing", name, errno)),
        }
    }

    /// The text of a symbolic link; none if there is nothing, or no such text.
    pub(super) fn read_link(&self, name: &str) -> Result<Option<String>, StoreError> {
        step();
        match readlinkat(&self.fd, name) {
            Ok(text) => Ok(text.into_string().ok()),
            // EINVAL: not a symbolic link.
            Err(Errno::ENOENT | Errno::EINVAL) => Ok(None),
            Err(errno) => Err(self.error("reading", name, errno)),
        }
    }

    /// Writes a symbolic link in place of whatever had its name.
    pub(super) fn write_link(&self, name: &str, text: &str) -> Result<(), StoreError> {
        const NEW: &str = "new";
        mutation(self, name)?;
        match symlinkat(text, &self.fd, name) {
            Ok(()) => {
                self.changed("link", name);
                return Ok(());
            }
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(self.error("creating", name, errno)),
        }
        self.unlink(NEW)?;
        mutation(self, NEW)?;
        symlinkat(text, &self.fd, NEW).map_err(|errno| self.error("creating", NEW, errno))?;
        self.changed("link", NEW);
        mutation(self, name)?;
        renameat(&self.fd, NEW, &self.fd, name)
            .map_err(|errno| self.error("replacing", name, errno))?;
        self.changed("replace", name);
        Ok(())
    }

    /// Puts what was done to the entries on the disk.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        step();
        nix::unistd::fsync(&self.fd)
            .map_err(|errno| StoreError::io("syncing the directory", self.path.clone(), errno))
    }

    /// When entries were last added or removed.
    pub(super) fn modified(&self) -> Result<Stamp, StoreError> {
        step();
        nix::sys::stat::fstat(self.fd.as_fd())
            .map(|stat| Stamp(stat.st_mtime, stat.st_mtime_nsec))
            .map_err(|errno| StoreError::io("looking at", self.path.clone(), errno))
    }

    /// Sets the time of the last change to now, to the nanosecond, and returns it, or
    /// nothing if the file system does not keep it to the nanosecond.
    pub(super) fn touch(&self) -> Result<Option<Stamp>, StoreError> {
        mutation(self, "")?;
        let failed = |errno| StoreError::io("touching", self.path.clone(), errno);
        let now = clock_gettime(ClockId::CLOCK_REALTIME).map_err(failed)?;
        futimens(&self.fd, &TimeSpec::UTIME_OMIT, &now).map_err(failed)?;
        self.changed("touch", "");
        let set = Stamp(now.tv_sec(), now.tv_nsec());
        Ok((self.modified()? == set).then_some(set))
    }
}

/// The content of an open file, as far as it is of interest.
pub(super) fn read_all(file: &File) -> io::Result<Vec<u8>> {
    step();
    let mut content = Vec::new();
    file.take(READ_MAX).read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(not(test))]
fn step() {}

#[cfg(not(test))]
fn mutation(directory: &Directory, name: &str) -> Result<(), StoreError> {
    let path = directory.path.join(name);
    fault::request(Kind::File, path.display())
        .map_err(|error| StoreError::io("changing", path, error))
}

#[cfg(test)]
pub(super) use instrumented::{crash_after, steps};
#[cfg(test)]
use instrumented::{mutation, step};

/// Counts the steps of this thread, and plays a process that dies before a step.
#[cfg(test)]
mod instrumented {
    use std::cell::Cell;

    use nix::errno::Errno;

    use super::{Directory, StoreError};

    thread_local! {
        static STEPS: Cell<u64> = const { Cell::new(0) };
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// How many steps this thread made so far.
    pub(in super::super) fn steps() -> u64 {
        STEPS.get()
    }

    /// Lets so many changes happen and no more, until called again.
    pub(in super::super) fn crash_after(changes: Option<u32>) {
        LEFT.set(changes);
    }

    pub(super) fn step() {
        STEPS.set(STEPS.get() + 1);
    }

    pub(super) fn mutation(directory: &Directory, name: &str) -> Result<(), StoreError> {
        step();
        match LEFT.get() {
            Some(0) => Err(directory.error("crashing before", name, Errno::EOWNERDEAD)),
            Some(left) => {
                LEFT.set(Some(left - 1));
                Ok(())
            }
            None => Ok(()),
        }
    }
}
