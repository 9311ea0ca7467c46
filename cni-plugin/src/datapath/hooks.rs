//! Other programs for the hooks that are in use: each packet meets the one before or the new
//! one, and none goes without. What is attached is found by the ports' table and the pins of
//! links.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::programs::{SchedClassifier, links::LinkType};
use bpf_bridge_common::layout::Port;
use nix::libc;

use super::{
    Error, FILTER_HANDLE, FILTER_PRIORITY, LogLevel,
    attach::PROGRAM,
    bpf::{self, Of},
    entries, nat, object,
    pins::{self, Root},
    table,
};
use crate::{
    fault,
    link::{Hook, Netlink},
};

/// What was given other programs.
#[derive(Debug, Default)]
pub struct Moved {
    /// Ports, gateway ports included.
    pub ports: usize,
    /// Hooks of uplinks, XDP's included.
    pub uplinks: usize,
    /// Devices that carry a program that is not one of ours: they keep it.
    pub foreign: Vec<String>,
}

/// Gives every port and every uplink the programs that are pinned; `old` has links of a
/// former layout, and programs that are still attached. The lock of the pins is held alone.
pub(super) fn hand_over_all(old: Option<&Root>) -> Result<Moved, Error> {
    let host = Netlink::host()?;
    let mut moved = Moved::default();
    ports(&host, old, &mut moved)?;
    moved.uplinks = nat::uplinks::hand_over_all(&host, old)? + nat::xdp::hand_over_all(old)?;
    Ok(moved)
}

fn ports(host: &Netlink, old: Option<&Root>, moved: &mut Moved) -> Result<(), Error> {
    let own = Root::own();
    // A program tells its log level by the table that it calls others by.
    let mut levels: Vec<(u32, LogLevel)> = Vec::new();
    for root in [Some(&own), old].into_iter().flatten() {
        for level in LogLevel::ALL {
            let path = root.variant(level).join("PROGRAMS");
            if let Some(calls) = object::open_map(&path, "PROGRAMS")? {
                levels.push((calls.id, level));
            }
        }
    }
    let mut programs = Vec::new();
    for level in own.levels() {
        let path = own.variant(level).join(PROGRAM);
        let program =
            SchedClassifier::from_pin(path).map_err(|source| Error::program(PROGRAM, source))?;
        let info = program
            .info()
            .map_err(|source| Error::program(PROGRAM, source))?;
        programs.push((level, info.id(), program));
    }
    for (ifindex, _) in entries(&table::<u32, Port>("PORTS")?, "PORTS")? {
        let carried = host.tc_bpf(ifindex, Hook::Ingress, FILTER_PRIORITY, FILTER_HANDLE)?;
        let Some(carried) = carried else {
            // It is gone, or was detached, which CHECK tells.
            continue;
        };
        if programs.iter().any(|(_, id, _)| *id == carried) {
            moved.ports += 1;
            continue;
        }
        let level = program(carried)?
            .filter(|program| program.name == PROGRAM)
            .and_then(|program| {
                let known = levels.iter().find(|(id, _)| program.maps.contains(id));
                known.map(|(_, level)| *level)
            });
        let program = programs.iter().find(|(is, ..)| Some(*is) == level);
        let Some((_, _, program)) = program else {
            if let Some(link) = host.link_by_index(ifindex)? {
                moved.foreign.push(link.name);
            }
            continue;
        };
        let fd = program
            .fd()
            .map_err(|source| Error::program(PROGRAM, source))?;
        let replaced = host.replace_bpf(
            ifindex,
            Hook::Ingress,
            FILTER_PRIORITY,
            FILTER_HANDLE,
            fd.as_fd(),
            PROGRAM,
        );
        match replaced {
            // Its sandbox has just gone.
            Err(_) if host.link_by_index(ifindex)?.is_none() => {}
            replaced => {
                replaced?;
                moved.ports += 1;
            }
        }
    }
    Ok(())
}

/// The devices that have a pinned link of this kind, in this layout or in `old`.
pub(super) fn devices(kind: &str, old: Option<&Root>) -> BTreeSet<u32> {
    let old = old.map(|old| old.devices(kind)).unwrap_or_default();
    pins::devices(kind).into_iter().chain(old).collect()
}

/// Gives the pinned link `name` of this layout, or else of `old`, a program; it must be
/// a link of this kind that runs one of these `programs`. `false` if there is none that is
/// attached.
pub(super) fn hand_over(
    name: &str,
    old: Option<&Root>,
    kind: LinkType,
    programs: &[&str],
    program: BorrowedFd<'_>,
) -> Result<bool, Error> {
    let own = pins::link(name);
    for path in [Some(own.clone()), old.map(|old| old.link(name))]
        .into_iter()
        .flatten()
    {
        let error = |source| Error::Pin {
            path: path.clone(),
            source,
        };
        let Some((link, is, runs)) = open(&path)? else {
            continue;
        };
        let runs = program_name(runs)?.unwrap_or_default();
        if is != kind as u32 || !programs.contains(&runs.as_str()) {
            return Err(Error::ForeignPin {
                path,
                found: format!("a link of the kind {is} that runs {runs:?}"),
                right: format!("one that runs {:?}", programs[0]),
                root: pins::root(),
            });
        }
        match bpf::update_link(link.as_fd(), program) {
            Ok(()) => fault::point(format_args!("hand over {name}")),
            // Somebody has detached it, or its device or control group is gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => continue,
            Err(source) => return Err(error(source)),
        }
        if path != own {
            pins::remove(&own)?;
            pins::pin(&own, |own| bpf::pin(link.as_fd(), own))?;
        }
        return Ok(true);
    }
    Ok(false)
}

/// The name of the program that a pinned link runs.
pub(super) fn linked_program(name: &str, old: Option<&Root>) -> Result<Option<String>, Error> {
    let own = pins::link(name);
    let path = match old {
        Some(old) if !own.exists() => old.link(name),
        _ => own,
    };
    match open(&path)? {
        Some((_, _, runs)) => program_name(runs),
        None => Ok(None),
    }
}

/// Whether a pinned link runs a program like this one.
pub(super) fn runs(path: &Path, program: BorrowedFd<'_>) -> Result<bool, Error> {
    let Some((_, _, runs)) = open(path)? else {
        return Ok(false);
    };
    let same = || {
        let own = bpf::Program::of(program)?;
        object::are_same(&own, &bpf::Program::by_id(runs)?)
    };
    same().map_err(|source| Error::Pin {
        path: path.to_owned(),
        source,
    })
}

/// Opens a pinned link: its kind, and the id of its program.
fn open(path: &Path) -> Result<Option<(OwnedFd, u32, u32)>, Error> {
    let error = |source| Error::Pin {
        path: path.to_owned(),
        source,
    };
    match bpf::open(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(error(source)),
        Ok((fd, Of::Link)) => {
            let (kind, program) = bpf::link(fd.as_fd()).map_err(error)?;
            Ok(Some((fd, kind, program)))
        }
        Ok((_, kind)) => Err(Error::ForeignPin {
            path: path.to_owned(),
            found: kind.name().to_owned(),
            right: "a link".to_owned(),
            root: pins::root(),
        }),
    }
}

/// The id of a pinned program.
pub(super) fn pinned_program(path: &Path) -> Result<Option<u32>, Error> {
    let error = |source| Error::Pin {
        path: path.to_owned(),
        source,
    };
    match bpf::open(path) {
        Ok((fd, Of::Program)) => bpf::Program::of(fd.as_fd())
            .map(|program| Some(program.id))
            .map_err(error),
        Ok(_) => Ok(None),
        Err(source) => Err(error(source)),
    }
}

/// The name of the program of this id.
pub(super) fn program_name(id: u32) -> Result<Option<String>, Error> {
    Ok(program(id)?.map(|program| program.name))
}

fn program(id: u32) -> Result<Option<bpf::Program>, Error> {
    match bpf::Program::by_id(id) {
        Ok(program) => Ok(Some(program)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Asking { id, source }),
    }
}
