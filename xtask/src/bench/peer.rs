//! Traffic between two processes that well-known generators cannot make: the bench asks, a
//! process of its own answers.
//!
//! Its turns may be some hundredths of a second (those of sockperf and qperf are whole seconds,
//! and sockperf's IPv4 only), and no packet is ever lost, which the usual blasters cannot promise
//! when both ends share a CPU.
//!
//! A byte goes there and one back (TCP_RR, UDP_RR); over UDP there may be a quota of datagrams
//! after which the answer comes, and only then the asker goes on. [`Connector`] makes a
//! connection for each byte (TCP_CRR), [`Caller`] takes another address for each (UDP_CRR).
//!
//! Both ends run on one CPU: there the cost of a packet is all that decides, and
//! figures repeat within a per cent. On two, the wake-ups between the CPUs weigh
//! more than the network, and vary several-fold.

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    iter::Cycle,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    ops::RangeInclusive,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    process::{Child, Command, Stdio},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, bail, ensure};
use bpf_bridge_tests::{Namespace, Receive as _, ReceiveFrom as _};
use nix::{
    cmsg_space, libc,
    sched::{CpuSet, sched_setaffinity},
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
            SockaddrIn, SockaddrStorage, connect, recvmsg, sendmsg, setsockopt, socket, sockopt,
        },
    },
    unistd::Pid,
};

use super::statistics::Summary;

/// How long the asker waits for an answer; on one node nothing takes this long.
const LOST: Duration = Duration::from_secs(2);
const LOST_MS: u32 = 2000;

/// The transport, and what one transaction consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// A byte there and one back.
    Tcp,
    /// `quota` datagrams of `size` bytes there, one back.
    Udp { quota: usize, size: usize },
    /// A TCP connection for one byte there and one back.
    Connections,
    /// A datagram there and one back, from wherever it went.
    Calls,
}

/// Where a flow starts and where it ends.
#[derive(Clone, Copy)]
pub(super) struct Ends<'a> {
    pub(super) from: &'a Namespace,
    pub(super) to: &'a Namespace,
    /// One of the addresses of `to`, and a port; 0 is one of the kernel's choice.
    pub(super) listen: SocketAddr,
    /// What `from` connects to, if that is not where `to` listens.
    pub(super) through: Option<SocketAddr>,
    /// The CPU of both ends.
    pub(super) cpu: usize,
}

impl Ends<'_> {
    /// What `from` connects to, if `listen` has a port.
    pub(super) fn target(&self) -> SocketAddr {
        self.through.unwrap_or(self.listen)
    }
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
            Transport::Tcp => format!("tcp:1:{}", self.cpu),
            Transport::Udp { quota, .. } => format!("udp:{quota}:{}", self.cpu),
            Transport::Connections => format!("connections:1:{}", self.cpu),
            Transport::Calls => format!("calls:1:{}", self.cpu),
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
            Transport::Tcp => answer_tcp(&TcpListener::from(socket)),
            Transport::Udp { quota, .. } => answer_udp(&UdpSocket::from(socket), quota),
            Transport::Connections => answer_connections(&TcpListener::from(socket)),
            Transport::Calls => answer_calls(&UdpSocket::from(socket)),
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
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp { quota, size: 0 },
            "connections" => Transport::Connections,
            "calls" => Transport::Calls,
            _ => bail!("neither tcp, udp, connections nor calls"),
        };
        let cpu = cpu.parse().context("the CPU")?;
        Ok(Self { transport, cpu })
    }
}

fn answer_tcp(listener: &TcpListener) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut buffer = [0];
    while stream.read(&mut buffer)? > 0 {
        stream.write_all(&buffer)?;
    }
    Ok(())
}

fn answer_udp(socket: &UdpSocket, quota: usize) -> Result<()> {
    let mut buffer = [0; 2048];
    let mut received = 0;
    loop {
        let (_, from) = socket.receive_from(&mut buffer)?;
        received += 1;
        if received == quota {
            received = 0;
            socket.send_to(&[0], from)?;
        }
    }
}

fn answer_connections(listener: &TcpListener) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.read_exact(&mut [0])?;
        stream.write_all(&[0])?;
        // The asker ends it, by a reset.
        let _ = stream.read(&mut [0]);
    }
}

fn answer_calls(socket: &UdpSocket) -> Result<()> {
    let fd = socket.as_raw_fd();
    let mut space = cmsg_space!(libc::in_pktinfo);
    let mut buffer = [0; 16];
    loop {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let no_flags = MsgFlags::empty();
        let message = recvmsg::<SockaddrIn>(fd, &mut slices, Some(&mut space), no_flags)?;
        let asked = message.cmsgs()?.find_map(|control| match control {
            // Of its address only: the device is for the routing tables to choose.
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(libc::in_pktinfo {
                ipi_ifindex: 0,
                ..info
            }),
            _ => None,
        });
        let asked = asked.context("a datagram for nobody")?;
        sendmsg(
            fd,
            &[IoSlice::new(&[0])],
            &[ControlMessage::Ipv4PacketInfo(&asked)],
            no_flags,
            message.address.as_ref(),
        )?;
    }
}

/// The process that answers; killed on drop.
#[derive(Debug)]
struct Peer(Child);

impl Peer {
    /// Listens at the end of `ends`; returns where to connect to, too.
    ///
    /// Must be called by the main thread: the peer ends with the thread that
    /// started it.
    fn start(ends: &Ends<'_>, transport: Transport) -> Result<(Self, SocketAddr)> {
        let (socket, address): (OwnedFd, SocketAddr) = ends
            .to
            .within(|| {
                Ok(
                    if let Transport::Udp { .. } | Transport::Calls = transport {
                        let socket = UdpSocket::bind(ends.listen)?;
                        if transport == Transport::Calls {
                            // Whom a datagram was sent to. The peer is too late to ask.
                            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
                        }
                        let address = socket.local_addr()?;
                        (socket.into(), address)
                    } else {
                        let socket = TcpListener::bind(ends.listen)?;
                        let address = socket.local_addr()?;
                        (socket.into(), address)
                    },
                )
            })
            .with_context(|| format!("listening on {}", ends.listen))?;
        let cpu = ends.cpu;
        let peer = Command::new("/proc/self/exe")
            .args(["bench", "--peer", &PeerTask { transport, cpu }.argument()])
            .stdin(Stdio::from(socket))
            .spawn()
            .context("starting a peer")?;
        Ok((Self(peer), ends.through.unwrap_or(address)))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A flow from one namespace to another, at rest until it is run.
#[derive(Debug)]
pub(super) struct Flow {
    transport: Transport,
    cpu: usize,
    socket: Socket,
    _peer: Peer,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Flow {
    /// Connects to a peer of its own.
    ///
    /// Must be called by the main thread, as [`Peer::start`].
    pub(super) fn start(ends: &Ends<'_>, transport: Transport) -> Result<Self> {
        let (peer, server) = Peer::start(ends, transport)?;
        let connect = || -> Result<Socket> {
            Ok(match transport {
                Transport::Tcp => {
                    let stream = TcpStream::connect_timeout(&server, LOST)?;
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(LOST))?;
                    stream.set_write_timeout(Some(LOST))?;
                    Socket::Tcp(stream)
                }
                Transport::Udp { .. } => {
                    let any: SocketAddr = match server {
                        SocketAddr::V4(_) => ([0; 4], 0).into(),
                        SocketAddr::V6(_) => ([0; 16], 0).into(),
                    };
                    let socket = UdpSocket::bind(any)?;
                    socket.connect(server)?;
                    socket.set_read_timeout(Some(LOST))?;
                    Socket::Udp(socket)
                }
                Transport::Connections | Transport::Calls => bail!("many flows are not one"),
            })
        };
        let socket = ends
            .from
            .within(connect)
            .with_context(|| format!("connecting to {server}"))?;
        Ok(Self {
            transport,
            cpu: ends.cpu,
            socket,
            _peer: peer,
        })
    }

    /// Makes transactions for a time; returns how many a second were made.
    pub(super) fn run(&mut self, time: Duration) -> Result<f64> {
        self.run_telling(time, |_| {})
    }

    /// Makes transactions for a time; tells how long each of them took.
    pub(super) fn run_telling(
        &mut self,
        time: Duration,
        each: impl FnMut(Duration) + Send,
    ) -> Result<f64> {
        let (cpu, transport, socket) = (self.cpu, self.transport, &mut self.socket);
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    pin(cpu)?;
                    transactions(socket, transport, time, each)
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Connects again and again: each connection carries one byte each way.
pub(super) struct Connector<'a> {
    from: &'a Namespace,
    servers: Vec<SocketAddr>,
    cpu: usize,
    _peer: Peer,
}

/// What came of connecting.
#[derive(Clone, Copy, Debug)]
pub(super) struct Connections {
    /// Connections a second, from the first packet to the last.
    pub(super) rate: f64,
    /// The median of how long `connect` took, in µs.
    pub(super) connect: f64,
}

impl<'a> Connector<'a> {
    /// Must be called by the main thread, as [`Peer::start`].
    pub(super) fn start(ends: &Ends<'a>) -> Result<Self> {
        let (peer, server) = Peer::start(ends, Transport::Connections)?;
        Ok(Self {
            from: ends.from,
            servers: vec![server],
            cpu: ends.cpu,
            _peer: peer,
        })
    }

    /// Connects to these addresses in turn: no two connections look the same then for
    /// as long as somebody may remember the first of them.
    pub(super) fn spread(mut self, addresses: &[IpAddr]) -> Self {
        if addresses.is_empty() {
            return self;
        }
        let port = self.servers[0].port();
        self.servers = addresses
            .iter()
            .map(|&address| (address, port).into())
            .collect();
        self
    }

    /// Makes connections for a time.
    pub(super) fn run(&self, time: Duration) -> Result<Connections> {
        self.from.within(|| {
            pin(self.cpu)?;
            let mut connects = Vec::new();
            let mut servers = self.servers.iter().cycle();
            let start = Instant::now();
            loop {
                let &server = servers.next().context("nobody to connect to")?;
                let connect =
                    transact(server).with_context(|| format!("connecting to {server}"))?;
                connects.push(connect.as_secs_f64() * 1e6);
                let elapsed = start.elapsed();
                if elapsed >= time {
                    let rate = connects.len() as f64 / elapsed.as_secs_f64();
                    let summary = Summary::of(&connects).context("no connection was made")?;
                    let connect = summary.median;
                    return Ok(Connections { rate, connect });
                }
            }
        })
    }
}

/// Sends a datagram to one address after another, each of which answers it: to whoever
/// remembers flows, each is a new one.
pub(super) struct Caller {
    socket: UdpSocket,
    port: u16,
    addresses: Cycle<RangeInclusive<u32>>,
    cpu: usize,
    _peer: Peer,
}

impl Caller {
    /// The machine that is called must take all of `addresses` for its own.
    ///
    /// Must be called by the main thread, as [`Peer::start`].
    pub(super) fn start(ends: &Ends<'_>, addresses: RangeInclusive<Ipv4Addr>) -> Result<Self> {
        let (peer, server) = Peer::start(ends, Transport::Calls)?;
        let socket = ends.from.within(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.set_read_timeout(Some(LOST))?;
            Ok(socket)
        })?;
        let (first, last) = addresses.into_inner();
        Ok(Self {
            socket,
            port: server.port(),
            addresses: (first.to_bits()..=last.to_bits()).cycle(),
            cpu: ends.cpu,
            _peer: peer,
        })
    }

    /// Calls for a time; returns how many calls a second were answered.
    pub(super) fn run(&mut self, time: Duration) -> Result<f64> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    pin(self.cpu)?;
                    self.calls(time)
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn calls(&mut self, time: Duration) -> Result<f64> {
        let mut done = 0_u32;
        let start = Instant::now();
        loop {
            let address = self.addresses.next().context("nobody to call")?;
            let server = SocketAddr::from((Ipv4Addr::from_bits(address), self.port));
            self.socket
                .send_to(&[0], server)
                .with_context(|| format!("calling {server}"))?;
            let (_, from) = self
                .socket
                .receive_from(&mut [0])
                .with_context(|| format!("waiting for the answer of {server}"))?;
            ensure!(from == server, "{from} answered for {server}");
            done += 1;
            let elapsed = start.elapsed();
            if elapsed >= time {
                return Ok(f64::from(done) / elapsed.as_secs_f64());
            }
        }
    }
}

/// One connection; returns how long it took until it was made.
fn transact(server: SocketAddr) -> Result<Duration> {
    let family = match server {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // A reset at its end: else its port could not be used again for a minute,
    // and there are no more than some 28,000 of them.
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&socket, sockopt::Linger, &linger)?;
    setsockopt(&socket, sockopt::TcpUserTimeout, &LOST_MS)?;
    let start = Instant::now();
    connect(socket.as_raw_fd(), &SockaddrStorage::from(server))?;
    let connected = start.elapsed();
    let mut stream = TcpStream::from(socket);
    stream.write_all(&[0]).context("sending")?;
    stream
        .read_exact(&mut [0])
        .context("waiting for the answer")?;
    Ok(connected)
}

fn transactions(
    socket: &mut Socket,
    transport: Transport,
    time: Duration,
    mut each: impl FnMut(Duration),
) -> Result<f64> {
    let message = match transport {
        Transport::Udp { size, .. } => vec![0; size],
        _ => vec![0],
    };
    let mut answer = [0; 16];
    let mut done = 0_u32;
    let mut last = Duration::ZERO;
    let start = Instant::now();
    loop {
        match (&mut *socket, transport) {
            (Socket::Tcp(stream), Transport::Tcp) => {
                stream.write_all(&message).context("sending")?;
                stream
                    .read_exact(&mut answer[..1])
                    .context("waiting for the answer")?;
            }
            (Socket::Udp(socket), Transport::Udp { quota, .. }) => {
                for _ in 0..quota {
                    socket.send(&message).context("sending")?;
                }
                socket
                    .receive(&mut answer)
                    .context("waiting for the answer: a datagram was lost")?;
            }
            _ => bail!("a flow of another transport"),
        }
        done += 1;
        let elapsed = start.elapsed();
        each(elapsed - last);
        last = elapsed;
        if elapsed >= time {
            return Ok(f64::from(done) / elapsed.as_secs_f64());
        }
    }
}

/// Binds the calling thread to a CPU.
pub(super) fn pin(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus))
        .with_context(|| format!("binding to CPU {cpu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_told_its_task() {
        for (transport, text) in [
            (Transport::Tcp, "tcp:1:3"),
            (Transport::Udp { quota: 64, size: 0 }, "udp:64:3"),
            (Transport::Connections, "connections:1:3"),
            (Transport::Calls, "calls:1:3"),
        ] {
            let task = PeerTask { transport, cpu: 3 };
            assert_eq!(task.argument(), text);
            let read: PeerTask = text.parse().unwrap();
            assert_eq!((read.transport, read.cpu), (transport, 3));
        }
        for text in ["", "tcp:1", "tcp:0:1", "sctp:1:1", "udp:1:1:1"] {
            assert!(text.parse::<PeerTask>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_connection_is_answered_and_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        thread::scope(|scope| {
            let answering = scope.spawn(move || {
                let (mut stream, _) = listener.accept()?;
                stream.read_exact(&mut [0])?;
                stream.write_all(&[0])?;
                stream.read(&mut [0])
            });
            transact(server).unwrap();
            let end = answering.join().unwrap().unwrap_err();
            assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
        });
        assert!(transact(server).is_err(), "nobody listens any more");
    }

    #[test]
    fn a_call_is_answered_by_whom_it_went_to() {
        let listener = UdpSocket::bind("0.0.0.0:0").unwrap();
        setsockopt(&listener, sockopt::Ipv4PacketInfo, &true).unwrap();
        let port = listener.local_addr().unwrap().port();
        // It never ends; the process of the tests does.
        thread::spawn(move || answer_calls(&listener));
        let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
        asker.set_read_timeout(Some(LOST)).unwrap();
        for number in [1, 2, 200] {
            let server = SocketAddr::from(([127, 0, 0, number], port));
            asker.send_to(&[7], server).unwrap();
            let (_, from) = asker.receive_from(&mut [0]).unwrap();
            assert_eq!(from, server);
        }
    }
}
