//! Echo servers and clients for TCP and UDP.

use std::{
    hash::Hasher as _,
    io::{self, Read, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::Namespace;

/// How often a server looks whether it shall end.
const POLL: Duration = Duration::from_millis(20);

/// Sends back what it gets, over TCP and UDP on the same port, until dropped.
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
        let (tcp, udp) = namespace.within(|| {
            // The port that is free for TCP may be taken for UDP: only in a
            // namespace that has other servers, but those are allowed.
            let mut attempts = 0;
            loop {
                let tcp = TcpListener::bind((address, 0))
                    .with_context(|| format!("listening on {address} over TCP"))?;
                match UdpSocket::bind(tcp.local_addr()?) {
                    Ok(udp) => return Ok((tcp, udp)),
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempts < 10 => {
                        attempts += 1;
                    }
                    Err(error) => {
                        return Err(error)
                            .with_context(|| format!("listening on {address} over UDP"));
                    }
                }
            }
        })?;
        let address = tcp.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(POLL))?;
        let threads = vec![
            thread::spawn({
                let stop = Arc::clone(&stop);
                move || serve_tcp(&tcp, &stop)
            }),
            thread::spawn({
                let stop = Arc::clone(&stop);
                move || serve_udp(&udp, &stop)
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

fn serve_tcp(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                // Ends when the client does, or has said nothing for a while.
                thread::spawn(move || {
                    let _ = stream.set_nonblocking(false);
                    let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
                    let _ = io::copy(&mut &stream, &mut &stream);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn serve_udp(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
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
            let any: SocketAddr = match server {
                SocketAddr::V4(_) => ([0; 4], 0).into(),
                SocketAddr::V6(_) => ([0; 16], 0).into(),
            };
            let socket = UdpSocket::bind(any)?;
            socket.connect(server)?;
            socket.set_read_timeout(Some(limit))?;
            let start = Instant::now();
            socket
                .send(message)
                .with_context(|| format!("sending to {server}"))?;
            let mut answer = vec![0; 65_536];
            let length = socket
                .recv(&mut answer)
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
