//! Ethernet addresses.

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    net::Ipv6Addr,
    str::FromStr,
};

use thiserror::Error;

/// An Ethernet (EUI-48) address, in the order of transmission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

/// A text that is no Ethernet address.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{0:?} is not an Ethernet address: six pairs of hexadecimal digits, as in 02:00:5e:10:00:01"
)]
pub struct ParseMacError(String);

impl MacAddr {
    /// A locally administered unicast address made of the low 46 bits of `hash`:
    /// the same hash always gives the same address.
    #[must_use]
    pub const fn from_hash(hash: u64) -> Self {
        let [_, _, first, rest @ ..] = hash.to_be_bytes();
        let [b, c, d, e, f] = rest;
        // IEEE 802, 8.4: bit 0 of the first octet is group, bit 1 local.
        Self([(first & !0x01) | 0x02, b, c, d, e, f])
    }

    /// A random locally administered unicast address.
    #[must_use]
    pub fn random() -> Self {
        // Its keys come from the operating system's random source.
        Self::from_hash(RandomState::new().hash_one(()))
    }

    /// The IPv6 link-local address that the kernel makes of this address by
    /// default: `fe80::/64` with the modified EUI-64 (RFC 4291, appendix A).
    #[must_use]
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from([
            0xfe,
            0x80,
            0,
            0,
            0,
            0,
            0,
            0,
            a ^ 0x02,
            b,
            c,
            0xff,
            0xfe,
            d,
            e,
            f,
        ])
    }

    /// Whether this can be one device's address: neither a group address nor
    /// all zero.
    #[must_use]
    pub const fn is_unicast(self) -> bool {
        self.0[0] & 0x01 == 0 && !matches!(self.0, [0, 0, 0, 0, 0, 0])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = ParseMacError;

    /// Takes six pairs of hexadecimal digits of either case, between colons or
    /// between hyphens.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let failed = || ParseMacError(text.to_owned());
        let separator = if text.contains('-') { '-' } else { ':' };
        let mut parts = text.split(separator);
        let mut octets = [0; 6];
        for octet in &mut octets {
            let part = parts.next().ok_or_else(failed)?;
            // `from_str_radix` alone would take a sign.
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(failed());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| failed())?;
        }
        match parts.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(failed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_the_usual_notations() {
        let mac = MacAddr([0x02, 0, 0x5e, 0xab, 0xcd, 0xef]);
        assert_eq!("02:00:5e:ab:cd:ef".parse(), Ok(mac));
        assert_eq!("02-00-5E-AB-CD-EF".parse(), Ok(mac));
        assert_eq!(mac.to_string(), "02:00:5e:ab:cd:ef");
    }

    #[test]
    fn refuses_everything_else() {
        for text in [
            "",
            "02:00:5e:ab:cd",
            "02:00:5e:ab:cd:ef:01",
            "02:00:5e:ab:cd:e",
            "02:00:5e:ab:cd:+f",
            "02:00:5e-ab-cd-ef",
            "02:00:5e:ab:cd:gg",
            " 02:00:5e:ab:cd:ef",
            "02005eabcdef",
        ] {
            let error = text.parse::<MacAddr>().unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")));
        }
    }

    #[test]
    fn random_addresses_differ() {
        assert_ne!(MacAddr::random(), MacAddr::random());
    }

    #[test]
    fn makes_the_link_local_address() {
        let mac = MacAddr([0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde]);
        assert_eq!(mac.link_local().to_string(), "fe80::3656:78ff:fe9a:bcde");
    }

    #[test]
    fn knows_what_a_device_can_have() {
        assert!(MacAddr([2, 0, 0, 0, 0, 1]).is_unicast());
        assert!(!MacAddr([0; 6]).is_unicast());
        assert!(!MacAddr([0xff; 6]).is_unicast());
        assert!(!MacAddr([1, 0, 0x5e, 0, 0, 1]).is_unicast());
    }

    proptest! {
        #[test]
        fn display_and_parse_agree(octets: [u8; 6]) {
            let mac = MacAddr(octets);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn a_hash_gives_a_local_unicast_address(hash: u64) {
            let mac = MacAddr::from_hash(hash);
            prop_assert!(mac.is_unicast());
            prop_assert_eq!(mac.0[0] & 0x03, 0x02);
            prop_assert_eq!(&mac.0[1..], &hash.to_be_bytes()[3..]);
        }
    }
}
