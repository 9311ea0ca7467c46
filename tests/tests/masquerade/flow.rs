//! Flows between a client and a remote machine, with both ends in the test's hands.
//!
//! Every message holds a token of its own, so that none can be taken for another.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    sync::atomic::{AtomicU16, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_tests::{Namespace, RawSocket, ReceiveFrom as _, internet_checksum, when_free};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};

use crate::PATIENCE;

/// The port of every [`Remote`].
pub(crate) const PORT: u16 = 7;

/// What a flow is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp,
    /// From a socket that is connected.
    Udp,
    /// From a socket that names the destination of each datagram.
    UnconnectedUdp,
    /// ICMP's echo; its identifier is the port.
    Echo,
    /// Its ports cannot be changed: the checksum covers them in a way that is too dear
    /// to be updated.
    Sctp,
    /// A protocol without ports, by its number.
    Portless(u8),
}

impl Kind {
    /// Those whose source port (or identifier) can be changed on the way.
    pub(crate) const FREE: [Self; 4] = [Self::Udp, Self::UnconnectedUdp, Self::Tcp, Self::Echo];
    /// Those that have ports.
    pub(crate) const PORTS: [Self; 5] = [
        Self::Udp,
        Self::UnconnectedUdp,
        Self::Tcp,
        Self::Echo,
        Self::Sctp,
    ];
    /// All of them: GRE, and a number for experiments (RFC 3692) among them.
    pub(crate) const ALL: [Self; 7] = [
        Self::Udp,
        Self::UnconnectedUdp,
        Self::Tcp,
        Self::Echo,
        Self::Sctp,
        Self::Portless(47),
        Self::Portless(253),
    ];

    /// The number of what is not TCP or UDP.
    fn protocol(self, v4: bool) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp | Self::UnconnectedUdp => 17,
            Self::Echo if v4 => 1,
            Self::Echo => 58,
            Self::Sctp => 132,
            Self::Portless(protocol) => protocol,
        }
    }
}

fn token() -> [u8; 8] {
    static NEXT: AtomicU64 = AtomicU64::new(0x746f_6b65_0000_0001);
    NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes()
}

/// What stands behind the IP header: of a flow with these ports, the `turn`th message
/// of its direction.
struct Message {
    source: u16,
    destination: u16,
    token: [u8; 8],
}

impl Message {
    fn bytes(&self, kind: Kind, v4: bool, answer: bool, turn: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        match kind {
            Kind::Echo => {
                let (kind, id) = match (v4, answer) {
                    (true, false) => (8, self.source),
                    (true, true) => (0, self.destination),
                    (false, false) => (128, self.source),
                    (false, true) => (129, self.destination),
                };
                bytes.extend([kind, 0, 0, 0]);
                bytes.extend(id.to_be_bytes());
                bytes.extend([0, 1]);
                bytes.extend(self.token);
                if v4 {
                    let sum = internet_checksum(&bytes).to_be_bytes();
                    bytes[2..4].copy_from_slice(&sum);
                }
            }
            Kind::Sctp => {
                const TAG: [u8; 4] = *b"tag.";
                bytes.extend(self.source.to_be_bytes());
                bytes.extend(self.destination.to_be_bytes());
                bytes.extend(if turn == 0 && !answer { [0; 4] } else { TAG });
                bytes.extend([0; 4]);
                // The handshake (RFC 9260, section 5.1), then data.
                let mut chunk = match (turn, answer) {
                    (0, _) => [&[1 + u8::from(answer), 0, 0, 0], &TAG[..], &[0, 1, 0, 0]].concat(),
                    (1, _) => vec![10 + u8::from(answer), 0, 0, 0],
                    _ => vec![0, 3, 0, 0],
                };
                // Streams, and the first sequence number; or those of the data.
                if turn != 1 {
                    chunk.extend([0, 1, 0, 1, 0, 0, 0, 1]);
                }
                if turn > 1 {
                    chunk.extend([0; 4]);
                }
                chunk.extend(self.token);
                let length = u16::try_from(chunk.len()).unwrap_or_default();
                chunk[2..4].copy_from_slice(&length.to_be_bytes());
                bytes.extend(chunk);
                let sum = crc32c(&bytes).to_le_bytes();
                bytes[8..12].copy_from_slice(&sum);
            }
            // GRE of version 0 without options, that carries IPv4.
            Kind::Portless(47) => bytes.extend([&[0, 0, 8, 0], &self.token[..]].concat()),
            _ => bytes.extend(self.token),
        }
        bytes
    }

    /// `None` if it is none of this kind, or of the other direction.
    fn parse(kind: Kind, v4: bool, answer: bool, bytes: &[u8]) -> Option<Self> {
        let port = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk::<2>()?));
        let (source, destination) = match kind {
            Kind::Echo => {
                let wanted = [[128, 129], [8, 0]][usize::from(v4)][usize::from(answer)];
                (*bytes.first()? == wanted).then_some(())?;
                (port(4)?, port(4)?)
            }
            Kind::Sctp => (port(0)?, port(2)?),
            _ => (0, 0),
        };
        Some(Self {
            source,
            destination,
            token: *bytes.last_chunk()?,
        })
    }
}

/// The checksum of SCTP (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    })
}

/// A machine's address that flows go to, on port [`PORT`].
pub(crate) struct Remote {
    pub(crate) address: SocketAddr,
    tcp: TcpListener,
    udp: UdpSocket,
    raw: Vec<(u8, RawSocket)>,
}

impl Remote {
    /// Listens on an address of a machine, whose kernel answers no echo any more.
    pub(crate) fn new(machine: &Namespace, address: impl Into<IpAddr>) -> Result<Self> {
        Self::on(machine, (address, PORT))
    }

    /// As [`Self::new`], on a port of the caller's choice.
    pub(crate) fn on(
        machine: &Namespace,
        (address, port): (impl Into<IpAddr>, u16),
    ) -> Result<Self> {
        let address = SocketAddr::new(address.into(), port);
        let v4 = address.is_ipv4();
        machine.set_sysctl("net/ipv4/icmp_echo_ignore_all", "1")?;
        machine.set_sysctl("net/ipv6/icmp/echo_ignore_all", "1")?;
        let (tcp, udp) = when_free(|| {
            machine.within(|| {
                let tcp = TcpListener::bind(address).with_context(|| address.to_string())?;
                let udp = UdpSocket::bind(address).with_context(|| address.to_string())?;
                Ok((tcp, udp))
            })
        })?;
        tcp.set_nonblocking(true)?;
        let raw = Kind::ALL[3..]
            .iter()
            .map(|kind| {
                let protocol = kind.protocol(v4);
                let socket = RawSocket::open(machine, address.ip(), protocol)?;
                Ok((protocol, socket))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            address,
            tcp,
            udp,
            raw,
        })
    }

    /// A flow from a port (or with an identifier) of the caller's choice, 0 for any.
    /// Nothing but TCP's handshake is sent.
    pub(crate) fn open(&self, kind: Kind, from: &Namespace, port: u16) -> Result<Flow<'_>> {
        self.open_within(kind, from, port, PATIENCE)
    }

    fn open_within(
        &self,
        kind: Kind,
        from: &Namespace,
        port: u16,
        limit: Duration,
    ) -> Result<Flow<'_>> {
        let any: IpAddr = if self.address.is_ipv4() {
            [0; 4].into()
        } else {
            [0; 16].into()
        };
        let near = match kind {
            Kind::Tcp => {
                let stream =
                    when_free(|| from.tcp_connect_from((any, port).into(), self.address, limit))?;
                reset_when_dropped(&stream)?;
                Near::Tcp(stream)
            }
            Kind::Udp | Kind::UnconnectedUdp => Near::Udp(when_free(|| {
                from.within(|| {
                    let socket = udp_socket((any, port).into())?;
                    if kind == Kind::Udp {
                        socket.connect(self.address)?;
                    }
                    Ok(socket)
                })
            })?),
            _ => {
                let protocol = kind.protocol(self.address.is_ipv4());
                Near::Raw(RawSocket::open(from, any, protocol)?)
            }
        };
        let port = match &near {
            Near::Tcp(socket) => socket.local_addr()?.port(),
            Near::Udp(socket) => socket.local_addr()?.port(),
            Near::Raw(_) if port == 0 => {
                static NEXT: AtomicU16 = AtomicU16::new(20_000);
                NEXT.fetch_add(1, Ordering::Relaxed)
            }
            Near::Raw(_) => port,
        };
        Ok(Flow {
            remote: self,
            kind,
            port,
            near,
            far: None,
            limit,
            late: Vec::new(),
            said: 0,
            heard: 0,
            seen: None,
        })
    }

    /// One message there and one back: whom the remote saw.
    pub(crate) fn meet(&self, kind: Kind, from: &Namespace, port: u16) -> Result<SocketAddr> {
        self.open(kind, from, port)?.exchange()
    }

    /// That nothing reaches the remote.
    pub(crate) fn never_meets(&self, kind: Kind, from: &Namespace, port: u16) -> Result<()> {
        let met = self
            .open_within(kind, from, port, crate::SILENCE)
            .and_then(|mut flow| flow.says());
        ensure!(met.is_err(), "{kind:?} to {} met {met:?}", self.address);
        Ok(())
    }

    /// What is answered to a datagram from here.
    pub(crate) fn asks(&self, server: SocketAddr, message: &[u8]) -> Result<Vec<u8>> {
        self.udp.send_to(message, server)?;
        receive(&self.udp, PATIENCE, |from, bytes| {
            (from == server).then(|| bytes.to_vec())
        })?
        .with_context(|| format!("{server} did not answer {}", self.address))
    }

    fn raw(&self, kind: Kind) -> Result<&RawSocket> {
        let protocol = kind.protocol(self.address.is_ipv4());
        let found = self.raw.iter().find(|(number, _)| *number == protocol);
        Ok(&found.context("no such socket")?.1)
    }
}

enum Near {
    Tcp(TcpStream),
    Udp(UdpSocket),
    Raw(RawSocket),
}

/// A client's conversation with a [`Remote`].
pub(crate) struct Flow<'a> {
    remote: &'a Remote,
    kind: Kind,
    /// The client's own port.
    pub(crate) port: u16,
    near: Near,
    far: Option<TcpStream>,
    pub(crate) limit: Duration,
    /// What the remote has yet to hear.
    late: Vec<[u8; 8]>,
    /// How many messages there were in either direction.
    said: u32,
    heard: u32,
    /// Whom the remote saw last.
    pub(crate) seen: Option<SocketAddr>,
}

impl Flow<'_> {
    /// A message to the remote: whom it saw.
    pub(crate) fn says(&mut self) -> Result<SocketAddr> {
        let context = format!(
            "{:?} from {} to {}",
            self.kind, self.port, self.remote.address
        );
        let seen = self
            .try_to_say()
            .with_context(|| format!("{context}: the remote"))?;
        self.seen = Some(seen);
        self.said += 1;
        Ok(seen)
    }

    /// A message from the remote, to whom it saw last.
    pub(crate) fn hears(&mut self) -> Result<()> {
        let context = format!(
            "{:?} from {} to {}, seen as {:?}",
            self.kind, self.port, self.remote.address, self.seen
        );
        self.try_to_hear()
            .with_context(|| format!("{context}: the client"))
    }

    /// Whether the remote's address is of IPv6.
    pub(crate) fn remote_is_v6(&self) -> bool {
        self.remote.address.is_ipv6()
    }

    /// A message that does not arrive, perhaps.
    pub(crate) fn sends(&mut self) -> Result<()> {
        let token = token();
        if self.kind == Kind::Tcp {
            // Its stack sends it until it does arrive.
            self.late.push(token);
        }
        self.send(token)
    }

    /// How many routers its packets may pass, from now on.
    pub(crate) fn set_hop_limit(&self, hops: u8) -> Result<()> {
        let hops = i32::from(hops);
        let set = |socket: BorrowedFd<'_>| match self.remote.address {
            SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4Ttl, &hops),
            SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6Ttl, &hops),
        };
        Ok(match &self.near {
            Near::Tcp(socket) => set(socket.as_fd()),
            Near::Udp(socket) => set(socket.as_fd()),
            Near::Raw(socket) => set(socket.as_fd()),
        }?)
    }

    /// One message there and one back, from whom the remote saw before, if it did.
    pub(crate) fn exchange(&mut self) -> Result<SocketAddr> {
        let before = self.seen;
        let seen = self.says()?;
        if let Some(before) = before {
            ensure!(seen == before, "seen as {before} before, now as {seen}");
        }
        self.hears()?;
        Ok(seen)
    }

    fn send(&mut self, token: [u8; 8]) -> Result<()> {
        let (kind, remote) = (self.kind, self.remote.address);
        let message = Message {
            source: self.port,
            destination: remote.port(),
            token,
        };
        let bytes = message.bytes(kind, remote.is_ipv4(), false, self.said);
        match &self.near {
            Near::Tcp(stream) => {
                let mut stream = stream;
                stream.write_all(&bytes)?;
            }
            Near::Udp(socket) if kind == Kind::Udp => {
                socket.send(&bytes)?;
            }
            Near::Udp(socket) => {
                socket.send_to(&bytes, remote)?;
            }
            Near::Raw(socket) => socket.send(remote.ip(), &bytes)?,
        }
        Ok(())
    }

    fn try_to_say(&mut self) -> Result<SocketAddr> {
        let (kind, v4) = (self.kind, self.remote.address.is_ipv4());
        let token = token();
        self.send(token)?;
        match &self.near {
            Near::Tcp(_) => {
                let far = match &self.far {
                    Some(far) => far,
                    None => self.far.insert(accept(&self.remote.tcp, self.limit)?),
                };
                for late in self.late.drain(..).chain([token]) {
                    read_token(far, late, self.limit)?;
                }
                Ok(far.peer_addr()?)
            }
            Near::Udp(_) => {
                let is_it = |from, bytes: &[u8]| (bytes == token).then_some(from);
                receive(&self.remote.udp, self.limit, is_it)?.context("heard nothing")
            }
            Near::Raw(_) => {
                let found = self.remote.raw(kind)?.receive(self.limit, |from, bytes| {
                    let found = Message::parse(kind, v4, false, bytes)?;
                    (found.token == token).then_some((from, found.source).into())
                })?;
                found.context("heard nothing")
            }
        }
    }

    fn try_to_hear(&mut self) -> Result<()> {
        let (kind, remote) = (self.kind, self.remote.address);
        let seen = self.seen.context("nobody was seen yet")?;
        let message = Message {
            source: remote.port(),
            destination: seen.port(),
            token: token(),
        };
        let bytes = message.bytes(kind, remote.is_ipv4(), true, self.heard);
        self.heard += 1;
        match &self.near {
            Near::Tcp(stream) => {
                let mut far = self.far.as_ref().context("no connection")?;
                far.write_all(&bytes)?;
                read_token(stream, message.token, self.limit)
            }
            Near::Udp(socket) => {
                self.remote.udp.send_to(&bytes, seen)?;
                let heard = receive(socket, self.limit, |from, bytes| {
                    Some((from, bytes.to_vec()))
                })?;
                let (from, bytes) = heard.context("heard nothing")?;
                ensure!(from == remote, "heard {from}");
                ensure!(
                    bytes == message.token,
                    "heard what is another's: {bytes:x?}"
                );
                Ok(())
            }
            Near::Raw(socket) => {
                self.remote.raw(kind)?.send(seen.ip(), &bytes)?;
                let heard = socket.receive(self.limit, |from, bytes| {
                    let found = Message::parse(kind, remote.is_ipv4(), true, bytes)?;
                    let own = match kind {
                        Kind::Portless(_) => true,
                        _ => found.destination == self.port,
                    };
                    own.then_some((from, found.token))
                })?;
                let (from, token) = heard.context("heard nothing")?;
                ensure!(from == remote.ip(), "heard {from}");
                ensure!(
                    token == message.token,
                    "heard what is another's: {token:x?}"
                );
                Ok(())
            }
        }
    }
}

/// A socket of this thread's namespace; the other family may speak from the same port.
pub(crate) fn udp_socket(local: SocketAddr) -> Result<UdpSocket> {
    let family = if local.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    if local.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(local))
        .map_err(io::Error::from)
        .with_context(|| format!("binding to {local}"))?;
    Ok(socket.into())
}

pub(crate) fn reset_when_dropped(stream: &TcpStream) -> Result<()> {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    Ok(setsockopt(stream, sockopt::Linger, &linger)?)
}

fn accept(listener: &TcpListener, limit: Duration) -> Result<TcpStream> {
    let end = Instant::now() + limit;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                // Its port shall be free for the next one.
                reset_when_dropped(&stream)?;
                return Ok(stream);
            }
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
            Err(_) if Instant::now() > end => bail!("was not connected to"),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn read_token(mut stream: &TcpStream, token: [u8; 8], limit: Duration) -> Result<()> {
    stream.set_read_timeout(Some(limit))?;
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).context("heard nothing")?;
    ensure!(bytes == token, "heard what is another's: {bytes:x?}");
    Ok(())
}

/// The first datagram that `wanted` accepts, or `None` when none came within `limit`.
fn receive<T>(
    socket: &UdpSocket,
    limit: Duration,
    wanted: impl Fn(SocketAddr, &[u8]) -> Option<T>,
) -> Result<Option<T>> {
    let end = Instant::now() + limit;
    let mut buffer = [0; 2048];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        let (length, from) = match socket.receive_from(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            received => received?,
        };
        let found = wanted(from, &buffer[..length]);
        if found.is_some() {
            return Ok(found);
        }
    }
}
