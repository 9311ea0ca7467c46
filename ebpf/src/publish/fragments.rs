//! Fragments: only the first one of a datagram says which ports it is for.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_ktime_get_ns};
use bpf_bridge_common::{
    layout::{FRAGMENT_NS, FragmentKey, Fragments},
    packet::{Fragment, Parsed},
};

use crate::maps::FRAGMENTS;

#[inline(always)]
fn key(parsed: &Parsed, port: u32) -> FragmentKey {
    FragmentKey {
        source: parsed.tuple.source,
        destination: parsed.tuple.destination,
        id: parsed.fragment_id,
        port,
        protocol: parsed.protocol,
        reserved: [0; 3],
    }
}

/// Completes the packet's tuple if it is a fragment; says whether that could be done.
/// `port` is the port that it comes from, 0 for uplinks.
#[inline(always)]
pub(crate) fn complete(parsed: &mut Parsed, port: u32) -> bool {
    if parsed.fragment != Fragment::Later {
        return true;
    }
    // SAFETY: the value is read at once.
    let Some(first) = (unsafe { FRAGMENTS.get(&key(parsed, port)) }) else {
        return false;
    };
    // SAFETY: a helper that reads a clock.
    let age = unsafe { bpf_ktime_get_ns() }.saturating_sub(first.seen);
    if first.known == 0 || age > FRAGMENT_NS {
        return false;
    }
    parsed.tuple.source_port = first.source_port;
    parsed.tuple.destination_port = first.destination_port;
    true
}

/// Remembers the ports of a first fragment that was translated, for those that follow.
/// The table is everybody's: what is not for a published port gets no place in it.
#[inline(always)]
pub(crate) fn remember(parsed: &Parsed, port: u32) {
    if parsed.fragment != Fragment::First {
        return;
    }
    let first = Fragments {
        // SAFETY: a helper that reads a clock.
        seen: unsafe { bpf_ktime_get_ns() },
        source_port: parsed.tuple.source_port,
        destination_port: parsed.tuple.destination_port,
        held: 0,
        known: 1,
    };
    // A full table evicts; then the rest of the datagram is lost.
    let _ = FRAGMENTS.insert(&key(parsed, port), &first, u64::from(BPF_ANY));
}
