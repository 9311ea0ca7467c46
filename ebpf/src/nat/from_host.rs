//! What the host's stack sends to a pod with published ports: connections of the node's
//! own processes, routed ones from outside, kube-proxy's. They are remembered as the
//! stack's, so that the pod's replies go back to it; and if a client already speaks to
//! the pod by a published port, from the same address and port, the pod is shown another
//! port.

use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use bpf_bridge_common::{
    drops::DropReason,
    frame::ETH_HLEN,
    layout::{Address, Published},
};

use crate::{
    flow::{self, Found},
    fragments::{self, Standing},
    shared::{count_drop, ifindex, skb},
    skb::Skb,
    work::{From, Work},
};

/// The program that `port` goes on with. It has left the ifindex of the pod's host veth
/// in the control buffer.
#[classifier]
pub(crate) fn from_host(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for as long as the program runs.
    let port = unsafe { (*skb(&ctx)).cb[0] };
    let shown = match Work::get() {
        Some(work) => remember(&ctx, work, port),
        None => Ok(()),
    };
    match shown.and_then(|()| Skb(&ctx).deliver(port)) {
        Ok(verdict) => verdict,
        Err(reason) => {
            count_drop(port, reason);
            TC_ACT_SHOT
        }
    }
}

/// The pod as packets address it: nothing is translated.
#[inline(always)]
fn itself(address: &Address, pod_port: u16, port: u32) -> Published {
    Published {
        address: *address,
        gateway: Address::UNSPECIFIED,
        port,
        segment: 0,
        specific: 0,
        pod_port,
        mac: [0; 6],
        gateway_mac: [0; 6],
        flags: 0,
    }
}

#[inline(always)]
fn remember(ctx: &TcContext, work: &mut Work, port: u32) -> Result<(), DropReason> {
    // Replies go to the stack, whatever brought the request there.
    work.from = From::STACK;
    if Skb(ctx).is_tagged() || !work.read(ctx, ETH_HLEN) {
        return Ok(());
    }
    // Nothing waits here: it says that it may not, and the stack sends in order.
    if !matches!(
        fragments::complete(ctx, work, ifindex(ctx), false),
        Standing::Known
    ) {
        return Ok(());
    }
    if work.parsed.is_icmp() && work.read_error(ctx) {
        return show_error(ctx, work, port);
    }
    if !work.parsed.is_transport() {
        return Ok(());
    }
    let tuple = &work.parsed.tuple;
    flow::describe(
        &mut work.key,
        &mut work.flow,
        &itself(&tuple.destination, tuple.destination_port, port),
        &tuple.source,
        (&tuple.source, tuple.source_port),
        (&tuple.destination, tuple.destination_port),
        work.parsed.protocol,
    );
    match flow::find(&mut work.key, &work.flow, &work.from) {
        Found::Known => {}
        Found::Stale => flow::refresh(&work.key, &work.from),
        found => {
            if !flow::make(&work.key, &mut work.flow, &work.from, found) {
                return Err(DropReason::NoSourcePort);
            }
        }
    }
    if work.key.client_port == tuple.source_port {
        return Ok(());
    }
    work.to = *tuple;
    work.to.source_port = work.key.client_port;
    if work.rewrite(ctx) {
        Ok(())
    } else {
        Err(DropReason::Helper)
    }
}

/// An error about what the pod has sent: it must name the port that the pod was shown.
#[inline(always)]
fn show_error(ctx: &TcContext, work: &mut Work, port: u32) -> Result<(), DropReason> {
    let reply = &work.inner.tuple;
    flow::describe(
        &mut work.key,
        &mut work.flow,
        &itself(&reply.source, reply.source_port, port),
        &reply.destination,
        (&reply.destination, reply.destination_port),
        (&reply.source, reply.source_port),
        work.inner.protocol,
    );
    let found = flow::find(&mut work.key, &work.flow, &work.from);
    if !matches!(found, Found::Known | Found::Stale)
        || work.key.client_port == reply.destination_port
    {
        return Ok(());
    }
    work.to = *reply;
    work.to.destination_port = work.key.client_port;
    work.outer = work.parsed.tuple;
    if work.rewrite_error(ctx) {
        Ok(())
    } else {
        Err(DropReason::Helper)
    }
}
