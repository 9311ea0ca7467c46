//! Results of other plugins: `prevResult`, and what an executed IPAM plugin answers.
//!
//! What was read can be told in every version that can carry it, and is read again as
//! the same; behind another result it points to its own interfaces.

#![no_main]

use bpf_bridge::cni::{CniResult, SpecVersion, json};
use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((&version, text)) = data.split_first() else {
        return Corpus::Reject;
    };
    let Ok(value) = json::decode(text) else {
        return Corpus::Reject;
    };
    let default = SpecVersion::SUPPORTED[usize::from(version) % SpecVersion::SUPPORTED.len()];
    let Ok(result) = CniResult::from_json(&value, "prevResult", default) else {
        return Corpus::Keep;
    };
    for version in SpecVersion::SUPPORTED {
        let Ok(told) = result.to_json(version) else {
            assert!(version < SpecVersion::V0_3_0 && result.ips.is_empty());
            continue;
        };
        assert_eq!(told["cniVersion"], version.as_str());
        let text = told.to_string();
        let again = json::decode(text.as_bytes()).expect("what is told is JSON");
        let again = CniResult::from_json(&again, "prevResult", SpecVersion::LATEST)
            .unwrap_or_else(|error| panic!("{version} {text}: {error}"));
        if version >= SpecVersion::V1_0_0 {
            assert_eq!(again, result, "{text}");
        } else {
            assert_eq!(again.to_json(version).as_ref(), Ok(&told));
        }
    }
    let before = result.interfaces.len();
    let both = result.clone().after(result.clone());
    for (own, ip) in result.ips.iter().zip(&both.ips[result.ips.len()..]) {
        assert_eq!(ip.interface, own.interface.map(|index| index + before));
    }
    assert_eq!(CniResult::default().after(result.clone()), result);
    Corpus::Keep
});
