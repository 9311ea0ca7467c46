//! `cargo xtask bench`: bpf-bridge beside the stock plugins and beside what
//! cannot be beaten, in one run.
//!
//! Every contender has a node of its own, in namespaces; nothing else of the
//! machine is touched. They take turns, call by call and slice by slice, so that
//! whatever disturbs the machine disturbs all of them, and are compared turn by
//! turn.

mod bytecode;
mod floor;
mod frames;
mod latency;
mod machine;
mod masquerade;
mod measurement;
mod memory;
mod node;
mod peer;
mod ports;
mod program;
mod report;
mod statistics;
mod traffic;

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::Node;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::{
    build,
    process::{target_directory, workspace},
    setup::{self, Purpose},
};

use self::{measurement::Contender, node::Recipe, peer::PeerTask, report::Report, traffic::Pair};

/// What to measure, and how long.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Fewer pods, fewer and shorter rounds: less than two minutes.
    #[arg(long)]
    quick: bool,
    /// The directory of other stock plugins than Debian's.
    #[arg(long, value_name = "DIR", default_value = Node::STOCK_PLUGINS)]
    stock: PathBuf,
    /// Another build of bpf-bridge, which takes the place of the stock plugins:
    /// whether a change made it faster.
    #[arg(long, value_name = "FILE", conflicts_with = "stock")]
    against: Option<PathBuf>,
    /// Only these contenders.
    #[arg(long, value_delimiter = ',', value_name = "CONTENDERS")]
    only: Vec<Contender>,
    /// Only these parts.
    #[arg(long, value_delimiter = ',', value_name = "PARTS")]
    part: Vec<Part>,
    /// Only traffic whose name contains this, as in "UDP_RR".
    #[arg(long, value_name = "TEXT", default_value = "")]
    matching: String,
    /// A plugin that is built already, in place of the workspace's.
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,
    /// Be the other end of traffic: how the bench calls itself.
    #[arg(long, hide = true)]
    peer: Option<PeerTask>,
}

/// A part of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Part {
    /// Packets, pod to pod and pod to host.
    Traffic,
    /// The kernel's account of the eBPF programs, and one frame at a time.
    Programs,
    /// Published ports: connections, ADD and DEL.
    Ports,
    /// Masquerade: what pods ask of a machine outside.
    Masquerade,
    /// ADD and DEL.
    Calls,
}

/// How much is measured.
struct Settings {
    contenders: Vec<Contender>,
    /// What a kind of traffic must have in its name.
    matching: String,
    /// Rounds of traffic, and how long each contender's turn is.
    rounds: usize,
    slice: Duration,
    /// ADDs and DELs with each number of pods.
    calls: usize,
    /// Numbers of pods.
    levels: Vec<usize>,
    /// How often many calls are made at once.
    crowds: usize,
    /// Numbers of published ports on the node, by how many of them a pod has.
    ports: Vec<(usize, Vec<usize>)>,
    /// Rounds of traffic through one of them.
    port_rounds: usize,
    /// ADDs and DELs: of how many ports, and how often.
    port_calls: Vec<(usize, usize)>,
    /// Rounds of masqueraded traffic.
    masquerade_rounds: usize,
    /// Where both ends of all traffic run.
    cpu: usize,
}

/// The progress bar; its length is the estimated time in ms.
struct Plan {
    bar: ProgressBar,
}

impl Plan {
    fn new(length: u64) -> Result<Self> {
        let bar = ProgressBar::new(length);
        bar.set_style(ProgressStyle::with_template(
            "{bar:30} {percent:>3} %, {eta} left: {msg}",
        )?);
        Ok(Self { bar })
    }

    fn say(&self, what: String) {
        self.bar.set_message(what);
    }

    fn advance(&self, milliseconds: u64) {
        self.bar.inc(milliseconds);
    }
}

/// `cargo xtask bench`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if let Some(peer) = arguments.peer {
        return peer.run();
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "not root: nodes are namespaces, which only root can make"
    );
    setup::programs(Purpose::Bench)?;
    let plugin = match &arguments.plugin {
        Some(plugin) => plugin.clone(),
        None => build::plugin()?,
    };
    let stock = fs::canonicalize(&arguments.stock)
        .with_context(|| format!("looking for {}", arguments.stock.display()))?;
    let disk = target_directory().join("xtask");
    fs::create_dir_all(&disk).with_context(|| format!("creating {}", disk.display()))?;
    let recipe = Recipe {
        plugin,
        stock,
        against: arguments.against.clone(),
        disk,
    };
    let settings = Settings::new(arguments)?;
    let report = measure(arguments, &settings, &recipe)?;
    let path = workspace().join(format!(
        "bench-results/{}.json",
        SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs()
    ));
    report.write(&path)?;
    println!("{}", report.table());
    for note in &report.notes {
        println!("{note}");
    }
    println!(
        "The interval of a comparison is that of the median, with 95 % confidence; \"same\": \
         the difference is smaller than the noise.\nAll samples: {}",
        path.display()
    );
    Ok(())
}

fn measure(arguments: &Arguments, settings: &Settings, recipe: &Recipe) -> Result<Report> {
    let wanted = |part| arguments.part.is_empty() || arguments.part.contains(&part);
    let mut length = 0;
    if wanted(Part::Traffic) {
        length += traffic::estimate(settings);
    }
    if wanted(Part::Ports) {
        length += ports::estimate(settings);
    }
    if wanted(Part::Masquerade) {
        length += masquerade::estimate(settings);
    }
    if wanted(Part::Calls) {
        length += latency::estimate(settings);
    }
    let plan = Plan::new(length)?;
    let mut report = Report {
        machine: machine::describe(recipe, settings.cpu),
        settings: settings.to_json(),
        against: recipe.against.clone(),
        measurements: Vec::new(),
        notes: Vec::new(),
        programs: None,
        first_memory: Vec::new(),
        memory: Vec::new(),
        port_memory: Vec::new(),
        sizes: settings
            .contenders
            .iter()
            .filter_map(|&contender| Some((contender, size(contender, recipe)?)))
            .collect(),
    };
    if wanted(Part::Traffic) || wanted(Part::Programs) {
        plan.say("making nodes".to_owned());
        let mut pairs = Vec::new();
        for &contender in &settings.contenders {
            pairs.push(Pair::new(contender, recipe)?);
        }
        if wanted(Part::Traffic) {
            report.measurements = traffic::measure(settings, &pairs, &plan)?;
        }
        let ours = pairs
            .iter()
            .find(|pair| pair.arena.contender == Contender::BpfBridge);
        if let Some(ours) = ours.filter(|_| wanted(Part::Programs)) {
            plan.say("run time of the programs".to_owned());
            report.programs = Some(program::measure(
                ours,
                recipe,
                settings.slice,
                settings.cpu,
            )?);
            plan.say("one frame at a time".to_owned());
            let frames = frames::measure(&pairs, recipe, settings.cpu)?;
            report.measurements.extend(frames);
            report.notes.push(frames::NOTE.to_owned());
        }
    }
    if wanted(Part::Masquerade) {
        let masquerade = masquerade::measure(settings, recipe, &plan)?;
        report.measurements.extend(masquerade);
        report.notes.push(masquerade::NOTE.to_owned());
    }
    let mut published = None;
    if wanted(Part::Ports) {
        let ports = published.insert(ports::measure(settings, recipe, &plan)?);
        report.measurements.append(&mut ports.measurements);
        report.notes.append(&mut ports.notes);
        report.port_memory.append(&mut ports.memory);
    }
    // Last, because thousands of namespaces are taken down afterwards.
    if wanted(Part::Calls) {
        let latency = latency::measure(settings, recipe, &plan)?;
        report.measurements.extend(latency.measurements);
        report.first_memory = latency.first_memory;
        report.memory = latency.memory;
    }
    plan.bar.finish_and_clear();
    // Taking its nodes down would have disturbed the calls.
    drop(published);
    Ok(report)
}

/// The size of what a contender runs for a call.
fn size(contender: Contender, recipe: &Recipe) -> Option<u64> {
    let files = match contender {
        Contender::BpfBridge => vec![recipe.plugin.clone()],
        Contender::Stock if recipe.against.is_some() => recipe.against.iter().cloned().collect(),
        Contender::Stock => ["bridge", "host-local", "portmap"]
            .map(|name| recipe.stock.join(name))
            .into(),
        Contender::Floor => return None,
    };
    files
        .iter()
        .map(|file| Some(fs::metadata(file).ok()?.len()))
        .sum()
}

impl Settings {
    fn new(arguments: &Arguments) -> Result<Self> {
        let contenders: BTreeSet<Contender> = if arguments.only.is_empty() {
            Contender::value_variants().iter().copied().collect()
        } else {
            arguments.only.iter().copied().collect()
        };
        // The last one: interrupts of devices usually go to the first.
        let cpu = std::thread::available_parallelism()?.get() - 1;
        let contenders = contenders.into_iter().collect();
        let matching = arguments.matching.clone();
        Ok(if arguments.quick {
            Self {
                contenders,
                matching,
                rounds: 20,
                slice: Duration::from_millis(60),
                calls: 20,
                levels: vec![0, 100],
                crowds: 2,
                ports: vec![(1, vec![1, 1000])],
                port_rounds: 12,
                port_calls: vec![(0, 6), (1, 6), (100, 1)],
                masquerade_rounds: 9,
                cpu,
            }
        } else {
            Self {
                contenders,
                matching,
                rounds: 60,
                slice: Duration::from_millis(200),
                calls: 100,
                levels: vec![0, 100, 1000],
                crowds: 6,
                ports: vec![(1, vec![1, 100, 1000]), (100, vec![1000, 10_000])],
                port_rounds: 15,
                port_calls: vec![(0, 20), (1, 20), (10, 15), (100, 6), (500, 3)],
                masquerade_rounds: 15,
                cpu,
            }
        })
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "contenders": self.contenders.iter().map(|contender| contender.name()).collect::<Vec<_>>(),
            "rounds": self.rounds,
            "sliceMs": u64::try_from(self.slice.as_millis()).ok(),
            "calls": self.calls,
            "pods": self.levels,
            "callsAtOnce": latency::AT_ONCE,
            "crowds": self.crowds,
            "portsByThoseOfAPod": self.ports,
            "portRounds": self.port_rounds,
            "portCalls": self.port_calls,
            "masqueradeRounds": self.masquerade_rounds,
        })
    }
}
