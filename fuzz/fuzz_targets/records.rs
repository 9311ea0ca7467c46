//! The record of an attachment, whatever is in its file.
//!
//! A record that is read is one that could have been written, of this boot, and the name
//! in it stays one name.

#![no_main]

use bpf_bridge::{attachment::Record, boot, cni::names::check_ifname};
use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(text) = std::str::from_utf8(data) else {
        return Corpus::Reject;
    };
    if let Some(record) = Record::parse(text) {
        assert_eq!(record.era, boot::era());
    }
    // Which boot it is cannot be guessed.
    let Ok(mut record) = serde_json::from_str::<Record>(text) else {
        return Corpus::Keep;
    };
    record.era = boot::era().to_owned();
    let written = serde_json::to_string(&record).expect("a record is JSON");
    match Record::parse(&written) {
        Some(read) => {
            assert_eq!(check_ifname(&read.bridge), Ok(()));
            let outside = read.outside();
            assert_eq!(outside.publishes, !read.published.is_empty());
            assert_eq!(read, record);
        }
        None => assert!(check_ifname(&record.bridge).is_err(), "{written}"),
    }
    Corpus::Keep
});
