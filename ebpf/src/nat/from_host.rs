//! What the host's stack sends to a pod: connections of the node's own processes, routed
//! ones from outside, kube-proxy's. They are remembered as the stack's, so that the pod's
//! replies go back to it; and if a client already speaks to the pod by a published port,
//! from the same address and port, the pod is shown another port.
//!
//! Of a pod that neither publishes ports nor is masqueraded, all replies go to the host
//! anyway, but those to pods of its own segment: only what comes from these is looked at.

use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use bpf_bridge_common::{
    drops::DropReason,
    frame::{ETH_HLEN, ETH_P_IP, ETH_P_IPV6},
    layout::{
        Address, FLOW_MASQUERADED, IpKey, MacKey, PORT_GATEWAY, PORT_MASQUERADED, PORT_PUBLISHED,
        PORT_ROUTED, PORT_VIA_HOST, Published,
    },
};

use crate::{
    flow::{self, Found},
    fragments::{self, Standing},
    maps::FLOWS,
    masquerade,
    own::Step,
    shared::{
        ENDPOINTS, FLAGS, NEIGHBORS, PORTS, SEGMENT, TARGET, count_drop, ifindex, set_mark, skb,
    },
    skb::{Skb, is_marked},
    work::{From, Work},
};

/// The pod that a frame is for, as `port` says.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    /// The ifindex of its host veth.
    pub(crate) port: u32,
    /// Its `PORT_*` bits.
    pub(crate) flags: u32,
    /// The segment.
    pub(crate) segment: u32,
}

impl Target {
    #[inline(always)]
    pub(crate) fn of(ctx: &TcContext) -> Self {
        // SAFETY: the context is valid for as long as the program runs.
        let cb = unsafe { &(*skb(ctx)).cb };
        Self {
            port: cb[TARGET],
            flags: cb[FLAGS],
            segment: cb[SEGMENT],
        }
    }
}

/// The program that `port` goes on with.
#[classifier]
pub(crate) fn from_host(ctx: TcContext) -> i32 {
    let target = Target::of(&ctx);
    let shown = match Work::get() {
        Some(work) => remember(&ctx, work, &target),
        None => Ok(()),
    };
    match shown.and_then(|()| Skb(&ctx).deliver(target.port)) {
        Ok(verdict) => verdict,
        Err(reason) => {
            count_drop(target.port, reason);
            TC_ACT_SHOT
        }
    }
}

/// Whether the packet's source is a pod of the segment.
#[inline(never)]
fn is_from_segment(ctx: &TcContext, segment: u32) -> bool {
    let source = match Skb(ctx).ethertype() {
        ETH_P_IP => ctx
            .load(ETH_HLEN + 12)
            .map(|address| IpKey::v4(segment, address)),
        ETH_P_IPV6 => ctx
            .load(ETH_HLEN + 8)
            .map(|address| IpKey::v6(segment, address)),
        _ => return false,
    };
    let Ok(source) = source else {
        return false;
    };
    // SAFETY: the plugin replaces entries of this map whole.
    unsafe { NEIGHBORS.get(&source) }.is_some_and(|pod| pod.flags & PORT_GATEWAY == 0)
}

/// From now on replies of the pod to pods of its segment are looked at.
#[inline(always)]
fn mark_routed(target: &Target) {
    if target.flags & PORT_ROUTED != 0 {
        return;
    }
    let Some(port) = PORTS.get_ptr_mut(target.port) else {
        return;
    };
    // The plugin restores the one from the other, in this order.
    // SAFETY: an entry that is replaced meanwhile is memory of the map still; at worst a
    // store is lost, and the next flow makes it again.
    unsafe {
        let key = MacKey::new(target.segment, (*port).mac);
        if let Some(endpoint) = ENDPOINTS.get_ptr_mut(key) {
            (*endpoint).flags |= PORT_ROUTED;
        }
        (*port).flags |= PORT_ROUTED;
    }
}

/// The pod as packets address it: nothing is translated.
#[inline(always)]
pub(crate) fn itself(address: &Address, pod_port: u16, port: u32) -> Published {
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
fn remember(ctx: &TcContext, work: &mut Work, target: &Target) -> Result<(), DropReason> {
    if is_marked(ctx) {
        set_mark(ctx, 0);
        return Ok(());
    }
    let turned = target.flags & PORT_VIA_HOST == 0 && is_from_segment(ctx, target.segment);
    if !turned && target.flags & (PORT_PUBLISHED | PORT_MASQUERADED) == 0 {
        return Ok(());
    }
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
    if work.parsed.is_icmp() {
        return if work.read_error(ctx) {
            show_error(ctx, work, target.port)
        } else {
            // Queries are answered, and answers begin nothing.
            Ok(())
        };
    }
    let tuple = &work.parsed.tuple;
    flow::describe(
        &mut work.key,
        &mut work.flow,
        &itself(&tuple.destination, tuple.destination_port, target.port),
        &tuple.source,
        (&tuple.source, tuple.source_port),
        (&tuple.destination, tuple.destination_port),
        work.parsed.protocol,
    );
    // SAFETY: the value is read at once.
    if let Some(flow) = unsafe { FLOWS.get(&work.key) }
        && flow.flags & FLOW_MASQUERADED != 0
    {
        // The pod has begun it.
        return Ok(());
    }
    let begins = work.step == Step::Begins;
    match flow::find(work, true, begins) {
        Found::Known => {}
        found => {
            if found == Found::Stale {
                flow::refresh(&work.key, &work.from);
            } else if !flow::make(work, found) {
                return Err(DropReason::NoSourcePort);
            }
            masquerade::set_reply_key(
                &mut work.reply_key,
                &work.parsed.tuple,
                work.parsed.protocol,
            );
            masquerade::cede(work);
            if turned {
                mark_routed(target);
            }
        }
    }
    let tuple = &work.parsed.tuple;
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
    let found = flow::find(work, true, false);
    if !matches!(found, Found::Known | Found::Stale)
        || work.key.client_port == work.inner.tuple.destination_port
    {
        return Ok(());
    }
    work.to = work.inner.tuple;
    work.to.destination_port = work.key.client_port;
    work.outer = work.parsed.tuple;
    if work.rewrite_error(ctx) {
        Ok(())
    } else {
        Err(DropReason::Helper)
    }
}
