//! Who reaches whom, how fast.

use std::{net::IpAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use bpf_bridge_tests::{Namespace, Node, Outside, Pod, wait_for};

/// How many echo requests, and how far apart in seconds.
const PINGS: &str = "ping -n -q -c 20 -i 0.02 -W 1";
/// How long a TCP transfer takes, in seconds.
const TRANSFER: &str = "1";

/// A place that traffic starts from or goes to.
struct Place<'a> {
    name: String,
    namespace: &'a Namespace,
    addresses: Vec<IpAddr>,
}

/// Pings, then transfers over TCP, along each way over IPv4 and IPv6; fails if
/// one of them does not work.
pub(super) fn measure(node: &Node, outside: &Outside, pods: &[Pod]) -> Result<()> {
    let pods: Vec<_> = pods
        .iter()
        .map(|pod| Place {
            name: pod.name().to_owned(),
            namespace: pod,
            addresses: pod.addresses(),
        })
        .collect();
    let [a, b, c] = &pods[..] else {
        return Err(anyhow!("the demo has three pods"));
    };
    let node = Place {
        name: "node".to_owned(),
        namespace: node,
        addresses: vec![Outside::NODE_V4.into(), Outside::NODE_V6.into()],
    };
    let outside = Place {
        name: "outside".to_owned(),
        namespace: outside,
        addresses: vec![Outside::V4.into(), Outside::V6.into()],
    };

    println!(
        "\nTraffic: round trip of a ping (mean of 20), rate of a TCP stream ({TRANSFER} s):\n"
    );
    println!(
        "  {:20} {:>11} {:>15}   {:>11} {:>15}",
        "", "IPv4 ping", "TCP", "IPv6 ping", "TCP"
    );
    for (from, to) in [(a, b), (a, &node), (a, &outside), (&node, b), (&outside, c)] {
        let mut line = format!("  {:20}", format!("{} → {}", from.name, to.name));
        let server = serve(to.namespace)?;
        for address in &to.addresses {
            let ping = ping(from.namespace, *address)?;
            let rate = transfer(from.namespace, *address)?;
            line += &format!(" {ping:>8.3} ms {:>8.2} Gbit/s  ", rate / 1e9);
        }
        drop(server);
        println!("{}", line.trim_end());
    }
    Ok(())
}

/// The mean round trip time in milliseconds.
fn ping(from: &Namespace, to: IpAddr) -> Result<f64> {
    let output = from.run(&format!("{PINGS} {to}"))?;
    // rtt min/avg/max/mdev = 0.031/0.045/0.128/0.022 ms
    output
        .rsplit_once("rtt ")
        .and_then(|(_, rtt)| rtt.split_once(" = "))
        .and_then(|(_, numbers)| numbers.split('/').nth(1)?.parse().ok())
        .ok_or_else(|| anyhow!("no round trip time in what ping wrote: {output}"))
}

/// Starts a server for transfers to any address of a namespace.
fn serve(namespace: &Namespace) -> Result<bpf_bridge_tests::Process> {
    let mut iperf3 = Command::new("iperf3");
    iperf3.arg("--server");
    let server = namespace.spawn(&iperf3, Path::new("/dev/null"))?;
    listening(namespace, "iperf3 server", 5201)?;
    Ok(server)
}

/// Waits until a server listens.
pub(super) fn listening(namespace: &Namespace, what: &str, port: u16) -> Result<()> {
    wait_for(what, Duration::from_secs(5), || {
        let sockets = namespace.run(&format!("ss -Hltn sport = :{port}"))?;
        Ok(!sockets.is_empty())
    })
}

/// The rate at which a TCP stream's bytes arrived, in bits per second.
fn transfer(from: &Namespace, to: IpAddr) -> Result<f64> {
    let report = from
        .json(&format!("iperf3 --json --time {TRANSFER} --client {to}"))
        .with_context(|| format!("sending to {to}"))?;
    report["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .ok_or_else(|| anyhow!("no rate in what iperf3 wrote: {report}"))
}
