//! The tables of published ports. See [`bpf_bridge_common::layout`].

use aya_ebpf::{
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, ProgramArray},
    macros::btf_map,
};
use bpf_bridge_common::layout::{
    Address, ExemptKey, Flow, FlowKey, FragmentKey, Fragments, Held, HeldKey, MAX_ADDRESSES,
    MAX_EXEMPT, MAX_FLOWS, MAX_FRAGMENTS, MAX_HELD_TOTAL, MAX_MASQUERADED, MAX_PEERS, MAX_PLACES,
    MAX_PUBLISHED, MAX_REPLIES, MAX_UPLINKS, MAX_XDP_UPLINKS, Mac, Masqueraded, NEXT_COUNT, Node,
    PeerKey, Place, PlaceKey, PodKey, Present, Published, PublishedKey, Reply, ReplyKey, Socket,
    USED_WORDS, Uplink,
};

use crate::shared::{PORTS, SEGMENTS};

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
pub(crate) static PLACES: LruHashMap<PlaceKey, Place, { MAX_PLACES as usize }> = LruHashMap::new();

#[btf_map]
pub(crate) static ADDRESSES: HashMap<Address, Present, { MAX_ADDRESSES as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static PEERS: LruHashMap<PeerKey, Socket, { MAX_PEERS as usize }> = LruHashMap::new();

#[btf_map]
pub(crate) static XDP_UPLINKS: HashMap<u32, Mac, { MAX_XDP_UPLINKS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static MASQUERADED: HashMap<
    PodKey,
    Masqueraded,
    { MAX_MASQUERADED as usize },
    ON_DEMAND,
> = HashMap::new();

#[btf_map]
pub(crate) static EXEMPT: LpmTrie<ExemptKey, u8, { MAX_EXEMPT as usize }> = LpmTrie::new();

#[btf_map]
pub(crate) static REPLIES: LruHashMap<ReplyKey, Reply, { MAX_REPLIES as usize }> =
    LruHashMap::new();

#[btf_map]
pub(crate) static USED: Array<u64, { USED_WORDS as usize }> = Array::new();

#[btf_map]
pub(crate) static UPLINKS: HashMap<u32, Uplink, { MAX_UPLINKS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static NODE: Array<Node, 1> = Array::new();

#[btf_map]
pub(crate) static NEXT: ProgramArray<{ NEXT_COUNT as usize }> = ProgramArray::new();

/// The gateway's MAC address in a segment.
#[inline(always)]
pub(crate) fn gateway_mac(segment: u32) -> Option<Mac> {
    // SAFETY: the plugin replaces entries of these maps whole.
    unsafe {
        let segment = SEGMENTS.get(segment)?;
        Some(PORTS.get(segment.gateway_port)?.mac)
    }
}

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
