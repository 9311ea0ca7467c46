//! Masquerade: what it costs a pod to talk to a machine outside, as the node.
//!
//! The machine outside has no route to the pods: what it answers was masqueraded.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::{Outside, Sandbox};

use super::{
    Settings,
    measurement::{Better, Contender, Measurement},
    node::{Arena, Recipe},
    peer::{Caller, Connector, Ends, Flow, Transport},
    run::{Found, Progress, Run, Step},
    traffic::{CONNECT, TCP_RR, UDP_RR, WARM_UP},
};

/// What one must know to read the results.
const NOTE: &str = "Masquerade: a pod connects to a machine outside; new connections \
     go to eight addresses of it in turn, each datagram of UDP_CRR to another of 65,536. The rows of `netfilter` `none` have the same samples \
     of the others. kube-proxy's rules are those that every node has, and of a service.";

/// Addresses that are the machine outside's, too (RFC 2544).
const OTHERS: &str = "198.18.0.0/15";
/// Those of them that datagrams go to, each to another.
const CALLED: RangeInclusive<Ipv4Addr> =
    Ipv4Addr::new(198, 19, 0, 0)..=Ipv4Addr::new(198, 19, 255, 255);
/// For how long, at most, in one turn: netfilter remembers each for 30 s, and it must not
/// be more than it can remember (262,144 by default).
const CALLS_SLICE: Duration = Duration::from_millis(60);

/// The rules of kube-proxy's iptables mode that packets between pods and machines
/// outside meet.
const KUBE_PROXY: &str = "\
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]
:KUBE-SEP-R75T7LXI5PWKQQKZ - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-NPX46M4PTMTKRN6Y
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-NPX46M4PTMTKRN6Y ! -s 10.77.0.0/16 -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-MARK-MASQ
-A KUBE-SVC-NPX46M4PTMTKRN6Y -j KUBE-SEP-R75T7LXI5PWKQQKZ
-A KUBE-SEP-R75T7LXI5PWKQQKZ -p tcp -m tcp -j DNAT --to-destination 198.51.100.1:6443
COMMIT
";

/// One property of a kind of traffic.
struct Row {
    what: &'static str,
    unit: &'static str,
    better: Better,
}

impl Row {
    const fn time(what: &'static str) -> Self {
        Self {
            what,
            unit: "µs",
            better: Better::Lower,
        }
    }

    const fn rate(what: &'static str) -> Self {
        Self {
            what,
            unit: "1000/s",
            better: Better::Higher,
        }
    }

    fn name(&self) -> String {
        format!("pod to outside, {}", self.what)
    }
}

/// A kind of traffic, and what is told of it.
type Test = (Transport, &'static [Row]);

const TESTS: [Test; 4] = [
    (
        Transport::Connections,
        &[Row::rate("TCP_CRR"), Row::time("connect")],
    ),
    (Transport::Calls, &[Row::rate("UDP_CRR")]),
    (TCP_RR, &[Row::time("TCP_RR")]),
    (UDP_RR, &[Row::time("UDP_RR")]),
];

fn tests(settings: &Settings) -> impl Iterator<Item = &'static Test> {
    let wanted = |row: &Row| row.name().contains(&settings.matching);
    TESTS
        .iter()
        .filter(move |(_, rows)| rows.iter().any(wanted))
}

/// On nodes with no rules but those of the contender, and beside kube-proxy's.
const SURROUNDINGS: [&str; 2] = ["", ", beside kube-proxy"];

/// The only one.
pub(super) fn steps(settings: &Settings) -> Vec<Step> {
    vec![Step {
        name: "masquerade".to_owned(),
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
    let lanes = settings.contenders.len();
    let turns = (SURROUNDINGS.len() * settings.masquerade_rounds * lanes) as u64;
    let round: u64 = tests(settings)
        .map(|(transport, _)| turn(settings, *transport))
        .sum();
    turns * round
}

fn turn(settings: &Settings, transport: Transport) -> u64 {
    let slice = slice(settings, transport);
    let time = slice + slice / WARM_UP + CONNECT;
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn slice(settings: &Settings, transport: Transport) -> Duration {
    match transport {
        Transport::Calls => settings.slice.min(CALLS_SLICE),
        _ => settings.slice,
    }
}

/// The node of a contender, the machine outside, and the pod that asks it.
struct Lane {
    arena: Arena,
    outside: Outside,
    pod: Sandbox,
}

/// Measures all kinds of traffic, beside no rules first.
fn all(settings: &Settings, recipe: &Recipe, progress: &Progress<'_>) -> Result<Found> {
    progress.say("making nodes".to_owned());
    let lanes = settings
        .contenders
        .iter()
        .map(|&contender| Lane::new(contender, recipe))
        .collect::<Result<Vec<_>>>()?;
    let mut measurements = Vec::new();
    for surroundings in SURROUNDINGS {
        if !surroundings.is_empty() {
            for lane in &lanes {
                lane.write_rules()?;
            }
        }
        for (transport, rows) in tests(settings) {
            let what = format!("{}{surroundings}", rows[0].name());
            progress.say(what.clone());
            let samples = samples(settings, &lanes, *transport, progress).context(what)?;
            for (number, row) in rows.iter().enumerate() {
                let values = lanes.iter().zip(&samples).map(|(lane, samples)| {
                    let values = samples.iter().map(|sample| sample[number]).collect();
                    (lane.arena.contender, values)
                });
                measurements.push(Measurement::new(
                    format!("{}{surroundings}", row.name()),
                    row.unit,
                    row.better,
                    values.collect(),
                ));
            }
        }
    }
    Ok(Found {
        measurements,
        notes: vec![NOTE.to_owned()],
        ..Found::default()
    })
}

/// What each lane achieved in each round: a value for each row.
fn samples(
    settings: &Settings,
    lanes: &[Lane],
    transport: Transport,
    progress: &Progress<'_>,
) -> Result<Vec<Vec<Vec<f64>>>> {
    let mut samples = vec![Vec::new(); lanes.len()];
    for round in 0..settings.masquerade_rounds {
        for at in 0..lanes.len() {
            // Everyone goes first as often as the others.
            let at = (round + at) % lanes.len();
            let sample = lanes[at].run(settings, transport);
            samples[at].push(sample.with_context(|| lanes[at].whose())?);
            progress.advance(turn(settings, transport));
        }
    }
    Ok(samples)
}

impl Lane {
    fn new(contender: Contender, recipe: &Recipe) -> Result<Self> {
        let arena = Arena::new(contender, recipe)?;
        // Before the first ADD, as it is on a node.
        let outside = arena.node.outside()?;
        outside.ip(&format!("route add local {OTHERS} dev lo"))?;
        let pod = arena.node.sandbox("pod")?;
        let lane = Self {
            arena,
            outside,
            pod,
        };
        if contender == Contender::Floor {
            lane.outside
                .run("ip link add pod type veth peer name eth0 netns pod")?;
            lane.outside
                .ip("addr add 10.77.0.1/16 dev pod\nlink set pod up")?;
            lane.pod.ip("addr add 10.77.0.3/16 dev eth0\n\
                         link set eth0 up\n\
                         route add default via 10.77.0.1")?;
        } else {
            lane.arena.add(&lane.pod).with_context(|| lane.whose())?;
        }
        Ok(lane)
    }

    /// Puts kube-proxy's rules beside those of the contender.
    fn write_rules(&self) -> Result<()> {
        let node = &self.arena.node;
        node.within(|| Ok(fs::write("/run/rules", KUBE_PROXY)?))?;
        node.run("iptables-restore --noflush /run/rules")?;
        Ok(())
    }

    /// Takes a turn; returns a value for each row of the test.
    fn run(&self, settings: &Settings, transport: Transport) -> Result<Vec<f64>> {
        let ends = |listen: Ipv4Addr| Ends {
            from: &self.pod,
            to: &self.outside,
            listen: (listen, 0).into(),
            through: None,
            cpu: settings.cpu,
        };
        let slice = slice(settings, transport);
        Ok(match transport {
            Transport::Connections => {
                let connector = Connector::start(&ends(Ipv4Addr::UNSPECIFIED))?.spread(&servers());
                connector.run(slice / WARM_UP)?;
                let found = connector.run(slice)?;
                vec![found.rate / 1e3, found.connect]
            }
            Transport::Calls => {
                let mut caller = Caller::start(&ends(Ipv4Addr::UNSPECIFIED), CALLED)?;
                caller.run(slice / WARM_UP)?;
                vec![caller.run(slice)? / 1e3]
            }
            _ => {
                let mut flow = Flow::start(&ends(Outside::V4), transport)?;
                flow.run(slice / WARM_UP)?;
                vec![1e6 / flow.run(slice)?]
            }
        })
    }

    /// For an error.
    fn whose(&self) -> String {
        format!("the node of {}", self.arena.contender.name())
    }
}

/// Where connections go to. A pod has some 28,000 ports to connect from; with eight
/// addresses it takes longer until two connections look the same than netfilter remembers
/// one that is closed (10 s).
fn servers() -> [IpAddr; 8] {
    std::array::from_fn(|number| {
        let first = Ipv4Addr::new(198, 18, 0, 0).to_bits();
        Ipv4Addr::from_bits(first + number as u32).into()
    })
}
