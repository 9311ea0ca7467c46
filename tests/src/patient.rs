use std::{
    io::{self, ErrorKind, Read as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

/// A socket that hears what comes, even if the process is stopped and goes on while
/// it waits: a machine that is suspended, a cgroup that is frozen, a debugger.
///
/// After that a call with a timeout ends with EINTR, though no signal has a handler
/// (signal(7), "Interruption of system calls and library functions by stop signals").
/// Reading a stream to a given end is repeated by the standard library.
pub trait Receive {
    /// Receives one datagram of a peer, or what is there of a stream.
    ///
    /// # Errors
    ///
    /// What the kernel says, or that nothing came within the socket's timeout.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// The same for a socket that hears many.
pub trait ReceiveFrom {
    /// Receives one datagram of anybody, as [`UdpSocket::recv_from`] does.
    ///
    /// # Errors
    ///
    /// What the kernel says, or that nothing came within the socket's timeout.
    fn receive_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)>;
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is what to use in their place"
)]
impl Receive for UdpSocket {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| self.read_timeout(), || self.recv(buffer))
    }
}

impl Receive for TcpStream {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut stream = self;
        uninterrupted(|| self.read_timeout(), || stream.read(buffer))
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is what to use in their place"
)]
impl ReceiveFrom for UdpSocket {
    fn receive_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        uninterrupted(|| self.read_timeout(), || self.recv_from(buffer))
    }
}

/// Repeats a call that ended with EINTR, for about as long as the socket's timeout is,
/// which is only asked for then; see [`Receive`].
///
/// # Errors
///
/// Those of the call, but for EINTR: after that time it is
/// [`WouldBlock`](ErrorKind::WouldBlock), as without the interruptions.
pub(crate) fn uninterrupted<T>(
    timeout: impl Fn() -> io::Result<Option<Duration>>,
    mut call: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let interrupted = |error: &io::Error| error.kind() == ErrorKind::Interrupted;
    let mut done = call();
    if done.as_ref().is_err_and(interrupted) {
        let end = timeout()?.map(|limit| Instant::now() + limit);
        while done.as_ref().is_err_and(interrupted) {
            if end.is_some_and(|end| Instant::now() > end) {
                return Err(ErrorKind::WouldBlock.into());
            }
            done = call();
        }
    }
    done
}
