//! The embedded object: read, verified by the kernel and pinned, once a boot.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, PerCpuHashMap, PerCpuValues, ProgramArray},
    programs::{ProgramError, SchedClassifier},
    util::nr_cpus,
};
use aya_obj::{Object, maps::BtfMapDef};
use bpf_bridge_common::layout::{PROGRAM_FLOOD, PROGRAM_GUARD, PROGRAM_RESPONDER, PortStats};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{
    Error, LogLevel, Wire,
    bpf::{self, AnyMap, Of},
    change, failed, nat, pins,
    shape::{Btf, Shape},
};
use crate::{fault, node::Limits};

/// The programs, compiled by the build script.
pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bpf-bridge-datapath"));

/// The programs that translate.
pub(super) static NAT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bpf-bridge-nat"));

/// The map by which the programs write their log.
pub(super) const LOG: &str = "AYA_LOGS";
/// The maps that all log levels share.
pub(super) const SHARED: [&str; 9] = [
    "PORTS",
    "STATS",
    "ENDPOINTS",
    "NEIGHBORS",
    "LEARNED",
    "LEARNED_PLACES",
    "SEGMENTS",
    "MEMBERS",
    LOG,
];

/// How often the verifier is asked again that was interrupted.
const INTERRUPTIONS: u32 = 100;

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
    let mut ebpf = loader(&Limits::read()?)?
        .override_global("AYA_LOG_LEVEL", &LogLevel::Off.number(), false)
        .load(OBJECT)?;
    for (name, _) in PROGRAMS {
        load_program(&mut ebpf, name)?;
    }
    Ok(())
}

/// A loader that makes tables as large as `limits` has them. Those that are pinned
/// already stay as they are.
///
/// What it makes of the objects depends on what the kernel can do, which is asked once a
/// process, by programs of its own. One that is stopped at that moment takes the
/// interruption for a no: its programs would have no names, or no constants.
pub(super) fn loader<'a>(limits: &'a Limits) -> Result<EbpfLoader<'a>, Error> {
    let can = aya::features();
    for (what, known) in [
        ("programs have names", can.bpf_name()),
        ("programs have constants", can.bpf_global_data()),
        ("helpers can be told apart", can.bpf_probe_read_kernel()),
    ] {
        if !known {
            return Err(Error::Interrupted(what));
        }
    }
    let mut loader = bare_loader();
    for (map, entries) in limits.maps() {
        loader.map_max_entries(map, entries);
    }
    for (name, value) in limits.globals() {
        // Each object has its own.
        loader.override_global(name, value, false);
    }
    Ok(loader)
}

/// A loader that has not read the type information of the whole kernel.
///
/// The programs need none of it, but aya 0.14 reads it when a loader is made,
/// before it can be told not to: memory and time for nothing. While no file can be
/// opened it goes on without. No other thread runs that could want to, but in the
/// unit tests: those read it.
fn bare_loader<'a>() -> EbpfLoader<'a> {
    if cfg!(test) {
        return EbpfLoader::new();
    }
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
    Switch::load(level)?.install()
}

/// The programs of one log level: verified, but not yet in use.
pub(super) struct Switch {
    level: LogLevel,
    ebpf: Ebpf,
    calls: ProgramArray<MapData>,
}

impl Switch {
    /// Lets the kernel verify them. The maps are made and pinned, or found.
    pub(super) fn load(level: LogLevel) -> Result<Self, Error> {
        let limits = Limits::read()?;
        pins::create_directories(level)?;
        let calls = pins::variant(level).join("PROGRAMS");
        let number = level.number();
        let mut loader = loader(&limits)?;
        loader.override_global("AYA_LOG_LEVEL", &number, false);
        for name in SHARED {
            loader.map_pin_path(name, pins::map(name));
        }
        loader.map_pin_path("PROGRAMS", &calls);
        require_all_own(level)?;
        let pins = || {
            SHARED
                .into_iter()
                .map(pins::map)
                .chain([calls.clone()])
                .collect()
        };
        let mut ebpf = fault::pins(pins, || loader.load(OBJECT))?;
        count_strangers()?;
        let calls = match ebpf.take_map("PROGRAMS").map(ProgramArray::try_from) {
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
        for (name, _) in PROGRAMS {
            load_program(&mut ebpf, name)?;
        }
        Ok(Self { level, ebpf, calls })
    }

    /// Whether these are the programs that are pinned.
    pub(super) fn is_pinned(&mut self) -> Result<bool, Error> {
        let variant = pins::variant(self.level);
        for (name, _) in PROGRAMS {
            let program = classifier(&mut self.ebpf, name)?;
            if !is_same(name, program, &variant.join(name))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes them into use, in place of those that are.
    pub(super) fn install(mut self) -> Result<(), Error> {
        nat::fill_slots(self.level)?;
        for (name, slot) in PROGRAMS {
            let program = classifier(&mut self.ebpf, name)?;
            if let Some(slot) = slot {
                let fd = program
                    .fd()
                    .map_err(|source| Error::program(name, source))?;
                change("PROGRAMS", || self.calls.set(slot, fd, 0))
                    .map_err(|source| failed("writing", "PROGRAMS", &slot, source))?;
            }
            pins::replace(&pins::variant(self.level).join(name), |path| {
                program.pin(path)
            })?;
        }
        Ok(())
    }
}

/// Whether a pinned program is this one: its instructions, and its constants.
pub(super) fn is_same(name: &str, own: &SchedClassifier, pin: &Path) -> Result<bool, Error> {
    let own = own.fd().map_err(|source| Error::program(name, source))?;
    same(own.as_fd(), pin).map_err(|source| Error::Pin {
        path: pin.to_owned(),
        source,
    })
}

/// As [`is_same`], of a program of any kind.
pub(super) fn same(own: BorrowedFd<'_>, pin: &Path) -> io::Result<bool> {
    let pinned = match bpf::open(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?.0,
    };
    are_same(&bpf::Program::of(own)?, &bpf::Program::of(pinned.as_fd())?)
}

/// Whether two programs have the same instructions and constants.
pub(super) fn are_same(one: &bpf::Program, other: &bpf::Program) -> io::Result<bool> {
    Ok(one.tag == other.tag && constants(one)? == constants(other)?)
}

/// What a program has in its map of constants (`.rodata`).
fn constants(program: &bpf::Program) -> io::Result<Option<Vec<u8>>> {
    for &id in &program.maps {
        let map = AnyMap::by_id(id)?;
        if map.shape.name.starts_with(".rodata") {
            return map.get(&0_u32.to_ne_bytes());
        }
    }
    Ok(None)
}

/// What the maps of an object are like, by their names, if made by this node's limits.
pub(super) fn expected(object: &[u8]) -> Result<HashMap<String, Shape>, Error> {
    let limits = Limits::read()?;
    let limits: HashMap<&str, u32> = limits.maps().collect();
    let object = Object::parse(object).map_err(|source| Error::from(EbpfError::from(source)))?;
    let bytes = object
        .btf
        .as_ref()
        .map_or_else(Vec::new, |btf| btf.to_bytes());
    let btf = Btf::parse(&bytes);
    let shape = |name: &str, map: &aya_obj::Map| {
        let described = |of: fn(&BtfMapDef) -> u32| match map {
            aya_obj::Map::Btf(map) => btf.as_ref()?.describe(of(&map.def)),
            aya_obj::Map::Legacy(_) => None,
        };
        Shape {
            name: name.chars().take(NAME).collect(),
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: limits.get(name).copied().unwrap_or(map.max_entries()),
            flags: map.map_flags(),
            key: described(|def| def.btf_key_type_id),
            value: described(|def| def.btf_value_type_id),
        }
    };
    Ok(object
        .maps
        .iter()
        .map(|(name, map)| (name.clone(), shape(name, map)))
        .collect())
}

/// How much of a name the kernel keeps (`BPF_OBJ_NAME_LEN` with its NUL).
const NAME: usize = 15;

/// Refuses maps that are pinned where those of a log level are, or should be, and are not:
/// the loader takes whatever is pinned.
pub(super) fn require_all_own(level: LogLevel) -> Result<(), Error> {
    let expected = expected(OBJECT)?;
    for name in SHARED {
        require_own(&pins::map(name), &expected[name])?;
    }
    require_own(
        &pins::variant(level).join("PROGRAMS"),
        &expected["PROGRAMS"],
    )
}

/// Refuses a pin that is of something else than such a map. None at all is right.
pub(super) fn require_own(path: &Path, expected: &Shape) -> Result<(), Error> {
    let Some(map) = open_map(path, &expected.name)? else {
        return Ok(());
    };
    match map.shape.differs_from(expected) {
        None => Ok(()),
        Some((found, right)) => Err(Error::ForeignPin {
            path: path.to_owned(),
            found,
            right,
            root: pins::root(),
        }),
    }
}

/// Opens a pinned map, of whatever shape.
pub(super) fn open_map(path: &Path, name: &str) -> Result<Option<AnyMap>, Error> {
    let error = |source| Error::Pin {
        path: path.to_owned(),
        source,
    };
    match bpf::open(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(error(source)),
        Ok((fd, Of::Map)) => AnyMap::of(fd).map(Some).map_err(error),
        Ok((_, kind)) => Err(Error::ForeignPin {
            path: path.to_owned(),
            found: kind.name().to_owned(),
            right: format!("the map {name}"),
            root: pins::root(),
        }),
    }
}

pub(super) fn load_program<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<&'a mut SchedClassifier, Error> {
    let program = classifier(ebpf, name)?;
    uninterrupted(name, || program.load())?;
    Ok(program)
}

/// Lets the kernel verify the program `name`, by what loads it.
///
/// The kernel gives up with EAGAIN when the process is stopped meanwhile (`do_check` of
/// `kernel/bpf/verifier.c`): its cgroup is frozen, or a debugger looks at it. Then it is
/// asked again.
pub(super) fn uninterrupted(
    name: &str,
    mut load: impl FnMut() -> Result<(), ProgramError>,
) -> Result<(), Error> {
    let is_interrupted = |error: &ProgramError| match error {
        ProgramError::LoadError { io_error, .. } => io_error.kind() == io::ErrorKind::WouldBlock,
        _ => false,
    };
    let mut verified = load();
    for _ in 0..INTERRUPTIONS {
        if !verified.as_ref().is_err_and(is_interrupted) {
            break;
        }
        verified = load();
    }
    verified.map_err(|source| Error::program(name, source))
}

/// A program of tc hooks, loaded or not.
pub(super) fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<&'a mut SchedClassifier, Error> {
    ebpf.program_mut(name)
        .ok_or(ProgramError::NotLoaded)
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
        // What was counted since the boot stays.
        .and_then(
            |zero| match change("STATS", || stats.insert(0, zero, super::NOEXIST)) {
                Err(error) if super::is_taken(&error) => Ok(()),
                written => written,
            },
        )
        .map_err(|source| failed("writing", "STATS", &0, source))
}
