//! What the node has begun itself: answers to that come to a port that may be published
//! as well, if it is one of those that the node takes for its own connections.
//!
//! netfilter's DNAT looks at the first packet of a connection only, and so never meets
//! these. Here every packet is looked at, but only one that nobody knows comes this far.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_tuple,
    helpers::{bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release},
    programs::TcContext,
};
use bpf_bridge_common::packet::{IPPROTO_TCP, IPPROTO_UDP, Packet as _, Parsed, Tuple};

use crate::skb::Skb;

/// TCP's flags, in the byte that they are in.
const SYN: u8 = 1 << 1;
const ACK: u8 = 1 << 4;
/// `BPF_F_CURRENT_NETNS`: the namespace of the device.
const THIS_NETNS: u64 = -1i64 as u64;
/// What the lookups take as the lengths of an IPv4 and an IPv6 tuple.
const V4_LEN: u32 = 12;
const V6_LEN: u32 = 36;

/// What a packet says of the connection that it belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Its sender begins it (TCP).
    Begins,
    /// Its receiver has begun it (TCP).
    Answers,
    /// Nothing.
    Other,
}

#[inline(always)]
pub(crate) fn step(ctx: &TcContext, parsed: &Parsed) -> Step {
    if parsed.protocol != IPPROTO_TCP || !parsed.has_ports() {
        return Step::Other;
    }
    match Skb(ctx).load(usize::from(parsed.l4) + 13) {
        Some([flags]) if flags & (SYN | ACK) == SYN => Step::Begins,
        Some([flags]) if flags & (SYN | ACK) == SYN | ACK => Step::Answers,
        _ => Step::Other,
    }
}

/// Whether a socket of the node is connected to the packet's sender.
#[inline(never)]
pub(crate) fn is_nodes(ctx: &TcContext, tuple: &Tuple, protocol: u8) -> bool {
    // SAFETY: the structure is made of numbers.
    let mut wanted: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let (from, to) = (tuple.source.words(), tuple.destination.words());
    let (sport, dport) = (tuple.source_port.to_be(), tuple.destination_port.to_be());
    let length = if tuple.destination.is_v4() {
        let v4 = &mut wanted.__bindgen_anon_1;
        v4.ipv4.saddr = from[3];
        v4.ipv4.daddr = to[3];
        v4.ipv4.sport = sport;
        v4.ipv4.dport = dport;
        V4_LEN
    } else {
        let v6 = &mut wanted.__bindgen_anon_1;
        v6.ipv6.saddr = from;
        v6.ipv6.daddr = to;
        v6.ipv6.sport = sport;
        v6.ipv6.dport = dport;
        V6_LEN
    };
    // SAFETY: the tuple is of the length that is given with it; the socket is given
    // back before the program ends.
    unsafe {
        let socket = match protocol {
            IPPROTO_TCP => bpf_sk_lookup_tcp(ctx.as_ptr(), &mut wanted, length, THIS_NETNS, 0),
            IPPROTO_UDP => bpf_sk_lookup_udp(ctx.as_ptr(), &mut wanted, length, THIS_NETNS, 0),
            _ => return false,
        };
        if socket.is_null() {
            return false;
        }
        // One that only waits has no other side.
        let connected = (*socket).dst_port != 0;
        bpf_sk_release(socket.cast());
        connected
    }
}
