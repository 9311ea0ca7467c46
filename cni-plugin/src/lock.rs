//! File locks with a bounded wait, whose error says who holds them.
//!
//! Whoever needs several takes them in this order: the attachment's
//! ([`crate::attachment`]), the bridge's ([`crate::gateway`]), that of the pins
//! ([`crate::datapath`]).

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
};
use thiserror::Error;

use crate::fault::{self, Kind};

/// How long a call waits for another that holds a lock. Everything that is done
/// under one takes milliseconds, so a longer wait means that the holder hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it looks again.
const INTERVAL: Duration = Duration::from_millis(2);

/// Why a lock was not taken.
#[derive(Debug, Error)]
pub enum LockError {
    /// The file could not be made, opened or locked.
    #[error("locking {path}: {source}")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else holds it for too long.
    #[error("{path} has been locked for {} s by {holder}", PATIENCE.as_secs())]
    Held {
        /// The lock file.
        path: PathBuf,
        /// The process, if it could be found.
        holder: String,
    },
}

/// Whether others may hold the lock at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Others may, shared as well.
    Shared,
    /// Nobody.
    Exclusive,
}

/// A lock that is held until it is dropped, or its holder dies.
#[derive(Debug)]
pub struct Lock {
    file: Flock<File>,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock at `path`, making the file and its directories if needed.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn take(path: &Path, mode: Mode) -> Result<Self, LockError> {
        loop {
            match Self::open(path, mode, true)? {
                Some(lock) => return Ok(lock),
                // Its directory vanished before it was opened.
                None => continue,
            }
        }
    }

    /// Takes the lock at `path` if the file exists.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn take_existing(path: &Path) -> Result<Option<Self>, LockError> {
        Self::open(path, Mode::Exclusive, false)
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Removes the file, and its directory if that is empty then.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn remove(self) -> io::Result<()> {
        let path = self.path.display();
        fault::request(Kind::File, format_args!("remove {path}"))?;
        fs::remove_file(&self.path)?;
        fault::point(format_args!("remove {path}"));
        if let Some(directory) = self.path.parent() {
            // Others are in it: it stays.
            let _ = fs::remove_dir(directory);
        }
        Ok(())
    }

    fn open(path: &Path, mode: Mode, create: bool) -> Result<Option<Self>, LockError> {
        let error = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        let deadline = Instant::now() + PATIENCE;
        fault::request(Kind::File, format_args!("lock {}", path.display())).map_err(error)?;
        loop {
            if create && let Some(directory) = path.parent() {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(directory)
                    .map_err(error)?;
            }
            let file = match OpenOptions::new()
                .read(true)
                .write(true)
                .create(create)
                .mode(0o600)
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .open(path)
            {
                Ok(file) => file,
                Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(source) => return Err(error(source)),
            };
            let file = wait(file, mode, deadline).map_err(|errno| {
                if errno == Errno::EWOULDBLOCK {
                    LockError::Held {
                        path: path.to_owned(),
                        holder: holder(path)
                            .unwrap_or_else(|| "a process that was not found".to_owned()),
                    }
                } else {
                    error(errno.into())
                }
            })?;
            // The one before may have removed the file: then this is a lock on
            // nothing.
            let own = file.metadata().map_err(error)?;
            match fs::symlink_metadata(path) {
                Ok(there) if (there.dev(), there.ino()) == (own.dev(), own.ino()) => {
                    fault::point(format_args!("lock {}", path.display()));
                    return Ok(Some(Self {
                        file,
                        path: path.to_owned(),
                    }));
                }
                Ok(_) => {}
                Err(source) if source.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(error(source)),
            }
        }
    }
}

fn wait(mut file: File, mode: Mode, deadline: Instant) -> Result<Flock<File>, Errno> {
    let how = match mode {
        Mode::Shared => FlockArg::LockSharedNonblock,
        Mode::Exclusive => FlockArg::LockExclusiveNonblock,
    };
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((_, errno)) if errno != Errno::EWOULDBLOCK && errno != Errno::EINTR => {
                return Err(errno);
            }
            Err((_, errno)) if Instant::now() >= deadline => return Err(errno),
            Err((unlocked, _)) => file = unlocked,
        }
        thread::sleep(INTERVAL);
    }
}

/// Who holds the lock, from `/proc/locks`, whose lines end in
/// `PID MAJOR:MINOR:INODE START END`.
fn holder(path: &Path) -> Option<String> {
    let inode = format!(":{}", fs::metadata(path).ok()?.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [.., pid, file, _, _] = words.as_slice() else {
            return None;
        };
        (words.contains(&"FLOCK") && !words.contains(&"->") && file.ends_with(&inode))
            .then_some(*pid)
    })?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", name.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_share_and_one_excludes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/lock");
        let one = Lock::take(&path, Mode::Shared).unwrap();
        let two = Lock::take(&path, Mode::Shared).unwrap();
        drop((one, two));
        let alone = Lock::take(&path, Mode::Exclusive).unwrap();
        let waiting = thread::spawn({
            let path = path.clone();
            move || Lock::take(&path, Mode::Exclusive).map(|_| Instant::now())
        });
        thread::sleep(Duration::from_millis(50));
        let released = Instant::now();
        drop(alone);
        assert!(waiting.join().unwrap().unwrap() >= released);
    }

    #[test]
    fn a_removed_lock_protects_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("network/lock");
        let first = Lock::take(&path, Mode::Exclusive).unwrap();
        let second = thread::spawn({
            let path = path.clone();
            move || Lock::take(&path, Mode::Exclusive)
        });
        thread::sleep(Duration::from_millis(30));
        first.remove().unwrap();
        let second = second.join().unwrap().unwrap();
        // It holds the file that is at the path now.
        assert_eq!(
            second.file().metadata().unwrap().ino(),
            fs::metadata(&path).unwrap().ino()
        );
        second.remove().unwrap();
        assert!(!path.parent().unwrap().exists());
        assert!(Lock::take_existing(&path).unwrap().is_none());
    }

    #[test]
    fn the_holder_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let _lock = Lock::take(&path, Mode::Exclusive).unwrap();
        let name = holder(&path).unwrap();
        assert!(name.contains(&std::process::id().to_string()), "{name}");
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &path).unwrap();
        Lock::take(&path, Mode::Exclusive).unwrap_err();
        assert!(!directory.path().join("elsewhere").exists());
    }
}
