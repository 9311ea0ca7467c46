//! A node with a PID namespace, for runtimes that leave daemons behind.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Node, Process, wait_for};

use crate::PAGE;

/// A node with an init process, whose end is the end of all processes there.
pub(crate) struct Machine {
    node: Node,
    init: Process,
    pid: u32,
    /// What all containers' cgroups are below.
    cgroup: String,
    log: PathBuf,
}

impl Machine {
    /// Where the containers' root file system is, on the node.
    pub(crate) const ROOT: &str = "/run/rootfs";
    /// Where the runtimes look for conflists, on the node.
    pub(crate) const NETWORKS: &str = "/run/net.d";

    pub(crate) fn new(name: &str) -> Result<Self> {
        for tool in ["/bin/busybox", "/usr/sbin/runc"] {
            ensure!(
                Path::new(tool).exists(),
                "{tool} is missing: `cargo xtask test` installs what the tests need"
            );
        }
        let node = Node::new()?;
        let unique = format!("bpf-bridge-tests.{}.{name}", std::process::id());
        let log = std::env::temp_dir().join(format!("{unique}.log"));
        let script = "echo >/run/init; exec sleep infinity";
        let init = node.spawn(
            Command::new("unshare")
                .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
                .args(["--propagation", "private", "sh", "-c", script]),
            &log,
        )?;
        wait_for("init process", Duration::from_secs(5), || {
            Ok(node.run("cat /run/init").is_ok())
        })?;
        // The guardian's child is unshare, and unshare's child is init.
        let mut pid = init.id();
        for _ in 0..2 {
            let children = format!("/proc/{pid}/task/{pid}/children");
            let listed =
                fs::read_to_string(&children).with_context(|| format!("reading {children}"))?;
            pid = listed
                .split_whitespace()
                .next()
                .with_context(|| format!("{children} is empty"))?
                .parse()?;
        }
        let machine = Self {
            node,
            init,
            pid,
            cgroup: format!("/{unique}"),
            log,
        };
        machine.fill_root()?;
        Ok(machine)
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    /// The cgroup that the runtime is to put containers below, in every
    /// hierarchy: so that what they leave there can be removed.
    pub(crate) fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// Runs a command among the machine's processes.
    pub(crate) fn output(&self, command: &Command) -> Result<Output> {
        self.node.output(&mut self.inside(command))
    }

    /// As [`Self::output`]: standard output of a command that succeeded.
    pub(crate) fn run(&self, command: &Command) -> Result<String> {
        let output = self.output(command)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(
            output.status.success(),
            "{command:?}: {}: {} {}",
            output.status,
            text(&output.stderr),
            text(&output.stdout)
        );
        Ok(text(&output.stdout))
    }

    /// Starts a daemon among the machine's processes.
    pub(crate) fn spawn(&self, command: &Command, log: &Path) -> Result<Process> {
        self.node.spawn(&self.inside(command), log)
    }

    /// Writes a file on the node.
    pub(crate) fn write(&self, path: &str, content: &str) -> Result<()> {
        self.node.within(|| {
            if let Some(directory) = Path::new(path).parent() {
                fs::create_dir_all(directory)?;
            }
            fs::write(path, content).with_context(|| format!("writing {path}"))
        })
    }

    fn inside(&self, command: &Command) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter
            .args(["--target", &self.pid.to_string(), "--pid", "--mount", "--"])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                nsenter.env(name, value);
            }
        }
        nsenter
    }

    fn fill_root(&self) -> Result<()> {
        for directory in ["bin", "proc", "sys", "dev", "etc", "tmp", "www"] {
            self.node
                .run(&format!("mkdir -p {}/{directory}", Self::ROOT))?;
        }
        self.node
            .run(&format!("cp /bin/busybox {}/bin/busybox", Self::ROOT))?;
        for applet in ["sh", "httpd", "wget", "ping", "sleep"] {
            self.node
                .run(&format!("ln -s busybox {}/bin/{applet}", Self::ROOT))?;
        }
        self.write(&format!("{}/www/index.html", Self::ROOT), PAGE)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.init.stop();
        let _ = self.node.within(|| {
            // With cgroups v2 alone there is one hierarchy, and it is there itself.
            let root = PathBuf::from("/sys/fs/cgroup");
            let hierarchies = fs::read_dir(&root).into_iter().flatten().flatten();
            for hierarchy in hierarchies.map(|entry| entry.path()).chain([root]) {
                remove_cgroups(&hierarchy.join(self.cgroup.trim_start_matches('/')));
            }
            Ok(())
        });
        if !std::thread::panicking() {
            let _ = fs::remove_file(&self.log);
        }
    }
}

/// Removes a cgroup and those below it, which lose their last process within
/// moments of its end.
fn remove_cgroups(cgroup: &Path) {
    let Ok(entries) = fs::read_dir(cgroup) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    let _ = wait_for("empty cgroup", Duration::from_secs(2), || {
        Ok(fs::remove_dir(cgroup).is_ok())
    });
}
