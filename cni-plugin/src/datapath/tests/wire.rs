//! The programs on real devices: a verdict alone does not show where a frame
//! comes out, with which bytes, and for whom the receiving stack takes it.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use aya::programs::{
    SchedClassifier, TcAttachType,
    tc::{NlOptions, TcAttachOptions, TcHandle, qdisc_add_clsact},
};
use bpf_bridge_common::{
    drops::DropReason::Claimed,
    layout::{Mac, PortStats},
};
use nix::{
    libc,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike as _,
        bind, recvfrom, send, socket,
    },
};

use super::{
    super::{FILTER_HANDLE, FILTER_PRIORITY, LogLevel},
    bench::{Bench, PORTS, mac, sent, v4, v6, with_bench},
    frames::{
        BROADCAST, advertisement, arp, ethernet, ipv4, plain, solicitation, source_option, tagged,
        who_has,
    },
};

/// For whom a device took a frame (`linux/if_packet.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum For {
    Host = 0,
    Broadcast = 1,
    Multicast = 2,
    Other = 3,
}

/// Sees and sends the frames of one device, as `tcpdump` and `tcpreplay` would.
struct Tap(OwnedFd);

impl Tap {
    /// Of a device in the namespace of the calling thread.
    fn open(device: &str) -> Self {
        let (flags, all) = (SockFlag::SOCK_NONBLOCK, SockProtocol::EthAll);
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, all).unwrap();
        let address = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).unwrap(),
            sll_protocol: u16::try_from(libc::ETH_P_ALL).unwrap().to_be(),
            sll_ifindex: i32::try_from(if_nametoindex(device).unwrap()).unwrap(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        // SAFETY: it points to an address of that length.
        let address =
            unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(length)) }.unwrap();
        bind(socket.as_raw_fd(), &address).unwrap();
        Self(socket)
    }

    fn send(&self, frame: &[u8]) {
        let sent = send(self.0.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
        assert_eq!(sent, frame.len());
    }

    /// What the device received since.
    fn received(&self) -> Vec<(Vec<u8>, For)> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 65536];
        loop {
            let (length, from) = match recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut buffer) {
                Ok((length, from)) => (length, from.unwrap()),
                Err(errno) if io::Error::from(errno).kind() == io::ErrorKind::WouldBlock => {
                    return frames;
                }
                Err(errno) => panic!("{errno}"),
            };
            let taken = match from.pkttype() {
                0 => For::Host,
                1 => For::Broadcast,
                2 => For::Multicast,
                3 => For::Other,
                // PACKET_OUTGOING: what the device sends itself.
                _ => continue,
            };
            frames.push((buffer[..length].to_vec(), taken));
        }
    }
}

/// A bench whose ports carry the program, with a tap on what is behind each.
struct Wire<'a> {
    bench: &'a mut Bench,
    taps: BTreeMap<&'static str, Tap>,
}

/// The pods and the host: each name is a device that sends and receives.
fn stations() -> impl Iterator<Item = &'static str> {
    PORTS.iter().map(|port| port.0).chain(["stranger"])
}

impl<'a> Wire<'a> {
    fn new(bench: &'a mut Bench) -> Self {
        let program: &mut SchedClassifier =
            bench.ebpf.program_mut("port").unwrap().try_into().unwrap();
        for device in stations().chain(["gate"]) {
            qdisc_add_clsact(device).unwrap();
            let options = TcAttachOptions::Netlink(NlOptions {
                priority: FILTER_PRIORITY,
                handle: TcHandle::from(FILTER_HANDLE),
                classid: None,
            });
            program
                .attach_with_options(device, TcAttachType::Ingress, options)
                .unwrap();
        }
        let mut taps = bench
            .pods
            .run_in(|| stations().map(|name| (name, Tap::open(name))).collect())
            .map(|taps: BTreeMap<_, _>| taps)
            .unwrap();
        taps.insert("cni0", Tap::open("cni0"));
        Self { bench, taps }
    }

    /// Sends a frame from what is behind a port, and checks all that comes out
    /// anywhere.
    fn check(
        &mut self,
        row: &str,
        from: &str,
        frame: &[u8],
        expected: &[(&'static str, Vec<u8>, For)],
    ) {
        let mut expected = expected.to_vec();
        expected.sort();
        self.taps[from].send(frame);
        let mut seen = Vec::new();
        let limit = Instant::now() + Duration::from_secs(5);
        while seen.len() < expected.len() && Instant::now() < limit {
            self.wait(Duration::from_millis(100));
            self.collect(&mut seen);
        }
        // Nothing follows: veth hands over within the sending call, or in the
        // softirq right after it.
        thread::sleep(Duration::from_millis(10));
        self.collect(&mut seen);
        seen.sort();
        let brief = |frames: &[(&'static str, Vec<u8>, For)]| -> Vec<(&'static str, For, usize)> {
            frames
                .iter()
                .map(|(name, bytes, taken)| (*name, *taken, bytes.len()))
                .collect()
        };
        assert_eq!(brief(&seen), brief(&expected), "{row}: where and for whom");
        assert_eq!(seen, expected, "{row}: bytes");
    }

    fn wait(&self, limit: Duration) {
        let mut fds: Vec<_> = self
            .taps
            .values()
            .map(|tap| PollFd::new(tap.0.as_fd(), PollFlags::POLLIN))
            .collect();
        poll(&mut fds, PollTimeout::try_from(limit).unwrap()).unwrap();
    }

    fn collect(&self, seen: &mut Vec<(&'static str, Vec<u8>, For)>) {
        for (name, tap) in &self.taps {
            for (bytes, taken) in tap.received() {
                seen.push((name, bytes, taken));
            }
        }
    }
}

/// The frame at each of these, as it was sent.
fn at(names: &[&'static str], frame: &[u8], taken: For) -> Vec<(&'static str, Vec<u8>, For)> {
    names
        .iter()
        .map(|name| (*name, frame.to_vec(), taken))
        .collect()
}

const STRANGE: Mac = [2, 0, 0, 0, 1, 0];
const NOT_A: &[&str] = &["cni0", "b", "hair", "iso", "iso2", "spoof", "promisc"];

#[test]
fn frames_come_out_where_they_belong() {
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        let to = |destination: Mac, device| plain(destination, mac(device));

        let frame = to(mac("b"), "a");
        wire.check("pod to pod", "a", &frame, &at(&["b"], &frame, For::Host));
        let frame = to(mac("gate"), "a");
        wire.check(
            "pod to host",
            "a",
            &frame,
            &at(&["cni0"], &frame, For::Host),
        );
        let frame = to(mac("a"), "gate");
        wire.check(
            "host to pod",
            "cni0",
            &frame,
            &at(&["a"], &frame, For::Host),
        );
        let frame = to(mac("iso"), "gate");
        wire.check(
            "host to isolated pod",
            "cni0",
            &frame,
            &at(&["iso"], &frame, For::Host),
        );
        let frame = to(mac("iso2"), "iso");
        wire.check("between isolated pods", "iso", &frame, &[]);
        let frame = to(mac("a"), "a");
        wire.check("to itself", "a", &frame, &[]);
        let frame = to(mac("hair"), "hair");
        wire.check(
            "to itself, hairpinMode",
            "hair",
            &frame,
            &at(&["hair"], &frame, For::Host),
        );
        let frame = to(mac("b"), "stranger");
        wire.check("from no port", "stranger", &frame, &[]);
        let frame = to([1, 0x80, 0xc2, 0, 0, 0x0e], "a");
        wire.check("LLDP", "a", &frame, &at(&["cni0"], &frame, For::Multicast));
        let frame = to([1, 0x80, 0xc2, 0, 0, 1], "a");
        wire.check("pause", "a", &frame, &[]);
    });
}

#[test]
fn a_frame_for_a_pod_skips_the_host_veth() {
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        // What goes out of a host veth waits once more in its peer's queue.
        let before = sent();
        let frame = plain(mac("b"), mac("a"));
        wire.check("pod to pod", "a", &frame, &at(&["b"], &frame, For::Host));
        assert_eq!(sent(), before);
        let frame = plain(mac("a"), STRANGE);
        wire.check("from behind b", "b", &frame, &at(&["a"], &frame, For::Host));
        assert_eq!(sent(), before);

        // What was learned goes the long way, for the devices behind the pod's.
        let frame = plain(STRANGE, mac("a"));
        wire.check("to behind b", "a", &frame, &at(&["b"], &frame, For::Other));
        let mut after = before;
        *after.get_mut("b").unwrap() += 1;
        assert_eq!(sent(), after);
    });
}

#[test]
fn broadcasts_reach_everybody_else_once() {
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        let frame = plain(BROADCAST, mac("a"));
        wire.check(
            "from a pod",
            "a",
            &frame,
            &at(NOT_A, &frame, For::Broadcast),
        );
        let frame = plain(BROADCAST, mac("gate"));
        let pods = ["a", "b", "hair", "iso", "iso2", "spoof", "promisc"];
        wire.check(
            "from the host",
            "cni0",
            &frame,
            &at(&pods, &frame, For::Broadcast),
        );
        let frame = plain(BROADCAST, mac("iso"));
        let others = ["cni0", "a", "b", "hair", "spoof", "promisc"];
        wire.check(
            "from an isolated pod",
            "iso",
            &frame,
            &at(&others, &frame, For::Broadcast),
        );
        let frame = plain(BROADCAST, mac("hair"));
        let all = ["cni0", "a", "b", "hair", "iso", "iso2", "spoof", "promisc"];
        wire.check(
            "hairpinMode",
            "hair",
            &frame,
            &at(&all, &frame, For::Broadcast),
        );
        let frame = plain([0x33, 0x33, 0, 0, 0, 0xfb], mac("a"));
        wire.check("multicast", "a", &frame, &at(NOT_A, &frame, For::Multicast));
        let frame = plain([2, 0, 0, 0, 9, 9], mac("a"));
        wire.check(
            "unknown address",
            "a",
            &frame,
            &at(NOT_A, &frame, For::Other),
        );
    });
}

#[test]
fn learned_addresses_are_reached_where_they_were_seen() {
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        let frame = plain(mac("a"), STRANGE);
        wire.check("from behind b", "b", &frame, &at(&["a"], &frame, For::Host));
        let frame = plain(STRANGE, mac("a"));
        // As on a wire: a bridge inside the pod must not take it for the pod's.
        wire.check("to behind b", "a", &frame, &at(&["b"], &frame, For::Other));
        let frame = plain(STRANGE, mac("gate"));
        wire.check(
            "from the host",
            "cni0",
            &frame,
            &at(&["b"], &frame, For::Other),
        );
        let frame = plain(mac("a"), STRANGE);
        wire.check(
            "it moves to hair",
            "hair",
            &frame,
            &at(&["a"], &frame, For::Host),
        );
        let frame = plain(STRANGE, mac("a"));
        wire.check(
            "to behind hair",
            "a",
            &frame,
            &at(&["hair"], &frame, For::Other),
        );
        let frame = plain(STRANGE, mac("hair"));
        wire.check(
            "back to behind hair",
            "hair",
            &frame,
            &at(&["hair"], &frame, For::Other),
        );
        let frame = plain(mac("a"), STRANGE);
        wire.check(
            "it moves to the host",
            "cni0",
            &frame,
            &at(&["a"], &frame, For::Host),
        );
        let frame = plain(STRANGE, mac("a"));
        wire.check(
            "to behind the host",
            "a",
            &frame,
            &at(&["cni0"], &frame, For::Other),
        );
    });
}

#[test]
fn promiscuous_pods_are_seen_by_the_host() {
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        let frame = plain(mac("b"), mac("promisc"));
        let seen = [
            ("b", frame.clone(), For::Host),
            ("cni0", frame.clone(), For::Other),
        ];
        wire.check("to a pod", "promisc", &frame, &seen);
        let frame = plain(mac("gate"), mac("promisc"));
        wire.check(
            "to the host",
            "promisc",
            &frame,
            &at(&["cni0"], &frame, For::Host),
        );
        let frame = plain(mac("a"), STRANGE);
        wire.check(
            "a strange address",
            "b",
            &frame,
            &at(&["a"], &frame, For::Host),
        );
        let frame = plain(STRANGE, mac("promisc"));
        wire.check(
            "to what was learned",
            "promisc",
            &frame,
            &at(&["b", "cni0"], &frame, For::Other),
        );
        let frame = plain(BROADCAST, mac("promisc"));
        let others = ["cni0", "a", "b", "hair", "iso", "iso2", "spoof"];
        wire.check(
            "a broadcast",
            "promisc",
            &frame,
            &at(&others, &frame, For::Broadcast),
        );
        let frame = plain(mac("promisc"), mac("b"));
        wire.check(
            "what it receives",
            "b",
            &frame,
            &at(&["promisc"], &frame, For::Host),
        );
    });
}

#[test]
fn answers_come_back_to_the_asker_alone() {
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        let question = who_has((mac("a"), v4("a")), v4("b"));
        let answer = arp(mac("a"), 2, (mac("b"), v4("b")), (mac("a"), v4("a")));
        wire.check("ARP", "a", &question, &at(&["a"], &answer, For::Host));

        let question = who_has((mac("gate"), v4("gate")), v4("b"));
        let answer = arp(
            mac("gate"),
            2,
            (mac("b"), v4("b")),
            (mac("gate"), v4("gate")),
        );
        wire.check(
            "ARP of the host",
            "cni0",
            &question,
            &at(&["cni0"], &answer, For::Host),
        );

        for options in [vec![], source_option(mac("a")), vec![0xee; 40]] {
            let question = solicitation(mac("a"), v6("a"), v6("b"), &options);
            let answer = advertisement((mac("a"), v6("a")), (mac("b"), v6("b")), 0x60);
            let row = format!("solicitation with {} bytes of options", options.len());
            wire.check(&row, "a", &question, &at(&["a"], &answer, For::Host));
        }
        let probe = solicitation(mac("a"), [0; 16], v6("b"), &[]);
        let nodes = (
            [0x33, 0x33, 0, 0, 0, 1],
            [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        );
        let answer = advertisement(nodes, (mac("b"), v6("b")), 0x20);
        wire.check(
            "duplicate detection",
            "a",
            &probe,
            &at(&["a"], &answer, For::Multicast),
        );

        let question = who_has((mac("a"), v4("a")), v4("a"));
        wire.check(
            "for itself",
            "a",
            &question,
            &at(NOT_A, &question, For::Broadcast),
        );
    });
}

#[test]
fn a_question_inside_a_vlan_is_not_answered() {
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        wire.bench.reset();
        // The kernel takes the tag out of the bytes before the program runs, and
        // out of those that a packet socket shows.
        for (row, question, taken) in [
            ("ARP", who_has((mac("a"), v4("a")), v4("b")), For::Broadcast),
            (
                "solicitation",
                solicitation(mac("a"), v6("a"), v6("b"), &[]),
                For::Multicast,
            ),
        ] {
            wire.check(
                row,
                "a",
                &tagged(&question, 7),
                &at(NOT_A, &question, taken),
            );
            let flooded = 1;
            let stats = PortStats {
                flooded,
                ..PortStats::default()
            };
            assert_eq!(
                wire.bench.counters(),
                BTreeMap::from([("a", stats)]),
                "{row}"
            );
            wire.bench.reset();
        }
        let frame = plain(mac("b"), mac("a"));
        wire.check(
            "a tagged frame",
            "a",
            &tagged(&frame, 7),
            &at(&["b"], &frame, For::Host),
        );
    });
}

#[test]
fn short_frames_are_flooded() {
    // BPF_PROG_TEST_RUN takes none of these since Linux 6.18.
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        let question = solicitation(mac("a"), v6("a"), v6("b"), &[]);
        for length in [14, 15, 20, 21, 53] {
            let frame = &question[..length];
            let row = format!("{length} bytes of a solicitation");
            wire.check(&row, "a", frame, &at(NOT_A, frame, For::Multicast));
        }
        let question = who_has((mac("a"), v4("a")), v4("b"));
        let frame = &question[..14];
        wire.check(
            "no ARP packet",
            "a",
            frame,
            &at(NOT_A, frame, For::Broadcast),
        );
        let frame = &plain(mac("b"), mac("a"))[..14];
        wire.check("a header only", "a", frame, &at(&["b"], frame, For::Host));
    });
}

#[test]
fn a_claim_with_a_priority_reaches_nobody() {
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        wire.bench.reset();
        let claim = arp(mac("iso"), 2, (mac("a"), v4("b")), (mac("iso"), v4("iso")));
        // The kernel takes the first tag out of the bytes before the program runs.
        for (row, frame) in [
            ("a priority", tagged(&claim, 0xe000)),
            ("two of them", tagged(&tagged(&claim, 0), 0)),
            ("three of them", tagged(&tagged(&tagged(&claim, 0), 0), 0)),
        ] {
            wire.check(row, "a", &frame, &[]);
            let drops = wire.bench.counters()["a"].drops;
            assert_eq!(drops[Claimed as usize], 1, "{row}");
            wire.bench.reset();
        }
        wire.check(
            "in a VLAN",
            "a",
            &tagged(&claim, 7),
            &at(&["iso"], &claim, For::Host),
        );
    });
}

#[test]
fn headers_that_end_too_soon_say_nothing() {
    // BPF_PROG_TEST_RUN takes none of these since Linux 6.18.
    with_bench(LogLevel::Off, |bench| {
        let mut wire = Wire::new(bench);
        let to_b = (mac("b"), v6("b"));
        let claim = advertisement(to_b, (mac("spoof"), v6("a")), 0x60);
        for length in [14, 20, 21, 22, 37, 53] {
            let row = format!("{length} bytes of an advertisement");
            let frame = &claim[..length];
            let fate = if length < 38 {
                at(&["b"], frame, For::Host)
            } else {
                // The source is there, and is another's.
                Vec::new()
            };
            wire.check(&row, "spoof", frame, &fate);
        }
        let packet = ipv4(v4("a"), v4("b"), 1, 0, &[5, 0, 0, 0]);
        let frame = ethernet(mac("b"), mac("a"), 0x0800, &packet);
        for length in [15, 22, 23, 24, 33, 34] {
            let row = format!("{length} bytes of a redirect");
            let frame = &frame[..length];
            wire.check(&row, "a", frame, &at(&["b"], frame, For::Host));
        }
        wire.check("enough of it", "a", &frame[..35], &[]);
    });
}
