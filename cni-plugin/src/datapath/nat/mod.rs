//! What translates, from the plugin's side: published ports, masquerade, and the record
//! of what the host's stack brings to pods.
//!
//! | file | |
//! |---|---|
//! | [`publish`] | who serves which port |
//! | [`masquerade`] | which pods are masqueraded, and toward whom not |
//! | [`uplinks`] | the devices of the node, and its addresses |
//! | [`xdp`] | XDP on those of them that the operator names |
//!
//! The programs come in [`Part`]s, each of which is loaded when the first network needs
//! it. Whoever changes anything here holds a lock of its own, besides the datapath.

pub mod masquerade;
pub mod publish;
pub mod uplinks;
pub mod xdp;

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::AsFd as _,
    path::Path,
    thread,
};

use aya::{
    Ebpf,
    maps::{Array, LpmTrie, MapData, MapError, ProgramArray},
    programs::{
        CgroupAttachMode, CgroupSockAddr, ProgramError, SchedClassifier,
        links::{FdLink, LinkType},
    },
};
use aya_obj::generated::bpf_prog_type;
use bpf_bridge_common::layout::{
    Address, ExemptKey, IpKey, Mac, Masqueraded, NEXT_FORWARD, Neighbor, Node, PORT_DIRECT,
    PORT_GATEWAY, PROGRAM_BETWEEN, PROGRAM_FROM_HOST, PROGRAM_FROM_POD, PodKey, Port, Present,
    Published, PublishedKey, Uplink,
};

use super::{
    Datapath, Error, LogLevel, NOEXIST, Table, Wire, change, entries, failed, foreign, hooks,
    is_taken, object, pinned,
    pins::{self, Root, Successor},
    removed, table,
};
use crate::{
    fault,
    lock::{Lock, Mode},
    mount, netns,
    node::Limits,
};

pub use self::{
    masquerade::Policy,
    publish::{NodePort, Service},
    xdp::XdpRun,
};

/// The lock under which ports are claimed and uplinks are found.
const LOCK: &str = "/run/bpf-bridge/publish.lock";

/// Programs that are needed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What the host's stack brings to pods, and what pods answer: for networks that
    /// have a gateway. All others need it.
    Host,
    /// The uplinks: for networks that publish ports, or are masqueraded.
    Outside,
    /// What pods send to the gateway: for published ports, and for networks whose
    /// packets do not pass netfilter.
    Pods,
    /// What masqueraded pods send out of the node past the host's stack: for networks
    /// whose packets do not pass netfilter.
    Forward,
    /// The sockets of the node's own processes: for published ports.
    Sockets,
}

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
/// The program that `from_pod` goes on with.
const FORWARD: &str = "forward";
/// The table by which it finds that one.
const NEXT: &str = "NEXT";
/// The maps that are found again by later calls.
pub(super) const MAPS: [&str; 14] = [
    "PUBLISHED",
    "FLOWS",
    "FRAGMENTS",
    "HELD",
    "PLACES",
    "ADDRESSES",
    "PEERS",
    "NODE",
    "XDP_UPLINKS",
    "MASQUERADED",
    "EXEMPT",
    // Before what it is asked for.
    "USED",
    "REPLIES",
    "UPLINKS",
];
/// Those of the first object that this one uses.
const SHARED: [&str; 5] = ["PORTS", "STATS", "NEIGHBORS", "ENDPOINTS", "SEGMENTS"];

impl Part {
    /// Every part, in the order in which they are loaded.
    pub(super) const ALL: [Self; 5] = [
        Self::Host,
        Self::Outside,
        Self::Pods,
        Self::Forward,
        Self::Sockets,
    ];

    /// Its programs on tc hooks, and the slots under which `port` calls them. The pin of
    /// the last one says that all are there.
    const fn classifiers(self) -> &'static [(&'static str, Option<u32>)] {
        match self {
            Self::Host => &[
                ("from_host", Some(PROGRAM_FROM_HOST)),
                ("between", Some(PROGRAM_BETWEEN)),
            ],
            Self::Outside => &[("uplink", None), ("egress", None)],
            Self::Pods => &[("from_pod", Some(PROGRAM_FROM_POD))],
            Self::Forward => &[(FORWARD, None)],
            Self::Sockets => &[],
        }
    }

    /// Its programs that are called.
    fn slots(self) -> impl Iterator<Item = (&'static str, u32)> {
        self.classifiers()
            .iter()
            .filter_map(|&(name, slot)| Some((name, slot?)))
    }

    /// Whether it is loaded.
    pub(super) fn is_loaded(self) -> bool {
        self.is_loaded_in(&Root::own())
    }

    /// Whether it is loaded in another layout.
    pub(super) fn is_loaded_in(self, root: &Root) -> bool {
        let pin = match self.classifiers().last() {
            Some((name, _)) => root.nat(name),
            None => root.link(SOCKETS[SOCKETS.len() - 1]),
        };
        pin.exists() && (self == Self::Host || Self::Host.is_loaded_in(root))
    }
}

/// The parts that a network needs.
pub fn parts(has_gateway: bool, masquerades: bool, publishes: bool, direct: bool) -> Vec<Part> {
    [
        (has_gateway || masquerades || publishes, Part::Host),
        (masquerades || publishes, Part::Outside),
        (direct || publishes, Part::Pods),
        (direct, Part::Forward),
        (publishes, Part::Sockets),
    ]
    .into_iter()
    .filter_map(|(needed, part)| needed.then_some(part))
    .collect()
}

/// Loads what is missing of these parts. The lock of the pins is held alone.
pub(super) fn load(parts: &[Part]) -> Result<(), Error> {
    let mut missing: Vec<Part> = Part::ALL
        .into_iter()
        .filter(|part| parts.contains(part) && !part.is_loaded())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !Part::Host.is_loaded() {
        // What a call that was killed has left may be of maps that are gone.
        Part::ALL.into_iter().try_for_each(unload_part)?;
    }
    // The second of them goes on with what the first has found out, in memory that only
    // programs of one load share.
    for (part, other) in [(Part::Pods, Part::Forward), (Part::Forward, Part::Pods)] {
        if missing.contains(&part) && !missing.contains(&other) && other.is_loaded() {
            missing.push(other);
        }
    }
    Translators::load(&missing, &[])?.install(None)
}

/// The programs of some parts: verified, but not yet in use.
pub(super) struct Translators {
    ebpf: Ebpf,
    parts: Vec<Part>,
    /// Those that belong to no part: of tunnels, and XDP's.
    others: Vec<&'static str>,
}

/// The programs that belong to no part, as they are loaded with the first device that needs
/// them.
const OTHERS: [&str; 3] = ["uplink_l3", "egress_l3", xdp::PROGRAM];

impl Translators {
    /// Lets the kernel verify the programs of these parts, and of no part `others`. The maps
    /// are made and pinned, or found.
    pub(super) fn load(parts: &[Part], others: &[&'static str]) -> Result<Self, Error> {
        let limits = Limits::read()?;
        pins::create_nat()?;
        let mut loaded = Self {
            ebpf: load_object(&limits)?,
            parts: Part::ALL
                .into_iter()
                .filter(|part| parts.contains(part))
                .collect(),
            others: others.to_vec(),
        };
        if parts.contains(&Part::Host) {
            name_node()?;
        }
        let classifiers = loaded.classifiers();
        verify(&mut loaded.ebpf, &classifiers)?;
        if parts.contains(&Part::Sockets) {
            for name in SOCKETS {
                let program = sockets(&mut loaded.ebpf, name)?;
                object::uninterrupted(name, || program.load())?;
            }
        }
        if others.contains(&xdp::PROGRAM) {
            let program = xdp::program(&mut loaded.ebpf)?;
            object::uninterrupted(xdp::PROGRAM, || program.load())?;
        }
        Ok(loaded)
    }

    /// All that a layout has in use, and `but` not.
    pub(super) fn load_as_in(root: &Root, but: Option<Part>) -> Result<Option<Self>, Error> {
        let parts: Vec<Part> = Part::ALL
            .into_iter()
            .filter(|part| part.is_loaded_in(root) && Some(*part) != but)
            .collect();
        if parts.is_empty() {
            return Ok(None);
        }
        let others: Vec<&str> = OTHERS
            .into_iter()
            .filter(|name| root.nat(name).exists())
            .collect();
        Self::load(&parts, &others).map(Some)
    }

    fn classifiers(&self) -> Vec<&'static str> {
        let own = self.parts.iter().flat_map(|part| part.classifiers());
        let others = self.others.iter().filter(|name| **name != xdp::PROGRAM);
        own.map(|(name, _)| *name).chain(others.copied()).collect()
    }

    /// Whether these are the programs that are pinned.
    pub(super) fn is_pinned(&mut self) -> Result<bool, Error> {
        if Successor::is_left(&pins::map(NEXT)) {
            return Ok(false);
        }
        for name in self.classifiers() {
            let program = object::classifier(&mut self.ebpf, name)?;
            if !object::is_same(name, program, &pins::nat(name))? {
                return Ok(false);
            }
        }
        if self.parts.contains(&Part::Sockets) {
            for name in SOCKETS {
                let program = sockets(&mut self.ebpf, name)?;
                let fd = program
                    .fd()
                    .map_err(|source| Error::program(name, source))?;
                if !hooks::runs(&pins::link(name), fd.as_fd())? {
                    return Ok(false);
                }
            }
        }
        if self.others.contains(&xdp::PROGRAM) {
            let program = xdp::program(&mut self.ebpf)?;
            let path = pins::nat(xdp::PROGRAM);
            let same = program
                .fd()
                .map_err(|source| Error::program(xdp::PROGRAM, source))
                .map(|fd| object::same(fd.as_fd(), &path))?;
            return same.map_err(|source| Error::Pin { path, source });
        }
        Ok(true)
    }

    /// Takes them into use, in place of those that are; the hooks of sockets may still be
    /// those of the layout `old`.
    pub(super) fn install(mut self, old: Option<&Root>) -> Result<(), Error> {
        // The table empties itself when nobody has it pinned or open any more, so both stay
        // until everything that looks into the former one is gone.
        let mut next = None;
        if self.parts.contains(&Part::Pods) {
            let map = self
                .ebpf
                .take_map(NEXT)
                .ok_or_else(|| failed("opening", NEXT, &"", MapError::ElementNotFound))?;
            next = Some(Successor::new(&pins::map(NEXT), |path| map.pin(path))?);
            let mut calls = Calls::try_from(map).map_err(|source| foreign(NEXT, &source))?;
            if self.parts.contains(&Part::Forward) {
                let program = object::classifier(&mut self.ebpf, FORWARD)?;
                fill(&mut calls, NEXT_FORWARD, FORWARD, program)?;
            }
        }
        // The first one says that there is anything at all, so it comes last.
        for part in self.parts.iter().rev() {
            if *part == Part::Sockets {
                attach_sockets(&mut self.ebpf, old)?;
            }
            for &(name, slot) in part.classifiers() {
                let program = object::classifier(&mut self.ebpf, name)?;
                if let Some(slot) = slot {
                    for level in LogLevel::ALL {
                        if let Some(mut calls) = calls(level)? {
                            fill(&mut calls, slot, name, program)?;
                        }
                    }
                }
                pin_program(name, program)?;
            }
        }
        for &name in &self.others {
            if name == xdp::PROGRAM {
                let program = xdp::program(&mut self.ebpf)?;
                pins::replace(&pins::nat(name), |path| program.pin(path))?;
            } else {
                pin_program(name, object::classifier(&mut self.ebpf, name)?)?;
            }
        }
        next.map_or(Ok(()), Successor::take_over)
    }
}

/// As [`require_all_own`], if any part is to be loaded.
pub(super) fn require_own(parts: &[Part]) -> Result<(), Error> {
    if parts.iter().all(|part| part.is_loaded()) {
        return Ok(());
    }
    require_all_own()
}

/// Refuses maps that are pinned where ours are, or should be, and are not: the loader takes
/// whatever is pinned.
fn require_all_own() -> Result<(), Error> {
    let expected = object::expected(object::NAT)?;
    for name in MAPS.into_iter().chain(SHARED) {
        object::require_own(&pins::map(name), &expected[name])?;
    }
    Ok(())
}

/// Makes or finds the maps, and reads the programs; none is verified yet.
fn load_object(limits: &Limits) -> Result<Ebpf, Error> {
    require_all_own()?;
    let mut loader = object::loader(limits)?;
    for name in MAPS.into_iter().chain(SHARED) {
        loader.map_pin_path(name, pins::map(name));
    }
    let pins = || MAPS.into_iter().map(pins::map).collect();
    Ok(fault::pins(pins, || loader.load(object::NAT))?)
}

fn sockets<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr, Error> {
    ebpf.program_mut(name)
        .ok_or(ProgramError::NotLoaded)
        .and_then(TryInto::try_into)
        .map_err(|source| Error::program(name, source))
}

/// Lets the kernel verify these classifiers, all at once: that is most of what loading
/// takes, and each is another CPU's work.
fn verify(ebpf: &mut Ebpf, names: &[&str]) -> Result<(), Error> {
    thread::scope(|scope| {
        let threads: Vec<_> = ebpf
            .programs_mut()
            .filter(|(name, _)| names.contains(name))
            .map(|(name, program)| {
                let load = move || {
                    let program: Result<&mut SchedClassifier, _> = program.try_into();
                    let program = program.map_err(|source| Error::program(name, source))?;
                    object::uninterrupted(name, || program.load())
                };
                (name.to_owned(), scope.spawn(load))
            })
            .collect();
        threads.into_iter().try_for_each(|(name, thread)| {
            // A panic aborts.
            let aborted = |_| Err(Error::program(&name, ProgramError::NotLoaded));
            thread.join().unwrap_or_else(aborted)
        })
    })
}

/// Tells the programs which network namespace they serve.
fn name_node() -> Result<(), Error> {
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
    change("NODE", || node.set(0, Wire(Node { netns }), 0))
        .map_err(|source| failed("writing", "NODE", &0, source))
}

/// Hooks into the calls of sockets, or gives the hooks that are there these programs.
fn attach_sockets(ebpf: &mut Ebpf, old: Option<&Root>) -> Result<(), Error> {
    let root = mount::cgroup_root()?;
    for name in SOCKETS {
        let error = |source| Error::program(name, source);
        let program = sockets(ebpf, name)?;
        let fd = program.fd().map_err(error)?;
        if hooks::hand_over(name, old, LinkType::Cgroup, &[name], fd.as_fd())? {
            continue;
        }
        pins::remove(&pins::link(name))?;
        let id = program
            .attach(root.as_fd(), CgroupAttachMode::Single)
            .map_err(error)?;
        fault::point(format_args!("attach {name}"));
        let link = program.take_link(id).map_err(error)?;
        pin_link(FdLink::try_from(link), &pins::link(name))?;
    }
    Ok(())
}

fn pin_program(name: &str, program: &mut SchedClassifier) -> Result<(), Error> {
    pins::replace(&pins::nat(name), |path| program.pin(path))
}

type Calls = ProgramArray<MapData>;

/// Lets the programs of `level`, which are about to be loaded, call those that are here.
pub(super) fn fill_slots(level: LogLevel) -> Result<(), Error> {
    let Some(mut calls) = calls(level)? else {
        return Ok(());
    };
    for part in Part::ALL {
        if !part.is_loaded() {
            clear_slots(&mut calls, part)?;
            continue;
        }
        for (name, slot) in part.slots() {
            fill(&mut calls, slot, name, &open_classifier(name)?)?;
        }
    }
    Ok(())
}

fn fill(calls: &mut Calls, slot: u32, name: &str, program: &SchedClassifier) -> Result<(), Error> {
    let fd = program
        .fd()
        .map_err(|source| Error::program(name, source))?;
    change("PROGRAMS", || calls.set(slot, fd, 0))
        .map_err(|source| failed("writing", "PROGRAMS", &slot, source))
}

fn clear_slots(calls: &mut Calls, part: Part) -> Result<(), Error> {
    for (_, slot) in part.slots() {
        removed("PROGRAMS", || calls.clear_index(&slot))
            .map_err(|source| failed("clearing", "PROGRAMS", &slot, source))?;
    }
    Ok(())
}

/// Takes a part away, or what is left of it. The lock of the pins is held alone.
fn unload_part(part: Part) -> Result<(), Error> {
    // The pin that says that all is there goes first, in case this is killed.
    for (name, _) in part.classifiers().iter().rev() {
        pins::remove(&pins::nat(name))?;
    }
    for level in LogLevel::ALL {
        if let Some(mut calls) = calls(level)? {
            clear_slots(&mut calls, part)?;
        }
    }
    match part {
        Part::Host | Part::Forward => Ok(()),
        Part::Pods => pins::remove(&pins::map(NEXT)),
        Part::Outside => uplinks::detach_all(),
        Part::Sockets => {
            for name in SOCKETS.iter().rev() {
                pins::remove(&pins::link(name))?;
            }
            // XDP serves published ports only.
            xdp::detach_all()
        }
    }
}

/// Takes everything away. The lock of the pins is held alone.
pub(super) fn unload() -> Result<(), Error> {
    for part in Part::ALL {
        unload_part(part)?;
    }
    pins::remove(&pins::nat(""))?;
    pins::remove(&pins::links())?;
    for name in MAPS.into_iter().chain([NEXT]) {
        pins::remove(&pins::map(name))?;
    }
    Ok(())
}

/// Takes away what nobody needs any more. It looks at every port, so it is for GC. The
/// lock of the pins is held alone.
pub(super) fn unload_unused() -> Result<(), Error> {
    if !Part::Host.is_loaded() {
        return unload();
    }
    let published = table::<PublishedKey, Published>("PUBLISHED")?;
    let masqueraded = table::<PodKey, Masqueraded>("MASQUERADED")?;
    let has_gateway = entries(&table::<IpKey, Neighbor>("NEIGHBORS")?, "NEIGHBORS")?
        .iter()
        .any(|(_, neighbor)| neighbor.flags & PORT_GATEWAY != 0);
    let direct = entries(&table::<u32, Port>("PORTS")?, "PORTS")?
        .iter()
        .any(|(_, port)| port.flags & PORT_DIRECT != 0);
    let needed = parts(
        has_gateway,
        masqueraded.keys().next().is_some(),
        published.keys().next().is_some(),
        direct,
    );
    if needed.is_empty() {
        return unload();
    }
    // What a call that was killed has left of a part, too.
    for part in Part::ALL {
        if !needed.contains(&part) {
            unload_part(part)?;
        }
    }
    Ok(())
}

/// The table by which the programs of `level` call each other, if it is pinned: that
/// comes before them.
fn calls(level: LogLevel) -> Result<Option<Calls>, Error> {
    let path = pins::variant(level).join("PROGRAMS");
    if !path.exists() {
        return Ok(None);
    }
    Calls::try_from(super::pinned_at(&path, "PROGRAMS")?)
        .map(Some)
        .map_err(|source| foreign("PROGRAMS", &source))
}

fn open_classifier(name: &str) -> Result<SchedClassifier, Error> {
    let path = pins::nat(name);
    id(&path, name)?;
    SchedClassifier::from_pin(path).map_err(|source| Error::program(name, source))
}

/// The kernel's id of a pinned classifier of this name.
fn id(pin: &Path, name: &str) -> Result<u32, Error> {
    let kind = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS;
    super::open_program(pin, name, kind, None).map(|(_, program)| program.id)
}

fn pin_link(
    link: Result<FdLink, aya::programs::links::LinkError>,
    path: &Path,
) -> Result<(), Error> {
    pins::pin(path, |path| {
        let link = link.map_err(io::Error::other)?;
        link.pin(path).map(drop).map_err(io::Error::other)
    })
}

/// What translates, for one call that changes it.
pub struct Nat<'d> {
    datapath: &'d Datapath,
    published: Table<PublishedKey, Published>,
    masqueraded: Table<PodKey, Masqueraded>,
    exempt: LpmTrie<MapData, Wire<ExemptKey>, u8>,
    addresses: Table<Address, Present>,
    uplinks: Table<u32, Uplink>,
    xdp_uplinks: Table<u32, Mac>,
    _lock: Lock,
}

impl Datapath {
    /// Opens what translates, if there is anything.
    ///
    /// # Errors
    ///
    /// It is locked, or a pin is not what this version pins there.
    pub fn nat(&self) -> Result<Option<Nat<'_>>, Error> {
        if !Part::Host.is_loaded() {
            return Ok(None);
        }
        let lock = Lock::take(Path::new(LOCK), Mode::Exclusive)?;
        Ok(Some(Nat {
            datapath: self,
            published: table("PUBLISHED")?,
            masqueraded: table("MASQUERADED")?,
            exempt: LpmTrie::try_from(pinned("EXEMPT")?)
                .map_err(|source| foreign("EXEMPT", &source))?,
            addresses: table("ADDRESSES")?,
            uplinks: table("UPLINKS")?,
            xdp_uplinks: table("XDP_UPLINKS")?,
            _lock: lock,
        }))
    }
}

impl Nat<'_> {
    /// What it is part of.
    pub const fn datapath(&self) -> &Datapath {
        self.datapath
    }

    /// Whether the uplinks are served.
    pub fn has_uplinks(&self) -> bool {
        Part::Outside.is_loaded()
    }

    /// Removes what is left of pods that are gone, and of devices of which `exists` says
    /// so. It looks at every entry, so it is for GC.
    ///
    /// # Errors
    ///
    /// A table cannot be read or written.
    pub fn sweep<E: From<Error>>(
        &mut self,
        exists: impl FnMut(u32) -> Result<bool, E>,
    ) -> Result<(), E> {
        self.sweep_published()?;
        self.sweep_masqueraded()?;
        self.sweep_uplinks(exists)
    }

    /// Removes all that is `owner`'s. It looks at every entry, so it is for owners of
    /// which nobody has a record.
    ///
    /// # Errors
    ///
    /// A table cannot be read or written.
    pub fn forget(&mut self, owner: u32) -> Result<(), Error> {
        self.withdraw_all(owner)?;
        self.unmasquerade_all(owner)
    }
}

/// An address as the maps have it.
const fn octets(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::v4(address.octets()),
        IpAddr::V6(address) => Address::v6(address.octets()),
    }
}

/// And back.
fn address(address: Address) -> IpAddr {
    Ipv6Addr::from(address.octets()).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_loaded_with_the_first_who_needs_it() {
        assert_eq!(parts(false, false, false, false), []);
        assert_eq!(parts(true, false, false, false), [Part::Host]);
        assert_eq!(parts(true, true, false, false), [Part::Host, Part::Outside]);
        assert_eq!(
            parts(true, true, false, true),
            [Part::Host, Part::Outside, Part::Pods, Part::Forward]
        );
        let published = [Part::Host, Part::Outside, Part::Pods, Part::Sockets];
        assert_eq!(parts(false, false, true, false), published);
    }
}
