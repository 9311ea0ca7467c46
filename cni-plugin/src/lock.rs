//! File locks with a bounded wait, whose error says who holds them.
//!
//! Whoever needs several takes them in this order: the attachment's
//! ([`crate::attachment`]), the bridge's ([`crate::gateway`]), that of the pins
//! ([`crate::datapath`]), that of what translates ([`crate::datapath::nat`]). The
//! address store's ([`crate::ipam::host_local`]) is held alone, or with the first.
//!
//! A call waits for all of them together no longer than 20 s, and takes back what a failed
//! ADD made with 5 s more ([`allow_for_undoing`]). So whoever hangs delays another call by
//! 25 s at most, however many locks that one needs.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
    sys::stat::{major, minor},
};
use thiserror::Error;

use crate::fault::{self, Kind};

/// How long a call waits for locks that others hold, all in all. Everything that is done
/// under one takes milliseconds, but for the first load of the programs, so a longer
/// wait means that a holder hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it waits at least while it undoes what it has made.
const UNDOING: Duration = Duration::from_secs(5);

/// What is left of this call's patience: a process makes one call.
static CALL: Patience = Patience::new(PATIENCE);

/// Some time to wait in, for one lock after the other.
#[derive(Debug)]
struct Patience(Mutex<Duration>);

impl Patience {
    const fn new(left: Duration) -> Self {
        Self(Mutex::new(left))
    }

    fn left(&self) -> MutexGuard<'_, Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at_least(&self, time: Duration) {
        let mut left = self.left();
        *left = (*left).max(time);
    }

    /// Waits for what comes, while there is time left.
    fn wait<T>(&self, coming: &Receiver<T>) -> Option<T> {
        let limit = *self.left();
        let began = Instant::now();
        let came = coming.recv_timeout(limit);
        let mut left = self.left();
        *left = left.saturating_sub(began.elapsed());
        came.ok()
    }
}

/// Gives the call time to take back what it made, even if it has waited in vain before.
pub fn allow_for_undoing() {
    CALL.at_least(UNDOING);
}

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
    #[error(
        "{path} is locked by {holder}: a call waits for locks no longer than {} s in all",
        PATIENCE.as_secs()
    )]
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

/// How a file that others could have put there is opened: no symbolic link is followed,
/// and nobody need be at the other end of a pipe.
const NO_SURPRISE: i32 = OFlag::O_NOFOLLOW.union(OFlag::O_NONBLOCK).bits();

/// Whether the directory of `path`, which is named after a network, is a symbolic link.
fn leads_elsewhere(path: &Path) -> bool {
    path.parent()
        .and_then(|directory| fs::symlink_metadata(directory).ok())
        .is_some_and(|directory| directory.is_symlink())
}

/// Opens the plain file at `path`, which [`Lock`] made, for reading without its lock.
///
/// # Errors
///
/// What the kernel said, or that it is something else.
pub fn peek(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(NO_SURPRISE)
        .open(path)?;
    if leads_elsewhere(path) || !file.metadata()?.is_file() {
        return Err(Errno::ELOOP.into());
    }
    Ok(file)
}

impl Lock {
    /// Takes the lock at `path`, making the file and its directories if needed.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn take(path: &Path, mode: Mode) -> Result<Self, LockError> {
        loop {
            match Self::open(&CALL, path, mode, true)? {
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
        Self::open(&CALL, path, Mode::Exclusive, false)
    }

    /// The same, without waiting for who holds it.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn try_existing(path: &Path) -> Result<Option<Self>, LockError> {
        let none = Patience::new(Duration::ZERO);
        Self::open(&none, path, Mode::Exclusive, false)
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

    fn open(
        patience: &Patience,
        path: &Path,
        mode: Mode,
        create: bool,
    ) -> Result<Option<Self>, LockError> {
        let error = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        fault::request(Kind::File, format_args!("lock {}", path.display())).map_err(error)?;
        loop {
            if leads_elsewhere(path) {
                return Err(error(Errno::ELOOP.into()));
            }
            let file = match OpenOptions::new()
                .read(true)
                .write(true)
                .create(create)
                .mode(0o600)
                .custom_flags(NO_SURPRISE)
                .open(path)
            {
                Ok(file) => file,
                Err(source) if source.kind() == io::ErrorKind::NotFound => {
                    let Some(directory) = path.parent().filter(|_| create) else {
                        return Ok(None);
                    };
                    DirBuilder::new()
                        .recursive(true)
                        .mode(0o700)
                        .create(directory)
                        .map_err(error)?;
                    continue;
                }
                Err(source) => return Err(error(source)),
            };
            let file = lock_with(patience, file, mode, path)?;
            // The one before may have removed the file: then this is a lock on
            // nothing.
            let own = file.metadata().map_err(error)?;
            if !own.is_file() || own.nlink() > 1 {
                return Err(error(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "not a plain file with one name",
                )));
            }
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

/// Locks an open file, which is at `path` for people.
///
/// # Errors
///
/// [`LockError`].
pub fn lock(file: File, mode: Mode, path: &Path) -> Result<Flock<File>, LockError> {
    lock_with(&CALL, file, mode, path)
}

fn lock_with(
    patience: &Patience,
    file: File,
    mode: Mode,
    path: &Path,
) -> Result<Flock<File>, LockError> {
    let (at_once, in_turn) = match mode {
        Mode::Shared => (FlockArg::LockSharedNonblock, FlockArg::LockShared),
        Mode::Exclusive => (FlockArg::LockExclusiveNonblock, FlockArg::LockExclusive),
    };
    let error = |source| LockError::Io {
        path: path.to_owned(),
        source,
    };
    let file = match Flock::lock(file, at_once) {
        Ok(lock) => return Ok(lock),
        Err((file, Errno::EWOULDBLOCK)) => file,
        Err((_, errno)) => return Err(error(errno.into())),
    };
    let held = || LockError::Held {
        path: path.to_owned(),
        holder: holder(&file).unwrap_or_else(|| "a process that was not found".into()),
    };
    if patience.left().is_zero() {
        return Err(held());
    }
    // Two hundred who look every other millisecond take all of a processor, and on a busy
    // node one of them may never see the lock free. The kernel wakes who waits in the call, but
    // lets him wait for ever: so another thread does, and gives back what nobody wants then.
    let waiting = file.try_clone().map_err(error)?;
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new()
        .spawn(move || sender.send(Flock::lock(waiting, in_turn)))
        .map_err(error)?;
    match patience.wait(&receiver) {
        Some(locked) => locked.map_err(|(_, errno)| error(errno.into())),
        None => Err(held()),
    }
}

/// Who holds the lock, from `/proc/locks`, whose lines end in
/// `PID MAJOR:MINOR:INODE START END`.
fn holder(file: &File) -> Option<String> {
    let file = file.metadata().ok()?;
    let device = (major(file.dev()), minor(file.dev()));
    let inode = format!(":{}", file.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let candidates: Vec<(&str, bool)> = locks
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [.., pid, place, _, _] = words.as_slice() else {
                return None;
            };
            let exact = *place == format!("{:02x}:{:02x}{inode}", device.0, device.1);
            (words.contains(&"FLOCK") && !words.contains(&"->") && place.ends_with(&inode))
                .then_some((*pid, exact))
        })
        .collect();
    // Some file systems tell another device than the kernel counts their locks by.
    let (pid, _) = candidates
        .iter()
        .find(|(_, exact)| *exact)
        .or(candidates.first())?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", name.trim_end()))
}

#[cfg(test)]
mod tests {
    use nix::sys::resource::{UsageWho, getrusage};

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
    fn who_waits_is_woken_and_does_not_keep_looking() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let held = Lock::take(&path, Mode::Exclusive).unwrap();
        let waiting = thread::spawn(move || {
            let lock = Lock::take(&path, Mode::Exclusive);
            let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
            lock.map(|_| usage.voluntary_context_switches())
        });
        thread::sleep(Duration::from_millis(500));
        drop(held);
        let looked = waiting.join().unwrap().unwrap();
        assert!(looked < 50, "{looked} times");
    }

    #[test]
    fn a_lock_that_comes_too_late_is_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let held = Lock::take(&path, Mode::Exclusive).unwrap();
        let patience = Patience::new(Duration::from_millis(20));
        let file = File::open(&path).unwrap();
        lock_with(&patience, file, Mode::Exclusive, &path).unwrap_err();
        drop(held);
        // Now the one comes that nobody waits for any longer.
        thread::sleep(Duration::from_millis(100));
        drop(Lock::take(&path, Mode::Exclusive).unwrap());
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
        let lock = Lock::take(&path, Mode::Exclusive).unwrap();
        let name = holder(lock.file()).unwrap();
        assert!(name.contains(&std::process::id().to_string()), "{name}");
    }

    #[test]
    fn a_call_is_patient_once_and_not_once_for_each_lock() {
        let directory = tempfile::tempdir().unwrap();
        let open = |name: &str| File::create(directory.path().join(name)).unwrap();
        let held: Vec<_> = ["a", "b", "c"]
            .map(|name| Lock::take(&directory.path().join(name), Mode::Exclusive).unwrap())
            .into();
        let patience = Patience::new(Duration::from_millis(200));
        let began = Instant::now();
        for name in ["a", "b", "c"] {
            let error =
                lock_with(&patience, open(name), Mode::Exclusive, Path::new(name)).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, LockError::Held { .. }), "{text}");
            assert!(text.contains(&std::process::id().to_string()), "{text}");
        }
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(200), "{took:?}");
        assert!(took < Duration::from_millis(550), "{took:?}");
        // What it undoes may take a little longer.
        patience.at_least(Duration::from_secs(60));
        let waiting = thread::spawn({
            let (file, path) = (open("a"), directory.path().join("a"));
            move || lock_with(&patience, file, Mode::Exclusive, &path).map(drop)
        });
        thread::sleep(Duration::from_millis(20));
        drop(held);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn what_is_not_a_file_of_its_own_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("real")).unwrap();
        fs::write(at("other"), "kept").unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::hard_link(at("other"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("real"), at("network")).unwrap();
        for name in ["pipe", "hard", "network/lock", "real"] {
            let began = Instant::now();
            Lock::take(&at(name), Mode::Exclusive).unwrap_err();
            assert!(peek(&at(name)).is_err() || name == "hard", "{name}");
            assert!(began.elapsed() < PATIENCE / 4, "{name}");
        }
        assert_eq!(fs::read_dir(at("real")).unwrap().count(), 0);
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
