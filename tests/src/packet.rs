//! Ethernet frames as they are: made byte by byte, sent and received through
//! packet sockets.

use std::{
    fmt,
    io::{self, IoSliceMut},
    mem,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    libc,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{Namespace, Packet};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// The group address of an IPv6 multicast address (RFC 2464, section 7).
    #[must_use]
    pub fn of_multicast(group: Ipv6Addr) -> Self {
        let [.., a, b, c, d] = group.octets();
        Self([0x33, 0x33, a, b, c, d])
    }

    /// The address of a device.
    ///
    /// # Errors
    ///
    /// That there is no such device, or it has none.
    pub fn of_device(namespace: &Namespace, device: &str) -> Result<Self> {
        namespace.device(device)?["address"]
            .as_str()
            .with_context(|| format!("{device} has no address"))?
            .parse()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let bytes: Vec<u8> = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16))
            .collect::<Result<_, _>>()
            .with_context(|| format!("{text} is not an Ethernet address"))?;
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| anyhow::anyhow!("{text} is not an Ethernet address"))
    }
}

/// A frame to send: destination, source, type and what follows, without the
/// check sequence.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame(pub Vec<u8>);

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

/// The beginning of a frame in hexadecimal, and its length.
fn hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for byte in bytes.iter().take(96) {
        write!(f, "{byte:02x}")?;
    }
    write!(f, " ({} bytes)", bytes.len())
}

impl Frame {
    /// The type of ARP (RFC 826).
    pub const ARP: u16 = 0x0806;
    /// The type of IPv6 (RFC 2464).
    pub const IPV6: u16 = 0x86dd;
    /// The type of a VLAN tag (IEEE 802.1Q).
    pub const VLAN: u16 = 0x8100;
    /// A type for experiments (IEEE 802, "Local Experimental Ethertype 1").
    pub const EXPERIMENTAL: u16 = 0x88b5;

    /// A frame of any type.
    #[must_use]
    pub fn new(destination: MacAddr, source: MacAddr, ethertype: u16, payload: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(14 + payload.len());
        bytes.extend(destination.0);
        bytes.extend(source.0);
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend(payload);
        Self(bytes)
    }

    /// A frame of the experimental type with a VLAN tag: `tci` is priority, drop
    /// eligibility and VLAN id as on the wire.
    #[must_use]
    pub fn tagged(destination: MacAddr, source: MacAddr, tci: u16, payload: &[u8]) -> Self {
        let mut body = Vec::with_capacity(4 + payload.len());
        body.extend(tci.to_be_bytes());
        body.extend(Self::EXPERIMENTAL.to_be_bytes());
        body.extend(payload);
        Self::new(destination, source, Self::VLAN, &body)
    }

    /// An ARP packet: `operation` 1 asks, 2 answers; the target's hardware
    /// address is zero when asking.
    #[must_use]
    pub fn arp(
        destination: MacAddr,
        operation: u16,
        sender: (MacAddr, Ipv4Addr),
        target: (MacAddr, Ipv4Addr),
    ) -> Self {
        let mut body = vec![0, 1, 8, 0, 6, 4];
        body.extend(operation.to_be_bytes());
        for (mac, address) in [sender, target] {
            body.extend(mac.0);
            body.extend(address.octets());
        }
        Self::new(destination, sender.0, Self::ARP, &body)
    }

    /// A gratuitous ARP announcement: `mac` has `address` (RFC 5227, section 3,
    /// as a reply, where Linux wants the sender for the target as well).
    #[must_use]
    pub fn gratuitous_arp(mac: MacAddr, address: Ipv4Addr) -> Self {
        Self::arp(MacAddr::BROADCAST, 2, (mac, address), (mac, address))
    }

    /// An ARP probe: does anyone have `address`? (RFC 5227, section 2.1.1)
    #[must_use]
    pub fn arp_probe(mac: MacAddr, address: Ipv4Addr) -> Self {
        Self::arp(
            MacAddr::BROADCAST,
            1,
            (mac, Ipv4Addr::UNSPECIFIED),
            (MacAddr([0; 6]), address),
        )
    }

    /// An unsolicited neighbour advertisement to all nodes: `mac` has `address`
    /// (RFC 4861, section 7.2.6).
    #[must_use]
    pub fn unsolicited_advertisement(mac: MacAddr, address: Ipv6Addr) -> Self {
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        // Type 136, override flag, target, option 2: target link-layer address.
        let mut body = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
        body.extend(address.octets());
        body.extend([2, 1]);
        body.extend(mac.0);
        let packet = Packet::icmp6(address.into(), all_nodes.into(), body);
        Self::ip(MacAddr::of_multicast(all_nodes), mac, &packet.bytes())
    }

    /// A neighbour solicitation for `target`, to its solicited-node group. From
    /// the unspecified address it is what duplicate address detection sends
    /// (RFC 4861, section 4.3; RFC 4862, section 5.4.2).
    #[must_use]
    pub fn solicitation(mac: MacAddr, source: Ipv6Addr, target: Ipv6Addr) -> Self {
        let [.., a, b, c] = target.octets();
        let group = Ipv6Addr::new(
            0xff02,
            0,
            0,
            0,
            0,
            1,
            0xff00 | u16::from(a),
            u16::from_be_bytes([b, c]),
        );
        let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
        body.extend(target.octets());
        if !source.is_unspecified() {
            body.extend([1, 1]);
            body.extend(mac.0);
        }
        let packet = Packet::icmp6(source.into(), group.into(), body);
        Self::ip(MacAddr::of_multicast(group), mac, &packet.bytes())
    }
}

/// A frame that arrived.
#[derive(Clone, PartialEq, Eq)]
pub struct Captured {
    /// The frame as it was on the wire: with its VLAN tag, which the kernel
    /// takes off before it hands the frame up.
    pub bytes: Vec<u8>,
    /// Whether it was addressed to another station, and seen only because the
    /// device is promiscuous (`PACKET_OTHERHOST`).
    pub for_other: bool,
}

impl fmt::Debug for Captured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.for_other {
            f.write_str("for another station: ")?;
        }
        hex(f, &self.bytes)
    }
}

impl Captured {
    /// The type behind the addresses (that of the tag, if there is one).
    #[must_use]
    pub fn ethertype(&self) -> u16 {
        match self.bytes.get(12..14) {
            Some(&[high, low]) => u16::from_be_bytes([high, low]),
            _ => 0,
        }
    }

    /// The source address.
    #[must_use]
    pub fn source(&self) -> MacAddr {
        let mut mac = [0; 6];
        if let Some(bytes) = self.bytes.get(6..12) {
            mac.copy_from_slice(bytes);
        }
        MacAddr(mac)
    }
}

/// A socket that sends and receives whole frames on one device.
///
/// It receives from the moment it is made, so it is made before the frames are
/// sent; frames that this namespace itself sends are left out.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
}

impl PacketSocket {
    /// Opens a socket on a device.
    ///
    /// # Errors
    ///
    /// That there is no such device.
    pub fn open(namespace: &Namespace, device: &str) -> Result<Self> {
        namespace.within(|| {
            let protocol = libc::ETH_P_ALL as u16;
            let index = if_nametoindex(device)
                .with_context(|| format!("looking for the device {device}"))?;
            // SAFETY: the arguments are plain numbers.
            let raw = unsafe {
                libc::socket(
                    libc::AF_PACKET,
                    libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                    // Nothing is received until the socket is bound to the device.
                    0,
                )
            };
            ensure!(
                raw >= 0,
                "opening a packet socket: {}",
                io::Error::last_os_error()
            );
            // SAFETY: the descriptor was made above and belongs to nothing else.
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            let enable: libc::c_int = 1;
            // SAFETY: the value's address and size are those of `enable`.
            let set = unsafe {
                libc::setsockopt(
                    raw,
                    libc::SOL_PACKET,
                    libc::PACKET_AUXDATA,
                    (&raw const enable).cast(),
                    size_of_val(&enable) as libc::socklen_t,
                )
            };
            ensure!(
                set == 0,
                "asking for VLAN tags: {}",
                io::Error::last_os_error()
            );
            // SAFETY: an all-zero sockaddr_ll is a valid value of that plain C struct.
            let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol.to_be();
            address.sll_ifindex = libc::c_int::try_from(index)?;
            // SAFETY: the address's pointer and size are those of `address`.
            let bound = unsafe {
                libc::bind(
                    raw,
                    (&raw const address).cast(),
                    size_of_val(&address) as libc::socklen_t,
                )
            };
            ensure!(
                bound == 0,
                "binding a packet socket to {device}: {}",
                io::Error::last_os_error()
            );
            Ok(Self { socket })
        })
    }

    /// Sends a frame, when the device has room for it: a veth with XDP has a ring, which
    /// another CPU empties.
    ///
    /// # Errors
    ///
    /// That the device is down, or full for long, or the frame too long for it.
    pub fn send(&self, frame: &Frame) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(5);
        let sent = loop {
            match nix::unistd::write(&self.socket, &frame.0) {
                Err(Errno::ENOBUFS) if Instant::now() < end => {
                    thread::sleep(Duration::from_millis(1));
                }
                sent => break sent.context("sending a frame")?,
            }
        };
        ensure!(sent == frame.0.len(), "a frame was cut to {sent} bytes");
        Ok(())
    }

    /// The first frame that `wanted` accepts, or `None` when none came within
    /// `limit`.
    ///
    /// # Errors
    ///
    /// That the device went away.
    pub fn receive(
        &self,
        limit: Duration,
        wanted: impl Fn(&Captured) -> bool,
    ) -> Result<Option<Captured>> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut waiting = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if poll(&mut waiting, left).context("waiting for a frame")? == 0 {
                return Ok(None);
            }
            if let Some(frame) = self.next()?.filter(&wanted) {
                return Ok(Some(frame));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
        }
    }

    /// The next frame in the socket's buffer, unless it is an outgoing one.
    fn next(&self) -> Result<Option<Captured>> {
        let mut buffer = vec![0; 70_000];
        let mut control = [0_u64; 16];
        // SAFETY: all-zero values of these plain C structs are valid.
        let (mut address, mut message): (libc::sockaddr_ll, libc::msghdr) =
            unsafe { (mem::zeroed(), mem::zeroed()) };
        let mut slice = [IoSliceMut::new(&mut buffer)];
        message.msg_name = (&raw mut address).cast();
        message.msg_namelen = size_of_val(&address) as libc::socklen_t;
        // IoSliceMut has the layout of iovec.
        message.msg_iov = slice.as_mut_ptr().cast();
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: every pointer in `message` is to a live buffer of the size
        // that stands beside it.
        let length = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
        let Ok(length) = usize::try_from(length) else {
            bail!("receiving a frame: {}", io::Error::last_os_error());
        };
        if address.sll_pkttype == libc::PACKET_OUTGOING {
            return Ok(None);
        }
        // SAFETY: `message` was filled by recvmsg.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        let mut tag = None;
        // SAFETY: CMSG_FIRSTHDR returns null or a pointer into `control`.
        if let Some(found) = unsafe { header.as_ref() }
            && (found.cmsg_level, found.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA)
        {
            // SAFETY: the kernel put a tpacket_auxdata behind a header of this type.
            let data: libc::tpacket_auxdata = unsafe {
                libc::CMSG_DATA(header)
                    .cast::<libc::tpacket_auxdata>()
                    .read_unaligned()
            };
            if data.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                let tpid = if data.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0 {
                    data.tp_vlan_tpid
                } else {
                    Frame::VLAN
                };
                tag = Some((tpid, data.tp_vlan_tci));
            }
        }
        buffer.truncate(length);
        if let Some((tpid, tci)) = tag {
            let at = 12.min(buffer.len());
            buffer.splice(at..at, [tpid.to_be_bytes(), tci.to_be_bytes()].concat());
        }
        Ok(Some(Captured {
            bytes: buffer,
            for_other: address.sll_pkttype == libc::PACKET_OTHERHOST,
        }))
    }
}
