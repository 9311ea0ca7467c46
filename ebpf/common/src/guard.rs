//! What a frame says of addresses and ways, which its receivers believe: ARP (RFC 826),
//! neighbour discovery (RFC 4861) and redirects (RFC 792).
//!
//! What counts is what a receiver makes of a frame. Linux takes priority tags off, skips
//! IPv6 extension headers, looks neither at ARP's operation nor at its hardware type too
//! closely, and believes the payload, not the Ethernet header.

use crate::{
    frame::{ETH_HLEN, ETH_P_8021AD, ETH_P_8021Q, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6},
    layout::Mac,
    responder::IPPROTO_ICMPV6,
};

/// How many VLAN tags in the bytes of a frame are skipped at most: nobody has use for
/// two priorities, and the kernel has taken the first tag out of the bytes already.
pub const MAX_TAGS: usize = 1;
/// How many IPv6 extension headers are skipped at most.
pub const MAX_EXTENSIONS: usize = 8;

/// The hop limit without which no neighbour believes anything (RFC 4861 §6.1, §7.1).
pub const ND_HOP_LIMIT: u8 = 255;
/// ICMP, RFC 792.
pub const IPPROTO_ICMP: u8 = 1;

/// The bits of a tag that say which VLAN it is; 0 is none, the tag has a priority only.
const VLAN_ID: u16 = 0x0fff;
const ICMP_REDIRECT: u8 = 5;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
// RFC 8200 §4.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// A frame that can be read.
pub trait Frame {
    /// `N` bytes from offset `at` on; `None` if the frame ends before.
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
}

impl Frame for [u8] {
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.get(at..)?.first_chunk().copied()
    }
}

/// What is behind the Ethernet header and its tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A packet of this ethertype, at this offset.
    Packet(u16, usize),
    /// The receiver has nothing of it: it ends too soon, or is in a VLAN.
    Nothing,
    /// More tags than are looked at.
    Hidden,
}

/// Skips the tags that a receiver takes off.
#[inline(always)]
pub fn payload(frame: &(impl Frame + ?Sized)) -> Payload {
    let mut at = ETH_HLEN - 2;
    for _ in 0..=MAX_TAGS {
        let Some(ethertype) = frame.load(at) else {
            return Payload::Nothing;
        };
        let ethertype = u16::from_be_bytes(ethertype);
        at += 2;
        if !matches!(ethertype, ETH_P_8021Q | ETH_P_8021AD) {
            return Payload::Packet(ethertype, at);
        }
        let Some(tag) = frame.load(at) else {
            return Payload::Nothing;
        };
        if is_vlan(u16::from_be_bytes(tag)) {
            return Payload::Nothing;
        }
        at += 2;
    }
    Payload::Hidden
}

/// Whether a tag leads into a VLAN.
#[inline(always)]
pub const fn is_vlan(tag: u16) -> bool {
    tag & VLAN_ID != 0
}

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Nothing of addresses.
    Nothing,
    /// This IPv4 address is at the sender's.
    V4([u8; 4]),
    /// This IPv6 address is at the sender's.
    V6([u8; 16]),
    /// The one who has this address is a router.
    Advertised([u8; 16]),
    /// There is a better way: by this address, which is at the sender's, or in IPv4 by
    /// another, and this is unspecified.
    Redirected([u8; 16]),
    /// What a receiver would have to reassemble or skip more headers for.
    Hidden,
}

/// Reads the packet of this ethertype at offset `l3`.
#[inline(always)]
pub fn said(frame: &(impl Frame + ?Sized), ethertype: u16, l3: usize) -> Said {
    match ethertype {
        ETH_P_ARP => arp(frame, l3),
        ETH_P_IP => ipv4(frame, l3),
        ETH_P_IPV6 => ipv6(frame, l3),
        _ => None,
    }
    .unwrap_or(Said::Nothing)
}

/// The sender's address, whatever the operation: a question says as much as an answer.
#[inline(always)]
fn arp(frame: &(impl Frame + ?Sized), l3: usize) -> Option<Said> {
    let packet: [u8; 28] = frame.load(l3)?;
    let ([_, _, _, _, 6, 4, ..], [.., a, b, c, d]) = (packet, *packet.first_chunk::<18>()?) else {
        return None;
    };
    Some(Said::V4([a, b, c, d]))
}

#[inline(always)]
fn ipv4(frame: &(impl Frame + ?Sized), l3: usize) -> Option<Said> {
    let [first, _, _, _, _, _, high, low, _, protocol] = frame.load(l3)?;
    let is_later = u16::from_be_bytes([high, low]) & 0x1fff != 0;
    if protocol != IPPROTO_ICMP || is_later {
        return None;
    }
    let header = usize::from(first & 0x0f) * 4;
    let [kind] = frame.load(l3 + header)?;
    (kind == ICMP_REDIRECT).then_some(Said::Redirected([0; 16]))
}

#[inline(always)]
fn ipv6(frame: &(impl Frame + ?Sized), l3: usize) -> Option<Said> {
    let [mut next, hop_limit] = frame.load(l3 + 6)?;
    if hop_limit != ND_HOP_LIMIT {
        return None;
    }
    let mut at = l3 + 40;
    let mut fragment = false;
    for _ in 0..=MAX_EXTENSIONS {
        match next {
            IPPROTO_ICMPV6 => return discovery(frame, l3, at, fragment),
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let [following, length] = frame.load(at)?;
                next = following;
                at += 8 + usize::from(length) * 8;
            }
            FRAGMENT => {
                let [following, _, high, low] = frame.load(at)?;
                if u16::from_be_bytes([high, low]) & !7 != 0 {
                    return None;
                }
                fragment = true;
                next = following;
                at += 8;
            }
            _ => return None,
        }
    }
    Some(Said::Hidden)
}

/// An ICMPv6 message at offset `at`.
#[inline(always)]
fn discovery(frame: &(impl Frame + ?Sized), l3: usize, at: usize, fragment: bool) -> Option<Said> {
    let [kind] = frame.load(at)?;
    if !matches!(kind, ROUTER_SOLICITATION..=REDIRECT) {
        return None;
    }
    if fragment {
        // Nobody sends it so (RFC 6980), and few take it.
        return Some(Said::Hidden);
    }
    let source: [u8; 16] = frame.load(l3 + 8)?;
    Some(match kind {
        ROUTER_ADVERTISEMENT => Said::Advertised(source),
        REDIRECT => Said::Redirected(frame.load(at + 8)?),
        // One who has no address yet asks for that which he wants.
        NEIGHBOR_ADVERTISEMENT => Said::V6(frame.load(at + 8)?),
        NEIGHBOR_SOLICITATION if source == [0; 16] => Said::V6(frame.load(at + 8)?),
        _ => Said::V6(source),
    })
}

/// The MAC address that a link-local address was made of (RFC 4291, appendix A): nobody
/// assigns the one without the other.
#[inline(always)]
pub const fn mac_of(address: [u8; 16]) -> Option<Mac> {
    match address {
        [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, 0xff, 0xfe, d, e, f] => {
            Some([a ^ 2, b, c, d, e, f])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_link_local_address_is_made_of_a_mac_address() {
        let address = [
            0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x10, 2, 3, 0xff, 0xfe, 4, 5, 6,
        ];
        assert_eq!(mac_of(address), Some([0x12, 2, 3, 4, 5, 6]));
        for at in [0, 1, 2, 7, 11, 12] {
            let mut other = address;
            other[at] ^= 1;
            assert_eq!(mac_of(other), None, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn no_frame_makes_the_parser_panic(
            mut frame in proptest::collection::vec(any::<u8>(), 0..200),
            ethertype in prop_oneof![
                Just(ETH_P_ARP),
                Just(ETH_P_IP),
                Just(ETH_P_IPV6),
                Just(ETH_P_8021Q),
            ],
            next in prop_oneof![Just(58u8), Just(60), Just(0), Just(43), Just(44)],
        ) {
            for (at, byte) in [
                (12, (ethertype >> 8) as u8),
                (13, ethertype as u8),
                (20, next),
                (21, ND_HOP_LIMIT),
            ] {
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            if let Payload::Packet(ethertype, l3) = payload(frame.as_slice()) {
                let _ = said(frame.as_slice(), ethertype, l3);
            }
        }
    }
}
