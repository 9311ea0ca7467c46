//! Everything that a network can carry, all at once: who counts what comes back.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{EchoServer, Namespace, Network, Node, Offload, Outside, Pod, Receive as _};
use nix::sys::socket::{setsockopt, sockopt};

use crate::{GATEWAY, HOST_PORT, POD_PORT, network, ports};

/// How long anything may take that does come, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a datagram of a steady flow is sent.
const PACE: Duration = Duration::from_millis(3);
/// How much a client has room for, in bytes.
const BUFFER: usize = 8 << 20;
/// How much of a stream is under way at once, in bytes.
const CHUNK: usize = 16 * 1024;

/// A node with two pods, and a neighbour.
pub(crate) struct Stage<'n> {
    pub(crate) network: Network<'n>,
    /// Publishes [`ports`].
    pub(crate) server: Pod,
    pub(crate) client: Pod,
    outside: &'n Outside,
    _servers: Vec<EchoServer>,
    paths: Vec<(&'static str, SocketAddr)>,
}

impl<'n> Stage<'n> {
    pub(crate) fn new(node: &'n Node, outside: &'n Outside, xdp: bool) -> Result<Self> {
        if xdp {
            outside.set_offload("eth0", Offload::TxChecksum, false)?;
        }
        let network = network(node, xdp);
        let server = network.pod_with_ports("server", ports())?;
        let client = network.pod("client")?;
        let mut servers = Vec::new();
        for address in server.addresses() {
            servers.push(EchoServer::start_on(&server, (address, POD_PORT).into())?);
        }
        let gateway = EchoServer::start(node, GATEWAY)?;
        let far = EchoServer::start(outside, Outside::V4.into())?;
        let far_v6 = EchoServer::start(outside, Outside::V6.into())?;
        let published = |address: IpAddr| SocketAddr::new(address, HOST_PORT);
        let paths = vec![
            ("pod to pod", (server.v4()?, POD_PORT).into()),
            ("pod to pod, IPv6", (server.v6()?, POD_PORT).into()),
            ("pod to host", gateway.address()),
            ("host to pod", (server.v4()?, POD_PORT).into()),
            (
                "outside to published port",
                published(Outside::NODE_V4.into()),
            ),
            (
                "outside to published port, IPv6",
                published(Outside::NODE_V6.into()),
            ),
            (
                "node to published port",
                published(Ipv4Addr::LOCALHOST.into()),
            ),
            (
                "node to published port, IPv6",
                published(Ipv6Addr::LOCALHOST.into()),
            ),
            ("pod to published port", published(Outside::NODE_V4.into())),
            ("pod to outside", far.address()),
            ("pod to outside, IPv6", far_v6.address()),
        ];
        servers.extend([gateway, far, far_v6]);
        Ok(Self {
            network,
            server,
            client,
            outside,
            _servers: servers,
            paths,
        })
    }

    fn from(&self, path: &str) -> &Namespace {
        match path.split(' ').next() {
            Some("pod") => &self.client,
            Some("outside") => self.outside,
            _ => self.network.node(),
        }
    }

    /// Runs `work` while everything flows; then nothing may have been lost. `Ok` has how
    /// many new flows got no answer, which is 0 if that is asked for.
    pub(crate) fn under_load<T>(
        &self,
        strictly: bool,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let load = Load::start(self)?;
        // Every flow is there before anything happens.
        thread::sleep(Duration::from_millis(300));
        let done = work();
        thread::sleep(Duration::from_millis(300));
        let lost = load.stop();
        let done = done?;
        let lost = lost?;
        ensure!(
            !strictly || lost.is_empty(),
            "new flows got no answer: {lost:?}"
        );
        // What begins in the moment between may have to begin anew.
        ensure!(
            lost.len() <= 20,
            "too many new flows got no answer: {lost:?}"
        );
        Ok(done)
    }

    /// That every path carries something.
    pub(crate) fn carries_everything(&self) -> Result<()> {
        for &(path, server) in &self.paths {
            let from = self.from(path);
            from.tcp_echo(server, b"hello", PATIENCE)
                .with_context(|| format!("{path} over TCP"))?;
            from.udp_echo(server, b"hello", PATIENCE)
                .with_context(|| format!("{path} over UDP"))?;
        }
        Ok(())
    }
}

/// What flows.
struct Load {
    stop: Arc<AtomicBool>,
    steady: Vec<JoinHandle<Result<()>>>,
    new: Vec<JoinHandle<Result<Vec<String>>>>,
}

impl Load {
    fn start(stage: &Stage) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = Self {
            stop: Arc::clone(&stop),
            steady: Vec::new(),
            new: Vec::new(),
        };
        for &(path, server) in &stage.paths {
            let from = stage.from(path);
            let stream = from
                .within(|| Ok(TcpStream::connect_timeout(&server, PATIENCE)?))
                .with_context(|| format!("{path}: connecting"))?;
            let socket = from.within(|| steady_socket(server))?;
            load.steady.push(spawn(path, &stop, move |stop| {
                echo_stream(&stream, stop).context("a TCP stream")
            }));
            load.steady.push(spawn(path, &stop, move |stop| {
                echo_datagrams(&socket, stop).context("a UDP flow")
            }));
            let sockets = from.within(|| Sockets::new(server))?;
            load.new
                .push(spawn(path, &stop, move |stop| sockets.run(path, stop)));
        }
        Ok(load)
    }

    /// Ends everything, and returns which new flows got no answer.
    fn stop(self) -> Result<Vec<String>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut errors = Vec::new();
        for flow in self.steady {
            if let Err(error) = flow.join().unwrap_or_else(|panic| resume_unwind(panic)) {
                errors.push(format!("{error:#}"));
            }
        }
        let mut lost = Vec::new();
        for flows in self.new {
            match flows.join().unwrap_or_else(|panic| resume_unwind(panic)) {
                Ok(missing) => lost.extend(missing),
                Err(error) => errors.push(format!("{error:#}")),
            }
        }
        ensure!(
            errors.is_empty(),
            "{}; new flows lost: {lost:?}",
            errors.join("; ")
        );
        Ok(lost)
    }
}

fn spawn<T: Send + 'static>(
    path: &'static str,
    stop: &Arc<AtomicBool>,
    work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static,
) -> JoinHandle<Result<T>> {
    let stop = Arc::clone(stop);
    thread::spawn(move || work(&stop).context(path))
}

/// One connection: what is sent comes back, in its order.
fn echo_stream(mut stream: &TcpStream, stop: &AtomicBool) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut number = 0_u32;
    let mut back = vec![0; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        let sent: Vec<u8> = (0..CHUNK / 4)
            .flat_map(|_| {
                number = number.wrapping_add(0x9e37_79b9);
                number.to_ne_bytes()
            })
            .collect();
        stream.write_all(&sent).context("sending")?;
        stream.read_exact(&mut back).context("receiving")?;
        ensure!(back == sent, "other bytes come back");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn steady_socket(server: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(PACE))?;
    Ok(socket)
}

/// Numbered datagrams at a steady rate: each comes back, and only once.
fn echo_datagrams(socket: &UdpSocket, stop: &AtomicBool) -> Result<()> {
    let mut sent = 0_u64;
    let mut seen = HashSet::new();
    let mut next = Instant::now();
    let mut end = None;
    loop {
        if stop.load(Ordering::Relaxed) {
            let end = *end.get_or_insert_with(|| Instant::now() + PATIENCE);
            if seen.len() as u64 == sent || Instant::now() > end {
                break;
            }
        } else if Instant::now() >= next {
            socket.send(&sent.to_ne_bytes()).context("sending")?;
            sent += 1;
            next += PACE;
        }
        let mut number = [0; 8];
        match socket.receive(&mut number) {
            Ok(8) => {
                let number = u64::from_ne_bytes(number);
                ensure!(number < sent && seen.insert(number), "{number} comes twice");
            }
            Ok(length) => anyhow::bail!("an answer of {length} bytes"),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("receiving"),
        }
    }
    let missing: Vec<u64> = (0..sent).filter(|number| !seen.contains(number)).collect();
    ensure!(sent > 20, "only {sent} datagrams were sent");
    ensure!(
        missing.is_empty(),
        "of {sent} datagrams {} were lost: {:?} …",
        missing.len(),
        &missing[..missing.len().min(20)]
    );
    Ok(())
}

/// New connections and new UDP flows, one after the other. A thread of its own has to be in
/// the client's namespace to make sockets.
struct Sockets {
    server: SocketAddr,
    namespace: std::fs::File,
}

impl Sockets {
    fn new(server: SocketAddr) -> Result<Self> {
        let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
        Ok(Self { server, namespace })
    }

    fn run(&self, path: &str, stop: &AtomicBool) -> Result<Vec<String>> {
        nix::sched::setns(&self.namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        let mut lost = Vec::new();
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            let began = Instant::now();
            let talked = || -> Result<()> {
                let mut stream = TcpStream::connect_timeout(&self.server, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.write_all(b"ping")?;
                Ok(stream.read_exact(&mut [0; 4])?)
            };
            if let Err(error) = talked() {
                lost.push(format!("{path}: a new connection ({error})"));
            // Linux sends a SYN again after a second.
            } else if began.elapsed() > Duration::from_millis(990) {
                lost.push(format!("{path}: a SYN"));
            }
            let socket = steady_socket(self.server)?;
            // An answer that is late is no loss.
            socket.set_read_timeout(Some(Duration::from_secs(3)))?;
            socket.send(b"ping").context("a new UDP flow")?;
            if let Err(error) = socket.receive(&mut [0; 4]) {
                lost.push(format!("{path}: a datagram ({error})"));
            }
            count += 1;
            thread::sleep(Duration::from_millis(10));
        }
        ensure!(count > 3, "only {count} new connections were made");
        Ok(lost)
    }
}
