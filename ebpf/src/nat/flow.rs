//! The memory of flows: as the pod sees them, and as their clients do.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use bpf_bridge_common::{
    layout::{Address, FLOW_IDLE_NS, FLOW_REFRESH_NS, Flow, FlowKey, Published, is_older},
    packet::{IPPROTO_TCP, IPPROTO_UDP},
};

use crate::{
    maps::FLOWS,
    share,
    shared::PORTS,
    work::{From, Work, now},
};

/// How many source ports are tried before a client is refused. The second is needed
/// only by one who talks from one port to two addresses of the node that lead to the
/// same pod's port, or by two pods with the same port.
const ATTEMPTS: u32 = 6;
/// The least port that is tried in place of the client's own.
const FIRST_PORT: u32 = 1024;

/// Sets `key` and `flow` to what a request of a new flow says: the client, as whom the
/// pod sees it, and what was asked for.
#[inline(always)]
pub(crate) fn describe(
    key: &mut FlowKey,
    flow: &mut Flow,
    pod: &Published,
    seen_as: &Address,
    client: (&Address, u16),
    original: (&Address, u16),
    protocol: u8,
) {
    key.pod = pod.address;
    key.client = *seen_as;
    key.port = pod.port;
    key.pod_port = pod.pod_port;
    key.client_port = client.1;
    key.protocol = protocol;
    key.reserved = [0; 3];
    flow.client = *client.0;
    flow.client_port = client.1;
    flow.original = *original.0;
    flow.original_port = original.1;
    flow.flags = 0;
}

/// What came of looking for a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Found {
    /// It is known; the key has the port that the pod sees.
    Known,
    /// The same, and it is time to look at it again, and to [`refresh`] it.
    Stale,
    /// It is the host's stack's affair.
    Ceded,
    /// It is not known; the key has a port that is free.
    Free,
    /// It is not; the key has a port whose flow has been idle.
    Idle,
    /// It is not, and no port is free.
    Full,
}

impl Found {
    #[inline(always)]
    fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Known,
            1 => Self::Stale,
            2 => Self::Ceded,
            3 => Self::Free,
            4 => Self::Idle,
            _ => Self::Full,
        }
    }
}

/// Looks for the flow that `work.key` and `work.flow` describe, and for a port under which it
/// could be made, which the key has then.
///
/// Nobody is shown as somebody else: a pod that writes another client's address into
/// its packets has a flow of its own.
///
/// `yields`: if the stack has begun it, it is the same flow, and not one that looks the
/// same. `begins`: the packet begins a connection, which need not be looked for under later
/// ports.
#[inline(always)]
pub(crate) fn find(work: &mut Work, yields: bool, begins: bool) -> Found {
    Found::from_number(find_flow(work, u32::from(yields), u32::from(begins)))
}

/// A global function: see [`work`](crate::work).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_flow(work: *mut Work, yields: u32, begins: u32) -> u32 {
    // SAFETY: what is not null is a `Work`, and nobody else's.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return Found::Full as u32;
    };
    // On the stack: the verifier of Linux 6.1 takes nothing else of a caller's for a key.
    let mut key = work.key;
    let (wanted, from) = (&work.flow, &work.from);
    let (yields, begins) = (yields != 0, begins != 0);
    let now = now();
    let mut best = (0, Found::Full);
    for attempt in 0..ATTEMPTS {
        let port = port(wanted, attempt);
        key.client_port = port;
        match FLOWS.get_ptr_mut(&key) {
            Some(flow) => {
                // SAFETY: an entry that is evicted meanwhile is memory of the map
                // still; at worst a store is lost.
                let flow = unsafe { &mut *flow };
                if is_same(flow, wanted) {
                    if comes_from(flow, from) {
                        work.key.client_port = port;
                        return if is_older(now, flow.seen, FLOW_REFRESH_NS) {
                            Found::Stale as u32
                        } else {
                            Found::Known as u32
                        };
                    }
                    if flow.from == 0 && yields {
                        work.key.client_port = port;
                        return Found::Ceded as u32;
                    }
                }
                if best.1 == Found::Full && is_older(now, flow.seen, FLOW_IDLE_NS) {
                    best = (port, Found::Idle);
                }
            }
            // Not yet taken: the flow may be known under a later one, whose
            // forerunner was forgotten.
            None if best.1 != Found::Free => best = (port, Found::Free),
            None => {}
        }
        // SCTP's checksum would have to be made anew for another port, and others have none.
        if !matches!(key.protocol, IPPROTO_TCP | IPPROTO_UDP) || begins && best.1 == Found::Free {
            break;
        }
    }
    work.key.client_port = best.0;
    best.1 as u32
}

/// Says of a flow that it is still in use.
#[inline(always)]
pub(crate) fn refresh(key: &FlowKey, from: &From) {
    if let Some(flow) = FLOWS.get_ptr_mut(key) {
        // SAFETY: as in `find`.
        let flow = unsafe { &mut *flow };
        flow.seen = now();
        flow.client_mac = from.client_mac;
        flow.gateway_mac = from.gateway_mac;
    }
}

/// Remembers the flow in `work.key`, that is not known, as `found` says; says whether it
/// could. Another CPU may do the same at the same time.
#[inline(always)]
pub(crate) fn make(work: &mut Work, found: Found) -> bool {
    make_flow(work, found as u32) != 0
}

/// A global function, too.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn make_flow(work: *mut Work, found: u32) -> u32 {
    // SAFETY: as in `find_flow`.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return 0;
    };
    let found = Found::from_number(found);
    let (key, mut flow, from) = (work.key, work.flow, &work.from);
    let flags = match found {
        Found::Free => BPF_NOEXIST,
        Found::Full => return 0,
        _ => BPF_ANY,
    };
    flow.seen = now();
    flow.from = from.ifindex;
    flow.client_mac = from.client_mac;
    flow.gateway_mac = from.gateway_mac;
    if found == Found::Free && !share::of_flow(share::owner(&key, from)) {
        return 0;
    }
    // A full table evicts.
    let _ = FLOWS.insert(&key, &flow, u64::from(flags));
    // Not only to be sure: a fresh entry that was never looked up counts as unused,
    // and could be the next to be evicted.
    // SAFETY: the value is read at once.
    let there = unsafe { FLOWS.get(&key) };
    u32::from(there.is_some_and(|there| is_same(there, &flow) && there.from == flow.from))
}

/// Whether the flow's requests come in where the packet at hand does: by a pod's own
/// port, or from outside by any uplink; a link-local client is on one link only.
#[inline(always)]
fn comes_from(flow: &Flow, from: &From) -> bool {
    flow.from == from.ifindex
        || from.ifindex != 0
            && from.segment == 0
            && flow.from != 0
            && !flow.client.is_link_local()
            && PORTS.get_ptr(flow.from).is_none()
}

#[inline(always)]
fn is_same(flow: &Flow, wanted: &Flow) -> bool {
    flow.client_port == wanted.client_port
        && flow.original_port == wanted.original_port
        && flow.client == wanted.client
        && flow.original == wanted.original
}

/// The source port of the attempt. It must be the same each time, so that a flow
/// whose memory was lost is found again where it was.
#[inline(always)]
fn port(flow: &Flow, attempt: u32) -> u16 {
    if attempt == 0 {
        return flow.client_port;
    }
    let mut hash = (u32::from(flow.original_port) << 16) | u32::from(flow.client_port);
    hash ^= flow.client.words()[3] ^ flow.original.words()[3].rotate_left(16);
    hash = (hash ^ attempt.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 15;
    let range = 0x1_0000 - FIRST_PORT;
    (FIRST_PORT + (((hash & 0xffff) * range) >> 16)) as u16
}
