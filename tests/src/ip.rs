//! IP packets made byte by byte, to be sent as no kernel would send them.

use std::net::{IpAddr, SocketAddr};

use crate::{Captured, Frame, MacAddr};

/// An IP packet: of the version of its addresses, which must be the same.
#[derive(Debug, Clone)]
pub struct Packet {
    source: IpAddr,
    destination: IpAddr,
    hop_limit: u8,
    protocol: u8,
    /// Options of IPv4 or an extension header of IPv6, with its type.
    extension: Option<(u8, Vec<u8>)>,
    body: Vec<u8>,
}

impl Packet {
    const ICMP: u8 = 1;
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const FRAGMENT: u8 = 44;
    const ICMP6: u8 = 58;

    /// A UDP datagram.
    #[must_use]
    pub fn udp(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Self {
        let mut body = ports(source, destination);
        body.extend(length(8 + payload.len()).to_be_bytes());
        body.extend([0, 0]);
        body.extend(payload);
        Self::new(source.ip(), destination.ip(), Self::UDP, body)
    }

    /// A TCP segment that resets a connection, if the sequence number is one
    /// that the receiver expects.
    #[must_use]
    pub fn tcp_reset(source: SocketAddr, destination: SocketAddr, sequence: u32) -> Self {
        let mut body = ports(source, destination);
        body.extend(sequence.to_be_bytes());
        body.extend([0; 4]);
        // Five words of header, the flag RST, then window and checksum.
        body.extend([5 << 4, 4, 0, 0, 0, 0, 0, 0]);
        Self::new(source.ip(), destination.ip(), Self::TCP, body)
    }

    /// What a router says of a packet that is too large for the next link: it
    /// quotes no more of it than the specification demands, 8 bytes behind the
    /// header in IPv4 (RFC 792).
    #[must_use]
    pub fn too_big(router: IpAddr, packet: &Self, mtu: u16) -> Self {
        let mut quoted = packet.bytes();
        let (protocol, mut body) = match router {
            IpAddr::V4(_) => {
                quoted.truncate(usize::from(quoted[0] & 0xf) * 4 + 8);
                (Self::ICMP, vec![3, 4, 0, 0, 0, 0])
            }
            IpAddr::V6(_) => {
                quoted.truncate(1280 - 48);
                (Self::ICMP6, vec![2, 0, 0, 0, 0, 0])
            }
        };
        body.extend(mtu.to_be_bytes());
        body.extend(quoted);
        Self::new(router, packet.source, protocol, body)
    }

    /// An ICMPv6 message with hop limit 255, as neighbour discovery wants it.
    #[must_use]
    pub(crate) fn icmp6(source: IpAddr, destination: IpAddr, body: Vec<u8>) -> Self {
        Self {
            hop_limit: 255,
            ..Self::new(source, destination, Self::ICMP6, body)
        }
    }

    /// With its checksum, which is zero in `body`.
    fn new(source: IpAddr, destination: IpAddr, protocol: u8, mut body: Vec<u8>) -> Self {
        let mut covered = Vec::new();
        if protocol != Self::ICMP {
            for address in [source, destination] {
                covered.extend(octets(address));
            }
            covered.extend([0, protocol]);
            covered.extend(length(body.len()).to_be_bytes());
        }
        covered.extend(&body);
        let at = match protocol {
            Self::TCP => 16,
            Self::UDP => 6,
            _ => 2,
        };
        body[at..at + 2].copy_from_slice(&internet_checksum(&covered).to_be_bytes());
        Self {
            source,
            destination,
            hop_limit: 64,
            protocol,
            extension: None,
            body,
        }
    }

    /// With a destination options header in IPv6, options in IPv4, that say
    /// nothing.
    #[must_use]
    pub fn with_options(self) -> Self {
        // PadN of four bytes (RFC 8200); four times "no operation" (RFC 791).
        self.extended(60, &[1, 4, 0, 0, 0, 0], &[1; 4])
    }

    /// With a hop-by-hop header in IPv6, options in IPv4, that say nothing.
    #[must_use]
    pub fn with_hop_by_hop_options(self) -> Self {
        self.extended(0, &[1, 4, 0, 0, 0, 0], &[1; 4])
    }

    fn extended(mut self, header: u8, v6: &[u8], v4: &[u8]) -> Self {
        let content = if self.source.is_ipv4() { v4 } else { v6 };
        self.extension = Some((header, content.to_vec()));
        self
    }

    /// The whole packet.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let (first, mut payload) = self.extended_body();
        payload.extend(&self.body);
        self.with_header(first, 0, 0, &payload)
    }

    /// The packet in fragments with `size` bytes each (a multiple of 8) of
    /// what stands behind the header.
    #[must_use]
    pub fn fragments(&self, identification: u16, size: usize) -> Vec<Vec<u8>> {
        let (first, mut payload) = self.extended_body();
        payload.extend(&self.body);
        let count = payload.len().div_ceil(size);
        payload
            .chunks(size)
            .enumerate()
            .map(|(index, chunk)| {
                // In units of 8 bytes.
                let offset = length(index * size / 8);
                let more = index + 1 < count;
                if self.source.is_ipv4() {
                    let flags = if more { 0x2000 } else { 0 };
                    return self.with_header(first, identification, flags | offset, chunk);
                }
                let mut fragment = vec![first, 0];
                fragment.extend((offset << 3 | u16::from(more)).to_be_bytes());
                fragment.extend([0, 0]);
                fragment.extend(identification.to_be_bytes());
                fragment.extend(chunk);
                self.with_header(Self::FRAGMENT, 0, 0, &fragment)
            })
            .collect()
    }

    /// The type of what follows the IP header, and the extension header of IPv6.
    fn extended_body(&self) -> (u8, Vec<u8>) {
        match &self.extension {
            Some((header, content)) if self.source.is_ipv6() => {
                (*header, [&[self.protocol, 0], content.as_slice()].concat())
            }
            _ => (self.protocol, Vec::new()),
        }
    }

    fn with_header(&self, next: u8, identification: u16, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet;
        if self.source.is_ipv4() {
            let options = self
                .extension
                .as_ref()
                .map_or(&[][..], |(_, content)| content);
            let header = 20 + options.len();
            packet = vec![0x40 | u8::try_from(header / 4).unwrap_or(15), 0];
            packet.extend(length(header + payload.len()).to_be_bytes());
            packet.extend(identification.to_be_bytes());
            packet.extend(fragment.to_be_bytes());
            packet.extend([self.hop_limit, next, 0, 0]);
            packet.extend(octets(self.source));
            packet.extend(octets(self.destination));
            packet.extend(options);
            let sum = internet_checksum(&packet).to_be_bytes();
            packet[10..12].copy_from_slice(&sum);
        } else {
            packet = vec![0x60, 0, 0, 0];
            packet.extend(length(payload.len()).to_be_bytes());
            packet.extend([next, self.hop_limit]);
            packet.extend(octets(self.source));
            packet.extend(octets(self.destination));
        }
        packet.extend(payload);
        packet
    }
}

impl Frame {
    /// The type of IPv4 (RFC 894).
    pub const IPV4: u16 = 0x0800;

    /// A frame with an IP packet, or a fragment of one.
    #[must_use]
    pub fn ip(destination: MacAddr, source: MacAddr, packet: &[u8]) -> Self {
        let ethertype = match packet.first() {
            Some(first) if first >> 4 == 6 => Self::IPV6,
            _ => Self::IPV4,
        };
        Self::new(destination, source, ethertype, packet)
    }
}

impl Captured {
    /// The source address of an IP packet.
    #[must_use]
    pub fn ip_source(&self) -> Option<IpAddr> {
        let field = |at| self.bytes.get(at..);
        match self.ethertype() {
            Frame::IPV4 => Some(IpAddr::from(*field(26)?.first_chunk::<4>()?)),
            Frame::IPV6 => Some(IpAddr::from(*field(22)?.first_chunk::<16>()?)),
            _ => None,
        }
    }
}

fn ports(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    [
        source.port().to_be_bytes(),
        destination.port().to_be_bytes(),
    ]
    .concat()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A length as it stands in headers.
fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).unwrap_or(u16::MAX)
}

/// The checksum of RFC 1071.
#[must_use]
pub fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
