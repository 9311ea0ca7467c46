//! What a pod with published ports answers: undone, and sent where the request came
//! from.

use aya_ebpf::programs::TcContext;
use bpf_bridge_common::{
    checksum,
    drops::DropReason,
    layout::{FLOW_DIRECT, FLOW_MASQUERADED, Flow},
    packet::{IPPROTO_TCP, Packet as _, Parsed, Tuple, Version},
};

use crate::{
    fib::{self, Question, Way},
    maps::FLOWS,
    shared::{PORTS, set_mark, to_host},
    skb::{OURS, Skb},
    work::{Outcome, Work, apart},
};

/// "Don't fragment", in the byte that it is in.
const DF: u8 = 0x40;

/// Sends a reply to where its request came from.
#[inline(always)]
pub(crate) fn undo(ctx: &TcContext, work: &mut Work) -> Outcome {
    apart(|| try_undo(ctx, work))
}

#[inline(always)]
fn try_undo(ctx: &TcContext, work: &mut Work) -> Outcome {
    let tuple = &work.parsed.tuple;
    let key = &mut work.key;
    key.pod = tuple.source;
    key.pod_port = tuple.source_port;
    key.client = tuple.destination;
    key.client_port = tuple.destination_port;
    key.port = work.from.ifindex;
    key.protocol = work.parsed.protocol;
    key.reserved = [0; 3];
    // SAFETY: an entry that is evicted meanwhile is memory of the map still.
    let flow = unsafe { FLOWS.get(&*key) }?;
    if flow.flags & FLOW_MASQUERADED != 0 {
        return (flow.flags & FLOW_DIRECT == 0).then_some(Ok(to_host(work.from.segment)));
    }
    work.account = work.from.ifindex;
    work.to.source = flow.original;
    work.to.source_port = flow.original_port;
    work.to.destination = flow.client;
    work.to.destination_port = flow.client_port;
    let length = wire_length(Skb(ctx), &work.parsed);
    Some(match choose(ctx, flow, &work.to, &question(work, length)) {
        Back::TOO_BIG => refuse(Skb(ctx), &work.parsed, work.from.segment),
        Back::NOWHERE => Err(DropReason::NoRoute),
        back => {
            work.back = back;
            if work.rewrite(ctx) {
                go(Skb(ctx), work, flow)
            } else {
                Err(DropReason::Helper)
            }
        }
    })
}

/// Sends an error about a request to the client.
#[inline(always)]
pub(crate) fn undo_error(ctx: &TcContext, work: &mut Work) -> Outcome {
    apart(|| try_undo_error(ctx, work))
}

#[inline(always)]
fn try_undo_error(ctx: &TcContext, work: &mut Work) -> Outcome {
    let request = &work.inner.tuple;
    let key = &mut work.key;
    key.pod = request.destination;
    key.pod_port = request.destination_port;
    key.client = request.source;
    key.client_port = request.source_port;
    key.port = work.from.ifindex;
    key.protocol = work.inner.protocol;
    key.reserved = [0; 3];
    // SAFETY: as in `undo`.
    let flow = unsafe { FLOWS.get(&*key) }?;
    if flow.flags & FLOW_MASQUERADED != 0 {
        return Some(Ok(to_host(work.from.segment)));
    }
    work.account = work.from.ifindex;
    work.to.source = flow.client;
    work.to.source_port = flow.client_port;
    work.to.destination = flow.original;
    work.to.destination_port = flow.original_port;
    work.outer.source = flow.original;
    work.outer.source_port = 0;
    work.outer.destination = flow.client;
    work.outer.destination_port = 0;
    Some(match choose(ctx, flow, &work.outer, &question(work, 0)) {
        Back::TOO_BIG => Err(DropReason::Helper),
        Back::NOWHERE => Err(DropReason::NoRoute),
        back => {
            work.back = back;
            if work.rewrite_error(ctx) {
                go(Skb(ctx), work, flow)
            } else {
                Err(DropReason::Helper)
            }
        }
    })
}

/// Where a reply goes: a verdict, or one of these.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Back(u64);

impl Back {
    /// To the host's stack, which brought the request, on the gateway device.
    const STACK: Self = Self(1 << 32);
    /// Into the pod that asked.
    const POD: Self = Self(2 << 32);
    /// It is too long for the way.
    const TOO_BIG: Self = Self(3 << 32);
    /// There is no way.
    const NOWHERE: Self = Self(4 << 32);

    /// Out of the node, by this verdict.
    #[inline(always)]
    fn out(verdict: i32) -> Self {
        Self(u64::from(verdict as u32))
    }
}

/// Sends the packet, which is what it is to become, on the way that `work.back` says.
///
/// It is read from there for the verifier of Linux 6.1: of a way that it knew before the
/// packet was rewritten it forgets that it matters, and takes the code for another way that
/// comes to the same place later for dead.
#[inline(always)]
fn go(skb: Skb<'_>, work: &Work, flow: &Flow) -> Result<i32, DropReason> {
    // SAFETY: a reference is valid and aligned. The compiler knows what was stored there,
    // but the verifier is not to.
    let back = unsafe { (&raw const work.back).read_volatile() };
    match back {
        Back::STACK => Ok(to_host(work.from.segment)),
        Back::POD => skb.into_pod(flow.from, flow.client_mac, flow.gateway_mac),
        Back(verdict) => {
            set_mark(skb.0, OURS);
            Ok(verdict as i32)
        }
    }
}

/// What is asked about the way of a packet of this length.
#[inline(always)]
fn question(work: &Work, length: u16) -> Question {
    Question {
        protocol: work.parsed.protocol,
        length,
        device: work.from.segment,
    }
}

/// The way back.
#[inline(always)]
fn choose(ctx: &TcContext, flow: &Flow, to: &Tuple, question: &Question) -> Back {
    if flow.from == 0 {
        return Back::STACK;
    }
    if PORTS.get_ptr(flow.from).is_some() {
        return Back::POD;
    }
    let way = if to.destination.is_link_local() {
        fib::send_on_link(flow.from, &to.destination)
    } else {
        fib::send(ctx, to, question)
    };
    match way {
        Way::Out(verdict) => Back::out(verdict),
        Way::TooBig => Back::TOO_BIG,
        Way::None => Back::NOWHERE,
    }
}

/// A packet that is too long for its way goes to the host's stack as the pod has sent
/// it: the stack finds the same, and tells the pod in its own words.
#[inline(always)]
pub(crate) fn refuse(skb: Skb<'_>, parsed: &Parsed, segment: u32) -> Result<i32, DropReason> {
    if parsed.version == Version::V4 {
        // Or it would be fragmented, and leave under the pod's own address.
        let mut frame = skb;
        let at = usize::from(parsed.l3) + 6;
        let old: [u8; 2] = frame.load(at).ok_or(DropReason::Helper)?;
        let new = [old[0] | DF, old[1]];
        if new[0] != old[0] {
            frame.store(at, new).ok_or(DropReason::Helper)?;
            frame
                .fix_header_checksum(usize::from(parsed.l3) + 10, checksum::diff(old, new))
                .ok_or(DropReason::Helper)?;
        }
    }
    Ok(to_host(segment))
}

/// The length in bytes, from the IP header on, of the longest packet that the frame
/// becomes on the wire; 0 if the headers do not say it.
#[inline(always)]
pub(crate) fn wire_length(skb: Skb<'_>, parsed: &Parsed) -> u16 {
    let segment = skb.segment_size();
    if segment == 0 {
        return parsed.length;
    }
    let transport = if parsed.protocol == IPPROTO_TCP {
        match skb.load::<1>(usize::from(parsed.l4) + 12) {
            Some([offset]) => u16::from(offset >> 4) * 4,
            None => return 0,
        }
    } else {
        8
    };
    (parsed.l4.wrapping_sub(parsed.l3))
        .wrapping_add(transport)
        .wrapping_add(segment as u16)
}
