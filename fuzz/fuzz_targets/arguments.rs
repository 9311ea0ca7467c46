//! The environment of a call: `CNI_ARGS` and the other variables, one a line.
//!
//! Whatever they are, an attachment's paths and names are what they should be, and what
//! `CNI_ARGS` was read as can be written and read again.

#![no_main]

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path},
};

use bpf_bridge::{
    attachment::Attachment,
    cni::{
        Command, Invocation,
        env::{CniArgs, Verb},
        names,
    },
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let variables: HashMap<&[u8], &[u8]> = data
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let at = line.iter().position(|&byte| byte == b'=')?;
            Some((&line[..at], &line[at + 1..]))
        })
        .collect();
    let value = |name: &str| -> Option<OsString> {
        let value = variables.get(name.as_bytes())?;
        Some(OsStr::from_bytes(value).to_owned())
    };
    match Invocation::from_env(value) {
        Ok(None) => assert!(
            variables
                .get(&b"CNI_COMMAND"[..])
                .is_none_or(|v| v.is_empty())
        ),
        Ok(Some(invocation)) => check(&invocation),
        Err(error) => {
            assert_eq!(u32::from(error.code), 4, "{error}");
            assert!(!error.msg.is_empty());
        }
    }
});

fn check(invocation: &Invocation) {
    assert!(
        invocation
            .path
            .iter()
            .all(|dir| !dir.as_os_str().is_empty())
    );
    let command = invocation.verb.command();
    let id = match &invocation.verb {
        Verb::Add(id, netns) | Verb::Check(id, netns) => {
            assert!(!netns.as_os_str().is_empty());
            id
        }
        Verb::Del(id, _) => id,
        Verb::Gc | Verb::Status | Verb::Version => {
            assert_eq!(invocation.args, CniArgs::default());
            return;
        }
    };
    assert!(invocation.warnings.is_empty() || command == Command::Del);

    let attachment = Attachment {
        network: "net",
        container_id: &id.container_id,
        ifname: &id.ifname,
    };
    let path = attachment.path();
    let root = Path::new("/run/bpf-bridge/attachments/net");
    let below = path
        .strip_prefix(root)
        .expect("a record in its network's directory");
    let mut parts = below.components();
    let name = format!("{}:{}", id.container_id, id.ifname);
    assert_eq!(parts.next(), Some(Component::Normal(name.as_ref())));
    assert_eq!(parts.next(), None);
    assert!(name.len() <= 255 && !name.contains(['/', '\0', '\n']));
    assert_eq!(names::check_ifname(&attachment.host_veth()), Ok(()));
    assert!(attachment.alias().len() < 256);

    let args = &invocation.args;
    let written = write(args);
    assert_eq!(CniArgs::parse(&written).as_ref(), Ok(args), "{written}");
    assert!(args.mac.is_none_or(|mac| mac.is_unicast()));
}

/// Arguments as a runtime writes them.
fn write(args: &CniArgs) -> String {
    let mut pairs = vec!["IgnoreUnknown=1".to_owned()];
    let ips: Vec<_> = args.ips.iter().map(ToString::to_string).collect();
    pairs.push(format!("IP={}", ips.join(",")));
    pairs.extend(args.mac.map(|mac| format!("MAC={mac}")));
    pairs.extend(
        args.unknown
            .iter()
            .map(|(key, value)| format!("{key}={value}")),
    );
    pairs.join(";")
}
