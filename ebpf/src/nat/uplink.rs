//! tc ingress of the devices by which others reach the node: answers to masqueraded pods
//! are theirs again, requests for published ports go into their pods, and everything else
//! goes on as if no program were here.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use bpf_bridge_common::{
    drops::DropReason,
    frame::ETH_HLEN,
    layout::{Port, REPLY_DIRECT, Reply},
};

use crate::{
    fragments::{self, Standing},
    maps::gateway_mac,
    masquerade::{self, GO_ON},
    request,
    shared::{PORTS, count_drop, ifindex, set_mark},
    skb::{OURS, Skb},
    work::{From, Outcome, Work, apart},
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
    set_mark(ctx, 0);
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
        again: BPF_F_INGRESS,
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
    if !work.read_received(ctx, l3) {
        return None;
    }
    match fragments::complete(ctx, work, 0, false) {
        Standing::Known => {}
        Standing::Unknown => return None,
        Standing::Done => return Some(Ok(TC_ACT_SHOT)),
    }
    if work.parsed.is_bare_icmp() {
        if !work.read_error(ctx) {
            return None;
        }
        return apart(|| come_back_error(ctx, work)).or_else(|| request::lead_error(ctx, work));
    }
    if let Some(done) = apart(|| come_back(ctx, work)) {
        return Some(done);
    }
    if work.parsed.is_transport() {
        request::lead(ctx, work)
    } else {
        None
    }
}

/// Leads an answer to where it was asked.
#[inline(always)]
fn come_back(ctx: &TcContext, work: &mut Work) -> Outcome {
    let reply = masquerade::recall(work)?;
    if reply.port == 0 {
        // The stack's, and nobody else's, whatever is published under this number.
        if reply.inner_port == work.parsed.tuple.destination_port || work.rewrite(ctx) {
            return GO_ON;
        }
        return Some(Err(DropReason::Helper));
    }
    // SAFETY: the plugin replaces entries of this map whole.
    let port = unsafe { PORTS.get(reply.port) }?;
    work.account = reply.port;
    masquerade::restore(work, reply);
    Some(if work.rewrite(ctx) {
        hand_over(ctx, work, reply, port)
    } else {
        Err(DropReason::Helper)
    })
}

/// Leads an error to whom it is about.
#[inline(always)]
fn come_back_error(ctx: &TcContext, work: &mut Work) -> Outcome {
    let sent = work.inner.tuple;
    masquerade::set_reply_key(
        &mut work.reply_key,
        &masquerade::answer(&sent),
        work.inner.protocol,
    );
    let reply = masquerade::replied(&work.reply_key)?;
    work.to = sent;
    work.to.source = reply.address;
    work.to.source_port = reply.inner_port;
    work.outer = work.parsed.tuple;
    work.outer.destination = reply.address;
    if reply.port == 0 {
        if reply.inner_port == sent.source_port || work.rewrite_error(ctx) {
            return GO_ON;
        }
        return Some(Err(DropReason::Helper));
    }
    // SAFETY: as in `come_back`.
    let port = unsafe { PORTS.get(reply.port) }?;
    work.account = reply.port;
    Some(if work.rewrite_error(ctx) {
        hand_over(ctx, work, reply, port)
    } else {
        Err(DropReason::Helper)
    })
}

/// To the host's stack, which has seen the request; or into the pod, if it has not.
#[inline(always)]
fn hand_over(ctx: &TcContext, work: &Work, reply: &Reply, port: &Port) -> Result<i32, DropReason> {
    if reply.flags & REPLY_DIRECT == 0 {
        set_mark(ctx, OURS);
        return Ok(TC_ACT_UNSPEC);
    }
    let gateway = gateway_mac(port.segment).ok_or(DropReason::Helper)?;
    let frame = Skb(ctx);
    if !work.from.linked {
        frame
            .add_link_header(work.parsed.version)
            .ok_or(DropReason::Helper)?;
    }
    frame.into_pod(reply.port, port.mac, gateway)
}
