//! Shares: what one owner, mostly a pod, can have of a table that it shares with others.
//!
//! The tables forget what was not used for longest, whosever it is. So an owner has as many
//! numbered *places* as its share is large, and an entry is made only with a place: one that
//! is free, or one whose entry is forgotten for it. Whoever makes more than the share holds
//! loses entries of its own, and no others.
//!
//! A hand goes round over the places, so it comes to the oldest first. What is still in use
//! is spared if one of a few others, found by chance, is not. Two CPUs may want one place at
//! the same time: then the one that removes what was there, or is the first to write, has it,
//! and the other tries another one.

use aya_ebpf::{Global, bindings::BPF_NOEXIST, helpers::bpf_get_prandom_u32};
use bpf_bridge_common::layout::{
    FLOW_MASQUERADED, Flow, FlowKey, HeldKey, MAX_FLOWS, MAX_FRAGMENTS, MAX_HELD_TOTAL, PLACE_HAND,
    PLACES_FLOWS, PLACES_FRAGMENTS, PLACES_HELD, PLACES_REPLIES, POD_SHARE, Place, PlaceKey,
    REPLY_ENDED, ReplyKey, SPARED_NS, is_older,
};

use crate::{
    maps::{FLOWS, FRAGMENTS, HELD, PLACES, REPLIES},
    work::{From, Work, now},
};

/// How many places an owner has, of each kind. The plugin says it.
#[unsafe(no_mangle)]
static FLOWS_SHARE: Global<u32> = Global::new(MAX_FLOWS / POD_SHARE);
#[unsafe(no_mangle)]
static FRAGMENTS_SHARE: Global<u32> = Global::new(MAX_FRAGMENTS / POD_SHARE);
#[unsafe(no_mangle)]
static HELD_SHARE: Global<u32> = Global::new(MAX_HELD_TOTAL / POD_SHARE);

/// How many places are looked at, and how often one is tried for.
const ATTEMPTS: u32 = 3;

/// What is at hand while a place is looked for.
pub(crate) struct Share {
    key: PlaceKey,
    /// What is to have the place.
    entry: Place,
    /// What had it.
    old: Place,
    /// The flow of that, as others see it.
    twin: ReplyKey,
    /// The fragment that needs a place, or its datagram.
    pub(crate) fragment: HeldKey,
}

/// Whose share a flow of `key` is of, that begins with a packet from `from`: the asker's if
/// that is a pod, else that of the pod that is asked.
#[inline(always)]
pub(crate) fn owner(key: &FlowKey, from: &From) -> u32 {
    if from.segment == 0 {
        key.port
    } else {
        from.ifindex
    }
}

/// Takes a place of `owner` for the flow in `work.key`.
#[inline(always)]
pub(crate) fn of_flow(owner: u32) -> bool {
    take_place(owner, PLACES_FLOWS) != 0
}

/// For that of the stack in `work.reply_key`.
#[inline(always)]
pub(crate) fn of_reply(owner: u32) -> bool {
    take_place(owner, PLACES_REPLIES) != 0
}

/// For the datagram in `work.share.fragment`.
#[inline(always)]
pub(crate) fn of_datagram(owner: u32) -> bool {
    take_place(owner, PLACES_FRAGMENTS) != 0
}

/// For the fragment there.
#[inline(always)]
pub(crate) fn of_fragment(owner: u32) -> bool {
    take_place(owner, PLACES_HELD) != 0
}

/// Takes a place; 0 if other CPUs were faster each time. A global function: the verifier looks at it
/// once, and not once for each way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_place(owner: u32, table: u32) -> u32 {
    let Some(work) = Work::get() else {
        return 0;
    };
    let share = &mut work.share;
    let size = match table {
        PLACES_FLOWS => {
            set(&mut share.entry, &work.key);
            FLOWS_SHARE.load()
        }
        PLACES_REPLIES => {
            set(&mut share.entry, &work.reply_key);
            FLOWS_SHARE.load()
        }
        PLACES_FRAGMENTS => {
            set(&mut share.entry, &share.fragment);
            FRAGMENTS_SHARE.load()
        }
        _ => {
            set(&mut share.entry, &share.fragment);
            HELD_SHARE.load()
        }
    };
    if size == 0 {
        return 0;
    }
    share.key.owner = owner;
    share.key.table = table;
    let mut number = turn(share) % size;
    let (mut best, mut least) = (number, u64::MAX);
    let now = now();
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        share.key.number = number;
        let seen = last_use(share);
        if seen <= OVER || is_older(now, seen, SPARED_NS) {
            (best, least) = (number, seen);
            break;
        }
        if seen < least {
            (best, least) = (number, seen);
        }
        // SAFETY: a helper that makes a number.
        number = unsafe { bpf_get_prandom_u32() } % size;
        attempt += 1;
    }
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        share.key.number = best;
        if (least == FREE || vacate(share))
            && PLACES
                .insert(&share.key, &share.entry, u64::from(BPF_NOEXIST))
                .is_ok()
        {
            return 1;
        }
        // Another CPU has taken it meanwhile. They do not meet again.
        // SAFETY: as above.
        best = unsafe { bpf_get_prandom_u32() } % size;
        least = OVER;
        attempt += 1;
    }
    0
}

/// The number of the next place, which need not be within the share.
#[inline(always)]
fn turn(share: &mut Share) -> u32 {
    share.key.number = PLACE_HAND;
    if let Some(hand) = PLACES.get_ptr_mut(&share.key) {
        // SAFETY: an entry that is evicted meanwhile is memory of the map still. If two CPUs
        // count at once they try the same place.
        unsafe {
            (*hand).entry[0] = (*hand).entry[0].wrapping_add(1);
            return (*hand).entry[0];
        }
    }
    share.old.entry = [0; _];
    let _ = PLACES.insert(&share.key, &share.old, u64::from(BPF_NOEXIST));
    0
}

/// What [`last_use`] says of a place without an entry, and of one whose entry is of no more
/// use.
const FREE: u64 = 0;
const OVER: u64 = 1;

/// When what has the place was last used, in ns.
#[inline(never)]
fn last_use(share: &mut Share) -> u64 {
    let Some(place) = PLACES.get_ptr(&share.key) else {
        return FREE;
    };
    match share.key.table {
        PLACES_FLOWS => {
            // SAFETY: as in `turn`; what was written there is the key of a flow.
            let key = unsafe { &*place.cast::<FlowKey>() };
            // SAFETY: as above.
            let Some(flow) = (unsafe { FLOWS.get(key) }) else {
                return OVER;
            };
            let seen = flow.seen;
            if flow.flags & FLOW_MASQUERADED == 0 {
                return seen;
            }
            set_twin(&mut share.twin, key, flow);
            // SAFETY: as above.
            match unsafe { REPLIES.get(&share.twin) } {
                Some(reply) if reply.flags & REPLY_ENDED != 0 => OVER,
                // Who only hears says so here.
                Some(reply) => seen.max(reply.seen),
                None => seen,
            }
        }
        PLACES_REPLIES => {
            // SAFETY: as above.
            let key = unsafe { &*place.cast::<ReplyKey>() };
            // SAFETY: as above.
            unsafe { REPLIES.get(key) }.map_or(OVER, |reply| reply.seen)
        }
        // What waits longest.
        _ => OVER,
    }
}

/// Forgets what has the place; says whether it was this CPU that did.
#[inline(never)]
fn vacate(share: &mut Share) -> bool {
    let Some(place) = PLACES.get_ptr(&share.key) else {
        return true;
    };
    // SAFETY: as in `turn`.
    share.old = unsafe { *place };
    if PLACES.remove(&share.key).is_err() {
        return false;
    }
    let old = &raw const share.old;
    match share.key.table {
        PLACES_FLOWS => {
            // SAFETY: as in `last_use`.
            let key = unsafe { &*old.cast::<FlowKey>() };
            forget_flow(key, &mut share.twin);
        }
        PLACES_REPLIES => {
            // SAFETY: as above.
            let key = unsafe { &*old.cast::<ReplyKey>() };
            // A pod has it, if that needed the port when it was idle.
            // SAFETY: as above.
            if unsafe { REPLIES.get(key) }.is_some_and(|reply| reply.port == 0) {
                let _ = REPLIES.remove(key);
            }
        }
        PLACES_FRAGMENTS => {
            // SAFETY: as above.
            let _ = FRAGMENTS.remove(unsafe { &(*old.cast::<HeldKey>()).datagram });
        }
        _ => {
            // SAFETY: as above.
            let _ = HELD.remove(unsafe { &*old.cast::<HeldKey>() });
        }
    }
    true
}

/// Forgets a flow, as the pod sees it and as others do.
#[inline(always)]
fn forget_flow(key: &FlowKey, twin: &mut ReplyKey) {
    // SAFETY: as in `turn`.
    let Some(flow) = (unsafe { FLOWS.get(key) }) else {
        return;
    };
    // Others know a flow that is masqueraded, and one of the stack.
    let is_known = flow.from == 0 || flow.flags & FLOW_MASQUERADED != 0;
    set_twin(twin, key, flow);
    let owner = if flow.from == 0 { 0 } else { key.port };
    let _ = FLOWS.remove(key);
    if !is_known {
        return;
    }
    // SAFETY: as above.
    if unsafe { REPLIES.get(&*twin) }.is_some_and(|reply| reply.port == owner) {
        let _ = REPLIES.remove(&*twin);
    }
}

/// The key of a flow as others see it.
#[inline(always)]
fn set_twin(twin: &mut ReplyKey, key: &FlowKey, flow: &Flow) {
    twin.remote = flow.client;
    twin.local = flow.original;
    twin.remote_port = flow.client_port;
    twin.local_port = flow.original_port;
    twin.protocol = key.protocol;
    twin.reserved = [0; 3];
}

#[inline(always)]
fn set<K: Copy>(place: &mut Place, key: &K) {
    const { assert!(size_of::<K>() <= size_of::<Place>() && align_of::<K>() <= 4) }
    // SAFETY: the place is as long, and aligned as well.
    unsafe { place.entry.as_mut_ptr().cast::<K>().write(*key) }
}
