//! Ethernet addresses.

use std::{fmt, net::Ipv6Addr, str::FromStr};

/// A 48-bit Ethernet (MAC) address, in the order of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

/// A text is not a 48-bit Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an ethernet address such as 02:00:5e:10:00:01")]
pub struct ParseMacError;

impl MacAddr {
    /// The address with these octets, first on the wire first.
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The octets, first on the wire first.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// A locally administered unicast address made of the low 46 bits of `hash`:
    /// the same hash always gives the same address (IEEE 802, 8.4).
    pub const fn from_hash(hash: u64) -> Self {
        let [_, _, first, b, c, d, e, f] = hash.to_be_bytes();
        Self([(first & !0x01) | 0x02, b, c, d, e, f])
    }

    /// The IPv6 link-local address that the kernel makes of this address by
    /// default: `fe80::/64` with the modified EUI-64 (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let group = |high, low| u16::from_be_bytes([high, low]);
        let (first, second) = (group(a ^ 0x02, b), group(c, 0xff));
        Ipv6Addr::new(0xfe80, 0, 0, 0, first, second, group(0xfe, d), group(e, f))
    }

    /// Whether an interface can have this address: neither a group address
    /// (broadcast is one) nor all zeros.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
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

    /// Accepts `02:00:5e:10:00:01`, `02-00-5e-10-00-01` and `0200.5e10.0001`, as
    /// Go's `net.ParseMAC` does.
    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let (separator, digits) = match text.as_bytes().get(2) {
            Some(b':') => (':', 2),
            Some(b'-') => ('-', 2),
            _ => ('.', 4),
        };
        let mut octets = Vec::with_capacity(6);
        for group in text.split(separator) {
            // The check also keeps the slices below on character borders.
            if group.len() != digits || !group.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(ParseMacError);
            }
            for start in (0..digits).step_by(2) {
                let octet = u8::from_str_radix(&group[start..start + 2], 16);
                octets.push(octet.map_err(|_| ParseMacError)?);
            }
        }
        octets.try_into().map(Self).map_err(|_| ParseMacError)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn go_forms_are_accepted() {
        let expected = Ok(MacAddr::new([0x02, 0, 0x5e, 0x10, 0, 0xab]));
        for text in [
            "02:00:5e:10:00:ab",
            "02:00:5E:10:00:AB",
            "02-00-5e-10-00-ab",
            "0200.5e10.00ab",
        ] {
            assert_eq!(text.parse(), expected, "{text}");
        }
    }

    #[test]
    fn the_link_local_address_is_the_kernels() {
        let mac = MacAddr::new([0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde]);
        assert_eq!(mac.link_local().to_string(), "fe80::3656:78ff:fe9a:bcde");
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "02",
            "02:00:5e:10:00",
            "02:00:5e:10:00:01:02",
            "02:00:5e:10:00:0g",
            "2:0:5e:10:0:1",
            "02:00-5e:10:00:01",
            "+2:00:5e:10:00:01",
            "02005e100001",
            "é2:00:5e:10:00:01",
            "02:00:5e:10:00:01:02:03",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(ParseMacError), "{text}");
        }
    }

    #[test]
    fn unicast_excludes_groups_and_zero() {
        assert!(MacAddr::new([2, 0, 0, 0, 0, 1]).is_unicast());
        assert!(!MacAddr::new([0; 6]).is_unicast());
        assert!(!MacAddr::new([0xff; 6]).is_unicast());
        assert!(!MacAddr::new([1, 0, 0x5e, 0, 0, 1]).is_unicast());
    }

    proptest! {
        #[test]
        fn text_round_trips(octets: [u8; 6]) {
            let mac = MacAddr::new(octets);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn any_text_is_survived(text in "\\PC{0,24}") {
            let _ = text.parse::<MacAddr>();
        }
    }

    #[test]
    fn made_addresses_are_local_and_unicast() {
        for hash in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            let mac = MacAddr::from_hash(hash);
            assert!(mac.is_unicast());
            assert_eq!(mac.octets()[0] & 0x03, 0x02);
            assert_eq!(mac.octets()[1..], hash.to_be_bytes()[3..]);
        }
    }
}
