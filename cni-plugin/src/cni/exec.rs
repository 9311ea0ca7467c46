//! Finding and running another plugin (spec section 4, "Plugin Delegation").

use std::{
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{self, Output, Stdio},
    thread,
    time::Duration,
};

use crate::fault;

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
/// More than that of a plugin's stdout or stderr is not read, in bytes.
const OUTPUT_MAX: u64 = 16 << 20;

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
    /// Code 7 if `name` is no plain file name, 4 if `path` is empty or has a relative
    /// directory, 5 if there is no such plugin.
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
        if let Some(dir) = path.iter().find(|dir| dir.is_relative()) {
            return Err(CniError::invalid_env(
                "CNI_PATH",
                dir.display().to_string(),
                format!(
                    "a list of absolute directories: plugin {name:?} is not looked for in \
                     whatever directory the runtime is in"
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
        fault::point(format_args!("{command} of {}", self.name));
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
        // Written while its output is read: each may be more than a pipe holds.
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let output = thread::scope(|scope| {
            thread::Builder::new().spawn_scoped(scope, || {
                if let Some(mut stdin) = stdin {
                    // A plugin need not read it; whether it has enough it decides.
                    let _ = stdin.write_all(&self.config.stdin);
                }
            })?;
            let stderr = thread::Builder::new().spawn_scoped(scope, || read("stderr", stderr))?;
            let stdout = read("stdout", stdout);
            if stdout.is_err() {
                // It would go on writing.
                let _ = child.kill();
            }
            let stderr = stderr.join().unwrap_or_else(|_| Ok(Vec::new()));
            Ok::<_, io::Error>((stdout, stderr))
        });
        if output.as_ref().is_ok_and(|(_, stderr)| stderr.is_err()) {
            let _ = child.kill();
        }
        let status = child.wait()?;
        let (stdout, stderr) = output?;
        Ok(Output {
            status,
            stdout: stdout?,
            stderr: stderr?,
        })
    }
}

/// What a plugin writes, as far as it may.
fn read(name: &str, pipe: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(OUTPUT_MAX + 1).read_to_end(&mut all)?;
    }
    if all.len() as u64 > OUTPUT_MAX {
        return Err(io::Error::other(format!(
            "it writes more than {OUTPUT_MAX} bytes to {name}"
        )));
    }
    Ok(all)
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
        let code = match code {
            // Stands for success everywhere else.
            0 => ErrorCode::Internal,
            code => code.into(),
        };
        return CniError::new(code, text("msg")).with_details(text("details"));
    }
    let words = [stdout.trim(), stderr.trim()];
    let words: Vec<_> = words.into_iter().filter(|text| !text.is_empty()).collect();
    CniError::internal(if words.is_empty() {
        format!("no error message, {}", output.status)
    } else {
        format!("{}, {}", words.join("; "), output.status)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions, Permissions};

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::cni::env::CniArgs;

    fn config(more: &str) -> NetworkConfig {
        let stdin = json!({ "cniVersion": "1.0.0", "name": "net", "pad": more });
        let stdin = stdin.to_string().into_bytes();
        NetworkConfig::parse(stdin, Command::Add, &CniArgs::default()).unwrap()
    }

    /// A directory with the plugin `name`, a shell script.
    fn dir_with(name: &str, script: &str) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o755)).unwrap();
        dir
    }

    fn path(dir: &TempDir) -> Vec<PathBuf> {
        vec![dir.path().to_owned()]
    }

    #[test]
    fn the_first_executable_regular_file_is_found() {
        let config = config("");
        let absent = PathBuf::from("/nonexistent");
        let is_directory = tempfile::tempdir().unwrap();
        fs::create_dir(is_directory.path().join("static")).unwrap();
        let not_executable = tempfile::tempdir().unwrap();
        File::create(not_executable.path().join("static")).unwrap();
        let first = dir_with("static", "");
        let second = dir_with("static", "");
        let dirs = [&is_directory, &not_executable, &first, &second];
        let mut path: Vec<_> = dirs.iter().map(|dir| dir.path().to_owned()).collect();
        path.insert(0, absent);
        let found = Delegate::find("static", &path, &config).unwrap();
        assert_eq!(found.program(), first.path().join("static"));

        let error = Delegate::find("static", &path[..3], &config).unwrap_err();
        assert_eq!(error.code, ErrorCode::Io);
        assert!(
            error.msg.contains("\"static\"") && error.msg.contains("CNI_PATH"),
            "{error}"
        );
    }

    #[test]
    fn names_that_leave_the_path_are_refused() {
        let config = config("");
        let dir = dir_with("static", "");
        for name in ["", "/bin/sh", "../static", "a/b", ".", "..", "a\0b"] {
            let error = Delegate::find(name, &path(&dir), &config).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidConfig, "{name:?}");
            assert!(error.msg.contains("ipam.type"), "{error}");
        }
        let error = Delegate::find("static", &[], &config).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidEnvironment);
        assert!(error.msg.contains("CNI_PATH"), "{error}");
    }

    #[test]
    fn the_plugin_gets_command_environment_and_the_whole_stdin() {
        // More than a pipe holds, in both directions.
        let config = config(&"x".repeat(1 << 20));
        let dir = dir_with(
            "echo",
            r#"printf '{"command":"%s","path":"%s","stdin":' "$CNI_COMMAND" "$PATH"; cat; printf '}'"#,
        );
        let delegate = Delegate::find("echo", &path(&dir), &config).unwrap();
        let stdout = delegate.stdout(Command::Check).unwrap();
        let echoed: serde_json::Value = serde_json::from_slice(&stdout).unwrap();
        assert_eq!(echoed["command"], "CHECK");
        assert_eq!(echoed["path"], std::env::var("PATH").unwrap().as_str());
        assert_eq!(echoed["stdin"], config.raw);
    }

    #[test]
    fn a_result_without_version_has_the_configurations() {
        let config = config("");
        for (result, count) in [
            (r#"{"ips":[{"address":"10.0.0.2/8"}],"dns":{}}"#, 1),
            (r#"{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.2/8"}}"#, 1),
            (
                r#"{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.0.0.2/8"}]}"#,
                1,
            ),
            ("null", 0),
            ("{}", 0),
        ] {
            let dir = dir_with("p", &format!("cat >/dev/null; echo '{result}'"));
            let result = Delegate::find("p", &path(&dir), &config)
                .unwrap()
                .add()
                .unwrap();
            assert_eq!(result.ips.len(), count);
        }
    }

    #[test]
    fn a_plugin_need_not_read_its_stdin() {
        let config = config(&"x".repeat(1 << 20));
        let dir = dir_with("p", "exit 0");
        let delegate = Delegate::find("p", &path(&dir), &config).unwrap();
        assert_eq!(delegate.call(Command::Del), Ok(()));
    }

    #[test]
    fn a_result_that_cannot_be_read_is_a_decoding_error() {
        let config = config("");
        for result in [
            "",
            "garbage",
            "[]",
            r#"{"ips":[{}]}"#,
            r#"{"cniVersion":"9"}"#,
        ] {
            let dir = dir_with("p", &format!("printf '%s' '{result}'"));
            let error = Delegate::find("p", &path(&dir), &config)
                .unwrap()
                .add()
                .unwrap_err();
            assert_eq!(error.code, ErrorCode::Decode, "{result}");
            assert!(error.msg.contains("\"p\""), "{error}");
        }
    }

    #[test]
    fn a_failure_is_passed_on() {
        let config = config("");
        for (script, code, mention) in [
            (
                r#"echo '{"code":11,"msg":"later","details":"d"}'; exit 1"#,
                11,
                "later: d",
            ),
            (r#"echo '{"code":142,"msg":"own"}'; exit 3"#, 142, "own"),
            (r#"echo '{"code":0,"msg":"odd"}'; exit 1"#, 999, "odd"),
            ("echo words >&2; exit 1", 999, "words, exit status: 1"),
            (
                "echo no json; echo words >&2; exit 2",
                999,
                "no json; words, exit status: 2",
            ),
            ("exit 7", 999, "no error message, exit status: 7"),
            ("kill -9 $$", 999, "signal: 9"),
        ] {
            let dir = dir_with("p", script);
            let delegate = Delegate::find("p", &path(&dir), &config).unwrap();
            let error = delegate.add().unwrap_err();
            assert_eq!(u32::from(error.code), code, "{error}");
            let text = error.to_string();
            assert!(text.starts_with("plugin \"p\" failed ADD: "), "{text}");
            assert!(text.contains(mention), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_run_is_an_io_error() {
        let config = config("");
        let dir = dir_with("p", "");
        fs::write(dir.path().join("p"), "#!/nonexistent/interpreter\n").unwrap();
        let delegate = Delegate::find("p", &path(&dir), &config).unwrap();
        let error = delegate.call(Command::Del).unwrap_err();
        assert_eq!(error.code, ErrorCode::Io);
        assert!(error.msg.contains(dir.path().to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_plugin_that_never_stops_writing_is_stopped() {
        let config = config("");
        for (stream, script) in [
            ("stdout", "trap '' PIPE; exec yes"),
            ("stderr", "trap '' PIPE; exec yes >&2"),
        ] {
            let dir = dir_with("p", script);
            let delegate = Delegate::find("p", &path(&dir), &config).unwrap();
            let error = delegate.call(Command::Del).unwrap_err();
            assert_eq!(error.code, ErrorCode::Io);
            assert!(error.to_string().contains(stream), "{error}");
        }
    }

    #[test]
    fn a_relative_directory_is_not_searched() {
        let config = config("");
        let dir = dir_with("p", "");
        let path = vec![dir.path().to_owned(), "bin".into()];
        let error = Delegate::find("p", &path, &config).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidEnvironment);
        assert!(error.to_string().contains("\"bin\""), "{error}");
    }

    #[test]
    fn a_plugin_that_is_being_written_is_waited_for() {
        let config = config("");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p");
        fs::copy("/bin/true", &file).unwrap();
        let writer = OpenOptions::new().write(true).open(&file).unwrap();
        let delegate = Delegate::find("p", &path(&dir), &config).unwrap();
        let started = std::time::Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(250));
                drop(writer);
            });
            assert_eq!(delegate.call(Command::Del), Ok(()));
        });
        assert!(started.elapsed() >= Duration::from_millis(200));
    }
}
