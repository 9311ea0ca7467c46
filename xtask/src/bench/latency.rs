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
    Settings,
    measurement::{Axis, Better, Contender, Measurement},
    node::{Arena, Recipe},
    run::{Found, Progress, Run, Step},
};

/// ADDs, and then DELs, that are made at once.
pub(super) const AT_ONCE: usize = 60;

/// Rounds before those that count.
const WARM_UP: usize = 2;

/// What a call takes that is counted for the progress bar, in ms.
const ESTIMATED_ROUND: u64 = 130;
const ESTIMATED_POD: u64 = 12;
const ESTIMATED_CROWD: u64 = 2500;

/// The only one.
pub(super) fn steps(settings: &Settings) -> Vec<Step> {
    vec![Step {
        name: "calls".to_owned(),
        estimate: estimate(settings),
    }]
}

/// Measures this part.
pub(super) fn measure(settings: &Settings, recipe: &Recipe, run: &mut Run) -> Result<()> {
    for step in steps(settings) {
        run.step(&step, |progress| all(settings, recipe, progress))?;
    }
    Ok(())
}

/// How long this part will take, in ms.
fn estimate(settings: &Settings) -> u64 {
    let levels = settings.levels.len() as u64;
    let rounds = (settings.calls + WARM_UP) as u64;
    let pods = settings.levels.last().copied().unwrap_or(0) as u64;
    let contenders = settings.contenders.len() as u64;
    levels * rounds * ESTIMATED_ROUND
        + pods * contenders * ESTIMATED_POD
        + settings.crowds as u64 * ESTIMATED_CROWD
}

/// Measures with more and more pods on the nodes.
fn all(settings: &Settings, recipe: &Recipe, progress: &Progress<'_>) -> Result<Found> {
    let mut arenas = Vec::new();
    for &contender in &settings.contenders {
        arenas.push(Arena::new(contender, recipe)?);
    }
    let mut found = Found::default();
    let (mut first, mut later) = (Vec::new(), Vec::new());
    for arena in &arenas {
        let sandbox = arena.node.sandbox("memory")?;
        for found in [&mut first, &mut later] {
            let most = arena.memory(&sandbox.attachment())?;
            found.extend(most.map(|most| (arena.contender, most)));
        }
    }
    found.facts = vec![
        super::megabytes("peak memory, first pod of a node", &first),
        super::megabytes("peak memory, later pods", &later),
    ];
    if settings.crowds > 0 {
        progress.say(format!("{AT_ONCE} calls at once"));
        found
            .measurements
            .extend(crowds(settings, &arenas, progress)?);
    }
    for &pods in &settings.levels {
        progress.say(format!("attaching {pods} pods"));
        fill(&mut arenas, pods, progress)?;
        progress.say(format!("ADD and DEL with {pods} pods"));
        found
            .measurements
            .extend(alone(settings, &arenas, pods, progress)?);
    }
    Ok(found)
}

/// All nodes at the same time: it takes long.
fn fill(arenas: &mut [Arena], pods: usize, progress: &Progress<'_>) -> Result<()> {
    thread::scope(|scope| {
        let fillers: Vec<_> = arenas
            .iter_mut()
            .map(|arena| {
                scope.spawn(move || {
                    let name = arena.contender.name();
                    arena
                        .fill(pods, |_| json!([]), || progress.advance(ESTIMATED_POD))
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
    progress: &Progress<'_>,
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
        progress.advance(ESTIMATED_ROUND);
    }
    let measurement = |verb: &str, costs: &dyn Fn(usize) -> Vec<f64>| {
        let values = lanes
            .iter()
            .enumerate()
            .map(|(lane, (arena, ..))| (arena.contender, costs(lane)))
            .collect();
        Measurement::new(format!("{verb}, {pods} pods"), "ms", Better::Lower, values)
            .additive()
            .at(&format!("{verb} alone"), Axis::Pods, pods)
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
fn crowds(
    settings: &Settings,
    arenas: &[Arena],
    progress: &Progress<'_>,
) -> Result<Vec<Measurement>> {
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
            progress.advance(ESTIMATED_CROWD);
        }
    }
    let measurement = |verb: &str, dels: bool| {
        let values = lanes
            .iter()
            .map(|lane| {
                (
                    lane.0.contender,
                    if dels { lane.3.clone() } else { lane.2.clone() },
                )
            })
            .collect();
        let name = format!("{AT_ONCE} {verb}s at once");
        Measurement::new(name, "ms", Better::Lower, values).additive()
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
