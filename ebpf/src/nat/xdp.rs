//! XDP on the uplinks that the operator names: the plain requests for published ports,
//! which are most, go into their pods before the kernel has made anything of them.
//!
//! All else is passed on and meets [`uplink`](crate::uplink), which knows how to deal
//! with it: fragments, options, ICMP errors, packets whose checksums are not finished.
//! Both find and make the same flows, so it does not matter which of them a packet
//! meets.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_INGRESS,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    helpers::{bpf_check_mtu, bpf_redirect, bpf_xdp_get_buff_len},
    macros::xdp,
    programs::XdpContext,
};
use bpf_bridge_common::{
    drops::DropReason,
    frame::{ETH_HLEN, ETH_P_IP, ETH_P_IPV6},
    layout::{PUBLISHED_XDP, Published},
    packet::{Packet, is_sound, looks_unfinished, parse_plain},
    translate::rewrite,
};

use crate::{
    linear::Linear,
    maps::{XDP_UPLINKS, published},
    masquerade, own, request,
    shared::count_drop,
    work::{From, Work},
};

/// The program of uplinks with Ethernet headers.
#[xdp(frags)]
pub(crate) fn xdp(ctx: XdpContext) -> u32 {
    let Some(work) = Work::get() else {
        return XDP_PASS;
    };
    match receive(&ctx, work) {
        Some(Ok(())) => {
            // SAFETY: a helper that takes numbers.
            unsafe { bpf_redirect(work.account, 0) as u32 }
        }
        Some(Err(reason)) => {
            count_drop(work.account, reason);
            XDP_DROP
        }
        None => XDP_PASS,
    }
}

/// What became of a frame: it is ready for the pod, or why it was dropped. `None` if it
/// is left to others.
type Outcome = Option<Result<(), DropReason>>;

/// Each version of IP has offsets of its own, and so its own functions.
#[inline(always)]
fn receive(ctx: &XdpContext, work: &mut Work) -> Outcome {
    match Linear(ctx).load(12).map(u16::from_be_bytes)? {
        ETH_P_IP => lead::<ETH_P_IP>(ctx, work),
        ETH_P_IPV6 => lead::<ETH_P_IPV6>(ctx, work),
        _ => None,
    }
}

/// What [`request::lead`] is in tc.
#[inline(always)]
fn lead<const ETHERTYPE: u16>(ctx: &XdpContext, work: &mut Work) -> Outcome {
    if !read::<ETHERTYPE>(ctx, work) {
        return None;
    }
    let tuple = &work.parsed.tuple;
    let pod = published(
        &tuple.destination,
        tuple.destination_port,
        work.parsed.protocol,
    )?;
    if pod.flags & PUBLISHED_XDP == 0 || !fits(ctx, pod.port) {
        return None;
    }
    masquerade::set_reply_key(
        &mut work.reply_key,
        &work.parsed.tuple,
        work.parsed.protocol,
    );
    if masquerade::replied(&work.reply_key).is_some() {
        // It answers somebody, whatever is published under this number.
        return None;
    }
    if let Err(reason) = request::follow(ctx.as_ptr(), work, pod)? {
        return Some(Err(reason));
    }
    Some(if write::<ETHERTYPE>(ctx, work, pod) {
        Ok(())
    } else {
        Err(DropReason::Helper)
    })
}

/// Reads the packet, and says whether it is one for XDP.
#[inline(never)]
fn read<const ETHERTYPE: u16>(ctx: &XdpContext, work: &mut Work) -> bool {
    let frame = Linear(ctx);
    let Some(parsed) = parse_plain(&frame, ETH_HLEN, ETHERTYPE) else {
        return false;
    };
    // SAFETY: the context is the program's own.
    let length = unsafe { bpf_xdp_get_buff_len(ctx.as_ptr().cast()) } as usize;
    if !is_sound(&frame, &parsed, length.saturating_sub(ETH_HLEN), false) {
        return false;
    }
    work.step = own::step(&frame, &parsed);
    work.parsed = parsed;
    work.from = From {
        ifindex: ctx.ingress_ifindex() as u32,
        segment: 0,
        client_mac: [0; 6],
        gateway_mac: [0; 6],
        linked: true,
        again: BPF_F_INGRESS,
    };
    // SAFETY: the plugin replaces entries of this map whole.
    let own = unsafe { XDP_UPLINKS.get(work.from.ifindex) };
    own.is_some_and(|own| frame.load(0) == Some(*own))
        && looks_unfinished(&frame, &parsed) == Some(false)
}

/// Makes the packet what it is to become, and addresses it to the pod.
#[inline(never)]
fn write<const ETHERTYPE: u16>(ctx: &XdpContext, work: &Work, pod: &Published) -> bool {
    let mut frame = Linear(ctx);
    let parsed = work.parsed.with_plain_offsets(ETH_HLEN, ETHERTYPE);
    let [a, b, c, d, e, f] = pod.mac;
    let [g, h, i, j, k, l] = pod.gateway_mac;
    rewrite(&mut frame, &parsed, &work.to)
        .and_then(|()| frame.store(0, [a, b, c, d, e, f, g, h, i, j, k, l]))
        .is_some()
}

/// Whether the device takes a packet of this length: XDP cuts none. Where it runs behind
/// the driver, frames may have been merged before.
#[inline(always)]
fn fits(ctx: &XdpContext, device: u32) -> bool {
    let mut length = 0;
    // SAFETY: the context is the program's own.
    unsafe { bpf_check_mtu(ctx.as_ptr(), device, &mut length, 0, 0) == 0 }
}
