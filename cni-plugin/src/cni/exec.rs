//! Finding and running another plugin (spec section 4, "Plugin Delegation").

use std::{
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{self, Output, Stdio},
    thread,
    time::Duration,
};

use super::{
    config::NetworkConfig,
    env::Command,
    error::{CniError, ErrorCode},
    json::{self, Object},
    result::CniResult,
};

/// How often and after what pause a plugin is tried again whose file is being
/// written (ETXTBSY). Together as long as libcni waits.
const BUSY_TRIES: u32 = 50;
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// Another plugin, found, and the network that it is to serve.
#[derive(Clone, Debug)]
pub struct Delegate<'a> {
    name: &'a str,
    program: PathBuf,
    config: &'a NetworkConfig,
}

impl<'a> Delegate<'a> {
    /// Looks for the plugin `name` in the directories `path`: the first regular
    /// file that may be executed.
    ///
    /// # Errors
    ///
    /// Code 7 if `name` is no plain file name, 4 if `path` is empty, 5 if there
    /// is no such plugin.
    pub fn find(
        name: &'a str,
        path: &[PathBuf],
        config: &'a NetworkConfig,
    ) -> Result<Self, CniError> {
        if name.is_empty() || name.contains(['/', '\0']) || matches!(name, "." | "..") {
            return Err(CniError::invalid_config(
                "ipam.type",
                format!("{name:?}"),
                "the name of a plugin, without '/'",
            ));
        }
        if path.is_empty() {
            return Err(CniError::new(
                ErrorCode::InvalidEnvironment,
                format!(
                    "required env variables [CNI_PATH] missing: plugin {name:?} is looked for there"
                ),
            ));
        }
        let is_plugin = |file: &PathBuf| {
            // Follows links, as plugins are often linked into place.
            file.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        };
        let program = path.iter().map(|dir| dir.join(name)).find(is_plugin);
        Ok(Self {
            name,
            program: program.ok_or_else(|| {
                CniError::io(
                    format_args!("looking for plugin {name:?}"),
                    format_args!("no executable file of that name in CNI_PATH {path:?}"),
                )
            })?,
            config,
        })
    }

    /// The file that was found.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Has the plugin serve `command` with this process's environment and the
    /// same stdin. Waits for it as long as it takes, like libcni: the runtime
    /// limits the whole call.
    ///
    /// The child is in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The plugin's own error, with its code; code 5 if it cannot be run, 999 if
    /// it fails without a word.
    pub fn call(&self, command: Command) -> Result<(), CniError> {
        self.stdout(command).map(drop)
    }

    /// As [`Self::call`] of ADD, with the result.
    ///
    /// # Errors
    ///
    /// Those of [`Self::call`], and code 6 for a result that cannot be read.
    pub fn add(&self) -> Result<CniResult, CniError> {
        let stdout = self.stdout(Command::Add)?;
        let what = format!("the result of plugin {:?}", self.name);
        let value = json::decode(&stdout).map_err(|e| CniError::decode(&what, e))?;
        CniResult::from_json(&value, "result", self.config.cni_version).map_err(|error| CniError {
            code: ErrorCode::Decode,
            ..error.context(format_args!("decoding {what}"))
        })
    }

    fn stdout(&self, command: Command) -> Result<Vec<u8>, CniError> {
        let output = self
            .run(command)
            .map_err(|e| CniError::io(format_args!("running {}", self.program.display()), e))?;
        if output.status.success() {
            // Its own words for the operator; on failure they are in the error.
            let _ = io::stderr().write_all(&output.stderr);
            return Ok(output.stdout);
        }
        Err(failure(&output).context(format_args!("plugin {:?} failed {command}", self.name)))
    }

    fn run(&self, command: Command) -> io::Result<Output> {
        let mut tries = 0;
        let mut child = loop {
            let spawned = process::Command::new(&self.program)
                .env("CNI_COMMAND", command.as_str())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            match spawned {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                    tries += 1;
                    thread::sleep(BUSY_PAUSE);
                }
                spawned => break spawned?,
            }
        };
        // Written while its output is read: both may be more than a pipe holds.
        let stdin = child.stdin.take();
        thread::scope(|scope| {
            scope.spawn(|| {
                if let Some(mut stdin) = stdin {
                    // A plugin need not read it; whether it has enough it decides.
                    let _ = stdin.write_all(&self.config.stdin);
                }
            });
            child.wait_with_output()
        })
    }
}

/// What a plugin that failed has said.
fn failure(output: &Output) -> CniError {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    if let Ok(value) = json::decode(&output.stdout)
        && let Ok(object) = Object::new(&value, "error")
        && let Ok(Some(code)) = object.int::<u32>("code", 0..=i64::from(u32::MAX))
    {
        let text = |key| object.str(key).ok().flatten().unwrap_or_default();
        return CniError::new(code.into(), text("msg")).with_details(text("details"));
    }
    let words = [stdout.trim(), stderr.trim()];
    let words: Vec<_> = words.into_iter().filter(|text| !text.is_empty()).collect();
    CniError::internal(if words.is_empty() {
        format!("no error message, {}", output.status)
    } else {
        format!("{}, {}", words.join("; "), output.status)
    })
}
