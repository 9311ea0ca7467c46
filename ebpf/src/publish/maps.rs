//! The tables of published ports. See [`bpf_bridge_common::layout`].

use aya_ebpf::{
    btf_maps::{Array, HashMap, LruHashMap},
    macros::btf_map,
};
use bpf_bridge_common::layout::{
    Address, Flow, FlowKey, FragmentKey, Fragments, Held, HeldKey, MAX_ADDRESSES, MAX_FLOWS,
    MAX_FRAGMENTS, MAX_HELD_TOTAL, MAX_PEERS, MAX_PUBLISHED, MAX_XDP_UPLINKS, Mac, Node, PeerKey,
    Published, PublishedKey, Socket,
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
pub(crate) static HELD: LruHashMap<HeldKey, Held, { MAX_HELD_TOTAL as usize }> = LruHashMap::new();

#[btf_map]
pub(crate) static ADDRESSES: HashMap<Address, u8, { MAX_ADDRESSES as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static PEERS: LruHashMap<PeerKey, Socket, { MAX_PEERS as usize }> = LruHashMap::new();

#[btf_map]
pub(crate) static XDP_UPLINKS: HashMap<u32, Mac, { MAX_XDP_UPLINKS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static NODE: Array<Node, 1> = Array::new();

/// Who serves `port` of `address`, if anybody does.
#[inline(always)]
pub(crate) fn published(address: &Address, port: u16, protocol: u8) -> Option<&'static Published> {
    let mut key = PublishedKey {
        address: address.unspecified_like(),
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
