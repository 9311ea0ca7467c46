//! How much memory a call needs.
//!
//! What `wait4` tells includes what the caller had resident, for a process
//! begins as a copy of it. So the process is stopped at its end, and asked.

use std::{
    fs,
    io::{Read as _, Seek as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
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
