//! How long ADD and DEL take, alone and many at once, and how much memory.

use std::{
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::Sandbox;
use serde_json::json;

use super::{
    Plan, Settings,
    measurement::{Better, Contender, Measurement},
    node::{Arena, Chain, Recipe},
};

/// ADDs, and then DELs, that are made at once.
pub(super) const AT_ONCE: usize = 60;

/// Rounds before those that count.
const WARM_UP: usize = 2;

/// What a call takes that is counted for the progress bar, in ms.
const ESTIMATED_ROUND: u64 = 130;
const ESTIMATED_POD: u64 = 12;
const ESTIMATED_CROWD: u64 = 2500;

/// How long this part will take, in ms.
pub(super) fn estimate(settings: &Settings) -> u64 {
    let levels = settings.levels.len() as u64;
    let rounds = (settings.calls + WARM_UP) as u64;
    let pods = settings.levels.last().copied().unwrap_or(0) as u64;
    let contenders = settings.contenders.len() as u64;
    levels * rounds * ESTIMATED_ROUND
        + pods * contenders * ESTIMATED_POD
        + settings.crowds as u64 * ESTIMATED_CROWD
}

/// The results of this part.
pub(super) struct Latency {
    pub(super) measurements: Vec<Measurement>,
    /// The most memory that a call had resident, in bytes: of the first pod of a
    /// node, whose ADD has more to do, and of a later one.
    pub(super) first_memory: Vec<(Contender, u64)>,
    pub(super) memory: Vec<(Contender, u64)>,
}

/// Measures with more and more pods on the nodes.
pub(super) fn measure(settings: &Settings, recipe: &Recipe, plan: &Plan) -> Result<Latency> {
    let mut arenas = Vec::new();
    for &contender in &settings.contenders {
        arenas.push(Arena::new(contender, recipe, Chain::Plain)?);
    }
    let mut found = Latency {
        measurements: Vec::new(),
        first_memory: Vec::new(),
        memory: Vec::new(),
    };
    for arena in &arenas {
        let sandbox = arena.node.sandbox("memory")?;
        for found in [&mut found.first_memory, &mut found.memory] {
            let most = arena.memory(&sandbox.attachment())?;
            found.extend(most.map(|most| (arena.contender, most)));
        }
    }
    if settings.crowds > 0 {
        plan.say(format!("{AT_ONCE} calls at once"));
        found.measurements.extend(crowds(settings, &arenas, plan)?);
    }
    for &pods in &settings.levels {
        plan.say(format!("attaching {pods} pods"));
        fill(&mut arenas, pods, plan)?;
        plan.say(format!("ADD and DEL with {pods} pods"));
        found
            .measurements
            .extend(alone(settings, &arenas, pods, plan)?);
    }
    Ok(found)
}

/// All nodes at the same time: it takes long.
fn fill(arenas: &mut [Arena], pods: usize, plan: &Plan) -> Result<()> {
    thread::scope(|scope| {
        let fillers: Vec<_> = arenas
            .iter_mut()
            .map(|arena| {
                scope.spawn(move || {
                    let name = arena.contender.name();
                    arena
                        .fill(pods, |_| json!([]), || plan.advance(ESTIMATED_POD))
                        .with_context(|| format!("filling the node of {name}"))
                })
            })
            .collect();
        fillers.into_iter().try_for_each(|filler| {
            filler
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// One call at a time, contender after contender.
fn alone(
    settings: &Settings,
    arenas: &[Arena],
    pods: usize,
    plan: &Plan,
) -> Result<Vec<Measurement>> {
    // One sandbox serves all rounds: making and removing namespaces would go on
    // in the background while the next call is measured.
    let mut lanes = Vec::new();
    for arena in arenas {
        let sandbox = arena.node.sandbox(&format!("pod{pods}"))?;
        lanes.push((arena, sandbox, Vec::new(), Vec::new()));
    }
    let count = lanes.len();
    for round in 0..WARM_UP + settings.calls {
        // Everyone goes first as often as the others.
        for turn in 0..count {
            let (arena, sandbox, adds, dels) = &mut lanes[(round + turn) % count];
            let added = arena.add(sandbox)?;
            let deleted = arena.del(sandbox, &added)?;
            if round >= WARM_UP {
                adds.push(added.time);
                dels.push(deleted);
            }
        }
        plan.advance(ESTIMATED_ROUND);
    }
    let measurement = |verb: &str, costs: &dyn Fn(usize) -> Vec<f64>| Measurement {
        name: format!("{verb}, {pods} pods"),
        unit: "ms",
        better: Better::Lower,
        additive: true,
        values: lanes
            .iter()
            .enumerate()
            .map(|(lane, (arena, ..))| (arena.contender, costs(lane)))
            .collect(),
    };
    Ok(vec![
        measurement("ADD", &|lane| milliseconds(&lanes[lane].2)),
        measurement("DEL", &|lane| milliseconds(&lanes[lane].3)),
    ])
}

fn milliseconds(times: &[Duration]) -> Vec<f64> {
    times.iter().map(|time| time.as_secs_f64() * 1e3).collect()
}

/// Many calls at once: how long until the last has ended.
fn crowds(settings: &Settings, arenas: &[Arena], plan: &Plan) -> Result<Vec<Measurement>> {
    let mut lanes = Vec::new();
    for arena in arenas {
        // Netlink requests at once are one after the other: there is no floor.
        if arena.contender != Contender::Floor {
            let sandboxes: Vec<Sandbox> = (0..AT_ONCE)
                .map(|number| arena.node.sandbox(&format!("crowd{number}")))
                .collect::<Result<_>>()?;
            lanes.push((arena, sandboxes, Vec::new(), Vec::new()));
        }
    }
    let count = lanes.len();
    for round in 0..=settings.crowds {
        for turn in 0..count {
            let (arena, sandboxes, adds, dels) = &mut lanes[(round + turn) % count];
            let (added, add) = at_once(arena, sandboxes, |sandbox, _| {
                arena.add_here(&sandbox.attachment())
            })?;
            let (_, del) = at_once(arena, sandboxes, |sandbox, number| {
                arena.del_here(&sandbox.attachment(), &added[number])
            })?;
            // The first one warms up.
            if round > 0 {
                adds.push(add);
                dels.push(del);
            }
        }
        if round > 0 {
            plan.advance(ESTIMATED_CROWD);
        }
    }
    let measurement = |verb: &str, dels: bool| Measurement {
        name: format!("{AT_ONCE} {verb}s at once"),
        unit: "ms",
        better: Better::Lower,
        additive: true,
        values: lanes
            .iter()
            .map(|lane| {
                (
                    lane.0.contender,
                    if dels { lane.3.clone() } else { lane.2.clone() },
                )
            })
            .collect(),
    };
    Ok(vec![measurement("ADD", false), measurement("DEL", true)])
}

/// Runs `call` for every sandbox at once; returns what each gave and the time in
/// ms from the start of the first to the end of the last.
fn at_once<T: Send>(
    arena: &Arena,
    sandboxes: &[Sandbox],
    call: impl Fn(&Sandbox, usize) -> Result<T> + Sync,
) -> Result<(Vec<T>, f64)> {
    let barrier = Barrier::new(sandboxes.len());
    let spans: Vec<(T, Instant, Instant)> = thread::scope(|scope| {
        let callers: Vec<_> = sandboxes
            .iter()
            .enumerate()
            .map(|(number, sandbox)| {
                let (barrier, call) = (&barrier, &call);
                scope.spawn(move || {
                    barrier.wait();
                    arena.node.within(|| {
                        let start = Instant::now();
                        let value = call(sandbox, number)?;
                        Ok((value, start, Instant::now()))
                    })
                })
            })
            .collect();
        callers
            .into_iter()
            .map(|caller| {
                caller
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect::<Result<_>>()
    })?;
    let first = spans.iter().map(|span| span.1).min();
    let last = spans.iter().map(|span| span.2).max();
    let (Some(first), Some(last)) = (first, last) else {
        anyhow::bail!("nobody called");
    };
    let values = spans.into_iter().map(|span| span.0).collect();
    Ok((values, (last - first).as_secs_f64() * 1e3))
}
