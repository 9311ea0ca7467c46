//! From a call to its answer: what skel is to the stock plugins.

use std::{
    ffi::OsString,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::fault;

use super::{
    config::{self, NetworkConfig},
    env::{CniArgs, Command, Invocation, Verb},
    error::{CniError, ErrorCode},
    exec::Delegate,
    json as cni_json,
    names::AttachmentId,
    result::CniResult,
    version::SpecVersion,
};

/// The largest network configuration, in bytes. A real one, with its
/// `prevResult`, is a few kilobytes; a GC's has some 100 bytes per attachment.
pub const STDIN_MAX: u64 = 16 << 20;

/// A call of the plugin, validated: what every verb is given.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The verb. While a failed ADD is undone, it is DEL.
    pub command: Command,
    /// The network.
    pub config: &'a NetworkConfig,
    /// `CNI_ARGS`. What a network takes from them (`mac`, `requested_ips`) is in
    /// `config` already.
    pub args: &'a CniArgs,
    /// `CNI_PATH`.
    pub path: &'a [PathBuf],
    /// `CNI_NETNS_OVERRIDE`: the container's namespace may be the plugin's own.
    pub netns_override: bool,
}

impl<'a> Call<'a> {
    /// The plugin named `name` (an `ipam.type`), to be called with this verb.
    ///
    /// # Errors
    ///
    /// Those of [`Delegate::find`].
    pub fn delegate(&self, name: &'a str) -> Result<Delegate<'a>, CniError> {
        Delegate::find(name, self.path, self.config)
    }
}

/// The verbs that do something. Each gets a call that is valid as far as the
/// protocol goes, in a version that knows the verb.
pub trait Plugin {
    /// Attaches a container: all of it, or an error and nothing of it.
    ///
    /// If the answer then cannot be given (a result that the configuration's
    /// version cannot express, stdout closed), the runtime takes the ADD for
    /// failed, so [`run`] undoes it by [`Plugin::del`].
    ///
    /// # Errors
    ///
    /// What the runtime is told.
    fn add(
        &mut self,
        call: &Call<'_>,
        id: &AttachmentId,
        netns: &Path,
    ) -> Result<CniResult, CniError>;

    /// The runtime has been given the answer to the ADD that came before: only now
    /// does the attachment count. An ADD that is killed before has failed.
    ///
    /// # Errors
    ///
    /// What could not be noted; the operator is told.
    fn added(&mut self) -> Result<(), CniError>;

    /// Checks that an attachment is as `call.config.prev_result`, which is there,
    /// has it.
    ///
    /// # Errors
    ///
    /// What is not as it should be.
    fn check(&mut self, call: &Call<'_>, id: &AttachmentId, netns: &Path) -> Result<(), CniError>;

    /// Removes what there is of an attachment. That there is nothing is success;
    /// an error stops nothing and is told at the end.
    ///
    /// # Errors
    ///
    /// What could not be removed.
    fn del(
        &mut self,
        call: &Call<'_>,
        id: &AttachmentId,
        netns: Option<&Path>,
    ) -> Result<(), CniError>;

    /// Removes every attachment of the network that is not among `valid`.
    ///
    /// # Errors
    ///
    /// What could not be removed.
    fn gc(&mut self, call: &Call<'_>, valid: &[AttachmentId]) -> Result<(), CniError>;

    /// Tells whether an ADD would succeed.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotAvailable`] if it would not,
    /// [`ErrorCode::LimitedConnectivity`] if attached containers suffer as well.
    fn status(&mut self, call: &Call<'_>) -> Result<(), CniError>;
}

/// The exit status of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done: status 0.
    Success,
    /// Not done, the error is on stdout: status 1.
    Failure,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Success => Self::SUCCESS,
            Exit::Failure => Self::FAILURE,
        }
    }
}

/// Serves one call: reads the environment and `stdin`, has `plugin` do it, writes
/// the result or the error to `stdout`, and anything else to `stderr`.
pub fn run(
    plugin: &mut impl Plugin,
    env: impl Fn(&str) -> Option<OsString>,
    stdin: &mut impl Read,
    stdout: &mut impl Write,
    stderr: &mut impl Write,
) -> Exit {
    let mut io = Io {
        stdin,
        stdout,
        stderr,
        broken: false,
    };
    // Until the configuration names a version, an error is written in the newest.
    let mut version = SpecVersion::LATEST;
    match serve(plugin, env, &mut io, &mut version) {
        Ok(()) => Exit::Success,
        Err(error) => {
            // What a broken stdout has taken so far is not to be added to.
            if io.broken || io.answer(&error.to_json(version)).is_err() {
                io.note(&error);
            }
            Exit::Failure
        }
    }
}

struct Io<'a, R, O, E> {
    stdin: &'a mut R,
    stdout: &'a mut O,
    stderr: &'a mut E,
    /// Whether writing to `stdout` has failed.
    broken: bool,
}

impl<R: Read, O: Write, E: Write> Io<'_, R, O, E> {
    fn read(&mut self) -> Result<Vec<u8>, CniError> {
        let mut stdin = Vec::new();
        self.stdin
            .take(STDIN_MAX + 1)
            .read_to_end(&mut stdin)
            .map_err(|e| CniError::io("reading the network configuration from stdin", e))?;
        if stdin.len() as u64 > STDIN_MAX {
            return Err(CniError::decode(
                "the network configuration",
                format!("it is larger than {STDIN_MAX} bytes"),
            ));
        }
        Ok(stdin)
    }

    /// Writes the one JSON document of the call.
    fn answer(&mut self, document: &Value) -> Result<(), CniError> {
        // In one write, so that no part of it is there without the rest.
        let text = format!("{document:#}\n");
        let written = self.stdout.write_all(text.as_bytes());
        let written = written.and_then(|()| self.stdout.flush());
        self.broken = written.is_err();
        written.map_err(|e| CniError::io("writing the answer to stdout", e))
    }

    /// Tells the operator something. That nobody may be listening is no failure
    /// of the call.
    fn note(&mut self, message: impl std::fmt::Display) {
        let _ = writeln!(self.stderr, "{}: {message}", env!("CARGO_PKG_NAME"));
    }
}

fn serve<R: Read, O: Write, E: Write>(
    plugin: &mut impl Plugin,
    env: impl Fn(&str) -> Option<OsString>,
    io: &mut Io<'_, R, O, E>,
    version: &mut SpecVersion,
) -> Result<(), CniError> {
    let Some(invocation) = Invocation::from_env(env)? else {
        // What skel prints, word for word: nerdctl looks for it.
        let _ = writeln!(
            io.stderr,
            "CNI {} plugin v{}\nCNI protocol versions supported: {}",
            env!("CARGO_PKG_NAME"),
            env!("CARGO_PKG_VERSION"),
            SpecVersion::supported_list()
        );
        return Ok(());
    };
    let command = invocation.verb.command();
    if command == Command::Version {
        let stdin = io.read().unwrap_or_default();
        return io.answer(&versions(&stdin));
    }

    let stdin = io.read()?;
    let raw =
        cni_json::decode(&stdin).map_err(|e| CniError::decode("the network configuration", e))?;
    *version = config::peek_version(&raw)?;
    check_verb(command, *version)?;
    let config = NetworkConfig::from_value(raw, stdin, command, &invocation.args)?;
    for warning in invocation.warnings.iter().chain(&config.warnings) {
        io.note(format_args!("warning: {warning}"));
    }

    let call = Call {
        command,
        config: &config,
        args: &invocation.args,
        path: &invocation.path,
        netns_override: invocation.netns_override,
    };
    match &invocation.verb {
        Verb::Add(id, netns) => {
            let result = plugin.add(&call, id, netns)?;
            let answered = result
                .to_json(*version)
                .and_then(|document| io.answer(&document));
            if let Err(error) = answered {
                let undo = Call {
                    command: Command::Del,
                    ..call
                };
                return Err(match plugin.del(&undo, id, Some(netns)) {
                    Ok(()) => error,
                    Err(undoing) => error.with_details(format!("undoing it: {undoing}")),
                });
            }
            fault::point("answer");
            if let Err(error) = plugin.added() {
                io.note(format_args!("warning: {error}"));
            }
            Ok(())
        }
        Verb::Del(id, netns) => plugin.del(&call, id, netns.as_deref()),
        Verb::Check(id, netns) => plugin.check(&call, id, netns),
        Verb::Gc => plugin.gc(
            &call,
            config.valid_attachments.as_deref().unwrap_or_default(),
        ),
        Verb::Status => plugin.status(&call),
        Verb::Version => Ok(()),
    }
}

/// Refuses a verb that the configuration's version does not know.
fn check_verb(command: Command, version: SpecVersion) -> Result<(), CniError> {
    let since = match command {
        Command::Check => SpecVersion::V0_4_0,
        Command::Gc | Command::Status => SpecVersion::V1_1_0,
        Command::Add | Command::Del | Command::Version => return Ok(()),
    };
    if version >= since {
        return Ok(());
    }
    Err(CniError::new(
        ErrorCode::IncompatibleVersion,
        format!("config version does not allow {command}"),
    )
    .with_details(format!(
        "cniVersion is {version}, {command} is known since {since}"
    )))
}

/// The answer to VERSION. It carries the version of the question, and asks
/// nothing of it: libcni sends placeholders.
fn versions(stdin: &[u8]) -> Value {
    let asked = cni_json::decode(stdin)
        .ok()
        .filter(|raw| raw.get("cniVersion").is_some())
        .and_then(|raw| config::peek_version(&raw).ok());
    json!({
        "cniVersion": asked.unwrap_or(SpecVersion::LATEST).as_str(),
        "supportedVersions": SpecVersion::SUPPORTED.map(SpecVersion::as_str),
    })
}

#[cfg(test)]
mod tests;
