//! What the host's stack sends to a pod with published ports: connections of the node's
//! own processes, routed ones from outside, kube-proxy's. They are remembered as the
//! stack's, so that the pod's replies go back to it; and if a client already speaks to
//! the pod by a published port, from the same address and port, the pod is shown another
//! port.

use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use bpf_bridge_common::{
    drops::DropReason,
    frame::ETH_HLEN,
    layout::Published,
    packet::{Parsed, Tuple, parse, quoted},
    translate::{rewrite, rewrite_quoted},
};

use crate::{
    flow::{self, Found, From, Request},
    fragments,
    shared::{count_drop, ifindex, skb},
    skb::Skb,
};

/// Requests of the stack: where replies go back to it.
const STACK: From = From { ifindex: 0, client_mac: [0; 6], gateway_mac: [0; 6] };

/// The program that `port` goes on with. It has left the ifindex of the pod's host veth
/// in the control buffer.
#[classifier]
pub(crate) fn from_host(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for as long as the program runs.
    let port = unsafe { (*skb(&ctx)).cb[0] };
    let frame = Skb(&ctx);
    let shown = remember(&ctx, frame, port).unwrap_or(Ok(()));
    match shown.and_then(|()| frame.deliver(port)) {
        Ok(verdict) => verdict,
        Err(reason) => {
            count_drop(port, reason);
            TC_ACT_SHOT
        }
    }
}

/// The pod as the packet addresses it: nothing is translated.
#[inline(always)]
fn itself(address: &[u8; 16], pod_port: u16, port: u32) -> Published {
    Published {
        address: *address,
        gateway: [0; 16],
        port,
        segment: 0,
        specific: 0,
        pod_port,
        mac: [0; 6],
        gateway_mac: [0; 6],
        reserved: [0; 2],
    }
}

/// `None` if there is nothing to remember.
#[inline(always)]
fn remember(ctx: &TcContext, skb: Skb<'_>, port: u32) -> Option<Result<(), DropReason>> {
    if skb.is_tagged() {
        return None;
    }
    let mut parsed = parse(&skb, ETH_HLEN, skb.ethertype())?;
    if parsed.is_icmp() {
        return show_error(skb, &parsed, port);
    }
    if !parsed.has_ports() || !fragments::complete(&mut parsed, ifindex(ctx)) {
        return None;
    }
    let tuple = &parsed.tuple;
    let pod = itself(&tuple.destination, tuple.destination_port, port);
    let request = Request {
        client: &tuple.source,
        client_port: tuple.source_port,
        seen_as: &tuple.source,
        original: &tuple.destination,
        original_port: tuple.destination_port,
        protocol: parsed.protocol,
    };
    let source_port = match flow::find(&pod, &request, &STACK) {
        Found::Known(port) => port,
        Found::Free(port) if flow::make(&pod, &request, &STACK, port) => port,
        Found::Free(_) | Found::Full => return Some(Err(DropReason::NoSourcePort)),
    };
    if source_port == tuple.source_port {
        return None;
    }
    let to = Tuple { source_port, ..*tuple };
    let mut frame = skb;
    Some(rewrite(&mut frame, &parsed, &to).ok_or(DropReason::Helper))
}

/// An error about what the pod has sent: it must name the port that the pod was shown.
#[inline(always)]
fn show_error(skb: Skb<'_>, parsed: &Parsed, port: u32) -> Option<Result<(), DropReason>> {
    let inner = quoted(&skb, parsed)?;
    let reply = &inner.tuple;
    let pod = itself(&reply.source, reply.source_port, port);
    let request = Request {
        client: &reply.destination,
        client_port: reply.destination_port,
        seen_as: &reply.destination,
        original: &reply.source,
        original_port: reply.source_port,
        protocol: inner.protocol,
    };
    let destination_port = request.known(&pod)?;
    if destination_port == reply.destination_port {
        return None;
    }
    let to = Tuple { destination_port, ..*reply };
    let mut frame = skb;
    let outer = &parsed.tuple;
    let rewritten =
        rewrite_quoted(&mut frame, parsed, &inner, &outer.source, &outer.destination, &to);
    Some(rewritten.ok_or(DropReason::Helper))
}
