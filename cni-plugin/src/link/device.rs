//! Devices: looking them up, creating veth pairs, changing and deleting them.

use std::{
    collections::BTreeSet,
    fmt,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth,
        LinkAttribute, LinkExtentMask, LinkFlags, LinkHeader, LinkInfo, LinkLayerType, LinkMessage,
        LinkXdp, State,
    },
};
use rtnetlink::packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL,
    NlasIterator, ParseableParametrized as _,
};

use super::{Address, LinkError, Netlink, netlink::poll};
use crate::mac::MacAddr;
use crate::netns::Netns;

/// A device as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index, unique in its namespace while it exists.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its alias (`ip link … alias`), empty if it has none.
    pub alias: String,
    /// What kind of virtual device it is, by the kernel's name (`veth`, `bridge`,
    /// …); empty for a physical or loopback device.
    pub kind: String,
    /// Whether its frames are Ethernet's (`ARPHRD_ETHER`); not so those of the
    /// loopback device, and of most tunnels.
    pub ethernet: bool,
    /// Its Ethernet address; `None` for a device that has none.
    pub mac: Option<MacAddr>,
    /// Largest packet, in bytes, without the Ethernet header.
    pub mtu: u32,
    /// Whether it is set up.
    pub up: bool,
    /// Whether it is up and its peer is too, so that packets pass (`IF_OPER_UP`).
    pub running: bool,
    /// Whether somebody set it promiscuous by name (`IFF_PROMISC`); a packet
    /// socket or a bridge that needs it does not count here.
    pub promisc: bool,
    /// Index of the device it belongs to (a bridge, a bond).
    pub master: Option<u32>,
    /// Index of the device below it; for a veth its peer, in the namespace
    /// [`peer_netns_id`](Self::peer_netns_id) says.
    pub peer_index: Option<u32>,
    /// Number by which the connection's namespace knows that of the peer (`ip
    /// netns list-id`); `None` when the peer is in the same one.
    pub peer_netns_id: Option<i32>,
    /// The XDP program that it carries.
    pub xdp: Option<Xdp>,
}

/// An XDP program on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xdp {
    /// The kernel's id of it.
    pub program: u32,
    /// Whether it runs behind the driver and not in it (`xdpgeneric`).
    pub generic: bool,
}

/// A veth pair to be made by [`Netlink::create_veth`].
#[derive(Clone, Copy, Debug)]
pub struct VethSpec<'a> {
    /// Name of the end in the connection's namespace.
    pub name: &'a str,
    /// Its Ethernet address; `None` lets the kernel choose.
    pub mac: Option<MacAddr>,
    /// Name of the peer.
    pub peer_name: &'a str,
    /// Its Ethernet address; `None` lets the kernel choose.
    pub peer_mac: Option<MacAddr>,
    /// The namespace in which the peer is born; `None` for the connection's own.
    pub peer_netns: Option<&'a Netns>,
    /// MTU of both ends in bytes; 0 is the kernel's default of 1500.
    pub mtu: u32,
}

/// A new veth pair: the indices of its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VethIndices {
    /// The end in the connection's namespace.
    pub host: u32,
    /// The peer, in its own namespace.
    pub peer: u32,
    /// Their MTU in bytes.
    pub mtu: u32,
}

/// Changes to a device, made by one request ([`Netlink::configure`]). What is
/// `None`, `false` or empty stays as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkSettings<'a> {
    /// Set it up, or down.
    pub up: Option<bool>,
    /// The Ethernet address. A veth may change it while it is up.
    pub mac: Option<MacAddr>,
    /// The MTU in bytes.
    pub mtu: Option<u32>,
    /// The alias, at most 255 bytes; an empty one takes it away.
    pub alias: Option<&'a str>,
    /// Promiscuous or not.
    pub promisc: Option<bool>,
    /// Give it no IPv6 link-local address of the kernel's making (`addrgenmode
    /// none`). For a device on which the host must not be addressed, without
    /// switching off what arrives over IPv6 as `disable_ipv6` does. It has to be
    /// set before the device gets its carrier.
    pub no_link_local: bool,
    /// Settings of `/proc/sys/net/ipv4/conf/<device>`, which cost nothing here.
    pub ipv4: &'a [(Ipv4Conf, u32)],
}

impl LinkSettings<'_> {
    fn to_message(self, index: u32) -> LinkMessage {
        let mut change = LinkMessage::default();
        change.header.index = index;
        for (flag, value) in [(LinkFlags::Up, self.up), (LinkFlags::Promisc, self.promisc)] {
            if let Some(value) = value {
                change.header.change_mask |= flag;
                change.header.flags.set(flag, value);
            }
        }
        let attributes = &mut change.attributes;
        if let Some(mac) = self.mac {
            attributes.push(LinkAttribute::Address(mac.octets().to_vec()));
        }
        if let Some(mtu) = self.mtu {
            attributes.push(LinkAttribute::Mtu(mtu));
        }
        if let Some(alias) = self.alias {
            // Not the crate's `IfAlias`: it adds a NUL, and the kernel keeps the
            // alias by its length.
            attributes.push(LinkAttribute::Other(DefaultNla::new(
                IFLA_IFALIAS,
                alias.as_bytes().to_vec(),
            )));
        }
        let mut families = Vec::new();
        if self.no_link_local {
            families.push(AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
                In6AddrGenMode::None,
            )]));
        }
        if !self.ipv4.is_empty() {
            families.push(AfSpecUnspec::Inet(vec![ipv4_conf(self.ipv4)]));
        }
        if !families.is_empty() {
            attributes.push(LinkAttribute::AfSpecUnspec(families));
        }
        change
    }
}

impl fmt::Display for LinkSettings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(up) = self.up {
            parts.push(if up { "up" } else { "down" }.to_owned());
        }
        if let Some(mac) = self.mac {
            parts.push(format!("address {mac}"));
        }
        if let Some(mtu) = self.mtu {
            parts.push(format!("mtu {mtu}"));
        }
        if let Some(alias) = self.alias {
            parts.push(format!("alias {alias:?}"));
        }
        if let Some(promisc) = self.promisc {
            parts.push(format!("promisc {}", if promisc { "on" } else { "off" }));
        }
        if self.no_link_local {
            parts.push("addrgenmode none".to_owned());
        }
        for (key, value) in self.ipv4 {
            parts.push(format!("{key:?} {value}"));
        }
        f.write_str(&parts.join(", "))
    }
}

/// A setting of `/proc/sys/net/ipv4/conf/<device>` that can be made by
/// [`LinkSettings::ipv4`], and has no effect but on the device itself.
///
/// The values are the kernel's `IPV4_DEVCONF_*` (`include/uapi/linux/ip.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Ipv4Conf {
    /// `proxy_arp`.
    ProxyArp = 3,
    /// `accept_redirects`, on a node that forwards; one that does not takes them if either
    /// the device or `all` says so.
    AcceptRedirects = 4,
    /// `send_redirects`.
    SendRedirects = 6,
    /// `rp_filter`; the kernel takes the larger of the device's and `all`'s.
    RpFilter = 8,
    /// `arp_notify`: announce an address when the device comes up.
    ArpNotify = 22,
    /// `accept_local`.
    AcceptLocal = 23,
    /// `route_localnet`.
    RouteLocalnet = 26,
}

/// `IFLA_INET_CONF` of the kernel's `include/uapi/linux/if_link.h`.
const IFLA_INET_CONF: u16 = 1;

impl Netlink {
    /// Looks up a device by its name; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`], with `ERANGE` or `EINVAL` for a name that no
    /// device can have.
    pub fn link_by_name(&self, name: &str) -> Result<Option<Link>, LinkError> {
        let mut query = LinkMessage::default();
        query
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        self.link(query, || format!("look up interface {name}"))
    }

    /// Looks up a device by its index; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn link_by_index(&self, index: u32) -> Result<Option<Link>, LinkError> {
        let mut query = LinkMessage::default();
        query.header.index = index;
        self.link(query, || format!("look up interface number {index}"))
    }

    /// Every device of the namespace.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn links(&self) -> Result<Vec<Link>, LinkError> {
        let mut query = LinkMessage::default();
        query
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let all = self.dump(&RouteNetlinkMessage::GetLink(query), || {
            "list interfaces".to_owned()
        })?;
        Ok(links(all).collect())
    }

    /// The devices that have these addresses, each once, in the order of their
    /// indices. One look-up for each: they are few, whereas each pod has a device.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn links_with(&self, addresses: &[Address]) -> Result<Vec<Link>, LinkError> {
        let indices: BTreeSet<u32> = addresses.iter().map(|address| address.ifindex).collect();
        indices
            .into_iter()
            .filter_map(|index| self.link_by_index(index).transpose())
            .collect()
    }

    fn link(
        &self,
        mut query: LinkMessage,
        operation: impl Fn() -> String,
    ) -> Result<Option<Link>, LinkError> {
        // The counters are most of the answer, and nobody wants them here.
        query
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        match self.request(RouteNetlinkMessage::GetLink(query), 0, &operation) {
            Ok(messages) => match find_link(messages) {
                Some(link) => Ok(Some(link)),
                None => Err(LinkError::Protocol {
                    operation: operation(),
                    problem: "the kernel answered without a device",
                }),
            },
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates a veth pair, its peer already in its namespace and under its
    /// name. Both ends are down. One request; before Linux 6.2, which does not
    /// echo what it made, a second one to look it up.
    ///
    /// Alias, `addrgenmode` and the rest are for [`configure`](Self::configure):
    /// the kernel ignores them when a device is made.
    ///
    /// # Errors
    ///
    /// [`LinkError::Exists`] says which name is taken, then nothing was made;
    /// [`LinkError::Refused`].
    pub fn create_veth(&self, spec: &VethSpec<'_>) -> Result<VethIndices, LinkError> {
        let end = |name: &str, mac: Option<MacAddr>| {
            let mut end = LinkMessage::default();
            end.attributes.push(LinkAttribute::IfName(name.to_owned()));
            if let Some(mac) = mac {
                end.attributes
                    .push(LinkAttribute::Address(mac.octets().to_vec()));
            }
            if spec.mtu != 0 {
                end.attributes.push(LinkAttribute::Mtu(spec.mtu));
            }
            end
        };
        let mut peer = end(spec.peer_name, spec.peer_mac);
        if let Some(netns) = spec.peer_netns {
            peer.attributes
                .push(LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()));
        }
        let mut pair = end(spec.name, spec.mac);
        pair.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        let operation = || format!("create veth pair {} and {}", spec.name, spec.peer_name);
        let made = self
            .request(
                RouteNetlinkMessage::NewLink(pair),
                NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO,
                operation,
            )
            .map_err(|error| {
                if error.errno() == Some(nix::libc::EEXIST) {
                    self.whose_name_is_taken(spec)
                } else {
                    error
                }
            })?;
        let host = match find_link(made) {
            Some(link) => Some(link),
            None => self.link_by_name(spec.name)?,
        };
        match host {
            Some(Link {
                index: host,
                peer_index: Some(peer),
                mtu,
                ..
            }) => Ok(VethIndices { host, peer, mtu }),
            _ => Err(LinkError::Protocol {
                operation: operation(),
                problem: "the new device has no peer",
            }),
        }
    }

    fn whose_name_is_taken(&self, spec: &VethSpec<'_>) -> LinkError {
        let on_host = |name| self.link_by_name(name);
        let (name, in_sandbox) = match on_host(spec.name) {
            Err(error) => return error,
            Ok(Some(_)) => (spec.name, false),
            Ok(None) => (spec.peer_name, spec.peer_netns.is_some()),
        };
        LinkError::Exists {
            name: name.to_owned(),
            in_sandbox,
        }
    }

    /// Changes a device, by one request.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`], [missing](LinkError::is_missing) if there is no
    /// such device. The kernel takes settings in an order of its own; those
    /// before the one it refused stay made.
    pub fn configure(&self, index: u32, settings: &LinkSettings<'_>) -> Result<(), LinkError> {
        let made = self.request(
            RouteNetlinkMessage::SetLink(settings.to_message(index)),
            0,
            || format!("configure {} ({settings})", self.interface(index)),
        );
        match made {
            Ok(_) => Ok(()),
            // Where there is no IPv6 (switched off, or an MTU below 1280) there
            // is nothing to be kept away.
            Err(error)
                if settings.no_link_local && error.errno() == Some(nix::libc::EAFNOSUPPORT) =>
            {
                self.configure(
                    index,
                    &LinkSettings {
                        no_link_local: false,
                        ..*settings
                    },
                )
            }
            Err(error) => Err(error),
        }
    }

    /// Sets a device up.
    ///
    /// Of a veth pair, the end that is set up second has its carrier, can send
    /// and (unless told otherwise) has its IPv6 link-local address at once; the
    /// other follows when the kernel's link watch has run. Set the sandbox's up
    /// last.
    ///
    /// # Errors
    ///
    /// As [`configure`](Self::configure).
    pub fn set_up(&self, index: u32) -> Result<(), LinkError> {
        self.configure(
            index,
            &LinkSettings {
                up: Some(true),
                ..LinkSettings::default()
            },
        )
    }

    /// Waits until a device is [running](Link::running), at most `limit`;
    /// returns whether it is.
    ///
    /// Of a veth pair, the end that was set up first drops what it is to send
    /// until the kernel's link watch has seen its carrier.
    ///
    /// # Errors
    ///
    /// As [`link_by_index`](Self::link_by_index).
    pub fn wait_running(&self, index: u32, limit: Duration) -> Result<bool, LinkError> {
        let mut gone = false;
        let answered = poll(limit, || {
            let link = self.link_by_index(index)?;
            gone = link.is_none();
            Ok(link.is_none_or(|link| link.running))
        })?;
        Ok(answered && !gone)
    }

    /// Deletes a device; a veth takes its peer with it. `false` if there was
    /// none.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn delete(&self, index: u32) -> Result<bool, LinkError> {
        let mut target = LinkMessage::default();
        target.header.index = index;
        match self.request(RouteNetlinkMessage::DelLink(target), 0, || {
            format!("delete {}", self.interface(index))
        }) {
            Ok(_) => Ok(true),
            Err(error) if error.is_missing() => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// `IFLA_IFALIAS` of the kernel's `include/uapi/linux/if_link.h`.
const IFLA_IFALIAS: u16 = 20;

/// Not the crate's `DevConfRequest`: that one leaves out what is to become 0.
fn ipv4_conf(settings: &[(Ipv4Conf, u32)]) -> AfSpecInet {
    let settings: Vec<_> = settings
        .iter()
        .map(|&(key, value)| DefaultNla::new(key as u16, value.to_ne_bytes().to_vec()))
        .collect();
    let mut nested = vec![0; settings.as_slice().buffer_len()];
    settings.as_slice().emit(&mut nested);
    AfSpecInet::Other(DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, nested))
}

/// The attributes that a [`Link`] is made of, by their numbers in the kernel's
/// `include/uapi/linux/if_link.h`: name, alias, address, MTU, state, master, peer, the
/// peer's namespace, kind and XDP.
const WANTED: [u16; 10] = [3, IFLA_IFALIAS, 1, 4, 16, 10, 5, 37, 18, 43];

/// Reads what the kernel tells of a device, as far as anybody here wants to know: the rest is
/// most of it, and takes longer to read than the kernel takes to tell.
pub(super) fn parse(payload: &[u8]) -> Result<LinkMessage, DecodeError> {
    let mut message = LinkMessage::default();
    message.header = LinkHeader::parse(payload)?;
    let family = message.header.interface_family;
    let attributes = payload.get(message.header.buffer_len()..);
    for attribute in NlasIterator::new(attributes.unwrap_or_default()) {
        let attribute = attribute?;
        if WANTED.contains(&attribute.kind()) {
            let attribute = LinkAttribute::parse_with_param(&attribute, family)?;
            message.attributes.push(attribute);
        }
    }
    Ok(message)
}

fn find_link(messages: Vec<RouteNetlinkMessage>) -> Option<Link> {
    links(messages).next()
}

fn links(messages: Vec<RouteNetlinkMessage>) -> impl Iterator<Item = Link> {
    messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(link.into()),
        _ => None,
    })
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let LinkMessage {
            header, attributes, ..
        } = message;
        let mut link = Self {
            index: header.index,
            name: String::new(),
            alias: String::new(),
            kind: String::new(),
            ethernet: header.link_layer_type == LinkLayerType::Ether,
            mac: None,
            mtu: 0,
            up: header.flags.contains(LinkFlags::Up),
            running: false,
            promisc: header.flags.contains(LinkFlags::Promisc),
            master: None,
            peer_index: None,
            peer_netns_id: None,
            xdp: None,
        };
        for attribute in attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::Address(octets) => {
                    link.mac = octets.try_into().ok().map(MacAddr::new)
                }
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::OperState(state) => link.running = state == State::Up,
                LinkAttribute::Controller(index) => link.master = Some(index),
                LinkAttribute::Link(index) => link.peer_index = Some(index),
                LinkAttribute::LinkNetNsId(id) => link.peer_netns_id = Some(id),
                LinkAttribute::Xdp(parts) => {
                    for part in parts {
                        let (program, generic) = match part {
                            LinkXdp::DrvProgId(id) | LinkXdp::HwProgId(id) => (id, false),
                            LinkXdp::SkbProgId(id) => (id, true),
                            _ => continue,
                        };
                        link.xdp = Some(Xdp { program, generic });
                    }
                }
                LinkAttribute::LinkInfo(info) => {
                    for part in info {
                        if let LinkInfo::Kind(kind) = part {
                            link.kind = kind.to_string();
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::link::testing::{self, sys};

    const MAC: MacAddr = MacAddr::new([0x02, 0, 0x5e, 0, 0, 1]);
    const PEER_MAC: MacAddr = MacAddr::new([0x02, 0, 0x5e, 0, 0, 2]);

    fn spec<'a>(sandbox: &'a Netns) -> VethSpec<'a> {
        VethSpec {
            name: "veth0123456789a",
            mac: Some(MAC),
            peer_name: "eth0",
            peer_mac: Some(PEER_MAC),
            peer_netns: Some(sandbox),
            mtu: 9000,
        }
    }

    #[test]
    fn a_veth_pair_is_born_where_it_belongs() {
        let (host, sandbox) = (testing::netns(), testing::netns());
        let netlink = Netlink::open(&host).unwrap();
        let made = netlink.create_veth(&spec(&sandbox)).unwrap();

        let in_host = sys(&host, |class| read_device(class, "veth0123456789a"));
        assert_eq!(
            in_host,
            (made.host, MAC.to_string(), 9000, made.peer, String::new())
        );
        let in_sandbox = sys(&sandbox, |class| read_device(class, "eth0"));
        assert_eq!(
            in_sandbox,
            (
                made.peer,
                PEER_MAC.to_string(),
                9000,
                made.host,
                String::new()
            )
        );
        assert!(sys(&host, |class| !class.join("eth0").exists()));

        let link = netlink.link_by_name("veth0123456789a").unwrap().unwrap();
        assert_eq!(link.index, made.host);
        assert_eq!(link.kind, "veth");
        assert!(link.ethernet);
        assert_eq!(link.mac, Some(MAC));
        assert_eq!(link.mtu, 9000);
        assert_eq!(link.peer_index, Some(made.peer));
        assert!(link.peer_netns_id.is_some());
        assert!(!link.up && !link.running && !link.promisc);
        assert_eq!(link.master, None);
        assert_eq!(netlink.link_by_index(made.host).unwrap(), Some(link));
    }

    #[test]
    fn devices_are_found_by_the_addresses_they_carry() {
        let host = testing::netns();
        let netlink = Netlink::open(&host).unwrap();
        let create = |name: &str, kind, attributes: &[LinkAttribute]| {
            let mut message = LinkMessage::default();
            message.attributes = vec![
                LinkAttribute::IfName(name.to_owned()),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
            ];
            message.attributes.extend_from_slice(attributes);
            let create = RouteNetlinkMessage::NewLink(message);
            netlink
                .request(create, NLM_F_CREATE | NLM_F_EXCL, || "create".to_owned())
                .unwrap();
            netlink.link_by_name(name).unwrap().unwrap().index
        };
        let bridge = create("br", InfoKind::Bridge, &[]);
        let port = create("port", InfoKind::Veth, &[LinkAttribute::Controller(bridge)]);
        create("bare", InfoKind::Veth, &[]);
        netlink.set_up(1).unwrap();
        for (index, address) in [
            (bridge, "10.0.0.1/24"),
            (bridge, "fd00::1/64"),
            (port, "10.0.1.1/24"),
        ] {
            let address = address.parse().unwrap();
            netlink.add_address(index, address, false).unwrap();
        }

        let mut addresses = netlink.all_addresses().unwrap();
        // A device that went in between.
        let gone = Address {
            ifindex: 99_999,
            ..addresses[0]
        };
        addresses.push(gone);
        let found = netlink.links_with(&addresses).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|link| (link.name.as_str(), link.kind.as_str(), link.ethernet))
            .zip(found.iter().map(|link| (link.index, link.master)))
            .collect();
        assert_eq!(
            found,
            [
                (("lo", "", false), (1, None)),
                (("br", "bridge", true), (bridge, None)),
                (("port", "veth", true), (port, Some(bridge))),
            ]
        );
    }

    #[test]
    fn both_ends_can_stay_in_one_namespace() {
        let host = testing::netns();
        let netlink = Netlink::open(&host).unwrap();
        let made = netlink
            .create_veth(&VethSpec {
                name: "cni0",
                mac: None,
                peer_name: "cni0-port",
                peer_mac: None,
                peer_netns: None,
                mtu: 0,
            })
            .unwrap();
        let gateway = netlink.link_by_name("cni0").unwrap().unwrap();
        let port = netlink.link_by_name("cni0-port").unwrap().unwrap();
        assert_eq!((gateway.index, port.index), (made.host, made.peer));
        assert_eq!(gateway.peer_netns_id, None);
        assert_eq!((gateway.mtu, port.mtu), (1500, 1500));
    }

    #[test]
    fn a_taken_name_is_named() {
        let (host, sandbox) = (testing::netns(), testing::netns());
        let netlink = Netlink::open(&host).unwrap();
        netlink.create_veth(&spec(&sandbox)).unwrap();

        let error = netlink
            .create_veth(&VethSpec {
                name: "other",
                ..spec(&sandbox)
            })
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "interface eth0 already exists in the sandbox"
        );
        assert_eq!(netlink.link_by_name("other").unwrap(), None);

        let error = netlink
            .create_veth(&VethSpec {
                peer_name: "eth1",
                ..spec(&sandbox)
            })
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "interface veth0123456789a already exists on the host"
        );
        let inside = Netlink::open(&sandbox).unwrap();
        assert_eq!(inside.link_by_name("eth1").unwrap(), None);
    }

    #[test]
    fn settings_are_made_by_one_request() {
        let (host, sandbox) = (testing::netns(), testing::netns());
        let netlink = Netlink::open(&host).unwrap();
        let made = netlink.create_veth(&spec(&sandbox)).unwrap();
        let alias = "bpf-bridge cbr0 0123456789abcdef eth0";
        let mac = MacAddr::new([0x02, 0, 0x5e, 0, 0, 3]);
        let before = host
            .run_in(|| fs::read_to_string("/proc/sys/net/ipv4/conf/veth0123456789a/rp_filter"))
            .unwrap()
            .unwrap();
        let rp_filter = if before.trim() == "0" { 2 } else { 0 };
        netlink
            .configure(
                made.host,
                &LinkSettings {
                    up: Some(true),
                    mac: Some(mac),
                    mtu: Some(1400),
                    alias: Some(alias),
                    promisc: Some(true),
                    no_link_local: true,
                    ipv4: &[
                        (Ipv4Conf::RpFilter, rp_filter),
                        (Ipv4Conf::ArpNotify, 1),
                        (Ipv4Conf::SendRedirects, 0),
                    ],
                },
            )
            .unwrap();

        let link = netlink.link_by_index(made.host).unwrap().unwrap();
        assert!(link.up && link.promisc && !link.running);
        assert_eq!(
            (link.alias.as_str(), link.mac, link.mtu),
            (alias, Some(mac), 1400)
        );
        let in_host = sys(&host, |class| read_device(class, "veth0123456789a"));
        assert_eq!(
            in_host,
            (
                made.host,
                mac.to_string(),
                1400,
                made.peer,
                alias.to_owned()
            )
        );
        let conf = |key: &str| {
            host.run_in(|| {
                fs::read_to_string(format!("/proc/sys/net/{key}"))
                    .unwrap()
                    .trim()
                    .parse::<u32>()
                    .unwrap()
            })
            .unwrap()
        };
        assert_eq!(conf("ipv4/conf/veth0123456789a/rp_filter"), rp_filter);
        assert_eq!(conf("ipv4/conf/veth0123456789a/arp_notify"), 1);
        assert_eq!(conf("ipv4/conf/veth0123456789a/send_redirects"), 0);
        assert_eq!(conf("ipv6/conf/veth0123456789a/addr_gen_mode"), 1);
        assert_eq!(conf("ipv6/conf/veth0123456789a/disable_ipv6"), 0);

        netlink
            .configure(
                made.host,
                &LinkSettings {
                    up: Some(false),
                    promisc: Some(false),
                    alias: Some(""),
                    ..LinkSettings::default()
                },
            )
            .unwrap();
        let link = netlink.link_by_index(made.host).unwrap().unwrap();
        assert!(!link.up && !link.promisc);
        assert_eq!(link.alias, "");
        assert_eq!((link.mac, link.mtu), (Some(mac), 1400));
    }

    #[test]
    fn the_end_set_up_last_works_at_once_and_the_host_end_stays_unaddressed() {
        let (host, sandbox) = (testing::netns(), testing::netns());
        let (outside, inside) = (
            Netlink::open(&host).unwrap(),
            Netlink::open(&sandbox).unwrap(),
        );
        let made = outside.create_veth(&spec(&sandbox)).unwrap();
        outside
            .configure(
                made.host,
                &LinkSettings {
                    up: Some(true),
                    no_link_local: true,
                    ..LinkSettings::default()
                },
            )
            .unwrap();
        inside.set_up(made.peer).unwrap();
        let found = inside.addresses(made.peer).unwrap();
        assert!(
            matches!(found.as_slice(), [address] if address.link_local),
            "{found:?}"
        );
        assert!(
            outside
                .wait_running(made.host, Duration::from_secs(5))
                .unwrap()
        );
        assert_eq!(outside.addresses(made.host).unwrap(), []);
    }

    #[test]
    fn waiting_for_a_peer_that_is_down_ends() {
        let (host, sandbox) = (testing::netns(), testing::netns());
        let netlink = Netlink::open(&host).unwrap();
        let made = netlink.create_veth(&spec(&sandbox)).unwrap();
        netlink.set_up(made.host).unwrap();
        let running = netlink.wait_running(made.host, Duration::from_millis(20));
        assert!(!running.unwrap());
        assert!(
            !netlink
                .wait_running(99_999, Duration::from_secs(60))
                .unwrap()
        );
    }

    #[test]
    fn deleting_takes_both_ends_and_may_be_repeated() {
        let (host, sandbox) = (testing::netns(), testing::netns());
        let netlink = Netlink::open(&host).unwrap();
        let made = netlink.create_veth(&spec(&sandbox)).unwrap();
        assert!(netlink.delete(made.host).unwrap());
        assert!(!netlink.delete(made.host).unwrap());
        assert!(sys(&host, |class| !class.join("veth0123456789a").exists()));
        assert!(sys(&sandbox, |class| !class.join("eth0").exists()));
    }

    #[test]
    fn what_is_not_there_is_no_error_to_look_up_and_one_to_change() {
        let netlink = Netlink::open(&testing::netns()).unwrap();
        assert_eq!(netlink.link_by_name("nosuch").unwrap(), None);
        assert_eq!(netlink.link_by_index(99_999).unwrap(), None);
        let error = netlink.set_up(99_999).unwrap_err();
        assert!(error.is_missing(), "{error}");
        assert_eq!(
            error.to_string(),
            "cannot configure interface number 99999 (up): No such device (os error 19)"
        );
        let error = netlink.link_by_name("a-name-that-is-too-long").unwrap_err();
        assert!(
            error.to_string().contains("a-name-that-is-too-long"),
            "{error}"
        );
    }

    #[test]
    fn the_kernels_words_are_in_the_error() {
        let (host, sandbox) = (testing::netns(), testing::netns());
        let netlink = Netlink::open(&host).unwrap();
        let made = netlink.create_veth(&spec(&sandbox)).unwrap();
        let error = netlink
            .configure(
                made.host,
                &LinkSettings {
                    mtu: Some(70_000),
                    ..LinkSettings::default()
                },
            )
            .unwrap_err();
        assert_eq!(error.errno(), Some(nix::libc::EINVAL));
        assert_eq!(
            error.to_string(),
            "cannot configure interface veth0123456789a (mtu 70000): Invalid argument (os error \
             22): mtu greater than device maximum"
        );
    }

    #[test]
    fn a_device_too_small_for_ipv6_is_configured_all_the_same() {
        let (host, sandbox) = (testing::netns(), testing::netns());
        let netlink = Netlink::open(&host).unwrap();
        let made = netlink
            .create_veth(&VethSpec {
                mtu: 1000,
                ..spec(&sandbox)
            })
            .unwrap();
        let settings = LinkSettings {
            up: Some(true),
            alias: Some("small"),
            no_link_local: true,
            ..LinkSettings::default()
        };
        netlink.configure(made.host, &settings).unwrap();
        let link = netlink.link_by_index(made.host).unwrap().unwrap();
        assert!(link.up);
        assert_eq!((link.alias.as_str(), link.mtu), ("small", 1000));
    }

    type Described = (u32, String, u32, u32, String);

    /// What sysfs says of a device: index, address, MTU, peer's index, alias.
    fn read_device(class: &Path, name: &str) -> Described {
        let read = |key: &str| {
            fs::read_to_string(class.join(name).join(key))
                .unwrap()
                .trim()
                .to_owned()
        };
        (
            read("ifindex").parse().unwrap(),
            read("address"),
            read("mtu").parse().unwrap(),
            read("iflink").parse().unwrap(),
            read("ifalias"),
        )
    }
}
