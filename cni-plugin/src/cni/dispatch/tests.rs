//! Whole calls, as a runtime makes them, with everything in memory.

use std::{collections::BTreeMap, io};

use super::*;
use crate::cni::result::IpConfig;

/// A plugin that records its calls and answers as told.
#[derive(Default)]
struct Recorder {
    calls: Vec<String>,
    result: CniResult,
    error: Option<CniError>,
    del_error: Option<CniError>,
    added: bool,
}

impl Recorder {
    fn answer(&mut self, call: &Call<'_>, what: String) -> Result<(), CniError> {
        self.calls
            .push(format!("{} {} {what}", call.command, call.config.name));
        self.error.clone().map_or(Ok(()), Err)
    }
}

impl Plugin for Recorder {
    fn add(
        &mut self,
        call: &Call<'_>,
        id: &AttachmentId,
        netns: &Path,
    ) -> Result<CniResult, CniError> {
        self.answer(call, format!("{id} {}", netns.display()))?;
        Ok(self.result.clone())
    }

    fn added(&mut self) -> Result<(), CniError> {
        self.added = true;
        Ok(())
    }

    fn check(&mut self, call: &Call<'_>, id: &AttachmentId, netns: &Path) -> Result<(), CniError> {
        self.answer(call, format!("{id} {}", netns.display()))
    }

    fn del(
        &mut self,
        call: &Call<'_>,
        id: &AttachmentId,
        netns: Option<&Path>,
    ) -> Result<(), CniError> {
        self.answer(call, format!("{id} {netns:?}"))?;
        self.del_error.clone().map_or(Ok(()), Err)
    }

    fn gc(&mut self, call: &Call<'_>, valid: &[AttachmentId]) -> Result<(), CniError> {
        let valid: Vec<_> = valid.iter().map(AttachmentId::to_string).collect();
        self.answer(call, format!("{valid:?}"))
    }

    fn status(&mut self, call: &Call<'_>) -> Result<(), CniError> {
        self.answer(call, String::new())
    }
}

/// A pipe whose other end is closed.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes what is written and fails at the end, as a full disk may.
struct FailsAtFlush(Vec<u8>);

impl Write for FailsAtFlush {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
}

struct Answer {
    exit: Exit,
    stdout: String,
    stderr: String,
    calls: Vec<String>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// Checks that the call failed with this code; gives the message.
    fn error(&self, code: u32) -> String {
        assert_eq!(self.exit, Exit::Failure, "{}", self.stdout);
        let json = self.json();
        assert_eq!(json["code"], code, "{json}");
        assert!(json["cniVersion"].is_string(), "{json}");
        json["msg"].as_str().unwrap().to_owned()
    }

    /// Checks that the call succeeded without a word.
    fn done(&self) {
        assert_eq!(self.exit, Exit::Success, "{}", self.stdout);
        assert_eq!(self.stdout, "");
    }
}

fn environment(command: &str) -> BTreeMap<String, String> {
    [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/c1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

fn run_with(
    plugin: &mut Recorder,
    env: &BTreeMap<String, String>,
    mut stdin: impl Read,
    stdout: &mut impl Write,
) -> (Exit, String) {
    let mut stderr = Vec::new();
    let exit = run(
        plugin,
        |name| env.get(name).map(Into::into),
        &mut stdin,
        stdout,
        &mut stderr,
    );
    (exit, String::from_utf8(stderr).unwrap())
}

fn call_with(mut plugin: Recorder, env: &BTreeMap<String, String>, stdin: &[u8]) -> Answer {
    let mut stdout = Vec::new();
    let (exit, stderr) = run_with(&mut plugin, env, stdin, &mut stdout);
    Answer {
        exit,
        stdout: String::from_utf8(stdout).unwrap(),
        stderr,
        calls: plugin.calls,
    }
}

fn call(command: &str, config: &Value) -> Answer {
    call_with(
        attached(),
        &environment(command),
        config.to_string().as_bytes(),
    )
}

/// A plugin whose ADD gives an address of each family.
fn attached() -> Recorder {
    Recorder {
        result: CniResult {
            ips: vec![
                IpConfig::new("10.1.2.3/24".parse().unwrap()),
                IpConfig::new("fd00::3/64".parse().unwrap()),
            ],
            ..CniResult::default()
        },
        ..Recorder::default()
    }
}

fn config(version: &str) -> Value {
    json!({
        "cniVersion": version,
        "name": "net",
        "type": "bpf-bridge",
        "ipam": { "type": "static" },
        "prevResult": {},
        "cni.dev/valid-attachments": [{ "containerID": "c2", "ifname": "eth0" }],
    })
}

#[test]
fn no_command_prints_the_banner_and_succeeds() {
    let answer = call_with(Recorder::default(), &BTreeMap::new(), b"garbage");
    answer.done();
    let expected = format!(
        "CNI bpf-bridge plugin v{}\n\
         CNI protocol versions supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(answer.stderr, expected);
}

#[test]
fn version_answers_in_the_version_of_the_question() {
    let supported = json!([
        "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"
    ]);
    let dummies = [
        ("CNI_COMMAND", "VERSION"),
        ("CNI_NETNS", "dummy"),
        ("CNI_IFNAME", "dummy"),
        ("CNI_PATH", "dummy"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    for (stdin, version) in [
        (r#"{"cniVersion":"1.1.0"}"#, "1.1.0"),
        (r#"{"CNIVersion":"0.4.0","name":5}"#, "1.1.0"),
        (r#"{"cniVersion":"0.4.0","name":5}"#, "0.4.0"),
        (r#"{"cniVersion":"9.9.9"}"#, "1.1.0"),
        (r#"{"cniVersion":1}"#, "1.1.0"),
        ("{}", "1.1.0"),
        ("", "1.1.0"),
        ("garbage", "1.1.0"),
    ] {
        let answer = call_with(Recorder::default(), &dummies, stdin.as_bytes());
        assert_eq!(answer.exit, Exit::Success);
        assert_eq!(answer.calls, [""; 0]);
        assert_eq!(
            answer.json(),
            json!({ "cniVersion": version, "supportedVersions": supported }),
            "{stdin}"
        );
    }
}

#[test]
fn each_version_knows_its_verbs() {
    for version in SpecVersion::SUPPORTED {
        for (command, since) in [
            ("ADD", SpecVersion::V0_1_0),
            ("DEL", SpecVersion::V0_1_0),
            ("CHECK", SpecVersion::V0_4_0),
            ("GC", SpecVersion::V1_1_0),
            ("STATUS", SpecVersion::V1_1_0),
        ] {
            let answer = call(command, &config(version.as_str()));
            if version < since {
                let message = answer.error(1);
                assert_eq!(message, format!("config version does not allow {command}"));
                assert_eq!(answer.json()["cniVersion"], version.as_str());
                assert_eq!(answer.calls, [""; 0]);
                continue;
            }
            assert_eq!(answer.exit, Exit::Success, "{version} {}", answer.stdout);
            let expected = match command {
                "ADD" | "CHECK" => format!("{command} net c1 eth0 /run/netns/c1"),
                "DEL" => "DEL net c1 eth0 Some(\"/run/netns/c1\")".to_owned(),
                "GC" => "GC net [\"c2 eth0\"]".to_owned(),
                _ => "STATUS net ".to_owned(),
            };
            assert_eq!(answer.calls, [expected]);
            assert_eq!(answer.stderr, "");
            assert_eq!(answer.stdout.is_empty(), command != "ADD");
        }
    }
}

#[test]
fn add_answers_in_the_version_of_the_configuration() {
    for version in SpecVersion::SUPPORTED {
        let json = call("ADD", &config(version.as_str())).json();
        assert_eq!(json, attached().result.to_json(version).unwrap());
        assert_eq!(json["cniVersion"], version.as_str());
    }
    let mut without = config("");
    assert_eq!(call("ADD", &without).json()["cniVersion"], "0.1.0");
    without.as_object_mut().unwrap().remove("cniVersion");
    assert_eq!(call("ADD", &without).json()["cniVersion"], "0.1.0");
}

#[test]
fn errors_are_json_on_stdout_in_the_version_of_the_configuration() {
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        let plugin = Recorder {
            error: Some(CniError::new(ErrorCode::NotAvailable, "no more").with_details("really")),
            ..Recorder::default()
        };
        let answer = call_with(
            plugin,
            &environment(command),
            config("1.1.0").to_string().as_bytes(),
        );
        assert_eq!(answer.exit, Exit::Failure);
        assert_eq!(
            answer.json(),
            json!({ "cniVersion": "1.1.0", "code": 50, "msg": "no more", "details": "really" })
        );
        assert_eq!(
            answer.calls.len(),
            1,
            "a failed ADD is not undone from here"
        );
    }
}

#[test]
fn bad_calls_get_their_codes_and_reach_no_plugin() {
    let good = config("1.1.0");
    let changed = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        config.to_string()
    };
    for (code, mention, stdin) in [
        (6, "decoding", String::new()),
        (6, "decoding", "{".to_owned()),
        (6, "object", "[]".to_owned()),
        (6, "object", "null".to_owned()),
        (6, "decoding", "{} {}".to_owned()),
        (1, "9.9.9", changed("cniVersion", "9.9.9".into())),
        (7, "cniVersion", changed("cniVersion", 1.into())),
        (7, "name", changed("name", "".into())),
        (7, "name", changed("name", "a/b".into())),
        (7, "name", changed("name", Value::Null)),
        (7, "mtu", changed("mtu", "1500".into())),
        (2, "vlan", changed("vlan", 100.into())),
    ] {
        let answer = call_with(attached(), &environment("ADD"), stdin.as_bytes());
        let message = answer.error(code);
        assert!(message.contains(mention), "{message}");
        assert_eq!(answer.calls, [""; 0]);
    }
    for (name, value) in [
        ("CNI_COMMAND", "NOP"),
        ("CNI_CONTAINERID", ""),
        ("CNI_NETNS", ""),
        ("CNI_IFNAME", "a/b"),
        ("CNI_ARGS", "A=b"),
    ] {
        let mut env = environment("ADD");
        env.insert(name.to_owned(), value.to_owned());
        let answer = call_with(attached(), &env, good.to_string().as_bytes());
        let message = answer.error(4);
        assert!(message.contains(name), "{message}");
        assert_eq!(answer.calls, [""; 0]);
    }
}

#[test]
fn an_endless_configuration_is_refused() {
    let mut stdout = Vec::new();
    let mut plugin = Recorder::default();
    let (exit, _) = run_with(
        &mut plugin,
        &environment("ADD"),
        io::repeat(b' '),
        &mut stdout,
    );
    assert_eq!(exit, Exit::Failure);
    let json: Value = serde_json::from_slice(&stdout).unwrap();
    assert_eq!(json["code"], 6);
    assert!(
        json["msg"].as_str().unwrap().contains("larger than"),
        "{json}"
    );
}

#[test]
fn an_unreadable_stdin_is_an_io_error() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    let mut stdout = Vec::new();
    let (exit, _) = run_with(&mut attached(), &environment("DEL"), Broken, &mut stdout);
    assert_eq!(exit, Exit::Failure);
    let json: Value = serde_json::from_slice(&stdout).unwrap();
    assert_eq!(json["code"], 5);
}

#[test]
fn an_add_counts_when_it_is_answered() {
    let config = config("1.1.0").to_string();
    let mut plugin = attached();
    let (exit, _) = run_with(
        &mut plugin,
        &environment("ADD"),
        config.as_bytes(),
        &mut Vec::new(),
    );
    assert_eq!(exit, Exit::Success);
    assert!(plugin.added);
}

#[test]
fn an_add_whose_answer_is_lost_is_undone() {
    let config = config("1.1.0").to_string();
    let undone = [
        "ADD net c1 eth0 /run/netns/c1",
        "DEL net c1 eth0 Some(\"/run/netns/c1\")",
    ];
    let mut plugin = attached();
    let (exit, stderr) = run_with(
        &mut plugin,
        &environment("ADD"),
        config.as_bytes(),
        &mut Closed,
    );
    assert_eq!(exit, Exit::Failure);
    assert_eq!(plugin.calls, undone);
    assert!(!plugin.added, "it counts as attached");
    assert!(stderr.contains("writing the answer to stdout"), "{stderr}");

    let mut plugin = Recorder {
        del_error: Some(CniError::internal("stuck")),
        ..attached()
    };
    let mut stdout = FailsAtFlush(Vec::new());
    let (exit, stderr) = run_with(
        &mut plugin,
        &environment("ADD"),
        config.as_bytes(),
        &mut stdout,
    );
    assert_eq!(exit, Exit::Failure);
    assert_eq!(plugin.calls, undone);
    assert!(stderr.contains("undoing it: stuck"), "{stderr}");
    let json: Value = serde_json::from_slice(&stdout.0).unwrap();
    assert!(
        json["ips"].is_array(),
        "nothing is added to what is out already"
    );
}

#[test]
fn an_add_whose_result_the_version_cannot_express_is_undone() {
    for version in ["0.1.0", "0.2.0"] {
        let stdin = config(version).to_string();
        let answer = call_with(Recorder::default(), &environment("ADD"), stdin.as_bytes());
        let message = answer.error(1);
        assert!(message.contains("no valid IP addresses"), "{message}");
        assert_eq!(answer.calls.len(), 2);
        assert!(answer.calls[1].starts_with("DEL"), "{:?}", answer.calls);
    }
}

#[test]
fn an_add_that_no_result_could_tell_of_is_not_begun() {
    for version in SpecVersion::SUPPORTED {
        let mut config = config(version.as_str());
        config.as_object_mut().unwrap().remove("ipam");
        let answer = call("ADD", &config);
        if version < SpecVersion::V0_3_0 {
            let message = answer.error(1);
            assert!(message.contains("no valid IP addresses"), "{message}");
            assert_eq!(answer.calls, [""; 0]);
        } else {
            assert_eq!(answer.exit, Exit::Success, "{}", answer.stdout);
        }
        // The addresses of the plugins before it are told.
        config["prevResult"] = json!({
            "ip4": { "ip": "10.0.0.2/8" },
            "ips": [{ "address": "10.0.0.2/8" }],
        });
        assert_eq!(call("ADD", &config).exit, Exit::Success);
    }
}

#[test]
fn an_error_that_cannot_be_written_is_told_on_stderr() {
    let (exit, stderr) = run_with(&mut attached(), &environment("ADD"), &b"{"[..], &mut Closed);
    assert_eq!(exit, Exit::Failure);
    assert!(
        stderr.contains("decoding the network configuration"),
        "{stderr}"
    );
}

#[test]
fn warnings_are_told_on_stderr_by_add_alone() {
    let mut shaped = config("1.1.0");
    shaped["runtimeConfig"] = json!({ "Bandwidth": {} });
    let answer = call("ADD", &shaped);
    assert_eq!(answer.exit, Exit::Success);
    assert!(answer.json().is_object());
    let lines: Vec<_> = answer.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].starts_with("bpf-bridge: warning: runtimeConfig.bandwidth"),
        "{lines:?}"
    );
    for command in ["DEL", "CHECK", "GC", "STATUS"] {
        let answer = call(command, &shaped);
        answer.done();
        assert_eq!(answer.stderr, "", "{command}");
    }
}

#[test]
fn del_needs_neither_netns_nor_a_valid_configuration() {
    let mut env = environment("DEL");
    env.remove("CNI_NETNS");
    env.insert("CNI_ARGS".to_owned(), "nonsense".to_owned());
    let config = json!({
        "cniVersion": "1.1.0",
        "name": "net",
        "vlan": 100,
        "mtu": "x",
        "prevResult": 5,
        "runtimeConfig": { "portMappings": "none", "mac": "x" },
    });
    let answer = call_with(attached(), &env, config.to_string().as_bytes());
    answer.done();
    assert_eq!(answer.calls, ["DEL net c1 eth0 None"]);
    for mention in [
        "CNI_ARGS",
        "vlan",
        "mtu",
        "prevResult",
        "portMappings",
        "mac",
    ] {
        assert!(
            answer.stderr.contains(mention),
            "{mention}: {}",
            answer.stderr
        );
    }
}

#[test]
fn gc_without_the_list_of_what_to_keep_removes_nothing() {
    let mut config = config("1.1.0");
    config
        .as_object_mut()
        .unwrap()
        .remove("cni.dev/valid-attachments");
    let answer = call("GC", &config);
    let message = answer.error(7);
    assert!(message.contains("cni.dev/valid-attachments"), "{message}");
    assert_eq!(answer.calls, [""; 0]);
    for invalid in [
        json!({}),
        json!([{ "containerID": "c" }]),
        json!([{ "ifname": "e" }]),
        json!([5]),
    ] {
        config["cni.dev/valid-attachments"] = invalid;
        let answer = call("GC", &config);
        answer.error(7);
        assert_eq!(answer.calls, [""; 0]);
    }
    // What libcni sends for none.
    config["cni.dev/valid-attachments"] = Value::Null;
    let answer = call("GC", &config);
    answer.done();
    assert_eq!(answer.calls, ["GC net []"]);
}
