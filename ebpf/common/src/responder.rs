//! Neighbour requests and their answers: ARP (RFC 826) and IPv6 neighbour
//! discovery (RFC 4861).
//!
//! The parsers take whole frames of a fixed length, because that is what the
//! programs can copy to their stack in one go; everything in them is hostile.

use core::hint::black_box;

use crate::{
    frame::{ETH_P_ARP, ETH_P_IPV6},
    layout::Mac,
};

/// The length of an ARP frame for IPv4 over Ethernet, in bytes.
pub const ARP_FRAME_LEN: usize = 42;
/// The shortest neighbour solicitation: Ethernet, IPv6 and 24 bytes of ICMPv6.
pub const NS_FRAME_LEN: usize = 78;
/// A neighbour advertisement with its link-layer address option.
pub const NA_FRAME_LEN: usize = 86;

/// Where an IPv6 header's next-header byte is in a frame.
pub const IPV6_NEXT_HEADER: usize = 20;
/// The next-header value of ICMPv6.
pub const IPPROTO_ICMPV6: u8 = 58;

const ND_SOLICITATION: u8 = 135;
const ND_ADVERTISEMENT: u8 = 136;
const OPTION_TARGET_LINK_ADDRESS: u8 = 2;
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// What stands in an IPv4-mapped address after eight zeroes (RFC 4291 §2.5.5.2).
const IPV4_MAPPED: u32 = 0xffff;
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// A question for the owner of an IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArpRequest {
    /// Who asks.
    pub sender_mac: Mac,
    /// The asker's own address; 0.0.0.0 in a probe (RFC 5227 §1.1).
    pub sender: [u8; 4],
    /// The address asked for.
    pub target: [u8; 4],
}

impl ArpRequest {
    /// Reads a request; `None` if the frame is anything else, a reply included.
    pub fn parse(frame: &[u8; ARP_FRAME_LEN]) -> Option<Self> {
        // Ethernet (1), IPv4 (0x0800), lengths 6 and 4, operation 1.
        if u16::from_be_bytes(bytes(frame, 12)) != ETH_P_ARP
            || bytes(frame, 14) != [0, 1, 8, 0, 6, 4, 0, 1]
        {
            return None;
        }
        Some(Self {
            sender_mac: bytes(frame, 22),
            sender: bytes(frame, 28),
            target: bytes(frame, 38),
        })
    }

    /// The frame that answers: the target is at `mac`.
    pub fn reply(&self, mac: Mac) -> [u8; ARP_FRAME_LEN] {
        let mut frame = [0; ARP_FRAME_LEN];
        put(&mut frame, 0, self.sender_mac);
        put(&mut frame, 6, mac);
        put(&mut frame, 12, ETH_P_ARP.to_be_bytes());
        put(&mut frame, 14, [0, 1, 8, 0, 6, 4, 0, 2]);
        put(&mut frame, 22, mac);
        put(&mut frame, 28, self.target);
        put(&mut frame, 32, self.sender_mac);
        put(&mut frame, 38, self.sender);
        frame
    }
}

/// A question for the owner of an IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighborSolicitation {
    /// Who asks.
    pub sender_mac: Mac,
    /// The asker's own address; `::` while it detects duplicates (RFC 4862 §5.4.2).
    pub sender: [u8; 16],
    /// The address asked for.
    pub target: [u8; 16],
}

impl NeighborSolicitation {
    /// Reads a solicitation; `None` if the frame is anything else, is not from
    /// the link itself (hop limit 255, RFC 4861 §7.1.1), has extension headers, or
    /// asks for an IPv4-mapped address.
    pub fn parse(frame: &[u8; NS_FRAME_LEN]) -> Option<Self> {
        let proto = u16::from_be_bytes(bytes(frame, 12));
        let payload_len = u16::from_be_bytes(bytes(frame, 18));
        let [next_header, hop_limit] = bytes(frame, IPV6_NEXT_HEADER);
        let [kind, code] = bytes(frame, 54);
        if proto != ETH_P_IPV6
            || frame[14] >> 4 != 6
            || next_header != IPPROTO_ICMPV6
            || hop_limit != 255
            || payload_len < 24
            || kind != ND_SOLICITATION
            || code != 0
        {
            return None;
        }
        // No link has an IPv4-mapped address, but the table writes IPv4 that way.
        if u64::from_be_bytes(bytes(frame, 62)) == 0
            && u32::from_be_bytes(bytes(frame, 70)) == IPV4_MAPPED
        {
            return None;
        }
        Some(Self {
            sender_mac: bytes(frame, 6),
            sender: bytes(frame, 22),
            target: bytes(frame, 62),
        })
    }

    /// The frame that answers: the target is at `mac`, and forwards packets of
    /// others if `router` is set.
    ///
    /// An asker without an address gets the answer by multicast and unsolicited
    /// (RFC 4861 §7.2.4): that is how duplicate address detection hears of it.
    pub fn advertisement(&self, mac: Mac, router: bool) -> [u8; NA_FRAME_LEN] {
        let nameless = self.sender == [0; 16];
        let (to_mac, to) = if nameless {
            (ALL_NODES_MAC, ALL_NODES)
        } else {
            (self.sender_mac, self.sender)
        };
        let mut flags = 1 << 5;
        if !nameless {
            flags |= 1 << 6;
        }
        if router {
            flags |= 1 << 7;
        }
        let mut frame = [0; NA_FRAME_LEN];
        put(&mut frame, 0, to_mac);
        put(&mut frame, 6, mac);
        put(&mut frame, 12, ETH_P_IPV6.to_be_bytes());
        put(&mut frame, 14, [0x60, 0, 0, 0, 0, 32, IPPROTO_ICMPV6, 255]);
        put(&mut frame, 22, self.target);
        put(&mut frame, 38, to);
        put(&mut frame, 54, [ND_ADVERTISEMENT, 0, 0, 0, flags]);
        put(&mut frame, 62, self.target);
        put(&mut frame, 78, [OPTION_TARGET_LINK_ADDRESS, 1]);
        put(&mut frame, 80, mac);
        // Else the compiler keeps each byte in a register of its own, for which the stack of
        // a BPF program is too small.
        let sum = icmpv6_checksum(black_box(&frame));
        put(&mut frame, 56, sum.to_be_bytes());
        frame
    }
}

/// The checksum of an advertisement whose checksum field is zero (RFC 4443 §2.3).
fn icmpv6_checksum(frame: &[u8; NA_FRAME_LEN]) -> u16 {
    // The pseudo header: both addresses (which stand right before the payload),
    // the payload's length and the protocol.
    let mut sum: u32 = 32 + IPPROTO_ICMPV6 as u32;
    let mut at = 22;
    while at < NA_FRAME_LEN {
        sum += u16::from_be_bytes([frame[at], frame[at + 1]]) as u32;
        at += 2;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// `N` bytes of `frame` from `at` on. Both are constants at every call, so the
/// check that they fit disappears when it is compiled.
#[inline(always)]
fn bytes<const N: usize, const F: usize>(frame: &[u8; F], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&frame[at..at + N]);
    out
}

/// Writes `value` into `frame` at `at`; constants, as in [`bytes`].
#[inline(always)]
fn put<const N: usize, const F: usize>(frame: &mut [u8; F], at: usize, value: [u8; N]) {
    frame[at..at + N].copy_from_slice(&value);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(sender: [u8; 4], target: [u8; 4]) -> [u8; ARP_FRAME_LEN] {
        let mut frame = ArpRequest {
            sender_mac: [2, 0, 0, 0, 0, 9],
            sender: target,
            target: sender,
        }
        .reply([2, 0, 0, 0, 0, 1]);
        frame[21] = 1;
        frame
    }

    fn solicitation(sender: [u8; 16], target: [u8; 16]) -> [u8; NS_FRAME_LEN] {
        let mut frame = [0; NS_FRAME_LEN];
        put(&mut frame, 6, [2, 0, 0, 0, 0, 1]);
        put(&mut frame, 12, [0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, 58, 255]);
        put(&mut frame, 22, sender);
        put(&mut frame, 54, [135, 0]);
        put(&mut frame, 62, target);
        frame
    }

    /// The one's complement sum of the whole message, checksum included, is zero
    /// when the checksum is right (RFC 1071). Written apart from the code above:
    /// it builds the pseudo header byte by byte.
    fn sum_with_pseudo_header(frame: &[u8]) -> u16 {
        let mut message = std::vec::Vec::new();
        message.extend_from_slice(&frame[22..54]);
        message.extend_from_slice(&(frame.len() as u32 - 54).to_be_bytes());
        message.extend_from_slice(&[0, 0, 0, 58]);
        message.extend_from_slice(&frame[54..]);
        let mut sum = 0u64;
        for pair in message.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        }
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        !(sum as u16)
    }

    #[test]
    fn an_arp_request_is_answered_to_the_asker() {
        let asked = ArpRequest::parse(&request([10, 0, 0, 2], [10, 0, 0, 3])).unwrap();
        assert_eq!(asked.sender, [10, 0, 0, 2]);
        assert_eq!(asked.target, [10, 0, 0, 3]);
        let reply = asked.reply([2, 0, 0, 0, 0, 3]);
        assert_eq!(reply[0..6], [2, 0, 0, 0, 0, 1]);
        assert_eq!(reply[6..12], [2, 0, 0, 0, 0, 3]);
        assert_eq!(reply[20..22], [0, 2]);
        assert_eq!(reply[22..28], [2, 0, 0, 0, 0, 3]);
        assert_eq!(reply[28..32], [10, 0, 0, 3]);
        assert_eq!(reply[32..38], [2, 0, 0, 0, 0, 1]);
        assert_eq!(reply[38..42], [10, 0, 0, 2]);
    }

    #[test]
    fn what_is_no_arp_request_is_left_alone() {
        let good = request([10, 0, 0, 2], [10, 0, 0, 3]);
        assert!(ArpRequest::parse(&good).is_some());
        // Ethertype, hardware, protocol, lengths and operation, each wrong once.
        for at in [12, 13, 14, 15, 16, 17, 18, 19, 20, 21] {
            let mut bad = good;
            bad[at] ^= 0x40;
            assert_eq!(ArpRequest::parse(&bad), None, "byte {at}");
        }
    }

    #[test]
    fn what_is_no_solicitation_is_left_alone() {
        let good = solicitation([1; 16], [2; 16]);
        assert!(NeighborSolicitation::parse(&good).is_some());
        // Ethertype, version, next header, hop limit, type and code.
        for at in [12, 13, 14, 20, 21, 54, 55] {
            let mut bad = good;
            bad[at] ^= 0x80;
            assert_eq!(NeighborSolicitation::parse(&bad), None, "byte {at}");
        }
        let mut short = good;
        short[19] = 23;
        assert_eq!(NeighborSolicitation::parse(&short), None, "payload length");
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 2];
        let mapped = solicitation([1; 16], mapped);
        assert_eq!(NeighborSolicitation::parse(&mapped), None, "IPv4-mapped");
    }

    #[test]
    fn duplicate_address_detection_hears_of_the_owner() {
        let probe = NeighborSolicitation::parse(&solicitation([0; 16], [7; 16])).unwrap();
        let answer = probe.advertisement([2, 0, 0, 0, 0, 7], false);
        assert_eq!(answer[0..6], ALL_NODES_MAC);
        assert_eq!(answer[38..54], ALL_NODES);
        assert_eq!(answer[58], 0x20, "override, not solicited");
    }

    proptest! {
        #[test]
        fn advertisements_carry_a_right_checksum(
            sender: [u8; 16],
            target: [u8; 16],
            mac: [u8; 6],
            router: bool,
        ) {
            let asked = NeighborSolicitation::parse(&solicitation(sender, target)).unwrap();
            let answer = asked.advertisement(mac, router);
            prop_assert_eq!(sum_with_pseudo_header(&answer), 0);
            prop_assert_eq!(&answer[62..78], &target);
            prop_assert_eq!(&answer[80..86], &mac);
            prop_assert_eq!(answer[58] & 0x80 != 0, router);
        }

        #[test]
        fn no_frame_makes_the_parsers_panic(
            bytes in proptest::collection::vec(any::<u8>(), NS_FRAME_LEN)
        ) {
            let frame: [u8; NS_FRAME_LEN] = bytes.try_into().unwrap();
            let _ = NeighborSolicitation::parse(&frame);
            let mut short = [0; ARP_FRAME_LEN];
            short.copy_from_slice(&frame[..ARP_FRAME_LEN]);
            let _ = ArpRequest::parse(&short);
        }
    }
}
