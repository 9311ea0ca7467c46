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

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use proptest::prelude::*;

    use super::*;

    const FULL: [(&str, &str); 5] = [
        ("CNI_CONTAINERID", "c-1"),
        ("CNI_NETNS", "/run/netns/c"),
        ("CNI_IFNAME", "eth0"),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAME=p;IP=10.1.2.3,fd00::3/64;MAC=02:00:00:00:00:01",
        ),
        ("CNI_PATH", "/opt/cni/bin::/usr/lib/cni"),
    ];

    fn read(vars: &[(&str, &str)]) -> Result<Option<Invocation>, CniError> {
        Invocation::from_env(|name| {
            // A later entry overrides an earlier one.
            let var = vars.iter().rev().find(|(key, _)| *key == name);
            var.map(|(_, value)| value.into())
        })
    }

    fn with(command: &str, overrides: &[(&str, &str)]) -> Result<Option<Invocation>, CniError> {
        let mut vars = vec![("CNI_COMMAND", command)];
        vars.extend(FULL);
        vars.extend(overrides);
        read(&vars)
    }

    fn id() -> AttachmentId {
        AttachmentId {
            container_id: "c-1".to_owned(),
            ifname: "eth0".to_owned(),
        }
    }

    #[test]
    fn verbs_get_their_parameters() {
        let netns = PathBuf::from("/run/netns/c");
        let cases = [
            ("ADD", Verb::Add(id(), netns.clone())),
            ("CHECK", Verb::Check(id(), netns.clone())),
            ("DEL", Verb::Del(id(), Some(netns))),
            ("GC", Verb::Gc),
            ("STATUS", Verb::Status),
            ("VERSION", Verb::Version),
        ];
        for (command, verb) in cases {
            let invocation = with(command, &[]).unwrap().unwrap();
            assert_eq!(invocation.verb, verb);
            assert_eq!(invocation.verb.command().as_str(), command);
            assert_eq!(invocation.warnings, [""; 0]);
        }
        let add = with("ADD", &[("CNI_NETNS_OVERRIDE", "TRUE")])
            .unwrap()
            .unwrap();
        assert!(add.netns_override);
        assert_eq!(
            add.path,
            [PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")]
        );
        assert_eq!(
            add.args.ips,
            [
                "10.1.2.3".parse::<IpAddr>().unwrap(),
                "fd00::3".parse().unwrap()
            ]
        );
        assert_eq!(add.args.mac, Some(MacAddr::new([2, 0, 0, 0, 0, 1])));
        assert_eq!(
            add.args.unknown,
            [("K8S_POD_NAME".to_owned(), "p".to_owned())]
        );
        assert!(!with("ADD", &[]).unwrap().unwrap().netns_override);
    }

    #[test]
    fn without_command_it_is_no_call() {
        assert_eq!(read(&FULL), Ok(None));
        assert_eq!(with("", &[]), Ok(None));
    }

    #[test]
    fn missing_variables_are_named_together() {
        let cases = [
            ("ADD", Some("[CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME]")),
            ("CHECK", Some("[CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME]")),
            ("DEL", Some("[CNI_CONTAINERID,CNI_IFNAME]")),
            ("GC", Some("[CNI_PATH]")),
            ("STATUS", None),
            ("VERSION", None),
        ];
        for (command, names) in cases {
            let result = read(&[("CNI_COMMAND", command)]);
            let empty: Vec<_> = FULL.iter().map(|(name, _)| (*name, "")).collect();
            assert_eq!(with(command, &empty), result, "empty is missing, {command}");
            match names {
                None => assert!(result.unwrap().is_some(), "{command}"),
                Some(names) => {
                    let error = result.unwrap_err();
                    assert_eq!(error.code, ErrorCode::InvalidEnvironment);
                    assert_eq!(error.msg, format!("required env variables {names} missing"));
                }
            }
        }
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            let error = with("ADD", &[(name, "")]).unwrap_err();
            assert_eq!(
                error.msg,
                format!("required env variables [{name}] missing")
            );
        }
        let del = with("DEL", &[("CNI_NETNS", "")]).unwrap().unwrap();
        assert_eq!(del.verb, Verb::Del(id(), None));
    }

    #[test]
    fn invalid_values_are_code_4_and_name_the_variable() {
        let long = "x".repeat(16);
        for (command, name, value) in [
            ("ADD", "CNI_CONTAINERID", "../etc"),
            ("DEL", "CNI_CONTAINERID", "a/b"),
            ("ADD", "CNI_IFNAME", "a/b"),
            ("CHECK", "CNI_IFNAME", ".."),
            ("DEL", "CNI_IFNAME", long.as_str()),
            ("ADD", "CNI_ARGS", "K8S_POD_NAME=p"),
            ("ADD", "CNI_ARGS", "nonsense"),
            ("add", "CNI_COMMAND", "add"),
            ("UPDATE", "CNI_COMMAND", "UPDATE"),
        ] {
            let error = with(command, &[(name, value)]).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidEnvironment, "{error}");
            assert!(error.msg.contains(name), "{error}");
        }
    }

    #[test]
    fn text_that_is_not_utf8_is_code_4() {
        for name in [
            "CNI_COMMAND",
            "CNI_CONTAINERID",
            "CNI_NETNS",
            "CNI_IFNAME",
            "CNI_PATH",
            "CNI_ARGS",
        ] {
            let error = Invocation::from_env(|asked| {
                if asked == name {
                    return Some(OsString::from_vec(b"\xff".to_vec()));
                }
                let vars = [("CNI_COMMAND", "ADD")].into_iter().chain(FULL);
                vars.into_iter()
                    .find(|(key, _)| *key == asked)
                    .map(|(_, value)| value.into())
            })
            .unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidEnvironment);
            assert!(
                error.msg.contains(name) && error.msg.contains("UTF-8"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_a_verb_does_not_need_it_does_not_read() {
        for command in ["GC", "STATUS", "VERSION"] {
            let dummies = [
                ("CNI_CONTAINERID", "/"),
                ("CNI_IFNAME", "a b"),
                ("CNI_ARGS", "x"),
            ];
            assert!(with(command, &dummies).unwrap().is_some(), "{command}");
        }
    }

    #[test]
    fn del_tolerates_bad_args() {
        let del = with("DEL", &[("CNI_ARGS", "MAC=x")]).unwrap().unwrap();
        assert_eq!(del.args, CniArgs::default());
        assert!(del.warnings[0].contains("MAC=x"), "{:?}", del.warnings);
    }

    #[test]
    fn bad_args() {
        for text in [
            ";",
            "IP=1.2.3.4;",
            "IP",
            "IP=1.2.3.4=5",
            "IP=1.2.3",
            "IP=1.2.3.4,,1.2.3.5",
            "IP=1.2.3.4/33",
            "MAC=ff:ff:ff:ff:ff:ff",
            "MAC=00:00:00:00:00:00",
            "MAC=x",
            "IgnoreUnknown=yes",
            "IgnoreUnknown=",
            "IgnoreUnknown=0;A=b",
            "A=b",
            "ip=1.2.3.4",
            "IgnoreUnknown=1;A",
        ] {
            let error = CniArgs::parse(text).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidEnvironment, "{text}");
            assert!(error.msg.contains("CNI_ARGS"), "{error}");
        }
    }

    #[test]
    fn good_args() {
        assert_eq!(CniArgs::parse(""), Ok(CniArgs::default()));
        assert_eq!(
            CniArgs::parse("IgnoreUnknown=false;IP=;MAC="),
            Ok(CniArgs::default())
        );
        let late = CniArgs::parse("A=b;IgnoreUnknown=true").unwrap();
        assert_eq!(late.unknown, [("A".to_owned(), "b".to_owned())]);
    }

    proptest! {
        #[test]
        fn args_round_trip(
            ips in prop::collection::vec(any::<IpAddr>(), 0..4),
            mac in prop::option::of(any::<[u8; 6]>().prop_map(|[_, b, c, d, e, f]| MacAddr::new([2, b, c, d, e, f]))),
            unknown in prop::collection::vec(("K8S_[A-Z]{1,8}", "[^;=\\pC]{0,8}"), 0..4),
        ) {
            let mut pairs = vec!["IgnoreUnknown=1".to_owned()];
            if !ips.is_empty() {
                let ips: Vec<_> = ips.iter().map(IpAddr::to_string).collect();
                pairs.push(format!("IP={}", ips.join(",")));
            }
            pairs.extend(mac.map(|mac| format!("MAC={mac}")));
            pairs.extend(unknown.iter().map(|(key, value)| format!("{key}={value}")));
            prop_assert_eq!(CniArgs::parse(&pairs.join(";")), Ok(CniArgs { ips, mac, unknown }));
        }

        #[test]
        fn any_args_are_survived(text in "([A-Za-z]{0,3}|IP|MAC|[=;,./:]|\\PC){0,16}") {
            // What is accepted has only whole pairs.
            if CniArgs::parse(&text).is_ok() && !text.is_empty() {
                prop_assert!(text.split(';').all(|pair| pair.matches('=').count() == 1));
            }
        }
    }
}
