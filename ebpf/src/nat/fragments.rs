//! Fragments: only the first one of a datagram says which ports it is for.
//!
//! Those that come before it wait in a map. When it has come, all of them are received
//! once more (or sent, if they are leaving), the first one first: each then finds what it
//! needs.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_INVALIDATE_HASH, BPF_F_RECOMPUTE_CSUM},
    btf_maps::PerCpuArray,
    check_bounds_signed,
    helpers::{bpf_clone_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
    macros::btf_map,
    programs::TcContext,
};
use bpf_bridge_common::{
    layout::{FRAGMENT_NS, FragmentKey, Fragments, HELD_LEN, Held, HeldKey, MAX_HELD, is_older},
    packet::{Fragment, Parsed, Version},
};

use crate::{
    maps::{ADDRESSES, FRAGMENTS, HELD, published},
    share,
    shared::{ifindex, skb},
    work::{Work, now},
};

/// Where a frame is put together that is to wait: it is too long for the stack.
#[btf_map]
static HOLDING: PerCpuArray<Held, 1> = PerCpuArray::new();

/// What is to be done with a packet.
pub(crate) enum Standing {
    /// Its ports are known.
    Known,
    /// They are not, and will not be.
    Unknown,
    /// It waits, or will be received again: this one is dealt with.
    Done,
}

#[inline(always)]
fn key(parsed: &Parsed, port: u32) -> FragmentKey {
    let protocol = match parsed.version {
        Version::V4 => parsed.protocol,
        Version::V6 => 0,
    };
    FragmentKey {
        source: parsed.tuple.source,
        destination: parsed.tuple.destination,
        id: parsed.fragment_id,
        port,
        protocol,
        reserved: [0; 3],
    }
}

/// Completes the packet's tuple if it is a fragment. `port` is the port that it comes
/// from, 0 for uplinks; `hold`: it may wait for the first one, wherever it goes, and not
/// only if it goes to the node.
#[inline(always)]
pub(crate) fn complete(ctx: &TcContext, work: &mut Work, port: u32, hold: bool) -> Standing {
    match work.parsed.fragment {
        Fragment::Whole => Standing::Known,
        Fragment::First => first(ctx, work, port, hold),
        Fragment::Later => later(ctx, work, port, hold),
    }
}

#[inline(never)]
fn first(ctx: &TcContext, work: &mut Work, port: u32, hold: bool) -> Standing {
    let tuple = &work.parsed.tuple;
    let protocol = work.parsed.protocol;
    // The table is everybody's: what only passes through gets no place in it.
    if !hold
        && ADDRESSES.get_ptr(&tuple.destination).is_none()
        && published(&tuple.destination, tuple.destination_port, protocol).is_none()
    {
        return Standing::Known;
    }
    let key = key(&work.parsed, port);
    let now = now();
    // SAFETY: the value is read at once.
    let held = match unsafe { FRAGMENTS.get(&key) } {
        Some(before) if !is_older(now, before.seen, FRAGMENT_NS) => before.held,
        Some(_) => 0,
        None => {
            work.share.fragment.datagram = key;
            if !share::of_datagram(port) {
                return Standing::Known;
            }
            0
        }
    };
    let entry = Fragments {
        seen: now,
        source_port: work.parsed.tuple.source_port,
        destination_port: work.parsed.tuple.destination_port,
        held: 0,
        protocol: work.parsed.protocol,
        reserved: 0,
    };
    // A full table evicts; then the rest of the datagram is lost.
    let _ = FRAGMENTS.insert(&key, &entry, u64::from(BPF_ANY));
    if held == 0 {
        return Standing::Known;
    }
    release(ctx, &key, held, work.from.again);
    Standing::Done
}

#[inline(never)]
fn later(ctx: &TcContext, work: &mut Work, port: u32, hold: bool) -> Standing {
    let key = key(&work.parsed, port);
    let now = now();
    let mut entry = Fragments {
        seen: now,
        source_port: 0,
        destination_port: 0,
        held: 0,
        protocol: 0,
        reserved: 0,
    };
    // SAFETY: the value is read at once.
    let before = unsafe { FRAGMENTS.get(&key) };
    let is_new = before.is_none();
    if let Some(before) = before
        && !is_older(now, before.seen, FRAGMENT_NS)
    {
        if before.protocol != 0 {
            work.parsed.protocol = before.protocol;
            work.parsed.tuple.source_port = before.source_port;
            work.parsed.tuple.destination_port = before.destination_port;
            return Standing::Known;
        }
        entry.held = before.held;
    }
    let hold = hold || ADDRESSES.get_ptr(&key.destination).is_some();
    if !hold || entry.held >= MAX_HELD {
        return Standing::Unknown;
    }
    work.share.fragment = HeldKey {
        datagram: key,
        number: u32::from(entry.held),
    };
    if is_new && !share::of_datagram(port)
        || !share::of_fragment(port)
        || !keep(ctx, &work.share.fragment)
    {
        return Standing::Unknown;
    }
    entry.held += 1;
    match FRAGMENTS.insert(&key, &entry, u64::from(BPF_ANY)) {
        Ok(()) => Standing::Done,
        Err(_) => Standing::Unknown,
    }
}

/// Whether a frame of that length can wait. (What the compiler makes of a plain comparison
/// tells the verifier of Linux 6.1 nothing about the length itself.)
#[inline(always)]
fn is_holdable(length: u32) -> bool {
    check_bounds_signed(i64::from(length), 1, HELD_LEN as i64)
}

/// Lets the frame wait; says whether it could.
#[inline(never)]
fn keep(ctx: &TcContext, key: &HeldKey) -> bool {
    let Some(holding) = HOLDING.get_ptr_mut(0) else {
        return false;
    };
    let length = ctx.len();
    if !is_holdable(length) {
        return false;
    }
    // SAFETY: the buffer is this CPU's own, and as long as the longest length.
    unsafe {
        (*holding).length = length;
        let frame = (&raw mut (*holding).frame).cast();
        bpf_skb_load_bytes(skb(ctx).cast(), 0, frame, length) == 0
            && HELD.insert(key, &*holding, u64::from(BPF_ANY)).is_ok()
    }
}

/// Receives the first fragment once more, or sends it, and then all that have waited for
/// it.
#[inline(never)]
fn release(ctx: &TcContext, datagram: &FragmentKey, held: u16, again: u32) {
    let device = ifindex(ctx);
    let again = u64::from(again);
    let changed = u64::from(BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH);
    // SAFETY: the context is the program's own, as for all helpers below.
    unsafe { bpf_clone_redirect(skb(ctx), device, again) };
    let mut key = HeldKey {
        datagram: *datagram,
        number: 0,
    };
    for number in 0..MAX_HELD {
        if number >= held {
            break;
        }
        key.number = u32::from(number);
        // SAFETY: an entry that is evicted meanwhile is memory of the map still.
        let Some(frame) = (unsafe { HELD.get(&key) }) else {
            continue;
        };
        let length = frame.length;
        if !is_holdable(length) {
            continue;
        }
        // SAFETY: the frame is at least as long as its length.
        unsafe {
            if bpf_skb_change_tail(skb(ctx), length, 0) == 0
                && bpf_skb_store_bytes(
                    skb(ctx).cast(),
                    0,
                    frame.frame.as_ptr().cast(),
                    length,
                    changed,
                ) == 0
            {
                bpf_clone_redirect(skb(ctx), device, again);
            }
        }
        let _ = HELD.remove(&key);
    }
}
