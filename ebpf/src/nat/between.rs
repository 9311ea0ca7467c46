//! What one pod sends another, if the host's stack has its part in it.
//!
//! A pod that asks a ClusterIP is led by kube-proxy to a pod of its own segment, perhaps.
//! That one answers the asker's own address: the answer must go to the host, which knows
//! whose it is, and not straight to the asker. The first such request sets `PORT_ROUTED`,
//! and then each packet of the pod is looked at. Connections that a pod makes directly
//! stay direct; if one would look the same as one that came by the host, the pod is shown
//! another port.
//!
//! With `netfilter: all` everything takes the way by the host.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};
use bpf_bridge_common::{
    drops::DropReason,
    frame::ETH_HLEN,
    layout::{PORT_ISOLATED, PORT_ROUTED, PORT_VIA_HOST},
    packet::{Version, is_neighbor_discovery},
};

use crate::{
    flow::{self, Found},
    fragments::{self, Standing},
    from_host::{Target, itself},
    maps::{FLOWS, REPLIES, gateway_mac},
    masquerade,
    shared::{PORTS, count_drop, ifindex, to_host},
    skb::Skb,
    work::{From, Work},
};

/// The program that `port` goes on with.
#[classifier]
pub(crate) fn between(ctx: TcContext) -> i32 {
    let target = Target::of(&ctx);
    let port = ifindex(&ctx);
    // SAFETY: the plugin replaces entries of this map whole.
    let flags = unsafe { PORTS.get(port) }.map_or(0, |port| port.flags);
    let way = match Work::get() {
        Some(work) => choose(&ctx, work, port, flags, &target),
        None => Way::Straight,
    };
    let done = match way {
        Way::Straight if flags & target.flags & PORT_ISOLATED != 0 => Err(DropReason::Isolated),
        Way::Straight => Skb(&ctx).deliver(target.port),
        Way::ByHost => turn(&ctx, &target),
        Way::Waits => return TC_ACT_SHOT,
        Way::Nowhere(reason) => Err(reason),
    };
    match done {
        Ok(verdict) => verdict,
        Err(reason) => {
            count_drop(port, reason);
            TC_ACT_SHOT
        }
    }
}

/// Where a packet goes.
enum Way {
    /// Into the pod that it is addressed to.
    Straight,
    /// To the host's stack.
    ByHost,
    /// Nowhere, until another fragment has come.
    Waits,
    /// Nowhere.
    Nowhere(DropReason),
}

/// To the host's stack, as if it had been addressed to the gateway.
#[inline(always)]
fn turn(ctx: &TcContext, target: &Target) -> Result<i32, DropReason> {
    let gateway = gateway_mac(target.segment).ok_or(DropReason::Helper)?;
    ctx.store(0, &gateway, 0).map_err(|_| DropReason::Helper)?;
    Ok(to_host(target.segment))
}

#[inline(always)]
fn choose(ctx: &TcContext, work: &mut Work, port: u32, flags: u32, target: &Target) -> Way {
    work.from = From {
        ifindex: port,
        segment: target.segment,
        client_mac: [0; 6],
        gateway_mac: [0; 6],
        linked: true,
        again: BPF_F_INGRESS,
    };
    if Skb(ctx).is_tagged() || !work.read(ctx, ETH_HLEN) {
        return Way::Straight;
    }
    let parsed = &work.parsed;
    let on_link = parsed.tuple.source.is_link_local() || parsed.tuple.destination.is_link_local();
    if on_link || parsed.version == Version::V6 && is_neighbor_discovery(&Skb(ctx), parsed) {
        // No router passes that on.
        return Way::Straight;
    }
    let isolated = flags & target.flags & PORT_ISOLATED != 0;
    if (flags | target.flags) & PORT_VIA_HOST != 0 && !isolated {
        return Way::ByHost;
    }
    match fragments::complete(ctx, work, port, true) {
        Standing::Known => {}
        Standing::Unknown => return Way::Straight,
        Standing::Done => return Way::Waits,
    }
    if work.parsed.is_icmp() {
        if flags & PORT_ROUTED != 0 && work.read_error(ctx) {
            return error(work, port);
        }
        return Way::Straight;
    }
    if flags & PORT_ROUTED != 0
        && let Some(way) = reply(ctx, work, port)
    {
        return way;
    }
    if target.flags & PORT_ROUTED != 0 && work.parsed.is_transport() {
        return request(ctx, work, target);
    }
    Way::Straight
}

/// What the pod says about a packet that it got: the way of that packet's answers.
#[inline(always)]
fn error(work: &mut Work, port: u32) -> Way {
    masquerade::set_flow_key(
        &mut work.key,
        &masquerade::answer(&work.inner.tuple),
        work.inner.protocol,
        port,
    );
    // SAFETY: the value is read at once.
    match unsafe { FLOWS.get(&work.key) } {
        Some(flow) if flow.from == 0 => Way::ByHost,
        _ => Way::Straight,
    }
}

/// What a pod answers to what came by the host, or to what looked the same as that. `None`
/// if it is neither.
#[inline(never)]
fn undo(work: &mut Work, port: u32) -> Undone {
    masquerade::set_flow_key(
        &mut work.key,
        &work.parsed.tuple,
        work.parsed.protocol,
        port,
    );
    // SAFETY: an entry that is evicted meanwhile is memory of the map still.
    if let Some(flow) = unsafe { FLOWS.get(&work.key) } {
        work.to = work.parsed.tuple;
        work.to.destination_port = flow.client_port;
        return if flow.from == 0 {
            Undone::ByHost
        } else {
            Undone::Straight
        };
    }
    let answer = masquerade::answer(&work.parsed.tuple);
    masquerade::set_reply_key(&mut work.reply_key, &answer, work.parsed.protocol);
    // SAFETY: the value is read at once.
    match unsafe { REPLIES.get(&work.reply_key) } {
        Some(reply) if reply.port == 0 => {
            // Forgotten; the next request makes it again.
            work.to = work.parsed.tuple;
            Undone::ByHost
        }
        _ => Undone::Unknown,
    }
}

/// What is known of an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Undone {
    Unknown,
    ByHost,
    Straight,
}

#[inline(always)]
fn reply(ctx: &TcContext, work: &mut Work, port: u32) -> Option<Way> {
    let undone = undo(work, port);
    if undone == Undone::Unknown {
        return None;
    }
    if work.to.destination_port != work.parsed.tuple.destination_port && !work.rewrite(ctx) {
        return Some(Way::Nowhere(DropReason::Helper));
    }
    Some(if undone == Undone::ByHost {
        Way::ByHost
    } else {
        Way::Straight
    })
}

/// What a pod asks another directly, which must not look like what came by the host.
#[inline(always)]
fn request(ctx: &TcContext, work: &mut Work, target: &Target) -> Way {
    if work.note_client(ctx).is_none() {
        return Way::Nowhere(DropReason::Helper);
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
    match flow::find(work, false, false) {
        Found::Known => {}
        Found::Stale => flow::refresh(&work.key, &work.from),
        found => {
            if !flow::make(work, found) {
                return Way::Nowhere(DropReason::NoSourcePort);
            }
        }
    }
    work.to = work.parsed.tuple;
    work.to.source_port = work.key.client_port;
    if work.to.source_port != work.parsed.tuple.source_port && !work.rewrite(ctx) {
        return Way::Nowhere(DropReason::Helper);
    }
    Way::Straight
}
