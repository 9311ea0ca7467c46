//! tc ingress of the devices by which others reach the node: requests for published
//! ports go into their pods, everything else goes on as if no program were here.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use bpf_bridge_common::{frame::ETH_HLEN, packet::parse};

use crate::{
    flow::From,
    fragments,
    request::{self, Outcome},
    shared::{count_drop, ifindex},
    skb::Skb,
};

/// The program of uplinks with Ethernet headers.
#[classifier]
pub(crate) fn uplink(ctx: TcContext) -> i32 {
    receive(&ctx, ETH_HLEN)
}

/// The program of uplinks without: tunnels.
#[classifier]
pub(crate) fn uplink_l3(ctx: TcContext) -> i32 {
    receive(&ctx, 0)
}

#[inline(always)]
fn receive(ctx: &TcContext, l3: usize) -> i32 {
    match lead(ctx, l3) {
        Some(Ok(verdict)) => verdict,
        Some(Err((port, reason))) => {
            count_drop(port, reason);
            TC_ACT_SHOT
        }
        // Other programs of this hook run, and then the stack.
        None => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn lead(ctx: &TcContext, l3: usize) -> Outcome {
    let skb = Skb(ctx);
    if !skb.is_for_this_host() || skb.is_tagged() {
        return None;
    }
    let mut parsed = parse(&skb, l3, skb.ethertype())?;
    let linked = l3 != 0;
    if parsed.is_icmp() {
        return request::lead_error(skb, &parsed, 0, linked);
    }
    if !parsed.has_ports() || !fragments::complete(&mut parsed, 0) {
        return None;
    }
    let (client_mac, gateway_mac) = if linked { request::macs(skb)? } else { ([0; 6], [0; 6]) };
    let from = From { ifindex: ifindex(ctx), client_mac, gateway_mac };
    request::lead(skb, &parsed, &from, 0, linked)
}
