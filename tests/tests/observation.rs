//! What an operator can see of the programs at work: the log, and the counters.

use std::{collections::BTreeMap, fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Frame, MacAddr, Network, Node, PacketSocket, Pod, wait_for};
use serde_json::{Value, json};

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);
/// A station that no one has heard of.
const STRANGER: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x77]);
/// An ethertype for experiments (IEEE 802).
const EXPERIMENTAL: u16 = 0x88b5;
/// Where the counters are pinned.
const STATS: &str = "/sys/fs/bpf/bpf-bridge/v1/maps/STATS";

fn experimental(destination: MacAddr, source: MacAddr) -> Frame {
    Frame::new(destination, source, EXPERIMENTAL, &[0x5a; 46])
}

/// A pod's own MAC address and a socket that sends from its `eth0`.
fn eth0(pod: &Pod) -> Result<(PacketSocket, MacAddr)> {
    Ok((
        PacketSocket::open(pod, "eth0")?,
        MacAddr::of_device(pod, "eth0")?,
    ))
}

fn port_of(node: &Node, pod: &Pod) -> Result<u64> {
    node.device(pod.host_veth()?)?["ifindex"]
        .as_u64()
        .context("no ifindex")
}

#[test]
fn the_log_shows_the_drops_of_networks_that_log_and_of_no_other() -> Result<()> {
    let node = Node::new()?;
    let quiet = Network::new(&node, Network::dual_stack(&node));
    let at_quiet = quiet.pod("quiet")?;
    let program = format!("{}/{}", Node::CNI_PATH, node.plugin());
    let log = || {
        let mut command = Command::new(&program);
        command.arg("log");
        command
    };
    // Where nobody logs, it says how to.
    let output = node.output(&mut log())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && said.contains("logLevel"),
        "{output:?}"
    );

    let mut config = Network::dual_stack(&node);
    config["name"] = json!("loud");
    config["bridge"] = json!("cni1");
    config["logLevel"] = json!("debug");
    config["ipam"]["ranges"] = json!([[{"subnet": "10.78.0.0/16"}]]);
    let loud = Network::new(&node, config);
    let at_loud = loud.pod("loud")?;

    let path = std::env::temp_dir().join(format!("bpf-bridge-log-{}", std::process::id()));
    let follower = node.spawn(&log(), &path)?;
    for pod in [&at_quiet, &at_loud] {
        let (socket, own) = eth0(pod)?;
        socket.send(&experimental(own, own))?;
    }
    let expected = format!("port {}: drop", port_of(&node, &at_loud)?);
    let shown = wait_for("line of the drop", PATIENCE, || {
        Ok(fs::read_to_string(&path)?.contains(&expected))
    });
    drop(follower);
    let lines = fs::read_to_string(&path)?;
    fs::remove_file(&path)?;
    shown.with_context(|| lines.clone())?;
    let silent = format!("port {}:", port_of(&node, &at_quiet)?);
    ensure!(!lines.contains(&silent), "{lines}");
    Ok(())
}

/// A port's counters over all CPUs, in the order of the map's value.
fn counters(node: &Node, port: u64) -> Result<Vec<u64>> {
    let dump = node.json(&format!("bpftool -j map dump pinned {STATS}"))?;
    let bytes = |value: &Value| -> Result<Vec<u8>> {
        let bytes = value.as_array().context("no bytes")?;
        bytes
            .iter()
            .map(|byte| {
                let byte = byte.as_str().context("no byte")?;
                Ok(u8::from_str_radix(byte.trim_start_matches("0x"), 16)?)
            })
            .collect()
    };
    for entry in dump.as_array().into_iter().flatten() {
        let key: [u8; 4] = bytes(&entry["key"])?.try_into().ok().context("a key")?;
        if u64::from(u32::from_ne_bytes(key)) != port {
            continue;
        }
        let mut sums = Vec::new();
        for cpu in entry["values"].as_array().into_iter().flatten() {
            let value = bytes(&cpu["value"])?;
            sums.resize(value.len() / 8, 0);
            for (sum, word) in sums.iter_mut().zip(value.chunks_exact(8)) {
                *sum += u64::from_ne_bytes(word.try_into()?);
            }
        }
        return Ok(sums);
    }
    anyhow::bail!("port {port} has no counters in {dump}")
}

#[test]
fn every_drop_is_counted_by_port_and_reason() -> Result<()> {
    /// Flooded, answered; then the drops.
    const DROPS: usize = 2;
    let node = Node::new()?;
    let mut config = Network::dual_stack(&node);
    config["macspoofchk"] = json!(true);
    config["portIsolation"] = json!(true);
    let network = Network::new(&node, config);
    let (a, b) = (network.pod("a")?, network.pod("b")?);
    let (socket, own) = eth0(&a)?;
    let (_, other) = eth0(&b)?;
    let (port, bystander) = (port_of(&node, &a)?, port_of(&node, &b)?);
    let before = (counters(&node, port)?, counters(&node, bystander)?);

    let pause = MacAddr([0x01, 0x80, 0xc2, 0, 0, 0x01]);
    let group = MacAddr([0x01, 0, 0x5e, 0, 0, 0x01]);
    // The number of a reason, a frame that is dropped for it, and how often.
    let drops = [
        (2, experimental(other, group), 2),
        (3, experimental(other, STRANGER), 3),
        (4, experimental(other, own), 4),
        (5, experimental(own, own), 5),
        (6, experimental(pause, own), 6),
    ];
    let mut expected = BTreeMap::new();
    for (reason, frame, times) in &drops {
        for _ in 0..*times {
            socket.send(frame)?;
        }
        expected.insert(*reason, *times);
    }
    let mut after = Vec::new();
    let counted = wait_for("counted drops", PATIENCE, || {
        after = counters(&node, port)?;
        Ok((0..after.len() - DROPS).all(|reason| {
            let index = DROPS + reason;
            after[index] - before.0[index] == expected.get(&reason).copied().unwrap_or(0)
        }))
    });
    counted.with_context(|| format!("{:?}, then {after:?}", before.0))?;
    ensure!(
        counters(&node, bystander)?[DROPS..] == before.1[DROPS..],
        "drops of another port were counted"
    );
    Ok(())
}
