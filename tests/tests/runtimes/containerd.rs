//! containerd through its CRI, as a kubelet drives it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Outside, Process, Snapshot, wait_for};
use prost::Message;
use serde_json::json;
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::{fetch, machine::Machine};

const SOCKET: &str = "/run/containerd.sock";
const IMAGE: &str = "docker.io/test/busybox:1";

const CONFIG: &str = r#"
version = 2
root = "/run/containerd-root"
state = "/run/containerd-state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "/run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "docker.io/test/busybox:1"
restrict_oom_score_adj = true
tolerate_missing_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/run/cni/bin"
conf_dir = "/run/net.d"
"#;

// The messages of `runtime.v1` that are used here, with the fields that are used
// (kubernetes/cri-api, pkg/apis/runtime/v1/api.proto).

#[derive(Clone, PartialEq, Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct DnsConfig {
    #[prost(string, repeated, tag = "1")]
    servers: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct PortMapping {
    /// 0 is TCP.
    #[prost(int32, tag = "1")]
    protocol: i32,
    #[prost(int32, tag = "2")]
    container_port: i32,
    #[prost(int32, tag = "3")]
    host_port: i32,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(message, optional, tag = "4")]
    dns_config: Option<DnsConfig>,
    #[prost(message, repeated, tag = "5")]
    port_mappings: Vec<PortMapping>,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

/// Of every request and answer that is nothing but the id of a pod or container.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<PodSandboxStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatus {
    #[prost(message, optional, tag = "5")]
    network: Option<PodSandboxNetworkStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxNetworkStatus {
    #[prost(string, tag = "1")]
    ip: String,
    #[prost(message, repeated, tag = "2")]
    additional_ips: Vec<Id>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    /// Its metadata, of which only the name is set.
    #[prost(message, optional, tag = "1")]
    metadata: Option<Id>,
    /// The image, by name.
    #[prost(message, optional, tag = "2")]
    image: Option<Id>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
    /// In seconds.
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<RuntimeCondition>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeCondition {
    #[prost(string, tag = "1")]
    r#type: String,
    #[prost(bool, tag = "2")]
    status: bool,
    #[prost(string, tag = "4")]
    message: String,
}

/// A machine with containerd on it.
struct Containerd {
    machine: Machine,
    _daemon: Process,
    log: std::path::PathBuf,
}

/// A pod with one container.
struct CriPod {
    sandbox: String,
    container: String,
    addresses: Vec<IpAddr>,
}

impl Containerd {
    fn start() -> Result<Self> {
        let machine = Machine::new("containerd")?;
        // What containerd's documentation has for the stock bridge, with one word
        // changed, and without portmap.
        let conflist = json!({
            "cniVersion": "1.0.0",
            "name": "containerd-net",
            "plugins": [
                {
                    "type": machine.node().plugin(),
                    "bridge": "cni0",
                    "isGateway": true,
                    "ipMasq": true,
                    "promiscMode": true,
                    "capabilities": {"portMappings": true},
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "2001:db8:4860::/64"}]],
                        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                    },
                },
            ],
        });
        machine.write(
            &format!("{}/10-containerd-net.conflist", Machine::NETWORKS),
            &conflist.to_string(),
        )?;
        machine.write("/run/containerd.toml", CONFIG)?;
        let log =
            std::env::temp_dir().join(format!("bpf-bridge-tests.{}.cri.log", std::process::id()));
        let daemon = machine.spawn(
            Command::new("containerd").args(["-c", "/run/containerd.toml"]),
            &log,
        )?;
        let containerd = Self {
            machine,
            _daemon: daemon,
            log,
        };
        containerd
            .ready()
            .with_context(|| std::fs::read_to_string(&containerd.log).unwrap_or_default())?;
        containerd.import_image()?;
        Ok(containerd)
    }

    /// Waits until runtime and network are ready.
    fn ready(&self) -> Result<()> {
        wait_for("containerd", Duration::from_secs(20), || {
            let answer: StatusResponse = self.call("Status", Empty {})?;
            let conditions = answer.status.unwrap_or_default().conditions;
            for condition in &conditions {
                ensure!(
                    condition.status,
                    "{}: {}",
                    condition.r#type,
                    condition.message
                );
            }
            Ok(!conditions.is_empty())
        })
    }

    /// Makes an image of the root file system by hand and imports it.
    fn import_image(&self) -> Result<()> {
        let node = self.machine.node();
        let image = "/run/image";
        node.run(&format!("mkdir {image}"))?;
        node.run(&format!("tar -C {} -cf {image}/layer.tar .", Machine::ROOT))?;
        let digest = node.run(&format!("sha256sum {image}/layer.tar"))?;
        let digest = digest.split(' ').next().context("no digest")?;
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            // The sandbox's own process, which only has to be there.
            "config": {"Cmd": ["/bin/sleep", "1000000"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        });
        let manifest =
            json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
        self.machine
            .write(&format!("{image}/config.json"), &config.to_string())?;
        self.machine
            .write(&format!("{image}/manifest.json"), &manifest.to_string())?;
        node.run(&format!(
            "tar -C {image} -cf /run/image.tar manifest.json config.json layer.tar"
        ))?;
        self.machine.run(
            Command::new("ctr")
                .args(["-a", SOCKET, "-n", "k8s.io"])
                .args([
                    "images",
                    "import",
                    "--snapshotter",
                    "native",
                    "/run/image.tar",
                ]),
        )?;
        Ok(())
    }

    /// One call of the runtime service.
    fn call<Q, A>(&self, method: &str, request: Q) -> Result<A>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let path = PathAndQuery::try_from(format!("/runtime.v1.RuntimeService/{method}"))?;
        // The socket is only there in the node's mounts.
        self.machine
            .node()
            .within(|| {
                tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?
                    .block_on(async {
                        let channel: Channel = Endpoint::from_shared(format!("unix://{SOCKET}"))?
                            .timeout(Duration::from_secs(30))
                            .connect()
                            .await?;
                        let mut client = Grpc::new(channel);
                        client.ready().await?;
                        let codec = ProstCodec::<Q, A>::default();
                        let answer = client.unary(Request::new(request), path, codec).await?;
                        Ok(answer.into_inner())
                    })
            })
            .with_context(|| method.to_owned())
    }

    /// Starts a pod with a web server in it.
    fn pod(&self, name: &str, host_port: Option<i32>) -> Result<CriPod> {
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-of-{name}"),
                namespace: "default".to_owned(),
            }),
            hostname: name.to_owned(),
            log_directory: "/run/logs".to_owned(),
            dns_config: Some(DnsConfig {
                servers: vec!["192.0.2.53".to_owned()],
            }),
            port_mappings: host_port
                .map(|host_port| PortMapping {
                    protocol: 0,
                    container_port: 80,
                    host_port,
                })
                .into_iter()
                .collect(),
            annotations: HashMap::from([("example/annotation".to_owned(), "a".to_owned())]),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.machine.cgroup().to_owned(),
            }),
        };
        let sandbox: Id = self.call(
            "RunPodSandbox",
            RunPodSandboxRequest {
                config: Some(config.clone()),
            },
        )?;
        let status: PodSandboxStatusResponse = self.call("PodSandboxStatus", sandbox.clone())?;
        let network = status.status.and_then(|status| status.network);
        let network = network.context("a pod without a network")?;
        let addresses = std::iter::once(&network.ip)
            .chain(network.additional_ips.iter().map(|ip| &ip.id))
            .map(|ip| ip.parse().with_context(|| format!("address {ip:?}")))
            .collect::<Result<_>>()?;
        let named = |id: &str| Some(Id { id: id.to_owned() });
        let container: Id = self.call(
            "CreateContainer",
            CreateContainerRequest {
                pod_sandbox_id: sandbox.id.clone(),
                config: Some(ContainerConfig {
                    metadata: named("web"),
                    image: named(IMAGE),
                    command: ["/bin/httpd", "-f", "-p", "80", "-h", "/www"]
                        .map(str::to_owned)
                        .to_vec(),
                }),
                sandbox_config: Some(config),
            },
        )?;
        let _: Empty = self.call("StartContainer", container.clone())?;
        Ok(CriPod {
            sandbox: sandbox.id,
            container: container.id,
            addresses,
        })
    }

    /// Runs a command in a pod's container.
    fn exec(&self, pod: &CriPod, command: &[&str]) -> Result<()> {
        let answer: ExecSyncResponse = self.call(
            "ExecSync",
            ExecSyncRequest {
                container_id: pod.container.clone(),
                cmd: command.iter().map(|&word| word.to_owned()).collect(),
                timeout: 10,
            },
        )?;
        ensure!(
            answer.exit_code == 0,
            "{command:?}: {} {}",
            String::from_utf8_lossy(&answer.stderr),
            String::from_utf8_lossy(&answer.stdout)
        );
        Ok(())
    }

    fn remove(&self, pod: &CriPod) -> Result<()> {
        let id = Id {
            id: pod.sandbox.clone(),
        };
        let _: Empty = self.call("StopPodSandbox", id.clone())?;
        // A kubelet does so, too: it is a second DEL.
        let _: Empty = self.call("StopPodSandbox", id.clone())?;
        let _: Empty = self.call("RemovePodSandbox", id)?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_file(Path::new(&self.log));
        }
    }
}

#[test]
fn containerd_pods_reach_each_other_the_host_and_the_outside() -> Result<()> {
    let containerd = Containerd::start()?;
    let node = containerd.machine.node();
    let outside = node.outside()?;
    outside.route_to_node("10.88.0.0/16")?;
    outside.route_to_node("2001:db8:4860::/64")?;
    let first = containerd.pod("first", Some(8091))?;
    containerd.remove(&first)?;
    let before = Snapshot::take(node)?;

    let (web, client) = (
        containerd.pod("web", Some(8091))?,
        containerd.pod("client", None)?,
    );
    ensure!(web.addresses.len() == 2, "{:?}", web.addresses);
    for &address in &web.addresses {
        let server: SocketAddr = (address, 80).into();
        wait_for("web server", Duration::from_secs(5), || {
            Ok(fetch(node, server).is_ok())
        })?;
        fetch(&outside, server)?;
        containerd.exec(
            &client,
            &["/bin/wget", "-q", "-O", "-", &format!("http://{server}/")],
        )?;
        let there = Outside::address_like(address).to_string();
        containerd.exec(&web, &["/bin/ping", "-c", "1", &there])?;
    }
    fetch(&outside, (Outside::NODE_V4, 8091).into())?;
    fetch(&outside, (Outside::NODE_V6, 8091).into())?;
    fetch(node, "127.0.0.1:8091".parse()?)?;
    fetch(node, "[::1]:8091".parse()?)?;
    let rules = node.run("iptables-save -t nat")?;
    ensure!(!rules.contains("8091"), "{rules}");
    let by_node = format!("http://{}:8091/", Outside::NODE_V4);
    for pod in [&client, &web] {
        containerd.exec(pod, &["/bin/wget", "-q", "-O", "-", &by_node])?;
    }

    containerd.remove(&web)?;
    containerd.remove(&client)?;
    before.ensure_same(&Snapshot::take(node)?)
}
