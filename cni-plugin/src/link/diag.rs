//! The sockets of a network namespace, through sock_diag.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, SockDiagDestroy, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use nix::libc;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::{Socket, SocketAddr as Kernel, protocols::NETLINK_SOCK_DIAG};
use thiserror::Error;

use crate::{
    cni::Protocol,
    fault::{self, Kind},
};

/// `INET_DIAG_NOCOOKIE` of the kernel's `include/uapi/linux/inet_diag.h`.
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// A question or request about sockets that failed.
#[derive(Debug, Error)]
#[error("cannot {operation}: {source}")]
pub struct DiagError {
    operation: String,
    source: io::Error,
}

/// A socket that takes packets of anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// What it is bound to; the unspecified address is every one.
    pub address: SocketAddr,
    /// Its owner.
    pub uid: u32,
}

/// A connection to the sock_diag of one network namespace.
#[derive(Debug)]
pub struct SockDiag {
    socket: Socket,
}

impl SockDiag {
    /// Connects to the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// [`DiagError`].
    pub fn host() -> Result<Self, DiagError> {
        let open = || {
            let socket = Socket::new(NETLINK_SOCK_DIAG)?;
            socket.connect(&Kernel::new(0, 0))?;
            Ok(Self { socket })
        };
        open().map_err(|source| DiagError {
            operation: "open a sock_diag socket".to_owned(),
            source,
        })
    }

    /// The socket that listens on this address and port (TCP), or is bound to it
    /// (UDP); so is one that does so on every address. One look-up as for a packet,
    /// however many sockets there are.
    ///
    /// Not seen are sockets that are bound to a device, and SCTP's.
    ///
    /// # Errors
    ///
    /// [`DiagError`].
    pub fn listener(
        &self,
        protocol: Protocol,
        address: SocketAddr,
    ) -> Result<Option<Listener>, DiagError> {
        let mut request = request(protocol, address.ip().into());
        let id = &mut request.socket_id;
        match protocol {
            Protocol::Tcp => (id.source_address, id.source_port) = (address.ip(), address.port()),
            // As the packet is addressed, not as the socket is.
            Protocol::Udp => {
                (id.destination_address, id.destination_port) = (address.ip(), address.port());
            }
            Protocol::Sctp => return Ok(None),
        }
        let message = NetlinkMessage::from(SockDiagMessage::InetRequest(request));
        let found = match self.exchange(message, NLM_F_ACK) {
            Ok(found) => found,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(source) => {
                return Err(DiagError {
                    operation: format!("look up who listens on {address}/{protocol}"),
                    source,
                });
            }
        };
        Ok(found.first().map(|socket| Listener {
            address: SocketAddr::new(
                socket.socket_id.source_address,
                socket.socket_id.source_port,
            ),
            uid: socket.uid,
        }))
    }

    /// The port of every socket that [`Self::listener`] could find. One dump for each
    /// family: less than many look-ups, more than a few.
    ///
    /// # Errors
    ///
    /// [`DiagError`].
    pub fn listening(&self, protocol: Protocol) -> Result<HashSet<u16>, DiagError> {
        let states = match protocol {
            Protocol::Tcp => StateFlags::LISTEN,
            // Of UDP that is: not connected.
            Protocol::Udp => StateFlags::CLOSE,
            Protocol::Sctp => return Ok(HashSet::new()),
        };
        let mut ports = HashSet::new();
        for family in [Family::V4, Family::V6] {
            let mut request = request(protocol, family);
            request.states = states.clone();
            let message = NetlinkMessage::from(SockDiagMessage::InetRequest(request));
            let found = self
                .exchange(message, NLM_F_DUMP)
                .map_err(|source| DiagError {
                    operation: format!("list who listens on {protocol}"),
                    source,
                })?;
            ports.extend(found.iter().map(|socket| socket.socket_id.source_port));
        }
        Ok(ports)
    }

    /// Breaks off the UDP sockets that are connected to `remote`: they get the
    /// error ECONNABORTED and are connected no more. Returns how many they were.
    ///
    /// One dump of all UDP sockets, of which the kernel tells those with the port.
    /// A kernel that cannot do it (`CONFIG_INET_DIAG_DESTROY`) leaves them be.
    ///
    /// # Errors
    ///
    /// [`DiagError`].
    pub fn destroy_connected(&self, remote: SocketAddr) -> Result<usize, DiagError> {
        let failed = |source| DiagError {
            operation: format!("break off the UDP sockets that are connected to {remote}"),
            source,
        };
        // Sockets of IPv6 may be connected to an address of IPv4.
        let families: &[Family] = match remote {
            SocketAddr::V4(_) => &[Family::V4, Family::V6],
            SocketAddr::V6(_) => &[Family::V6],
        };
        let mut destroyed = 0;
        for &family in families {
            for socket in self.connected(family, remote).map_err(failed)? {
                let mut request = request(Protocol::Udp, family);
                request.socket_id = socket.socket_id;
                let message = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
                match self.exchange(NetlinkMessage::from(message), NLM_F_ACK) {
                    Ok(_) => {
                        fault::point("destroy socket");
                        destroyed += 1;
                    }
                    Err(error) => match error.raw_os_error() {
                        // It went by itself.
                        Some(libc::ENOENT) => {}
                        Some(libc::EOPNOTSUPP) => return Ok(destroyed),
                        _ => return Err(failed(error)),
                    },
                }
            }
        }
        Ok(destroyed)
    }

    fn connected(&self, family: Family, remote: SocketAddr) -> io::Result<Vec<InetResponseHeader>> {
        let mut request = request(Protocol::Udp, family);
        request.states = StateFlags::ESTABLISHED;
        request.socket_id.destination_port = remote.port();
        let message = NetlinkMessage::from(SockDiagMessage::InetRequest(request));
        let mut found = match self.exchange(message, NLM_F_DUMP) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Vec::new(),
            found => found?,
        };
        found.retain(|socket| {
            socket.socket_id.destination_address.to_canonical() == remote.ip().to_canonical()
        });
        Ok(found)
    }

    /// Sends a request, and reads all of the answer.
    fn exchange<T: NetlinkSerializable>(
        &self,
        mut message: NetlinkMessage<T>,
        flags: u16,
    ) -> io::Result<Vec<InetResponseHeader>> {
        fault::request(Kind::Netlink, "sock_diag")?;
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut found = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                match message.payload {
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket)) => {
                        found.push(socket.header);
                    }
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(io::Error::from_raw_os_error(done.code.saturating_abs()));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(found),
                    _ => {}
                }
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
}

impl From<IpAddr> for Family {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// For sockets of any address and port.
fn request(protocol: Protocol, family: Family) -> InetRequest {
    let (family, any) = match family {
        Family::V4 => (AF_INET, Ipv4Addr::UNSPECIFIED.into()),
        Family::V6 => (AF_INET6, Ipv6Addr::UNSPECIFIED.into()),
    };
    InetRequest {
        family,
        protocol: protocol.number(),
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: 0,
            destination_port: 0,
            source_address: any,
            destination_address: any,
            interface_id: 0,
            cookie: NO_COOKIE,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;
    use crate::link::{Netlink, testing};

    /// Runs `work` in a namespace of its own, with a loopback device.
    fn alone(work: impl FnOnce(&SockDiag)) {
        let netns = testing::netns();
        Netlink::open(&netns).unwrap().set_up(1).unwrap();
        netns.run_in(|| work(&SockDiag::host().unwrap())).unwrap();
    }

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    #[test]
    fn listeners_are_found_on_the_addresses_they_serve() {
        alone(|diag| {
            let tcp = TcpListener::bind("127.0.0.1:80").unwrap();
            let _everywhere = TcpListener::bind("0.0.0.0:81").unwrap();
            let _six = TcpListener::bind("[::1]:82").unwrap();
            let _both = TcpListener::bind("[::]:83").unwrap();
            let _udp = UdpSocket::bind("127.0.0.1:80").unwrap();
            let _udp_everywhere = UdpSocket::bind("0.0.0.0:91").unwrap();
            let _udp_six = UdpSocket::bind("[::1]:92").unwrap();
            let _udp_both = UdpSocket::bind("[::]:93").unwrap();
            for (protocol, asked, expected) in [
                (Protocol::Tcp, "127.0.0.1:80", Some("127.0.0.1:80")),
                (Protocol::Tcp, "127.0.0.2:80", None),
                (Protocol::Tcp, "0.0.0.0:80", None),
                (Protocol::Tcp, "[::1]:80", None),
                (Protocol::Tcp, "127.0.0.1:81", Some("0.0.0.0:81")),
                (Protocol::Tcp, "10.9.9.9:81", Some("0.0.0.0:81")),
                (Protocol::Tcp, "0.0.0.0:81", Some("0.0.0.0:81")),
                (Protocol::Tcp, "[::1]:81", None),
                (Protocol::Tcp, "[::1]:82", Some("[::1]:82")),
                (Protocol::Tcp, "[::]:82", None),
                (Protocol::Tcp, "127.0.0.1:82", None),
                (Protocol::Tcp, "[fd00::1]:83", Some("[::]:83")),
                (Protocol::Tcp, "127.0.0.1:83", Some("[::]:83")),
                (Protocol::Tcp, "127.0.0.1:91", None),
                (Protocol::Udp, "127.0.0.1:80", Some("127.0.0.1:80")),
                (Protocol::Udp, "127.0.0.2:80", None),
                (Protocol::Udp, "127.0.0.1:81", None),
                (Protocol::Udp, "10.9.9.9:91", Some("0.0.0.0:91")),
                (Protocol::Udp, "[::1]:91", None),
                (Protocol::Udp, "[::1]:92", Some("[::1]:92")),
                (Protocol::Udp, "[::2]:92", None),
                (Protocol::Udp, "10.9.9.9:93", Some("[::]:93")),
                (Protocol::Udp, "[fd00::1]:93", Some("[::]:93")),
                (Protocol::Sctp, "127.0.0.1:80", None),
            ] {
                let found = diag.listener(protocol, at(asked)).unwrap();
                let expected = expected.map(|address| Listener {
                    address: at(address),
                    uid: 0,
                });
                assert_eq!(found, expected, "{asked}/{protocol}");
            }
            for (protocol, ports) in [
                (Protocol::Tcp, &[80, 81, 82, 83][..]),
                (Protocol::Udp, &[80, 91, 92, 93]),
                (Protocol::Sctp, &[]),
            ] {
                let listening = diag.listening(protocol).unwrap();
                assert_eq!(listening, ports.iter().copied().collect());
            }
            drop(tcp);
            let address = at("127.0.0.1:80");
            assert_eq!(diag.listener(Protocol::Tcp, address).unwrap(), None);
        });
    }

    #[test]
    fn a_connection_is_no_listener() {
        alone(|diag| {
            let server = TcpListener::bind("127.0.0.1:80").unwrap();
            let client = TcpStream::connect("127.0.0.1:80").unwrap();
            let _accepted = server.accept().unwrap();
            drop(server);
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            udp.connect("127.0.0.1:53").unwrap();
            for (protocol, address) in [
                (Protocol::Tcp, client.local_addr().unwrap()),
                (Protocol::Tcp, at("127.0.0.1:80")),
                (Protocol::Udp, udp.local_addr().unwrap()),
            ] {
                assert_eq!(diag.listener(protocol, address).unwrap(), None);
            }
        });
    }

    #[test]
    fn listeners_of_other_namespaces_are_not_found() {
        let elsewhere = testing::netns();
        let _other = elsewhere
            .run_in(|| TcpListener::bind("0.0.0.0:80").unwrap())
            .unwrap();
        alone(|diag| {
            let found = diag.listener(Protocol::Tcp, at("127.0.0.1:80"));
            assert_eq!(found.unwrap(), None);
        });
    }

    #[test]
    fn connected_udp_sockets_are_told_that_their_remote_is_gone() {
        alone(|diag| {
            let connected = |from: &str, to: &str| {
                let socket = UdpSocket::bind(from).unwrap();
                socket.connect(to).unwrap();
                socket.set_nonblocking(true).unwrap();
                socket
            };
            let error = |socket: &UdpSocket| socket.take_error().unwrap();
            for (remote, hit, missed) in [
                (
                    "127.0.0.2:53",
                    [
                        ("0.0.0.0:0", "127.0.0.2:53"),
                        ("127.0.0.1:0", "127.0.0.2:53"),
                        ("[::]:0", "[::ffff:127.0.0.2]:53"),
                    ],
                    [
                        ("0.0.0.0:0", "127.0.0.2:54"),
                        ("0.0.0.0:0", "127.0.0.3:53"),
                        ("[::]:0", "[::1]:53"),
                    ],
                ),
                (
                    "[::1]:53",
                    [("[::]:0", "[::1]:53"); 3],
                    [
                        ("[::]:0", "[::1]:54"),
                        ("0.0.0.0:0", "127.0.0.1:53"),
                        ("[::]:0", "[::ffff:127.0.0.2]:53"),
                    ],
                ),
            ] {
                let hit = hit.map(|(from, to)| connected(from, to));
                let missed = missed.map(|(from, to)| connected(from, to));
                let _unconnected = UdpSocket::bind("0.0.0.0:0").unwrap();
                assert_eq!(diag.destroy_connected(at(remote)).unwrap(), 3);
                for socket in hit {
                    let error = error(&socket).and_then(|error| error.raw_os_error());
                    assert_eq!(error, Some(libc::ECONNABORTED), "{socket:?}");
                    assert!(socket.peer_addr().is_err());
                }
                for socket in missed {
                    assert!(error(&socket).is_none(), "{socket:?}");
                    socket.peer_addr().unwrap();
                }
                assert_eq!(diag.destroy_connected(at(remote)).unwrap(), 0);
            }
        });
    }

    #[test]
    fn more_sockets_than_one_answer_holds_are_broken_off() {
        alone(|diag| {
            let sockets: Vec<_> = (0..400)
                .map(|_| {
                    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                    socket.connect("127.0.0.2:53").unwrap();
                    socket
                })
                .collect();
            let remote = at("127.0.0.2:53");
            assert_eq!(diag.destroy_connected(remote).unwrap(), sockets.len());
        });
    }
}
