//! The memory of flows: as the pod sees them, and as their clients do.

use aya_ebpf::bindings::BPF_NOEXIST;
use bpf_bridge_common::{
    layout::{Flow, FlowKey, Mac, Published},
    packet::IPPROTO_SCTP,
};

use crate::maps::FLOWS;

/// How many source ports are tried before a client is refused. The second is needed
/// only by one who talks from one port to two addresses of the node that lead to the
/// same pod's port, or by two pods with the same port.
const ATTEMPTS: u32 = 6;
/// The least port that is tried in place of the client's own.
const FIRST_PORT: u32 = 1024;

/// Where requests of a flow come in, and by whom.
#[derive(Clone, Copy)]
pub(crate) struct From {
    /// As [`Flow::from`].
    pub(crate) ifindex: u32,
    /// As [`Flow::client_mac`].
    pub(crate) client_mac: Mac,
    /// As [`Flow::gateway_mac`].
    pub(crate) gateway_mac: Mac,
}

/// Who asks for what.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) client: &'a [u8; 16],
    pub(crate) client_port: u16,
    /// As whom the pod sees the client.
    pub(crate) seen_as: &'a [u8; 16],
    pub(crate) original: &'a [u8; 16],
    pub(crate) original_port: u16,
    pub(crate) protocol: u8,
}

impl Request<'_> {
    #[inline(always)]
    fn key(&self, pod: &Published) -> FlowKey {
        FlowKey {
            pod: pod.address,
            client: *self.seen_as,
            port: pod.port,
            pod_port: pod.pod_port,
            client_port: self.client_port,
            protocol: self.protocol,
            reserved: [0; 3],
        }
    }

    #[inline(always)]
    fn is(&self, flow: &Flow) -> bool {
        flow.client_port == self.client_port
            && flow.original_port == self.original_port
            && flow.client == *self.client
            && flow.original == *self.original
    }

    /// The source port of the attempt. It must be the same each time, so that a flow
    /// whose memory was lost is found again where it was.
    #[inline(always)]
    fn port(&self, attempt: u32) -> u16 {
        if attempt == 0 {
            return self.client_port;
        }
        let mut hash = u32::from(self.original_port) << 16 | u32::from(self.client_port);
        hash ^= last_word(self.client) ^ last_word(self.original).rotate_left(16);
        hash = (hash ^ attempt.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
        hash ^= hash >> 15;
        let range = 0x1_0000 - FIRST_PORT;
        (FIRST_PORT + ((hash & 0xffff) * range >> 16)) as u16
    }

    /// The port under which the pod knows the client, if it does.
    #[inline(always)]
    pub(crate) fn known(&self, pod: &Published) -> Option<u16> {
        let mut key = self.key(pod);
        for attempt in 0..ATTEMPTS {
            key.client_port = self.port(attempt);
            // SAFETY: the value is read at once.
            if unsafe { FLOWS.get(&key) }.is_some_and(|flow| self.is(flow)) {
                return Some(key.client_port);
            }
            if self.protocol == IPPROTO_SCTP {
                break;
            }
        }
        None
    }
}

#[inline(always)]
fn last_word(address: &[u8; 16]) -> u32 {
    let [.., a, b, c, d] = *address;
    u32::from_ne_bytes([a, b, c, d])
}

/// What came of looking for a flow.
pub(crate) enum Found {
    /// It was known, under this port.
    Known(u16),
    /// It was not, and this port is free.
    Free(u16),
    /// It was not, and no port is free.
    Full,
}

/// Looks for the flow, and for a port under which it could be made.
#[inline(always)]
pub(crate) fn find(pod: &Published, request: &Request<'_>, from: &From) -> Found {
    let mut key = request.key(pod);
    let mut free = None;
    for attempt in 0..ATTEMPTS {
        key.client_port = request.port(attempt);
        match FLOWS.get_ptr_mut(&key) {
            Some(flow) => {
                // SAFETY: an entry that is evicted meanwhile is memory of the map
                // still; at worst a store is lost.
                let flow = unsafe { &mut *flow };
                if request.is(flow) {
                    if flow.from != from.ifindex {
                        flow.from = from.ifindex;
                        flow.client_mac = from.client_mac;
                        flow.gateway_mac = from.gateway_mac;
                    }
                    return Found::Known(key.client_port);
                }
            }
            // Not yet taken: the flow may be known under a later one, whose
            // forerunner was forgotten.
            None if free.is_none() => free = Some(key.client_port),
            None => {}
        }
        if request.protocol == IPPROTO_SCTP {
            // Its checksum would have to be made anew for another port.
            break;
        }
    }
    match free {
        Some(port) => Found::Free(port),
        None => Found::Full,
    }
}

/// Remembers a new flow under `port`; says whether it could. Another CPU may do the
/// same at the same time.
#[inline(always)]
pub(crate) fn make(pod: &Published, request: &Request<'_>, from: &From, port: u16) -> bool {
    let mut key = request.key(pod);
    key.client_port = port;
    let flow = Flow {
        original: *request.original,
        client: *request.client,
        original_port: request.original_port,
        client_port: request.client_port,
        from: from.ifindex,
        client_mac: from.client_mac,
        gateway_mac: from.gateway_mac,
    };
    // A full table evicts.
    let _ = FLOWS.insert(&key, &flow, u64::from(BPF_NOEXIST));
    // Not only to be sure: a fresh entry that was never looked up counts as unused,
    // and could be the next to be evicted.
    // SAFETY: the value is read at once.
    unsafe { FLOWS.get(&key) }.is_some_and(|flow| request.is(flow))
}
