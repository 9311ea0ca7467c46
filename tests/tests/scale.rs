//! What a call costs, and that it costs the same on a full node.

use std::{collections::BTreeMap, fmt::Write as _, process::Command};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Call, Network, Node, Verb};
use serde_json::json;

/// How many pods a full node has.
const MANY: u32 = 10_000;
/// The aim for a call's peak memory, in bytes.
const MEMORY: u64 = 12_000_000;

/// Fills every table with entries that belong to no device, and makes as many
/// records and leases.
fn fill(node: &Node) -> Result<()> {
    let mut batch = String::new();
    for pin in node.run("find /sys/fs/bpf/bpf-bridge -type f")?.lines() {
        let Ok(map) = node.json(&format!("bpftool -j map show pinned {pin}")) else {
            continue;
        };
        if !map["type"].as_str().unwrap_or("").contains("hash") {
            continue;
        }
        let size =
            |key: &str| -> Result<usize> { Ok(map[key].as_u64().context("no size")?.try_into()?) };
        let (key, value) = (size("bytes_key")?, size("bytes_value")?);
        let limit = u32::try_from(size("max_entries")?)?;
        for number in 0..MANY.min(limit / 4 * 3) {
            // No device has such an index.
            let mut bytes = (0x7000_0000 + number).to_ne_bytes().to_vec();
            bytes.resize(key, 0);
            let hex = |bytes: &[u8]| {
                bytes.iter().fold(String::new(), |mut hex, byte| {
                    let _ = write!(hex, " {byte:02x}");
                    hex
                })
            };
            writeln!(
                batch,
                "map update pinned {pin} key hex{} value hex{}",
                hex(&bytes),
                hex(&vec![0x70; value])
            )?;
        }
    }
    let script = format!(
        r#"cat >/run/batch
# The kernel makes memory for entries in the background, and so many at once may
# overtake it: the same again is no harm.
tries=0
until bpftool batch file /run/batch >/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 20 ]
    sleep 0.2
done
records=/run/bpf-bridge/attachments/net leases=/var/lib/cni/networks/net
mkdir -p $records
i=0
while [ $i -lt {MANY} ]; do
    : >$records/many-$i:eth0
    printf 'many-%s\r\neth0' $i >$leases/10.77.$((100 + i / 250)).$((i % 250))
    i=$((i + 1))
done"#
    );
    node.within(|| {
        let mut shell = Command::new("sh")
            .args(["-ec", &script])
            .stdin(std::process::Stdio::piped())
            .spawn()?;
        std::io::Write::write_all(&mut shell.stdin.take().context("stdin")?, batch.as_bytes())?;
        ensure!(shell.wait()?.success(), "filling the tables");
        Ok(())
    })
}

/// How often the plugin calls each function of the kernel in an ADD and a DEL.
fn calls(node: &Node, name: &str) -> Result<BTreeMap<String, usize>> {
    let mut config = Network::dual_stack(node);
    config["type"] = json!("traced");
    let network = Network::new(node, config);
    node.run("rm -f /run/trace")?;
    let pod = network.pod(name)?;
    network.del(pod.attachment())?;
    let mut counts = BTreeMap::new();
    for line in node.read("/run/trace")?.lines() {
        let call = line
            .split_whitespace()
            .nth(1)
            .and_then(|rest| rest.split_once('('));
        if let Some((call, _)) = call {
            *counts.entry(call.to_owned()).or_default() += 1;
        }
    }
    Ok(counts)
}

#[test]
fn an_add_and_a_del_do_the_same_with_ten_thousand_pods_as_with_one() -> Result<()> {
    let node = Node::new()?;
    node.install_script(
        "traced",
        &format!(
            "#!/bin/sh\nexec strace -f -qq -A -o /run/trace {}/{}\n",
            Node::CNI_PATH,
            node.plugin()
        ),
    )?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let _stays = network.pod("stays")?;
    calls(&node, "first")?;
    let few = calls(&node, "few")?;
    fill(&node)?;
    // What others leased is taken note of once.
    calls(&node, "notes")?;
    let many = calls(&node, "many")?;
    // What scans a table, a directory, or devices; not what waits.
    for call in ["bpf", "getdents64", "sendto", "openat", "unlink"] {
        ensure!(
            few.get(call) == many.get(call),
            "{call}: {few:?}\nthen {many:?}"
        );
    }
    ensure!(few.get("bpf").is_some_and(|&count| count > 10), "{few:?}");
    Ok(())
}

#[test]
fn a_call_needs_little_memory() -> Result<()> {
    let node = Node::new()?;
    let mut config = Network::dual_stack(&node);
    config["cniVersion"] = json!("1.1.0");
    // On a fresh node: STATUS has the programs verified, and ADD loads them.
    let sandbox = node.sandbox("pod")?;
    let mut previous = json!(null);
    for verb in [
        Verb::Version,
        Verb::Status,
        Verb::Add,
        Verb::Check,
        Verb::Gc,
        Verb::Del,
    ] {
        if verb == Verb::Check {
            config["prevResult"] = previous.clone();
        }
        if verb == Verb::Gc {
            config["cni.dev/valid-attachments"] = json!([
                {"containerID": "pod", "ifname": "eth0"},
            ]);
        }
        let reply = Call::new(node.plugin(), verb)
            .attachment(&sandbox.attachment())
            .stdin(&config)
            .run(&node)?;
        let result = reply.success()?;
        if verb == Verb::Add {
            previous = result;
        }
        ensure!(
            reply.peak_rss < MEMORY,
            "{verb:?} had {} bytes resident",
            reply.peak_rss
        );
    }
    Ok(())
}

#[test]
fn the_binary_needs_nothing_of_the_node() -> Result<()> {
    let node = Node::new()?;
    node.run("mkdir /run/empty")?;
    node.run(&format!(
        "cp {}/{} /run/empty/plugin",
        Node::CNI_PATH,
        node.plugin()
    ))?;
    node.install_script(
        "alone",
        "#!/bin/sh\nexec env -i CNI_COMMAND=VERSION $(command -v chroot) /run/empty /plugin\n",
    )?;
    let reply = Call::new("alone", Verb::Version)
        .stdin(r#"{"cniVersion": "1.1.0"}"#)
        .run(&node)?;
    ensure!(
        reply.success()?["cniVersion"] == "1.1.0",
        "{}",
        reply.stdout
    );
    Ok(())
}
