//! The embedded object: read, verified by the kernel and pinned, once a boot.

use aya::{
    EbpfLoader,
    maps::{MapData, MapError, PerCpuHashMap, PerCpuValues, ProgramArray},
    programs::SchedClassifier,
    util::nr_cpus,
};
use bpf_bridge_common::layout::{PROGRAM_FLOOD, PROGRAM_GUARD, PROGRAM_RESPONDER, PortStats};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{Error, LogLevel, Wire, failed, nat, pins};

/// The programs, compiled by the build script.
pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bpf-bridge-datapath"));

/// The programs that translate.
pub(super) static NAT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bpf-bridge-nat"));

/// The maps that all log levels share.
const SHARED: [&str; 8] = [
    "PORTS",
    "STATS",
    "ENDPOINTS",
    "NEIGHBORS",
    "LEARNED",
    "SEGMENTS",
    "MEMBERS",
    "AYA_LOGS",
];

/// The programs, and the slots under which others call them.
pub(super) const PROGRAMS: [(&str, Option<u32>); 4] = [
    ("flood", Some(PROGRAM_FLOOD)),
    ("responder", Some(PROGRAM_RESPONDER)),
    ("guard", Some(PROGRAM_GUARD)),
    // The last one: its pin says that all is there.
    ("port", None),
];

/// Lets the kernel verify the programs without pinning anything: what STATUS
/// asks before the first ADD.
///
/// # Errors
///
/// [`Error::Load`] or [`Error::Program`], with what the kernel refused.
pub fn verify() -> Result<(), Error> {
    let mut ebpf = loader()
        .override_global("AYA_LOG_LEVEL", &LogLevel::Off.number(), false)
        .load(OBJECT)?;
    for (name, _) in PROGRAMS {
        load_program(&mut ebpf, name)?;
    }
    Ok(())
}

/// A loader that has not read the type information of the whole kernel.
///
/// The programs need none of it, but aya 0.14 reads it when a loader is made,
/// before it can be told not to: memory and time for nothing. While no file can be
/// opened it goes on without. No other thread runs that could want to.
pub(super) fn loader<'a>() -> EbpfLoader<'a> {
    let limit = Resource::RLIMIT_NOFILE;
    let Ok((soft, hard)) = getrlimit(limit) else {
        return EbpfLoader::new();
    };
    // A process may always lower its soft limit, and raise it up to the hard one.
    let _ = setrlimit(limit, 0, hard);
    let loader = EbpfLoader::new();
    let _ = setrlimit(limit, soft, hard);
    loader
}

/// Loads the programs for `level` and pins everything. The lock of the pins is
/// held alone.
pub(super) fn load(level: LogLevel) -> Result<(), Error> {
    pins::create_directories(level)?;
    let variant = pins::variant(level);
    let number = level.number();
    let mut loader = loader();
    loader.override_global("AYA_LOG_LEVEL", &number, false);
    for name in SHARED {
        loader.map_pin_path(name, pins::map(name));
    }
    loader.map_pin_path("PROGRAMS", variant.join("PROGRAMS"));
    let mut ebpf = loader.load(OBJECT)?;
    count_strangers()?;
    let mut calls = match ebpf.take_map("PROGRAMS").map(ProgramArray::try_from) {
        Some(Ok(calls)) => calls,
        Some(Err(source)) => return Err(failed("opening", "PROGRAMS", &"", source)),
        None => {
            return Err(failed(
                "opening",
                "PROGRAMS",
                &"",
                MapError::ElementNotFound,
            ));
        }
    };
    nat::fill_slots(level)?;
    for (name, slot) in PROGRAMS {
        let program = load_program(&mut ebpf, name)?;
        if let Some(slot) = slot {
            let fd = program
                .fd()
                .map_err(|source| Error::program(name, source))?;
            calls
                .set(slot, fd, 0)
                .map_err(|source| failed("writing", "PROGRAMS", &slot, source))?;
        }
        let path = variant.join(name);
        // What a load that was killed has left.
        let _ = std::fs::remove_file(&path);
        program.pin(&path).map_err(|source| Error::Pin {
            path,
            source: std::io::Error::other(source),
        })?;
    }
    Ok(())
}

pub(super) fn load_program<'a>(
    ebpf: &'a mut aya::Ebpf,
    name: &str,
) -> Result<&'a mut SchedClassifier, Error> {
    let program = classifier(ebpf, name)?;
    program
        .load()
        .map_err(|source| Error::program(name, source))?;
    Ok(program)
}

/// A program of tc hooks, loaded or not.
pub(super) fn classifier<'a>(
    ebpf: &'a mut aya::Ebpf,
    name: &str,
) -> Result<&'a mut SchedClassifier, Error> {
    ebpf.program_mut(name)
        .ok_or(aya::programs::ProgramError::NotLoaded)
        .and_then(|program| program.try_into())
        .map_err(|source| Error::program(name, source))
}

/// The entry in which frames from devices that are no ports are counted.
fn count_strangers() -> Result<(), Error> {
    let path = pins::map("STATS");
    let mut stats: PerCpuHashMap<_, u32, Wire<PortStats>> = MapData::from_pin(path)
        .and_then(aya::maps::Map::from_map_data)
        .and_then(PerCpuHashMap::try_from)
        .map_err(|source| super::foreign("STATS", &source))?;
    nr_cpus()
        .map_err(|(_, source)| MapError::IoError(source))
        .and_then(|cpus| {
            PerCpuValues::try_from(vec![Wire(PortStats::default()); cpus])
                .map_err(MapError::IoError)
        })
        .and_then(|zero| stats.insert(0, zero, super::ANY))
        .map_err(|source| failed("writing", "STATS", &0, source))
}
