//! podman 4 with its CNI backend.

use std::{net::IpAddr, process::Command};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Outside, Snapshot};
use serde_json::{Value, json};

use crate::{fetch, machine::Machine};

/// Rlimits that may be set without CAP_SYS_RESOURCE, and a runtime that takes
/// hybrid cgroups.
const CONTAINERS_CONF: &str = r#"
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/run/cni/bin"]
network_config_dir = "/run/net.d"
"#;

/// What `podman network create` writes, with one word changed, and with ports
/// published by those whom the caller says: the plugins of these indices.
fn conflist(plugin: &str, publish: &[usize]) -> Value {
    let mut list = json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": plugin,
                "bridge": "cni-podman1",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                    "ranges": [
                        [{"subnet": "10.89.0.0/24", "gateway": "10.89.0.1"}],
                        [{"subnet": "fd89::/64", "gateway": "fd89::1"}],
                    ],
                },
            },
            {"type": "portmap"},
            {"type": "firewall", "backend": ""},
            {"type": "tuning"},
        ],
    });
    for &index in publish {
        list["plugins"][index]["capabilities"] = json!({"portMappings": true});
    }
    list
}

const OURS: usize = 0;
const PORTMAP: usize = 1;

fn podman(arguments: &[&str]) -> Command {
    let mut podman = Command::new("podman");
    podman
        .env("CONTAINERS_CONF", "/run/containers.conf")
        .args(["--root", "/run/podman", "--runroot", "/run/podman-run"])
        .args(["--storage-driver", "vfs"])
        .args(arguments);
    podman
}

fn address(machine: &Machine, container: &str, key: &str) -> Result<IpAddr> {
    let inspected: Value = serde_json::from_str(&machine.run(&podman(&["inspect", container]))?)?;
    inspected[0]["NetworkSettings"]["Networks"]["pods"][key]
        .as_str()
        .with_context(|| format!("no {key} in {}", inspected[0]["NetworkSettings"]))?
        .parse()
        .with_context(|| format!("{key} of {container}"))
}

#[test]
fn podman_containers_reach_each_other_the_host_and_the_outside() -> Result<()> {
    containers_reach_each_other_the_host_and_the_outside("podman", OURS)
}

#[test]
fn podman_containers_may_have_their_ports_published_by_portmap() -> Result<()> {
    containers_reach_each_other_the_host_and_the_outside("podman-portmap", PORTMAP)
}

fn containers_reach_each_other_the_host_and_the_outside(
    name: &str,
    publishes: usize,
) -> Result<()> {
    let machine = Machine::new(name)?;
    let node = machine.node();
    let outside = node.outside()?;
    outside.route_to_node("10.89.0.0/24")?;
    outside.route_to_node("fd89::/64")?;
    machine.write("/run/containers.conf", CONTAINERS_CONF)?;
    machine.write(
        &format!("{}/87-pods.conflist", Machine::NETWORKS),
        &conflist(node.plugin(), &[publishes]).to_string(),
    )?;
    let root = format!("{}:O", Machine::ROOT);
    let once_with = |ports: &[&str], command: &[&str]| -> Result<String> {
        let mut arguments = vec![
            "run",
            "--rm",
            "--cgroup-parent",
            machine.cgroup(),
            "--network",
            "pods",
        ];
        arguments.extend(ports);
        arguments.extend(["--rootfs", &root]);
        arguments.extend(command);
        machine.run(&podman(&arguments))
    };
    let once = |command: &[&str]| once_with(&[], command);
    once_with(&["-p", "8080:80"], &["/bin/ping", "-c", "1", "10.89.0.1"])?;
    let before = Snapshot::take(node)?;

    machine.run(&podman(&[
        "run",
        "-d",
        "--cgroup-parent",
        machine.cgroup(),
        "--name",
        "web",
        "--network",
        "pods",
        "-p",
        "8080:80",
        "--rootfs",
        &root,
        "/bin/httpd",
        "-f",
        "-p",
        "80",
        "-h",
        "/www",
    ]))?;
    let v4 = address(&machine, "web", "IPAddress")?;
    let v6 = address(&machine, "web", "GlobalIPv6Address")?;
    for address in [v4, v6] {
        fetch(node, (address, 80).into())?;
        fetch(&outside, (address, 80).into())?;
        once(&["/bin/ping", "-c", "1", &address.to_string()])?;
        let there = Outside::address_like(address).to_string();
        machine.run(&podman(&["exec", "web", "/bin/ping", "-c", "1", &there]))?;
    }
    once(&["/bin/wget", "-q", "-O", "-", &format!("http://{v4}/")])?;
    once(&["/bin/wget", "-q", "-O", "-", &format!("http://[{v6}]/")])?;

    // The published port.
    fetch(&outside, (Outside::NODE_V4, 8080).into())?;
    fetch(&outside, (Outside::NODE_V6, 8080).into())?;
    let rules = node.run("iptables-save -t nat")?;
    ensure!(
        rules.contains("--dport 8080") == (publishes == PORTMAP),
        "{rules}"
    );
    fetch(node, "127.0.0.1:8080".parse()?)?;
    fetch(node, "10.89.0.1:8080".parse()?)?;
    once(&["/bin/wget", "-q", "-O", "-", "http://10.89.0.1:8080/"])?;
    let hairpin = [
        "exec",
        "web",
        "/bin/wget",
        "-q",
        "-O",
        "-",
        "http://10.89.0.1:8080/",
    ];
    machine.run(&podman(&hairpin))?;

    machine.run(&podman(&["rm", "-f", "-t", "0", "web"]))?;
    before.ensure_same(&Snapshot::take(node)?)?;
    let rules = node.run("iptables-save")?;
    ensure!(
        !rules.contains("8080") && !rules.contains(&v4.to_string()),
        "{rules}"
    );
    Ok(())
}

#[test]
fn podman_gives_the_address_that_it_is_asked_for_and_restarts() -> Result<()> {
    let machine = Machine::new("podman-static")?;
    let node = machine.node();
    machine.write("/run/containers.conf", CONTAINERS_CONF)?;
    machine.write(
        &format!("{}/87-pods.conflist", Machine::NETWORKS),
        // For an address, podman replaces the capabilities of the first plugin; then
        // portmap publishes.
        &conflist(node.plugin(), &[OURS, PORTMAP]).to_string(),
    )?;
    machine.run(&podman(&[
        "run",
        "-d",
        "--cgroup-parent",
        machine.cgroup(),
        "--name",
        "web",
        "--network",
        "pods",
        "--ip",
        "10.89.0.77",
        "-p",
        "127.0.0.1:8080:80",
        "--rootfs",
        &format!("{}:O", Machine::ROOT),
        "/bin/httpd",
        "-f",
        "-p",
        "80",
        "-h",
        "/www",
    ]))?;
    let wanted: IpAddr = "10.89.0.77".parse()?;
    let published = "127.0.0.1:8080".parse()?;
    ensure!(address(&machine, "web", "IPAddress")? == wanted);
    fetch(node, (wanted, 80).into())?;
    fetch(node, published)?;
    // The runtime's restart is a DEL and an ADD.
    machine.run(&podman(&["restart", "-t", "0", "web"]))?;
    ensure!(address(&machine, "web", "IPAddress")? == wanted);
    fetch(node, (wanted, 80).into())?;
    fetch(node, published)?;
    machine.run(&podman(&["rm", "-f", "-t", "0", "web"]))?;
    Ok(())
}
