//! Faults on purpose: where a call can be killed, and what can be made to fail.
//!
//! [`point`] stands after everything that changes something outside of this process, and
//! [`request`] before everything that asks something of the kernel and may be refused.
//! Both stand where the request itself is made, and not where it is asked for, so that
//! whatever is written later has its faults too. They do nothing unless the feature
//! `faults` is on, which is for tests alone; then [`VARIABLE`] says what is to happen:
//!
//! | value | |
//! |---|---|
//! | `list:FILE` | the name of each point and each request is added to FILE, as it is passed |
//! | `kill:N` | the process is killed at the N-th point |
//! | `fail:KIND:N:ERRNO` | the N-th request of that kind fails, with that error number |
//! | `fail:KIND:N+:ERRNO` | and so do all that follow |

use std::{fmt, io, path::PathBuf};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of netlink: devices, addresses, routes, classifiers, sockets, netfilter.
    Netlink,
    /// Of bpf(2): entries of maps, programs and pins.
    Bpf,
    /// Of a file system: records, locks, leases, settings.
    File,
}

/// Something outside of this process was changed, or will be unless it dies here.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_: impl fmt::Display) {}

/// Pins by `work` what is not there yet of these paths. There is a point after each of
/// them, which shows what a kill between two pins would: the later ones do not exist.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn pins<T>(_: impl FnOnce() -> Vec<PathBuf>, work: impl FnOnce() -> T) -> T {
    work()
}

/// Something is about to be asked for.
///
/// # Errors
///
/// It is to fail.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn request(_: Kind, _: impl fmt::Display) -> io::Result<()> {
    Ok(())
}

#[cfg(feature = "faults")]
pub use armed::{VARIABLE, arm, pins, point, request};

#[cfg(feature = "faults")]
mod armed {
    use std::{
        fs::{self, File, OpenOptions},
        ops::RangeInclusive,
        sync::{
            OnceLock,
            atomic::{AtomicU64, Ordering},
        },
        thread,
        time::Duration,
    };

    use nix::sys::signal::{Signal, raise};

    use super::{Kind, PathBuf, fmt, io};

    /// The environment variable that says what is to happen.
    pub const VARIABLE: &str = "BPF_BRIDGE_FAULT";

    #[derive(Debug)]
    enum Plan {
        List(File),
        Kill(u64),
        Fail(Kind, RangeInclusive<u64>, i32),
    }

    static PLAN: OnceLock<Plan> = OnceLock::new();
    /// How many points were passed, or requests of the kind that is to fail.
    static PASSED: AtomicU64 = AtomicU64::new(0);

    /// Says what is to happen, in the form of [`VARIABLE`].
    ///
    /// # Errors
    ///
    /// It is not understood.
    pub fn arm(text: &str) -> Result<(), String> {
        let plan = parse(text)
            .ok_or_else(|| format!("{VARIABLE}={text} is neither list:, kill: nor fail:"))?;
        // Whoever came first is right.
        let _ = PLAN.set(plan);
        Ok(())
    }

    fn parse(text: &str) -> Option<Plan> {
        match text.split_once(':')? {
            ("list", path) => {
                let file = OpenOptions::new().append(true).create(true).open(path);
                Some(Plan::List(file.ok()?))
            }
            ("kill", number) => Some(Plan::Kill(number.parse().ok()?)),
            ("fail", what) => {
                let [kind, number, errno] = *what.split(':').collect::<Vec<_>>() else {
                    return None;
                };
                let kind = match kind {
                    "netlink" => Kind::Netlink,
                    "bpf" => Kind::Bpf,
                    "file" => Kind::File,
                    _ => return None,
                };
                let numbers = match number.strip_suffix('+') {
                    Some(first) => first.parse().ok()?..=u64::MAX,
                    None => number.parse().ok()?..=number.parse().ok()?,
                };
                Some(Plan::Fail(kind, numbers, errno.parse().ok()?))
            }
            _ => None,
        }
    }

    fn count() -> u64 {
        PASSED.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Something outside of this process was changed, or will be unless it dies here.
    pub fn point(what: impl fmt::Display) {
        pass(what, || ());
    }

    /// Pins by `work` what is not there yet of these paths. There is a point after each of
    /// them, which shows what a kill between two pins would: the later ones do not exist.
    pub fn pins<T>(paths: impl FnOnce() -> Vec<PathBuf>, work: impl FnOnce() -> T) -> T {
        let mut new = paths();
        new.retain(|path| !path.exists());
        let done = work();
        for (number, path) in (1..).zip(&new) {
            pass(format_args!("pin {}", path.display()), || {
                for later in &new[number..] {
                    let _ = fs::remove_file(later);
                }
            });
        }
        done
    }

    /// A point, with what is to be done before the end.
    fn pass(what: impl fmt::Display, last: impl FnOnce()) {
        match PLAN.get() {
            Some(Plan::List(file)) => note(file, format_args!("point {what}\n")),
            Some(Plan::Kill(number)) if count() == *number => {
                note(io::stderr(), format_args!("fault: killed at {what}\n"));
                last();
                let _ = raise(Signal::SIGKILL);
                // Other threads may run until the signal is seen; this one does not.
                loop {
                    thread::sleep(Duration::MAX);
                }
            }
            _ => {}
        }
    }

    /// Something is about to be asked for.
    ///
    /// # Errors
    ///
    /// It is to fail.
    pub fn request(kind: Kind, what: impl fmt::Display) -> io::Result<()> {
        match PLAN.get() {
            Some(Plan::List(file)) => {
                note(file, format_args!("{kind:?} {what}\n"));
                Ok(())
            }
            Some(Plan::Fail(wanted, numbers, errno))
                if *wanted == kind && numbers.contains(&count()) =>
            {
                note(io::stderr(), format_args!("fault: failed {what}\n"));
                Err(io::Error::from_raw_os_error(*errno))
            }
            _ => Ok(()),
        }
    }

    fn note(mut to: impl io::Write, what: fmt::Arguments<'_>) {
        // In one write, so that others may write to it as well.
        let _ = to.write_all(what.to_string().as_bytes());
    }
}
