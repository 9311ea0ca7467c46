//! Frames for the tests, written out by hand: nothing here is shared with the
//! code under test.

use bpf_bridge_common::layout::Mac;

pub(super) const BROADCAST: Mac = [0xff; 6];
pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV6: u16 = 0x86dd;
/// An ethertype for local experiments (IEEE 802).
pub(super) const OTHER: u16 = 0x88b5;

/// A frame with any payload.
pub(super) fn ethernet(to: Mac, from: Mac, proto: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &proto.to_be_bytes(), payload].concat()
}

/// A frame that no parser cares for, 64 bytes long.
pub(super) fn plain(to: Mac, from: Mac) -> Vec<u8> {
    let payload: Vec<u8> = (0..50).collect();
    ethernet(to, from, OTHER, &payload)
}

/// A frame with a VLAN tag in its bytes (IEEE 802.1Q).
pub(super) fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    [&frame[..12], &[0x81, 0], &vlan.to_be_bytes(), &frame[12..]].concat()
}

/// An ARP packet of RFC 826 in a frame `to`, 42 bytes long.
pub(super) fn arp(
    to: Mac,
    operation: u16,
    sender: (Mac, [u8; 4]),
    target: (Mac, [u8; 4]),
) -> Vec<u8> {
    let packet = [
        &[0, 1, 8, 0, 6, 4][..],
        &operation.to_be_bytes(),
        &sender.0,
        &sender.1,
        &target.0,
        &target.1,
    ]
    .concat();
    ethernet(to, sender.0, ARP, &packet)
}

/// A broadcast question, as a host's stack asks it.
pub(super) fn who_has(sender: (Mac, [u8; 4]), target: [u8; 4]) -> Vec<u8> {
    arp(BROADCAST, 1, sender, ([0; 6], target))
}

/// The source link-layer address option (RFC 4861 §4.6.1).
pub(super) fn source_option(mac: Mac) -> Vec<u8> {
    [&[1, 1][..], &mac].concat()
}

/// A neighbour solicitation to the target's solicited-node group.
pub(super) fn solicitation(
    from: Mac,
    sender: [u8; 16],
    target: [u8; 16],
    options: &[u8],
) -> Vec<u8> {
    let mut group = [0; 16];
    group[..2].copy_from_slice(&[0xff, 2]);
    group[11..13].copy_from_slice(&[1, 0xff]);
    group[13..].copy_from_slice(&target[13..]);
    let to = [0x33, 0x33, 0xff, target[13], target[14], target[15]];
    let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target, options].concat();
    ethernet(
        to,
        from,
        IPV6,
        &ipv6(sender, group, 58, &icmpv6(sender, group, message)),
    )
}

/// The advertisement that answers (RFC 4861 §4.4).
pub(super) fn advertisement(to: (Mac, [u8; 16]), owner: (Mac, [u8; 16]), flags: u8) -> Vec<u8> {
    let message = [
        &[136, 0, 0, 0, flags, 0, 0, 0][..],
        &owner.1,
        &[2, 1],
        &owner.0,
    ]
    .concat();
    let packet = ipv6(owner.1, to.1, 58, &icmpv6(owner.1, to.1, message));
    ethernet(to.0, owner.0, IPV6, &packet)
}

/// An IPv4 packet with so many words of options (no operation).
pub(super) fn ipv4(
    from: [u8; 4],
    to: [u8; 4],
    protocol: u8,
    options: u8,
    payload: &[u8],
) -> Vec<u8> {
    let options = vec![1; usize::from(options) * 4];
    let words = u8::try_from(5 + options.len() / 4).unwrap();
    let length = 20 + options.len() + payload.len();
    let [high, low] = u16::try_from(length).unwrap().to_be_bytes();
    let header = [0x40 | words, 0, high, low, 0, 0, 0, 0, 64, protocol, 0, 0];
    [&header[..], &from, &to, &options, payload].concat()
}

/// An IPv6 packet with hop limit 255.
pub(super) fn ipv6(from: [u8; 16], to: [u8; 16], next_header: u8, payload: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [
        &[0x60, 0, 0, 0, high, low, next_header, 255][..],
        &from,
        &to,
        payload,
    ]
    .concat()
}

/// An ICMPv6 message with its checksum (RFC 4443 §2.3) filled in.
pub(super) fn icmpv6(from: [u8; 16], to: [u8; 16], mut message: Vec<u8>) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let summed = [&from[..], &to, &length, &[0, 0, 0, 58], &message].concat();
    let mut sum: u64 = summed
        .chunks(2)
        .map(|pair| u64::from(pair[0]) * 256 + u64::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = sum % 0x1_0000 + sum / 0x1_0000;
    }
    let sum = !u16::try_from(sum).unwrap();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}
