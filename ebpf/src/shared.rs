//! What both objects have: the ports, their counters, what was assigned, and the
//! context.

use core::hint::black_box;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_NO_PREALLOC},
    btf_maps::{HashMap, PerCpuHashMap},
    helpers::bpf_redirect,
    macros::btf_map,
    programs::TcContext,
};
use bpf_bridge_common::{
    drops::DropReason,
    layout::{
        Endpoint, IpKey, MAX_ENDPOINTS, MAX_NEIGHBORS, MAX_PORTS, MAX_SEGMENTS, MacKey, Neighbor,
        Port, PortStats, Segment,
    },
};

/// Memory is taken when an entry is made: most nodes have far fewer than the
/// limits allow.
pub(crate) const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// `PACKET_HOST` of `linux/if_packet.h`.
pub(crate) const PACKET_HOST: u32 = 0;

/// Where in the control buffer `port` leaves the ifindex of the host veth that a frame is
/// for, to a program that it calls.
pub(crate) const TARGET: usize = 0;
/// And that port's flags; to what pods send the gateway, those of the pod's port.
pub(crate) const FLAGS: usize = 1;
/// And the segment.
pub(crate) const SEGMENT: usize = 2;

#[btf_map]
pub(crate) static PORTS: HashMap<u32, Port, { MAX_PORTS as usize }, ON_DEMAND> = HashMap::new();

#[btf_map]
pub(crate) static STATS: PerCpuHashMap<u32, PortStats, { MAX_PORTS as usize + 1 }, ON_DEMAND> =
    PerCpuHashMap::new();

#[btf_map]
pub(crate) static ENDPOINTS: HashMap<MacKey, Endpoint, { MAX_ENDPOINTS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static NEIGHBORS: HashMap<IpKey, Neighbor, { MAX_NEIGHBORS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static SEGMENTS: HashMap<u32, Segment, { MAX_SEGMENTS as usize }, ON_DEMAND> =
    HashMap::new();

/// The device that the frame arrived on, or leaves by.
#[inline(always)]
pub(crate) fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid for as long as the program runs.
    unsafe { (*skb(ctx)).ifindex }
}

/// The context as the helpers take it.
#[inline(always)]
pub(crate) fn skb(ctx: &TcContext) -> *mut __sk_buff {
    ctx.as_ptr().cast()
}

/// Marks a packet for programs that it meets later in the host; 0 takes the mark away, which
/// whoever sent it may have set.
#[inline(always)]
pub(crate) fn set_mark(ctx: &TcContext, mark: u32) {
    // SAFETY: the context is valid for as long as the program runs.
    unsafe { (*skb(ctx)).tc_index = mark };
}

/// Into the host's stack, as if received on the gateway device.
#[inline(always)]
pub(crate) fn to_host(segment: u32) -> i32 {
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(segment, u64::from(BPF_F_INGRESS)) as i32 }
}

/// Counts a drop against the port, or against number 0 if it is none.
#[inline(always)]
pub(crate) fn count_drop(ifindex: u32, reason: DropReason) {
    let number = if reason as u32 == DropReason::NotAPort as u32 {
        0
    } else {
        ifindex
    };
    // The compiler knows that no reason is out of bounds; the verifier must see it.
    let index = black_box(reason as usize);
    if let Some(stats) = STATS.get_ptr_mut(number)
        // SAFETY: the value is this CPU's own.
        && let Some(drops) = unsafe { (*stats).drops.get_mut(index) }
    {
        *drops += 1;
    }
}
