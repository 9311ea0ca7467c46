//! Another binary for pods that are attached: of the same layout of the maps, of a later and
//! of an earlier one, while everything that a network can carry flows; and pins that are not
//! the plugin's.

mod layouts;
mod load;
mod pins;
mod same;

use std::{
    collections::BTreeMap,
    env, fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Network, Node, Pod, plugin_binary};
use serde_json::{Value, json};

/// Where the pins are.
const ROOT: &str = "/sys/fs/bpf/bpf-bridge";
/// The port on the node.
const HOST_PORT: u16 = 8080;
/// The port in the pod.
const POD_PORT: u16 = 80;
/// The gateway of [`network`].
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));

/// A dual-stack network that publishes ports and is masqueraded.
fn network(node: &Node, xdp: bool) -> Network<'_> {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    config["ipMasq"] = json!(true);
    config["capabilities"] = json!({"portMappings": true});
    if xdp {
        config["xdpUplinks"] = json!(["uplink0"]);
    }
    Network::new(node, config)
}

/// [`HOST_PORT`] to [`POD_PORT`], for TCP and UDP.
fn ports() -> Value {
    ["tcp", "udp"]
        .map(|protocol| {
            json!({"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": protocol})
        })
        .to_vec()
        .into()
}

/// The plugin whose maps have another layout.
fn next_binary() -> Result<PathBuf> {
    env::var_os("BPF_BRIDGE_NEXT_BIN")
        .map(PathBuf::from)
        .context("BPF_BRIDGE_NEXT_BIN does not name the plugin of the next layout; run `cargo xtask test`")
}

/// Puts another binary in the place of the plugin's, as whoever installs one does.
fn install(node: &Node, binary: &Path) -> Result<()> {
    let plugin = format!("{}/{}", Node::CNI_PATH, node.plugin());
    let link = format!("ln -sfn {} {plugin}", binary.display());
    node.run(&link).map(drop)
}

/// Runs `bpf-bridge upgrade` on a node: what it says.
fn upgrade(node: &Node) -> Result<String> {
    node.run(&format!("{}/{} upgrade", Node::CNI_PATH, node.plugin()))
}

/// Why `bpf-bridge upgrade` fails.
fn upgrade_error(node: &Node) -> Result<String> {
    let output =
        node.output(Command::new(format!("{}/{}", Node::CNI_PATH, node.plugin())).arg("upgrade"))?;
    ensure!(
        !output.status.success(),
        "it says {}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Another build of a plugin, which tests share: it is made once, as others may call it.
fn another_build(of: &Path, number: u8) -> Result<PathBuf> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    tidy()?;
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "upgrade-{}-{number}-{}",
        std::process::id(),
        of.parent()
            .and_then(Path::file_name)
            .unwrap_or_default()
            .to_string_lossy()
    ));
    let made = directory.join("bpf-bridge");
    if made.exists() {
        return Ok(made);
    }
    bpf_bridge_tests::another_build(of, &directory, number)
}

/// Removes what tests have left whose process is gone.
fn tidy() -> Result<()> {
    for entry in fs::read_dir(env!("CARGO_TARGET_TMPDIR"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let pid = name
            .strip_prefix("upgrade-")
            .and_then(|name| name.split('-').next());
        if let Some(pid) = pid
            && !Path::new("/proc").join(pid).exists()
        {
            // Another test may have been faster.
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

/// The same, of the plugin under test.
fn another_plugin(number: u8) -> Result<PathBuf> {
    another_build(&plugin_binary()?, number)
}

/// The id of the program that a pod's port carries.
fn program_of(node: &Node, pod: &Pod) -> Result<u64> {
    let all = node.json(&format!("bpftool -j net show dev {}", pod.host_veth()?))?;
    all[0]["tc"][0]["id"]
        .as_u64()
        .with_context(|| format!("no program in {all}"))
}

/// The id of the program that each link of a layout runs, by the link's name; before Linux 6.6
/// what uplinks run is pinned itself.
fn links(node: &Node, layout: &str) -> Result<BTreeMap<String, u64>> {
    let names = node.run(&format!("ls {ROOT}/{layout}/links"))?;
    names
        .split_whitespace()
        .map(|name| {
            let (kind, id) = match name.starts_with("filter-") {
                true => ("prog", "id"),
                false => ("link", "prog_id"),
            };
            let object = node.json(&format!(
                "bpftool -j {kind} show pinned {ROOT}/{layout}/links/{name}"
            ))?;
            let id = object[id].as_u64().context("no program")?;
            Ok((name.to_owned(), id))
        })
        .collect()
}

/// The entries of a map of a layout.
fn entries(node: &Node, layout: &str, map: &str) -> Result<Vec<Value>> {
    let all = node.json(&format!(
        "bpftool -j map dump pinned {ROOT}/{layout}/maps/{map}"
    ))?;
    all.as_array().cloned().context("no list of entries")
}

/// The layouts whose pins are there.
fn layouts(node: &Node) -> Result<Vec<String>> {
    let all = node.run(&format!("ls {ROOT}"))?;
    Ok(all.split_whitespace().map(str::to_owned).collect())
}

/// That CHECK and STATUS find nothing.
fn is_well(network: &Network, pods: &[&Pod]) -> Result<()> {
    for pod in pods {
        network.check(pod.attachment())?;
    }
    for reply in network.status()? {
        reply.success()?;
    }
    Ok(())
}
