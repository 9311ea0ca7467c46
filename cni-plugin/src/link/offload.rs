//! Offloads of a device, through ethtool's ioctl: rtnetlink does not know of them.

use std::{
    io,
    os::{fd::AsRawFd as _, unix::net::UnixDatagram},
};

use nix::libc;

use crate::fault::{self, Kind};

/// `SIOCETHTOOL` of `linux/sockios.h`; the libc crate lacks it for musl.
const SIOCETHTOOL: libc::Ioctl = 0x8946;
/// `ETHTOOL_SGRO` of `linux/ethtool.h`.
const ETHTOOL_SGRO: u32 = 0x2c;

/// `struct ethtool_value` of `linux/ethtool.h`.
#[repr(C)]
struct EthtoolValue {
    cmd: u32,
    data: u32,
}

/// Lets a device of the thread's network namespace merge what it receives (GRO). A veth
/// then has a receive queue of its own, which others can put XDP's frames into.
///
/// # Errors
///
/// What the kernel said: no such device, or it cannot do this.
pub fn enable_gro(device: &str) -> io::Result<()> {
    fault::request(Kind::Netlink, "GRO by ethtool")?;
    // Any socket does: it only says which namespace is meant.
    let socket = UnixDatagram::unbound()?;
    let mut value = EthtoolValue {
        cmd: ETHTOOL_SGRO,
        data: 1,
    };
    // SAFETY: all zeroes are a value of that plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero, whatever the name.
    let end = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..end].iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request points to the structure that its command takes, and both
    // outlive the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
        0 => {
            fault::point("GRO by ethtool");
            Ok(())
        }
        _ => Err(io::Error::last_os_error()),
    }
}
