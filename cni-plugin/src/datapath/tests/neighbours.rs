//! `responder`: questions for assigned addresses are answered to the byte, and
//! everything else is flooded.

use std::collections::BTreeMap;

use bpf_bridge_common::layout::{Mac, Port, PortStats};

use super::{
    super::LogLevel,
    bench::{Bench, MARK, REDIRECT, SHOT, mac, v4, v6, with_bench},
    frames::{
        BROADCAST, IPV6, advertisement, arp, ethernet, ipv6, solicitation, source_option, who_has,
    },
    switching::{Fate::Flood, NOT_A, NOT_GATE, NOT_ISOLATED, check},
};

const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const UNSPECIFIED: [u8; 16] = [0; 16];

/// The flags of an advertisement (RFC 4861 §4.4).
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// The question goes through `port` and comes back as `answer`.
fn answered(bench: &mut Bench, row: &str, device: &'static str, question: &[u8], answer: &[u8]) {
    let run = bench.run("port", device, question);
    assert_eq!(run.verdict, REDIRECT, "{row}: verdict");
    assert_eq!(run.bytes, answer, "{row}: bytes");
    assert_eq!(run.mark, MARK, "{row}: mark");
    assert_eq!(run.copies, BTreeMap::new(), "{row}: copies");
    let answered = 1;
    let stats = PortStats {
        answered,
        ..PortStats::default()
    };
    assert_eq!(
        bench.counters(),
        BTreeMap::from([(device, stats)]),
        "{row}: counters"
    );
    assert_eq!(bench.table(), BTreeMap::new(), "{row}: learned");
    bench.reset();
}

fn asks(device: &str, target: [u8; 4]) -> Vec<u8> {
    who_has((mac(device), v4(device)), target)
}

fn reply(asker: &str, owner: &str) -> Vec<u8> {
    arp(
        mac(asker),
        2,
        (mac(owner), v4(owner)),
        (mac(asker), v4(asker)),
    )
}

#[test]
fn arp_questions_for_assigned_addresses_are_answered() {
    with_bench(LogLevel::Off, |bench| {
        for (row, asker, owner) in [
            ("another pod", "a", "b"),
            ("the gateway", "a", "gate"),
            ("the host asks", "gate", "a"),
            ("the host asks for an isolated pod", "gate", "iso"),
            ("an isolated pod asks", "iso", "a"),
            ("an isolated pod asks for the gateway", "iso", "gate"),
            ("for an isolated pod", "a", "iso"),
            ("a pod with macspoofchk asks", "spoof", "b"),
            ("a pod with promiscMode asks", "promisc", "b"),
            ("a pod with hairpinMode asks", "hair", "b"),
        ] {
            answered(
                bench,
                row,
                asker,
                &asks(asker, v4(owner)),
                &reply(asker, owner),
            );
        }

        // Padded to what Ethernet asks for, the answer is 42 bytes long still.
        let mut padded = asks("a", v4("b"));
        padded.resize(60, 0);
        answered(bench, "padded", "a", &padded, &reply("a", "b"));

        // RFC 5227 §1.1: a probe has no sender. Its answer is what finds a duplicate.
        let probe = who_has((mac("a"), [0; 4]), v4("b"));
        let found = arp(mac("a"), 2, (mac("b"), v4("b")), (mac("a"), [0; 4]));
        answered(bench, "a probe", "a", &probe, &found);

        // To a group that is not the broadcast address: any stack takes it.
        let grouped = arp(
            [1, 0, 0x5e, 0, 0, 1],
            1,
            (mac("a"), v4("a")),
            ([0; 6], v4("b")),
        );
        answered(bench, "to a group", "a", &grouped, &reply("a", "b"));
    });
}

#[test]
fn other_arp_frames_are_flooded() {
    let sender = (mac("a"), v4("a"));
    let odd = |at: usize, value: u8| {
        let mut frame = asks("a", v4("b"));
        frame[at] = value;
        frame
    };
    let rows = [
        ("for the own address", "a", asks("a", v4("a")), NOT_A),
        (
            "a probe for the own address",
            "a",
            who_has((mac("a"), [0; 4]), v4("a")),
            NOT_A,
        ),
        (
            "the host for its own address",
            "gate",
            asks("gate", v4("gate")),
            NOT_GATE,
        ),
        (
            "for an unknown address",
            "a",
            asks("a", [10, 0, 0, 200]),
            NOT_A,
        ),
        ("for 0.0.0.0", "a", asks("a", [0; 4]), NOT_A),
        (
            "for a port of another segment",
            "a",
            asks("a", v4("foreign")),
            NOT_A,
        ),
        (
            "in another segment",
            "foreign",
            asks("foreign", v4("b")),
            &[],
        ),
        (
            "between isolated pods",
            "iso",
            asks("iso", v4("iso2")),
            NOT_ISOLATED,
        ),
        (
            "a broadcast reply",
            "a",
            arp(BROADCAST, 2, sender, (mac("b"), v4("b"))),
            NOT_A,
        ),
        (
            "an announcement as a reply",
            "a",
            arp(BROADCAST, 2, sender, sender),
            NOT_A,
        ),
        (
            "an announcement as a request",
            "a",
            arp(BROADCAST, 1, sender, ([0; 6], v4("a"))),
            NOT_A,
        ),
        (
            "one byte short",
            "a",
            asks("a", v4("b"))[..41].to_vec(),
            NOT_A,
        ),
        (
            "the fixed part only",
            "a",
            asks("a", v4("b"))[..22].to_vec(),
            NOT_A,
        ),
        ("hardware of another kind", "a", odd(15, 6), NOT_A),
        ("protocol of another kind", "a", odd(16, 0x86), NOT_A),
        ("hardware addresses of 8 bytes", "a", odd(18, 8), NOT_A),
        ("protocol addresses of 16 bytes", "a", odd(19, 16), NOT_A),
        ("reverse ARP", "a", odd(21, 3), NOT_A),
    ];
    with_bench(LogLevel::Off, |bench| {
        for (row, device, frame, copies) in rows {
            check(bench, row, device, &frame, Flood(copies));
            bench.reset();
        }
    });
}

#[test]
fn questions_for_addresses_that_outlived_their_port_are_flooded() {
    let rows = [
        ("ARP", asks("a", v4("b"))),
        (
            "a solicitation",
            solicitation(mac("a"), v6("a"), v6("b"), &[]),
        ),
    ];
    type Change = fn(&mut Port);
    // The kernel gave the port's number to another device since.
    let changes: [(&str, Change); 2] = [
        ("another segment", |port| port.segment += 1),
        ("another pod", |port| port.mac[5] ^= 0xff),
    ];
    with_bench(LogLevel::Off, |bench| {
        for (row, frame) in &rows {
            for (what, change) in changes {
                let mut before = None;
                bench.set_port("b", |port| {
                    before = Some(*port);
                    change(port);
                });
                check(bench, &format!("{row}, {what}"), "a", frame, Flood(NOT_A));
                bench.set_port("b", |port| *port = before.unwrap());
                bench.reset();
            }
        }
    });
}

#[test]
fn solicitations_for_assigned_addresses_are_answered() {
    with_bench(LogLevel::Off, |bench| {
        // The frame grows, keeps its length, and shrinks.
        let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
        for options in [
            vec![],
            source_option(mac("a")),
            [source_option(mac("a")), nonce.to_vec()].concat(),
            [&source_option(mac("a"))[..], &nonce, &[0xee; 200]].concat(),
        ] {
            let question = solicitation(mac("a"), v6("a"), v6("b"), &options);
            let answer = advertisement(
                (mac("a"), v6("a")),
                (mac("b"), v6("b")),
                SOLICITED | OVERRIDE,
            );
            assert_eq!(question.len(), 78 + options.len());
            assert_eq!(answer.len(), 86);
            let row = format!("{} bytes of options", options.len());
            answered(bench, &row, "a", &question, &answer);

            let probe = solicitation(mac("a"), UNSPECIFIED, v6("b"), &options);
            let answer = advertisement((ALL_NODES_MAC, ALL_NODES), (mac("b"), v6("b")), OVERRIDE);
            let row = format!(
                "duplicate detection with {} bytes of options",
                options.len()
            );
            answered(bench, &row, "a", &probe, &answer);
        }

        for (row, asker, owner, router) in [
            ("for the gateway, a router", "a", "gate", ROUTER),
            ("the host asks", "gate", "a", 0),
            ("an isolated pod asks", "iso", "a", 0),
            (
                "an isolated pod asks for the gateway",
                "iso",
                "gate",
                ROUTER,
            ),
            ("for an isolated pod", "a", "iso", 0),
            ("a pod with macspoofchk asks", "spoof", "b", 0),
        ] {
            let question =
                solicitation(mac(asker), v6(asker), v6(owner), &source_option(mac(asker)));
            let flags = router | SOLICITED | OVERRIDE;
            let answer = advertisement((mac(asker), v6(asker)), (mac(owner), v6(owner)), flags);
            answered(bench, row, asker, &question, &answer);
        }

        // From the asker's link-local address, as a stack would ask.
        let local = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x0a];
        let question = solicitation(mac("a"), local, v6("b"), &source_option(mac("a")));
        let answer = advertisement((mac("a"), local), (mac("b"), v6("b")), SOLICITED | OVERRIDE);
        answered(bench, "from a link-local address", "a", &question, &answer);
    });
}

#[test]
fn other_ipv6_frames_are_flooded() {
    let asks = |device: &str, target: [u8; 16]| {
        solicitation(mac(device), v6(device), target, &source_option(mac(device)))
    };
    let odd = |at: usize, value: u8| {
        let mut frame = asks("a", v6("b"));
        frame[at] = value;
        frame
    };
    // A hop-by-hop header of 8 bytes (padding) before the message.
    let mut hidden = vec![58, 0, 1, 4, 0, 0, 0, 0];
    hidden.extend_from_slice(&asks("a", v6("b"))[54..]);
    let extended = ethernet(
        [0x33, 0x33, 0xff, 0, 0, 0x0b],
        mac("a"),
        IPV6,
        &ipv6(v6("a"), v6("b"), 0, &hidden),
    );
    let probe = solicitation(mac("a"), UNSPECIFIED, v6("a"), &[]);
    let advertised = advertisement((ALL_NODES_MAC, ALL_NODES), (mac("a"), v6("a")), OVERRIDE);
    let rows = [
        ("for the own address", "a", asks("a", v6("a")), NOT_A),
        ("duplicate detection for the own address", "a", probe, NOT_A),
        (
            "the host for its own address",
            "gate",
            asks("gate", v6("gate")),
            NOT_GATE,
        ),
        ("for an unknown address", "a", asks("a", [0xfd; 16]), NOT_A),
        ("for ::", "a", asks("a", UNSPECIFIED), NOT_A),
        (
            "in another segment",
            "foreign",
            asks("foreign", v6("b")),
            &[],
        ),
        (
            "between isolated pods",
            "iso",
            asks("iso", v6("iso2")),
            NOT_ISOLATED,
        ),
        ("an unsolicited advertisement", "a", advertised, NOT_A),
        ("hop limit 254", "a", odd(21, 254), NOT_A),
        ("an extension header", "a", extended, NOT_A),
        ("UDP", "a", odd(20, 17), NOT_A),
        ("version 5", "a", odd(14, 0x50), NOT_A),
        ("a router solicitation", "a", odd(54, 133), NOT_A),
        ("another code", "a", odd(55, 1), NOT_A),
        ("a payload of 23 bytes", "a", odd(19, 23), NOT_A),
        (
            "one byte short",
            "a",
            asks("a", v6("b"))[..77].to_vec(),
            NOT_A,
        ),
        (
            "an IPv6 header only",
            "a",
            asks("a", v6("b"))[..54].to_vec(),
            NOT_A,
        ),
    ];
    with_bench(LogLevel::Off, |bench| {
        for (row, device, frame, copies) in rows {
            check(bench, row, device, &frame, Flood(copies));
            bench.reset();
        }
    });
}

#[test]
fn an_address_of_one_family_is_none_of_the_other() {
    with_bench(LogLevel::Off, |bench| {
        // ::ffff:10.0.0.11 is how the table writes down 10.0.0.11, and nobody's
        // IPv6 address.
        let mut mapped = [0; 16];
        mapped[10..12].copy_from_slice(&[0xff, 0xff]);
        mapped[12..].copy_from_slice(&v4("b"));
        let question = solicitation(mac("a"), v6("a"), mapped, &[]);
        check(
            bench,
            "an IPv4-mapped address",
            "a",
            &question,
            Flood(NOT_A),
        );
    });
}

#[test]
fn the_responder_alone_counts_no_stranger() {
    with_bench(LogLevel::Off, |bench| {
        let question = who_has((mac("stranger"), v4("stranger")), v4("b"));
        let run = bench.run("responder", "stranger", &question);
        assert_eq!((run.verdict, run.bytes), (SHOT, question));
        assert_eq!(run.copies, BTreeMap::new());
        let mut stats = PortStats::default();
        stats.drops[bpf_bridge_common::drops::DropReason::NotAPort as usize] = 1;
        assert_eq!(bench.counters(), BTreeMap::from([("", stats)]));
    });
}
