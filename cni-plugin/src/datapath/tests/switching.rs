//! `port`: what becomes of a frame, by its destination, its source and the port.
//!
//! Two things are out of reach: a frame shorter than its Ethernet header, which
//! neither BPF_PROG_TEST_RUN nor a packet socket lets through, and the program's
//! own change of the packet type, which Linux 6.15 and newer do themselves.

use std::collections::BTreeMap;

use bpf_bridge_common::{
    drops::DropReason::{self, BadSource, Helper, Isolated, NotAPort, Pause, SamePort, Spoofed},
    layout::{
        Mac, PORT_HAIRPIN, PORT_ISOLATED, PROGRAM_FLOOD, PROGRAM_GUARD, PROGRAM_RESPONDER,
        PortStats,
    },
};

use super::{
    super::LogLevel,
    bench::{Bench, MARK, REDIRECT, SHOT, STOLEN, dropped, mac, v4, v6, with_bench},
    frames::{
        ARP, BROADCAST, OTHER, advertisement, arp, ethernet, plain, solicitation, tagged, who_has,
    },
};

/// What becomes of a frame.
#[derive(Clone, Copy)]
pub(super) enum Fate {
    /// Handed to the pod: the mark is gone.
    ToPod,
    /// Redirected as it is. Where to is a matter of the tests in `wire`.
    Redirect,
    /// Copied to these devices.
    Flood(&'static [&'static str]),
    /// Dropped.
    Drop(DropReason),
}

use Fate::{Drop, Flood, Redirect, ToPod};

/// Every port but the one in question.
pub(super) const NOT_A: &[&str] = &["gate", "b", "hair", "iso", "iso2", "spoof", "promisc"];
pub(super) const NOT_GATE: &[&str] = &["a", "b", "hair", "iso", "iso2", "spoof", "promisc"];
pub(super) const NOT_ISOLATED: &[&str] = &["gate", "a", "b", "hair", "spoof", "promisc"];
const NOT_SPOOF: &[&str] = &["gate", "a", "b", "hair", "iso", "iso2", "promisc"];
const NOT_PROMISC: &[&str] = &["gate", "a", "b", "hair", "iso", "iso2", "spoof"];
const ALL: &[&str] = &["gate", "a", "b", "hair", "iso", "iso2", "spoof", "promisc"];

/// Runs `port` on `frame` and checks everything that can be seen: the verdict,
/// that not a byte was changed, the mark, each copy, every counter of every port.
pub(super) fn check(bench: &Bench, row: &str, device: &'static str, frame: &[u8], fate: Fate) {
    let before = bench.counters();
    assert_eq!(before, BTreeMap::new(), "{row}: counters are not reset");
    let run = bench.run("port", device, frame);

    let verdict = match fate {
        ToPod | Redirect => REDIRECT,
        Flood(_) => STOLEN,
        Drop(_) => SHOT,
    };
    assert_eq!(run.verdict, verdict, "{row}: verdict");
    assert_eq!(run.bytes, frame, "{row}: bytes");
    let mark = if matches!(fate, ToPod) { 0 } else { MARK };
    assert_eq!(run.mark, mark, "{row}: mark");

    let copies: &[&str] = match fate {
        Flood(devices) => devices,
        _ => &[],
    };
    let copies: BTreeMap<String, u64> = copies
        .iter()
        .map(|device| ((*device).to_owned(), 1))
        .collect();
    assert_eq!(run.copies, copies, "{row}: copies");

    let stats = match fate {
        Drop(NotAPort) => {
            let mut stats = PortStats::default();
            stats.drops[NotAPort as usize] = 1;
            BTreeMap::from([("", stats)])
        }
        Drop(reason) => BTreeMap::from([(device, dropped(reason))]),
        Flood(_) => {
            let flooded = 1;
            BTreeMap::from([(
                device,
                PortStats {
                    flooded,
                    ..PortStats::default()
                },
            )])
        }
        ToPod | Redirect => BTreeMap::new(),
    };
    assert_eq!(bench.counters(), stats, "{row}: counters");
}

/// A reserved group address of IEEE 802.1D.
fn reserved(last: u8) -> Mac {
    [0x01, 0x80, 0xc2, 0, 0, last]
}

type Row = (&'static str, &'static str, Vec<u8>, Fate);

fn rows() -> Vec<Row> {
    let unknown = [2, 0, 0, 0, 1, 0];
    let to = |destination: Mac, device| plain(destination, mac(device));
    vec![
        // Assigned addresses.
        ("to another pod", "a", to(mac("b"), "a"), ToPod),
        (
            "as large as a test run can be",
            "a",
            ethernet(mac("b"), mac("a"), 0x800, &[7; 3000]),
            ToPod,
        ),
        (
            "an Ethernet header and nothing else",
            "a",
            ethernet(mac("b"), mac("a"), OTHER, &[]),
            ToPod,
        ),
        (
            "a tag in the bytes changes nothing",
            "a",
            tagged(&to(mac("b"), "a"), 7),
            ToPod,
        ),
        (
            "from the host to a pod",
            "gate",
            to(mac("a"), "gate"),
            ToPod,
        ),
        (
            "from the host to an isolated pod",
            "gate",
            to(mac("iso"), "gate"),
            ToPod,
        ),
        ("to the gateway", "a", to(mac("gate"), "a"), Redirect),
        (
            "an isolated pod to the gateway",
            "iso",
            to(mac("gate"), "iso"),
            Redirect,
        ),
        (
            "a pod with promiscMode to the gateway, no second copy",
            "promisc",
            to(mac("gate"), "promisc"),
            Redirect,
        ),
        (
            "a pod with promiscMode to a pod",
            "promisc",
            to(mac("b"), "promisc"),
            ToPod,
        ),
        (
            "a pod with macspoofchk, its own address",
            "spoof",
            to(mac("b"), "spoof"),
            ToPod,
        ),
        (
            "back to the same port",
            "a",
            to(mac("a"), "a"),
            Drop(SamePort),
        ),
        (
            "back to the same port, hairpinMode",
            "hair",
            to(mac("hair"), "hair"),
            Redirect,
        ),
        (
            "the host to itself",
            "gate",
            to(mac("gate"), "gate"),
            Drop(SamePort),
        ),
        (
            "between isolated ports",
            "iso",
            to(mac("iso2"), "iso"),
            Drop(Isolated),
        ),
        (
            "an isolated port to another",
            "iso",
            to(mac("a"), "iso"),
            ToPod,
        ),
        (
            "another to an isolated port",
            "a",
            to(mac("iso"), "a"),
            ToPod,
        ),
        (
            "an address of another segment is unknown",
            "a",
            to(mac("foreign"), "a"),
            Flood(NOT_A),
        ),
        // Nobody known, and groups.
        ("unknown address", "a", to(unknown, "a"), Flood(NOT_A)),
        (
            "unknown address from the host",
            "gate",
            to(unknown, "gate"),
            Flood(NOT_GATE),
        ),
        ("broadcast", "a", to(BROADCAST, "a"), Flood(NOT_A)),
        (
            "broadcast from the host",
            "gate",
            to(BROADCAST, "gate"),
            Flood(NOT_GATE),
        ),
        (
            "broadcast, hairpinMode",
            "hair",
            to(BROADCAST, "hair"),
            Flood(ALL),
        ),
        (
            "broadcast from an isolated port",
            "iso",
            to(BROADCAST, "iso"),
            Flood(NOT_ISOLATED),
        ),
        (
            "broadcast, macspoofchk",
            "spoof",
            to(BROADCAST, "spoof"),
            Flood(NOT_SPOOF),
        ),
        (
            "broadcast, promiscMode: the gateway port once",
            "promisc",
            to(BROADCAST, "promisc"),
            Flood(NOT_PROMISC),
        ),
        (
            "broadcast in a segment of one",
            "foreign",
            to(BROADCAST, "foreign"),
            Flood(&[]),
        ),
        (
            "IPv4 multicast",
            "a",
            to([0x01, 0, 0x5e, 0, 0, 0xfb], "a"),
            Flood(NOT_A),
        ),
        (
            "IPv6 multicast",
            "a",
            to([0x33, 0x33, 0, 0, 0, 1], "a"),
            Flood(NOT_A),
        ),
        // Reserved group addresses.
        ("spanning tree", "a", to(reserved(0x00), "a"), Flood(NOT_A)),
        ("pause", "a", to(reserved(0x01), "a"), Drop(Pause)),
        ("slow protocols", "a", to(reserved(0x02), "a"), Redirect),
        ("LLDP", "a", to(reserved(0x0e), "a"), Redirect),
        (
            "the last of the reserved",
            "a",
            to(reserved(0x0f), "a"),
            Redirect,
        ),
        (
            "past the reserved",
            "a",
            to(reserved(0x10), "a"),
            Flood(NOT_A),
        ),
        (
            "LLDP of the host",
            "gate",
            to(reserved(0x0e), "gate"),
            Drop(SamePort),
        ),
        (
            "pause from the host",
            "gate",
            to(reserved(0x01), "gate"),
            Drop(Pause),
        ),
        // Sources.
        ("source zero", "a", plain(mac("b"), [0; 6]), Drop(BadSource)),
        (
            "source broadcast",
            "a",
            plain(mac("b"), BROADCAST),
            Drop(BadSource),
        ),
        (
            "source multicast",
            "a",
            plain(BROADCAST, [0x01, 0, 0x5e, 0, 0, 1]),
            Drop(BadSource),
        ),
        (
            "source zero, macspoofchk",
            "spoof",
            plain(mac("b"), [0; 6]),
            Drop(BadSource),
        ),
        (
            "strange source, macspoofchk",
            "spoof",
            plain(mac("b"), unknown),
            Drop(Spoofed),
        ),
        (
            "another's source, macspoofchk",
            "spoof",
            plain(mac("b"), mac("a")),
            Drop(Spoofed),
        ),
        (
            "broadcast from a strange source, macspoofchk",
            "spoof",
            plain(BROADCAST, unknown),
            Drop(Spoofed),
        ),
        (
            "a question from a strange source, macspoofchk",
            "spoof",
            who_has((unknown, v4("spoof")), v4("b")),
            Drop(Spoofed),
        ),
        (
            "LLDP from a strange source, macspoofchk",
            "spoof",
            plain(reserved(0x0e), unknown),
            Drop(Spoofed),
        ),
        // No port.
        (
            "from a device without a port",
            "stranger",
            to(mac("a"), "stranger"),
            Drop(NotAPort),
        ),
        (
            "broadcast from a device without a port",
            "stranger",
            to(BROADCAST, "stranger"),
            Drop(NotAPort),
        ),
        (
            "a question from a device without a port",
            "stranger",
            who_has((mac("stranger"), v4("stranger")), v4("b")),
            Drop(NotAPort),
        ),
        // Questions that are not the responder's.
        (
            "unicast ARP request",
            "a",
            arp(mac("b"), 1, (mac("a"), v4("a")), (mac("b"), v4("b"))),
            ToPod,
        ),
        (
            "unicast ARP request to the gateway",
            "a",
            arp(
                mac("gate"),
                1,
                (mac("a"), v4("a")),
                (mac("gate"), v4("gate")),
            ),
            Redirect,
        ),
        (
            "unicast ARP reply",
            "a",
            arp(mac("b"), 2, (mac("a"), v4("a")), (mac("b"), v4("b"))),
            ToPod,
        ),
        (
            "a question inside a tag",
            "a",
            tagged(&who_has((mac("a"), v4("a")), v4("b")), 7),
            Flood(NOT_A),
        ),
        (
            "a solicitation inside a tag",
            "a",
            tagged(&solicitation(mac("a"), v6("a"), v6("b"), &[]), 7),
            Flood(NOT_A),
        ),
        (
            "unicast advertisement",
            "a",
            advertisement((mac("b"), v6("b")), (mac("a"), v6("a")), 0x60),
            ToPod,
        ),
        (
            "ARP without a packet",
            "a",
            ethernet(BROADCAST, mac("a"), ARP, &[]),
            Flood(NOT_A),
        ),
    ]
}

#[test]
fn each_frame_goes_where_it_belongs() {
    with_bench(LogLevel::Off, |bench| {
        for (row, device, frame, fate) in rows() {
            check(bench, row, device, &frame, fate);
            assert_eq!(bench.table(), BTreeMap::new(), "{row}: learned");
            bench.reset();
        }
    });
}

#[test]
fn the_log_changes_nothing() {
    with_bench(LogLevel::Trace, |bench| {
        for (row, device, frame, fate) in rows() {
            check(bench, row, device, &frame, fate);
            bench.reset();
        }
    });
}

#[test]
fn counters_add_up() {
    with_bench(LogLevel::Off, |bench| {
        let frames = [
            plain(mac("b"), mac("a")),
            plain(BROADCAST, mac("a")),
            plain(mac("a"), mac("a")),
            ethernet(mac("b"), mac("a"), 0x800, &[0; 1400]),
            plain(mac("b"), [0; 6]),
            plain(mac("a"), mac("a")),
        ];
        for frame in &frames {
            bench.run("port", "a", frame);
        }
        bench.run("port", "b", &plain(reserved(1), mac("b")));
        let mut a = PortStats {
            flooded: 1,
            ..PortStats::default()
        };
        a.drops[SamePort as usize] = 2;
        a.drops[BadSource as usize] = 1;
        let b = dropped(Pause);
        assert_eq!(bench.counters(), BTreeMap::from([("a", a), ("b", b)]));
    });
}

#[test]
fn flags_add_up() {
    with_bench(LogLevel::Off, |bench| {
        let back = plain(mac("iso"), mac("iso"));
        bench.set_port("iso", |port| port.flags = PORT_ISOLATED | PORT_HAIRPIN);
        check(
            bench,
            "isolated with hairpinMode, to itself",
            "iso",
            &back,
            Drop(Isolated),
        );
        bench.reset();
        let frame = plain(BROADCAST, mac("iso"));
        // It is isolated from itself, as on a Linux bridge.
        check(bench, "and a broadcast", "iso", &frame, Flood(NOT_ISOLATED));
    });
}

#[test]
fn a_missing_program_costs_the_frame_and_is_counted() {
    with_bench(LogLevel::Off, |bench| {
        let question = who_has((mac("a"), v4("a")), v4("b"));
        for (row, slot) in [
            ("no responder", PROGRAM_RESPONDER),
            ("no guard", PROGRAM_GUARD),
            ("no flood", PROGRAM_FLOOD),
        ] {
            bench.calls.clear_index(&slot).unwrap();
            check(bench, row, "a", &question, Drop(Helper));
            bench.reset();
        }
        let unknown = plain([2, 0, 0, 0, 1, 0], mac("a"));
        check(
            bench,
            "no flood for an unknown address",
            "a",
            &unknown,
            Drop(Helper),
        );
    });
}
