//! Traffic between two processes: the bench asks, a process of its own answers.
//!
//! One rule serves every kind of traffic: after each *quota* of what it receives
//! (bytes over TCP, datagrams over UDP) the peer sends one byte back, and only
//! then the asker goes on. A quota of 1 is a ping-pong (TCP_RR, UDP_RR), one of
//! megabytes a stream, and one of some dozens of datagrams a flow of packets of
//! which none is ever lost, which the usual blasters cannot promise when both
//! ends share a CPU.
//!
//! Both ends run on one CPU: there the cost of a packet is all that decides, and
//! figures repeat within a per cent. On two, the wake-ups between the CPUs weigh
//! more than the network, and vary several-fold.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, Stdio},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, bail, ensure};
use bpf_bridge_tests::Namespace;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::Pid,
};

/// How long the asker waits for an answer; on one node nothing takes this long.
const LOST: Duration = Duration::from_secs(2);
/// How much is given to the kernel at once.
const CHUNK: usize = 128 * 1024;

/// The transport, and what one transaction consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// `quota` bytes there, one byte back.
    Tcp { quota: usize },
    /// `quota` datagrams of `size` bytes there, one back.
    Udp { quota: usize, size: usize },
}

/// What the hidden option `--peer` says: the transport, its quota, and the CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerTask {
    transport: Transport,
    cpu: usize,
}

impl PeerTask {
    fn argument(self) -> String {
        match self.transport {
            Transport::Tcp { quota } => format!("tcp:{quota}:{}", self.cpu),
            Transport::Udp { quota, .. } => format!("udp:{quota}:{}", self.cpu),
        }
    }

    /// Answers on the socket that is standard input, until killed or, over TCP,
    /// left alone.
    pub(crate) fn run(self) -> Result<()> {
        // However the bench ends, this ends with it.
        set_pdeathsig(Signal::SIGKILL).context("asking to be killed with the bench")?;
        pin(self.cpu)?;
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        match self.transport {
            Transport::Tcp { quota } => answer_tcp(&TcpListener::from(socket), quota),
            Transport::Udp { quota, .. } => answer_udp(&UdpSocket::from(socket), quota),
        }
    }
}

impl FromStr for PeerTask {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let [transport, quota, cpu] = text.split(':').collect::<Vec<_>>()[..] else {
            bail!("not TRANSPORT:QUOTA:CPU");
        };
        let quota = quota.parse().context("the quota")?;
        ensure!(quota > 0, "a quota of nothing is never reached");
        let transport = match transport {
            "tcp" => Transport::Tcp { quota },
            "udp" => Transport::Udp { quota, size: 0 },
            _ => bail!("neither tcp nor udp"),
        };
        let cpu = cpu.parse().context("the CPU")?;
        Ok(Self { transport, cpu })
    }
}

fn answer_tcp(listener: &TcpListener, quota: usize) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; CHUNK];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => received += length,
        }
        while received >= quota {
            received -= quota;
            stream.write_all(&[0])?;
        }
    }
}

fn answer_udp(socket: &UdpSocket, quota: usize) -> Result<()> {
    let mut buffer = [0; 2048];
    let mut received = 0;
    loop {
        let (_, from) = socket.recv_from(&mut buffer)?;
        received += 1;
        if received == quota {
            received = 0;
            socket.send_to(&[0], from)?;
        }
    }
}

/// A flow from one namespace to another, at rest until it is run.
#[derive(Debug)]
pub(super) struct Flow {
    transport: Transport,
    cpu: usize,
    socket: Socket,
    peer: Child,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Flow {
    /// Connects `from` to a peer of its own at `address`, which is one of `to`'s.
    ///
    /// Must be called by the main thread: the peer ends with the thread that
    /// started it.
    pub(super) fn start(
        from: &Namespace,
        to: &Namespace,
        address: IpAddr,
        transport: Transport,
        cpu: usize,
    ) -> Result<Self> {
        let any: SocketAddr = match address {
            IpAddr::V4(_) => ([0; 4], 0).into(),
            IpAddr::V6(_) => ([0; 16], 0).into(),
        };
        let (listener, server): (OwnedFd, SocketAddr) = to
            .within(|| {
                Ok(match transport {
                    Transport::Tcp { .. } => {
                        let socket = TcpListener::bind((address, 0))?;
                        let server = socket.local_addr()?;
                        (socket.into(), server)
                    }
                    Transport::Udp { .. } => {
                        let socket = UdpSocket::bind((address, 0))?;
                        let server = socket.local_addr()?;
                        (socket.into(), server)
                    }
                })
            })
            .with_context(|| format!("listening on {address}"))?;
        let task = PeerTask { transport, cpu };
        let peer = Command::new("/proc/self/exe")
            .args(["bench", "--peer", &task.argument()])
            .stdin(Stdio::from(listener))
            .spawn()
            .context("starting a peer")?;
        let connect = || -> Result<Socket> {
            Ok(match transport {
                Transport::Tcp { .. } => {
                    let stream = TcpStream::connect_timeout(&server, LOST)?;
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(LOST))?;
                    stream.set_write_timeout(Some(LOST))?;
                    Socket::Tcp(stream)
                }
                Transport::Udp { .. } => {
                    let socket = UdpSocket::bind(any)?;
                    socket.connect(server)?;
                    socket.set_read_timeout(Some(LOST))?;
                    Socket::Udp(socket)
                }
            })
        };
        let mut flow = Flight { peer: Some(peer) };
        let socket = from
            .within(connect)
            .with_context(|| format!("connecting to {server}"))?;
        let peer = flow.peer.take().context("a peer that was taken")?;
        Ok(Self {
            transport,
            cpu,
            socket,
            peer,
        })
    }

    /// Makes transactions for a time; returns how many a second were made.
    pub(super) fn run(&mut self, time: Duration) -> Result<f64> {
        let (cpu, transport, socket) = (self.cpu, self.transport, &mut self.socket);
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    pin(cpu)?;
                    transactions(socket, transport, time)
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

fn transactions(socket: &mut Socket, transport: Transport, time: Duration) -> Result<f64> {
    let message = vec![
        0;
        match transport {
            Transport::Tcp { quota } => quota.min(CHUNK),
            Transport::Udp { size, .. } => size,
        }
    ];
    let mut answer = [0; 16];
    let mut done = 0_u32;
    let start = Instant::now();
    loop {
        match (&mut *socket, transport) {
            (Socket::Tcp(stream), Transport::Tcp { quota }) => {
                let mut left = quota;
                while left > 0 {
                    let length = left.min(message.len());
                    stream.write_all(&message[..length]).context("sending")?;
                    left -= length;
                }
                stream
                    .read_exact(&mut answer[..1])
                    .context("waiting for the answer")?;
            }
            (Socket::Udp(socket), Transport::Udp { quota, .. }) => {
                for _ in 0..quota {
                    socket.send(&message).context("sending")?;
                }
                socket
                    .recv(&mut answer)
                    .context("waiting for the answer: a datagram was lost")?;
            }
            _ => bail!("a flow of another transport"),
        }
        done += 1;
        let elapsed = start.elapsed();
        if elapsed >= time {
            return Ok(f64::from(done) / elapsed.as_secs_f64());
        }
    }
}

/// A peer whose flow is not connected yet.
struct Flight {
    peer: Option<Child>,
}

impl Drop for Flight {
    fn drop(&mut self) {
        if let Some(peer) = &mut self.peer {
            end(peer);
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        end(&mut self.peer);
    }
}

fn end(peer: &mut Child) {
    // It may have ended by itself.
    let _ = peer.kill();
    let _ = peer.wait();
}

/// Binds the calling thread to a CPU.
fn pin(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus))
        .with_context(|| format!("binding to CPU {cpu}"))
}
