//! `flood`: every port of the list gets its one copy, however long the list is.

use std::collections::BTreeMap;

use bpf_bridge_common::{
    drops::DropReason::NotAPort,
    layout::{
        FLOOD_BATCH, MAX_MEMBERS, Member, MemberKey, PORT_HAIRPIN, PORT_ISOLATED, PortStats,
        Segment,
    },
};

use super::{
    super::{ANY, LogLevel, get, remove, set},
    bench::{Bench, SHOT, STOLEN, mac, v4, with_bench},
    frames::{BROADCAST, plain, who_has},
};

/// Makes the segment's list `members`; nothing in the slots of `None`.
fn list(bench: &mut Bench, members: &[Option<(&str, u32)>]) {
    let segment = bench.segment;
    let old = bench.datapath.segment(segment).unwrap().unwrap();
    for slot in 0..old.members {
        remove(
            &mut bench.datapath.members,
            "MEMBERS",
            MemberKey { segment, slot },
        )
        .unwrap();
    }
    for (slot, member) in (0..).zip(members) {
        let Some((device, flags)) = *member else {
            continue;
        };
        let member = Member {
            port: bench.index(device),
            flags,
        };
        set(
            &mut bench.datapath.members,
            "MEMBERS",
            MemberKey { segment, slot },
            member,
            ANY,
        )
        .unwrap();
    }
    let entry = Segment {
        members: u32::try_from(members.len()).unwrap(),
        ..old
    };
    set(
        &mut bench.datapath.segments,
        "SEGMENTS",
        segment,
        entry,
        ANY,
    )
    .unwrap();
}

/// Floods a frame from `a`, and checks who got how many copies.
fn flood(bench: &mut Bench, row: &str, frame: &[u8], expected: &[(&str, u64)]) {
    let expected: BTreeMap<String, u64> = expected
        .iter()
        .filter(|(_, copies)| *copies > 0)
        .map(|(device, copies)| ((*device).to_owned(), *copies))
        .collect();
    let run = bench.run("port", "a", frame);
    assert_eq!(run.copies, expected, "{row}: copies");
    assert_eq!(run.bytes, frame, "{row}: bytes");
    let flooded = 1;
    let stats = PortStats {
        flooded,
        ..PortStats::default()
    };
    assert_eq!(
        bench.counters(),
        BTreeMap::from([("a", stats)]),
        "{row}: counters"
    );
    assert_eq!(run.verdict, STOLEN, "{row}: verdict");
    bench.reset();
}

#[test]
fn each_slot_is_reached_once() {
    let frame = plain(BROADCAST, mac("a"));
    with_bench(LogLevel::Off, |bench| {
        let full = usize::try_from(FLOOD_BATCH).unwrap();
        for length in [
            0,
            1,
            2,
            full - 1,
            full,
            full + 1,
            2 * full,
            600,
            3 * full + 1,
        ] {
            let mut members = vec![Some(("b", 0)); length];
            list(bench, &members);
            let row = format!("{length} ports");
            flood(bench, &row, &frame, &[("b", length as u64)]);

            // One slot after the other belongs to somebody else.
            let edges = [
                0,
                1,
                full - 1,
                full,
                full + 1,
                2 * full - 1,
                2 * full,
                length.wrapping_sub(1),
            ];
            for slot in edges {
                if slot >= length {
                    continue;
                }
                let others = length as u64 - 1;
                let row = format!("slot {slot} of {length}");
                members[slot] = Some(("hair", 0));
                list(bench, &members);
                flood(bench, &row, &frame, &[("b", others), ("hair", 1)]);
                members[slot] = Some(("a", 0));
                list(bench, &members);
                flood(
                    bench,
                    &format!("{row} is the sender's"),
                    &frame,
                    &[("b", others)],
                );
                members[slot] = None;
                list(bench, &members);
                flood(bench, &format!("{row} is empty"), &frame, &[("b", others)]);
                members[slot] = Some(("b", 0));
            }
        }
    });
}

#[test]
fn the_longest_list_is_within_the_limit_of_tail_calls() {
    let frame = plain(BROADCAST, mac("a"));
    // This one goes through the guard and the responder, which cost calls of their own.
    let question = who_has((mac("a"), v4("a")), [10, 0, 0, 200]);
    with_bench(LogLevel::Off, |bench| {
        let longest = usize::try_from(MAX_MEMBERS).unwrap();
        let all = u64::from(MAX_MEMBERS);
        for length in [longest - 1, longest] {
            let mut members = vec![Some(("b", 0)); length];
            members[length - 1] = Some(("hair", 0));
            list(bench, &members);
            let expected = [("b", length as u64 - 1), ("hair", 1)];
            flood(
                bench,
                &format!("{length} of {all} ports"),
                &frame,
                &expected,
            );
            flood(
                bench,
                &format!("{length} of {all} ports, a question"),
                &question,
                &expected,
            );
        }
    });
}

#[test]
fn flags_decide_who_gets_a_copy() {
    let frame = plain(BROADCAST, mac("a"));
    // Flags of the sender; flags of the sender's own slot and of another; copies.
    let rows = [
        ("plain", 0, 0, 0, 0, 1),
        ("hairpinMode", PORT_HAIRPIN, PORT_HAIRPIN, 0, 1, 1),
        ("hairpinMode of the other", 0, 0, PORT_HAIRPIN, 0, 1),
        (
            "both isolated",
            PORT_ISOLATED,
            PORT_ISOLATED,
            PORT_ISOLATED,
            0,
            0,
        ),
        ("the sender isolated", PORT_ISOLATED, PORT_ISOLATED, 0, 0, 1),
        ("the other isolated", 0, 0, PORT_ISOLATED, 0, 1),
        ("both promiscuous", 16, 16, 16, 0, 1),
    ];
    with_bench(LogLevel::Off, |bench| {
        for (row, sender, own, other, back, copies) in rows {
            bench.set_port("a", |port| port.flags = sender);
            list(bench, &[Some(("a", own)), Some(("b", other))]);
            flood(bench, row, &frame, &[("a", back), ("b", copies)]);
        }
    });
}

#[test]
fn a_port_that_has_not_joined_gets_nothing() {
    let frame = plain(BROADCAST, mac("a"));
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        // Its slot is written before the list grows.
        for length in [0, 1, FLOOD_BATCH - 1, FLOOD_BATCH, FLOOD_BATCH + 1] {
            list(bench, &vec![Some(("b", 0)); length as usize]);
            let joining = Member {
                port: bench.index("hair"),
                flags: 0,
            };
            let slot = length;
            let key = MemberKey { segment, slot };
            set(&mut bench.datapath.members, "MEMBERS", key, joining, ANY).unwrap();
            let row = format!("{length} ports and one to come");
            flood(bench, &row, &frame, &[("b", length.into())]);
            remove(&mut bench.datapath.members, "MEMBERS", key).unwrap();
        }
    });
}

#[test]
fn a_device_that_is_gone_stops_nobody() {
    let frame = plain(BROADCAST, mac("a"));
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        list(
            bench,
            &[Some(("b", 0)), Some(("hair", 0)), Some(("spoof", 0))],
        );
        let gone = Member {
            port: 999_999,
            flags: 0,
        };
        let key = MemberKey { segment, slot: 1 };
        set(&mut bench.datapath.members, "MEMBERS", key, gone, ANY).unwrap();
        flood(
            bench,
            "a device that is gone",
            &frame,
            &[("b", 1), ("spoof", 1)],
        );
    });
}

#[test]
fn a_later_run_goes_on_and_does_not_count_again() {
    let frame = plain(BROADCAST, mac("a"));
    with_bench(LogLevel::Off, |bench| {
        list(
            bench,
            &[Some(("b", 0)), Some(("hair", 0)), Some(("spoof", 0))],
        );
        let run = bench.run_at("flood", "a", &frame, 2);
        assert_eq!(run.verdict, STOLEN);
        assert_eq!(run.copies, BTreeMap::from([("spoof".to_owned(), 1)]));
        assert_eq!(bench.counters(), BTreeMap::new());

        let run = bench.run_at("flood", "a", &frame, 0);
        assert_eq!(run.copies.len(), 3);
        let stats = PortStats {
            flooded: 1,
            ..PortStats::default()
        };
        assert_eq!(bench.counters(), BTreeMap::from([("a", stats)]));
        bench.reset();

        // Past the end, which is where a list that became shorter leads.
        for place in [3, 4, u32::MAX - 1, u32::MAX] {
            let run = bench.run_at("flood", "a", &frame, place);
            assert_eq!(
                (run.verdict, run.copies),
                (STOLEN, BTreeMap::new()),
                "{place}"
            );
            assert_eq!(bench.counters(), BTreeMap::new(), "{place}");
        }
    });
}

#[test]
fn without_a_segment_nothing_is_flooded() {
    let frame = plain(BROADCAST, mac("a"));
    with_bench(LogLevel::Off, |bench| {
        let segment = bench.segment;
        remove(&mut bench.datapath.segments, "SEGMENTS", segment).unwrap();
        let run = bench.run("port", "a", &frame);
        assert_eq!((run.verdict, run.copies), (SHOT, BTreeMap::new()));
        let mut stranger = PortStats::default();
        stranger.drops[NotAPort as usize] = 1;
        assert_eq!(bench.counters(), BTreeMap::from([("", stranger)]));
        bench.reset();

        let run = bench.run_at("flood", "stranger", &frame, 0);
        assert_eq!((run.verdict, run.copies), (SHOT, BTreeMap::new()));
        assert_eq!(bench.counters(), BTreeMap::from([("", stranger)]));
    });
}

#[test]
fn the_list_follows_the_ports() {
    let frame = plain(BROADCAST, mac("a"));
    with_bench(LogLevel::Off, |bench| {
        // From the middle, the end and the beginning.
        let (mut left, segment) = (
            vec!["gate", "b", "hair", "iso", "iso2", "spoof", "promisc"],
            bench.segment,
        );
        for gone in ["iso", "promisc", "b"] {
            left.retain(|name| *name != gone);
            let index = bench.index(gone);
            bench
                .datapath
                .remove_port(index, segment, mac(gone), &[])
                .unwrap();
            let expected: Vec<_> = left.iter().map(|name| (*name, 1)).collect();
            flood(bench, &format!("without {gone}"), &frame, &expected);
            let run = bench.run("port", gone, &frame);
            assert_eq!(run.verdict, SHOT, "{gone} is no port any more");
            bench.reset();
        }
        let run = bench.run("port", "a", &plain(mac("b"), mac("a")));
        assert_eq!(run.verdict, STOLEN, "its address is unknown");
    });
}

#[test]
fn a_departure_that_was_killed_is_finished_by_the_next() {
    let frame = plain(BROADCAST, mac("a"));
    let left = ["gate", "b", "hair", "iso2", "spoof", "promisc"].map(|name| (name, 1));
    // Each map that was not written any more, and those after it.
    for unwritten in ["PORTS", "SEGMENTS"] {
        with_bench(LogLevel::Off, |bench| {
            let segment = bench.segment;
            let gone = bench.index("iso");
            let slot = bench.datapath.port(gone).unwrap().unwrap().slot;
            let last = bench.datapath.segment(segment).unwrap().unwrap().members - 1;
            let at = |slot| MemberKey { segment, slot };
            let mover = get(&bench.datapath.members, "MEMBERS", at(last))
                .unwrap()
                .unwrap();
            assert!(slot < last && mover.port != gone);
            set(&mut bench.datapath.members, "MEMBERS", at(slot), mover, ANY).unwrap();
            if unwritten == "SEGMENTS" {
                let name = bench.name(mover.port);
                bench.set_port(name, |port| port.slot = slot);
            }
            bench
                .datapath
                .remove_port(gone, segment, mac("iso"), &[])
                .unwrap();
            flood(bench, unwritten, &frame, &left);
            let moved = bench.datapath.port(mover.port).unwrap().unwrap();
            assert_eq!(moved.slot, slot, "{unwritten}");
            assert!(
                bench.datapath.has_joined(mover.port).unwrap(),
                "{unwritten}"
            );
            let segment = bench.datapath.segment(segment).unwrap().unwrap();
            assert_eq!(segment.members, last, "{unwritten}");
        });
    }
}
