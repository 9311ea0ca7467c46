//! Well-known generators of traffic: iperf3, and wrk that asks nginx.
//!
//! The servers run for as long as all contenders take turns; a client runs for one turn. All
//! are on the CPU of their [`Ends`].

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::pin,
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_tests::{Namespace, Process, wait_for};
use nix::{
    libc,
    sched::{CpuSet, sched_setaffinity},
    sys::{
        prctl::set_pdeathsig,
        signal::{SigHandler, Signal, kill, signal},
    },
    unistd::Pid,
};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::time::timeout;

use super::{cpu::Account, peer::Ends};
use crate::process::{find, line};

/// How long a server may take until it listens.
const START: Duration = Duration::from_secs(5);
/// How long a client may run: far longer than a turn.
const LIMIT: Duration = Duration::from_secs(20);
/// When wrk is interrupted. It looks every 100 ms, from its start on.
const INTERRUPT: Duration = Duration::from_millis(150);
/// Its shortest run, without that.
const WRK_SECONDS: u64 = 1;
/// How often it may be missed.
const ATTEMPTS: usize = 5;
/// Connections that wrk has open at once.
pub(super) const CONNECTIONS: usize = 16;
/// The page that it asks for.
pub(super) const PAGE_BYTES: usize = 1024;

/// A server, and the directory of its files; killed on drop.
#[derive(Debug)]
struct Server {
    _process: Process,
    directory: TempDir,
}

impl Server {
    /// Starts one and waits until it listens.
    fn start(
        ends: &Ends<'_>,
        directory: TempDir,
        program: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "taskset", "--cpu-list"])
            .arg(ends.cpu.to_string())
            .arg(program)
            .args(arguments);
        let log = directory.path().join("log");
        let process = ends.to.spawn(&command, &log)?;
        let port = ends.listen.port();
        wait_for("server", START, || listens(ends.to, port)).with_context(|| {
            format!(
                "waiting for `{}` to listen on port {port}: {}",
                line(&command),
                fs::read_to_string(&log).unwrap_or_default().trim()
            )
        })?;
        Ok(Self {
            _process: process,
            directory,
        })
    }
}

/// Whether somebody listens on a TCP port.
fn listens(namespace: &Namespace, port: u16) -> Result<bool> {
    for table in ["tcp", "tcp6"] {
        if has_listener(
            &namespace.read(format!("/proc/thread-self/net/{table}"))?,
            port,
        ) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a table of sockets (`/proc/net/tcp`) has one that listens on a port.
fn has_listener(table: &str, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let port = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&port)) && fields.nth(1) == Some(LISTEN)
    })
}

fn program(name: &str) -> Result<PathBuf> {
    find(name).with_context(|| format!("no program {name} on the PATH"))
}

/// Runs a client to its end; returns what it writes. After `interrupt` it is asked to stop.
fn run(ends: &Ends<'_>, mut command: Command, interrupt: Option<Duration>) -> Result<String> {
    let mut cpus = CpuSet::new();
    cpus.set(ends.cpu)
        .with_context(|| format!("binding to CPU {}", ends.cpu))?;
    let what = line(&command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let prepare = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        sched_setaffinity(Pid::from_raw(0), &cpus)?;
        // Until the client has a handler of its own.
        // SAFETY: no handler runs.
        unsafe { signal(Signal::SIGINT, SigHandler::SigIgn) }?;
        Ok(())
    };
    // SAFETY: three system calls, on values that were made before.
    unsafe { command.pre_exec(prepare) };
    let output = ends.from.within(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(finish(command, interrupt))
    });
    let output = output.with_context(|| format!("running `{what}`"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "`{what}`: {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim(),
        stdout.trim()
    );
    Ok(stdout)
}

async fn finish(
    mut command: tokio::process::Command,
    interrupt: Option<Duration>,
) -> Result<Output> {
    let child = command.spawn().context("starting it")?;
    let id = child.id().context("it ended before it was waited for")?;
    let mut end = pin!(child.wait_with_output());
    if let Some(after) = interrupt {
        if let Ok(output) = timeout(after, &mut end).await {
            return Ok(output?);
        }
        // Nobody has waited for it yet: the number is still its own.
        let id = libc::pid_t::try_from(id).context("its number is none")?;
        kill(Pid::from_raw(id), Signal::SIGINT).context("interrupting it")?;
    }
    let output = timeout(LIMIT, end)
        .await
        .with_context(|| format!("it did not end within {LIMIT:?}"))?;
    Ok(output?)
}

/// An iperf3 server, and the way to it.
pub(super) struct Iperf3<'a> {
    ends: Ends<'a>,
    _server: Server,
}

/// What iperf3 prints with `--json`.
#[derive(Deserialize)]
struct Iperf3Report {
    end: Iperf3End,
}

#[derive(Deserialize)]
struct Iperf3End {
    sum_received: Iperf3Sum,
}

#[derive(Deserialize)]
struct Iperf3Sum {
    bytes: u64,
    bits_per_second: f64,
}

impl<'a> Iperf3<'a> {
    pub(super) fn start(ends: Ends<'a>) -> Result<Self> {
        let (address, port) = (ends.listen.ip().to_string(), ends.listen.port().to_string());
        let server = Server::start(
            &ends,
            TempDir::new()?,
            &program("iperf3")?,
            &["--server", "--bind", &address, "--port", &port],
        )?;
        Ok(Self {
            ends,
            _server: server,
        })
    }

    /// Sends so many bytes over so many connections; returns how many bits a second arrived.
    pub(super) fn run(&self, bytes: u64, streams: usize) -> Result<f64> {
        let target = self.ends.target();
        let mut command = Command::new(program("iperf3")?);
        command
            .args(["--json", "--client", &target.ip().to_string()])
            .args(["--port", &target.port().to_string()])
            .args(["--bytes", &bytes.to_string()])
            .args(["--parallel", &streams.to_string()]);
        let what = line(&command);
        let text = run(&self.ends, command, None)?;
        bits_per_second(&text).with_context(|| format!("reading what `{what}` wrote: {text}"))
    }
}

fn bits_per_second(text: &str) -> Result<f64> {
    let report: Iperf3Report = serde_json::from_str(text)?;
    let Iperf3Sum {
        bytes,
        bits_per_second,
    } = report.end.sum_received;
    ensure!(bytes > 0 && bits_per_second > 0.0, "nothing was received");
    Ok(bits_per_second)
}

/// An nginx with one page, and the way to it.
pub(super) struct Web<'a> {
    ends: Ends<'a>,
    server: Server,
}

/// What wrk prints at its end, by [`REPORT`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrkReport {
    requests: u64,
    microseconds: u64,
    errors: u64,
}

/// The script that makes wrk print what can be read.
const REPORT: &str = r#"
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "microseconds": %d, "errors": %d}\n',
    summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"#;
const REPORT_FILE: &str = "report.lua";

impl<'a> Web<'a> {
    pub(super) fn start(ends: Ends<'a>) -> Result<Self> {
        let directory = TempDir::new()?;
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            anyhow::Ok(path)
        };
        file("index.html", &"x".repeat(PAGE_BYTES))?;
        file(REPORT_FILE, REPORT)?;
        let config = file("nginx.conf", &nginx_config(directory.path(), ends.listen))?;
        let config = config.to_string_lossy().into_owned();
        let server = Server::start(
            &ends,
            directory,
            &program("nginx")?,
            &["-e", "stderr", "-c", &config],
        )?;
        Ok(Self { ends, server })
    }

    /// Asks for the page for some tenths of a second, on connections that stay or on one for
    /// each time; returns how many times a second it came. Attempts that fail are not booked.
    pub(super) fn run(&self, stay: bool, account: &mut Account) -> Result<f64> {
        let script = self.server.directory.path().join(REPORT_FILE);
        for _ in 0..ATTEMPTS {
            let mut command = Command::new(program("wrk")?);
            command
                .args(["--threads", "1"])
                .args(["--connections", &CONNECTIONS.to_string()])
                .args(["--duration", &WRK_SECONDS.to_string()])
                .arg("--script")
                .arg(&script);
            if !stay {
                command.args(["--header", "Connection: close"]);
            }
            command.arg(format!("http://{}/", self.ends.target()));
            let what = line(&command);
            let mut booked = account.clone();
            let text = booked.book(|| run(&self.ends, command, Some(INTERRUPT)))?;
            let rate = requests_per_second(&text);
            let rate = rate.with_context(|| format!("reading what `{what}` wrote: {text}"))?;
            if let Some(rate) = rate {
                *account = booked;
                return Ok(rate);
            }
        }
        bail!("wrk could not be interrupted in {ATTEMPTS} attempts: is the machine that busy?")
    }
}

/// The rate that wrk found, unless the interrupt came before it was ready: then it may have
/// stopped asking, and waited for its time to pass.
fn requests_per_second(text: &str) -> Result<Option<f64>> {
    let last = text.trim_end().lines().next_back().context("nothing")?;
    let report: WrkReport = serde_json::from_str(last)?;
    ensure!(report.errors == 0, "{} requests failed", report.errors);
    if report.microseconds >= WRK_SECONDS * 1_000_000 {
        return Ok(None);
    }
    ensure!(report.requests > 0, "no request was answered");
    Ok(Some(
        report.requests as f64 * 1e6 / report.microseconds as f64,
    ))
}

/// One process, whose files are all in one directory.
fn nginx_config(directory: &Path, listen: SocketAddr) -> String {
    let directory = directory.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|what| format!("    {what}_temp_path {directory}/{what};\n"))
        .collect();
    format!(
        "daemon off;\n\
         master_process off;\n\
         pid {directory}/pid;\n\
         error_log stderr crit;\n\
         events {{}}\n\
         http {{\n\
         {temporary}\
         \x20   access_log off;\n\
         \x20   keepalive_requests 1000000000;\n\
         \x20   sendfile on;\n\
         \x20   default_type text/html;\n\
         \x20   server {{\n\
         \x20       listen {listen};\n\
         \x20       root {directory};\n\
         \x20   }}\n\
         }}\n"
    )
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    #[test]
    fn iperf3_says_what_arrived() {
        let text = r#"{"start": {}, "end": {"sum_sent": {"bytes": 2000, "bits_per_second": 9e9},
            "sum_received": {"bytes": 1000, "bits_per_second": 8e9, "seconds": 1e-6}}}"#;
        assert_eq!(bits_per_second(text).unwrap(), 8e9);
        for text in [
            "",
            "iperf3: error",
            r#"{"start": {}, "error": "unable to connect"}"#,
            r#"{"end": {"sum_received": {"bytes": 0, "bits_per_second": 0}}}"#,
        ] {
            assert!(bits_per_second(text).is_err(), "{text}");
        }
    }

    #[test]
    fn wrk_says_how_many_requests_were_answered() {
        let of = |report: &str| requests_per_second(&format!("Running 1s test\n\n{report}\n"));
        let rate = of(r#"{"requests": 5000, "microseconds": 200000, "errors": 0}"#).unwrap();
        assert_eq!(rate, Some(25_000.0));
        let missed = of(r#"{"requests": 5000, "microseconds": 1000001, "errors": 0}"#).unwrap();
        assert_eq!(missed, None);
        for report in [
            "",
            "unable to connect",
            r#"{"requests": 5000, "microseconds": 200000, "errors": 1}"#,
            r#"{"requests": 0, "microseconds": 200000, "errors": 0}"#,
            r#"{"requests": 5000, "microseconds": 200000}"#,
        ] {
            assert!(of(report).is_err(), "{report}");
        }
    }

    #[test]
    fn who_listens_is_found() {
        let table = "  sl  local_address rem_address   st\n\
            0: 0100007F:1F90 00000000:0000 0A 0:0\n\
            1: 0100007F:0050 0100007F:1F91 01 0:0\n";
        assert!(has_listener(table, 8080));
        assert!(!has_listener(table, 80), "this one is connected");
        assert!(!has_listener(table, 8081), "that is the other end's");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let table = || fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        assert!(has_listener(&table(), port));
        drop(listener);
        assert!(!has_listener(&table(), port));
    }

    #[test]
    fn a_client_ends_in_time() {
        let finish = |script: &str, interrupt| {
            // A shell that is started in the background ignores what it is to be asked by.
            let mut command = tokio::process::Command::new("env");
            command
                .args(["--default-signal=INT", "sh", "-c", script])
                .stdout(Stdio::piped())
                .kill_on_drop(true);
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(finish(command, interrupt))
                .unwrap()
        };
        let short = Some(Duration::from_millis(50));
        let output = finish(
            "trap 'echo asked; exit' INT; while :; do sleep 0.01; done",
            short,
        );
        assert_eq!(output.stdout, b"asked\n");
        let output = finish("echo itself", Some(LIMIT));
        assert_eq!(output.stdout, b"itself\n");
    }

    #[test]
    fn nginx_listens_on_one_address() {
        let config = nginx_config(Path::new("/dir"), "[fd77::2]:80".parse().unwrap());
        assert!(config.contains("listen [fd77::2]:80;\n"), "{config}");
        assert!(config.contains("proxy_temp_path /dir/proxy;\n"), "{config}");
    }
}
