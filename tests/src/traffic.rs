//! Echo servers and clients for TCP and UDP.

use std::{
    hash::Hasher as _,
    io::{self, Read, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
            sockopt,
        },
        time::TimeVal,
    },
};

use crate::{Namespace, Receive as _, ReceiveFrom as _, patient::uninterrupted};

/// How much a server has room for, in bytes.
const BUFFER: usize = 8 << 20;
/// How often a server looks whether it shall end.
const POLL: Duration = Duration::from_millis(20);

/// Sends back what it gets, over TCP and UDP on the same port, until dropped.
///
/// One with a name says a line before: its name, and whom it sees. Over TCP once,
/// over UDP in every datagram. [`Namespace::meet`] is its client.
#[derive(Debug)]
pub struct EchoServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl EchoServer {
    /// Listens on an address of a namespace, on a port of the kernel's choice.
    ///
    /// # Errors
    ///
    /// That the address is not one of the namespace's, or still tentative.
    pub fn start(namespace: &Namespace, address: IpAddr) -> Result<Self> {
        // The port that is free for TCP may be taken for UDP.
        let mut attempts = 0;
        loop {
            match Self::start_on(namespace, (address, 0).into()) {
                Err(error) if attempts < 10 && is_taken(&error) => attempts += 1,
                started => return started,
            }
        }
    }

    /// Listens on an address and port of a namespace.
    ///
    /// # Errors
    ///
    /// As [`Self::start`], or that the port is taken.
    pub fn start_on(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        Self::start_as(namespace, address, "")
    }

    /// Listens with a name.
    ///
    /// # Errors
    ///
    /// As [`Self::start_on`].
    pub fn start_as(namespace: &Namespace, address: SocketAddr, name: &str) -> Result<Self> {
        let listen = || {
            namespace.within(|| {
                let tcp = TcpListener::bind(address)
                    .with_context(|| format!("listening on {address} over TCP"))?;
                let udp = UdpSocket::bind(tcp.local_addr()?)
                    .with_context(|| format!("listening on {address} over UDP"))?;
                // A server that has to wait for a processor loses nothing.
                setsockopt(&udp, sockopt::RcvBufForce, &BUFFER)?;
                Ok((tcp, udp))
            })
        };
        let (tcp, udp) = when_free(listen)?;
        let address = tcp.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(POLL))?;
        let threads = vec![
            thread::spawn({
                let (name, stop) = (name.to_owned(), Arc::clone(&stop));
                move || serve_tcp(&tcp, &name, &stop)
            }),
            thread::spawn({
                let (name, stop) = (name.to_owned(), Arc::clone(&stop));
                move || serve_udp(&udp, &name, &stop)
            }),
        ];
        Ok(Self {
            address,
            stop,
            threads,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The unspecified address of the family of `other`, and no port.
fn any_like(other: SocketAddr) -> SocketAddr {
    match other {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0; 16], 0).into(),
    }
}

fn is_taken(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::AddrInUse)
}

/// The line that a server says first.
fn greeting(name: &str, client: SocketAddr) -> Vec<u8> {
    if name.is_empty() {
        return Vec::new();
    }
    format!("{name} {client}\n").into_bytes()
}

fn serve_tcp(listener: &TcpListener, name: &str, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, client)) => {
                let greeting = greeting(name, client);
                // Ends when the client does, or has said nothing for a while.
                thread::spawn(move || {
                    let _ = stream.set_nonblocking(false);
                    let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
                    let _ = (&stream).write_all(&greeting);
                    let _ = io::copy(&mut &stream, &mut &stream);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.receive_from(&mut buffer) {
            let answer = [&greeting(name, from), &buffer[..length]].concat();
            let _ = socket.send_to(&answer, from);
        }
    }
}

/// How a client reaches a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// Over one connection.
    Tcp,
    /// From a UDP socket that is connected.
    Udp,
    /// From a UDP socket that names the destination of each datagram.
    UnconnectedUdp,
}

impl Client {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::UnconnectedUdp];
}

/// Whom a client met behind an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// The server's name.
    pub server: String,
    /// Whom the server sees.
    pub client: SocketAddr,
}

impl Meeting {
    /// What an [`EchoServer`] with a name answered to `message`.
    ///
    /// # Errors
    ///
    /// That it is something else.
    pub fn parse(answer: &[u8], message: &[u8]) -> Result<Self> {
        let parse = || {
            let text = std::str::from_utf8(answer.strip_suffix(message)?).ok()?;
            let (server, client) = text.strip_suffix('\n')?.split_once(' ')?;
            let (server, client) = (server.to_owned(), client.parse().ok()?);
            Some(Self { server, client })
        };
        parse().with_context(|| format!("no greeting in {:?}", String::from_utf8_lossy(answer)))
    }
}

/// What [`Namespace::tcp_transfer`] did.
#[derive(Debug, Clone, Copy)]
pub struct TransferReport {
    /// Bytes sent, and received back.
    pub bytes: u64,
    /// From the connection's first packet to its last byte.
    pub duration: Duration,
}

impl TransferReport {
    /// Bits per second in one direction.
    #[must_use]
    pub fn bits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.duration.as_secs_f64()
    }
}

impl Namespace {
    /// Speaks to a server with a name (see [`EchoServer::start_as`]), all within
    /// `limit` and without sending anything twice.
    ///
    /// The client must see the server where it asked for it: by the address that
    /// its socket says to be connected to, and that datagrams come from.
    ///
    /// # Errors
    ///
    /// That there was no answer, or from elsewhere.
    pub fn meet(&self, client: Client, server: SocketAddr, limit: Duration) -> Result<Meeting> {
        self.meet_from(client, any_like(server), server, limit)
    }

    /// As [`Self::meet`], from an address of the caller's choice.
    ///
    /// # Errors
    ///
    /// As [`Self::meet`], or that the address is not one of the namespace's or
    /// taken.
    pub fn meet_from(
        &self,
        client: Client,
        local: SocketAddr,
        server: SocketAddr,
        limit: Duration,
    ) -> Result<Meeting> {
        when_free(|| self.try_to_meet_from(client, local, server, limit))
    }

    fn try_to_meet_from(
        &self,
        client: Client,
        local: SocketAddr,
        server: SocketAddr,
        limit: Duration,
    ) -> Result<Meeting> {
        let message = b"who is there?";
        let answer = match client {
            Client::Tcp => {
                let mut stream = self.tcp_connect_from(local, server, limit)?;
                let peer = stream.peer_addr()?;
                ensure!(peer == server, "connected to {peer}, not {server}");
                stream.set_read_timeout(Some(limit))?;
                stream.write_all(message)?;
                stream.shutdown(Shutdown::Write)?;
                let mut answer = Vec::new();
                stream
                    .read_to_end(&mut answer)
                    .with_context(|| format!("waiting for the answer from {server}"))?;
                answer
            }
            Client::Udp | Client::UnconnectedUdp => {
                let socket = self.within(|| Ok(UdpSocket::bind(local)?))?;
                socket.set_read_timeout(Some(limit))?;
                if client == Client::Udp {
                    // Looked at in the namespace, as every program does.
                    self.within(|| Ok(socket.connect(server)?))?;
                    let peer = socket.peer_addr()?;
                    ensure!(peer == server, "connected to {peer}, not {server}");
                    socket.send(message)
                } else {
                    socket.send_to(message, server)
                }
                .with_context(|| format!("sending to {server}"))?;
                let mut answer = vec![0; 65_536];
                let (length, from) = socket
                    .receive_from(&mut answer)
                    .with_context(|| format!("waiting for the answer from {server}"))?;
                ensure!(from == server, "{from} answered, not {server}");
                answer.truncate(length);
                answer
            }
        };
        Meeting::parse(&answer, message)
    }

    /// Connects from an address and port of the caller's choice, which others
    /// may use at the same time.
    ///
    /// # Errors
    ///
    /// That there is no such address, or no connection within `limit`.
    pub fn tcp_connect_from(
        &self,
        local: SocketAddr,
        server: SocketAddr,
        limit: Duration,
    ) -> Result<TcpStream> {
        let family = if server.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let socket = self.within(|| {
            let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
                .context("opening a socket")?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            // This limits connect, too.
            let seconds = i64::try_from(limit.as_secs())?;
            let micros = i64::from(limit.subsec_micros());
            setsockopt(
                &socket,
                sockopt::SendTimeout,
                &TimeVal::new(seconds, micros),
            )?;
            bind(socket.as_raw_fd(), &SockaddrStorage::from(local))
                .with_context(|| format!("binding to {local}"))?;
            let server_address = SockaddrStorage::from(server);
            uninterrupted(
                || Ok(Some(limit)),
                || Ok(connect(socket.as_raw_fd(), &server_address)?),
            )
            .with_context(|| format!("connecting to {server}"))?;
            Ok(socket)
        })?;
        Ok(socket.into())
    }

    /// Connects to an echo server and sends `message`, which must come back,
    /// all within `limit`.
    ///
    /// # Errors
    ///
    /// That it did not.
    pub fn tcp_echo(&self, server: SocketAddr, message: &[u8], limit: Duration) -> Result<()> {
        self.within(|| {
            let mut stream = TcpStream::connect_timeout(&server, limit)
                .with_context(|| format!("connecting to {server}"))?;
            stream.set_read_timeout(Some(limit))?;
            stream.write_all(message)?;
            let mut answer = vec![0; message.len()];
            stream
                .read_exact(&mut answer)
                .with_context(|| format!("waiting for the echo from {server}"))?;
            ensure!(answer == message, "{server} sent back something else");
            Ok(())
        })
    }

    /// Sends one datagram to an echo server, which must come back within
    /// `limit`; nothing is sent twice. Returns the time it took.
    ///
    /// # Errors
    ///
    /// That it did not.
    pub fn udp_echo(
        &self,
        server: SocketAddr,
        message: &[u8],
        limit: Duration,
    ) -> Result<Duration> {
        self.within(|| {
            let socket = UdpSocket::bind(any_like(server))?;
            socket.connect(server)?;
            socket.set_read_timeout(Some(limit))?;
            let start = Instant::now();
            socket
                .send(message)
                .with_context(|| format!("sending to {server}"))?;
            let mut answer = vec![0; 65_536];
            let length = socket
                .receive(&mut answer)
                .with_context(|| format!("waiting for the echo from {server}"))?;
            ensure!(
                answer[..length] == *message,
                "{server} sent back something else"
            );
            Ok(start.elapsed())
        })
    }

    /// Sends `bytes` bytes to an echo server over one connection and compares
    /// what comes back by its digest.
    ///
    /// # Errors
    ///
    /// That something was lost or changed, or nothing moved for ten seconds.
    pub fn tcp_transfer(&self, server: SocketAddr, bytes: u64) -> Result<TransferReport> {
        self.within(|| {
            let start = Instant::now();
            let stream = TcpStream::connect_timeout(&server, Duration::from_secs(5))
                .with_context(|| format!("connecting to {server}"))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.set_write_timeout(Some(Duration::from_secs(10)))?;
            let (sent, received) = thread::scope(|scope| {
                let sender = scope.spawn(|| -> Result<u64> {
                    let mut source = Noise::new().take(bytes);
                    let mut copy = Tee::new(&mut source);
                    io::copy(&mut copy, &mut &stream).context("sending")?;
                    stream.shutdown(Shutdown::Write)?;
                    Ok(copy.digest.finish())
                });
                let received = digest(&mut (&stream).take(bytes)).context("receiving");
                let sent = sender
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                (sent, received)
            });
            let (received, length) = received?;
            ensure!(length == bytes, "{length} of {bytes} bytes came back");
            ensure!(sent? == received, "what came back is not what was sent");
            Ok(TransferReport {
                bytes,
                duration: start.elapsed(),
            })
        })
    }
}

/// A digest of everything a reader has, and its length in bytes.
///
/// # Errors
///
/// That reading failed.
pub fn digest(reader: &mut impl Read) -> io::Result<(u64, u64)> {
    let mut tee = Tee::new(reader);
    let length = io::copy(&mut tee, &mut io::sink())?;
    Ok((tee.digest.finish(), length))
}

/// A reader that digests what passes. The digest must not depend on how the
/// bytes were cut into pieces.
struct Tee<'a, R> {
    inner: &'a mut R,
    digest: Digest,
}

impl<'a, R: Read> Tee<'a, R> {
    fn new(inner: &'a mut R) -> Self {
        Self {
            inner,
            digest: Digest::default(),
        }
    }
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.digest.write(&buffer[..length]);
        Ok(length)
    }
}

/// Fletcher's sum with 64 bits: sees changed, lost and swapped bytes, and is
/// fast without optimisation.
#[derive(Default)]
struct Digest {
    sum: u64,
    sums: u64,
}

impl std::hash::Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.sum = self.sum.wrapping_add(u64::from(byte) + 1);
            self.sums = self.sums.wrapping_add(self.sum);
        }
    }

    fn finish(&self) -> u64 {
        self.sum ^ self.sums.rotate_left(17)
    }
}

/// Bytes that never repeat within a window (xorshift64).
struct Noise(u64);

impl Noise {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
}

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
        Ok(buffer.len())
    }
}

/// Repeats what finds a port in use, for a while: a process that another test is about to
/// start has a copy of each socket, until it becomes another program.
///
/// # Errors
///
/// Those of `work`, or the port stays in use.
pub fn when_free<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let end = Instant::now() + PATIENCE;
    loop {
        match work() {
            Err(error) if Instant::now() < end && is_in_use(&error) => {
                thread::sleep(Duration::from_millis(5));
            }
            done => return done,
        }
    }
}

fn is_in_use(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause
            .downcast_ref::<io::Error>()
            .map(io::Error::kind)
            .or_else(|| Some(io::Error::from(*cause.downcast_ref::<Errno>()?).kind()));
        matches!(
            kind,
            Some(io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
        )
    })
}
