//! Published ports, from the plugin's side: the programs on uplinks and sockets, which
//! are there while a port is published, and the table of who serves what.
//!
//! Claims are made one by one with `BPF_NOEXIST`, which the kernel's batches do not
//! know: the first who writes an entry has the number, whatever else goes wrong.
//! Whoever changes anything here holds the lock of published ports, besides the datapath.

mod xdp;

use std::{
    collections::HashSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    maps::{Array, MapData, MapError, ProgramArray},
    programs::{
        CgroupAttachMode, CgroupSockAddr, ProgramError, SchedClassifier, TcAttachType,
        links::FdLink, tc::TcAttachOptions,
    },
};
use bpf_bridge_common::layout::{
    Address, Mac, Node, PROGRAM_FROM_HOST, PROGRAM_FROM_POD, PUBLISHED_XDP, Published, PublishedKey,
};
use serde::{Deserialize, Serialize};

use super::{
    ANY, Datapath, Error, FILTER_HANDLE, FILTER_PRIORITY, LogLevel, Table, Wire, entries, failed,
    foreign, get, is_missing, object, pinned, pins, refilled, remove, set, table,
};
use crate::{
    link::{Link, Netlink},
    lock::{Lock, Mode},
    mac::MacAddr,
    mount, netns,
};

pub use self::xdp::XdpRun;

/// `BPF_NOEXIST` of `linux/bpf.h`.
const NOEXIST: u64 = 1;
/// The lock under which ports are claimed and uplinks are found.
const LOCK: &str = "/run/bpf-bridge/publish.lock";

/// The programs on tc hooks, and the slots under which `port` calls them.
const CLASSIFIERS: [(&str, Option<u32>); 3] = [
    ("from_pod", Some(PROGRAM_FROM_POD)),
    ("from_host", Some(PROGRAM_FROM_HOST)),
    ("uplink", None),
];
/// The program of uplinks without Ethernet headers, which few nodes have: it is loaded
/// with the first of them.
const TUNNELS: &str = "uplink_l3";
/// The programs on the hooks of sockets.
const SOCKETS: [&str; 8] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
];
/// The maps that are found again by later calls.
const MAPS: [&str; 8] = [
    "PUBLISHED",
    "FLOWS",
    "FRAGMENTS",
    "HELD",
    "ADDRESSES",
    "PEERS",
    "NODE",
    "XDP_UPLINKS",
];
/// The pin that says that all is there.
const LAST: &str = "uplink";

/// One number of one protocol on an address of the node, or on all of a family: what a
/// pod can claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodePort {
    /// The address; the unspecified one stands for all of its family.
    pub address: IpAddr,
    /// The number.
    pub port: u16,
    /// The protocol's number in the IP header.
    pub protocol: u8,
}

impl NodePort {
    fn key(&self) -> PublishedKey {
        PublishedKey {
            address: octets(self.address),
            port: self.port,
            protocol: self.protocol,
            reserved: 0,
        }
    }

    fn of(key: PublishedKey) -> Self {
        Self {
            address: address(key.address),
            port: key.port,
            protocol: key.protocol,
        }
    }

    /// The same number on all addresses of the family.
    fn everywhere(&self) -> Self {
        let address = match self.address {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Self { address, ..*self }
    }

    fn is_everywhere(&self) -> bool {
        self.address.is_unspecified()
    }
}

impl std::fmt::Display for NodePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = match self.protocol {
            6 => "tcp",
            17 => "udp",
            _ => "sctp",
        };
        let address = SocketAddr::new(self.address, self.port);
        write!(f, "{address}/{protocol}")
    }
}

/// Who serves a claimed port.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    /// The ifindex of the pod's host veth: the owner.
    pub port: u32,
    /// The pod's segment.
    pub segment: u32,
    /// The pod's address, of the family of the claim.
    pub address: IpAddr,
    /// The port that the pod listens on.
    pub pod_port: u16,
    /// The pod's MAC address.
    pub mac: MacAddr,
    /// The gateway's address of the family, if it has one.
    pub gateway: Option<IpAddr>,
    /// The gateway's MAC address.
    pub gateway_mac: MacAddr,
    /// Whether the pod's end of the veth takes what XDP redirects.
    pub xdp: bool,
}

impl Service {
    fn entry(&self) -> Published {
        Published {
            address: octets(self.address),
            gateway: self.gateway.map_or(Address::UNSPECIFIED, octets),
            port: self.port,
            segment: self.segment,
            specific: 0,
            pod_port: self.pod_port,
            mac: self.mac.octets(),
            gateway_mac: self.gateway_mac.octets(),
            flags: if self.xdp { PUBLISHED_XDP } else { 0 },
        }
    }
}

type Calls = ProgramArray<MapData>;

/// Whether the programs are loaded.
pub(super) fn is_loaded() -> bool {
    pins::nat(LAST).exists()
}

/// Loads the programs, attaches those on sockets, and lets `port` call the others. The
/// lock of the pins is held alone.
pub(super) fn load() -> Result<(), Error> {
    // What a call that was killed has left may be of maps that are gone.
    remove_links()?;
    remove_pins(&xdp::program_pin())?;
    remove_pins(&pins::nat(TUNNELS))?;
    pins::create_nat()?;
    let mut ebpf = loader().load(object::NAT)?;
    // 0 stands for the machine's first namespace, where nothing else can be said.
    let netns = netns::cookie()
        .map_err(|source| {
            failed(
                "naming the network namespace for",
                "NODE",
                &0,
                MapError::IoError(source),
            )
        })?
        .unwrap_or(0);
    let mut node: Array<_, Wire<Node>> =
        Array::try_from(pinned("NODE")?).map_err(|source| foreign("NODE", &source))?;
    node.set(0, Wire(Node { netns }), 0)
        .map_err(|source| failed("writing", "NODE", &0, source))?;

    let root = mount::cgroup_root()?;
    for name in SOCKETS {
        let error = |source| Error::program(name, source);
        let program: &mut CgroupSockAddr = ebpf
            .program_mut(name)
            .ok_or(ProgramError::NotLoaded)
            .and_then(TryInto::try_into)
            .map_err(error)?;
        program.load().map_err(error)?;
        let id = program
            .attach(root.as_fd(), CgroupAttachMode::Single)
            .map_err(error)?;
        let link = program.take_link(id).map_err(error)?;
        pin_link(FdLink::try_from(link), &pins::link(name))?;
    }
    for (name, slot) in CLASSIFIERS {
        let program = object::load_program(&mut ebpf, name)?;
        if let Some(slot) = slot {
            for level in LogLevel::ALL {
                if let Some(mut calls) = calls(level)? {
                    fill(&mut calls, slot, name, program)?;
                }
            }
        }
        pin_program(name, program)?;
    }
    Ok(())
}

fn pin_program(name: &str, program: &mut SchedClassifier) -> Result<(), Error> {
    let path = pins::nat(name);
    // What a load that was killed has left.
    let _ = fs::remove_file(&path);
    program.pin(&path).map_err(|source| Error::Pin {
        path,
        source: io::Error::other(source),
    })
}

/// Lets the programs of `level`, which are about to be loaded, call those of published
/// ports, if there are any.
pub(super) fn fill_slots(level: LogLevel) -> Result<(), Error> {
    let Some(mut calls) = calls(level)? else {
        return Ok(());
    };
    if !is_loaded() {
        return clear_slots(&mut calls);
    }
    for (name, slot) in CLASSIFIERS {
        if let Some(slot) = slot {
            fill(&mut calls, slot, name, &open_classifier(name)?)?;
        }
    }
    Ok(())
}

/// A loader that makes or finds the maps where they are pinned.
fn loader<'a>() -> EbpfLoader<'a> {
    let mut loader = object::loader();
    for name in MAPS.into_iter().chain(["PORTS", "STATS"]) {
        loader.map_pin_path(name, pins::map(name));
    }
    loader
}

fn fill(calls: &mut Calls, slot: u32, name: &str, program: &SchedClassifier) -> Result<(), Error> {
    let fd = program
        .fd()
        .map_err(|source| Error::program(name, source))?;
    calls
        .set(slot, fd, 0)
        .map_err(|source| failed("writing", "PROGRAMS", &slot, source))
}

fn clear_slots(calls: &mut Calls) -> Result<(), Error> {
    for slot in CLASSIFIERS.iter().filter_map(|(_, slot)| *slot) {
        match calls.clear_index(&slot) {
            Ok(()) => {}
            Err(error) if is_missing(&error) => {}
            Err(source) => return Err(failed("clearing", "PROGRAMS", &slot, source)),
        }
    }
    Ok(())
}

/// Takes the programs away again. The lock of the pins is held alone.
pub(super) fn unload() -> Result<(), Error> {
    // Its pin says that all is there, in case this is killed.
    let _ = fs::remove_file(pins::nat(LAST));
    for level in LogLevel::ALL {
        if let Some(mut calls) = calls(level)? {
            clear_slots(&mut calls)?;
        }
    }
    remove_links()?;
    let paths = MAPS.map(pins::map);
    for path in [pins::nat("")].iter().chain(&paths) {
        remove_pins(path)?;
    }
    Ok(())
}

/// Detaches everything.
fn remove_links() -> Result<(), Error> {
    for device in pins::devices(pins::FILTER) {
        let host = Netlink::host()?;
        if filter(&host, device)? == Some(id(&filter_pin(device))?) {
            host.delete_ingress_bpf(device, FILTER_PRIORITY, FILTER_HANDLE)?;
        }
    }
    remove_pins(&pins::links())
}

/// Removes one pin, or a directory of pins.
fn remove_pins(path: &Path) -> Result<(), Error> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Pin {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Takes the programs away if no port is published. The lock of the pins is held alone.
pub(super) fn unload_if_unused() -> Result<(), Error> {
    let in_use = is_loaded()
        && table::<PublishedKey, Published>("PUBLISHED")?
            .keys()
            .next()
            .is_some();
    if in_use { Ok(()) } else { unload() }
}

/// The table by which the programs of `level` call each other, if it is pinned: that
/// comes before them.
fn calls(level: LogLevel) -> Result<Option<Calls>, Error> {
    let path = pins::variant(level).join("PROGRAMS");
    if !path.exists() {
        return Ok(None);
    }
    Calls::try_from(super::pinned_at(&path)?)
        .map(Some)
        .map_err(|source| foreign("PROGRAMS", &source))
}

fn open_classifier(name: &str) -> Result<SchedClassifier, Error> {
    SchedClassifier::from_pin(pins::nat(name)).map_err(|source| Error::program(name, source))
}

fn pin_link(
    link: Result<FdLink, aya::programs::links::LinkError>,
    path: &Path,
) -> Result<(), Error> {
    let error = |source: io::Error| Error::Pin {
        path: path.to_owned(),
        source,
    };
    let link = link.map_err(|source| error(io::Error::other(source)))?;
    link.pin(path)
        .map_err(|source| error(io::Error::other(source)))?;
    Ok(())
}

/// Published ports, for one call that changes them.
pub struct Publication<'d> {
    datapath: &'d Datapath,
    published: Table<PublishedKey, Published>,
    addresses: Table<Address, u8>,
    xdp_uplinks: Table<u32, Mac>,
    _lock: Lock,
}

impl Datapath {
    /// Opens the published ports, if any were.
    ///
    /// # Errors
    ///
    /// They are locked, or a pin is not what this version pins there.
    pub fn publication(&self) -> Result<Option<Publication<'_>>, Error> {
        if !is_loaded() {
            return Ok(None);
        }
        let lock = Lock::take(Path::new(LOCK), Mode::Exclusive)?;
        Ok(Some(Publication {
            datapath: self,
            published: table("PUBLISHED")?,
            addresses: table("ADDRESSES")?,
            xdp_uplinks: table("XDP_UPLINKS")?,
            _lock: lock,
        }))
    }
}

impl Publication<'_> {
    /// The ifindex of the host veth whose pod serves a port.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn owner(&self, port: &NodePort) -> Result<Option<u32>, Error> {
        let entry = self.entry(port)?;
        Ok(entry
            .filter(|entry| entry.specific == 0)
            .map(|entry| entry.port))
    }

    fn entry(&self, port: &NodePort) -> Result<Option<Published>, Error> {
        get(&self.published, "PUBLISHED", port.key())
    }

    /// Claims a port.
    ///
    /// # Errors
    ///
    /// [`Error::Taken`] if somebody has it, on this address or on one that it stands
    /// for; or the table cannot be read or written.
    pub fn claim(&mut self, port: &NodePort, service: &Service) -> Result<(), Error> {
        if port.is_everywhere() {
            return self.insert(port, service.entry());
        }
        self.count(port, 1)?;
        let claimed = self.insert(port, service.entry());
        if claimed.is_err() {
            self.count(port, -1)?;
        }
        claimed
    }

    fn insert(&mut self, port: &NodePort, entry: Published) -> Result<(), Error> {
        loop {
            let written = refilled(|| {
                self.published
                    .insert(Wire(port.key()), Wire(entry), NOEXIST)
            });
            match written {
                Ok(()) => return Ok(()),
                Err(MapError::SyscallError(error))
                    if error.io_error.kind() == io::ErrorKind::AlreadyExists =>
                {
                    if let Some(taken) = self.taken(port)? {
                        return Err(taken);
                    }
                }
                Err(source) => {
                    return Err(failed("claiming", "PUBLISHED", &port.to_string(), source));
                }
            }
        }
    }

    /// The error about a port that is taken. It is not if only a count is in the way,
    /// of a call that was killed between the count and what it counts; that goes.
    fn taken(&mut self, port: &NodePort) -> Result<Option<Error>, Error> {
        let error = |taken: NodePort, entry: &Published| {
            Some(Error::Taken {
                port: *port,
                taken,
                owner: entry.port,
            })
        };
        if let Some(entry) = self.entry(port)?.filter(|entry| entry.specific == 0) {
            return Ok(error(*port, &entry));
        }
        // On single addresses, of which there are few. Looked for only to name one.
        let key = port.key();
        let found = entries(&self.published, "PUBLISHED")?
            .into_iter()
            .find(|(other, entry)| {
                (other.port, other.protocol) == (key.port, key.protocol)
                    && entry.specific == 0
                    && address(other.address).is_ipv4() == port.address.is_ipv4()
            });
        let Some((other, entry)) = found else {
            remove(&mut self.published, "PUBLISHED", key)?;
            return Ok(None);
        };
        Ok(error(NodePort::of(other), &entry))
    }

    /// Keeps count of the addresses that a number is published on.
    fn count(&mut self, port: &NodePort, change: i32) -> Result<(), Error> {
        let everywhere = port.everywhere();
        let key = everywhere.key();
        let entry = self.entry(&everywhere)?;
        match entry {
            Some(entry) if entry.specific == 0 => {
                if change > 0 {
                    return Err(Error::Taken {
                        port: *port,
                        taken: everywhere,
                        owner: entry.port,
                    });
                }
                Ok(())
            }
            entry => {
                let count = entry
                    .map_or(0, |entry| entry.specific)
                    .saturating_add_signed(change);
                if count == 0 {
                    return remove(&mut self.published, "PUBLISHED", key);
                }
                let counted = Published {
                    specific: count,
                    ..Service::NOBODY
                };
                set(&mut self.published, "PUBLISHED", key, counted, ANY)
            }
        }
    }

    /// Gives a port back, if it is `owner`'s; says who served it.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn withdraw(&mut self, port: &NodePort, owner: u32) -> Result<Option<SocketAddr>, Error> {
        let own = |entry: &Published| entry.port == owner && entry.specific == 0;
        let Some(entry) = self.entry(port)?.filter(own) else {
            return Ok(None);
        };
        remove(&mut self.published, "PUBLISHED", port.key())?;
        if !port.is_everywhere() {
            self.count(port, -1)?;
        }
        Ok(Some(SocketAddr::new(
            address(entry.address),
            entry.pod_port,
        )))
    }

    /// Gives back all that `owner` has. It looks at every entry, so it is for owners of
    /// which nobody has a record.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn withdraw_all(&mut self, owner: u32) -> Result<(), Error> {
        for (key, entry) in entries(&self.published, "PUBLISHED")? {
            if entry.port == owner {
                self.withdraw(&NodePort::of(key), owner)?;
            }
        }
        Ok(())
    }

    /// Lets local clients use these addresses of the node, and no others.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn set_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let wanted: HashSet<Address> = addresses.iter().copied().map(octets).collect();
        let present: HashSet<Address> = entries(&self.addresses, "ADDRESSES")?
            .into_iter()
            .map(|(address, _)| address)
            .collect();
        for &address in present.difference(&wanted) {
            remove(&mut self.addresses, "ADDRESSES", address)?;
        }
        for &address in wanted.difference(&present) {
            set(&mut self.addresses, "ADDRESSES", address, 1, ANY)?;
        }
        Ok(())
    }

    /// Serves published ports on a device of the node, unless that is done already.
    ///
    /// # Errors
    ///
    /// The program cannot be attached or its link not be pinned.
    pub fn serve_on(&mut self, host: &Netlink, device: &Link) -> Result<(), Error> {
        if self.is_served_on(host, device)? {
            return Ok(());
        }
        let name = uplink_program(device);
        if !pins::nat(name).exists() {
            let mut ebpf = loader().load(object::NAT)?;
            pin_program(name, object::load_program(&mut ebpf, name)?)?;
        }
        let mut program = open_classifier(name)?;
        let attached = program.attach_with_options(
            &device.name,
            TcAttachType::Ingress,
            TcAttachOptions::TcxOrder(aya::programs::LinkOrder::default()),
        );
        match attached {
            Ok(id) => {
                let link = program
                    .take_link(id)
                    .map_err(|source| Error::program(name, source))?;
                pin_link(FdLink::try_from(link), &uplink_pin(device.index))
            }
            // No tcx before 6.6.
            Err(_) => {
                let fd = program
                    .fd()
                    .map_err(|source| Error::program(name, source))?;
                // Unlike a link it does not go with its pin, which tells where to look.
                let path = filter_pin(device.index);
                remove_pins(&path)?;
                open_classifier(name)?
                    .pin(&path)
                    .map_err(|source| Error::Pin {
                        path,
                        source: io::Error::other(source),
                    })?;
                // Others may have made one.
                let _ = host.add_clsact(device.index);
                host.add_ingress_bpf(
                    device.index,
                    FILTER_PRIORITY,
                    FILTER_HANDLE,
                    fd.as_fd(),
                    name,
                )?;
                Ok(())
            }
        }
    }

    fn is_served_on(&self, host: &Netlink, device: &Link) -> Result<bool, Error> {
        if uplink_pin(device.index).exists() {
            return Ok(true);
        }
        let program = pins::nat(uplink_program(device));
        match filter(host, device.index)? {
            Some(there) if program.exists() => Ok(there == id(&program)?),
            _ => Ok(false),
        }
    }

    /// Removes what is left of ports whose owner is gone, and of devices of which
    /// `exists` says so. It looks at every entry, so it is for GC.
    ///
    /// # Errors
    ///
    /// A table cannot be read or written.
    pub fn sweep<E: From<Error>>(
        &mut self,
        mut exists: impl FnMut(u32) -> Result<bool, E>,
    ) -> Result<(), E> {
        let mut counts = std::collections::HashMap::<PublishedKey, u32>::new();
        let mut counted = Vec::new();
        for (key, entry) in entries(&self.published, "PUBLISHED")? {
            if entry.specific != 0 {
                counted.push((key, entry.specific));
            } else if self.datapath.port(entry.port)?.is_none() {
                remove(&mut self.published, "PUBLISHED", key)?;
            } else {
                let port = NodePort::of(key);
                if !port.is_everywhere() {
                    *counts.entry(port.everywhere().key()).or_default() += 1;
                }
            }
        }
        for (key, count) in counted {
            match counts.get(&key) {
                None => remove(&mut self.published, "PUBLISHED", key)?,
                Some(&real) if real != count => {
                    let counted = Published {
                        specific: real,
                        ..Service::NOBODY
                    };
                    set(&mut self.published, "PUBLISHED", key, counted, ANY)?;
                }
                Some(_) => {}
            }
        }
        for index in pins::devices(pins::UPLINK) {
            if !exists(index)? {
                let _ = fs::remove_file(uplink_pin(index));
            }
        }
        for index in pins::devices(pins::FILTER) {
            if !exists(index)? {
                let _ = fs::remove_file(filter_pin(index));
            }
        }
        for index in pins::devices(pins::XDP) {
            if !exists(index)? {
                remove(&mut self.xdp_uplinks, "XDP_UPLINKS", index)?;
                let _ = fs::remove_file(xdp::pin(index));
            }
        }
        Ok(())
    }
}

impl Service {
    /// What stands in an entry that only counts.
    const NOBODY: Published = Published {
        address: Address::UNSPECIFIED,
        gateway: Address::UNSPECIFIED,
        port: 0,
        segment: 0,
        specific: 0,
        pod_port: 0,
        mac: [0; 6],
        gateway_mac: [0; 6],
        flags: 0,
    };
}

/// The program for a device: tunnels have no Ethernet header.
fn uplink_program(device: &Link) -> &'static str {
    if device.ethernet { LAST } else { TUNNELS }
}

fn uplink_pin(index: u32) -> PathBuf {
    pins::link(&format!("{}{index}", pins::UPLINK))
}

fn filter_pin(index: u32) -> PathBuf {
    pins::link(&format!("{}{index}", pins::FILTER))
}

/// The kernel's id of the program that is in the filter's place on a device.
fn filter(host: &Netlink, device: u32) -> Result<Option<u32>, Error> {
    Ok(host.tc_ingress_bpf(device, FILTER_PRIORITY, FILTER_HANDLE)?)
}

/// That of a pinned classifier.
fn id(pin: &Path) -> Result<u32, Error> {
    SchedClassifier::from_pin(pin)
        .and_then(|program| program.info().map(|info| info.id()))
        .map_err(|source| Error::program(LAST, source))
}

/// An address as the maps have it.
fn octets(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::v4(address.octets()),
        IpAddr::V6(address) => Address::v6(address.octets()),
    }
}

/// And back.
fn address(address: Address) -> IpAddr {
    Ipv6Addr::from(address.octets()).to_canonical()
}
