//! A copy of the frame for every port of its segment but the one it came from.
//!
//! The list is walked [`FLOOD_BATCH`] ports at a time; a longer list is gone on
//! with by calling the program again, which keeps its place in the frame's
//! control buffer. That way the verifier sees a short loop, on kernels without
//! `bpf_loop` (5.17) too.

use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use bpf_bridge_common::{
    drops::DropReason,
    layout::{FLOOD_BATCH, MemberKey, PORT_HAIRPIN, PORT_ISOLATED, PROGRAM_FLOOD},
};

use crate::{
    maps::{MEMBERS, PROGRAMS},
    port::HANDED_OVER,
    shared::{PORTS, SEGMENTS, STATS, count_drop, ifindex, skb},
};

/// Hands the frame to [`flood()`]. Comes back only if that could not be called.
#[inline(always)]
pub(crate) fn start(ctx: &TcContext) -> Result<i32, DropReason> {
    go_on(ctx, 0);
    Err(DropReason::Helper)
}

/// The program that floods, from the slot that is in the control buffer on.
#[classifier]
pub(crate) fn flood(ctx: TcContext) -> i32 {
    match copy(&ctx) {
        Ok(()) => HANDED_OVER,
        Err(reason) => {
            count_drop(ifindex(&ctx), reason);
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn copy(ctx: &TcContext) -> Result<(), DropReason> {
    let ifindex = ifindex(ctx);
    // SAFETY: the plugin replaces entries of these maps whole.
    let port = unsafe { PORTS.get(ifindex) }.ok_or(DropReason::NotAPort)?;
    let segment = port.segment;
    let flags = port.flags;
    // SAFETY: as above.
    let members = unsafe { SEGMENTS.get(segment) }
        .ok_or(DropReason::NotAPort)?
        .members;
    let first = ctx.cb()[0];
    if first == 0
        && let Some(stats) = STATS.get_ptr_mut(ifindex)
    {
        // SAFETY: the value is this CPU's own.
        unsafe { (*stats).flooded += 1 };
    }
    for step in 0..FLOOD_BATCH {
        let slot = first.wrapping_add(step);
        if slot >= members {
            return Ok(());
        }
        // SAFETY: as above. A slot is empty for the moment in which a port leaves.
        let Some(member) = (unsafe { MEMBERS.get(MemberKey { segment, slot }) }) else {
            continue;
        };
        let back = member.port == ifindex && flags & PORT_HAIRPIN == 0;
        let apart = member.flags & flags & PORT_ISOLATED != 0;
        if !back && !apart {
            // A device that is down takes nothing: no reason to stop.
            let _ = ctx.clone_redirect(member.port, 0);
        }
    }
    let next = first.wrapping_add(FLOOD_BATCH);
    if next >= members {
        // The longest list has used up its calls.
        return Ok(());
    }
    go_on(ctx, next);
    Err(DropReason::Helper)
}

#[inline(always)]
fn go_on(ctx: &TcContext, slot: u32) {
    // SAFETY: the context is valid for as long as the program runs; the control
    // buffer is the classifier's to use. The program that is called takes the
    // same context.
    unsafe {
        (*skb(ctx)).cb[0] = slot;
        PROGRAMS.tail_call(ctx, PROGRAM_FLOOD);
    }
}
