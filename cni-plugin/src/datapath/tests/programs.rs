//! What the verifier says of the programs, and what their log says.

use std::{collections::BTreeMap, env, fs, sync::Mutex};

use aya::programs::{Program, SchedClassifier};
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};
use nix::sys::utsname::uname;
use serde_json::json;

use super::{
    super::{LogLevel, object},
    bench::{Bench, SHOT, mac, v4, with_bench},
    frames::{plain, who_has},
};
use crate::node::Limits;

fn program<'a>(bench: &'a Bench, name: &str) -> &'a SchedClassifier {
    bench.ebpf.program(name).unwrap().try_into().unwrap()
}

/// How many instructions the verifier has to look at, by program. The time that the first
/// ADD of a boot takes grows with it, and the verifier's own limit is a million.
type Counts = BTreeMap<String, u32>;

/// What that was, by kernel, when `cargo xtask record` was run last.
const RECORD: &str = include_str!("../../../../ebpf/verified.json");
/// Says where that command wants to have what is found, instead of the comparison.
const RECORD_VARIABLE: &str = "BPF_BRIDGE_RECORD";

#[test]
fn the_verifier_looks_at_no_more_than_was_recorded() {
    let found = counts();
    let kernel = uname().unwrap().release().to_str().unwrap().to_owned();
    let mut numbers = kernel.split('.');
    let version = format!("{}.{}", numbers.next().unwrap(), numbers.next().unwrap());
    println!("Linux {version}: {found:#?}");
    if let Some(path) = env::var_os(RECORD_VARIABLE) {
        fs::write(path, json!({version: found}).to_string()).unwrap();
        return;
    }
    let record: BTreeMap<String, Counts> = serde_json::from_str(RECORD).unwrap();
    // Elsewhere it is enough that the programs are taken.
    if let Some(recorded) = record.get(&version) {
        let wrong = differences(recorded, &found);
        assert!(
            wrong.is_empty(),
            "{wrong:#?}; if that is as it should be: `cargo xtask record`"
        );
    }
}

/// Loads every program.
fn counts() -> Counts {
    let mut counts = Counts::new();
    for object in [object::OBJECT, object::NAT] {
        let mut ebpf = object::loader(&Limits::default())
            .unwrap()
            .override_global("AYA_LOG_LEVEL", &LogLevel::Off.number(), false)
            .load(object)
            .unwrap();
        for (name, program) in ebpf.programs_mut() {
            let loaded = object::uninterrupted(name, || match program {
                Program::SchedClassifier(program) => program.load(),
                Program::CgroupSockAddr(program) => program.load(),
                Program::Xdp(program) => program.load(),
                _ => panic!("{name} is of no kind that is known here"),
            });
            // The end of what the verifier writes says why.
            loaded.unwrap_or_else(|error| {
                let error = error.to_string();
                let end: Vec<_> = error.lines().rev().take(16).collect();
                panic!("{name}: {end:#?}")
            });
            let info = program.info().unwrap();
            // Linux 5.16 and newer tell.
            counts.extend(
                info.verified_instruction_count()
                    .map(|count| (name.to_owned(), count)),
            );
        }
    }
    counts
}

/// Programs that need a tenth more than was recorded, or of which nothing was recorded; and
/// what was recorded of programs that are no more.
fn differences(recorded: &Counts, found: &Counts) -> Vec<String> {
    let grown = found
        .iter()
        .filter_map(|(name, &count)| match recorded.get(name) {
            Some(&before) if u64::from(count) * 10 < u64::from(before) * 11 => None,
            Some(before) => Some(format!("{name}: {count} instructions, {before} before")),
            None => Some(format!("{name}: {count} instructions, not recorded")),
        });
    let gone = recorded
        .keys()
        .filter(|name| !found.contains_key(*name))
        .map(|name| format!("{name}: recorded, but not there"));
    grown.chain(gone).collect()
}

#[test]
fn growth_by_a_tenth_is_seen() {
    let counts = |counts: &[(&str, u32)]| -> Counts {
        counts
            .iter()
            .map(|&(name, count)| (name.to_owned(), count))
            .collect()
    };
    let recorded = counts(&[("a", 1000), ("b", 500_000)]);
    for (found, wrong) in [
        (counts(&[("a", 1000), ("b", 500_000)]), [].as_slice()),
        (counts(&[("a", 10), ("b", 549_999)]), &[]),
        (
            counts(&[("a", 1100), ("b", 500_000)]),
            &["a: 1100 instructions, 1000 before"],
        ),
        (
            counts(&[("b", 550_000), ("c", 1)]),
            &[
                "b: 550000 instructions, 500000 before",
                "c: 1 instructions, not recorded",
                "a: recorded, but not there",
            ],
        ),
    ] {
        assert_eq!(differences(&recorded, &found), wrong);
    }
}

#[test]
fn a_log_that_is_off_is_no_code() {
    let sizes = |level| {
        let mut sizes = Vec::new();
        with_bench(level, |bench| {
            for name in ["port", "guard", "responder"] {
                let info = program(bench, name).info().unwrap();
                sizes.push((name, info.size_translated().unwrap(), info.size_jitted()));
            }
        });
        sizes
    };
    let (off, trace) = (sizes(LogLevel::Off), sizes(LogLevel::Trace));
    for (off, trace) in off.into_iter().zip(trace) {
        println!("{}: {off:?} off, {trace:?} at trace", off.0);
        assert!(
            off.1 < trace.1,
            "{}: {} and {} bytes",
            off.0,
            off.1,
            trace.1
        );
        assert!(off.2 < trace.2 || trace.2 == 0, "{}: jited", off.0);
    }
}

/// Keeps what is logged.
#[derive(Default)]
struct Kept(Mutex<Vec<(Level, String)>>);

impl Log for &Kept {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = (record.level(), record.args().to_string());
        self.0.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

#[test]
fn the_log_tells_what_its_level_promises() {
    let rows: [(LogLevel, &[Level]); 3] = [
        (LogLevel::Off, &[]),
        (LogLevel::Debug, &[Level::Debug]),
        (LogLevel::Trace, &[Level::Debug, Level::Trace]),
    ];
    for (level, told) in rows {
        with_bench(level, |bench| {
            let kept = Kept::default();
            let mut logger = EbpfLogger::init_with_logger(&mut bench.ebpf, &kept).unwrap();

            let a = bench.index("a");
            let dropped = bench.run("port", "a", &plain(mac("a"), mac("a")));
            assert_eq!(dropped.verdict, SHOT);
            bench.run("port", "a", &plain(mac("b"), mac("a")));
            bench.run("port", "a", &who_has((mac("a"), v4("a")), v4("b")));
            logger.flush();

            let mut expected = vec![
                (Level::Debug, format!("port {a}: drop, reason 5")),
                (Level::Trace, format!("port {a}: verdict 7")),
                (
                    Level::Trace,
                    format!("port {a}: answered a neighbour request"),
                ),
            ];
            expected.retain(|(level, _)| told.contains(level));
            assert_eq!(*kept.0.lock().unwrap(), expected, "{level:?}");
        });
    }
}
