//! The maps: their keys, their values and their sizes.
//!
//! All integers are in host byte order, MAC and IP addresses in the order of the
//! wire. Everything is `repr(C)` without padding (bytemuck's derive refuses a
//! layout that has any), so that equal keys are equal bytes.
//!
//! | map | kind | key | value |
//! |---|---|---|---|
//! | `PORTS` | hash | ifindex | [`Port`] |
//! | `STATS` | per-CPU hash | ifindex, 0 for devices that are no ports | [`PortStats`] |
//! | `ENDPOINTS` | hash | [`MacKey`] | [`Endpoint`] |
//! | `NEIGHBORS` | hash | [`IpKey`] | [`Neighbor`] |
//! | `LEARNED` | LRU hash | [`MacKey`] | [`Learned`] |
//! | `LEARNED_PLACES` | LRU hash | [`PlaceKey`] | [`LearnedPlace`] |
//! | `SEGMENTS` | hash | segment | [`Segment`] |
//! | `MEMBERS` | hash | [`MemberKey`] | [`Member`] |
//! | `PROGRAMS` | program array | `PROGRAM_*` | the programs that others call |
//! | `PUBLISHED` | hash | [`PublishedKey`] | [`Published`] |
//! | `FLOWS` | LRU hash | [`FlowKey`] | [`Flow`] |
//! | `FRAGMENTS` | LRU hash | [`FragmentKey`] | [`Fragments`] |
//! | `HELD` | LRU hash | [`HeldKey`] | [`Held`] |
//! | `PLACES` | LRU hash | [`PlaceKey`] | [`Place`] |
//! | `ADDRESSES` | hash | an [`Address`] of the node | 1 ([`Present`]) |
//! | `PEERS` | LRU hash | [`PeerKey`] | [`Socket`] |
//! | `NODE` | array of one | 0 | [`Node`] |
//! | `XDP_UPLINKS` | hash | ifindex | the device's [`Mac`] |
//! | `MASQUERADED` | hash | [`PodKey`] | [`Masqueraded`] |
//! | `EXEMPT` | LPM trie | [`ExemptKey`] | one byte, 1 |
//! | `REPLIES` | LRU hash | [`ReplyKey`] | [`Reply`] |
//! | `UPLINKS` | hash | ifindex | [`Uplink`] |
//! | `USED` | array | a port of the node / 8 | for each of eight ports a byte of `USED_*` bits |
//! | `NEXT` | program array | `NEXT_*` | the programs that those of the second object call |
//!
//! From `PUBLISHED` on they belong to the second object, which is loaded when a
//! network needs it. IPv4 addresses are mapped into IPv6 (RFC 4291 §2.5.5.2) in all of
//! them, and ports are in host byte order.
//!
//! A *segment* is one L2 network of the node. Its number is the ifindex of its
//! gateway device (the one that carries the configured `bridge` name), which the
//! kernel keeps unique.

use bytemuck::{Pod, Zeroable};

use crate::drops::DropReason;

/// The version of everything by which programs of one build and another meet: the maps
/// in this module, the slots of the program arrays, what a program leaves in the control
/// buffer for the one that it calls, and the marks of packets. It is part of the pin path, so
/// that a plugin never reads a map of another layout.
///
/// Programs of several builds are in use side by side while an upgrade lasts. So whoever
/// changes any of these counts the version up; the plugin then carries over what maps of an
/// older layout have. It goes by the names of the fields, as the maps' type information (BTF)
/// has them: a field that gets another name is a new one, and begins as zero.
#[cfg(not(feature = "next-layout"))]
pub const ABI: u32 = 1;
/// The layout that the tests upgrade to. It has its changes for their sake: fields that came,
/// that went to another place, that became longer.
#[cfg(feature = "next-layout")]
pub const ABI: u32 = 2;

/// An Ethernet address, in the order of the wire.
pub type Mac = [u8; 6];

/// How many ports a node can have, gateway ports included.
pub const MAX_PORTS: u32 = 16_384;
/// How many MAC addresses can be assigned: one a port.
pub const MAX_ENDPOINTS: u32 = MAX_PORTS;
/// How many IP addresses can be assigned: four a port.
pub const MAX_NEIGHBORS: u32 = 4 * MAX_PORTS;
/// How many MAC addresses that nobody was assigned are remembered.
pub const MAX_LEARNED: u32 = 65_536;
/// How many segments a node can have.
pub const MAX_SEGMENTS: u32 = 1024;
/// How many ports one run of the flooding program serves, before it calls itself
/// again for the next ones.
pub const FLOOD_BATCH: u32 = 256;
/// How many ports a segment can have: the kernel allows 33 tail calls in a row
/// (`MAX_TAIL_CALL_CNT`), of which two go to the guard and the
/// responder.
pub const MAX_MEMBERS: u32 = 31 * FLOOD_BATCH;
/// How many ports can be published, each once for every address that it is
/// published on.
pub const MAX_PUBLISHED: u32 = 65_536;
/// How many flows are remembered, as pods see them.
pub const MAX_FLOWS: u32 = 131_072;
/// How many flows are remembered as others see them.
pub const MAX_REPLIES: u32 = 131_072;
/// How many addresses of pods can be masqueraded.
pub const MAX_MASQUERADED: u32 = MAX_NEIGHBORS;
/// How many destinations can be exempt from masquerade, once for every policy.
pub const MAX_EXEMPT: u32 = 16_384;
/// How many words are a byte for each port.
#[cfg(not(feature = "next-layout"))]
pub const USED_WORDS: u32 = 65_536 / 8;
/// How many words are a byte for each port, and one that is not used.
#[cfg(feature = "next-layout")]
pub const USED_WORDS: u32 = 65_536 / 8 + 1;
/// In the byte of a port: `REPLIES` has an entry for it, or had one.
pub const USED_NOTED: u8 = 1 << 0;
/// And one of a connection of a pod (TCP).
pub const USED_MASQUERADED: u8 = 1 << 1;
/// How many devices of the node can be uplinks.
pub const MAX_UPLINKS: u32 = 4096;
/// How many datagrams can arrive in fragments at once.
pub const MAX_FRAGMENTS: u32 = 4096;
/// How many fragments of one datagram can come before the first one: the longest
/// datagram in packets of 1,500 bytes.
pub const MAX_HELD: u16 = 45;
/// How many such fragments can wait at once, of all datagrams.
pub const MAX_HELD_TOTAL: u32 = 512;
/// The length in bytes, with the link's header, of the longest one that can wait.
pub const HELD_LEN: usize = 2048;
/// How many addresses the node can have.
pub const MAX_ADDRESSES: u32 = 4096;
/// How many devices XDP can serve published ports on.
pub const MAX_XDP_UPLINKS: u32 = 256;
/// How many sockets of the node can talk to published ports without a connection,
/// or ask for their peer's name.
pub const MAX_PEERS: u32 = 32_768;
/// One of so many parts of a table is what one pod can have of it, unless the node's
/// settings say otherwise.
pub const POD_SHARE: u32 = 4;
/// How many places can be taken of all shares together; more evict the oldest.
pub const MAX_PLACES: u32 = MAX_FLOWS + MAX_FRAGMENTS + MAX_HELD_TOTAL;
/// Whether `seen` is longer than `limit` before `now` (all in ns). What another CPU has
/// written since `now` was read is new, and what is of a time before the clock's beginning
/// is old: as the kernel's `time_after64`.
#[inline(always)]
pub const fn is_older(now: u64, seen: u64, limit: u64) -> bool {
    now.wrapping_sub(seen) as i64 > limit as i64
}

/// How long ago something must have been used to give its place to another, in ns, unless
/// all are used. (A flow that only hears is written half as often as it may be silent.)
pub const SPARED_NS: u64 = MASQUERADE_IDLE_NS / 2;
/// How old a flow may be before it is written again, and before it is asked again
/// whether what the client addresses is the node's, in ns.
pub const FLOW_REFRESH_NS: u64 = 500_000_000;
/// How long a flow must have been without a request before another one may take its
/// port if none is free, in ns: as long as Linux's connection tracking remembers a
/// closed connection (`nf_conntrack_tcp_timeout_time_wait`).
pub const FLOW_IDLE_NS: u64 = 120_000_000_000;
/// How long a masqueraded TCP connection must have been silent before another flow may
/// take its port if none is free, in ns (RFC 5382, REQ-5).
pub const CONNECTION_IDLE_NS: u64 = 7_440_000_000_000;
/// The same for all other flows, in ns (RFC 4787, REQ-5).
pub const MASQUERADE_IDLE_NS: u64 = 300_000_000_000;
/// And for connections that have ended: as long as Linux itself waits
/// (`TCP_TIMEWAIT_LEN`).
pub const ENDED_NS: u64 = 60_000_000_000;
/// How long fragments of one datagram may follow each other, in ns.
pub const FRAGMENT_NS: u64 = 5_000_000_000;
/// How long a learned address is believed without being seen, in ns: what
/// `ageing_time` of a Linux bridge is by default, 300 s.
pub const AGEING_NS: u64 = 300_000_000_000;
/// How old a learned entry may be before it is written again, in ns. Less often
/// would cost accuracy, more often a write per packet.
pub const REFRESH_NS: u64 = 1_000_000_000;

/// The slot of the program that floods.
pub const PROGRAM_FLOOD: u32 = 0;
/// The slot of the program that answers neighbour requests.
pub const PROGRAM_RESPONDER: u32 = 1;
/// The slot of the program for what pods send to the gateway. Empty until a port
/// is published.
pub const PROGRAM_FROM_POD: u32 = 2;
/// The slot of the program for what the host sends to pods. Empty until a network has a
/// gateway.
pub const PROGRAM_FROM_HOST: u32 = 3;
/// The slot of the program for what pods send each other past the host.
pub const PROGRAM_BETWEEN: u32 = 4;
/// The slot of the program that looks at what pods say of addresses.
pub const PROGRAM_GUARD: u32 = 5;
/// How many slots there are.
pub const PROGRAM_COUNT: u32 = 6;

/// The slot of `NEXT` of the program that sends masqueraded flows past the host's stack.
pub const NEXT_FORWARD: u32 = 0;
/// How many slots `NEXT` has.
pub const NEXT_COUNT: u32 = 1;

/// The port is the gateway port of its segment.
pub const PORT_GATEWAY: u32 = 1 << 0;
/// `hairpinMode`: what came from the port may go back to it.
pub const PORT_HAIRPIN: u32 = 1 << 1;
/// `macspoofchk`: only the assigned MAC address may be a source, and no IP address of
/// another port.
pub const PORT_MACSPOOFCHK: u32 = 1 << 2;
/// `portIsolation`: no traffic with other isolated ports.
pub const PORT_ISOLATED: u32 = 1 << 3;
/// `promiscMode`: the gateway device sees every frame that the port sends.
pub const PORT_PROMISC: u32 = 1 << 4;

/// The attachment has published ports.
pub const PORT_PUBLISHED: u32 = 1 << 5;
/// `ipMasq`: the programs masquerade what the attachment sends out of the node.
pub const PORT_MASQUERADED: u32 = 1 << 6;
/// The host's stack has brought the attachment a flow of its own segment: what a pod
/// asked of a ClusterIP, which kube-proxy led here. Answers must take the same way.
/// Only programs set it, and it stays.
pub const PORT_ROUTED: u32 = 1 << 7;
/// `netfilter` is `all`: what the attachment exchanges with other pods goes through the
/// host's stack.
pub const PORT_VIA_HOST: u32 = 1 << 8;
/// `netfilter` is `none`: what is masqueraded does not go through the host's stack.
pub const PORT_DIRECT: u32 = 1 << 9;
/// Of an entry of `NEIGHBORS`: duplicate address detection has not ended, so whoever has the
/// address may still say so.
pub const PORT_TENTATIVE: u32 = 1 << 10;
/// Of a gateway port: a pod of the segment has said of an address that nobody was assigned
/// that it is his. When it is assigned, others must be told. Only programs set it, and it
/// stays.
pub const PORT_CLAIMED: u32 = 1 << 11;

/// The pod's end of the veth takes what XDP redirects to it (its `NAPI` runs).
pub const PUBLISHED_XDP: u16 = 1 << 0;

/// A port of the switch: the host-side veth of an attachment, or the far end of
/// a gateway device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Port {
    /// The segment that the port belongs to.
    pub segment: u32,
    /// `PORT_*` bits.
    pub flags: u32,
    /// Not used.
    #[cfg(feature = "next-layout")]
    pub next: u32,
    /// The port's slot in `MEMBERS`. Only the plugin reads it.
    pub slot: u32,
    /// The MAC address that was assigned to what is behind the port.
    pub mac: Mac,
    /// Zero.
    pub reserved: [u8; 2],
}

/// What a port has received, and what became of it. One copy a CPU; the reader
/// adds them up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PortStats {
    /// Frames that were flooded to the segment.
    pub flooded: u64,
    /// Neighbour requests (ARP and IPv6) that were answered in place.
    pub answered: u64,
    /// Drops by [`DropReason`].
    #[cfg(not(feature = "next-layout"))]
    pub drops: [u64; DropReason::COUNT],
    /// Drops by [`DropReason`].
    #[cfg(feature = "next-layout")]
    pub drops: [u64; DropReason::COUNT + 2],
}

/// A MAC address in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct MacKey {
    /// The segment.
    pub segment: u32,
    /// The address.
    pub mac: Mac,
    /// Zero.
    pub reserved: [u8; 2],
}

impl MacKey {
    /// The key of `mac` in `segment`.
    pub const fn new(segment: u32, mac: Mac) -> Self {
        Self {
            segment,
            mac,
            reserved: [0; 2],
        }
    }
}

/// Where an assigned MAC address is. Never changed by a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Endpoint {
    /// The ifindex of its port.
    pub port: u32,
    /// The `PORT_*` bits of that port.
    pub flags: u32,
}

/// An IPv6 address, or an IPv4 address mapped into IPv6 (RFC 4291 §2.5.5.2).
///
/// It is kept as words: the programs copy and compare no single bytes, which the
/// instruction set makes as dear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct Address([u32; 4]);

impl Address {
    /// `::`
    pub const UNSPECIFIED: Self = Self([0; 4]);
    /// `0.0.0.0`
    pub const UNSPECIFIED_V4: Self = Self::v4([0; 4]);
    /// `::1`
    pub const LOOPBACK: Self = Self::v6([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    /// `127.0.0.1`
    pub const LOOPBACK_V4: Self = Self::v4([127, 0, 0, 1]);

    /// The third word of every mapped address.
    const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

    /// An IPv4 address.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self([0, 0, Self::MAPPED, u32::from_ne_bytes(octets)])
    }

    /// An IPv6 address.
    #[inline(always)]
    pub const fn v6(octets: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
        Self([
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ])
    }

    /// From words in the order of the wire.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// The words, in the order of the wire.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.0
    }

    /// The octets, in the order of the wire.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = self.0[0].to_ne_bytes();
        let [e, f, g, h] = self.0[1].to_ne_bytes();
        let [i, j, k, l] = self.0[2].to_ne_bytes();
        let [m, n, o, p] = self.0[3].to_ne_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    /// The octets of an IPv4 address.
    #[inline(always)]
    pub const fn octets_v4(&self) -> [u8; 4] {
        self.0[3].to_ne_bytes()
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == Self::MAPPED
    }

    /// Whether it is `::` or `0.0.0.0`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.0[0] == 0
            && self.0[1] == 0
            && (self.0[2] == 0 || self.0[2] == Self::MAPPED)
            && self.0[3] == 0
    }

    /// `::` or `0.0.0.0`, of the same family.
    #[inline(always)]
    pub const fn unspecified_like(&self) -> Self {
        let third = if self.is_v4() { Self::MAPPED } else { 0 };
        Self([0, 0, third, 0])
    }

    /// Whether it is one of its own machine: in `127.0.0.0/8`, or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let last = u32::from_be(self.0[3]);
        self.0[0] == 0
            && self.0[1] == 0
            && (self.0[2] == 0 && last == 1 || self.0[2] == Self::MAPPED && last >> 24 == 127)
    }

    /// Whether it is no single station's: multicast, or IPv4's class E and broadcast.
    #[inline(always)]
    pub const fn is_group(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 29 == 7
        } else {
            u32::from_be(self.0[0]) >> 24 == 0xff
        }
    }

    /// Whether it means something on its own link only (`fe80::/10`).
    #[inline(always)]
    pub const fn is_link_local(&self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0x3fa
    }
}

/// An IP address in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct IpKey {
    /// The segment.
    pub segment: u32,
    /// The IPv6 address, or the IPv4 address mapped into IPv6 (RFC 4291 §2.5.5.2).
    pub address: [u8; 16],
}

impl IpKey {
    /// The key of an IPv4 address in `segment`.
    pub const fn v4(segment: u32, address: [u8; 4]) -> Self {
        let [a, b, c, d] = address;
        Self {
            segment,
            address: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d],
        }
    }

    /// The key of an IPv6 address in `segment`.
    pub const fn v6(segment: u32, address: [u8; 16]) -> Self {
        Self { segment, address }
    }
}

/// Who has an assigned IP address: what the responder answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Neighbor {
    /// The ifindex of its port.
    pub port: u32,
    /// The `PORT_*` bits of that port.
    pub flags: u32,
    /// The MAC address.
    pub mac: Mac,
    /// Zero.
    pub reserved: [u8; 2],
}

/// Where a MAC address that nobody was assigned was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Learned {
    /// When, in ns of `CLOCK_MONOTONIC` (`bpf_ktime_get_ns`).
    pub seen: u64,
    /// The ifindex of the port.
    pub port: u32,
    /// Zero.
    pub reserved: u32,
}

/// A segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Segment {
    /// How many slots of `MEMBERS` are in use, from 0 on.
    pub members: u32,
    /// The ifindex of the gateway port (the far end of the gateway device).
    pub gateway_port: u32,
    /// `SEGMENT_*` bits.
    pub flags: u32,
}

/// The node is the segment's router (`isGateway`), and no pod is.
pub const SEGMENT_ROUTED: u32 = 1 << 0;

/// A slot in the list of a segment's ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct MemberKey {
    /// The segment.
    pub segment: u32,
    /// The slot: 0 is the gateway port.
    pub slot: u32,
}

/// A port that broadcast, multicast and unknown destinations are sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Member {
    /// The ifindex of the port.
    pub port: u32,
    /// Its `PORT_*` bits.
    pub flags: u32,
}

/// What clients address: a port of an address of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct PublishedKey {
    /// The address; the unspecified one of a family stands for all of the node's.
    pub address: Address,
    /// The port.
    pub port: u16,
    /// The protocol (`IPPROTO_TCP`, `_UDP`, `_SCTP`).
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// Who serves a published port: everything that a packet for it needs, in one
/// look-up.
///
/// A number is published either on all addresses of a family, or on some of them.
/// In the second case the entry of the unspecified address has `specific` set, and
/// nothing else: a look-up asks for it first, and for the address itself only then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Published {
    /// The pod's segment.
    #[cfg(feature = "next-layout")]
    pub segment: u32,
    /// The pod's address.
    pub address: Address,
    /// The gateway's address of this family, unspecified if it has none: what
    /// clients appear as whom the pod could not answer by way of the gateway.
    pub gateway: Address,
    /// The ifindex of the pod's host veth: the entry's owner.
    pub port: u32,
    /// The pod's segment.
    #[cfg(not(feature = "next-layout"))]
    pub segment: u32,
    /// How many addresses the number is published on, each with an entry of its
    /// own; 0 if this entry is itself one of a pod.
    pub specific: u32,
    /// The port that the pod listens on.
    pub pod_port: u16,
    /// The pod's MAC address.
    pub mac: Mac,
    /// The gateway's.
    pub gateway_mac: Mac,
    /// `PUBLISHED_*` bits.
    pub flags: u16,
}

/// That an address is in `ADDRESSES`.
#[cfg(not(feature = "next-layout"))]
pub type Present = u8;
/// That an address is in `ADDRESSES`.
#[cfg(feature = "next-layout")]
pub type Present = u32;

/// A flow as the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FlowKey {
    /// The ifindex of the pod's host veth: flows end with their pod.
    #[cfg(feature = "next-layout")]
    pub port: u32,
    /// The pod's address.
    pub pod: Address,
    /// The client's address.
    pub client: Address,
    /// The ifindex of the pod's host veth: flows end with their pod.
    #[cfg(not(feature = "next-layout"))]
    pub port: u32,
    /// The pod's port.
    pub pod_port: u16,
    /// The client's port.
    pub client_port: u16,
    /// The protocol.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// A flow as its client sees it: what a reply is made to be again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Flow {
    /// When a request was last seen, in ns of `CLOCK_MONOTONIC`, or a reply that leaves the
    /// node by the host's stack; not every packet writes it ([`FLOW_REFRESH_NS`]).
    pub seen: u64,
    /// Not used.
    #[cfg(feature = "next-layout")]
    pub next: u64,
    /// What the client addressed.
    pub original: Address,
    /// The client.
    pub client: Address,
    /// The port that the client addressed.
    pub original_port: u16,
    /// The client's port.
    pub client_port: u16,
    /// The ifindex of where requests come in: an uplink, or the host veth of
    /// another pod; 0 if the host's stack brings them, to which replies then go. If
    /// the flow is masqueraded, the uplink that it leaves by.
    pub from: u32,
    /// Where a client on the same link is: the request's source.
    pub client_mac: Mac,
    /// And its destination.
    pub gateway_mac: Mac,
    /// `FLOW_*` bits.
    pub flags: u32,
}

/// The pod has begun the flow, and is masqueraded as [`Flow::original`]; the client is
/// whom it asked.
pub const FLOW_MASQUERADED: u32 = 1 << 0;
/// Neither direction of the flow passes the host's stack, although it is masqueraded.
pub const FLOW_DIRECT: u32 = 1 << 1;

/// An address of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct PodKey {
    /// The address.
    pub address: Address,
    /// The segment in which it was assigned.
    pub segment: u32,
}

/// A pod that is masqueraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Masqueraded {
    /// The policy whose exemptions count, see [`ExemptKey`].
    pub policy: u64,
    /// The ifindex of the pod's host veth: the entry's owner.
    pub port: u32,
    /// Zero.
    pub reserved: u32,
}

/// What an exempt destination is looked up by, behind the length of the prefix in bits
/// (`struct bpf_lpm_trie_key`): 64 for the policy, then those of the destination, 96
/// more for an IPv4 one.
///
/// A policy is a list of exempt prefixes; its number is a hash of them. So it never
/// changes, and networks with the same list share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct ExemptKey {
    /// The policy's number in the order of the wire, but for its last bit, which says
    /// that the destination is an IPv4 one: a prefix of all IPv6 would have those in it.
    pub policy: [u32; 2],
    /// The destination.
    pub destination: Address,
}

impl ExemptKey {
    /// The key of `destination` in a policy.
    #[inline(always)]
    pub const fn new(policy: u64, destination: Address) -> Self {
        let family = destination.is_v4() as u64;
        let number = policy & !1 | family;
        Self {
            policy: [((number >> 32) as u32).to_be(), (number as u32).to_be()],
            destination,
        }
    }
}

/// A flow that others see, by what they answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct ReplyKey {
    /// Who answers.
    pub remote: Address,
    /// Whom: an address of the node, or of a pod that is not masqueraded.
    pub local: Address,
    /// The port that answers; 0 where the protocol has none.
    pub remote_port: u16,
    /// The port that is answered, or the number of an ICMP query.
    pub local_port: u16,
    /// The protocol.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Who has begun a flow that others see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Reply {
    /// When a packet of the flow was last seen to leave, in ns of `CLOCK_MONOTONIC`; not
    /// every packet writes it ([`FLOW_REFRESH_NS`]), and answers only before it is idle.
    pub seen: u64,
    /// The pod, or the node if it is the node's own flow or one that netfilter
    /// translates.
    pub address: Address,
    /// The ifindex of the pod's host veth; 0 if replies are the host's stack's affair.
    pub port: u32,
    /// The port that the flow has behind the translation.
    pub inner_port: u16,
    /// `REPLY_*` bits.
    pub flags: u16,
}

/// One side has said that the connection ends (TCP).
pub const REPLY_ENDED: u16 = 1 << 0;
/// As [`FLOW_DIRECT`].
pub const REPLY_DIRECT: u16 = 1 << 1;

/// A device by which packets leave the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Uplink {
    /// As whom pods appear outside of it, if the kernel cannot be asked (before 6.7);
    /// unspecified without such an address.
    pub v4: Address,
    /// The same in IPv6.
    pub v6: Address,
}

/// A datagram that arrives in fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FragmentKey {
    /// Its source.
    pub source: Address,
    /// Its destination.
    pub destination: Address,
    /// Its identification: 16 bits in IPv4, 32 in IPv6.
    pub id: u32,
    /// The ifindex of the port that it comes from, 0 for uplinks.
    pub port: u32,
    /// The protocol, 0 in IPv6: there only the first fragment says it.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// A fragment that came before the first one of its datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct HeldKey {
    /// The datagram.
    pub datagram: FragmentKey,
    /// The fragment's number, in the order of arrival from 0 on.
    pub number: u32,
}

/// A whole frame that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Held {
    /// Its length in bytes.
    pub length: u32,
    /// The frame, and what was there before.
    pub frame: [u8; HELD_LEN],
}

/// A place in the share that an owner has of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct PlaceKey {
    /// The ifindex of a pod's host veth; of a gateway device for what netfilter translates;
    /// 0 for what comes from outside, and for the node itself.
    pub owner: u32,
    /// Which table: `PLACES_*`.
    pub table: u32,
    /// The place's number, or [`PLACE_HAND`].
    pub number: u32,
}

/// The number of the entry that says, in its first word, which place was taken last.
pub const PLACE_HAND: u32 = u32::MAX;
/// Of `FLOWS`, and what belongs to them of `REPLIES`.
pub const PLACES_FLOWS: u32 = 0;
/// Of `REPLIES`, without a flow of a pod.
pub const PLACES_REPLIES: u32 = 1;
/// Of `FRAGMENTS`.
pub const PLACES_FRAGMENTS: u32 = 2;
/// Of `HELD`.
pub const PLACES_HELD: u32 = 3;
/// Of `LEARNED`, in a map of their own.
pub const PLACES_LEARNED: u32 = 4;

/// What has a place: the key of an entry of its table, from the first word on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Place {
    /// The key's words.
    pub entry: [u32; 12],
}

/// What has a place of `LEARNED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LearnedPlace {
    /// The key's words.
    pub entry: [u32; 3],
}

/// What the first fragment said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Fragments {
    /// When, in ns of `CLOCK_MONOTONIC`.
    pub seen: u64,
    /// The source port.
    pub source_port: u16,
    /// The destination port.
    pub destination_port: u16,
    /// How many fragments came before the first one and wait for it.
    pub held: u16,
    /// The protocol; 0 until the first one has come.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// A socket of the node, and whom it talks to in truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct PeerKey {
    /// The socket's cookie (`SO_COOKIE`).
    pub cookie: u64,
    /// The pod.
    pub peer: Socket,
    /// Zero.
    pub reserved: u32,
}

/// An address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Socket {
    /// The address.
    pub address: Address,
    /// The port.
    pub port: u32,
}

/// What the programs must know of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Node {
    /// The cookie of the node's network namespace (`SO_NETNS_COOKIE`), 0 for the
    /// machine's first: sockets of other namespaces are left alone.
    pub netns: u64,
}
