//! A network namespace and the mount namespace it is seen from, and running
//! things in them.

use std::{
    fs::File,
    io::Write as _,
    net::{IpAddr, Ipv6Addr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    libc,
    sched::{CloneFlags, setns, unshare},
};
use serde_json::Value;

use crate::cgroup;

/// A network namespace, and the mount namespace that its processes see.
///
/// Its processes see this process's cgroup as the root of all cgroups. Both live as long as this does: they are held by file descriptors, not by a
/// process.
#[derive(Debug)]
pub struct Namespace {
    net: OwnedFd,
    mnt: OwnedFd,
}

impl Namespace {
    /// Makes a new pair of namespaces and runs `setup` in it.
    ///
    /// Mounts made in it are private to it. `setup` runs on a thread of its own
    /// that is in both.
    pub(crate) fn new(setup: impl FnOnce() -> Result<()> + Send) -> Result<Self> {
        let cgroups = cgroup::namespace()?;
        on_thread(|| {
            setns(cgroups, CloneFlags::CLONE_NEWCGROUP).context("entering the cgroup namespace")?;
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
                .context("making a network and a mount namespace (this needs root)")?;
            setup()?;
            Ok(Self {
                net: open_current("net")?,
                mnt: open_current("mnt")?,
            })
        })
    }

    /// Makes a new network namespace that is seen from this one's mounts, and
    /// runs `setup` in it.
    pub(crate) fn new_network(&self, setup: impl FnOnce() -> Result<()> + Send) -> Result<Self> {
        self.within(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
            setup()?;
            Ok(Self {
                net: open_current("net")?,
                mnt: open_current("mnt")?,
            })
        })
    }

    /// Runs `work` on a thread that is in these namespaces, and waits for it.
    ///
    /// Sockets made there stay in the network namespace and can be used from any
    /// thread afterwards; processes started there are in both namespaces. A
    /// panic goes on in the caller.
    ///
    /// # Errors
    ///
    /// What `work` returns, or that the namespaces could not be entered.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let cgroups = cgroup::namespace()?;
        on_thread(|| {
            setns(cgroups, CloneFlags::CLONE_NEWCGROUP).context("entering the cgroup namespace")?;
            // setns refuses a mount namespace to a thread that shares its root
            // and working directory with others.
            unshare(CloneFlags::CLONE_FS).context("leaving the process's working directory")?;
            setns(&self.mnt, CloneFlags::CLONE_NEWNS).context("entering the mount namespace")?;
            setns(&self.net, CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
            work()
        })
    }

    /// Runs a command to its end in these namespaces.
    ///
    /// # Errors
    ///
    /// That the command could not be started; not that it failed.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        self.within(|| {
            command
                .output()
                .with_context(|| format!("starting {}", command.get_program().display()))
        })
    }

    /// Runs a command, given as words between spaces, and returns its standard
    /// output.
    ///
    /// # Errors
    ///
    /// That the command could not be started, or failed: with what it wrote.
    pub fn run(&self, command: &str) -> Result<String> {
        let mut words = command.split_whitespace();
        let program = words.next().context("an empty command")?;
        let output = self.output(Command::new(program).args(words))?;
        ensure!(
            output.status.success(),
            "`{command}`: {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim(),
            String::from_utf8_lossy(&output.stdout).trim(),
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Waits for an address to be one of this machine's: the kernel leaves IPv6's local routes
    /// to a worker.
    ///
    /// # Errors
    ///
    /// That it is none for long.
    pub fn wait_local(&self, address: Ipv6Addr) -> Result<()> {
        let route = format!("ip -6 route show table local {address}");
        wait_for(
            &format!("local route to {address}"),
            Duration::from_secs(10),
            || Ok(!self.run(&route)?.is_empty()),
        )
    }

    /// Runs `ip` with every line of `script`, stopping at the first that fails.
    ///
    /// # Errors
    ///
    /// What `ip` said.
    pub fn ip(&self, script: &str) -> Result<()> {
        self.within(|| {
            let mut ip = Command::new("ip")
                .args(["-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .context("starting ip")?;
            let mut stdin = ip.stdin.take().context("no pipe to ip")?;
            stdin
                .write_all(script.as_bytes())
                .and_then(|()| stdin.write_all(b"\n"))
                .context("writing to ip")?;
            drop(stdin);
            let output = ip.wait_with_output().context("waiting for ip")?;
            ensure!(
                output.status.success(),
                "`ip -batch` of {script:?}: {}",
                String::from_utf8_lossy(&output.stderr).trim(),
            );
            Ok(())
        })
    }

    /// The JSON that `ip -j` or another command prints.
    ///
    /// # Errors
    ///
    /// As [`Self::run`], or that the output is not JSON. No output at all is an
    /// empty list.
    pub fn json(&self, command: &str) -> Result<Value> {
        let text = self.run(command)?;
        if text.trim().is_empty() {
            return Ok(Value::Array(Vec::new()));
        }
        serde_json::from_str(&text).with_context(|| format!("`{command}` printed {text:?}"))
    }

    /// Starts a command that stays, and is killed when the returned value is
    /// dropped.
    ///
    /// It also ends when this process does: it runs below a shell that waits for
    /// the pipe between the two to close.
    ///
    /// # Errors
    ///
    /// That it could not be started.
    pub fn spawn(&self, command: &Command, log: &Path) -> Result<Process> {
        let log = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let errors = log.try_clone().context("sharing a log file")?;
        // A job of a shell without job control reads from /dev/null, so the
        // command does not eat the pipe that only its guardian waits on.
        let guardian = r#""$@" & child=$!; cat >/dev/null; kill -KILL $child; wait $child"#;
        let mut shell = Command::new("sh");
        shell
            .args(["-c", guardian, "guardian"])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(errors);
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            shell.current_dir(directory);
        }
        let child = self.within(|| shell.spawn().context("starting a shell"))?;
        Ok(Process { child })
    }

    /// The text of a file as these namespaces see it, without the white space
    /// around it: of a sysctl, an address file, a log.
    ///
    /// # Errors
    ///
    /// That it cannot be read.
    pub fn read(&self, path: impl AsRef<Path> + Sync) -> Result<String> {
        let path = path.as_ref();
        self.within(|| {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("reading {}", path.display()))?;
            Ok(text.trim().to_owned())
        })
    }

    /// The value of a sysctl, named with dots or slashes: `net/ipv4/ip_forward`.
    ///
    /// Slashes are needed where a device's name holds a dot.
    ///
    /// # Errors
    ///
    /// That there is no such sysctl.
    pub fn sysctl(&self, name: &str) -> Result<String> {
        self.read(sysctl_path(name))
    }

    /// Sets a sysctl.
    ///
    /// # Errors
    ///
    /// That there is no such sysctl, or it refuses the value.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = sysctl_path(name);
        self.within(|| {
            std::fs::write(&path, value).with_context(|| format!("writing {value} to {path}"))
        })
    }

    /// What `ip -j -d addr show dev` says of a device.
    ///
    /// # Errors
    ///
    /// That there is no such device.
    pub fn device(&self, name: &str) -> Result<Value> {
        let devices = self.json(&format!("ip -j -d addr show dev {name}"))?;
        devices
            .as_array()
            .and_then(|list| list.iter().find(|device| device.get("ifname").is_some()))
            .cloned()
            .with_context(|| format!("no device {name}"))
    }

    /// The names of all devices.
    ///
    /// # Errors
    ///
    /// That `ip` failed.
    pub fn device_names(&self) -> Result<Vec<String>> {
        let devices = self.json("ip -j link")?;
        Ok(devices
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|device| Some(device.get("ifname")?.as_str()?.to_owned()))
            .collect())
    }

    /// Connects two namespaces by a veth pair, with both ends up.
    ///
    /// Their IPv6 addresses need no duplicate address detection: without a
    /// link-local address no neighbour would be asked for during the first seconds.
    ///
    /// # Errors
    ///
    /// That one of the two has a device of that name already.
    pub fn connect(&self, device: &str, peer: &Self, peer_device: &str) -> Result<()> {
        // The descriptor is this process's own, which `ip` can look through.
        let net = format!("/proc/{}/fd/{}", std::process::id(), peer.net.as_raw_fd());
        self.run(&format!(
            "ip link add {device} type veth peer name {peer_device} netns {net}"
        ))?;
        for (namespace, device) in [(self, device), (peer, peer_device)] {
            namespace.set_sysctl(&format!("net/ipv6/conf/{device}/accept_dad"), "0")?;
            namespace.ip(&format!("link set {device} up"))?;
        }
        Ok(())
    }

    /// Pings an address: `count` echo requests, 50 ms apart, each waited for three
    /// seconds at most.
    ///
    /// # Errors
    ///
    /// That not all of them were answered: with what `ping` wrote.
    pub fn ping(&self, address: IpAddr, count: u32) -> Result<()> {
        self.ping_with(address, count, &[])
    }

    /// As [`Self::ping`], with further arguments for `ping`.
    ///
    /// # Errors
    ///
    /// As [`Self::ping`].
    pub fn ping_with(&self, address: IpAddr, count: u32, arguments: &[&str]) -> Result<()> {
        let output = self.output(
            Command::new("ping")
                .args(["-n", "-i", "0.05", "-W", "3", "-c", &count.to_string()])
                .args(arguments)
                .arg(address.to_string()),
        )?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success() && text.contains(&format!(" {count} received,")),
            "ping of {address}: {}{}",
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim(),
        );
        Ok(())
    }

    /// Whether an offload of a device is on.
    ///
    /// # Errors
    ///
    /// That there is no such device, or it does not know of offloads.
    pub fn offload(&self, device: &str, offload: Offload) -> Result<bool> {
        Ok(self.ethtool(device, offload as u32, 0)? != 0)
    }

    /// Switches an offload of a device on or off.
    ///
    /// # Errors
    ///
    /// As [`Self::offload`], or that this one cannot be changed.
    pub fn set_offload(&self, device: &str, offload: Offload, on: bool) -> Result<()> {
        // Each command that asks is followed by the one that sets.
        self.ethtool(device, offload as u32 + 1, on.into())?;
        ensure!(
            self.offload(device, offload)? == on,
            "{offload:?} of {device} cannot be changed"
        );
        Ok(())
    }

    /// Runs a command of ethtool that takes or returns a number.
    fn ethtool(&self, device: &str, command: u32, data: u32) -> Result<u32> {
        /// `struct ethtool_value` of `linux/ethtool.h`.
        #[repr(C)]
        struct EthtoolValue {
            cmd: u32,
            data: u32,
        }
        self.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").context("opening a socket")?;
            let mut value = EthtoolValue { cmd: command, data };
            // SAFETY: an all-zero ifreq is a valid value of that plain C struct.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            ensure!(
                device.len() < request.ifr_name.len(),
                "{device} is too long a name"
            );
            for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_data = (&raw mut value).cast();
            // SAFETY: the request points to a value of the type that the command
            // in it reads and writes.
            let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
            ensure!(
                done == 0,
                "ethtool command {command:#x} of {device}: {}",
                std::io::Error::last_os_error()
            );
            Ok(value.data)
        })
    }
}

/// `linux/sockios.h`; the libc crate lacks it for musl.
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// What a device does in place of the stack, by the number of the command that
/// asks for it (`linux/ethtool.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Transport checksums of packets sent.
    TxChecksum = 0x16,
    /// Cutting of large TCP segments.
    TcpSegmentation = 0x1e,
    /// Generic segmentation.
    GenericSegmentation = 0x23,
    /// Merging of packets received.
    GenericReceive = 0x2b,
}

/// A command that stays, made by [`Namespace::spawn`]; killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Kills the command and waits for its end.
    pub fn stop(&mut self) {
        drop(self.child.stdin.take());
        // The guardian ends as soon as the command has.
        let _ = self.child.wait();
    }

    /// The process that guards the command, and is its parent.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits until `condition` holds, looking every 5 ms.
///
/// # Errors
///
/// That it did not hold within `limit`: names `what` was waited for, and the
/// last error if the condition had one.
pub fn wait_for(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    loop {
        let answer = condition();
        if matches!(answer, Ok(true)) {
            return Ok(());
        }
        if start.elapsed() > limit {
            match answer {
                Err(error) => return Err(error.context(format!("no {what} within {limit:?}"))),
                Ok(_) => bail!("no {what} within {limit:?}"),
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn sysctl_path(name: &str) -> String {
    if name.contains('/') {
        format!("/proc/sys/{name}")
    } else {
        format!("/proc/sys/{}", name.replace('.', "/"))
    }
}

/// The calling thread's namespace of one kind.
pub(crate) fn open_current(kind: &str) -> Result<OwnedFd> {
    let path = format!("/proc/thread-self/ns/{kind}");
    Ok(File::open(&path)
        .with_context(|| format!("opening {path}"))?
        .into())
}

/// Runs `work` on a thread of its own, which may then change namespaces: the
/// thread ends with the change, so nothing need be changed back.
pub(crate) fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .spawn_scoped(scope, work)
            .map_err(|error| anyhow!("starting a thread: {error}"))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
