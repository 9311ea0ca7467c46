//! How long ADD, CHECK and DEL take, alone and many at a time, with few and with many pods
//! on the node; how much memory a call needs, and what it leaves in the kernel.
//!
//! Every pod that is measured has two addresses, is masqueraded and has one published port.
//! Calls may use all CPUs, as on a node.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{
    Settings,
    measurement::{Axis, Better, Contender, Fact, Measurement},
    memory,
    node::{Arena, Backend, Recipe, Slot, port_mapping},
    rules::Rules,
    run::{Found, Progress, Run, Step},
};

/// Callers that each make one call after another, so that so many are under way.
pub(super) const AT_ONCE: usize = 16;
/// How many calls each of them makes, on average: who is done takes the next.
const CALLS_EACH: usize = 2;
/// Calls that are all begun at once.
pub(super) const CROWD: usize = 60;

/// The ports of the pods that are measured begin here.
pub(super) const CALLED_PORTS: usize = 22_000;

/// How many rules stock has for a pod without ports, and for each port: for estimates.
pub(super) const RULES_OF_A_POD: usize = 10;
pub(super) const RULES_OF_A_PORT: usize = 5;

/// Rounds before those that count.
pub(super) const WARM_UP: usize = 1;

/// More pods than these are not attached where each would take a whole call of the stock
/// chain.
const POSSIBLE_PODS: usize = 100;

/// Values by contender.
type Samples = Vec<(Contender, Vec<f64>)>;

/// Who takes part: XDP and netfilter are no matter of calls.
pub(super) fn contenders(settings: &Settings) -> Vec<Contender> {
    let all = settings.contenders.iter().copied();
    all.filter(|contender| !matches!(contender, Contender::Xdp | Contender::NoNetfilter))
        .collect()
}

/// What is done, in its order.
enum Task {
    /// What one call needs, and what there is when it has ended.
    Memory,
    /// The first ADD of a node, so many times.
    First(usize),
    /// [`AT_ONCE`] callers, so many rounds.
    AtOnce(usize),
    /// [`CROWD`] calls, so many rounds.
    Crowd(usize),
    /// With so many pods, so many rounds.
    Alone(usize, usize),
}

impl Task {
    fn all(settings: &Settings) -> Vec<Self> {
        let mut tasks = vec![Self::Memory, Self::First(settings.first_calls)];
        tasks.push(Self::AtOnce(settings.calls_at_once));
        if settings.crowds > 0 {
            tasks.push(Self::Crowd(settings.crowds));
        }
        let levels = settings.calls.iter();
        tasks.extend(levels.map(|&(pods, rounds)| Self::Alone(pods, rounds)));
        tasks
    }

    fn step(&self, settings: &Settings) -> Step {
        let contenders = contenders(settings);
        let sum = |of: &dyn Fn(&Contender) -> u64| contenders.iter().map(of).sum::<u64>();
        let (name, estimate) = match *self {
            Self::Memory => ("memory of calls".to_owned(), sum(&making) + 1000),
            Self::First(rounds) => (
                "a node's first ADD".to_owned(),
                rounds as u64 * sum(&making),
            ),
            Self::AtOnce(rounds) => (
                format!("{AT_ONCE} calls at a time"),
                sum(&making) + rounds as u64 * sum(&|of| crowd_of(*of, AT_ONCE * CALLS_EACH)),
            ),
            Self::Crowd(rounds) => (
                format!("{CROWD} calls at once"),
                rounds as u64 * sum(&|of| crowd_of(*of, CROWD)),
            ),
            Self::Alone(pods, rounds) => {
                let below = settings.calls.iter().map(|level| level.0);
                let below = below.filter(|&level| level < pods).max().unwrap_or(0);
                let calls =
                    (WARM_UP + rounds) as u64 * sum(&|of| round(*of, pods * RULES_OF_A_POD));
                let filling = sum(&|of| (pods - below) as u64 * filling(*of, pods));
                (format!("calls, {pods} pods"), calls + filling)
            }
        };
        Step { name, estimate }
    }
}

/// How long it takes to make a node and to attach its first pod, in ms.
fn making(contender: &Contender) -> u64 {
    match contender {
        Contender::Floor => 100,
        Contender::Stock => 500,
        _ => 900,
    }
}

/// How long ADD, CHECK and DEL take of a contender, in ms, where stock has so many rules:
/// each of its calls of iptables reads all of them.
pub(super) fn round(contender: Contender, rules: usize) -> u64 {
    match contender {
        Contender::Floor => 25,
        Contender::Stock => 320 + rules as u64 / 20,
        _ => 40,
    }
}

/// How long it takes to attach one of `pods` pods.
fn filling(contender: Contender, pods: usize) -> u64 {
    match contender {
        Contender::Floor => 2,
        Contender::Stock => 12 + pods as u64 / 50,
        _ => 6,
    }
}

/// How long so many calls take at once, ADDs and then DELs.
fn crowd_of(contender: Contender, calls: usize) -> u64 {
    match contender {
        Contender::Floor => 0,
        Contender::Stock => 280 * calls as u64,
        _ => 5 * calls as u64,
    }
}

/// The steps of this part.
pub(super) fn steps(settings: &Settings) -> Vec<Step> {
    let tasks = Task::all(settings);
    tasks.iter().map(|task| task.step(settings)).collect()
}

/// Measures this part.
pub(super) fn measure(settings: &Settings, recipe: &Recipe, run: &mut Run) -> Result<()> {
    let mut nodes = Nodes::default();
    for task in Task::all(settings) {
        let step = task.step(settings);
        run.step(&step, |progress| match task {
            Task::Memory => facts(settings, recipe),
            Task::First(rounds) => firsts(settings, recipe, rounds),
            Task::AtOnce(rounds) => nodes.made(settings, recipe)?.at_once(rounds, progress),
            Task::Crowd(rounds) => nodes.made(settings, recipe)?.crowd(rounds, progress),
            Task::Alone(pods, rounds) => {
                let nodes = nodes.made(settings, recipe)?;
                nodes.alone(pods, rounds, progress)
            }
        })?;
    }
    Ok(())
}

/// The nodes of a run, with more and more pods on them.
#[derive(Default)]
struct Nodes {
    lanes: Vec<Lane>,
    notes: Vec<String>,
}

struct Lane {
    arena: Arena,
    slot: Slot,
    /// What stock's other pods have for rules.
    rules: Option<Rules>,
}

impl Nodes {
    /// Makes them, if nobody has; each has had a pod already.
    fn made(&mut self, settings: &Settings, recipe: &Recipe) -> Result<&mut Self> {
        if !self.lanes.is_empty() {
            return Ok(self);
        }
        for contender in contenders(settings) {
            let mut arena = Arena::new(contender, recipe)?;
            let slot = called(&arena, "called", 0)?;
            let added = arena.node.within(|| arena.attach_here(&slot))?;
            arena.node.within(|| arena.detach_here(&slot, &added))?;
            self.notes.extend(arena.try_checks()?);
            self.lanes.push(Lane {
                arena,
                slot,
                rules: None,
            });
        }
        Ok(self)
    }

    /// One call at a time, contender after contender, with so many pods on the nodes.
    fn alone(&mut self, pods: usize, rounds: usize, progress: &Progress<'_>) -> Result<Found> {
        let mut notes = self.notes.clone();
        progress.say(format!("attaching {pods} pods"));
        self.fill(pods, progress, &mut notes)?;
        progress.say(format!("ADD, CHECK and DEL with {pods} pods"));
        let lanes: Vec<_> = self
            .lanes
            .iter()
            .filter(|lane| lane.arena.filled() == pods)
            .map(|lane| (&lane.arena, &lane.slot))
            .collect();
        let times = take_turns(&lanes, rounds, |contender| {
            progress.advance(round(contender, pods * RULES_OF_A_POD));
        })?;
        let measurements = times.measurements(
            &plural(pods, "pod"),
            |verb| format!("{verb} alone"),
            Axis::Pods,
            pods,
        );
        Ok(Found {
            measurements,
            facts: Vec::new(),
            notes,
        })
    }

    /// All nodes at the same time: it takes long.
    fn fill(
        &mut self,
        pods: usize,
        progress: &Progress<'_>,
        notes: &mut Vec<String>,
    ) -> Result<()> {
        for lane in &mut self.lanes {
            if lane.arena.has_rules() && pods > lane.arena.filled() && lane.rules.is_none() {
                // One without ports, as the others will be.
                let slot = lane.arena.slot("copied", json!([]))?;
                let rules = Rules::learn(&lane.arena, &slot, 0, 0)?;
                lane.rules = Some(rules);
            }
        }
        let fill = |lane: &mut Lane| {
            let arena = &mut lane.arena;
            let each = filling(arena.contender, pods);
            match &lane.rules {
                Some(rules) => arena.fill_copying(pods, rules, || progress.advance(each)),
                None => arena.fill(pods, |_| json!([]), || progress.advance(each)),
            }
        };
        let possible = |lane: &&mut Lane| {
            !lane.arena.is_stock() || lane.arena.has_rules() || pods <= POSSIBLE_PODS
        };
        thread::scope(|scope| {
            let lanes = self.lanes.iter_mut().filter(possible);
            let fillers: Vec<_> = lanes
                .map(|lane| {
                    scope.spawn(|| {
                        let name = lane.arena.contender.name();
                        fill(lane).with_context(|| format!("filling the node of {name}"))
                    })
                })
                .collect();
            fillers.into_iter().try_for_each(|filler| {
                filler
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        if self.lanes.iter().any(|lane| lane.rules.is_some()) {
            notes.push(
                "Stock's other pods were attached by bridge and host-local; their rules are \
                 copies of those that the chain itself has written for a pod, written by \
                 iptables-restore."
                    .to_owned(),
            );
        }
        if self.lanes.iter().any(|lane| lane.arena.filled() < pods) {
            notes.push(format!(
                "Stock has no figures for {pods} pods: with {} it would take too long to \
                 attach them.",
                Backend::Nftables.name()
            ));
        }
        Ok(())
    }

    /// So many callers, none of which waits for another: how many calls a second.
    fn at_once(&self, rounds: usize, progress: &Progress<'_>) -> Result<Found> {
        let [adds, dels] = self.together(AT_ONCE * CALLS_EACH, AT_ONCE, rounds, progress)?;
        let measurement = |verb: &str, times: Samples| {
            let rate = |time: &f64| (AT_ONCE * CALLS_EACH) as f64 / time;
            let rates = times
                .iter()
                .map(|(contender, times)| (*contender, times.iter().map(rate).collect()))
                .collect();
            let name = format!("{verb}s, {AT_ONCE} at a time");
            Measurement::new(name, "1/s", Better::Higher, rates)
        };
        Ok(Found {
            measurements: vec![measurement("ADD", adds), measurement("DEL", dels)],
            ..Found::default()
        })
    }

    /// All at once: how long until the last has ended.
    fn crowd(&self, rounds: usize, progress: &Progress<'_>) -> Result<Found> {
        let [adds, dels] = self.together(CROWD, CROWD, rounds, progress)?;
        let measurement = |verb: &str, times: Samples| {
            let name = format!("{CROWD} {verb}s at once");
            Measurement::new(name, "s", Better::Lower, times)
        };
        Ok(Found {
            measurements: vec![measurement("ADD", adds), measurement("DEL", dels)],
            ..Found::default()
        })
    }

    /// So many ADDs and then as many DELs by so many callers: how long, in seconds.
    fn together(
        &self,
        calls: usize,
        callers: usize,
        rounds: usize,
        progress: &Progress<'_>,
    ) -> Result<[Samples; 2]> {
        let mut lanes = Vec::new();
        for Lane { arena, .. } in &self.lanes {
            // Netlink requests at once are one after the other: there is no floor.
            if arena.contender != Contender::Floor {
                let slots: Vec<Slot> = (0..calls)
                    .map(|number| called(arena, &format!("crowd{number}"), 1 + number))
                    .collect::<Result<_>>()?;
                lanes.push((arena, slots, Vec::new(), Vec::new()));
            }
        }
        let count = lanes.len();
        for round in 0..rounds {
            for turn in 0..count {
                let (arena, slots, adds, dels) = &mut lanes[(round + turn) % count];
                let (added, add) =
                    shared_out(arena, callers, slots, |slot, _| arena.attach_here(slot))?;
                let (_, del) = shared_out(arena, callers, slots, |slot, number| {
                    arena.detach_here(slot, &added[number])
                })?;
                adds.push(add.as_secs_f64());
                dels.push(del.as_secs_f64());
                progress.advance(crowd_of(arena.contender, calls));
            }
        }
        let (adds, dels) = lanes
            .into_iter()
            .map(|(arena, _, adds, dels)| ((arena.contender, adds), (arena.contender, dels)))
            .unzip();
        Ok([adds, dels])
    }
}

/// A sandbox whose calls are measured: it has one published port.
pub(super) fn called(arena: &Arena, name: &str, number: usize) -> Result<Slot> {
    let port = CALLED_PORTS + number;
    arena.slot(name, json!([port_mapping(port, port)]))
}

fn plural(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}

/// How long the calls took, in ms, by contender.
#[derive(Default)]
pub(super) struct Times {
    adds: Samples,
    checks: Samples,
    dels: Samples,
}

impl Times {
    /// As points of curves whose names `curve` tells by the verb.
    pub(super) fn measurements(
        self,
        on: &str,
        curve: impl Fn(&str) -> String,
        axis: Axis,
        at: usize,
    ) -> Vec<Measurement> {
        [
            ("ADD", self.adds),
            ("CHECK", self.checks),
            ("DEL", self.dels),
        ]
        .into_iter()
        .filter(|(_, values)| !values.is_empty())
        .map(|(verb, values)| {
            Measurement::new(format!("{verb}, {on}"), "ms", Better::Lower, values)
                .additive()
                .at(&curve(verb), axis, at)
        })
        .collect()
    }
}

/// ADD, CHECK and DEL, one call at a time, contender after contender.
pub(super) fn take_turns(
    lanes: &[(&Arena, &Slot)],
    rounds: usize,
    done: impl Fn(Contender),
) -> Result<Times> {
    let mut times = Times::default();
    let mut values: Vec<_> = lanes.iter().map(|_| [const { Vec::new() }; 3]).collect();
    for round in 0..WARM_UP + rounds {
        // Everyone goes first as often as the others.
        for turn in 0..lanes.len() {
            let at = (round + turn) % lanes.len();
            let (arena, slot) = lanes[at];
            let [add, check, del] = arena.node.within(|| {
                let added = arena.attach_here(slot)?;
                let check = if arena.checks() {
                    arena.check_here(slot, &added)?
                } else {
                    Duration::ZERO
                };
                Ok([added.time, check, arena.detach_here(slot, &added)?])
            })?;
            if round >= WARM_UP {
                for (values, time) in values[at].iter_mut().zip([add, check, del]) {
                    values.push(time.as_secs_f64() * 1e3);
                }
            }
            done(arena.contender);
        }
    }
    for ((arena, _), [adds, checks, dels]) in lanes.iter().zip(values) {
        times.adds.push((arena.contender, adds));
        times.dels.push((arena.contender, dels));
        if arena.checks() {
            times.checks.push((arena.contender, checks));
        }
    }
    Ok(times)
}

/// Lets so many callers call for all slots, each for the next one as soon as it is done;
/// returns what each call gave and the time from the first one's start to the last one's
/// end.
fn shared_out<T: Send>(
    arena: &Arena,
    callers: usize,
    slots: &[Slot],
    call: impl Fn(&Slot, usize) -> Result<T> + Sync,
) -> Result<(Vec<T>, Duration)> {
    let barrier = Barrier::new(callers);
    let next = AtomicUsize::new(0);
    let work = || {
        barrier.wait();
        arena.node.within(|| {
            let mut done = Vec::new();
            let start = Instant::now();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(slot) = slots.get(number) else {
                    return Ok((done, start, Instant::now()));
                };
                done.push((number, call(slot, number)?));
            }
        })
    };
    let (mut values, mut first, mut last) = (Vec::new(), None, None);
    thread::scope(|scope| {
        let callers: Vec<_> = (0..callers).map(|_| scope.spawn(work)).collect();
        for caller in callers {
            let (done, start, end) = caller
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            values.extend(done);
            first = first.min(Some(start)).or(Some(start));
            last = last.max(Some(end));
        }
        anyhow::Ok(())
    })?;
    let (first, last) = first.zip(last).context("nobody called")?;
    values.sort_unstable_by_key(|(number, _)| *number);
    let values = values.into_iter().map(|(_, value)| value).collect();
    Ok((values, last - first))
}

/// The first ADD of a node: programs are loaded, chains made.
fn firsts(settings: &Settings, recipe: &Recipe, rounds: usize) -> Result<Found> {
    let mut values: Samples = contenders(settings)
        .into_iter()
        .filter(|contender| *contender != Contender::Floor)
        .map(|contender| (contender, Vec::new()))
        .collect();
    for _ in 0..rounds {
        for (contender, values) in &mut values {
            let arena = Arena::new(*contender, recipe)?;
            let slot = called(&arena, "first", 0)?;
            let added = arena.node.within(|| arena.attach_here(&slot))?;
            values.push(added.time.as_secs_f64() * 1e3);
        }
    }
    let measurement = Measurement::new("ADD, a node's first", "ms", Better::Lower, values);
    Ok(Found {
        measurements: vec![measurement.additive()],
        ..Found::default()
    })
}

/// What is not sampled: memory, sizes, numbers.
fn facts(settings: &Settings, recipe: &Recipe) -> Result<Found> {
    let (mut first, mut later, mut published) = (Vec::new(), Vec::new(), Vec::new());
    let (mut sizes, mut facts) = (Vec::new(), Vec::new());
    for contender in contenders(settings) {
        let arena = Arena::new(contender, recipe)?;
        let plain = arena.slot("memory", json!([]))?;
        let with_port = called(&arena, "published", 0)?;
        for (found, slot) in [
            (&mut first, &plain),
            (&mut later, &plain),
            (&mut published, &with_port),
        ] {
            let most = arena.memory(&slot.attachment)?;
            found.extend(most.map(|most| (contender, most)));
        }
        let size = recipe.binaries(contender)?;
        sizes.extend(size.map(|size| (contender, size)));
        if arena.has_rules() {
            let rules = Rules::learn(&arena, &with_port, CALLED_PORTS, 1)?;
            facts.push(Fact {
                name: "iptables rules of a pod with one port".to_owned(),
                unit: "rules".to_owned(),
                values: vec![(contender, rules.count() as f64)],
            });
        }
        if contender == Contender::BpfBridge {
            facts.extend(in_kernel(recipe)?);
        }
    }
    facts.splice(
        0..0,
        [
            super::megabytes("peak memory, a node's first call", &first),
            super::megabytes("peak memory, later calls", &later),
            super::megabytes("peak memory, a node's first port", &published),
            super::megabytes("size of the binaries", &sizes),
        ],
    );
    Ok(Found {
        facts,
        ..Found::default()
    })
}

/// What bpf-bridge has in the kernel, before and after the first published port.
fn in_kernel(recipe: &Recipe) -> Result<Vec<Fact>> {
    let arena = Arena::new(Contender::BpfBridge, recipe)?;
    let plain = arena.slot("plain", json!([]))?;
    let with_port = called(&arena, "published", 0)?;
    let mut facts = Vec::new();
    let kernel = |slot: &Slot| {
        arena.node.within(|| {
            arena.attach_here(slot)?;
            memory::pinned()
        })
    };
    let name = "kernel memory";
    facts.extend(kernel(&plain)?.sums(&format!("{name}, one pod")));
    let found = kernel(&with_port)?;
    facts.extend(found.sums(&format!("{name}, a published port")));
    facts.extend(found.tables(name));
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{super::Arguments, *};

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn settings(arguments: &[&str]) -> Settings {
        let line = CommandLine::parse_from([&["bench"], arguments].concat());
        Settings::new(&line.arguments).unwrap()
    }

    #[test]
    fn calls_and_ports_are_done_in_their_time() {
        for (arguments, seconds) in [(&["--quick"][..], 45), (&[], 300)] {
            let settings = settings(arguments);
            let steps = [steps(&settings), super::super::ports::steps(&settings)].concat();
            let sum: u64 = steps.iter().map(|step| step.estimate).sum();
            assert!(sum <= seconds * 1000, "{sum} ms: {steps:?}");
            // By its name a step is known again.
            let names: std::collections::BTreeSet<_> =
                steps.iter().map(|step| &step.name).collect();
            assert_eq!(names.len(), steps.len());
        }
    }

    #[test]
    fn only_those_take_part_whose_calls_differ() {
        let settings = settings(&["--only", "xdp,stock,no-netfilter,floor"]);
        assert_eq!(contenders(&settings), [Contender::Stock, Contender::Floor]);
    }
}
