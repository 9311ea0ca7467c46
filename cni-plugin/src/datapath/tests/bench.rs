//! The programs, loaded without a pin, and a segment with one port of every kind.

use std::{collections::BTreeMap, fs, net::IpAddr, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, MapData, MapError, PerCpuHashMap, PerCpuValues, ProgramArray},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
    util::nr_cpus,
};
use bpf_bridge_common::{
    drops::DropReason,
    layout::{
        Learned, Mac, MacKey, PORT_HAIRPIN, PORT_ISOLATED, PORT_MACSPOOFCHK, PORT_PROMISC, Port,
        PortStats,
    },
};
use nix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

use super::super::{ANY, Datapath, LogLevel, PortSpec, Table, Wire, object, set};
use crate::{
    link::{LinkSettings, Netlink, VethSpec, testing},
    lock::{Lock, Mode},
    mac::MacAddr,
    netns::Netns,
};

/// Verdicts of `linux/pkt_cls.h`.
pub(super) const SHOT: u32 = 2;
pub(super) const STOLEN: u32 = 4;
pub(super) const REDIRECT: u32 = 7;

/// The mark that every frame comes with.
pub(super) const MARK: u32 = 0x1234;
/// What others have left in the control buffer of every frame.
const LITTER: u32 = 77;

/// `struct __sk_buff` of `linux/bpf.h`: its length, and the fields that
/// BPF_PROG_TEST_RUN lets its caller set (`convert___skb_to_skb` in
/// `net/bpf/test_run.c`). `ifindex` is a device of the caller's namespace.
const SKB_LEN: usize = 192;
const SKB_MARK: usize = 8;
const SKB_IFINDEX: usize = 40;
const SKB_CB: usize = 48;

/// What runs a segment of the tests.
///
/// | port | what it is |
/// |---|---|
/// | `gate` | the gateway port; the gateway device is `cni0` |
/// | `a`, `b` | plain |
/// | `hair` | `hairpinMode` |
/// | `iso`, `iso2` | `portIsolation` |
/// | `spoof` | `macspoofchk` |
/// | `promisc` | `promiscMode` |
///
/// `foreign` is a port of another segment, and `stranger` a device without a
/// port. Each is the host's end of a veth; the other end, of the same name, is in
/// [`Bench::pods`] (that of `gate` is `cni0`).
pub(super) struct Bench {
    pub(super) datapath: Datapath,
    pub(super) learned: Table<MacKey, Learned>,
    pub(super) pods: Netns,
    pub(super) segment: u32,
    pub(super) other_segment: u32,
    pub(super) calls: ProgramArray<MapData>,
    pub(super) ebpf: Ebpf,
    indices: BTreeMap<&'static str, u32>,
    _lock: TempDir,
}

/// Each device with its last byte, which its addresses end in, and its flags.
pub(super) const PORTS: [(&str, u8, u32); 7] = [
    ("a", 0x0a, 0),
    ("b", 0x0b, 0),
    ("hair", 0x0c, PORT_HAIRPIN),
    ("iso", 0x0d, PORT_ISOLATED),
    ("iso2", 0x0e, PORT_ISOLATED),
    ("spoof", 0x0f, PORT_MACSPOOFCHK),
    ("promisc", 0x10, PORT_PROMISC),
];

/// The last byte of the addresses of `name`.
fn number(name: &str) -> u8 {
    match name {
        "gate" | "cni0" => 1,
        "foreign" => 0x20,
        "stranger" => 0x30,
        _ => PORTS.iter().find(|port| port.0 == name).unwrap().1,
    }
}

/// The MAC address behind a port.
pub(super) fn mac(name: &str) -> Mac {
    [2, 0, 0, 0, 0, number(name)]
}

/// Its IPv4 address.
pub(super) fn v4(name: &str) -> [u8; 4] {
    [10, 0, 0, number(name)]
}

/// Its IPv6 address.
pub(super) fn v6(name: &str) -> [u8; 16] {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&[0xfd, 0]);
    address[15] = number(name);
    address
}

/// Where a frame went, as one run shows it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) verdict: u32,
    pub(super) bytes: Vec<u8>,
    pub(super) mark: u32,
    /// How many copies each device was given to send, if any.
    pub(super) copies: BTreeMap<String, u64>,
}

/// Runs `work` with a bench, in a network namespace of its own.
pub(super) fn with_bench(level: LogLevel, work: impl FnOnce(&mut Bench)) {
    let host = testing::netns();
    host.run_in(|| work(&mut Bench::new(&host, level))).unwrap();
}

impl Bench {
    fn new(host: &Netns, level: LogLevel) -> Self {
        let pods = testing::netns();
        // The stacks shall not send frames of their own.
        for netns in [host, &pods] {
            netns
                .run_in(|| {
                    let path = Path::new("/proc/sys/net/ipv6/conf/default/disable_ipv6");
                    if path.exists() {
                        fs::write(path, "1").unwrap();
                    }
                })
                .unwrap();
        }
        let links = Netlink::open(host).unwrap();
        let inside = Netlink::open(&pods).unwrap();
        let mut indices = BTreeMap::new();
        let gateway = links.create_veth(&veth("cni0", "gate", None)).unwrap();
        links.set_up(gateway.host).unwrap();
        links.set_up(gateway.peer).unwrap();
        indices.insert("cni0", gateway.host);
        indices.insert("gate", gateway.peer);
        for name in PORTS
            .iter()
            .map(|port| port.0)
            .chain(["foreign", "stranger"])
        {
            let made = links.create_veth(&veth(name, name, Some(&pods))).unwrap();
            let settings = LinkSettings {
                up: Some(true),
                ..LinkSettings::default()
            };
            links.configure(made.host, &settings).unwrap();
            inside.configure(made.peer, &settings).unwrap();
            indices.insert(name, made.host);
        }

        let (ebpf, datapath, lock, learned, calls) = load(level);
        let mut bench = Self {
            datapath,
            learned,
            pods,
            segment: gateway.host,
            other_segment: 1_000_000,
            calls,
            ebpf,
            indices,
            _lock: lock,
        };
        bench.populate();
        bench
    }

    fn populate(&mut self) {
        let segment = self.segment;
        let gate = PortSpec {
            ifindex: self.index("gate"),
            segment,
            flags: 0,
            mac: mac("gate"),
            addresses: &[],
            tentative: false,
        };
        self.datapath.create_segment(&gate).unwrap();
        for address in addresses("gate") {
            self.datapath
                .add_gateway_address(segment, address, mac("gate"))
                .unwrap();
        }
        for (name, _, flags) in PORTS {
            let port = PortSpec {
                ifindex: self.index(name),
                segment,
                flags,
                mac: mac(name),
                addresses: &addresses(name),
                tentative: false,
            };
            self.datapath.add_port(&port).unwrap();
        }
        // Its gateway port is its only port.
        let foreign = PortSpec {
            ifindex: self.index("foreign"),
            segment: self.other_segment,
            flags: 0,
            mac: mac("foreign"),
            addresses: &[],
            tentative: false,
        };
        self.datapath.create_segment(&foreign).unwrap();
        self.reset();
    }

    /// The ifindex of a device of the host's side.
    pub(super) fn index(&self, name: &str) -> u32 {
        self.indices[name]
    }

    /// The name of the device with this ifindex.
    pub(super) fn name(&self, index: u32) -> &'static str {
        self.indices
            .iter()
            .find(|entry| *entry.1 == index)
            .unwrap()
            .0
    }

    /// All counters at zero, nothing learned.
    pub(super) fn reset(&mut self) {
        let mut ports: Vec<u32> = self.datapath.ports().map(|(index, _)| index).collect();
        ports.push(0);
        for index in ports {
            self.datapath.stats.insert(index, zero(), ANY).unwrap();
        }
        let keys: Vec<_> = self.learned.keys().map(Result::unwrap).collect();
        for key in keys {
            self.learned.remove(&key).unwrap();
        }
    }

    /// Replaces the flags of a port's entry in `PORTS`.
    pub(super) fn set_port(&mut self, name: &str, change: impl FnOnce(&mut Port)) {
        let index = self.index(name);
        let mut port = self.datapath.port(index).unwrap().unwrap();
        change(&mut port);
        set(&mut self.datapath.ports, "PORTS", index, port, ANY).unwrap();
    }

    /// The counters that are not zero, by device; `""` is the entry for devices
    /// that are no ports.
    pub(super) fn counters(&self) -> BTreeMap<&'static str, PortStats> {
        let ports = self.datapath.ports().map(|(index, _)| index);
        let ports: Vec<u32> = ports.chain([0]).collect();
        ports
            .into_iter()
            .map(|index| {
                let name = if index == 0 { "" } else { self.name(index) };
                (name, self.datapath.stats(index).unwrap().unwrap())
            })
            .filter(|(_, stats)| *stats != PortStats::default())
            .collect()
    }

    /// What was learned: segment and address, and the device.
    pub(super) fn table(&self) -> BTreeMap<(u32, Mac), &'static str> {
        self.learned
            .iter()
            .map(|entry| {
                let (Wire(key), Wire(value)) = entry.unwrap();
                assert_eq!((key.reserved, value.reserved), ([0; 2], 0));
                ((key.segment, key.mac), self.name(value.port))
            })
            .collect()
    }

    /// Puts an entry into `LEARNED` as if it had been learned `age` ns ago.
    pub(super) fn learn(&mut self, segment: u32, mac: Mac, port: &str, age: u64) -> u64 {
        let entry = Learned {
            seen: now().wrapping_sub(age),
            port: self.index(port),
            reserved: 0,
        };
        set(
            &mut self.learned,
            "LEARNED",
            MacKey::new(segment, mac),
            entry,
            ANY,
        )
        .unwrap();
        entry.seen
    }

    /// When the address was last seen.
    pub(super) fn seen(&self, mac: Mac) -> u64 {
        let key = Wire(MacKey::new(self.segment, mac));
        self.learned.get(&key, 0).unwrap().0.seen
    }

    /// One frame through `program`, as if it had arrived on `device`.
    pub(super) fn run(&self, program: &str, device: &str, frame: &[u8]) -> Run {
        self.run_at(program, device, frame, LITTER)
    }

    /// The same, with `place` in the control buffer.
    pub(super) fn run_at(&self, program: &str, device: &str, frame: &[u8], place: u32) -> Run {
        let mut context = [0; SKB_LEN];
        let mut put = |at: usize, value: u32| {
            context[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        };
        put(SKB_MARK, MARK);
        put(SKB_IFINDEX, self.index(device));
        put(SKB_CB, place);
        let mut bytes = vec![0; 4096];
        let mut after = [0; SKB_LEN];
        let before = sent();
        let program: &SchedClassifier = self.ebpf.program(program).unwrap().try_into().unwrap();
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut bytes),
                ctx_in: Some(&context),
                ctx_out: Some(&mut after),
                ..TestRunOptions::new()
            })
            .unwrap_or_else(|error| panic!("{} bytes {frame:02x?}: {error:?}", frame.len()));
        bytes.truncate(result.data_size_out as usize);
        let copies = sent()
            .into_iter()
            .map(|(device, count)| {
                let more = count - before[&device];
                (device, more)
            })
            .filter(|(_, more)| *more > 0)
            .collect();
        let mark = after[SKB_MARK..SKB_MARK + 4].try_into().unwrap();
        Run {
            verdict: result.return_value,
            bytes,
            mark: u32::from_ne_bytes(mark),
            copies,
        }
    }
}

/// The counters of one frame that was dropped.
pub(super) fn dropped(reason: DropReason) -> PortStats {
    let mut stats = PortStats::default();
    stats.drops[reason as usize] = 1;
    stats
}

/// `bpf_ktime_get_ns`.
pub(super) fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(time.tv_sec()).unwrap() * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap()
}

/// The pod's two addresses.
fn addresses(name: &str) -> [IpAddr; 2] {
    [v4(name).into(), v6(name).into()]
}

fn veth<'a>(name: &'a str, peer: &'a str, pods: Option<&'a Netns>) -> VethSpec<'a> {
    // The end that has the address is the one that stands for the pod, or the host.
    let address = Some(MacAddr::new(mac(name)));
    let (mac, peer_mac) = match pods {
        Some(_) => (None, address),
        None => (address, None),
    };
    VethSpec {
        name,
        mac,
        peer_name: peer,
        peer_mac,
        peer_netns: pods,
        mtu: 0,
    }
}

type Loaded = (
    Ebpf,
    Datapath,
    TempDir,
    Table<MacKey, Learned>,
    ProgramArray<MapData>,
);

/// How many addresses can be learned at one port.
pub(super) const LEARNED_SHARE: u32 = 64;

/// What `object::load` does, without a pin.
fn load(level: LogLevel) -> Loaded {
    let mut ebpf = EbpfLoader::new()
        .override_global("AYA_LOG_LEVEL", &level.number(), false)
        .override_global("LEARNED_SHARE", &LEARNED_SHARE, true)
        .load(object::OBJECT)
        .unwrap();
    let mut calls = ProgramArray::try_from(ebpf.take_map("PROGRAMS").unwrap()).unwrap();
    for (name, slot) in object::PROGRAMS {
        let program = object::load_program(&mut ebpf, name).unwrap();
        if let Some(slot) = slot {
            calls.set(slot, program.fd().unwrap(), 0).unwrap();
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let lock = Lock::take(&directory.path().join("lock"), Mode::Shared).unwrap();
    let mut stats = PerCpuHashMap::try_from(ebpf.take_map("STATS").unwrap()).unwrap();
    stats.insert(0, zero(), ANY).unwrap();
    let datapath = Datapath {
        ports_id: 0,
        ports: table(&mut ebpf, "PORTS").unwrap(),
        stats,
        endpoints: table(&mut ebpf, "ENDPOINTS").unwrap(),
        neighbors: table(&mut ebpf, "NEIGHBORS").unwrap(),
        segments: table(&mut ebpf, "SEGMENTS").unwrap(),
        members: table(&mut ebpf, "MEMBERS").unwrap(),
        _lock: lock,
    };
    let learned = table(&mut ebpf, "LEARNED").unwrap();
    (ebpf, datapath, directory, learned, calls)
}

fn table<K: bytemuck::Pod, V: bytemuck::Pod>(
    ebpf: &mut Ebpf,
    name: &str,
) -> Result<Table<K, V>, MapError> {
    HashMap::try_from(ebpf.take_map(name).unwrap())
}

fn zero() -> PerCpuValues<Wire<PortStats>> {
    vec![Wire(PortStats::default()); nr_cpus().unwrap()]
        .try_into()
        .unwrap()
}

/// How many frames each device of the namespace was given to send. A veth whose
/// peer's queue is full drops them, but counts those too.
pub(super) fn sent() -> BTreeMap<String, u64> {
    fs::read_to_string("/proc/thread-self/net/dev")
        .unwrap()
        .lines()
        .skip(2)
        .map(|line| {
            let (name, numbers) = line.split_once(':').unwrap();
            let numbers: Vec<u64> = numbers
                .split_whitespace()
                .map(|number| number.parse().unwrap())
                .collect();
            // Eight columns of receiving, then bytes, packets, errors, drops.
            (name.trim().to_owned(), numbers[9] + numbers[11])
        })
        .collect()
}
