//! `cargo xtask bench`: bpf-bridge beside the stock plugins and beside what
//! cannot be beaten, in one run.
//!
//! Every contender has a node of its own, in namespaces; nothing else of the
//! machine is touched. They take turns, call by call and slice by slice, so that
//! whatever disturbs the machine disturbs all of them, and are compared turn by
//! turn.

mod bytecode;
mod calls;
mod cpu;
mod floor;
mod frames;
mod generators;
mod machine;
mod measurement;
mod memory;
mod node;
mod pair;
mod paths;
mod peer;
mod ports;
mod program;
mod report;
mod rules;
mod run;
mod statistics;
mod traffic;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::Node;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::{
    build,
    process::{target_directory, workspace},
    setup::{self, Purpose},
};

use self::{
    machine::Machine,
    measurement::{Contender, Fact},
    node::{Backend, Recipe},
    peer::PeerTask,
    report::Report,
    run::{Run, Step},
};

/// What to measure, and how long.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Fewer pods, fewer and shorter rounds: less than two minutes.
    #[arg(long)]
    quick: bool,
    /// The directory of other stock plugins than Debian's.
    #[arg(long, value_name = "DIR", default_value = Node::STOCK_PLUGINS)]
    stock: PathBuf,
    /// What the stock plugins write their rules with; Debian's know iptables only.
    #[arg(long, value_enum, default_value = "iptables")]
    stock_backend: Backend,
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
    /// Only traffic whose name contains this, as in "pod to pod, UDP_RR".
    #[arg(long, value_name = "TEXT", default_value = "")]
    matching: String,
    /// Begin anew, even if the last run was interrupted and could go on.
    #[arg(long)]
    fresh: bool,
    /// Measure nothing: write the page of the result FILE once more, beside it.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "quick", "stock", "stock_backend", "against", "only", "part", "matching", "fresh", "plugin",
    ])]
    render: Option<PathBuf>,
    /// With --render: make docs/benchmarks.md and the README's lines of it, too.
    #[arg(long, requires = "render")]
    docs: bool,
    /// A plugin that is built already, in place of the workspace's.
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,
    /// Be the other end of traffic: how the bench calls itself.
    #[arg(long, hide = true)]
    peer: Option<PeerTask>,
}

/// A part of the bench. They are measured in this order: what takes down thousands of
/// namespaces afterwards comes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Part {
    /// All kinds of work on all paths.
    Traffic,
    /// The kernel's account of the eBPF programs, and one frame at a time.
    Programs,
    /// Published ports: connections, ADD, CHECK and DEL.
    Ports,
    /// ADD, CHECK and DEL, their memory and that of the kernel.
    Calls,
}

/// How much is measured.
struct Settings {
    contenders: Vec<Contender>,
    /// In the order in which they are measured.
    parts: Vec<Part>,
    /// What a kind of traffic must have in its name.
    matching: String,
    traffic: traffic::Plan,
    /// How long a contender's turn is in the other parts.
    slice: Duration,
    /// Numbers of pods, and how often each call is made beside them.
    calls: Vec<(usize, usize)>,
    /// On how many nodes the first ADD is measured.
    first_calls: usize,
    /// How often some callers make many calls.
    calls_at_once: usize,
    /// How often many calls are all made at once.
    crowds: usize,
    /// Numbers of published ports on the node, by how many of them a pod has.
    ports: Vec<(usize, Vec<usize>)>,
    /// Rounds of traffic through one of them, and how long each contender's turn is.
    port_rounds: usize,
    port_slice: Duration,
    /// How often each call is made beside them.
    port_calls: usize,
    /// Where both ends of all traffic run.
    cpu: usize,
}

/// `cargo xtask bench`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if let Some(peer) = arguments.peer {
        return peer.run();
    }
    if let Some(file) = &arguments.render {
        return render(file, arguments.docs);
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
        backend: arguments.stock_backend,
        against: arguments.against.clone(),
        disk,
    };
    let settings = Settings::new(arguments)?;
    let results = workspace().join("bench-results");
    let journal = results.join("unfinished.jsonl");
    if arguments.fresh && journal.exists() {
        fs::remove_file(&journal).with_context(|| format!("removing {}", journal.display()))?;
    }
    let steps: Vec<Step> = settings
        .parts
        .iter()
        .flat_map(|part| part.steps(&settings))
        .collect();
    let key = json!({"settings": settings.to_json(), "machine": machine::identity(&recipe)});
    let mut run = Run::open(&journal, &key, &steps)?;
    let machine = Machine::describe(&recipe, settings.cpu);
    for part in &settings.parts {
        part.measure(&settings, &recipe, &mut run)?;
    }
    let report = Report::new(
        machine.end(),
        settings.to_json(),
        recipe.against.clone(),
        run.end().clone(),
    );
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let path = results.join(format!("{seconds}.json"));
    report.write(&path)?;
    let page = path.with_extension("html");
    report.write_html(&page)?;
    println!("{}\n", report.table());
    println!("{}", report.headlines_for_terminal());
    println!("All samples: {}", path.display());
    println!("With plots:  {}", page.display());
    run.forget()
}

/// What a run leaves behind, made once more from the file with its samples.
fn render(file: &Path, docs: bool) -> Result<()> {
    let report = Report::read(file)?;
    let page = file.with_extension("html");
    report.write_html(&page)?;
    if docs {
        println!("{}", report.write_docs(workspace())?);
    } else {
        println!("{}\n", report.table());
        println!("{}", report.headlines_for_terminal());
    }
    println!("With plots: {}", page.display());
    Ok(())
}

impl Part {
    /// What is done in this part, in its order.
    fn steps(self, settings: &Settings) -> Vec<Step> {
        match self {
            Self::Traffic => traffic::steps(settings),
            Self::Programs => program::steps(),
            Self::Ports => ports::steps(settings),
            Self::Calls => calls::steps(settings),
        }
    }

    fn measure(self, settings: &Settings, recipe: &Recipe, run: &mut Run) -> Result<()> {
        match self {
            Self::Traffic => traffic::measure(settings, recipe, run),
            Self::Programs => program::measure(settings, recipe, run),
            Self::Ports => ports::measure(settings, recipe, run),
            Self::Calls => calls::measure(settings, recipe, run),
        }
    }
}

/// Bytes, told in MB.
fn megabytes(name: &str, bytes: &[(Contender, u64)]) -> Fact {
    Fact {
        name: name.to_owned(),
        unit: "MB".to_owned(),
        values: bytes
            .iter()
            .map(|&(contender, bytes)| (contender, bytes as f64 / 1e6))
            .collect(),
    }
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
        let mut parts = match &arguments.part[..] {
            [] => Part::value_variants().to_vec(),
            some => some.to_vec(),
        };
        parts.sort_unstable();
        parts.dedup();
        Ok(if arguments.quick {
            Self {
                contenders,
                parts,
                matching,
                traffic: traffic::Plan::QUICK,
                slice: Duration::from_millis(60),
                calls: vec![(0, 6), (100, 6)],
                first_calls: 2,
                calls_at_once: 1,
                crowds: 0,
                ports: vec![(1, vec![1, 1000])],
                port_rounds: 6,
                port_slice: Duration::from_millis(60),
                port_calls: 2,
                cpu,
            }
        } else {
            Self {
                contenders,
                parts,
                matching,
                traffic: traffic::Plan::FULL,
                slice: Duration::from_millis(200),
                calls: vec![(0, 40), (100, 30), (1000, 12)],
                first_calls: 6,
                calls_at_once: 4,
                crowds: 1,
                ports: vec![(1, vec![1, 100, 1000]), (100, vec![100, 1000, 10_000])],
                port_rounds: 10,
                port_slice: Duration::from_millis(100),
                port_calls: 6,
                cpu,
            }
        })
    }

    fn to_json(&self) -> Value {
        json!({
            "contenders": self.contenders.iter().map(|contender| contender.name()).collect::<Vec<_>>(),
            "parts": self.parts.iter().map(|part| format!("{part:?}").to_lowercase()).collect::<Vec<_>>(),
            "matching": self.matching,
            "traffic": self.traffic,
            "sliceMs": u64::try_from(self.slice.as_millis()).ok(),
            "callsByPods": self.calls,
            "firstCalls": self.first_calls,
            "callsAtATime": calls::AT_ONCE,
            "roundsOfThese": self.calls_at_once,
            "callsAtOnce": calls::CROWD,
            "crowds": self.crowds,
            "portsByThoseOfAPod": self.ports,
            "portRounds": self.port_rounds,
            "portSliceMs": u64::try_from(self.port_slice.as_millis()).ok(),
            "portCalls": self.port_calls,
        })
    }
}
