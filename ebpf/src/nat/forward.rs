//! Masqueraded flows that do not pass the host's stack (`netfilter: none`): a pod's packet
//! leaves by the way that the routing tables say, and what answers it goes straight into
//! the pod.

use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use bpf_bridge_common::{drops::DropReason, layout::FLOW_DIRECT, translate::pass_on};

use crate::{
    fib::{self, Leaving},
    maps::UPLINKS,
    masquerade::{self, Owner},
    reply,
    shared::{count_drop, set_mark, to_host},
    skb::{OURS, Skb},
    work::{Outcome, Work, apart},
};

/// The program that [`from_pod`](crate::from_pod) goes on with, in the same work.
#[classifier]
pub(crate) fn forward(ctx: TcContext) -> i32 {
    let Some(work) = Work::get() else {
        return TC_ACT_SHOT;
    };
    match apart(|| try_forward(&ctx, work)) {
        Some(Ok(verdict)) => verdict,
        Some(Err(reason)) => {
            count_drop(work.account, reason);
            TC_ACT_SHOT
        }
        // It is not for outside, or the stack must deal with it.
        None => to_host(work.from.segment),
    }
}

#[inline(always)]
fn try_forward(ctx: &TcContext, work: &mut Work) -> Outcome {
    let segment = work.from.segment;
    let tuple = &work.parsed.tuple;
    if tuple.destination.is_group() || tuple.destination.is_link_local() {
        return None;
    }
    let pod = masquerade::pod(&mut work.pod_key, &tuple.source, segment)?;
    let length = reply::wire_length(Skb(ctx), &work.parsed);
    let leaving = Leaving {
        via: segment,
        device: 0,
        length,
        protocol: work.parsed.protocol,
    };
    if !fib::exit(ctx, tuple, &leaving, &mut work.exit) {
        return None;
    }
    let exit = work.exit;
    // By another device nobody would undo what is done here.
    UPLINKS.get_ptr(exit.device)?;
    work.account = work.from.ifindex;
    if exit.too_big {
        return Some(reply::refuse(Skb(ctx), &work.parsed, segment));
    }
    work.owner = Owner {
        port: work.from.ifindex,
        segment,
        device: exit.device,
        flags: FLOW_DIRECT,
        policy: pod.policy,
    };
    if let Err(reason) = masquerade::settle(ctx, work)? {
        return Some(Err(reason));
    }
    if !pass_on(&mut Skb(ctx), &work.parsed) {
        // The stack says that its time is over.
        return None;
    }
    Some(if work.rewrite(ctx) {
        set_mark(ctx, OURS);
        Ok(exit.go())
    } else {
        Err(DropReason::Helper)
    })
}
