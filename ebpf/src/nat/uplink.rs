//! tc ingress of the devices by which others reach the node: requests for published
//! ports go into their pods, everything else goes on as if no program were here.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use bpf_bridge_common::frame::ETH_HLEN;

use crate::{
    fragments::{self, Standing},
    request,
    shared::{count_drop, ifindex},
    skb::Skb,
    work::{From, Outcome, Work},
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
    let skb = Skb(ctx);
    if !skb.is_for_this_host() || skb.is_tagged() || l3 != 0 && skb.restore_link_header().is_none()
    {
        return TC_ACT_UNSPEC;
    }
    let Some(work) = Work::get() else {
        return TC_ACT_UNSPEC;
    };
    work.from = From {
        ifindex: ifindex(ctx),
        segment: 0,
        client_mac: [0; 6],
        gateway_mac: [0; 6],
        linked: l3 != 0,
    };
    match lead(ctx, work, l3) {
        Some(Ok(verdict)) => verdict,
        Some(Err(reason)) => {
            count_drop(work.account, reason);
            TC_ACT_SHOT
        }
        // Other programs of this hook run, and then the stack.
        None => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn lead(ctx: &TcContext, work: &mut Work, l3: usize) -> Outcome {
    if !work.read(ctx, l3) {
        return None;
    }
    match fragments::complete(ctx, work, 0, false) {
        Standing::Known => {}
        Standing::Unknown => return None,
        Standing::Done => return Some(Ok(TC_ACT_SHOT)),
    }
    if work.parsed.is_transport() {
        request::lead(ctx, work)
    } else if work.parsed.is_icmp() && work.read_error(ctx) {
        request::lead_error(ctx, work)
    } else {
        None
    }
}
