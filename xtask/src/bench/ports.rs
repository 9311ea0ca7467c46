//! Published ports: what a connection through one costs, and what publishing
//! costs, with few and with many ports on the node.
//!
//! A machine outside connects to the node's address. It, and the pod that has
//! the port, run on the CPU that all traffic of the bench runs on.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::{Outside, Sandbox};
use serde_json::{Value, json};

use super::{
    Settings,
    calls::{self, CALLED_PORTS, take_turns},
    measurement::{Axis, Better, Contender, Measurement},
    node::{Added, Arena, PORT_MAPPINGS, Recipe, Slot, port_mapping},
    peer::{Connector, Ends, Flow},
    rules::{Pod, Rules},
    run::{Found, Progress, Run, Step},
    traffic::{CONNECT, TCP_RR, WARM_UP},
};

/// The port that is measured, on the node and in the pod.
const HOST_PORT: u16 = 8080;
const CONTAINER_PORT: u16 = 80;
/// Where the others begin.
const OTHER_PORTS: usize = 10_000;
/// How many of the others a pod has where rules cannot be written without pods: to
/// bpf-bridge each is an entry of one hash map, whoever has it.
const PORTS_OF_A_POD: usize = 100;

/// A number of ports on the node, and how many of them a pod has.
#[derive(Clone, Copy, Debug)]
struct Level {
    ports: usize,
    of_a_pod: usize,
    /// For this one nodes must be made.
    first: bool,
}

impl Level {
    /// By the nodes on which they are reached one after another.
    fn all(settings: &Settings) -> Vec<Vec<Self>> {
        let groups = settings.ports.iter();
        groups
            .map(|(of_a_pod, levels)| {
                let level = |(number, &ports)| Self {
                    ports,
                    of_a_pod: *of_a_pod,
                    first: number == 0,
                };
                levels.iter().enumerate().map(level).collect()
            })
            .collect()
    }

    /// How many ports other pods than the measured one have: all of them as many.
    fn others(self) -> usize {
        (self.ports - 1).next_multiple_of(self.of_a_pod)
    }

    /// How many rules stock has for them, for estimates.
    fn rules(self) -> usize {
        let pods = self.ports / self.of_a_pod;
        pods * calls::RULES_OF_A_POD + self.ports * calls::RULES_OF_A_PORT
    }

    /// As in "1000 ports, 1 a pod".
    fn name(self) -> String {
        match self {
            Self { ports: 1, .. } => "1 port".to_owned(),
            Self {
                ports, of_a_pod, ..
            } => format!("{ports} ports, {of_a_pod} a pod"),
        }
    }

    /// The name of a curve that goes through this level.
    fn curve(self, what: &str) -> String {
        match self.of_a_pod {
            1 => format!("{what}, published ports"),
            of_a_pod => format!("{what}, published ports, {of_a_pod} a pod"),
        }
    }

    fn step(self, settings: &Settings) -> Step {
        let calls = calls::contenders(settings);
        let round: u64 = calls
            .iter()
            .map(|&contender| calls::round(contender, self.rules()))
            .sum();
        let rounds = (calls::WARM_UP + settings.port_calls) as u64;
        let nodes: u64 = contenders(settings)
            .map(|contender| making(contender, self))
            .sum();
        Step {
            name: format!("published ports, {}", self.name()),
            estimate: nodes + (2 * settings.port_rounds) as u64 * turns(settings) + rounds * round,
        }
    }
}

/// How long it takes to make a node, and to publish what is missing, in ms.
fn making(contender: Contender, level: Level) -> u64 {
    let (ports, first) = (level.ports as u64, u64::from(level.first));
    match contender {
        Contender::Floor => first * 300,
        // A pod with as many ports is attached and detached, to see its rules.
        Contender::Stock => first * (1500 + 40 * level.of_a_pod as u64) + 400 + ports / 5,
        _ => first * 1000 + 50 + ports / 15,
    }
}

/// How long all contenders' turns take.
fn turns(settings: &Settings) -> u64 {
    let slice = settings.port_slice + settings.port_slice / WARM_UP + CONNECT;
    let slice = u64::try_from(slice.as_millis()).unwrap_or(u64::MAX);
    slice * contenders(settings).count() as u64
}

/// Packets come from outside, and none leave: all but one take part.
fn contenders(settings: &Settings) -> impl Iterator<Item = Contender> {
    let all = settings.contenders.iter().copied();
    all.filter(|contender| *contender != Contender::NoNetfilter)
}

/// One for each level.
pub(super) fn steps(settings: &Settings) -> Vec<Step> {
    let levels = Level::all(settings).into_iter().flatten();
    levels.map(|level| level.step(settings)).collect()
}

/// Measures this part.
pub(super) fn measure(settings: &Settings, recipe: &Recipe, run: &mut Run) -> Result<()> {
    for levels in Level::all(settings) {
        let mut lanes = Vec::new();
        for level in levels {
            run.step(&level.step(settings), |progress| {
                if lanes.is_empty() {
                    progress.say("making nodes".to_owned());
                    for contender in contenders(settings) {
                        lanes.push(Lane::new(contender, recipe, level.of_a_pod)?);
                    }
                }
                with(settings, &mut lanes, level, progress)
            })?;
        }
    }
    Ok(())
}

/// The node of a contender, the machine outside, and the pod that it asks.
struct Lane {
    arena: Arena,
    outside: Outside,
    pod: Sandbox,
    address: IpAddr,
    published: Option<Added>,
    /// A sandbox for the calls that are measured.
    caller: Slot,
    /// How many ports other pods have.
    others: usize,
    /// What stock's have for rules.
    rules: Option<Rules>,
    notes: Vec<String>,
}

/// Measures with so many ports on the nodes.
fn with(
    settings: &Settings,
    lanes: &mut [Lane],
    level: Level,
    progress: &Progress<'_>,
) -> Result<Found> {
    let on = level.name();
    progress.say(format!("publishing {on}"));
    for lane in &mut *lanes {
        lane.publish(level).with_context(|| lane.whose(&on))?;
        progress.advance(making(lane.arena.contender, level));
    }
    let mut measurements = traffic(settings, lanes, level, progress)?;
    progress.say(format!("ADD, CHECK and DEL beside {on}"));
    let callers: Vec<_> = lanes
        .iter()
        .filter(|lane| lane.arena.contender != Contender::Xdp)
        .map(|lane| (&lane.arena, &lane.caller))
        .collect();
    let times = take_turns(&callers, settings.port_calls, |contender| {
        progress.advance(calls::round(contender, level.rules()));
    })?;
    measurements.extend(times.measurements(
        &format!("beside {on}"),
        |verb| level.curve(verb),
        Axis::Ports,
        level.ports,
    ));
    let mut notes = vec![
        "Ports: a machine outside connects to the node; the pod that has the port was added \
         last. Numbers are those of the ports beside it, rounded up to whole pods."
            .to_owned(),
    ];
    for lane in &*lanes {
        notes.extend(lane.notes.iter().cloned());
        notes.extend(lane.note());
    }
    Ok(Found {
        measurements,
        facts: Vec::new(),
        notes,
    })
}

impl Lane {
    fn new(contender: Contender, recipe: &Recipe, of_a_pod: usize) -> Result<Self> {
        let mut arena = Arena::new(contender, recipe)?;
        // Before the first ADD, as it is on a node.
        let outside = arena.node.outside()?;
        let pod = arena.node.sandbox("published")?;
        let caller = calls::called(&arena, "caller", 0)?;
        let notes = arena.try_checks()?;
        let rules = if arena.has_rules() {
            let ports = mappings(CALLED_PORTS..CALLED_PORTS + of_a_pod);
            let slot = arena.slot("copied", ports)?;
            Some(Rules::learn(&arena, &slot, CALLED_PORTS, of_a_pod)?)
        } else {
            None
        };
        let lane = Self {
            arena,
            outside,
            pod,
            address: Ipv4Addr::new(10, 77, 0, 3).into(),
            published: None,
            caller,
            others: 0,
            rules,
            notes,
        };
        if contender == Contender::Floor {
            lane.outside
                .run("ip link add pod type veth peer name eth0 netns published")?;
            lane.outside
                .ip("addr add 10.77.0.2/16 dev pod\nlink set pod up")?;
            lane.pod
                .ip("addr add 10.77.0.3/16 dev eth0\nlink set eth0 up")?;
        }
        Ok(lane)
    }

    /// Publishes ports until there are as many, the last of them the one that is
    /// measured.
    fn publish(&mut self, level: Level) -> Result<()> {
        if self.arena.contender == Contender::Floor {
            return Ok(());
        }
        let port = json!([port_mapping(HOST_PORT.into(), CONTAINER_PORT.into())]);
        let attachment = self.pod.attachment().capability(PORT_MAPPINGS, port);
        let arena = &self.arena;
        if let Some(published) = self.published.take() {
            arena
                .node
                .within(|| arena.del_here(&attachment, &published))?;
        }
        let more = self.others..level.others();
        self.others = more.end;
        if let Some(rules) = &self.rules {
            let pods: Vec<_> = more.step_by(level.of_a_pod).map(imagined).collect();
            rules.write(&arena.node, &pods)?;
        } else {
            let filled = self.arena.filled();
            let pods = filled + more.len().div_ceil(PORTS_OF_A_POD);
            let ports = |pod: usize| {
                let start = more.start + (pod - filled) * PORTS_OF_A_POD;
                let end = more.end.min(start + PORTS_OF_A_POD);
                mappings(OTHER_PORTS + start..OTHER_PORTS + end)
            };
            self.arena.fill(pods, ports, || {})?;
        }
        let arena = &self.arena;
        let added = arena.node.within(|| arena.add_here(&attachment))?;
        self.address = added.v4("address")?;
        self.published = Some(added);
        Ok(())
    }

    /// How the other ports came to be.
    fn note(&self) -> Option<String> {
        match (self.arena.contender, &self.rules) {
            (Contender::Floor, _) => None,
            (_, Some(_)) => Some(
                "Stock's other ports are copies of all rules that the chain itself has written \
                 for a pod, written by iptables-restore, for addresses without a pod: its ADDs \
                 would take hours. The port that is measured is its own."
                    .to_owned(),
            ),
            (contender, None) => Some(format!(
                "Other ports of {} were published by ADDs of pods with {PORTS_OF_A_POD} each.",
                contender.name()
            )),
        }
    }

    fn ends(&self, cpu: usize) -> Ends<'_> {
        Ends {
            from: &self.outside,
            to: &self.pod,
            listen: (self.address, CONTAINER_PORT).into(),
            through: (self.arena.contender != Contender::Floor)
                .then(|| (Outside::NODE_V4, HOST_PORT).into()),
            cpu,
        }
    }

    /// For an error.
    fn whose(&self, on: &str) -> String {
        format!("the node of {} with {on}", self.arena.contender.name())
    }
}

/// The pod whose ports begin with the one of this number.
fn imagined(number: usize) -> Pod {
    // Numbers are below 10,000: no octet overflows.
    let v4 = Ipv4Addr::from_bits(Ipv4Addr::new(10, 77, 128, 1).to_bits() + number as u32);
    let v6 =
        Ipv6Addr::from_bits(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 1, 0).to_bits() + number as u128);
    let addresses = [v4.into(), v6.into()];
    Pod::imagined(format!("other{number}"), addresses, OTHER_PORTS + number)
}

/// Ports that are the same on the node and in the pod.
fn mappings(ports: Range<usize>) -> Value {
    ports.map(|port| port_mapping(port, port)).collect()
}

/// Connections through the port that was published last.
fn traffic(
    settings: &Settings,
    lanes: &[Lane],
    level: Level,
    progress: &Progress<'_>,
) -> Result<Vec<Measurement>> {
    let on = level.name();
    let (mut rates, mut connects, mut trips) = (Vec::new(), Vec::new(), Vec::new());
    for lane in lanes {
        for values in [&mut rates, &mut connects, &mut trips] {
            values.push((lane.arena.contender, Vec::new()));
        }
    }
    let all_turns = |what: &str, turn: &mut dyn FnMut(usize, &Lane) -> Result<()>| {
        progress.say(format!("{what}, {on}"));
        for round in 0..settings.port_rounds {
            for at in 0..lanes.len() {
                // Everyone goes first as often as the others.
                let at = (round + at) % lanes.len();
                turn(at, &lanes[at]).with_context(|| lanes[at].whose(&on))?;
            }
            progress.advance(turns(settings));
        }
        anyhow::Ok(())
    };
    let slice = settings.port_slice;
    all_turns("connections", &mut |at, lane| {
        let connector = Connector::start(&lane.ends(settings.cpu))?;
        connector.run(slice / WARM_UP)?;
        let found = connector.run(slice)?;
        rates[at].1.push(found.rate / 1e3);
        connects[at].1.push(found.connect);
        Ok(())
    })?;
    all_turns("round trips", &mut |at, lane| {
        let mut flow = Flow::start(&lane.ends(settings.cpu), TCP_RR)?;
        flow.run(slice / WARM_UP)?;
        trips[at].1.push(1e6 / flow.run(slice)?);
        Ok(())
    })?;
    Ok([
        ("TCP_CRR", "1000/s", Better::Higher, rates),
        ("connect", "µs", Better::Lower, connects),
        ("TCP_RR", "µs", Better::Lower, trips),
    ]
    .map(|(what, unit, better, values)| {
        let name = format!("outside to published port, {what}, {on}");
        Measurement::new(name, unit, better, values).at(
            &level.curve(what),
            Axis::Ports,
            level.ports,
        )
    })
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_has_whole_pods() {
        let others = |ports, of_a_pod| {
            let level = Level {
                ports,
                of_a_pod,
                first: false,
            };
            level.others()
        };
        assert_eq!(others(1, 1), 0);
        assert_eq!(others(1000, 1), 999);
        assert_eq!(others(1, 100), 0);
        assert_eq!(others(100, 100), 100);
        assert_eq!(others(10_000, 100), 10_000);
    }
}
