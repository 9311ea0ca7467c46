//! Real runtimes from Debian's packages start containers on a conflist with the
//! plugin: podman, and containerd the way a kubelet drives it.
//!
//! Nothing comes from a registry: the containers' root is a static busybox. The
//! runtimes and all they start live in a PID namespace that dies with the test.

mod containerd;
mod machine;
mod podman;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::Namespace;

/// What every container's web server serves.
const PAGE: &str = "served by a container\n";

/// Gets the page from a container's web server.
fn fetch(from: &Namespace, server: SocketAddr) -> Result<()> {
    let limit = Duration::from_secs(5);
    let answer = from
        .within(|| {
            let mut stream = TcpStream::connect_timeout(&server, limit)?;
            stream.set_read_timeout(Some(limit))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
        .with_context(|| format!("fetching from {server}"))?;
    ensure!(answer.ends_with(PAGE), "{server} answered {answer:?}");
    Ok(())
}
