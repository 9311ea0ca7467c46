//! Connections of the node's own processes: their packets are not for pods, whatever
//! number the processes speak from.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_ANY, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as TupleV4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as TupleV6,
    },
    helpers::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp},
};
use bpf_bridge_common::{
    layout::{Address, Flow, FlowKey, PublishedKey, Socket},
    packet::{IPPROTO_TCP, IPPROTO_UDP, Packet, Parsed, Tuple},
};

use crate::maps::{FLOWS, PUBLISHED};

/// States of `net/tcp_states.h`; a connected UDP socket is established.
const ESTABLISHED: u32 = 1;
const TIME_WAIT: u32 = 6;
const LISTEN: u32 = 10;
/// `BPF_F_CURRENT_NETNS` of `linux/bpf.h`.
const CURRENT_NETNS: u64 = u64::MAX;

/// The key of what a socket of the node asks without a connection, as the answer to it
/// says it. No pod has port 0.
#[inline(always)]
fn key(answer: &Tuple) -> FlowKey {
    FlowKey {
        pod: Address::UNSPECIFIED,
        client: answer.source,
        port: 0,
        pod_port: answer.destination_port,
        client_port: answer.source_port,
        protocol: IPPROTO_UDP,
        reserved: [0; 3],
    }
}

/// Remembers that a socket of the node, which speaks from `port`, asks somebody
/// without a connection, if that number is published.
#[inline(always)]
pub(crate) fn remember(asked: &Socket, port: u16) {
    let published = PublishedKey {
        address: asked.address.unspecified_like(),
        port,
        protocol: IPPROTO_UDP,
        reserved: 0,
    };
    if PUBLISHED.get_ptr(&published).is_none() {
        return;
    }
    let answer = Tuple {
        source: asked.address,
        destination: Address::UNSPECIFIED,
        source_port: asked.port as u16,
        destination_port: port,
    };
    let flow = Flow {
        seen: 0,
        #[cfg(feature = "next-layout")]
        next: 0,
        original: Address::UNSPECIFIED,
        client: asked.address,
        original_port: port,
        client_port: asked.port as u16,
        from: 0,
        client_mac: [0; 6],
        gateway_mac: [0; 6],
        flags: 0,
    };
    let _ = FLOWS.insert(&key(&answer), &flow, u64::from(BPF_ANY));
}

/// TCP's flags, in the byte that they are in.
const FIN: u8 = 1 << 0;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;

/// What a packet says of the connection that it belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Its sender begins it (TCP).
    Begins,
    /// Its receiver has begun it (TCP).
    Answers,
    /// Its sender ends it (TCP).
    Ends,
    /// Nothing.
    Other,
}

/// Reads the packet's part in its connection.
#[inline(always)]
pub(crate) fn step(packet: &impl Packet, parsed: &Parsed) -> Step {
    if parsed.protocol != IPPROTO_TCP || !parsed.has_ports() {
        return Step::Other;
    }
    match packet.load(usize::from(parsed.l4) + 12) {
        Some([_, flags]) if flags & (FIN | RST) != 0 => Step::Ends,
        Some([_, flags]) if flags & (SYN | ACK) == SYN => Step::Begins,
        Some([_, flags]) if flags & (SYN | ACK) == SYN | ACK => Step::Answers,
        _ => Step::Other,
    }
}

/// Whether the packet says that there is no connection like that of the segment that it
/// answers (RFC 9293 §3.5.2, group 1: that one had an acknowledgement, so this has none).
#[inline(always)]
pub(crate) fn is_denial(packet: &impl Packet, parsed: &Parsed) -> bool {
    parsed.protocol == IPPROTO_TCP
        && matches!(
            packet.load(usize::from(parsed.l4) + 12),
            Some([_, flags]) if flags & (RST | ACK) == RST
        )
}

/// Whether the packet belongs to a connection of the node's own.
///
/// `ctx` is that of a tc or an XDP program.
#[inline(always)]
pub(crate) fn is_own(ctx: *mut c_void, packet: &Tuple, protocol: u8) -> bool {
    if protocol == IPPROTO_UDP && FLOWS.get_ptr(&key(packet)).is_some() {
        return true;
    }
    match socket(ctx, packet, protocol) {
        // Whoever listens has no connection yet, or had one.
        LISTEN | TIME_WAIT if protocol == IPPROTO_TCP => false,
        0 => false,
        state => protocol == IPPROTO_TCP || state == ESTABLISHED,
    }
}

/// Whether any socket of the node would get the packet.
#[inline(always)]
pub(crate) fn is_heard(ctx: *mut c_void, packet: &Tuple, protocol: u8) -> bool {
    socket(ctx, packet, protocol) != 0
}

/// The state of the node's socket that would get the packet, 0 if there is none.
#[inline(never)]
fn socket(ctx: *mut c_void, packet: &Tuple, protocol: u8) -> u32 {
    // SAFETY: the structure is made of numbers.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let (source, destination) = (packet.source.words(), packet.destination.words());
    let (sport, dport) = (packet.source_port.to_be(), packet.destination_port.to_be());
    let size = if packet.destination.is_v4() {
        tuple.__bindgen_anon_1.ipv4 = TupleV4 {
            saddr: source[3],
            daddr: destination[3],
            sport,
            dport,
        };
        size_of::<TupleV4>()
    } else {
        tuple.__bindgen_anon_1.ipv6 = TupleV6 {
            saddr: source,
            daddr: destination,
            sport,
            dport,
        };
        size_of::<TupleV6>()
    } as u32;
    match protocol {
        IPPROTO_TCP => tcp(ctx, &mut tuple, size),
        IPPROTO_UDP => udp(ctx, &mut tuple, size),
        _ => 0,
    }
}

// Two functions: the verifier refuses an instruction that reads either kind of socket.

#[inline(never)]
fn tcp(ctx: *mut c_void, tuple: &mut bpf_sock_tuple, size: u32) -> u32 {
    // SAFETY: the structure is at least as long as what is given with it, and the
    // socket that is found is released.
    unsafe {
        let socket = bpf_skc_lookup_tcp(ctx, tuple, size, CURRENT_NETNS, 0);
        if socket.is_null() {
            return 0;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        state
    }
}

#[inline(never)]
fn udp(ctx: *mut c_void, tuple: &mut bpf_sock_tuple, size: u32) -> u32 {
    // SAFETY: as above.
    unsafe {
        let socket = bpf_sk_lookup_udp(ctx, tuple, size, CURRENT_NETNS, 0);
        if socket.is_null() {
            return 0;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        state
    }
}
