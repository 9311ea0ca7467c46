//! What is known of each owner, beside the leases: so that an owner's addresses are
//! found without reading every lease.

use std::{fmt::Write as _, net::IpAddr};

use super::directory::Stamp;

/// The longest name of a directory entry, in bytes (NAME_MAX).
const NAME_MAX: usize = 255;

/// Who wrote an owner's leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// This program, in the boot named.
    Written,
    /// Another program; seen first in the boot named.
    Seen,
}

/// An owner's leases.
///
/// Kept as the text of a symbolic link, for that is made and replaced in one step,
/// is never torn, and is read in one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) origin: Origin,
    /// Empty if the system would not tell.
    pub(super) boot: String,
    /// Each address with the time its lease was written: another lease of the same
    /// address for the same owner has another time.
    pub(super) leases: Vec<(IpAddr, Stamp)>,
}

impl Entry {
    /// Whether the owner's containers ended with the system that ran them.
    pub(super) fn before(&self, boot: &str) -> bool {
        // Without knowing both, nothing is known.
        !self.boot.is_empty() && !boot.is_empty() && self.boot != boot
    }

    pub(super) fn encode(&self) -> String {
        let origin = match self.origin {
            Origin::Written => "written",
            Origin::Seen => "seen",
        };
        let boot = if self.boot.is_empty() {
            "-"
        } else {
            &self.boot
        };
        let mut text = format!("{origin} {boot}");
        for (address, stamp) in &self.leases {
            // Writing to a string does not fail.
            let _ = write!(text, " {address}@{stamp}");
        }
        text
    }

    /// None for what [`Entry::encode`] did not make.
    pub(super) fn decode(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let origin = match words.next()? {
            "written" => Origin::Written,
            "seen" => Origin::Seen,
            _ => return None,
        };
        let boot = words
            .next()
            .map(|boot| if boot == "-" { "" } else { boot })?;
        let leases = words
            .map(|word| {
                let (address, stamp) = word.split_once('@')?;
                Some((address.parse().ok()?, Stamp::parse(stamp)?))
            })
            .collect::<Option<_>>()?;
        Some(Self {
            origin,
            boot: boot.into(),
            leases,
        })
    }
}

/// The owner that a lease names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    pub(super) container_id: String,
    /// Empty in leases of old versions of the stock plugin, which have only the id.
    pub(super) ifname: String,
}

impl Name {
    /// The name of the owner's entry. Neither part has a colon.
    pub(super) fn key(&self) -> String {
        let key = format!("{}:{}", self.container_id, self.ifname);
        if key.len() <= NAME_MAX {
            return key;
        }
        // No identifier has a tilde. Every use compares the lease's own text, too.
        let head: String = self.container_id.chars().take(NAME_MAX - 64).collect();
        format!(
            "{head}~{:016x}:{}",
            fnv1a(self.container_id.as_bytes()),
            self.ifname
        )
    }
}

/// What the text of a lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Nothing: whoever wrote it died, or the system did.
    Torn,
    /// Something that no runtime's plugin wrote.
    Foreign,
    Owner(Name),
}

/// Separates container id and interface name.
const LINE_BREAK: &str = "\r\n";

pub(super) fn lease_text(name: &Name) -> String {
    format!("{}{LINE_BREAK}{}", name.container_id, name.ifname)
}

pub(super) fn parse_lease(content: &[u8]) -> Content {
    // Where the size reached the disk before the content, there are zeroes.
    if content.contains(&0) {
        return Content::Torn;
    }
    let Ok(text) = std::str::from_utf8(content) else {
        return Content::Foreign;
    };
    let text = text.trim();
    if text.is_empty() {
        return Content::Torn;
    }
    let (container_id, ifname) = text.split_once(LINE_BREAK).unwrap_or((text, ""));
    if is_container_id(container_id) && (ifname.is_empty() || is_ifname(ifname)) {
        Content::Owner(Name {
            container_id: container_id.into(),
            ifname: ifname.into(),
        })
    } else {
        Content::Foreign
    }
}

/// As the specification has it, section 2 ("Parameters").
pub(super) fn is_container_id(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// What the kernel and the specification let an interface be called.
pub(super) fn is_ifname(text: &str) -> bool {
    !matches!(text, "" | "." | "..")
        && text.len() <= 15
        && !text.contains(|c: char| matches!(c, '/' | ':' | '\0') || c.is_whitespace())
}

/// Fowler, Noll and Vo's hash (1a, 64 bits): the same in every build, as it names files.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_round_trip() {
        let stamp = Stamp::parse("1700000000.000000042").unwrap();
        let leases = ["10.1.0.2", "fd00::2"]
            .map(|ip| (ip.parse().unwrap(), stamp))
            .to_vec();
        for (origin, boot, leases) in [
            (Origin::Written, "5d8e-1", leases.clone()),
            (Origin::Seen, "", leases),
            (Origin::Seen, "x", vec![]),
        ] {
            let entry = Entry {
                origin,
                boot: boot.into(),
                leases,
            };
            assert_eq!(Entry::decode(&entry.encode()), Some(entry));
        }
        for text in [
            "",
            "written",
            "stolen x",
            "seen x 10.1.0.2",
            "seen x 10.1.0@1.2",
            "seen x 10.1.0.2@1",
        ] {
            assert_eq!(Entry::decode(text), None, "{text}");
        }
    }

    #[test]
    fn an_entry_is_of_an_earlier_boot_only_when_both_are_known() {
        let entry = |boot: &str| Entry {
            origin: Origin::Written,
            boot: boot.into(),
            leases: vec![],
        };
        assert!(entry("a").before("b"));
        assert!(!entry("a").before("a"));
        assert!(!entry("a").before(""));
        assert!(!entry("").before("b"));
    }

    #[test]
    fn leases() {
        let owner = |container_id: &str, ifname: &str| {
            Content::Owner(Name {
                container_id: container_id.into(),
                ifname: ifname.into(),
            })
        };
        for (text, content) in [
            (&b"abc\r\neth0"[..], owner("abc", "eth0")),
            (b" abc\r\neth0\n", owner("abc", "eth0")),
            (b"abc", owner("abc", "")),
            (b"abc\r\n", owner("abc", "")),
            (b"a_b.c-1\r\nnet1.5@x", owner("a_b.c-1", "net1.5@x")),
            (b"", Content::Torn),
            (b" \r\n", Content::Torn),
            (b"\0\0\0\0", Content::Torn),
            (b"abc\r\n\0\0\0\0", Content::Torn),
            (b"kept for the printer", Content::Foreign),
            (b"abc\r\neth0\r\nmore", Content::Foreign),
            (b"a:b", Content::Foreign),
            (b"../../etc/passwd", Content::Foreign),
            (b"\xff\xfe", Content::Foreign),
        ] {
            assert_eq!(
                parse_lease(text),
                content,
                "{:?}",
                text.escape_ascii().to_string()
            );
        }
    }

    #[test]
    fn keys_fit_and_differ() {
        let key = |id: &str, ifname: &str| {
            Name {
                container_id: id.into(),
                ifname: ifname.into(),
            }
            .key()
        };
        assert_eq!(key("abc", "eth0"), "abc:eth0");
        assert_eq!(key("abc", ""), "abc:");
        let long = "a".repeat(300);
        assert!(key(&long, "abcdefghijklmno").len() <= NAME_MAX);
        assert_ne!(key(&long, "eth0"), key(&"a".repeat(301), "eth0"));
        assert_ne!(key(&long, "eth0"), key(&long, "eth1"));
        assert_eq!(
            fnv1a(b"foobar"),
            0x8594_4171_f739_67e8,
            "the authors' test vector"
        );
    }
}
