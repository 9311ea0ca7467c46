//! What a pod sends to the gateway, once a port is published on the node: replies of
//! published ports, requests to them, and all else, which goes to the host's stack, or
//! out of the node if the pod's flows do not pass the stack.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};
use bpf_bridge_common::{
    frame::ETH_HLEN,
    layout::{NEXT_FORWARD, PORT_DIRECT, PORT_PUBLISHED},
};

use crate::{
    fragments::{self, Standing},
    maps::NEXT,
    reply, request,
    shared::{FLAGS, SEGMENT, count_drop, ifindex, skb, to_host},
    skb::Skb,
    work::{From, Outcome, Work},
};

/// The program that `port` goes on with.
#[classifier]
pub(crate) fn from_pod(ctx: TcContext) -> i32 {
    let ifindex = ifindex(&ctx);
    // SAFETY: the context is valid for as long as the program runs.
    let cb = unsafe { &(*skb(&ctx)).cb };
    let (segment, flags) = (cb[SEGMENT], cb[FLAGS]);
    let Some(work) = Work::get() else {
        return to_host(segment);
    };
    work.from = From {
        ifindex,
        segment,
        client_mac: [0; 6],
        gateway_mac: [0; 6],
        linked: true,
        again: BPF_F_INGRESS,
    };
    match translate(&ctx, work, flags) {
        Some(Ok(verdict)) => verdict,
        Some(Err(reason)) => {
            count_drop(work.account, reason);
            TC_ACT_SHOT
        }
        None => to_host(segment),
    }
}

#[inline(always)]
fn translate(ctx: &TcContext, work: &mut Work, flags: u32) -> Outcome {
    if Skb(ctx).is_tagged() || !work.read_received(ctx, ETH_HLEN) {
        return None;
    }
    let publishes = flags & PORT_PUBLISHED != 0;
    let hold = publishes || flags & PORT_DIRECT != 0;
    match fragments::complete(ctx, work, work.from.ifindex, hold) {
        Standing::Known => {}
        Standing::Unknown => return None,
        Standing::Done => return Some(Ok(TC_ACT_SHOT)),
    }
    if work.parsed.is_icmp() && work.read_error(ctx) {
        if publishes && let Some(done) = reply::undo_error(ctx, work) {
            return Some(done);
        }
        return request::lead_error(ctx, work);
    }
    if work.parsed.is_transport() {
        if publishes && let Some(done) = reply::undo(ctx, work) {
            return Some(done);
        }
        if let Some(done) = request::lead(ctx, work) {
            return Some(done);
        }
    }
    if flags & PORT_DIRECT != 0 {
        // SAFETY: the program that is called takes the same context.
        unsafe { NEXT.tail_call(ctx, NEXT_FORWARD) };
    }
    None
}
