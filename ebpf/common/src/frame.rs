//! Ethernet frames: what the first fourteen bytes say.

use crate::layout::Mac;

/// The length of an Ethernet header without a VLAN tag, in bytes.
pub const ETH_HLEN: usize = 14;
/// IPv4, RFC 894.
pub const ETH_P_IP: u16 = 0x0800;
/// ARP, RFC 826.
pub const ETH_P_ARP: u16 = 0x0806;
/// IPv6, RFC 2464.
pub const ETH_P_IPV6: u16 = 0x86dd;
/// A VLAN tag, IEEE 802.1Q.
pub const ETH_P_8021Q: u16 = 0x8100;
/// A provider's VLAN tag, IEEE 802.1ad.
pub const ETH_P_8021AD: u16 = 0x88a8;

/// What a switch does with a destination address before any table is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// One station.
    Unicast,
    /// Every port.
    Group,
    /// The node itself and no port: the reserved group addresses of IEEE 802.1D
    /// §7.12.6, such as LLDP's, and those that only multicast routers listen to.
    NodeOnly,
    /// Nobody: a pause frame.
    Nobody,
}

/// What to do with a frame to `mac`.
///
/// Membership reports (to all IGMPv3 or MLDv2 routers, RFC 3376 §4.2.14 and RFC
/// 3810 §5.2.14) go to the node only, as a Linux bridge sends them to router ports
/// only (RFC 4541 §2.1.1): each pod writes several when it starts and when it ends,
/// and they mean nothing to other pods.
///
/// Spanning tree's own address is flooded, as `br_handle_frame` does when the
/// bridge does not take part in the protocol.
pub const fn destination(mac: &Mac) -> Destination {
    if mac[0] & 1 == 0 {
        return Destination::Unicast;
    }
    match *mac {
        [0x01, 0x80, 0xc2, 0, 0, 0x01] => Destination::Nobody,
        [0x01, 0x80, 0xc2, 0, 0, 0x02..=0x0f]
        | [0x01, 0x00, 0x5e, 0, 0, 0x16]
        | [0x33, 0x33, 0, 0, 0, 0x16] => Destination::NodeOnly,
        _ => Destination::Group,
    }
}

/// Whether `mac` may be a source: one station's address and not all zeroes.
pub const fn is_valid_source(mac: &Mac) -> bool {
    mac[0] & 1 == 0 && !matches!(mac, [0, 0, 0, 0, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_told_apart() {
        let cases: [(Mac, Destination); 12] = [
            ([0x02, 0, 0, 0, 0, 1], Destination::Unicast),
            ([0xff; 6], Destination::Group),
            ([0x33, 0x33, 0, 0, 0, 1], Destination::Group),
            ([0x01, 0x00, 0x5e, 0, 0, 1], Destination::Group),
            ([0x01, 0x80, 0xc2, 0, 0, 0x00], Destination::Group),
            ([0x01, 0x80, 0xc2, 0, 0, 0x01], Destination::Nobody),
            ([0x01, 0x80, 0xc2, 0, 0, 0x0e], Destination::NodeOnly),
            ([0x01, 0x80, 0xc2, 0, 0, 0x10], Destination::Group),
            ([0x01, 0x00, 0x5e, 0, 0, 0x16], Destination::NodeOnly),
            ([0x33, 0x33, 0, 0, 0, 0x16], Destination::NodeOnly),
            ([0x33, 0x33, 0, 0, 0, 0x02], Destination::Group),
            ([0x33, 0x33, 0, 0, 1, 0x16], Destination::Group),
        ];
        for (mac, expected) in cases {
            assert_eq!(destination(&mac), expected, "{mac:02x?}");
        }
    }

    #[test]
    fn sources_are_single_stations() {
        assert!(is_valid_source(&[0x02, 0, 0, 0, 0, 1]));
        assert!(!is_valid_source(&[0; 6]));
        assert!(!is_valid_source(&[0xff; 6]));
        assert!(!is_valid_source(&[0x01, 0, 0x5e, 0, 0, 1]));
    }
}
