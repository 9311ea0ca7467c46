//! The node's settings, which no network's configuration can hold: how large the tables
//! are that all networks share, and what a single pod may have of them.

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use bpf_bridge_common::layout::{
    MAX_ADDRESSES, MAX_EXEMPT, MAX_FLOWS, MAX_FRAGMENTS, MAX_HELD, MAX_LEARNED, MAX_NEIGHBORS,
    MAX_PEERS, MAX_PORTS, MAX_PUBLISHED, MAX_SEGMENTS, MAX_UPLINKS, POD_SHARE,
};
use nix::fcntl::OFlag;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::cni::json::shown;

/// Where the settings are. An absent file is one without any.
pub const PATH: &str = "/etc/bpf-bridge/node.json";
/// The largest file, in bytes.
const SIZE_MAX: u64 = 64 << 10;
/// The key of the tables' limits.
const LIMITS: &str = "limits";
/// The key of what one pod can have of them.
const POD_LIMITS: &str = "podLimits";
/// What the kernel's LRU maps need, so that they forget one at a time: each CPU takes up
/// to 128 entries for itself.
const LRU_MIN: u32 = 1024;
/// For so many fragmented datagrams one fragment may wait for the first of its datagram.
const FRAGMENTS_A_HELD: u32 = 8;

/// Why the settings cannot be used.
#[derive(Debug, Error)]
pub enum NodeError {
    /// The file could not be read.
    #[error("reading {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It holds something else than settings.
    #[error("{path}: {key} is {value}, must be {expected}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key, or what else is wrong.
        key: String,
        /// What it holds.
        value: String,
        /// What it must hold.
        expected: String,
    },
}

/// A limit that can be set.
struct Limit {
    key: &'static str,
    /// Without a file.
    default: u32,
    least: u32,
    most: u32,
    /// The tables that it is of.
    maps: &'static [&'static str],
    /// Who has their entries.
    holders: &'static str,
}

/// All of them, in the order of [`Limits::values`].
const ALL: [Limit; 11] = [
    Limit {
        key: "ports",
        default: MAX_PORTS,
        least: 1,
        most: 1 << 20,
        maps: &["PORTS", "STATS", "ENDPOINTS", "MEMBERS"],
        holders: "every pod has one, and every bridge",
    },
    Limit {
        key: "addresses",
        default: MAX_NEIGHBORS,
        least: 1,
        most: 1 << 22,
        maps: &["NEIGHBORS", "MASQUERADED"],
        holders: "every address of a pod or a gateway has one",
    },
    Limit {
        key: "segments",
        default: MAX_SEGMENTS,
        least: 1,
        most: 1 << 16,
        maps: &["SEGMENTS"],
        holders: "every bridge has one",
    },
    Limit {
        key: "published",
        default: MAX_PUBLISHED,
        least: 1,
        most: 1 << 22,
        maps: &["PUBLISHED"],
        holders: "every published port has one for each of its addresses",
    },
    Limit {
        key: "exempt",
        default: MAX_EXEMPT,
        least: 1,
        most: 1 << 22,
        maps: &["EXEMPT"],
        holders: "every destination that a network exempts from masquerade has one",
    },
    Limit {
        key: "uplinks",
        default: MAX_UPLINKS,
        least: 1,
        most: 1 << 20,
        maps: &["UPLINKS"],
        holders: "every device of the node that has addresses has one",
    },
    Limit {
        key: "nodeAddresses",
        default: MAX_ADDRESSES,
        least: 1,
        most: 1 << 22,
        maps: &["ADDRESSES"],
        holders: "every address of the node has one",
    },
    Limit {
        key: "learned",
        default: MAX_LEARNED,
        least: LRU_MIN,
        most: 1 << 24,
        maps: &["LEARNED", "LEARNED_PLACES"],
        holders: "every MAC address that nobody was assigned has one",
    },
    Limit {
        key: "flows",
        default: MAX_FLOWS,
        least: LRU_MIN,
        most: 1 << 24,
        maps: &["FLOWS", "REPLIES", "PLACES"],
        holders: "every flow has one",
    },
    Limit {
        key: "fragments",
        default: MAX_FRAGMENTS,
        least: LRU_MIN,
        most: 1 << 20,
        maps: &["FRAGMENTS", "HELD"],
        holders: "every datagram that arrives in fragments has one",
    },
    Limit {
        key: "peers",
        default: MAX_PEERS,
        least: LRU_MIN,
        most: 1 << 24,
        maps: &["PEERS"],
        holders: "every socket of the node that talks to a published port has one",
    },
];

/// How many entries each table can have, and each pod of those that packets fill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    values: [u32; ALL.len()],
    shares: Shares,
}

/// How many entries one pod can have, by the names that the programs have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shares {
    learned: u32,
    flows: u32,
    fragments: u32,
    held: u32,
}

impl Default for Limits {
    fn default() -> Self {
        let values = ALL.map(|limit| limit.default);
        Self {
            shares: Shares::of(&values),
            values,
        }
    }
}

impl Shares {
    /// Those of tables of this size, if nothing else is said.
    fn of(values: &[u32; ALL.len()]) -> Self {
        let share = |key| value(values, key) / POD_SHARE;
        let mut shares = Self {
            learned: share("learned"),
            flows: share("flows"),
            fragments: share("fragments"),
            held: 0,
        };
        shares.follow();
        shares
    }

    /// What waits is a matter of the fragments: those of one datagram at least.
    fn follow(&mut self) {
        self.held = (self.fragments / FRAGMENTS_A_HELD).max(u32::from(MAX_HELD));
    }
}

/// The limit of this key.
fn value(values: &[u32; ALL.len()], key: &str) -> u32 {
    let found = ALL.iter().zip(values).find(|(limit, _)| limit.key == key);
    found.map_or(0, |(_, &value)| value)
}

impl Limits {
    /// Those of this node.
    ///
    /// # Errors
    ///
    /// [`NodeError`].
    pub fn read() -> Result<Self, NodeError> {
        Self::read_from(Path::new(PATH))
    }

    /// Those of a file with this text.
    #[cfg(test)]
    pub fn of(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.json");
        std::fs::write(&path, text).unwrap();
        Self::read_from(&path).unwrap()
    }

    fn read_from(path: &Path) -> Result<Self, NodeError> {
        let Some(text) = read(path)? else {
            return Ok(Self::default());
        };
        let invalid = |key: &str, value: String, expected: String| NodeError::Invalid {
            path: path.to_owned(),
            key: key.to_owned(),
            value,
            expected,
        };
        let document: Value = serde_json::from_slice(&text).map_err(|error| {
            invalid("the file", format!("no JSON ({error})"), "an object".into())
        })?;
        let settings = object(&document, "the document", &[LIMITS, POD_LIMITS], &invalid)?;
        let number = |object: &Map<String, Value>, place: &str, key: &str, least, most| {
            let Some(wanted) = object.get(key) else {
                return Ok(None);
            };
            let number = wanted
                .as_u64()
                .and_then(|number| u32::try_from(number).ok());
            match number.filter(|number| (least..=most).contains(number)) {
                Some(number) => Ok(Some(number)),
                None => Err(invalid(
                    &format!("{place}.{key}"),
                    shown(wanted),
                    format!("a whole number from {least} to {most}"),
                )),
            }
        };
        let mut values = Self::default().values;
        if let Some(given) = settings.get(LIMITS) {
            let given = object(given, LIMITS, &ALL.map(|limit| limit.key), &invalid)?;
            for (limit, value) in ALL.iter().zip(&mut values) {
                if let Some(wanted) = number(given, LIMITS, limit.key, limit.least, limit.most)? {
                    *value = wanted;
                }
            }
        }
        let mut shares = Shares::of(&values);
        if let Some(given) = settings.get(POD_LIMITS) {
            let known = ["learned", "flows", "fragments"];
            let given = object(given, POD_LIMITS, &known, &invalid)?;
            let Shares {
                learned,
                flows,
                fragments,
                ..
            } = &mut shares;
            for (key, share) in known.into_iter().zip([learned, flows, fragments]) {
                if let Some(wanted) = number(given, POD_LIMITS, key, 1, value(&values, key))? {
                    *share = wanted;
                }
            }
            shares.follow();
        }
        Ok(Self { values, shares })
    }

    /// Every table that is limited, and how many entries it has room for.
    pub fn maps(&self) -> impl Iterator<Item = (&'static str, u32)> {
        let fragments = value(&self.values, "fragments");
        let sized = move |map, value| match map {
            // One more for devices that are no ports.
            "STATS" => value + 1,
            "HELD" => value / FRAGMENTS_A_HELD,
            // Of fragments too.
            "PLACES" => value + fragments + fragments / FRAGMENTS_A_HELD,
            _ => value,
        };
        ALL.iter().zip(self.values).flat_map(move |(limit, value)| {
            limit.maps.iter().map(move |&map| (map, sized(map, value)))
        })
    }
}

impl Limits {
    /// What the programs must know: what one pod can have, by their names for it.
    pub const fn globals(&self) -> [(&'static str, &u32); 4] {
        let shares = &self.shares;
        [
            ("LEARNED_SHARE", &shares.learned),
            ("FLOWS_SHARE", &shares.flows),
            ("FRAGMENTS_SHARE", &shares.fragments),
            ("HELD_SHARE", &shares.held),
        ]
    }
}

/// What an operator can do when `map` is full, if that is for operators to say.
pub fn remedy(map: &str) -> Option<String> {
    let limit = ALL.iter().find(|limit| limit.maps.contains(&map))?;
    Some(format!(
        "{}; remove some, or raise {LIMITS}.{} in {PATH}, which holds for tables that are \
         made after that: from the next boot on",
        limit.holders, limit.key
    ))
}

/// The file, if there is one.
fn read(path: &Path) -> Result<Option<Vec<u8>>, NodeError> {
    let failed = |source| NodeError::Io {
        path: path.to_owned(),
        source,
    };
    let opened = OpenOptions::new()
        .read(true)
        // A pipe would let everybody wait.
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it must be a regular file")));
    }
    let mut text = Vec::new();
    file.take(SIZE_MAX + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > SIZE_MAX {
        let error = format!("it is longer than {SIZE_MAX} bytes");
        return Err(failed(io::Error::other(error)));
    }
    Ok(Some(text))
}

/// The object that `value` is, which has no other keys than `known`.
fn object<'v>(
    value: &'v Value,
    place: &str,
    known: &[&str],
    invalid: &impl Fn(&str, String, String) -> NodeError,
) -> Result<&'v Map<String, Value>, NodeError> {
    let map = value
        .as_object()
        .ok_or_else(|| invalid(place, shown(value), "an object".into()))?;
    match map.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(invalid(
            &format!("a key of {place}"),
            shown(&Value::from(key.as_str())),
            format!("one of {}", known.join(", ")),
        )),
        None => Ok(map),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, fs};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    fn parse(text: &[u8]) -> Result<HashMap<&'static str, u32>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.json");
        fs::write(&path, text).unwrap();
        match Limits::read_from(&path) {
            Ok(limits) => Ok(limits.maps().collect()),
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains(&*path.to_string_lossy()), "{error}");
                Err(error)
            }
        }
    }

    #[test]
    fn without_a_file_or_a_key_the_tables_are_as_they_were_compiled() {
        let absent = Limits::read_from(Path::new("/nonexistent/node.json")).unwrap();
        assert_eq!(absent, Limits::default());
        let defaults: HashMap<_, _> = Limits::default().maps().collect();
        assert_eq!(parse(b"{}").unwrap(), defaults);
        assert_eq!(parse(br#"{"limits": {}}"#).unwrap(), defaults);
        assert_eq!(defaults["PUBLISHED"], MAX_PUBLISHED);
        assert_eq!(defaults["STATS"], MAX_PORTS + 1);
    }

    #[test]
    fn a_limit_is_that_of_all_its_tables_and_of_no_other() {
        let mut expected: HashMap<_, _> = Limits::default().maps().collect();
        expected.extend([
            ("PORTS", 7),
            ("ENDPOINTS", 7),
            ("MEMBERS", 7),
            ("STATS", 8),
            ("FRAGMENTS", 2048),
            ("HELD", 256),
            ("FLOWS", 4096),
            ("REPLIES", 4096),
            ("PLACES", 4096 + 2048 + 256),
        ]);
        let text = br#"{"limits": {"ports": 7, "fragments": 2048, "flows": 4096}}"#;
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn a_pod_has_a_quarter_if_nothing_else_is_said() {
        let shares = |text: &str| Limits::of(text).globals().map(|(_, &share)| share);
        assert_eq!(shares("{}"), [16_384, 32_768, 1024, 128]);
        let small = r#"{"limits": {"flows": 4096, "fragments": 1024}}"#;
        assert_eq!(shares(small), [16_384, 1024, 256, 45]);
        let own = r#"{"limits": {"flows": 4096}, "podLimits": {"flows": 4096, "fragments": 2048, "learned": 1}}"#;
        assert_eq!(shares(own), [1, 4096, 2048, 256]);
    }

    #[test]
    fn what_is_wrong_is_said_with_what_would_be_right() {
        for (text, said) in [
            ("", "the file is no JSON"),
            ("{\"limits\": }", "the file is no JSON"),
            ("[]", "the document is [], must be an object"),
            (
                r#"{"Limits": {}}"#,
                r#"a key of the document is "Limits", must be one of limits, podLimits"#,
            ),
            (r#"{"limits": 1}"#, "limits is 1, must be an object"),
            (
                r#"{"limits": {"flow": 1}}"#,
                r#"a key of limits is "flow", must be one of ports, addresses, segments"#,
            ),
            (
                r#"{"limits": {"ports": 0}}"#,
                "limits.ports is 0, must be a whole number from 1 to 1048576",
            ),
            (
                r#"{"limits": {"flows": 1023}}"#,
                "limits.flows is 1023, must be a whole number from 1024 to 16777216",
            ),
            (
                r#"{"limits": {"flows": 1e4}}"#,
                "limits.flows is 10000.0, must be a whole number",
            ),
            (
                r#"{"limits": {"flows": 2048}, "podLimits": {"flows": 2049}}"#,
                "podLimits.flows is 2049, must be a whole number from 1 to 2048",
            ),
            (
                r#"{"podLimits": {"ports": 1}}"#,
                r#"a key of podLimits is "ports", must be one of learned, flows, fragments"#,
            ),
            (r#"{"limits": {"ports": "8"}}"#, r#"limits.ports is "8""#),
            (r#"{"limits": {"ports": null}}"#, "limits.ports is null"),
            (r#"{"limits": {"ports": -1}}"#, "limits.ports is -1"),
            (
                r#"{"limits": {"ports": 4294967296}}"#,
                "limits.ports is 4294967296",
            ),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_no_file_of_sensible_size_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        mkfifo(&path, Mode::S_IRUSR).unwrap();
        for path in [directory.path(), &path] {
            let error = Limits::read_from(path).unwrap_err().to_string();
            assert!(error.contains("must be a regular file"), "{error}");
        }
        let error = parse(&vec![b' '; 1 << 20]).unwrap_err();
        assert!(error.contains("longer than 65536 bytes"), "{error}");
    }

    #[test]
    fn a_remedy_names_the_key() {
        let remedy = remedy("MASQUERADED").unwrap();
        assert!(remedy.contains("limits.addresses in /etc/bpf-bridge/node.json"));
        assert_eq!(super::remedy("PROGRAMS"), None);
    }
}
