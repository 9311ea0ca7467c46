//! The tables that all programs share. The plugin pins each under its name, so
//! that they outlive the process that made them. See [`bpf_bridge_common::layout`].

use aya_ebpf::{
    btf_maps::{HashMap, LruHashMap, ProgramArray},
    macros::btf_map,
};
use bpf_bridge_common::layout::{
    Endpoint, IpKey, Learned, MAX_ENDPOINTS, MAX_LEARNED, MAX_MEMBERS, MAX_NEIGHBORS, MAX_PORTS,
    MAX_SEGMENTS, MacKey, Member, MemberKey, Neighbor, PROGRAM_COUNT, Segment,
};

use crate::shared::ON_DEMAND;

#[btf_map]
pub(crate) static ENDPOINTS: HashMap<MacKey, Endpoint, { MAX_ENDPOINTS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static NEIGHBORS: HashMap<IpKey, Neighbor, { MAX_NEIGHBORS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static LEARNED: LruHashMap<MacKey, Learned, { MAX_LEARNED as usize }> =
    LruHashMap::new();

#[btf_map]
pub(crate) static SEGMENTS: HashMap<u32, Segment, { MAX_SEGMENTS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static MEMBERS: HashMap<MemberKey, Member, { MAX_PORTS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static PROGRAMS: ProgramArray<{ PROGRAM_COUNT as usize }> = ProgramArray::new();

const _: () = assert!(MAX_MEMBERS <= MAX_PORTS);
