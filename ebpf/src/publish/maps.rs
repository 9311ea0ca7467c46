//! The tables of published ports. See [`bpf_bridge_common::layout`].

use aya_ebpf::{
    btf_maps::{Array, HashMap, LruHashMap},
    macros::btf_map,
};
use bpf_bridge_common::layout::{
    Flow, FlowKey, FragmentKey, Fragments, MAX_ADDRESSES, MAX_FLOWS, MAX_FRAGMENTS, MAX_PEERS,
    MAX_PUBLISHED, Node, PeerKey, Published, PublishedKey, Socket,
};

use crate::shared::ON_DEMAND;

#[btf_map]
pub(crate) static PUBLISHED: HashMap<
    PublishedKey,
    Published,
    { MAX_PUBLISHED as usize },
    ON_DEMAND,
> = HashMap::new();

#[btf_map]
pub(crate) static FLOWS: LruHashMap<FlowKey, Flow, { MAX_FLOWS as usize }> = LruHashMap::new();

#[btf_map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, Fragments, { MAX_FRAGMENTS as usize }> =
    LruHashMap::new();

#[btf_map]
pub(crate) static ADDRESSES: HashMap<[u8; 16], u8, { MAX_ADDRESSES as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static PEERS: LruHashMap<PeerKey, Socket, { MAX_PEERS as usize }> = LruHashMap::new();

#[btf_map]
pub(crate) static NODE: Array<Node, 1> = Array::new();

/// Who serves `port` of `address`, if anybody does.
#[inline(always)]
pub(crate) fn published(address: &[u8; 16], port: u16, protocol: u8) -> Option<&'static Published> {
    let mut key = PublishedKey {
        address: unspecified_like(address),
        port,
        protocol,
        reserved: 0,
    };
    // SAFETY: the plugin replaces entries of this map whole.
    let everywhere = unsafe { PUBLISHED.get(&key) }?;
    if everywhere.specific == 0 {
        return Some(everywhere);
    }
    key.address = *address;
    // SAFETY: as above.
    unsafe { PUBLISHED.get(&key) }
}

/// Whether it is an IPv4 address, mapped into IPv6.
#[inline(always)]
pub(crate) fn is_v4(address: &[u8; 16]) -> bool {
    matches!(address, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ..])
}

/// The unspecified address of the same family.
#[inline(always)]
fn unspecified_like(address: &[u8; 16]) -> [u8; 16] {
    let mut unspecified = [0; 16];
    if is_v4(address) {
        unspecified[10] = 0xff;
        unspecified[11] = 0xff;
    }
    unspecified
}

/// Whether it is a loopback address.
#[inline(always)]
pub(crate) fn is_loopback(address: &[u8; 16]) -> bool {
    if is_v4(address) {
        address[12] == 127
    } else {
        matches!(address, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    }
}
