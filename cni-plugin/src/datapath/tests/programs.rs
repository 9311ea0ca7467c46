//! What the verifier says of the programs, and what their log says.

use std::sync::Mutex;

use aya::programs::SchedClassifier;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};

use super::{
    super::{LogLevel, object},
    bench::{Bench, SHOT, mac, v4, with_bench},
    frames::{plain, who_has},
};
use crate::node::Limits;

/// How many instructions the verifier may have to look at: up to twice what the
/// programs need on Linux 6.18. The time that the first ADD of a boot takes grows
/// with it, and the verifier's own limit is a million.
const BUDGET: [(&str, u32); 4] = [
    ("port", 2_500),
    ("guard", 16_000),
    ("responder", 6_000),
    ("flood", 60_000),
];

fn program<'a>(bench: &'a Bench, name: &str) -> &'a SchedClassifier {
    bench.ebpf.program(name).unwrap().try_into().unwrap()
}

#[test]
fn the_verifier_has_little_to_do() {
    let names: Vec<_> = object::PROGRAMS.iter().map(|(name, _)| *name).collect();
    with_bench(LogLevel::Off, |bench| {
        assert_eq!(names.len(), BUDGET.len());
        for (name, limit) in BUDGET {
            assert!(names.contains(&name), "{name}");
            let info = program(bench, name).info().unwrap();
            // Linux 5.16 and newer tell.
            let Some(count) = info.verified_instruction_count() else {
                continue;
            };
            println!("{name}: {count} instructions verified, at most {limit}");
            assert!(count > 0 && count <= limit, "{name}: {count} instructions");
        }
    });
}

/// The same for the programs that translate.
const NAT_BUDGET: [(&str, u32); 8] = [
    ("uplink", 300_000),
    ("uplink_l3", 300_000),
    ("egress", 400_000),
    ("egress_l3", 400_000),
    ("from_pod", 300_000),
    ("from_host", 300_000),
    ("between", 300_000),
    ("forward", 300_000),
];

#[test]
fn the_verifier_has_not_too_much_to_do() {
    let mut ebpf = object::loader(&Limits::default())
        .load(object::NAT)
        .unwrap();
    let mut failed = Vec::new();
    for (name, limit) in NAT_BUDGET {
        match object::load_program(&mut ebpf, name) {
            Ok(program) => {
                let Some(count) = program.info().unwrap().verified_instruction_count() else {
                    continue;
                };
                println!("{name}: {count} instructions verified, at most {limit}");
                if count > limit {
                    failed.push(format!("{name}: {count} instructions"));
                }
            }
            Err(error) => {
                let error = error.to_string();
                let end: Vec<_> = error.lines().rev().take(16).collect();
                failed.push(format!("{name}: {end:?}"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
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
