//! Answers to broadcast questions for assigned addresses, so that they need not
//! be flooded. An answer goes to the asker alone, so it does not matter who he says he
//! is.
//!
//! Unicast questions, which neighbour unreachability detection sends, are not answered:
//! they are switched to the address's owner, for only he can say that he
//! lives.

use aya_ebpf::{
    bindings::{BPF_F_INVALIDATE_HASH, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT},
    helpers::{bpf_redirect, bpf_skb_change_tail, bpf_skb_store_bytes},
    macros::classifier,
    programs::TcContext,
};
use aya_log_ebpf::{debug, trace};
use bpf_bridge_common::{
    drops::DropReason,
    frame::{ETH_P_ARP, ETH_P_IPV6},
    layout::{IpKey, Neighbor, PORT_GATEWAY, PORT_ISOLATED, PROGRAM_RESPONDER, Port},
    responder::{
        ARP_FRAME_LEN, ArpRequest, IPPROTO_ICMPV6, IPV6_NEXT_HEADER, NA_FRAME_LEN, NS_FRAME_LEN,
        NeighborSolicitation,
    },
};

use crate::{
    flood,
    maps::PROGRAMS,
    shared::{NEIGHBORS, PORTS, STATS, count_drop, ifindex, skb},
};

/// Where in the control buffer `guard` leaves whether the frame claims an address.
const CLAIMS: usize = 1;

/// Hands the frame to [`responder()`], which drops what it cannot answer if the frame
/// claims an address. Comes back only if the program could not be called.
#[inline(always)]
pub(crate) fn start(ctx: &TcContext, claims: bool) -> Result<i32, DropReason> {
    // SAFETY: the context is valid for as long as the program runs; the control
    // buffer is the classifier's to use. The program that is called takes the
    // same context.
    unsafe {
        (*skb(ctx)).cb[CLAIMS] = u32::from(claims);
        PROGRAMS.tail_call(ctx, PROGRAM_RESPONDER);
    }
    Err(DropReason::Helper)
}

/// The program that answers.
#[classifier]
pub(crate) fn responder(ctx: TcContext) -> i32 {
    let ifindex = ifindex(&ctx);
    let verdict = answer(&ctx, ifindex).unwrap_or_else(|| {
        if ctx.cb()[CLAIMS] == 0 {
            flood::start(&ctx)
        } else {
            Err(DropReason::Claimed)
        }
    });
    match verdict {
        Ok(verdict) => verdict,
        Err(reason) => {
            debug!(&ctx, "port {}: drop, reason {}", ifindex, reason as u32);
            count_drop(ifindex, reason);
            TC_ACT_SHOT
        }
    }
}

/// `None` if the frame is no question that can be answered here.
#[inline(always)]
fn answer(ctx: &TcContext, ifindex: u32) -> Option<Result<i32, DropReason>> {
    // SAFETY: the plugin replaces entries of this map whole.
    let port = unsafe { PORTS.get(ifindex) }?;
    let proto = u16::from_be_bytes(ctx.load(12).ok()?);
    let answered = match proto {
        ETH_P_ARP => {
            let request = ArpRequest::parse(&ctx.load::<[u8; ARP_FRAME_LEN]>(0).ok()?)?;
            if request.sender == request.target {
                // An announcement, which asks nothing.
                return None;
            }
            let owner = owner(ifindex, port, IpKey::v4(port.segment, request.target))?;
            replace(ctx, &request.reply(owner.mac))
        }
        ETH_P_IPV6 => {
            if ctx.load::<u8>(IPV6_NEXT_HEADER).ok()? != IPPROTO_ICMPV6 {
                return None;
            }
            let asked = NeighborSolicitation::parse(&ctx.load::<[u8; NS_FRAME_LEN]>(0).ok()?)?;
            let owner = owner(ifindex, port, IpKey::v6(port.segment, asked.target))?;
            let router = owner.flags & PORT_GATEWAY != 0;
            replace(ctx, &asked.advertisement(owner.mac, router))
        }
        _ => return None,
    };
    if let Some(stats) = STATS.get_ptr_mut(ifindex) {
        // SAFETY: the value is this CPU's own.
        unsafe { (*stats).answered += 1 };
    }
    trace!(ctx, "port {}: answered a neighbour request", ifindex);
    Some(answered.map(|()| {
        // SAFETY: a helper that takes numbers.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }))
}

/// Who has the address, unless it is the asker (or duplicate address detection
/// would find itself) or someone whom the asker must not reach.
#[inline(always)]
fn owner(ifindex: u32, port: &Port, key: IpKey) -> Option<&'static Neighbor> {
    let neighbor = assigned(&key)?;
    let reachable = neighbor.port != ifindex && neighbor.flags & port.flags & PORT_ISOLATED == 0;
    reachable.then_some(neighbor)
}

/// To whom the address was assigned.
#[inline(always)]
pub(crate) fn assigned(key: &IpKey) -> Option<&'static Neighbor> {
    // SAFETY: the plugin replaces entries of this map whole.
    let neighbor = unsafe { NEIGHBORS.get(key) }?;
    // An entry that outlived its port counts for nothing.
    // SAFETY: as above.
    let there = unsafe { PORTS.get(neighbor.port) }?;
    (there.segment == key.segment && there.mac == neighbor.mac).then_some(neighbor)
}

/// Makes `frame` of the frame at hand.
#[inline(always)]
fn replace<const N: usize>(ctx: &TcContext, frame: &[u8; N]) -> Result<(), DropReason> {
    const { assert!(N == ARP_FRAME_LEN || N == NA_FRAME_LEN) };
    // SAFETY: the helpers get the context they belong to, and a buffer of the
    // length that goes with it.
    let result = unsafe {
        let resized = if ctx.len() as usize == N {
            0
        } else {
            bpf_skb_change_tail(skb(ctx), N as u32, 0)
        };
        if resized == 0 {
            bpf_skb_store_bytes(
                skb(ctx).cast(),
                0,
                frame.as_ptr().cast(),
                N as u32,
                u64::from(BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH),
            )
        } else {
            resized
        }
    };
    if result == 0 {
        Ok(())
    } else {
        Err(DropReason::Helper)
    }
}
