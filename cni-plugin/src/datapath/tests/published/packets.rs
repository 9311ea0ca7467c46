//! IP packets for the tests, each checksum added up over all that it covers: nothing
//! here is shared with the code under test.

use std::net::{IpAddr, SocketAddr};

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const FRAGMENT: u8 = 44;
pub(super) const ICMPV6: u8 = 58;
pub(super) const SCTP: u8 = 132;

pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;

/// IPv4 options, or IPv6 extension headers, each with its own number.
pub(super) type Options = Vec<(u8, Vec<u8>)>;

/// What an IP header says besides addresses, protocol and length.
#[derive(Clone, Default)]
pub(super) struct Header {
    /// The identification, in IPv6 of the fragment header.
    pub(super) id: u32,
    /// Where the fragment belongs, in units of eight bytes, and whether more follow.
    pub(super) fragment: Option<(u16, bool)>,
    /// "Don't fragment" (IPv4).
    pub(super) df: bool,
    /// Between its fixed part and the payload.
    pub(super) options: Options,
}

/// The Internet checksum (RFC 1071) of `bytes`.
pub(super) fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) * 256 + u64::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = sum % 0x1_0000 + sum / 0x1_0000;
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn short(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap().to_be_bytes()
}

/// A packet with the header's options.
pub(super) fn packet(
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    header: &Header,
    payload: &[u8],
) -> Vec<u8> {
    if from.is_ipv4() {
        v4(from, to, protocol, header, payload)
    } else {
        v6(from, to, protocol, header, payload)
    }
}

fn v4(from: IpAddr, to: IpAddr, protocol: u8, header: &Header, payload: &[u8]) -> Vec<u8> {
    let options: Vec<u8> = header.options.iter().flat_map(|(_, o)| o.clone()).collect();
    let words = 5 + options.len() / 4;
    let (offset, more) = header.fragment.unwrap_or_default();
    let flags = u16::from(header.df) << 14 | u16::from(more) << 13 | offset;
    let mut head = [
        &[0x40 | u8::try_from(words).unwrap(), 0][..],
        &short(words * 4 + payload.len()),
        &u16::try_from(header.id).unwrap().to_be_bytes(),
        &flags.to_be_bytes(),
        &[64, protocol, 0, 0],
        &octets(from),
        &octets(to),
        &options,
    ]
    .concat();
    let sum = checksum(&head);
    head[10..12].copy_from_slice(&sum);
    [&head[..], payload].concat()
}

fn v6(from: IpAddr, to: IpAddr, protocol: u8, header: &Header, payload: &[u8]) -> Vec<u8> {
    let mut chain = header.options.clone();
    if let Some((offset, more)) = header.fragment {
        let field = offset << 3 | u16::from(more);
        let body = [&[0, 0][..], &field.to_be_bytes(), &header.id.to_be_bytes()].concat();
        chain.push((FRAGMENT, body));
    }
    let mut rest = payload.to_vec();
    let mut next = protocol;
    for (number, mut body) in chain.into_iter().rev() {
        body[0] = next;
        next = number;
        rest = [body, rest].concat();
    }
    [
        &[0x60, 0, 0, 0][..],
        &short(rest.len()),
        &[next, 64],
        &octets(from),
        &octets(to),
        &rest,
    ]
    .concat()
}

fn pseudo_header(from: IpAddr, to: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let length = u32::try_from(length).unwrap().to_be_bytes();
    let protocol = [0, 0, 0, protocol];
    [&octets(from)[..], &octets(to), &length, &protocol].concat()
}

fn over_pseudo_header(from: IpAddr, to: IpAddr, protocol: u8, segment: &[u8]) -> [u8; 2] {
    let pseudo = pseudo_header(from, to, protocol, segment.len());
    checksum(&[&pseudo, segment].concat())
}

/// What follows the IP header; `flags` are TCP's.
pub(super) fn segment(
    protocol: u8,
    from: SocketAddr,
    to: SocketAddr,
    flags: u8,
    data: &[u8],
) -> Vec<u8> {
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let (rest, sum) = match protocol {
        TCP => (
            vec![1, 2, 3, 4, 5, 6, 7, 8, 0x50, flags, 9, 9, 0, 0, 0, 0],
            Some(16),
        ),
        UDP => ([&short(8 + data.len())[..], &[0, 0]].concat(), Some(6)),
        // Its checksum covers no address, and nobody here looks at it.
        _ => (vec![1, 2, 3, 4, 0xde, 0xad, 0xbe, 0xef], None),
    };
    let mut bytes = [&ports[..], &rest, data].concat();
    if let Some(at) = sum {
        let sum = match over_pseudo_header(from.ip(), to.ip(), protocol, &bytes) {
            [0, 0] => [0xff, 0xff],
            sum => sum,
        };
        bytes[at..at + 2].copy_from_slice(&sum);
    }
    bytes
}

/// A whole packet from one end to the other.
pub(super) fn whole(protocol: u8, from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    flagged(protocol, from, to, SYN, data)
}

/// The same as a stack gives it to a device that is to complete the checksum: in its
/// place is the sum over the pseudo-header.
pub(super) fn unfinished(protocol: u8, from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut payload = segment(protocol, from, to, SYN, data);
    let at = if protocol == TCP { 16 } else { 6 };
    let pseudo = pseudo_header(from.ip(), to.ip(), protocol, payload.len());
    let sum = checksum(&pseudo).map(|byte| !byte);
    payload[at..at + 2].copy_from_slice(&sum);
    packet(from.ip(), to.ip(), protocol, &Header::default(), &payload)
}

/// The same with TCP's flags.
pub(super) fn flagged(
    protocol: u8,
    from: SocketAddr,
    to: SocketAddr,
    flags: u8,
    data: &[u8],
) -> Vec<u8> {
    let payload = segment(protocol, from, to, flags, data);
    packet(from.ip(), to.ip(), protocol, &Header::default(), &payload)
}

/// A datagram in fragments of at most `size` bytes of data each.
pub(super) fn fragments(
    protocol: u8,
    from: SocketAddr,
    to: SocketAddr,
    id: u32,
    data: &[u8],
    size: usize,
) -> Vec<Vec<u8>> {
    assert_eq!(size % 8, 0);
    let payload = segment(protocol, from, to, SYN, data);
    let count = payload.len().div_ceil(size);
    payload
        .chunks(size)
        .enumerate()
        .map(|(number, part)| {
            let offset = u16::try_from(number * size / 8).unwrap();
            let header = Header {
                id,
                fragment: Some((offset, number + 1 < count)),
                ..Header::default()
            };
            packet(from.ip(), to.ip(), protocol, &header, part)
        })
        .collect()
}

/// An ICMP or ICMPv6 message: its first two bytes, the four after its checksum, and what
/// it quotes.
pub(super) fn icmp(
    from: IpAddr,
    to: IpAddr,
    kind: [u8; 2],
    word: [u8; 4],
    quoted: &[u8],
) -> Vec<u8> {
    let mut message = [&kind[..], &[0, 0], &word, quoted].concat();
    let (protocol, sum) = if from.is_ipv4() {
        (ICMP, checksum(&message))
    } else {
        (ICMPV6, over_pseudo_header(from, to, ICMPV6, &message))
    };
    message[2..4].copy_from_slice(&sum);
    packet(from, to, protocol, &Header::default(), &message)
}

/// "Too long" with the length that fits.
pub(super) fn too_big(from: IpAddr, to: IpAddr, quoted: &[u8]) -> Vec<u8> {
    if from.is_ipv4() {
        icmp(from, to, [3, 4], [0, 0, 5, 0], quoted)
    } else {
        icmp(from, to, [2, 0], [0, 0, 5, 0], quoted)
    }
}
