//! The bare netlink operations: what no plugin that gives a pod a veth pair with two
//! addresses and its routes can go below.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bpf_bridge_tests::Namespace;
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage},
        link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
            RouteType,
        },
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// The addresses of the container, which nobody else on the node of a floor has.
const ADDRESSES: [(IpAddr, u8); 2] = [
    (IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2)), 16),
    (IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2)), 64),
];
/// Whom its default routes lead to.
const GATEWAYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
];

/// An rtnetlink socket of a namespace. It stays open: a plugin, which is a new process each
/// time, must open its own.
pub(super) struct Netlink(Socket);

/// The indices of a veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// Of the end on the node.
    pub(super) host: u32,
    /// Of its peer, in the sandbox.
    pub(super) peer: u32,
}

impl Netlink {
    pub(super) fn open(namespace: &Namespace) -> Result<Self> {
        namespace.within(Self::open_here)
    }

    /// Opens one of the namespace that the calling thread is in.
    pub(super) fn open_here() -> Result<Self> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            std::io::Result::Ok(socket)
        };
        Ok(Self(open().context("opening an rtnetlink socket")?))
    }

    /// Attaches a container: makes a veth pair, `name` here and `eth0` in the namespace
    /// `sandbox` whose socket is `inside`, both ends up, and gives the latter its addresses
    /// and routes. Returns how long that took, too.
    pub(super) fn attach(
        &self,
        name: &str,
        inside: &Self,
        sandbox: &OwnedFd,
    ) -> Result<(Pair, Duration)> {
        let start = Instant::now();
        let told = self
            .request(vec![(
                RouteNetlinkMessage::NewLink(pair(name, sandbox)),
                NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO,
            )])
            .with_context(|| format!("creating the veth pair {name}"))?;
        let pair = told
            .iter()
            .find_map(indices)
            .with_context(|| format!("the kernel did not tell the indices of {name}"))?;
        inside
            .request(configuration(pair.peer))
            .with_context(|| format!("giving the peer of {name} its addresses and routes"))?;
        Ok((pair, start.elapsed()))
    }

    /// Deletes a device by its index, and its peer with it; returns how long that
    /// took.
    pub(super) fn delete(&self, index: u32) -> Result<Duration> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        let start = Instant::now();
        self.request(vec![(RouteNetlinkMessage::DelLink(link), 0)])
            .with_context(|| format!("deleting the device with index {index}"))?;
        Ok(start.elapsed())
    }

    /// Sends requests together, and waits until each is done; returns what the kernel told
    /// besides.
    fn request(&self, requests: Vec<(RouteNetlinkMessage, u16)>) -> Result<Vec<LinkMessage>> {
        let mut left = requests.len();
        let mut sent = Vec::new();
        for (request, flags) in requests {
            let mut message = NetlinkMessage::from(request);
            message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            message.finalize();
            let start = sent.len();
            sent.resize(start + message.buffer_len(), 0);
            message.serialize(&mut sent[start..]);
        }
        self.0.send(&sent, 0).context("sending")?;
        let mut told = Vec::new();
        while left > 0 {
            let (received, _) = self.0.recv_from_full().context("receiving the answer")?;
            let mut rest = &received[..];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .context("reading the answer")?;
                // Each begins at a multiple of four.
                let length = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                match answer.payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => left -= 1,
                    NetlinkPayload::Error(error) => return Err(error.to_io().into()),
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                        told.push(link);
                    }
                    other => bail!("an unexpected answer: {other:?}"),
                }
            }
        }
        Ok(told)
    }
}

/// A veth pair whose end on the node is up as soon as it is there. The peer cannot be: the
/// kernel makes it first, and refuses to set up a veth that is alone.
fn pair(name: &str, sandbox: &OwnedFd) -> LinkMessage {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName("eth0".to_owned()),
        LinkAttribute::NetNsFd(sandbox.as_raw_fd()),
    ];
    let mut pair = up();
    pair.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    pair
}

fn up() -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link
}

fn indices(link: &LinkMessage) -> Option<Pair> {
    let peer = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Link(peer) => Some(*peer),
            _ => None,
        })?;
    let host = link.header.index;
    Some(Pair { host, peer })
}

/// Sets a device up, and gives it its addresses, without duplicate address detection, and
/// its default routes.
fn configuration(index: u32) -> Vec<(RouteNetlinkMessage, u16)> {
    let mut link = up();
    link.header.index = index;
    let mut requests = vec![(RouteNetlinkMessage::SetLink(link), 0)];
    let made = NLM_F_CREATE | NLM_F_EXCL;
    for (address, prefix_len) in ADDRESSES {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.family = family(address);
        message.header.prefix_len = prefix_len;
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
            AddressAttribute::Flags(AddressFlags::Nodad),
        ];
        requests.push((RouteNetlinkMessage::NewAddress(message), made));
    }
    for gateway in GATEWAYS {
        let mut message = RouteMessage::default();
        message.header.address_family = family(gateway);
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            RouteAttribute::Oif(index),
            RouteAttribute::Gateway(match gateway {
                IpAddr::V4(gateway) => RouteAddress::Inet(gateway),
                IpAddr::V6(gateway) => RouteAddress::Inet6(gateway),
            }),
        ];
        requests.push((RouteNetlinkMessage::NewRoute(message), made));
    }
    requests
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The network namespace that is mounted at `path`.
pub(super) fn open_namespace(path: &Path) -> Result<OwnedFd> {
    Ok(File::open(path)
        .with_context(|| format!("opening {}", path.display()))?
        .into())
}
