//! The network configuration, for every verb: the first byte says which, the rest is
//! stdin.
//!
//! What is accepted means the same when it is read again, keeps to what its fields
//! promise, and is accepted by every verb that must live with it. What is refused is so
//! with a code and a word.

#![no_main]

use bpf_bridge::{
    cni::{
        CniError, Command, NetworkConfig, SpecVersion,
        config::{MasqBackend, Netfilter},
        env::CniArgs,
        names,
    },
    ipam::host_local,
};
use libfuzzer_sys::{Corpus, fuzz_target};
use serde_json::Value;

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((&command, stdin)) = data.split_first() else {
        return Corpus::Reject;
    };
    let command = Command::ALL[usize::from(command) % Command::ALL.len()];
    match parse(command, stdin) {
        Ok(config) => {
            check(&config, command);
            check_others(&config, command);
            check_addresses(&config);
        }
        Err(error) => {
            let code = u32::from(error.code);
            assert!(matches!(code, 1 | 2 | 6 | 7), "{error}");
            assert!(!error.msg.is_empty());
            let told = error.to_json(SpecVersion::LATEST);
            assert_eq!(told["code"], code);
            if code == 6 {
                return Corpus::Reject;
            }
        }
    }
    Corpus::Keep
});

fn parse(command: Command, stdin: &[u8]) -> Result<NetworkConfig, CniError> {
    NetworkConfig::parse(stdin.to_vec(), command, &CniArgs::default())
}

/// All that a configuration says, but for the text it came as.
fn meaning(mut config: NetworkConfig) -> String {
    config.stdin.clear();
    format!("{config:?}")
}

fn check(config: &NetworkConfig, command: Command) {
    assert_eq!(names::check_network_name(&config.name), Ok(()));
    let devices = config.uplinks.iter().flatten().chain(&config.xdp_uplinks);
    for name in devices.chain([&config.bridge]) {
        assert_eq!(names::check_ifname(name), Ok(()));
    }
    assert!(config.mtu.is_none_or(|mtu| (68..=65535).contains(&mtu)));
    assert!(config.mac.is_none_or(|mac| mac.is_unicast()));
    assert!(config.is_gateway || !config.is_default_gateway);
    assert!(config.ip_masq_exempt.is_sorted());
    assert!(config.ip_masq_exempt.iter().all(|net| *net == net.trunc()));
    assert!(config.ip_masq.is_some() || config.ip_masq_exempt.is_empty());
    for (index, mapping) in config.port_mappings.iter().enumerate() {
        assert!(mapping.host_port != 0 && mapping.container_port != 0);
        let before = &config.port_mappings[..index];
        assert!(before.iter().all(|other| !other.overlaps(mapping)));
    }
    match config.netfilter {
        // What DEL, GC and CHECK find together they only take away.
        Netfilter::All => {
            assert!(config.is_gateway);
            let strict = matches!(command, Command::Add | Command::Status);
            assert!(config.port_mappings.is_empty() || !strict);
        }
        Netfilter::None => assert_eq!(config.ip_masq, Some(MasqBackend::Ebpf)),
        Netfilter::Routed => {}
    }
    assert_eq!(config.valid_attachments.is_some(), command == Command::Gc);
    assert!(command != Command::Check || config.prev_result.is_some());
    if let Some(result) = &config.prev_result {
        result
            .to_json(SpecVersion::LATEST)
            .expect("any result can be told in the newest version");
    }

    let text = config.raw.to_string();
    let again = parse(command, text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(meaning(again), meaning(config.clone()));
}

/// A verb that comes after takes what the one before has taken.
fn check_others(config: &NetworkConfig, command: Command) {
    let mut raw = config.raw.clone();
    let Value::Object(object) = &mut raw else {
        panic!("accepted: {raw}");
    };
    for key in ["prevResult", "cni.dev/valid-attachments"] {
        object.retain(|known, _| !known.eq_ignore_ascii_case(key));
    }
    object.insert("prevResult".to_owned(), serde_json::json!({}));
    object.insert(
        "cni.dev/valid-attachments".to_owned(),
        serde_json::json!([]),
    );
    let text = raw.to_string();
    for other in [Command::Check, Command::Del, Command::Gc, Command::Status] {
        let read = parse(other, text.as_bytes());
        let tolerant = matches!(other, Command::Del | Command::Gc);
        match (command, read) {
            (Command::Add, Ok(read)) => assert!(read.warnings.is_empty(), "{other} {text}"),
            (_, Ok(_)) => {}
            // CHECK overlooks what is wrong with published ports.
            (Command::Add | Command::Status, Err(error)) => panic!("{other} {text}: {error}"),
            (_, Err(error)) => assert!(!tolerant, "{other} {text}: {error}"),
        }
    }
}

/// The address store's own part of it.
fn check_addresses(config: &NetworkConfig) {
    let requests = host_local::Requests::from_network(&config.raw, None);
    let version = config.cni_version.as_str();
    let Ok(store) = host_local::Config::parse(&config.ipam, requests, version) else {
        return;
    };
    assert!(store.data_dir.is_absolute());
    let sets = store.range_sets();
    assert!(!sets.is_empty());
    for (index, set) in sets.iter().enumerate() {
        for range in set.ranges() {
            assert_eq!(range.gateway().is_ipv4(), set.is_ipv4());
            assert!(range.subnet().contains(&range.gateway()));
            assert_eq!(range.subnet(), range.subnet().trunc());
            let shared = sets[..index]
                .iter()
                .any(|other| other.range_of(range.gateway()).is_some());
            assert!(!shared || !range.contains(range.gateway()));
        }
    }
}
