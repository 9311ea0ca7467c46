//! Calling plugins: one call with everything in the caller's hands, or a whole
//! conflist the way libcni does it.

use std::{
    collections::BTreeMap,
    env,
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    libc,
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{Namespace, Node};

/// The plugin under test, from the environment variable `BPF_BRIDGE_BIN`.
///
/// # Errors
///
/// That the variable is not set.
pub fn plugin_binary() -> Result<PathBuf> {
    env::var_os("BPF_BRIDGE_BIN")
        .map(PathBuf::from)
        .context("BPF_BRIDGE_BIN does not name the plugin to test; run `cargo xtask test`")
}

/// The same plugin with fault points, from the environment variable
/// `BPF_BRIDGE_FAULTS_BIN`: it can be killed at each, and each of its requests be made
/// to fail.
///
/// # Errors
///
/// That the variable is not set.
pub fn faults_binary() -> Result<PathBuf> {
    env::var_os("BPF_BRIDGE_FAULTS_BIN")
        .map(PathBuf::from)
        .context(
            "BPF_BRIDGE_FAULTS_BIN does not name a plugin that was built with the feature \
             `faults`; run `cargo xtask test`",
        )
}

/// What a plugin is asked to do: the value of `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Attach a container to a network.
    Add,
    /// Detach it.
    Del,
    /// Is it still attached as it was?
    Check,
    /// Forget all attachments but those listed.
    Gc,
    /// Could an ADD succeed now?
    Status,
    /// Which versions of the specification are spoken?
    Version,
}

impl Verb {
    /// The value of `CNI_COMMAND`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// What a runtime knows of one interface of one container.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`; empty when the namespace is gone.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_ARGS`, as `K=V;K=V`.
    pub args: String,
    /// Capability arguments, by the capability's name: what a plugin that lists
    /// the capability finds under `runtimeConfig`.
    pub capabilities: BTreeMap<String, Value>,
}

impl Attachment {
    /// An attachment without arguments.
    #[must_use]
    pub fn new(container_id: &str, netns: &str, ifname: &str) -> Self {
        Self {
            container_id: container_id.to_owned(),
            netns: netns.to_owned(),
            ifname: ifname.to_owned(),
            args: String::new(),
            capabilities: BTreeMap::new(),
        }
    }

    /// With another interface name.
    #[must_use]
    pub fn ifname(mut self, ifname: &str) -> Self {
        ifname.clone_into(&mut self.ifname);
        self
    }

    /// With `CNI_ARGS`.
    #[must_use]
    pub fn args(mut self, args: &str) -> Self {
        args.clone_into(&mut self.args);
        self
    }

    /// With one more capability argument.
    #[must_use]
    pub fn capability(mut self, name: &str, value: Value) -> Self {
        self.capabilities.insert(name.to_owned(), value);
        self
    }

    /// With an empty `CNI_NETNS`, as runtimes send it when the sandbox is gone.
    #[must_use]
    pub fn without_netns(mut self) -> Self {
        self.netns.clear();
        self
    }
}

/// One call of one plugin.
///
/// ```no_run
/// # use bpf_bridge_tests::{Call, Node, Verb};
/// # fn main() -> anyhow::Result<()> {
/// let node = Node::new()?;
/// let reply = Call::new(node.plugin(), Verb::Version)
///     .stdin(r#"{"cniVersion":"1.1.0"}"#)
///     .run(&node)?;
/// println!("{}", reply.success()?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Call {
    plugin: String,
    env: BTreeMap<String, String>,
    stdin: String,
}

impl Call {
    /// A call of the plugin of this name in [`Node::CNI_PATH`], with
    /// `CNI_COMMAND` and `CNI_PATH`, and nothing on standard input.
    #[must_use]
    pub fn new(plugin: &str, verb: Verb) -> Self {
        Self {
            plugin: plugin.to_owned(),
            env: BTreeMap::new(),
            stdin: String::new(),
        }
        .env("CNI_COMMAND", verb.as_str())
        .env("CNI_PATH", Node::CNI_PATH)
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Removes a variable.
    #[must_use]
    pub fn env_remove(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    /// Sets the variables of an attachment.
    #[must_use]
    pub fn attachment(self, attachment: &Attachment) -> Self {
        let call = self
            .env("CNI_CONTAINERID", &attachment.container_id)
            .env("CNI_NETNS", &attachment.netns)
            .env("CNI_IFNAME", &attachment.ifname);
        if attachment.args.is_empty() {
            call
        } else {
            call.env("CNI_ARGS", &attachment.args)
        }
    }

    /// Sets what the plugin reads: a configuration, or anything else.
    #[must_use]
    pub fn stdin(mut self, text: impl ToString) -> Self {
        self.stdin = text.to_string();
        self
    }

    /// Makes the call in a namespace, usually the node's.
    ///
    /// # Errors
    ///
    /// That the plugin could not be executed; not that it failed.
    pub fn run(&self, namespace: &Namespace) -> Result<Reply> {
        namespace.within(|| self.run_here())
    }

    /// Makes the call in the calling thread's namespaces: for measuring, where
    /// entering them must not count.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn run_here(&self) -> Result<Reply> {
        self.execute(|_| Ok(()))
    }

    /// Makes the call in a namespace and kills it (SIGKILL) after a time, unless
    /// it has ended by then.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn run_until_killed(&self, namespace: &Namespace, after: Duration) -> Result<Reply> {
        let start = Instant::now();
        namespace.within(|| {
            self.execute(|child| {
                thread::sleep(after.saturating_sub(start.elapsed()));
                child.kill().context("killing the plugin")
            })
        })
    }

    /// Makes the call in a namespace and stops it after each of these times, a moment
    /// later it goes on; until it has ended. Returns how often that was, too.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn run_stopped(&self, namespace: &Namespace, times: &[Duration]) -> Result<(Reply, usize)> {
        /// Long enough for every thread of it to stop.
        const MOMENT: Duration = Duration::from_micros(500);
        let mut stops = 0;
        let reply = namespace.within(|| {
            self.execute(|child| {
                let pid = Pid::from_raw(child.id().try_into()?);
                let has_ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
                for time in times {
                    thread::sleep(*time);
                    // It keeps its number until it is waited for.
                    if waitid(Id::Pid(pid), has_ended)? != WaitStatus::StillAlive {
                        break;
                    }
                    kill(pid, Signal::SIGSTOP).context("stopping the plugin")?;
                    thread::sleep(MOMENT);
                    kill(pid, Signal::SIGCONT).context("letting the plugin go on")?;
                    stops += 1;
                }
                Ok(())
            })
        })?;
        Ok((reply, stops))
    }

    /// `meanwhile` is done to the process.
    fn execute(&self, meanwhile: impl FnOnce(&mut Child) -> Result<()>) -> Result<Reply> {
        // Files and not pipes, so that neither side can ever wait for the other.
        let mut stdout = anonymous_file()?;
        let mut stderr = anonymous_file()?;
        let mut command = Command::new(format!("{}/{}", Node::CNI_PATH, self.plugin));
        for (name, _) in env::vars_os() {
            if name.to_string_lossy().starts_with("CNI_") {
                command.env_remove(name);
            }
        }
        command
            .envs(&self.env)
            .stdin(Stdio::piped())
            .stdout(stdout.try_clone().context("sharing a file")?)
            .stderr(stderr.try_clone().context("sharing a file")?);
        let start = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("executing the plugin {}", self.plugin))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin may end without reading: then the pipe is broken.
            let _ = stdin.write_all(self.stdin.as_bytes());
        }
        meanwhile(&mut child)?;
        let (status, peak_rss) = wait_with_usage(child.id())?;
        let duration = start.elapsed();
        Ok(Reply {
            call: format!(
                "{} {}",
                self.env.get("CNI_COMMAND").map_or("?", String::as_str),
                self.plugin
            ),
            stdout: rewound(&mut stdout)?,
            stderr: rewound(&mut stderr)?,
            status,
            duration,
            peak_rss,
        })
    }
}

/// What came of a [`Call`].
#[derive(Debug, Clone)]
pub struct Reply {
    /// The verb and the plugin, for messages.
    call: String,
    /// Everything written to standard output.
    pub stdout: String,
    /// Everything written to standard error.
    pub stderr: String,
    /// How the process ended.
    pub status: ExitStatus,
    /// From before the process was made until it had ended.
    pub duration: Duration,
    /// The most memory that the process had resident, in bytes.
    ///
    /// Never less than what the calling process had when it started it: the
    /// kernel counts the memory before `execve` as the process's own.
    pub peak_rss: u64,
}

impl Reply {
    /// The JSON on standard output of a call that succeeded; `null` when it
    /// wrote nothing.
    ///
    /// # Errors
    ///
    /// That the plugin failed, or wrote something other than one JSON value.
    pub fn success(&self) -> Result<Value> {
        ensure!(
            self.status.success(),
            "{}: {}: {} {}",
            self.call,
            self.status,
            self.stdout.trim(),
            self.stderr.trim()
        );
        if self.stdout.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("{} wrote {:?}", self.call, self.stdout))
    }

    /// The error object of a call that failed.
    ///
    /// # Errors
    ///
    /// That the call succeeded, ended by a signal, or wrote something other than
    /// one JSON object with a numeric `code` and a `msg` to standard output.
    pub fn failure(&self) -> Result<CniError> {
        ensure!(
            !self.status.success(),
            "{} succeeded, with {:?}",
            self.call,
            self.stdout
        );
        ensure!(
            self.status.code().is_some(),
            "{}: {}: {}",
            self.call,
            self.status,
            self.stderr
        );
        let error: Value = serde_json::from_str(&self.stdout).with_context(|| {
            format!(
                "{} failed and wrote {:?}, and to standard error {:?}",
                self.call, self.stdout, self.stderr
            )
        })?;
        let text = |key: &str| error.get(key).and_then(Value::as_str).map(str::to_owned);
        Ok(CniError {
            cni_version: text("cniVersion").unwrap_or_default(),
            code: error
                .get("code")
                .and_then(Value::as_u64)
                .with_context(|| format!("no code in {error}"))?,
            msg: text("msg").with_context(|| format!("no msg in {error}"))?,
            details: text("details").unwrap_or_default(),
        })
    }
}

/// The error object of the specification, section 5.
#[derive(Debug, Clone)]
pub struct CniError {
    /// The version the object is in; empty when the plugin did not say.
    pub cni_version: String,
    /// 1 to 99 as the specification has them, the plugin's own from 100 on.
    pub code: u64,
    /// What went wrong, in short.
    pub msg: String,
    /// What went wrong, at length; may be empty.
    pub details: String,
}

impl CniError {
    /// Everything the error says, to look for a word in.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{} {}", self.msg, self.details)
    }
}

/// A conflist, called as libcni calls it.
///
/// Results are kept as libcni's cache keeps them: CHECK and DEL see the last
/// result of the attachment's ADD as `prevResult`.
#[derive(Debug)]
pub struct Network<'node> {
    node: &'node Node,
    list: Value,
    results: Mutex<BTreeMap<(String, String), Value>>,
}

impl<'node> Network<'node> {
    /// The IPv4 subnet of [`Self::dual_stack`]; the gateway is its first address.
    pub const V4_SUBNET: &'static str = "10.77.0.0/16";
    /// The IPv6 subnet of [`Self::dual_stack`]; the gateway is its first address.
    pub const V6_SUBNET: &'static str = "fd77::/64";

    /// The configuration that most tests start from: dual stack, with the
    /// node as default gateway, on the bridge `cni0`.
    #[must_use]
    pub fn dual_stack(node: &Node) -> Value {
        json!({
            "cniVersion": "1.0.0",
            "name": "net",
            "type": node.plugin(),
            "bridge": "cni0",
            "isDefaultGateway": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": Self::V4_SUBNET}], [{"subnet": Self::V6_SUBNET}]],
            },
        })
    }

    /// A network from a conflist: `cniVersion`, `name`, `plugins`.
    #[must_use]
    pub fn from_list(node: &'node Node, list: Value) -> Self {
        Self {
            node,
            list,
            results: Mutex::default(),
        }
    }

    /// A network of one plugin, from its configuration with `cniVersion` and
    /// `name` in it.
    #[must_use]
    pub fn new(node: &'node Node, mut config: Value) -> Self {
        let mut take = |key: &str| {
            config
                .as_object_mut()
                .and_then(|config| config.remove(key))
                .unwrap_or(Value::Null)
        };
        let (version, name) = (take("cniVersion"), take("name"));
        Self::from_list(
            node,
            json!({"cniVersion": version, "name": name, "plugins": [config]}),
        )
    }

    /// The node it is on.
    #[must_use]
    pub fn node(&self) -> &'node Node {
        self.node
    }

    /// The configurations in the order of the list, as ADD, DEL and CHECK of an
    /// attachment find them on standard input (without `prevResult`).
    ///
    /// # Errors
    ///
    /// That the list has no plugins.
    pub fn configs(&self, attachment: Option<&Attachment>) -> Result<Vec<Value>> {
        let plugins = self
            .list
            .get("plugins")
            .and_then(Value::as_array)
            .context("a conflist without plugins")?;
        plugins
            .iter()
            .map(|plugin| {
                let mut config = plugin
                    .as_object()
                    .context("a plugin that is not an object")?
                    .clone();
                for key in ["cniVersion", "name"] {
                    if let Some(value) = self.list.get(key).filter(|value| !value.is_null()) {
                        config.insert(key.to_owned(), value.clone());
                    }
                }
                let runtime_config: serde_json::Map<String, Value> = attachment
                    .iter()
                    .flat_map(|attachment| &attachment.capabilities)
                    .filter(|(name, _)| plugin["capabilities"][name.as_str()] == json!(true))
                    .map(|(name, value)| (name.clone(), value.clone()))
                    .collect();
                if !runtime_config.is_empty() {
                    config.insert("runtimeConfig".to_owned(), Value::Object(runtime_config));
                }
                Ok(Value::Object(config))
            })
            .collect()
    }

    /// ADD, plugin after plugin: the result of the last.
    ///
    /// # Errors
    ///
    /// The first plugin's error. As libcni, this undoes nothing.
    pub fn add(&self, attachment: &Attachment) -> Result<Value> {
        let mut result = Value::Null;
        for mut config in self.configs(Some(attachment))? {
            if !result.is_null() {
                config["prevResult"] = result;
            }
            result = self
                .call(&config, Verb::Add)?
                .attachment(attachment)
                .run(self.node)?
                .success()?;
        }
        self.cache()?.insert(key(attachment), result.clone());
        Ok(result)
    }

    /// CHECK, plugin after plugin.
    ///
    /// # Errors
    ///
    /// The first plugin's error, or that the attachment was not added by this
    /// value.
    pub fn check(&self, attachment: &Attachment) -> Result<()> {
        let result = self
            .cache()?
            .get(&key(attachment))
            .cloned()
            .context("CHECK of an attachment without a result")?;
        for mut config in self.configs(Some(attachment))? {
            config["prevResult"] = result.clone();
            let reply = self
                .call(&config, Verb::Check)?
                .attachment(attachment)
                .run(self.node)?;
            ensure!(reply.success()?.is_null(), "CHECK wrote {}", reply.stdout);
        }
        Ok(())
    }

    /// DEL, from the last plugin to the first, stopping at an error.
    ///
    /// # Errors
    ///
    /// The first plugin's error.
    pub fn del(&self, attachment: &Attachment) -> Result<()> {
        let result = self.cache()?.get(&key(attachment)).cloned();
        for mut config in self.configs(Some(attachment))?.into_iter().rev() {
            // libcni: versions before 0.4.0 have no prevResult on DEL.
            let version = config["cniVersion"].as_str().unwrap_or_default().to_owned();
            if let Some(result) = result
                .as_ref()
                .filter(|_| !["", "0.1.0", "0.2.0", "0.3.0", "0.3.1"].contains(&version.as_str()))
            {
                config["prevResult"] = result.clone();
            }
            let reply = self
                .call(&config, Verb::Del)?
                .attachment(attachment)
                .run(self.node)?;
            ensure!(reply.success()?.is_null(), "DEL wrote {}", reply.stdout);
        }
        self.cache()?.remove(&key(attachment));
        Ok(())
    }

    /// GC of everything but `valid`: every plugin, whether others fail or not.
    ///
    /// # Errors
    ///
    /// All plugins' errors.
    pub fn gc(&self, valid: &[&Attachment]) -> Result<()> {
        let valid: Vec<Value> = valid
            .iter()
            .map(|attachment| {
                json!({"containerID": attachment.container_id, "ifname": attachment.ifname})
            })
            .collect();
        let mut errors = Vec::new();
        for mut config in self.configs(None)? {
            // libcni sends the name of before 1.1 was final, too.
            config["cni.dev/valid-attachments"] = valid.clone().into();
            config["cni.dev/attachments"] = valid.clone().into();
            let reply = self.call(&config, Verb::Gc)?.run(self.node)?;
            match reply.success() {
                Ok(Value::Null) => {}
                Ok(output) => errors.push(format!("GC wrote {output}")),
                Err(error) => errors.push(format!("{error:#}")),
            }
        }
        if !errors.is_empty() {
            bail!("{}", errors.join("; "));
        }
        Ok(())
    }

    /// STATUS of every plugin.
    ///
    /// # Errors
    ///
    /// That a plugin could not be called.
    pub fn status(&self) -> Result<Vec<Reply>> {
        self.configs(None)?
            .iter()
            .map(|config| self.call(config, Verb::Status)?.run(self.node))
            .collect()
    }

    /// A call of the plugin that `config` names, with `config` on standard
    /// input.
    ///
    /// # Errors
    ///
    /// That `config` names none.
    pub fn call(&self, config: &Value, verb: Verb) -> Result<Call> {
        let plugin = config["type"].as_str().context("a plugin without a type")?;
        Ok(Call::new(plugin, verb).stdin(config))
    }

    fn cache(&self) -> Result<std::sync::MutexGuard<'_, BTreeMap<(String, String), Value>>> {
        self.results
            .lock()
            .map_err(|_| anyhow!("another thread panicked"))
    }
}

/// What libcni's cache knows an attachment by, within a network.
fn key(attachment: &Attachment) -> (String, String) {
    (attachment.container_id.clone(), attachment.ifname.clone())
}

fn anonymous_file() -> Result<File> {
    Ok(memfd_create("reply", MFdFlags::MFD_CLOEXEC)
        .context("making an anonymous file")?
        .into())
}

fn rewound(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    String::from_utf8(bytes).context("the plugin wrote something other than UTF-8")
}

/// Waits for a child process: how it ended, and its peak memory in bytes.
fn wait_with_usage(pid: u32) -> Result<(ExitStatus, u64)> {
    let pid = libc::pid_t::try_from(pid)?;
    let mut status = 0;
    // SAFETY: an all-zero rusage is a valid value of that plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values of the types that wait4 writes.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    ensure!(
        waited == pid,
        "waiting for the plugin: {}",
        std::io::Error::last_os_error()
    );
    let kibibytes = u64::try_from(usage.ru_maxrss)?;
    Ok((ExitStatus::from_raw(status), kibibytes * 1024))
}
