//! What the programs cost by the kernel's own account.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    programs::{
        ProgramInfo,
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
    sys::{Stats, enable_stats},
};
use bpf_bridge_tests::{Namespace, Node, Outside, Sandbox};
use serde_json::json;

use super::{
    Settings, frames,
    measurement::{Contender, Fact},
    node::{Arena, PORT_MAPPINGS, Recipe},
    pair::{self, Pair},
    peer::{Connector, Ends, Flow, Transport},
    run::{Found, Run, Step},
    statistics::Summary,
    traffic::{UDP_FLOW, UDP_RR},
};

/// Where bpf-bridge pins what it loads.
const PINS: &str = "/sys/fs/bpf/bpf-bridge";
/// The programs that run by themselves; the others' time is in that of their callers.
pub(super) const PORT: &str = "port";
const UPLINK: &str = "uplink";
const CONNECT: &str = "connect4";
/// All that may be loaded, by the names of the pins.
const PROGRAMS: [&str; 12] = [
    PORT,
    "guard",
    "responder",
    "flood",
    UPLINK,
    "uplink_l3",
    "egress",
    "egress_l3",
    "from_pod",
    "from_host",
    "between",
    CONNECT,
];

/// How often the time is taken; what counts is the median.
const SLICES: usize = 5;

/// The port that is published, on the node and in the pod.
const HOST_PORT: u16 = 8080;
const POD_PORT: u16 = 80;

/// One program.
struct Program {
    name: String,
    /// Instructions that the verifier went through.
    verified: Option<u32>,
    /// Bytes of machine code.
    jited: u32,
}

/// How long a program runs.
struct Timed {
    program: &'static str,
    traffic: String,
    /// The mean of what the kernel counted, in ns. It has the two clock readings in
    /// it that measure it, and the programs that this one calls.
    time: f64,
}

/// What there is to say of the programs.
struct Programs {
    programs: Vec<Program>,
    runs: Vec<Timed>,
}

impl Programs {
    fn into_facts(self) -> Vec<Fact> {
        let ours = |name, unit: &str, value| Fact {
            name,
            unit: unit.to_owned(),
            values: vec![(Contender::BpfBridge, value)],
        };
        let runs = self.runs.into_iter().map(|run| {
            let name = format!("program `{}`, {}", run.program, run.traffic);
            ours(name, "ns a run", run.time)
        });
        let programs = self.programs.into_iter().flat_map(|program| {
            let of = |what, unit, value| {
                ours(format!("program `{}`, {what}", program.name), unit, value)
            };
            [
                program
                    .verified
                    .map(|count| of("verified", "instructions", count.into())),
                Some(of("machine code", "bytes", program.jited.into())),
            ]
        });
        runs.chain(programs.flatten()).collect()
    }
}

/// The only one.
pub(super) fn steps() -> Vec<Step> {
    vec![Step {
        name: "programs".to_owned(),
        estimate: 20_000,
    }]
}

/// Looks at the programs.
pub(super) fn measure(settings: &Settings, recipe: &Recipe, run: &mut Run) -> Result<()> {
    for step in steps() {
        run.step(&step, |_| {
            let pairs = pair::pairs(settings, recipe)?;
            let mut found = Found::default();
            let ours = pairs
                .iter()
                .find(|pair| pair.arena.contender == Contender::BpfBridge);
            if let Some(ours) = ours {
                let programs = look(ours, recipe, settings.slice, settings.cpu)?;
                found.facts = programs.into_facts();
                found.measurements = frames::measure(&pairs, recipe, settings.cpu)?;
                found.notes = vec![frames::NOTE.to_owned()];
            }
            Ok(found)
        })?;
    }
    Ok(())
}

/// Looks at the programs of nodes of bpf-bridge's while they have traffic: of one
/// without published ports, and of one with.
fn look(pair: &Pair, recipe: &Recipe, slice: Duration, cpu: usize) -> Result<Programs> {
    // Switched on for as long as the descriptor is open, in place of the
    // machine's sysctl.
    let _statistics = enable_stats(Stats::RunTime).context("switching run time statistics on")?;
    let mut runs = Vec::new();
    let plain = Pins::of(&pair.arena.node)?;
    for (name, transport, to_host) in [
        ("pod to pod, UDP_RR", UDP_RR, false),
        ("pod to pod, UDP, 64 bytes", UDP_FLOW, false),
        ("pod to host, UDP_RR", UDP_RR, true),
        ("pod to host, UDP, 64 bytes", UDP_FLOW, true),
    ] {
        let mut flow = pair.flow(transport, to_host, cpu)?;
        runs.push(plain.time(PORT, name, || flow.run(slice).map(drop))?);
    }
    let publisher = Publisher::new(recipe)?;
    let pins = Pins::of(&publisher.arena.node)?;
    publisher.time(&pins, slice, cpu, &mut runs)?;
    // Some are loaded only where they are needed.
    let programs = PROGRAMS
        .iter()
        .filter(|name| pins.path(name).is_ok())
        .map(|name| {
            let info = pins.info(name)?;
            Ok(Program {
                name: (*name).to_owned(),
                verified: info.verified_instruction_count(),
                jited: info.size_jitted(),
            })
        })
        .collect::<Result<_>>()?;
    Ok(Programs { programs, runs })
}

/// A node with a published port.
struct Publisher {
    arena: Arena,
    outside: Outside,
    /// A pod with the port, and one without.
    server: Sandbox,
    other: Sandbox,
    server_v4: IpAddr,
    other_v4: IpAddr,
    host_v4: IpAddr,
}

impl Publisher {
    fn new(recipe: &Recipe) -> Result<Self> {
        let arena = Arena::new(Contender::BpfBridge, recipe)?;
        let outside = arena.node.outside()?;
        let server = arena.node.sandbox("server")?;
        let other = arena.node.sandbox("other")?;
        let ports = json!([
            {"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": "udp"},
            {"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": "tcp"},
        ]);
        let publishing = server.attachment().capability(PORT_MAPPINGS, ports);
        let added = arena.node.within(|| arena.add_here(&publishing))?;
        let server_v4 = added.v4("address")?;
        let host_v4 = added.v4("gateway")?;
        let other_v4 = arena.add(&other)?.v4("address")?;
        Ok(Self {
            arena,
            outside,
            server,
            other,
            server_v4,
            other_v4,
            host_v4,
        })
    }

    /// Measures every way that a packet can take.
    fn time(
        &self,
        pins: &Pins<'_>,
        slice: Duration,
        cpu: usize,
        runs: &mut Vec<Timed>,
    ) -> Result<()> {
        let node: &Namespace = &self.arena.node;
        let ends = |from, to, listen: (IpAddr, u16), through: Option<SocketAddr>| Ends {
            from,
            to,
            listen: listen.into(),
            through,
            cpu,
        };
        let port = SocketAddr::from((Outside::NODE_V4, HOST_PORT));
        let published = || {
            let server = (self.server_v4, POD_PORT);
            ends(&self.outside, &self.server, server, Some(port))
        };
        let to_other = || ends(&self.server, &self.other, (self.other_v4, 0), None);
        let to_host = |pod| ends(pod, node, (self.host_v4, 0), None);
        let uplink = (Outside::NODE_V4.into(), 0);
        let not_published = || ends(&self.outside, node, uplink, None);
        let tests: [(&'static str, &str, Ends<'_>, Transport); 9] = [
            (
                PORT,
                "pod to pod, UDP, 64 bytes, a port is published",
                to_other(),
                UDP_FLOW,
            ),
            (
                PORT,
                "pod to host, UDP_RR, another pod's port is published",
                to_host(&self.other),
                UDP_RR,
            ),
            (
                PORT,
                "pod to host, UDP, 64 bytes, another pod's port is published",
                to_host(&self.other),
                UDP_FLOW,
            ),
            (
                PORT,
                "pod to host, UDP_RR, a port of it is published",
                to_host(&self.server),
                UDP_RR,
            ),
            (
                PORT,
                "reply of a published port, UDP_RR",
                published(),
                UDP_RR,
            ),
            (UPLINK, "to a published port, UDP_RR", published(), UDP_RR),
            (
                UPLINK,
                "to a published port, UDP, 64 bytes",
                published(),
                UDP_FLOW,
            ),
            (
                UPLINK,
                "to the node itself, UDP_RR",
                not_published(),
                UDP_RR,
            ),
            (
                UPLINK,
                "to the node itself, UDP, 64 bytes",
                not_published(),
                UDP_FLOW,
            ),
        ];
        for (program, name, ends, transport) in tests {
            let mut flow = Flow::start(&ends, transport)?;
            runs.push(pins.time(program, name, || flow.run(slice).map(drop))?);
        }
        // The last: a process of the node that talks to another. Nothing is
        // published there.
        let local = || ends(node, node, (IpAddr::from([127, 0, 0, 1]), 0), None);
        for (program, name, ends) in [
            (PORT, "replies of a published port, TCP_CRR", published()),
            (UPLINK, "to a published port, TCP_CRR", published()),
            (CONNECT, "connect to what is not published", local()),
        ] {
            let connector = Connector::start(&ends)?;
            runs.push(pins.time(program, name, || connector.run(slice).map(drop))?);
        }
        Ok(())
    }
}

/// What a node has pinned.
pub(super) struct Pins<'a> {
    node: &'a Node,
    pub(super) paths: Vec<PathBuf>,
}

impl<'a> Pins<'a> {
    pub(super) fn of(node: &'a Node) -> Result<Self> {
        let paths = node.within(|| {
            let mut paths = Vec::new();
            find(Path::new(PINS), &mut paths)?;
            Ok(paths)
        })?;
        Ok(Self { node, paths })
    }

    /// How long `program` runs while there is `traffic`; what comes first warms up.
    fn time(
        &self,
        program: &'static str,
        name: &str,
        mut traffic: impl FnMut() -> Result<()>,
    ) -> Result<Timed> {
        traffic()?;
        let mut means = Vec::new();
        for _ in 0..SLICES {
            let before = self.info(program)?;
            traffic()?;
            let after = self.info(program)?;
            let count = after.run_count() - before.run_count();
            ensure!(count > 0, "the program {program} did not run for {name}");
            let time = after.run_time() - before.run_time();
            means.push(time.as_nanos() as f64 / count as f64);
        }
        let summary = Summary::of(&means).context("nothing was measured")?;
        Ok(Timed {
            program,
            traffic: name.to_owned(),
            time: summary.median,
        })
    }

    /// The pin of this name.
    pub(super) fn path(&self, name: &str) -> Result<&Path> {
        self.paths
            .iter()
            .find(|path| path.file_name().is_some_and(|file| file == name))
            .map(PathBuf::as_path)
            .with_context(|| format!("no program {name} below {PINS}"))
    }

    /// The kernel's account of a program, of which it, or its link, is pinned.
    fn info(&self, name: &str) -> Result<ProgramInfo> {
        let path = self.path(name)?;
        self.node.within(|| {
            if !path
                .parent()
                .is_some_and(|directory| directory.ends_with("links"))
            {
                return ProgramInfo::from_pin(path)
                    .with_context(|| format!("opening the pin {}", path.display()));
            }
            let link = FdLink::from(PinnedLink::from_pin(path)?);
            let id = link.info()?.program_id();
            loaded_programs()
                .filter_map(Result::ok)
                .find(|info| info.id() == id)
                .with_context(|| format!("no program at the link {}", path.display()))
        })
    }
}

fn find(directory: &Path, pins: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), pins)?;
        } else {
            pins.push(entry.path());
        }
    }
    Ok(())
}
