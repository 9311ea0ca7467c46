//! One frame on its way through the programs: what it costs apart from everything else
//! that happens to a packet.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use bpf_bridge_tests::{Frame, MacAddr, Namespace, Packet};

use super::{
    bytecode::{Bytecode, Outcome, SKB_IFINDEX, SKB_LEN},
    measurement::{Better, Contender, Measurement},
    node::Recipe,
    pair::Pair,
    peer,
    program::{PORT, Pins},
};

/// How often a frame is run in one call of the kernel: some 10 ms.
const REPEAT: u32 = 100_000;
/// How often it is called of each build, in turn.
const ROUNDS: usize = 100;
/// TC_ACT_REDIRECT: the frame went straight to where it belongs.
const REDIRECT: u32 = 7;

const UDP_PORT: u16 = 9;

/// What the figures are.
pub(super) const NOTE: &str = "Instructions executed: of eBPF bytecode, by interpreting it \
     with the maps of the node (the kernel counts none). What helpers do in the kernel is in \
     the time only.";

/// The ways whose frames are run.
#[derive(Clone, Copy)]
enum Way {
    PodToPod,
    PodToHost,
    HostToPod,
}

impl Way {
    const ALL: [Self; 3] = [Self::PodToPod, Self::PodToHost, Self::HostToPod];

    fn name(self) -> &'static str {
        match self {
            Self::PodToPod => "pod to pod",
            Self::PodToHost => "pod to host",
            Self::HostToPod => "host to pod",
        }
    }
}

/// The programs of one build on its node.
struct Lane<'a> {
    contender: Contender,
    pair: &'a Pair,
    pins: Pins<'a>,
    code: Bytecode,
}

/// A frame, and the device that it is received on.
struct Received {
    ifindex: u32,
    bytes: Vec<u8>,
}

/// Runs frames through the programs of every build of bpf-bridge in `pairs`.
pub(super) fn measure(pairs: &[Pair], recipe: &Recipe, cpu: usize) -> Result<Vec<Measurement>> {
    let mut lanes = Vec::new();
    for pair in pairs {
        let contender = pair.arena.contender;
        let binary = match (contender, &recipe.against) {
            (Contender::BpfBridge, _) => &recipe.plugin,
            (Contender::Stock, Some(other)) => other,
            _ => continue,
        };
        lanes.push(Lane {
            contender,
            pair,
            pins: Pins::of(&pair.arena.node)?,
            code: Bytecode::of(binary)?,
        });
    }
    let mut measurements = Vec::new();
    for way in Way::ALL {
        let mut times = Vec::new();
        let mut lengths = Vec::new();
        let mut frames = Vec::new();
        for lane in &lanes {
            let frame = lane.frame(way)?;
            // The first one makes what is remembered of the flow.
            let verdict = lane.run(&frame, 1, cpu)?.0;
            let outcome = lane.interpret(&frame)?;
            ensure!(
                (verdict, outcome.verdict) == (REDIRECT, REDIRECT),
                "{}: the kernel's verdict is {verdict}, that of the interpreted bytecode {}",
                way.name(),
                outcome.verdict
            );
            lengths.push((lane.contender, vec![outcome.instructions as f64]));
            times.push((lane.contender, Vec::new()));
            frames.push(frame);
        }
        for round in 0..ROUNDS {
            for turn in 0..lanes.len() {
                let turn = (round + turn) % lanes.len();
                let (_, time) = lanes[turn].run(&frames[turn], REPEAT, cpu)?;
                times[turn].1.push(time);
            }
        }
        let measurement = |what: &str, unit, values| {
            let name = format!("{}, {what}", way.name());
            Measurement::new(name, unit, Better::Lower, values)
        };
        measurements.push(measurement("a frame by BPF_PROG_TEST_RUN", "ns", times));
        measurements.push(measurement(
            "a frame in the bytecode",
            "instructions executed",
            lengths,
        ));
    }
    Ok(measurements)
}

impl Lane<'_> {
    /// What the bytecode does with the frame.
    fn interpret(&self, frame: &Received) -> Result<Outcome> {
        self.pair.arena.node.within(|| {
            self.code
                .run(PORT, frame.ifindex, &frame.bytes, &self.pins.paths)
        })
    }

    fn frame(&self, way: Way) -> Result<Received> {
        let Pair {
            arena,
            first,
            second,
            first_v4,
            second_v4,
            host_v4,
        } = self.pair;
        let node: &Namespace = &arena.node;
        let (a, b) = (
            MacAddr::of_device(first, "eth0")?,
            MacAddr::of_device(second, "eth0")?,
        );
        let host = MacAddr::of_device(node, "cni0")?;
        let (device, from, to, source, destination) = match way {
            Way::PodToPod => ((&**first, "eth0"), a, b, first_v4, second_v4),
            Way::PodToHost => ((&**first, "eth0"), a, host, first_v4, host_v4),
            Way::HostToPod => ((node, "cni0"), host, b, host_v4, second_v4),
        };
        // The port is the other end of the veth pair.
        let (namespace, name) = device;
        let device = namespace.device(name)?;
        let ifindex = match device["link"].as_str() {
            Some(peer) => namespace.device(peer)?["ifindex"].as_u64(),
            None => device["link_index"].as_u64(),
        };
        let ifindex = ifindex.with_context(|| format!("{name} is no end of a veth pair"))?;
        let ports = |address| (address, UDP_PORT).into();
        let packet = Packet::udp(ports(*source), ports(*destination), &[0; 64]);
        Ok(Received {
            ifindex: ifindex.try_into()?,
            bytes: Frame::ip(to, from, &packet.bytes()).0,
        })
    }

    /// The verdict, and the time of one of `repeat` runs in ns.
    fn run(&self, frame: &Received, repeat: u32, cpu: usize) -> Result<(u32, f64)> {
        let path = self.pins.path(PORT)?;
        let mut context = [0; SKB_LEN];
        context[SKB_IFINDEX..][..4].copy_from_slice(&frame.ifindex.to_ne_bytes());
        self.pair.arena.node.within(|| {
            peer::pin(cpu)?;
            let program = SchedClassifier::from_pin(path)?;
            let start = Instant::now();
            let result = program.test_run(TestRunOptions {
                data_in: Some(&frame.bytes),
                ctx_in: Some(&context),
                repeat,
                ..TestRunOptions::new()
            })?;
            // The kernel's own figure is rounded to whole ns.
            let time = start.elapsed().as_nanos() as f64 / f64::from(repeat);
            Ok((result.return_value, time))
        })
    }
}
