//! `bpf-bridge log`: shows what the programs write to their log, as it comes.
//!
//! Only the programs of networks with a `logLevel` write anything. There is one
//! log for all of them, and one reader gets each record.

use std::{
    io::{self, Write},
    os::fd::AsFd as _,
    sync::Mutex,
};

use aya::programs::ProgramError;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;

use crate::{
    cni::config::LogLevel,
    datapath::{self, Datapath},
};

/// Why the log cannot be shown.
#[derive(Debug, Error)]
pub enum FollowError {
    /// The datapath cannot be opened.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// No network logs.
    #[error(
        "no programs that log are loaded: give a network the `logLevel` debug (each drop) or \
         trace (each frame), and attach a pod to it"
    )]
    NoLog,
    /// The log cannot be read.
    #[error("opening the log of the programs: {0}")]
    Open(#[from] aya_log::Error),
    /// Waiting for records failed.
    #[error("waiting for the log of the programs: {0}")]
    Wait(#[from] nix::Error),
    /// The program's id cannot be read.
    #[error("asking for the id of the programs: {0}")]
    Program(#[from] ProgramError),
}

/// Writes each record to `out` as one line, until the process is ended or nobody
/// reads any more.
///
/// # Errors
///
/// [`FollowError`].
pub fn run(out: &mut (impl Write + Send)) -> Result<(), FollowError> {
    let datapath = Datapath::open()?.ok_or(FollowError::NoLog)?;
    let program = LogLevel::ALL
        .into_iter()
        .filter(|level| *level != LogLevel::Off)
        .find_map(|level| datapath.program_id(level).ok())
        .ok_or(FollowError::NoLog)?;
    // An operator who watches must not keep others from removing the pins.
    drop(datapath);
    let printer = Printer {
        out: Mutex::new((out, Ok(()))),
    };
    let mut log = EbpfLogger::init_from_id_with_logger(program, &printer)?;
    loop {
        log.flush();
        if printer.is_closed() {
            return Ok(());
        }
        poll(
            &mut [PollFd::new(log.as_fd(), PollFlags::POLLIN)],
            PollTimeout::NONE,
        )?;
    }
}

/// Writes records as lines, and remembers when that fails.
struct Printer<'a, W> {
    out: Mutex<(&'a mut W, io::Result<()>)>,
}

impl<W> Printer<'_, W> {
    fn is_closed(&self) -> bool {
        self.out.lock().is_ok_and(|out| out.1.is_err())
    }
}

impl<W: Write + Send> Log for Printer<'_, W> {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if let Ok(mut out) = self.out.lock() {
            let (writer, state) = &mut *out;
            if state.is_ok() {
                *state = writeln!(writer, "{:5} {}", record.level(), record.args())
                    .and_then(|()| writer.flush());
            }
        }
    }

    fn flush(&self) {}
}
