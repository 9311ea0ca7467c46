//! The programs and their tables, from the side of the plugin: loaded and pinned
//! once a boot, opened by every later call, and told of each port.
//!
//! Nothing here scans a table on the way of an ADD or a DEL that finds its gateway
//! and its record: each entry is addressed by its key, whatever else is in the map.
//! Only an ADD that makes a gateway looks whether others were deleted, and GC sweeps.
//!
//! A change to a segment's ports ([`Datapath::add_port`], [`Datapath::remove_port`],
//! [`Datapath::create_segment`]) must be made under the lock of its bridge: the
//! list that broadcasts go to has no holes.

mod attach;
mod bpf;
mod carry;
mod hooks;
pub mod nat;
mod object;
mod pins;
mod shape;
#[cfg(test)]
mod tests;
mod upgrade;

use std::{
    collections::{HashMap as StdHashMap, HashSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use aya::{
    maps::{HashMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues},
    programs::ProgramError,
    util::nr_cpus,
};
use aya_obj::generated::bpf_prog_type;
use bpf_bridge_common::layout::{
    ABI, Endpoint, IpKey, MAX_MEMBERS, Mac, MacKey, Member, MemberKey, Neighbor, PORT_CLAIMED,
    PORT_GATEWAY, PORT_MASQUERADED, PORT_PUBLISHED, PORT_ROUTED, PORT_TENTATIVE, Port, PortStats,
    SEGMENT_ROUTED, Segment,
};
use thiserror::Error;

use crate::{
    fault::{self, Kind},
    link::LinkError,
    lock::{Lock, LockError, Mode},
    mac::MacAddr,
    mount::MountError,
    node::{self, NodeError},
};

pub use crate::cni::config::LogLevel;

use bpf::Of;
use nat::Part;

pub use attach::{FILTER_HANDLE, FILTER_PRIORITY};
pub use carry::Carried;
pub use hooks::Moved;
pub use object::verify;
pub use pins::{BPFFS, require_bpffs};
pub use upgrade::{Report, upgrade};

/// `BPF_ANY`, `BPF_NOEXIST` and `BPF_EXIST` of `linux/bpf.h`.
const ANY: u64 = 0;
const NOEXIST: u64 = 1;
const EXIST: u64 = 2;
/// How often, and after what pause, a write is tried again for which the kernel had
/// no memory at hand.
const REFILLS: u32 = 20;
const REFILL: Duration = Duration::from_millis(2);

/// Why the datapath could not be used.
#[derive(Debug, Error)]
pub enum Error {
    /// bpffs is not mounted.
    #[error("no bpffs is mounted at {BPFFS}: `mount -t bpf bpf {BPFFS}` mounts it")]
    NoBpffs,
    /// A pin could not be made, opened or removed.
    #[error("using the pin {path}: {source}")]
    Pin {
        /// The pin path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A pinned object is not what this version pins there.
    #[error(
        "the pin {path} is {found}, where {right} would be right: it is not of this plugin's \
         making, and not used. Remove it if it is nobody's; if it was put in the place of one \
         of ours, remove {root} when no pod is attached"
    )]
    ForeignPin {
        /// The pin path.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What would be right.
        right: String,
        /// The directory of all pins.
        root: PathBuf,
    },
    /// A newer version has made the maps, of a layout that this one does not know.
    #[error(
        "the pods of this node are attached by a newer bpf-bridge, whose maps have layout \
         {found}; this one knows layout {ABI} and cannot go back to it while pods are attached: \
         install a bpf-bridge of layout {found} or later, or remove all pods from the node, and \
         then {BPFFS}/bpf-bridge/v{found}"
    )]
    Newer {
        /// The version of the layout.
        found: u32,
    },
    /// What an older version has made could not be carried over.
    #[error(
        "carrying ports and flows over from the layout {from} to {to}: {source}; {state}",
        to = pins::Root::own().name()
    )]
    Carry {
        /// The older layout.
        from: String,
        /// Why not.
        source: Box<Self>,
        /// What holds now.
        state: &'static str,
    },
    /// The kernel does not tell of a program.
    #[error("asking for the program of id {id}: {source}")]
    Asking {
        /// Its number.
        id: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map of any layout could not be read or written.
    #[error("reading or writing a map: {0}")]
    Entries(#[from] io::Error),
    /// An entry of an older layout has no place in this one.
    #[error("the map {map}: {why}")]
    Misfit {
        /// The map.
        map: String,
        /// Why not.
        why: String,
    },
    /// A lock could not be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The kernel did not say that it can do something: somebody stopped the process
    /// while it asked.
    #[error(
        "asking the kernel whether {0}: it did not say so, though every kernel since 5.5 does: \
         this process was stopped at that moment (a frozen cgroup, a suspended machine, a \
         debugger); try again"
    )]
    Interrupted(&'static str),
    /// The embedded object was refused.
    #[error("loading the eBPF programs: {0}")]
    Load(#[source] Box<aya::EbpfError>),
    /// A program was refused.
    #[error("loading the eBPF program {program:?}: {source}")]
    Program {
        /// Its name.
        program: String,
        /// The verifier's or the kernel's word.
        source: Box<ProgramError>,
    },
    /// The program could not be attached.
    #[error(transparent)]
    Attach(#[from] LinkError),
    /// A table refused a change.
    #[error("{action} {map}[{key}]: {source}")]
    Map {
        /// What was being done.
        action: &'static str,
        /// The map.
        map: &'static str,
        /// The key, readable.
        key: String,
        /// What the kernel said.
        source: Box<MapError>,
    },
    /// A table has no room.
    #[error("{action} {map}[{key}]: the table has {limit} entries, which is its limit: {remedy}")]
    Full {
        /// What was being done.
        action: &'static str,
        /// The table.
        map: &'static str,
        /// The key, readable.
        key: String,
        /// How many entries it can have.
        limit: u32,
        /// What can be done about it.
        remedy: String,
    },
    /// The node's settings cannot be used.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// An address that is to be assigned is somebody's already.
    #[error("the address {address} is assigned already, to the port with ifindex {port}")]
    Assigned {
        /// The MAC or IP address.
        address: String,
        /// Whose it is.
        port: u32,
    },
    /// A port that is to be published is taken.
    #[error(
        "{port} is taken: {taken} is published by the pod behind the port with ifindex {owner}"
    )]
    Taken {
        /// The port.
        port: nat::NodePort,
        /// What was published before.
        taken: nat::NodePort,
        /// The ifindex of its owner's host veth.
        owner: u32,
    },
    /// A device carries somebody else's XDP program.
    #[error(
        "{device} carries an XDP program already, of id {program}: remove it, or take {device} out of \"xdpUplinks\""
    )]
    ForeignXdp {
        /// The device.
        device: String,
        /// The kernel's id of the program.
        program: u32,
    },
    /// XDP could not be had on a device.
    #[error("running XDP on {device}: {why}")]
    Xdp {
        /// The device.
        device: String,
        /// Why not.
        why: String,
    },
    /// The node's control groups could not be used.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The segment's list of ports is full.
    #[error("the segment has {MAX_MEMBERS} ports already, which is the limit")]
    SegmentFull,
    /// The segment has no entry: its gateway port was never made, or was removed.
    #[error("the segment {0} is not known to the datapath")]
    NoSegment(u32),
}

/// bytemuck proves that `T` has no padding and no invalid values.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Wire<T>(T);

// SAFETY: `Wire<T>` has the layout of `T`, and `T` is plain data without padding.
unsafe impl<T: bytemuck::Pod> aya::Pod for Wire<T> {}

type Table<K, V> = HashMap<MapData, Wire<K>, Wire<V>>;

impl Error {
    fn program(name: &str, source: ProgramError) -> Self {
        Self::Program {
            program: name.to_owned(),
            source: Box::new(source),
        }
    }
}

impl From<aya::EbpfError> for Error {
    fn from(error: aya::EbpfError) -> Self {
        Self::Load(Box::new(error))
    }
}

/// A port that is to be added.
#[derive(Clone, Copy, Debug)]
pub struct PortSpec<'a> {
    /// The ifindex of the host veth.
    pub ifindex: u32,
    /// The segment: the ifindex of the gateway device.
    pub segment: u32,
    /// `PORT_*` bits.
    pub flags: u32,
    /// The pod's MAC address.
    pub mac: Mac,
    /// The pod's addresses.
    pub addresses: &'a [IpAddr],
    /// Whether duplicate address detection of the IPv6 ones is yet to come.
    pub tentative: bool,
}

/// The open datapath. While it lives, nobody removes the pins.
pub struct Datapath {
    ports: Table<u32, Port>,
    stats: PerCpuHashMap<MapData, u32, Wire<PortStats>>,
    endpoints: Table<MacKey, Endpoint>,
    neighbors: Table<IpKey, Neighbor>,
    segments: Table<u32, Segment>,
    members: Table<MemberKey, Member>,
    /// The kernel's number of `PORTS`: what uses that one is a program of ours.
    ports_id: u32,
    _lock: Lock,
}

impl Datapath {
    /// Opens the datapath, and loads it first if nobody did since the boot. Says
    /// also whether this call loaded it. `parts`: what is needed of the programs that
    /// translate.
    ///
    /// # Errors
    ///
    /// bpffs is not mounted, the kernel refuses the programs, or the pins cannot be used.
    pub fn open_or_load(level: LogLevel, parts: &[Part]) -> Result<(Self, bool), Error> {
        require_bpffs()?;
        let mut fresh = false;
        let is_loaded = || attach::is_loaded(level) && parts.iter().copied().all(Part::is_loaded);
        let load = || {
            // Both before either is loaded.
            object::require_all_own(level)?;
            nat::require_own(parts)?;
            if !attach::is_loaded(level) {
                object::load(level)?;
            }
            nat::load(parts)
        };
        loop {
            let lock = pins::lock(Mode::Shared)?;
            if is_loaded() {
                return Ok((Self::open_pins(lock)?, fresh));
            }
            // Not upgraded in place: two that hold it shared would wait for each
            // other. Whoever loads looks again, for a failed ADD may have
            // unloaded meanwhile.
            drop(lock);
            let _alone = pins::lock(Mode::Exclusive)?;
            if !is_loaded() {
                if let Err(error) = load() {
                    // What is not of our making is not ours to remove.
                    if !matches!(error, Error::ForeignPin { .. }) {
                        let _ = remove_unused_pins();
                    }
                    return Err(error);
                }
                fresh = true;
            }
        }
    }

    /// Opens the datapath if it was loaded.
    ///
    /// # Errors
    ///
    /// A pin cannot be opened, or is not what this version pins there.
    pub fn open() -> Result<Option<Self>, Error> {
        Self::open_loaded(Mode::Shared)
    }

    /// Opens the datapath if it was loaded, while nobody else has it open: for
    /// those who change segments whose bridge they cannot lock.
    pub fn open_alone() -> Result<Option<Self>, Error> {
        Self::open_loaded(Mode::Exclusive)
    }

    fn open_loaded(mode: Mode) -> Result<Option<Self>, Error> {
        // What a load that was killed has left is used by nobody yet, and the
        // next load completes it.
        let is_loaded = || pins::map("PORTS").exists() && pins::Root::own().is_loaded();
        if !is_loaded() && pins::other()?.is_none() {
            return Ok(None);
        }
        let lock = pins::lock(mode)?;
        if !is_loaded() {
            return Ok(None);
        }
        Self::open_pins(lock).map(Some)
    }

    /// Removes the pins again if there is no port: what a failed first ADD does.
    ///
    /// # Errors
    ///
    /// The lock cannot be taken, or a pin not be opened or removed.
    pub fn unload_if_unused(self) -> Result<(), Error> {
        // The pins cannot be locked alone while this shares them.
        drop(self);
        let _alone = pins::lock(Mode::Exclusive)?;
        remove_unused_pins()
    }

    fn open_pins(lock: Lock) -> Result<Self, Error> {
        Ok(Self {
            ports: table("PORTS")?,
            stats: PerCpuHashMap::try_from(pinned("STATS")?)
                .map_err(|source| foreign("STATS", &source))?,
            endpoints: table("ENDPOINTS")?,
            neighbors: table("NEIGHBORS")?,
            segments: table("SEGMENTS")?,
            members: table("MEMBERS")?,
            ports_id: bpf::map_id(&pins::map("PORTS")).map_err(|source| Error::Pin {
                path: pins::map("PORTS"),
                source,
            })?,
            _lock: lock,
        })
    }

    /// The segment whose gateway device has this ifindex.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn segment(&self, segment: u32) -> Result<Option<Segment>, Error> {
        get(&self.segments, "SEGMENTS", segment)
    }

    /// The port of this ifindex.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn port(&self, ifindex: u32) -> Result<Option<Port>, Error> {
        get(&self.ports, "PORTS", ifindex)
    }

    /// Whom a MAC address was assigned to.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn endpoint(&self, segment: u32, mac: Mac) -> Result<Option<Endpoint>, Error> {
        get(&self.endpoints, "ENDPOINTS", MacKey::new(segment, mac))
    }

    /// Whom an IP address was assigned to.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn neighbor(&self, segment: u32, address: IpAddr) -> Result<Option<Neighbor>, Error> {
        get(&self.neighbors, "NEIGHBORS", ip_key(segment, address))
    }

    /// What was flooded, answered and dropped of what the port received, over all CPUs;
    /// `None` if there is no such port. All that it received is in the counters of its
    /// device. Port 0 has what came from devices that are no ports.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn stats(&self, ifindex: u32) -> Result<Option<PortStats>, Error> {
        let values = match self.stats.get(&ifindex, 0) {
            Ok(values) => values,
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(source) => return Err(failed("reading", "STATS", &ifindex, source)),
        };
        let mut sum = PortStats::default();
        for Wire(value) in values.iter() {
            sum.flooded += value.flooded;
            sum.answered += value.answered;
            for (all, one) in sum.drops.iter_mut().zip(value.drops) {
                *all += one;
            }
        }
        Ok(Some(sum))
    }

    /// Whether `device` says of every segment that its gateway device exists.
    pub fn has_all_gateways<E: From<Error>>(
        &self,
        mut device: impl FnMut(u32) -> Result<bool, E>,
    ) -> Result<bool, E> {
        for (segment, _) in entries(&self.segments, "SEGMENTS")? {
            if !device(segment)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Every port, for those who must look at all: GC and people.
    pub fn ports(&self) -> impl Iterator<Item = (u32, Port)> + '_ {
        self.ports.iter().filter_map(|entry| {
            entry
                .ok()
                .map(|(Wire(ifindex), Wire(port))| (ifindex, port))
        })
    }

    /// Whether the port gets what is flooded to its segment.
    ///
    /// # Errors
    ///
    /// A table cannot be read.
    pub fn has_joined(&self, ifindex: u32) -> Result<bool, Error> {
        let Some(port) = self.port(ifindex)? else {
            return Ok(false);
        };
        let key = MemberKey {
            segment: port.segment,
            slot: port.slot,
        };
        let member = get(&self.members, "MEMBERS", key)?;
        let counted = self
            .segment(port.segment)?
            .is_some_and(|segment| port.slot < segment.members);
        Ok(counted && member.is_some_and(|member| member.port == ifindex))
    }

    /// Makes a segment: its gateway port is the first of its list.
    ///
    /// `gateway.segment` is the gateway device, `gateway.ifindex` its far end,
    /// where the program is attached. Entries that a device of the same number
    /// left are overwritten: the kernel gave the number anew.
    ///
    /// # Errors
    ///
    /// A table cannot be written.
    pub fn create_segment(&mut self, gateway: &PortSpec<'_>) -> Result<(), Error> {
        let segment = gateway.segment;
        let entry = Segment {
            members: 1,
            gateway_port: gateway.ifindex,
            flags: 0,
        };
        let created = self
            .set_port(gateway, PORT_GATEWAY | gateway.flags, 0)
            .and_then(|()| set(&mut self.segments, "SEGMENTS", segment, entry, ANY));
        if created.is_err() {
            // Nobody finds it by the segment. What cannot be removed a GC will.
            let slot = MemberKey { segment, slot: 0 };
            let _ = remove(&mut self.members, "MEMBERS", slot);
            let _ = self.forget(gateway.ifindex, segment, gateway.mac, &[]);
        }
        created
    }

    /// Gives the gateway an address: pods' questions for it are answered, and no pod may
    /// say that it is a router.
    ///
    /// # Errors
    ///
    /// [`Error::NoSegment`], or a table cannot be written.
    pub fn add_gateway_address(
        &mut self,
        segment: u32,
        address: IpAddr,
        mac: Mac,
    ) -> Result<(), Error> {
        let mut entry = self.segment(segment)?.ok_or(Error::NoSegment(segment))?;
        if entry.flags & SEGMENT_ROUTED == 0 {
            entry.flags |= SEGMENT_ROUTED;
            set(&mut self.segments, "SEGMENTS", segment, entry, EXIST)?;
        }
        let neighbor = Neighbor {
            port: entry.gateway_port,
            flags: PORT_GATEWAY,
            mac,
            reserved: [0; 2],
        };
        self.set_neighbor(segment, address, neighbor)
    }

    /// The gateway no longer has an address.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn remove_gateway_address(&mut self, segment: u32, address: IpAddr) -> Result<(), Error> {
        let owned = self
            .neighbor(segment, address)?
            .is_some_and(|neighbor| neighbor.flags & PORT_GATEWAY != 0);
        if owned {
            remove(&mut self.neighbors, "NEIGHBORS", ip_key(segment, address))?;
        }
        Ok(())
    }

    /// Removes a segment of which only the gateway port is left, or as much of it as was
    /// made: `gateway` is as for [`Self::create_segment`], with the addresses that the
    /// responder answers for.
    ///
    /// # Errors
    ///
    /// A table cannot be read or written.
    pub fn remove_segment(&mut self, gateway: &PortSpec<'_>) -> Result<(), Error> {
        let segment = gateway.segment;
        let key = MemberKey { segment, slot: 0 };
        remove(&mut self.members, "MEMBERS", key)?;
        self.forget(gateway.ifindex, segment, gateway.mac, gateway.addresses)?;
        remove(&mut self.segments, "SEGMENTS", segment)
    }

    /// Adds a port to its segment.
    ///
    /// # Errors
    ///
    /// [`Error::Assigned`] if another port has one of the addresses,
    /// [`Error::SegmentFull`] and [`Error::NoSegment`], all before anything is
    /// changed; or a table cannot be read or written.
    pub fn add_port(&mut self, port: &PortSpec<'_>) -> Result<(), Error> {
        let mut segment = self
            .segment(port.segment)?
            .ok_or(Error::NoSegment(port.segment))?;
        if segment.members >= MAX_MEMBERS {
            return Err(Error::SegmentFull);
        }
        self.refuse_assigned(port)?;
        let slot = segment.members;
        self.set_port(port, port.flags, slot)?;
        for &address in port.addresses {
            let tentative = match address {
                IpAddr::V6(_) if port.tentative => PORT_TENTATIVE,
                _ => 0,
            };
            let neighbor = Neighbor {
                port: port.ifindex,
                flags: port.flags | tentative,
                mac: port.mac,
                reserved: [0; 2],
            };
            self.set_neighbor(port.segment, address, neighbor)?;
        }
        segment.members += 1;
        set(&mut self.segments, "SEGMENTS", port.segment, segment, EXIST)
    }

    /// Nobody else has these addresses of a port: from now on nobody may say so.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn confirm(&mut self, segment: u32, addresses: &[IpAddr]) -> Result<(), Error> {
        for &address in addresses {
            if let Some(mut neighbor) = self.neighbor(segment, address)?
                && neighbor.flags & PORT_TENTATIVE != 0
            {
                neighbor.flags &= !PORT_TENTATIVE;
                self.set_neighbor(segment, address, neighbor)?;
            }
        }
        Ok(())
    }

    /// Whether a pod of the segment has ever said of an address that nobody was assigned
    /// that it is his.
    ///
    /// # Errors
    ///
    /// A table cannot be read.
    pub fn has_claims(&self, segment: u32) -> Result<bool, Error> {
        let Some(entry) = self.segment(segment)? else {
            return Ok(false);
        };
        let gateway = self.port(entry.gateway_port)?;
        Ok(gateway.is_some_and(|port| port.flags & PORT_CLAIMED != 0))
    }

    /// Nobody else has the port's addresses. An entry of a port that is not there
    /// any more, or is another one's now, counts for nothing.
    fn refuse_assigned(&self, port: &PortSpec<'_>) -> Result<(), Error> {
        let segment = port.segment;
        if let Some(owner) = self.endpoint(segment, port.mac)?
            && self.is_assigned(owner.port, segment, port.mac, port)?
        {
            return Err(Error::Assigned {
                address: MacAddr::new(port.mac).to_string(),
                port: owner.port,
            });
        }
        for &address in port.addresses {
            if let Some(owner) = self.neighbor(segment, address)?
                && self.is_assigned(owner.port, segment, owner.mac, port)?
            {
                return Err(Error::Assigned {
                    address: address.to_string(),
                    port: owner.port,
                });
            }
        }
        Ok(())
    }

    fn is_assigned(
        &self,
        owner: u32,
        segment: u32,
        mac: Mac,
        other_than: &PortSpec<'_>,
    ) -> Result<bool, Error> {
        Ok(owner != other_than.ifindex
            && self
                .port(owner)?
                .is_some_and(|port| port.segment == segment && port.mac == mac))
    }

    /// Removes a port whose device is gone and of which nobody has a record at
    /// hand. The entries of its IP addresses stay, and count for nothing.
    ///
    /// # Errors
    ///
    /// A table cannot be read or written.
    pub fn remove_dead_port(&mut self, ifindex: u32) -> Result<(), Error> {
        let Some(port) = self.port(ifindex)? else {
            return Ok(());
        };
        if port.flags & (PORT_PUBLISHED | PORT_MASQUERADED) != 0
            && let Some(mut nat) = self.nat()?
        {
            nat.forget(ifindex)?;
        }
        self.remove_port(ifindex, port.segment, port.mac, &[])
    }

    /// Removes a port and everything that is its own; what is missing is no error.
    ///
    /// # Errors
    ///
    /// A table cannot be read or written.
    pub fn remove_port(
        &mut self,
        ifindex: u32,
        segment: u32,
        mac: Mac,
        addresses: &[IpAddr],
    ) -> Result<(), Error> {
        if let (Some(port), Some(entry)) = (self.port(ifindex)?, self.segment(segment)?) {
            self.leave(ifindex, port, entry)?;
        }
        self.forget(ifindex, segment, mac, addresses)
    }

    /// Takes the port out of its segment's list; the last of the list moves to
    /// its slot.
    fn leave(&mut self, ifindex: u32, port: Port, mut segment: Segment) -> Result<(), Error> {
        let number = port.segment;
        let at = |slot| MemberKey {
            segment: number,
            slot,
        };
        let Some(last) = segment.members.checked_sub(1) else {
            return Ok(());
        };
        let own = get(&self.members, "MEMBERS", at(port.slot))?.map(|own| own.port);
        let tail = get(&self.members, "MEMBERS", at(last))?;
        // A DEL that was killed in here left the last one in both places.
        let half_done = port.slot < last && own.is_some() && own == tail.map(|tail| tail.port);
        if port.slot > last || own != Some(ifindex) && !half_done {
            // Never joined: the ADD died before it did. Another may have its slot now.
            if own == Some(ifindex) {
                remove(&mut self.members, "MEMBERS", at(port.slot))?;
            }
            return Ok(());
        }
        if port.slot != last
            && let Some(mover) = tail
        {
            set(&mut self.members, "MEMBERS", at(port.slot), mover, ANY)?;
            self.set_slot(mover.port, port.slot)?;
        }
        segment.members = last;
        set(&mut self.segments, "SEGMENTS", number, segment, EXIST)?;
        remove(&mut self.members, "MEMBERS", at(last))
    }

    /// Tells a port its place in its segment's list.
    ///
    /// The programs set a bit of the entry that is replaced here, and before that the
    /// same bit of the port's endpoint: one that is set meanwhile is found there.
    fn set_slot(&mut self, ifindex: u32, slot: u32) -> Result<(), Error> {
        let Some(mut port) = self.port(ifindex)? else {
            return Ok(());
        };
        port.slot = slot;
        set(&mut self.ports, "PORTS", ifindex, port, EXIST)?;
        let routed = self
            .endpoint(port.segment, port.mac)?
            .filter(|endpoint| endpoint.port == ifindex)
            .map_or(0, |endpoint| endpoint.flags & PORT_ROUTED);
        if port.flags | routed != port.flags {
            port.flags |= routed;
            set(&mut self.ports, "PORTS", ifindex, port, EXIST)?;
        }
        Ok(())
    }

    /// Removes what is left of devices of which `exists` says that they are gone,
    /// and puts the lists of ports in order: what DELs that were killed or had no
    /// record could not do, and what became of gateways that were deleted. It
    /// looks at every entry, so it is for GC.
    ///
    /// The datapath was opened [alone](Self::open_alone): an ADD makes its device
    /// before the entries.
    pub fn sweep<E: From<Error>>(
        &mut self,
        mut exists: impl FnMut(u32) -> Result<bool, E>,
    ) -> Result<(), E> {
        let (gateways, pods): (Vec<_>, Vec<_>) = entries(&self.ports, "PORTS")?
            .into_iter()
            .partition(|(_, port)| port.flags & PORT_GATEWAY != 0);
        let mut left = Vec::new();
        for (ifindex, port) in pods {
            if exists(ifindex)? {
                left.push((ifindex, port));
            } else {
                remove(&mut self.ports, "PORTS", ifindex)?;
            }
        }
        // A gateway goes after the last of its pods, which can still talk to each
        // other.
        let inhabited: HashSet<u32> = left.iter().map(|(_, port)| port.segment).collect();
        for (ifindex, port) in gateways {
            if inhabited.contains(&port.segment) || exists(port.segment)? {
                left.push((ifindex, port));
            } else {
                remove(&mut self.ports, "PORTS", ifindex)?;
            }
        }
        self.tidy_lists(&mut left)?;
        self.forget_all_but(&left.into_iter().collect())?;
        if let Some(mut nat) = self.nat()? {
            nat.sweep(exists)?;
        }
        Ok(nat::unload_unused()?)
    }

    /// Removes all that belongs to other ports than these.
    fn forget_all_but(&mut self, ports: &StdHashMap<u32, Port>) -> Result<(), Error> {
        let is_there = |ifindex: u32, segment: u32, mac: Mac| {
            ports
                .get(&ifindex)
                .is_some_and(|port| port.segment == segment && port.mac == mac)
        };
        for (key, endpoint) in entries(&self.endpoints, "ENDPOINTS")? {
            if !is_there(endpoint.port, key.segment, key.mac) {
                remove(&mut self.endpoints, "ENDPOINTS", key)?;
            }
        }
        for (key, neighbor) in entries(&self.neighbors, "NEIGHBORS")? {
            if !is_there(neighbor.port, key.segment, neighbor.mac) {
                remove(&mut self.neighbors, "NEIGHBORS", key)?;
            }
        }
        let counted: Vec<u32> = self
            .stats
            .keys()
            .collect::<Result<_, _>>()
            .map_err(|source| failed("listing", "STATS", &"", source))?;
        for ifindex in counted {
            if ifindex != 0 && !ports.contains_key(&ifindex) {
                self.forget_stats(ifindex)?;
            }
        }
        Ok(())
    }

    /// Makes each segment's list what its ports are, in the order that they have,
    /// and removes the segments without any.
    fn tidy_lists(&mut self, ports: &mut [(u32, Port)]) -> Result<(), Error> {
        ports.sort_by_key(|(_, port)| (port.segment, port.slot));
        let mut lengths = StdHashMap::new();
        for (ifindex, port) in ports {
            let length = lengths.entry(port.segment).or_insert(0);
            let slot = *length;
            *length += 1;
            let key = MemberKey {
                segment: port.segment,
                slot,
            };
            let member = Member {
                port: *ifindex,
                flags: port.flags & !(PORT_ROUTED | PORT_CLAIMED),
            };
            if get(&self.members, "MEMBERS", key)? != Some(member) {
                set(&mut self.members, "MEMBERS", key, member, ANY)?;
            }
            if port.slot != slot {
                port.slot = slot;
                self.set_slot(*ifindex, slot)?;
            }
        }
        for (number, segment) in entries(&self.segments, "SEGMENTS")? {
            match lengths.get(&number) {
                None => remove(&mut self.segments, "SEGMENTS", number)?,
                Some(&members) if members != segment.members => {
                    let segment = Segment { members, ..segment };
                    set(&mut self.segments, "SEGMENTS", number, segment, EXIST)?;
                }
                Some(_) => {}
            }
        }
        for (key, _) in entries(&self.members, "MEMBERS")? {
            if lengths
                .get(&key.segment)
                .is_none_or(|&length| key.slot >= length)
            {
                remove(&mut self.members, "MEMBERS", key)?;
            }
        }
        Ok(())
    }

    /// Writes the entries that every port has; they take effect with the list's
    /// new length.
    fn set_port(&mut self, port: &PortSpec<'_>, flags: u32, slot: u32) -> Result<(), Error> {
        let cpus = nr_cpus().map_err(|(_, source)| {
            failed(
                "counting CPUs for",
                "STATS",
                &port.ifindex,
                MapError::IoError(source),
            )
        })?;
        refilled("STATS", || {
            PerCpuValues::try_from(vec![Wire(PortStats::default()); cpus])
                .map_err(MapError::IoError)
                .and_then(|zero| self.stats.insert(port.ifindex, zero, ANY))
        })
        .map_err(|source| failed("writing", "STATS", &port.ifindex, source))?;
        let entry = Port {
            segment: port.segment,
            flags,
            #[cfg(feature = "next-layout")]
            next: 0,
            slot,
            mac: port.mac,
            reserved: [0; 2],
        };
        set(&mut self.ports, "PORTS", port.ifindex, entry, ANY)?;
        let endpoint = Endpoint {
            port: port.ifindex,
            flags,
        };
        let key = MacKey::new(port.segment, port.mac);
        set(&mut self.endpoints, "ENDPOINTS", key, endpoint, ANY)?;
        let key = MemberKey {
            segment: port.segment,
            slot,
        };
        let member = Member {
            port: port.ifindex,
            flags,
        };
        set(&mut self.members, "MEMBERS", key, member, ANY)
    }

    fn set_neighbor(
        &mut self,
        segment: u32,
        address: IpAddr,
        neighbor: Neighbor,
    ) -> Result<(), Error> {
        let key = ip_key(segment, address);
        set(&mut self.neighbors, "NEIGHBORS", key, neighbor, ANY)
    }

    /// Removes what is the port's own, its `PORTS` entry last: it is what others
    /// judge the rest by.
    fn forget(
        &mut self,
        ifindex: u32,
        segment: u32,
        mac: Mac,
        addresses: &[IpAddr],
    ) -> Result<(), Error> {
        for &address in addresses {
            if self
                .neighbor(segment, address)?
                .is_some_and(|owner| owner.port == ifindex)
            {
                remove(&mut self.neighbors, "NEIGHBORS", ip_key(segment, address))?;
            }
        }
        if self
            .endpoint(segment, mac)?
            .is_some_and(|owner| owner.port == ifindex)
        {
            remove(&mut self.endpoints, "ENDPOINTS", MacKey::new(segment, mac))?;
        }
        self.forget_stats(ifindex)?;
        remove(&mut self.ports, "PORTS", ifindex)
    }

    fn forget_stats(&mut self, ifindex: u32) -> Result<(), Error> {
        removed("STATS", || self.stats.remove(&ifindex))
            .map_err(|source| failed("removing", "STATS", &ifindex, source))
    }
}

/// Removes the pins if there is no port. Their lock is held alone.
fn remove_unused_pins() -> Result<(), Error> {
    let in_use =
        pins::map("PORTS").exists() && table::<u32, Port>("PORTS")?.keys().next().is_some();
    if in_use {
        nat::unload_unused()
    } else {
        // Nothing stays attached to maps that nobody finds any more. What is in its way
        // goes with the rest.
        let _ = nat::unload();
        pins::Root::own().remove()
    }
}

fn ip_key(segment: u32, address: IpAddr) -> IpKey {
    match address {
        IpAddr::V4(v4) => IpKey::v4(segment, v4.octets()),
        IpAddr::V6(v6) => IpKey::v6(segment, v6.octets()),
    }
}

fn pinned(name: &str) -> Result<Map, Error> {
    pinned_at(&pins::map(name), name)
}

/// Opens a pinned map of this name. Callers compare its kind and its sizes.
fn pinned_at(path: &Path, name: &str) -> Result<Map, Error> {
    let error = |source| Error::Pin {
        path: path.to_owned(),
        source,
    };
    let foreign = |found: String| Error::ForeignPin {
        path: path.to_owned(),
        found,
        right: format!("the map {name}"),
        root: pins::root(),
    };
    let (fd, kind) = bpf::open(path).map_err(error)?;
    if kind != Of::Map {
        return Err(foreign(kind.name().to_owned()));
    }
    let map = MapData::from_fd(fd).map_err(|source| error(io::Error::other(source)))?;
    let info = map
        .info()
        .map_err(|source| error(io::Error::other(source)))?;
    if info.name() != name.as_bytes() {
        let there = String::from_utf8_lossy(info.name()).into_owned();
        return Err(foreign(format!("a map of the name {there:?}")));
    }
    Map::from_map_data(map).map_err(|source| foreign(source.to_string()))
}

/// Opens a pinned table; its kind and the sizes of its keys and values are
/// compared.
fn table<K: bytemuck::Pod, V: bytemuck::Pod>(name: &str) -> Result<Table<K, V>, Error> {
    HashMap::try_from(pinned(name)?).map_err(|source| foreign(name, &source))
}

fn foreign(name: &str, detail: &MapError) -> Error {
    Error::ForeignPin {
        path: pins::map(name),
        found: format!("another map ({detail})"),
        right: format!("the map {name}"),
        root: pins::root(),
    }
}

/// Opens a pinned program, if it is a program of this name and kind (`BPF_PROG_TYPE_*`),
/// and uses the map `map` of ours.
///
/// Not as one of aya's, which would first load half a dozen programs of its own, to find
/// out what the kernel can do.
fn open_program(
    path: &Path,
    name: &str,
    kind: bpf_prog_type,
    map: Option<u32>,
) -> Result<(OwnedFd, bpf::Program), Error> {
    let error = |source| Error::Pin {
        path: path.to_owned(),
        source,
    };
    let foreign = |found: String| Error::ForeignPin {
        path: path.to_owned(),
        found,
        right: format!("the program {name:?}"),
        root: pins::root(),
    };
    let (fd, is) = bpf::open(path).map_err(error)?;
    if is != Of::Program {
        return Err(foreign(is.name().to_owned()));
    }
    let program = bpf::Program::of(fd.as_fd()).map_err(error)?;
    if program.name != name || program.kind != kind as u32 {
        return Err(foreign(format!(
            "a program of the name {:?} and the kind {}",
            program.name, program.kind
        )));
    }
    if map.is_some_and(|map| !program.maps.contains(&map)) {
        return Err(foreign(format!(
            "a program of the name {name:?} for other maps than those beside it"
        )));
    }
    Ok((fd, program))
}

fn failed(
    action: &'static str,
    map: &'static str,
    key: &dyn std::fmt::Debug,
    source: MapError,
) -> Error {
    let key = format!("{key:02x?}");
    if is_full(&source)
        && let Some(remedy) = node::remedy(map)
        && let Ok(limit) = limit(map)
    {
        return Error::Full {
            action,
            map,
            key,
            limit,
            remedy,
        };
    }
    Error::Map {
        action,
        map,
        key,
        source: Box::new(source),
    }
}

/// Whether a table had no room for an entry: tries say that in another way than hashes.
fn is_full(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error)
        if matches!(error.io_error.kind(), io::ErrorKind::ArgumentListTooLong | io::ErrorKind::StorageFull))
}

/// How many entries the pinned table has room for.
fn limit(map: &str) -> Result<u32, MapError> {
    Ok(MapData::from_pin(pins::map(map))?.info()?.max_entries())
}

/// Whether a write says that somebody else has made the entry.
fn is_taken(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error)
        if error.io_error.kind() == io::ErrorKind::AlreadyExists)
}

fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound | MapError::ElementNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

fn get<K: bytemuck::Pod + std::fmt::Debug, V: bytemuck::Pod>(
    table: &Table<K, V>,
    name: &'static str,
    key: K,
) -> Result<Option<V>, Error> {
    match table.get(&Wire(key), 0) {
        Ok(Wire(value)) => Ok(Some(value)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(source) => Err(failed("reading", name, &key, source)),
    }
}

/// All of a table, so that it can be changed on the way.
fn entries<K: bytemuck::Pod, V: bytemuck::Pod>(
    table: &Table<K, V>,
    name: &'static str,
) -> Result<Vec<(K, V)>, Error> {
    table
        .iter()
        .map(|entry| entry.map(|(Wire(key), Wire(value))| (key, value)))
        .collect::<Result<_, _>>()
        .map_err(|source| failed("listing", name, &"", source))
}

/// Changes a map by one request.
fn change<T>(map: &str, request: impl FnOnce() -> Result<T, MapError>) -> Result<T, MapError> {
    fault::request(Kind::Bpf, map).map_err(MapError::IoError)?;
    let done = request()?;
    fault::point(format_args!("change of {map}"));
    Ok(done)
}

/// Writes to a map whose entries are made on demand. The kernel takes their memory
/// from a small store that it refills in the background (`bpf_mem_alloc`), so that
/// many writes at once may find it empty for a moment.
fn refilled(map: &str, mut write: impl FnMut() -> Result<(), MapError>) -> Result<(), MapError> {
    let mut write = || change(map, &mut write);
    for _ in 0..REFILLS {
        match write() {
            Err(MapError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::OutOfMemory =>
            {
                thread::sleep(REFILL);
            }
            written => return written,
        }
    }
    write()
}

fn set<K: bytemuck::Pod + std::fmt::Debug, V: bytemuck::Pod>(
    table: &mut Table<K, V>,
    name: &'static str,
    key: K,
    value: V,
    flags: u64,
) -> Result<(), Error> {
    refilled(name, || table.insert(Wire(key), Wire(value), flags))
        .map_err(|source| failed("writing", name, &key, source))
}

fn remove<K: bytemuck::Pod + std::fmt::Debug, V: bytemuck::Pod>(
    table: &mut Table<K, V>,
    name: &'static str,
    key: K,
) -> Result<(), Error> {
    removed(name, || table.remove(&Wire(key)))
        .map_err(|source| failed("removing", name, &key, source))
}

/// Removes from a map; that nothing was there is no error.
fn removed(map: &str, remove: impl FnOnce() -> Result<(), MapError>) -> Result<(), MapError> {
    match change(map, remove) {
        Err(error) if is_missing(&error) => Ok(()),
        removed => removed,
    }
}
