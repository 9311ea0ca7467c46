//! The programs of published ports, loaded without a pin, on a node with real devices,
//! addresses and routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _},
    ptr,
    sync::Mutex,
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, PerCpuHashMap, PerCpuValues},
    programs::{SchedClassifier, Xdp},
    util::nr_cpus,
};
use bpf_bridge_common::{
    drops::DropReason,
    layout::{
        Address, Flow, FlowKey, FragmentKey, Fragments, Mac, PORT_GATEWAY, PORT_PUBLISHED, Port,
        PortStats, Published, PublishedKey,
    },
};
use ipnet::IpNet;
use nix::libc;

use super::{
    super::{
        super::{ANY, Table, Wire, object},
        bench::{REDIRECT, SHOT},
        frames::{IPV6, ethernet},
    },
    packets::SCTP,
};
use crate::{
    link::{LinkSettings, Netlink, Route, VethSpec, testing},
    mac::MacAddr,
    netns::Netns,
    node::Limits,
};

/// `TC_ACT_UNSPEC`: as if no program were there.
pub(super) const PASS: u32 = u32::MAX;

const SKB_LEN: usize = 192;
const SKB_MARK: usize = 8;
const SKB_INGRESS_IFINDEX: usize = 36;
const SKB_IFINDEX: usize = 40;
const SKB_CB: usize = 48;
const SKB_GSO_SIZE: usize = 176;
const MARK: u32 = 0x1234;
/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE`: the kernel sums the packet up as a device would
/// have, and fails the run if the program leaves it another packet than that sum.
const CHECKSUM_COMPLETE: u32 = 1 << 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_PROG_TEST_RUN: libc::c_int = 10;

/// The version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The devices of the node, with the last byte of their MAC address.
///
/// | device | what it is |
/// |---|---|
/// | `cni0`, `gate` | gateway device and port of the first network |
/// | `a`, `b` | its pods with published ports |
/// | `c` | one without |
/// | `cni1`, `m` | another network's gateway device, and a pod there |
/// | `up0`, `up1` | uplinks; the default routes are by `up0` |
const DEVICES: [(&str, u8); 8] = [
    ("cni0", 1),
    ("cni1", 2),
    ("up0", 3),
    ("up1", 4),
    ("a", 10),
    ("b", 11),
    ("c", 12),
    ("m", 13),
];

impl Family {
    /// The address of a device, of the pod behind it, or of a machine outside: `x`
    /// is on the link of `up0`, `router` routes there, `far` is behind it, `x1` is on
    /// the link of `up1`.
    pub(super) fn of(self, name: &str) -> IpAddr {
        let (subnet, host) = match name {
            "cni0" => (0, 1),
            "a" => (0, 10),
            "b" => (0, 11),
            "c" => (0, 12),
            "cni1" => (9, 1),
            "m" => (9, 13),
            "up0" => (7, 2),
            "router" => (7, 1),
            "x" => (7, 20),
            "up1" => (8, 2),
            "x1" => (8, 20),
            "far" => (77, 1),
            "new" => (6, 6),
            _ => panic!("{name}"),
        };
        match self {
            Self::V4 if name == "far" => Ipv4Addr::new(198, 51, 100, 1).into(),
            Self::V4 => Ipv4Addr::new(10, 0, subnet, host).into(),
            Self::V6 if name == "far" => "2001:db8::1".parse().unwrap(),
            Self::V6 => Ipv6Addr::new(0xfd00, subnet.into(), 0, 0, 0, 0, 0, host.into()).into(),
        }
    }

    /// With a port.
    pub(super) fn end(self, name: &str, port: u16) -> SocketAddr {
        SocketAddr::new(self.of(name), port)
    }

    pub(super) fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// The MAC address of a device, or of the pod behind it.
pub(super) fn mac(name: &str) -> Mac {
    let number = match name {
        // A machine outside.
        "x" => 0x99,
        _ => DEVICES.iter().find(|device| device.0 == name).unwrap().1,
    };
    [2, 0, 0, 0, 0, number]
}

/// The port that the tests publish, and the one that the pod listens on.
pub(super) fn ports(protocol: u8) -> (u16, u16) {
    if protocol == SCTP {
        (8080, 8080)
    } else {
        (8080, 80)
    }
}

/// What a run shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) verdict: u32,
    pub(super) bytes: Vec<u8>,
    pub(super) mark: u32,
}

/// A flow, in words: the pod and as whom it sees the client, what the client addressed,
/// the client, and by which device it comes.
pub(super) type Seen = (SocketAddr, SocketAddr, SocketAddr, SocketAddr, String);

pub(super) struct Stage {
    pub(super) ebpf: Ebpf,
    pub(super) links: Netlink,
    _peers: Netns,
    ports: Table<u32, Port>,
    pub(super) flows: Table<FlowKey, Flow>,
    pub(super) fragments: Table<FragmentKey, Fragments>,
    pub(super) addresses: Table<Address, u8>,
    published: Table<PublishedKey, Published>,
    stats: PerCpuHashMap<MapData, u32, Wire<PortStats>>,
    indices: BTreeMap<&'static str, u32>,
}

/// Programs that tests before have loaded, with empty maps: to have them verified takes
/// longer than most tests.
static LOADED: Mutex<Vec<Ebpf>> = Mutex::new(Vec::new());

/// Runs `work` on a node of its own.
pub(super) fn with_stage(work: impl FnOnce(&mut Stage)) {
    let host = testing::netns();
    let before = LOADED.lock().unwrap().pop();
    host.run_in(|| {
        let mut stage = Stage::new(&host, before.unwrap_or_else(|| load(&Limits::default())));
        work(&mut stage);
        empty_maps(&stage.ebpf);
        LOADED.lock().unwrap().push(stage.ebpf);
    })
    .unwrap();
}

/// The same, with other limits.
pub(super) fn with_stage_of(limits: &Limits, work: impl FnOnce(&mut Stage)) {
    let host = testing::netns();
    host.run_in(|| work(&mut Stage::new(&host, load(limits))))
        .unwrap();
}

fn load(limits: &Limits) -> Ebpf {
    let mut ebpf = object::loader(limits).unwrap().load(object::NAT).unwrap();
    for name in [
        "uplink",
        "uplink_l3",
        "egress",
        "egress_l3",
        "from_pod",
        "from_host",
        "between",
    ] {
        object::load_program(&mut ebpf, name).unwrap();
    }
    let xdp: &mut Xdp = ebpf.program_mut("xdp").unwrap().try_into().unwrap();
    object::uninterrupted("xdp", || xdp.load()).unwrap();
    ebpf
}

/// Opens a map a second time: the programs' own stays where it is.
fn open(ebpf: &Ebpf, name: &str) -> Map {
    let data = data(ebpf.map(name).unwrap()).unwrap();
    let fd = data.fd().as_fd().try_clone_to_owned().unwrap();
    Map::from_map_data(MapData::from_fd(fd).unwrap()).unwrap()
}

/// A table of the programs.
pub(super) fn table<K: bytemuck::Pod, V: bytemuck::Pod>(ebpf: &Ebpf, name: &str) -> Table<K, V> {
    HashMap::try_from(open(ebpf, name)).unwrap()
}

/// A map that holds what programs or their users write, if it is one.
fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuHashMap(data)
        | Map::LpmTrie(data) => Some(data),
        _ => None,
    }
}

/// Removes every entry that was written.
fn empty_maps(ebpf: &Ebpf) {
    /// The part of `union bpf_attr` of commands on a map (`linux/bpf.h`).
    #[repr(C)]
    struct Attributes {
        map: u32,
        padding: u32,
        key: u64,
        next: u64,
    }
    let run = |command: libc::c_int, attributes: &mut Attributes| {
        // SAFETY: the attributes are the commands', and their pointers null, or to buffers
        // of a key's length that live until it returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                ptr::from_mut(attributes),
                size_of::<Attributes>(),
            )
        };
        result == 0
    };
    for data in ebpf.maps().filter_map(|(_, map)| data(map)) {
        let mut key = vec![0u8; data.info().unwrap().key_size() as usize];
        let key = key.as_mut_ptr() as u64;
        let mut attributes = Attributes {
            map: u32::try_from(data.fd().as_fd().as_raw_fd()).unwrap(),
            padding: 0,
            key: 0,
            next: key,
        };
        // Again and again the first.
        while run(BPF_MAP_GET_NEXT_KEY, &mut attributes) {
            (attributes.key, attributes.next) = (key, 0);
            assert!(run(BPF_MAP_DELETE_ELEM, &mut attributes));
            (attributes.key, attributes.next) = (0, key);
        }
    }
}

fn sysctl(path: &str, value: &str) {
    fs::write(format!("/proc/sys/net/{path}"), value).unwrap();
}

impl Stage {
    fn new(host: &Netns, ebpf: Ebpf) -> Self {
        let peers = testing::netns();
        peers
            .run_in(|| sysctl("ipv6/conf/default/disable_ipv6", "1"))
            .unwrap();
        sysctl("ipv4/ip_forward", "1");
        sysctl("ipv6/conf/all/forwarding", "1");
        let links = Netlink::open(host).unwrap();
        let inside = Netlink::open(&peers).unwrap();
        let mut indices = BTreeMap::new();
        for (name, _) in DEVICES {
            let gateway = name.starts_with("cni");
            let own = Some(MacAddr::new(mac(name)));
            let peer_name = match name {
                "cni0" => "gate",
                "cni1" => "gate1",
                _ => name,
            };
            let pod = matches!(name, "a" | "b" | "c" | "m");
            let made = links
                .create_veth(&VethSpec {
                    name,
                    mac: if pod { None } else { own },
                    peer_name,
                    peer_mac: if pod { own } else { None },
                    peer_netns: (!gateway).then_some(&peers),
                    mtu: 0,
                })
                .unwrap();
            links.set_up(made.host).unwrap();
            if gateway { &links } else { &inside }
                .configure(
                    made.peer,
                    &LinkSettings {
                        up: Some(true),
                        ..LinkSettings::default()
                    },
                )
                .unwrap();
            indices.insert(name, made.host);
            if gateway {
                indices.insert(peer_name, made.peer);
            }
        }
        let mut ports: Table<u32, Port> = table(&ebpf, "PORTS");
        let segments = (indices["cni0"], indices["cni1"]);
        for (name, segment, flags) in [
            ("gate", segments.0, PORT_GATEWAY),
            ("gate1", segments.1, PORT_GATEWAY),
            ("a", segments.0, PORT_PUBLISHED),
            ("b", segments.0, PORT_PUBLISHED),
            ("c", segments.0, 0),
            ("m", segments.1, 0),
        ] {
            let port = Port {
                segment,
                flags,
                slot: 0,
                mac: if name.starts_with("gate") {
                    [0; 6]
                } else {
                    mac(name)
                },
                reserved: [0; 2],
            };
            ports.insert(Wire(indices[name]), Wire(port), ANY).unwrap();
        }
        let stats = PerCpuHashMap::try_from(open(&ebpf, "STATS")).unwrap();
        let mut stage = Self {
            ports,
            flows: table(&ebpf, "FLOWS"),
            fragments: table(&ebpf, "FRAGMENTS"),
            addresses: table(&ebpf, "ADDRESSES"),
            published: table(&ebpf, "PUBLISHED"),
            ebpf,
            links,
            _peers: peers,
            stats,
            indices,
        };
        for family in FAMILIES {
            for name in ["cni0", "cni1", "up0", "up1"] {
                stage.add_address(name, family.of(name));
            }
            stage
                .links
                .add_route(stage.index("up0"), &default_route(family))
                .unwrap();
        }
        stage.reset();
        stage
    }

    /// A new address of the node, with its subnet.
    pub(super) fn add_address(&self, device: &str, address: IpAddr) {
        let length = if address.is_ipv4() { 24 } else { 64 };
        let net = IpNet::new(address, length).unwrap();
        self.links
            .add_address(self.index(device), net, false)
            .unwrap();
        if address.is_ipv6() {
            let limit = std::time::Duration::from_secs(5);
            assert!(self.links.wait_local(address, limit).unwrap());
        }
    }

    pub(super) fn delete_address(&self, device: &str, address: IpAddr) {
        let length = if address.is_ipv4() { 24 } else { 64 };
        let net = IpNet::new(address, length).unwrap();
        assert!(self.links.delete_address(self.index(device), net).unwrap());
    }

    /// Gives a device another MAC address.
    pub(super) fn rename(&self, device: &str, mac: Mac) {
        let settings = LinkSettings {
            mac: Some(MacAddr::new(mac)),
            ..LinkSettings::default()
        };
        self.links.configure(self.index(device), &settings).unwrap();
    }

    pub(super) fn set_mtu(&self, device: &str, mtu: u32) {
        let settings = LinkSettings {
            mtu: Some(mtu),
            ..LinkSettings::default()
        };
        self.links.configure(self.index(device), &settings).unwrap();
    }

    /// Nothing is published; addresses and routes are as at the beginning.
    pub(super) fn clear(&mut self) {
        self.reset();
        let keys: Vec<_> = self.published.keys().map(Result::unwrap).collect();
        for key in keys {
            self.published.remove(&key).unwrap();
        }
        let keys: Vec<_> = self.addresses.keys().map(Result::unwrap).collect();
        for key in keys {
            self.addresses.remove(&key).unwrap();
        }
        for family in FAMILIES {
            let new = IpNet::new(family.of("new"), if family == Family::V4 { 24 } else { 64 });
            self.links
                .delete_address(self.index("up1"), new.unwrap())
                .unwrap();
            self.links
                .add_route(self.index("up0"), &default_route(family))
                .unwrap();
        }
    }

    pub(super) fn delete_default_routes(&self) {
        for family in FAMILIES {
            self.links
                .delete_route(self.index("up0"), &default_route(family))
                .unwrap();
        }
    }

    pub(super) fn index(&self, name: &str) -> u32 {
        self.indices[name]
    }

    pub(super) fn name(&self, index: u32) -> String {
        let found = self.indices.iter().find(|(_, there)| **there == index);
        found.map_or_else(|| index.to_string(), |(name, _)| (*name).to_owned())
    }

    /// Publishes the tests' port of `address` for a pod.
    pub(super) fn publish(&mut self, address: IpAddr, protocol: u8, pod: &str) {
        let (port, pod_port) = ports(protocol);
        self.publish_as(SocketAddr::new(address, port), protocol, pod, pod_port);
    }

    pub(super) fn publish_as(&mut self, at: SocketAddr, protocol: u8, pod: &str, pod_port: u16) {
        let family = if at.is_ipv4() { Family::V4 } else { Family::V6 };
        let entry = Published {
            address: wire(family.of(pod)),
            gateway: wire(family.of("cni0")),
            port: self.index(pod),
            segment: self.index("cni0"),
            specific: 0,
            pod_port,
            mac: mac(pod),
            gateway_mac: mac("cni0"),
            flags: 0,
        };
        let key = |address| PublishedKey {
            address: wire(address),
            port: at.port(),
            protocol,
            reserved: 0,
        };
        self.set_published(key(at.ip()), entry);
        if !at.ip().is_unspecified() {
            let count = Published {
                specific: 1,
                port: 0,
                ..entry
            };
            self.set_published(key(family.unspecified()), count);
        }
    }

    pub(super) fn set_published(&mut self, key: PublishedKey, entry: Published) {
        self.published.insert(Wire(key), Wire(entry), ANY).unwrap();
    }

    /// The port that `publish` has published on every address, without a gateway address.
    pub(super) fn publish_without_gateway(&mut self, family: Family, protocol: u8, pod: &str) {
        self.publish(family.unspecified(), protocol, pod);
        self.change_published(family, protocol, |entry| {
            entry.gateway = Address::UNSPECIFIED;
        });
    }

    /// Changes the entry of the tests' port on every address.
    pub(super) fn change_published(
        &mut self,
        family: Family,
        protocol: u8,
        change: impl FnOnce(&mut Published),
    ) {
        let key = Wire(PublishedKey {
            address: wire(family.unspecified()),
            port: ports(protocol).0,
            protocol,
            reserved: 0,
        });
        let mut entry = self.published.get(&key, 0).unwrap().0;
        change(&mut entry);
        self.set_published(key.0, entry);
    }

    /// No flow, no fragment, no count.
    pub(super) fn reset(&mut self) {
        self.reset_counters();
        let keys: Vec<_> = self.flows.keys().map(Result::unwrap).collect();
        for key in keys {
            self.flows.remove(&key).unwrap();
        }
        let keys: Vec<_> = self.fragments.keys().map(Result::unwrap).collect();
        for key in keys {
            self.fragments.remove(&key).unwrap();
        }
    }

    /// No count.
    pub(super) fn reset_counters(&mut self) {
        let zero = || {
            PerCpuValues::try_from(vec![Wire(PortStats::default()); nr_cpus().unwrap()]).unwrap()
        };
        let ports: Vec<u32> = self.indices.values().copied().chain([0]).collect();
        for port in ports {
            self.stats.insert(port, zero(), ANY).unwrap();
        }
    }

    /// The drops since, by device and reason.
    pub(super) fn drops(&self) -> Vec<(String, DropReason, u64)> {
        let mut drops = Vec::new();
        for (name, index) in &self.indices {
            let values = self.stats.get(index, 0).unwrap();
            for reason in DropReason::ALL {
                let count = values
                    .iter()
                    .map(|value| value.0.drops[reason as usize])
                    .sum();
                if count > 0 {
                    drops.push(((*name).to_owned(), reason, count));
                }
            }
        }
        drops
    }

    /// Every flow that is remembered.
    pub(super) fn seen(&self) -> BTreeSet<Seen> {
        self.flows
            .iter()
            .map(|entry| {
                let (Wire(key), Wire(flow)) = entry.unwrap();
                assert_eq!(key.reserved, [0; 3]);
                (
                    SocketAddr::new(address(key.pod), key.pod_port),
                    SocketAddr::new(address(key.client), key.client_port),
                    SocketAddr::new(address(flow.original), flow.original_port),
                    SocketAddr::new(address(flow.client), flow.client_port),
                    match flow.from {
                        0 => "stack".to_owned(),
                        index => self.name(index),
                    },
                )
            })
            .collect()
    }

    /// The source port under which the pod sees a client.
    pub(super) fn shown(&self, client: SocketAddr, original: SocketAddr) -> Option<u16> {
        let seen = self.seen();
        let mut found = seen
            .iter()
            .filter(|flow| flow.3 == client && flow.2 == original);
        let port = found.next().map(|flow| flow.1.port());
        assert!(found.next().is_none(), "{client} has two flows: {seen:?}");
        port
    }

    /// One frame through a program, as if it had arrived on `device`.
    pub(super) fn run(&self, program: &str, device: &str, frame: &[u8]) -> Run {
        self.run_with(program, device, frame, &[]).unwrap()
    }

    /// The same for `from_host`, with the pod's device.
    pub(super) fn run_from_host(&self, pod: &str, packet: &[u8]) -> Run {
        let frame = frame(mac(pod), mac("cni0"), packet);
        let cb = [
            (SKB_CB, self.index(pod)),
            (SKB_CB + 4, PORT_PUBLISHED),
            (SKB_CB + 8, self.index("cni0")),
        ];
        let run = self.run_with("from_host", "gate", &frame, &cb).unwrap();
        self.verify_sums("from_host", "gate", &frame, &cb, &run);
        run
    }

    /// The same for `egress`, of a packet that the host has received on `came_by`.
    pub(super) fn run_forwarded(&self, device: &str, came_by: &str, frame: &[u8]) -> Run {
        let fields = [(SKB_INGRESS_IFINDEX, self.index(came_by))];
        self.run_with("egress", device, frame, &fields).unwrap()
    }

    /// The same for a packet that segmentation offload will cut.
    pub(super) fn run_large(&self, program: &str, device: &str, frame: &[u8], size: u32) -> Run {
        let fields = [(SKB_GSO_SIZE, size)];
        self.run_with(program, device, frame, &fields).unwrap()
    }

    /// Runs the same again with the device's sum over the packet.
    fn verify_sums(
        &self,
        program: &str,
        device: &str,
        frame: &[u8],
        fields: &[(usize, u32)],
        run: &Run,
    ) {
        let again = self.test_run(program, device, frame, fields, CHECKSUM_COMPLETE);
        match again {
            Ok(again) => assert_eq!(again, *run, "with a sum over the packet"),
            // Linux before 6.11.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => panic!("the device's sum is wrong now: {error}"),
        }
    }

    fn run_with(
        &self,
        program: &str,
        device: &str,
        frame: &[u8],
        fields: &[(usize, u32)],
    ) -> io::Result<Run> {
        self.test_run(program, device, frame, fields, 0)
    }

    fn test_run(
        &self,
        program: &str,
        device: &str,
        frame: &[u8],
        fields: &[(usize, u32)],
        flags: u32,
    ) -> io::Result<Run> {
        /// The part of `union bpf_attr` of this command (`linux/bpf.h`).
        #[repr(C)]
        struct Attributes {
            program: u32,
            verdict: u32,
            data_size_in: u32,
            data_size_out: u32,
            data_in: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
            ctx_size_in: u32,
            ctx_size_out: u32,
            ctx_in: u64,
            ctx_out: u64,
            flags: u32,
            cpu: u32,
            batch_size: u32,
            padding: u32,
        }
        let mut context = [0; SKB_LEN];
        // What `port` tells the program that it goes on with.
        let said = (program == "from_pod").then(|| {
            let Wire(port) = self.ports.get(&Wire(self.index(device)), 0).unwrap();
            [(SKB_CB + 4, port.flags), (SKB_CB + 8, port.segment)]
        });
        for (at, value) in [(SKB_MARK, MARK), (SKB_IFINDEX, self.index(device))]
            .iter()
            .chain(said.iter().flatten())
            .chain(fields)
        {
            context[*at..*at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let mut bytes = vec![0u8; 8192];
        let mut after = [0u8; SKB_LEN];
        let program: &SchedClassifier = self.ebpf.program(program).unwrap().try_into().unwrap();
        let mut attributes = Attributes {
            program: u32::try_from(program.fd().unwrap().as_fd().as_raw_fd()).unwrap(),
            verdict: 0,
            data_size_in: u32::try_from(frame.len()).unwrap(),
            data_size_out: u32::try_from(bytes.len()).unwrap(),
            data_in: frame.as_ptr() as u64,
            data_out: bytes.as_mut_ptr() as u64,
            repeat: 1,
            duration: 0,
            ctx_size_in: SKB_LEN as u32,
            ctx_size_out: SKB_LEN as u32,
            ctx_in: context.as_ptr() as u64,
            ctx_out: after.as_mut_ptr() as u64,
            flags,
            cpu: 0,
            batch_size: 0,
            padding: 0,
        };
        // SAFETY: the attributes are the command's, and their pointers and lengths those
        // of buffers that live until it returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_TEST_RUN,
                &raw mut attributes,
                size_of::<Attributes>(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        bytes.truncate(attributes.data_size_out as usize);
        Ok(Run {
            verdict: attributes.verdict,
            bytes,
            mark: u32::from_ne_bytes(after[SKB_MARK..SKB_MARK + 4].try_into().unwrap()),
        })
    }

    /// The program passes the frame on as it is; nothing is remembered or counted.
    pub(super) fn passes(&self, row: &str, program: &str, device: &str, frame: &[u8]) {
        let before = self.seen();
        let run = self.run(program, device, frame);
        // What `from_pod` does not translate goes to the host's stack.
        let verdict = if program == "from_pod" {
            REDIRECT
        } else {
            PASS
        };
        assert_eq!(run.verdict, verdict, "{row}: verdict");
        assert_eq!(run.bytes, frame, "{row}: bytes");
        assert_eq!(run.mark, MARK, "{row}: mark");
        assert_eq!(self.seen(), before, "{row}: flows");
        assert_eq!(self.drops(), [], "{row}: drops");
    }

    /// The program makes the frame another one and hands it over, whatever is known of
    /// its checksums.
    pub(super) fn becomes(
        &self,
        row: &str,
        program: &str,
        device: &str,
        frame: &[u8],
        becomes: &[u8],
    ) {
        let run = self.run(program, device, frame);
        assert_eq!(self.drops(), [], "{row}: drops");
        assert_eq!(run.verdict, REDIRECT, "{row}: verdict");
        let differ = run.bytes.iter().zip(becomes).position(|(a, b)| a != b);
        let head = |bytes: &[u8]| format!("{:02x?}", &bytes[..bytes.len().min(100)]);
        assert!(
            run.bytes == becomes,
            "{row}: {} and {} bytes, differ at {differ:?}:\n{}\n{}",
            run.bytes.len(),
            becomes.len(),
            head(&run.bytes),
            head(becomes)
        );
        self.verify_sums(program, device, frame, &[], &run);
    }

    /// The program drops the frame and counts that against `device`'s port.
    pub(super) fn drops_for(
        &mut self,
        row: &str,
        (program, device): (&str, &str),
        frame: &[u8],
        port: &str,
        reason: DropReason,
    ) {
        let run = self.run(program, device, frame);
        assert_eq!(run.verdict, SHOT, "{row}: verdict");
        assert_eq!(self.drops(), [(port.to_owned(), reason, 1)], "{row}: drops");
    }
}

fn default_route(family: Family) -> Route {
    let net = IpNet::new(family.unspecified(), 0).unwrap();
    Route::new(net, Some(family.of("router")))
}

/// An address as the maps have it.
pub(super) fn wire(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::v4(address.octets()),
        IpAddr::V6(address) => Address::v6(address.octets()),
    }
}

fn address(address: Address) -> IpAddr {
    Ipv6Addr::from(address.octets()).to_canonical()
}

/// An Ethernet frame with an IP packet.
pub(super) fn frame(to: Mac, from: Mac, packet: &[u8]) -> Vec<u8> {
    let ethertype = if packet[0] >> 4 == 4 { 0x800 } else { IPV6 };
    ethernet(to, from, ethertype, packet)
}

/// From a machine outside to the node.
pub(super) fn inbound(packet: &[u8]) -> Vec<u8> {
    frame(mac("up0"), mac("x"), packet)
}

/// As it reaches a pod.
pub(super) fn into(pod: &str, packet: &[u8]) -> Vec<u8> {
    frame(mac(pod), mac("cni0"), packet)
}

/// From a pod to its gateway.
pub(super) fn out_of(pod: &str, packet: &[u8]) -> Vec<u8> {
    let gateway = if pod == "m" { "cni1" } else { "cni0" };
    frame(mac(gateway), mac(pod), packet)
}
