//! The lease directory: other programs write to it, and so may anybody who was let in.
//!
//! Whatever is in there, nothing panics or waits, no address is given out twice or from
//! outside of its range, what names another container is left alone, and nothing outside
//! of the directory changes.

#![no_main]

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::symlink,
    },
    path::{Path, PathBuf},
};

use arbitrary::{Arbitrary, Unstructured};
use bpf_bridge::{
    boot,
    ipam::host_local::{Config, Owner, Requests, Store},
};
use libfuzzer_sys::{Corpus, fuzz_target};
use serde_json::{Value, json};

const NETWORK: &str = "net";
/// Who is asked for: the rest may be found in the directory.
const OWNERS: [&str; 6] = ["c0", "c1", "c2", "c3", "c4", "c5"];
const IFNAME: &str = "eth0";

#[derive(Arbitrary, Debug)]
struct Input {
    pool: Pool,
    found: Vec<(Name, Entry)>,
    index: Vec<(Name, Entry)>,
    operations: Vec<Operation>,
}

#[derive(Arbitrary, Debug)]
enum Pool {
    Small,
    TwoRanges,
    DualStack,
    V4 {
        bits: u32,
        length: u8,
        start: Option<u32>,
        end: Option<u32>,
        gateway: Option<u32>,
    },
    V6 {
        bits: u128,
        length: u8,
        start: Option<u128>,
        end: Option<u128>,
        gateway: Option<u128>,
    },
}

impl Pool {
    fn ipam(&self) -> Value {
        let v4 = |bits: Option<u32>| bits.map(|bits| Ipv4Addr::from_bits(bits).to_string());
        let v6 = |bits: Option<u128>| bits.map(|bits| Ipv6Addr::from_bits(bits).to_string());
        match *self {
            Self::Small => json!({"subnet": "10.1.0.0/29"}),
            Self::TwoRanges => json!({"ranges": [[
                {"subnet": "10.1.0.0/28", "rangeStart": "10.1.0.4", "rangeEnd": "10.1.0.6"},
                {"subnet": "10.1.1.0/30"},
            ]]}),
            Self::DualStack => json!({"ranges": [
                [{"subnet": "10.1.0.0/28"}], [{"subnet": "fd00::/124"}],
            ]}),
            Self::V4 {
                bits,
                length,
                start,
                end,
                gateway,
            } => {
                let length = length % 33;
                let mask = u32::MAX.checked_shl(u32::from(32 - length)).unwrap_or(0);
                let inside = |bits: u32| bits & !mask | self.network_v4(mask);
                json!({
                    "subnet": format!("{}/{length}", Ipv4Addr::from_bits(bits & mask)),
                    "rangeStart": v4(start.map(inside)),
                    "rangeEnd": v4(end.map(inside)),
                    "gateway": v4(gateway.map(inside)),
                })
            }
            Self::V6 {
                bits,
                length,
                start,
                end,
                gateway,
            } => {
                let length = length % 129;
                let mask = u128::MAX.checked_shl(u32::from(128 - length)).unwrap_or(0);
                let inside = |inner: u128| inner & !mask | bits & mask;
                json!({
                    "subnet": format!("{}/{length}", Ipv6Addr::from_bits(bits & mask)),
                    "rangeStart": v6(start.map(inside)),
                    "rangeEnd": v6(end.map(inside)),
                    "gateway": v6(gateway.map(inside)),
                })
            }
        }
    }

    fn network_v4(&self, mask: u32) -> u32 {
        match self {
            Self::V4 { bits, .. } => bits & mask,
            _ => 0,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Name {
    V4(u8),
    V6(u8),
    LastReserved(u8),
    Lock,
    Draft,
    State,
    New,
    /// Of the index's entries.
    Key(u8),
    Other(Vec<u8>),
}

impl Name {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::V4(last) => format!("10.1.0.{}", last % 16).into_bytes(),
            Self::V6(last) => format!("fd00::{:x}", last % 16).into_bytes(),
            Self::LastReserved(set) => format!("last_reserved_ip.{}", set % 2).into_bytes(),
            Self::Lock => b"lock".to_vec(),
            Self::Draft => b".bpf-bridge.draft".to_vec(),
            Self::State => b"state".to_vec(),
            Self::New => b"new".to_vec(),
            Self::Key(id) => format!("c{}:{IFNAME}", id % 8).into_bytes(),
            Self::Other(bytes) => {
                let allowed = bytes.iter().filter(|byte| !matches!(byte, 0 | b'/'));
                allowed.copied().take(64).collect()
            }
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Entry {
    Empty,
    Lease {
        id: u8,
        interface: bool,
    },
    Text(Vec<u8>),
    Address(u8),
    Directory,
    Pipe,
    /// A further name of a file outside.
    HardLink,
    /// A symbolic link to a file, a directory or nothing outside, or with any text.
    LinkToFile,
    LinkToDirectory,
    LinkToNothing,
    Link(Vec<u8>),
    /// An entry of the index.
    Entry {
        written: bool,
        of_this_boot: bool,
        addresses: Vec<u8>,
    },
}

impl Entry {
    fn write(&self, path: &Path, outside: &Path) {
        // What cannot be made is not there.
        let _ = match self {
            Self::Empty => fs::write(path, []),
            Self::Lease { id, interface } => {
                let ifname = if *interface { "\r\neth0" } else { "" };
                fs::write(path, format!("c{}{ifname}", id % 8))
            }
            Self::Text(text) => fs::write(path, text),
            Self::Address(last) => fs::write(path, format!("10.1.0.{last}")),
            Self::Directory => fs::create_dir(path),
            Self::Pipe => {
                use nix::{sys::stat::Mode, unistd::mkfifo};
                mkfifo(path, Mode::S_IRWXU).map_err(Into::into)
            }
            Self::HardLink => fs::hard_link(outside.join("file"), path),
            Self::LinkToFile => symlink(outside.join("file"), path),
            Self::LinkToDirectory => symlink(outside, path),
            Self::LinkToNothing => symlink(outside.join("nothing"), path),
            Self::Link(text) => symlink(OsStr::from_bytes(text), path),
            Self::Entry {
                written,
                of_this_boot,
                addresses,
            } => {
                let origin = if *written { "written" } else { "seen" };
                let boot = if *of_this_boot { boot::id() } else { "another" };
                let mut text = format!("{origin} {boot}");
                for last in addresses.iter().take(4) {
                    text += &format!(" 10.1.0.{}@1.000000000", last % 16);
                }
                symlink(text, path)
            }
        };
    }
}

#[derive(Arbitrary, Debug)]
enum Operation {
    Add(u8),
    Request(u8, u8),
    Del(u8),
    Check(u8),
    Collect(u8),
    Status,
    /// Somebody writes while we do not.
    Write(Name, Entry),
}

/// A directory that is gone when the value is.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() {
            memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let path = base.join(format!("bpf-bridge-fuzz-{}", std::process::id()));
        let place = Self(path);
        place.clear();
        for directory in ["store/net", "store/.bpf-bridge/net", "outside"] {
            fs::create_dir_all(place.0.join(directory)).expect("a directory for the leases");
        }
        fs::write(place.outside().join("file"), "c1\r\neth0").expect("a file outside");
        place
    }

    fn clear(&self) {
        let _ = fs::remove_dir_all(&self.0);
    }

    fn store(&self) -> PathBuf {
        self.0.join("store")
    }

    fn network(&self) -> PathBuf {
        self.store().join(NETWORK)
    }

    fn outside(&self) -> PathBuf {
        self.0.join("outside")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What is outside, name by name.
fn contents(directory: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let entries = fs::read_dir(directory).expect("what is outside is there");
    entries
        .flatten()
        .map(|entry| {
            let content = fs::read(entry.path()).unwrap_or_default();
            (entry.file_name().into_vec(), content)
        })
        .collect()
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let mut unstructured = Unstructured::new(data);
    let Ok(input) = Input::arbitrary(&mut unstructured) else {
        return Corpus::Reject;
    };
    run(&input);
    Corpus::Keep
});

fn run(input: &Input) {
    let place = Place::new();
    let (network, outside) = (place.network(), place.outside());
    let write = |directory: &Path, name: &Name, entry: &Entry| {
        let name = name.bytes();
        let path = directory.join(OsStr::from_bytes(&name));
        // Whoever writes keeps off what is there, and would wait at a pipe.
        if !matches!(&name[..], b"" | b"." | b"..") && fs::symlink_metadata(&path).is_err() {
            entry.write(&path, &outside);
        }
    };
    for (name, entry) in input.found.iter().take(24) {
        write(&network, name, entry);
    }
    for (name, entry) in input.index.iter().take(8) {
        write(
            &place.store().join(".bpf-bridge").join(NETWORK),
            name,
            entry,
        );
    }
    let before = contents(&outside);

    let config = |request: Option<u8>| {
        let ips = request.map(|last| format!("10.1.0.{}", last % 16));
        let requests = Requests {
            cni_args_ip: ips.as_deref(),
            ..Requests::default()
        };
        Config::parse(&input.pool.ipam(), requests, "1.0.0")
    };
    let Ok(plain) = config(None) else { return };
    let Ok(store) = Store::open(&place.store(), NETWORK) else {
        return;
    };
    let owner = |id: u8| Owner {
        container_id: OWNERS[usize::from(id) % OWNERS.len()],
        ifname: IFNAME,
    };
    // What was given out in this run, and not given back.
    let mut given: BTreeMap<&str, Vec<IpAddr>> = BTreeMap::new();
    for operation in input.operations.iter().take(32) {
        match operation {
            Operation::Add(id) | Operation::Request(id, _) => {
                let config = match operation {
                    Operation::Request(_, last) => config(Some(*last)),
                    _ => config(None),
                };
                let Ok(config) = config else { continue };
                let owner = owner(*id);
                let Ok(lease) = store.allocate(owner, &config, &|_| true) else {
                    continue;
                };
                assert_eq!(lease.allocations.len(), config.range_sets().len());
                let mut addresses = Vec::new();
                for (allocation, set) in lease.allocations.iter().zip(config.range_sets()) {
                    let address = allocation.address.addr();
                    let range = set.range_of(address).expect("an address of its range set");
                    assert_eq!(allocation.address.prefix_len(), range.subnet().prefix_len());
                    assert_eq!(allocation.gateway, Some(range.gateway()));
                    assert_ne!(address, range.gateway());
                    assert_eq!(address, address.to_canonical());
                    for (other, others) in &given {
                        assert!(!others.contains(&address), "{address} is {other}'s");
                    }
                    addresses.push(address);
                }
                // Had it any, this would have been refused.
                assert_eq!(given.insert(owner.container_id, addresses), None);
            }
            Operation::Del(id) => {
                if store.release(owner(*id)).is_ok() {
                    given.remove(owner(*id).container_id);
                }
            }
            Operation::Check(id) => {
                let has = given.get(owner(*id).container_id);
                match (store.check(owner(*id)), has) {
                    (Ok(found), Some(has)) => assert!(has.iter().all(|ip| found.contains(ip))),
                    // The directory may be one that nobody can work in.
                    (Ok(_) | Err(_), _) => {}
                }
            }
            Operation::Collect(kept) => {
                let kept = |id: &u8| kept >> id & 1 == 1;
                let valid: Vec<_> = (0..6).filter(kept).map(owner).collect();
                if let Ok(freed) = store.collect_garbage(&valid) {
                    given.retain(|id, _| valid.iter().any(|owner| owner.container_id == *id));
                    for address in given.values().flatten() {
                        assert!(!freed.contains(address), "{address} was freed");
                    }
                } else {
                    given.retain(|id, _| valid.iter().any(|owner| owner.container_id == *id));
                }
            }
            Operation::Status => drop(store.check_free(&plain, &|_| true)),
            Operation::Write(name, entry) => write(&network, name, entry),
        }
        for (id, addresses) in &given {
            for address in addresses {
                let lease = fs::read(network.join(address.to_string()));
                let text = format!("{id}\r\n{IFNAME}").into_bytes();
                assert_eq!(
                    lease.ok(),
                    Some(text),
                    "the lease of {address} after {operation:?}"
                );
            }
        }
    }
    assert_eq!(contents(&outside), before, "outside of the directory");
    assert!(!place.0.join("nothing").exists());
}
