//! Published ports: what a connection through one costs, and what publishing
//! costs, with few and with many ports on the node.
//!
//! A machine outside connects to the node's address. It, and the pod that has
//! the port, run on the CPU that all traffic of the bench runs on.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr},
    ops::Range,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Attachment, Outside, Sandbox};
use serde_json::{Value, json};

use super::{
    Settings,
    measurement::{Better, Contender, Measurement},
    node::{Added, Arena, NETWORK, PORT_MAPPINGS, Recipe},
    peer::{Connector, Ends, Flow},
    run::{Found, Progress, Run, Step},
    traffic::{CONNECT, TCP_RR, WARM_UP},
};

/// The port that is measured, on the node and in the pod.
const HOST_PORT: u16 = 8080;
const CONTAINER_PORT: u16 = 80;
/// Where the others begin, and where those begin that are added and deleted.
const OTHER_PORTS: usize = 10_000;
const CALLED_PORTS: usize = 22_000;
/// How many of the others a pod of bpf-bridge's has: each is an entry of one hash
/// map, whoever has it.
const PORTS_OF_A_POD: usize = 100;
/// How often one port more is published on a node that has many.
const CALLS_BESIDE: usize = 4;

/// The only one.
pub(super) fn steps(settings: &Settings) -> Vec<Step> {
    vec![Step {
        name: "ports".to_owned(),
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
    let calls: u64 = settings
        .port_calls
        .iter()
        .map(|&(ports, rounds)| rounds as u64 * round(ports))
        .sum();
    let levels: u64 = settings
        .ports
        .iter()
        .flat_map(|(_, levels)| levels)
        .map(|&ports| filling(ports) + (2 * settings.port_rounds) as u64 * step(settings))
        .sum();
    calls + levels
}

fn round(ports: usize) -> u64 {
    300 + 35 * ports as u64
}

fn filling(ports: usize) -> u64 {
    3000 + ports as u64
}

fn step(settings: &Settings) -> u64 {
    let slice = settings.slice + settings.slice / WARM_UP + CONNECT;
    let slice = u64::try_from(slice.as_millis()).unwrap_or(u64::MAX);
    slice * settings.contenders.len() as u64
}

/// The node of a contender, the machine outside, and the pod that it asks.
struct Lane {
    arena: Arena,
    outside: Outside,
    pod: Sandbox,
    address: IpAddr,
    published: Option<Added>,
    /// A sandbox for the calls that are measured.
    caller: Sandbox,
    /// How many ports other pods have, and how many each of them has.
    others: usize,
    of_a_pod: usize,
}

/// Measures with more and more ports on the nodes.
fn all(settings: &Settings, recipe: &Recipe, progress: &Progress<'_>) -> Result<Found> {
    let mut memory = Vec::new();
    for &contender in &settings.contenders {
        let lane = Lane::new(contender, recipe, 1)?;
        let most = lane.arena.memory(&lane.attachment(1))?;
        memory.extend(most.map(|most| (contender, most)));
    }
    let mut measurements = Vec::new();
    let mut firsts = Vec::new();
    let mut used = Vec::new();
    for (of_a_pod, levels) in &settings.ports {
        progress.say("making nodes".to_owned());
        let mut lanes = Vec::new();
        for (number, &contender) in settings.contenders.iter().enumerate() {
            let mut lane = Lane::new(contender, recipe, *of_a_pod)?;
            let first = lane.prepare().with_context(|| lane.whose("a first port"))?;
            if firsts.len() == number {
                firsts.push((contender, Vec::new()));
            }
            firsts[number].1.extend(first.map(milliseconds));
            lanes.push(lane);
        }
        if used.is_empty() {
            for &(ports, rounds) in &settings.port_calls {
                let what = plural(ports);
                progress.say(format!("ADD and DEL of {what}"));
                measurements.extend(calls(&lanes, ports, rounds, &what)?);
                progress.advance(rounds as u64 * round(ports));
            }
        }
        for &ports in levels {
            let mut on = plural(ports);
            if *of_a_pod > 1 {
                on += &format!(" ({of_a_pod} a pod)");
            }
            progress.say(format!("publishing {on}"));
            for lane in &mut lanes {
                lane.publish(ports).with_context(|| lane.whose(&on))?;
            }
            progress.advance(filling(ports));
            measurements.extend(traffic(settings, &lanes, &on, progress)?);
            if ports > 1 {
                progress.say(format!("ADD and DEL beside {on}"));
                let what = format!("1 port beside {on}");
                measurements.extend(calls(&lanes, 1, CALLS_BESIDE, &what)?);
            }
        }
        used.append(&mut lanes);
    }
    measurements.insert(0, call("ADD, 1 port, a node's first", firsts));
    let mut notes = vec![
        "Ports: a machine outside connects to the node; the pod that has the port was added \
         last, the other ports are of one pod each, unless it says otherwise."
            .to_owned(),
    ];
    if settings.contenders.contains(&Contender::BpfBridge) {
        notes.push(format!(
            "bpf-bridge's other ports were published by ADDs of pods with {PORTS_OF_A_POD} each."
        ));
    }
    if used.iter().any(|lane| lane.arena.runs_portmap()) {
        notes.push(
            "Stock's other ports are rules as portmap writes them (which was compared), written \
             by one iptables-restore, for addresses without a pod: its ADDs would take hours. \
             The port that is measured is portmap's own."
                .to_owned(),
        );
    }
    let facts = vec![super::megabytes(
        "peak memory, first published port",
        &memory,
    )];
    Ok(Found {
        measurements,
        facts,
        notes,
    })
}

fn plural(ports: usize) -> String {
    match ports {
        1 => "1 port".to_owned(),
        _ => format!("{ports} ports"),
    }
}

impl Lane {
    fn new(contender: Contender, recipe: &Recipe, of_a_pod: usize) -> Result<Self> {
        let arena = Arena::new(contender, recipe)?;
        // Before the first ADD, as it is on a node.
        let outside = arena.node.outside()?;
        let pod = arena.node.sandbox("published")?;
        let caller = arena.node.sandbox("caller")?;
        let lane = Self {
            arena,
            outside,
            pod,
            address: Ipv4Addr::new(10, 77, 0, 3).into(),
            published: None,
            caller,
            others: 0,
            of_a_pod,
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

    /// The attachment that is added and deleted, with so many ports.
    fn attachment(&self, ports: usize) -> Attachment {
        let ports = mappings(CALLED_PORTS..CALLED_PORTS + ports);
        self.caller.attachment().capability(PORT_MAPPINGS, ports)
    }

    fn add(&self, attachment: &Attachment) -> Result<Added> {
        self.arena.node.within(|| self.arena.add_here(attachment))
    }

    fn del(&self, attachment: &Attachment, added: &Added) -> Result<Duration> {
        let arena = &self.arena;
        arena.node.within(|| arena.del_here(attachment, added))
    }

    /// Publishes a first port, with which come the programs, or the chains that
    /// rules for others are written to; returns how long that took.
    fn prepare(&mut self) -> Result<Option<Duration>> {
        self.publish(1)?;
        if self.arena.runs_portmap() {
            self.compare_rules()?;
        }
        Ok(self.published.as_ref().map(|added| added.time))
    }

    /// Publishes ports until there are `count`, the last of them the one that is
    /// measured.
    fn publish(&mut self, count: usize) -> Result<()> {
        if self.arena.contender == Contender::Floor {
            return Ok(());
        }
        let port = json!([mapping(HOST_PORT.into(), CONTAINER_PORT.into())]);
        let attachment = self.pod.attachment().capability(PORT_MAPPINGS, port);
        if let Some(published) = self.published.take() {
            self.del(&attachment, &published)?;
        }
        let more = self.others..count - 1;
        self.others = more.end;
        if self.arena.runs_portmap() {
            self.write_rules(more)?;
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
        let added = self.add(&attachment)?;
        self.address = added.v4("address")?;
        self.published = Some(added);
        Ok(())
    }

    /// Writes what `portmap` would for pods with these ports.
    fn write_rules(&self, ports: Range<usize>) -> Result<()> {
        for family in [Family::V4, Family::V6] {
            let (mut chains, mut rules) = (String::new(), String::new());
            for start in ports.clone().step_by(self.of_a_pod) {
                let end = ports.end.min(start + self.of_a_pod);
                let chain = format!("CNI-DN-{start:021x}");
                let _ = writeln!(chains, ":{chain} - [0:0]");
                let address = match family {
                    Family::V4 => format!("10.77.{}.{}", 128 + start / 250, 1 + start % 250),
                    Family::V6 => format!("fd77::1:{start:x}"),
                };
                let ports = OTHER_PORTS + start..OTHER_PORTS + end;
                rules += &family.rules(&chain, &format!("other{start}"), &address, ports);
            }
            let text = format!("*nat\n{chains}{rules}COMMIT\n");
            let node = &self.arena.node;
            node.within(|| Ok(fs::write("/run/rules", &text)?))?;
            node.run(&format!(
                "{}-restore --noflush /run/rules",
                family.program()
            ))?;
        }
        Ok(())
    }

    /// Holds what [`Family::rules`] writes for a pod against what `portmap` does.
    fn compare_rules(&self) -> Result<()> {
        let attachment = self.attachment(self.of_a_pod);
        let added = self.add(&attachment)?;
        for family in [Family::V4, Family::V6] {
            let program = family.program();
            let saved = self.arena.node.run(&format!("{program}-save -t nat"))?;
            let mut last = saved.lines();
            let last = last.rfind(|line| line.starts_with("-A CNI-HOSTPORT-DNAT "));
            let chain = last.and_then(|line| line.rsplit(' ').next());
            let address = match family {
                Family::V4 => added.v4("address")?,
                Family::V6 => added.v6("address")?,
            };
            let rules = family.rules(
                chain.context("portmap wrote no rules")?,
                &attachment.container_id,
                &address.to_string(),
                CALLED_PORTS..CALLED_PORTS + self.of_a_pod,
            );
            let of_pod = |line: &&str| chain.is_some_and(|chain| line.contains(chain));
            let found: Vec<_> = saved.lines().filter(of_pod).skip(1).collect();
            ensure!(
                found == rules.lines().collect::<Vec<_>>(),
                "portmap's rules are other than the bench's:\n{}\nnot:\n{rules}",
                found.join("\n")
            );
        }
        self.del(&attachment, &added)?;
        Ok(())
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

/// An IP version, for which there are rules of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn program(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }

    /// The rules that `portmap` writes for a pod with TCP ports that are the same
    /// on the node, as `iptables-save` prints them.
    fn rules(self, chain: &str, id: &str, address: &str, ports: Range<usize>) -> String {
        let (sources, address): (&[&str], _) = match self {
            Self::V4 => (&["10.77.0.0/16", "127.0.0.1/32"], address.to_owned()),
            Self::V6 => (&["fd77::/64"], format!("[{address}]")),
        };
        let mut rules = String::new();
        // Writing to a string cannot fail.
        for port in ports.clone() {
            let dport = format!("-p tcp -m tcp --dport {port}");
            for source in sources {
                let _ = writeln!(
                    rules,
                    "-A {chain} -s {source} {dport} -j CNI-HOSTPORT-SETMARK"
                );
            }
            let _ = writeln!(
                rules,
                "-A {chain} {dport} -j DNAT --to-destination {address}:{port}"
            );
        }
        // As many as one match takes.
        let ports: Vec<_> = ports.map(|port| port.to_string()).collect();
        for some in ports.chunks(15) {
            let _ = writeln!(
                rules,
                "-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment \
                 \"dnat name: \\\"{NETWORK}\\\" id: \\\"{id}\\\"\" -m multiport --dports {} -j {chain}",
                some.join(",")
            );
        }
        rules
    }
}

fn mapping(host: usize, container: usize) -> Value {
    json!({"hostPort": host, "containerPort": container, "protocol": "tcp"})
}

/// Ports that are the same on the node and in the pod.
fn mappings(ports: Range<usize>) -> Value {
    ports.map(|port| mapping(port, port)).collect()
}

/// ADD and DEL of a pod with so many ports.
fn calls(lanes: &[Lane], ports: usize, rounds: usize, what: &str) -> Result<Vec<Measurement>> {
    let mut lanes: Vec<_> = lanes
        .iter()
        .filter(|lane| lane.arena.contender != Contender::Floor)
        .map(|lane| (lane, Vec::new(), Vec::new()))
        .collect();
    let count = lanes.len();
    // The first round warms up, where one is not long enough to be its own.
    let warm_up = usize::from(ports <= 10);
    for round in 0..warm_up + rounds {
        for turn in 0..count {
            let (lane, adds, dels) = &mut lanes[(round + turn) % count];
            let attachment = lane.attachment(ports);
            let added = lane.add(&attachment)?;
            let deleted = lane.del(&attachment, &added)?;
            if round >= warm_up {
                adds.push(milliseconds(added.time));
                dels.push(milliseconds(deleted));
            }
        }
    }
    let (adds, dels) = lanes
        .into_iter()
        .map(|(lane, adds, dels)| {
            let contender = lane.arena.contender;
            ((contender, adds), (contender, dels))
        })
        .unzip();
    Ok(vec![
        call(&format!("ADD, {what}"), adds),
        call(&format!("DEL, {what}"), dels),
    ])
}

fn call(name: &str, values: Vec<(Contender, Vec<f64>)>) -> Measurement {
    Measurement::new(name, "ms", Better::Lower, values).additive()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Connections through the port that was published last.
fn traffic(
    settings: &Settings,
    lanes: &[Lane],
    on: &str,
    progress: &Progress<'_>,
) -> Result<Vec<Measurement>> {
    let (mut rates, mut connects, mut trips) = (Vec::new(), Vec::new(), Vec::new());
    for lane in lanes {
        for values in [&mut rates, &mut connects, &mut trips] {
            values.push((lane.arena.contender, Vec::new()));
        }
    }
    let turns = |what: &str, turn: &mut dyn FnMut(usize, &Lane) -> Result<()>| {
        progress.say(format!("{what}, {on}"));
        for round in 0..settings.port_rounds {
            for at in 0..lanes.len() {
                // Everyone goes first as often as the others.
                let at = (round + at) % lanes.len();
                turn(at, &lanes[at]).with_context(|| lanes[at].whose(on))?;
            }
            progress.advance(step(settings));
        }
        anyhow::Ok(())
    };
    turns("connections", &mut |at, lane| {
        let connector = Connector::start(&lane.ends(settings.cpu))?;
        connector.run(settings.slice / WARM_UP)?;
        let found = connector.run(settings.slice)?;
        rates[at].1.push(found.rate / 1e3);
        connects[at].1.push(found.connect);
        Ok(())
    })?;
    turns("round trips", &mut |at, lane| {
        let mut flow = Flow::start(&lane.ends(settings.cpu), TCP_RR)?;
        flow.run(settings.slice / WARM_UP)?;
        trips[at].1.push(1e6 / flow.run(settings.slice)?);
        Ok(())
    })?;
    Ok([
        ("TCP_CRR", "1000/s", Better::Higher, rates),
        ("connect", "µs", Better::Lower, connects),
        ("TCP_RR", "µs", Better::Lower, trips),
    ]
    .map(|(what, unit, better, values)| {
        let name = format!("outside to published port, {what}, {on}");
        Measurement::new(name, unit, better, values)
    })
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_have_fifteen_ports_a_match() {
        let rules = Family::V4.rules("CNI-DN-x", "id", "10.77.0.3", 80..97);
        let lines: Vec<_> = rules.lines().collect();
        assert_eq!(lines.len(), 3 * 17 + 2);
        assert_eq!(
            lines[..3],
            [
                "-A CNI-DN-x -s 10.77.0.0/16 -p tcp -m tcp --dport 80 -j CNI-HOSTPORT-SETMARK",
                "-A CNI-DN-x -s 127.0.0.1/32 -p tcp -m tcp --dport 80 -j CNI-HOSTPORT-SETMARK",
                "-A CNI-DN-x -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.77.0.3:80",
            ]
        );
        assert_eq!(
            lines[52],
            "-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment \"dnat name: \\\"bench\\\" \
             id: \\\"id\\\"\" -m multiport --dports 95,96 -j CNI-DN-x"
        );
        let rules = Family::V6.rules("CNI-DN-x", "id", "fd77::3", 80..81);
        assert!(rules.contains("--to-destination [fd77::3]:80\n"), "{rules}");
        assert_eq!(rules.lines().count(), 3);
    }
}
