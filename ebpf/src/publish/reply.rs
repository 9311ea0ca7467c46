//! What a pod with published ports answers: undone, and sent where the request came
//! from.

use bpf_bridge_common::{
    drops::DropReason,
    layout::{Flow, FlowKey, Port},
    packet::{IPPROTO_TCP, Packet as _, Parsed, Tuple, Version, quoted},
    translate::{rewrite, rewrite_quoted},
};

use crate::{
    fib::{self, Way},
    maps::FLOWS,
    request::{Outcome, is_link_local},
    shared::{PORTS, to_host},
    skb::Skb,
};

/// "Don't fragment" in the second byte pair of an IPv4 header's third word.
const DF: u8 = 0x40;

/// Sends a reply to where its request came from.
#[inline(always)]
pub(crate) fn undo(skb: Skb<'_>, parsed: &Parsed, ifindex: u32, port: &Port) -> Outcome {
    let tuple = &parsed.tuple;
    let key = FlowKey {
        pod: tuple.source,
        client: tuple.destination,
        port: ifindex,
        pod_port: tuple.source_port,
        client_port: tuple.destination_port,
        protocol: parsed.protocol,
        reserved: [0; 3],
    };
    // SAFETY: an entry that is evicted meanwhile is memory of the map still.
    let flow = unsafe { FLOWS.get(&key) }?;
    let to = Tuple {
        source: flow.original,
        destination: flow.client,
        source_port: flow.original_port,
        destination_port: flow.client_port,
    };
    let length = wire_length(skb, parsed);
    let way = match choose(skb, flow, &to, parsed, port, length) {
        Ok(way) => way,
        Err(outcome) => return Some(outcome.map_err(|reason| (ifindex, reason))),
    };
    let mut frame = skb;
    let verdict = match rewrite(&mut frame, parsed, &to) {
        Some(()) => way.go(skb, flow),
        None => Err(DropReason::Helper),
    };
    Some(verdict.map_err(|reason| (ifindex, reason)))
}

/// Sends an error about a request to the client.
#[inline(always)]
pub(crate) fn undo_error(skb: Skb<'_>, parsed: &Parsed, ifindex: u32, port: &Port) -> Outcome {
    let inner = quoted(&skb, parsed)?;
    let request = &inner.tuple;
    let key = FlowKey {
        pod: request.destination,
        client: request.source,
        port: ifindex,
        pod_port: request.destination_port,
        client_port: request.source_port,
        protocol: inner.protocol,
        reserved: [0; 3],
    };
    // SAFETY: as in `undo`.
    let flow = unsafe { FLOWS.get(&key) }?;
    let to = Tuple {
        source: flow.client,
        destination: flow.original,
        source_port: flow.client_port,
        destination_port: flow.original_port,
    };
    let outer = Tuple {
        source: flow.original,
        destination: flow.client,
        source_port: 0,
        destination_port: 0,
    };
    let way = match choose(skb, flow, &outer, parsed, port, 0) {
        Ok(way) => way,
        Err(outcome) => return Some(outcome.map_err(|reason| (ifindex, reason))),
    };
    let mut frame = skb;
    let verdict =
        match rewrite_quoted(&mut frame, parsed, &inner, &flow.original, &flow.client, &to) {
            Some(()) => way.go(skb, flow),
            None => Err(DropReason::Helper),
        };
    Some(verdict.map_err(|reason| (ifindex, reason)))
}

/// Where a reply goes.
enum Back {
    /// To the host's stack, which brought the request, on the gateway device.
    Stack(u32),
    /// Into the pod that asked, which is behind this port.
    Pod(u32),
    /// The verdict that sends it out of the node.
    Out(i32),
}

impl Back {
    #[inline(always)]
    fn go(self, skb: Skb<'_>, flow: &Flow) -> Result<i32, DropReason> {
        match self {
            Self::Stack(segment) => Ok(to_host(segment)),
            Self::Pod(port) => skb.into_pod(port, flow.client_mac, flow.gateway_mac),
            Self::Out(verdict) => Ok(verdict),
        }
    }
}

/// The way back; or at once what becomes of a frame that cannot go it.
#[inline(always)]
fn choose(
    skb: Skb<'_>,
    flow: &Flow,
    to: &Tuple,
    parsed: &Parsed,
    port: &Port,
    length: u32,
) -> Result<Back, Result<i32, DropReason>> {
    if flow.from == 0 {
        return Ok(Back::Stack(port.segment));
    }
    if PORTS.get_ptr(flow.from).is_some() {
        return Ok(Back::Pod(flow.from));
    }
    let link = if is_link_local(&to.destination) { flow.from } else { 0 };
    match fib::send(skb.0, port.segment, to, parsed.protocol, length, link) {
        Way::Out(verdict) => Ok(Back::Out(verdict)),
        Way::TooBig => Err(refuse(skb, parsed, port.segment)),
        Way::None => Err(Err(DropReason::NoRoute)),
    }
}

/// A packet that is too long for its way goes to the host's stack as the pod has sent
/// it: the stack finds the same, and tells the pod in its own words.
#[inline(always)]
fn refuse(skb: Skb<'_>, parsed: &Parsed, segment: u32) -> Result<i32, DropReason> {
    if matches!(parsed.version, Version::V4) {
        // Or it would be fragmented, and leave under the pod's own address.
        let mut frame = skb;
        let at = usize::from(parsed.l3) + 6;
        let old: [u8; 2] = frame.load(at).ok_or(DropReason::Helper)?;
        let new = [old[0] | DF, old[1]];
        if new[0] != old[0] {
            let diff = bpf_bridge_common::checksum::diff(old, new);
            frame.store(at, new).ok_or(DropReason::Helper)?;
            frame
                .fix_header_checksum(usize::from(parsed.l3) + 10, diff)
                .ok_or(DropReason::Helper)?;
        }
    }
    Ok(to_host(segment))
}

/// The length in bytes, from the IP header on, of the longest packet that the frame
/// becomes on the wire; 0 if the headers do not say it.
#[inline(always)]
fn wire_length(skb: Skb<'_>, parsed: &Parsed) -> u32 {
    let segment = skb.segment_size();
    if segment == 0 {
        return u32::from(parsed.length);
    }
    let transport = if parsed.protocol == IPPROTO_TCP {
        match skb.load::<1>(usize::from(parsed.l4) + 12) {
            Some([offset]) => u32::from(offset >> 4) * 4,
            None => return 0,
        }
    } else {
        8
    };
    u32::from(parsed.l4) - u32::from(parsed.l3) + transport + segment
}
