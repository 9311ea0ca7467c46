//! What a packet costs: pod to pod, and pod to host.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::{Namespace, Sandbox};

use super::{
    Settings,
    measurement::{Better, Contender, Measurement},
    node::{Arena, Recipe},
    peer::{Ends, Flow, Transport},
    run::{Found, Progress, Run, Step},
};

/// Datagrams that are under way at once: far fewer than a socket's buffer holds.
const BURST: usize = 64;
/// Bytes between two answers of a stream.
const STRETCH: usize = 4 << 20;

/// How a rate of transactions is told.
#[derive(Clone, Copy)]
enum Tell {
    /// µs per transaction.
    Time,
    /// 10⁹ bits a second.
    Gigabits,
    /// 1000 packets a second.
    Packets,
}

/// A flow first runs for this part of a slice, which does not count.
pub(super) const WARM_UP: u32 = 5;
/// About how long it takes to connect one.
pub(super) const CONNECT: Duration = Duration::from_millis(8);

/// What is measured: its name, the traffic, how it is told, and whether the host
/// is the other end.
type Test = (&'static str, Transport, Tell, bool);

const TESTS: [Test; 6] = [
    ("pod to pod, TCP_RR", TCP_RR, Tell::Time, false),
    ("pod to pod, UDP_RR", UDP_RR, Tell::Time, false),
    ("pod to pod, UDP, 64 bytes", UDP_FLOW, Tell::Packets, false),
    ("pod to pod, TCP stream", TCP_STREAM, Tell::Gigabits, false),
    ("pod to host, TCP_RR", TCP_RR, Tell::Time, true),
    ("pod to host, UDP_RR", UDP_RR, Tell::Time, true),
];
pub(super) const TCP_RR: Transport = Transport::Tcp { quota: 1 };
const TCP_STREAM: Transport = Transport::Tcp { quota: STRETCH };
pub(super) const UDP_RR: Transport = Transport::Udp { quota: 1, size: 1 };
pub(super) const UDP_FLOW: Transport = Transport::Udp {
    quota: BURST,
    size: 64,
};

impl Tell {
    fn of(self, transactions: f64) -> f64 {
        match self {
            Self::Time => 1e6 / transactions,
            Self::Gigabits => transactions * STRETCH as f64 * 8.0 / 1e9,
            Self::Packets => transactions * BURST as f64 / 1e3,
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Time => "µs",
            Self::Gigabits => "Gbit/s",
            Self::Packets => "1000/s",
        }
    }

    fn better(self) -> Better {
        match self {
            Self::Time => Better::Lower,
            Self::Gigabits | Self::Packets => Better::Higher,
        }
    }
}

fn tests(settings: &Settings) -> impl Iterator<Item = &'static Test> {
    TESTS
        .iter()
        .filter(|(name, ..)| name.contains(&settings.matching))
}

/// One for each kind of traffic.
pub(super) fn steps(settings: &Settings) -> Vec<Step> {
    tests(settings)
        .map(|(name, ..)| Step {
            name: (*name).to_owned(),
            estimate: settings.rounds as u64 * step(settings),
        })
        .collect()
}

fn step(settings: &Settings) -> u64 {
    let slice = settings.slice + settings.slice / WARM_UP + CONNECT;
    let slice = u64::try_from(slice.as_millis()).unwrap_or(u64::MAX);
    slice * settings.contenders.len() as u64
}

/// Two pods, and the host, of one contender.
pub(super) struct Pair {
    pub(super) arena: Arena,
    pub(super) first: Sandbox,
    pub(super) second: Sandbox,
    pub(super) first_v4: IpAddr,
    pub(super) second_v4: IpAddr,
    pub(super) host_v4: IpAddr,
}

impl Pair {
    pub(super) fn new(contender: Contender, recipe: &Recipe) -> Result<Self> {
        let arena = Arena::new(contender, recipe)?;
        let first = arena.node.sandbox("first")?;
        let second = arena.node.sandbox("second")?;
        let (first_v4, second_v4, host_v4);
        if contender == Contender::Floor {
            // Each end of the pair is a pod; there is no host between.
            arena
                .node
                .run("ip link add eth0 netns first type veth peer name eth0 netns second")?;
            first.ip("addr add 10.77.0.2/16 dev eth0\nlink set eth0 up")?;
            second.ip("addr add 10.77.0.3/16 dev eth0\nlink set eth0 up")?;
            first_v4 = IpAddr::from([10, 77, 0, 2]);
            second_v4 = IpAddr::from([10, 77, 0, 3]);
            host_v4 = second_v4;
        } else {
            first_v4 = arena.add(&first)?.v4("address")?;
            let added = arena.add(&second)?;
            second_v4 = added.v4("address")?;
            host_v4 = added.v4("gateway")?;
        }
        Ok(Self {
            arena,
            first,
            second,
            first_v4,
            second_v4,
            host_v4,
        })
    }

    pub(super) fn flow(&self, transport: Transport, to_host: bool, cpu: usize) -> Result<Flow> {
        let (to, address): (&Namespace, IpAddr) =
            if to_host && self.arena.contender != Contender::Floor {
                (&self.arena.node, self.host_v4)
            } else {
                (&self.second, self.second_v4)
            };
        let ends = Ends {
            from: &self.first,
            to,
            listen: (address, 0).into(),
            through: None,
            cpu,
        };
        Flow::start(&ends, transport)
            .with_context(|| format!("on the node of {}", self.arena.contender.name()))
    }
}

/// The nodes of all contenders that have two pods.
pub(super) fn pairs(settings: &Settings, recipe: &Recipe) -> Result<Vec<Pair>> {
    settings
        .contenders
        .iter()
        .map(|&contender| Pair::new(contender, recipe))
        .collect()
}

/// Measures all kinds of traffic.
pub(super) fn measure(settings: &Settings, recipe: &Recipe, run: &mut Run) -> Result<()> {
    let steps = steps(settings);
    if !run.wants(&steps) {
        return Ok(());
    }
    run.say("making nodes");
    let pairs = pairs(settings, recipe)?;
    for (step, test) in steps.iter().zip(tests(settings)) {
        run.step(step, |progress| {
            let measurements = vec![test_all(settings, &pairs, test, progress)?];
            Ok(Found {
                measurements,
                ..Found::default()
            })
        })?;
    }
    Ok(())
}

fn test_all(
    settings: &Settings,
    pairs: &[Pair],
    &(name, transport, tell, to_host): &Test,
    progress: &Progress<'_>,
) -> Result<Measurement> {
    let mut lanes: Vec<_> = pairs.iter().map(|pair| (pair, Vec::new())).collect();
    let count = lanes.len();
    for round in 0..settings.rounds {
        for turn in 0..count {
            // Everyone goes first as often as the others.
            let (pair, values) = &mut lanes[(round + turn) % count];
            // Where the kernel puts a socket makes a difference of a
            // per cent for as long as it lives: so none lives long.
            let mut flow = pair.flow(transport, to_host, settings.cpu)?;
            flow.run(settings.slice / WARM_UP)?;
            let rate = flow
                .run(settings.slice)
                .with_context(|| format!("{name} of {}", pair.arena.contender.name()))?;
            values.push(tell.of(rate));
        }
        progress.advance(step(settings));
    }
    let values = lanes
        .into_iter()
        .map(|(pair, values)| (pair.arena.contender, values))
        .collect();
    Ok(Measurement::new(name, tell.unit(), tell.better(), values))
}
