//! Sockets below the transport protocols.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::libc;

use crate::{Namespace, ReceiveFrom as _};

/// A socket that sends and receives what stands behind the IP header, of one
/// protocol. The kernel makes the header, and ICMPv6's checksum.
#[derive(Debug)]
pub struct RawSocket {
    // The standard library's calls for datagrams suit it.
    socket: UdpSocket,
    v4: bool,
}

impl RawSocket {
    /// Opens a socket of a protocol on an address, which may be the unspecified one.
    ///
    /// # Errors
    ///
    /// That the address is not one of the namespace's.
    pub fn open(namespace: &Namespace, address: IpAddr, protocol: u8) -> Result<Self> {
        let v4 = address.is_ipv4();
        let family = if v4 { libc::AF_INET } else { libc::AF_INET6 };
        namespace.within(|| {
            // SAFETY: the arguments are plain numbers.
            let raw = unsafe {
                libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into())
            };
            ensure!(
                raw >= 0,
                "opening a raw socket of protocol {protocol}: {}",
                io::Error::last_os_error()
            );
            // SAFETY: the descriptor was made above and belongs to nothing else.
            let socket = UdpSocket::from(unsafe { OwnedFd::from_raw_fd(raw) });
            let local = nix::sys::socket::SockaddrStorage::from(SocketAddr::new(address, 0));
            nix::sys::socket::bind(raw, &local)
                .with_context(|| format!("binding a raw socket to {address}"))?;
            Ok(Self { socket, v4 })
        })
    }

    /// Sends to an address.
    ///
    /// # Errors
    ///
    /// That there is no way to it.
    pub fn send(&self, to: IpAddr, bytes: &[u8]) -> Result<()> {
        self.socket
            .send_to(bytes, (to, 0))
            .with_context(|| format!("sending to {to}"))?;
        Ok(())
    }

    /// The first thing that `wanted` accepts, made of who sent it and what stood
    /// behind the header; `None` when nothing came within `limit`.
    ///
    /// # Errors
    ///
    /// What the kernel says of something that was sent.
    pub fn receive<T>(
        &self,
        limit: Duration,
        mut wanted: impl FnMut(IpAddr, &[u8]) -> Option<T>,
    ) -> Result<Option<T>> {
        let end = Instant::now() + limit;
        let mut buffer = vec![0; 65_536];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left))?;
            let (length, from) = match self.socket.receive_from(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                received => received.context("receiving from a raw socket")?,
            };
            // IPv4's comes with the header.
            let header = if self.v4 {
                usize::from(buffer[0] & 0xf) * 4
            } else {
                0
            };
            let found = wanted(from.ip(), buffer.get(header..length).unwrap_or_default());
            if found.is_some() {
                return Ok(found);
            }
        }
    }
}

impl AsFd for RawSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
