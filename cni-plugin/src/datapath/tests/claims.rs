//! `guard`: what a pod says of addresses that were assigned, in every form in which
//! Linux would believe it.

use std::collections::BTreeMap;

use bpf_bridge_common::{
    drops::DropReason::{Claimed, Spoofed},
    layout::{Mac, MacKey, SEGMENT_ROUTED},
};

use super::{
    super::{ANY, LogLevel, set},
    bench::{Bench, REDIRECT, mac, v4, v6, with_bench},
    frames::{
        BROADCAST, IPV6, arp, ethernet, icmpv6, ipv4, ipv6, solicitation, source_option, tagged,
        who_has,
    },
    switching::{
        Fate::{self, Drop, Flood, Redirect, ToPod},
        NOT_A, check,
    },
};

const IPV4: u16 = 0x0800;
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const NOBODYS: [u8; 4] = [10, 0, 0, 200];
const NOBODYS_V6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 200];
const UNSPECIFIED: [u8; 16] = [0; 16];
const STRANGE: Mac = [2, 0, 0, 0, 1, 0];
/// A group address of IEEE 802.1D, which goes to the host only.
const RESERVED: Mac = [1, 0x80, 0xc2, 0, 0, 0x0e];

const ADVERTISEMENT: u8 = 136;
const SOLICITATION: u8 = 135;

type Row<'a> = (&'a str, &'static str, Vec<u8>, Fate);

fn run(bench: &mut Bench, rows: Vec<Row<'_>>) {
    for (row, device, frame, fate) in rows {
        check(bench, row, device, &frame, fate);
        bench.reset();
    }
}

/// The link-local address that a station makes of its MAC address.
fn link_local(name: &str) -> [u8; 16] {
    let [a, b, c, d, e, f] = mac(name);
    let mut address = [0; 16];
    address[..2].copy_from_slice(&[0xfe, 0x80]);
    address[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    address
}

/// What neighbours tell each other: `about` is the address that the message has in it.
fn discovery(to: (Mac, [u8; 16]), from: (Mac, [u8; 16]), kind: u8, about: [u8; 16]) -> Vec<u8> {
    behind(to, from, &[], kind, about)
}

/// The same behind extension headers, of these types and 8 bytes each.
fn behind(
    to: (Mac, [u8; 16]),
    from: (Mac, [u8; 16]),
    types: &[u8],
    kind: u8,
    about: [u8; 16],
) -> Vec<u8> {
    let message = [
        &[kind, 0, 0, 0, 0x20, 0, 0, 0][..],
        &about,
        &[2, 1],
        &from.0,
    ]
    .concat();
    let mut payload = Vec::new();
    for at in 0..types.len() {
        let next = types.get(at + 1).copied().unwrap_or(58);
        payload.extend([next, 0, 0, 0, 0, 0, 0, 0]);
    }
    payload.extend(icmpv6(from.1, to.1, message));
    let first = types.first().copied().unwrap_or(58);
    ethernet(to.0, from.0, IPV6, &ipv6(from.1, to.1, first, &payload))
}

/// An unsolicited advertisement of `a`.
fn advertises(about: [u8; 16]) -> Vec<u8> {
    discovery(
        (ALL_NODES_MAC, ALL_NODES),
        (mac("a"), v6("a")),
        ADVERTISEMENT,
        about,
    )
}

/// `a` tells `to` by ARP that it has `address`.
fn tells(to: Mac, operation: u16, address: [u8; 4]) -> Vec<u8> {
    arp(to, operation, (mac("a"), address), (to, v4("iso")))
}

fn odd(mut frame: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    frame[at] = value;
    frame
}

/// An ICMP message in an IPv4 packet with `options` words of options.
fn icmp(to: Mac, kind: u8, options: u8) -> Vec<u8> {
    let message = [&[kind, 1, 0, 0][..], &v4("a"), &[0x45; 28]].concat();
    let packet = ipv4(v4("gate"), v4("b"), 1, options, &message);
    ethernet(to, mac("a"), IPV4, &packet)
}

#[test]
fn nobody_claims_an_assigned_ipv4_address() {
    let rows = vec![
        (
            "an announcement",
            "a",
            tells(BROADCAST, 2, v4("b")),
            Drop(Claimed),
        ),
        (
            "an announcement as a question",
            "a",
            arp(BROADCAST, 1, (mac("a"), v4("b")), ([0; 6], v4("b"))),
            Drop(Claimed),
        ),
        (
            "the gateway's",
            "a",
            tells(BROADCAST, 2, v4("gate")),
            Drop(Claimed),
        ),
        (
            "an answer to a pod",
            "a",
            tells(mac("iso"), 2, v4("b")),
            Drop(Claimed),
        ),
        (
            "an answer to the owner",
            "a",
            tells(mac("b"), 2, v4("b")),
            Drop(Claimed),
        ),
        (
            "an answer to the host",
            "a",
            tells(mac("gate"), 2, v4("b")),
            Drop(Claimed),
        ),
        (
            "the gateway's own address, to the host",
            "a",
            tells(mac("gate"), 2, v4("gate")),
            Drop(Claimed),
        ),
        (
            "a question to a pod",
            "a",
            tells(mac("iso"), 1, v4("b")),
            Drop(Claimed),
        ),
        (
            "a question to the host",
            "a",
            tells(mac("gate"), 1, v4("b")),
            Drop(Claimed),
        ),
        (
            "a question for nobody's address",
            "a",
            who_has((mac("a"), v4("b")), NOBODYS),
            Drop(Claimed),
        ),
        (
            "to a reserved group",
            "a",
            tells(RESERVED, 2, v4("b")),
            Drop(Claimed),
        ),
        (
            "to nobody's MAC address",
            "a",
            tells(STRANGE, 2, v4("b")),
            Drop(Claimed),
        ),
        (
            "under the owner's name",
            "a",
            arp(mac("iso"), 2, (mac("b"), v4("b")), (mac("iso"), v4("iso"))),
            Drop(Claimed),
        ),
        (
            "hardware of the other kind that Linux takes",
            "a",
            odd(tells(mac("iso"), 2, v4("b")), 15, 6),
            Drop(Claimed),
        ),
        (
            "another operation",
            "a",
            odd(tells(mac("iso"), 2, v4("b")), 21, 9),
            Drop(Claimed),
        ),
        (
            "with a priority",
            "a",
            tagged(&tells(mac("iso"), 2, v4("b")), 0xe000),
            Drop(Claimed),
        ),
        (
            "with a priority, drop eligible",
            "a",
            tagged(&tells(mac("iso"), 2, v4("b")), 0x1000),
            Drop(Claimed),
        ),
        (
            "with a provider's priority",
            "a",
            odd(
                odd(tagged(&tells(mac("iso"), 2, v4("b")), 0), 12, 0x88),
                13,
                0xa8,
            ),
            Drop(Claimed),
        ),
        (
            "with two priorities",
            "a",
            tagged(&tagged(&tells(mac("iso"), 2, NOBODYS), 0), 0),
            Drop(Claimed),
        ),
        // As on a bridge.
        (
            "in a VLAN",
            "a",
            tagged(&tells(mac("iso"), 2, v4("b")), 7),
            ToPod,
        ),
        (
            "in a VLAN, with a priority",
            "a",
            tagged(&tagged(&tells(mac("iso"), 2, v4("b")), 7), 0),
            ToPod,
        ),
        (
            "the own address",
            "a",
            tells(BROADCAST, 2, v4("a")),
            Flood(NOT_A),
        ),
        (
            "the own address, to a pod",
            "a",
            tells(mac("iso"), 2, v4("a")),
            ToPod,
        ),
        (
            "the own address, to the host",
            "a",
            tells(mac("gate"), 2, v4("a")),
            Redirect,
        ),
        (
            "nobody's address",
            "a",
            tells(BROADCAST, 2, NOBODYS),
            Flood(NOT_A),
        ),
        (
            "nobody's address, to a pod",
            "a",
            tells(mac("iso"), 2, NOBODYS),
            ToPod,
        ),
        (
            "an address of another segment",
            "a",
            tells(mac("iso"), 2, v4("foreign")),
            ToPod,
        ),
        (
            "a probe",
            "a",
            arp(mac("b"), 1, (mac("a"), [0; 4]), ([0; 6], v4("b"))),
            ToPod,
        ),
        (
            "the host, by proxy",
            "gate",
            arp(mac("a"), 2, (mac("gate"), v4("b")), (mac("a"), v4("a"))),
            ToPod,
        ),
        (
            "hardware addresses of 8 bytes",
            "a",
            odd(tells(mac("iso"), 2, v4("b")), 18, 8),
            ToPod,
        ),
    ];
    with_bench(LogLevel::Off, |bench| {
        run(bench, rows);
        // A pod may have several MAC addresses inside.
        let bridged = arp(mac("iso"), 2, (STRANGE, v4("a")), (mac("iso"), v4("iso")));
        check(
            bench,
            "the own address, at a MAC address inside",
            "a",
            &bridged,
            ToPod,
        );
        bench.reset();
        // Linux takes nothing that is shorter than a packet.
        let whole = tells(mac("iso"), 2, v4("b"));
        for length in 15..whole.len() {
            let row = format!("{length} bytes");
            check(bench, &row, "a", &whole[..length], ToPod);
            bench.reset();
        }
    });
}

#[test]
fn a_question_is_answered_to_whoever_asks_under_another_name() {
    with_bench(LogLevel::Off, |bench| {
        let question = who_has((mac("a"), v4("iso")), v4("b"));
        let run = bench.run("port", "a", &question);
        assert_eq!((run.verdict, &run.copies), (REDIRECT, &BTreeMap::new()));
        assert_eq!(run.bytes[22..32], [&mac("b")[..], &v4("b")].concat());

        let question = solicitation(mac("a"), v6("iso"), v6("b"), &source_option(mac("a")));
        let run = bench.run("port", "a", &question);
        assert_eq!((run.verdict, &run.copies), (REDIRECT, &BTreeMap::new()));
        assert_eq!(run.bytes[62..78], v6("b"));
    });
}

#[test]
fn nobody_claims_an_assigned_ipv6_address() {
    let a = (mac("a"), v6("a"));
    let iso = (mac("iso"), v6("iso"));
    let gate = (mac("gate"), v6("gate"));
    let as_b = (mac("a"), v6("b"));
    let (na, ns) = (ADVERTISEMENT, SOLICITATION);
    let mut not_from_here = advertises(v6("b"));
    not_from_here[21] = 254;
    let rows = vec![
        ("unsolicited", "a", advertises(v6("b")), Drop(Claimed)),
        ("the gateway's", "a", advertises(v6("gate")), Drop(Claimed)),
        (
            "a link-local one",
            "a",
            advertises(link_local("b")),
            Drop(Claimed),
        ),
        (
            "the gateway's link-local one",
            "a",
            advertises(link_local("gate")),
            Drop(Claimed),
        ),
        (
            "to a pod",
            "a",
            discovery(iso, a, na, v6("b")),
            Drop(Claimed),
        ),
        (
            "to the host",
            "a",
            discovery(gate, a, na, v6("b")),
            Drop(Claimed),
        ),
        (
            "to the host, its own",
            "a",
            discovery(gate, a, na, v6("gate")),
            Drop(Claimed),
        ),
        (
            "under the owner's name",
            "a",
            discovery(iso, as_b, na, v6("b")),
            Drop(Claimed),
        ),
        (
            "to a reserved group",
            "a",
            discovery((RESERVED, gate.1), a, na, v6("b")),
            Drop(Claimed),
        ),
        (
            "to the routers of multicast",
            "a",
            discovery(([0x33, 0x33, 0, 0, 0, 0x16], gate.1), a, na, v6("b")),
            Drop(Claimed),
        ),
        (
            "a question to a pod",
            "a",
            discovery(iso, as_b, ns, v6("iso")),
            Drop(Claimed),
        ),
        (
            "a question to the host",
            "a",
            discovery(gate, as_b, ns, v6("gate")),
            Drop(Claimed),
        ),
        (
            "a question for nobody's address",
            "a",
            solicitation(mac("a"), v6("b"), NOBODYS_V6, &source_option(mac("a"))),
            Drop(Claimed),
        ),
        (
            "from a link-local address",
            "a",
            discovery(gate, (mac("a"), link_local("b")), ns, v6("gate")),
            Drop(Claimed),
        ),
        (
            "a detection of duplicates, to the owner alone",
            "a",
            discovery((mac("b"), v6("b")), (mac("a"), UNSPECIFIED), ns, v6("b")),
            Drop(Claimed),
        ),
        (
            "a question for routers",
            "a",
            discovery(gate, as_b, 133, UNSPECIFIED),
            Drop(Claimed),
        ),
        (
            "behind hop-by-hop options",
            "a",
            behind(iso, a, &[0], na, v6("b")),
            Drop(Claimed),
        ),
        (
            "behind options",
            "a",
            behind(iso, a, &[60], na, v6("b")),
            Drop(Claimed),
        ),
        (
            "behind a routing header",
            "a",
            behind(iso, a, &[43], na, v6("b")),
            Drop(Claimed),
        ),
        (
            "behind eight headers",
            "a",
            behind(iso, a, &[0, 60, 43, 60, 60, 60, 60, 60], na, v6("b")),
            Drop(Claimed),
        ),
        (
            "behind nine, whatever it says",
            "a",
            behind(iso, a, &[60; 9], na, NOBODYS_V6),
            Drop(Claimed),
        ),
        (
            "behind options, to all",
            "a",
            behind((ALL_NODES_MAC, ALL_NODES), a, &[60], na, v6("b")),
            Drop(Claimed),
        ),
        (
            "a detection of duplicates behind options",
            "a",
            behind(
                (ALL_NODES_MAC, ALL_NODES),
                (mac("a"), UNSPECIFIED),
                &[60],
                ns,
                v6("b"),
            ),
            Drop(Claimed),
        ),
        (
            "in a fragment, whatever it says",
            "a",
            behind(iso, a, &[44], na, v6("a")),
            Drop(Claimed),
        ),
        (
            "with a priority",
            "a",
            tagged(&discovery(iso, a, na, v6("b")), 0),
            Drop(Claimed),
        ),
        // As on a bridge.
        (
            "in a VLAN",
            "a",
            tagged(&discovery(iso, a, na, v6("b")), 7),
            ToPod,
        ),
        ("the own address", "a", advertises(v6("a")), Flood(NOT_A)),
        (
            "the own link-local one",
            "a",
            advertises(link_local("a")),
            Flood(NOT_A),
        ),
        (
            "the own address, to a pod",
            "a",
            discovery(iso, a, na, v6("a")),
            ToPod,
        ),
        (
            "the own address, to the host",
            "a",
            discovery(gate, a, na, v6("a")),
            Redirect,
        ),
        (
            "nobody's address",
            "a",
            advertises(NOBODYS_V6),
            Flood(NOT_A),
        ),
        (
            "an address of another segment",
            "a",
            advertises(v6("foreign")),
            Flood(NOT_A),
        ),
        (
            "a question of its own",
            "a",
            discovery(gate, a, ns, v6("gate")),
            Redirect,
        ),
        (
            "duplicate detection for nobody's address",
            "a",
            solicitation(mac("a"), UNSPECIFIED, NOBODYS_V6, &[]),
            Flood(NOT_A),
        ),
        (
            "a question for routers of its own",
            "a",
            discovery(gate, a, 133, UNSPECIFIED),
            Redirect,
        ),
        (
            "hop limit 254: no neighbour believes it",
            "a",
            not_from_here,
            Flood(NOT_A),
        ),
        (
            "a later fragment",
            "a",
            odd(behind(iso, a, &[44], na, v6("b")), 57, 8),
            ToPod,
        ),
        (
            "an echo request",
            "a",
            discovery(iso, a, 128, v6("b")),
            ToPod,
        ),
        (
            "a host identity header",
            "a",
            behind(iso, a, &[139], na, v6("b")),
            ToPod,
        ),
        (
            "the host, by proxy",
            "gate",
            discovery(iso, gate, na, v6("b")),
            ToPod,
        ),
    ];
    with_bench(LogLevel::Off, |bench| {
        run(bench, rows);
        // A receiver has no use for what ends before its address does.
        let whole = discovery(iso, a, na, v6("b"));
        // BPF_PROG_TEST_RUN takes no shorter ones since Linux 6.18.
        for length in 54..78 {
            let row = format!("{length} bytes");
            check(bench, &row, "a", &whole[..length], ToPod);
            bench.reset();
        }
    });
}

#[test]
fn the_way_out_of_a_network_with_a_gateway_is_the_gateway() {
    let local = (mac("a"), link_local("a"));
    let all = (ALL_NODES_MAC, ALL_NODES);
    let (b, gate) = ((mac("b"), v6("b")), (mac("gate"), v6("gate")));
    let advertises = |to, from| discovery(to, from, 134, UNSPECIFIED);
    let redirects = |to, about| discovery(to, local, 137, about);
    let messages = || {
        [
            ("a router advertisement", advertises(all, local)),
            ("one to a pod", advertises(b, local)),
            ("one to the host", advertises(gate, local)),
            ("a redirect", redirects(b, link_local("a"))),
            ("an IPv4 redirect", icmp(mac("b"), 5, 0)),
            ("an IPv4 redirect behind options", icmp(mac("b"), 5, 10)),
            ("a redirect of the host", redirects(gate, link_local("a"))),
            ("an IPv4 redirect of the host", icmp(mac("gate"), 5, 0)),
            ("an IPv4 redirect to all", icmp(BROADCAST, 5, 0)),
            (
                "a redirect with a priority",
                tagged(&icmp(mac("b"), 5, 0), 0),
            ),
        ]
    };
    with_bench(LogLevel::Off, |bench| {
        for (row, frame) in messages() {
            check(bench, row, "a", &frame, Drop(Claimed));
            bench.reset();
        }
        for (row, frame) in [
            ("an error", icmp(mac("b"), 3, 0)),
            ("a ping behind options", icmp(mac("b"), 8, 10)),
            ("a later fragment", odd(icmp(mac("b"), 5, 0), 21, 1)),
            ("no whole header", icmp(mac("b"), 5, 10)[..74].to_vec()),
            ("no message", icmp(mac("b"), 5, 0)[..34].to_vec()),
        ] {
            check(bench, row, "a", &frame, ToPod);
            bench.reset();
        }
        let frame = discovery(b, gate, 134, UNSPECIFIED);
        check(
            bench,
            "the gateway advertises itself",
            "gate",
            &frame,
            ToPod,
        );
        bench.reset();

        // Where there is none of ours, a pod may be it, but not for the node.
        route(bench, false);
        let fates = [
            Flood(NOT_A),
            ToPod,
            Redirect,
            ToPod,
            ToPod,
            ToPod,
            Drop(Claimed),
            Drop(Claimed),
            Drop(Claimed),
            ToPod,
        ];
        for ((row, frame), fate) in messages().into_iter().zip(fates) {
            check(bench, row, "a", &frame, fate);
            bench.reset();
        }
        for (row, frame) in [
            (
                "a router with another's address",
                advertises(all, (mac("a"), link_local("b"))),
            ),
            ("a redirect to another's address", redirects(b, v6("iso"))),
        ] {
            check(bench, row, "a", &frame, Drop(Claimed));
            bench.reset();
        }
    });
}

/// Whether the node is the router of the segment.
fn route(bench: &mut Bench, routed: bool) {
    let number = bench.segment;
    let mut segment = bench.datapath.segment(number).unwrap().unwrap();
    assert_eq!(segment.flags, SEGMENT_ROUTED, "the gateway has addresses");
    segment.flags = u32::from(routed) * SEGMENT_ROUTED;
    set(
        &mut bench.datapath.segments,
        "SEGMENTS",
        number,
        segment,
        ANY,
    )
    .unwrap();
}

#[test]
fn macspoofchk_refuses_the_ip_addresses_of_others() {
    let from = |device: &'static str, source: [u8; 4], to: Mac| {
        ethernet(
            to,
            mac(device),
            IPV4,
            &ipv4(source, v4("b"), 17, 0, &[7; 20]),
        )
    };
    let from6 = |device: &'static str, source: [u8; 16], to: Mac| {
        ethernet(to, mac(device), IPV6, &ipv6(source, v6("b"), 17, &[7; 20]))
    };
    let (b, gate) = (mac("b"), mac("gate"));
    let not_spoof: &[&str] = &["gate", "a", "b", "hair", "iso", "iso2", "promisc"];
    let rows = vec![
        (
            "another's",
            "spoof",
            from("spoof", v4("a"), b),
            Drop(Spoofed),
        ),
        (
            "the receiver's",
            "spoof",
            from("spoof", v4("b"), b),
            Drop(Spoofed),
        ),
        (
            "the gateway's",
            "spoof",
            from("spoof", v4("gate"), b),
            Drop(Spoofed),
        ),
        (
            "another's, to the host",
            "spoof",
            from("spoof", v4("a"), gate),
            Drop(Spoofed),
        ),
        (
            "another's, to all",
            "spoof",
            from("spoof", v4("a"), BROADCAST),
            Drop(Spoofed),
        ),
        (
            "another's, with a priority",
            "spoof",
            tagged(&from("spoof", v4("a"), b), 0),
            Drop(Spoofed),
        ),
        (
            "another's in IPv6",
            "spoof",
            from6("spoof", v6("a"), b),
            Drop(Spoofed),
        ),
        (
            "another's in IPv6, to the host",
            "spoof",
            from6("spoof", v6("a"), gate),
            Drop(Spoofed),
        ),
        (
            "another's link-local one",
            "spoof",
            from6("spoof", link_local("a"), b),
            Drop(Spoofed),
        ),
        (
            "an advertisement under another's name",
            "spoof",
            discovery(
                (b, v6("b")),
                (mac("spoof"), v6("a")),
                ADVERTISEMENT,
                v6("spoof"),
            ),
            Drop(Spoofed),
        ),
        (
            "a claim",
            "spoof",
            arp(b, 2, (mac("spoof"), v4("a")), (b, v4("b"))),
            Drop(Claimed),
        ),
        ("the own", "spoof", from("spoof", v4("spoof"), b), ToPod),
        (
            "the own, to the host",
            "spoof",
            from("spoof", v4("spoof"), gate),
            Redirect,
        ),
        (
            "the own, to all",
            "spoof",
            from("spoof", v4("spoof"), BROADCAST),
            Flood(not_spoof),
        ),
        ("nobody's", "spoof", from("spoof", NOBODYS, b), ToPod),
        (
            "0.0.0.0",
            "spoof",
            from("spoof", [0; 4], BROADCAST),
            Flood(not_spoof),
        ),
        (
            "the own in IPv6",
            "spoof",
            from6("spoof", v6("spoof"), b),
            ToPod,
        ),
        (
            "the own link-local one",
            "spoof",
            from6("spoof", link_local("spoof"), b),
            ToPod,
        ),
        (
            "another's in a VLAN",
            "spoof",
            tagged(&from("spoof", v4("a"), b), 7),
            ToPod,
        ),
        // Who does not ask for it does not pay for it.
        (
            "another's without macspoofchk",
            "a",
            from("a", v4("iso"), b),
            ToPod,
        ),
        (
            "another's in IPv6 without",
            "a",
            from6("a", v6("iso"), b),
            ToPod,
        ),
    ];
    with_bench(LogLevel::Off, |bench| run(bench, rows));
}

#[test]
fn an_address_that_outlived_its_port_may_be_claimed() {
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        let frames = [
            ("ARP", tells(mac("iso"), 2, v4("b"))),
            (
                "an advertisement",
                discovery(
                    (mac("iso"), v6("iso")),
                    (mac("a"), v6("a")),
                    ADVERTISEMENT,
                    v6("b"),
                ),
            ),
        ];
        // The kernel gave the port's number to another device since.
        bench.set_port("b", |port| port.segment += 1);
        for (row, frame) in frames {
            check(bench, row, "a", &frame, ToPod);
            bench.reset();
        }
        let frame = discovery(
            (mac("iso"), v6("iso")),
            (mac("a"), v6("a")),
            ADVERTISEMENT,
            link_local("b"),
        );
        check(
            bench,
            "its MAC address is assigned still",
            "a",
            &frame,
            Drop(Claimed),
        );
        bench.reset();
        let endpoints = &mut bench.datapath.endpoints;
        super::super::remove(endpoints, "ENDPOINTS", MacKey::new(segment, mac("b"))).unwrap();
        check(bench, "and now it is not", "a", &frame, ToPod);
    });
}
