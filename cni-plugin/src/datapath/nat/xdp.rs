//! XDP on the devices that the operator names.
//!
//! Its program is loaded when the first of them is, so that nobody else needs a kernel
//! that has what it uses (5.18).

use std::{io, os::fd::AsFd as _, path::PathBuf};

use aya::{
    Ebpf,
    programs::{
        ProgramError, Xdp, XdpMode,
        links::{FdLink, LinkType},
    },
};
use aya_obj::{generated::bpf_prog_type, programs::XdpAttachType};

use super::{
    super::{
        ANY, Error, hooks, open_program,
        pins::{self, Root},
        set,
    },
    Nat, Translators, pin_link,
};
use crate::{fault, link::Link};

/// What the names of links begin with; the ifindex follows.
pub(super) const KIND: &str = "xdp-";

/// The program, and its pin.
pub(super) const PROGRAM: &str = "xdp";

/// How XDP runs on a device.
#[derive(Debug)]
pub enum XdpRun {
    /// In its driver.
    Native,
    /// Behind it, as the kernel can for any device.
    Generic {
        /// Why the driver would not, if it was asked just now.
        because: Option<String>,
    },
}

impl Nat<'_> {
    /// Serves published ports by XDP on a device of the node, unless that is done
    /// already.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignXdp`]; or the program cannot be loaded, or attached in any way.
    pub fn serve_by_xdp_on(&mut self, device: &Link) -> Result<XdpRun, Error> {
        let mut program = open_or_load()?;
        let Some(mac) = device.mac.filter(|_| device.ethernet) else {
            return Err(refused(device, "its frames are not Ethernet's"));
        };
        // What is for another address goes on.
        let entry = (device.index, mac.octets());
        set(&mut self.xdp_uplinks, "XDP_UPLINKS", entry.0, entry.1, ANY)?;
        match device.xdp {
            Some(there) if there.program == id(&program)? || hand_over(device, &program)? => {
                return Ok(match there.generic {
                    false => XdpRun::Native,
                    true => XdpRun::Generic { because: None },
                });
            }
            Some(there) => {
                return Err(Error::ForeignXdp {
                    device: device.name.clone(),
                    program: there.program,
                });
            }
            None => {}
        }
        let Err(native) = attach(&mut program, device, XdpMode::Driver) else {
            return Ok(XdpRun::Native);
        };
        attach(&mut program, device, XdpMode::Skb)
            .map_err(|generic| refused(device, &reason(&generic)))?;
        Ok(XdpRun::Generic {
            because: Some(reason(&native)),
        })
    }
}

fn attach(program: &mut Xdp, device: &Link, mode: XdpMode) -> Result<(), ProgramError> {
    let link = program.attach_to_if_index(device.index, mode)?;
    fault::point("attach xdp");
    let link = FdLink::try_from(program.take_link(link)?);
    pin_link(link, &pin(device.index))
        .map_err(|error| ProgramError::IOError(io::Error::other(error)))
}

/// The pin of its link to a device.
pub(super) fn pin(device: u32) -> PathBuf {
    pins::link(&format!("{}{device}", KIND))
}

/// Detaches the program from all devices, and takes it away.
pub(super) fn detach_all() -> Result<(), Error> {
    for device in pins::devices(KIND) {
        pins::remove(&pin(device))?;
    }
    pins::remove(&pins::nat(PROGRAM))
}

/// Gives every device that has XDP the program that is pinned; `old` has links of a former
/// layout.
pub(in super::super) fn hand_over_all(old: Option<&Root>) -> Result<usize, Error> {
    let devices = hooks::devices(KIND, old);
    if devices.is_empty() {
        return Ok(0);
    }
    let program = open()?;
    let fd = program.fd().map_err(failed)?;
    let mut done = 0;
    for device in devices {
        let name = format!("{KIND}{device}");
        if hooks::hand_over(&name, old, LinkType::Xdp, &[PROGRAM], fd.as_fd())? {
            done += 1;
        }
    }
    Ok(done)
}

/// Whether the device has a link of ours, which has this program now: an upgrade that was
/// killed left the one before.
fn hand_over(device: &Link, program: &Xdp) -> Result<bool, Error> {
    let fd = program.fd().map_err(failed)?;
    let name = format!("{KIND}{}", device.index);
    hooks::hand_over(&name, None, LinkType::Xdp, &[PROGRAM], fd.as_fd())
}

fn open() -> Result<Xdp, Error> {
    let path = pins::nat(PROGRAM);
    open_program(&path, PROGRAM, bpf_prog_type::BPF_PROG_TYPE_XDP, None)?;
    Xdp::from_pin(path, XdpAttachType::Interface).map_err(failed)
}

fn open_or_load() -> Result<Xdp, Error> {
    if !pins::nat(PROGRAM).exists() {
        Translators::load(&[], &[PROGRAM])?.install(None)?;
    }
    open()
}

/// The program as it is loaded.
pub(super) fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, Error> {
    ebpf.program_mut(PROGRAM)
        .ok_or(ProgramError::NotLoaded)
        .and_then(TryInto::try_into)
        .map_err(failed)
}

fn id(program: &Xdp) -> Result<u32, Error> {
    program.info().map(|info| info.id()).map_err(failed)
}

fn failed(source: ProgramError) -> Error {
    Error::program(PROGRAM, source)
}

fn refused(device: &Link, why: &str) -> Error {
    Error::Xdp {
        device: device.name.clone(),
        why: why.to_owned(),
    }
}

/// What the kernel said.
fn reason(error: &ProgramError) -> String {
    match error {
        ProgramError::SyscallError(error) => error.io_error.to_string(),
        error => error.to_string(),
    }
}
