//! What a pod sends to the gateway, once a port is published on the node: replies of
//! published ports, requests to them, and all else, which goes to the host's stack.

use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use bpf_bridge_common::{
    frame::ETH_HLEN,
    layout::{PORT_PUBLISHED, Port},
    packet::parse,
};

use crate::{
    flow::From,
    fragments, reply,
    request::{self, Outcome},
    shared::{PORTS, count_drop, ifindex, to_host},
    skb::Skb,
};

/// The program that `port` goes on with.
#[classifier]
pub(crate) fn from_pod(ctx: TcContext) -> i32 {
    let ifindex = ifindex(&ctx);
    // SAFETY: the plugin replaces entries of this map whole.
    let Some(port) = (unsafe { PORTS.get(ifindex) }) else {
        return TC_ACT_SHOT;
    };
    match translate(&ctx, ifindex, port) {
        Some(Ok(verdict)) => verdict,
        Some(Err((port, reason))) => {
            count_drop(port, reason);
            TC_ACT_SHOT
        }
        None => to_host(port.segment),
    }
}

#[inline(always)]
fn translate(ctx: &TcContext, ifindex: u32, port: &Port) -> Outcome {
    let skb = Skb(ctx);
    if skb.is_tagged() {
        return None;
    }
    let mut parsed = parse(&skb, ETH_HLEN, skb.ethertype())?;
    let publishes = port.flags & PORT_PUBLISHED != 0;
    if parsed.is_icmp() {
        if publishes && let Some(done) = reply::undo_error(skb, &parsed, ifindex, port) {
            return Some(done);
        }
        return request::lead_error(skb, &parsed, port.segment, true);
    }
    if !parsed.has_ports() || !fragments::complete(&mut parsed, ifindex) {
        return None;
    }
    if publishes && let Some(done) = reply::undo(skb, &parsed, ifindex, port) {
        return Some(done);
    }
    let (client_mac, gateway_mac) = request::macs(skb)?;
    let from = From { ifindex, client_mac, gateway_mac };
    request::lead(skb, &parsed, &from, port.segment, true)
}
