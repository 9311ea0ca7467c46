//! A packet for a published port, and the errors that the way back has met.

use bpf_bridge_common::{
    drops::DropReason,
    layout::Published,
    packet::{Packet as _, Parsed, Tuple, quoted},
    translate::{rewrite, rewrite_quoted},
};

use crate::{
    fib,
    flow::{self, Found, From, Request},
    maps::{is_v4, published},
    skb::Skb,
};

/// What became of a frame: a verdict, or why it was dropped and on whose account (the
/// ifindex of a port). `None` if it is none of ours.
pub(crate) type Outcome = Option<Result<i32, (u32, DropReason)>>;

/// Leads a packet for a published port into the pod. `segment` is that of the port
/// that it came from, 0 for uplinks; `linked` says whether it has an Ethernet header.
#[inline(always)]
pub(crate) fn lead(skb: Skb<'_>, parsed: &Parsed, from: &From, segment: u32, linked: bool) -> Outcome {
    let tuple = &parsed.tuple;
    let pod = published(&tuple.destination, tuple.destination_port, parsed.protocol)?;
    let request = Request {
        client: &tuple.source,
        client_port: tuple.source_port,
        seen_as: seen_as(pod, &tuple.source, segment)?,
        original: &tuple.destination,
        original_port: tuple.destination_port,
        protocol: parsed.protocol,
    };
    let found = flow::find(pod, &request, from);
    let source_port = match found {
        Found::Known(port) => port,
        Found::Free(_) | Found::Full
            if !fib::is_local(skb.0, pod.segment, &tuple.source, &tuple.destination) =>
        {
            return None;
        }
        Found::Free(port) if flow::make(pod, &request, from, port) => port,
        Found::Free(_) | Found::Full => {
            return Some(Err((pod.port, DropReason::NoSourcePort)));
        }
    };
    let to = Tuple {
        source: *request.seen_as,
        destination: pod.address,
        source_port,
        destination_port: pod.pod_port,
    };
    let mut frame = skb;
    let verdict = match rewrite(&mut frame, parsed, &to) {
        Some(()) => hand_over(skb, parsed, pod, linked),
        None => Err(DropReason::Helper),
    };
    Some(verdict.map_err(|reason| (pod.port, reason)))
}

/// Leads an error about a reply into the pod that sent the reply.
#[inline(always)]
pub(crate) fn lead_error(skb: Skb<'_>, parsed: &Parsed, segment: u32, linked: bool) -> Outcome {
    let inner = quoted(&skb, parsed)?;
    let reply = &inner.tuple;
    let pod = published(&reply.source, reply.source_port, inner.protocol)?;
    let request = Request {
        client: &reply.destination,
        client_port: reply.destination_port,
        seen_as: seen_as(pod, &reply.destination, segment)?,
        original: &reply.source,
        original_port: reply.source_port,
        protocol: inner.protocol,
    };
    let to = Tuple {
        source: pod.address,
        destination: *request.seen_as,
        source_port: pod.pod_port,
        destination_port: request.known(pod)?,
    };
    let mut frame = skb;
    let source = &parsed.tuple.source;
    let verdict = match rewrite_quoted(&mut frame, parsed, &inner, source, &pod.address, &to) {
        Some(()) => hand_over(skb, parsed, pod, linked),
        None => Err(DropReason::Helper),
    };
    Some(verdict.map_err(|reason| (pod.port, reason)))
}

/// The address as which the pod sees the client: the client's own, unless the pod would
/// not send its answers to the gateway then. `None` if there is no other.
#[inline(always)]
fn seen_as<'a>(
    pod: &'a Published,
    client: &'a [u8; 16],
    segment: u32,
) -> Option<&'a [u8; 16]> {
    let neighbor = segment == pod.segment || is_link_local(client);
    if !neighbor {
        return Some(client);
    }
    (pod.gateway != [0; 16]).then_some(&pod.gateway)
}

/// Whether it means something on its own link only.
#[inline(always)]
pub(crate) fn is_link_local(address: &[u8; 16]) -> bool {
    !is_v4(address) && address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

#[inline(always)]
fn hand_over(
    skb: Skb<'_>,
    parsed: &Parsed,
    pod: &Published,
    linked: bool,
) -> Result<i32, DropReason> {
    if !linked {
        skb.add_link_header(parsed.version)
            .ok_or(DropReason::Helper)?;
    }
    skb.into_pod(pod.port, pod.mac, pod.gateway_mac)
}

/// Source and destination of the Ethernet header.
#[inline(always)]
pub(crate) fn macs(skb: Skb<'_>) -> Option<(bpf_bridge_common::layout::Mac, bpf_bridge_common::layout::Mac)> {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = skb.load(0)?;
    Some(([g, h, i, j, k, l], [a, b, c, d, e, f]))
}
