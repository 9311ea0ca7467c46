//! `cargo xtask demo`: a node with three pods, what the plugin set up for them,
//! traffic between all that can talk, and a page behind a published port.
//!
//! The node, the pods and the machine outside are namespaces that live in this
//! process's file descriptors, pins and leases included (see
//! [`bpf_bridge_tests`]). So the kernel cleans up whenever this process ends,
//! by whatever signal.

mod picture;
mod published;
mod traffic;

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use bpf_bridge_tests::{Network, Node, Pod, Snapshot};
use serde_json::{Value, json};

use crate::{
    build,
    process::workspace,
    setup::{self, Purpose},
};

/// The conflist that the pods are attached with.
const CONFLIST: &str = "examples/10-bpf-bridge.conflist";

/// `cargo xtask demo`.
pub(crate) fn run() -> Result<()> {
    setup::programs(Purpose::Demo)?;
    let binary = build::plugin()?;

    let node = Node::with_plugin(&binary)?;
    let outside = node.outside()?;
    let empty = Snapshot::take(&node)?;

    let conflist = conflist()?;
    let network = Network::from_list(&node, conflist.clone());
    // The pods' addresses are not translated on their way out: what is outside
    // must know the way back.
    for subnet in subnets(&conflist) {
        outside.route_to_node(subnet)?;
    }

    println!("A runtime attaches three pods to {CONFLIST}:\n");
    let pods = [
        ("pod-a", json!([])),
        ("pod-b", published::mappings()),
        ("pod-c", json!([])),
    ]
    .into_iter()
    .map(|(name, ports)| add(&network, name, ports))
    .collect::<Result<Vec<_>>>()?;
    println!(
        "\nThe first of them loaded the programs, and the first with a published port those for it, as \
         happens once after a boot."
    );

    let gateway = text(&conflist["plugins"][0], "bridge")?;
    picture::draw(&node, &outside, &pods, gateway)?;
    traffic::measure(&node, &outside, &pods)?;
    if let [a, b, ..] = &pods[..] {
        published::fetch(&node, &outside, a, b)?;
    }
    picture::counters(&node, &pods)?;

    println!("\nThe runtime detaches them:\n");
    for pod in pods {
        del(&network, &pod)?;
    }
    let left = empty.changes(&Snapshot::take(&node)?);
    println!("\nLeft on the node for the next pod, as a bridge would be:\n");
    for change in left.iter().filter(|change| change.starts_with("+device")) {
        println!("  {}", change.trim_start_matches("+device "));
    }
    println!("\nThe namespaces of the demo end with it; nothing of this machine was touched.");
    Ok(())
}

/// The conflist of the project, as a runtime reads it.
fn conflist() -> Result<Value> {
    let path = workspace().join(CONFLIST);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))
}

/// The subnets of the pods' addresses.
fn subnets(conflist: &Value) -> impl Iterator<Item = &str> {
    let sets = conflist["plugins"][0]["ipam"]["ranges"].as_array();
    sets.into_iter()
        .flatten()
        .flat_map(|set| set.as_array().into_iter().flatten())
        .filter_map(|range| range["subnet"].as_str())
}

/// Makes a sandbox, attaches it with published ports, and says so.
fn add(network: &Network<'_>, name: &str, ports: Value) -> Result<Pod> {
    let sandbox = network.node().sandbox(name)?;
    let attachment = sandbox.attachment().capability("portMappings", ports);
    let start = Instant::now();
    let pod = network.pod_with(sandbox, attachment)?;
    let addresses: Vec<_> = pod.addresses().iter().map(ToString::to_string).collect();
    println!(
        "  ADD {name}  {:>8}  {}",
        milliseconds(start.elapsed()),
        addresses.join("  ")
    );
    Ok(pod)
}

/// Detaches a pod, and says so.
fn del(network: &Network<'_>, pod: &Pod) -> Result<()> {
    let start = Instant::now();
    network.del(pod.attachment())?;
    println!("  DEL {}  {:>8}", pod.name(), milliseconds(start.elapsed()));
    Ok(())
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

/// The elements of a JSON array; none of anything else.
fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The JSON string at `key`.
fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key]
        .as_str()
        .ok_or_else(|| anyhow!("no {key} in {value}"))
}
