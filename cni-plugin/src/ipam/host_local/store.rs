//! Leases in their directory.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{File, TryLockError},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use nix::{errno::Errno, fcntl::Flock};
use thiserror::Error;

use super::{
    config::Config,
    directory::{Directory, Stamp, read_all},
    index::{Content, Entry, Name, Origin, is_container_id, is_ifname, lease_text, parse_lease},
    range::{Range, RangeSet},
};
use crate::{
    boot,
    lock::{self, LockError, Mode},
};

/// The directory of all networks' indexes. No network is called so: their names begin
/// with a letter or digit.
const INDEX: &str = ".bpf-bridge";

/// Holds the boot and the time of the network directory that the index fits.
const STATE: &str = "state";

const LOCK: &str = "lock";

/// So many addresses are tried one by one before the directory is listed.
const PROBES: usize = 64;

/// What keeps the store from doing what was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("{action} {path:?}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The network's lock could not be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The name cannot be a directory's.
    #[error(
        "network name {0:?} is not valid: it must begin with a letter or digit and have only letters, digits, '_', '.' and '-'"
    )]
    Network(String),
    /// The owner could not be told from its lease again.
    #[error(
        "container id {container_id:?} with interface {ifname:?} cannot own an address: one of them is not valid"
    )]
    Owner {
        /// As given.
        container_id: String,
        /// As given.
        ifname: String,
    },
    /// The owner has an address of the configuration already.
    #[error(
        "{address} has been allocated to {container_id} for {ifname:?}, duplicate allocation is not allowed"
    )]
    Duplicate {
        /// The address it has.
        address: IpAddr,
        /// The owner's container id.
        container_id: String,
        /// The owner's interface; empty if the lease does not say.
        ifname: String,
    },
    /// No address is left that could be given out.
    #[error("failed to allocate for range {set}: no IP addresses available in range set: {ranges}")]
    Exhausted {
        /// Index of the range set.
        set: usize,
        /// The set.
        ranges: String,
    },
    /// A requested address is in use.
    #[error(
        "requested IP address {address} is not available in range set {ranges}: it is held by {holder}"
    )]
    Held {
        /// As requested.
        address: IpAddr,
        /// The range set that it lies in.
        ranges: String,
        /// Who has it.
        holder: String,
    },
    /// A requested address is not for containers.
    #[error("requested ip {address} is {what} of subnet {subnet}")]
    Reserved {
        /// As requested.
        address: IpAddr,
        /// What it is.
        what: &'static str,
        /// The subnet that it lies in.
        subnet: IpNet,
    },
    /// Requested addresses that no range set has, or that are too many of one set.
    #[error("failed to allocate all requested IPs: {}", join(.0, " "))]
    Unsatisfied(Vec<IpAddr>),
    /// CHECK finds no lease.
    #[error(
        "failed to find an address of container {container_id} for {ifname:?} in {directory:?}"
    )]
    NotAllocated {
        /// As given.
        container_id: String,
        /// As given.
        ifname: String,
        /// Where the network's leases are.
        directory: PathBuf,
    },
    /// All that went wrong in what goes on after an error.
    #[error("{}", join(.0, "; "))]
    Several(Vec<StoreError>),
}

impl StoreError {
    pub(super) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Io {
            action,
            path: path.into(),
            source: source.into(),
        }
    }

    fn is_read_only(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if source.kind() == io::ErrorKind::ReadOnlyFilesystem)
    }

    fn all(errors: Vec<Self>) -> Result<(), Self> {
        if errors.is_empty() {
            Ok(())
        } else {
            Err(Self::Several(errors))
        }
    }
}

fn join<T: ToString>(items: &[T], separator: &str) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(separator)
}

/// Whose a lease is, on the network of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner<'a> {
    /// CNI_CONTAINERID
    pub container_id: &'a str,
    /// CNI_IFNAME
    pub ifname: &'a str,
}

impl Owner<'_> {
    /// The owner under both names that its leases may have: with the interface, and, as
    /// old versions of the stock plugin wrote it, without.
    fn names(&self) -> Result<[Name; 2], StoreError> {
        let container_id = self.container_id.trim();
        if !is_container_id(container_id) || !is_ifname(self.ifname) {
            return Err(StoreError::Owner {
                container_id: self.container_id.into(),
                ifname: self.ifname.into(),
            });
        }
        let name = |ifname: &str| Name {
            container_id: container_id.into(),
            ifname: ifname.into(),
        };
        Ok([name(self.ifname), name("")])
    }
}

/// An address for an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// The address, with the prefix length of its subnet.
    pub address: IpNet,
    /// The subnet's gateway; `host-local` always has one.
    pub gateway: Option<IpAddr>,
}

/// What [`Store::allocate`] gave.
///
/// **Keep it until the owner's host veth exists**: as long as it is not dropped (and the
/// process lives), nobody takes the addresses back for want of a veth. Dropping it frees
/// nothing; for that there is [`Store::release`].
#[derive(Debug)]
#[must_use = "the addresses can be taken back once this is dropped"]
pub struct Lease {
    /// One per range set, in the order of the sets.
    pub allocations: Vec<Allocation>,
    /// The leases' file, flock(2)ed.
    _under_way: File,
}

/// Tells whether an owner's host veth exists. Called under the network's lock, so it must
/// be quick and must not use the store.
type Alive<'a> = &'a dyn Fn(Owner<'_>) -> bool;

/// The leases of a network. Every method locks them against other processes and threads.
#[derive(Debug)]
pub struct Store {
    network: Directory,
    index: Directory,
    /// Empty if the system does not tell.
    boot: String,
}

impl Store {
    /// Opens the store of a network, making its directories if need be: for ADD.
    ///
    /// # Errors
    /// The name is not a network's, or a directory cannot be opened or made.
    pub fn open(data_dir: &Path, network: &str) -> Result<Self, StoreError> {
        Self::open_in_boot(data_dir, network, boot::id().to_owned())
    }

    /// Opens the store of a network if it has one: for DEL, CHECK, GC and STATUS, which
    /// have nothing to do without.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_existing(data_dir: &Path, network: &str) -> Result<Option<Self>, StoreError> {
        check_network(network)?;
        if Directory::open(data_dir.join(network))?.is_none() {
            return Ok(None);
        }
        Self::open(data_dir, network).map(Some)
    }

    pub(super) fn open_in_boot(
        data_dir: &Path,
        network: &str,
        boot: String,
    ) -> Result<Self, StoreError> {
        check_network(network)?;
        let path = data_dir.join(INDEX).join(network);
        // First, so that whoever finds leases of ours need not make it, on a full disk.
        let index = match Directory::open(path.clone())? {
            Some(index) => index,
            None => {
                Directory::create(data_dir.to_owned(), 0o755)?;
                Directory::create(data_dir.join(INDEX), 0o700)?;
                Directory::create(path, 0o700)?
            }
        };
        Ok(Self {
            network: Directory::create(data_dir.join(network), 0o755)?,
            index,
            boot,
        })
    }

    /// Reserves one address of each range set for the owner, or nothing at all.
    ///
    /// Of a set in which addresses are requested, the first of them is taken, else the next
    /// free one after the address that the set gave out last. `alive` tells whether an
    /// owner's host veth exists; it is asked about the owner itself if it has leases, and
    /// about others if there is no free address. It must be quick and not use the store.
    /// Of the owner itself it is to say whether an earlier attachment lives: a veth that was
    /// made for this very ADD does not count.
    ///
    /// # Errors
    /// The owner has an address of the configuration and is alive; a set has no free
    /// address; a request cannot be fulfilled; or a system call fails.
    pub fn allocate(
        &self,
        owner: Owner<'_>,
        config: &Config,
        alive: Alive<'_>,
    ) -> Result<Lease, StoreError> {
        let names = owner.names()?;
        let session = self.session()?;
        let kept = session.refuse_duplicate(&names, config, alive)?;
        let mut requested = config.requested.clone();
        let mut chosen = Vec::with_capacity(config.sets.len());
        for (index, set) in config.sets.iter().enumerate() {
            let request = requested
                .iter()
                .position(|&address| set.range_of(address).is_some());
            chosen.push(match request {
                Some(at) => session.claim(requested.remove(at), set, config, alive)?,
                None => session.pick(index, set, config, alive)?,
            });
        }
        if !requested.is_empty() {
            return Err(StoreError::Unsatisfied(requested));
        }
        let [name, _] = names;
        session.write(&name, kept, &chosen)
    }

    /// Frees all addresses of the owner and returns them. None is no error.
    ///
    /// # Errors
    /// A system call failed; whatever could be freed was.
    pub fn release(&self, owner: Owner<'_>) -> Result<Vec<IpAddr>, StoreError> {
        // What cannot own anything does not.
        let Ok(names) = owner.names() else {
            return Ok(Vec::new());
        };
        let session = match self.lock() {
            // Whoever wrote a lease had a lock: there is none to be freed, and no room for
            // another.
            Err(_) if matches!(self.network.open_existing(LOCK), Ok(None)) => {
                return Ok(Vec::new());
            }
            locked => locked?,
        };
        let indexed = session.ensure_index();
        for name in &names {
            let entry = match &indexed {
                Ok(()) => session.entry(name)?,
                // A full disk perhaps: that is no reason to keep what is to be freed.
                Err(_) => Some(session.any_lease()?),
            };
            let Some(entry) = entry else { continue };
            let released = session.free(name, &entry)?;
            if indexed.is_ok() {
                session.mark();
            }
            if !released.is_empty() {
                return Ok(released);
            }
        }
        Ok(Vec::new())
    }

    /// The owner's addresses.
    ///
    /// # Errors
    /// It has none, or a system call failed.
    pub fn check(&self, owner: Owner<'_>) -> Result<Vec<IpAddr>, StoreError> {
        let session = self.session()?;
        for name in &owner.names()? {
            if let Some(entry) = session.entry(name)? {
                let held = session.held(name, &entry)?;
                if !held.is_empty() {
                    return Ok(held);
                }
            }
        }
        Err(StoreError::NotAllocated {
            container_id: owner.container_id.into(),
            ifname: owner.ifname.into(),
            directory: self.network.path().into(),
        })
    }

    /// Frees all addresses but those of the valid owners, and returns them.
    ///
    /// Also kept are what an ADD that is still under way reserved, and files that name no
    /// container at all: somebody reserved these addresses by hand.
    ///
    /// # Errors
    /// All that went wrong; what could be freed was.
    pub fn collect_garbage(&self, valid: &[Owner<'_>]) -> Result<Vec<IpAddr>, StoreError> {
        let session = self.session()?;
        let valid: HashSet<_> = valid
            .iter()
            // A lease without an interface name is any interface's.
            .flat_map(|owner| [(owner.container_id, owner.ifname), (owner.container_id, "")])
            .collect();
        let mut released = Vec::new();
        let mut errors = Vec::new();
        for address in session.addresses()? {
            let freed = session.lease(address).and_then(|lease| match lease {
                Some(LeaseFile {
                    content: Content::Owner(name),
                    file,
                    ..
                }) if !valid.contains(&(name.container_id.as_str(), name.ifname.as_str()))
                    && !under_way(file.as_ref()) =>
                {
                    self.network.unlink(&address.to_string()).map(|()| true)
                }
                _ => Ok(false),
            });
            match freed {
                Ok(true) => released.push(address),
                Ok(false) => {}
                Err(error) => errors.push(error),
            }
        }
        let synced = self.network.sync().and_then(|()| session.import());
        errors.extend(synced.err());
        StoreError::all(errors)?;
        Ok(released)
    }

    /// Whether the next [`Store::allocate`] would find an address in each range set: for
    /// STATUS. `alive` is as there.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`] for the first set that has none, or a system call failed.
    pub fn check_free(&self, config: &Config, alive: Alive<'_>) -> Result<(), StoreError> {
        let session = self.session()?;
        for (index, set) in config.sets.iter().enumerate() {
            session.pick(index, set, config, alive)?;
        }
        Ok(())
    }

    /// Locks the network and sees to it that the index fits.
    fn session(&self) -> Result<Session<'_>, StoreError> {
        let session = self.lock()?;
        session.ensure_index()?;
        Ok(session)
    }

    fn lock(&self) -> Result<Session<'_>, StoreError> {
        let file = match self.network.open_file(LOCK) {
            // Where nothing can be written, there may be nothing that must be.
            Err(error) if error.is_read_only() => self
                .network
                .open_existing(LOCK)
                .ok()
                .flatten()
                .ok_or(error)?,
            opened => opened?,
        };
        let path = self.network.path().join(LOCK);
        Ok(Session {
            store: self,
            _lock: lock::lock(file, Mode::Exclusive, &path)?,
        })
    }
}

fn check_network(network: &str) -> Result<(), StoreError> {
    // The specification has the same rule for both names.
    if is_container_id(network) {
        Ok(())
    } else {
        Err(StoreError::Network(network.into()))
    }
}

/// Whether the ADD that wrote this lease has not come to its host veth yet.
fn under_way(lease: Option<&File>) -> bool {
    // Where locking fails, better to leave alone what is perhaps in use.
    lease.is_some_and(|file| match file.try_lock() {
        Ok(()) => false,
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => true,
    })
}

fn last_reserved_name(set: usize) -> String {
    format!("last_reserved_ip.{set}")
}

/// What is found under the name of an address.
struct LeaseFile {
    content: Content,
    stamp: Stamp,
    /// None if it is not even a file.
    file: Option<File>,
}

type Choice<'a> = (IpAddr, &'a Range);

/// A store while it is locked.
struct Session<'a> {
    store: &'a Store,
    _lock: Flock<File>,
}

impl Session<'_> {
    fn ensure_index(&self) -> Result<(), StoreError> {
        if self.index_fits()? {
            Ok(())
        } else {
            self.import()
        }
    }

    /// Whether nobody but this program changed the network directory, in this boot.
    fn index_fits(&self) -> Result<bool, StoreError> {
        let index = &self.store.index;
        let Some(file) = index
            .open_existing(STATE)
            .map_err(|e| index.error("opening", STATE, e))?
        else {
            return Ok(false);
        };
        let state = read_all(&file).map_err(|error| index.error("reading", STATE, error))?;
        let fitting = self.state(self.store.network.modified()?);
        Ok(state.starts_with(fitting.as_bytes()))
    }

    fn state(&self, modified: Stamp) -> String {
        format!("{} {modified}\n", self.store.boot)
    }

    /// Notes that the index fits the network directory as it is now.
    ///
    /// If that fails, the next operation reads all leases, so it is no error.
    fn mark(&self) {
        let _ = self.store.network.touch().and_then(|modified| {
            let index = &self.store.index;
            let state = modified.map_or_else(|| "-\n".into(), |modified| self.state(modified));
            let file = index.open_own_file(STATE)?;
            // In place: torn, it fits nothing.
            index.write(STATE, &file, &state)
        });
    }

    /// Makes the index anew from the leases, without those that ended with an earlier
    /// boot and without those that are torn.
    fn import(&self) -> Result<(), StoreError> {
        let Store {
            network,
            index,
            boot,
        } = self.store;
        let mut entries = HashMap::new();
        for key in index.names()? {
            if let Some(key) = key.to_str().filter(|&key| key != STATE) {
                let text = index.read_link(key)?;
                entries.insert(key.to_owned(), text.and_then(|text| Entry::decode(&text)));
            }
        }
        // Sorted, so that the order of a directory decides nothing.
        let mut owners: BTreeMap<String, Vec<(IpAddr, Stamp)>> = BTreeMap::new();
        for address in self.addresses()? {
            match self.lease(address)? {
                Some(LeaseFile {
                    content: Content::Torn,
                    ..
                }) => {
                    network.unlink(&address.to_string())?;
                }
                Some(LeaseFile {
                    content: Content::Owner(name),
                    stamp,
                    ..
                }) => {
                    let (key, lease) = (name.key(), (address, stamp));
                    let known = entries.get(&key).and_then(Option::as_ref);
                    let orphan = |entry: &Entry| {
                        entry.origin == Origin::Written
                            && entry.before(boot)
                            && entry.leases.contains(&lease)
                    };
                    if known.is_some_and(orphan) {
                        network.unlink(&address.to_string())?;
                    } else {
                        owners.entry(key).or_default().push(lease);
                    }
                }
                Some(LeaseFile {
                    content: Content::Foreign,
                    ..
                })
                | None => {}
            }
        }
        for key in entries.keys().filter(|&key| !owners.contains_key(key)) {
            index.unlink(key)?;
        }
        for (key, mut leases) in owners {
            leases.sort_by_key(|lease| lease.0);
            let known = entries.get(&key).and_then(Option::as_ref);
            // An entry stands as long as nothing was added to it.
            let entry = match known {
                Some(known) if leases.iter().all(|lease| known.leases.contains(lease)) => Entry {
                    leases,
                    ..known.clone()
                },
                _ => Entry {
                    origin: Origin::Seen,
                    boot: boot.clone(),
                    leases,
                },
            };
            if known != Some(&entry) {
                index.write_link(&key, &entry.encode())?;
            }
        }
        self.mark();
        Ok(())
    }

    /// The addresses that something is found under.
    fn addresses(&self) -> Result<Vec<IpAddr>, StoreError> {
        let names = self.store.network.names()?;
        let address = |name: &str| {
            let address: IpAddr = name.parse().ok()?;
            // Another spelling reserves nothing, for the stock plugin either.
            (address.to_string() == name).then_some(address)
        };
        Ok(names
            .iter()
            .filter_map(|name| name.to_str().and_then(address))
            .collect())
    }

    fn lease(&self, address: IpAddr) -> Result<Option<LeaseFile>, StoreError> {
        let network = &self.store.network;
        let name = address.to_string();
        let nothing = |content| LeaseFile {
            content,
            stamp: Stamp::default(),
            file: None,
        };
        let file = match network.open_existing(&name) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(None),
            // A symbolic link, a socket.
            Err(Errno::ELOOP | Errno::ENXIO) => return Ok(Some(nothing(Content::Foreign))),
            Err(errno) => return Err(network.error("opening the lease", &name, errno)),
        };
        let failed = |error| network.error("reading the lease", &name, error);
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Ok(Some(nothing(Content::Foreign)));
        }
        let content = parse_lease(&read_all(&file).map_err(failed)?);
        Ok(Some(LeaseFile {
            content,
            stamp: Stamp::of(&metadata),
            file: Some(file),
        }))
    }

    /// What the index has of an owner.
    fn entry(&self, name: &Name) -> Result<Option<Entry>, StoreError> {
        let index = &self.store.index;
        let key = name.key();
        let Some(text) = index.read_link(&key)? else {
            return Ok(None);
        };
        if let Some(entry) = Entry::decode(&text) {
            return Ok(Some(entry));
        }
        // Somebody was at the index. The leases know.
        self.import()?;
        Ok(index.read_link(&key)?.and_then(|text| Entry::decode(&text)))
    }

    /// The lease if it is the owner's.
    fn lease_of(&self, name: &Name, address: IpAddr) -> Result<Option<LeaseFile>, StoreError> {
        let lease = self.lease(address)?;
        Ok(lease.filter(|lease| matches!(&lease.content, Content::Owner(owner) if owner == name)))
    }

    /// The addresses of an entry that are the owner's indeed.
    fn held(&self, name: &Name, entry: &Entry) -> Result<Vec<IpAddr>, StoreError> {
        let mut held = Vec::with_capacity(entry.leases.len());
        for &(address, _) in &entry.leases {
            if self.lease_of(name, address)?.is_some() {
                held.push(address);
            }
        }
        Ok(held)
    }

    /// Removes an owner's leases, then its entry. Marking is left to the caller.
    fn free(&self, name: &Name, entry: &Entry) -> Result<Vec<IpAddr>, StoreError> {
        let network = &self.store.network;
        let mut freed = Vec::with_capacity(entry.leases.len());
        let mut errors = Vec::new();
        for &(address, _) in &entry.leases {
            let unlinked = self.lease_of(name, address).and_then(|lease| match lease {
                Some(_) => network
                    .unlink(&address.to_string())
                    .map(|()| freed.push(address)),
                None => Ok(()),
            });
            errors.extend(unlinked.err());
        }
        // Not marked then, so the next operation looks what is left.
        StoreError::all(errors)?;
        if entry.origin == Origin::Seen {
            // Brought back by a power failure, nothing would say that it is dead.
            network.sync()?;
        }
        self.store.index.unlink(&name.key())?;
        Ok(freed)
    }

    /// An entry of all leases there are, for [`Session::free`] to take the owner's from.
    fn any_lease(&self) -> Result<Entry, StoreError> {
        let all = self.addresses()?.into_iter();
        Ok(Entry {
            origin: Origin::Seen,
            boot: String::new(),
            leases: all.map(|address| (address, Stamp::default())).collect(),
        })
    }

    /// Whether what owns these leases is gone, and they are ours to take.
    fn is_dead(&self, name: &Name, entry: &Entry, alive: Alive<'_>) -> Result<bool, StoreError> {
        let before = entry.before(&self.store.boot);
        if entry.origin == Origin::Seen {
            // No container outlives its boot. What names no interface may be somebody's
            // reservation by hand, though.
            return Ok(before && !name.ifname.is_empty());
        }
        // In this order: once the ADD is not under way any more, there is a veth.
        for &(address, _) in &entry.leases {
            if self
                .lease_of(name, address)?
                .is_some_and(|lease| under_way(lease.file.as_ref()))
            {
                return Ok(false);
            }
        }
        let owner = Owner {
            container_id: &name.container_id,
            ifname: &name.ifname,
        };
        Ok(before || !alive(owner))
    }

    /// Lets an owner pass that has no address of the configuration, or whose addresses are
    /// left from a life that ended: these are freed. Returns what it has besides.
    fn refuse_duplicate(
        &self,
        names: &[Name; 2],
        config: &Config,
        alive: Alive<'_>,
    ) -> Result<Option<Entry>, StoreError> {
        let mut kept = None;
        for name in names {
            let Some(mut entry) = self.entry(name)? else {
                continue;
            };
            let held = self.held(name, &entry)?;
            entry.leases.retain(|(address, _)| held.contains(address));
            // It is the owner itself that comes again: of an earlier boot, whatever
            // another program wrote is over.
            if entry.before(&self.store.boot) || self.is_dead(name, &entry, alive)? {
                self.free(name, &entry)?;
                continue;
            }
            let of_config = |address: &&IpAddr| {
                config
                    .sets
                    .iter()
                    .any(|set| set.range_of(**address).is_some())
            };
            if let Some(&address) = held.iter().find(of_config) {
                return Err(StoreError::Duplicate {
                    address,
                    container_id: name.container_id.clone(),
                    ifname: name.ifname.clone(),
                });
            }
            if *name == names[0] && !held.is_empty() {
                kept = Some(entry);
            }
        }
        Ok(kept)
    }

    /// Whether there is nothing under the address. A file without content is removed: while
    /// the lock is held, nobody is about to write to it.
    fn is_free(&self, address: IpAddr) -> Result<bool, StoreError> {
        let network = &self.store.network;
        let name = address.to_string();
        match network.is_empty_file(&name)? {
            None => Ok(true),
            Some(true) => network.unlink(&name).map(|()| true),
            Some(false) => Ok(false),
        }
    }

    /// The next free address of a set; of a set without one, after taking back what is dead.
    fn pick<'s>(
        &self,
        index: usize,
        set: &'s RangeSet,
        config: &Config,
        alive: Alive<'_>,
    ) -> Result<Choice<'s>, StoreError> {
        if let Some(choice) = self.search(index, set, config)? {
            return Ok(choice);
        }
        self.import()?;
        for address in self
            .addresses()?
            .into_iter()
            .filter(|&it| set.range_of(it).is_some())
        {
            self.take_if_dead(address, alive)?;
        }
        let exhausted = || StoreError::Exhausted {
            set: index,
            ranges: set.to_string(),
        };
        self.search(index, set, config)?.ok_or_else(exhausted)
    }

    fn search<'s>(
        &self,
        index: usize,
        set: &'s RangeSet,
        config: &Config,
    ) -> Result<Option<Choice<'s>>, StoreError> {
        let last = self.last_reserved(index);
        let mut choices = set
            .round_robin(last)
            .filter(|&(address, range)| config.reserved(address, range).is_none());
        for choice in choices.by_ref().take(PROBES) {
            if self.is_free(choice.0)? {
                return Ok(Some(choice));
            }
        }
        // A long stretch in use: one listing costs less than as many questions.
        let taken: HashSet<IpAddr> = self.addresses()?.into_iter().collect();
        Ok(choices.find(|(address, _)| !taken.contains(address)))
    }

    /// The requested address, if it can be had.
    fn claim<'s>(
        &self,
        address: IpAddr,
        set: &'s RangeSet,
        config: &Config,
        alive: Alive<'_>,
    ) -> Result<Choice<'s>, StoreError> {
        let Some(range) = set.range_of(address) else {
            return Err(StoreError::Unsatisfied(vec![address]));
        };
        if let Some(what) = config.reserved(address, range) {
            return Err(StoreError::Reserved {
                address,
                what,
                subnet: range.subnet(),
            });
        }
        if self.is_free(address)? {
            return Ok((address, range));
        }
        match self.take_if_dead(address, alive)? {
            None => Ok((address, range)),
            Some(holder) => Err(StoreError::Held {
                address,
                ranges: set.to_string(),
                holder,
            }),
        }
    }

    /// Frees an address whose owner is dead. Returns who has it otherwise.
    fn take_if_dead(
        &self,
        address: IpAddr,
        alive: Alive<'_>,
    ) -> Result<Option<String>, StoreError> {
        let name = match self.lease(address)?.map(|lease| lease.content) {
            None => return Ok(None),
            Some(Content::Torn) => {
                self.store.network.unlink(&address.to_string())?;
                return Ok(None);
            }
            Some(Content::Foreign) => {
                return Ok(Some("a file that does not name a container".into()));
            }
            Some(Content::Owner(name)) => name,
        };
        if let Some(entry) = self.entry(&name)? {
            let listed = entry.leases.iter().any(|lease| lease.0 == address);
            if listed && self.is_dead(&name, &entry, alive)? {
                self.free(&name, &entry)?;
                return Ok(None);
            }
        }
        let Name {
            container_id,
            ifname,
        } = name;
        Ok(Some(format!(
            "container {container_id} for interface {ifname:?}"
        )))
    }

    fn write(
        &self,
        name: &Name,
        kept: Option<Entry>,
        chosen: &[Choice<'_>],
    ) -> Result<Lease, StoreError> {
        let Store {
            network,
            index,
            boot,
        } = self.store;
        let draft = network.draft(lease_text(name).as_bytes())?;
        // A power failure ends the boot, and with it the lease: whatever is left of it then is
        // removed, unless boots cannot be told apart.
        let must_last = boot.is_empty();
        if must_last {
            network.sync_draft(&draft)?;
        }
        let failed = |error| network.error("locking a file in", "", error);
        // Nobody has seen it yet, so this does not wait.
        draft.file().lock().map_err(failed)?;
        let stamp = Stamp::of(&draft.file().metadata().map_err(failed)?);

        let key = name.key();
        let mut entry = kept.clone().unwrap_or_else(|| Entry {
            origin: Origin::Written,
            boot: boot.clone(),
            leases: Vec::new(),
        });
        entry
            .leases
            .extend(chosen.iter().map(|choice| (choice.0, stamp)));
        // First, so that a lease never lacks it.
        let written = index.write_link(&key, &entry.encode()).and_then(|()| {
            for (address, _) in chosen {
                network.publish(&draft, &address.to_string())?;
            }
            network.settle(&draft)?;
            for (set, &(address, _)) in chosen.iter().enumerate() {
                self.set_last_reserved(set, address)?;
            }
            if must_last { network.sync() } else { Ok(()) }
        });
        if let Err(error) = written {
            // As far as it goes; what this leaves, the next operation finds.
            for &(address, _) in chosen {
                if let Ok(Some(lease)) = self.lease_of(name, address)
                    && lease.stamp == stamp
                {
                    let _ = network.unlink(&address.to_string());
                }
            }
            let _ = network.settle(&draft);
            let _ = match kept {
                Some(kept) => index.write_link(&key, &kept.encode()),
                None => index.unlink(&key),
            };
            return Err(error);
        }
        self.mark();

        let allocation = |&(address, range): &Choice<'_>| Allocation {
            address: range.on_subnet(address),
            gateway: Some(range.gateway()),
        };
        Ok(Lease {
            allocations: chosen.iter().map(allocation).collect(),
            _under_way: draft.into_file(),
        })
    }

    /// The address that a set gave out last. What cannot be read only costs the order.
    fn last_reserved(&self, set: usize) -> Option<IpAddr> {
        let file = self
            .store
            .network
            .open_existing(&last_reserved_name(set))
            .ok()??;
        let content = read_all(&file).ok()?;
        std::str::from_utf8(&content).ok()?.trim().parse().ok()
    }

    fn set_last_reserved(&self, set: usize, address: IpAddr) -> Result<(), StoreError> {
        let network = &self.store.network;
        let name = last_reserved_name(set);
        let text = address.to_string();
        let file = network.open_own_file(&name)?;
        // Not truncated first: file systems take that for a reason to write to the disk.
        network.write(&name, &file, &text)?;
        network.cut(&name, &file, text.len())
    }
}
