//! A packet for a published port, and the errors that the way back has met.

use core::ffi::c_void;

use aya_ebpf::{EbpfContext as _, programs::TcContext};
use bpf_bridge_common::{
    drops::DropReason,
    layout::{Address, Published},
};

use crate::{
    fib,
    flow::{self, Found},
    maps::{ADDRESSES, published},
    own::{self, Step},
    skb::Skb,
    work::{From, Outcome, Work, apart},
};

/// Leads a packet for a published port into the pod.
#[inline(always)]
pub(crate) fn lead(ctx: &TcContext, work: &mut Work) -> Outcome {
    apart(|| try_lead(ctx, work))
}

#[inline(always)]
fn try_lead(ctx: &TcContext, work: &mut Work) -> Outcome {
    let tuple = &work.parsed.tuple;
    let pod = published(
        &tuple.destination,
        tuple.destination_port,
        work.parsed.protocol,
    )?;
    if work.from.segment != 0 {
        work.note_client(ctx)?;
    }
    if let Err(reason) = follow(ctx.as_ptr(), work, pod)? {
        return Some(Err(reason));
    }
    Some(if work.rewrite(ctx) {
        hand_over(ctx, work, pod)
    } else {
        Err(DropReason::Helper)
    })
}

/// Finds the flow of a packet for a port of `pod`, or makes it, and says what the packet
/// is to become. `None` if it is not for the node.
///
/// `ctx` is that of a tc or an XDP program.
#[inline(always)]
pub(crate) fn follow(
    ctx: *mut c_void,
    work: &mut Work,
    pod: &Published,
) -> Option<Result<(), DropReason>> {
    let tuple = &work.parsed.tuple;
    flow::describe(
        &mut work.key,
        &mut work.flow,
        pod,
        seen_as(pod, &tuple.source, work.from.segment)?,
        (&tuple.source, tuple.source_port),
        (&tuple.destination, tuple.destination_port),
        work.parsed.protocol,
    );
    work.account = pod.port;
    let begins = work.step == Step::Begins;
    let found = flow::find(work, true, begins);
    if found != Found::Known
        && let Err(refused) = admit(ctx, work, pod, found)
    {
        return refused.map(Err);
    }
    work.to.source = work.key.client;
    work.to.source_port = work.key.client_port;
    work.to.destination = pod.address;
    work.to.destination_port = pod.pod_port;
    Some(Ok(()))
}

/// Whether a packet of a flow that is not known, or of one that it is time to look at
/// again, is for the published port at all. If not, says why it is dropped, or nothing
/// if it is not ours to drop.
#[inline(always)]
fn admit(
    ctx: *mut c_void,
    work: &mut Work,
    pod: &Published,
    found: Found,
) -> Result<(), Option<DropReason>> {
    let step = work.step;
    let tuple = &work.parsed.tuple;
    if found == Found::Ceded && step != Step::Begins
        || !fib::is_local(ctx, pod.segment, &tuple.source, &tuple.destination)
    {
        return Err(None);
    }
    if found == Found::Stale {
        flow::refresh(&work.key, &work.from);
        return Ok(());
    }
    if step == Step::Answers {
        // The node has begun it, or somebody whom it lets appear as itself.
        let from = work.from;
        work.from = From::STACK;
        flow::make(work, found);
        work.from = from;
        return Err(None);
    }
    if step != Step::Begins && own::is_own(ctx, tuple, work.parsed.protocol) {
        return Err(None);
    }
    let has_way = if work.from.segment == pod.segment {
        // A pod of the network, but not one that calls itself by the node's name, or by one
        // that nobody has.
        let source = &tuple.source;
        !source.is_group() && !source.is_loopback() && ADDRESSES.get_ptr(source).is_none()
    } else {
        fib::leads_back(ctx, pod.segment, &tuple.destination, &tuple.source)
    };
    if !has_way {
        return Err(Some(DropReason::NoRoute));
    }
    if flow::make(work, found) {
        Ok(())
    } else {
        Err(Some(DropReason::NoSourcePort))
    }
}

/// Leads an error about a reply into the pod that sent the reply.
#[inline(always)]
pub(crate) fn lead_error(ctx: &TcContext, work: &mut Work) -> Outcome {
    apart(|| try_lead_error(ctx, work))
}

#[inline(always)]
fn try_lead_error(ctx: &TcContext, work: &mut Work) -> Outcome {
    let reply = &work.inner.tuple;
    let protocol = work.inner.protocol;
    let pod = published(&reply.source, reply.source_port, protocol)?;
    flow::describe(
        &mut work.key,
        &mut work.flow,
        pod,
        seen_as(pod, &reply.destination, work.from.segment)?,
        (&reply.destination, reply.destination_port),
        (&reply.source, reply.source_port),
        protocol,
    );
    work.account = pod.port;
    if !matches!(flow::find(work, true, false), Found::Known | Found::Stale) {
        return None;
    }
    work.to.source = pod.address;
    work.to.source_port = pod.pod_port;
    work.to.destination = work.key.client;
    work.to.destination_port = work.key.client_port;
    work.outer.source = work.parsed.tuple.source;
    work.outer.destination = pod.address;
    Some(if work.rewrite_error(ctx) {
        hand_over(ctx, work, pod)
    } else {
        Err(DropReason::Helper)
    })
}

/// The address as which the pod sees the client: the client's own, unless the pod would
/// not send its answers to the gateway then. `None` if there is no other.
#[inline(always)]
fn seen_as<'a>(pod: &'a Published, client: &'a Address, segment: u32) -> Option<&'a Address> {
    if segment != pod.segment && !client.is_link_local() {
        return Some(client);
    }
    (!pod.gateway.is_unspecified()).then_some(&pod.gateway)
}

#[inline(always)]
fn hand_over(ctx: &TcContext, work: &Work, pod: &Published) -> Result<i32, DropReason> {
    let skb = Skb(ctx);
    if !work.from.linked {
        skb.add_link_header(work.parsed.version)
            .ok_or(DropReason::Helper)?;
    }
    skb.into_pod(pod.port, pod.mac, pod.gateway_mac)
}
