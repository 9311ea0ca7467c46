//! The names that identify an attachment, and what they may be made of.
//!
//! They become parts of paths, device aliases and records, so what they may
//! contain is decided here, once.

use std::fmt;

/// The longest network name, in bytes. The specification sets none; a lease's
/// directory and a record's directory are named after it, and NAME_MAX is 255.
pub const NETWORK_NAME_MAX: usize = 200;

/// The longest container id, in bytes. A record's file name is
/// `<container id>:<ifname>`, with room for a suffix, and NAME_MAX is 255.
pub const CONTAINER_ID_MAX: usize = 200;

/// The longest interface name, in bytes: IFNAMSIZ without the terminating zero.
pub const IFNAME_MAX: usize = 15;

/// Which attachment of a network: `(container id, ifname)` is unique in it
/// (spec section 1).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentId {
    /// `CNI_CONTAINERID`, checked by [`check_container_id`].
    pub container_id: String,
    /// `CNI_IFNAME`, checked by [`check_ifname`].
    pub ifname: String,
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.container_id, self.ifname)
    }
}

/// `^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`, the specification's grammar of names.
fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Checks a network name.
///
/// # Errors
///
/// What the name must be.
pub fn check_network_name(name: &str) -> Result<(), &'static str> {
    if is_identifier(name) && name.len() <= NETWORK_NAME_MAX {
        Ok(())
    } else {
        Err("a letter or digit followed by letters, digits, '_', '.' or '-', at most 200 bytes")
    }
}

/// Checks a container id.
///
/// # Errors
///
/// What the id must be.
pub fn check_container_id(id: &str) -> Result<(), &'static str> {
    if is_identifier(id) && id.len() <= CONTAINER_ID_MAX {
        Ok(())
    } else {
        Err("a letter or digit followed by letters, digits, '_', '.' or '-', at most 200 bytes")
    }
}

/// Checks an interface name: what the kernel takes literally
/// (`dev_valid_name`, net/core/dev.c), which leaves out `%` (a template that the
/// kernel expands) and `all` and `default` (directories of net sysctls).
///
/// # Errors
///
/// What the name must be.
pub fn check_ifname(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > IFNAME_MAX {
        return Err("an interface name of 1 to 15 bytes");
    }
    if matches!(name, "." | ".." | "all" | "default") {
        return Err("an interface name, none of \".\", \"..\", \"all\", \"default\"");
    }
    let forbidden = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
    if name.contains(forbidden) {
        return Err("an interface name without '/', ':', '%' and whitespace");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers() {
        for good in ["a", "0", "dbnet", "k8s-pod_network.1", "A-"] {
            assert_eq!(check_network_name(good), Ok(()), "{good}");
            assert_eq!(check_container_id(good), Ok(()), "{good}");
        }
        for bad in [
            "", "-a", ".a", "_a", "a b", "a/b", "../x", "é", "a\n", "a\0",
        ] {
            assert!(check_network_name(bad).is_err(), "{bad}");
            assert!(check_container_id(bad).is_err(), "{bad}");
        }
        assert_eq!(check_network_name(&"n".repeat(200)), Ok(()));
        assert!(check_network_name(&"n".repeat(201)).is_err());
        assert_eq!(check_container_id(&"c".repeat(200)), Ok(()));
        assert!(check_container_id(&"c".repeat(201)).is_err());
    }

    #[test]
    fn interface_names() {
        for good in ["eth0", "a", "exactly15bytes_", "net1.100", "lo-é", "..."] {
            assert_eq!(check_ifname(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "all",
            "default",
            "a/b",
            "a:b",
            "a b",
            "a\tb",
            "a\u{b}b",
            "eth%d",
            "sixteen_bytes_xx",
            "a\u{a0}b",
            "a\nb",
            "a\0b",
        ] {
            assert!(check_ifname(bad).is_err(), "{bad:?}");
        }
    }
}
