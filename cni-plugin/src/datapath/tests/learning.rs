//! `port`: addresses that nobody was assigned are learned from their frames.

use std::collections::{BTreeMap, BTreeSet};

use bpf_bridge_common::{
    drops::DropReason::{BadSource, Isolated, SamePort, Spoofed},
    layout::{AGEING_NS, Mac, PORT_ISOLATED, REFRESH_NS},
};

use super::{
    super::{LogLevel, remove},
    bench::{Bench, LEARNED_SHARE, mac, now, with_bench},
    frames::{BROADCAST, plain, who_has},
    switching::{
        Fate::{self, Drop, Flood, Redirect, ToPod},
        NOT_A, NOT_ISOLATED, check,
    },
};

const STRANGE: Mac = [2, 0, 0, 0, 1, 0];
const SECOND: u64 = 1_000_000_000;

/// Runs a frame and forgets its counters again, not what was learned.
fn step(bench: &mut Bench, row: &str, device: &'static str, frame: &[u8], fate: Fate) {
    check(bench, row, device, frame, fate);
    let learned: Vec<_> = bench.learned.iter().map(Result::unwrap).collect();
    bench.reset();
    for (key, value) in learned {
        bench.learned.insert(key, value, 0).unwrap();
    }
}

#[test]
fn a_strange_source_is_learned_and_found() {
    with_bench(LogLevel::Off, |bench| {
        let at = |bench: &Bench, device| BTreeMap::from([((bench.segment, STRANGE), device)]);
        let before = now();
        step(
            bench,
            "a frame from it",
            "b",
            &plain(mac("a"), STRANGE),
            ToPod,
        );
        assert_eq!(bench.table(), at(bench, "b"));
        assert!(
            (before..=now()).contains(&bench.seen(STRANGE)),
            "the time of the frame"
        );
        step(
            bench,
            "a frame to it",
            "a",
            &plain(STRANGE, mac("a")),
            Redirect,
        );
        step(
            bench,
            "from the host to it",
            "gate",
            &plain(STRANGE, mac("gate")),
            Redirect,
        );
        step(
            bench,
            "from an isolated port to it",
            "iso",
            &plain(STRANGE, mac("iso")),
            Redirect,
        );
        step(
            bench,
            "from its own port",
            "b",
            &plain(STRANGE, mac("b")),
            Drop(SamePort),
        );

        step(
            bench,
            "a broadcast from elsewhere",
            "hair",
            &plain(BROADCAST, STRANGE),
            Flood(&["gate", "a", "b", "hair", "iso", "iso2", "spoof", "promisc"]),
        );
        assert_eq!(bench.table(), at(bench, "hair"), "it moved");
        step(
            bench,
            "from its new port, hairpinMode",
            "hair",
            &plain(STRANGE, mac("hair")),
            Redirect,
        );
        step(
            bench,
            "from its old port",
            "b",
            &plain(STRANGE, mac("b")),
            Redirect,
        );

        step(
            bench,
            "seen at the gateway port",
            "gate",
            &plain(mac("a"), STRANGE),
            ToPod,
        );
        assert_eq!(bench.table(), at(bench, "gate"));
        step(
            bench,
            "behind the gateway port",
            "a",
            &plain(STRANGE, mac("a")),
            Redirect,
        );

        // The other segment knows nothing of it.
        step(
            bench,
            "the same address elsewhere",
            "foreign",
            &plain(STRANGE, mac("foreign")),
            Flood(&[]),
        );
        step(
            bench,
            "and from elsewhere",
            "foreign",
            &plain(BROADCAST, STRANGE),
            Flood(&[]),
        );
        let both = [
            ((bench.segment, STRANGE), "gate"),
            ((bench.other_segment, STRANGE), "foreign"),
        ];
        assert_eq!(bench.table(), BTreeMap::from(both));
    });
}

#[test]
fn every_kind_of_frame_teaches() {
    with_bench(LogLevel::Off, |bench| {
        let question = who_has((STRANGE, [10, 0, 0, 99]), [10, 0, 0, 98]);
        let rows: [(&str, Vec<u8>, Fate); 5] = [
            ("to a pod", plain(mac("b"), STRANGE), ToPod),
            ("to the gateway", plain(mac("gate"), STRANGE), Redirect),
            (
                "to nobody",
                plain([2, 0, 0, 0, 2, 0], STRANGE),
                Flood(NOT_A),
            ),
            ("a question", question, Flood(NOT_A)),
            (
                "LLDP",
                plain([1, 0x80, 0xc2, 0, 0, 0x0e], STRANGE),
                Redirect,
            ),
        ];
        for (row, frame, fate) in rows {
            check(bench, row, "a", &frame, fate);
            let learned = BTreeMap::from([((bench.segment, STRANGE), "a")]);
            assert_eq!(bench.table(), learned, "{row}");
            bench.reset();
        }
    });
}

#[test]
fn what_is_refused_teaches_nothing() {
    with_bench(LogLevel::Off, |bench| {
        let rows = [
            ("spoofed", "spoof", plain(mac("b"), STRANGE), Drop(Spoofed)),
            (
                "bad source",
                "a",
                plain(mac("b"), BROADCAST),
                Drop(BadSource),
            ),
            ("zero", "a", plain(mac("b"), [0; 6]), Drop(BadSource)),
            ("own address", "a", plain(mac("b"), mac("a")), ToPod),
            (
                "an assigned address elsewhere",
                "a",
                plain(mac("b"), mac("iso")),
                ToPod,
            ),
            (
                "the gateway's address elsewhere",
                "a",
                plain(mac("b"), mac("gate")),
                ToPod,
            ),
        ];
        for (row, device, frame, fate) in rows {
            check(bench, row, device, &frame, fate);
            assert_eq!(bench.table(), BTreeMap::new(), "{row}");
            bench.reset();
        }
    });
}

#[test]
fn what_was_assigned_goes_before_what_was_learned() {
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        bench.learn(segment, mac("b"), "hair", 0);
        // The mark shows that the frame went into the pod, not out of a veth.
        check(
            bench,
            "assigned and learned",
            "a",
            &plain(mac("b"), mac("a")),
            ToPod,
        );
    });
}

#[test]
fn an_entry_is_written_again_once_a_second() {
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        let frame = plain(mac("b"), STRANGE);
        let fresh = bench.learn(segment, STRANGE, "a", REFRESH_NS / 2);
        step(bench, "half a second old", "a", &frame, ToPod);
        assert_eq!(bench.seen(STRANGE), fresh, "not written again");

        for age in [REFRESH_NS + 1, 20 * SECOND, AGEING_NS + SECOND] {
            bench.learn(segment, STRANGE, "a", age);
            let before = now();
            step(bench, "older than a second", "a", &frame, ToPod);
            assert!(
                (before..=now()).contains(&bench.seen(STRANGE)),
                "{age} ns old"
            );
        }
        // A move is written at once.
        bench.learn(segment, STRANGE, "a", 0);
        step(bench, "moved", "b", &plain(mac("a"), STRANGE), ToPod);
        assert_eq!(bench.table(), BTreeMap::from([((segment, STRANGE), "b")]));
    });
}

#[test]
fn an_aged_entry_is_not_believed() {
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        let frame = plain(STRANGE, mac("a"));
        bench.learn(segment, STRANGE, "b", AGEING_NS - 20 * SECOND);
        check(bench, "nearly 300 s old", "a", &frame, Redirect);
        bench.reset();
        bench.learn(segment, STRANGE, "b", AGEING_NS + 1);
        check(bench, "300 s old", "a", &frame, Flood(NOT_A));
        bench.reset();
        bench.learn(segment, STRANGE, "a", AGEING_NS + 1);
        check(
            bench,
            "300 s old, on the same port",
            "a",
            &frame,
            Flood(NOT_A),
        );
    });
}

#[test]
fn an_entry_of_a_lost_port_is_not_believed() {
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        let frame = plain(STRANGE, mac("a"));
        bench.learn(segment, STRANGE, "foreign", 0);
        check(
            bench,
            "the port is another segment's now",
            "a",
            &frame,
            Flood(NOT_A),
        );
        bench.reset();
        bench.learn(segment, STRANGE, "stranger", 0);
        check(bench, "the port is gone", "a", &frame, Flood(NOT_A));
        bench.reset();
        bench.learn(segment, STRANGE, "b", 0);
        let index = bench.index("b");
        remove(&mut bench.datapath.ports, "PORTS", index).unwrap();
        check(bench, "the port was removed", "a", &frame, Flood(NOT_A));
    });
}

#[test]
fn learned_addresses_are_isolated_as_their_ports_are() {
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        bench.learn(segment, STRANGE, "iso2", 0);
        step(
            bench,
            "both isolated",
            "iso",
            &plain(STRANGE, mac("iso")),
            Drop(Isolated),
        );
        step(
            bench,
            "one isolated",
            "a",
            &plain(STRANGE, mac("a")),
            Redirect,
        );
        step(
            bench,
            "the host",
            "gate",
            &plain(STRANGE, mac("gate")),
            Redirect,
        );
        bench.set_port("iso2", |port| port.flags &= !PORT_ISOLATED);
        step(
            bench,
            "the other no longer",
            "iso",
            &plain(STRANGE, mac("iso")),
            Redirect,
        );
        bench.learn(segment, STRANGE, "iso2", AGEING_NS);
        step(
            bench,
            "unknown again",
            "iso",
            &plain(STRANGE, mac("iso")),
            Flood(NOT_ISOLATED),
        );
    });
}

#[test]
fn a_port_forgets_its_oldest_address_for_one_too_many() {
    let numbered = |number: u32| -> Mac {
        let [a, b, c, d] = number.to_be_bytes();
        [2, 1, a, b, c, d]
    };
    let at = |bench: &Bench, device| -> BTreeSet<Mac> {
        let table = bench.table();
        let own = table.into_iter().filter(|(_, port)| *port == device);
        own.map(|((_, mac), _)| mac).collect()
    };
    with_bench(LogLevel::Off, |bench| {
        bench.run("port", "b", &plain(mac("a"), STRANGE));
        for number in 0..3 * LEARNED_SHARE {
            bench.run("port", "a", &plain(mac("b"), numbered(number)));
            let first = (number + 1).saturating_sub(LEARNED_SHARE);
            let expected = (first..=number).map(numbered).collect();
            assert_eq!(at(bench, "a"), expected);
        }
        assert_eq!(at(bench, "b"), BTreeSet::from([STRANGE]));

        // One that has moved is another port's now.
        let moved = numbered(3 * LEARNED_SHARE - 1);
        bench.run("port", "b", &plain(mac("a"), moved));
        for number in 0..2 * LEARNED_SHARE {
            bench.run("port", "a", &plain(mac("b"), numbered(number)));
        }
        assert_eq!(at(bench, "b"), BTreeSet::from([STRANGE, moved]));
    });
}
