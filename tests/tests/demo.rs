//! `cargo xtask demo`, to its end and interrupted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may fail in any way that shows where it did"
)]

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use bpf_bridge_tests::wait_for;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn demo() -> (Child, BufReader<ChildStdout>) {
    let xtask = env::var_os("BPF_BRIDGE_XTASK").expect("run by `cargo xtask test`");
    let mut demo = Command::new(xtask)
        .arg("demo")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(demo.stdout.take().unwrap());
    (demo, output)
}

/// The namespaces that a process holds open, as `net:[4026531840]`.
fn namespaces_held_by(process: u32) -> BTreeSet<String> {
    fs::read_dir(format!("/proc/{process}/fd"))
        .into_iter()
        .flatten()
        .filter_map(|file| Some(fs::read_link(file.ok()?.path()).ok()?.display().to_string()))
        .filter(|target| target.starts_with("net:[") || target.starts_with("mnt:["))
        .collect()
}

/// The namespaces that any process is in or holds open.
fn namespaces_in_use() -> BTreeSet<String> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .flat_map(|process: u32| {
            let own = ["net", "mnt"].into_iter().filter_map(move |kind| {
                let link = fs::read_link(format!("/proc/{process}/ns/{kind}")).ok()?;
                Some(link.display().to_string())
            });
            own.chain(namespaces_held_by(process))
        })
        .collect()
}

#[test]
fn the_demo_shows_every_way_and_ends() {
    let (mut demo, mut output) = demo();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert!(demo.wait().unwrap().success(), "{text}");
    for way in ["pod-a → pod-b", "pod-a → node", "pod-a → outside"] {
        let line = text
            .lines()
            .find(|line| line.contains(way))
            .unwrap_or_else(|| panic!("no {way} in {text}"));
        assert_eq!(line.matches(" ms").count(), 2, "{line}");
        assert_eq!(line.matches(" Gbit/s").count(), 2, "{line}");
    }
    // Who fetches which page, and as who the pod sees that.
    for (from, page, client) in [
        ("outside", "198.51.100.2:8080", "198.51.100.1"),
        ("outside", "[2001:db8:ffff::2]:8080", "2001:db8:ffff::1"),
        ("node", "127.0.0.1:8080", "10.88.0.1"),
        ("node", "[::1]:8080", "fd00:88::1"),
        ("pod-a", "198.51.100.2:8080", "10.88.0.1"),
        ("pod-a", "[2001:db8:ffff::2]:8080", "fd00:88::1"),
        ("pod-a", "10.88.0.1:8080", "10.88.0.1"),
        ("pod-b", "198.51.100.2:8080", "10.88.0.1"),
    ] {
        let page = format!("http://{page}/");
        let line = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|words| words.starts_with(&[from, &page]))
            .unwrap_or_else(|| panic!("no {page} from {from} in {text}"));
        assert_eq!(line.last(), Some(&client), "{text}");
    }
    for line in [
        "[eBPF: port] ── pod-c  eth0",
        "NEIGHBORS",
        "[eBPF: uplink]",
        "PUBLISHED  0.0.0.0:8080 is 10.88.0.3:80 at veth",
        "PUBLISHED  [::]:8080 is [fd00:88::3]:80 at veth",
        "iptables rules on the node: 0",
        "DEL pod-c",
    ] {
        assert!(text.contains(line), "no {line} in {text}");
    }
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let (mut demo, output) = demo();
        // Servers and clients run from here on.
        let seen = output
            .lines()
            .map(Result::unwrap)
            .any(|line| line.contains("pod-a → pod-b"));
        assert!(seen, "the demo ended early");
        // The machine's own are not the demo's to remove.
        let machines = namespaces_held_by(std::process::id());
        let held: BTreeSet<_> = namespaces_held_by(demo.id())
            .difference(&machines)
            .cloned()
            .collect();
        // The node, three pods and the outside, and the node's mounts.
        assert!(held.len() >= 6, "the demo holds {held:?}");

        kill(Pid::from_raw(demo.id().try_into().unwrap()), signal).unwrap();
        assert!(!demo.wait().unwrap().success());
        // Children that wait for nothing but their network may take a moment.
        wait_for(
            "end of the demo's namespaces",
            Duration::from_secs(10),
            || Ok(namespaces_in_use().is_disjoint(&held)),
        )
        .unwrap_or_else(|error| panic!("{signal}: {error:#}: {held:?}"));
        assert!(!Path::new("/sys/fs/bpf/bpf-bridge").exists());
    }
}
