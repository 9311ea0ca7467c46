//! A page behind a published port, and who fetches it.

use std::{
    fs::{self, Permissions},
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::{Namespace, Node, Outside, Pod};
use serde_json::{Value, json};

use super::{milliseconds, traffic::listening};

/// The port of the node, and the pod's port that it leads to.
const HOST_PORT: u16 = 8080;
const POD_PORT: u16 = 80;
/// Where the page is, on the node, and what makes it.
const HOME: &str = "/run/www";
const PAGE: &str = "#!/bin/sh
echo 'Content-Type: text/plain'
echo
echo \"$REMOTE_ADDR\"
";

/// The capability argument by which a runtime publishes the port.
pub(super) fn mappings() -> Value {
    json!([{"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": "tcp"}])
}

/// Fetches a page of the pod's through its published port, from everywhere; fails
/// if that does not work somewhere.
pub(super) fn fetch(node: &Node, outside: &Outside, client: &Pod, server: &Pod) -> Result<()> {
    println!(
        "\nPublished: port {HOST_PORT} of the node is port {POD_PORT} of {}. Its page, fetched from \
         everywhere:\n",
        server.name()
    );
    println!(
        "  {:8} {:38} {:>10}  as who the pod sees the client",
        "from", "page", "time"
    );
    let _httpd = serve(node, server)?;
    let uplink: [IpAddr; 2] = [Outside::NODE_V4.into(), Outside::NODE_V6.into()];
    let loopback: [IpAddr; 2] = [[127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()];
    let gateway = client.result()["ips"][0]["gateway"]
        .as_str()
        .context("no gateway in the result of ADD")?
        .parse()?;
    let places: [(&str, &Namespace, &[IpAddr]); 4] = [
        ("outside", outside, &uplink),
        ("node", node, &loopback),
        (client.name(), client, &[uplink[0], uplink[1], gateway]),
        (server.name(), server, &uplink),
    ];
    for (name, from, addresses) in places {
        for &address in addresses {
            let page = format!("http://{}/", SocketAddr::from((address, HOST_PORT)));
            let start = Instant::now();
            let text = from
                .run(&format!("timeout 10 busybox wget -q -O - {page}"))
                .with_context(|| format!("fetching {page} from {name}"))?;
            let time = milliseconds(start.elapsed());
            println!("  {name:8} {page:38} {time:>10}  {}", plain(text.trim()));
        }
    }
    let mut rules = 0;
    for program in ["iptables-save", "ip6tables-save"] {
        let saved = node.run(program)?;
        rules += saved.lines().filter(|line| line.starts_with("-A")).count();
    }
    println!("\n  iptables rules on the node: {rules}");
    Ok(())
}

/// Starts a web server in the pod.
fn serve(node: &Node, pod: &Pod) -> Result<bpf_bridge_tests::Process> {
    let page = format!("{HOME}/cgi-bin/index.cgi");
    node.within(|| {
        fs::create_dir_all(format!("{HOME}/cgi-bin"))?;
        fs::write(&page, PAGE)?;
        fs::set_permissions(&page, Permissions::from_mode(0o755))?;
        Ok(())
    })
    .with_context(|| format!("writing {page}"))?;
    let mut httpd = Command::new("busybox");
    httpd
        .args(["httpd", "-f", "-h", HOME, "-p"])
        .arg(POD_PORT.to_string());
    let server = pod.spawn(&httpd, Path::new("/dev/null"))?;
    listening(pod, "web server", POD_PORT)?;
    Ok(server)
}

/// An address as the server writes it, without the brackets and the mapping.
fn plain(address: &str) -> String {
    let address = address.trim_matches(['[', ']']);
    let parsed = address.parse::<IpAddr>();
    parsed.map_or_else(|_| address.to_owned(), |ip| ip.to_canonical().to_string())
}
