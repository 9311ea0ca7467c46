//! What the environment says: the verb and its parameters (spec section 2,
//! "Parameters").

use std::{ffi::OsString, fmt, net::IpAddr, path::PathBuf};

use ipnet::IpNet;

use crate::mac::MacAddr;

use super::{
    error::{CniError, ErrorCode},
    names::{self, AttachmentId},
};

/// A verb of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Attach a container to the network.
    Add,
    /// Undo an attachment.
    Del,
    /// Check that an attachment is as its ADD left it (since 0.4.0).
    Check,
    /// Remove what belongs to no valid attachment (since 1.1.0).
    Gc,
    /// Tell whether the plugin is ready for ADD (since 1.1.0).
    Status,
    /// Tell the supported versions.
    Version,
}

impl Command {
    /// Every verb.
    pub const ALL: [Self; 6] = [
        Self::Add,
        Self::Del,
        Self::Check,
        Self::Gc,
        Self::Status,
        Self::Version,
    ];

    /// The verb as `CNI_COMMAND` has it.
    pub const fn as_str(self) -> &'static str {
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

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A call of the plugin: the verb with the parameters that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// What is asked for.
    pub verb: Verb,
    /// `CNI_PATH`: where plugins are looked for, first directory first; empty if
    /// it is not set.
    pub path: Vec<PathBuf>,
    /// `CNI_ARGS`, parsed; empty for verbs that are not about one attachment.
    pub args: CniArgs,
    /// `CNI_NETNS_OVERRIDE`: the container's namespace may be the plugin's own.
    pub netns_override: bool,
    /// What was wrong and is no reason to refuse the call.
    pub warnings: Vec<String>,
}

/// A verb and what it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verb {
    /// ADD of an attachment, in the namespace at this path.
    Add(AttachmentId, PathBuf),
    /// DEL of an attachment; the namespace may be gone.
    Del(AttachmentId, Option<PathBuf>),
    /// CHECK of an attachment, in the namespace at this path.
    Check(AttachmentId, PathBuf),
    /// GC of a network.
    Gc,
    /// STATUS of a network.
    Status,
    /// VERSION; everything else in the environment is meaningless.
    Version,
}

impl Verb {
    /// The verb alone.
    pub const fn command(&self) -> Command {
        match self {
            Self::Add(..) => Command::Add,
            Self::Del(..) => Command::Del,
            Self::Check(..) => Command::Check,
            Self::Gc => Command::Gc,
            Self::Status => Command::Status,
            Self::Version => Command::Version,
        }
    }
}

/// `CNI_ARGS`: `K=V;K=V`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CniArgs {
    /// `IP`: the wanted addresses, separated by commas. A prefix length is
    /// accepted and dropped, as by host-local: the range decides it.
    pub ips: Vec<IpAddr>,
    /// `MAC`: the wanted address of the container's interface.
    pub mac: Option<MacAddr>,
    /// The other pairs (`K8S_POD_NAME` and its like), in order. Not empty only
    /// if `IgnoreUnknown` is set.
    pub unknown: Vec<(String, String)>,
}

impl CniArgs {
    /// Parses the value of `CNI_ARGS`.
    ///
    /// # Errors
    ///
    /// Code 4 for what is no pair, an invalid value of a known key, and unknown
    /// keys without `IgnoreUnknown=1` (pkg/types/args.go of libcni).
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let mut args = Self::default();
        let mut ignore_unknown = false;
        if text.is_empty() {
            return Ok(args);
        }
        for pair in text.split(';') {
            let Some((key, value)) = pair.split_once('=').filter(|(_, v)| !v.contains('=')) else {
                return Err(invalid_arg(pair, "KEY=VALUE"));
            };
            match key {
                "IgnoreUnknown" => {
                    ignore_unknown = match value.to_ascii_lowercase().as_str() {
                        "1" | "true" => true,
                        "0" | "false" => false,
                        _ => return Err(invalid_arg(pair, "1, true, 0 or false")),
                    };
                }
                "IP" if value.is_empty() => args.ips.clear(),
                "IP" => {
                    let ips: Option<_> = value.split(',').map(parse_requested_ip).collect();
                    args.ips =
                        ips.ok_or_else(|| invalid_arg(pair, "IP addresses separated by commas"))?;
                }
                "MAC" if value.is_empty() => args.mac = None,
                "MAC" => {
                    let mac = value.parse().ok().filter(|mac: &MacAddr| mac.is_unicast());
                    args.mac = Some(mac.ok_or_else(|| {
                        invalid_arg(pair, "a unicast ethernet address such as 02:00:5e:10:00:01")
                    })?);
                }
                _ => args.unknown.push((key.to_owned(), value.to_owned())),
            }
        }
        if !ignore_unknown && !args.unknown.is_empty() {
            let keys: Vec<_> = args.unknown.iter().map(|(key, _)| key.as_str()).collect();
            return Err(CniError::new(
                ErrorCode::InvalidEnvironment,
                format!(
                    "invalid environment: CNI_ARGS has unknown keys {keys:?}, known are IP, MAC \
                     and IgnoreUnknown (IgnoreUnknown=1 accepts any)"
                ),
            ));
        }
        Ok(args)
    }
}

fn invalid_arg(pair: &str, expected: &str) -> CniError {
    CniError::invalid_env("CNI_ARGS", pair, expected).with_details("at the pair shown")
}

/// An address that a container asks for, with or without a prefix length, which
/// is dropped.
pub fn parse_requested_ip(text: &str) -> Option<IpAddr> {
    text.parse()
        .ok()
        .or_else(|| text.parse().ok().map(|net: IpNet| net.addr()))
}

impl Invocation {
    /// Reads the environment. `None` if `CNI_COMMAND` is not set: then this is no
    /// CNI call.
    ///
    /// # Errors
    ///
    /// Code 4 for missing variables (all of them in one error) and invalid ones.
    pub fn from_env(env: impl Fn(&str) -> Option<OsString>) -> Result<Option<Self>, CniError> {
        let mut vars = Vars {
            env,
            missing: Vec::new(),
        };
        let Some(command) = vars.optional("CNI_COMMAND")? else {
            return Ok(None);
        };
        let Some(command) = Command::ALL.into_iter().find(|c| c.as_str() == command) else {
            return Err(CniError::new(
                ErrorCode::InvalidEnvironment,
                format!(
                    "unknown CNI_COMMAND: {command:?}, must be one of {}",
                    Command::ALL.map(Command::as_str).join(", ")
                ),
            ));
        };
        let mut invocation = Self {
            verb: Verb::Version,
            path: Vec::new(),
            args: CniArgs::default(),
            netns_override: false,
            warnings: Vec::new(),
        };
        if command == Command::Version {
            return Ok(Some(invocation));
        }
        let about_attachment = matches!(command, Command::Add | Command::Del | Command::Check);
        let mut container_id = None;
        let mut netns = None;
        let mut ifname = None;
        if about_attachment {
            container_id = vars.required("CNI_CONTAINERID")?;
            netns = match command {
                Command::Del => vars.optional("CNI_NETNS")?,
                _ => vars.required("CNI_NETNS")?,
            }
            .map(PathBuf::from);
            ifname = vars.required("CNI_IFNAME")?;
        }
        // Only GC must have it (spec section 2, "GC"); elsewhere it is missed
        // when a plugin is looked for.
        let path = match command {
            Command::Gc => vars.required("CNI_PATH")?,
            _ => vars.optional("CNI_PATH")?,
        };
        vars.check_missing()?;

        // An empty element would mean the working directory of the runtime.
        invocation.path = path
            .iter()
            .flat_map(std::env::split_paths)
            .filter(|dir| !dir.as_os_str().is_empty())
            .collect();
        invocation.verb = match (command, container_id.zip(ifname)) {
            (_, Some((container_id, ifname))) => {
                names::check_container_id(&container_id)
                    .map_err(|e| CniError::invalid_env("CNI_CONTAINERID", &container_id, e))?;
                names::check_ifname(&ifname)
                    .map_err(|e| CniError::invalid_env("CNI_IFNAME", &ifname, e))?;
                let id = AttachmentId {
                    container_id,
                    ifname,
                };
                match (command, netns) {
                    (Command::Del, netns) => Verb::Del(id, netns),
                    (Command::Check, Some(netns)) => Verb::Check(id, netns),
                    (_, Some(netns)) => Verb::Add(id, netns),
                    (_, None) => return Err(missing(&["CNI_NETNS"])),
                }
            }
            (Command::Gc, None) => Verb::Gc,
            (_, None) => Verb::Status,
        };
        if about_attachment {
            let args = vars
                .optional("CNI_ARGS")
                .and_then(|args| CniArgs::parse(args.as_deref().unwrap_or_default()));
            match args {
                Ok(args) => invocation.args = args,
                // DEL has no use for them, and must not fail for them for ever.
                Err(error) if command == Command::Del => {
                    invocation.warnings.push(error.to_string());
                }
                Err(error) => return Err(error),
            }
            let value = vars.optional("CNI_NETNS_OVERRIDE")?.unwrap_or_default();
            invocation.netns_override = value == "1" || value.eq_ignore_ascii_case("true");
        }
        Ok(Some(invocation))
    }
}

/// The environment, and which of it was missed.
struct Vars<F> {
    env: F,
    missing: Vec<&'static str>,
}

impl<F: Fn(&str) -> Option<OsString>> Vars<F> {
    /// The value of a variable; an empty one counts as not set.
    fn optional(&self, name: &str) -> Result<Option<String>, CniError> {
        match (self.env)(name) {
            None => Ok(None),
            Some(value) => match value.into_string() {
                Ok(text) => Ok(Some(text).filter(|text| !text.is_empty())),
                Err(raw) => Err(CniError::invalid_env(name, raw, "UTF-8 text")),
            },
        }
    }

    /// As [`Self::optional`], with its absence noted.
    fn required(&mut self, name: &'static str) -> Result<Option<String>, CniError> {
        let value = self.optional(name)?;
        if value.is_none() {
            self.missing.push(name);
        }
        Ok(value)
    }

    fn check_missing(&self) -> Result<(), CniError> {
        if self.missing.is_empty() {
            Ok(())
        } else {
            Err(missing(&self.missing))
        }
    }
}

fn missing(names: &[&str]) -> CniError {
    CniError::new(
        ErrorCode::InvalidEnvironment,
        format!("required env variables [{}] missing", names.join(",")),
    )
}
