//! How much memory a call needs, and how much it leaves in the kernel.
//!
//! What `wait4` tells includes what the caller had resident, for a process
//! begins as a copy of it. So the process is stopped at its end, and asked.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Seek as _, Write as _},
    os::{fd::AsFd as _, fd::AsRawFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{maps::MapInfo, programs::ProgramInfo};
use nix::{
    libc,
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tempfile::tempfile;

use super::measurement::{Contender, Fact};

/// Where bpf-bridge pins what it leaves.
const PINS: &str = "/sys/fs/bpf/bpf-bridge";
/// Tables below this are told together.
const SMALL: u64 = 500_000;

/// Runs `command` in the calling thread's namespaces and returns what it wrote
/// and the most memory that it had resident, in bytes. The processes that it
/// starts itself do not count.
pub(super) fn peak(mut command: Command, input: &str) -> Result<(String, u64)> {
    // Files, for a pipe could fill up while the process is stopped.
    let (mut stdin, mut stdout) = (tempfile()?, tempfile()?);
    stdin.write_all(input.as_bytes())?;
    stdin.rewind()?;
    command
        .stdin(stdin)
        .stdout(stdout.try_clone()?)
        .stderr(Stdio::null());
    // SAFETY: between fork and exec this makes one system call, ptrace.
    unsafe {
        command.pre_exec(|| Ok(ptrace::traceme()?));
    }
    let child = command
        .spawn()
        .with_context(|| format!("executing {}", command.get_program().display()))?;
    let pid = Pid::from_raw(libc::pid_t::try_from(child.id())?);
    // It stops right after exec.
    match waitpid(pid, None)? {
        WaitStatus::Stopped(..) => {}
        other => bail!("the process did not stop at its start: {other:?}"),
    }
    ptrace::setoptions(
        pid,
        Options::PTRACE_O_TRACEEXIT | Options::PTRACE_O_EXITKILL,
    )?;
    let mut most = None;
    let mut signal: Option<Signal> = None;
    loop {
        ptrace::cont(pid, signal.take())?;
        match waitpid(pid, None)? {
            WaitStatus::PtraceEvent(..) => most = high_water(pid)?,
            WaitStatus::Stopped(_, received) => signal = Some(received),
            WaitStatus::Exited(_, status) => {
                let mut text = String::new();
                stdout.rewind()?;
                stdout.read_to_string(&mut text)?;
                ensure!(status == 0, "exit status {status}: {text}");
                let most = most.context("the process did not stop at its end")?;
                return Ok((text, most));
            }
            other => bail!("the process ended otherwise: {other:?}"),
        }
    }
}

/// `VmHWM` of a process, in bytes.
fn high_water(pid: Pid) -> Result<Option<u64>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"))
        .and_then(|kibibytes| kibibytes.trim().parse::<u64>().ok())
        .map(|kibibytes| kibibytes * 1024))
}

/// Memory of the kernel, in bytes.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    /// Of each table, by its id: its name comes along.
    maps: BTreeMap<u32, (String, u64)>,
    /// Of each program, by its id.
    programs: BTreeMap<u32, u64>,
}

/// What is pinned on the node that the calling thread is in.
pub(super) fn pinned() -> Result<Kernel> {
    let mut found = Kernel::default();
    found.visit(Path::new(PINS))?;
    Ok(found)
}

impl Kernel {
    fn visit(&mut self, path: &Path) -> Result<()> {
        let say = || format!("looking at {}", path.display());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            // The programs of links are pinned, too.
            if name != "links" {
                for entry in fs::read_dir(path).with_context(say)? {
                    self.visit(&entry.with_context(say)?.path())?;
                }
            }
            Ok(())
        } else if name.starts_with(|letter: char| letter.is_ascii_uppercase()) {
            self.add_map(&MapInfo::from_pin(path).with_context(say)?)
        } else {
            self.add_program(&ProgramInfo::from_pin(path).with_context(say)?)
        }
    }

    fn add_map(&mut self, map: &MapInfo) -> Result<()> {
        let fd = map.fd()?;
        let memory = memlock(fd.as_fd().as_raw_fd())?;
        let name = map.name_as_str().unwrap_or_default().to_owned();
        self.maps.insert(map.id(), (name, memory));
        Ok(())
    }

    /// With the tables that it uses: not all are pinned.
    fn add_program(&mut self, program: &ProgramInfo) -> Result<()> {
        let fd = program.fd()?;
        let memory = memlock(fd.as_fd().as_raw_fd())?;
        self.programs.insert(program.id(), memory);
        for map in program.map_ids()?.unwrap_or_default() {
            self.add_map(&MapInfo::from_id(map)?)?;
        }
        Ok(())
    }

    /// The sums.
    pub(super) fn sums(&self, what: &str) -> Vec<Fact> {
        let tables = self.maps.values().map(|(_, bytes)| bytes);
        vec![
            fact(
                format!("{what}, {} programs", self.programs.len()),
                self.programs.values().sum(),
            ),
            fact(format!("{what}, {} tables", self.maps.len()), tables.sum()),
        ]
    }

    /// The tables, the largest first.
    pub(super) fn tables(&self, what: &str) -> Vec<Fact> {
        let mut tables: Vec<_> = self.maps.values().collect();
        tables.sort_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
        let (large, small): (Vec<_>, Vec<_>) =
            tables.into_iter().partition(|(_, bytes)| *bytes >= SMALL);
        let mut facts: Vec<_> = large
            .into_iter()
            .map(|(name, bytes)| fact(format!("{what}, table {name}"), *bytes))
            .collect();
        facts.push(fact(
            format!("{what}, {} smaller tables", small.len()),
            small.iter().map(|(_, bytes)| bytes).sum(),
        ));
        facts
    }
}

fn fact(name: String, bytes: u64) -> Fact {
    super::megabytes(&name, &[(Contender::BpfBridge, bytes)])
}

/// What the kernel has for the object of a descriptor of this process.
fn memlock(fd: i32) -> Result<u64> {
    let path = format!("/proc/thread-self/fdinfo/{fd}");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("memlock:"))
        .and_then(|bytes| bytes.trim().parse().ok())
        .with_context(|| format!("no memlock in {path}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_memory_of_the_process_alone() {
        let mut small = Command::new("sh");
        small.args(["-c", "read line; echo $line"]);
        let (text, before) = peak(small, "hello\n").unwrap();
        assert_eq!(text, "hello\n");
        let ours = vec![1_u8; 64 << 20];
        let mut small = Command::new("true");
        small.arg("x");
        let (_, after) = peak(small, "").unwrap();
        assert_eq!(ours.last(), Some(&1));
        assert!(before < 32 << 20, "{before}");
        assert!(after < 32 << 20, "{after}");
        let mut large = Command::new("dd");
        large.args(["if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]);
        let (_, large) = peak(large, "").unwrap();
        assert!(large > 64 << 20, "{large}");
    }

    #[test]
    fn a_failure_is_told() {
        assert!(peak(Command::new("false"), "").is_err());
        let mut killed = Command::new("sh");
        killed.args(["-c", "kill -9 $$"]);
        assert!(peak(killed, "").is_err());
    }
}
