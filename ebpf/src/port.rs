//! tc ingress of every port: one frame from a pod, or from the host, and where
//! it goes.
//!
//! | destination | verdict |
//! |---|---|
//! | a broadcast question for an assigned address | answered in place, back to the asker |
//! | an assigned address | straight into the pod (`bpf_redirect_peer`) |
//! | the gateway's address | into the host's stack, as if received on the gateway device |
//! | an address that was learned | out of the port where it was seen |
//! | a group, or nobody known | flooded |
//!
//! Frames are looked at, never written, on all of these paths but the first: the
//! offloads that the sender counts on stay as they are, and a frame that TCP may
//! still hold is not copied.

use aya_ebpf::{
    Global,
    bindings::{BPF_ANY, BPF_F_INGRESS, BPF_NOEXIST, TC_ACT_SHOT, TC_ACT_STOLEN},
    helpers::{bpf_ktime_get_ns, bpf_redirect, bpf_redirect_peer},
    macros::classifier,
    programs::TcContext,
};
use aya_log_ebpf::{debug, trace};
use bpf_bridge_common::{
    drops::DropReason,
    frame::{
        self, Destination, ETH_HLEN, ETH_P_8021AD, ETH_P_8021Q, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6,
    },
    guard::{IPPROTO_ICMP, ND_HOP_LIMIT},
    layout::{
        AGEING_NS, Learned, LearnedPlace, MAX_LEARNED, Mac, MacKey, PLACE_HAND, PLACES_LEARNED,
        POD_SHARE, PORT_GATEWAY, PORT_HAIRPIN, PORT_ISOLATED, PORT_MACSPOOFCHK, PORT_PROMISC,
        PORT_ROUTED, PORT_VIA_HOST, PROGRAM_BETWEEN, PROGRAM_FROM_HOST, PROGRAM_FROM_POD, PlaceKey,
        Port, REFRESH_NS, is_older,
    },
};

use crate::{
    flood, guard,
    maps::{LEARNED, LEARNED_PLACES, PROGRAMS},
    shared::{
        ENDPOINTS, FLAGS, PACKET_HOST, PORTS, SEGMENT, TARGET, count_drop, ifindex, set_mark, skb,
        to_host,
    },
};

/// What makes more of a frame than one that goes from a pod straight to another: all of it
/// is asked at once, since most frames are those.
const NOT_PLAIN: u32 = PORT_GATEWAY | PORT_ISOLATED | PORT_PROMISC | PORT_ROUTED | PORT_VIA_HOST;

/// How many addresses can be learned at one port. The plugin says it.
#[unsafe(no_mangle)]
static LEARNED_SHARE: Global<u32> = Global::new(MAX_LEARNED / POD_SHARE);

/// The program of every port.
#[classifier]
pub(crate) fn port(ctx: TcContext) -> i32 {
    let ifindex = ifindex(&ctx);
    conclude(&ctx, ifindex, switch(&ctx, ifindex))
}

/// The verdict; a drop is counted.
#[inline(always)]
pub(crate) fn conclude(ctx: &TcContext, ifindex: u32, result: Result<i32, DropReason>) -> i32 {
    match result {
        Ok(verdict) => {
            trace!(ctx, "port {}: verdict {}", ifindex, verdict);
            verdict
        }
        Err(reason) => {
            debug!(ctx, "port {}: drop, reason {}", ifindex, reason as u32);
            count_drop(ifindex, reason);
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn switch(ctx: &TcContext, ifindex: u32) -> Result<i32, DropReason> {
    // SAFETY: the plugin replaces entries of this map whole, and never removes
    // one whose program is still attached.
    let port = unsafe { PORTS.get(ifindex) }.ok_or(DropReason::NotAPort)?;

    let (to, from, says) = ethernet(ctx)?;
    if !is_same(from, core::ptr::from_ref(&port.mac).addr()) {
        strange_source(ifindex, port, mac(from))?;
    }
    if says || port.flags & PORT_MACSPOOFCHK != 0 {
        return guard::start(ctx);
    }
    forward(ctx, ifindex, port, to)
}

/// Sends a frame on to where it belongs.
#[inline(always)]
pub(crate) fn forward(
    ctx: &TcContext,
    ifindex: u32,
    port: &Port,
    to: Mac,
) -> Result<i32, DropReason> {
    match frame::destination(&to) {
        Destination::Unicast => unicast(ctx, ifindex, port, to),
        Destination::Group => flood::start(ctx),
        Destination::NodeOnly if port.flags & PORT_GATEWAY == 0 => Ok(to_host(port.segment)),
        Destination::NodeOnly => Err(DropReason::SamePort),
        Destination::Nobody => Err(DropReason::Pause),
    }
}

/// Where the byte is in a frame that says what an IPv4 packet carries.
const IPV4_PROTOCOL: usize = ETH_HLEN + 9;
/// And an IPv6 packet's hop limit.
const IPV6_HOP_LIMIT: usize = ETH_HLEN + 7;
/// As much of a frame as has both.
const LOOK: usize = IPV4_PROTOCOL + 1;

/// The destination, where the source is, and whether the frame may say something of
/// addresses: one that is not in one piece may.
#[inline(always)]
fn ethernet(ctx: &TcContext) -> Result<(Mac, usize, bool), DropReason> {
    let mut start = ctx.data();
    let mut says = true;
    if start + LOOK <= ctx.data_end() {
        let at = |offset: usize| {
            // SAFETY: the bounds were compared right above.
            unsafe { *((start + offset) as *const u8) }
        };
        // SAFETY: as above; frames begin at even addresses (`NET_IP_ALIGN`).
        says = match u16::from_be(unsafe { *((start + ETH_HLEN - 2) as *const u16) }) {
            ETH_P_IP => at(IPV4_PROTOCOL) == IPPROTO_ICMP,
            ETH_P_IPV6 => at(IPV6_HOP_LIMIT) == ND_HOP_LIMIT,
            ETH_P_ARP | ETH_P_8021Q | ETH_P_8021AD => true,
            _ => false,
        };
    } else if start + ETH_HLEN > ctx.data_end() {
        // The kernel pulls the header into the linear part before it runs
        // classifiers; a driver that does not is asked to.
        ctx.pull_data(ETH_HLEN as u32)
            .map_err(|_| DropReason::Truncated)?;
        start = ctx.data();
        if start + ETH_HLEN > ctx.data_end() {
            return Err(DropReason::Truncated);
        }
    }
    Ok((mac(start), start + size_of::<Mac>(), says))
}

/// The MAC address at an even address of which the bounds are known.
#[inline(always)]
fn mac(at: usize) -> Mac {
    let [a, b, c] = words(at).map(u16::to_ne_bytes);
    [a[0], a[1], b[0], b[1], c[0], c[1]]
}

/// Whether two such are the same.
#[inline(always)]
fn is_same(one: usize, other: usize) -> bool {
    let ([a, b, c], [d, e, f]) = (words(one), words(other));
    a == d && b == e && c == f
}

/// A MAC address in words: each access to a single byte would be an instruction.
#[inline(always)]
fn words(at: usize) -> [u16; 3] {
    // SAFETY: the caller has compared the bounds.
    unsafe { *(at as *const [u16; 3]) }
}

/// A source that was not assigned to the port: refused where the port says so,
/// else learned.
#[inline(always)]
fn strange_source(ifindex: u32, port: &Port, from: Mac) -> Result<(), DropReason> {
    if !frame::is_valid_source(&from) {
        return Err(DropReason::BadSource);
    }
    if port.flags & PORT_MACSPOOFCHK != 0 {
        return Err(DropReason::Spoofed);
    }
    let key = MacKey::new(port.segment, from);
    // SAFETY: a helper that reads a clock.
    let now = unsafe { bpf_ktime_get_ns() };
    if let Some(known) = LEARNED.get_ptr_mut(&key) {
        // SAFETY: an entry that is evicted meanwhile is memory of the map still;
        // at worst a store is lost.
        let known = unsafe { &mut *known };
        if known.port == ifindex {
            if is_older(now, known.seen, REFRESH_NS) {
                known.seen = now;
            }
            return Ok(());
        }
    }
    // What was assigned is never learned elsewhere.
    if ENDPOINTS.get_ptr(&key).is_none() && take_place(ifindex, &key) {
        let seen = Learned {
            seen: now,
            port: ifindex,
            reserved: 0,
        };
        // A full table evicts; a failure costs a flood, no frame.
        let _ = LEARNED.insert(key, seen, u64::from(BPF_ANY));
    }
    Ok(())
}

/// Takes a place in the port's share of learned addresses, and forgets what had it; the hand
/// goes round over them. (In the other object `share.rs` says more.) Says whether it could:
/// of two CPUs that want the same one, one does.
#[inline(never)]
fn take_place(ifindex: u32, mac: &MacKey) -> bool {
    let size = LEARNED_SHARE.load();
    if size == 0 {
        return false;
    }
    let mut key = PlaceKey {
        owner: ifindex,
        table: PLACES_LEARNED,
        number: PLACE_HAND,
    };
    let mut place = LearnedPlace { entry: [0; 3] };
    let mut number = 0;
    if let Some(hand) = LEARNED_PLACES.get_ptr_mut(&key) {
        // SAFETY: an entry that is evicted meanwhile is memory of the map still.
        unsafe {
            (*hand).entry[0] = (*hand).entry[0].wrapping_add(1);
            number = (*hand).entry[0];
        }
    } else {
        let _ = LEARNED_PLACES.insert(&key, &place, u64::from(BPF_NOEXIST));
    }
    key.number = number % size;
    if let Some(taken) = LEARNED_PLACES.get_ptr(&key) {
        // SAFETY: as above; it is the key of an address.
        let old = unsafe { *taken.cast::<MacKey>() };
        if LEARNED_PLACES.remove(&key).is_err() {
            return false;
        }
        // SAFETY: as above. It may have moved to another port since.
        if old != *mac && unsafe { LEARNED.get(&old) }.is_some_and(|old| old.port == ifindex) {
            let _ = LEARNED.remove(&old);
        }
    }
    // SAFETY: a place is as long as the key of an address, and aligned as it.
    unsafe { place.entry.as_mut_ptr().cast::<MacKey>().write(*mac) };
    LEARNED_PLACES
        .insert(&key, &place, u64::from(BPF_NOEXIST))
        .is_ok()
}

#[inline(always)]
fn unicast(ctx: &TcContext, ifindex: u32, port: &Port, to: Mac) -> Result<i32, DropReason> {
    let key = MacKey::new(port.segment, to);
    // SAFETY: as for `PORTS`.
    if let Some(endpoint) = unsafe { ENDPOINTS.get(&key) } {
        if endpoint.port == ifindex {
            return same_port(port, ifindex);
        }
        if endpoint.flags & PORT_GATEWAY != 0 {
            set_mark(ctx, 0);
            // Comes back only if no network needs that program.
            call(ctx, PROGRAM_FROM_POD, port, endpoint.port, port.flags);
            return Ok(to_host(port.segment));
        }
        if (port.flags | endpoint.flags) & NOT_PLAIN != 0 {
            show_to_host(ctx, port);
            if port.flags & PORT_GATEWAY != 0 {
                call(ctx, PROGRAM_FROM_HOST, port, endpoint.port, endpoint.flags);
            } else if (port.flags | endpoint.flags) & (PORT_ROUTED | PORT_VIA_HOST) != 0 {
                // Isolated ones may still answer what the host has brought.
                call(ctx, PROGRAM_BETWEEN, port, endpoint.port, endpoint.flags);
            }
            if endpoint.flags & port.flags & PORT_ISOLATED != 0 {
                return Err(DropReason::Isolated);
            }
        }
        // A mark of the host's stack means nothing inside the pod, and would mean
        // something else there; a veth between namespaces clears it too.
        ctx.set_mark(0);
        // The sender's veth took the frame for somebody else's; before 6.15 the
        // redirect keeps that mark, and the pod's stack would drop it.
        ctx.change_type(PACKET_HOST)
            .map_err(|_| DropReason::Helper)?;
        // SAFETY: a helper that takes numbers.
        return Ok(unsafe { bpf_redirect_peer(endpoint.port, 0) } as i32);
    }
    // SAFETY: the value is read at once.
    if let Some(learned) = unsafe { LEARNED.get(&key) } {
        // SAFETY: a helper that reads a clock.
        let now = unsafe { bpf_ktime_get_ns() };
        let at = learned.port;
        // SAFETY: as above. The port may be gone since, or be another segment's.
        let there = unsafe { PORTS.get(at) };
        if let Some(there) = there
            && there.segment == port.segment
            && !is_older(now, learned.seen, AGEING_NS)
        {
            if at == ifindex {
                return same_port(port, ifindex);
            }
            if there.flags & port.flags & PORT_ISOLATED != 0 {
                return Err(DropReason::Isolated);
            }
            show_to_host(ctx, port);
            // Out of the veth and in again at its peer: a bridge or a macvlan
            // inside the pod must see the frame as it would see it on a wire.
            // SAFETY: a helper that takes numbers.
            return Ok(unsafe { bpf_redirect(at, 0) } as i32);
        }
    }
    flood::start(ctx)
}

/// Lets another program go on with a frame for the port `target`, which is told the flags;
/// comes back only if it is not loaded.
#[inline(always)]
fn call(ctx: &TcContext, program: u32, port: &Port, target: u32, flags: u32) {
    // SAFETY: the program that is called takes the same context, which is valid for as
    // long as a program runs.
    unsafe {
        (*skb(ctx)).cb[TARGET] = target;
        (*skb(ctx)).cb[FLAGS] = flags;
        (*skb(ctx)).cb[SEGMENT] = port.segment;
        PROGRAMS.tail_call(ctx, program);
    }
}

/// A frame for where it came from.
#[inline(always)]
fn same_port(port: &Port, ifindex: u32) -> Result<i32, DropReason> {
    if port.flags & PORT_HAIRPIN == 0 {
        return Err(DropReason::SamePort);
    }
    if port.flags & PORT_ISOLATED != 0 {
        // From itself as well, as `br_skb_isolated` has it.
        return Err(DropReason::Isolated);
    }
    // SAFETY: a helper that takes numbers.
    Ok(unsafe { bpf_redirect(ifindex, 0) } as i32)
}

/// `promiscMode`: the gateway device gets a copy.
#[inline(always)]
fn show_to_host(ctx: &TcContext, port: &Port) {
    if port.flags & PORT_PROMISC != 0 {
        let _ = ctx.clone_redirect(port.segment, u64::from(BPF_F_INGRESS));
    }
}

/// The verdict for a frame that was handed over as copies: not a drop.
pub(crate) const HANDED_OVER: i32 = TC_ACT_STOLEN;
