//! An attachment: its names, and the record of what was made for it.
//!
//! ```text
//! /run/bpf-bridge/attachments/<network>/<container id>:<ifname>   one JSON object
//! ```
//!
//! The record's file is the attachment's lock as well: whoever works on the
//! attachment holds it. Records describe things that do not survive a reboot. Where
//! `/run` does, or where a node is a container that is made anew, a record says in its
//! `era` that its numbers are not of this world ([`boot::era`]), and counts for nothing.

use std::{
    fs,
    io::{self, Read as _},
    net::IpAddr,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use bpf_bridge_common::layout::MAX_PUBLISHED;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    boot,
    cni::names::check_ifname,
    datapath::{LogLevel, nat::NodePort},
    fault::{self, Kind},
    lock::{self, Lock, LockError, Mode},
    mac::MacAddr,
};

/// Where records are.
const ROOT: &str = "/run/bpf-bridge/attachments";
/// No alias is longer (`IFALIASZ` of `linux/if.h` is 256 with its NUL).
const ALIAS_MAX: usize = 255;
/// No record is longer, not even of all the ports that can be published
/// ([`MAX_PUBLISHED`]), each on a single address.
const RECORD_MAX: u64 = 8 * 1024 * 1024;
const _: () = assert!(
    RECORD_MAX
        > MAX_PUBLISHED as u64
            * r#"{"address":"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff","port":65535,"protocol":132},"#
                .len() as u64
);

/// Why a record could not be used.
#[derive(Debug, Error)]
pub enum RecordError {
    /// It is locked, or its file cannot be used.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// It could not be read or written.
    #[error("{action} the record {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Which attachment: the key of everything that the plugin keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment<'a> {
    /// The network's name.
    pub network: &'a str,
    /// `CNI_CONTAINERID`.
    pub container_id: &'a str,
    /// `CNI_IFNAME`.
    pub ifname: &'a str,
}

impl<'a> Attachment<'a> {
    /// The host veth's name: the same for the same attachment, so that it is
    /// found without a record.
    pub fn host_veth(&self) -> String {
        let hash = hash([self.network, self.container_id, self.ifname]);
        format!("veth{:011x}", hash >> 20)
    }

    /// The MAC address of a container's interface that has no IP address to make
    /// one of.
    pub fn mac(&self) -> MacAddr {
        MacAddr::from_hash(hash([self.network, self.container_id, self.ifname]))
    }

    /// The host veth's alias, which tells people what it is for and proves whose
    /// it is.
    pub fn alias(&self) -> String {
        let mut alias = format!(
            "bpf-bridge {} {} {}",
            self.network, self.container_id, self.ifname
        );
        let mut end = alias.len().min(ALIAS_MAX);
        while !alias.is_char_boundary(end) {
            end -= 1;
        }
        alias.truncate(end);
        alias
    }

    /// Where its record is.
    pub fn path(&self) -> PathBuf {
        directory(self.network).join(format!("{}:{}", self.container_id, self.ifname))
    }

    /// Takes the attachment to make it.
    ///
    /// # Errors
    ///
    /// [`RecordError`].
    pub fn claim(&self) -> Result<Claim, RecordError> {
        Claim::read(Lock::take(&self.path(), Mode::Exclusive)?, self.path())
    }

    /// Takes the attachment if anything of it was recorded.
    ///
    /// # Errors
    ///
    /// [`RecordError`].
    pub fn claim_existing(&self) -> Result<Option<Claim>, RecordError> {
        match Lock::take_existing(&self.path())? {
            Some(lock) => Claim::read(lock, self.path()).map(Some),
            None => Ok(None),
        }
    }

    /// The same, without waiting for who works on the attachment.
    ///
    /// # Errors
    ///
    /// [`RecordError`].
    pub fn try_claim_existing(&self) -> Result<Option<Claim>, RecordError> {
        match Lock::try_existing(&self.path())? {
            Some(lock) => Claim::read(lock, self.path()).map(Some),
            None => Ok(None),
        }
    }

    /// The record, without waiting for who works on the attachment.
    pub fn peek(&self) -> Option<Record> {
        let mut text = String::new();
        lock::peek(&self.path())
            .and_then(|file| file.take(RECORD_MAX).read_to_string(&mut text))
            .ok()?;
        Record::parse(&text)
    }
}

/// The container id and the interface name of every record of a network.
///
/// # Errors
///
/// The directory cannot be read.
pub fn recorded(network: &str) -> Result<Vec<(String, String)>, RecordError> {
    let path = directory(network);
    let error = |source| RecordError::Io {
        action: "listing",
        path: path.clone(),
        source,
    };
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(error(source)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let name = entry.map_err(error)?.file_name();
        if let Some((container_id, ifname)) = name.to_str().and_then(|name| name.split_once(':')) {
            all.push((container_id.to_owned(), ifname.to_owned()));
        }
    }
    Ok(all)
}

/// What the attachments of a network need of the node's uplinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outside {
    /// One claims a port of the node.
    pub publishes: bool,
    /// The programs masquerade one.
    pub masquerades: bool,
}

impl Outside {
    /// Whether they need anything.
    pub const fn is_needed(self) -> bool {
        self.publishes || self.masquerades
    }

    fn and(self, other: Self) -> Self {
        Self {
            publishes: self.publishes || other.publishes,
            masquerades: self.masquerades || other.masquerades,
        }
    }
}

/// What all attachments of a network need of the node's uplinks.
///
/// # Errors
///
/// The directory cannot be read.
pub fn outside(network: &str) -> Result<Outside, RecordError> {
    Ok(records(network)?.fold(Outside::default(), |all, record| all.and(record.outside())))
}

/// Every record of a network, read one by one.
///
/// # Errors
///
/// The directory cannot be read.
pub fn records(network: &str) -> Result<impl Iterator<Item = Record>, RecordError> {
    let all = recorded(network)?.into_iter();
    Ok(all.filter_map(move |(container_id, ifname)| {
        let attachment = Attachment {
            network,
            container_id: &container_id,
            ifname: &ifname,
        };
        attachment.peek()
    }))
}

/// Whether an alias is one of an attachment of `network`.
pub fn is_alias_in(network: &str, alias: &str) -> bool {
    alias
        .strip_prefix("bpf-bridge ")
        .and_then(|alias| alias.strip_prefix(network))
        .is_some_and(|alias| alias.starts_with(' '))
}

fn directory(network: &str) -> PathBuf {
    Path::new(ROOT).join(network)
}

/// What was made for an attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Whether the ADD came to its end, and the runtime was told.
    pub complete: bool,
    /// When and where the numbers below mean something: [`boot::era`].
    pub era: String,
    /// The name of the gateway device.
    pub bridge: String,
    /// Its ifindex, which is the number of the segment; 0 until it is known.
    pub segment: u32,
    /// The ifindex of the host veth.
    pub host_ifindex: u32,
    /// The MAC address of the container's interface, in the order of the wire.
    pub mac: [u8; 6],
    /// The container's addresses.
    pub addresses: Vec<IpAddr>,
    /// Which programs the port carries.
    pub log_level: LogLevel,
    /// The ports of the node that it claims.
    #[serde(default)]
    pub published: Vec<NodePort>,
    /// What masquerades its addresses, if anything does.
    #[serde(default)]
    pub masquerade: Option<Masquerade>,
}

/// What masquerades an attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Masquerade {
    /// The programs on uplinks.
    Ebpf,
    /// A chain of netfilter.
    Nftables {
        /// Its name.
        chain: String,
        /// How many rules it has.
        rules: u32,
    },
}

impl Record {
    /// Reads a record; `None` if the text is none, as an ADD that was killed may leave
    /// it, or one that no ADD has written since the node came up.
    pub fn parse(text: &str) -> Option<Self> {
        // What stands behind it is the end of a longer one, and was about to be cut off.
        let first = serde_json::Deserializer::from_str(text).into_iter().next();
        first?
            .ok()
            .filter(|record: &Self| record.era == boot::era())
            // The name becomes part of a path.
            .filter(|record: &Self| check_ifname(&record.bridge).is_ok())
    }

    /// What it needs of the node's uplinks.
    pub fn outside(&self) -> Outside {
        Outside {
            publishes: !self.published.is_empty(),
            masquerades: self.masquerade == Some(Masquerade::Ebpf),
        }
    }
}

/// An attachment that this call works on, alone.
#[derive(Debug)]
pub struct Claim {
    lock: Lock,
    path: PathBuf,
    record: Option<Record>,
}

impl Claim {
    fn read(lock: Lock, path: PathBuf) -> Result<Self, RecordError> {
        let mut text = String::new();
        lock.file()
            .take(RECORD_MAX)
            .read_to_string(&mut text)
            .map_err(|source| RecordError::Io {
                action: "reading",
                path: path.clone(),
                source,
            })?;
        Ok(Self {
            lock,
            path,
            // A torn record is one of an ADD that was killed: what it made is
            // found by name.
            record: Record::parse(&text),
        })
    }

    /// What was recorded before.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Records what was made.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<(), RecordError> {
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_string(record)?;
            if record.complete {
                // As long as before, so that nothing but these letters is another: then
                // no part of it without the rest is wrong.
                text = text.replacen("true", "true ", 1);
            }
            let file = self.lock.file();
            fault::request(Kind::File, "write the record")?;
            // One write, then the cut: a reader sees the old, the new, or what
            // is no JSON.
            file.write_all_at(text.as_bytes(), 0)?;
            fault::point("write the record");
            file.set_len(text.len() as u64)?;
            fault::point("cut the record");
            Ok(())
        };
        write().map_err(|source| RecordError::Io {
            action: "writing",
            path: self.path.clone(),
            source,
        })?;
        self.record = Some(record.clone());
        Ok(())
    }

    /// Forgets the attachment.
    ///
    /// # Errors
    ///
    /// The file cannot be removed.
    pub fn remove(self) -> Result<(), RecordError> {
        self.lock.remove().map_err(|source| RecordError::Io {
            action: "removing",
            path: self.path,
            source,
        })
    }
}

/// FNV-1a, of 64 bits. The parts are separated by a byte that none can contain.
pub(crate) fn hash<const N: usize>(parts: [&str; N]) -> u64 {
    parts
        .iter()
        .flat_map(|part| part.bytes().chain([0]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_record_of_before_masquerade_is_one_without() {
        let text = |era: &str| {
            format!(
                r#"{{"complete":true,"era":"{era}","bridge":"cni0","segment":5,"hostIfindex":7,
                "mac":[2,0,0,0,0,1],"addresses":["10.0.0.2"],"logLevel":"off"}}"#
            )
        };
        let record = Record::parse(&text(boot::era())).unwrap();
        assert_eq!(Record::parse(&text("another boot 1")), None);
        assert_eq!(record.masquerade, None);
        assert_eq!(record.outside(), Outside::default());
        let record = Record {
            masquerade: Some(Masquerade::Ebpf),
            ..record
        };
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(Record::parse(&text), Some(record.clone()));
        assert!(record.outside().is_needed() && !record.outside().publishes);
        // Written over a longer one.
        assert_eq!(Record::parse(&format!("{text}0.0.2\"]}}")), Some(record));
        assert_eq!(Record::parse(&text[..text.len() - 1]), None);
    }

    fn attachment<'a>(container_id: &'a str, ifname: &'a str) -> Attachment<'a> {
        Attachment {
            network: "net",
            container_id,
            ifname,
        }
    }

    #[test]
    fn host_veths_have_names_of_their_own_that_fit() {
        let mut names = HashSet::new();
        for number in 0..10_000 {
            let id = format!("container-{number}");
            let name = attachment(&id, "eth0").host_veth();
            assert_eq!(name.len(), 15);
            assert_eq!(name, attachment(&id, "eth0").host_veth());
            assert!(names.insert(name));
        }
        assert_ne!(
            attachment("a", "bc").host_veth(),
            attachment("ab", "c").host_veth()
        );
    }

    #[test]
    fn aliases_fit_whatever_the_names_are() {
        let id = "x".repeat(200);
        let alias = Attachment {
            network: &id,
            container_id: &id,
            ifname: "eth0",
        }
        .alias();
        assert_eq!(alias.len(), ALIAS_MAX);
    }
}
